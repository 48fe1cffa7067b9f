"""First and second derivatives of a mean loss with respect to a model's parameters, where the model is now.

Hessian-vector products are double backward: ∂/∂w (∇L · v). Measured on two cores with a ResNet-20 on digits, forward
mode over reverse (``torch.func.jvp`` of ``grad``) took 1.3 times as long, and graphs of gradients that are kept from
one product to the next save a fifth of the time (`python -m tests.bench_curvature`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distsurf.errors import InputError, in_one_line
from distsurf.objective.losses import Objective
from distsurf.subspace.weights import Layout

KEPT_BYTES = 1 << 30
"""Graphs of gradients are kept for further products as long as they take no more memory than this."""


class Derivatives:
    """Derivatives of an objective's first column, the mean over ``batches()``, as flat vectors of a ``layout``.

    ``names``: the parameters that are moved; entries of all others, and padding, are zero. Sums over batches are in
    float64, whatever the batches are the mean is that of the samples. Use it where gradients may be recorded
    (`torch.no_grad` is lifted), and call `forget` when weights have changed.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Callable[[], Iterable[Any]],
        layout: Layout,
        names: Collection[str],
        *,
        seed: int = 0,
    ):
        """``seed``: random numbers that the model draws are the same in every pass."""
        self._model, self._objective, self._batches = model, objective, batches
        parameters = dict(model.named_parameters())
        self._parameters = [parameters[name] for name in names]
        self._views = [layout.names.index(name) for name in names]
        self._layout, self._seed = layout, seed
        self._kept: list[Sequence[Tensor]] | None = None
        self._count = 0.0
        self.products = 0
        """Hessian-vector products so far."""

    def forget(self) -> None:
        """Weights or data have changed."""
        self._kept = None

    def loss(self) -> float:
        """L itself."""
        total = 0.0
        torch.manual_seed(self._seed)
        with torch.no_grad():
            for batch in self._each():
                part, count = next(iter(self._objective(self._model, batch).values()))
                total += float(part)
                self._count += float(count)
        return total / self._count

    def gradient(self) -> tuple[float, Tensor]:
        """L and ∇L, ``(layout.size,)`` float64. Raises InputError where the loss is not differentiable."""
        value = 0.0
        result, add = self._sum()
        with self._recording():
            for batch in self._each():
                total = self._loss(batch)
                value += float(total.detach())
                add(torch.autograd.grad(total, self._parameters, allow_unused=True))
        return value / self._count, result / self._count

    def product(self, vector: Tensor) -> Tensor:
        """∇²L · v, ``(layout.size,)`` float64, for a vector of that length.

        Raises InputError where the loss is not differentiable twice, naming the layer if that can be known.
        """
        self.products += 1
        pieces = self._layout.torch_views(vector)
        along = [pieces[k].to(parameter) for k, parameter in zip(self._views, self._parameters, strict=True)]
        result, add = self._sum()
        with self._recording():
            for gradients, is_kept in self._gradients():
                pairs = [(g, v) for g, v in zip(gradients, along, strict=True) if g.requires_grad]
                if not pairs:  # linear in all parameters
                    continue
                outputs, weights = zip(*pairs, strict=True)
                try:
                    add(
                        torch.autograd.grad(
                            outputs, self._parameters, weights, retain_graph=is_kept, allow_unused=True
                        )
                    )
                except (RuntimeError, NotImplementedError) as error:
                    raise InputError(self.not_twice(in_one_line(error)[:160])) from error
        return result / self._count

    def _sum(self) -> tuple[Tensor, Callable[[Sequence[Tensor | None]], None]]:
        device = self._parameters[0].device
        result = torch.zeros(self._layout.size, dtype=torch.float64, device=device)
        views = self._layout.torch_views(result)

        def add(parts: Sequence[Tensor | None]) -> None:
            for k, part in zip(self._views, parts, strict=True):
                if part is not None:
                    views[k].add_(part.detach())

        return result, add

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """With gradients of the parameters, whatever the user has set."""
        before = [parameter.requires_grad for parameter in self._parameters]
        try:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            # Of the kernels of attention, only the plain one has second derivatives.
            with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                torch.manual_seed(self._seed)
                yield
        finally:
            for parameter, was in zip(self._parameters, before, strict=True):
                parameter.requires_grad_(was)

    def _each(self) -> Iterator[Any]:
        self._count = 0.0
        yield from self._batches()

    def _loss(self, batch: Any) -> Tensor:
        """The sum over a batch; its samples are counted."""
        column, (total, count) = next(iter(self._objective(self._model, batch).items()))
        if not (isinstance(total, Tensor) and total.requires_grad):
            raise InputError(f"{column} of the objective is not differentiable with respect to the weights")
        self._count += float(count)
        return total

    def _gradients(self) -> Iterator[tuple[Sequence[Tensor], bool]]:
        """∇ of each batch's sum with the graph that leads to it, and whether that is kept for the next product."""
        if self._kept is not None:
            yield from ((gradients, True) for gradients in self._kept)
            return
        kept: list[Sequence[Tensor]] = []
        held = 0
        is_kept = True
        for batch in self._each():
            bytes_of_one = _Bytes()
            with bytes_of_one:
                gradients = self._gradient_with_graph(batch)
            held += bytes_of_one.total
            is_kept &= held <= KEPT_BYTES
            if is_kept:
                kept.append(gradients)
            else:
                kept.clear()
            yield gradients, is_kept
        self._kept = kept if is_kept else None

    def _gradient_with_graph(self, batch: Any) -> Sequence[Tensor]:
        total = self._loss(batch)
        try:
            found = torch.autograd.grad(total, self._parameters, create_graph=True, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(f"the loss has no gradient: {in_one_line(error)}") from error
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, self._parameters, strict=True)]

    def not_twice(self, why: str) -> str:
        """What to say of a model without second derivatives, with the first layer that has none."""
        layer = _without_second_derivative(self._model, self._objective, next(iter(self._batches())))
        where = f"the layer {layer}" if layer else "the model or its loss"
        return (
            f"no curvature: {where} cannot be differentiated twice ({why}); a fused kernel may have a plain form that "
            "can"
        )


class _Bytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the memory that the graphs made in a ``with`` block hold."""

    def __init__(self) -> None:
        self.total = 0
        self._known: set[int] = set()
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def _without_second_derivative(model: nn.Module, objective: Objective, batch: Any) -> str:
    """The first layer, in the order of a pass, that fails alone; empty if none does."""
    calls: list[tuple[str, nn.Module, tuple[Any, ...]]] = []

    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, given: calls.append((name, layer, given))

    hooks = [
        layer.register_forward_pre_hook(noting(name))
        for name, layer in model.named_modules()
        if not any(True for _ in layer.children()) or isinstance(layer, nn.MultiheadAttention)
    ]
    try:
        with torch.no_grad():
            objective(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer, given in calls:
        inputs = [
            t.detach().clone().requires_grad_(True) if isinstance(t, Tensor) and t.is_floating_point() else t
            for t in given
        ]
        wanted = [t for t in [*inputs, *layer.parameters()] if isinstance(t, Tensor) and t.requires_grad]
        before = [t.grad for t in wanted]
        try:
            outputs = layer(*inputs)
            first = outputs if isinstance(outputs, Tensor) else outputs[0]
            found = torch.autograd.grad(first.square().sum(), wanted, create_graph=True, allow_unused=True)
            total = sum(g.square().sum() for g in found if g is not None)
            if isinstance(total, Tensor) and total.requires_grad:
                # To every leaf: on the way to `wanted` alone, torch would pass by what has no second derivative.
                total.backward()
        except (RuntimeError, NotImplementedError):
            return f"{name} ({type(layer).__name__})" if name else type(layer).__name__
        except Exception:  # arguments by keyword, or a layer that cannot be called alone
            continue
        finally:
            for tensor, grad in zip(wanted, before, strict=True):
                tensor.grad = grad
    return ""
