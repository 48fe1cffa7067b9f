"""A million points, thousands of workers: what must not grow with the size of a job."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distsurf.grid import Grid
from distsurf.surface import Column, SurfaceFile

GRID = Grid.parse({"x": "-1:1:1000", "y": "-1:1:1000"})
COLUMNS = tuple(Column(name) for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scale") / "s.h5"
    with SurfaceFile.create(path, GRID, COLUMNS) as file:
        points = GRID.coarse_to_fine()[: GRID.size // 2]
        file.record(points, np.random.default_rng(0).random((len(points), 4)), np.ones(len(points)))
    return path


def _writes(file: SurfaceFile, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what a commit writes."""
    sizes: list[int] = []
    real: Callable[[int, bytes | memoryview], None] = file._storage.write

    def write(offset: int, data: bytes | memoryview) -> None:
        sizes.append(memoryview(data).nbytes)
        real(offset, data)

    monkeypatch.setattr(file._storage, "write", write)
    return sizes


def test_a_commit_costs_what_it_brings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes and the same number of writes into a file that is half full as into one that is empty."""
    points = GRID.coarse_to_fine()[-1000:]
    costs = []
    for name in (path, path.with_name("empty.h5")):
        file = (
            SurfaceFile.open(name, write=True) if name.exists() else SurfaceFile.create(name, GRID, COLUMNS)
        )
        with file:
            sizes = _writes(file, monkeypatch)
            file.record(points, np.ones((1000, 4)), np.ones(1000))
            file.commit()
            costs.append((len(sizes), sum(size for size in sizes if size != 512)))  # 512: the writer's beat
    assert costs[0][1] == costs[1][1] < 1000 * 128
    assert abs(costs[0][0] - costs[1][0]) <= 1


def test_a_million_points_are_no_work_beyond_reading_them(path: Path) -> None:
    """Against one plain pass over the same bytes by zlib, in the same process: no loop over points in Python."""
    import zlib

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    text = path.read_bytes()
    width = 49
    yardstick = seconds(lambda: [zlib.crc32(text[i : i + width]) for i in range(0, 1_000_000 * width, width)])
    with SurfaceFile.open(path) as file:
        assert seconds(file.read) < 10 * yardstick
        assert seconds(file.problems) < 10 * yardstick
    assert seconds(lambda: SurfaceFile.open(path, write=True).close()) < 10 * yardstick
