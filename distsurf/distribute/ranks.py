"""The ranks of a job: one process, or many under MPI, behind one interface whose every wait sleeps.

MPI libraries spin while they wait: seven ranks blocked in a receive were measured to leave a computing rank a
quarter of its speed on two cores. So nothing here blocks inside MPI: requests are tested, with short sleeps between.
mpi4py is imported only where a launcher started several processes.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from distsurf.distribute.heartbeat import Heartbeat
from distsurf.distribute.launcher import MPICH_RUN, OPENMPI_RUN, SRUN, launched
from distsurf.distribute.leaks import remove_leaks
from distsurf.distribute.signals import killed_by_signals
from distsurf.errors import DistsurfError, Incomplete, InputError, in_one_line

TEXT_BYTES = 1024
CHUNK = 1 << 30  # MPI counts are 32-bit ints
ALIGNMENT = 64
EXIT_ABORTED = 3
"""What was committed before is in the file: the same command continues."""
TOGETHER_SECONDS = 6 * 3600.0
"""How long ranks wait for each other before the evaluation and after it: training or reading data may take its time."""
START_SECONDS = 900.0
"""How long ranks wait for each other in MPI's start: for the slowest to load Python and its libraries."""
CLOSING_SECONDS = 300.0
"""How long ranks wait for each other to leave: everything is recorded by then."""
PARTING_SECONDS = 10.0
"""How long the last messages may take where ranks were lost."""
SHARED_FROM = 16 << 20
"""Bytes from which a buffer lies once per node in an MPI shared-memory window rather than in every rank."""


class Pause:
    """Sleeps that grow from ``first`` to ``longest`` seconds while nothing happens."""

    def __init__(self, longest: float = 0.005, first: float = 20e-6):
        self.longest, self.first = longest, first
        self.reset()

    def reset(self) -> None:
        """Something happened: be quick again."""
        self._seconds = self.first

    def __call__(self) -> None:
        """Sleep, a little longer than the last time."""
        time.sleep(self._seconds)
        self._seconds = min(self._seconds * 1.7, self.longest)


class Ranks:
    """The ranks that work on one job. This class is a single process; `MPIRanks` are many."""

    rank = 0
    size = 1
    node_rank = 0
    node_size = 1
    lost: frozenset[int] = frozenset()
    """Ranks that are gone: nobody may wait for all ranks any more."""
    is_shared = False
    """Whether the last buffer lies in a window shared by the ranks of a node."""

    def __init__(self) -> None:
        self.hosts = [socket.gethostname()]

    def expect_signs(self, silence: float) -> None:
        """Together: for how many seconds a rank may give no sign of life outside the evaluation."""

    @contextmanager
    def without_heartbeat(self) -> Iterator[None]:
        """Together: for the time of a ``with`` block ranks give and get their signs of life by messages."""
        yield

    def dead(self) -> set[int]:
        """Ranks of which MPI knows that they have died (Open MPI's ULFM; others do not tell)."""
        return set()

    def gather(self, text: str) -> list[str]:
        """Every rank's text, cut to 1 KiB, by rank; on every rank."""
        return [text]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank (small ones: it is pickled)."""
        return value

    def share(self, size: int, fill: Callable[[NDArray[np.uint8]], None]) -> NDArray[np.uint8]:
        """A buffer of ``size`` bytes that ``fill`` filled on rank 0, readable on every rank, 64-byte aligned.

        Only rank 0's ``size`` and ``fill`` count. Treat it as read-only: large ones are one copy per node.
        """
        buffer = _aligned(size)
        fill(buffer)
        return buffer

    def total(self, part: NDArray[Any]) -> NDArray[Any]:
        """The sum of every rank's array, on every rank."""
        return part

    def barrier(self) -> None:
        """Wait, asleep, until every rank is here."""

    def send(self, rank: int, message: Any) -> None:
        """Send a message; never waits."""
        raise RuntimeError("a single process has nobody to send to")

    def receive(self, source: int | None = None) -> list[tuple[int, Any]]:
        """Messages that have arrived, as (source, message); never waits."""
        return []

    def close(self) -> None:
        """Give back windows and communicators, together with the other ranks."""

    def abort(self, code: int) -> None:
        """End the processes of this job at once: something broke that the other ranks cannot know of."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """A step that every rank takes: where it fails on one, the same error is raised on all, and none waits."""
        failure: BaseException | None = None
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's code that exits must not end a rank in silence
            failure = error
        code = failure.exit_code if isinstance(failure, DistsurfError) else DistsurfError.exit_code
        told = "" if failure is None else f"{code} {in_words(failure)}"
        answers = self.gather(told)
        if isinstance(failure, DistsurfError):
            raise failure
        if failure is not None:
            raise DistsurfError(in_words(failure)) from failure
        for rank, answer in enumerate(answers):
            if answer:
                number, text = answer.split(" ", 1)
                # Rank 0's errors are about the job; others' are about that rank, and rank 0 is who tells the user.
                told_elsewhere = DistsurfError(text if rank == 0 else f"rank {rank}: {text}")
                told_elsewhere.exit_code = int(number)
                raise told_elsewhere


def in_words(error: BaseException) -> str:
    """An error as the user of another rank is told of it."""
    if isinstance(error, DistsurfError):
        return str(error)
    kind, _, text = in_one_line(error).partition(": ")
    return f"unexpected {kind} on {socket.gethostname()}{text and f': {text}'} (--debug shows where)"


def _aligned(size: int) -> NDArray[np.uint8]:
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


class MPIRanks(Ranks):
    """Ranks of an MPI communicator (a duplicate of it, so that no message of others is ever seen)."""

    def __init__(self, world: Any):
        from mpi4py import MPI

        self._mpi = MPI
        self.rank: int = world.rank
        self.size: int = world.size
        self._heartbeat: Heartbeat | None = None
        # Making communicators blocks, and a script may bring its ranks here hours apart: they meet asleep first.
        self._wait(world.Ibarrier())
        self._comm = world.Dup()
        self._node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.node_rank: int = self._node.rank
        self.node_size: int = self._node.size
        self._leaders = self._comm.Split(0 if self.node_rank == 0 else MPI.UNDEFINED)
        self._windows: list[Any] = []
        self._sent: list[Any] = []
        self._dead: set[int] = set()
        # Ranks that die are an answer here, not the end of the job; where MPI ends it all the same, nothing is lost.
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._pulse = self._comm.Dup()
        self._pulse.Set_errhandler(MPI.ERRORS_RETURN)
        # All ranks have the same library; a script that has started MPI by itself may have asked it for less.
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            self._heartbeat = Heartbeat(self._pulse)
        atexit.register(self._stop_heartbeat)
        self.hosts = ["?"] * self.size
        self.hosts = self.gather(socket.gethostname())

    def _wait(self, request: Any) -> None:
        """Sleep until a collective is through. Raises Incomplete if a rank is lost, or after `TOGETHER_SECONDS`."""
        pause = Pause()
        end = time.monotonic() + TOGETHER_SECONDS
        while not request.Test():
            if self._heartbeat is not None and (missing := self._heartbeat.missing()) is not None:
                self._give_up(
                    f"no sign of life of rank {missing} on {self.hosts[missing]} for {self._heartbeat.silence:g} s "
                    "(run.silence): its process has died, is stopped, or is in a call that holds all of Python"
                )
            if time.monotonic() > end:
                self._give_up(
                    f"the other ranks have not come to a common step for {TOGETHER_SECONDS / 3600:g} h"
                )
            pause()

    def _give_up(self, why: str) -> NoReturn:
        self.lost = frozenset(range(self.size)) - {self.rank}
        raise Incomplete(
            f"rank {self.rank} on {socket.gethostname()}: {why}; what was recorded is in the file, and the same "
            "command continues"
        )

    def expect_signs(self, silence: float) -> None:
        if self._heartbeat is not None:
            self._heartbeat.expect(silence)

    @contextmanager
    def without_heartbeat(self) -> Iterator[None]:
        if self._heartbeat is None:
            yield
            return
        self._heartbeat.rest()
        try:
            yield
        finally:
            if not self.lost:
                self._heartbeat.resume()

    def _stop_heartbeat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()

    def gather(self, text: str) -> list[str]:
        mine = np.zeros(TEXT_BYTES, np.uint8)
        encoded = text.encode()[:TEXT_BYTES]
        mine[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        everybody = np.empty((self.size, TEXT_BYTES), np.uint8)
        self._wait(self._comm.Iallgather(mine, everybody))
        return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in everybody]

    def broadcast(self, value: Any) -> Any:
        length = np.zeros(1, np.int64)
        data = b""
        if self.rank == 0:
            data = pickle.dumps(value)
            length[0] = len(data)
        self._wait(self._comm.Ibcast(length))
        buffer = np.frombuffer(data, np.uint8).copy() if self.rank == 0 else np.empty(length[0], np.uint8)
        self._broadcast_buffer(self._comm, buffer)
        return value if self.rank == 0 else pickle.loads(buffer.tobytes())

    def _broadcast_buffer(self, comm: Any, buffer: NDArray[np.uint8]) -> None:
        for start in range(0, len(buffer), CHUNK):
            self._wait(comm.Ibcast(buffer[start : start + CHUNK]))

    def share(self, size: int, fill: Callable[[NDArray[np.uint8]], None]) -> NDArray[np.uint8]:
        size = self.broadcast(size)
        roomy = all(answer == "yes" for answer in self.gather("yes" if _shared_memory_has(size) else "no"))
        self.is_shared = size >= SHARED_FROM and self.node_size > 1 and roomy
        self.is_shared = self.broadcast(self.is_shared)
        if not self.is_shared:
            buffer = _aligned(size)
            with self.together():
                if self.rank == 0:
                    fill(buffer)
            self._broadcast_buffer(self._comm, buffer)
            return buffer
        owned = size + ALIGNMENT if self.node_rank == 0 else 0
        window = self._mpi.Win.Allocate_shared(owned, 1, comm=self._node)
        self._windows.append(window)
        memory, _ = window.Shared_query(0)
        raw = np.asarray(memory, np.uint8)
        # Pages are mapped at the same offset in every rank, so each finds the same first aligned byte.
        start = -raw.ctypes.data % ALIGNMENT
        buffer = raw[start : start + size]
        with self.together():
            if self.rank == 0:
                fill(buffer)
        if self.node_rank == 0:
            self._broadcast_buffer(self._leaders, buffer)
        self.barrier()
        return buffer

    def total(self, part: NDArray[Any]) -> NDArray[Any]:
        flat = np.ascontiguousarray(part).reshape(-1)
        result = np.empty_like(flat)
        most = CHUNK // flat.itemsize
        for start in range(0, len(flat), most):
            self._wait(self._comm.Iallreduce(flat[start : start + most], result[start : start + most]))
        return result.reshape(part.shape)

    def barrier(self) -> None:
        self._wait(self._comm.Ibarrier())

    def send(self, rank: int, message: Any) -> None:
        self._sent = [request for request in self._sent if not self._is_done(request)]
        try:
            self._sent.append(self._comm.isend(message, rank))
        except self._mpi.Exception as error:
            self._take_note(error)

    def _is_done(self, request: Any) -> bool:
        try:
            return bool(request.Test())
        except self._mpi.Exception as error:
            self._take_note(error)
            return True

    def receive(self, source: int | None = None) -> list[tuple[int, Any]]:
        arrived: list[tuple[int, Any]] = []
        status = self._mpi.Status()
        origin = self._mpi.ANY_SOURCE if source is None else source
        try:
            while (message := self._comm.improbe(source=origin, status=status)) is not None:
                arrived.append((status.source, message.recv()))
        except self._mpi.Exception as error:
            self._take_note(error)
        return arrived

    def dead(self) -> set[int]:
        return self._dead

    def _take_note(self, error: Any) -> None:
        """Learn who has died, from MPI's user-level failure mitigation. Raises any other error."""
        if error.Get_error_class() not in (self._mpi.ERR_PROC_FAILED, self._mpi.ERR_PROC_FAILED_PENDING):
            raise error
        self._comm.Ack_failed(self.size)  # from now on messages of any source come through again
        group, mine = self._comm.Get_failed(), self._comm.Get_group()
        failed = group.Translate_ranks(list(range(group.size)), mine)
        self._dead |= {rank for rank in failed if rank >= 0}

    def close(self) -> None:
        self._stop_heartbeat()
        atexit.unregister(self._stop_heartbeat)
        if self.lost:
            self._part()
            return
        barrier = None
        pause = Pause()
        # Whoever is early sleeps here, rather than spinning in a blocking free or finalize; messages that nobody
        # waits for any more (after an error) are taken in, so that their senders can leave.
        end = time.monotonic() + CLOSING_SECONDS
        while barrier is None or not barrier.Test():
            if time.monotonic() > end:  # somebody died on the way out
                self._part()
                return
            self.receive()
            is_quiet = self._heartbeat is None or self._heartbeat.is_quiet()
            if barrier is None and is_quiet and all(self._is_done(request) for request in self._sent):
                barrier = self._comm.Ibarrier()
            pause()
        for window in self._windows:
            window.Free()
        for comm in (self._node, self._leaders, self._pulse, self._comm):
            if comm != self._mpi.COMM_NULL:
                comm.Free()

    def _part(self) -> None:
        """Leave without the others: MPI's own end waits for ranks that are lost, so it is left out."""
        end = time.monotonic() + PARTING_SECONDS
        pause = Pause()
        while time.monotonic() < end and not all(self._is_done(request) for request in self._sent):
            pause()
        atexit.register(_end_without_mpi)

    def abort(self, code: int) -> None:
        self._comm.Abort(code)


def end_now(code: int) -> None:
    """End the process with what it has printed, but without MPI's own end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _end_without_mpi() -> None:
    end_now(1 if getattr(sys, "last_value", None) is not None else 0)


def _shared_memory_has(size: int) -> bool:
    """Whether /dev/shm has room: a window larger than that would end the job by SIGBUS at the first touch."""
    try:
        room = os.statvfs("/dev/shm")
    except OSError:
        return True
    return room.f_bavail * room.f_frsize > 1.05 * size + (16 << 20)


def connect() -> Ranks:
    """The ranks that were launched together. Raises InputError where MPI is missing or does not connect them."""
    start = launched()
    if start is None or start[1] == 1:
        return Ranks()
    rank, size, launcher = start
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=True)  # to look at the library before it can abort the process
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"{launcher} started {size} processes, but there is no MPI library to connect them "
            f"({str(error).splitlines()[0]}): pip install 'distsurf[mpich]', or load your site's MPI module"
        ) from error
    library = " ".join(MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0").split())
    # MPICH under Open MPI's launcher aborts in its initialization; the other way round gives singletons.
    is_foreign = (launcher, library.split()[0]) in {(OPENMPI_RUN, "MPICH"), (MPICH_RUN, "Open")}
    if not is_foreign and not MPI.Is_initialized():
        if library.startswith("MPICH"):
            remove_leaks()
        with killed_by_signals(), _bounded_start():
            MPI.Init_thread()
    if is_foreign or size != MPI.COMM_WORLD.size:
        remedy = {
            SRUN: "choose the srun flag that fits the library: --mpi=pmi2 for MPICH, --mpi=pmix for Open MPI",
            MPICH_RUN: "use Open MPI's mpirun, or load MPICH with MPI4PY_LIBMPI=/path/to/libmpi.so.12",
            OPENMPI_RUN: f"use the mpirun of that library (beside {sys.executable} if it came by pip)",
        }[launcher]
        raise InputError(
            f"{launcher} started {size} processes, but this one ({rank}) is alone, and each would do the whole job: "
            f"Python loads {library}; {remedy}"
        )
    if not isinstance(sys.excepthook, _EndAll):
        sys.excepthook = _EndAll(sys.excepthook, MPI.COMM_WORLD)
    return MPIRanks(MPI.COMM_WORLD)


@contextmanager
def _bounded_start() -> Iterator[None]:
    """Have MPI's start end the process, with a trace of where it was, if it does not end by itself.

    A rank waits in it for one that has failed there, for ever where the launcher leaves it alone. Python's own threads
    may be locked out for that time.
    """
    with suppress(AttributeError, OSError, ValueError):  # a standard error that is no file
        faulthandler.dump_traceback_later(START_SECONDS, exit=True, file=sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def connected() -> Iterator[Ranks]:
    """The ranks for the time of a ``with`` block, which must end alike on all of them.

    DistsurfErrors do, since `together` raises them everywhere. Anything else (a bug, Ctrl-C during set-up) may be
    known to one rank alone: it ends the job, because the others would wait for ever.
    """
    ranks = connect()
    try:
        yield ranks
    except DistsurfError:
        ranks.close()
        raise
    except KeyboardInterrupt:
        if ranks.size > 1:
            # mpirun brings Ctrl-C to every rank. Leaving at once is what is left: the others may wait in any call.
            if ranks.rank == 0:
                print(
                    "distsurf: interrupted before the evaluation began; nothing was recorded", file=sys.stderr
                )
            sys.stderr.flush()
            os._exit(EXIT_ABORTED)
        raise
    except BaseException as error:
        if ranks.size > 1:
            print(
                f"distsurf: rank {ranks.rank} ends the job: {type(error).__name__} {error}", file=sys.stderr
            )
            ranks.abort(EXIT_ABORTED)
        raise
    ranks.close()


class _EndAll:
    """An exception that nobody catches on one rank ends the others too, who would wait for ever in their next call.

    A DistsurfError reaches every rank: rank 0 shows it for all of them.
    """

    def __init__(self, show: Callable[..., Any], world: Any):
        self._show, self._world = show, world

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        is_left_alone = isinstance(error, Incomplete) and error.surface is None
        if issubclass(kind, DistsurfError) and self._world.rank != 0 and not is_left_alone:
            return
        self._show(kind, error, trace)
        sys.stderr.flush()
        if is_left_alone:  # as the others are, who tell the same
            return
        self._world.Abort(getattr(error, "exit_code", 1))
