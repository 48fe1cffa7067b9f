"""Putting the files of a job's shards together into one surface file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distsurf.errors import DamagedFile, InputError
from distsurf.job import Job
from distsurf.shards import shard_files
from distsurf.surface import DONE, Status, Surface, SurfaceFile
from distsurf.surface.claim import require_unclaimed

TURN_SECONDS = 120.0
"""How long a merge waits for another one into the same folder."""


@dataclass
class Merged:
    """What a merge found."""

    surface: Surface
    sources: list[Path]
    is_new: bool
    """Whether there was anything that the file did not have."""


def missing_tasks(surface: Surface, count: int) -> list[int]:
    """Which of so many shards of a merged surface have points without a value."""
    order = surface.grid.coarse_to_fine()
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return np.unique(place[surface.missing] % count).tolist()


def merge(whole: Path, sources: Sequence[Path] = ()) -> Merged:
    """Write everything that shards, or any surface files of one job, have into the file ``whole``.

    Without ``sources`` these are the shards beside ``whole``. What ``whole`` has already stays. Shards may be
    unfinished, being written, or there twice; what one point has in several files has to agree bit for bit. The file is
    written under a temporary name, synced, renamed, read again and compared; the shards are left as they are. Merging
    again changes nothing.

    Raises InputError where files are of different jobs or points differ, DamagedFile where one is damaged: then
    nothing is written.
    """
    named = shard_files(whole)
    paths = list(dict.fromkeys(sources or named))
    if not paths and not whole.exists():
        raise InputError(
            f"there is no {whole}, and no shard of it beside it ({whole.stem}.shard-I-of-N{whole.suffix}): nothing "
            "is evaluated yet, or it lies elsewhere"
        )
    with _turn(whole):
        if whole.exists():
            require_unclaimed(whole)
            with SurfaceFile.open(whole) as file:
                if file.shard is not None:
                    raise InputError(
                        f"{whole} is shard {file.shard} of a job; give the name of the whole surface"
                    )
            paths = [whole, *(path for path in paths if path != whole)]
        merged = _Sum()
        for path in paths:
            is_shard = path != whole and path in named
            merged.add(path, ". Without that file the others merge: move it away" if is_shard else "")
        surface = merged.surface
        is_new = merged.changes > 0 or not whole.exists()
        if is_new:
            surface.save(whole)
        _require_written(whole, surface)
    surface.path = whole
    return Merged(surface, paths, is_new)


def require_files_of(job: Job, whole: Path) -> None:
    """Raise InputError if the surface or a shard that lies there is of another job, as far as the jobs' texts tell."""
    for path in [*([whole] if whole.exists() else []), *shard_files(whole)]:
        with SurfaceFile.open(path) as file:
            text = file.job
        try:
            recorded = Job.read(text)
        except InputError:  # of another version of distsurf: its fingerprint tells, later
            continue
        if differing := job.difference(recorded):
            raise InputError(
                f"{path} is of another job: {differing}; move it away, or give another --out or name"
            )


class _Sum:
    """What several files of one job have together."""

    def __init__(self) -> None:
        self.surface: Surface
        self.changes = 0
        """How many points came from other files than the first."""
        self._origin = np.empty(0, np.int64)  # of every point, the number of the file that it comes from
        self._paths: list[Path] = []

    def add(self, path: Path, advice: str) -> None:
        """Take what a file has; ``advice`` is for one that cannot be opened."""
        try:
            opened = SurfaceFile.open(path)
        except (InputError, DamagedFile) as error:
            raise type(error)(f"{error}{advice}") from error
        with opened as file:
            file.require_sound(points_only=True)
            if self._paths and (differing := file.difference(self.surface.fingerprint)):
                raise InputError(
                    f"{path} is of another job than {self._paths[0]}; what differs: {differing}. "
                    "Move the one that is not wanted away, or leave it out"
                )
            surface = file.read()
        self._paths.append(path)
        shard = surface.shard
        if len(self._paths) == 1:
            surface.facts = {key: value for key, value in surface.facts.items() if key != "shard"}
            self.surface = surface
            self._origin = np.zeros(surface.grid.size, np.int64)
        else:
            self._take(surface, path)
        if shard is not None:
            self.surface.facts = {**self.surface.facts, "shards": shard.count}

    def _take(self, other: Surface, path: Path) -> None:
        mine = self.surface
        if other.columns != mine.columns:
            raise InputError(
                f"{path} has columns {', '.join(other.names)}, {self._paths[0]} has {', '.join(mine.names)}"
            )
        status, theirs = mine.status.ravel(), other.status.ravel()
        has, comes = np.isin(status, DONE), np.isin(theirs, DONE)
        self._require_equal(other, np.flatnonzero(has & comes), path)
        new = np.flatnonzero(comes & ~has)
        for name in mine.names:
            mine.values[name].ravel()[new] = other.values[name].ravel()[new]
        mine.cost.ravel()[new] = other.cost.ravel()[new]
        status[new] = theirs[new]
        for point in new.tolist():
            mine.failures.pop(point, None)
        failed = np.flatnonzero((theirs == Status.FAILED) & (status == Status.PENDING))
        status[failed] = Status.FAILED
        for point in failed.tolist():
            if point in other.failures:
                mine.failures[point] = other.failures[point]
        self._origin[new] = len(self._paths) - 1
        self.changes += len(new) + len(failed)

    def _require_equal(self, other: Surface, points: np.ndarray, path: Path) -> None:
        mine = self.surface
        for name in mine.names:
            here, there = (one.values[name].ravel()[points].view(np.int64) for one in (mine, other))
            differing = points[here != there]
            if len(differing):
                point = int(differing[0])
                first = self._paths[self._origin[point]]
                where = ", ".join(f"{c:g}" for c in mine.grid.coordinates_of(point))
                values = [float(one.values[name].ravel()[point]) for one in (mine, other)]
                raise InputError(
                    f"{len(differing):,} points have different values in two files, the first at ({where}): {name} is "
                    f"{values[0]!r} in {first} and {values[1]!r} in {path}; move one of the two away, or leave it out"
                )


def _require_written(path: Path, surface: Surface) -> None:
    """Raise DamagedFile unless a file has exactly what was to be written."""
    with SurfaceFile.open(path) as file:
        file.require_sound(points_only=True)
        found = file.read()
    same = np.array_equal(found.status, surface.status) and all(
        np.array_equal(found.values[name].view(np.int64), surface.values[name].view(np.int64))
        for name in surface.names
    )
    if not same:
        raise DamagedFile(f"{path} does not read as it was written; the shards are as they were")


@contextlib.contextmanager
def _turn(whole: Path) -> Iterator[None]:
    """One merge into a folder at a time, or a slow one might undo a later one: by a lock, where folders have them."""
    try:
        folder = os.open(whole.parent, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot read the folder {whole.parent}: {error.strerror}") from error
    try:
        end = time.monotonic() + TURN_SECONDS
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise InputError(f"another merge into {whole.parent} does not end; try later") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(folder)
