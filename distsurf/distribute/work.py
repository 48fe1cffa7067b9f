"""The loops around the coordinator: rank 0 coordinates and evaluates, the other ranks evaluate.

On rank 0 a thread evaluates while the main thread answers the others, writes results and sleeps in between. There is
no barrier and no collective in the loop: a worker sends what it has with its request for more, and rank 0 answers.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distsurf.distribute.coordinator import Coordinator, Order, Plan, Points, Shard
from distsurf.distribute.ranks import Pause, Ranks
from distsurf.evaluator import Evaluator, Stopped
from distsurf.grid import Grid


class Recorder(Protocol):
    """Where results go: the surface file, or anything with these three."""

    def record(
        self, points: NDArray[np.int64], values: NDArray[np.float64], seconds: NDArray[np.float64]
    ) -> None:
        """Take values ``(P, C)`` and costs ``(P,)`` of points ``(P,)``."""

    def record_failure(self, point: int, reason: str) -> None:
        """Take a point as failed."""

    def commit(self) -> None:
        """Make everything taken so far safe."""


@dataclass
class Report:
    """What a worker says when it has done a shard; an empty one is its first request."""

    points: Points
    values: NDArray[np.float64]
    seconds: NDArray[np.float64]
    failures: list[tuple[int, str]]
    is_leaving: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        # Bytes travel several times faster than pickled arrays, and rank 0 unpickles one of these per shard.
        arrays = self.points.tobytes(), self.values.tobytes(), self.seconds.tobytes()
        return _report_of, (*arrays, self.values.shape[1], self.failures, self.is_leaving)


def _report_of(
    points: bytes,
    values: bytes,
    seconds: bytes,
    columns: int,
    failures: list[tuple[int, str]],
    is_leaving: bool,
) -> Report:
    table = np.frombuffer(values).reshape(-1, columns)
    return Report(np.frombuffer(points, np.int64), table, np.frombuffer(seconds), failures, is_leaving)


def evaluate_shard(
    evaluator: Evaluator, grid: Grid, shard: Shard, columns: int, stop: Callable[[], bool]
) -> Report:
    """Evaluate a shard, as many points at a time as the evaluator does in one pass.

    A point that fails does not take the others with it: those of its pass are evaluated one by one.
    """
    done: list[int] = []
    values: list[NDArray[np.float64]] = []
    seconds: list[float] = []
    failures: list[tuple[int, str]] = []
    size = getattr(evaluator, "points_per_pass", 1)
    groups = deque(shard.points[start : start + size] for start in range(0, len(shard.points), size))
    while groups and not stop():
        group = groups.popleft()
        start = time.perf_counter()
        try:
            value = np.asarray(evaluator(grid.coordinates(group)), dtype=np.float64)
            if value.shape != (len(group), columns):
                raise ValueError(
                    f"the evaluator returned shape {value.shape}, expected {(len(group), columns)}"
                )
        except Stopped:
            break
        except Exception as error:
            if len(group) == 1:
                failures.append((int(group[0]), _in_one_line(error)))
            else:
                groups.extendleft(group[i : i + 1] for i in reversed(range(len(group))))
            continue
        done += group.tolist()
        values += list(value)
        seconds += [(time.perf_counter() - start) / len(group)] * len(group)
    return Report(
        np.array(done, np.int64),
        np.array(values, np.float64).reshape(len(done), columns),
        np.array(seconds, np.float64),
        failures,
    )


def _in_one_line(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said} ({where.name}, line {where.lineno} of {where.filename})"


def work(ranks: Ranks, evaluator: Evaluator, grid: Grid, stop: Callable[[], bool]) -> None:
    """Rank > 0: ask, evaluate, report, until told to stop."""
    columns = len(evaluator.columns)
    report = _first_report(columns)
    while True:
        report.is_leaving = stop()
        ranks.send(0, report)
        reply = _await_reply(ranks)
        if reply is Order.STOP:
            return
        report = evaluate_shard(evaluator, grid, reply, columns, stop)


def _first_report(columns: int) -> Report:
    return Report(np.empty(0, np.int64), np.empty((0, columns)), np.empty(0), [])


def _await_reply(ranks: Ranks) -> Any:
    pause = Pause()
    while True:
        for _, reply in ranks.receive(source=0):
            return reply
        pause()


class _OwnWorker(threading.Thread):
    """Rank 0's evaluating thread: shards in through one queue, reports out through another."""

    def __init__(
        self, evaluator: Evaluator, grid: Grid, stop: Callable[[], bool], prepare: Callable[[], None]
    ):
        super().__init__(name="distsurf-evaluator", daemon=True)
        self.shards: queue.SimpleQueue[Shard | Order] = queue.SimpleQueue()
        self.reports: queue.SimpleQueue[Report | BaseException] = queue.SimpleQueue()
        self._evaluator, self._grid, self._prepare = evaluator, grid, prepare
        self._abandoned = threading.Event()
        self._stop = lambda: self._abandoned.is_set() or stop()

    def run(self) -> None:
        try:
            columns = len(self._evaluator.columns)
            self._prepare()
            self.reports.put(_first_report(columns))
            while isinstance(shard := self.shards.get(), Shard):
                self.reports.put(evaluate_shard(self._evaluator, self._grid, shard, columns, self._stop))
        except BaseException as error:  # sys.exit too: the main loop would otherwise wait for ever
            self.reports.put(error)

    def abandon(self) -> None:
        """Have the thread leave its shard after the point at hand."""
        self._abandoned.set()

    def end(self) -> None:
        """Have the thread end, and wait for it: it must not outlive the evaluator's hold of the model."""
        self.shards.put(Order.STOP)
        if self.is_alive():
            self.join()

    def arrived(self) -> list[tuple[int, Report]]:
        """Reports since the last call, as from rank 0. Raises what broke the thread."""
        reports = []
        while not self.reports.empty():
            report = self.reports.get()
            if isinstance(report, BaseException):
                raise report
            reports.append((0, report))
        return reports


def coordinate(
    ranks: Ranks,
    evaluator: Evaluator,
    grid: Grid,
    plan: Plan,
    recorder: Recorder,
    *,
    stop: Callable[[], bool],
    on_progress: Callable[[int, int], None] = lambda done, failed: None,
    prepare_thread: Callable[[], None] = lambda: None,
    commit_seconds: float = 1.0,
    shard_seconds: float = 1.0,
) -> dict[int, str]:
    """Rank 0: coordinate all ranks, evaluate too, record what comes in. Returns the points given up, with reasons.

    ``prepare_thread`` runs in the evaluating thread first (thread counts and devices are settings of a thread).
    ``on_progress`` is told how many points were recorded and how many given up. Everything is committed on return.
    """
    recorded = 0
    leaving: set[int] = set()
    committed_at = time.monotonic()
    pause = Pause()
    own = _OwnWorker(evaluator, grid, stop, prepare_thread)
    try:
        coordinator = Coordinator(plan, grid.size, ranks.size, shard_seconds=shard_seconds)
        own.start()
        while len(leaving) < ranks.size:
            reports = ranks.receive() + own.arrived()
            for worker, report in reports:
                if len(report.points):
                    result = report.points, report.values, report.seconds
                    new = coordinator.result(worker, *result)
                    if not new.all():  # late duplicates
                        result = report.points[new], report.values[new], report.seconds[new]
                    recorder.record(*result)
                    recorded += len(result[0])
                for point, reason in report.failures:
                    if coordinator.failure(worker, point, reason):
                        recorder.record_failure(point, reason)
                if report.is_leaving:
                    coordinator.stop()
                coordinator.request(worker)
            if stop():
                coordinator.stop()
            for worker, reply in coordinator.replies():
                if reply is Order.STOP:
                    leaving.add(worker)
                if worker == 0:
                    own.shards.put(reply)
                else:
                    ranks.send(worker, reply)
            if time.monotonic() - committed_at >= commit_seconds:
                recorder.commit()
                committed_at = time.monotonic()
            if reports:
                on_progress(recorded, len(coordinator.failed))
                pause.reset()
            else:
                pause()
    except BaseException:
        own.abandon()
        for worker in set(range(1, ranks.size)) - leaving:
            ranks.send(worker, Order.STOP)
        raise
    finally:
        own.end()
        recorder.commit()
    return coordinator.failed
