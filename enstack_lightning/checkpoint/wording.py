"""How counts and sizes are written, wherever they are: in findings, in reports and in a command's own lines."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes as a person reads them.

    Example:
        >>> [size(n) for n in (1, 812, 30_400, 12_450_000, 1_446_000_000, 15_200_000_000)]
        ['1 byte', '812 bytes', '30 kB', '12.45 MB', '1,446 MB', '15.2 GB']
    """
    if count < 10_000:
        return many(count, "byte")
    if count < 999_500:
        return f"{count / 1e3:,.0f} kB"
    if count < 10e9:
        return f"{count / 1e6:,.0f} MB" if count >= 99_995_000 else f"{count / 1e6:,.2f} MB"
    return f"{count / 1e9:,.1f} GB"


def many(count: int, one: str, several: str = "") -> str:
    """A count with its noun, in the singular or the plural.

    Example:
        >>> many(1, "group"), many(2, "group"), many(1_270, "batch", "batches")
        ('1 group', '2 groups', '1,270 batches')
    """
    return f"{count:,} {one if count == 1 else several or one + 's'}"
