"""What a Trainer is about to load: verified wherever it came from, and what is loaded instead when it is bad."""

from __future__ import annotations

import os
import re
import shutil
import threading
import warnings
from enum import Enum
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from builders import TinyModule, edited, enstack_folder, every_step, flip_bit, quiet_trainer, truncate
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO

from enstack_lightning import CheckpointGuard, CheckpointGuardError
from enstack_lightning.checkpoint import report_on, verify_checkpoint
from enstack_lightning.checkpoint.facts import Defect, DefectKind, Facts
from enstack_lightning.checkpoint.manifest import write_manifest
from enstack_lightning.guard.loading.choice import checkpoints_beside, set_aside
from enstack_lightning.guard.loading.passed_over import passed_over
from enstack_lightning.guard.loading.renamed import forget_renamed

ENTRY_POINTS = ("fit", "validate", "test", "predict")


class Evaluated(TinyModule):
    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.layer(batch[0])

    test_step = predict_step = validation_step

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The calls of torch.load."""
    called: list[object] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: called.append(a) or load(*a, **k))
    return called


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 3, 5 and 7."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (3, 5, 7):
        shutil.copy(trained / f"step={step}.ckpt", folder)
    return folder


def cut(path: Path) -> Path:
    truncate(path, path.stat().st_size // 2)
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


class Paths(Callback):
    """The path that the Trainer reports once it has loaded."""

    path: object = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path = trainer.ckpt_path


def resume(path: Path | str, folder: Path, guard: CheckpointGuard, *others: Callback, **options: Any) -> TinyModule:
    module = TinyModule()
    quiet_trainer(folder, guard, *others, **options).fit(module, ckpt_path=path)
    return module


# Wherever the path comes from


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize("as_url", [False, True], ids=["path", "url"])
def test_a_bad_file_is_refused_by_path_and_by_url(
    entry_point: str, as_url: bool, run: Path, tmp_path: Path, loads: list[object]
) -> None:
    path = str(cut(run / "step=7.ckpt"))
    if as_url:
        path = f"memory://before/{entry_point}.ckpt"
        fsspec.filesystem("memory").pipe(path, (run / "step=7.ckpt").read_bytes())
    with pytest.raises(CheckpointGuardError, match=rf"{path} must not be used: CK104"):
        getattr(quiet_trainer(tmp_path, CheckpointGuard()), entry_point)(Evaluated(), ckpt_path=path)
    assert not loads


def set_ahead(checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["step"] = torch.tensor(12.0)


@pytest.mark.parametrize(
    ("recovery", "age"),
    [("step=7", 10), ("step=7", -10), ("step=5", 10), ("step=3", 10), ("damaged", 10), ("refused", 10)],
)
def test_a_recovery_checkpoint_that_last_passes_over_is_said(
    recovery: str, age: int, run: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Lightning's search for the last checkpoint looks for files called `last`."""
    (tmp_path / "saved").mkdir()
    last = Path(shutil.copy(run / "step=5.ckpt", tmp_path / "saved" / "last.ckpt"))
    kept = last.with_name("recovery_checkpoint.ckpt")
    if recovery == "refused":
        edited(run / "step=7.ckpt", kept, set_ahead)
    else:
        shutil.copy(cut(run / "step=7.ckpt") if recovery == "damaged" else run / f"{recovery}.ckpt", kept)
    os.utime(kept, (last.stat().st_atime, last.stat().st_mtime + age))
    callback = ModelCheckpoint(tmp_path / "saved", save_last=True)
    resumed = quiet_trainer(tmp_path, CheckpointGuard(), callback, enable_checkpointing=True)
    resumed.fit(TinyModule(), ckpt_path="last")
    said = [str(w.message) for w in recwarn if "are trained again" in str(w.message)]
    assert bool(said) == (recovery == "step=7" and age > 0)
    assert not said or f"{kept} holds 7 steps and {last}, which is loaded, 5: 2 are trained again" in said[0]


def test_a_recovery_checkpoint_that_was_asked_for_is_taken(
    run: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The younger one beside it is another run's."""
    asked = (run / "step=5.ckpt").rename(run / "recovery_checkpoint.ckpt")
    (run / "step=7.ckpt").rename(run / "recovery_checkpoint-v1.ckpt")
    os.utime(asked, (0, 0))
    resume(asked, tmp_path, CheckpointGuard())
    assert not [w for w in recwarn if "are trained again" in str(w.message)]


def sharded(source: Path, folder: Path) -> Path:
    """A checkpoint of Lightning in the form in which strategies that shard save it."""
    meta = torch.load(source, weights_only=True)
    state = {"state_dict": meta.pop("state_dict"), "optimizer_0": meta.pop("optimizer_states")[0]}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    torch.save(meta, folder / "meta.pt")
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_recovery_checkpoint_in_shards_is_said_beside_one_in_shards_only(run: Path) -> None:
    recovery = sharded(run / "step=7.ckpt", run / "recovery_checkpoint.ckpt")
    last = sharded(run / "step=3.ckpt", run / "last.ckpt")
    os.utime(recovery, (last.stat().st_atime, last.stat().st_mtime + 10))
    said = passed_over(verify_checkpoint(last), verify_checkpoint)
    assert f"{recovery} holds 7 steps and {last}, which is loaded, 3: 4 are trained again" in said
    assert passed_over(verify_checkpoint(run / "step=3.ckpt"), verify_checkpoint) == ""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def test_a_run_resumes_from_a_web_server_that_knows_no_ranges(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(run)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_steps=8)
    try:
        trainer.fit(TinyModule(), ckpt_path=f"http://127.0.0.1:{server.server_port}/step=7.ckpt")
    finally:
        server.shutdown()
        server.server_close()
    assert trainer.global_step == 8


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_a_good_url_is_verified_and_loaded(entry_point: str, trained: Path, tmp_path: Path) -> None:
    path = f"memory://good/{entry_point}.ckpt"
    fsspec.filesystem("memory").pipe(path, (trained / "step=7.ckpt").read_bytes())
    guard = CheckpointGuard()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*CheckpointGuard.*")
        getattr(quiet_trainer(tmp_path, guard), entry_point)(Evaluated(), ckpt_path=path)
    assert guard.report is not None
    assert guard.report.path == path
    assert guard.report.options.purpose == ("resume" if entry_point == "fit" else "inference")


@pytest.mark.parametrize("name", ["last", "best"])
def test_names_of_lightning_are_verified(name: str, tmp_path: Path, loads: list[object]) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", save_last=True)
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), saves, max_epochs=1)
    trainer.fit(TinyModule())
    flip_bit(Path(saves.last_model_path if name == "last" else saves.best_model_path), 5_000)
    trainer.fit_loop.max_epochs = 2
    with pytest.raises(CheckpointGuardError, match="CK105"):
        trainer.fit(TinyModule(), ckpt_path=name)
    assert not loads


def test_a_checkpoint_of_slurm_is_verified(trained: Path, tmp_path: Path, loads: list[object]) -> None:
    cut(Path(shutil.copy(trained / "step=7.ckpt", tmp_path / "hpc_ckpt_1.ckpt")))
    with pytest.raises(CheckpointGuardError, match=r"hpc_ckpt_1\.ckpt must not be used: CK104"):
        resume("hpc", tmp_path, CheckpointGuard())
    assert not loads


def test_a_link_is_verified_by_what_it_leads_to(run: Path, tmp_path: Path, loads: list[object]) -> None:
    cut(run / "step=7.ckpt")
    (tmp_path / "link.ckpt").symlink_to(run / "step=7.ckpt")
    with pytest.raises(CheckpointGuardError, match=r"link\.ckpt must not be used: CK104"):
        resume(tmp_path / "link.ckpt", tmp_path, CheckpointGuard())
    assert not loads


def test_a_folder_that_this_trainer_cannot_load_is_called_by_its_form(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    with pytest.raises(CheckpointGuardError, match=r"of the form enstack, and SingleDeviceStrategy loads Lightning"):
        resume(folder, tmp_path, CheckpointGuard())
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointGuardError, match="CK101"):
        resume(folder, tmp_path, CheckpointGuard())


def test_it_verifies_under_an_asynchronous_plugin(run: Path, tmp_path: Path, loads: list[object]) -> None:
    with pytest.raises(CheckpointGuardError, match="CK104"):
        resume(cut(run / "step=7.ckpt"), tmp_path, CheckpointGuard(), plugins=[AsyncCheckpointIO()])
    assert not loads
    resume(run / "step=5.ckpt", tmp_path, CheckpointGuard(), plugins=[AsyncCheckpointIO()])


class Scrambled(CheckpointIO):
    """A plugin with a form of its own: a torch file, every byte of it inverted."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        raise NotImplementedError

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        plain = Path(path).with_suffix(".plain")
        plain.write_bytes(bytes(255 - b for b in Path(path).read_bytes()))
        return TorchCheckpointIO().load_checkpoint(plain)

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError


def test_the_form_of_a_plugin_is_left_to_it(run: Path, tmp_path: Path) -> None:
    path = run / "step=7.ckpt"
    path.write_bytes(bytes(255 - b for b in path.read_bytes()))
    with pytest.warns(UserWarning, match=r"cannot verify .*step=7\.ckpt: its form is known only to what loads it"):
        resume(path, tmp_path, CheckpointGuard(), plugins=[Scrambled()])


class Kind(Enum):
    PLAIN = 1


class WithKind(TinyModule):
    def __init__(self, kind: Kind = Kind.PLAIN) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_class_that_torch_was_told_of_is_vouched_for(tmp_path: Path) -> None:
    first = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=1)
    first.fit(WithKind())
    first.save_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(CheckpointGuardError, match=r"CK701 .*Kind.*CheckpointGuard\(allow_globals=\[\.\.\.\]\)"):
        quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=2).fit(WithKind(), ckpt_path=tmp_path / "c.ckpt")
    with torch.serialization.safe_globals([Kind]):
        second = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=2)
        second.fit(WithKind(), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert second.global_step == 2 * first.global_step


def test_what_other_callbacks_load_is_verified_too(run: Path, tmp_path: Path) -> None:
    bad = cut(run / "step=7.ckpt")

    class Peeks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.strategy.checkpoint_io.load_checkpoint(bad)

    with pytest.raises(CheckpointGuardError, match="CK104"):
        resume(run / "step=5.ckpt", tmp_path, CheckpointGuard(), Peeks())


def test_a_trainer_is_given_back_as_it_was(run: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=2)
    before = trainer._checkpoint_connector.resume_start
    trainer.fit(TinyModule(), ckpt_path=run / "step=5.ckpt")
    assert trainer._checkpoint_connector.resume_start == before
    with pytest.raises(CheckpointGuardError, match="CK104"):
        trainer.fit(TinyModule(), ckpt_path=cut(run / "step=7.ckpt"))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(TinyModule(), ckpt_path=run / "step=5.ckpt")
    assert trainer.global_step == 15


# Falling back


def fallback(**options: Any) -> CheckpointGuard:
    return CheckpointGuard(fallback="previous", **options)


def test_without_a_fallback_nothing_is_renamed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointGuardError, match=r"step=7\.ckpt must not be used: CK104"):
        resume(cut(run / "step=7.ckpt"), tmp_path, CheckpointGuard())
    assert names(run) == ["step=3.ckpt", "step=5.ckpt", "step=7.ckpt"]


def test_the_newest_good_one_is_loaded_and_the_bad_one_set_aside(run: Path, tmp_path: Path) -> None:
    write_manifest(run / "step=7.ckpt", global_step=7)
    before = cut(run / "step=7.ckpt").read_bytes()
    guard, paths = fallback(), Paths()
    with pytest.warns(UserWarning, match="CheckpointGuard: loading") as warned:
        module = resume(run / "step=7.ckpt", tmp_path, guard, paths)
    assert len(module.losses) == 10
    (said,) = [str(w.message) for w in warned if "CheckpointGuard: loading" in str(w.message)]
    assert f"loading {run / 'step=5.ckpt'} instead of {run / 'step=7.ckpt'}" in said
    assert ".." not in said.replace(str(run), "")
    assert "stands at step 5, which costs 2 of 7 steps" in said
    assert "CK104" in said
    assert f"{run / 'step=7.ckpt'} is now {run / 'step=7.ckpt.corrupt'}" in said
    assert (run / "step=7.ckpt.corrupt").read_bytes() == before
    assert names(run) == [
        "step=3.ckpt", "step=5.ckpt", "step=7.ckpt.corrupt", "step=7.ckpt.corrupt.manifest.json",
    ]  # fmt: skip
    assert guard.report is not None
    assert guard.report.path == str(paths.path) == str(run / "step=5.ckpt")


def test_the_run_after_a_fallback_is_the_one_that_stopped_there(run: Path, tmp_path: Path) -> None:
    whole = resume(run / "step=5.ckpt", tmp_path, CheckpointGuard())
    fallen = resume(cut(run / "step=7.ckpt"), tmp_path, fallback())
    assert fallen.losses == whole.losses


def test_a_second_bad_file_of_that_name_is_numbered(trained: Path, run: Path, tmp_path: Path) -> None:
    for _ in range(3):
        shutil.copy(trained / "step=7.ckpt", run)
        resume(cut(run / "step=7.ckpt"), tmp_path, fallback())
    assert names(run)[2:] == ["step=7.ckpt.2.corrupt", "step=7.ckpt.3.corrupt", "step=7.ckpt.corrupt"]


def test_every_damaged_one_on_the_way_is_set_aside(run: Path, tmp_path: Path) -> None:
    cut(run / "step=5.ckpt")
    with pytest.warns(UserWarning, match=r"which costs 4 of 7 steps.*\(1\).*step=7.*\(2\).*step=5"):
        resume(cut(run / "step=7.ckpt"), tmp_path, fallback())
    assert names(run) == ["step=3.ckpt", "step=5.ckpt.corrupt", "step=7.ckpt.corrupt"]


def test_none_good_ends_the_run_with_what_was_tried_and_renames_nothing(
    run: Path, tmp_path: Path, loads: list[object]
) -> None:
    for path in run.iterdir():
        cut(path)
    before = names(run)
    with pytest.raises(CheckpointGuardError) as ended:
        resume(run / "step=7.ckpt", tmp_path, fallback())
    assert re.fullmatch(
        r"no checkpoint in .*:\n  \(1\).*step=7.*\n  \(2\).*step=3.*\n  \(3\).*step=5.*", str(ended.value)
    )
    assert names(run) == before
    assert not loads


def test_a_missing_one_falls_back_too(run: Path, tmp_path: Path) -> None:
    """The same command line again, after the file that it names was set aside."""
    with pytest.warns(UserWarning, match=r"instead of .*step=9\.ckpt. It stands at step 7, which costs 2 of 9 steps"):
        resume(run / "step=9.ckpt", tmp_path, fallback())
    with pytest.raises(CheckpointGuardError, match="no checkpoint in"):
        resume(tmp_path / "nowhere" / "c.ckpt", tmp_path, fallback())


def test_steps_that_nothing_tells_are_not_invented(run: Path, tmp_path: Path) -> None:
    cut((run / "step=7.ckpt").rename(run / "last.ckpt"))
    with pytest.warns(UserWarning, match="stands at step 5; how many steps that costs cannot be told"):
        resume(run / "last.ckpt", tmp_path, fallback())


def test_one_of_the_same_step_costs_none(run: Path, tmp_path: Path) -> None:
    last = Path(shutil.copy(run / "step=7.ckpt", run / "last.ckpt"))
    write_manifest(last, global_step=7)
    cut(last)
    with pytest.warns(UserWarning, match="stands at step 7, which costs 0 of 7 steps"):
        resume(last, tmp_path, fallback())


def test_steps_that_only_the_manifest_tells_are_counted(run: Path, tmp_path: Path) -> None:
    """It is set aside with its checkpoint before the sentence is made."""
    last = (run / "step=7.ckpt").rename(run / "last.ckpt")
    write_manifest(last, global_step=7)
    cut(last)
    with pytest.warns(UserWarning, match="stands at step 5, which costs 2 of 7 steps"):
        resume(last, tmp_path, fallback())


def test_a_link_and_what_it_leads_to_are_set_aside_together(run: Path, tmp_path: Path) -> None:
    (run / "last.ckpt").symlink_to("step=7.ckpt")
    cut(run / "step=7.ckpt")
    resume(run / "last.ckpt", tmp_path, fallback())
    assert names(run) == ["last.ckpt.corrupt", "step=3.ckpt", "step=5.ckpt", "step=7.ckpt.corrupt"]
    assert (run / "last.ckpt.corrupt").resolve() == (run / "step=7.ckpt.corrupt").resolve()


def test_what_a_link_leads_to_elsewhere_stays_there(run: Path, tmp_path: Path) -> None:
    elsewhere = cut((run / "step=7.ckpt").rename(tmp_path / "shared.ckpt"))
    (run / "last.ckpt").symlink_to(elsewhere)
    resume(run / "last.ckpt", tmp_path, fallback())
    assert elsewhere.exists()
    assert (run / "last.ckpt.corrupt").resolve() == elsewhere.resolve()


def test_a_whole_checkpoint_that_cannot_be_resumed_from_keeps_its_name(run: Path, tmp_path: Path) -> None:
    saves = ModelCheckpoint(run, filename="weights", save_weights_only=True)
    quiet_trainer(tmp_path, saves, max_epochs=1).fit(TinyModule())
    with pytest.warns(UserWarning, match=r"weights only.*Set aside: nothing was renamed"):
        resume(run / "weights.ckpt", tmp_path, fallback())
    assert (run / "weights.ckpt").exists()


@pytest.mark.filterwarnings("ignore:CheckpointGuard. .* a resume from it would be refused")
def test_one_with_a_class_that_nobody_vouches_for_keeps_its_name(run: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(WithKind())
    trainer.save_checkpoint(run / "with a class.ckpt")
    with pytest.warns(UserWarning, match=r"CK701 .*Kind.*Set aside: nothing was renamed"):
        resume(run / "with a class.ckpt", tmp_path, fallback())
    assert (run / "with a class.ckpt").exists()


NOT_NOW = Defect(DefectKind.UNREADABLE, "c.ckpt", "Input/output error")


@pytest.mark.parametrize("read", [lambda: 1 // 0, lambda: Facts("c.ckpt", defects=(NOT_NOW,))], ids=["CK100", "CK106"])
def test_one_that_could_not_be_judged_keeps_its_name(read: Any, tmp_path: Path) -> None:
    (tmp_path / "c.ckpt").touch()
    report = report_on(read, str(tmp_path / "c.ckpt"))
    assert not report.accepted(strict=False)
    assert set_aside([report]) == {}
    assert (tmp_path / "c.ckpt").exists()


def test_strict_falls_back_from_warnings(trained: Path, run: Path, tmp_path: Path) -> None:
    def behind(checkpoint: dict[str, Any]) -> None:
        for state in checkpoint["optimizer_states"][0]["state"].values():
            state["step"] = torch.tensor(6.0)

    edited(trained / "step=7.ckpt", run / "step=7.ckpt", behind)
    with pytest.warns(UserWarning, match=r"loading .*step=5\.ckpt instead of .*strict is set: CK401"):
        resume(run / "step=7.ckpt", tmp_path, fallback(strict=True))
    assert (run / "step=7.ckpt").exists()
    edited(
        trained / "step=5.ckpt", run / "step=5.ckpt", lambda c: c["optimizer_states"][0]["state"][0].update(step=4.0)
    )
    with pytest.warns(UserWarning, match=r"loading .*step=3\.ckpt instead of .*step=7\.ckpt"):
        resume(run / "step=7.ckpt", tmp_path, fallback(strict=True))


@pytest.mark.parametrize("entry_point", ENTRY_POINTS[1:])
def test_evaluation_never_falls_back_to_other_weights(entry_point: str, run: Path, tmp_path: Path) -> None:
    path = cut(run / "step=7.ckpt")
    with pytest.raises(CheckpointGuardError, match=r"step=7\.ckpt must not be used"):
        getattr(quiet_trainer(tmp_path, fallback()), entry_point)(Evaluated(), ckpt_path=path)
    assert path.exists()


def test_it_falls_back_behind_a_url(trained: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for step in (5, 7):
        data = (trained / f"step={step}.ckpt").read_bytes()
        files.pipe(f"memory://fallback/step={step}.ckpt", data if step == 5 else data[:3_000])
    files.pipe("memory://fallback/step=7.ckpt.manifest.json", b"{}")
    paths = Paths()
    with pytest.warns(UserWarning, match=r"memory://fallback/step=7\.ckpt is now memory://fallback/step=7\.ckpt\.corr"):
        resume("memory://fallback/step=7.ckpt", tmp_path, fallback(), paths)
    assert paths.path == "memory://fallback/step=5.ckpt"
    assert sorted(Path(p).name for p in files.ls("memory://fallback", detail=False)) == [
        "step=5.ckpt", "step=7.ckpt.corrupt", "step=7.ckpt.corrupt.manifest.json",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written_to_does_not_keep_the_run_from_the_good_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.warns(UserWarning, match="Set aside: nothing was renamed"):
        resume(cut(run / "step=7.ckpt"), tmp_path, fallback())
    assert names(run) == ["step=3.ckpt", "step=5.ckpt", "step=7.ckpt"]


class Scored(TinyModule):
    """Its score is best after the first epoch."""

    def on_train_epoch_end(self) -> None:
        self.log("score", 1.0 / (1 + self.current_epoch))


def scored(folder: Path, epochs: int, resume_from: Path | None = None, keep: int = 1) -> ModelCheckpoint:
    best = ModelCheckpoint(
        folder, filename="best-{epoch}", monitor="score", mode="max", save_top_k=keep, save_last=True
    )
    trainer = quiet_trainer(folder, fallback(), best, every_step(folder), max_epochs=epochs)
    trainer.fit(Scored(), ckpt_path=resume_from)
    return best


@pytest.mark.parametrize("keep", [1, 2])
def test_a_best_checkpoint_that_was_set_aside_is_forgotten(keep: int, tmp_path: Path) -> None:
    best = scored(tmp_path, epochs=2, keep=keep)
    assert Path(best.best_model_path).name == "best-epoch=0.ckpt"
    cut(tmp_path / "best-epoch=0.ckpt")
    cut(tmp_path / "last.ckpt")
    best = scored(tmp_path, epochs=3, resume_from=tmp_path / "last.ckpt", keep=keep)
    # The checkpoint resumed from was saved at the last batch of epoch 1, whose end comes first.
    assert Path(best.best_model_path).name == "best-epoch=1.ckpt"
    assert Path(best.best_model_path).exists()
    assert Path(best.last_model_path).exists()
    assert {"best-epoch=0.ckpt.corrupt", "last.ckpt.corrupt"} <= set(names(tmp_path))


def test_a_last_and_a_best_one_that_were_set_aside_are_forgotten(tmp_path: Path) -> None:
    best, last = str(tmp_path / "best.ckpt"), str(tmp_path / "last.ckpt")
    state = {"best_model_path": best, "best_model_score": 0.5, "best_k_models": {}, "last_model_path": last}
    forget_renamed({"callbacks": {"saves": state}}, [best, last])
    assert state == {"best_model_path": "", "best_model_score": None, "best_k_models": {}, "last_model_path": ""}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("full", [True, False])
def test_the_best_of_those_that_are_left_is_the_best_one(mode: Any, full: bool, tmp_path: Path) -> None:
    """By the state of a callback of that mode, and in a new one that is given it."""
    (tmp_path / "real").mkdir()
    folder = tmp_path / "link"
    folder.symlink_to("real")
    scores = {str(folder / name): torch.tensor(score) for name, score in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    left, gone = (("b", "c"), "a") if mode == "min" else (("b", "a"), "c")
    saves = ModelCheckpoint(folder, monitor="score", mode=mode, save_top_k=3 if full else 4)
    saves.best_k_models = dict(scores)
    saves.best_model_path, saves.best_model_score = str(folder / gone), scores[str(folder / gone)]
    if full:
        saves.kth_best_model_path = str(folder / left[1])
        saves.kth_value = scores[saves.kth_best_model_path]
    state = saves.state_dict()
    forget_renamed({"callbacks": {"other": 3, "saves": state}}, [os.path.relpath(tmp_path / "real" / gone)])
    again = ModelCheckpoint(folder, monitor="score", mode=mode, save_top_k=3 if full else 4)
    again.load_state_dict(state)
    assert set(again.best_k_models) == {str(folder / name) for name in left}
    assert again.best_model_path == str(folder / left[0])
    assert again.best_model_score == scores[again.best_model_path]
    assert again.kth_best_model_path == ""


def test_a_best_one_that_stays_is_the_best_one_still(tmp_path: Path) -> None:
    best, other, gone = (str(tmp_path / name) for name in "abc")
    scores = {other: torch.tensor(3.0), best: torch.tensor(1.0), gone: torch.tensor(2.0)}
    kept = {"best_model_path": best, "best_model_score": scores[best], "last_model_path": best}
    state = {**kept, "best_k_models": scores}
    forget_renamed({"callbacks": {"saves": state}}, [gone])
    assert state == {**kept, "best_k_models": {other: scores[other], best: scores[best]}}


def test_states_of_other_versions_are_forgotten_from_as_well(tmp_path: Path) -> None:
    """Lightning 1.5 kept neither the list nor the last path; what tells which way a score is better may lack too."""
    a, b, c = (str(tmp_path / name) for name in "abc")
    old = {"best_model_path": a, "best_model_score": 0.5}
    unknown = {**old, "best_k_models": {a: 0.5, b: 0.2, c: 0.4}, "last_model_path": None}
    forget_renamed({"callbacks": {"old": old, "unknown": unknown}}, [a])
    assert old == {"best_model_path": "", "best_model_score": None}
    assert (unknown["best_model_path"], unknown["best_model_score"]) == (c, 0.4)


def test_a_hidden_name_is_that_of_no_checkpoint_to_fall_back_to(tmp_path: Path) -> None:
    for name in ("a.ckpt", ".b.ckpt", "c.ckpt"):
        (tmp_path / name).touch()
    assert checkpoints_beside(str(tmp_path / "a.ckpt")) == [str(tmp_path / "c.ckpt")]


def test_a_fallback_that_does_not_exist_is_refused() -> None:
    with pytest.raises(CheckpointGuardError, match="must be one of none, previous"):
        CheckpointGuard(fallback="newest")  # type: ignore[arg-type]
