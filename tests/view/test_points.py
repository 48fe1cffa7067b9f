"""What pictures say beside what they show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from distsurf.surface import Surface
from distsurf.view.points import imprecision_in_words, remarks
from tests.view.surfaces import bowl, decades, surface_of

AXES = (-1.0, 1.0, 11), (-1.0, 1.0, 11)


def _with_errors(surface: Surface, *pairs: list[float], precision: str = "bf16") -> Surface:
    errors = [{"at": [0.0, 0.0], "values": {"train_loss": pair}} for pair in pairs]
    return replace(surface, facts={"evaluation": {"precision": precision, "errors": errors}})


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([[1.0, 1.0]], ""),
        ([[1.0, 1.009]], ""),
        ([[1.0, 1.02], [2.0, 1.95]], "bf16: train_loss is off by up to 5.0% of the range"),
        ([[float("nan"), 1.0], [float("inf"), 1.0]], ""),
        ([[1.0, float("inf")], [1.0, 1.5]], "bf16: train_loss is not finite where float64 is"),
        ([], ""),
    ],
)
def test_error_as_a_share_of_the_range(pairs: list[list[float]], expected: str) -> None:
    surface = surface_of(lambda x, y: (x + 1) / 2 + 0 * y, *AXES)  # from 0 to 1
    surface = _with_errors(surface, *pairs)
    assert imprecision_in_words(surface, surface.columns) == expected
    assert remarks(surface, surface.columns) == expected


def test_on_a_log_scale_errors_of_small_values_count() -> None:
    """Twice 0.001 is nothing of a range up to 1,000, but a twentieth of six decades."""
    surface = _with_errors(surface_of(decades, *AXES), [0.001, 0.002])
    assert imprecision_in_words(surface, surface.columns) == ""
    assert (
        imprecision_in_words(surface, surface.columns, log=True)
        == "bf16: train_loss is off by up to 5.0% of the range"
    )


def test_a_flat_surface_and_an_unfinished_one() -> None:
    flat = _with_errors(surface_of(lambda x, y: 1 + 0 * x, *AXES), [1.0, 1.1])
    assert imprecision_in_words(flat, flat.columns) == "bf16: train_loss is off by more than its range"
    part = _with_errors(surface_of(bowl, *AXES, evaluated=0.5), [1.0, 2.0])
    assert remarks(part, part.columns).startswith("60 of 121 points evaluated; bf16: train_loss is off")


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"evaluation": 3},
        {"evaluation": {"precision": "x"}},
        {"evaluation": {"errors": 5}},
        {"evaluation": {"precision": 1, "errors": [{}]}},
        {"evaluation": {"precision": 1, "errors": [{"values": {"train_loss": "x"}}]}},
    ],
)
def test_files_that_do_not_tell(facts: Any) -> None:
    surface = replace(surface_of(bowl, *AXES), facts=facts)
    assert imprecision_in_words(surface, surface.columns) == ""


def test_pictures_carry_the_note() -> None:
    surface = _with_errors(surface_of(bowl, *AXES), [1.0, 2.0])
    for kind in ("contour", "surface"):
        figure = surface.plot(kind=kind)
        texts = [axes.get_title() for axes in figure.axes] + [str(t.get_text()) for t in figure.texts]
        assert any("bf16: train_loss is off" in text for text in [*texts, figure.get_suptitle()]), kind
    line = _with_errors(surface_of(lambda x: x**2, AXES[0]), [1.0, 2.0])
    assert "bf16: train_loss is off" in line.plot().axes[0].get_title()


def test_of_several_columns_the_worst_is_named() -> None:
    surface = surface_of(lambda x, y: (x + 1) / 2 + 0 * y, *AXES, columns={"train_loss": "", "test_loss": ""})
    values = {"train_loss": [1.0, 1.02], "test_loss": [1.0, 1.3]}
    errors = [{"at": [0, 0], "values": values}]
    surface = replace(surface, facts={"evaluation": {"precision": "fp16", "errors": errors}})
    assert remarks(surface, surface.columns) == "fp16: test_loss is off by up to 30.0% of the range"
