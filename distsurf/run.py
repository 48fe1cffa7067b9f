"""The main job: evaluate a surface, in one process or on many ranks.

    mpirun -n 8 python -m distsurf.run [JOB.toml] [--out FILE.h5] [--set section.key=value]… [--fresh]

`evaluate` is the same for Python scripts.
"""

from __future__ import annotations

import sys

if (
    __name__ == "__main__"
):  # before torch is imported, which takes a while: Ctrl-C then needs somebody to hear it
    from distsurf.cli import main

    sys.exit(main(["run", *sys.argv[1:]]))

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distsurf import assemble, provenance
from distsurf.adopt import Known
from distsurf.agree import agree_on_recipe
from distsurf.assemble import Live, Say
from distsurf.distribute.parcel import distribute
from distsurf.distribute.placement import Placement, place
from distsurf.distribute.ranks import EXIT_ABORTED, Ranks, connected, end_now
from distsurf.distribute.signals import StopRequest
from distsurf.distribute.work import Patience, Pulse, follow
from distsurf.errors import Incomplete, InputError
from distsurf.evaluator import Evaluator
from distsurf.grid import Grid
from distsurf.job import LIVE, CurvatureSection, Job
from distsurf.objective.curvature import CurvatureEvaluator, Wish
from distsurf.objective.data import Split
from distsurf.objective.evaluator import ModelEvaluator
from distsurf.objective.losses import Objective
from distsurf.objective.recipe import DEFAULT_BATCH
from distsurf.output import open_output, require_writable
from distsurf.progress import Mode
from distsurf.provenance import describe_callable
from distsurf.recording import evaluate_missing
from distsurf.shards import ArrayShard
from distsurf.span import span
from distsurf.subspace import Subspace
from distsurf.surface import Surface


def _say_nothing(line: str) -> None:
    pass


def evaluate(
    model: nn.Module,
    data: Any,
    loss: Any = "cross_entropy",
    *,
    x: str = "-1:1:51",
    y: str | None = None,
    z: str | None = None,
    seed: int = 0,
    metrics: list[str | dict[str, Any]] | None = None,
    objective: Objective | None = None,
    normalization: str | None = None,
    ignore: str | None = None,
    orthogonalize: bool = False,
    directions: Mapping[str, Any] | None = None,
    curvature: bool | Mapping[str, Any] = False,
    batch_norm: str = "frozen",
    batch_size: int = 0,
    target: str | None = None,
    precision: str = "fp32",
    fast: bool | list[str] = True,
    device: str = "auto",
    threads: int = 0,
    name: str = "surface",
    out: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    progress: Mode = "auto",
) -> Surface:
    """Evaluate a model's loss surface; the same call in one process and, on every rank, under mpirun.

    Args:
        model: any module; it is given back as it was. Under MPI, rank 0's weights count.
        data: a tuple of tensors ``(inputs, targets)``, a torch ``Dataset`` or ``DataLoader``, an iterable of
            batches (tuples or dicts), or a mapping from split names to any of these. Under MPI, rank 0's counts.
        loss: a name, a callable ``(outputs, targets) -> tensor``, or a list of those.
        x, y, z: axes as ``min:max:count``.
        seed: of the random directions.
        directions: the table ``[directions]`` of a job file, with more kinds than random ones: ``{"kind":
            "difference", "checkpoint": other}``. A checkpoint is a file, or a module or state dict, whose values on
            rank 0 count.
        curvature: the table ``[curvature]`` of a job file, with what is to be measured beside the loss: ``{"measures":
            ["eigenvalues", "trace"]}``. True stands for the defaults.
        metrics: names; left out, accuracy for classification losses.
        objective: a callable ``(model, batch) -> {name: (sum, count)}`` in place of loss and metrics.
        batch_norm: statistics ``frozen`` as they are, ``interpolated`` (part of the directions) or ``recomputed`` from
            the training data at every point.
        batch_size: samples per forward pass; 0 finds the fastest.
        precision: ``fp32`` (strict), ``fp64``, ``tf32``, ``bf16`` or ``fp16``.
        fast: whether to look for faster ways to the same values, or the names of the steps to try.
        out: a surface file to write, and to continue from if it is there; without it the result is in memory only.
        fresh: start anew even if ``out`` exists (the old file is kept under another name).

    The other arguments are those of a job file. Returns the surface, on every rank. Raises InputError for what
    cannot be used, and Incomplete, with what was computed in its ``surface``, if not every point got a value.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a torch nn.Module was expected as the model, {type(model).__name__} was given")
    losses = list(loss) if isinstance(loss, (list, tuple)) else [loss]
    for term in losses:
        if not (isinstance(term, (str, dict)) or callable(term)):
            raise InputError(f"a loss is a name, a table or a callable; {term!r} was given")
    own = tuple(None if isinstance(term, (str, dict)) else term for term in losses)
    named = [
        term if callable_ is None else _live_term(callable_, is_first=i == 0)
        for i, (term, callable_) in enumerate(zip(losses, own, strict=True))
    ]
    described: dict[str, Any] = {"loss": named, "metrics": metrics, "batch_norm": batch_norm}
    if objective is not None:
        described = {"function": f"{LIVE}{describe_callable(objective)}", "batch_norm": batch_norm}
    checkpoints: dict[str, Any] = {}
    if directions is not None and not isinstance(directions, Mapping):
        raise InputError(
            f"directions: a table was expected, like {{'kind': 'random'}}; {directions!r} was given"
        )
    table = {
        "seed": seed,
        "orthogonalize": orthogonalize,
        **_named_checkpoints(directions or {}, checkpoints),
    }
    for key, value in (("normalization", normalization), ("ignore", ignore)):
        if value is not None:
            table.setdefault(key, value)
    job = Job.build(
        {
            "name": name,
            "model": {"factory": f"{LIVE}{type(model).__qualname__}"},
            "data": {"source": f"{LIVE}data", "batch_size": batch_size, "target": target},
            "objective": described,
            "directions": table,
            "curvature": {} if curvature is True else (dict(curvature) if curvature else None),
            "grid": {"x": x, "y": y, "z": z},
            "run": {"precision": precision, "device": device, "threads": threads, "fast": fast},
        },
        origin="evaluate",
    )
    live = Live(model, data, own, objective, checkpoints)
    path = None if out is None else Path(out)
    with connected() as ranks:
        return run(job, ranks, live=live, out=path, fresh=fresh, progress=progress)


def _named_checkpoints(table: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A table of directions with names in place of the modules and state dicts, which are put into ``found``."""

    def named(value: Any) -> Any:
        if isinstance(value, (str, os.PathLike)):
            return os.fspath(value)
        name = f"{LIVE}checkpoint {len(found) + 1}"
        found[name] = value
        return name

    result: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("x", "y", "z") and isinstance(value, Mapping):
            result[key] = _named_checkpoints(value, found)
        elif key == "checkpoint":
            result[key] = named(value)
        elif key == "file" and isinstance(value, os.PathLike):
            result[key] = os.fspath(value)
        elif key == "checkpoints":
            result[key] = [named(one) for one in value]
        else:
            result[key] = value
    return result


def _live_term(function: Any, is_first: bool) -> dict[str, str]:
    name = getattr(function, "__name__", type(function).__name__)
    return {"name": f"{LIVE}{describe_callable(function)}", "as": "loss" if is_first else name}


@dataclass
class Prepared:
    """What rank 0 prepares and every rank needs; its arrays travel once."""

    subspace: Subspace
    buffers: dict[str, torch.Tensor]
    splits: list[Split]
    statistics: Split | None
    """What batch-norm statistics are recomputed from, if they are."""
    curved: Split | None
    """What curvature is measured on, if it is."""
    facts: dict[str, Any]
    """What `distsurf.span` tells of the subspace."""


def run(
    job: Job,
    ranks: Ranks,
    *,
    live: Live | None = None,
    out: Path | None,
    shard: ArrayShard | None = None,
    known: Path | None = None,
    fresh: bool = False,
    progress: Mode = "auto",
    say: Say = _say_nothing,
) -> Surface:
    """Evaluate a job's surface on these ranks and return it on every rank.

    Results go to the file ``out``, which is continued if it is there; None keeps them in memory. With a ``shard`` only
    its points are evaluated, into the shard's own file beside ``out``. Points of ``known``, a surface of Li et al.'s
    public code, are taken from there if this job's weights, directions and data agree with it. ``say`` gets lines for
    the user, on rank 0.
    Raises InputError, and Incomplete if some points got no value; both on every rank.
    """
    say = say if ranks.rank == 0 else _say_nothing
    grid = job.evaluated_grid()
    agreement, whole = None, out
    if shard is not None and out is not None:
        if shard.count > grid.size:
            raise InputError(f"shard {shard}: the grid has {grid.size:,} points only")
        agreement = out.with_name(f"{out.stem}.shards-{job.fingerprint[:12]}.json")
        out = shard.path(out)
    with ranks.together():
        _require_same(ranks.gather(f"{job.fingerprint} {shard}"), "was given another job")
        ranks.expect_signs(job.run.silence)
        assemble.check_names(job)
        theirs = Known(known) if ranks.rank == 0 and known is not None else None
        if ranks.rank == 0 and out is not None:
            require_writable(out)
    placement = place(ranks, job.run.device, job.run.threads)
    say(placement.summary)
    with ranks.together(), _same_folder():
        model = assemble.build_model(job, live)
        objective = assemble.build_objective(job, live)
    with ranks.together():
        _require_same(ranks.gather(provenance.describe_model(model)), "has another model")
    with _threads_of_the_process():
        prepared = None
        with ranks.together(), _same_folder():
            if ranks.rank == 0:
                prepared = prepare(job, model, objective, live, placement, whole, say)
        shared = distribute(ranks, prepared)
        del prepared  # on rank 0 the originals: from here on the copy that all ranks share is used
        placement.apply()
        stop = StopRequest()
        pulse = Pulse(stop)
        where = "the origin and the corners of the grid; --plain leaves the corners out"
        trying = partial(_watched, ranks, pulse, job.run.silence, where if job.run.fast else "the origin")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_same_folder())
            with ranks.together(), trying(), _same_folder():
                evaluator = stack.enter_context(
                    evaluator_of(job, model, shared, objective, placement, stop=pulse)
                )
            if ranks.rank == 0 and not evaluator.is_repeatable:
                warnings.warn(
                    "the model gave two values for the same weights and data: it keeps state outside its buffers, or "
                    "its kernels are not deterministic; values will depend on the order of evaluation",
                    stacklevel=2,
                )
            with _same_folder():
                recipe = agree_on_recipe(
                    ranks, job, evaluator, out, fresh, say, trying, shard=shard, agreement=agreement
                )
            measured: Evaluator = evaluator
            with ranks.together(), trying(), _same_folder():
                if job.curvature is not None:
                    measured = with_curvature(job.curvature, evaluator, shared, grid)
            file = None
            # A step of its own: the others must not ask for work before there is somewhere to record it.
            with ranks.together():
                if ranks.rank == 0:
                    if theirs is not None:
                        with trying():
                            theirs.require_agreement(measured, grid)
                    about = {
                        "job": job.to_toml(),
                        "fingerprint": provenance.fingerprint(
                            job,
                            model,
                            shared.subspace,
                            shared.buffers,
                            shared.splits,
                            objective,
                            assemble.own_losses(job, live),
                            batch_size=recipe.batch_size,
                            statistics=shared.statistics,
                            curved=shared.curved,
                        ),
                        "facts": provenance.facts(job, placement, recipe, shared.subspace, shared.splits)
                        | shared.facts
                        | ({} if theirs is None else {"known": theirs.told})
                        | ({} if shard is None else {"shard": str(shard)}),
                    }
                    now = provenance.conditions(placement, recipe)
                    file = stack.enter_context(
                        open_output(out, fresh, measured.columns, about, grid, now, say)
                    )
                    if theirs is not None:
                        say(f"{theirs.record(file):,} points are taken from {known}")
            patience = Patience(job.run.silence)
            # Before, there is nothing to save: a signal ends all at once.
            with stop, ranks.without_heartbeat():
                if file is not None:
                    outcome = evaluate_missing(
                        ranks,
                        measured,
                        file,
                        stop,
                        pulse,
                        sum(split.samples for split in shared.splits),
                        patience=patience,
                        disk_patience=job.run.disk_patience,
                        progress=progress,
                        say=say,
                        prepare_thread=placement.apply,
                    )
                else:
                    outcome = follow(ranks, measured, grid, pulse, patience)
            if not ranks.lost:
                outcome = ranks.broadcast(outcome)
    outcome.surface.is_writer = ranks.rank == 0
    if outcome.missing:
        raise Incomplete(outcome.missing, outcome.surface, outcome.stopped)
    return outcome.surface


def evaluator_of(
    job: Job,
    model: nn.Module,
    prepared: Prepared,
    objective: Objective,
    placement: Placement,
    stop: Callable[[], bool] = lambda: False,
) -> ModelEvaluator:
    """What evaluates a job's points on this rank, plainly until it is told otherwise."""
    return ModelEvaluator(
        model,
        prepared.subspace,
        prepared.buffers,
        prepared.splits,
        objective,
        batch_size=job.data.batch_size or DEFAULT_BATCH,
        device=placement.device,
        precision=job.run.precision,
        seed=job.run.seed,
        statistics=prepared.statistics,
        stop=stop,
    )


def wish_of(section: CurvatureSection) -> Wish:
    """What a job's section asks for."""
    return Wish(**section.model_dump(exclude={"split"}))


def with_curvature(
    section: CurvatureSection, evaluator: ModelEvaluator, prepared: Prepared, grid: Grid
) -> CurvatureEvaluator:
    """The evaluator, with the columns of curvature that a job asks for, once their derivatives have been verified."""
    assert prepared.curved is not None
    names = grid.once.names
    found = CurvatureEvaluator(evaluator, prepared.curved, wish_of(section), prepared.subspace, names)
    found.verify()
    return found


def _watched(
    ranks: Ranks, pulse: Pulse, silence: float, where: str
) -> contextlib.AbstractContextManager[None]:
    """While the model is tried, before the evaluation: other ranks must not wait for one that hangs in it for ever."""

    def give_up() -> None:
        print(
            f"distsurf: rank {ranks.rank} on {ranks.hosts[ranks.rank]}: no sign of life for {silence:g} s "
            f"(run.silence) while the model was tried at {where}",
            file=sys.stderr,
        )
        end_now(EXIT_ABORTED)

    return pulse.watched(silence, give_up) if ranks.size > 1 else contextlib.nullcontext()


def _require_same(told: list[str], complaint: str) -> None:
    for rank, text in enumerate(told):
        if text != told[0]:
            raise InputError(f"rank {rank} {complaint} than rank 0; every rank must make the same call")


def prepare(
    job: Job,
    model: nn.Module,
    objective: Objective,
    live: Live | None,
    placement: Placement,
    out: Path | None,
    say: Say,
) -> Prepared:
    """Rank 0: data, weights and directions."""
    splits = assemble.build_splits(job, live)
    assemble.load_weights(job, model, splits, placement.device, say)
    spanned = span(job, model, splits, objective, live=live, device=placement.device, out=out, say=say)
    recomputed = job.objective.batch_norm == "recomputed"
    return Prepared(
        spanned.subspace,
        spanned.fixed,
        assemble.wanted_splits(job, splits),
        assemble.training_split(splits) if recomputed else None,
        None if job.curvature is None else assemble.curved_split(job.curvature.split, splits),
        spanned.facts,
    )


@contextlib.contextmanager
def _same_folder() -> Iterator[None]:
    """Code of the user's may change the folder; names are meant from where the job was started."""
    folder = os.getcwd()
    try:
        yield
    finally:
        os.chdir(folder)


@contextlib.contextmanager
def _threads_of_the_process() -> Any:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
