"""Curvature of the loss at grid points: the ends of its Hessian's spectrum, its trace, the gradient, the plane's own.

The Hessian is that of the mean of the objective's first column over one split, or over a fixed part of it, with respect
to the parameters, in strict float32 (float64 in an fp64 job); batch norm is in evaluation mode.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distsurf.errors import InputError
from distsurf.evaluator import Column, Stopped
from distsurf.objective.data import Split, map_tree, tensors_of
from distsurf.objective.derivatives import Derivatives
from distsurf.objective.evaluator import ModelEvaluator
from distsurf.objective.lanczos import Density, Ends, Estimate, density, extremes, trace
from distsurf.subspace.weights import Subspace

Floats = NDArray[np.float64]
Measure = Literal["eigenvalues", "trace", "gradient", "plane"]
CONVERGED = "lambda_converged"
"""Column of the flag: 1 where both ends were found to the tolerance, 0 where the budget ended before."""
CLOSE = 0.05
"""How far a product may be off from a difference of gradients."""
VERIFIED = 32
"""Samples on which that is looked at."""


@dataclass(frozen=True)
class Wish:
    """What to measure, and how closely."""

    measures: Sequence[Measure] = ("eigenvalues",)
    parameters: Literal["all", "weights"] = "all"
    """``weights``: tensors of dimension > 1 only."""
    samples: int = 0
    """A fixed part of the split, spread over all of it; 0 is all."""
    tolerance: float = 1e-3
    products: int = 100
    """Hessian-vector products for the two ends, at most."""
    probes: int = 10
    """Random vectors for the trace."""
    batch_size: int = 256


class Curvature:
    """Derivatives of a model's loss where it stands, in a ``with`` block that borrows it from its evaluator.

    Random vectors are the same at every point: a value depends on the point alone.
    """

    def __init__(self, evaluator: ModelEvaluator, split: Split, wish: Wish, subspace: Subspace):
        self._evaluator, self._wish, self.subspace = evaluator, wish, subspace
        layout = subspace.layout
        parameters = evaluator.parameters
        names = [
            name for name in layout.names
            if name in parameters and (wish.parameters == "all" or len(parameters[name]) > 1)
        ]  # fmt: skip
        if not names:
            raise InputError("curvature.parameters = 'weights': no parameter has more than one dimension")
        self._names = names
        self._split = split
        self.dimension = sum(math.prod(parameters[name]) for name in names)
        """Number of parameters that the Hessian is taken of."""
        self._stack = ExitStack()

    def __enter__(self) -> Curvature:
        self._begin(None, self._wish.samples)
        return self

    def _begin(self, precision: str | None, samples: int) -> None:
        with ExitStack() as stack:
            self._running, feed = self._evaluator.beside(self._split, precision)
            stack.enter_context(self._running)
            stack.enter_context(self._running.ready())
            size, stop, dtype = self._wish.batch_size, self._evaluator.stop, self._running.precision.sums
            is_part = 0 < samples < feed.samples
            if is_part and not feed.is_whole:
                raise InputError("curvature.samples needs data that is tensors, not batches")
            part = feed.sample(samples, dtype) if is_part or precision is not None else None

            def batches() -> Iterator[Any]:
                for batch in feed.batches(size) if part is None else _cut(part, size):
                    if stop():
                        raise Stopped
                    yield batch

            layout = self.subspace.layout
            self._derivatives = Derivatives(
                self._running.model,
                self._evaluator.objective,
                batches,
                layout,
                self._names,
                seed=self._evaluator.seed,
            )
            self._dtype, self._device = dtype, self._running.device
            mask = torch.zeros(layout.size, dtype=dtype)
            views = dict(zip(layout.names, layout.torch_views(mask), strict=True))
            for name in self._names:
                views[name].fill_(1)
            self._mask = mask.to(self._device)
            self._stack = stack.pop_all()

    def verify(self) -> None:
        """Compare a product with the difference of two gradients, at the origin, on a few samples.

        Some functions are not differentiable twice without torch noticing, and give wrong numbers. Raises InputError.
        """
        try:
            error = self._error_of_product("fp64", 1e-6)
        except InputError:
            raise
        except Exception:  # a model that insists on float32
            error = self._error_of_product("fp32", 1e-3)
        if error > CLOSE:
            raise InputError(self._derivatives.not_twice(f"a product is off by {error:.0%} from differences"))

    def _error_of_product(self, precision: str, step: float) -> float:
        """Relative to the larger of the two."""
        origin = np.zeros(self.subspace.dimension)
        self._begin(precision, VERIFIED)
        try:
            self.move_to(origin)
            along = self.normal(0)
            along /= torch.linalg.vector_norm(along)
            weights = torch.from_numpy(self.subspace.center).to(self._device, self._dtype)
            by = step * max(float(torch.linalg.vector_norm(weights)), 1.0)
            product = self.product(along)
            sides = [self.gradient_at(sign * by * along)[1] for sign in (1, -1)]
            difference = (sides[0] - sides[1]) / (2 * by)
            size = max(float(torch.linalg.vector_norm(v)) for v in (difference, product))
            rounding = float(torch.linalg.vector_norm(sides[0])) * torch.finfo(self._dtype).eps / by
            off = float(torch.linalg.vector_norm(difference - product))
            return off / size if off > 100 * rounding and size > 0 else 0.0
        finally:
            self.__exit__(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._derivatives.forget()
        self._stack.close()

    def move_to(self, point: Floats) -> None:
        """Set the weights to a grid point ``(D,)``."""
        self._derivatives.forget()
        self._running.move_to(point[None])
        self._point = point.tolist()

    def normal(self, number: int) -> Tensor:
        """The ``number``-th random Gaussian vector, the same on every machine; zero in what is not a parameter."""
        stream = np.random.RandomState(np.random.Philox(np.random.SeedSequence(0, spawn_key=(number,))))
        numbers = torch.from_numpy(stream.standard_normal(len(self._mask)))
        return numbers.to(self._device, self._dtype) * self._mask

    def product(self, vector: Tensor) -> Tensor:
        """The Hessian times a vector."""
        return self._derivatives.product(vector)

    def gradient(self) -> Tensor:
        """The gradient, float64."""
        return self._derivatives.gradient()[1]

    def loss(self) -> float:
        """The loss."""
        return self._derivatives.loss()

    def loss_at(self, shift: Tensor) -> float:
        """The loss with a vector added to the weights, which are then as they were."""
        try:
            self._shift(shift)
            return self._derivatives.loss()
        finally:
            self.move_to(np.array(self._point))

    def gradient_at(self, shift: Tensor) -> tuple[float, Tensor]:
        """The loss and the gradient there."""
        try:
            self._shift(shift)
            return self._derivatives.gradient()
        finally:
            self.move_to(np.array(self._point))

    def _shift(self, vector: Tensor) -> None:
        self._derivatives.forget()
        self._running.shift(vector.to(self._dtype), 1.0)

    @property
    def weights(self) -> Tensor:
        """The parameters that the Hessian is taken of, as a flat vector, at the origin; zero elsewhere."""
        return torch.from_numpy(self.subspace.center).to(self._device, torch.float64) * self._mask

    @property
    def mask(self) -> Tensor:
        """1 for every parameter that the Hessian is taken of, 0 elsewhere."""
        return self._mask

    def ends(self, count: int = 1, *, want_vectors: bool = False) -> Ends:
        """The ends of the spectrum."""
        return extremes(
            self.product,
            self.normal(0),
            dimension=self.dimension,
            tolerance=self._wish.tolerance,
            budget=self._wish.products,
            count=count,
            dtype=self._dtype,
            want_vectors=want_vectors,
        )

    def trace(self, ends: Ends | None = None) -> Estimate:
        """The trace, with its standard error; closer where eigenvectors are known, which this is then exact along."""
        probes = [self.normal(1 + k).sign() for k in range(self._wish.probes)]
        if ends is None or ends.low_vectors is None or ends.high_vectors is None:
            return trace(self.product, probes)
        known = torch.cat([ends.high_vectors, ends.low_vectors])
        return trace(self.product, probes, known, float(ends.high.sum() + ends.low.sum()))

    def density(self, probes: int, steps: int) -> Density:
        """The spectral density, from so many random vectors and products for each."""
        return density(self.product, [self.normal(1 + k) for k in range(probes)], steps, self._dtype)

    def in_plane(self) -> Floats:
        """The Hessian of the surface itself here, ``(D, D)``: d_iᵀ H d_j, exact up to rounding."""
        numbers = [number for number, _ in self.subspace.terms(self._point)]
        directions = [torch.from_numpy(self.subspace.directions[n]).to(self._device) for n in numbers]
        images = [self.product(direction) for direction in directions]
        found = [[float(d.double() @ image) for image in images] for d in directions]
        return (np.array(found) + np.array(found).T) / 2


def _cut(batch: Any, size: int) -> Iterator[Any]:
    for start in range(0, len(tensors_of(batch)[0]), size):
        yield map_tree(operator.itemgetter(slice(start, start + size)), batch)


class CurvatureEvaluator:
    """An evaluator that adds columns of curvature to those of another one; use in a ``with`` block.

    ``lambda_min``, ``lambda_max``, their ``lambda_ratio`` |λmin/λmax|, the norms of their residuals,
    ``lambda_products`` and ``lambda_converged``; ``trace`` and ``trace_error``; ``gradient_norm``; ``curvature_xx``,
    ``curvature_xy`` … of the surface itself.
    """

    def __init__(
        self, evaluator: ModelEvaluator, split: Split, wish: Wish, subspace: Subspace, axes: Sequence[str]
    ):
        self._evaluator = evaluator
        self._curvature = Curvature(evaluator, split, wish, subspace)
        self._wish, self._axes = wish, axes
        if taken := {column.name for column in evaluator.columns} & set(self._names()):
            raise InputError(f"the objective and [curvature] both have a column {', '.join(sorted(taken))}")

    def verify(self) -> None:
        """Raise InputError where the model's second derivatives cannot be had, or are wrong."""
        if set(self._wish.measures) != {"gradient"}:
            self._curvature.verify()

    @property
    def columns(self) -> tuple[Column, ...]:
        """Those of the other evaluator, then those of curvature."""
        return (*self._evaluator.columns, *(Column(name) for name in self._names()))

    @property
    def points_per_pass(self) -> int:
        """That of the other evaluator."""
        return self._evaluator.points_per_pass

    def _names(self) -> list[str]:
        return [name for measure in self._wish.measures for name in names_of(measure, self._axes)]

    def __call__(self, coordinates: Floats) -> Floats:
        """Values ``(P, C)`` at coordinates ``(P, D)``."""
        values = self._evaluator(coordinates)
        with self._curvature as curvature:
            rows = []
            for point in coordinates:
                curvature.move_to(point)
                told = self._measured(curvature)
                rows.append([told[name] for name in self._names()])
        return np.concatenate([values, np.array(rows, np.float64).reshape(len(values), -1)], axis=1)

    def _measured(self, curvature: Curvature) -> Mapping[str, float]:
        told: dict[str, float] = {}
        if "gradient" in self._wish.measures:
            told["gradient_norm"] = float(torch.linalg.vector_norm(curvature.gradient()))
        if "eigenvalues" in self._wish.measures:
            ends = curvature.ends()
            low, high = float(ends.low[0]), float(ends.high[0])
            told |= {
                "lambda_min": low,
                "lambda_max": high,
                "lambda_ratio": abs(low / high) if high else math.nan,
                "lambda_min_residual": float(ends.low_residuals[0]),
                "lambda_max_residual": float(ends.high_residuals[0]),
                "lambda_products": ends.products,
                CONVERGED: float(ends.converged),
            }
        if "trace" in self._wish.measures:
            found = curvature.trace()
            told |= {"trace": found.value, "trace_error": found.error}
        if "plane" in self._wish.measures:
            matrix = curvature.in_plane()
            names = names_of("plane", self._axes)
            told |= dict(zip(names, matrix[np.triu_indices(len(self._axes))].tolist(), strict=True))
        return told


def names_of(measure: Measure, axes: Sequence[str]) -> list[str]:
    """The columns of a measure on a surface with these axes."""
    return {
        "eigenvalues": [
            "lambda_min", "lambda_max", "lambda_ratio", "lambda_min_residual", "lambda_max_residual",
            "lambda_products", CONVERGED,
        ],
        "trace": ["trace", "trace_error"],
        "gradient": ["gradient_norm"],
        "plane": [f"curvature_{a}{b}" for i, a in enumerate(axes) for b in axes[i:]],
    }[measure]  # fmt: skip
