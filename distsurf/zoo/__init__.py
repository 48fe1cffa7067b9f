"""Models and data sets by plain name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from distsurf.errors import InputError
from distsurf.names import nearest
from distsurf.zoo import digits, resnet, vgg, vision
from distsurf.zoo.train import accuracy, train

__all__ = ["DATA", "MODELS", "accuracy", "data", "model", "train"]

Data = dict[str, tuple[torch.Tensor, torch.Tensor]]
_T = TypeVar("_T")


def _resnet(depth: int, shortcuts: bool) -> Callable[..., nn.Module]:
    def build(*, width: int = 16, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
        return resnet.resnet(
            depth, width=width, shortcuts=shortcuts, num_classes=num_classes, in_channels=in_channels
        )

    return build


MODELS: dict[str, Callable[..., nn.Module]] = {
    f"resnet{depth}{suffix}": _resnet(depth, shortcuts)
    for depth in (8, 14, 20, 32, 44, 56, 110)
    for suffix, shortcuts in (("", True), ("-noshort", False))
} | {"vgg9": vgg.VGG9}
DATA: dict[str, Callable[..., Data]] = {
    "digits": digits.digits,
    "cifar10": vision.cifar10,
    "cifar100": vision.cifar100,
}


def model(name: str, **arguments: Any) -> nn.Module:
    """A new model: a name of `MODELS` ("resnet56-noshort"), or "torchvision:NAME" for one of torchvision's.

    ``arguments`` go to its factory (``width``, ``num_classes``, ``in_channels``, …). The weights are random,
    from torch's global generator. Raises InputError for an unknown name or arguments.
    """
    library, colon, rest = name.partition(":")
    if colon and library == "torchvision":
        return vision.model(rest, **arguments)
    return _make("model", MODELS, name, arguments, others=("torchvision:NAME",))


def data(name: str, **arguments: Any) -> Data:
    """A data set of `DATA`, as a dictionary from split ("train", "test") to inputs and targets.

    ``arguments`` go to its factory: "cifar10" and "cifar100" need ``folder``. Raises InputError for an
    unknown name or arguments, and for missing files.
    """
    return _make("data set", DATA, name, arguments)


def _make(
    kind: str,
    registry: Mapping[str, Callable[..., _T]],
    name: str,
    arguments: dict[str, Any],
    others: tuple[str, ...] = (),
) -> _T:
    if name not in registry:
        raise InputError(f"no {kind} {name!r}; {nearest(name, (*registry, *others))}")
    signature = inspect.signature(registry[name])
    try:
        signature.bind(**arguments)  # its complaints, unlike a call's, do not name our inner function
        return registry[name](**arguments)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        accepted = ", ".join(str(p.replace(annotation=p.empty)) for p in signature.parameters.values())
        raise InputError(f"{kind} {name!r} with {given}: {error}; it accepts {accepted}") from error
