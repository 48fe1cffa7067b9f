"""The datasets of a surface file that change: reading and writing them, and what vouches for them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distsurf.surface.layout import COST, REASON_BYTES, Layout
from distsurf.surface.storage import Storage
from distsurf.surface.surface import DONE, Status, Surface

PAGE_BYTES = 4096
Points = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a file, in words, and the points that it puts in doubt."""

    text: str
    points: Points
    concerns_points: bool = True


def checksums(points: Points, values: Values, cost: Values, status: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """CRC-32 ``(P,)`` of each point's record: index, values ``(P, C)``, cost ``(P,)`` and status ``(P,)``."""
    count, columns = values.shape
    width = 8 * (columns + 2) + 1
    rows = np.empty((count, width), np.uint8)
    rows[:, :8] = np.ascontiguousarray(points, "<i8").view(np.uint8).reshape(count, 8)
    rows[:, 8:-9] = np.ascontiguousarray(values, "<f8").view(np.uint8).reshape(count, 8 * columns)
    rows[:, -9:-1] = np.ascontiguousarray(cost, "<f8").view(np.uint8).reshape(count, 8)
    rows[:, -1] = status
    text = rows.tobytes()
    return np.fromiter(
        (zlib.crc32(text[start : start + width]) for start in range(0, len(text), width)), np.uint32, count
    )


class Records:
    """What a surface file holds of its points. May raise OSError and, where bytes are missing, DamagedFile."""

    def __init__(self, storage: Storage, layout: Layout):
        self._storage, self._layout = storage, layout

    def array(self, name: str) -> NDArray[Any]:
        """A whole dataset, flat."""
        place = self._layout.places[name]
        return np.frombuffer(self._storage.read(place.offset, place.end - place.offset), place.dtype)

    def values(self) -> Values:
        """All columns ``(points, C)``."""
        return np.stack([self.array(column.name) for column in self._layout.columns], axis=1)

    # -- writing ------------------------------------------------------------------------------------------

    def put(self, name: str, points: Points, values: NDArray[Any]) -> None:
        """Write the entries ``(P,)`` of a dataset at ascending indices ``(P,)``.

        Points visited coarse-to-fine lie scattered: those of a page are one write, together with what lies between them
        as it is. There is one writer, and a page is written whole or not at all by a process that is killed.
        """
        if not len(points):
            return
        place = self._layout.places[name]
        values = np.ascontiguousarray(values, place.dtype)
        size = place.dtype.itemsize
        pages = points * size // PAGE_BYTES
        starts = np.flatnonzero(np.diff(pages, prepend=-1)).tolist()
        for start, end in zip(starts, [*starts[1:], len(points)], strict=True):
            first, last = int(points[start]), int(points[end - 1])
            offset, block = place.offset + first * size, values[start:end]
            if last - first >= end - start:
                block = np.frombuffer(
                    self._storage.read(offset, (last - first + 1) * size), place.dtype
                ).copy()
                block[points[start:end] - first] = values[start:end]
            self._storage.write(offset, block.data)

    def put_values(self, points: Points, values: Values, cost: Values, status: NDArray[np.uint8]) -> None:
        """Write all of a record but its status."""
        for i, column in enumerate(self._layout.columns):
            self.put(column.name, points, values[:, i])
        self.put(COST, points, cost)
        self.put("state/checksum", points, checksums(points, values, cost, status))

    def put_failures(self, slots: Mapping[int, int], reasons: Mapping[int, str]) -> None:
        """Write reasons, by point, into slots of the table, by point, and the checksums of failed points."""
        points = np.array(sorted(reasons), np.int64)
        self.put("state/checksum", points, self._failed_checksums(points))
        for point, reason in reasons.items():
            if point not in slots:  # the table is full: the point is marked failed all the same
                continue
            slot = np.array([slots[point]])
            text = np.array([reason.encode()[:REASON_BYTES]], f"S{REASON_BYTES}")
            # Not valid while it is being written: a reason must not appear beside another's point.
            self.put("failures/checksum", slot, np.zeros(1, np.uint32))
            self.put("failures/point", slot, np.array([point]))
            self.put("failures/reason", slot, text)
            self.put("failures/checksum", slot, np.array([_reason_checksum(point, text[0])]))

    def put_totals(self, status: NDArray[np.uint8]) -> None:
        """Write how many points are evaluated, and how many are not pending, once their statuses are written."""
        self.put("state/totals", np.arange(2), np.array(_totals(status)))

    # -- what vouches for it ------------------------------------------------------------------------------

    def vouched(self, status: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which points' records match their checksums, were they of these statuses; pending ones never do."""
        found = np.zeros(len(status), bool)
        stored = self.array("state/checksum")
        values, cost = self.values(), self.array(COST)
        valued = np.flatnonzero(np.isin(status, DONE))
        found[valued] = stored[valued] == checksums(valued, values[valued], cost[valued], status[valued])
        failed = np.flatnonzero(status == Status.FAILED)
        # A failed point that has succeeded since keeps its status up to the last moment: its record may be ahead of it.
        ahead = checksums(
            failed, values[failed], cost[failed], np.full(len(failed), Status.EVALUATED, np.uint8)
        )
        found[failed] = (stored[failed] == self._failed_checksums(failed)) | (stored[failed] == ahead)
        return found

    def failures(self) -> dict[int, str]:
        """Reasons by point, as far as they are as they were written."""
        table = zip(
            self.array("failures/point").tolist(),
            self.array("failures/reason").tolist(),
            self.array("failures/checksum").tolist(),
            strict=True,
        )
        return {
            point: reason.decode(errors="replace")
            for point, reason, checksum in table
            if point >= 0 and checksum == _reason_checksum(point, reason)
        }

    def surface(self, status: NDArray[np.uint8], path: Path | None) -> Surface:
        """The points of these statuses ``(points,)``, as a surface."""
        layout, shape = self._layout, self._layout.grid.shape
        empty = ~np.isin(status, DONE)

        def of(name: str) -> Values:
            numbers = self.array(name).astype(np.float64)
            numbers[empty] = np.nan
            return numbers.reshape(shape)

        return Surface(
            grid=layout.grid,
            columns=layout.columns,
            values={column.name: of(column.name) for column in layout.columns},
            status=status.reshape(shape),
            cost=of(COST),
            failures={
                point: reason
                for point, reason in self.failures().items()
                if point < len(status) and status[point] == Status.FAILED
            },
            job=layout.job,
            fingerprint=layout.fingerprint,
            facts=layout.facts,
            path=path,
        )

    def problems(self) -> list[Problem]:
        """Every contradiction; none if the file is sound."""
        nothing = np.empty(0, np.int64)
        # In this order, since a writer may be at work: it writes in the opposite one.
        promised = self.array("state/totals")
        status = self.array("status")
        problems = []
        if not self._layout.is_as_written(self._storage):
            text = "its HDF5 structure is not as it was written, which does not concern the points"
            problems.append(Problem(text, nothing, concerns_points=False))
        settled = status != Status.PENDING
        wrong = np.flatnonzero(settled & ~self.vouched(status))
        if len(wrong):
            problems.append(Problem(f"{len(wrong):,} points do not match their checksums", wrong))
        lost = np.subtract(promised, _totals(status)).max()
        if lost > 0:
            unmarked = np.flatnonzero(~np.isin(status, DONE))
            text = f"{lost:,} points that had been recorded are not marked so any more"
            problems.append(Problem(text, unmarked[self.complete(status)[unmarked]]))
        reasons = self.failures()
        table = self.array("failures/point")
        named = set(table[table >= 0].tolist()) & set(np.flatnonzero(status == Status.FAILED).tolist())
        unreadable = np.array(sorted(named - reasons.keys()), np.int64)
        if len(unreadable):
            problems.append(Problem(f"{len(unreadable):,} reasons of failed points are damaged", unreadable))
        return problems

    def complete(self, status: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which points' values are whole, whatever their status says: it is written last, and can be lost."""
        found = np.zeros(len(status), bool)
        for kind in DONE:
            found |= self.vouched(np.full(len(status), kind, np.uint8))
        return found

    def _failed_checksums(self, points: Points) -> NDArray[np.uint32]:
        """A failed point has no values, whatever may stand in their places."""
        none = np.full((len(points), len(self._layout.columns)), np.nan)
        return checksums(
            points, none, np.full(len(points), np.nan), np.full(len(points), Status.FAILED, np.uint8)
        )


def _totals(status: NDArray[np.uint8]) -> tuple[int, int]:
    return int(np.count_nonzero(status == Status.EVALUATED)), int(np.count_nonzero(status))


def _reason_checksum(point: int, reason: bytes) -> int:
    return zlib.crc32(reason, zlib.crc32(point.to_bytes(8, "little", signed=True)))
