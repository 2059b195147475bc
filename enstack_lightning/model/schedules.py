"""Learning-rate schedules: a warm-up from zero, then a linear or cosine way down to zero.

What comes in is a step number, what goes out is the factor by which the peak learning rate is multiplied. The
factors are those of `transformers.get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup`, so that
published fine-tuning recipes keep their meaning.
"""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["linear", "cosine"]


def warmup_steps(total_steps: int, warmup_fraction: float) -> int:
    """Number of optimizer steps that warm up, rounded down.

    Example:
        >>> warmup_steps(total_steps=1_270, warmup_fraction=0.1)
        127
    """
    return int(warmup_fraction * total_steps)


def lr_factor(step: int, total_steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Factor in [0, 1] on the peak learning rate of optimizer step `step`.

    The first step under warm-up has factor 0, as in transformers. Steps after `total_steps` have factor 0.

    Args:
        step: Optimizer steps already made, 0 or more.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Steps of the linear way up from 0.
        schedule: Shape of the way down, `linear` or half a `cosine` wave.

    Example:
        >>> [lr_factor(step, total_steps=6, warmup_steps=2, schedule="linear") for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if step >= total_steps:
        return 0.0  # transformers' cosine would climb again here
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_schedule(optimizer: Optimizer, total_steps: int, warmup_steps: int, schedule: Schedule) -> LambdaLR:
    """LambdaLR that multiplies the optimizer's learning rates by `lr_factor`.

    The factor is a plain function on purpose: LambdaLR would save a callable object's attributes, and a resumed run
    with more epochs would then quietly keep the old run's length.
    """

    def factor(step: int) -> float:
        return lr_factor(step, total_steps, warmup_steps, schedule)

    return LambdaLR(optimizer, factor)
