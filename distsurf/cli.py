"""The command line: `distsurf.options` reads it, `distsurf.verbs` does what it says, and errors become one line here.

Exit codes: 0 complete; 1 bad input; 3 incomplete but saved (the same command continues); 4 damaged file.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distsurf.distribute.launcher import launched
from distsurf.distribute.signals import killed_by_signals
from distsurf.errors import DistsurfError, Incomplete, in_one_line
from distsurf.options import Verb, parse
from distsurf.verbs import cluster, curvature, files, formats, matrices, measure, run, trajectory

VERBS: dict[str, Verb] = {
    "run": run.run,
    "plot": files.plot,
    "status": files.status,
    "check": files.check,
    "merge": files.merge,
    "svd": matrices.svd,
    "curvature": curvature.curvature,
    "submit": cluster.submit,
    "trajectory": trajectory.trajectory,
    "import": formats.import_surface,
    "export": formats.export_surface,
    "bench": measure.bench,
    "plan": measure.plan,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name) and return the exit code."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, warnings, "formatwarning", warnings.formatwarning)
        warnings.formatwarning = _in_a_line(warnings.formatwarning)
        if launched() is not None:
            stack.enter_context(killed_by_signals())
        return _main(arguments, debug)


def _main(arguments: Sequence[str] | None, debug: bool) -> int:
    try:
        options = parse(sys.argv[1:] if arguments is None else list(arguments), VERBS)
        return int(options.verb(options))
    except DistsurfError as error:
        if debug:
            traceback.print_exc()
        if _is_first_rank():
            print(f"distsurf: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        from distsurf.launch import leave_stop_note

        leave_stop_note("a signal")
        print("distsurf: interrupted before the evaluation began; nothing was recorded", file=sys.stderr)
        return Incomplete.exit_code
    except BrokenPipeError:  # the reader of our output (head, less) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        if isinstance(
            error.__cause__ or error.__context__, KeyboardInterrupt
        ):  # while a library was imported
            print("distsurf: interrupted", file=sys.stderr)
            return Incomplete.exit_code
        print(f"distsurf: unexpected {in_one_line(error)} (--debug shows where)", file=sys.stderr)
        return DistsurfError.exit_code


def _in_a_line(show: Callable[..., str]) -> Callable[..., str]:
    """Warnings of our own as all that they say, without the place in our code."""

    def form(message: Warning | str, category: type[Warning], filename: str, *place: Any) -> str:
        if Path(filename).is_relative_to(Path(__file__).parent):
            return f"distsurf: {message}\n"
        return show(message, category, filename, *place)

    return form


def _is_first_rank() -> bool:
    """Errors reach every rank; one of them tells the user."""
    start = launched()
    return start is None or start[0] == 0
