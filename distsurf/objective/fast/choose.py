"""Going through the steps of the fast path: each is tried, verified, timed, and used or dropped with the reason."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distsurf.errors import in_one_line
from distsurf.objective.fast.steps import STEPS, Circumstances
from distsurf.objective.fast.trace import NotApplicable, Refused
from distsurf.objective.fast.verify import Batches, Reading, disagreement, read, read_each
from distsurf.objective.network import Network, Running
from distsurf.objective.precision import PRECISIONS, Precision

ONLY_IF_FASTER = frozenset({"many"})
"""Steps that are timed, since no rule says on which networks they pay. The others know from the job whether they do,
so that the same job gives the same digits each time."""
Put = Callable[[Network, Precision], tuple[Running, Batches]]
"""Puts a network to work in a precision, and the sample with it."""


@dataclass
class Choice:
    """What `choose` found."""

    network: Network
    steps: tuple[str, ...]
    dropped: dict[str, str]
    chosen: list[Reading]
    exact: list[Reading] | None

    def errors(self) -> list[dict[str, Any]]:
        """At each sampled point the columns' values in float64 and as the job computes them."""
        if self.exact is None:
            return []
        return [
            {"at": list(mine.coordinates), "values": {n: [true.values[n], v] for n, v in mine.values.items()}}
            for mine, true in zip(self.chosen, self.exact, strict=True)
        ]


def choose(
    plain: Network,
    put: Put,
    at: Circumstances,
    points: NDArray[np.float64],
    flips: dict[str, float],
    seed: int,
    wanted: Collection[str] | None = None,
) -> Choice:
    """Try the steps in their order, each on top of those that were used before it.

    ``wanted`` names the steps to try, and these are used however fast they are; None tries all of them. In a reduced
    precision a step is verified in float32 too, where its logic shows, and the error of the precision itself is only
    measured. ``flips`` are those of `disagreement`.
    """
    precisions = [PRECISIONS["fp32"], at.precision] if at.precision.is_reduced else [at.precision]

    def tries(precision: Precision) -> list[Reading | BaseException]:
        running, batches = put(plain, precision)
        with running:
            return read_each(running, points, batches, seed)

    tried = [tries(precision) for precision in precisions]
    # A point that fails says nothing of the steps.
    passable = [i for i in range(len(points)) if all(isinstance(each[i], Reading) for each in tried)]
    expected = [[one for i in passable if isinstance(one := each[i], Reading)] for each in tried]
    points = points[passable]
    if not passable:
        first = next(error for each in tried for error in each if isinstance(error, BaseException))
        why = f"at the origin and at every corner of the grid the model raises {in_one_line(first)[:160]}"
        return Choice(plain, (), dict.fromkeys(wanted if wanted is not None else STEPS, why), [], None)

    def readings(network: Network, precision: Precision) -> list[Reading]:
        running, batches = put(network, precision)
        with running:
            return read(running, points, batches, seed)

    try:
        exact = readings(plain, PRECISIONS["fp64"])
    except Exception:  # a model that insists on float32 has no reference
        exact = None
    network, chosen = plain, expected[-1]
    steps: list[str] = []
    dropped: dict[str, str] = {}
    for name, step in STEPS.items():
        if wanted is not None and name not in wanted:
            continue
        try:
            candidate = step(network, at)
            for precision, theirs in zip(precisions, expected, strict=True):
                with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints what it then raises
                    mine = readings(candidate, precision)
                problem = disagreement(mine, theirs, exact, precision.compute, flips)
                if problem:
                    in_words = " in float32" if precision is not at.precision else ""
                    raise Refused(f"{problem}{in_words}")
            if name in ONLY_IF_FASTER and wanted is None:
                without, took = (_seconds(*put(each, at.precision)) for each in (network, candidate))
                if took > without:
                    raise Refused(f"{took / without:.2g} times slower here")
        except NotApplicable:
            if wanted is not None:
                dropped[name] = "there is nothing for it to do here"
            continue
        except Refused as refusal:
            dropped[name] = str(refusal)
            continue
        except Exception as error:  # whatever a library says of a model that it cannot take
            dropped[name] = in_one_line(error)[:160]
            continue
        network, chosen = candidate, mine
        steps.append(name)
    return Choice(network, tuple(steps), dropped, chosen, exact)


def _seconds(running: Running, batches: Batches) -> float:
    """The least of three passes over the sample, per point."""
    found = []
    with running, running.ready():
        running.move_to(np.zeros((1, running.network.subspace.dimension)))
        for _ in range(4):
            start = time.perf_counter()
            for _, batch in batches:
                running.totals(batch)
            if running.device.type == "cuda":
                torch.cuda.synchronize(running.device)
            found.append(time.perf_counter() - start)
    return min(found[1:]) / running.network.points_per_pass
