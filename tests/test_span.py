"""Directions of every kind: what they span is compared with the models themselves, autograd and finite differences."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distsurf
from distsurf.errors import InputError
from distsurf.job import Job
from distsurf.surface import Surface

INPUTS, TARGETS = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 5


def net(affine: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, affine=affine), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    )


def trained(seed: int, affine: bool = True) -> nn.Module:
    """A few steps from a start of its own."""
    torch.manual_seed(seed)
    model = net(affine)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    return [trained(seed) for seed in (1, 2, 3)]


def evaluate(model: nn.Module, directions: dict[str, Any] | None = None, **settings: Any) -> Surface:
    return distsurf.evaluate(
        model, (INPUTS, TARGETS), directions=directions, **{"x": "-0.5:1.5:9", "progress": "none", **settings}
    )


def own(model: nn.Module, **settings: Any) -> float:
    """A model's loss at the origin of a surface of its own."""
    return float(evaluate(model, {"ignore": "none"}, **{**settings, "x": "0:0:1"})["loss"][0])


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_interpolation_begins_and_ends_at_the_models(models: list[nn.Module], precision: str) -> None:
    """To the last bit, statistics included; in between, θ is the mean of both, and counters stay where they are."""
    settings: dict[str, Any] = {"batch_norm": "interpolated", "precision": precision, "fast": False}
    wish = {"kind": "difference", "checkpoint": models[1]}
    surface = evaluate(models[0], wish, **settings)
    ends = [float(surface["loss"][surface.x == at][0]) for at in (0.0, 1.0)]
    assert ends == [own(model, **settings) for model in models[:2]]
    middle = net().eval()
    states = [model.state_dict() for model in models[:2]]
    middle.load_state_dict(
        {n: t if t.dtype == torch.int64 else (t + states[1][n]) / 2 for n, t in states[0].items()}
    )
    np.testing.assert_allclose(surface["loss"][surface.x == 0.5], own(middle, **settings), rtol=1e-6)
    assert [name for name, _ in surface.models] == ["trained model", "checkpoint 1"]
    values = surface["loss"][2:7]
    assert surface.barrier() == values.max() - (values[0] + values[-1]) / 2
    fast = evaluate(models[0], wish, batch_norm="interpolated", precision=precision)
    np.testing.assert_allclose(fast["loss"], surface["loss"], rtol=1e-5)


@pytest.mark.parametrize("mode", ["frozen", "recomputed"])
def test_statistics_on_the_way(models: list[nn.Module], mode: str) -> None:
    """Frozen ones are those of the model at 0; recomputed ones fit the weights that the data goes through."""
    surface = evaluate(models[0], {"kind": "difference", "checkpoint": models[1]}, batch_norm=mode)
    other = net()
    other.load_state_dict(models[1].state_dict())
    if mode == "frozen":
        for name in ("running_mean", "running_var"):
            getattr(other[1], name).copy_(getattr(models[0][1], name))
    np.testing.assert_allclose(surface["loss"][surface.x == 1.0], own(other, batch_norm=mode), rtol=1e-5)


def test_a_folded_plane_ends_at_the_model_too() -> None:
    """Batch norm without weights of its own, frozen: folded once, and what is pinned with it."""
    first, second = trained(1, affine=False), trained(2, affine=False)
    wish = {"kind": "difference", "checkpoint": second.state_dict()}
    fast, plain = (evaluate(first, wish, fast=fast, x="0:1:41") for fast in (["fold"], False))
    assert fast.facts["evaluation"]["steps"] == ["fold"]
    np.testing.assert_allclose(fast["loss"], plain["loss"], rtol=1e-5)


@pytest.mark.parametrize("length", ["none", "unit", "center"])
def test_the_plane_goes_through_its_models(models: list[nn.Module], length: str) -> None:
    wish = {"kind": "plane", "checkpoints": models[1:], "normalization": length}
    settings: dict[str, Any] = {"batch_norm": "interpolated"}
    surface = evaluate(models[0], wish, y="0:1:2", x="0:1:2", **settings)
    weights = [torch.cat([t.detach().flatten().double() for t in m.parameters()]) for m in models]
    statistics = [torch.cat([m[1].running_mean, m[1].running_var]).double() for m in models]
    theta = [torch.cat(both) for both in zip(weights, statistics, strict=True)]
    unit = {"none": theta[1] - theta[0], "unit": torch.ones(1), "center": theta[0]}[length].norm()
    for (_, at), model, vector in zip(surface.models, models, theta, strict=True):
        # Both directions have one length, so that distances from the origin are true.
        np.testing.assert_allclose(np.hypot(*at) * unit, (vector - theta[0]).norm(), rtol=1e-6)
        place = {axis: f"{c!r}:{c!r}:1" for axis, c in zip("xy", at, strict=True)}
        there = evaluate(models[0], wish, **place, **settings)
        np.testing.assert_allclose(there["loss"][0, 0], own(model, **settings), rtol=1e-5)
    assert abs(surface.facts["cosines"]["xy"]) < 1e-7
    if length == "none":
        assert surface.models[1][1] == (1.0, 0.0)
        assert (
            surface["loss"][0, 1] == evaluate(models[1], {"ignore": "none"}, x="0:0:1", **settings)["loss"][0]
        )


def test_the_gradient_is_autograds(models: list[nn.Module], tmp_path: Path) -> None:
    """Of the mean loss, whatever the batches; uphill; and as long as the weights, like filter-normalized directions."""
    model = models[0]
    named = dict(model.named_parameters())
    loss = nn.functional.cross_entropy(model(INPUTS), TARGETS)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*named.values()])]).double().norm()
    length = torch.cat([p.detach().flatten() for p in named.values()]).double().norm()
    settings: dict[str, Any] = {"x": "-1e-4:1e-4:3", "precision": "fp64", "out": tmp_path / "s.h5"}
    for size, how, unit in ((7, None, length), (60, "unit", 1.0)):
        told = {"kind": "gradient", **({} if how is None else {"normalization": how})}
        surface = evaluate(model, told, batch_size=size, fresh=True, **settings)
        found = (surface["loss"][2] - surface["loss"][0]) / 2e-4
        np.testing.assert_allclose(found, float(slope * unit), rtol=1e-4)
    assert len(list(tmp_path.glob("s.gradient-*.safetensors"))) == 2


def test_a_gradient_is_computed_once(models: list[nn.Module], tmp_path: Path) -> None:
    """Another machine would compute other last digits, and its shard would be of another job."""
    settings: dict[str, Any] = {"out": tmp_path / "s.h5", "x": "0:1:3"}
    first = evaluate(models[0], {"kind": "gradient"}, **settings)
    (kept,) = tmp_path.glob("s.gradient-*.safetensors")
    before = kept.read_bytes()
    again = evaluate(models[0], {"kind": "gradient"}, fresh=True, **settings)
    assert kept.read_bytes() == before
    assert again["loss"].tobytes() == first["loss"].tobytes()
    with pytest.raises(InputError, match="is of other weights: remove it"):
        evaluate(models[1], {"kind": "gradient"}, fresh=True, **settings)


def _li2018(path: Path, arrays: list[np.ndarray]) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("xdirection")
        for i, array in enumerate(arrays):
            group.create_dataset(str(i), data=array)


def test_directions_from_files(models: list[nn.Module], tmp_path: Path) -> None:
    """One direction in every form that is read: always the same surface."""
    other, model = models[1], models[0]
    state = {n: t - model.state_dict()[n] for n, t in other.state_dict().items() if t.is_floating_point()}
    parameters = {name: state[name] for name, _ in model.named_parameters()}
    save_file(parameters, tmp_path / "one.safetensors")
    save_file({f"x.{name}": t for name, t in parameters.items()}, tmp_path / "axes.safetensors")
    torch.save({"state_dict": parameters}, tmp_path / "torch.pt")
    _li2018(tmp_path / "weights.h5", [t.numpy() for t in parameters.values()])
    _li2018(tmp_path / "states.h5", [np.asarray(state.get(name, 0)) for name in model.state_dict()])
    expected = evaluate(model, {"kind": "difference", "checkpoint": other}, x="-0.5:0.5:5")
    for name in ("one.safetensors", "axes.safetensors", "torch.pt", "weights.h5", "states.h5"):
        found = evaluate(model, {"kind": "file", "file": tmp_path / name}, x="-0.5:0.5:5")
        assert found["loss"].tobytes() == expected["loss"].tobytes(), name
    with pytest.raises(InputError, match="has no group ydirection; it has xdirection"):
        evaluate(model, {"kind": "file", "file": tmp_path / "weights.h5"}, y="-1:1:3")


def test_each_axis_has_a_direction_of_its_own(models: list[nn.Module]) -> None:
    """On the axes y = 0 and x = 0 the surface is that of the one direction alone."""
    difference = {"kind": "difference", "checkpoint": models[1]}
    both = evaluate(models[0], {"x": difference, "seed": 5}, x="0:1:3", y="0:1:3", fast=False)
    for axis, own, values in (("x", difference, both["loss"][0]), ("y", {"seed": 5}, both["loss"][:, 0])):
        if axis == "x":
            np.testing.assert_array_equal(evaluate(models[0], own, x="0:1:3", fast=False)["loss"], values)
        else:
            plane = evaluate(models[0], own, x="0:1:3", y="0:1:3", fast=False)
            np.testing.assert_array_equal(plane["loss"][:, 0], values)
    rotated = evaluate(
        models[0], {"x": difference, "orthogonalize": True}, x="0:1:3", y="0:1:3", normalization="filter"
    )
    assert abs(rotated.facts["cosines"]["xy"]) < 1e-6


def test_the_model_is_left_as_it_was(models: list[nn.Module]) -> None:
    """Others' weights are loaded into it for a moment, also where they do not fit."""
    before = {name: (t.data_ptr(), t.clone()) for name, t in models[0].state_dict().items()}
    odd = {**models[1].state_dict(), "4.bias": torch.full((5,), torch.nan)}
    for checkpoint in (models[1], odd):
        with contextlib.suppress(InputError):
            evaluate(models[0], {"kind": "difference", "checkpoint": checkpoint}, x="0:1:2")
    after = models[0].state_dict()
    assert all(
        after[name].data_ptr() == place and torch.equal(after[name], t) for name, (place, t) in before.items()
    )


def _nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[4].bias[0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (lambda m: {"kind": "difference", "checkpoint": m[0]}, "has the same weights as the model; name another"),
        (lambda m: {"kind": "difference", "checkpoint": nn.Linear(3, 2)}, "checkpoint 1 does not fit the model"),
        (lambda m: {"kind": "difference", "checkpoint": _nan(trained(4))}, "weights are not finite: parameter 4.bias"),
        (lambda m: {"kind": "difference", "checkpoint": "none.pt"}, "no checkpoint none.pt"),
        (lambda m: {"kind": "difference"}, "kind = 'difference' needs checkpoint"),
        (lambda m: {"kind": "plane", "checkpoints": [m[1], m[1]]}, "the three models lie on a line"),
        (lambda m: {"kind": "plane", "checkpoints": [m[0], m[1]]}, "the weights of the model itself"),
        (lambda m: {"kind": "plane", "checkpoints": [m[1]]}, "a plane goes through the model and two checkpoints"),
        (lambda m: {"kind": "plane"}, "needs checkpoints"),
        (lambda m: {"kind": "plane", "checkpoints": m[1:], "normalization": "filter"}, "would leave the plane"),
        (lambda m: {"kind": "file", "file": "none.h5"}, "no direction file none.h5"),
        (lambda m: {"z": {"kind": "random"}}, "directions.z: the grid has no axis z"),
        (lambda m: {"checkpoint": "a.pt", "kind": "random"}, "checkpoint is for kind = 'difference'"),
        (lambda m: {"x": {"kind": "plane"}}, "directions.x.kind = 'plane'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    models: list[nn.Module], wish: Callable[[list[nn.Module]], dict[str, Any]], words: str
) -> None:
    with pytest.raises(InputError) as told:
        evaluate(models[0], wish(models), y="-1:1:3")
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_a_file_that_does_not_fit(models: list[nn.Module], tmp_path: Path) -> None:
    for name, state, words in (
        ("a", {"1.weight": torch.ones(3)}, r"1.weight has shape \(3,\), and \(8,\) in the model"),
        ("b", {"other": torch.ones(3)}, "has directions for other, which the model has not"),
        ("c", {"1.weight": torch.full((8,), torch.inf)}, "1.weight holds NaN or infinity"),
        ("d", {"1.weight": torch.zeros(8)}, "directions.x: .*d.safetensors holds nothing but zeros"),
    ):
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match=words):
            evaluate(models[0], {"kind": "file", "file": tmp_path / f"{name}.safetensors"})
    _li2018(tmp_path / "e.h5", [np.ones(3)])
    with pytest.raises(InputError, match="has 1 arrays; the model has 6 parameters, and 9 tensors"):
        evaluate(models[0], {"kind": "file", "file": tmp_path / "e.h5"})


def test_an_objective_without_a_gradient(models: list[nn.Module]) -> None:
    def objective(model: nn.Module, batch: Any) -> dict[str, tuple[Any, int]]:
        return {"right": (float((model(batch[0]).argmax(1) == batch[1]).sum()), len(batch[0]))}

    with pytest.raises(InputError, match="right of the objective is not differentiable"):
        evaluate(models[0], {"kind": "gradient"}, objective=objective)


def test_a_job_file_has_the_same_directions(models: list[nn.Module], tmp_path: Path) -> None:
    text = """
    [model]
    factory = "x:y"
    [data]
    source = "x:y"
    [grid]
    x = "-1:1:3"
    y = "-1:1:3"
    [directions]
    seed = 3
    normalization = "layer"
    [directions.x]
    kind = "difference"
    checkpoint = "b.pt"
    normalization = "none"
    """
    job = Job.read(text)
    assert Job.read(job.to_toml()) == job
    x, y = job.directions.axis("x"), job.directions.axis("y")
    assert (x.kind, x.checkpoint, x.normalization, x.ignore) == ("difference", "b.pt", "none", "none")
    assert (y.kind, y.checkpoint, y.normalization, y.ignore, y.seed) == (
        "random",
        None,
        "layer",
        "bias_bn",
        3,
    )
    assert job.fingerprint != Job.read(text.replace("b.pt", "c.pt")).fingerprint


def test_axes_are_told_what_they_lead_along(models: list[nn.Module], tmp_path: Path) -> None:
    save_file(models[1].state_dict(), tmp_path / "other.safetensors")
    other = str(tmp_path / "other.safetensors")
    mixed = {"x": {"kind": "difference", "checkpoint": other}, "y": {"kind": "gradient"}, "z": {"seed": 1}}
    volume = evaluate(models[0], mixed, x="0:1:2", y="0:1:2", z="0:1:2")
    assert volume.facts["axes"] == ["toward other.safetensors", "along the gradient", ""]
    plane = evaluate(models[0], {"kind": "plane", "checkpoints": [other, models[2]]}, x="0:1:2", y="0:1:2")
    assert plane.facts["axes"] == ["toward other.safetensors", "across it, toward checkpoint 1"]
    wrapped = {f"module.{name}": tensor for name, tensor in models[1].state_dict().items()}
    save_file(wrapped, tmp_path / "parallel.safetensors")
    parallel = {"kind": "file", "file": str(tmp_path / "parallel.safetensors")}
    line = evaluate(models[0], {"kind": "file", "file": other}, x="0:1:2")
    assert evaluate(models[0], parallel, x="0:1:2")["loss"].tobytes() == line["loss"].tobytes()
    assert line.facts["axes"] == ["x of other.safetensors"]


def test_directions_that_are_one_are_refused(models: list[nn.Module], tmp_path: Path) -> None:
    save_file(models[1].state_dict(), tmp_path / "other.safetensors")
    other = str(tmp_path / "other.safetensors")
    for directions in (
        {"kind": "difference", "checkpoint": other},
        {"kind": "gradient"},
        {"kind": "file", "file": other},
    ):
        with pytest.raises(InputError, match="the directions of x and y are the same but for their length"):
            evaluate(models[0], directions, x="0:1:2", y="0:1:2")


def test_checkpoints_of_one_name_are_told_apart(models: list[nn.Module], tmp_path: Path) -> None:
    paths = [tmp_path / name / "final.safetensors" for name in ("a", "b")]
    for path, model in zip(paths, models[1:], strict=True):
        path.parent.mkdir()
        save_file(model.state_dict(), path)
    plane = evaluate(models[0], {"kind": "plane", "checkpoints": [*map(str, paths)]}, x="0:1:2", y="0:1:2")
    assert [name for name, _ in plane.models[1:]] == [str(path) for path in paths]


def test_the_barrier_of_an_accuracy_is_its_fall(models: list[nn.Module]) -> None:
    line = evaluate(models[0], {"kind": "difference", "checkpoint": models[1]}, x="0:1:5")
    values = line["accuracy"]
    assert line.barrier("accuracy") == (values[0] + values[-1]) / 2 - values.min()


# -- repeated -------------------------------------------------------------------------------------------


@torch.no_grad()
def _moved(model: nn.Module, axes: dict[int, float]) -> float:
    """The loss with the weights moved along directions that are drawn and normalized here, in float64."""
    other = copy.deepcopy(model).double()
    names = [name for name, _ in model.named_parameters()]
    for name, parameter in other.named_parameters():
        theta = parameter.detach().clone()
        if theta.ndim <= 1:
            continue
        for axis, coordinate in axes.items():
            key = np.random.SeedSequence(7, spawn_key=(axis, names.index(name)))
            drawn = torch.from_numpy(
                np.random.RandomState(np.random.Philox(key)).standard_normal(theta.shape)
            )
            rows = drawn.float().double().flatten(1)
            scaled = rows / rows.norm(dim=1, keepdim=True) * theta.flatten(1).norm(dim=1, keepdim=True)
            parameter.data += coordinate * scaled.reshape(theta.shape)
    return float(nn.functional.cross_entropy(other(INPUTS.double()), TARGETS))


def test_repeated_planes_are_independent_ones_of_the_same_model(
    models: list[nn.Module], tmp_path: Path
) -> None:
    grid = {"x": "-1:1:5", "y": "-0.5:1:4", "seed": 7, "batch_size": 60}
    path = tmp_path / "s.h5"
    whole = evaluate(models[0], {"repeat": 4}, **grid, out=path)
    once = evaluate(models[0], **grid)
    assert whole["loss"].shape == (4, 4, 5)
    assert whole.repeat(0)["loss"].tobytes() == once["loss"].tobytes()
    for repeat in range(4):
        found = whole.repeat(repeat)
        assert (found.grid, found.complete) == (once.grid, True)
        for (row, y), (column, x) in [((0, -0.5), (4, 1.0)), ((3, 1.0), (1, -0.5))]:
            expected = _moved(models[0], {3 * repeat: x, 3 * repeat + 1: y})
            np.testing.assert_allclose(found["loss"][row, column], expected, rtol=1e-5)
    mean, spread = whole.across_repeats()
    np.testing.assert_allclose(mean, np.mean(whole["loss"], axis=0))
    np.testing.assert_allclose(spread, np.sqrt(whole["loss"].var(axis=0) * 4 / 3))
    again = Surface.load(path)
    assert again.grid == whole.grid
    assert again.models == [("trained model", (0.0, 0.0))]
    told = "<Surface surface, x=-1:1:5 y=-0.5:1:4 repeat=0:3:4, 80 of 80 points: loss, accuracy>"
    assert repr(again) == told
    xarray = pytest.importorskip("xarray")
    with xarray.open_dataset(path, engine="h5netcdf") as labelled:
        assert dict(labelled["loss"].sizes) == {"repeat": 4, "y": 4, "x": 5}
        assert (labelled["loss"].sel(repeat=2).to_numpy() == whole.repeat(2)["loss"]).all()


def test_repeated_lines_cross_at_the_model(models: list[nn.Module]) -> None:
    lines = evaluate(models[0], {"repeat": 3, "orthogonalize": True}, x="-1:1:5")
    at_model = lines["loss"][:, 2]
    assert (at_model == at_model[0]).all()
    assert len(set(lines["loss"][:, 0])) == 3
    assert lines.minimum() is not None


def test_average_case_sharpness_of_a_quadratic() -> None:
    """L(w) = ½ wᵀHw: E L(ρδ) − L(0) = ½ρ² tr H for Gaussian δ, and ½ρ² Σ h_i w_i² relative to the weights."""
    scales, weights = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = weights.clone()

    def objective(model: Any, batch: Any) -> dict[str, Any]:
        return {"loss": (0.5 * (scales * (model.weight - weights).square()).sum(), 1)}

    def sharpness(how: str) -> tuple[Any, Any]:
        directions = {"repeat": 2000, "normalization": how, "ignore": "none"}
        data = (torch.zeros(1, 4), torch.zeros(1))
        found = distsurf.evaluate(
            model, data, objective=objective, directions=directions, x="0:2:3", progress="none"
        )
        return found.average_sharpness()

    for how, squares in (("none", torch.ones(4)), ("weight", weights[0].square())):
        mean, error = sharpness(how)
        for rho, found, within in zip((0.0, 1.0, 2.0), mean, error, strict=True):
            assert abs(found - 0.5 * rho**2 * float((scales * squares).sum())) <= 4 * within
        assert 0 < error[2] < 0.05 * mean[2]
    with pytest.raises(InputError, match="repeated lines through the model"):
        distsurf.evaluate(
            model,
            (torch.zeros(1, 4), torch.zeros(1)),
            objective=objective,
            x="1:2:3",
            directions={"repeat": 3},
        ).average_sharpness()


def test_an_unfinished_repetition_has_no_mean() -> None:
    from tests.view.surfaces import rotated, surface_of

    surface = surface_of(rotated, (-1, 1, 5), (-1, 1, 5), evaluated=0.5, repeats=3)
    mean, _ = surface.across_repeats()
    assert np.isfinite(mean).sum() == min(surface.repeat(k).done for k in range(3))
    assert surface.repeat(1).size == 25
    with pytest.raises(InputError, match="the surface has 3, numbered from 0"):
        surface.repeat(3)
    with pytest.raises(InputError, match="is not repeated"):
        surface.repeat(1).across_repeats()


@pytest.mark.parametrize(
    ("directions", "axes", "complaint"),
    [
        ({"repeat": 2, "kind": "gradient"}, {}, "no other kind can be repeated"),
        (
            {"repeat": 2, "y": {"kind": "file", "file": "d.h5"}},
            {"y": "0:1:2"},
            "no other kind can be repeated",
        ),
        ({"repeat": 2}, {"y": "0:1:2", "z": "0:1:2"}, "leave out z, or repeat"),
        ({"repeat": 0}, {}, "directions.repeat = 0"),
        ({"repeat": 90_000_000}, {"x": "0:0:1"}, "the directions take .* GB, and this machine has"),
    ],
)
def test_what_cannot_be_repeated(
    models: list[nn.Module], directions: dict[str, Any], axes: dict[str, str], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        evaluate(models[0], directions, **axes)
