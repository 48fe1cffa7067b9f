from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from torch import nn

from distsurf.errors import InputError
from distsurf.objective.losses import LOSSES, METRICS, Supervised, Term

rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(50, 7)) * 3
CLASSES = rng.integers(7, size=50)
LOG_P = scipy.special.log_softmax(LOGITS, axis=1)[np.arange(50), CLASSES]
REAL, TARGET = rng.normal(size=(50, 3)), rng.normal(size=(50, 3))
RIGHT = np.equal(LOGITS.argmax(1), CLASSES)
RANKS = (LOGITS[np.arange(50), CLASSES][:, None] < LOGITS).sum(1)
GAP = np.abs(REAL - TARGET)
MARGINS = np.maximum(0, 1 - LOGITS[np.arange(50), CLASSES][:, None] + LOGITS)
MARGINS[np.arange(50), CLASSES] = 0

# The truth of each: numpy and scipy on float64.
EXPECTED: dict[str, tuple[Any, Any, float]] = {
    "cross_entropy": (LOGITS, CLASSES, -LOG_P.mean()),
    "label_smoothing": (
        LOGITS,
        CLASSES,
        -(0.9 * LOG_P + 0.1 * scipy.special.log_softmax(LOGITS, axis=1).mean(1)).mean(),
    ),
    "focal": (LOGITS, CLASSES, -((1 - np.exp(LOG_P)) ** 2 * LOG_P).mean()),
    "hinge": (LOGITS, CLASSES, MARGINS.mean()),
    "mse": (REAL, TARGET, (GAP**2).mean()),
    "mae": (REAL, TARGET, GAP.mean()),
    "huber": (REAL, TARGET, np.where(GAP < 1, GAP**2 / 2, GAP - 0.5).mean()),
    "binary_cross_entropy": (REAL, TARGET > 0, np.log1p(np.exp(-REAL * np.sign(TARGET))).mean()),
    "accuracy": (LOGITS, CLASSES, 100 * RIGHT.mean()),
    "binary_accuracy": (REAL, TARGET > 0, 100 * ((REAL > 0) == (TARGET > 0)).mean()),
    "error": (LOGITS, CLASSES, 100 - 100 * RIGHT.mean()),
    "top5": (LOGITS, CLASSES, 100 * (RANKS < 5).mean()),
}


def _value(term: Term, outputs: Any, targets: Any) -> float:
    total, count = term.function(torch.as_tensor(outputs), torch.as_tensor(targets))
    assert total.dtype == torch.float64
    return float(total / count)


@pytest.mark.parametrize("name", sorted(LOSSES | METRICS))
def test_against_numpy(name: str) -> None:
    outputs, targets, expected = EXPECTED[name]
    assert _value(Term.named(name, {}), outputs, targets) == pytest.approx(expected, rel=1e-12)


def test_parameters() -> None:
    huber = np.where(GAP < 0.5, GAP**2 / 2, 0.5 * (GAP - 0.25)).mean()
    assert _value(Term.named("huber", {"delta": 0.5}), REAL, TARGET) == pytest.approx(huber, rel=1e-12)
    assert _value(Term.named("top5", {"k": 2}), LOGITS, CLASSES) == pytest.approx(100 * (RANKS < 2).mean())
    with pytest.raises(InputError, match="its parameters: delta"):
        Term.named("huber", {"dleta": 1})
    with pytest.raises(InputError, match="did you mean 'cross_entropy'"):
        Term.named("crossentropy", {})


def test_binary_forms() -> None:
    score, sign = REAL[:, :1], np.sign(TARGET[:, 0])
    assert _value(Term.named("hinge", {}), score, sign) == pytest.approx(
        np.maximum(0, 1 - sign * score[:, 0]).mean()
    )
    assert _value(Term.named("accuracy", {}), score, sign) == 100 * ((score[:, 0] > 0) == (sign > 0)).mean()
    zero_one = (sign > 0).astype(np.int64)
    assert _value(Term.named("accuracy", {}), score, zero_one) == 100 * ((score[:, 0] > 0) == zero_one).mean()


def test_one_hot_targets_are_classes() -> None:
    one_hot = np.eye(7)[CLASSES]
    assert _value(Term.named("accuracy", {}), LOGITS, one_hot) == pytest.approx(100 * RIGHT.mean(), rel=1e-12)
    assert _value(Term.named("cross_entropy", {}), LOGITS, one_hot) == pytest.approx(-LOG_P.mean(), rel=1e-12)


def test_ignored_targets_and_dense_prediction() -> None:
    outputs, targets = torch.randn(4, 5, 6, 6), torch.randint(5, (4, 6, 6))
    targets[0] = -100
    expected = nn.functional.cross_entropy(outputs.double(), targets)
    assert _value(Term.named("cross_entropy", {}), outputs, targets) == pytest.approx(
        float(expected), rel=1e-6
    )


def test_no_silent_broadcasting() -> None:
    column, flat = torch.randn(8, 1), torch.randn(8)
    expected = float(((column[:, 0] - flat) ** 2).mean())
    assert _value(Term.named("mse", {}), column, flat) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match="shape"):
        _value(Term.named("mse", {}), torch.randn(8, 2), flat)
    with pytest.raises(InputError, match="class numbers"):
        _value(Term.named("cross_entropy", {}), torch.randn(8, 3), flat)


def test_large_logits_stay_finite() -> None:
    outputs = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert _value(Term.named("cross_entropy", {}), outputs, torch.tensor([1, 1])) == 5e3
    assert math.isfinite(_value(Term.named("focal", {}), outputs, torch.tensor([1, 1])))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="none"),
        nn.CrossEntropyLoss(reduction="sum"),
        lambda outputs, targets: nn.functional.cross_entropy(outputs, targets),
    ],
)
def test_users_losses_by_any_reduction(loss: Any) -> None:
    objective = Supervised([Term.users(loss)])
    inputs, targets = torch.tensor(LOGITS), torch.tensor(CLASSES)
    objective.check(nn.Identity(), (inputs, targets))
    parts = [
        objective(nn.Identity(), (inputs[part], targets[part]))["loss"]
        for part in (slice(13), slice(13, None))
    ]
    mean = sum(float(total) for total, _ in parts) / sum(int(count) for _, count in parts)
    assert mean == pytest.approx(-LOG_P.mean(), rel=1e-12)


def test_loss_that_is_no_mean_over_samples_is_refused() -> None:
    weighted = Supervised([Term.users(nn.CrossEntropyLoss(weight=torch.arange(1.0, 8.0).double()))])
    with pytest.raises(InputError, match="not a mean over samples"):
        weighted.check(nn.Identity(), (torch.tensor(LOGITS), torch.tensor(CLASSES)))


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="'as'"):
        Supervised([Term.named("focal", {"gamma": 1}), Term.named("focal", {"gamma": 2})])
