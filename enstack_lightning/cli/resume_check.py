"""`enstack resume-check`: proves for a run's own model and data that a resumed run equals one that never stopped.

The run is trained for a few steps twice, in processes of their own: once undisturbed, and once killed with SIGKILL at a
random moment and started again with `--ckpt_path auto`. After every batch both write down what decides the next one;
the first line that differs says where they part, and what in it differs says why.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from enstack_lightning.checkpoint.rendering.plain import printable
from enstack_lightning.checkpoint.wording import many
from enstack_lightning.cli import CHECKPOINT_CALLBACKS
from enstack_lightning.cli.output import say
from enstack_lightning.cli.progress import ProgressBar, wants_progress
from enstack_lightning.errors import EnStackError

MOMENTS = {
    "batch": "before a batch",
    "forward": "after a forward pass",
    "step": "after a step",
    "save": "while a checkpoint was saved",
}
CAUSES = {
    "batches": "The loader's position or the counters of the loops are not in the checkpoint: use a resumable loader "
    "(torchdata's StatefulDataLoader, and a sampler with a state).",
    "data": "Other rows, or rows that were changed at random: a worker without a seed, a shuffle that the loader's "
    "state does not hold, or a dataset that draws from a generator of its own.",
    "lrs": "A scheduler whose state is not in the checkpoint, or a rate that was set by hand.",
    "random": "Random numbers drawn from a generator between the checkpoint and the first batch, or whose state is not "
    "in the checkpoint.",
    "loss": "A module, metric or callback that keeps something that is not in the checkpoint (an attribute instead of "
    "a buffer), or a random generator of its own.",
    "weights": "Gradients that were gathered before the checkpoint, or an optimizer or hook with a state that is not "
    "in the checkpoint.",
    "optimizer": "An optimizer with a state that is not in the checkpoint.",
}
UNREPEATABLE = (
    "Not the resume: two undisturbed runs differ too. An operation without a deterministic form, or a "
    "random generator without a seed; see torch.use_deterministic_algorithms and --trainer.deterministic."
)
_NAMES = {"lrs": "learning rates", "random": "random state", "data": "the batch's data"}
_POLL_SECONDS = 0.1

Line = dict[str, Any]
Place = tuple[int, int]
"""Epoch and batch, both counted from 0."""


@dataclass(frozen=True)
class Difference:
    """Where two runs part.

    Attributes:
        epoch: of the first batch that differs, counted from 0.
        batch: its number in the epoch, counted from 0.
        step: optimizer steps after it.
        what: what differs first: `batches`, or a key of the record's lines.
        expected: its value in the undisturbed run.
        actual: its value in the resumed run.
    """

    epoch: int
    batch: int
    step: int
    what: str
    expected: str
    actual: str

    def __str__(self) -> str:
        where = f"epoch {self.epoch}, batch {self.batch} (step {self.step:,})"
        if self.what == "batches":
            return f"{where}: {self.actual}, {self.expected}"
        return f"{where}: {_NAMES.get(self.what, self.what)} {self.actual}, undisturbed {self.expected}"


def main(argv: Sequence[str]) -> int:
    """Runs `enstack resume-check`: 0 the runs are the same, 1 they differ or one failed, 2 the call is wrong."""
    parser = _parser()
    arguments = parser.parse_args(argv[1:])
    if arguments.steps < 4:
        parser.error(f"--steps is {arguments.steps} and must be at least 4")
    if arguments.kills < 1:
        parser.error(f"--kills is {arguments.kills} and must be at least 1")
    try:
        config = config_of(Path(arguments.run_dir))
    except EnStackError as e:
        print(f"enstack resume-check: {printable(str(e))}", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="enstack-resume-check-"))
    try:
        return _check(config, folder, arguments)
    finally:
        if arguments.keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def config_of(run: Path) -> Path:
    """The configuration that a run was started with: the file itself, or the youngest `config.yaml` in its folder.

    Raises:
        EnStackError: there is none, or it is no YAML.
    """
    if run.is_file():
        return _checked(run)
    found = [*run.glob("config.yaml"), *run.glob("*/config.yaml")]
    if not found:
        raise EnStackError(f"{run} holds no config.yaml of a run; name the folder of a run, or its configuration")
    return _checked(max(found, key=lambda file: file.stat().st_mtime))


def _checked(config: Path) -> Path:
    import yaml

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is no YAML"
        raise EnStackError(f"{config} cannot be read as the configuration of a run: {reason}") from e
    if not isinstance(content, dict):
        raise EnStackError(f"{config} holds no run: it must be a mapping with trainer, model and data")
    return config


def _check(config: Path, folder: Path, arguments: argparse.Namespace) -> int:
    dice = random.Random(arguments.seed)
    steps = arguments.steps
    total = 2 * steps
    bar = ProgressBar(total) if wants_progress() else None
    undisturbed = _train(config, folder / "undisturbed", steps, bar)
    ends, begins = [], []
    for _ in range(arguments.kills):
        moment = dice.choice(list(MOMENTS))
        at = dice.randint(2, max(2, (steps - 1) // arguments.kills))
        ends.append(_killed(config, folder / "resumed", steps, at, moment))
        begins.append(len(_lines(folder / "resumed")))
    resumed = _train(config, folder / "resumed", steps, bar)
    ends = [f"{end}; {_went_on(resumed, begin)}" for end, begin in zip(ends, begins, strict=True)]
    if bar:
        bar.clear()
    found = first_difference(undisturbed, resumed)
    cause = CAUSES[found.what] if found else ""
    if found and found.what not in ("batches", "lrs"):
        again = first_difference(undisturbed, _train(config, folder / "again", steps, None))
        cause = UNREPEATABLE if again is not None and _place(again) <= _place(found) else cause
    _show(arguments.format, config, undisturbed, resumed, ends, found, cause)
    return 1 if found else 0


def first_difference(undisturbed: Sequence[Line], resumed: Sequence[Line]) -> Difference | None:
    """Where a run that was killed and resumed first differs from the undisturbed one; None where it never does.

    What was trained, lost in the kill and trained again is compared each time.
    """
    lines: dict[Place, list[Line]] = {}
    for line in resumed:
        lines.setdefault((line["epoch"], line["batch"]), []).append(line)
    for expected in undisturbed:
        place = expected["epoch"], expected["batch"]
        if place not in lines:
            return Difference(*place, expected["step"], "batches", "undisturbed it was", "not trained")
        for actual in lines.pop(place):
            for what in ("step", "data", "random", "lrs", "loss", "weights", "optimizer"):
                if actual[what] != expected[what]:
                    return _difference(expected, actual, what)
    for place, extra in lines.items():
        return Difference(*place, extra[0]["step"], "batches", "undisturbed it was not", "trained")
    return None


def _difference(expected: Line, actual: Line, what: str) -> Difference:
    before, now = expected[what], actual[what]
    if isinstance(before, Mapping):
        name = next(name for name in before if before[name] != now.get(name))
        before, now = f"{name} {before[name]}", f"{name} {now.get(name)}"
    name = "batches" if what == "step" else what
    if name == "batches":
        before, now = f"undisturbed {before:,} steps were done", f"{now:,} steps done"
    return Difference(expected["epoch"], expected["batch"], expected["step"], name, _shown(before), _shown(now))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, str) and value.startswith(("0x", "-0x")):
        return f"{float.fromhex(value):.9g}"
    return str(value)


def _place(difference: Difference) -> Place:
    return difference.epoch, difference.batch


# The runs


def _train(config: Path, run: Path, steps: int, bar: ProgressBar | None) -> list[Line]:
    """Trains to the end, from the newest checkpoint of `run` if there is one; returns all lines written so far."""
    seen = len(_lines(run))
    process, log = _start(config, run, steps, [])
    while bar is not None and process.poll() is None:
        time.sleep(_POLL_SECONDS)
        now = len(_lines(run))
        for _ in range(now - seen):
            bar.advance()
        seen = now
    if (status := process.wait()) != 0:
        raise EnStackError(f"a run of the check ended with status {status}: {_last_line(log)}")
    return _lines(run)


def _killed(config: Path, run: Path, steps: int, at: int, moment: str) -> str:
    """Trains until the process has killed itself; says where that was."""
    before = len(_lines(run))
    option = "--trainer.callbacks"
    process, log = _start(config, run, steps, [f"{option}.kill_at", str(at), f"{option}.moment", moment])
    status = process.wait()
    if status == 0:
        return f"not before it was done: no checkpoint was saved after batch {at}"
    if status != -signal.SIGKILL:
        raise EnStackError(f"a run of the check ended with status {status}: {_last_line(log)}")
    lines = _lines(run)
    done = lines[-1]["step"] if len(lines) > before else 0
    return f"{MOMENTS[moment]}, {many(done, 'step')} done"


def _went_on(lines: Sequence[Line], begin: int) -> str:
    if begin == len(lines):
        return "nothing was left to train"
    return f"went on with epoch {lines[begin]['epoch']}, batch {lines[begin]['batch']}"


def _start(config: Path, run: Path, steps: int, more: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
    run.mkdir(parents=True, exist_ok=True)
    # Two and a half epochs, each with validation, so that both kinds of checkpoint are resumed from.
    batches = max(2, steps * 2 // 5)
    call = ["fit", "--config", str(config), "--ckpt_path", "auto", "--trainer.default_root_dir", str(run)]
    call += [part for name in CHECKPOINT_CALLBACKS for part in (f"--{name}.dirpath", str(run / "checkpoints"))]
    call += ["--recovery_checkpoint.every_n_train_steps", str(max(1, steps // 6))]
    call += ["--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1"]
    call += ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(run)]
    call += ["--trainer.limit_train_batches", str(batches), "--trainer.limit_val_batches", "2"]
    call += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    call += ["--trainer.callbacks+=enstack_lightning.guard.step_record.StepRecord"]
    call += ["--trainer.callbacks.path", str(run / "record.jsonl"), *more]
    log = run / "log.txt"
    with log.open("ab") as stream:
        process = subprocess.Popen([sys.executable, "-m", "enstack_lightning", *call], stdout=stream, stderr=stream)
    return process, log


def _lines(run: Path) -> list[Line]:
    """The lines of a run's record; one that a kill has cut off is none."""
    try:
        text = (run / "record.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


# What is shown


def _show(
    form: str,
    config: Path,
    undisturbed: Sequence[Line],
    resumed: Sequence[Line],
    ends: Sequence[str],
    found: Difference | None,
    cause: str,
) -> None:
    if form == "json":
        difference = None if found is None else {**asdict(found), "cause": cause}
        verdict = "fail" if found else "pass"
        say(json.dumps({"version": 1, "verdict": verdict, "kills": list(ends), "difference": difference}))
    else:
        say("\n".join(_result(config, undisturbed, resumed, ends, found, cause)))


def _result(
    config: Path,
    undisturbed: Sequence[Line],
    resumed: Sequence[Line],
    ends: Sequence[str],
    found: Difference | None,
    cause: str,
) -> Iterator[str]:
    steps, twice = undisturbed[-1]["step"], len(resumed) - len({(line["epoch"], line["batch"]) for line in resumed})
    epochs = 1 + max(line["epoch"] for line in undisturbed)
    yield f"run          {printable(str(config))}"
    yield f"trained      {many(steps, 'step')} in {many(epochs, 'epoch')}, {many(len(undisturbed), 'batch', 'batches')}"
    yield from (f"killed       {end}" for end in ends)
    yield f"again        {many(twice, 'batch', 'batches')} of the killed process, lost with it and trained again"
    yield "compared     data, random state, learning rates, loss, weights and optimizer after every batch"
    if found is None:
        yield "verdict      PASS: the resumed run equals the undisturbed one, bit for bit"
    else:
        yield f"verdict      FAIL: they part at {found}"
        yield f"likely cause {cause}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="enstack resume-check",
        description="Trains the model and data of a run for a few steps, kills it at a random moment, resumes it, and "
        "compares every step with a run that was not disturbed. The run's own checkpoints are not touched.",
        epilog="Exit status: 0 the runs are the same bit for bit, 1 they differ or one failed, 2 wrong call.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run of `enstack fit`, or its configuration")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=1, metavar="N", help="times it is killed (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the choice of moments (default: another one each time)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="form of the result")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folder, and say where it is")
    return parser
