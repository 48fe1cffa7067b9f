"""Being asked to stop: the first signal asks, the second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

ASKING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
EXIT_INCOMPLETE = 3


class StopRequest:
    """While the ``with`` block lasts, signals set a flag; in a thread other than the main one it changes nothing.

    A second signal leaves without ado, with the exit code of an incomplete job: what was committed is in the file.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._before: dict[int, Any] = {}
        self.reason = ""

    def __call__(self) -> bool:
        """Whether somebody asked to stop."""
        return self._event.is_set()

    def ask(self, reason: str) -> None:
        """Ask to stop."""
        self.reason = self.reason or reason
        self._event.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            os._exit(EXIT_INCOMPLETE)
        self.ask(signal.Signals(number).name)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in ASKING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Have every signal that asks to stop do what Ctrl-C does, where no `StopRequest` has taken over yet."""
    with _handling(signal.default_int_handler):
        yield


@contextmanager
def killed_by_signals() -> Iterator[None]:
    """Have signals kill, as they do without Python: in a call into MPI that may never return no handler runs.

    A launcher ends the other ranks then. One that exits before MPI is up is waited for by the others for ever.
    """
    with _handling(signal.SIG_DFL):
        yield


@contextmanager
def _handling(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
