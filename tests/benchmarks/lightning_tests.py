"""Lightning's own tests without the guard and with it in every Trainer; what differs is printed, with its reason.

    python tests/benchmarks/lightning_tests.py LIGHTNING [--kept FOLDER] [FILE...]

LIGHTNING is a checkout of https://github.com/Lightning-AI/pytorch-lightning at the version that is installed, FILE a
file or folder under its tests/tests_pytorch (by default those on checkpoints, callbacks, loops, data and restoring).
With --kept the outcomes of each file are kept in FOLDER, and a file that is there is not run again: all of them take
an hour. The status is 1 where a difference has no reason in `EXPECTED`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

FILES = (
    "checkpointing",
    "callbacks",
    "core/test_datamodules.py",
    "core/test_lightning_optimizer.py",
    "core/test_metric_result_integration.py",
    "core/test_saving.py",
    "loops",
    "models/test_cpu.py",
    "models/test_hooks.py",
    "models/test_restore.py",
    "plugins/test_async_checkpoint.py",
    "plugins/test_checkpoint_io_plugin.py",
    "trainer/connectors/test_callback_connector.py",
    "trainer/connectors/test_checkpoint_connector.py",
    "trainer/connectors/test_signal_connector.py",
    "trainer/flags",
    "trainer/optimization",
    "trainer/test_dataloaders.py",
    "trainer/test_trainer.py",
    "tuner",
    "utilities/test_auto_restart.py",
)

PUT_RIGHT = "the guard puts right what this Lightning gets wrong"

EXPECTED = {
    "test_attach_model_callbacks|test_checkpoint_callbacks_are_last": "lists the callbacks: there is one more",
    "test_checkpoint_repeated_strategy|test_resume_incomplete|test_callbacks_(references|state)_fit_ckpt|"
    "test_fit_ckpt_path_epoch_restored|test_checkpoint_find_last|test_cpu_slurm_save_load|test_dm_checkpoint_save|"
    "test_datamodule_hooks_are_profiled": (
        "resumes from a finished run: the guard refuses, for nothing would be trained"
    ),
    "test_model_checkpoint_only_weights": (
        "resumes from weights alone: the guard refuses before Lightning does, with an error of its own"
    ),
    "test_resume_early_stopping_from_checkpoint": (
        "resumes with fewer epochs than are done: the guard refuses before Lightning does, with an error of its own"
    ),
    "test_resume_callback_state_saved_by_type": (
        "the checkpoint names a class that nobody vouched for (allow_globals); fit(weights_only=False) would import "
        "and call whatever a file names, which is what the guard is there to stop"
    ),
    "test_restarting_mid_epoch_raises_warning": (
        "wants the warning that a plain loader begins anew: where the guard goes on with the batches that are left, it "
        "leaves that out"
    ),
    "test_resume_completed_epoch_with_max_steps": "asserts a sanity check before a resumed run: the guard has none",
    "test_stateful_trainer_ckpt_path_support": "loads a file without counters and optimizers: not to be resumed from",
}
"""Tests that assert what the guard is there to refuse, or what one more callback changes by its nature."""


def outcomes(checkout: Path, files: list[str], guarded: bool) -> dict[str, str]:
    """The outcome of every test, by its name."""
    tests = checkout / "tests"
    paths = [str(tests), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env |= {"ENSTACK_GUARD": "1" if guarded else "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        call = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "ignore", f"--rootdir={tests}"]
        call += ["-p", "lightning_tests", "-p", "no:cacheprovider", f"--junitxml={results}", f"--basetemp={folder}/tmp"]
        call += [str(tests / "tests_pytorch" / name) for name in files]
        subprocess.run(call, cwd=folder, env=env, stdout=sys.stderr)  # where some leave their logs
        cases = ET.parse(results).getroot().iter("testcase")
        return {f"{case.get('classname')}.py::{case.get('name')}": outcome(case) for case in cases}


def outcome(case: ET.Element) -> str:
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            return "skipped" if kind == "skipped" else f"{kind}: {(found.get('message') or '').splitlines()[0][:200]}"
    return "passed"


def pytest_configure(config: Any) -> None:
    """As a plugin of the tests that run: manifests are left out of what `os.listdir` gives.

    Many tests assert which files lie in a folder. A manifest beside each checkpoint is what the guard is for; that
    nothing else lies there is still asserted.
    """
    listdir = os.listdir
    os.listdir = lambda *args: [n for n in listdir(*args) if not str(n).endswith(".manifest.json")]  # type: ignore[assignment]


def both_ways(checkout: Path, name: str, kept: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """The outcomes of a file's tests without the guard and with it, from `kept` where they are there."""
    file = kept / f"{name.replace('/', '-')}.json" if kept else None
    if file and file.is_file():
        plain, guarded = json.loads(file.read_text())
        return plain, guarded
    plain, guarded = (outcomes(checkout, [name], guarded) for guarded in (False, True))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([plain, guarded], indent=1))
    return plain, guarded


def reason_for(name: str, before: str, after: str) -> str:
    """Why a test may end otherwise with the guard; empty where nothing says so."""
    if after == "passed" and before != "not run":
        return PUT_RIGHT
    return next((why for pattern, why in EXPECTED.items() if re.search(pattern, name)), "")


def main(checkout: Path, files: list[str], kept: Path | None) -> int:
    plain: dict[str, str] = {}
    guarded: dict[str, str] = {}
    folder = checkout / "tests/tests_pytorch"
    there = [name for name in files or FILES if (folder / name).exists()]
    if not there or (files and there != files):
        sys.exit(f"{folder} has no {', '.join(name for name in files or FILES if name not in there)}")
    for name in there:
        for run, found in zip((plain, guarded), both_ways(checkout, name, kept), strict=True):
            run |= found
    reasons: list[str] = []
    for name in sorted(plain.keys() | guarded.keys()):
        before, after = plain.get(name, "not run"), guarded.get(name, "not run")
        if before.partition(":")[0] != after.partition(":")[0]:
            reasons.append(reason_for(name, before, after))
            print(f"{name}\n  without the guard: {before}\n  with it: {after}\n  reason: {reasons[-1] or 'NONE'}")
    passed = [sum(v == "passed" for v in run.values()) for run in (plain, guarded)]
    unexplained, put_right = reasons.count(""), reasons.count(PUT_RIGHT)
    skipped = sum(v == "skipped" for v in plain.values())
    print(
        f"{len(plain):,} tests, {skipped:,} of them skipped; passed without the guard {passed[0]:,}, with it "
        f"{passed[1]:,}; {len(reasons):,} differ: {put_right:,} put right, "
        f"{len(reasons) - put_right - unexplained:,} explained, {unexplained:,} unexplained"
    )
    return int(unexplained > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", metavar="LIGHTNING", type=Path)
    parser.add_argument("files", metavar="FILE", nargs="*")
    parser.add_argument("--kept", metavar="FOLDER", type=Path)
    given = parser.parse_intermixed_args()
    sys.exit(main(given.checkout.absolute(), given.files, given.kept))
