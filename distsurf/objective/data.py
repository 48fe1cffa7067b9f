"""Data sets held in memory in one piece, cut into batches that are views.

A *batch* is a tensor, or tuples, lists and dicts of tensors whose first dimension counts samples. Whatever the
user brings (a pair of tensors, a torch ``Dataset``, an iterable of batches) becomes a `Split` once; no loader
runs while grid points are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from distsurf.errors import InputError

COLLATE = 1024  # samples collated at a time; bounds the memory of Python objects while a Dataset is read


def map_tree(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply ``function`` to every tensor of nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(map_tree(function, value) for value in tree)
    raise InputError(
        f"a batch holds tensors in tuples, lists and dicts; this one holds {type(tree).__name__}"
    )


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a batch, in order."""
    found: list[Tensor] = []
    map_tree(found.append, tree)
    return found


def describe(tree: Any) -> str:
    """A batch in words: dtypes and shapes."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, (tuple, list)):
        return "(" + ", ".join(describe(value) for value in tree) + ")"
    return type(tree).__name__


@dataclass(frozen=True)
class Split:
    """One named data set. ``pieces`` are batches; one piece that is ``whole`` is cut into batches later."""

    name: str
    pieces: tuple[Any, ...]
    whole: bool

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(len(tensors_of(piece)[0]) for piece in self.pieces)

    def batches(self, batch_size: int) -> list[Any]:
        """All batches, in order, as views; batches of unequal shapes stay as the user made them."""
        if not self.whole:
            return list(self.pieces)
        (piece,) = self.pieces
        return [
            map_tree(lambda tensor, start=start: tensor[start : start + batch_size], piece)  # type: ignore[misc]
            for start in range(0, self.samples, batch_size)
        ]

    def map(self, function: Callable[[Tensor], Tensor]) -> Split:
        """The same split with every tensor replaced."""
        return Split(self.name, tuple(map_tree(function, piece) for piece in self.pieces), self.whole)


def as_splits(data: Any) -> list[Split]:
    """Read what the user calls data into memory.

    A mapping from names to data sets gives one split each. Anything else is one split without a name: a tensor
    or a tuple or dict of tensors of equal length; a torch ``Dataset`` or ``DataLoader`` (read in order, without
    shuffling); any other iterable of batches. Raises InputError for what is none of these, or is empty.
    """
    if isinstance(data, Mapping) and not _is_table(data):
        if not data:
            raise InputError("no data: the mapping of splits is empty")
        return [_as_split(str(name), value) for name, value in data.items()]
    return [_as_split("", data)]


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _is_table(data: Any) -> bool:
    """Whether a dict or tuple is one data set: tensors of equal length, some perhaps in nested inputs."""
    values = list(data.values() if isinstance(data, Mapping) else data)
    if isinstance(data, tuple) and any(map(_is_array, values)):
        return all(_is_array(v) or (isinstance(v, (tuple, Mapping)) and _is_table(v)) for v in values)
    return bool(values) and all(map(_is_array, values))


def _as_split(name: str, data: Any) -> Split:
    called = f"split {name!r}" if name else "the data"
    if isinstance(data, TensorDataset):
        data = data.tensors
    if _is_array(data) or (isinstance(data, (tuple, Mapping)) and _is_table(data)):
        return _whole(name, called, _to_tensors(data))
    if isinstance(data, DataLoader):
        batches: Iterable[Any] = _in_order(data)
    elif isinstance(data, IterableDataset):
        batches = _collated(iter(data))
    elif isinstance(data, Dataset):
        batches = _collated(data[i] for i in range(len(data)))  # type: ignore[arg-type]
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, Mapping)):
        batches = data
    else:
        raise InputError(
            f"{called} cannot be read: {type(data).__name__} was given; expected a tuple of tensors, "
            "a torch Dataset, or an iterable of batches"
        )
    pieces = [_to_tensors(batch) for batch in batches]
    if not pieces:
        raise InputError(f"{called} is empty")
    for piece in pieces:
        _check_lengths(called, piece)
    if len({_signature(piece) for piece in pieces}) == 1:
        return _whole(name, called, _concatenate(pieces))
    return Split(name, tuple(pieces), whole=False)


def _whole(name: str, called: str, piece: Any) -> Split:
    _check_lengths(called, piece)
    return Split(name, (piece,), whole=True)


def _check_lengths(called: str, piece: Any) -> None:
    tensors = tensors_of(piece)
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(lengths) > 1:
        raise InputError(f"{called} has tensors of unequal length: {describe(piece)}")
    if lengths in (set(), {0}):
        raise InputError(f"{called} is empty: {describe(piece)}")


def _to_tensors(tree: Any) -> Any:
    if isinstance(tree, np.ndarray):
        # A copy where numpy's memory is read-only or negatively strided, which torch cannot share.
        return torch.from_numpy(tree if tree.flags.writeable and tree.flags.c_contiguous else tree.copy())
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, Mapping):
        return {key: _to_tensors(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(_to_tensors(value) for value in tree)
    raise InputError(
        f"a batch holds tensors in tuples, lists and dicts; this one holds {type(tree).__name__}"
    )


def _signature(piece: Any) -> str:
    return describe(map_tree(lambda tensor: tensor[:0], piece))


def _concatenate(pieces: list[Any]) -> Any:
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(pieces)
    if isinstance(first, Mapping):
        return {key: _concatenate([piece[key] for piece in pieces]) for key in first}
    return tuple(_concatenate(list(parts)) for parts in zip(*pieces, strict=True))


def _collated(samples: Iterator[Any]) -> Iterator[Any]:
    while chunk := list(islice(samples, COLLATE)):
        yield default_collate(chunk)


def _in_order(loader: DataLoader[Any]) -> Iterable[Any]:
    """The loader's batches without its shuffling: the surface file vouches for one fixed order."""
    sampler = getattr(loader, "sampler", None)
    dataset: Any = loader.dataset
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset):
        pass  # shuffled: read it from the first sample to the last
    elif type(sampler) is SubsetRandomSampler:
        dataset = Subset(loader.dataset, sorted(sampler.indices))
    else:
        return loader  # its own order is all there is, and is kept
    if loader.batch_size is None:
        return loader
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        drop_last=loader.drop_last,
    )
