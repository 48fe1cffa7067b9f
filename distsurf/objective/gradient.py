"""The gradient of an objective over a whole split."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from distsurf.errors import InputError, in_one_line
from distsurf.objective.data import Split, map_tree
from distsurf.objective.losses import Objective
from distsurf.objective.precision import PRECISIONS, arithmetic


def gradient(
    model: nn.Module,
    split: Split,
    objective: Objective,
    batch_size: int,
    device: torch.device,
    names: Collection[str],
) -> dict[str, Tensor]:
    """d(mean)/d(weights) of the objective's first column, by the tensors' ``names``, float64 on the CPU.

    In evaluation mode and strict float32, summed in float64 over batches; tensors that the loss does not depend on
    (batch-norm statistics) get zero. The model stays as it is. Raises InputError where the loss is not differentiable.
    """
    try:
        other = copy.deepcopy(model).eval().requires_grad_(True).float().to(device)
    except Exception as error:
        raise InputError(f"no gradient: a copy of the model cannot be made ({in_one_line(error)})") from error
    parameters = dict(other.named_parameters())
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    count = 0.0
    with arithmetic(PRECISIONS["fp32"]), torch.enable_grad():
        for batch in split.batches(batch_size):
            placed = map_tree(
                lambda t: t.to(device, torch.float32 if t.is_floating_point() else t.dtype), batch
            )
            column, (total, samples) = next(iter(objective(other, placed).items()))
            if not (isinstance(total, Tensor) and total.requires_grad):
                raise InputError(f"{column} of the objective is not differentiable: it gives no gradient")
            parts = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            for name, part in zip(parameters, parts, strict=True):
                if part is not None:
                    sums[name] += part
            count += float(samples)
    found = dict(other.named_buffers())
    return {
        name: sums[name].cpu() / count
        if name in sums
        else torch.zeros_like(found[name], dtype=torch.float64).cpu()
        for name in names
    }
