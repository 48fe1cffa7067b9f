"""A model whose weights follow coordinates: θ(c) = θ0 + Σ c_k d_k, always from the stored θ0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distsurf.errors import InputError
from distsurf.subspace.weights import Layout, Subspace, Tensors

_BORROWED = "_distsurf_is_borrowed"


class MovingModel:
    """Borrows a model for the time of a ``with`` block, in evaluation mode, on a device and in a precision.

    The model's own storage is never written: parameters and buffers point to memory of ours meanwhile, and back to
    their own afterwards, whatever happened in between. ``buffers`` are the values that the model's buffers have at
    every point; what a forward pass does to them is undone before the next point.
    """

    def __init__(
        self,
        model: nn.Module,
        subspace: Subspace,
        buffers: Mapping[str, NDArray[Any] | torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.model = model
        tensors = Tensors.of(model)
        if Layout.of(tensors.parameters) != subspace.layout or list(tensors.buffers) != list(buffers):
            raise InputError(
                f"the model {type(model).__name__} has other parameters or buffers than the one that the directions "
                "were made for (on rank 0): every rank must build the same model"
            )
        self._center = torch.from_numpy(subspace.center).to(device, dtype)
        self._directions = [torch.from_numpy(d).to(device, dtype) for d in subspace.directions]
        self._theta = self._center.clone()
        self._parameters = list(tensors.parameters.values())
        self._views = subspace.layout.torch_views(self._theta)
        self._buffers = [
            _BufferGroup(group, [_as_tensor(buffers[name]) for name in names], device, dtype)
            for names, group in _by_dtype(tensors.buffers)
        ]
        self._restore: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._training: list[tuple[nn.Module, bool]] = []

    def __enter__(self) -> MovingModel:
        if getattr(self.model, _BORROWED, False):
            raise InputError(
                "this model is already being evaluated (in another thread?); give each call its own copy"
            )
        setattr(self.model, _BORROWED, True)
        self._training = [(module, module.training) for module in self.model.modules()]
        borrowed = self._parameters + [buffer for group in self._buffers for buffer in group.buffers]
        views = self._views + [view for group in self._buffers for view in group.views]
        self._restore = [(tensor, tensor.data) for tensor in borrowed]
        for tensor, view in zip(borrowed, views, strict=True):
            tensor.data = view
        self.model.eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tensor, own in self._restore:
            tensor.data = own
        for module, training in self._training:
            module.training = training
        delattr(self.model, _BORROWED)

    @torch.no_grad()
    def move_to(self, coordinates: Sequence[float]) -> None:
        """Set the weights to θ0 + Σ c_k d_k and the buffers to their stored values."""
        source = self._center
        for coordinate, direction in zip(coordinates, self._directions, strict=True):
            torch.add(source, direction, alpha=float(coordinate), out=self._theta)
            source = self._theta
        for group in self._buffers:
            group.flat.copy_(group.stored)


class _BufferGroup:
    """Buffers of one dtype as views into one flat tensor, so that one copy restores them all."""

    def __init__(
        self,
        buffers: list[torch.Tensor],
        values: list[torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ):
        own = buffers[0].dtype
        layout = Layout(tuple(map(str, range(len(buffers)))), tuple(tuple(b.shape) for b in buffers))
        self.buffers = buffers
        self.stored = torch.zeros(layout.size, dtype=dtype if own.is_floating_point else own, device=device)
        for view, value in zip(layout.torch_views(self.stored), values, strict=True):
            view.copy_(value)
        self.flat = self.stored.clone()
        self.views = layout.torch_views(self.flat)


def _by_dtype(buffers: Mapping[str, torch.Tensor]) -> list[tuple[list[str], list[torch.Tensor]]]:
    groups: dict[torch.dtype, tuple[list[str], list[torch.Tensor]]] = {}
    for name, buffer in buffers.items():
        names, tensors = groups.setdefault(buffer.dtype, ([], []))
        names.append(name)
        tensors.append(buffer)
    return list(groups.values())


def _as_tensor(value: NDArray[Any] | torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(value)) if not isinstance(value, torch.Tensor) else value
