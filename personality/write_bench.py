"""identify.py --build-bench: have a model write a PersonalityBench (NPTI, section 4.1, made with one too)."""

import importlib.util
import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import POLES, TRAITS
from .endpoint import Endpoint, fill
from .load import load_asked
from .model import BatchSize, answers, end_tokens, fingerprint
from .questions import OPTIONS_OR_SCALE, all_facets, facets, published_names, text_table
from .store import Journal, digest, markdown, only_run, rendered, to_line, write_atomically
from .terminal import UserError, progress, resumable, say

TEST_QUESTIONS, PERSONAS = 90, 80  # a trait, and a pole, as PersonalityBench has them
# texts of a kind, in the order in which the kinds are written: of a pair that is alike, the later goes
PER_REPLY = {"persona": 3, "test": 5, "search": 5}
FAULTY = "\0"  # begins a line of a reply that can't be used, with the reason
TRAIT_WORDS = {"openness": r"openness|open-minded", "conscientiousness": r"conscientious\w*",
               "extraversion": r"(extra|extro|intro)ver\w+", "agreeableness": r"(dis)?agreeable\w*",
               "neuroticism": r"neurotic\w*|emotional(ly)? (un)?stab\w+"}
CLOSED = re.compile(r"(?i)^(and |but |so |then |, )*(do|does|did|is|are|am|was|were|can|could|will|would|should|shall|may|might|"
                    r"must|have|has|had)(n't)? ")


def uncut(text: str, ended: bool) -> str:
    """A reply whose last line is not taken for a whole one where the writer was cut off."""
    return text if ended else text.rpartition("\n")[0] + f"\n{FAULTY}cut off"


class RemoteWriter:
    """A model behind a server."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self.name = endpoint, endpoint.model

    def run(self, requests, store) -> list:
        return self.endpoint.run(requests, lambda messages: uncut(*self.endpoint.chat(messages)), store)


class LocalWriter:
    """A local model, sampled, so that it does not always write the same."""

    def __init__(self, name: str | None, args):
        self.model, self.tokenizer = load_asked(args, name, "--writer" if args.writer else "--model")
        self.name, self.seed, self.size = f"{self.model.source} {fingerprint(self.model)}", args.seed, BatchSize(args.batch_size)

    def run(self, requests, store) -> list:
        def write(batch):
            torch.manual_seed(int(digest(self.seed, batch[0][0]), 16) % 2**31)
            return zip(batch, answers(self.model, self.tokenizer, [messages for _, messages in batch], 256, do_sample=True,
                                      temperature=0.8, top_p=0.95))

        for replies in self.size.each(write, requests):
            for (key, _), (text, ids) in replies:
                store(key, uncut(text, ids[-1] in end_tokens(self.model)))
        return []


def reply_lines(reply: str) -> list[str]:
    """The lines of a reply, without numbers, bullets and quotation marks."""
    reply = reply.replace("\u2019", "'")
    lines = [re.sub(r"^\s*(?:\d+\s*[.):]|[-*•])\s*", "", line).strip().strip('"“”*').strip() for line in reply.split("\n")]
    return [line for line in lines if line]


def fault(kind: str, text: str, trait: str, facet: str | None) -> str | None:
    """Why a line can't be a question (or a persona) of the bench, or None. facet: its name."""
    import py3langid

    question = kind != "persona"
    last = re.split(r"(?<=[.!?:;])\s+|, (?=(?:do|does|are|is|would|will|can|could|should) you\b)", text)[-1]
    open_after_all = re.search(r"(?i)\bor\b(?! not\b)|\band (why|how|what|when|where|who)\b", last)
    names = "|".join([TRAIT_WORDS[trait], *([facet.replace("-", "[- ]")] if facet else [])])
    reasons = {  # the first that holds counts
        "not a question": question and not text.endswith("?"),
        "not English": py3langid.classify(text)[0] != "en",
        "not addressed to you": not question and not re.match(r"You('\w+|r)?,? ", text),
        "not a whole sentence": not question and text[-1] not in ".!",
        "options or a scale": question and OPTIONS_OR_SCALE.search(text),
        "closed (yes or no)": question and CLOSED.match(last) and not open_after_all,
        "names the trait or facet": question and re.search(rf"(?i)\b({names})\b", text),
        "too short or too long": not (5 if question else 8) <= len(text.split()) <= 80 or len(text) > 500}
    return next((why for why, holds in reasons.items() if holds), None)


class Duplicates:
    """Texts that are like one that is there already: Jaccard similarity of their 5-character shingles of at least NEAR. Candidates
    are found by MinHash (datasketch), at that similarity in 99.8 of 100 cases."""

    NEAR = 0.8

    def __init__(self):
        from datasketch import MinHash, MinHashLSH

        self.empty, self.index = MinHash(120, seed=1), MinHashLSH(num_perm=120, params=(20, 6))

    @staticmethod
    def shingles(text: str) -> set[bytes]:
        text = " ".join(re.findall(r"\w+", text.lower()))
        return {text[k:k + 5].encode() for k in range(max(1, len(text) - 4))}

    def find(self, kind: str, text: str) -> str | None:
        """The kind of a text like this one; where there is none, this one is remembered."""
        own, sketch = self.shingles(text), self.empty.copy()
        sketch.update_batch(sorted(own))
        alike = set()
        for of, other in self.index.query(sketch):
            other = self.shingles(other)
            if len(own & other) >= self.NEAR * len(own | other):
                alike.add(of)
        if not alike:
            self.index.insert((kind, text), sketch)
        return next((of for of in PER_REPLY if of in alike), None)

    def forget(self, kind: str) -> None:
        for key in [key for key in self.index.keys.keys() if key[0] == kind]:
            self.index.remove(key)


@dataclass
class Cell:
    """So many texts of a kind for a trait, a facet (its number in all_facets(), None for personas) and a pole."""

    HOPELESS = 100  # lines, of which less than one could be used

    kind: str
    trait: str
    facet: int | None
    pole: str
    wanted: int
    requests: Iterator  # of (key, topic, messages)
    kept: int = 0
    seen: int = 0

    @property
    def name(self) -> str | None:
        return None if self.facet is None else all_facets()[self.facet]["name"]

    def next_requests(self) -> list[tuple]:
        """(cell, key, topic, messages) of as many requests as should do, by the share of the lines that was kept so far."""
        share = self.kept / self.seen if self.seen else 0.8
        if self.seen >= self.HOPELESS and share < 1 / self.HOPELESS:  # requests cost time or money
            return []
        number = -(-(self.wanted - self.kept) // (PER_REPLY[self.kind] * max(0.1, share)))
        return [(self, *request) for request in itertools.islice(self.requests, int(number))]

    def say_what_is_missing(self) -> None:
        if self.kept < self.wanted:
            why = "all topics are used up" if next(self.requests, None) is None else "hardly anything of it can be used"
            say(f"\n{self.trait}, {self.name or 'personas'}, {self.pole}: {self.kept} of {self.wanted} {self.kind} texts: {why}")


class Builder:
    """A PersonalityBench, written by a model: for each trait `size` search questions, 90 test questions about other topics, and
    80 personas a pole (fewer of both where size is less). What a run does follows from the replies alone, so one that was killed,
    and asks only for what it lacks, ends with the same bench."""

    AT_ONCE = 256  # requests that are sent before their lines are looked at
    USELESS = 512  # replies with nothing to be kept, after which a writer is given up

    def __init__(self, folder: str, size: int, writer, seed: int):
        self.folder, self.size, self.writer, self.seed = Path(folder), size, writer, seed
        self.replies = Journal(self.folder / "replies.jsonl")
        self.texts, self.duplicates, self.counts = [], Duplicates(), {kind: Counter() for kind in PER_REPLY}

    def cells(self, kind: str, trait: str) -> list[Cell]:
        if kind == "persona":
            places, number = [(None, pole) for pole in POLES], len(POLES) * max(4, min(PERSONAS, self.size))
        else:
            places = [(facet, pole) for facet, row in enumerate(all_facets()) if row["trait"] == trait for pole in POLES]
            number = self.size if kind == "search" else min(TEST_QUESTIONS, self.size)
        return [Cell(kind, trait, *place, number // len(places) + (k < number % len(places)), self.requests(kind, trait, *place))
                for k, place in enumerate(places)]

    def requests(self, kind: str, trait: str, facet: int | None, pole: str):
        """Yield (key, topic, messages), all that there are for a cell, in an order of its own."""
        table = text_table("topics.toml")
        texts = table["persona" if kind == "persona" else "question"]
        pairs = list(itertools.product(table["test" if kind == "test" else "search"], table["circumstances"]))
        pick = random.Random(f"{self.seed}/{kind}/{trait}/{facet}/{pole}")
        for topic, circumstances in pick.sample(pairs, len(pairs)):
            rows = pick.sample(facets(trait), 3) if facet is None else [all_facets()[facet]]
            text = texts["user"].format(number=PER_REPLY[kind], topic=topic, circumstances=circumstances,
                                        people="; ".join(row[pole] for row in rows))
            messages = [{"role": "system", "content": texts["system"]}, {"role": "user", "content": text}]
            yield digest(self.writer.name, self.seed, messages), topic, messages

    def build_trait(self, kind: str, trait: str, bar) -> None:
        cells = self.cells(kind, trait)
        while asked := [request for cell in cells for request in cell.next_requests()]:
            for number, (cell, key, topic, _) in enumerate(asked):
                if number % self.AT_ONCE == 0:
                    batch = [(key, messages) for _, key, _, messages in asked[number:number + self.AT_ONCE]]
                    fill(self.replies, batch, self.writer.run, refused=f"{FAULTY}refused by the server")
                    self.check_usable()
                lines = reply_lines(self.replies[key]["text"])
                cell.seen += max(1, len(lines))  # an empty reply is one that can't be used
                for text in lines:
                    why = "not needed" if cell.kept == cell.wanted else self.why_dropped(cell, text)
                    self.counts[kind][why or "kept"] += 1
                    if not why:
                        cell.kept += 1
                        bar.update()
                        self.texts.append({"kind": kind, "trait": trait, "facet": cell.name, "pole": cell.pole, "topic": topic,
                                           "text": text, "id": digest(kind, trait, text)})
        for cell in cells:
            cell.say_what_is_missing()

    def check_usable(self) -> None:
        """Give up a writer of whose first replies nothing can be used: requests cost time or money."""
        if len(self.replies) >= self.USELESS and not self.texts:
            why = dict(sum(self.counts.values(), Counter())) or "all empty"
            raise UserError(f"{self.writer.name}: nothing of its first {len(self.replies)} replies can be used ({why}); they are "
                            f"in {self.replies.path}")

    def why_dropped(self, cell: Cell, text: str) -> str | None:
        why = text[1:] if text[0] == FAULTY else fault(cell.kind, text, cell.trait, cell.name)
        if why is None and (like := self.duplicates.find(cell.kind, text)):
            why = "near-duplicate" if like == cell.kind else f"leak: near-duplicate of a {like} text"
        return why

    def build(self) -> None:
        goal = sum(cell.wanted for kind in PER_REPLY for trait in TRAITS for cell in self.cells(kind, trait))
        with progress(goal, 0, "", "text") as bar:
            for kind in PER_REPLY:  # the tests of all traits before any search
                for trait in TRAITS:
                    bar.set_description(f"{kind}, {trait}")
                    self.build_trait(kind, trait, bar)
                    if kind == "search":  # traits are searched by themselves
                        self.duplicates.forget(kind)
        self.write()

    def rows(self, kind: str, trait: str, pole: str | None = None) -> list[dict]:
        """The texts of a kind, by id, which is to say in no order."""
        return sorted((row for row in self.texts if (row["kind"], row["trait"]) == (kind, trait) and pole in (None, row["pole"])),
                      key=lambda row: row["id"])

    def write(self) -> None:
        for kind in ("search", "test"):
            (self.folder / kind).mkdir(exist_ok=True)
            for trait in TRAITS:
                lines = [{"question": row["text"], **{name: row[name] for name in ("facet", "pole", "topic", "id")}}
                         for row in self.rows(kind, trait)]
                write_atomically(self.folder / kind / f"{trait.capitalize()}.json", map(to_line, lines))
        columns = [[(name, row["text"]) for row in self.rows("persona", trait, pole)]
                   for trait in TRAITS for pole, name in published_names(trait).items()]
        lines = [dict(filter(None, line)) for line in itertools.zip_longest(*columns)]
        write_atomically(self.folder / "description.json", map(to_line, lines))
        write_atomically(self.folder / "README.md", self.card())

    def card(self) -> str:
        """The dataset card: what it is, how it was made, counts a facet, and what the filters dropped."""
        count = Counter((row["kind"], row["trait"], row["facet"], row["pole"]) for row in self.texts)
        questions = [[row["trait"], row["name"], *(count[kind, row["trait"], row["name"], pole] for kind in ("search", "test")
                                                   for pole in POLES)] for row in all_facets()]
        personas = [[trait, *(count["persona", trait, None, pole] for pole in POLES)] for trait in TRAITS]
        reasons = list(dict.fromkeys(["kept", *itertools.chain(*self.counts.values())]))
        filters = [[kind, *(counts[why] for why in reasons)] for kind, counts in self.counts.items()]
        return rendered("bench_card.md", writer=self.writer.name, seed=self.seed, size=self.size,
                        questions=markdown(["trait", "facet", "search, high", "search, low", "test, high", "test, low"], questions),
                        personas=markdown(["trait", "personas, high", "personas, low"], personas),
                        filters=markdown(["kind", *reasons], filters))


def build_bench(args, size: int) -> None:
    """Write --build-bench DIR."""
    missing = [name for name in ("datasketch", "py3langid") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"--build-bench needs {' and '.join(missing)}: pip install -e '.[bench]'")
    folder = Path(args.build_bench)
    if (folder / "search").exists() and not (folder / "replies.jsonl").exists():
        raise UserError(f"--build-bench {folder}: another bench is there, which this would overwrite")
    args.writer = args.writer or os.environ.get("OPENAI_BASE_URL") or None
    remote = args.writer and re.match(r"https?://", args.writer)
    writer = (RemoteWriter(Endpoint(args.writer, args.served_model, args.in_flight)) if remote else
              LocalWriter(args.writer or args.model, args))
    folder.mkdir(parents=True, exist_ok=True)
    with resumable(), only_run(folder / ".lock", f"--build-bench {folder}: another run is building it", wait=False):
        say(f"{writer.name} writes {size} search questions a trait")
        Builder(folder, size, writer, args.seed).build()
    print(args.build_bench)
