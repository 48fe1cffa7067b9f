"""What SLURM says of this job and of others, and what is asked of it, through its own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distsurf.errors import InputError

COMMAND_SECONDS = 60.0
"""How long a controller may take to answer."""


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process belongs to."""

    name: str
    """What ``scontrol`` and ``scancel`` call it: ``17``, or ``17_3`` for an array's task."""
    restarts: int
    """How often it was requeued before this start."""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
        """The job of this process; None outside SLURM."""
        number = environment.get("SLURM_JOB_ID")
        if number is None:
            return None
        # The last task of an array has the number of the array itself, which means all tasks.
        array, task = (environment.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
        name = number if array is None or task is None else f"{array}_{task}"
        return cls(name, int(environment.get("SLURM_RESTART_COUNT") or 0))

    def facts(self) -> dict[str, str]:
        """What ``scontrol show job`` tells, by name. Raises InputError where it does not answer."""
        # A value may hold spaces; a name is a word before an equals sign.
        told = ask("scontrol", "-o", "show", "job", self.name)
        return dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", told.strip()))

    def requeue(self) -> None:
        """Have it started again, which ends it. Raises InputError where SLURM refuses."""
        ask("scontrol", "requeue", self.name)


def ask(*command: str, text: str | None = None) -> str:
    """What a command of SLURM's prints. Raises InputError with its message where it fails."""
    if shutil.which(command[0]) is None:
        raise InputError(f"there is no {command[0]} here: this is for clusters with SLURM")
    try:
        ended = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        also = "; what it was to submit may be in the queue (squeue --me)" if command[0] == "sbatch" else ""
        raise InputError(f"{command[0]} has not answered for {COMMAND_SECONDS:g} s{also}") from None
    if ended.returncode != 0:
        said = " ".join(ended.stderr.split()) or f"exit code {ended.returncode}"
        raise InputError(f"{command[0]} refused: {said}")
    return ended.stdout


def submit(script: str, options: Sequence[str] = ()) -> int:
    """Submit a script file, with options of sbatch's; returns the job's number. Raises InputError."""
    told = ask("sbatch", "--parsable", *options, script)
    return int(told.strip().split(";")[0])  # JOBID[;CLUSTER]


def seconds_of(time: str) -> float | None:
    """A walltime in seconds, in any of the forms that ``--time`` has; None where it is none, or has no end."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        return None
    days, *clock = (None if part is None else int(part) for part in found.groups())
    first, second, third = clock
    if days is not None or third is not None:  # D-H, D-H:M, D-H:M:S, H:M:S
        return (((days or 0) * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    return (first or 0) * 60 + (second or 0)  # M, M:S


@dataclass(frozen=True)
class Task:
    """A job in the queue, or one task of an array."""

    job: int
    index: int | None
    state: str
    reason: str

    @property
    def why(self) -> str:
        """Why it is in this state, where SLURM says so."""
        return "" if self.reason == "None" else self.reason

    @property
    def is_alive(self) -> bool:
        """Whether it runs, or will."""
        return self.state in ("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "REQUEUED", "COMPLETING")


def queue(jobs: Sequence[int]) -> list[Task]:
    """What ``squeue`` has of some jobs, every task of an array apart. Raises InputError where it does not answer."""
    if not jobs:
        return []
    numbers = ",".join(map(str, jobs))
    try:
        told = ask("squeue", "-h", "-r", "-t", "all", "-j", numbers, "-o", "%F|%K|%T|%r")
    except InputError as error:
        if "Invalid job id" in str(error):  # it has been gone for a while
            return []
        raise
    tasks = []
    for line in told.splitlines():
        job, index, state, reason = line.strip().split("|", 3)
        tasks.append(Task(int(job), int(index) if index.isdigit() else None, state, reason))
    return tasks
