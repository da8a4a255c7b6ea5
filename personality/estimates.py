"""A mean, and how sure it is: 95 % intervals over the questions."""

import math

import numpy as np
from scipy import stats

DRAWS = 10_000  # of the bootstrap
ANY, RATING = (-math.inf, math.inf), (1, 5)  # the ends of a scale
APART, FURTHER = (-4, 4), (-8, 8)  # of a rating less another, and of such a difference less another


def interval(values, seed: int = 0, draws: int = DRAWS) -> list[float] | None:
    """Bootstrap 95 % interval of the mean: [low, high]; None of one value, which tells nothing of it."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    if np.ptp(values) == 0:
        return [float(values.mean())] * 2
    batch = max(1, 1_000_000 // len(values))  # of few draws at once, where there are many values
    rng = np.random.default_rng(seed)
    ends = stats.bootstrap((values,), np.mean, n_resamples=draws, batch=batch, method="percentile", rng=rng).confidence_interval
    return [float(ends.low), float(ends.high)]


def estimate(values, seed: int, within: tuple = ANY, steps: tuple = ()) -> dict:
    """Number, mean and its 95 % interval: the bootstrap's, as much wider as Student's is than the normal one, since draws from few
    values scatter too little (by a fifth for ten values, by a twentieth for forty); it ends where the scale `within` does.

    steps: the ends of a scale of few steps, as ratings are, whose values may be all alike without being all that there are. Then
    it is as wide as others at these ends would make it, of as large a share as may be and none of them be seen (Clopper and
    Pearson, 1934)."""
    number, mean, ends = len(values), float(np.mean(values)), interval(values, seed)
    if steps and ends and ends[0] == ends[1]:
        unseen = 1 - 0.025 ** (1 / number)
        return {"n": number, "mean": mean, "ci95": [mean + unseen * (end - mean) for end in steps]}
    wider = math.sqrt(number / (number - 1)) * stats.t.ppf(0.975, number - 1) / stats.norm.ppf(0.975) if ends else None
    return {"n": number, "mean": mean, "ci95": ends and [float(np.clip(mean + wider * (end - mean), *within)) for end in ends]}


def share(values) -> dict:
    """estimate() of values that are 0 or 1, whose interval is Wilson's (1927): all of forty is no certainty."""
    ends = stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    return {"n": len(values), "mean": mean_of(values), "ci95": [*map(float, ends)]}


def mean_of(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan
