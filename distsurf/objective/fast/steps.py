"""The steps of the fast path, in their order. Each turns a network into a faster one, or says why it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distsurf.objective.fast.fold import fold
from distsurf.objective.fast.fuse import fuse
from distsurf.objective.fast.trace import NotApplicable
from distsurf.objective.network import Network
from distsurf.objective.precision import Precision
from distsurf.subspace.weights import Layout, Subspace


@dataclass(frozen=True)
class Circumstances:
    """What a step needs to know beside the network."""

    device: torch.device
    precision: Precision
    recomputed: bool
    """Whether batch-norm statistics are computed anew at every point."""
    pixels: int
    """Height times width of the largest images in the data; 0 if there are none."""


Step = Callable[[Network, Circumstances], Network]
"""Raises `NotApplicable` where there is nothing to do, and `Refused` with the reason where it cannot be done."""


def _fold(network: Network, at: Circumstances) -> Network:
    dtype = np.float64 if at.precision.sums == torch.float64 else np.float32
    return fold(network, recomputed=at.recomputed, dtype=dtype)


def _channels_last(network: Network, at: Circumstances) -> Network:
    """Weights and images in torch's memory format of that name, which convolutions read fastest."""
    is_conv = any(isinstance(layer, nn.Conv2d) for layer in network.module.modules())
    # On GPUs it is the tensor cores that ask for it.
    pays = at.precision.is_reduced if at.device.type == "cuda" else at.pixels >= LEAST_PIXELS
    if not (is_conv and pays):
        raise NotApplicable
    folding = network.folding
    if folding is not None:
        folding = replace(folding, layout=replace(folding.layout, channels_last=True))
    return replace(network, subspace=_in_channels_last(network.subspace), folding=folding, channels_last=True)


def _many(network: Network, at: Circumstances) -> Network:
    if at.device.type != "cuda" or at.recomputed:
        raise NotApplicable
    return replace(network, points_per_pass=POINTS_PER_PASS)


def _fuse(network: Network, at: Circumstances) -> Network:
    # The fused kernels know nothing of several sets of weights, and oneDNN's want this memory format.
    if network.points_per_pass > 1 or (at.device.type == "cpu" and not network.channels_last):
        raise NotApplicable
    return fuse(network, at.device, at.precision.compute)


def _graph(network: Network, at: Circumstances) -> Network:
    if at.device.type != "cuda":
        raise NotApplicable
    return replace(network, is_captured=True)


POINTS_PER_PASS = 8
LEAST_PIXELS = 400
"""On one core of an AMD EPYC, residual networks of 4 to 32 channels were 1.2 to 1.5 times faster in channels-last with
fused kernels on 32x32 pixels, 0.9 to 1.2 times as fast on 20x20, and 0.8 to 1.1 times on 8x8 and 16x16, whose
activations stay in the cache (`make bench`, "memory_format"). A rule rather than a measurement each time, so that a
job gives the same digits each time."""
STEPS: dict[str, Step] = {
    "fold": _fold,
    "channels_last": _channels_last,
    "many": _many,
    "fuse": _fuse,
    "graph": _graph,
}
"""``fold``: batch norm into the layer before it. ``channels_last``: memory format of weights and images. ``many``:
several points per pass. ``fuse``: convolution, addition and ReLU in one kernel. ``graph``: CUDA graphs."""


def _in_channels_last(subspace: Subspace) -> Subspace:
    layout = replace(subspace.layout, channels_last=True)

    def rearranged(vector: NDArray[np.generic]) -> NDArray[np.generic]:
        return _rearranged(vector, subspace.layout, layout)

    return subspace.mapped(layout, rearranged, rearranged)


def _rearranged(vector: NDArray[np.generic], old: Layout, new: Layout) -> NDArray[np.generic]:
    result = np.zeros(new.size, vector.dtype)
    for target, source in zip(new.views(result), old.views(vector), strict=True):
        target[...] = source
    return result
