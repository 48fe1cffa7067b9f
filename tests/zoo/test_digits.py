"""Digits: the split, the normalization, the seed, compared with scikit-learn's arrays and scipy's interpolation."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom
from sklearn.datasets import load_digits

from distsurf.errors import InputError
from distsurf.zoo.digits import digits


def test_shapes_and_types() -> None:
    data = digits()
    assert {split: len(images) for split, (images, _) in data.items()} == {"train": 1347, "test": 450}
    for images, labels in data.values():
        assert images.shape == (len(labels), 1, 8, 8)
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        assert labels.dtype == torch.int64


def test_every_digit_once_with_its_label() -> None:
    """The split is a partition: undoing the normalization gives scikit-learn's 1,797 labelled images."""
    pixels, labels = load_digits(return_X_y=True)
    known = Counter((row.tobytes(), int(label)) for row, label in zip(pixels, labels, strict=True))
    images = torch.cat([images for images, _ in digits().values()]).double().numpy().reshape(-1, 64)
    given = torch.cat([labels for _, labels in digits().values()])
    images = np.round(16 * (images - images.min()) / (images.max() - images.min()))
    assert Counter((row.tobytes(), int(label)) for row, label in zip(images, given, strict=True)) == known


def test_stratified() -> None:
    share = np.bincount(load_digits(return_X_y=True)[1]) / 1797
    for _, labels in digits(test_fraction=0.2).values():
        assert np.bincount(labels) == pytest.approx(share * len(labels), abs=1)


@pytest.mark.parametrize("size", [8, 11, 16, 32])
def test_normalized_by_the_training_pixels(size: int) -> None:
    data = digits(size)
    train = data["train"][0].double().numpy()
    assert train.shape[1:] == (1, size, size)
    assert train.mean() == pytest.approx(0, abs=1e-6)
    assert train.std() == pytest.approx(1, abs=1e-6)
    assert data["test"][0].mean().item() != pytest.approx(0, abs=1e-6)


def test_enlarged_bilinearly() -> None:
    """An affine image of the small one, enlarged by scipy on the same pixel-centre grid."""
    small = digits(8)["test"][0][:20, 0].double().numpy()
    large = digits(16)["test"][0][:20, 0].double().numpy()
    expected = zoom(small, (1, 2, 2), order=1, mode="nearest", grid_mode=True)
    slope, offset = np.polyfit(expected.ravel(), large.ravel(), 1)
    np.testing.assert_allclose(large, slope * expected + offset, atol=1e-5)


def test_seed() -> None:
    first, again, other = digits(seed=1), digits(seed=1), digits(seed=2)
    for split in ("train", "test"):
        assert all(map(torch.equal, first[split], again[split]))
        assert not torch.equal(first[split][1], other[split][1])


def test_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    digits()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 7}, "image_size = 7.*8x8"),
        ({"test_fraction": 0.0}, "test_fraction = 0.0"),
        ({"test_fraction": 1.0}, "test_fraction = 1.0"),
        ({"test_fraction": 0.001}, "digits of each class"),
    ],
)
def test_impossible_data(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        digits(**arguments)  # type: ignore[arg-type]
