"""What stands at a path is told by its content, and what is no checkpoint is called by its name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import random
import shutil
import socket
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from builders import enstack_folder, truncate
from safetensors.torch import save_file

from enstack_lightning.checkpoint import (
    Format,
    Options,
    Report,
    Severity,
    Verdict,
    checkpoints_at,
    find_checkpoints,
    find_last_good,
    verify_checkpoint,
)

INFERENCE = Options(purpose="inference")


def errors(report: Report) -> set[str]:
    return {finding.code for finding in report.of(Severity.ERROR)}


def said(report: Report) -> str:
    return " | ".join(f"{f.message} -> {f.hint}" for f in report.findings if f.severity is not Severity.PASS)


def state_dict() -> dict[str, torch.Tensor]:
    return torch.nn.Linear(4, 2).state_dict()


# What is no checkpoint


def zipped(**members: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)

    return write


def tarred(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model/weights"), io.BytesIO())


def content(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def numpy_arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


def onnx(path: Path) -> None:
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.0.0:" + bytes(100))


def scripted(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


STORE_ERROR = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
NAMED: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "empty": (content(b""), "CK103", "it is empty (0 bytes)"),
    "HTML": (content(b"\n  <!DOCTYPE html>\n<html><title>404</title>"), "CK102", "an HTML page, no checkpoint"),
    "HTML with BOM": (content(b"\xef\xbb\xbf<html>"), "CK102", "an HTML page"),
    "store's error": (content(STORE_ERROR), "CK102", "an XML page with the error AccessDenied"),
    "LFS pointer": (content(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "CK102", "git lfs pull"),
    "text": (content("Getötet\n".encode()), "CK102", "a text file that begins 'Getötet'"),
    "text in UTF-16": (content("hello".encode("utf-16")), "CK102", "a text file in UTF-16"),
    "JSON": (content(b'{"epoch": 3}'), "CK102", "a JSON file"),
    "ordinary zip": (zipped(folder__readme="hello"), "CK102", "an ordinary zip archive (it holds folder/readme)"),
    "empty zip": (zipped(), "CK102", "a zip archive with nothing in it"),
    "Java archive": (zipped(**{"META-INF__MANIFEST": "x"}), "CK102", "a Java archive"),
    "Keras": (zipped(config_dot_json="{}", model_dot_weights_dot_h5=b"x"), "CK102", "a Keras file"),
    "tar": (tarred, "CK102", "a tar archive"),
    "gzip": (content(gzip.compress(b"x" * 1000)), "CK102", "a gzip archive, no checkpoint; unpack it first"),
    "bzip2": (content(bz2.compress(b"x" * 1000)), "CK102", "a bzip2 archive"),
    "xz": (content(lzma.compress(b"x" * 1000)), "CK102", "an xz archive"),
    "zstandard": (content(b"\x28\xb5\x2f\xfd" + bytes(50)), "CK102", "a zstandard archive"),
    "7z": (content(b"7z\xbc\xaf\x27\x1c" + bytes(50)), "CK102", "a 7z archive"),
    "HDF5": (content(b"\x89HDF\r\n\x1a\n" + bytes(50)), "CK102", "an HDF5 file"),
    "GGUF": (content(b"GGUF" + bytes(50)), "CK102", "a GGUF file"),
    "ONNX": (onnx, "CK102", "an ONNX file"),
    "npz": (numpy_arrays, "CK102", "a file of NumPy arrays (.npz)"),
    "npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + bytes(80)), "CK102", "an array of NumPy"),
    "TorchScript": (scripted, "CK102", "a TorchScript archive"),
    "bare pickle": (content(pickle.dumps({"epoch": 3})), "CK102", "a bare pickle, not written by torch.save"),
    "zeros": (content(bytes(10_000)), "CK102", "filled with zeros"),
    "noise": (content(random.Random(0).randbytes(10_000)), "CK102", "no known format"),
    "one byte": (content(b"P"), "CK104", "was cut off"),
    "a list": (lambda path: torch.save([1, 2], path), "CK102", "it holds a list without a tensor in it"),
    "a number": (lambda path: torch.save(7, path), "CK102", "it holds an int without a tensor in it"),
    "a whole model": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "CK102", "save model.state_dict() instead"),
}


@pytest.mark.parametrize("purpose", ["resume", "inference"])
@pytest.mark.parametrize("kind", NAMED)
def test_what_is_no_checkpoint_is_called_by_its_name(kind: str, purpose: Any, tmp_path: Path) -> None:
    write, code, words = NAMED[kind]
    for name in ("c.ckpt", "c"):
        write(tmp_path / name)
        report = verify_checkpoint(tmp_path / name, Options(purpose=purpose))
        assert report.verdict is Verdict.FAIL
        assert code in errors(report), report.findings
        assert words in said(report)


def test_special_files_are_named_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.ckpt"))
        began = time.process_time()
        kinds = {"pipe.ckpt": "a named pipe (FIFO)", "socket.ckpt": "a socket", "/dev/zero": "a device"}
        for name, words in kinds.items():
            report = verify_checkpoint(tmp_path / name)
            assert errors(report) == {"CK102"}
            assert f"it is {words}, not a regular file; it was not opened" in said(report)
        assert time.process_time() - began < 2


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "dangling.ckpt").symlink_to(tmp_path / "gone")
    (tmp_path / "round.ckpt").symlink_to(tmp_path / "round.ckpt")
    assert "a link to a file that is not there" in said(verify_checkpoint(tmp_path / "dangling.ckpt"))
    assert "go round in a circle" in said(verify_checkpoint(tmp_path / "round.ckpt"))
    assert errors(verify_checkpoint(tmp_path / "nul\0.ckpt")) == {"CK101"}


def test_a_folder_that_may_not_be_listed_is_unreadable(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    folder.chmod(0)
    user = os.geteuid()
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    if user == 0:
        os.seteuid(65534)  # root may read every folder
    try:
        report = verify_checkpoint(folder)
        assert list(find_checkpoints(tmp_path)) == []
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
    assert errors(report) == {"CK106"}
    assert "Permission denied" in said(report)


# Plain files


def own_loop() -> dict[str, Any]:
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        schedule.step()
    return {
        "epoch": 1,
        "step": 3,
        "model_state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedulers": [schedule.state_dict()],
        "loss": torch.tensor(0.5),
    }


PLAIN: dict[str, Callable[[], Any]] = {
    "state dict": state_dict,
    "state dict within": lambda: {"state_dict": state_dict()},
    "with an epoch": lambda: {"model": state_dict(), "epoch": 3},
    "list of tensors": lambda: [torch.zeros(2, 4), torch.zeros(2)],
    "one tensor": lambda: torch.zeros(3),
    "nested": lambda: {"a": {"b": {"weight": torch.zeros(2)}}},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("name", ["c.pt", "c.pth", "c.bin", "c.ckpt", "no suffix"])
def test_plain_torch_files_serve_inference_and_not_resume(name: str, kind: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    torch.save(PLAIN[kind](), path, _use_new_zipfile_serialization=not legacy)
    report = verify_checkpoint(path, INFERENCE)
    assert report.verdict is Verdict.PASS, report.findings
    assert report.facts.format is Format.TORCH
    assert report.facts.model_only
    assert errors(verify_checkpoint(path)) == {"CK205"}


def test_weights_have_the_names_that_the_model_gives_them(tmp_path: Path) -> None:
    torch.save({"state_dict": state_dict()}, tmp_path / "a.pt")
    torch.save({"model": state_dict(), "ema": state_dict()}, tmp_path / "b.pt")
    names = [[t.name for t in verify_checkpoint(tmp_path / f).facts.tensors] for f in ("a.pt", "b.pt")]
    assert names == [["weight", "bias"], ["model.weight", "model.bias", "ema.weight", "ema.bias"]]


def test_the_training_state_of_ones_own_loop_is_read(tmp_path: Path) -> None:
    torch.save(own_loop(), tmp_path / "c.pt")
    facts = verify_checkpoint(tmp_path / "c.pt").facts
    (optimizer,), (scheduler,) = facts.optimizers or (), facts.schedulers or ()
    assert (facts.format, facts.model_only, facts.progress.epoch) == (Format.TORCH, False, 1)
    assert set(optimizer.steps.values()) == {3.0}
    assert (scheduler.kind, scheduler.last_epoch) == ("StepLR", 3)
    assert {t.name for t in facts.tensors} == {"model_state_dict.weight", "model_state_dict.bias", "loss"}
    broken = own_loop()
    broken["optimizer"]["param_groups"][0]["lr"] = float("nan")
    torch.save(broken, tmp_path / "c.pt")
    assert "CK204" in errors(verify_checkpoint(tmp_path / "c.pt"))


def test_values_that_are_not_finite_are_found_in_plain_files(tmp_path: Path) -> None:
    state = own_loop()
    state["model_state_dict"]["bias"][1] = float("nan")
    state["optimizer"]["state"][0]["exp_avg"][0, 3] = float("-inf")
    torch.save(state, tmp_path / "c.pt")
    values = {v.name: v for v in verify_checkpoint(tmp_path / "c.pt", Options(deep=True)).facts.values or ()}
    assert values["model_state_dict.bias"].first_value == "nan"
    assert values["optimizer 0, parameter 0, exp_avg"].first_nonfinite == (0, 3)
    save_file({"w": torch.tensor([1.0, float("inf")])}, tmp_path / "c.safetensors")
    (value,) = verify_checkpoint(tmp_path / "c.safetensors", Options(deep=True)).facts.values or ()
    assert (value.name, value.first_nonfinite) == ("w", (1,))


def test_a_bare_safetensors_file_is_a_model(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file(state_dict(), path, metadata={"format": "pt"})
    report = verify_checkpoint(path, INFERENCE)
    assert (report.verdict, report.facts.format) == (Verdict.PASS, Format.SAFETENSORS)
    assert [(t.name, t.dtype, t.shape) for t in report.facts.tensors] == [
        ("bias", "float32", (2,)),
        ("weight", "float32", (2, 4)),
    ]
    assert report.facts.files[0].without_checksum == path.stat().st_size
    assert errors(verify_checkpoint(path)) == {"CK205"}
    truncate(path, path.stat().st_size - 1)
    assert errors(verify_checkpoint(path, INFERENCE)) == {"CK104"}


def test_structures_that_go_on_for_ever_are_read_in_bounds(tmp_path: Path) -> None:
    deep: dict[str, Any] = {"w": torch.zeros(1)}
    for _ in range(100):
        deep = {"a": deep, "b": deep}
    cyclic: dict[str, Any] = {"w": torch.zeros(1)}
    cyclic["self"] = cyclic
    began = time.process_time()
    for value in (deep, cyclic):
        torch.save(value, tmp_path / "c.pt")
        verify_checkpoint(tmp_path / "c.pt")
    assert time.process_time() - began < 2


# Names against contents


@pytest.mark.parametrize("suffix", [".part", ".tmp", ".crdownload", ".incomplete"])
def test_an_unfinished_file_is_told_by_its_name(suffix: str, trained: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(trained / "step=7.ckpt", tmp_path / f"c.ckpt{suffix}"))
    report = verify_checkpoint(path)
    assert errors(report) == {"CK102"}
    assert f"its name ends with {suffix}" in said(report)
    truncate(path, 1000)
    assert errors(verify_checkpoint(path)) == {"CK102", "CK104"}


@pytest.mark.parametrize("purpose", ["resume", "inference"])
def test_a_suffix_that_sends_torch_to_another_reader_is_an_error(purpose: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "step=7.ckpt", tmp_path / "c.safetensors")
    save_file(state_dict(), tmp_path / "c.bin")
    for name, words in {"c.safetensors": "a torch file", "c.bin": "a safetensors file"}.items():
        report = verify_checkpoint(tmp_path / name, Options(purpose=purpose))
        assert "CK102" in errors(report)
        assert f"and it is {words}: torch and transformers choose their reader by that suffix" in said(report)


def test_a_suffix_that_misleads_people_is_worth_knowing(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "step=7.ckpt", tmp_path / "c.zip")
    report = verify_checkpoint(tmp_path / "c.zip")
    assert report.verdict is Verdict.PASS
    assert [f.code for f in report.of(Severity.INFO)] == ["CK111"]
    shutil.copy(trained / "step=7.ckpt", tmp_path / "epoch=3.backup")
    assert not verify_checkpoint(tmp_path / "epoch=3.backup").of(Severity.INFO)


def test_a_part_of_a_folder_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    report = verify_checkpoint(folder / "training_state.pth")
    assert "the training state of an EnStack folder, a part of a checkpoint; name the folder it lies in" in said(report)
    assert "a JSON file" in said(verify_checkpoint(folder / "config.json"))
    torch.save([torch.get_rng_state().tolist()], tmp_path / "rng_state_0.pth")
    assert "the random state of a Trainer's checkpoint folder" in said(verify_checkpoint(tmp_path / "rng_state_0.pth"))


# Folders


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")
    return path


FOLDERS = {
    "DeepSpeed": (("latest", "zero_to_fp32.py", "checkpoint/mp_rank_00_model_states.pt"), "a checkpoint of DeepSpeed"),
    "DeepSpeed's step": (("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"), "of DeepSpeed"),
    "Megatron": (("latest_checkpointed_iteration.txt", "iter_0000010/x"), "a folder of Megatron checkpoints"),
    "Orbax": (("_CHECKPOINT_METADATA", "_METADATA"), "a checkpoint of Orbax"),
    "TensorFlow": (("saved_model.pb", "variables/x"), "a checkpoint of TensorFlow"),
    "unpacked": (("data.pkl", "version", "data/0"), "a torch file that was unpacked"),
    "of checkpoints": (("a.ckpt", "b.ckpt"), "none of the files of a checkpoint itself; name one of the 2 in it"),
    "of others": (("readme.txt", "x.py"), "none of the files of a checkpoint (it holds readme.txt, x.py)"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_checkpoint_is_named(kind: str, tmp_path: Path) -> None:
    names, words = FOLDERS[kind]
    report = verify_checkpoint(folder_of(tmp_path, *names))
    assert errors(report) == {"CK102"}
    assert words in said(report)


def test_an_enstack_folder_that_lost_its_state_is_no_different_from_a_model(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    (folder / "training_state.pth").unlink()
    report = verify_checkpoint(folder)
    assert report.facts.format is Format.HUGGINGFACE
    assert errors(report) == {"CK205"}
    assert "An EnStack checkpoint also has training_state.pth" in said(report)


def test_an_interrupted_save_of_an_enstack_folder_is_one(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    (folder / "training_state.pth").rename(folder / "training_state.pth.tmp")
    report = verify_checkpoint(folder)
    assert report.facts.format is Format.ENSTACK
    assert report.facts.leftovers == ("training_state.pth.tmp",)
    assert "CK101" in errors(report)
    assert "CK109" in {f.code for f in report.of(Severity.WARNING)}


BROKEN_ENTRIES: dict[str, Any] = {
    "best_val_f1": "0.7",
    "best_val_acc": float("nan"),
    "total_batches": 0,
    "scaler_state_dict": [1],
}


@pytest.mark.parametrize("entry", BROKEN_ENTRIES)
def test_entries_of_an_enstack_state_have_their_types(entry: str, tmp_path: Path) -> None:
    report = verify_checkpoint(enstack_folder(tmp_path / "c", **{entry: BROKEN_ENTRIES[entry]}))
    assert "CK204" in errors(report), report.findings
    assert entry in said(report)


# The search


def test_every_kind_of_checkpoint_is_found_and_nothing_else(trained: Path, tmp_path: Path) -> None:
    good = trained / "step=7.ckpt"
    enstack_folder(tmp_path / "enstack" / "best_model")
    for step in (500, 1000):
        folder_of(tmp_path / "trainer" / f"checkpoint-{step}", "trainer_state.json", "optimizer.pt", "config.json")
    folder_of(tmp_path / "trainer", "config.json", "model.safetensors", "training_args.bin")
    folder_of(tmp_path / "sharded" / "last.ckpt", ".metadata", "__0_0.distcp", "meta.pt")
    folder_of(tmp_path / "deepspeed.ckpt", "latest", "checkpoint/mp_rank_00_model_states.pt")
    for name in ("step=2", "step=10", "step=1"):
        (tmp_path / "lightning").mkdir(exist_ok=True)
        shutil.copy(good, tmp_path / "lightning" / f"{name}.ckpt")
    (tmp_path / "lightning" / "last.ckpt").symlink_to("step=10.ckpt")
    (tmp_path / "lightning" / "lost.ckpt").symlink_to("nowhere.ckpt")
    noise = ("step=9.ckpt.part", "step=9.ckpt.corrupt", ".step=9.ckpt", "x.ckpt.manifest.json", "weights.pt", "a.txt")
    folder_of(tmp_path / "lightning", *noise, ".hidden/x.ckpt")
    folder_of(tmp_path / "enstack" / "old.corrupt", "training_state.pth")
    folder_of(tmp_path / "trainer" / "tmp-checkpoint-1500", "trainer_state.json")
    assert [str(Path(p).relative_to(tmp_path)) for p in find_checkpoints(tmp_path)] == [
        "deepspeed.ckpt",
        "enstack/best_model",
        "lightning/lost.ckpt",
        "lightning/step=1.ckpt",
        "lightning/step=2.ckpt",
        "lightning/step=10.ckpt",
        "sharded/last.ckpt",
        "trainer/checkpoint-500",
        "trainer/checkpoint-1000",
    ]


@pytest.mark.parametrize("beside", [("config.json",), ("config.json", "model.safetensors"), ("model.safetensors",)])
def test_a_model_or_a_config_beside_checkpoints_does_not_hide_them(
    beside: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    folder_of(tmp_path, *beside)
    shutil.copy(trained / "step=7.ckpt", tmp_path / "last.ckpt")
    assert list(find_checkpoints(tmp_path)) == [tmp_path / "last.ckpt"]
    assert list(checkpoints_at([tmp_path])) == [str(tmp_path / "last.ckpt")]


def test_a_config_above_folders_of_checkpoints_does_not_hide_them(trained: Path, tmp_path: Path) -> None:
    folder_of(tmp_path, "config.json")
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(trained / "step=7.ckpt", tmp_path / "checkpoints" / "last.ckpt")
    folder = enstack_folder(tmp_path / "epoch_2")
    assert list(find_checkpoints(tmp_path)) == [tmp_path / "checkpoints" / "last.ckpt", folder]


def test_a_checkpoint_of_the_trainer_may_hold_a_file_of_lightning(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "checkpoint-5", "trainer_state.json", "config.json", "other.ckpt")
    assert list(find_checkpoints(tmp_path)) == [folder]


def test_a_link_that_goes_round_is_listed_and_hides_nothing(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "round.ckpt").symlink_to("round.ckpt")
    shutil.copy(trained / "step=7.ckpt", tmp_path / "good.ckpt")
    assert [Path(p).name for p in find_checkpoints(tmp_path)] == ["good.ckpt", "round.ckpt"]
    best = find_last_good(tmp_path)
    assert best is not None
    assert best.path.endswith("good.ckpt")


def test_a_checkpoint_named_itself_is_the_only_one_found(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    assert list(find_checkpoints(folder)) == [folder]
    assert list(find_checkpoints(tmp_path / "nowhere")) == []


def test_a_thousand_checkpoints_come_as_a_stream_and_at_once(tmp_path: Path) -> None:
    for step in range(1_000):
        (tmp_path / f"step={step}.ckpt").touch()
    began = time.process_time()
    found = find_checkpoints(tmp_path)
    assert next(found) == tmp_path / "step=0.ckpt"
    assert [Path(p).name for p in found] == [f"step={step}.ckpt" for step in range(1, 1_000)]
    assert time.process_time() - began < 1


def test_patterns_paths_and_folders_lead_to_checkpoints(trained: Path, tmp_path: Path) -> None:
    for run in ("b", "a"):
        (tmp_path / run).mkdir()
        for epoch in (10, 9):
            shutil.copy(trained / "step=7.ckpt", tmp_path / run / f"epoch={epoch}.ckpt")
    folder_of(tmp_path / "a", "epoch=9.ckpt.manifest.json", "epoch=8.ckpt.corrupt")

    def found(*paths: str) -> list[str]:
        return [str(Path(p).relative_to(tmp_path)) for p in checkpoints_at(f"{tmp_path}/{path}" for path in paths)]

    every = ["a/epoch=9.ckpt", "a/epoch=10.ckpt", "b/epoch=9.ckpt", "b/epoch=10.ckpt"]
    assert found("*/epoch=*.ckpt") == found("**/*.ckpt") == found("*") == found("a/*", "b") == every
    assert found("a/epoch=9.ckpt") == ["a/epoch=9.ckpt"]
    assert found("none*.ckpt", "nowhere") == ["none*.ckpt", "nowhere"]
    brackets = shutil.copy(trained / "step=7.ckpt", tmp_path / "run[1].ckpt")
    assert list(checkpoints_at([brackets])) == [str(brackets)]


def test_the_newest_good_one_is_found_among_all_formats(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "step=7.ckpt", tmp_path / "a.ckpt")
    shutil.copy(trained / "step=9.ckpt", tmp_path / "b.ckpt.corrupt")
    folder = enstack_folder(tmp_path / "c", epoch=2, batches=10)
    best = find_last_good(tmp_path)
    assert best is not None
    assert Path(best.path) == folder


# Two formats in one folder


@pytest.mark.parametrize("other", ["step=3.ckpt", "trainer_state.json", "optimizer.pt"])
def test_a_second_checkpoint_in_the_folder_was_passed_over_without_a_word(
    other: str, trained: Path, tmp_path: Path
) -> None:
    folder = enstack_folder(tmp_path / "best")
    assert verify_checkpoint(folder).verdict is Verdict.PASS
    shutil.copy(trained / "step=3.ckpt", folder / other)
    report = verify_checkpoint(folder)
    assert report.verdict is Verdict.WARN
    assert f"{other} stands in the folder of the enstack checkpoint that is judged, unread" in said(report)


def test_what_lies_beside_shards_is_named(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "best")
    state = {"model": {"w": torch.ones(2, 2)}}
    torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    report = verify_checkpoint(folder, INFERENCE)
    judged = "in the folder of the sharded checkpoint that is judged, unread"
    assert f"training_state.pth stands {judged} -> Move one" in said(report)
    assert f"model.safetensors stands {judged} -> No resume" in said(report)
    (folder / "training_state.pth").unlink()
    assert verify_checkpoint(folder, INFERENCE).verdict is Verdict.PASS, "weights joined from the shards are healthy"


def test_a_lightning_file_beside_a_trainers_state_is_named(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    for number in range(5):
        shutil.copy(trained / "step=3.ckpt", tmp_path / f"{number}.ckpt")
    shutil.copy(trained / "step=3.ckpt", tmp_path / "5.ckpt.tmp")
    message = "0.ckpt, 1.ckpt, 2.ckpt and 2 more stand in the folder of the huggingface checkpoint"
    assert message in said(verify_checkpoint(tmp_path))
