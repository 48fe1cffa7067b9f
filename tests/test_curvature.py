"""``distsurf curvature``, and jobs with ``[curvature]``: the numbers of a quadratic, eigenvectors as a plane, ranks."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest

from distsurf.bench.contender import Contender
from distsurf.cli import main
from distsurf.surface import Surface
from tests.conftest import Processes

CODE = """
import torch
from torch import nn

H = torch.tensor([8.0, 2.0, 0.5, -1.0])
W = torch.tensor([[0.5, -1.0, 2.0, 0.0]])

def quadratic():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = W.clone()
    return model

def data():
    return {"train": (torch.zeros(6, 4), torch.zeros(6))}

def objective(model, batch):
    return {"loss": (len(batch[0]) * (1 + 0.5 * (H * (model.weight - W).square()).sum()), len(batch[0]))}
"""
JOB = """
name = "q"
[model]
factory = "code_of_q.py:quadratic"
[data]
source = "code_of_q.py:data"
[objective]
function = "code_of_q.py:objective"
[curvature]
probes = 400
[grid]
x = "-1:1:5"
y = "-1:1:3"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("code_of_q.py").write_text(CODE)
    Path("q.toml").write_text(JOB)
    return tmp_path


def told(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} +([-\d]\S*)", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def test_the_table_of_a_quadratic(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At a stationary point SAM and ASAM see nothing; the others have closed forms."""
    assert main(["curvature", "q.toml", "--rho", "0.1", "--epsilon", "0.01"]) == 0
    text = capsys.readouterr().out
    assert "train_loss of 4 parameters, 6 samples" in text
    expected = {
        "train_loss": 1,
        "gradient norm": 0,
        "λmax": 8,
        "λmin": -1,
        "|λmin/λmax|": 0.125,
        "trace": 9.5,
        "sharpness, SAM, ρ = 0.1": 0,
    }
    for name, value in expected.items():
        assert told(text, name) == pytest.approx(value, rel=1e-5, abs=1e-6), name
    # The box ε(|w|+1): each side where H is positive, none where it is negative.
    box = 0.01 * (np.abs([0.5, -1, 2, 0]) + 1)
    rise = 0.5 * np.sum(np.maximum([8, 2, 0.5, -1], 0) * box**2)
    assert told(text, "sharpness, Keskar, ε = 0.01") == pytest.approx(100 * rise / 2, rel=0.05)
    average = 0.5 * 0.01 * np.sum(np.array([8, 2, 0.5, -1]) * np.square([0.5, -1, 2, 0]))
    assert told(text, "average case, ρ = 0.1 |w|") == pytest.approx(average, rel=0.3)


def test_sharpness_away_from_the_minimum(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SAM's step along the gradient of a quadratic, in closed form."""
    Path("code_of_q.py").write_text(CODE.replace("W.clone()", "W + 0.1"))
    assert main(["curvature", "q.toml", "--rho", "0.2"]) == 0
    text = capsys.readouterr().out
    h = np.array([8, 2, 0.5, -1])
    gradient = h * 0.1
    step = 0.2 * gradient / np.linalg.norm(gradient)
    assert told(text, "gradient norm") == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert told(text, "sharpness, SAM, ρ = 0.2") == pytest.approx(
        gradient @ step + 0.5 * h @ step**2, rel=1e-4
    )
    scale = np.abs(np.array([0.5, -1, 2, 0]) + 0.1) + 0.01
    step = 0.5 * scale**2 * gradient / np.linalg.norm(scale * gradient)
    assert told(text, "sharpness, ASAM, ρ = 0.5") == pytest.approx(
        gradient @ step + 0.5 * h @ step**2, rel=1e-4
    )


def test_eigenvectors_span_a_plane(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curvature", "q.toml", "--top", "2", "--vectors", "eigen", "--density", "d.png"]) == 0
    assert "and 2 " in capsys.readouterr().out
    assert Path("d.png").stat().st_size > 5000
    names = sorted(path.name for path in Path("eigen").glob("*.safetensors"))
    assert names == ["bottom1.safetensors", "bottom2.safetensors", "top1.safetensors", "top2.safetensors"]
    assert main(["run", "eigen/job.toml", "--no-pictures"]) == 0
    surface = Surface.load("eigen/surface.h5")
    y, x = np.meshgrid(surface.y, surface.x, indexing="ij")
    np.testing.assert_allclose(surface["loss"], 1 + 0.5 * (8 * x**2 - y**2), rtol=1e-4, atol=1e-4)


def test_the_map_has_a_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "q.toml"]) == 0
    assert Path("runs/q/surface_contour_lambda_ratio.png").exists()
    surface = Surface.load("runs/q/surface.h5")
    np.testing.assert_allclose(surface["lambda_ratio"], 0.125, rtol=1e-4)
    assert main(["run", "q.toml", "--set", "curvature.tolerance=0.1"]) == 1
    assert "curvature" in capsys.readouterr().err
    assert main(["plan", "q.toml"]) == 0


def test_a_plan_measures_curvature_too(folder: Path) -> None:
    """Else its walltime would be that of the loss alone."""
    with contextlib.closing(Contender("distsurf", Path("q.toml"), 1)) as contender:
        contender.ready()
        contender.tell([0.5, 0.5])
        assert contender.told()["values"]["lambda_max"] == pytest.approx(8, rel=1e-4)


def test_ranks_give_the_same_bits(folder: Path, processes: Processes) -> None:
    for name in ("code_of_q.py", "q.toml"):
        (processes.folder / name).write_text(Path(name).read_text())
    run = ("-m", "distsurf", "run", "q.toml", "--no-pictures", "--set", "run.threads=1")
    one = processes.python(*run, "--out", "one.h5")
    assert one.code == 0, one.err
    three = processes.python(*run, "--out", "three.h5", "--ranks", 3)
    assert three.code == 0, three.err
    first, second = (Surface.load(processes.folder / name) for name in ("one.h5", "three.h5"))
    for name in first.names:
        assert first[name].tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trained.pt"], "expected JOB.toml, or a CHECKPOINT with --job"),
        (["q.toml", "--job", "q.toml"], "expected JOB.toml, or a CHECKPOINT with --job"),
        (["none.pt", "--job", "q.toml"], "no checkpoint none.pt"),
        (["q.toml", "--rho", "0"], "--rho: expected a positive number"),
        (["q.toml", "--density", "d.txt"], "expected a name in .png"),
        (["q.toml", "--set", "curvature.split=test"], "curvature.split = 'test': the data has train"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["curvature", *arguments]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
