"""Random blows at random moments, until every job is complete and every value is the one of an undisturbed run.

    python -m tests.faults.chaos --rounds 1000 [--seed 0]        (make chaos)

A round is one surface: its job is started, struck, and started again until it is complete. Prints a table of the blows:
how many there were, how many files they damaged, how many recorded points were lost, how many points were evaluated
again, and the longest times until the job had ended after a blow and until it was complete after its last start.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distsurf.errors import DistsurfError
from distsurf.surface import Status, SurfaceFile
from distsurf.surface.repair import repair
from tests.faults.job import Job, evaluated, require_truth
from tests.faults.runner import GRID

RANKS = 3
VICTIMS = (*(f"rank {rank}" for rank in range(RANKS)), "launcher", "everything")
MOST_BLOWS = 4
"""In a round."""


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
        for file in self._folder.glob(f"{number}.*"):
            file.unlink()

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
        header = (
            "blow         blows  damaged files  lost points  evaluated again  slowest end  slowest completion"
        )
        rows = [
            f"{kind:12} {t.blows:5}  {t.damaged:13}  {t.lost:11}  {t.again:15}  "
            f"{t.slowest_end:9.1f} s  {t.slowest_completion:16.1f} s"
            for kind, t in sorted(self.tallies.items())
        ]
        return [
            header,
            *rows,
            f"mpirun stayed when all its ranks were gone: {self.launchers_that_stayed} times",
        ]


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
