"""Measure a personality: does what the model writes move along the trait, at what cost, and how sure is that?

    python evaluate.py --trait extraversion
    python evaluate.py --full --out results
    python evaluate.py --answers FILE --judge contrast llm      answers that something else wrote
    python evaluate.py --compare results other-results

Asks the test questions (never those that identify.py searched with) of the unedited model, under a simple prompt, under a
persona description, and edited, in both poles; judges the answers; and writes answers.jsonl, scores.jsonl, summary.json,
details.json, report.md and report.html, with 95 % intervals over the questions, or the situations that these are asked in.
What is chosen, such as a strength that matches another method's, is chosen on other questions ("validation"), never on those.
"""

from personality import POLES, TRAITS
from personality.terminal import (SUPPRESS, WHERE, Flags, UserError, bench_argument, check_trait, model_arguments, number, positive,
                                  progress, refuse, resumable, script, suppress_argument, where_argument)

METHODS = ("unedited", "simple", "persona", "npti", "trained", "hybrid", "dpn-le", "activation", "residual", "lora")
JUDGES = ("contrast", "llm", "questionnaire")
DOSES = (0.5, 1.0, 1.5, 2.0)
STRENGTH = number(0, 100)  # above 0: both poles are measured


def parser() -> Flags:
    flags = Flags(__doc__)
    add, doses = flags.add_argument, " ".join(f"{dose:g}" for dose in DOSES)
    add("--trait", nargs="+", action="extend", metavar="T", help=f"of {', '.join(TRAITS)}; default: all five")
    add("--alpha", action="append", type=STRENGTH, metavar="A", help="strength of the edits; repeat it for several (default: 1.5)")
    add("--level", action="append", type=STRENGTH, metavar="L",
        help="likewise, of trained edits, alone and in hybrid, and of residual (default: 1)")
    add("--method", nargs="+", action="extend", choices=METHODS, metavar="M",
        help="of " + ", ".join(METHODS) + "; default: the first five (--full: all but lora, which needs peft)")
    add("--judge", nargs="+", action="extend", choices=JUDGES, help="default: contrast")
    add("--judge-model", metavar="M",
        help="what judges, contrast and llm, as --model takes it (default: --model): the base model of a baked one, say; with "
             "--judge-url, which needs it, the name of the judge llm there")
    add("--judge-url", metavar="URL", help="of an OpenAI-compatible server for the judge llm (key: $OPENAI_API_KEY)")
    add("--inventory", metavar="FILE",
        help="of the judge questionnaire: a table with the columns item, key, facet (default: 60 built-in items)")
    add("--spill-over", type=positive, nargs="?", const=4, metavar="N",
        help="judge the answers to the first N questions (default: %(const)s) along all five traits")
    add("--dose", nargs="*", action="extend", type=STRENGTH, metavar="A",
        help=f"dose response on the validation questions, and the methods at matched strength (default: {doses})")
    add("--capability", nargs="?", const="", metavar="TASKS",
        help="what the edits cost in general: offline, or with lm-evaluation-harness's tasks (gsm8k,mmlu)")
    add("--full", action="store_true", help="all of the above, with every method but lora, and every judge")
    add("--characters", type=positive, nargs="?", const=12, metavar="N",
        help="N random characters over five traits (default: %(const)s), requested against measured: composed, with the edits just "
             "added up, by levels, and described in a prompt")
    add("--turns", type=positive, nargs="?", const=6, metavar="N",
        help="also hold conversations of N turns (default: %(const)s), of the test questions: does the personality last?")
    add("--answers", metavar="FILE", help="judge these (JSON lines: trait, pole if known, question, answer), generate none")
    add("--compare", nargs=2, metavar="DIR", help="set two result folders side by side")
    add("--neurons", default="neurons", metavar="DIR", help="default: %(default)s; made where it lacks a trait")
    where_argument(flags)
    suppress_argument(flags)
    bench_argument(flags)
    add("--limit", type=positive, default=12, metavar="N", help="test questions a trait, and --dose's (default: %(default)s)")
    add("--out", default="results", metavar="DIR", help="default: %(default)s")
    model_arguments(flags)
    return flags


RULES = [
    (lambda args: args.judge_url and "llm" not in args.judge, "--judge-url is for the judge llm: --judge contrast llm"),
    (lambda args: args.inventory and "questionnaire" not in args.judge,
     "--inventory is for the judge questionnaire: --judge contrast questionnaire"),
    (lambda args: args.neurons.startswith("npti:"),
     "--neurons npti:DIR is for induce.py: evaluate.py needs the files and answers of identify.py"),
    (lambda args: args.judge_url and not args.judge_model, "--judge-url needs --judge-model, the name of the model there"),
    (lambda args: args.turns and args.turns > args.limit,
     "--turns {turns}: each turn takes a test question of its own, and --limit is {limit}: --limit {turns} or more"),
    (lambda args: args.answers and ("questionnaire" in args.judge or args.capability is not None or args.dose or args.characters
                                    or args.turns),
     "--answers: a questionnaire, capability, doses, turns and characters need the model that wrote them"),
    (lambda args: args.answers and (args.chosen or (args.where, args.suppress) != (WHERE[0], SUPPRESS[0])),
     "--answers: they are judged as they are: --trait, --method, --alpha, --level, --where and --suppress go without it"),
    (lambda args: args.suppress != SUPPRESS[0] and not args.characters and "npti" not in args.method,
     "--suppress: of the methods only npti suppresses neurons: got {method}"),
    (lambda args: args.dose and not args.full and not set(args.method) & (set(args.strengths) - {"hybrid"}),
     "--dose: no method that was asked for has a strength: {method}")]


def arguments():
    args = parser().parse_args()
    args.chosen = bool(args.trait or args.method or args.alpha or args.level)
    args.trait = [*dict.fromkeys(map(check_trait, args.trait or TRAITS))]
    args.alpha = sorted(set(args.alpha or [1.5]))
    args.level = sorted(set(args.level or [1.0]))
    args.strengths = {**dict.fromkeys(("npti", "dpn-le", "activation"), args.alpha),
                      **dict.fromkeys(("trained", "hybrid", "residual"), args.level)}
    args.method = list(dict.fromkeys(args.method or (METHODS[:-1] if args.full else METHODS[:5])))
    args.judge = list(dict.fromkeys(args.judge or (JUDGES if args.full else JUDGES[:1])))
    if args.full:
        args.spill_over, args.capability, args.dose = args.spill_over or 4, args.capability or "", args.dose or list(DOSES)
    args.dose = sorted(set(args.dose or DOSES)) if args.dose is not None else []
    refuse(args, RULES)
    return args


if __name__ == "__main__":
    script(arguments, "evaluate")  # imports this file, which needs torch from here on, and runs main()

import contextlib, functools, itertools, random  # noqa: E401, E402
from pathlib import Path  # noqa: E402

from identify import identify  # noqa: E402
from personality import capability, results  # noqa: E402
from personality.baselines import Baselines, import_peft  # noqa: E402
from personality.estimates import ANY, estimate, mean_of, share  # noqa: E402
from personality.grid import (character_cells, check_turns, described, grid, is_answer, is_cost, is_report, is_score,  # noqa: E402
                              random_characters, say_seen, talks)
from personality.judges import (JUDGE_PERSONAS, OPTIONS, ContrastJudge, EndpointJudge, LocalJudge, percentiles,  # noqa: E402
                                rate_answers, rubric, self_report)
from personality.methods import LEVELS, Character, Profiles, npti_edits, suppressed  # noqa: E402
from personality.frame import Frame  # noqa: E402
from personality.load import load_asked  # noqa: E402
from personality.model import TEST_PENALTY, BatchSize, answer_ids, answers, fingerprint, name_of, without_stop  # noqa: E402
from personality.neurons import NeuronFolder  # noqa: E402
from personality.questions import Bench, load_bench, read_given, read_inventory  # noqa: E402
from personality.report import compare, show, write_reports  # noqa: E402
from personality.results import EDITS, HYBRID, IN_THE_MODEL, TUNED, WAYS, Condition, condition_of, distinct, only  # noqa: E402
from personality.steer import Profile, steer  # noqa: E402
from personality.store import Journal, digest, lines_of, only_run  # noqa: E402
from personality.train import add_trained  # noqa: E402

STEERED, TRAINED = (*EDITS, HYBRID, *WAYS[:3]), ("trained", HYBRID, "levels")


# ---------------------------------------------------------------------------------------------------- the model as others


class Personalities:
    """The model under every method, trait, pole and strength: a system prompt, a profile, or neither."""

    def __init__(self, model, tokenizer, bench: Bench, args):
        self.model, self.tokenizer, self.bench, self.args, self.frame = model, tokenizer, bench, args, Frame.named(args.frame)
        self.size = BatchSize(args.batch_size)
        options = {"out": args.neurons, **{name: getattr(args, name) for name in ("bench", "frame", "batch_size", "seed")}}
        self.neurons = NeuronFolder(model, args.neurons, functools.partial(identify, model, tokenizer, **options), self.frame,
                                    functools.partial(add_trained, model, tokenizer, bench, seed=args.seed))
        self.profiles = Profiles(model, tokenizer, self.neurons, suppress=args.suppress)
        self.baselines = Baselines(model, tokenizer, bench, self.neurons, args.seed)
        self.level_per_alpha = max(args.level) / max(args.alpha)  # so that a character's highest alpha is its highest level

    def profile(self, condition: Condition) -> Profile:
        method, trait, pole, alpha = condition
        if method == "composed":
            return self.profiles.of(Character(dict(zip(TRAITS, alpha))))
        if method == "added":
            edits = [edits for trait, own in zip(TRAITS, alpha) for edits in npti_edits(self.neurons[trait], own)]
            return suppressed(Profile.of(edits), self.args.suppress)
        if method == "levels":
            return self.profiles.of(Character({trait: own * self.level_per_alpha for trait, own in zip(TRAITS, alpha)}, "trained"))
        if method == "residual":
            return self.baselines.residual(trait, alpha if pole == "high" else -alpha)
        return self.profiles.of(Character({trait: alpha if pole == "high" else -alpha}, "trained" if method == HYBRID else method))

    def key(self, condition: Condition) -> str | None:
        """What a method's edits come from, for the keys of what is made with them."""
        if condition.method not in (*STEERED, TUNED):
            return None
        traits = [condition.trait] if condition.trait else TRAITS
        keys = [self.neurons.trained(trait).trained_key if condition.method in TRAINED else
                self.baselines.key(trait, condition.method) if condition.method in ("residual", TUNED) else "" for trait in traits]
        method = condition.method + (f"{self.level_per_alpha}/{LEVELS}" if condition.method == "levels" else "")
        return f"{method}/{'/'.join(self.neurons[trait].key + key for trait, key in zip(traits, keys))}"

    def steered(self, condition: Condition):
        """A context in which every row of the model has the condition's edits; prompts do nothing here."""
        if condition.method == TUNED:
            return self.baselines.tuned(condition.trait, condition.pole)
        return steer(self.model, self.profile(condition), where="all") if condition.method in STEERED else contextlib.nullcontext()

    def system(self, condition: Condition) -> str | None:
        """A condition's system prompt where there is no question that could pick one."""
        if condition.method == "described":
            return described(self.bench, condition.alpha, random.Random(f"{self.args.seed}/{condition.alpha}"))
        if condition.method not in ("simple", "persona", HYBRID):
            return None
        cells = grid(self.bench, condition.trait, [condition.method], {}, ["a questionnaire"], self.args.seed)
        return next(cell["persona"] for cell in cells if cell["pole"] == condition.pole)

    def answer(self, cells: list[dict], journal: Journal, title: str) -> list[dict]:
        """Answer what is not answered yet. Methods, poles and alphas share batches, a row each; but fine-tuning is of the model."""
        cells = [{"key": digest(cell, self.key(condition_of(cell))), **cell} for cell in cells]
        todo = [cell for cell in cells if cell["key"] not in journal]
        alone = lambda cell: condition_of(cell) if cell["method"] == TUNED else None  # noqa: E731
        with progress(len(cells), len(cells) - len(todo), title) as bar:
            for condition in dict.fromkeys(map(alone, todo)):
                with self.steered(condition) if condition else contextlib.nullcontext():
                    self.answer_batches([cell for cell in todo if alone(cell) == condition], journal, bar)
        return [journal[cell["key"]] for cell in cells]

    def answer_batches(self, cells: list[dict], journal: Journal, bar) -> None:
        steered = dict.fromkeys(condition for condition in map(condition_of, cells) if condition.method in STEERED)
        number_of = {condition: number for number, condition in enumerate(steered, 1)}
        profiles = [self.profile(condition) for condition in steered] or [Profile.empty()]

        def answered(batch):
            asked = [self.frame.turns(cell["question"], cell["persona"], cell.get("before", ())) for cell in batch]
            with steer(self.model, profiles, [number_of.get(condition_of(cell), 0) for cell in batch], self.args.where):
                said = answers(self.model, self.tokenizer, asked, self.args.max_new_tokens, repetition_penalty=TEST_PENALTY)
            return [{**cell, "answer": text, "ids": without_stop(self.tokenizer, ids)} for cell, (text, ids) in zip(batch, said)]

        for lines in self.size.each(answered, cells):
            journal.append(*lines)
            bar.update(len(lines))

    def in_batches(self, work, number: int, *more):
        """work(model, tokenizer, *more, rows), whose rows are `number` in all, in batches that fit."""
        return self.size.fit(functools.partial(work, self.model, self.tokenizer, *more), number)

    def measure(self, conditions: list[Condition], title: str, journal: Journal, figures_of) -> list[tuple[dict, dict]]:
        """(condition, its line in the journal) of figures_of(condition) under each condition's edits, none of them done twice."""
        keys = [digest(title, condition, self.key(condition)) for condition in conditions]
        with progress(len(conditions), 0, title, "personality") as bar:
            for condition, key in zip(conditions, keys):
                if key not in journal:
                    with self.steered(condition):
                        journal.append({"key": key, "condition": condition, **figures_of(condition)})
                bar.update()
        return [(condition._asdict(), journal[key]) for condition, key in zip(conditions, keys)]


# ---------------------------------------------------------------------------------------------------------- the evaluation


class Evaluation:
    """One run: its files, its judges, and the steps. Each returns its figures."""

    def __init__(self, people: Personalities, contrast: ContrastJudge, rater, args, made_with: dict):
        self.people, self.contrast, self.rater, self.args, self.out = people, contrast, rater, args, Path(args.out)
        journal = lambda name, is_line, **more: Journal(self.out / f"{name}.jsonl", {**made_with, **more}, is_line)  # noqa: E731
        self.answers, self.scores = journal("answers", is_answer), journal("scores", is_score)
        self.reports = journal("questionnaire", is_report, items=digest(args.items)) if "questionnaire" in args.judge else None
        self.costs = journal("capability", is_cost) if args.capability is not None else None
        self.origins = {"contrast": contrast.origin, **({rater.name: rater.origin} if rater else {})}

    def cells(self, split: str, methods, alphas: dict, limit: int, traits=None) -> list[dict]:
        bench, seed = self.people.bench, self.args.seed
        return [cell for trait in traits or self.args.trait
                for cell in grid(bench, trait, methods, alphas, bench.questions(trait, split, limit), seed)]

    def tables(self, made: list[dict], judges=("contrast",)):
        """(scores by these judges, fluency) of answers."""
        table = results.scored(made, self.scores, self.origins)
        return table[table.judge.isin(judges)], results.fluency_table(made, self.scores, self.contrast.origin)

    def judged(self, made: list[dict], title: str) -> tuple[list[dict], list[dict]]:
        """(summary, effects) of answers by the contrast judge."""
        self.contrast.judge(made, self.scores, [], title)
        (table, fluent), seed = self.tables(made), self.args.seed
        summary = results.summarise(table, results.fluency(fluent, table, seed), seed)
        return summary, results.effects(results.high_minus_low(table), seed)

    def given(self) -> list[dict]:
        """The answers of --answers FILE."""
        lines = [{**line, "method": "given", "alpha": None, "persona": None} for line in read_given(self.args.answers)]
        return [{"key": digest(k, line), **line, "ids": answer_ids(self.people.tokenizer, line["answer"])}
                for k, line in enumerate(lines)]

    def doses(self) -> list[dict]:
        """The effects of the strengths, on the validation questions."""
        methods = [method for method in EDITS if method in self.args.method]
        cells = self.cells("validation", methods, dict.fromkeys(methods, self.args.dose), self.args.limit)
        summary, effects = self.judged(self.people.answer(cells, self.answers, "doses: answers"), "doses: judging")
        return [{**row, "perplexity": mean_of(side["perplexity"] for side in results.of_edit(summary, row))} for row in effects]

    def test(self, made: list[dict]) -> tuple[dict, dict]:
        """(figures, what could not be rated) of every judge of texts on the test questions' answers."""
        self.contrast.judge(made, self.scores, [], "judging")  # its fluency is every judge's
        failed = rate_answers(self.rater, made, self.scores) if self.rater else {}
        judges = [self.rater.name if name == "llm" else name for name in self.args.judge if name != "questionnaire"]
        (table, prices), seed = self.tables(made, judges), self.args.seed
        fluent, apart = results.fluency(prices, table, seed), results.high_minus_low(table)
        return {"summary": results.summarise(table, fluent, seed), "effects": results.effects(apart, seed),
                "beside": results.beside_unedited(table, prices, seed), "between": results.compared(apart, seed), "fluency": fluent,
                "agreement": results.agreement(table, judges),
                "accuracy": results.accuracy(table) if self.args.answers else []}, failed

    def conversations(self) -> list[dict]:
        """The effects in each turn of conversations, and the perplexity beside the unedited model's in the same turn."""
        people, args, rows = self.people, self.args, []
        going = talks(people.bench, args.trait, args.method, args.strengths, args.turns, args.limit, args.seed)
        before = [[] for _ in going]
        for turn in range(args.turns):
            cells = [{**talk[turn], "before": list(said)} for talk, said in zip(going, before)]
            made = people.answer(cells, self.answers, f"turn {turn + 1}")
            for said, line in zip(before, made):
                said.append([line["question"], line["answer"]])
            summary, effects = self.judged(made, f"turn {turn + 1}: judging")
            for row in effects:
                plain, own = only(summary, trait=row["trait"], method="unedited"), results.of_edit(summary, row)
                sides = {name: mean_of(side[name] for side in own) for name in ("perplexity", "repetition")}
                unedited = mean_of(side["perplexity"] for side in plain) if plain else None
                rows.append({"turn": turn + 1, **row, **sides, "unedited": unedited})
        return rows

    def spill_over(self, made: list[dict]) -> list[dict]:
        """The matrix, from the answers to each trait's first few questions."""
        first = {trait: distinct(only(made, trait=trait), "question")[:self.args.spill_over] for trait in TRAITS}
        made = [line for line in made if line["question"] in first[line["trait"]] and line["method"] not in ("unedited", "simple")]
        self.contrast.judge(made, self.scores, TRAITS, "spill-over")
        return results.spill_over(self.tables(made)[0], self.args.seed)

    def questionnaire(self, conditions: list[Condition]) -> tuple[list[dict], list[dict]]:
        """(rows for summary.json, by personality) of the self-reports."""
        people, items = self.people, self.args.items
        lines = people.measure(conditions, "questionnaire", self.reports, lambda condition: {
            "items": people.in_batches(self_report, len(items) * len(OPTIONS), items, people.system(condition))})
        rows, reported = results.questionnaire([(condition, line["items"]) for condition, line in lines], items, self.args.seed)
        return rows, [{**person, "percentiles": percentiles(person["traits"], len(items))} for person in reported]

    def capability(self, conditions: list[Condition]) -> list[dict]:
        """What an edit costs: nats added a token on neutral text, agreement with the unedited first choices, the quiz."""
        people, args = self.people, self.args
        texts, choices_of_four = len(lines_of("neutral.txt")), 4 * len(capability.quiz_questions())
        losses, choices = people.in_batches(capability.neutral_pass, texts)

        def measure(condition):
            result = {"quiz": people.in_batches(capability.quiz, choices_of_four, people.system(condition))}
            if condition.method in IN_THE_MODEL:  # a prompt has no part in a text
                edited, chosen = people.in_batches(capability.neutral_pass, texts)
                result |= {"added": [a - b for a, b in zip(edited, losses)],
                           "agreement": [float((a == b).float().mean()) for a, b in zip(chosen, choices)]}
            return result

        ends = {"added": ANY, "agreement": (0, 1)}
        return [{**condition, "quiz": share(line["quiz"]),
                 **{name: estimate(line[name], args.seed, ends[name]) for name in ends if name in line}}
                for condition, line in people.measure(conditions, "capability", self.costs, measure)]

    def harness(self, conditions: list[Condition]) -> list[dict]:
        people, tasks = self.people, self.args.capability
        conditions = [condition for condition in conditions if condition.method in IN_THE_MODEL]
        lines = people.measure(conditions, f"lm_eval {tasks}", self.costs, lambda condition: {"tasks": capability.harness(
            people.model, people.tokenizer, tasks, self.args.batch_size, self.args.seed)})
        return [{**condition, "task": task, "metric": metric, "value": value} for condition, line in lines
                for task, scores in line["tasks"].items() for metric, value in scores.items()]

    def matched(self, chosen: list[dict]) -> list[dict]:
        """The methods at matched strength: the test questions' effect and price."""
        made = []
        for row in chosen:
            cells = self.cells("test", [row["method"]], {row["method"]: [row["alpha"]]}, self.args.limit, [row["trait"]])
            made += self.people.answer(cells, self.answers, f"matched {row['method']}, {row['trait']}")
        summary, effects = self.judged(made, "matched: judging")
        spilt = self.spill_over(made) if self.args.spill_over else []
        edits = [Condition(row["method"], row["trait"], pole, row["alpha"]) for row in chosen for pole in POLES]
        costs = self.capability(edits) if self.costs is not None else []
        return [results.at_matched_strength(row, effects, summary, spilt, costs) for row in chosen]

    def characters(self) -> dict:
        """Random characters, requested against measured."""
        people, args, alpha = self.people, self.args, max(self.args.alpha)
        of_traits = [people.bench.questions(trait, "test", args.limit) for trait in TRAITS]
        questions = list(dict.fromkeys(itertools.chain(*zip(*of_traits))))[:args.limit]
        characters, alone = random_characters(args.characters, alpha, args.seed), {"npti": alpha, "trained": max(args.level)}
        made = people.answer(character_cells(people.bench, characters, alone, questions, args.seed), self.answers, "characters")
        self.contrast.judge([line for line in made if line["method"] not in alone], self.scores, TRAITS, "characters: judging")
        self.contrast.judge([line for line in made if line["method"] in alone], self.scores, [], "traits alone: judging")
        table, fluent = self.tables(made)
        means = [(condition, results.per_question(rows, ["measured"]).groupby("measured", sort=False).score.mean().to_dict())
                 for condition, rows in results.grouped(table, results.CONDITION)]
        rows, points = results.characters_measured(means, "contrast", alpha, args.seed)
        perplexity = fluent.groupby(["method", "alpha"], sort=False, dropna=False).perplexity.median().groupby("method").mean()
        rows = [{**row, "perplexity": float(perplexity[row["method"]])} for row in rows]
        if self.reports is not None:
            _, reported = self.questionnaire([without_trait(condition_of(condition)) for condition, _ in means])
            reported = [(person, person["traits"]) for person in reported]
            more = results.characters_measured(reported, "questionnaire", alpha, args.seed)
            rows, points = rows + more[0], points + more[1]
        return {"characters": rows, "requested": points}


def without_trait(condition: Condition) -> Condition:
    """Of a personality, whatever trait it was asked about: the unedited model is the same one for all of them."""
    return condition if condition.pole else condition._replace(trait=None)


def evaluate(args) -> None:
    check_turns(bench := load_bench(args.bench), args.trait, args.turns)
    model, tokenizer = load_asked(args)
    judging = digest(lines_of("neutral.txt"), lines_of("quiz.csv"), OPTIONS, JUDGE_PERSONAS, rubric(None), rubric(TRAITS[0]))
    made_with = {"model": f"{name_of(model)} {fingerprint(model)}", "template": digest(tokenizer.chat_template), "judging": judging,
                 "bench": bench.fingerprint(), "dtype": str(model.dtype), "max_new_tokens": args.max_new_tokens, "seed": args.seed,
                 **Frame.named(args.frame).made_with()}
    if (args.where, args.suppress) != (WHERE[0], SUPPRESS[0]):
        made_with["edits"] = f"--where {args.where} --suppress {args.suppress}"
    people, local = Personalities(model, tokenizer, bench, args), args.judge_model and not args.judge_url
    reader = load_asked(args, args.judge_model, "--judge-model") if local else (model, tokenizer)
    contrast = ContrastJudge(*reader, bench, args.batch_size, people.frame, tokenizer if local else None)
    rater = (EndpointJudge(args.judge_url, args.judge_model, args.batch_size) if args.judge_url else
             LocalJudge(*reader, min(args.batch_size, 32)) if "llm" in args.judge else None)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with only_run(Path(args.out) / ".lock", f"--out {args.out}: another run is writing it", wait=False):
        run = Evaluation(people, contrast, rater, args, made_with)
        make = people.neurons.trained if args.characters or set(args.method) & set(TRAINED) else people.neurons.__getitem__
        edited = [trait for trait in args.trait if set(args.method) & {*STEERED, TUNED}] + list(TRAITS if args.characters else ())
        for trait in dict.fromkeys(edited) if not args.answers else ():
            say_seen(make(trait), bench.questions(trait, "test", args.limit), make == people.neurons.trained)  # made first
        steps(run, args, lambda found, made: write_reports(
            run.out, {"head": results.head_line(run, made_with, made), **found}, made, people.neurons.files))


def steps(run: Evaluation, args, write) -> None:
    """All that is asked for, cheapest first; reports are written before the long steps, and at the end."""
    dose = run.doses() if args.dose and set(EDITS) & set(args.method) else []
    made = run.given() if args.answers else run.people.answer(
        run.cells("test", args.method, args.strengths, args.limit), run.answers, "answers")
    figures, failed = run.test(made)
    found = {"dose": dose, **figures, "spill_over": run.spill_over(made) if args.spill_over else []}
    write(found, made)
    conditions = list(dict.fromkeys(without_trait(condition_of(line)) for line in made))
    if "questionnaire" in args.judge:
        rows, found["questionnaire"] = run.questionnaire(conditions)
        found["summary"] = found["summary"] + results.with_fluency(rows, found["summary"])
        found["spill_over"] = found["spill_over"] + results.questionnaire_spill_over(found["questionnaire"])
    if chosen := results.matched_alphas(dose):
        found["matched"] = run.matched(chosen)
    if args.capability is not None:
        found["capability"] = run.capability(conditions)
        found["harness"] = run.harness(conditions) if args.capability else []
    if args.turns:
        found["conversations"] = run.conversations()
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
    if TUNED in args.method:
        import_peft()
    with resumable():
        evaluate(args)
