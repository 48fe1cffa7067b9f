from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distsurf.errors import InputError
from distsurf.grid import Grid
from distsurf.surface import Column, Status, Surface, SurfaceFile

GRID = Grid.parse({"x": "-1:1:5", "y": "0:3:4"})
COLUMNS = (Column("train_loss"), Column("train_accuracy", "%"))
FINGERPRINT = {"weights": "w", "grid": str(GRID)}


def _values(points: np.ndarray) -> np.ndarray:
    return np.stack([points * 1.5, -points], axis=1).astype(np.float64)


def _record(file: SurfaceFile, points: list[int]) -> None:
    p = np.array(points, np.int64)
    file.record(p, _values(p), np.full(len(p), 0.25))


@pytest.fixture(params=["disk", "memory"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> SurfaceFile:
    about = {"job": "a = 1", "fingerprint": FINGERPRINT, "facts": {"torch": "2"}}
    if request.param == "memory":
        return SurfaceFile.memory(GRID, COLUMNS, **about)
    return SurfaceFile.create(tmp_path / "s.h5", GRID, COLUMNS, **about)


def test_values_land_at_their_points(file: SurfaceFile) -> None:
    _record(file, [7, 3])
    _record(file, [19])
    file.record_failure(4, "boom " + "x" * 1000)
    file.commit()
    surface = file.read()
    expected = np.full(20, np.nan)
    expected[[3, 7, 19]] = np.array([3, 7, 19]) * 1.5
    np.testing.assert_array_equal(surface["loss"], expected.reshape(4, 5))
    assert surface["train_accuracy"][1, 2] == -7
    status = np.zeros(20)
    status[[3, 7, 19]] = Status.EVALUATED
    status[4] = Status.FAILED
    np.testing.assert_array_equal(surface.status, status.reshape(4, 5))
    assert surface.failures[4].startswith("boom xxx")
    assert surface.cost.ravel()[7] == 0.25
    assert (surface.job, surface.fingerprint, surface.facts) == ("a = 1", FINGERPRINT, {"torch": "2"})


def test_failed_point_that_succeeds_later_has_no_reason(file: SurfaceFile) -> None:
    for point in range(20):
        file.record_failure(point, f"reason {point}")
    file.commit()
    _record(file, [4])
    file.commit()
    file.record_failure(5, "other")
    file.commit()
    failures = file.read().failures
    assert 4 not in failures
    assert failures[5] == "other"
    assert len(failures) == 19


def test_a_value_that_comes_after_a_failure_counts(file: SurfaceFile) -> None:
    """Given up, and then evaluated after all by a rank that came back: also within one commit."""
    file.record_failure(4, "no sign of life")
    _record(file, [4, 5])
    assert file.read().count(Status.EVALUATED) == 2
    file.commit()
    surface = file.read()
    assert surface.failures == {}
    assert surface["loss"].ravel()[4] == 6.0
    assert file.problems() == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0, 5e-324, -7.25])
def test_every_float_comes_back_bit_for_bit(file: SurfaceFile, value: float) -> None:
    file.record(np.array([2]), np.array([[value, value]]), np.array([0.1]))
    file.commit()
    surface = file.read()
    assert surface["loss"].ravel()[2].tobytes() == np.float64(value).tobytes()
    assert surface.status.ravel()[2] == Status.EVALUATED


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.data())
def test_any_grouping_of_points_into_records_and_commits(data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(20)))
    file = SurfaceFile.memory(GRID, COLUMNS)
    while order:
        n = data.draw(st.integers(1, len(order)))
        _record(file, list(order[:n]))
        order = order[n:]
        if data.draw(st.booleans()):
            file.commit()
    file.commit()
    surface = file.read()
    assert surface.complete
    np.testing.assert_array_equal(surface["loss"].ravel(), np.arange(20) * 1.5)


def test_nothing_in_the_file_moves_after_creation(tmp_path: Path) -> None:
    """Measured to be what survives kill -9: every dataset keeps its place and the file its size."""

    def places(path: Path) -> dict[str, int]:
        found: dict[str, int] = {}
        with h5py.File(path) as h5:
            h5.visititems(
                lambda name, d: (
                    found.update({name: d.id.get_offset()}) if isinstance(d, h5py.Dataset) else None
                )
            )
        return found

    path = tmp_path / "s.h5"
    SurfaceFile.create(path, GRID, COLUMNS).close()
    before, size = places(path), path.stat().st_size
    assert all(place is not None for place in before.values())
    with SurfaceFile.open(path, write=True) as file:
        _record(file, list(range(19)))
        file.record_failure(19, "x")
    assert places(path) == before
    assert path.stat().st_size == size


def test_xarray_sees_labelled_axes(tmp_path: Path) -> None:
    with SurfaceFile.create(tmp_path / "s.h5", GRID, COLUMNS) as file:
        _record(file, list(range(20)))
    with xarray.open_dataset(tmp_path / "s.h5", engine="h5netcdf") as data:
        assert data["train_loss"].dims == ("y", "x")
        np.testing.assert_array_equal(data["x"], GRID.axes[0].values)
        assert float(data["train_loss"].sel(x=0.5, y=2.0)) == (2 * 5 + 3) * 1.5
        assert data["train_accuracy"].attrs["units"] == "%"
    in_memory = Surface.load(tmp_path / "s.h5").to_xarray()
    assert float(in_memory["train_loss"].sel(x=0.5, y=2.0)) == 13 * 1.5


@pytest.mark.parametrize(
    "axes", [{"x": "0:1:3"}, {"x": "0:0:1"}, {"x": "0:1:2", "y": "0:1:3", "z": "-1:0:4"}]
)
def test_one_and_three_axes(tmp_path: Path, axes: dict[str, str]) -> None:
    grid = Grid.parse(axes)
    with SurfaceFile.create(tmp_path / "s.h5", grid, COLUMNS) as file:
        points = grid.coarse_to_fine()
        file.record(points, _values(points), np.ones(grid.size))
    surface = Surface.load(tmp_path / "s.h5")
    assert surface.complete
    np.testing.assert_array_equal(surface["loss"], (np.arange(grid.size) * 1.5).reshape(grid.shape))


def test_mismatch_names_the_fields(file: SurfaceFile) -> None:
    file.require(dict(FINGERPRINT))
    with pytest.raises(InputError) as error:
        file.require({"weights": "other", "grid": str(GRID), "data": "d"})
    assert "weights (file w, this job other)" in str(error.value)
    assert "data (file none, this job d)" in str(error.value)
    assert "grid" not in str(error.value)


def test_save_and_load_are_inverse(file: SurfaceFile, tmp_path: Path) -> None:
    _record(file, [1, 2, 3])
    file.record_failure(9, "why")
    file.commit()
    surface = file.read()
    surface.save(tmp_path / "copy.h5")
    again = Surface.load(tmp_path / "copy.h5")
    np.testing.assert_array_equal(again["loss"], surface["loss"])
    np.testing.assert_array_equal(again.status, surface.status)
    assert (again.failures, again.fingerprint, again.columns) == (
        {9: "why"},
        surface.fingerprint,
        surface.columns,
    )
    surface.is_writer = False
    surface.save(tmp_path / "none.h5")
    assert not (tmp_path / "none.h5").exists()


def test_what_is_no_surface_file(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("hello")
    (tmp_path / "empty.h5").write_bytes(b"")
    (tmp_path / "folder.h5").mkdir()
    with h5py.File(tmp_path / "other.h5", "w") as h5:
        h5["x"] = 1
    for name, words in (
        ("none.h5", "no surface file"),
        ("folder.h5", "no surface file"),
        ("text.h5", "not a surface file"),
        ("empty.h5", "not a surface file"),
        ("other.h5", "not a surface file"),
    ):
        with pytest.raises(InputError, match=words):
            SurfaceFile.open(tmp_path / name)


def test_the_header_is_text_that_begins_the_file(tmp_path: Path) -> None:
    """The checksum is zlib's, and HDF5 finds its own part behind the header."""
    SurfaceFile.create(tmp_path / "s.h5", GRID, COLUMNS, job='name = "größe"').close()
    whole = (tmp_path / "s.h5").read_bytes()
    line, body = whole.split(b"\n", 1)
    name, length, checksum = line.split()
    assert name == b"distsurf-surface-2"
    assert zlib.crc32(body[: int(length)]) == int(checksum, 16)
    assert json.loads(body[: int(length)])["job"] == 'name = "größe"'
    assert h5py.is_hdf5(tmp_path / "s.h5")


def test_checksums_are_those_of_zlib(tmp_path: Path) -> None:
    with SurfaceFile.create(tmp_path / "s.h5", GRID, COLUMNS) as file:
        _record(file, [7, 3])
    with h5py.File(tmp_path / "s.h5") as h5:
        stored = h5["state/checksum"][...].ravel()
        assert h5["state/totals"][...].tolist() == [2, 2]
    for point in (3, 7):
        record = struct.pack("<q3dB", point, point * 1.5, -point, 0.25, 1)
        assert stored[point] == zlib.crc32(record)


def test_creation_replaces_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    SurfaceFile.create(path, GRID, COLUMNS, job="first").close()
    with pytest.raises(InputError, match="just been made by another process"):
        SurfaceFile.create(path, GRID, COLUMNS, job="second")
    with pytest.raises(InputError, match="bytes long"):
        SurfaceFile.create(tmp_path / "t.h5", GRID, COLUMNS, job="x" * 70_000)
    assert SurfaceFile.open(path).job == "first"
    assert os.listdir(tmp_path) == ["s.h5"]


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the folder"):
        SurfaceFile.create(tmp_path / "file" / "s.h5", GRID, COLUMNS)


def test_column_names_of_the_file_are_refused() -> None:
    with pytest.raises(InputError, match="none of cost"):
        SurfaceFile.memory(GRID, (Column("status"),))


WRITER = """
import sys, numpy as np
from distsurf.grid import Grid
from distsurf.surface import Column, SurfaceFile
grid = Grid.parse({"x": "0:1:60", "y": "0:1:60"})
file = SurfaceFile.create(sys.argv[1], grid, (Column("loss"),))
print("ready", flush=True)
for point in grid.coarse_to_fine():
    file.record(np.array([point]), np.array([[float(point)]]), np.ones(1))
    file.commit()
"""


@pytest.mark.parametrize("delay", range(5))
def test_kill_at_any_moment_leaves_whole_values(tmp_path: Path, delay: int) -> None:
    path = tmp_path / "s.h5"
    process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    done = 0
    while done <= 40 * delay:  # a different moment each time, seen through the file itself
        with SurfaceFile.open(path) as reader:
            done = reader.read().count(Status.EVALUATED)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with SurfaceFile.open(path, write=True) as file:
        assert file.problems() == []
        surface = file.read()
    evaluated = surface.status.ravel() == Status.EVALUATED
    assert evaluated.sum() >= done
    np.testing.assert_array_equal(surface["loss"].ravel()[evaluated], np.flatnonzero(evaluated).astype(float))
