"""What is asked of SLURM, without one: scripts, options, and when a job comes back. `tests/cluster` has a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distsurf import requeue
from distsurf.cli import main
from distsurf.distribute.slurm import SlurmJob
from distsurf.errors import Incomplete, InputError
from distsurf.grid import Grid
from distsurf.requeue import Requeues
from distsurf.shards import ArrayShard
from distsurf.submit import EXAMPLES, parse_array, scripts, walltime
from distsurf.surface import Column, SurfaceFile
from tests.conftest import ROOT

JOB = """
name = "mine"
[model]
factory = "mine.py:net"
[data]
source = "mine.py:data"
[grid]
x = "-1:1:5"
y = "0:1:3"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(JOB)
    return tmp_path


def test_the_scripts_to_copy_are_those_that_are_submitted() -> None:
    expected = {name: text for wish in EXAMPLES for name, text in scripts(wish).items()}
    assert {path.name: path.read_text() for path in (ROOT / "slurm").iterdir()} == expected


def _script(out: str) -> list[str]:
    return [
        line.split("  #")[0].strip() for line in out.splitlines() if line.startswith(("#SBATCH", "distsurf"))
    ]


def test_options_of_sbatch_go_into_the_scripts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--partition", "gpu", "-A", "me", "--mem=8G", "--exclusive", "--signal", "USR2@300"]
    assert main(["submit", "mine.toml", "--array", "3%2", "--time", "2:00:00", *more, "--dry-run"]) == 0
    array, merge = (_script(part) for part in capsys.readouterr().out.split("/merge.sbatch"))
    for line in (
        "--partition=gpu", "-A me", "--mem=8G", "--exclusive", "--signal=USR2@300", "--array=0-2%2", "--time=2:00:00",
    ):  # fmt: skip
        assert array.count(f"#SBATCH {line}") == 1
    assert sum("--signal" in line for line in array) == 1
    assert array[-1].endswith('--shard "$SLURM_ARRAY_TASK_ID/3"')
    assert "#SBATCH --partition=gpu" in merge
    assert "#SBATCH -A me" in merge
    assert not any("--mem" in line or "--exclusive" in line for line in merge)
    assert not (folder / "runs").exists()


def test_settings_go_to_the_run_and_the_merge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--set", "run.precision=bf16", "--out", "a b.h5"]
    assert main(["submit", "mine.toml", "--array", "2", "--time", "5", *given, "--dry-run"]) == 0
    run, merge = [line for line in _script(capsys.readouterr().out) if line.startswith("distsurf")]
    assert run.startswith("distsurf run mine.toml --set run.precision=bf16 --out 'a b.h5' --under \"srun\"")
    assert merge == "distsurf merge 'a b.h5'"


def test_one_job_over_nodes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["submit", "mine.toml", "--nodes", "2", "--gpus-per-node", "4", "--time", "5", "--dry-run"]) == 0
    )
    script = _script(capsys.readouterr().out)
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"):
        assert f"#SBATCH {line}" in script
    assert '--under "srun --mpi=pm' in script[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--array", "0"], "--array 0: expected the number of shards N, or N%M"),
        (["--array", "16", "--time", "5", "--dry-run"], "the grid has 15 points only"),
        (["--array", "2", "--time", "5", "--dry-run", "--exclusive", "a", "b"], "'b' belongs to no option"),
        (["--missing"], "no array was submitted for runs/mine/surface.h5"),
        (["--array", "2", "--time", "5"], "there is no sbatch here"),
    ],
)
def test_mistakes_are_told(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "mine.toml", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_walltimes_are_quarters_of_an_hour() -> None:
    assert [walltime(seconds) for seconds in (1, 400, 3600, 86400)] == [
        "00:15:00", "00:30:00", "02:15:00", "48:15:00",
    ]  # fmt: skip
    assert parse_array("12%3") == (12, 3)


# -- coming back ------------------------------------------------------------------------------------------

RUNNING = {
    "JobState": "RUNNING",
    "Restarts": "0",
    "PreemptTime": "None",
    "TimeLimit": "01:00:00",
    "StartTime": "2999-01-01T00:00:00",
}


class Pretended(SlurmJob):
    """A job of which a test says what SLURM does."""

    told: dict[str, str] = RUNNING
    requeued = 0

    def facts(self) -> dict[str, str]:
        return self.told

    def requeue(self) -> None:
        type(self).requeued += 1


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Pretended, "requeued", 0)
    monkeypatch.setattr(Pretended, "told", RUNNING)
    path = tmp_path / "s.h5"
    SurfaceFile.create(path, Grid.parse({"x": "0:1:9"}), (Column("loss"),)).close()
    return path


def _advance(path: Path, point: int) -> None:
    with SurfaceFile.open(path, write=True) as file:
        file.record(np.array([point]), np.ones((1, 1)), np.ones(1))


def _start(path: Path, restarts: int, said: list[str], most: int = 2) -> Requeues:
    found = Requeues(Pretended("7_3", restarts), path, most, said.append)
    found.begin()
    return found


def test_reasons_are_counted_apart(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for number, (facts, stopped) in enumerate(
        [
            ({}, "SIGUSR2"),
            ({"PreemptTime": "2026-11-24T13:52:14"}, "SIGTERM"),
            ({}, "SIGUSR2"),
            ({}, ""),
        ]
    ):
        monkeypatch.setattr(Pretended, "told", {**RUNNING, "Restarts": str(number), **facts})
        assert _start(path, number, said).end(stopped) == "it is requeued"
        _advance(path, number)
    assert Pretended.requeued == 4
    assert "2 for end of its walltime, 1 for preemption, 1 for death of its ranks" in said[-1]
    monkeypatch.setattr(Pretended, "told", {**RUNNING, "Restarts": "4"})
    assert "requeued 2 times for end of its walltime (--requeues), and is not again" in _start(
        path, 4, said
    ).end("SIGUSR2")
    assert Pretended.requeued == 4


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"JobState": "CANCELLED"}, "it was cancelled, and is not requeued"),
        ({"JobState": "COMPLETING"}, "it was cancelled, and is not requeued"),
        ({"JobState": "COMPLETING", "Restarts": "1"}, "SLURM has requeued it"),
    ],
)
def test_what_slurm_has_decided_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str], words: str
) -> None:
    monkeypatch.setattr(Pretended, "told", {**RUNNING, **facts})
    assert _start(path, 0, []).end("SIGTERM") == words
    assert Pretended.requeued == 0


def test_a_walltime_that_ends_without_a_signal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = {"JobState": "COMPLETING", "StartTime": "2020-01-01T00:00:00", "TimeLimit": "1-02:00:00"}
    monkeypatch.setattr(Pretended, "told", {**RUNNING, **over})
    assert _start(path, 0, []).end("SIGTERM") == "it is requeued"


def test_a_job_that_never_advances_stops(path: Path) -> None:
    said: list[str] = []
    for number in range(requeue.MOST_BARREN):
        _start(path, number, said)
    with pytest.raises(Incomplete, match="the last 3 starts of job 7_3 brought the surface no further"):
        _start(path, requeue.MOST_BARREN, said)
    _advance(path, 0)
    _start(path, 9, said)  # it has advanced after all
    Requeues(Pretended("8", 0), path, 2, said.append).begin()  # another job is not blamed


def test_which_job_this_is() -> None:
    assert SlurmJob.here({}) is None
    assert SlurmJob.here({"SLURM_JOB_ID": "9"}) == SlurmJob("9", 0)
    task: dict[str, Any] = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"}
    assert SlurmJob.here({"SLURM_JOB_ID": "9", **task}) == SlurmJob("9_2", 1)  # 9 would be all tasks


def test_a_refusal_of_slurm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho 'Job is pending execution' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(InputError, match="scontrol refused: Job is pending execution"):
        SlurmJob("7", 0).requeue()
    program.write_text("#!/bin/sh\necho 'JobId=7 JobName=a b JobState=RUNNING Reason=None Comment='\n")
    assert SlurmJob("7", 0).facts() == {
        "JobId": "7", "JobName": "a b", "JobState": "RUNNING", "Reason": "None", "Comment": "",
    }  # fmt: skip


def test_status_of_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, whole = Grid.parse({"x": "0:1:9"}), folder / "s.h5"
    for index, most in ((0, 3), (2, 1)):
        shard = ArrayShard(index, 3)
        with SurfaceFile.create(
            shard.path(whole), grid, (Column("loss"),), facts={"shard": str(shard)}
        ) as file:
            points = file.points()[:most]
            file.record(points, np.ones((most, 1)), np.ones(most))
    (folder / "other.h5").write_text("something else")
    assert main(["status", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"3 shards of {whole}: 1 complete; 4 of 9 points" in told
    assert [line.split() for line in told.splitlines() if line.startswith("  ")] == [
        ["1", "0", "of", "3"], ["2", "1", "of", "3"],
    ]  # fmt: skip
    assert "other.h5 is not a surface file of distsurf" in told
    (folder / "empty").mkdir()
    assert main(["status", str(folder / "empty")]) == 1


def test_folders_with_spaces_are_quoted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--out", "a b/s.h5", "--comment", "x # y", "--time", "5", "--dry-run"]
    assert main(["submit", "mine.toml", "--array", "2", *given]) == 0
    script = _script(capsys.readouterr().out)
    assert '#SBATCH --output="a b/slurm/%A_%a.log"' in script
    assert '#SBATCH --output="a b/slurm/%j-merge.log"' in script


def test_what_missing_cannot_change_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "mine.toml", "--missing", "--requeues", "3"]) == 1
    assert "array.sbatch again: leave --gpus-per-node and --requeues out" in capsys.readouterr().err
