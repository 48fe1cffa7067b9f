"""Where a job's results go: its own surface file continued, a new one, or memory. No other file is ever touched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distsurf.errors import DamagedFile, InputError
from distsurf.evaluator import Column
from distsurf.files import free_name, replacing
from distsurf.grid import Grid
from distsurf.objective.recipe import DEFAULT_BATCH, Recipe
from distsurf.shards import ArrayShard, shard_in
from distsurf.surface import Status, SurfaceFile
from distsurf.surface.claim import require_unclaimed


def open_output(
    out: Path | None,
    fresh: bool,
    columns: tuple[Column, ...],
    about: dict[str, Any],
    grid: Grid,
    now: Mapping[str, Any],
    say: Callable[[str], None],
) -> SurfaceFile:
    """The surface file of this job: the one that is there, if it is this job's, or a new one."""
    if out is None:
        return SurfaceFile.memory(grid, columns, **about)
    if out.exists() and not fresh:
        file = SurfaceFile.open(out, write=True)
        try:
            file.require(about["fingerprint"])
            _require_shard(file, shard_in(about["facts"]))
            file.require_sound(points_only=True)
            names = [[column.name for column in side] for side in (file.columns, columns)]
            if names[0] != names[1]:
                raise InputError(f"{out} has columns {', '.join(names[0])}, this job {', '.join(names[1])}")
        except BaseException:
            file.close()
            raise
        then = file.facts
        changed = [
            f"{key} {then[key]} then, {value} now"
            for key, value in now.items()
            if then.get(key, value) != value
        ]
        if changed and np.any(file.status().ravel()[file.points()] == Status.PENDING):
            say(
                f"note: the file was begun under other conditions ({'; '.join(changed)}); last digits may differ"
            )
        return file
    if out.exists():
        # Raises for what is no surface, since --fresh must not move other files away.
        with contextlib.suppress(DamagedFile):
            SurfaceFile.open(out).close()
        say(f"the old {out} is kept as {_set_aside(out)}")
    return SurfaceFile.create(out, grid, columns, **about)


def _require_shard(file: SurfaceFile, shard: ArrayShard | None) -> None:
    if file.shard != shard:
        there, here = (f"shard {one}" if one else "the whole surface" for one in (file.shard, shard))
        raise InputError(
            f"{file.path} is for {there} of this job, and {here} was asked for; "
            + (f"move it away, or give --shard {file.shard}" if file.shard else "choose another --out")
        )


def recorded(out: Path | None, fresh: bool) -> tuple[Recipe | None, int | None]:
    """How the points of the file that will be continued were evaluated, and how many it misses; (None, None) if none.

    Raises InputError or DamagedFile for what is no surface file.
    """
    if out is None or fresh or not out.exists():
        return None, None
    with SurfaceFile.open(out) as file:
        status = file.status().ravel()[file.points()]
        missing = int(np.isin(status, (Status.PENDING, Status.FAILED)).sum())
        told = file.facts.get("evaluation")
        if told is not None:
            try:
                return Recipe.recorded(told), missing
            except (TypeError, KeyError, AttributeError) as error:
                raise InputError(f"{out} does not tell readably how it was evaluated: {error}") from error
        # Written before there was a fast path.
        return Recipe(batch_size=int(file.fingerprint.get("batch_size", DEFAULT_BATCH))), missing


@contextlib.contextmanager
def counted_trial(out: Path | None) -> Iterator[int]:
    """How many starts have died in this block; this one counts until the block ends, however it does but by a kill."""
    if out is None:
        yield 0
        return
    marker, deaths = _marker(out), trials(out)
    with contextlib.suppress(OSError):
        marker.write_text(str(deaths + 1))
    try:
        yield deaths
    finally:
        with contextlib.suppress(OSError):
            marker.unlink(missing_ok=True)


def trials(out: Path) -> int:
    """How many starts died in `counted_trial`."""
    try:
        return int(_marker(out).read_text())
    except (OSError, ValueError):
        return 0


def _marker(out: Path) -> Path:
    return out.absolute().with_name(f".{out.name}.trials")


def _set_aside(path: Path) -> Path:
    """Rename a file to a free name beside it."""
    kept = free_name(path, "old")
    path.rename(kept)
    return kept


def require_writable(path: Path) -> None:
    """Raise InputError now rather than after the training if the output cannot be written, or others write it."""
    try:
        is_odd = path.exists() and not path.is_file()
    except OSError as error:
        raise InputError(f"the output {path} cannot be a file: {error.strerror}") from error
    if path.is_dir():
        raise InputError(f"the output {path} is a folder; give a file, for example {path / 'surface.h5'}")
    if is_odd:
        raise InputError(f"the output {path} is no regular file; choose another --out")
    if path.exists():
        require_unclaimed(path)
    with contextlib.suppress(_Discard), replacing(path):
        raise _Discard


class _Discard(Exception):
    pass
