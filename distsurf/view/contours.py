"""Filled contours of a plane, and of the slices of a 3-D grid side by side on one colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from distsurf.grid import Axis
from distsurf.surface.surface import DONE, Column, Surface
from distsurf.view import style
from distsurf.view.labels import label_lines
from distsurf.view.points import Points, axes_of, axis_label, best, edges, fill, is_share, pick, remarks, span
from distsurf.view.scale import Scale, choose, number

Floats = NDArray[np.float64]

MODELS = ("+", "x", "D", "s", "^", "v")
"""Markers of models, in their order: of the one at the origin, and of others."""
AVOIDED = 200
"""Places on a trajectory that the numbers of contour lines keep clear of."""
ROUNDING = 1e-9
"""Share of the largest deviation that is none."""
PANELS = 9
"""Most slices of a 3-D grid in one picture."""


def contour(
    surface: Surface,
    column: str = "loss",
    *,
    levels: int | Sequence[float] | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    log: bool | None = None,
    cmap: str | Colormap | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Filled contours of a surface with two axes, its minimum and the models in it marked.

    ``levels`` is about how many, or the values themselves; ``vmin``, ``vmax`` and ``log`` replace the rules
    of `distsurf.view.scale`; ``size`` is in inches. Pending points are interpolated for display; points that
    failed or are not finite are left as hatched holes. The maximum of an accuracy is marked instead of its
    minimum. Raises InputError for a surface of another dimension, an unknown column, a bad limit or size.
    """
    x, y = axes_of(surface, "contour")
    shown = pick(surface, column)
    points = Points.of(surface, shown)
    scale = choose(points.values, bounded=is_share(shown), levels=levels, vmin=vmin, vmax=vmax, log=log)
    with style.drawing():
        height = (style.WIDTH - 1.1) * (_box_ratio(x, y) or 0.85) + 0.85 + (0.3 if title else 0.0)
        figure = style.new_figure(size, height)
        axes = figure.add_subplot()
        colours = style.colours(cmap)
        lines = _plane(axes, x, y, fill(points, scale.drawn), scale, colours, 5)
        axes.set(xlabel=axis_label(surface, 0), ylabel=axis_label(surface, 1))
        optimum = best(surface, shown, points)
        handles = _path(axes, surface) + _marks(axes, surface, optimum) + _holes(axes, x, y, points)
        style.heading(figure, axes, title, remarks(surface, [shown], scale.log))
        style.caption(figure, handles)
        if points.finite.any():
            # Inset: as high as the axes whatever the aspect ratio makes of them.
            place = axes.inset_axes((1.035, 0.0, 0.045, 1.0))
            style.colour_bar(figure, scale, colours, style.quantity(shown), cax=place)
        else:
            style.nothing(axes, not points.pending.all())
        style.finish(figure)
        if lines is not None:
            marked = [at for _, at in surface.models] + ([] if optimum is None else [optimum[2]])
            if surface.trajectory is not None:
                steps = np.linspace(0, len(surface.trajectory) - 1, AVOIDED)
                along = [np.interp(steps, np.arange(len(column)), column) for column in surface.trajectory.T]
                marked += list(zip(*along, strict=True))
            label_lines(figure, axes, lines, scale.texts(np.asarray(lines.levels)), 6.5, marked)
    return figure


def slices(
    surface: Surface,
    column: str = "loss",
    *,
    levels: int | Sequence[float] | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    log: bool | None = None,
    cmap: str | Colormap | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Up to nine planes of a surface with three axes, evenly chosen along the third, on one colour scale.

    Where the third axis counts repetitions, their mean and standard deviation are under them. The options are those of
    `contour`. While points are pending, only planes with some value are shown.
    """
    x, y, z = axes_of(surface, "slices")
    shown = pick(surface, column)
    points = Points.of(surface, shown)
    scale = choose(points.values, bounded=is_share(shown), levels=levels, vmin=vmin, vmax=vmax, log=log)
    chosen = _slices(points)
    square = int(np.ceil(np.sqrt(len(chosen))))
    columns = min(range(square, max(square, 4) + 1), key=lambda n: -len(chosen) % n)  # fewest empty places
    rows = -(-len(chosen) // columns)
    is_repeated = surface.grid.repeated
    with style.drawing():
        width = size[0] if size else 1.4 * style.WIDTH
        ratio = _box_ratio(x, y) or 0.85
        panel = (width - 1.29 - 0.24 * (columns - 1)) / columns * ratio
        heights = [rows * (panel + 0.26), (width / 2 - 1.3) * ratio + 0.5 if is_repeated else 0.0]
        height = sum(heights) + 0.6 + (0.25 if title else 0.0)
        figure = style.new_figure(size or (width, height), height, layout="compressed")
        above: Figure | SubFigure = figure
        if is_repeated:
            halves = figure.add_gridspec(2, 1, height_ratios=heights)
            above, below = (figure.add_subfigure(half) for half in (halves[0], halves[1]))
            _across_repeats(below, surface, shown, scale, style.colours(cmap))
        panels = above.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        colours = style.colours(cmap)
        drawn = fill(points, scale.drawn)
        optimum = best(surface, shown, points)
        handles: dict[str, Artist] = {}
        for i, (axes, k) in enumerate(zip(panels.flat, chosen, strict=False)):
            _plane(axes, x, y, drawn[k], scale, colours, 3)
            axes.set_title(f"{surface.grid.names[2]} = {number(z.values[k], 3)}", size=style.SMALL, pad=3)
            if i % columns == 0:
                axes.set_ylabel(axis_label(surface, 1))
            if i // columns == rows - 1:
                axes.set_xlabel(axis_label(surface, 0))
            elif i + columns >= len(chosen):  # nothing under it
                axes.tick_params(labelbottom=True)
            for handle in _marks(axes, surface, optimum, int(k)) + _holes(axes, x, y, points, int(k)):
                handles[str(handle.get_label())] = handle
        for axes in panels.flat[len(chosen) :]:
            axes.set_visible(False)
        some = f"{len(chosen)} of {z.count} planes" if len(chosen) < z.count else ""
        style.top(figure, title, "; ".join(filter(None, (some, remarks(surface, [shown], scale.log)))))
        if points.finite.any():
            where = {"ax": panels, "aspect": 30, "fraction": 0.05, "pad": 0.02}
            style.colour_bar(above, scale, colours, style.quantity(shown), **where)
        else:
            style.nothing(panels[0, 0], not points.pending.all())
        style.caption(figure, list(handles.values()))
        style.finish(figure)
    return figure


def _across_repeats(
    figure: SubFigure, surface: Surface, shown: Column, scale: Scale, colours: Colormap
) -> None:
    """The mean of all repetitions, on their scale, and beside it their standard deviation, on its own."""
    x, y, repeats = surface.grid.axes
    mean, spread = surface.across_repeats(shown.name)
    if scale.log and (apart := spread[spread > ROUNDING * np.nanmax(spread, initial=0.0)]).size:
        # Where all planes meet it is zero, which a logarithmic scale has no place for.
        spread = np.maximum(spread, np.percentile(apart, 1))
    pending = ~np.all(np.isin(surface.status, DONE), axis=0)
    where = {"aspect": 20, "fraction": 0.08, "pad": 0.03}
    title = f"mean of {repeats.count}"
    for axes, (values, own, name) in zip(
        figure.subplots(1, 2, sharey=True),
        ((mean, scale, title), (spread, choose(spread, log=scale.log), "standard deviation")),
        strict=True,
    ):
        holes = ~pending & ~np.isfinite(values)
        points = Points(values, pending, np.zeros_like(holes), holes)
        _plane(axes, x, y, fill(points, own.drawn), own, colours, 3)
        _holes(axes, x, y, points)
        axes.set_title(name, size=style.SMALL, pad=3)
        axes.set_xlabel(axis_label(surface, 0))
        if points.finite.any():
            quantity = style.quantity(shown)
            label = quantity if own is scale else f"Deviation of {quantity[:1].lower()}{quantity[1:]}"
            style.colour_bar(figure, own, colours, label, ax=axes, **where)
        else:
            style.nothing(axes, not pending.all())
    figure.axes[0].set_ylabel(axis_label(surface, 1))


def _slices(points: Points) -> NDArray[np.int64]:
    """Up to `PANELS` planes, an odd number with the middle one, in equal steps where that can be.

    A plane that no point of has been visited yet gives way to the nearest with one.
    """
    last = len(points.pending) - 1
    count = next((n for n in (9, 7, 5) if last % (n - 1) == 0), PANELS) if last >= PANELS else last + 1
    even = np.linspace(0, last, count).round().astype(np.int64)
    visited = np.flatnonzero(~points.pending.all(axis=(1, 2)))
    if not visited.size:
        return even
    return np.unique(visited[np.abs(visited - even[:, None]).argmin(axis=1)])


def _box_ratio(x: Axis, y: Axis) -> float | None:
    """Height over width of axes with equal units; None where the spans differ too much for that."""
    across, up = x.high - x.low, y.high - y.low
    return up / across if across and 0.5 <= up / across <= 2 else None


def _plane(
    axes: Axes, x: Axis, y: Axis, drawn: Floats, scale: Scale, colours: Colormap, ticks: int
) -> QuadContourSet | None:
    """Fill one plane ``(ny, nx)`` of drawn units. Returns its contour lines, None if it has none."""
    (left, right), (bottom, top) = span(x), span(y)
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal" if _box_ratio(x, y) else "auto")
    axes.set_anchor("S")  # whatever height is left over is above, not between the axes and the caption
    style.few_ticks(axes.xaxis, x, ticks)
    style.few_ticks(axes.yaxis, y, ticks)
    if np.isnan(drawn).all():
        return None
    norm = Normalize(scale.low, scale.high)
    if min(drawn.shape) < 2:
        axes.pcolormesh(edges(x), edges(y), drawn, norm=norm, cmap=colours)
        return None
    look: dict[str, Any] = {"norm": norm, "cmap": colours, "extend": scale.extend}
    bands = axes.contourf(x.values, y.values, drawn, scale.fine_levels, **look)
    # In PDF and SVG, viewers leave pale hairlines between bands that only touch.
    bands.set(edgecolor="face", linewidth=0.3)
    crossed = scale.crossed(drawn)
    if not crossed.size:
        return None
    ink = [style.contrasting(colours(norm(level))) for level in crossed]
    return axes.contour(x.values, y.values, drawn, crossed, colors=ink, linewidths=0.4, linestyles="solid")


def _path(axes: Axes, surface: Surface) -> list[Artist]:
    """Draw the path that a training takes in this plane, a dot at every checkpoint; what the legend is to show."""
    path = surface.trajectory
    if path is None:
        return []
    halo = [withStroke(linewidth=2.4, foreground="0.1")]
    look: dict[str, Any] = {
        "color": "white",
        "lw": 1.1,
        "marker": "o",
        "ms": 2.6,
        "mew": 0.0,
        "path_effects": halo,
        "zorder": 4,
    }
    line = axes.plot(path[:, 0], path[:, 1], label=f"trajectory, {len(path)} checkpoints", **look)
    start = {"marker": "s", "ms": 4.5, "ls": "none", "mfc": "none", "mew": 1.0, "label": "its start"}
    return [*line, *axes.plot(path[:1, 0], path[:1, 1], **{**look, **start})]


def _marks(
    axes: Axes,
    surface: Surface,
    optimum: tuple[str, float, tuple[float, ...]] | None,
    plane: int | None = None,
) -> list[Artist]:
    """Mark the trained model and the optimum where they lie in this plane; what the legend is to show."""
    grid = surface.grid
    halo = [withStroke(linewidth=2.2, foreground="0.1")]
    marks: list[tuple[tuple[float, ...], dict[str, Any]]] = []
    for (name, at), marker in zip(surface.models, MODELS, strict=False):
        if all(axis.low <= c <= axis.high for c, axis in zip(at, grid.axes, strict=False)):
            label = style.escaped(name)
            marks.append((at, {"marker": marker, "ms": 7, "mew": 1.2, "mfc": "none", "label": label}))
    if optimum is not None:
        name, value, at = optimum
        where = f"{style.position(at[:-1])}, repeat {at[-1]:g}" if grid.repeated else style.position(at)
        label = f"{name} {number(value)} at {where}"
        marks.append((at, {"marker": "o", "ms": 6, "mew": 1.0, "mfc": "none", "label": label}))
    look: dict[str, Any] = {
        "color": "white",
        "path_effects": halo,
        "ls": "none",
        "clip_on": False,
        "zorder": 5,
    }
    handles: list[Artist] = []
    for at, own in marks:
        if plane is None or len(at) < 3 or np.isclose(at[2], grid.axes[2].values[plane], rtol=0, atol=1e-9):
            handles += axes.plot(at[:1], at[1:2], **look, **own)
    return handles


def _holes(axes: Axes, x: Axis, y: Axis, points: Points, plane: int | None = None) -> list[Artist]:
    """Hatch what the contours leave open and mark failed points in this plane; what the legend is to show."""
    handles: list[Artist] = []
    if (points.failed | points.nonfinite).any():
        (left, right), (bottom, top) = span(x), span(y)
        axes.add_patch(Rectangle((left, bottom), right - left, top - bottom, zorder=0.1, **style.HOLE))
    here = () if plane is None else (plane,)
    if points.failed[here].any():
        rows, columns = np.nonzero(points.failed[here])
        label = f"failed ({points.failed.sum():,})"
        handles += axes.plot(x.values[columns], y.values[rows], label=label, zorder=4, **style.FAILED)
    if points.nonfinite[here].any():
        handles.append(Patch(**style.HOLE, label=f"not finite ({points.nonfinite.sum():,})"))
    return handles
