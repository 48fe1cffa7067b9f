"""Residual networks for small images, with and without shortcuts (He et al. 2016; Li et al. 2018).

Parameters at width 16 and 10 classes: ResNet-20 272,474; ResNet-56 855,770, without shortcuts 853,018;
ResNet-110 1,730,714. Modules carry the names of Li et al.'s public code, so its checkpoints load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from distsurf.errors import InputError


def resnet(
    depth: int = 20, *, width: int = 16, shortcuts: bool = True, num_classes: int = 10, in_channels: int = 3
) -> ResNet:
    """A residual network of ``depth`` = 6n+2 weighted layers, initialized from torch's global generator.

    ``width`` is the number of filters of the first stage; the other two have two and four times as many.
    Without ``shortcuts`` the blocks are plain stacks of convolutions: the "noshort" networks of Li et al.
    Raises InputError where ``depth`` is not 6n+2 or a size is not positive.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise InputError(
            f"depth = {depth}: a residual network of three stages has 6n+2 layers; "
            f"the nearest depth is {6 * max(1, round((depth - 2) / 6)) + 2}"
        )
    for name, size in (("width", width), ("num_classes", num_classes), ("in_channels", in_channels)):
        if size < 1:
            raise InputError(f"{name} = {size}: expected 1 or more")
    return ResNet(blocks, width, shortcuts, num_classes, in_channels)


class ResNet(nn.Module):
    """Three stages of ``blocks`` basic blocks, the last two halving the image; mean; linear classifier.

    Images ``(N, in_channels, H, W)`` of any size in, class scores ``(N, num_classes)`` out.
    """

    def __init__(self, blocks: int, width: int, shortcuts: bool, num_classes: int, in_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(blocks, width, width, 1, shortcuts)
        self.layer2 = _stage(blocks, width, 2 * width, 2, shortcuts)
        self.layer3 = _stage(blocks, 2 * width, 4 * width, 2, shortcuts)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores (logits)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; with ``shortcuts``, their input is added to their output.

    Where the shape changes, the shortcut is a 1x1 convolution with batch norm (option B of He et al. 2016).
    """

    def __init__(self, channels_in: int, channels: int, stride: int, shortcuts: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Sequential | None = None
        if shortcuts:
            self.shortcut = nn.Sequential()
            if stride != 1 or channels_in != channels:
                self.shortcut.append(nn.Conv2d(channels_in, channels, 1, stride, bias=False))
                self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, channels_in, H, W)`` -> ``(N, channels, H/stride, W/stride)``."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return F.relu(y)


def _stage(blocks: int, channels_in: int, channels: int, stride: int, shortcuts: bool) -> nn.Sequential:
    first = BasicBlock(channels_in, channels, stride, shortcuts)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1, shortcuts) for _ in range(blocks - 1)))
