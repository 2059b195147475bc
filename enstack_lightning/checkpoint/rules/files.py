"""CK1xx: the files of a checkpoint are there, whole, and what they should be."""

from __future__ import annotations

from collections.abc import Iterator

from enstack_lightning.checkpoint.facts import DefectKind, Facts, Format, OddityKind
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, error, info, passed, rule, warning
from enstack_lightning.checkpoint.wording import many, size

MAX_LISTED = 10
"""Of findings of one kind in one checkpoint that many are listed one by one."""

_FROM_ANOTHER = "Use another checkpoint of this run; `enstack verify FOLDER` names the newest good one."

_OF_A_TRAINING_RUN = {"training_state.pth", "trainer_state.json", "optimizer.pt", "scheduler.pt"}

_ODD = {
    OddityKind.REPACKED: (warning, "torch reads it; make sure that you know who packed it anew, and why."),
    OddityKind.UNREFERENCED_RECORD: (warning, "torch does not read that record; save the checkpoint again to drop it."),
    OddityKind.CYCLE: (
        warning,
        "Nothing that saves checkpoints writes this; make sure that you know the file's author.",
    ),
    OddityKind.WRONG_SUFFIX: (info, "Tools that go by the suffix will take it for something else: rename it."),
    OddityKind.STRAY_FILE: (info, "No resume reads it."),
    OddityKind.OTHER_CHECKPOINT: (warning, "Move one of the two to a folder of its own, and verify each."),
    OddityKind.TOTAL_SIZE: (info, "Nothing reads that number; the tensors themselves agree with their headers."),
}


def _defects(facts: Facts, kind: DefectKind, hint: str) -> Iterator[Outcome]:
    for defect in facts.defects:
        if defect.kind is kind:
            yield error(f"{defect.where}: {defect.message}", defect.where, hint)


@rule("CK100", "not-verified", compares="that there is anything to judge", source="this package")
def not_verified(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Nothing at the path could be judged, or the verification itself broke.

    A checkpoint that breaks its verifier is not verified: whatever exception a reader or a rule meets becomes this
    error. It is also given where a reader found neither a file nor a fault. `--select` and `--ignore` do not hide it.
    """
    if not (facts.files or facts.fields or facts.tensors or facts.defects or facts.live):
        yield error("nothing in it could be verified", facts.path, "Name a checkpoint: a file, or the folder of one.")


@rule(
    "CK101",
    "missing-file",
    compares="the files that are there with those that the format demands",
    source="the original EnStack, check 2; transformers: trainer.py, modeling_utils.py; torch/distributed/checkpoint",
)
def missing_file(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A file that the checkpoint's format demands is not there, or is a link to nothing.

    A Lightning checkpoint is one file. An EnStack folder needs `training_state.pth`, `config.json`, and
    `model.safetensors` or `pytorch_model.bin`; a Hugging Face folder `config.json` and its weights, with every shard
    that `*.index.json` names; a sharded folder `.metadata` and every `.distcp` file that it names. A Trainer that finds
    `optimizer.pt` or `scheduler.pt` missing loads neither and goes on, without a word, with a new optimizer. Inference
    does without the files of a training run. A Trainer's checkpoint of a plain torch module has no `config.json`.
    """
    for outcome in _defects(facts, DefectKind.MISSING, "Check the path, or copy it again from where it was saved."):
        if options.purpose == "inference" and outcome.where in _OF_A_TRAINING_RUN:
            yield info(outcome.message, outcome.where, "Inference does not need it.")
        elif options.purpose == "resume" and outcome.where == "config.json" and _is_of_a_trainer(facts):
            yield info(outcome.message, outcome.where, "The Trainer resumes without it; from_pretrained needs it.")
        else:
            yield outcome


def _is_of_a_trainer(facts: Facts) -> bool:
    return facts.format is Format.HUGGINGFACE and not facts.model_only


@rule(
    "CK102",
    "not-a-checkpoint",
    compares="the file's first bytes and entries with those of every known format",
    source="caffe2/serialize/inline_container.cc; safetensors: README, Format",
)
def not_a_checkpoint(facts: Facts, options: Options) -> Iterator[Outcome]:
    """What stands at the path is something else than a checkpoint: a pointer, a web page, another kind of archive.

    The content decides, never the name. What it is instead is said where it can be told.
    """
    yield from _defects(
        facts,
        DefectKind.UNRECOGNISED,
        "Name a .ckpt, .pt, .pth, .bin or .safetensors file, or the folder of a checkpoint.",
    )
    if facts.format is Format.UNKNOWN and not facts.defects and (facts.files or facts.fields):
        entries = ", ".join(sorted(facts.fields)[:5]) or "no entries"
        yield error(
            f"it is a torch file, but no Lightning checkpoint: it lacks pytorch-lightning_version (it has {entries})",
            hint="Name the .ckpt file that the Trainer saved, or the folder that holds training_state.pth.",
        )


@rule("CK103", "empty-file", compares="a file's size with 0", source="the original EnStack, check 2")
def empty_file(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A file has no bytes: a save that was killed before it wrote anything, or a full disk."""
    yield from _defects(facts, DefectKind.EMPTY, _FROM_ANOTHER)


@rule(
    "CK104",
    "truncated-file",
    compares="a file's size with what its own header or directory says",
    source="the ZIP and safetensors formats",
)
def truncated_file(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A file ends before the place where its own header says that it ends: a kill, a full disk, a broken copy.

    A torch file carries its directory at its end, so a file that was cut off has none. Every cut is found without
    `--deep`.
    """
    yield from _defects(facts, DefectKind.TRUNCATED, _FROM_ANOTHER)


@rule(
    "CK105",
    "damaged-file",
    compares="bytes with their format, their directory and their CRC-32",
    source="the ZIP and safetensors formats; torch/serialization.py",
)
def damaged_file(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A file's bytes contradict its format, its own directory or the CRC-32 they were saved with.

    Compared: the archive's directory with every local header, records with the CRC-32 of the directory (those that
    are read; with `--deep` all of them), the size of every tensor's record with what the pickle says, the header of a
    safetensors file with its length, JSON files with JSON. torch itself compares no CRC-32 when it loads: it takes
    damaged weights without a word. A CRC-32 shows accidents; it does not stop somebody who wants to forge a file.
    """
    yield from _defects(facts, DefectKind.DAMAGED, _FROM_ANOTHER)


@rule("CK106", "unreadable-file", compares="that the operating system opens the file", source="open(2), stat(2)")
def unreadable_file(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The operating system does not let the file be read, or it is a pipe or device that must not be opened."""
    yield from _defects(facts, DefectKind.UNREADABLE, "Check the file's permissions and the disk.")


@rule(
    "CK107",
    "files-intact",
    Severity.PASS,
    compares="every file with the defects found in it",
    source="the original EnStack, check 2",
)
def files_intact(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Names each file that is there and shows no defect, with its size and how much of it was not compared.

    Without `--deep` the values of tensors are not read. Some formats give no checksum to compare them with (CK108).
    """
    places = [f"{d.where}:" for d in facts.defects]
    for file in facts.files:
        if not any(place.startswith(f"{file.name}:") for place in places):
            rest = f", {size(file.not_read)} of it not read (--deep compares its checksums)" if file.not_read else ""
            yield passed(f"{file.name}: {size(file.size)}{rest}", file.name)


@rule(
    "CK108",
    "no-checksum",
    Severity.INFO,
    compares="the bytes of tensors with the checksums that the format has",
    source="safetensors: README, Format; torch/serialization.py, set_crc32_options",
)
def no_checksum(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Values in a file carry no checksum: damage among them cannot be seen from the checkpoint alone.

    So it is with safetensors, with torch files of before 1.6 and with those saved under
    `torch.serialization.set_crc32_options(False)`. A manifest, written when the checkpoint is known to be good, holds a
    digest of every byte; `--deep` compares it, and where all agrees this rule says nothing.
    """
    if _digests_agree(facts):
        return
    bare = [file for file in facts.files if file.without_checksum]
    for file in bare[:MAX_LISTED]:
        yield info(
            f"{file.name}: {size(file.without_checksum)} of it carry no checksum; damage there is not checkable "
            "without a manifest",
            file.name,
            _manifest_hint(facts),
        )
    if len(bare) > MAX_LISTED:
        rest = bare[MAX_LISTED:]
        yield info(
            f"{many(len(rest), 'further file')}: {size(sum(f.without_checksum for f in rest))} carry no checksum"
        )


def _digests_agree(facts: Facts) -> bool:
    m = facts.manifest
    return m is not None and m.digests_compared and not m.differences


def _manifest_hint(facts: Facts) -> str:
    if facts.manifest is not None and not facts.manifest.defect:
        return "Compare the digests of its manifest with --deep."
    return "Write a manifest while the checkpoint is known to be good: enstack manifest PATH."


@rule(
    "CK109",
    "interrupted-save",
    Severity.WARNING,
    compares="the names of files with those of unfinished saves",
    source="fsspec, Lightning's and transformers' ways of saving",
)
def interrupted_save(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A temporary file stands in or beside the checkpoint, as a save or download that was interrupted leaves it.

    What is judged may be the state before that save. The leftover itself is not read.
    """
    for name in facts.leftovers[:MAX_LISTED]:
        yield warning(
            f"{name} was left behind by a save that did not finish",
            name,
            "Make sure that this is the checkpoint you mean, then remove the leftover.",
        )
    if len(facts.leftovers) > MAX_LISTED:
        yield warning(f"{many(len(facts.leftovers) - MAX_LISTED, 'further leftover')} of interrupted saves")


@rule(
    "CK110",
    "replaced-record",
    compares="all records' CRC-32 with the hash of them in .data/serialization_id",
    source="pytorch: caffe2/serialize/inline_container.cc, writeSerializationId",
)
def replaced_record(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A record of the archive is not the one that was saved: it was exchanged after the save, with a right CRC-32.

    torch writes a hash of all records' names and CRC-32s into the archive's last record. It shows a record that an
    accident or an editor put in, not a forger, who can compute the hash anew.
    """
    yield from _defects(facts, DefectKind.REPLACED, "Use the file as it was saved; do not load one that was changed.")


@rule(
    "CK111",
    "odd-container",
    Severity.WARNING,
    compares="the container with what torch and transformers write",
    source="caffe2/serialize/inline_container.cc; transformers: modeling_utils.py",
)
def odd_container(facts: Facts, options: Options) -> Iterator[Outcome]:
    """The file can be read and is not as the library writes it.

    Packed anew by another tool, a record that nothing refers to, an entry that contains itself, or a second checkpoint
    of another format in the folder, of which nothing was judged: a warning. A suffix
    that does not fit the content, a file that no resume reads, a total size that does not add up: worth knowing.
    """
    for oddity in facts.oddities:
        if oddity.kind in _ODD:
            say, hint = _ODD[oddity.kind]
            yield say(f"{oddity.where}: {oddity.message}" if oddity.where else oddity.message, oddity.where, hint)
