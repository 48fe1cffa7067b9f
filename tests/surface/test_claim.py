"""One writer per file: real processes that write, die, and come from other hosts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from distsurf.errors import InputError
from distsurf.grid import Grid
from distsurf.surface import Column, Surface, SurfaceFile, claim
from distsurf.surface.layout import Place, read_layout
from distsurf.surface.storage import Disk
from tests.conftest import Processes

GRID = Grid.parse({"x": "0:1:5"})
COLUMNS = (Column("loss"),)
WRITER = """
import sys, time
from distsurf.surface import SurfaceFile
with SurfaceFile.open(sys.argv[1], write=True):
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    SurfaceFile.create(tmp_path / "s.h5", GRID, COLUMNS).close()
    return tmp_path / "s.h5"


def _writer(processes: Processes, path: Path) -> subprocess.Popen[str]:
    process = processes.start(sys.executable, "-c", WRITER, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_second_writer_is_told_of_the_first(processes: Processes, path: Path) -> None:
    process = _writer(processes, path)
    words = f"is being written by process {process.pid} on {socket.gethostname()} since 20"
    for attempt in (lambda: SurfaceFile.open(path, write=True), lambda: claim.require_unclaimed(path)):
        with pytest.raises(InputError, match=words):
            attempt()
    assert Surface.load(path).grid == GRID  # readers are welcome
    with SurfaceFile.open(path) as reader:
        assert reader.problems() == []
    assert process.poll() is None


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_writer_does_not_block(processes: Processes, path: Path, blow: signal.Signals) -> None:
    process = _writer(processes, path)
    process.send_signal(blow)
    process.wait()
    start = time.monotonic()
    with SurfaceFile.open(path, write=True) as file:
        file.record(np.array([1]), np.ones((1, 1)), np.ones(1))
    assert time.monotonic() - start < claim.PATIENCE_SECONDS / 2  # its lock went with it: nothing to wait for
    assert Surface.load(path)["loss"][1] == 1


def test_a_writer_that_went_leaves_nothing(path: Path) -> None:
    for _ in range(2):
        with SurfaceFile.open(path, write=True):
            assert _told(path)["pid"] == os.getpid()
        assert _told(path) == {}


def _place(path: Path) -> Place:
    with closing(Disk(path, write=False)) as storage:
        layout = read_layout(storage)
    assert layout is not None
    return layout.places["state/writer"]


def _told(path: Path) -> dict[str, Any]:
    with h5py.File(path, "r", locking=False) as handle:
        text = bytes(handle["state/writer"][0]).decode()
    return dict(json.loads(text)) if text else {}


def _write(path: Path, text: bytes) -> None:
    with closing(Disk(path, write=True)) as storage:
        storage.write(_place(path).offset, text.ljust(512, b"\0"))


def _leave(path: Path, host: str, beat: int) -> None:
    record = {"host": host, "pid": 7, "started": "2026-01-01", "beat": beat}
    _write(path, json.dumps(record).encode())


@pytest.mark.parametrize("without_locks", [False, True])
def test_another_hosts_writer_counts_as_long_as_it_counts(
    path: Path, without_locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locks need not reach from host to host, and clocks need not agree: the count in the file decides."""
    monkeypatch.setattr(claim, "PATIENCE_SECONDS", 1.0)
    if without_locks:
        monkeypatch.setattr("fcntl.flock", _refuse)
    _leave(path, "elsewhere", 1)
    beats = iter(range(2, 1000))

    def sleep_while_it_counts(seconds: float, real: Callable[[float], None] = time.sleep) -> None:
        real(seconds)
        _leave(path, "elsewhere", next(beats))

    with monkeypatch.context() as counting:
        counting.setattr(time, "sleep", sleep_while_it_counts)
        with pytest.raises(InputError, match="process 7 on elsewhere since 2026-01-01"):
            SurfaceFile.open(path, write=True)
    with SurfaceFile.open(path, write=True):  # it counts no more
        assert _told(path)["host"] == socket.gethostname()


def _refuse(*_: Any) -> None:
    raise OSError(38, "Function not implemented")


def test_a_writer_counts_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.0)
    with SurfaceFile.open(path, write=True) as file:
        first = _told(path)["beat"]
        file.commit()  # also with nothing to commit
        assert _told(path)["beat"] == first + 1


@pytest.mark.parametrize("text", [b"\xff\xfe", b"[1]", b"{", b"7"])
def test_a_record_of_nonsense_is_none(path: Path, text: bytes) -> None:
    _write(path, text)
    SurfaceFile.open(path, write=True).close()


def test_two_runs_of_one_job(processes: Processes) -> None:
    """The second is refused before it does anything, also with --fresh; the first goes on."""
    job = ("-m", "distsurf.run", "--set", "model.arguments={width=2,in_channels=1}", "--set", "train.epochs=1",
           "--set", "grid.x=-1:1:201", "--set", "grid.y=-1:1:201", "--no-pictures")  # fmt: skip
    first = processes.start(*processes.command(2), *job)
    path = processes.folder / "runs/digits/surface.h5"
    while not path.exists():
        assert first.poll() is None, processes.end(first).err
        time.sleep(0.02)
    for extra in ([], ["--fresh"]):
        second = processes.python(*job, *extra)
        assert second.code == 1, second.err
        assert "runs/digits/surface.h5 is being written by process" in second.err
        assert second.err.count("\n") == 1
    first.send_signal(signal.SIGINT)
    ended = processes.end(first)
    assert ended.code == 3, ended.err
    assert sorted(os.listdir(path.parent)) == ["resnet8.safetensors", "surface.h5"]
    assert Surface.load(path).status.sum() > 0
