"""Weights as vectors, and the directions that span the subspace in which a surface lies."""

from distsurf.subspace.directions import (
    cosine,
    difference,
    normalize,
    orthogonalize,
    plane_through,
    random_direction,
)
from distsurf.subspace.weights import Layout, Subspace, Tensors, load_checkpoint

__all__ = [
    "Layout",
    "Subspace",
    "Tensors",
    "cosine",
    "difference",
    "load_checkpoint",
    "normalize",
    "orthogonalize",
    "plane_through",
    "random_direction",
]
