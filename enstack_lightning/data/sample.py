"""The offline sample: C functions made from templates, so that everything here runs without a network or a data set.

A seed comes in, three JSON Lines files go out. A function does one task (see `sample_templates`) in a right or a
wrong form, with random names, types and sizes, and harmless statements around it. Most tasks occur in class 4
("other") as often right as they occur wrong elsewhere, so the words do not tell the class; order and relation do.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from enstack_lightning.data.cache import atomic_folder
from enstack_lightning.data.sample_templates import CONSTANTS, CWE_NAMES, FILLERS, NOUNS, ROLES, TASKS, VERBS

SAMPLE_VERSION = 1
SAMPLE_SIZES = {"train": 2_000, "validation": 250, "test": 250}

_FILLER_SHARE = 0.3


@dataclass(frozen=True)
class SampleRow:
    """One function of the sample: its code, its class (0 to 4) and its weakness by name."""

    func: str
    target: int
    cwe: str


def write_sample(cache_dir: Path, seed: int) -> Path:
    """Writes the sample of a seed into the cache, or finds it there.

    Args:
        cache_dir: Folder of the package's cache.
        seed: Every seed gives another sample; the same seed gives the same bytes.

    Returns:
        Folder with `train.jsonl` (2,000 rows), `validation.jsonl` (250) and `test.jsonl` (250); columns `func`,
        `target`, `cwe`, `idx`.
    """
    folder = cache_dir / "sample" / f"v{SAMPLE_VERSION}-seed{seed}"
    if folder.is_dir():
        return folder
    rows = sample_rows(seed)
    with atomic_folder(folder) as unfinished:
        for split, size in SAMPLE_SIZES.items():
            with (unfinished / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
                for idx in range(size):
                    row = next(rows)
                    line = {"func": row.func, "target": row.target, "cwe": row.cwe, "idx": idx}
                    file.write(json.dumps(line) + "\n")
    return folder


def sample_rows(seed: int) -> Iterator[SampleRow]:
    """Yields functions without end, no two alike, the five classes in equal shares.

    Args:
        seed: Seed of everything random in them.

    Example:
        >>> next(sample_rows(seed=0)) == next(sample_rows(seed=0))
        True
    """
    rng = random.Random(f"enstack-sample-{SAMPLE_VERSION}-{seed}")
    seen: set[str] = set()
    while True:
        targets = list(range(len(CWE_NAMES)))
        rng.shuffle(targets)
        for target in targets:
            func = _function(rng, target)
            while func in seen:
                func = _function(rng, target)
            seen.add(func)
            yield SampleRow(func, target, CWE_NAMES[target])


def _function(rng: random.Random, target: int) -> str:
    task = rng.choice([task for task in TASKS if target in task.forms])
    form = rng.choice(task.forms[target])
    names = _Names(rng)
    parameters = [names.fill(parameter) for parameter in task.parameters]
    variables = [names.fill(variable) for variable in task.variables]
    body = [names.fill(task.statements[letter]) for letter in form]
    if rng.random() < _FILLER_SHARE:
        x, y = names.fresh("val"), names.fresh("sum")
        body.append(names.fill(rng.choice(FILLERS).replace("$x", x).replace("$y", y)))
        parameters += [f"int {x}", f"int {y}"]
    rng.shuffle(parameters)
    lines = [*variables, *body, f"return {rng.choice('012')};"]
    text = "\n".join(lines).replace("@fail", "\n    return -1;").replace(" \n", "\n").replace("\n", "\n    ")
    head = f"int {rng.choice(VERBS)}_{rng.choice(NOUNS)}({', '.join(parameters)})"
    return f"{head}\n{{\n    {text}\n}}"


class _Names:
    """The identifiers of one function: a role keeps its name throughout it, and no two roles share one."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._chosen: dict[str, str] = {}

    def fresh(self, role: str) -> str:
        taken = set(self._chosen.values())
        name = self._rng.choice([name for name in ROLES[role] if name not in taken])
        self._chosen[f"{role}_{len(taken)}"] = name
        return name

    def fill(self, text: str) -> str:
        for role in re.findall(r"\$\{?([A-Za-z]+)", text):
            if role not in self._chosen:
                self._chosen[role] = self._rng.choice(CONSTANTS[role]) if role in CONSTANTS else self.fresh(role)
        return Template(text).substitute(self._chosen)
