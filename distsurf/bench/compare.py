"""`distsurf bench`: a job by the textbook's loop, by the best plain loop and by distsurf, in alternation."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from distsurf import __version__
from distsurf.bench.contender import Answer, Contender
from distsurf.errors import InputError
from distsurf.job import Job

NETWORKS = ("resnet56", "vgg9", "resnet20")


def built_in(network: str, samples: int, overrides: Sequence[str] = ()) -> Job:
    """The job of a network of the paper on random images of CIFAR's shape."""
    return Job.read(
        f"""
        name = "bench-{network}"
        model.factory = "{network}"
        data.source = "distsurf.bench.shapes:images"
        data.arguments.samples = {samples}
        grid.x = "-1:1:51"
        grid.y = "-1:1:51"
        """,
        overrides,
        origin="bench",
    )


def bench(
    job: Job,
    precisions: Sequence[str],
    rounds: int,
    threads: int,
    say: Callable[[str], None],
    each_step: bool = False,
) -> dict[str, Any]:
    """Measure a job in all ways; returns everything that was measured, medians included, as JSON.

    In every round each way evaluates the same random point once. ``precisions`` are those of distsurf; the plain loops
    compute in float32, as their authors leave it. ``each_step``: distsurf also without its last steps, one by one.
    Raises InputError where a way fails.
    """
    job = job.model_copy(update={"curvature": None})  # what is compared is the pass that all ways have
    axes = job.evaluated_grid().axes
    random = np.random.default_rng(0)
    points = [[float(random.uniform(axis.low, axis.high)) for axis in axes] for _ in range(rounds + 1)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        contenders: dict[str, Contender] = {}
        about: dict[str, Answer] = {}

        def start(name: str, way: str, precision: str, **settings: Any) -> Answer:
            """One after the other, so that none disturbs another's tuning."""
            path = Path(folder, f"{len(contenders)}.toml")
            path.write_text(_with(job, precision=precision, **settings).to_toml())
            contenders[name] = Contender(way, path, threads)
            stack.callback(contenders[name].close)
            about[name] = contenders[name].ready()
            about[name] |= contenders[name].cost()
            return about[name]

        start("textbook", "textbook", "fp32")
        start("plain", "plain", "fp32")
        for precision in precisions:
            start(f"machine {precision}", "machine", precision)
            whole = f"distsurf {precision}"
            steps = start(whole, "distsurf", precision)["steps"]
            for count in range(len(steps) if each_step else 0):
                fewer = steps[:count] or False
                name = f"{'  + ' if count else '  '}{steps[count - 1] if count else 'no step'} {precision}"
                start(name, "distsurf", precision, fast=fewer)
            contenders[whole] = contenders.pop(whole)  # last, as the sum of its steps
        answers: dict[str, list[Answer]] = {name: [] for name in contenders}
        for i, point in enumerate(points):
            for name, contender in contenders.items():
                contender.tell(point)
                answers[name].append(contender.told())
            if i:
                say(f"round {i} of {rounds}")
    return _result(job, about, {name: given[1:] for name, given in answers.items()}, points[1:])


def _with(job: Job, **settings: Any) -> Job:
    return job.model_copy(update={"run": job.run.model_copy(update=settings)})


def _result(
    job: Job, about: dict[str, Answer], answers: dict[str, list[Answer]], points: list[list[float]]
) -> dict[str, Any]:
    samples = about["textbook"]["samples"]

    def median(name: str, what: str) -> float:
        return statistics.median(answer[what] for answer in answers[name])

    machine = next(about[name] for name in about if name.startswith("machine"))
    result: dict[str, Any] = {
        "job": job.to_toml(),
        "distsurf": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **{key: machine[key] for key in ("device", "threads", "torch")},
        "samples": samples,
        "points": points,
        "ways": {},
    }
    slowest = median("textbook", "seconds")
    for name in (n for n in answers if not n.startswith("machine")):
        seconds = median(name, "seconds")
        way: dict[str, Any] = {
            "seconds": [answer["seconds"] for answer in answers[name]],
            "points_per_s": 1 / seconds,
            "samples_per_s": samples / seconds,
            "against_textbook": slowest / seconds,
            "against_plain": median("plain", "seconds") / seconds,
            "values": [answer["values"] for answer in answers[name]],
        }
        if "batch_size" in about[name]:
            way["batch_size"] = about[name]["batch_size"]
        if "steps" in about[name]:
            precision = about[name]["precision"]
            rate, bandwidth = (median(f"machine {precision}", k) for k in ("flop_per_s", "bytes_per_s"))
            made = about[name]
            way |= {
                "precision": precision,
                "steps": list(made["steps"]),
                "dropped": made["dropped"],
                "flop_per_sample": made["flop"],
                "bytes_per_sample": made["traffic"],
                "matrix_flop_per_s": rate,
                "memory_bytes_per_s": bandwidth,
                "share_of_matrix_rate": made["flop"] * samples / seconds / rate,
                "share_of_memory_bandwidth": made["traffic"] * samples / seconds / bandwidth,
                "share_of_moving": median(name, "moving_s") / seconds,
                "relative_error_of_loss": _largest_difference(answers[name], answers["plain"]),
            }
        result["ways"][name] = way
    return result


def _largest_difference(mine: list[Answer], plain: list[Answer]) -> float:
    """Largest relative difference of the first column."""
    found = [0.0]
    for a, b in zip(mine, plain, strict=True):
        (name, value), expected = next(iter(a["values"].items())), b["values"]
        if math.isfinite(value) and math.isfinite(expected[name]) and expected[name]:
            found.append(abs(value / expected[name] - 1))
    return max(found)


def table(result: dict[str, Any]) -> list[str]:
    """The result in lines of text."""
    threads = result["threads"]
    width = max(map(len, result["ways"])) + 1
    lines = [
        f"{result['device']}, {threads} thread{'s' * (threads != 1)}, torch {result['torch']}; "
        f"{result['samples']:,} samples a point",
        "",
        f"{'':{width}}{'samples/s':>11}{'points/s':>10}{'× textbook':>12}{'× plain':>9}"
        f"{'of matrix rate':>16}{'of memory':>11}  how",
    ]
    for name, way in result["ways"].items():
        line = (
            f"{name:{width}}{way['samples_per_s']:11,.0f}{way['points_per_s']:10.3g}"
            f"{way['against_textbook']:12.2f}{way['against_plain']:9.2f}"
        )
        if "steps" in way:
            steps = ", ".join(way["steps"]) or "plain"
            line += f"{way['share_of_matrix_rate']:16.0%}{way['share_of_memory_bandwidth']:11.0%}"
            line += f"  {steps}; batches of {way['batch_size']}"
        elif "batch_size" in way:
            line += f"{'':27}  batches of {way['batch_size']}"
        lines.append(line)
    lines.append("")
    for name, way in result["ways"].items():
        if name.startswith("distsurf"):
            lines.append(
                f"{name}: {way['flop_per_sample'] / 1e9:.3g} GFLOP and {way['bytes_per_sample'] / 1e6:.3g} MB "
                f"a sample; the machine does {way['matrix_flop_per_s'] / 1e9:,.0f} GFLOP/s and "
                f"{way['memory_bytes_per_s'] / 1e9:,.3g} GB/s; setting the weights takes "
                f"{way['share_of_moving']:.2%} of a point; the loss differs from the plain loop's by "
                f"{way['relative_error_of_loss']:.1g}"
            )
            lines += [f"{name} without {step}: {reason}" for step, reason in way["dropped"].items()]
    return lines


def with_weights(job: Job) -> Job:
    """The job with untrained weights where it would train first: speed does not depend on them."""
    path = job.model.checkpoint
    if job.train is not None and path is not None and not Path(path).exists():
        model = job.model.model_copy(update={"checkpoint": None})
        return job.model_copy(update={"train": None, "model": model})
    return job


def parse_precisions(text: str) -> list[str]:
    """``fp32,bf16`` as a list. Raises InputError for unknown ones."""
    from distsurf.names import nearest
    from distsurf.objective.precision import PRECISIONS

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PRECISIONS:
            raise InputError(f"no precision {name!r}; {nearest(name, PRECISIONS)}")
    return list(dict.fromkeys(names)) or ["fp32"]
