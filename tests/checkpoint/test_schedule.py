"""The closed forms agree with torch's own schedulers, stepped for real; what has none is left alone."""

from __future__ import annotations

import io
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
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
from torch.optim.swa_utils import SWALR

from enstack_lightning.checkpoint.readers.states import optimizer_of
from enstack_lightning.checkpoint.schedule import NEXT_RATES, ScheduleFacts, describe, kind_of

Make = Callable[[Optimizer, random.Random], LRScheduler]


def linear(o: Optimizer, r: random.Random) -> LRScheduler:
    return LinearLR(o, r.uniform(0.01, 1), r.uniform(0, 1), r.randint(1, 12))


def step(o: Optimizer, r: random.Random) -> LRScheduler:
    return StepLR(o, r.randint(1, 9), r.uniform(0.1, 1.1))


def multi_step(o: Optimizer, r: random.Random) -> LRScheduler:
    return MultiStepLR(o, [r.randint(0, 25) for _ in range(r.randint(0, 6))], r.uniform(0.1, 1.1))


def constant(o: Optimizer, r: random.Random) -> LRScheduler:
    return ConstantLR(o, r.uniform(0.01, 1), r.randint(1, 12))


def exponential(o: Optimizer, r: random.Random) -> LRScheduler:
    return ExponentialLR(o, r.uniform(0.8, 1.02))


def polynomial(o: Optimizer, r: random.Random) -> LRScheduler:
    return PolynomialLR(o, r.randint(1, 40), r.uniform(0.5, 3))


def cosine(o: Optimizer, r: random.Random) -> LRScheduler:
    return CosineAnnealingLR(o, r.randint(1, 30), r.choice([0.0, 1e-3]))


def restarts(o: Optimizer, r: random.Random) -> LRScheduler:
    return CosineAnnealingWarmRestarts(o, r.randint(1, 9), r.randint(1, 3), r.choice([0.0, 1e-3]))


def one_cycle(o: Optimizer, r: random.Random) -> LRScheduler:
    return OneCycleLR(
        o,
        [0.3, 0.1],
        total_steps=r.randint(45, 60),
        pct_start=r.uniform(0.1, 0.4),
        anneal_strategy=r.choice(["cos", "linear"]),
        three_phase=r.random() < 0.5,
        cycle_momentum=r.random() < 0.5,
    )


def cyclic(o: Optimizer, r: random.Random) -> LRScheduler:
    return CyclicLR(
        o,
        [0.01, 0.02],
        [0.1, 0.3],
        step_size_up=r.randint(1, 9),
        step_size_down=r.choice([None, r.randint(1, 9)]),
        mode=r.choice(["triangular", "triangular2", "exp_range"]),
        gamma=r.uniform(0.9, 1),
        cycle_momentum=r.random() < 0.5,
    )


def sequential(o: Optimizer, r: random.Random) -> LRScheduler:
    first, second = r.randint(0, 9), r.randint(10, 20)
    parts = [r.choice([linear, constant])(o, r), r.choice([cosine, step, exponential])(o, r), polynomial(o, r)]
    return SequentialLR(o, parts, [first, second])


def chained(o: Optimizer, r: random.Random) -> LRScheduler:
    return ChainedScheduler([linear(o, r), r.choice([exponential, step, multi_step, polynomial])(o, r), constant(o, r)])


KNOWN: dict[str, Make] = {
    "StepLR": step,
    "MultiStepLR": multi_step,
    "ConstantLR": constant,
    "LinearLR": linear,
    "ExponentialLR": exponential,
    "PolynomialLR": polynomial,
    "CosineAnnealingLR": cosine,
    "CosineAnnealingWarmRestarts": restarts,
    "OneCycleLR": one_cycle,
    "CyclicLR": cyclic,
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
}
STEPS = 40


def two_groups(kind: type[Optimizer] = SGD) -> Optimizer:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    options = {"momentum": 0.9} if kind is SGD else {}
    return kind([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.2}], lr=0.1, **options)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def described(scheduler: LRScheduler, optimizer: Optimizer) -> ScheduleFacts:
    groups = optimizer_of(optimizer.state_dict(), lambda tensor: None).groups
    return describe(saved(scheduler.state_dict()), groups)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", KNOWN)
def test_every_rate_of_a_stepped_scheduler_is_foretold(kind: str, seed: int) -> None:
    r = random.Random(f"{kind} {seed}")
    optimizer = two_groups(r.choice([SGD, AdamW]))
    scheduler = KNOWN[kind](optimizer, r)
    facts, rates = [], []
    for _ in range(STEPS):
        facts.append(described(scheduler, optimizer))
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    for t, fact in enumerate(facts):
        assert fact.kind == kind
        assert fact.own_lr == pytest.approx(rates[t], rel=1e-6, abs=1e-9), t
        coming = [rate[0] for rate in rates[t + 1 : t + 1 + NEXT_RATES]]
        assert fact.next_lrs[: len(coming)] == pytest.approx(coming, rel=1e-6, abs=1e-9), t
        for at, rate in fact.curve:
            if at < STEPS:
                assert rate == pytest.approx(rates[at][0], rel=1e-6, abs=1e-9), (t, at)
        assert fact.curve[0][0] == 0
        assert t in dict(fact.curve)


def test_a_cycle_says_no_rates_beyond_its_end() -> None:
    optimizer = two_groups()
    scheduler = OneCycleLR(optimizer, 0.3, total_steps=8)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    assert len(described(scheduler, optimizer).next_lrs) == 2  # the steps 7 and 8; torch refuses the next


UNFORETOLD: dict[str, tuple[str | None, Callable[[Optimizer], Any]]] = {
    "LambdaLR": (None, lambda o: LambdaLR(o, lambda t: 0.9**t)),
    "MultiplicativeLR": (None, lambda o: MultiplicativeLR(o, lambda t: 0.9)),
    "ReduceLROnPlateau": ("ReduceLROnPlateau", lambda o: ReduceLROnPlateau(o, patience=1)),
    "SWALR": ("SWALR", lambda o: SWALR(o, 0.05)),
    "CyclicLR of a function": ("CyclicLR", lambda o: CyclicLR(o, 0.1, 0.3, 4, scale_fn=lambda x: 0.3)),
    "a chain with a cosine": ("ChainedScheduler", lambda o: ChainedScheduler([ConstantLR(o), CosineAnnealingLR(o, 9)])),
    "a sequence with a function": (
        "SequentialLR",
        lambda o: SequentialLR(o, [LinearLR(o), LambdaLR(o, lambda t: 0.5)], [3]),
    ),
}


@pytest.mark.parametrize("name", UNFORETOLD)
def test_a_schedule_that_the_state_does_not_hold_is_not_foretold(name: str) -> None:
    kind, make = UNFORETOLD[name]
    optimizer = two_groups()
    scheduler = make(optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
    assert described(scheduler, optimizer) == ScheduleFacts(kind)


def test_a_rate_set_by_hand_ends_the_foretelling_and_shows() -> None:
    optimizer = two_groups()
    scheduler = StepLR(optimizer, 1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.07
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.step()
    facts = described(scheduler, optimizer)
    assert facts.next_lrs == ()
    assert facts.own_lr[0] == pytest.approx(0.01)
    assert scheduler.get_last_lr()[0] == pytest.approx(0.007)


def test_a_state_of_an_older_torch_is_told_all_the_same() -> None:
    optimizer = two_groups()
    state = CosineAnnealingLR(optimizer, 9).state_dict()
    del state["_is_initial"]
    assert kind_of({**state, "verbose": False}) == "CosineAnnealingLR"
    assert kind_of({**state, "warmup_epochs": 3}) is None


HOSTILE: list[dict[str, Any]] = [
    {"step_size": 0, "gamma": 0.1},
    {"step_size": True, "gamma": 0.1},
    {"step_size": 1, "gamma": 10**400},
    {"step_size": 1, "gamma": 2**40},
    {"step_size": 1, "gamma": math.nan},
    {"gamma": "x"},
    {"T_max": 0, "eta_min": 0.0},
    {"T_max": 2**70, "eta_min": 0.0},
    {"T_0": 2**62, "T_i": 1, "T_mult": 2**62, "eta_min": 0, "T_cur": 0},
    {"T_0": 1, "T_i": 0, "T_mult": 1, "eta_min": 0, "T_cur": 0.5},
    {"T_0": 1, "T_i": 1, "T_mult": 1, "eta_min": None, "T_cur": math.inf},
    {"T_0": 1, "T_i": 1, "T_mult": 1, "eta_min": 0, "T_cur": "half"},
    {"milestones": {3: 10**18}, "gamma": 1.5},
    {"milestones": [3], "gamma": 0.1},
    {"total_iters": 5, "power": -1e300},
    {"start_factor": 1e308, "end_factor": -1e308, "total_iters": 1},
    {"_milestones": [5, 3], "_schedulers": [{}, {}, {}]},
    {"_milestones": [], "_schedulers": []},
    {"_schedulers": [[], None]},
    {"total_steps": 9, "_schedule_phases": [{"end_step": 1}], "cycle_momentum": False},
    {"max_lrs": [1], "total_size": 0, "step_ratio": 0.5, "scale_mode": "cycle", "mode": "triangular", "gamma": 1},
    {"max_lrs": [1], "total_size": 4.0, "step_ratio": 1.0, "scale_mode": "cycle", "mode": [], "gamma": 1},
]


@pytest.mark.parametrize("position", [0, 3, 10**6, 2**62, -1, None, True, "3"])
@pytest.mark.parametrize("own", HOSTILE, ids=repr)
def test_a_state_that_makes_no_sense_neither_raises_nor_hangs(own: dict[str, Any], position: Any) -> None:
    facts = describe({"base_lrs": [0.1], "last_epoch": position, "_last_lr": [0.1], **own}, [])
    assert all(math.isfinite(rate) for _, rate in facts.curve)
    assert len(facts.curve) < 300
