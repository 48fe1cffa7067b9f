"""Planes through awkward models, and the truth about them by a plain loop of a few lines."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from distsurf.objective.losses import Supervised, Term
from distsurf.subspace import Layout, Subspace, Tensors, normalize, random_direction
from tests.cases import Case

CPU = torch.device("cpu")
POINTS = np.array([[0.0, 0.0], [0.4, -0.3], [-0.2, 0.3]])


def plane(
    model: nn.Module, *, ignore: str = "none", interpolated: bool = False
) -> tuple[Subspace, dict[str, torch.Tensor]]:
    """A plane of two random directions, and the buffers that do not move in it."""
    tensors = Tensors.of(model, interpolated=interpolated)
    layout = Layout.of(tensors.moving)
    center = layout.flatten(list(tensors.moving.values()), np.dtype(np.float32))
    directions = tuple(
        normalize(random_direction(layout, 0, axis), center, layout, ignore=ignore)  # type: ignore[arg-type]
        for axis in range(2)
    )
    return Subspace(layout, center, directions), {n: b.clone() for n, b in tensors.fixed.items()}


def objective(case: Case) -> Supervised:
    return Supervised([Term.named(case.loss, {}, "loss")])


def truth(
    case: Case,
    subspace: Subspace,
    points: np.ndarray,
    *,
    recomputed_in: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[float]:
    """The loss at points: a fresh copy of the model per point, its weights set tensor by tensor.

    ``recomputed_in``: statistics by torch's update_bn, in batches of that size.
    """
    losses = []
    for point in points:
        model, data = case.make()
        model.to(dtype).eval()
        named: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for k, name in enumerate(subspace.layout.names):
                for c, direction in zip(point, subspace.directions, strict=True):
                    view = subspace.layout.views(direction)[k]
                    named[name] += c * torch.from_numpy(view.copy()).to(dtype)
            batch = list(data.values()) if isinstance(data, dict) else list(data)
            batch = [t.to(dtype) if t.is_floating_point() else t for t in batch]
            if recomputed_in:
                update_bn([[part] for part in batch[0].split(recomputed_in)], model)
            torch.manual_seed(0)
            outputs = model(*batch[:-1])
            outputs = outputs["logits"] if isinstance(outputs, dict) else outputs
            if case.loss == "mse":
                losses.append(float(((outputs[:, 0] - batch[-1]) ** 2).mean()))
            else:
                losses.append(float(F.cross_entropy(outputs, batch[-1])))
    return losses
