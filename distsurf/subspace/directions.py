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

Normalization = Literal["filter", "layer", "weight", "center", "unit", "none"]
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
    tensors. ``weight``: d ← d · θ elementwise. ``center``: d ← d / ‖d‖ · ‖θ‖ for the vector as a whole (Ding et al.
    2023), ``unit``: d ← d / ‖d‖. ``none``: as it is. With ``ignore = "bias_bn"`` tensors of
    dimension ≤ 1 (biases, batch norm) get zero. Slices where either norm is zero get zero.
    """
    result = np.zeros_like(direction)
    for out, d, theta in zip(
        layout.views(result), layout.views(direction), layout.views(center), strict=True
    ):
        if ignore == "bias_bn" and d.ndim <= 1:
            continue
        if how in ("none", "center", "unit"):
            out[...] = d
        elif how == "weight":
            out[...] = d * theta.astype(np.float32)
        else:
            rows = d.shape[0] if how == "filter" and d.ndim else 1
            if d.size:
                out[...] = (d.reshape(rows, -1) * _scales(d, theta, rows)).reshape(d.shape)
    if how in ("center", "unit"):
        length = math.sqrt(dot(center, center)) if how == "center" else 1.0
        result = scaled(result, length)
    return result


def scaled(direction: NDArray[Any], length: float) -> NDArray[np.float32]:
    """A direction with this Euclidean norm; zero stays zero."""
    norm = math.sqrt(dot(direction, direction))
    return (direction * (length / norm if norm > 0 else 0.0)).astype(np.float32)


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


def difference(center: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float32]:
    """The direction that leads from the centre at 0 to another model at 1, ``(size,)``, rounded once."""
    return (other.astype(np.float64) - center).astype(np.float32)


def plane_through(
    center: NDArray[Any], first: NDArray[Any], second: NDArray[Any], how: Normalization = "none"
) -> tuple[tuple[NDArray[np.float32], NDArray[np.float32]], tuple[tuple[float, float], tuple[float, float]]]:
    """The plane through three models: orthogonal directions of equal length, and where the two models lie in it.

    û = (w₁ − w₀)/‖w₁ − w₀‖ and v̂ the rest of w₂ − w₀ without its part along û (Gram–Schmidt; Garipov et al. 2018,
    appendix A.1, with w₀ as the origin). Their length is ``none``: ‖w₁ − w₀‖, so that w₁ lies at (1, 0); ``unit``: 1;
    ``center``: ‖w₀‖. Raises InputError where two models are the same, or all three lie on a line.
    """
    u, v = (other.astype(np.float64) - center for other in (first, second))
    across = math.sqrt(dot(u, u))
    if across == 0:
        raise InputError("the first checkpoint has the weights of the model itself: there is no plane")
    length = {"none": across, "unit": 1.0, "center": math.sqrt(dot(center, center))}[how]
    x = scaled(u, length)
    # Orthogonal to the direction as it is stored, in float32.
    try:
        y = scaled(orthogonalize(v, (x,), np.float64), length)
    except InputError:
        raise InputError(
            "the three models lie on a line, or two of them are the same: there is no plane through them"
        ) from None
    square = length * length
    return (x, y), ((across / length, 0.0), (dot(v, x) / square, dot(v, y) / square))


def orthogonalize(
    direction: NDArray[Any], others: tuple[NDArray[np.float32], ...], dtype: type[np.floating] = np.float32
) -> NDArray[Any]:
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
    return result.astype(dtype)
