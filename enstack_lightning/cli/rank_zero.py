"""One answer for all processes of a run before they have met: rank 0 finds it, and the others are told.

torchrun's agent keeps a store that all its processes can reach from their start on; processes that Lightning starts
inherit the environment of the first. Where neither is so, each process finds the answer by itself, and the guard
compares what they were given once they have met.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

VARIABLE = "ENSTACK_TOLD_BY_RANK_ZERO"
_PATIENCE = timedelta(minutes=10)


def told_by_rank_zero(find: Callable[[], str | None], errors: tuple[type[Exception], ...]) -> str | None:
    """What `find` gives on rank 0, on every rank; the others look for themselves only where nobody can tell them.

    Args:
        find: gives the answer.
        errors: what `find` may raise; all ranks then raise it.

    Raises:
        Exception: one of `errors`, with rank 0's message.

    Example:
        >>> told_by_rank_zero(lambda: "runs/last.ckpt", ())
        'runs/last.ckpt'
    """
    if _rank() != 0:
        said = _hear()
        if said is None:
            return find()
        if said["raised"] is not None:
            raise errors[said["raised"]](said["message"])
        path: str | None = said["path"]
        return path
    try:
        path = find()
    except errors as e:
        kind = next(number for number, error in enumerate(errors) if isinstance(e, error))
        _tell({"raised": kind, "message": str(e)})
        raise
    _tell({"raised": None, "path": path})
    return path


def forget_what_was_told() -> None:
    """To be called at the run's end: what this process starts later is of another run."""
    os.environ.pop(VARIABLE, None)


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def _tell(said: dict[str, Any]) -> None:
    os.environ[VARIABLE] = json.dumps(said)
    with contextlib.suppress(RuntimeError, OSError):
        if (store := _store()) is not None:
            store.set(_key(), json.dumps(said))


def _hear() -> dict[str, Any] | None:
    said: str | bytes | None = None
    with contextlib.suppress(RuntimeError, OSError):
        store = _store()
        said = store.get(_key()) if store is not None else os.environ.get(VARIABLE)
    return dict(json.loads(said)) if said else None


def _store() -> Any:
    """The store of torchrun's agent; None where there is none."""
    here = os.environ
    if here.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(here.get("WORLD_SIZE", 1)) == 1:
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(here["MASTER_ADDR"], int(here["MASTER_PORT"]), is_master=False, timeout=_PATIENCE)


def _key() -> str:
    """Of this start: the store outlives the processes that torchrun restarts."""
    return f"enstack/ckpt_path/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{os.environ.get('WORLD_SIZE')}"
