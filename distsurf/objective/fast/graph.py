"""A batch's forward pass and objective as one CUDA graph: launched as a whole instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distsurf.objective.data import describe, map_tree, tensors_of

Totals = Mapping[str, tuple[Any, Any]]
WARM_UP = 3
"""Passes before the capture, in which libraries choose their algorithms and allocate their workspaces."""


class CapturedTotals:
    """``totals(batch)`` as CUDA graphs, one for each shape of batch.

    Weights lie at fixed addresses, so a graph sees every new point. What the objective does on the host happens once,
    at the capture: an objective that waits for the device (``.item()``) cannot be captured, and raises there.
    """

    def __init__(self, totals: Callable[[Any], Totals]):
        self._totals = totals
        self._graphs: dict[str, tuple[torch.cuda.CUDAGraph, list[Tensor], Totals]] = {}
        self._pool: Any = None

    def __call__(self, batch: Any) -> Totals:
        """The objective's sums and counts of one batch."""
        shape = describe(batch)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(batch)
        graph, inputs, totals = self._graphs[shape]
        for held, given in zip(inputs, tensors_of(batch), strict=True):
            held.copy_(given)
        graph.replay()
        # The next replay writes to the same memory.
        return {name: (_kept(total), _kept(count)) for name, (total, count) in totals.items()}

    def _capture(self, batch: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Totals]:
        held = map_tree(torch.clone, batch)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._totals(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # One memory for all: they run one after the other, and what one gives is copied before the next.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            totals = dict(self._totals(held))
        return graph, tensors_of(held), totals


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
