"""The batch size: found among sizes of known speed, and left alone where values depend on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distsurf.objective import tune
from distsurf.objective.data import as_splits
from distsurf.objective.evaluator import ModelEvaluator
from distsurf.objective.tune import tune_batch_size
from tests.cases import CASES
from tests.objective.planes import CPU, objective, plane


@pytest.mark.parametrize(
    ("speed", "samples", "expected"),
    [
        (lambda size: 1 + abs(size - 32), 1000, 32),
        (lambda size: 1 / size, 1000, 1024),
        (lambda size: 1 / size, 1100, 2048),  # whole data in one batch
        (lambda size: 1 / size, 10**6, 8192),
        (lambda size: size, 10**6, 8),
        (lambda size: 1.0 + (size != 128) * 0.001, 1000, 128),
        (lambda size: 1.0 - (size != 128) * 0.01, 1000, 128),  # within the noise
        (lambda size: 1.0 - (size == 256) * 0.08, 1000, 128),  # not worth other digits
        (lambda size: (128 / size) ** 0.06, 10**6, 8192),  # little by little
    ],
)
def test_climbs_to_the_fastest(speed: Callable[[int], float], samples: int, expected: int) -> None:
    assert tune_batch_size(speed, 128, samples, 100.0) == expected


def test_ends_where_memory_does() -> None:
    def speed(size: int) -> float:
        if size > 512:
            raise torch.OutOfMemoryError("no room")
        return 1 / size

    assert tune_batch_size(speed, 128, 10**6, 100.0) == 512


def test_ends_when_its_time_is_up() -> None:
    now = [0.0]

    def speed(size: int) -> float:
        now[0] += 1.0
        return 1 / size

    assert tune_batch_size(speed, 128, 10**6, 2.5, clock=lambda: now[0]) == 512


class _Crowd(nn.Module):
    """Every sample's output depends on the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(0))


class _Noisy(_Crowd):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + torch.rand_like(x))


@pytest.mark.parametrize(
    ("make", "may_change"), [(lambda: nn.Linear(5, 4), True), (_Crowd, False), (_Noisy, False)]
)
def test_values_that_depend_on_the_batch_size_keep_it(
    make: Callable[[], nn.Module], may_change: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_seconds", lambda running, feed, size: 1e-6 / size)
    torch.manual_seed(0)
    model = make()
    subspace, buffers = plane(model)
    data: Any = (torch.randn(1000, 5), torch.randint(4, (1000,)))
    with ModelEvaluator(
        model, subspace, buffers, as_splits(data), objective(CASES[0]), device=CPU
    ) as evaluator:
        assert evaluator.tune(10**9) == (1024 if may_change else 128)
        assert evaluator.tune(1) == 128  # too little work for a measurement


def test_batches_of_the_users_own_are_kept() -> None:
    model = nn.Linear(5, 4)
    subspace, buffers = plane(model)
    data = [(torch.randn(n, 5), torch.randint(4, (n,))) for n in (3, 4)]
    data.append((torch.randn(2, 5), torch.rand(2, 4)))  # of another form: stays in pieces
    with ModelEvaluator(
        model, subspace, buffers, as_splits(data), objective(CASES[0]), device=CPU
    ) as evaluator:
        assert evaluator.tune(10**9) == 128
