"""Curvature of losses: against the whole Hessian of small networks, closed forms, and differences of the surface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import distsurf
from distsurf.errors import InputError
from distsurf.objective import derivatives
from distsurf.surface import Surface

MEASURES = ["eigenvalues", "trace", "gradient", "plane"]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(90, 4, generator=generator), torch.randint(3, (90,), generator=generator)


def net() -> nn.Module:
    """With batch norm, whose statistics are its own, and a frozen bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    model(data()[0])
    model[3].bias.requires_grad_(False)
    return model.eval()


def curved(model: nn.Module, what: dict[str, Any] | None = None, **settings: Any) -> Surface:
    wish = {"measures": MEASURES, "tolerance": 1e-8, "probes": 50, **(what or {})}
    given = {"x": "-1:1:3", "y": "-1:1:3", "precision": "fp64", "progress": "none", **settings}
    return distsurf.evaluate(model, {"train": given.pop("data", data())}, curvature=wish, **given)


def whole(model: nn.Module, only: Callable[[Tensor], bool] = lambda p: True) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of the mean loss in float64, by torch.func."""
    model = model.double()
    names = [name for name, p in model.named_parameters() if only(p)]
    parts = {name: p.detach() for name, p in model.named_parameters()}
    inputs, targets = data()

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([parts[name].numel() for name in names])
        moved = {n: piece.view(parts[n].shape) for n, piece in zip(names, pieces, strict=True)}
        outputs = torch.func.functional_call(model, {**parts, **moved}, (inputs.double(),))
        return nn.functional.cross_entropy(outputs, targets)

    at = torch.cat([parts[name].reshape(-1) for name in names])
    return torch.func.grad(loss)(at), torch.func.hessian(loss)(at)


@pytest.mark.parametrize(("parameters", "least"), [("all", 0), ("weights", 2)])
def test_the_model_itself_against_its_whole_hessian(parameters: str, least: int) -> None:
    surface = curved(net(), {"parameters": parameters, "batch_size": 40, "measures": MEASURES[:3]})
    gradient, hessian = whole(net(), lambda p: p.ndim >= least)
    spectrum = torch.linalg.eigvalsh(hessian).numpy()

    def found(name: str) -> float:
        return float(surface[name][1, 1])

    np.testing.assert_allclose(
        [found("lambda_min"), found("lambda_max")], [spectrum[0], spectrum[-1]], rtol=1e-6
    )
    assert found("lambda_ratio") == pytest.approx(abs(spectrum[0] / spectrum[-1]), rel=1e-6)
    assert found("lambda_converged") == 1
    assert found("gradient_norm") == pytest.approx(float(gradient.norm()), rel=1e-9)
    assert abs(found("trace") - spectrum.sum()) < 4 * found("trace_error")
    assert net()[3].bias.requires_grad is False


def test_at_other_points_and_from_differences_of_the_surface() -> None:
    """Second differences of the loss on a fine grid are the plane's own Hessian, up to h²."""
    surface = curved(net(), {"measures": ["plane"]}, x="-0.02:0.02:5", y="-0.02:0.02:5")
    loss, h = surface["loss"], 0.01
    xx = (loss[2, 3] - 2 * loss[2, 2] + loss[2, 1]) / h**2
    yy = (loss[3, 2] - 2 * loss[2, 2] + loss[1, 2]) / h**2
    xy = (loss[3, 3] - loss[3, 1] - loss[1, 3] + loss[1, 1]) / (4 * h**2)
    for name, expected in (("xx", xx), ("xy", xy), ("yy", yy)):
        assert surface[f"curvature_{name}"][2, 2] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("spectrum", [[5, 4, 3, 2, 1], [-1, -2, -3, -5], [3, 1, -3, 0.5]])
def test_quadratics(spectrum: list[float]) -> None:
    """L = ½ Σ h w²: the same spectrum everywhere; public tools return λmin = 5 for the first."""
    model = nn.Linear(len(spectrum), 1, bias=False)
    scales = torch.tensor(spectrum, dtype=torch.float64)

    def objective(model: Any, batch: Any) -> dict[str, Any]:
        return {"loss": (len(batch[0]) * 0.5 * (scales * model.weight.square()).sum(), len(batch[0]))}

    surface = curved(model, objective=objective, data=(torch.zeros(7, 1), torch.zeros(7)))
    np.testing.assert_allclose(surface["lambda_min"], min(spectrum), rtol=1e-9)
    np.testing.assert_allclose(surface["lambda_max"], max(spectrum), rtol=1e-9)
    np.testing.assert_allclose(surface["trace"], sum(spectrum), rtol=1e-9)
    np.testing.assert_allclose(surface["lambda_ratio"], abs(min(spectrum) / max(spectrum)), rtol=1e-9)


def test_batches_of_any_size_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """40/40/10 and one of all: the scale is that of the mean. And graphs that are kept change no digit."""
    first, second = (curved(net(), {"batch_size": size}) for size in (40, 90))
    for name in first.names:
        if name not in ("lambda_products", "lambda_min_residual", "lambda_max_residual"):
            np.testing.assert_allclose(first[name], second[name], rtol=1e-7, atol=1e-9)
    monkeypatch.setattr(derivatives, "KEPT_BYTES", 0)
    again = curved(net(), {"batch_size": 40})
    for name in first.names:
        assert again[name].tobytes() == first[name].tobytes(), name


def test_float32_is_close_and_losses_are_as_without_curvature() -> None:
    exact = curved(net(), {"tolerance": 1e-3})
    surface = curved(net(), {"tolerance": 1e-3}, precision="fp32", batch_size=90)
    for name in ("lambda_min", "lambda_max"):
        np.testing.assert_allclose(surface[name], exact[name], rtol=3e-3)
    plain = distsurf.evaluate(
        net(), {"train": data()}, x="-1:1:3", y="-1:1:3", batch_size=90, progress="none"
    )
    for name in plain.names:
        assert plain[name].tobytes() == surface[name].tobytes()


def test_a_fixed_part_of_the_data() -> None:
    surface = curved(net(), {"samples": 30})
    inputs, targets = data()
    rows = torch.linspace(0, 89, 30).long()
    alone = curved(net(), data=(inputs[rows], targets[rows]))
    np.testing.assert_allclose(surface["lambda_max"], alone["lambda_max"], rtol=1e-9)
    assert not np.allclose(surface["loss"], alone["loss"])


def test_a_budget_that_ends_is_stored_and_counted() -> None:
    from distsurf.verbs.shared import in_lines

    surface = curved(net(), {"measures": ["eigenvalues"], "products": 4, "tolerance": 1e-6})
    assert (surface["lambda_converged"] == 0).all()
    assert (surface["lambda_products"] == 4).all()
    assert np.isfinite(surface["lambda_max"]).all()
    assert (
        "lambda_min, lambda_max: 9 of 9 points were not found to the tolerance within curvature.products"
        in ("\n".join(in_lines(surface)))
    )


def test_recomputed_statistics_and_repeated_planes() -> None:
    surface = curved(net(), {"measures": ["eigenvalues"]}, batch_norm="recomputed", x="0:1:2", y="0:1:2")
    assert np.isfinite(surface["lambda_max"]).all()
    with pytest.raises(InputError, match="recomputed statistics bend the surface too"):
        curved(net(), {"measures": ["plane"]}, batch_norm="recomputed")
    lines = curved(net(), {"measures": ["plane"]}, x="-0.01:0.01:3", y=None, directions={"repeat": 2})
    for repeat in range(2):
        loss = lines["loss"][repeat]
        difference = (loss[2] - 2 * loss[1] + loss[0]) / 0.01**2
        assert lines["curvature_xx"][repeat, 1] == pytest.approx(difference, rel=1e-3)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return given.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (given,) = ctx.saved_tensors
        return grad * given.cos()


class Fused(nn.Module):
    def forward(self, given: Tensor) -> Tensor:
        return _Once.apply(given)


def test_a_layer_that_cannot_be_differentiated_twice_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 5), Fused(), nn.Linear(5, 3))
    with pytest.raises(InputError, match=r"the layer 1 \(Fused\) cannot be differentiated twice"):
        curved(model)


def test_attention_has_curvature() -> None:
    """Though the kernel that torch would choose has no second derivative."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.into, self.out = nn.Linear(1, 8), nn.Linear(8, 3)

        def forward(self, given: Tensor) -> Tensor:
            tokens = self.into(given[..., None])
            return self.out(nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).mean(1))

    surface = curved(Attending(), {"measures": ["eigenvalues"]})
    _, hessian = whole(Attending())
    spectrum = torch.linalg.eigvalsh(hessian)
    np.testing.assert_allclose(surface["lambda_max"][1, 1], spectrum[-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ({"split": "test"}, "curvature.split = 'test': the data has train"),
        ({"measures": []}, "curvature.measures"),
        ({"measures": ["trace", "trace"]}, "names one twice"),
        ({"measures": ["plane"], "parameters": "weights"}, "leave parameters out"),
        ({"measures": ["hessian"]}, "curvature.measures"),
        ({"tolerance": 0}, "curvature.tolerance"),
        ({"products": 0}, "curvature.products"),
    ],
)
def test_mistakes_are_told(what: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        curved(net(), what)


def test_names_that_are_taken() -> None:
    def objective(model: Any, batch: Any) -> dict[str, Any]:
        return {"trace": (model(batch[0]).sum(), len(batch[0]))}

    with pytest.raises(InputError, match="both have a column trace"):
        distsurf.evaluate(
            net(), data(), objective=objective, x="0:1:2", curvature={"measures": ["trace"]}, progress="none"
        )
