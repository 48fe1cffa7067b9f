"""Residual networks: the published parameter counts, shapes, and what a shortcut does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distsurf import zoo
from distsurf.errors import InputError
from distsurf.zoo.resnet import BasicBlock, resnet


@pytest.mark.parametrize(
    ("depth", "width", "shortcuts", "total", "moved"),
    [
        # All parameters, and those of dimension > 1, of the networks of Li et al. 2018.
        (20, 16, True, 272_474, 270_896),
        (56, 16, True, 855_770, 851_504),
        (56, 16, False, 853_018, 848_944),
        (110, 16, True, 1_730_714, 1_722_416),
        (56, 128, True, 54_470_282, 54_436_224),
    ],
)
def test_published_parameter_counts(depth: int, width: int, shortcuts: bool, total: int, moved: int) -> None:
    with torch.device("meta"):
        parameters = list(resnet(depth, width=width, shortcuts=shortcuts).parameters())
    assert sum(p.numel() for p in parameters) == total
    assert sum(p.numel() for p in parameters if p.dim() > 1) == moved


@pytest.mark.parametrize("name", [name for name in zoo.MODELS if name.startswith("resnet")])
def test_every_registered_model(name: str) -> None:
    model = zoo.model(name, width=4, num_classes=7, in_channels=2).eval()
    depth = int(name.removeprefix("resnet").removesuffix("-noshort"))
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sum(tuple(getattr(m, "kernel_size", (0, 0))) != (1, 1) for m in weighted) == depth
    assert any("shortcut" in key for key in model.state_dict()) == (not name.endswith("-noshort"))
    with torch.inference_mode():
        for size in (8, 9, 32):
            scores = model(torch.randn(3, 2, size, size))
            assert scores.shape == (3, 7)
            assert scores.isfinite().all()


def test_default_is_for_cifar() -> None:
    with torch.inference_mode():
        assert zoo.model("resnet8").eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_checkpoint_names_of_the_public_code() -> None:
    keys = resnet(8).state_dict().keys()
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv2.weight", "linear.bias"} <= keys
    assert {"layer2.0.shortcut.0.weight", "layer3.0.shortcut.1.weight"} <= keys
    assert not any(key.startswith("layer1.0.shortcut") for key in keys)


@pytest.mark.parametrize("shortcuts", [True, False])
def test_block_with_nothing_to_add(shortcuts: bool) -> None:
    """With a second convolution of zero, a block is the identity on what is positive, or zero without shortcut."""
    block = BasicBlock(8, 8, 1, shortcuts).eval()
    nn.init.zeros_(block.conv2.weight)
    images = torch.rand(2, 8, 5, 5)
    torch.testing.assert_close(block(images), images if shortcuts else torch.zeros_like(images))


def test_kaiming_initialization() -> None:
    torch.manual_seed(0)
    weight = resnet(8, width=64).state_dict()["layer3.0.conv2.weight"]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.01)


def test_one_seed_one_network() -> None:
    def weights() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return list(resnet(8).state_dict().values())

    assert all(map(torch.equal, weights(), weights()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 21}, "depth = 21: .*the nearest depth is 20"),
        ({"depth": 2}, "the nearest depth is 8"),
        ({"width": 0}, "width = 0: expected 1 or more"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"in_channels": -1}, "in_channels = -1"),
    ],
)
def test_impossible_networks(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resnet(**arguments)  # type: ignore[arg-type]
