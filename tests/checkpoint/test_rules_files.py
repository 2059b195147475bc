"""What the rules on files, state and manifest say of facts, and that the table of rules says the truth about itself."""

from __future__ import annotations

import dataclasses
import dis
import re
import types
from collections.abc import Iterator
from typing import Any

import pytest

from enstack_lightning.checkpoint import RULES, Finding, Options, Rule, Severity, judge
from enstack_lightning.checkpoint.facts import (
    Defect,
    DefectKind,
    Facts,
    FileFacts,
    Format,
    ManifestFacts,
    Oddity,
    OddityKind,
    RunFacts,
    TensorFacts,
)

WEIGHT = TensorFacts("layer.weight", "float32", (2, 4))


def findings(facts: Facts, *codes: str, **options: Any) -> list[tuple[str, str, str]]:
    """Code, severity and message of what the rules of these codes say, CK100 apart."""
    found = judge(facts, Options(select=codes, **options))
    return [(f.code, f.severity, f.message) for f in found if f.code != "CK100" or "CK100" in codes]


def files(*names: str, **facts: Any) -> Facts:
    return Facts("c", files=tuple(FileFacts(name, 20_000) for name in names), **facts)


# The table


def test_families_of_rules_are_in_the_table() -> None:
    families = {code[:3] for code in RULES}
    assert families >= {f"CK{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8)}


@pytest.mark.parametrize("code", sorted(RULES))
def test_a_rule_states_the_worst_that_it_can_say(code: str) -> None:
    said = severities(RULES[code].check)
    order = list(Severity)
    assert RULES[code].severity is max(said, key=order.index), said


@pytest.mark.parametrize("code", sorted(RULES))
def test_a_rule_is_explained(code: str) -> None:
    rule = RULES[code]
    assert re.fullmatch(r"CK\d{3}", code)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.name)
    assert rule.summary.endswith((".", ":"))
    assert rule.summary == rule.explanation.partition("\n\n")[0].replace("\n", " ")
    assert rule.compares
    assert not rule.compares.endswith(".")
    assert rule.source


def severities(check: types.FunctionType) -> set[Severity]:
    """The severities that a rule's function, or any function of its module that it calls, gives."""
    given = {"passed": Severity.PASS, "info": Severity.INFO, "warning": Severity.WARNING, "error": Severity.ERROR}
    seen: set[str] = set()
    names = list(names_in(check.__code__))
    while names:
        name = names.pop()
        value = check.__globals__.get(name)
        if name in seen or value is None:
            continue
        seen.add(name)
        if isinstance(value, types.FunctionType) and value.__module__ == check.__module__:
            names += names_in(value.__code__)
        elif isinstance(value, dict):  # a table that names them
            names += [
                each.__name__ for row in value.values() if isinstance(row, tuple) for each in row if callable(each)
            ]
    return {given[name] for name in seen & given.keys()}


def names_in(code: types.CodeType) -> Iterator[str]:
    yield from (i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_GLOBAL"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def test_rules_are_chosen_and_left_out_by_the_beginning_of_their_code() -> None:
    facts = files("c.ckpt", tensors=(WEIGHT,), fields={"x": "int"}, format=Format.TORCH)
    codes = {f.code for f in judge(facts)}
    assert codes >= {"CK107", "CK203"}
    assert {f.code for f in judge(facts, Options(select=("CK2",)))} == {c for c in codes if c.startswith("CK2")}
    assert {f.code for f in judge(facts, Options(select=("CK107", "CK2"), ignore=("CK20",)))} == {"CK107"}
    assert {f.code for f in judge(facts, Options(ignore=("CK107",)))} == codes - {"CK107"}


def test_nothing_to_judge_is_never_left_out() -> None:
    for options in (Options(), Options(select=("CK4",)), Options(ignore=("CK1",)), Options(purpose="inference")):
        assert [(f.code, f.severity) for f in judge(Facts("c"), options)] == [("CK100", "error")]


def test_a_rule_can_be_made_without_more_than_code_and_name() -> None:
    def check(facts: Facts, options: Options) -> list[Any]:
        """Says nothing."""
        return []

    rule = Rule("CK999", "mine", check)
    assert (rule.severity, rule.summary, rule.findings(Facts("c"), Options())) == (Severity.ERROR, "Says nothing.", [])


# Files


DEFECTS = {
    DefectKind.MISSING: "CK101",
    DefectKind.UNRECOGNISED: "CK102",
    DefectKind.EMPTY: "CK103",
    DefectKind.TRUNCATED: "CK104",
    DefectKind.DAMAGED: "CK105",
    DefectKind.UNREADABLE: "CK106",
    DefectKind.MISSHAPEN: "CK204",
    DefectKind.REPLACED: "CK110",
}


def test_a_file_with_a_colon_in_its_name_is_not_called_intact() -> None:
    for where in ("10:30.ckpt", "10:30.ckpt:data.pkl"):
        facts = files("10:30.ckpt", "a.ckpt", defects=(Defect(DefectKind.DAMAGED, where, "it is wrong"),))
        assert [message for _, _, message in findings(facts, "CK107")] == ["a.ckpt: 20 kB"]


@pytest.mark.parametrize("kind", DefectKind)
def test_every_kind_of_defect_is_an_error_of_one_rule(kind: DefectKind) -> None:
    facts = files("c.ckpt", defects=(Defect(kind, "c.ckpt:data/3", "it is wrong"),))
    errors = [(code, message) for code, severity, message in findings(facts, "CK1", "CK2") if severity == "error"]
    assert [code for code, _ in errors] == [DEFECTS[kind]]
    assert "it is wrong" in errors[0][1]
    assert "CK107" not in [code for code, _, _ in findings(facts, "CK1")], "not called intact"


def test_inference_does_without_the_files_of_a_training_run() -> None:
    facts = files("model.safetensors", defects=(Defect(DefectKind.MISSING, "optimizer.pt", "it is missing"),))
    assert findings(facts, "CK101")[0][1] == "error"
    assert findings(facts, "CK101", purpose="inference")[0][1] == "info"
    facts = files("x", defects=(Defect(DefectKind.MISSING, "model.safetensors", "it is missing"),))
    assert findings(facts, "CK101", purpose="inference")[0][1] == "error"


def test_what_was_not_read_is_said() -> None:
    facts = Facts(
        "c", files=(FileFacts("c.ckpt", 1_500_000_000, not_read=1_499_000_000), FileFacts("config.json", 700))
    )
    assert [message for _, _, message in findings(facts, "CK107")] == [
        "c.ckpt: 1,500 MB, 1,499 MB of it not read (--deep compares its checksums)",
        "config.json: 700 bytes",
    ]


def manifest(**facts: Any) -> ManifestFacts:
    return ManifestFacts("c.manifest.json", **{"files": 3, **facts})


def test_files_without_checksums_are_named_until_a_manifest_vouches_for_every_byte() -> None:
    bare = FileFacts("model.safetensors", 500_000_000, without_checksum=499_990_000)
    facts = Facts("c", files=(bare,))
    ((code, severity, message),) = findings(facts, "CK108")
    assert (code, severity) == ("CK108", "info")
    assert message == (
        "model.safetensors: 500 MB of it carry no checksum; damage there is not checkable without a manifest"
    )
    for its, silent in (
        (manifest(compared="digests"), True),
        (manifest(compared="sizes"), False),
        (manifest(compared="digests", defect="no JSON"), False),
        (manifest(compared="digests", differences=(("model.safetensors", "other bytes"),)), False),
    ):
        assert (findings(Facts("c", files=(bare,), manifest=its), "CK108") == []) is silent
    assert len(findings(Facts("c", files=(bare,) * 1000), "CK108")) == 11
    assert findings(files("c.ckpt"), "CK108") == []


def test_leftovers_of_an_interrupted_save_are_a_warning_each() -> None:
    found = findings(files("c.ckpt", leftovers=("tmp-checkpoint-5", "a.part")), "CK109")
    assert found[0] == ("CK109", "warning", "tmp-checkpoint-5 was left behind by a save that did not finish")
    assert len(findings(files("c.ckpt", leftovers=("x",) * 1000), "CK109")) == 11
    assert findings(files("c.ckpt"), "CK109") == []


@pytest.mark.parametrize(
    ("kind", "severity"),
    [
        (OddityKind.REPACKED, "warning"),
        (OddityKind.UNREFERENCED_RECORD, "warning"),
        (OddityKind.CYCLE, "warning"),
        (OddityKind.WRONG_SUFFIX, "info"),
        (OddityKind.STRAY_FILE, "info"),
        (OddityKind.TOTAL_SIZE, "info"),
    ],
)
def test_odd_containers(kind: OddityKind, severity: str) -> None:
    facts = files("c.ckpt", oddities=(Oddity(kind, "c.ckpt", "it is odd"),))
    assert findings(facts, "CK111") == [("CK111", severity, "c.ckpt: it is odd")]


@pytest.mark.parametrize("kind", OddityKind)
def test_no_oddity_is_forgotten(kind: OddityKind) -> None:
    facts = files("c.ckpt", oddities=(Oddity(kind, "c.ckpt", "it is odd"),))
    (message,) = (message for _, _, message in findings(facts, "CK111", "CK605", "CK705"))
    assert message.startswith("c.ckpt: it is odd")


# State


LIGHTNING = {
    "epoch": "int",
    "global_step": "int",
    "pytorch-lightning_version": "str",
    "state_dict": "OrderedDict",
    "loops": "dict",
    "callbacks": "dict",
    "optimizer_states": "list",
    "lr_schedulers": "list",
}
WHOLE: dict[Format, dict[str, str]] = {
    Format.LIGHTNING: LIGHTNING,
    Format.SHARDED: {k: v for k, v in LIGHTNING.items() if k not in ("state_dict", "optimizer_states")},
    Format.ENSTACK: {"epoch": "int", "step": "int", "optimizer_state_dict": "dict"},
    Format.HUGGINGFACE: {"epoch": "float", "global_step": "int", "max_steps": "int", "num_train_epochs": "int"},
}
NEEDED = {
    Format.LIGHTNING: ["epoch", "global_step", "state_dict", "loops", "optimizer_states", "lr_schedulers"],
    Format.SHARDED: ["epoch", "global_step", "loops", "lr_schedulers"],
    Format.ENSTACK: ["epoch", "step", "optimizer_state_dict"],
    Format.HUGGINGFACE: ["epoch", "global_step"],
}


def state(of: Format, fields: dict[str, str], **facts: Any) -> Facts:
    return Facts("c", of, fields=fields, tensors=(WEIGHT,), **facts)


@pytest.mark.parametrize("of", WHOLE)
def test_a_whole_state_passes(of: Format) -> None:
    found = findings(state(of, WHOLE[of]), "CK201")
    assert [severity for _, severity, _ in found] == ["pass"]
    assert f"all {len(NEEDED[of])} entries" in found[0][2]


@pytest.mark.parametrize(("of", "name"), [(of, name) for of, names in NEEDED.items() for name in names])
def test_a_missing_entry_and_one_of_another_type_are_errors(of: Format, name: str) -> None:
    less = {k: v for k, v in WHOLE[of].items() if k != name}
    assert findings(state(of, less), "CK201") == [("CK201", "error", f"{name} is missing from the training state")]
    found = findings(state(of, {**WHOLE[of], name: "complex"}), "CK201")
    assert [severity for _, severity, _ in found] == ["error"]
    assert f"{name} is of type complex" in found[0][2]


def test_inference_needs_the_weights_alone() -> None:
    facts = state(Format.LIGHTNING, {"state_dict": "dict"})
    assert [severity for _, severity, _ in findings(facts, "CK2", purpose="inference")] == ["pass"] * 3
    for of in (Format.SHARDED, Format.ENSTACK, Format.HUGGINGFACE):
        assert all(s == "pass" for _, s, _ in findings(state(of, {"x": "int"}), "CK2", purpose="inference"))


@pytest.mark.parametrize(
    ("version", "severity"),
    [("0.10.0", "pass"), ("1.5.10", "pass"), ("1.6.0", "error"), ("2.6.6", "error"), ("", "error"), ("new", "error")],
)
def test_lightning_saves_loops_since_1_6(version: str, severity: str) -> None:
    fields = {k: v for k, v in LIGHTNING.items() if k != "loops"}
    facts = state(Format.LIGHTNING, fields, versions={"lightning": version})
    assert [s for _, s, _ in findings(facts, "CK201")] == [severity]


@pytest.mark.parametrize("of", [Format.HUGGINGFACE, Format.SAFETENSORS, Format.TORCH, Format.SHARDED, Format.LIGHTNING])
def test_a_model_alone_serves_inference_and_no_resume(of: Format) -> None:
    facts = state(of, {"state_dict": "dict"}, model_only=True)
    ((code, severity, message),) = findings(facts, "CK205", "CK201")
    assert (code, severity) == ("CK205", "error")
    assert "weights only" in message
    assert findings(facts, "CK205", purpose="inference")[0][1] == "pass"
    assert findings(dataclasses.replace(facts, live=True), "CK205") == []


def test_random_states_of_the_trainer() -> None:
    def said(*names: str, world: int | None = None, **facts: Any) -> list[tuple[str, str, str]]:
        its = files(*names, format=Format.HUGGINGFACE, fields=WHOLE[Format.HUGGINGFACE], run=RunFacts(world_size=world))
        return findings(its, "CK206", **facts)

    assert said("optimizer.pt")[0][1] == "info"
    assert said("rng_state.pth") == [("CK206", "pass", "the random state is there")]
    assert said("rng_state_0.pth", "rng_state_1.pth")[0][1:] == ("pass", "the random state of all 2 processes is there")
    assert said("rng_state_0.pth", "rng_state_3.pth")[0][1:] == (
        "warning",
        "random state of 2 of 4 processes: none for process 1, 2",
    )
    assert said("rng_state_0.pth", "rng_state_1.pth", world=8)[0][1] == "warning"
    assert said(f"rng_state_{'9' * 100}.pth")[0][1] == "warning"
    assert said("optimizer.pt", purpose="inference") == []


# Manifest


def test_a_manifest_that_agrees_passes_by_size_and_by_digest() -> None:
    for compared, words in (("sizes", "names and sizes"), ("digests", "BLAKE3")):
        ((code, severity, message),) = findings(files("c", manifest=manifest(compared=compared)), "CK8")
        assert (code, severity) == ("CK803", "pass")
        assert words in message


def test_every_difference_from_the_manifest_is_an_error() -> None:
    its = manifest(differences=(("a", "it has 3 bytes, and had 4"), ("b", "it is missing")))
    assert findings(files("c", manifest=its), "CK8") == [
        ("CK801", "error", "a: it has 3 bytes, and had 4"),
        ("CK801", "error", "b: it is missing"),
    ]


def test_a_manifest_that_cannot_be_used_is_an_error_and_compares_nothing() -> None:
    its = manifest(defect="it is no valid JSON", differences=(("a", "x"),))
    assert findings(files("c", manifest=its), "CK8") == [
        ("CK802", "error", "the manifest cannot be used: it is no valid JSON")
    ]
    assert findings(files("c"), "CK8") == []


def test_findings_name_what_to_do() -> None:
    facts = files(
        "c.ckpt",
        defects=tuple(Defect(kind, "c.ckpt", "it is wrong") for kind in DefectKind),
        manifest=manifest(differences=(("a", "x"),)),
        leftovers=("a.part",),
    )
    found: list[Finding] = [f for f in judge(facts) if f.severity in ("error", "warning")]
    assert len(found) == 10
    assert all(f.hint.endswith((".", "PATH.")) for f in found)
