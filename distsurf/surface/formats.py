"""Surfaces in the formats of others: the layout of Li et al.'s public code, and tables and grids for other programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from distsurf.errors import InputError
from distsurf.evaluator import Column
from distsurf.files import replacing
from distsurf.grid import Axis, Grid
from distsurf.surface.surface import DONE, Status, Surface

Floats = NDArray[np.float64]

PENDING = -1.0
"""What the public code of Li et al. has where nothing is evaluated yet."""
THEIR_NAMES = {
    "train_loss": "loss",
    "train_acc": "accuracy",
    "test_loss": "test_loss",
    "test_acc": "test_accuracy",
}
EVEN = 1e-6
"""By how much of a step coordinates may be off an even spacing."""


# -- out --------------------------------------------------------------------------------------------------


def export(surface: Surface, path: Path, to: str, height: str | None = None) -> None:
    """Write a surface as ``to`` (one of `WRITERS`) under a temporary name, then rename it.

    ``height``: for vtk, the column that lifts the points. Raises InputError for what the format cannot hold.
    """
    if to not in WRITERS:
        raise InputError(f"no format {to!r}; expected {', '.join(WRITERS)}")
    if height is not None and to != "vtk":
        raise InputError("--height is for vtk")
    write = WRITERS[to]
    with replacing(path) as temporary:
        if height is None:
            write(surface, temporary)
        else:
            _vtk(surface, temporary, height)


def _npz(surface: Surface, path: Path) -> None:
    """Axes, columns ``[y, x]``, status and cost, by their names; job and facts as text."""
    with open(path, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **_axes(surface), **_arrays(surface), **_texts(surface))


def _axes(surface: Surface) -> dict[str, Floats]:
    return {name: axis.values for name, axis in zip(surface.grid.names, surface.grid.axes, strict=True)}


def _arrays(surface: Surface) -> dict[str, Any]:
    return {**surface.values, "status": surface.status, "cost": surface.cost}


def _texts(surface: Surface) -> dict[str, Any]:
    return {"job": surface.job, "facts": json.dumps(dict(surface.facts))}


def _csv(surface: Surface, path: Path) -> None:
    """A row for every point, in the order of the arrays; cells without a value are empty."""
    coordinates = surface.grid.coordinates(np.arange(surface.grid.size))
    columns = [surface.values[name].ravel() for name in surface.names]
    status = surface.status.ravel()
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*surface.grid.names, *surface.names, "status"])
        for i, at in enumerate(coordinates.tolist()):
            has = status[i] in DONE
            values = [repr(float(column[i])) if has else "" for column in columns]
            writer.writerow([*map(repr, at), *values, Status(status[i]).name.lower()])


def _json(surface: Surface, path: Path) -> None:
    """Nested lists ``[y][x]``. null where there is no value; "NaN", "Infinity", "-Infinity" where that is the value."""
    done = np.isin(surface.status, DONE)

    def listed(values: Any, has: Any) -> Any:
        if values.ndim:
            return [listed(*row) for row in zip(values, has, strict=True)]
        value = float(values)
        return None if not has else value if math.isfinite(value) else json.dumps(value)

    told = {
        "axes": {name: values.tolist() for name, values in _axes(surface).items()},
        "columns": {name: listed(values, done) for name, values in surface.values.items()},
        "units": {column.name: column.unit for column in surface.columns},
        "status": surface.status.tolist(),
        **_texts(surface),
    }
    path.write_text(json.dumps(told, allow_nan=False) + "\n")


def _netcdf(surface: Surface, path: Path) -> None:
    """netCDF-4, as `Surface.to_xarray`."""
    try:
        surface.to_xarray().to_netcdf(path, engine="h5netcdf")
    except ImportError as error:
        raise InputError(
            f"netcdf needs xarray and h5netcdf: pip install 'distsurf[xarray]' ({error})"
        ) from error


def _vtk(surface: Surface, path: Path, height: str | None = None) -> None:
    """A structured grid (legacy VTK, binary) with every column as point data, and log10 of those that are positive.

    With ``height`` points are lifted by that column, scaled to the width of the first axis; where it is not finite,
    they stay at the bottom.
    """
    if surface.grid.repeated:
        raise InputError("vtk would join what are independent planes; give --repeat NUMBER")
    axes = [axis.values for axis in surface.grid.axes]
    counts = [*surface.grid.shape[::-1], 1, 1][:3]
    points = np.zeros((surface.grid.size, 3))
    points[:, : len(axes)] = surface.grid.coordinates(np.arange(surface.grid.size))
    if height is not None:
        if len(axes) > 2:
            raise InputError("--height: a volume has no height; leave it out")
        values = surface[height].ravel()
        finite = np.isfinite(values)
        low, high = (float(f(values[finite])) for f in (np.min, np.max)) if finite.any() else (0.0, 0.0)
        width = surface.grid.axes[0].high - surface.grid.axes[0].low
        lifted = (np.where(finite, values, low) - low) / ((high - low) or 1.0) * (width or 1.0)
        points[:, len(axes)] = lifted
    data = {column.name: surface.values[column.name].ravel() for column in surface.columns}
    for column in surface.columns:
        values = data[column.name]
        if not column.unit and np.isfinite(values).any() and (values[np.isfinite(values)] > 0).all():
            data[f"log10_{column.name}"] = np.log10(values)
    with open(path, "wb") as file:
        name = str(surface.facts.get("name", "surface"))
        title = "".join(c if c.isascii() and c.isprintable() else " " for c in name)
        file.write(f"# vtk DataFile Version 3.0\n{title[:250]}\nBINARY\nDATASET STRUCTURED_GRID\n".encode())
        file.write(f"DIMENSIONS {counts[0]} {counts[1]} {counts[2]}\nPOINTS {len(points)} double\n".encode())
        file.write(points.astype(">f8").tobytes() + b"\n")
        file.write(f"POINT_DATA {len(points)}\n".encode())
        for name, values in {**data, "status": surface.status.ravel().astype(float)}.items():
            file.write(f"SCALARS {name.replace(' ', '_')} double 1\nLOOKUP_TABLE default\n".encode())
            file.write(values.astype(">f8").tobytes() + b"\n")


def _li2018(surface: Surface, path: Path) -> None:
    """Datasets as the public code's plotting scripts read them, ``[y, x]``; −1 where there is no value."""
    if surface.grid.repeated:
        raise InputError("li2018 has single surfaces, and this one is repeated: give --repeat NUMBER")
    if len(surface.grid.axes) > 2:
        raise InputError("li2018 has surfaces of one or two axes")
    done = np.isin(surface.status, DONE)
    with h5py.File(path, "w") as file:
        for name, values in _axes(surface).items():
            file[f"{name}coordinates"] = values
        for theirs, column in _theirs(surface).items():
            file[theirs] = np.where(done, surface.values[column.name], PENDING)
        file["dir_file"] = str(surface.facts.get("name", "distsurf"))


def _theirs(surface: Surface) -> dict[str, Column]:
    """The public code's names of columns that it has."""
    found = {}
    for theirs, ours in THEIR_NAMES.items():
        names = {column.name: column for column in surface.columns}
        split, _, quantity = ours.rpartition("_")
        for name in (f"{split or 'train'}_{quantity}", *(() if split else (quantity,))):
            if name in names:
                found[theirs] = names[name]
                break
    if not found:
        raise InputError(f"li2018 has losses and accuracies; the surface has {', '.join(surface.names)}")
    return found


WRITERS: dict[str, Callable[[Surface, Path], None]] = {
    "li2018": _li2018,
    "npz": _npz,
    "csv": _csv,
    "json": _json,
    "vtk": _vtk,
    "netcdf": _netcdf,
}
SUFFIXES = {
    "li2018": ".li2018.h5",
    "npz": ".npz",
    "csv": ".csv",
    "json": ".json",
    "vtk": ".vtk",
    "netcdf": ".nc",
}


# -- in ---------------------------------------------------------------------------------------------------


def read_li2018(path: Path) -> Surface:
    """A surface of Li et al.'s public code: −1 is pending, and arrays of grids that are not square are put right.

    That code fills an array of shape (nx, ny) with values in the order of ``[y, x]``. Raises InputError for what is no
    such file, and for coordinates that are not evenly spaced.
    """
    try:
        with h5py.File(path, "r") as file:
            names = [name for name in THEIR_NAMES if name in file]
            if "xcoordinates" not in file or not names:
                has = ", ".join(file) or "nothing"
                raise InputError(
                    f"{path} is no surface of Li et al.'s code (xcoordinates, train_loss): it has {has}"
                )
            axes = [_axis(np.asarray(file[f"{n}coordinates"]), n) for n in "xy" if f"{n}coordinates" in file]
            raw = {name: np.asarray(file[name], np.float64) for name in names}
            directions = np.asarray(file["dir_file"]).item() if "dir_file" in file else b""
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    grid = Grid(tuple(axes))
    for name, values in raw.items():
        if values.size != grid.size:
            raise InputError(
                f"{path}: {name} has {values.size:,} values, the grid {grid} has {grid.size:,} points"
            )
    columns = {
        name: Column(name.replace("_acc", "_accuracy"), "%" if name.endswith("_acc") else "")
        for name in names
    }
    # In memory values lie in the order of [y, x], whatever shape the code gave them.
    ordered = {name: values.reshape(grid.shape) for name, values in raw.items()}
    pending = np.any([values == PENDING for values in ordered.values()], axis=0)
    status = np.where(pending, Status.PENDING, Status.EVALUATED).astype(np.uint8)
    told = directions.decode(errors="replace") if isinstance(directions, bytes) else str(directions)
    return Surface(
        grid,
        tuple(columns.values()),
        {columns[name].name: np.where(pending, np.nan, values) for name, values in ordered.items()},
        status,
        np.full(grid.shape, np.nan),
        fingerprint={"imported": "li2018", "directions": told, "grid": str(grid)},
        facts={"name": path.stem, "imported": str(path.name), "directions": told},
    )


def _axis(values: Floats, name: str) -> Axis:
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise InputError(f"{name}coordinates are no list of numbers")
    axis = Axis(float(values[0]), float(values[-1]), len(values))
    step = (axis.high - axis.low) / max(len(values) - 1, 1)
    if np.abs(values - axis.values).max() > EVEN * step:
        raise InputError(f"{name}coordinates are not evenly spaced, and a grid's axes are")
    return axis
