"""What many tests need: real processes with a bound on their time, and one thread per process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from distsurf.surface import Status, Surface

# CI tries the same cases each time, so that what it refuses is what has changed; elsewhere new ones are tried.
settings.register_profile("same", derandomize=True)
if "DISTSURF_TESTS_REQUIRE" in os.environ:
    settings.load_profile("same")

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The same digits in the test's own process as in the ranks that it starts."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random models and data each time, whatever ran before."""
    torch.manual_seed(0)


def forget(path: Path, *points: int) -> None:
    """Make a surface file anew, without the values of some points."""
    surface = Surface.load(path)
    surface.status.ravel()[list(points)] = Status.PENDING
    surface.save(path)


@dataclass
class Ended:
    code: int
    out: str
    err: str


class Processes:
    """Starts commands in a folder of the test's own; nothing outlives the test."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *command: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def end(self, process: subprocess.Popen[str], timeout: float = 120) -> Ended:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"still running after {timeout} s: {process.args}\n{out}\n{err}")
        return Ended(process.returncode, out, err)

    def python(self, *arguments: object, ranks: int = 0, timeout: float = 120) -> Ended:
        """Run Python with arguments; ``ranks`` > 0 runs it under mpirun."""
        return self.end(self.start(*self.command(ranks), *arguments), timeout)

    @staticmethod
    def command(ranks: int) -> list[object]:
        launcher = [Path(sys.executable).parent / "mpirun", "-n", ranks] if ranks else []
        return [*launcher, sys.executable]

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path)
    yield running
    running.close()
