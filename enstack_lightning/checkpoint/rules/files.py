"""CK1xx: the files of a checkpoint are there, whole, and what they should be."""

from __future__ import annotations

from collections.abc import Iterator

from enstack_lightning.checkpoint.facts import DefectKind, Facts, Format
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, error, passed, rule

_FROM_ANOTHER = "Use another checkpoint of this run; `enstack verify FOLDER` names the newest good one."


def _defects(facts: Facts, kind: DefectKind, hint: str) -> Iterator[Outcome]:
    for defect in facts.defects:
        if defect.kind is kind:
            yield error(f"{defect.where}: {defect.message}", defect.where, hint)


@rule("CK101", "missing-file")
def missing_file(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A file that the checkpoint's format demands is not there, or is a link to nothing.

    A Lightning checkpoint is one file. An EnStack folder needs `training_state.pth`, `config.json`, and
    `model.safetensors` or `pytorch_model.bin`.
    """
    yield from _defects(facts, DefectKind.MISSING, "Check the path, or copy the file again from where it was saved.")


@rule("CK102", "not-a-checkpoint")
def not_a_checkpoint(facts: Facts, options: Options) -> Iterator[Outcome]:
    """What stands at the path is something else than a checkpoint: a pointer, a web page, another kind of archive."""
    yield from _defects(facts, DefectKind.UNRECOGNISED, "Name a Lightning .ckpt file or an EnStack folder.")
    if facts.format is Format.UNKNOWN and not facts.defects:
        entries = ", ".join(sorted(facts.fields)[:5]) or "no entries"
        yield error(
            f"it is a torch file, but no Lightning checkpoint: it lacks pytorch-lightning_version (it has {entries})",
            hint="Name the .ckpt file that the Trainer saved, or the folder that holds training_state.pth.",
        )


@rule("CK103", "empty-file")
def empty_file(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A file has no bytes: a save that was killed before it wrote anything, or a full disk."""
    yield from _defects(facts, DefectKind.EMPTY, _FROM_ANOTHER)


@rule("CK104", "truncated-file")
def truncated_file(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A file ends before the place where its own header says that it ends: a kill, a full disk, a broken copy.

    A torch file carries its directory at its end, so a file that was cut off has none.
    """
    yield from _defects(facts, DefectKind.TRUNCATED, _FROM_ANOTHER)


@rule("CK105", "damaged-file")
def damaged_file(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A file's bytes contradict its format, its own directory or the CRC-32 they were saved with.

    Compared: the archive's directory with every local header, records with the CRC-32 of the directory (those that
    are read), the size of every tensor's record with what the pickle says, the header of a safetensors file with its
    length, `config.json` with JSON.
    """
    yield from _defects(facts, DefectKind.DAMAGED, _FROM_ANOTHER)


@rule("CK106", "unreadable-file")
def unreadable_file(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The operating system does not let the file be read."""
    yield from _defects(facts, DefectKind.UNREADABLE, "Check the file's permissions and the disk.")


@rule("CK107", "files-intact")
def files_intact(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Names each file that is there and shows no defect, with its size."""
    bad = {d.where.partition(":")[0] for d in facts.defects}
    for file in facts.files:
        if file.name not in bad:
            yield passed(f"{file.name}: {_size(file.size)}", file.name)


def _size(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 10_000 else f"{count:,} bytes"
