"""Surfaces of Li et al.'s public code, continued: as that code writes them, with its loop and its direction files."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distsurf.cli import main
from distsurf.surface import Status, Surface

CODE = """
import torch
from torch import nn

def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def data():
    g = torch.Generator().manual_seed(1)
    return {"train": (torch.randn(90, 6, generator=g), torch.randint(3, (90,), generator=g))}
"""
JOB = """
name = "net"
[model]
factory = "code_of_theirs.py:net"
[data]
source = "code_of_theirs.py:data"
[directions]
kind = "file"
file = "directions.h5"
[grid]
x = "-1:1:7"
y = "-0.5:1:4"
"""
X, Y = np.linspace(-1, 1, 7), np.linspace(-0.5, 1, 4)


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Losses and accuracies ``(2, ny, nx)`` as their loop finds them; every third point is in the file."""
    monkeypatch.chdir(tmp_path)
    Path("code_of_theirs.py").write_text(CODE)
    Path("job.toml").write_text(JOB)
    space: dict[str, object] = {}
    exec(CODE, space)
    model: nn.Module = space["net"]()  # type: ignore[operator]
    inputs, targets = space["data"]()["train"]  # type: ignore[operator]
    weights = [parameter.data.clone() for parameter in model.parameters()]
    generator = torch.Generator().manual_seed(2)
    directions = [[torch.randn(w.shape, generator=generator) for w in weights] for _ in "xy"]
    with h5py.File("directions.h5", "w") as file:
        for name, direction in zip(("xdirection", "ydirection"), directions, strict=True):
            for i, tensor in enumerate(direction):
                file[f"{name}/{i}"] = tensor.numpy()
    truth = np.empty((2, 4, 7))
    with torch.no_grad():
        for (row, column), _ in np.ndenumerate(truth[0]):
            for parameter, w, dx, dy in zip(model.parameters(), weights, *directions, strict=True):
                parameter.data = w + dx * X[column] + dy * Y[row]
            loss, correct = 0.0, 0
            for images, labels in DataLoader(TensorDataset(inputs, targets), batch_size=32):
                outputs = model(images)
                loss += nn.functional.cross_entropy(outputs, labels).item() * len(labels)
                correct += int((outputs.argmax(1) == labels).sum())
            truth[:, row, column] = loss / 90, 100 * correct / 90
    known = np.arange(28).reshape(4, 7) % 3 == 0
    with h5py.File("theirs.h5", "w") as file:
        file["xcoordinates"], file["ycoordinates"], file["dir_file"] = X, Y, "directions.h5"
        for name, values in zip(("train_loss", "train_acc"), truth, strict=True):
            file[name] = np.where(known, values, -1.0).reshape(7, 4)  # the code's own shape, filled flat
    return truth


def test_an_unfinished_surface_is_completed(theirs: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "job.toml", "--known", "theirs.h5", "--no-pictures"]) == 0
    assert "10 points are taken from theirs.h5" in capsys.readouterr().out
    found = Surface.load("runs/net/surface.h5")
    taken = np.arange(28).reshape(4, 7) % 3 == 0
    assert found["loss"][taken].tobytes() == theirs[0][taken].tobytes()
    assert np.isnan(found.cost[taken]).all()
    assert found.facts["known"] == {"file": "theirs.h5", "points": 10}
    np.testing.assert_allclose(found["loss"], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], theirs[1], atol=1e-4)
    assert main(["check", "runs/net/surface.h5"]) == 0
    # And it is this job's own from then on.
    assert main(["run", "job.toml", "--no-pictures"]) == 0
    assert found["loss"].tobytes() == Surface.load("runs/net/surface.h5")["loss"].tobytes()


def test_nothing_recorded_is_replaced(theirs: np.ndarray) -> None:
    assert main(["run", "job.toml", "--no-pictures"]) == 0
    before = Surface.load("runs/net/surface.h5")
    assert main(["run", "job.toml", "--known", "theirs.h5", "--no-pictures"]) == 0
    assert Surface.load("runs/net/surface.h5")["loss"].tobytes() == before["loss"].tobytes()


@pytest.mark.parametrize("shard", [0, 2])
def test_a_shard_takes_what_is_its_own(theirs: np.ndarray, shard: int) -> None:
    assert main(["run", "job.toml", "--known", "theirs.h5", "--shard", f"{shard}/3", "--no-pictures"]) == 0
    found = Surface.load(f"runs/net/surface.shard-{shard}-of-3.h5")
    assert found.complete
    assert found.count(Status.PENDING) == 28 - found.size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "model.arguments={seed=5}"], "theirs.h5 belongs to other weights, directions or data"),
        (["--set", "grid.x=-1:1:9"], r"has the grid x=-1:1:7 y=-0.5:1:4, the job x=-1:1:9"),
        (["--set", 'objective.metrics=["top5"]'], "not this job's train_top5: leave them out"),
        (["--set", 'directions={kind="random"}'], "theirs.h5 belongs to other weights, directions or data"),
    ],
)
def test_surfaces_of_others_are_refused(
    theirs: np.ndarray, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "job.toml", "--known", "theirs.h5", *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not Path("runs/net/surface.h5").exists()
