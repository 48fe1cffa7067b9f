"""How well a plane tells the truth about a path: the loss at each checkpoint against that at its projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distsurf import assemble
from distsurf.distribute.parcel import distribute
from distsurf.distribute.placement import place
from distsurf.distribute.ranks import Ranks
from distsurf.job import Job
from distsurf.run import Prepared, evaluator_of, prepare
from distsurf.subspace import Subspace, Tensors
from distsurf.subspace.weights import load_checkpoint

Floats = NDArray[np.float64]


def losses_along(
    ranks: Ranks, job: Job, checkpoints: Sequence[Path], coordinates: Floats
) -> tuple[str, Floats, Floats]:
    """The first column of a job's objective at checkpoints, and at their places ``(T, 2)`` in the job's plane.

    Each checkpoint has its own batch-norm statistics, and projections have those that the job says. Every rank
    evaluates its share. Returns the column's name and both values, ``(T,)``, on every rank. Raises InputError.
    """
    placement = place(ranks, job.run.device, job.run.threads)
    with ranks.together():
        model, objective = assemble.build_model(job, None), assemble.build_objective(job, None)
    prepared = None
    with ranks.together():
        if ranks.rank == 0:
            prepared = prepare(job, model, objective, None, placement, None, lambda line: None)
    prepared = distribute(ranks, prepared)
    placement.apply()
    mine = range(ranks.rank, len(checkpoints), ranks.size)
    found, name = np.zeros((2, len(checkpoints))), ""

    def evaluate(what: Prepared, at: Floats) -> Floats:
        nonlocal name
        with evaluator_of(job, model, what, objective, placement) as evaluator:
            values = evaluator(at)
            name = evaluator.columns[0].name
        return np.asarray(values[:, 0])

    with ranks.together():
        if len(mine):
            found[1, mine] = evaluate(prepared, coordinates[mine])
    with ranks.together():
        layout, interpolated = prepared.subspace.layout, job.objective.batch_norm == "interpolated"
        for i in mine:
            load_checkpoint(
                model, checkpoints[i], key=job.model.checkpoint_key, allow_pickle=job.model.allow_pickle
            )
            tensors = Tensors.of(model, interpolated=interpolated)
            center = layout.flatten(list(tensors.moving.values()), prepared.subspace.center.dtype)
            alone = Subspace(layout, center, (np.zeros(layout.size, np.float32),))
            fixed = {name: buffer.detach().clone() for name, buffer in tensors.fixed.items()}
            found[0, i] = evaluate(replace(prepared, subspace=alone, buffers=fixed), np.zeros((1, 1)))[0]
    here, projected = ranks.total(found)
    return ranks.broadcast(name), here, projected


def trajectory_error(here: Floats, projected: Floats) -> float:
    """(1/T) Σ [ln(L(w_i) / L(w̃_i))]² over checkpoints w_i and projections w̃_i (Ding et al. 2023).

    NaN where a loss is not positive.
    """
    with np.errstate(all="ignore"):
        return float(np.mean(np.square(np.log(here / projected))))
