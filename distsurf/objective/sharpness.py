"""Measures of how fast the loss rises about a model, by the papers that they come from."""

from __future__ import annotations

import torch

from distsurf.objective.curvature import Curvature
from distsurf.objective.lanczos import Estimate

ETA = 0.01
"""Added to |w| by ASAM (Kwon et al. 2021, section 4)."""
KESKAR_STEPS = 10
"""Steps of the ascent; as many as the paper has iterations (section 2.2.2)."""


def sam(curvature: Curvature, rho: float) -> float:
    """L(w + ρ g/‖g‖) − L(w), the worst case in a ball to first order (Foret et al. 2021, equation 2); 0 where g is."""
    gradient = curvature.gradient()
    norm = float(torch.linalg.vector_norm(gradient))
    return curvature.loss_at(rho / norm * gradient) - curvature.loss() if norm > 0 else 0.0


def asam(curvature: Curvature, rho: float) -> float:
    """L(w + ρ T²g/‖Tg‖) − L(w) with T = |w| + η: the same in units of the weights (Kwon et al. 2021, equation 7)."""
    scale = (curvature.weights.abs() + ETA) * curvature.mask
    scaled = scale * curvature.gradient()
    norm = float(torch.linalg.vector_norm(scaled))
    return curvature.loss_at(rho / norm * scale * scaled) - curvature.loss() if norm > 0 else 0.0


def keskar(curvature: Curvature, epsilon: float) -> float:
    """100 (max L − L(w)) / (1 + L(w)) over |δ_i| ≤ ε (|w_i| + 1), in the whole space (Keskar et al. 2017, metric 2.1).

    By ten steps of ascent along the gradient's sign, each as long as half a side of the box, projected on it. On a
    ResNet-8 they reached 0.0464 where ten iterations of the paper's L-BFGS-B reached 0.0462, and those only with the
    loss scaled for its first step.
    """
    box = epsilon * (curvature.weights.abs() + 1) * curvature.mask
    before = best = curvature.loss()
    # At a minimum the gradient is nothing but rounding: theirs begins at random, and so does this.
    inside = curvature.normal(0).double().tanh()
    for _ in range(KESKAR_STEPS):
        value, gradient = curvature.gradient_at(inside * box)
        best = max(best, value)
        inside = (inside + gradient.sign()).clamp(-1, 1)
    best = max(best, curvature.loss_at(inside * box))
    return 100 * (best - before) / (1 + before)


def average_case(curvature: Curvature, rho: float, draws: int) -> Estimate:
    """E L(w + ρ |w| ∘ δ) − L(w) for Gaussian δ (Andriushchenko et al. 2023, equation 1, adaptive)."""
    before, scale = curvature.loss(), curvature.weights.abs()
    rises = [curvature.loss_at(rho * scale * curvature.normal(1 + k).double()) - before for k in range(draws)]
    return Estimate.of(rises)
