"""Structured damage to checkpoints, and whether verification bears it: what `tests/faults/test_mutations.py` runs.

A campaign takes files that real libraries wrote and changes them again and again where their structure is: opcodes of a
pickle, fields of a zip directory, numbers of a header. A mutation is named by its campaign and a seed, so that it can
be made again. The module imports no torch, so that many processes can run it.
"""

from __future__ import annotations

import json
import pickletools
import random
import re
import resource
import signal
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enstack_lightning.checkpoint import Options, Severity, to_json, to_text, verify_checkpoint
from enstack_lightning.checkpoint.inert_pickle import PickleDefectError, read_pickle, read_pickle_at

LONGEST_SECONDS = 20
"""No mutation may take this long; the machine may be busy with others."""

MOST_MEGABYTES = 256

CANARY = "enstack_canary"
"""A module that leaves a mark when it is imported, and another when its function is called."""


@dataclass
class Outcome:
    """What a run of mutations came to: how many, how they ended, and those that ended wrongly."""

    runs: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    megabytes: int = 0
    slowest_seconds: float = 0.0


Files = Mapping[str, bytes]
Mutation = Callable[[random.Random, Files], Files]


def run(campaign: str, files: Files, seeds: range, folder: str) -> Outcome:
    """Runs one mutation a seed.

    Args:
        campaign: its name in `CAMPAIGNS`.
        files: the whole files of a checkpoint by name; a single one is verified as a file, several as a folder.
        folder: an empty folder of this process's own; the canary lives there.
    """
    mutate, place = CAMPAIGNS[campaign], Path(folder)
    (place / f"{CANARY}.py").write_text(
        f"open({str(place / 'imported')!r}, 'w')\ndef run(*a): open({folder!r} + '/called', 'w')"
    )
    sys.path.insert(0, folder)
    outcome = Outcome()
    target = place / "checkpoint"
    before = _peak_megabytes()
    try:
        for seed in seeds:
            mutated = mutate(random.Random(f"{campaign} {seed}"), files)
            began = time.monotonic()
            with _time_limit():
                ending = _bear(target, mutated, _options(seed))
            outcome.slowest_seconds = max(outcome.slowest_seconds, time.monotonic() - began)
            outcome.runs += 1
            outcome.endings[ending.partition(":")[0]] += 1
            if ending.startswith("FAILED") and len(outcome.failures) < 10:
                outcome.failures.append(f"{campaign}, seed {seed}: {ending}")
    finally:
        sys.path.remove(folder)
    outcome.megabytes = _peak_megabytes() - before
    if CANARY in sys.modules or (place / "imported").exists() or (place / "called").exists():
        outcome.failures.append(f"{campaign}: something that a file names was imported or called")
    return outcome


def _options(seed: int) -> Options:
    return Options(deep=seed % 10 == 0, purpose="inference" if seed % 3 == 0 else "resume")


def _bear(target: Path, files: Files, options: Options) -> str:
    """How verification takes the files: the verdict, or `FAILED` and why."""
    try:
        if list(files) == ["pickle"]:
            return _read(files["pickle"])
        path = write(target, files)
        report = verify_checkpoint(path, options)
        to_text(report).encode("utf-8")
        json.loads(to_json([report]))
    except BaseException as e:  # whatever it is, it must not come out
        if isinstance(e, KeyboardInterrupt):
            raise
        return f"FAILED: {type(e).__name__}: {e!s:.300}"
    if any(f.code == "CK100" for f in report.findings):
        return "FAILED: " + next(f.message for f in report.findings if f.code == "CK100")
    errors = sorted({f.code for f in report.of(Severity.ERROR)})
    return f"{report.verdict} by {errors[0]}" if errors else str(report.verdict)


def _read(pickled: bytes) -> str:
    """The pickle by itself: read, or refused, and its value a tree that ends."""
    try:
        read_pickle_at(pickled, 0)
    except PickleDefectError as e:
        str(e).encode("utf-8")
    try:
        unpickled = read_pickle(pickled)
    except PickleDefectError as e:
        [str(g).encode("utf-8") for g in e.globals]
        return "refused"
    repr(unpickled.value)
    return "read"


def write(target: Path, files: Files) -> Path:
    if len(files) == 1:
        ((name, content),) = files.items()
        path = target.with_suffix(Path(name).suffix)
        path.write_bytes(content)
        return path
    target.mkdir(exist_ok=True)
    for name, content in files.items():
        if not (target / name).exists() or (target / name).read_bytes() != content:
            (target / name).write_bytes(content)
    return target


@contextmanager
def _time_limit() -> Any:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {LONGEST_SECONDS} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


# Bytes and numbers

INTERESTING = [
    0,
    1,
    2,
    3,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0xFFFFFFFF,
    2**32,
    2**62,
    2**63,
    2**64 - 1,
]


def _changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """One small change: a byte, a number, a piece left out, doubled or moved."""
    if not data:
        return bytes([draw.randrange(256)])
    at, length = draw.randrange(len(data)), draw.choice([1, 1, 2, 4, 8, 16])
    kind = draw.randrange(6)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        number = (draw.choice(INTERESTING) + draw.randrange(-2, 3)) % 2 ** (8 * length)
        return data[:at] + number.to_bytes(length, "little") + data[at + length :]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] + data[at:]
    if kind == 4:
        return data[:at] + draw.randbytes(length) + data[at + length :]
    other = draw.randrange(len(data))
    return data[:at] + data[other : other + length] + data[at + length :]


# Pickles


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


_CALL = f"c{CANARY}\nrun\n".encode()
HOSTILE = [
    _CALL + _text("x") + b"\x85R",
    _CALL + b")\x81}b",
    _text(CANARY) + _text("run") + b"\x93)R",
    b"(" + _text("x") + f"i{CANARY}\nrun\n".encode(),
    b"(" + _CALL + _text("x") + b"o",
    _CALL + b")R0",
    b"cos\nsystem\n" + _text(f"python -c 'import {CANARY}'") + b"\x85R",
    b"cbuiltins\nexec\n" + _text(f"import {CANARY}") + b"\x85R",
    b"cbuiltins\n__import__\n" + _text(CANARY) + b"\x85R",
    b"ctorch.storage\n_load_from_bytes\nC\x10" + (b"\x80\x02" + _CALL)[:16] + b"\x85R",
    b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R",
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    b"\x82\x01",
    b"Pid\n",
    b"NQ",
    b"\x97\x98",
    b"\x95" + struct.pack("<Q", 2**62),
    b"\x95" + struct.pack("<Q", 5),
    b"\x8e" + struct.pack("<Q", 2**62),
    b"\x8a\xff" + b"\x7f" * 255,
    b"\x8b" + struct.pack("<i", 2**31 - 1),
    b"r\xff\xff\xff\xff",
    b"j\xff\xff\xff\xff",
    b"]q\x00h\x00a",
    b"}q\x01h\x01h\x01s",
    b")" + b"\x85" * 250,
    b"]" * 250 + b"a" * 249,
    b"(" * 300,
    b"t" * 5,
    b"G\x7f\xf8\0\0\0\0\0\0",
    b"G\xff\xf0\0\0\0\0\0\0",
    b"J\xff\xff\xff\xff",
    _text("\ud800"),
    _text("\x1b[31m\r\n\u202e"),
    _text("😀" * 50),
    b"\x88",
    b"N",
    b"}",
    b"]",
    b"\x8f",
]


def _opcodes(pickled: bytes) -> list[bytes]:
    starts = [at for _, _, at in pickletools.genops(pickled) if at is not None]
    return [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]


_KNOWN_OPCODES: dict[bytes, list[bytes]] = {}


def changed_pickle(draw: random.Random, pickled: bytes) -> bytes:
    """One to four opcodes left out, doubled, swapped, replaced, given other arguments, or hostile ones put in."""
    if pickled not in _KNOWN_OPCODES:
        _KNOWN_OPCODES[pickled] = _opcodes(pickled)
    ops = list(_KNOWN_OPCODES[pickled])
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at, other, kind = draw.randrange(len(ops)), draw.randrange(len(ops)), draw.randrange(10)
        if kind == 0 and len(ops) > 1:
            del ops[at : at + draw.choice([1, 1, 2, 5])]
        elif kind == 1:
            ops.insert(at, ops[at])
        elif kind == 2:
            ops[at], ops[other] = ops[other], ops[at]
        elif kind == 3:
            ops[at] = ops[other]
        elif kind == 4:
            ops[at] = bytes([draw.randrange(256)]) + ops[at][1:]
        elif kind == 5 and len(ops[at]) > 1:
            ops[at] = ops[at][:1] + _changed_bytes(draw, ops[at][1:])
        elif kind == 6:
            ops[at] = draw.choice(HOSTILE)
        elif kind == 7:
            ops.insert(at, draw.choice(HOSTILE))
        elif kind == 8:
            ops[at:at] = ops[other : other + draw.randrange(1, 30)]
        else:
            ops[at:at] = [
                draw.choice([b"0", b"1", b"2", b"(", b"a", b"e", b"s", b"u", b"b", b"R", b"\x81", b"\x94", b"t"])
            ]
        ops = ops or [b"."]
    return b"".join(ops)


def _pickle(draw: random.Random, files: Files) -> Files:
    return {"pickle": changed_pickle(draw, draw.choice(list(files.values())))}


def _pickle_in_archive(draw: random.Random, files: Files) -> Files:
    """A torch file whose pickle is changed, and whose checksums are right again."""
    ((name, content),) = files.items()
    records = _records(content)
    pickled = next(n for n in records if n.endswith("/data.pkl"))
    # A hash of all checksums, which would tell that a record is replaced before anybody looks into it.
    records = {n: data for n, data in records.items() if not n.endswith("serialization_id")}
    return {name: archive({**records, pickled: changed_pickle(draw, records[pickled])})}


def _pickle_in_folder(draw: random.Random, files: Files) -> Files:
    return {**files, ".metadata": changed_pickle(draw, files[".metadata"])}


def _records(content: bytes) -> dict[str, bytes]:
    import io

    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def archive(records: Mapping[str, bytes]) -> bytes:
    import io

    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as file:
        for name, data in records.items():
            file.writestr(zipfile.ZipInfo(name), data)
    return whole.getvalue()


# Zip directories


def _zip_directory(draw: random.Random, files: Files) -> Files:
    """Fields of the headers, of the directory and of its end, and entries left out, doubled, moved."""
    ((name, content),) = files.items()
    begin = content.find(b"PK\x01\x02")
    head, directory, end = content[:begin], content[begin:], b""
    if (at := directory.find(b"PK\x06\x06")) >= 0 or (at := directory.find(b"PK\x05\x06")) >= 0:
        directory, end = directory[:at], directory[at:]
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kind = draw.randrange(6)
        entries = re.split(rb"(?=PK\x01\x02)", directory)[1:]
        if kind == 0:
            end = _changed_bytes(draw, end)
        elif kind == 1:
            directory = _changed_bytes(draw, directory)
        elif kind == 2 and entries:
            at, other = draw.randrange(len(entries)), draw.randrange(len(entries))
            entries[at] = draw.choice([b"", entries[at] * 2, entries[other]])
            directory = b"".join(entries)
        elif kind == 3:
            headers = [m.start() for m in re.finditer(rb"PK\x03\x04|PK\x07\x08", head)]
            at = draw.choice(headers) if headers else 0
            head = head[:at] + _changed_bytes(draw, head[at : at + 40]) + head[at + 40 :]
        elif kind == 4 and entries:
            at = draw.randrange(len(entries))
            field_at, length = draw.choice(
                [(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)]
            )
            number = (draw.choice(INTERESTING) + draw.randrange(-2, 3)) % 2 ** (8 * length)
            entry = entries[at]
            entries[at] = entry[:field_at] + number.to_bytes(length, "little") + entry[field_at + length :]
            directory = b"".join(entries)
        else:
            end = draw.choice(
                [end + draw.randbytes(3), end[: draw.randrange(len(end) + 1)], end * 2, b"PK\x05\x06" + end]
            )
    return {name: head + directory + end}


# Headers and indexes in JSON

_ODD_JSON = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**53,
        2**63,
        2**64,
        10**400,
        0.5,
        1e308,
        "",
        "F32",
        "I64",
        "F8_E4M3",
        "x" * 300,
        [],
        {},
    ),
    *(
        [0],
        [-1],
        [2**62, 4],
        [0, 2**63],
        [[1]],
        {"a": 1},
        "../../etc/passwd",
        "/etc/passwd",
        "\ud800",
        "\x00",
        "\x1b[31m",
        "NaN",
        [1, 2, 3],
    ),
]


def _changed_json(draw: random.Random, value: Any) -> str:
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else []
        places += [(inner, key) for key in keys]
        waiting += [inner[key] for key in keys]
    for _ in range(draw.choice([1, 1, 2, 3])):
        if not places:
            break
        holder, key = draw.choice(places)
        other, other_key = draw.choice(places)
        kind = draw.randrange(6)
        try:
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder, dict):
                holder[str(draw.choice(_ODD_JSON))[:300]] = holder.pop(key)
            elif kind == 2:
                holder[key] = other[other_key] if other is not holder else draw.choice(_ODD_JSON)
            elif kind == 3 and type(holder[key]) is int:
                holder[key] += draw.choice([1, -1, 4, 8, 2**32, -(2**40)])
            else:
                holder[key] = draw.choice(_ODD_JSON)
        except (KeyError, IndexError):
            continue
    try:
        written = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    except (ValueError, RecursionError):  # it holds itself
        written = "{}"
    if draw.random() < 0.3:
        written = _changed_bytes(draw, written.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    if draw.random() < 0.1:
        at = draw.randrange(len(written) + 1)
        written = (
            written[:at]
            + draw.choice(["NaN", "1" * 5_000, "[" * 5_000, '"a":' * 3, "\ufeff", "//", "\\ud800"])
            + written[at:]
        )
    return written


def _safetensors(draw: random.Random, files: Files) -> Files:
    ((name, content),) = files.items()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    raw = _changed_json(draw, json.loads(header)).encode("utf-8", "surrogatepass")
    length = len(raw)
    kind = draw.randrange(12)
    if kind == 0:
        length = (draw.choice(INTERESTING) + draw.randrange(-2, 3)) % 2**64
    elif kind == 1:
        data = _changed_bytes(draw, data)
    elif kind == 2:
        raw = _changed_bytes(draw, header)
        length = len(raw)
    return {name: struct.pack("<Q", length) + raw + data}


def _json_of_folder(draw: random.Random, files: Files) -> Files:
    name = draw.choice([n for n in files if n.endswith(".json")])
    changed = _changed_json(draw, json.loads(files[name])).encode("utf-8", "surrogatepass")
    return {**files, name: _changed_bytes(draw, changed) if draw.random() < 0.1 else changed}


def _legacy(draw: random.Random, files: Files) -> Files:
    """A file of torch before 1.6: its pickles stand one behind the other, the object's is the fourth."""
    ((name, content),) = files.items()
    ends, at = [0], 0
    for _ in range(5):
        *_, (_, _, stop) = pickletools.genops(content[at:])
        at += (stop or 0) + 1
        ends.append(at)
    which = draw.choice([0, 1, 2, 3, 3, 3, 3, 4, 5])
    if which == 5:
        return {name: content[: ends[5]] + _changed_bytes(draw, content[ends[5] :])}
    begin, end = ends[which], ends[which + 1]
    return {name: content[:begin] + changed_pickle(draw, content[begin:end]) + content[end:]}


CAMPAIGNS: dict[str, Mutation] = {
    "pickles": _pickle,
    "pickles in files": _pickle_in_archive,
    "zip directories": _zip_directory,
    "legacy files": _legacy,
    "safetensors headers": _safetensors,
    "sharded metadata": _pickle_in_folder,
    "JSON of folders": _json_of_folder,
}


def describe(name: str, outcomes: list[Outcome]) -> str:
    """A campaign's counts in a line."""
    endings: Counter[str] = sum((o.endings for o in outcomes), Counter())
    runs, slowest, most = (
        sum(o.runs for o in outcomes),
        max(o.slowest_seconds for o in outcomes),
        max(o.megabytes for o in outcomes),
    )
    said = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common())
    return (
        f"{name}: {runs:,} mutations: {said}; slowest {slowest:.2f} s, "
        f"at most {most:,} MB more, in {len(outcomes)} processes"
    )
