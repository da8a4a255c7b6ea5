"""identify.py --build-bench: have a model write a PersonalityBench (NPTI, section 4.1, made with one too)."""

import importlib.util
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import torch

from . import POLES, TRAITS
from .endpoint import Endpoint, fill
from .model import answers, end_tokens, fingerprint, load_model
from .questions import OPTIONS_OR_SCALE, all_facets, facets, published_names, text_table
from .store import Journal, digest, markdown, only_run, rendered, write_atomically
from .terminal import UserError, resumable, say

TEST_QUESTIONS, PERSONAS = 90, 80  # a trait, and a pole, as PersonalityBench has them
PER_REPLY = {"persona": 3, "test": 5, "search": 5}  # texts; in the order in which they are written: of a pair that is alike, the later goes
FAULTY = "\0"  # begins a line of a reply that can't be used, with the reason
TRAIT_WORDS = {"openness": r"openness|open-minded", "conscientiousness": r"conscientious\w*", "extraversion": r"(extra|extro|intro)ver\w+",
               "agreeableness": r"(dis)?agreeable\w*", "neuroticism": r"neurotic\w*|emotional(ly)? (un)?stab\w+"}
CLOSED = re.compile(r"(?i)^(and |but |so |then |, )*(do|does|did|is|are|am|was|were|can|could|will|would|should|shall|may|might|must|have|"
                    r"has|had)(n't)? ")


# ------------------------------------------------------------------------------------------------------------- writers


def uncut(text: str, ended: bool) -> str:
    """A reply whose last line is not taken for a whole one where the writer was cut off."""
    return text if ended else text.rpartition("\n")[0] + f"\n{FAULTY}cut off"


class RemoteWriter:
    """A model behind a server that writes."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self.name = endpoint, endpoint.model

    def run(self, requests, store) -> list:
        return self.endpoint.run(requests, lambda messages: uncut(*self.endpoint.chat(messages)), store)


class LocalWriter:
    """A local model that writes; sampled, so that it does not always write the same."""

    def __init__(self, name: str | None, args):
        self.model, self.tokenizer = load_model(name, args.device, args.dtype)
        self.name, self.args = f"{self.model.source} {fingerprint(self.model)}", args

    def run(self, requests, store) -> list:
        for start in range(0, len(requests), self.args.batch_size):
            batch = requests[start:start + self.args.batch_size]
            torch.manual_seed(int(digest(self.args.seed, batch[0][0]), 16) % 2**31)
            written = answers(self.model, self.tokenizer, [messages for _, messages in batch], 256, do_sample=True, temperature=0.8, top_p=0.95)
            for (key, _), (text, ids) in zip(batch, written):
                store(key, uncut(text, ids[-1] in end_tokens(self.model)))
        return []


# ------------------------------------------------------------------------------------------------------------- filters


def reply_lines(reply: str) -> list[str]:
    """The lines of a reply, without numbers, bullets and quotation marks."""
    reply = reply.replace("\u2019", "'")
    lines = [re.sub(r"^\s*(?:\d+\s*[.):]|[-*•])\s*", "", line).strip().strip('"“”*').strip() for line in reply.split("\n")]
    return [line for line in lines if line]


def fault(kind: str, text: str, trait: str, facet: str | None) -> str | None:
    """Why a line can't be a question (or a persona) of the bench, or None. facet: its name."""
    import py3langid

    if kind != "persona" and not text.endswith("?"):
        return "not a question"
    if py3langid.classify(text)[0] != "en":
        return "not English"
    if kind == "persona":
        if not re.match(r"You('\w+|r)?,? ", text):
            return "not addressed to you"
        if text[-1] not in ".!":
            return "not a whole sentence"
    else:
        if OPTIONS_OR_SCALE.search(text):
            return "options or a scale"
        last = re.split(r"(?<=[.!?:;])\s+|, (?=(?:do|does|are|is|would|will|can|could|should) you\b)", text)[-1]
        if CLOSED.match(last) and not re.search(r"(?i)\bor\b(?! not\b)|\band (why|how|what|when|where|who)\b", last):
            return "closed (yes or no)"
        names = [TRAIT_WORDS[trait]] + ([facet.replace("-", "[- ]")] if facet else [])
        if re.search(rf"(?i)\b({'|'.join(names)})\b", text):
            return "names the trait or facet"
    if not (8 if kind == "persona" else 5) <= len(text.split()) <= 80 or len(text) > 500:
        return "too short or too long"
    return None


class Duplicates:
    """Texts that are like one that is there already: Jaccard similarity of their 5-character shingles of at least NEAR. Candidates
    are found by MinHash (datasketch), at that similarity in 99.8 of 100 cases."""

    NEAR = 0.8

    def __init__(self):
        from datasketch import MinHash, MinHashLSH

        self.empty, self.index, self.texts = MinHash(120, seed=1), MinHashLSH(num_perm=120, params=(20, 6)), {}

    @staticmethod
    def shingles(text: str) -> set[bytes]:
        text = " ".join(re.findall(r"\w+", text.lower()))
        return {text[k:k + 5].encode() for k in range(max(1, len(text) - 4))}

    def find(self, kind: str, text: str) -> str | None:
        """The kind of a text like this one; where there is none, this one is remembered."""
        own, sketch = self.shingles(text), self.empty.copy()
        sketch.update_batch(sorted(own))
        for number in sorted(self.index.query(sketch)):
            of, other = self.texts[number]
            other = self.shingles(other)
            if len(own & other) >= self.NEAR * len(own | other):
                return of
        number = max(self.texts, default=0) + 1
        self.texts[number] = kind, text
        self.index.insert(number, sketch)
        return None

    def forget(self, kind: str) -> None:
        for number in [number for number, (of, _) in self.texts.items() if of == kind]:
            self.index.remove(number)
            del self.texts[number]


# ------------------------------------------------------------------------------------------------------------ building


class Builder:
    """A PersonalityBench, written by a model: for each trait `size` search questions, 90 test questions about other topics, and
    80 personas a pole (fewer of both where size is less). What a run does follows from the replies alone, so one that was killed,
    and asks only for what it lacks, ends with the same bench."""

    AT_ONCE = 256  # requests that are sent before their lines are looked at
    USELESS = 512  # replies with nothing to be kept, after which a writer is given up
    HOPELESS = 100  # lines of a cell of which less than one could be used

    def __init__(self, folder: str, size: int, writer, seed: int):
        self.folder, self.size, self.writer, self.seed = Path(folder), size, writer, seed
        self.replies = Journal(self.folder / "replies.jsonl")
        self.texts, self.duplicates, self.counts = [], Duplicates(), {kind: {} for kind in PER_REPLY}

    def requests(self, kind: str, trait: str, facet: int | None, pole: str):
        """Yield (key, topic, messages), all that there are for a cell, in an order of its own."""
        table = text_table("topics.toml")
        pairs = [(topic, circumstances) for topic in table["test" if kind == "test" else "search"] for circumstances in table["circumstances"]]
        pick = random.Random(f"{self.seed}/{kind}/{trait}/{facet}/{pole}")
        for topic, circumstances in pick.sample(pairs, len(pairs)):
            if kind == "persona":
                people = "; ".join(row[pole] for row in pick.sample(facets(trait), 3))
                system = "You describe people, for a study of how people differ."
                text = (f"Write {PER_REPLY[kind]} descriptions, one a line, of different people who {people}. Let "
                        f"{topic} have a part in their lives. Each is two sentences, addressed to the person: it begins with \"You\". Write "
                        "the descriptions only.")
            else:
                people = all_facets()[facet][pole]
                system = "You write questions for a study of how people differ. Each puts the reader into a situation and asks openly about it."
                text = (f"Situation: {topic}, {circumstances}. Write {PER_REPLY[kind]} different questions, one a line, that ask what the reader "
                        f"would do, think or feel there, and that somebody who would {people} answers unlike others. Tell the situation in each, "
                        "in one or two sentences, address the reader as \"you\", and end with a question mark. No question that yes or no "
                        "answers, no options, no scale, no word for a trait of character. Write the questions only.")
            messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            yield digest(self.writer.name, self.seed, messages), topic, messages

    def quotas(self, kind: str, trait: str) -> dict:
        """{(facet, pole): how many}; facet: its number in all_facets(), None for personas."""
        if kind == "persona":
            return {(None, pole): max(4, min(PERSONAS, self.size)) for pole in POLES}
        number = self.size if kind == "search" else min(TEST_QUESTIONS, self.size)
        cells = [(facet, pole) for facet, row in enumerate(all_facets()) if row["trait"] == trait for pole in POLES]
        return {cell: number // len(cells) + (k < number % len(cells)) for k, cell in enumerate(cells)}

    def build_trait(self, kind: str, trait: str, bar) -> None:
        quotas = self.quotas(kind, trait)
        streams = {cell: self.requests(kind, trait, *cell) for cell in quotas}
        kept, seen = dict.fromkeys(quotas, 0), dict.fromkeys(quotas, 0)
        while asked := self.next_requests(kind, quotas, streams, kept, seen):
            for number, (cell, key, topic, _) in enumerate(asked):
                if number % self.AT_ONCE == 0:
                    some = [(key, messages) for _, key, _, messages in asked[number:number + self.AT_ONCE]]
                    fill(self.replies, some, self.writer.run, refused=f"{FAULTY}refused by the server")
                    self.check_usable()
                lines = reply_lines(self.replies[key]["text"])
                seen[cell] += max(1, len(lines))  # an empty reply is one that can't be used
                for text in lines:
                    why = "not needed" if kept[cell] == quotas[cell] else self.fault(kind, text, trait, cell[0])
                    self.counts[kind][why or "kept"] = self.counts[kind].get(why or "kept", 0) + 1
                    if not why:
                        kept[cell] += 1
                        bar.update()
                        self.texts.append({"kind": kind, "trait": trait, "facet": facet_name(cell[0]), "pole": cell[1], "topic": topic,
                                           "text": text, "id": digest(kind, trait, text)})
        for (facet, pole), number in quotas.items():
            if kept[facet, pole] < number:
                why = "all topics are used up" if next(streams[facet, pole], None) is None else "hardly anything of it can be used"
                say(f"\n{trait}, {facet_name(facet) or 'personas'}, {pole}: {kept[facet, pole]} of {number} {kind} texts: {why}")

    def next_requests(self, kind, quotas, streams, kept, seen) -> list[tuple]:
        """(cell, key, topic, messages) of as many requests as should do, by the share that was kept so far."""
        asked = []
        for cell, stream in streams.items():
            share = kept[cell] / seen[cell] if seen[cell] else 0.8
            if seen[cell] < self.HOPELESS or share >= 1 / self.HOPELESS:  # requests cost time or money
                number = -(-(quotas[cell] - kept[cell]) // (PER_REPLY[kind] * max(0.1, share)))
                asked += [(cell, *request) for request in itertools.islice(stream, int(number))]
        return asked

    def check_usable(self) -> None:
        """Give up a writer of whose first replies nothing can be used: requests cost time or money."""
        if len(self.replies) >= self.USELESS and not self.texts:
            counts = Counter(why for of_kind in self.counts.values() for why, number in of_kind.items() for _ in range(number))
            raise UserError(f"{self.writer.name}: nothing of its first {len(self.replies)} replies can be used ({dict(counts) or 'all empty'}); "
                            f"they are in {self.replies.path}")

    def fault(self, kind, text, trait, facet) -> str | None:
        why = text[1:] if text[0] == FAULTY else fault(kind, text, trait, facet_name(facet))
        if why is None and (like := self.duplicates.find(kind, text)):
            why = "near-duplicate" if like == kind else f"leak: near-duplicate of a {like} text"
        return why

    def build(self) -> None:
        from tqdm import tqdm

        goal = sum(sum(self.quotas(kind, trait).values()) for trait in TRAITS for kind in PER_REPLY)
        with tqdm(total=goal, unit="text", smoothing=0.1) as bar:
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
                write_lines(self.folder / kind / f"{trait.capitalize()}.json",
                            [{"question": row["text"], **{name: row[name] for name in ("facet", "pole", "topic", "id")}}
                             for row in self.rows(kind, trait)])
        columns = {name: [row["text"] for row in self.rows("persona", trait, pole)]
                   for trait in TRAITS for pole, name in published_names(trait).items()}
        write_lines(self.folder / "description.json", [{name: texts[k] for name, texts in columns.items() if k < len(texts)}
                                                       for k in range(max(map(len, columns.values())))])
        write_atomically(self.folder / "README.md", self.card())

    def card(self) -> str:
        """The dataset card: what it is, how it was made, counts a facet, and what the filters dropped."""
        count = lambda **of: sum(all(row[name] == value for name, value in of.items()) for row in self.texts)  # noqa: E731
        questions = [[row["trait"], row["name"], *(count(kind=kind, facet=row["name"], pole=pole) for kind in ("search", "test")
                                                   for pole in POLES)] for row in all_facets()]
        personas = [[trait, *(count(kind="persona", trait=trait, pole=pole) for pole in POLES)] for trait in TRAITS]
        reasons = list(dict.fromkeys(["kept", *(why for counts in self.counts.values() for why in counts)]))
        return rendered(
            "bench_card.md", writer=self.writer.name, seed=self.seed, size=self.size,
            questions=markdown(["trait", "facet", "search, high", "search, low", "test, high", "test, low"], questions),
            personas=markdown(["trait", *(f"personas, {pole}" for pole in POLES)], personas),
            filters=markdown(["kind", *reasons], [[kind, *(counts.get(why, 0) for why in reasons)] for kind, counts in self.counts.items()]))


def facet_name(facet: int | None) -> str | None:
    return None if facet is None else all_facets()[facet]["name"]


def write_lines(path: Path, rows: list[dict]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def build_bench(args) -> None:
    """Write --build-bench DIR."""
    missing = [name for name in ("datasketch", "py3langid") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"--build-bench needs {' and '.join(missing)}: pip install -e '.[bench]'")
    folder, size = Path(args.build_bench), args.size or 360
    if (folder / "search").exists() and not (folder / "replies.jsonl").exists():
        raise UserError(f"--build-bench {folder}: another bench is there, which this would overwrite")
    remote = args.writer and re.match(r"https?://", args.writer)
    writer = (RemoteWriter(Endpoint(args.writer, args.served_model, args.in_flight)) if remote else
              LocalWriter(args.writer or args.model, args))
    folder.mkdir(parents=True, exist_ok=True)
    with resumable(), only_run(folder / ".lock", f"--build-bench {folder}: another run is building it", wait=False):
        say(f"{writer.name} writes {size} search questions a trait")
        Builder(folder, size, writer, args.seed).build()
    print(args.build_bench)
