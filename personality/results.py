"""From scores to figures. Scores are one tidy table: a row for an answer, a judge, and what it was judged along.

Columns: answer (its key), trait, question, method, pole, alpha, judge, measured, score. Figures are lists of rows, as summary.json
and details.json hold them; intervals are bootstrap 95 % ones over the questions, of paired differences where there are two sides.
"""

import itertools
import math

import numpy as np
import pandas as pd
from scipy import stats

from . import POLES, TRAITS

CONDITION = ["method", "trait", "pole", "alpha"]
EDITS = ("npti", "dpn-le", "activation")  # the methods that have a strength
WAYS = ("composed", "added", "described")  # to a whole character: methods' rule, NPTI's sets added up, a prompt
DRAWS = 10_000


def interval(values, seed: int = 0, draws: int = DRAWS) -> list[float]:
    """Bootstrap 95 % interval of the mean: [low, high]."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return [float(values.mean())] * 2
    batch = max(1, 1_000_000 // len(values))  # of few draws at once, where there are many values
    found = stats.bootstrap((values,), np.mean, n_resamples=draws, batch=batch, method="percentile", rng=np.random.default_rng(seed))
    return [float(found.confidence_interval.low), float(found.confidence_interval.high)]


def estimate(values, seed: int) -> dict:
    return {"n": len(values), "mean": float(np.mean(values)), "ci95": interval(values, seed)}


def scored(answers: list[dict], scores, origins: dict) -> pd.DataFrame:
    """The table. scores: lines with answer, judge, trait, score, from; origins: of each judge the `from` that counts."""
    lines = [{"answer": line["answer"], "judge": line["judge"], "measured": line["trait"] or "fluency", "score": line["score"]}
             for line in scores if "judge" in line and line["score"] is not None and origins.get(line["judge"], 0) == line["from"]]
    made = pd.DataFrame([{"answer": line["key"], "question": line["question"], **condition_of(line)} for line in answers])
    table = made.merge(pd.DataFrame(lines, columns=["answer", "judge", "measured", "score"]), on="answer")
    table["judge"] = pd.Categorical(table.judge, list(origins))  # in the order in which they were asked for
    return table.sort_values("judge", kind="stable").astype({"judge": object})


def fluency_table(answers: list[dict], scores, origin) -> pd.DataFrame:
    """A row an answer: perplexity, repetition, tokens."""
    lines = [{name: line[name] for name in ("answer", "perplexity", "repetition", "tokens")} for line in scores
             if "perplexity" in line and line["from"] == origin]
    made = pd.DataFrame([{"answer": line["key"], **condition_of(line)} for line in answers])
    return made.merge(pd.DataFrame(lines, columns=["answer", "perplexity", "repetition", "tokens"]), on="answer")


def condition_of(line: dict) -> dict:
    """Of an answer; a character's questions are of all traits, and its alpha is a tuple over them."""
    whole = line["method"] in WAYS
    return {"method": line["method"], "trait": None if whole else line["trait"], "pole": line["pole"],
            "alpha": tuple(line["alpha"]) if whole else line["alpha"]}


def same_edit(first: dict, second: dict) -> bool:
    return all(first[name] == second[name] for name in ("trait", "method", "alpha"))


def plain(value):
    """None for what pandas has instead of it."""
    return None if value is None or (np.isscalar(value) and pd.isna(value)) else value


def grouped(table: pd.DataFrame, names: list[str]):
    """Yield ({name: value}, rows) in the order of first appearance; None is a value like any other."""
    for values, rows in table.groupby(names, sort=False, dropna=False):
        yield {name: plain(value) for name, value in zip(names, values)}, rows


def per_question(rows: pd.DataFrame) -> list[float]:
    """The mean of each question's answers."""
    return rows.groupby("question", sort=False).score.mean().tolist()


def own_trait(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.measured == table.trait]


# ------------------------------------------------------------------------------------------------------------- effects


def fluency(table: pd.DataFrame, ratings: pd.DataFrame, seed: int) -> list[dict]:
    """By condition: perplexity (median), repeated 3-grams and tokens (means), and the rating judge's fluency."""
    rating_of = {tuple(key.values()): rows.score.tolist() for key, rows in grouped(ratings[ratings.measured == "fluency"], CONDITION)}
    found = []
    for key, rows in grouped(table, CONDITION):
        rated = rating_of.get(tuple(key.values()))
        found.append({**key, "n": len(rows), "perplexity": float(rows.perplexity.median()), "repetition": float(rows.repetition.mean()),
                      "tokens": float(rows.tokens.mean()), "rating": estimate(rated, seed) if rated else None})
    return found


def summarise(table: pd.DataFrame, fluent: list[dict], seed: int) -> list[dict]:
    """The rows of summary.json: by judge and condition the score along the trait that is meant."""
    fluent_of, rows = {tuple(row[name] for name in CONDITION): row for row in fluent}, []
    for key, group in grouped(own_trait(table), ["judge", *CONDITION]):
        values = per_question(group)
        like = fluent_of.get(tuple(key[name] for name in CONDITION), {})
        rows.append({**key, **estimate(values, seed), "variance": float(np.var(values)),
                     "perplexity": like.get("perplexity"), "repetition": like.get("repetition")})
    return rows


def high_minus_low(table: pd.DataFrame) -> pd.DataFrame:
    """judge, method, trait, alpha, question, and score: of the high pole's answer less the low one's."""
    names = ["judge", "method", "trait", "alpha", "question"]
    means = own_trait(table).groupby([*names, "pole"], sort=False, dropna=False).score.mean().reset_index()
    both = means[means.pole == POLES[0]].merge(means[means.pole == POLES[1]], on=names, suffixes=("", "_low"))
    return both.assign(score=both.score - both.score_low)[[*names, "score"]]


def effects(apart: pd.DataFrame, seed: int) -> list[dict]:
    """High minus low, paired by question; and, where a judge rates 1 to 5, the paper's high + (6 - low)."""
    rows = []
    for key, group in grouped(apart, ["judge", "trait", "method", "alpha"]):
        rows.append({**key, **estimate(group.score.tolist(), seed)})
        if key["judge"].startswith("llm"):
            rows[-1]["paper"] = {"mean": 6 + float(group.score.mean()), "variance": float(group.score.var(ddof=0))}
    return rows


def compared(apart: pd.DataFrame, seed: int) -> list[dict]:
    """How much further each edit brings the poles apart than each other method: paired by question."""
    names, other = ["trait", "judge", "method", "alpha"], apart.rename(columns={"method": "other", "alpha": "other_alpha", "score": "less"})
    both = apart[apart.method.isin(EDITS)].merge(other, on=["trait", "judge", "question"])
    both = both[(both.method != both.other) | (both.alpha != both.other_alpha)]
    return [{**key, **estimate((rows.score - rows.less).tolist(), seed)} for key, rows in grouped(both, [*names, "other", "other_alpha"])]


def spill_over(table: pd.DataFrame) -> list[dict]:
    """The matrix of each method: how the answers of a steered trait move along each trait; high - low, means over questions."""
    rows = []
    for key, group in grouped(table[table.judge == "contrast"], ["measured", "method", "trait", "alpha"]):
        sides = [per_question(group[group.pole == pole]) for pole in POLES]
        if all(sides):
            rows.append({"method": key["method"], "alpha": key["alpha"], "steered": key["trait"], "measured": key["measured"],
                         "judge": "contrast", "n": len(sides[0]), "mean": float(np.mean(sides[0]) - np.mean(sides[1]))})
    return rows


def matched_alphas(rows: list[dict], reach: float = 0.9) -> list[dict]:
    """The strength at which each method reaches the same trait score, by interpolation between the doses (rows of effects()). The
    score is `reach` of what the weaker method attains at most: so every method is inside the range of its doses."""
    found, table = [], pd.DataFrame(rows, columns=["judge", "trait", "method", "alpha", "mean"])
    table = table[(table.judge == "contrast") & table.method.isin(EDITS)]
    for trait, of_trait in table.groupby("trait", sort=False):
        curves = {method: [(0.0, 0.0), *sorted(zip(some.alpha, some["mean"]))] for method, some in of_trait.groupby("method", sort=False)}
        target = reach * min(max(effect for _, effect in curve) for curve in curves.values())
        if len(curves) < 2 or target <= 0:
            continue
        for method, curve in curves.items():
            a, b = next((a, b) for a, b in itertools.pairwise(curve) if b[1] >= target)
            alpha = a[0] + (b[0] - a[0]) * (target - a[1]) / (b[1] - a[1])
            found.append({"trait": trait, "method": method, "alpha": round(alpha, 3), "target": target})
    return found


# -------------------------------------------------------------------------------------------------------------- judges


def agreement(table: pd.DataFrame, judges: list[str]) -> list[dict]:
    """Spearman's rank correlation of the judges with each other, over the answers of a trait."""
    rows, own = [], own_trait(table)
    for first, second in itertools.combinations(judges, 2):
        for trait in TRAITS:
            some = own[own.trait == trait]
            both = some[some.judge == first].merge(some[some.judge == second], on="answer")
            if len(both) > 2 and both.score_x.nunique() > 1 < both.score_y.nunique():
                rows.append({"judges": [first, second], "trait": trait, "n": len(both),
                             "spearman": float(stats.spearmanr(both.score_x, both.score_y).statistic)})
    return rows


def accuracy(table: pd.DataFrame) -> list[dict]:
    """For answers whose pole is known: the share of (high, low) pairs of a trait whose high one has the higher score (ties: half)."""
    rows = []
    for key, group in grouped(own_trait(table), ["judge", "trait"]):
        high, low = (group[group.pole == pole].score for pole in POLES)
        if len(high) and len(low):
            above = stats.mannwhitneyu(high, low, method="asymptotic").statistic
            rows.append({**key, "pairs": len(high) * len(low), "accuracy": float(above / (len(high) * len(low)))})
    return rows


def questionnaire(reports: list[tuple], items, seed: int) -> tuple[list[dict], list[dict]]:
    """(rows like summarise()'s, by personality: means of traits and facets), from (condition, a value an item) each."""
    rows, people = [], []
    traits, facets = ([item[k] for item in items] for k in (1, 2))
    for condition, values in reports:
        values = pd.Series(values)
        means = values.groupby(traits, sort=False).mean().to_dict()
        people.append({**condition, "traits": means, "facets": values.groupby(facets, sort=False).mean().to_dict()})
        for trait in [condition["trait"]] if condition["trait"] else means:
            of = values[[trait == own for own in traits]].tolist()
            if of:
                rows.append({**condition, "trait": trait, "judge": "questionnaire", **estimate(of, seed), "variance": float(np.var(of))})
    return rows, people


def questionnaire_spill_over(people: list[dict]) -> list[dict]:
    low = {(one["method"], one["trait"], one["alpha"]): one["traits"] for one in people if one["pole"] == "low"}
    return [{"method": one["method"], "alpha": one["alpha"], "steered": one["trait"], "measured": trait, "judge": "questionnaire", "n": 1,
             "mean": mean - low[one["method"], one["trait"], one["alpha"]][trait]}
            for one in people if one["pole"] == "high" and (one["method"], one["trait"], one["alpha"]) in low
            for trait, mean in one["traits"].items()]


# ---------------------------------------------------------------------------------------------------------- characters


def characters_measured(means: list[tuple], judge: str, alpha: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Requested against measured, from (condition, means of the five traits) each: (by way, the points).

    correlation: of alpha and measured over the characters, the mean of the traits'. error: mean distance between measured and
    what the trait alone does at that alpha (in proportion to its effect at `alpha`). spill_over: mean distance from the unedited
    model along the traits whose alpha is 0. Intervals are bootstraps over the characters, of differences paired."""
    unedited = next(mean for condition, mean in means if condition["method"] == "unedited")
    alone = {(one["trait"], one["pole"]): mean[one["trait"]] - unedited[one["trait"]] for one, mean in means if one["method"] == "npti"}
    points = [{"method": one["method"], "judge": judge, "character": list(one["alpha"]), "trait": trait, "requested": asked,
               "expected": abs(asked) / alpha * alone[trait, POLES[asked < 0]], "measured": mean[trait] - unedited[trait]}
              for one, mean in means if one["method"] in WAYS for trait, asked in zip(TRAITS, one["alpha"])]
    number = len(points) // len(WAYS) // len(TRAITS)
    picks = np.concatenate([np.arange(number)[None], np.random.default_rng(seed).integers(0, number, (DRAWS, number))])
    spread = lambda values: {"mean": float(values[0]), "ci95": [float(x) for x in np.quantile(values[1:], (0.025, 0.975))]}  # noqa: E731
    of_way = {way: way_figures([point for point in points if point["method"] == way], picks) for way in WAYS}
    return [{"method": way, "judge": judge, "n": number, **{name: spread(values) for name, values in figures.items()},
             "more_than_composed": {name: spread(values - of_way[WAYS[0]][name]) for name, values in figures.items()}}
            for way, figures in of_way.items()], points


def way_figures(points: list[dict], picks) -> dict:
    """{name: (1 + draws)}: of the characters as they are, then of the draws."""
    asked, measured, expected = (np.array([point[name] for point in points]).reshape(-1, len(TRAITS))[picks]  # (1 + draws, number, traits)
                                 for name in ("requested", "measured", "expected"))
    x, y = (values - values.mean(1, keepdims=True) for values in (asked, measured))
    size = np.sqrt((x ** 2).sum(1) * (y ** 2).sum(1))
    moved = size > 1e-9  # else what was measured is the noise of rounding
    r = np.divide((x * y).sum(1), size, out=np.zeros(size.shape), where=moved)
    none = asked == 0
    return {"correlation": r.sum(1) / np.maximum(moved.sum(1), 1), "error": np.abs(measured - expected).mean((1, 2)),
            "spill_over": (np.abs(measured) * none).sum((1, 2)) / np.maximum(none.sum((1, 2)), 1)}


def mean_of(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


# --------------------------------------------------------------------------- lines of result folders, which are not believed


def numbers(values) -> bool:
    return isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)


def is_answer(line: dict) -> bool:
    return all(isinstance(line.get(name), str) for name in ("key", "trait", "question", "method", "answer")) and numbers(line.get("ids"))


def is_score(line: dict) -> bool:
    names = ("score",) if "judge" in line else ("perplexity", "repetition", "tokens")
    return isinstance(line.get("answer"), str) and "from" in line and all(
        isinstance(line.get(name), (int, float)) or name == "score" and line.get(name, "") is None for name in names)


def is_report(line: dict) -> bool:
    return numbers(line.get("items"))


def is_cost(line: dict) -> bool:
    return isinstance(line.get("tasks"), dict) or all(numbers(line[name]) for name in ("quiz", "added", "agreement") if name in line)
