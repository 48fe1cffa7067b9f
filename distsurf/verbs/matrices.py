"""``svd``: a surface, or any matrix, by its singular values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from distsurf.errors import InputError, in_one_line
from distsurf.verbs.shared import load, printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WITHIN = 0.01
"""Relative error that a good approximation has."""
SHOWN = 10
"""Ranks in the table."""


def svd(options: argparse.Namespace) -> int:
    """Decompose, print the errors by rank, and draw."""
    import numpy as np

    from distsurf.subspace.svd import svd as decompose
    from distsurf.view.figures import save
    from distsurf.view.lowrank import MOST_RANKS, Approximation, low_rank

    matrix, label, extent = _read(options.file, options.column, options.repeat)
    if options.log:
        if not (matrix > 0).all():
            raise InputError(
                f"--log: {np.count_nonzero(matrix <= 0):,} values of {options.file} are not positive"
            )
        matrix, label = np.log10(matrix), f"log10 {label}"
    count = min(matrix.shape)
    if options.rank is not None and options.rank > count:
        raise InputError(f"--rank {options.rank}: {options.file} has {count} components")
    wanted = count if options.route in (None, "lapack") else min(count, max(options.rank or 0, MOST_RANKS))
    found = Approximation.of(matrix, decompose(matrix, wanted, options.route))
    good = found.rank_for(WITHIN)
    expected = found.svd.errors()
    ranks = len(expected) - 1
    print(printable(f"{options.file}: {label}, {matrix.shape[0]} × {matrix.shape[1]}, by {found.svd.route}"))
    print(f"{'rank':>5}  {'σ':>12}  {'error':>11}  {'Eckart–Young':>12}")
    for k in sorted({*range(min(ranks, SHOWN) + 1), ranks, *([good] if good else [])}):
        sigma = f"{found.svd.s[k - 1]:12.6g}" if k else f"{'':>12}"
        print(f"{k:5}  {sigma}  {found.error(k):11.4%}  {expected[k]:12.4%}")
    if good is None:
        print(f"none of the first {ranks} ranks is within {WITHIN:.0%}")
    else:
        print(f"rank {good} is the first within {WITHIN:.0%}")
    rank = min(options.rank or good or ranks, len(found.svd.s))
    which = "" if options.repeat is None else f"_{options.repeat}"
    path = options.output or options.file.with_name(f"{options.file.stem}_svd{which}.png")
    figure = low_rank(
        found, rank, extent=extent, label=label, title=options.title, upright=options.file.suffix == ".h5"
    )
    save(figure, path)
    print(path)
    return 0


def _read(
    path: Path, column: str, repeat: int | None
) -> tuple[NDArray[np.float64], str, tuple[float, float, float, float] | None]:
    """A matrix, what its values are, and where its edges lie. Raises InputError."""
    import numpy as np

    if not path.is_file():
        raise InputError(f"no file {path}")
    if path.suffix == ".npy":
        try:
            matrix = np.load(path, allow_pickle=False)
            if np.iscomplexobj(matrix):
                raise InputError(f"{path} is complex; give its real part, imaginary part or modulus")
            return matrix.astype(np.float64), "value", None
        except (ValueError, OSError, TypeError) as error:
            raise InputError(f"{path} is no matrix of numbers: {in_one_line(error)}") from error
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"):
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("F"), np.float64), "grey level", None
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{path} is no picture: {in_one_line(error)}") from error
    from distsurf.view.points import edges
    from distsurf.view.style import quantity

    surface = load(path, repeat)
    if len(surface.grid.axes) != 2:
        hint = "; --repeat NUMBER takes one plane" if surface.grid.repeated else ""
        raise InputError(f"{path} has {len(surface.grid.axes)} axes; a matrix has two{hint}")
    values = surface[column]
    if holes := np.count_nonzero(~np.isfinite(values)):
        raise InputError(
            f"{path}: {holes:,} of {values.size:,} points have no finite {column}; complete it first"
        )
    x, y = (edges(axis) for axis in surface.grid.axes)
    return values, quantity(surface.column(column)), (x[0], x[-1], y[0], y[-1])
