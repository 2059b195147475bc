"""Losses and gradients that are not finite: noticed in the step in which they come up, said once, cheaply.

On the CPU each step's gradients are looked at, or every few steps' where that would take more than 0.4 % of the
time, as with large models and tiny batches. On an accelerator the flags are kept on the device, for looking at them
would make the CPU wait for it: they are looked at every `log_every_n_steps` batches, before each save and at an epoch's
end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from enstack_lightning.checkpoint.mappings import is_mapping
from enstack_lightning.errors import CheckpointGuardError
from enstack_lightning.guard.flavor import rank_zero_warn
from enstack_lightning.guard.ranks import on_any_rank

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

OnNonfinite = Literal["warn", "raise", "ignore"]

_MOST_NAMES = 5
_MOST_WATCHES = 8
_NONE = -1
_HALVES = {torch.float16, torch.bfloat16}
_FLOATS = {torch.float32, torch.float64, *_HALVES}
_CHEAP_SECONDS = 2e-4
_SHARE = 0.004


class NonfiniteWatch:
    """Watches losses and gradients of a fit.

    With "raise" on the CPU the run ends before an optimizer applies the gradients: the weights stay as they were. On an
    accelerator it ends at the next look, and the weights may be lost by then; what is saved is checked all the same.

    Under a `GradScaler` gradients are not looked at: it skips steps on its own when they overflow, as it is meant to.

    Args:
        action: "warn" says the first of a run of bad steps; "raise" ends the run; "ignore" does nothing.
    """

    def __init__(self, action: OnNonfinite) -> None:
        self.action = action
        self.start()

    def start(self) -> None:
        """To be called when training starts: nothing has been seen yet."""
        self._in_bad_run = False
        self._batches_since_look = 0
        self._judged = False
        self._looks: dict[int, tuple[float, float]] = {}
        self._loss: _OnDevice | None = None
        self._gradients: list[_OnDevice] = []
        self._bad_loss: str | None = None
        self._bad_gradients: dict[str, None] = {}
        self._step: int | None = None

    def loss(self, trainer: Trainer, loss: Tensor) -> None:
        """To be called with each loss, before its backward pass."""
        # A scaled loss may overflow where the loss itself does not; `batch_end` sees the latter.
        if self.action != "ignore" and not _has_scaler(trainer):
            self._see_loss(trainer, loss)

    def gradients(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """To be called when an optimizer is about to step."""
        if self.action == "ignore" or _has_scaler(trainer) or not self._is_worth_it(optimizer):
            return
        began = time.perf_counter()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [_plain(p.grad) for p in parameters]
        if not grads:
            return
        self._judged = True
        norms = gradient_norms(grads)
        if _is_at_hand(norms):
            if not torch.isfinite(norms.sum()):
                bad = (~torch.isfinite(norms)).tolist()
                self._note(trainer)
                names = names_of(module, [p for p, is_bad in zip(parameters, bad, strict=True) if is_bad])
                self._bad_gradients |= dict.fromkeys(names or ["their sum, which overflows"])
            self._looks[id(optimizer)] = began, time.perf_counter() - began
            if self.action == "raise":
                self._raise_if_bad(trainer)
        else:
            self._watch_of(trainer, module, parameters, norms.device).note(~torch.isfinite(norms), trainer.global_step)

    def _is_worth_it(self, optimizer: Optimizer) -> bool:
        """Whether to look at the gradients of this step; always where the loss is bad or the run is to end in time."""
        now = time.perf_counter()
        looked_at, cost = self._looks.get(id(optimizer), (0.0, 0.0))
        must = self.action == "raise" or self._bad_loss is not None or cost < _CHEAP_SECONDS
        return must or cost <= _SHARE * (now - looked_at)

    def batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any) -> None:
        """To be called at the end of each training batch."""
        if self.action == "ignore":
            return
        if _has_scaler(trainer) and is_mapping(outputs) and isinstance(outputs.get("loss"), Tensor):
            self._see_loss(trainer, outputs["loss"])
        self._batches_since_look += 1
        on_device = self._loss is not None or bool(self._gradients)
        if not on_device or self._batches_since_look >= (getattr(trainer, "log_every_n_steps", 0) or 50):
            self.look(trainer, module)

    def look(self, trainer: Trainer, module: LightningModule) -> None:
        """Looks at what the devices hold, and says or raises what came up since the last look.

        Raises:
            CheckpointGuardError: something did, and `action` is "raise".
        """
        self._batches_since_look = 0
        judged, self._judged = self._judged, False
        for watch in self._gradients:
            step, which = watch.first()
            if step != _NONE:
                self._step = step if self._step is None else min(self._step, step)
                names = names_of(module, [watch.parameters[i] for i in which])
                self._bad_gradients |= dict.fromkeys(names)
        if self._loss is not None and (step := self._loss.first()[0]) != _NONE:
            self._step = step if self._step is None else min(self._step, step)
            self._bad_loss = "not finite"
        self._gradients, self._loss = [], None
        if self.action == "raise":
            self._raise_if_bad(trainer)
        elif not self._is_bad():
            self._in_bad_run &= not judged
        else:
            if not self._in_bad_run:
                rank_zero_warn(f"{self._said(trainer)} Bad steps that follow it are not reported one by one.")
            self._in_bad_run = True
            self._forget()

    def _see_loss(self, trainer: Trainer, loss: Tensor) -> None:
        self._judged = True
        finite = torch.isfinite(loss.detach()).all()
        if _is_at_hand(finite):
            if not finite:
                self._note(trainer)
                self._bad_loss = str(float(loss.detach().sum()))
        else:
            if self._loss is None:
                self._loss = _OnDevice([], 1, finite.device)
            self._loss.note(~finite, trainer.global_step)

    def _watch_of(
        self, trainer: Trainer, module: LightningModule, parameters: Sequence[Tensor], device: torch.device
    ) -> _OnDevice:
        """The flags of these parameters; those that have a gradient may change from step to step."""
        for watch in self._gradients:
            if len(watch.parameters) == len(parameters) and all(map(is_, watch.parameters, parameters)):
                return watch
        if len(self._gradients) >= _MOST_WATCHES:
            self.look(trainer, module)
        self._gradients.append(_OnDevice(parameters, len(parameters), device))
        return self._gradients[-1]

    def _note(self, trainer: Trainer) -> None:
        if self._step is None:
            self._step = trainer.global_step

    def _is_bad(self) -> bool:
        return self._bad_loss is not None or bool(self._bad_gradients)

    def _forget(self) -> None:
        self._bad_loss, self._step = None, None
        self._bad_gradients = {}

    def _raise_if_bad(self, trainer: Trainer) -> None:
        if on_any_rank(trainer, self._is_bad()):  # one rank alone must not leave the others waiting
            said = self._said(trainer)
            self._forget()
            raise CheckpointGuardError(said)

    def _said(self, trainer: Trainer) -> str:
        what = []
        if self._bad_loss is not None:
            what.append(f"the loss is {self._bad_loss}")
        if self._bad_gradients:
            what.append(f"the gradient norm is not finite for {listed(list(self._bad_gradients))}")
        when = "" if self._step is None else f" in step {self._step + 1:,} (epoch {trainer.current_epoch})"
        return (
            f"CheckpointGuard: {' and '.join(what) or 'loss or gradients of another rank are not finite'}{when}. "
            "Look at the learning rate and at that step's data; Trainer(detect_anomaly=True) names the operation."
        )


@dataclass
class _OnDevice:
    """For each of some values the step in which it was first not finite, on their device."""

    parameters: Sequence[Tensor]
    count: int
    device: torch.device

    def __post_init__(self) -> None:
        self.steps = torch.full((self.count,), _NONE, device=self.device)

    def note(self, is_bad: Tensor, step: int) -> None:
        self.steps = torch.where(is_bad & (self.steps == _NONE), step, self.steps)

    def first(self) -> tuple[int, list[int]]:
        """The first bad step and which values were bad in it; waits for the device."""
        steps: list[int] = self.steps.tolist()
        first = min((step for step in steps if step != _NONE), default=_NONE)
        return first, [i for i, step in enumerate(steps) if step == first and first != _NONE]


@torch.no_grad()
def gradient_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each tensor, on one device; an element that is not finite makes its tensor's norm so."""
    dtypes = {t.dtype for t in tensors}
    narrow = not dtypes.isdisjoint(_HALVES)
    if narrow and dtypes <= _HALVES:
        norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    else:
        norms = torch._foreach_norm([t.float() for t in tensors] if narrow else list(tensors), 2)
    try:
        return torch.stack(norms)
    except RuntimeError:  # they are on several devices
        return torch.stack([norm.to(norms[0].device) for norm in norms])


def nonfinite_among(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity; one pass over the data, and one wait a device.

    What this torch cannot compute with (quantised, on the meta device, of an exotic type) counts as finite.

    Example:
        >>> nonfinite_among({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])})
        ['b']
    """
    by_device: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.dtype in _FLOATS and tensor.numel():
            plain = _plain(tensor)
            by_device.setdefault((plain.device, plain.dtype), {})[name] = plain
    bad: set[str] = set()
    for group in by_device.values():
        try:
            norms = gradient_norms(list(group.values()))
            if not torch.isfinite(norms.sum()):
                # A norm overflows before its elements do.
                pairs = zip(group.items(), norms.tolist(), strict=True)
                suspects = [pair for pair, norm in pairs if not math.isfinite(norm)]
                bad.update(name for name, tensor in suspects if not torch.isfinite(tensor).all())
        except (RuntimeError, TypeError, NotImplementedError):
            continue
    return [name for name in tensors if name in bad]


def names_of(module: torch.nn.Module, parameters: Iterable[Tensor]) -> list[str]:
    """What the module calls these parameters, in its own order; those that are not its own come last, by number."""
    wanted = {id(p) for p in parameters}
    found = {id(p): name for name, p in module.named_parameters() if id(p) in wanted}
    strangers = len(wanted) - len(found)
    return [*found.values(), *(f"parameter {i} outside the module" for i in range(1, strangers + 1))]


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _is_at_hand(tensor: Tensor) -> bool:
    """Whether a tensor can be looked at without waiting for a device."""
    return tensor.is_cpu


def _has_scaler(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _plain(tensor: Any) -> Tensor:
    """This rank's own dense numbers, of a sharded or a sparse tensor."""
    if type(tensor) is Tensor and not tensor.is_sparse:
        return tensor
    local: Tensor = tensor.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    return local._values() if local.is_sparse else local
