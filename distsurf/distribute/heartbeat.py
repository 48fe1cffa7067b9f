"""Signs of life between ranks that are not evaluating: before the evaluation, and after it.

A rank that dies while it loads data ends the job under most launchers, but not under all: `srun` may let the others go
on, and they would wait in the next common step for as long as training may take. So a thread of every rank tells rank 0
that its process is there, and rank 0's thread tells every rank, with the name of one that is silent. That vouches for
processes, not for what they do: how an evaluation goes on is asked by `distsurf.distribute.work`, which goes on without
lost ranks, and for that time nothing is sent here. MPI may end a process that sends to a dead one on another node
(MPICH over UCX does): so there is one sign at a time, and rank 0 sends only in answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

SILENCE = 300.0
"""Seconds without a sign of life after which a rank counts as lost."""
NOBODY = -1


class Heartbeat:
    """A thread that gives and hears signs of life on a communicator of its own, under MPI_THREAD_MULTIPLE."""

    def __init__(self, comm: Any, silence: float = SILENCE, clock: Callable[[], float] = time.monotonic):
        self._comm, self._clock = comm, clock
        self._peers = range(1, comm.size) if comm.rank == 0 else range(1)
        self._sent: dict[int, Any] = {}
        self._wake, self._is_over, self._is_resting = threading.Event(), False, False
        self._start_over(silence)
        self._thread = threading.Thread(target=self._run, name="distsurf-heartbeat", daemon=True)
        self._thread.start()

    def expect(self, silence: float) -> None:
        """Change, on all ranks at about the same time, how many seconds a rank may be silent."""
        self._start_over(silence)
        self._wake.set()

    def rest(self) -> None:
        """Send nothing and miss nobody until `resume`; on all ranks at about the same time."""
        self._is_resting = True

    def resume(self) -> None:
        """Give signs again, and expect them."""
        self._start_over(self.silence)
        self._is_resting = False

    def missing(self) -> int | None:
        """A rank that has been silent for too long; one that is only late, or back by now, is not."""
        lost, since = self._lost
        is_sure = lost != NOBODY and self._clock() - since > 2 * self._interval
        return lost if is_sure else None

    def stop(self) -> None:
        """Have the thread end: it must not call MPI while MPI ends."""
        self._is_over = True
        self._wake.set()
        self._thread.join()

    def is_quiet(self) -> bool:
        """After `stop`, to be asked again and again by all ranks: whether this rank's signs have been taken in."""
        self._hear()
        return not self._sent

    def _start_over(self, silence: float) -> None:
        now = self._clock()
        self.silence = silence
        self._heard = dict.fromkeys(self._peers, now)
        self._unanswered: set[int] = set()
        self._told = NOBODY
        self._lost = NOBODY, now

    @property
    def _interval(self) -> float:
        return min(self.silence / 5, 10.0)

    def _run(self) -> None:
        last = self._clock()
        while not self._is_over:
            now = self._clock()
            if (
                now - last > self.silence / 2
            ):  # this process itself was stopped: the others must be heard first
                self._start_over(self.silence)
            last = now
            self._hear()
            if not self._is_resting:
                self._judge(now)
                self._give_signs()
            self._wake.wait(self._interval)
            self._wake.clear()

    def _give_signs(self) -> None:
        due = self._unanswered if self._comm.rank == 0 else set(self._peers)
        self._unanswered = due & self._sent.keys()
        for peer in due - self._sent.keys():
            with suppress(Exception):  # it is gone: its silence will tell
                # A synchronous send, so that no sign is left over when the communicator is given back.
                self._sent[peer] = self._comm.Issend(np.array([self._lost[0]], np.int32), peer)

    def _hear(self) -> None:
        self._sent = {peer: request for peer, request in self._sent.items() if not _is_done(request)}
        told = np.empty(1, np.int32)
        for peer in self._peers:  # not any source: that fails for all where MPI knows of one's death
            with suppress(Exception):
                while self._comm.Iprobe(source=peer):
                    self._comm.Recv(told, source=peer)
                    self._heard[peer] = self._clock()
                    self._unanswered.add(peer)
                    self._told = int(told[0]) if peer == 0 else NOBODY

    def _judge(self, now: float) -> None:
        silent = [peer for peer in self._peers if now - self._heard[peer] > self.silence]
        lost = silent[0] if silent else self._told
        if lost != self._lost[0]:
            self._lost = lost, now


def _is_done(request: Any) -> bool:
    try:
        return bool(request.Test())
    except Exception:  # its receiver is gone
        return True
