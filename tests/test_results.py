"""From scores to figures, on planted data: intervals, paired differences, spill-over, matched strengths, agreement, accuracy,
characters."""

import math
import random
import time

import numpy as np
import pandas as pd
import pytest

import evaluate
from personality import POLES, TRAITS, estimates, grid, results
from personality.questions import built_in_bench, situation_of


def planted(values):
    """Answers and score lines of the contrast judge, from {(trait, method, alpha, pole): {measured: [score by question]}}."""
    answers, scores = [], []
    for (trait, method, alpha, pole), measured in values.items():
        for k in range(len(next(iter(measured.values())))):
            key = f"{trait}{method}{alpha}{pole}{k}"
            answers.append({"trait": trait, "method": method, "alpha": alpha, "pole": pole, "question": f"q{k}", "key": key})
            scores.append({"answer": key, "perplexity": 2.0, "repetition": 0.0, "tokens": 5, "from": None})
            scores += [score_line(key, of, series[k]) for of, series in measured.items()]
    random.Random(0).shuffle(answers)
    return answers, scores


bootstrap = estimates.interval


def score_line(key, trait, score, judge="contrast", origin=None):
    return {"answer": key, "judge": judge, "trait": trait, "score": score, "from": origin}


def table_of(values):
    return results.scored(*planted(values), {"contrast": None})


def test_interval_covers_the_mean():
    """Of 200 samples of 40, some 95 % of the intervals hold the true mean; and they are not just wide."""
    samples = np.random.default_rng(0).normal(3, 2, (200, 40))
    intervals = np.array([estimates.interval(sample, draws=1000) for sample in samples])
    covered = ((intervals[:, 0] <= 3) & (3 <= intervals[:, 1])).mean()
    assert 0.88 <= covered <= 0.99
    assert 0.8 < np.mean(intervals[:, 1] - intervals[:, 0]) / (2 * 1.96 * 2 / math.sqrt(40)) < 1.1
    assert estimates.interval([0.5] * 9) == [0.5, 0.5] and estimates.interval([2.0]) is None
    assert estimates.interval(samples[0]) == estimates.interval(samples[0])


@pytest.mark.parametrize("number", (10, 3000))
def test_interval_is_that_of_draws_with_numpys_generator(number):
    """A sample's interval can be had again without scipy; with many values, of which few draws are made at once, as well."""
    values, draws, generator = np.random.default_rng(1).normal(size=number), 500, np.random.default_rng(7)
    part = 1_000_000 // number
    means = [values[generator.integers(0, number, (min(part, draws - k), number))].mean(1) for k in range(0, draws, part)]
    expected = np.quantile(np.concatenate(means), (0.025, 0.975))
    assert estimates.interval(values, 7, draws) == pytest.approx(list(expected), abs=1e-12)


@pytest.mark.parametrize(("number", "least"), ((2, 0.91), (3, 0.91), (5, 0.91), (10, 0.91)))
def test_the_interval_of_few_values_is_wide_enough(number, least, monkeypatch):
    """It is no help that draws from three values look alike. The bootstrap alone covers 50, 76, 84 and 90 %."""
    monkeypatch.setattr(estimates, "interval", lambda values, seed, **more: bootstrap(values, seed, 1000, **more))
    ends = np.array([estimates.estimate(sample, 0)["ci95"] for sample in np.random.default_rng(0).normal(3, 2, (1000, number))])
    assert least <= ((ends[:, 0] <= 3) & (3 <= ends[:, 1])).mean() <= 0.99
    assert estimates.estimate([2.0], 0) == {"n": 1, "mean": 2.0, "ci95": None}
    assert estimates.estimate([4.0, 5.0], 0, estimates.RATING)["ci95"] == [1.0, 5.0]
    assert estimates.estimate([0.5] * 9, 0) == {"n": 9, "mean": 0.5, "ci95": [0.5, 0.5]}


def test_questions_of_one_situation_are_one_draw():
    """Sixteen situations with three questions each, a third of whose variance is the situation's: as if they were 48, intervals
    are too narrow."""
    generator, units = np.random.default_rng(1), [f"situation {k}" for k in range(16)] * 3
    samples = 3 + np.tile(generator.normal(0, 1, (400, 16)), 3) + generator.normal(0, math.sqrt(2), (400, 48))
    covered = {}
    for name, of in (("questions", None), ("situations", units)):
        ends = np.array([estimates.estimate(sample, 0, units=of)["ci95"] for sample in samples])
        covered[name] = ((ends[:, 0] <= 3) & (3 <= ends[:, 1])).mean()
    assert covered["questions"] < 0.88 and 0.93 <= covered["situations"] <= 0.98
    assert estimates.estimate(samples[0], 0, units=units)["n"] == 48, "the questions are counted"
    ratings = [5.0] * 6
    assert estimates.estimate(ratings, 0, steps=estimates.RATING, units=list("aabbcc"))["ci95"] == pytest.approx(
        estimates.estimate(ratings[:3], 0, steps=estimates.RATING)["ci95"]), "of all alike there are three draws"


def test_units_of_several_sizes_weigh_by_their_values():
    """The mean of what is drawn is that of its values: as numpy's generator draws the units, in their order."""
    values, units = [0.0, 1.0, 2.0, 2.5, 6.0, 1.0, 4.0], list("aabcbbc")
    sums, numbers = np.array([1.0, 9.0, 6.5]), np.array([2, 3, 2])
    drawn = np.random.default_rng(7).integers(0, 3, (500, 3))
    expected = np.quantile(sums[drawn].sum(1) / numbers[drawn].sum(1), (0.025, 0.975))
    assert estimates.interval(values, 7, 500, units) == pytest.approx(list(expected), abs=1e-12)


def test_one_unit_tells_nothing_of_others():
    values = [1.0, 2.0, 4.0, 8.0]
    assert estimates.estimate(values, 0, units=["a"] * 4) == {"n": 4, "mean": 3.75, "ci95": None}
    assert estimates.estimate(values, 0, units=list("abcd")) == estimates.estimate(values, 0), "units of one value each are the values"


def test_ratings_of_units_that_are_alike_are_no_certainty():
    """The means of the three units are 3, which is no more sure than three values of 3 are."""
    ends = estimates.estimate([1.0, 5.0, 5.0, 1.0, 1.0, 5.0], 0, estimates.RATING, estimates.RATING, list("aabbcc"))["ci95"]
    assert ends == pytest.approx(estimates.estimate([3.0] * 3, 0, estimates.RATING, estimates.RATING)["ci95"]) and ends[0] < 2 < 4 < ends[1]


def test_ratings_that_are_all_alike_are_no_certainty():
    """Ten ratings of 5 have an interval that holds the mean of a judge who rates 4 now and then; differences likewise."""
    ends = [estimates.estimate([value] * 10, 0, steps=steps)["ci95"] for value, steps in (
        (5.0, estimates.RATING), (4.0, estimates.APART), (0.0, estimates.FURTHER))]
    unseen = 1 - 0.025 ** 0.1  # so often may something be that once in forty times is not there in any of ten
    assert ends == [pytest.approx([5 - 4 * unseen, 5.0]), pytest.approx([4 - 8 * unseen, 4.0]), pytest.approx([-8 * unseen, 8 * unseen])]
    generator = np.random.default_rng(0)
    ratings = [np.where(generator.random(10) < 0.9, 5.0, 4.0) for _ in range(300)]
    intervals = [estimates.estimate(list(values), 0, estimates.RATING, estimates.RATING)["ci95"] for values in ratings]
    covered = [low <= 4.9 <= high for low, high in intervals]
    assert np.mean(covered) > 0.9, "where intervals of no width cover in 65 of 100 cases"
    assert estimates.estimate([5.0], 0, steps=estimates.RATING)["ci95"] is None
    assert estimates.estimate([1.0] * 3, 0, (0, 1))["ci95"] == [1.0, 1.0], "the unedited model agrees with itself for certain"


def test_all_of_forty_is_no_certainty():
    """Wilson's interval; at 0.5 it is near the normal one."""
    whole, half = estimates.share([1] * 40), estimates.share([0, 1] * 20)
    z = 1.959964
    assert whole == {"n": 40, "mean": 1.0, "ci95": [pytest.approx(1 / (1 + z ** 2 / 40), abs=1e-6), 1.0]}
    assert half["ci95"] == pytest.approx([0.5 - 0.5 * z / math.sqrt(40 + z ** 2), 0.5 + 0.5 * z / math.sqrt(40 + z ** 2)], abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- the table


def test_a_score_counts_where_its_judge_is_the_one_that_is_asked():
    """Lines of another judge, or of one at another origin, lie in the same file; replies that were no rating have no score."""
    answers, scores = planted({("openness", "npti", 1.0, pole): {"openness": [1.0, 2.0]} for pole in POLES})
    keys = [line["key"] for line in answers]
    scores += [score_line(key, "openness", 9.0, origin="elsewhere") for key in keys]
    scores += [score_line(key, trait, 4.0, "llm:big", "here") for key in keys[1:] for trait in ("openness", None)]
    scores.append(score_line(keys[0], "openness", None, "llm:big", "here"))
    scores.append(score_line(keys[0], "openness", 5.0, "llm:small", "here"))
    table = results.scored(answers, scores, {"contrast": None, "llm:big": "here"})
    assert table.judge.tolist() == ["contrast"] * 4 + ["llm:big"] * 6
    assert sorted(table[table.judge == "contrast"].score) == [1, 1, 2, 2] and set(table[table.judge == "llm:big"].score) == {4.0}
    assert set(table[table.judge == "llm:big"].measured) == {"openness", "fluency"}
    assert keys[0] not in set(table[table.judge == "llm:big"].answer), "nothing is guessed"
    judges_asked_for = results.scored(answers, scores, {"llm:big": "here", "contrast": None}).judge.tolist()
    assert judges_asked_for == ["llm:big"] * 6 + ["contrast"] * 4, "in the order in which they were asked for"


def test_a_question_that_was_answered_twice_counts_once():
    answers, scores = planted({("openness", "npti", 1.0, pole): {"openness": [value, value + 2.0]}
                               for pole, value in (("high", 1.0), ("low", 0.0))})
    more = next(line for line in answers if line["pole"] == "high" and line["question"] == "q0")
    answers.append({**more, "key": "more"})
    scores.append(score_line("more", "openness", 5.0))
    scores.append({"answer": "more", "perplexity": 8.0, "repetition": 0.5, "tokens": 9, "from": None})
    table = results.scored(answers, scores, {"contrast": None})
    fluent = results.fluency(results.fluency_table(answers, scores, None), table, 0)
    high = next(row for row in results.summarise(table, fluent, 0) if row["pole"] == "high")
    assert high["n"] == 2 and high["mean"] == pytest.approx(((1 + 5) / 2 + 3) / 2)
    assert (high["perplexity"], high["repetition"]) == (2.0, pytest.approx(0.5 / 3)), "of the three answers: median, mean"
    (row,) = results.effects(results.high_minus_low(table), 0)
    assert row["n"] == 2 and row["mean"] == pytest.approx(((3 - 0) + (3 - 2)) / 2)


# ------------------------------------------------------------------------------------------------------------- effects


def test_intervals_are_over_the_situations_of_the_built_in_bench():
    """Of questions in the same situations, all alike, every interval is that of one question of each."""
    asked = built_in_bench().questions("openness", "test", 48)
    situations = list(dict.fromkeys(map(situation_of, asked)))

    def intervals(questions):
        moved = [0.1 + situations.index(situation_of(question)) % 4 for question in questions]
        conditions = [("unedited", None, None, 0), *((method, 1.0, pole, far * (pole == "high") + 0.1)
                                                     for method, far in (("npti", 1), ("trained", 3)) for pole in POLES)]
        answers, scores = planted({("openness", method, alpha, pole): {"openness": [far * own for own in moved]}
                                   for method, alpha, pole, far in conditions})
        score = {line["answer"]: line["score"] for line in scores if "judge" in line}
        answers = [{**line, "question": questions[k]} for k in range(len(questions)) for line in answers if line["question"] == f"q{k}"]
        scores = [{**line, "perplexity": 2 + score[line["answer"]]} if "perplexity" in line else line for line in scores]
        scores += [score_line(key, None, 1 + far % 4, "llm") for key, far in score.items()]
        table, prices = results.scored(answers, scores, {"contrast": None, "llm": None}), results.fluency_table(answers, scores, None)
        apart, beside, fluent = results.high_minus_low(table), results.beside_unedited(table, prices, 0), results.fluency(prices, table, 0)
        rows = [*results.summarise(table, fluent, 0), *results.effects(apart, 0), *results.compared(apart, 0), *beside,
                *(row["times"] for row in beside), *(row["rating"] for row in fluent)]
        return sorted(row["ci95"] for row in rows)

    whole, few = (intervals([question for question in asked if question in some]) for some in (
        asked, {situation_of(question): question for question in asked}.values()))
    assert whole == [pytest.approx(ends) for ends in few] and len(whole) == 5 + 2 + 2 + 4 + 4 + 5


def test_high_minus_low_is_paired_by_question():
    """The questions' own level cancels: differences of 1 throughout have an interval of no width."""
    levels = list(range(10))
    answers, scores = planted({("openness", "npti", 1.0, pole): {"openness": [level + (pole == "high") for level in levels]}
                               for pole in POLES})
    table = results.scored(answers, scores, {"contrast": None})
    rows = results.summarise(table, results.fluency(results.fluency_table(answers, scores, None), table, 0), 0)
    effects = results.effects(results.high_minus_low(table), 0)
    assert [(row["n"], row["mean"], row["ci95"]) for row in effects] == [(10, 1.0, [1.0, 1.0])]
    assert {row["pole"]: row["mean"] for row in rows} == {"high": 5.5, "low": 4.5}
    assert all(row["ci95"][1] - row["ci95"][0] > 2 for row in rows)


def test_differences_of_ratings_that_are_all_alike_are_no_certainty():
    answers, scores = planted({("openness", method, alpha, pole): {"openness": [0.0] * 4}
                               for method, alpha in (("npti", 1.0), ("persona", None)) for pole in POLES})
    scores += [score_line(line["key"], "openness", 5.0 if (line["pole"], line["method"]) == ("high", "npti") else 1.0, "llm:big") for line in answers]
    apart = results.high_minus_low(results.scored(answers, scores, {"contrast": None, "llm:big": None}))
    rows = {row["method"]: row for row in results.effects(apart, 0) if row["judge"] == "llm:big"}
    npti, other = rows["npti"], rows["persona"]
    assert npti["mean"] == 4 and npti["ci95"][0] < 1 and npti["ci95"][1] == 4 and other["ci95"][0] < 0 < other["ci95"][1]
    (more,) = (row for row in results.compared(apart, 0) if row["judge"] == "llm:big")
    assert more["mean"] == 4 and more["ci95"][0] < 0 and more["ci95"][1] > 4


def test_each_pole_is_held_against_the_unedited_model():
    """Paired by question, whose own level cancels; and the perplexity's ratio by the geometric mean."""
    answers, scores = planted({
        ("openness", "unedited", None, None): {"openness": [0.0, 10.0, 20.0]},
        ("openness", "npti", 1.0, "high"): {"openness": [2.0, 12.0, 22.0]},
        ("openness", "npti", 1.0, "low"): {"openness": [-1.0, 9.0, 22.0]}})
    of_low = [line["key"] for line in answers if line["pole"] == "low" and line["question"] != "q2"]
    for line in scores:
        if "perplexity" in line and line["answer"] in of_low:
            line["perplexity"] = 8.0
    origins = {"contrast": None}
    rows = results.beside_unedited(results.scored(answers, scores, origins), results.fluency_table(answers, scores, None), 0)
    by_pole = {row["pole"]: row for row in rows}
    assert list(by_pole) and set(by_pole) == set(POLES) and {(row["n"], row["method"], row["alpha"]) for row in rows} == {(3, "npti", 1.0)}
    assert (by_pole["high"]["mean"], by_pole["high"]["ci95"], by_pole["high"]["times"]["mean"]) == (2.0, [2.0, 2.0], 1.0)
    assert by_pole["low"]["mean"] == 0 and by_pole["low"]["ci95"][0] < 0 < by_pole["low"]["ci95"][1]
    assert by_pole["low"]["times"]["mean"] == pytest.approx(4 ** (2 / 3)), "two of three at four times"
    assert by_pole["low"]["times"]["ci95"][0] < 1 < by_pole["low"]["times"]["ci95"][1]
    only_low = [line for line in answers if line["method"] == "npti"]
    assert results.beside_unedited(results.scored(only_low, scores, origins), results.fluency_table(only_low, scores, None), 0) == []


def test_methods_are_compared_by_question():
    values = {("openness", method, alpha, pole): {"openness": [(k ** 2) * sign + sign * more for k in range(8)]}
              for method, alpha, more in (("npti", 1.0, 2), ("persona", None, 0.5)) for pole, sign in zip(POLES, (1, 0))}
    (row,) = results.compared(results.high_minus_low(table_of(values)), 0)
    assert (row["method"], row["other"], row["n"]) == ("npti", "persona", 8) and row["ci95"] == [1.5, 1.5] == [row["mean"]] * 2


def test_strengths_of_a_method_are_compared_too():
    values = {("openness", "npti", alpha, pole): {"openness": [sign * alpha] * 3} for alpha in (1.0, 3.0) for pole, sign in zip(POLES, (1, 0))}
    rows = results.compared(results.high_minus_low(table_of(values)), 0)
    assert [(row["alpha"], row["other_alpha"], row["mean"]) for row in rows] == [(1.0, 3.0, -2.0), (3.0, 1.0, 2.0)], "none with itself"


def test_an_interval_ends_where_the_scale_does():
    """Of judges that rate 1 to 5, and of the items of a questionnaire; a contrast has no ends, nor has a difference."""
    answers, scores = planted({("openness", "npti", 1.0, pole): {"openness": [8.0, 9.0]} for pole in POLES})
    scores += [score_line(line["key"], trait, 5.0 - 4 * (line["pole"] == "low") + sign * (line["question"] == "q1"), "llm:big")
               for line in answers for sign in [-1 if line["pole"] == "high" else 1] for trait in ("openness", None)]
    table = results.scored(answers, scores, {"contrast": None, "llm:big": None})
    fluent = results.fluency(results.fluency_table(answers, scores, None), table, 0)
    ends = {(row["judge"], row["pole"]): row["ci95"] for row in results.summarise(table, fluent, 0)}
    assert ends["llm:big", "high"][1] == 5 and ends["llm:big", "low"][0] == 1 and ends["contrast", "high"][1] > 9
    assert {row["pole"]: row["rating"]["ci95"][row["pole"] == "high"] for row in fluent} == {"high": 5, "low": 1}
    rating = next(row for row in results.effects(results.high_minus_low(table), 0) if row["judge"] == "llm:big")
    assert rating["mean"] == 3 and rating["ci95"][1] > 5
    condition = {"method": "unedited", "trait": None, "pole": None, "alpha": None}
    (row,), _ = results.questionnaire([(condition, [4.0, 5.0])], [("a", "openness", "Ideas", 1), ("b", "openness", "Values", 1)], 0)
    assert row["ci95"] == [1, 5]


def test_the_papers_score_is_of_judges_that_rate():
    answers, scores = planted({("openness", "npti", 1.0, pole): {"openness": [0.0, 0.0]} for pole in POLES})
    rating = {"high": 4.0, "low": 1.0}
    scores += [score_line(line["key"], "openness", rating[line["pole"]] + (line["question"] == "q1"), "llm:big")
               for line in answers]
    effects = results.effects(results.high_minus_low(results.scored(answers, scores, {"contrast": None, "llm:big": None})), 0)
    paper = {"mean": 4 + 6 - 1, "variance": 0}
    assert [(row["judge"], row.get("paper")) for row in effects] == [("contrast", None), ("llm:big", paper)]
    for line in scores:
        line["score"] = line.get("score") and line["score"] + (line["answer"] == "opennessnpti1.0high1")
    effects = results.effects(results.high_minus_low(results.scored(answers, scores, {"contrast": None, "llm:big": None})), 0)
    assert effects[1]["paper"] == {"mean": 9.5, "variance": 0.25}, "of the answers that there are"


def test_spill_over_matrix():
    values = {("openness", "npti", 1.0, pole): {
        "openness": [sign * 2.0] * 3, "neuroticism": [sign * -0.5] * 3, "agreeableness": [7.0] * 3}
        for pole, sign in zip(POLES, (1, -1))}
    rows = results.spill_over(table_of(values), 0)
    assert {row["measured"]: row["mean"] for row in rows} == {"openness": 4.0, "neuroticism": -1.0, "agreeableness": 0.0}
    answers, scores = planted(values)
    scores += [score_line(line["key"], "openness", 5.0 if line["pole"] == "high" else 1.5, "llm:big") for line in answers]
    assert rows == results.spill_over(results.scored(answers, scores, {"contrast": None, "llm:big": None}), 0), "another judge has other units"


def test_spill_over_is_paired_by_question():
    """A question that one pole alone was asked tells nothing of the difference."""
    answers, scores = planted({("openness", "given", None, "high"): {"openness": [10.0, 1.0]}, ("openness", "given", None, "low"): {"openness": [9.0, 0.5]}})
    answers = [line for line in answers if (line["pole"], line["question"]) != ("low", "q0")]
    (row,) = results.spill_over(results.scored(answers, scores, {"contrast": None}), 0)
    assert (row["n"], row["mean"], row["ci95"], row["noise"]) == (1, 0.5, None, None)


def test_spill_over_has_intervals_and_its_noise():
    """Simulated: of cells in which nothing is, 95 % have 0 in their interval, and their mean size is the noise that is told."""
    draw, questions = np.random.default_rng(0), [f"q{k}" for k in range(12)]
    cells = [pd.DataFrame({"question": questions, "score": draw.normal(0, 2, 12)}) for _ in range(400)]
    rows = [results.estimate_of(cell, 0) for cell in cells]
    assert np.mean([row["ci95"][0] <= 0 <= row["ci95"][1] for row in rows]) > 0.92
    for number in (2, 3, 4, 12):
        few = [pd.DataFrame({"question": questions[:number], "score": draw.normal(0, 2, number)}) for _ in range(2000)]
        told = np.mean([results.noise_of(cell) for cell in few])
        assert told == pytest.approx(np.mean([abs(cell.score.mean()) for cell in few]), rel=0.06), number
    assert results.noise_of(pd.DataFrame({"question": map(str, range(5000)), "score": draw.normal(0, 2, 5000)})) == pytest.approx(0.0226, rel=0.05)
    moved = cells[0].assign(score=cells[0].score + 100)
    assert results.noise_of(moved) == pytest.approx(results.noise_of(cells[0])), "whatever the effect"


def test_questions_of_one_situation_are_one_draw_of_noise(monkeypatch):
    monkeypatch.setattr(results, "situation_of", lambda question: question[0])
    alike = pd.DataFrame({"question": ["a1", "a2", "b1", "b2"], "score": [1.0, 1.0, 3.0, 3.0]})
    assert results.noise_of(alike) == pytest.approx(results.noise_of(alike[::2])), "they tell nothing more"
    assert results.noise_of(alike[:2]) is None


def test_spill_over_in_all_is_of_sizes():
    row = lambda steered, measured, mean, n=12, judge="contrast", **more: {  # noqa: E731
        "judge": judge, "method": "npti", "alpha": 1.5, "steered": steered, "measured": measured, "mean": mean, "n": n, **more}
    rows = [row("openness", "openness", 6.0, noise=9.0), row("openness", "neuroticism", -3.0, noise=1.0),
            row("neuroticism", "neuroticism", 2.0, noise=9.0), row("neuroticism", "openness", 1.0, 10, noise=2.0)]
    said = [row("openness", "openness", 2.0, 1, "questionnaire"), row("openness", "neuroticism", -1.0, 1, "questionnaire")]
    alone = [{**row("openness", "openness", 6.0, noise=1.0), "method": "trained"}]
    wrong = [{**line, "mean": -line["mean"], "alpha": 2.0} for line in rows[:2]]
    *both, turned = results.spilt_in_all([*rows, *said, *alone, *wrong])
    assert (turned["own"], turned["others"], turned["share"], turned["noise"]) == (-6.0, 3.0, None, None), "no share of what went astray"
    of = {"method": "npti", "alpha": 1.5}
    assert both == [{"judge": "contrast", **of, "n": 10, "own": 4.0, "others": 2.0, "share": 0.5, "noise": 0.375},
                    {"judge": "questionnaire", **of, "n": 1, "own": 2.0, "others": 1.0, "share": 0.5, "noise": None}]


def test_a_questions_ratings_of_fluency_count_once():
    answers, scores = planted({("openness", "given", None, "high"): {"openness": [0.0, 0.0]}})
    answers += [{**line, "key": f"{line['key']}{more}"} for line in answers if line["question"] == "q0" for more in range(9)]
    scores += [score_line(line["key"], None, 1.0 if line["question"] == "q0" else 5.0, "llm:big") for line in answers]
    table = results.scored(answers, scores, {"contrast": None, "llm:big": None})
    (row,) = results.fluency(results.fluency_table(answers, scores, None), table, 0)
    assert (row["rating"]["n"], row["rating"]["mean"]) == (2, 3.0)


def test_spill_over_at_matched_strength_is_a_size():
    """What goes up along one trait and down along another is not nothing."""
    chosen = {"trait": "openness", "method": "npti", "alpha": 0.9, "target": 0.1}
    effect = {**chosen, "mean": 0.1, "ci95": None, "n": 1}
    sides = [{**chosen, "perplexity": value, "repetition": value / 10} for value in (2.0, 4.0)]
    spilt = [{"steered": "openness", "method": "npti", "alpha": alpha, "measured": measured, "mean": mean}
             for alpha, measured, mean in ((0.9, "openness", 7.0), (0.9, "neuroticism", -0.5), (0.9, "agreeableness", 0.25), (2.0, "neuroticism", 9.0))]
    costs = [{**chosen, "added": {"mean": value}, "quiz": {"mean": value}} for value in (0.25, 0.5)]
    row = results.at_matched_strength(chosen, [effect], sides, spilt, costs)
    assert (row["spill_over"], row["perplexity"], row["repetition"], row["added"], row["quiz"]) == (0.375, 3.0, pytest.approx(0.3), 0.375, 0.375)


def test_matched_strength_is_interpolated():

    def curve(method, points):
        return [{"trait": "openness", "judge": "contrast", "method": method, "alpha": alpha, "mean": mean, "ci95": [mean - 0.01, mean + 0.01]}
                for alpha, mean in points]

    effects = curve("npti", ((1.0, 0.1), (2.0, 0.3))) + curve("activation", ((0.5, 0.2), (1.0, 0.15), (2.0, 0.1)))
    found = {row["method"]: row for row in results.matched_alphas(effects)}
    assert found["npti"]["target"] == pytest.approx(0.18) and found["npti"]["alpha"] == pytest.approx(1.4)
    assert found["activation"]["alpha"] == pytest.approx(0.45), "the weakest dose that reaches it"
    assert results.matched_alphas(curve("npti", ((1.0, 0.1),))) == [], "nothing to match with"
    assert results.matched_alphas(curve("npti", ((1.0, -0.1),)) + curve("activation", ((1.0, 0.1),))) == []
    assert results.matched_alphas([]) == []
    wide = [{**row, "ci95": [-1.0, 1.0]} for row in curve("npti", ((1.0, 0.1), (2.0, 0.3)))]
    assert results.matched_alphas(wide + curve("activation", ((1.0, 0.15),))) == [], "noise above 0 is nothing to match with"
    assert results.matched_alphas([{**row, "ci95": None} for row in effects]) == [], "nor is a single question"
    sure = curve("npti", ((1.0, 0.1),)) + wide[1:] + curve("activation", ((1.0, 0.2),))
    assert [row["target"] for row in results.matched_alphas(sure)] == [pytest.approx(0.09)] * 2, "the unsure dose is no most"


# -------------------------------------------------------------------------------------------------------------- judges


def test_judges_agree_by_rank():
    """Spearman's correlation, ties and all, over the answers that both have scored."""
    from scipy.stats import spearmanr

    generator = np.random.default_rng(0)
    x = generator.integers(0, 9, 50).astype(float)  # with ties
    y = x + generator.normal(0, 3, 50)
    answers, scores = planted({("openness", "npti", 1.0, "high"): {"openness": x.tolist()}})
    scores += [score_line(f"opennessnpti1.0high{k}", "openness", float(value), "llm:big") for k, value in enumerate(y) if k]
    judges = {"contrast": None, "llm:big": None}
    (row,) = results.agreement(results.scored(answers, scores, judges), list(judges))
    assert (row["judges"], row["trait"], row["n"]) == (["contrast", "llm:big"], "openness", 49)
    assert row["spearman"] == pytest.approx(spearmanr(x[1:], y[1:]).statistic)
    same = [{**line, "score": 3.0} if line.get("judge") == "llm:big" else line for line in scores]
    assert results.agreement(results.scored(answers, same, judges), list(judges)) == [], "no ranks"


def test_accuracy_is_over_pairs():
    given = lambda high, low: table_of({("openness", "given", None, "high"): {"openness": high},  # noqa: E731
                                        ("openness", "given", None, "low"): {"openness": low}})
    table = given([3.0, 1.0], [2.0, 1.0])
    assert [(row["pairs"], row["accuracy"]) for row in results.accuracy(table)] == [(4, (1 + 1 + 0 + 0.5) / 4)]
    table = given(list(range(5000)), [0.5] * 5000)
    start = time.time()
    assert results.accuracy(table)[0]["accuracy"] == pytest.approx(4999 / 5000)
    assert time.time() - start < 2, "not pair by pair"


def test_self_reports_are_means_of_items():
    items = [("a", "openness", "Ideas", 1), ("b", "openness", "Values", -1), ("c", "neuroticism", "Anger", 1)]
    unedited, high, low = ({"method": method, "trait": trait, "pole": pole, "alpha": alpha} for method, trait, pole, alpha in (
        ("unedited", None, None, None), ("npti", "openness", "high", 1.0), ("npti", "openness", "low", 1.0)))
    rows, people = results.questionnaire([(unedited, [3.0, 4.0, 2.0]), (high, [5.0, 4.0, 2.0]), (low, [2.0, 2.0, 3.0])], items, 0)
    assert [(row["method"], row["trait"], row["pole"], row["n"], row["mean"], row["variance"]) for row in rows] == [
        ("unedited", "openness", None, 2, 3.5, 0.25), ("unedited", "neuroticism", None, 1, 2.0, 0.0),
        ("npti", "openness", "high", 2, 4.5, 0.25), ("npti", "openness", "low", 2, 2.0, 0.0)], "of all traits where none is meant"
    facets = {"Ideas": 5.0, "Values": 4.0, "Anger": 2.0}
    assert people[1] == {**high, "traits": {"openness": 4.5, "neuroticism": 2.0}, "facets": facets}
    matrix = results.questionnaire_spill_over(people)
    assert {row["ci95"] for row in matrix} == {None}
    assert [(row["steered"], row["measured"], row["mean"]) for row in matrix] == [
        ("openness", "openness", 2.5), ("openness", "neuroticism", -1.0)]


# ---------------------------------------------------------------------------------------------------------- characters


def test_requested_and_measured():
    """Planted: one way hits every strength, one drags the neighbour along, one does the opposite."""
    baseline = {trait: 0.1 * k for k, trait in enumerate(TRAITS)}
    condition = lambda *values: dict(zip(results.CONDITION, values))  # noqa: E731
    means = [(condition("unedited", "openness", None, None), baseline)]
    for trait in TRAITS:  # what a trait alone does: twice as far up as down
        for pole, effect in zip(POLES, (2.0, -1.0)):
            means.append((condition("npti", trait, pole, 1.5), {trait: baseline[trait] + effect}))
            means.append((condition("trained", trait, pole, 1.0), {trait: baseline[trait] + 3 * effect}))
    characters = evaluate.random_characters(20, 1.5, 0)
    for alphas in characters:
        own = [alpha / 1.5 * (2.0 if alpha > 0 else 1.0) for alpha in alphas]
        drag = [0.5 if alpha == 0 else 0.0 for alpha in alphas]
        for way, effects in (("composed", own), ("added", [a + b for a, b in zip(own, drag)]),
                             ("levels", [3 * a for a in own]),
                             ("described", [-a for a in own])):
            measured = {trait: baseline[trait] + effect for trait, effect in zip(TRAITS, effects)}
            means.append((condition(way, None, None, alphas), measured))
    (first, second, levels, third), points = results.characters_measured(means, "contrast", 1.5, 0)
    assert [row["method"] for row in (first, second, third)] == ["composed", "added", "described"] and len(points) == 4 * 20 * 5
    assert first["error"]["mean"] == pytest.approx(0) and first["spill_over"]["mean"] == pytest.approx(0)
    assert first["correlation"]["mean"] > 0.9 and third["correlation"]["mean"] == pytest.approx(-first["correlation"]["mean"])
    assert levels["error"]["mean"] == pytest.approx(0), "held against what trained edits alone do"
    assert second["spill_over"]["mean"] == pytest.approx(0.5) and second["error"]["mean"] == pytest.approx(0.5 * 2 / 5)
    assert second["more_than_composed"]["spill_over"]["ci95"] == pytest.approx([0.5, 0.5])
    assert third["more_than_composed"]["correlation"]["ci95"][1] < -1


def test_one_character_has_no_interval():
    condition = lambda *values: dict(zip(results.CONDITION, values))  # noqa: E731
    means = [(condition("unedited", "openness", None, None), dict.fromkeys(TRAITS, 3.0))]
    means += [(condition(method, trait, pole, 1.5), {trait: 4.0}) for trait in TRAITS for pole in POLES for method in ("npti", "trained")]
    means += [(condition(way, None, None, (1.0, 0.0, -1.0, 0.5, 0.0)), dict.fromkeys(TRAITS, 3.5)) for way in results.WAYS]
    rows, _ = results.characters_measured(means, "contrast", 1.5, 0)
    assert all(row["spill_over"] == {"mean": pytest.approx(0.5), "ci95": None} for row in rows)
    assert all(row["correlation"] is row["more_than_composed"]["correlation"] is None for row in rows), "one point correlates with nothing"


def test_rounding_is_no_correlation():
    """Of a way that moves nothing, but for the last bit of one measure."""
    condition = lambda *values: dict(zip(results.CONDITION, values))  # noqa: E731
    means = [(condition("unedited", "openness", None, None), dict.fromkeys(TRAITS, 3.0))]
    means += [(condition(method, trait, pole, strength), {trait: 3.0})
              for trait in TRAITS for pole in POLES for method, strength in (("npti", 1.5), ("trained", 1.0))]
    for number, alphas in enumerate(evaluate.random_characters(3, 1.5, 0)):
        measured = dict.fromkeys(TRAITS, 3.0 + 4e-16 * (number == 1))
        means += [(condition(way, None, None, alphas), measured) for way in results.WAYS]
    rows, _ = results.characters_measured(means, "questionnaire", 1.5, 0)
    assert [row["correlation"]["mean"] for row in rows] == [0.0] * 4


def test_a_trait_that_nothing_moves_has_no_correlation():
    """It is none of those whose mean is taken."""
    asked = [(1.0, -1.0, 0.0, 0.5, 0.0), (-1.0, 0.5, 0.5, 0.0, 0.0), (0.5, 1.0, -1.0, -0.5, 0.0)]
    points = [{"requested": alpha, "measured": 2 * alpha * (k > 0), "expected": 0.0} for alphas in asked for k, alpha in enumerate(alphas)]
    assert results.way_figures(points, np.arange(3)[None])["correlation"] == pytest.approx([1.0])


def test_an_inventory_of_one_item():
    rows, people = results.questionnaire([({"method": "unedited", "trait": None, "pole": None, "alpha": None}, [4])],
                                         [("I like it", "agreeableness", "Trust", 1)], 0)
    assert [row["trait"] for row in rows] == ["agreeableness"] and people[0]["traits"] == {"agreeableness": 4.0}


def test_what_an_edit_costs_is_no_other_thing():
    assert grid.is_cost({"quiz": [0, 1, 1.0], "added": [0.1]}) and grid.is_cost({"tasks": {}})
    for wrong in ({}, {"quiz": []}, {"quiz": [2]}, {"quiz": ["1"]}, {"quiz": [[1]]}, {"quiz": 1}, {"quiz": [1], "added": [None]}):
        assert not grid.is_cost(wrong)
    assert estimates.share([0, 1, 1.0])["mean"] == 2 / 3
