"""A job for fault tests that starts in half a second: everything of a real run but torch, under a real mpirun.

    mpirun -n 3 python -m tests.faults.runner FILE.h5 KIND [key=value …]

KIND says how the evaluator misbehaves: "good", "raise", "exit", "die", "hang", "allocate", "uneven"; with "stillborn" a
rank dies before the evaluation. The value of a point is known in closed form (`value`): any file can be compared
with the truth bit for bit.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distsurf.distribute.ranks import connected, end_now
from distsurf.distribute.signals import StopRequest
from distsurf.distribute.work import Patience, Pulse, follow
from distsurf.errors import DistsurfError
from distsurf.evaluator import Column, Stopped
from distsurf.grid import Grid
from distsurf.output import open_output
from distsurf.recording import evaluate_missing

COLUMNS = (Column("train_loss"), Column("train_accuracy", "%"))
GRID = Grid.parse({"x": "-1:1:21", "y": "0:2:20"})
FINGERPRINT = {"job": "faults"}


def value(coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values ``(P, 2)``: digits that any mistake in a point's place or bits would show in."""
    x, y = coordinates.T
    loss = np.where((x == 0.5), np.nan, np.sin(7 * x) * np.exp(y) + x / 3)
    return np.stack([loss, 100 / (1 + x * x + y)], axis=1)


class Misbehaving:
    """The closed form, a little late, with a fault at one point or on one rank."""

    columns = COLUMNS

    def __init__(self, kind: str, rank: int, pulse: Pulse, options: dict[str, Any]):
        self._kind, self._rank, self._pulse = kind, rank, pulse
        self._seconds = float(options.get("seconds", 0.002))
        self._points = GRID.coordinates(np.array(options.get("points", [options.get("point", 57)])))
        self._ranks = options.get("sick", [])
        self._count = 0
        log = options.get("log")
        self._log = None if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def __call__(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        time.sleep(self._seconds * (1 + 9 * (self._rank % 3) / 2 if self._kind == "uneven" else 1))
        self._count += 1
        if self._log is not None:
            os.write(self._log, b".")  # so that a test knows how often points were evaluated in all
        at_one = (coordinates == self._points).all(axis=1).any()
        here = at_one if not self._ranks else self._rank in self._ranks and self._count > 5
        if here:
            self._misbehave()
        if self._pulse():
            raise Stopped
        return value(coordinates)

    def _misbehave(self) -> None:
        if self._kind == "raise":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self._kind == "exit":
            sys.exit("this model exits")
        if self._kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._kind == "allocate":
            np.empty(1 << 50, np.uint8)
        if self._kind == "hang":
            time.sleep(1e6)


def main() -> int:
    faulthandler.enable()  # SIGABRT, which the watchdog of the tests sends, prints every thread's stack
    path, kind = Path(sys.argv[1]), sys.argv[2]
    options = {key: json.loads(text) for key, text in (part.split("=", 1) for part in sys.argv[3:])}

    def say(line: str) -> None:
        print(line, flush=True)

    code = 0
    try:
        with connected() as ranks:
            ranks.expect_signs(float(options.get("silence", 60)))
            if kind == "stillborn" and ranks.rank in options["sick"]:
                os.kill(os.getpid(), signal.SIGKILL)
            with StopRequest() as stop:
                pulse = Pulse(stop)
                evaluator = Misbehaving(kind, ranks.rank, pulse, options)
                patience = Patience(float(options.get("silence", 60)))
                file = None
                with ranks.together():
                    if ranks.rank == 0:
                        facts = {"shard": options["shard"]} if "shard" in options else {}
                        about = {"fingerprint": FINGERPRINT, "job": "", "facts": facts}
                        file = open_output(path, False, COLUMNS, about, GRID, {}, say)
                if file is None:
                    with ranks.without_heartbeat():
                        outcome = follow(ranks, evaluator, GRID, pulse, patience)
                else:
                    with file, ranks.without_heartbeat():
                        outcome = evaluate_missing(
                            ranks, evaluator, file, stop, pulse, 1, patience=patience, say=say,
                            disk_patience=float(options.get("disk_patience", 600)),
                            shard_seconds=float(options.get("shard_seconds", 0.02)),
                            commit_seconds=float(options.get("commit_seconds", 1.0)),
                        )  # fmt: skip
            if ranks.rank == 0:
                code = 3 if outcome.missing else 0
                if outcome.missing:
                    print(outcome.missing, file=sys.stderr)
            lost = ranks.lost
    except DistsurfError as error:
        print(f"distsurf: {error}", file=sys.stderr)
        end_now(error.exit_code)
    if lost:
        end_now(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
