"""What is asked of SLURM, without one: scripts, options, and when a job comes back. `tests/cluster` has a real one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distsurf import requeue
from distsurf.cli import main
from distsurf.distribute.slurm import SlurmJob, seconds_of
from distsurf.errors import Incomplete, InputError
from distsurf.grid import Grid
from distsurf.job import Job
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
        "--partition=gpu", "--account=me", "--mem=8G", "--exclusive", "--signal=USR2@300",
        "--array=0-2%2", "--time=2:00:00",
    ):  # fmt: skip
        assert array.count(f"#SBATCH {line}") == 1
    assert sum("--signal" in line for line in array) == 1
    assert array[-1].endswith('--shard "$SLURM_ARRAY_TASK_ID/3"')
    assert "#SBATCH --partition=gpu" in merge
    assert "#SBATCH --account=me" in merge
    assert not any("--mem" in line or "--exclusive" in line for line in merge)
    assert not (folder / "runs").exists()


def test_settings_go_to_the_run_and_the_merge(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--set", "run.precision=bf16", "--out", "a b.h5"]
    assert main(["submit", "mine.toml", "--array", "2", "--time", "5", *given, "--dry-run"]) == 0
    run, merge = [line for line in _script(capsys.readouterr().out) if line.startswith("distsurf")]
    assert run.startswith(
        "distsurf run 'a b.slurm/job.toml' --set run.precision=bf16 --out 'a b.h5' --under \"srun\""
    )
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
        (["--nodes", "0"], "'0': expected a whole number, 1 or more"),
        (["--nodes", "1", "--time", "2"], "is told to save 120 s before its walltime ends"),
        (
            ["--nodes", "1", "-t", "1:00:00", "--signal=USR1@3600"],
            "is told to save 3600 s before its walltime ends",
        ),
        (["--arr", "3", "--time", "5"], "--arr: write --array in full"),
        (["--array", "3", "--time", "5", "-W"], "-W: submit does not wait"),
        (["--array", "3", "--time", "5", "--test-only"], "--test-only: --dry-run prints the scripts"),
        (
            ["--array", "3", "--time", "5", "-D/elsewhere"],
            "jobs run in the folder in which they are submitted",
        ),
        (["--array", "3", "--time", "5", "--comment", 'a "b"'], "cannot be written into a batch script"),
        (["--array", "3", "--time", "5", "--comment", "a\nb"], "cannot be written into a batch script"),
        (["--array", "3", "--time", "5", "--gpus-per-node", "a100:x"], "'x': expected a whole number"),
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
    assert '#SBATCH --output="a b/s.slurm/%A_%a.log"' in script
    assert '#SBATCH --output="a b/s.slurm/%j-merge.log"' in script
    assert (
        main(["submit", "mine.toml", "--array", "2", "--time", "5", "--out", "100%j/s.h5", "--dry-run"]) == 0
    )
    assert "#SBATCH --output=100%%j/s.slurm/%A_%a.log" in _script(capsys.readouterr().out)


def _shard(whole: Path, index: int, count: int, grid: str, job: str = "", most: int = 1) -> Path:
    """A shard's file with a few points."""
    shard = ArrayShard(index, count)
    about: dict[str, Any] = {"facts": {"shard": str(shard)}, "fingerprint": {"grid": grid}, "job": job}
    with SurfaceFile.create(shard.path(whole), Grid.parse({"x": grid}), (Column("loss"),), **about) as file:
        points = file.points()[:most]
        file.record(points, np.ones((most, 1)), np.ones(most))
    return shard.path(whole)


def test_status_tells_shards_of_other_jobs_and_cuts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = folder / "s.h5"
    for index, count, grid in ((0, 3, "0:1:9"), (1, 3, "0:2:9"), (1, 2, "0:1:9")):
        _shard(whole, index, count, grid, most=3)
    shutil.copy(ArrayShard(0, 3).path(whole), ArrayShard(2, 3).path(whole))
    ArrayShard(0, 2).path(whole).touch()
    assert main(["status", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"2 shards of {whole}: 0 complete; 3 of 9 points" in told
    assert f"3 shards of {whole}: 1 complete; 3 of 9 points" in told
    assert "1  0 of 3 (of another job: grid (file 0:2:9, this job 0:1:9))" in told
    assert "2  0 of 3 (it is a copy of shard 0/3: move it away)" in told
    assert "0  0 of 5 (" in told


@pytest.fixture
def sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs of SLURM's that always say the same, and the log of what was asked."""
    for name, answer in (("sbatch", "17"), ("squeue", "17|0|PENDING|Resources"), ("scancel", "")):
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho {name} \"$@\" >> {folder}/asked\necho '{answer}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
    return folder


def test_a_job_goes_on_as_it_was_submitted(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit = ["submit", "mine.toml", "--array", "3", "--time", "5"]
    assert main(submit) == 0
    assert "submit mine.toml --missing" in capsys.readouterr().out
    kept = sbatch / "runs/mine/slurm/job.toml"
    assert kept.read_text() == JOB
    (sbatch / "mine.toml").write_text(JOB.replace("0:1:3", "0:1:4"))
    assert main(submit) == 1
    assert "job 17 for runs/mine/surface.h5 is in the queue: scancel it first" in capsys.readouterr().err
    assert main([*submit, "-d", "afterany:17"]) == 1
    assert "the job is not as it was submitted with 17" in capsys.readouterr().err
    assert main(["submit", "mine.toml", "--missing"]) == 0
    told = capsys.readouterr()
    assert "mine.toml has changed; runs/mine/slurm/job.toml is what was submitted" in told.err
    assert "not sent again: 0\nmissing: --array=1-2 (of 3 shards)" in told.out
    (sbatch / "mine.toml").write_text(JOB)
    assert main([*submit, "-d", "afterany:17"]) == 0
    assert "sbatch --parsable --dependency=afterany:17 runs" in (sbatch / "asked").read_text()
    assert "afterany:17" not in (sbatch / "runs/mine/slurm/array.sbatch").read_text()


def test_files_of_another_job_are_told_before_it_is_submitted(
    sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sbatch / "runs/mine/surface.h5"
    whole.parent.mkdir(parents=True)
    other = Job.read(JOB, ["grid.x=-1:1:7", "run.precision=bf16"]).to_toml()
    path = _shard(whole, 1, 3, "0:1:9", other)
    for command in (["submit", "mine.toml", "--array", "3", "--time", "5"], ["merge", "mine.toml"]):
        assert main(command) == 1
        told = capsys.readouterr().err
        assert "surface.shard-1-of-3.h5 is of another job: grid.x (-1:1:7 there, -1:1:5 here); " in told
        assert "run.precision (bf16 there, fp32 here); move it away" in told
    assert not (sbatch / "asked").exists()
    path.unlink()
    assert main(["merge", "mine.toml"]) == 1
    assert "nothing is evaluated yet" in capsys.readouterr().err


def test_surfaces_of_one_folder_have_jobs_of_their_own(
    sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit = ["submit", "mine.toml", "--time", "5"]
    assert main([*submit, "--array", "4", "--out", "a.h5"]) == 0
    assert main([*submit, "--array", "2", "--set", "grid.x=-1:1:3", "--out", "b.h5"]) == 0
    assert "/4" in (sbatch / "a.slurm/array.sbatch").read_text()
    capsys.readouterr()
    assert main(["submit", "mine.toml", "--out", "a.h5", "--missing", "--dry-run"]) == 0
    assert "missing: --array=1-3 (of 4 shards)" in capsys.readouterr().out
    assert main(["status", "."]) == 0
    told = capsys.readouterr().out
    assert "a.h5: nothing is evaluated yet\n4 shards of a.h5:\n      0  17_0 PENDING (Resources)" in told
    assert "2 shards of b.h5:" in told


def test_a_refused_submission_leaves_what_was_there(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scripts of the last one that was accepted are those that --missing sends."""
    accepted, refusing = sbatch / "bin/sbatch", "#!/bin/sh\necho no such partition >&2; exit 1\n"
    answering = accepted.read_text()
    accepted.write_text(refusing)
    assert main(["submit", "mine.toml", "--array", "4%2", "--time", "5"]) == 1
    assert not (sbatch / "runs/mine/slurm").exists()
    accepted.write_text(answering)
    assert main(["submit", "mine.toml", "--array", "4%2", "--time", "5", "--hold"]) == 0
    before = {path: path.read_bytes() for path in (sbatch / "runs/mine/slurm").iterdir()}
    (sbatch / "bin/squeue").write_text("#!/bin/sh\n")  # it has gone
    accepted.write_text(refusing)
    assert main(["submit", "mine.toml", "--array", "8", "--time", "5", "-p", "nowhere"]) == 1
    assert {path: path.read_bytes() for path in (sbatch / "runs/mine/slurm").iterdir()} == before
    accepted.write_text(answering)
    assert main(["submit", "mine.toml", "--missing", "--set", "grid.x=-1:1:3"]) == 0
    assert "--set is not taken" in capsys.readouterr().err
    asked = (sbatch / "asked").read_text().splitlines()
    assert "sbatch --parsable --hold runs/mine/slurm/array.sbatch" in asked
    assert (
        "sbatch --parsable --array=0-3%2 runs/mine/slurm/array.sbatch" in asked
    )  # neither held, nor all at once
    assert main(["submit", "mine.toml", "--missing", "-t", "1"]) == 1
    assert "is told to save 120 s before" in capsys.readouterr().err


def test_missing_shards_are_those_of_the_last_cut(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards of another cut fill points; what is left is asked for in numbers that the script knows."""
    assert main(["submit", "mine.toml", "--array", "2", "--time", "5"]) == 0
    (sbatch / "bin/squeue").write_text("#!/bin/sh\n")
    whole = sbatch / "runs/mine/surface.h5"
    for index in range(3):
        _shard(whole, index, 4, "0:1:8", most=2)
    capsys.readouterr()
    assert main(["submit", "mine.toml", "--missing"]) == 0
    assert "missing: --array=1 (of 2 shards)" in capsys.readouterr().out
    assert main(["check", str(whole)]) == 3
    assert "missing: --array=1 (of 2 shards)" in capsys.readouterr().out


def test_only_a_dependency_on_what_is_queued_lets_another_one_in(
    sbatch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit = ["submit", "mine.toml", "--array", "2", "--time", "5"]
    assert main(submit) == 0
    assert main([*submit, "-d", "afterok:16"]) == 1
    assert "or have this one wait: --dependency=afterany:17" in capsys.readouterr().err
    assert main([*submit, "-d", "singleton"]) == 0


def test_a_file_that_is_no_shard_is_to_be_moved_away(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = folder / "s.h5"
    _shard(whole, 0, 3, "0:1:9", most=3)
    ArrayShard(1, 3).path(whole).touch()
    assert main(["merge", "s.h5"]) == 1
    assert (
        "shard-1-of-3.h5 is not a surface file of distsurf. Without that file the others merge: move it"
        in (capsys.readouterr().err)
    )
    bare = folder / "bare"
    _shard(bare, 0, 1, "0:1:3", most=3).rename(ArrayShard(0, 1).path(bare))
    assert main(["merge", "bare", "--no-pictures"]) == 0


def test_a_complete_surface_is_not_submitted(sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = sbatch / "runs/mine/surface.h5"
    with SurfaceFile.create(
        whole, Grid.parse({"x": "-1:1:5", "y": "0:1:3"}), (Column("loss"),), job=Job.read(JOB).to_toml()
    ) as file:
        file.record(np.arange(15), np.ones((15, 1)), np.ones(15))
    assert main(["submit", "mine.toml", "--array", "2", "--time", "5"]) == 0
    assert "is complete: there is nothing to submit" in capsys.readouterr().out
    assert not (sbatch / "asked").exists()


def test_walltimes_are_read_in_every_form() -> None:
    told = ["90", "90:30", "1:30:30", "1-12", "1-12:30", "1-12:30:30", "UNLIMITED", "soon"]
    assert [seconds_of(time) for time in told] == [5400, 5430, 5430, 129600, 131400, 131430, None, None]


def test_what_missing_cannot_change_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "mine.toml", "--missing", "--requeues", "3"]) == 1
    assert "array.sbatch again: leave --gpus-per-node and --requeues out" in capsys.readouterr().err
