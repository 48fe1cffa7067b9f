"""Data of the right shape for timing, where the real one is not needed."""

from __future__ import annotations

import torch


def images(
    samples: int = 2000, size: int = 32, channels: int = 3, classes: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images ``(samples, channels, size, size)`` and labels: CIFAR's shapes as preset."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(samples, channels, size, size, generator=generator)
    return pixels, torch.randint(classes, (samples,), generator=generator)
