"""`distsurf plan`: how long a job will take on so many ranks, what memory each needs, and how many shards to make."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from distsurf.bench.contender import Answer, Contender
from distsurf.distribute.placement import usable_cores
from distsurf.job import Job
from distsurf.progress import duration

SHARD_SECONDS = 3600.0
"""How long a shard of an array job should take at most, so that a preempted one costs little."""
SET_UP_SHARE = 0.05
"""Share of a shard's time that its start may take at most."""
MEASURED_POINTS, MEASURED_SECONDS = 5, 3.0
"""How much is measured at least."""


@dataclass(frozen=True)
class Forecast:
    """What a job will take. Times in seconds, memory in bytes."""

    points: int
    ranks: int
    nodes: int
    ranks_per_node: int
    threads: int
    seconds_per_point: float
    """Of one rank, while the others of its node compute too."""
    set_up_seconds: float
    wall_seconds: float
    memory_per_rank: int
    data_bytes: int
    """Of that, what the ranks of a node share."""
    shards: int
    batch_size: int
    steps: tuple[str, ...]

    def told(self) -> dict[str, object]:
        """As JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """In words."""
        per_node = f" of {self.ranks_per_node} ranks each" if self.nodes > 1 else ""
        where = f"{self.nodes} node{'s' * (self.nodes != 1)}{per_node} like this one"
        return [
            f"{self.points:,} points on {self.ranks} rank{'s' * (self.ranks != 1)}, {where}: "
            f"{duration(self.wall_seconds)}, of which {duration(self.set_up_seconds)} to set up",
            f"measured with {min(self.ranks, self.ranks_per_node)} at once, {self.threads} "
            f"thread{'s' * (self.threads != 1)} each: {self.seconds_per_point:.3g} s a point "
            f"({', '.join(self.steps) or 'plain'}; batches of {self.batch_size})",
            f"memory: {self.memory_per_rank / 1e9:.3g} GB a rank, of which {self.data_bytes / 1e9:.2g} GB are data, "
            "which the ranks of a node share",
            f"as an array of jobs: {self.shards} shard{'s' * (self.shards != 1)}",
        ]


def plan(job: Job, ranks: int, ranks_per_node: int = 0, threads: int = 0) -> Forecast:
    """Measure a few points as the ranks of one node will compute them, all at once, and extrapolate.

    ``ranks_per_node``: left out, one per GPU, or per core where there is no GPU. ``threads``: per rank; left out, the
    cores divided among a node's ranks. Raises InputError where the job cannot be run.
    """
    per_node = min(ranks, ranks_per_node or torch.cuda.device_count() or len(usable_cores()))
    threads = threads or job.run.threads or max(1, len(usable_cores()) // per_node)
    grid = job.evaluated_grid()
    random = np.random.default_rng(0)
    points = [[float(random.uniform(a.low, a.high)) for a in grid.axes] for _ in range(MEASURED_POINTS)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder, "job.toml")
        path.write_text(job.to_toml())
        contenders = []
        for rank in range(per_node):
            contenders.append(Contender("distsurf", path, threads, rank))
            stack.callback(contenders[-1].close)
        about = [contender.ready() for contender in contenders]
        answers: list[Answer] = []
        start = time.monotonic()
        for i in itertools.count():
            for contender in contenders:
                contender.tell(points[i % len(points)])
            told = [contender.told() for contender in contenders]
            answers += told if i else []  # the first warms up
            if i >= len(points) and time.monotonic() - start > MEASURED_SECONDS:
                break
    seconds = statistics.median(answer["seconds"] for answer in answers)
    set_up = max(each["setup_s"] for each in about)
    return Forecast(
        points=grid.size,
        ranks=ranks,
        nodes=math.ceil(ranks / per_node),
        ranks_per_node=per_node,
        threads=threads,
        seconds_per_point=seconds,
        set_up_seconds=set_up,
        wall_seconds=set_up + math.ceil(grid.size / ranks) * seconds,
        memory_per_rank=max(answer["peak_bytes"] for answer in answers),
        data_bytes=about[0]["data_bytes"],
        shards=good_shard_count(grid.size * seconds, set_up, ranks),
        batch_size=about[0]["batch_size"],
        steps=tuple(about[0]["steps"]),
    )


def good_shard_count(seconds: float, set_up: float, ranks: int) -> int:
    """Into how many shards to cut ``seconds`` of one rank's work where ``ranks`` of them run at a time.

    A multiple of ``ranks``, so that all end together, with shards of an hour at most; fewer where a shard would spend
    more than a twentieth of its time on its start.
    """
    wanted = ranks * max(1, math.ceil(seconds / ranks / SHARD_SECONDS))
    affordable = max(1, int(SET_UP_SHARE * seconds / max(set_up, 1e-9)))
    if wanted <= affordable:
        return wanted
    return affordable if affordable < ranks else affordable // ranks * ranks
