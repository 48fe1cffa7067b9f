"""A network in its plane, and the same network at work: on a device, in a precision, at coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

from distsurf.evaluator import Stopped
from distsurf.objective.data import tensors_of
from distsurf.objective.fast.fold import FoldedTensors, Folding
from distsurf.objective.fast.graph import CapturedTotals, Totals
from distsurf.objective.fast.many import Stack
from distsurf.objective.losses import Objective
from distsurf.objective.precision import Precision, arithmetic
from distsurf.subspace.moving import Borrowed, MovingTensors
from distsurf.subspace.weights import Subspace, batch_norm_statistics


@dataclass(frozen=True)
class Network:
    """A module and the tensors that it has at given coordinates: ``subspace`` moves, ``fixed`` does not.

    With a ``folding``, subspace and fixed tensors are those of the network before its batch norms were folded, and the
    module's own are computed from them at every point.
    """

    module: nn.Module
    subspace: Subspace
    fixed: Mapping[str, Any]
    folding: Folding | None = None
    channels_last: bool = False
    is_traced: bool = False
    """Whether the module is a graph of ours rather than the user's own."""
    untraceable: str = ""
    """Why a graph of the module would not do what the module does, if that is known."""
    points_per_pass: int = 1
    is_captured: bool = False
    """Whether its passes are CUDA graphs."""


@dataclass(frozen=True)
class Recomputation:
    """Batch-norm statistics anew at every point, from what ``batches()`` gives, in this order."""

    batches: Callable[[], Iterable[Any]]


class Running:
    """A network at work; use in a ``with`` block, for which it borrows the module.

    `move_to` sets the coordinates, `totals` gives the objective's sums and counts of a batch.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        *,
        device: torch.device,
        precision: Precision,
        recomputation: Recomputation | None = None,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.network = network
        self.device = device
        self.precision = precision
        self._objective = objective
        self._stop = stop
        self._recomputation = recomputation
        module = network.module
        # What is rounded is what the module computes with; a folding's sources stay in full precision.
        is_source = network.folding is not None
        self._tensors = MovingTensors(
            network.subspace,
            network.fixed,
            device=device,
            dtype=precision.sums,
            seen_as=precision.sums if is_source else precision.compute,
            unrounded=_of_batch_norm(module),
        )
        self._folded: FoldedTensors | None = None
        seen = self._tensors.seen
        if network.folding is not None:
            self._folded = FoldedTensors(
                network.folding,
                self._tensors.values,
                device=device,
                dtype=precision.sums,
                seen_as=precision.compute,
                unrounded=_of_batch_norm(module),
            )
            seen = self._folded.seen
        self._borrowings = [Borrowed(module, seen)]
        self.model = self._with_entrance(module)
        self._stack: Stack | None = None
        if network.points_per_pass > 1:
            source = self._tensors.moving if self._folded is None else self._folded.tensors
            self._stack = Stack(network.points_per_pass, source.layout, source.flat_seen, seen)
        self._captured = CapturedTotals(self._batch_totals) if network.is_captured else None
        # Statistics are those of a module whose batch norms are still there.
        self._learner = self.model
        if recomputation is not None:
            if network.folding is not None:
                self._learner = network.folding.unfolded
                self._borrowings.append(Borrowed(self._learner, self._tensors.values))
            unfolded = module if network.folding is None else network.folding.unfolded
            self._statistics = [self._tensors.values[name] for name in batch_norm_statistics(unfolded)]
        self._entered = ExitStack()

    def __enter__(self) -> Running:
        with ExitStack() as stack:
            for borrowing in self._borrowings:
                stack.enter_context(borrowing)
            self._entered = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The state of torch in which batches are evaluated: no gradients, the precision, random numbers restored.

        Inference mode only where the module is ours: a user's model may keep what it computed, and could not train
        with such tensors afterwards.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        mode = torch.inference_mode() if self.network.is_traced else torch.no_grad()
        with mode, arithmetic(self.precision), torch.random.fork_rng(devices=devices):
            yield

    def move_to(self, coordinates: NDArray[np.float64]) -> None:
        """Set the weights, and the batch-norm statistics where they are recomputed. May raise `Stopped`.

        ``coordinates`` ``(P, D)`` are those of as many points as one pass evaluates, or fewer.
        """
        for borrowing in self._borrowings:
            borrowing.reset()
        for row in range(self.network.points_per_pass):
            self._tensors.move_to(coordinates[min(row, len(coordinates) - 1)].tolist())
            if self._recomputation is not None:
                self._recompute(self._recomputation)
            if self._folded is not None:
                self._folded.refresh()
            if self._stack is not None:
                self._stack.put(row)

    def shift(self, vector: Tensor, by: float) -> None:
        """Add a vector of the subspace's layout to the weights, for this point."""
        with torch.no_grad():
            self._tensors.moving.flat.add_(vector, alpha=by)
            self._tensors.moving.publish()

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers as they are now."""
        return self._tensors.copies()

    def changed(self, before: Mapping[str, Tensor]) -> list[str]:
        """Names of buffers that are not what they were ``before``, or were replaced; the next move undoes that."""
        replaced = [name for borrowing in self._borrowings for name in borrowing.reset()]
        now = self._tensors.copies()
        return [
            *(n for n, was in before.items() if not torch.equal(was.nan_to_num(), now[n].nan_to_num())),
            *replaced,
        ]

    def totals(self, batch: Any) -> Totals:
        """The objective's sums and counts of one batch: numbers, or ``(points_per_pass,)`` where that is above 1."""
        return self._batch_totals(batch) if self._captured is None else self._captured(batch)

    def _batch_totals(self, batch: Any) -> Totals:
        if self._stack is not None:
            return self._stack.totals(self.network.module, self._with_entrance, self._objective, batch)
        return self._objective(self.model, batch)

    def _with_entrance(self, module: nn.Module) -> nn.Module:
        if self.network.channels_last or self.precision.compute != self.precision.sums:
            return Entrance(module, self.precision.compute, self.network.channels_last)
        return module

    def _recompute(self, wish: Recomputation) -> None:
        """Mean of the batches' means and of their unbiased variances, weighted by samples, summed in float64.

        As Garipov et al. 2018 and torch's ``update_bn`` do, each layer sees inputs that were normalized with the
        statistics of their own batch; a layer that is called several times in a pass gets the mean of its calls.
        """
        layers = [
            m for m in self._learner.modules() if isinstance(m, _NormBase) and m.running_mean is not None
        ]
        momenta = [layer.momentum for layer in layers]
        sums = [torch.zeros_like(statistic, dtype=torch.float64) for statistic in self._statistics]
        samples = 0
        try:
            for layer in layers:
                # None: the mean over the calls since the count was zero. Layers that do not count forget all others.
                layer.training, layer.momentum = True, None if layer.num_batches_tracked is not None else 1.0
            for batch in wish.batches():
                if self._stop():
                    raise Stopped
                for layer in layers:
                    if layer.num_batches_tracked is not None:
                        layer.num_batches_tracked.zero_()
                with torch.inference_mode(False), torch.no_grad():  # the learner may be the user's own module
                    self._objective(self._learner, batch)
                count = len(tensors_of(batch)[0])
                samples += count
                for total, statistic in zip(sums, self._statistics, strict=True):
                    total.add_(statistic, alpha=count)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.training, layer.momentum = False, momentum
        for total, statistic in zip(sums, self._statistics, strict=True):
            statistic.copy_(total / samples)


class Entrance(nn.Module):
    """Gives a module its floating-point inputs in its own dtype and memory format, and its outputs back in float32."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, channels_last: bool):
        super().__init__()
        self.module = module
        self._dtype = dtype
        self._channels_last = channels_last

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The module's outputs."""
        arguments, named = tree_map(self._inward, (arguments, named))
        outputs = self.module(*arguments, **named)
        if self._dtype in (torch.float32, torch.float64):
            return outputs
        return tree_map(_outward, outputs)

    def __getattr__(self, name: str) -> Any:
        """What an objective asks of its model beside calling it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def __getitem__(self, key: Any) -> Any:
        """A part of a module that has parts."""
        part: Any = self.module
        return part[key]

    def _inward(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = self._dtype if value.is_floating_point() else value.dtype
        if self._channels_last and value.ndim == 4:
            return value.to(dtype, memory_format=torch.channels_last)
        return value.to(dtype)


def _outward(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _of_batch_norm(module: nn.Module) -> frozenset[str]:
    """Names of the tensors of batch-norm layers, which compute in float32 whatever their inputs are."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if isinstance(layer, _NormBase)
        for name, _ in [*layer.named_parameters(), *layer.named_buffers()]
    )
