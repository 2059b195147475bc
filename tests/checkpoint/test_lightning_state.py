"""Lightning checkpoints whose entries no resume could go on from, or would go on from without a word and wrongly."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, edited, quiet_trainer, train_lightning

from enstack_lightning.checkpoint import Options, Report, Severity, Verdict, verify_checkpoint
from enstack_lightning.checkpoint.rendering.html import to_html
from enstack_lightning.checkpoint.rendering.json import to_json
from enstack_lightning.checkpoint.rendering.sarif import to_sarif
from enstack_lightning.checkpoint.rendering.text import to_text
from enstack_lightning.checkpoint.rules import MAX_FINDINGS

VERSION = "pytorch-lightning_version"
NAN = float("nan")

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_lightning(tmp_path_factory.mktemp("run")) / "epoch=0.ckpt"


def put(value: object, *path: str | int) -> Edit:
    def edit(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return edit


def without(*path: str) -> Edit:
    def edit(state: Any) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return edit


LOOP = ("loops", "fit_loop")
GROUP = ("optimizer_states", 0, "param_groups", 0)
FIRST = ("optimizer_states", 0, "state", 0)
SCHEDULER = ("lr_schedulers", 0)

ENDS_A_RESUME: dict[str, Edit] = {
    "no fit loop": put({}, "loops"),
    "a fit loop that is none": put(None, *LOOP),
    "a batch counter without counts": put({}, *LOOP, "epoch_loop.batch_progress"),
    "a weight without a name": put(torch.ones(2), "state_dict", 5),
    "callbacks in a list": put([], "callbacks"),
    "a version that is none": put("banana", VERSION),
    "a version that is a number": put(5, VERSION),
    "a version that is nothing": put(None, VERSION),
    "a scheduler without position": put(None, *SCHEDULER, "last_epoch"),
    "a scheduler without rates": put([], *SCHEDULER, "base_lrs"),
    "a group without a rate": put(None, *GROUP, "lr"),
    "a group without betas": put(None, *GROUP, "betas"),
    "betas in words": put("x", *GROUP, "betas"),
    "a group without parameters": put([], *GROUP, "params"),
    "several steps of one parameter": put(torch.ones(3), *FIRST, "step"),
    "a parameter's state that is a number": put(5, *FIRST),
    "a weight on the meta device": put(torch.empty(2, device="meta"), "state_dict", "layer.bias"),
}
GOES_ON_WRONGLY: dict[str, Edit] = {
    "an empty fit loop": put({}, *LOOP),
    "no counter of epochs": without(*LOOP, "epoch_progress"),
    "no counter of batches": without(*LOOP, "epoch_loop.batch_progress"),
    "no counter of steps": without(*LOOP, "epoch_loop.automatic_optimization.optim_progress"),
    "no count of completed epochs": without(*LOOP, "epoch_progress", "current", "completed"),
    "a last batch in words": put("x", *LOOP, "epoch_loop.batch_progress", "is_last_batch"),
    "a step that is NaN": put(torch.tensor(NAN), *FIRST, "step"),
    "a step below 0": put(torch.tensor(-3.0), *FIRST, "step"),
    "an eps that is NaN": put(NAN, *GROUP, "eps"),
    "a weight decay without end": put(float("inf"), *GROUP, "weight_decay"),
    "a beta that is NaN": put((NAN, 0.9), *GROUP, "betas"),
    "a rate that is NaN, in a tensor": put(torch.tensor(NAN), *GROUP, "lr"),
}


@pytest.mark.parametrize("what", ENDS_A_RESUME)
def test_what_would_end_a_resume_is_an_error(what: str, saved: Path, tmp_path: Path) -> None:
    checkpoint = edited(saved, tmp_path / "c.ckpt", ENDS_A_RESUME[what])
    with pytest.raises(Exception):  # noqa: B017, PT011
        quiet_trainer(tmp_path).fit(TinyModule(), ckpt_path=checkpoint)
    assert verify_checkpoint(checkpoint).verdict is Verdict.FAIL


@pytest.mark.parametrize("what", GOES_ON_WRONGLY)
def test_what_a_resume_would_go_on_from_wrongly_is_an_error(what: str, saved: Path, tmp_path: Path) -> None:
    report = verify_checkpoint(edited(saved, tmp_path / "c.ckpt", GOES_ON_WRONGLY[what]))
    assert report.verdict is Verdict.FAIL
    assert not [f for f in report.findings if f.code == "CK100"]


def test_a_rate_in_a_tensor_is_read(saved: Path, tmp_path: Path) -> None:
    rate = torch.load(saved, weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"]
    edit = put(torch.tensor(rate, dtype=torch.float64), *GROUP, "lr")
    report = verify_checkpoint(edited(saved, tmp_path / "c.ckpt", edit))
    assert report.facts.optimizers is not None
    assert report.facts.optimizers[0].groups[0].lr == rate
    assert report.verdict is Verdict.PASS


# What hostile files ask for is bounded


def schedule(count: int) -> dict[str, Any]:
    return {"base_lrs": [0.1] * count, "_last_lr": [0.1] * count, "last_epoch": 0}


def many_milestones(state: dict[str, Any]) -> None:
    milestones = Counter(range(10_000))
    state["lr_schedulers"] = [{**schedule(1_000), "milestones": milestones, "gamma": 0.9}] * 30


def many_cycles(state: dict[str, Any]) -> None:
    phases = [{"end_step": float(i), "start_lr": "initial_lr", "end_lr": "max_lr"} for i in (1, 2, 3)]
    cycle = {"total_steps": 3, "_schedule_phases": phases, "cycle_momentum": False, "_anneal_func_type": "cos"}
    group = {"lr": 0.1, "initial_lr": 0.1, "max_lr": 1.0, "params": [0]}
    state["optimizer_states"][0]["param_groups"] = [group] * 1_000
    state["lr_schedulers"] = [{**schedule(1), **cycle}] * 5_000


def many_optimizers(state: dict[str, Any]) -> None:
    state["optimizer_states"] *= 20_000
    state["lr_schedulers"] *= 20_000


def many_groups(state: dict[str, Any]) -> None:
    state["optimizer_states"][0]["param_groups"] = [{"params": [0], "lr": 0.1, "betas": (2.0, 3.0)}] * 150_000


def long_version(state: dict[str, Any]) -> None:
    state[VERSION] = "9" * 5_000 + ".0"


def lists_for_parameters(state: dict[str, Any]) -> None:
    state["optimizer_states"][0]["param_groups"][0]["params"] = [[], {}, 0, 1]


HOSTILE = (many_milestones, many_cycles, many_optimizers, many_groups, long_version, lists_for_parameters)


@pytest.mark.parametrize("edit", HOSTILE)
def test_hostile_states_are_judged_within_bounds(edit: Edit, saved: Path, tmp_path: Path) -> None:
    checkpoint = edited(saved, tmp_path / "c.ckpt", edit)
    began = time.process_time()
    report = verify_checkpoint(checkpoint)
    assert time.process_time() - began < 2
    assert [f.code for f in report.findings if f.code == "CK100"] == []
    assert max(Counter(f.code for f in report.findings).values()) <= MAX_FINDINGS + 1
    render(report)


def render(report: Report) -> None:
    for text in (to_json([report]), to_sarif([report]), to_html([report]), to_text(report, verbose=True)):
        assert text.encode("utf-8")


def test_the_worst_of_what_is_not_listed_counts(saved: Path, tmp_path: Path) -> None:
    report = verify_checkpoint(edited(saved, tmp_path / "c.ckpt", many_optimizers))
    last = [f for f in report.findings if f.code == "CK402"][-1]
    assert "further findings of this rule are not listed" in last.message


@pytest.mark.parametrize("name", ["\ud800", "<b>{0}[1](2)", "\x00\x1b[31m", "\u202e", "a" * 60_000])
def test_a_hostile_name_can_be_rendered(name: str, saved: Path, tmp_path: Path) -> None:
    checkpoint = edited(saved, tmp_path / "c.ckpt", put(torch.tensor([NAN, 1.0]), "state_dict", name))
    report = verify_checkpoint(checkpoint, Options(deep=True))
    assert report.of(Severity.ERROR)
    assert max(len(f.message) for f in report.findings) < 5_000
    render(report)
