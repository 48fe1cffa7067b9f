"""Memory that killed ranks left: removed where nobody has it mapped, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from distsurf.distribute import leaks
from distsurf.distribute.leaks import remove_leaks


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    for name in ("mpich_shm_1_0", "mpich_shm_2_0", "psm_other"):
        (folder / name).write_bytes(b"x")
    monkeypatch.setattr(leaks, "MARGIN_SECONDS", -3600.0)  # a file cannot be made in the past
    return folder


def test_only_what_nobody_has_mapped_goes(shm: Path) -> None:
    import mmap

    with open(shm / "mpich_shm_2_0", "r+b") as file, mmap.mmap(file.fileno(), 1):
        assert remove_leaks(shm) == ["mpich_shm_1_0"]
        assert sorted(path.name for path in shm.iterdir()) == ["mpich_shm_2_0", "psm_other"]
    assert remove_leaks(shm) == ["mpich_shm_2_0"]


def test_what_is_new_stays(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segments of ranks that start at the same time are not mapped for a moment."""
    monkeypatch.setattr(leaks, "MARGIN_SECONDS", 5.0)
    assert remove_leaks(shm) == []
    assert len(list(shm.iterdir())) == 3


def test_where_there_is_no_such_folder(tmp_path: Path) -> None:
    assert remove_leaks(tmp_path / "nothing") == []
