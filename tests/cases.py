"""Awkward models, each with a batch of data: every part that touches a model runs over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
SAMPLES = 24


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, batch_first=True)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.lstm(sequence)[0][:, -1])


class SeveralInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, CLASSES), nn.Linear(2, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.left(left) + self.right(right)


class CountingBuffer(nn.Module):
    """Its forward pass changes buffers, integer and float, even in evaluation mode, and its output depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("drift", torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.drift += 0.1
        return self.linear(x) * self.calls + self.drift


class ControlFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if float(x.sum()) > 0 else self.two(x)


class FunctionalBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 5))
        self.register_buffer("mean", torch.randn(CLASSES))
        self.register_buffer("variance", torch.rand(CLASSES) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x @ self.weight.T, self.mean, self.variance)


class Stochastic(nn.Module):
    """Draws random numbers in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + 0.1 * torch.randn_like(x))


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, CLASSES)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"hidden": features, "logits": self.linear(features)}


def _with_hook() -> nn.Module:
    model = nn.Linear(5, CLASSES)
    model.register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def _parametrized() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, CLASSES)
    )


def _conv(norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES)
        )
        for buffer in model.buffers():  # statistics other than 0 and 1, as after training
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        return model

    return make


def _labels() -> Tensor:
    return torch.randint(CLASSES, (SAMPLES,))


def _vectors() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 5), _labels()


def _images() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 1, 6, 6), _labels()


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    loss: str = "cross_entropy"

    def make(self) -> tuple[nn.Module, Any]:
        """The model and its data, always the same ones."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.model(), self.data()


CASES = [
    Case("mlp", lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES)), _vectors),
    Case("batch_norm", _conv(nn.BatchNorm2d), _images),
    Case("group_norm", _conv(lambda width: nn.GroupNorm(2, width)), _images),
    Case("no_norm", _conv(lambda width: nn.Identity()), _images),
    Case("dropout", lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)), _vectors),
    Case(
        "tied_weights", TiedWeights, lambda: (torch.randint(11, (SAMPLES, 3)), torch.randint(11, (SAMPLES,)))
    ),
    Case("recurrent", Recurrent, lambda: (torch.randn(SAMPLES, 4, 5), _labels())),
    Case(
        "several_inputs", SeveralInputs, lambda: (torch.randn(SAMPLES, 3), torch.randn(SAMPLES, 2), _labels())
    ),
    Case("counting_buffer", CountingBuffer, _vectors),
    Case("control_flow", ControlFlow, _vectors),
    Case("functional_batch_norm", FunctionalBatchNorm, _vectors),
    Case("stochastic", Stochastic, _vectors),
    Case("dict_batch", DictOutput, lambda: dict(zip(("features", "labels"), _vectors(), strict=True))),
    Case("hook", _with_hook, _vectors),
    Case("parametrized", _parametrized, _vectors),
    Case("old_weight_norm", lambda: nn.utils.weight_norm(nn.Linear(5, CLASSES)), _vectors),
    Case(
        "scalar_regression",
        lambda: nn.Linear(5, 1),
        lambda: (torch.randn(SAMPLES, 5), torch.randn(SAMPLES)),
        "mse",
    ),
    Case(
        "transformer",
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(24, CLASSES)
        ),
        lambda: (torch.randn(SAMPLES, 3, 8), _labels()),
    ),
    Case(
        "frozen_half",
        lambda: nn.Sequential(nn.Linear(5, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, CLASSES)),
        _vectors,
    ),
]
