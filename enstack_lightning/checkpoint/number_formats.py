"""Floating-point numbers by their bits: which are NaN, infinite or zero, also in formats that NumPy does not have.

Bit patterns: IEEE 754-2019 section 3.4; the 8-bit formats: torch/headeronly/util/Float8_*.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Bits = NDArray[np.unsignedinteger[Any]]
    Indices = NDArray[np.int64]

ByteOrder = Literal["<", ">"]
Kind = Literal["ieee", "no infinity", "negative zero is NaN", "exponent alone"]


class NumberFormat(NamedTuple):
    """A floating-point format.

    Attributes:
        itemsize: bytes of one number; of each of the two, where a value is complex.
        limit: of the first two kinds, a number is not finite if its bits without the sign are at least this; of the
            others, if its bits are this.
        kind: `ieee` has infinity at the limit and NaN above, `no infinity` NaN alone.
        numbers: in a value; 2 for a complex format.
    """

    itemsize: int
    limit: int
    kind: Kind = "ieee"
    numbers: int = 1

    @property
    def value_bytes(self) -> int:
        return self.itemsize * self.numbers

    @property
    def sign(self) -> int:
        return 1 << (8 * self.itemsize - 1)

    def bits(self, data: Bytes, byteorder: ByteOrder) -> Bits:
        """The bits of the whole values in `data`, as native unsigned integers."""
        bits = data[: len(data) // self.value_bytes * self.value_bytes].view(f"{byteorder}u{self.itemsize}")
        return bits if byteorder == "<" or self.itemsize == 1 else bits.astype(f"u{self.itemsize}")

    def summary(self, bits: Bits) -> tuple[bool, bool]:
        """Whether all are finite and whether all are zero, from maxima alone, which are fast to find."""
        greatest = int(bits.max())
        if self.kind == "exponent alone":
            return greatest != self.limit, False
        signed = bits.view(f"i{self.itemsize}")
        if self.kind == "negative zero is NaN":
            return int(signed.min()) != -self.limit, greatest == 0
        greatest_positive = int(signed.max())
        finite = greatest_positive < self.limit and greatest < self.sign + self.limit
        return finite, greatest_positive <= 0 and greatest in (0, self.sign)

    def nonfinite(self, bits: Bits) -> NDArray[np.bool_]:
        """Of each value, whether it is not finite."""
        if self._has_one_nan:
            return self._of_values(bits == self.limit)
        return self._of_values((bits & (self.sign - 1)) >= self.limit)

    def nonzero(self, bits: Bits) -> NDArray[np.bool_]:
        """Of each value, whether it is not zero."""
        if self.kind == "exponent alone":
            return self._of_values(bits == bits)
        return self._of_values((bits if self._has_one_nan else bits & (self.sign - 1)) != 0)

    def text(self, bits: Bits) -> str:
        """`nan`, `inf` or `-inf`: the first number that is not finite."""
        for number in bits.tolist():
            if not self._has_one_nan and number & (self.sign - 1) == self.limit and self.kind == "ieee":
                return "-inf" if number & self.sign else "inf"
            if number == self.limit or (not self._has_one_nan and number & (self.sign - 1) >= self.limit):
                return "nan"
        return ""

    def _of_values(self, numbers: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether something holds of any number of each value."""
        if self.numbers == 1:
            return numbers
        first, second = numbers[0::2], numbers[1::2]
        return first | second

    @property
    def _has_one_nan(self) -> bool:
        return self.kind in ("negative zero is NaN", "exponent alone")


_HALF = NumberFormat(2, 0x7C00)
_SINGLE = NumberFormat(4, 0x7F800000)
_DOUBLE = NumberFormat(8, 0x7FF0000000000000)
FORMATS = {
    "float64": _DOUBLE,
    "float32": _SINGLE,
    "float16": _HALF,
    "bfloat16": NumberFormat(2, 0x7F80),
    "complex128": _DOUBLE._replace(numbers=2),
    "complex64": _SINGLE._replace(numbers=2),
    "complex32": _HALF._replace(numbers=2),
    "float8_e5m2": NumberFormat(1, 0x7C),
    "float8_e4m3fn": NumberFormat(1, 0x7F, "no infinity"),
    "float8_e5m2fnuz": NumberFormat(1, 0x80, "negative zero is NaN"),
    "float8_e4m3fnuz": NumberFormat(1, 0x80, "negative zero is NaN"),
    "float8_e8m0fnu": NumberFormat(1, 0xFF, "exponent alone"),
}
"""By torch's names."""
