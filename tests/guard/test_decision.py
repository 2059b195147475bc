"""Which checkpoints rank 0 vouches for or leaves to what loads them, and what ranks compare of their files."""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, enstack_folder, quiet_trainer, truncate
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from enstack_lightning import CheckpointGuard, CheckpointGuardError
from enstack_lightning.checkpoint import report_on, verify_checkpoint
from enstack_lightning.checkpoint.facts import Facts, Format
from enstack_lightning.checkpoint.source import ContainerDefectError, LocalSource
from enstack_lightning.guard.loading import decision
from enstack_lightning.guard.loading.decision import (
    Decision,
    check_form,
    contents,
    is_of_the_tuner,
    judged_on_rank_zero,
    reads_formats_of_its_own,
)

# What is vouched for


@pytest.mark.parametrize(
    ("path", "is_its"),
    [
        ("runs/.lr_find_6f1e.ckpt", True),
        ("runs/.scale_batch_size_6f1e.ckpt", True),
        ("runs/.hidden.ckpt", False),
        ("runs/lr_find_6f1e.ckpt", False),
        ("runs/of.lr_find_6f1e.ckpt", False),
        (".lr_find_6f1e/last.ckpt", False),
    ],
)
def test_a_checkpoint_is_the_tuners_by_its_own_name(path: str, is_its: bool) -> None:
    assert is_of_the_tuner(path) is is_its


class Outer:
    class Told:
        """Another class than one of this name that stands in the module itself."""


def test_what_torch_was_told_of_is_known_by_the_names_that_torch_knows_it_by() -> None:
    from torch._weights_only_unpickler import _get_user_allowed_globals

    with torch.serialization.safe_globals([Outer, Outer.Told, (Outer, "somewhere.Else")]):
        assert decision.safe_globals() == set(_get_user_allowed_globals())
        assert {"somewhere.Else", f"{__name__}.Outer.Told"} < decision.safe_globals()
        assert f"{__name__}.Told" not in decision.safe_globals()


# Who loads which form


class OfItsOwn(CheckpointIO):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        raise NotImplementedError

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError


class Extended(TorchCheckpointIO):
    """Loads what Lightning's own loads, and may load more; its attribute is no plugin."""

    checkpoint_io = "posix"


def strategy_with(*plugins: CheckpointIO) -> SingleDeviceStrategy:
    trainer = Trainer(accelerator="cpu", devices=1, plugins=list(plugins), logger=False, enable_checkpointing=False)
    return trainer.strategy


@pytest.mark.parametrize(
    ("plugin", "of_its_own"),
    [
        (TorchCheckpointIO, False),
        (Extended, False),
        (lambda: AsyncCheckpointIO(AsyncCheckpointIO(TorchCheckpointIO())), False),
        (OfItsOwn, True),
        (lambda: AsyncCheckpointIO(AsyncCheckpointIO(OfItsOwn())), True),
    ],
)
def test_forms_beside_lightnings_are_those_of_the_innermost_plugin(
    plugin: Callable[[], CheckpointIO], of_its_own: bool
) -> None:
    assert reads_formats_of_its_own(strategy_with(plugin())) is of_its_own


def test_forms_of_deepspeed_are_its_own() -> None:
    """The strategy cannot be made where its package is not installed."""
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    strategy._checkpoint_io = TorchCheckpointIO()
    assert reads_formats_of_its_own(strategy)


SHARDED = report_on(lambda: Facts("c.ckpt", format=Format.SHARDED), "c.ckpt")


def test_a_form_that_a_trainer_cannot_load_is_refused_with_what_can(tmp_path: Path) -> None:
    with pytest.raises(CheckpointGuardError, match=r"form sharded, .* \.ckpt files only. Load it with the strategy"):
        check_form(strategy_with(), SHARDED)
    folder = verify_checkpoint(enstack_folder(tmp_path / "c"))
    for plugin in (TorchCheckpointIO(), AsyncCheckpointIO(TorchCheckpointIO())):
        with pytest.raises(CheckpointGuardError, match=r"form enstack, .* files only. Name the \.ckpt file that a"):
            check_form(strategy_with(plugin), folder)


def test_a_form_that_something_of_the_trainer_may_load_is_left_to_it(tmp_path: Path) -> None:
    folder = verify_checkpoint(enstack_folder(tmp_path / "c"))
    for plugin in (Extended(), AsyncCheckpointIO(Extended()), OfItsOwn()):
        check_form(strategy_with(plugin), folder)
    check_form(ModelParallelStrategy(), SHARDED)


class Loads(TorchCheckpointIO):
    """What it is asked to load, and how."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.asked = path, weights_only
        return super().load_checkpoint(path, map_location, weights_only)


@pytest.mark.parametrize("weights_only", [None, False, True])
def test_what_was_asked_for_comes_to_what_loads_it(weights_only: bool | None, trained: Path, tmp_path: Path) -> None:
    given, loads = trained / "step=5.ckpt", Loads()
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), plugins=[loads], max_epochs=2)
    trainer.fit(TinyModule(), ckpt_path=given, weights_only=weights_only)
    assert loads.asked == (given, weights_only)
    assert trainer.ckpt_path is given


def test_a_guard_that_takes_the_place_of_another_is_asked_after_a_run_that_failed(
    trained: Path, tmp_path: Path
) -> None:
    for step in (5, 7):
        shutil.copy(trained / f"step={step}.ckpt", tmp_path)
    bad = tmp_path / "step=7.ckpt"
    truncate(bad, 3_000)
    trainer = quiet_trainer(tmp_path, first := CheckpointGuard(), max_epochs=2)
    with pytest.raises(CheckpointGuardError, match="CK104"):
        trainer.fit(TinyModule(), ckpt_path=bad)
    trainer.callbacks[trainer.callbacks.index(first)] = CheckpointGuard(fallback="previous")
    with pytest.warns(UserWarning, match=r"loading .*step=5\.ckpt instead of .*step=7\.ckpt"):
        trainer.fit(TinyModule(), ckpt_path=bad)
    assert trainer.global_step == 10


# What ranks compare


def test_a_process_by_itself_compares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint may lie behind a slow network, and has just been read."""
    compared: list[str | None] = []
    monkeypatch.setattr(decision, "contents", compared.append)
    trainer = quiet_trainer(tmp_path)
    assert judged_on_rank_zero(trainer, "c.ckpt", Decision) == Decision("c.ckpt")
    assert judged_on_rank_zero(trainer, None, Decision) == Decision(None)
    assert compared == []


def test_every_byte_of_the_ends_is_compared_and_the_size(tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    whole = bytes(2**20)
    at = (0, 4_095, 2**20 - 256 * 2**10, 2**20 - 1)
    found = []
    for data in (whole, whole + b"\0", *(whole[:n] + b"\1" + whole[n + 1 :] for n in at)):
        path.write_bytes(data)
        found.append(contents(str(path))["c.ckpt"])
    assert len(set(found)) == 6
    assert [said.partition(" with digest ")[0] for said in found[:2]] == ["1,048,576 bytes", "1,048,577 bytes"]


def test_a_small_file_is_compared_whole(tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    found = []
    for data in (b"abc", b"abd", b"bbc"):
        path.write_bytes(data)
        found.append(contents(str(path))["c.ckpt"])
    assert len(set(found)) == 3
    assert all(said.startswith("3 bytes with digest ") for said in found)


def test_what_stands_in_a_folder_is_compared_by_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    (tmp_path / "empty").touch()
    found = contents(str(tmp_path))
    assert list(found) == ["a", "b", "empty"]
    assert found["a"] != found["b"]
    assert found["empty"] == "it is empty (0 bytes)"


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    assert contents(None) == {}
    assert contents(str(tmp_path / "c.ckpt")) == {"c.ckpt": "it is missing"}
    too_long = "n" * 300
    assert contents(too_long)[too_long].startswith("unreadable ([Errno")
    assert contents("nowhere://c.ckpt")["nowhere://c.ckpt"].startswith("unreadable (nowhere://c.ckpt cannot be opened")


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), ContainerDefectError("truncated", "it ends after 0 bytes")]
)
def test_a_file_that_goes_bad_while_it_is_read_is_said(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(LocalSource, "read_at", fail)
    (tmp_path / "c.ckpt").write_bytes(b"abc")
    assert contents(str(tmp_path / "c.ckpt")) == {"c.ckpt": f"3 bytes, unreadable ({error})"}


@pytest.mark.parametrize(("others", "more"), [(3, ""), (5, " and 2 more were given others")])
def test_many_ranks_that_were_given_others_are_counted(others: int, more: str) -> None:
    given = [f"{n}.ckpt" for n in range(1, others + 1)]
    named = "rank 2 was given 1.ckpt, rank 3 was given 2.ckpt, rank 4 was given 3.ckpt"
    with pytest.warns(UserWarning, match=f"all ranks load a.ckpt, as rank 0 was given; {named}{more}. See to it that"):
        decision._compare_what_was_asked(["a.ckpt", None, *given])
    with pytest.raises(CheckpointGuardError, match=f"rank 0 was given no .* anew, but {named}{more}. Name the check"):
        decision._compare_what_was_asked([None, None, *given])


@pytest.mark.parametrize("given", [[None, None, None], ["a.ckpt", None, "a.ckpt"]])
def test_ranks_that_were_given_nothing_else_hear_nothing(given: list[str | None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decision._compare_what_was_asked(given)
