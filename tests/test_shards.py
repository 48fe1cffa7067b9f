"""Shards of a job: every point in one of them, evenly, each a picture in itself; and how they are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsurf.errors import InputError
from distsurf.grid import Grid
from distsurf.shards import ArrayShard, as_array, shard_files, shard_in, shard_of_array_task


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_every_point_is_in_one_shard(x: int, y: int, count: int) -> None:
    grid = Grid.parse({"x": f"0:{x - 1}:{x}", "y": f"0:{y - 1}:{y}"})
    shards = [ArrayShard(index, count).points(grid) for index in range(count)]
    assert sorted(np.concatenate(shards).tolist()) == list(range(grid.size))
    sizes = [len(points) for points in shards]
    assert max(sizes) - min(sizes) <= 1


def test_a_shard_is_coarse_to_fine_in_itself() -> None:
    """The first points of each shard lie in every quarter of the grid."""
    grid = Grid.parse({"x": "-1:1:33", "y": "-1:1:33"})
    for index in range(8):
        begun = grid.coordinates(ArrayShard(index, 8).points(grid)[:36])
        quarters = {(x > 0, y > 0) for x, y in begun.tolist()}
        assert len(quarters) == 4


@pytest.mark.parametrize("text", ["8/8", "3", "-1/4", "a/b", "1/0", "1/2/3", "", "1 / 4", "9999999/99999999"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(InputError, match="expected I/N"):
        ArrayShard.parse(text)


def _task(index: int, count: int, least: int, most: int) -> dict[str, str]:
    numbers = {"ID": index, "COUNT": count, "MIN": least, "MAX": most}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


def test_an_array_task_is_a_shard() -> None:
    assert shard_of_array_task({}) is None
    assert shard_of_array_task(_task(3, 8, 0, 7)) == ArrayShard(3, 8)
    assert shard_of_array_task(_task(0, 1, 0, 0)) == ArrayShard(0, 1)


@pytest.mark.parametrize(("index", "count", "least", "most"), [(3, 4, 3, 9), (8, 8, 1, 8), (2, 4, 0, 6)])
def test_a_part_of_an_array_does_not_tell_the_shards(index: int, count: int, least: int, most: int) -> None:
    with pytest.raises(InputError, match=f"--shard {index}/N"):
        shard_of_array_task(_task(index, count, least, most))


@pytest.mark.parametrize("variable", ["PBS_ARRAY_INDEX", "LSB_JOBINDEX"])
def test_arrays_of_other_schedulers_have_to_be_told(variable: str) -> None:
    with pytest.raises(InputError, match=r"give --shard I/N"):
        shard_of_array_task({variable: "3"})
    assert shard_of_array_task({variable: "0"}) is None  # LSF's for a job that is no array


@given(st.sets(st.integers(0, 200), min_size=1))
def test_array_notation(indices: set[int]) -> None:
    read = set()
    for part in as_array(indices).split(","):
        first, _, last = part.partition("-")
        read |= set(range(int(first), int(last or first) + 1))
    assert read == indices


def test_array_notation_is_slurms() -> None:
    assert as_array([9, 3, 8, 7]) == "3,7-9"


def test_files_of_shards_are_found_by_name(tmp_path: Path) -> None:
    whole = tmp_path / "s.h5"
    shards = [ArrayShard(10, 12), ArrayShard(2, 12), ArrayShard(0, 3)]
    others = ["s.h5", "s.shard-3-of-3.h5", "s.shard-1-of-4.png", "t.shard-1-of-4.h5", "s.shard-x-of-4.h5"]
    for path in [*(shard.path(whole) for shard in shards), *(tmp_path / name for name in others)]:
        path.touch()
    assert list(shard_files(whole).values()) == [ArrayShard(0, 3), ArrayShard(2, 12), ArrayShard(10, 12)]
    assert shard_files(tmp_path / "nowhere" / "s.h5") == {}


@pytest.mark.parametrize("told", [None, 3, "7/3", ["0/2"], {}])
def test_facts_of_strangers_are_no_shard(told: object) -> None:
    assert shard_in({"shard": told}) is None
    assert shard_in({}) is None
