"""The evaluator against plain torch, written here; and that the model is given back untouched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distsurf.errors import InputError
from distsurf.evaluator import Stopped
from distsurf.objective.data import as_splits
from distsurf.objective.evaluator import ModelEvaluator
from distsurf.objective.losses import Supervised, Term
from distsurf.subspace import Subspace
from tests.cases import CASES, SAMPLES, Case
from tests.objective.planes import CPU, POINTS, plane, truth


@contextmanager
def _evaluator(model: nn.Module, data: Any, objective: Any, **options: Any) -> Iterator[ModelEvaluator]:
    subspace, buffers = plane(model)
    settings = {"batch_size": SAMPLES, "device": CPU, **options}
    with ModelEvaluator(model, subspace, buffers, as_splits(data), objective, **settings) as evaluator:
        yield evaluator


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_awkward_models_against_a_plain_loop(case: Case) -> None:
    model, data = case.make()
    with _evaluator(model, data, Supervised([Term.named(case.loss, {}, "loss")])) as evaluator:
        values = evaluator(POINTS)
        again = evaluator(POINTS[::-1])[::-1]
    # In float32 like the evaluator: a model that draws random numbers draws others in float64.
    expected = truth(case, plane(model)[0], POINTS, dtype=torch.float32)
    np.testing.assert_allclose(values[:, 0], expected, rtol=2e-6)
    np.testing.assert_array_equal(values, again)  # in any order, bit for bit


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("fails", [False, True])
def test_model_is_given_back_as_it_was(case: Case, fails: bool) -> None:
    model, data = case.make()
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    try:
        with _evaluator(model, data, Supervised([Term.named(case.loss, {})])) as evaluator:
            evaluator(POINTS)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_batch_size_changes_only_rounding() -> None:
    model, data = CASES[1].make()
    objective = Supervised([Term.named("cross_entropy", {}), Term.named("accuracy", {})])
    results = []
    for size in (1, 7, SAMPLES):
        with _evaluator(model, data, objective, batch_size=size) as evaluator:
            results.append(evaluator(POINTS))
    np.testing.assert_allclose(results[0], results[2], rtol=1e-6)
    np.testing.assert_allclose(results[1], results[2], rtol=1e-6)


def test_several_splits_and_terms_from_one_pass() -> None:
    model, (x, y) = CASES[0].make()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    objective = Supervised(
        [Term.named("cross_entropy", {}, "loss"), Term.named("focal", {}), Term.named("accuracy", {})]
    )
    with _evaluator(model, {"train": (x, y), "test": (x[:5], y[:5])}, objective) as evaluator:
        assert [(c.name, c.unit) for c in evaluator.columns] == [
            ("train_loss", ""),
            ("train_focal", ""),
            ("train_accuracy", "%"),
            ("test_loss", ""),
            ("test_focal", ""),
            ("test_accuracy", "%"),
        ]
        passes.clear()
        evaluator(POINTS[:1])
    assert len(passes) == 2


def test_sums_are_float64() -> None:
    """2e6 float32 values of 0.1: sequential float32 summation would be off by 1e-3 (FIELD.md)."""
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, 0.1)
    subspace, buffers = plane(model)
    data = (torch.zeros(2_000_000, 1), torch.zeros(2_000_000))
    still = Subspace(subspace.layout, subspace.center, tuple(0 * d for d in subspace.directions))
    with ModelEvaluator(
        model,
        still,
        buffers,
        as_splits(data),
        Supervised([Term.named("mae", {})]),
        batch_size=1000,
        device=CPU,
    ) as evaluator:
        assert evaluator(POINTS[:1])[0, 0] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize(
    ("value", "check"), [(float("nan"), np.isnan), (float("inf"), np.isposinf), (-3.5, None)]
)
def test_any_float_is_a_value(value: float, check: Any) -> None:
    model, data = CASES[0].make()
    with _evaluator(
        model, data, lambda model, batch: {"loss": (value * len(batch[0]), len(batch[0]))}
    ) as evaluator:
        result = evaluator(POINTS)
    assert check(result).all() if check else (result == value).all()


@pytest.mark.parametrize(
    "returned",
    [
        3.0,
        {},
        {"loss": 2.0},
        {1: (1, 1)},
        {"loss": ("a", 1)},
        {"loss": (torch.ones(3), 3)},
        {"loss": (1, None)},
    ],
)
def test_objective_of_the_wrong_form(returned: Any) -> None:
    model, data = CASES[0].make()
    with (
        pytest.raises(InputError, match="the objective"),
        _evaluator(model, data, lambda model, batch: returned),
    ):
        pass


def test_data_that_does_not_fit_the_model_says_both() -> None:
    model, _ = CASES[0].make()
    with (
        pytest.raises(InputError) as error,
        _evaluator(
            model,
            {"train": (torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64))},
            Supervised([Term.named("cross_entropy", {})]),
        ),
    ):
        pass
    assert "train data, (float32 (4, 9), int64 (4,))" in str(error.value)
    assert "\n" not in str(error.value)


def test_stops_between_batches() -> None:
    model, data = CASES[0].make()
    seen = []
    with _evaluator(
        model, data, Supervised([Term.named("cross_entropy", {})]), batch_size=1, stop=lambda: len(seen) > 3
    ) as evaluator:
        model.register_forward_hook(lambda *_: seen.append(1))
        with pytest.raises(Stopped):
            evaluator(POINTS)
    assert len(seen) == 4


def test_strict_float32_is_restored() -> None:
    torch.set_float32_matmul_precision("medium")
    inside = []
    model, data = CASES[0].make()
    model.register_forward_hook(lambda *_: inside.append(torch.get_float32_matmul_precision()))
    try:
        with _evaluator(model, data, Supervised([Term.named("cross_entropy", {})])) as evaluator:
            evaluator(POINTS)
        assert set(inside) == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
