"""What evaluate.py shows: tables and pictures of its figures (results.py), a page, a table in the terminal."""

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
from rich.text import Text

from . import POLES, TRAITS
from .estimates import mean_of
from .questions import text_table
from .results import EDITS, WAYS, distinct, only, spilt_in_all
from .store import markdown, read_text, parse_json, rendered, write_atomically
from .terminal import UserError, show_table

os.environ["MPLBACKEND"] = "agg"  # pictures are files here, and matplotlib refuses a notebook's backend that is not installed

from matplotlib.figure import Figure  # noqa: E402

COLOURS = {"unedited": "#000000", "simple": "#56B4E9", "persona": "#E69F00", "npti": "#D55E00",  # Okabe and Ito's
           "activation": "#0072B2", "dpn-le": "#CC79A7", "trained": "#009E73", "hybrid": "#F0E442", "given": "#999999",
           "residual": "#8B5A2B", "lora": "#7F7F00"}
POLE_COLOURS = {"high": "#D55E00", "low": "#0072B2", "unedited": "#000000"}
FORMATS = {"perplexity": ".1f", "repetition": ".1%", "tokens": ".0f", "added": "+.3f", "quiz": ".0%",
           "share": ".2f", "noise": ".2f"}


def named(row: dict, prefix: str = "") -> str:
    method, alpha = row[prefix or "method"], row[f"{prefix}_alpha" if prefix else "alpha"]
    return method if alpha is None else f"{method} {alpha:g}"


def unit_of(judge: str) -> tuple[float, int, str]:
    """(factor, decimals, words) to show a judge's scores in."""
    return (1000, 1, "thousandths of a nat a token") if judge == "contrast" else (1, 2, "points of 1 to 5")


def shown(value, judge: str, sign: str = "+") -> str:
    scale, digits, _ = unit_of(judge)
    return "" if value is None else f"{scale * value:{sign}.{digits}f}"


def around(row: dict | None, judge: str = "", form: str | None = None, sign: str = "+") -> str:
    """A mean with its interval, in the judge's unit or in a format of one's own."""
    if row is None:
        return ""
    mean, *ends = (format(value, form) if form else shown(value, judge, sign) for value in (row["mean"], *(row["ci95"] or ())))
    return f"{mean} ({' to '.join(ends) or 'one value, no interval'})"


def figures(row: dict, *names: str) -> list[str]:
    """Figures of a row, "" where it has none."""
    return ["" if row.get(name) is None else format(row[name], FORMATS[name]) for name in names]


# -------------------------------------------------------------------------------------------------------------- tables


def distances(row: dict, of: dict, sign: str) -> list[str]:
    error, spill_over = (around(of[name], row["judge"], sign=sign) for name in ("error", "spill_over"))
    return [around(of["correlation"], form=f"{sign}.2f"), error, spill_over]


def self_report(row: dict) -> list[str]:
    cells, norms = {trait: f"{mean:.2f}" for trait, mean in row["traits"].items()}, row["percentiles"] or {}
    return [cells.get(trait, "") + (f" ({norms[trait]:.0f})" if trait in norms else "") for trait in TRAITS]


CELLS = {  # by table: what a row of figures shows, in the order of texts/tables.toml's columns
    "summary": lambda row: [row["trait"], named(row), row["pole"], row["judge"], row["n"], around(row, row["judge"]),
                            f"{unit_of(row['judge'])[0] ** 2 * row['variance']:.3g}", *figures(row, "perplexity", "repetition")],
    "effects": lambda row: [row["trait"], named(row), row["judge"], row["n"], around(row, row["judge"]),
                            "{mean:.2f} ({variance:.2f})".format(**row["paper"]) if "paper" in row else ""],
    "beside": lambda row: [row["trait"], named(row), row["pole"], row["judge"], row["n"], around(row, row["judge"]),
                           around(row["times"], form=".2f")],
    "between": lambda row: [row["trait"], row["judge"], named(row), named(row, "other"), row["n"], around(row, row["judge"])],
    "fluency": lambda row: [row["trait"], named(row), row["pole"], row["n"], *figures(row, "perplexity", "repetition", "tokens"),
                            around(row["rating"], form=".2f")],
    "conversations": lambda row: [row["turn"], row["trait"], named(row), row["n"], around(row, row["judge"]),
                                  *figures(row, "perplexity"), *figures({"perplexity": row["unedited"]}, "perplexity"),
                                  *figures(row, "repetition")],
    "characters": lambda row: [row["judge"], row["method"], row["n"], *distances(row, row, ""), *figures(row, "perplexity")],
    "spilt": lambda row: [row["judge"], named(row), row["n"], *(shown(row[name], row["judge"], "") for name in ("own", "others")),
                          *figures(row, "share", "noise")],
    "more_than_composed": lambda row: [row["judge"], row["method"], *distances(row, row["more_than_composed"], "+")],
    "matched": lambda row: [row["trait"], row["method"], f"{row['alpha']:g}", around(row, "contrast"),
                            *figures(row, "perplexity", "repetition"), shown(row.get("spill_over"), "contrast", ""),
                            *figures(row, "added", "quiz")],
    "capability": lambda row: [named(row), row["trait"], row["pole"], around(row.get("added"), form="+.3f"),
                               around(row.get("agreement"), form=".1%"), around(row["quiz"], form=".0%")],
    "harness": lambda row: [named(row), row["trait"], row["pole"], row["task"], row["metric"], f"{row['value']:.4f}"],
    "questionnaire": lambda row: [named(row), row["trait"], row["pole"], *self_report(row)],
    "agreement": lambda row: [" / ".join(row["judges"]), row["trait"], row["n"], f"{row['spearman']:+.2f}"],
    "accuracy": lambda row: [row["judge"], row["trait"], row["pairs"], f"{row['accuracy']:.0%}"],
}


def tables_of(found: dict):
    """Yield (title, note, column titles, rows) of every table that the figures allow: for Markdown and HTML alike."""
    found = {**found, "more_than_composed": [row for row in found.get("characters", ()) if row["method"] != WAYS[0]],
             "spilt": spilt_in_all([row for cells in matrices_of(found).values() for row in cells.values()])}
    for name, text in text_table("tables.toml").items():
        if found.get(name):
            cells = [["" if cell is None else cell for cell in CELLS[name](row)] for row in found[name]]
            yield text["title"], text["note"], text["columns"], cells
        if name == "spilt":
            yield from matrix_tables(found)


def matrix_tables(found: dict):
    for (judge, method), cells in matrices_of(found).items():
        steered, measured = ([trait for trait in TRAITS if trait in traits] for traits in zip(*cells))
        number = min(row["n"] for row in cells.values())
        of_few = f" Of {number} questions, whose noise is off the diagonal, too." if judge == "contrast" else ""
        note = f"High minus low along each trait (columns) of what was steered along one (rows), in {unit_of(judge)[2]}.{of_few}"
        shown_cells = {of: around(row, judge) if row["ci95"] else shown(row["mean"], judge) for of, row in cells.items()}
        yield (f"Spill-over: {method}, {judge}", note, ["steered", *measured],
               [[trait, *(shown_cells.get((trait, other), "") for other in measured)] for trait in steered])


def matrices_of(found: dict) -> dict:
    """(judge, method) -> {(steered, measured): row}, where more than the steered trait was measured."""
    matrices = {}
    for row in found.get("spill_over", ()):
        matrices.setdefault((row["judge"], named(row)), {})[row["steered"], row["measured"]] = row
    return {key: cells for key, cells in matrices.items() if key[1] != "simple" and len({measured for _, measured in cells}) > 1}


# ------------------------------------------------------------------------------------------------------------ pictures


def legend_of_first(figure, where: str, columns: int) -> None:
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc=f"outside {where} center", ncols=columns, frameon=False)


def plot_effects(figure, rows: list[dict]) -> None:
    traits, methods = distinct(rows, "trait"), list(dict.fromkeys(map(named, rows)))
    scale, _, unit = unit_of(rows[0]["judge"])
    figure.set_size_inches(8, 1.2 + 0.22 * len(rows) + 0.2 * len(traits))
    axes = figure.subplots()
    for row in rows:
        k = methods.index(named(row))
        y = traits.index(row["trait"]) + (k - (len(methods) - 1) / 2) * 0.8 / len(methods)
        mean = scale * row["mean"]
        reach = [[abs(scale * end - mean)] for end in row["ci95"] or ()] or None
        axes.errorbar(mean, y, xerr=reach, fmt="osD^v<>ph"[k % 9], color=COLOURS[row["method"]], capsize=3,
                      markersize=5, label=named(row) if row["trait"] == traits[0] else None)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(traits)), traits)
    axes.invert_yaxis()
    axes.set_xlabel(f"high minus low, {unit} (95 % interval)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def plot_dose(figure, dose: list[dict]) -> None:
    figure.set_size_inches(8, 3.6)
    left, right = figure.subplots(1, 2)
    for method in distinct(dose, "method"):
        rows, colour = only(dose, method=method), COLOURS[method]
        style = {"color": colour, "linewidth": 2, "label": method, "marker": "o^Dsv"[EDITS.index(method)]}
        for trait in distinct(rows, "trait"):
            curve = sorted([(0, 0), *((row["alpha"], 1000 * row["mean"]) for row in only(rows, trait=trait))])
            left.plot(*zip(*curve), color=colour, alpha=0.3, linewidth=1)
        alphas = sorted(distinct(rows, "alpha"))
        effects, perplexities = ([mean_of(row[name] for row in only(rows, alpha=alpha)) for alpha in alphas]
                                 for name in ("mean", "perplexity"))
        left.plot([0, *alphas], [0, *(1000 * effect for effect in effects)], **style)
        right.plot(alphas, perplexities, **style)
    left.set(xlabel="alpha, or level", ylabel="high minus low,\nthousandths of a nat a token")
    right.set(xlabel="alpha, or level", ylabel="perplexity of the answers\n(median; mean over poles and traits)")
    left.legend(frameon=False)


def plot_matrices(figure, matrices: dict, judge: str) -> None:
    scale, _, unit = unit_of(judge)
    rows = [trait for trait in TRAITS if any((trait, trait) in cells for cells in matrices.values())]
    figure.set_size_inches(3 * len(matrices) + 3, max(2.8, 1.5 + 0.5 * len(rows)))
    most = scale * max(abs(row["mean"]) for cells in matrices.values() for row in cells.values() if row["steered"] in rows)
    for axes, (name, cells) in zip(np.atleast_1d(figure.subplots(1, len(matrices), sharey=True)), matrices.items()):
        grid = np.full((len(rows), len(TRAITS)), np.nan)
        for row in (row for row in cells.values() if row["steered"] in rows):
            y, x, value = rows.index(row["steered"]), TRAITS.index(row["measured"]), scale * row["mean"]
            grid[y, x], sure = value, row["ci95"] and not row["ci95"][0] <= 0 <= row["ci95"][1]
            axes.text(x, y, f"{value:+.0f}" if scale > 1 else f"{value:+.2f}", ha="center", va="center", fontsize=8,
                      weight="bold" if sure else "normal", color="white" if abs(value) > 0.65 * most else "black")
        picture = axes.imshow(grid, cmap="PuOr_r", vmin=-most, vmax=most)
        axes.set_xticks(range(len(TRAITS)), [trait[:5] + "." for trait in TRAITS], rotation=40)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("measured")
    figure.axes[0].set_ylabel("steered")
    figure.colorbar(picture, ax=figure.axes, shrink=0.75, label=f"high minus low,\n{unit}")


def plot_characters(figure, points: list[dict]) -> None:
    scale, _, unit = unit_of(points[0]["judge"])
    figure.set_size_inches(9, 3.6)
    for axes, way in zip(figure.subplots(1, len(WAYS), sharey=True), WAYS):
        for k, trait in enumerate(TRAITS):
            own = only(points, method=way, trait=trait)
            axes.scatter([point["requested"] for point in own], [scale * point["measured"] for point in own], s=22, label=trait,
                         marker="osD^v"[k], color=("#E69F00", "#009E73", "#D55E00", "#0072B2", "#CC79A7")[k])
        axes.axhline(0, color="grey", linewidth=0.6)
        axes.axvline(0, color="grey", linewidth=0.6)
        axes.set_title(way, fontsize=10)
        axes.set_xlabel("requested alpha")
    figure.axes[0].set_ylabel(f"measured less unedited,\n{unit}")
    legend_of_first(figure, "lower", 5)


def plot_self_report(figure, people: list[dict]) -> None:
    """Low, unedited and high of each steered trait, along all five."""
    unedited = only(people, method="unedited")[0]["traits"]
    edited = only(people, method="npti")
    steered = distinct(edited, "trait")
    figure.set_size_inches(8, 0.9 + 1.3 * len(steered))
    for axes, trait in zip(np.atleast_1d(figure.subplots(len(steered), 1, sharex=True)), steered):
        traits_of = {"low": None, "unedited": unedited, **{row["pole"]: row["traits"] for row in only(edited, trait=trait)}}
        for label, means in traits_of.items():
            if means:
                axes.plot(list(means.values()), list(means), "o", color=POLE_COLOURS[label], markersize=5, label=label)
        axes.set_title(f"{trait} steered", fontsize=10, loc="left")
        axes.grid(axis="y", linewidth=0.4)
        axes.invert_yaxis()
    figure.axes[-1].set_xlabel("mean of the items, 1 to 5")
    legend_of_first(figure, "upper", 3)


def plot_layers(figure, files: dict, method: str) -> None:
    figure.set_size_inches(8, 0.9 + 1.1 * len(files))
    for axes, (trait, neurons) in zip(np.atleast_1d(figure.subplots(len(files), 1, sharex=True)), files.items()):
        for pole, sign in zip(POLES, (1, -1)):
            layer = neurons.select(pole)[0] if method == "npti" else neurons.tensors[f"{pole}_place"][:, 0]
            number = layer.bincount(minlength=neurons.shape[0]).numpy()
            axes.bar(range(neurons.shape[0]), sign * number, color=POLE_COLOURS[pole], label=f"{pole} pole")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_ylabel(trait, rotation=0, ha="right", va="center")
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    figure.axes[-1].set_xlabel("layer")
    legend_of_first(figure, "upper", 2)


def drawn(draw, *arguments) -> str:
    """A PNG in base64."""
    figure, buffer = Figure(layout="constrained"), io.BytesIO()
    draw(figure, *arguments)
    for axes in figure.axes if draw is not plot_matrices else ():
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def by_judge(rows) -> dict:
    return {judge: only(rows, judge=judge) for judge in distinct(rows, "judge")}


def pictures_of(found: dict, files: dict):
    """Yield (caption, picture) of every picture that the figures allow."""
    for judge, rows in by_judge(found.get("effects", ())).items():
        yield f"How far apart each method brings the two poles of each trait: {judge} judge.", drawn(plot_effects, rows)
    for judge, points in by_judge(found.get("requested", ())).items():
        yield (f"Random characters: what was requested of each trait, and what was measured; {judge}. The better the way, the more "
               "the points rise from left to right, and the nearer to 0 they are where 0 was asked for.",
               drawn(plot_characters, points))
    if found.get("dose"):
        yield ("Dose response on the validation questions: trait (thin: single traits; thick: their mean) and fluency against "
               "strength.", drawn(plot_dose, found["dose"]))
    matrices = matrices_of(found)
    for judge in dict.fromkeys(judge for judge, _ in matrices):
        first = dict([(method, cells) for (of, method), cells in matrices.items() if of == judge][:4])
        rest = [method for of, method in matrices if of == judge and method not in first]
        more = f" Only in the tables: {', '.join(rest)}." if rest else ""
        yield (f"Spill-over: how steering one trait (row) moves each (column); {judge}. A perfect method has a dark diagonal and "
               f"only noise elsewhere; bold: the 95 % interval excludes 0.{more}", drawn(plot_matrices, first, judge))
    people = found.get("questionnaire", ())
    if {"unedited", "npti"} <= set(distinct(people, "method")):
        most = max(row["alpha"] for row in only(people, method="npti"))
        shown_people = only(people, method="unedited") + only(people, method="npti", alpha=most)
        yield (f"Self-report of the unedited model and of the two poles by NPTI at alpha {most:g}, along all five traits.",
               drawn(plot_self_report, shown_people))
    for method, what in (("npti", "NPTI's neurons"), ("trained", "The neurons of trained edits")):
        own = {trait: neurons for trait, neurons in files.items() if method == "npti" or neurons.trained_key}
        if own and method in distinct(found.get("summary", ()), "method"):
            yield f"{what}, by layer: of the high pole upward, of the low pole downward.", drawn(plot_layers, own, method)


# ---------------------------------------------------------------------------------------------------------------- files


def write_reports(out: Path, found: dict, answers: list[dict], files: dict) -> None:
    """summary.json, details.json (all else), report.md, report.html."""
    examples = []
    for trait in distinct(answers, "trait"):
        of_trait = only(answers, trait=trait)
        for question in distinct(of_trait, "question")[:3]:
            asked = only(of_trait, question=question)
            examples.append((trait, question, [(f"{named(line)} {line['pole'] or ''}".strip(), line["answer"]) for line in asked]))
    tables, details = list(tables_of(found)), {name: rows for name, rows in found.items() if name != "summary"}
    page = rendered("page.html", head=found["head"], tables=tables, plots=list(pictures_of(found, files)), examples=examples)
    lines = ["# Evaluation", "", found["head"], ""]
    for title, note, columns, cells in tables:
        lines += [f"## {title}", "", note, "", markdown(columns, cells), ""]
    write_atomically(out / "summary.json", json.dumps(found.get("summary", []), indent=1) + "\n")
    write_atomically(out / "details.json", json.dumps(details, indent=1) + "\n")
    write_atomically(out / "report.md", "\n".join(lines))
    write_atomically(out / "report.html", page)


def show(summary: list[dict], effects: list[dict], judge: str) -> None:
    """Print the first judge's scores, a line a method."""
    rows, lines = only(summary, judge=judge), []
    find = {(row["trait"], named(row), row["pole"]): row for row in rows}
    apart = {(row["trait"], named(row)): row for row in only(effects, judge=judge)}
    for trait in distinct(rows, "trait"):
        alone = [f"{named(row)} {shown(row['mean'], judge)}, perplexity {figures(row, 'perplexity')[0]}"
                 for row in only(rows, trait=trait, pole=None)]
        lines.append([Text(trait, style="bold"), "", "", "; ".join(alone), ""])
        for name in dict.fromkeys(named(row) for row in only(rows, trait=trait) if row["pole"]):
            sides = [find.get((trait, name, pole)) for pole in POLES[::-1]]
            poles = [shown(row["mean"], judge) if row else "" for row in sides]
            perplexities = " / ".join(figures(row, "perplexity")[0] for row in sides if row)
            lines.append([f"  {name}", *poles, around(apart.get((trait, name)), judge), perplexities])
    show_table(f"{judge} judge, {unit_of(judge)[2]}, with 95 % intervals", ("", "low", "high", "high - low", "perplexity"), lines)


def compare(first: str, second: str) -> None:
    """Print two result folders side by side, as Markdown."""
    sides, heads, lines = [], [], []
    for folder in (first, second):
        try:
            rows, details = (parse_json(read_text(path), str(path))
                             for path in (Path(folder) / "summary.json", Path(folder) / "details.json"))
            sides.append({(row["judge"], row["trait"], named(row), row["pole"] or ""): row for row in rows})
            heads.append(f"{folder}: {details['head']}\n")
            for row in rows:
                CELLS["summary"](row)  # raises where it can't be shown
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f": {error}" if isinstance(error, UserError) else ", but some of another form"
            raise UserError(f"--compare: {folder} holds no summary.json and details.json of evaluate.py{why}") from error
    print("\n".join(heads))
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        both = [side.get(key) for side in sides]
        fluent = [" / ".join(figures(row, "perplexity", "repetition")) if row else "" for row in both]
        apart = shown(both[1]["mean"] - both[0]["mean"], key[0]) if all(both) else ""
        lines.append([*key, *(around(row, key[0]) for row in both), apart, *fluent])
    fluencies = (f"fluency {first}", f"fluency {second}")
    print(markdown(["judge", "trait", "method", "pole", first, second, "difference", *fluencies], lines))
