"""A run of two processes of which one or both are killed at any moment, and that is started again: it ends as the run
that nobody disturbed, bit for bit, on both ranks.

Each start is `enstack fit --ckpt_path auto` on two ranks, under DDP with gloo. Where one rank is killed the other must
come to its end by itself, with torch's error about the connection; before the two have met, only torch's own timeout or
what has started them ends it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from killed_fits import Disturbance, config_of, fit, lines_of, metrics_of, no_torn_file_passes, weights_of
from killing import Kill
from rank_processes import GRACE_SECONDS, RANKS, Rank, run_ranks

from enstack_lightning.checkpoint.ledger import read_ledger
from enstack_lightning.cli.resume_check import first_difference

EPOCHS, BATCHES = 3, 6
MOMENTS = (
    "at train start",
    "between steps",
    "in a forward pass",
    "in validation",
    "in a save",
    "between file and manifest",
    "in the clean-up",
    "any time",
)
VICTIMS = ((0,), (1,), (0, 1))
COLUMNS = (
    *("moment", "runs", "rank 0 killed", "rank 1 killed", "both killed", "survivors that ended", "longest, s"),
    *("waited for a partner it had not met", "files refused", "batches trained again", "runs that differ"),
)


@dataclass(frozen=True)
class Run:
    """The undisturbed run."""

    config: Path
    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = config_of(data, cache, EPOCHS, {"strategy": "ddp", "devices": RANKS})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    ranks = start(folder / "config.yaml", folder / "run")
    assert all(rank.said[-2:] == ("status 0", "done") for rank in ranks), ranks
    assert all(len(lines_of(folder / "run", rank)) == EPOCHS * BATCHES for rank in range(RANKS))
    return Run(folder / "config.yaml", folder / "run", max(rank.seconds for rank in ranks))


def start(
    config: Path, folder: Path, disturbance: Disturbance | None = None, victims: Sequence[int] = ()
) -> list[Rank]:
    """One start of the command on both ranks, to its end or to the kill."""
    folder.mkdir(exist_ok=True)
    kill = disturbance and disturbance.kill
    return run_ranks(lambda tell: fit(config, folder, tell, disturbance), kill, victims, folder / "log.txt")


def disturbance(moment: str, dice: random.Random, seconds: float, done: int, ahead: int) -> Disturbance:
    """A kill of this kind, somewhere in the `ahead` steps after the `done` ones, or in a save soon."""
    step, soon = dice.randint(done + 1, min(done + ahead, EPOCHS * BATCHES - 1)), dice.uniform(0, 0.01)
    save, validated = dice.randint(1, min(3, ahead)), -(-(done + 1) // BATCHES) * BATCHES
    since, after = {
        "at train start": ("start", soon),
        "between steps": (f"step {step}", 0.0),
        "in a forward pass": (f"forward {step}", soon / 4),
        "in validation": (f"validation {validated}", soon / 4),
        "in a save": (f"saving {save}", soon),
        "between file and manifest": (f"manifest {save}", soon),
        "in the clean-up": ("removing", soon),
        "any time": ("", dice.uniform(0, seconds)),
    }[moment]
    held = since if moment in ("between file and manifest", "in the clean-up") else ""
    return Disturbance(moment, Kill(after, since), held=held)


@dataclass(frozen=True)
class Trial:
    """A run that was disturbed and went on: what was done to it, and what that cost.

    Attributes:
        victims: of each kill, the ranks.
        lived_on: of each rank whose partner was killed, the seconds until it ended by itself.
        given_up: ranks that waited for a partner which had died before the two had met.
    """

    moment: str
    victims: tuple[tuple[int, ...], ...]
    lived_on: tuple[float, ...]
    given_up: int
    bad_files: int
    batches_again: int


def trial(
    undisturbed: Run, folder: Path, kills: Sequence[tuple[str, tuple[int, ...]]], dice: random.Random, ahead: int
) -> Trial:
    """Kills ranks of a run at each of the moments, lets it end, and asserts that it is the undisturbed one."""
    happened: list[tuple[int, ...]] = []
    lived_on: list[float] = []
    given_up = bad = 0
    for moment, victims in kills:
        done = max((line["step"] for line in lines_of(folder)), default=0)
        if done >= EPOCHS * BATCHES - 1:
            break
        what = disturbance(moment, dice, undisturbed.seconds, done, ahead)
        ranks = start(undisturbed.config, folder, what, victims)
        killed = tuple(number for number, rank in enumerate(ranks) if rank.killed)
        happened += [killed] if killed else []
        for survivor in (rank for rank in ranks if killed and not rank.killed):
            check_survivor(survivor, folder)
            given_up += survivor.given_up
            lived_on += [] if survivor.given_up or survivor.lived_on is None else [survivor.lived_on]
        bad += no_torn_file_passes(folder)
    assert all(rank.said[-2:] == ("status 0", "done") for rank in start(undisturbed.config, folder)), (kills, folder)
    again = 0
    for rank in range(RANKS):
        lines = lines_of(folder, rank)
        difference = first_difference(lines_of(undisturbed.folder, rank), lines)
        assert difference is None, (kills, rank, str(difference), folder)
        assert metrics_of(folder, rank) == metrics_of(undisturbed.folder, rank), (kills, rank, folder)
        again += len(lines) - EPOCHS * BATCHES
    ledger = read_ledger(folder)
    assert ledger.verdict == "pass", (kills, ledger, folder)
    assert weights_of(folder) == weights_of(undisturbed.folder), (kills, folder)
    return Trial(kills[0][0], tuple(happened), tuple(lived_on), given_up, bad, again)


def check_survivor(rank: Rank, folder: Path) -> None:
    """It was done, or ends with torch's error; it waits for its partner for long only where the two have not met."""
    if rank.given_up:
        assert "start" not in rank.said, (rank, folder)
    elif not rank.done:
        said = rank.raised or (folder / "log.txt").read_text()
        assert "gloo" in said or "Connection" in said or "DistNetworkError" in said, (rank, folder)


# The campaigns


def test_a_run_whose_ranks_are_killed_ends_as_the_undisturbed_one(undisturbed: Run, tmp_path: Path) -> None:
    dice = random.Random(2)
    kills = [
        ("in a save", (0,)),
        ("in a forward pass", (1,)),
        ("in the clean-up", (1,)),
        ("between file and manifest", (0, 1)),
        ("in validation", (0,)),
    ]
    done = trial(undisturbed, tmp_path / "run", kills, dice, ahead=2)
    assert len(done.victims) == len(kills)
    assert len(done.lived_on) >= 4
    assert max(done.lived_on) < GRACE_SECONDS


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_killed_ranks(undisturbed: Run, tmp_path: Path) -> None:
    """At least 60 kills, in all kinds of moments, of either rank or of both."""
    dice = random.Random(12)
    trials: list[Trial] = []
    while sum(len(t.victims) for t in trials) < 60:
        moment = MOMENTS[len(trials) % len(MOMENTS)]
        kills = [(moment, dice.choice(VICTIMS)) for _ in range(dice.randint(1, 3))]
        trials.append(trial(undisturbed, tmp_path / f"run-{len(trials)}", kills, dice, ahead=EPOCHS * BATCHES))
    show(trials)


def show(trials: list[Trial]) -> None:
    """The table of results, as Markdown."""
    print(f"\n| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|")
    for moment in (*MOMENTS, "all"):
        own = [t for t in trials if moment in (t.moment, "all")]
        victims = Counter(victims for t in own for victims in t.victims)
        seconds = [s for t in own for s in t.lived_on]
        figures: list[float] = [
            len(own),
            *(victims[v] for v in VICTIMS),
            len(seconds),
            round(max(seconds, default=0), 1),
        ]
        figures += [sum(t.given_up for t in own), sum(t.bad_files for t in own), sum(t.batches_again for t in own), 0]
        print(f"| {moment} | {' | '.join(f'{figure:,}' for figure in figures)} |")
