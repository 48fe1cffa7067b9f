"""One call for every picture of a surface: choose the kind that fits its grid, draw, save."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distsurf.errors import InputError
from distsurf.files import replacing
from distsurf.surface.surface import Surface
from distsurf.view import style
from distsurf.view.contours import contour, slices
from distsurf.view.curves import curves
from distsurf.view.points import fitting_kinds
from distsurf.view.relief import surface3d

KINDS: dict[str, Callable[..., Figure]] = {
    "curves": curves,
    "contour": contour,
    "surface": surface3d,
    "slices": slices,
}
SUFFIXES = (".png", ".pdf", ".svg")


def plot(
    surface: Surface,
    column: str = "loss",
    *,
    kind: str | None = None,
    path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Figure:
    """Draw a column of a surface and, with ``path``, save it as .png, .pdf or .svg.

    ``kind`` is curves, contour, surface or slices, by default the one that fits the number of axes;
    ``options`` are those of the function of that kind. Curves show losses and accuracies together unless
    another column is named. Raises InputError for a kind that does not fit the grid, an unknown column or
    option, and a path that cannot be written.
    """
    kind = fitting_kinds(surface)[0] if kind is None else kind
    if kind not in KINDS:
        raise InputError(f"no kind of picture is named {kind!r}; expected {', '.join(KINDS)}")
    draw = KINDS[kind]
    known = [
        name for name in inspect.signature(draw).parameters if name not in ("surface", "column", "columns")
    ]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"{kind} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    target = None if path is None else checked(Path(path))
    figure = draw(surface, None if kind == "curves" and column == "loss" else column, **options)
    if target is not None:
        save(figure, target)
    return figure


def checked(path: Path) -> Path:
    """``path`` if a picture can be written there; said before the work of drawing."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"cannot save a picture as {path.name!r}: expected a name in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise InputError(f"cannot save {path}: there is no folder {path.parent}")
    return path


def save(figure: Figure, path: Path) -> None:
    """Write a picture. Raises InputError where that cannot be."""
    path = checked(path)
    try:
        with replacing(path) as temporary, style.drawing():
            figure.savefig(
                temporary, format=path.suffix[1:].lower(), dpi=200, bbox_inches="tight", pad_inches=0.03
            )
    except OSError as error:
        raise InputError(f"cannot save {path}: {error.strerror or error}") from None
