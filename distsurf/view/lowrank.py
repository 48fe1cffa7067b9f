"""A matrix beside its best approximation of some rank, their difference, and the error against the rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distsurf.subspace.svd import SVD
from distsurf.view import style
from distsurf.view.scale import choose

Floats = NDArray[np.float64]
MOST_RANKS = 60
"""Ranks whose error is measured."""
ROUNDING = 1e-12
"""Errors below are none, and have no place on a logarithmic axis."""
BLUE, ORANGE = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Approximation:
    """How well low ranks approximate a matrix."""

    matrix: Floats
    svd: SVD
    measured: Floats
    """Relative Frobenius error of rank 0, 1, …: ‖A − A_k‖ / ‖A‖."""

    @classmethod
    def of(cls, matrix: Floats, svd: SVD) -> Approximation:
        """Measure the errors, component by component."""
        rest = matrix.astype(np.float64)
        norm = float(np.linalg.norm(rest))
        norms = [norm]
        for k in range(min(len(svd.s), MOST_RANKS)):
            rest = rest - svd.s[k] * np.outer(svd.u[:, k], svd.vt[k])
            norms.append(float(np.linalg.norm(rest)))
        return cls(matrix, svd, np.array(norms) / (norm or 1.0))

    def error(self, rank: int) -> float:
        """The measured error of a rank."""
        if rank < len(self.measured):
            return float(self.measured[rank])
        rest = self.matrix - self.svd.reconstruct(rank)
        return float(np.linalg.norm(rest) / (np.linalg.norm(self.matrix) or 1.0))

    def rank_for(self, error: float) -> int | None:
        """The smallest rank whose error is at most this, measured or, beyond, expected; None where none is."""
        beyond = self.svd.errors()[len(self.measured) :]
        enough = np.flatnonzero(np.concatenate([self.measured, beyond]) <= error)
        return int(enough[0]) if len(enough) else None


def low_rank(
    found: Approximation,
    rank: int,
    *,
    extent: tuple[float, float, float, float] | None = None,
    label: str = "value",
    title: str | None = None,
    upright: bool = True,
) -> Figure:
    """Original, reconstruction and difference as images, and the error against the rank.

    ``extent``: left, right, bottom and top of a surface; None for a picture, which is shown in grey. ``upright`` has
    the first row at the bottom, as surfaces do. Original and
    reconstruction share one scale.
    """
    rebuilt = found.svd.reconstruct(rank)
    difference = rebuilt - found.matrix
    scale = choose(found.matrix)
    colours = style.colours(None if extent else "gray")
    most = float(np.abs(difference).max()) or 1.0
    with style.drawing():
        across = 1.7 * style.WIDTH
        shape = 0.9 if extent else min(max(found.matrix.shape[0] / found.matrix.shape[1], 0.5), 1.5)
        figure = style.new_figure((across, across * shape + 0.4), across)
        panels = figure.subplots(2, 2)
        look = {
            "origin": "lower" if upright else "upper",
            "extent": extent,
            "aspect": "auto" if extent else "equal",
            "interpolation": "nearest",
        }
        for axes, values, name in (
            (panels[0, 0], found.matrix, "original"),
            (panels[0, 1], rebuilt, f"rank {rank}"),
        ):
            axes.imshow(scale.drawn(values), vmin=scale.low, vmax=scale.high, cmap=colours, **look)
            axes.set_title(name, pad=3)
        style.colour_bar(figure, scale, colours, label, ax=panels[0, :], aspect=20, pad=0.02)
        shown = panels[1, 0].imshow(difference, vmin=-most, vmax=most, cmap="RdBu_r", **look)
        panels[1, 0].set_title("difference", pad=3)
        figure.colorbar(shown, ax=panels[1, 0], aspect=20, pad=0.03)
        if extent is not None:
            for axes in panels.flat[:3]:
                axes.set(xlabel=style.direction(0))
            for axes in panels[:, 0]:
                axes.set(ylabel=style.direction(1))
        else:
            for axes in panels.flat[:3]:
                axes.set(xticks=[], yticks=[])
        _errors(panels[1, 1], found, rank)
        style.top(figure, title, "")
        style.finish(figure)
    return figure


def _errors(axes: Axes, found: Approximation, rank: int) -> None:
    expected = found.svd.errors()
    measured = {**dict(enumerate(found.measured)), rank: found.error(rank)}
    floor = 0.3 * expected[expected > ROUNDING].min(initial=1.0)
    dots: dict[str, Any] = {"color": ORANGE, "ls": "none", "marker": "o", "ms": 2.6, "mfc": "none"}
    shown = expected > ROUNDING
    axes.semilogy(np.flatnonzero(shown), expected[shown], color=BLUE, label="Eckart–Young")
    told = {k: error for k, error in measured.items() if error > ROUNDING}
    axes.semilogy(list(told), list(told.values()), label="measured", **dots)
    axes.axhline(0.01, color=style.GREY, lw=0.6, ls=":")
    axes.axvline(rank, color=style.GREY, lw=0.6, ls=":")
    axes.set(xlabel="rank", ylim=(floor, 2.0))
    axes.set_title("relative error", pad=3)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(**style.LEGEND)
