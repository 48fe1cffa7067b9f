"""One fault at a time, with real ranks under a real mpirun: what is said, how it ends, and that nothing is lost."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from distsurf.surface import Status, Surface, SurfaceFile
from tests.faults.job import Job, complete, evaluated, require_truth
from tests.faults.runner import GRID

SLOW = {"seconds": 0.02}
POISON = 57


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.h5"


@pytest.mark.parametrize("ranks", [0, 3])
def test_undisturbed(path: Path, ranks: int) -> None:
    ended = Job(path, ranks=ranks, kind="uneven").end()
    assert ended.code == 0, ended.err
    assert require_truth(path).complete


# -- evaluators that misbehave ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raise", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("exit", "SystemExit: this model exits"),
        ("allocate", "smaller data.batch_size"),
    ],
)
def test_a_point_that_cannot_be_evaluated(path: Path, kind: str, words: str) -> None:
    """Named with rank, host, point and cause; all others are done, and the same command tries it again."""
    ended = Job(path, kind, point=POISON).end()
    assert ended.code == 3, ended.err
    surface = require_truth(path)
    assert surface.count(Status.EVALUATED) == GRID.size - 1
    where = ", ".join(f"{c:g}" for c in GRID.coordinates_of(POISON))
    assert f"1 failed; at ({where}): rank " in ended.err
    assert words in surface.failures[POISON]
    assert f" on {os.uname().nodename}: " in surface.failures[POISON]
    complete(path)


def test_a_rank_that_fails_at_every_point(path: Path) -> None:
    """Others do what it cannot."""
    ended = Job(path, "raise", sick=[1]).end()
    assert ended.code == 0, ended.err
    assert require_truth(path).complete


def test_a_worker_that_hangs(path: Path) -> None:
    """No sign of life: its point goes to others, and hangs there too, until nobody is left or it is given up."""
    job = Job(path, "hang", ranks=4, point=POISON, silence=3.0, bound=90)
    ended = job.end()
    # Of mpirun's own exit status nothing can be said once ranks have left without the others.
    assert "points evaluated" in ended.err, (ended.out, ended.err)
    assert ended.out.count("no sign of life for 3 s; others evaluate its points") >= 2
    assert require_truth(path).count(Status.EVALUATED) >= GRID.size - 1
    complete(path)


# -- processes that die -----------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["rank 0", "rank 2", "launcher", "everything"])
def test_kill_9(path: Path, victim: str) -> None:
    job = Job(path, **SLOW)
    job.wait_for_points(40)
    seen = evaluated(path)
    job.strike(victim, signal.SIGKILL)
    ended = job.end()
    assert ended.code != 0
    assert require_truth(path).count(Status.EVALUATED) >= seen
    complete(path)


@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_that_ask(path: Path, blow: signal.Signals) -> None:
    job = Job(path, seconds=0.05)
    job.wait_for_points(30)
    start = time.monotonic()
    assert job.strike("rank 1", blow)
    ended = job.end()
    assert time.monotonic() - start < 10
    assert ended.code == 3, ended.err
    assert "points evaluated" in ended.err
    require_truth(path)
    with SurfaceFile.open(path) as file:
        assert not file.attempts()[file.status() == Status.PENDING].any()  # given back in good order
    complete(path)


def test_a_second_signal_ends_at_once(path: Path) -> None:
    job = Job(path, "hang", ranks=0, point=POISON, silence=600)
    job.wait_for_points(20)
    for _ in range(2):
        os.kill(job.process.pid, signal.SIGTERM)
        time.sleep(0.5)
    assert job.end().code == 3
    require_truth(path)
    complete(path)


def test_a_worker_that_is_stopped_for_a_while_comes_back(path: Path) -> None:
    # Longer than a busy machine keeps any rank waiting; the others have work for twice as long as this one sleeps.
    job = Job(path, seconds=0.09, silence=3.0)
    job.wait_for_points(30)
    assert job.strike("rank 2", signal.SIGSTOP)
    time.sleep(5.5)
    assert job.strike("rank 2", signal.SIGCONT)
    ended = job.end()
    assert ended.code == 0, (ended.out, ended.err)
    assert "rank 2 on " in ended.out
    assert "is done without: no sign of life for 3 s" in ended.out
    assert "is back" in ended.out
    assert require_truth(path).complete


def test_a_worker_that_stays_stopped_does_not_keep_the_job(path: Path) -> None:
    job = Job(path, seconds=0.02, silence=3.0)
    job.wait_for_points(30)
    assert job.strike("rank 1", signal.SIGSTOP)
    ended = job.end()
    assert ended.code in (0, 9, 137), (
        ended.out,
        ended.err,
    )  # mpirun has its own word for a rank that never left
    assert require_truth(path).complete


def test_a_coordinator_that_is_stopped_is_left(path: Path) -> None:
    job = Job(path, seconds=0.02, silence=3.0)
    job.wait_for_points(30)
    assert job.strike("rank 0", signal.SIGSTOP)
    ended = job.end()
    assert "has not answered for 3 s" in ended.err
    require_truth(path)
    complete(path)


def test_a_point_that_kills_its_process_is_given_up(path: Path) -> None:
    """Three runs die of it; the fourth completes all the rest, and the next one gives it another chance."""
    codes = []
    for _ in range(10):
        codes.append(Job(path, "die", ranks=2, point=POISON).end().code)
        if codes[-1] == 3:
            break
    assert codes[-1] == 3, codes
    assert len(codes) <= 5
    surface = require_truth(path)
    assert surface.count(Status.EVALUATED) == GRID.size - 1
    assert "its process died 3 times" in surface.failures[POISON]
    complete(path)


# -- disks ------------------------------------------------------------------------------------------------


def _limit(job: Job, size: int) -> None:
    """Have the kernel refuse every write of rank 0 beyond ``size`` bytes, as a quota or a full disk does."""
    _, hard = resource.prlimit(job.ranks()[0], resource.RLIMIT_FSIZE)
    resource.prlimit(job.ranks()[0], resource.RLIMIT_FSIZE, (size, hard))


def test_a_disk_that_is_full_for_a_while(path: Path) -> None:
    job = Job(path, **SLOW)
    job.wait_for_points(30)
    _limit(job, 0)
    time.sleep(2.5)
    held = evaluated(path)
    time.sleep(1.5)
    assert evaluated(path) == held
    _limit(job, resource.RLIM_INFINITY)
    ended = job.end()
    assert ended.code == 0, (ended.out, ended.err)
    assert ended.out.count("cannot be written (File too large): the evaluation goes on") == 1
    assert ended.out.count("takes results again; nothing is lost") == 1
    assert require_truth(path).complete


def test_a_disk_that_stays_full(path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ends with 3 after its patience; what did not fit was evaluated, and is evaluated again."""
    job = Job(path, disk_patience=2, seconds=0.02)
    job.wait_for_points(30)
    _limit(job, 0)
    ended = job.end()
    assert ended.code == 3, (ended.out, ended.err)
    assert "could not be written" in ended.err
    assert "lost, since no other folder took them either" in ended.err
    assert require_truth(path).count(Status.EVALUATED) >= 30
    complete(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a file system of its own")
def test_a_full_file_system(tmp_path: Path) -> None:
    """No room for the file in the first place: one line, nothing left behind, and the same command when there is."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no mounts here")
    try:
        path, filler = folder / "s.h5", folder / "filler"
        descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, bytes(4096))
        os.close(descriptor)
        ended = Job(path).end()
        assert ended.code == 1, (ended.out, ended.err)
        assert "its disk has 0 MB left" in ended.err
        assert os.listdir(folder) == ["filler"]
        filler.unlink()
        complete(path)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_that_is_removed_is_put_back(tmp_path: Path, what: str) -> None:
    path = tmp_path / "run" / "s.h5"
    job = Job(path, **SLOW)
    job.wait_for_points(60)
    if what == "file":
        path.unlink()
    else:
        shutil.rmtree(path.parent)
    ended = job.end()
    assert ended.code == 0, (ended.out, ended.err)
    assert ended.out.count("had been removed and is there again, with everything recorded so far") == 1
    assert require_truth(path).complete


def test_a_file_that_is_replaced_is_left_alone(path: Path) -> None:
    job = Job(path, disk_patience=2, **SLOW)
    job.wait_for_points(60)
    other = path.with_name("other")
    other.write_text("precious")
    os.replace(other, path)
    ended = job.end()
    assert ended.code == 3, (ended.out, ended.err)
    assert ended.out.count("another file has taken its place") == 1
    assert path.read_text() == "precious"
    rescued = path.with_name("s.rescued-1.h5")
    assert str(rescued) in ended.err
    assert require_truth(rescued).count(Status.EVALUATED) > 60
    os.replace(rescued, path)
    complete(path)


def test_readers_see_a_file_that_is_being_written(path: Path) -> None:
    """Looked at without a pause: never damaged, never a value that is not true, and never fewer points."""
    job = Job(path, "uneven", seconds=0.005, ranks=3)
    job.wait_for(path.exists)
    counts = []
    while job.process.poll() is None:
        counts.append(require_truth(path).count(Status.EVALUATED))
    assert job.end().code == 0
    assert counts == sorted(counts)
    assert np.unique(counts).size > 2
    assert Surface.load(path).complete


@pytest.mark.parametrize("ranks", [2, 3])
def test_two_points_that_kill_do_not_take_others_with_them(path: Path, ranks: int) -> None:
    """However often it is started: only they fail, each time last and alone, and everything else has its value."""
    deadly = [31, 210]
    for _ in range(16):
        Job(path, "die", ranks=ranks, points=deadly, shard_seconds=0.05).end()
        if not (require_truth(path).status == Status.PENDING).any():
            break
    surface = require_truth(path)
    assert np.flatnonzero(surface.status.ravel() == Status.FAILED).tolist() == deadly
    assert surface.count(Status.EVALUATED) == GRID.size - 2
    Job(path, "die", ranks=ranks, points=deadly).end()  # tried again, to no harm
    assert require_truth(path).count(Status.EVALUATED) == GRID.size - 2


@pytest.mark.parametrize("how", ["empty", "cut", "zeroed"])
def test_a_file_that_others_change_during_the_run_is_whole_in_the_end(path: Path, how: str) -> None:
    job = Job(path, seconds=0.02)
    job.wait_for_points(60)
    with open(path, "r+b") as file:
        if how == "zeroed":
            with SurfaceFile.open(path) as opened:
                place = opened._layout.places["train_loss"]
            file.seek(place.offset)
            file.write(bytes(place.end - place.offset))
        else:
            file.truncate(0 if how == "empty" else 20_000)
    ended = job.end()
    assert ended.code == 0, ended.err
    assert "had been changed by others and is whole again" in ended.out
    assert require_truth(path).complete
