"""The generated sample: deterministic, balanced, without leaks, and not told by its words alone; and real functions."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline

from enstack_lightning import VulnerabilityDataModule
from enstack_lightning.data.sample import SAMPLE_SIZES, sample_rows, write_sample

JULIET = Path(__file__).parents[2] / "../shared/data/juliet-cwe5"


@pytest.fixture(scope="module")
def sample(cache: Path) -> dict[str, list[dict[str, Any]]]:
    folder = write_sample(cache, seed=0)
    return {s: [json.loads(line) for line in (folder / f"{s}.jsonl").open()] for s in SAMPLE_SIZES}


def test_a_seed_gives_one_sample(cache: Path, tmp_path: Path) -> None:
    first, second = write_sample(cache, seed=0), write_sample(tmp_path, seed=0)
    for split in SAMPLE_SIZES:
        assert (first / f"{split}.jsonl").read_bytes() == (second / f"{split}.jsonl").read_bytes()
    assert list(islice(sample_rows(0), 5)) != list(islice(sample_rows(1), 5))


def test_sizes_classes_and_columns(sample: dict[str, list[dict[str, Any]]]) -> None:
    assert {split: len(rows) for split, rows in sample.items()} == {"train": 2000, "validation": 250, "test": 250}
    for rows in sample.values():
        assert set(Counter(row["target"] for row in rows).values()) == {len(rows) // 5}
        assert [row["idx"] for row in rows] == list(range(len(rows)))
        assert {(row["target"], row["cwe"]) for row in rows} == set(
            enumerate(["CWE-119", "CWE-120", "CWE-469", "CWE-476", "other"])
        )


def test_no_function_stands_twice(sample: dict[str, list[dict[str, Any]]]) -> None:
    functions = [row["func"] for rows in sample.values() for row in rows]
    assert len(set(functions)) == len(functions) == 2500


def test_no_word_names_the_class(sample: dict[str, list[dict[str, Any]]]) -> None:
    for row in sample["train"]:
        assert "cwe" not in row["func"].lower()
        assert not {"bad", "good", "vuln", "safe"} & set(row["func"].lower().replace("_", " ").split())


def bag_of_words_f1(train: list[dict[str, Any]], validation: list[dict[str, Any]], longest: int) -> float:
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, longest))
    baseline = make_pipeline(words, LogisticRegression(max_iter=2000, C=10))
    baseline.fit([r["func"] for r in train], [r["target"] for r in train])
    predicted = baseline.predict([r["func"] for r in validation])
    return float(f1_score([r["target"] for r in validation], predicted, average="weighted"))


def test_a_bag_of_words_stays_below_what_the_demo_reaches(sample: dict[str, list[dict[str, Any]]]) -> None:
    score = bag_of_words_f1(sample["train"], sample["validation"], longest=1)
    print(f"bag of words: weighted F1 {score:.3f} on the validation split")
    assert 0.2 < score < 0.85


def test_real_functions_are_read(cache: Path) -> None:
    if not JULIET.is_dir():
        pytest.skip(f"the Juliet functions are not in {JULIET}")
    data = VulnerabilityDataModule(str(JULIET), cache_dir=str(cache), max_length=64, vocab_size=500)
    assert sum(data.train_label_counts()) == 7430
    assert data.train_label_counts()[2] == 24
    data.setup("test")
    assert data.num_rows == {"train": 7430, "test": 1082}
