"""``distsurf trajectory`` as a user types it, in one process and with the parameters shared among ranks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from distsurf.surface import Surface
from tests.conftest import Processes

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3))

def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(64, 4, generator=g), torch.randint(3, (64,), generator=g)
"""
TRAIN = """
import torch
from torch import nn
from net import net, data

model, (x, y) = net(), data()
optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
for step in range(12):
    torch.save(model.state_dict(), f"step{step}.pt")
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
"""
JOB = """
name = "net"
[model]
factory = "net.py:net"
[data]
source = "net.py:data"
batch_size = 64
[run]
threads = 1
[grid]
x = "-1:1:3"
"""
FIND = ("-m", "distsurf", "trajectory", "step*.pt", "--job", "job.toml", "--points", 7)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model's code, a job, and twelve checkpoints of its training."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "net.py").write_text(NET)
    (folder / "job.toml").write_text(JOB)
    subprocess.run([sys.executable, "-c", TRAIN], cwd=folder, check=True)
    return folder


@pytest.fixture
def trained(checkpoints: Path, processes: Processes) -> Processes:
    shutil.copytree(checkpoints, processes.folder, dirs_exist_ok=True)
    return processes


def test_any_number_of_ranks_finds_the_same_plane(trained: Processes) -> None:
    planes = {}
    for ranks in (0, 1, 2, 5):
        ended = trained.python(*FIND, "--out", f"of{ranks}", ranks=ranks)
        assert ended.code == 0, ended.err
        assert ended.out.count("12 checkpoints, from step0.pt to step11.pt; centre step11.pt") == 1
        planes[ranks] = load_file(trained.folder / f"of{ranks}/plane.safetensors")
    for plane in planes.values():
        assert plane.keys() == planes[0].keys()
        for name, tensor in plane.items():
            np.testing.assert_allclose(tensor, planes[0][name], atol=1e-7)


def test_the_surface_has_the_path(trained: Processes) -> None:
    """The job runs as it is written; the path's loss is high at its start, and the centre's own at its end."""
    ended = trained.python(*FIND, "--scale", "center")
    assert ended.code == 0, ended.err
    assert "runs/net-trajectory/job.toml" in ended.out
    assert (
        trained.python("-m", "distsurf", "run", "runs/net-trajectory/job.toml", "--progress", "none").code
        == 0
    )
    surface = Surface.load(trained.folder / "runs/net-trajectory/surface.h5")
    assert (trained.folder / "runs/net-trajectory/surface_contour.png").exists()
    path = surface.trajectory
    assert path is not None
    assert path.shape == (12, 2)
    low, high = path.min(axis=0), path.max(axis=0)
    assert (low > [surface.x[0], surface.y[0]]).all()
    assert (high < [surface.x[-1], surface.y[-1]]).all()
    told = [
        line.split()[:2] for line in ended.out.splitlines() if line.endswith(".pt") and "outside" not in line
    ][1:]
    np.testing.assert_allclose(np.array(told, float), path, rtol=1e-5, atol=1e-6)
    nearest = [
        surface["loss"][np.abs(surface.y - y).argmin(), np.abs(surface.x - x).argmin()]
        for x, y in path[[0, -1]]
    ]
    assert nearest[0] > 2 * nearest[1]
    # Again it is the same plane; another one would take the surface's away.
    plane = trained.folder / "runs/net-trajectory/plane.safetensors"
    before = plane.read_bytes()
    assert trained.python(*FIND, "--scale", "center").code == 0
    refused = trained.python(*FIND)
    assert refused.code == 1
    assert "runs/net-trajectory has the surface of another plane" in refused.err
    assert plane.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none*.pt",), "no file matches none*.pt"),
        (("step1.pt",), "two checkpoints or more; 1 were given"),
        (("step*.pt", "--center", "best"), "--center best: expected first, last, or one of the checkpoints"),
        (("step*.pt", "none.pt"), "no checkpoint none.pt"),
        (("step*.pt", "--set", "a.b=1"), "--set is for --job"),
        (("step*.pt", "--error"), "--error is for --job"),
        (("step*.pt", "net.py"), "net.py cannot be read"),
    ],
)
@pytest.mark.parametrize("ranks", [0, 2])
def test_mistakes_are_one_line(
    trained: Processes, arguments: tuple[str, ...], words: str, ranks: int
) -> None:
    ended = trained.python("-m", "distsurf", "trajectory", *arguments, ranks=ranks)
    assert ended.code == 1
    assert words in ended.err
    assert len(re.findall("^distsurf: ", ended.err, re.MULTILINE)) == 1
    assert "Traceback" not in ended.err


def test_another_run_in_the_same_plane(trained: Processes) -> None:
    """The plane of all checkpoints, and in it, by any number of ranks, the first few alone."""
    assert trained.python(*FIND).code == 0
    plane = "runs/net-trajectory/plane.safetensors"
    few = [f"step{step}.pt" for step in (0, 3, 7, 11)]
    arguments = ("-m", "distsurf", "trajectory", *few, "--job", "job.toml", "--plane", plane, "--points", 5)
    told = {}
    for ranks in (0, 3):
        ended = trained.python(*arguments, "--out", "few", ranks=ranks)
        assert ended.code == 0, ended.err
        assert f"axes: those of {plane}" in ended.out
        told[ranks] = [line.split() for line in ended.out.splitlines() if re.search(r"% +step\d+\.pt$", line)]
    assert told[0] == told[3]
    paths = []
    for file in ("few/plane.safetensors", plane):
        with safe_open(trained.folder / file, "np") as opened:
            paths.append(np.array(json.loads(opened.metadata()["trajectory"])["coordinates"]))
    np.testing.assert_allclose(paths[0], paths[1][[0, 3, 7, 11]], atol=1e-6)
    assert trained.python("-m", "distsurf", "run", "few/job.toml", "--progress", "none").code == 0
    wrong = trained.python("-m", "distsurf", "trajectory", *few, "--plane", "step1.pt")
    assert wrong.code == 1
    assert "step1.pt has no tensor x.0.weight" in wrong.err


TRUTH = """
import sys, torch
from safetensors.torch import load_file
from torch import nn
from net import net, data

model, (x, y) = net().eval(), data()
plane = load_file("runs/net-trajectory/plane.safetensors")
center = torch.load("step11.pt")
places = [list(map(float, line.split())) for line in sys.stdin]

def loss(state):
    model.load_state_dict(state)
    return float(nn.functional.cross_entropy(model(x), y).detach())

for step, (a, b) in enumerate(places):
    at = {n: t + a * plane["x." + n] + b * plane["y." + n] for n, t in center.items()}
    print(loss(torch.load(f"step{step}.pt")), loss(at))
"""


@pytest.mark.parametrize("ranks", [0, 3])
def test_the_losses_along_the_path_are_those_of_a_plain_loop(trained: Processes, ranks: int) -> None:
    ended = trained.python(*FIND, "--error", ranks=ranks)
    assert ended.code == 0, ended.err
    lines = [line.split() for line in ended.out.splitlines() if re.search(r"step\d+\.pt$", line)]
    rows = np.array([line[:2] + line[3:5] for line in lines if len(line) == 6], float)
    assert len(rows) == 12
    # The coordinates' full digits.
    with safe_open(trained.folder / "runs/net-trajectory/plane.safetensors", "np") as file:
        path = np.array(json.loads(file.metadata()["trajectory"])["coordinates"])
    process = subprocess.run(
        [sys.executable, "-c", TRUTH],
        input="\n".join(f"{a!r} {b!r}" for a, b in path.tolist()),
        cwd=trained.folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = np.array([line.split() for line in process.stdout.splitlines()], float)
    np.testing.assert_allclose(rows[:, 2:], expected, rtol=1e-5)
    (error,) = re.findall(r"Ding et al. 2023\): (\S+)", ended.out)
    np.testing.assert_allclose(float(error), np.mean(np.log(expected[:, 0] / expected[:, 1]) ** 2), rtol=1e-3)
