"""Models that misbehave before the evaluation begins, where the fast path is tried at the corners of the grid."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from distsurf.surface import Status, Surface
from tests.conftest import Processes
from tests.faults.job import evaluated

NET = """
import os, signal, sys, time
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    if "SETUP" in os.environ and os.environ["PMI_RANK"] == os.environ["VICTIM"]:
        os.kill(os.getpid(), int(os.environ["SETUP"]))
    if "LATE" in os.environ and os.environ["PMI_RANK"] == "1":
        time.sleep(float(os.environ["LATE"]))
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 22 * 22, 3))

def data(n=300):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 24, 24, generator=g), torch.randint(3, (n,), generator=g)

def objective(model, batch):
    # The grid's far corner, and only that: the weights are further out there than anywhere else.
    far = float(next(model.parameters()).sum())
    if os.environ.get("KIND") and abs(far - float(os.environ["AT"])) < 1e-4:
        {"exit": lambda: sys.exit(0), "hang": lambda: time.sleep(1e6),
         "kill": lambda: os.kill(os.getpid(), signal.SIGKILL)}[os.environ["KIND"]]()
    if "SLOW" in os.environ:
        time.sleep(0.02)
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")
    return {"loss": (loss, len(batch[0])), "far": (far, 1)}
"""
JOB = """
name = "corner"
[model]
factory = "net.py:net"
[data]
source = "net.py:data"
batch_size = 100
[objective]
function = "net.py:objective"
[run]
threads = 1
silence = 4
[grid]
x = "-1:1:15"
y = "-1:1:15"
"""
RUN = ("-m", "distsurf.run", "job.toml", "--no-pictures", "--progress", "none")


@pytest.fixture
def job(processes: Processes) -> Processes:
    (processes.folder / "net.py").write_text(NET)
    (processes.folder / "job.toml").write_text(JOB)
    return processes


@pytest.fixture
def corner(job: Processes) -> str:
    """What a plain run finds the weights' sum to be at a corner of the grid."""
    ended = job.python(*RUN, "--plain", "--out", "whole.h5")
    assert ended.code == 0, ended.err
    return str(float(Surface.load(job.folder / "whole.h5")["far"][-1, -1]))


def _without_the_corner(job: Processes, name: str) -> Surface:
    found, whole = (Surface.load(job.folder / file) for file in (name, "whole.h5"))
    assert found.status[-1, -1] == Status.FAILED
    assert found.count(Status.EVALUATED) == found.grid.size - 1
    assert abs(found["loss"].ravel()[:-1] / whole["loss"].ravel()[:-1] - 1).max() < 1e-5
    return found


@pytest.mark.parametrize("ranks", [0, 3])
def test_a_model_that_exits_at_a_corner(job: Processes, corner: str, ranks: int) -> None:
    """With 0, as if all were well: it is a point that fails, and says so."""
    started = job.start(*job.command(ranks), *RUN, "--out", "e.h5", env={"KIND": "exit", "AT": corner})
    ended = job.end(started)
    assert ended.code == 3, (ended.out, ended.err)
    assert "SystemExit: 0" in _without_the_corner(job, "e.h5").failures[224]


def test_a_corner_that_kills_does_not_keep_the_rest(job: Processes, corner: str) -> None:
    """Two starts die while the fast path is tried, then all is plain, and three deaths later the point is given up."""
    run = ("-m", "distsurf", "run", *RUN[2:], "--ranks", 2, "--restarts", 8, "--out", "k.h5")
    ended = job.end(job.start(*job.command(0), *run, env={"KIND": "kill", "AT": corner}), timeout=200)
    assert ended.code == 3, (ended.out, ended.err)
    assert "2 starts died while it was verified" in ended.out
    assert "its process died" in _without_the_corner(job, "k.h5").failures[224]
    assert not list(job.folder.glob(".k.h5.*"))


def test_a_corner_that_hangs_ends_the_job(job: Processes, corner: str) -> None:
    started = job.start(*job.command(3), *RUN, "--out", "h.h5", env={"KIND": "hang", "AT": corner})
    ended = job.end(started, timeout=60)
    assert ended.code != 0
    assert (
        "no sign of life for 4 s (run.silence) while the model was tried at the origin and the corners"
        in ended.err
    )
    assert "--plain leaves the corners out" in ended.err


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_signal_ends_a_model_that_hangs_at_once(job: Processes, corner: str, ranks: int) -> None:
    process = job.start(
        *job.command(ranks),
        *RUN,
        "--out",
        "t.h5",
        "--set",
        "run.silence=600",
        env={"KIND": "hang", "AT": corner},
    )
    while not (job.folder / ".t.h5.trials").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(1)  # from there into the corner
    process.send_signal(signal.SIGINT)
    assert job.end(process, timeout=30).code != 0
    assert not (job.folder / "t.h5").exists()


def test_workers_say_that_rank_0_is_silent(job: Processes) -> None:
    """With the whole program: message and exit code reach the user."""
    process = job.start(
        *job.command(3),
        *RUN,
        "--out",
        "s.h5",
        "--set",
        "run.silence=2",
        "--set",
        "grid.x=-1:1:60",
        env={"SLOW": "1"},
    )
    path = job.folder / "s.h5"
    while evaluated(path) < 20:
        assert process.poll() is None
        time.sleep(0.02)
    (rank_0,) = [pid for pid in _ranks(job.folder) if _environment(pid).get("PMI_RANK") == "0"]
    os.kill(rank_0, signal.SIGSTOP)
    ended = job.end(process, timeout=60)
    assert "has not answered for 2 s" in ended.err, (ended.out, ended.err)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_stops_before_the_evaluation(job: Processes, victim: int) -> None:
    """The others do not wait for it as long as they would for one that trains."""
    env = {"SETUP": str(int(signal.SIGSTOP)), "VICTIM": str(victim)}
    process = job.start(*job.command(3), *RUN, "--out", "l.h5", "--set", "run.silence=2", env=env)
    ended = job.end(process, timeout=60)
    assert ended.code != 0
    assert f"no sign of life of rank {victim} on {socket.gethostname()} for 2 s (run.silence)" in ended.err
    assert not (job.folder / "l.h5").exists()


def test_a_rank_that_is_slow_before_the_evaluation_is_waited_for(job: Processes) -> None:
    """Three times longer than a rank may be silent: its process shows that it is there."""
    ended = job.end(
        job.start(*job.command(3), *RUN, "--out", "w.h5", "--set", "run.silence=2", env={"LATE": "6"})
    )
    assert ended.code == 0, (ended.out, ended.err)


def _ranks(folder: Path) -> list[int]:
    return [
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdigit()
        and _cwd(process) == folder
        and "PMI_RANK" in _environment(int(process.name))
    ]


def _cwd(process: Path) -> Path | None:
    try:
        return Path(os.readlink(process / "cwd"))
    except OSError:
        return None


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_text()
    except OSError:
        return {}
    return dict(part.split("=", 1) for part in text.split("\0") if "=" in part)
