"""Intervals: over seeds by Student's t, over problems by the bootstrap, of shares by Wilson's score; p-values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import special  # scipy.stats takes most of a second to import.

from ckl_jax.errors import is_integer, require

SAMPLES = 2_000  # Of every bootstrap.
ROUNDING = 1e-6  # Of shares that were computed in float32, and of their differences.
Side = Literal["above", "below", "undecided"]


class Interval(NamedTuple):
    """An estimate and the bounds of its interval, NaN where there are none. JSON has it as a list of three."""

    mean: float
    low: float
    high: float

    def side(self, than: float | Sequence[float] = 0.0) -> Side:
        """``lies``, but undecided if it has no width: values that are all the same say nothing of how they vary.

        Another interval without width is taken as a number.
        """
        if self.low == self.high:
            return "undecided"
        return self.lies(than)

    def lies(self, than: float | Sequence[float] = 0.0) -> Side:
        """Whether all of it lies above or below a number or another interval."""
        _, low, high = than if isinstance(than, Sequence) else (than, than, than)
        return "above" if self.low > high else "below" if self.high < low else "undecided"

    def within(self, least: float, most: float) -> Interval:
        """Without what cannot be: Student's interval of few shares reaches beyond 0 and 1, a rounded mean just so."""
        return Interval(*(float(np.clip(value, least, most)) for value in self))

    def text(self, spec: str, scale: float = 1.0) -> str:
        """With the format ``z.1f`` and a scale of 100 "52.8 [42.8, 62.7]"; no bounds of NaN, "none" for such a mean."""
        mean, low, high = (format(scale * value, spec) for value in self)
        bounds = "" if np.isnan(self.low) else f" [{low}, {high}]"
        return "none" if np.isnan(self.mean) else mean + bounds


def percent(interval: Iterable[float], sign: str = "") -> str:
    """A mean and its interval in percent, "52.8 [42.8, 62.7]", with ``sign`` "+" always signed."""
    return Interval(*interval).text(f"{sign}z.1f", 100)


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation; the deviation is exactly 0 of values that are the same but for rounding."""
    if np.ptp(values) <= ROUNDING * max(1.0, float(np.abs(values).max())):
        return float(values[0]), 0.0
    return float(values.mean()), float(values.std(ddof=1))


def mean_interval(values: np.ndarray, confidence: float = 0.95) -> Interval:
    """Mean of ``values`` [n] over seeds and Student's t interval.

    One value has an interval of NaN, none has NaN everywhere.
    """
    values = np.asarray(values, np.float64)
    if len(values) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    mean, deviation = _moments(values)
    if len(values) == 1:
        return Interval(mean, float("nan"), float("nan"))
    half = float(special.stdtrit(len(values) - 1, 0.5 + confidence / 2) * deviation / np.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def mean_intervals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``mean_interval`` of every column of shares ``values`` [seeds, n], within 0 and 1: three arrays [n].

    Seeds of NaN are left out.
    """
    intervals = [mean_interval(column[~np.isnan(column)]).within(0, 1) for column in values.T]
    mean, low, high = (np.array(part) for part in zip(*intervals, strict=True))
    return mean, low, high


def paired_p(differences: np.ndarray) -> float:
    """Two-sided p-value of Student's t test that the mean of ``differences`` [n] over seeds is 0.

    NaN for less than two, and for differences that are all the same but for rounding; 1 if these are 0.
    """
    differences = np.asarray(differences, np.float64)
    count = len(differences)
    if count < 2:
        return float("nan")
    mean, deviation = _moments(differences)
    if deviation == 0:
        return 1.0 if abs(mean) <= ROUNDING else float("nan")
    return float(2 * special.stdtr(count - 1, -abs(mean / deviation) * np.sqrt(count)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of one family of tests, corrected for their number by Holm's step-down method (Holm 1979).

    The smallest is multiplied by their number n, the next by n - 1 and so on; none falls below a smaller one's, none
    exceeds 1. The chance that any true null hypothesis has one below 0.05 is at most 5%. NaN stays, and counts.
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.arange(len(p_values), 0, -1) * np.asarray(p_values, np.float64)[order]
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.tolist()


def bootstrap_interval(values: np.ndarray, *, samples: int = SAMPLES) -> tuple[float, float]:
    """95% percentile interval of the mean of ``values`` [n] under resampling with replacement (paper, Table 4).

    Raises:
      ConfigError: no value.
    """
    require(len(values) > 0, "values", len(values), "1 or more")
    require(bool(np.isfinite(values).all()), "values", "NaN or infinity among them", "finite numbers")
    require(is_integer(samples) and samples >= 1, "samples", samples, "1 or more")
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (samples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_ratio(parts: np.ndarray, wholes: np.ndarray) -> Interval:
    """Sum of ``parts`` [n] over the sum of ``wholes`` [n], with the 95% percentile interval under resampling of pairs.

    Samples in which all wholes are 0 have no such ratio and are left out.

    Raises:
      ConfigError: no value, not as many of both, one that is not finite, a negative whole, or none above 0.
    """
    require(0 < len(parts) == len(wholes), "parts", len(parts), f"1 or more, as many as wholes ({len(wholes)})")
    sound = bool(np.isfinite(parts).all() and np.isfinite(wholes).all() and (np.asarray(wholes) >= 0).all())
    sound = sound and bool(np.sum(wholes) > 0)
    require(sound, "parts and wholes", "others", "finite numbers, and wholes of 0 or more, not all 0")
    drawn = np.random.default_rng(0).integers(0, len(parts), (SAMPLES, len(parts)))
    sums = wholes[drawn].sum(axis=1)
    low, high = np.percentile(parts[drawn].sum(axis=1)[sums > 0] / sums[sums > 0], [2.5, 97.5])
    return Interval(float(parts.sum() / wholes.sum()), float(low), float(high))


def share_interval(successes: int, count: int) -> Interval:
    """Share of ``successes`` in ``count`` trials and Wilson's 95% score interval.

    No trial says nothing: a share of NaN between 0 and 1.

    Raises:
      ConfigError: ``successes`` outside 0..count.
    """
    for name, value in (("successes", successes), ("count", count)):
        require(is_integer(value), name, value, "an integer")
    require(0 <= successes <= count, "successes", successes, f"0..{count}")
    if count == 0:
        return Interval(float("nan"), 0.0, 1.0)
    share, z2 = successes / count, float(special.ndtri(0.975)) ** 2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5 / (1 + z2 / count)
    return Interval(share, centre - half if successes > 0 else 0.0, centre + half if successes < count else 1.0)
