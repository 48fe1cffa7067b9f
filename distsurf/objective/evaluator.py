"""Loss and metrics of a model at grid points: one pass over data in memory per point."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distsurf.errors import InputError
from distsurf.evaluator import Column, Stopped
from distsurf.objective.data import Split, describe, map_tree, tensors_of
from distsurf.objective.fast.choose import choose
from distsurf.objective.fast.steps import STEPS, Circumstances
from distsurf.objective.fast.trace import NotApplicable, Refused
from distsurf.objective.fast.verify import FLIPS, Batches, Reading, read_each
from distsurf.objective.feed import Feed
from distsurf.objective.losses import Objective, Supervised
from distsurf.objective.network import Network, Recomputation, Running
from distsurf.objective.precision import PRECISIONS, Precision, require_available
from distsurf.objective.recipe import DEFAULT_BATCH, Recipe
from distsurf.objective.tune import fastest_batch_size
from distsurf.subspace.weights import Subspace

_BORROWED = "_distsurf_is_borrowed"
_WRITES = "the model or objective changes its input data in place"
SAMPLE = 8, 64
"""Least and most samples of each split on which steps of the fast path are verified."""


class ModelEvaluator:
    """Evaluates an objective on every split at θ(c); use in a ``with`` block, which borrows the model.

    ``columns`` are ``{split}_{name}``, or ``{name}`` for a split without a name. Sums are kept on the device in
    float64 and fetched once per point. The random state is set to ``seed`` before every point, so that a model that
    draws random numbers gives the same value whoever evaluates the point, in whatever order.

    It begins with the plain module. `choose` finds the steps of the fast path that hold here and `tune` a batch size;
    `use` takes a `Recipe` that was found before, on another rank or in an earlier run.
    """

    def __init__(
        self,
        model: nn.Module,
        subspace: Subspace,
        buffers: Mapping[str, Any],
        splits: Sequence[Split],
        objective: Objective,
        *,
        device: torch.device,
        batch_size: int = DEFAULT_BATCH,
        precision: str = "fp32",
        seed: int = 0,
        statistics: Split | None = None,
        stop: Callable[[], bool] = lambda: False,
    ):
        """``statistics``: the data from which batch-norm statistics are computed anew at every point, in batches of
        `DEFAULT_BATCH` whatever the batch size is otherwise, since they depend on it.
        """
        self._require_fitting(model, subspace, buffers)
        require_available(precision, device)
        self._model = model
        self.objective = objective
        self._precision = PRECISIONS[precision]
        self.seed = seed
        self._device = device
        self.stop = stop
        self._plain = Network(model, subspace, buffers)
        self._network = self._plain
        self._running: Running | None = None
        self._feeds = [Feed(split, device, self._precision.sums) for split in splits]
        self._known_feeds = list(zip(splits, self._feeds, strict=True))
        self._names: list[tuple[str, ...]] = []
        self._statistics: Feed | None = None
        if statistics is not None:
            self._statistics = self._feed(statistics)
        self.columns: tuple[Column, ...] = ()
        self.recipe = Recipe(batch_size=batch_size)
        """How points are evaluated now."""
        self.is_repeatable = True
        """Whether the first batches gave the same values twice; if not, values depend on what was done before."""
        self.seconds_of_moving = 0.0
        """How long it took to set the weights of the last pass."""
        self.draws_random_numbers = False
        """Whether the model or objective draws random numbers, so that values depend on the batch size."""

    @staticmethod
    def _require_fitting(model: nn.Module, subspace: Subspace, buffers: Mapping[str, Any]) -> None:
        own = {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        given = dict(zip(subspace.layout.names, subspace.layout.shapes, strict=True))
        given.update((name, tuple(buffer.shape)) for name, buffer in buffers.items())
        if own != given:
            raise InputError(
                f"the model {type(model).__name__} has other parameters or buffers than the one that the directions "
                "were made for (on rank 0): every rank must build the same model"
            )

    @property
    def points_per_pass(self) -> int:
        """How many points one pass over the data evaluates: calls with so many waste nothing."""
        return self._network.points_per_pass

    def __enter__(self) -> ModelEvaluator:
        if _BORROWED in vars(self._model):
            raise InputError(
                "this model is already being evaluated (in another thread?); give each call its own copy"
            )
        vars(self._model)[_BORROWED] = True  # some script modules refuse to have attributes deleted
        try:
            self._put_to_work(self._plain)
            self._probe()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_from_work()
        vars(self._model).pop(_BORROWED, None)

    # -- how points are evaluated -------------------------------------------------------------------------

    def choose(
        self, points: NDArray[np.float64], passes: int, wanted: Collection[str] | None = None
    ) -> Recipe:
        """Find the steps of the fast path that hold at these ``points`` ``(P, D)``, and use them.

        ``passes``: how many points are to be evaluated in all; the sample on which steps are verified is small enough
        for the whole to take about a hundredth of that; where even the smallest sample would take longer than the job
        itself, no step is tried. ``wanted``: try these steps only, however fast they are; with none, only the error
        of a reduced precision is measured.
        """
        per_sample = 8 * len(points)  # passes of the verification over each of its samples, roughly
        work = passes * sum(feed.samples for feed in self._feeds)
        size = int(max(SAMPLE[0], min(SAMPLE[1], work / 100 / per_sample)))
        dropped = {}
        if wanted is None and work < per_sample * SAMPLE[0] * len(self._feeds):
            dropped = dict.fromkeys(STEPS, "the job is too small for a verification to pay")
            wanted = ()
        if wanted is not None and not wanted and not self._precision.is_reduced:
            self.recipe = replace(self.recipe, steps=(), dropped=dropped)
            return self.recipe
        choice = choose(
            self._plain,
            lambda network, precision: self._on_sample(network, precision, size),
            self._circumstances,
            points,
            {c.name: 100 * FLIPS / size for c in self.columns if c.unit == "%"},
            self.seed,
            wanted,
        )
        self._put_to_work(choice.network)
        self.recipe = replace(
            self.recipe, steps=choice.steps, dropped=dropped or choice.dropped, errors=choice.errors()
        )
        return self.recipe

    def use(self, recipe: Recipe) -> None:
        """Evaluate as another rank or an earlier run did. Raises `Refused` where a step cannot be taken here."""
        network = self._plain
        for name in recipe.steps:
            try:
                network = STEPS[name](network, self._circumstances)
            except (NotApplicable, KeyError) as error:
                raise Refused(f"{name} cannot be done here") from error
        self._put_to_work(network)
        self.recipe = recipe

    def tune(self, passes: float) -> int:
        """The fastest batch size here, where it changes values by rounding only. Measures for a hundredth of the time
        that ``passes`` points take, ten seconds at most; where that is too little, the size stays as it is.
        """
        feed = max(self._feeds, key=lambda feed: feed.samples)
        if not feed.is_whole or self.draws_random_numbers:
            return self.recipe.batch_size
        running, _ = self._on_sample(self._network, self._precision, SAMPLE[0])
        start = min(self.recipe.batch_size, feed.samples)
        best = start
        with suppress(Exception), running, running.ready():  # a pass that fails fails again when it counts
            running.move_to(np.zeros((1, self._plain.subspace.dimension)))
            best = fastest_batch_size(
                running, feed, start, passes * sum(feed.samples for feed in self._feeds)
            )
        return best if best != start else self.recipe.batch_size

    def readings(self, points: NDArray[np.float64]) -> list[dict[str, float]]:
        """Values of the columns at ``points`` on a few samples, for a comparison between ranks.

        Without those in percent: of a few samples one decision more or less is a lot. Nothing at a point that fails:
        the evaluation will tell of it.
        """
        running, batches = self._on_sample(self._network, self._precision, SAMPLE[0])
        graded = [column.name for column in self.columns if column.unit != "%"]
        with running:
            found = read_each(running, points, batches, self.seed)
        return [
            {name: reading.values[name] for name in graded} if isinstance(reading, Reading) else {}
            for reading in found
        ]

    @property
    def _circumstances(self) -> Circumstances:
        return Circumstances(
            self._device,
            self._precision,
            recomputed=self._statistics is not None,
            pixels=max(feed.pixels for feed in self._feeds),
        )

    def cost_per_sample(
        self,
        flop: Callable[[Callable[[], object]], float],
        traffic: Callable[[Callable[[], object]], float],
    ) -> dict[str, float]:
        """What a pass over all splits costs per sample, by these counters: ``flop`` of the plain network, and bytes of
        ``traffic`` of the one in use.
        """
        samples = sum(feed.samples for feed in self._feeds)
        found = {"flop": 0.0, "traffic": 0.0}
        for feed in self._feeds:
            batch = next(iter(feed.batches(self.recipe.batch_size)))
            share = feed.samples / samples / len(tensors_of(batch)[0])
            for name, network, counter in (("flop", self._plain, flop), ("traffic", self._network, traffic)):
                running, _ = self._on_sample(network, self._precision, SAMPLE[0])
                with running, running.ready(), torch.inference_mode(False), torch.no_grad():
                    running.move_to(np.zeros((1, self._plain.subspace.dimension)))
                    found[name] += share * counter(partial(running.totals, batch))
        return found

    def _on_sample(self, network: Network, precision: Precision, size: int) -> tuple[Running, Batches]:
        # Two batches each, since one does not show what a pass leaves behind for the next.
        batches = [
            (feed.name, batch)
            for feed in self._feeds
            for batch in feed.sampled_batches(-(-size // 2), precision.sums)
        ]
        recomputation = None
        if self._statistics is not None:
            few = self._statistics.sampled_batches(size, precision.sums)
            recomputation = Recomputation(lambda: few)
        running = Running(
            network,
            self.objective,
            device=self._device,
            precision=precision,
            recomputation=recomputation,
        )
        return running, _Asking(batches, self.stop)

    def _put_to_work(self, network: Network) -> None:
        self._take_from_work()
        running = self._at_work(network, self._precision)
        self._network, self._running = network, running.__enter__()

    def _at_work(self, network: Network, precision: Precision) -> Running:
        recomputation, statistics = None, self._statistics
        if statistics is not None:
            recomputation = Recomputation(lambda: statistics.batches(DEFAULT_BATCH))
        return Running(
            network,
            self.objective,
            device=self._device,
            precision=precision,
            recomputation=recomputation,
            stop=self.stop,
        )

    def beside(self, split: Split, precision: str | None = None) -> tuple[Running, Feed]:
        """The plain network, to be used in a ``with`` block beside its work here, and a split.

        In full precision: that of the job's sums, where none is given.
        """
        is_double = self._precision.sums is torch.float64
        running = self._at_work(self._plain, PRECISIONS[precision or ("fp64" if is_double else "fp32")])
        return running, self._feed(split)

    def _feed(self, split: Split) -> Feed:
        """The data of a split; what is on the device already is there once."""
        for known, feed in self._known_feeds:
            if known is split:
                return feed
        feed = Feed(split, self._device, self._precision.sums)
        self._known_feeds.append((split, feed))
        return feed

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's parameters, by name."""
        return {name: tuple(parameter.shape) for name, parameter in self._model.named_parameters()}

    def _take_from_work(self) -> None:
        if self._running is not None:
            self._running.__exit__(None, None, None)
            self._running = None

    @contextmanager
    def _ready(self) -> Iterator[Running]:
        assert self._running is not None, "use the evaluator in a with block"
        with self._running.ready():
            yield self._running

    # -- values -------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Learn the columns from each split's first batch, and say readably what does not fit."""
        units = getattr(self.objective, "units", {})
        columns = []
        origin = np.zeros((1, self._plain.subspace.dimension))
        running, _ = self._on_sample(self._plain, self._precision, SAMPLE[0])
        untraceable = ""
        for feed in self._feeds:
            split, batch = feed.name, next(iter(feed.batches(self.recipe.batch_size)))
            try:
                with running, running.ready():
                    running.move_to(origin)
                    # A copy: should the model write to its inputs, the user's data is still whole when we refuse.
                    first = map_tree(torch.Tensor.clone, batch)
                    versions = [tensor._version for tensor in tensors_of(first)]
                    buffers, random_state = running.buffers(), self._seeded()
                    totals = running.totals(first)
                    self.draws_random_numbers |= not torch.equal(random_state, self._random_state())
                    changed = running.changed(buffers)
                    if changed:
                        untraceable = f"a forward pass changes {', '.join(changed[:3])}"
                    running.move_to(origin)
                    self._seeded()
                    again = running.totals(first)
                    if versions != [tensor._version for tensor in tensors_of(first)]:
                        raise InputError(f"{_WRITES}; have its forward work on a copy (x = x.clone())")
                    if isinstance(self.objective, Supervised) and self.objective.has_users_loss:
                        for each in feed.batches(self.recipe.batch_size):
                            self.objective.check(running.model, each)
                names = _names(totals)
                for name in names:
                    for part, what in zip(totals[name], ("sum", "count"), strict=True):
                        _require_number(name, what, part)
                    values = [float(each[name][0]) for each in (totals, again)]
                    self.is_repeatable &= values[0] == values[1] or all(map(math.isnan, values))
            except InputError as error:
                raise InputError(f"{_batch_in_words(split, batch)}: {error}") from error
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise InputError(
                    f"{_batch_in_words(split, batch)} does not pass through the model "
                    f"{type(self._model).__name__} and the objective: {type(error).__name__}: {reason} "
                    f"({place.name}, line {place.lineno} of {place.filename})"
                ) from error
            self._names.append(names)
            columns += [Column(f"{split}_{n}" if split else n, units.get(n, "")) for n in names]
        taken = [column.name for column in columns]
        for name in taken:
            if taken.count(name) > 1:
                raise InputError(
                    f"two columns are called {name!r}: rename a split or a value of the objective"
                )
        self.columns = tuple(columns)
        if not self.is_repeatable:
            untraceable = "the model or objective gives different values for the same weights and data"
        self._plain = replace(self._plain, untraceable=untraceable)

    def _seeded(self) -> torch.Tensor:
        """Set the random state; returns what it then is."""
        torch.manual_seed(self.seed)
        return self._random_state()

    def _random_state(self) -> torch.Tensor:
        return (
            torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else torch.get_rng_state()
        )

    def __call__(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values ``(P, C)`` at coordinates ``(P, D)``. Raises `Stopped` between batches if told to stop."""
        size = self.points_per_pass
        groups = [coordinates[start : start + size] for start in range(0, len(coordinates), size)]
        with self._ready() as running:
            values = [self._evaluate(running, group) for group in groups]
        return np.concatenate(values) if values else np.empty((0, len(self.columns)))

    def _evaluate(self, running: Running, group: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values ``(P, C)`` of points that one pass evaluates."""
        start = time.perf_counter()
        running.move_to(group)
        self.seconds_of_moving = time.perf_counter() - start
        torch.manual_seed(self.seed)
        sums: list[Any] = []
        counts: list[Any] = []
        for feed, names in zip(self._feeds, self._names, strict=True):
            totals = []
            for batch in feed.batches(self.recipe.batch_size):
                if self.stop():
                    raise Stopped
                totals.append(running.totals(batch))
            for name in names:
                sums.append(_total([total[name][0] for total in totals], self._device))
                counts.append(_total([total[name][1] for total in totals], self._device))
        if any(not feed.is_intact for feed in self._feeds):
            raise RuntimeError(f"{_WRITES}: all later values would be wrong")
        fetched = torch.stack(sums + counts).cpu().numpy()  # the only synchronization with the device
        with np.errstate(divide="ignore", invalid="ignore"):
            values = fetched[: len(sums)] / fetched[len(sums) :]
        return np.asarray(values.reshape(len(sums), -1).T[: len(group)])


class _Asking(list[tuple[str, Any]]):
    """Batches of a sample that ask, like those of an evaluation, before each of them: it shows that all is alive."""

    def __init__(self, batches: list[tuple[str, Any]], ask: Callable[[], bool]):
        super().__init__(batches)
        self._ask = ask

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for batch in super().__iter__():
            self._ask()
            yield batch


def _total(parts: list[Any], device: torch.device) -> torch.Tensor:
    """Float64 sum, on the device, of numbers or tensors of one element (or one a point), in their order."""
    if isinstance(parts[0], torch.Tensor):
        return torch.stack([part.detach().to(device, torch.float64).squeeze() for part in parts]).sum(0)
    return torch.tensor(float(sum(parts)), dtype=torch.float64, device=device)


def _require_number(name: str, what: str, part: Any) -> None:
    is_number = isinstance(part, (int, float, np.number)) or (
        isinstance(part, torch.Tensor) and part.numel() == 1 and not part.is_complex()
    )
    if not is_number:
        given = describe(part) if isinstance(part, torch.Tensor) else repr(part)
        raise InputError(f"the {what} of the objective's {name!r} is {given}; expected one number")


def _names(totals: Any) -> tuple[str, ...]:
    if not isinstance(totals, Mapping) or not totals:
        raise InputError(
            f"the objective returned {type(totals).__name__}; expected a dict {{name: (sum, count)}}"
        )
    for name, total in totals.items():
        if not isinstance(name, str):
            raise InputError(f"the objective returned the name {name!r}; expected a string")
        if not isinstance(total, (tuple, list)) or len(total) != 2:
            raise InputError(f"the objective's {name!r} is {total!r}; expected a pair (sum, count)")
    return tuple(totals)


def _batch_in_words(split: str, batch: Any) -> str:
    return f"a batch of {split or 'the'} data, {describe(batch)}"
