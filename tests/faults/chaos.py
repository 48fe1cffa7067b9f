"""Random blows at random moments, until every job is complete and every value is the one of an undisturbed run.

    python -m tests.faults.chaos --rounds 1000 [--seed 0]        (make chaos)

A round is one surface: its job is started, struck, and started again until it is complete; in every fifth round it is
cut into shards, and merged, and the merges are struck. Prints a table of the blows: how many there were, how many files
they damaged, how many recorded points were lost, how many points were evaluated again, and the longest times until the
job had ended after a blow and until it was complete after its last start.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distsurf.errors import DistsurfError
from distsurf.shards import ArrayShard
from distsurf.surface import Status, SurfaceFile
from distsurf.surface.repair import repair
from tests.faults.job import Job, evaluated, require_truth
from tests.faults.runner import GRID

RANKS = 3
VICTIMS = (*(f"rank {rank}" for rank in range(RANKS)), "launcher", "everything")
MOST_BLOWS = 4
"""In a round."""
SHARDS = 3
SHARE_OF_ARRAYS = 0.2
"""Of the rounds."""


@dataclass
class Tally:
    """What blows of one kind did."""

    blows: int = 0
    damaged: int = 0
    lost: int = 0
    again: int = 0
    slowest_end: float = 0.0
    slowest_completion: float = 0.0


class Chaos:
    """The rounds, all drawn from one seed."""

    def __init__(self, folder: Path, seed: int):
        self._folder = folder
        self._random = random.Random(seed)
        self.launchers_that_stayed = 0
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self._blows: dict[str, Callable[[Job, str], None]] = {
            "KILL": lambda job, victim: self._signal(job, victim, signal.SIGKILL),
            "TERM": lambda job, victim: self._signal(job, victim, signal.SIGTERM),
            "STOP, CONT": self._pause,
            "full disk": self._fill_disk,
            "cut copy": self._cut_copy,
        }

    def round(self, number: int) -> None:
        """One surface, from nothing to complete. Raises AssertionError for anything that must not be."""
        if self._random.random() < SHARE_OF_ARRAYS:
            self._array(number)
        else:
            self._one_job(number)
        for file in self._folder.glob(f"{number}.*"):
            file.unlink()

    def _array(self, number: int) -> None:
        """A surface of three shards, merged while they are evaluated; the merges are struck, and every third shard."""
        whole = self._folder / f"{number}.h5"
        shards = [ArrayShard(index, SHARDS) for index in range(SHARDS)]
        done = 0
        while done < SHARDS:
            path = shards[done].path(whole)
            job = Job(path, ranks=2, seconds=0.003, silence=1.5, commit_seconds=0.02, shard=str(shards[done]))
            if self._random.random() < 0.3:
                job.wait_for_points(self._random.randrange(GRID.size // SHARDS))
                job.strike(self._random.choice(["rank 0", "rank 1", "everything"]), signal.SIGKILL)
            if self._random.random() < 0.7:
                job.wait_for(path.exists)
                self._strike_merge(whole)
            done += job.end().code == 0
        for _ in range(2):
            self._strike_merge(whole)
        ended = subprocess.run(_merge_command(whole), capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, (ended.stdout, ended.stderr)
        assert require_truth(whole).complete

    def _strike_merge(self, whole: Path) -> None:
        kind = self._random.choice(["KILL", "TERM", "STOP, CONT", "full disk"])
        tally = self.tallies[f"merge, {kind}"]
        before = evaluated(whole)
        merge = subprocess.Popen(
            _merge_command(whole),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if kind == "full disk":
            resource.prlimit(
                merge.pid, resource.RLIMIT_FSIZE, (self._random.randrange(20_000), resource.RLIM_INFINITY)
            )
        time.sleep(self._random.uniform(0.05, 0.3))  # much of that is its start-up
        tally.blows += merge.poll() is None
        struck = time.monotonic()
        if kind == "STOP, CONT":
            merge.send_signal(signal.SIGSTOP)
            time.sleep(self._random.random())
            merge.send_signal(signal.SIGCONT)
        elif kind != "full disk":
            merge.send_signal(getattr(signal, f"SIG{kind}"))
        _, err = merge.communicate(timeout=60)
        tally.slowest_end = max(tally.slowest_end, time.monotonic() - struck)
        assert "Traceback" not in err, err
        if whole.exists():
            tally.lost += max(0, before - require_truth(whole).count(Status.EVALUATED))

    def _one_job(self, number: int) -> None:
        path, log = self._folder / f"{number}.h5", self._folder / f"{number}.log"
        options = {
            "seconds": 0.006,
            "silence": 1.5,
            "commit_seconds": self._random.choice([0.02, 0.1, 0.5]),
            "log": str(log),
            "bound": 60.0,
        }
        kinds: list[str] = []
        for _ in range(self._random.randint(1, MOST_BLOWS)):
            kind = self._random.choice(list(self._blows))
            victim = self._random.choice(VICTIMS)
            kinds.append(kind)
            tally = self.tallies[kind]
            job = Job(path, ranks=RANKS, **options)  # type: ignore[arg-type]
            already = evaluated(path)
            job.wait_for_points(already + self._random.randrange(1 + GRID.size - already))
            time.sleep(self._random.random() * 0.02)
            seen = evaluated(path)
            tally.blows += job.process.poll() is None
            self._blows[kind](job, victim)
            struck = time.monotonic()
            ended = job.end()
            if job.launcher_stayed:
                self.launchers_that_stayed += 1
            else:
                tally.slowest_end = max(tally.slowest_end, time.monotonic() - struck)
            assert "Traceback" not in ended.err, ended.err
            if path.exists():
                left = require_truth(path).count(Status.EVALUATED)
                tally.lost += max(0, seen - left)
        start = time.monotonic()
        while True:
            ended = Job(path, ranks=RANKS, **options).end()  # type: ignore[arg-type]
            if ended.code == 0:
                break
            assert "its process died" in ended.err, (
                ended.err
            )  # taken for deadly after three deaths: tried again
        assert require_truth(path).complete
        last = self.tallies[kinds[-1]]
        last.slowest_completion = max(last.slowest_completion, time.monotonic() - start)
        last.again += log.stat().st_size - GRID.size

    def _signal(self, job: Job, victim: str, blow: signal.Signals) -> None:
        job.strike(victim, blow)

    def _pause(self, job: Job, victim: str) -> None:
        if job.strike(victim, signal.SIGSTOP):
            time.sleep(self._random.choice([0.05, 0.5, 2.5]))
            job.strike(victim, signal.SIGCONT)

    def _fill_disk(self, job: Job, victim: str) -> None:
        """Rank 0's writes are refused for a while; then, at times, everything is killed in that state."""
        pid = job.ranks().get(0)
        if pid is None:
            return
        try:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (self._random.choice([0, 20_000]), hard))
            time.sleep(self._random.random())
            if self._random.random() < 0.3:
                job.strike("everything", signal.SIGKILL)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
        except (ProcessLookupError, PermissionError):
            pass

    def _cut_copy(self, job: Job, victim: str) -> None:
        """A copy taken meanwhile, cut off: found to be damaged, and what is left of it is true."""
        if not job.path.exists():
            return
        copy = job.path.with_suffix(".copy.h5")
        shutil.copyfile(job.path, copy)
        whole = copy.read_bytes()
        copy.write_bytes(whole[: self._random.randrange(len(whole))])
        self.tallies["cut copy"].damaged += 1
        try:
            with SurfaceFile.open(copy):
                raise AssertionError("a file that was cut off opened")
        except DistsurfError:
            pass
        try:
            new, _, _ = repair(copy)
        except DistsurfError:
            return  # too little is left
        require_truth(new)

    def table(self) -> list[str]:
        """The tallies, a line each."""
        header = "blow              blows  damaged files  lost points  evaluated again  slowest end  slowest completion"
        rows = [
            f"{kind:17} {t.blows:5}  {t.damaged:13}  {t.lost:11}  {t.again:15}  "
            f"{t.slowest_end:9.1f} s  {t.slowest_completion:16.1f} s"
            for kind, t in sorted(self.tallies.items())
        ]
        return [
            header,
            *rows,
            f"mpirun stayed when all its ranks were gone: {self.launchers_that_stayed} times",
        ]


def _merge_command(whole: Path) -> list[str]:
    return [sys.executable, "-m", "distsurf", "merge", str(whole)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), options.seed)
        for number in range(options.rounds):
            try:
                chaos.round(number)
            except AssertionError:
                print(f"seed {options.seed}, round {number}", file=sys.stderr)
                print("\n".join(chaos.table()))
                raise
            if number % 50 == 49:
                print(f"{number + 1} rounds", file=sys.stderr, flush=True)
        print("\n".join([f"{options.rounds} rounds, seed {options.seed}", *chaos.table()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
