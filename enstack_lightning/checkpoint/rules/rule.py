"""What a rule is: a code, a name and a pure function from facts to outcomes, kept in one table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from enstack_lightning.checkpoint.facts import Facts


class Severity(StrEnum):
    """How much a finding matters: an `error` fails a verification, a `warning` does under `--strict`."""

    PASS = "pass"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Options:
    """What a user may set.

    Attributes:
        purpose: what the checkpoint is wanted for. For `inference` only files, weights and safety are judged.
        tolerance: optimizer steps by which actual and expected may differ. None: exact where the checkpoint has
            exact counters, else `max(20, batches_per_epoch // 10)`.
        min_lr: learning rates below this are suspicious.
        max_lr: learning rates above this are suspicious. None: twice the initial learning rate.
        deep: read every byte: compare all checksums and digests, find values that are not finite.
        digests: compare the digests of a manifest that stands beside the checkpoint; `deep` does so too.
        allow_globals: names (`module.name`) of classes of the user's own, which he vouches for.
        select: codes, or beginnings of codes, of the rules to apply; empty for all of them.
        ignore: codes, or beginnings of codes, of the rules to leave out.
        run_config: the configuration of the run that is to resume, as its YAML file holds it.
    """

    purpose: Literal["resume", "inference"] = "resume"
    tolerance: int | None = None
    min_lr: float = 1e-8
    max_lr: float | None = None
    deep: bool = False
    digests: bool = False
    allow_globals: frozenset[str] = frozenset()
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    run_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Makes collections of what was given as a list or as one text, and refuses what would judge nothing."""
        if self.purpose not in ("resume", "inference"):
            raise ValueError(f"purpose is {self.purpose!r} and must be 'resume' or 'inference'")
        if self.tolerance is not None and self.tolerance < 0:
            raise ValueError(f"tolerance is {self.tolerance} and must be None or a number from 0 up")
        for name in ("select", "ignore"):
            codes = tuple(code.upper() for code in _texts(getattr(self, name)))
            object.__setattr__(self, name, codes)
            for code in codes:
                if RULES and not any(known.startswith(code) for known in RULES):
                    raise ValueError(f"{name} holds {code!r}, and no rule's code is or begins so; see `enstack rules`")
        object.__setattr__(self, "allow_globals", frozenset(_texts(self.allow_globals)))


def _texts(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


@dataclass(frozen=True)
class Outcome:
    """What a rule says of one thing it looked at."""

    severity: Severity
    message: str
    where: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Finding:
    """An outcome with the code and name of its rule."""

    code: str
    name: str
    severity: Severity
    message: str
    where: str = ""
    hint: str = ""


Check = Callable[[Facts, Options], Iterable[Outcome]]


@dataclass(frozen=True)
class Rule:
    """One check with its stable code and name; the function's docstring is its documentation.

    Attributes:
        severity: the worst that it can say.
        compares: what it holds against what, in a few words.
        source: where what it holds things against is written down.
    """

    code: str
    name: str
    check: Check
    severity: Severity = Severity.ERROR
    compares: str = ""
    source: str = ""

    @property
    def explanation(self) -> str:
        """The docstring of its function."""
        return inspect.getdoc(self.check) or ""

    @property
    def summary(self) -> str:
        """The explanation's first paragraph, in one line."""
        return " ".join(self.explanation.partition("\n\n")[0].split())

    def findings(self, facts: Facts, options: Options) -> list[Finding]:
        return [
            Finding(self.code, self.name, o.severity, o.message, o.where, o.hint) for o in self.check(facts, options)
        ]


RULES: dict[str, Rule] = {}
"""Every rule by its code."""


def rule(
    code: str, name: str, severity: Severity = Severity.ERROR, *, compares: str = "", source: str = ""
) -> Callable[[Check], Check]:
    """Puts a check into the table of rules; `severity` is the worst that it can say."""

    def register(check: Check) -> Check:
        if code in RULES or not check.__doc__:
            raise ValueError(f"rule {code} is there twice or has no docstring")
        RULES[code] = Rule(code, name, check, severity, compares, source)
        return check

    return register


def passed(message: str, where: str = "") -> Outcome:
    """Looked at and found right."""
    return Outcome(Severity.PASS, message, where)


def info(message: str, where: str = "", hint: str = "") -> Outcome:
    """Worth knowing, neither right nor wrong."""
    return Outcome(Severity.INFO, message, where, hint)


def warning(message: str, where: str = "", hint: str = "") -> Outcome:
    """Probably wrong; resuming is possible."""
    return Outcome(Severity.WARNING, message, where, hint)


def error(message: str, where: str = "", hint: str = "") -> Outcome:
    """Wrong; resuming would fail or do harm."""
    return Outcome(Severity.ERROR, message, where, hint)
