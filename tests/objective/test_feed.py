"""Data on a device: the same numbers however they get there, and never more memory than allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distsurf.objective.data import as_splits, tensors_of
from distsurf.objective.feed import Feed, pack, unpack
from tests.objective.planes import CPU


def _pictures(samples: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit pictures, normalized per channel like CIFAR's."""
    pixels = torch.randint(256, (samples, 3, 6, 5)).float()
    mean, std = torch.tensor([125.3, 123.0, 113.9]), torch.tensor([63.0, 62.1, 66.7])
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.randint(4, (samples,))


def _copies(feed: Feed, size: int) -> list[Any]:
    return [[tensor.clone() for tensor in tensors_of(batch)] for batch in feed.batches(size)]


@pytest.mark.parametrize("budget", [None, 5_000, 0])
@pytest.mark.parametrize("size", [1, 7, 50, 64])
def test_the_same_batches_resident_packed_or_streamed(budget: int | None, size: int) -> None:
    (split,) = as_splits({"train": _pictures()})
    feed = Feed(split, CPU, torch.float32, budget)
    expected = [tensors_of(batch) for batch in split.batches(size)]
    for _ in range(2):  # streams can be read again
        got = _copies(feed, size)
        assert len(got) == len(expected)
        assert all(
            torch.equal(a, b)
            for mine, own in zip(got, expected, strict=True)
            for a, b in zip(mine, own, strict=True)
        )
    held = {None: 50 * 90 * 4, 5_000: 50 * 90, 0: 50 * 90}[budget] + 50 * 8
    assert sum(t.numel() * t.element_size() for t in feed._tensors) == held
    assert feed._is_streamed == (budget == 0)


@pytest.mark.parametrize("budget", [None, 0])
def test_floating_point_data_comes_in_the_dtype_of_the_evaluation(budget: int | None) -> None:
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(4, (30,))
    (split,) = as_splits((x, y))
    batches = _copies(Feed(split, CPU, torch.float32, budget), 8)
    assert torch.equal(torch.cat([batch[0] for batch in batches]), x.float())
    assert torch.equal(torch.cat([batch[1] for batch in batches]), y)


def test_a_batch_is_whole_until_the_next_one_is_asked_for() -> None:
    """Two sets of buffers take turns: what is computed with is never written to."""
    (split,) = as_splits(_pictures())
    feed = Feed(split, CPU, torch.float32, 0)
    for batch, own in zip(feed.batches(8), split.batches(8), strict=True):
        assert torch.equal(batch[0], own[0])


def test_streams_keep_batches_of_the_users_own_shapes() -> None:
    batches = [
        (torch.randn(3, 2), torch.zeros(3)),
        (torch.randn(1, 2), torch.ones(1)),
        (torch.randn(3, 4), torch.ones(3)),
    ]
    (split,) = as_splits(batches)
    feed = Feed(split, CPU, torch.float32, 0)
    for got, own in zip(_copies(feed, 2), batches, strict=True):
        assert all(map(torch.equal, got, own))
    assert torch.equal(feed.sample(1, torch.float32)[0], batches[0][0])
    assert len(feed.sampled_batches(1, torch.float32)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packing_is_exact(dtype: torch.dtype) -> None:
    images = _pictures(300)[0].to(dtype)
    images[images == images[:, 0].max()] = float("inf")
    packed = pack(images)
    assert packed is not None
    codes, table = packed
    assert codes.dtype == torch.uint8
    assert torch.equal(unpack(codes, table), images)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(400, 3),
        torch.full((4, 3), float("nan")),
        torch.zeros(4, 3, dtype=torch.int64),
        torch.zeros(4),
        # The first samples are of 8 bits, the others not.
        torch.cat([torch.zeros(300, 1), torch.arange(300.0).unsqueeze(1)]),
    ],
)
def test_what_is_not_of_8_bits_is_left_alone(tensor: torch.Tensor) -> None:
    assert pack(tensor) is None


def test_samples_come_from_all_over_and_are_copies() -> None:
    x = torch.arange(100.0).unsqueeze(1)
    (split,) = as_splits((x, torch.zeros(100)))
    feed = Feed(split, CPU, torch.float32)
    sample = feed.sample(5, torch.float64)
    assert sample[0].dtype == torch.float64
    assert sample[0].ravel().tolist() == [0, 24, 49, 74, 99]
    feed.sample(200, torch.float32)[0].zero_()
    assert x[1] == 1
    first, second = feed.sampled_batches(3, torch.float32)
    assert [len(part[0]) for part in (first, second)] == [3, 3]
    assert feed.pixels == 0
    assert feed.is_intact
    x.add_(1)
    assert not feed.is_intact
