"""Weights <-> vectors: the layout of a model's parameters in one flat vector, and reading checkpoints."""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from distsurf.errors import InputError

# Every tensor starts on a 64-byte boundary of the flat vector: vectorized kernels may round differently on
# memory aligned otherwise, and a point's value must not depend on where its weights happen to lie.
ALIGNMENT = 16


@dataclass(frozen=True)
class Layout:
    """Where each named tensor lies in a flat vector of ``size`` elements (padding between tensors is zero).

    With ``channels_last`` the memory of tensors of dimension 4 is in the order of dimensions 0, 2, 3, 1: torch's
    memory format of that name, which convolutions read fastest.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    channels_last: bool = False

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Layout:
        """The layout of named tensors, in their order."""
        return cls(tuple(tensors), tuple(tuple(tensor.shape) for tensor in tensors.values()))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First element of each tensor."""
        offsets, end = [], 0
        for shape in self.shapes:
            offsets.append(end)
            end += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        return tuple(offsets)

    @property
    def size(self) -> int:
        """Length of the flat vector, padding included."""
        if not self.shapes:
            return 0
        return self.offsets[-1] + -(-math.prod(self.shapes[-1]) // ALIGNMENT) * ALIGNMENT

    @property
    def count(self) -> int:
        """Number of parameters, padding not included."""
        return sum(math.prod(shape) for shape in self.shapes)

    def views(self, vector: NDArray[Any]) -> list[NDArray[Any]]:
        """The tensors as views into a flat vector ``(size,)``."""
        return [
            vector[offset : offset + math.prod(shape)].reshape(order).transpose(axes)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
            for order, axes in [self._in_memory(shape)]
        ]

    def torch_views(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """The tensors as views into a flat torch vector ``(size,)``."""
        return [
            vector[offset : offset + math.prod(shape)].view(order).permute(axes)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
            for order, axes in [self._in_memory(shape)]
        ]

    def _in_memory(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A tensor's shape as it lies in memory, and the permutation that leads from there to ``shape``."""
        if self.channels_last and len(shape) == 4:
            return (shape[0], *shape[2:], shape[1]), (0, 3, 1, 2)
        return shape, tuple(range(len(shape)))

    def flatten(self, tensors: Sequence[torch.Tensor], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Copy tensors into a new flat vector ``(size,)``."""
        vector = np.zeros(self.size, dtype)
        for view, tensor in zip(self.views(vector), tensors, strict=True):
            view[...] = tensor.detach().cpu().to(_torch_dtype(dtype)).numpy()
        return vector


def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def batch_norm_statistics(model: nn.Module) -> list[str]:
    """Names of the running means and variances of a model's batch-norm layers."""
    names = {id(buffer): name for name, buffer in model.named_buffers()}
    return [
        names[id(buffer)]
        for module in model.modules()
        if isinstance(module, _NormBase)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None and id(buffer) in names
    ]


@dataclass(frozen=True)
class Tensors:
    """A model's own state: what moves with the coordinates (each tensor once, tied ones too), and what does not."""

    moving: dict[str, torch.Tensor]
    """The parameters; then, if they are interpolated, the batch-norm statistics."""
    fixed: dict[str, torch.Tensor]
    """The other buffers."""

    @classmethod
    def of(cls, model: nn.Module, *, interpolated: bool = False) -> Tensors:
        """The tensors of a model. Raises InputError where its parameters cannot span a surface.

        ``interpolated``: batch-norm statistics are part of the directions (the ``states`` of Li et al.'s code).
        """
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise InputError(
                    f"parameter {name} is lazy and has no shape yet: pass one batch through the model first"
                )
            if not parameter.is_floating_point():
                raise InputError(
                    f"parameter {name} is {parameter.dtype}; only real floating point can be moved"
                )
        if not parameters:
            raise InputError("the model has no parameters, so there is no weight space to look at")
        buffers = dict(model.named_buffers())
        statistics = (
            {name: buffers.pop(name) for name in batch_norm_statistics(model)} if interpolated else {}
        )
        return cls({**parameters, **statistics}, buffers)


@dataclass(frozen=True)
class Subspace:
    """θ(c) = θ0 + Σ c_k d_k: a centre and one direction per axis, flat vectors of one layout.

    ``center`` ``(size,)`` float32 or float64; ``directions`` each ``(size,)`` float32: a direction *is* float32
    numbers, so that the plane is the same plane whatever the precision of the evaluation. (What the fast path
    derives from them is float64 where the centre is.)
    """

    layout: Layout
    center: NDArray[Any]
    directions: tuple[NDArray[Any], ...]
    pinned: tuple[tuple[tuple[float, ...], NDArray[Any]], ...] = ()
    """Coordinates at which the weights are these to the last bit: models that span the subspace, whose difference to
    the centre is no float32 number."""
    repeats: int = 1
    """How many planes the directions span, one after the other; where several, the last coordinate is its number."""

    @property
    def dimension(self) -> int:
        """Number of coordinates of a point."""
        return len(self.directions) // self.repeats + (self.repeats > 1)

    def terms(self, coordinates: Sequence[float]) -> list[tuple[int, float]]:
        """The sum that makes a point's weights: numbers of directions, each with its coefficient."""
        if len(coordinates) != self.dimension:
            raise ValueError(f"{len(coordinates)} coordinates in a subspace of {self.dimension}")
        if self.repeats == 1:
            return list(enumerate(coordinates))
        *along, plane = coordinates
        first = round(plane) * len(along)
        return [(first + k, c) for k, c in enumerate(along)]

    def fingerprints(self) -> dict[str, str]:
        """Digests of the names, shapes and exact numbers of the centre and of the directions."""
        described = repr((self.layout.names, self.layout.shapes)).encode()
        told = {
            "weights": digest([described, *self.layout.views(self.center)]),
            "directions": digest(
                [described, *(view for direction in self.directions for view in self.layout.views(direction))]
            ),
        }
        if self.pinned:
            parts: list[bytes | NDArray[Any]] = [described]
            for at, vector in self.pinned:
                parts += [repr(at).encode(), *self.layout.views(vector)]
            told["models"] = digest(parts)
        return told

    def mapped(
        self,
        layout: Layout,
        of_points: Callable[[NDArray[Any]], Any],
        of_directions: Callable[[NDArray[Any]], Any],
    ) -> Subspace:
        """The subspace with every vector replaced: points (the centre, what is pinned) and directions."""
        return Subspace(
            layout,
            of_points(self.center),
            tuple(map(of_directions, self.directions)),
            tuple((at, of_points(vector)) for at, vector in self.pinned),
            self.repeats,
        )


def digest(parts: Iterable[bytes | NDArray[Any]]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of byte strings and arrays."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).reshape(-1).data)
    return total.hexdigest()[:16]


def load_checkpoint(
    model: nn.Module, path: Path, *, key: str | None = None, allow_pickle: bool = False
) -> None:
    """Load a state dict (torch, or ``.safetensors``) into ``model``. See `read_checkpoint` and `load_state`."""
    load_state(model, read_checkpoint(path, key=key, allow_pickle=allow_pickle), f"checkpoint {path}")


def read_checkpoint(
    path: Path, *, key: str | None = None, allow_pickle: bool = False
) -> dict[str, torch.Tensor]:
    """Read a state dict from a file (torch, or ``.safetensors``).

    ``key`` names the entry of the file that holds the state dict; without it the usual ones are tried
    (``state_dict``, ``model_state_dict``, ``model``, ``net``). Raises InputError for a missing or unreadable file, and
    for a pickle that needs more than tensors unless ``allow_pickle``.
    """
    return _find_state(_read_state(path, allow_pickle), key, path)


def find_state(path: Path, key: str | None, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """The same with tensors that are read when they are used, where the format allows that (torch.save's of today)."""
    return _find_state(_read_state(path, allow_pickle, mapped=True), key, path)


def without_wrapper(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the prefix ``module.`` of DataParallel or ``_orig_mod.`` of torch.compile."""
    for wrapper in ("module.", "_orig_mod."):
        if state and all(name.startswith(wrapper) for name in state):
            return {name.removeprefix(wrapper): value for name, value in state.items()}
    return dict(state)


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Load a state dict into ``model``.

    A prefix ``module.`` left by DataParallel or ``_orig_mod.`` left by torch.compile is removed. Raises InputError for
    tensors that are missing, unexpected, misshapen or of another kind; ``origin`` is what they are from.
    """
    own = model.state_dict()
    if not own.keys() & state.keys():
        state = without_wrapper(state)
    complaints = []
    # Tensors that share memory are one tensor: a file that names a tied weight once is complete.
    places = {name: (t.data_ptr(), t.shape) for name, t in own.items() if t.numel()}
    present = {places[name] for name in state if name in places}
    missing = [n for n in own if n not in state and places.get(n) not in present]
    if missing:
        complaints.append(f"missing {_some(missing)}")
    unexpected = [name for name in state if name not in own]
    if unexpected:
        complaints.append(f"unexpected {_some(unexpected)}")
    misshapen = [
        f"{name} {tuple(state[name].shape)} where the model has {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    mistyped = [
        f"{name} {state[name].dtype}"
        for name, tensor in own.items()
        if name in state and tensor.is_floating_point() and not state[name].is_floating_point()
    ]
    if mistyped:
        complaints.append(f"not floating point {_some(mistyped)}")
    if misshapen:
        complaints.append(f"misshapen {_some(misshapen)}")
    if complaints:
        raise InputError(f"{origin} does not fit the model {type(model).__name__}: {'; '.join(complaints)}")
    model.load_state_dict(state, strict=False)


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_state(path: Path, allow_pickle: bool, mapped: bool = False) -> Any:
    if not path.is_file():
        raise InputError(f"no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Mapped, the file is read where its tensors are used; torch's older format cannot be.
        mapped = mapped and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=mapped)
    except pickle.UnpicklingError as error:
        if not allow_pickle and re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            raise InputError(
                f"checkpoint {path} holds more than tensors, and loading it could run code; "
                "if you trust its origin, set model.allow_pickle = true"
            ) from error
        raise InputError(f"checkpoint {path} cannot be read: it is not what torch.save writes") from error
    except Exception as error:
        raise InputError(
            f"checkpoint {path} cannot be read ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _find_state(state: Any, key: str | None, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if key is not None:
        if not isinstance(state, Mapping) or key not in state:
            entries = _some([str(k) for k in state]) if isinstance(state, Mapping) else type(state).__name__
            raise InputError(f"checkpoint {path} has no entry {key!r}; it has {entries}")
        state = state[key]
    elif isinstance(state, Mapping):
        for usual in ("state_dict", "model_state_dict", "model", "net"):
            if isinstance(state.get(usual), (Mapping, nn.Module)):
                state = state[usual]
                break
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if not isinstance(state, Mapping) or not state:
        raise InputError(f"checkpoint {path} holds no state dict; name its entry with model.checkpoint_key")
    strange = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise InputError(
            f"checkpoint {path} is not a state dict: {_some(strange)} "
            f"{'is' if len(strange) == 1 else 'are'} not tensors; name its entry with model.checkpoint_key"
        )
    return dict(state)
