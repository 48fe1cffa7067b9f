"""The scale of a picture: linear or logarithmic, where it is clipped, its contour levels, how numbers read.

The rules, for the finite values of a column with percentiles p1 and p99:

- Logarithmic where every value is positive and p99 / p1 > 10. Percentiles, so that one deep point does not
  squeeze everything else into the last colours. Accuracies and percentages are never logarithmic unasked.
- Clipped at p99 where the largest value lies more than twice p99 - p1 above it, and at p1 where the smallest
  lies more than ten times that below it (all in drawn units): the colours are then spent on the other 98 %.
  The low side is more tolerant because a narrow, deep minimum is what such pictures are made to show.

"Drawn units" are the value itself, or its log10 on a logarithmic scale: contours are then traced, and pending
points interpolated, in the units the eye sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distsurf.errors import InputError

Floats = NDArray[np.float64]

SHADES = 5
"""Colours between two contour lines."""
CROWDED = 80
"""Contour lines across a picture, on average over its rows or columns, that are too many."""
LOG_RATIO = 10.0
FEW = 16
"""Of fewer values none is called an outlier."""
TOP_TOLERANCE = 2.0
BOTTOM_TOLERANCE = 10.0
# Contour values within one decade, from dense to sparse, each nearly even in log.
MANTISSAS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))


@dataclass(frozen=True)
class Scale:
    """How values become colours and heights. Levels and ticks are in drawn units, ascending."""

    log: bool
    levels: Floats
    """Boundaries of the colour bands; the first and last bound the scale."""
    ticks: Floats
    extend: Literal["neither", "min", "max", "both"]
    """On which sides there are values beyond the levels."""

    @property
    def low(self) -> float:
        """Lower end in drawn units."""
        return float(self.levels[0])

    @property
    def high(self) -> float:
        """Upper end in drawn units."""
        return float(self.levels[-1])

    def drawn(self, values: Floats) -> Floats:
        """Values in drawn units, NaN kept; those beyond the scale are brought to half its length outside."""
        margin = (self.high - self.low) / 2
        # Where nothing is clipped, what lies outside by a rounding error belongs inside.
        low = self.low - (margin if self.extend in ("min", "both") else 0.0)
        high = self.high + (margin if self.extend in ("max", "both") else 0.0)
        return np.clip(_drawn(values, self.log), low, high)

    @property
    def fine_levels(self) -> Floats:
        """The levels with evenly spaced ones between them, so many that their colours run into each other."""
        positions = np.arange(len(self.levels))
        return np.interp(np.linspace(0, positions[-1], SHADES * positions[-1] + 1), positions, self.levels)

    def crossed(self, drawn: Floats) -> Floats:
        """The levels to draw as lines in a plane ``(ny, nx)`` of drawn units: those with values on both sides.

        None where the lines would hide what is under them: they cross a row or a column too often.
        """
        finite = np.isfinite(drawn)
        inside = drawn[finite]
        band = np.searchsorted(self.levels, drawn)
        for axis in (0, 1):
            steps = np.abs(np.diff(band, axis=axis))[np.diff(finite.astype(np.int8), axis=axis) == 0]
            if steps.sum() > CROWDED * drawn.shape[1 - axis]:
                return np.empty(0)
        low, high = inside.min(initial=np.inf), inside.max(initial=-np.inf)
        return self.levels[(self.levels > low) & (self.levels < high)]

    def texts(self, drawn: Floats) -> list[str]:
        """The values behind positions in drawn units, each written as short as tells them apart."""
        return numbers(10.0**drawn if self.log else drawn)


def choose(
    values: Floats,
    *,
    bounded: bool = False,
    levels: int | Sequence[float] | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
    log: bool | None = None,
) -> Scale:
    """The scale that fits ``values`` (any shape, NaN ignored), by the rules on top of this file.

    ``levels`` is about how many contour levels, or the levels themselves; ``vmin`` and ``vmax`` replace the
    clipping rule; ``bounded`` says that the quantity is an accuracy or a percentage. Raises InputError for
    limits or levels that contradict each other, and for a logarithm where nothing is positive.
    """
    given = [] if levels is None or isinstance(levels, (int, np.integer)) else list(levels)
    limits = [limit for limit in (vmin, vmax, *given) if limit is not None]
    if not np.isfinite(limits).all():
        raise InputError("vmin, vmax and levels must be finite numbers")
    finite = values[np.isfinite(values)]
    if log is None:
        log = not bounded and _asks_for_log(finite) and all(limit > 0 for limit in limits)
    elif log and not all(limit > 0 for limit in limits):
        raise InputError("a logarithmic scale needs positive vmin, vmax and levels; leave out log=True")
    elif log and finite.size and not (finite > 0).any():
        raise InputError("a logarithmic scale needs positive values, and none is; leave out log=True")
    drawn = _drawn(finite, log)
    if given:
        bounds = _drawn(np.unique(np.asarray(given, dtype=np.float64)), log)
        if len(bounds) < 2:
            raise InputError("levels: at least two different contour levels are needed")
        ticks = bounds[:: -(-len(bounds) // 8)]
    else:
        count = 14 if levels is None else max(int(np.asarray(levels)), 1)
        bounds, ticks = _automatic(drawn[np.isfinite(drawn)], vmin, vmax, log, count)
    rounding = 1e-9 * (bounds[-1] - bounds[0])
    below = bool((drawn < bounds[0] - rounding).any())
    above = bool((drawn > bounds[-1] + rounding).any())
    extend: Literal["neither", "min", "max", "both"] = (
        "both" if below and above else "min" if below else "max" if above else "neither"
    )
    return Scale(log, bounds, ticks, extend)


def _automatic(
    drawn: Floats, vmin: float | None, vmax: float | None, log: bool, count: int
) -> tuple[Floats, Floats]:
    """About ``count`` levels and fewer ticks for finite values in drawn units, within the limits given."""
    lower, upper = (None if v is None else float(_drawn(np.array(v), log)) for v in (vmin, vmax))
    low, high = clipped_range(drawn) if drawn.size else ((upper or 1.0) - 1.0, (lower or 0.0) + 1.0)
    low = low if lower is None else lower
    high = high if upper is None else upper
    if low > high or (low == high and vmin is not None and vmax is not None):
        ends = f"vmin={_real(low, log):g} must be below vmax={_real(high, log):g}"
        raise InputError(f"{ends} (a limit not given is the data's)")
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # constant, up to rounding
        room = 0.5 if log or not low else max(abs(low) / 2, np.finfo(np.float64).tiny)
        return np.array([low - room, high + room]), np.array([low])
    levels = _nice(low, high, log, count)
    if lower is not None:
        levels = np.r_[low, levels[levels > low]]
    if upper is not None:
        levels = np.r_[levels[levels < high], high]
    ticks = _nice(levels[0], levels[-1], log, 7)
    rounding = 1e-9 * (levels[-1] - levels[0])
    inside = (ticks >= levels[0] - rounding) & (ticks <= levels[-1] + rounding)
    return levels, ticks[inside]


def clipped_range(values: Floats) -> tuple[float, float]:
    """Lowest and highest of finite ``values`` (at least one), huge outliers left out."""
    p1, p99 = _percentiles(values)
    low, high = float(values.min()), float(values.max())
    width = p99 - p1
    if width > 0:
        high = p99 if high - p99 > TOP_TOLERANCE * width else high
        low = p1 if p1 - low > BOTTOM_TOLERANCE * width else low
    return low, high


def numbers(values: Floats) -> list[str]:
    """Each of ascending ``values`` as text, with as few digits as tell neighbours apart."""
    if len(values) < 2:
        return [number(float(value)) for value in values]
    steps = np.diff(values)
    step = np.minimum(np.r_[steps[0], steps], np.r_[steps, steps[-1]])
    exact = np.where(np.abs(values) < 1e-9 * step, 0.0, values)  # a tick of 1e-17 is a zero
    allowed = 0.01 * np.minimum(step, np.abs(exact))
    return [_shortest(float(value), float(error)) for value, error in zip(exact, allowed, strict=True)]


def number(value: float, digits: int = 4) -> str:
    r"""A value with at most so many significant digits: 0.0125, 3100, and $1.5\times10^{-5}$ in mathtext."""
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    power = int(exponent)
    plain = value == 0 or -3 <= power < 5
    if plain:
        mantissa = f"{float(f'{mantissa}e{power}'):.{max(digits - 1 - power, 0)}f}"
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    if plain:
        return mantissa.replace("-", "−")
    factor = {"1": "", "-1": "-"}.get(mantissa, f"{mantissa}\\times")
    return f"${factor}10^{{{power}}}$"


def _shortest(value: float, error: float) -> str:
    for digits in range(1, 17):
        if abs(float(f"{value:.{digits - 1}e}") - value) <= error:
            return number(value, digits)
    return number(value, 17)


def _asks_for_log(values: Floats) -> bool:
    if not values.size or not (values > 0).all():
        return False
    p1, p99 = _percentiles(values)
    return p99 > LOG_RATIO * p1


def _percentiles(values: Floats) -> tuple[float, float]:
    """The 1st and 99th, but of few values the ends; never between two values, halfway to an outlier."""
    if len(values) < FEW:
        return float(values.min()), float(values.max())
    return (
        float(np.percentile(values, 1, method="higher")),
        float(np.percentile(values, 99, method="lower")),
    )


def _drawn(values: Floats, log: bool) -> Floats:
    """Log10 of the values where ``log``, zero and below as −inf; NaN kept."""
    if not log:
        return values
    positive = values > 0
    return np.where(
        positive, np.log10(np.where(positive, values, 1.0)), np.where(np.isnan(values), np.nan, -np.inf)
    )


def _real(drawn: float, log: bool) -> float:
    return 10.0**drawn if log else drawn


def _nice(low: float, high: float, log: bool, most: int) -> Floats:
    """At most about ``most`` round values covering ``low`` to ``high``, in drawn units."""
    if not log:
        ticks = np.asarray(MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
        return _covering(ticks, low, high)
    if high - low < 0.4:  # too narrow for the mantissas: round values at even distances
        ticks = _nice(10.0**low, 10.0**high, False, most)
        return _covering(np.log10(ticks[ticks > 0]), low, high)
    first, last = int(np.floor(low)), int(np.ceil(high))
    for mantissas in MANTISSAS:
        decades = np.arange(first, last + 1, dtype=np.float64)
        ticks = _covering(np.add.outer(decades, np.log10(mantissas)).ravel(), low, high)
        if len(ticks) <= most + 1:
            return ticks
    step = next(s for s in (2, 3, 5, 10, 20, 50, 100) if (last - first) / s <= most or s == 100)
    ticks = step * np.arange(first // step, -(-last // step) + 1, dtype=np.float64)
    return _covering(ticks[np.abs(ticks) < 308], low, high)  # where 10 to that power is still a number


def _covering(ticks: Floats, low: float, high: float) -> Floats:
    """Ascending ``ticks`` from the last not above ``low`` to the first not below ``high``, or those ends."""
    room = 1e-9 * (high - low)
    below, above = ticks[ticks <= low + room], ticks[ticks >= high - room]
    start = below[-1] if below.size else low
    stop = above[0] if above.size else high
    return np.concatenate([[start], ticks[(ticks > start) & (ticks < stop)], [stop]])
