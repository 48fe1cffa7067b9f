"""Files of directions: ours, state dicts, and those of the public code of Li et al. 2018."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distsurf.errors import InputError
from distsurf.files import replacing
from distsurf.subspace.weights import Layout, read_checkpoint, without_wrapper

KIND = "direction of distsurf"


def keep(path: Path, layout: Layout, direction: NDArray[np.float32], about: Mapping[str, str]) -> None:
    """Write a direction with what it is of. What another process wrote stays."""
    try:
        write_direction(path, layout, direction, about, may_exist=False)
    except InputError:
        if not path.exists():
            raise


def write_direction(
    path: Path,
    layout: Layout,
    direction: NDArray[np.float32],
    about: Mapping[str, str] | None = None,
    *,
    may_exist: bool = True,
) -> None:
    """Write a direction, tensor by tensor (safetensors)."""
    from safetensors.torch import save_file

    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(view))
        for name, view in zip(layout.names, layout.views(direction), strict=True)
    }
    with replacing(path, may_exist=may_exist) as temporary:
        save_file(tensors, str(temporary), metadata={"kind": KIND, **(about or {})})


def write_plane(
    path: Path, layout: Layout, directions: NDArray[np.float32], trajectory: Mapping[str, Any]
) -> None:
    """Write the directions ``(2, size)`` of a plane, and the path that a training takes in it."""
    from safetensors.torch import save_file

    tensors = {
        f"{axis}.{name}": torch.from_numpy(np.ascontiguousarray(view))
        for axis, direction in zip("xy", directions, strict=True)
        for name, view in zip(layout.names, layout.views(direction), strict=True)
    }
    with replacing(path) as temporary:
        save_file(tensors, str(temporary), metadata={"kind": KIND, "trajectory": json.dumps(trajectory)})


def read_plane(path: Path, layout: Layout) -> NDArray[np.float32]:
    """Both directions ``(2, size)`` of a file that `write_plane` wrote. Raises InputError."""
    state = read_checkpoint(path)
    axes = [{n.removeprefix(f"{a}."): t for n, t in state.items() if n.startswith(f"{a}.")} for a in "xy"]
    for axis, tensors in zip("xy", axes, strict=True):
        if missing := [name for name in layout.names if name not in tensors]:
            raise InputError(
                f"{path} has no tensor {axis}.{missing[0]}; a plane that distsurf trajectory wrote was expected"
            )
    return np.stack([_flat(tensors, layout, path) for tensors in axes])


def read_trajectory(path: Path) -> dict[str, Any] | None:
    """The path that `write_plane` wrote beside directions; None where there is none."""
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        told = (file.metadata() or {}).get("trajectory")
    return None if told is None else dict(json.loads(told))


def read_kept(path: Path, layout: Layout, about: Mapping[str, str]) -> NDArray[np.float32]:
    """A direction that `keep` wrote. Raises InputError where it is of something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it to have it made again") from error
    if differing := [name for name, value in about.items() if told.get(name) != value]:
        raise InputError(f"{path} is of other {', '.join(differing)}: remove it to have it made again")
    return _flat(read_checkpoint(path), layout, path)


def read_direction(path: Path, axis: str, layout: Layout, model: nn.Module) -> NDArray[np.float32]:
    """The direction of an axis (``x``) from a file.

    A state dict (safetensors, torch), of this axis alone or with names that begin with ``x.``, ``y.``: tensors that it
    leaves out get zero. HDF5: the public code's, group ``xdirection`` or ``ydirection`` with arrays numbered in the
    order of the model's parameters, or of its state dict. Raises InputError for what does not fit the model.
    """
    if not path.is_file():
        raise InputError(f"no direction file {path}")
    if path.suffix in (".h5", ".hdf5"):
        return _flat(_named(read_li2018(path, axis), model, path), layout, path)
    state = read_checkpoint(path)
    if own := {
        name.removeprefix(f"{axis}."): tensor for name, tensor in state.items() if name.startswith(f"{axis}.")
    }:
        state = own
    state = without_wrapper(state)
    known = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    if strange := [name for name in state if name not in known]:
        raise InputError(f"{path} has directions for {', '.join(strange[:3])}, which the model has not")
    return _flat(state, layout, path)


def read_li2018(path: Path, axis: str) -> list[NDArray[Any]]:
    """The numbered arrays of an axis in a direction file of the public code. Raises InputError."""
    import h5py

    name = f"{axis}direction"
    try:
        with h5py.File(path, "r") as file:
            if name not in file:
                raise InputError(f"{path} has no group {name}; it has {', '.join(file) or 'nothing'}")
            group = file[name]
            return [np.asarray(group[str(i)]) for i in range(len(group))]
    except (OSError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a direction file: {error}") from error


def _named(arrays: Sequence[NDArray[Any]], model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    parameters, state = dict(model.named_parameters()), model.state_dict()
    for names in (list(parameters), list(state)):
        if len(names) == len(arrays):
            return {n: torch.from_numpy(np.asarray(a)) for n, a in zip(names, arrays, strict=True)}
    raise InputError(
        f"{path} has {len(arrays)} arrays; the model has {len(parameters)} parameters, and {len(state)} tensors in its "
        "state dict"
    )


def _flat(state: Mapping[str, torch.Tensor], layout: Layout, path: Path) -> NDArray[np.float32]:
    direction = np.zeros(layout.size, np.float32)
    for name, view in zip(layout.names, layout.views(direction), strict=True):
        if name not in state:
            continue
        if tuple(state[name].shape) != view.shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, and {view.shape} in the model"
            )
        view[...] = state[name].to(torch.float32).numpy()
        if not np.isfinite(view).all():
            raise InputError(f"{path}: {name} holds NaN or infinity")
    return direction
