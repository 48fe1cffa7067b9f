"""Starting a launcher, and starting it again as long as the surface comes on: ``run --under COMMAND --restarts K``."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np

from distsurf.distribute.signals import ASKING
from distsurf.errors import Incomplete, InputError
from distsurf.output import trials
from distsurf.surface import Status, SurfaceFile

STOP_NOTE = "DISTSURF_STOP_NOTE"
"""Environment variable with the name of the file for `leave_stop_note`."""
NEVER = 1000
"""What a start is behind before there is a file; starts that die in its verification come nearer to one without it."""
MOST_BARREN = 2
"""How many starts in a row may bring the surface no further."""
ALONE_SECONDS = 10.0
"""How often mpirun is looked after: twice without a child, and it is ended."""


@dataclass(frozen=True)
class State:
    """How far a surface file is."""

    pending: int
    failed: int
    progress: int
    """Grows with every point that is settled and with every attempt at one."""


def state(path: Path) -> State:
    """How far a file is; one that is not there has not begun. Raises DamagedFile."""
    if not path.exists():
        return State(pending=-1, failed=0, progress=trials(path) - NEVER)
    with SurfaceFile.open(path) as file:
        status = file.status().ravel()[file.points()]
        pending = int(np.count_nonzero(status == Status.PENDING))
        # Attempts count too: a point that kills its process is given up after the third, which is an advance.
        attempts = int(file.attempts().sum(dtype=np.int64))
    return State(
        pending, int(np.count_nonzero(status == Status.FAILED)), (status.size - pending) * 1000 + attempts
    )


def run_again(
    start: Callable[[int], int],
    path: Path,
    restarts: int,
    *,
    is_fresh: bool,
    stopped: Callable[[], str],
    say: Callable[[str], None],
) -> int:
    """Start a job until its surface has no pending point, ``1 + restarts`` times at most; returns the exit code.

    ``start`` runs it, given how often it ran before, and returns how that ended. What counts is the file: launchers
    were seen to end with 0 when a node had died, and SLURM's pmi2 to lose the first messages of ranks that were well.
    So one start by which the file does not advance is followed by another; the second in a row is the last, and so is
    one that was ``stopped`` by a signal. Raises Incomplete, and DamagedFile.
    """
    before = State(-1, 0, -NEVER) if is_fresh else state(path)
    barren = 0
    for number in range(restarts + 1):
        code = start(number)
        now = state(path)
        left = f"{now.pending:,} points are left" if now.pending >= 0 else f"there is no {path} yet"
        if now.pending == 0:
            if now.failed and code != Incomplete.exit_code:  # the ranks died, and have not said it
                raise Incomplete(
                    f"{now.failed:,} points failed, for which distsurf status {path} has the reasons; all others are "
                    "evaluated. The same command tries them again"
                )
            return Incomplete.exit_code if now.failed else 0
        if code == InputError.exit_code:
            return code
        if reason := stopped():
            raise Incomplete(f"stopped by {reason}; {left}: the same command continues")
        barren = barren + 1 if now.progress <= before.progress else 0
        if barren == MOST_BARREN or (barren and number == restarts):
            raise Incomplete(
                f"the ranks ended with {code} and brought the surface no further; {left}. "
                "What was printed above may tell why; ranks that are killed, for want of memory say, print nothing"
            )
        if number < restarts:
            say(f"the ranks ended with {code}; {left}: restart {number + 1} of at most {restarts}")
        before = now
    raise Incomplete(f"{left} after {restarts + 1} starts: the same command continues")


class Launcher:
    """Runs this program's ``run`` under a launcher (``mpirun -n 8``, ``srun``), or as one process under none.

    Signals that ask to stop are passed on; a second one ends all. A launcher's exit code does not tell whether its
    ranks were stopped or died: the first rank leaves a note where they were stopped.
    """

    def __init__(self, under: Sequence[str]):
        self._command = [*under, sys.executable, "-m", "distsurf", "run"]
        # Every mpirun passes SIGINT on to its ranks. For srun it is a question, and SIGTERM the end.
        self._passed_on = signal.SIGUSR2 if under and Path(under[0]).name == "srun" else signal.SIGINT
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped = ""
        """The signal that stopped this process or a rank."""

    def __call__(self, arguments: Sequence[str]) -> int:
        """The exit status of a start. Raises InputError where the launcher cannot be started."""
        before = {number: signal.signal(number, self._on_signal) for number in ASKING}
        try:
            with tempfile.NamedTemporaryFile(prefix="distsurf-stopped-") as note:
                self._process = self._start(arguments, {STOP_NOTE: note.name})
                code = self._wait(self._process)
                self.stopped = self.stopped or Path(note.name).read_text() or _asked_early(code)
            return code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self, arguments: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        try:
            # In a session of its own, so that Ctrl-C reaches the launcher through us, once.
            return subprocess.Popen(
                [*self._command, *arguments], start_new_session=True, env={**os.environ, **variables}
            )
        except OSError as error:
            raise InputError(f"{self._command[0]} cannot be started: {error.strerror}") from error

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """The exit status; mpirun was seen to stay for ever when its own helpers had been killed, and is ended then."""
        was_alone = False
        while True:
            try:
                return process.wait(timeout=ALONE_SECONDS)
            except subprocess.TimeoutExpired:
                is_alone = not _has_children(process.pid)
                if is_alone and was_alone:
                    process.kill()
                was_alone = is_alone

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_second, self.stopped = bool(self.stopped), signal.Signals(number).name
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if is_second:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.send_signal(self._passed_on)


def _asked_early(code: int) -> str:
    """The signal by which ranks were asked to stop before the first point, when it kills them; empty for none.

    SIGTERM does not tell: launchers end the other ranks by it where one has died.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        if code in (-number, 128 + number):
            return number.name
    return ""


def _has_children(pid: int) -> bool:
    """Whether a process has children; also where the system does not tell (it is not Linux)."""
    try:
        return any((task / "children").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return True


def leave_stop_note(reason: str) -> None:
    """Rank 0, where a `Launcher` started it: tell that by which signal the evaluation was stopped."""
    path = os.environ.get(STOP_NOTE)
    if path is not None and reason.startswith(("SIG", "a signal")):
        with contextlib.suppress(OSError):  # on another node: then it does not reach the launcher
            Path(path).write_text(reason)


def mpirun() -> str:
    """The mpirun beside this Python, or the first on the path. Raises InputError if there is none."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise InputError(
            "--ranks needs mpirun, and there is none: pip install 'distsurf[mpich]', or load your site's MPI module"
        )
    return found
