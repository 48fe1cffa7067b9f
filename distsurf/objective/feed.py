"""A split's batches on a device: resident where the data fits, else streamed through pinned double buffers.

On the CPU the data stays where it is, which is one copy per node. On a GPU it is copied there once, as it is or, where
only that fits, with images in 8 bits; what still does not fit is copied batch by batch while the GPU computes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distsurf.objective.data import Split, map_tree, tensors_of

SHARE = 0.5
"""Share of a GPU's free memory that data may take; the rest is for weights and activations."""
LEVELS = 256
LOOKED_AT = 256
"""Samples whose values are counted before a tensor is taken for 8-bit data and looked at as a whole."""


class Feed:
    """One split for evaluation on a device, floating-point tensors in ``dtype``."""

    def __init__(self, split: Split, device: torch.device, dtype: torch.dtype, budget: int | None = None):
        """``budget``: bytes that may be resident; left out, half of a GPU's free memory, and no limit on a CPU."""
        self.name = split.name
        self.samples = split.samples
        self.is_whole = split.whole
        self._device, self._dtype = device, dtype
        if budget is None and device.type == "cuda":
            budget = int(SHARE * torch.cuda.mem_get_info(device)[0])
        self._split = split
        self._tables: list[Tensor | None] = [None] * len(tensors_of(split.pieces[0]))
        self._is_streamed = False
        if budget is not None and self._bytes() > budget:
            self._pack()
            self._is_streamed = self._bytes() > budget
        if not self._is_streamed:
            self._split = self._split.map(self._place)
        self._cut: tuple[int, list[Any]] = (0, [])
        self._tensors = [t for piece in self._split.pieces for t in tensors_of(piece)]
        self._versions = [tensor._version for tensor in self._tensors]

    @property
    def is_intact(self) -> bool:
        """Whether nobody has written to the data."""
        return self._versions == [tensor._version for tensor in self._tensors]

    @property
    def pixels(self) -> int:
        """Height times width of the largest images; 0 if there are none."""
        shapes = [t.shape for t in self._tensors if t.ndim == 4]
        return max((shape[2] * shape[3] for shape in shapes), default=0)

    def batches(self, size: int) -> Iterator[Any]:
        """All batches, in order, on the device."""
        if self._cut[0] != size:
            self._cut = size, self._split.batches(size)
        batches = self._cut[1]
        for batch in _streamed(batches, self._device) if self._is_streamed else batches:
            yield self._unpack(batch)

    def sample(self, size: int, dtype: torch.dtype) -> Any:
        """``size`` samples from all over the split, in ``dtype``; the first batch where the user's batches are kept."""
        piece = self._split.pieces[0]
        if self.is_whole and self.samples > size:
            rows = torch.linspace(0, self.samples - 1, size).long()
            piece = map_tree(lambda tensor: tensor[rows.to(tensor.device)], piece)
        placed = map_tree(self._place, piece) if self._is_streamed else piece
        # A copy, so that what a step does to its inputs in place stays here.
        return map_tree(
            lambda t: t.to(dtype if t.is_floating_point() else t.dtype, copy=True), self._unpack(placed)
        )

    def sampled_batches(self, size: int, dtype: torch.dtype) -> list[Any]:
        """The same in two batches, where samples can be divided."""
        sample = self.sample(2 * size, dtype)
        middle = len(tensors_of(sample)[0]) // 2
        if not self.is_whole or middle < 2:
            return [sample]
        halves = slice(middle), slice(middle, None)
        return [map_tree(operator.itemgetter(half), sample) for half in halves]

    def _place(self, tensor: Tensor) -> Tensor:
        placed = tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)
        # Inference tensors do not count what is written to them, which `is_intact` relies on.
        return placed.clone() if placed.is_inference() else placed

    def _bytes(self) -> int:
        return sum(
            t.numel() * (self._dtype.itemsize if t.is_floating_point() else t.element_size())
            for piece in self._split.pieces
            for t in tensors_of(piece)
        )

    def _pack(self) -> None:
        if not self.is_whole:
            return
        packed = [pack(tensor) for tensor in tensors_of(self._split.pieces[0])]
        self._tables = [None if p is None else p[1].to(self._device, self._dtype) for p in packed]
        codes = iter(packed)

        def replaced(tensor: Tensor) -> Tensor:
            found = next(codes)
            return tensor if found is None else found[0]

        self._split = self._split.map(replaced)

    def _unpack(self, batch: Any) -> Any:
        """A batch as the model gets it; resident data that was not packed is that already."""
        if not self._is_streamed and all(table is None for table in self._tables):
            return batch
        tables = iter(self._tables)

        def whole(tensor: Tensor) -> Tensor:
            table = next(tables)
            if table is not None:
                return unpack(tensor, table)
            return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

        return map_tree(whole, batch)


def pack(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """A floating-point tensor ``(N, C, …)`` as 8-bit codes of its shape and the values ``(C, 256)`` they stand for.

    That is what images of 8 bits are after their normalization, whatever its constants. None where a channel has more
    than 256 different values; `unpack` gives the very same numbers back.
    """
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return None
    tables = []
    codes = torch.empty(tensor.shape, dtype=torch.uint8)
    for channel in range(tensor.shape[1]):
        values = tensor[:, channel].contiguous()
        if len(values[:LOOKED_AT].unique()) > LEVELS:
            return None
        levels = values.unique()
        if len(levels) > LEVELS or levels.isnan().any():
            return None
        tables.append(torch.cat([levels, levels.new_zeros(LEVELS - len(levels))]))
        codes[:, channel] = torch.searchsorted(levels, values).to(torch.uint8)
    return codes, torch.stack(tables)


def unpack(codes: Tensor, table: Tensor) -> Tensor:
    """The tensor that `pack` took in, in the dtype of ``table``, on its device."""
    first = torch.arange(len(table), device=table.device, dtype=torch.int32) * table.shape[1]
    places = codes.int() + first.view(-1, *[1] * (codes.ndim - 2))
    return table.view(-1)[places]


def _streamed(batches: list[Any], device: torch.device) -> Iterator[Any]:
    """Batches on the device, each copied from pinned memory while the one before it is computed with.

    Two sets of buffers take turns. A set is filled again once its copy has left the host and the computation with it,
    which was enqueued when the caller asked for the next batch, has ended.
    """
    is_gpu = device.type == "cuda"
    lane = torch.cuda.Stream(device) if is_gpu else None
    sets: list[tuple[list[Tensor], list[Tensor]] | None] = [None, None]
    arrived: list[Any] = [None, None]
    finished: list[Any] = [None, None]

    def send(k: int, batch: Any) -> Any:
        tensors = tensors_of(batch)
        held = sets[k]
        if held is None or [t.shape for t in held[0]] != [t.shape for t in tensors]:
            pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=is_gpu) for t in tensors]
            held = sets[k] = pinned, [torch.empty_like(t, device=device) for t in tensors]
        if arrived[k] is not None:
            arrived[k].synchronize()
        for pinned_one, tensor in zip(held[0], tensors, strict=True):
            pinned_one.copy_(tensor)
        if lane is None:
            for target, pinned_one in zip(held[1], held[0], strict=True):
                target.copy_(pinned_one)
        else:
            with torch.cuda.stream(lane):
                if finished[k] is not None:
                    lane.wait_event(finished[k])
                for target, pinned_one in zip(held[1], held[0], strict=True):
                    target.copy_(pinned_one, non_blocking=True)
                arrived[k] = lane.record_event()
        targets = iter(held[1])
        return map_tree(lambda tensor: next(targets), batch)

    ready = send(0, batches[0])
    for i in range(len(batches)):
        k = i % 2
        if lane is not None:
            torch.cuda.current_stream(device).wait_event(arrived[k])
        batch = ready
        if i + 1 < len(batches):
            ready = send(1 - k, batches[i + 1])
        yield batch
        if lane is not None:
            finished[k] = torch.cuda.current_stream(device).record_event()
