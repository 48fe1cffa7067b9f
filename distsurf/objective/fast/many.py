"""Several grid points in one pass over the data, for networks too small to fill a GPU.

`torch.func.vmap` turns the layers of all points into one batched kernel each. Only on GPUs: one point fills a CPU, and
several are slower there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distsurf.objective.losses import Objective
from distsurf.subspace.weights import Layout


class Stack:
    """The tensors of several points, ``(points, size)``, and the objective of all of them at once.

    Its size never changes: whoever has fewer points fills the rest with copies, so that the kernels stay the same.
    """

    def __init__(self, points: int, layout: Layout, flat: Tensor, names: Mapping[str, Any]):
        self._rows = flat.new_zeros((points, layout.size))
        self._source = flat
        views = [layout.torch_views(row) for row in self._rows]
        # Strided views over all rows at once, with the layout's memory format in each.
        self.tensors = {
            name: torch.as_strided(
                self._rows,
                (points, *view.shape),
                (layout.size, *view.stride()),
                view.storage_offset(),
            )
            for name, view in zip(layout.names, views[0], strict=True)
            if name in names
        }

    def put(self, row: int) -> None:
        """Take the tensors of one point from where they were computed."""
        self._rows[row].copy_(self._source)

    def totals(
        self, module: nn.Module, wrap: Any, objective: Objective, batch: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums and counts ``(points,)`` of a batch. ``wrap`` is put around the module at one point."""

        def one(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
            totals = objective(wrap(_At(module, tensors)), batch)
            return {name: (_as_tensor(s, batch), _as_tensor(n, batch)) for name, (s, n) in totals.items()}

        return torch.func.vmap(one, randomness="same")(self.tensors)


class _At(nn.Module):
    """A module called with other tensors than its own."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]):
        super().__init__()
        self._call = (module, tensors)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return torch.func.functional_call(*self._call, arguments, named)


def _as_tensor(value: Any, batch: Any) -> Tensor:
    from distsurf.objective.data import tensors_of

    if isinstance(value, Tensor):
        return value.to(torch.float64).reshape(())
    return torch.tensor(float(value), dtype=torch.float64, device=tensors_of(batch)[0].device)
