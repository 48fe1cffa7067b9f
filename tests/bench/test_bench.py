"""The counters against closed forms, the forecast against runs, and the verbs as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from distsurf.bench.compare import built_in, parse_precisions, with_weights
from distsurf.bench.count import flop, traffic
from distsurf.bench.machine import matrix_rate, memory_bandwidth
from distsurf.bench.plan import good_shard_count
from distsurf.cli import main
from distsurf.errors import InputError
from distsurf.job import Job
from distsurf.objective.precision import PRECISIONS
from tests.conftest import Processes
from tests.objective.planes import CPU

SMALL = ("--set", "model.factory=resnet8", "--set", "model.arguments={width=4}", "--set", "grid.x=-1:1:7")
DIGITS = (*SMALL, "--set", "model.arguments={width=4,in_channels=1}")


def test_flop_are_two_per_multiplication() -> None:
    x = torch.randn(5, 3, 8, 8)
    assert flop(lambda: nn.Conv2d(3, 4, 3, padding=1)(x)) == 2 * 5 * 4 * 3 * 9 * 64
    assert flop(lambda: torch.randn(2, 7) @ torch.randn(7, 3)) == 2 * 2 * 7 * 3


def test_traffic_is_what_operations_read_and_write() -> None:
    a, b = torch.ones(1000), torch.ones(1000)
    assert traffic(lambda: a + b) == 3 * 4000
    assert traffic(lambda: a.view(10, 100).t()) == 0
    assert traffic(lambda: a.add_(b)) == 3 * 4000
    assert traffic(lambda: a.double()) == 4000 + 8000


def test_rates_are_measured() -> None:
    for precision in ("fp32", "bf16"):
        assert matrix_rate(CPU, PRECISIONS[precision], repeats=1) > 1e9
    assert memory_bandwidth(CPU, repeats=1) > 1e8


@pytest.mark.parametrize(
    ("seconds", "set_up", "ranks", "expected"),
    [
        (100.0, 0.1, 1, 1),
        (8 * 3600.0, 10.0, 8, 8),
        (80 * 3600.0, 10.0, 8, 80),
        (81 * 3600.0, 10.0, 8, 88),  # a multiple of the ranks
        (1000.0, 10.0, 64, 5),  # a start may take a twentieth of a shard
        (1.0, 10.0, 64, 1),
        (36e6, 900.0, 8, 2000),
    ],
)
def test_good_shard_counts(seconds: float, set_up: float, ranks: int, expected: int) -> None:
    assert good_shard_count(seconds, set_up, ranks) == expected


def test_untrained_weights_where_training_would_come_first(tmp_path: Path) -> None:
    job = Job.read(
        f"""
        [model]
        factory = "resnet8"
        checkpoint = "{tmp_path}/net.safetensors"
        [train]
        epochs = 1
        [data]
        source = "digits"
        [grid]
        x = "-1:1:3"
        """
    )
    assert with_weights(job).model.checkpoint is None
    (tmp_path / "net.safetensors").touch()
    assert with_weights(job) is job


def test_precisions_by_name() -> None:
    assert parse_precisions("fp32, bf16,fp32") == ["fp32", "bf16"]
    with pytest.raises(InputError, match="did you mean 'bf16'"):
        parse_precisions("fp32,bf61")


def test_bench_compares_ways_that_agree(processes: Processes) -> None:
    """One small network by all ways: the same values, and every figure in the JSON follows from the others."""
    command = ("-m", "distsurf", "bench", "resnet20", *SMALL, "--samples", 100, "--rounds", 2, "--threads", 1)
    ended = processes.python(*command, "--precision", "fp32,bf16", "--json", "bench.json")
    assert ended.code == 0, ended.err
    result = json.loads((processes.folder / "bench.json").read_text())
    ways = result["ways"]
    assert list(ways) == ["textbook", "plain", "distsurf fp32", "distsurf bf16"]
    assert all(name in ended.out for name in ways)
    for name, way in ways.items():
        rtol = 0.2 if name.endswith("bf16") else 1e-5
        assert len(way["seconds"]) == len(way["values"]) == 2
        for mine, theirs in zip(way["values"], ways["textbook"]["values"], strict=True):
            np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=rtol)
            if name != "distsurf bf16":
                assert mine["accuracy"] == pytest.approx(theirs["accuracy"], rel=1e-9)
        median = float(np.median(way["seconds"]))
        assert way["samples_per_s"] == pytest.approx(100 / median)
        assert way["against_textbook"] == pytest.approx(np.median(ways["textbook"]["seconds"]) / median)
    fast = ways["distsurf fp32"]
    assert fast["steps"] == ["fold", "channels_last", "fuse"]
    with torch.device("meta"):
        images, network = torch.randn(1, 3, 32, 32), built_in("resnet20", 1, SMALL[1::2])
    from distsurf import zoo

    model = zoo.model("resnet8", **network.model.arguments).eval()
    assert fast["flop_per_sample"] == flop(lambda: model(torch.zeros_like(images, device="cpu")))
    expected = fast["flop_per_sample"] * fast["samples_per_s"] / fast["matrix_flop_per_s"]
    assert fast["share_of_matrix_rate"] == pytest.approx(expected)
    assert 0 < fast["share_of_moving"] < 1
    # A pass of an unfused network moves more bytes than one of a fused network in half the width.
    assert ways["distsurf bf16"]["bytes_per_sample"] < 0.7 * fast["bytes_per_sample"]


def test_plan_tells_what_a_run_will_take(processes: Processes) -> None:
    """Everything but the time, which no test holds against a clock: tests/bench_run.py compares that."""
    ended = processes.python("-m", "distsurf", "plan", *DIGITS, "--ranks", 6, "--ranks-per-node", 2, "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert (told["points"], told["ranks"], told["nodes"], told["threads"]) == (7 * 51, 6, 3, 1)
    rest = told["wall_seconds"] - told["set_up_seconds"]
    assert rest == pytest.approx(np.ceil(told["points"] / 6) * told["seconds_per_point"])
    assert told["steps"] == ["fold"]
    assert told["batch_size"] == 450
    assert told["data_bytes"] == 1797 * (64 * 4 + 8)
    assert told["memory_per_rank"] > 1e8
    assert not list(processes.folder.iterdir())  # nothing trained, nothing written
    in_words = processes.python("-m", "distsurf", "plan", *DIGITS)
    assert in_words.code == 0, in_words.err
    assert "357 points on 1 rank" in in_words.out
    assert "not counted: the training" in in_words.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "resnet65"], "is no job file, and no built-in network"),
        (["bench", "--rounds", "0"], "--rounds"),
        (["bench", "--precision", "fp23"], "no precision 'fp23'"),
        (["bench", __file__, "--samples", "5"], "--samples is for the built-in networks"),
        (["bench", "--json", "/proc/none/b.json"], "cannot write to the folder"),
        (["plan", "--ranks", "0"], "--ranks"),
        (["plan", "--set", "model.factory=resnet9"], "measuring distsurf failed: no model 'resnet9'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    said = capsys.readouterr().err.strip()
    assert words in said
    assert said.count("\n") == 0


LOUD = """
import sys
from distsurf.bench.shapes import images

def data():
    print("a line of the user's own")
    sys.stderr.write("chatter " * 100_000)
    return images(samples=20, size=8)

def dies(model, batch):
    import os
    os._exit(5)
"""


def test_contenders_that_talk_or_die(processes: Processes) -> None:
    """More on standard error than a pipe holds stops nobody; an end without a word is told of."""
    (processes.folder / "loud.py").write_text(LOUD)
    job = ("--set", "data.source=loud.py:data", "--set", "model.factory=resnet8", "--set", "grid.x=-1:1:3")
    loud = processes.python("-m", "distsurf", "plan", *job, "--set", "model.arguments={width=2}", "--json")
    assert loud.code == 0, loud.err[-500:]
    assert json.loads(loud.out)["points"] == 3 * 51
    dead = processes.python("-m", "distsurf", "plan", *job, "--set", "objective.function=loud.py:dies")
    assert dead.code == 1
    assert dead.err.startswith("distsurf: measuring distsurf failed")
    assert dead.err.count("\n") == 1
