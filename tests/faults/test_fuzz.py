"""Hostile and broken input: job files and checkpoints of any bytes end in a documented error, and run nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from distsurf.errors import DistsurfError
from distsurf.job import Job
from distsurf.subspace.weights import load_checkpoint

JOB = (Path(__file__).parent.parent.parent / "distsurf" / "default.toml").read_text()
KEYS = [
    "grid.x",
    "grid",
    "run.threads",
    "run.fast",
    "data.batch_size",
    "objective.loss",
    "model.arguments",
    "name",
    "x.y",
]

fuzzing = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150
)


def _mutated(data: st.DataObject, whole: bytes, most: int = 3) -> bytes:
    """Some bytes changed, cut out, or put in."""
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, most))):
        place = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        kind = data.draw(st.sampled_from(["change", "cut", "insert", "end"]))
        if kind == "change" and damaged:
            damaged[place] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del damaged[place : place + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            damaged[place:place] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            del damaged[place:]
    return bytes(damaged)


def _require_one_line(read: Callable[[], object]) -> None:
    """It works, or says in one line why not."""
    said = ""
    try:
        read()
    except DistsurfError as error:
        said = str(error)
    assert "\n" not in said


@fuzzing
@given(data=st.data())
def test_job_files_of_any_bytes(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(_mutated(data, JOB.encode()))
    _require_one_line(lambda: Job.load(path))


@fuzzing
@given(key=st.sampled_from(KEYS), value=st.text(max_size=30))
def test_overrides_of_any_text(key: str, value: str) -> None:
    _require_one_line(lambda: Job.read(JOB, [f"{key}={value}"], origin="test"))


@fuzzing
@given(data=st.data(), suffix=st.sampled_from([".pt", ".safetensors"]))
def test_checkpoints_of_any_bytes(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"c{suffix}"
    if not whole.exists():
        state = nn.Linear(3, 2).state_dict()
        torch.save(state, whole) if suffix == ".pt" else save_file(state, whole)
    path.write_bytes(_mutated(data, whole.read_bytes()))
    _require_one_line(lambda: load_checkpoint(nn.Linear(3, 2), path))


class Bomb:
    """A pickle that would leave a file behind if anybody ran it."""

    def __init__(self, path: Path):
        self._path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self._path, "w")


@pytest.mark.parametrize("wrap", ["pickle", "torch", "inside a state dict"])
def test_a_pickle_bomb_does_nothing(tmp_path: Path, wrap: str) -> None:
    mark, path = tmp_path / "boom", tmp_path / "c.pt"
    if wrap == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    elif wrap == "torch":
        torch.save(Bomb(mark), path)
    else:
        torch.save({"weight": torch.ones(2), "extra": Bomb(mark)}, path)
    with pytest.raises(DistsurfError, match=r"allow_pickle|not what torch.save writes"):
        load_checkpoint(nn.Linear(3, 2), path)
    assert not mark.exists()
