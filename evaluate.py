"""Measure a personality: does what the model writes move along the trait, and what becomes of its fluency?

    python evaluate.py --trait extraversion
    python evaluate.py --alpha 0.6 --alpha 1 --alpha 1.5 --out results

Asks the test questions (never those that identify.py searched with) of the unedited model, under a simple prompt, under a
persona description, and edited by NPTI, in both poles; judges the answers offline with the contrast judge; and writes
answers.jsonl, scores.jsonl, summary.json and report.md, with bootstrap 95 % intervals over the questions.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

from identify import (POLES, TRAITS, Bench, Flags, UserError, answer, ask, chat, check_trait, digest, fingerprint, load_bench,
                      load_model, model_arguments, positive, script, token_ids, write_atomically)
from induce import REPETITION_PENALTY, neurons_of, npti, steer

METHODS = ("unedited", "simple", "persona", "npti")
ADJECTIVES = {  # of the simple prompt, "You are an extraverted person."
    "openness": ("open-minded and imaginative", "conventional and unimaginative"),
    "conscientiousness": ("conscientious", "careless and unreliable"),
    "extraversion": ("extraverted", "introverted"),
    "agreeableness": ("agreeable", "disagreeable"),
    "neuroticism": ("neurotic", "emotionally stable"),
}
JUDGE_PERSONAS = 2  # a pole, of those that identify does not use

# ------------------------------------------------------------------------------------------------------ the answers


def grid(bench: Bench, trait: str, methods, alphas, limit: int, seed: int) -> list[dict]:
    """Every cell of a trait's evaluation: question, method, pole, alpha, the persona in the prompt, and a stable key."""
    cells = []
    for question in bench.test[trait][:limit]:
        pick = random.Random(f"{seed}/{trait}/{question}")
        for method in methods:
            for pole in (None,) if method == "unedited" else POLES:
                persona = None
                if method == "simple":
                    word = ADJECTIVES[trait][POLES.index(pole)]
                    persona = f"You are {'an' if word[0] in 'aeiou' else 'a'} {word} person."
                elif method == "persona":  # P2: one of those that identify used, not the judge's
                    persona = pick.choice(bench.personas_for("search", trait, pole))
                for alpha in alphas if method == "npti" else (None,):
                    cells.append({"trait": trait, "question": question, "method": method, "pole": pole, "alpha": alpha,
                                  "persona": persona})
    return cells


class Lines:
    """A file of JSON lines that grows a batch at a time; what a killed run left in it is not done again."""

    def __init__(self, path: Path, header: dict):
        self.path, self.done = path, {}
        header = {"personality-neurons": path.stem, **header}
        if path.exists():
            whole = path.read_bytes()
            end = whole.rfind(b"\n") + 1  # a line cut off by a kill
            try:
                first, *lines = [json.loads(line) for line in whole[:end].splitlines()] or [header]
                ours = first["personality-neurons"] == path.stem
                self.done = {line["key"]: line for line in lines}
            except (ValueError, KeyError, TypeError):
                ours = False
            if not ours and whole:
                raise UserError(f"{path}: not a file of evaluate.py: move it away, or choose another --out")
            if first != header:
                raise UserError(f"{path} was made with {first}, now it is {header}: choose another --out")
            with open(path, "r+b") as file:
                file.truncate(end)
        if not path.exists() or path.stat().st_size == 0:
            path.write_text(json.dumps(header) + "\n")

    def add(self, values: list[dict]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
        self.done |= {value["key"]: value for value in values}


def progress(total: int, done: int, title: str):
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=title, unit="answer", smoothing=0.1)


def generate_answers(model, tokenizer, cells: list[dict], neurons, lines: Lines, args, title: str) -> None:
    """Answer what is not answered yet. All methods, poles and alphas share batches: each row has its own edits."""
    profiles, number = [], {}
    for trait in neurons:
        for alpha in args.alpha:
            for pole, sign in zip(POLES, (1, -1)):
                profiles.append(npti(neurons[trait], sign * alpha))
                number[trait, pole, alpha] = len(profiles)
    todo = [cell for cell in cells if cell["key"] not in lines.done]
    with progress(len(cells), len(cells) - len(todo), title) as bar:
        for start in range(0, len(todo), args.batch_size):
            batch = todo[start:start + args.batch_size]
            rows = [number[cell["trait"], cell["pole"], cell["alpha"]] if cell["method"] == "npti" else 0 for cell in batch]
            with steer(model, profiles, rows):
                answers = answer(model, tokenizer, [ask(cell["question"], cell["persona"]) for cell in batch], args.max_new_tokens,
                                 repetition_penalty=REPETITION_PENALTY)
            lines.add([{**cell, "answer": text, "ids": ids} for cell, (text, ids) in zip(batch, answers)])
            bar.update(len(batch))


# ----------------------------------------------------------------------------------------------------------- judging


def log_likelihoods(model, tokenizer, prefix: str | None, question: str, answers: list[list[int]]):
    """Mean log-likelihood a token (nats) of each answer to a question under the unedited model, and of none of their first
    tokens' prompt: float32 (answers). The prompt, which they share, is run once."""
    import torch
    from transformers import DynamicCache

    prompt = torch.tensor([token_ids(tokenizer, chat(tokenizer, ask(question, prefix)))], device=model.device)
    width = max(map(len, answers))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in answers], device=model.device)
    lengths = torch.tensor([len(row) for row in answers], device=model.device)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        first = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits
        cache.batch_repeat_interleave(len(answers))
        logits = first.expand(len(answers), -1, -1)
        if width > 1:  # padding stands at the right, where nothing attends to it
            rest = model(input_ids=ids[:, :-1], past_key_values=cache).logits
            logits = torch.cat([logits, rest], 1)
        loss = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")  # (answers, width)
    counted = torch.arange(width, device=ids.device) < lengths[:, None]
    return -(loss * counted).sum(1) / lengths


def repetition(ids: list[int]) -> float:
    """The share of an answer's 3-grams of tokens that it has had before."""
    grams = list(zip(ids, ids[1:], ids[2:]))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def contrast(model, tokenizer, bench: Bench, trait: str, question: str, answers: list[list[int]]):
    """The contrast judge, offline: the mean log-likelihood a token of an answer under the unedited model with personas of
    the high pole, less that with personas of the low pole, averaged over JUDGE_PERSONAS personas a pole that identify.py
    does not use. In nats a token; higher is more of the trait. Float tensor (answers)."""
    total = 0
    for pole, sign in zip(POLES, (1, -1)):
        personas = bench.personas_for("judge", trait, pole)
        # spread over the list, so that between them they show different facets
        for k in range(JUDGE_PERSONAS):
            persona = personas[k * (len(personas) - 1) // max(1, JUDGE_PERSONAS - 1)]
            total = total + sign * log_likelihoods(model, tokenizer, persona, question, answers) / JUDGE_PERSONAS
    return total


def judge_answers(model, tokenizer, bench: Bench, answers: list[dict], lines: Lines, title: str) -> None:
    """Score what is not scored yet: contrast, perplexity under the unedited model (no persona), and repeated 3-grams."""
    todo = defaultdict(list)
    for one in answers:
        if one["key"] not in lines.done:
            todo[one["trait"], one["question"]].append(one)
    with progress(len(answers), len(answers) - sum(map(len, todo.values())), title) as bar:
        for (trait, question), group in todo.items():
            ids = [one["ids"] or [tokenizer.eos_token_id] for one in group]
            scores = contrast(model, tokenizer, bench, trait, question, ids).tolist()
            plain = (-log_likelihoods(model, tokenizer, None, question, ids)).exp().tolist()
            lines.add([{"key": one["key"], "judge": "contrast", "score": score, "perplexity": perplexity,
                        "repetition": repetition(one["ids"]), "tokens": len(one["ids"])}
                       for one, score, perplexity in zip(group, scores, plain)])
            bar.update(len(group))


# ------------------------------------------------------------------------------------------------------- the results


def interval(values, seed: int = 0, draws: int = 10_000) -> list[float]:
    """Bootstrap 95 % interval of the mean over questions: [low, high]."""
    import numpy as np

    values = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    return [float(x) for x in np.quantile(values[picks].mean(1), (0.025, 0.975))]


def summarise(answers: list[dict], scores: dict, seed: int) -> tuple[list[dict], list[dict]]:
    """(the rows of summary.json, the paired differences high - low), by trait, method, pole and alpha."""
    import numpy as np

    cells = defaultdict(dict)
    for one in answers:
        cells[one["trait"], one["method"], one["alpha"], one["pole"]][one["question"]] = scores[one["key"]]
    rows, pairs = [], []
    for (trait, method, alpha, pole), by_question in cells.items():
        values = [score["score"] for score in by_question.values()]
        rows.append({"trait": trait, "pole": pole, "method": method, "alpha": alpha, "judge": "contrast", "n": len(values),
                     "mean": float(np.mean(values)), "ci95": interval(values, seed), "variance": float(np.var(values)),
                     "perplexity": float(np.median([score["perplexity"] for score in by_question.values()])),
                     "repetition": float(np.mean([score["repetition"] for score in by_question.values()]))})
        if pole == "high":
            low = cells[trait, method, alpha, "low"]
            apart = [by_question[question]["score"] - low[question]["score"] for question in by_question if question in low]
            pairs.append({"trait": trait, "method": method, "alpha": alpha, "n": len(apart), "mean": float(np.mean(apart)),
                          "ci95": interval(apart, seed)})
    return rows, pairs


def report(rows: list[dict], pairs: list[dict], model: str, args) -> str:
    """The tables as Markdown."""
    lines = ["# Evaluation", "", f"{model}, contrast judge, {args.max_new_tokens} tokens an answer, seed {args.seed}. "
             "Score: nats a token, higher is more of the trait; 95 % bootstrap interval over the questions. Perplexity "
             "(median) is of the answer under the unedited model; repetition is the share of repeated 3-grams, which "
             "*lowers* perplexity: read the two together.", "",
             "| trait | method | alpha | pole | n | score | 95 % | variance | perplexity | repetition |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append("| {} | {} | {} | {} | {} | {:+.4f} | {:+.4f} to {:+.4f} | {:.5f} | {:.1f} | {:.1%} |".format(
            row["trait"], row["method"], "" if row["alpha"] is None else f"{row['alpha']:g}", row["pole"] or "", row["n"],
            row["mean"], *row["ci95"], row["variance"], row["perplexity"], row["repetition"]))
    lines += ["", "High minus low, paired by question:", "", "| trait | method | alpha | n | difference | 95 % |", "|---|---|---|---|---|---|"]
    for pair in pairs:
        lines.append("| {} | {} | {} | {} | {:+.4f} | {:+.4f} to {:+.4f} |".format(
            pair["trait"], pair["method"], "" if pair["alpha"] is None else f"{pair['alpha']:g}", pair["n"], pair["mean"], *pair["ci95"]))
    return "\n".join(lines) + "\n"


def show(rows: list[dict], pairs: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="contrast judge, nats a token (95 % interval); perplexity / repeated 3-grams", title_justify="left")
    for column in ("trait", "method", "low", "high", "high - low", "fluency low", "fluency high"):
        table.add_column(column, justify="left" if column in ("trait", "method") else "right")
    find = {(row["trait"], row["method"], row["alpha"], row["pole"]): row for row in rows}
    pair_of = {(pair["trait"], pair["method"], pair["alpha"]): pair for pair in pairs}
    for trait, method, alpha in dict.fromkeys(key[:3] for key in find):
        name = method if alpha is None else f"{method} {alpha:g}"
        if method == "unedited":
            row = find[trait, method, alpha, None]
            table.add_section()
            table.add_row(trait, name, f"{row['mean']:+.4f}", "", "", f"{row['perplexity']:.1f} / {row['repetition']:.1%}", "")
            continue
        low, high, pair = find[trait, method, alpha, "low"], find[trait, method, alpha, "high"], pair_of[trait, method, alpha]
        table.add_row("", name, f"{low['mean']:+.4f}", f"{high['mean']:+.4f}",
                      "{:+.4f} ({:+.4f} to {:+.4f})".format(pair["mean"], *pair["ci95"]),
                      *(f"{row['perplexity']:.1f} / {row['repetition']:.1%}" for row in (low, high)))
    Console().print(table)


def parser() -> Flags:
    flags = Flags(__doc__)
    flags.add_argument("--trait", nargs="+", default=list(TRAITS), metavar="T", help="default: all five")
    flags.add_argument("--alpha", action="append", type=float, metavar="A", help="strength of the edits, again for several (default: 1.5)")
    flags.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS, help="default: all")
    flags.add_argument("--neurons", default="neurons", metavar="DIR", help="default: %(default)s; made where it lacks a trait")
    flags.add_argument("--bench", metavar="DIR", help="questions and personas in PersonalityBench's layout (default: built in)")
    flags.add_argument("--limit", type=positive, default=40, metavar="N", help="test questions a trait (default: %(default)s)")
    flags.add_argument("--out", default="results", metavar="DIR", help="default: %(default)s")
    model_arguments(flags)
    return flags


def main() -> None:
    args = parser().parse_args()
    traits = [check_trait(trait) for trait in args.trait]
    args.alpha = sorted(set(args.alpha or [1.5]))
    if not all(0 < alpha < 100 for alpha in args.alpha):
        raise UserError(f"--alpha: expected numbers above 0 (both poles are measured), got {args.alpha}")
    bench = load_bench(args.bench)
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    neurons = {}
    if "npti" in args.method:
        for trait in traits:
            neurons[trait] = neurons_of(model, tokenizer, trait, args.neurons, bench=args.bench, batch_size=args.batch_size,
                                        max_new_tokens=args.max_new_tokens, seed=args.seed)
    made_with = {"model": fingerprint(model), "bench": digest(*(bench.fingerprint(trait) for trait in TRAITS)), "dtype": str(model.dtype), "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    answers, scores = Lines(out / "answers.jsonl", made_with), Lines(out / "scores.jsonl", made_with)
    cells = []
    for trait in traits:
        for cell in grid(bench, trait, args.method, args.alpha, args.limit, args.seed):
            edited = neurons[trait].meta["key"] if cell["method"] == "npti" else None
            cells.append({"key": digest(cell, edited), **cell})
    generate_answers(model, tokenizer, cells, neurons, answers, args, "answers")
    made = [answers.done[cell["key"]] for cell in cells]
    judge_answers(model, tokenizer, bench, made, scores, "judging")
    rows, pairs = summarise(made, scores.done, args.seed)
    write_atomically(out / "summary.json", (json.dumps(rows, indent=1) + "\n").encode())
    write_atomically(out / "report.md", report(rows, pairs, model.source, args).encode())
    show(rows, pairs)
    print(out / "report.md")


if __name__ == "__main__":
    script(main)
