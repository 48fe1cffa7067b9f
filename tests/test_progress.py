from __future__ import annotations

import io
import os
import pty

import pytest

from distsurf.progress import Progress, duration
from tests.conftest import Processes


def test_a_line_at_most_every_30_seconds() -> None:
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(2600, 100, 1000, mode="auto", stream=stream, clock=lambda: now[0])
    for second in range(1, 101):
        now[0] = float(second)
        progress(second * 10, 2)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "400 of 2,600 points (15%), 10 points/s, 10,000 samples/s, 3 min 40 s left, 2 failed"


def test_none_is_silent() -> None:
    stream = io.StringIO()
    progress = Progress(10, 0, 1, mode="none", stream=stream)
    progress(10, 0)
    progress.close()
    assert stream.getvalue() == ""


def test_bar_shows_what_was_there_before() -> None:
    stream = io.StringIO()
    progress = Progress(100, 40, 7, mode="bar", stream=stream)
    progress(60, 0)
    progress.close()
    assert "100/100" in stream.getvalue().split("\r")[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (float("inf"), "unknown time"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


SHOW = """
from distsurf.progress import Progress
import os
if os.environ.get("PMI_RANK", "0") == "0":
    progress = Progress(10, 0, 1)
    progress(10, 0)
    progress.close()
"""


def test_bar_under_mpirun_in_a_terminal_and_none_in_a_log(processes: Processes) -> None:
    (processes.folder / "show.py").write_text(SHOW)
    in_a_log = processes.python("show.py", ranks=2)
    assert "10/10" not in in_a_log.err
    launcher = [str(part) for part in processes.command(2)]
    main, child = pty.openpty()
    pid = os.posix_spawn(
        launcher[0], [*launcher, str(processes.folder / "show.py")], os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, child, 1), (os.POSIX_SPAWN_DUP2, child, 2)],
    )  # fmt: skip
    assert os.waitpid(pid, 0)[1] == 0
    os.close(child)
    assert b"10/10" in os.read(main, 65536)
    os.close(main)
