"""Coordinate grids: one to three axes, their points, and the order in which points are visited.

A grid point has one number, its *index*: the position in the row-major ravel of the stored array. Arrays are
stored ``[z, y, x]`` (matplotlib's order), so index 0 is the corner where every coordinate is smallest and x
changes fastest. Everything that moves points around (plans, shards, the surface file) moves these indices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distsurf.errors import InputError

MOST_POINTS = 100_000_000
AXIS_NAMES = ("x", "y", "z")
REPEAT = "repeat"
"""Name of the axis that numbers independent planes or lines of one model."""


@dataclass(frozen=True)
class Axis:
    """``count`` evenly spaced coordinates from ``low`` to ``high``, both ends included."""

    low: float
    high: float
    count: int

    def __post_init__(self) -> None:
        given = f"axis {self}"
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise InputError(f"{given}: both ends must be finite numbers")
        if self.count < 1:
            raise InputError(f"{given}: the count must be at least 1")
        if self.count == 1 and self.low != self.high:
            raise InputError(
                f"{given}: a single point needs min = max, for example {self.low:g}:{self.low:g}:1"
            )
        if self.count > 1 and self.low >= self.high:
            raise InputError(f"{given}: min must be below max")

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Read ``min:max:count``, for example ``-1:1:51``."""
        parts = text.split(":")
        try:
            low, high, count = float(parts[0]), float(parts[1]), int(parts[2])
            if len(parts) != 3:
                raise ValueError
        except (ValueError, IndexError):
            raise InputError(
                f"axis {text!r} cannot be read: expected min:max:count, for example -1:1:51"
            ) from None
        return cls(low, high, count)

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """Coordinates ``(count,)``, float64.

        Weighted means of the two ends rather than steps from one of them: a symmetric axis then has exactly
        symmetric coordinates, and an exact zero in its middle.
        """
        if self.count == 1:
            return np.array([self.low])
        i = np.arange(self.count)
        last = self.count - 1
        values = (self.low * (last - i) + self.high * i) / last
        values[0], values[-1] = self.low, self.high  # exact, whatever the division rounded to
        return values

    def __str__(self) -> str:
        return f"{_shortest(self.low)}:{_shortest(self.high)}:{self.count}"


@dataclass(frozen=True)
class Grid:
    """The product of one to three axes, given in the order x, y, z; the last may be the number of a repetition."""

    axes: tuple[Axis, ...]
    repeated: bool = False
    """Whether the last axis counts independent planes or lines: 0, 1, 2, …"""

    def __post_init__(self) -> None:
        if not 1 <= len(self.axes) <= len(AXIS_NAMES):
            raise InputError(f"a grid has one to three axes (x, y, z); {len(self.axes)} were given")
        if self.repeated and (len(self.axes) < 2 or self.axes[-1] != _counting(self.axes[-1].count)):
            raise InputError(
                f"the axis {self.axes[-1]} does not count repetitions: expected 0:n-1:n behind others"
            )
        if self.size > MOST_POINTS:
            raise InputError(f"the grid {self} has {self.size:,} points; the most is {MOST_POINTS:,}")

    @classmethod
    def parse(cls, axes: Mapping[str, str | None]) -> Grid:
        """Build from ``{"x": "-1:1:51", "y": …}``; an absent or None axis ends the grid."""
        given = {name: text for name, text in axes.items() if text is not None}
        expected = AXIS_NAMES[: len(given)]
        if set(given) != set(expected):
            raise InputError(
                f"grid axes {', '.join(sorted(given)) or 'none'} were given; "
                "expected x, or x and y, or x, y and z"
            )
        return cls(tuple(Axis.parse(given[name]) for name in expected))

    @property
    def names(self) -> tuple[str, ...]:
        """Axis names in the order of coordinates: ``("x",)``, ``("x", "y")``, ``("x", "y", "repeat")``."""
        names = AXIS_NAMES[: len(self.axes)]
        return (*names[:-1], REPEAT) if self.repeated else names

    def repeat(self, count: int) -> Grid:
        """This grid ``count`` times, along an axis of that name; 1 is the grid itself. Raises InputError."""
        if count == 1:
            return self
        if len(self.axes) == len(AXIS_NAMES):
            raise InputError(f"a grid of {len(self.axes)} axes cannot be repeated: leave out z, or repeat")
        return Grid((*self.axes, _counting(count)), repeated=True)

    @property
    def once(self) -> Grid:
        """The grid of one repetition; a grid that is not repeated itself."""
        return Grid(self.axes[:-1]) if self.repeated else self

    @property
    def repeats(self) -> int:
        """How many repetitions there are; 1 where the grid is not repeated."""
        return self.axes[-1].count if self.repeated else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored arrays: ``(nx,)``, ``(ny, nx)`` or ``(nz, ny, nx)``."""
        return tuple(axis.count for axis in reversed(self.axes))

    @property
    def size(self) -> int:
        """Number of grid points."""
        return math.prod(self.shape)

    def coordinates(self, points: NDArray[np.int64]) -> NDArray[np.float64]:
        """Coordinates ``(P, D)``, float64, columns x, y, z, of the points with indices ``(P,)``."""
        coordinates = np.empty((len(points), len(self.axes)))
        rest = points
        for k, axis in enumerate(self.axes):
            rest, position = np.divmod(rest, axis.count)
            coordinates[:, k] = axis.values[position]
        return coordinates

    def coordinates_of(self, point: int) -> tuple[float, ...]:
        """Coordinates x, y, z of one point."""
        return tuple(float(c) for c in self.coordinates(np.array([point]))[0])

    def coarse_to_fine(self) -> NDArray[np.int64]:
        """Every point index once, ``(size,)``, ordered so that any prefix covers the whole grid evenly.

        Axes are bisected: ends first, then the middle, then the middles of the halves; a point's level is that
        of its latest axis, and within a level points go row by row. Repetitions all are at the first level.
        """
        level = np.zeros(1, dtype=np.int16)
        for axis in self.once.axes:  # x last in memory, so it is the first to be broadcast
            level = np.maximum(_bisection_levels(axis.count)[:, None], level[None, :]).ravel()
        level = np.tile(level, self.repeats)
        return np.argsort(level, kind="stable").astype(np.int64)

    def __str__(self) -> str:
        return " ".join(f"{name}={axis}" for name, axis in zip(self.names, self.axes, strict=True))


def _counting(count: int) -> Axis:
    return Axis(0.0, count - 1.0, count)


def _shortest(number: float) -> str:
    """The shortest text that reads back as the same number."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def _bisection_levels(count: int) -> NDArray[np.int16]:
    """At which bisection ``(count,)`` each position of an axis first appears: 0 for the two ends."""
    levels = np.zeros(count, dtype=np.int16)
    intervals = [(0, count - 1)]
    level = 0
    while intervals:
        level += 1
        halves = []
        for low, high in intervals:
            if high - low < 2:
                continue
            middle = (low + high) // 2
            levels[middle] = level
            halves += [(low, middle), (middle, high)]
        intervals = halves
    return levels
