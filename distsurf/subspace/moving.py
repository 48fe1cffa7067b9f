"""Tensors that follow coordinates, θ(c) = θ0 + Σ c_k d_k, always from the stored θ0; and a model that uses them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distsurf.subspace.weights import Layout, Subspace


class FlatTensors:
    """Named tensors as views into one flat vector, and as a model sees them: perhaps rounded to a shorter type.

    ``values`` are the tensors in ``dtype``, to be written in place; ``publish`` then rounds them all in one operation.
    ``seen`` are the tensors for the model: those named in ``unrounded`` are the values themselves.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        device: torch.device,
        dtype: torch.dtype,
        seen_as: torch.dtype | None = None,
        unrounded: Collection[str] = (),
    ):
        self.flat = torch.zeros(layout.size, dtype=dtype, device=device)
        self.values = dict(zip(layout.names, layout.torch_views(self.flat), strict=True))
        self.seen = dict(self.values)
        self.layout = layout
        self._rounded: Tensor | None = None
        if seen_as is not None and seen_as != dtype:
            self._rounded = torch.zeros(layout.size, dtype=seen_as, device=device)
            views = zip(layout.names, layout.torch_views(self._rounded), strict=True)
            self.seen.update((name, view) for name, view in views if name not in unrounded)

    @property
    def flat_seen(self) -> Tensor:
        """The vector with all that is rounded, or the values' own where nothing is."""
        return self.flat if self._rounded is None else self._rounded

    def publish(self) -> None:
        """Bring what was written to the values to what the model sees."""
        if self._rounded is not None:
            self._rounded.copy_(self.flat)


class MovingTensors:
    """The tensors of a subspace at given coordinates, and fixed ones, which are restored at every point.

    ``values`` and ``seen`` are views by name, as in `FlatTensors`; their memory stays the same for good.
    """

    def __init__(
        self,
        subspace: Subspace,
        fixed: Mapping[str, NDArray[Any] | Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        seen_as: torch.dtype | None = None,
        unrounded: Collection[str] = (),
    ):
        # As they are: on the CPU this is the memory that all ranks of a node share.
        self._terms = subspace.terms
        self._center = torch.from_numpy(subspace.center).to(device)
        self._directions = [torch.from_numpy(d).to(device) for d in subspace.directions]
        self._pinned = {at: torch.from_numpy(vector).to(device) for at, vector in subspace.pinned}
        self.moving = FlatTensors(
            subspace.layout, device=device, dtype=dtype, seen_as=seen_as, unrounded=unrounded
        )
        self._fixed = []
        self.values = dict(self.moving.values)
        self.seen = dict(self.moving.seen)
        for target, names in _by_dtype(fixed, dtype, seen_as or dtype, unrounded).items():
            group = _Fixed({name: fixed[name] for name in names}, target, device)
            self._fixed.append(group)
            self.values.update(group.views)
            self.seen.update(group.views)

    def copies(self) -> dict[str, Tensor]:
        """The fixed tensors as they are now."""
        return {name: view.clone() for group in self._fixed for name, view in group.views.items()}

    @torch.no_grad()
    def move_to(self, coordinates: Sequence[float]) -> None:
        """Set the moving tensors to θ0 + Σ c_k d_k and the fixed ones to their stored values."""
        theta, source = self.moving.flat, self._center
        pinned = self._pinned.get(tuple(coordinates))
        if pinned is not None:
            source, coordinates = pinned, [0.0] * len(coordinates)
        if source.dtype != theta.dtype:
            source = theta.copy_(source)
        for number, coordinate in self._terms(coordinates):
            direction = self._directions[number]
            if direction.dtype != theta.dtype:
                theta.copy_(source).add_(direction, alpha=float(coordinate))  # in the dtype of theta
            else:
                torch.add(source, direction, alpha=float(coordinate), out=theta)
            source = theta
        self.moving.publish()
        for group in self._fixed:
            group.flat.copy_(group.stored)


class _Fixed:
    """Tensors of one dtype as views into one flat tensor, so that one copy restores them all."""

    def __init__(
        self, tensors: Mapping[str, NDArray[Any] | Tensor], dtype: torch.dtype, device: torch.device
    ):
        values = {name: _as_tensor(value) for name, value in tensors.items()}
        layout = Layout.of(values)
        self.stored = torch.zeros(layout.size, dtype=dtype, device=device)
        for view, value in zip(layout.torch_views(self.stored), values.values(), strict=True):
            view.copy_(value)
        self.flat = self.stored.clone()
        self.views = dict(zip(layout.names, layout.torch_views(self.flat), strict=True))


class Borrowed:
    """A module in evaluation mode whose tensors are others' memory for the time of a ``with`` block.

    The module's own storage is never written: parameters and buffers point to the given tensors meanwhile, and back to
    their own afterwards, whatever happened in between. Tensors without a name there stay as they are. A forward pass
    that puts other tensors in their places (``self.mean = …``) is undone by `reset`.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]):
        self._module = module
        self._bound = []
        known = set()
        for name, own in _all_tensors(module):
            if (
                name in tensors and id(own) not in known
            ):  # a tied tensor has several names, perhaps only one known
                known.add(id(own))
                self._bound.append((own, tensors[name]))
        self._places: list[tuple[dict[str, Any], str, Tensor | None]] = [
            (table, name, tensor)
            for layer in module.modules()
            for table in (layer._parameters, layer._buffers)
            if type(table) is dict  # script modules have tables of their own, and replace nothing
            for name, tensor in table.items()
        ]
        self._restore: list[tuple[Tensor, Tensor]] = []
        self._training: list[tuple[nn.Module, bool]] = []

    def __enter__(self) -> Borrowed:
        self._training = [(module, module.training) for module in self._module.modules()]
        self._restore = [(own, own.data) for own, _ in self._bound]
        for own, other in self._bound:
            own.data = other
        self._module.eval()
        return self

    def reset(self) -> list[str]:
        """Put the module's own tensors back in their places. Returns the names of those that were not there."""
        moved = [place for place in self._places if place[0].get(place[1]) is not place[2]]
        for table, name, tensor in moved:
            table[name] = tensor
        return [name for _, name, _ in moved]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reset()
        for tensor, own in self._restore:
            tensor.data = own
        for module, training in self._training:
            module.training = training


def _all_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _by_dtype(
    fixed: Mapping[str, NDArray[Any] | Tensor],
    dtype: torch.dtype,
    seen_as: torch.dtype,
    unrounded: Collection[str],
) -> dict[torch.dtype, list[str]]:
    groups: dict[torch.dtype, list[str]] = {}
    for name, value in fixed.items():
        own = _as_tensor(value).dtype
        if own.is_floating_point:
            own = dtype if name in unrounded else seen_as
        groups.setdefault(own, []).append(name)
    return groups


def _as_tensor(value: NDArray[Any] | Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(value)) if not isinstance(value, Tensor) else value
