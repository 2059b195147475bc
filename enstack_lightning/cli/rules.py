"""`enstack rules`: the table of rules, and the long explanation of one, from the rules themselves."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from enstack_lightning.checkpoint import RULES


def main(argv: Sequence[str]) -> int:
    """Runs `enstack rules [CODE]`; an unknown code ends with 2."""
    code = _parser().parse_args(argv[1:]).code
    if code is None:
        width = max(len(rule.name) for rule in RULES.values())
        for rule in sorted(RULES.values(), key=lambda r: r.code):
            summary = " ".join(_explanation(rule.code).partition("\n\n")[0].split())
            print(f"{rule.code}  {rule.name:{width}}  {summary}")
        return 0
    if code.upper() not in RULES:
        print(f"enstack rules: there is no rule {code}; `enstack rules` lists them", file=sys.stderr)
        return 2
    print(f"{code.upper()}  {RULES[code.upper()].name}\n\n{_explanation(code.upper())}")
    return 0


def _explanation(code: str) -> str:
    return inspect.getdoc(RULES[code].check) or ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="enstack rules", description="Lists what `enstack verify` checks, or explains one rule."
    )
    parser.add_argument("code", nargs="?", metavar="CODE", help="code of a rule, such as CK401")
    return parser
