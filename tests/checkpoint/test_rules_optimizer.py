"""What the optimizer's own numbers say: mismatches are diagnosed from them, odd and healthy runs pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import TinyModule, edited, enstack_folder, every_step, quiet_trainer
from genuine import Gan, huggingface_trainer
from torch import nn

from enstack_lightning.checkpoint import Facts, Format, Options, Report, Verdict, judge, verify_checkpoint
from enstack_lightning.checkpoint.facts import OptimizerFacts, ParamGroupFacts, ProgressFacts, RunFacts, SchedulerFacts

Edit = Callable[[dict[str, Any]], object]


def said(report: Report, code: str, severity: str = "") -> str:
    return " | ".join(
        f"{f.message} -> {f.hint}" for f in report.findings if f.code == code and f.severity.startswith(severity)
    )


# Steps


def original(epoch: int, steps: int, batches: int = 1270, **fields: str) -> Facts:
    """An EnStack checkpoint at the end of an epoch, as the original's examples have it."""
    group = ParamGroupFacts((0, 1), lr=1.23e-5, initial_lr=2e-5, max_lr=None, keeps_moments=True)
    return Facts(
        "checkpoint",
        Format.ENSTACK,
        fields={"epoch": "int", **fields},
        progress=ProgressFacts(
            epoch=epoch,
            step=0,
            epochs_completed=epoch,
            epochs_begun=epoch,
            batches_in_epoch=0,
            batches_per_epoch=batches,
        ),
        optimizers=(OptimizerFacts((group,), {0: steps, 1: steps}, 2),),
    )


def findings(facts: Facts, code: str, options: Options | None = None) -> list[tuple[str, str, str]]:
    return [(f.severity.value, f.message, f.hint) for f in judge(facts, options) if f.code == code]


def test_the_originals_normal_case() -> None:
    assert findings(original(2, 2532), "CK401") == [
        (
            "pass",
            "optimizer steps 2,532, expected 2,540 (2 epochs x 1,270 batches): difference 8, tolerance 127",
            "",
        )
    ]


def test_the_originals_warning_case() -> None:
    ((severity, message, hint),) = findings(original(2, 5000), "CK401")
    assert severity == "warning"
    assert message == (
        "optimizer steps 5,000, expected 2,540 (2 epochs x 1,270 batches): 2,460 more than expected, tolerance 127"
    )
    assert "further than the counters say" in hint
    assert "Large mismatch (2,460 steps): the checkpoint may be inconsistent, consider an earlier one." in hint


DIAGNOSES: dict[str, tuple[Facts, str, str]] = {
    "accumulation": (original(2, 1270), "Gradient accumulation over 2 batches", "Large mismatch (1,270 steps)"),
    "accumulation, odd batches": (original(10, 40, 11), "accumulation over 3 batches", "Small mismatch (70 steps)"),
    "made anew": (original(9, 2540), "the steps of the last 2 epochs and no more", "Large mismatch (8,890 steps)"),
    "fresh": (original(9, 3), "looks fresh under an old counter", "Large mismatch"),
    "nothing": (original(1, 0), "looks fresh under an old counter", "Large mismatch"),
    "a few skipped": (original(1, 1100), "batches without a loss", "Large mismatch (170 steps)"),
    "a few skipped on overflow": (
        original(1, 1100, scaler_state_dict="dict"),
        "Steps that the gradient scaler skipped",
        "Large mismatch (170 steps)",
    ),
    "a small one": (original(3, 99, 51), "batches without a loss", "Small mismatch (54 steps)"),
}


@pytest.mark.parametrize("name", DIAGNOSES)
def test_a_mismatch_is_diagnosed_from_the_numbers(name: str) -> None:
    facts, *words = DIAGNOSES[name]
    ((severity, _, hint),) = findings(facts, "CK401")
    assert severity == "warning"
    for word in words:
        assert word in hint, hint


@pytest.mark.parametrize(
    ("off", "severity"), [(0, "pass"), (20, "pass"), (21, "warning"), (-20, "pass"), (-21, "warning")]
)
def test_the_tolerance_is_20_steps_or_a_tenth_of_an_epoch(off: int, severity: str) -> None:
    assert findings(original(5, 500 + off, 100), "CK401")[0][0] == severity
    assert findings(original(5, 5000 + 5 * off, 1000), "CK401")[0][0] == ("pass" if abs(off) <= 20 else "warning")
    assert findings(original(5, 500 + off, 100), "CK401", Options(tolerance=10**6))[0][0] == "pass"


def lightning(steps: list[int], counted: int, **fields: str) -> Facts:
    group = ParamGroupFacts((0,), lr=1e-3, initial_lr=None, max_lr=None, keeps_moments=True)
    return Facts(
        "checkpoint",
        Format.LIGHTNING,
        fields={"epoch": "int", **fields},
        progress=ProgressFacts(
            epoch=2,
            global_step=counted,
            optimizer_steps=counted,
            epochs_completed=2,
            epochs_begun=2,
            batches_in_epoch=0,
        ),
        optimizers=tuple(OptimizerFacts((group,), {0: s} if s >= 0 else {}, int(s >= 0)) for s in steps),
        run=RunFacts(batches_per_epoch=counted // 2),
    )


def test_a_gradient_scaler_explains_few_steps_fewer_and_not_many() -> None:
    assert findings(lightning([995], 1000, MixedPrecision="dict"), "CK401")[0][0] == "info"
    assert findings(lightning([600], 1000, MixedPrecision="dict"), "CK401")[0][0] == "warning"
    assert findings(lightning([1001], 1000, MixedPrecision="dict"), "CK401")[0][0] == "error"
    assert findings(lightning([995], 1000), "CK401")[0][0] == "warning"


@pytest.mark.parametrize("field", ["MixedPrecision", "scaler_state_dict"])
@pytest.mark.parametrize(("kind", "severity"), [("dict", "info"), ("OrderedDict", "info"), ("NoneType", "warning")])
def test_only_a_state_of_a_gradient_scaler_explains_skipped_steps(field: str, kind: str, severity: str) -> None:
    assert findings(lightning([995], 1000, **{field: kind}), "CK401")[0][0] == severity


@pytest.mark.parametrize(
    ("steps", "counted", "severity"),
    [(80, 100, "info"), (79, 100, "warning"), (1960, 2000, "info"), (1959, 2000, "warning"), (0, 15, "warning")],
)
def test_a_gradient_scaler_skips_up_to_20_steps_or_a_fiftieth_and_not_all(
    steps: int, counted: int, severity: str
) -> None:
    assert findings(lightning([steps], counted, MixedPrecision="dict"), "CK401")[0][0] == severity


def test_a_scaler_explains_no_more_than_the_tolerance_where_steps_are_reckoned() -> None:
    assert findings(original(10, 9850, 1000, scaler_state_dict="dict"), "CK401")[0][0] == "warning"


def test_the_scaler_of_transformers_is_a_file_of_its_own(tmp_path: Path) -> None:
    path = huggingface_trainer(tmp_path, 7, gradient_accumulation_steps=1)

    def behind(state: dict[str, Any]) -> None:
        for entry in state["state"].values():
            entry["step"] -= 1

    edited(path / "optimizer.pt", path / "optimizer.pt", behind)
    assert "1 fewer than expected" in said(verify_checkpoint(path), "CK401", "warning")
    torch.save(torch.amp.GradScaler("cpu").state_dict(), path / "scaler.pt")
    assert "1 fewer than expected" in said(verify_checkpoint(path), "CK401", "info")


@pytest.mark.parametrize(("steps", "severity"), [(1000, "pass"), (999, "info"), (998, "warning")])
def test_averaged_weights_end_with_one_step_that_is_none(steps: int, severity: str) -> None:
    averaging = SchedulerFacts(9, (1e-3,), (1e-3,), (), None, kind="SWALR")
    facts = lightning([steps], 1000)
    assert findings(dataclasses.replace(facts, schedulers=(averaging,)), "CK401")[0][0] == severity
    live = dataclasses.replace(facts, saved=dataclasses.replace(facts, schedulers=(averaging,)))
    assert findings(live, "CK401")[0][0] == severity


def inside(steps: int, counted: int, accumulate: int | None = None, **progress: int | None) -> Facts:
    """Of a run with ten batches an epoch; in batch 4 of the third, where nothing else is said."""
    facts = lightning([steps], counted)
    at = {"epochs_completed": 2, "epochs_begun": 3, "batches_in_epoch": 4, **progress}
    run = RunFacts(batches_per_epoch=10, accumulate_grad_batches=accumulate)
    return dataclasses.replace(facts, progress=dataclasses.replace(facts.progress, **at), run=run)


ANEW = {
    "in this epoch": (inside(4, 24), "the last 4 batches and no more"),
    "an epoch before": (inside(14, 24), "the last 1 epoch and 4 batches and no more"),
    "an accumulated epoch": (inside(5, 15, 2, epochs_completed=3), "the last 1 epoch and no more"),
    "in no epoch": (inside(7, 24), ""),
    "in more batches than an epoch has": (inside(5, 45, batches_in_epoch=25), ""),
    "in epochs of which some have fewer steps": (inside(5, 11, epochs_begun=2, batches_in_epoch=0), ""),
    "in an epoch with fewer steps than batches": (inside(10, 12), ""),
    "in epochs that are not counted": (inside(4, 24, epochs_completed=None), ""),
    "in batches that are not counted": (inside(4, 24, batches_in_epoch=None), ""),
}


@pytest.mark.parametrize("case", ANEW)
def test_steps_of_whole_last_epochs_alone_tell_an_optimizer_made_anew(case: str) -> None:
    facts, words = ANEW[case]
    ((severity, _, hint),) = findings(facts, "CK401")
    assert severity == "warning"
    assert words in hint if words else "made anew" not in hint


def in_batches(batches: int | None, steps: list[int], counted: int, **run: int) -> Facts:
    """Of a Lightning run whose loop counted so many steps in so many batches."""
    facts = dataclasses.replace(lightning(steps, counted), run=RunFacts(**run))
    return dataclasses.replace(facts, progress=dataclasses.replace(facts.progress, batches_trained=batches))


def of_transformers(facts: Facts) -> Facts:
    return dataclasses.replace(facts, format=Format.HUGGINGFACE)


def uncounted(facts: Facts) -> Facts:
    return dataclasses.replace(facts, progress=dataclasses.replace(facts.progress, optimizer_steps=None))


LOST, MISSING, FRESH = "the state of another optimizer is missing", "the counter is right and", "looks fresh"
PAST, TWO_SAVES, SKIPPED = "use_pl_optimizer=False", "put together from two saves", "batches without a loss"
CAUSES: dict[str, tuple[Facts, str]] = {
    "one of two": (in_batches(20, [20], 30), LOST),
    "one of two, accumulated": (in_batches(41, [21], 30, accumulate_grad_batches=2), LOST),
    "one of two, in more windows than there are": (in_batches(41, [22], 30, accumulate_grad_batches=2), SKIPPED),
    "one, of transformers": (of_transformers(in_batches(20, [20], 30)), SKIPPED),
    "both of two": (in_batches(20, [10, 10], 30), SKIPPED),
    "one without a step": (in_batches(20, [0], 30), FRESH),
    "one that no loop counted": (uncounted(in_batches(30, [18], 40, batches_per_epoch=20)), FRESH),
    "one that skipped steps": (in_batches(20, [15], 20), SKIPPED),
    "one with more steps than batches": (in_batches(20, [25], 30), SKIPPED),
    "one of two alike": (in_batches(20, [15], 30), MISSING),
    "one of two alike, boundary": (in_batches(19, [10], 20), MISSING),
    "one of four alike": (in_batches(10, [10], 40), MISSING),
    "one of five alike": (in_batches(8, [8], 40), FRESH),
    "one of two alike, of transformers": (of_transformers(in_batches(15, [10], 20)), FRESH),
    "a third": (in_batches(7, [7], 20), LOST),
    "a third, in batches that nobody counted": (in_batches(None, [7], 20), FRESH),
    "half of the batches": (in_batches(20, [10], 20), FRESH),
    "past the count of one of two": (in_batches(20, [20, 10], 10), PAST),
    "past the count of both": (in_batches(20, [20, 10], 0), PAST),
    "past the count, with no batch": (in_batches(0, [20, 10], 10), TWO_SAVES),
    "past a count that is of none": (in_batches(20, [20, 10], 15), TWO_SAVES),
    "of more optimizers than can be tried": (in_batches(20, [2] * 40, 1), TWO_SAVES),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CAUSES)
def test_what_an_optimizer_lost_is_told_from_the_batches(case: str) -> None:
    facts, words = CAUSES[case]
    ((_, _, hint),) = findings(facts, "CK401")
    assert words in hint


def test_what_is_certain_was_called_usually_harmless() -> None:
    ((severity, _, hint),) = findings(lightning([17], 10), "CK401")
    assert severity == "error"
    assert hint.endswith("put together from two saves. Use another checkpoint of this run.")


def test_an_epoch_of_fewer_than_no_batches_is_reckoned_with_no_further() -> None:
    for facts in (original(-1, 0), original(2, 20, -5)):
        assert "error" in {severity for severity, _, _ in findings(facts, "CK301")}
        assert not findings(facts, "CK401")


def test_several_optimizers_are_counted_together() -> None:
    assert findings(lightning([500, 500], 1000), "CK401")[0][0] == "pass"
    ((severity, _, hint),) = findings(dataclasses.replace(lightning([300], 900), run=RunFacts()), "CK401")
    assert severity == "warning"
    assert "3 x 300 steps: with 3 optimizers the counter is right and 2 of them are missing here" in hint
    assert findings(lightning([500, -1], 1000), "CK401") == []  # the second keeps no count
    assert findings(lightning([1000, -1], 1000), "CK401") == []
    assert findings(lightning([1500, -1], 1000), "CK401")[0][0] == "error"


def test_an_optimizer_missing_from_a_real_gan_is_told(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(Gan())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert verify_checkpoint(tmp_path / "c.ckpt").verdict is Verdict.PASS
    report = verify_checkpoint(edited(tmp_path / "c.ckpt", tmp_path / "e.ckpt", lambda c: c["optimizer_states"].pop()))
    assert "with 2 optimizers the counter is right and 1 of them is missing here" in said(report, "CK401", "warning")


def test_the_steps_of_transformers_are_held_against_global_step(tmp_path: Path) -> None:
    path = huggingface_trainer(tmp_path, 7, gradient_accumulation_steps=1)
    assert "optimizer steps 7, expected 7 (global_step)" in said(verify_checkpoint(path), "CK401", "pass")

    def ahead(state: dict[str, Any]) -> None:
        for entry in state["state"].values():
            entry["step"] += 7

    edited(path / "optimizer.pt", path / "optimizer.pt", ahead)
    assert "7 more than expected" in said(verify_checkpoint(path), "CK401", "error")


# State


def test_an_empty_state_under_an_old_counter(trained: Path, tmp_path: Path) -> None:
    def empty(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["state"] = {}

    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", empty)
    assert "no state for any of its 2 parameters after 7 steps" in said(verify_checkpoint(path), "CK402", "error")

    def sgd(checkpoint: dict[str, Any]) -> None:
        empty(checkpoint)
        checkpoint["optimizer_states"][0] = torch.optim.SGD(nn.Linear(4, 2).parameters(), lr=1e-2).state_dict()

    report = verify_checkpoint(edited(trained / "step=7.ckpt", tmp_path / "sgd.ckpt", sgd))
    assert said(report, "CK402", "error") == ""


class LateSecond(Gan):
    """Its second optimizer begins with the third batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step >= 2:
            super().training_step(batch, batch_idx)
        else:
            generator, _ = self.optimizers()
            generator.zero_grad()
            self.manual_backward(self.generator(batch[0]).square().mean())
            generator.step()


def test_an_optimizer_that_has_not_stepped_yet_was_called_one_that_lost_its_state(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, every_step(tmp_path), max_epochs=1).fit(LateSecond())
    report = verify_checkpoint(tmp_path / "step=2.ckpt")
    assert "optimizer 1: has not stepped, the others have all 2 steps" in said(report, "CK402", "pass")
    assert report.verdict is Verdict.PASS

    def empty(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][1]["state"] = {}

    report = verify_checkpoint(edited(tmp_path / "step=6.ckpt", tmp_path / "e.ckpt", empty))
    assert "optimizer 1 has no state for any of its 2 parameters after 6 steps" in said(report, "CK402", "error")


class LateSecondOfSgd(LateSecond):
    """SGD with momentum counts no steps, so that nothing tells which of the two made them."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.01, momentum=0.9) for part in (self.generator, self.discriminator)]


def test_beside_an_optimizer_that_counts_no_steps_one_without_state_may_not_have_stepped(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, every_step(tmp_path), max_epochs=1).fit(LateSecondOfSgd())
    report = verify_checkpoint(tmp_path / "step=2.ckpt")
    assert "optimizer 1 has no state for any of its" in said(report, "CK402", "warning")
    assert report.verdict is Verdict.WARN


def test_the_first_steps_that_a_gradient_scaler_skipped_were_an_error() -> None:
    def severity(counted: int, **fields: str) -> str:
        facts = lightning([-1], counted, **fields)
        return "/".join(s for s, _, _ in findings(facts, "CK402"))

    assert severity(3, MixedPrecision="dict") == "warning"
    assert severity(100, MixedPrecision="dict") == "error"
    assert severity(3) == "error"


def on_state(edit: Callable[[dict[Any, Any]], object]) -> Edit:
    return lambda checkpoint: edit(checkpoint["optimizer_states"][0]["state"])


def on_group(**values: Any) -> Edit:
    return lambda checkpoint: checkpoint["optimizer_states"][0]["param_groups"][0].update(values)


def grow(state: dict[Any, Any]) -> None:
    state[0]["exp_avg"] = state[0]["exp_avg_sq"] = torch.zeros(7, 9)


def narrow(checkpoint: dict[str, Any]) -> None:
    for index, shape in enumerate(((2, 3), (2,))):
        entry = checkpoint["optimizer_states"][0]["state"][index]
        entry["exp_avg"], entry["exp_avg_sq"] = torch.zeros(shape), torch.zeros(shape)


def more_parameters(checkpoint: dict[str, Any]) -> None:
    optimizer = checkpoint["optimizer_states"][0]
    optimizer["param_groups"][0]["params"] = [0, 1, 2]
    optimizer["state"][2] = dict(optimizer["state"][1])


def one_behind(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["state"][1]["step"] = torch.tensor(2.0)


FAULTS: dict[str, tuple[Edit, str, str, str]] = {
    "moment of another model": (
        on_state(grow),
        "CK405",
        "error",
        "exp_avg of parameter 0 has shape [7, 9], and no weight has that shape (2 of 4 moments do not fit)",
    ),
    "other width": (narrow, "CK405", "error", "has shape [2, 3], and no weight has that shape"),
    "more parameters than weights": (
        more_parameters,
        "CK406",
        "error",
        "has 3 parameters, and the checkpoint has 2 weights",
    ),
    "a parameter twice": (on_group(params=[0, 1, 1]), "CK404", "error", "1 parameters in more than one of its groups"),
    "negative rate": (on_group(lr=-1e-3), "CK407", "error", "group 0: lr is -0.001"),
    "beta of 1": (on_group(betas=(0.9, 1.0)), "CK407", "error", "one of betas is 1 and must lie in [0, 1)"),
    "negative decay": (on_group(weight_decay=-1), "CK407", "error", "weight_decay is -1"),
    "eps that is NaN": (on_group(eps=math.nan), "CK407", "error", "eps is nan"),
    "eps of 0": (on_group(eps=0.0), "CK407", "warning", "eps is 0"),
    "momentum of 1": (on_group(momentum=1.0), "CK407", "warning", "momentum is 1 and should be below 1"),
    "half of a state": (
        on_state(lambda s: s[1].pop("exp_avg_sq")),
        "CK408",
        "error",
        "1 parameters have one of exp_avg and exp_avg_sq without the other: parameter 1",
    ),
    "no state of one": (
        on_state(lambda s: s.pop(1)),
        "CK408",
        "info",
        "1 of 2 parameters have no state: parameter 1",
    ),
    "one behind": (one_behind, "CK403", "warning", "Expected if layers were unfrozen 5 steps after the start"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(fault: str, trained: Path, tmp_path: Path) -> None:
    edit, code, severity, words = FAULTS[fault]
    report = verify_checkpoint(edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", edit))
    assert words in said(report, code, severity), report.findings
    assert report.verdict is {"error": Verdict.FAIL, "warning": Verdict.WARN, "info": Verdict.PASS}[severity]


class Named(TinyModule):
    """Its optimizer knows the parameters' names, in an order of its own, perhaps without the layer's."""

    def __init__(self, of_the_layer: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.of_the_layer = of_the_layer

    def configure_optimizers(self) -> Any:
        named = list((self.layer if self.of_the_layer else self).named_parameters())
        return torch.optim.AdamW(named[::-1], lr=1e-2)


@pytest.mark.parametrize("of_the_layer", [False, True])
def test_moments_are_compared_by_name_where_names_are_known(of_the_layer: bool, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(Named(of_the_layer))
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert "4 moments in the shapes of weights" in said(verify_checkpoint(tmp_path / "c.ckpt"), "CK405", "pass")

    def swap(checkpoint: dict[str, Any]) -> None:
        state = checkpoint["optimizer_states"][0]["state"]
        state[0], state[1] = state[1], state[0]

    report = verify_checkpoint(edited(tmp_path / "c.ckpt", tmp_path / "e.ckpt", swap))
    assert "has shape [4, 4], and weight layer.bias has [4]" in said(report, "CK405", "error")


class NamedByPart(TinyModule):
    """Two layers of different shape in two groups, each with the layer's own names for its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def training_step(self, batch: Any) -> Any:
        return super().training_step((self.first(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([{"params": list(part.named_parameters())} for part in (self.first, self.layer)])


def test_names_that_two_groups_share_were_taken_for_those_of_one_layer(tmp_path: Path) -> None:
    quiet_trainer(tmp_path, every_step(tmp_path), max_epochs=1).fit(NamedByPart())
    report = verify_checkpoint(tmp_path / "step=3.ckpt")
    assert "8 moments in the shapes of weights" in said(report, "CK405", "pass")
    assert report.verdict is Verdict.PASS


# Odd and healthy: every optimizer of torch on the same module, frozen and unused parameters


class Partly(TinyModule):
    """One parameter is frozen, one is not used, both are in the optimizer."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = make
        self.layer.bias.requires_grad_(False)
        self.unused = nn.Linear(3, 3)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.1),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "Adafactor": torch.optim.Adafactor,
    "LBFGS": lambda p: torch.optim.LBFGS([w for w in p if w.requires_grad]),
    "transformers' Adafactor": lambda p: transformers.Adafactor(p, relative_step=True, lr=None),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore")
def test_parameters_without_state_are_no_fault(name: str, tmp_path: Path) -> None:
    quiet_trainer(tmp_path, every_step(tmp_path), max_epochs=1).fit(Partly(OPTIMIZERS[name]))
    for path in tmp_path.glob("*.ckpt"):
        report = verify_checkpoint(path)
        assert report.verdict is Verdict.PASS, report.findings
    if name not in ("LBFGS", "Rprop", "ASGD"):
        assert "3 of 4 parameters have no state" in said(report, "CK408", "info"), report.findings


def test_frozen_weights_left_out_on_purpose_are_worth_knowing(trained: Path, tmp_path: Path) -> None:
    def strip(checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["layer.bias"]
        del checkpoint["optimizer_states"][0]["state"][1]

    report = verify_checkpoint(edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", strip))
    assert "left out of the checkpoint on purpose" in said(report, "CK406", "info")
    assert report.verdict is Verdict.PASS


def test_a_healthy_enstack_folder_and_trainer_of_transformers_fit_their_weights(tmp_path: Path) -> None:
    for path in (enstack_folder(tmp_path / "c"), huggingface_trainer(tmp_path / "h", 3)):
        report = verify_checkpoint(path)
        for code in ("CK405", "CK406", "CK407"):
            assert said(report, code, "pass"), (path, code)


def test_a_thousand_odd_groups_are_not_all_listed(trained: Path, tmp_path: Path) -> None:
    def multiply(checkpoint: dict[str, Any]) -> None:
        groups = checkpoint["optimizer_states"][0]["param_groups"]
        groups[0]["lr"] = -1.0
        groups.extend({**groups[0], "params": [n]} for n in range(2, 1001))

    report = verify_checkpoint(edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", multiply))
    assert sum(f.code == "CK407" for f in report.findings) == 11
    assert "990 further values" in said(report, "CK407", "error")


class EverySecond(Gan):
    """Under manual optimization its optimizers step every second batch, past Lightning's count if so wished."""

    def __init__(self, counted: bool = True) -> None:
        super().__init__()
        self.counted = counted

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers(use_pl_optimizer=self.counted)
        self.manual_backward(self.generator(batch[0]).square().mean())
        self.manual_backward(self.discriminator(batch[0]).square().mean())
        if batch_idx % 2:
            generator.step()
            generator.zero_grad()
        discriminator.step()
        discriminator.zero_grad()


class OneEverySecond(EverySecond):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.generator(batch[0]).square().mean())
        if batch_idx % 2:
            self.optimizers(use_pl_optimizer=self.counted).step()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.generator.parameters(), lr=1e-3)


def saved_by(module: nn.Module, file: Path, epochs: int = 2) -> Path:
    trainer = quiet_trainer(file.parent, max_epochs=epochs)
    trainer.fit(module)
    trainer.save_checkpoint(file)
    return file


def steps_set_to(steps: int) -> Edit:
    def edit(checkpoint: dict[str, Any]) -> None:
        for state in checkpoint["optimizer_states"][0]["state"].values():
            state["step"] = torch.tensor(float(steps))

    return edit


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_reset_that_steps_every_second_batch_was_taken_for_one_of_two(tmp_path: Path) -> None:
    path = saved_by(OneEverySecond(), tmp_path / "last.ckpt")
    whole = verify_checkpoint(path).facts.progress.optimizer_steps or 0
    assert whole % 2 == 0
    for steps, cause in ((whole // 2, "the last 1 epoch and no more"), (1, "looks fresh under an old counter")):
        report = verify_checkpoint(edited(path, tmp_path / "reset.ckpt", steps_set_to(steps)))
        assert cause in said(report, "CK401", "warning")
        assert "missing here" not in said(report, "CK401")


@pytest.mark.filterwarnings("ignore")
def test_the_lost_optimizer_of_two_of_which_one_steps_every_second_batch_is_named(tmp_path: Path) -> None:
    path = saved_by(EverySecond(), tmp_path / "last.ckpt")
    for lost in (0, 1):
        without = edited(path, tmp_path / "lost.ckpt", lambda c, lost=lost: c["optimizer_states"].pop(lost))
        report = verify_checkpoint(without)
        assert "the state of another optimizer is missing" in said(report, "CK401", "warning")
        assert "usually harmless" not in said(report, "CK401")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", [EverySecond, OneEverySecond])
def test_steps_past_lightnings_count_were_called_two_saves(module: Any, tmp_path: Path) -> None:
    report = verify_checkpoint(saved_by(module(counted=False), tmp_path / "last.ckpt"))
    assert "use_pl_optimizer=False" in said(report, "CK401", "error")
    assert "put together" not in said(report, "CK401")
