"""How points are evaluated: which steps of the fast path, in batches of which size. Recorded in the surface file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

DEFAULT_BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """The same on every rank and after every resume, since values depend on it in their last digits."""

    batch_size: int = DEFAULT_BATCH
    steps: tuple[str, ...] = ()
    """What of `distsurf.objective.fast.steps.STEPS` is used, in its order."""
    dropped: dict[str, str] = field(default_factory=dict)
    """What was tried and is not used, with the reason."""
    errors: list[dict[str, Any]] = field(default_factory=list)
    """At each sampled point (``at``, coordinates) by column the value in float64 and the one of the job's precision."""

    def told(self) -> dict[str, Any]:
        """For the surface file, as JSON."""
        return asdict(self)

    @classmethod
    def recorded(cls, told: Mapping[str, Any]) -> Recipe:
        """What `told` gave."""
        known = {own.name: told[own.name] for own in fields(cls)}
        return cls(**{**known, "steps": tuple(told["steps"])})
