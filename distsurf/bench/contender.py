"""A process that evaluates points of a job in one of several ways, when it is told to, and says how long each took.

    python -m distsurf.bench.contender WAY JOB.toml THREADS NODE_RANK

It reads coordinates as JSON from standard input, one point a line, and answers with one line of JSON each; to `COST` it
tells what a pass costs. The first line that it writes is about itself. `Contender` is the other end.
"""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distsurf import assemble
from distsurf.agree import agree_on_recipe
from distsurf.bench.count import flop, traffic
from distsurf.bench.machine import matrix_rate, memory_bandwidth
from distsurf.distribute.placement import Placement, place
from distsurf.distribute.ranks import Ranks
from distsurf.errors import DistsurfError, InputError
from distsurf.evaluator import Evaluator
from distsurf.job import Job
from distsurf.objective.data import Split, map_tree, tensors_of
from distsurf.objective.precision import PRECISIONS, arithmetic
from distsurf.objective.recipe import DEFAULT_BATCH
from distsurf.objective.tune import TIMED, tune_batch_size
from distsurf.run import Prepared, evaluator_of, prepare, with_curvature

MARK = "distsurf-bench:"
"""What stands before our lines: a user's code may print lines of its own."""
COST = "cost"
"""The question that is no point."""
TEXTBOOK_BATCH, TEXTBOOK_WORKERS = 128, 2
Answer = dict[str, Any]


class Contender:
    """A contender's process, from outside. Raises InputError with what it said if it fails."""

    def __init__(self, way: str, job: Path, threads: int = 0, node_rank: int = 0):
        self._way = way
        # A pipe that nobody reads would stop it when full.
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distsurf.bench.contender", way, str(job), str(threads), str(node_rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
        )
        self._started = time.monotonic()

    def ready(self) -> Answer:
        """What it says of itself; returns when it is ready for points."""
        about = self._answer()
        about["setup_s"] = time.monotonic() - self._started
        return about

    def cost(self) -> Answer:
        """What a pass costs per sample, counted."""
        self._ask(COST)
        return self._answer()

    def tell(self, point: list[float]) -> None:
        """Have it evaluate a point."""
        self._ask(point)

    def _ask(self, question: Any) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: the answer will tell
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def told(self) -> Answer:
        """Its answer, once the point is done."""
        answer = self._answer()
        answer["seconds"] /= answer.get("points", 1)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return dict(json.loads(line.removeprefix(MARK)))
        self._process.wait()
        self._complaints.seek(0)
        last = (self._complaints.read().strip().splitlines() or ["nothing"])[-1]
        raise InputError(f"measuring {self._way} failed: {last[-300:]}")


# -- inside the process -----------------------------------------------------------------------------------


class _Way(ABC):
    """One way to evaluate points."""

    about: Answer

    @abstractmethod
    def evaluate(self, point: list[float]) -> Answer:
        """Evaluate a point; returns what is to be said beside the time it took."""

    def cost(self) -> Answer:
        """What a pass costs per sample; nothing where that is not known."""
        return {}


class _Machine(_Way):
    """No points at all, but the machine's rates."""

    def __init__(self, job: Job, placement: Placement, stack: contextlib.ExitStack):
        self._device, self._precision = placement.device, PRECISIONS[job.run.precision]
        name = (
            torch.cuda.get_device_name(placement.device) if placement.device.type == "cuda" else _cpu_name()
        )
        self.about = {"device": name, "threads": placement.threads, "torch": torch.__version__}

    def evaluate(self, point: list[float]) -> Answer:
        return {
            "flop_per_s": matrix_rate(self._device, self._precision),
            "bytes_per_s": memory_bandwidth(self._device),
        }


class _Loop(_Way):
    """What the two plain loops share: the model in evaluation mode, its weights set tensor by tensor."""

    def __init__(self, job: Job, placement: Placement, stack: contextlib.ExitStack):
        if job.objective.batch_norm != "frozen":
            raise InputError("the plain loops of the bench know frozen batch norm only")
        self.model, prepared = _prepared(job, placement)
        self.model.to(placement.device).eval()
        self.device = placement.device
        self.objective = assemble.build_objective(job, None)
        self.splits = prepared.splits
        layout = prepared.subspace.layout
        self._terms = prepared.subspace.terms
        self._weights = [
            [view.to(placement.device) for view in layout.torch_views(torch.from_numpy(vector))]
            for vector in (prepared.subspace.center, *prepared.subspace.directions)
        ]
        self.about = {"samples": sum(split.samples for split in self.splits)}

    def place_weights(self, point: list[float]) -> None:
        center, *directions = self._weights
        for i, parameter in enumerate(self.model.parameters()):
            parameter.data = center[i] + sum(c * directions[k][i] for k, c in self._terms(point))


class _Textbook(_Loop):
    """A DataLoader with its workers, one pass per point, every batch's numbers fetched as they come."""

    def evaluate(self, point: list[float]) -> Answer:
        self.place_weights(point)
        values: dict[str, float] = {}
        with torch.no_grad():
            for split in self.splits:
                sums: dict[str, float] = {}
                counts: dict[str, float] = {}
                for batch in self._batches(split):
                    placed = map_tree(lambda tensor: tensor.to(self.device), batch)
                    for name, (total, count) in self.objective(self.model, placed).items():
                        sums[name] = sums.get(name, 0.0) + float(total)
                        counts[name] = counts.get(name, 0.0) + float(count)
                values |= {f"{split.name}_{name}".lstrip("_"): sums[name] / counts[name] for name in sums}
        return {"values": values}

    def _batches(self, split: Split) -> Iterable[Any]:
        if not split.whole or not isinstance(split.pieces[0], tuple):
            return split.pieces
        data = TensorDataset(*split.pieces[0])
        return DataLoader(data, batch_size=TEXTBOOK_BATCH, num_workers=TEXTBOOK_WORKERS)


class _Plain(_Loop):
    """The best loop that plain torch gives: data in memory on the device, no gradients, one fetch per point."""

    def __init__(self, job: Job, placement: Placement, stack: contextlib.ExitStack):
        super().__init__(job, placement, stack)
        placed = [split.map(lambda tensor: tensor.to(placement.device)) for split in self.splits]
        largest = max(placed, key=lambda split: split.samples)

        def seconds_per_sample(size: int) -> float:
            batches = largest.batches(size)[: max(1, TIMED // size)]
            found = []
            for _ in range(3):
                start = time.perf_counter()
                self._values([("", batches)])
                found.append(time.perf_counter() - start)
            return min(found) / sum(len(tensors_of(batch)[0]) for batch in batches)

        size = job.data.batch_size or DEFAULT_BATCH
        if job.data.batch_size == 0 and largest.whole:
            size = tune_batch_size(seconds_per_sample, min(size, largest.samples), largest.samples, 10.0)
        self._batches = [(split.name, split.batches(size)) for split in placed]
        self.about["batch_size"] = size

    def evaluate(self, point: list[float]) -> Answer:
        self.place_weights(point)
        return {"values": self._values(self._batches)}

    def _values(self, splits: list[tuple[str, list[Any]]]) -> dict[str, float]:
        found: dict[str, torch.Tensor] = {}
        with torch.inference_mode(), arithmetic(PRECISIONS["fp32"]):
            for name, batches in splits:
                totals = [self.objective(self.model, batch) for batch in batches]
                for key in totals[0]:
                    total, count = (sum(each[key][part] for each in totals) for part in (0, 1))
                    found[f"{name}_{key}".lstrip("_")] = total / count
        return {name: float(value) for name, value in found.items()}


class _Distsurf(_Way):
    """distsurf itself."""

    def __init__(self, job: Job, placement: Placement, stack: contextlib.ExitStack):
        model, prepared = _prepared(job, placement)
        self._evaluator = stack.enter_context(
            evaluator_of(job, model, prepared, assemble.build_objective(job, None), placement)
        )
        recipe = agree_on_recipe(Ranks(), job, self._evaluator, None, False, lambda line: None)
        self._measured: Evaluator = self._evaluator
        if job.curvature is not None:
            self._measured = with_curvature(job.curvature, self._evaluator, prepared, job.evaluated_grid())
        tensors = [t for split in prepared.splits for piece in split.pieces for t in tensors_of(piece)]
        self.about = {
            "samples": sum(split.samples for split in prepared.splits),
            "data_bytes": sum(t.numel() * t.element_size() for t in tensors),
            "precision": job.run.precision,
            **recipe.told(),
        }

    def cost(self) -> Answer:
        return dict(self._evaluator.cost_per_sample(flop, traffic))

    def evaluate(self, point: list[float]) -> Answer:
        count = self._evaluator.points_per_pass
        values = self._measured(np.array([point] * count))[0]
        return {
            "points": count,
            "values": {c.name: float(v) for c, v in zip(self._measured.columns, values, strict=True)},
            "moving_s": self._evaluator.seconds_of_moving,
        }


_WAYS: dict[str, Callable[[Job, Placement, contextlib.ExitStack], _Way]] = {
    "textbook": _Textbook,
    "plain": _Plain,
    "distsurf": _Distsurf,
    "machine": _Machine,
}


def _prepared(job: Job, placement: Placement) -> tuple[nn.Module, Prepared]:
    model = assemble.build_model(job, None)
    objective = assemble.build_objective(job, None)
    return model, prepare(job, model, objective, None, placement, None, lambda line: None)


def _say(answer: Answer) -> None:
    print(f"{MARK}{json.dumps(answer)}", flush=True)


def _peak_bytes() -> int:
    """Most memory that this process ever had, on its GPU if it used one."""
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    # Not getrusage first: on Linux that begins with what the parent had at the fork.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(arguments: list[str]) -> int:
    """Run a contender."""
    way, path, threads, node_rank = arguments
    try:
        job = Job.load(Path(path))
        alone = Ranks()
        alone.node_rank = int(node_rank)  # which chooses its GPU
        placement = place(alone, job.run.device, int(threads))
        # The settings for malloc are part of what distsurf does; the others have a process as Python gives it.
        placement.apply() if way == "distsurf" else torch.set_num_threads(placement.threads)
        with contextlib.ExitStack() as stack:
            contender = _WAYS[way](job, placement, stack)
            _say(contender.about)
            for line in sys.stdin:
                question = json.loads(line)
                if question == COST:
                    _say(contender.cost())
                    continue
                start = time.perf_counter()
                answer = contender.evaluate(question)
                _say({"seconds": time.perf_counter() - start, "peak_bytes": _peak_bytes(), **answer})
    except DistsurfError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
