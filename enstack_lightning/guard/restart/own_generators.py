"""Generators of random numbers that loaders, samplers and data sets keep for themselves, under whatever name.

The global ones are saved with every checkpoint (`rng`). A sampler that shuffles with `self.rng` draws from none of
them: after a resume its generator would begin anew, and every epoch's order be another one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from enstack_lightning.guard.restart.held_values import of_kind
from enstack_lightning.guard.restart.rng import as_text, from_text, python_state_as_text, python_state_from_text

_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_INNER = ("dataset", "datasets", "transform", "target_transform", "transforms", "_sampler")
"""Attributes in which a data set keeps others: subsets, parts put together, transforms, and Lightning's wrapper of a
sampler."""
_DEEPEST = 4


def generators_of(loader: Any) -> Iterator[tuple[str, Any]]:
    """The generators that a loader and its samplers own, by place.

    The place of an attribute `generator` is its owner's alone; the loader's own is "".
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler, inner = getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)
    owners = {"": loader, "sampler": sampler, "batch_sampler": batch_sampler, "batch_sampler.sampler": inner}
    for name, owner in owners.items():
        if _is_generator(generator := getattr(owner, "generator", None)):
            yield name, generator
        for attribute, value in _attributes(owner).items():
            if attribute != "generator" and _is_generator(value):
                yield f"{name}.{attribute}", value
    for name in ("sampler", "batch_sampler.sampler"):
        wrapped = getattr(getattr(owners[name], "dataset", None), "_sampler", None)  # a DistributedSamplerWrapper's
        if wrapped is not None:
            yield from ((f"{name}.wrapped.{place}", generator) for place, generator in generators_in(wrapped))


def generators_in(owner: Any, deepest: int = _DEEPEST) -> Iterator[tuple[str, Any]]:
    """The generators in a data set's or sampler's attributes, and in those of what it is made of, by place."""
    attributes = _attributes(owner)
    yield from ((name, value) for name, value in attributes.items() if _is_generator(value))
    if deepest == 0:
        return
    for name in _INNER:
        inner = attributes.get(name)
        for number, part in enumerate(inner if isinstance(inner, list | tuple) else [inner]):
            if part is not None and not _is_generator(part):
                yield from ((f"{name}.{number}.{place}", value) for place, value in generators_in(part, deepest - 1))


def _is_generator(value: Any) -> bool:
    return of_kind(value, *_KINDS) and not isinstance(value, random.SystemRandom)  # which has no state


def _attributes(owner: Any) -> dict[str, Any]:
    try:
        return dict(vars(owner))
    except TypeError:  # of a class with slots, a list, or None
        return {}


def state_of(generator: Any) -> Any:
    """A generator's state, as a tensor for torch's and as plain values for others."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return python_state_as_text(generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return as_text(generator.get_state(legacy=False))
    return as_text(generator.bit_generator.state)


def set_state(generator: Any, state: Any) -> None:
    """Sets a generator to what `state_of` returned for one of its kind."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state.cpu())
    elif isinstance(generator, random.Random):
        generator.setstate(python_state_from_text(state))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(from_text(state))
    else:
        generator.bit_generator.state = from_text(state)
