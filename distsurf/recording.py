"""Rank 0's part of an evaluation: from what the file misses to what it holds in the end, whatever the disk does."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distsurf.distribute.coordinator import MOST_ATTEMPTS, FullPlan
from distsurf.distribute.ranks import Ranks, in_words
from distsurf.distribute.signals import StopRequest
from distsurf.distribute.work import Patience, Pulse, call_off, lead
from distsurf.errors import DistsurfError, InputError
from distsurf.evaluator import Evaluator
from distsurf.progress import Mode, Progress, duration
from distsurf.surface import DONE, Status, Surface, SurfaceFile
from distsurf.surface.records import Points, Values
from distsurf.surface.storage import CutOff

DISK_PATIENCE = 600.0
"""Seconds for which a disk that takes no results is tried again."""


@dataclass
class Outcome:
    """How an evaluation ended."""

    surface: Surface
    missing: str
    """Why the surface, or its file, is not complete; empty if it is."""
    stopped: str = ""
    """Who asked to stop."""


class PatientRecorder:
    """A surface file that goes on taking results, in memory, while its disk does not: they are written when it does."""

    def __init__(
        self,
        file: SurfaceFile,
        say: Callable[[str], None],
        stop: Callable[[str], None],
        patience: float = DISK_PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._file, self._say, self._stop = file, say, stop
        self._patience, self._clock = patience, clock
        self._refused_since: float | None = None
        self._folders = list(_other_folders((file.path or Path()).absolute()))
        self.trouble = ""
        self.saved: Path | None = None
        """Where everything is, if the file did not take it."""
        self.begin, self.withdraw = file.begin, file.withdraw
        self.record, self.record_failure = file.record, file.record_failure
        self.differing: Callable[[Points, Values], Points] = file.differing

    def commit(self) -> None:
        """Write what there is, or say once that it cannot be written; after too long a time stop the evaluation."""
        try:
            self._commit()
        except (OSError, InputError) as error:
            self._refuse(error)
            return
        if self._refused_since is not None:
            self._refused_since, self.trouble = None, ""
            self._say(f"{self._file.path} takes results again; nothing is lost")

    def _commit(self) -> None:
        try:
            self._file.commit()
        except FileNotFoundError:
            self._file.put_back()
            self._say(
                f"{self._file.path} had been removed and is there again, with everything recorded so far"
            )
            self._file.commit()
        except CutOff:
            self._restore()
            self._file.commit()

    def _restore(self) -> None:
        self._file.restore()
        self._say(
            f"{self._file.path} had been changed by others and is whole again, with everything recorded so far"
        )

    def _refuse(self, error: OSError | InputError) -> None:
        self.trouble = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        if self._refused_since is None:
            self._refused_since = self._clock()
            self._say(
                f"{self._file.path} cannot be written ({self.trouble}): the evaluation goes on, its results stay in "
                f"memory, and for {duration(self._patience)} writing is tried again"
            )
        elif self._is_over:
            self._stop(f"a file that could not be written for {duration(self._patience)}")

    @property
    def _is_over(self) -> bool:
        return self._refused_since is not None and self._clock() - self._refused_since >= self._patience

    def finish(self, is_stopping: Callable[[], bool], keep_waiting: Callable[[], None]) -> str:
        """Wait for the disk to take the last results. Returns what is to be said of those that it did not take."""
        while self._file.unwritten and not self._is_over and not is_stopping():
            time.sleep(0.2)
            keep_waiting()
            self.commit()
        count = self._file.unwritten
        if not count:
            with contextlib.suppress(OSError):
                if self._file.is_altered():
                    self._restore()
            return ""
        self.saved = saved = self._file.rescue(self._file.read(), self._folders)
        where = (
            f"with all others they are in {saved}; move that to {self._file.path} and the same call continues it"
            if saved
            else "they are lost, since no other folder took them either"
        )
        return f"{count:,} results could not be written to {self._file.path} ({self.trouble}): {where}"


def _other_folders(path: Path) -> Iterator[Path]:
    """Where results may be saved that a file does not take."""
    yield path.parent
    with contextlib.suppress(OSError):
        yield Path.cwd()
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir())


def evaluate_missing(
    ranks: Ranks,
    evaluator: Evaluator,
    file: SurfaceFile,
    stop: StopRequest,
    pulse: Pulse,
    samples: int,
    *,
    patience: Patience | None = None,
    disk_patience: float = DISK_PATIENCE,
    progress: Mode = "none",
    say: Callable[[str], None] = lambda line: None,
    prepare_thread: Callable[[], None] = lambda: None,
    shard_seconds: float = 1.0,
    commit_seconds: float = 1.0,
) -> Outcome:
    """Have all ranks evaluate what the file does not have yet. ``samples`` per point are what the speed is told in.

    The other ranks have to be in `distsurf.distribute.work.follow`.
    """
    recorder = PatientRecorder(file, say, stop.ask, disk_patience)
    try:
        before, missing, attempts = _what_to_do(file, say)
    except Exception as error:
        told = error if isinstance(error, DistsurfError) else DistsurfError(in_words(error))
        call_off(ranks, told)
        raise told from error
    start = time.monotonic()
    shown = Progress(len(file.points()), before, samples, mode=progress)

    def conclude(keep_waiting: Callable[[], None]) -> Outcome:
        unwritten = recorder.finish(stop, keep_waiting)
        surface = file.read()
        if unwritten:
            surface.path = recorder.saved
        evaluated = surface.count(Status.EVALUATED) - before
        seconds = time.monotonic() - start
        if evaluated > 0:
            say(
                f"{evaluated:,} points × {samples:,} samples in {duration(seconds)}: "
                f"{evaluated / seconds:,.3g} points/s, {evaluated * samples / seconds:,.0f} samples/s"
            )
        missing = (
            "" if surface.complete and not unwritten else _what_is_missing(surface, stop.reason, unwritten)
        )
        return Outcome(surface, missing, stop.reason)

    with contextlib.closing(shown):
        outcome: Outcome = lead(
            ranks,
            evaluator,
            file.grid,
            FullPlan(missing),
            recorder,
            conclude,
            stop=pulse,
            attempts=attempts,
            patience=patience,
            on_progress=shown,
            say=say,
            on_leaving=stop.ask,
            prepare_thread=prepare_thread,
            shard_seconds=shard_seconds,
            commit_seconds=commit_seconds,
        )
    return outcome


def _what_to_do(file: SurfaceFile, say: Callable[[str], None]) -> tuple[int, Points, dict[int, int]]:
    """How many points there are, which are missing, in their order, and how often those were begun before."""
    # What failed in an earlier run is tried again, last of all. What killed its process gets one try, as a suspect.
    file.forgive(MOST_ATTEMPTS - 1)
    status, attempts = file.status().ravel(), file.attempts().ravel()
    done = np.isin(status, DONE)
    deadly = ~done & (attempts >= MOST_ATTEMPTS)
    for point in np.flatnonzero(deadly).tolist():
        file.record_failure(
            point,
            f"its process died {attempts[point]} times while it was evaluated; the same command tries it again",
        )
    order = file.points()
    missing = order[~(done | deadly)[order]]
    missing = missing[np.argsort(status[missing] == Status.FAILED, kind="stable")]
    begun = np.flatnonzero((attempts > 0) & ~(done | deadly))
    before = int(done.sum())
    if before or deadly.any():
        left = f"{len(missing):,} to go" if len(missing) else "nothing to do"
        say(f"{file.path} has {before:,} of {len(order):,} points; {left}")
    return before, missing, {point: int(attempts[point]) for point in begun.tolist()}


def _what_is_missing(surface: Surface, reason: str, unwritten: str) -> str:
    done, failed = surface.count(Status.EVALUATED), surface.count(Status.FAILED)
    parts = [f"{done:,} of {surface.size:,} points evaluated"]
    if failed:
        point, why = next(iter(surface.failures.items()), (-1, "unknown"))
        where = ", ".join(f"{c:g}" for c in surface.grid.coordinates_of(point)) if point >= 0 else "?"
        parts.append(f"{failed:,} failed; at ({where}): {why}")
    if reason:
        parts.append(f"stopped by {reason}")
    if unwritten:
        parts.append(unwritten)
        return "; ".join(parts)
    kept = "the same call continues it" if surface.path else "the exception's .surface has them"
    return f"{'; '.join(parts)}. {f'{surface.path} is saved, ' if surface.path else ''}{kept}"
