"""Weights as vectors, and the directions that span the subspace in which a surface lies."""

from distsurf.subspace.directions import cosine, normalize, orthogonalize, random_direction
from distsurf.subspace.weights import Layout, Subspace, Tensors, load_checkpoint

__all__ = [
    "Layout",
    "Subspace",
    "Tensors",
    "cosine",
    "load_checkpoint",
    "normalize",
    "orthogonalize",
    "random_direction",
]
