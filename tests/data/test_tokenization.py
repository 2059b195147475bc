"""Tokenizers and the cache: the same input gives the same bytes, made once, and half a result never stands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import functions, write_jsonl

from enstack_lightning import DataError, VulnerabilityDataModule
from enstack_lightning.data.cache import atomic_folder
from enstack_lightning.data.tokenization import tokenizer_digest, tokenizer_json

Module = Callable[..., VulnerabilityDataModule]


def files_of(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_the_same_rows_train_the_same_tokenizer(data: Path, module: Module, tmp_path: Path) -> None:
    texts = {tokenizer_json(module(data, cache_dir=str(tmp_path / name)).tokenizer) for name in "ab"}
    assert len(texts) == 1


def test_a_trained_tokenizer_loses_no_byte_of_the_code(data: Path, module: Module) -> None:
    tokenizer = module(data).tokenizer
    for text in (functions(1)[0]["func"], 'char *s = "ä\\n😀";\t/* \x01 */'):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)


def test_a_vocabulary_without_room_for_the_bytes_is_refused(data: Path, module: Module) -> None:
    with pytest.raises(DataError, match="vocab_size=260 is too small; the bytes and special tokens alone take 261"):
        _ = module(data, vocab_size=260).tokenizer


def test_what_is_in_the_cache_is_not_made_again(data: Path, module: Module, tmp_path: Path) -> None:
    module(data, cache_dir=str(tmp_path)).prepare_data()
    made = files_of(tmp_path)
    assert made
    module(data, cache_dir=str(tmp_path)).prepare_data()
    assert files_of(tmp_path) == made


def test_a_file_that_changed_is_read_again(module: Module, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", functions(8))
    before = module(tmp_path)
    before.train_label_counts()
    write_jsonl(tmp_path / "train.jsonl", functions(9))
    after = module(tmp_path)
    after.train_label_counts()
    assert (before.num_rows, after.num_rows) == ({"train": 8}, {"train": 9})
    assert before.fingerprints != after.fingerprints


def test_a_folder_of_the_cache_is_whole_or_not_there(tmp_path: Path) -> None:
    def fill_half() -> None:
        with atomic_folder(tmp_path / "made") as unfinished:
            (unfinished / "half").write_text("x")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_half()
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "made") as unfinished:
            (unfinished / "file").write_text(content)
    assert (tmp_path / "made" / "file").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def token_ids(data: VulnerabilityDataModule) -> list[list[int]]:
    data.setup("fit")
    return [row for batch in data.val_dataloader() for row in batch["input_ids"].tolist()]


def test_more_processes_give_the_same_tokens(data: Path, module: Module, tmp_path: Path) -> None:
    alone = token_ids(module(data, cache_dir=str(tmp_path / "a")))
    assert token_ids(module(data, cache_dir=str(tmp_path / "b"), num_proc=2)) == alone


def test_long_code_is_cut_and_keeps_its_end_mark(data: Path, module: Module) -> None:
    cut = module(data, max_length=10)
    rows = token_ids(cut)
    assert {len(row) for row in rows} == {10}
    assert {row[-1] for row in rows} == {cut.tokenizer.eos_token_id}


def test_a_tokenizer_from_a_folder_is_used_and_a_missing_one_named(data: Path, module: Module, tmp_path: Path) -> None:
    trained = module(data).tokenizer
    trained.save_pretrained(tmp_path / "tokenizer")
    loaded = module(data, tokenizer=str(tmp_path / "tokenizer")).tokenizer
    assert tokenizer_digest(loaded) == tokenizer_digest(trained)
    with pytest.raises(DataError, match=r"The tokenizer folder .*nowhere does not exist"):
        _ = module(data, tokenizer=str(tmp_path / "nowhere")).tokenizer
    with pytest.raises(DataError, match="max_length=999 is more than the 64 tokens"):
        _ = module(data, tokenizer=str(tmp_path / "tokenizer"), max_length=999).tokenizer


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    script = (
        "from enstack_lightning.data.tokenization import load_tokenizer\n"
        "from enstack_lightning import DataError\n"
        "try: load_tokenizer('microsoft/codebert-base', 64)\n"
        "except DataError as error: print(error)"
    )
    surroundings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=surroundings, capture_output=True, text=True, check=True)
    assert "http://127.0.0.1:9 did not give it: ConnectError" in done.stdout
    assert "give a local folder" in done.stdout
    assert "Retry" not in done.stderr
