"""``distsurf run --ranks N --restarts K``: real jobs whose ranks die, started again by themselves."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from distsurf import launch
from distsurf.errors import Incomplete
from distsurf.launch import run_again
from distsurf.surface import Status, Surface
from tests.conftest import Processes, forget
from tests.faults.job import Job, evaluated

NET = """
import os, signal, time
import torch
from torch import nn

def net():
    return nn.Linear(4, 3)

def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, 4, generator=g), torch.randint(3, (40,), generator=g)

def objective(model, batch):
    time.sleep(0.02)
    # In rare batches of one start, before anything says so: a kill as the kernel's out-of-memory killer does it.
    if os.environ.get("PMI_RANK") == "1" and time.monotonic() - BORN > float(os.environ.get("LIFE", "1e9")):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"loss": (nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[0]))}

BORN = time.monotonic()
"""
JOB = """
name = "mortal"
[model]
factory = "net.py:net"
[data]
source = "net.py:data"
batch_size = 40
[objective]
function = "net.py:objective"
[run]
threads = 1
fast = false
[grid]
x = "-1:1:15"
y = "-1:1:15"
"""
RUN = ("-m", "distsurf", "run", "job.toml", "--no-pictures", "--progress", "none", "--ranks", 2)


@pytest.fixture
def job(processes: Processes) -> Processes:
    (processes.folder / "net.py").write_text(NET)
    (processes.folder / "job.toml").write_text(JOB)
    return processes


def test_a_job_whose_rank_dies_completes_by_itself(job: Processes) -> None:
    whole = job.python(*RUN, "--out", "whole.h5")
    assert whole.code == 0, whole.err
    ended = job.end(job.start(*job.command(0), *RUN, "--restarts", 9, env={"LIFE": "1.2"}))
    assert ended.code == 0, ended.err
    assert "points are left: restart 1 of at most 9" in ended.err
    expected, found = (Surface.load(job.folder / name) for name in ("whole.h5", "runs/mortal/surface.h5"))
    assert found["loss"].tobytes() == expected["loss"].tobytes()


def test_ctrl_c_ends_it_for_good(job: Processes) -> None:
    process = job.start(*job.command(0), *RUN, "--restarts", 9, "--set", "grid.x=-1:1:99")
    path = job.folder / "runs/mortal/surface.h5"
    while evaluated(path) < 10:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    ended = job.end(process)
    assert ended.code == 3, ended.err
    assert "stopped by SIGINT" in ended.err
    assert Surface.load(path).count(Status.EVALUATED) >= 10


def test_bad_input_is_not_tried_again(job: Processes) -> None:
    ended = job.python(*RUN, "--restarts", 5, "--set", "data.source=net.py:none")
    assert ended.code == 1
    assert "start" not in ended.err
    assert ended.err.count("distsurf:") == 1
    for wrong in (("--under", "mpirun", "--ranks", "2"), ("--ranks", "-1")):
        assert job.python("-m", "distsurf", "run", "job.toml", *wrong).code == 1


def test_it_goes_on_while_the_file_advances(tmp_path: Path) -> None:
    """With starts in place of real ones; the file is real."""
    path = tmp_path / "s.h5"
    Job(path).end()
    done = Surface.load(path)
    done.status[:] = Status.PENDING
    done.save(path)
    said: list[str] = []

    def restarted(start: list[int], restarts: int) -> int:
        """Each start settles as many points as the list says."""
        todo = iter(range(done.status.size))

        def once(number: int) -> int:
            surface = Surface.load(path)
            for _ in range(start[number]):
                surface.status.ravel()[next(todo)] = Status.FAILED
            surface.save(path)
            return 9

        return run_again(once, path, restarts, is_fresh=False, stopped=lambda: "", say=said.append)

    with pytest.raises(
        Incomplete, match="the ranks ended with 9 and brought the surface no further; 413 points are"
    ):
        restarted([1, 2, 0, 4, 0, 0], 9)  # one in vain is no end
    assert said[-1] == "the ranks ended with 9; 413 points are left: restart 5 of at most 9"
    forget(path, *range(done.status.size))
    with pytest.raises(Incomplete, match="no further; 419 points are"):
        restarted([1, 0], 1)
    forget(path, *range(done.status.size))
    with pytest.raises(Incomplete, match="after 2 starts"):
        restarted([10, 20], 1)
    forget(path, *range(done.status.size))
    with pytest.raises(Incomplete, match=r"420 points failed, for which distsurf status .* has the reasons"):
        restarted([200, 220], 5)


def test_an_mpirun_that_stays_behind_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without children that does not end: what mpirun becomes when its helpers are killed."""
    monkeypatch.setattr(launch, "ALONE_SECONDS", 0.2)
    sleeper = tmp_path / "mpirun"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    assert launch.Launcher([str(sleeper)])([]) == -signal.SIGKILL
    sleeper.write_text("#!/bin/sh\nsleep 2; exit 3\n")  # one with a child is waited for
    assert launch.Launcher([str(sleeper)])([]) == 3
