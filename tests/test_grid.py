from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distsurf.errors import InputError
from distsurf.grid import Axis, Grid

axes = st.builds(
    lambda low, span, count: Axis(low, low if count == 1 else low + span, count),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
    st.integers(1, 12),
)


@given(axes)
def test_axis_values_are_linspace(axis: Axis) -> None:
    assert axis.values[0] == axis.low
    assert axis.values[-1] == axis.high
    np.testing.assert_allclose(
        axis.values, np.linspace(axis.low, axis.high, axis.count), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("count", [3, 51, 251, 1001])
def test_symmetric_axis_has_exact_zero_and_symmetry(count: int) -> None:
    values = Axis.parse(f"-0.7:0.7:{count}").values
    assert values[count // 2] == 0
    np.testing.assert_array_equal(values, -values[::-1])


@given(axes)
def test_text_of_an_axis_reads_back(axis: Axis) -> None:
    assert Axis.parse(str(axis)) == axis


@given(st.lists(axes, min_size=1, max_size=3))
def test_coordinates_follow_numpy_order(axes: list[Axis]) -> None:
    grid = Grid(tuple(axes))
    stored = np.meshgrid(*[axis.values for axis in reversed(axes)], indexing="ij")[::-1]
    expected = np.stack([c.ravel() for c in stored], axis=1)
    np.testing.assert_array_equal(grid.coordinates(np.arange(grid.size)), expected)


@given(st.lists(axes, min_size=1, max_size=3))
def test_coarse_to_fine_visits_every_point_once(axes: list[Axis]) -> None:
    grid = Grid(tuple(axes))
    np.testing.assert_array_equal(np.sort(grid.coarse_to_fine()), np.arange(grid.size))


@given(st.lists(axes, min_size=1, max_size=2), st.integers(2, 5))
def test_repetitions_come_on_together(axes: list[Axis], count: int) -> None:
    once = Grid(tuple(axes))
    grid = once.repeat(count)
    assert (grid.once, grid.repeats, grid.names[-1]) == (once, count, "repeat")
    order = grid.coarse_to_fine()
    np.testing.assert_array_equal(np.sort(order), np.arange(grid.size))
    for each in range(count):
        np.testing.assert_array_equal(order[order // once.size == each] % once.size, once.coarse_to_fine())
    corners = once.size if once.size < 5 else 2 ** sum(axis.count > 1 for axis in axes)
    assert {int(point) // once.size for point in order[: corners * count]} == set(range(count))


def test_what_cannot_be_repeated() -> None:
    with pytest.raises(InputError, match="cannot be repeated: leave out z"):
        Grid.parse(dict.fromkeys("xyz", "0:1:2")).repeat(2)
    with pytest.raises(InputError, match="does not count repetitions"):
        Grid((Axis(0, 1, 2), Axis(0, 1, 3)), repeated=True)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6])
def test_any_prefix_of_the_order_covers_the_grid(share: float) -> None:
    """The largest hole of a prefix is at most a few times that of the same number of evenly spread points."""
    from scipy.spatial import cKDTree

    grid = Grid.parse({"x": "0:50:51", "y": "0:50:51"})
    prefix = grid.coarse_to_fine()[: int(share * grid.size)]
    holes, _ = cKDTree(grid.coordinates(prefix)).query(grid.coordinates(np.arange(grid.size)))
    even = np.sqrt(0.5) * 50 / (np.sqrt(len(prefix)) - 1)
    assert holes.max() <= 2.5 * even


def test_corners_come_first() -> None:
    grid = Grid.parse({"x": "-1:1:5", "y": "0:1:3"})
    assert {tuple(c) for c in grid.coordinates(grid.coarse_to_fine()[:4])} == {
        (-1, 0),
        (1, 0),
        (-1, 1),
        (1, 1),
    }


@pytest.mark.parametrize(
    "text",
    ["1:2", "a:b:c", "", "0:1:2:3", "0:1:0", "0:1:2.5", "1:0:5", "0:nan:3", "0:inf:3", "0:1:1", "0:0:2"],
)
def test_unreadable_axis_is_one_line(text: str) -> None:
    with pytest.raises(InputError) as error:
        Axis.parse(text)
    assert "\n" not in str(error.value)


def test_axes_must_be_given_in_order() -> None:
    with pytest.raises(InputError, match="expected x, or x and y"):
        Grid.parse({"x": "0:1:2", "z": "0:1:2"})
