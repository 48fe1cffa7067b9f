"""Values that others have computed: taken into a surface file where this job's own evaluation agrees with them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distsurf.errors import InputError
from distsurf.evaluator import Column, Evaluator
from distsurf.grid import Grid
from distsurf.surface import DONE, Status, SurfaceFile
from distsurf.surface.formats import read_li2018

CHECKED = 5
"""Points at which values are compared."""
ALIKE = 1e-3
"""Relative difference that losses may have: other kernels, batches and precisions round otherwise."""


class Known:
    """The points of a surface of Li et al.'s public code, for a job with the same weights, directions and data."""

    def __init__(self, path: Path):
        """Raises InputError for what is no such surface."""
        self._path = path
        self._surface = read_li2018(path)

    def require_agreement(self, evaluator: Evaluator, grid: Grid) -> None:
        """Compare a few of the known losses with those that the ``evaluator`` finds.

        Raises InputError where they differ, or the other surface has another grid or lacks a column.
        """
        if self._surface.grid != grid:
            raise InputError(f"{self._path} has the grid {self._surface.grid}, the job {grid}")
        known = self._values(evaluator.columns)
        points = self._points()
        if not len(points):
            raise InputError(f"{self._path} has no value yet: there is nothing to take")
        # Coarse-to-fine: the first are corners; the last lies anywhere within.
        chosen = points[np.unique(np.r_[np.arange(min(CHECKED - 1, len(points))), len(points) - 1])]
        found = evaluator(grid.coordinates(chosen))
        for point, row in zip(chosen.tolist(), found, strict=True):
            for column, ours in zip(evaluator.columns, row.tolist(), strict=True):
                theirs = float(known[column.name][point])
                if not column.unit and not np.isclose(ours, theirs, rtol=ALIKE, atol=0, equal_nan=True):
                    at = ", ".join(f"{c:g}" for c in grid.coordinates_of(point))
                    raise InputError(
                        f"{self._path} belongs to other weights, directions or data: {column.name} at ({at}) is "
                        f"{theirs:.6g} there and {ours:.6g} here; nothing was taken"
                    )

    def record(self, file: SurfaceFile) -> int:
        """Bring the known values of points that are pending into a job's file; returns how many."""
        known = self._values(file.columns)
        points = self._points()
        points = points[file.status().ravel()[points] == Status.PENDING]
        points = points[np.isin(points, file.points())]
        values = np.stack([known[column.name][points] for column in file.columns], axis=1)
        file.record(points, values, np.full(len(points), np.nan))
        file.commit()
        return len(points)

    @property
    def told(self) -> dict[str, Any]:
        """For the facts of a file."""
        return {"file": self._path.name, "points": len(self._points())}

    def _points(self) -> NDArray[np.int64]:
        order = self._surface.grid.coarse_to_fine()
        return order[np.isin(self._surface.status.ravel()[order], DONE)]

    def _values(self, columns: Iterable[Column]) -> dict[str, NDArray[np.float64]]:
        """The known values of every column of the job's."""
        has = self._surface.values
        found = {c.name: has.get(c.name, has.get(f"train_{c.name}")) for c in columns}
        if lacking := [name for name, values in found.items() if values is None]:
            raise InputError(
                f"{self._path} has {', '.join(has)}, and not this job's {', '.join(lacking)}: leave them out "
                "(data.splits, objective.metrics)"
            )
        return {name: values.ravel() for name, values in found.items() if values is not None}
