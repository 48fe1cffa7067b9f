"""``run``: evaluate a surface in this process, on these ranks, or by a launcher that is started and looked after."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distsurf.distribute.launcher import launched
from distsurf.distribute.signals import interrupted_by_signals
from distsurf.distribute.slurm import SlurmJob
from distsurf.errors import DistsurfError, Incomplete, InputError, in_one_line
from distsurf.verbs.shared import draw, in_lines, own_command, read_job

if TYPE_CHECKING:
    from distsurf.distribute.ranks import Ranks
    from distsurf.job import Job
    from distsurf.shards import ArrayShard
    from distsurf.surface import Surface


def run(options: argparse.Namespace) -> int:
    """Evaluate a surface, or continue it."""
    from distsurf.distribute.ranks import connected, end_now

    if options.plain:
        options.set.append("run.fast=false")
    if options.fresh and (here := SlurmJob.here()) is not None and here.restarts:
        # A requeued job starts its script from the beginning: what it has computed before is not old.
        print(f"distsurf: job {here.name} was requeued: it goes on, without --fresh", file=sys.stderr)
        options.fresh = False
    under = _launcher(options)
    if under is not None:
        return _launch(read_job(options.job, options.set), options, _shard(options), under)
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
                job = read_job(options.job, options.set)
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
    arguments += [] if options.known is None else ["--known", str(options.known)]
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
    if options.requeues and here is None:
        say("note: this is no SLURM job, and --requeues has no effect")
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
            job,
            ranks,
            out=out,
            shard=shard,
            known=options.known,
            fresh=options.fresh,
            progress=options.progress,
            say=say,
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
                made += draw(surface, out)
            except (OSError, InputError) as error:  # a full disk, say: the surface is what counts
                print(
                    f"distsurf: no pictures: {in_one_line(error)}; distsurf plot draws them", file=sys.stderr
                )
        _conclude(surface, made, None if shard is None else out)
        if code:
            print(f"distsurf: {message}", file=sys.stderr)
    # Only one rank speaks for the job: launchers report every exit code but 0 as a crash of its own.
    return code if ranks.rank == 0 else 0


def _conclude(surface: Surface, made: list[Path], whole: Path | None) -> None:
    """What was made, what it shows, and what to try next; ``whole`` is where a shard belongs."""
    print()
    for line in in_lines(surface):
        print(line)
    print("\nmade:")
    for path in made:
        print(f"  {path}")
    command, file = own_command(), shlex.quote(str(made[0]))
    print("\ntry next:")
    print(f"  {command} status {file}")
    if whole is not None:
        print(f"  {command} merge {shlex.quote(str(whole))}    (when all shards are done)")
        return
    if "test_accuracy" in surface.names:
        print(f"  {command} plot {file} --column test_accuracy")
    print(f"  {command} plot {file} -o surface.pdf")
