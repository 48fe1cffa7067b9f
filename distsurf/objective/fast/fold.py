"""Batch norm folded into the convolution or linear layer before it.

In evaluation a batch norm is affine: BN(Wx + b) = W'x + b' with s = γ/√(σ²+ε), W' = s·W and b' = β + s·(b − μ).
Where neither γ nor the statistics move, W' and b' are linear in W, b and β: θ0 and the directions are folded once and
the folded network lies in a plane of its own. Where they do move, the fold is done anew at every point.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from distsurf.objective.fast.trace import NotApplicable, Refused, calls, layer_of, only_user, trace
from distsurf.subspace.moving import FlatTensors
from distsurf.subspace.weights import Layout, Subspace

if TYPE_CHECKING:
    from distsurf.objective.network import Network

_FOLDS_INTO: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


@dataclass(frozen=True)
class Pair:
    """A batch norm and the layer that takes it in, by the names of their tensors (None where there is none)."""

    weight: str
    bias: str | None
    scale: str | None
    shift: str | None
    mean: str
    variance: str
    eps: float
    folded_bias: str

    @property
    def norm(self) -> set[str]:
        """Names of the batch norm's own tensors."""
        return {n for n in (self.scale, self.shift, self.mean, self.variance) if n is not None}


@dataclass(frozen=True)
class Folding:
    """How a folded module's floating-point tensors (``layout``) come from the ``unfolded`` one's, at each point."""

    unfolded: nn.Module
    pairs: tuple[Pair, ...]
    layout: Layout


def fold(network: Network, *, recomputed: bool, dtype: type[np.floating] = np.float32) -> Network:
    """The network with its batch norms folded: a `fast.steps` step.

    ``recomputed``: the statistics change at every point. ``dtype``: of a folded plane. Raises NotApplicable, Refused.
    """
    if not any(type(m) in _FOLDS_INTO.values() for m in network.module.modules()):
        raise NotApplicable
    if network.untraceable:
        raise Refused(network.untraceable)
    graph = trace(network.module)
    known = {*network.subspace.layout.names, *network.fixed}
    pairs = _take_out(graph, known)
    if not pairs:
        raise NotApplicable
    moving = {name for pair in pairs for name in (pair.scale, pair.mean, pair.variance) if name is not None}
    if recomputed or _any_moves(network.subspace, moving):
        known.update(pair.folded_bias for pair in pairs)
        floating = {name: t for name, t in _named(graph, known).values() if t.is_floating_point()}
        folding = Folding(network.module, pairs, Layout.of(floating))
        return replace(network, module=graph, folding=folding, is_traced=True)
    subspace = _fold_plane(network.subspace, network.fixed, pairs, dtype)
    fixed = {name: value for name, value in network.fixed.items() if all(name not in p.norm for p in pairs)}
    return replace(network, module=graph, subspace=subspace, fixed=fixed, is_traced=True)


def _named(graph: fx.GraphModule, known: Collection[str]) -> dict[int, tuple[str, Tensor]]:
    """A graph's tensors and their names, by id; of a tied tensor's names the one that is known."""
    return {
        id(tensor): (name, tensor)
        for name, tensor in [
            *graph.named_parameters(remove_duplicate=False),
            *graph.named_buffers(remove_duplicate=False),
        ]
        if name in known
    }


def _take_out(graph: fx.GraphModule, known: Collection[str]) -> tuple[Pair, ...]:
    """Remove the batch norms that can be folded from a graph, and give their layers biases."""
    names = {key: name for key, (name, _) in _named(graph, known).items()}
    owners: dict[int, int] = {}
    for _, tensor in graph.named_parameters(remove_duplicate=False):
        owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    pairs = []
    for node in list(graph.graph.nodes):
        norm_node = only_user(node)
        if norm_node is None:
            continue
        layer, norm = layer_of(graph, node), layer_of(graph, norm_node)
        if (
            not isinstance(norm, _BatchNorm)
            or layer is None
            or _FOLDS_INTO.get(type(layer)) is not type(norm)
        ):
            continue
        tensors = [*layer._parameters.values(), *norm._parameters.values()]
        is_own = all(t is None or owners[id(t)] == 1 for t in tensors)
        is_plain = not parametrize.is_parametrized(layer) and not parametrize.is_parametrized(norm)
        is_single = calls(graph, layer) == calls(graph, norm) == 1 and len(norm_node.args) == 1
        if not (is_own and is_plain and is_single and norm.running_mean is not None):
            continue
        folded = copy.copy(layer)  # its own table of parameters: the layer itself stays as it is
        folded._parameters = dict(layer._parameters)
        weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
        if bias is None:
            folded._parameters["bias"] = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
        graph.set_submodule(str(node.target), folded)

        def name(tensor: Any) -> str | None:
            return None if tensor is None else names[id(tensor)]

        pairs.append(
            Pair(
                weight=names[id(weight)],
                bias=name(bias),
                scale=name(norm.weight),
                shift=name(norm.bias),
                mean=names[id(norm.running_mean)],
                variance=names[id(norm.running_var)],
                eps=norm.eps,
                folded_bias=f"{node.target}.bias",
            )
        )
        norm_node.replace_all_uses_with(node)
        graph.graph.erase_node(norm_node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return tuple(pairs)


def _any_moves(subspace: Subspace, names: Collection[str]) -> bool:
    return any(
        view.any()
        for direction in subspace.directions
        for name, view in zip(subspace.layout.names, subspace.layout.views(direction), strict=True)
        if name in names
    )


# -- once, in float64 -------------------------------------------------------------------------------------


def _fold_plane(
    subspace: Subspace, fixed: Mapping[str, Any], pairs: tuple[Pair, ...], dtype: type[np.floating]
) -> Subspace:
    """The plane of the folded tensors. Statistics and γ are those of the centre."""
    center = dict(zip(subspace.layout.names, subspace.layout.views(subspace.center), strict=True))
    values = {**{name: np.asarray(value) for name, value in fixed.items()}, **center}
    by_weight = {pair.weight: pair for pair in pairs}
    biases = {pair.folded_bias for pair in pairs}
    gone = {name for pair in pairs for name in pair.norm} | biases
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in zip(subspace.layout.names, subspace.layout.shapes, strict=True):
        if name not in gone:
            shapes[name] = shape
        if name in by_weight:
            shapes[by_weight[name].folded_bias] = shape[:1]
    layout = Layout(tuple(shapes), tuple(shapes.values()), subspace.layout.channels_last)
    scales = {
        pair.weight: _value(values, pair.scale, 1.0) / np.sqrt(_value(values, pair.variance) + pair.eps)
        for pair in pairs
    }

    def folded(vector: NDArray[Any], is_direction: bool) -> NDArray[Any]:
        own = dict(zip(subspace.layout.names, subspace.layout.views(vector), strict=True))
        result = np.zeros(layout.size, dtype)
        views = dict(zip(layout.names, layout.views(result), strict=True))
        for name, view in views.items():
            if name in by_weight:
                pair, weight = by_weight[name], own[name].astype(np.float64)
                scale = scales[name]
                view[...] = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
                bias = _value(own, pair.bias, 0.0) - (0.0 if is_direction else _value(values, pair.mean))
                views[pair.folded_bias][...] = _value(own, pair.shift, 0.0) + scale * bias
            elif name not in biases:
                view[...] = own[name]
        return result

    with np.errstate(all="ignore"):  # what is not finite here is found by the verification
        return subspace.mapped(
            layout, partial(folded, is_direction=False), partial(folded, is_direction=True)
        )


def _value(values: Mapping[str, Any], name: str | None, otherwise: float = math.nan) -> Any:
    return otherwise if name is None else np.asarray(values[name], np.float64)


# -- at every point ---------------------------------------------------------------------------------------


class FoldedTensors:
    """The folded module's tensors in memory of their own, computed from its ``sources``."""

    def __init__(
        self,
        folding: Folding,
        sources: Mapping[str, Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        seen_as: torch.dtype,
        unrounded: Collection[str],
    ):
        self.tensors = FlatTensors(
            folding.layout, device=device, dtype=dtype, seen_as=seen_as, unrounded=unrounded
        )
        # Integers and the like have nothing to round: they are the sources themselves.
        self.seen = {**sources, **self.tensors.seen}
        pairs = folding.pairs
        targets = self.tensors.values
        taken = {pair.weight for pair in pairs} | {pair.folded_bias for pair in pairs}
        self._copies = [(view, sources[name]) for name, view in targets.items() if name not in taken]
        self._weights = [
            (targets[p.weight], sources[p.weight], [-1, *[1] * (sources[p.weight].ndim - 1)]) for p in pairs
        ]
        self._biases = [targets[p.folded_bias] for p in pairs]
        self._widths = [len(bias) for bias in self._biases]

        def column(names: list[str | None], fill: float) -> list[Tensor]:
            return [
                sources[name] if name is not None else torch.full((width,), fill, dtype=dtype, device=device)
                for name, width in zip(names, self._widths, strict=True)
            ]

        self._means = column([p.mean for p in pairs], math.nan)
        self._variances = column([p.variance for p in pairs], math.nan)
        self._gammas = column([p.scale for p in pairs], 1.0)
        self._shifts = column([p.shift for p in pairs], 0.0)
        self._old_biases = column([p.bias for p in pairs], 0.0)
        self._eps = torch.cat(
            [torch.full((w,), p.eps, dtype=torch.float64) for p, w in zip(pairs, self._widths, strict=True)]
        ).to(device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold what the sources hold now; the vectors in float64, all layers' in one operation each."""
        mean, variance, gamma, shift, bias = (
            torch.cat(parts).double()
            for parts in (self._means, self._variances, self._gammas, self._shifts, self._old_biases)
        )
        scale = gamma / torch.sqrt(variance + self._eps)
        biases = (shift + scale * (bias - mean)).split(self._widths)
        for (target, source, shape), part in zip(self._weights, scale.split(self._widths), strict=True):
            torch.mul(source, part.to(source.dtype).view(shape), out=target)
        for target, vector in zip(self._biases, biases, strict=True):
            target.copy_(vector)
        for target, source in self._copies:
            target.copy_(source)
        self.tensors.publish()
