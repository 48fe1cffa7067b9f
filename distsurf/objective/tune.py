"""The batch size that is fastest here, found by a short measurement."""

from __future__ import annotations

import time
from collections.abc import Callable

LEAST, MOST = 8, 8192
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
            except Exception:
                break
            if seconds * STEP > best_seconds:
                break
            best, best_seconds = size, seconds
            size = int(size * factor)
        if best > start:
            break  # the larger ones are faster: the smaller ones need no measuring
    return best if best_seconds * GAIN < first_seconds else start
