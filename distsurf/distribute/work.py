"""The loops around the coordinator: rank 0 coordinates and evaluates, the other ranks evaluate.

On rank 0 a thread evaluates while the main thread answers the others, writes results and sleeps in between. There is
no barrier and no collective in the loop: a worker sends what it has with its request for more, and rank 0 answers.
Every wait has an end: who evaluates gives signs of life between batches, who waits gets them from rank 0, and whoever
is silent for too long is done without. Where a rank was lost, the end is told from rank 0 to each of the others.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distsurf.distribute.coordinator import Coordinator, Order, Plan, Points, Shard
from distsurf.distribute.ranks import Pause, Ranks, in_words
from distsurf.errors import DistsurfError, Incomplete, in_one_line
from distsurf.evaluator import Evaluator, Stopped
from distsurf.grid import Grid


class Recorder(Protocol):
    """Where results go: the surface file, or anything with these."""

    def begin(self, points: Points) -> None:
        """Note, so that it survives a kill, that points are handed out."""

    def withdraw(self, points: Points) -> None:
        """Take that back for points that came back in good order."""

    def record(self, points: Points, values: NDArray[np.float64], seconds: NDArray[np.float64]) -> None:
        """Take values ``(P, C)`` and costs ``(P,)`` of points ``(P,)``."""

    def record_failure(self, point: int, reason: str) -> None:
        """Take a point as failed."""

    def differing(self, points: Points, values: NDArray[np.float64]) -> Points:
        """Which points were recorded with other values, bit for bit."""

    def commit(self) -> None:
        """Make everything taken so far safe."""


STOP_SECONDS = 30.0
"""How long the batches at hand may take after a request to stop; ranks that take longer are done without."""
ROUND_SECONDS = 0.02
"""How often rank 0 looks after everything but messages."""


@dataclass
class Patience:
    """How long ranks wait for each other while points are evaluated, in seconds."""

    silence: float = 300.0
    """Without a sign of life, after which a rank is done without."""

    @property
    def beat(self) -> float:
        """How often signs of life are given."""
        return min(self.silence / 5, 10.0)


class Pulse:
    """A stop request that evaluators ask between batches, which shows at the same time that they are alive."""

    def __init__(self, stop: Callable[[], bool]):
        self._stop = stop
        self._beat: Callable[[], None] = lambda: None
        self._seconds = float("inf")
        self._next = float("inf")
        self._asked_at = 0.0

    def every(self, seconds: float, beat: Callable[[], None]) -> None:
        """Have ``beat`` called whenever the evaluator asks and so many seconds have gone."""
        self._seconds, self._beat = seconds, beat
        self._next = time.monotonic() + seconds

    @contextmanager
    def watched(self, seconds: float, on_silence: Callable[[], None]) -> Iterator[None]:
        """In a ``with`` block call ``on_silence``, from another thread, once nobody has asked for so many seconds."""
        self._asked_at = time.monotonic()
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(min(seconds / 5, 1.0)):
                if time.monotonic() - self._asked_at > seconds:
                    on_silence()
                    return

        thread = threading.Thread(target=watch, name="distsurf-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def is_asked(self) -> bool:
        """Whether to stop, asked by somebody who is not evaluating."""
        return self._stop()

    def __call__(self) -> bool:
        """Whether the evaluator is to stop."""
        now = self._asked_at = time.monotonic()
        if now >= self._next:
            self._next = now + self._seconds
            self._beat()
        return self._stop()


@dataclass(frozen=True)
class Beat:
    """A worker's sign of life."""


@dataclass(frozen=True)
class Broken:
    """What a worker says that cannot go on."""

    reason: str


@dataclass(frozen=True)
class Farewell:
    """Rank 0's last word to each rank."""

    error: tuple[str, int] | None
    """The error with which all end, and its exit code."""
    lost: tuple[int, ...]
    """Ranks that are gone, for whom nobody may wait."""
    value: Any
    """What rank 0 concluded, if ranks were lost; else it is to be had by a broadcast."""


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
    process = os.getpid()
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
        except BaseException as error:  # the model's own, KeyboardInterrupt too: a signal only sets a flag
            _end_copies(process)
            if len(group) == 1:
                failures.append((int(group[0]), _in_one_line(error)))
            else:
                groups.extendleft(group[i : i + 1] for i in reversed(range(len(group))))
            continue
        _end_copies(process)
        done += group.tolist()
        values += list(value)
        seconds += [(time.perf_counter() - start) / len(group)] * len(group)
    return Report(
        np.array(done, np.int64),
        np.array(values, np.float64).reshape(len(done), columns),
        np.array(seconds, np.float64),
        failures,
    )


def _end_copies(process: int) -> None:
    """End this process if it is a copy that a model has made by a fork: two of them must not go on as one rank."""
    if os.getpid() != process:
        os._exit(1)


def _in_one_line(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    is_memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    hint = "; a smaller data.batch_size needs less" if is_memory else ""
    return f"{in_one_line(error)} ({where.name}, line {where.lineno} of {where.filename}){hint}"


def follow(
    ranks: Ranks, evaluator: Evaluator, grid: Grid, stop: Pulse, patience: Patience | None = None
) -> Any:
    """Rank > 0: ask, evaluate, report, until told to stop.

    Returns what rank 0 concluded if ranks were lost, else None. Raises rank 0's errors, and Incomplete where rank 0 is
    silent for too long.
    """
    patience = patience or Patience()
    columns = len(evaluator.columns)
    stop.every(patience.beat, lambda: ranks.send(0, Beat()))
    report: Report | Broken | None = _first_report(columns)
    inbox: deque[Any] = deque()
    while True:
        if isinstance(report, Report):
            report.is_leaving = stop()
        if report is not None:
            ranks.send(0, report)
        reply = _await_reply(ranks, patience, inbox)
        if isinstance(reply, Farewell):
            ranks.lost = frozenset(reply.lost)
            if reply.error is not None:
                error = DistsurfError(reply.error[0])
                error.exit_code = reply.error[1]
                raise error
            return reply.value
        report = None
        if isinstance(reply, Shard):
            try:
                report = evaluate_shard(evaluator, grid, reply, columns, stop)
            except BaseException as error:
                report = Broken(in_one_line(error))


def _first_report(columns: int) -> Report:
    return Report(np.empty(0, np.int64), np.empty((0, columns)), np.empty(0), [])


def _await_reply(ranks: Ranks, patience: Patience, inbox: deque[Any]) -> Any:
    """The next message of rank 0 that is more than a sign of life; several may come at once."""
    pause = Pause()
    last = time.monotonic()
    end = last + patience.silence
    while True:
        inbox += [reply for _, reply in ranks.receive(source=0)]
        now = time.monotonic()
        # For so long this process itself was stopped, and heard nobody: that is no silence of rank 0's.
        end += max(now - last - patience.silence / 2, 0.0)
        last = now
        while inbox:
            if (reply := inbox.popleft()) is not Order.WAIT:
                return reply
            end = now + patience.silence
        if now >= end:
            break
        pause()
    ranks.lost = ranks.lost | {0}
    raise Incomplete(
        f"rank {ranks.rank} on {ranks.hosts[ranks.rank]}: rank 0 on {ranks.hosts[0]} has not answered for "
        f"{patience.silence:g} s; what it recorded is in the file, and the same command continues"
    )


class _OwnWorker(threading.Thread):
    """Rank 0's evaluating thread: shards in through one queue, reports out through another."""

    def __init__(self, evaluator: Evaluator, grid: Grid, stop: Pulse, prepare: Callable[[], None]):
        super().__init__(name="distsurf-evaluator", daemon=True)
        self.shards: queue.SimpleQueue[Shard | Order] = queue.SimpleQueue()
        self.reports: queue.SimpleQueue[Report | BaseException] = queue.SimpleQueue()
        self.heard = time.monotonic()
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
        except BaseException as error:  # whatever it is: the main loop would otherwise wait for ever
            self.reports.put(error)

    def sign(self) -> None:
        """Show that the evaluation is alive."""
        self.heard = time.monotonic()

    def abandon(self) -> None:
        """Have the thread leave its shard after the point at hand."""
        self._abandoned.set()

    def end(self, patience: float) -> None:
        """Have the thread end, and wait for it: it must not outlive the evaluator's hold of the model."""
        self.shards.put(Order.STOP)
        if self.is_alive():
            self.join(patience)

    def arrived(self) -> list[tuple[int, Report]]:
        """Reports since the last call, as from rank 0. Raises what broke the thread."""
        reports = []
        while not self.reports.empty():
            report = self.reports.get()
            if isinstance(report, BaseException):
                raise report
            self.sign()
            reports.append((0, report))
        return reports


@dataclass
class _Commits:
    """When to commit: soon at first, then every so many seconds; more seldom where the disk is slow, but every ten."""

    recorder: Recorder
    seconds: float
    _next: float = field(default_factory=time.monotonic)
    _first: float = 0.05

    def __call__(self) -> None:
        start = time.monotonic()
        if start >= self._next:
            self.recorder.commit()
            end = time.monotonic()
            self._first = min(2 * self._first, self.seconds)
            self._next = end + max(self._first, min(20 * (end - start), 10.0))


def lead(
    ranks: Ranks,
    evaluator: Evaluator,
    grid: Grid,
    plan: Plan,
    recorder: Recorder,
    conclude: Callable[[Callable[[], None]], Any],
    *,
    stop: Pulse,
    attempts: Mapping[int, int] | None = None,
    patience: Patience | None = None,
    on_progress: Callable[[int, int], None] = lambda done, failed: None,
    say: Callable[[str], None] = lambda line: None,
    on_leaving: Callable[[str], None] = lambda why: None,
    prepare_thread: Callable[[], None] = lambda: None,
    commit_seconds: float = 1.0,
    shard_seconds: float = 1.0,
) -> Any:
    """Rank 0: coordinate all ranks, evaluate too, record what comes in, and tell all how it ended.

    ``conclude`` is called when everything is evaluated and committed, and its result is returned; while it waits for
    something it calls what it is given, so that the others know that rank 0 is alive. ``prepare_thread`` runs in the
    evaluating thread first (thread counts and devices are settings of a thread). ``on_progress`` is told how many
    points were recorded and how many given up, ``say`` gets lines for the user, ``on_leaving`` why a rank stops all.
    ``attempts``: see `Coordinator`.
    """
    patience = patience or Patience()
    own = _OwnWorker(evaluator, grid, stop, prepare_thread)
    stop.every(patience.beat, own.sign)
    coordinator = Coordinator(
        plan,
        grid.size,
        ranks.size,
        shard_seconds=shard_seconds,
        attempts=attempts,
        silence=patience.silence,
        now=time.monotonic(),
    )
    crew = Crew(ranks, coordinator, own, recorder, patience, say, on_leaving)
    commits = _Commits(recorder, commit_seconds)
    pause, next_round = Pause(first=5e-4), 0.0
    failure: DistsurfError | None = None
    value = None
    try:
        own.start()
        while not crew.is_gone:
            messages = ranks.receive() + own.arrived()
            for worker, message in messages:
                crew.take(worker, message)
            if messages:
                crew.answer()
                pause.reset()
            now = time.monotonic()
            if now >= next_round:
                next_round = now + ROUND_SECONDS
                if stop.is_asked():
                    crew.stop()
                crew.part_with_the_silent()
                crew.answer()
                crew.keep_waiting()
                commits()
                on_progress(crew.recorded, len(coordinator.failed))
            if not messages:
                pause()
        if not crew.own_is_lost:
            own.end(patience.silence)
        recorder.commit()
        value = conclude(crew.keep_waiting)
    except Exception as error:
        failure = error if isinstance(error, DistsurfError) else DistsurfError(in_words(error))
        own.abandon()
        own.end(patience.silence)
        with suppress(Exception):  # it may be the recorder that is broken
            recorder.commit()
        crew.say_farewell(failure, None)
        raise failure from error
    crew.say_farewell(None, value)
    return value


def call_off(ranks: Ranks, error: DistsurfError) -> None:
    """Rank 0: end the others, who are in `follow`, with an error that came up before there was anything to do."""
    for worker in range(1, ranks.size):
        ranks.send(worker, Farewell((str(error), error.exit_code), (), None))


class Crew:
    """Rank 0's view of the ranks while they work: who is there, who has left, who is lost."""

    def __init__(
        self,
        ranks: Ranks,
        coordinator: Coordinator,
        own: _OwnWorker,
        recorder: Recorder,
        patience: Patience,
        say: Callable[[str], None],
        on_leaving: Callable[[str], None],
    ):
        self.recorded = 0
        self._on_leaving = on_leaving
        self._ranks, self._coordinator, self._own = ranks, coordinator, own
        self._recorder, self._patience, self._say = recorder, patience, say
        self._leaving: set[int] = set()
        self._lost: dict[int, str] = {}
        self._next_signs = time.monotonic() + patience.beat
        self._has_differed = False
        self._stops_at = float("inf")

    def stop(self) -> None:
        """Hand out nothing more, and wait for what is out for a short time only."""
        self._coordinator.stop()
        self._stops_at = min(self._stops_at, time.monotonic() + STOP_SECONDS)

    @property
    def is_gone(self) -> bool:
        """Whether nobody works any more."""
        return len(self._leaving) + len(self._lost) == self._ranks.size

    @property
    def own_is_lost(self) -> bool:
        """Whether rank 0's own evaluation hangs."""
        return 0 in self._lost

    def take(self, worker: int, message: Any) -> None:
        """Do what a worker's message asks for."""
        if isinstance(message, Broken):
            self._lose(worker, f"it cannot go on ({message.reason})", is_reachable=True)
            return
        self._coordinator.heard(worker, time.monotonic())
        if self._lost.pop(worker, None) is not None:
            self._say(f"{self._name(worker)} is back")
        if not isinstance(message, Report):
            return
        if len(message.points):
            self._record(worker, message)
        for point, reason in message.failures:
            if self._coordinator.failure(worker, point, self._signed(worker, reason)):
                self._recorder.record_failure(point, self._coordinator.failed[point])
        if message.is_leaving:
            self.stop()
            self._on_leaving(f"a signal to {self._name(worker)}")
        returned = self._coordinator.request(worker)
        if returned:
            self._recorder.withdraw(np.array(returned))

    def _record(self, worker: int, report: Report) -> None:
        result = report.points, report.values, report.seconds
        new = self._coordinator.result(worker, *result)
        if not new.all():  # late duplicates, from a rank that had been given up
            late = report.points[~new]
            if len(self._recorder.differing(late, report.values[~new])) and not self._has_differed:
                self._has_differed = True
                self._say(
                    f"note: {self._name(worker)} evaluated points again and got other digits; the first are kept"
                )
            result = report.points[new], report.values[new], report.seconds[new]
        self._recorder.record(*result)
        # Should all die before the next commit, these have not been begun in vain once more.
        ended = self._coordinator.begun_before(report.points)
        if ended:
            self._recorder.withdraw(np.array(ended))
        self.recorded += len(result[0])

    def answer(self) -> None:
        """Answer everybody who can be."""
        for worker, reply in self._coordinator.replies():
            if isinstance(reply, Shard):
                if self._coordinator.has_suspect_out:
                    self._recorder.commit()  # should it kill this process: what came before it is not to be blamed
                self._recorder.begin(reply.points)
            elif reply is Order.STOP:
                self._leaving.add(worker)
            if worker == 0:
                self._own.shards.put(reply)
            else:
                self._ranks.send(worker, reply)

    def keep_waiting(self) -> None:
        """Have those who wait for an answer or for the end know that rank 0 is alive."""
        if time.monotonic() >= self._next_signs:
            self._next_signs = time.monotonic() + self._patience.beat
            waiting = {*self._coordinator.waiting, *self._leaving, *self._lost}
            for worker in waiting & self._reachable():
                self._ranks.send(worker, Order.WAIT)

    def part_with_the_silent(self) -> None:
        """Do without ranks that MPI knows to be dead, or that have given no sign of life for too long."""
        for worker in self._ranks.dead() - self._lost.keys():
            self._lose(worker, "it died")
        now = time.monotonic()
        if 0 not in self._lost:
            self._coordinator.heard(0, self._own.heard)
        for worker in self._coordinator.overdue(now):
            self._lose(worker, f"no sign of life for {self._patience.silence:g} s")
        if now > self._stops_at:
            for worker in self._coordinator.holding:
                self._lose(worker, f"its batch has not ended {STOP_SECONDS:g} s after the request to stop")

    def _lose(self, worker: int, why: str, is_reachable: bool = False) -> None:
        if self._ranks.size > 1:
            self._say(f"{self._name(worker)} is done without: {why}; others evaluate its points")
        else:
            self._say(f"the evaluation is given up: {why}")
        self._leaving.discard(worker)
        self._lost[worker] = "" if is_reachable else why
        for point in self._coordinator.lose(worker, self._signed(worker, why)):
            self._recorder.record_failure(point, self._coordinator.failed[point])

    def say_farewell(self, failure: DistsurfError | None, value: Any) -> None:
        """Tell everybody who can hear it how it ended."""
        self._ranks.lost = frozenset(worker for worker, why in self._lost.items() if why)
        error = None
        if failure is not None:
            error = str(failure), failure.exit_code
        told = Farewell(error, tuple(self._ranks.lost), value if self._ranks.lost else None)
        for worker in self._reachable():
            self._ranks.send(worker, told)

    def _reachable(self) -> set[int]:
        return set(range(1, self._ranks.size)) - {worker for worker, why in self._lost.items() if why}

    def _name(self, worker: int) -> str:
        return f"rank {worker} on {self._ranks.hosts[worker]}"

    def _signed(self, worker: int, reason: str) -> str:
        return f"{self._name(worker)}: {reason}" if self._ranks.size > 1 else reason
