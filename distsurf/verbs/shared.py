"""What several verbs do: read a job, draw, and say what a surface is."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distsurf.job import Job
    from distsurf.surface import Surface

PICTURES = {"contour": "contour", "surface": "3d", "curves": "curves", "slices": "slices"}
"""What a picture's file is called after, by kind."""
SHARPNESS_SHOWN = 4
"""Coordinates at which average-case sharpness is told."""
CONVERGED = "lambda_converged"
"""Column of `distsurf.objective.curvature`: whether the ends of a point's spectrum were found as closely as asked."""


def read_job(path: Path | None, overrides: Sequence[str]) -> Job:
    """The job of a file, or the built-in one."""
    from distsurf.job import Job

    if path is None:
        text = resources.files("distsurf").joinpath("default.toml").read_text()
        return Job.read(text, overrides, origin="the built-in job")
    return Job.load(path, overrides)


def load(path: Path, repeat: int | None) -> Surface:
    """The surface of a file, or only one of its repetitions."""
    from distsurf.surface import Surface

    surface = Surface.load(path)
    return surface if repeat is None else surface.repeat(repeat)


def draw(surface: Surface, out: Path) -> list[Path]:
    """The pictures that fit the number of axes, beside the surface file."""
    from distsurf.view.points import fitting_kinds

    paths = []
    for kind in fitting_kinds(surface):
        path = out.with_name(f"{out.stem}_{PICTURES[kind]}.png")
        surface.plot(path=path, kind=kind)
        paths.append(path)
    if "lambda_ratio" in surface.names and surface.done:
        kind = fitting_kinds(surface)[0]
        paths.append(out.with_name(f"{out.stem}_{PICTURES[kind]}_lambda_ratio.png"))
        surface.plot("lambda_ratio", paths[-1], kind=kind)
    return paths


def own_command() -> str:
    """How to type ``distsurf`` here: by its path where its environment is not activated."""
    beside_python = Path(sys.executable).with_name("distsurf")
    if shutil.which("distsurf") or not beside_python.exists():
        return "distsurf"
    return shlex.quote(os.path.relpath(beside_python))


def in_lines(surface: Surface) -> list[str]:
    """A surface in a few lines: size, and each column's minimum, maximum and value at the model."""
    import numpy as np

    from distsurf.surface import DONE, Status

    told = [s for s in Status if surface.count(s) and not (surface.shard and s == Status.PENDING)]
    counts = [f"{surface.count(s):,} {s.name.lower()}" for s in told]
    shape = " × ".join(f"{axis.count}" for axis in surface.grid.axes)
    if surface.shard is not None:
        shape = f"shard {surface.shard} of {shape}"
        left = len(surface.missing)
        counts += [f"{left:,} of {surface.size:,} to go"] if left else []
    lines = [f"{shape} points: {', '.join(counts)}"]
    origin = surface.origin
    width = max(len(name) for name in surface.names)
    header = f"{'':{width}}  {'min':>12}  {'max':>12}" + (f"  {'at the model':>12}" if origin else "")
    lines.append(header)
    for column in surface.columns:
        values = surface[column.name]
        finite = values[np.isfinite(values)]
        span = [f"{finite.min():12.6g}", f"{finite.max():12.6g}"] if finite.size else [f"{'-':>12}"] * 2
        row = [f"{column.name:{width}}", *span]
        if origin:
            is_there = surface.status[origin] in DONE
            row.append(f"{values[origin]:12.6g}" if is_there else f"{'-':>12}")
        strange = surface.done - finite.size
        note = f"  ({strange:,} not finite)" if strange else ""
        lines.append("  ".join(row) + (f" {column.unit}" if column.unit else "") + note)
    for name, at in surface.models[1:]:
        lines.append(f"{printable(name)} lies at ({', '.join(f'{c:.6g}' for c in at)})")
    barriers = [(column.name, surface.barrier(column.name)) for column in surface.columns if not column.unit]
    if CONVERGED in surface.names:
        known = np.isfinite(surface[CONVERGED])
        if short := int(np.count_nonzero(surface[CONVERGED][known] == 0)):
            lines.append(
                f"lambda_min, lambda_max: {short:,} of {np.count_nonzero(known):,} points were not found to the "
                "tolerance within curvature.products"
            )
    if surface.grid.repeated and len(surface.grid.axes) == 2 and origin:
        for column in surface.columns:
            if not column.unit:
                lines += _sharpness_in_lines(surface, column.name)
    told_barriers = [f"{name} {value:.6g}" for name, value in barriers if value is not None]
    if told_barriers:
        mode = surface.fingerprint.get("batch_norm", "frozen")
        lines.append(f"barrier between the two models (batch norm {mode}): {', '.join(told_barriers)}")
    return lines


def _sharpness_in_lines(surface: Surface, name: str) -> list[str]:
    """Average-case sharpness of a column at a few coordinates."""
    import numpy as np

    mean, error = surface.average_sharpness(name)
    known = np.flatnonzero(np.isfinite(mean) & (surface.x != 0))
    chosen = known[np.linspace(0, len(known) - 1, min(len(known), SHARPNESS_SHOWN)).round().astype(int)]
    told = [f"{surface.x[i]:.4g}: {mean[i]:.4g} ± {error[i]:.2g}" for i in chosen]
    return [f"average-case sharpness of {name} (± standard error) at x = {', '.join(told)}"] if told else []


def tell_missing(surface: Surface) -> None:
    """What of a surface is not there, and the shards to send again."""
    from distsurf.merge import missing_tasks
    from distsurf.shards import as_array
    from distsurf.submit import read_submitted
    from distsurf.surface import Status

    failed = surface.count(Status.FAILED)
    print(f"{len(surface.missing) - failed:,} pending, {failed:,} failed: run the job again to continue")
    sent = (
        [] if surface.path is None else [one.shards for one in read_submitted(surface.path) if one.shards > 1]
    )
    count = sent[-1] if sent else surface.facts.get("shards")
    if (
        isinstance(count, int)
        and count > 1
        and surface.shard is None
        and (tasks := missing_tasks(surface, count))
    ):
        print(f"missing: --array={as_array(tasks)} (of {count} shards)")


def printable(text: str) -> str:
    """Text from a file, in one line and without what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)
