"""A resumed run is the run that never stopped: every step, rate, metric, validation, log line, counter and weight."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exact_runs
import pytest
import torch
from builders import edited
from exact_runs import BATCHES, differences, train
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.plugins.precision import MixedPrecision

from enstack_lightning.data import VulnerabilityDataModule
from enstack_lightning.guard import CheckpointGuard
from enstack_lightning.model import VulnerabilityClassifier

pytestmark = pytest.mark.filterwarnings("ignore")
INSIDE, LAST, NEXT = "batch-2", f"batch-{BATCHES}", f"batch-{BATCHES + 2}"

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    # the module, the Trainer, the checkpoints to resume from
    "plain": ({}, {}, (INSIDE, LAST, NEXT, "validation-1", "epoch-1", "validation-3", f"batch-{3 * BATCHES}")),
    "accumulate 2": ({}, {"accumulate_grad_batches": 2}, (INSIDE, "batch-3", LAST, NEXT, "epoch-1")),
    "accumulate 3": ({}, {"accumulate_grad_batches": 3}, (INSIDE, LAST, NEXT, "epoch-1")),
    "validation inside": ({}, {"val_check_interval": 3}, (INSIDE, "batch-3", "validation-1", "validation-2", LAST)),
    "validation inside a window": (
        {},
        {"val_check_interval": 2, "accumulate_grad_batches": 3},
        ("batch-2", "validation-1", "validation-2"),
    ),
    "validation every other epoch": ({}, {"check_val_every_n_epoch": 2}, (LAST, NEXT, "epoch-1", "validation-1")),
    "bf16": ({}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}, ("batch-3", LAST, "epoch-1")),
    "bucketed": ({"bucketed": True}, {}, (INSIDE, LAST, "epoch-1")),
    "max_steps": ({}, {"max_epochs": -1, "max_steps": 18}, (INSIDE, LAST, NEXT, "epoch-1", "validation-1")),
    "plateau": ({"plateau": True}, {}, (INSIDE, LAST, "validation-1", "epoch-1")),
    "torchdata's order": ({"order": "shuffle", "noise": True}, {}, (INSIDE, LAST, NEXT, "epoch-1")),
    "an order of its own": ({"order": "generator", "noise": True}, {}, (INSIDE, LAST, NEXT, "epoch-1")),
    "plain DataLoader": ({"order": "plain", "noise": True}, {}, (INSIDE, LAST, NEXT, "validation-1", "epoch-1")),
    "2 workers": ({"order": "shuffle", "noise": True, "num_workers": 2}, {"max_epochs": 2}, ("batch-3", "epoch-1")),
    "2 lasting workers": (
        {"order": "generator", "noise": True, "num_workers": 2, "persistent": True},
        {"max_epochs": 2},
        ("batch-3", "epoch-1"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_one_that_never_stopped(case: str, tmp_path: Path) -> None:
    module, trainer, names = CASES[case]
    whole = train(tmp_path / "whole", module, trainer, saves=names)
    for name in names:
        resumed = train(tmp_path / "again", module, trainer, tmp_path / "whole" / f"{name}.ckpt", seed=99)
        assert differences(whole, resumed) == [], name


def test_saving_and_the_guard_change_nothing(tmp_path: Path) -> None:
    """Else the run compared with would not be the user's."""
    options = {"noise": True, "order": "shuffle"}, {"accumulate_grad_batches": 2, "val_check_interval": 3}
    whole = train(tmp_path, *options, saves=None)
    alone = train(tmp_path / "alone", *options, guard=None)
    alone["begins"] = [0, 0]
    assert differences(alone, {**whole, "begins": [0, 0]}) == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_three_times(accumulate: int, tmp_path: Path) -> None:
    module, trainer = {"noise": True}, {"accumulate_grad_batches": accumulate, "val_check_interval": 3}
    whole = train(tmp_path / "0", module, trainer, saves=("batch-3",))
    path = tmp_path / "0" / "batch-3.ckpt"
    for restart, name in enumerate((f"batch-{BATCHES}", f"batch-{BATCHES + 2}", "epoch-2"), start=1):
        train(tmp_path / str(restart), module, trainer, path, saves=(name,), seed=100 + restart)
        path = tmp_path / str(restart) / f"{name}.ckpt"
    assert differences(whole, train(tmp_path / "last", module, trainer, path, seed=9)) == []


def test_without_the_guard_the_record_tells_the_difference(tmp_path: Path) -> None:
    """That the comparison can fail, and what for."""
    whole = train(tmp_path / "whole", {}, {"accumulate_grad_batches": 2}, saves=("batch-3",))
    path = tmp_path / "whole" / "batch-3.ckpt"
    found = differences(whole, train(tmp_path / "again", {}, {"accumulate_grad_batches": 2}, path, guard=None))
    assert any(f.startswith("events") for f in found)
    assert any(f.startswith("weight") for f in found)


# Float16 with a gradient scaler


class Scale(Callback):
    """Adds to the record what the gradient scaler holds after each batch, and which steps the optimizer has made."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        scaler = trainer.precision_plugin.scaler
        made = max((int(state["step"]) for state in trainer.optimizers[0].state.values()), default=0)
        pl_module.events.append(["scale", scaler.get_scale(), scaler._get_growth_tracker(), made])


def fit_float16(folder: Path, accumulate: int, path: Path | None = None, saves: tuple[str, ...] = ()) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)
    trainer = {
        "accumulate_grad_batches": accumulate,
        "plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)],
        "gradient_clip_val": 1.0,
    }
    guard = CheckpointGuard(on_nonfinite="raise")
    seed = 1 if path is None else 9
    return train(folder, {}, trainer, path, callbacks=(Scale(),), saves=saves, seed=seed, guard=guard)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_float16_goes_on_with_its_scale_and_the_steps_that_it_skips(accumulate: int, tmp_path: Path) -> None:
    names = ("batch-1", "batch-3", LAST, NEXT, "validation-1", "epoch-1")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole = fit_float16(tmp_path, accumulate, saves=names)
        scales = [event[1:] for event in whole["events"] if event[0] == "scale"]
        assert sum(later[0] < earlier[0] for earlier, later in itertools.pairwise(scales[BATCHES + 2 :])) > 1  # skips
        assert any(later[0] > earlier[0] for earlier, later in itertools.pairwise(scales))
        for name in names:
            again = fit_float16(tmp_path / "again", accumulate, tmp_path / f"{name}.ckpt")
            assert differences(whole, again) == [], name
        path = tmp_path / "batch-1.ckpt"
        for number, name in enumerate(("batch-3", LAST, NEXT)):
            fit_float16(tmp_path / str(number), accumulate, path, saves=(name,))
            path = tmp_path / str(number) / f"{name}.ckpt"
        assert differences(whole, fit_float16(tmp_path / "last", accumulate, path)) == []
    told = [str(w.message) for w in said if "CheckpointGuard" in str(w.message)]
    assert [t for t in told if "CK402" not in t] == []  # no state yet, as all steps so far were skipped
    assert not list(tmp_path.rglob("*.nonfinite"))


def test_another_scale_would_be_noticed(tmp_path: Path) -> None:
    whole = fit_float16(tmp_path, 2, saves=("batch-3",))

    def scaled_otherwise(checkpoint: dict[str, Any]) -> None:
        checkpoint["MixedPrecision"]["scale"] *= 4

    path = edited(tmp_path / "batch-3.ckpt", tmp_path / "other.ckpt", scaled_otherwise)
    assert any("scale" in found for found in differences(whole, fit_float16(tmp_path / "again", 2, path)))


# Callbacks


def early_stopping() -> tuple[Callback, ...]:
    return (EarlyStopping("val_loss", patience=1, min_delta=10.0),)


def averaging() -> tuple[Callback, ...]:
    return (StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=3), LearningRateMonitor("step"))


@pytest.mark.parametrize(
    ("callbacks", "trainer", "names"),
    [
        (early_stopping, {"max_epochs": 6}, (INSIDE, LAST, "validation-1", "validation-2", "epoch-1")),
        (early_stopping, {"max_epochs": 6, "val_check_interval": 3}, ("batch-6", "validation-1", "validation-2")),
        (averaging, {"max_epochs": 4}, (INSIDE, NEXT, "epoch-1", "epoch-2", f"batch-{2 * BATCHES + 2}")),
    ],
    ids=["early stopping", "early stopping inside", "weight averaging"],
)
def test_callbacks_go_on(
    callbacks: Callable[[], tuple[Callback, ...]], trainer: dict[str, Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", {}, trainer, callbacks=callbacks(), saves=names)
    for name in names:
        path = tmp_path / "whole" / f"{name}.ckpt"
        assert differences(whole, train(tmp_path / "again", {}, trainer, path, callbacks(), seed=9)) == [], name


def model_checkpoints(folder: Path) -> tuple[Callback, ...]:
    step = ModelCheckpoint(folder, "{step}", every_n_train_steps=BATCHES, save_top_k=-1, auto_insert_metric_name=True)
    best = ModelCheckpoint(folder, "best-{epoch}", monitor="val_loss", save_top_k=-1)
    last = ModelCheckpoint(folder, "last-{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    return step, best, last


@pytest.mark.parametrize("name", [f"step={BATCHES}", "best-epoch=0", "last-epoch=0"])
def test_lightnings_own_checkpoints(name: str, tmp_path: Path) -> None:
    """`every_n_train_steps` at an epoch's last batch is where Lightning loses the next epoch."""
    first, again = tmp_path / "first", tmp_path / "again"
    whole = train(first, {}, {}, callbacks=model_checkpoints(first))
    path = first / f"{name}.ckpt"
    resumed = train(again, {}, {}, path, model_checkpoints(again), seed=9)
    assert differences(whole, resumed) == []


class Bar(TQDMProgressBar):
    """Says what it would show after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, int, str]] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(*args, **kwargs)
        bar = self.train_progress_bar
        self.shown.append((bar.n, bar.total, bar.desc))


def test_the_progress_bar_shows_the_epoch_and_its_length(tmp_path: Path) -> None:
    before, after = Bar(), Bar()
    train(tmp_path, {}, {"enable_progress_bar": True}, callbacks=(before,), saves=(NEXT,))
    train(tmp_path / "again", {}, {"enable_progress_bar": True}, tmp_path / f"{NEXT}.ckpt", (after,), seed=9)
    assert after.shown == before.shown[BATCHES + 2 :]


# What is saved


def test_gradients_are_saved_only_inside_a_window(tmp_path: Path) -> None:
    train(tmp_path, {}, {"accumulate_grad_batches": 3, "max_epochs": 1}, saves=None)
    for batch, waiting in ((1, True), (2, True), (3, False), (BATCHES, False)):
        checkpoint = torch.load(tmp_path / f"batch-{batch}.ckpt", weights_only=True)
        (rank,) = checkpoint["callbacks"]["CheckpointGuard"]["resume"]["ranks"]
        assert bool(rank["gradients"]) == waiting


# Two processes


TWO_PROCESSES = {
    "gathers": {
        "module": {"noise": True},
        "trainer": {"accumulate_grad_batches": 3, "max_epochs": 2, "val_check_interval": 2},
        "names": ["batch-2", "batch-3", "epoch-1"],
    },
    "plain loader": {
        "module": {"order": "plain", "noise": True},
        "trainer": {"max_epochs": 2},
        "names": ["batch-6"],
    },
    "torchdata's own order": {
        "module": {"order": "shuffle"},
        "trainer": {"max_epochs": 2},
        "names": ["batch-2", "epoch-1"],
    },
}


class OfTwo:
    """What two processes, started once for all cases, recorded of the whole run and of those from the checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        call = [sys.executable, "-W", "ignore", exact_runs.__file__, str(folder), json.dumps(TWO_PROCESSES)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(call, stderr=subprocess.PIPE, text=True, check=False, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        self._said = done.stderr

    def records(self, case: str) -> list[list[dict[str, Any]]]:
        """Of each process."""
        return [json.loads((self.folder / case / f"rank-{rank}.json").read_text()) for rank in (0, 1)]

    def exact(self, case: str) -> list[str]:
        """What the resumed runs promised."""
        of_case = self._said.partition(f"case {case}\n")[2].partition("\ncase ")[0]
        return [line for line in of_case.splitlines() if line.startswith("exact  ")]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> OfTwo:
    return OfTwo(tmp_path_factory.mktemp("two"))


def test_two_processes(of_two: OfTwo, tmp_path: Path) -> None:
    """Each draws other random numbers and gathers other values; only rank 0 writes."""
    case, records = TWO_PROCESSES["gathers"], of_two.records("gathers")
    for whole, *resumed in records:
        for name, run in zip(case["names"], resumed, strict=True):
            assert differences(whole, run) == [], name
    done = [row for record in records for row in rows_of_epoch(record[0], 0)[: 3 * exact_runs.BATCH_SIZE]]
    path = of_two.folder / "gathers" / "whole" / "batch-3.ckpt"
    with pytest.warns(UserWarning, match="random state of 2 processes and 1 train now"):
        alone = train(tmp_path / "alone", case["module"], case["trainer"], path)
    assert sorted(done + rows_of_epoch(alone, 0)) == list(range(exact_runs.ROWS))


def test_two_processes_with_a_plain_loader(of_two: OfTwo) -> None:
    """Lightning shares it out by a DistributedSampler."""
    for whole, resumed in of_two.records("plain loader"):
        assert differences(whole, resumed) == []
    assert of_two.exact("plain loader") == ["exact            bit for bit"]


def test_two_processes_with_an_order_of_torchdatas_own(of_two: OfTwo) -> None:
    """Lightning wraps that sampler, and its generator begins anew in every run."""
    inside, at_an_end = of_two.exact("torchdata's own order")
    assert "the order of DistributedSamplerWrapper is drawn anew" in inside
    assert "drawn anew" not in at_an_end
    for whole, _, from_an_end in of_two.records("torchdata's own order"):
        assert differences(whole, from_an_end) == []


# With batches of another size, or another number of processes


def rows_of_epoch(run: dict[str, Any], epoch: int) -> list[int]:
    return [row for event in run["events"] if event[0] == "step" and event[1] == epoch for row in event[4]]


@pytest.mark.parametrize("bucketed", [False, True])
@pytest.mark.parametrize("batch_size", [2, 7, 14, 28])
def test_with_batches_of_another_size_no_row_is_trained_twice(batch_size: int, bucketed: bool, tmp_path: Path) -> None:
    whole = train(tmp_path, {"bucketed": bucketed}, {}, saves=("batch-9", "validation-1"))
    module = {"bucketed": bucketed, "batch_size": batch_size}
    resumed = train(tmp_path / "again", module, {}, tmp_path / "batch-9.ckpt", seed=9)
    done = rows_of_epoch(whole, 1)[: 2 * exact_runs.BATCH_SIZE]
    assert sorted(done + rows_of_epoch(resumed, 1)) == list(range(exact_runs.ROWS))
    assert sorted(rows_of_epoch(resumed, 2)) == list(range(exact_runs.ROWS))
    happened = [event[:2] for event in resumed["events"] if event[0] != "step"]
    assert happened == [event[:2] for event in whole["events"][resumed["begins"][0] :] if event[0] != "step"]
    from_its_end = train(tmp_path / "end", module, {}, tmp_path / "validation-1.ckpt", seed=9)
    assert rows_of_epoch(from_its_end, 0) == []
    assert sorted(rows_of_epoch(from_its_end, 1)) == list(range(exact_runs.ROWS))


# The classifier and its data


def fit_classifier(
    folder: Path, data: dict[str, Any], cache: Path, path: Path | None = None, saves: tuple[str, ...] = ()
) -> dict[str, Any]:
    seed_everything(3, verbose=False)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = VulnerabilityClassifier(pretrained=False, vocab_size=300, max_position_embeddings=66, **sizes)
    rows = VulnerabilityDataModule(
        vocab_size=300, max_length=64, train_batch_size=8, eval_batch_size=32, cache_dir=str(cache), **data
    )
    if path is not None:
        torch.manual_seed(77)
    logger = exact_runs.InMemory()
    trainer = Trainer(
        accelerator="cpu",
        logger=logger,
        max_epochs=2,
        limit_train_batches=6,
        limit_val_batches=2,
        log_every_n_steps=1,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[CheckpointGuard(), exact_runs.Everywhere(folder, saves)],
    )
    trainer.fit(model, rows, ckpt_path=path)
    return {"lines": logger.lines, "weights": {n: t.tolist() for n, t in model.state_dict().items()}}


@pytest.mark.parametrize("data", [{"length_bucketing": True}, {"num_workers": 2}], ids=["bucketed", "2 workers"])
def test_the_classifier(data: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    names = ("batch-3", "batch-6", "epoch-1")
    whole = fit_classifier(tmp_path / "whole", data, cache, saves=names)
    for name in names:
        resumed = fit_classifier(tmp_path / "again", data, cache, tmp_path / "whole" / f"{name}.ckpt")
        assert resumed["weights"] == whole["weights"], name
        assert resumed["lines"] == whole["lines"][-len(resumed["lines"]) :], name


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


# All of it


@pytest.mark.faults_long
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("interval", [1.0, 3])
@pytest.mark.parametrize("order", ["sampler", "shuffle", "generator"])
@pytest.mark.parametrize("workers", [(0, False), (2, False), (2, True)])
def test_every_checkpoint_of_every_kind(
    precision: str, accumulate: int, interval: float, order: str, workers: tuple[int, bool], tmp_path: Path
) -> None:
    num_workers, persistent = workers
    module = {"order": order, "noise": True, "num_workers": num_workers, "persistent": persistent}
    if order == "sampler" and persistent:
        module["noise"] = False  # this order's iterator begins the next epoch early, and lasting workers draw for it
    trainer = {"precision": precision, "accumulate_grad_batches": accumulate, "val_check_interval": interval}
    whole = train(tmp_path / "whole", module, trainer, saves=None)
    for path in sorted((tmp_path / "whole").glob("*.ckpt")):
        if path.stem != "epoch-3":  # nothing is left to do
            assert differences(whole, train(tmp_path / "again", module, trainer, path, seed=99)) == [], path.stem
