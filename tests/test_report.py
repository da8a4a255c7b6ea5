"""Tables, pictures and the page, of planted figures; what the terminal shows; two folders side by side."""

import base64
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import evaluate
from conftest import main_of
from personality import POLES, TRAITS, UserError
from personality.report import (around, by_judge, matrices_of, pictures_of, plot_characters, plot_dose, plot_effects, plot_layers, plot_matrices,
                                plot_self_report, show, tables_of, write_reports)
from personality.results import EDITS, WAYS

HEAD = "a model, float32 on cpu; judges: contrast, llm."


def estimate(mean):
    return {"n": 4, "mean": mean, "ci95": [mean - 0.01, mean + 0.01]}


def condition(method, trait, pole, alpha=None):
    return {"method": method, "trait": trait, "pole": pole, "alpha": alpha}


@pytest.fixture
def found():
    """Figures of every kind, as evaluate.py has them."""
    methods = (("persona", None), ("npti", 1.5))
    sides = [condition("unedited", "openness", None),
             *(condition(method, "openness", pole, alpha) for method, alpha in methods for pole in POLES)]
    effects = [{"method": method, "trait": trait, "alpha": alpha, **estimate(0.1 * k), "judge": judge,
                **({"paper": {"mean": 6.1, "variance": 0.5}} if judge != "contrast" else {})}
               for judge in ("contrast", "llm:big") for trait in TRAITS[:2] for k, (method, alpha) in enumerate(methods)]
    traits = {trait: 3.0 + k / 10 for k, trait in enumerate(TRAITS)}
    points = [{"method": way, "judge": "contrast", "character": [1.0] * 5, "trait": trait, "requested": 1.0, "expected": 0.1,
               "measured": 0.1} for way in WAYS for trait in TRAITS]
    distances = {name: estimate(0.25) for name in ("correlation", "error", "spill_over")}
    return {
        "summary": [{**row, **estimate(0.01), "judge": "contrast", "variance": 1e-6, "perplexity": 7.25, "repetition": 0.125}
                    for row in sides],
        "effects": effects,
        "beside": [{**row, **estimate(0.02), "judge": "contrast", "times": estimate(1.25)} for row in sides[1:]],
        "between": [{"method": "npti", "trait": "openness", "alpha": 1.5, **estimate(0.02), "judge": "contrast",
                     "other": "persona", "other_alpha": None}],
        "fluency": [{**row, "n": 4, "perplexity": 7.25, "repetition": 0.125, "tokens": 11.0, "rating": estimate(4.0)}
                    for row in sides],
        "spill_over": [{"method": "npti", "alpha": 1.5, "steered": steered, "measured": measured, "judge": judge, **estimate(0.003),
                        **({"n": 1, "ci95": None} if judge == "questionnaire" else {"noise": 0.001})}
                       for judge in ("contrast", "questionnaire") for steered in TRAITS[:2] for measured in TRAITS],
        "dose": [{"method": method, "trait": trait, "alpha": alpha, **estimate(alpha / 10), "judge": "contrast",
                  "perplexity": 8.0 + alpha} for method in EDITS for trait in TRAITS[:2] for alpha in (0.5, 1.0)],
        "matched": [{"trait": "openness", "method": "npti", "alpha": 0.9, "target": 0.1, **estimate(0.1), "perplexity": 7.0,
                     "repetition": 0.1, "spill_over": 0.002, "added": 0.05, "quiz": 0.5}],
        "capability": [{**sides[0], "added": estimate(0.0), "agreement": estimate(1.0), "quiz": estimate(0.5)},
                       {**sides[1], "quiz": estimate(0.25)}],
        "harness": [{**sides[0], "task": "gsm8k", "metric": "acc", "value": 0.5}],
        "questionnaire": [{**row, "trait": row["pole"] and row["trait"], "traits": traits, "facets": {},
                           "percentiles": dict.fromkeys(TRAITS, 50)} for row in sides],
        "agreement": [{"judges": ["contrast", "llm:big"], "trait": "openness", "n": 9, "spearman": 0.5}],
        "accuracy": [{"judge": "contrast", "trait": "openness", "pairs": 9, "accuracy": 0.75}],
        "characters": [{"method": way, "judge": "contrast", "n": 3, **distances, "more_than_composed": distances,
                        "perplexity": 7.0} for way in WAYS],
        "requested": points}


def files():
    """Neurons of two traits, as the picture of the layers takes them."""
    select = lambda pole: (torch.tensor([0, 1, 1]), None, None, None)  # noqa: E731
    return {trait: SimpleNamespace(shape=(2, 48), select=select, trained_key="", tensors={}) for trait in TRAITS[:2]}


def answers_of(*texts):
    return [{"trait": "openness", "question": "w10 ?", "method": "given", "alpha": None, "pole": pole, "answer": text}
            for pole, text in zip(POLES, texts)]


# -------------------------------------------------------------------------------------------------------------- tables


def test_every_kind_of_figure_has_its_table(found):
    tables = {title: (columns, rows) for title, _, columns, rows in tables_of(found)}
    assert list(tables) == ["Scores", "High minus low", "Each pole beside the unedited model", "Methods compared", "Fluency", "Spill-over in all", "Spill-over: npti 1.5, contrast",
                            "Spill-over: npti 1.5, questionnaire", "Characters", "Characters: more than composed",
                            "At matched strength", "Capability", "lm-evaluation-harness", "Questionnaire", "Do the judges agree?",
                            "Accuracy"]
    for title, (columns, rows) in tables.items():
        assert rows and all(len(row) == len(columns) for row in rows), title
    assert tables["Scores"][1][0] == ["openness", "unedited", "", "contrast", 4, "+10.0 (+0.0 to +20.0)", "1", "7.2", "12.5%"]
    assert tables["High minus low"][1][-1] == [
        "conscientiousness", "npti 1.5", "llm:big", 4, "+0.10 (+0.09 to +0.11)", "6.10 (0.50)"]
    assert tables["Methods compared"][1] == [["openness", "contrast", "npti 1.5", "persona", 4, "+20.0 (+10.0 to +30.0)"]]
    assert tables["At matched strength"][1] == [
        ["openness", "npti", "0.9", "+100.0 (+90.0 to +110.0)", "7.0", "10.0%", "2.0", "+0.050", "50%"]]
    assert tables["Capability"][1][1] == ["persona", "openness", "high", "", "", "25% (24% to 26%)"], "a prompt is in no text"
    assert tables["Questionnaire"][1][0] == ["unedited", "", "", "3.00 (50)", "3.10 (50)", "3.20 (50)", "3.30 (50)", "3.40 (50)"]
    assert [row[1] for row in tables["Characters: more than composed"][1]] == ["added", "levels", "described"]


def test_each_figure_stands_under_its_title(found):
    """Of figures that differ: else one could stand for another."""
    distances = {name: estimate(value) for name, value in (("correlation", 0.5), ("error", 0.25), ("spill_over", 0.125))}
    way = {**found["characters"][1], **distances, "more_than_composed": {name: estimate(row["mean"] / 10) for name, row in distances.items()}}
    turn = {"turn": 2, **condition("npti", "openness", None, 1.5), **estimate(0.1), "judge": "contrast", "perplexity": 8.0, "unedited": 4.0,
            "repetition": 0.25}
    spilt = [{**row, "mean": k / 1000, "n": 4 + k, "ci95": row["ci95"]} for k, row in enumerate(found["spill_over"])]
    notes = {title: note for title, note, *_ in tables_of({"spill_over": spilt})}
    assert "Of 4 questions" in notes["Spill-over: npti 1.5, contrast"], "the fewest"
    tables = {title: [dict(zip(columns, row)) for row in rows] for title, _, columns, rows in tables_of(
        {"characters": [way], "conversations": [turn], "spill_over": spilt, "fluency": found["fluency"]})}
    (first,), (more,) = tables["Characters"], tables["Characters: more than composed"]
    titles = ("correlation", "mean error", "spill-over")
    assert [first[title].split()[0] for title in titles] == ["0.50", "250.0", "125.0"]
    assert [more[title].split()[0] for title in titles] == ["+0.05", "+25.0", "+12.5"]
    (talk,) = tables["Over a conversation"]
    assert (talk["turn"], talk["perplexity"], talk["unedited"], talk["repetition"]) == (2, "8.0", "4.0", "25.0%")
    second = tables["Spill-over: npti 1.5, contrast"][1]
    assert second["steered"] == TRAITS[1] and [second[trait] for trait in TRAITS] == [f"+{k}.0 (-7.0 to +13.0)" for k in range(5, 10)]
    said = tables["Spill-over: npti 1.5, questionnaire"][0]
    assert [said[trait] for trait in TRAITS] == ["+0.01"] * 5, "no questions, no interval"
    in_all, of_self = tables["Spill-over in all"]
    assert list(in_all.values()) == ["contrast", "npti 1.5", 4, "3.0", "4.9", "1.62", "0.33"]
    assert list(of_self.values()) == ["questionnaire", "npti 1.5", 14, "0.01", "0.01", "1.14", ""]


def test_nothing_is_shown_that_was_not_measured(found):
    assert list(tables_of({})) == [] and list(pictures_of({}, {})) == []
    assert [title for title, *_ in tables_of({"summary": found["summary"], "dose": [], "accuracy": []})] == ["Scores"]


def test_columns_of_a_matrix_stand_in_the_traits_order(found):
    """Whatever the order in which they were measured: the steered trait first, in a run."""
    first_measured = sorted(found["spill_over"], key=lambda row: row["measured"] != row["steered"])
    columns = [columns for title, _, columns, _ in tables_of({"spill_over": first_measured}) if "contrast" in title]
    assert columns == [["steered", *TRAITS]]


def test_a_matrix_needs_more_than_the_steered_trait(found):
    own = [row for row in found["spill_over"] if row["measured"] == row["steered"]]
    assert matrices_of({"spill_over": own[:1]}) == {}, "of one trait, its own"
    assert matrices_of({"spill_over": [{**row, "method": "simple", "alpha": None} for row in found["spill_over"]]}) == {}
    cells = matrices_of(found)["contrast", "npti 1.5"]
    assert len(cells) == 2 * 5 and cells["openness", "neuroticism"]["mean"] == 0.003


# ------------------------------------------------------------------------------------------------------------ pictures


def test_every_kind_of_figure_has_its_picture(found):
    captions, pictures = zip(*pictures_of(found, files()))
    # effects by two judges; characters; dose; two matrices; self-report; layers
    assert len(pictures) == 8
    for picture in map(base64.b64decode, pictures):
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert "llm:big judge" in captions[1] and "what was requested of each trait" in captions[2]


def drawing(draw, *arguments):
    figure = Figure(layout="constrained")
    draw(figure, *arguments)
    return figure.axes


def test_effects_stand_where_they_were_measured(found):
    rows = by_judge(found["effects"])["contrast"]
    (axes,) = drawing(plot_effects, rows)
    means = sorted(float(container.lines[0].get_xdata()[0]) for container in axes.containers)
    assert means == pytest.approx(sorted(1000 * row["mean"] for row in rows)) and "thousandths of a nat" in axes.get_xlabel()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(TRAITS[:2])
    ends = sorted([end[0] for end in container.lines[2][0].get_segments()[0]] for container in axes.containers)
    assert np.allclose(ends, sorted([1000 * end for end in row["ci95"]] for row in rows))


def test_dose_response_is_of_every_method(found):
    left, right = drawing(plot_dose, found["dose"])
    assert len(left.lines) == len(EDITS) * (2 + 1) and len(right.lines) == len(EDITS), "traits and their mean; perplexity"
    assert [list(line.get_ydata()) for line in left.lines if line.get_linewidth() == 2] == [pytest.approx([0, 50, 100])] * len(EDITS)
    assert [text.get_text() for text in left.get_legend().get_texts()] == list(EDITS)


def test_matrices_have_the_traits_in_order(found):
    of_judge = {name: cells for (judge, name), cells in matrices_of(found).items() if judge == "contrast"}
    first, *_ = drawing(plot_matrices, of_judge, "contrast")
    shown = first.images[0].get_array().astype(float).filled(np.nan)
    assert shown.shape == (2, 5) and np.allclose(shown, 3), "three were not steered"
    assert [label.get_text() for label in first.get_yticklabels()] == list(TRAITS[:2])
    assert {text.get_weight() for text in first.texts} == {"normal"}, "0 is in every interval"
    of_judge["npti 1.5"]["openness", "neuroticism"] = {"steered": "openness", "measured": "neuroticism", "mean": 0.003, "ci95": [0.001, 0.005]}
    first, *_ = drawing(plot_matrices, of_judge, "contrast")
    assert [text.get_weight() for text in first.texts] == ["normal"] * 4 + ["bold"] + ["normal"] * 5
    some = {cell: value for cell, value in of_judge["npti 1.5"].items() if cell[0] == TRAITS[1]}
    first, second = drawing(plot_matrices, {"npti 1.5": of_judge["npti 1.5"], "persona": some}, "contrast")[:2]
    shown = second.images[0].get_array().astype(float).filled(np.nan)
    assert bool(np.isnan(shown[0]).all()) and np.allclose(shown[1], 3), "this method steered the second only"


def test_a_matrix_has_no_row_of_a_trait_that_was_not_measured_itself():
    """An inventory may have items of some traits only."""
    row = lambda steered, measured, mean: {"judge": "questionnaire", "method": "npti", "alpha": 1.5, "steered": steered, "measured": measured,  # noqa: E731
                                           "mean": mean, "n": 1, "ci95": None}
    spilt = [row(steered, measured, 9.0 if steered == "openness" else 2.0) for steered in ("openness", "neuroticism") for measured in TRAITS[3:]]
    axes, bar = drawing(plot_matrices, {name: cells for (_, name), cells in matrices_of({"spill_over": spilt}).items()}, "questionnaire")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["neuroticism"] and [text.get_text() for text in axes.texts] == ["+2.00"] * 2
    assert bar.get_ylim() == (-2, 2)


def test_self_report_shows_low_unedited_and_high(found):
    (axes,) = drawing(plot_self_report, found["questionnaire"])
    assert [line.get_label() for line in axes.lines] == ["low", "unedited", "high"]
    assert axes.get_title(loc="left") == "openness steered"
    assert [list(line.get_xdata()) for line in axes.lines] == [pytest.approx([3.0, 3.1, 3.2, 3.3, 3.4])] * 3
    more = [{**row, "alpha": 3.0} for row in found["questionnaire"] if row["method"] == "npti"]
    assert "at alpha 3," in list(pictures_of({"questionnaire": found["questionnaire"] + more}, {}))[0][0], "the strongest"


def test_characters_stand_where_they_were_measured(found):
    points = [{**point, "requested": k / 4, "measured": k / 8, "expected": k / 2} for k, point in enumerate(found["requested"])]
    dots = [dot.get_offsets().tolist()[0] for axes in drawing(plot_characters, points) for dot in axes.collections]
    assert dots == [[k / 4, 1000 * k / 8] for k in range(len(points))]


def test_layers_show_neurons_of_both_poles():
    first, second = drawing(plot_layers, files(), "npti")
    assert [bar.get_height() for bar in first.patches] == [1, 2, -1, -2], "high upward, low downward"


def test_layers_are_those_of_the_method_that_was_asked_for(found):
    trained, place = files(), lambda *layers: torch.tensor([[layer, 5] for layer in layers])
    for neurons in trained.values():
        neurons.trained_key, neurons.tensors = "x", {"high_place": place(0, 0, 0), "low_place": place(1)}
    first, _ = drawing(plot_layers, trained, "trained")
    assert [bar.get_height() for bar in first.patches] == [3, 0, 0, -1]
    captions = lambda method, some: [caption for caption, _ in pictures_of(  # noqa: E731
        {"summary": [{"method": method}]}, some) if "by layer" in caption]
    assert [len(captions(*of)) for of in (("persona", trained), ("trained", trained), ("trained", files()))] == [0, 1, 0]
    assert "trained edits" in captions("trained", trained)[0] and "NPTI" in captions("npti", trained)[0]


def test_one_value_has_no_interval(found):
    (axes,) = drawing(plot_effects, [{**row, "ci95": None} for row in by_judge(found["effects"])["contrast"]])
    assert axes.containers and not any(container[2] for container in axes.containers), "no bars"
    assert around({"mean": 0.0125, "ci95": None}, "contrast") == "+12.5 (one value, no interval)"


# --------------------------------------------------------------------------------------------------------------- files


def test_files_hold_the_figures(found, tmp_path):
    write_reports(tmp_path, {"head": HEAD, **found}, answers_of("w1", "w2"), files())
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "details.json", "report.md", "report.html"}
    details = json.loads((tmp_path / "details.json").read_text())
    assert json.loads((tmp_path / "summary.json").read_text()) == found["summary"]
    assert details == {"head": HEAD, **{name: rows for name, rows in found.items() if name != "summary"}}
    report, page = (tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()
    for title, note, *_ in tables_of(found):
        assert f"## {title}" in report and note in report and f"<summary>{title}</summary>" in page
    assert HEAD in report and HEAD in page and page.count("data:image/png;base64,") == 8


def test_page_stands_alone_and_trusts_no_answer(found, tmp_path):
    some = {"head": HEAD, "summary": found["summary"], "effects": found["effects"]}
    write_reports(tmp_path, some, answers_of(*(f"<script>alert('{pole}')</script> | w1" for pole in POLES)), {})
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(&#39;high&#39;)" in page
    assert not re.search(r"(src|href)=.http", page)


def test_the_terminal_shows_low_high_and_their_difference(found, capsys):
    show(found["summary"], [row for row in found["effects"] if row["trait"] == "openness"], "contrast")
    shown = capsys.readouterr().out
    assert "contrast judge, thousandths of a nat a token" in shown and "unedited +10.0, perplexity 7.2" in shown
    line = next(line for line in shown.splitlines() if "npti 1.5" in line)
    moved = [{**row, **estimate({"low": -0.02, "high": 0.03}.get(row["pole"], 0)), "perplexity": {"low": 6.0}.get(row["pole"], 9.0)}
             for row in found["summary"]]
    show(moved, [], "contrast")
    assert re.search(r"npti 1.5 +-20.0 +\+30.0 +6.0 / 9.0", capsys.readouterr().out), "low, then high"
    assert re.search(r"npti 1.5 +\+10.0 +\+10.0 +\+100.0 \(\+90.0 to \+110.0\) +7.2 / 7.2", line)


# ------------------------------------------------------------------------------------------------------------- compare


def test_two_folders_side_by_side(found, monkeypatch, tmp_path, capsys):
    """Differences where both have a row, and what each was made with; as Markdown."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, alpha, more in ((first, 1.5, 0), (second, 3.0, 0.005)):
        folder.mkdir()
        rows = [{**row, "alpha": row["alpha"] and alpha, "mean": row["mean"] + (more if row["method"] == "unedited" else 0)}
                for row in found["summary"]]
        write_reports(folder, {"head": f"alpha {alpha:g}; judges: contrast.", "summary": rows}, [], {})
    main_of(evaluate, monkeypatch, "--compare", first, second)
    head, _, other, _, *lines = capsys.readouterr().out.splitlines()
    assert head == f"{first}: alpha 1.5; judges: contrast." and other == f"{second}: alpha 3; judges: contrast."
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["judge", "trait", "method", "pole", str(first), str(second), "difference", f"fluency {first}",
                        f"fluency {second}"]
    rows = {tuple(row[2:4]): row[4:] for row in cells[2:]}
    assert rows["persona", "high"] == ["+10.0 (+0.0 to +20.0)"] * 2 + ["+0.0", "7.2 / 12.5%", "7.2 / 12.5%"], "the same answers"
    assert rows["unedited", ""][2] == "+5.0"
    assert rows["npti 1.5", "high"][1:] == ["", "", "7.2 / 12.5%", ""] and rows["npti 3", "low"][0] == "", "of one folder only"


@pytest.mark.parametrize("name", ("summary.json", "details.json"))
def test_a_folder_without_results_is_named(found, monkeypatch, tmp_path, name):
    write_reports(tmp_path, {"head": HEAD, "summary": found["summary"]}, [], {})
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"--compare: {tmp_path} holds no summary.json and details.json.*{name}"):
        main_of(evaluate, monkeypatch, "--compare", tmp_path, tmp_path)
    (tmp_path / name).write_text('["head"]')
    with pytest.raises(UserError, match="details.json of evaluate.py, but some of another form$"):
        main_of(evaluate, monkeypatch, "--compare", tmp_path, tmp_path)
