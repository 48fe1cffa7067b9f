"""Lanczos' method for a symmetric matrix that is known by its products with vectors only.

Own code rather than ARPACK's (scipy's ``eigsh``), which looks for convergence only when its basis is full and begins
again with it: for both ends of the spectrum of a ResNet-20 on digits it took 54 products (41 with a basis of 40)
where this takes 27, and its vectors would have to leave the GPU for every one (`python -m tests.bench_curvature`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""A matrix as what it makes of a vector ``(n,)``."""
Floats = NDArray[np.float64]

BASIS_BYTES = 4 << 30
LEAST_BASIS = 24
"""Vectors of a Krylov space that are kept at least, and the memory that they may take; then the method is restarted."""
FLOOR = 1e-3
"""Share of the largest |λ| below which an eigenvalue need not be known more closely than the tolerance says of that."""
EXHAUSTED = 1e-6
"""Share of the largest |λ| that a next vector's norm has to exceed, or the space is all that there is."""


class Krylov:
    """A growing orthonormal basis ``q_0, q_1, …`` and the matrix projected on it, fully reorthogonalized."""

    def __init__(self, product: Product, start: Tensor, dtype: torch.dtype, most: int):
        self._product, self._dtype = product, dtype
        self._basis = torch.empty((most + 1, len(start)), dtype=dtype, device=start.device)
        self._basis[0] = start / torch.linalg.vector_norm(start)
        self.size = 0
        """Vectors whose product is known."""
        self.products = 0
        self.matrix = np.zeros((most + 1, most + 1))
        self.norm = 0.0
        """‖H q − its projection‖ of the last vector."""

    @property
    def is_full(self) -> bool:
        """Whether the next step needs a restart before it."""
        return self.size + 1 >= len(self._basis)

    def step(self) -> None:
        """Multiply the latest vector and make the next one of it."""
        k = self.size
        image = self._product(self._basis[k]).to(self._dtype)
        self.products += 1
        known = self._basis[: k + 1]
        inside = known @ image
        image -= known.T @ inside
        again = known @ image  # twice is enough (Kahan)
        image -= known.T @ again
        column = (inside + again).double().cpu().numpy()
        self.matrix[: k + 1, k] = self.matrix[k, : k + 1] = column
        self.norm = float(torch.linalg.vector_norm(image.double()))
        self._basis[k + 1] = image / self.norm if self.norm > 0 else 0.0
        self.matrix[k + 1, k] = self.matrix[k, k + 1] = self.norm
        self.size = k + 1

    def ritz(self) -> tuple[Floats, Floats, Floats]:
        """Values, ascending, vectors ``(size, size)`` in the basis, and the norms of their residuals."""
        # Not numpy's, whose BLAS has threads of its own: on two cores they took four times the time from torch's.
        matrix = self.matrix[: self.size, : self.size]
        if not np.isfinite(matrix).all():
            return np.full(self.size, math.nan), np.full(matrix.shape, math.nan), np.full(self.size, math.nan)
        values, vectors = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(matrix.copy())))
        return values, vectors, np.abs(self.norm * vectors[-1])

    def vectors(self, coefficients: Floats) -> Tensor:
        """Vectors ``(m, n)`` from their coefficients ``(size, m)`` in the basis."""
        given = torch.from_numpy(coefficients.T.copy()).to(self._basis)
        return given @ self._basis[: self.size]

    def restart(self, keep: Floats, values: Floats) -> None:
        """Go on with these Ritz vectors ``(size, m)`` alone, and the vector that was to be next (thick restart)."""
        count = keep.shape[1]
        coupling = self.norm * keep[-1]
        following = self._basis[self.size].clone()
        self._basis[:count] = self.vectors(keep)
        self._basis[count] = following
        self.matrix[:] = 0.0
        self.matrix[np.arange(count), np.arange(count)] = values
        self.matrix[:count, count] = self.matrix[count, :count] = coupling
        self.size = count


@dataclass(frozen=True)
class Ends:
    """The two ends of a spectrum."""

    low: Floats
    """The lowest eigenvalues, ascending, ``(k,)``."""
    high: Floats
    """The highest, descending, ``(k,)``."""
    low_residuals: Floats
    """‖Hv − λv‖ of each."""
    high_residuals: Floats
    products: int
    converged: bool
    low_vectors: Tensor | None = None
    """Eigenvectors ``(k, n)``."""
    high_vectors: Tensor | None = None


def extremes(
    product: Product,
    start: Tensor,
    *,
    dimension: int,
    tolerance: float = 1e-3,
    budget: int = 100,
    count: int = 1,
    dtype: torch.dtype = torch.float64,
    want_vectors: bool = False,
) -> Ends:
    """The ``count`` lowest and highest eigenvalues of a symmetric matrix, from one Krylov space.

    ``start``: a random vector ``(n,)``; ``dimension``: how many of its entries are not padding. An eigenvalue counts as
    found when its error, ‖r‖²/gap (Kato and Temple, with the gap to the nearest other Ritz value) or ‖r‖ where that is
    less, is at most ``tolerance`` times its size, or times `FLOOR` of the largest size. After ``budget`` products the
    best that is known is returned, as not ``converged``.
    """
    size = len(start) * torch.empty((), dtype=dtype).element_size()
    most = min(budget, dimension, max(LEAST_BASIS + 4 * count, BASIS_BYTES // size))
    krylov = Krylov(product, start, dtype, most)
    while True:
        krylov.step()
        values, vectors, residuals = krylov.ritz()
        if not np.isfinite(values).all():
            break
        radius = float(np.abs(values).max())
        if krylov.norm <= EXHAUSTED * radius or krylov.size >= dimension:
            # The space holds no more: what the start vector has a part of is known.
            return _ends(krylov, count, converged=True, want_vectors=want_vectors)
        if krylov.size > 2 * count:
            errors = _errors(values, residuals)
            chosen = np.r_[np.arange(count), np.arange(-count, 0)]
            allowed = tolerance * np.maximum(np.abs(values), FLOOR * radius)
            if (errors[chosen] <= allowed[chosen]).all():
                return _ends(krylov, count, converged=True, want_vectors=want_vectors)
        if krylov.products >= budget:
            break
        if krylov.is_full:
            kept = max(4, 2 * count)
            ends = np.r_[np.arange(kept), np.arange(-kept, 0)]
            krylov.restart(vectors[:, ends], values[ends])
    return _ends(krylov, count, converged=False, want_vectors=want_vectors)


def _errors(values: Floats, residuals: Floats) -> Floats:
    """How far Ritz values are from eigenvalues, at most."""
    gaps = np.diff(values)
    nearest = np.minimum(np.r_[np.inf, gaps], np.r_[gaps, np.inf])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(residuals < nearest, residuals * (residuals / nearest), residuals))


def _ends(krylov: Krylov, count: int, *, converged: bool, want_vectors: bool) -> Ends:
    values, vectors, residuals = krylov.ritz()
    low, high = slice(0, count), slice(-1, -count - 1, -1)
    return Ends(
        values[low],
        values[high],
        residuals[low],
        residuals[high],
        krylov.products,
        converged,
        krylov.vectors(vectors[:, low]) if want_vectors else None,
        krylov.vectors(vectors[:, high]) if want_vectors else None,
    )


@dataclass(frozen=True)
class Estimate:
    """A mean over random draws, and how far it may be off."""

    value: float
    error: float
    """Standard error of the mean."""

    @classmethod
    def of(cls, draws: list[float]) -> Estimate:
        """That of these draws."""
        spread = float(np.std(draws, ddof=1)) if len(draws) > 1 else math.nan
        return cls(float(np.mean(draws)), spread / math.sqrt(len(draws)))


def trace(
    product: Product, probes: list[Tensor], basis: Tensor | None = None, known: float = 0.0
) -> Estimate:
    """The trace of a symmetric matrix from random vectors of ±1 (Hutchinson 1989).

    With an orthonormal ``basis`` ``(m, n)``, which must not depend on the probes, the trace on its span is ``known``,
    and only that of the rest is estimated (Hutch++, Meyer et al. 2021). Takes one product for each probe.
    """
    found = []
    for probe in probes:
        rest = probe if basis is None else probe - basis.T @ (basis @ probe)
        found.append(known + float(rest.double() @ product(rest).double()))
    return Estimate.of(found)


@dataclass(frozen=True)
class Density:
    """A spectrum as weighted points: the density is Σ w δ(λ − node)."""

    nodes: Floats
    """Ritz values of all probes."""
    weights: Floats
    """Sum 1."""

    def moment(self, power: int) -> float:
        """Mean of λ^power over the spectrum."""
        return float(self.weights @ self.nodes**power)

    def smoothed(self, at: Floats, width: float) -> Floats:
        """The density as a sum of Gaussians of this standard deviation, at values ``(m,)``."""
        bells = np.exp(-0.5 * ((at[:, None] - self.nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
        return np.asarray(bells @ self.weights)


def density(
    product: Product, probes: list[Tensor], steps: int, dtype: torch.dtype = torch.float64
) -> Density:
    """The spectral density of a symmetric matrix by stochastic Lanczos quadrature (Ghorbani et al. 2019).

    Takes ``steps`` products for each probe, a random vector.
    """
    nodes, weights = [], []
    for probe in probes:
        krylov = Krylov(product, probe, dtype, steps)
        for _ in range(steps):
            krylov.step()
            radius = float(np.abs(krylov.matrix[: krylov.size, : krylov.size]).max())
            if krylov.norm <= EXHAUSTED * radius:
                break
        values, vectors, _ = krylov.ritz()
        nodes.append(values)
        weights.append(np.square(vectors[0]) / len(probes))
    return Density(np.concatenate(nodes), np.concatenate(weights))
