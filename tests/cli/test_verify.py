"""`enstack verify` as a user calls it: a process, its two outputs and its exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import edited, enstack_folder, truncate
from jsonschema import Draft4Validator, Draft202012Validator

from enstack_lightning.checkpoint.rendering.json import SCHEMA

SARIF_SCHEMA = Path(__file__).parents[1] / "data" / "sarif-2.1.0-rtm.4.json"
ENSTACK = [sys.executable, "-m", "enstack_lightning"]


def enstack(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*ENSTACK, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


def on_a_terminal(*arguments: str | Path, stdout_too: bool = True, **environment: str) -> tuple[str, str, int]:
    """What a terminal shows of a call, what standard output got where that was a pipe, and the exit status."""
    master, slave = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment}
    for name in ("NO_COLOR", "FORCE_COLOR"):
        variables = {k: v for k, v in variables.items() if k != name or name in environment}
    out = slave if stdout_too else subprocess.PIPE
    process = subprocess.Popen([*ENSTACK, *map(str, arguments)], stdout=out, stderr=slave, stdin=slave, env=variables)
    os.close(slave)
    piped = b"" if process.stdout is None else process.stdout.read()
    seen = b""
    while select.select([master], [], [], 60)[0]:
        try:
            chunk = os.read(master, 65_536)
        except OSError:  # the terminal's other side is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(master)
    return seen.decode(), piped.decode(), process.wait(60)


@pytest.fixture
def good(trained: Path) -> Path:
    return trained / "step=7.ckpt"


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copy(good, tmp_path / "bad.ckpt"))
    truncate(path, path.stat().st_size - 1)
    return path


@pytest.fixture
def suspicious(good: Path, tmp_path: Path) -> Path:
    def edit(checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["state"][0]["step"] = torch.tensor(3.0)

    return edited(good, tmp_path / "suspicious.ckpt", edit)


LONG = 800
"""Checkpoints that take longer than progress waits before it is shown, on a quick machine too."""


def many(folder: Path, checkpoint: Path, count: int) -> Path:
    """A folder of so many checkpoints."""
    folder.mkdir()
    for step in range(count):
        os.link(checkpoint, folder / f"step={step}.ckpt")
    return folder


# The verdict and the exit status


def test_a_good_checkpoint_ends_with_0_and_says_what_resuming_does(good: Path) -> None:
    done = enstack("verify", good)
    assert (done.returncode, done.stderr) == (0, "")
    assert "verdict     PASS  Checkpoint is valid and safe to resume training from." in done.stdout
    assert "resume      2 of 5 batches into epoch 1" in done.stdout
    assert done.stdout.isascii()


def test_a_bad_one_ends_with_1_and_says_what_to_do(bad: Path) -> None:
    done = enstack("verify", bad)
    assert (done.returncode, done.stderr) == (1, "")
    assert "CK104" in done.stdout
    assert "-> Use another checkpoint of this run" in done.stdout
    assert "verdict     FAIL" in done.stdout
    assert "resume  " not in done.stdout


def test_a_warning_ends_with_0_and_under_strict_with_1(suspicious: Path) -> None:
    assert enstack("verify", suspicious).returncode == 0
    strict = enstack("verify", suspicious, "--strict")
    assert strict.returncode == 1
    assert "verdict     WARN  Checkpoint is refused under --strict" in strict.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: enstack verify"),
        (["x", "--tolerance", "-1"], "'-1' is no whole number"),
        (["x", "--format", "xml"], "invalid choice: 'xml'"),
        (["x", "--nope"], "unrecognized arguments: --nope"),
        (["x", "-q", "-v"], "not allowed with"),
        (["x", "--select", "CK4,CK999"], "--select CK999: no rule's code is or begins so; `enstack rules` lists them"),
        (["x", "--ignore", "files"], "--ignore FILES: no rule's code is or begins so"),
        (["x", "--allow-global", "Encoder"], "'Encoder' is no MODULE.NAME"),
        (["x", "--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read: No such file or directory"),
        (["x", "--output", "no/folder.txt"], "no/folder.txt cannot be written: No such file or directory"),
        (["x", "--output", "."], ". cannot be written: it is a folder"),
    ],
)
def test_a_wrong_call_ends_with_2_and_prints_no_result(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = enstack("verify", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_path_that_is_not_there_fails(tmp_path: Path) -> None:
    done = enstack("verify", tmp_path / "nowhere.ckpt")
    assert done.returncode == 1
    assert "it is missing" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("path", ["nonsense://host/x.ckpt", "", "a\x00b", "x" * 5_000])
def test_a_path_that_cannot_be_one_fails(path: str, tmp_path: Path) -> None:
    if "\x00" in path:  # no process can be given it
        from enstack_lightning.cli.main import main

        assert main(["verify", path]) == 1
        return
    for form in ("text", "json", "sarif", "html"):
        done = enstack("verify", path, "--format", form, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout


def test_an_empty_path_is_not_the_folder_that_one_stands_in(trained: Path) -> None:
    done = enstack("verify", "", cwd=trained)
    assert done.returncode == 1
    assert "path: it is empty; is a variable of the script unset?" in done.stdout
    assert "PASS" not in done.stdout


def test_a_pattern_without_a_match_is_called_one(tmp_path: Path) -> None:
    done = enstack("verify", "runs/*/last.ckpt", cwd=tmp_path)
    assert done.returncode == 1
    assert "CK101  missing-file: runs/*/last.ckpt: nothing matches this pattern" in done.stdout


def test_an_enstack_folder_is_one_checkpoint(tmp_path: Path) -> None:
    done = enstack("verify", enstack_folder(tmp_path / "c"))
    assert done.returncode == 0
    assert "format      enstack" in done.stdout


def test_a_folder_without_checkpoints_fails(tmp_path: Path) -> None:
    done = enstack("verify", tmp_path)
    assert done.returncode == 1
    assert "none of the files of a checkpoint" in done.stdout


# What is judged


def test_the_tolerance_decides(tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "c", optimizer_steps=12)
    assert enstack("verify", folder, "--strict").returncode == 0
    assert enstack("verify", folder, "--strict", "--tolerance", "7").returncode == 1


def test_weights_alone_pass_for_inference_and_fail_for_resuming(good: Path, tmp_path: Path) -> None:
    def leave_weights(checkpoint: dict[str, Any]) -> None:
        for name in ("optimizer_states", "lr_schedulers", "loops"):
            del checkpoint[name]

    path = edited(good, tmp_path / "weights.ckpt", leave_weights)
    inference = enstack("verify", path, "--for", "inference")
    assert inference.returncode == 0
    assert "its weights are safe to load for inference" in inference.stdout
    resume = enstack("verify", path, "--for", "resume")
    assert resume.returncode == 1
    assert "holds weights only" in resume.stdout


def test_rules_are_selected_and_ignored_by_the_beginnings_of_their_codes(suspicious: Path) -> None:
    def codes(*arguments: str) -> set[str]:
        done = enstack("verify", suspicious, "--format", "json", *arguments)
        return {f["code"] for f in json.loads(done.stdout)["checkpoints"][0]["findings"]}

    everything = codes()
    assert codes("--select", "ck3, CK403") == {c for c in everything if c.startswith("CK3")} | {"CK403"}
    assert codes("--select", "CK3", "--select", "CK403") == codes("--select", "CK3,CK403")
    assert codes("--ignore", "CK4") == {c for c in everything if not c.startswith("CK4")}
    strict = enstack("verify", suspicious, "--strict", "--ignore", "CK4")
    assert strict.returncode == 0
    assert "not judged  what --ignore CK4 leaves out" in strict.stdout


def test_deep_reads_everything_and_says_so(good: Path) -> None:
    quick, deep = (
        json.loads(enstack("verify", good, "--format", "json", *more).stdout)["checkpoints"][0]["coverage"]
        for more in ((), ("--deep",))
    )
    assert (quick["deep"], quick["bytes_not_read"] > 0) == (False, True)
    assert (deep["deep"], deep["bytes_not_read"]) == (True, 0)


# The run that is to resume


@pytest.fixture
def own_class(good: Path, tmp_path: Path) -> Path:
    """A checkpoint that names a class which `weights_only=True` does not allow."""

    def edit(checkpoint: dict[str, Any]) -> None:
        checkpoint["folder"] = Path("x")

    return edited(good, tmp_path / "own.ckpt", edit)


def test_a_user_vouches_for_his_own_classes(own_class: Path, tmp_path: Path) -> None:
    vouched = [f"--allow-global=pathlib.{name}" for name in ("Path", "PosixPath")]
    vouched += [f"--allow-global=pathlib._local.{name}" for name in ("Path", "PosixPath")]
    assert enstack("verify", own_class).returncode == 1
    assert enstack("verify", own_class, *vouched).returncode == 0
    names = "[pathlib.PosixPath, pathlib._local.PosixPath, pathlib.Path]"
    guard = f"{{class_path: enstack_lightning.CheckpointGuard, init_args: {{allow_globals: {names}}}}}"
    for text in (
        f"trainer: {{callbacks: [{{class_path: Other}}, {guard}]}}",
        f"trainer: {{callbacks: {guard}}}",
        f"checkpoint_guard: {{allow_globals: {names}}}",
    ):
        (tmp_path / "run.yaml").write_text(text)
        done = enstack("verify", own_class, "--config", tmp_path / "run.yaml", "--ignore", "CK9")
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: [1,\nb: 2", "is no YAML (line 2)"),
        (b"- 1\n- 2\n", "holds no run: it must be a mapping"),
        (b"", "holds no run"),
        (b"\xff\xfe\x00", "is no YAML"),
        (b"a: !!python/object/apply:os.system ['touch executed']", "is no YAML (line 1)"),
        (b"[" * 5_000, "is no YAML"),
        (b"trainer: {callbacks: [{class_path: CheckpointGuard, init_args: {allow_globals: [x]}}]}", "'x' is no MODULE"),
    ],
)
def test_a_configuration_that_is_none_ends_with_2_and_one_sentence(
    text: bytes, said: str, good: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_bytes(text)
    done = enstack("verify", good, "--config", "run.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_odd_configurations_break_nothing(good: Path, tmp_path: Path) -> None:
    for text in ("trainer: 3", "trainer: {callbacks: 3}", "trainer: {callbacks: [null, 3, {class_path: 7}]}", "a: 1"):
        (tmp_path / "run.yaml").write_text(text)
        assert enstack("verify", good, "--config", tmp_path / "run.yaml").returncode == 0


# Forms


def test_json_is_one_object_and_nothing_else(good: Path, bad: Path, suspicious: Path, tmp_path: Path) -> None:
    folder = enstack_folder(tmp_path / "folder")
    done = enstack("verify", good, bad, suspicious, folder, tmp_path / "nowhere", "--format", "json")
    assert (done.returncode, done.stderr) == (1, "")
    document = json.loads(done.stdout)
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(document)
    assert (document["version"], document["verdict"]) == (1, "fail")
    assert [c["verdict"] for c in document["checkpoints"]] == ["pass", "fail", "warn", "pass", "fail"]
    assert [c["format"] for c in document["checkpoints"]][::3] == ["lightning", "enstack"]
    for entry in document["checkpoints"]:
        severities = [f["severity"] for f in entry["findings"]]
        assert entry["summary"] == {
            "passed": severities.count("pass"),
            "warnings": severities.count("warning"),
            "errors": severities.count("error"),
        }


def test_sarif_points_to_the_file(bad: Path) -> None:
    done = enstack("verify", bad.name, "--format", "sarif", cwd=bad.parent)
    assert (done.returncode, done.stderr) == (1, "")
    document = json.loads(done.stdout)
    Draft4Validator(json.loads(SARIF_SCHEMA.read_text())).validate(document)
    (result,) = (r for r in document["runs"][0]["results"] if r["level"] == "error")
    assert result["ruleId"] == "CK104"
    location = result["locations"][0]["physicalLocation"]["artifactLocation"]
    assert location == {"uri": "bad.ckpt", "uriBaseId": "%SRCROOT%"}


def test_html_is_one_page(good: Path, bad: Path) -> None:
    done = enstack("verify", good, bad, "--format", "html")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("<!DOCTYPE html>")
    assert done.stdout.count("<article") == 2


def test_quiet_is_the_verdict_and_verbose_every_rule(good: Path, bad: Path) -> None:
    assert enstack("verify", "-q", good).stdout == f"PASS  {good}\n"
    assert enstack("verify", "-q", good, bad).stdout == f"PASS  {good}\nFAIL  {bad}\n"
    passed = enstack("verify", "-v", good).stdout.count("   PASS     CK")
    assert f"summary     {passed} passed," in enstack("verify", good).stdout
    several = enstack("verify", "-v", good, bad).stdout
    assert several.count("checkpoint  ") == 2
    assert several.splitlines()[-1] == f"newest good  {good} (global step 7)"


def test_the_report_goes_to_a_file(good: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("of yesterday")
    done = enstack("verify", good, "--format", "json", "--output", target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(target.read_text())["verdict"] == "pass"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    enstack("verify", good, "--output", target, env={**os.environ, "FORCE_COLOR": "1"})
    assert target.read_text().startswith("checkpoint  ")
    assert "\x1b" not in target.read_text()


def test_a_link_that_goes_round_makes_way_for_the_report(good: Path, tmp_path: Path) -> None:
    (tmp_path / "report.txt").symlink_to("report.txt")
    done = enstack("verify", good, "--output", tmp_path / "report.txt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "verdict     PASS" in (tmp_path / "report.txt").read_text()


def test_a_device_is_written_to_and_not_replaced(good: Path, tmp_path: Path) -> None:
    assert enstack("verify", good, "--output", "/dev/null").returncode == 0
    assert Path("/dev/null").is_char_device()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "target.txt")
    assert enstack("verify", good, "--output", link).returncode == 0
    assert link.is_symlink()
    assert "PASS" in (tmp_path / "target.txt").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_full_disk_ends_with_2(form: str, good: Path) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [*ENSTACK, "verify", str(good), "--format", form]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "enstack verify: standard output cannot be written: No space left on device\n"


# Many checkpoints


def test_a_folder_gives_a_line_each_and_names_the_newest_good(trained: Path, tmp_path: Path) -> None:
    for step in (3, 7, 12):
        shutil.copy(trained / f"step={step}.ckpt", tmp_path / f"s{step}.ckpt")
    truncate(tmp_path / "s12.ckpt", 1000)
    enstack_folder(tmp_path / "folder", epoch=1, batches=4)
    done = enstack("verify", tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["PASS", "PASS", "PASS", "FAIL"]
    assert "CK104" in lines[3]
    assert lines[-1] == f"newest good  {tmp_path / 's7.ckpt'} (global step 7)"
    assert any(line.startswith("checkpoints  4: 3 pass, 1 fail") for line in lines)


def test_patterns_work_without_a_shell_and_nothing_is_verified_twice(trained: Path) -> None:
    done = enstack("verify", "-q", "step=1?.ckpt", "step=11.ckpt", cwd=trained)
    assert done.stdout.splitlines() == [f"PASS  step={n}.ckpt" for n in range(10, 16)]
    nothing = enstack("verify", "-q", "nothing*.ckpt", cwd=trained)
    assert (nothing.returncode, nothing.stdout) == (1, "FAIL  nothing*.ckpt\n")


def test_under_strict_the_newest_good_one_has_no_warning(good: Path, suspicious: Path) -> None:
    earlier = good.parent / "step=3.ckpt"
    for more, best in (((), suspicious), (("--strict",), earlier)):
        done = enstack("verify", suspicious, earlier, *more)
        assert done.stdout.splitlines()[-1].startswith(f"newest good  {best} ")


def test_a_thousand_checkpoints_stream_in_bounded_memory(good: Path, tmp_path: Path) -> None:
    thousand = many(tmp_path / "many", good, 1_000)
    process = subprocess.Popen([*ENSTACK, "verify", str(thousand)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("PASS")
    assert process.poll() is None, "the first line came only with the last"
    lines = [first, *process.stdout]
    assert process.wait(60) == 0
    assert len(lines) == 1_000 + 4
    assert len({line.index("  2 of 5 batches") for line in lines[:1_000]}) == 1
    script = (
        "import resource, sys; from enstack_lightning.cli.main import main; main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for path in (thousand / "step=0.ckpt", thousand):
        command = [sys.executable, "-c", script, "verify", str(path)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stderr))
    assert peaks[1] - peaks[0] < 16_000, "KiB"


def test_a_reader_that_closes_early_gets_no_traceback(trained: Path) -> None:
    command = f"{sys.executable} -m enstack_lightning verify {trained} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.startswith("PASS")
    assert done.stderr == ""


def test_a_closed_standard_output_breaks_nothing(good: Path) -> None:
    command = f"exec {sys.executable} -m enstack_lightning verify {good} >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# Terminals


def test_a_terminal_gets_colour_and_a_pipe_none(good: Path) -> None:
    seen, _, status = on_a_terminal("verify", good)
    assert status == 0
    assert "\x1b[32mPASS\x1b[0m" in seen
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        plain, _, _ = on_a_terminal("verify", good, **environment)
        assert "\x1b" not in plain
        assert "PASS" in plain
    assert "\x1b" not in enstack("verify", good).stdout
    forced = enstack("verify", good, env={**os.environ, "FORCE_COLOR": "1"})
    assert "\x1b[32mPASS\x1b[0m" in forced.stdout


def test_a_narrow_terminal_gets_folded_lines_and_a_pipe_whole_ones(trained: Path, bad: Path) -> None:
    one, _, _ = on_a_terminal("verify", trained / "step=7.ckpt", COLUMNS="80", NO_COLOR="1")
    table, _, _ = on_a_terminal("verify", trained / "step=7.ckpt", bad, COLUMNS="80", NO_COLOR="1")
    path = max(len(str(p)) for p in (trained / "step=7.ckpt", bad))
    for said in (one, table):
        assert max(len(line) for line in said.splitlines()) <= max(80, path + 14)
    assert " done); continues with\n            epoch 1, batch 2 of 5; 0" in one.replace("\r", "")
    assert f"PASS  {trained / 'step=7.ckpt'}\n      2 of 5 batches into epoch 1" in table.replace("\r", "")
    _, piped, _ = on_a_terminal("verify", trained / "step=7.ckpt", stdout_too=False, COLUMNS="80")
    assert max(len(line) for line in piped.splitlines()) > 100


def test_names_beyond_ascii_are_shown_where_they_can_be(good: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(good, tmp_path / "modèle 模型.ckpt"))
    assert "modèle 模型.ckpt" in on_a_terminal("verify", "-q", path)[0]
    escaped = "mod\\xe8le \\u6a21\\u578b.ckpt"
    assert escaped in on_a_terminal("verify", "-q", path, PYTHONIOENCODING="ascii")[0]
    assert escaped in enstack("verify", path, env={**os.environ, "LC_ALL": "C"}).stdout
    bytewise = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = enstack("verify", path, env=bytewise)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mod\\udcc3\\udca8le" in done.stdout


def test_progress_is_shown_on_a_terminal_and_leaves_the_results_alone(good: Path, tmp_path: Path) -> None:
    folder = many(tmp_path / "many", good, LONG)
    seen, piped, status = on_a_terminal("verify", folder, stdout_too=False)
    assert status == 0
    assert f"of {LONG}" in seen
    assert "\x1b[2K" in seen, "the bar is taken away"
    assert len(piped.splitlines()) == LONG + 4
    assert "\x1b" not in piped
    both, _, _ = on_a_terminal("verify", folder, NO_COLOR="1")
    shown = [re.sub(r"\x1b\[\?25[hl]", "", line.rpartition("\x1b[2K")[2]) for line in both.split("\n")]
    passed = [line.strip("\r") for line in shown if line.startswith("PASS")]
    assert len(passed) == LONG
    for line, whole in zip(passed, piped.splitlines(), strict=False):  # a terminal folds long lines
        assert whole.startswith(line.rstrip())


def test_nobody_is_shown_progress_who_did_not_ask_or_cannot_see_it(good: Path, tmp_path: Path) -> None:
    folder = many(tmp_path / "many", good, LONG)
    assert on_a_terminal("verify", "-q", folder, stdout_too=False)[0] == ""
    assert on_a_terminal("verify", folder, stdout_too=False, TERM="dumb")[0] == ""
    assert enstack("verify", folder).stderr == ""


def test_names_that_are_no_text_are_shown_and_break_nothing(good: Path, tmp_path: Path) -> None:
    name = b"caf\xe9\x1b[31m\n\xe2\x80\xae<b>.ckpt"
    path = Path(shutil.copy(good, Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))))
    for form in ("text", "json", "sarif", "html"):
        done = enstack("verify", path, "--format", form)
        assert (done.returncode, done.stderr) == (0, "")
        assert not {"\x1b", "\u202e"} & set(done.stdout)
        if form in ("json", "sarif"):
            json.dumps(json.loads(done.stdout), ensure_ascii=False).encode("utf-8")
    assert "\x1b[31m" not in on_a_terminal("verify", path)[0]


# The start


def test_a_verification_imports_no_more_than_it_needs(good: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "enstack_lightning", "verify", str(good)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "numpy", "yaml", "rich", "fsspec", "html", "blake3"}
    assert not imported & {f"enstack_lightning.checkpoint.rendering.{form}" for form in ("html", "sarif")}
