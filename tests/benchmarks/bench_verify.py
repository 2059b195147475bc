"""How long verifying takes against loading and hashing, and which damage each of them notices. Run by hand.

    python tests/benchmarks/bench_verify.py [--megabytes 1500]

Every figure is measured in this run, on one checkpoint of CodeBERT's shape with AdamW's state; times are the best of
five with the file in the page cache, memory is the peak of a process of its own above its imports.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from enstack_lightning.checkpoint import Verdict, verify_checkpoint
from enstack_lightning.checkpoint.source import LocalSource
from enstack_lightning.checkpoint.torch_file import TorchFile

REPEATS = 5
FLIPS = 300
WAYS = {
    "enstack verify": "from enstack_lightning.checkpoint import verify_checkpoint as run",
    "torch.load mmap": "import torch; run = lambda p: torch.load(p, mmap=True, weights_only=True)",
    "torch.load": "import torch; run = lambda p: torch.load(p, weights_only=True)",
    "sha256": "import hashlib; run = lambda p: hashlib.file_digest(open(p, 'rb'), 'sha256')",
}


def write_checkpoint(path: Path, megabytes: int) -> int:
    """A Lightning checkpoint of about that size: a third weights, two thirds AdamW moments. Returns its parameters."""
    width = 768
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)] + [(width,)] * 9 + [(4 * width,)]
    layer = sum(torch.Size(s).numel() for s in shapes)
    layers = max(1, megabytes * 1_000_000 // (12 * layer))
    weights = {f"model.layer.{i}.{j}": torch.randn(s) * 0.02 for i in range(layers) for j, s in enumerate(shapes)}
    moments = {
        n: {"step": torch.tensor(500.0), "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.ones_like(w)}
        for n, w in enumerate(weights.values())
    }
    group = {"lr": 1e-5, "initial_lr": 2e-5, "betas": (0.9, 0.999), "params": list(range(len(weights)))}
    counter = {"ready": 500, "started": 500, "processed": 500, "completed": 500}
    step = {"total": counter, "current": counter}
    loop = {
        "epoch_progress": {"total": dict.fromkeys(counter, 1), "current": dict.fromkeys(counter, 1)},
        "epoch_loop.batch_progress": {"total": counter, "current": counter, "is_last_batch": True},
        "epoch_loop.scheduler_progress": {"total": counter, "current": counter},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": step}},
    }
    checkpoint = {
        "epoch": 0,
        "global_step": 500,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": weights,
        "loops": {"fit_loop": loop},
        "optimizer_states": [{"state": moments, "param_groups": [group]}],
        "lr_schedulers": [{"last_epoch": 500, "_last_lr": [1e-5], "base_lrs": [2e-5]}],
    }
    torch.save(checkpoint, path)
    return layers * layer


def seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def peak_megabytes(imports: str, path: Path) -> float:
    # VmHWM: getrusage's peak would begin with that of this process, from before the exec.
    script = (
        f"import sys, re; {imports}\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak(); kept = run(sys.argv[1]); print((peak() - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def process_seconds(command: list[str]) -> float:
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def print_speed(path: Path) -> None:
    runs: dict[str, Callable[[], object]] = {
        "enstack verify": lambda: verify_checkpoint(path),
        "torch.load mmap": lambda: torch.load(path, mmap=True, weights_only=True),
        "torch.load": lambda: torch.load(path, weights_only=True),
        "sha256": lambda: hashlib.file_digest(path.open("rb"), "sha256"),
    }
    assert verify_checkpoint(path).verdict is Verdict.PASS
    base = seconds(runs["enstack verify"])
    print(f"{'in one process':18} {'seconds':>10} {'ratio':>9} {'peak MB':>9}")
    for name, run in runs.items():
        taken = seconds(run)
        print(f"{name:18} {taken:10.4f} {taken / base:8.1f}x {peak_megabytes(WAYS[name], path):9.1f}")
    verify = process_seconds([sys.executable, "-m", "enstack_lightning", "verify", str(path)])
    load = process_seconds([sys.executable, "-c", f"import torch; torch.load({str(path)!r}, weights_only=True)"])
    print(f"\n{'whole process':18} {'seconds':>10} {'ratio':>9}")
    print(f"{'enstack verify':18} {verify:10.4f} {1:8.1f}x\n{'torch.load':18} {load:10.4f} {load / verify:8.1f}x")


def loads(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def print_what_is_noticed(path: Path) -> None:
    """Flips random bits of the pickle, which says what every tensor is and how far training had come."""
    with LocalSource(path) as source:
        file = TorchFile(source)
        record = file.records["data.pkl"]
        start = file._payload_offsets[record.name]
    whole = path.read_bytes()
    draw = random.Random(0)
    noticed = {"enstack verify": 0, "torch.load": 0}
    for _ in range(FLIPS):
        damaged = bytearray(whole)
        damaged[start + draw.randrange(record.size)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        noticed["enstack verify"] += verify_checkpoint(path).verdict is Verdict.FAIL
        noticed["torch.load"] += not loads(path)
    print(f"\nof {FLIPS} single bits flipped in the pickle, noticed by")
    for name, count in noticed.items():
        print(f"{name:18} {count:10} {count / FLIPS:8.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=1500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.ckpt"
        parameters = write_checkpoint(path, arguments.megabytes)
        size = path.stat().st_size / 1e6
        print(f"torch {torch.__version__}, checkpoint of {size:,.0f} MB, {parameters / 1e6:,.0f} million parameters\n")
        print_speed(path)
        small = Path(folder) / "small.ckpt"
        write_checkpoint(small, 1)
        path.unlink()
        print_what_is_noticed(small)


if __name__ == "__main__":
    main()
