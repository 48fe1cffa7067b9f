"""One writer per file: it says in the file who it is, and holds a lock on it that the system drops when it dies.

A record without a lock is that of a dead process, and does not block, where the file system has locks and the process
was on this host. Where the record is another host's, or there are no locks, it blocks as long as its count goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from distsurf.errors import DamagedFile, InputError
from distsurf.surface.layout import Place, read_layout
from distsurf.surface.storage import Disk, Storage

BEAT_SECONDS = 2.0
"""How often a writer counts on."""
PATIENCE_SECONDS = 5.0
"""How long a count that cannot be trusted otherwise is watched: more than two beats."""


class Claim:
    """The right to write a file, held from here to `release` or the end of the process.

    Raises InputError with the other writer's host, process and start while there is one.
    """

    def __init__(self, path: Path, storage: Storage, place: Place):
        self._storage, self._place = storage, place
        record = _record(storage, place)
        self._lock = _locked(path, record)
        is_sure = self._lock is not None and record.get("host") == socket.gethostname()
        if record and not is_sure and _goes_on(path, place, record):
            if self._lock is not None:
                os.close(self._lock)
            raise InputError(_in_words(path, record))
        self._beat_at = float("-inf")
        self._record: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "beat": 0,
        }
        self.beat()

    def beat(self) -> None:
        """Count on, if it is time to."""
        if time.monotonic() - self._beat_at >= BEAT_SECONDS:
            self._beat_at = time.monotonic()
            self._record["beat"] += 1
            self._write(json.dumps(self._record))

    def release(self) -> None:
        """Let others write; the lock goes also where the file cannot be written any more. May raise OSError."""
        try:
            self._write("")
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _write(self, text: str) -> None:
        self._storage.write(self._place.offset, text.encode().ljust(self._place.dtype.itemsize, b"\0"))


def require_unclaimed(path: Path) -> None:
    """Raise InputError while another process holds a file's lock: a look in passing, which never waits."""
    with contextlib.suppress(OSError), contextlib.closing(Disk(path, write=False)) as storage:
        record: dict[str, Any] = {}
        with contextlib.suppress(DamagedFile):
            layout = read_layout(storage)
            if layout is not None:
                record = _record(storage, layout.places["state/writer"])
        lock = _locked(path, record)
        if lock is not None:
            os.close(lock)


def _locked(path: Path, record: dict[str, Any]) -> int | None:
    """A locked descriptor of the file; None where the file system has no locks. Raises InputError if it is taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise InputError(_in_words(path, record)) from None
        return None
    return descriptor


def _goes_on(path: Path, place: Place, record: dict[str, Any]) -> bool:
    """Whether a writer's count goes on: clocks of other hosts need not agree with ours."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        time.sleep(0.25)
        with contextlib.suppress(OSError, DamagedFile), contextlib.closing(Disk(path, write=False)) as file:
            now = _record(file, place)
            if now != record:
                return bool(now)
    return False


def _record(storage: Storage, place: Place) -> dict[str, Any]:
    """What the last writer left; nothing if it went in good order."""
    text = storage.read(place.offset, place.dtype.itemsize).rstrip(b"\0")
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_words(path: Path, record: dict[str, Any]) -> str:
    who = (
        f"process {record.get('pid')} on {record.get('host')} since {record.get('started')}"
        if record
        else "another process"
    )
    return f"{path} is being written by {who}; wait for it, stop it, or choose another --out"
