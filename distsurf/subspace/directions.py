"""Directions in weight space: random Gaussian ones, and the normalizations of Li et al. 2018.

A direction is a flat float32 vector of a `Layout`. Its numbers come out the same on every machine: the random
stream is numpy's frozen legacy one (NEP 19) over Philox, keyed by seed, axis and tensor; norms are summed in
float64, rounded to float32 once per filter, and applied by a single IEEE multiplication.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distsurf.errors import InputError
from distsurf.subspace.weights import Layout

Normalization = Literal["filter", "layer", "weight", "none"]
Ignore = Literal["bias_bn", "none"]


def random_direction(layout: Layout, seed: int, axis: int) -> NDArray[np.float32]:
    """Independent standard Gaussian numbers ``(layout.size,)`` for an axis (0 is x); padding is zero."""
    direction = np.zeros(layout.size, np.float32)
    for i, view in enumerate(layout.views(direction)):
        stream = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(axis, i)))
        view[...] = np.random.RandomState(stream).standard_normal(view.shape)
    return direction


def normalize(
    direction: NDArray[np.float32],
    center: NDArray[Any],
    layout: Layout,
    *,
    how: Normalization = "filter",
    ignore: Ignore = "bias_bn",
) -> NDArray[np.float32]:
    """Scale a direction to the weights, tensor by tensor (Li et al. 2018, section 4).

    ``filter``: d_ij ← d_ij / ‖d_ij‖ · ‖θ_ij‖ with the Frobenius norm, for every slice j along dimension 0 of
    tensor i (a convolution's filter, a linear layer's row, one entry of a vector). ``layer``: the same for whole
    tensors. ``weight``: d ← d · θ elementwise. ``none``: as it is. With ``ignore = "bias_bn"`` tensors of
    dimension ≤ 1 (biases, batch norm) get zero. Slices where either norm is zero get zero.
    """
    result = np.zeros_like(direction)
    for out, d, theta in zip(
        layout.views(result), layout.views(direction), layout.views(center), strict=True
    ):
        if ignore == "bias_bn" and d.ndim <= 1:
            continue
        if how == "none":
            out[...] = d
        elif how == "weight":
            out[...] = d * theta.astype(np.float32)
        else:
            rows = d.shape[0] if how == "filter" and d.ndim else 1
            if d.size:
                out[...] = (d.reshape(rows, -1) * _scales(d, theta, rows)).reshape(d.shape)
    return result


def _scales(d: NDArray[np.float32], theta: NDArray[Any], rows: int) -> NDArray[np.float32]:
    """‖θ_j‖ / ‖d_j‖ per row, ``(rows, 1)`` float32, 0 where ‖d_j‖ is 0."""
    norms = [
        np.sqrt(np.square(part.reshape(rows, -1), dtype=np.float64).sum(axis=1, keepdims=True))
        for part in (theta, d)
    ]
    return np.divide(norms[0], norms[1], out=np.zeros_like(norms[0]), where=norms[1] > 0).astype(np.float32)


def dot(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Scalar product of two flat vectors, accumulated in float64 over blocks of bounded memory."""
    block = 1 << 20
    return math.fsum(
        float(np.multiply(a[i : i + block], b[i : i + block], dtype=np.float64).sum())
        for i in range(0, len(a), block)
    )


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Cosine of the angle between two directions; NaN if one of them is zero."""
    norms = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / norms if norms > 0 else math.nan


def orthogonalize(
    direction: NDArray[np.float32], others: tuple[NDArray[np.float32], ...]
) -> NDArray[np.float32]:
    """Subtract from a direction its projections on the ``others`` (which are orthogonal to one another).

    Twice, because one pass of Gram–Schmidt in float32 leaves a remainder of its own rounding. Raises InputError
    if nothing is left of the direction.
    """
    result = direction.astype(np.float64)
    for other in (*others, *others):
        square = dot(other, other)
        if square > 0:
            result -= other * (dot(result, other) / square)
    if dot(result, result) <= 1e-12 * dot(direction, direction):
        raise InputError("the directions are parallel: nothing is left of one after orthogonalizing")
    return result.astype(np.float32)
