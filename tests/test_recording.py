"""Rank 0's part: a disk that refuses, with a clock of the test's own, and a beginning that fails."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distsurf.distribute.ranks import Ranks
from distsurf.distribute.signals import StopRequest
from distsurf.distribute.work import Farewell, Pulse
from distsurf.errors import DistsurfError
from distsurf.grid import Grid
from distsurf.recording import PatientRecorder, evaluate_missing
from distsurf.surface import Column, Status, SurfaceFile

GRID = Grid.parse({"x": "0:1:5"})


class Bowl:
    columns = (Column("loss"),)

    def __call__(self, coordinates: np.ndarray) -> np.ndarray:
        return coordinates**2


@pytest.fixture
def file(tmp_path: Path) -> SurfaceFile:
    return SurfaceFile.create(tmp_path / "s.h5", GRID, Bowl.columns)


def _full(*_: Any) -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_a_disk_that_refuses_is_told_of_once_and_given_up_after_its_time(
    file: SurfaceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, said, stopped = [0.0], [], []
    recorder = PatientRecorder(file, said.append, stopped.append, 60.0, clock=lambda: now[0])
    recorder.record(np.array([1, 2]), np.array([[7.0], [8.0]]), np.ones(2))
    with monkeypatch.context() as patch:
        patch.setattr(file._storage, "write", _full)
        for now[0] in (0.0, 1.0, 59.0):
            recorder.commit()
        assert len(said) == 1
        assert "s.h5 cannot be written (Disk quota exceeded): the evaluation goes on" in said[0]
        assert "for 1 min writing is tried again" in said[0]
        assert stopped == []
        now[0] = 61.0
        recorder.commit()
        assert stopped == ["a file that could not be written for 1 min"]
    assert (file.status() == Status.EVALUATED).sum() == 0
    recorder.commit()
    assert said[1:] == [f"{file.path} takes results again; nothing is lost"]
    assert file.read()["loss"][1:3].tolist() == [7.0, 8.0]
    assert recorder.finish(lambda: False, lambda: None) == ""


def test_what_the_disk_does_not_take_is_saved_beside_it(
    file: SurfaceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request to stop is no reason to wait for a disk."""
    recorder = PatientRecorder(file, lambda line: None, lambda reason: None, 600.0)
    recorder.record(np.array([3]), np.array([[9.0]]), np.ones(1))
    monkeypatch.setattr(file._storage, "write", _full)
    recorder.commit()
    told = recorder.finish(lambda: True, lambda: None)
    assert file.path is not None
    rescued = file.path.with_name("s.rescued-1.h5")
    assert told.startswith(
        f"1 results could not be written to {file.path} (Disk quota exceeded): with all others"
    )
    assert str(rescued) in told
    with SurfaceFile.open(rescued) as saved:
        assert saved.problems() == []
        assert saved.read()["loss"][3] == 9.0
    file.close()


def test_a_beginning_that_fails_is_told_to_the_others(
    file: SurfaceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Three(Ranks):
        size = 3

        def __init__(self) -> None:
            super().__init__()
            self.sent: list[tuple[int, Any]] = []

        def send(self, rank: int, message: Any) -> None:
            self.sent.append((rank, message))

    def unreadable(self: SurfaceFile, most: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    ranks, stop = Three(), StopRequest()
    monkeypatch.setattr(SurfaceFile, "forgive", unreadable)
    with pytest.raises(DistsurfError, match="Input/output error"):
        evaluate_missing(ranks, Bowl(), file, stop, Pulse(stop), 1)
    assert [rank for rank, _ in ranks.sent] == [1, 2]
    for _, farewell in ranks.sent:
        assert isinstance(farewell, Farewell)
        assert farewell.error is not None
        assert "Input/output error" in farewell.error[0]
