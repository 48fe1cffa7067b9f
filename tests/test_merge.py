"""Merging: everything that shards have, once, bit for bit, or nothing and why."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from distsurf.cli import main
from distsurf.errors import DamagedFile, InputError
from distsurf.grid import Grid
from distsurf.merge import merge, missing_tasks
from distsurf.shards import ArrayShard
from distsurf.surface import Column, Status, Surface, SurfaceFile

GRID = Grid.parse({"x": "-1:1:7", "y": "0:2:5"})
COLUMNS = (Column("train_loss"), Column("train_accuracy", "%"))
COUNT = 4


def value(points: np.ndarray) -> np.ndarray:
    """A value for every point, NaN and infinity among them."""
    x, y = GRID.coordinates(points).T
    loss = np.where(points == 3, np.nan, np.where(points == 4, np.inf, np.sin(3 * x) + y / 7))
    return np.stack([loss, 100 * np.cos(x * y)], axis=1)


def write_shard(
    whole: Path, index: int, *, most: int = GRID.size, shift: float = 0.0, seed: str = "0", count: int = COUNT
) -> Path:
    """A shard's file with its first points."""
    shard = ArrayShard(index, count)
    path = shard.path(whole)
    facts = {"shard": str(shard), "created": "once"}
    with SurfaceFile.create(path, GRID, COLUMNS, fingerprint={"seed": seed}, facts=facts) as file:
        points = file.points()[:most]
        file.record(points, value(points) + shift, np.ones(len(points)))
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return tmp_path / "s.h5"


def require_truth(path: Path) -> Surface:
    surface = Surface.load(path)
    points = np.flatnonzero(surface.status.ravel() == Status.EVALUATED)
    for i, name in enumerate(surface.names):
        assert surface[name].ravel()[points].tobytes() == value(points)[:, i].tobytes()
    return surface


def test_all_shards_make_the_surface(whole: Path) -> None:
    paths = [write_shard(whole, index) for index in range(COUNT)]
    before = [path.read_bytes() for path in paths]
    merged = merge(whole)
    assert merged.surface.complete
    assert merged.sources == paths
    surface = require_truth(whole)
    assert surface.complete
    assert surface.shard is None
    assert surface.facts["shards"] == COUNT
    assert (surface.cost == 1).all()
    assert [path.read_bytes() for path in paths] == before


def test_merging_again_changes_nothing(whole: Path) -> None:
    for index in range(COUNT):
        write_shard(whole, index)
    assert merge(whole).is_new
    before = whole.stat()
    assert not merge(whole).is_new
    assert (whole.stat().st_ino, whole.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_missing_points_are_named_by_their_shards(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(whole, 0)
    write_shard(whole, 2, most=3)
    assert main(["merge", str(whole)]) == 3
    assert "missing: --array=1-3 (of 4 shards)" in capsys.readouterr().out
    assert main(["check", str(whole)]) == 3
    assert "missing: --array=1-3 (of 4 shards)" in capsys.readouterr().out
    assert require_truth(whole).count(Status.EVALUATED) == 9 + 3
    for index in (1, 3):
        write_shard(whole, index)
    assert main(["merge", str(whole)]) == 3
    assert "missing: --array=2 (" in capsys.readouterr().out
    ArrayShard(2, COUNT).path(whole).unlink()
    write_shard(whole, 2)
    assert main(["merge", str(whole), "--remove", "--no-pictures"]) == 0
    assert require_truth(whole).complete
    assert list(whole.parent.iterdir()) == [whole]


def test_what_was_merged_stays_when_its_shard_is_gone(whole: Path) -> None:
    write_shard(whole, 0).rename(whole.with_name("elsewhere.h5"))
    merge(whole, [whole.with_name("elsewhere.h5")])
    write_shard(whole, 1)
    merge(whole)
    assert require_truth(whole).count(Status.EVALUATED) == 18


def test_failed_points_keep_their_reason_until_they_have_a_value(whole: Path) -> None:
    path = write_shard(whole, 1, most=0)
    with SurfaceFile.open(path, write=True) as file:
        point = int(file.points()[0])
        file.record_failure(point, "out of memory")
    merged = merge(whole)
    assert merged.surface.failures == {point: "out of memory"}
    assert Surface.load(whole).failures == {point: "out of memory"}
    assert missing_tasks(merged.surface, 4) == [0, 1, 2, 3]
    path.unlink()
    write_shard(whole, 1)
    merge(whole)
    assert Surface.load(whole).failures == {}
    assert require_truth(whole).count(Status.FAILED) == 0


def test_a_shard_of_another_job_is_refused(whole: Path) -> None:
    write_shard(whole, 0)
    write_shard(whole, 1, seed="1")
    with pytest.raises(InputError, match=r"shard-1-of-4.h5 is of another job.*seed \(file 1, this job 0\)"):
        merge(whole)
    assert not whole.exists()


def test_a_shard_that_is_there_twice_is_one(whole: Path) -> None:
    shutil.copy(write_shard(whole, 0), ArrayShard(1, COUNT).path(whole))
    merged = merge(whole)
    assert require_truth(whole).count(Status.EVALUATED) == 9
    assert missing_tasks(merged.surface, 4) == [1, 2, 3]


def test_points_with_two_values_are_refused(whole: Path) -> None:
    write_shard(whole, 0)
    write_shard(whole, 0, count=2, shift=1e-15)
    with pytest.raises(
        InputError,
        match=r"points have different values in two files.*move one of the two away, or leave it out",
    ):
        merge(whole)
    assert not whole.exists()


def test_shards_of_other_sizes_go_together(whole: Path) -> None:
    write_shard(whole, 0, count=2)
    write_shard(whole, 1)
    write_shard(whole, 3)
    assert merge(whole).surface.complete
    assert require_truth(whole).complete


def test_a_damaged_shard_is_named_and_nothing_is_written(whole: Path) -> None:
    write_shard(whole, 0)
    path = write_shard(whole, 1)
    with SurfaceFile.open(path) as file:
        place = file._layout.places["train_loss"]
        offset = place.offset + 8 * int(file.points()[2])
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFile, match=r"shard-1-of-4.h5 is damaged"):
        merge(whole)
    assert not whole.exists()


def test_a_shard_that_is_being_written(whole: Path) -> None:
    """A merge in between takes whole points only, and disturbs nobody."""
    shard = ArrayShard(2, COUNT)
    with SurfaceFile.create(
        shard.path(whole), GRID, COLUMNS, fingerprint={"seed": "0"}, facts={"shard": str(shard)}
    ) as file:
        for point in file.points():
            file.record(np.array([point]), value(np.array([point])), np.ones(1))
            file.commit()
            merge(whole)
            require_truth(whole)
    assert missing_tasks(merge(whole).surface, 4) == [0, 1, 3]


def test_merges_at_the_same_time(whole: Path) -> None:
    for index in range(COUNT):
        write_shard(whole, index)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            merge(whole)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert require_truth(whole).complete
    assert len(list(whole.parent.iterdir())) == COUNT + 1


def test_a_surface_that_is_being_written_is_left_alone(whole: Path) -> None:
    write_shard(whole, 0)
    with (
        SurfaceFile.create(whole, GRID, COLUMNS, fingerprint={"seed": "0"}),
        pytest.raises(InputError, match="is being written by process"),
    ):
        merge(whole)


def test_there_has_to_be_something_to_merge(whole: Path) -> None:
    with pytest.raises(InputError, match=r"no shard of it beside it \(s.shard-I-of-N.h5"):
        merge(whole)
    path = write_shard(whole, 0)
    with pytest.raises(InputError, match="is shard 0/4 of a job; give the name of the whole surface"):
        merge(path, [path])
