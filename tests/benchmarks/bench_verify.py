"""What verifying costs, next to the other tools, on a checkpoint of CodeBERT's shape. Run by hand:

    python tests/benchmarks/bench_verify.py [--layers 12]

Every figure is measured in this run. Times are the best of five with the file in the page cache; memory is the peak
resident memory of a whole process, its imports included.
"""

from __future__ import annotations

import argparse
import compileall
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import RobertaConfig, RobertaForSequenceClassification

import enstack_lightning
from enstack_lightning.checkpoint import Options, Verdict, verify_checkpoint
from enstack_lightning.checkpoint.source import LocalSource
from enstack_lightning.checkpoint.torch_file import TorchFile

REPEATS = 5
STEPS = 500
EPOCH = 2
ORIGINAL = Path(__file__).with_name("original_verify.py")


# The checkpoints


def codebert(layers: int) -> RobertaConfig:
    sizes = {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 5}
    return RobertaConfig(num_hidden_layers=layers, architectures=["RobertaForSequenceClassification"], **sizes)


def weights_of(layers: int, scale: int = 1) -> dict[str, torch.Tensor]:
    """The weights of `RobertaForSequenceClassification`; `scale` makes every tensor that many times larger."""
    with torch.device("meta"):
        model = RobertaForSequenceClassification(codebert(layers))
    shapes = {name: (scale, *p.shape) if scale > 1 else tuple(p.shape) for name, p in model.named_parameters()}
    make: Callable[[Any], torch.Tensor] = torch.empty if scale > 1 else torch.randn
    return {name: make(shape) for name, shape in shapes.items()}


def optimizer_state(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """AdamW's state after `STEPS` steps."""
    state = {
        number: {"step": torch.tensor(float(STEPS)), "exp_avg": torch.empty_like(w), "exp_avg_sq": torch.empty_like(w)}
        for number, w in enumerate(weights.values())
    }
    if next(iter(weights.values())).ndim <= 2:  # the sparse file's tensors stay untouched, they would fill the memory
        for entry in state.values():
            entry["exp_avg"].normal_()
            entry["exp_avg_sq"].fill_(1e-6)
    group = {"lr": 1e-5, "initial_lr": 2e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    return {"state": state, "param_groups": [{**group, "params": list(state)}]}


def lightning_dict(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    counter = dict.fromkeys(("ready", "started", "processed", "completed"), STEPS)
    step = {"total": counter, "current": counter}
    none, ones = dict.fromkeys(counter, 0), dict.fromkeys(counter, 1)
    loop = {
        "epoch_progress": {"total": ones, "current": ones},
        "epoch_loop.batch_progress": {"total": counter, "current": counter, "is_last_batch": True},
        "epoch_loop.scheduler_progress": {"total": counter, "current": counter},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": step}},
        "epoch_loop.manual_optimization.optim_step_progress": {"total": none, "current": none},
    }
    return {
        "epoch": 0,
        "global_step": STEPS,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"network.{name}": w for name, w in weights.items()},
        "loops": {"fit_loop": loop},
        "optimizer_states": [optimizer_state(weights)],
        "lr_schedulers": [{"last_epoch": STEPS, "_last_lr": [1e-5], "base_lrs": [2e-5]}],
    }


def write_lightning(path: Path, layers: int) -> int:
    """A Lightning checkpoint; returns how many parameters its model has."""
    weights = weights_of(layers)
    torch.save(lightning_dict(weights), path)
    return sum(w.numel() for w in weights.values())


def write_sparse(path: Path, layers: int) -> None:
    """The same records, each tensor ten times as large, its bytes a hole in the file but for the step counts."""
    with torch.serialization.skip_data():
        torch.save(lightning_dict(weights_of(layers, scale=10)), path)
    with LocalSource(path) as source:
        file = TorchFile(source)
        state = file.read_pickle().value["optimizer_states"][0]["state"]
        offsets = [file.records[f"data/{entry['step'].storage.key}"].offset for entry in state.values()]
    with path.open("r+b") as target:
        for offset in offsets:
            target.seek(offset)
            target.write(torch.tensor(float(STEPS)).numpy().tobytes())


def write_enstack(folder: Path, layers: int) -> None:
    folder.mkdir()
    weights = weights_of(layers)
    state = {
        "epoch": EPOCH,
        "step": 0,
        "total_batches": STEPS // EPOCH,
        "best_val_f1": 0.78,
        "best_val_acc": 0.78,
        "optimizer_state_dict": optimizer_state(weights),
        "scheduler_state_dict": {"last_epoch": STEPS, "_last_lr": [1e-5], "base_lrs": [2e-5]},
        "scaler_state_dict": None,
    }
    torch.save(state, folder / "training_state.pth")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    codebert(layers).save_pretrained(folder)


# The measurements


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of the best run, and peak resident memory in MB of a process that does it once."""

    seconds: float
    megabytes: float


def drop_from_memory(path: Path) -> None:
    """Takes a file's pages from the page cache, as after a restart of the machine (posix_fadvise(2))."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def best(run: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(REPEATS):
        prepare()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def process(*command: str) -> Cost:
    """A whole process. Its peak memory is read from the kernel while it ends, and begins at its exec."""
    seconds = best(lambda: subprocess.run(command, check=True, capture_output=True))
    # VmHWM: getrusage's peak would begin with that of this process, from before the exec.
    report = (
        "import atexit, os, re, runpy, sys\n"
        "atexit.register(lambda: os.write(2, re.search(rb'VmHWM:\\s+(\\d+)',"
        " open('/proc/self/status', 'rb').read())[1]))\n"
    )
    body = command[1:]
    if body[0] == "-c":
        script = report + f"sys.argv = ['-c', *sys.argv[1:]]\n{body[1]}"
        arguments = body[2:]
    elif body[0] == "-m":
        script = (
            report + f"sys.argv = sys.argv[0:1] + sys.argv[1:]\nrunpy.run_module({body[1]!r}, {{}}, '__main__', True)"
        )
        arguments = body[2:]
    else:
        script = report + f"runpy.run_path({body[0]!r}, {{}}, '__main__')"
        arguments = body[1:]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=True)
    return Cost(seconds, int(done.stderr.split()[-1]) / 1024)


def python(*arguments: str) -> Cost:
    return process(sys.executable, *arguments)


def line(what: str, cost: Cost, base: Cost | None = None) -> None:
    ratios = "" if base is None else f"{cost.seconds / base.seconds:8.2f}x {cost.megabytes / base.megabytes:8.2f}x"
    print(f"{what:44} {cost.seconds:9.3f} {cost.megabytes:9.0f} {ratios}", flush=True)


def heading(title: str) -> None:
    print(f"\n{title:44} {'seconds':>9} {'peak MB':>9} {'time':>9} {'memory':>9}")


def verdict(name: str, value: float, bound: str, reached: bool) -> str:
    return f"{name:64} {value:9.2f}   {bound:10} {'reached' if reached else 'MISSED'}"


def enstack(*arguments: str | Path) -> tuple[str, ...]:
    return ("-m", "enstack_lightning", "verify", *map(str, arguments))


def measure(folder: Path, layers: int) -> list[str]:
    results = []
    lightning, enstack_folder, sparse = folder / "large.ckpt", folder / "enstack", folder / "sparse.ckpt"

    write_enstack(enstack_folder, layers)
    heading("EnStack folder, whole process")
    ours = python(*enstack(enstack_folder))
    original = python(str(ORIGINAL), str(enstack_folder))
    line("enstack verify", ours)
    line("the original's checks on a loaded state", original, ours)
    speed, memory = original.seconds / ours.seconds, original.megabytes / ours.megabytes
    results.append(verdict("the original's time over enstack verify's", speed, ">= 12", speed >= 12))
    results.append(verdict("the original's peak memory over enstack verify's", memory, ">= 20", memory >= 20))
    for path in enstack_folder.iterdir():
        path.unlink()

    parameters = write_lightning(lightning, layers)
    print(f"\n{lightning.stat().st_size / 1e6:,.0f} MB, {parameters / 1e6:,.1f} million parameters")
    heading("Lightning file, whole process")
    ours = python(*enstack(lightning))
    line("enstack verify", ours)
    scan = python("-m", "picklescan.cli", "-p", str(lightning))
    line("picklescan -p", scan, ours)
    load = python("-c", "import sys, torch; torch.load(sys.argv[1], weights_only=True)", str(lightning))
    line("torch.load", load, ours)
    mapped = python("-c", "import sys, torch; torch.load(sys.argv[1], mmap=True, weights_only=True)", str(lightning))
    line("torch.load(mmap=True)", mapped, ours)
    ratio = ours.seconds / scan.seconds
    results.append(verdict("enstack verify's time over picklescan's", ratio, "<= 2", ratio <= 2))

    heading("Lightning file, every byte, in a warm process")
    deep = python(*enstack(lightning, "--deep"))
    warm_deep = best(lambda: verify_checkpoint(lightning, Options(deep=True)))
    warm_load = best(lambda: torch.load(lightning, weights_only=True))
    assert verify_checkpoint(lightning, Options(deep=True)).verdict is Verdict.PASS
    line("enstack verify --deep", Cost(warm_deep, deep.megabytes))
    line("torch.load", Cost(warm_load, load.megabytes), Cost(warm_deep, deep.megabytes))
    line("enstack verify --deep, whole process", deep)
    ratio = warm_deep / warm_load
    results.append(verdict("--deep's time over torch.load's", ratio, "<= 0.5", ratio <= 0.5))
    results.append(
        verdict("--deep's peak memory in MB, imports included", deep.megabytes, "<= 200", deep.megabytes <= 200)
    )

    warm = best(lambda: verify_checkpoint(lightning))
    results.append(verdict("verify_checkpoint in a warm process, ms", warm * 1000, "<= 60", warm <= 0.06))
    cold = best(lambda: verify_checkpoint(lightning), lambda: drop_from_memory(lightning))
    cold_load = best(lambda: torch.load(lightning, weights_only=True), lambda: drop_from_memory(lightning))
    print(f"\nFrom the disk, in a warm process: verify_checkpoint {cold:.3f} s, torch.load {cold_load:.3f} s")
    ratio = cold / cold_load
    results.append(verdict("verify_checkpoint's time over torch.load's, from the disk", ratio, "<= 0.1", ratio <= 0.1))
    write_sparse(sparse, layers)
    assert verify_checkpoint(sparse).verdict is not Verdict.FAIL
    # In turn, for a machine's speed may change from one second to the next.
    turns = [
        (best(lambda: verify_checkpoint(lightning)), best(lambda: verify_checkpoint(sparse))) for _ in range(REPEATS)
    ]
    ratio = min(of_sparse for _, of_sparse in turns) / min(of_lightning for of_lightning, _ in turns)
    size = sparse.stat().st_size / 1e9
    results.append(verdict(f"the same on a sparse file of {size:,.1f} GB, over that", ratio, "<= 1.2", ratio <= 1.2))
    lightning.unlink()
    sparse.unlink()

    start = python(*enstack("--help"))
    results.append(verdict("enstack verify --help, seconds", start.seconds, "<= 0.5", start.seconds <= 0.5))
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=12, help="of the encoder; 12 give a file of 1.5 GB")
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    # As an installer leaves it, also where PYTHONDONTWRITEBYTECODE would have it compiled in each process.
    compileall.compile_dir(Path(enstack_lightning.__file__).parent, quiet=2)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), options.layers)
    print("\n" + "\n".join(results))


if __name__ == "__main__":
    main()
