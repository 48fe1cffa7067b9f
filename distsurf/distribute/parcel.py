"""Any value to every rank, with its arrays in one buffer: broadcast once, one copy per node where it is large."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distsurf.distribute.ranks import ALIGNMENT, Ranks


def distribute(ranks: Ranks, value: Any) -> Any:
    """Rank 0's value on every rank; tensors and numpy arrays in it are views into a buffer that `Ranks.share` gave.

    Treat the arrays as read-only: large ones are shared by the ranks of a node. With a single rank the value itself
    comes back.
    """
    if ranks.size == 1:
        return value
    packed = _Packer()
    if ranks.rank == 0:
        packed.dump(value)
    text, manifest, size = ranks.broadcast((packed.text, packed.manifest, packed.size))
    buffer = ranks.share(size, packed.fill)
    return _Unpacker(text, manifest, buffer).load()


class _Packer(pickle.Pickler):
    """Pickles a value, but for its arrays, which get places in a buffer."""

    def __init__(self) -> None:
        self._stream = io.BytesIO()
        super().__init__(self._stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._arrays: list[torch.Tensor] = []
        self._known: dict[int, int] = {}
        self.manifest: list[tuple[str, bool, tuple[int, ...], int]] = []
        self.size = 0

    @property
    def text(self) -> bytes:
        """The pickle without its arrays."""
        return self._stream.getvalue()

    def persistent_id(self, thing: Any) -> int | None:
        """The number of an array's place; None for everything else."""
        is_numpy = isinstance(thing, np.ndarray) and thing.dtype.kind in "biufc"
        if not (is_numpy or type(thing) is torch.Tensor):
            return None
        if id(thing) not in self._known:
            tensor = (
                torch.from_numpy(np.require(thing, requirements=("C", "W")))
                if is_numpy
                else thing.detach().cpu()
            )
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.manifest.append((dtype, is_numpy, tuple(tensor.shape), self.size))
            self._known[id(thing)] = len(self._arrays)
            self._arrays.append(tensor)
            self.size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        return self._known[id(thing)]

    def fill(self, buffer: NDArray[np.uint8]) -> None:
        """Copy the arrays to their places."""
        for tensor, entry in zip(self._arrays, self.manifest, strict=True):
            _view(buffer, entry).copy_(tensor)


class _Unpacker(pickle.Unpickler):
    def __init__(self, text: bytes, manifest: list[Any], buffer: NDArray[np.uint8]):
        super().__init__(io.BytesIO(text))
        self._manifest, self._buffer = manifest, buffer

    def persistent_load(self, number: int) -> Any:
        """The array at a place, as a view."""
        tensor = _view(self._buffer, self._manifest[number])
        return tensor.numpy() if self._manifest[number][1] else tensor


def _view(buffer: NDArray[np.uint8], entry: tuple[str, bool, tuple[int, ...], int]) -> torch.Tensor:
    name, _, shape, start = entry
    dtype = getattr(torch, name)
    count = int(np.prod(shape, dtype=np.int64))
    return torch.from_numpy(buffer[start : start + count * dtype.itemsize]).view(dtype).view(shape)
