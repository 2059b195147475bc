"""What a file is, by its bytes: a torch archive, a safetensors file, or something else that is named for what it is.

A name never decides: a scanner that goes by suffixes passes over what a loader that goes by content would run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from enstack_lightning.checkpoint.source import Source

BEGINNING_BYTES = 512
"""Enough for every magic number looked for; tar's stands at byte 257."""
TAIL_BYTES = 64 * 2**10

_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_MAX_HEADER = 100_000_000
_FETCH = "a download that failed saved it in place of the file; fetch the file again"
_UNPACK = "unpack it first"

_UNFINISHED = (
    ".part",
    ".partial",
    ".tmp",
    ".temp",
    ".incomplete",
    ".crdownload",
    ".download",
    ".filepart",
    ".aria2",
    ".opdownload",
)


class ContentKind(StrEnum):
    """Which reader can read a file."""

    TORCH_ZIP = "torch-zip"
    TORCH_LEGACY = "torch-legacy"
    SAFETENSORS = "safetensors"
    OTHER = "other"


@dataclass(frozen=True)
class Content:
    """What a file is.

    Attributes:
        what: a noun with its article: `a gzip archive`.
        advice: what to do, where there is something to say.
    """

    kind: ContentKind
    what: str
    advice: str = ""


_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull` to fetch the file itself"),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "an lz4 archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"PK\x05\x06", "a zip archive with nothing in it", ""),
    (b"PK\x07\x08", "one part of a zip archive in several parts", ""),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it", ""),
    (b"GGUF", "a GGUF file, as llama.cpp reads it: a model without a training state", ""),
    (b"ggjt", "a GGML file, as llama.cpp reads it: a model without a training state", ""),
    (b"lmgg", "a GGML file, as llama.cpp reads it: a model without a training state", ""),
    (b"\x93NUMPY", "an array of NumPy (.npy)", ""),
    (b"PAR1", "a Parquet file: data, not a model", ""),
    (b"ARROW1", "an Arrow file: data, not a model", ""),
    (b"SQLite format 3\x00", "an SQLite database", ""),
    (b"%PDF-", "a PDF document", ""),
    (b"\x89PNG", "a PNG image", ""),
    (b"\x7fELF", "a program or a library", ""),
    (b"MZ", "a program or a library", ""),
)
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<body")
_TEXT_BYTES = frozenset(range(32, 256)) - {127} | {*b"\t\n\r\f\x1b"}


def content_of(source: Source) -> Content:
    """What an open file is.

    Raises:
        ContainerDefectError: the file got shorter meanwhile.
        OSError: it cannot be read.
    """
    beginning = source.read_at(0, min(BEGINNING_BYTES, source.size))
    if not beginning.startswith(b"PK\x03\x04"):
        return _content_of_beginning(beginning, source.size)
    if _torch_wrote(_first_record(beginning)):
        return Content(ContentKind.TORCH_ZIP, "a torch file")
    return _content_of_zip(_record_names(source))


def _content_of_beginning(beginning: bytes, size: int) -> Content:
    """What a file of `size` bytes is by its first bytes, 512 or all; a zip archive is taken for one of torch."""
    if beginning and beginning[:4] == b"PK\x03\x04"[: len(beginning)]:
        return Content(ContentKind.TORCH_ZIP, "a torch file")
    if _LEGACY_MAGIC in beginning[:32]:
        return Content(ContentKind.TORCH_LEGACY, "a torch file in the format of torch before 1.6")
    for magic, what, advice in _BEGINNINGS:
        if beginning.startswith(magic):
            return Content(ContentKind.OTHER, what, advice)
    if not any(beginning):
        what = "filled with zeros at its beginning, as a crash of the machine or a full disk leaves it"
        return Content(ContentKind.OTHER, what, "use another checkpoint of this run")
    if _is_safetensors(beginning):
        return Content(ContentKind.SAFETENSORS, "a safetensors file")
    return _content_of_odd_bytes(beginning, size)


def _first_record(beginning: bytes) -> str:
    """The name of the first record of a zip archive by its local header."""
    length = int.from_bytes(beginning[26:28], "little")
    return beginning[30 : 30 + length].decode("utf-8", "replace")


def _record_names(source: Source) -> list[str]:
    """The names that the end of a zip archive's directory lists: to tell what it is, and for nothing else."""
    size = min(source.size, TAIL_BYTES)
    tail = source.read_at(source.size - size, size)
    names = []
    for match in re.finditer(rb"PK\x01\x02", tail):
        length = int.from_bytes(tail[match.start() + 28 : match.start() + 30], "little")
        names.append(tail[match.start() + 46 : match.start() + 46 + length].decode("utf-8", "replace"))
    return names


def _torch_wrote(name: str) -> bool:
    return name.partition("/")[2] in ("data.pkl", "version", ".format_version", "byteorder")


def _content_of_zip(names: list[str]) -> Content:
    if any(name.partition("/")[2] == "constants.pkl" for name in names):
        what = "a TorchScript archive, a program that torch.jit.save wrote"
        advice = "name a file of torch.save; torch.jit.load would run what this one holds"
        return Content(ContentKind.OTHER, what, advice)
    if not names or any(name.partition("/")[2] == "data.pkl" for name in names):
        return Content(ContentKind.TORCH_ZIP, "a torch file")
    if "[Content_Types].xml" in names:
        return Content(ContentKind.OTHER, "an Office document")
    if any(name.startswith("META-INF/") for name in names):
        return Content(ContentKind.OTHER, "a Java archive")
    if "model.weights.h5" in names:
        return Content(ContentKind.OTHER, "a Keras file")
    if all(name.endswith(".npy") for name in names):
        return Content(ContentKind.OTHER, "a file of NumPy arrays (.npz)")
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return Content(ContentKind.OTHER, f"an ordinary zip archive (it holds {shown})", _UNPACK)


def _is_safetensors(beginning: bytes) -> bool:
    length = int.from_bytes(beginning[:8], "little")
    return len(beginning) > 8 and 2 <= length <= _MAX_HEADER and beginning[8:].lstrip()[:1] == b"{"


def _content_of_odd_bytes(beginning: bytes, size: int) -> Content:
    if beginning[257:262] == b"ustar":
        return Content(ContentKind.OTHER, "a tar archive", _UNPACK)
    if beginning[:1] == b"\x80" and 2 <= beginning[1] <= 5 and size > 2:
        return Content(
            ContentKind.OTHER, "a bare pickle, not written by torch.save", "loading it would run whatever it holds"
        )
    if re.match(rb"\x08[\x01-\x14]\x12.[\x20-\x7e]{3}", beginning, re.DOTALL):
        return Content(ContentKind.OTHER, "an ONNX file: a model for inference, without a training state")
    if beginning[4:8] == b"TFL3":
        return Content(ContentKind.OTHER, "a TensorFlow Lite file")
    if beginning[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return Content(ContentKind.OTHER, "a text file in UTF-16")
    text = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.lower().startswith(_MARKUP):
        return Content(ContentKind.OTHER, "an HTML page", _FETCH)
    if text.startswith((b"<?xml", b"<Error")):
        said = re.search(rb"<Code>([A-Za-z]{1,40})</Code>", text)
        what = f"an XML page with the error {said[1].decode()}" if said else "an XML page"
        return Content(ContentKind.OTHER, what, _FETCH)
    if not _TEXT_BYTES.issuperset(beginning) or not _is_utf8(beginning):
        return Content(ContentKind.OTHER, "data of no known format")
    if text.startswith((b"{", b"[")):
        return Content(ContentKind.OTHER, "a JSON file", "if it is a part of a checkpoint, name the folder it lies in")
    shown = text.splitlines()[0][:40].decode("utf-8", "replace") if text else ""
    return Content(ContentKind.OTHER, f"a text file that begins {shown!r}")


def _is_utf8(beginning: bytes) -> bool:
    try:
        beginning.decode("utf-8")
    except UnicodeDecodeError as e:
        return e.end == len(beginning) and e.reason == "unexpected end of data"  # a character cut in two
    return True


# Names


def is_unfinished(name: str) -> bool:
    """Whether a file's name says that it is being written or downloaded, or was left when that was interrupted."""
    return name.lower().endswith(_UNFINISHED)


# Folders

_NO_CHECKPOINT = "the folder holds none of the files of a checkpoint"


def content_of_folder(names: tuple[str, ...]) -> str:
    """What a folder with these names in it is, that holds no checkpoint which any reader knows."""
    present = set(names)
    if not names:
        return f"{_NO_CHECKPOINT}: it is empty"
    if any(re.search(r"(?:^|_)mp_rank_\d+|^zero_pp_rank_\d+|_(?:model|optim)_states\.pt$", n) for n in names) or (
        present & {"zero_to_fp32.py", "latest"} and any(re.fullmatch(r"checkpoint|global_step\d+", n) for n in names)
    ):
        return (
            "it is a checkpoint of DeepSpeed, which is not read; turn it into one file with its own zero_to_fp32.py, "
            "and verify that"
        )
    if "latest_checkpointed_iteration.txt" in present:
        return "it is a folder of Megatron checkpoints; name one of the iterations in it"
    if present & {"_CHECKPOINT_METADATA", "_METADATA"}:
        return "it is a checkpoint of Orbax (JAX), which is not read"
    if "saved_model.pb" in present or any(re.search(r"\.data-\d{5}-of-\d{5}$", n) for n in names):
        return "it is a checkpoint of TensorFlow, which is not read"
    if "data.pkl" in present and "data" in present:
        return "it is a torch file that was unpacked; use the file itself"
    checkpoints = [n for n in names if n.endswith(".ckpt") or re.fullmatch(r"checkpoint-\d+", n)]
    if checkpoints:
        return f"{_NO_CHECKPOINT} itself; name one of the {len(checkpoints):,} in it ({checkpoints[0]}, …)"
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{_NO_CHECKPOINT} (it holds {shown})"
