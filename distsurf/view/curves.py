"""Curves along one direction: losses on the left, accuracies on the right, as in Li et al. 2018, figure 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from distsurf.errors import InputError
from distsurf.grid import Axis
from distsurf.surface.surface import Column, Status, Surface
from distsurf.view import style
from distsurf.view.points import (
    Points,
    axes_of,
    axis_label,
    edges,
    is_accuracy,
    is_share,
    pick,
    remarks,
    split_of,
)
from distsurf.view.scale import choose

LEFT = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RIGHT = ("#D55E00", "#882255", "#AA4499")
"""Colours of quantities on either axis (Okabe and Ito, and Tol: told apart by colour-blind readers)."""
DASHES = {"": "-", "train": "-", "test": (0, (4, 1.5))}
MODELS: tuple[Any, ...] = (":", "-.", (0, (1, 4)))
"""Lines at models: at the one at the origin, and at others."""
FAINT = 4.0
"""Opacity of all repetitions of a line together."""
OTHER_DASHES = (0, (5, 1.2, 1.2, 1.2))


def curves(
    surface: Surface,
    columns: str | Sequence[str] | None = None,
    *,
    log: bool | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Columns of a surface with one axis against its coordinate; the models on it marked.

    Where the line is repeated, every one is drawn thin, their mean thick, and around it one standard deviation.

    A name without its split means every split: ``"loss"`` draws train (solid) and test (dashed). None draws
    losses and accuracies, or every column where there are neither. ``log`` is for the left axis and replaces
    the rule of `distsurf.view.scale`; ``size`` is in inches. Pending points are passed over; a curve is
    broken where a result is not finite. Raises InputError for a surface of another dimension and an
    unknown column.
    """
    x, *_ = axes_of(surface, "curves")
    shown = _chosen(surface, columns)
    right = [column for column in shown if is_share(column)]
    left = [column for column in shown if not is_share(column)]
    if not left:
        left, right = right, []
    points = {column: Points.of(surface, column) for column in shown}
    with style.drawing():
        figure = style.new_figure(size, 0.72 * style.WIDTH)
        axes = figure.add_subplot()
        handles = _draw(axes, x, left, points, LEFT)
        _scale_left(axes, [points[column] for column in left], log, bounded=all(map(is_share, left)))
        sides: list[tuple[Axes, list[Column], Sequence[str]]] = [(axes, left, LEFT)]
        if right:
            twin = axes.twinx()
            handles += _draw(twin, x, right, points, RIGHT)
            sides.append((twin, right, RIGHT))
        for side, there, colours in sides:
            common = _common(there)
            label = style.wrapped(common or "value", 0.8 * figure.get_figheight())
            side.set_ylabel(label, parse_math=False)
            if common and right:
                side.tick_params(axis="y", which="both", colors=colours[0])
                side.yaxis.label.set_color(colours[0])
        for (name, (at,)), dashes in zip(surface.models, MODELS, strict=False):
            if x.low <= at <= x.high:
                look = {"color": style.GREY, "lw": 0.7, "zorder": 0.5, "ls": dashes}
                handles.append(axes.axvline(at, label=style.escaped(name), **look))
        if surface.grid.repeated:
            label = f"mean of {surface.grid.repeats} ± standard deviation"
            handles.append(Patch(facecolor=style.GREY, alpha=0.3, label=label))
        handles += _holes(axes, x, list(points.values()))
        if not any(p.finite.any() for p in points.values()):
            style.nothing(axes, surface.count(Status.PENDING) < surface.grid.size)
        if x.count > 1:
            axes.set_xlim(x.low, x.high)
        style.few_ticks(axes.xaxis, x)
        axes.set_xlabel(axis_label(surface, 0))
        style.heading(figure, axes, title, remarks(surface, shown, axes.get_yscale() == "log"))
        style.caption(figure, handles)
        style.finish(figure)
    return figure


def _chosen(surface: Surface, names: str | Sequence[str] | None) -> list[Column]:
    if names is None:
        usual = [c for c in surface.columns if c.name.endswith("loss") or is_accuracy(c)]
        return usual or list(surface.columns)
    chosen: list[Column] = []
    for name in [names] if isinstance(names, str) else names:
        splits = [c for c in surface.columns if name in (c.name, split_of(c)[1])]
        chosen += [c for c in splits or [pick(surface, name)] if c not in chosen]
    if not chosen:
        raise InputError(f"no column to draw was named; the surface has {', '.join(surface.names)}")
    return chosen


def _quantities(columns: Sequence[Column]) -> list[str]:
    """The different quantities among columns, their splits apart, in order."""
    return list(dict.fromkeys(split_of(column)[1] for column in columns))


def _common(columns: Sequence[Column]) -> str | None:
    """The quantity that columns of several splits share, with its unit; None where they differ."""
    if len(_quantities(columns)) > 1 or len({column.unit for column in columns}) > 1:
        return None
    return style.quantity(Column(split_of(columns[0])[1], columns[0].unit))


def _draw(
    axes: Axes, x: Axis, columns: Sequence[Column], points: dict[Column, Points], colours: Sequence[str]
) -> list[Artist]:
    """Draw columns on one axis. Returns what the legend is to show."""
    quantities = _quantities(columns)
    common = _common(columns)
    handles: list[Artist] = []
    for column in columns:
        split, name = split_of(column)
        label = style.escaped(style.quantity(Column(column.name) if common else column))
        look = {
            "color": colours[quantities.index(name) % len(colours)],
            "ls": DASHES.get(split, OTHER_DASHES),
            "zorder": 3,
        }
        each = points[column]
        if each.values.ndim == 1:
            handles.append(_line(axes, x, each.values, each.pending, {**look, "label": label}))
            continue
        faint = {**look, "lw": 0.5, "alpha": min(0.4, FAINT / len(each.values)), "zorder": 2}
        for values, pending in zip(each.values, each.pending, strict=True):
            _line(axes, x, values, pending, faint)
        mean, spread = each.values.mean(axis=0), each.values.std(axis=0, ddof=1)
        # No lower than any of them: a mean less a deviation that is larger would leave a logarithmic axis.
        below = np.maximum(mean - spread, each.values.min(axis=0))
        axes.fill_between(x.values, below, mean + spread, color=look["color"], alpha=0.15, lw=0)
        handles.append(
            _line(axes, x, mean, np.any(each.pending, axis=0), {**look, "lw": 1.6, "label": label})
        )
    return handles


def _line(
    axes: Axes, x: Axis, values: NDArray[np.float64], pending: NDArray[np.bool_], look: dict[str, Any]
) -> Artist:
    """One curve: pending points are passed over, and it is broken where a value is not finite."""
    at, values = x.values[~pending], values[~pending]
    (line,) = axes.plot(at, values, **look)
    # Between two gaps there is no line to see a point by.
    finite = np.isfinite(values)
    alone = finite & ~np.r_[False, finite[:-1]] & ~np.r_[finite[1:], False]
    if alone.any():
        dot = {**look, "marker": ".", "ms": 4, "ls": "none", "clip_on": False, "label": None}
        axes.plot(at[alone], values[alone], **dot)
    return line


def _scale_left(axes: Axes, points: Sequence[Points], log: bool | None, bounded: bool) -> None:
    """Choose linear or logarithmic for all curves of an axis, and cut off huge outliers."""
    values = np.concatenate([p.values for p in points])
    scale = choose(values, bounded=bounded, log=log)
    if scale.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs="all"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(10.0**scale.ticks, labels=scale.texts(scale.ticks))
    ends = 10.0 ** np.array([scale.low, scale.high]) if scale.log else (scale.low, scale.high)
    if scale.extend != "neither":
        axes.set_ylim(*ends)


def _holes(axes: Axes, x: Axis, points: Sequence[Points]) -> list[Artist]:
    """Paint the stretches where a column is not finite and mark failed points; what the legend is to show."""
    handles: list[Artist] = []
    nonfinite = np.logical_or.reduce([p.nonfinite.reshape(-1, x.count).any(axis=0) for p in points])
    if nonfinite.any():
        steps = np.flatnonzero(np.diff(np.r_[False, nonfinite, False]))
        bounds = edges(x)
        for start, stop in steps.reshape(-1, 2):
            axes.axvspan(bounds[start], bounds[stop], zorder=0.2, **style.HOLE)
        handles.append(Patch(**style.HOLE, label=f"not finite ({nonfinite.sum():,})"))
    failed: NDArray[np.bool_] = np.any(points[0].failed.reshape(-1, x.count), axis=0)
    if failed.any():
        at = x.values[failed]
        handles += axes.plot(
            at,
            np.full(at.shape, 0.03),
            transform=axes.get_xaxis_transform(),
            label=f"failed ({len(at):,})",
            **style.FAILED,
        )
    return handles
