"""From scores to figures. Scores are one tidy table: a row for an answer, a judge, and what it was judged along.

Columns: answer (its key), question, method, trait, pole, alpha, judge, measured, score. Figures are lists of rows, as summary.json
and details.json hold them; intervals are 95 % ones over the questions' situations, of paired differences where there are two sides.
"""

import itertools
import math
from collections import namedtuple

import numpy as np
import pandas as pd
from scipy import stats

from . import POLES, TRAITS
from .estimates import ANY, APART, DRAWS, FURTHER, RATING, estimate, mean_of
from .frame import declines
from .model import name_of, surroundings
from .questions import situation_of

CONDITION = ["method", "trait", "pole", "alpha"]
Condition = namedtuple("Condition", CONDITION)  # of a whole character: alpha is a tuple over TRAITS, trait and pole are None
EDITS = ("npti", "trained", "dpn-le", "activation", "residual")  # the methods that have a strength
HYBRID, TUNED = "hybrid", "lora"  # trained edits, and a persona in the prompt; fine-tuning
IN_THE_MODEL = ("unedited", *EDITS, TUNED)  # and nothing in the prompt
WAYS = ("composed", "added", "levels", "described")  # to a character: methods' rule, NPTI's sets added up, trained edits, a prompt


def distinct(rows, name: str) -> list:
    """The values of a column, each once, in the order of first appearance."""
    return list(dict.fromkeys(row[name] for row in rows))


def only(rows, **values) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def condition_of(line: dict) -> Condition:
    """Of an answer, or of a row of figures; a character's questions are of all traits."""
    if line["method"] in WAYS:
        return Condition(line["method"], None, line["pole"], tuple(line["alpha"]))
    return Condition(*(line[name] for name in CONDITION))


def beside_answers(answers: list[dict], lines: list[dict], columns: list[str]) -> pd.DataFrame:
    """A row a line: these columns of it, beside key, question and condition of the answer that it is about."""
    made = pd.DataFrame([{"answer": line["key"], "question": line["question"], **condition_of(line)._asdict()} for line in answers])
    return made.merge(pd.DataFrame(lines, columns=["answer", *columns]), on="answer")


def scored(answers: list[dict], scores, origins: dict) -> pd.DataFrame:
    """The table. scores: lines with answer, judge, trait, score, from; origins: of each judge the `from` that counts."""
    lines = [{**line, "measured": line["trait"] or "fluency"} for line in scores
             if line.get("judge") in origins and line["score"] is not None and origins[line["judge"]] == line["from"]]
    table = beside_answers(answers, lines, ["judge", "measured", "score"])
    table["judge"] = pd.Categorical(table.judge, list(origins))  # in the order in which they were asked for
    return table.sort_values("judge", kind="stable").astype({"judge": object})


def fluency_table(answers: list[dict], scores, origin) -> pd.DataFrame:
    """A row an answer: perplexity, repetition, tokens, by the judge of this origin."""
    lines = [line for line in scores if "perplexity" in line and line["from"] == origin]
    return beside_answers(answers, lines, ["perplexity", "repetition", "tokens"])


def of_edit(rows: list[dict], edit: dict) -> list[dict]:
    return only(rows, **{name: edit[name] for name in ("trait", "method", "alpha")})


def grouped(table: pd.DataFrame, names: list[str]):
    """Yield ({name: value}, rows) in the order of first appearance; None, for which pandas has NaN, is a value like any other."""
    for values, rows in table.groupby(names, sort=False, dropna=False):
        yield {name: None if pd.isna(value) else value for name, value in zip(names, values)}, rows


def per_question(rows: pd.DataFrame, names=(), of: str = "score") -> pd.DataFrame:
    """names, question, and the mean of each question's answers."""
    return rows.groupby([*names, "question"], sort=False, dropna=False)[of].mean().reset_index()


def estimate_of(rows: pd.DataFrame, seed: int, within: tuple = ANY, steps: tuple = (), of: str = "score") -> dict:
    """estimate() of a column of a table with a row a question."""
    return estimate(rows[of].tolist(), seed, within, steps, [*map(situation_of, rows.question)])


def own_trait(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.measured == table.trait]


# ------------------------------------------------------------------------------------------------------------- effects


def fluency(table: pd.DataFrame, ratings: pd.DataFrame, seed: int) -> list[dict]:
    """By condition: perplexity (median), repeated 3-grams and tokens (means), and the rating judge's fluency."""
    rating_of = {condition_of(key): estimate_of(per_question(rows), seed, RATING, RATING)
                 for key, rows in grouped(ratings[ratings.measured == "fluency"], CONDITION)}
    return [{**key, "n": len(rows), "perplexity": float(rows.perplexity.median()), "repetition": float(rows.repetition.mean()),
             "tokens": float(rows.tokens.mean()), "rating": rating_of.get(condition_of(key))}
            for key, rows in grouped(table, CONDITION)]


def with_fluency(rows: list[dict], fluent: list[dict]) -> list[dict]:
    """Rows with the perplexity and the repetition that `fluent` has for their conditions, or None."""
    fluent_of = {condition_of(row): row for row in fluent}
    return [{**row, **{name: fluent_of.get(condition_of(row), {}).get(name) for name in ("perplexity", "repetition")}}
            for row in rows]


def summarise(table: pd.DataFrame, fluent: list[dict], seed: int) -> list[dict]:
    """The rows of summary.json: by judge and condition the score along the trait that is meant."""
    rows = []
    for key, group in grouped(own_trait(table), ["judge", *CONDITION]):
        values = per_question(group)
        mean = estimate_of(values, seed, ANY if key["judge"] == "contrast" else RATING, steps_of(key["judge"], RATING))
        rows.append({**key, **mean, "variance": float(values.score.var(ddof=0))})
    return with_fluency(rows, fluent)


def steps_of(judge: str, ends: tuple) -> tuple:
    """For estimate(): the ends of a judge's ratings, or of their differences; those of the contrast judge have no steps."""
    return () if judge == "contrast" else ends


def high_minus_low(table: pd.DataFrame) -> pd.DataFrame:
    """judge, method, trait, alpha, measured, question, and score: of the high pole's answer less the low one's."""
    names = ["judge", "method", "trait", "alpha", "measured"]
    means = per_question(table, [*names, "pole"])
    both = means[means.pole == POLES[0]].merge(means[means.pole == POLES[1]], on=[*names, "question"], suffixes=("", "_low"))
    return both.assign(score=both.score - both.score_low)[[*names, "question", "score"]]


def effects(apart: pd.DataFrame, seed: int) -> list[dict]:
    """High minus low, paired by question; and, where a judge rates 1 to 5, the paper's high + (6 - low)."""
    rows = []
    for key, group in grouped(own_trait(apart), ["judge", "trait", "method", "alpha"]):
        rows.append({**key, **estimate_of(group, seed, steps=steps_of(key["judge"], APART))})
        if key["judge"].startswith("llm"):
            rows[-1]["paper"] = {"mean": 6 + float(group.score.mean()), "variance": float(group.score.var(ddof=0))}
    return rows


def beside_unedited(table: pd.DataFrame, fluent: pd.DataFrame, seed: int) -> list[dict]:
    """Each pole's score less the unedited model's, paired by question; and by how much its answers' perplexity is a multiple of
    theirs, the geometric mean (by which levels are read, see doses.py), with the interval of that."""
    names = ["judge", "trait", "question"]
    nats = per_question(fluent.assign(nats=np.log(fluent.perplexity)), CONDITION, "nats")
    means = per_question(own_trait(table), ["judge", *CONDITION]).merge(nats, on=[*CONDITION, "question"])
    plain, rows = means[means.method == "unedited"][[*names, "score", "nats"]], []
    both = means[means.method != "unedited"].merge(plain, on=names, suffixes=("", "_unedited"))
    both = both.assign(score=both.score - both.score_unedited, nats=both.nats - both.nats_unedited)
    for key, group in grouped(both, ["judge", *CONDITION]):
        price = estimate_of(group, seed, of="nats")
        times = {"mean": math.exp(price["mean"]), "ci95": price["ci95"] and [math.exp(end) for end in price["ci95"]]}
        rows.append({**key, **estimate_of(group, seed, steps=steps_of(key["judge"], APART)), "times": times})
    return rows


def compared(apart: pd.DataFrame, seed: int) -> list[dict]:
    """How much further each edit brings the poles apart than each other method: paired by question."""
    apart = own_trait(apart)
    other = apart.rename(columns={"method": "other", "alpha": "other_alpha", "score": "less"})
    both = apart[apart.method.isin((*EDITS, HYBRID))].merge(other, on=["trait", "judge", "measured", "question"])
    both = both[(both.method != both.other) | (both.alpha != both.other_alpha)]
    groups = grouped(both.assign(score=both.score - both.less), ["trait", "judge", "method", "alpha", "other", "other_alpha"])
    return [{**key, **estimate_of(rows, seed, steps=steps_of(key["judge"], FURTHER))} for key, rows in groups]


def spill_over(table: pd.DataFrame, seed: int) -> list[dict]:
    """The matrix of each method: how the answers of a steered trait move along each trait; high - low, paired by question."""
    apart = high_minus_low(table[table.judge == "contrast"])
    return [{"method": key["method"], "alpha": key["alpha"], "steered": key["trait"], "measured": key["measured"],
             "judge": "contrast", **estimate_of(group, seed), "noise": noise_of(group)}
            for key, group in grouped(apart, ["measured", "method", "trait", "alpha"])]


def noise_of(rows: pd.DataFrame) -> float | None:
    """How far from 0 the mean of a table with a row a question would be in the mean if nothing were there but noise: a normal
    distribution's mean size, of the standard error over the questions' situations. None of one situation."""
    of_situation = rows.score.sub(rows.score.mean()).groupby([*map(situation_of, rows.question)]).sum()
    draws = len(of_situation)
    if draws < 2:
        return None
    error = math.sqrt(draws / (draws - 1) * float((of_situation ** 2).sum())) / len(rows)
    few = math.sqrt(2 / (draws - 1)) * math.exp(math.lgamma(draws / 2) - math.lgamma((draws - 1) / 2))  # in the mean too little
    return math.sqrt(2 / math.pi) * error / few


def spilt_in_all(rows: list[dict]) -> list[dict]:
    """By judge and method the mean effect along the steered traits (own), the mean size of those along the others, the latter in
    shares of the former (None where that is not above 0), and what share noise alone would be (None of self-report)."""
    found = []
    for key in dict.fromkeys((row["judge"], row["method"], row["alpha"]) for row in rows):
        cells = only(rows, **(of := dict(zip(("judge", "method", "alpha"), key))))
        own, others = ([row for row in cells if (row["measured"] == row["steered"]) == same] for same in (True, False))
        if own and others:
            effect, size = mean_of(row["mean"] for row in own), mean_of(abs(row["mean"]) for row in others)
            noise, share = [row.get("noise") for row in others], lambda value: value / effect if effect > 0 else None  # noqa: E731
            found.append({**of, "n": min(row["n"] for row in cells), "own": effect, "others": size, "share": share(size),
                          "noise": None if None in noise else share(mean_of(noise))})
    return found


def matched_alphas(rows: list[dict], reach: float = 0.9) -> list[dict]:
    """The strength at which each method reaches the same trait score, by interpolation between the doses (rows of effects(), of
    one judge). The score is `reach` of what the weaker method attains at most, of doses that surely do anything (the highest of
    some that do nothing is above 0, too): so every method is inside the range of its doses. A trait that some method moves at no
    dose is left out."""
    matched = []
    for trait in distinct(rows, "trait"):
        curves, most = {}, {}
        for row in only(rows, trait=trait):
            curves.setdefault(row["method"], [(0.0, 0.0)]).append((row["alpha"], row["mean"]))
            surely = row["ci95"] and row["ci95"][0] > 0
            most[row["method"]] = max(most.get(row["method"], 0.0), row["mean"] if surely else 0.0)
        target = reach * min(most.values())
        if len(curves) < 2 or target <= 0:
            continue
        for method, curve in curves.items():
            a, b = next((a, b) for a, b in itertools.pairwise(sorted(curve)) if b[1] >= target)
            alpha = a[0] + (b[0] - a[0]) * (target - a[1]) / (b[1] - a[1])
            matched.append({"trait": trait, "method": method, "alpha": round(float(alpha), 3), "target": target})
    return matched


def at_matched_strength(chosen: dict, effects, summary, spilt, costs) -> dict:
    """A row of matched_alphas() with what its edit does, and what it costs, as far as that was measured."""
    (effect,), sides, prices = (of_edit(rows, chosen) for rows in (effects, summary, costs))
    others = [abs(cell["mean"]) for cell in only(spilt, steered=chosen["trait"], method=chosen["method"], alpha=chosen["alpha"])
              if cell["measured"] != chosen["trait"]]
    return {**chosen, **{name: effect[name] for name in ("mean", "ci95", "n")},
            **{name: mean_of(side[name] for side in sides) for name in ("perplexity", "repetition")},
            **({"spill_over": mean_of(others)} if others else {}),
            **{name: mean_of(price[name]["mean"] for price in prices) for name in ("added", "quiz") if prices}}


# -------------------------------------------------------------------------------------------------------------- judges


def agreement(table: pd.DataFrame, judges: list[str]) -> list[dict]:
    """Spearman's rank correlation of the judges with each other, over the answers of a trait."""
    rows, own = [], own_trait(table)
    for first, second in itertools.combinations(judges, 2):
        for trait in TRAITS:
            scores = own[own.trait == trait]
            both = scores[scores.judge == first].merge(scores[scores.judge == second], on="answer")
            if len(both) > 2 and both.score_x.nunique() > 1 < both.score_y.nunique():
                rows.append({"judges": [first, second], "trait": trait, "n": len(both),
                             "spearman": float(stats.spearmanr(both.score_x, both.score_y).statistic)})
    return rows


def accuracy(table: pd.DataFrame) -> list[dict]:
    """Where poles are known: the share of (high, low) pairs of a trait whose high answer has the higher score (ties: half)."""
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
        of_traits, of_facets = (values.groupby(np.array(of_items), sort=False) for of_items in (traits, facets))
        people.append({**condition, "traits": of_traits.mean().to_dict(), "facets": of_facets.mean().to_dict()})
        for trait, own in of_traits:
            if condition["trait"] in (None, trait):
                figures = {**estimate(own.tolist(), seed, RATING), "variance": float(np.var(own))}
                rows.append({**condition, "trait": trait, "judge": "questionnaire", **figures})
    return rows, people


def questionnaire_spill_over(people: list[dict]) -> list[dict]:
    """Rows like spill_over()'s, from what questionnaire() gives by personality."""
    traits_of, rows = {condition_of(person): person["traits"] for person in people}, []
    for condition, traits in traits_of.items():
        low = traits_of.get(condition._replace(pole="low"), {}) if condition.pole == "high" else {}
        rows += [{"method": condition.method, "alpha": condition.alpha, "steered": condition.trait, "measured": trait,
                  "judge": "questionnaire", "n": 1, "ci95": None, "mean": traits[trait] - low[trait]} for trait in low]
    return rows


# ---------------------------------------------------------------------------------------------------------- characters


def characters_measured(means: list[tuple], judge: str, alpha: float, seed: int) -> tuple[list[dict], list[dict]]:
    """Requested against measured, from (condition, means of the five traits) each: (by way, the points).

    correlation: of alpha and measured over the characters, the mean of the traits'. error: mean distance between measured and
    what the trait alone does at that alpha, by NPTI, or for `levels` by its trained edits (in proportion to its effect at `alpha`,
    for which the highest level stands; several are brought down alike, so that their error is larger). spill_over: mean distance
    from the unedited model along the traits whose alpha is 0. Intervals are bootstraps over the characters, differences paired."""
    unedited = next(mean for condition, mean in means if condition["method"] == "unedited")
    alone = {(key["method"], key["trait"], key["pole"]): mean[key["trait"]] - unedited[key["trait"]]
             for key, mean in means if key["method"] in ("npti", "trained")}
    points = [{"method": key["method"], "judge": judge, "character": list(key["alpha"]), "trait": trait, "requested": asked,
               "expected": abs(asked) / alpha * alone["trained" if key["method"] == "levels" else "npti", trait, POLES[asked < 0]],
               "measured": mean[trait] - unedited[trait]}
              for key, mean in means if key["method"] in WAYS for trait, asked in zip(TRAITS, key["alpha"])]
    number = len(points) // len(WAYS) // len(TRAITS)  # of characters
    picks = np.concatenate([np.arange(number)[None], np.random.default_rng(seed).integers(0, number, (DRAWS, number))])
    spread = lambda values: {"mean": float(values[0]), "ci95": (  # noqa: E731
        np.quantile(values[1:], (0.025, 0.975)).tolist() if number > 1 else None)}
    of_way = {way: way_figures([point for point in points if point["method"] == way], picks) for way in WAYS}
    rows = [{"method": way, "judge": judge, "n": number, **{name: spread(values) for name, values in figures.items()},
             "more_than_composed": {name: spread(values - of_way[WAYS[0]][name]) for name, values in figures.items()}}
            for way, figures in of_way.items()]
    for row in rows if number < 2 else ():  # one character correlates with nothing
        row["correlation"] = row["more_than_composed"]["correlation"] = None
    return rows, points


def way_figures(points: list[dict], picks) -> dict:
    """{name: (1 + draws)}: of the characters as they are, then of the draws."""
    asked, measured, expected = (np.array([point[name] for point in points]).reshape(-1, len(TRAITS))[picks]
                                 for name in ("requested", "measured", "expected"))  # (1 + draws, number, traits)
    x, y = (values - values.mean(1, keepdims=True) for values in (asked, measured))
    size = np.sqrt((x ** 2).sum(1) * (y ** 2).sum(1))
    moved = size > 1e-9  # else what was measured is the noise of rounding
    r = np.divide((x * y).sum(1), size, out=np.zeros(size.shape), where=moved)
    none = asked == 0
    return {"correlation": r.sum(1) / np.maximum(moved.sum(1), 1), "error": np.abs(measured - expected).mean((1, 2)),
            "spill_over": (np.abs(measured) * none).sum((1, 2)) / np.maximum(none.sum((1, 2)), 1)}


def head_line(run, made_with: dict, made: list[dict]) -> str:
    """What the figures of an evaluation are of, in one line. run: evaluate.Evaluation."""
    args, model = run.args, run.people.model
    nobody, listed = sum(declines(line["answer"]) for line in made), lambda values: ", ".join(f"{value:g}" for value in values)
    used = [f"{name} {listed(values)}, " for name, values in (("alpha", args.alpha), ("level", args.level))
            if args.characters or any(args.strengths.get(method) is values for method in args.method)]  # is: they may be equal
    source = f"answers of {args.answers}, " if args.answers else (
        f"{run.people.bench.name} bench, {args.max_new_tokens} tokens an answer, frame {run.people.frame}, "
        f"{''.join(used)}seed {args.seed}; ")
    head = f"{name_of(model)}, {surroundings(model)}; {source}judges: {', '.join(args.judge)}"
    if run.rater:
        keys, none = {line["key"] for line in made}, (run.rater.name, run.rater.origin, None)
        lost = sum(none == (line.get("judge"), line["from"], line.get("score")) and line["answer"] in keys for line in run.scores)
        head += f" ({run.rater.name}; {lost} replies were no rating)"
    if run.contrast.origin:
        head += f"; judged by {name_of(run.contrast.model)}"
    head += f"; {nobody} of {len(made)} answers decline to be anyone" if nobody else ""
    return head + (f"; edits with {made_with['edits']}" if "edits" in made_with else "") + "."
