"""Object stores: the same verdicts as on disk, from ranges of the objects, and one clear sentence when it fails."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from builders import edited, enstack_folder, flip_bit, loop_counters, truncate

from enstack_lightning.checkpoint import (
    Format,
    Options,
    Report,
    Severity,
    Verdict,
    checkpoints_at,
    find_checkpoints,
    find_last_good,
    verify_checkpoint,
)
from enstack_lightning.checkpoint.source import RemoteSource

DEEP = Options(deep=True)
LAYERS = 30


def errors(report: Report) -> dict[str, str]:
    return {finding.code: finding.message for finding in report.of(Severity.ERROR)}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Lightning checkpoint of 32 MB in 240 records."""
    model = torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(LAYERS)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    path = tmp_path_factory.mktemp("big") / "big.ckpt"
    entries = {"epoch": 0, "global_step": 1, "lr_schedulers": [], "pytorch-lightning_version": "2.6.0"}
    states = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    torch.save({**entries, **states, "loops": loop_counters(1)}, path)
    return path


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An S3 file system whose bucket `bucket` is empty."""
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    filesystem_class = fsspec.get_filesystem_class("s3")
    filesystem_class.clear_instance_cache()
    filesystem = filesystem_class()
    filesystem.mkdir("bucket")
    yield filesystem
    filesystem.rm("bucket", recursive=True)
    filesystem_class.clear_instance_cache()


class Requests(list[tuple[str, int]]):
    """Every request that reaches the store: its method, and the bytes of a range asked for."""

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self)


@pytest.fixture
def requests(store: Any, monkeypatch: pytest.MonkeyPatch) -> Requests:
    from aiobotocore.httpsession import AIOHTTPSession

    seen, send = Requests(), AIOHTTPSession.send

    async def counted(self: Any, request: Any) -> Any:
        span = request.headers.get("Range")
        text = span.decode() if isinstance(span, bytes) else span
        begin, end = text.removeprefix("bytes=").split("-") if text else ("1", "0")
        response = await send(self, request)
        seen.append((request.method, int(end) - int(begin) + 1))
        return response

    monkeypatch.setattr(AIOHTTPSession, "send", counted)
    return seen


def test_a_file_is_verified_from_ranges_of_it(big: Path, store: Any, requests: Requests) -> None:
    store.put(str(big), "bucket/run/big.ckpt")
    requests.clear()
    report = verify_checkpoint("s3://bucket/run/big.ckpt")
    local = verify_checkpoint(big)
    assert report.verdict is local.verdict is Verdict.PASS
    assert report.facts.tensors == local.facts.tensors
    assert report.facts.optimizers == local.facts.optimizers
    assert requests.bytes < big.stat().st_size / 100
    large = LAYERS * 3  # tensors too large for the headers on both sides to come in one range
    assert len(requests) < large + 15


def test_a_deep_verification_reads_it_all_and_finds_what_a_quick_one_cannot(
    big: Path, store: Any, requests: Requests, tmp_path: Path
) -> None:
    path = Path(shutil.copy(big, tmp_path))
    flip_bit(path, path.stat().st_size // 2)
    store.put(str(path), "bucket/flipped.ckpt")
    store.put(str(big), "bucket/big.ckpt")
    assert verify_checkpoint("s3://bucket/flipped.ckpt").verdict is Verdict.PASS
    requests.clear()
    assert "CK105" in errors(verify_checkpoint("s3://bucket/flipped.ckpt", DEEP))
    assert requests.bytes >= path.stat().st_size * 0.98
    assert verify_checkpoint("s3://bucket/big.ckpt", DEEP).verdict is Verdict.PASS


def test_a_folder_is_verified(store: Any, requests: Requests, tmp_path: Path) -> None:
    store.put(str(enstack_folder(tmp_path / "c")), "bucket/c", recursive=True)
    requests.clear()
    for url in ("s3://bucket/c", "s3://bucket/c/"):
        report = verify_checkpoint(url, DEEP)
        assert (report.verdict, report.facts.format) == (Verdict.PASS, Format.ENSTACK), report.findings
    assert len(requests) < 60
    store.rm("bucket/c/model.safetensors")
    assert "CK101" in errors(verify_checkpoint("s3://bucket/c"))


def test_what_was_saved_anew_is_read_anew(trained: Path, store: Any) -> None:
    for step in (3, 7):
        store.put(str(trained / f"step={step}.ckpt"), "bucket/run/last.ckpt")
        assert verify_checkpoint("s3://bucket/run/last.ckpt").facts.progress.global_step == step
        assert list(find_checkpoints("s3://bucket/run")) == ["s3://bucket/run/last.ckpt"]
    store.put(str(trained / "step=9.ckpt"), "bucket/run/newer.ckpt")
    assert len(list(find_checkpoints("s3://bucket/run"))) == 2


def test_checkpoints_are_found_by_folder_and_pattern(trained: Path, store: Any, tmp_path: Path) -> None:
    for step in (9, 10):
        store.put(str(trained / f"step={step}.ckpt"), f"bucket/runs/a/step={step}.ckpt")
    store.put(str(trained / "step=3.ckpt"), "bucket/runs/a/step=3.ckpt.part")
    store.put(str(enstack_folder(tmp_path / "c", epoch=1, batches=4)), "bucket/runs/b", recursive=True)
    every = ["s3://bucket/runs/a/step=9.ckpt", "s3://bucket/runs/a/step=10.ckpt", "s3://bucket/runs/b"]
    assert list(find_checkpoints("s3://bucket/runs")) == list(checkpoints_at(["s3://bucket/runs"])) == every
    assert list(checkpoints_at(["s3://bucket/runs/a/*.ckpt", "s3://bucket/none*"])) == [*every[:2], "s3://bucket/none*"]
    best = find_last_good("s3://bucket/runs")
    assert best is not None
    assert best.path == every[1]


def test_damage_is_told_as_on_disk(trained: Path, store: Any, tmp_path: Path) -> None:
    path = Path(shutil.copy(trained / "step=7.ckpt", tmp_path))
    truncate(path, path.stat().st_size - 1)
    store.put(str(path), "bucket/cut.ckpt")
    store.pipe("bucket/empty.ckpt", b"")
    store.pipe("bucket/page.ckpt", b"<!doctype html>")
    told = {name: errors(verify_checkpoint(f"s3://bucket/{name}.ckpt")) for name in ("cut", "empty", "page")}
    assert {name: set(codes) for name, codes in told.items()} == {
        "cut": {"CK104"},
        "empty": {"CK103"},
        "page": {"CK102"},
    }


@pytest.mark.parametrize("url", ["s3://bucket/c.ckpt", "s3://no-such-bucket/c.ckpt", "memory://none/c.ckpt"])
def test_what_is_not_there_is_missing(url: str, store: Any) -> None:
    assert errors(verify_checkpoint(url)) == {"CK101": "c.ckpt: it is missing"}
    assert list(checkpoints_at([url])) == [url]


def test_no_credentials_is_one_sentence(trained: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(str(trained / "step=7.ckpt"), "bucket/c.ckpt")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    type(store).clear_instance_cache()
    report = verify_checkpoint("s3://bucket/c.ckpt")
    assert errors(report) == {
        "CK106": "c.ckpt: it cannot be read: NoCredentialsError: Unable to locate credentials",
    }
    assert list(checkpoints_at(["s3://bucket/*"])) == ["s3://bucket/*"]


@pytest.mark.parametrize(
    ("url", "words"),
    [("gs://bucket/c.ckpt", "Please install gcsfs"), ("nonsense://bucket/c.ckpt", "Protocol not known: nonsense")],
)
def test_a_protocol_that_cannot_be_spoken_is_one_sentence(url: str, words: str) -> None:
    (message,) = errors(verify_checkpoint(url)).values()
    assert words in message
    assert "\n" not in message
    assert list(checkpoints_at([url, f"{url[:9]}*"])) == [url, f"{url[:9]}*"]


def test_memory_is_a_store_like_any_other(trained: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/run/step=7.ckpt", (trained / "step=7.ckpt").read_bytes())
    path = edited(trained / "step=7.ckpt", tmp_path / "c.ckpt", lambda c: c.update(epoch=-1))
    memory.pipe("/run/step=8.ckpt", path.read_bytes())
    assert verify_checkpoint("memory://run/step=7.ckpt", DEEP).verdict is Verdict.PASS
    assert "CK301" in errors(verify_checkpoint("memory://run/step=8.ckpt"))
    assert list(find_checkpoints("memory://run")) == ["memory://run/step=7.ckpt", "memory://run/step=8.ckpt"]
    memory.rm("/run", recursive=True)


def test_the_root_of_a_store_is_a_folder_like_any_other(trained: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/run/step=7.ckpt", (trained / "step=7.ckpt").read_bytes())
    assert list(find_checkpoints("memory://")) == ["memory://run/step=7.ckpt"]
    memory.rm("/run", recursive=True)


@pytest.mark.parametrize("change", ["replaced", "cut", "removed"])
def test_an_object_that_changes_while_it_is_read_is_told(
    change: str, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    whole = big.read_bytes()
    memory.pipe("/run/big.ckpt", whole)
    prefetch = RemoteSource.prefetch

    def prefetch_and_change(self: RemoteSource, ranges: Any) -> None:
        prefetch(self, ranges)
        if len(list(memory.find("/run"))) and self.requests > 1:
            memory.rm("/run/big.ckpt") if change == "removed" else memory.pipe(
                "/run/big.ckpt", whole[:-1] if change == "cut" else whole
            )

    monkeypatch.setattr(RemoteSource, "prefetch", prefetch_and_change)
    assert verify_checkpoint("memory://run/big.ckpt").verdict is Verdict.FAIL
    memory.rm("/run", recursive=True) if memory.exists("/run") else None


def test_a_store_that_gives_no_reason_is_named_by_the_kind_of_its_error(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/run/c.ckpt", (trained / "step=7.ckpt").read_bytes())

    def wait(*_: Any, **__: Any) -> bytes:
        raise TimeoutError

    monkeypatch.setattr(type(memory), "cat_file", wait)
    assert errors(verify_checkpoint("memory://run/c.ckpt")) == {"CK106": "c.ckpt: it cannot be read: TimeoutError"}
    memory.rm("/run", recursive=True)


def test_the_command_line_takes_urls(trained: Path, store: Any) -> None:
    store.put(str(trained / "step=7.ckpt"), "bucket/run/c.ckpt")
    command = [sys.executable, "-m", "enstack_lightning", "verify", "s3://bucket/run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "s3://bucket/run/c.ckpt" in done.stdout


def test_a_file_on_disk_needs_no_fsspec(trained: Path) -> None:
    code = (
        "import sys; from enstack_lightning.checkpoint import verify_checkpoint, checkpoints_at\n"
        "[verify_checkpoint(p) for p in checkpoints_at(sys.argv[1:])]\n"
        "print({'fsspec', 'numpy', 'isal', 'blake3', 'torch'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, f"{trained}/step=*.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"


class _Quiet(SimpleHTTPRequestHandler):
    """Answers a request for a range with the whole file, as Python's own server does."""

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("deep", [False, True])
def test_a_web_server_that_knows_no_ranges_is_read_from_as_a_disk_is(big: Path, deep: bool) -> None:
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(big.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        report = verify_checkpoint(f"http://127.0.0.1:{server.server_port}/{big.name}", Options(deep=deep))
    finally:
        server.shutdown()
        server.server_close()
    assert errors(report) == {}
    assert report.verdict is verify_checkpoint(big, Options(deep=deep)).verdict
    assert report.facts.progress.global_step == 1


def test_what_was_fetched_beforehand_without_ranges_is_the_whole_object(big: Path) -> None:
    class Rangeless:
        def info(self, path: str) -> dict[str, Any]:
            return {"size": big.stat().st_size, "type": "file"}

        def cat_ranges(self, paths: list[str], starts: list[int], ends: list[int], on_error: str) -> list[bytes]:
            return [big.read_bytes() for _ in paths]

    source = RemoteSource(Rangeless(), "big.ckpt")
    source.prefetch([(1_000_000, 8), (9_000_000, 8)])
    assert source.read_at(9_000_000, 8) == big.read_bytes()[9_000_000:9_000_008]
