"""When a scale is logarithmic, where it is clipped, and how its levels and numbers read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsurf.errors import InputError
from distsurf.view.scale import choose, number, numbers
from tests.view.surfaces import SQUARE, bowl, chaos, decades, spiked, surface_of

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(
    ("values", "log"),
    [
        (np.geomspace(1e-3, 1e3, 500), True),
        (np.geomspace(1, 12, 500), True),
        (np.linspace(1, 9, 500), False),
        (-np.geomspace(1e-3, 1e3, 500), False),
        (np.r_[0.0, np.geomspace(1e-3, 1e3, 500)], False),
        (np.r_[1e-9, np.linspace(2, 3, 500)], False),  # one deep point alone
        (np.r_[np.linspace(2, 3, 500), 1e9], False),  # one outlier alone
        (np.r_[np.nan, np.geomspace(1e-3, 1e3, 9), np.inf], True),
        (np.full(3, np.nan), False),
        (np.empty(0), False),
    ],
)
def test_logarithmic_where_the_range_asks_for_it(values: np.ndarray, log: bool) -> None:
    assert choose(values).log is log
    assert choose(values, bounded=True).log is False


def test_log_as_asked() -> None:
    values = np.linspace(1, 2, 50)
    assert choose(values, log=True).log
    assert not choose(np.geomspace(1, 1e6, 50), log=False).log
    with_zero = choose(np.r_[0.0, np.geomspace(0.1, 10, 50)], log=True)
    assert with_zero.extend == "min"
    np.testing.assert_allclose(with_zero.low, -1)
    with pytest.raises(InputError, match="positive"):
        choose(-values, log=True)
    with pytest.raises(InputError, match="positive"):
        choose(values, log=True, vmin=0)
    assert not choose(np.geomspace(1, 1e6, 50), vmin=0).log


def test_huge_outliers_are_clipped_and_nothing_else() -> None:
    assert choose(surface_of(bowl, *SQUARE)["loss"]).extend == "neither"
    assert choose(surface_of(chaos, *SQUARE)["loss"]).extend == "neither"
    assert choose(surface_of(decades, *SQUARE)["loss"]).extend == "neither"
    clipped = choose(surface_of(spiked, *SQUARE)["loss"])
    assert clipped.extend == "max"
    assert clipped.high < 20
    assert choose(np.r_[np.linspace(2, 3, 500), -1e6]).extend == "min"
    assert choose(np.r_[np.linspace(2, 3, 500), -5]).extend == "neither"  # a narrow minimum is not an outlier
    assert choose(np.r_[np.linspace(2, 3, 24), 1e6]).extend == "max"
    assert choose(np.r_[np.linspace(2, 3, 8), 1e6]).extend == "neither"  # of nine, who is to say


def test_limits_and_levels_as_given() -> None:
    values = np.linspace(0, 10, 100)
    scale = choose(values, vmin=1.3, vmax=7.7)
    assert (scale.low, scale.high, scale.extend) == (1.3, 7.7, "both")
    assert list(choose(values, levels=[5, 2, 8, 2]).levels) == [2, 5, 8]
    assert len(choose(values, levels=5).levels) < len(choose(values, levels=25).levels)
    np.testing.assert_allclose(choose(values + 1, levels=[1, 10, 100], log=True).levels, [0, 1, 2])
    assert choose(np.empty(0), vmin=5).low == 5
    assert choose(np.empty(0), vmax=-5).high == -5
    for wrong in ({"vmin": 3, "vmax": 3}, {"vmin": 11}, {"vmax": float("nan")}, {"levels": [1]}):
        with pytest.raises(InputError):
            choose(values, **wrong)  # type: ignore[arg-type]


@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1e9),
    st.one_of(st.none(), st.integers(1, 30)),
)
def test_linear_levels_cover_the_values(low: float, width: float, count: int | None) -> None:
    values = np.linspace(low, low + width, 200)
    scale = choose(values, log=False, levels=count)
    assert (np.diff(scale.levels) > 0).all()
    assert scale.extend == "neither"
    assert len(scale.levels) <= (count or 14) + 5
    assert len(set(scale.texts(scale.ticks))) == len(scale.ticks) <= 10


@given(st.floats(-12, 12), st.floats(0.001, 40))
def test_logarithmic_levels_cover_the_values_evenly(low: float, decades: float) -> None:
    values = np.logspace(low, low + decades, 200)
    scale = choose(values, log=True)
    steps = np.diff(scale.levels)
    assert (steps > 0).all()
    assert scale.extend == "neither"
    assert 3 <= len(scale.levels) <= 18
    assert steps.max() < 3 * steps.min() or decades < 0.5
    assert len(set(scale.texts(scale.ticks))) == len(scale.ticks) <= 10


def test_levels_are_round() -> None:
    assert choose(np.linspace(0.03, 4.9, 99), log=False).texts(np.array([0.5, 1.0])) == ["0.5", "1"]
    log = choose(np.geomspace(0.0012, 870, 99))
    assert log.texts(log.levels)[:4] == ["0.001", "0.003", "0.01", "0.03"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (-0.25, "−0.25"),
        (0.001, "0.001"),
        (0.05124, "0.05124"),
        (12345.6, "12350"),
        (100.0, "100"),
        (1e5, "$10^{5}$"),
        (-1e-7, "$-10^{-7}$"),
        (1.5e-5, r"$1.5\times10^{-5}$"),
        (2e10, r"$2\times10^{10}$"),
        (9.99999, "10"),
    ],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert number(value) == text


def test_numbers_have_the_digits_that_tell_them_apart() -> None:
    assert numbers(np.array([0.0, 2.5, 5.0])) == ["0", "2.5", "5"]
    assert numbers(np.array([2.3025, 2.303, 2.3035])) == ["2.3025", "2.303", "2.3035"]
    assert numbers(np.array([-1e-17, 0.1, 0.2])) == ["0", "0.1", "0.2"]
    assert numbers(np.array([1e-4, 1.0, 1e4])) == ["$10^{-4}$", "1", "10000"]
