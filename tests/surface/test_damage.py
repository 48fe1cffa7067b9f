"""Whatever happens to the bytes of a surface file: it is found, what can be trusted is kept, nothing else is shown."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distsurf.cli import main
from distsurf.errors import DamagedFile, DistsurfError
from distsurf.grid import Grid
from distsurf.surface import Column, Status, Surface, SurfaceFile
from distsurf.surface.layout import LINE_BYTES
from distsurf.surface.repair import repair

GRID = Grid.parse({"x": "-1:1:9", "y": "0:3:10"})
COLUMNS = (Column("train_loss"), Column("train_accuracy", "%"))
DONE = GRID.coarse_to_fine()[:60]
FAILED = 17


def _value(point: int) -> tuple[float, float]:
    return np.nan if point % 7 == 0 else point / 3, -point


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "s.h5"
    done = DONE[DONE != FAILED]
    with SurfaceFile.create(path, GRID, COLUMNS, job='name = "x"', fingerprint={"a": "b"}) as file:
        for part in np.array_split(done, 7):
            file.record(part, np.array([_value(p) for p in part.tolist()]), np.full(len(part), 0.5))
            file.commit()
        file.record_failure(FAILED, "out of memory")
    return path.read_bytes()


def _require_truth(surface: Surface) -> int:
    """Every value that is shown is what was recorded, bit for bit. Returns how many there are."""
    status = surface.status.ravel()
    points = np.flatnonzero(status == Status.EVALUATED)
    assert set(points) <= set(DONE)
    for name, column in zip(surface.names, range(2), strict=True):
        expected = np.array([_value(p)[column] for p in points.tolist()], np.float64)
        assert surface[name].ravel()[points].tobytes() == expected.tobytes()
    assert np.isnan(surface["train_accuracy"].ravel()[status != Status.EVALUATED]).all()
    assert surface.failures in ({}, {FAILED: "out of memory"}, {FAILED: "unknown"})
    assert set(np.flatnonzero(status == Status.FAILED)) <= set(DONE)
    return len(points)


def _look(path: Path) -> bool:
    """Whether a file is found to be sound. Whatever it shows has to be true."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with SurfaceFile.open(path) as file:
                sound = not file.problems()
                shown = _require_truth(file.read())
        except DistsurfError:
            return False
    if sound:
        assert shown == len(DONE) - 1
    return sound


def _damage(data: st.DataObject, whole: bytes) -> bytes:
    damaged = bytearray(whole)
    kind = data.draw(st.sampled_from(["bit", "cut", "zeros", "noise", "grown"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    if kind == "bit":
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del damaged[place:]
    elif kind == "zeros":
        place -= place % 4096
        damaged[place : place + 4096] = bytes(len(damaged[place : place + 4096]))
    elif kind == "noise":
        noise = data.draw(st.binary(min_size=1, max_size=300))
        damaged[place : place + len(noise)] = noise
    else:
        damaged += data.draw(st.binary(min_size=1, max_size=50))
    return bytes(damaged)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_found_and_repaired(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    path, new = tmp_path / "s.h5", tmp_path / "new.h5"
    damaged = _damage(data, whole)
    path.write_bytes(damaged)
    new.unlink(missing_ok=True)
    if _look(path):
        return
    try:
        repair(path, new)
    except DistsurfError:
        assert not new.exists()
        assert damaged[:LINE_BYTES] != whole[:LINE_BYTES] or len(damaged) < 10_000
        return
    with SurfaceFile.open(new) as file:
        assert file.problems() == []
        _require_truth(file.read())
    assert path.read_bytes() == damaged


def _places(whole: bytes) -> dict[str, tuple[int, int]]:
    """Where each dataset lies, by HDF5's own account."""
    import io

    found = {}
    with h5py.File(io.BytesIO(whole), "r") as h5:
        for name in (*(c.name for c in COLUMNS), "cost", "status", "state/checksum", "failures/reason"):
            dataset = h5[name]
            found[name] = dataset.id.get_offset(), dataset.id.get_storage_size()
    return found


@pytest.mark.parametrize(
    "name", ["train_loss", "train_accuracy", "cost", "status", "state/checksum", "failures/reason"]
)
def test_every_bit_of_a_recorded_point_counts(tmp_path: Path, whole: bytes, name: str) -> None:
    start, size = _places(whole)[name]
    each = size // (GRID.size if "failures" not in name else min(GRID.size, 1000))
    slots = [0] if "failures" in name else [int(DONE[0]), int(DONE[30]), FAILED]
    for slot in slots:
        if slot == FAILED and name in ("train_loss", "train_accuracy", "cost"):
            continue  # a failed point has no values
        for bit in range(8 * min(each, 13)):
            damaged = bytearray(whole)
            damaged[start + slot * each + bit // 8] ^= 1 << bit % 8
            (tmp_path / "s.h5").write_bytes(damaged)
            assert not _look(tmp_path / "s.h5"), (slot, bit)


def test_a_lost_page_of_statuses_is_found_and_the_values_are_kept(tmp_path: Path, whole: bytes) -> None:
    start, size = _places(whole)["status"]
    damaged = bytearray(whole)
    damaged[start : start + size] = bytes(size)
    (tmp_path / "s.h5").write_bytes(damaged)
    with SurfaceFile.open(tmp_path / "s.h5") as file:
        problems = file.problems()
        assert file.read().count(Status.EVALUATED) == 0
    assert [problem.text for problem in problems] == [
        "60 points that had been recorded are not marked so any more"
    ]
    assert set(problems[0].points) == set(DONE) - {FAILED}
    _, said, surface = repair(tmp_path / "s.h5")
    assert "60 points" in said
    assert _require_truth(surface) == 59


@pytest.mark.parametrize("lost", ["first page", "header line", "header text", "first half", "tail"])
def test_one_header_is_enough(tmp_path: Path, whole: bytes, lost: str) -> None:
    damaged = bytearray(whole)
    if lost == "first page":
        damaged[:4096] = bytes(4096)
    elif lost == "header line":
        damaged[3] ^= 1
    elif lost == "header text":
        damaged[100] ^= 1
    elif lost == "first half":
        damaged[: len(whole) // 2] = bytes(len(whole) // 2)
    else:
        del damaged[-1000:]
    path = tmp_path / "s.h5"
    path.write_bytes(damaged)
    with pytest.raises(DamagedFile, match=r"is damaged: .*check --repair"):
        SurfaceFile.open(path)
    _, _, surface = repair(path)
    assert surface.job == 'name = "x"'
    if lost != "first half":
        assert _require_truth(surface) == 59
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(DamagedFile, match="no whole header"):
        repair(path)


def test_hdf5_damage_is_no_damage_of_points(tmp_path: Path, whole: bytes) -> None:
    """A bit of HDF5's own structure: xarray may fail on it, distsurf reads on, and repair writes all of it anew."""
    superblock = whole.index(b"\x89HDF\r\n\x1a\n")
    damaged = bytearray(whole)
    damaged[superblock + 3] ^= 4
    path = tmp_path / "s.h5"
    path.write_bytes(damaged)
    with pytest.raises(OSError, match="signature"):
        h5py.File(path)
    assert _require_truth(Surface.load(path)) == 59
    new, said, _ = repair(path)
    assert "HDF5 structure" in said
    with h5py.File(new) as h5:
        assert h5["status"][...].sum() == 59 + 3
    with SurfaceFile.open(new) as file:
        assert file.problems() == []


def test_what_other_programs_add_is_no_damage_of_points(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "s.h5"
    path.write_bytes(whole)
    with h5py.File(path, "r+"):
        pass
    with SurfaceFile.open(path) as file:
        assert file.problems() == []
    with h5py.File(path, "r+") as h5:
        h5.attrs["note"] = "mine"
        h5["extra"] = np.arange(1000.0)
    with SurfaceFile.open(path, write=True) as file:
        file.require_sound(points_only=True)
        with pytest.raises(DamagedFile, match="which does not concern the points"):
            file.require_sound()
        file.record(np.array([DONE[0]]), np.array([_value(int(DONE[0]))]), np.array([0.5]))
    with h5py.File(path) as h5:
        assert (h5.attrs["note"], h5["extra"][999]) == ("mine", 999)
    assert _require_truth(Surface.load(path)) == 59


def test_a_reader_is_warned_of_points_that_it_does_not_see(tmp_path: Path, whole: bytes) -> None:
    start, _ = _places(whole)["train_loss"]
    damaged = bytearray(whole)
    damaged[start + 8 * int(DONE[3])] ^= 1
    (tmp_path / "s.h5").write_bytes(damaged)
    with pytest.warns(UserWarning, match="1 points do not match their checksums and are left out"):
        surface = Surface.load(tmp_path / "s.h5")
    assert surface.status.ravel()[DONE[3]] == Status.PENDING
    assert not surface.complete


# -- files by strangers -----------------------------------------------------------------------------------


def _forged(whole: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with another header, whose checksum is right."""
    line, rest = whole[:LINE_BYTES], whole[LINE_BYTES:]
    length = int(line.split()[1])
    told = json.loads(rest[:length])
    told = change(told) or told
    body = json.dumps(told).encode()
    body = body.ljust(length)
    assert len(body) == length
    return b"distsurf-surface-2 %08d %08x\n" % (length, zlib.crc32(body)) + body + rest[length:]


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(grid=["-1:1:10000", "0:1:10000"]),
        lambda told: told.update(grid=[]),
        lambda told: told.update(grid=7),
        lambda told: told.update(columns=[["a", "b", "c"]]),
        lambda told: told.update(columns=3),
        lambda told: told.update(facts=[1]),
        lambda told: told.update(fingerprint=[]),
        lambda told: told["places"].update(status=-8),
        lambda told: told["places"].update(status=10**18),
        lambda told: told["places"].update(status=told["places"]["cost"]),
        lambda told: told.update(size=7),
        lambda told: told["places"].update(status="x"),
        lambda told: told["places"].pop("cost"),
        lambda told: told.update(size=10**17),
        lambda told: [1, 2],
        lambda told: told.update(structure="x"),
    ],
)
def test_a_forged_header_is_damage(
    tmp_path: Path, whole: bytes, change: Callable[[dict[str, Any]], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it declares: it is compared with the file before anything is allocated."""
    path = tmp_path / "s.h5"
    path.write_bytes(_forged(whole, change))
    assert main(["status", str(path)]) == 4
    assert "Traceback" not in capsys.readouterr().err
    assert main(["check", str(path)]) == 4
    assert main(["check", "--repair", str(path)]) in (1, 4)


def test_facts_of_nonsense_are_no_traceback(
    tmp_path: Path, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.h5"
    for facts in (
        {"evaluation": 3},
        {"evaluation": {"steps": 7}},
        {"cosines": []},
        {"name": [1], "created": {}},
    ):
        path.write_bytes(_forged(whole, lambda told, facts=facts: told.update(facts=facts, job="")))  # type: ignore[misc]
        for verb in (["status"], ["plot", "-o", str(tmp_path / "p.png")]):
            assert main([*verb, str(path)]) in (0, 1, 4), facts
            assert "Traceback" not in capsys.readouterr().err
