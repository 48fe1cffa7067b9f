"""VGG-9: the published parameter counts, and names that the public checkpoints have."""

from __future__ import annotations

import pytest
import torch

from distsurf import zoo
from distsurf.errors import InputError


def test_published_parameter_counts() -> None:
    parameters = list(zoo.model("vgg9").parameters())
    assert sum(p.numel() for p in parameters) == 2_789_706
    assert sum(p.numel() for p in parameters if p.dim() > 1) == 2_785_472


def test_shapes_and_names() -> None:
    model = zoo.model("vgg9", num_classes=7, in_channels=1).eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    keys = model.state_dict().keys()
    assert {
        "features.0.weight",
        "features.1.running_var",
        "features.20.bias",
        "fc.0.weight",
        "classifier.bias",
    } <= keys
    with pytest.raises(InputError, match="num_classes = 0"):
        zoo.model("vgg9", num_classes=0)
