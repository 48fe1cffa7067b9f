"""Verbs for a cluster: ``submit``, and ``status`` of a folder with shards."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distsurf.errors import DistsurfError, Incomplete, InputError
from distsurf.verbs.shared import own_command, printable, read_job

if TYPE_CHECKING:
    from distsurf.job import Job
    from distsurf.shards import ArrayShard
    from distsurf.submit import Submitted

MOST_SHOWN = 40
"""Shards that ``status`` lists."""


def submit(options: argparse.Namespace) -> int:
    """Write batch scripts and submit them."""
    from distsurf import submit
    from distsurf.merge import require_files_of

    job = read_job(options.job, options.set)
    whole = Path(options.out) if options.out else job.path
    if options.missing:
        return _submit_missing(job, whole, options)
    for_scripts, once = submit.apart(options.more)
    text = options.job.read_text()
    shards, at_once = (0, 0) if options.array is None else submit.parse_array(options.array)
    if shards > job.grid.grid().size:
        raise InputError(f"--array {shards}: the grid has {job.grid.grid().size:,} points only")
    require_files_of(job, whole)
    if not options.dry_run:
        submit.require_free(whole, text, options.more)
    time = options.time
    if time is None or not (shards or options.nodes):
        shards, predicted = _predict(job, shards, at_once, options)
        time = time or predicted
    wish = submit.Wish(
        job=str(submit.folder_of(whole) / submit.JOB_FILE),
        overrides=tuple(options.set),
        out=options.out,
        shards=shards,
        at_once=at_once,
        nodes=options.nodes or 1,
        gpus_per_node=options.gpus_per_node,
        time=time,
        requeues=20 if options.requeues is None else options.requeues,
        options=for_scripts,
        logs=f"{submit.folder_of(whole)}/",
        folder=os.getcwd(),
        activate=submit.environment_line(),
        mpi=submit.mpi_flag(),
    )
    submit.require_time_to_save(wish)
    if options.dry_run:
        for name, script in submit.scripts(wish).items():
            print(f"# {submit.folder_of(whole) / name}\n{script}")
        return 0
    scripts = submit.write_scripts(whole, wish, text)
    sent = submit.send(scripts, whole, shards, f"0-{shards - 1}" if shards else "", once)
    _tell_submitted(sent, scripts, whole, options)
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
    from distsurf.shards import as_array, shard_files

    folder = submit.folder_of(whole)
    if options.gpus_per_node or options.requeues is not None:
        raise InputError(
            f"--missing sends {folder}/array.sbatch again: leave --gpus-per-node and --requeues out, "
            "or edit that; --time and options of sbatch's go with it"
        )
    script, kept = folder / "array.sbatch", folder / submit.JOB_FILE
    sent = [one for one in submit.read_submitted(whole) if one.shards]
    if not sent or not script.exists():
        raise InputError(f"no array was submitted for {whole}: submit one with --array N")
    if kept.exists() and kept.read_text() != options.job.read_text():
        print(f"note: {options.job} has changed; {kept} is what was submitted and goes on", file=sys.stderr)
    count = sent[-1].shards
    if options.dry_run:  # without a merge: nothing is to be written
        file = submit.reference(whole, shard_files(whole))
        states = [] if file is None else submit.shard_states(whole, count, file.grid, file.fingerprint)
        missing = [s.shard.index for s in states if s.done < s.size] if states else list(range(count))
    else:
        merged, missing = submit.still_missing(whole, count)
        if merged is not None and merged.surface.complete:
            print(f"{whole} is complete: nothing is missing")
            return 0
    queued = submit.tasks_of(submit.jobs_in_queue(whole), count)
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
    _tell_submitted(told, scripts, whole, options)
    return 0


def _tell_submitted(
    sent: Submitted, scripts: Sequence[Path], whole: Path, options: argparse.Namespace
) -> None:
    tasks = f", tasks {sent.tasks} of {sent.shards} shards" if sent.shards else ""
    print(f"job {sent.job}{tasks}: {scripts[0]}")
    if sent.merge is not None:
        print(f"job {sent.merge}, after them: {scripts[1]}")
    command, log = own_command(), f"{sent.job}_*.log" if sent.shards else f"{sent.job}.log"
    print(f"\nwatch:\n  {command} status {shlex.quote(str(whole.parent))}\n  squeue -j {sent.job}")
    print(f"  tail -F {shlex.quote(str(scripts[0].parent))}/{log}")
    if sent.shards:
        out = [] if options.out is None else ["--out", options.out]
        again = ["submit", str(options.job), *(part for one in options.set for part in ("--set", one)), *out]
        print(f"if shards fail: {command} {shlex.join(again)} --missing")


def status_of_folder(folder: Path) -> int:
    """Every surface in a folder, how far its shards are, and its jobs in the queue."""
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
            print(printable(str(error)))
    return 0


def _status_of_shards(whole: Path, shards: Mapping[Path, ArrayShard]) -> None:
    from distsurf import submit
    from distsurf.shards import ArrayShard
    from distsurf.surface import SurfaceFile

    sent = [one.shards for one in submit.read_submitted(whole) if one.shards > 1]
    # What was submitted last is what this is about; files of other jobs are said to be so.
    latest = sorted(shards, key=lambda path: shards[path].count not in sent[-1:])
    file = submit.reference(whole, latest) or SurfaceFile.open(whole)
    grid, fingerprint = file.grid, file.fingerprint
    if whole.exists():
        state = submit.state_of(whole, ArrayShard(0, 1), grid, fingerprint)
        print(f"{whole}: {state.done:,} of {state.size:,} points{_in_brackets(state.trouble)}")
    jobs = submit.jobs_in_queue(whole)
    for job in jobs:
        if job.task.is_alive and job.task.index is None:
            what = "merge" if job.is_merge else "job"
            print(f"{what} {job.task.job} {job.task.state}{_in_brackets(job.task.why)}")
    for count in sorted({*(shard.count for shard in shards.values()), *sent[-1:]} - {1}):
        queue = submit.tasks_of(jobs, count)
        states = submit.shard_states(whole, count, grid, fingerprint)
        done = sum(state.done for state in states)
        finished = sum(state.done == state.size for state in states)
        print(f"{count} shards of {whole}: {finished} complete; {done:,} of {grid.size:,} points")
        shown = [state for state in states if state.done < state.size or state.shard.index in queue]
        for state in shown[:MOST_SHOWN]:
            task = queue.get(state.shard.index)
            what = f"  {task.job}_{task.index} {task.state}{_in_brackets(task.why)}" if task else ""
            progress = f"{state.done:,} of {state.size:,}"
            print(f"  {state.shard.index:5}  {progress}{what}{_in_brackets(state.trouble)}")
        if len(shown) > MOST_SHOWN:
            print(f"  … and {len(shown) - MOST_SHOWN} more")


def _in_brackets(text: str) -> str:
    return f" ({printable(text)})" if text else ""
