"""What there is to show of a surface at every grid point: a value, nothing yet, a failure, or a hole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.tri import LinearTriInterpolator, Triangulation
from numpy.typing import NDArray

from distsurf.errors import InputError
from distsurf.grid import Axis
from distsurf.surface.surface import Column, Status, Surface
from distsurf.view import style

LONGEST_LABEL = 36
"""Characters of an axis label that come from names."""
VISIBLE = 0.01
"""Share of the range from which on an error of the precision is mentioned."""
SPLITS = ("train", "test", "val", "valid", "validation")


@dataclass(frozen=True)
class Points:
    """One column of a surface, every array of the grid's shape."""

    values: NDArray[np.float64]
    """Finite values; NaN wherever there is none."""
    pending: NDArray[np.bool_]
    failed: NDArray[np.bool_]
    nonfinite: NDArray[np.bool_]
    """Honest results that are NaN or infinite."""

    @classmethod
    def of(cls, surface: Surface, column: Column) -> Points:
        """Sort the points of a column by what they show."""
        values = surface.values[column.name]
        known = (surface.status == Status.EVALUATED) | (surface.status == Status.INTERPOLATED)
        finite = np.isfinite(values)
        return cls(
            values=np.where(known & finite, values, np.nan),
            pending=surface.status == Status.PENDING,
            failed=surface.status == Status.FAILED,
            nonfinite=known & ~finite,
        )

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Where there is a value to draw."""
        return np.isfinite(self.values)


def pick(surface: Surface, name: str) -> Column:
    """The column that ``name`` means.

    ``"loss"`` is every drawing's default, so on a surface without that column it stands for the first loss
    there is, or else the first column. Raises InputError for any other name that the surface does not have.
    """
    try:
        return surface.column(name)
    except InputError:
        if name != "loss" or not surface.columns:
            raise
    return next((c for c in surface.columns if c.name.endswith("loss")), surface.columns[0])


def axes_of(surface: Surface, kind: str) -> tuple[Axis, ...]:
    """The grid's axes; raises InputError where a ``kind`` of picture does not fit them."""
    axes = surface.grid.axes
    fitting = fitting_kinds(surface)
    if kind not in fitting:
        repeated = ", of which the last counts repetitions" if surface.grid.repeated else ""
        single = ", or draw one of them: --repeat NUMBER" if surface.grid.repeated else ""
        raise InputError(
            f"a picture of kind {kind} does not fit a grid of {len(axes)} axes{repeated}: use "
            f"{' or '.join(fitting)}{single}"
        )
    return axes


def fitting_kinds(surface: Surface) -> tuple[str, ...]:
    """The kinds of pictures that a surface's grid allows, the usual one first."""
    grid = surface.grid
    if len(grid.once.axes) == 1:
        return ("curves",)
    return ("contour", "surface") if len(grid.axes) == 2 else ("slices",)


def axis_label(surface: Surface, axis: int, most: int = LONGEST_LABEL) -> str:
    """The label of an axis: a component of a trajectory, what it leads along, or "direction 1 (x)".

    Of names, ``most`` characters are shown.
    """
    trajectory, leading = surface.facts.get("trajectory"), surface.facts.get("axes")
    explained = trajectory.get("explained") if isinstance(trajectory, dict) else None
    if surface.trajectory is not None and isinstance(explained, list) and len(explained) == 2:
        share = explained[axis]
        if isinstance(share, float):
            return f"component {axis + 1} ({share:.1%} of the variance)"
    told = leading[axis] if isinstance(leading, list) and axis < len(leading) else ""
    if told and isinstance(told, str):
        short = told if len(told) <= most else f"{told[: most - 1]}…"
        return f"{style.escaped(short)} ({surface.grid.names[axis]})"
    return style.direction(axis)


def span(axis: Axis) -> tuple[float, float]:
    """From where to where an axis is drawn: its ends; a single point gets a cell of length one."""
    return (axis.low, axis.high) if axis.count > 1 else (axis.low - 0.5, axis.high + 0.5)


def edges(axis: Axis) -> NDArray[np.float64]:
    """Boundaries ``(count + 1,)`` of the cells around an axis' points, the outer ones at its ends."""
    low, high = span(axis)
    return np.r_[low, (axis.values[1:] + axis.values[:-1]) / 2, high]


def split_of(column: Column) -> tuple[str, str]:
    """``("train", "loss")`` for ``train_loss``; ``("", name)`` for a column that belongs to no split."""
    split, separator, quantity = column.name.partition("_")
    return (split, quantity) if separator and split in SPLITS and quantity else ("", column.name)


def is_share(column: Column) -> bool:
    """Whether a column is bounded at both ends, so that it is never drawn on a logarithmic scale unasked."""
    return is_accuracy(column) or column.unit == "%"


def is_accuracy(column: Column) -> bool:
    """Whether a column is an accuracy, by its name: large values are then the good ones."""
    return split_of(column)[1].lower().endswith(("accuracy", "acc"))


def best(surface: Surface, column: Column, points: Points) -> tuple[str, float, tuple[float, ...]] | None:
    """("minimum", value, coordinates x, y, …) of a column; the maximum of an accuracy; None where all are equal."""
    finite = points.values[points.finite]
    if not finite.size or finite.min() == finite.max():
        return None
    name, find = ("maximum", np.nanargmax) if is_accuracy(column) else ("minimum", np.nanargmin)
    index = int(find(points.values))
    if surface.origin is not None and points.values[surface.origin] == points.values.flat[index]:
        index = int(np.ravel_multi_index(surface.origin, points.values.shape))  # of several, the model itself
    coordinates = surface.grid.coordinates(np.array([index]))[0]
    return name, float(points.values.flat[index]), tuple(float(c) for c in coordinates)


def progress(surface: Surface) -> str:
    """How far the evaluation came, such as "1,200 of 2,601 points evaluated, 3 failed"; "" where all were."""
    counts = {status: surface.count(status) for status in Status}
    if counts[Status.EVALUATED] == surface.grid.size:
        return ""
    text = f"{counts[Status.EVALUATED]:,} of {surface.grid.size:,} points evaluated"
    if counts[Status.INTERPOLATED]:
        text += f", {counts[Status.INTERPOLATED]:,} interpolated"
    if counts[Status.FAILED]:
        text += f", {counts[Status.FAILED]:,} failed"
    return text


def imprecision(surface: Surface, column: Column, log: bool = False) -> float:
    """By how much of the range the precision of the evaluation is off; 0 where it cannot be seen, or is not known.

    The range is that of the drawn quantity, the error the largest at the sampled points that the file tells of.
    """
    pairs = _pairs(surface, column.name)
    if _overflows(pairs):
        return np.inf
    values = surface[column.name]
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            pairs, values = np.log(pairs), np.log(values)
    pairs, values = pairs[np.isfinite(pairs).all(axis=1)], values[np.isfinite(values)]
    if not (len(pairs) and values.size):
        return 0.0
    worst, length = float(np.abs(pairs[:, 1] - pairs[:, 0]).max()), float(np.ptp(values))
    if not worst > VISIBLE * length:
        return 0.0
    return worst / length if length > 0 else np.inf


def _pairs(surface: Surface, name: str) -> NDArray[np.float64]:
    """What a column is in float64 and as it was computed ``(P, 2)``, at the sampled points."""
    try:
        errors = surface.facts["evaluation"]["errors"]
        return np.array([error["values"][name] for error in errors], float).reshape(-1, 2)
    except (KeyError, TypeError, ValueError):  # a file by a stranger
        return np.empty((0, 2))


def _overflows(pairs: NDArray[np.float64]) -> bool:
    """Whether there is a value that is finite in float64 and not as it was computed."""
    return bool((np.isfinite(pairs[:, 0]) & ~np.isfinite(pairs[:, 1])).any())


def imprecision_in_words(surface: Surface, columns: Iterable[Column], log: bool = False) -> str:
    """Which of the columns is off by how much because of the precision, the worst of them; "" where none is."""
    shares = {column.name: imprecision(surface, column, log) for column in columns}
    worst = max(shares, key=lambda name: shares[name], default="")
    if not shares.get(worst):
        return ""
    share = f"up to {shares[worst]:.1%} of the range" if np.isfinite(shares[worst]) else "more than its range"
    precision = surface.facts["evaluation"].get("precision")
    if np.isposinf(shares[worst]) and _overflows(_pairs(surface, worst)):
        return f"{precision}: {worst} is not finite where float64 is"
    return f"{precision}: {worst} is off by {share}"


def remarks(surface: Surface, columns: Iterable[Column], log: bool = False) -> str:
    """What a reader of a picture has to know: how far the evaluation came, and a precision that can be seen."""
    return "; ".join(filter(None, (progress(surface), imprecision_in_words(surface, columns, log))))


def fill(points: Points, drawn: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
    """Values to draw ``[y, x]`` or ``[z, y, x]``, in the units that ``drawn`` turns values into.

    Pending points are interpolated, for display, within their plane: linearly between the points there are,
    outside those the nearest one. A pending point whose nearest visited point failed or is not finite stays
    NaN, as do those points themselves: a hole in the surface is never bridged.
    """
    shown = drawn(points.values)
    if not points.pending.any() or points.pending.all():
        return shown
    filled = shown.ravel()[_nearest(points.pending)]
    if filled.ndim == 1:
        return filled
    planes = filled.reshape(-1, *filled.shape[-2:])
    for plane, values in zip(planes, shown.reshape(planes.shape), strict=True):
        between = _linear(values)
        inside = np.isnan(values) & np.isfinite(plane) & np.isfinite(between)
        plane[inside] = between[inside]
    return filled


def _nearest(pending: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The index of a visited point nearest to each point, found by spreading from the visited ones."""
    source = np.where(pending, -1, np.arange(pending.size).reshape(pending.shape))
    while (source < 0).any():
        for axis in range(source.ndim):
            along = np.moveaxis(source, axis, 0)
            along[1:] = np.where(along[1:] < 0, along[:-1], along[1:])
            along[:-1] = np.where(along[:-1] < 0, along[1:], along[:-1])
    return source


def _linear(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Piecewise linear interpolation ``(ny, nx)`` of the finite values; NaN outside of their convex hull."""
    at = np.argwhere(np.isfinite(values))
    from_first = at[1:] - at[:1]
    # Of fewer than three points, or points on one line, there is no triangle to interpolate in.
    if not (from_first[:, 0] * from_first[:1, 1] != from_first[:, 1] * from_first[:1, 0]).any():
        return np.full(values.shape, np.nan)
    # Not scipy's, whose many small LAPACK calls took 5 s instead of 5 ms on a machine with busy cores.
    triangles = Triangulation(*at.T[::-1].astype(np.float64))
    rows, columns = np.indices(values.shape)
    return LinearTriInterpolator(triangles, values[tuple(at.T)])(columns, rows).filled(np.nan)
