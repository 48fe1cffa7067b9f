"""Losses and metrics by plain name, and the objective that is made of them.

An *objective* is a callable ``(model, batch) -> {name: (sum, count)}``: sums over the batch, so that any split into
batches gives the same mean. `Supervised` builds one from names; users may bring their own. Sums are float64.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distsurf.errors import InputError
from distsurf.names import nearest

Total = tuple[Tensor, "Tensor | int"]
Objective = Callable[[nn.Module, Any], Mapping[str, tuple[Any, Any]]]
TARGET_KEYS = ("target", "targets", "label", "labels", "y")


def _sum(elements: Tensor) -> Total:
    return elements.sum(dtype=torch.float64), elements.numel()


def _class_ids(outputs: Tensor, targets: Tensor) -> Tensor:
    """Targets as int64 class numbers for outputs ``(N, C, …)``; InputError if they are not that."""
    if outputs.ndim < 2 or targets.shape != outputs.shape[:1] + outputs.shape[2:]:
        raise InputError(
            f"class numbers of shape {tuple(outputs.shape[:1] + outputs.shape[2:])} were expected for outputs of "
            f"shape {tuple(outputs.shape)}, targets of shape {tuple(targets.shape)} were given"
        )
    if targets.is_floating_point():
        raise InputError(f"class numbers were expected as targets, {targets.dtype} was given")
    return targets if targets.dtype == torch.int64 else targets.long()


def _same_shape(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and real-valued targets of one shape; a trailing 1 may be left out, nothing else broadcasts."""
    if outputs.shape != targets.shape and outputs.squeeze(-1).shape == targets.squeeze(-1).shape:
        outputs, targets = outputs.squeeze(-1), targets.squeeze(-1)
    if outputs.shape != targets.shape:
        raise InputError(
            f"targets of shape {tuple(targets.shape)} were given for outputs of shape {tuple(outputs.shape)}"
        )
    return outputs, targets.to(outputs.dtype)


def cross_entropy(
    outputs: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100
) -> Total:
    """Softmax cross-entropy of logits ``(N, C, …)`` and class numbers, or class probabilities of that shape."""
    if targets.is_floating_point() and targets.shape == outputs.shape:
        loss = F.cross_entropy(outputs, targets, reduction="none", label_smoothing=label_smoothing)
        return _sum(loss)
    ids = _class_ids(outputs, targets)
    loss = F.cross_entropy(
        outputs, ids, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index
    )
    return loss.sum(dtype=torch.float64), (ids != ignore_index).sum()


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Total:
    """Logistic loss of logits and targets in [0, 1] of the same shape."""
    outputs, targets = _same_shape(outputs, targets)
    return _sum(F.binary_cross_entropy_with_logits(outputs, targets, reduction="none"))


def mse(outputs: Tensor, targets: Tensor) -> Total:
    """Squared error, mean over all elements."""
    outputs, targets = _same_shape(outputs, targets)
    return _sum((outputs - targets).square())


def mae(outputs: Tensor, targets: Tensor) -> Total:
    """Absolute error, mean over all elements."""
    outputs, targets = _same_shape(outputs, targets)
    return _sum((outputs - targets).abs())


def huber(outputs: Tensor, targets: Tensor, *, delta: float = 1.0) -> Total:
    """Huber's loss: quadratic up to ``delta``, linear beyond (Huber 1964)."""
    outputs, targets = _same_shape(outputs, targets)
    return _sum(F.huber_loss(outputs, targets, reduction="none", delta=delta))


def hinge(outputs: Tensor, targets: Tensor, *, margin: float = 1.0) -> Total:
    """Hinge loss.

    Scores ``(N, C)`` and class numbers: mean over classes of max(0, margin − s_y + s_j) (torch's multi-margin);
    one score and targets −1 or +1: max(0, margin − y·s).
    """
    if outputs.ndim == 2 and targets.ndim == 1 and outputs.shape[1] > 1:
        ids = _class_ids(outputs, targets)
        return _sum(F.multi_margin_loss(outputs, ids, margin=margin, reduction="none"))
    outputs, targets = _same_shape(outputs, targets)
    return _sum((margin - targets * outputs).clamp(min=0))


def focal(outputs: Tensor, targets: Tensor, *, gamma: float = 2.0) -> Total:
    """Focal loss −(1 − p_y)^γ log p_y of logits ``(N, C, …)`` (Lin et al. 2017, eq. 4)."""
    log_p = F.log_softmax(outputs, dim=1).gather(1, _class_ids(outputs, targets).unsqueeze(1))
    return _sum(-((1 - log_p.exp()) ** gamma) * log_p)


def _hits(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.ndim < 2 or outputs.shape[1:] == (1,):  # one logit, targets 0/1 or −1/+1
        outputs, targets = _same_shape(outputs, targets)
        return (outputs > 0) == (targets > 0)
    if targets.is_floating_point() and targets.shape == outputs.shape:  # class probabilities
        return outputs.argmax(dim=1) == targets.argmax(dim=1)
    return outputs.argmax(dim=1) == _class_ids(outputs, targets)


def binary_accuracy(outputs: Tensor, targets: Tensor) -> Total:
    """Percentage of right decisions where every element is one: logits against targets 0/1 or −1/+1."""
    outputs, targets = _same_shape(outputs, targets)
    hits = (outputs > 0) == (targets > 0)
    return 100.0 * hits.sum(dtype=torch.float64), hits.numel()


def accuracy(outputs: Tensor, targets: Tensor) -> Total:
    """Percentage of right classes; of two classes where there is one logit per sample."""
    hits = _hits(outputs, targets)
    return 100.0 * hits.sum(dtype=torch.float64), hits.numel()


def error(outputs: Tensor, targets: Tensor) -> Total:
    """Percentage of wrong classes: 100 − accuracy."""
    hits = _hits(outputs, targets)
    return 100.0 * (~hits).sum(dtype=torch.float64), hits.numel()


def top5(outputs: Tensor, targets: Tensor, *, k: int = 5) -> Total:
    """Percentage of samples whose class is among the ``k`` highest logits."""
    ids = _class_ids(outputs, targets).unsqueeze(1)
    hits = (outputs.topk(min(k, outputs.shape[1]), dim=1).indices == ids).any(dim=1)
    return 100.0 * hits.sum(dtype=torch.float64), hits.numel()


LOSSES: dict[str, Callable[..., Total]] = {
    "cross_entropy": cross_entropy,
    "label_smoothing": functools.partial(cross_entropy, label_smoothing=0.1),
    "binary_cross_entropy": binary_cross_entropy,
    "mse": mse,
    "mae": mae,
    "huber": huber,
    "hinge": hinge,
    "focal": focal,
}
METRICS: dict[str, Callable[..., Total]] = {
    "accuracy": accuracy,
    "binary_accuracy": binary_accuracy,
    "error": error,
    "top5": top5,
}
METRIC_OF = {
    "cross_entropy": "accuracy",
    "label_smoothing": "accuracy",
    "binary_cross_entropy": "binary_accuracy",
    "hinge": "accuracy",
    "focal": "accuracy",
}
"""The metric that goes with a classification loss if none is asked for."""


@dataclass(frozen=True)
class Term:
    """One column of an objective: a function ``(outputs, targets) -> (sum, count)`` and its unit."""

    name: str
    function: Callable[[Tensor, Tensor], Total]
    unit: str = ""
    is_users: bool = False

    @classmethod
    def named(cls, kind: str, parameters: Mapping[str, Any], name: str | None = None) -> Term:
        """A registered loss or metric. Raises InputError for an unknown name or parameter."""
        known = LOSSES | METRICS
        if kind not in known:
            raise InputError(f"no loss or metric {kind!r}; {nearest(kind, known)}")
        function = known[kind]
        allowed = [
            p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
        ]
        for parameter in parameters:
            if parameter not in allowed:
                takes = ", ".join(allowed) or "none"
                raise InputError(f"{kind} has no parameter {parameter!r}; its parameters: {takes}")
        return cls(name or kind, functools.partial(function, **parameters), "%" if kind in METRICS else "")

    @classmethod
    def users(cls, loss: Callable[[Any, Any], Tensor], name: str = "loss") -> Term:
        """A user's ``loss(outputs, targets)``: one value per sample (or element), or their mean or sum."""
        is_sum = getattr(loss, "reduction", None) == "sum"

        def function(outputs: Tensor, targets: Tensor) -> Total:
            value = loss(outputs, targets)
            if not isinstance(value, Tensor):
                raise InputError(f"the loss returned {type(value).__name__}; expected a tensor")
            if value.ndim:
                return _sum(value)
            count = len(targets)
            return value.double() * (1 if is_sum else count), count

        return cls(name, function, is_users=True)


class Supervised:
    """The objective of a model with inputs and targets: several terms from one forward pass.

    Batches are ``(inputs, targets)`` (more than two entries: all but the last are inputs), or dicts whose entry
    ``target_key`` holds the targets; the others are given to the model by name. Inputs in a tuple are given as
    arguments, in a dict by name. Outputs that are not a tensor are taken by their ``logits``, or the first of a
    tuple.
    """

    def __init__(self, terms: Sequence[Term], target_key: str | None = None):
        names = [term.name for term in terms]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two terms are called {name!r}: give one of them another name with 'as'")
        self.terms = tuple(terms)
        self.target_key = target_key
        self.has_users_loss = any(term.is_users for term in self.terms)
        self.units = {term.name: term.unit for term in terms}

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Total]:
        """Sums and counts of every term."""
        outputs, targets = self._forward(model, batch)
        return {term.name: term.function(outputs, targets) for term in self.terms}

    def check(self, model: nn.Module, batch: Any) -> None:
        """Raise InputError if a user's loss is not a mean over samples, which no sum of batches can honour."""
        users = [term for term in self.terms if term.is_users]
        if not users:
            return
        outputs, targets = self._forward(model, batch)
        third = len(targets) // 3  # two parts of unequal size, which weighted means tell apart more surely
        if not isinstance(outputs, Tensor) or third == 0:
            return
        for term in users:
            whole, first, second = (
                float(term.function(outputs[part], targets[part])[0])
                for part in (slice(None), slice(third), slice(third, None))
            )
            if abs(whole - first - second) > 1e-5 * max(abs(whole), abs(first) + abs(second)):
                raise InputError(
                    f"the loss {term.name!r} is not a mean over samples (class weights? ignored targets?): a batch "
                    f"sums to {whole:.6g}, its parts to {first + second:.6g}. Return one value per sample "
                    "(reduction='none'), or give an objective (model, batch) -> {name: (sum, count)}"
                )

    def _forward(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        inputs, targets = self._divide(batch)
        if isinstance(inputs, Mapping):
            outputs = model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            outputs = model(*inputs)
        else:
            outputs = model(inputs)
        if not isinstance(outputs, Tensor):
            outputs = _main_output(outputs)
        return outputs, targets

    def _divide(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            keys = [self.target_key] if self.target_key else [key for key in TARGET_KEYS if key in batch]
            if len(keys) != 1 or keys[0] not in batch:
                wanted = repr(self.target_key) if self.target_key else f"one of {', '.join(TARGET_KEYS)}"
                raise InputError(
                    f"which entry of the batch holds the targets? It has {', '.join(map(str, batch))}; "
                    f"expected {wanted}; name it with data.target"
                )
            return {key: value for key, value in batch.items() if key != keys[0]}, batch[keys[0]]
        if isinstance(batch, (tuple, list)) and len(batch) >= 2:
            inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
            return inputs, batch[-1]
        raise InputError(
            "a loss by name needs batches (inputs, targets) or dicts with a target; "
            "for other batches give an objective (model, batch) -> {name: (sum, count)}"
        )


def _main_output(outputs: Any) -> Any:
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    if hasattr(outputs, "logits"):
        return outputs.logits
    if isinstance(outputs, (tuple, list)) and outputs:
        return outputs[0]
    raise InputError(
        f"the model returned {type(outputs).__name__}; expected a tensor, a tuple that begins with one, "
        "or something with logits"
    )
