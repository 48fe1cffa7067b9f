"""What a network gives at points of this very job, and whether two networks agree there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsurf.grid import Grid
from distsurf.objective.network import Running

ERRORS, MOST_ERRORS = 4.0, 100.0
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""By how much of the largest output at a point a step may change any output, if the plain module's own error against
float64 is not larger still: then by `ERRORS` times that, and `MOST_ERRORS` times the tolerance at most (a module may
have a reduced precision of its own, which is not to be lost). A few times the type's rounding over a deep network.

The objective's values have to agree as outputs have to where outputs could not be compared, and else to `MOST_ERRORS`
times that: a small loss is the difference of large outputs."""
FLIPS = 2
"""Samples that may change side of a decision (columns in percent), where outputs are close enough."""

Batches = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Reading:
    """Outputs of the model (one tensor after the other, float64) and values of the columns at one point."""

    coordinates: tuple[float, ...]
    outputs: tuple[NDArray[np.float64], ...]
    values: dict[str, float]


def sampled_points(grid: Grid) -> NDArray[np.float64]:
    """Where a job is verified: ``(1 + 2^D, D)``, the origin (the model itself) and the corners of its grid."""
    ends = [sorted({axis.low, axis.high}) for axis in grid.axes]
    corners = [corner for corner in product(*ends) if any(corner)]
    return np.array([(0.0,) * len(ends), *corners])


def read(running: Running, points: NDArray[np.float64], batches: Batches, seed: int) -> list[Reading]:
    """What a network gives at points ``(P, D)`` on a few batches, each with the name of its split."""
    readings = []
    per_pass = running.network.points_per_pass
    with running.ready(), _outputs_of(running) as outputs:
        for start in range(0, len(points), per_pass):
            group = points[start : start + per_pass]
            outputs.clear()
            running.move_to(group)
            torch.manual_seed(seed)
            sums: dict[str, list[NDArray[np.float64]]] = {}
            for split, batch in batches:
                for name, totals in running.totals(batch).items():
                    column = sums.setdefault(f"{split}_{name}" if split else name, [np.zeros(1), np.zeros(1)])
                    column[:] = [sum_ + _numpy(part) for sum_, part in zip(column, totals, strict=True)]
            with np.errstate(all="ignore"):
                found = {name: total / count for name, (total, count) in sums.items()}
            readings += [
                Reading(
                    tuple(point.tolist()),
                    tuple(map(_numpy, outputs)),
                    {name: float(values[k]) for name, values in found.items()},
                )
                for k, point in enumerate(group)
            ]
    return readings


def read_each(
    running: Running, points: NDArray[np.float64], batches: Batches, seed: int
) -> list[Reading | BaseException]:
    """The same point by point: the error at a point that fails."""
    found: list[Reading | BaseException] = []
    for point in points:
        try:
            found += read(running, point[None], batches, seed)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found.append(error)
    return found


def disagreement(
    given: Sequence[Reading],
    plain: Sequence[Reading],
    exact: Sequence[Reading] | None,
    dtype: torch.dtype,
    flips: Mapping[str, float],
) -> str:
    """In a few words where and by how much a network differs from the plain one; empty if it does not.

    ``exact`` are the plain module's readings in float64, by which its own errors in ``dtype`` are known. ``flips``: by
    how much columns may differ, since a few of the samples may change side of a decision.
    """
    for i, (mine, theirs) in enumerate(zip(given, plain, strict=True)):
        truth = theirs if exact is None else exact[i]
        compared = len(mine.outputs) == len(theirs.outputs) > 0
        if compared:
            for a, b, c in zip(mine.outputs, theirs.outputs, truth.outputs, strict=True):
                error = _relative(a, b, b, c)
                own = min(ERRORS * _relative(b, c, b, c), MOST_ERRORS * TOLERANCE[dtype])
                allowed = max(TOLERANCE[dtype], own)
                if not error <= allowed:
                    return (
                        f"outputs differ by {error:.2g} of their size {_at(mine)}, {allowed:.2g} is allowed"
                    )
        for name, value in mine.values.items():
            expected, true = theirs.values[name], truth.values[name]
            if math.isfinite(value) and math.isfinite(expected):
                relative = TOLERANCE[dtype] * (MOST_ERRORS if compared else 1.0)
                allowed = max(relative * abs(expected), ERRORS * abs(expected - true), flips.get(name, 0.0))
                if abs(value - expected) <= allowed or not math.isfinite(allowed):
                    continue
            elif repr(value) == repr(expected):
                continue
            return f"{name} is {value:.7g} {_at(mine)} and not {expected:.7g}"
    return ""


def _relative(
    a: NDArray[np.float64], b: NDArray[np.float64], plain: NDArray[np.float64], truth: NDArray[np.float64]
) -> float:
    """Largest difference of ``a`` and ``b`` where plain and true outputs are finite, by the largest true output."""
    if a.shape != plain.shape or not (a is plain or np.array_equal(np.isfinite(a), np.isfinite(plain))):
        return math.inf
    finite = np.isfinite(plain) & np.isfinite(truth)
    if not finite.any():
        return 0.0
    largest = float(np.abs(truth[finite]).max())
    difference = float(np.abs(a[finite] - b[finite]).max())
    return difference / largest if largest > 0 else difference


def _at(reading: Reading) -> str:
    return f"at ({', '.join(f'{c:g}' for c in reading.coordinates)})"


@contextmanager
def _outputs_of(running: Running) -> Iterator[list[Tensor]]:
    """Everything floating that the model returns meanwhile; nothing where its passes are not calls of a module.

    Modules of torch.jit take no hooks.
    """
    outputs: list[Tensor] = []
    is_scripted = isinstance(running.model, torch.jit.ScriptModule)
    if is_scripted or running.network.points_per_pass > 1 or running.network.is_captured:
        yield outputs
        return

    def keep(module: Any, arguments: Any, output: Any) -> None:
        leaves = torch.utils._pytree.tree_leaves(output)
        outputs.extend(
            leaf.clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()
        )

    handle = running.model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def _numpy(value: Any) -> NDArray[np.float64]:
    if isinstance(value, Tensor):
        return np.asarray(value.detach().cpu().double().numpy())
    return np.asarray(value, np.float64)
