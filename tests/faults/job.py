"""One helper for fault tests: start a job, wait for a condition, strike, and check what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from distsurf.surface import Status, Surface, SurfaceFile
from tests.conftest import ROOT, Ended
from tests.faults.runner import GRID, value

MPIRUN = Path(sys.executable).parent / "mpirun"


class Job:
    """A run of `tests.faults.runner` (or any command) in its own session, with a bound on its time."""

    def __init__(
        self,
        path: Path,
        kind: str = "good",
        ranks: int = 3,
        bound: float = 60.0,
        launcher: Sequence[object] | None = None,
        env: Mapping[str, str] | None = None,
        **options: object,
    ):
        self.path, self.bound = path, bound
        self.launcher_stayed = False
        told = [f"{key}={json.dumps(given)}" for key, given in options.items()]
        if launcher is None:
            launcher = [MPIRUN, "-n", ranks] if ranks else []
        command = [*launcher, sys.executable, "-m", "tests.faults.runner", path, kind, *told]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until a condition holds, or the job has ended."""
        end = time.monotonic() + self.bound
        while not condition() and self.process.poll() is None:
            if time.monotonic() > end:
                self.fail()
            time.sleep(0.002)

    def wait_for_points(self, count: int) -> None:
        """Until the file has so many points."""
        self.wait_for(lambda: evaluated(self.path) >= count)

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, also of those that a daemon started for srun."""
        found = {}
        for pid in (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()):
            with contextlib.suppress(OSError, ValueError, KeyError):
                variables = dict(
                    part.split("=", 1)
                    for part in Path(f"/proc/{pid}/environ").read_text().split("\0")
                    if "=" in part
                )
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                if words[1:3] == ["-m", "tests.faults.runner"] and str(self.path) in words:
                    rank = variables.get("PMI_RANK") or variables["OMPI_COMM_WORLD_RANK"]
                    found[int(rank)] = pid
        return found

    def strike(self, victim: str, blow: signal.Signals) -> bool:
        """Send a signal to ``rank N``, the ``launcher`` or ``everything``. Whether there was anybody to get it."""
        if victim == "launcher":
            targets = [self.process.pid]
        elif victim == "everything":
            targets = [*_children(self.process.pid), self.process.pid]
        else:
            targets = [pid for rank, pid in self.ranks().items() if victim == f"rank {rank}"]
        hit = False
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, blow)
                hit = True
        return hit

    def end(self) -> Ended:
        """Wait for the end; one that outlives its bound fails the test, with every rank's stack.

        mpirun has been seen to stay for ever when its own helpers had been struck and all ranks were gone: it is ended
        then, and counted.
        """
        end = time.monotonic() + self.bound
        alone_since: float | None = None
        while True:
            try:
                out, err = self.process.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if self.ranks():
                    alone_since = None
                elif alone_since is None:
                    alone_since = time.monotonic()
                elif time.monotonic() - alone_since > 10:
                    self.launcher_stayed = True
                    self.clear_away()
                if time.monotonic() > end:
                    self.fail()
        # Ranks whose launcher was killed go by themselves, or not: none may be left to hold the file.
        self.clear_away()
        return Ended(self.process.returncode, out, err)

    def fail(self) -> None:
        """Fail with the stacks of all ranks."""
        for pid in self.ranks().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
                os.kill(pid, signal.SIGABRT)
        time.sleep(1)
        self.clear_away()
        out, err = self.process.communicate()
        raise AssertionError(f"the job outlived its bound of {self.bound} s\n{out}\n{err}")

    def clear_away(self) -> None:
        """End whatever is left of the job."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in _of_session(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").iterdir():
                children = [int(child) for child in (task / "children").read_text().split()]
                found += children
                todo += children
    return found


def _of_session(session: int) -> list[int]:
    """Processes that a launcher has left behind: hydra gives each of its children a group of its own."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[3]) == session:
                found.append(int(folder.name))
    return found


def evaluated(path: Path) -> int:
    """How many points a file has, as any reader sees it while it is being written."""
    if not path.exists():
        return 0
    with SurfaceFile.open(path) as file:
        return int((file.status() == Status.EVALUATED).sum())


def require_truth(path: Path) -> Surface:
    """The file is sound, and every value in it is the closed form's, bit for bit."""
    with SurfaceFile.open(path) as file:
        assert file.problems() == []
        surface = file.read()
    points = np.flatnonzero(surface.status.ravel() == Status.EVALUATED)
    expected = value(GRID.coordinates(points))
    for i, name in enumerate(surface.names):
        assert surface[name].ravel()[points].tobytes() == expected[:, i].tobytes()
    return surface


def complete(path: Path, **options: object) -> Surface:
    """Run the same job again until nothing is missing."""
    ended = Job(path, **options).end()  # type: ignore[arg-type]
    assert ended.code == 0, ended.err
    surface = require_truth(path)
    assert surface.complete
    return surface
