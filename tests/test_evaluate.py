"""The Python call, in one process: closed forms, a real network, resuming, what users bring."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import distsurf
import distsurf.surface
from distsurf.errors import InputError
from distsurf.subspace import Layout, normalize, random_direction
from distsurf.surface import Status
from distsurf.view.points import imprecision_in_words
from tests.cases import CASES, Case
from tests.conftest import Processes, forget

GRIDS = [
    {"x": "-1:2:7"},
    {"x": "0:1:6"},
    {"x": "0.5:0.5:1"},
    {"x": "-1:1:5", "y": "0:1:51"},
    {"x": "-0.3:2.5:9", "y": "-1:0:3"},
    {"x": "1:2:3", "y": "-1:-1:1"},
    {"x": "-1:1:3", "y": "0:2:4", "z": "-3:0:5"},
]


class Quadratic(nn.Module):
    """½ θᵀAθ with A = diag(1 … n), θ a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(
            torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        )
        self.register_buffer("diagonal", torch.arange(1.0, 13.0, dtype=torch.float64).view(4, 3))

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.diagonal * self.theta**2).sum()


@pytest.mark.parametrize("axes", GRIDS, ids=lambda axes: " ".join(f"{k}={v}" for k, v in axes.items()))
@pytest.mark.parametrize("normalization", ["filter", "none"])
def test_quadratic_has_its_closed_form(axes: dict[str, str], normalization: str) -> None:
    """L(c) = ½ Σ_kl c_k c_l d_kᵀAd_l + Σ_k c_k d_kᵀAθ0 + L(0), by numpy in float64."""
    model = Quadratic()
    surface = distsurf.evaluate(
        model, (torch.zeros(2, 1), torch.zeros(2)), objective=lambda model, batch: {"loss": (model(), 1)},
        **axes, seed=5, normalization=normalization, precision="fp64", progress="none", batch_size=2,
    )  # fmt: skip
    layout = Layout(("theta",), ((4, 3),))
    theta = model.theta.detach().numpy()
    center = np.zeros(layout.size)
    layout.views(center)[0][...] = theta
    D = np.stack(
        [
            layout.views(normalize(random_direction(layout, 5, k), center, layout, how=normalization))[
                0
            ].ravel()  # type: ignore[arg-type]
            for k in range(len(axes))
        ]
    ).astype(np.float64)
    A, t = np.diag(np.arange(1.0, 13)), theta.ravel()
    ticks = [
        np.linspace(float(a.split(":")[0]), float(a.split(":")[1]), int(a.split(":")[2]))
        for a in axes.values()
    ]
    c = np.stack(np.meshgrid(*ticks[::-1], indexing="ij")[::-1], axis=-1)
    expected = 0.5 * np.einsum("...k,kl,...l", c, D @ A @ D.T, c) + c @ (D @ A @ t) + 0.5 * t @ A @ t
    assert surface["loss"].shape == expected.shape
    np.testing.assert_allclose(surface["loss"], expected, rtol=1e-12)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x = torch.randn(300, 1, 8, 8)
        y = (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 0).long()
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Flatten(), nn.Linear(32, 3),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval(), x, y


def test_real_network_against_a_plain_torch_loop(
    trained: tuple[nn.Module, torch.Tensor, torch.Tensor],
) -> None:
    """Every grid value, by a textbook loop over tensors with five-line filter normalization."""
    model, x, y = trained
    surface = distsurf.evaluate(
        model, {"train": (x[:200], y[:200]), "test": (x[200:], y[200:])}, x="-1:1:7", y="-0.5:1:4",
        seed=3, batch_size=64, progress="none",
    )  # fmt: skip
    layout = Layout.of(dict(model.named_parameters()))
    theta = [p.detach().clone() for p in model.parameters()]
    directions = []
    for axis in range(2):
        raw = [torch.from_numpy(v.copy()) for v in layout.views(random_direction(layout, 3, axis))]
        for d, w in zip(raw, theta, strict=True):
            for dj, wj in zip(d, w, strict=True):
                dj.mul_(wj.norm() / dj.norm())
            if d.ndim <= 1:
                d.zero_()
        directions.append(raw)
    with torch.no_grad():
        for i, b in enumerate(np.linspace(-0.5, 1, 4)):
            for j, a in enumerate(np.linspace(-1, 1, 7)):
                for p, w, d, e in zip(model.parameters(), theta, *directions, strict=True):
                    p.copy_(w + a * d + b * e)
                for split, part in (("train", slice(0, 200)), ("test", slice(200, None))):
                    out = model(x[part])
                    assert surface[f"{split}_loss"][i, j] == pytest.approx(
                        float(F.cross_entropy(out, y[part])), rel=1e-6
                    )
                    hits = (out.argmax(1) == y[part]).double().mean()
                    assert surface[f"{split}_accuracy"][i, j] == pytest.approx(100 * float(hits), rel=1e-12)
        for p, w in zip(model.parameters(), theta, strict=True):
            p.copy_(w)


def test_origin_is_the_model_itself(trained: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = trained
    surface = distsurf.evaluate(model, (x, y), x="-1:1:3", y="-1:1:3", batch_size=300, progress="none")
    assert surface.origin == (1, 1)
    with torch.no_grad():
        assert surface["loss"][surface.origin] == pytest.approx(float(F.cross_entropy(model(x), y)), rel=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_awkward_models_through_the_whole_job(case: Case, tmp_path: Path) -> None:
    """Into a file, stopped in the middle, continued: the same bits as in one go, and a model left alone."""
    model, data = case.make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {
        "loss": case.loss, "x": "-1:1:5", "y": "0:1:3", "ignore": "none", "batch_size": 10, "progress": "none",
    }  # fmt: skip
    whole = distsurf.evaluate(model, data, **options)
    assert whole.complete
    assert np.isfinite(whole["loss"]).all()
    path = tmp_path / "s.h5"
    with distsurf.surface.SurfaceFile.create(
        path, whole.grid, whole.columns, job=whole.job, fingerprint=whole.fingerprint, facts=whole.facts
    ) as file:
        half = whole.grid.coarse_to_fine()[:7]
        values = np.stack([whole[name].ravel()[half] for name in whole.names], axis=1)
        file.record(half, values, np.ones(7))
    continued = distsurf.evaluate(model, data, out=path, **options)
    assert (continued.cost.ravel()[half] == 1).all()  # these were not evaluated again
    for name in whole.names:
        np.testing.assert_array_equal(continued[name], whole[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_stop_and_resume_gives_the_same_bits(
    trained: tuple[nn.Module, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    model, x, y = trained
    # Plainly: with the hook below nothing else is possible, and without it something faster is.
    options: dict[str, Any] = {"x": "-1:1:5", "y": "-1:1:5", "fast": False, "progress": "none"}
    whole = distsurf.evaluate(model, (x, y), **options)
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 30:
            import signal

            signal.raise_signal(signal.SIGTERM)

    handle = model.register_forward_hook(hook)
    with pytest.raises(distsurf.Incomplete, match="stopped by SIGTERM") as stopped:
        distsurf.evaluate(model, (x, y), out=tmp_path / "s.h5", **options)
    handle.remove()
    partial = stopped.value.surface
    assert 0 < partial.count(Status.EVALUATED) < 25
    continued = distsurf.evaluate(model, (x, y), out=tmp_path / "s.h5", **options)
    np.testing.assert_array_equal(continued["loss"], whole["loss"])
    np.testing.assert_array_equal(continued["accuracy"], whole["accuracy"])


def test_failed_points_are_reported_and_tried_again_by_the_next_call(
    trained: tuple[nn.Module, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    model, x, y = trained
    sick = [True]

    def fails_far_out(model: nn.Module, batch: Any) -> dict[str, Any]:
        output = model(batch[0])
        if sick[0] and float(output.abs().max()) > limit:
            raise FloatingPointError("too far out")
        return {"loss": (F.cross_entropy(output, batch[1], reduction="sum"), len(batch[1]))}

    limit = 1.0001 * float(model(x).detach().abs().max())
    options: dict[str, Any] = {
        "objective": fails_far_out,
        "x": "-2:2:5",
        "out": tmp_path / "s.h5",
        "progress": "none",
    }
    with pytest.raises(distsurf.Incomplete, match="FloatingPointError: too far out") as error:
        distsurf.evaluate(model, (x, y), **options)
    assert error.value.surface.count(Status.FAILED) > 0
    assert error.value.surface.status[2] == Status.EVALUATED
    sick[0] = False
    assert distsurf.evaluate(model, (x, y), **options).complete


def test_surface_of_another_job_is_refused_with_the_fields(
    trained: tuple[nn.Module, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    model, x, y = trained
    options: dict[str, Any] = {"x": "-1:1:3", "out": tmp_path / "s.h5", "progress": "none"}
    first = distsurf.evaluate(model, (x, y), **options)
    other = nn.Sequential(*[nn.Linear(64, 3)])
    changes: list[tuple[str, dict[str, Any], Any, Any]] = [
        ("directions", {"seed": 1}, model, (x, y)),
        ("grid", {"x": "-1:1:5"}, model, (x, y)),
        ("data", {}, model, (x + 1e-6, y)),
        ("objective", {"loss": "focal"}, model, (x, y)),
        ("objective", {"metrics": ["top5"]}, model, (x, y)),
        ("batch_size", {"batch_size": 7}, model, (x, y)),
        ("precision", {"precision": "fp64"}, model, (x, y)),
        ("weights", {}, other, (x.flatten(1), y)),
        ("model", {}, other, (x.flatten(1), y)),
    ]
    for field, change, net, data in changes:
        with pytest.raises(distsurf.InputError, match=rf"another job.*\b{field} \(file "):
            distsurf.evaluate(net, data, **{**options, **change})
    again = distsurf.evaluate(model, (x, y), **options)
    np.testing.assert_array_equal(first["loss"], again["loss"])
    distsurf.evaluate(model, (x, y), **{**options, "seed": 1}, fresh=True)
    kept = distsurf.Surface.load(tmp_path / "s.old-1.h5")
    np.testing.assert_array_equal(kept["loss"], first["loss"])


def test_changed_user_code_is_another_objective(
    trained: tuple[nn.Module, torch.Tensor, torch.Tensor],
) -> None:
    model, x, y = trained

    def surface(function: Any) -> Any:
        return distsurf.evaluate(model, (x, y), function, x="0:1:2", progress="none").fingerprint["objective"]

    plain = surface(nn.CrossEntropyLoss())
    assert plain == surface(nn.CrossEntropyLoss())
    assert plain != surface(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert surface(lambda o, t: F.cross_entropy(o, t)) != surface(lambda o, t: 2 * F.cross_entropy(o, t))


def test_losses_by_name_by_callable_and_by_own_objective_agree(
    trained: tuple[nn.Module, torch.Tensor, torch.Tensor],
) -> None:
    model, x, y = trained
    options: dict[str, Any] = {"x": "-1:1:3", "progress": "none"}
    by_name = distsurf.evaluate(model, TensorDataset(x, y), "cross_entropy", **options)
    by_module = distsurf.evaluate(model, (x, y), nn.CrossEntropyLoss(), **options)
    own = distsurf.evaluate(
        model, (x, y), **options,
        objective=lambda m, b: {"loss": (F.cross_entropy(m(b[0]), b[1], reduction="sum"), len(b[1]))},
    )  # fmt: skip
    np.testing.assert_allclose(by_module["loss"], by_name["loss"], rtol=1e-6)
    np.testing.assert_allclose(own["loss"], by_name["loss"], rtol=1e-6)
    assert by_name.names == ("loss", "accuracy")
    assert by_module.names == ("loss",)


def test_non_finite_and_negative_losses_are_values(
    trained: tuple[nn.Module, torch.Tensor, torch.Tensor],
) -> None:
    model, x, y = trained

    def logs(model: nn.Module, batch: Any) -> dict[str, Any]:
        weight = model[0].weight.double().norm() - start
        return {"loss": (torch.log(weight), 1), "negative": (-weight - 5, 1), "pole": (1 / (weight * 0), 1)}

    start = float(model[0].weight.detach().double().norm())
    surface = distsurf.evaluate(
        model, (x[:2], y[:2]), objective=logs, x="-0.2:1:7", batch_size=2, progress="none"
    )
    assert surface.complete
    assert np.isnan(surface["loss"]).any()
    assert (surface["negative"] < 0).all()
    assert np.isinf(surface["pole"]).any()
    assert (surface.status == Status.EVALUATED).all()


def test_not_finite_weights_are_refused(trained: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    broken = nn.Linear(3, 2)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(distsurf.InputError, match="parameter weight holds NaN"):
        distsurf.evaluate(broken, (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)), progress="none")


def test_direction_that_moves_nothing_is_refused() -> None:
    class OnlyBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))

    with pytest.raises(distsurf.InputError, match="nothing of this model moves"):
        distsurf.evaluate(OnlyBias(), (torch.zeros(4, 3), torch.zeros(4)), progress="none")


class WritesToInput(nn.Module):
    def __init__(self, from_call: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self._calls, self._from_call = [0], from_call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._calls[0] += 1
        if self._calls[0] >= self._from_call:
            x.mul_(0.5)
        return self.linear(x)


def test_model_that_writes_to_its_input_is_refused_and_the_data_is_whole() -> None:
    x, y = torch.randn(10, 3), torch.zeros(10, dtype=torch.int64)
    before = x.clone()
    with pytest.raises(distsurf.InputError, match="changes its input data in place"):
        distsurf.evaluate(WritesToInput(1), (x, y), x="0:1:3", progress="none")
    assert torch.equal(x, before)
    with pytest.raises(distsurf.Incomplete, match="changes its input data in place"):  # seen only later
        distsurf.evaluate(WritesToInput(4), (x, y), x="0:1:3", progress="none")


@pytest.mark.parametrize(
    ("error", "raised"),
    [(SystemExit, "unexpected SystemExit on [^:]* "), (KeyboardInterrupt, "^$")],
    ids=["exit", "interrupt"],
)
def test_exit_inside_the_model_is_no_hang(error: type[BaseException], raised: str) -> None:
    calls = []

    def leave(model: nn.Module, batch: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) > 2:
            raise error
        return {"loss": (1.0, 1)}

    model = nn.Linear(3, 2)
    before = model.weight.data_ptr()
    expected = distsurf.DistsurfError if error is SystemExit else error
    with pytest.raises(expected, match=raised) as caught:
        distsurf.evaluate(
            model, (torch.zeros(4, 3), torch.zeros(4)), objective=leave, x="0:1:5", progress="none"
        )
    assert error in (type(caught.value), type(caught.value.__cause__))
    assert model.weight.data_ptr() == before


def test_model_in_use_is_refused() -> None:
    model, data = nn.Linear(3, 2), (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))

    def nested(m: nn.Module, batch: Any) -> dict[str, Any]:
        distsurf.evaluate(model, data, x="0:1:2", progress="none")
        return {"loss": (1.0, 1)}

    with pytest.raises(distsurf.InputError, match="already being evaluated"):
        distsurf.evaluate(model, data, objective=nested, x="0:1:2", progress="none")
    assert distsurf.evaluate(model, data, x="0:1:2", progress="none").complete


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": None}, "nn.Module was expected"),
        ({"loss": 5}, "a loss is a name, a table or a callable"),
        ({"x": "-1:1:1000000000"}, "the most is"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: dict[str, Any], words: str) -> None:
    options = {"model": nn.Linear(3, 2), "data": (torch.zeros(4, 3), torch.zeros(4)), "progress": "none"}
    with pytest.raises(distsurf.InputError, match=words):
        distsurf.evaluate(**(options | arguments))


def test_state_that_cannot_be_undone_is_warned_of() -> None:
    calls = []

    def drifting(model: nn.Module, batch: Any) -> dict[str, Any]:
        calls.append(1)
        return {"loss": (float(len(calls)), 1)}

    data = (torch.zeros(4, 3), torch.zeros(4))
    with pytest.warns(UserWarning, match="two values for the same weights"):
        distsurf.evaluate(nn.Linear(3, 2), data, objective=drifting, x="0:1:2", progress="none")


# -- the fast path through the whole job ------------------------------------------------------------------


def _pictures() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    model, data = next(case for case in CASES if case.name == "residual").make()
    return model, data


def test_fast_path_is_recorded_and_changes_nothing_that_is_published() -> None:
    model, data = _pictures()
    settings: dict[str, Any] = {"x": "-1:1:5", "y": "-1:1:5", "batch_size": 10, "progress": "none"}
    fast = distsurf.evaluate(model, data, **settings)
    plain = distsurf.evaluate(model, data, fast=False, **settings)
    assert fast.facts["evaluation"]["steps"] == ["fold", "channels_last", "fuse"]
    assert plain.facts["evaluation"]["steps"] == []
    assert plain.facts["evaluation"]["errors"] == []
    assert fast.fingerprint == plain.fingerprint
    np.testing.assert_allclose(fast["loss"], plain["loss"], rtol=1e-5)
    np.testing.assert_array_equal(fast["accuracy"], plain["accuracy"])
    at = [error["at"] for error in fast.facts["evaluation"]["errors"]]
    assert at == [[0, 0], [-1, -1], [-1, 1], [1, -1], [1, 1]]


@pytest.mark.parametrize("mode", ["interpolated", "recomputed"])
def test_batch_norm_statistics_that_move(mode: str, tmp_path: Path) -> None:
    """At the origin interpolated statistics are the stored ones, recomputed ones those of the training data."""
    model, (x, y) = _pictures()
    settings: dict[str, Any] = {
        "x": "-0.5:0.5:21",
        "ignore": "none",
        "progress": "none",
        "out": tmp_path / "s.h5",
    }
    data = {"train": (x, y), "test": (x[:5], y[:5])}
    surface = distsurf.evaluate(model, data, batch_norm=mode, **settings)
    assert surface.facts["evaluation"]["steps"] == ["fold", "channels_last", "fuse"]
    mine = copy.deepcopy(model).double()
    if mode == "recomputed":
        torch.optim.swa_utils.update_bn([[x.double()]], mine)
    with torch.no_grad():
        expected = float(F.cross_entropy(mine.eval()(x[:5].double()), y[:5]))
    assert surface["test_loss"][10] == pytest.approx(expected, rel=1e-5)
    frozen = distsurf.evaluate(model, data, **{**settings, "out": None})
    assert not np.allclose(frozen["test_loss"][0], surface["test_loss"][0], rtol=1e-3)
    # The file is another job's if the statistics come from other data, or are frozen.
    with pytest.raises(InputError, match="batch_norm"):
        distsurf.evaluate(model, data, **settings)


def test_statistics_that_would_not_move_are_refused() -> None:
    """With ignore = bias_bn, the default, nothing one-dimensional moves; and a lone test split is no training data."""
    model, (x, y) = _pictures()
    with pytest.raises(
        InputError, match=r"'interpolated': with directions\.ignore = 'bias_bn' the statistics do not"
    ):
        distsurf.evaluate(model, (x, y), batch_norm="interpolated", x="-1:1:3", progress="none")
    with pytest.raises(InputError, match="from the split called 'train'; the data has only test"):
        distsurf.evaluate(model, {"test": (x, y)}, batch_norm="recomputed", x="-1:1:3", progress="none")


def test_overflow_of_half_precision_is_told() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        model[1].weight.mul_(1e6)
    data = (torch.randn(300, 12), torch.zeros(300, dtype=torch.int64))
    surface = distsurf.evaluate(model, data, precision="fp16", x="-1:1:3", progress="none")
    assert not np.isfinite(surface["loss"]).all()
    assert imprecision_in_words(surface, surface.columns) == "fp16: loss is not finite where float64 is"


def test_scripted_modules_have_their_precision_measured() -> None:
    model = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    data = (torch.randn(3000, 12), torch.zeros(3000, dtype=torch.int64))
    surface = distsurf.evaluate(model, data, precision="bf16", x="-1:1:51", y="-1:1:51", progress="none")
    assert len(surface.facts["evaluation"]["errors"]) == 5
    assert not any("raises" in why for why in surface.facts["evaluation"]["dropped"].values())


def test_batch_norm_modes_that_cannot_be() -> None:
    model = nn.Linear(3, 2)
    data = (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        InputError, match="'recomputed': the model Linear has no batch norm with running statistics"
    ):
        distsurf.evaluate(model, data, batch_norm="recomputed", x="0:1:2", progress="none")
    model, (x, y) = _pictures()
    with pytest.raises(InputError, match="the split called 'train'; the data has only a, b"):
        distsurf.evaluate(
            model, {"a": (x, y), "b": (x, y)}, batch_norm="recomputed", x="0:1:2", progress="none"
        )


def test_reduced_precision_is_another_surface_with_its_error(tmp_path: Path) -> None:
    model, data = _pictures()
    settings: dict[str, Any] = {"x": "-1:1:5", "y": "-1:1:5", "progress": "none", "out": tmp_path / "s.h5"}
    surface = distsurf.evaluate(model, data, precision="bf16", **settings)
    exact = distsurf.evaluate(model, data, precision="fp64", **{**settings, "out": None})
    corner = next(e for e in surface.facts["evaluation"]["errors"] if e["at"] == [1, -1])["values"]["loss"]
    assert corner[0] == pytest.approx(exact["loss"][0, 4], rel=0.2)  # of a sample of the data
    assert 1e-6 < abs(corner[1] / corner[0] - 1) < 0.2
    np.testing.assert_allclose(surface["loss"], exact["loss"], rtol=0.2)
    with pytest.raises(InputError, match="precision \\(file bf16, this job fp32\\)"):
        distsurf.evaluate(model, data, **settings)
    with pytest.raises(InputError, match="'tf32' needs an NVIDIA GPU"):
        distsurf.evaluate(model, data, precision="tf32", x="0:1:2", progress="none")


def test_a_file_is_continued_with_the_steps_it_was_begun_with(tmp_path: Path) -> None:
    model, data = _pictures()
    settings: dict[str, Any] = {"x": "-1:1:12", "out": tmp_path / "s.h5", "progress": "none"}
    for plain, steps in ((True, []), (False, ["fold", "channels_last", "fuse"])):
        begun = distsurf.evaluate(model, data, fast=not plain, fresh=True, **settings)
        assert begun.facts["evaluation"]["steps"] == steps
        forget(tmp_path / "s.h5", 1)
        continued = distsurf.evaluate(model, data, **settings)
        assert continued["loss"].tobytes() == begun["loss"].tobytes()
        assert continued.facts["evaluation"] == begun.facts["evaluation"]


def test_a_complete_file_costs_no_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = _pictures()
    settings: dict[str, Any] = {"x": "-1:1:4", "out": tmp_path / "s.h5", "progress": "none"}
    first = distsurf.evaluate(model, data, **settings)

    def never(*_: Any) -> None:
        raise AssertionError("nothing is to be evaluated")

    monkeypatch.setattr("distsurf.objective.evaluator.choose", never)
    again = distsurf.evaluate(model, data, **settings)
    assert again["loss"].tobytes() == first["loss"].tobytes()


MEMORY = """
import gc, sys
import torch
from torch import nn
import numpy as np
from distsurf.objective.data import as_splits
from distsurf.objective.evaluator import ModelEvaluator
from distsurf.objective.losses import Supervised, Term
from distsurf.subspace import Layout, Subspace

# One layer of 2^24 weights: 64 MiB in float32.
if sys.argv[1] == "linear":
    model = nn.Linear(1 << 12, 1 << 12, bias=False)
    data = torch.randn(512, 1 << 12), torch.randint(4, (512,))
else:
    model = nn.Sequential(
        nn.Conv2d(1 << 12, 1 << 12, 1, stride=20, bias=False), nn.BatchNorm2d(1 << 12), nn.ReLU(), nn.Flatten())
    # Positive, so that sums are far from zero: whether a step holds is not to hang on which numbers were drawn.
    data = torch.rand(8, 1 << 12, 20, 20), torch.randint(4, (8,))
layout = Layout.of(dict(model.named_parameters()))
vectors = [np.ones(layout.size, np.float32), *np.zeros((2, layout.size), np.float32)]
layout.views(vectors[1])[0][...] = 1  # batch norm does not move

def memory(which):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(which)]
    return int(line.split()[1]) * 1024 / (64 << 20)

weight = next(model.parameters()).detach().flatten(1)
torch.randn(64, 1 << 12) @ weight.T  # the libraries' own workspaces
torch.randn(64, 1 << 12).double() @ weight[:64].double().T
before = memory("VmRSS")
with ModelEvaluator(
    model, Subspace(layout, vectors[0], tuple(vectors[1:])), dict(model.named_buffers()), as_splits(data),
    Supervised([Term.named("cross_entropy", {})]), device=torch.device("cpu"),
) as evaluator:
    evaluator(np.zeros((2, 2)))
    plain = memory("VmRSS") - before
    recipe = evaluator.choose(np.zeros((1, 2)), 100)
    peak = memory("VmHWM") - before
    gc.collect()
    evaluator(np.zeros((2, 2)))
    print(plain, memory("VmRSS") - before, peak, *recipe.steps)
"""


@pytest.mark.parametrize(
    ("layer", "most", "steps"), [("linear", 1.8, []), ("convolution", 7.5, ["fold", "channels_last", "fuse"])]
)
def test_memory_is_one_copy_of_the_weights(
    layer: str, most: float, steps: list[str], tmp_path: Path, processes: Processes
) -> None:
    """In units of the weights: θ itself while evaluating, since centre and directions stay where all ranks share them.

    Folded weights lie in a plane of the rank's own: θ, its centre and two directions; a batch is 0.8 units there. For a
    moment verification adds a second θ and one in float64 (two units), which the libraries copy once more.
    """
    (tmp_path / "memory.py").write_text(MEMORY)
    ended = processes.python("memory.py", layer)
    assert ended.code == 0, ended.err
    plain, evaluating, peak, *taken = ended.out.split()
    assert taken == steps
    assert 0.9 < float(plain) < 1.8 + 1.0 * (layer == "convolution")
    assert float(evaluating) < most
    assert float(peak) < most + 6


@pytest.mark.parametrize("name", ["counting_images", "counting_in_a_part", "replacing_images", "residual"])
def test_what_a_pass_leaves_behind_counts_from_batch_to_batch(name: str) -> None:
    """Several batches a point: state in buffers goes on within a point, plainly and fast alike, and ends with it."""
    case = next(case for case in CASES if case.name == name)
    model, data = case.make()
    before = {key: (id(tensor), tensor.clone()) for key, tensor in model.named_buffers()}
    settings: dict[str, Any] = {"x": "-1:1:9", "y": "-1:1:5", "batch_size": 10, "progress": "none"}
    fast, plain = (distsurf.evaluate(model, data, fast=not plain, **settings) for plain in (False, True))
    np.testing.assert_allclose(fast["loss"], plain["loss"], rtol=1e-5)
    again = distsurf.evaluate(model, data, **settings)
    assert again["loss"].tobytes() == fast["loss"].tobytes()
    after = dict(model.named_buffers())
    assert all(id(after[key]) == place and torch.equal(after[key], t) for key, (place, t) in before.items())


class _Moody(nn.Module):
    """Convolution and batch norm with more to them than a graph of operations shows."""

    def __init__(self, mood: str) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.mood, self.random = mood, np.random.default_rng(0)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        if self.mood == "optional" and scale is not None:
            x = x * scale[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mood == "autocast"):
            y = self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))
        return y.float() * (1 + self.random.random() if self.mood == "random" else 1)


@pytest.mark.filterwarnings("ignore:the model gave two values")
@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("random", "gives different values for the same weights and data"),
        ("autocast", "outputs differ by"),
        ("optional", "not subscriptable"),
    ],
)
def test_what_a_graph_would_lose_is_evaluated_plainly(
    mood: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = _Moody(mood)
    data = torch.randn(40, 3, 24, 24), torch.randint(4, (40,))
    settings: dict[str, Any] = {"x": "-1:1:9", "y": "-1:1:5", "batch_size": 20, "progress": "none"}
    surface = distsurf.evaluate(model, data, **settings)
    told = surface.facts["evaluation"]
    assert "fold" not in told["steps"]
    assert reason in told["dropped"]["fold"]
    assert capfd.readouterr().err == ""
    if mood != "random":
        plain = distsurf.evaluate(model, data, fast=False, **settings)
        np.testing.assert_allclose(surface["loss"], plain["loss"], rtol=1e-3 if mood == "autocast" else 1e-5)


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(2, 5))])
def test_script_modules_can_be_evaluated_again(make: Any) -> None:
    model = make(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)))
    data = torch.randn(20, 5), torch.randint(4, (20,))
    for _ in range(2):
        assert distsurf.evaluate(model, data, x="0:1:2", progress="none").complete


@pytest.mark.parametrize(
    "settings", [{"x": "-1:1:12", "y": "-1:1:5", "fast": False}, {"x": "-1:1:2", "y": "-1:1:2"}]
)
def test_the_error_of_a_reduced_precision_is_measured_whatever_the_steps(settings: dict[str, Any]) -> None:
    model, data = _pictures()
    told = distsurf.evaluate(model, data, precision="bf16", progress="none", **settings).facts["evaluation"]
    assert told["steps"] == []
    assert [error["at"] for error in told["errors"]] == [[0, 0], [-1, -1], [-1, 1], [1, -1], [1, 1]]
    assert any(got != exact for error in told["errors"] for exact, got in [error["values"]["loss"]])


def test_small_jobs_are_not_worth_a_verification() -> None:
    model, data = _pictures()
    told = distsurf.evaluate(model, data, x="0:1:2", progress="none").facts["evaluation"]
    assert told["steps"] == []
    assert "too small" in told["dropped"]["fold"]


def test_a_file_tells_of_one_way_only(tmp_path: Path) -> None:
    model, data = _pictures()
    settings: dict[str, Any] = {"x": "-1:1:12", "out": tmp_path / "s.h5", "progress": "none"}
    distsurf.evaluate(model, data, **settings)
    forget(tmp_path / "s.h5", 1)
    for asked in (["fold"], ["fold", "channels_last", "fuse", "many"]):
        with pytest.raises(InputError, match=r"begun with fold, channels_last, fuse .* asked for now"):
            distsurf.evaluate(model, data, fast=asked, **settings)
    with pytest.raises(
        InputError, match=r"begun with fold, channels_last, fuse .* none asked for now; .* --fresh"
    ):
        distsurf.evaluate(model, data, fast=False, **settings)
    assert distsurf.evaluate(model, data, **settings).complete


def test_steps_that_were_asked_for_and_did_not_hold_may_be_asked_for_again(tmp_path: Path) -> None:
    """The same call continues its file, though not all of its steps were taken."""
    model, data = _pictures()
    settings: dict[str, Any] = {
        "x": "-1:1:12", "out": tmp_path / "s.h5", "progress": "none", "fast": ["fold", "graph"]
    }  # fmt: skip
    begun = distsurf.evaluate(model, data, **settings)
    assert begun.facts["evaluation"]["steps"] == ["fold"]
    assert begun.facts["evaluation"]["dropped"] == {"graph": "there is nothing for it to do here"}
    forget(tmp_path / "s.h5", 1)
    assert distsurf.evaluate(model, data, **settings)["loss"].tobytes() == begun["loss"].tobytes()
