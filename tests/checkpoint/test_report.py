"""Reports in every form: each is valid by its own standard, whatever a checkpoint says and whatever its files are
called.

`tests/data/sarif-2.1.0-rtm.4.json` is the JSON Schema of SARIF 2.1.0, unchanged from the package sarif-om 1.0.4 (PyPI,
Microsoft, MIT license).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edited, enstack_folder, flip_in_pickle, truncate
from genuine import GENUINE
from jsonschema import Draft4Validator, Draft202012Validator

from enstack_lightning.checkpoint import (
    RULES,
    Finding,
    Options,
    Report,
    Severity,
    Verdict,
    newest_good,
    to_json,
    to_table,
    to_text,
    verify_checkpoint,
)
from enstack_lightning.checkpoint.facts import Facts, FileFacts, Format, ManifestFacts, SchedulerFacts
from enstack_lightning.checkpoint.rendering import html, plain, plot, sarif, text
from enstack_lightning.checkpoint.rendering import json as json_form
from enstack_lightning.checkpoint.resume import ResumePlan

HOSTILE = "a\x1b[2J\u202e<script>alert(1)</script>\udce9&\"'{0}[x](y)\n" + "n" * 5_000
VOID = {"meta", "br", "line", "circle", "polyline"}


def schema() -> Draft202012Validator:
    document = json.loads(json_form.SCHEMA.read_text())
    Draft202012Validator.check_schema(document)
    return Draft202012Validator(document)


def sarif_schema() -> Draft4Validator:
    return Draft4Validator(json.loads((Path(__file__).parents[1] / "data" / "sarif-2.1.0-rtm.4.json").read_text()))


def report(*findings: Finding, facts: Facts | None = None, resume: ResumePlan | None = None, **options: Any) -> Report:
    facts = facts or Facts("c.ckpt", Format.LIGHTNING, (FileFacts("c.ckpt", 9_000),))
    return Report(facts.path, facts, findings, resume, 0.01, Options(**options))


def finding(code: str, severity: Severity, message: str = "said", where: str = "", hint: str = "") -> Finding:
    return Finding(code, RULES[code].name, severity, message, where, hint)


@pytest.fixture(scope="module")
def reports(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    """Of real checkpoints: good, with a warning, damaged, cut off, a folder, one for inference, and none at all."""
    folder = tmp_path_factory.mktemp("reports")
    good = trained / "step=7.ckpt"
    damaged = Path(shutil.copy(good, folder / "damaged.ckpt"))
    flip_in_pickle(damaged)
    cut = Path(shutil.copy(good, folder / "cut.ckpt"))
    truncate(cut, cut.stat().st_size // 2)

    def behind(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["state"][0]["step"] = torch.tensor(3.0)

    model = enstack_folder(folder / "model")
    (model / "training_state.pth").unlink()
    return [
        verify_checkpoint(good),
        verify_checkpoint(edited(good, folder / "behind.ckpt", behind)),
        verify_checkpoint(damaged),
        verify_checkpoint(cut),
        verify_checkpoint(enstack_folder(folder / "enstack")),
        verify_checkpoint(model, Options(purpose="inference")),
        verify_checkpoint(folder / "nowhere"),
    ]


@pytest.fixture
def hostile() -> Report:
    """One whose every text and number is as bad as a checkpoint can make it."""
    findings = [Finding("CK105", "damaged-file", s, HOSTILE, HOSTILE, HOSTILE) for s in Severity]
    plan = ResumePlan("mid-epoch", 10**5_000, 1, 10**5_000, 2, 1, 3, 10**30, float("nan"))
    facts = Facts(HOSTILE, Format.LIGHTNING, (FileFacts(HOSTILE, 7, 3, 3),), globals=())
    schedule = SchedulerFacts(5, (float("inf"),), (), (), None, kind=HOSTILE, curve=((0, 1.0), (9, float("nan"))))
    facts = dataclasses.replace(facts, schedulers=(schedule,), manifest=ManifestFacts(HOSTILE, HOSTILE))
    return Report(HOSTILE, facts, tuple(findings), plan, 0.01, Options())


# JSON


def test_json_is_what_the_schema_says(reports: list[Report], hostile: Report) -> None:
    best = newest_good(reports)
    assert best is not None
    document = json.loads(to_json([*reports, hostile], best.path))
    schema().validate(document)
    assert [c["verdict"] for c in document["checkpoints"]] == [
        "pass",
        "warn",
        "fail",
        "fail",
        "pass",
        "pass",
        "fail",
        "fail",
    ]
    assert document["verdict"] == "fail"


@pytest.mark.parametrize(
    "place", [(), ("checkpoints", 0), ("checkpoints", 0, "findings", 0), ("checkpoints", 0, "resume")]
)
def test_the_schema_knows_every_key(reports: list[Report], place: tuple[Any, ...]) -> None:
    document = json.loads(to_json(reports[:1]))
    part = document
    for step in place:
        part = part[step]
    part["more"] = 1
    assert not schema().is_valid(document)
    del part["more"], part[next(iter(part))]
    assert not schema().is_valid(document)


def test_json_holds_no_nan_no_giant_and_no_half_character(hostile: Report) -> None:
    written = to_json([hostile])
    assert written.isascii()
    document = json.loads(written, parse_constant=lambda name: pytest.fail(name))
    document["checkpoints"][0]["path"].encode("utf-8")
    resume = document["checkpoints"][0]["resume"]
    assert (resume["epoch"], resume["learning_rate"], resume["optimizer_steps"], resume["step"]) == (
        None,
        None,
        None,
        1,
    )


# Text


def test_text_has_the_original_five_checks_in_its_order_and_the_others_after_them(reports: list[Report]) -> None:
    lines = [line for line in to_text(reports[0]).splitlines() if re.match(r" ?\d+ ", line)]
    titles = [line[3:20].strip().split("  ")[0] for line in lines]
    assert titles == [s.title for s in plain.SECTIONS]
    assert titles[:5] == ["files", "required files", "training state", "metadata", "optimizer"]


def test_every_rule_has_its_section() -> None:
    for code, rule in RULES.items():
        section = plain.section_of(Finding(code, rule.name, Severity.PASS, ""))
        assert code.startswith(section.codes), code


def test_one_finding_is_one_line_and_its_hint_one_more() -> None:
    said = to_text(report(finding("CK401", Severity.WARNING, "12 of 14", hint="wait")))
    assert "\n   WARNING  CK401  optimizer-step-mismatch: 12 of 14\n                   -> wait\n" in said


def test_verbose_lists_what_passed_and_the_short_form_counts_it(reports: list[Report]) -> None:
    passed = reports[0].of(Severity.PASS)
    verbose = to_text(reports[0], verbose=True)
    assert all(f"{f.code}  {f.message}" in verbose for f in passed)
    short = to_text(reports[0])
    assert "PASS     CK" not in short
    assert len(short) < len(verbose)
    assert f"{len(passed)} passed, 0 warnings, 0 errors" in short


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (report(finding("CK107", Severity.PASS)), "Checkpoint is valid and safe to resume training from."),
        (
            report(finding("CK107", Severity.PASS), purpose="inference"),
            "Checkpoint is valid and its weights are safe to load for inference.",
        ),
        (
            report(finding("CK107", Severity.PASS), finding("CK401", Severity.WARNING)),
            "Checkpoint can be used to resume training; look at the warning first.",
        ),
        (report(finding("CK105", Severity.ERROR)), "Checkpoint must not be used to resume training: 1 error."),
        (report(), "Checkpoint must not be used to resume training: nothing in it could be verified."),
        (
            report(finding("CK107", Severity.PASS), ignore=("CK4",)),
            "Nothing that was checked is wrong; --select and --ignore left rules out.",
        ),
    ],
)
def test_the_verdict_says_what_may_be_done(made: Report, sentence: str) -> None:
    assert f"verdict     {made.verdict.upper()}  {sentence}" in to_text(made)


def test_strict_says_why_a_warning_refuses() -> None:
    made = report(finding("CK107", Severity.PASS), finding("CK401", Severity.WARNING))
    assert "refused under --strict: 1 warning." in to_text(made, strict=True)


def test_a_failed_checkpoint_gives_no_resume_plan(reports: list[Report]) -> None:
    for made in reports:
        assert ("\nresume  " in to_text(made)) == (
            made.verdict is not Verdict.FAIL and made.options.purpose == "resume"
        )


def test_silence_passes_only_where_rules_were_left_out_and_nothing_is_amiss(reports: list[Report]) -> None:
    good, cut = reports[0], reports[3]
    selected = Options(select=("CK104",))
    assert verify_checkpoint(good.path, selected).verdict is Verdict.PASS
    assert verify_checkpoint(cut.path, selected).verdict is Verdict.FAIL
    assert verify_checkpoint(cut.path, Options(ignore=("CK1",))).verdict is Verdict.FAIL


def test_what_was_not_looked_at_is_said(reports: list[Report]) -> None:
    quick, folder = to_text(reports[0]), to_text(reports[4])
    assert re.search(r"^not read    [\d,]+ (kB|bytes) of tensor data; --deep reads it$", quick, flags=re.M)
    assert re.search(r"^unchecked   not checkable without a manifest: model.safetensors, \d+ bytes", folder, flags=re.M)
    assert "verified" not in quick + folder


@pytest.mark.parametrize(
    ("manifest", "deep", "said"),
    [
        (None, True, "not checkable without a manifest: w.safetensors, 475 MB without a checksum"),
        (ManifestFacts("m", defect="torn"), True, "not checkable without a manifest: w.safetensors, 475 MB"),
        (ManifestFacts("m", compared="sizes"), False, "not compared with the manifest's digests, which --deep does"),
        (ManifestFacts("m", compared="digests"), True, None),
    ],
)
def test_bytes_without_a_checksum_are_named_until_digests_were_compared(
    manifest: ManifestFacts | None, deep: bool, said: str | None
) -> None:
    facts = Facts("d", Format.SAFETENSORS, (FileFacts("w.safetensors", 475_500_000, 475_400_000),), manifest=manifest)
    shown = to_text(report(finding("CK107", Severity.PASS), facts=facts, deep=deep))
    assert (said in shown) if said else "unchecked" not in shown
    assert ("not read" in shown) == (not deep)


def test_names_from_files_cannot_write_to_the_terminal(hostile: Report) -> None:
    for style in (text.PLAIN, text.Style(unicode=True)):
        for said in (to_text(hostile, style), text.to_line(hostile, style), to_table([hostile, hostile], None, style)):
            assert "\x1b" not in said
            assert "\u202e" not in said
            assert "\\u202e" in said
            said.encode("utf-8")
    lines = to_text(hostile).splitlines()
    assert max(len(line) for line in lines[1:]) < 1_200
    assert to_text(hostile).isascii()
    assert [line.split()[0] for line in lines if " CK105 " in line] == ["INFO", "WARNING", "ERROR"]


def test_names_beyond_ascii_stay_readable_on_a_terminal() -> None:
    made = report(finding("CK107", Severity.PASS), facts=Facts("modèle 模型.ckpt", files=(FileFacts("m", 1),)))
    assert "modèle 模型.ckpt" in to_text(made, text.Style(unicode=True))
    assert "mod\\xe8le \\u6a21\\u578b.ckpt" in to_text(made)


def test_colour_changes_nothing_but_the_colour(reports: list[Report]) -> None:
    for made in reports:
        coloured = to_text(made, text.Style(colour=True))
        assert "\x1b[" in coloured
        assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == to_text(made)


def test_a_folded_report_says_what_the_whole_one_says(reports: list[Report]) -> None:
    for made in reports:
        folded = to_text(made, text.Style(columns=60))
        assert folded.split() == to_text(made).split()
        assert max(len(line) for line in folded.splitlines()[2:]) <= 60 or made.path in folded


def test_three_dots_stay_three_dots_without_a_terminal() -> None:
    assert text.PLAIN.line("a, b, \u2026 \u6a21") == "a, b, ... \\u6a21"


def test_damage_is_not_followed_by_the_word_safe(reports: list[Report]) -> None:
    good, damaged = to_text(reports[0]), to_text(reports[2])
    assert "safe to load: all 4 names in its pickle are allowed by weights_only=True" in good
    assert "safe to load" not in damaged
    assert " 8 safety          pass     all 4 names in its pickle are allowed by weights_only=True" in damaged


def test_one_is_never_called_several(reports: list[Report]) -> None:
    for made in reports:
        for said in (f.message + f.hint for f in made.findings):
            assert "(s)" not in said
            assert not re.search(r"(?<![\d,.])\b1 \w+s\b", said), said
    assert "1 checks passed" not in html.to_html(reports)


def test_what_holds_no_pickle_is_safe_to_load(reports: list[Report]) -> None:
    facts = Facts("m.safetensors", Format.SAFETENSORS, (FileFacts("m.safetensors", 900),), model_only=True)
    said = to_text(report(finding("CK205", Severity.ERROR), facts=facts))
    assert " 8 safety          pass     safe to load: no pickle in it names anything to import" in said
    assert " 5 optimizer       -        none: the checkpoint is a model alone" in said


def test_a_configuration_without_anything_to_compare_is_not_asked_for_again() -> None:
    said = to_text(report(finding("CK107", Severity.PASS), run_config={"trainer": {"logger": False}}))
    assert "10 drift           -        not compared: --config sets nothing that the checkpoint tells of" in said


def test_a_report_prints_as_its_text_and_is_short_in_a_debugger(reports: list[Report]) -> None:
    assert str(reports[0]) == to_text(reports[0])
    assert repr(reports[0]) == f"<Report on {reports[0].path!r}: pass>"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0002, "less than 1 ms"), (0.0123, "12 ms"), (2.5, "2,500 ms"), (75.04, "75.0 s")]
)
def test_times_are_said_as_one_reads_them(seconds: float, said: str) -> None:
    assert plain.elapsed(seconds) == said


# SARIF


def test_sarif_is_what_the_standard_says(reports: list[Report], hostile: Report) -> None:
    document = json.loads(sarif.to_sarif([*reports, hostile], "1.2.3"))
    sarif_schema().validate(document)
    (run,) = document["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [r["id"] for r in rules] == sorted(RULES)
    assert all(r["help"]["text"] and r["shortDescription"]["text"] for r in rules)
    expected = [f for r in [*reports, hostile] for f in r.findings if f.severity is not Severity.PASS]
    assert [r["ruleId"] for r in run["results"]] == [f.code for f in expected]
    levels = {Severity.INFO: "note", Severity.WARNING: "warning", Severity.ERROR: "error"}
    assert [r["level"] for r in run["results"]] == [levels[f.severity] for f in expected]
    assert all(rules[r["ruleIndex"]]["id"] == r["ruleId"] for r in run["results"])
    prints = [r["partialFingerprints"]["enstackFinding/v1"] for r in run["results"]]
    assert len(set(prints)) == len(prints)


def test_sarif_says_what_was_not_looked_at(reports: list[Report]) -> None:
    (run,) = json.loads(sarif.to_sarif(reports))["runs"]
    notes = [n["message"]["text"] for n in run["invocations"][0]["toolExecutionNotifications"]]
    assert any("--deep reads it" in note for note in notes)


def test_fingerprints_stay_when_figures_change() -> None:
    first, second = (
        sarif.results_of(report(finding("CK401", Severity.WARNING, f"{steps} steps", "optimizer"))).results[0]
        for steps in (12, 13)
    )
    assert first["partialFingerprints"] == second["partialFingerprints"]
    assert first["message"] != second["message"]


def test_sarif_locations_are_relative_and_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    below = {"uri": "runs/a%20b%23%25.ckpt", "uriBaseId": "%SRCROOT%"}
    assert sarif.artifact("runs/a b#%.ckpt") == below
    assert sarif.artifact("./runs/a b#%.ckpt") == below
    assert sarif.artifact(str(tmp_path / "runs" / "a b#%.ckpt")) == below
    assert sarif.artifact("c:x")["uri"] == "c%3Ax"
    assert sarif.artifact("../x.ckpt") == {"uri": (tmp_path.parent / "x.ckpt").as_uri()}
    assert sarif.artifact("/data/é.ckpt") == {"uri": "file:///data/%C3%A9.ckpt"}
    assert sarif.artifact("s3://bucket/a b.ckpt") == {"uri": "s3://bucket/a%20b.ckpt"}
    assert sarif.artifact(os.fsdecode(b"\xe9.ckpt")) == {"uri": "%E9.ckpt", "uriBaseId": "%SRCROOT%"}


def test_a_link_that_goes_round_has_a_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "round.ckpt").symlink_to("round.ckpt")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert sarif.artifact("../round.ckpt") == {"uri": (tmp_path / "round.ckpt").as_uri()}


def test_a_finding_on_a_file_of_a_folder_points_to_that_file(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c")
    (folder / "config.json").write_text("")
    result = sarif.results_of(verify_checkpoint(folder)).results[0]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].startswith("file://")
    made = report(
        finding("CK105", Severity.ERROR, where="w.bin:data/3"), facts=Facts("d", files=(FileFacts("w.bin", 1),))
    )
    (result,) = sarif.results_of(made).results
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "d/w.bin"
    assert result["locations"][0]["logicalLocations"] == [{"fullyQualifiedName": "w.bin:data/3"}]


# HTML


class Page(HTMLParser):
    """A page's tags, checked to be closed in order, its links and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def test_a_page_needs_nothing_else(reports: list[Report], hostile: Report) -> None:
    source = html.to_html([*reports, hostile], reports[0].path)
    page = Page(source)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset")]
    links = [value for name, value in page.attributes if name == "href"]
    assert links == [f"#checkpoint-{i}" for i in range(1, 9)]
    assert {value for name, value in page.attributes if name == "id"} == {str(link)[1:] for link in links}
    assert "url(" not in source
    assert "@import" not in source
    assert "<script" not in source
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", source)
    source.encode("utf-8")


def test_a_page_says_all_that_the_text_says(reports: list[Report]) -> None:
    for made in reports:
        words = Page(html.to_html([made])).text
        for f in made.findings:
            assert plain.shown(f.message) in words
            assert f.severity is Severity.PASS or plain.shown(f.hint) in words
        assert plain.verdict_sentence(made) in words
        for label, said in plain.not_seen(made):
            assert label in words
            assert said in words


def test_the_schedule_is_drawn_with_the_point_of_the_resume() -> None:
    falling = tuple((step, 1e-3 * (1 - step / 100)) for step in range(101))
    schedule = SchedulerFacts(25, (7.5e-4,), (1e-3,), (), None, kind="LinearLR", curve=falling)
    drawn = Page(plot.draw(schedule, "scheduler 0"))
    (points,) = (value for name, value in drawn.attributes if name == "points")
    at = [tuple(map(float, pair.split(","))) for pair in str(points).split()]
    assert len(at) == 101
    assert at[0][1] < at[100][1]
    cx, cy = (float(str(value)) for name, value in drawn.attributes if name in ("cx", "cy"))
    assert (cx, cy) == pytest.approx(at[25], abs=0.1)
    assert "resume: step 25, LR 7.50e-04" in drawn.text


def test_a_schedule_that_the_state_does_not_tell_is_not_drawn(reports: list[Report]) -> None:
    assert plot.draw(SchedulerFacts(5, (1e-3,), (1e-3,), (), None), "scheduler 0") == ""
    words = Page(html.to_html([reports[0]])).text
    assert "its state does not tell the rates to come" in words


@pytest.mark.parametrize("name", ["OneCycleLR", "CosineAnnealingLR", "SequentialLR"])
@pytest.mark.filterwarnings("ignore")
def test_the_schedule_of_a_real_checkpoint_is_drawn(name: str, tmp_path: Path) -> None:
    path = GENUINE[f"lightning, schedule {name} every step"].write(tmp_path)
    saved = torch.load(path, weights_only=True)["lr_schedulers"][0]
    page = Page(html.to_html([verify_checkpoint(path)]))
    assert "polyline" in page.tags
    assert f"resume: step {saved['last_epoch']}, LR {saved['_last_lr'][0]:.2e}" in page.text
    assert "next learning rates: " in page.text


def test_a_notebook_shows_the_report(reports: list[Report]) -> None:
    shown = reports[1]._repr_html_()
    assert "html" not in Page(shown).tags
    assert "WARN" in shown
