"""Every kind of picture of every kind of surface: drawn without a warning, oriented, marked and saved right."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from mpl_toolkits.mplot3d.proj3d import proj_transform
from PIL import Image

from distsurf.errors import InputError
from distsurf.surface.surface import Surface
from distsurf.view import contour, curves, plot, slices, surface3d
from tests.conftest import Processes
from tests.view.surfaces import (
    BOTH,
    CUBES,
    LINES,
    PLANES,
    SQUARE,
    basin,
    bowl,
    chaos,
    decades,
    fail,
    holed,
    rotated,
    stretched,
    surface_of,
)

pytestmark = pytest.mark.filterwarnings("error")

CASES = [
    *[(kind, name, make) for kind in ("contour", "surface") for name, make in PLANES.items()],
    *[("curves", name, make) for name, make in LINES.items()],
    *[("slices", name, make) for name, make in CUBES.items()],
]
WIDTHS = {"contour": 4.2, "surface": 4.2, "curves": 4.2, "slices": 1.4 * 4.2}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def pixel(figure: Figure, axes: Axes, *at: float) -> np.ndarray:
    """The colour drawn at coordinates of a plane (x, y) or of a box (x, y, z), red, green, blue from 0 to 1."""
    figure.canvas.draw()
    image = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    if len(at) == 3:
        at = proj_transform(*at, axes.get_proj())[:2]  # type: ignore[attr-defined]
    column, row = axes.transData.transform(at[:2])
    return image[image.shape[0] - 1 - round(row), round(column), :3] / 255


def brightness(*arguments: Any) -> float:
    return float(pixel(*arguments) @ [0.2126, 0.7152, 0.0722])


def marked(axes: Axes, marker: str) -> list[tuple[float, float]]:
    return [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == marker]


@pytest.mark.parametrize(("kind", "make"), [c[::2] for c in CASES], ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_draws_and_saves(kind: str, make: Callable[[], Surface], tmp_path: Path) -> None:
    figure = plot(make(), kind=kind, path=tmp_path / "picture.png")
    assert figure.axes
    with Image.open(tmp_path / "picture.png") as image:
        image.load()
        assert image.format == "PNG"
        assert 0.7 <= image.width / 200 / WIDTHS[kind] <= 1.05
        assert 1.0 <= image.height / 200 <= 9.0
    assert os.listdir(tmp_path) == ["picture.png"]


@pytest.mark.parametrize(("kind", "size"), [("contour", (3.3, 2.8)), ("surface", (6.8, 5.5))])
def test_other_sizes(kind: str, size: tuple[float, float], tmp_path: Path) -> None:
    plot(surface_of(chaos, *SQUARE), kind=kind, size=size, title="A title", path=tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert 0.7 <= image.width / 200 / size[0] <= 1.05
        assert 0.7 <= image.height / 200 / size[1] <= 1.05


@pytest.mark.parametrize("name", ["losses and accuracies", "holes", "alternating", "loss alone"])
def test_curves_fill_their_figure(name: str) -> None:
    assert plot(LINES[name]()).axes[0].get_position().height > 0.55


def test_kind_follows_the_number_of_axes() -> None:
    assert len(plot(surface_of(basin, (-1, 1, 5))).axes[0].lines) == 2  # the curve, the origin
    assert marked(plot(surface_of(bowl, *SQUARE)).axes[0], "o")
    assert sum("z = " in text for text in texts(plot(CUBES["bowl"]()))) == 9


def test_kind_that_does_not_fit() -> None:
    line, plane, cube = LINES["loss alone"](), PLANES["bowl"](), CUBES["bowl"]()
    for surface, kind, instead in (
        (line, "contour", "use curves"),
        (line, "surface", "use curves"),
        (plane, "slices", "use contour or surface"),
        (cube, "curves", "use slices"),
    ):
        with pytest.raises(InputError, match=instead):
            plot(surface, kind=kind)
    with pytest.raises(InputError, match="expected curves, contour, surface, slices"):
        plot(plane, kind="heatmap")


def test_unknown_option_and_column() -> None:
    with pytest.raises(InputError, match=r"contour has no option colour; it has levels.*cmap"):
        plot(PLANES["bowl"](), colour="red")
    with pytest.raises(InputError, match="train_loss"):
        plot(PLANES["bowl"](), "grad_norm")
    with pytest.raises(InputError, match="viridis"):
        contour(PLANES["bowl"](), cmap="rainbows")
    with pytest.raises(InputError, match="inches"):
        contour(PLANES["bowl"](), size=(0, 3))


def test_default_column_is_what_there_is() -> None:
    assert "Mse" in texts(plot(surface_of(bowl, *SQUARE, columns={"mse": ""})))
    assert "Test loss" in texts(
        plot(surface_of(bowl, *SQUARE, columns={"a": "", "test_loss": "", "val_loss": ""}))
    )


# --- orientation: arrays are [y, x] -------------------------------------------------------------------------


def in_one_corner(x: np.ndarray, y: np.ndarray, z: float | np.ndarray = 0.0) -> np.ndarray:
    """Large only where x is large and y small."""
    return np.exp(2 * (x - y)) + z


def test_contour_is_not_transposed_or_flipped() -> None:
    surface = surface_of(in_one_corner, (-1, 1, 15), (-1, 1, 9))
    figure = contour(surface, log=False)
    corners = {(x, y): brightness(figure, figure.axes[0], 0.9 * x, 0.9 * y) for x in (-1, 1) for y in (-1, 1)}
    assert max(corners, key=corners.__getitem__) == (1, -1)
    assert min(corners, key=corners.__getitem__) == (-1, 1)


def test_strip_is_not_flipped() -> None:
    up = contour(surface_of(lambda x, y: y + 5, (0, 0, 1), (-1, 1, 9)))
    assert brightness(up, up.axes[0], 0.3, 0.9) > brightness(up, up.axes[0], 0.3, -0.9) + 0.3
    across = contour(surface_of(lambda x, y: x + 5, (-1, 1, 9), (0, 0, 1)))
    assert brightness(across, across.axes[0], 0.9, 0.3) > brightness(across, across.axes[0], -0.9, 0.3) + 0.3


def test_surface_is_not_transposed_or_flipped() -> None:
    surface = surface_of(in_one_corner, (-1, 1, 15), (-1, 1, 9))
    figure = surface3d(surface, log=False, elev=90, azim=-90)
    height = {
        (x, y): float(in_one_corner(np.float64(x), np.float64(y))) for x in (-0.9, 0.9) for y in (-0.9, 0.9)
    }
    corners = {at: brightness(figure, figure.axes[0], *at, z) for at, z in height.items()}
    assert max(corners, key=corners.__getitem__) == (0.9, -0.9)


def test_slices_are_not_transposed_or_out_of_order() -> None:
    surface = surface_of(in_one_corner, (-1, 1, 15), (-1, 1, 9), (0, 20, 3))
    figure = slices(surface, log=False)
    panels = [axes for axes in figure.axes if axes.get_title().startswith("z")]
    assert [axes.get_title() for axes in panels] == ["z = 0", "z = 10", "z = 20"]
    middle = [brightness(figure, axes, 0.1, 0.1) for axes in panels]
    assert middle == sorted(middle)
    assert brightness(figure, panels[0], 0.9, -0.9) > brightness(figure, panels[0], -0.9, 0.9) + 0.1


# --- marks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "axes", "where", "value"),
    [(bowl, SQUARE, (0.12, -0.2), 0.05), (PLANES["valley, not square"], None, (1, 1), 0.001)],
)
def test_minimum_and_trained_model_are_marked(function: Any, axes: Any, where: Any, value: float) -> None:
    figure = contour(surface_of(function, *axes) if axes else function())
    assert marked(figure.axes[0], "o") == [pytest.approx(where, abs=1e-12)]
    assert marked(figure.axes[0], "+") == [(0.0, 0.0)]
    written = next(text for text in texts(figure) if text.startswith("minimum"))
    assert written == f"minimum {value:g} at ({where[0]:g}, {where[1]:g})".replace("-", "−")


def test_trained_model_outside_of_the_grid_is_not_marked() -> None:
    figure = contour(surface_of(bowl, (0.5, 1, 11), (-1, 1, 11)))
    assert marked(figure.axes[0], "+") == []
    assert "trained model" not in texts(figure)


def test_accuracy_marks_its_maximum_and_is_never_logarithmic() -> None:
    surface = surface_of(lambda x, y: 100 * np.exp(-3 * bowl(x, y)), *SQUARE, columns=BOTH)
    figure = contour(surface, "test_accuracy")
    assert marked(figure.axes[0], "o") == [pytest.approx((0.12, -0.2))]
    assert any(text.startswith("maximum 86.07 at") for text in texts(figure))
    assert {"Test accuracy (%)", "80"} <= set(texts(figure))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, ("direction 1 (x)", "direction 2 (y)")),
        ({"axes": ["toward a$_b.pt", ""]}, (r"toward a\$_b.pt (x)", "direction 2 (y)")),
        ({"axes": ["a" * 24, "along the gradient"]}, ("a" * 24 + " (x)", "along the gradient (y)")),
        ({"axes": [3]}, ("direction 1 (x)", "direction 2 (y)")),
        ({"axes": "xy", "trajectory": 7}, ("direction 1 (x)", "direction 2 (y)")),
    ],
)
def test_axes_say_what_they_lead_along(facts: dict[str, Any], expected: tuple[str, str]) -> None:
    surface = PLANES["bowl"]()
    surface.facts = facts
    for draw in (contour, surface3d):
        axes = draw(surface).axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == expected


def test_repeated_planes_show_their_mean_and_spread() -> None:
    """Quadrics turned about their minimum: all agree there, and nowhere else as much."""
    surface = surface_of(rotated, (-1, 1, 21), (-1, 1, 17), repeats=7)
    figure = slices(surface)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert set(titles) == {"mean of 7", "standard deviation", *(f"repeat = {k}" for k in range(7))}
    assert "minimum 0.05 at (0, 0), repeat 0" in [text.get_text() for text in figure.legends[0].texts]
    with pytest.raises(InputError, match="use slices, or draw one of them: --repeat NUMBER"):
        contour(surface)
    assert contour(surface.repeat(2)).axes


def test_repeated_lines_show_their_mean_and_spread() -> None:
    surface = surface_of(stretched, (-1, 1, 51), repeats=8)
    axes = curves(surface).axes[0]
    *each, mean = [line for line in axes.lines if len(line.get_xdata()) == 51]
    assert len(each) == 8
    np.testing.assert_allclose(mean.get_ydata(), surface["loss"].mean(axis=0))
    band = axes.collections[0].get_paths()[0].vertices
    top = (surface["loss"].mean(axis=0) + surface["loss"].std(axis=0, ddof=1)).max()
    assert band[:, 1].max() == pytest.approx(top)


def test_slices_mark_in_the_right_panel() -> None:
    surface = surface_of(lambda x, y, z: x**2 + y**2 + (z - 0.5) ** 2 + 1, *[(-1, 1, 5)] * 3)
    panels = slices(surface).axes[:5]
    assert [axes.get_title() for axes in panels if marked(axes, "o")] == ["z = 0.5"]
    assert [axes.get_title() for axes in panels if marked(axes, "+")] == ["z = 0"]


def test_contour_labels_are_apart() -> None:
    for make in (PLANES["bowl"], PLANES["chaos"]):
        figure = contour(make())
        figure.canvas.draw()
        labels = [text for text in figure.axes[0].texts if text.get_text()[:1].isdecimal()]
        assert len(labels) >= 4
        places = np.array([text.get_window_extent().corners().mean(axis=0) for text in labels])
        apart = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(len(places))
        assert apart.min() > 10  # pixels at 100 dpi: one and a half times the height of the text


# --- what is not there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["contour", "surface"])
def test_says_how_many_points_were_evaluated(kind: str) -> None:
    surface = surface_of(chaos, *SQUARE, evaluated=1200 / 2601)
    assert "1,200 of 2,601 points evaluated" in texts(plot(surface, kind=kind))
    fail(surface, (0, 0), (50, 50), (0, 50))
    surface.status[25, 25] = 2
    expected = "1,196 of 2,601 points evaluated, 1 interpolated, 3 failed"
    assert expected in texts(plot(surface, kind=kind))
    assert not any("evaluated" in text for text in texts(plot(surface_of(bowl, *SQUARE), kind=kind)))


def test_says_so_on_curves_and_slices_too() -> None:
    assert "26 of 51 points evaluated" in texts(plot(LINES["half done"]()))
    assert "172 of 572 points evaluated" in texts(plot(CUBES["half done"]()))


def test_holes_are_grey_and_counted() -> None:
    surface = fail(surface_of(holed, *SQUARE), (40, 5))
    figure = contour(surface)
    for at in ((0.5, 0.5), (0.5, 0.6), (-0.99, -0.99), (-0.8, 0.62)):
        red, green, blue = pixel(figure, figure.axes[0], *at)
        assert red == green == blue, at
    assert {f"not finite ({np.count_nonzero(~np.isfinite(surface['loss'])) - 1})", "failed (1)"} <= set(
        texts(figure)
    )


def test_unfinished_holes_are_not_bridged() -> None:
    surface = surface_of(holed, *SQUARE, evaluated=0.3)
    figure = contour(surface)
    red, green, blue = pixel(figure, figure.axes[0], 0.5, 0.5)
    assert red == green == blue


def test_unfinished_surface_is_interpolated() -> None:
    whole, part = (contour(surface_of(bowl, *SQUARE, evaluated=e), vmin=0.05, vmax=6) for e in (1, 0.3))
    for at in ((-0.63, 0.41), (0.77, -0.9), (0.31, 0.86)):
        np.testing.assert_allclose(
            pixel(part, part.axes[0], *at), pixel(whole, whole.axes[0], *at), atol=0.08
        )


def test_nothing_to_see() -> None:
    for kind in ("contour", "surface"):
        assert "no point evaluated yet" in texts(plot(PLANES["all pending"](), kind=kind))
        assert "no finite value" in texts(plot(PLANES["nothing finite"](), kind=kind))


def test_outliers_are_clipped_in_a_colour_of_their_own() -> None:
    figure = contour(PLANES["spikes"]())
    colour = pixel(figure, figure.axes[0], 0.6, 0.0)
    assert brightness(figure, figure.axes[0], 0.6, 0.0) > 0.9
    top = matplotlib.colormaps["viridis"](1.0)[:3]
    assert np.abs(colour - to_rgb(top)).max() > 0.3
    limited = contour(surface_of(bowl, *SQUARE), vmax=1.0, log=False)
    np.testing.assert_allclose(pixel(limited, limited.axes[0], -0.95, 0.5), colour, atol=0.02)


def test_lines_that_would_hide_the_colours_are_left_out() -> None:
    noise = np.random.default_rng(0).normal(size=(251, 251))
    surface = surface_of(lambda x, y: x * 0, (-1, 1, 251), (-1, 1, 251))
    surface.values["train_loss"][:] = noise
    assert len(contour(surface).axes[0].collections) == 1  # the bands alone
    assert len(contour(surface_of(chaos, *SQUARE)).axes[0].collections) == 2


# --- scale, curves -------------------------------------------------------------------------------------------


def test_heights_on_a_logarithmic_scale_have_real_values_at_their_ticks() -> None:
    axes = surface3d(surface_of(decades, *SQUARE)).axes[0]
    written = [text.get_text() for text in axes.get_zticklabels()]  # type: ignore[attr-defined]
    assert written == ["0.001", "0.01", "0.1", "1", "10", "100", "1000"]
    np.testing.assert_allclose(axes.get_zticks(), range(-3, 4), atol=1e-12)  # type: ignore[attr-defined]


def test_curves_of_the_paper() -> None:
    figure = curves(surface_of(basin, (-1, 1, 51), columns=BOTH))
    left, right = figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("Loss", "Accuracy (%)")
    assert left.get_yscale() == "log"
    assert right.get_yscale() == "linear"
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert drawn["Train loss"].get_linestyle() == drawn["Train accuracy"].get_linestyle() == "-"
    assert drawn["Test loss"].get_linestyle() == drawn["Test accuracy"].get_linestyle() == "--"
    assert (
        drawn["Train loss"].get_color()
        == drawn["Test loss"].get_color()
        != drawn["Test accuracy"].get_color()
    )
    np.testing.assert_allclose(drawn["Train loss"].get_ydata(), basin(np.linspace(-1, 1, 51)))
    assert len(figure.legends) == 1


def test_curves_of_named_columns() -> None:
    surface = surface_of(basin, (-1, 1, 51), columns={**BOTH, "grad_norm": ""})

    def shown(figure: Figure) -> set[str]:
        return {
            str(line.get_label())
            for axes in figure.axes
            for line in axes.lines
            if line.get_label()[:1] != "_"
        }

    origin = {"trained model"}
    assert shown(curves(surface, "loss")) == {"Train loss", "Test loss"} | origin
    assert shown(plot(surface, "grad_norm")) == {"Grad norm"} | origin
    assert shown(curves(surface, ["test_accuracy", "grad_norm"])) == {"Test accuracy", "Grad norm"} | origin
    with pytest.raises(InputError, match="grad_norm"):
        curves(surface, ["nonsense"])


def test_curves_join_pending_points_and_break_at_holes() -> None:
    figure = curves(fail(surface_of(basin, (-1, 1, 51), evaluated=0.5), (0,)))
    line = figure.axes[0].lines[0]
    assert len(line.get_xdata()) == 26
    assert np.isnan(np.asarray(line.get_ydata(), dtype=float)[0])
    assert np.isfinite(np.asarray(line.get_ydata(), dtype=float)[1:]).all()


# --- texts, files, surroundings -------------------------------------------------------------------------------


def test_text_is_never_mathematics(tmp_path: Path) -> None:
    title = r"cost in $: {\theta_0} $\frac{1 $x^2$ %"
    for kind, surface in (
        ("contour", surface_of(bowl, *SQUARE, columns={"$\\bad{_loss": "$"})),
        ("surface", surface_of(bowl, *SQUARE, columns={"$\\bad{_loss": "$"})),
        ("curves", surface_of(basin, (-1, 1, 9), columns={"$\\bad{_loss": "$", "$x$": "$"})),
        ("slices", surface_of(lambda x, y, z: x, *[(-1, 1, 2)] * 3, columns={"$\\bad{_loss": "$"})),
    ):
        figure = plot(surface, kind=kind, title=title, path=tmp_path / f"{kind}.svg")
        assert title in " ".join(texts(figure)).replace("\n", " ")


@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89PNG")])
def test_formats(suffix: str, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"a b'$.{suffix}"
    plot(PLANES["two by two"](), path=str(path))
    assert path.read_bytes().startswith(start)


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    surface = PLANES["two by two"]()
    with pytest.raises(InputError, match=r"\.png, \.pdf, \.svg"):
        plot(surface, path=tmp_path / "picture.jpeg")
    with pytest.raises(InputError, match="no folder"):
        plot(surface, path=tmp_path / "absent" / "picture.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="cannot save"):
        plot(surface, path=tmp_path / "folder.png")
    assert os.listdir(tmp_path) == ["folder.png"]


def test_a_full_disk_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    plot(PLANES["two by two"](), path=path)
    before = path.read_bytes()

    def half(self: Figure, name: Path, **options: Any) -> None:
        name.write_bytes(before[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(InputError, match="No space left"):
        plot(PLANES["two by two"](), path=path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["picture.png"]


def test_displays_in_a_notebook() -> None:
    assert plot(PLANES["two by two"]())._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_the_callers_style_neither_leaks_in_nor_is_changed() -> None:
    def drawn() -> bytes:
        figure = plot(PLANES["bowl"]())
        figure.canvas.draw()
        return bytes(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]

    plain = drawn()
    own = {
        "font.size": 30,
        "axes.facecolor": "black",
        "axes.grid": True,
        "figure.constrained_layout.h_pad": 1,
    }
    with matplotlib.rc_context(own):
        before = dict(matplotlib.rcParams)
        assert drawn() == plain
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_never_imported(processes: Processes) -> None:
    ended = processes.python(
        "-W",
        "error",
        "-c",
        "import sys, numpy as np\n"
        "from distsurf.grid import Grid\n"
        "from distsurf.surface import Column, Surface\n"
        "grid = Grid.parse({'x': '-1:1:5', 'y': '-1:1:5'})\n"
        "values = np.arange(25.0).reshape(5, 5)\n"
        "surface = Surface(grid, (Column('loss'),), {'loss': values}, np.ones((5, 5), np.uint8), values)\n"
        "surface.plot(path='picture.png')\n"
        "surface.plot(kind='surface', path='picture.svg')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n",
    )
    assert ended.code == 0, ended.err


def test_a_trajectory_and_the_models_are_drawn() -> None:
    """Where they lie, with what they are; facts of a stranger's that are no path are no path."""
    surface = surface_of(bowl, *SQUARE)
    path = [[-0.5, 0.5], [0.25, 0.5], [0.0, 0.0]]
    surface.facts = {
        "trajectory": {"coordinates": path, "explained": [0.75, 0.125]},
        "models": [
            {"name": "a$b.pt", "at": [0, 0]},
            {"name": "far.pt", "at": [9, 9]},
            {"name": "b.pt", "at": [0.5, 0]},
        ],
    }
    figure = contour(surface)
    (axes,) = [axes for axes in figure.axes if axes.get_xlabel()]
    assert axes.get_xlabel() == "component 1 (75.0% of the variance)"
    told = texts(figure)
    assert {"trajectory, 3 checkpoints", "its start", r"a\$b.pt", "b.pt"} <= set(told)
    assert "far.pt" not in told
    (line,) = [line for line in axes.get_lines() if line.get_label() == "trajectory, 3 checkpoints"]
    np.testing.assert_array_equal(np.transpose(line.get_data()), path)
    for odd in ({"coordinates": [[1]]}, {"coordinates": "x"}, 3, None, {"coordinates": [[0, float("nan")]]}):
        surface.facts = {"trajectory": odd, "models": [odd, {"name": 1}, {"at": [0]}]}
        assert surface.trajectory is None
        assert "trained model" in texts(contour(surface))
