"""Who evaluates what: the coordinator's logic, as a state machine without MPI.

Requests, results, failures, signs of life and the clock go in; shards come out. MPI, a single process and simulations
drive the same object. Every wait belongs to the driver: `replies` says who can be answered now.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.int64]
LEAST_SECONDS = 1e-9
"""A point takes some time, whatever a coarse clock says."""
MOST_ATTEMPTS = 3
"""So often is a point begun: then it is given up, for this run or, where its processes died, until the next one."""
SLACK = 1.5
"""How far the others are trusted to be through with what is left."""
SUSPECT = 2
"""Deaths of its workers after which a point is a suspect."""


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
    WAIT = "wait"
    """A sign of life to a worker that could not be answered yet."""


@dataclass
class _Retry:
    point: int
    tried_by: set[int]


class Coordinator:
    """Hands out shards, keeps account of every point, and says when all is done.

    A worker asks (`request`), is answered (`replies`), and reports (`result`, `failure`). Shards are sized so that
    one takes about ``shard_seconds`` at the worker's own measured speed, and smaller toward the end, so that workers
    of any speed finish together.

    A point may be begun ``max_attempts`` times. One that fails is tried by other workers. One whose worker died is a
    shard of its own the next time. One whose workers died twice is a *suspect*: suspects come last, and each while
    nobody does anything else, so that if it kills again no other point is blamed. ``attempts`` are those of earlier
    runs, by point.
    """

    def __init__(
        self,
        plan: Plan,
        size: int,
        workers: int,
        *,
        shard_seconds: float = 1.0,
        max_attempts: int = MOST_ATTEMPTS,
        attempts: Mapping[int, int] | None = None,
        silence: float = math.inf,
        now: float = 0.0,
    ):
        self._plan = plan
        self._shard_seconds = shard_seconds
        self._max_attempts = max_attempts
        self._silence = silence
        self._recorded = bytearray(size)
        self._heard = dict.fromkeys(range(workers), now)
        """When each worker that is not lost was last heard of."""
        self._asking: dict[int, None] = {}  # in the order of asking
        self._resting: dict[int, None] = {}
        """Workers that ask, and are so slow that the others will be through before them."""
        self._rate, self._fastest = 0.0, -1
        """Points per second of all whose speed is known."""
        self._held: dict[int, set[int]] = {}
        self._seconds_per_point: dict[int, float] = {}
        self._retries: deque[_Retry] = deque()
        self._suspects: deque[int] = deque()
        self._suspect_held: int | None = None
        self._attempts = dict(attempts or {})
        """How often points were begun that have not come to an end; not those that are begun for the first time."""
        self._tried: dict[int, set[int]] = {}
        self._stopping = False
        self.failed: dict[int, str] = {}

    # -- what workers say ---------------------------------------------------------------------------------

    def heard(self, worker: int, now: float) -> None:
        """A worker gave a sign of life; also one that had been lost."""
        self._heard[worker] = now

    def request(self, worker: int) -> list[int]:
        """A worker has nothing to do. Returns what it gives back unreported, in good order: it is done later."""
        returned = sorted(self._held.pop(worker, ()))
        for point in returned:
            self._attempts[point] = self._attempts.get(point, 1) - 1
            self._free_suspect(point)
            self._retry(point)
        self._asking.setdefault(worker)
        return returned

    def result(
        self, worker: int, points: Points, values: NDArray[np.float64], seconds: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """Take values ``(P, C)`` and costs ``(P,)``, P ≥ 1. Returns which points are new: only they may be recorded."""
        listed = points.tolist()
        # Plain bytes: for the few points of a shard several times faster than arrays.
        new = [not self._recorded[point] for point in listed]
        for point in listed:
            self._recorded[point] = 1
        self._release(worker, listed)
        if self.failed:
            for point in listed:
                self.failed.pop(point, None)
        self._learn_speed(worker, sum(seconds.tolist()) / len(listed))
        mask = np.array(new)
        if all(new):
            self._plan.tell(points, values)
        else:
            self._plan.tell(points[mask], values[mask])
        return mask

    def failure(self, worker: int, point: int, reason: str) -> bool:
        """A point failed. Returns True if it is given up, and is in ``failed``; else it will be tried again."""
        self._release(worker, [point])
        if self._recorded[point]:
            return False
        self._tried.setdefault(point, set()).add(worker)
        return self._give_up_or_retry(point, reason)

    def lose(self, worker: int, reason: str = "") -> list[int]:
        """A worker is gone: what it held is done by others. Returns the points that are given up, now in ``failed``."""
        held = sorted(self._held.pop(worker, ()))
        self._asking.pop(worker, None)
        self._resting.pop(worker, None)
        self._heard.pop(worker, None)
        if worker in self._seconds_per_point:
            self._rate -= 1 / self._seconds_per_point.pop(worker)
            speeds = self._seconds_per_point
            self._fastest = min(speeds, key=lambda one: speeds[one], default=-1)
        self._wake()
        for point in held:
            self._free_suspect(point)
        return [
            point
            for point in held
            if not self._recorded[point]
            and self._give_up_or_retry(point, f"its process died: {reason}", True)
        ]

    def stop(self) -> None:
        """Hand out nothing more."""
        self._stopping = True

    # -- what workers are told ----------------------------------------------------------------------------

    def replies(self) -> list[tuple[int, Shard | Order]]:
        """Answers for the workers that ask and can be answered now, in the order of asking."""
        if self._stopping or self.finished:
            leaving = [*self._asking, *self._resting]
            self._asking, self._resting = {}, {}
            return [(worker, Order.STOP) for worker in leaving]
        answers: list[tuple[int, Shard | Order]] = []
        if not (self._plan.remaining or self._retries or self._suspects):
            return answers  # points held by others may yet come back
        for worker in list(self._asking):
            if self._comes_too_late(worker):
                self._resting[worker] = self._asking.pop(worker)
            elif len(points := self._next_points(worker)):
                self._held[worker] = held = set(points.tolist())
                for point in held if self._attempts else ():
                    if point in self._attempts:
                        self._attempts[point] += 1
                answers.append((worker, Shard(points)))
                del self._asking[worker]
        return answers

    def overdue(self, now: float) -> list[int]:
        """Workers that hold points and have not been heard of for too long."""
        return [worker for worker in self._held if now - self._heard.get(worker, now) > self._silence]

    @property
    def holding(self) -> list[int]:
        """Workers that have points."""
        return list(self._held)

    def begun_before(self, points: Points) -> list[int]:
        """Which points were begun more than once: the attempt that ended now is not to be held against them."""
        return [point for point in points.tolist() if point in self._attempts] if self._attempts else []

    @property
    def has_suspect_out(self) -> bool:
        """Whether a point is being evaluated that may kill its worker."""
        return self._suspect_held is not None

    @property
    def waiting(self) -> list[int]:
        """Workers that asked and could not be answered."""
        return [*self._asking, *self._resting]

    @property
    def finished(self) -> bool:
        """Whether no point is left to do, held or to be tried again."""
        return not (self._plan.remaining or self._retries or self._suspects or self._held)

    # -- how ----------------------------------------------------------------------------------------------

    def _give_up_or_retry(self, point: int, reason: str, is_death: bool = False) -> bool:
        count = self._attempts.setdefault(point, 1)
        if count >= self._max_attempts:
            self.failed[point] = f"{reason} ({count} times)" if is_death else reason
            return True
        self._retry(point, is_suspect=is_death and count >= SUSPECT)
        return False

    def _comes_too_late(self, worker: int) -> bool:
        """Whether a worker is better left out at the end: one more point of its would keep everybody waiting.

        Only while the fastest one is at work, who asks again, or is lost, which calls those back that were left out.
        """
        seconds = self._seconds_per_point.get(worker)
        if seconds is None or self._retries or self._suspects or self._fastest not in self._held:
            return False
        others = self._rate - 1 / seconds
        until_then = SLACK * self._plan.remaining / others + self._seconds_per_point[self._fastest]
        return seconds > until_then

    def _wake(self) -> None:
        """Something changed: who was left out may be needed."""
        self._asking.update(self._resting)
        self._resting = {}

    def _retry(self, point: int, is_suspect: bool = False) -> None:
        self._wake()
        if is_suspect:
            self._suspects.append(point)
        else:
            self._retries.append(_Retry(point, self._tried.get(point, set())))

    def _next_points(self, worker: int) -> Points:
        for _ in range(len(self._retries)):
            retry = self._retries.popleft()
            if worker in retry.tried_by and self._heard.keys() - retry.tried_by:
                self._retries.append(retry)  # somebody else shall try it
                continue
            return np.array([retry.point])
        while len(points := self._plan.take(self._shard_size(worker))):
            if not self._attempts:
                return points
            points = self._without_begun_ones(points)
            if len(points):
                return points
            if self._retries:
                return np.array([self._retries.pop().point])
        if self._suspects and not self._held:
            self._suspect_held = self._suspects.popleft()
            return np.array([self._suspect_held])
        return points

    def _without_begun_ones(self, points: Points) -> Points:
        """Set aside points whose process died before: each becomes a shard of its own, to tell them apart."""
        fresh = []
        for point in points.tolist():
            if self._attempts.get(point, 0) == 0:
                fresh.append(point)
            else:
                self._retry(point, is_suspect=self._attempts[point] >= SUSPECT)
        return np.array(fresh, np.int64)

    def _shard_size(self, worker: int) -> int:
        seconds = self._seconds_per_point.get(worker)
        if seconds is None:
            return 1  # measures the worker, and gives a first picture at once
        by_time = self._shard_seconds / seconds
        # Half of what all can do until the end, in equal times: a slow worker gets fewer points.
        by_share = self._plan.remaining / (2 * max(self._rate * seconds, 1.0))
        return max(1, int(min(by_time, by_share)))

    def _release(self, worker: int, points: list[int]) -> None:
        if self._suspect_held is not None:
            for point in points:
                self._free_suspect(point)
        held = self._held.get(worker)
        if held is not None:
            held.difference_update(points)
            if not held:
                del self._held[worker]

    def _free_suspect(self, point: int) -> None:
        if self._suspect_held == point:
            self._suspect_held = None

    def _learn_speed(self, worker: int, seconds: float) -> None:
        known = self._seconds_per_point.get(worker)
        learned = max(seconds if known is None else 0.5 * known + 0.5 * seconds, LEAST_SECONDS)
        self._rate += 1 / learned - (1 / known if known is not None else 0.0)
        self._seconds_per_point[worker] = learned
        if self._fastest < 0 or learned < self._seconds_per_point[self._fastest]:
            self._fastest = worker
