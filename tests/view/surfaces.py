"""Surfaces with closed-form values for the tests of the drawings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from distsurf.grid import Axis, Grid
from distsurf.surface.surface import Column, Status, Surface

Floats = NDArray[np.float64]

BOTH = {"train_loss": "", "test_loss": "", "train_accuracy": "%", "test_accuracy": "%"}


def surface_of(
    function: Callable[..., Floats | float],
    *axes: tuple[float, float, int],
    columns: dict[str, str] | None = None,
    evaluated: float = 1.0,
    repeats: int = 1,
) -> Surface:
    """A surface of ``function(x, y, …)`` in every column, of which a fraction is evaluated coarse to fine.

    With several ``repeats`` their number is the function's last argument.
    """
    grid = Grid(tuple(Axis(*axis) for axis in axes)).repeat(repeats)
    order = grid.coarse_to_fine()
    done = order[: round(evaluated * grid.size)]
    values = np.full(grid.size, np.nan)
    values[done] = function(*grid.coordinates(done).T)
    status = np.full(grid.size, Status.PENDING, dtype=np.uint8)
    status[done] = Status.EVALUATED
    named = tuple(Column(name, unit) for name, unit in (columns or {"train_loss": ""}).items())
    return Surface(
        grid=grid,
        columns=named,
        values={column.name: values.reshape(grid.shape).copy() for column in named},
        status=status.reshape(grid.shape),
        cost=np.where(status == Status.EVALUATED, 0.1, np.nan).reshape(grid.shape),
    )


def fail(surface: Surface, *points: tuple[int, ...]) -> Surface:
    """Mark the points at these array positions as failed, without values."""
    for point in points:
        surface.status[point] = Status.FAILED
        for values in surface.values.values():
            values[point] = np.nan
    return surface


def bowl(x: Floats, y: Floats) -> Floats:
    """A quadratic with its minimum 0.05 at (0.12, -0.2), a point of the grids in use."""
    return 0.05 + 3 * (x - 0.12) ** 2 + 1.5 * (y + 0.2) ** 2


def valley(x: Floats, y: Floats) -> Floats:
    """Rosenbrock's function, minimum 0.001 at (1, 1)."""
    return 0.001 + (1 - x) ** 2 + 100 * (y - x**2) ** 2


def chaos(x: Floats, y: Floats) -> Floats:
    """Many local extremes, values of either sign."""
    waves = np.sin(9 * x + 4 * y * y) + 1.2 * np.cos(11 * y - 3 * x) + 0.8 * np.sin(20 * x * y)
    return waves + 3 * (x * x + y * y)


def decades(x: Floats, y: Floats) -> Floats:
    """From 0.001 to 1000, evenly in log."""
    return 10.0 ** (1.5 * (x + y))


def holed(x: Floats, y: Floats) -> Floats:
    """The bowl, NaN within 0.3 of (0.5, 0.5), infinite in the corner of small x and y."""
    values = np.where((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.09, np.nan, bowl(x, y))
    return np.where(x + y < -1.9, np.inf, values)


def spiked(x: Floats, y: Floats) -> Floats:
    """Chaos with a few values of a million."""
    return np.where((np.abs(x - 0.6) < 0.05) & (np.abs(y) < 0.05), 1e6, chaos(x, y))


def basin(x: Floats) -> Floats:
    """A curve with its minimum 0.02 at 0."""
    return 0.02 + 2.5 * x**2 + 0.3 * np.sin(3 * x) ** 2


def stretched(x: Floats, repeat: Floats) -> Floats:
    """The curve, wider from repetition to repetition."""
    return basin(x / (1 + 0.2 * repeat))


def rotated(x: Floats, y: Floats, repeat: Floats) -> Floats:
    """A quadratic with its minimum 0.05 at the origin, turned from repetition to repetition."""
    angle = repeat * 0.5
    across, along = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return 0.05 + 3 * across**2 + along**2


SQUARE = ((-1, 1, 51), (-1, 1, 51))

PLANES: dict[str, Callable[[], Surface]] = {
    "bowl": lambda: surface_of(bowl, *SQUARE),
    "valley, not square": lambda: surface_of(valley, (-2, 2, 41), (-1, 3, 33)),
    "chaos": lambda: surface_of(chaos, *SQUARE),
    "decades": lambda: surface_of(decades, *SQUARE),
    "spans apart": lambda: surface_of(lambda x, y: bowl(x / 10, y), (-10, 10, 21), (0, 0.5, 11)),
    "holes and failures": lambda: fail(surface_of(holed, *SQUARE), (40, 5), (40, 6), (0, 50)),
    "unfinished holes": lambda: surface_of(holed, *SQUARE, evaluated=0.3),
    "spikes": lambda: surface_of(spiked, *SQUARE),
    "negative": lambda: surface_of(lambda x, y: -5 - bowl(x, y), *SQUARE),
    "constant": lambda: surface_of(lambda x, y: 2.302585, *SQUARE),
    "nothing finite": lambda: surface_of(lambda x, y: np.nan, *SQUARE),
    "all pending": lambda: surface_of(bowl, *SQUARE, evaluated=0),
    "one evaluated": lambda: surface_of(bowl, *SQUARE, evaluated=1 / 2601),
    "a corner row": lambda: surface_of(bowl, *SQUARE, evaluated=3 / 2601),
    "one column": lambda: surface_of(bowl, (0, 0, 1), (-1, 1, 9)),
    "one row": lambda: surface_of(bowl, (-1, 1, 9), (0.5, 0.5, 1), evaluated=0.5),
    "one point": lambda: surface_of(bowl, (0, 0, 1), (0, 0, 1)),
    "two by two": lambda: surface_of(bowl, (-1, 1, 2), (0, 1, 2)),
    "tiny": lambda: surface_of(lambda x, y: 1e-30 * bowl(x, y), *SQUARE),
    "huge": lambda: surface_of(lambda x, y: 1e300 * decades(x, y), *SQUARE),
}

LINES: dict[str, Callable[[], Surface]] = {
    "losses and accuracies": lambda: surface_of(basin, (-1, 1, 51), columns=BOTH),
    "loss alone": lambda: surface_of(basin, (-0.5, 1.5, 41)),
    "own columns": lambda: surface_of(basin, (-1, 1, 21), columns={"eig_max": "", "a$b_{": "s"}),
    "holes": lambda: fail(
        surface_of(lambda x: np.where(np.abs(x - 0.5) < 0.1, np.nan, basin(x)), (-1, 1, 51), columns=BOTH),
        (3,),
    ),
    "alternating": lambda: surface_of(lambda x: np.where(np.arange(len(x)) % 2, np.nan, x), (1, 2, 9)),
    "half done": lambda: surface_of(basin, (-1, 1, 51), columns=BOTH, evaluated=0.5),
    "all pending": lambda: surface_of(basin, (-1, 1, 51), columns=BOTH, evaluated=0),
    "nothing finite": lambda: surface_of(lambda x: np.inf, (-1, 1, 51)),
    "constant": lambda: surface_of(lambda x: -3.0, (-1, 1, 51)),
    "one point": lambda: surface_of(basin, (0, 0, 1)),
    "repeated": lambda: surface_of(stretched, (-1, 1, 51), columns=BOTH, repeats=8),
    "repeated, half done": lambda: fail(
        surface_of(stretched, (-1, 1, 51), columns=BOTH, evaluated=0.5, repeats=8), (3, 0), (4, 2)
    ),
    "spikes": lambda: surface_of(lambda x: np.where(np.abs(x) > 0.99, 1e9, 3 + x), (-1, 1, 201)),
}

CUBES: dict[str, Callable[[], Surface]] = {
    "bowl": lambda: surface_of(lambda x, y, z: bowl(x, y) + z**2, (-1, 1, 11), (-1, 1, 13), (-1, 1, 9)),
    "half done": lambda: surface_of(
        lambda x, y, z: bowl(x, y) + z**2, (-1, 1, 11), (-1, 1, 13), (-1, 1, 4), evaluated=0.3
    ),
    "holes": lambda: fail(
        surface_of(lambda x, y, z: holed(x, y) + z, (-1, 1, 11), (-1, 1, 11), (0, 1, 3)), (2, 4, 4)
    ),
    "all pending": lambda: surface_of(lambda x, y, z: x, (-1, 1, 5), (-1, 1, 5), (-1, 1, 2), evaluated=0),
    "repeated": lambda: surface_of(rotated, (-1, 1, 21), (-1, 1, 17), repeats=7),
    "repeated, half done": lambda: fail(
        surface_of(rotated, (-1, 1, 21), (-1, 1, 17), evaluated=0.4, repeats=12), (2, 0, 0)
    ),
    "repeated, all pending": lambda: surface_of(rotated, (-1, 1, 5), (-1, 1, 5), evaluated=0, repeats=2),
    "flat": lambda: surface_of(lambda x, y, z: x + z, (-1, 1, 5), (0, 0, 1), (-1, 1, 2)),
    "one point": lambda: surface_of(lambda x, y, z: 1.0, (0, 0, 1), (0, 0, 1), (0, 0, 1)),
}
