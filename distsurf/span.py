"""From a job's words to the subspace: the model's weights, and the directions that span the surface."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distsurf.assemble import Live, Say, training_split
from distsurf.direction_files import keep, read_direction, read_kept, read_trajectory
from distsurf.errors import InputError
from distsurf.grid import AXIS_NAMES
from distsurf.job import LIVE, DirectionSection, Job
from distsurf.objective.data import Split
from distsurf.objective.gradient import gradient
from distsurf.objective.losses import Objective
from distsurf.objective.precision import PRECISIONS
from distsurf.objective.recipe import DEFAULT_BATCH
from distsurf.subspace import (
    Layout,
    Subspace,
    Tensors,
    cosine,
    difference,
    normalize,
    orthogonalize,
    plane_through,
    random_direction,
)
from distsurf.subspace.weights import batch_norm_statistics, load_state, read_checkpoint

Vector = NDArray[Any]

PARALLEL = 1 - 1e-6
"""Cosine from which on two directions are one."""
DIRECTIONS_SHARE = 0.5
"""Of a machine's memory that directions may take."""


@dataclass(frozen=True)
class Spanned:
    """What `span` found."""

    subspace: Subspace
    fixed: dict[str, torch.Tensor]
    """The tensors that do not move."""
    facts: dict[str, Any]
    """For the surface file, as JSON: ``models`` whose place in the subspace is known (``name`` and ``at``, their
    coordinates); ``axes``, what each one leads along; the ``trajectory`` that a training takes in it, if there is one,
    as `distsurf.direction_files.read_trajectory` gives it."""


def span(
    job: Job,
    model: nn.Module,
    splits: Mapping[str, Split],
    objective: Objective,
    *,
    live: Live | None,
    device: torch.device,
    out: Path | None,
    say: Say,
) -> Spanned:
    """The subspace of a model that has its weights. Raises InputError where directions cannot be had, or are zero.

    ``out``: the surface file; a direction whose digits depend on the machine is kept beside it.
    """
    mode = job.objective.batch_norm
    statistics = batch_norm_statistics(model)
    if mode != "frozen" and not statistics:
        raise InputError(
            f"objective.batch_norm = {mode!r}: the model {type(model).__name__} has no batch norm with running "
            "statistics; leave it out"
        )
    weights = _Weights(job, model, live)
    layout, axes = weights.layout, job.grid.grid().axes
    center = weights.own()
    if job.directions.kind == "plane":
        directions, others = _plane(job, weights, center)
    else:
        _require_memory(job, layout)
        sources = _Sources(job, weights, splits, objective, device, out, say)
        directions, others = (), []
        for repeat in range(job.directions.repeat):
            more, others = _axis_by_axis(job, weights, center, sources, repeat)
            directions += more
    if mode == "interpolated" and not _moves(layout, directions, statistics):
        raise InputError(
            "objective.batch_norm = 'interpolated': with directions.ignore = 'bias_bn' the statistics do not "
            "move; set directions.ignore = 'none', or leave batch_norm out"
        )
    # Where the grid meets a model, it has that model's weights to the last bit.
    pinned = tuple(
        (other.at, other.weights)
        for other in others
        if all(c in axis.values for c, axis in zip(other.at, axes, strict=True))
    )
    path = _trajectory(job)
    # Beside others, and in the plane of a training, whose centre may be untrained, it goes by its file's name.
    name = job.model.checkpoint if others or path else None
    models = [_Model(name or "trained model", (0.0,) * len(axes), center), *others]
    short = [_short(model.name) for model in models]
    if len(set(short)) < len(short):  # final.pt in one folder, and final.pt in another
        short = [model.name.removeprefix(LIVE) for model in models]
    _require_apart(job, directions)
    fixed = Tensors.of(model, interpolated=mode == "interpolated").fixed
    return Spanned(
        Subspace(layout, center, directions, pinned, job.directions.repeat),
        {name: buffer.detach().clone() for name, buffer in fixed.items()},
        {
            "models": [{"name": n, "at": list(m.at)} for n, m in zip(short, models, strict=True)],
            "axes": _leading(job),
            **path,
        },
    )


def _require_apart(job: Job, directions: Sequence[Vector]) -> None:
    """Raise InputError where two directions of a plane are the same but for their length."""
    names = job.grid.grid().names
    for i, j in itertools.combinations(range(len(names)), 2):
        if abs(cosine(directions[i], directions[j])) > PARALLEL:
            raise InputError(
                f"the directions of {names[i]} and {names[j]} are the same but for their length: they span a line, and "
                f"not a plane; give {names[j]} another one in [directions.{names[j]}]"
            )


def _require_memory(job: Job, layout: Layout) -> None:
    """Raise InputError where repeated directions do not fit into this machine."""
    needed = job.directions.repeat * len(job.grid.grid().axes) * layout.size * 4
    with contextlib.suppress(ValueError, OSError, AttributeError):  # where the system does not tell
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > DIRECTIONS_SHARE * there:
            raise InputError(
                f"directions.repeat = {job.directions.repeat:,}: the directions take {needed / 1e9:,.0f} GB, and this "
                f"machine has {there / 1e9:,.0f}; evaluate fewer at a time, with another directions.seed each"
            )


def _trajectory(job: Job) -> dict[str, Any]:
    """Where both axes are those of one file, the path that it has."""
    if job.directions.kind == "plane":
        return {}
    wishes = [job.directions.axis(name) for name in job.grid.grid().names]
    files = {(wish.file, wish.normalization) for wish in wishes}
    (file, how) = files.pop()
    if files or file is None or how != "none" or len(wishes) != 2:
        return {}
    found = read_trajectory(Path(file))
    return {} if found is None else {"trajectory": found}


def _leading(job: Job) -> list[str]:
    """What each axis leads along, in words; nothing for a random direction."""
    if job.directions.kind == "plane":
        first, second = map(_short, job.directions.checkpoints or [])
        return [f"toward {first}", f"across it, toward {second}"]
    told = []
    for name in job.grid.grid().names:
        wish = job.directions.axis(name)
        if wish.checkpoint is not None:
            told.append(f"toward {_short(wish.checkpoint)}")
        elif wish.file is not None:
            told.append(f"{name} of {_short(wish.file)}")
        else:
            told.append("along the gradient" if wish.kind == "gradient" else "")
    return told


def _short(name: str) -> str:
    """A file's name without its folder; a script's object without its mark."""
    return Path(name).name.removeprefix(LIVE)


@dataclass(frozen=True)
class _Model:
    """A model whose place in the subspace is known."""

    name: str
    at: tuple[float, ...]
    weights: Vector


def _plane(job: Job, weights: _Weights, center: Vector) -> tuple[tuple[Vector, ...], list[_Model]]:
    """Directions, and the two other models."""
    first, second = job.directions.checkpoints or []
    vectors = weights.read(first), weights.read(second)
    directions, places = plane_through(center, *vectors, job.directions.normalization or "none")
    names = (first, second)
    return directions, [_Model(*told) for told in zip(names, places, vectors, strict=True)]


def _axis_by_axis(
    job: Job, weights: _Weights, center: Vector, sources: _Sources, repeat: int
) -> tuple[tuple[Vector, ...], list[_Model]]:
    """The directions of one repetition, and the models at their ends."""
    names = job.grid.grid().names
    directions: tuple[Vector, ...] = ()
    others = []
    for k, name in enumerate(names):
        wish = job.directions.axis(name)
        how, ignore = wish.normalization or "none", wish.ignore or "none"
        other = None if wish.checkpoint is None else weights.read(wish.checkpoint)
        raw = sources.get(wish, k, name, center, repeat) if other is None else difference(center, other)
        direction = normalize(raw, center, weights.layout, how=how, ignore=ignore)
        if job.directions.orthogonalize:
            direction = orthogonalize(direction, directions)
        if not direction.any():
            raise InputError(_why_zero(name, wish))
        directions += (direction,)
        is_as_it_is = how == ignore == "none" and (k == 0 or not job.directions.orthogonalize)
        if wish.checkpoint is not None and other is not None and is_as_it_is:
            others.append(_Model(wish.checkpoint, tuple(float(i == k) for i in range(len(names))), other))
    return directions, others


@dataclass(frozen=True)
class _Sources:
    """Where directions come from that are no difference to a model."""

    job: Job
    weights: _Weights
    splits: Mapping[str, Split]
    objective: Objective
    device: torch.device
    out: Path | None
    say: Say

    def get(self, wish: DirectionSection, axis: int, name: str, center: Vector, repeat: int) -> Vector:
        """The direction of an axis before it is normalized."""
        layout = self.weights.layout
        if wish.file is not None:
            return read_direction(Path(wish.file), name, layout, self.weights.model)
        if wish.kind == "gradient":
            return self._gradient(center)
        return random_direction(layout, wish.seed or 0, axis + repeat * len(AXIS_NAMES))

    def _gradient(self, center: Vector) -> Vector:
        """Its last digits are those of this machine and number of threads: shards and resumed jobs share one file."""
        layout = self.weights.layout
        if self.out is None:
            return self._compute()
        path = self.out.with_name(f"{self.out.stem}.gradient-{self.job.fingerprint[:12]}.safetensors")
        about = {"weights": Subspace(layout, center, ()).fingerprints()["weights"]}
        if not path.exists():
            keep(path, layout, self._compute(), about)
        return read_kept(path, layout, about)

    def _compute(self) -> Vector:
        split = training_split(self.splits)
        self.say(f"computing the gradient on {split.samples:,} samples, once")
        layout, model = self.weights.layout, self.weights.model
        size = self.job.data.batch_size or DEFAULT_BATCH
        found = gradient(model, split, self.objective, size, self.device, layout.names)
        return layout.flatten(list(found.values()), np.dtype(np.float32))


def _why_zero(name: str, wish: DirectionSection) -> str:
    if wish.kind == "difference" and wish.ignore == "none":
        return (
            f"directions.{name}: {wish.checkpoint} has the same weights as the model; name another checkpoint"
        )
    if wish.kind == "file" and wish.ignore == "none" and wish.normalization == "none":
        return f"directions.{name}: {wish.file} holds nothing but zeros for this model"
    return (
        f"the direction of {name} is zero everywhere: with ignore = {wish.ignore!r} and normalization = "
        f"{wish.normalization!r} nothing of this model moves; try ignore = 'none'"
    )


class _Weights:
    """The moving tensors of the job's model, and of other checkpoints of it, as vectors of one layout."""

    def __init__(self, job: Job, model: nn.Module, live: Live | None):
        self._job, self.model, self._live = job, model, live
        self._interpolated = job.objective.batch_norm == "interpolated"
        self.layout = Layout.of(Tensors.of(model, interpolated=self._interpolated).moving)
        # float64 weights keep their digits only where they are asked for; else every model is evaluated in float32.
        is_double = PRECISIONS[job.run.precision].sums is torch.float64
        self._dtype = np.dtype(np.float64 if is_double else np.float32)

    def own(self) -> Vector:
        """Those of the model itself."""
        return self._of(self.model, "the weights are not finite")

    def _of(self, model: nn.Module, complaint: str) -> Vector:
        tensors = Tensors.of(model, interpolated=self._interpolated).moving
        vector = self.layout.flatten(list(tensors.values()), self._dtype)
        for name, view in zip(self.layout.names, self.layout.views(vector), strict=True):
            if not np.isfinite(view).all():
                raise InputError(f"{complaint}: parameter {name} holds NaN or infinity")
        return vector

    def read(self, name: str) -> Vector:
        """Those of another checkpoint, which has to fit the model; the model is as it was afterwards."""
        given = None if self._live is None else self._live.checkpoints.get(name)
        origin = name if given is not None else f"checkpoint {name}"
        if isinstance(given, nn.Module):
            given = given.state_dict()
        if given is None:
            wish = self._job.model
            given = read_checkpoint(Path(name), key=wish.checkpoint_key, allow_pickle=wish.allow_pickle)
        # Into the model itself, since some models cannot be copied.
        kept = copy.deepcopy(self.model.state_dict())
        try:
            load_state(self.model, given, origin)
            return self._of(self.model, f"{origin}: its weights are not finite")
        finally:
            self.model.load_state_dict(kept)


def _moves(layout: Layout, directions: Sequence[Vector], names: Collection[str]) -> bool:
    """Whether a direction has an entry other than zero in any of these tensors."""
    return any(
        name in names and view.any()
        for direction in directions
        for name, view in zip(layout.names, layout.views(direction), strict=True)
    )
