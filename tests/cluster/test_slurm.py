"""Ranks under a real srun: survivors go on without a rank that dies, and without one that hangs."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.faults.job import Job, complete, evaluated, require_truth

SRUN = ("srun", "-n", 4, "-N", 2, "--mpi=pmi2", "--kill-on-bad-exit=0", "--wait=0")


def _started(slurm: Slurm, path: Path, **options: object) -> Job:
    """A job that has begun to evaluate.

    SLURM's pmi2 was seen, once on a busy machine, to misread MPICH's first requests ("value not properly terminated in
    client request"), which leaves the ranks in MPI's own start: such a step is ended and started again.
    """
    for _ in range(3):
        job = Job(path, launcher=SRUN, env=slurm.environment, seconds=0.03, silence=2, **options)  # type: ignore[arg-type]
        end = time.monotonic() + 20
        while evaluated(path) < 40 and job.process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if evaluated(path):
            return job
        for victim in (*(f"rank {rank}" for rank in job.ranks()), "launcher"):
            job.strike(victim, signal.SIGKILL)
        ended = job.end()
        assert "invalid client request" in ended.err, ended.err
    raise AssertionError(f"srun does not get its ranks together: {ended.err}")


def test_ranks_find_each_other(slurm: Slurm, tmp_path: Path) -> None:
    ended = _started(slurm, tmp_path / "s.h5").end()
    assert ended.code == 0, ended.err
    assert require_truth(tmp_path / "s.h5").complete


@pytest.mark.parametrize(
    ("rank", "blow"), [(2, signal.SIGKILL), (3, signal.SIGSTOP)], ids=["killed", "stopped"]
)
def test_survivors_finish_without_a_lost_rank(
    slurm: Slurm, tmp_path: Path, rank: int, blow: signal.Signals
) -> None:
    path = tmp_path / "s.h5"
    job = _started(slurm, path)
    assert job.strike(f"rank {rank}", blow)
    job.wait_for(lambda: require_truth(path).complete)
    if blow == signal.SIGSTOP:  # srun waits for it, as it was told to
        job.strike(f"rank {rank}", signal.SIGKILL)
    ended = job.end()
    assert f"rank {rank} on " in ended.out, ended.err
    assert "done without: no sign of life for 2 s; others evaluate its points" in ended.out
    assert require_truth(path).complete


def test_a_lost_coordinator_ends_the_others(slurm: Slurm, tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    job = _started(slurm, path)
    assert job.strike("rank 0", signal.SIGKILL)
    ended = job.end()
    assert ended.err.count("has not answered for 2 s") == 3
    require_truth(path)
    complete(path)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_before_the_evaluation_ends_the_others(
    slurm: Slurm, tmp_path: Path, victim: int
) -> None:
    options = {"sick": [victim], "silence": 2}
    for _ in range(3):  # see `_started`
        ended = Job(tmp_path / "s.h5", "stillborn", launcher=SRUN, env=slurm.environment, **options).end()
        if "invalid client request" not in ended.err:
            break
    assert ended.code != 0
    assert ended.err.count(f"no sign of life of rank {victim} on ") == 3, ended.err


def test_the_wrong_flag_is_named(slurm: Slurm, tmp_path: Path) -> None:
    wrong = ("srun", "-n", 2, "--mpi=none")
    ended = Job(tmp_path / "s.h5", launcher=wrong, env=slurm.environment).end()
    assert ended.code == 1, ended.err
    assert "--mpi=pmi2 for MPICH" in ended.err
    assert sys.executable not in ended.out
