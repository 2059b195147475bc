"""Which file holds which split: names given by the user, or the usual names found in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from enstack_lightning.data.readers import PICKLE_SUFFIXES, SUFFIXES, pickle_refusal
from enstack_lightning.errors import DataError

Split = Literal["train", "validation", "test", "predict"]

_STEMS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "valid"),
    "test": ("test",),
    "predict": (),
}


def split_file(split: Split, folder: Path | None, given: Mapping[Split, str | None]) -> Path:
    """Finds the file of a split.

    Args:
        split: Which one; predict falls back to test.
        folder: Folder with the splits; file names given are relative to it, or else to the working directory.
        given: File names by split, None for those to look for in the folder.

    Returns:
        The file; it exists and is no pickle.

    Raises:
        DataError: If there is no such file, more than one, or only a pickle.
    """
    if name := given[split]:
        here = Path(name).expanduser()
        file = (folder or Path()) / here
        if here.is_file() and not file.is_file():
            file = here
        if file.suffix.lower() in PICKLE_SUFFIXES:
            raise DataError(pickle_refusal(file))
        if file.is_dir():
            raise DataError(f"The {split} file {file} is a folder, not a file.")
        if not file.is_file():
            raise DataError(f"The {split} file {file} does not exist.")
        return file
    if split == "predict":
        return split_file("test", folder, given)
    if folder is None:
        raise DataError(f"There is no {split} split: neither path nor {split}_file is given.")
    if not folder.is_dir():
        raise DataError(f"The data folder {folder} does not exist or is not a folder.")
    return _find(split, folder)


def has_split(split: Split, folder: Path, given: Mapping[Split, str | None]) -> bool:
    """Whether a file is named for the split or stands in the folder, a pickle included, which is then refused."""
    names = [f"{stem}{suffix}" for stem in _STEMS[split] for suffix in SUFFIXES + PICKLE_SUFFIXES]
    return bool(given[split]) or any((folder / name).is_file() for name in names)


def _find(split: Split, folder: Path) -> Path:
    names = [f"{stem}{suffix}" for stem in _STEMS[split] for suffix in SUFFIXES]
    found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        files = ", ".join(file.name for file in found)
        raise DataError(f"{folder} has {len(found)} files for the {split} split ({files}); name one by {split}_file.")
    if found:
        return found[0]
    for stem in _STEMS[split]:
        for suffix in PICKLE_SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                raise DataError(pickle_refusal(folder / f"{stem}{suffix}"))
    for name in names:
        if (folder / name).is_dir():
            raise DataError(f"{folder} has no {split} split: {folder / name} is a folder, not a file.")
    stems, suffixes = "|".join(_STEMS[split]), "|".join(SUFFIXES)
    stems = f"({stems})" if "|" in stems else stems
    raise DataError(
        f"{folder} has no {split} split: looked for {stems}({suffixes}), found {_listing(folder)}; "
        f"name another file by {split}_file."
    )


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "") or "nothing"
