"""Batch scripts for SLURM, written beside the surface and submitted: ``distsurf submit``, and what has become of it.

The scripts are files that a user reads, edits and submits again; `slurm/` has the same ones to copy. What was submitted
is kept beside them, so that `status` and ``submit --missing`` know of how many shards the job is.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from distsurf.distribute import slurm
from distsurf.errors import DistsurfError, InputError
from distsurf.files import replacing
from distsurf.grid import Grid
from distsurf.merge import Merged, merge, missing_tasks
from distsurf.shards import ArrayShard, shard_files
from distsurf.surface import DONE, Status, SurfaceFile

SIGNAL_SECONDS = 120
"""How long before the end of its walltime a job is told to save."""
SPARE = 2.0
"""Walltime asked for, in units of the time that `distsurf plan` predicts: other nodes may be slower, or shared."""
LEAST_MINUTES = 15
MERGE_SECONDS = 1800
ABOUT_THE_USER = ("--partition", "--account", "--qos", "--reservation", "--clusters")
"""Options of sbatch's that the merge needs too."""
LONG_NAMES = {
    "-A": "--account", "-b": "--begin", "-D": "--chdir", "-d": "--dependency", "-H": "--hold", "-J": "--job-name",
    "-M": "--clusters", "-n": "--ntasks", "-o": "--output", "-p": "--partition", "-q": "--qos", "-W": "--wait",
}  # fmt: skip
"""Options of sbatch's that are looked for here, by their short names."""
ONCE = ("--dependency", "--begin", "--hold")
"""Options of sbatch's for one submission: the scripts are to be submitted again without them."""
REFUSED = {
    "--wait": "submit does not wait",
    "--test-only": "--dry-run prints the scripts",
    "--wrap": "submit writes the script",
    "--parsable": "submit reads what sbatch prints",
    "--chdir": "jobs run in the folder in which they are submitted: go there",
}
OWN_NAMES = (
    "--array",
    "--nodes",
    "--missing",
    "--gpus-per-node",
    "--time",
    "--requeues",
    "--out",
    "--set",
    "--dry-run",
)
JOB_FILE = "job.toml"
"""The job as it was submitted, beside the scripts that run it."""
CPUS = 'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # srun does not take it from sbatch by itself'
TOGETHER = "--kill-on-bad-exit=1 --wait=60"
"""Of srun's options: one rank that dies ends the others, and all start again. They would go on without it, but not
where it dies in MPI's own start, and would wait there until the walltime ends."""


@dataclass(frozen=True)
class Wish:
    """What a script is to ask SLURM for."""

    job: str
    """The job file, as it is typed."""
    overrides: tuple[str, ...] = ()
    out: str | None = None
    shards: int = 0
    """0 for one job over all points."""
    at_once: int = 0
    """How many shards run at a time; 0 for no limit."""
    nodes: int = 1
    gpus_per_node: int = 0
    gpu_type: str = ""
    time: str = "01:00:00"
    requeues: int = 20
    options: tuple[str, ...] = ()
    """More options of sbatch's."""
    logs: str = "distsurf-"
    """How the names of its logs begin."""
    folder: str | None = None
    """Where the job is to run; None for where it is submitted."""
    activate: str = ""
    """The line that brings ``distsurf`` into reach."""
    mpi: str = "pmi2"
    """srun's ``--mpi`` for the MPI library."""


EXAMPLES = (
    Wish("my.toml", nodes=2, gpus_per_node=4, options=("--cpus-per-task=8",)),
    Wish("my.toml", shards=8, at_once=4, gpus_per_node=1, options=("--cpus-per-task=8",)),
)
"""What the scripts in ``slurm/`` ask for: they are what `scripts` makes of this."""


@dataclass(frozen=True)
class Submitted:
    """What was submitted: jobs' numbers, and of how many shards the surface is, how many of them at a time."""

    job: int
    merge: int | None
    shards: int
    tasks: str
    at_once: int = 0
    overrides: list[str] = field(default_factory=list)
    """The values of the job that ``--set`` replaced."""


# -- scripts ----------------------------------------------------------------------------------------------


def array_script(wish: Wish) -> str:
    """One shard per array task, each a process or an MPI job of its own."""
    last, limit = wish.shards - 1, f"%{wish.at_once}" if wish.at_once else ""
    at_once = f", {wish.at_once} at a time" if wish.at_once else ""
    head = [
        "# A loss surface as an array of jobs: every task evaluates one shard, into a file of its own.",
        "# It saves and comes back by itself when it is preempted and when its walltime ends. Then: merge.sbatch.",
        *_lines(wish, "distsurf", "%A_%a"),
        _line(f"--array=0-{last}{limit}", f"shards (the N of --shard below: {wish.shards}){at_once}"),
    ]
    return _script(head, wish, CPUS, f'{_run(wish)} --shard "$SLURM_ARRAY_TASK_ID/{wish.shards}"')


def mpi_script(wish: Wish) -> str:
    """One MPI job over nodes, one rank per GPU."""
    head = [
        "# A loss surface by one MPI job over several nodes, one rank per GPU (or --ntasks-per-node of them on CPUs).",
        "# It saves and comes back by itself when it is preempted and when its walltime ends.",
        *_lines(wish, "distsurf", "%j"),
    ]
    return _script(head, wish, CPUS, _run(wish))


def merge_script(wish: Wish) -> str:
    """What puts the shards together, after all of them."""
    about_the_user = [option for option in _pairs(wish.options) if option[0] in ABOUT_THE_USER]
    head = [
        "# Puts the shards of a loss surface together. Submit it with --dependency=afterany:ARRAY, and not afterok:",
        "# that is never met once a task has failed. It checks every shard, and names what is to be sent again.",
        _line("--job-name=distsurf-merge"),
        _line("--ntasks=1"),
        _line(f"--time={_merge_time(wish.time)}"),
        _line("--output=" + _quoted(f"{_pattern(wish.logs)}%j-merge.log")),
        *([_line("--chdir=" + _quoted(wish.folder))] if wish.folder else []),
        *(_line(_joined(option)) for option in about_the_user),
    ]
    where = [] if wish.out is None else [shlex.quote(wish.out)]
    return _script(head, wish, " ".join(["distsurf merge", *(where or _job(wish))]))


def _lines(wish: Wish, name: str, log: str) -> list[str]:
    given = {option[0] for option in _pairs(wish.options)}
    lines = {
        "--job-name": (f"={name}", ""),
        "--nodes": (f"={wish.nodes}", ""),
        "--ntasks-per-node": (f"={wish.gpus_per_node or 1}", "ranks"),
        "--gpus-per-node": (
            f"={wish.gpu_type}{wish.gpus_per_node}",
            "one for each rank; without this line: CPUs",
        ),
        "--time": (f"={wish.time}", ""),
        "--signal": (f"=USR2@{SIGNAL_SECONDS}", "before the end of its walltime: time to save"),
        "--requeue": ("", "may come back"),
        "--open-mode": ("=append", "one log over all its starts"),
        "--output": ("=" + _quoted(f"{_pattern(wish.logs)}{log}.log"), ""),
        "--chdir": ("=" + _quoted(wish.folder or ""), ""),
    }
    if _has_tasks(wish.options):
        del lines["--ntasks-per-node"]
    if not wish.gpus_per_node:
        del lines["--gpus-per-node"]
    if wish.folder is None:
        del lines["--chdir"]
    own = [_line(key + value, why) for key, (value, why) in lines.items() if key not in given]
    return [*own, *(_line(_joined(option)) for option in _pairs(wish.options))]


def _joined(option: tuple[str, ...]) -> str:
    name, *value = option
    return ("=" if name.startswith("--") else " ").join([name, *map(_quoted, value)])


def _pattern(name: str) -> str:
    """A name in which sbatch is to replace nothing."""
    return name.replace("%", "%%")


def _merge_time(time: str) -> str:
    """Half an hour, or what a shard has where that is less: partitions may not give more."""
    seconds = slurm.seconds_of(time)
    return time if seconds is not None and seconds < MERGE_SECONDS else "00:30:00"


def _quoted(value: str) -> str:
    """A value as sbatch reads it in a script: quoted where it has spaces, or what would begin a comment.

    Raises InputError for what cannot be written there.
    """
    if any(mark in value for mark in '"\\\n\r'):
        raise InputError(
            f"{value!r}: quotes, backslashes and line breaks cannot be written into a batch script"
        )
    return f'"{value}"' if any(mark in value for mark in " \t#") else value


def _line(option: str, why: str = "") -> str:
    return f"#SBATCH {option:32}  # {why}" if why else f"#SBATCH {option}"


def _script(head: Sequence[str], wish: Wish, *commands: str) -> str:
    set_up = [wish.activate] if wish.activate else ["# module load python", "# source venv/bin/activate"]
    return "\n".join(["#!/bin/bash", *head, "", *set_up, "", *commands, ""])


def _run(wish: Wish) -> str:
    is_alone = wish.nodes == 1 and wish.gpus_per_node <= 1 and not _has_tasks(wish.options)
    under = "srun" if is_alone else f"srun --mpi={wish.mpi} {TOGETHER}"
    out = [] if wish.out is None else ["--out", shlex.quote(wish.out)]
    return " ".join(
        ["distsurf run", *_job(wish), *out, f'--under "{under}"', f"--restarts 3 --requeues {wish.requeues}"]
    )


def _has_tasks(options: Sequence[str]) -> bool:
    return any(option[0] in ("--ntasks", "--ntasks-per-node") for option in _pairs(options))


def _job(wish: Wish) -> list[str]:
    return [shlex.quote(wish.job), *(f"--set {shlex.quote(override)}" for override in wish.overrides)]


def _pairs(options: Sequence[str]) -> list[tuple[str, ...]]:
    """sbatch's options, each with its value: ``--a=b``, ``--a b``, ``-a b``, ``-ab`` or a flag. Raises InputError."""
    found: list[tuple[str, ...]] = []
    for word in options:
        if word.startswith("-") and len(word) > 1:
            name, equals, value = word.partition("=")
            if not word.startswith("--") and len(word) > 2:
                name, equals, value = word[:2], "=", word[2:]
            name = LONG_NAMES.get(name, name)
            is_short = name.startswith("--") and name != "--gpus"  # which is sbatch's
            if whole := next((own for own in OWN_NAMES if own.startswith(name) and is_short), None):
                raise InputError(f"{name}: write {whole} in full")
            if name in REFUSED:
                raise InputError(f"{word}: {REFUSED[name]}")
            found.append((name, value) if equals else (name,))
        elif found and len(found[-1]) == 1:
            found[-1] = (*found[-1], word)
        else:
            raise InputError(
                f"{word!r} belongs to no option; expected JOB.toml first, then options of sbatch's"
            )
    return found


# -- submitting -------------------------------------------------------------------------------------------


def folder_of(whole: Path) -> Path:
    """Where the scripts, logs and numbers of a surface's jobs lie."""
    return whole.with_name("slurm" if whole.stem == "surface" else f"{whole.stem}.slurm")


def scripts(wish: Wish) -> dict[str, str]:
    """The scripts by their files' names, in the order in which they are submitted."""
    if not wish.shards:
        return {"mpi.sbatch": mpi_script(wish)}
    return {"array.sbatch": array_script(wish), "merge.sbatch": merge_script(wish)}


def apart(options: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Options of sbatch's for the scripts, and those for this one submission (`ONCE`)."""
    pairs = _pairs(options)
    once = ["=".join(pair) for pair in pairs if pair[0] in ONCE]
    return tuple(word for pair in pairs if pair[0] not in ONCE for word in pair), once


def require_time_to_save(time: str, script: str) -> None:
    """Raise InputError where a walltime would end before the signal by which the script's job is told to save."""
    after = re.search(r"^#SBATCH --signal=\S*@(\d+)", script, re.MULTILINE)
    seconds = slurm.seconds_of(time)
    if seconds is not None and after is not None and seconds <= int(after[1]):
        raise InputError(
            f"--time {time}: the job is told to save {after[1]} s before its walltime ends (--signal), and has no "
            "time before that; give more"
        )


def require_free(whole: Path, text: str, options: Sequence[str]) -> None:
    """Raise InputError where a job for this surface is in the queue, unless the new one waits for it.

    What that one reads, the job as it was submitted, has to stay what it is: ``text``.
    """
    alive = [job for job in jobs_in_queue(whole) if job.task.is_alive]
    if not alive:
        return
    numbers = ", ".join(str(number) for number in sorted({job.task.job for job in alive}))
    newest = max(alive, key=lambda job: job.submitted.job).submitted
    waits_for = re.findall(
        r"\d+|singleton", "".join(_joined(o) for o in _pairs(options) if o[0] == "--dependency")
    )
    if not {"singleton", str(newest.job), str(newest.merge)} & set(waits_for):
        raise InputError(
            f"job {numbers} for {whole} is in the queue: scancel it first, or have this one wait: "
            f"--dependency=afterany:{newest.merge or newest.job}"
        )
    kept = folder_of(whole) / JOB_FILE
    if kept.exists() and kept.read_text() != text:
        raise InputError(
            f"the job is not as it was submitted with {numbers}, still in the queue, which reads {kept}: "
            "wait for its end, or give another --out"
        )


@contextmanager
def written_scripts(whole: Path, wish: Wish, text: str) -> Iterator[list[Path]]:
    """Write the job's text and the scripts; yields these in the order in which they are submitted.

    Where that fails, all are again what they were: what was submitted before may be submitted again.
    """
    texts = {folder_of(whole) / JOB_FILE: text}
    texts |= {folder_of(whole) / name: script for name, script in scripts(wish).items()}
    before = {path: path.read_bytes() if path.exists() else None for path in texts}
    try:
        for path, new in texts.items():
            with replacing(path) as temporary:
                temporary.write_text(new)
        yield list(texts)[1:]
    except BaseException:
        for path, old in before.items():
            if old is None:
                path.unlink(missing_ok=True)
                continue
            with replacing(path) as temporary:
                temporary.write_bytes(old)
        with suppress(OSError):  # there may be logs in it
            folder_of(whole).rmdir()
        raise


def send(
    files: Sequence[Path],
    whole: Path,
    wish: Wish,
    tasks: str,
    options: Sequence[str] = (),
    more: Sequence[str] = (),
) -> Submitted:
    """Submit a script, and the merge that waits for it. Raises InputError: then nothing is submitted.

    ``options`` are for the script; of ``more``, those that are about the user are for the merge too.
    """
    first = slurm.submit(str(files[0]), [*options, *more])
    merge_job = None
    if len(files) > 1:
        try:
            theirs = [_joined(pair) for pair in _pairs(more) if pair[0] in ABOUT_THE_USER]
            merge_job = slurm.submit(str(files[1]), [f"--dependency=afterany:{first}", *theirs])
        except InputError as error:
            with suppress(InputError):
                slurm.ask("scancel", str(first))
            raise InputError(f"{error}; the array {first} was cancelled") from error
    submitted = Submitted(first, merge_job, wish.shards, tasks, wish.at_once, list(wish.overrides))
    told = [*read_submitted(whole), submitted]
    with replacing(folder_of(whole) / "submitted.json") as temporary:
        temporary.write_text(json.dumps([asdict(one) for one in told], indent=1) + "\n")
    return submitted


def read_submitted(whole: Path) -> list[Submitted]:
    """What has been submitted for a surface, the oldest first."""
    with suppress(OSError, ValueError, TypeError):
        return [Submitted(**one) for one in json.loads((folder_of(whole) / "submitted.json").read_text())]
    return []


def submitted_in(folder: Path) -> list[Path]:
    """The surfaces of a folder for which something was submitted."""
    names = sorted(path.parent.name for path in folder.glob("*/submitted.json"))
    stems = ["surface" if name == "slurm" else name.removesuffix(".slurm") for name in names]
    wholes = [whole for stem in stems for whole in [folder / f"{stem}.h5"] if folder_of(whole).name in names]
    return [whole for whole in wholes if read_submitted(whole)]


def environment_line() -> str:
    """What a script types to have this environment."""
    if sys.prefix == sys.base_prefix:
        return ""
    return f"source {shlex.quote(str(Path(sys.prefix) / 'bin' / 'activate'))}"


def mpi_flag() -> str:
    """srun's ``--mpi`` for the MPI library that Python loads."""
    with suppress(ImportError, RuntimeError):
        import mpi4py

        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI

        return "pmix" if MPI.get_vendor()[0] == "Open MPI" else "pmi2"
    return "pmi2"


def walltime(seconds: float) -> str:
    """Walltime to ask for, for so many predicted seconds: whole quarters of an hour."""
    quarters = math.ceil((SPARE * seconds + SIGNAL_SECONDS) / 60 / LEAST_MINUTES)
    hours, minutes = divmod(max(1, quarters) * LEAST_MINUTES, 60)
    return f"{hours:02}:{minutes:02}:00"


def parse_array(text: str) -> tuple[int, int]:
    """``N`` or ``N%M``: (shards, how many at a time or 0). Raises InputError."""
    found = re.fullmatch(r"([1-9]\d{0,4})(?:%([1-9]\d{0,4}))?", text)
    if found is None:
        raise InputError(f"--array {text}: expected the number of shards N, or N%M for M of them at a time")
    return int(found[1]), int(found[2] or 0)


# -- what became of it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardState:
    """How far a shard is."""

    shard: ArrayShard
    done: int
    size: int
    trouble: str = ""


def reference(whole: Path, shards: Iterable[Path]) -> SurfaceFile | None:
    """A file of the job that most of them are of, the shards before the whole, closed; None if none can be read."""
    files = []
    for path in (*shards, whole):
        with suppress(DistsurfError), SurfaceFile.open(path) as file:
            files.append(file)
    told = [json.dumps(file.fingerprint, sort_keys=True) for file in files]
    return max(zip(files, map(told.count, told), strict=True), key=lambda one: one[1])[0] if files else None


def shard_states(whole: Path, count: int, grid: Grid, fingerprint: Mapping[str, str]) -> list[ShardState]:
    """How far each of the shards is, by their files."""
    shards = [ArrayShard(index, count) for index in range(count)]
    return [state_of(shard.path(whole), shard, grid, fingerprint) for shard in shards]


def state_of(path: Path, shard: ArrayShard, grid: Grid, fingerprint: Mapping[str, str]) -> ShardState:
    """How far a file is that is to have a shard's points; files of other jobs do not count."""
    size = len(range(shard.index, grid.size, shard.count))
    if not path.exists():
        return ShardState(shard, 0, size)
    try:
        with SurfaceFile.open(path) as file:
            if differing := file.difference(fingerprint):
                return ShardState(shard, 0, size, f"of another job: {differing}")
            if (file.shard or ArrayShard(0, 1)) != shard:
                what = f"shard {file.shard}" if file.shard else "the whole surface"
                return ShardState(shard, 0, size, f"it is a copy of {what}: move it away")
            status = file.status().ravel()[file.points()]
    except DistsurfError as error:
        return ShardState(shard, 0, size, str(error))
    failed = int((status == Status.FAILED).sum())
    return ShardState(shard, int(np.isin(status, DONE).sum()), size, f"{failed} failed" if failed else "")


def still_missing(whole: Path, count: int) -> tuple[Merged | None, list[int]]:
    """Merge what there is, and say which shards have points to evaluate."""
    if not shard_files(whole) and not whole.exists():
        return None, list(range(count))
    merged = merge(whole)
    return merged, missing_tasks(merged.surface, count)


@dataclass(frozen=True)
class Queued:
    """A job, or a task of an array, that SLURM still knows."""

    submitted: Submitted
    task: slurm.Task

    @property
    def is_merge(self) -> bool:
        """Whether it is the merge of what was submitted."""
        return self.task.job == self.submitted.merge


def jobs_in_queue(whole: Path) -> list[Queued]:
    """Jobs of a surface that SLURM still knows, ended ones among them; empty where there is no SLURM."""
    jobs = {number: one for one in read_submitted(whole) for number in (one.job, one.merge) if number}
    with suppress(InputError):
        return [Queued(jobs[task.job], task) for task in slurm.queue(list(jobs)) if task.job in jobs]
    return []


def tasks_of(jobs: Iterable[Queued], count: int) -> dict[int, slurm.Task]:
    """What SLURM has of arrays of so many shards, by shard: what is at work before what waits, the newest first."""
    told: dict[int, slurm.Task] = {}
    for job in sorted(jobs, key=lambda job: (job.task.state == "RUNNING", job.task.is_alive, job.task.job)):
        if job.task.index is not None and job.submitted.shards == count:
            told[job.task.index] = job.task
    return told
