"""A SLURM job that comes back after walltime and preemption, as long as its surface comes on: ``run --requeues K``.

A note beside the surface file counts how often and why, over all starts of one job. What SLURM does with the job is
asked of SLURM, at the end of each start:

- it still runs: its walltime ends, or it is preempted with some time to go, or its ranks died. It is requeued here.
- SLURM has requeued it already (preemption without time to go): nothing is left to do.
- it was cancelled: nothing may be done, or it would come back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from distsurf.distribute.slurm import SlurmJob, seconds_of
from distsurf.errors import Incomplete, InputError
from distsurf.files import replacing
from distsurf.launch import state
from distsurf.surface.claim import require_unclaimed

MOST_WAITING = 3600.0
"""Seconds for which a start waits for an earlier one that still writes."""
MOST_BARREN = 3
"""So many starts in a row may bring nothing: one may be preempted before its first point."""
WALLTIME, PREEMPTED, DEATHS = "end of its walltime", "preemption", "death of its ranks"


@dataclass
class Note:
    """What is kept from one start of a job to the next."""

    job: str
    counts: dict[str, int] = field(default_factory=dict)
    """Requeues by their reason."""
    progress: int | None = None
    """How far the surface was at the last start."""
    barren: int = 0
    """How many starts in a row have brought nothing."""

    def in_words(self) -> str:
        """The counts."""
        return ", ".join(f"{count} for {reason}" for reason, count in self.counts.items()) or "none by itself"


class Requeues:
    """Brings this SLURM job back, ``most`` times for each reason. Use `begin` at its start and `end` at its end."""

    def __init__(self, job: SlurmJob, path: Path, most: int, say: Callable[[str], None]):
        self._job, self._path, self._most, self._say = job, path, most, say
        self._file = path.with_name(f".{path.name}.requeues")
        self._note = self._read()

    def begin(self) -> None:
        """Say which start this is. Raises Incomplete where the last ones brought the surface no further."""
        note, progress = self._note, state(self._path).progress
        if note.progress is not None:
            note.barren = note.barren + 1 if progress <= note.progress else 0
        note.progress = progress
        self._write()
        if self._job.restarts:
            self._say(
                f"job {self._job.name}, restart {self._job.restarts} (SLURM_RESTART_COUNT); requeued: {note.in_words()}"
            )
        if note.barren >= MOST_BARREN:
            raise Incomplete(
                f"the last {MOST_BARREN} starts of job {self._job.name} brought the surface no further: it is not "
                "started again; its log tells why they ended, and whether the walltime leaves time for a point"
            )
        self._wait_for_the_last_start()

    def _wait_for_the_last_start(self) -> None:
        """A node that is declared dead may work on: what it started holds the file, until it is through or dies."""
        has_said = False
        end = time.monotonic() + MOST_WAITING
        while self._job.restarts and self._path.exists():
            try:
                require_unclaimed(self._path)
                return
            except InputError as error:
                if time.monotonic() > end:
                    raise
                if not has_said:
                    self._say(f"{error}; this start waits for it")
                    has_said = True
            time.sleep(2)

    def end(self, stopped: str) -> str:
        """After a start that left points to do: requeue the job, which ends this process, or say why not.

        ``stopped`` is the signal that stopped the ranks; empty where they died. Raises InputError where SLURM does not
        answer.
        """
        facts = self._job.facts()
        if int(facts.get("Restarts", 0)) > self._job.restarts:
            # Or somebody requeued it by hand: SLURM's facts begin anew then, and do not tell.
            self._count(PREEMPTED)
            return "SLURM has requeued it"
        preempted = facts.get("PreemptTime", "None") not in ("None", "Unknown")
        is_over = _walltime_is_over(facts)
        if facts.get("JobState") != "RUNNING" and not is_over:
            return "it was cancelled, and is not requeued"
        reason = PREEMPTED if preempted else WALLTIME if stopped or is_over else DEATHS
        if self._note.counts.get(reason, 0) >= self._most:
            return (
                f"it was requeued {self._most} times for {reason} (--requeues), and is not again; "
                "submitting it again continues"
            )
        self._count(reason)
        self._say(f"job {self._job.name} is requeued for {reason} ({self._note.in_words()})")
        self._job.requeue()
        return "it is requeued"

    def forget(self) -> None:
        """All is done: the note is not needed any more."""
        self._file.unlink(missing_ok=True)

    def _count(self, reason: str) -> None:
        self._note.counts[reason] = self._note.counts.get(reason, 0) + 1
        self._write()

    def _read(self) -> Note:
        """The note of this job; a new one for another job, or where it cannot be read."""
        with suppress(OSError, ValueError, TypeError):
            note = Note(**json.loads(self._file.read_text()))
            if note.job == self._job.name:
                return note
        return Note(self._job.name)

    def _write(self) -> None:
        with replacing(self._file) as temporary:
            temporary.write_text(json.dumps(asdict(self._note)))


def _walltime_is_over(facts: dict[str, str]) -> bool:
    """Whether a job has run for as long as it may: SLURM ends it then, unless it asked for a signal before."""
    with suppress(KeyError, ValueError):
        limit = seconds_of(facts["TimeLimit"])
        age = datetime.now() - datetime.fromisoformat(facts["StartTime"])
        return limit is not None and age.total_seconds() >= limit
    return False
