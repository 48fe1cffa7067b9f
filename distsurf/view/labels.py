"""Where the numbers on contour lines go: one per level, apart from each other and from neighbouring lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CANDIDATES = 48
"""Places tried on each level."""


def label_lines(
    figure: Figure,
    axes: Axes,
    lines: QuadContourSet,
    texts: Sequence[str],
    size: float,
    avoid: Sequence[tuple[float, ...]],
) -> None:
    """Write ``texts`` (one per level) into contour lines that are already laid out on a figure.

    A level whose lines are too short, too bent or too crowded for its number stays without one. ``avoid`` are
    points (data coordinates) to keep clear of. matplotlib's own placement labels every piece of every level.
    """
    points = figure.dpi / 72
    pieces = [
        [axes.transData.transform(piece) for piece in level if len(piece) > 1] for level in lines.allsegs
    ]
    taken = [(axes.transData.transform(point), 6 * points) for point in avoid]
    places: list[Floats] = []
    # Long lines have the widest choice of places, so the short ones go first.
    for i in sorted(range(len(pieces)), key=lambda i: sum(map(_length, pieces[i]))):
        width = (0.5 * len(texts[i].strip("$").replace("\\times", "x")) * size + 2) * points
        others = [piece for j, level in enumerate(pieces) if j != i for piece in level]
        place = _place(axes, pieces[i], others, taken, width, size * points)
        if place is not None:
            taken.append((place, width / 2))
            places.append(place)
    if places:
        lines.clabel(
            manual=[tuple(axes.transData.inverted().transform(place)) for place in places],
            fmt=dict(zip(np.asarray(lines.levels).tolist(), texts, strict=True)),
            fontsize=size,
            inline_spacing=2,
        )


def _place(
    axes: Axes,
    pieces: list[Floats],
    others: list[Floats],
    taken: list[tuple[Floats, float]],
    width: float,
    height: float,
) -> Floats | None:
    """The roomiest place ``(2,)`` in pixels on a level's ``pieces`` for a text of this size, or None."""
    candidates, chords = _candidates([p for p in pieces if _length(p) > 2.5 * width], width)
    if not len(candidates):
        return None
    box = axes.bbox
    border = np.minimum(candidates - [box.x0, box.y0], [box.x1, box.y1] - candidates).min(axis=1)
    apart = np.full(len(candidates), np.inf)
    for place, reach in taken:
        apart = np.minimum(apart, np.linalg.norm(candidates - place, axis=1) - reach - width / 2)
    crowd = np.full(len(candidates), np.inf)
    for other in others:
        gaps = np.linalg.norm(candidates[:, None] - other[None], axis=2)
        crowd = np.minimum(crowd, gaps.min(axis=1))
    fits = (
        (border > 0.6 * width)
        & (apart > 0.5 * height)
        & (crowd > 0.75 * height)
        & (np.linalg.norm(chords, axis=1) > 0.9)
    )
    if not fits.any():
        return None
    room = (
        np.minimum(crowd, 1.5 * height)
        + 0.3 * np.minimum(apart, 6 * height)
        + 0.3 * np.minimum(border, 2 * width)
        + 0.7 * np.abs(chords[:, 0]) * height  # level text reads best
    )
    return candidates[int(np.argmax(np.where(fits, room, -np.inf)))]


def _candidates(pieces: list[Floats], width: float) -> tuple[Floats, Floats]:
    """Places ``(n, 2)`` spread over the pieces, and the chord ``(n, 2)`` of a text there over its width."""
    places, chords = [np.empty((0, 2))], [np.empty((0, 2))]
    total = sum(map(_length, pieces))
    for piece in pieces:
        along = np.r_[0.0, np.cumsum(np.linalg.norm(np.diff(piece, axis=0), axis=1))]
        count = max(round(CANDIDATES * along[-1] / total), 1)
        middle = np.linspace(width / 2, along[-1] - width / 2, count)
        start, at, stop = (
            np.stack([np.interp(where, along, piece[:, k]) for k in (0, 1)], axis=1)
            for where in (middle - width / 2, middle, middle + width / 2)
        )
        places.append(at)
        chords.append((stop - start) / width)
    return np.concatenate(places), np.concatenate(chords)


def _length(piece: Floats) -> float:
    return float(np.linalg.norm(np.diff(piece, axis=0), axis=1).sum())
