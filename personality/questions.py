"""Questions, personas, and the answers to them: the built-in bench, PersonalityBench's layout, files of answers, inventories."""

import csv
import functools
import hashlib
import io
import itertools
import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import POLES, TRAITS
from .store import TEXTS, digest, expect_texts, json_lines, plain_path, read_text, read_toml, to_line
from .terminal import UserError, say

OPTIONS_OR_SCALE = re.compile(  # by an item's form: "do you strongly disagree with your uncle, and why?" is an open question
    r"(?mi)^\s*\(?[a-e1-5][.):] .*\n\s*\(?[a-e1-5][.):] |\(a\).*\(b\)|\bA[).] .+ B[).] |\bon a scale (of|from)\b"
    r"|\bfrom (1|one) to (5|7|10|five|seven|ten)\b|\bagree or (strongly )?disagree\?\s*$|\bstrongly agree\b.*\bstrongly disagree\b"
    r"|\b(how (much|strongly)|to what extent) do you (strongly )?(dis)?agree\b|\bhow (in)?accurate(ly)? does\b")

FEW = 8  # validation questions, below which a level's price is hardly known


@functools.cache
def text_table(name: str) -> dict:
    """A TOML file of texts/."""
    return read_toml(TEXTS / name)


@functools.cache
def all_facets() -> list[dict]:
    """The thirty facets in order: trait, name, high, low (what such people do), questions, items."""
    return [{"trait": row["name"], **facet} for row in text_table("facets.toml")["trait"] for facet in row["facet"]]


def facets(trait: str) -> list[dict]:
    """The six facets of a trait."""
    return [facet for facet in all_facets() if facet["trait"] == trait]


def adjectives(trait: str, pole: str) -> str:
    return next(row["adjectives"][pole] for row in text_table("facets.toml")["trait"] if row["name"] == trait)


@dataclass
class Bench:
    """Questions and personas: search[trait], test[trait] lists of text; personas[trait][pole] likewise."""

    name: str
    search: dict
    test: dict
    personas: dict

    def fingerprint(self) -> str:
        return digest(self.search, self.test, self.personas)

    def fingerprint_of_training(self) -> str:
        """Without the judge's personas, which no constant comes from."""
        return digest(self.search, self.test, [[self.personas_for("search", trait, pole) for pole in POLES] for trait in TRAITS])

    def personas_for(self, use: str, trait: str, pole: str) -> list[str]:
        """The personas of a pole that identify ("search") or the judge ("judge") uses: every fourth is the judge's, so
        that nothing is judged by what it was made with. (The built-in ones share no sentence; of another bench nobody knows.)"""
        return [text for i, text in enumerate(self.personas[trait][pole]) if (i % 4 == 3) == (use == "judge")]

    def questions(self, trait: str, split: str, limit: int) -> list[str]:
        """The first questions of a split, each once: "search", "test" or "validation". Every third test question is for
        validation: there strengths are chosen, and nowhere else. Those that are search questions, too, are left out of both, unless
        all are."""
        if split not in ("search", "test", "validation"):
            raise UserError(f"questions: expected the split search, test or validation, got {split!r}")
        if split == "search":
            return list(dict.fromkeys(self.search[trait]))[:limit]
        asked = list(dict.fromkeys(self.test[trait]))
        if split == "validation" and len(asked) < 3:
            raise UserError(f"{self.name}: {len(asked)} test questions of {trait}, every third of which is for validation: "
                            "doses and levels need 3 or more")
        chosen = [text for i, text in enumerate(asked) if (i % 3 == 2) == (split == "validation")]
        known = set(self.search[trait])
        return ([text for text in chosen if text not in known] or chosen)[:limit]

    def check_validation(self, trait: str, most: int) -> list[str]:
        """The validation questions. Raises where there are none, and says so where there are few."""
        there = self.questions(trait, "validation", most)
        if len(there) < FEW:
            say(f"{self.name}: levels of {trait} are read from {len(there)} validation questions: few to be sure what level 1 "
                "costs")
        return there


def built_in_bench() -> Bench:
    """288 questions a trait and 20 personas a pole, of which 5 are the judge's. 216 questions are to search: all twelve sentences
    in 18 situations. 48 are to test and 24 for validation: three sentences in each of 16 and of 8 other situations."""
    bench, situations = Bench("built-in", {}, {}, {}), text_table("situations.toml")
    for trait in TRAITS:
        asked = [facet["questions"][k] for k in (0, 1) for facet in facets(trait)]
        bench.search[trait] = [f"{situation} {question}" for situation in situations["search"] for question in asked]
        random.Random(trait).shuffle(bench.search[trait])  # so that the first few are of all kinds
        test, validation = (three_in_each(situations[use], trait) for use in ("test", "validation"))
        thirds = enumerate(validation)  # every third test question is for validation: see Bench.questions()
        bench.test[trait] = [text for k, third in thirds for text in (*test[2 * k:2 * k + 2], third)]
        bench.personas[trait] = {pole: built_in_personas(facets(trait), pole) for pole in POLES}
    return bench


def three_in_each(situations: list[str], trait: str) -> list[str]:
    """Questions of three facets in each situation, an even number of them, so that any first few are of as many situations and
    facets as may be: by six, which ask for all facets, beginning with another each time, in one wording and the other in turn."""
    pick = random.Random(trait)
    places, own, number = pick.sample(situations, len(situations)), pick.sample(facets(trait), 6), len(situations)
    while True:
        begin = pick.sample(range(6), 6) * 4
        facet_of = [(k + begin[k // 6]) % 6 for k in range(3 * number)]
        if all(len({*facet_of[k::number]}) == 3 for k in range(number)):
            return [f"{places[k % number]} {own[facet]['questions'][k // 6 % 2]}" for k, facet in enumerate(facet_of)]


def situation_of(question: str) -> str:
    """The situation of the built-in bench in which a question is asked; of another bench, where nobody knows, the question."""
    first = question[:question.find(". ") + 1]
    return first if first in itertools.chain(*text_table("situations.toml").values()) else question


def built_in_personas(of_trait: list[dict], pole: str) -> list[str]:
    """Of three facets each. Every fourth, the judge's, is in words of its own; the first and the last of these hold all facets."""
    def personas(name):
        return [f"You {a}. You {b}. You {c}. Speak as yourself, in the first person."
                for a, b, c in itertools.combinations([facet[name] for facet in of_trait], 3)]

    search, judge = personas(pole), personas(f"judge_{pole}")
    of_judge = iter(judge[k] for k in (0, 5, 9, 14, 19))  # each facet in two or three of them
    return [next(of_judge) if i % 4 == 3 else text for i, text in enumerate(search)]


def published_names(trait: str) -> dict:
    """What the published files call the poles of a trait, by pole."""
    return dict(zip(POLES, (trait.capitalize(), f"{trait.capitalize()}_reversed")))


def load_bench(name: str | None) -> Bench:
    """The built-in bench, or a directory or hub dataset id in the published layout: search/<Trait>.json and test/<Trait>.json
    with a {"question": ...} a line, description.json with the keys <Trait> (high pole) and <Trait>_reversed (low). Fields
    besides these do not matter. Items with options or a scale, which are no open questions, are skipped, and counted. The others
    are shuffled, always alike: files may go facet by facet, and mostly the first few are asked."""
    if name is None:
        return built_in_bench()
    root = Path(name) if Path(name).is_dir() else hub_dataset(name)
    bench, skipped = Bench(plain_path(name), {}, {}, {}), 0
    described = list(json_lines(root / "description.json"))
    for trait in TRAITS:
        for use in ("search", "test"):
            questions, closed = open_questions(root / use / f"{trait.capitalize()}.json")
            getattr(bench, use)[trait] = random.Random(f"{trait} {use}").sample(questions, len(questions))
            skipped += closed
        bench.personas[trait] = {}
        for pole, key in published_names(trait).items():
            texts = [line[key].strip() for _, line in described if isinstance(line.get(key), str) and line[key].strip()]
            bench.personas[trait][pole] = texts = list(dict.fromkeys(texts))  # one that stood there twice could be the judge's, too
            if len(texts) < 4:
                raise UserError(f"{root / 'description.json'}: expected at least 4 lines with the key {key}, got {len(texts)}")
        if twice := len(set(bench.search[trait]) & set(bench.test[trait])):
            say(f"{name}: {twice} test questions of {trait} are search questions as well, and are left out while there are others: "
                "no test of what was made with them")
        if again := len(bench.search[trait]) - len(set(bench.search[trait])):
            say(f"{name}: {again} search questions of {trait} stand there again, and are asked once")
    if skipped:
        say(f"{name}: {skipped} items with options or a scale were skipped: they are no open questions")
    return bench


def open_questions(path: Path) -> tuple[list[str], int]:
    """The open questions of a file, and how many others are in it."""
    questions, skipped = [], []
    for number, line in json_lines(path):
        expect_texts(line, ["question"], f"{path}, line {number}")
        closed = line.get("options") or line.get("choices") or OPTIONS_OR_SCALE.search(line["question"])
        if question := line["question"].strip():
            (skipped if closed else questions).append(question)
    if not questions:
        raise UserError(f"{path}: no open question in it")
    return questions, len(skipped)


def hub_dataset(name: str) -> Path:
    """The files of a dataset on the hub, or of its copy in the cache."""
    from huggingface_hub import snapshot_download

    files = ["search/*.json", "test/*.json", "description.json"]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=files))
    except Exception as error:  # no such id, no network: each in its own way
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(f"--bench {name}: neither a directory nor a dataset of the hub in reach: {why}") from error


def search_items(bench: Bench, trait: str, limit: int, seed: int) -> list[dict]:
    """A trait's search questions, each under a random persona of the high and of the low pole, both next to each other: a list of
    {pole, persona, question}."""
    personas, items = [bench.personas_for("search", trait, pole) for pole in POLES], []
    for question in bench.questions(trait, "search", limit):
        pick = random.Random(f"{seed}/{trait}/{question}")
        items += [{"pole": pole, "persona": pick.choice(of_pole), "question": question} for pole, of_pole in zip(POLES, personas)]
    return items


def read_answers(path: str, trait: str):
    """(a trait's answers, a digest of them) from a file of JSON lines that something wrote: trait, pole, persona, question,
    answer, and ids where this tool wrote them (text may tokenise otherwise). The answers are a memory-mapped `datasets` table of
    these columns, so that memory does not grow with their text."""
    import datasets

    traits, content = set(), hashlib.sha256()
    for number, line in json_lines(Path(path)):
        check_answer(line, f"{path}, line {number}")
        traits.add(line["trait"])
        if line["trait"].lower() == trait:
            content.update(to_line(line))
    if trait not in map(str.lower, traits):
        raise UserError(f"{path}: no answers for {trait}; it has {sorted(traits)}")
    texts = ("pole", "persona", "question", "answer")

    def rows():
        for _, line in json_lines(Path(path)):
            if line["trait"].lower() == trait:
                yield {**{name: line[name] for name in texts}, "ids": line.get("ids") or []}

    columns = {**dict.fromkeys(texts, datasets.Value("string")), "ids": datasets.List(datasets.Value("int64"))}
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:  # the table stays mapped when it is gone
        try:
            table = datasets.Dataset.from_generator(rows, datasets.Features(columns), folder, fingerprint="answers")
        except datasets.exceptions.DatasetGenerationError as error:
            if not isinstance(error.__cause__, OSError):
                raise error.__cause__ or error
            raise UserError(f"{path}: can't be unpacked in {folder}: {error.__cause__}: TMPDIR can name another folder") from error
    return table, content.hexdigest()[:16]


def check_answer(line: dict, where: str) -> None:
    expect_texts(line, ["trait", "pole", "persona", "question", "answer"], where)
    ids = line.get("ids") or []
    if line["pole"] not in POLES:
        raise UserError(f"{where}: pole: expected high or low, got {line['pole']!r}")
    if not isinstance(ids, list) or not all(isinstance(token, int) and abs(token) < 1 << 63 for token in ids):
        raise UserError(f"{where}: ids: expected a list of whole numbers")


def read_given(path: str) -> list[dict]:
    """Answers of another source: JSON lines with the texts trait, question and answer, and pole, high or low, where it is known."""
    given = []
    for number, line in json_lines(Path(path)):
        where = f"{path}, line {number}"
        expect_texts(line, ["trait", "question", "answer"], where)
        trait, pole = line["trait"].lower(), line.get("pole")
        if trait not in TRAITS or pole not in (*POLES, None):
            raise UserError(f"{where}: expected one of the five traits, and the pole high or low, or no pole, got "
                            f"{line['trait']!r}, {pole!r}")
        if not line["answer"].strip():
            raise UserError(f"{where}: the answer is empty, and can't be judged: delete the line")
        given.append({"trait": trait, "question": line["question"], "pole": pole, "answer": line["answer"]})
    if not given:
        raise UserError(f"{path}: no answers in it")
    return given


def read_inventory(path: str | None) -> list[tuple[str, str, str, int]]:
    """(statement, trait, facet, 1 or -1) of each item: the built-in inventory, or a table with a header line and commas,
    semicolons or tabs between the columns item (or text), key (or sign: + and -, also within "+N1") and facet (a name, or
    "N1")."""
    if path is None:
        return [(text, facet["trait"], facet["name"], key) for facet in all_facets() for text, key in zip(facet["items"], (1, -1))]
    text, items, facet_of = read_text(path, "--inventory "), [], {}
    mark = max("\t;,", key=text.partition("\n")[0].count)
    for k, facet in enumerate(all_facets()):
        facet_of |= dict.fromkeys((facet["name"].replace("-", " ").lower(), f"{facet['trait'][0]}{k % 6 + 1}"), facet)
    try:
        rows = list(csv.DictReader(io.StringIO(text), delimiter=mark))
    except csv.Error as error:
        raise UserError(f"--inventory {path}: {error}") from error
    for number, row in enumerate(rows, 2):
        row = {(name or "").strip().lower(): (value or "").strip() for name, value in row.items() if isinstance(value, str)}
        item, sign = row.get("item") or row.get("text"), row.get("sign") or row.get("key") or ""
        named = row.get("facet") or row.get("label_ocean") or row.get("key") or ""
        facet = facet_of.get(named.replace("-", " ").strip(" +").lower())
        if not item or not facet or not re.fullmatch(r"[+-]1?|1|[+-]?[OCEAN][1-6]?", sign.upper()):
            raise UserError(f"--inventory {path}, line {number}: expected an item, a key (+ or -) and one of the 30 facets, "
                            f"got {row}")
        items.append((item, facet["trait"], facet["name"], -1 if sign.startswith("-") else 1))
    if not items:
        raise UserError(f"--inventory {path}: no items in it")
    return items
