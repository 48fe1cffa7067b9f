"""Speed of the main job, as ratios within one run: `make bench`, or python tests/bench_run.py [--quick].

1. One core: a grid point of the default job by distsurf's evaluator against the best plain torch loop over the same
   tensors (inference mode, weights set in place, float64 sums), in alternation.
2. Memory: the same evaluator where freed memory is kept for the next batch, and where it is not.
3. Memory format: residual networks with folded batch norm on images of several sizes, in channels-last with fused
   kernels against as they come, one core, in alternation.
4. Two cores: the same surface by 8 ranks and by 2 ranks, in alternation, from the first point to the last.
5. Coordination: shards of one point each per second, by the coordinator's logic alone; what rank 0 does for each with
   messages and file, hot and without MPI; and by 8 ranks under mpirun with an evaluator that sleeps.
6. Forecast: what `distsurf plan` says against the wall time of the job.

How fast larger networks are evaluated, against other ways and the machine's limits: `distsurf bench`.

Prints one JSON object with every single measurement and its median.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from distsurf import assemble
from distsurf.distribute.coordinator import Coordinator, FullPlan, Shard
from distsurf.distribute.placement import Placement
from distsurf.distribute.ranks import Ranks
from distsurf.distribute.work import Crew, Patience, Report
from distsurf.evaluator import Column
from distsurf.grid import Grid
from distsurf.job import Job
from distsurf.objective.evaluator import ModelEvaluator
from distsurf.objective.fast import steps
from distsurf.objective.fast.verify import sampled_points
from distsurf.objective.recipe import Recipe
from distsurf.run import prepare
from distsurf.surface import SurfaceFile

MPIRUN = Path(sys.executable).parent / "mpirun"


def default_job(*overrides: str) -> Job:
    return Job.read(resources.files("distsurf").joinpath("default.toml").read_text(), overrides)


def one_core(folder: Path, points: int) -> dict[str, Any]:
    """Seconds per point of distsurf and of a plain loop, one thread, alternating."""
    torch.set_num_threads(1)
    job = default_job(f"model.checkpoint={folder / 'net.safetensors'}")
    model = assemble.build_model(job, None)
    cpu = torch.device("cpu")
    shared = prepare(job, model, None, Placement(cpu, 1, ""), lambda line: None)
    batch_size = job.data.batch_size
    plain = assemble.build_model(job, None).eval()
    plain.load_state_dict(model.state_dict())
    layout = shared.subspace.layout
    views = [
        layout.torch_views(torch.from_numpy(v)) for v in (shared.subspace.center, *shared.subspace.directions)
    ]
    batches = [
        (x[i : i + batch_size], y[i : i + batch_size])
        for split in shared.splits
        for x, y in split.pieces
        for i in range(0, len(x), batch_size)
    ]

    @torch.inference_mode()
    def plain_point(a: float, b: float) -> tuple[float, float]:
        for p, w, d, e in zip(plain.parameters(), *views, strict=True):
            torch.add(w, d, alpha=a, out=p.data)
            p.data.add_(e, alpha=b)
        loss, hits = 0.0, 0
        for x, y in batches:
            out = plain(x)
            loss += F.cross_entropy(out, y, reduction="sum").item()
            hits += (out.argmax(1) == y).sum().item()
        return loss, hits

    coordinates = np.random.default_rng(0).uniform(-1, 1, (points, 2))
    times: dict[str, list[float]] = {"distsurf": [], "plain": []}
    with ModelEvaluator(
        model, shared.subspace, shared.buffers, shared.splits, assemble.build_objective(job, None),
        batch_size=batch_size, device=cpu,
    ) as evaluator:  # fmt: skip
        evaluator.choose(sampled_points(job.grid.grid()), job.grid.grid().size)
        for c in [coordinates[0], *coordinates]:
            start = time.perf_counter()
            evaluator(c[None])
            middle = time.perf_counter()
            plain_point(*map(float, c))
            times["distsurf"].append(middle - start)
            times["plain"].append(time.perf_counter() - middle)
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    return {
        "ms_per_point": {name: 1000 * m for name, m in medians.items()},
        "points": points,
        "ratio_distsurf_to_plain": medians["distsurf"] / medians["plain"],
    }


def kept_memory(folder: Path, rounds: int, points: int) -> dict[str, Any]:
    """Milliseconds per point in processes that keep freed memory and in ones that give it back, alternating."""
    times: dict[str, list[float]] = {"kept": [], "given back": []}
    for _ in range(rounds):
        for name, found in times.items():
            command = [sys.executable, __file__, "--points-alone", str(points), name, str(folder)]
            found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {"ms_per_point": times, "ratio_given_back_to_kept": medians["given back"] / medians["kept"]}


def points_alone(points: int, memory: str, folder: Path) -> float:
    """Median milliseconds per point of distsurf in this process."""
    if memory == "kept":
        Placement(torch.device("cpu"), 1, "").apply()
    return float(one_core(folder, points)["ms_per_point"]["distsurf"])


def memory_format(rounds: int) -> dict[str, float]:
    """Speed in channels-last with fused kernels, in units of the speed without, by width and image size."""
    torch.set_num_threads(1)
    ratios = {}
    cpu = torch.device("cpu")
    Placement(cpu, 1, "").apply()
    with mock.patch.object(steps, "LEAST_PIXELS", 0):  # the rule that is measured here
        for width, size in product((4, 8, 16, 32), (8, 16, 20, 32)):
            job = Job.read(
                f"""
                model = {{ factory = "resnet8", arguments = {{ width = {width} }} }}
                data = {{ source = "distsurf.bench.shapes:images", arguments = {{ samples = 256, size = {size} }} }}
                grid = {{ x = "-1:1:3", y = "-1:1:3" }}
                """
            )
            times: dict[tuple[str, ...], list[float]] = {("fold",): [], ("fold", "channels_last", "fuse"): []}
            with contextlib.ExitStack() as stack:
                evaluators = {}
                for chosen in times:
                    model = assemble.build_model(job, None)
                    shared = prepare(job, model, None, Placement(cpu, 1, ""), lambda line: None)
                    evaluators[chosen] = stack.enter_context(
                        ModelEvaluator(
                            model,
                            shared.subspace,
                            shared.buffers,
                            shared.splits,
                            assemble.build_objective(job, None),
                            device=cpu,
                        )
                    )
                    evaluators[chosen].use(Recipe(steps=chosen))
                for _ in range(rounds + 1):
                    for chosen, evaluator in evaluators.items():
                        start = time.perf_counter()
                        evaluator(np.zeros((1, 2)))
                        times[chosen].append(time.perf_counter() - start)
            without, with_ = (statistics.median(found[1:]) for found in times.values())
            ratios[f"{width} channels, {size}x{size}"] = round(without / with_, 2)
    return ratios


def forecast_against_run(folder: Path, rounds: int, grid: str) -> dict[str, Any]:
    """Predicted and actual seconds of a job from the command to its end, by 1 and by 2 ranks, alternating."""
    settings = ["--set", f"grid.x={grid}", "--set", f"grid.y={grid}", "--set", "run.threads=1",
                "--set", f"model.checkpoint={folder / 'net.safetensors'}"]  # fmt: skip
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for i in range(rounds):
        for ranks in found:
            plan = [sys.executable, "-m", "distsurf", "plan", *settings, "--json", "--ranks", str(ranks)]
            told = json.loads(subprocess.run(plan, capture_output=True, text=True, check=True).stdout)
            start = time.perf_counter()
            run = [MPIRUN, "-n", ranks, sys.executable, "-m", "distsurf.run", "--no-pictures", *settings,
                   "--out", folder / f"forecast-{ranks}-{i}.h5"]  # fmt: skip
            subprocess.run([str(part) for part in run], capture_output=True, check=True)
            found[ranks].append((told["wall_seconds"], time.perf_counter() - start))
    return {
        "grid": grid,
        "predicted and actual seconds": found,
        "ratio_predicted_to_actual": {
            ranks: statistics.median(predicted / actual for predicted, actual in pairs)
            for ranks, pairs in found.items()
        },
    }


def ranks_against_each_other(folder: Path, rounds: int, grid: str) -> dict[str, Any]:
    """Seconds of evaluation alone (as the job reports it) by 2 and by 8 ranks."""
    seconds: dict[int, list[float]] = {2: [], 8: []}
    for i in range(rounds):
        for ranks in (2, 8) if i % 2 == 0 else (8, 2):
            out = folder / f"{ranks}-{i}.h5"
            command = [MPIRUN, "-n", ranks, sys.executable, "-m", "distsurf.run", "--no-pictures", "--out", out,
                       "--set", f"grid.x={grid}", "--set", f"grid.y={grid}", "--set", "run.threads=1",
                       "--set", f"model.checkpoint={folder / 'net.safetensors'}"]  # fmt: skip
            ended = subprocess.run(
                [str(part) for part in command], capture_output=True, text=True, check=True
            )
            (line,) = [line for line in ended.stdout.splitlines() if " points/s" in line]
            points = float(line.split(" points × ")[0].replace(",", ""))
            seconds[ranks].append(points / float(line.split(" points/s")[0].split(": ")[1].replace(",", "")))
    medians = {ranks: statistics.median(s) for ranks, s in seconds.items()}
    return {"grid": grid, "seconds": seconds, "ratio_8_to_2_ranks": medians[8] / medians[2]}


def coordinator_alone(workers: int, shards: int = 100_000) -> float:
    """Shards of one point per second through the state machine."""
    coordinator = Coordinator(FullPlan(np.arange(shards)), shards, workers, shard_seconds=0)
    values, seconds = np.zeros((1, 4)), np.array([1e-3])
    for worker in range(workers):
        coordinator.request(worker)
    start = time.perf_counter()
    while not coordinator.finished:
        for worker, reply in coordinator.replies():
            assert isinstance(reply, Shard)
            coordinator.result(worker, reply.points, values, seconds)
            coordinator.request(worker)
    return shards / (time.perf_counter() - start)


class PickledMessages(Ranks):
    """Seven other ranks, whose messages are pickled and kept here."""

    size = 8

    def __init__(self) -> None:
        self.hosts = [""] * self.size
        self.outbox: list[tuple[int, bytes]] = []

    def send(self, rank: int, message: Any) -> None:
        self.outbox.append((rank, pickle.dumps(message)))


def microseconds_per_shard(folder: Path) -> float:
    """What rank 0 does for a shard of one point: unpickle the report, record it, choose, note and pickle the next."""
    ranks, grid, columns = (
        PickledMessages(),
        Grid.parse({"x": "-1:1:201", "y": "-1:1:201"}),
        (Column("loss"),),
    )
    coordinator = Coordinator(FullPlan(grid.coarse_to_fine()), grid.size, ranks.size, shard_seconds=0)
    path = folder / "alone.h5"
    path.unlink(missing_ok=True)
    spent = 0.0
    with SurfaceFile.create(path, grid, columns) as file:
        crew = Crew(ranks, coordinator, mock.Mock(), file, Patience(), print, print)
        nothing = np.empty(0, np.int64)
        for worker in range(1, ranks.size):
            crew.take(worker, Report(nothing, np.empty((0, 1)), np.empty(0), []))
        crew.answer()
        while ranks.outbox:
            sent, ranks.outbox = ranks.outbox, []
            for worker, message in sent:
                shard = pickle.loads(message)
                if isinstance(shard, Shard):
                    report = pickle.dumps(Report(shard.points, np.ones((1, 1)), np.ones(1), []))
                    start = time.perf_counter()
                    crew.take(worker, pickle.loads(report))
                    crew.answer()
                    spent += time.perf_counter() - start
        assert crew.recorded == grid.size
    return 1e6 * spent / grid.size


SLEEPING = """
import sys, time
from distsurf.distribute.ranks import connect
from distsurf.distribute.signals import StopRequest
from distsurf.distribute.work import Pulse, follow
from distsurf.evaluator import Column
from distsurf.grid import Grid
from distsurf.recording import evaluate_missing
from distsurf.surface import SurfaceFile

class Sleeping:
    columns = (Column("loss"),)
    def __call__(self, coordinates):
        time.sleep(float(sys.argv[1]))
        return coordinates[:, :1] ** 2

ranks, grid, stop = connect(), Grid.parse({"x": "-1:1:201", "y": "-1:1:201"}), StopRequest()
if ranks.rank == 0:
    file = SurfaceFile.create(sys.argv[2], grid, Sleeping.columns)
ranks.barrier()
if ranks.rank == 0:
    start, busy = time.perf_counter(), time.thread_time()
    outcome = evaluate_missing(ranks, Sleeping(), file, stop, Pulse(stop), 1, shard_seconds=0)
    seconds = time.perf_counter() - start
    print(grid.size / seconds, (time.thread_time() - busy) / seconds)  # evaluating is another thread's
    assert outcome.surface.complete
else:
    follow(ranks, Sleeping(), grid, Pulse(stop))
ranks.close()
"""


def coordinator_under_mpirun(folder: Path, ranks: int, sleep: float) -> tuple[float, float]:
    """(shards of one point per second, share of a core that coordinating took), with an evaluator that sleeps."""
    script = folder / "sleeping.py"
    script.write_text(SLEEPING)
    command = [
        str(MPIRUN),
        "-n",
        str(ranks),
        sys.executable,
        str(script),
        str(sleep),
        str(folder / "sleeping.h5"),
    ]
    (folder / "sleeping.h5").unlink(missing_ok=True)
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(told[0]), float(told[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer points and rounds")
    parser.add_argument("--points-alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.points_alone:
        points, memory, folder = options.points_alone
        print(points_alone(int(points), memory, Path(folder)))
        return
    quick = options.quick
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["one_core"] = one_core(folder, 20 if quick else 200)
        result["memory"] = kept_memory(folder, 1 if quick else 3, 20 if quick else 60)
        result["memory_format"] = memory_format(3 if quick else 15)
        result["two_cores"] = ranks_against_each_other(
            folder, 1 if quick else 3, "-1:1:9" if quick else "-1:1:31"
        )
        result["shards_per_second"] = {
            "logic alone, 8 workers": coordinator_alone(8),
            "logic alone, 4000 workers": coordinator_alone(4000),
            "microseconds of rank 0 per shard, without MPI": [
                microseconds_per_shard(folder) for _ in range(1 if quick else 3)
            ],
            "mpirun -n 8, sleeping 0.1 ms (and rank 0's share of a core)": [
                coordinator_under_mpirun(folder, 8, 1e-4) for _ in range(1 if quick else 3)
            ],
            "mpirun -n 8, sleeping 7.5 ms (and rank 0's share of a core)": [
                coordinator_under_mpirun(folder, 8, 7.5e-3) for _ in range(1 if quick else 3)
            ],
        }
        result["forecast"] = forecast_against_run(
            folder, 1 if quick else 3, "-1:1:21" if quick else "-1:1:41"
        )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
