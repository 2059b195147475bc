"""`enstack rules`: the table of rules, and the long explanation of one, from the rules themselves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from enstack_lightning.checkpoint import RULES, Rule
from enstack_lightning.checkpoint.rendering.plain import printable
from enstack_lightning.cli.output import say


def main(argv: Sequence[str]) -> int:
    """Runs `enstack rules [CODE...]`; an unknown code ends with 2."""
    arguments = _parser().parse_args(argv[1:])
    rules = sorted(RULES.values(), key=lambda rule: rule.code)
    for wanted in arguments.codes:
        if not wanted.strip():
            print("enstack rules: CODE names no rule; is a variable of the script unset?", file=sys.stderr)
            return 2
        if not any(rule.code.startswith(wanted.upper()) for rule in rules):
            print(f"enstack rules: there is no rule {printable(wanted)}; `enstack rules` lists them", file=sys.stderr)
            return 2
    explained = [rule for rule in rules if rule.code.startswith(tuple(c.upper() for c in arguments.codes))]
    if arguments.format == "markdown":
        say("\n".join(_markdown(explained if arguments.codes else rules)))
    elif arguments.codes:
        say("\n\n".join("\n".join(_explanation(rule)) for rule in explained))
    else:
        say("\n".join(_table(rules)))
    return 0


def _table(rules: Sequence[Rule]) -> Iterator[str]:
    name = max(len(rule.name) for rule in rules)
    for rule in rules:
        yield f"{rule.code}  {rule.severity:7}  {rule.name:{name}}  {rule.compares or rule.summary}"


def _explanation(rule: Rule) -> Iterator[str]:
    yield f"{rule.code}  {rule.name}"
    yield ""
    yield rule.explanation
    yield ""
    yield f"severity  {rule.severity} at worst"
    if rule.compares:
        yield f"compares  {rule.compares}"
    if rule.source:
        yield f"source    {rule.source}"


def _markdown(rules: Sequence[Rule]) -> Iterator[str]:
    yield "| code | name | severity | compares | source |"
    yield "| --- | --- | --- | --- | --- |"
    for rule in rules:
        cells = (rule.code, rule.name, rule.severity, rule.compares or rule.summary, rule.source)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="enstack rules",
        description="Lists what `enstack verify` checks, or explains one rule or a family of them.",
    )
    parser.add_argument("codes", nargs="*", metavar="CODE", help="code of a rule, or its beginning: CK401, CK4")
    parser.add_argument("--format", choices=("text", "markdown"), default="text", help="form of the list")
    return parser
