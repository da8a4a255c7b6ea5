"""A mean, and how sure it is: 95 % intervals over the questions, or over the situations that they are asked in."""

import math

import numpy as np
import pandas as pd
from scipy import stats

DRAWS = 10_000  # of the bootstrap
ANY, RATING = (-math.inf, math.inf), (1, 5)  # the ends of a scale
APART, FURTHER = (-4, 4), (-8, 8)  # of a rating less another, and of such a difference less another


def interval(values, seed: int = 0, draws: int = DRAWS, units=None) -> list[float] | None:
    """Bootstrap 95 % interval of the mean: [low, high]; None of one value, which tells nothing of it. units: a name for each
    value; those of one name are drawn together."""
    values, unit = np.asarray(values, dtype=np.float64), pd.Series(range(len(values)) if units is None else units).factorize()[0]
    if len(set(unit)) < 2:
        return None
    if np.ptp(values) == 0:
        return [float(values.mean())] * 2
    batch = max(1, 1_000_000 // len(values))  # of few draws at once, where there are many values
    sums_and_numbers, rng = (np.bincount(unit, values), np.bincount(unit)), np.random.default_rng(seed)
    ends = stats.bootstrap(sums_and_numbers, lambda sums, numbers, axis: sums.sum(axis) / numbers.sum(axis), paired=True,
                           n_resamples=draws, batch=batch, method="percentile", rng=rng).confidence_interval
    return [float(ends.low), float(ends.high)]


def estimate(values, seed: int, within: tuple = ANY, steps: tuple = (), units=None) -> dict:
    """Number, mean and its 95 % interval: the bootstrap's, as much wider as Student's is than the normal one, since draws from few
    values scatter too little (by a fifth for ten values, by a twentieth for forty); it ends where the scale `within` does.

    units: a name for each value. Values of one name have something in common, as answers in one situation do, and are one draw.

    steps: the ends of a scale of few steps, as ratings are, whose draws may be all alike without being all that there are. Then
    it is as wide as others at these ends would make it, of as large a share as may be and none of them be seen (Clopper and
    Pearson, 1934)."""
    number, mean, ends = len(values), float(np.mean(values)), interval(values, seed, units=units)
    draws = number if units is None else len(set(units))
    if steps and ends and ends[0] == ends[1]:
        unseen = 1 - 0.025 ** (1 / draws)
        return {"n": number, "mean": mean, "ci95": [mean + unseen * (end - mean) for end in steps]}
    wider = math.sqrt(draws / (draws - 1)) * stats.t.ppf(0.975, draws - 1) / stats.norm.ppf(0.975) if ends else None
    return {"n": number, "mean": mean, "ci95": ends and [float(np.clip(mean + wider * (end - mean), *within)) for end in ends]}


def share(values) -> dict:
    """estimate() of values that are 0 or 1, whose interval is Wilson's (1927): all of forty is no certainty."""
    ends = stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    return {"n": len(values), "mean": mean_of(values), "ci95": [*map(float, ends)]}


def mean_of(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan
