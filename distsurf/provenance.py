"""What a surface depends on (its fingerprint), and under which conditions it was made (its facts)."""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn

import distsurf
from distsurf.distribute.placement import Placement
from distsurf.job import Job
from distsurf.objective.data import Split, tensors_of
from distsurf.objective.losses import Objective, Supervised
from distsurf.objective.recipe import Recipe
from distsurf.subspace import Subspace, cosine
from distsurf.subspace.weights import digest


def fingerprint(
    job: Job,
    model: nn.Module,
    subspace: Subspace,
    buffers: Mapping[str, torch.Tensor],
    splits: Sequence[Split],
    objective: Objective,
    losses: Iterable[Callable[..., Any]],
    *,
    batch_size: int,
    statistics: Split | None = None,
    curved: Split | None = None,
) -> dict[str, str]:
    """Everything that values depend on, field by field, in words or digests; the same in every process.

    ``losses`` are the user's own among the objective's losses; ``statistics`` the data that batch-norm statistics are
    recomputed from, ``curved`` that whose loss is measured for its curvature.
    """
    told = {
        "model": describe_model(model),
        **subspace.fingerprints(),
        "buffers": digest([repr(list(buffers)).encode(), *map(_bytes, buffers.values())]),
        "data": _describe_data(splits),
        "objective": _describe_objective(job, objective, losses),
        "batch_size": str(batch_size),
        "grid": str(job.evaluated_grid()),
        "precision": job.run.precision,
        "seed": str(job.run.seed),
    }
    if job.curvature is not None:
        told["curvature"] = job.curvature.model_dump_json()
        if curved is not None:
            told["curvature"] += f" of {_describe_data([curved])}"
    if job.objective.batch_norm != "frozen":
        told["batch_norm"] = job.objective.batch_norm
    if statistics is not None:
        told["batch_norm"] += f" from {_describe_data([statistics])}"
    return told


def facts(
    job: Job, placement: Placement, recipe: Recipe, subspace: Subspace, splits: Sequence[Split]
) -> dict[str, Any]:
    """What is worth knowing of how a surface was made, as JSON."""
    axes = job.grid.grid().names
    pairs = [(i, j) for i in range(len(axes)) for j in range(i + 1, len(axes))]

    def largest_cosine(i: int, j: int) -> float:
        """Of all repetitions."""
        starts = range(0, len(subspace.directions), len(axes))
        return max((cosine(subspace.directions[s + i], subspace.directions[s + j]) for s in starts), key=abs)

    return {
        **conditions(placement, recipe),
        "distsurf": distsurf.__version__,
        "numpy": np.__version__,
        "hdf5": h5py.version.hdf5_version,
        "python": platform.python_version(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "placement": placement.summary,
        "job_fingerprint": job.fingerprint,
        "name": job.name,
        "parameters": subspace.layout.count,
        "evaluation": {"precision": job.run.precision, **recipe.told()},
        "samples": {split.name or "data": split.samples for split in splits},
        "cosines": {axes[i] + axes[j]: largest_cosine(i, j) for i, j in pairs},
    }


def conditions(placement: Placement, recipe: Recipe) -> dict[str, Any]:
    """What values do not depend on in meaning, but may in their last digits."""
    return {
        "torch": torch.__version__,
        "device": placement.device.type,
        "threads": placement.threads,
        "steps": " ".join(recipe.steps) or "plain",
    }


def describe_callable(function: Any) -> str:
    """A callable's name and a digest of its source and settings, so that a changed one is another objective."""
    if isinstance(function, nn.Module):
        return describe_model(function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    # Two lambdas of one line have one source; their constants and names tell most of those apart.
    inside = (_simple(code.co_consts), code.co_names) if code is not None else ()
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    settings = (inside, _simple(cells), _simple(getattr(function, "__defaults__", None) or ()))
    own = {} if code is not None else {k: v for k, v in vars(function).items() if _is_simple(v)}
    return f"{name}@{digest([_source(function).encode(), repr((settings, own)).encode()])}"


def describe_model(model: nn.Module) -> str:
    """A model's class and a digest of its structure: its modules' settings and the source of the user's own."""
    parts = []
    for name, module in model.named_modules():
        kind = type(module)
        source = "" if kind.__module__.startswith("torch.") else _source(kind)
        own = {k: v for k, v in sorted(vars(module).items()) if _is_simple(v) and k != "training"}
        parts.append(repr((name, kind.__qualname__, own, source)).encode())
    return f"{type(model).__qualname__}@{digest(parts)}"


def _describe_data(splits: Sequence[Split]) -> str:
    """Split names, sizes and a digest of every number."""
    digests = []
    for split in splits:
        tensors = [tensor for piece in split.pieces for tensor in tensors_of(piece)]
        shapes = repr([(str(t.dtype), tuple(t.shape)) for t in tensors]).encode()
        digests.append(f"{split.name or 'data'}:{split.samples}@{digest([shapes, *map(_bytes, tensors)])}")
    return " ".join(digests)


def _describe_objective(job: Job, objective: Objective, losses: Iterable[Callable[..., Any]]) -> str:
    if not isinstance(objective, Supervised):
        return describe_callable(objective)
    told = job.objective.model_dump(mode="json", by_alias=True, exclude={"function"}, exclude_none=True)
    if job.data.target is not None:
        told["target"] = job.data.target
    return " ".join([json.dumps(told, sort_keys=True), *map(describe_callable, losses)])


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):  # a list is state, and may change
        return all(map(_is_simple, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _simple(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if _is_simple(value)]


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing if hasattr(thing, "__qualname__") else type(thing))
    except (OSError, TypeError):  # built in, or typed at a prompt
        return ""


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    flat: np.ndarray = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat
