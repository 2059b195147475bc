"""Lightning's own tests without the guard and with it in every Trainer; what differs is printed, with its reason.

    python tests/benchmarks/lightning_tests.py LIGHTNING [FILE...]

LIGHTNING is a checkout of https://github.com/Lightning-AI/pytorch-lightning at the version that is installed, FILE a
file or folder under its tests/tests_pytorch (by default those on checkpoints, callbacks and restoring). The status is
1 where a difference has no reason in `EXPECTED`.
"""

from __future__ import annotations

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
    "models/test_restore.py",
    "models/test_hooks.py",
    "plugins/test_async_checkpoint.py",
    "plugins/test_checkpoint_io_plugin.py",
    "trainer/connectors/test_callback_connector.py",
    "trainer/connectors/test_checkpoint_connector.py",
    "trainer/connectors/test_signal_connector.py",
    "trainer/flags",
    "trainer/optimization",
    "trainer/test_trainer.py",
    "loops",
    "tuner",
    "utilities/test_auto_restart.py",
)

EXPECTED = {
    "test_attach_model_callbacks|test_checkpoint_callbacks_are_last": "lists the callbacks: there is one more",
    "test_hooks.py|test_callback_hooks": "lists the hooks that are called, and of which callbacks: there is one more",
    "test_checkpoint_repeated_strategy|test_resume_incomplete|test_callbacks_(references|state)_fit_ckpt": (
        "resumes from a finished run: the guard refuses, for nothing would be trained"
    ),
    "test_resume_early_stopping_from_checkpoint": (
        "resumes with fewer epochs than are done: the guard refuses before Lightning does, with an error of its own"
    ),
    "test_resume_callback_state_saved_by_type": "loads a class that nobody vouched for (allow_globals)",
    "test_stateful_trainer_ckpt_path_support": "loads a file without counters and optimizers: not to be resumed from",
    "test_trainer_save_checkpoint_storage_options": "a mock writes nothing: such a save fails",
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
        call = [sys.executable, "-m", "pytest", "-q", "-p", "lightning_tests", f"--junitxml={results}", "--tb=short"]
        call += [f"--basetemp={folder}/tmp", "-W", "ignore", *(f"tests_pytorch/{name}" for name in files)]
        subprocess.run(call, cwd=tests, env=env, stdout=sys.stderr)
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


def main(checkout: Path, files: list[str]) -> int:
    present = [name for name in files or FILES if (checkout / "tests/tests_pytorch" / name).exists()]
    plain, guarded = (outcomes(checkout, present, guarded) for guarded in (False, True))
    unexpected = 0
    for name in sorted(plain.keys() | guarded.keys()):
        before, after = plain.get(name, "not run"), guarded.get(name, "not run")
        if before.partition(":")[0] != after.partition(":")[0]:
            reason = next((why for pattern, why in EXPECTED.items() if re.search(pattern, name)), "")
            if after == "passed" and before != "not run":
                reason = "the guard puts right what this Lightning gets wrong"
            unexpected += not reason
            print(f"{name}\n  without the guard: {before}\n  with it: {after}\n  reason: {reason or 'NONE'}")
    passed = [sum(v == "passed" for v in run.values()) for run in (plain, guarded)]
    print(
        f"{len(plain):,} tests; passed without the guard {passed[0]:,}, with it {passed[1]:,}; {unexpected} unexplained"
    )
    return int(unexpected > 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2:]))
