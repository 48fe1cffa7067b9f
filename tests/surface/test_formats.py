"""Files of others: what is written is read by other programs' libraries, and theirs is read as they meant it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import h5py
import meshio
import numpy as np
import pytest
import xarray

from distsurf.cli import main
from distsurf.errors import InputError
from distsurf.grid import Grid
from distsurf.surface import Column, Status, Surface
from distsurf.surface.formats import export, read_li2018


def surface_of(axes: dict[str, str]) -> Surface:
    """x + 10 y (+ 100 z) + 20, but for a pending point, a failed one, a NaN and an infinity."""
    grid = Grid.parse(axes)
    points = np.arange(grid.size)
    values = grid.coordinates(points) @ [1.0, 10.0, 100.0][: len(axes)] + 20
    values[2], values[3] = np.nan, np.inf
    status = np.full(grid.size, Status.EVALUATED, np.uint8)
    status[0], status[1] = Status.PENDING, Status.FAILED
    values[:2] = np.nan
    columns = Column("train_loss"), Column("train_accuracy", "%")
    both = {column.name: values.reshape(grid.shape) / (k + 1) for k, column in enumerate(columns)}
    shaped = status.reshape(grid.shape)
    return Surface(
        grid, columns, both, shaped, np.ones(grid.shape), {1: "why"}, "name = 'x'", facts={"name": "Ünïque"}
    )


AXES: list[dict[str, str]] = [
    {"x": "0:1:6"},
    {"x": "-1:1:5", "y": "0:2:3"},
    {"x": "0:1:2", "y": "0:1:3", "z": "0:1:4"},
]


@pytest.mark.parametrize("axes", AXES)
def test_arrays_and_tables_have_every_value(tmp_path: Path, axes: dict[str, str]) -> None:
    surface = surface_of(axes)
    for to in ("npz", "csv", "json", "netcdf"):
        export(surface, tmp_path / to, to)
    loss = surface["loss"]
    with np.load(tmp_path / "npz") as found:
        np.testing.assert_array_equal(found["train_loss"], loss)
        np.testing.assert_array_equal(found["x"], surface.x)
        np.testing.assert_array_equal(found["status"], surface.status)
        assert str(found["job"]) == surface.job
    rows = list(csv.DictReader((tmp_path / "csv").open()))
    assert [row["status"] for row in rows[:3]] == ["pending", "failed", "evaluated"]
    assert (rows[0]["train_loss"], rows[2]["train_loss"], rows[3]["train_loss"]) == ("", "nan", "inf")
    np.testing.assert_array_equal(
        [float(row["train_accuracy"]) for row in rows[4:]], surface["accuracy"].ravel()[4:]
    )
    last = [float(rows[-1][name]) for name in axes]
    assert tuple(last) == surface.grid.coordinates_of(surface.grid.size - 1)
    told = json.loads((tmp_path / "json").read_text())
    flat = np.array(told["columns"]["train_loss"], dtype=object).ravel().tolist()
    assert flat[:4] == [None, None, "NaN", "Infinity"]
    np.testing.assert_array_equal(np.array(flat[4:], float), loss.ravel()[4:])
    with xarray.open_dataset(tmp_path / "netcdf", engine="h5netcdf") as data:
        np.testing.assert_array_equal(data["train_loss"].values, loss)
        np.testing.assert_array_equal(data["x"].values, surface.x)


@pytest.mark.parametrize("axes", AXES)
def test_grids_for_paraview(tmp_path: Path, axes: dict[str, str]) -> None:
    """Read by meshio: points, cells between neighbours, and values at the points."""
    surface = surface_of(axes)
    export(surface, tmp_path / "s.vtk", "vtk")
    mesh = meshio.read(tmp_path / "s.vtk")
    at = surface.grid.coordinates(np.arange(surface.grid.size))
    np.testing.assert_array_equal(mesh.points[:, : at.shape[1]], at)
    np.testing.assert_array_equal(mesh.point_data["train_loss"].ravel(), surface["loss"].ravel())
    np.testing.assert_array_equal(
        mesh.point_data["log10_train_loss"].ravel(), np.log10(surface["loss"].ravel())
    )
    assert "log10_train_accuracy" not in mesh.point_data
    cells = sum(len(block.data) for block in mesh.cells)
    assert cells == np.prod([max(axis.count - 1, 1) for axis in surface.grid.axes])
    if len(axes) == 3:
        with pytest.raises(InputError, match="a volume has no height"):
            export(surface, tmp_path / "s.vtk", "vtk", "loss")
        return
    surface["loss"].ravel()[3] = 20.0
    export(surface, tmp_path / "h.vtk", "vtk", "loss")
    height = meshio.read(tmp_path / "h.vtk").points[:, len(axes)]
    loss = surface["loss"].ravel()
    width = surface.x[-1] - surface.x[0]
    np.testing.assert_allclose(
        height[3:], (loss[3:] - np.nanmin(loss)) / np.ptp(loss[3:].clip(np.nanmin(loss))) * width
    )
    assert (height[:3] == 0).all()


def _written_by_the_public_code(
    path: Path, x: np.ndarray, y: np.ndarray, values: np.ndarray, **more: Any
) -> None:
    """As it does: an array of shape (nx, ny), filled flat in the order of a mesh grid, −1 before."""
    mesh = np.meshgrid(x, y)
    losses = -np.ones((len(x), len(y)))
    for index in range(len(mesh[0].ravel())):
        if values[index] is not None:
            losses.ravel()[index] = values[index]
    with h5py.File(path, "w") as file:
        file["xcoordinates"], file["ycoordinates"], file["dir_file"] = x, y, "weights_xignore=biasbn.h5"
        file["train_loss"], file["train_acc"] = losses, losses * 2
        for name, value in more.items():
            del file[name]
            file[name] = value


def test_surfaces_of_the_public_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = np.linspace(-1, 1, 5), np.linspace(0, 2, 3)
    mesh = np.meshgrid(x, y)
    expected = (mesh[0] + 10 * mesh[1] + 3).ravel().tolist()
    _written_by_the_public_code(
        tmp_path / "a.h5", x, y, np.array([None, float("nan"), 0.0, *expected[3:]], object)
    )
    surface = read_li2018(tmp_path / "a.h5")
    assert surface.names == ("train_loss", "train_accuracy")
    np.testing.assert_array_equal(surface["loss"].ravel()[3:], expected[3:])
    assert surface["loss"][1, 2] == mesh[0][1, 2] + 10 * mesh[1][1, 2] + 3  # [y, x]
    assert surface.status.ravel()[:3].tolist() == [Status.PENDING, Status.EVALUATED, Status.EVALUATED]
    assert main(["import", str(tmp_path / "a.h5"), "-o", str(tmp_path / "b.h5")]) == 0
    assert "5 × 3 points: 1 pending, 14 evaluated" in capsys.readouterr().out
    assert main(["plot", str(tmp_path / "b.h5")]) == 0
    # And out again, as its plotting scripts take it: a mesh grid's shape, under its names.
    assert main(["export", str(tmp_path / "b.h5"), "--to", "li2018"]) == 0
    with h5py.File(tmp_path / "b.li2018.h5", "r") as file:
        across, up = np.meshgrid(file["xcoordinates"][:], file["ycoordinates"][:])
        assert file["train_loss"].shape == across.shape
        np.testing.assert_allclose(file["train_loss"][1:], (across + 10 * up + 3)[1:])
        assert (file["train_loss"][0, 0], file["train_acc"][0, 0]) == (-1, -1)
    again = read_li2018(tmp_path / "b.li2018.h5")
    for name in surface.names:
        np.testing.assert_array_equal(again[name], surface[name])


def test_lines_of_the_public_code(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["xcoordinates"] = np.linspace(-0.5, 1.5, 401)
        file["train_loss"], file["test_loss"] = np.arange(401.0), np.arange(401.0) + 1
    surface = read_li2018(tmp_path / "a.h5")
    assert str(surface.grid) == "x=-0.5:1.5:401"
    assert surface.names == ("train_loss", "test_loss")
    assert surface.complete


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"xcoordinates": [0.0, 1, 3]}, "xcoordinates are not evenly spaced"),
        ({"xcoordinates": [0.0, np.nan, 1]}, "xcoordinates are no list of numbers"),
        ({"train_loss": np.zeros(3)}, "train_loss has 3 values, the grid x=0:1:3 y=0:1:3 has 9 points"),
    ],
)
def test_what_is_not_theirs_is_told(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    axis = np.linspace(0, 1, 3)
    _written_by_the_public_code(tmp_path / "a.h5", axis, axis, np.zeros(9), **change)
    with pytest.raises(InputError, match=words):
        read_li2018(tmp_path / "a.h5")


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    surface = surface_of(AXES[1])
    surface.save(tmp_path / "s.h5")
    (tmp_path / "text.h5").write_text("nothing")
    ours, volume = str(tmp_path / "s.h5"), surface_of(AXES[2])
    volume.save(tmp_path / "v.h5")
    for command, words in (
        (["import", ours], "s.h5 is no surface of Li et al.'s code (xcoordinates, train_loss): it has"),
        (["import", str(tmp_path / "text.h5")], "text.h5 cannot be read"),
        (["export", ours, "--to", "xlsx"], "invalid choice: 'xlsx'"),
        (["export", ours, "--to", "csv", "--height", "loss"], "--height is for vtk"),
        (["export", ours, "--to", "vtk", "--height", "depth"], "the surface has no column 'depth'"),
        (["export", ours, "--to", "npz", "-o", ours], "is the surface itself"),
        (["export", ours, "--to", "npz", "-o", str(tmp_path / "text.h5")], "text.h5 exists; remove it"),
        (["export", str(tmp_path / "v.h5"), "--to", "li2018"], "li2018 has surfaces of one or two axes"),
    ):
        assert main(command) == 1
        told = capsys.readouterr().err
        assert words in told
        assert told.count("\n") == 1
