"""Many checkpoints of one network as the rows of a matrix that is never in memory as a whole."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distsurf.errors import InputError
from distsurf.subspace.weights import Layout, find_state, without_wrapper

CHUNK_BYTES = 64 << 20
"""Bytes of float64 that a chunk of all checkpoints takes."""
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Chunk:
    """Elements ``start`` to ``stop`` of one tensor, by their places in the flat vector of the layout."""

    tensor: int
    start: int
    stop: int
    offset: int
    """Where the tensor begins in the flat vector."""

    @property
    def place(self) -> slice:
        """Where the chunk lies in the flat vector."""
        return slice(self.offset + self.start, self.offset + self.stop)


class Checkpoints:
    """Checkpoint files in training order, opened and read piece by piece.

    safetensors, and what torch.save writes (memory-mapped; files in its format of before 2020 are read as a whole).
    ``layout``: of the tensors that count; left out, every floating-point tensor of the first file but batch-norm
    statistics. Raises InputError for fewer than two files, and for one that cannot be read or does not fit.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        layout: Layout | None = None,
        *,
        key: str | None = None,
        allow_pickle: bool = False,
    ):
        if len(paths) < 2:
            raise InputError(f"a trajectory needs two checkpoints or more; {len(paths)} were given")
        self.paths = tuple(paths)
        self._open = contextlib.ExitStack()
        try:
            self._files = [self._opened(path, key, allow_pickle) for path in paths]
            if layout is None:
                first = self._files[0]
                names = [
                    n for n in first.names if first.is_floating(n) and n.split(".")[-1] not in STATISTICS
                ]
                layout = Layout(tuple(names), tuple(first.shape(name) for name in names))
            if not layout.count:
                raise InputError(f"checkpoint {paths[0]} has no floating-point tensors")
            self.layout = layout
            for path, file in zip(paths, self._files, strict=True):
                self._require_fitting(path, file)
        except BaseException:
            self.close()
            raise

    def _opened(self, path: Path, key: str | None, allow_pickle: bool) -> _File:
        if path.suffix == ".safetensors":
            return _SafetensorsFile(path, self._open)
        return _TorchFile(path, key, allow_pickle)

    def _require_fitting(self, path: Path, file: _File) -> None:
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            if name not in file.names:
                raise InputError(f"checkpoint {path} has no tensor {name}")
            if file.shape(name) != shape:
                raise InputError(
                    f"checkpoint {path}: {name} has shape {file.shape(name)}, and {shape} in others"
                )

    def chunks(self) -> list[Chunk]:
        """All elements, in pieces of which all checkpoints together fit into `CHUNK_BYTES`."""
        most = max(1024, CHUNK_BYTES // 8 // len(self.paths))
        return [
            Chunk(i, start, min(start + most, count), offset)
            for i, (shape, offset) in enumerate(zip(self.layout.shapes, self.layout.offsets, strict=True))
            for count in [math.prod(shape)]
            for start in range(0, count, most)
        ]

    def read(self, chunk: Chunk) -> NDArray[np.float64]:
        """A chunk of every checkpoint, ``(T, elements)``. Raises InputError where one is not finite."""
        name = self.layout.names[chunk.tensor]
        rows = np.stack([file.elements(name, chunk.start, chunk.stop) for file in self._files])
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise InputError(f"checkpoint {self.paths[int(np.argmin(finite))]}: {name} holds NaN or infinity")
        return rows

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _File(Protocol):
    """A file of tensors."""

    names: dict[str, str]
    """The tensors' names, and what the file calls them."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def is_floating(self, name: str) -> bool: ...

    def elements(self, name: str, start: int, stop: int) -> NDArray[np.float64]:
        """Elements of a tensor in row-major order."""
        ...


class _SafetensorsFile:
    def __init__(self, path: Path, stack: contextlib.ExitStack):
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise InputError(f"no checkpoint {path}")
        try:
            self._file = stack.enter_context(safe_open(path, "pt"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"checkpoint {path} cannot be read: {error}") from error
        self.names = without_wrapper({name: name for name in self._file.keys()})  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self.names[name]).get_shape())

    def is_floating(self, name: str) -> bool:
        return str(self._file.get_slice(self.names[name]).get_dtype()).lstrip("B").startswith("F")

    def elements(self, name: str, start: int, stop: int) -> NDArray[np.float64]:
        shape = self.shape(name)
        if not shape:
            return np.asarray(self._file.get_tensor(self.names[name]).double().reshape(1).numpy())
        row = math.prod(shape[1:])  # only whole rows can be read
        first, last = start // row, -(-stop // row)
        part = self._file.get_slice(self.names[name])[first:last]
        return np.asarray(part.double().reshape(-1)[start - first * row : stop - first * row].numpy())


class _TorchFile:
    def __init__(self, path: Path, key: str | None, allow_pickle: bool):
        self._tensors = without_wrapper(find_state(path, key, allow_pickle))
        self.names = {name: name for name in self._tensors}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def is_floating(self, name: str) -> bool:
        return self._tensors[name].is_floating_point()

    def elements(self, name: str, start: int, stop: int) -> NDArray[np.float64]:
        flat = self._tensors[name].detach().reshape(-1)
        return np.asarray(flat[start:stop].to(torch.float64).numpy())


def each(chunks: Sequence[Chunk], rank: int, size: int) -> Iterator[Chunk]:
    """The share of a rank: every ``size``-th chunk, the largest ones dealt out evenly."""
    order = sorted(chunks, key=lambda chunk: chunk.start - chunk.stop)
    yield from order[rank::size]
