"""Sharded checkpoints, written by torch and by Lightning in two processes, and what befalls them."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex

from enstack_lightning.checkpoint import Verdict, verify_checkpoint
from enstack_lightning.checkpoint.deep import DeepRead
from enstack_lightning.checkpoint.facts import DefectKind, Facts, Format, OddityKind
from enstack_lightning.checkpoint.location import locate
from enstack_lightning.checkpoint.readers import shard_pieces
from enstack_lightning.checkpoint.readers.shard_metadata import MetadataDefectError, nested
from enstack_lightning.checkpoint.readers.sharded import is_sharded_folder, read_sharded
from enstack_lightning.checkpoint.rules.safety import METADATA_GLOBALS
from enstack_lightning.guard.loading.choice import choose, choose_newest, set_aside, what_it_costs

TRAIN = Path(__file__).with_name("train_sharded.py")
DATA = "__0_0.distcp"

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="session")
def trained_in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run of two processes, 8 batches each in two epochs: `step=3.ckpt` to `step=15.ckpt`."""
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run([sys.executable, str(TRAIN), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def lightning(trained_in_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_in_shards / "step=3.ckpt", tmp_path / "step=3.ckpt"))


def save(folder: Path, state: dict[str, Any], **options: Any) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, **options), no_dist=True)
    return folder


def training_state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2, "global_step": 3}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save(tmp_path / "plain", training_state())


def read(folder: Path, deep: bool = False) -> Facts:
    return read_sharded(locate(folder), DeepRead() if deep else None)


def said(facts: Facts) -> str:
    return "\n".join(f"{d.kind} {d.where}: {d.message}" for d in facts.defects)


def edit_metadata(folder: Path, edit: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_chunks(folder: Path, chunks: list[tuple[list[int], list[int]]], shape: list[int]) -> Path:
    """A tensor that is described as these chunks, each a piece that is really there."""
    pieces = {
        f"w{i}": torch.arange(float(torch.Size(size).numel())).reshape(size) for i, (_, size) in enumerate(chunks)
    }
    save(folder, pieces)

    def describe(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["w0"]
        entry.size = torch.Size(shape)
        entry.chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size(size)) for start, size in chunks]
        metadata.state_dict_metadata = {"w": entry}
        metadata.planner_data = {"w": ("w",)}
        metadata.storage_data = {
            MetadataIndex("w", torch.Size(chunks[int(index.fqn[1:])][0])): place
            for index, place in metadata.storage_data.items()
        }

    edit_metadata(folder, describe)
    return folder


# What is read


def test_lightnings_shards_say_what_torch_loads(lightning: Path, tmp_path: Path) -> None:
    facts = read(lightning)
    assert (facts.format, facts.defects, facts.oddities) == (Format.SHARDED, (), ())
    dcp_to_torch_save(lightning, tmp_path / "whole.pt")
    loaded, meta = torch.load(tmp_path / "whole.pt"), torch.load(lightning / "meta.pt")
    assert {t.name: (f"torch.{t.dtype}", t.shape) for t in facts.tensors} == {
        name: (str(t.dtype), tuple(t.shape)) for name, t in loaded["state_dict"].items()
    }
    assert {t.where for t in facts.tensors} == {"__0_0.distcp, __1_0.distcp"}
    (optimizer,) = facts.optimizers or ()
    states = loaded["optimizer_0"]["state"]
    assert optimizer.steps == {name: state["step"].item() for name, state in states.items()}
    assert optimizer.moments == {
        name: {key: tuple(t.shape) for key, t in state.items() if key != "step"} for name, state in states.items()
    }
    (group,) = loaded["optimizer_0"]["param_groups"]
    assert (list(optimizer.groups[0].params), optimizer.groups[0].lr) == (group["params"], group["lr"])
    (scheduler,) = facts.schedulers or ()
    assert scheduler.last_lr == tuple(meta["lr_schedulers"][0]["_last_lr"])
    assert (facts.progress.global_step, facts.progress.batches_in_epoch) == (meta["global_step"], 3)
    assert facts.hyper_parameters == {"width": 3}
    assert {f.name for f in facts.files} == {f.name for f in lightning.iterdir()}


def test_all_that_lightning_saves_in_shards_passes(trained_in_shards: Path) -> None:
    folders = sorted(trained_in_shards.iterdir())
    assert len(folders) == 5
    for folder in folders:
        for deep in (False, True):
            facts = read(folder, deep)
            assert (facts.defects, facts.oddities) == ((), ())
        report = verify_checkpoint(folder)
        assert report.verdict is Verdict.PASS or {f.code for f in report.findings if f.severity == "warning"} == {
            "CK305"  # the position of a plain DataLoader is not saved
        }, report.findings


def test_a_state_dict_of_ones_own_says_what_was_saved(plain: Path) -> None:
    facts, state = read(plain), training_state()
    assert (facts.defects, facts.oddities, facts.model_only) == ((), (), False)
    assert {t.name: t.shape for t in facts.tensors} == {n: tuple(t.shape) for n, t in state["model"].items()}
    (optimizer,) = facts.optimizers or ()
    assert optimizer.steps == {0: 3.0, 1: 3.0}
    assert (optimizer.groups[0].params, optimizer.groups[0].lr) == ((0, 1), 1e-3)
    assert (facts.progress.epoch, facts.progress.recorded_global_step) == (2, 3)
    assert is_sharded_folder([f.name for f in plain.iterdir()])


@pytest.mark.parametrize("form", ["nested", "flat", "application", "several", "sgd", "model"])
def test_optimizers_are_known_wherever_they_stand(tmp_path: Path, form: str) -> None:
    state = training_state()
    model, optimizer = state["model"], state["optimizer"]
    names = list(model)
    by_name = {
        "state": {names[i]: s for i, s in optimizer["state"].items()},
        "param_groups": [{**optimizer["param_groups"][0], "params": names}],
    }
    options = {k: v for k, v in optimizer["param_groups"][0].items() if k != "params"}
    flat = {f"state.{names[i]}.{k}": v for i, s in optimizer["state"].items() for k, v in s.items()}
    flat.update({f"param_groups.{name}.{k}": v for name in names for k, v in options.items()})
    states: dict[str, dict[str, Any]] = {
        "nested": {"model": model, "optimizer": by_name},
        "flat": {**model, "optimizer": flat},
        "application": {"app": {"model": model, "optim": by_name}},
        "several": {"model": model, **{f"optimizer_{i}": by_name for i in range(11)}},
        "sgd": {"model": model, "optim": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}},
        "model": {"model": model},
    }
    facts = read(save(tmp_path / "c", states[form]))
    assert facts.defects == ()
    assert sorted(t.name for t in facts.tensors) == ["bias", "weight"]
    if form == "model":
        assert (facts.optimizers, facts.model_only) == (None, True)
        return
    optimizers = facts.optimizers or ()
    assert len(optimizers) == (11 if form == "several" else 1)
    assert optimizers[0].parameter_count == 2
    expected = {} if form == "sgd" else {"weight": 3.0, "bias": 3.0}
    assert all(o.steps == expected for o in optimizers)
    assert {g.lr for o in optimizers for g in o.groups} == {0.1 if form == "sgd" else 1e-3}


def test_metadata_names_nothing_but_its_own_classes(lightning: Path, plain: Path) -> None:
    for folder in (lightning, plain):
        names = {(g.module, g.name) for g in read(folder).globals if g.loader == "pickle"}
        assert names
        assert names <= METADATA_GLOBALS
        assert {g.loader for g in read(folder).globals if ":" in g.where} <= {"weights_only", "torch"}


def test_every_flipped_bit_of_the_metadata_is_found_or_changes_a_name_only(plain: Path) -> None:
    """`.metadata` has no checksum: a flipped bit may rename an entry that stands at the top, everywhere alike."""
    data = (plain / ".metadata").read_bytes()
    before = read(plain)
    names = set(before.fields)
    for at in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        (plain / ".metadata").write_bytes(flipped)
        facts = read(plain)
        unnamed = {(g.module, g.name) for g in facts.globals if g.loader == "pickle"} - METADATA_GLOBALS
        if not facts.defects and not unnamed and set(facts.fields) == names:
            assert (facts.tensors, facts.optimizers, facts.progress) == (
                before.tensors,
                before.optimizers,
                before.progress,
            )
    assert next(f for f in before.files if f.name == ".metadata").without_checksum == len(data)


def test_a_list_of_chunks_that_all_entries_share_costs_no_more_than_it_is_long(plain: Path) -> None:
    def share(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["model.weight"]
        entry.chunks = entry.chunks * 100
        metadata.state_dict_metadata = {f"w{i}": entry for i in range(100)}
        metadata.planner_data = None

    edit_metadata(plain, share)
    assert "far more chunks than" in said(read(plain))


def test_values_are_read_deeply_only(plain: Path) -> None:
    quick, deep = read(plain), read(plain, deep=True)
    assert [f.not_read for f in quick.files] == [0, (8 + 2) * 4 * 3]
    assert [f.not_read for f in deep.files] == [0, 0]
    assert (quick.values, deep.values) == (None, ())


def test_one_option_kept_for_each_of_many_parameters_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_pieces, "MAX_DIFFERENT_SMALL_PIECES", 3)
    entries = {
        f"param_groups.w{i}.{k}": v for i in range(100) for k, v in (("lr", 0.5), ("eps", 1e-8), ("betas", (0, 1)))
    }
    facts = read(save(tmp_path / "c", {"w": torch.ones(3), "optimizer": entries}))
    assert facts.defects == ()
    assert [len(g.params) for o in facts.optimizers or () for g in o.groups] == [100]
    monkeypatch.setattr(shard_pieces, "MAX_DIFFERENT_SMALL_PIECES", 2)
    assert "more than 2 small entries differ" in said(read(tmp_path / "c"))


# What befalls a checkpoint


def test_an_interrupted_save_is_told(lightning: Path, plain: Path) -> None:
    (lightning / "meta.pt").unlink()
    assert said(read(lightning)) == (
        "missing meta.pt: it is missing: Lightning writes it after the shards, so the save was interrupted"
    )
    (plain / ".metadata").rename(plain / ".metadata.tmp")
    facts = read(plain)
    assert said(facts).startswith("missing .metadata: it is missing beside 1 data file(s), .metadata.tmp was not yet")
    assert facts.leftovers == (".metadata.tmp",)
    (plain / ".metadata.tmp").unlink()
    assert said(read(plain)).startswith("missing .metadata: it is missing beside 1 data file(s): it is written last")
    assert verify_checkpoint(plain).verdict is Verdict.FAIL


def test_metadata_of_single_processes_is_not_passed_over(plain: Path) -> None:
    (plain / ".metadata").rename(plain / "__0.metadata")
    assert "unrecognised __0.metadata: each process has kept metadata of its own" in said(read(plain))


def test_a_missing_data_file_is_told(lightning: Path) -> None:
    (lightning / "__1_0.distcp").unlink()
    assert said(read(lightning)) == "missing __1_0.distcp: it is missing"


@pytest.mark.parametrize("change", [-1, 1, -1_577])
def test_a_data_file_of_another_length_is_told(plain: Path, change: int) -> None:
    os.truncate(plain / DATA, (plain / DATA).stat().st_size + change)
    (defect,) = read(plain).defects
    assert (defect.kind, defect.where) == (DefectKind.TRUNCATED if change < 0 else DefectKind.DAMAGED, DATA)


def test_a_data_file_that_nothing_names_is_odd(plain: Path) -> None:
    shutil.copy(plain / DATA, plain / "__7_0.distcp")
    facts = read(plain)
    assert [(o.kind, o.where) for o in facts.oddities] == [(OddityKind.STRAY_FILE, "__7_0.distcp")]
    assert facts.defects == ()


def test_a_pipe_or_a_link_out_in_place_of_a_data_file_is_told(plain: Path, tmp_path: Path) -> None:
    shutil.move(plain / DATA, tmp_path / "elsewhere")
    (plain / DATA).symlink_to(tmp_path / "elsewhere")
    assert "leads out" in said(read(plain))
    (plain / DATA).unlink()
    os.mkfifo(plain / DATA)
    assert "not a regular file" in said(read(plain))


@pytest.mark.parametrize("name", [".metadata", DATA])
@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "text"])
def test_damage_to_any_file_is_found(plain: Path, name: str, damage: str) -> None:
    data = (plain / name).read_bytes()
    (plain / name).write_bytes({"empty": b"", "cut": data[:-1], "zeros": bytes(len(data)), "text": b"hello"}[damage])
    assert any(d.where.startswith(name) for d in read(plain).defects)


def test_every_flipped_bit_of_tensors_and_values_is_found(plain: Path) -> None:
    data = (plain / DATA).read_bytes()
    before = read(plain, deep=True)
    pieces = pickle.loads((plain / ".metadata").read_bytes()).storage_data.values()
    for piece in list(pieces)[::4]:
        content = data[piece.offset : piece.offset + piece.length]
        start = content.find(b"archive/data.pkl") + 64
        for at in range(start, start + 64, 7):
            flipped = bytearray(data)
            flipped[piece.offset + at] ^= 1 << at % 8
            (plain / DATA).write_bytes(flipped)
            facts = read(plain, deep=True)
            assert facts.defects or (facts.optimizers, facts.tensors) == (before.optimizers, before.tensors)


def test_a_changed_value_is_found_deeply(lightning: Path) -> None:
    file = lightning / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    place = next(
        place
        for index, place in pickle.loads((lightning / ".metadata").read_bytes()).storage_data.items()
        if index.fqn == "state_dict.layer.weight" and place.relative_path == file.name
    )
    name = data.index(b"archive/data/0", place.offset)
    padding = int.from_bytes(data[name - 2 : name], "little")
    data[name + len("archive/data/0") + padding] ^= 1
    file.write_bytes(data)
    assert "__1_0.distcp:state_dict.layer.weight" in said(read(lightning, deep=True))


def test_a_piece_that_is_another_than_the_metadata_says_is_told(plain: Path) -> None:
    def swap(metadata: Metadata) -> None:
        by_name = {index.fqn: index for index in metadata.storage_data}
        a, b = by_name["model.weight"], by_name["model.bias"]
        metadata.storage_data[a], metadata.storage_data[b] = metadata.storage_data[b], metadata.storage_data[a]

    edit_metadata(plain, swap)
    assert "it holds float32 of shape [2], and .metadata says float32 of shape [2, 4]" in said(read(plain))


# .metadata


def _place(name: str, **changes: Any) -> Callable[[Metadata], object]:
    def edit(metadata: Metadata) -> None:
        (place,) = [p for i, p in metadata.storage_data.items() if i.fqn == name]
        for key, value in changes.items():
            setattr(place, key, value)

    return edit


def _without(name: str) -> Callable[[Metadata], object]:
    def edit(metadata: Metadata) -> None:
        metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if i.fqn != name}

    return edit


METADATA_FAULTS: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "parent folder": (_place("model.bias", relative_path="../x.distcp"), "leads out of the folder"),
    "absolute path": (_place("model.bias", relative_path="/etc/passwd"), "leads out of the folder"),
    "overlap": (_place("model.bias", offset=0), "begins at byte 0; the entry before it ends at"),
    "hole": (_place("model.bias", offset=2**40), "the entry before it ends at"),
    "negative": (_place("model.bias", offset=-1), "an offset is -1"),
    "huge": (_place("model.bias", length=2**64), "a length is 18446744073709551616"),
    "not a number": (_place("model.bias", length=1.5), "a length is 1.5"),
    "not a name": (_place("model.bias", relative_path=b"x"), "not named by text"),
    "compressed": (_place("model.bias", transform_descriptors=["zstd"]), "was transformed"),
    "not stored": (_without("epoch"), "does not say where epoch is stored"),
    "tensor not stored": (_without("model.bias"), "does not say where the chunk of model.bias"),
    "entry gone": (lambda m: m.state_dict_metadata.pop("epoch"), "it stores epoch, which is no entry"),
    "entry of another kind": (lambda m: m.state_dict_metadata.update(epoch=3), "holds a int where"),
    "tensor as bytes": (
        lambda m: m.state_dict_metadata.update({"model.bias": BytesStorageMetadata()}),
        "does not say where model.bias",
    ),
    "another place": (lambda m: m.planner_data.update(epoch=("model", "epoch")), "said to stand at model.epoch"),
    "deep place": (lambda m: m.planner_data.update(epoch=("a",) * 100), "is no tuple of keys"),
    "no entries": (lambda m: setattr(m, "state_dict_metadata", None), "lacks state_dict_metadata"),
}  # fmt: skip


@pytest.mark.parametrize("fault", METADATA_FAULTS)
def test_metadata_that_is_wrong_is_refused(plain: Path, fault: str) -> None:
    edit, message = METADATA_FAULTS[fault]
    edit_metadata(plain, edit)
    assert message in said(read(plain))
    assert verify_checkpoint(plain).verdict is Verdict.FAIL


@pytest.mark.parametrize("value", [None, 3, {}, {"state_dict_metadata": {}}, [1] * 100])
def test_a_pickle_that_is_no_metadata_is_refused(plain: Path, value: object) -> None:
    (plain / ".metadata").write_bytes(pickle.dumps(value))
    assert "where a Metadata of torch is needed" in said(read(plain))


CHUNKS: dict[str, tuple[list[tuple[list[int], list[int]]], str]] = {
    "rows": ([([0, 0], [2, 6]), ([2, 0], [2, 6])], ""),
    "grid": ([([a, b], [2, 3]) for a in (0, 2) for b in (0, 3)], ""),
    "an empty one": ([([0, 0], [4, 6]), ([4, 0], [0, 6])], ""),
    "a hole": ([([0, 0], [2, 6])], "its chunks hold 12 of 24 elements"),
    "beyond": ([([0, 0], [2, 6]), ([3, 0], [2, 6])], "reaches beyond the shape [4, 6]"),
    "overlap": ([([0, 0], [2, 6]), ([1, 0], [2, 6])], "from [0, 0] and from [1, 0] on overlap"),
    "overlap in columns": ([([0, 0], [4, 3]), ([0, 2], [4, 3])], "overlap"),
    "twice": ([([0, 0], [2, 6]), ([0, 0], [2, 6])], "overlap"),
    "dimensions": ([([0], [24])], "has 1 dimensions and the tensor 2"),
}


@pytest.mark.parametrize("form", CHUNKS)
def test_chunks_make_up_their_tensor_each_element_once(tmp_path: Path, form: str) -> None:
    chunks, message = CHUNKS[form]
    facts = read(in_chunks(tmp_path / "c", chunks, [4, 6]))
    assert message in said(facts)
    assert bool(message) == bool(facts.defects)


def test_a_nan_is_found_at_its_place_in_the_whole_tensor(tmp_path: Path) -> None:
    folder = in_chunks(tmp_path / "c", [([0, 0], [2, 6]), ([2, 0], [2, 6])], [4, 6])
    halves = torch.zeros(2, 6), torch.full((2, 6), float("nan"))
    save(tmp_path / "d", {"w0": halves[0], "w1": halves[1]})
    shutil.copy(tmp_path / "d" / DATA, folder / DATA)
    (value,) = read(folder, deep=True).values or ()
    assert (value.name, value.nonfinite, value.first_nonfinite, value.all_zero) == ("w", 12, (2, 0), False)
    save(tmp_path / "d", {"w0": halves[0], "w1": halves[0]})
    shutil.copy(tmp_path / "d" / DATA, folder / DATA)
    (value,) = read(folder, deep=True).values or ()
    assert (value.name, value.all_zero) == ("w", True)


def test_a_value_stands_in_one_place_of_the_state_only() -> None:
    with pytest.raises(MetadataDefectError, match="within a value"):
        nested([(("a",), {}), (("a", "b"), 1)])
    with pytest.raises(MetadataDefectError, match="stands twice"):
        nested([(("a", "b"), 1), (("a",), 2)])


# Hostile files


class RunsCode:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("place", [".metadata", "entry", "meta.pt", ".metadata.tmp"])
def test_nothing_that_a_file_says_is_run(lightning: Path, tmp_path: Path, place: str) -> None:
    canary = tmp_path / "canary"
    code = RunsCode(canary)
    if place == "entry":
        lightning = save(tmp_path / "hostile", {"w": torch.ones(2), "extra": code})
    elif place == "meta.pt":
        torch.save({"epoch": code}, lightning / place)
    else:
        if place == ".metadata.tmp":
            (lightning / ".metadata").unlink()
        (lightning / place).write_bytes(pickle.dumps(code))
    assert not canary.exists()
    facts = read(lightning, deep=True)
    (found,) = [g for g in facts.globals if g.name == "system"]
    loaders = {".metadata": "pickle", ".metadata.tmp": "pickle", "entry": "torch", "meta.pt": "weights_only"}
    assert found.loader == loaders[place]
    report = verify_checkpoint(lightning)
    assert report.verdict is Verdict.FAIL
    assert "CK701" in {f.code for f in report.findings if f.severity == "error"}
    assert not canary.exists()


def test_a_tensor_that_is_none_is_named(plain: Path, tmp_path: Path) -> None:
    """An entry that `.metadata` calls a tensor and that holds code: torch would refuse it."""
    evil = save(tmp_path / "evil", {"w": RunsCode(tmp_path / "canary")})
    piece = (evil / DATA).read_bytes()
    save(tmp_path / "c", {"w": torch.ones(2)})
    (tmp_path / "c" / DATA).write_bytes(piece)
    edit_metadata(tmp_path / "c", _place("w", length=len(piece)))
    facts = read(tmp_path / "c")
    assert "where a tensor is needed" in said(facts)
    assert "system" in {g.name for g in facts.globals}


def test_names_in_an_entry_whose_bytes_have_changed_are_judged_all_the_same(tmp_path: Path) -> None:
    folder = save(tmp_path / "evil", {"w": torch.ones(2), "extra": RunsCode(tmp_path / "canary")})
    data = (folder / DATA).read_bytes()
    (folder / DATA).write_bytes(data.replace(b"touch ", b"Touch "))
    facts = read(folder)
    assert "they have changed" in said(facts)
    assert "system" in {g.name for g in facts.globals}


def test_an_object_store_is_read_the_same(plain: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in plain.iterdir():
        memory.pipe(f"/shards/{file.name}", file.read_bytes())
    there, here = read_sharded(locate("memory://shards")), read(plain)
    assert (there.tensors, there.optimizers, there.files) == (here.tensors, here.optimizers, here.files)
    assert there.defects == ()


def test_the_directory_of_shards_is_read_whole(plain: Path) -> None:
    report = verify_checkpoint(plain)
    data = sum(file.stat().st_size for file in plain.glob("*.distcp"))
    assert 0 < report.coverage.bytes_not_read < data
    assert (".metadata", (plain / ".metadata").stat().st_size) in report.coverage.not_checkable
    everything = verify_checkpoint(plain).facts.files
    unread = sum(f.not_read + f.without_checksum for f in everything if f.name != ".metadata")
    assert report.coverage.bytes_not_read == unread


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_run_behind_a_url_falls_back_from_shards_to_older_shards(slash: str, trained_in_shards: Path) -> None:
    files = fsspec.filesystem("memory")
    run, older = f"memory://shards{len(slash)}", "step=15.ckpt.corrupt"
    for step in (9, 12, 15):
        files.put(str(trained_in_shards / f"step={step}.ckpt"), f"{run}/step={step}.ckpt", recursive=True)
    files.rm(f"{run}/step=15.ckpt/__1_0.distcp")
    files.pipe(f"{run}/step=12.ckpt/.metadata", b"cut")
    files.pipe(f"{run}/step=12.ckpt.manifest.json", b"{}")
    files.pipe(f"{run}/{older}/meta.pt", b"of an earlier fallback")
    choice = choose(f"{run}/step=15.ckpt{slash}", verify_checkpoint, "previous")
    assert choice.path == f"{run}/step=9.ckpt"
    assert [report.path for report in choice.refused] == [f"{run}/step=15.ckpt{slash}", f"{run}/step=12.ckpt"]
    moved = set_aside(choice.refused)
    assert moved == {
        f"{run}/step=15.ckpt{slash}": f"{run}/step=15.ckpt.2.corrupt",
        f"{run}/step=12.ckpt": f"{run}/step=12.ckpt.corrupt",
    }
    assert "at step 9, which costs 6 of 15 steps" in what_it_costs(choice, moved, strict=False)
    names = {name.partition("/step=")[2] for name in files.find(run)}
    assert {n for n in names if n.startswith("15")} == {
        f"15.ckpt.2.corrupt/{name}" for name in (".metadata", "__0_0.distcp", "meta.pt")
    } | {"15.ckpt.corrupt/meta.pt"}
    assert "12.ckpt.corrupt.manifest.json" in names
    assert files.cat(f"{run}/step=12.ckpt.corrupt/.metadata") == b"cut"
    assert not any(name.startswith(("12.ckpt/", "15.ckpt/")) for name in names)
    newest = choose_newest([f"{run}{slash}"], verify_checkpoint)
    assert newest is not None
    assert newest.path == f"{run}/step=9.ckpt"
