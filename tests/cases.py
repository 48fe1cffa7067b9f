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


class Residual(nn.Module):
    """A block like those of ResNet, written as torchvision writes it: in place wherever that works."""

    def __init__(self, width: int = 8, *, keeps: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 1, stride=2), nn.BatchNorm2d(2 * width))
        self.conv3, self.bn3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(2 * width, CLASSES)
        self.keeps = keeps

    def forward(self, x: Tensor) -> Tensor:
        first = self.relu(self.norm(self.stem(x)))
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(first)))))
        y += first
        y = self.relu(y)
        z = self.relu(self.bn3(self.conv3(y)) + self.down(y)).mean((2, 3))
        return self.head(z) + (first.mean((1, 2, 3)).unsqueeze(1) if self.keeps else 0.0)


class PreActivation(nn.Module):
    """Batch norms that come before their convolutions, one that follows another's, and one that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm0, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3)
        self.norm1, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=3, dilation=2)
        self.norm2 = nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm0(x)))
        z = self.conv2(torch.relu(self.norm1(y)))
        return self.head((self.norm2(z).relu()).mean((2, 3)) + y.mean((2, 3)))


class SharedLayers(nn.Module):
    """One convolution used twice, one weight in two layers, one batch norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.left, self.right = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.right.weight = self.left.weight
        self.own, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)) + self.norm(self.conv(x.flip(3)))
        return self.head(F.relu(self.own(self.left(x)) + self.other(self.right(x))).mean((2, 3)))


class OldView(nn.Module):
    """Flattens activations with ``view``, which fails on channels-last ones; batch norm without running statistics."""

    def __init__(self, statistics: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, padding="same", padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4, track_running_stats=statistics)
        self.head = nn.Linear(4 * 24 * 24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return self.head(y.view(len(x), -1) if isinstance(x, Tensor) else y.flatten(1))


class BranchingImages(nn.Module):
    """Control flow over data, with layers that could otherwise be folded and fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return self.head(y.mean((2, 3)) if float(y.sum()) > 0 else -y.amax((2, 3)))


class CountingImages(nn.Module):
    """A buffer that a forward pass changes, which a trace would take for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3))) * self.calls


class CountingInAPart(nn.Module):
    """A counter in a sub-module, of whole numbers, that is 1 in the first batch of a point: as when it was traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CountingImages()
        self.inner.calls = torch.zeros((), dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        self.inner.calls.add_(1)
        inner = self.inner
        return inner.head(F.relu(inner.norm(inner.conv(x))).mean((2, 3))) * (1 + 0.5 * inner.calls)


class ReplacingImages(nn.Module):
    """Puts another tensor in a buffer's place, and of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)
        self.register_buffer("seen", torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(F.relu(self.norm(self.conv(x))).mean((2, 3))) + self.seen
        self.seen = 0.9 * self.seen + 0.1 * y.mean(0)
        return y


def _hooked_images() -> nn.Module:
    model = Residual()
    model.bn1.register_forward_hook(lambda module, inputs, output: output + 1)
    return model


def _parametrized_images() -> nn.Module:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    return nn.Sequential(
        conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )


def _trained(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """With statistics, scales and shifts other than 0 and 1, as after training; about half of all units alive."""

    def made() -> nn.Module:
        model = make()
        for layer in model.modules():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                for tensor, low, high in (
                    (layer.weight, 0.5, 1.5),
                    (layer.bias, -0.3, 0.3),
                    (layer.running_mean, -0.2, 0.2),
                    (layer.running_var, 0.1, 0.5),
                ):
                    if tensor is not None:
                        tensor.detach().uniform_(low, high)
        return model

    return made


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


def _pictures() -> tuple[Tensor, Tensor]:
    """Large enough for channels-last to pay on a CPU."""
    return torch.randn(SAMPLES, 3, 24, 24), _labels()


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
        "linear_batch_norm",
        _trained(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))),
        _vectors,
    ),
    Case("residual", _trained(Residual), _pictures),
    Case("residual_read_later", _trained(lambda: Residual(keeps=True)), _pictures),
    Case("pre_activation", _trained(PreActivation), _pictures),
    Case("shared_layers", _trained(SharedLayers), _pictures),
    Case("old_view", _trained(OldView), _pictures),
    Case("batch_statistics", lambda: OldView(statistics=False), _pictures),
    Case("branching_images", _trained(BranchingImages), _pictures),
    Case("counting_images", _trained(CountingImages), _pictures),
    Case("counting_in_a_part", _trained(CountingInAPart), _pictures),
    Case("replacing_images", _trained(ReplacingImages), _pictures),
    Case("hooked_images", _trained(_hooked_images), _pictures),
    Case("parametrized_images", _trained(_parametrized_images), _pictures),
    Case(
        "frozen_half",
        lambda: nn.Sequential(nn.Linear(5, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, CLASSES)),
        _vectors,
    ),
]
