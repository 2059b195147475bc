"""The plan says what a Trainer then really does, in one sentence that nobody misreads."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TinyModule, enstack_folder, every_step, quiet_trainer
from genuine import huggingface_trainer
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from enstack_lightning.checkpoint import Facts, Format, Options, ResumePlan, Verdict, plan_resume, verify_checkpoint
from enstack_lightning.checkpoint.facts import OptimizerFacts, ParamGroupFacts, ProgressFacts, RunFacts
from enstack_lightning.guard import CheckpointGuard


def sentence(path: Path) -> str:
    plan = verify_checkpoint(path).resume
    assert plan is not None
    return plan.sentence


def test_the_original_example() -> None:
    group = ParamGroupFacts((0,), lr=1.23e-5, initial_lr=2e-5, max_lr=None, keeps_moments=True)
    facts = Facts(
        "checkpoint",
        Format.ENSTACK,
        progress=ProgressFacts(
            epoch=2, step=0, epochs_completed=2, epochs_begun=2, batches_in_epoch=0, batches_per_epoch=1270
        ),
        optimizers=(OptimizerFacts((group,), {0: 2532.0}, 1),),
        run=RunFacts(max_epochs=10),
    )
    plan = plan_resume(facts)
    assert plan is not None
    assert plan.sentence == (
        "end of epoch 2 of 10; continues with epoch 3, batch 0 of 1,270; 0 batches trained twice; next LR 1.23e-05"
    )


LIGHTNING = {
    "step=5": "end of epoch 0 (1 of 3 epochs done); continues with epoch 1, batch 0 of 5; 0 batches trained twice; "
    "next LR 9.50e-03",
    "epoch=0": "end of epoch 0 (1 of 3 epochs done); continues with epoch 1, batch 0 of 5; 0 batches trained twice; "
    "next LR 9.50e-03",
    "step=7": "2 of 5 batches into epoch 1 (1 of 3 epochs done); continues with epoch 1, batch 2 of 5; "
    "0 batches trained twice; next LR 9.31e-03",
    "step=15": "finished: 3 of 3 epochs done, 15 steps taken; raise max_epochs or max_steps to train on",
}


@pytest.mark.parametrize("name", LIGHTNING)
def test_a_lightning_checkpoint(name: str, trained: Path) -> None:
    assert sentence(trained / f"{name}.ckpt") == LIGHTNING[name]


@pytest.mark.parametrize(
    ("epoch", "step", "said"),
    [
        (2, 0, "end of epoch 2; continues with epoch 3, batch 0 of 10; 0 batches trained twice; next LR 2.00e-05"),
        (
            3,
            4,
            "4 of 10 batches into epoch 3; continues with epoch 3, batch 4 of 10; up to 4 batches trained twice; "
            "next LR 2.00e-05",
        ),
        (
            3,
            9,
            "9 of 10 batches into epoch 3; continues with epoch 3, batch 9 of 10; up to 1 batch trained twice; "
            "next LR 1.99e-05",
        ),
    ],
)
def test_an_enstack_folder(epoch: int, step: int, said: str, tmp_path: Path) -> None:
    assert sentence(enstack_folder(tmp_path / "c", epoch, step)) == said


class Recorder(TinyModule):
    """Notes the number of every epoch and batch that it trains."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self.trained: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        self.trained.append((self.current_epoch, batch_idx))
        return super().training_step(batch)

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        return DataLoader(loader.dataset, batch_size=4) if self.plain else loader


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("step", [2, 4, 5, 7])
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_goes_on_where_the_plan_says(step: int, plain: bool, tmp_path: Path) -> None:
    torch_trainer = quiet_trainer(tmp_path, every_step(tmp_path), max_epochs=2)
    first = Recorder(plain)
    torch_trainer.fit(first)
    path = tmp_path / f"step={step}.ckpt"
    plan = verify_checkpoint(path).resume
    assert plan is not None
    second = Recorder(plain)
    quiet_trainer(tmp_path, max_epochs=2).fit(second, ckpt_path=path)
    assert second.trained[0] == (plan.next_epoch, plan.next_batch)
    rest = [rows for (epoch, _), rows in zip(second.trained, second.rows, strict=True) if epoch == plan.next_epoch]
    done = [
        rows for (epoch, _), rows in zip(first.trained[:step], first.rows, strict=False) if epoch == plan.next_epoch
    ]
    twice = sum(rows in done for rows in rest)
    assert twice <= plan.batches_repeated
    assert plan.batches_repeated == 0 or plain


def test_a_run_that_has_not_begun_starts(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=0)
    trainer.fit(TinyModule())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    plan = verify_checkpoint(tmp_path / "c.ckpt").resume
    assert plan is not None
    assert plan.kind == "initial"
    assert plan.sentence == (
        "nothing trained yet; starts with epoch 0, batch 0; 0 batches trained twice; next LR 1.00e-02"
    )


def test_a_run_ended_by_max_steps_is_finished(tmp_path: Path) -> None:
    # Lightning counts the epoch that max_steps cuts short as done, and a longer run goes on with the next one.
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_steps=7, max_epochs=-1)
    trainer.fit(TinyModule())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert sentence(tmp_path / "c.ckpt") == (
        "finished: 2 epochs done, 7 steps taken; raise max_epochs or max_steps to train on"
    )


def test_a_model_alone_is_not_resumable() -> None:
    plan = plan_resume(Facts("model", Format.HUGGINGFACE, model_only=True))
    assert plan is not None
    assert plan.kind == "not-resumable"
    assert plan.sentence == "not resumable: the checkpoint holds a model and no state of its training"


def test_counters_that_leave_the_place_in_the_epoch_open_give_no_plan() -> None:
    progress = ProgressFacts(epoch=1, global_step=9, epochs_completed=1, epochs_begun=2)
    assert plan_resume(Facts("c", Format.HUGGINGFACE, progress=progress, optimizers=())) is None
    assert plan_resume(Facts("c", Format.HUGGINGFACE)) is None


def test_a_lightning_checkpoint_without_loop_counters_begins_its_epoch_from_the_start() -> None:
    progress = ProgressFacts(epoch=3, global_step=30, epochs_completed=3, epochs_begun=3)
    plan = plan_resume(Facts("c", Format.LIGHTNING, progress=progress, optimizers=()))
    assert plan is not None
    assert (plan.kind, plan.next_epoch, plan.next_batch) == ("end-of-epoch", 3, 0)


@pytest.mark.parametrize(
    ("step", "place"),
    [(7, "end of epoch 1 of 2; continues with epoch 2, batch 0 of 7"), (9, "2 of 7 batches into epoch 2 of 2;")],
)
def test_a_checkpoint_of_transformers_trainer(step: int, place: str, tmp_path: Path) -> None:
    said = sentence(huggingface_trainer(tmp_path, step))
    assert place in said
    assert "0 batches trained twice" in said


def test_the_plan_is_one_line_whatever_the_numbers() -> None:
    plan = ResumePlan("end-of-epoch", 2**40, 0, None, 2**62, 0, None, None, None)
    for kind in ("initial", "end-of-epoch", "mid-epoch", "finished", "not-resumable"):
        for first in (0, 1):
            said = dataclasses.replace(plan, kind=kind, first_epoch=first).sentence
            assert said.isprintable()


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Rows without a length, as many as there are batches of one row."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(rows())


def rows() -> list[dict[str, Any]]:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "row": i} for i, row in enumerate(features)]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor, row: torch.Tensor) -> dict[str, torch.Tensor]:
        self.rows += row.tolist()
        return {"loss": self.layer(x).square().mean()}


class StreamModule(Recorder):
    def train_dataloader(self) -> Any:
        class Batches(torch.utils.data.IterableDataset[Any]):
            def __iter__(self) -> Iterator[Any]:
                return iter([(row["x"], torch.tensor(row["row"])) for row in rows()])

        return DataLoader(Batches(), batch_size=1)


@pytest.mark.filterwarnings("ignore")
def test_data_without_a_length_is_gone_through_again(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, CheckpointGuard(), every_step(tmp_path), max_epochs=2).fit(StreamModule())
    for step in (4, 11):
        plan = verify_checkpoint(tmp_path / f"step={step}.ckpt").resume
        assert plan is not None
        module = StreamModule()
        quiet_trainer(tmp_path, max_epochs=2).fit(module, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert module.trained[0] == (plan.next_epoch, plan.next_batch)
        again = [row for (epoch, _), row in zip(module.trained, module.rows, strict=True) if epoch == plan.next_epoch]
        assert again == [[row] for row in range(6)]
        assert plan.batches_repeated == plan.step == step % 6


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("form", ["no skipping", "stream"])
def test_transformers_goes_on_where_the_plan_says(form: str, accumulated: int, tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {
        "no skipping": {"num_train_epochs": 2, "ignore_data_skip": True},
        "stream": {"max_steps": 16 // accumulated},
    }
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}

    def trained(**options: Any) -> Net:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
            save_steps=1,
            **quiet,
            **settings[form],
        )
        net = Net()
        Trainer(net, arguments, train_dataset=Stream() if form == "stream" else rows()).train(**options)
        return net

    trained()
    folders = sorted(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    plans = [verify_checkpoint(shutil.copytree(f, tmp_path / "kept" / f.name)) for f in folders]
    for folder, report in zip(folders, plans, strict=True):
        assert report.verdict is Verdict.PASS, report.findings
        plan = report.resume
        assert plan is not None
        if plan.kind == "finished":
            continue
        seen = trained(resume_from_checkpoint=str(tmp_path / "kept" / folder.name)).rows
        assert seen[0] == plan.next_batch % 6
        if plan.kind == "mid-epoch" and not plan.next_batch:
            assert plan.batches_repeated == plan.step > 0


def test_a_longer_run_to_come_is_planned_for(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=2)
    trainer.fit(TinyModule())
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    assert sentence(tmp_path / "ended.ckpt").startswith("finished: 2 of 2 epochs done")
    sentences = []
    for trainer_to_come in ({}, {"max_epochs": 5}, {"max_steps": 1_000}):
        plan = verify_checkpoint(tmp_path / "ended.ckpt", Options(run_config={"trainer": trainer_to_come})).resume
        assert plan is not None
        sentences.append(plan.sentence)
    assert [s.partition(";")[0] for s in sentences] == [
        "finished: 2 of 2 epochs done, 10 steps taken",
        "end of epoch 1 (2 of 5 epochs done)",
        "end of epoch 1 (2 epochs done)",
    ]


class Rates(Callback):
    """Keeps the rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.filterwarnings("ignore")
def test_the_next_rate_of_a_longer_run_and_the_finding_on_its_jump_contradicted_each_other(tmp_path: Path) -> None:
    module, path = TinyModule(asks_for_total=True), tmp_path / "ended.ckpt"
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), max_epochs=2)
    trainer.fit(module)
    trainer.save_checkpoint(path)
    report = verify_checkpoint(path, Options(run_config={"trainer": {"max_epochs": 4}}))
    guard, rates = CheckpointGuard(), Rates()
    quiet_trainer(tmp_path, guard, rates, max_epochs=4).fit(TinyModule(asks_for_total=True), ckpt_path=path)
    assert guard.report is not None
    for said in (report, guard.report):
        assert said.resume is not None
        assert said.resume.learning_rate == rates.seen[0]
        assert said.resume.sentence.endswith("next LR 9.09e-04, then that of the run's new length")
        message = next(f.message for f in said.findings if f.code == "CK907" and f.severity == "info")
        assert message.endswith("the next rate is the saved one, and the rate jumps after it")
    assert rates.seen[1] > 4 * rates.seen[0]
    same_length = verify_checkpoint(path, Options(run_config={"trainer": {"max_epochs": 2}})).resume
    assert same_length is not None
    assert not same_length.rate_jumps
