"""One way of evaluating points for all ranks and for good: found by rank 0, or taken from the file, checked by all."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distsurf.distribute.ranks import Ranks
from distsurf.errors import InputError
from distsurf.files import replacing
from distsurf.job import Job
from distsurf.objective.evaluator import ModelEvaluator
from distsurf.objective.fast.steps import STEPS
from distsurf.objective.fast.trace import Refused
from distsurf.objective.fast.verify import sampled_points
from distsurf.objective.precision import PRECISIONS
from distsurf.objective.recipe import DEFAULT_BATCH, Recipe
from distsurf.output import counted_trial, recorded
from distsurf.shards import ArrayShard

MOST_TRIALS = 2
"""So many starts may die while the fast path is verified, which evaluates corners of the grid that may be deadly."""
ALIKE = {True: 0.05, False: 1e-3}
"""Relative difference of values that ranks may have at the sampled points, in a reduced precision and otherwise: ranks
on other hardware round otherwise, but a step that is wrong there differs by more."""


def agree_on_recipe(
    ranks: Ranks,
    job: Job,
    evaluator: ModelEvaluator,
    out: Path | None,
    fresh: bool,
    say: Callable[[str], None],
    trying: Callable[[], AbstractContextManager[None]] = nullcontext,
    *,
    shard: ArrayShard | None = None,
    agreement: Path | None = None,
) -> Recipe:
    """Have every rank's evaluator use the same steps of the fast path and the same batch size.

    A file that is continued decides both, as far as its steps still hold here; ``data.batch_size`` decides the size.
    Otherwise rank 0 goes through the steps and all ranks measure the batch size at once, as they will compute. Whatever
    evaluates does it while ``trying``. Where earlier starts died of it, all is left plain. Shards of one surface, which
    begin at the same time, agree by the file ``agreement``: the first that is there decides.
    """
    grid = job.evaluated_grid()
    points = sampled_points(grid)
    asked = None if job.run.fast is True else tuple(job.run.fast or ())
    before: Recipe | None = None
    recipe = Recipe(batch_size=job.data.batch_size or DEFAULT_BATCH)
    passes = 0.0
    with ranks.together():
        if ranks.rank == 0:
            before, missing = recorded(out, fresh)
            before = before or _read(agreement)
            size = grid.size if shard is None else len(shard.points(grid))
            passes = (size if missing is None else missing) / ranks.size
            if before is not None:
                recipe = replace(before, batch_size=job.data.batch_size or before.batch_size)
            if passes > 0:
                _require_same_steps(asked, before, out)
                evaluator.recipe = recipe = replace(recipe, steps=())
                if before is None or before.steps:
                    wanted = asked if before is None else before.steps
                    with trying(), counted_trial(out) as deaths:
                        if deaths >= MOST_TRIALS:
                            why = f"{deaths} starts died while it was verified"
                            recipe = replace(recipe, dropped=dict.fromkeys(wanted or STEPS, why))
                        else:
                            recipe = evaluator.choose(points, grid.size, wanted)
                    _tell(recipe, say)
    recipe, passes, is_new = ranks.broadcast((recipe, passes, before is None))
    if passes > 0 and recipe.steps:
        recipe = _on_every_rank(ranks, job, evaluator, recipe, points, say, trying)
    evaluator.recipe = recipe
    if job.data.batch_size == 0 and is_new:
        with ranks.together(), trying():
            size = evaluator.tune(passes)
        recipe = evaluator.recipe = replace(recipe, batch_size=ranks.broadcast(size))
    if is_new and agreement is not None:
        is_first = False
        with ranks.together():
            if ranks.rank == 0:
                is_first = _publish(agreement, recipe)
        if not ranks.broadcast(is_first):
            say("another shard has begun meanwhile; this one evaluates as that does")
            return agree_on_recipe(
                ranks, job, evaluator, out, fresh, say, trying, shard=shard, agreement=agreement
            )
    return recipe


def _read(agreement: Path | None) -> Recipe | None:
    """What another shard has agreed on, if one has."""
    if agreement is None or not agreement.exists():
        return None
    try:
        return Recipe.recorded(json.loads(agreement.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{agreement}, by which shards agree on how they evaluate, cannot be read: {error}; remove it"
        ) from error


def _publish(agreement: Path, recipe: Recipe) -> bool:
    """Whether this was the first shard to say how it evaluates."""
    try:
        with replacing(agreement, may_exist=False) as temporary:
            temporary.write_text(json.dumps(recipe.told(), indent=1) + "\n")
    except InputError:
        if agreement.exists():
            return False
        raise
    return True


def _require_same_steps(asked: Collection[str] | None, before: Recipe | None, out: Path | None) -> None:
    """Raise InputError where a file is to be continued otherwise than it was begun: it can tell of one way only."""
    if asked is None or before is None:
        return
    # What was tried and did not hold may be asked for again.
    if not set(before.steps) <= set(asked) <= {*before.steps, *before.dropped}:
        raise InputError(
            f"{out} was begun with {', '.join(before.steps) or 'no'} steps of the fast path, and "
            f"{', '.join(asked) or 'none'} asked for now; to continue it leave --plain and run.fast out, "
            "or start anew with --fresh"
        )


def _tell(recipe: Recipe, say: Callable[[str], None]) -> None:
    for reason in dict.fromkeys(recipe.dropped.values()):
        names = ", ".join(name for name, why in recipe.dropped.items() if why == reason)
        say(f"fast path without {names}: {reason}")
    if recipe.steps:
        say(f"fast path: {', '.join(recipe.steps)}, verified at the origin and the corners of the grid")


def _on_every_rank(
    ranks: Ranks,
    job: Job,
    evaluator: ModelEvaluator,
    recipe: Recipe,
    points: NDArray[np.float64],
    say: Callable[[str], None],
    trying: Callable[[], AbstractContextManager[None]],
) -> Recipe:
    """Have the other ranks use rank 0's steps; none does where one of them cannot, or gets other values."""
    if ranks.size == 1:
        return recipe
    trouble, expected = "", None
    with ranks.together(), trying():
        if ranks.rank == 0:
            expected = evaluator.readings(points)
    expected = ranks.broadcast(expected)
    with ranks.together(), trying():
        if ranks.rank > 0:
            try:
                evaluator.use(recipe)
                tolerance = ALIKE[PRECISIONS[job.run.precision].is_reduced]
                trouble = _difference(evaluator.readings(points), expected, tolerance)
            except Refused as refusal:
                trouble = str(refusal)
    answers = ranks.gather(f"{socket.gethostname()}: {trouble}" if trouble else "")
    for rank, answer in enumerate(answers):
        if answer:
            say(f"no fast path: rank {rank} on {answer}")
            recipe = Recipe(batch_size=recipe.batch_size, dropped=dict.fromkeys(recipe.steps, answer))
            with ranks.together():
                evaluator.use(recipe)
            break
    return recipe


def _difference(mine: list[dict[str, float]], rank_0: list[dict[str, float]], tolerance: float) -> str:
    for values, others in zip(mine, rank_0, strict=True):
        for name in values.keys() & others.keys():
            value, other = values[name], others[name]
            alike = math.isclose(value, other, rel_tol=tolerance, abs_tol=1e-12)
            if not alike and repr(value) != repr(other):
                return f"{name} is {value:.7g} and not {other:.7g} as on rank 0"
    return ""
