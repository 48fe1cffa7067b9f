"""The look that all pictures share: fonts, lines, colours, headings, and a figure that notebooks display."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from distsurf.errors import InputError
from distsurf.grid import AXIS_NAMES
from distsurf.grid import Axis as GridAxis
from distsurf.surface.surface import Column
from distsurf.view.scale import Scale, number

Layout = Literal["constrained", "compressed"] | None

WIDTH = 4.2
"""Default width of a picture in inches: between one column of a paper and a full page."""
TEXT = 8.5
SMALL = 7.5
FONTS = ["STIXGeneral", "DejaVu Serif"]
GREY = "0.35"
HOLE: dict[str, Any] = {"facecolor": "0.9", "edgecolor": "0.62", "hatch": "////", "linewidth": 0.0}
"""How a region without a finite value is painted."""
FAILED: dict[str, Any] = {
    "linestyle": "none",
    "marker": "x",
    "markersize": 3.0,
    "markeredgewidth": 0.7,
    "color": "tab:red",
}
"""How a failed point is marked."""
LEGEND: dict[str, Any] = {
    "frameon": False,
    "handlelength": 1.5,
    "handletextpad": 0.5,
    "columnspacing": 1.4,
    "borderpad": 0.2,
}

RULES: dict[str, Any] = {
    "font.family": FONTS,
    "font.size": TEXT,
    "mathtext.fontset": "stix",
    "axes.titlesize": TEXT + 0.5,
    "axes.labelsize": TEXT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "figure.titlesize": TEXT + 0.5,
    "figure.facecolor": "white",
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.1,
    "grid.color": "0.88",
    "grid.linewidth": 0.4,
    "hatch.linewidth": 0.4,
    "pdf.fonttype": 42,  # publishers refuse the default Type 3 fonts
    "savefig.dpi": 200,
}


SYMBOLS = {
    "lambda_min": "λmin",
    "lambda_max": "λmax",
    "lambda_ratio": "|λmin / λmax|",
    "lambda_min_residual": "residual of λmin",
    "lambda_max_residual": "residual of λmax",
}
"""How columns of curvature are written in pictures."""


class Picture(Figure):
    """A matplotlib figure that a notebook displays when it is the value of a cell, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
        return buffer.getvalue()


@contextmanager
def drawing() -> Iterator[None]:
    """The rules in force while a picture is made or saved, whatever style the caller has set; then undone."""
    with matplotlib.style.context(["default", RULES]):
        yield


def new_figure(size: tuple[float, float] | None, height: float, layout: Layout = "constrained") -> Picture:
    """An empty picture of ``size`` in inches, or `WIDTH` × ``height``."""
    width, height = size or (WIDTH, height)
    if not (width > 0 and height > 0):
        raise InputError(f"size {size}: expected width and height in inches, both positive")
    figure = Picture(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Figure) -> None:
    """Lay the figure out while the rules are in force: ticks are made on the first drawing, not before."""
    for axes in figure.axes:
        # Ticks added later, when the caller enlarges the figure, look like the first ones.
        axes.tick_params(labelsize=SMALL, labelfontfamily=FONTS)
    figure.draw_without_rendering()


def quantity(column: Column) -> str:
    """The name of a column as an axis label: "Train loss", "Test accuracy (%)"."""
    text = column.name.replace("_", " ").strip()
    text = SYMBOLS.get(column.name, text[:1].upper() + text[1:])
    return f"{text} ({column.unit})" if column.unit else text


def direction(axis: int) -> str:
    """The label of a grid axis: "direction 1 (x)"."""
    return f"direction {axis + 1} ({AXIS_NAMES[axis]})"


def position(coordinates: Sequence[float]) -> str:
    """Coordinates as text: "(−0.04, 0.08)"."""
    return f"({', '.join(number(c, 3) for c in coordinates)})"


def colours(name: str | Colormap | None) -> Colormap:
    """A colour map, viridis by default, that shows clipped values in colours of its own.

    Raises InputError for a name that matplotlib does not know.
    """
    try:
        cmap = matplotlib.colormaps[name or "viridis"] if not isinstance(name, Colormap) else name
    except KeyError:
        raise InputError(
            f"no colour map is named {name!r}; try viridis, cividis, magma or YlGnBu_r"
        ) from None
    return cmap.with_extremes(under=_mix(cmap(0.0), "black", 0.55), over=_mix(cmap(1.0), "white", 0.65))


def contrasting(colour: tuple[float, ...]) -> str:
    """Near black or white, whichever reads better on ``colour`` (relative luminance of ITU-R BT.709)."""
    red, green, blue = colour[:3]
    return "0.1" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "white"


def heading(figure: Figure, axes: Axes, title: str | None, note: str) -> None:
    """A title over axes, never read as mathematics, and under it, smaller, a note."""
    quiet: dict[str, Any] = {"size": SMALL, "color": GREY}
    if not title:
        axes.set_title(note, pad=4, **quiet)
        return
    axes.set_title(wrapped(title, figure.get_figwidth()), pad=15 if note else 5, parse_math=False)
    if note:
        above = axes.transAxes + ScaledTranslation(0, 4 / 72, figure.dpi_scale_trans)
        text = axes.annotate(note, (0.5, 1.0), xycoords=above, ha="center", va="bottom", **quiet)
        # The title's distance makes room for it; in the layout its width would push the axes together.
        text.set_in_layout(False)


def top(figure: Figure, title: str | None, note: str, **place: float) -> float:
    """A title, never read as mathematics, and a note over all axes. Returns their height in inches."""
    lines = [*wrapped(title or "", figure.get_figwidth()).splitlines(), *([note] if note else [])]
    if lines:
        figure.suptitle("\n".join(lines), parse_math=False, **place)
    return len(lines) * 1.4 * TEXT / 72


def nothing(axes: Axes, evaluated: bool) -> None:
    """Say in empty axes why there is nothing to see."""
    words = "no finite value" if evaluated else "no point evaluated yet"
    box = {"facecolor": "white", "edgecolor": "none"}
    text = axes.annotate(words, (0.5, 0.65), xycoords=axes.transAxes, color=GREY, bbox=box)
    text.set(ha="center", va="center")


def few_ticks(along: Axis, axis: GridAxis, most: int = 5, prune: Literal["both"] | None = None) -> None:
    """Round coordinates along an axis, with at most so many steps; the coordinate of a single point."""
    if axis.count == 1:
        along.set_ticks([axis.low])
    else:
        along.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], prune=prune))


def colour_bar(figure: Figure | SubFigure, scale: Scale, colours: Colormap, label: str, **place: Any) -> None:
    """A colour bar for drawn units, with real values at its ticks, at the ``place`` that colorbar() takes."""
    shown = ScalarMappable(Normalize(scale.low, scale.high), colours)
    bar = figure.colorbar(shown, extend=scale.extend, **place)
    bar.set_ticks(scale.ticks.tolist(), labels=scale.texts(scale.ticks))
    bar.ax.minorticks_off()
    bar.ax.set_ylabel(wrapped(label, 0.7 * figure.bbox.height / figure.dpi), parse_math=False)


def escaped(text: str) -> str:
    """Text from a file or a user that matplotlib is to write as it stands."""
    return text.replace("$", r"\$")


def wrapped(text: str, inches: float) -> str:
    """A text of the usual size, broken into lines no longer than so many inches."""
    per_line = max(int(inches * 72 / (0.5 * TEXT)), 12)
    return "\n".join(textwrap.fill(line, per_line) for line in text.splitlines())


def caption(figure: Figure, handles: Sequence[Artist]) -> None:
    """What lines and marks mean, at the foot of the figure, in as many columns as fit its width."""
    if not handles:
        return
    widths = [0.42 * SMALL * len(str(handle.get_label())) + 28 for handle in handles]
    columns = len(handles)
    while columns > 1 and sum(map(max, np.array_split(widths, columns))) > 72 * figure.get_figwidth():
        columns -= 1
    columns = -(-len(handles) // -(-len(handles) // columns))  # rows as even as can be
    # Outside: it takes height from the axes, never width.
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, **LEGEND)


def _mix(colour: tuple[float, ...], other: str, amount: float) -> tuple[float, float, float]:
    red, green, blue = ((1 - amount) * a + amount * b for a, b in zip(colour[:3], to_rgb(other), strict=True))
    return red, green, blue
