"""The surface file: HDF5, laid out once, then only written in place.

Layout (every dataset is allocated at creation and never resized, because files that change their structure were
measured not to survive ``kill -9``, while in-place writes with a flush did, 175 times of 175):

- ``/x`` ``/y`` ``/z``: axes, as HDF5 dimension scales, so that xarray sees labelled dimensions;
- one float64 dataset per column, shape ``[z, y, x]``, NaN where there is no value; ``/cost`` in seconds;
- ``/status`` uint8 per point, written and flushed after the values that it vouches for;
- ``/failures/point`` and ``/failures/reason``: why points failed;
- ``/writer``: who is writing now (`distsurf.surface.claim`);
- root attributes ``format``, ``job`` (TOML), ``fingerprint`` (JSON) and ``facts`` (JSON).

The file is opened without HDF5's own locks, which many cluster file systems refuse: readers never need one, since
the structure is final from the first byte.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from distsurf.errors import DamagedFile, DistsurfError, InputError
from distsurf.evaluator import Column
from distsurf.files import replacing
from distsurf.grid import Grid
from distsurf.surface import claim
from distsurf.surface.claim import Claim
from distsurf.surface.surface import Status, Surface

FORMAT = "distsurf-surface-1"
COST = Column("cost", "s")
MAX_FAILURES = 1000
REASON_BYTES = 400
# HDF5 keeps attributes in the object header, which ends at 64 KiB.
MAX_ATTRIBUTE_BYTES = 60_000
RESERVED_NAMES = frozenset({"x", "y", "z", "status", "cost", "failures", claim.RECORD})


class SurfaceFile:
    """One surface file, open. Use `create`, `open` or `memory`; close it, or use it in a ``with``."""

    def __init__(self, handle: h5py.File, path: Path | None, claim: Claim | None = None):
        self._h5 = handle
        self.path = path
        self._claim = claim
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]] = []
        self._pending_failures: dict[int, str] = {}
        with _readable(path):
            self.grid, self.columns = _read_structure(handle)

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
        handle = h5py.File(io.BytesIO(), "w")
        _lay_out(handle, grid, columns, job, fingerprint or {}, facts or {})
        return cls(handle, None)

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

        The file appears under its name only once it is whole and on disk; an existing one is replaced.
        Raises InputError if the folder cannot be written.
        """
        path = Path(path)
        needed = grid.size * (8 * (len(columns) + 1) + 1)
        with replacing(path) as temporary:
            free = shutil.disk_usage(path.parent).free
            if needed > free:
                raise InputError(
                    f"{path} would take {needed / 1e9:.3g} GB, its disk has {free / 1e9:.3g} GB left"
                )
            with h5py.File(temporary, "w", locking=False) as handle:
                _lay_out(handle, grid, columns, job, fingerprint or {}, facts or {})
        return cls.open(path, write=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, write: bool = False) -> SurfaceFile:
        """Open an existing file, for one writer at a time.

        Raises InputError (missing, no surface, being written by another process) or DamagedFile (cannot be read).
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no surface file {path}")
        if write and not os.access(path, os.W_OK):
            raise InputError(f"{path} cannot be written: check its permissions, or choose another --out")
        if not h5py.is_hdf5(path):
            raise InputError(f"{path} is not a surface file (it is not HDF5)")
        with _readable(path):
            handle = h5py.File(path, "r+" if write else "r", locking=False)
        with _readable(path):
            is_ours = "format" in handle.attrs
        if not is_ours:
            handle.close()
            raise InputError(f"{path} is HDF5 but not a surface file of distsurf")
        held = None
        try:
            held = Claim(path, handle) if write else None
            return cls(handle, path, held)
        except BaseException:
            if held is not None:
                held.release()
            handle.close()
            raise

    @classmethod
    def write(cls, path: Path, surface: Surface) -> None:
        """Write a surface in memory to a file, under a temporary name first."""
        with replacing(path) as temporary, h5py.File(temporary, "w", locking=False) as handle:
            _lay_out(handle, surface.grid, surface.columns, surface.job, surface.fingerprint, surface.facts)
            file = cls(handle, path)
            for name, values in surface.values.items():
                handle[name][...] = values
            handle["cost"][...] = surface.cost
            file._write_failures(surface.failures)
            handle["status"][...] = surface.status

    def __enter__(self) -> SurfaceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        # What went wrong may well be the writing itself: a second complaint would hide the first.
        with contextlib.suppress(OSError):
            self.commit()
        with contextlib.suppress(OSError):
            self._let_go()

    def close(self) -> None:
        """Commit what is recorded and close."""
        if self._h5:
            self.commit()
            self._let_go()

    def _let_go(self) -> None:
        try:
            if self._claim is not None:
                self._claim.release()
        finally:
            self._h5.close()

    # -- recording ----------------------------------------------------------------------------------------

    def record(
        self, points: NDArray[np.int64], values: NDArray[np.float64], seconds: NDArray[np.float64]
    ) -> None:
        """Take the values ``(P, C)`` and costs ``(P,)`` of points ``(P,)``; `commit` brings them to the file."""
        if len(points):
            self._pending.append((points, values, seconds))

    def record_failure(self, point: int, reason: str) -> None:
        """Take a point as failed, with the reason."""
        self._pending_failures[point] = reason

    def commit(self) -> None:
        """Write what was recorded since the last commit: values, flush, statuses, flush."""
        if self._claim is not None:
            self._claim.beat()
        if not self._pending and not self._pending_failures:
            return
        if self._pending:
            points, values, seconds = (np.concatenate(part) for part in zip(*self._pending, strict=True))
            for i, column in enumerate(self.columns):
                self._write_points(column.name, points, values[:, i])
            self._write_points(COST.name, points, seconds)
        self._write_failures(self._pending_failures)
        self._h5.flush()
        if self._pending:
            self._write_points("status", points, np.full(len(points), Status.EVALUATED, np.uint8))
        if self._pending_failures:
            failed = np.fromiter(self._pending_failures, np.int64)
            self._write_points("status", failed, np.full(len(failed), Status.FAILED, np.uint8))
        self._h5.flush()
        self._pending, self._pending_failures = [], {}

    def _write_points(self, name: str, points: NDArray[np.int64], values: NDArray[Any]) -> None:
        # h5py's own fancy indexing takes about 0.1 ms a point; an element selection writes them in one call.
        dataset = self._h5[name].id
        space = dataset.get_space()
        space.select_elements(np.stack(np.unravel_index(points, self.grid.shape), axis=1))
        memory = h5py.h5s.create_simple((len(points),))
        dataset.write(memory, space, np.ascontiguousarray(values))

    def _write_failures(self, failures: Mapping[int, str]) -> None:
        if not failures:
            return
        recorded = self._h5["failures/point"][:].tolist()
        status = self._h5["status"][...].ravel()
        slot_of = {point: slot for slot, point in enumerate(recorded) if point >= 0}
        # A slot is free if it was never used or speaks of a point that has succeeded since.
        free = [
            i for i, p in enumerate(recorded) if p < 0 or (p not in failures and status[p] != Status.FAILED)
        ]
        for point, reason in failures.items():
            slot = slot_of[point] if point in slot_of else free.pop(0) if free else None
            if slot is not None:  # the table is full: the point is marked failed all the same
                self._h5["failures/point"][slot] = point
                self._h5["failures/reason"][slot] = reason.encode()[:REASON_BYTES]

    # -- reading ------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the values depend on, field by field."""
        return dict(json.loads(self._h5.attrs["fingerprint"]))

    @property
    def facts(self) -> dict[str, Any]:
        """Versions, device and so on at the file's creation."""
        return dict(json.loads(self._h5.attrs["facts"]))

    @property
    def job(self) -> str:
        """The job as TOML text."""
        return str(self._h5.attrs["job"])

    def status(self) -> NDArray[np.uint8]:
        """Status of every point, of the grid's shape."""
        return np.asarray(self._h5["status"][...])

    def read(self) -> Surface:
        """Everything in the file. Raises DamagedFile if it cannot be read."""
        with _readable(self.path):
            return self._read()

    def _read(self) -> Surface:
        # The status is read first: a writer may add values while we read, never take any away.
        status = self.status()
        failures = {
            int(point): bytes(reason).decode(errors="replace")
            for point, reason in zip(
                self._h5["failures/point"][:], self._h5["failures/reason"][:], strict=True
            )
            if 0 <= point < status.size and status.ravel()[point] == Status.FAILED
        }
        return Surface(
            grid=self.grid,
            columns=self.columns,
            values={column.name: np.asarray(self._h5[column.name][...]) for column in self.columns},
            status=status,
            cost=np.asarray(self._h5["cost"][...]),
            failures=failures,
            job=self.job,
            fingerprint=self.fingerprint,
            facts=self.facts,
            path=self.path,
        )

    def require(self, fingerprint: Mapping[str, str]) -> None:
        """Raise InputError, naming the fields that differ, unless this file was made by the same job."""
        mine = self.fingerprint
        differing = [
            f"{name} (file {mine.get(name, 'none')}, this job {fingerprint.get(name, 'none')})"
            for name in sorted(mine.keys() | fingerprint.keys())
            if mine.get(name) != fingerprint.get(name)
        ]
        if differing:
            raise InputError(
                f"{self.path} is the surface of another job; what differs: {'; '.join(differing)}. "
                "Choose another output with --out, or start anew with --fresh (the old file is kept beside it)"
            )

    def check(self) -> list[str]:
        """Contradictions within the file, one readable line each; empty if it is sound."""
        try:
            self.read()
        except DamagedFile as error:
            return [str(error)]
        problems = []
        status = self.status()
        unknown = np.setdiff1d(np.unique(status), [int(s) for s in Status])
        if unknown.size:
            problems.append(f"unknown status values {', '.join(map(str, unknown))}")
        evaluated = status == Status.EVALUATED
        costs = self._h5["cost"][...]
        unpaid = evaluated & ~(costs >= 0)
        if unpaid.any():
            problems.append(f"{int(unpaid.sum())} points are marked evaluated but have no cost")
        return problems


@contextlib.contextmanager
def _readable(path: Path | None) -> Iterator[None]:
    """Whatever HDF5 or a parser says of bytes that are not what they should be is damage."""
    try:
        yield
    except DistsurfError as error:
        raise DamagedFile(f"{path or 'the surface'} is damaged: {error}") from error
    except Exception as error:
        said = " ".join(str(error).split())
        raise DamagedFile(
            f"{path or 'the surface'} is HDF5 that cannot be opened or read whole: {said}"
        ) from error


def _lay_out(
    handle: h5py.File,
    grid: Grid,
    columns: Sequence[Column],
    job: str,
    fingerprint: Mapping[str, str],
    facts: Mapping[str, Any],
) -> None:
    for name in (column.name for column in columns):
        if name in RESERVED_NAMES or "/" in name or not name:
            taken = ", ".join(sorted(RESERVED_NAMES))
            raise InputError(
                f"a column cannot be called {name!r}: no '/', not empty, and none of {taken}; rename the split or value"
            )
    for name, axis in zip(grid.names, grid.axes, strict=True):
        handle.create_dataset(name, data=axis.values)
        handle[name].make_scale(name)

    def allocate(column: Column, fill: float | int, dtype: type) -> None:
        dataset = handle.create_dataset(column.name, shape=grid.shape, dtype=dtype, fillvalue=fill)
        dataset[...] = fill  # HDF5 gives a contiguous dataset its place in the file at the first write
        dataset.attrs["units"] = column.unit
        for dimension, name in enumerate(reversed(grid.names)):
            dataset.dims[dimension].label = name
            dataset.dims[dimension].attach_scale(handle[name])

    for column in (*columns, COST):
        allocate(column, np.nan, np.float64)
    allocate(Column("status"), int(Status.PENDING), np.uint8)
    handle["status"].attrs["meaning"] = ", ".join(
        f"{status.value} {status.name.lower()}" for status in Status
    )

    slots = min(grid.size, MAX_FAILURES)
    claim.lay_out(handle)
    failures = handle.create_group("failures")
    failures.create_dataset("point", data=np.full(slots, -1, np.int64))
    failures.create_dataset("reason", data=np.zeros(slots, f"S{REASON_BYTES}"))

    texts = {"job": job, "fingerprint": json.dumps(dict(fingerprint)), "facts": json.dumps(dict(facts))}
    for name, text in texts.items():
        if len(text.encode()) > MAX_ATTRIBUTE_BYTES:
            raise InputError(
                f"the {name} text is {len(text.encode())} bytes long; a surface file holds {MAX_ATTRIBUTE_BYTES}"
            )
        handle.attrs[name] = text
    handle.attrs["columns"] = json.dumps([column.name for column in columns])
    handle.attrs["grid"] = json.dumps([str(axis) for axis in grid.axes])
    handle.attrs["format"] = FORMAT
    handle.flush()


def _read_structure(handle: h5py.File) -> tuple[Grid, tuple[Column, ...]]:
    found = handle.attrs["format"]
    if found != FORMAT:
        raise DamagedFile(f"surface file of format {found!r}; this version reads {FORMAT!r}")
    texts = json.loads(handle.attrs["grid"])
    grid = Grid.parse(dict(zip("xyz", texts, strict=False)))
    names = json.loads(handle.attrs["columns"])
    for name in (*names, "cost", "status"):
        if handle[name].shape != grid.shape:
            raise DamagedFile(f"dataset {name} has shape {handle[name].shape}, the grid {grid.shape}")
    for name, axis in zip(grid.names, grid.axes, strict=True):
        if not np.array_equal(handle[name][...], axis.values):
            raise DamagedFile(f"the coordinates {name} are not those of the axis {axis}")
    if handle["failures/point"].shape != handle["failures/reason"].shape:
        raise DamagedFile("the table of failures has columns of different length")
    return grid, tuple(Column(name, str(handle[name].attrs["units"])) for name in names)
