"""Measure a personality: does what the model writes move along the trait, at what cost, and how sure is that?

    python evaluate.py --trait extraversion
    python evaluate.py --full --out results
    python evaluate.py --answers FILE --judge contrast llm      answers that something else wrote
    python evaluate.py --compare results other-results

Asks the test questions (never those that identify.py searched with) of the unedited model, under a simple prompt, under a
persona description, and edited, in both poles; judges the answers; and writes answers.jsonl, scores.jsonl, summary.json,
details.json, report.md and report.html, with bootstrap 95 % intervals over the questions. What is chosen, such as a strength
that matches another method's, is chosen on questions of their own ("validation"), never on the test questions.
"""

from personality import POLES, TRAITS
from personality.terminal import (Flags, UserError, bench_argument, check_trait, model_arguments, number, positive, progress, refuse, resumable,
                                  say, script, where_argument)

METHODS = ("unedited", "simple", "persona", "npti", "dpn-le", "activation")
JUDGES = ("contrast", "llm", "questionnaire")
DOSES = (0.5, 1.0, 1.5, 2.0)
STRENGTH = number(0, 100)  # above 0: both poles are measured


def parser() -> Flags:
    flags = Flags(__doc__)
    flags.add_argument("--trait", nargs="+", default=list(TRAITS), metavar="T", help="default: all five")
    flags.add_argument("--alpha", action="append", type=STRENGTH, metavar="A",
                       help="strength of the edits, again for several (default: 1.5)")
    flags.add_argument("--method", nargs="+", choices=METHODS, help="default: " + " ".join(METHODS[:4]))
    flags.add_argument("--judge", nargs="+", choices=JUDGES, help="default: contrast")
    flags.add_argument("--judge-model", metavar="M",
                       help="what judges, contrast and llm, as --model takes it (default: --model): the base model of a baked one, "
                            "say; with --judge-url the name of the judge llm there")
    flags.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible server for the judge llm; key: $OPENAI_API_KEY")
    flags.add_argument("--inventory", metavar="FILE",
                       help="of the judge questionnaire: a table with the columns item, key, facet (default: 60 built-in items)")
    flags.add_argument("--spill-over", type=positive, nargs="?", const=4, metavar="N",
                       help="judge the answers to the first N questions (default: %(const)s) along all five traits")
    flags.add_argument("--dose", nargs="*", type=STRENGTH, metavar="A",
                       help="dose response on the validation questions, and the methods at matched strength "
                            f"(default: {' '.join(f'{dose:g}' for dose in DOSES)})")
    flags.add_argument("--capability", nargs="?", const="", metavar="TASKS",
                       help="what the edits cost in general: offline, or with lm-evaluation-harness's tasks (gsm8k,mmlu)")
    flags.add_argument("--full", action="store_true", help="all of the above, with every method and judge")
    flags.add_argument("--characters", type=positive, nargs="?", const=12, metavar="N",
                       help="N random characters over five traits (default: %(const)s), requested against measured: composed, with "
                            "the edits just added up, and described in a prompt")
    flags.add_argument("--answers", metavar="FILE", help="judge these (JSON lines: trait, pole, question, answer), generate none")
    flags.add_argument("--compare", nargs=2, metavar="DIR", help="set two result folders side by side")
    flags.add_argument("--neurons", default="neurons", metavar="DIR", help="default: %(default)s; made where it lacks a trait")
    where_argument(flags)
    flags.add_argument("--suppress", choices=("cap", "zero", "none"), default="cap",
                       help="the opposite pole's neurons: capped at 0, as in NPTI, set to 0, or left alone (default: %(default)s)")
    bench_argument(flags)
    flags.add_argument("--limit", type=positive, default=10, metavar="N", help="test questions a trait (default: %(default)s)")
    flags.add_argument("--out", default="results", metavar="DIR", help="default: %(default)s")
    model_arguments(flags)
    return flags


RULES = [(lambda args, flag=flag, judge=judge: getattr(args, flag) and judge not in args.judge,
          f"--{flag.replace('_', '-')} is for the judge {judge}: --judge contrast {judge}")
         for flag, judge in (("judge_url", "llm"), ("inventory", "questionnaire"))] + [
    (lambda args: args.neurons.startswith("npti:"), "--neurons npti:DIR is for induce.py: evaluate.py needs the files and answers of identify.py"),
    (lambda args: args.judge_url and not args.judge_model, "--judge-url needs --judge-model, the name of the model there"),
    (lambda args: args.answers and ("questionnaire" in args.judge or args.capability is not None or args.dose or args.characters),
     "--answers: a questionnaire, capability, doses and characters need the model that wrote them")]


def arguments():
    args = parser().parse_args()
    args.trait = [check_trait(trait) for trait in args.trait]
    args.alpha = sorted(set(args.alpha or [1.5]))
    args.method = args.method or list(METHODS if args.full else METHODS[:4])
    args.judge = list(dict.fromkeys(args.judge or (JUDGES if args.full else JUDGES[:1])))
    if args.full:
        args.spill_over, args.capability, args.dose = args.spill_over or 4, args.capability or "", args.dose or list(DOSES)
    args.dose = sorted(set(args.dose or DOSES)) if args.dose is not None else []
    refuse(args, RULES)
    return args


if __name__ == "__main__":
    script(arguments, "evaluate")  # imports this file, which needs torch from here on, and runs main()

import contextlib  # noqa: E402
import functools  # noqa: E402
import random  # noqa: E402
import time  # noqa: E402
from collections import namedtuple  # noqa: E402
from pathlib import Path  # noqa: E402

from identify import identify  # noqa: E402
from personality import capability, results  # noqa: E402
from personality.judges import (JUDGE_PERSONAS, OPTIONS, ContrastJudge, EndpointJudge, LocalJudge, percentiles, rate_answers,  # noqa: E402
                                read_inventory, rubric, self_report)
from personality.methods import Character, Profiles, described, npti_edits, suppressed  # noqa: E402
from personality.model import (TEST_PENALTY, answer_ids, answers, conversation, dtype_of, fingerprint, load_model, name_of,  # noqa: E402
                               without_stop)
from personality.neurons import NeuronFolder  # noqa: E402
from personality.questions import Bench, adjectives, load_bench, read_given  # noqa: E402
from personality.report import compare, show, write_reports  # noqa: E402
from personality.results import EDITS, WAYS, condition_of, is_answer, is_cost, is_report, is_score, mean_of, same_edit  # noqa: E402
from personality.steer import Profile, steer  # noqa: E402
from personality.store import Journal, digest, lines_of, only_run  # noqa: E402

STEERED = (*EDITS, *WAYS[:2])
Condition = namedtuple("Condition", results.CONDITION)  # of a character: alpha is a tuple over TRAITS, trait and pole are None


# --------------------------------------------------------------------------------------------------- what is asked of whom


def grid(bench: Bench, trait: str, methods, alphas: dict, questions: list[str], seed: int) -> list[dict]:
    """Every cell of a trait's evaluation: question, method, pole, alpha and the persona in the prompt. alphas: by method."""
    cells = []
    for question in questions:
        pick = random.Random(f"{seed}/{trait}/{question}")
        for method in methods:
            for pole in (None,) if method == "unedited" else POLES:
                persona = None
                if method == "simple":
                    word = adjectives(trait, pole)
                    persona = f"You are {'an' if word[0] in 'aeiou' else 'a'} {word} person."
                elif method == "persona":  # P2: one of those that identify used, not the judge's
                    persona = pick.choice(bench.personas_for("search", trait, pole))
                for alpha in alphas[method] if method in EDITS else (None,):
                    cells.append({"trait": trait, "question": question, "method": method, "pole": pole, "alpha": alpha,
                                  "persona": persona})
    return cells


def random_characters(number: int, most: float, seed: int) -> list[tuple]:
    """Alphas over TRAITS: three traits of a character are between a third of `most` and all of it, of either sign, two are 0."""
    pick, made = random.Random(f"{seed}/characters"), []
    for _ in range(number):
        chosen = pick.sample(TRAITS, 3)
        made.append(tuple(round(pick.choice((-1, 1)) * pick.uniform(most / 3, most), 2) if trait in chosen else 0.0 for trait in TRAITS))
    return made


def character_cells(bench: Bench, characters: list[tuple], alpha: float, questions: list[str], seed: int) -> list[dict]:
    """Every question of every character in every way; and, to hold them against, unedited and of each trait alone."""
    alone = [cell for trait in TRAITS for cell in grid(bench, trait, ["npti"], {"npti": [alpha]}, questions, seed)]
    return grid(bench, TRAITS[0], ["unedited"], {}, questions, seed) + alone + [
        {"trait": TRAITS[0], "question": question, "method": way, "pole": None, "alpha": list(alphas), "persona":
         described(bench, alphas, random.Random(f"{seed}/{alphas}/{question}")) if way == "described" else None}
        for way in WAYS for alphas in characters for question in questions]


# ---------------------------------------------------------------------------------------------------- the model as others


class Personalities:
    """The model under every method, trait, pole and strength: a system prompt, a profile, or neither."""

    def __init__(self, model, tokenizer, bench: Bench, args):
        self.model, self.tokenizer, self.bench, self.args = model, tokenizer, bench, args
        options = {"out": args.neurons, "bench": args.bench, "batch_size": args.batch_size, "seed": args.seed}
        self.neurons = NeuronFolder(model, args.neurons, functools.partial(identify, model, tokenizer, **options))
        self.profiles = Profiles(model, tokenizer, self.neurons, suppress=args.suppress)

    def identify(self, methods, traits) -> None:
        """Have the neurons of what is to be edited, made now where there are none."""
        for trait in traits if set(methods) & set(STEERED) else ():
            self.neurons[trait]

    def profile(self, condition: Condition) -> Profile:
        if condition.method == "added":
            return suppressed(Profile.of([edits for trait, alpha in zip(TRAITS, condition.alpha)
                                          for edits in npti_edits(self.neurons[trait], alpha)]), self.args.suppress)
        if condition.method == "composed":
            return self.profiles.of(Character(dict(zip(TRAITS, condition.alpha))))
        return self.profiles.of(Character({condition.trait: condition.alpha if condition.pole == "high" else -condition.alpha}, condition.method))

    def key(self, condition: Condition) -> str | None:
        """What a method's edits come from, for the keys of what is made with them."""
        traits = [condition.trait] if condition.method in EDITS else TRAITS if condition.method in STEERED else []
        return f"{condition.method}/{'/'.join(self.neurons[trait].key for trait in traits)}" if traits else None

    def steered(self, condition: Condition):
        """A context in which every row of the model has the condition's edits; prompts do nothing here."""
        return steer(self.model, self.profile(condition), where="all") if condition.method in STEERED else contextlib.nullcontext()

    def system(self, condition: Condition) -> str | None:
        """A condition's system prompt where there is no question that could pick one."""
        if condition.method == "described":
            return described(self.bench, condition.alpha, random.Random(f"{self.args.seed}/{condition.alpha}"))
        if condition.method not in ("simple", "persona"):
            return None
        cells = grid(self.bench, condition.trait, [condition.method], {}, ["a questionnaire"], self.args.seed)
        return next(cell["persona"] for cell in cells if cell["pole"] == condition.pole)

    def answer(self, cells: list[dict], journal: Journal, title: str) -> list[dict]:
        """Answer what is not answered yet. All methods, poles and alphas share batches: each row has its own edits."""
        cells = [{"key": digest(cell, self.key(Condition(**condition_of(cell)))), **cell} for cell in cells]
        todo = [cell for cell in cells if cell["key"] not in journal]
        conditions = [Condition(**condition_of(cell)) for cell in todo]
        number_of = {condition: k for k, condition in enumerate(dict.fromkeys(c for c in conditions if c.method in STEERED), 1)}
        profiles = [self.profile(condition) for condition in number_of] or [Profile.empty()]
        with progress(len(cells), len(cells) - len(todo), title) as bar:
            for start in range(0, len(todo), self.args.batch_size):
                batch = todo[start:start + self.args.batch_size]
                rows = [number_of.get(condition, 0) for condition in conditions[start:start + self.args.batch_size]]
                with steer(self.model, profiles, rows, self.args.where):
                    found = answers(self.model, self.tokenizer, [conversation(cell["question"], cell["persona"]) for cell in batch],
                                    self.args.max_new_tokens, repetition_penalty=TEST_PENALTY)
                journal.append(*({**cell, "answer": text, "ids": without_stop(self.tokenizer, ids)} for cell, (text, ids) in zip(batch, found)))
                bar.update(len(batch))
        return [journal[cell["key"]] for cell in cells]

    def measure(self, conditions: list[Condition], work: str, journal: Journal, measure) -> list[dict]:
        """measure(condition) under each condition's edits, of which none is done twice: their lines in the journal."""
        keys = [digest(work, condition, self.key(condition)) for condition in conditions]
        with progress(len(conditions), 0, work, "personality") as bar:
            for condition, key in zip(conditions, keys):
                if key not in journal:
                    with self.steered(condition):
                        journal.append({"key": key, "condition": condition, **measure(condition)})
                bar.update()
        return [journal[key] for key in keys]


# ---------------------------------------------------------------------------------------------------------- the evaluation


class Evaluation:
    """One run: its files, its judges, and the steps. Each returns its figures."""

    def __init__(self, people: Personalities, contrast: ContrastJudge, rater, args, made_with: dict):
        self.people, self.contrast, self.rater, self.args, self.out = people, contrast, rater, args, Path(args.out)
        journal = lambda name, is_line, **more: Journal(self.out / f"{name}.jsonl", {**made_with, **more}, is_line)  # noqa: E731
        self.answers, self.scores = journal("answers", is_answer), journal("scores", is_score)
        self.reports = journal("questionnaire", is_report, items=digest(args.items)) if "questionnaire" in args.judge else None
        self.costs = journal("capability", is_cost) if args.capability is not None else None

    def cells(self, split: str, methods, alphas: dict, limit: int, traits=None) -> list[dict]:
        bench, seed = self.people.bench, self.args.seed
        return [cell for trait in traits or self.args.trait
                for cell in grid(bench, trait, methods, alphas, bench.questions(trait, split, limit), seed)]

    def scored(self, made: list[dict]):
        """(the table of scores, the table of fluency) of answers."""
        origins = {{"llm": self.rater and self.rater.name}.get(name, name): self.rater.origin if name == "llm" else self.contrast.origin
                   for name in dict.fromkeys(["contrast", *self.args.judge]) if name != "questionnaire"}
        return results.scored(made, self.scores, origins), results.fluency_table(made, self.scores, self.contrast.origin)

    def judged(self, made: list[dict], traits, title: str) -> tuple[list[dict], list[dict]]:
        """(summary, effects) of answers by the contrast judge."""
        self.contrast.judge(made, self.scores, traits, title)
        table, fluent = self.scored(made)
        table = table[table.judge == "contrast"]
        fluent = results.fluency(fluent, table, self.args.seed)
        return results.summarise(table, fluent, self.args.seed), results.effects(results.high_minus_low(table), self.args.seed)

    def given(self) -> list[dict]:
        """The answers of --answers FILE."""
        lines = [{**line, "method": "given", "alpha": None, "persona": None} for line in read_given(self.args.answers)]
        tokenizer = self.people.tokenizer
        return [{"key": digest(number, line), **line, "ids": answer_ids(tokenizer, line["answer"])} for number, line in enumerate(lines)]

    def doses(self) -> list[dict]:
        """The effects of the strengths, on the validation questions."""
        methods = [method for method in EDITS if method in self.args.method]
        cells = self.cells("validation", methods, dict.fromkeys(EDITS, self.args.dose), max(1, self.args.limit // 2))
        summary, effects = self.judged(self.people.answer(cells, self.answers, "doses: answers"), [], "doses: judging")
        return [{**row, "perplexity": mean_of(side["perplexity"] for side in summary if same_edit(side, row))} for row in effects]

    def test(self, made: list[dict]) -> dict:
        """Every judge of texts on the test questions' answers."""
        seed = self.args.seed
        self.contrast.judge(made, self.scores, [], "judging")  # its fluency is every judge's
        failed = rate_answers(self.rater, made, self.scores) if self.rater else {}
        judges = [self.rater.name if name == "llm" else name for name in self.args.judge if name != "questionnaire"]
        table, fluent = self.scored(made)
        table = table[table.judge.isin(judges)]
        fluent, apart = results.fluency(fluent, table, seed), results.high_minus_low(table)
        return {"failed": failed, "summary": results.summarise(table, fluent, seed), "effects": results.effects(apart, seed),
                "between": results.compared(apart, seed), "fluency": fluent, "agreement": results.agreement(table, judges),
                "accuracy": results.accuracy(table) if self.args.answers else []}

    def spill_over(self, made: list[dict]) -> list[dict]:
        """The matrix, from the answers to each trait's first few questions."""
        first = {trait: list(dict.fromkeys(line["question"] for line in made if line["trait"] == trait))[:self.args.spill_over] for trait in TRAITS}
        some = [line for line in made if line["question"] in first[line["trait"]] and line["method"] not in ("unedited", "simple")]
        self.contrast.judge(some, self.scores, TRAITS, "spill-over")
        return results.spill_over(self.scored(some)[0])

    def questionnaire(self, conditions: list[Condition]) -> tuple[list[dict], list[dict]]:
        """(rows for summary.json, by personality) of the self-reports."""
        people, items = self.people, self.args.items
        lines = people.measure(conditions, "questionnaire", self.reports, lambda condition: {
            "items": self_report(people.model, people.tokenizer, items, people.system(condition), self.args.batch_size)})
        rows, found = results.questionnaire([(condition._asdict(), line["items"]) for condition, line in zip(conditions, lines)], items, self.args.seed)
        return rows, [{**one, "percentiles": percentiles(one["traits"], len(items))} for one in found]

    def capability(self, conditions: list[Condition]) -> list[dict]:
        """What an edit costs in general: nats added a token on neutral text, agreement with the unedited model's first choice, the quiz."""
        people, args = self.people, self.args
        losses, choices = capability.neutral_pass(people.model, people.tokenizer)

        def measure(condition):
            result = {"quiz": capability.quiz(people.model, people.tokenizer, people.system(condition), args.batch_size)}
            if condition.method in ("unedited", *EDITS):  # a prompt has no part in a text
                edited, chosen = capability.neutral_pass(people.model, people.tokenizer)
                result |= {"added": [a - b for a, b in zip(edited, losses)],
                           "agreement": [float((a == b).float().mean()) for a, b in zip(chosen, choices)]}
            return result

        lines = people.measure(conditions, "capability", self.costs, measure)
        return [{**condition._asdict(), **{name: results.estimate(line[name], args.seed) for name in ("added", "agreement", "quiz") if name in line}}
                for condition, line in zip(conditions, lines)]

    def harness(self, conditions: list[Condition]) -> list[dict]:
        people, tasks = self.people, self.args.capability
        conditions = [condition for condition in conditions if condition.method in ("unedited", *EDITS)]
        lines = people.measure(conditions, f"lm_eval {tasks}", self.costs, lambda condition: {"tasks": capability.harness(
            people.model, people.tokenizer, tasks, self.args.batch_size, self.args.seed)})
        return [{**condition._asdict(), "task": task, "metric": metric, "value": value} for condition, line in zip(conditions, lines)
                for task, scores in line["tasks"].items() for metric, value in scores.items()]

    def matched(self, chosen: list[dict]) -> list[dict]:
        """The methods at matched strength: the test questions' effect and price."""
        made = [line for row in chosen for line in self.people.answer(
            self.cells("test", [row["method"]], {row["method"]: [row["alpha"]]}, self.args.limit, [row["trait"]]), self.answers,
            f"matched {row['method']}, {row['trait']}")]
        summary, effects = self.judged(made, [], "matched: judging")
        spilt = self.spill_over(made) if self.args.spill_over else []
        edits = [Condition(row["method"], row["trait"], pole, row["alpha"]) for row in chosen for pole in POLES]
        costs = self.capability(edits) if self.costs is not None else []
        rows = []
        for row in chosen:
            effect = next(effect for effect in effects if same_edit(effect, row))
            row = {**row, **{name: effect[name] for name in ("mean", "ci95", "n")}}
            row |= {name: mean_of(side[name] for side in summary if same_edit(side, row)) for name in ("perplexity", "repetition")}
            others = [abs(cell["mean"]) for cell in spilt if same_edit({**cell, "trait": cell["steered"]}, row) and cell["measured"] != row["trait"]]
            row |= {"spill_over": mean_of(others)} if others else {}
            row |= {name: mean_of(cost[name]["mean"] for cost in costs if same_edit(cost, row)) for name in ("added", "quiz") if costs}
            rows.append(row)
        return rows

    def characters(self) -> dict:
        """Random characters, requested against measured."""
        people, args, alpha = self.people, self.args, max(self.args.alpha)
        of_traits = zip(*(people.bench.questions(trait, "test", args.limit) for trait in TRAITS))
        questions = list(dict.fromkeys(text for some in of_traits for text in some))[:args.limit]
        cells = character_cells(people.bench, random_characters(args.characters, alpha, args.seed), alpha, questions, args.seed)
        made = people.answer(cells, self.answers, "characters")
        alone = [line for line in made if line["method"] == "npti"]  # of which its own trait is wanted
        self.contrast.judge([line for line in made if line["method"] != "npti"], self.scores, TRAITS, "characters: judging")
        self.contrast.judge(alone, self.scores, [], "traits alone: judging")
        table, fluent = self.scored(made)
        means = [(condition, {trait: mean_of(results.per_question(rows[rows.measured == trait])) for trait in rows.measured.unique()})
                 for condition, rows in results.grouped(table[table.judge == "contrast"], results.CONDITION)]
        rows, points = results.characters_measured(means, "contrast", alpha, args.seed)
        perplexity = fluent.groupby(["method", "alpha"], sort=False, dropna=False).perplexity.median().groupby("method").mean()
        rows = [{**row, "perplexity": float(perplexity[row["method"]])} for row in rows]
        if self.reports is not None:
            conditions = [Condition(**{**condition, "trait": condition["trait"] if condition["pole"] else None}) for condition, _ in means]
            reported = [(condition._asdict(), one["traits"]) for condition, one in zip(conditions, self.questionnaire(conditions)[1])]
            more = results.characters_measured(reported, "questionnaire", alpha, args.seed)
            rows, points = rows + more[0], points + more[1]
        return {"characters": rows, "requested": points}


def head_line(run: Evaluation, made_with: dict) -> str:
    """What the figures are of, in one line."""
    args, model = run.args, run.people.model
    made = f"answers of {args.answers}, " if args.answers else (
        f"{run.people.bench.name} bench, {args.max_new_tokens} tokens an answer, alpha {', '.join(f'{alpha:g}' for alpha in args.alpha)}, seed {args.seed}; ")
    head = f"{name_of(model)}, {dtype_of(model)} on {model.device.type}; {made}judges: {', '.join(args.judge)}"
    if run.rater:
        lost = sum(line["score"] is None for line in run.scores if line.get("judge") == run.rater.name)
        head += f" ({run.rater.name}; {lost} replies were no rating)"
    if run.contrast.origin:
        head += f"; judged by {name_of(run.contrast.model)}"
    return head + (f"; edits with {made_with['edits']}" if "edits" in made_with else "") + "."


def evaluate(args) -> None:
    bench = load_bench(args.bench)
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    judging = digest(lines_of("neutral.txt"), lines_of("quiz.csv"), OPTIONS, JUDGE_PERSONAS, rubric(None), rubric(TRAITS[0]))
    made_with = {"model": f"{name_of(model)} {fingerprint(model)}", "template": digest(tokenizer.chat_template), "judging": judging,
                 "bench": bench.fingerprint(), "dtype": str(model.dtype), "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    if (args.where, args.suppress) != ("generated", "cap"):
        made_with["edits"] = f"--where {args.where} --suppress {args.suppress}"
    other = args.judge_model and not args.judge_url
    reader = load_model(args.judge_model, args.device, args.dtype, "--judge-model") if other else (model, tokenizer)
    contrast = ContrastJudge(*reader, bench, args.batch_size, None if reader[0] is model else tokenizer)
    rater = None
    if "llm" in args.judge:
        rater = EndpointJudge(args.judge_url, args.judge_model, args.batch_size) if args.judge_url else LocalJudge(*reader, min(args.batch_size, 32))
    people = Personalities(model, tokenizer, bench, args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with only_run(Path(args.out) / ".lock", f"--out {args.out}: another run is writing it", wait=False):
        run = Evaluation(people, contrast, rater, args, made_with)
        if not args.answers:
            people.identify(args.method, args.trait)
            people.identify(WAYS if args.characters else (), TRAITS)
        steps(run, args, lambda found, made: write_reports(run.out, {"head": head_line(run, made_with), **found}, made, people.neurons.files))


def steps(run: Evaluation, args, write) -> None:
    """All that is asked for, cheapest first; reports are written before the long steps, and at the end."""
    dose = run.doses() if args.dose and set(EDITS) & set(args.method) else []
    made = run.given() if args.answers else run.people.answer(
        run.cells("test", args.method, dict.fromkeys(EDITS, args.alpha), args.limit), run.answers, "answers")
    found = {"dose": dose, **run.test(made)}
    failed = found.pop("failed")
    found["spill_over"] = run.spill_over(made) if args.spill_over else []
    write(found, made)
    # of the personalities themselves: the unedited model is the same one for all traits
    conditions = list(dict.fromkeys(Condition(**{**condition_of(line), **({} if line["pole"] else {"trait": None})}) for line in made))
    if "questionnaire" in args.judge:
        rows, found["questionnaire"] = run.questionnaire(conditions)
        fluent = {(row["trait"], row["method"], row["pole"], row["alpha"]): row for row in found["summary"]}
        like = lambda row: fluent.get((row["trait"], row["method"], row["pole"], row["alpha"]), {})  # noqa: E731
        found["summary"] = found["summary"] + [{**row, **{name: like(row).get(name) for name in ("perplexity", "repetition")}} for row in rows]
        found["spill_over"] = found["spill_over"] + results.questionnaire_spill_over(found["questionnaire"])
    if chosen := results.matched_alphas(dose):
        found["matched"] = run.matched(chosen)
    if args.capability is not None:
        found["capability"] = run.capability(conditions)
        found["harness"] = run.harness(conditions) if args.capability else []
    if args.characters:
        found |= run.characters()
    run.people.neurons.check_unchanged()
    write(found, made)
    if found["summary"]:
        show(found["summary"], found["effects"], found["summary"][0]["judge"])
    print(run.out / "report.html")
    if failed:
        raise UserError(f"{run.rater.name}: not rated: {failed}; what failed is tried again by the same command")


def main(args) -> None:
    if args.compare:
        return compare(*args.compare)
    if args.capability:
        with capability.hugging_face_evaluate():
            capability.lm_eval_modules()
    args.items = read_inventory(args.inventory)
    if args.characters and "questionnaire" in args.judge and {item[1] for item in args.items} != set(TRAITS):
        raise UserError(f"--characters: --inventory {args.inventory} does not ask about all five traits")
    start = time.time()
    with resumable():
        evaluate(args)
    say(f"{time.time() - start:.0f} s")
