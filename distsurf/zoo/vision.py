"""torchvision's models and CIFAR from a local folder; the one place where torchvision is imported."""

from __future__ import annotations

import difflib
import inspect
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from distsurf.errors import InputError

# Of red, green and blue over the training images of CIFAR-10, on a scale of 0 to 255 (Li et al. 2018).
MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)


def load() -> ModuleType:
    """The module torchvision, imported also where its compiled operators do not fit the installed torch.

    torchvision as published on PyPI fails to import beside a CPU-only torch (seen with torch 2.13.0+cpu and
    torchvision 0.28.0): its compiled operators cannot be loaded, and it then refers to two of them by name.
    Defining their signatures is enough for all but the use of those operators (detection models). Nothing is
    defined where the plain import works. Raises InputError where torchvision is missing or fails otherwise.
    """
    try:
        try:
            import torchvision
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            for name in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, name):
                    torch.library.define(f"torchvision::{name}", signature)
            import torchvision
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"torchvision cannot be imported beside torch {torch.__version__}: {error}; "
            "install the torchvision made for this torch"
        ) from error
    return torchvision


def model(name: str, **arguments: Any) -> nn.Module:
    """One of torchvision's models by its name there ("resnet18"); its weights are random unless given.

    The ``arguments`` (``num_classes``, ``weights``, …) go to torchvision's function of that name. Weights given
    by name are read from torch's hub cache, or downloaded to it. Raises InputError for an unknown name, for
    arguments or weights that it does not take, and for weights that cannot be downloaded.
    """
    models = load().models
    names = models.list_models()
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=5, cutoff=0)
        raise InputError(
            f"torchvision has no model {name!r}; the nearest of its names are {', '.join(nearest)}"
        )
    # Segmentation and detection models would download a trained backbone unless told otherwise.
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        arguments.setdefault("weights_backbone", None)
    try:
        network: nn.Module = models.get_model(name, **arguments)
    except OSError as error:
        weights = arguments.get("weights")
        raise InputError(
            f"cannot download the weights {weights} of {name} ({error}); on a machine with network and the same "
            f"home folder (or TORCH_HOME) run: {_command(f'model({name!r}, weights={str(weights)!r})')}"
        ) from error
    except KeyError as error:
        known = ", ".join(weights.name for weights in models.get_model_weights(name))
        raise InputError(f"torchvision's {name} has no weights {error}; it has {known}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise InputError(f"torchvision's {name} cannot be made with {given}: {error}") from error
    return network


def cifar10(folder: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """CIFAR-10 from ``folder``, as ``{"train": (images, labels), "test": …}``: 50,000 and 10,000 images.

    Images ``(N, 3, 32, 32)`` float32 normalized by `MEAN` and `STD`; labels ``(N,)`` int64. ``folder`` is the
    one that holds ``cifar-10-batches-py``. Nothing is downloaded: raises InputError, with the command that
    downloads, where the files are missing or not the published ones.
    """
    return _cifar("CIFAR10", folder)


def cifar100(folder: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """CIFAR-100, of 100 classes, from the ``folder`` that holds ``cifar-100-python``; else like `cifar10`."""
    return _cifar("CIFAR100", folder)


def _cifar(name: str, folder: str | Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    path = Path(folder).expanduser().absolute()
    dataset = getattr(load().datasets, name)
    try:
        parts = {"train": dataset(path, train=True), "test": dataset(path, train=False)}
    except (RuntimeError, OSError) as error:
        fetch = _command(f"load().datasets.{name}({str(path)!r}, download=True)")
        raise InputError(
            f"no intact {name} in {path} (expected its folder {dataset.base_folder} there); "
            f"on a machine with network run: {fetch}"
        ) from error
    return {split: _tensors(part.data, part.targets) for split, part in parts.items()}


def _tensors(pixels: Any, targets: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes ``(N, H, W, 3)`` to normalized images ``(N, 3, H, W)``, and labels."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous()
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return images.sub_(mean).div_(std), torch.tensor(targets)  # in place: 50,000 images take 0.6 GB


def _command(call: str) -> str:
    """A shell line that runs a call of this module."""
    return f"python -c {shlex.quote(f'from distsurf.zoo import vision; vision.{call}')}"
