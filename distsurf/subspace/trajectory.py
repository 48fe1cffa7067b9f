"""The plane of a training trajectory: principal components of its checkpoints, without all of them in memory.

The rows of the matrix are Δ_i = θ_i − c with a checkpoint c for the centre (Li et al. 2018, section 7: the last one).
Its components come from the T×T matrix ΔΔᵀ, as those of `distsurf.subspace.svd` do by the route ``gram``; every rank
adds its share of the parameters to that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distsurf.errors import InputError
from distsurf.subspace.checkpoints import Checkpoints, each
from distsurf.subspace.svd import LOST

Floats = NDArray[np.float64]
Total = Callable[[NDArray[Any]], NDArray[Any]]
Step = Callable[[Callable[[], Any]], Any]


@dataclass(frozen=True)
class Trajectory:
    """Principal components of a trajectory, in units of ``unit``."""

    coordinates: Floats
    """Of every checkpoint in the plane, ``(T, k)``: (θ_i − c)·p / unit, the projections themselves."""
    explained: Floats
    """Share of Σ‖θ_i − c‖² that each component has: uncentred, about the chosen centre, ``(r,)``."""
    explained_centred: Floats
    """Share of the variance about the mean of the checkpoints, each component of that decomposition, ``(r',)``."""
    outside: Floats
    """‖θ_i − c‖'s part outside the plane, as a share of ‖θ_i − c‖, ``(T,)``; 0 for the centre."""
    unit: float
    directions: NDArray[np.float32]
    """Orthogonal, of length ``unit``, ``(k, size)`` in the layout of the checkpoints."""


def principal_plane(
    checkpoints: Checkpoints,
    center: int,
    *,
    components: int = 2,
    about: Literal["center", "mean"] = "center",
    scale: Literal["none", "center"] = "none",
    rank: int = 0,
    size: int = 1,
    total: Total = lambda part: part,
    together: Step = lambda step: step(),
) -> Trajectory:
    """Principal components of a trajectory about one of its checkpoints.

    ``about``: components of Δ itself, or (``mean``: scikit-learn's, and Li et al.'s code's) of Δ less its mean.
    ``scale``: coordinates in units of the weights, or of ‖c‖ (Ding et al. 2023). Ranks read their share of the
    parameters; ``total`` adds arrays of all ranks up (T×T float64 once, the directions once), ``together`` does a step
    whose error reaches all ranks. Signs: in every component the checkpoint that lies farthest along it does so on the
    positive side. Raises InputError where the checkpoints do not span so many components.
    """
    mine = list(each(checkpoints.chunks(), rank, size))
    count = len(checkpoints.paths)

    def products() -> Floats:
        # The last entry is ‖c‖².
        found = np.zeros(count * count + 1)
        for chunk in mine:
            rows = checkpoints.read(chunk)
            found[-1] += rows[center] @ rows[center]
            rows -= rows[center].copy()
            found[:-1] += (rows @ rows.T).reshape(-1)
        return found

    summed = total(together(products))
    gram, norm = summed[:-1].reshape(count, count), float(np.sqrt(summed[-1]))
    if not np.diagonal(gram).any():
        raise InputError("all checkpoints have the same weights: there is no trajectory")
    middle = np.eye(count) - 1 / count
    spectra = {"center": np.linalg.eigh(gram), "mean": np.linalg.eigh(middle @ gram @ middle)}
    squares, vectors = (part[..., ::-1] for part in spectra[about])
    if len(squares) < components or squares[components - 1] <= LOST**2 * squares[0]:
        here = int((squares > LOST**2 * squares[0]).sum())
        raise InputError(
            f"the {count} checkpoints span {here} direction{'s' if here > 1 else ''}, and {components} were asked for: "
            f"at least {components + 1} different ones are needed"
        )
    # p_k = Σ_i w_ik Δ_i, of length 1; and where Δ_i lies along it: Δ_i·p_k.
    weights = vectors[:, :components] / np.sqrt(squares[:components])
    if about == "mean":
        weights = middle @ weights
    along = gram @ weights
    farthest = along[np.abs(along).argmax(axis=0), np.arange(components)]
    signs = np.where(farthest < 0, -1.0, 1.0)
    weights, along = weights * signs, along * signs
    unit = norm if scale == "center" else 1.0
    if unit == 0:
        raise InputError("the centre has no weights but zero: its norm is no unit")

    def combined() -> NDArray[np.float32]:
        found = np.zeros((components, checkpoints.layout.size), np.float32)
        for chunk in mine:
            rows = checkpoints.read(chunk)
            rows -= rows[center].copy()
            found[:, chunk.place] = unit * (weights.T @ rows)
        return found

    directions = total(together(combined))
    lengths = np.diagonal(gram)
    rest = np.maximum(lengths - np.square(along).sum(axis=1), 0.0)
    return Trajectory(
        coordinates=along / unit,
        explained=_shares(spectra["center"][0]),
        explained_centred=_shares(spectra["mean"][0]),
        outside=np.sqrt(np.divide(rest, lengths, out=np.zeros(count), where=lengths > 0)),
        unit=unit,
        directions=directions,
    )


def project(
    checkpoints: Checkpoints,
    center: int,
    directions: NDArray[np.float32],
    *,
    rank: int = 0,
    size: int = 1,
    total: Total = lambda part: part,
    together: Step = lambda step: step(),
) -> Trajectory:
    """Where checkpoints lie in a given plane through one of them: least squares in ``directions`` ``(2, size)``.

    ``explained`` and ``explained_centred`` are what the two directions have, in this order, of Σ‖θ_i − c‖² and of the
    variance about the mean; that of directions that are not orthogonal is shared between them as it comes. The other
    arguments are those of `principal_plane`. Raises InputError for parallel directions.
    """
    mine = list(each(checkpoints.chunks(), rank, size))
    count, plane = len(checkpoints.paths), directions.astype(np.float64)

    def products() -> Floats:
        # Of every checkpoint its products with both directions and ‖Δ‖²; and the square of their mean.
        found, mean = np.zeros((count, 3)), np.zeros(1)
        for chunk in mine:
            rows = checkpoints.read(chunk)
            rows -= rows[center].copy()
            found[:, :2] += rows @ plane[:, chunk.place].T
            found[:, 2] += np.square(rows).sum(axis=1)
            mean += np.square(rows.mean(axis=0)).sum()
        return np.concatenate([found.reshape(-1), mean])

    summed = total(together(products))
    found, mean = summed[:-1].reshape(count, 3), float(summed[-1])
    square = plane @ plane.T
    if np.linalg.matrix_rank(square) < 2:
        raise InputError("the two directions are parallel, and span no plane")
    coordinates = np.linalg.solve(square, found[:, :2].T).T
    inside = coordinates * found[:, :2]
    lengths = found[:, 2]
    middle = coordinates - coordinates.mean(axis=0)
    about_mean = (middle * (found[:, :2] - found[:, :2].mean(axis=0))).sum(axis=0)
    rest = np.maximum(lengths - inside.sum(axis=1), 0.0)
    return Trajectory(
        coordinates=coordinates,
        explained=inside.sum(axis=0) / (lengths.sum() or 1.0),
        explained_centred=about_mean / ((lengths.sum() - count * mean) or 1.0),
        outside=np.sqrt(np.divide(rest, lengths, out=np.zeros(count), where=lengths > 0)),
        unit=1.0,
        directions=directions,
    )


def _shares(squares: Floats) -> Floats:
    found = np.maximum(squares[::-1], 0.0)
    return found / (found.sum() or 1.0)
