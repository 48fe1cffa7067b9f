from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from distsurf.errors import InputError
from distsurf.subspace import Layout, cosine, normalize, orthogonalize, random_direction
from distsurf.subspace.directions import dot

SHAPES = {"conv": (5, 3, 2, 2), "bias": (5,), "linear": (4, 7), "scale": (), "empty": (0, 3)}


@pytest.fixture
def layout() -> Layout:
    return Layout(tuple(SHAPES), tuple(SHAPES.values()))


@pytest.fixture
def center(layout: Layout) -> np.ndarray:
    vector = np.zeros(layout.size, np.float32)
    for view in layout.views(vector):
        view[...] = np.random.default_rng(1).normal(size=view.shape)
    return vector


def test_every_tensor_starts_on_a_64_byte_boundary(layout: Layout) -> None:
    assert all(offset * 4 % 64 == 0 for offset in layout.offsets)
    assert layout.count == 60 + 5 + 28 + 1 + 0


FROZEN_A = [0.20084799826145172, 1.3509012460708618, -2.8346781730651855]


def test_numbers_are_the_frozen_ones() -> None:
    """The first numbers of seed 0, as this test recorded them once: they must never change, on any machine."""
    layout = Layout(("a", "b"), ((3,), (2, 2)))
    a, b = layout.views(random_direction(layout, seed=0, axis=0))
    stream = lambda i: np.random.RandomState(  # noqa: E731
        np.random.Philox(np.random.SeedSequence(0, spawn_key=(0, i)))
    )
    np.testing.assert_array_equal(a, stream(0).standard_normal(3).astype(np.float32))
    np.testing.assert_array_equal(b, stream(1).standard_normal((2, 2)).astype(np.float32))
    np.testing.assert_array_equal(a, np.array(FROZEN_A, np.float32))


def test_axes_seeds_and_tensors_are_independent() -> None:
    layout = Layout(("a", "b"), ((200, 500), (200, 500)))
    parts = [
        view.ravel()
        for seed in (0, 1)
        for axis in (0, 1)
        for view in layout.views(random_direction(layout, seed, axis))
    ]
    correlation = np.corrcoef(np.stack(parts)) - np.eye(len(parts))
    assert np.abs(correlation).max() < 5 / math.sqrt(100_000)
    assert abs(np.mean(parts)) < 5 / math.sqrt(800_000)
    assert abs(np.var(parts) - 1) < 5 * math.sqrt(2 / 800_000)


@pytest.mark.parametrize("ignore", ["bias_bn", "none"])
def test_filter_normalization_against_numpy(layout: Layout, center: np.ndarray, ignore: str) -> None:
    raw = random_direction(layout, 3, 0)
    ours = normalize(raw, center, layout, how="filter", ignore=ignore)  # type: ignore[arg-type]
    for d, raw_d, w in zip(layout.views(ours), layout.views(raw), layout.views(center), strict=True):
        expected = np.zeros_like(d)
        if d.ndim > 1 or ignore == "none":
            for j in np.ndindex(d.shape[:1]):
                expected[j] = raw_d[j] / np.linalg.norm(raw_d[j]) * np.linalg.norm(w[j])
        np.testing.assert_allclose(d, expected, rtol=2e-6)


def test_layer_weight_and_no_normalization(layout: Layout, center: np.ndarray) -> None:
    raw = random_direction(layout, 3, 0)
    by = {
        how: layout.views(normalize(raw, center, layout, how=how, ignore="none"))  # type: ignore[arg-type]
        for how in ("layer", "weight", "none")
    }
    for i, (raw_d, w) in enumerate(zip(layout.views(raw), layout.views(center), strict=True)):
        if w.size:
            np.testing.assert_allclose(
                by["layer"][i], raw_d * (np.linalg.norm(w) / np.linalg.norm(raw_d)), rtol=2e-6
            )
        np.testing.assert_array_equal(by["weight"][i], raw_d * w)
        np.testing.assert_array_equal(by["none"][i], raw_d)


def test_filters_of_zero_weight_do_not_move(layout: Layout, center: np.ndarray) -> None:
    layout.views(center)[0][2] = 0
    direction = normalize(random_direction(layout, 0, 0), center, layout)
    assert not layout.views(direction)[0][2].any()
    assert layout.views(direction)[0][1].any()


def test_random_directions_are_nearly_orthogonal_as_predicted() -> None:
    """E|cos| ≈ sqrt(2/(π n)) (Li et al. 2018, appendix)."""
    layout = Layout(("w",), ((100, 100),))
    cosines = [
        abs(cosine(random_direction(layout, seed, 0), random_direction(layout, seed, 1)))
        for seed in range(60)
    ]
    assert np.mean(cosines) == pytest.approx(math.sqrt(2 / (math.pi * 10_000)), rel=0.35)


def test_orthogonalized_directions_are_orthogonal() -> None:
    layout = Layout(("w",), ((40, 50),))
    first, second = (random_direction(layout, 0, axis) for axis in (0, 1))
    second += 3 * first
    result = orthogonalize(second, (first,))
    assert abs(cosine(first, result)) < 1e-6
    with pytest.raises(InputError, match="parallel"):
        orthogonalize(2 * first, (first,))


def test_dot_against_exact_sum() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 3_000_001)).astype(np.float32)
    assert dot(a, b) == pytest.approx(
        math.fsum((a.astype(np.float64) * b.astype(np.float64)).tolist()), rel=1e-12
    )


def test_layout_lists_tied_weights_once() -> None:
    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    model[1].weight = model[0].weight
    assert Layout.of(dict(model.named_parameters())).count == 9


def test_flatten_and_views_are_inverse() -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(()), "c": torch.randn(17)}
    layout = Layout.of(tensors)
    vector = layout.flatten(list(tensors.values()), np.dtype(np.float32))
    for tensor, view in zip(tensors.values(), layout.views(vector), strict=True):
        np.testing.assert_array_equal(view, tensor.numpy())
