"""Verbs for surface files: ``plot``, ``status``, ``check``, ``merge``."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys

from distsurf.errors import DamagedFile, Incomplete, InputError, in_one_line
from distsurf.verbs.cluster import status_of_folder
from distsurf.verbs.shared import PICTURES, draw, in_lines, load, printable, read_job, tell_missing


def plot(options: argparse.Namespace) -> int:
    """Draw a surface file."""
    from distsurf.view.points import fitting_kinds

    surface = load(options.file, options.repeat)
    kind = options.kind or fitting_kinds(surface)[0]
    suffix = "" if options.column == "loss" else f"_{surface.column(options.column).name}"
    suffix += "" if options.repeat is None else f"_{options.repeat}"
    path = options.output or options.file.with_name(f"{options.file.stem}_{PICTURES[kind]}{suffix}.png")
    settings = {
        name: getattr(options, name) for name in ("title", "log") if getattr(options, name) is not None
    }
    if options.repeat is not None:
        settings.setdefault("title", f"repeat {options.repeat}")
    surface.plot(options.column, path, kind=kind, **settings)
    print(path)
    return 0


def status(options: argparse.Namespace) -> int:
    """Say what is in a surface file, or in a folder of them."""
    from distsurf.surface import Surface
    from distsurf.view.points import imprecision_in_words

    if options.file.is_dir():
        return status_of_folder(options.file)
    surface = Surface.load(options.file)
    facts = surface.facts
    print(printable(f"{options.file}: {facts.get('name', 'surface')}, {surface.grid}"))
    for line in in_lines(surface):
        print(printable(line))
    told = [f"{key} {facts[key]}" for key in ("created", "placement", "distsurf", "torch") if key in facts]
    if told:
        print(printable("; ".join(told)))
    # The file may be a stranger's, and its facts anything.
    with contextlib.suppress(KeyError, TypeError):
        how = facts["evaluation"]
        steps = ", ".join(how["steps"]) or "plain"
        print(printable(f"evaluated in {how['precision']}, {steps}, batches of {how['batch_size']}"))
    for note in filter(None, (imprecision_in_words(surface, [column]) for column in surface.columns)):
        print(printable(note))
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        cosines = ", ".join(f"{pair} {value:.4f}" for pair, value in facts["cosines"].items())
        if cosines:
            largest = "largest " if surface.grid.repeated else ""
            print(printable(f"{largest}cosine between directions: {cosines}"))
    with contextlib.suppress(KeyError, TypeError):
        print(printable(f"{facts['known']['points']:,} points are taken from {facts['known']['file']}"))
    for point, reason in list(surface.failures.items())[:5]:
        where = ", ".join(f"{c:g}" for c in surface.grid.coordinates_of(point))
        print(printable(f"failed at ({where}): {reason}"))
    return 0


def check(options: argparse.Namespace) -> int:
    """Check that a surface file is sound, or repair it."""
    from distsurf.surface import SurfaceFile

    if options.output is not None and not options.repair:
        raise InputError("-o is for --repair")
    if options.repair:
        return _repair(options)
    with SurfaceFile.open(options.file) as file:
        file.require_sound()
        surface = file.read()
    which = f" of shard {surface.shard}" if surface.shard else ""
    print(f"{options.file} is sound: {surface.done:,} of {surface.size:,} points{which} have values")
    if not surface.complete:
        tell_missing(surface)
        return Incomplete.exit_code
    return 0


def _repair(options: argparse.Namespace) -> int:
    from distsurf.surface.repair import repair

    path, problems, surface = repair(options.file, options.output)
    print(f"{options.file} is damaged: {problems}")
    print(f"{path} has what can be trusted: {surface.done:,} of {surface.grid.size:,} points")
    file, new = shlex.quote(str(options.file)), shlex.quote(str(path))
    print(f"to complete it, run the job with --out {new}, or: mv {file} {file}.damaged && mv {new} {file}")
    return DamagedFile.exit_code


def merge(options: argparse.Namespace) -> int:
    """Put shards together."""
    from distsurf.merge import merge, require_files_of

    whole = options.whole
    if whole.suffix == ".toml":
        job = read_job(whole, options.set)
        whole = job.path
        require_files_of(job, whole)
    elif options.set:
        raise InputError("--set is for JOB.toml")
    merged = merge(whole, options.shards)
    surface = merged.surface
    what = "from" if merged.is_new else "already all that is in"
    print(f"{whole} has {surface.done:,} of {surface.size:,} points, {what} {len(merged.sources):,} files")
    if not surface.complete:
        tell_missing(surface)
        return Incomplete.exit_code
    if not options.no_pictures:
        try:
            print("\n".join(f"made {path}" for path in draw(surface, whole)))
        except (OSError, InputError) as error:
            print(f"distsurf: no pictures: {in_one_line(error)}; distsurf plot draws them", file=sys.stderr)
    shards = [path for path in merged.sources if path != whole]
    if options.remove and shards:
        for path in shards:
            path.unlink()
        print(f"it is complete and checked; {len(shards):,} shards are removed")
    return 0
