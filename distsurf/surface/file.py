"""The surface file: HDF5 for whoever reads it, laid out once, then only written in place.

- ``/x`` ``/y`` ``/z`` (or ``/repeat``): axes, as HDF5 dimension scales, so that xarray sees labelled dimensions;
- one float64 dataset per column, shape ``[z, y, x]``, NaN where there is no value; ``/cost`` in seconds;
- ``/status`` uint8 per point, written when what it vouches for has reached the disk;
- ``/state/checksum``: CRC-32 of each point's record; ``/state/totals``: how many points were evaluated, and how many
  not pending, so that a status that is lost shows; ``/state/attempts``: how often a point was begun and not ended;
- ``/failures``: why points failed; ``/state/writer``: who is writing now (`distsurf.surface.claim`);
- attributes ``job`` (TOML), ``fingerprint`` and ``facts`` (JSON), as in the header (`distsurf.surface.layout`).

Results go to their places with plain writes. In-place writes were measured to survive ``kill -9`` 175 times of 175, and
one that fails (a full disk) leaves nothing half done in a library: it is tried again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distsurf.errors import DamagedFile, InputError
from distsurf.evaluator import Column
from distsurf.files import free_name, replacing
from distsurf.grid import Grid
from distsurf.shards import ArrayShard, shard_in
from distsurf.surface.claim import Claim
from distsurf.surface.layout import Layout, bytes_needed, lay_out, read_layout
from distsurf.surface.records import PAGE_BYTES, Points, Problem, Records, Values
from distsurf.surface.storage import Disk, Memory, Mirrored, Storage
from distsurf.surface.surface import DONE, Status, Surface

MOST_MIRRORED = 1 << 30
"""Bytes of a file that are kept in memory too while it is written: 16 million points."""


class SurfaceFile:
    """One surface file, open. Use `create`, `open` or `memory`; close it, or use it in a ``with``."""

    def __init__(self, storage: Storage, layout: Layout, path: Path | None, claim: Claim | None = None):
        self.path = path
        self._where = None if path is None else path.absolute()  # a model may change the folder
        self._storage, self._layout, self._claim = storage, layout, claim
        self._records = Records(storage, layout)
        self._pending: list[tuple[Points, Values, Values]] = []
        self._pending_failures: dict[int, str] = {}
        self._status = self._records.array("status").copy()
        self._attempts = bytearray(self._records.array("state/attempts").tobytes())
        self._slots: list[int] = self._records.array("failures/point").tolist()
        self._is_open = True

    # -- making and opening -------------------------------------------------------------------------------

    @classmethod
    def memory(
        cls,
        grid: Grid,
        columns: Sequence[Column],
        *,
        job: str = "",
        fingerprint: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> SurfaceFile:
        """A surface file that lives in memory only: the same layout and code, nothing on disk."""
        storage = Memory()
        return cls(storage, lay_out(storage, grid, columns, job, fingerprint or {}, facts or {}), None)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        grid: Grid,
        columns: Sequence[Column],
        *,
        job: str = "",
        fingerprint: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> SurfaceFile:
        """Lay out a new file with every point pending and open it for recording.

        The file appears under its name only once it is whole and on disk. Raises InputError if there is one already,
        or the folder or the disk does not take it.
        """
        path = Path(path)
        with _new_file(path, grid, columns, may_exist=False) as storage:
            lay_out(storage, grid, columns, job, fingerprint or {}, facts or {})
        return cls.open(path, write=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, write: bool = False) -> SurfaceFile:
        """Open an existing file, for one writer at a time.

        Raises InputError (missing, no surface, being written by another process) or DamagedFile (cannot be read).
        """
        path = Path(path)
        storage = opened(path, write=write)
        claim = None
        try:
            with readable(path):
                layout = read_layout(storage)
            if layout is None:
                raise InputError(f"{path} is not a surface file of distsurf")
            if write:
                claim = Claim(path, storage, layout.places["state/writer"])
            with readable(path):
                return cls(_mirrored(storage) if write else storage, layout, path, claim)
        except BaseException:
            if claim is not None:
                claim.release()
            storage.close()
            raise

    @classmethod
    def write(cls, path: Path, surface: Surface) -> None:
        """Write a surface in memory to a file, under a temporary name first. Raises InputError where that fails."""
        with _new_file(path, surface.grid, surface.columns) as storage:
            about = surface.job, surface.fingerprint, surface.facts
            file = cls(storage, lay_out(storage, surface.grid, surface.columns, *about), None)
            status = surface.status.ravel()
            for kind in DONE:
                points = np.flatnonzero(status == kind)
                values = [surface.values[column.name].ravel()[points] for column in surface.columns]
                file._write_values(points, np.stack(values, axis=1), surface.cost.ravel()[points], kind)
            failed = np.flatnonzero(status == Status.FAILED).tolist()
            file._pending_failures = {point: surface.failures.get(point, "unknown") for point in failed}
            file.commit()

    def __enter__(self) -> SurfaceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        # What went wrong may well be the writing itself: a second complaint would hide the first.
        with contextlib.suppress(Exception):
            self.close()

    def close(self) -> None:
        """Commit what is recorded and close.

        Raises OSError where the disk does not take what was recorded; the file is closed all the same.
        """
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._commit_at_last()
        finally:
            if self._claim is not None:
                with contextlib.suppress(OSError):
                    self._claim.release()
            self._storage.close()

    def _commit_at_last(self) -> None:
        has_results = self.unwritten > 0
        try:
            self.commit()
        except OSError:
            if has_results:
                raise
        if self._claim is not None:
            self._storage.sync()

    # -- recording ----------------------------------------------------------------------------------------

    def begin(self, points: Points) -> None:
        """Note, at once, that points are about to be evaluated: should they kill their process, the file tells."""
        self._note_attempts(points, 1)

    def withdraw(self, points: Points) -> None:
        """Take `begin` back for points that were given up in good order."""
        self._note_attempts(points, -1)

    def _note_attempts(self, points: Points, change: int) -> None:
        # Once for every shard, mostly of few points: plain bytes are several times faster here than arrays.
        attempts, offset = self._attempts, self._layout.places["state/attempts"].offset
        pages: dict[int, list[int]] = {}
        for point in points.tolist():
            attempts[point] = min(max(attempts[point] + change, 0), 255)
            pages.setdefault(point // PAGE_BYTES, []).append(point)
        # If the disk does not take it, results will not be taken either, and `commit` says so.
        with contextlib.suppress(OSError):
            for page in pages.values():
                first = min(page)
                self._storage.write(offset + first, attempts[first : max(page) + 1])

    def record(self, points: Points, values: Values, seconds: Values) -> None:
        """Take the values ``(P, C)`` and costs ``(P,)`` of points ``(P,)``; `commit` brings them to the file."""
        if len(points):
            self._pending.append((points, values, seconds))
            for point in points.tolist() if self._pending_failures else ():
                self._pending_failures.pop(point, None)

    def record_failure(self, point: int, reason: str) -> None:
        """Take a point as failed, with the reason."""
        self._pending_failures[point] = reason

    def commit(self) -> None:
        """Bring what was recorded since the last commit to the disk: values, then the statuses that vouch for them.

        Raises OSError where the disk does not take it: nothing is forgotten, and the next commit tries again.
        """
        if self._claim is not None:
            self._claim.beat()
        if isinstance(self._storage, (Disk, Mirrored)) and self._claim is not None:
            self._storage.require_in_place()
        if not self._pending and not self._pending_failures:
            return
        if self._pending:
            points, values, cost = (np.concatenate(part) for part in zip(*self._pending, strict=True))
            self._write_values(points, values, cost, Status.EVALUATED)
        if self._pending_failures:
            failed = np.array(sorted(self._pending_failures), np.int64)
            self._records.put_failures(self._slots_for(self._pending_failures), self._pending_failures)
            self._storage.sync()
            self._write_status(failed, Status.FAILED)
        self._records.put_totals(self._status)
        self._pending, self._pending_failures = [], {}

    def _write_values(self, points: Points, values: Values, cost: Values, kind: Status) -> None:
        order = np.argsort(points, kind="stable")
        points, values, cost = points[order], values[order], cost[order]
        self._records.put_values(points, values, cost, np.full(len(points), kind, np.uint8))
        self._storage.sync()  # or the machine may die with the status on its disk and not the values
        self._write_status(points, kind)

    def _write_status(self, points: Points, kind: Status) -> None:
        self._records.put("status", points, np.full(len(points), kind, np.uint8))
        self._status[points] = kind

    def _slots_for(self, failures: Mapping[int, str]) -> dict[int, int]:
        """Places in the table of failures: where a point has one, that; else one that nobody needs any more."""
        slot_of = {point: slot for slot, point in enumerate(self._slots) if point >= 0}
        free = [
            slot
            for slot, point in enumerate(self._slots)
            if point < 0 or (point not in failures and self._status[point] != Status.FAILED)
        ]
        found = {}
        for point in failures:
            if point in slot_of:
                found[point] = slot_of[point]
            elif free:
                found[point] = free.pop(0)
                self._slots[found[point]] = point
        return found

    # -- when the disk lets us down -----------------------------------------------------------------------

    @property
    def unwritten(self) -> int:
        """How many results wait for the disk to take them."""
        return sum(len(points) for points, _, _ in self._pending) + len(self._pending_failures)

    def put_back(self) -> None:
        """Give the file its name again after somebody removed it: what was recorded is still in our hands.

        Raises OSError or InputError where that cannot be done, in particular where there is another file by now.
        """
        assert self._where is not None
        whole = self._storage.read(0, self._layout.size)
        with _new_file(self._where, self.grid, self.columns, may_exist=False) as new:
            new.write(0, whole)
        storage = _mirrored(Disk(self._where, write=True))
        claim = Claim(self._where, storage, self._layout.places["state/writer"])
        old_storage, old_claim = self._storage, self._claim
        self._storage, self._claim, self._records = storage, claim, Records(storage, self._layout)
        with contextlib.suppress(OSError):
            if old_claim is not None:
                old_claim.release()
            old_storage.close()

    def is_altered(self) -> bool:
        """Whether others have changed what was recorded, while this file was open. May raise OSError."""
        return isinstance(self._storage, Mirrored) and self._storage.differs(self._recorded_parts())

    def restore(self) -> None:
        """Write everything recorded again. May raise OSError."""
        if isinstance(self._storage, Mirrored):
            self._storage.restore(self._recorded_parts())

    def _recorded_parts(self) -> list[tuple[int, int]]:
        """The header and all datasets but the claim; what others have added to the HDF5 structure is theirs."""
        places = [place for name, place in self._layout.places.items() if name != "state/writer"]
        return [(0, len(self._layout.header)), *((place.offset, place.end) for place in places)]

    def rescue(self, surface: Surface, folders: Iterable[Path]) -> Path | None:
        """Save what the disk did not take, with all the rest, to the first of some folders that takes it.

        However that ends, the results wait no longer for their own place. Returns the new file's name, if any.
        """
        assert self._where is not None
        self._pending, self._pending_failures = [], {}
        for folder in folders:
            with contextlib.suppress(OSError, InputError):
                path = free_name(folder / self._where.name, "rescued")
                SurfaceFile.write(path, surface)
                return path
        return None

    # -- reading ------------------------------------------------------------------------------------------

    @property
    def grid(self) -> Grid:
        """The grid."""
        return self._layout.grid

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns."""
        return self._layout.columns

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the values depend on, field by field."""
        return dict(self._layout.fingerprint)

    @property
    def facts(self) -> dict[str, Any]:
        """Versions, device and so on at the file's creation."""
        return dict(self._layout.facts)

    @property
    def job(self) -> str:
        """The job as TOML text."""
        return self._layout.job

    @property
    def shard(self) -> ArrayShard | None:
        """The shard whose points this file is for; None for all points."""
        return shard_in(self._layout.facts)

    def points(self) -> Points:
        """Indices of the points that are to have values, coarse-to-fine."""
        return self.grid.coarse_to_fine() if self.shard is None else self.shard.points(self.grid)

    def status(self) -> NDArray[np.uint8]:
        """Status of every point in the file, of the grid's shape."""
        return self._records.array("status").reshape(self.grid.shape)

    def attempts(self) -> NDArray[np.uint8]:
        """How often each point was begun without coming to an end, of the grid's shape."""
        return np.frombuffer(bytes(self._attempts), np.uint8).reshape(self.grid.shape)

    def forgive(self, most: int) -> None:
        """Leave points that have failed no more than so many attempts: they get a new chance."""
        attempts = self.attempts().ravel()
        for count in range(most + 1, int(attempts.max(initial=0)) + 1):
            self._note_attempts(
                np.flatnonzero((self._status == Status.FAILED) & (attempts == count)), most - count
            )

    def differing(self, points: Points, values: Values) -> Points:
        """Which of these points have been recorded with other values, bit for bit."""
        surface = self.read()
        recorded = np.stack([surface.values[c.name].ravel()[points] for c in self.columns], axis=1)
        same = (np.ascontiguousarray(values).view(np.int64) == recorded.view(np.int64)).all(axis=1)
        return points[~same]

    def read(self) -> Surface:
        """Everything in the file, and what was recorded and is not there yet. Raises DamagedFile if it cannot be read.

        Points that do not match their checksums are left out, with a warning.
        """
        with readable(self.path):
            return self._surface()

    def _surface(self) -> Surface:
        # The status is read first: a writer may add values while we read, never take any away.
        status = self._records.array("status").copy()
        wrong = np.flatnonzero((status != Status.PENDING) & ~self._records.vouched(status))
        if len(wrong):
            warnings.warn(
                f"{self.path}: {len(wrong):,} points do not match their checksums and are left out; "
                "distsurf check tells more",
                stacklevel=4,
            )
            status[wrong] = Status.PENDING
        surface = self._records.surface(status, self.path)
        flat = surface.status.ravel()
        for point, reason in self._pending_failures.items():
            flat[point] = Status.FAILED
            surface.failures[point] = reason
        for points, values, seconds in self._pending:
            flat[points] = Status.EVALUATED
            surface.cost.ravel()[points] = seconds
            for i, column in enumerate(self.columns):
                surface.values[column.name].ravel()[points] = values[:, i]
            for point in points.tolist():
                surface.failures.pop(point, None)
        return surface

    def require(self, fingerprint: Mapping[str, str]) -> None:
        """Raise InputError, naming the fields that differ, unless this file was made by the same job."""
        differing = self.difference(fingerprint)
        if differing:
            raise InputError(
                f"{self.path} is the surface of another job; what differs: {differing}. "
                "Choose another output with --out, or start anew with --fresh (the old file is kept beside it)"
            )

    def difference(self, fingerprint: Mapping[str, str]) -> str:
        """In words what this file's values depend on otherwise than those of a job; empty for the same job."""
        mine = self.fingerprint
        return "; ".join(
            f"{name} (file {mine.get(name, 'none')}, this job {fingerprint.get(name, 'none')})"
            for name in sorted(mine.keys() | fingerprint.keys())
            if mine.get(name) != fingerprint.get(name)
        )

    def problems(self) -> list[Problem]:
        """Contradictions within the file; empty if it is sound."""
        try:
            return self._records.problems()
        except DamagedFile as error:
            return [Problem(str(error), np.empty(0, np.int64))]

    def require_sound(self, *, points_only: bool = False) -> None:
        """Raise DamagedFile, with everything that is wrong, unless the file is sound.

        With ``points_only`` it may have been changed elsewhere, as other programs do that write to it.
        """
        problems = [problem for problem in self.problems() if problem.concerns_points or not points_only]
        if problems:
            raise DamagedFile(f"{self.path} is damaged: {in_words(problems, self.grid)}. {REMEDY}")


REMEDY = "distsurf check --repair writes what can be trusted to a new file, which the job then completes"


def in_words(problems: Sequence[Problem], grid: Grid) -> str:
    """Problems in a line, with the first few points of each."""
    return "; ".join(problem.text + _where(problem.points, grid) for problem in problems)


def _where(points: Points, grid: Grid) -> str:
    if not len(points):
        return ""
    shown = [f"({', '.join(f'{c:g}' for c in grid.coordinates_of(int(point)))})" for point in points[:3]]
    return f", at {', '.join(shown)}{', …' if len(points) > len(shown) else ''}"


def opened(path: Path, *, write: bool) -> Disk:
    """A file's bytes. Raises InputError where there is none or it cannot be opened."""
    if not path.is_file():
        raise InputError(f"no surface file {path}")
    try:
        return Disk(path, write=write)
    except OSError as error:
        verb = "written" if write else "read"
        raise InputError(
            f"{path} cannot be {verb} ({error.strerror}): check its permissions, or choose another --out"
        ) from error


def _mirrored(disk: Disk) -> Storage:
    """A file with its bytes in memory too, where those are not too many."""
    return Mirrored(disk) if disk.size() <= MOST_MIRRORED else disk


@contextlib.contextmanager
def _new_file(path: Path, grid: Grid, columns: Sequence[Column], *, may_exist: bool = True) -> Iterator[Disk]:
    """The bytes of a file that gets its name when all of them are written."""
    needed = bytes_needed(grid, columns)
    try:
        with replacing(path, may_exist=may_exist) as temporary:
            free = shutil.disk_usage(path.parent).free
            if needed > free:
                raise InputError(
                    f"{path} would take {needed / 1e6:,.3g} MB, its disk has {free / 1e6:,.3g} MB left"
                )
            with contextlib.closing(Disk(temporary, write=True)) as storage:
                yield storage
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): make room, or choose another --out"
        ) from error


@contextlib.contextmanager
def readable(path: Path | None) -> Iterator[None]:
    """Name the file that is damaged."""
    try:
        yield
    except DamagedFile as error:
        raise DamagedFile(f"{path or 'the surface'} is damaged: {error}. {REMEDY}") from error
    except OSError as error:
        raise InputError(f"{path or 'the surface'} cannot be read: {error.strerror}") from error
