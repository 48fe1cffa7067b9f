from __future__ import annotations

from pathlib import Path

import pytest

from distsurf.assemble import recipe
from distsurf.errors import InputError
from distsurf.job import Job

TEXT = """
name = "mine"
[model]
factory = "resnet8"
arguments = { in_channels = 1 }
[data]
source = "digits"
[objective]
loss = ["cross_entropy", { name = "focal", gamma = 3.0, as = "focal3" }]
[grid]
x = "-1:1:5"
y = "0:2:3"
"""


def test_text_reads_back() -> None:
    job = Job.read(TEXT)
    assert Job.read(job.to_toml()) == job
    assert Job.read(job.to_toml()).fingerprint == job.fingerprint
    assert job.losses[1].parameters == {"gamma": 3.0}
    assert job.losses[1].column == "focal3"
    assert job.grid.grid().shape == (3, 5)


@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ("grid.x=-1:1:7", True),
        ("directions.seed=3", True),
        ("objective.loss=mse", True),
        ("data.batch_size=5", True),
        ("run.precision=fp64", True),
        ("model.arguments={in_channels=1,width=8}", True),
        ("name=other", False),
        ("output.file=elsewhere.h5", False),
        ("run.threads=3", False),
        ("run.device=cpu", False),
    ],
)
def test_fingerprint_follows_what_values_depend_on(override: str, differs: bool) -> None:
    job, other = Job.read(TEXT), Job.read(TEXT, [override])
    assert other != job
    assert (other.fingerprint != job.fingerprint) == differs


def test_fingerprint_is_canonical() -> None:
    """The order of tables and defaults written out make no difference."""
    sections = TEXT.strip().split("\n[")
    shuffled = "\n[".join([sections[0], *reversed(sections[1:])])
    assert Job.read(shuffled).fingerprint == Job.read(TEXT).fingerprint
    assert Job.read(TEXT, ["directions.normalization=filter"]).fingerprint == Job.read(TEXT).fingerprint


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gird.x=1", ["unknown key gird", "did you mean 'grid'?"]),
        ("grid.w=0:1:2", ["unknown key grid.w", "there is x, y, z"]),
        ("model.checkpiont=a", ["unknown key model.checkpiont", "did you mean 'checkpoint'?"]),
        ("run.fast=warp", ["run.fast.0 = 'warp'", "expected 'fold'"]),
        ("run.precision=fp8", ["run.precision = 'fp8'", "expected 'fp32', 'fp64', 'tf32', 'bf16' or 'fp16'"]),
        ("directions.seed=-1", ["directions.seed = -1", "greater than or equal to 0"]),
        ("data.batch_size=many", ["data.batch_size = 'many'", "expected a valid integer"]),
        ("grid.x=1:2", ["grid: axis '1:2' cannot be read: expected min:max:count"]),
        ("grid.z=", ["grid", "cannot be read"]),
        ("objective.loss=[3]", ["objective.loss.0 = 3", "expected a name"]),
        ("objective.loss=[]", ["at least one loss"]),
        ("objective.batch_norm=none", ["objective.batch_norm = 'none'", "expected 'frozen'"]),
        ("train.epochs=3", ["[train] needs model.checkpoint"]),
        ("train.lr=3", ["train.epochs is missing"]),
        ("name=a/b", ["name", "no '/'"]),
        ("grid", ["--set 'grid' cannot be read"]),
        ("name.deeper=1", ["name is a value, not a section"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        Job.read(TEXT, [override])
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_sections_are_named() -> None:
    with pytest.raises(InputError, match="model is missing; data is missing; grid is missing"):
        Job.read("")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("x = = 1")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name, words in (
        ("none.toml", "No such file"),
        ("bad.toml", "is not TOML"),
        ("binary.toml", "not text"),
    ):
        with pytest.raises(InputError, match=words):
            Job.load(tmp_path / name)


def test_jobs_of_the_repository_are_valid() -> None:
    found = sorted((Path(__file__).parent.parent / "jobs").glob("*.toml"))
    assert found
    for path in found:
        assert Job.load(path).name == path.stem


def test_jobs_that_share_a_checkpoint_share_its_recipe() -> None:
    """Else the second one of them would be refused the first one's weights."""
    root = Path(__file__).parent.parent
    recipes: dict[str | None, set[str]] = {}
    for path in [root / "distsurf" / "default.toml", *(root / "jobs").glob("*.toml")]:
        job = Job.load(path)
        if job.train is not None:
            recipes.setdefault(job.model.checkpoint, set()).add(recipe(job))
    assert recipes
    assert all(len(found) == 1 for found in recipes.values())
