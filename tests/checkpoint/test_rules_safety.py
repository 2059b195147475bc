"""Every name in a pickle is judged by the way in which it would be loaded, exactly, and by lists that are current."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers.trainer_pt_utils import safe_globals

from enstack_lightning.checkpoint import Finding, Options, Severity, judge, verify_checkpoint
from enstack_lightning.checkpoint.facts import Facts, Format, GlobalFacts
from enstack_lightning.checkpoint.rules.safety import (
    METADATA_GLOBALS,
    TRANSFORMERS_GLOBALS,
    WEIGHTS_ONLY_GLOBALS,
    runs_code,
)


def findings(
    *names: str, loader: Any = "weights_only", where: str = "c.ckpt:data.pkl", **options: Any
) -> list[Finding]:
    """What CK7xx says of a checkpoint whose pickle holds these names, each as `module name`."""
    facts = Facts("c", Format.LIGHTNING, globals=tuple(GlobalFacts(*n.split(" "), where, loader) for n in names))
    return [f for f in judge(facts, Options(select=("CK7",), **options)) if f.code != "CK100"]


def of(severity: Severity, found: list[Finding]) -> list[str]:
    return [f"{f.code} {f.message}" for f in found if f.severity is severity]


# The lists are those of the installed libraries


def test_what_weights_only_allows_is_exactly_what_torch_allows() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    assert {".".join(pair) for pair in WEIGHTS_ONLY_GLOBALS} == set(_get_allowed_globals())
    assert len(WEIGHTS_ONLY_GLOBALS) == 144


def test_what_the_trainer_adds_is_exactly_what_transformers_adds() -> None:
    before = {f"{g.__module__}.{g.__qualname__}" for g in torch.serialization.get_safe_globals()}
    with safe_globals():
        added = {f"{g.__module__}.{g.__qualname__}" for g in torch.serialization.get_safe_globals()} - before
    ours = {".".join(pair) for pair in TRANSFORMERS_GLOBALS - WEIGHTS_ONLY_GLOBALS}
    assert ours - added == {"numpy.core.multiarray._reconstruct"}, "the name that NumPy 1 had for it"
    assert added <= ours


@pytest.mark.parametrize("module", ["torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"])
def test_the_names_of_metadata_are_there_and_classes_or_functions_of_their_module(module: str) -> None:
    import importlib

    names = {name for its, name in METADATA_GLOBALS if its == module}
    assert names
    assert all(getattr(importlib.import_module(module), name).__module__ == module for name in names)


def test_of_torch_itself_metadata_may_name_only_sizes_and_dtypes() -> None:
    for module, name in METADATA_GLOBALS:
        if module == "torch":
            assert name == "Size" or isinstance(getattr(torch, name), torch.dtype), name


# Real pickles


def globals_of(path: Path) -> set[tuple[str, str]]:
    """The names that Python's own unpickler would import; it stops at none."""
    found = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found.add((module, name))
            return super().find_class(module, name)

    with path.open("rb") as file:
        Recorder(file).load()
    return found


def test_a_real_metadata_file_passes(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    layer = torch.nn.Linear(4, 2)
    state = {"model": layer.state_dict(), "half": torch.ones(3, dtype=torch.bfloat16), "epoch": 3, "text": "a"}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    names = [" ".join(pair) for pair in globals_of(tmp_path / "c/.metadata")]
    assert len(names) > 8
    found = findings(*names, loader="pickle", where=".metadata")
    assert of(Severity.PASS, found) == [
        f"CK704 read by pickle.load: all {len(names)} names in .metadata are those of its own classes"
    ]
    assert not of(Severity.ERROR, found)


def test_a_real_random_state_passes_with_the_trainers_additions_alone(tmp_path: Path) -> None:
    file = tmp_path / "rng_state.pth"
    torch.save({"numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}, file)
    names = [
        name.replace("._reconstruct", " _reconstruct")
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(file)
    ]
    names = [name if " " in name else " ".join(name.rsplit(".", 1)) for name in names]
    assert len(names) == 3
    assert not of(Severity.ERROR, findings(*names, loader="transformers"))
    assert len(of(Severity.ERROR, findings(*names))) == 3


# Exactly


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "posix system",
        "nt system",
        "builtins eval",
        "__builtin__ eval",
        "builtins Set",
        "Torch Size",
        "torch size",
        "torch.nn Parameter",
        "torch _utils._rebuild_tensor_v2",
        "collections OrderedDict.fromkeys",
        "torch.storage _load_from_bytes",
        "pathlib PosixPath",
        "argparse Namespace",
        "numpy ndarray",
        "functools partial",
        "pkgutil resolve_name",
        "mine Config",
    ],
)
def test_every_name_that_is_not_exactly_on_the_list_is_an_error(name: str) -> None:
    found = findings("torch Size", name)
    assert of(Severity.ERROR, found) == [f"CK701 {found[0].message}"]
    assert name.replace(" ", ".") in found[0].message
    assert "a resume will refuse it" in found[0].message
    assert not of(Severity.PASS, found)
    assert ("any command" in found[0].message) is runs_code(*name.split(" "))


def test_names_of_builtins_as_python_3_writes_them_for_python_2_pass() -> None:
    assert not of(Severity.ERROR, findings("__builtin__ set", "__builtin__ bytearray", "torch Size"))
    assert of(Severity.ERROR, findings("__builtin__ set", loader="pickle"))


@pytest.mark.parametrize(
    "name", ["os system", "torch device", "torch FloatTensor", "builtins set", "torch.serialization load"]
)
def test_metadata_may_name_nothing_but_its_own(name: str) -> None:
    (found,) = findings(name, loader="pickle", where=".metadata")
    assert (found.code, found.severity) == ("CK701", Severity.ERROR)
    assert "pickle.load" in found.message


def test_many_names_are_told_in_few_lines() -> None:
    found = of(Severity.ERROR, findings(*(f"mine C{n}" for n in range(1000))))
    assert len(found) == 21
    assert found[-1] == "CK701 980 further names are not allowed either"


def test_a_random_state_of_numpy_1_is_worth_knowing() -> None:
    found = findings("numpy.core.multiarray _reconstruct", loader="transformers", where="rng_state.pth:data.pkl")
    assert not of(Severity.ERROR, found)
    assert "saved with NumPy 1" in of(Severity.INFO, found)[0]


# What no resume reads


def test_training_args_are_named_and_not_judged_unless_they_run_code() -> None:
    names = "transformers.training_args TrainingArguments", "torch device", "builtins getattr", "mine Config"
    (found,) = findings(*names, loader="never", where="training_args.bin:data.pkl")
    assert (found.code, found.severity) == ("CK703", Severity.INFO)
    assert "4 classes" in found.message
    found_too = findings(*names, "os system", loader="never", where="training_args.bin:data.pkl")
    assert "os.system, which has no business there" in of(Severity.ERROR, found_too)[0]


# Vouching


def test_a_class_of_the_users_own_can_be_vouched_for() -> None:
    found = findings("mine Config", "mine Other", allow_globals=frozenset({"mine.Config"}))
    assert "mine.Other" in of(Severity.ERROR, found)[0]
    assert len(of(Severity.ERROR, found)) == 1
    assert "add_safe_globals([mine.Config])" in of(Severity.INFO, found)[0]


@pytest.mark.parametrize("vouched", ["mine", "mine.", "Config", "mine.config", "mine.Config.x", "*"])
def test_vouching_is_exact_too(vouched: str) -> None:
    assert of(Severity.ERROR, findings("mine Config", allow_globals=frozenset({vouched})))


def test_vouching_for_what_runs_code_warns() -> None:
    found = findings("os system", allow_globals=frozenset({"os.system"}))
    assert [(f.code, f.severity) for f in found] == [("CK702", Severity.WARNING)]
    assert "can run any command" in found[0].message


def test_what_is_loaded_without_a_list_may_name_only_what_is_on_it() -> None:
    where = "__0_0.distcp:epoch:data.pkl"
    assert of(Severity.PASS, findings("torch Size", "__builtin__ set", loader="torch", where=where))
    (found,) = findings("mine Config", loader="torch", where=where)
    assert (found.code, found.severity) == ("CK701", Severity.ERROR)
    assert "weights_only=False" in found.message
    (vouched,) = findings("mine Config", loader="torch", where=where, allow_globals=frozenset({"mine.Config"}))
    assert (vouched.code, "add_safe_globals" in vouched.message) == ("CK702", False)


# Opcodes


@pytest.mark.parametrize(("protocol", "refused"), [(2, False), (4, True), (5, True)])
def test_a_pickle_that_a_safe_load_cannot_read_is_an_error(protocol: int, refused: bool, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "t.pt", pickle_protocol=protocol)
    report = verify_checkpoint(tmp_path / "t.pt", Options(purpose="inference"))
    assert ["CK705"] * refused == [f.code for f in report.of(Severity.ERROR)]


def test_opcodes_of_a_pickle_that_is_not_loaded_safely_anyway_are_none_of_its_business(tmp_path: Path) -> None:
    torch.distributed.checkpoint.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "d")
    assert "CK705" not in {f.code for f in verify_checkpoint(tmp_path / "d").findings}
