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
    from distsurf.distribute.slurm import Task
    from distsurf.job import Job
    from distsurf.shards import ArrayShard
    from distsurf.submit import Submitted

MOST_SHOWN = 40
"""Shards that ``status`` lists."""


def submit(options: argparse.Namespace) -> int:
    """Write batch scripts and submit them."""
    from distsurf import submit
    from distsurf.merge import require_files_of
    from distsurf.surface import Surface

    job = read_job(options.job, options.set)
    whole = Path(options.out) if options.out else job.path
    if options.missing:
        return _submit_missing(job, whole, options)
    for_scripts, once = submit.apart(options.more)
    text = options.job.read_text()
    gpu_type, gpus = options.gpus_per_node
    shards, at_once = (0, 0) if options.array is None else submit.parse_array(options.array)
    if shards > job.evaluated_grid().size:
        raise InputError(f"--array {shards}: the grid has {job.evaluated_grid().size:,} points only")
    require_files_of(job, whole)
    if whole.exists() and Surface.load(whole).complete:
        print(f"{whole} is complete: there is nothing to submit")
        return 0
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
        gpus_per_node=gpus,
        gpu_type=gpu_type,
        time=time,
        requeues=20 if options.requeues is None else options.requeues,
        options=for_scripts,
        logs=f"{submit.folder_of(whole)}/",
        folder=os.getcwd(),
        activate=submit.environment_line(),
        mpi=submit.mpi_flag(),
    )
    texts = submit.scripts(wish)
    submit.require_time_to_save(time, next(iter(texts.values())))
    if options.dry_run:
        for name, script in texts.items():
            print(f"# {submit.folder_of(whole) / name}\n{script}")
        return 0
    with submit.written_scripts(whole, wish, text) as scripts:
        sent = submit.send(scripts, whole, wish, f"0-{shards - 1}" if shards else "", once)
    _tell_submitted(sent, scripts, whole, options)
    return 0


def _predict(job: Job, shards: int, at_once: int, options: argparse.Namespace) -> tuple[int, str]:
    """A good number of shards, if none is given, and the walltime to ask for; measured here, which takes a while."""
    from distsurf import submit
    from distsurf.bench.compare import with_weights
    from distsurf.bench.plan import plan

    print("measuring a few points, for a walltime and a number of shards (distsurf plan) …", file=sys.stderr)
    _, gpus = options.gpus_per_node
    ranks = options.nodes * (gpus or 1) if options.nodes else 1
    forecast = plan(with_weights(job), ranks, gpus)
    if options.nodes:
        return 0, submit.walltime(forecast.wall_seconds)
    shards = shards or forecast.shards
    points = -(-forecast.points // shards) / max(gpus, 1)
    return shards, submit.walltime(forecast.set_up_seconds + points * forecast.seconds_per_point)


def _submit_missing(job: Job, whole: Path, options: argparse.Namespace) -> int:
    from distsurf import submit
    from distsurf.shards import as_array, shard_files

    folder = submit.folder_of(whole)
    if options.gpus_per_node[1] or options.requeues is not None:
        raise InputError(
            f"--missing sends {folder}/array.sbatch again: leave --gpus-per-node and --requeues out, "
            "or edit that; --time and options of sbatch's go with it"
        )
    script, kept = folder / "array.sbatch", folder / submit.JOB_FILE
    sent = [one for one in submit.read_submitted(whole) if one.shards]
    text = script.read_text() if script.exists() else ""
    if not sent or not script.exists():
        raise InputError(f"no array was submitted for {whole}: submit one with --array N")
    last, count = sent[-1], sent[-1].shards
    has_changed = kept.exists() and kept.read_text() != options.job.read_text()
    if has_changed or (options.set and options.set != last.overrides):
        what = f"{options.job} has changed" if has_changed else "--set is not taken"
        print(f"note: {what}; {kept} is what was submitted, and goes on", file=sys.stderr)
    submit.apart(options.more)  # raises for options that cannot be
    if options.time is not None:
        submit.require_time_to_save(options.time, text)
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
    limit = f"%{last.at_once}" if last.at_once else ""
    wish = submit.Wish("", tuple(last.overrides), shards=count, at_once=last.at_once)
    told = submit.send(scripts, whole, wish, array, [f"--array={array}{limit}", *time], options.more)
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
    for whole in submit.submitted_in(folder):
        surfaces.setdefault(whole, {})
    if not surfaces:
        raise InputError(
            f"there is no surface file in {folder}, no shard of one, and nothing was submitted for one"
        )
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

    sent = submit.read_submitted(whole)
    file = submit.reference(whole, shards)
    if file is None and (whole.exists() or shards):
        file = SurfaceFile.open(whole if whole.exists() else next(iter(shards)))  # which raises
    if file is None:
        print(f"{whole}: nothing is evaluated yet")
    elif whole.exists():
        state = submit.state_of(whole, ArrayShard(0, 1), file.grid, file.fingerprint)
        print(f"{whole}: {state.done:,} of {state.size:,} points{_in_brackets(state.trouble)}")
    jobs = submit.jobs_in_queue(whole)
    for job in jobs:
        if job.task.index is None and (job.task.is_alive or (file is None and not job.is_merge)):
            what = "merge" if job.is_merge else "job"
            print(f"{what} {job.task.job} {job.task.state}{_in_brackets(job.task.why)}")
    asked = [one.shards for one in sent if one.shards][-1:]
    for count in sorted({*(shard.count for shard in shards.values()), *asked} - ({1} if file else set())):
        queue = submit.tasks_of(jobs, count)
        if file is None:
            print(f"{count} shards of {whole}:")
            rows: list[tuple[int, str, str, Task | None]] = [
                (index, "", "", task) for index, task in sorted(queue.items())
            ]
        else:
            states = submit.shard_states(whole, count, file.grid, file.fingerprint)
            done = sum(state.done for state in states)
            finished = sum(state.done == state.size for state in states)
            print(f"{count} shards of {whole}: {finished} complete; {done:,} of {file.grid.size:,} points")
            rows = [
                (s.shard.index, f"{s.done:,} of {s.size:,}", s.trouble, queue.get(s.shard.index))
                for s in states
                if s.done < s.size or s.shard.index in queue
            ]
        for index, progress, trouble, task in rows[:MOST_SHOWN]:
            what = f"{task.job}_{task.index} {task.state}{_in_brackets(task.why)}" if task else ""
            print("  ".join(filter(None, [f"  {index:5}", progress, what])) + _in_brackets(trouble))
        if len(rows) > MOST_SHOWN:
            print(f"  … and {len(rows) - MOST_SHOWN} more")
    if sent and not any(job.task.is_alive for job in jobs) and (file is None or not _is_complete(whole)):
        print(f"nothing of it is in the queue; the logs: {submit.folder_of(whole)}/{sent[-1].job}*.log")


def _is_complete(whole: Path) -> bool:
    from distsurf.surface import Surface

    return whole.exists() and Surface.load(whole).complete


def _in_brackets(text: str) -> str:
    return f" ({printable(text)})" if text else ""
