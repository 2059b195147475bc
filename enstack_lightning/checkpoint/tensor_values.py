"""Which values of a tensor are not finite, and whether all are zero, told from the storage that it lies in.

A storage is looked at once, as a flat row of numbers, in chunks that are in the processor's cache anyway; that settles
the usual case, a tensor that fills its storage. Only chunks with something to report are read again, and looked at
through the shape and the strides of each tensor: the work is bounded by the bytes that are there, whatever size a
tensor says it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from enstack_lightning.checkpoint.facts import ValueFacts
from enstack_lightning.checkpoint.number_formats import FORMATS, NumberFormat

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from enstack_lightning.checkpoint.deep import NamedTensor, Span
    from enstack_lightning.checkpoint.number_formats import Bits, Bytes, Indices

    ReadAgain = Callable[[int, int], Bytes]

CHUNK_BYTES = 2**20
MAX_POSITIONS = 2**16
"""Looked up in a tensor's shape at a time, in a few arrays of 64-bit numbers."""

MAX_OVERLAPPING_BYTES = 16 * 2**20
MAX_OVERLAPPING_VALUES = 2**20
"""Of a tensor that overlaps itself; within both, each of its values is looked up."""

_VISIT_BYTES = 1_024
"""What passing over a chunk costs a budget."""


class Budget:
    """Bytes that may still be read again."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Takes `size` bytes, or says that so many are not left."""
        self.left -= size
        return self.left >= 0


class Unsearched(NamedTuple):
    """A tensor whose values could not be told apart, in a storage that has some which are not finite."""

    name: str
    where: str


class _Odd(NamedTuple):
    """Values of a chunk that are not finite: how many, and which of the chunk's values is the first."""

    total: int
    first: int


class _Values(NamedTuple):
    """As in `ValueFacts`."""

    nonfinite: int = 0
    first_nonfinite: tuple[int, ...] | None = None
    first_value: str = ""
    all_zero: bool = False


class SpanValues:
    """What the values of one span's tensors are like: `examine` each of its chunks, in any order, then ask `found`."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._tensors = [t for t in span.tensors if t.role != "other" and t.dtype in FORMATS]
        self._odd: dict[NumberFormat, dict[int, _Odd]] = {FORMATS[t.dtype]: {} for t in self._tensors}
        self._zero: dict[NumberFormat, set[int]] = {form: set() for form in self._odd}

    def __bool__(self) -> bool:
        """Whether there is anything to examine."""
        return bool(self._tensors)

    def examine(self, chunk: int, data: Bytes) -> None:
        """Looks at the bytes of chunk number `chunk`: `CHUNK_BYTES`, or fewer of the last. From any thread."""
        for form, odd in self._odd.items():
            bits = form.bits(data, self._span.byteorder)
            if not bits.size:
                continue
            all_finite, all_zero = form.summary(bits)
            if not all_finite:
                places = form.nonfinite(bits)
                odd[chunk] = _Odd(int(places.sum()), int(places.argmax()))
            elif all_zero:
                self._zero[form].add(chunk)

    def found(self, read: ReadAgain, budget: Budget) -> Iterator[ValueFacts | Unsearched]:
        """What is noteworthy of each tensor.

        Args:
            read: gives `(offset, count)` bytes of the span again.
        """
        known: dict[tuple[object, ...], _Values | None] = {}
        for tensor in self._tensors:
            layout = tensor.dtype, tensor.offset, tensor.shape, tensor.stride
            if layout not in known:
                known[layout] = self._values_of(tensor, read, budget)
            values = known[layout]
            if values is None:
                yield Unsearched(tensor.name, self._span.where)
            elif (values.nonfinite or values.all_zero) and tensor.role != "other":
                yield ValueFacts(tensor.name, tensor.role, self._span.where, *values)

    def _values_of(self, tensor: NamedTensor, read: ReadAgain, budget: Budget) -> _Values | None:
        form = FORMATS[tensor.dtype]
        view = _view_of(tensor)
        held = self._span.size // form.value_bytes
        if view is None or view.end > held:
            return _Values()  # it has none, or lies beyond its storage, which is a defect of its own
        odd, zero = self._odd[form], self._zero[form]
        chunks = view.chunks(form)
        fills = view.dense and (view.start, view.end) == (0, held)
        if fills and not odd:
            return _Values(all_zero=len(zero) == len(chunks))
        if not budget.take(_VISIT_BYTES * len(chunks)):
            return None if odd else _Values()
        search = _Search(tensor, view, self._span, read, budget)
        bad = [chunk for chunk in chunks if chunk in odd]
        if bad and fills and view.in_order:
            first = bad[0] * values_in_chunk(form) + odd[bad[0]].first
            return search.described(sum(odd[chunk].total for chunk in bad), first)
        if bad:
            values = search.nonfinite(bad)
            if values is None or values.nonfinite:
                return values
        return _Values(all_zero=search.only_zeros(chunks, zero))


def values_in_chunk(form: NumberFormat) -> int:
    """How many values a chunk holds."""
    return CHUNK_BYTES // form.value_bytes


class _Axis(NamedTuple):
    """A dimension: `stride` in the storage, `place` the stride in a dense tensor of the shape that `_View` keeps."""

    dimension: int
    size: int
    stride: int
    place: int


class _View(NamedTuple):
    """Where in a storage a tensor's values lie, from `start` up to `end`.

    Dimensions that only repeat values (stride 0) or have one are left out.

    Attributes:
        axes: the others, greatest stride first.
        repeats: how often each value stands in the tensor.
        in_order: the values follow each other in the storage as in the tensor.
        dense: each place from start to end holds one of its values.
        distinct: no two of its values (but for repeats) share a place.
    """

    start: int
    end: int
    axes: tuple[_Axis, ...]
    repeats: int
    in_order: bool
    dense: bool
    distinct: bool

    def chunks(self, form: NumberFormat) -> range:
        """The numbers of the chunks that it reaches into."""
        return range(self.start // values_in_chunk(form), (self.end - 1) // values_in_chunk(form) + 1)

    def places_of(self, positions: Indices) -> Indices:
        """The places in the view of the storage positions that belong to it, as in a dense tensor of its shape."""
        import numpy as np

        rest = positions - self.start
        place = np.zeros_like(rest)
        belongs = rest >= 0
        for axis in self.axes:
            index = rest // axis.stride
            belongs &= index < axis.size
            rest = rest - index * axis.stride
            place += index * axis.place
        found: Indices = place[belongs & (rest == 0)]
        return found


def _view_of(tensor: NamedTensor) -> _View | None:
    """None for a tensor without values, or with strides that no tensor has."""
    if (
        0 in tensor.shape
        or tensor.offset < 0
        or len(tensor.shape) != len(tensor.stride)
        or any(n < 0 for n in (*tensor.shape, *tensor.stride))
    ):
        return None
    axes, place, repeats = [], 1, 1
    for dimension in reversed(range(len(tensor.shape))):
        size, stride = tensor.shape[dimension], tensor.stride[dimension]
        if stride == 0:
            repeats *= size
        elif size > 1:
            axes.append(_Axis(dimension, size, stride, place))
            place *= size
    ordered = sorted(axes, key=lambda axis: axis.stride)
    reach, distinct = 0, True
    for axis in ordered:
        distinct = distinct and axis.stride > reach
        reach += (axis.size - 1) * axis.stride
    dense = distinct and reach + 1 == place
    in_order = dense and repeats == 1 and all(axis.stride == axis.place for axis in axes)
    end = tensor.offset + reach + 1
    return _View(tensor.offset, end, tuple(reversed(ordered)), repeats, in_order, dense, distinct)


class _Search:
    """Looks the values of one tensor up, in bytes that are read again."""

    def __init__(self, tensor: NamedTensor, view: _View, span: Span, read: ReadAgain, budget: Budget) -> None:
        self._tensor = tensor
        self._view = view
        self._form = FORMATS[tensor.dtype]
        self._span = span
        self._read = read
        self._budget = budget

    def nonfinite(self, chunks: Sequence[int]) -> _Values | None:
        """What is not finite in these chunks; None where it cannot be looked up."""
        if not self._view.distinct:
            odd = self._overlapping(self._form.nonfinite)
            if odd is None:
                return None
            return self.described(int(odd.sum()), int(odd.argmax())) if odd.any() else _Values()
        count, first = 0, -1
        for chunk in chunks:
            start, end = self._within(chunk)
            if not self._budget.take((end - start) * self._form.value_bytes):
                return None
            for places in self._places(start, self._form.nonfinite(self._bits(start, end))):
                if places.size:
                    least = int(places.min())
                    first = least if count == 0 else min(first, least)
                    count += places.size
        return self.described(count, first) if count else _Values()

    def only_zeros(self, chunks: Sequence[int], zero: set[int]) -> bool:
        """Whether each value is zero, where `zero` are the chunks that hold nothing else."""
        if not self._view.distinct:
            nonzero = self._overlapping(self._form.nonzero)
            return nonzero is not None and not nonzero.any()
        for chunk in chunks:
            if chunk in zero:
                continue
            start, end = self._within(chunk)
            if self._view.dense and end - start == values_in_chunk(self._form):
                return False
            if not self._budget.take((end - start) * self._form.value_bytes):
                return False
            nonzero = self._form.nonzero(self._bits(start, end))
            if nonzero.any() and (self._view.dense or any(p.size for p in self._places(start, nonzero))):
                return False
        return True

    def described(self, count: int, place: int) -> _Values:
        """The values of a tensor of which `count` are not finite, the first at `place` of a dense tensor."""
        position, indices = self._view.start, {}
        for axis in sorted(self._view.axes, key=lambda axis: -axis.place):
            indices[axis.dimension], place = divmod(place, axis.place)
            position += indices[axis.dimension] * axis.stride
        index = tuple(indices.get(dimension, 0) for dimension in range(len(self._tensor.shape)))
        text = self._form.text(self._bits(position, position + 1))
        return _Values(count * self._view.repeats, index, text)

    def _overlapping(self, judge: Callable[[Bits], NDArray[np.bool_]]) -> NDArray[np.bool_] | None:
        """What `judge` says of each value of a tensor that overlaps itself; None where that is too much to look up."""
        import numpy as np

        start, end = self._view.start, self._view.end
        axes = sorted(self._view.axes, key=lambda axis: -axis.place)
        size = (end - start) * self._form.value_bytes
        if math.prod(axis.size for axis in axes) > MAX_OVERLAPPING_VALUES or size > MAX_OVERLAPPING_BYTES:
            return None
        if not self._budget.take(size):
            return None
        judged = judge(self._bits(start, end))
        strides = [axis.stride for axis in axes]  # in bytes, of which a truth value takes one
        return np.lib.stride_tricks.as_strided(judged, [axis.size for axis in axes], strides, writeable=False)

    def _within(self, chunk: int) -> tuple[int, int]:
        """The part of a chunk, in values, that the tensor reaches over."""
        size = values_in_chunk(self._form)
        return max(chunk * size, self._view.start), min((chunk + 1) * size, self._view.end)

    def _bits(self, start: int, end: int) -> Bits:
        size = self._form.value_bytes
        return self._form.bits(self._read(start * size, (end - start) * size), self._span.byteorder)

    def _places(self, start: int, wanted: NDArray[np.bool_]) -> Iterator[Indices]:
        """The places in the view of the wanted storage positions, which begin at `start`, a few at a time."""
        import numpy as np

        positions = np.flatnonzero(wanted)
        for at in range(0, len(positions), MAX_POSITIONS):
            yield self._view.places_of(positions[at : at + MAX_POSITIONS] + start)
