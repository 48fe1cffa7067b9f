"""``trajectory``: the principal plane of a training's checkpoints, and the job that draws its path over the loss."""

from __future__ import annotations

import argparse
import glob
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distsurf.distribute.signals import interrupted_by_signals
from distsurf.errors import InputError
from distsurf.verbs.shared import own_command, read_job

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from distsurf.distribute.ranks import Ranks
    from distsurf.job import Job
    from distsurf.subspace import Layout
    from distsurf.subspace.trajectory import Trajectory

    Losses = tuple[str, NDArray[np.float64], NDArray[np.float64]]

SHOWN = 10
"""Components in the table."""
MARGIN = 0.2
"""Of the path's extent, the box around it on each side."""


def trajectory(options: argparse.Namespace) -> int:
    """Find the plane; with a job, write its directions and the job for the surface."""
    from distsurf.distribute.ranks import connected
    from distsurf.job import Job

    with connected() as ranks, interrupted_by_signals():
        with ranks.together():
            paths = _expanded(options.checkpoints)
            center = _center(options.center, paths)
            job = None if options.job is None else read_job(options.job, options.set)
            if options.set and job is None:
                raise InputError("--set is for --job")
            if options.plane is not None and (options.about, options.scale) != ("center", "none"):
                raise InputError("--about and --scale are for principal components; --plane is as it is")
            if options.error and job is None:
                raise InputError("--error is for --job")
            if options.out is not None and job is None:
                raise InputError("--out is for --job: without one there is nothing to write")
        found = _plane(ranks, paths, center, job, options)
        losses = None
        if options.error and job is not None:
            from distsurf.projection import losses_along

            with ranks.together():
                plane = Job.load((options.out or _folder(job)) / "job.toml")
            losses = losses_along(ranks, plane, paths, found.coordinates)
        if ranks.rank == 0:
            _tell(found, paths, center, job, losses, options)
    return 0


def _plane(
    ranks: Ranks, paths: list[Path], center: int, job: Job | None, options: argparse.Namespace
) -> Trajectory:
    from distsurf.assemble import build_model
    from distsurf.direction_files import read_plane
    from distsurf.subspace import Layout, Tensors
    from distsurf.subspace.checkpoints import Checkpoints
    from distsurf.subspace.trajectory import principal_plane, project

    def together(step: Callable[[], Any]) -> Any:
        with ranks.together():
            return step()

    def opened() -> Checkpoints:
        if job is None:
            return Checkpoints(paths)
        interpolated = job.objective.batch_norm == "interpolated"
        layout = Layout.of(Tensors.of(build_model(job, None), interpolated=interpolated).moving)
        return Checkpoints(paths, layout, key=job.model.checkpoint_key, allow_pickle=job.model.allow_pickle)

    with together(opened) as checkpoints:
        shared: dict[str, Any] = {
            "rank": ranks.rank, "size": ranks.size, "total": ranks.total, "together": together,
        }  # fmt: skip
        if options.plane is not None:
            directions = together(lambda: read_plane(options.plane, checkpoints.layout))
            found = project(checkpoints, center, directions, **shared)
        else:
            found = principal_plane(checkpoints, center, about=options.about, scale=options.scale, **shared)
        with ranks.together():
            if ranks.rank == 0 and job is not None:
                _write(found, checkpoints.layout, paths, center, job, options)
    return found


def _expanded(patterns: Sequence[str]) -> list[Path]:
    """Files in training order: as given, and those of a pattern by the numbers in their names."""
    found: list[Path] = []
    for pattern in patterns:
        if not set("*?[") & set(pattern) or Path(pattern).exists():
            if Path(pattern).is_dir():
                raise InputError(f"{pattern} is a folder; give its files, for example '{pattern}/*.pt'")
            found.append(Path(pattern))
            continue
        matches = sorted(map(Path, glob.glob(pattern, recursive=True)), key=_natural)
        if not matches:
            raise InputError(f"no file matches {pattern}")
        found += matches
    return found


def _natural(path: Path) -> list[tuple[int, int, str]]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", str(path))]


def _center(wish: str, paths: Sequence[Path]) -> int:
    if wish in ("first", "last"):
        return 0 if wish == "first" else len(paths) - 1
    try:
        return [str(path) for path in paths].index(str(Path(wish)))
    except ValueError:
        raise InputError(f"--center {wish}: expected first, last, or one of the checkpoints") from None


def _folder(job: Job) -> Path:
    return Path("runs", f"{job.name}-trajectory")


def _write(
    found: Trajectory, layout: Layout, paths: list[Path], center: int, job: Job, options: argparse.Namespace
) -> None:
    from distsurf.direction_files import read_trajectory, write_plane
    from distsurf.files import replacing
    from distsurf.job import Job

    folder = options.out or _folder(job)
    plane = folder / "plane.safetensors"
    explained = found.explained if options.about == "center" else found.explained_centred
    told = {
        "names": [path.name for path in paths],
        "coordinates": found.coordinates.tolist(),
        "explained": explained[:2].tolist(),
    }
    if not ((folder / "surface.h5").exists() and plane.exists()):
        write_plane(plane, layout, found.directions, told)
    elif not _is_same(read_trajectory(plane), told):
        raise InputError(
            f"{folder} has the surface of another plane, which {plane} spans; give another --out"
        )
    table = job.model_dump(exclude_none=True, by_alias=True)
    table |= {
        "name": f"{job.name}-trajectory",
        "directions": {"kind": "file", "file": str(plane)},
        "grid": dict(zip("xy", _box(found.coordinates, options.points), strict=True)),
        "output": {**table["output"], "file": str(folder / "surface.h5")},
    }
    table["model"]["checkpoint"] = str(paths[center])
    table.pop("train", None)
    with replacing(folder / "job.toml") as temporary:
        temporary.write_text(Job.build(table).to_toml())


def _is_same(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether a trajectory was found before; with another number of ranks, last digits differ."""
    import numpy as np

    if before is None or before.get("names") != now["names"]:
        return False
    then, here = (np.array(each["coordinates"], float) for each in (before, now))
    return then.shape == here.shape and bool(np.allclose(then, here, rtol=1e-5, atol=1e-6 * abs(here).max()))


def _box(coordinates: NDArray[np.float64], points: int) -> list[str]:
    """Axes around a path, with equal units where that does not make it a needle."""
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    half = (0.5 + MARGIN) * (high - low)
    half = half.clip(min=half.max() / 4)
    middle = (low + high) / 2
    return [f"{m - h:.6g}:{m + h:.6g}:{points}" for m, h in zip(middle, half, strict=True)]


def _tell(
    found: Trajectory,
    paths: list[Path],
    center: int,
    job: Job | None,
    losses: Losses | None,
    options: argparse.Namespace,
) -> None:
    centred = f"about {paths[center].name}"
    print(f"{len(paths)} checkpoints, from {paths[0]} to {paths[-1]}; centre {paths[center]}")
    print(f"explained variance   {centred} (uncentred)   about their mean (centred)")
    for k in range(min(SHOWN, len(paths) - 1, len(found.explained))):
        print(f"{k + 1:9}  {found.explained[k]:{len(centred) + 20}.2%}  {found.explained_centred[k]:26.2%}")
    what = "uncentred" if options.about == "center" else "centred"
    unit = "the centre's norm" if options.scale == "center" else "weights"
    axes = (
        f"those of {options.plane}"
        if options.plane
        else f"the first two {what} components, in units of {unit}"
    )
    print(f"axes: {axes}")
    table = [("x", 12), ("y", 12), ("outside", 8)] + (
        [] if losses is None else [(losses[0], 12), ("in plane", 12)]
    )
    print("  ".join(f"{name:>{width}}" for name, width in table))
    for i, path in enumerate(paths):
        x, y = found.coordinates[i] + 0.0  # no negative zero
        row = [f"{x:12.6g}", f"{y:12.6g}", f"{found.outside[i]:8.2%}"]
        row += [] if losses is None else [f"{values[i]:12.6g}" for values in losses[1:]]
        print("  ".join([*row, path.name]))
    if losses is not None:
        from distsurf.projection import trajectory_error

        error = trajectory_error(*losses[1:])
        print(
            f"trajectory error, the mean of ln² of {losses[0]} by that in the plane (Ding et al. 2023): {error:.4g}"
        )
    if job is None:
        print("with --job JOB.toml: the loss in this plane, as a job", file=sys.stderr)
        return
    folder = options.out or _folder(job)
    print(f"\nmade:\n  {folder / 'plane.safetensors'}\n  {folder / 'job.toml'}")
    print(f"\ntry next:\n  {own_command()} run {shlex.quote(str(folder / 'job.toml'))}")
