"""Data files: every format gives the same rows, and each fault one sentence with the file, the row and the value."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import functions, write_jsonl

from enstack_lightning import DataError, VulnerabilityDataModule

Module = Callable[..., VulnerabilityDataModule]
GOOD = {"func": "int f(void) { return 0; }", "target": 4}


def write_json(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text(json.dumps(rows))


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), file)


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


def test_every_format_gives_the_same_rows(tmp_path: Path, module: Module) -> None:
    rows = [*functions(12), {"func": 'char *s = "a,\\"b\\"\r\n\tä";', "target": 4}]
    seen = []
    for suffix, write in WRITERS.items():
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        write(folder / f"train{suffix}", rows)
        data = module(folder)
        data.prepare_data()
        data.setup()
        batches = list(data.train_dataloader())
        tokens = {int(i): row.tolist() for b in batches for i, row in zip(b["idx"], b["input_ids"], strict=True)}
        stripped = {i: [t for t in row if t != data.tokenizer.pad_token_id] for i, row in tokens.items()}
        labels = {int(i): int(label) for b in batches for i, label in zip(b["idx"], b["labels"], strict=True)}
        seen.append((data.fingerprints["train"], stripped, labels))
    assert all(other == seen[0] for other in seen[1:])
    assert seen[0][2] == {i: row["target"] for i, row in enumerate(rows)}


def test_columns_names_of_labels_and_numbers_of_rows_are_configurable(tmp_path: Path, module: Module) -> None:
    rows = [
        {"code": GOOD["func"] + "/" * n, "weakness": name, "id": 70 + n} for n, name in enumerate(["ok", "bad"] * 3)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    columns = {"func_column": "code", "target_column": "weakness", "idx_column": "id"}
    data = module(tmp_path, **columns, label_names={"ok": 4, "bad": 0})
    assert data.train_label_counts() == [3, 0, 0, 0, 3]
    data.setup()
    assert sorted(int(i) for b in data.train_dataloader() for i in b["idx"]) == [70, 71, 72, 73, 74, 75]


FAULTS: dict[str, tuple[Any, str]] = {
    "no such column": ({"code": "x", "target": 1}, r"line 2: no column 'func'; its columns are: code, target"),
    "no label": ({"func": "x"}, r"line 2: no column 'target'"),
    "label too large": ({**GOOD, "target": 5}, r"line 2: the label in column 'target' is 5 \(int\), outside 0 to 4"),
    "label negative": ({**GOOD, "target": -1}, r"line 2: .* is -1 \(int\), outside 0 to 4"),
    "label a name": ({**GOOD, "target": "CWE-119"}, r"line 2: .* is 'CWE-119', not an integer .*give label_names"),
    "label a fraction": ({**GOOD, "target": 1.5}, r"line 2: .* is 1\.5 \(float\), not an integer"),
    "label true": ({**GOOD, "target": True}, r"line 2: .* is True \(bool\), not an integer"),
    "label null": ({**GOOD, "target": None}, r"line 2: .* is null, not an integer"),
    "code null": ({**GOOD, "func": None}, r"line 2: the code in column 'func' is null, not text"),
    "code a number": ({**GOOD, "func": 3}, r"line 2: the code in column 'func' is 3 \(int\), not text"),
    "code empty": ({**GOOD, "func": "  "}, r"line 2: the code in column 'func' is empty"),
    "not an object": ([1, 2], r"line 2: a list, where an object"),
}


def one_sentence(error: pytest.ExceptionInfo[DataError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert re.search(word, text), text


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_row_is_named_with_its_file_and_line(fault: str, tmp_path: Path, module: Module) -> None:
    row, words = FAULTS[fault]
    write_jsonl(tmp_path / "train.jsonl", [GOOD, row, GOOD])
    with pytest.raises(DataError) as error:
        module(tmp_path).train_label_counts()
    one_sentence(error, re.escape(str(tmp_path / "train.jsonl")), words)


CONTENTS = {
    "empty": (".jsonl", b"", "train.jsonl has no rows"),
    "blank lines only": (".jsonl", b"\n\n", "train.jsonl has no rows"),
    "broken JSON": (".jsonl", b'{"func": "x", "target": 0}\n{"func": \n', "line 2: not valid JSON"),
    "not UTF-8": (".jsonl", b'{"func": "\xff", "target": 0}\n', "line 1: not UTF-8"),
    "CSV with a short row": (".csv", b"func,target\nx,1\ny\n", "row 2: 1 fields, but the header names 2 columns"),
    "CSV without rows": (".csv", b"func,target\n", "train.csv has no rows"),
    "empty CSV": (".csv", b"", "train.csv is empty"),
    "CSV with an open quote": (".csv", b'func,target\n"x,1\n', "row 1: not valid CSV"),
    "no Parquet": (".parquet", b"PAR1 and no more", "not a readable Parquet file"),
    "JSON deep as a well": (".json", b"[" * 100_000, "JSON that cannot be read"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_that_cannot_be_read_is_named(kind: str, tmp_path: Path, module: Module) -> None:
    suffix, content, words = CONTENTS[kind]
    (tmp_path / f"train{suffix}").write_bytes(content)
    with pytest.raises(DataError) as error:
        module(tmp_path).train_label_counts()
    one_sentence(error, re.escape(str(tmp_path)), words)


def test_missing_folders_files_and_splits_are_named(tmp_path: Path, module: Module) -> None:
    with pytest.raises(DataError, match="no_such_folder does not exist"):
        module(tmp_path / "no_such_folder").setup("fit")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"has no train split: looked for train\(.*found notes\.txt"):
        module(tmp_path).setup("fit")
    with pytest.raises(DataError, match=r"The train file .*mine\.jsonl does not exist"):
        module(tmp_path, train_file="mine.jsonl").setup("fit")
    with pytest.raises(DataError, match="unknown format"):
        module(tmp_path, train_file="notes.txt").setup("fit")
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(DataError, match=r"has no train split: .*train\.jsonl is a folder, not a file"):
        module(tmp_path).setup("fit")
    with pytest.raises(DataError, match=r"The train file .*train\.jsonl is a folder, not a file"):
        module(tmp_path, train_file="train.jsonl").setup("fit")
    (tmp_path / "train.jsonl").rmdir()
    write_jsonl(tmp_path / "train.jsonl", [GOOD])
    write_csv(tmp_path / "train.csv", [GOOD])
    with pytest.raises(DataError, match=r"2 files for the train split .*name one by train_file"):
        module(tmp_path).setup("fit")


@pytest.mark.parametrize("named", [True, False])
def test_a_pickle_is_refused_and_never_opened(named: bool, tmp_path: Path, module: Module) -> None:
    class Opens:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'opened'}",)

    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Opens()))
    with pytest.raises(DataError, match=r"train\.pkl is a pickle.*read_pickle\(.*to_json\(\"train\.jsonl\""):
        module(tmp_path, train_file="train.pkl" if named else None).setup("fit")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_labels": 1}, "num_labels=1 is too small"),
        ({"max_length": 2}, "max_length=2 is too small"),
        ({"train_batch_size": 0}, "train_batch_size=0 is too small"),
        ({"label_names": {"a": 5}}, "label_names gives 'a' the label 5, outside 0 to 4"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        VulnerabilityDataModule(**options)
