"""Signs of life between ranks, over a communicator in memory: who is silent, who is back, and what is no silence."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from distsurf.distribute.heartbeat import Heartbeat

SILENCE = 0.5


class Network:
    """Messages on their way, by (source, destination); those of silent ranks are held, those to dead ones raise."""

    def __init__(self) -> None:
        self.lines: dict[tuple[int, int], deque[NDArray[np.int32]]] = defaultdict(deque)
        self.silent: set[int] = set()
        self.dead: set[int] = set()
        self.held: list[tuple[deque[NDArray[np.int32]], NDArray[np.int32]]] = []

    def let_speak(self) -> None:
        self.silent.clear()
        for line, message in self.held:
            line.append(message)
        self.held = []


class Comm:
    """What `Heartbeat` uses of a communicator."""

    def __init__(self, network: Network, rank: int, size: int):
        self._network, self.rank, self.size = network, rank, size

    def Issend(self, message: NDArray[np.int32], rank: int) -> Request:
        if rank in self._network.dead:
            raise RuntimeError("MPI_ERR_PROC_FAILED")
        line = self._network.lines[self.rank, rank]
        request = Request(self._network, line, message)
        if self.rank in self._network.silent:
            self._network.held.append((line, message))
        else:
            line.append(message)
        return request

    def Iprobe(self, source: int) -> bool:
        return bool(self._network.lines[source, self.rank])

    def Recv(self, message: NDArray[np.int32], source: int) -> None:
        message[:] = self._network.lines[source, self.rank].popleft()


class Request:
    """A synchronous send: done when it was taken in."""

    def __init__(self, network: Network, line: deque[NDArray[np.int32]], message: NDArray[np.int32]):
        self._network, self._line, self._message = network, line, message

    def Test(self) -> bool:
        held = [message for _, message in self._network.held]
        return not any(message is self._message for message in [*self._line, *held])


class Clock:
    """A clock that can be put forward, as for a process that was stopped."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def ranks(network: Network, clock: Clock) -> Iterator[list[Heartbeat]]:
    beating = [Heartbeat(Comm(network, rank, 3), SILENCE, clock) for rank in range(3)]
    yield beating
    for heartbeat in beating:
        heartbeat.stop()


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_everybody_hears_of_a_silent_rank_and_of_its_return(network: Network, ranks: list[Heartbeat]) -> None:
    network.silent.add(2)
    _until(lambda: [ranks[0].missing(), ranks[1].missing()] == [2, 2])
    network.let_speak()
    _until(lambda: [rank.missing() for rank in ranks] == [None] * 3)


def test_the_death_of_one_is_not_blamed_on_others(network: Network, ranks: list[Heartbeat]) -> None:
    """Where MPI raises at every message to the dead."""
    network.silent.add(1)
    network.dead.add(1)
    _until(lambda: [ranks[0].missing(), ranks[2].missing()] == [1, 1])


def test_a_silent_rank_0_is_seen_by_all_others(network: Network, ranks: list[Heartbeat]) -> None:
    network.silent.add(0)
    _until(lambda: [ranks[1].missing(), ranks[2].missing()] == [0, 0])
    assert ranks[0].missing() is None


def test_processes_that_were_stopped_together_are_not_lost(ranks: list[Heartbeat], clock: Clock) -> None:
    turns = 10
    for _ in range(turns):
        clock.ahead += 1000 * SILENCE
        time.sleep(SILENCE / 5)
        assert [rank.missing() for rank in ranks] == [None] * 3


def test_resting_ranks_miss_nobody(network: Network, ranks: list[Heartbeat]) -> None:
    for rank in ranks:
        rank.rest()
    network.silent.add(2)
    time.sleep(3 * SILENCE)
    assert not any(network.lines.values())
    assert [rank.missing() for rank in ranks] == [None] * 3
    for rank in ranks:
        rank.resume()
    _until(lambda: [ranks[0].missing(), ranks[1].missing()] == [2, 2])


def test_nothing_is_left_on_the_way_at_the_end(network: Network, ranks: list[Heartbeat]) -> None:
    _until(lambda: any(network.lines.values()))
    for rank in ranks:
        rank.stop()
    _until(lambda: [rank.is_quiet() for rank in ranks] == [True] * 3)
    assert not any(network.lines.values())
