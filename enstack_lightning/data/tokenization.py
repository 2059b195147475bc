"""Code to token ids: a tokenizer from the hub or a folder, or one trained here, and the tokenised rows on disk.

A trained tokenizer is a byte-level BPE with RoBERTa's special tokens. What identifies a tokenizer is the SHA-256 of
its JSON; the tokenised rows stand in a folder named after the rows, that digest and the length limit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from enstack_lightning.data.cache import atomic_folder, cache_key, progress_bars_only_on_terminals
from enstack_lightning.data.rows import Rows
from enstack_lightning.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

_TRAINED_FORMAT = 1
_TOKENS_FORMAT = 1
_HUB_TIMEOUT_SECONDS = 10


def load_tokenizer(name: str, max_length: int) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a local folder, the local hub cache or, if it is in neither, the hub.

    Args:
        name: Local folder or hub id such as `microsoft/codebert-base`.
        max_length: Length to which code will be cut, in tokens.

    Returns:
        The tokenizer.

    Raises:
        DataError: If it cannot be found or reached, is not a fast tokenizer, has no padding token or takes fewer than
            `max_length` tokens.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    looks_like_folder = name.startswith((".", "/", "~")) or name.count("/") > 1
    folder = Path(name).expanduser()
    if looks_like_folder and not folder.is_dir():
        raise DataError(
            f"The tokenizer folder {name} does not exist; give a folder made by save_pretrained or a hub id, or "
            "`tokenizer: null` to train one on the training split."
        )
    try:
        if folder.is_dir():
            tokenizer: object = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        else:
            tokenizer = _from_hub(name)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        where = "folder" if folder.is_dir() else "hub"
        raise DataError(
            f"The tokenizer {name} cannot be loaded from the {where} ({_first_line(error)}); give a local folder made "
            "by save_pretrained, or `tokenizer: null` to train one on the training split."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"The tokenizer {name} is a {type(tokenizer).__name__}, not a fast tokenizer; choose another.")
    if tokenizer.pad_token_id is None:
        raise DataError(f"The tokenizer {name} has no padding token, so rows of different lengths make no batch.")
    if max_length > tokenizer.model_max_length:
        raise DataError(
            f"max_length={max_length:,} is more than the {tokenizer.model_max_length:,} tokens that the tokenizer "
            f"{name} takes; lower max_length."
        )
    return tokenizer


def train_tokenizer(rows: Rows, vocab_size: int, max_length: int, cache_dir: Path) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the code of some rows, or finds it in the cache.

    Args:
        rows: Rows to train on.
        vocab_size: Entries of the vocabulary, the 256 bytes and five special tokens among them.
        max_length: Length to which code will be cut, in tokens.
        cache_dir: Folder of the package's cache.

    Returns:
        The tokenizer; the same rows and size give the same one.

    Raises:
        DataError: If `vocab_size` leaves no room for the bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise DataError(f"vocab_size={vocab_size} is too small; the bytes and special tokens alone take {smallest}.")
    key = cache_key("tokenizer", _TRAINED_FORMAT, rows.fingerprint, vocab_size)
    folder = cache_dir / "tokenizers" / key
    if not folder.is_dir():
        text = _train_bpe(_code_batches(rows.dataset), vocab_size)
        with atomic_folder(folder) as unfinished:
            (unfinished / "tokenizer.json").write_text(text, encoding="utf-8")
    return tokenizer_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"), max_length)


def tokenizer_from_json(text: str, max_length: int = 512) -> PreTrainedTokenizerFast:
    """Builds a tokenizer that was trained here from its JSON, for instance out of a checkpoint.

    Args:
        text: JSON of the tokenizer, as in the data module's `state_dict()["tokenizer_json"]`.
        max_length: Length to which code will be cut, in tokens.

    Returns:
        The tokenizer, with RoBERTa's special tokens set; `save_pretrained` writes a folder for `AutoTokenizer`.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    bos, pad, eos, unk, mask = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(text),
        bos_token=bos,
        cls_token=bos,
        eos_token=eos,
        sep_token=eos,
        pad_token=pad,
        unk_token=unk,
        mask_token=mask,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenizer_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer's JSON without the truncation and padding that its last call happened to set."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**parts, "truncation": None, "padding": None}, sort_keys=True, ensure_ascii=False)


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of the tokenizer's JSON, hexadecimal: equal digests give equal token ids."""
    return hashlib.sha256(tokenizer_json(tokenizer).encode()).hexdigest()


def tokenize_rows(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, max_length: int, num_proc: int | None, cache_dir: Path
) -> Dataset:
    """Tokenises rows, or finds them tokenised in the cache.

    Args:
        rows: Rows to tokenise.
        tokenizer: Tokenizer.
        max_length: Longer code is cut to this many tokens, special tokens included.
        num_proc: Processes that tokenise; None for this one.
        cache_dir: Folder of the package's cache.

    Returns:
        Memory-mapped data set with `input_ids` (no padding), `length`, `idx` and, if the rows are labelled, `label`.
    """
    from datasets import Dataset, concatenate_datasets

    key = cache_key("tokens", _TOKENS_FORMAT, rows.key, tokenizer_digest(tokenizer), max_length)
    folder = cache_dir / "tokens" / key

    def encode(batch: dict[str, list[str]]) -> dict[str, list[object]]:
        ids = tokenizer(batch["func"], truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
        return {"input_ids": ids, "length": [len(row) for row in ids]}

    if not folder.is_dir():
        with atomic_folder(folder) as unfinished, progress_bars_only_on_terminals():
            rows.dataset.map(
                encode,
                batched=True,
                num_proc=num_proc,
                remove_columns=["func"],
                cache_file_name=str(unfinished / "tokens.arrow"),
                new_fingerprint=key[:16],
                desc="Tokenising",
            )
    return concatenate_datasets([Dataset.from_file(str(shard)) for shard in sorted(folder.glob("*.arrow"))])


def _from_hub(name: str) -> object:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        _ask_hub(name)
        return AutoTokenizer.from_pretrained(name)


def _ask_hub(name: str) -> None:
    """Asks the hub once: transformers itself would ask an unreachable one six times a file, for half a minute."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    url = huggingface_hub.hf_hub_url(name, "tokenizer_config.json")
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=_HUB_TIMEOUT_SECONDS)
    except EntryNotFoundError:
        return  # the hub is there, and old tokenizers have no such file
    except Exception as error:  # the HTTP client's own exceptions; which client it is depends on huggingface_hub
        raise OSError(f"{huggingface_hub.constants.ENDPOINT} did not give it: {type(error).__name__}") from error


def _train_bpe(batches: Iterator[list[str]], vocab_size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(batches, trainer)
    bos, eos = (("<s>", SPECIAL_TOKENS.index("<s>")), ("</s>", SPECIAL_TOKENS.index("</s>")))
    tokenizer.post_processor = processors.RobertaProcessing(eos, bos, add_prefix_space=False)
    return str(tokenizer.to_str())


def _code_batches(dataset: Dataset) -> Iterator[list[str]]:
    for batch in dataset.iter(batch_size=1_000):
        yield batch["func"]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
