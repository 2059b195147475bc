"""Losses, gradients and weights that are not finite, in real Trainers: said once, stopped in time, never the best."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import BATCHES, TinyModule, every_step, quiet_trainer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from enstack_lightning import CheckpointGuard, CheckpointGuardError, RecoveryCheckpoint
from enstack_lightning.checkpoint import find_checkpoints, find_last_good
from enstack_lightning.checkpoint.verify import verify_checkpoint
from enstack_lightning.errors import CheckpointError
from enstack_lightning.guard.loading.choice import choose_newest
from enstack_lightning.guard.training import nonfinite
from enstack_lightning.guard.training.nonfinite import NonfiniteWatch, names_of, nonfinite_among

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def every_look_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a look at these few gradients may take longer than a step is worth."""
    monkeypatch.setattr(nonfinite, "_CHEAP_SECONDS", INF)


class Sick(TinyModule):
    """Its loss is multiplied by `factor` in some steps, counted from 0 over the run."""

    def __init__(self, *steps: int, factor: float = NAN, form: str = "tensor") -> None:
        super().__init__()
        self.steps, self.factor, self.form = steps, factor, form
        self.seen = 0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        loss = super().training_step(batch) * (self.factor if self.seen in self.steps else 1.0)
        self.log("loss", loss)
        self.seen += 1
        if self.form == "none" and self.seen % 2 == 0:
            return None
        return {"loss": loss, "other": "value"} if self.form == "dict" else loss


class _InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * INF


class SickGradient(TinyModule):
    """A finite loss whose gradient is not, for one of its two layers, in some steps."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.second = torch.nn.Linear(4, 2)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        weight = self.second.weight
        if len(self.losses) in self.steps:
            weight = _InfiniteGradient.apply(weight)
        loss: Tensor = super().training_step(batch) + torch.nn.functional.linear(batch[0], weight).square().mean()
        return loss


class Gan(LightningModule):
    def __init__(self, sick_step: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.sick_step = sick_step
        self.generator, self.discriminator = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        generator, discriminator = optimizers
        for optimizer in (discriminator, generator):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            rows = batch[0] if optimizer is discriminator else self.generator(batch[0])
            is_sick = optimizer is generator and batch_idx == self.sick_step
            self.manual_backward(self.discriminator(rows).square().mean() * (INF if is_sick else 1.0))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (self.generator, self.discriminator)], []

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(20, 4)), batch_size=4)


def fit(folder: Path, module: LightningModule, *callbacks: Callback, action: Any = "warn", **options: Any) -> list[str]:
    """Trains; returns the guard's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(folder, CheckpointGuard(on_nonfinite=action), *callbacks, **options).fit(module)
    said = [str(w.message) for w in caught]
    return [s for s in said if s.startswith("CheckpointGuard") and "not a" not in s]


def about_steps(said: list[str]) -> list[str]:
    return [s for s in said if " in step " in s]


def finite(module: torch.nn.Module) -> bool:
    return all(torch.isfinite(p).all() for p in module.parameters())


# Losses and gradients


def test_a_healthy_run_says_nothing(tmp_path: Path) -> None:
    assert fit(tmp_path, TinyModule(), every_step(tmp_path)) == []


@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_the_first_of_a_run_of_bad_steps_is_said_with_step_and_parameters(form: str, tmp_path: Path) -> None:
    said = about_steps(fit(tmp_path, Sick(7, 8, 9, form=form), max_epochs=2))
    assert len(said) == 1
    assert (
        "the loss is nan and the gradient norm is not finite for layer.weight, layer.bias in step 8 (epoch 1)"
        in said[0]
    )


class Healed(Callback):
    """Puts the weights and the optimizer of the step before back, as a skipping training loop would."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        with torch.no_grad():
            for p in pl_module.parameters():
                p.nan_to_num_(0.1)
        trainer.optimizers[0].state.clear()


def test_two_runs_of_bad_steps_are_said_apart(tmp_path: Path) -> None:
    said = about_steps(fit(tmp_path, Sick(2, 3, 8), Healed(), max_epochs=2))
    assert [s.partition(" in step ")[2].split(" ")[0] for s in said] == ["3", "9"]


def test_a_gradient_alone_names_the_parameters_that_have_it(tmp_path: Path) -> None:
    said = about_steps(fit(tmp_path, SickGradient(6)))
    assert len(said) == 1
    assert said[0].startswith("CheckpointGuard: the gradient norm is not finite for second.weight in step 7 (epoch 1)")


def test_many_parameters_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    module = Sick(3)
    module.layer = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(10)))  # type: ignore[assignment]
    (said,) = about_steps(fit(tmp_path, module, max_epochs=1))
    assert (
        "for layer.0.weight, layer.0.bias, layer.1.weight, layer.1.bias, layer.2.weight and 15 more in step 4" in said
    )


@pytest.mark.parametrize("module", [Sick(6), SickGradient(6)], ids=["loss", "gradient"])
def test_raise_ends_the_run_with_the_weights_as_they_were(module: TinyModule, tmp_path: Path) -> None:
    with pytest.raises(CheckpointGuardError, match=r"not finite for .* in step 7 \(epoch 1\)"):
        fit(tmp_path, module, action="raise")
    assert finite(module)
    assert len(module.losses) == 7


def test_raise_with_accumulation_ends_before_the_window_is_applied(tmp_path: Path) -> None:
    module = Sick(0)
    with pytest.raises(CheckpointGuardError, match=r"the loss is nan in step 1 "):
        fit(tmp_path, module, action="raise", accumulate_grad_batches=2)
    assert len(module.losses) == 1
    assert finite(module)


def test_ignore_does_nothing_at_all(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=1)
    assert fit(tmp_path, Sick(2), saves, action="ignore") == []
    assert Path(saves.best_model_path).name == "step=15.ckpt"


def test_steps_without_a_loss(tmp_path: Path) -> None:
    assert fit(tmp_path, Sick(form="none")) == []
    assert len(about_steps(fit(tmp_path, Sick(2, form="none")))) == 1


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    (said,) = about_steps(fit(tmp_path, Gan(sick_step=1), max_epochs=1))
    assert "the loss is inf and the gradient norm is not finite for generator.weight, generator.bias in step 4 " in said
    assert fit(tmp_path, Gan(sick_step=-1)) == []
    module = Gan(sick_step=1)
    with pytest.raises(CheckpointGuardError, match=r"generator\.weight"):
        fit(tmp_path, module, action="raise")
    assert finite(module)


def test_a_step_that_the_scaler_skips_is_not_reported(tmp_path: Path) -> None:
    def scaled() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**15))

    module = SickGradient(3)
    assert fit(tmp_path, module, plugins=[scaled()]) == []
    assert finite(module)
    assert len(about_steps(fit(tmp_path, Sick(3), plugins=[scaled()]))) == 1


class Large(TinyModule):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().training_step(batch) + 1000


def test_a_loss_that_is_not_finite_once_it_is_scaled_is_not_reported(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    assert fit(tmp_path, Large(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=1) == []


class Backward(Sick):
    """Has its backward pass itself, where no hook sees the loss; its first step comes before any gradient."""

    def __init__(self, *steps: int) -> None:
        super().__init__(*steps)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        optimizer: Any = self.optimizers()
        if not self.seen:
            optimizer.step()
        optimizer.zero_grad()
        super().training_step(batch).backward()
        optimizer.step()


def test_gradients_alone_tell_where_a_run_of_bad_steps_ends(tmp_path: Path) -> None:
    said = about_steps(fit(tmp_path, Backward(2, 3, 8), Healed(), max_epochs=2))
    assert [s.partition(" in step ")[2].split(" ")[0] for s in said] == ["4", "10"]


def test_losses_alone_tell_where_a_run_of_bad_steps_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "_CHEAP_SECONDS", -1.0)
    monkeypatch.setattr(nonfinite, "_SHARE", 0.0)
    said = about_steps(fit(tmp_path, Sick(2, 3, 8), Healed(), max_epochs=2))
    assert [s.partition(" in step ")[2].split(" ")[0] for s in said] == ["3", "9"]


def test_a_look_that_costs_a_small_share_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "_CHEAP_SECONDS", -1.0)
    monkeypatch.setattr(nonfinite, "_SHARE", INF)
    (said,) = about_steps(fit(tmp_path, SickGradient(6)))
    assert "the gradient norm is not finite for second.weight in step 7 (epoch 1)" in said


class SavesOnException(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


def test_what_is_saved_when_a_bad_step_ends_the_run_is_saved(tmp_path: Path) -> None:
    saves, guard = SavesOnException(tmp_path / "end.ckpt"), CheckpointGuard(on_nonfinite="raise")
    with pytest.raises(CheckpointGuardError, match="in step 7 "):
        quiet_trainer(tmp_path, saves, guard).fit(Sick(6))
    assert torch.load(tmp_path / "end.ckpt")["global_step"] == 6


def test_parameters_outside_the_module_are_counted() -> None:
    module, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    wanted = [*other.parameters(), module.bias]
    assert names_of(module, wanted) == ["bias", "parameter 1 outside the module", "parameter 2 outside the module"]


def test_a_look_that_would_cost_too_much_is_taken_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "_CHEAP_SECONDS", -1.0)
    monkeypatch.setattr(nonfinite, "_SHARE", 0.0)
    (said,) = about_steps(fit(tmp_path, SickGradient(6)))
    assert "the loss is nan" in said, "the step after is noticed by its loss"
    assert "in step 8 (epoch 1)" in said
    with pytest.raises(CheckpointGuardError, match="in step 7 "):
        fit(tmp_path, SickGradient(6), action="raise")


class Looks(Callback):
    """The batches at whose end the device has been looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: list[int] = []
        self.batches = 0
        look = NonfiniteWatch.look
        monkeypatch.setattr(NonfiniteWatch, "look", lambda *args: self.at.append(self.batches) or look(*args))

    def on_train_batch_start(self, *_: Any) -> None:
        self.batches += 1


@pytest.mark.parametrize(("module", "what"), [(Sick(8), "the loss is not finite"), (SickGradient(8), "second.weight")])
def test_a_device_is_looked_at_every_few_batches_and_the_first_bad_step_is_known_all_the_same(
    module: TinyModule, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nonfinite, "_is_at_hand", lambda tensor: False)
    looks = Looks(monkeypatch)
    (said,) = about_steps(fit(tmp_path, module, looks, log_every_n_steps=3))
    assert what in said
    assert "layer.weight" not in said.partition(" in step ")[0] or isinstance(module, Sick)
    assert " in step 9 " in said
    assert looks.at == [3, 5, 8, 10, 13, 15], "every third batch and at each epoch's end"


class Branches(TinyModule):
    """One parameter more has a gradient in every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.sometimes = torch.nn.Linear(1, 2, bias=False)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = super().training_step(batch)
        return loss + self.sometimes.weight.sum() if len(self.losses) % 2 else loss


def test_on_a_device_parameters_may_have_a_gradient_in_some_steps_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nonfinite, "_is_at_hand", lambda tensor: False)
    assert about_steps(fit(tmp_path, Branches())) == []


def test_a_device_is_looked_at_before_each_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "_is_at_hand", lambda tensor: False)
    looks = Looks(monkeypatch)
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4)
    with pytest.raises(CheckpointGuardError, match="in step 7 "):
        fit(tmp_path, Sick(6), looks, saves, action="raise")
    assert looks.at == [4, 5, 8]


def test_an_action_that_is_none_is_refused() -> None:
    with pytest.raises(CheckpointGuardError, match="on_nonfinite is 'stop' and must be one of warn, raise, ignore"):
        CheckpointGuard(on_nonfinite="stop")  # type: ignore[arg-type]


# Checkpoints


class Loses(Callback):
    """Lets a weight become not finite after some batch, as an optimizer step would."""

    def __init__(self, at: int, moment: bool = False) -> None:
        self.at, self.moment = at, moment
        self.batches = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.batches += 1
        if self.batches == self.at:
            weight = pl_module.get_parameter("layer.weight")
            with torch.no_grad():
                (trainer.optimizers[0].state[weight]["exp_avg_sq"] if self.moment else weight)[0, 0] = NAN


def monitored(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="best-{step}", monitor="loss", every_n_train_steps=1, **options)


class Logs(TinyModule):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().training_step(batch)
        self.log("loss", -float(len(self.losses)))  # each step is the best so far
        return loss


def ckpts(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".json"))


@pytest.mark.parametrize("moment", [False, True], ids=["weight", "moment"])
@pytest.mark.parametrize("plugins", [None, [AsyncCheckpointIO()]], ids=["plain", "async"])
def test_bad_weights_become_neither_best_nor_last(moment: bool, plugins: Any, tmp_path: Path) -> None:
    saves = monitored(tmp_path, save_top_k=1, save_last=True)
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), Loses(8, moment), saves, plugins=plugins, max_epochs=2)
    what = "exp_avg_sq of parameter 0 in optimizer 0" if moment else r"layer\.weight"
    with pytest.warns(
        UserWarning, match=rf"{what} is not finite at step 8\. .*best-step=8\.ckpt\.nonfinite; .*step=7"
    ) as said:
        trainer.fit(Logs())
    assert not [w for w in said if "would be refused" in str(w.message)], "what is saved aside is for no resume"
    assert ckpts(tmp_path) == ["best-step=7.ckpt", "best-step=8.ckpt.nonfinite", "last.ckpt"]
    assert Path(saves.best_model_path) == tmp_path / "best-step=7.ckpt"
    assert [Path(p).name for p in saves.best_k_models] == ["best-step=7.ckpt"]
    assert Path(saves.last_model_path) == tmp_path / "last.ckpt"
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 7
    good = find_last_good(tmp_path)
    assert good is not None
    assert Path(good.path).name in ("best-step=7.ckpt", "last.ckpt")
    module = Logs()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, ckpt_path="best")
    assert trainer.ckpt_path == str(tmp_path / "best-step=7.ckpt")
    assert finite(module)


def test_what_is_saved_aside_has_what_the_callback_saves(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_weights_only=True)
    with pytest.warns(UserWarning, match="not finite"):
        quiet_trainer(tmp_path, CheckpointGuard(), Loses(2), saves, max_epochs=1).fit(TinyModule())
    assert "optimizer_states" not in torch.load(tmp_path / "step=2.ckpt.nonfinite")


def test_top_k_keeps_what_it_had(tmp_path: Path) -> None:
    saves = monitored(tmp_path, save_top_k=3)
    with pytest.warns(UserWarning, match="layer.weight is not finite at step 8"):
        quiet_trainer(tmp_path, CheckpointGuard(), Loses(8), saves).fit(Logs())
    kept = ["best-step=5.ckpt", "best-step=6.ckpt", "best-step=7.ckpt"]
    assert ckpts(tmp_path) == [*kept, "best-step=8.ckpt.nonfinite"]
    assert sorted(Path(p).name for p in saves.best_k_models) == kept


def test_the_recovery_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    recovery = RecoveryCheckpoint(str(tmp_path), every_n_train_steps=2)
    with pytest.warns(UserWarning, match="not finite"):
        quiet_trainer(tmp_path, CheckpointGuard(), Loses(5), recovery, max_epochs=2).fit(TinyModule())
    assert torch.load(tmp_path / "recovery_checkpoint.ckpt")["global_step"] == 4
    assert "recovery_checkpoint.ckpt.nonfinite" in ckpts(tmp_path)


class SavesByHand(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("plugins", [None, [AsyncCheckpointIO()]], ids=["plain", "async"])
def test_what_is_saved_by_hand_does_not_replace_the_good_one(plugins: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.ckpt"
    with pytest.warns(
        UserWarning, match=r"layer\.weight, .* in the checkpoint for .*mine\.ckpt\. It is saved aside as"
    ):
        quiet_trainer(tmp_path, CheckpointGuard(), Loses(4), SavesByHand(path), plugins=plugins, max_epochs=1).fit(
            TinyModule()
        )
    assert ckpts(tmp_path) == ["mine.ckpt", "mine.ckpt.nonfinite"]
    assert torch.load(path)["global_step"] in (3, 4)
    assert torch.isfinite(torch.load(path)["state_dict"]["layer.weight"]).all()
    assert verify_checkpoint(tmp_path / "mine.ckpt.nonfinite").facts.progress.global_step == BATCHES


def test_moments_alone_keep_what_is_saved_by_hand_from_replacing_the_good_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.ckpt"
    trainer = quiet_trainer(tmp_path, CheckpointGuard(), Loses(4, moment=True), SavesByHand(path), max_steps=4)
    with pytest.warns(UserWarning, match="exp_avg_sq of parameter 0 in optimizer 0 is not finite in the checkpoint"):
        trainer.fit(TinyModule())
    assert torch.load(path)["global_step"] == 3
    assert torch.load(f"{path}.nonfinite")["global_step"] == 4


def test_nothing_takes_what_was_set_aside(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no checkpoint stands yet"):
        quiet_trainer(tmp_path, CheckpointGuard(), Loses(1), every_step(tmp_path), max_epochs=1).fit(TinyModule())
    assert ckpts(tmp_path) == ["step=1.ckpt.nonfinite"]
    assert list(find_checkpoints(tmp_path)) == []
    assert find_last_good(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"step=1\.ckpt\.nonfinite was set aside"):
        choose_newest([tmp_path], lambda path: verify_checkpoint(path))


class Mask(TinyModule):
    """With the infinities that healthy models hold: a mask, a best metric, a frozen and a trained parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2,), -INF))
        self.register_buffer("best", torch.tensor(NAN))
        self.frozen = torch.nn.Parameter(torch.full((2,), INF), requires_grad=False)
        self.barrier = torch.nn.Parameter(torch.tensor([0.0, -INF]))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = super().training_step(batch) + self.barrier[0].square()
        return loss


class Records(TinyModule):
    """Keeps its largest loss in a frozen parameter, and leaves one parameter unused."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
        self.unused = torch.nn.Parameter(torch.zeros(2))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.largest.fill_(INF if self.losses else 0.0)
        return super().training_step(batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"]["unused"]


class Odd(torch.optim.AdamW):
    """Keeps more than moments, as an optimizer of the user's own may."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for state in [s for s in self.state.values() if isinstance(s, dict)]:
            state.update(best=torch.tensor(INF), sum=INF, prev=None)
        self.state["calls"] = 1
        return loss


class Odder(Records):
    def configure_optimizers(self) -> Any:
        return Odd(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("module", [Records, Odder])
def test_infinities_that_are_neither_weights_nor_moments_are_no_alarm(module: type[Records], tmp_path: Path) -> None:
    trained, path = module(), tmp_path / "mine.ckpt"
    said = fit(tmp_path, trained, every_step(tmp_path), SavesByHand(path), max_epochs=1)
    assert [s for s in said if "not finite" in s] == []
    assert ckpts(tmp_path) == ["mine.ckpt", *(f"step={n}.ckpt" for n in range(1, BATCHES + 1))]
    kept = torch.load(path)["optimizer_states"][0]["state"]
    assert [key for key in kept if key != "calls"] == [2, 3], "looking at them makes no state"


def test_each_run_of_bad_saves_is_saved_once_and_the_last_one_kept(tmp_path: Path) -> None:
    saves = every_step(tmp_path)
    with pytest.warns(UserWarning, match="not finite") as said:
        quiet_trainer(tmp_path, CheckpointGuard(), Healed(), Loses(2), Loses(4), saves, max_epochs=1).fit(TinyModule())
    assert len([w for w in said if "is saved aside" in str(w.message)]) == 2
    assert ckpts(tmp_path) == ["step=1.ckpt", "step=3.ckpt", "step=4.ckpt.nonfinite", "step=5.ckpt"]


def test_what_is_saved_aside_under_the_same_name_stays(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="c", every_n_train_steps=1, enable_version_counter=False)
    with pytest.warns(UserWarning, match="not finite"):
        quiet_trainer(tmp_path, CheckpointGuard(), Healed(), Loses(2), Loses(4), saves, max_epochs=1).fit(TinyModule())
    assert ckpts(tmp_path) == ["c.ckpt", "c.ckpt.nonfinite"]
    assert torch.load(tmp_path / "c.ckpt.nonfinite")["global_step"] == 4


def test_what_a_callback_saved_is_not_replaced_by_hand(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, filename="c", every_n_train_steps=1, enable_version_counter=False)
    by_hand = SavesByHand(tmp_path / "c.ckpt")
    with pytest.warns(UserWarning, match="not finite"):
        quiet_trainer(tmp_path, CheckpointGuard(), Loses(4), by_hand, saves, max_epochs=1).fit(TinyModule())
    assert torch.load(tmp_path / "c.ckpt")["global_step"] == 3


def test_a_guard_that_saw_a_bad_run_saves_the_next_one(tmp_path: Path) -> None:
    guard = CheckpointGuard()
    for folder, others in ((tmp_path / "bad", [Loses(1)]), (tmp_path / "good", [])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(folder, guard, *others, every_step(folder), max_steps=1).fit(TinyModule())
    assert ckpts(tmp_path / "bad") == ["step=1.ckpt.nonfinite"]
    assert ckpts(tmp_path / "good") == ["step=1.ckpt"]


class Mine(Checkpoint):
    """Has methods that are called as those of ModelCheckpoint are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._save_last_checkpoint = print

    def _save_checkpoint(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save_checkpoint(trainer)


def test_a_callback_of_another_kind_is_left_as_it_is(tmp_path: Path) -> None:
    mine = Mine(tmp_path / "c.ckpt")
    with pytest.warns(UserWarning, match="not finite in the checkpoint for"):
        quiet_trainer(tmp_path, CheckpointGuard(), Loses(4), mine, max_epochs=1, enable_checkpointing=True).fit(
            TinyModule()
        )
    assert ckpts(tmp_path) == ["c.ckpt", "c.ckpt.nonfinite"]
    assert vars(mine)["_save_last_checkpoint"] is print


def test_infinities_that_a_model_holds_from_the_start_are_no_alarm(tmp_path: Path) -> None:
    assert fit(tmp_path, Mask(), every_step(tmp_path)) == []
    assert len(ckpts(tmp_path)) == 3 * BATCHES


def test_callbacks_are_as_they_were_afterwards(tmp_path: Path) -> None:
    saves = every_step(tmp_path)
    fit(tmp_path, TinyModule(), saves)
    assert not [name for name in vars(saves) if name.startswith("_save_") and callable(vars(saves)[name])]


class Copies(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.copy = copy.deepcopy(trainer.checkpoint_callback)


def test_a_callback_can_be_copied_while_it_is_watched(tmp_path: Path) -> None:
    saves, copies = every_step(tmp_path), Copies()
    fit(tmp_path, TinyModule(), saves, copies, Loses(14))
    other = tmp_path / "other"
    assert isinstance(copies.copy, ModelCheckpoint)
    copies.copy.dirpath = str(other)
    copies.copy._last_global_step_saved = 0
    quiet_trainer(other, copies.copy).fit(TinyModule())
    assert (other / "step=15.ckpt").exists()
    assert Path(saves.best_model_path).parent == tmp_path


def test_every_kind_of_tensor_is_looked_at() -> None:
    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    good = {str(k): torch.full((3,), 6e4, dtype=k) for k in kinds}  # its norm is more than a half can hold
    others = {
        "long": torch.tensor([1]),
        "empty": torch.empty(0),
        "meta": torch.empty(2, device="meta"),
        "large": torch.full((4,), 3e38),
        "sparse": torch.eye(2).to_sparse(),
    }
    assert nonfinite_among({**good, **others}) == []
    bad = {f"bad {k}": torch.tensor([1.0, v], dtype=k) for k in kinds for v in (NAN, -INF)}
    assert nonfinite_among({**good, **bad, **others}) == list(bad)
    assert nonfinite_among({"sparse": torch.tensor([[0.0, NAN]]).to_sparse()}) == ["sparse"]
