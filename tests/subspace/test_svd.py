"""Singular values by every route, against LAPACK, known spectra and Eckart and Young."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from distsurf.errors import InputError
from distsurf.subspace.svd import ROUTES, SVD, Route, gram, svd


def matrix_of(spectrum: np.ndarray, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """A matrix with these singular values and random vectors."""
    random = np.random.default_rng(seed)
    u, v = (np.linalg.qr(random.standard_normal((n, len(spectrum))))[0] for n in (rows, columns))
    return np.asarray((u * spectrum) @ v.T)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(8, 300), (300, 8), (40, 40)])
def test_every_route_against_numpy(route: Route, shape: tuple[int, int]) -> None:
    matrix = matrix_of(np.geomspace(1, 1e-2, 8), *shape)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    found = svd(matrix, 8, route)
    assert found.route == route
    np.testing.assert_allclose(found.s, s[:8], rtol=1e-8)
    signs = np.sign((found.u * u[:, :8]).sum(axis=0))
    np.testing.assert_allclose(found.u, u[:, :8] * signs, atol=1e-8)
    np.testing.assert_allclose(found.vt, vt[:8] * signs[:, None], atol=1e-8)
    for vectors in (found.u.T, found.vt):
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(8), atol=1e-12)
    largest = np.abs(found.u).argmax(axis=0)
    assert (found.u[largest, np.arange(8)] > 0).all()
    np.testing.assert_allclose(found.reconstruct(8), matrix, atol=1e-9)


def test_where_the_gram_route_stops_being_right() -> None:
    """σ² is what it sees: the relative error of σ grows as (σ₁/σ)², and below 1.5e-8 there is nothing."""
    spectrum = np.geomspace(1, 1e-12, 13)
    matrix = matrix_of(spectrum, 13, 400)
    exact, squared = svd(matrix, route="lapack"), svd(matrix, route="gram")
    np.testing.assert_allclose(exact.s, spectrum, rtol=1e-3)
    assert len(squared.s) in (8, 9)
    error = np.abs(squared.s / spectrum[: len(squared.s)] - 1)
    assert (error <= 1e-15 * spectrum[: len(error)] ** -2).all()
    assert error[6] > 1e-8  # at 1e-6 of the largest it no longer has eight digits
    np.testing.assert_allclose(squared.vt @ squared.vt.T, np.eye(len(error)), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 1000),
    st.sampled_from(ROUTES),
    st.floats(-12, 12),
    st.booleans(),
)
def test_the_error_is_eckart_and_youngs(
    rows: int, columns: int, seed: int, route: Route, scale: float, is_flat: bool
) -> None:
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, columns)) * 10.0**scale
    if is_flat:
        matrix[:] = matrix[:1]  # of rank one
    found = svd(matrix, route=route)
    measured = [
        np.linalg.norm(matrix - found.reconstruct(k)) / np.linalg.norm(matrix)
        for k in range(len(found.s) + 1)
    ]
    np.testing.assert_allclose(found.errors(), measured, rtol=1e-6, atol=3e-8)


def test_components_of_a_trajectory_are_pcas() -> None:
    """Leading components of a long float32 matrix, shared by columns: scikit-learn's, for any number of ranks."""
    random = np.random.default_rng(3)
    path = np.cumsum(random.standard_normal((12, 20_000)), axis=0).astype(np.float32)
    path -= path.mean(axis=0)
    pca = PCA(3, svd_solver="full").fit(path.astype(np.float64))
    whole = svd(path, 3, "gram")
    np.testing.assert_allclose(whole.s, pca.singular_values_, rtol=1e-8)
    for ranks in (2, 5):
        parts = among(ranks, path)
        assert all(np.array_equal(part.u, parts[0].u) for part in parts)
        np.testing.assert_allclose(parts[0].s, whole.s, rtol=1e-12)
        np.testing.assert_allclose(np.concatenate([part.vt for part in parts], axis=1), whole.vt, atol=1e-10)


def among(ranks: int, path: np.ndarray) -> list[SVD]:
    """Three components by so many threads, each with its share of the columns, that meet to add up."""
    meeting, given = threading.Barrier(ranks), [np.zeros(0)] * ranks

    def one(rank: int, share: np.ndarray) -> SVD:
        def total(part: np.ndarray) -> np.ndarray:
            given[rank] = part
            meeting.wait()
            result = np.sum(given, axis=0)
            meeting.wait()
            return np.asarray(result)

        return gram(share, 3, total)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks), np.array_split(path, ranks, axis=1)))


def test_the_route_follows_from_the_size() -> None:
    for shape, components, route in (
        ((51, 51), None, "lapack"), ((10, 5000), 2, "gram"), ((5000, 10), 2, "gram"), ((10, 5000), None, "gram"),
        ((1200, 1100), 3, "randomized"), ((21, 5000), None, "lapack"),
    ):  # fmt: skip
        matrix = np.random.default_rng(0).standard_normal(shape)
        assert svd(matrix, components).route == route


def test_randomized_components_depend_on_the_seed_alone() -> None:
    matrix = matrix_of(0.5 ** np.arange(60), 200, 150)
    one, other = (svd(matrix, 4, "randomized", seed=seed) for seed in (7, 7))
    assert one.vt.tobytes() == other.vt.tobytes()
    np.testing.assert_allclose(one.s, 0.5 ** np.arange(4), rtol=1e-8)
    np.testing.assert_allclose(one.errors()[1:3], svd(matrix).errors()[1:3], rtol=1e-8)


def test_what_is_no_matrix_is_refused() -> None:
    for matrix, words in (
        (np.zeros(3), r"a matrix of real numbers was expected, float64 \(3,\)"),
        (np.zeros((0, 3)), "a matrix of real numbers was expected"),
        (np.zeros((2, 2), complex), "a matrix of real numbers was expected"),
        (np.array([[1.0, np.nan]]), "1 entries of the matrix are not finite"),
    ):
        with pytest.raises(InputError, match=words):
            svd(matrix)
    with pytest.raises(InputError, match="3 components: expected 1 to 2"):
        svd(np.eye(2), 3)
    nothing = svd(np.zeros((3, 4)))
    assert (nothing.errors() == 0).all()
    assert svd(np.zeros((3, 4)), route="gram").reconstruct(3).shape == (3, 4)
