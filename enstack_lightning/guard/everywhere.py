"""The guard in every Trainer of an environment: `ENSTACK_GUARD=1 python train.py`, without a line of code.

Lightning asks the entry points of the groups `lightning.pytorch.callbacks_factory` and
`pytorch_lightning.callbacks_factory` for callbacks at each `Trainer(...)`. This one gives none unless the variable
says so, and then imports nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback

VARIABLE = "ENSTACK_GUARD"

_OFF = frozenset(("", "0", "false", "off", "no"))
_ON = frozenset(("1", "true", "on", "yes"))


def callbacks() -> list[Callback]:
    """The callbacks that `ENSTACK_GUARD` asks for: none, or what becomes a guard in a Trainer that has none.

    Unset, empty, `0`, `false`, `off` or `no`: none. `1`, `true`, `on` or `yes`: a guard with its defaults. Else the
    settings of `CheckpointGuard` as a command line has them, between spaces: `strict=true fallback=previous`.

    Raises:
        CheckpointGuardError: the variable holds something else.
    """
    said = os.environ.get(VARIABLE, "").strip()
    if said.lower() in _OFF:
        return []
    from enstack_lightning.guard.standin import EnvironmentGuard

    return [EnvironmentGuard(_settings(said))]


def _settings(said: str) -> dict[str, Any]:
    """The arguments of `CheckpointGuard` that the variable names."""
    if said.lower() in _ON:
        return {}
    import shlex

    from jsonargparse import ArgumentParser

    from enstack_lightning.errors import CheckpointGuardError
    from enstack_lightning.guard.callback import CheckpointGuard

    parser = ArgumentParser(exit_on_error=False)
    known = sorted(parser.add_class_arguments(CheckpointGuard))
    try:
        words = shlex.split(said)
        given = {word.partition("=")[0] for word in words}
        if unknown := sorted(given - set(known)):
            raise ValueError(f"CheckpointGuard has no setting {', '.join(unknown)}")
        if bare := [word for word in words if "=" not in word]:
            raise ValueError(f"{bare[0]} has no value")
        parsed = vars(parser.parse_args([f"--{word}" for word in words]))
        arguments = {name: parsed[name] for name in known if name in given}
        CheckpointGuard(**arguments)
    except Exception as e:
        raise CheckpointGuardError(
            f"{VARIABLE}={said!r}: {_first_lines(e)}. Write 1 for a guard with its defaults, 0 for none, or "
            f"settings as in 'strict=true fallback=previous'; there are {', '.join(known)}"
        ) from None  # the parser's own chain is 40 lines long and says no more
    return arguments


def _first_lines(error: BaseException) -> str:
    lines = [line.strip(" -.") for line in str(error).splitlines() if line.strip(" -.")]
    return " ".join(lines[:2]) if lines else type(error).__name__
