"""Singular value decomposition A = U Σ Vᵀ, by three routes with one result. Knows numpy only.

Signs are a convention: in every left singular vector (a column of U) the entry of largest magnitude is positive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distsurf.errors import InputError

Floats = NDArray[np.float64]
Route = Literal["gram", "lapack", "randomized"]
ROUTES: tuple[Route, ...] = ("gram", "lapack", "randomized")
FEW = 20
"""Components for which the quicker routes are worth their loss of accuracy."""
SMALL = 1000
"""Rows or columns up to which LAPACK takes seconds."""
LONG = 50
"""How many times longer than wide a matrix is for which its Gram matrix is the way."""
LOST = 1.5e-8
"""Singular values below so much of the largest are rounding in a Gram matrix: the root of float64's precision."""
BLOCK = 1 << 16
"""Columns that are taken to float64 at a time."""


@dataclass(frozen=True)
class SVD:
    """The ``k`` leading components of an ``(m, n)`` matrix."""

    u: Floats
    """Left singular vectors, columns: ``(m, k)``."""
    s: Floats
    """Singular values, descending: ``(k,)``."""
    vt: Floats
    """Right singular vectors, rows: ``(k, n)``. Where columns are shared among ranks, this rank's."""
    route: Route
    square: float
    """‖A‖²_F."""

    def reconstruct(self, rank: int) -> Floats:
        """The best approximation of this rank, ``(m, n)`` (Eckart and Young 1936)."""
        return (self.u[:, :rank] * self.s[:rank]) @ self.vt[:rank]

    def errors(self) -> Floats:
        """Relative Frobenius error √(Σ_{i>r} σ_i²) / ‖A‖ of the best approximation of rank r = 0, …, k, ``(k + 1,)``.

        Of a complete decomposition from the tail of σ itself; else ‖A‖² less what the components have, which cannot
        tell errors below 1e-8 from none.
        """
        if self.square == 0:
            return np.zeros(len(self.s) + 1)
        if len(self.s) == min(len(self.u), self.vt.shape[1]):
            tail = np.concatenate([np.cumsum((self.s**2)[::-1])[::-1], [0.0]])
        else:
            tail = np.maximum(self.square - np.concatenate([[0.0], np.cumsum(self.s**2)]), 0.0)
        return np.sqrt(tail / self.square)


def svd(
    matrix: NDArray[Any], components: int | None = None, route: Route | None = None, seed: int = 0
) -> SVD:
    """Decompose a matrix; all components, or the ``components`` leading ones.

    - ``lapack``: numpy's (gesdd). Every σ to about 1e-15 of the largest, vectors orthogonal to rounding. Time grows as
      m·n·min(m, n).
    - ``gram``: eigenvectors of AAᵀ or AᵀA, whichever is smaller, σ = √λ, the others by division by σ, and
      orthogonalized again. Squares the condition number: a σ is right to 1e-16·(σ₁/σ)² of itself, so what lies below
      1.5e-8·σ₁ is left out (numerically zero). For few components of a very long matrix.
    - ``randomized`` (Halko, Martinsson and Tropp 2011, by scikit-learn, from ``seed``): leading components where the
      spectrum decays; those near the end of what is asked for are the least accurate. For few components of a matrix
      that is large both ways.

    Left out, the route is ``lapack`` up to a thousand rows or columns or where more than twenty components are wanted,
    but ``gram`` for few components of a matrix fifty times longer than wide, and ``randomized`` for the rest. Raises
    InputError for what is no finite matrix, or a wrong number of components.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or not matrix.size or matrix.dtype.kind not in "fiub":
        raise InputError(f"a matrix of real numbers was expected, {matrix.dtype} {matrix.shape} was given")
    if not np.isfinite(matrix).all():
        raise InputError(f"{np.count_nonzero(~np.isfinite(matrix)):,} entries of the matrix are not finite")
    least, most = sorted(matrix.shape)
    count = least if components is None else components
    if not 1 <= count <= least:
        raise InputError(f"{count} components: expected 1 to {least}")
    if route is None:
        is_long = count <= FEW and most > LONG * least
        route = "gram" if is_long else "lapack" if least <= SMALL or count > FEW else "randomized"
    if route == "gram":
        if matrix.shape[0] <= matrix.shape[1]:
            return gram(matrix, count)
        turned = gram(matrix.T, count)
        return _signed(turned.vt.T, turned.s, turned.u.T, "gram", turned.square)
    exact = matrix.astype(np.float64)
    square = float(np.square(exact).sum())
    if route == "lapack":
        u, s, vt = np.linalg.svd(exact, full_matrices=False)
        return _signed(u[:, :count], s[:count], vt[:count], "lapack", square)
    from sklearn.utils.extmath import randomized_svd

    u, s, vt = randomized_svd(exact, count, n_oversamples=20, n_iter=7, random_state=seed)
    return _signed(u, s, vt, "randomized", square)


def gram(rows: NDArray[Any], components: int, total: Callable[[Floats], Floats] = lambda part: part) -> SVD:
    """The ``gram`` route for a matrix with more columns than rows, whose columns may be shared among ranks.

    ``rows`` ``(m, n)`` are this rank's columns, of any floating type; products are summed in float64. ``total`` adds
    arrays of all ranks up: it is called twice, with ``(m, m)`` and ``(k, k)`` numbers. U and Σ are the same on every
    rank; of Vᵀ each has its columns. Fewer components come back where the rest is numerically zero.
    """
    blocks = [rows[:, start : start + BLOCK] for start in range(0, rows.shape[1], BLOCK)]
    product = np.zeros((len(rows), len(rows)))
    for block in blocks:
        exact = block.astype(np.float64)
        product += exact @ exact.T
    product = total(product)
    squares, vectors = np.linalg.eigh(product)
    order = np.argsort(squares)[::-1][:components]
    s = np.sqrt(np.maximum(squares[order], 0.0))
    s = s[s > LOST * s[0]] if s[0] > 0 else s[:0]
    u = vectors[:, order[: len(s)]]
    vt = np.concatenate([u.T @ block.astype(np.float64) for block in blocks], axis=1) / s[:, None]
    # Small components lose their right angles by the division. Cholesky's factor is Gram–Schmidt in their order.
    lower = np.linalg.cholesky(total(vt @ vt.T)) if len(s) else np.zeros((0, 0))
    vt = np.linalg.solve(lower, vt)
    return _signed(u, s, vt, "gram", float(np.trace(product)))


def _signed(u: Floats, s: Floats, vt: Floats, route: Route, square: float) -> SVD:
    largest = np.abs(u).argmax(axis=0)
    signs = np.where(u[largest, np.arange(len(s))] < 0, -1.0, 1.0)
    return SVD(u * signs, s, vt * signs[:, None], route, square)
