"""The seam that everything shares: an evaluator turns coordinates into values.

The scheduler, the surface file and the pictures take any evaluator: loss and accuracy of a network, curvature, a
closed-form quadratic in a test, a sleeping one in a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Column:
    """One recorded quantity: its name in the file, its unit ("" where it has none)."""

    name: str
    unit: str = ""


class Evaluator(Protocol):
    """Coordinates in, values out. The value of a point may depend on its coordinates alone.

    An evaluator that is faster with several points at a time says so with an attribute ``points_per_pass``.
    """

    @property
    def columns(self) -> tuple[Column, ...]:
        """What the columns of the values are."""

    def __call__(self, coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values ``(P, C)`` at coordinates ``(P, D)``, both float64; NaN and ±inf are values like any other.

        May raise `Stopped` when it was told to stop; any other exception means that these points failed.
        """


class Stopped(Exception):
    """Raised by an evaluator that abandons a point because the job is being stopped."""
