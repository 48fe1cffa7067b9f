"""Loss and metrics of a model at grid points: one pass over data in memory per point."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distsurf.errors import InputError
from distsurf.evaluator import Column, Stopped
from distsurf.objective.data import Split, describe, map_tree, tensors_of
from distsurf.objective.losses import Objective, Supervised
from distsurf.subspace.moving import MovingModel
from distsurf.subspace.weights import Subspace

_WRITES = "the model or objective changes its input data in place"
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class ModelEvaluator:
    """Evaluates an objective on every split at θ(c); use in a ``with`` block, which borrows the model.

    ``columns`` are ``{split}_{name}``, or ``{name}`` for a split without a name. Sums are kept on the device in
    float64 and fetched once per point. The random state is set to ``seed`` before every point, so that a model that
    draws random numbers gives the same value whoever evaluates the point, in whatever order.
    """

    def __init__(
        self,
        model: nn.Module,
        subspace: Subspace,
        buffers: Mapping[str, Any],
        splits: Sequence[Split],
        objective: Objective,
        *,
        batch_size: int,
        device: torch.device,
        precision: str = "fp32",
        seed: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ):
        dtype = DTYPES[precision]
        self._moving = MovingModel(model, subspace, buffers, device=device, dtype=dtype)
        self._dimension = subspace.dimension
        self._objective = objective
        self._seed = seed
        self._device = device
        self._stop = stop

        def place(tensor: torch.Tensor) -> torch.Tensor:
            placed = tensor.to(device, dtype if tensor.is_floating_point() else None)
            # Inference tensors do not count what is written to them, which `_require_intact` relies on.
            return placed.clone() if placed.is_inference() else placed

        placed = [split.map(place) for split in splits]
        self._tensors = [t for split in placed for piece in split.pieces for t in tensors_of(piece)]
        self._versions = [tensor._version for tensor in self._tensors]
        self._splits = [(split.name, split.batches(batch_size)) for split in placed]
        self._names: list[tuple[str, ...]] = []
        self.columns: tuple[Column, ...] = ()
        self.is_repeatable = True
        """Whether the first batches gave the same values twice; if not, values depend on what was done before."""

    def __enter__(self) -> ModelEvaluator:
        self._moving.__enter__()
        try:
            self._probe()
        except BaseException:
            self._moving.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._moving.__exit__(kind, error, trace)

    def _probe(self) -> None:
        """Learn the columns from each split's first batch, and say readably what does not fit."""
        units = getattr(self._objective, "units", {})
        columns = []
        self._moving.move_to([0.0] * self._dimension)
        for split, batches in self._splits:
            try:
                with self._ready():
                    # A copy: should the model write to its inputs, the user's data is still whole when we refuse.
                    first = map_tree(torch.Tensor.clone, batches[0])
                    versions = [tensor._version for tensor in tensors_of(first)]
                    torch.manual_seed(self._seed)
                    totals = self._objective(self._moving.model, first)
                    self._moving.move_to([0.0] * self._dimension)
                    torch.manual_seed(self._seed)
                    again = self._objective(self._moving.model, first)
                    if versions != [tensor._version for tensor in tensors_of(first)]:
                        raise InputError(f"{_WRITES}; have its forward work on a copy (x = x.clone())")
                    if isinstance(self._objective, Supervised):
                        for batch in batches if self._objective.has_users_loss else []:
                            self._objective.check(self._moving.model, batch)
                names = _names(totals)
                for name in names:
                    for part, what in zip(totals[name], ("sum", "count"), strict=True):
                        _require_number(name, what, part)
                    values = [float(each[name][0]) for each in (totals, again)]
                    self.is_repeatable &= values[0] == values[1] or all(map(math.isnan, values))
            except InputError as error:
                raise InputError(f"{_batch_in_words(split, batches[0])}: {error}") from error
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise InputError(
                    f"{_batch_in_words(split, batches[0])} does not pass through the model "
                    f"{type(self._moving.model).__name__} and the objective: {type(error).__name__}: {reason} "
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

    def __call__(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values ``(P, C)`` at coordinates ``(P, D)``. Raises `Stopped` between batches if told to stop."""
        with self._ready():
            return np.array([self._evaluate(point) for point in coordinates]).reshape(-1, len(self.columns))

    @contextmanager
    def _ready(self) -> Iterator[None]:
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.no_grad(), _strict_float32(), torch.random.fork_rng(devices=devices):
            yield

    def _evaluate(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        self._moving.move_to([float(c) for c in coordinates])
        torch.manual_seed(self._seed)
        sums: list[Any] = []
        counts: list[Any] = []
        for (_, batches), names in zip(self._splits, self._names, strict=True):
            totals = []
            for batch in batches:
                if self._stop():
                    raise Stopped
                totals.append(self._objective(self._moving.model, batch))
            for name in names:
                sums.append(_total([total[name][0] for total in totals], self._device))
                counts.append(_total([total[name][1] for total in totals], self._device))
        if self._versions != [tensor._version for tensor in self._tensors]:
            raise RuntimeError(f"{_WRITES}: all later values would be wrong")
        fetched = torch.stack(sums + counts).cpu().numpy()  # the only synchronization with the device
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(fetched[: len(sums)] / fetched[len(sums) :])


def _total(parts: list[Any], device: torch.device) -> torch.Tensor:
    """Float64 sum, on the device, of numbers or 0-d tensors, in their order."""
    if isinstance(parts[0], torch.Tensor):
        return torch.stack([part.detach().to(device, torch.float64).reshape(()) for part in parts]).sum()
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


@contextmanager
def _strict_float32() -> Iterator[None]:
    """No TF32 and no choice of algorithm by timing, which would let digits differ between ranks."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = False, False, True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before[1:]
