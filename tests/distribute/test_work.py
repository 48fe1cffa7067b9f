"""The loops around the coordinator in one process, with evaluators that misbehave."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from distsurf.distribute import work
from distsurf.distribute.coordinator import FullPlan, Order, Shard
from distsurf.distribute.ranks import Ranks
from distsurf.distribute.signals import StopRequest
from distsurf.distribute.work import Farewell, Patience, Pulse, evaluate_shard, follow, lead
from distsurf.errors import DistsurfError, Incomplete
from distsurf.evaluator import Column, Stopped
from distsurf.grid import Grid
from distsurf.surface import Status, SurfaceFile

GRID = Grid.parse({"x": "-1:1:9", "y": "0:2:7"})


class Quadratic:
    """x² + 10 y², after whatever ``before`` does."""

    columns = (Column("loss"),)

    def __init__(self, before: Callable[[float, float], None] = lambda x, y: None):
        self._before = before

    def __call__(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        for x, y in coordinates:
            self._before(x, y)
        return (coordinates[:, :1] ** 2 + 10 * coordinates[:, 1:2] ** 2).reshape(-1, 1)


def _run(
    evaluator: Quadratic, stop: StopRequest | None = None, **options: object
) -> tuple[SurfaceFile, dict[int, str]]:
    file = SurfaceFile.memory(GRID, evaluator.columns)
    return file, _lead(file, evaluator, stop, **options)


def _lead(
    file: SurfaceFile, evaluator: Quadratic, stop: StopRequest | None = None, **options: Any
) -> dict[int, str]:
    """Evaluate every point of the grid, and return what failed."""
    return dict(
        lead(
            Ranks(),
            evaluator,
            GRID,
            FullPlan(GRID.coarse_to_fine()),
            file,
            lambda keep_waiting: file.read().failures,
            stop=Pulse(stop or StopRequest()),
            **options,
        )
    )


def test_every_point_has_its_value() -> None:
    file, failed = _run(Quadratic())
    surface = file.read()
    x, y = np.meshgrid(surface.x, surface.y)
    np.testing.assert_array_equal(surface["loss"], x**2 + 10 * y**2)
    assert (surface.cost >= 0).all()
    assert failed == {}


def test_failing_points_are_marked_with_the_reason_and_the_rest_completes() -> None:
    attempts = []

    def before(x: float, y: float) -> None:
        if x == 0.5 and y == 1.0:
            attempts.append(1)
            raise MemoryError("out of memory, 3.5 GiB asked")

    file, failed = _run(Quadratic(before))
    surface = file.read()
    assert (surface.count(Status.EVALUATED), surface.count(Status.FAILED)) == (62, 1)
    ((point, reason),) = surface.failures.items()
    assert GRID.coordinates_of(point) == (0.5, 1.0)
    assert "MemoryError: out of memory, 3.5 GiB asked (before, line" in reason
    assert list(failed) == [point]
    assert len(attempts) == 3


def test_point_that_fails_once_is_evaluated() -> None:
    tries: list[int] = []

    def before(x: float, y: float) -> None:
        if x == -1 and y == 2 and not tries:
            tries.append(1)
            raise RuntimeError("a bad moment")

    file, failed = _run(Quadratic(before))
    assert file.read().complete
    assert failed == {}


def test_wrong_shape_is_a_failure_with_a_reason() -> None:
    class Wrong(Quadratic):
        def __call__(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.zeros((1, 2))

    _, failed = _run(Wrong())
    assert len(failed) == GRID.size
    assert "expected (1, 1)" in failed[0]


def test_stop_request_ends_between_points_and_keeps_what_is_done() -> None:
    stop, seen = StopRequest(), []

    def before(x: float, y: float) -> None:
        seen.append(1)
        if len(seen) == 20:
            stop.ask("test")

    file, _ = _run(Quadratic(before), stop)
    assert file.read().count(Status.EVALUATED) == 20


def test_abandoned_point_stays_pending() -> None:
    stop = StopRequest()

    def before(x: float, y: float) -> None:
        if x == 0 and y == 0:
            stop.ask("test")
            raise Stopped

    file, failed = _run(Quadratic(before), stop)
    surface = file.read()
    assert surface.status[0, 4] == Status.PENDING
    assert surface.count(Status.FAILED) == 0
    assert failed == {}


def test_error_in_the_evaluating_thread_is_raised_here() -> None:
    def broken() -> None:
        raise RuntimeError("no such device")

    with pytest.raises(DistsurfError, match=r"RuntimeError on .*: no such device"):
        _run(Quadratic(), prepare_thread=broken)


def test_error_of_the_recorder_is_raised_and_nobody_waits() -> None:
    class Full(SurfaceFile):
        def commit(self) -> None:
            raise OSError(28, "No space left on device")

    file = SurfaceFile.memory(GRID, Quadratic.columns)
    file.__class__ = Full
    with pytest.raises(DistsurfError, match=r"OSError on .*No space left"):
        _lead(file, Quadratic())
    file.__class__ = SurfaceFile


def test_results_are_committed_while_the_work_goes_on() -> None:
    """A slow evaluator: another look at the file sees values before the end."""
    seen: list[int] = []
    file = SurfaceFile.memory(GRID, Quadratic.columns)
    release = threading.Event()

    def before(x: float, y: float) -> None:
        if not seen and x == 1 and y == 2:  # the fourth point, a corner, in the second shard
            assert release.wait(30)

    def on_progress(done: int, failed: int) -> None:
        if done and not seen:
            seen.append(int((file.status() == Status.EVALUATED).sum()))
            release.set()

    _lead(file, Quadratic(before), on_progress=on_progress, commit_seconds=0)
    assert seen
    assert 1 <= seen[0] < GRID.size


def test_cost_is_the_time_of_the_point() -> None:
    report = evaluate_shard(
        Quadratic(lambda x, y: time.sleep(0.05 if x > 0.9 else 0)),
        GRID,
        Shard(np.array([0, 8])),
        1,
        lambda: False,
    )
    assert report.seconds[1] >= 0.05 > report.seconds[0]


def test_points_are_evaluated_several_at_a_time_and_alone_where_one_fails() -> None:
    """In the evaluator's own group size; a failing point takes none of its group with it, and its cost is shared."""
    sizes = []

    class Grouped(Quadratic):
        points_per_pass = 4

        def __call__(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
            sizes.append(len(coordinates))
            if (coordinates == GRID.coordinates_of(5)).all(axis=1).any():
                raise MemoryError("no room for point 5")
            return super().__call__(coordinates)

    shard = Shard(np.arange(10))
    report = evaluate_shard(Grouped(), GRID, shard, 1, lambda: False)
    assert sizes == [4, 4, 1, 1, 1, 1, 2]
    assert report.points.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    x, y = GRID.coordinates(report.points).T
    np.testing.assert_array_equal(report.values[:, 0], x**2 + 10 * y**2)
    assert [point for point, _ in report.failures] == [5]
    assert len(report.seconds) == 9
    assert len(set(report.seconds[:4])) == 1


def test_a_worker_that_gets_several_messages_at_once_takes_all_of_them() -> None:
    """The order to stop and the last word may arrive together, with signs of life between."""

    class Mail(Ranks):
        rank = 1

        def __init__(self, *letters: list[Any]) -> None:
            super().__init__()
            self.hosts = ["a", "b"]
            self._letters = list(letters)
            self.sent: list[Any] = []

        def send(self, rank: int, message: Any) -> None:
            self.sent.append(message)

        def receive(self, source: int | None = None) -> list[tuple[int, Any]]:
            return [(0, letter) for letter in self._letters.pop(0)] if self._letters else []

    farewell = Farewell(None, (2,), "the end")
    shard = Shard(np.array([3, 4]))
    ranks = Mail([Order.WAIT, shard], [], [Order.STOP, Order.WAIT, farewell])
    assert follow(ranks, Quadratic(), GRID, Pulse(lambda: False), Patience(5.0)) == "the end"
    assert [report.points.tolist() for report in ranks.sent] == [[], [3, 4]]
    assert ranks.lost == {2}
    with pytest.raises(Incomplete, match=r"rank 1 on b: rank 0 on a has not answered for 0\.2 s"):
        follow(Mail([Order.WAIT]), Quadratic(), GRID, Pulse(lambda: False), Patience(0.2))
    bad = Farewell(("the file is another job's", 1), (), None)
    with pytest.raises(DistsurfError, match="another job"):
        follow(Mail([bad]), Quadratic(), GRID, Pulse(lambda: False), Patience(5.0))


def test_a_batch_that_does_not_end_is_not_waited_for_after_a_request_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long before its silence would tell."""
    monkeypatch.setattr(work, "STOP_SECONDS", 0.3)
    stop, over, said = StopRequest(), threading.Event(), []

    def before(x: float, y: float) -> None:
        if (x, y) == (0, 1):
            stop.ask("test")
            over.wait(60)

    file, failed = _run(Quadratic(before), stop, patience=Patience(600), say=said.append)
    assert "its batch has not ended 0.3 s after the request to stop" in said[0]
    assert failed == {}
    assert 0 < file.read().count(Status.EVALUATED) < GRID.size
    over.set()


class Odd(BaseException):
    """An exception that is no Exception, and has no message."""

    def __str__(self) -> str:
        raise RuntimeError("none")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Odd(), "Odd: (its message cannot be shown)"),
        (GeneratorExit(), "GeneratorExit"),
        (ValueError("a\udcffb\nc"), r"ValueError: a\udcffb c"),
    ],
    ids=["no message", "base", "no text"],
)
def test_odd_exceptions_are_failures_of_their_point(error: BaseException, words: str) -> None:
    def before(x: float, y: float) -> None:
        if (x, y) == (0, 1):
            raise error

    file, failed = _run(Quadratic(before))
    assert file.read().count(Status.EVALUATED) == GRID.size - 1
    assert [words in reason for reason in failed.values()] == [True]


def test_a_copy_that_the_model_makes_does_not_go_on() -> None:
    """Whether it raises or returns: two processes would write the same results."""
    copies: list[int] = []

    def before(x: float, y: float) -> None:
        if (x, y) in ((0, 1), (0.5, 1)):
            copy = os.fork()
            if copy == 0 and x == 0:
                raise ValueError("in the copy")
            copies.append(copy)

    file, failed = _run(Quadratic(before))
    assert [os.waitpid(copy, 0)[1] for copy in copies] == [256, 256]  # exit code 1
    assert file.read().complete
    assert failed == {}
