"""Shared memory that MPICH's killed ranks have left behind.

MPICH names it after the job's step, and takes what it finds under the name. A SLURM job that was requeued has the same
number and the same first step again, and was seen to fail in MPI's start ("Invalid GenQ flag", "Message truncated"),
or to hang there, over what the killed ranks of its last start had left on the node.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

MARGIN_SECONDS = 5.0
"""Memory made so shortly before this process may be that of the ranks that have started with it."""


def remove_leaks(folder: Path = Path("/dev/shm"), processes: Path = Path("/proc")) -> list[str]:
    """Remove this user's segments that are older than this process and that no process has mapped; their names."""
    candidates = {}
    with suppress(OSError):
        started = (processes / str(os.getpid())).stat().st_ctime
        for path in folder.glob("mpich_shm_*"):
            with suppress(OSError):
                found = path.stat()
                if found.st_uid == os.geteuid() and found.st_ctime < started - MARGIN_SECONDS:
                    candidates[str(path)] = path
    if not candidates:
        return []
    for maps in processes.glob("[0-9]*/maps"):
        with suppress(OSError):  # another user's, or gone
            for line in maps.read_text().splitlines():
                candidates.pop(line.rpartition(" ")[2], None)
    for path in candidates.values():
        with suppress(OSError):
            path.unlink()
    return sorted(path.name for path in candidates.values())
