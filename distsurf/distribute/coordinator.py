"""Who evaluates what: the coordinator's logic, as a state machine without MPI.

Requests, results, failures and the clock go in; shards come out. MPI, a single process and simulations drive the
same object. Every wait belongs to the driver: `replies` says who can be answered now.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.int64]


class Plan(Protocol):
    """Where points come from: the full grid coarse-to-fine is the simplest plan, an adaptive one another."""

    def take(self, most: int) -> Points:
        """Up to ``most`` points that are to be evaluated next; none if there is nothing to do right now."""

    def tell(self, points: Points, values: NDArray[np.float64]) -> None:
        """Values ``(P, C)`` of points ``(P,)``, each point once."""

    @property
    def remaining(self) -> int:
        """How many points may still be taken, as far as is known."""


class FullPlan:
    """Every given point once, in the given order."""

    def __init__(self, points: Points):
        self._points = points
        self._next = 0

    def take(self, most: int) -> Points:
        """The next points of the order."""
        taken = self._points[self._next : self._next + most]
        self._next += len(taken)
        return taken

    def tell(self, points: Points, values: NDArray[np.float64]) -> None:
        """Results change nothing: every point is wanted anyway."""

    @property
    def remaining(self) -> int:
        """Points not yet taken."""
        return len(self._points) - self._next


@dataclass(frozen=True)
class Shard:
    """Points that one worker takes at a time."""

    points: Points

    def __reduce__(self) -> tuple[Any, ...]:
        return _shard_of, (self.points.tobytes(),)  # much faster to send than a pickled array


def _shard_of(points: bytes) -> Shard:
    return Shard(np.frombuffer(points, np.int64))


class Order(Enum):
    """An answer other than a shard."""

    STOP = "stop"


@dataclass
class _Retry:
    point: int
    tried_by: set[int]


class Coordinator:
    """Hands out shards, keeps account of every point, and says when all is done.

    A worker asks (`request`), is answered (`replies`), and reports (`result`, `failure`). Shards are sized so that
    one takes about ``shard_seconds`` at the worker's own measured speed, and smaller toward the end, so that workers
    of any speed finish together. A failed point is tried by other workers, up to ``max_attempts`` times in all.
    """

    def __init__(
        self,
        plan: Plan,
        size: int,
        workers: int,
        *,
        shard_seconds: float = 1.0,
        max_attempts: int = 3,
    ):
        self._plan = plan
        self._shard_seconds = shard_seconds
        self._max_attempts = max_attempts
        self._recorded = np.zeros(size, dtype=bool)
        self._alive = set(range(workers))
        self._asking: dict[int, None] = {}  # in the order of asking
        self._held: dict[int, set[int]] = {}
        self._seconds_per_point: dict[int, float] = {}
        self._retries: deque[_Retry] = deque()
        self._attempts: dict[int, set[int]] = {}
        self._attempt_count: dict[int, int] = {}
        self._stopping = False
        self.failed: dict[int, str] = {}

    # -- what workers say ---------------------------------------------------------------------------------

    def request(self, worker: int) -> None:
        """A worker has nothing to do. What it still held unreported goes back to be done."""
        for point in sorted(self._held.pop(worker, ())):
            self._retries.append(_Retry(point, set()))
        self._asking.setdefault(worker)

    def result(
        self, worker: int, points: Points, values: NDArray[np.float64], seconds: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Take values ``(P, C)`` and costs ``(P,)``, P ≥ 1. Returns which points are new: only they may be recorded."""
        new = ~self._recorded[points]
        self._recorded[points] = True
        self._release(worker, points)
        if self.failed:
            for point in points.tolist():
                self.failed.pop(point, None)
        self._learn_speed(worker, sum(seconds.tolist()) / len(seconds))
        if new.all():
            self._plan.tell(points, values)
        else:
            self._plan.tell(points[new], values[new])
        return new

    def failure(self, worker: int, point: int, reason: str) -> bool:
        """A point failed. Returns True if it is given up, and is in ``failed``; else it will be tried again."""
        self._release(worker, np.array([point]))
        if self._recorded[point]:
            return False
        tried = self._attempts.setdefault(point, set())
        tried.add(worker)
        self._attempt_count[point] = self._attempt_count.get(point, 0) + 1
        if self._attempt_count[point] >= self._max_attempts:
            self.failed[point] = reason
            return True
        self._retries.append(_Retry(point, tried))
        return False

    def lose(self, worker: int) -> None:
        """A worker is gone: what it held is done by others."""
        self.request(worker)
        del self._asking[worker]
        self._alive.discard(worker)

    def stop(self) -> None:
        """Hand out nothing more."""
        self._stopping = True

    # -- what workers are told ----------------------------------------------------------------------------

    def replies(self) -> list[tuple[int, Shard | Order]]:
        """Answers for the workers that ask and can be answered now, in the order of asking."""
        answers: list[tuple[int, Shard | Order]] = []
        for worker in self._asking:
            if self._stopping or self.finished:
                answers.append((worker, Order.STOP))
            elif len(points := self._next_points(worker)):
                self._held[worker] = set(points.tolist())
                answers.append((worker, Shard(points)))
            # else it goes on asking: points held by others may yet come back
        for worker, _ in answers:
            del self._asking[worker]
        return answers

    @property
    def finished(self) -> bool:
        """Whether no point is left to do, held or to be tried again."""
        return not (self._plan.remaining or self._retries or self._held)

    # -- how ----------------------------------------------------------------------------------------------

    def _next_points(self, worker: int) -> Points:
        for _ in range(len(self._retries)):
            retry = self._retries.popleft()
            others = self._alive - retry.tried_by
            if worker in retry.tried_by and others:
                self._retries.append(retry)  # somebody else shall try it
                continue
            return np.array([retry.point])
        return self._plan.take(self._shard_size(worker))

    def _shard_size(self, worker: int) -> int:
        seconds = self._seconds_per_point.get(worker)
        if seconds is None:
            return 1  # measures the worker, and gives a first picture at once
        by_time = self._shard_seconds / max(seconds, 1e-9)
        by_share = self._plan.remaining / (2 * len(self._alive))
        return max(1, int(min(by_time, by_share)))

    def _release(self, worker: int, points: Points) -> None:
        held = self._held.get(worker)
        if held is not None:
            held.difference_update(points.tolist())
            if not held:
                del self._held[worker]

    def _learn_speed(self, worker: int, seconds: float) -> None:
        known = self._seconds_per_point.get(worker, seconds)
        self._seconds_per_point[worker] = 0.5 * known + 0.5 * seconds
