"""Models and data by plain name, the messages for wrong ones, and what importing them does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distsurf import zoo
from distsurf.errors import InputError


def test_import_is_light() -> None:
    code = (
        "import sys, distsurf, distsurf.zoo; print(*{'torchvision', 'sklearn', 'mpi4py'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_torchvision_by_name() -> None:
    model = zoo.model("torchvision:squeezenet1_1", num_classes=3)
    assert type(model).__module__.startswith("torchvision.")


def test_data_arguments() -> None:
    assert zoo.data("digits", image_size=16, test_fraction=0.5)["test"][0].shape == (899, 1, 16, 16)


def test_every_name_is_named() -> None:
    with pytest.raises(InputError) as caught:
        zoo.model("vgg")
    assert all(name in str(caught.value) for name in (*zoo.MODELS, "torchvision:NAME"))
    with pytest.raises(InputError) as caught:
        zoo.data("mnist")
    assert all(name in str(caught.value) for name in zoo.DATA)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet56noshort", {}, "no model 'resnet56noshort'; did you mean 'resnet56-noshort'"),
        ("torchvison:resnet18", {}, "no model 'torchvison:resnet18'; did you mean 'torchvision:NAME'"),
        ("torchvision:resnt18", {}, "resnet18"),
        ("resnet20", {"widht": 8}, r"'widht'; it accepts width=16, num_classes=10, in_channels=3"),
        ("resnet20", {"width": "8"}, r"with width='8': .*; it accepts width=16"),
        ("resnet20", {"width": 0}, "width = 0"),
    ],
)
def test_wrong_models(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        zoo.model(name, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("digit", {}, "no data set 'digit'; did you mean 'digits'"),
        ("digits", {"size": 16}, r"'size'; it accepts image_size=8, test_fraction=0.25, seed=0"),
        ("cifar10", {}, "missing a required argument: 'folder'; it accepts folder"),
    ],
)
def test_wrong_data(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        zoo.data(name, **arguments)


def test_folder_reaches_cifar(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no intact CIFAR100 in"):
        zoo.data("cifar100", folder=tmp_path)
