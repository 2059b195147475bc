"""Saves in the background: what is saved is what was there when the save was asked for, and memory is used again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from builders import TinyModule, quiet_trainer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch import Tensor

from enstack_lightning import CheckpointGuard
from enstack_lightning.guard.saving.background import BackgroundSaves, Snapshot, SnapshotMemory
from enstack_lightning.guard.saving.comparing import first_difference

WIDE = 1500


class Wide(TinyModule):
    """Large enough for its tensors to be copied into kept memory; two of them are one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Linear(WIDE, 2)
        self.tied = torch.nn.Linear(WIDE, 2)
        self.tied.weight = self.wide.weight

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        row: Tensor = super().training_step(batch)
        return row + self.wide.weight.square().sum()


class KeepsWhatIsSaved(Callback):
    def __init__(self) -> None:
        self.saved: list[Tensor] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.saved.append(checkpoint["state_dict"]["wide.weight"].clone())


def test_each_save_is_of_its_own_step_whatever_waits_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    save = torch.save

    def late(*args: Any, **kwargs: Any) -> None:
        gate.wait(20)
        save(*args, **kwargs)

    class Opens(Callback):
        def on_train_end(self, *args: Any) -> None:
            gate.set()

    monkeypatch.setattr(torch, "save", late)
    keeps = KeepsWhatIsSaved()
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer(
        tmp_path, CheckpointGuard(), keeps, saves, Opens(), max_epochs=1, plugins=[AsyncCheckpointIO()]
    )
    trainer.fit(Wide())
    assert len(keeps.saved) == 5
    for step, weight in enumerate(keeps.saved, start=1):
        loaded = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert torch.equal(loaded["state_dict"]["wide.weight"], weight)
        assert loaded["global_step"] == step
    assert not torch.equal(keeps.saved[0], keeps.saved[1])


def test_in_the_background_the_same_is_written_as_in_the_foreground(tmp_path: Path) -> None:
    for name, plugins in {"a.ckpt": [], "b.ckpt": [AsyncCheckpointIO()]}.items():
        torch.manual_seed(3)
        trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=1, plugins=plugins)
        trainer.fit(Wide())
        trainer.save_checkpoint(tmp_path / name)
        trainer.strategy.checkpoint_io.teardown()
    one, other = (torch.load(tmp_path / name, weights_only=False) for name in ("a.ckpt", "b.ckpt"))
    for state in (one, other):
        state["callbacks"].clear()  # the random state
    assert first_difference(one, other) == ""
    weights = other["state_dict"]
    assert weights["wide.weight"].data_ptr() == weights["tied.weight"].data_ptr()
    sizes = [
        sorted(r.file_size for r in ZipFile(tmp_path / name).infolist() if "/data/" in r.filename)
        for name in ("a.ckpt", "b.ckpt")
    ]
    assert sizes[0] == sizes[1]


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    grid = torch.randn(64, 64)
    return {
        "plain": grid,
        "parameter": torch.nn.Parameter(torch.randn(5000)),
        "half": torch.randn(5000).bfloat16(),
        "complex": torch.randn(5000, dtype=torch.complex64),
        "conjugate": torch.randn(5000, dtype=torch.complex64).conj(),
        "bool": torch.randn(5000) > 0,
        "a part": torch.randn(10_000)[17:5017],
        "transposed": grid.t(),
        "channels last": torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last),
        "strided": torch.randn(10_000)[::2],
        "expanded": torch.randn(1, 1).expand(64, 64),
        "sparse": torch.eye(64).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.randn(5000), 0.1, 0, torch.qint8),
        "a number": torch.tensor(3.0),
        "empty": torch.empty(0),
    }


@pytest.mark.parametrize("name", tensors())
@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
def test_a_snapshot_is_a_copy_of_each_kind_of_tensor(name: str, tmp_path: Path) -> None:
    checkpoint = {"tensor": tensors()[name]}
    snapshot = SnapshotMemory().snapshot(checkpoint)
    copy = snapshot.checkpoint["tensor"]
    assert copy.dtype == checkpoint["tensor"].dtype
    assert not copy.requires_grad
    if copy.numel() and copy.layout is torch.strided:
        assert copy.data_ptr() != checkpoint["tensor"].data_ptr()
    torch.save(snapshot.checkpoint, tmp_path / "copy.pt")
    assert first_difference(checkpoint, torch.load(tmp_path / "copy.pt")) == ""
    assert (tmp_path / "copy.pt").stat().st_size < 60_000


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.view(torch.int32),
        lambda t: t.as_strided(t.shape, torch.empty(t.shape).to(memory_format=torch.channels_last).stride()),
        lambda t: torch._neg_view(t),
    ],
    ids=["another dtype", "another order", "negative"],
)
def test_two_tensors_at_one_place_stay_two(view: Callable[[Tensor], Tensor]) -> None:
    one = torch.randn(4, 8, 16, 16)
    checkpoint = {"one": one, "other": view(one)}
    assert first_difference(checkpoint, SnapshotMemory().snapshot(checkpoint).checkpoint) == ""


def test_a_plugin_around_the_one_of_the_background_sees_the_checkpoint(tmp_path: Path) -> None:
    steps: list[int] = []

    class Looks(_WrappingCheckpointIO):
        def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            steps.append(checkpoint["global_step"])
            self.checkpoint_io.save_checkpoint(checkpoint, *args, **kwargs)

    saves = ModelCheckpoint(tmp_path, every_n_train_steps=5)
    plugins = [Looks(AsyncCheckpointIO(TorchCheckpointIO()))]
    quiet_trainer(tmp_path, CheckpointGuard(), saves, max_epochs=1, plugins=plugins).fit(Wide())
    assert steps == [5]


def test_a_save_is_announced_before_it_is_queued() -> None:
    """Else it might be over before, and be waited for ever after."""
    done: list[str] = []

    class AtOnce:
        def save_checkpoint(self, checkpoint: dict[str, Any], path: Any) -> None:
            done.append("saved")

        def teardown(self) -> None:
            """Nothing to end."""

    plugin = AtOnce()
    BackgroundSaves(plugin, lambda path: done.append("announced"), None).install()
    plugin.save_checkpoint({}, "c.ckpt")
    assert done == ["announced", "saved"]


@pytest.mark.parametrize("own", [True, False])
def test_a_plugin_serves_two_runs_and_is_its_users_again(own: bool, tmp_path: Path) -> None:
    plugin = AsyncCheckpointIO()
    given = plugin.save_checkpoint
    if own:
        plugin.save_checkpoint = given  # type: ignore[method-assign]
    seen: list[Any] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(vars(plugin)["save_checkpoint"])

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), Looks(), saves, max_epochs=1, plugins=[plugin])
    for epochs in (1, 2):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(Wide())
        assert not own or vars(plugin)["save_checkpoint"] is given
    assert len(seen) == 2
    assert given not in seen
    assert (tmp_path / "step=10.ckpt").exists()


def test_no_save_is_announced_where_there_is_no_memory_for_its_copy() -> None:
    """It would be waited for, and its path never be let go."""

    class Full(SnapshotMemory):
        def snapshot(self, checkpoint: dict[str, Any]) -> Snapshot:
            raise MemoryError

    announced: list[Any] = []
    with pytest.raises(MemoryError):
        BackgroundSaves(AsyncCheckpointIO(), announced.append, Full()).save_checkpoint({}, "c.ckpt")
    assert not announced


class Own(Tensor):
    """Of which only its own code knows what else a copy needs."""

    def clone(self, **options: Any) -> Any:
        copy: Any = super().clone(**options)
        copy.is_by_own_code = True
        return copy


def test_a_tensor_of_another_class_is_copied_by_its_own_code() -> None:
    tensor = torch.randn(64, 64).as_subclass(Own)
    copy: Any = SnapshotMemory().snapshot({"tensor": tensor}).checkpoint["tensor"]
    assert copy.is_by_own_code
    assert torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr()


def test_memory_is_used_again_once_it_is_given_back() -> None:
    memory = SnapshotMemory()
    checkpoint = {"a": torch.ones(5000), "b": [torch.zeros(3000)]}
    first, second = memory.snapshot(checkpoint), memory.snapshot(checkpoint)
    places = [s.checkpoint["a"].data_ptr() for s in (first, second)]
    assert len(set(places)) == 2
    first.release()
    assert memory.snapshot(checkpoint).checkpoint["a"].data_ptr() == places[0]
    second.release()
    smaller = memory.snapshot({"a": torch.full((4000,), 7.0)})
    assert smaller.checkpoint["a"].data_ptr() == places[1]
    assert smaller.checkpoint["a"].unique().tolist() == [7.0]
    larger = memory.snapshot({"a": torch.ones(100_000)})
    larger.release()
    assert memory.snapshot(checkpoint).checkpoint["a"].tolist() == checkpoint["a"].tolist()
    memory.let_go()
    assert memory._idle is None


class Keeping(TorchCheckpointIO):
    """Keeps what it is given, so that memory must not be used again under its hands."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.kept.append(checkpoint)
        super().save_checkpoint(checkpoint, path, storage_options)


def test_a_checkpoint_io_that_keeps_checkpoints_gets_them_for_good(tmp_path: Path) -> None:
    keeping, keeps = Keeping(), KeepsWhatIsSaved()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)

    class Waits(Callback):
        """Until each save is over, whose memory would be free for the next one."""

        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            executor = getattr(trainer.strategy.checkpoint_io, "_executor", None)
            if executor is not None:
                executor.submit(int).result()

    plugins = [AsyncCheckpointIO(keeping)]
    quiet_trainer(tmp_path, CheckpointGuard(), keeps, saves, Waits(), max_epochs=1, plugins=plugins).fit(Wide())
    assert len(keeping.kept) == 5
    for checkpoint, weight in zip(keeping.kept, keeps.saved, strict=True):
        assert torch.equal(checkpoint["state_dict"]["wide.weight"], weight)
