"""A surface in three dimensions: shaded, coloured by its values, with its contours on the floor."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Colormap, LightSource, Normalize
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from mpl_toolkits.mplot3d.axes3d import Axes3D
from numpy.typing import NDArray

from distsurf.grid import Axis
from distsurf.surface.surface import Column, Surface
from distsurf.view import style
from distsurf.view.points import Points, axes_of, axis_label, fill, is_share, pick, remarks, span
from distsurf.view.scale import Scale, choose

Floats = NDArray[np.float64]

SMOOTH, MOST = 120, 300
"""Cells drawn along an axis: about `SMOOTH` on coarser grids, and finer ones are thinned to `MOST`."""
HEIGHT = 0.7
"""Height of the surface's box over its width."""
LONGEST_LABEL = 24
"""Characters of an axis label: both meet in the front corner."""
FLOOR = 0.4
"""Depth of the floor under the surface, as a share of the surface's height."""


def surface3d(
    surface: Surface,
    column: str = "loss",
    *,
    log: bool | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    cmap: str | Colormap | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
    elev: float = 28.0,
    azim: float = -58.0,
) -> Figure:
    """A shaded surface over a grid with two axes, with contours on the floor.

    ``vmin``, ``vmax`` and ``log`` replace the rules of `distsurf.view.scale`; values beyond the scale are cut
    to a plateau in a colour of its own. ``elev`` and ``azim`` are the view's angles in degrees, ``size`` is
    in inches. Points that failed or are not finite are holes. Raises InputError for a surface of another
    dimension, an unknown column, a bad limit or size.
    """
    x, y = axes_of(surface, "surface")
    shown = pick(surface, column)
    points = Points.of(surface, shown)
    scale = choose(points.values, bounded=is_share(shown), vmin=vmin, vmax=vmax, log=log)
    drawn = fill(points, scale.drawn)
    with style.drawing():
        figure = style.new_figure(size, 0.8 * style.WIDTH, layout=None)
        width, height = figure.get_size_inches()
        # Numbers and names of the axes keep their size, and so these margins, whatever the figure's.
        foot, side = 0.24 / height, 1 - 0.55 / width
        head = style.top(figure, title, _note(surface, shown, points, scale), x=side / 2, y=0.99) / height
        place = (0.0, foot, side - 0.01, 1 - foot - head)
        axes: Axes3D = figure.add_axes(place, projection="3d", computed_zorder=False)
        colours = style.colours(cmap)
        floor = scale.low - FLOOR * (scale.high - scale.low)
        # Seen from below, the floor is in front.
        order = (1, 2) if elev >= 0 else (2, 1)
        if min(drawn.shape) > 1:
            _floor(axes, x, y, drawn, scale, colours, floor, order[0])
            axes.add_collection3d(_sheet(x, y, drawn, scale, colours, order[1]))
        else:
            xs, ys = np.meshgrid(x.values, y.values)
            heights = np.clip(drawn, scale.low, scale.high)
            axes.plot(xs.ravel(), ys.ravel(), heights.ravel(), marker=".", ms=4, color=colours(0.4))
        axes.view_init(elev, azim)
        _frame(axes, surface, scale, floor)
        if points.finite.any():
            bar = figure.add_axes((side, 0.22, 0.025, 0.52))
            style.colour_bar(figure, scale, colours, style.quantity(shown), cax=bar)
        else:
            style.nothing(axes, not points.pending.all())
        style.finish(figure)
    return figure


def _note(surface: Surface, shown: Column, points: Points, scale: Scale) -> str:
    """The usual remarks, and how many holes the surface has: it has no legend to say so."""
    holes, note = np.count_nonzero(points.nonfinite), remarks(surface, [shown], scale.log)
    if not holes:
        return note
    return (
        f"{note}, {holes:,} not finite" if note else f"{holes:,} of {points.values.size:,} points not finite"
    )


def _sheet(x: Axis, y: Axis, drawn: Floats, scale: Scale, colours: Colormap, order: int) -> Poly3DCollection:
    """The surface as shaded cells; a cell with a corner that has no value is left out."""
    heights = np.clip(drawn, scale.low, scale.high)
    # Light falls on the surface as it is seen, in a box of sides 1, 1 and HEIGHT, whatever the units. Slopes are
    # those at the grid's points, so that shades run into each other; unknown next to a hole, and level there.
    up, across = np.gradient(heights / (scale.high - scale.low) * HEIGHT)
    normals = np.stack([-across * (x.count - 1), -up * (y.count - 1), np.ones_like(up)], axis=-1)
    normals = np.where(np.isnan(normals), (0.0, 0.0, 1.0), normals)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    light = np.clip(normals @ LightSource(azdeg=300, altdeg=50).direction, 0, 1)

    rows, columns = _positions(y.count), _positions(x.count)
    xs, ys = np.meshgrid(_at(x.values, columns), _at(y.values, rows))
    zs, values, shades = (_at(_at(a, rows).T, columns).T for a in (heights, drawn, light))
    corners = [np.s_[:-1, :-1], np.s_[:-1, 1:], np.s_[1:, 1:], np.s_[1:, :-1]]
    vertices = np.stack([xs, ys, zs], axis=-1)
    cells = np.stack([vertices[corner].reshape(-1, 3) for corner in corners], axis=1)
    value, shade = (np.mean([a[corner].ravel() for corner in corners], axis=0) for a in (values, shades))
    whole = np.isfinite(value)
    colour = np.asarray(colours(Normalize(scale.low, scale.high)(value[whole])))
    colour[:, :3] = np.clip(colour[:, :3] * (0.72 + 0.38 * shade[whole, None]), 0, 1)
    # Edges in the colour of their cell close the hairline gaps between antialiased neighbours.
    return Poly3DCollection(cells[whole], facecolors=colour, edgecolors=colour, linewidths=0.3, zorder=order)


def _positions(count: int) -> Floats:
    """Where along an axis, in steps of the grid, the corners of the drawn cells lie: both ends among them."""
    steps = count - 1
    if steps > MOST:
        return np.unique(np.r_[np.arange(0, steps, -(-steps // MOST)), steps]).astype(np.float64)
    parts = max(SMOOTH // steps, 1)
    return np.arange(steps * parts + 1) / parts


def _at(values: Floats, positions: Floats) -> Floats:
    """``values`` along their first axis, linear between points; NaN only where one that counts is NaN."""
    before = np.clip(np.floor(positions).astype(np.int64), 0, len(values) - 2)
    weight = (positions - before).reshape(-1, *[1] * (values.ndim - 1))
    first, second = values[before], values[before + 1]
    return np.where(weight == 0, first, np.where(weight == 1, second, (1 - weight) * first + weight * second))


def _floor(
    axes: Axes3D, x: Axis, y: Axis, drawn: Floats, scale: Scale, colours: Colormap, floor: float, order: int
) -> None:
    """Filled contours, with lines, on the floor of the box."""
    flat = {"zdir": "z", "offset": floor}
    look = {"extend": scale.extend, "norm": Normalize(scale.low, scale.high), "cmap": colours, "alpha": 0.9}
    fills = axes.contourf(x.values, y.values, drawn, scale.levels, **look, **flat)
    fills.set_zorder(order)
    crossed = scale.crossed(drawn)
    if crossed.size:
        thin = {"colors": "0.15", "linewidths": 0.3, "linestyles": "solid"}
        lines = axes.contour(x.values, y.values, drawn, crossed, **thin, **flat)
        lines.set_zorder(order + 0.1)


def _frame(axes: Axes3D, surface: Surface, scale: Scale, floor: float) -> None:
    """Limits, labels and quiet panes."""
    x, y = surface.grid.axes
    for axis, name in ((x, "x"), (y, "y")):
        getattr(axes, f"set_{name}lim")(*span(axis))
    axes.set_zlim(floor, scale.high)
    axes.set_box_aspect((1, 1, HEIGHT * (1 + FLOOR)), zoom=1.0)
    axes.set_xlabel(axis_label(surface, 0, LONGEST_LABEL), labelpad=-4)
    axes.set_ylabel(axis_label(surface, 1, LONGEST_LABEL), labelpad=-4)
    axes.set_zticks(scale.ticks.tolist(), labels=scale.texts(scale.ticks))
    # Without those at the ends: two of them would meet in the front corner.
    style.few_ticks(axes.xaxis, x, 4, prune="both")
    style.few_ticks(axes.yaxis, y, 4, prune="both")
    for label in axes.get_zticklabels():
        label.set_horizontalalignment("left")  # long numbers grow away from the box
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((1, 1, 1, 0))
        axis.line.set_linewidth(0.6)
        axis.set_tick_params(pad=-2)
