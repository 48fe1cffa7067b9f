"""Ends of spectra, traces and densities of matrices whose spectrum is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from distsurf.objective import lanczos
from distsurf.objective.lanczos import density, extremes, trace


def matrix_of(eigenvalues: list[float] | np.ndarray, seed: int = 0) -> Tensor:
    """A symmetric matrix with this spectrum, in a random basis."""
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double())[
        0
    ]
    return basis @ torch.diag(torch.tensor(np.asarray(eigenvalues, float))) @ basis.T


def normal(size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()


def trained(size: int = 400) -> np.ndarray:
    """What Hessians look like: a bulk about zero, a few large eigenvalues, a short negative side."""
    bulk = np.random.default_rng(0).standard_normal(size - 5) * 0.02
    return np.r_[bulk, 12, 7, 3, 1, -0.13]


@pytest.mark.parametrize(
    "spectrum",
    [[5, 4, 3, 2, 1], [-1, -2, -3, -5], [3, 1, 0.5, -3], [2], [0, 0, 0, 1], [1, 1, 1], [0, 0], trained()],
    ids=lambda spectrum: str(list(spectrum[:5])),
)
def test_ends_of_known_spectra(spectrum: list[float]) -> None:
    matrix = matrix_of(spectrum)
    found = extremes(
        lambda v: matrix @ v, normal(len(spectrum)), dimension=len(spectrum), tolerance=1e-8, budget=200
    )
    assert found.converged
    np.testing.assert_allclose(found.low, [min(spectrum)], rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(found.high, [max(spectrum)], rtol=1e-8, atol=1e-11)


def test_several_ends_and_their_vectors() -> None:
    spectrum = trained()
    matrix = matrix_of(spectrum)
    found = extremes(
        lambda v: matrix @ v,
        normal(len(spectrum)),
        dimension=len(spectrum),
        count=3,
        tolerance=1e-6,
        budget=300,
        want_vectors=True,
    )
    np.testing.assert_allclose(found.high, [12, 7, 3], rtol=1e-6)
    np.testing.assert_allclose(found.low, np.sort(spectrum)[:3], rtol=1e-5)
    for values, vectors, residuals in (
        (found.low, found.low_vectors, found.low_residuals),
        (found.high, found.high_vectors, found.high_residuals),
    ):
        assert vectors is not None
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-10)
        for value, vector, residual in zip(values, vectors, residuals, strict=True):
            true = float(torch.linalg.vector_norm(matrix @ vector - value * vector))
            assert true == pytest.approx(residual, rel=1e-3, abs=1e-10)


def test_a_basis_that_does_not_fit_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanczos, "BASIS_BYTES", 1)
    monkeypatch.setattr(lanczos, "LEAST_BASIS", 8)
    spectrum = trained()
    matrix = matrix_of(spectrum)
    found = extremes(
        lambda v: matrix @ v, normal(len(spectrum)), dimension=len(spectrum), tolerance=1e-8, budget=400
    )
    assert found.converged
    assert found.products > 12  # that fit
    np.testing.assert_allclose([found.low[0], found.high[0]], [-0.13, 12], rtol=1e-7)


def test_a_budget_that_ends_is_told() -> None:
    matrix = matrix_of(trained())
    found = extremes(lambda v: matrix @ v, normal(400), dimension=400, budget=6)
    assert (found.converged, found.products) == (False, 6)
    assert found.high[0] == pytest.approx(12, rel=0.01)
    assert found.low_residuals[0] > 0.01


def test_a_matrix_that_is_not_finite_is_told() -> None:
    found = extremes(lambda v: v * float("nan"), normal(9), dimension=9)
    assert not found.converged
    assert np.isnan(found.low).all()


def test_both_ends_in_fewer_products_than_arpack_needs_for_the_low_one() -> None:
    """And to the error that was asked for."""
    matrix = matrix_of(trained(2000))
    found = extremes(lambda v: matrix @ v, normal(2000), dimension=2000, tolerance=1e-3, budget=500)
    assert abs(found.low[0] + 0.13) <= 1e-3 * 0.13
    assert abs(found.high[0] - 12) <= 1e-3 * 12
    products = 0

    def product(vector: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return np.asarray(matrix @ torch.from_numpy(vector.ravel()))

    operator = LinearOperator((2000, 2000), matvec=product, dtype=float)
    (low,) = eigsh(operator, k=1, which="SA", tol=1e-3, v0=normal(2000).numpy(), return_eigenvectors=False)
    assert low == pytest.approx(-0.13, rel=1e-3)
    assert found.products <= products


def test_traces_and_their_errors() -> None:
    spectrum = trained()
    matrix = matrix_of(spectrum)
    probes = [normal(400, seed).sign() for seed in range(60)]
    plain = trace(lambda v: matrix @ v, probes)
    assert abs(plain.value - spectrum.sum()) < 4 * plain.error
    top = extremes(lambda v: matrix @ v, normal(400), dimension=400, count=4, want_vectors=True, budget=200)
    with_basis = trace(lambda v: matrix @ v, probes, top.high_vectors, float(top.high.sum()))
    assert abs(with_basis.value - spectrum.sum()) < 4 * with_basis.error
    assert with_basis.error < plain.error / 4


def test_moments_of_the_density() -> None:
    spectrum = trained()
    matrix = matrix_of(spectrum)
    probes = [normal(400, seed) for seed in range(40)]
    found = density(lambda v: matrix @ v, probes, 30)
    assert found.weights.sum() == pytest.approx(1)
    for power in (1, 2, 4):
        samples = [float(p @ torch.linalg.matrix_power(matrix, power) @ p / (p @ p)) for p in probes]
        assert found.moment(power) == pytest.approx(np.mean(samples), rel=1e-6)  # exact for each probe
        assert abs(found.moment(power) - (spectrum**power).mean()) < 4 * np.std(samples) / np.sqrt(40)
    at = np.linspace(-2, 14, 4001)
    assert np.trapezoid(found.smoothed(at, 0.1), at) == pytest.approx(1, abs=1e-6)


def test_a_density_of_few_eigenvalues_is_exact() -> None:
    matrix = matrix_of([1.0, 1, 4])
    found = density(lambda v: matrix @ v, [normal(3)], 10)
    np.testing.assert_allclose(np.sort(found.nodes), [1, 4], atol=1e-9)
