"""Training runs killed in the middle of a save, at random moments and at chosen file calls, and started again.

Every start is a child process with a real Trainer and the guard; SIGKILL ends it. What stands in the folder afterwards
is compared, bit by bit, with what a run that nobody kills has at the same steps. The last start is let to its end.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BATCHES, TinyModule, quiet_trainer
from file_calls import CrashPoint
from killing import Ended, Kill, Tell, run_child
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from enstack_lightning import CheckpointGuard
from enstack_lightning.checkpoint import Options, Severity, Verdict, find_checkpoints, find_last_good, verify_checkpoint
from enstack_lightning.checkpoint.manifest import manifest_path
from enstack_lightning.guard.saving.background import Snapshot
from enstack_lightning.guard.saving.checkpoint_io import GuardedCheckpointIO

DIGESTS = Options(digests=True)
EPOCHS = 2
STEPS = EPOCHS * BATCHES
Weights = dict[str, Tensor]


class Bulky(TinyModule):
    """Three megabytes a checkpoint, with the state of AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.bulk = torch.nn.Linear(512, 512)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().training_step(batch) + self.dropout(self.bulk.weight).square().mean()


# Ways to keep checkpoints


def every_one(folder: Path) -> tuple[list[Callback], list[Any]]:
    return [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)], []


def only_the_newest(folder: Path) -> tuple[list[Callback], list[Any]]:
    return [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1)], []


def one_name(folder: Path) -> tuple[list[Callback], list[Any]]:
    saves = ModelCheckpoint(folder, filename="kept", every_n_train_steps=1, enable_version_counter=False)
    return [saves], []


def in_the_background(folder: Path) -> tuple[list[Callback], list[Any]]:
    return only_the_newest(folder)[0], [AsyncCheckpointIO()]


WAYS = {f.__name__.replace("_", " "): f for f in (every_one, only_the_newest, one_name, in_the_background)}


# The run in the child


class TellsLeftovers(Callback):
    def __init__(self, folder: Path, tell: Tell) -> None:
        self.folder, self.tell = folder, tell

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tell(f"leftovers {len(hidden(self.folder))}")


def hidden(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.startswith(".")]


def tell_saves(tell: Tell, crash: CrashPoint | None, at_step: int) -> None:
    """Lets every save be told before and after, and puts the crash point into the save of a step."""
    save = GuardedCheckpointIO.save_checkpoint

    def told(self: GuardedCheckpointIO, checkpoint: Any, *args: Any, **kwargs: Any) -> None:
        step = (checkpoint.checkpoint if isinstance(checkpoint, Snapshot) else checkpoint)["global_step"]
        if crash is not None and step == at_step:
            crash.install()
        tell(f"saving {step}")
        began = time.perf_counter()
        save(self, checkpoint, *args, **kwargs)
        tell(f"saved {step}")
        tell(f"microseconds {round((time.perf_counter() - began) * 1e6)}")
        if crash is not None and step == at_step:
            tell(f"calls {' '.join(crash.made)}")

    GuardedCheckpointIO.save_checkpoint = told  # type: ignore[method-assign]


def start(folder: Path, way: str, crash: CrashPoint | None = None, at_step: int = 0) -> Callable[[Tell], None]:
    """A start of the run: from the last good checkpoint, to the end; the weights at the end lie beside the folder."""

    def work(tell: Tell) -> None:
        torch.manual_seed(1)
        tell_saves(tell, crash, at_step)
        good = find_last_good(folder, DIGESTS)
        saves, plugins = WAYS[way](folder)
        callbacks = CheckpointGuard(), *saves, TellsLeftovers(folder, tell)
        module = Bulky()
        trainer = quiet_trainer(folder, *callbacks, plugins=plugins, max_epochs=EPOCHS)
        trainer.fit(module, ckpt_path=good and good.path)
        torch.save(module.state_dict(), folder.with_suffix(".end"))

    return work


# What must hold after a kill


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody kills: its weights at every step, and the seconds that a save takes."""

    weights: dict[int, Weights]
    save_seconds: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    folder.mkdir()
    ended = run_child(start(folder, "every one"), log=folder.with_suffix(".log"))
    assert ended.done, ended.said
    checkpoints = [torch.load(path) for path in folder.glob("*.ckpt")]
    weights = {c["global_step"]: c["state_dict"] for c in checkpoints}
    assert sorted(weights) == list(range(1, STEPS + 1))
    return Undisturbed(weights, statistics.median(ended.numbers("microseconds")) / 1e6)


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@dataclass
class Killed:
    """A kill, and what was found after it."""

    way: str
    moment: str
    saving: int
    saved: int
    found: int | None
    phase: str
    leftovers: int


@dataclass
class Chain:
    """One run that is killed again and again, and goes on from what it finds."""

    folder: Path
    way: str
    undisturbed: Undisturbed
    kills: list[Killed] = field(default_factory=list)

    def next_step(self, ahead: int) -> int:
        """The step whose save is killed: `ahead` steps after where the run stands."""
        return min((self.kills[-1].found or 0 if self.kills else 0) + ahead, STEPS)

    def kill_at_random(self, ahead: int, after: float) -> Ended:
        step = self.next_step(ahead)
        return self._killed(start(self.folder, self.way), Kill(after, f"saving {step}"), f"{after * 1000:.1f} ms")

    def kill_at_call(self, ahead: int, call: int) -> Ended:
        crash = CrashPoint(call)
        return self._killed(start(self.folder, self.way, crash, self.next_step(ahead)), None, f"call {call}")

    def _killed(self, work: Callable[[Tell], None], kill: Kill | None, moment: str) -> Ended:
        before = self.kills[-1].found if self.kills else None
        ended = run_child(work, kill, self.folder.with_suffix(".log"))
        self._started_clean(ended)
        if ended.killed:
            self.kills.append(self._after(ended, before, moment))
        else:
            self._ended_right(ended)
        return ended

    def _after(self, ended: Ended, before: int | None, moment: str) -> Killed:
        saving, saved = max(ended.numbers("saving"), default=0), max(ended.numbers("saved"), default=before or 0)
        standing = {}
        for path in self.folder.glob("*.ckpt"):
            checkpoint = torch.load(path)
            assert same(checkpoint["state_dict"], self.undisturbed.weights[checkpoint["global_step"]]), (
                path,
                ended.said,
            )
            standing[checkpoint["global_step"]] = path
        assert {str(p) for p in find_checkpoints(self.folder)} == {str(p) for p in standing.values()}
        newest = max(standing, default=None)
        names = sorted(p.name for p in self.folder.iterdir())
        assert (newest or 0) in (saved, saved + 1), (newest, ended.said, names)
        good = find_last_good(self.folder, DIGESTS)
        found = good and good.facts.progress.global_step
        reports = [(r.path, r.verdict, r.of(Severity.ERROR)) for r in map(verify_checkpoint, standing.values())]
        assert found == newest, (found, newest, ended.said, names, reports)
        assert good is None or good.path == str(standing[found or 0])
        left = hidden(self.folder)
        phase = self._phase(standing.get(saving), left, saved == saving)
        return Killed(self.way, moment, saving, saved, found, phase, len(left))

    def _phase(self, target: Path | None, left: list[Path], told: bool) -> str:
        if target is None:
            written = sum(p.stat().st_size for folder in left for p in folder.iterdir())
            return "while the file was written" if written else "before the first byte"
        if told:
            return "after the save"
        return "manifest in place" if manifest_path(target).exists() else "file in place, no manifest"

    def _started_clean(self, ended: Ended) -> None:
        """Trained, from the right step, without leftovers of the kill before."""
        assert ended.numbers("leftovers") == [0], (ended.said, self.folder.with_suffix(".log").read_text()[-2000:])
        found = self.kills[-1].found if self.kills else None
        assert min(ended.numbers("saving"), default=STEPS) == (found or 0) + 1, (found, ended.said)

    def _ended_right(self, ended: Ended) -> None:
        assert ended.done, (ended.said, self.folder.with_suffix(".log").read_text()[-2000:])
        assert same(torch.load(self.folder.with_suffix(".end")), self.undisturbed.weights[STEPS])
        assert hidden(self.folder) == []
        for path in self.folder.glob("*.ckpt"):
            assert verify_checkpoint(path, DIGESTS).verdict is Verdict.PASS

    @property
    def over(self) -> bool:
        return bool(self.kills) and self.kills[-1].found == STEPS

    def to_the_end(self) -> None:
        if not self.over:
            ended = run_child(start(self.folder, self.way), log=self.folder.with_suffix(".log"))
            self._started_clean(ended)
            self._ended_right(ended)


def moments(way: str, random_ones: int, calls: list[int], save_seconds: float) -> Iterator[tuple[int, float | int]]:
    """How many steps ahead, and after how many seconds (a float) or at which file call (an int) of the save there."""
    chance = random.Random(way)
    for _ in range(random_ones):
        yield chance.randint(1, 3), chance.uniform(0, 1.3 * save_seconds)
    for call in calls:
        yield 1, call


def kill_at(way: str, when: list[tuple[int, float | int]], undisturbed: Undisturbed, folder: Path) -> list[Killed]:
    """Kills runs at all these moments, a new run whenever one is through, and lets the last start of each end."""
    kills: list[Killed] = []
    chain = Chain(folder / "run 0", way, undisturbed)
    for number, (ahead, moment) in enumerate(when):
        chain.folder.mkdir(exist_ok=True)
        kill = chain.kill_at_call if isinstance(moment, int) else chain.kill_at_random
        ended = kill(ahead, moment)  # type: ignore[operator]
        if not ended.killed or chain.over:
            kills += chain.kills
            chain = Chain(folder / f"run {number + 1}", way, undisturbed)
    chain.folder.mkdir(exist_ok=True)
    chain.to_the_end()
    return kills + chain.kills


def calls_of_a_save(way: str, folder: Path) -> list[str]:
    """The file calls of the save of step 2 and of what is removed after it."""
    folder.mkdir()
    ended = run_child(start(folder, way, CrashPoint(-1), 2), log=folder.with_suffix(".log"))
    (line,) = [line for line in ended.said if line.startswith("calls ")]
    return line.split()[1:]


def chosen(calls: list[str], writes: int) -> list[int]:
    """Of the calls of a save all but the writes, and so many of the writes."""
    of_writes = [n for n, name in enumerate(calls) if name == "write"]
    kept = {of_writes[i * (len(of_writes) - 1) // (writes - 1)] for i in range(writes)}
    return [n for n, name in enumerate(calls) if name != "write" or n in kept]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_killed_in_its_saves_goes_on_and_ends_right(way: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    chance = random.Random(way)
    calls = chosen(calls_of_a_save(way, tmp_path / "calls"), writes=4)
    when = list(moments(way, 2, [chance.choice(calls)], undisturbed.save_seconds))
    kills = kill_at(way, when, undisturbed, tmp_path)
    assert len(kills) >= 2


@pytest.mark.faults_long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_killed_at_many_moments_of_its_saves(way: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    calls = chosen(calls_of_a_save(way, tmp_path / "calls"), writes=8)
    beyond = list(range(calls[-1] + 1, calls[-1] + 8))  # into the removal of the one before
    when = list(moments(way, 30, [*calls, *beyond], undisturbed.save_seconds))
    kills = kill_at(way, when, undisturbed, tmp_path)
    assert len(kills) >= 50
    print(f"\n{way}: {len(kills)} kills of {len(when)} planned; a save takes {undisturbed.save_seconds * 1000:.0f} ms")
    for (phase, found), count in sorted(Counter((k.phase, _which(k)) for k in kills).items()):
        print(f"{count:5d}  {phase:28}  found {found}")
    print(f"{sum(k.leftovers > 0 for k in kills):5d}  left a hidden folder, gone at the next start")


def _which(kill: Killed) -> str:
    return "the new one" if kill.found == kill.saving else "the one before" if kill.found else "none, a fresh start"
