"""A surface in memory: axes, columns of values, the status of every point, and how it was made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distsurf.errors import InputError
from distsurf.evaluator import Column
from distsurf.grid import Grid
from distsurf.shards import ArrayShard, shard_in

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure


class Status(IntEnum):
    """What is known of a grid point. Stored as uint8, written after the values that it vouches for."""

    PENDING = 0
    EVALUATED = 1
    INTERPOLATED = 2
    FAILED = 3


DONE = (Status.EVALUATED, Status.INTERPOLATED)
"""What a point that has a value may be."""


@dataclass(repr=False)
class Surface:
    """Values on a grid.

    ``surface["train_loss"]`` is an array of the grid's shape, ``[y, x]`` for two axes; a name that belongs to
    one split can be given without it where that is unambiguous: ``surface["loss"]`` is ``train_loss`` if there
    is a train split. Points without a value are NaN; ``status`` tells them from honest NaN results.
    """

    grid: Grid
    columns: tuple[Column, ...]
    values: dict[str, NDArray[np.float64]]
    status: NDArray[np.uint8]
    cost: NDArray[np.float64]
    """Seconds that each point took; NaN where it was not evaluated."""
    failures: dict[int, str] = field(default_factory=dict)
    """Why points failed, by point index."""
    job: str = ""
    """The job as TOML text."""
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Versions, device, time of creation and directions' cosine, as recorded in the file."""
    path: Path | None = None
    is_writer: bool = True
    """False on the ranks other than 0, where `save` and `plot` leave the disk alone."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Surface:
        """Read a surface file, finished or not. Raises InputError or DamagedFile."""
        from distsurf.surface.file import SurfaceFile

        with SurfaceFile.open(path) as file:
            return file.read()

    def __repr__(self) -> str:
        """In one line: the name, the grid, how far it is, and the columns."""
        name = self.facts.get("name", "surface")
        return (
            f"<Surface {name}, {self.grid}, {self.done:,} of {self.size:,} points: {', '.join(self.names)}>"
        )

    def column(self, name: str) -> Column:
        """The column that ``name`` means. Raises InputError naming the columns there are."""
        by_name = {column.name: column for column in self.columns}
        for candidate in (name, f"train_{name}"):
            if candidate in by_name:
                return by_name[candidate]
        matches = [column for column in self.columns if column.name.endswith(f"_{name}")]
        if len(matches) == 1:
            return matches[0]
        raise InputError(f"the surface has no column {name!r}; it has {', '.join(by_name)}")

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.values[self.column(name).name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns."""
        return tuple(column.name for column in self.columns)

    @property
    def x(self) -> NDArray[np.float64]:
        """Coordinates along the first axis."""
        return self.grid.axes[0].values

    @property
    def y(self) -> NDArray[np.float64]:
        """Coordinates along the second axis. Raises InputError if there is none."""
        if len(self.grid.axes) < 2:
            raise InputError("a surface with one axis has no y")
        return self.grid.axes[1].values

    def count(self, status: Status) -> int:
        """Number of points with this status."""
        return int(np.count_nonzero(self.status == status))

    @property
    def shard(self) -> ArrayShard | None:
        """The shard whose points these are; None for all points."""
        return shard_in(self.facts)

    @property
    def size(self) -> int:
        """Number of points that are to have values: those of the grid, or of the shard."""
        return self.grid.size if self.shard is None else len(self.shard.points(self.grid))

    @property
    def done(self) -> int:
        """Number of points that have a value."""
        return int(np.isin(self.status, DONE).sum())

    @property
    def missing(self) -> NDArray[np.int64]:
        """Indices, coarse-to-fine, of the points that are to have values and have none."""
        points = self.grid.coarse_to_fine() if self.shard is None else self.shard.points(self.grid)
        return points[~np.isin(self.status.ravel()[points], DONE)]

    @property
    def complete(self) -> bool:
        """Whether every point that is to have a value has one, evaluated or interpolated."""
        return len(self.missing) == 0

    def minimum(self, name: str = "loss") -> tuple[float, tuple[float, ...]] | None:
        """Smallest finite value of a column and its coordinates (x, y, …); None where nothing is finite."""
        values = self[name].ravel()
        finite = np.isfinite(values)
        if not finite.any():
            return None
        point = int(np.argmin(np.where(finite, values, np.inf)))
        return float(values[point]), self.grid.coordinates_of(point)

    @property
    def origin(self) -> tuple[int, ...] | None:
        """Position in the arrays of the point where all coordinates are zero: the model itself. None if absent."""
        position = []
        for axis in reversed(self.grid.axes):
            found = np.flatnonzero(axis.values == 0)
            if not found.size:
                return None
            position.append(int(found[0]))
        return tuple(position)

    def repeat(self, number: int) -> Surface:
        """One of the planes (or lines) of a surface that is repeated, from 0 on, as a surface of its own.

        Raises InputError where there is none of this number.
        """
        grid, count = self.grid.once, self.grid.repeats
        if not 0 <= number < count:
            raise InputError(f"repetition {number}: the surface has {count}, numbered from 0")
        first = number * grid.size
        here = number if self.grid.repeated else slice(None)
        return replace(
            self,
            grid=grid,
            values={name: values[here] for name, values in self.values.items()},
            status=self.status[here],
            cost=self.cost[here],
            failures={p - first: why for p, why in self.failures.items() if 0 <= p - first < grid.size},
            facts={name: fact for name, fact in self.facts.items() if name not in ("shard", "cosines")},
            path=None,
        )

    def across_repeats(self, name: str = "loss") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation (of a sample: n − 1) of a column over all repetitions, each of one's shape.

        NaN where a value is missing or not finite. Raises InputError for a surface that is not repeated.
        """
        if not self.grid.repeated:
            raise InputError("the surface is not repeated; directions.repeat = n evaluates n planes")
        values = self[name]
        known = (np.isin(self.status, DONE) & np.isfinite(values)).all(axis=0)
        whole = np.where(known, values, np.nan)
        return whole.mean(axis=0), whole.std(axis=0, ddof=1)

    def average_sharpness(self, name: str = "loss") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean rise of a column over the model, per coordinate ``(nx,)``, and the standard error of that mean.

        Average-case sharpness, E L(w + δ) − L(w) (Andriushchenko et al. 2023, equation 1), of a line along random
        directions that is repeated: δ is a Gaussian vector times the coordinate, which is the radius ρ; normalized as
        the job says. NaN where a value is missing or not finite. Raises InputError for another surface.
        """
        if not self.grid.repeated or len(self.grid.axes) != 2 or self.origin is None:
            raise InputError(
                "average-case sharpness is that of repeated lines through the model: one axis, with 0 on it, and "
                "directions.repeat = n"
            )
        mean, spread = self.across_repeats(name)
        return mean - mean[self.origin[1]], spread / math.sqrt(self.grid.repeats)

    @property
    def models(self) -> list[tuple[str, tuple[float, ...]]]:
        """Models whose place is known, by name, with their coordinates x, y, …; the first is at the origin.

        Of a surface that is repeated, they lie there in every plane.
        """
        found = []
        dimension = len(self.grid.once.axes)
        told = self.facts.get("models")
        for one in told if isinstance(told, list) else []:  # facts may be a stranger's, and anything
            with suppress(TypeError, ValueError, KeyError):
                at = tuple(float(c) for c in one["at"])
                if len(at) == dimension and all(map(math.isfinite, at)):
                    found.append((str(one["name"]), at))
        return found or [("trained model", (0.0,) * dimension)]

    @property
    def trajectory(self) -> NDArray[np.float64] | None:
        """Coordinates ``(T, 2)`` of a training's checkpoints, in their order; None if this is no plane of one."""
        try:
            path = np.array(self.facts["trajectory"]["coordinates"], float)
        except (TypeError, KeyError, ValueError):  # facts may be a stranger's, and anything
            return None
        return (
            path
            if path.ndim == 2 and path.shape[1] == len(self.grid.axes) == 2 and np.isfinite(path).all()
            else None
        )

    def barrier(self, name: str = "loss") -> float | None:
        """The largest rise of a column above the mean of its ends on the segment between two models.

        max over λ in [0, 1] of L(θ_λ) − ½(L(θ_0) + L(θ_1)), on the grid's points (Frankle et al. 2020, section 2). Of
        an accuracy it is the largest fall below that mean. None where the surface is no such segment, or is not
        complete there; NaN where a value on it is.
        """
        if len(self.grid.axes) != 1 or len(self.models) != 2 or self.models[1][1] != (1.0,):
            return None
        x = self.x
        on_it = (x >= 0) & (x <= 1)
        if not ({0.0, 1.0} <= set(x.tolist()) and np.isin(self.status[on_it], DONE).all()):
            return None
        sign = -1 if self.column(name).name.endswith(("accuracy", "acc")) else 1
        values = sign * self[name][on_it]
        return float(values.max() - (values[0] + values[-1]) / 2)

    def to_xarray(self) -> xarray.Dataset:
        """A labelled dataset with one variable per column, and ``status``. Needs the extra ``xarray``."""
        import xarray

        dims = self.grid.names[::-1]
        return xarray.Dataset(
            {column.name: (dims, self[column.name], {"units": column.unit}) for column in self.columns}
            | {"status": (dims, self.status), "cost": (dims, self.cost, {"units": "s"})},
            coords={name: axis.values for name, axis in zip(self.grid.names, self.grid.axes, strict=True)},
            attrs={"job": self.job},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a surface file under a temporary name, then rename it. Does nothing on ranks other than 0."""
        if not self.is_writer:
            return
        from distsurf.surface.file import SurfaceFile

        SurfaceFile.write(Path(path), self)

    def plot(
        self, column: str = "loss", path: str | os.PathLike[str] | None = None, **options: Any
    ) -> Figure:
        """Draw the picture that fits the number of axes; with ``path`` also save it (on rank 0 only)."""
        from distsurf.view import plot

        return plot(self, column, path=path if self.is_writer else None, **options)
