"""How far the evaluation is: a bar on a terminal, a line at most every 30 s in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TextIO

Mode = Literal["auto", "bar", "lines", "none"]
LINE_SECONDS = 30.0


class Progress:
    """Told how many points are done; writes to ``stream`` (standard error)."""

    def __init__(
        self,
        total: int,
        already: int,
        samples: int,
        *,
        mode: Mode = "auto",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._already, self._samples = total, already, samples
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = self._last_line = clock()
        if mode == "auto":
            mode = "bar" if self._stream.isatty() or _launcher_writes_to_terminal() else "lines"
        self._mode = mode
        self._bar: Any = None
        if mode == "bar":
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=already, unit="pt", file=self._stream, dynamic_ncols=True, smoothing=0.05
            )

    def __call__(self, done: int, failed: int) -> None:
        """``done`` points were evaluated since the start, ``failed`` given up."""
        if self._bar is not None:
            rate = done / max(self._clock() - self._start, 1e-9)
            text = f"{rate * self._samples:,.0f} samples/s" + (f", {failed} failed" if failed else "")
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(self._already + done - self._bar.n)
        elif self._mode == "lines" and self._clock() - self._last_line >= LINE_SECONDS:
            self._last_line = self._clock()
            print(self._line(done, failed), file=self._stream, flush=True)

    def _line(self, done: int, failed: int) -> str:
        elapsed = max(self._clock() - self._start, 1e-9)
        rate = done / elapsed
        finished = self._already + done
        left = (self._total - finished - failed) / rate if rate else float("inf")
        return (
            f"{finished:,} of {self._total:,} points ({finished / self._total:.0%}), {rate:.3g} points/s, "
            f"{rate * self._samples:,.0f} samples/s, {duration(left)} left"
            + (f", {failed} failed" if failed else "")
        )

    def close(self) -> None:
        """Leave the bar as it is and start a new line."""
        if self._bar is not None:
            self._bar.close()


def _launcher_writes_to_terminal() -> bool:
    """Whether this process was started by an mpirun whose standard error is a terminal (seen on Linux only).

    mpirun gives its ranks pipes and copies what comes out of them, so a rank's own stream never is a terminal.
    """
    process = os.getppid()
    try:
        for _ in range(4):  # mpirun itself, or its proxy on this node below it
            if (
                Path(f"/proc/{process}/comm")
                .read_text()
                .startswith(("mpirun", "mpiexec", "prterun", "orterun"))
            ):
                return os.readlink(f"/proc/{process}/fd/2").startswith(("/dev/pts/", "/dev/tty"))
            process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError):
        pass
    return False


def duration(seconds: float) -> str:
    """Seconds in words: ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds == float("inf"):
        return "unknown time"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 // 60 else "")
