"""What is taken down of attributes beside a state_dict: whatever they are, at little cost, and as they are later."""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections import deque
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from enstack_lightning.guard.restart.held_values import differences, taken_down
from enstack_lightning.guard.restart.lost_by_others import _may_steer

NOTHING: dict[str, dict[str, Any]] = {"numbers": {}, "lengths": {}, "contents": {}}


class StandsForAnother:
    """As a proxy does, which has the other one loaded, or raises where there is none yet."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError("nothing is loaded")


class CannotBeAsked:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class WithoutModule:
    pass


WithoutModule.__module__ = None  # type: ignore[assignment]


class WithoutLength(list[int]):
    def __len__(self) -> int:
        raise RuntimeError("no length")


class WithoutEntries(dict[str, int]):
    def items(self) -> Any:
        raise RuntimeError("no entries")

    __len__ = __iter__ = items


class NoFloat(float):
    def __float__(self) -> float:
        raise RuntimeError("no float")


def test_what_cannot_be_looked_at_is_passed_over() -> None:
    for value in (StandsForAnother(), CannotBeAsked(), 10**5000):
        assert not list(differences(taken_down({"held": value}), {"held": value}, "self"))
        assert _may_steer("held", value)


def test_what_a_class_of_the_users_does_for_a_list_or_number_is_not_called() -> None:
    assert taken_down({"held": WithoutLength([1, 2])}) == taken_down({"held": [1, 2]})
    assert taken_down({"held": WithoutEntries(a=2)}) == taken_down({"held": {"a": 2}})
    assert taken_down({"held": NoFloat(2.5)}) == taken_down({"held": 2.5})
    assert _may_steer("held", WithoutModule())


def test_a_number_too_long_to_write_is_compared_with_what_it_was() -> None:
    then = taken_down({"held": 3})
    assert [said for _, said in differences(then, {"held": 10**5000}, "self")] == ["self.held was 3 and is a int"]


class Name(StrEnum):
    ONE = "one"


def test_attributes_that_are_set_by_names_of_another_kind_go_by_pythons_own() -> None:
    """A checkpoint that names another class than Python's own is not loaded again."""
    for name in (np.str_("one"), Name.ONE, 1):
        for value in (1, [2], "three"):
            then = taken_down({name: value})  # type: ignore[dict-item]
            assert {type(key) for kind in then.values() for key in kind} == {str}
            assert not list(differences(then, {name: value}, "self"))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("was", "now"), [({1}, {2}), (frozenset("a"), frozenset("b")), ({"a": [1]}, {"a": [2]}), (deque([1]), deque([2]))]
)
def test_what_is_held_inside_is_compared(was: Any, now: Any) -> None:
    said = [said for _, said in differences(taken_down({"held": was}), {"held": now}, "self")]
    assert said == ["self.held held other values"]


MANY = 200_000


def large() -> list[Any]:
    tree = [[[float(i + j + k) for k in range(30)] for j in range(30)] for i in range(200)]
    tensors = {str(i): torch.full((64, 64), float(i)) for i in range(200)}
    return [list(range(MANY)), deque(range(MANY)), dict.fromkeys(range(MANY), 0), tree, tensors]


@pytest.mark.parametrize("value", large(), ids=["list", "deque", "dict", "tree", "tensors"])
def test_the_work_for_a_large_value_is_bounded(value: Any) -> None:
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        taken_down({"held": value})
        _may_steer("held", value)
    finally:
        sys.setprofile(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert calls < 200_000
    assert peak < 1_000_000  # bytes: no copy of it is made


def test_what_changes_one_of_the_entries_of_each_row_is_seen() -> None:
    def rows(**others: int) -> list[dict[str, int]]:
        return [{"a": 0, "b": 0, "c": 0, "d": 0} | others for _ in range(MANY)]

    for name in "abcd":
        assert list(differences(taken_down({"held": rows()}), {"held": rows(**{name: 1})}, "self"))


@pytest.mark.parametrize("value", large(), ids=["list", "deque", "dict", "tree", "tensors"])
def test_what_changes_all_of_a_large_value_is_seen(value: Any) -> None:
    then = taken_down({"held": value})
    entries: Any = value if isinstance(value, dict) else range(len(value))
    for entry in entries:
        value[entry] = [[0.5]] if isinstance(value[entry], list) else value[entry] + 1
    assert [said for _, said in differences(then, {"held": value}, "self")] == ["self.held held other values"]


def test_tensors_are_compared_in_whatever_order_they_lie_in_memory() -> None:
    square = torch.arange(2.0**20).reshape(2**10, 2**10).T
    endless, other = (torch.tensor([0.0, second]).expand(2**40, 2) for second in (1.0, 2.0))  # a copy has no room
    for tensor, changed in ((square, square.T), (square[:, ::2], square.T[:, ::2]), (endless, other)):
        then = taken_down({"held": tensor})
        assert not list(differences(then, {"held": tensor}, "self"))
        assert list(differences(then, {"held": changed}, "self"))


def test_an_array_of_a_mapped_file_is_not_read_whatever_it_is_seen_through(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "rows", np.int64, "w+", shape=4)
    for array in (mapped, np.asarray(mapped), np.asarray(mapped)[1:]):
        assert taken_down({"held": array}) == NOTHING


def test_names_of_runs_are_not_compared_and_names_of_phases_are() -> None:
    for name in ("exp_20261129_1619", "a3f9c01b77e24d5d", "runs/one", "at 10:15", "a" * 200):
        assert taken_down({"held": name}) == NOTHING
    for name in ("warming", "phase_2", "warm-up", "fine tuning", "resnet152"):
        assert taken_down({"held": name})["contents"]


class Started:
    def __init__(self) -> None:
        self.at, self.steps = time.time(), 3


def test_times_are_not_compared_and_numbers_like_them_are() -> None:
    now = time.time()
    assert taken_down({"held": now}) == NOTHING
    assert taken_down({"held": np.float64(now)}) == NOTHING
    then = taken_down({"held": Started(), "times": [now]})
    time.sleep(0.001)
    assert not list(differences(then, {"held": Started(), "times": [time.time()]}, "self"))
    for number in (int(now), now - 10**7, now + 10**7, now / 1_000):
        assert taken_down({"held": number})["numbers"] == {"held": number}
