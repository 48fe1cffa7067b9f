"""The spectral density of a Hessian."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from distsurf.view import style

if TYPE_CHECKING:
    from distsurf.objective.lanczos import Density

SHARPNESS = 150.0
"""The spectrum's length over the width of the bells that it is drawn with (Ghorbani et al. 2019 use 1/√(10⁻⁵))."""


def spectrum(
    density: Density, of: str, *, title: str | None = None, size: tuple[float, float] | None = None
) -> Figure:
    """A density on a logarithmic axis, as a sum of bells about its nodes. ``of``: the loss that it is of."""
    low, high = float(density.nodes.min()), float(density.nodes.max())
    width = max(high - low, 1e-12 * max(abs(low), abs(high), 1.0)) / SHARPNESS
    at = np.linspace(low - 4 * width, high + 4 * width, 2000)
    values = density.smoothed(at, width)
    with style.drawing():
        figure = style.new_figure(size, 0.62 * style.WIDTH)
        axes = figure.add_subplot()
        axes.fill_between(at, values, 1e-30, color="#0072B2", alpha=0.25, lw=0)
        axes.plot(at, values, color="#0072B2")
        axes.axvline(0, color=style.GREY, lw=0.7, ls=":")
        axes.set_yscale("log")
        axes.set(xlim=(at[0], at[-1]), ylim=(values.max() * 1e-8, values.max() * 3))
        name = of.replace("_", " ")
        axes.set_xlabel(f"eigenvalue of the Hessian of the {name}", parse_math=False)
        axes.set_ylabel("density")
        style.heading(figure, axes, title, f"bells of standard deviation {width:.2g}")
        style.finish(figure)
    return figure
