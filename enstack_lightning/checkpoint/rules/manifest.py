"""CK8xx: the files are those that the manifest beside the checkpoint lists."""

from __future__ import annotations

from collections.abc import Iterator

from enstack_lightning.checkpoint.facts import Facts
from enstack_lightning.checkpoint.rules.rule import Options, Outcome, Severity, error, passed, rule
from enstack_lightning.checkpoint.wording import many


@rule(
    "CK801",
    "manifest-difference",
    compares="every file's size (with --deep its BLAKE3 digest) with the manifest",
    source="the manifest beside the checkpoint",
)
def manifest_difference(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A file is missing, of another size, or of other content than when the manifest was written.

    The manifest finds what no format shows by itself: a bit turned over in a safetensors file, a file of another save.
    Without `--deep` only names and sizes are compared. Where the checkpoint was changed on purpose, write the
    manifest anew.
    """
    if facts.manifest is None or facts.manifest.defect:
        return
    for where, message in facts.manifest.differences:
        yield error(
            f"{where}: {message}",
            where,
            "Use another checkpoint, or copy it again; after a change on purpose: enstack manifest PATH.",
        )


@rule(
    "CK802",
    "manifest-unreadable",
    compares="the manifest with its own form",
    source="the manifest beside the checkpoint",
)
def manifest_unreadable(facts: Facts, options: Options) -> Iterator[Outcome]:
    """A manifest stands beside the checkpoint and cannot be used: it is damaged, or of a form that is not known.

    An unusable manifest is no reason to trust the files less, and none to call them verified: it is an error until it
    is written anew or removed.
    """
    if facts.manifest is not None and facts.manifest.defect:
        yield error(
            f"the manifest cannot be used: {facts.manifest.defect}",
            facts.manifest.path,
            "Restore the manifest, or remove it if you trust the checkpoint without one.",
        )


@rule("CK803", "manifest-agrees", Severity.PASS, compares="as CK801", source="the manifest beside the checkpoint")
def manifest_agrees(facts: Facts, options: Options) -> Iterator[Outcome]:
    """Every file is as the manifest says: by size, or with `--deep` to the last bit.

    A digest is only as trustworthy as the manifest: who can change both can make them agree.
    """
    m = facts.manifest
    if m is None or m.defect or m.differences:
        return
    files = many(m.files, "file")
    if m.compared == "digests":
        yield passed(f"{files} with the BLAKE3 digests of the manifest", m.path)
    else:
        yield passed(f"{files} with the names and sizes of the manifest (--deep compares the digests)", m.path)
