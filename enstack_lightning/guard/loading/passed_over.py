"""A recovery checkpoint that a resume passes over."""

from __future__ import annotations

from collections.abc import Callable

from enstack_lightning.checkpoint import Report
from enstack_lightning.checkpoint.location import locate
from enstack_lightning.guard.recovery import RECOVERY_NAME, recovery_names
from enstack_lightning.guard.saving.atomic import local_path


def passed_over(loaded: Report, verify: Callable[[str], Report]) -> str:
    """The sentence that says that a good recovery checkpoint beside the one to be loaded holds more steps; else empty.

    `ckpt_path="last"` looks for files called `last` only, and passes over what was saved when a signal ended the run.
    """
    path = local_path(loaded.path)
    if path is None:
        return ""
    plain = path.with_name(f"{RECOVERY_NAME}.ckpt")
    found = [plain.with_name(name) for name in recovery_names(locate(plain))]
    beside = [p for p in found if (p.is_file() if path.is_file() else p.is_dir())]  # what loads one can load the other
    if not beside or path in beside:
        return ""
    recovery = max(beside, key=lambda p: p.stat().st_mtime)
    if recovery.stat().st_mtime < path.stat().st_mtime:
        return ""
    report = verify(str(recovery))
    steps, mine = report.facts.progress.global_step, loaded.facts.progress.global_step
    if steps is None or mine is None or steps <= mine or not report.accepted(False):
        return ""
    return (
        f"{recovery} holds {steps:,} steps and {loaded.path}, which is loaded, {mine:,}: {steps - mine:,} are trained "
        "again. To go on from the former, give its path as ckpt_path"
    )
