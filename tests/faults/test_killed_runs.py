"""`enstack fit --ckpt_path auto` killed at any moment, or failed by its disk, and started again: it ends as the run
that nobody disturbed, bit for bit.

Every start is the whole command in a child process. After each kill nothing in the folder may be taken for a checkpoint
that is none; the next start must go on by itself; and at the end every batch's data, random state, learning rate, loss,
weights and optimizer state, and every metric, are those of the undisturbed run, and the ledger says that every row was
used once an epoch.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from file_calls import CrashPoint
from killed_fits import Disturbance, config_of, fit, lines_of, metrics_of, no_torn_file_passes, weights_of
from killing import Ended, Kill, run_child

from enstack_lightning.checkpoint.ledger import read_ledger
from enstack_lightning.cli.resume_check import first_difference

EPOCHS, BATCHES = 3, 6
MOMENTS = (
    "between steps",
    "in a forward pass",
    "in validation",
    "in a save",
    "after a save",
    "at a file call",
    "in a stalled fsync",
    "any time",
)
FAULTS = ("ENOSPC", "EIO")


def start(config: Path, folder: Path, disturbance: Disturbance | None = None) -> Ended:
    """One start of the command, to its end or to its kill."""

    folder.mkdir(exist_ok=True)
    kill = disturbance and disturbance.kill
    return run_child(lambda tell: fit(config, folder, tell, disturbance), kill, folder / "log.txt")


def disturbance(moment: str, dice: random.Random, seconds: float, done: int, ahead: int) -> Disturbance:
    """A disturbance of this kind, somewhere in the `ahead` steps after the `done` ones, or in a save soon."""
    step, soon = dice.randint(done + 1, min(done + ahead, EPOCHS * BATCHES - 1)), dice.uniform(0, 0.01)
    save = dice.randint(1, min(4, ahead))
    if moment in FAULTS:
        return Disturbance(moment, crash=CrashPoint(dice.randint(0, 12), error=getattr(errno, moment)), at_save=save)
    return {
        "between steps": Disturbance(moment, Kill(0, f"step {step}")),
        "in a forward pass": Disturbance(moment, Kill(soon / 4, f"forward {step}")),
        "in validation": Disturbance(moment, Kill(soon / 4, f"validation {-(-(done + 1) // BATCHES) * BATCHES}")),
        "in a save": Disturbance(moment, Kill(soon, f"saving {save}")),
        "after a save": Disturbance(moment, Kill(soon, f"saved {save}")),
        "at a file call": Disturbance(moment, crash=CrashPoint(dice.randint(0, 30)), at_save=save),
        "in a stalled fsync": Disturbance(
            moment, Kill(dice.uniform(0.1, 0.4), "stalled"), at_save=save, stall_seconds=dice.choice((0.2, 2.0))
        ),
        "any time": Disturbance(moment, Kill(dice.uniform(0, seconds * min(1, ahead / EPOCHS / BATCHES)))),
    }[moment]


# What must hold


@dataclass(frozen=True)
class Run:
    """The undisturbed run."""

    config: Path
    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = config_of(data, cache, EPOCHS, {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert start(folder / "config.yaml", folder / "warm").done  # the tokenised rows are in the cache from now on
    ended = start(folder / "config.yaml", folder / "run")
    assert ended.said[-2:] == ("status 0", "done"), ended.said
    assert len(lines_of(folder / "run")) == EPOCHS * BATCHES
    return Run(folder / "config.yaml", folder / "run", ended.seconds)


@dataclass(frozen=True)
class Trial:
    """A run that was disturbed and went on: what was done to it, and what that cost."""

    moment: str
    kills: int
    failures: int
    bad_files: int
    batches_again: int


def trial(
    undisturbed: Run, folder: Path, moments: Sequence[str], dice: random.Random, ahead: int = EPOCHS * BATCHES
) -> Trial:
    """Disturbs a run at each of the moments, lets it end, and asserts that it is the undisturbed one."""
    kills = failures = bad = 0
    for moment in moments:
        done = max((line["step"] for line in lines_of(folder)), default=0)
        if done >= EPOCHS * BATCHES - 1:
            break
        ended = start(undisturbed.config, folder, disturbance(moment, dice, undisturbed.seconds, done, ahead))
        kills += ended.killed
        failures += "status 1" in ended.said
        assert ended.killed or ended.done, (ended.said[-3:], folder)
        bad += no_torn_file_passes(folder)
    ended = start(undisturbed.config, folder)
    assert ended.said[-2:] == ("status 0", "done"), (moments, ended.said[-3:], folder)
    lines = lines_of(folder)
    difference = first_difference(lines_of(undisturbed.folder), lines)
    assert difference is None, (moments, str(difference), folder)
    assert metrics_of(folder) == metrics_of(undisturbed.folder), (moments, folder)
    assert read_ledger(folder).verdict == "pass", (moments, folder)
    assert weights_of(folder) == weights_of(undisturbed.folder), (moments, folder)
    return Trial(moments[0], kills, failures, bad, len(lines) - EPOCHS * BATCHES)


# The campaigns


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_killed_at_every_kind_of_moment_ends_as_the_undisturbed_one(
    fault: str, undisturbed: Run, tmp_path: Path
) -> None:
    """One run, killed again and again, and failed once by its disk."""
    dice = random.Random(fault)
    moments = [fault, *dice.sample(MOMENTS, len(MOMENTS))]
    done = trial(undisturbed, tmp_path / "run", moments, dice, ahead=2)
    assert done.kills >= 6
    assert done.failures == 1


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_killed_runs(undisturbed: Run, tmp_path: Path) -> None:
    """At least 200 kills, and 40 failures of the disk, in all kinds of moments."""
    dice = random.Random(11)
    trials: list[Trial] = []
    while sum(t.kills for t in trials) < 200 or sum(t.failures for t in trials) < 40:
        moment = [*MOMENTS, *FAULTS][len(trials) % (len(MOMENTS) + len(FAULTS))]
        trials.append(trial(undisturbed, tmp_path / f"run-{len(trials)}", [moment] * dice.randint(1, 3), dice))
    show(trials)


def show(trials: list[Trial]) -> None:
    """The table of results, as Markdown."""
    print("\n| moment | runs | kills | failed starts | files refused | batches trained again | runs that differ |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    totals: Counter[str] = Counter()
    for moment in (*MOMENTS, *FAULTS):
        own = [t for t in trials if t.moment == moment]
        row = Counter(runs=len(own))
        for t in own:
            row.update(kills=t.kills, failures=t.failures, bad=t.bad_files, again=t.batches_again)
        totals += row
        print(_row(moment, row))
    print(_row("all", totals))


def _row(name: str, row: Counter[str]) -> str:
    figures = (f"{row[key]:,}" for key in ("runs", "kills", "failures", "bad", "again"))
    return f"| {name} | {' | '.join(figures)} | 0 |"
