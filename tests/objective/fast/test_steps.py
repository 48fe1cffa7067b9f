"""Every step on every awkward model: the plain module's values, or dropped with a reason; wrong steps are caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distsurf.evaluator import Stopped
from distsurf.objective.data import as_splits
from distsurf.objective.evaluator import ModelEvaluator
from distsurf.objective.fast import choose as choosing
from distsurf.objective.fast import steps
from distsurf.objective.fast.fold import fold
from distsurf.objective.fast.fuse import CuDNNConvolution, OneDNNConvolution, fuse
from distsurf.objective.fast.graph import CapturedTotals
from distsurf.objective.fast.steps import STEPS
from distsurf.objective.fast.trace import NotApplicable, Refused, trace
from distsurf.objective.network import Network, Running
from distsurf.objective.precision import PRECISIONS
from distsurf.objective.recipe import Recipe
from tests.cases import CASES, SAMPLES, Case, Residual
from tests.objective.planes import CPU, POINTS, objective, plane, truth

BY_NAME = {case.name: case for case in CASES}
RANDOM = ("stochastic",)  # draws in float64 are others than in float32
ALL = ("fold", "channels_last", "fuse")
EXPECTED: dict[str, tuple[str, ...]] = {
    "batch_norm": ("fold",),  # 6x6 pixels: too small for the other two to pay
    "linear_batch_norm": ("fold",),
    "residual": ALL,
    "residual_read_later": ALL,
    "pre_activation": ALL,
    "shared_layers": ("channels_last",),
    "old_view": ("fold", "channels_last"),
    "branching_images": ("channels_last",),
    "counting_images": ("channels_last",),
    "counting_in_a_part": ("channels_last",),
    "replacing_images": ("channels_last",),
    "hooked_images": ("channels_last",),
    "parametrized_images": ("channels_last",),
}
WHY = {
    "batch_statistics": {"channels_last": "view size is not compatible"},
    "branching_images": {"fold": "cannot be traced", "fuse": "cannot be traced"},
    "counting_images": {"fold": "a forward pass changes calls", "fuse": "a forward pass changes calls"},
    "counting_in_a_part": {"fold": "a forward pass changes", "fuse": "a forward pass changes"},
    "replacing_images": {"fold": "a forward pass changes seen", "fuse": "a forward pass changes seen"},
    "hooked_images": {"fold": "bn1 has hooks", "fuse": "bn1 has hooks"},
}


def _evaluator(
    case: Case, *, ignore: str = "none", mode: str = "frozen", **options: Any
) -> tuple[ModelEvaluator, Any]:
    model, data = case.make()
    subspace, buffers = plane(model, ignore=ignore, interpolated=mode == "interpolated")
    splits = as_splits(data)
    settings = {
        "batch_size": SAMPLES,
        "device": CPU,
        "statistics": splits[0] if mode == "recomputed" else None,
        **options,
    }
    return ModelEvaluator(model, subspace, buffers, splits, objective(case), **settings), subspace


@pytest.mark.parametrize("ignore", ["bias_bn", "none"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_chosen_steps_give_the_plain_values(case: Case, ignore: str) -> None:
    evaluator, subspace = _evaluator(case, ignore=ignore)
    with evaluator:
        recipe = evaluator.choose(POINTS, 10_000)
        values = evaluator(POINTS)
        again = evaluator(POINTS[::-1])[::-1]
    assert recipe.steps == EXPECTED.get(case.name, ())
    assert recipe.dropped.keys() == WHY.get(case.name, {}).keys()
    for step, reason in WHY.get(case.name, {}).items():
        assert reason in recipe.dropped[step]
    np.testing.assert_array_equal(values, again)  # in any order, bit for bit
    if case.name not in RANDOM:
        np.testing.assert_allclose(values[:, 0], truth(case, subspace, POINTS), rtol=1e-5)


@pytest.mark.parametrize(
    "wanted",
    [("fold",), ("channels_last",), ("channels_last", "fuse"), ("fold", "channels_last"), ALL],
    ids=" ".join,
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_step_on_every_model(
    case: Case, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On small images too, where the rule says that it would not pay."""
    monkeypatch.setattr(steps, "LEAST_PIXELS", 0)
    evaluator, subspace = _evaluator(case, ignore="bias_bn")
    with evaluator:
        recipe = evaluator.choose(POINTS, 10_000, wanted)
        values = evaluator(POINTS)
    assert set(recipe.steps) | set(recipe.dropped) <= set(wanted)
    if case.name == "batch_norm":
        assert recipe.steps == tuple(step for step in wanted if step != "fuse" or "fold" in wanted)
    if case.name not in RANDOM:
        np.testing.assert_allclose(values[:, 0], truth(case, subspace, POINTS), rtol=1e-5)


WITH_STATISTICS = [case for case in CASES if case.name in EXPECTED and case.name != "functional_batch_norm"]


@pytest.mark.parametrize(
    ("mode", "precision"),
    [("frozen", "fp64"), *((m, p) for m in ("interpolated", "recomputed") for p in ("fp32", "fp64"))],
)
@pytest.mark.parametrize("ignore", ["bias_bn", "none"])
@pytest.mark.parametrize("case", WITH_STATISTICS, ids=lambda case: case.name)
def test_batch_norm_modes(case: Case, ignore: str, mode: str, precision: str) -> None:
    """Statistics in the directions, or from data at every point, with all steps and without."""
    evaluator, subspace = _evaluator(case, ignore=ignore, mode=mode, precision=precision)
    expected = truth(case, subspace, POINTS, recomputed_in=SAMPLES if mode == "recomputed" else 0)
    with evaluator:
        plain = evaluator(POINTS)
        recipe = evaluator.choose(POINTS, 10_000)
        values = evaluator(POINTS)
    wanted = EXPECTED[case.name]
    if (case.name, mode) == ("old_view", "recomputed"):
        wanted = ("fold",)  # statistics are recomputed by the model itself, whose view fails
    assert recipe.steps == (tuple(s for s in wanted if s != "fuse") if precision == "fp64" else wanted)
    rtol = {"fp32": 2e-5, "fp64": 1e-10}[precision]
    np.testing.assert_allclose(plain[:, 0], expected, rtol=rtol)
    np.testing.assert_allclose(values[:, 0], expected, rtol=rtol)


def test_folding_is_done_once_where_it_can_be() -> None:
    model, _ = BY_NAME["residual"].make()
    model.eval()
    still, moving = (Network(model, *plane(model, ignore=ignore)) for ignore in ("bias_bn", "none"))
    assert fold(still, recomputed=False).folding is None
    assert fold(moving, recomputed=False).folding is not None
    assert fold(still, recomputed=True).folding is not None
    folded = fold(still, recomputed=False)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.module.modules())
    assert {id(p) for p in folded.module.parameters()}.isdisjoint(id(p) for p in model.parameters())


def test_recomputed_statistics_are_weighted_by_samples() -> None:
    """Batches of 128 and 22: torch's update_bn would count both alike."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, y = torch.randn(150, 3) * 2 + 1, torch.randint(2, (150,))
    subspace, buffers = plane(model, ignore="bias_bn")
    splits = as_splits((x, y))
    with ModelEvaluator(
        model, subspace, buffers, splits, objective(CASES[0]), device=CPU, statistics=splits[0]
    ) as evaluator:
        value = evaluator(POINTS[1:2])[0, 0]
    weights = [torch.from_numpy(v.copy()).double() for v in subspace.layout.views(subspace.center)]
    for c, direction in zip(POINTS[1], subspace.directions, strict=True):
        for weight, part in zip(weights, subspace.layout.views(direction), strict=True):
            weight += c * torch.from_numpy(part.copy())
    hidden = x.double() @ weights[0].T + weights[1]
    parts = hidden[:128], hidden[128:]
    mean = sum(len(p) * p.mean(0) for p in parts) / 150
    variance = sum(len(p) * p.var(0) for p in parts) / 150
    out = (hidden - mean) / (variance + 1e-5).sqrt() * weights[2] + weights[3]
    expected = nn.functional.cross_entropy(out @ weights[4].T + weights[5], y)
    assert value == pytest.approx(float(expected), rel=1e-6)


def test_stops_while_statistics_are_recomputed() -> None:
    told = []
    evaluator, _ = _evaluator(BY_NAME["residual"], mode="recomputed", stop=lambda: bool(told))
    with evaluator:
        told.append(1)
        with pytest.raises(Stopped):
            evaluator(POINTS)


# -- steps that are wrong ---------------------------------------------------------------------------------


def _forgets_a_bias(network: Network, at: Any) -> Network:
    result = STEPS["fold"](network, at)
    view = dict(
        zip(result.subspace.layout.names, result.subspace.layout.views(result.subspace.center), strict=True)
    )
    view["conv2.bias"][...] = 0
    return result


def _mixes_up_directions(network: Network, at: Any) -> Network:
    """Right at the origin and on the diagonal."""
    return replace(network, subspace=replace(network.subspace, directions=network.subspace.directions[::-1]))


def _overflows(network: Network, at: Any) -> Network:
    directions = tuple(np.where(d > 1e30, d, d * np.float32(1e30)) for d in network.subspace.directions)
    return replace(network, subspace=replace(network.subspace, directions=directions))


def _is_a_little_off(network: Network, at: Any) -> Network:
    return replace(
        network, subspace=replace(network.subspace, center=network.subspace.center * np.float32(1 + 1e-4))
    )


def _raises(network: Network, at: Any) -> Network:
    raise RuntimeError("no such kernel\nand much more")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (_forgets_a_bias, "outputs differ by"),
        (_mixes_up_directions, "outputs differ by"),
        (_overflows, "outputs differ by inf"),
        (_is_a_little_off, "outputs differ by"),
        (_raises, "RuntimeError: no such kernel and much more"),
    ],
)
def test_wrong_steps_are_caught(
    step: Callable[..., Network], reason: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_NAME["residual"]
    monkeypatch.setattr(choosing, "STEPS", {"wrong": step, "channels_last": STEPS["channels_last"]})
    evaluator, _ = _evaluator(case, ignore="bias_bn", precision=precision)
    with evaluator:
        plain = evaluator(POINTS)
        recipe = evaluator.choose(POINTS, 10_000)
        values = evaluator(POINTS)
    assert recipe.steps == ("channels_last",)
    assert reason in recipe.dropped["wrong"]
    assert "\n" not in recipe.dropped["wrong"]
    np.testing.assert_allclose(values, plain, rtol={"fp32": 1e-6, "bf16": 0.05}[precision])


def test_an_objective_that_asks_its_model_for_more_is_served_plainly() -> None:
    model, (x, y) = BY_NAME["residual"].make()

    def own(model: Residual, batch: Any) -> dict[str, Any]:
        outputs = model(batch[0])
        assert model.keeps is False  # an attribute that no traced graph has
        return {"loss": (nn.functional.cross_entropy(outputs, batch[1], reduction="sum"), len(outputs))}

    subspace, buffers = plane(model)
    with ModelEvaluator(model, subspace, buffers, as_splits((x, y)), own, device=CPU) as evaluator:
        recipe = evaluator.choose(POINTS, 10_000)
        values = evaluator(POINTS)
    assert recipe.steps == ("channels_last",)
    assert "AttributeError" in recipe.dropped["fold"]
    np.testing.assert_allclose(values[:, 0], truth(BY_NAME["residual"], subspace, POINTS), rtol=1e-5)


def test_points_at_which_the_model_fails_say_nothing_of_steps() -> None:
    model, (x, y) = BY_NAME["residual"].make()
    loss = objective(BY_NAME["residual"])
    weight = model.stem.weight  # type: ignore[union-attr]
    at_origin = weight.detach().clone()

    def fussy(model: nn.Module, batch: Any) -> Any:
        if not torch.equal(weight, at_origin):
            raise ValueError("only the origin will do")
        return loss(model, batch)

    subspace, buffers = plane(model)
    with ModelEvaluator(model, subspace, buffers, as_splits((x, y)), fussy, device=CPU) as evaluator:
        recipe = evaluator.choose(POINTS, 10_000)
        assert evaluator.readings(POINTS)[1:] == [{}, {}]
    assert recipe.steps == ALL or "channels_last" in recipe.steps
    assert [error["at"] for error in recipe.errors] == [[0.0, 0.0]]


# -- precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("fp32", 0, 1e-5), ("bf16", 1e-5, 0.1), ("fp16", 1e-6, 0.02)]
)
def test_errors_are_those_against_float64(precision: str, least: float, most: float) -> None:
    case = BY_NAME["residual"]
    evaluator, subspace = _evaluator(case, ignore="bias_bn", precision=precision)
    with evaluator:
        recipe = evaluator.choose(POINTS, 10_000)
        values = evaluator(POINTS)[:, 0]
    exact = truth(case, subspace, POINTS)
    assert [error["at"] for error in recipe.errors] == POINTS.tolist()
    for error, expected, value in zip(recipe.errors, exact, values, strict=True):
        told, got = error["values"]["loss"]
        assert told == pytest.approx(expected, rel=1e-10)
        assert got == pytest.approx(value, rel=1e-6)
    worst = np.abs(values / exact - 1).max()
    assert least <= worst <= most


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bf16_runs_on_every_model_or_says_so(case: Case) -> None:
    """Loss and accuracy are computed from float32 outputs, batch norm in float32, the rest in bf16."""
    evaluator, subspace = _evaluator(case, precision="bf16")
    with evaluator:
        evaluator.choose(POINTS, 10_000)
        values = evaluator(POINTS)
    if case.name not in (*RANDOM, "branching_images", "control_flow"):
        np.testing.assert_allclose(values[:, 0], truth(case, subspace, POINTS), rtol=0.2)


# -- single kernels ---------------------------------------------------------------------------------------


def test_additions_overwrite_only_what_nobody_reads_again() -> None:
    found = {}
    for keeps in (False, True):
        model = Residual(keeps=keeps).eval()
        network = fold(Network(model, *plane(model, ignore="bias_bn")), recomputed=False)
        fused = fuse(network, CPU, torch.float32)
        layers = [layer for layer in fused.module.modules() if isinstance(layer, OneDNNConvolution)]
        found[keeps] = sum(layer._overwrites for layer in layers)
        assert len(layers) == 4  # stem, conv1, conv2 with its addition, and one of the last two with theirs
    assert found == {False: 2, True: 1}


class Around(nn.Module):
    """relu(h + conv(h)): the convolution reads what the sum could be written over."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        return self.head(torch.relu(h + self.conv(h)).mean((2, 3)))


def test_a_convolution_does_not_overwrite_what_it_reads() -> None:
    torch.manual_seed(0)
    model, x = Around().eval(), torch.randn(4, 3, 24, 24)
    fused = fuse(Network(model, *plane(model)), CPU, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(fused.module(x), model(x), rtol=1e-4, atol=1e-5)


def test_cudnn_layers_call_what_torch_has_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph with cuDNN's kernels, for which stand-ins of the same signature compute here."""

    def convolution_relu(
        x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any
    ) -> Any:
        return torch.conv2d(x, w, b, stride, padding, dilation, groups).relu()

    def convolution_add_relu(
        x: Any, w: Any, z: Any, alpha: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any
    ) -> Any:
        return (torch.conv2d(x, w, b, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolution_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", convolution_add_relu)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    case = BY_NAME["residual"]
    model, (x, y) = case.make()
    model.eval()
    subspace, buffers = plane(model, ignore="bias_bn")
    network = fuse(
        fold(Network(model, subspace, buffers), recomputed=False), torch.device("cuda"), torch.float32
    )
    assert sum(isinstance(layer, CuDNNConvolution) for layer in network.module.modules()) == 4
    running = Running(network, objective(case), device=CPU, precision=PRECISIONS["fp32"])
    with running, running.ready():
        running.move_to(POINTS[1:2])
        total, count = running.totals((x, y))["loss"]
    assert float(total) / int(count) == pytest.approx(truth(case, subspace, POINTS[1:2])[0], rel=1e-6)


@pytest.mark.parametrize(
    "name", ["mlp", "residual", "stochastic", "group_norm", "transformer", "scalar_regression"]
)
@pytest.mark.parametrize("ignore", ["bias_bn", "none"])
def test_several_points_in_one_pass(name: str, ignore: str) -> None:
    """Values are those of single passes, and the same bits in whatever company and place."""
    case = BY_NAME[name]
    model, data = case.make()
    model.eval()
    subspace, buffers = plane(model, ignore=ignore)
    network = Network(model, subspace, buffers)
    if name == "residual":
        network = fold(network, recomputed=False)
    running = Running(
        replace(network, points_per_pass=3), objective(case), device=CPU, precision=PRECISIONS["fp32"]
    )

    def values(points: np.ndarray) -> np.ndarray:
        running.move_to(points)
        torch.manual_seed(0)
        total, count = running.totals(data)["loss"]
        assert total.shape == count.shape == (3,)
        return (total / count).numpy()

    with running, running.ready():
        together = values(POINTS)
        reversed_, alone = values(POINTS[::-1].copy())[::-1], values(POINTS[2:])
    np.testing.assert_array_equal(together, reversed_)
    assert (alone == together[2]).all()
    if name not in RANDOM:
        np.testing.assert_allclose(together, truth(case, subspace, POINTS), rtol=1e-5)


class _FakeGraph:
    """Records what is done at the capture, and does it again at a replay into the same memory, as a CUDA graph does."""

    recording: _FakeGraph | None = None

    def __init__(self) -> None:
        self.work: Callable[[], Any] = lambda: None
        self.results: dict[str, Any] = {}

    def replay(self) -> None:
        for name, (total, count) in self.work().items():
            self.results[name][0].copy_(total)
            assert count == self.results[name][1]

    def __enter__(self) -> None:
        _FakeGraph.recording = self

    def __exit__(self, *_: object) -> None:
        _FakeGraph.recording = None


def test_captured_passes_copy_inputs_in_and_totals_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bookkeeping around CUDA graphs, with a stand-in for the graph itself: no GPU here."""

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _FakeGraph)
    pools = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: pools.append(pool) or graph)
    calls = []

    def totals(batch: Any) -> dict[str, Any]:
        calls.append(1)
        result = {"loss": (batch[0].sum().clone(), len(batch[0]))}
        if _FakeGraph.recording is not None:
            _FakeGraph.recording.work = lambda: totals(batch)
            _FakeGraph.recording.results = result
        return result

    captured = CapturedTotals(totals)
    batches = [(torch.full((n,), float(v)), torch.zeros(n)) for n, v in ((3, 1), (3, 2), (2, 5), (3, 7))]
    kept = [captured(batch)["loss"] for batch in batches]
    assert [(float(total), count) for total, count in kept] == [(3.0, 3), (6.0, 3), (10.0, 2), (21.0, 3)]
    assert pools == [(0, 1), (0, 1)]
    assert len(calls) == 2 * (3 + 1) + 4  # two shapes, each warmed up and captured once; and four replays


def test_trace_leaves_the_model_alone() -> None:
    for case in CASES:
        model, _ = case.make()
        model.eval()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            graph = trace(model)
        except Refused:
            continue
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert {id(p) for p in graph.parameters()}.isdisjoint(id(p) for p in model.parameters())


def test_fusing_without_a_kernel() -> None:
    model = Residual().eval()
    network = Network(model, *plane(model))
    with pytest.raises(NotApplicable):
        fuse(network, CPU, torch.float64)
    with pytest.raises(NotApplicable):
        fuse(network, torch.device("meta"), torch.float32)


# -- recipes ----------------------------------------------------------------------------------------------


def test_a_recipe_gives_the_same_bits_to_another_evaluator() -> None:
    case = BY_NAME["residual"]
    first, _ = _evaluator(case)
    with first:
        recipe = first.choose(POINTS, 10_000)
        values = first(POINTS)
        readings = first.readings(POINTS)
    second, _ = _evaluator(case)
    with second:
        second.use(Recipe.recorded(recipe.told()))
        np.testing.assert_array_equal(second(POINTS), values)
        assert second.readings(POINTS) == readings
        with pytest.raises(Refused, match="warp cannot be done here"):
            second.use(Recipe(steps=("warp",)))


def test_only_wanted_steps_are_tried() -> None:
    evaluator, _ = _evaluator(BY_NAME["residual"])
    with evaluator:
        assert evaluator.choose(POINTS, 10_000, wanted=("fold",)).steps == ("fold",)
        assert evaluator.choose(POINTS, 10_000, wanted=()).steps == ()
