"""VGG-9 for 32x32 images, as in Li et al. 2018: 2,789,706 parameters with 10 classes."""

from __future__ import annotations

import torch
from torch import nn

from distsurf.errors import InputError

WIDTHS = ((64, 64), (128, 128), (256, 256, 256))
"""Channels of the convolutions; each group ends by halving the image."""


class VGG9(nn.Module):
    """Seven 3x3 convolutions and two linear layers, batch norm after all but the last (Simonyan and Zisserman 2015).

    Images ``(N, in_channels, 32, 32)`` in, class scores ``(N, num_classes)`` out. The names of its modules are those
    of Li et al.'s public code, so its checkpoints load.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3):
        super().__init__()
        for name, size in (("num_classes", num_classes), ("in_channels", in_channels)):
            if size < 1:
                raise InputError(f"{name} = {size}: expected 1 or more")
        layers: list[nn.Module] = []
        before = in_channels
        for group in WIDTHS:
            for width in group:
                layers += [
                    nn.Conv2d(before, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Sequential(
            nn.Linear(before * 4 * 4, before), nn.BatchNorm1d(before), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores (logits)."""
        return self.classifier(self.fc(self.features(images).flatten(1)))
