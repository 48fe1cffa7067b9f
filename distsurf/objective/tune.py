"""The batch size that is fastest here, found by a short measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch

from distsurf.objective.data import tensors_of
from distsurf.objective.feed import Feed
from distsurf.objective.network import Running

LEAST, MOST = 8, 8192
TIMED = 256
"""Samples in a timing of a batch size, at least."""
SHARE, LONGEST = 0.01, 10.0
"""How much of a job's time is spent on measuring, and how many seconds at most."""
SIZE_TOLERANCE = {False: 2e-5, True: 1e-3}
"""Relative difference of sums that batches of another size may make, in full and in a reduced precision: rounding.
Where samples of a batch act on each other (batch statistics in evaluation), it is larger."""
STEP, GAIN = 1.02, 1.1
"""So many times faster has each step of the climb to be, and the end of it: what gains less, and may gain nothing the
next time, is not worth other last digits."""


def tune_batch_size(
    seconds_per_sample: Callable[[int], float],
    start: int,
    samples: int,
    budget: float,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Climb from ``start`` by factors of two to the batch size of least ``seconds_per_sample(size)``.

    Not beyond ``samples``, and no further once ``budget`` seconds are spent. A size that cannot be measured (out of
    memory) ends the climb in its direction.
    """
    end = clock() + budget
    best, best_seconds = start, seconds_per_sample(start)
    first_seconds = best_seconds
    for factor in (2.0, 0.5):
        size = int(start * factor)
        while LEAST <= size <= MOST and size < 2 * samples and clock() < end:
            try:
                seconds = seconds_per_sample(size)
            except (
                Exception
            ):  # no memory, or whatever else: a size that cannot be measured is not the fastest
                break
            if seconds * STEP > best_seconds:
                break
            best, best_seconds = size, seconds
            size = int(size * factor)
        if best > start:
            break  # the larger ones are faster: the smaller ones need no measuring
    return best if best_seconds * GAIN < first_seconds else start


def fastest_batch_size(running: Running, feed: Feed, start: int, samples: float) -> int:
    """The fastest size for a network at work, ``start`` where another one would change values by more than rounding.

    ``samples``: how many are to be evaluated in all. Where a hundredth of their time is too little for a measurement,
    ``start`` it is.
    """
    once = _seconds(running, feed, start)
    budget = min(SHARE * samples * once, LONGEST)
    if budget <= 10 * once * TIMED:
        return start
    found = tune_batch_size(lambda size: _seconds(running, feed, size), start, feed.samples, budget)
    return found if _agree(running, feed, start, found) else start


def _seconds(running: Running, feed: Feed, size: int) -> float:
    """Seconds per sample, the least of three passes over a few hundred samples."""
    found = []
    batches = list(islice(feed.batches(size), max(1, TIMED // size)))
    samples = sum(len(tensors_of(batch)[0]) for batch in batches)
    for _ in range(4):
        start = time.perf_counter()
        for batch in batches:
            _fetch(running.totals(batch))
        found.append((time.perf_counter() - start) / samples)
    return min(found[1:])


def _agree(running: Running, feed: Feed, one: int, other: int) -> bool:
    """Whether the same samples give the same values in batches of either size, but for rounding.

    Two sums may agree by accident; those of small batches, where samples act on each other most, hardly do too.
    """
    samples = max(one, other)
    sums = []
    for size in sorted({one, other, LEAST, 4 * LEAST}):
        total: dict[str, float] = {}
        for batch in islice(feed.batches(size), max(1, samples // size)):
            for name, (value, _) in running.totals(batch).items():
                total[name] = total.get(name, 0.0) + float(torch.as_tensor(value).double().sum())
        sums.append(total)
    tolerance = SIZE_TOLERANCE[running.precision.is_reduced]
    return all(
        math.isclose(sums[0][name], others[name], rel_tol=tolerance) for others in sums[1:] for name in others
    )


def _fetch(totals: Mapping[str, tuple[Any, Any]]) -> None:
    """Wait until the totals are there."""
    for total, _ in totals.values():
        if isinstance(total, torch.Tensor):
            total.cpu()
