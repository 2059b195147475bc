"""A fast-forwarded scheduler is the one that was stepped so often, bit for bit, and costs no more than a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from enstack_lightning.guard.loading import fast_forward as module
from enstack_lightning.guard.loading.fast_forward import CannotForwardError, at_its_position, fast_forward, position_of

Make = Callable[[Optimizer], Any]

SCHEDULES: dict[str, Make] = {
    "LambdaLR": lambda o: LambdaLR(o, [lambda t: 1 / (t + 1), lambda t: 0.99**t]),
    "MultiplicativeLR": lambda o: MultiplicativeLR(o, lambda t: 0.99 + t % 3 * 0.004),
    "StepLR": lambda o: StepLR(o, 7, 0.9),
    "MultiStepLR": lambda o: MultiStepLR(o, [3, 8, 8, 20, 5_000], 0.5),
    "ConstantLR": lambda o: ConstantLR(o, 0.3, 13),
    "LinearLR": lambda o: LinearLR(o, 0.01, 0.7, 50),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.999),
    "PolynomialLR": lambda o: PolynomialLR(o, 60, 2.0),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 30, 1e-4),
    "OneCycleLR": lambda o: OneCycleLR(o, [0.1, 0.2], 1_000),
    "OneCycleLR, three phases": lambda o: OneCycleLR(o, 0.1, 1_000, three_phase=True, anneal_strategy="linear"),
    "CyclicLR": lambda o: CyclicLR(o, 0.01, 0.1, 7, mode="exp_range", gamma=0.999),
    "CyclicLR, own scale": lambda o: CyclicLR(o, 0.01, 0.1, 7, scale_fn=lambda c: 1 / c, scale_mode="cycle"),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 5, 2),
    "CosineAnnealingWarmRestarts, even": lambda o: CosineAnnealingWarmRestarts(o, 5, 1, 1e-5),
    "SequentialLR": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=10), CosineAnnealingLR(o, 100), StepLR(o, 3)], [10, 50]
    ),
    "SequentialLR, direct parts": lambda o: SequentialLR(
        o, [ConstantLR(o, 0.1, 5), LambdaLR(o, lambda t: 1 / (t + 1)), CosineAnnealingWarmRestarts(o, 4)], [3, 9]
    ),
    "ChainedScheduler": lambda o: ChainedScheduler([LinearLR(o, 0.1, total_iters=10), ExponentialLR(o, 0.99)]),
    "SequentialLR of a chain": lambda o: SequentialLR(
        o, [ChainedScheduler([ConstantLR(o), ExponentialLR(o, 0.99)]), CosineAnnealingLR(o, 50)], [20]
    ),
}
BY_STEPS_ONLY = ("MultiplicativeLR", "ChainedScheduler")
POSITIONS = (1, 2, 3, 5, 7, 9, 10, 11, 14, 20, 21, 30, 31, 50, 51, 61, 333, 999)


def optimizer_of_two() -> Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.05)]
    return AdamW(groups)


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def stepped(make: Make, steps: int) -> tuple[Any, Optimizer]:
    optimizer = optimizer_of_two()
    scheduler = make(optimizer)
    optimizer.step()
    for _ in range(steps):
        scheduler.step()
    return scheduler, optimizer


def shown(scheduler: Any) -> str:
    """Its state to the last bit, without the addresses of functions and optimizers."""
    return repr({k: v for k, v in scheduler.state_dict().items() if k not in ("_scale_fn_custom", "_anneal_func_type")})


def check_the_same(forwarded: module.Forwarded, scheduler: Any, make: Make, optimizer: Optimizer) -> None:
    fresh = make(optimizer_of_two())
    fresh.load_state_dict(forwarded.state)
    assert shown(fresh) == shown(scheduler)
    for ours, its in zip(forwarded.groups, groups_of(optimizer), strict=True):
        assert ours == {name: its[name] for name in ours}


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_the_stepped_scheduler_bit_for_bit(name: str) -> None:
    for steps in POSITIONS:
        scheduler, optimizer = stepped(SCHEDULES[name], steps)
        forwarded = fast_forward(SCHEDULES[name](optimizer_of_two()), steps)
        assert forwarded.exact
        check_the_same(forwarded, scheduler, SCHEDULES[name], optimizer)


@pytest.mark.parametrize("name", SCHEDULES)
def test_scheduler_and_optimizer_are_not_touched(name: str) -> None:
    optimizer = optimizer_of_two()
    scheduler = SCHEDULES[name](optimizer)
    before = shown(scheduler), repr(groups_of(optimizer))
    fast_forward(scheduler, 21)
    at_its_position(scheduler)
    assert (shown(scheduler), repr(groups_of(optimizer))) == before


@pytest.mark.parametrize("name", SCHEDULES)
def test_beyond_the_limit_it_is_exact_or_close_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REPLAYED", 8)
    for steps in (9, 10, 14, 31, 51, 333):
        scheduler, optimizer = stepped(SCHEDULES[name], steps)
        if name in BY_STEPS_ONLY or (name == "SequentialLR of a chain"):
            with pytest.raises(CannotForwardError, match="no closed form"):
                fast_forward(SCHEDULES[name](optimizer_of_two()), steps)
            continue
        forwarded = fast_forward(SCHEDULES[name](optimizer_of_two()), steps)
        if forwarded.exact:
            check_the_same(forwarded, scheduler, SCHEDULES[name], optimizer)
        for rate, group in zip(forwarded.rates, optimizer.param_groups, strict=True):
            assert abs(rate - group["lr"]) <= 1e-12 * group["initial_lr"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_where_it_stands_is_told_where_it_follows_from_the_step(name: str) -> None:
    for steps in POSITIONS:
        scheduler, optimizer = stepped(SCHEDULES[name], steps)
        here = at_its_position(scheduler)
        if name in BY_STEPS_ONLY or (name == "SequentialLR of a chain" and steps < 20):
            assert here is None
            continue
        assert here is not None
        assert here.rates == pytest.approx([group["lr"] for group in optimizer.param_groups], rel=1e-9, abs=1e-15)


LONG: dict[str, Make] = {
    **SCHEDULES,
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, 10_000_000),
    "OneCycleLR, three phases": lambda o: OneCycleLR(o, 0.1, 10_000_000, three_phase=True),
    "LinearLR": lambda o: LinearLR(o, 0.01, 1.0, 10_000_000),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 10_000_000),
    "SequentialLR": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=90_000), CosineAnnealingLR(o, 10_000_000)], [90_000]
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_millions_of_steps_take_no_minutes(name: str) -> None:
    scheduler = LONG[name](optimizer_of_two())
    began = time.process_time()
    if name in BY_STEPS_ONLY:
        with pytest.raises(CannotForwardError, match=r"no closed form, and 5,000,000 steps"):
            fast_forward(scheduler, 5_000_000)
    else:
        fast_forward(scheduler, 5_000_000)
    assert time.process_time() - began < 5  # 0.4 s at most on an idle core


def test_a_rate_that_is_a_tensor_stays_one_and_is_not_written_to() -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        return StepLR(optimizer, 2, 0.5)

    optimizers = [AdamW([torch.nn.Parameter(torch.ones(1))], lr=torch.tensor(0.1)) for _ in range(2)]
    schedulers = [make(optimizer) for optimizer in optimizers]
    optimizers[0].step()
    for _ in range(5):
        schedulers[0].step()
    forwarded = fast_forward(schedulers[1], 5)
    assert torch.equal(forwarded.groups[0]["lr"], optimizers[0].param_groups[0]["lr"])
    assert float(optimizers[1].param_groups[0]["lr"]) == pytest.approx(0.1)


class Mine(StepLR):
    """Of a class of the user's own."""


class Counting:
    """A factor that falls with every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1 / self.calls


def stepped_by_hand(optimizer: Optimizer) -> LRScheduler:
    scheduler = StepLR(optimizer, 3)
    scheduler.step = lambda epoch=None: None  # type: ignore[method-assign]
    return scheduler


def raising(step: int) -> float:
    if step:
        raise RuntimeError("no factor")
    return 1.0


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda o: ReduceLROnPlateau(o), "depends on the metrics of the run"),
        (lambda o: Mine(o, 3), "Mine is none of torch's schedulers"),
        (lambda o: SequentialLR(o, [Mine(o, 3), StepLR(o, 3)], [5]), "Mine is none of torch's schedulers"),
        (stepped_by_hand, "StepLR is none of torch's schedulers"),
        (lambda o: OneCycleLR(o, 0.1, 10), "it cannot make 30 steps: Tried to step"),
        (lambda o: LambdaLR(o, Counting()), "keeps a state of its own"),
        (lambda o: LambdaLR(o, raising), "it cannot make 30 steps: no factor"),
    ],
)
def test_what_cannot_be_known_is_refused_with_a_reason(make: Make, why: str) -> None:
    with pytest.raises(CannotForwardError, match=why):
        fast_forward(make(optimizer_of_two()), 30)


def test_a_function_with_a_state_keeps_it_where_it_was() -> None:
    counting = Counting()
    scheduler = LambdaLR(optimizer_of_two(), counting)
    calls = counting.calls
    with pytest.raises(CannotForwardError):
        fast_forward(scheduler, 30)
    assert counting.calls == calls


def test_a_state_that_a_function_or_the_object_of_a_method_has_later_is_one_too() -> None:
    def counted(step: int) -> float:
        if step:
            vars(counted)["calls"] = vars(counted).get("calls", 0) + 1
        return 1 / (1 + vars(counted).get("calls", 0))

    counting = Counting()
    for function in (counted, counting.__call__):
        scheduler = LambdaLR(optimizer_of_two(), function)
        calls = counting.calls
        with pytest.raises(CannotForwardError, match="keeps a state of its own"):
            fast_forward(scheduler, 30)
        assert counting.calls == calls
    assert vars(counted) == {}


def test_a_function_that_only_holds_settings_is_asked() -> None:
    class Warmup:
        def __init__(self, steps: int) -> None:
            self.steps = steps

        def __call__(self, step: int) -> float:
            return min(1.0, step / self.steps)

    assert fast_forward(LambdaLR(optimizer_of_two(), Warmup(60)), 30).rates == (0.05, 0.025)


def test_positions_are_told_for_chains_too() -> None:
    for name, make in SCHEDULES.items():
        assert position_of(stepped(make, 3)[0]) == 3, name
