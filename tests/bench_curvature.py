"""Hessian-vector products and Lanczos' method beside other ways, on a ResNet-20 trained on digits for a few epochs.

    python -m tests.bench_curvature [ROUNDS]

Ways of one product take turns; medians of their times are printed beside a plain double backward. Then how many
products the ends of the spectrum need, here and with scipy's ARPACK.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from distsurf import zoo
from distsurf.objective import derivatives
from distsurf.objective.derivatives import Derivatives
from distsurf.objective.lanczos import extremes
from distsurf.objective.losses import Supervised, Term
from distsurf.subspace import Layout

BATCH = 256


def main() -> None:
    """Train, time, count, print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    images, labels = zoo.data("digits")["train"]
    torch.manual_seed(0)
    model = zoo.model("resnet20", in_channels=1)
    zoo.train(
        model,
        images,
        labels,
        epochs=8,
        batch_size=64,
        lr=0.1,
        momentum=0.9,
        weight_decay=5e-4,
        shift=1,
        seed=0,
    )
    model.eval()
    parameters = dict(model.named_parameters())
    layout = Layout.of(parameters)
    batches = [(images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    objective = Supervised([Term.named("cross_entropy", {}, "loss")])
    found = Derivatives(model, objective, lambda: batches, layout, layout.names)
    vector = torch.randn(layout.size, generator=torch.Generator().manual_seed(0))
    pieces = layout.torch_views(vector)

    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="sum") / len(images)

    def double_backward() -> Sequence[Tensor]:
        total = [torch.zeros_like(p) for p in parameters.values()]
        for inputs, targets in batches:
            first = torch.autograd.grad(
                mean(model(inputs), targets), list(parameters.values()), create_graph=True
            )
            for sum_, part in zip(
                total, torch.autograd.grad(first, list(parameters.values()), pieces), strict=True
            ):
                sum_ += part
        return total

    def forward_over_reverse() -> Sequence[Tensor]:
        now = {name: p.detach() for name, p in parameters.items()}
        along = dict(zip(parameters, pieces, strict=True))
        total = {name: torch.zeros_like(p) for name, p in now.items()}
        for inputs, targets in batches:

            def loss(p: dict[str, Tensor], x: Tensor = inputs, y: Tensor = targets) -> Tensor:
                return mean(functional_call(model, p, (x,)), y)

            _, part = jvp(grad(loss), (now,), (along,))
            for name in total:
                total[name] += part[name]
        return list(total.values())

    def ours() -> Sequence[Tensor]:
        return layout.torch_views(found.product(vector))

    def ours_without_graphs() -> Sequence[Tensor]:
        before, derivatives.KEPT_BYTES = derivatives.KEPT_BYTES, 0
        found.forget()
        try:
            return ours()
        finally:
            derivatives.KEPT_BYTES = before
            found.forget()

    ways: dict[str, Callable[[], Sequence[Tensor]]] = {
        "double backward": double_backward,
        "forward over reverse": forward_over_reverse,
        "ours, graphs made anew": ours_without_graphs,
        "ours, graphs kept": ours,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    expected = double_backward()
    for k in range(rounds + 1):
        for name, way in ways.items():
            if way is ours:
                ours()  # the first makes the graphs
            start = time.perf_counter()
            result = way()
            if k:
                seconds[name].append(time.perf_counter() - start)
            for mine, theirs in zip(result, expected, strict=True):
                torch.testing.assert_close(
                    mine.float(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())
                )
        found.forget()
    plain = statistics.median(seconds["double backward"])
    print(
        f"{layout.count:,} parameters, {len(images):,} samples, {torch.get_num_threads()} threads, {rounds} rounds"
    )
    for name, took in seconds.items():
        print(
            f"{name:24} {1 / statistics.median(took):6.2f} products/s, {plain / statistics.median(took):5.2f} x"
        )

    start_vector = torch.randn(layout.size, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(layout.size)
    for view in layout.torch_views(mask):
        view.fill_(1)
    start_vector *= mask
    ends = extremes(found.product, start_vector, dimension=layout.count, tolerance=1e-3, budget=300)
    print(f"both ends to 1e-3: {ends.products} products ({ends.low[0]:.5g}, {ends.high[0]:.5g})")
    for which, basis in (("LA", None), ("SA", None), ("BE", None), ("BE", 40)):
        before = found.products
        operator = LinearOperator(
            (layout.size, layout.size),
            matvec=lambda x: found.product(torch.from_numpy(x.ravel()).float()).numpy(),
            dtype=np.float64,
        )
        values = eigsh(
            operator, k=2 if which == "BE" else 1, which=which, ncv=basis, tol=1e-3,
            v0=start_vector.double().numpy(), return_eigenvectors=False,
        )  # fmt: skip
        told = ", ".join(f"{value:.5g}" for value in values)
        print(f"eigsh {which}, basis {basis or 'of its choice'}: {found.products - before} products ({told})")


if __name__ == "__main__":
    main()
