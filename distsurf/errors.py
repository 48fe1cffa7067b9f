"""The errors that distsurf raises on purpose: one readable line each, and the exit code that goes with it."""

from __future__ import annotations

from typing import Any


class DistsurfError(Exception):
    """Base of all of them. The command line prints the message and ends with ``exit_code``."""

    exit_code = 1


class InputError(DistsurfError):
    """Something given to distsurf cannot be used: what was given, what was expected, what to do."""


class Incomplete(DistsurfError):
    """The evaluation ended before every point had a value (stopped, preempted, failed points).

    ``surface`` holds everything that was computed; with an output file the same call continues from it. ``stopped``
    says who asked to stop (a signal, by its name), if somebody did.
    """

    exit_code = 3

    def __init__(self, message: str, surface: Any = None, stopped: str = ""):
        super().__init__(message)
        self.surface, self.stopped = surface, stopped


class DamagedFile(DistsurfError):
    """A surface file whose contents contradict themselves."""

    exit_code = 4


def in_one_line(error: BaseException) -> str:
    """Any error's kind and message, whatever lines its author gave it."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its message cannot be shown)"
    # Names of files, say, may hold bytes that are no text.
    return f"{type(error).__name__}: {text.encode(errors='backslashreplace').decode()}"
