"""The command line: what the verbs of `distsurf.options` do.

Exit codes: 0 complete; 1 bad input; 3 incomplete but saved (the same command continues); 4 damaged file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distsurf.distribute.launcher import launched
from distsurf.distribute.signals import interrupted_by_signals, killed_by_signals
from distsurf.distribute.slurm import SlurmJob
from distsurf.errors import DamagedFile, DistsurfError, Incomplete, InputError, in_one_line
from distsurf.options import Verb, parse

if TYPE_CHECKING:
    from distsurf.distribute.ranks import Ranks
    from distsurf.job import Job
    from distsurf.shards import ArrayShard
    from distsurf.submit import Submitted
    from distsurf.surface import Surface

MOST_SHOWN = 40
"""Shards that ``status`` lists."""
PICTURES = {"contour": "contour", "surface": "3d", "curves": "curves", "slices": "slices"}
"""What a picture's file is called after, by kind."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name) and return the exit code."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, warnings, "formatwarning", warnings.formatwarning)
        warnings.formatwarning = _in_a_line(warnings.formatwarning)
        if launched() is not None:
            stack.enter_context(killed_by_signals())
        return _main(arguments, debug)


def _main(arguments: Sequence[str] | None, debug: bool) -> int:
    try:
        options = parse(sys.argv[1:] if arguments is None else list(arguments), VERBS)
        return int(options.verb(options))
    except DistsurfError as error:
        if debug:
            traceback.print_exc()
        if _is_first_rank():
            print(f"distsurf: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("distsurf: interrupted before the evaluation began; nothing was recorded", file=sys.stderr)
        return Incomplete.exit_code
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        if isinstance(
            error.__cause__ or error.__context__, KeyboardInterrupt
        ):  # while a library was imported
            print("distsurf: interrupted", file=sys.stderr)
            return Incomplete.exit_code
        print(f"distsurf: unexpected {in_one_line(error)} (--debug shows where)", file=sys.stderr)
        return DistsurfError.exit_code


def _in_a_line(show: Callable[..., str]) -> Callable[..., str]:
    """Warnings of our own as all that they say, without the place in our code."""

    def form(message: Warning | str, category: type[Warning], filename: str, *place: Any) -> str:
        if Path(filename).is_relative_to(Path(__file__).parent):
            return f"distsurf: {message}\n"
        return show(message, category, filename, *place)

    return form


def _is_first_rank() -> bool:
    """Errors reach every rank; one of them tells the user."""
    start = launched()
    return start is None or start[0] == 0


# -- run --------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from distsurf.distribute.ranks import connected, end_now

    if options.plain:
        options.set.append("run.fast=false")
    if options.fresh and (here := SlurmJob.here()) is not None and here.restarts:
        # A requeued job starts its script from the beginning: what it has computed before is not old.
        print(f"distsurf: job {here.name} was requeued: it goes on, without --fresh", file=sys.stderr)
        options.fresh = False
    under = _launcher(options)
    if under is not None:
        return _launch(_job(options.job, options.set), options, _shard(options), under)
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if launched() is None and tasks not in ("", "1"):
        print(
            f"distsurf: note: this SLURM job has {tasks} tasks, and this is one process; to use them all: "
            "--under srun, or srun --mpi=pmi2 distsurf run …",
            file=sys.stderr,
        )
    with connected() as ranks, interrupted_by_signals():
        try:
            # Only now: a rank that cannot read the job must be able to tell the others.
            with ranks.together():
                job = _job(options.job, options.set)
                shard = _shard(options)
            code = _run_on(ranks, job, options, shard)
        except DistsurfError as error:
            if not ranks.lost:
                raise
            print(f"distsurf: {error}", file=sys.stderr)
            code = error.exit_code
        if ranks.lost:
            ranks.close()
            end_now(code)
        return code


def _shard(options: argparse.Namespace) -> ArrayShard | None:
    """Which part of the job is asked for; an array task does its own without being told. None for all of it."""
    from distsurf.shards import ArrayShard, shard_of_array_task

    shard = shard_of_array_task() if options.shard is None else ArrayShard.parse(options.shard)
    return None if shard is None or shard.count == 1 else shard


def _launcher(options: argparse.Namespace) -> list[str] | None:
    """The command that starts the ranks; empty for one process to be looked after, None for this process itself."""
    from distsurf.launch import mpirun

    if options.ranks and options.under is not None:
        raise InputError("--ranks N is short for --under 'mpirun -n N': leave one of the two out")
    start = launched()  # a step of one task may be the shell of an interactive allocation
    if (
        start is not None
        and start[1] > 1
        and (options.ranks or options.under or options.restarts or options.requeues)
    ):
        raise InputError(
            "--ranks, --under, --restarts and --requeues start the ranks, and this is a rank already: leave them out"
        )
    if options.ranks:
        return [mpirun(), "-n", str(options.ranks)]
    if options.under is not None:
        return shlex.split(options.under)
    return [] if options.restarts or options.requeues else None


def _launch(job: Job, options: argparse.Namespace, shard: ArrayShard | None, under: list[str]) -> int:
    """``--ranks``, ``--under``, ``--restarts``, ``--requeues``: start the ranks, which run the same command."""
    from distsurf.launch import Launcher, run_again
    from distsurf.requeue import Requeues

    arguments = [] if options.job is None else [str(options.job)]
    arguments += [] if options.out is None else ["--out", options.out]
    arguments += [part for override in options.set for part in ("--set", override)]
    arguments += ["--shard", str(shard or "0/1")]
    arguments += ["--progress", options.progress] + ["--no-pictures"] * options.no_pictures
    arguments += ["--debug"] * options.debug
    launcher = Launcher(under)
    out = Path(options.out) if options.out else job.path
    path = shard.path(out) if shard else out

    def start(number: int) -> int:
        return launcher([*arguments, *(["--fresh"] if options.fresh and number == 0 else [])])

    def say(line: str) -> None:
        print(f"distsurf: {line}", file=sys.stderr, flush=True)

    here = SlurmJob.here() if options.requeues else None
    requeues = None if here is None else Requeues(here, path, options.requeues, say)
    if requeues is not None:
        requeues.begin()
    try:
        code = run_again(
            start, path, options.restarts, is_fresh=options.fresh, stopped=lambda: launcher.stopped, say=say
        )
    except Incomplete as error:
        if requeues is None:
            raise
        raise Incomplete(f"{error}; {requeues.end(launcher.stopped)}") from error
    if requeues is not None:
        requeues.forget()
    return code


def _job(path: Path | None, overrides: Sequence[str]) -> Job:
    """The job of a file, or the built-in one."""
    from distsurf.job import Job

    if path is None:
        text = resources.files("distsurf").joinpath("default.toml").read_text()
        return Job.read(text, overrides, origin="the built-in job")
    return Job.load(path, overrides)


def _run_on(ranks: Ranks, job: Job, options: argparse.Namespace, shard: ArrayShard | None) -> int:
    from distsurf.launch import leave_stop_note
    from distsurf.run import run

    out = Path(options.out) if options.out else job.path

    def say(line: str) -> None:
        try:
            print(line, flush=True)
        except BrokenPipeError:  # the reader has left (head): the evaluation goes on without it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    code, message = 0, ""
    try:
        surface = run(
            job, ranks, out=out, shard=shard, fresh=options.fresh, progress=options.progress, say=say
        )
    except Incomplete as error:
        if error.surface is None:  # a rank that was left alone
            raise
        surface, code, message = error.surface, error.exit_code, str(error)
        if ranks.rank == 0:
            leave_stop_note(error.stopped)
    if ranks.rank == 0:
        made = [surface.path or out]
        if shard is None and job.output.pictures and not options.no_pictures:
            try:
                made += _draw(surface, out)
            except (OSError, InputError) as error:  # a full disk, say: the surface is what counts
                print(
                    f"distsurf: no pictures: {in_one_line(error)}; distsurf plot draws them", file=sys.stderr
                )
        _conclude(surface, made, None if shard is None else out)
        if code:
            print(f"distsurf: {message}", file=sys.stderr)
    # Only one rank speaks for the job: launchers report every exit code but 0 as a crash of its own.
    return code if ranks.rank == 0 else 0


def _draw(surface: Surface, out: Path) -> list[Path]:
    """The pictures that fit the number of axes, beside the surface file."""
    kinds = {1: ["curves"], 2: ["contour", "surface"], 3: ["slices"]}[len(surface.grid.axes)]
    paths = []
    for kind in kinds:
        path = out.with_name(f"{out.stem}_{PICTURES[kind]}.png")
        surface.plot(path=path, kind=kind)
        paths.append(path)
    return paths


def _conclude(surface: Surface, made: list[Path], whole: Path | None) -> None:
    """What was made, what it shows, and what to try next; ``whole`` is where a shard belongs."""
    print()
    for line in _facts(surface):
        print(line)
    print("\nmade:")
    for path in made:
        print(f"  {path}")
    command, file = _own_command(), shlex.quote(str(made[0]))
    print("\ntry next:")
    print(f"  {command} status {file}")
    if whole is not None:
        print(f"  {command} merge {shlex.quote(str(whole))}    (when all shards are done)")
        return
    if "test_accuracy" in surface.names:
        print(f"  {command} plot {file} --column test_accuracy")
    print(f"  {command} plot {file} -o surface.pdf")


def _own_command() -> str:
    """How to type ``distsurf`` here: by its path where its environment is not activated."""
    beside_python = Path(sys.executable).with_name("distsurf")
    if shutil.which("distsurf") or not beside_python.exists():
        return "distsurf"
    return shlex.quote(os.path.relpath(beside_python))


def _facts(surface: Surface) -> list[str]:
    """A surface in a few lines: size, and each column's minimum, maximum and value at the model."""
    import numpy as np

    from distsurf.surface import Status

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
            is_there = surface.status[origin] in (Status.EVALUATED, Status.INTERPOLATED)
            row.append(f"{values[origin]:12.6g}" if is_there else f"{'-':>12}")
        strange = surface.count(Status.EVALUATED) + surface.count(Status.INTERPOLATED) - finite.size
        note = f"  ({strange:,} not finite)" if strange else ""
        lines.append("  ".join(row) + (f" {column.unit}" if column.unit else "") + note)
    return lines


# -- the other verbs --------------------------------------------------------------------------------------


def _plot(options: argparse.Namespace) -> int:
    from distsurf.surface import Surface
    from distsurf.view.figures import DEFAULT_KIND

    surface = Surface.load(options.file)
    kind = options.kind or DEFAULT_KIND[len(surface.grid.axes)]
    suffix = "" if options.column == "loss" else f"_{surface.column(options.column).name}"
    path = options.output or options.file.with_name(f"{options.file.stem}_{PICTURES[kind]}{suffix}.png")
    settings = {
        name: getattr(options, name) for name in ("title", "log") if getattr(options, name) is not None
    }
    surface.plot(options.column, path, kind=kind, **settings)
    print(path)
    return 0


def _status(options: argparse.Namespace) -> int:
    from distsurf.surface import Surface
    from distsurf.view.points import imprecision_in_words

    if options.file.is_dir():
        return _status_of_folder(options.file)
    surface = Surface.load(options.file)
    facts = surface.facts
    print(_plain(f"{options.file}: {facts.get('name', 'surface')}, {surface.grid}"))
    for line in _facts(surface):
        print(_plain(line))
    told = [f"{key} {facts[key]}" for key in ("created", "placement", "distsurf", "torch") if key in facts]
    if told:
        print(_plain("; ".join(told)))
    # The file may be a stranger's, and its facts anything.
    with contextlib.suppress(KeyError, TypeError):
        how = facts["evaluation"]
        steps = ", ".join(how["steps"]) or "plain"
        print(_plain(f"evaluated in {how['precision']}, {steps}, batches of {how['batch_size']}"))
    for note in filter(None, (imprecision_in_words(surface, [column]) for column in surface.columns)):
        print(_plain(note))
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        cosines = ", ".join(f"{pair} {value:.4f}" for pair, value in facts["cosines"].items())
        if cosines:
            print(_plain(f"cosine between directions: {cosines}"))
    for point, reason in list(surface.failures.items())[:5]:
        where = ", ".join(f"{c:g}" for c in surface.grid.coordinates_of(point))
        print(_plain(f"failed at ({where}): {reason}"))
    return 0


def _status_of_folder(folder: Path) -> int:
    """Every surface in a folder, and how far its shards are."""
    from distsurf import submit
    from distsurf.shards import surfaces_in

    surfaces = surfaces_in(folder)
    if not surfaces:
        sent = submit.read_submitted(folder / "surface.h5")
        if not sent:
            raise InputError(f"there is no surface file in {folder}, and no shard of one")
        jobs = ", ".join(f"{one.job} ({one.shards} shards)" if one.shards else f"{one.job}" for one in sent)
        print(f"nothing is evaluated yet in {folder}; submitted: {jobs}; squeue -j {sent[-1].job} tells more")
        return 0
    for whole, shards in surfaces.items():
        try:
            _status_of_shards(whole, shards)
        except DistsurfError as error:  # a folder may hold anything
            print(_plain(str(error)))
    return 0


def _status_of_shards(whole: Path, shards: Mapping[Path, ArrayShard]) -> None:
    from distsurf import submit
    from distsurf.shards import ArrayShard
    from distsurf.surface import SurfaceFile

    with SurfaceFile.open(whole if whole.exists() else next(iter(shards))) as file:
        grid = file.grid
    if whole.exists():
        state = submit.state_of(whole, ArrayShard(0, 1), grid)
        print(f"{whole}: {state.done:,} of {state.size:,} points{_in_brackets(state.trouble)}")
    sent = [one.shards for one in submit.read_submitted(whole) if one.shards]
    count = sent[-1] if sent else max((shard.count for shard in shards.values()), default=0)
    if count < 2:
        return
    queue = submit.in_queue(whole)
    states = submit.shard_states(whole, count, grid)
    done = sum(state.done for state in states)
    finished = sum(state.done == state.size for state in states)
    print(f"{count} shards of {whole}: {finished} complete; {done:,} of {grid.size:,} points")
    shown = [state for state in states if state.done < state.size or state.shard.index in queue]
    for state in shown[:MOST_SHOWN]:
        task = queue.get(state.shard.index)
        what = f"  {task.job}_{task.index} {task.state}" if task else ""
        why = _in_brackets("" if task is None or task.reason == "None" else task.reason)
        print(
            f"  {state.shard.index:5}  {state.done:,} of {state.size:,}{what}{why}{_in_brackets(state.trouble)}"
        )
    if len(shown) > MOST_SHOWN:
        print(f"  … and {len(shown) - MOST_SHOWN} more")


def _in_brackets(text: str) -> str:
    return f" ({_plain(text)})" if text else ""


def _plain(text: str) -> str:
    """Text from a file, in one line and without what a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def _check(options: argparse.Namespace) -> int:
    from distsurf.surface import Status, SurfaceFile

    if options.output is not None and not options.repair:
        raise InputError("-o is for --repair")
    if options.repair:
        return _repair(options)
    with SurfaceFile.open(options.file) as file:
        file.require_sound()
        surface = file.read()
    done = surface.count(Status.EVALUATED) + surface.count(Status.INTERPOLATED)
    which = f" of shard {surface.shard}" if surface.shard else ""
    print(f"{options.file} is sound: {done:,} of {surface.size:,} points{which} have values")
    if not surface.complete:
        _tell_missing(surface)
        return Incomplete.exit_code
    return 0


def _repair(options: argparse.Namespace) -> int:
    from distsurf.surface import Status
    from distsurf.surface.repair import repair

    path, problems, surface = repair(options.file, options.output)
    kept = surface.count(Status.EVALUATED) + surface.count(Status.INTERPOLATED)
    print(f"{options.file} is damaged: {problems}")
    print(f"{path} has what can be trusted: {kept:,} of {surface.grid.size:,} points")
    file, new = shlex.quote(str(options.file)), shlex.quote(str(path))
    print(f"to complete it, run the job with --out {new}, or: mv {file} {file}.damaged && mv {new} {file}")
    return DamagedFile.exit_code


def _merge(options: argparse.Namespace) -> int:
    from distsurf.merge import merge

    whole = _job(options.whole, options.set).path if options.whole.suffix == ".toml" else options.whole
    merged = merge(whole, options.shards)
    surface = merged.surface
    done = surface.size - len(surface.missing)
    what = "from" if merged.is_new else "already all that is in"
    print(f"{whole} has {done:,} of {surface.size:,} points, {what} {len(merged.sources):,} files")
    if not surface.complete:
        _tell_missing(surface)
        return Incomplete.exit_code
    if not options.no_pictures:
        try:
            print("\n".join(f"made {path}" for path in _draw(surface, whole)))
        except (OSError, InputError) as error:
            print(f"distsurf: no pictures: {in_one_line(error)}; distsurf plot draws them", file=sys.stderr)
    if options.remove:
        for path in merged.sources:
            if path != whole:
                path.unlink()
        print("it is complete and checked; the shards are removed")
    return 0


def _tell_missing(surface: Surface) -> None:
    """What of a surface is not there, and the shards to send again."""
    from distsurf.merge import missing_tasks
    from distsurf.shards import as_array
    from distsurf.surface import Status

    failed = surface.count(Status.FAILED)
    print(f"{len(surface.missing) - failed:,} pending, {failed:,} failed: run the job again to continue")
    tasks = missing_tasks(surface)
    if tasks:
        print(f"missing: --array={as_array(tasks)} (of {surface.facts['shards']} shards)")


def _submit(options: argparse.Namespace) -> int:
    from distsurf import submit

    job = _job(options.job, options.set)
    whole = Path(options.out) if options.out else job.path
    if options.missing:
        return _submit_missing(job, whole, options)
    shards, at_once = (0, 0) if options.array is None else submit.parse_array(options.array)
    time = options.time
    if time is None or not (shards or options.nodes):
        shards, predicted = _predict(job, shards, at_once, options)
        time = time or predicted
    wish = submit.Wish(
        job=str(options.job),
        overrides=tuple(options.set),
        out=options.out,
        shards=shards,
        at_once=at_once,
        nodes=options.nodes or 1,
        gpus_per_node=options.gpus_per_node,
        time=time,
        requeues=20 if options.requeues is None else options.requeues,
        options=tuple(options.more),
        logs=f"{submit.folder_of(whole)}/",
        folder=os.getcwd(),
        activate=submit.environment_line(),
        mpi=submit.mpi_flag(),
    )
    if shards > job.grid.grid().size:
        raise InputError(f"--array {shards}: the grid has {job.grid.grid().size:,} points only")
    if options.dry_run:
        for name, text in submit.scripts(wish).items():
            print(f"# {submit.folder_of(whole) / name}\n{text}")
        return 0
    scripts = submit.write_scripts(whole, wish)
    sent = submit.send(scripts, whole, shards, f"0-{shards - 1}" if shards else "")
    _tell_submitted(sent, scripts, whole)
    return 0


def _predict(job: Job, shards: int, at_once: int, options: argparse.Namespace) -> tuple[int, str]:
    """A good number of shards, if none is given, and the walltime to ask for; measured here, which takes a while."""
    from distsurf import submit
    from distsurf.bench.compare import with_weights
    from distsurf.bench.plan import plan

    print("measuring a few points, for a walltime and a number of shards (distsurf plan) …", file=sys.stderr)
    ranks = options.nodes * (options.gpus_per_node or 1) if options.nodes else 1
    forecast = plan(with_weights(job), ranks, options.gpus_per_node)
    if options.nodes:
        return 0, submit.walltime(forecast.wall_seconds)
    shards = shards or forecast.shards
    points = -(-forecast.points // shards) / max(options.gpus_per_node, 1)
    return shards, submit.walltime(forecast.set_up_seconds + points * forecast.seconds_per_point)


def _submit_missing(job: Job, whole: Path, options: argparse.Namespace) -> int:
    from distsurf import submit
    from distsurf.shards import as_array

    if options.gpus_per_node or options.requeues is not None:
        raise InputError(
            f"--missing sends {submit.folder_of(whole)}/array.sbatch again: leave --gpus-per-node and --requeues out, "
            "or edit that; --time and options of sbatch's go with it"
        )
    script = submit.folder_of(whole) / "array.sbatch"
    sent = [one for one in submit.read_submitted(whole) if one.shards]
    if not sent or not script.exists():
        raise InputError(f"no array was submitted for {whole}: submit one with --array N")
    count = sent[-1].shards
    if options.dry_run:  # without a merge: nothing is to be written
        states = submit.shard_states(whole, count, job.grid.grid())
        missing = [state.shard.index for state in states if state.done < state.size]
    else:
        merged, missing = submit.still_missing(whole, count)
        if merged is not None and merged.surface.complete:
            print(f"{whole} is complete: nothing is missing")
            return 0
    queued = submit.in_queue(whole)
    at_work = [index for index in missing if index in queued and queued[index].is_alive]
    missing = sorted(set(missing) - set(at_work))
    if at_work:
        print(f"still in the queue, and not sent again: {as_array(at_work)}")
    if not missing:
        return Incomplete.exit_code
    array = as_array(missing)
    print(f"missing: --array={array} (of {count} shards)")
    if options.dry_run:
        return 0
    scripts = [script, script.with_name("merge.sbatch")]
    time = [] if options.time is None else [f"--time={options.time}"]
    told = submit.send(scripts, whole, count, array, [f"--array={array}", *time, *options.more])
    _tell_submitted(told, scripts, whole)
    return 0


def _tell_submitted(sent: Submitted, scripts: Sequence[Path], whole: Path) -> None:
    tasks = f", tasks {sent.tasks} of {sent.shards} shards" if sent.shards else ""
    print(f"job {sent.job}{tasks}: {scripts[0]}")
    if sent.merge is not None:
        print(f"job {sent.merge}, after them: {scripts[1]}")
    command = _own_command()
    print(f"\nwatch:\n  {command} status {shlex.quote(str(whole.parent))}\n  squeue -j {sent.job}")
    print(f"  tail -f {shlex.quote(str(scripts[0].parent))}/{sent.job}*.log")
    if sent.shards:
        print(f"if shards fail: {command} submit JOB.toml --missing")


def _bench(options: argparse.Namespace) -> int:
    import json

    from distsurf.bench import compare
    from distsurf.output import require_writable

    if options.rounds < 1 or (options.samples is not None and options.samples < 1):
        raise InputError("--rounds and --samples: expected 1 or more")
    if options.json is not None:
        require_writable(options.json)
    if options.job is None or options.job in compare.NETWORKS:
        job = compare.built_in(options.job or compare.NETWORKS[0], options.samples or 2000, options.set)
    else:
        if options.samples is not None:
            raise InputError("--samples is for the built-in networks; a job file brings its own data")
        if not Path(options.job).exists():
            names = ", ".join(compare.NETWORKS)
            raise InputError(f"{options.job!r} is no job file, and no built-in network ({names})")
        job = compare.with_weights(_job(Path(options.job), options.set))
    precisions = compare.parse_precisions(options.precision)
    result = compare.bench(
        job,
        precisions,
        options.rounds,
        options.threads,
        lambda line: print(line, file=sys.stderr),
        each_step=options.steps,
    )
    print("\n".join(compare.table(result)))
    if options.json is not None:
        from distsurf.files import replacing

        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _plan(options: argparse.Namespace) -> int:
    import json

    from distsurf.bench.compare import with_weights
    from distsurf.bench.plan import plan

    if options.ranks < 1:
        raise InputError("--ranks: expected 1 or more")
    job = _job(options.job, options.set)
    measured = with_weights(job)
    forecast = plan(measured, options.ranks, options.ranks_per_node, options.threads)
    if options.json:
        print(json.dumps(forecast.told()))
        return 0
    print("\n".join(forecast.lines()))
    if measured is not job:
        print(f"not counted: the training that makes {job.model.checkpoint}")
    return 0


VERBS: dict[str, Verb] = {
    "run": _run,
    "plot": _plot,
    "status": _status,
    "check": _check,
    "merge": _merge,
    "submit": _submit,
    "bench": _bench,
    "plan": _plan,
}
