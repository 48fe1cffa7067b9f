"""scikit-learn's handwritten digits: real data that comes with the package, so nothing is downloaded."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distsurf.errors import InputError


def digits(
    image_size: int = 8, test_fraction: float = 0.25, seed: int = 0
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The 1,797 digits of ``sklearn.datasets.load_digits`` as ``{"train": (images, labels), "test": …}``.

    Images ``(N, 1, image_size, image_size)`` float32, enlarged bilinearly from 8x8, with mean 0 and standard
    deviation 1 over the training pixels; labels ``(N,)`` int64, 0 to 9. The split is random by ``seed`` and
    keeps the share of every class. Raises InputError for an impossible size or fraction.
    """
    if image_size < 8:
        raise InputError(f"image_size = {image_size}: the digits are 8x8 pixels and can only be enlarged")
    if not 0 < test_fraction < 1:
        raise InputError(f"test_fraction = {test_fraction}: expected a number between 0 and 1, such as 0.25")

    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).reshape(-1, 1, 8, 8)
    # Grey levels are whole numbers and, at sizes 16, 32, …, bilinear weights have a power of two below the line:
    # all sums here are exact in float64, so that every machine gets the same images to the last bit.
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear")
    try:
        rows = train_test_split(
            range(len(labels)), test_size=test_fraction, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise InputError(
            f"test_fraction = {test_fraction}: both parts need digits of each class ({error})"
        ) from error
    train = images[rows[0]]
    mean = train.sum() / train.numel()
    std = (train.square().sum() / train.numel() - mean.square()).sqrt()
    images = ((images - mean) / std).float()
    targets = torch.from_numpy(labels).long()
    return {split: (images[part], targets[part]) for split, part in zip(("train", "test"), rows, strict=True)}
