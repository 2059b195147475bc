"""Counts and sizes are written in one way, and rounded to what they say."""

from __future__ import annotations

import pytest

from enstack_lightning.checkpoint.wording import many, size


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (9_999, "9,999 bytes"),
        (10_000, "10 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (99_994_999, "99.99 MB"),
        (99_995_000, "100 MB"),
        (1_500_000_000, "1,500 MB"),
        (15_000_000_000, "15.0 GB"),
    ],
)
def test_sizes_have_no_more_figures_than_a_person_reads(count: int, said: str) -> None:
    assert size(count) == said


def test_a_noun_follows_its_count() -> None:
    assert [many(n, "batch", "batches") for n in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
