"""Find the neurons of a language model that fire for one pole of a Big Five trait and not for the other.

    python identify.py --trait extraversion
    python identify.py --model meta-llama/Llama-3.1-8B-Instruct --bench PersonalityBench --max-new-tokens 500

Each search question is asked twice, under a persona of the high and of the low pole; while the model answers, one fused
op (csrc/) counts how often and how strongly every MLP neuron fires. From that comes a neuron file for a model and trait,
which induce.py turns into a personality. The method is NPTI (ICLR 2025, arXiv 2410.12327), section 3.2.
"""

import os

from personality import POLES, TRAITS
from personality.terminal import (IN_FLIGHT, TEAM_RULES, Flags, UserError, bench_argument, check_trait, model_arguments,
                                  out_of_memory, positive, progress, refuse, resumable, say, script, team_argument, where_argument,
                                  writer_arguments)

LIMIT, SIZE = 128, 360  # search questions: asked, and built


def parser() -> Flags:
    flags = Flags(__doc__)
    flags.add_argument("--trait", nargs="+", action="extend", metavar="T",
                       help=f"of {', '.join(TRAITS)}; default: all five, or those that --answers FILE has")
    bench_argument(flags)
    flags.add_argument("--limit", type=positive, metavar="N", help=f"search questions a trait (default: {LIMIT})")
    flags.add_argument("--train", action="store_true", help="also train edits of few neurons: what induce.py --level uses")
    flags.add_argument("--answers", metavar="FILE",
                       help="read answers, asked in --frame (JSON lines: trait, pole, persona, question, answer), generate none")
    flags.add_argument("--engine", metavar="URL",
                       help="have an OpenAI-compatible server of the same model (vLLM, SGLang, llama.cpp) write the answers; key: "
                            "$OPENAI_API_KEY")
    writer_arguments(flags, SIZE)
    flags.add_argument("--out", default="neurons", metavar="DIR", help="default: %(default)s")
    where_argument(flags)
    model_arguments(flags)
    team_argument(flags)
    return flags


RULES = [(lambda args, name=name: args.build_bench and getattr(args, name),
          f"--build-bench DIR writes a bench of all traits, --size N questions each: --{name} goes with identification")
         for name in ("trait", "bench", "limit", "answers", "engine", "train")] + TEAM_RULES + [
    (lambda args: args.build_bench and os.environ.get("WORLD_SIZE", "1") != "1",
     "--build-bench: one process is enough (--in-flight N), torchrun would pay for each request several times"),
    (lambda args: (args.size or args.writer) and not args.build_bench, "--size N and --writer go with --build-bench DIR; --limit N "
     "is the number of questions that are asked, --engine URL a server that writes the answers"),
    (lambda args: (args.in_flight != IN_FLIGHT or args.served_model not in (None, os.environ.get("OPENAI_MODEL")))
     and not args.engine and not args.build_bench, "--in-flight N and --served-model go with --engine URL or --build-bench DIR"),
    (lambda args: args.max_new_tokens == 1 and args.where == "generated" and not args.answers and not args.build_bench,
     "--max-new-tokens 1: no generated token is ever an input then, so there is nothing to count: 2 at least"),
    (lambda args: args.answers and args.engine, "--answers FILE has the answers already: --engine goes without it"),
    (lambda args: args.train and args.tp != 1,
     "--train: edits are trained by one process: --tp goes without it (--device-map auto)"),
    (lambda args: args.answers and args.limit,
     "--answers FILE has questions and answers, all of which count: --limit goes without it")]


def arguments():
    args = parser().parse_args()
    refuse(args, RULES)
    args.traits = [*dict.fromkeys(map(check_trait, args.trait or ()))]
    return args


if __name__ == "__main__":
    script(arguments, "identify")  # imports this file, which needs torch from here on, and runs main()

import contextlib, hashlib, itertools, json, math, random, re, time  # noqa: E401, E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.torch import save  # noqa: E402

from personality.endpoint import Endpoint, RemoteEngine  # noqa: E402
from personality.frame import Frame, declines, with_declined  # noqa: E402
from personality.mlp import decoder_of, find_mlps  # noqa: E402
from personality.load import load_asked  # noqa: E402
from personality.model import SEARCH_PENALTY, answer_inputs, answers, dtype_of, enough_memory, fingerprint, with_ids  # noqa: E402
from personality.neurons import FORMAT, Neurons, answers_path, neuron_path, show_neurons  # noqa: E402
from personality.observe import FEWEST, Statistics, groups_of, observe, shapes_at  # noqa: E402
from personality.questions import Bench, load_bench, read_answers, search_items  # noqa: E402
from personality.train import add_trained  # noqa: E402
from personality.store import Journal, digest, json_lines, lock_of, only_run, plain_path, to_line, write_atomically  # noqa: E402
from personality.world import World  # noqa: E402


def read_batches(model, tokenizer, items: list[dict], frame: Frame, statistics: Statistics, where: str, size: int) -> None:
    """Forward passes over answers that are there, observing the same positions as while they are written; like lengths (in
    characters, about) together, so that little is padding."""
    items = sorted(items, key=lambda item: len(item["persona"]) + len(item["question"]) + 4 * len(item["ids"]))
    for start in range(0, len(items), size):
        batch = items[start:start + size]
        inputs, counted = answer_inputs(model, tokenizer, batch, frame, where)
        with torch.no_grad(), observe(model, statistics, groups_of(batch), counted):
            decoder_of(model)(**inputs, use_cache=False)


class Run:
    """The identification of one trait, which can be killed at any moment: state is the statistics, the number of answers done, and
    the schedule, saved together. schedule: [first item, batch size] pairs; a batch that is too large for the memory adds one, and
    what came before it is done again as it was."""

    AGAIN = 2  # times that a question is asked anew where its answer declines to be anyone
    LARGE = 4 << 30  # bytes: of larger statistics no second copy is kept for the batch that runs
    PAUSE = 20.0  # seconds between two savings; 0: one after every batch
    READ_AT_ONCE = 8  # batches of answers that are there: within them, answers of like length are read together

    def __init__(self, model, tokenizer, bench: Bench, trait: str, args, world: World = World(), endpoint: Endpoint | None = None):
        self.model, self.tokenizer, self.bench, self.trait, self.args, self.world = model, tokenizer, bench, trait, args, world
        self.frame = Frame.named(args.frame)
        if args.answers:
            self.items, content = read_answers(args.answers, trait)
        else:
            self.items = search_items(bench, trait, args.limit or LIMIT, args.seed)
            content = digest(self.items)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        self.path, self.answers = neuron_path(args.out, trait), answers_path(args.out, trait)
        self.meta = {
            "format": FORMAT, "model": model.source, "revision": getattr(model.config, "_commit_hash", None) or "",
            "fingerprint": fingerprint(model), "trait": trait, "where": args.where, "template": digest(tokenizer.chat_template),
            "bench": plain_path(args.answers or bench.name), "questions": len(self.items) // 2, "bench_fingerprint": content,
            "max_new_tokens": args.max_new_tokens, "repetition_penalty": SEARCH_PENALTY, "batch_size": args.batch_size,
            "dtype": dtype_of(model), "device": model.device.type, "seed": args.seed, **self.frame.made_with(),
            **({"engine": endpoint.model} if endpoint else {})}
        self.key = digest(self.meta)
        self.engine = endpoint and RemoteEngine(endpoint, tokenizer, self.frame, args.out, args.max_new_tokens, fingerprint(model))
        self.at_once = self.READ_AT_ONCE if args.answers or endpoint else 1  # batches that are done, and saved, together
        self.share = world.share(len(self.items), args.batch_size * self.at_once)
        self.saved = self.file_of(world.rank, "state.safetensors")

    def file_of(self, rank: int, what: str) -> Path:
        """Named by what is run, so that a run with other options leaves it alone."""
        of = f".{rank}of{self.world.size}" + (f"by{self.world.tp}" if self.world.tp > 1 else "") if self.world.size > 1 else ""
        return self.path.with_name(f".{self.trait}.{self.key}{of}.{what}")

    def identify(self) -> Neurons | None:
        """The neuron file: the one that is there, if it was made of the same, else a new one. Of several processes the first has
        it."""
        with self.alone():
            there, found = None if self.world.rank else self.brought_back(), None
            if self.world.told(bool(there and there.key == self.key)):
                self.world.say(f"{self.path} is there, made with the same model, questions and options")
            else:
                self.go_on()
                self.world.add_up(self.statistics.state())
                found = None if self.world.team else self.summarise()
            self.world.wait()
            neurons = None if self.world.rank else self.put(found)
            self.world.wait()
        return neurons

    def alone(self):
        """No other run of these options meanwhile, of however many processes: the first takes the lock, the others wait for it."""
        lock, busy = self.path.with_name(f".{self.trait}.{self.key}.lock"), f"{self.path}: another run makes it, this one waits"
        return contextlib.nullcontext() if self.world.rank else only_run(lock, busy)

    def file_there(self) -> Neurons | None:
        """The neuron file that is there and whole, of whatever options."""
        with contextlib.suppress(UserError):
            return Neurons.load(self.path)

    def summarise(self) -> tuple[list[int], dict]:
        """(tokens by pole, what a neuron file holds), of all processes."""
        return self.statistics.tokens.tolist(), self.world.put_together(self.statistics.summary(self.world.place))

    def put(self, found) -> Neurons:
        """The neuron file in its place, its answers beside it: of what was found, or (None) the one that is there. Runs of other
        options may want that place too: where it is theirs by then, that is an error."""
        with only_run(lock_of(self.path)):
            if found:
                self.write(*found)
            neurons = Neurons.load(self.path)
            if neurons.key != self.key:
                raise UserError(f"{self.path}: was replaced by a run of other options meanwhile: start it again")
            self.collect_answers()
        return neurons

    def write(self, tokens: list[int], tensors: dict) -> None:
        """Write the neuron file. What a run with other options made is kept under a name that says which."""
        if all(tokens) and not bool(tensors["prob"].any()):
            raise UserError(f"{self.trait}: no expert saw {FEWEST} tokens under either pole: a higher --limit or --max-new-tokens")
        compliance = self.compliance()
        if not all(tokens):
            raise UserError(f"{self.trait}: {tokens[0]} tokens were counted under the high pole, {tokens[1]} under the low one: "
                            f"neurons are told apart by both ({sum(compliance['declined'])} answers declined to be anyone)")
        if min(tokens) < FEWEST:
            say(f"{self.trait}: only {min(tokens)} tokens were counted under a pole, so neurons differ by chance, too: expected "
                f"{FEWEST} or more, of more or longer answers")
        self.set_aside()
        Neurons(tensors, {**self.meta, "key": self.key, "tokens": tokens, **compliance}).save(self.path)

    def set_aside(self) -> None:
        """Keep the file that is there under a name that says what it was made of."""
        if self.path.exists():
            there = self.file_there()  # where it is damaged, its answers may be whole
            other = re.sub(r"\W", "", there.key) if there else f"damaged-{hashlib.sha256(self.path.read_bytes()).hexdigest()[:8]}"
            self.rename(self.trait, f"{self.trait}.{other}", answers_path, neuron_path)
            say(f"{self.path} was of other options: it is {self.trait}.{other}.safetensors now")

    def brought_back(self) -> Neurons | None:
        """file_there(), after a file of these very options, which a run of others set aside, was put into its place again."""
        kept, there = f"{self.trait}.{self.key}", self.file_there()
        if answers_path(self.args.out, kept).exists() and not (there and there.key == self.key):
            with only_run(lock_of(self.path)), contextlib.suppress(UserError):
                if Neurons.load(neuron_path(self.args.out, kept)).key == self.key:
                    self.set_aside()
                    self.rename(kept, self.trait, neuron_path, answers_path)
        return self.file_there()

    def rename(self, old: str, new: str, *paths_of) -> None:
        """Of a neuron file and its answers, in an order in which a run that is killed between the two loses neither: the answers of
        the file in the place are there, too, or have the name of those that were set aside."""
        for path_of in paths_of:
            if path_of(self.args.out, old).exists():
                os.replace(path_of(self.args.out, old), path_of(self.args.out, new))

    def parts(self) -> list[Journal]:
        """The answers of every rank."""
        paths = [self.file_of(rank, "answers.part") for rank in range(0, self.world.size, self.world.tp)]
        return [Journal(path) for path in paths if path.exists()]

    def compliance(self) -> dict:
        """By pole, how many answers were asked for, and how many of them declined to be anyone."""
        asked, declined = dict.fromkeys(POLES, 0), dict.fromkeys(POLES, 0)
        for line in itertools.chain(*self.parts()):
            asked[line["pole"]] += line["declined"] + (not declines(line["answer"]))
            declined[line["pole"]] += line["declined"]
        return {"asked": list(asked.values()), "declined": list(declined.values())}

    def collect_answers(self) -> None:
        """Put the ranks' answers into one file, after the neuron file: who was killed between the two comes by here again."""
        parts = self.parts()
        if sum(map(len, parts)) == len(self.items):  # not those that a run of fewer processes has left
            write_atomically(self.answers, map(to_line, itertools.chain(*parts)))
        if not self.answers.exists():
            self.rename(f"{self.trait}.{self.key}", self.trait, answers_path)
        if not self.answers.exists():
            raise UserError(f"{self.answers}: the answers are not all there any more; {self.path} is whole")
        for left in self.path.parent.glob(f".*{self.key}*"):
            if not left.name.endswith("lock"):
                left.unlink(missing_ok=True)

    def go_on(self) -> None:
        """Do what is left of the answers, batch by batch."""
        self.statistics, self.part = self.nothing_yet(), Journal(self.file_of(self.world.rank, "answers.part"))
        # of one batch, which counts if nobody in it declines; where it would be too large, answers are read once they are written
        read_afterwards = self.args.answers or self.engine or self.statistics.bytes > self.LARGE
        self.of_batch = None if read_afterwards else self.nothing_yet()
        if self.resume():
            self.world.say(f"going on with {self.trait} after {self.done} of {len(self.share)} answers")
        title = self.trait if self.world.teams == 1 else f"{self.trait}, 1 of {self.world.teams}"
        due = time.time() + self.PAUSE
        with resumable(), progress(len(self.share), self.done, title, hidden=self.world.rank > 0) as bar:
            while self.done < len(self.share):
                try:
                    self.batch()
                except (RuntimeError, MemoryError) as error:
                    self.world.check(error)
                    if not out_of_memory(error) or self.world.tp > 1:  # then the rest of the team is in the batch still
                        raise
                    self.halve(error)
                start = time.time()
                if self.world.agree(start >= due):
                    self.save()
                    due = time.time() + (self.PAUSE and max(self.PAUSE, 30 * (time.time() - start)))  # at most 3 % of the time
                bar.update(self.done - bar.n)
        if self.world.size > 1:
            self.save()  # before it waits for the others

    def nothing_yet(self) -> Statistics:
        mlps = find_mlps(self.model)
        size = sum(math.prod(shape) * dtype.itemsize for mlp in mlps for shape, dtype in shapes_at(mlp, len(POLES)))
        with enough_memory(f"the statistics of {sum(mlp.neurons for mlp in mlps):,} neurons take some {size / 1e9:.0f} GB beside "
                           "the model: --quantize or --device-map auto may make room"):
            return Statistics.of(self.model, len(POLES))

    def batch(self) -> None:
        size = [size for first, size in self.schedule if first <= self.done][-1]
        end = min([self.done + size * self.at_once, len(self.share)] + [first for first, _ in self.schedule if first > self.done])
        where = self.share[self.done:end]
        items, observed = self.answered([self.items[k] for k in where])
        playing = [item for item in items if not declines(item["answer"])]
        if observed and not any(item["declined"] for item in items):
            self.statistics.add(self.of_batch)
        elif playing:
            read_batches(self.model, self.tokenizer, playing, self.frame, self.statistics, self.args.where, size)
        if (layer := self.statistics.broken_layer()) is not None:
            raise UserError(f"layer {layer} gave NaN or infinite activations in the answers {where.start + 1} to {where.stop}: "
                            "try --dtype float32")
        names = ("pole", "persona", "question", "answer", "ids", "declined")
        self.part.append(*({"trait": self.trait, **{name: item[name] for name in names}} for item in items))
        self.done = end

    def answered(self, items: list[dict]) -> tuple[list[dict], bool]:
        """(the items with their answers, whether self.of_batch observed them all). An answer that declines to be anyone is asked
        for anew, AGAIN times at most, under another persona of the pole; item["declined"]: how many declined."""
        if self.args.answers:
            return with_declined(with_ids(self.tokenizer, items)), False
        if self.of_batch:
            self.of_batch.zero()
        with observe(self.model, self.of_batch, groups_of(items), self.args.where) if self.of_batch else contextlib.nullcontext():
            items = with_declined(self.ask(items))
        for attempt in range(self.AGAIN):
            again = [k for k, item in enumerate(items) if declines(item["answer"])]
            asked = [self.another_persona(items[k], attempt) for k in again]
            for k, item in zip(again, self.ask(asked) if asked else ()):
                items[k] = {**item, "declined": item["declined"] + declines(item["answer"])}
        return items, self.of_batch is not None

    def ask(self, items: list[dict]) -> list[dict]:
        if self.engine:
            return self.world.agree(None if self.world.place else self.engine.answer(items))  # one of a team asks
        asked = [self.frame.turns(item["question"], item["persona"]) for item in items]
        said = answers(self.model, self.tokenizer, asked, self.args.max_new_tokens, repetition_penalty=SEARCH_PENALTY)
        return [{**item, "answer": text, "ids": ids} for item, (text, ids) in zip(items, said)]

    def another_persona(self, item: dict, attempt: int) -> dict:
        pick = random.Random(f"{self.args.seed}/{self.trait}/{item['question']}/{attempt}")
        others = set(self.bench.personas_for("search", self.trait, item["pole"])) - {item["persona"]}
        return {**item, "persona": pick.choice(sorted(others) or [item["persona"]])}

    def halve(self, error) -> None:
        """Go on with batches half as large."""
        size = self.schedule[-1][1] // 2
        if not size:
            raise UserError(f"out of memory with a batch of one: --max-new-tokens below {self.args.max_new_tokens} or a smaller "
                            "model may help") from error
        schedule = [*self.schedule, [self.done, size]]
        self.resume()  # the failed batch is in the statistics by half: back to what was saved
        self.schedule = schedule
        say(f"\nout of memory: batches of {size} from answer {self.share.start + schedule[-1][0] + 1} on")
        self.save()

    def save(self) -> None:
        place = json.dumps({"done": self.done, "schedule": self.schedule})
        write_atomically(self.saved, save(self.statistics.state(), metadata={"place": place}))

    def start_over(self) -> None:
        self.done, self.schedule = 0, [[0, self.args.batch_size]]
        self.statistics.zero()

    def resume(self) -> int:
        """Go back to the saved state, if there is one of these very options: how many answers are done."""
        self.start_over()
        try:
            with safe_open(self.saved, "pt") as file:
                place = json.loads(file.metadata()["place"])
                if len(self.part) >= place["done"]:
                    self.statistics.load({name: file.get_tensor(name) for name in file.keys()})
                    self.done, self.schedule = place["done"], place["schedule"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            pass  # none, or of another version: from the beginning
        if not self.world.all_have(self.done):  # killed while some of them had saved
            self.start_over()
        self.part.cut(self.done)
        return self.done


def identify(model, tokenizer, trait: str, **options) -> Neurons:
    """Identify a trait's neurons as the command line does. options: its flags; those that load a model do nothing here."""
    args = parser().parse_args([])
    unknown = set(options) - set(vars(args))
    if unknown:
        raise UserError(f"identify(): unknown options {sorted(unknown)}")
    vars(args).update(options)
    refuse(args, RULES)
    bench = load_bench(args.bench)
    endpoint = Endpoint(args.engine, args.served_model, args.in_flight) if args.engine else None
    neurons = Run(model, tokenizer, bench, check_trait(trait), args, endpoint=endpoint).identify()
    return add_trained(model, tokenizer, bench, neurons, args.seed) if args.train else neurons


def main(args) -> None:
    if args.build_bench:
        from personality.write_bench import build_bench
        return build_bench(args, args.size or SIZE)
    traits = args.traits or TRAITS
    if args.answers:  # what can't be read is said before the model is loaded
        if Path(args.answers).is_fifo():
            raise UserError(f"{args.answers}: is a pipe, and answers are read more than once: give a file")
        there = {str(line.get("trait")).lower() for _, line in json_lines(Path(args.answers))}
        traits = args.traits or [trait for trait in TRAITS if trait in there]
        if not traits:
            raise UserError(f"{args.answers}: answers of no trait of {', '.join(TRAITS)}")
    endpoint = Endpoint(args.engine, args.served_model, args.in_flight) if args.engine else None
    bench, world = load_bench(args.bench), World.join(args.tp)
    one_each = world.size > 1 and world.tp == 1 and "LOCAL_RANK" in os.environ and torch.cuda.is_available()
    if one_each and args.device in (None, "cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    model, tokenizer = load_asked(args, world=world)
    if endpoint:
        world.say(f"{endpoint.model} at {args.engine} answers, {model.source} reads: nothing says that they are the same model")
    for trait in traits:
        neurons = Run(model, tokenizer, bench, trait, args, world, endpoint).identify()
        if not world.rank:
            neurons = add_trained(model, tokenizer, bench, neurons, args.seed) if args.train else neurons
            show_neurons(neurons)
            print(neuron_path(args.out, trait))
