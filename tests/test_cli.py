"""The command line as a user meets it: real processes, exit codes, one readable line per mistake."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from distsurf.cli import VERBS, main
from distsurf.grid import Grid
from distsurf.surface import Column, Status, Surface, SurfaceFile
from tests.conftest import Processes

MY_CODE = """
import torch
from torch import nn

def net(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))

def data(n=20):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g)
    return {"train": (x, (x[:, 0] > 0).long()), "test": (x[:5], (x[:5, 0] > 0).long())}

def my_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)

def my_objective(model, batch):
    return {"norm": (model(batch[0]).square().sum(), len(batch[0]))}

def broken():
    raise ValueError("no data today")
"""
JOB = """
name = "mine"
[model]
factory = "mine.py:net"
checkpoint = "net.pt"
[data]
source = "mine.py:data"
[grid]
x = "-1:1:5"
y = "0:1:3"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MY_CODE)
    (tmp_path / "mine.toml").write_text(JOB)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).state_dict(), tmp_path / "net.pt")
    return tmp_path


def _run(*arguments: Any) -> int:
    return main(["run", "mine.toml", "--progress", "none", *map(str, arguments)])


def test_a_surface_and_any_matrix_by_singular_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An outer product has rank one; a picture and an array are matrices too; what is none is told."""
    x, y = np.linspace(1, 2, 7), np.linspace(1, 3, 5)
    grid = Grid.parse({"x": "1:2:7", "y": "1:3:5"})
    with SurfaceFile.create(tmp_path / "s.h5", grid, (Column("loss"),)) as file:
        file.record(np.arange(34), np.outer(y, x).reshape(-1, 1)[:34], np.ones(34))
    assert main(["svd", str(tmp_path / "s.h5")]) == 1
    assert "1 of 35 points have no finite loss; complete it first" in capsys.readouterr().err
    with SurfaceFile.open(tmp_path / "s.h5", write=True) as file:
        file.record(np.array([34]), np.array([[6.0]]), np.ones(1))
    assert main(["svd", str(tmp_path / "s.h5")]) == 0
    assert "rank 1 is the first within 1%" in capsys.readouterr().out
    np.save(tmp_path / "a.npy", np.eye(6) + 1)
    assert (
        main(
            ["svd", str(tmp_path / "a.npy"), "--rank", "2", "--route", "gram", "-o", str(tmp_path / "a.pdf")]
        )
        == 0
    )
    assert "6 × 6, by gram" in capsys.readouterr().out
    Image.fromarray(np.outer(np.arange(9), np.arange(8)).astype(np.uint8)).save(tmp_path / "grey.png")
    assert main(["svd", str(tmp_path / "grey.png")]) == 0
    assert "grey level, 9 × 8, by lapack" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} >= {"s_svd.png", "a.pdf", "grey_svd.png"}
    (tmp_path / "b.npy").write_bytes(b"nothing")
    np.save(tmp_path / "c.npy", np.full((3, 3), 1j))
    for arguments, words in (
        (["grey.png", "--log"], "values of"),
        (["a.npy", "--rank", "9"], "--rank 9:"),
        (["b.npy"], "b.npy is no matrix of numbers"),
        (["c.npy"], "c.npy is complex"),
        (["c.npy"], "c.npy is complex"),
        (["none.png"], "no file"),
        (["a.npy", "-o", "a.txt"], "cannot save a picture as 'a.txt'"),
    ):
        assert main(["svd", str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        told = capsys.readouterr().err
        assert words in told
        assert told.count("\n") == 1


def test_a_job_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run() == 0
    out = capsys.readouterr().out
    surface = Surface.load("runs/mine/surface.h5")
    assert surface.complete
    assert surface.names == ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    for path in ("surface.h5", "surface_contour.png", "surface_3d.png"):
        assert f"runs/mine/{path}" in out
        assert (folder / "runs/mine" / path).stat().st_size > 5000
    assert "try next" in out
    assert main(["status", "runs/mine/surface.h5"]) == 0
    assert "15 evaluated" in capsys.readouterr().out
    assert main(["check", "runs/mine/surface.h5"]) == 0
    assert "is sound: 15 of 15" in capsys.readouterr().out
    assert main(["plot", "runs/mine/surface.h5", "--column", "test_accuracy", "-o", "a.pdf"]) == 0
    assert (folder / "a.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("override", "columns"),
    [
        ("objective.loss=mine.py:my_loss", ("train_loss", "test_loss")),
        ("objective.loss=torch.nn:CrossEntropyLoss", ("train_loss", "test_loss")),
        ("objective.function=mine.py:my_objective", ("train_norm", "test_norm")),
        ('objective.metrics=["error","top5"]', ("train_loss", "train_error", "train_top5")),
        ('data.splits=["test"]', ("test_loss", "test_accuracy")),
    ],
)
def test_overrides(folder: Path, override: str, columns: tuple[str, ...]) -> None:
    assert _run("--set", override, "--no-pictures") == 0
    assert Surface.load("runs/mine/surface.h5").names[: len(columns)] == columns


def test_job_from_file_and_from_python_give_the_same_values(folder: Path) -> None:
    import distsurf

    assert _run("--no-pictures", "--set", "run.threads=1") == 0
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.load_state_dict(torch.load("net.pt"))
    space: dict[str, Any] = {}
    exec(MY_CODE, space)
    live = distsurf.evaluate(model, space["data"](), x="-1:1:5", y="0:1:3", threads=1, progress="none")
    for name in live.names:
        np.testing.assert_array_equal(live[name], Surface.load("runs/mine/surface.h5")[name])


BAD: dict[str, tuple[list[str], str]] = {
    "missing job": (["run", "none.toml"], "job file none.toml cannot be read: No such file"),
    "unreadable TOML": (["run", "mine.py"], "mine.py is not TOML"),
    "unknown key": (["run", "mine.toml", "--set", "grid.xx=0:1:2"], "unknown key grid.xx"),
    "unreadable grid": (
        ["run", "mine.toml", "--set", "grid.x=0..1"],
        "cannot be read: expected min:max:count",
    ),
    "no such loss": (
        ["run", "mine.toml", "--set", "objective.loss=mze"],
        "no loss or metric 'mze'; did you mean 'mse'?",
    ),
    "no such split": (["run", "mine.toml", "--set", 'data.splits=["val"]'], "the data has no split 'val'"),
    "no such model": (["run", "mine.toml", "--set", "model.factory=resnet9"], "resnet9"),
    "no such module": (
        ["run", "mine.toml", "--set", "model.factory=nowhere:net"],
        "No module named 'nowhere'",
    ),
    "no such file": (["run", "mine.toml", "--set", "model.factory=none.py:net"], "no file none.py"),
    "no such function": (
        ["run", "mine.toml", "--set", "data.source=mine.py:dota"],
        "no callable 'dota'; did you mean 'data'?",
    ),
    "factory raises": (
        ["run", "mine.toml", "--set", "data.source=mine.py:broken"],
        "ValueError: no data today",
    ),
    "wrong argument": (
        ["run", "mine.toml", "--set", "model.arguments={depth=3}"],
        "unexpected keyword argument 'depth'",
    ),
    "no checkpoint": (["run", "mine.toml", "--set", "model.checkpoint=x.pt"], "no checkpoint x.pt"),
    "misfit": (
        ["run", "mine.toml", "--set", "model.arguments={width=6}"],
        "does not fit the model Sequential: misshapen 0.weight (4, 3) where the model has (6, 3), 0.bias (4,)",
    ),
    "wrong data": (
        ["run", "mine.toml", "--set", "data.source=mine.py:wrong"],
        "a batch of the data, (float32 (9, 7), int64 (9,))",
    ),
    "unwritable": (["run", "mine.toml", "--out", "mine.py/s.h5"], "cannot write to the folder mine.py"),
    "output is a folder": (["run", "mine.toml", "--out", "."], "is a folder"),
    "no such device": (["run", "mine.toml", "--set", "run.device=cuda:9"], "device 'cuda:9' cannot be used"),
    "unknown verb": (["polt"], "no verb 'polt'; did you mean 'plot'?"),
    "unknown option": (["run", "--verbos"], "unrecognized arguments: --verbos"),
    "no surface": (["plot", "none.h5"], "no surface file none.h5"),
    "not HDF5": (["status", "mine.py"], "mine.py is not a surface file"),
    "not finite": (
        ["run", "mine.toml", "--set", "model.checkpoint=nan.pt"],
        "the weights are not finite: parameter 0.bias",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_1(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with (folder / "mine.py").open("a") as code:
        code.write("\ndef wrong():\n    return torch.zeros(9, 7), torch.zeros(9, dtype=torch.int64)\n")
    state = torch.load("net.pt")
    state["0.bias"][1] = float("nan")
    torch.save(state, "nan.pt")
    arguments, words = BAD[name]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.startswith("distsurf: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_unknown_column_names_what_there_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--no-pictures") == 0
    assert main(["plot", "runs/mine/surface.h5", "--column", "curvature"]) == 1
    assert "it has train_loss, train_accuracy" in capsys.readouterr().err


def test_another_jobs_surface_is_refused_and_fresh_keeps_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--no-pictures") == 0
    assert _run("--no-pictures", "--set", "directions.seed=7") == 1
    error = capsys.readouterr().err
    assert "directions (file " in error
    assert "weights" not in error.split("what differs")[1].split("Choose")[0]
    assert _run("--no-pictures", "--set", "directions.seed=7", "--fresh") == 0
    assert (folder / "runs/mine/surface.old-1.h5").exists()


def test_incomplete_and_damaged_have_their_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SurfaceFile.create("half.h5", Grid.parse({"x": "0:1:3"}), (Column("loss"),)).close()
    assert main(["check", "half.h5"]) == 3
    assert main(["check", "--repair", "half.h5"]) == 1
    assert "there is nothing to repair" in capsys.readouterr().err
    with h5py.File("half.h5", "r+") as h5:
        h5["status"][1] = 77
    assert main(["check", "half.h5"]) == 4
    assert "1 points do not match their checksums, at (0.5)" in capsys.readouterr().err


def test_a_damaged_file_is_repaired_and_completed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The job is refused, the repaired copy lacks the damaged point, and the job completes it to the same bits."""
    assert _run("--no-pictures") == 0
    path = Path("runs/mine/surface.h5")
    before = Surface.load(path)
    with h5py.File(path, "r+") as h5:
        h5["train_loss"].write_direct(
            np.nextafter(h5["train_loss"][...].ravel()[1:2], 9), dest_sel=np.s_[0, 1]
        )
    damaged = path.read_bytes()
    assert _run("--no-pictures") == 4
    assert "1 points do not match their checksums, at (" in (error := capsys.readouterr().err)
    assert "distsurf check --repair" in error
    assert main(["check", "--repair", str(path)]) == 4
    said = capsys.readouterr().out
    assert f"{before.grid.size - 1:,} of {before.grid.size:,} points" in said
    assert path.read_bytes() == damaged
    assert main(["check", "runs/mine/surface.repaired-1.h5"]) == 3
    assert _run("--no-pictures", "--out", "runs/mine/surface.repaired-1.h5") == 0
    after = Surface.load("runs/mine/surface.repaired-1.h5")
    assert after["loss"].tobytes() == before["loss"].tobytes()
    assert main(["check", "-o", "x.h5", str(path)]) == 1
    assert main(["check", "--repair", "-o", str(path), str(path)]) == 1  # never in place
    assert path.read_bytes() == damaged


def test_a_reader_that_leaves_does_not_end_the_run(folder: Path, processes: Processes) -> None:
    job = (*processes.command(0), "-m", "distsurf.run", "mine.toml", "--no-pictures", "--out", "s.h5")
    process = processes.start("bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "-", *job)
    ended = processes.end(process)
    assert (ended.code, ended.err.count("Broken")) == (0, 0), ended.err
    assert Surface.load(folder / "s.h5").complete


def test_fresh_leaves_files_alone_that_are_no_surface(folder: Path) -> None:
    assert _run("--no-pictures", "--fresh", "--out", "mine.py") == 1
    assert (folder / "mine.py").read_text() == MY_CODE


def test_code_beside_a_file_can_be_imported(folder: Path, processes: Processes) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "helper_of_net.py").write_text("WIDTH = 4")
    (folder / "sub" / "net.py").write_text("from helper_of_net import WIDTH\nfrom mine import net as build")
    assert _run("--no-pictures", "--set", "model.factory=sub/net.py:build") == 0


def test_help_fits_one_screen(processes: Processes) -> None:
    ended = processes.python("-m", "distsurf", "--help")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    for verb in VERBS:
        assert f"distsurf {verb}" in ended.out or verb in ("merge", "import", "svd")
        with pytest.raises(SystemExit) as done:
            main([verb, "--help"])
        assert done.value.code == 0


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("distsurf", ["torch", "mpi4py", "torchvision", "matplotlib"]),
        ("distsurf.run", ["mpi4py", "torchvision", "matplotlib", "sklearn"]),
    ],
)
def test_importing_is_light(processes: Processes, module: str, absent: list[str]) -> None:
    code = f"import {module}, sys; print([m for m in {absent} if m in sys.modules])"
    assert processes.python("-c", code).out.strip() == "[]"


def test_shards_begun_at_once_make_the_whole_surface(folder: Path, processes: Processes) -> None:
    """They find out together how to evaluate, batch size included, and train once."""
    job = JOB.replace('checkpoint = "net.pt"', 'checkpoint = "new.safetensors"') + "[train]\nepochs = 1\n"
    (folder / "mine.toml").write_text(job)
    run = ("-m", "distsurf", "run", "mine.toml", "--no-pictures", "--set", "run.threads=1")
    started = [processes.start(*processes.command(0), *run, "--shard", f"{i}/3") for i in range(3)]
    for process in started:
        ended = processes.end(process)
        assert ended.code == 0, ended.err
        assert "shard " in ended.out
    assert processes.python("-m", "distsurf", "merge", "mine.toml").code == 0
    assert processes.python(*run, "--out", "one.h5").code == 0
    merged, one = Surface.load(folder / "runs/mine/surface.h5"), Surface.load(folder / "one.h5")
    assert merged.complete
    assert merged.fingerprint == one.fingerprint
    for name in one.names:
        assert merged[name].tobytes() == one[name].tobytes()


def test_array_tasks_are_shards_by_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, number in {"ID": 1, "COUNT": 4, "MIN": 0, "MAX": 3}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(number))
    assert main(["run", "mine.toml", "--no-pictures"]) == 0
    shard = folder / "runs/mine/surface.shard-1-of-4.h5"
    surface = Surface.load(shard)
    assert surface.complete
    assert surface.size == surface.count(Status.EVALUATED) == 4
    assert main(["check", str(shard)]) == 0
    assert "4 of 4 points of shard 1/4 have values" in capsys.readouterr().out
    assert main(["run", "mine.toml", "--no-pictures", "--out", str(shard), "--shard", "0/1"]) == 1
    assert "is for shard 1/4 of this job, and the whole surface was asked for" in capsys.readouterr().err
    assert main(["run", "mine.toml", "--shard", "15/16"]) == 1
    assert "shard 15/16: the grid has 15 points only" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", "9")
    assert main(["run", "mine.toml"]) == 1
    assert "give --shard 1/N with the N of the whole array" in capsys.readouterr().err


def test_a_model_that_changes_the_folder_moves_nothing(folder: Path, processes: Processes) -> None:
    code = MY_CODE.replace(
        "def my_loss(outputs, targets):", "def my_loss(outputs, targets):\n    import os; os.chdir('/')"
    )
    (folder / "mine.py").write_text(code)
    ended = processes.python(
        "-m", "distsurf", "run", "mine.toml", "--set", 'objective.loss="mine.py:my_loss"', "--out", "here.h5"
    )
    assert ended.code == 0, (ended.out, ended.err)
    assert "had been removed" not in ended.out
    assert Surface.load(folder / "here.h5").complete
    assert (folder / "here_contour.png").exists()


def test_odd_outputs_and_settings_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(folder / "fifo.h5")
    deep = folder / "deep.toml"
    deep.write_text("a = " + "[" * 5000 + "]" * 5000)
    for arguments in (
        ["mine.toml", "--out", "fifo.h5"],
        ["mine.toml", "--out", "/dev/null"],
        ["mine.toml", "--out", "x" * 300 + ".h5"],
        ["mine.toml", "--set", "run.silence=inf"],
        ["deep.toml"],
    ):
        assert main(["run", *arguments]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert "unexpected" not in told
