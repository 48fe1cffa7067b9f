"""A job cut into shards that are evaluated apart, each into a file of its own: arrays of jobs on a cluster.

Shard I of N has every N-th point of the coarse-to-fine order, from the I-th on: shards differ by one point at most, and
each one is coarse-to-fine in itself. `distsurf.merge` puts their files together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distsurf.errors import InputError
from distsurf.grid import Grid

MOST_SHARDS = 100_000
_NAME = re.compile(r"(.+)\.shard-(\d{1,6})-of-(\d{1,6})(\.\w+)?")


@dataclass(frozen=True)
class ArrayShard:
    """Shard ``index`` of ``count``, counted from 0 as array tasks are."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_SHARDS or not 0 <= self.index < self.count:
            raise InputError(
                f"shard {self}: expected I/N with 0 <= I < N, for example 0/8 for the first of 8"
            )

    @classmethod
    def parse(cls, text: str) -> ArrayShard:
        """Read ``I/N``."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None:
            raise InputError(f"shard {text!r}: expected I/N, for example 0/8 for the first of 8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def points(self, grid: Grid) -> NDArray[np.int64]:
        """Its points' indices, coarse-to-fine."""
        return grid.coarse_to_fine()[self.index :: self.count]

    def path(self, whole: Path) -> Path:
        """The shard's own file, beside the one of the whole surface."""
        return whole.with_name(f"{whole.stem}.shard-{self.index}-of-{self.count}{whole.suffix}")


def shard_files(whole: Path) -> dict[Path, ArrayShard]:
    """The files of shards that lie beside a surface's own file, by their names, in the order of their numbers."""
    found = {}
    if whole.parent.is_dir():
        for path in whole.parent.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and match[1] + (match[4] or "") == whole.name:
                with suppress(InputError):
                    found[path] = ArrayShard(int(match[2]), int(match[3]))
    return dict(sorted(found.items(), key=lambda item: (item[1].count, item[1].index)))


def surfaces_in(folder: Path) -> dict[Path, dict[Path, ArrayShard]]:
    """Every surface in a folder that is there or has shards there, with its shards."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    wholes = {found[1] + (found[4] or "") for name in names if (found := _NAME.fullmatch(name))}
    wholes |= {name for name in names if name.endswith(".h5") and not _NAME.fullmatch(name)}
    return {folder / name: shard_files(folder / name) for name in sorted(wholes)}


def shard_of_array_task(environment: Mapping[str, str] = os.environ) -> ArrayShard | None:
    """The shard that a SLURM array task is, if this is one. Raises InputError where the array is not 0 to N-1.

    A part of an array (``--array=3,7-9``) does not tell of how many shards the job is, nor do arrays of PBS and LSF:
    each of their tasks would do the whole job.
    """
    for scheduler, variable in (("PBS", "PBS_ARRAY_INDEX"), ("LSF", "LSB_JOBINDEX")):
        if environment.get(variable, "0") != "0" and "SLURM_JOB_ID" not in environment:
            raise InputError(
                f"task {environment[variable]} of an array of {scheduler}'s: give --shard I/N, with I from 0 to N-1 "
                f"(from ${variable}), or 0/1 for the whole job"
            )
    told = [environment.get(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT", "MIN", "MAX")]
    if told[0] is None or told[1] is None:
        return None
    index, count, least, most = (int(text or -1) for text in told)
    if (least, most) not in {(0, count - 1), (-1, -1)}:
        raise InputError(
            f"array task {index}: the array is not 0-{count - 1}, so its tasks do not tell of how many shards they are "
            f"parts; give --shard {index}/N with the N of the whole array (0/1 for the whole job)"
        )
    return ArrayShard(index, count)


def shard_in(facts: Mapping[str, Any]) -> ArrayShard | None:
    """The shard that a file's facts say it is of; None if it is of the whole surface."""
    with suppress(InputError, TypeError):  # facts may be a stranger's, and anything
        return ArrayShard.parse(facts["shard"]) if "shard" in facts else None
    return None


def as_array(indices: Iterable[int]) -> str:
    """Array tasks as SLURM's ``--array`` has them: ``3,7-9``."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
