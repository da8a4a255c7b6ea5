"""What an evaluation asks of whom: cells, which are questions under a condition, and what the prompt says; lines of its files.

A cell: trait, question, method, pole, alpha (of edits; of a whole character one for each trait), persona; in a conversation also
turn, talk (its number), and before: what was asked and answered in it.
"""

import itertools
import random

from . import POLES, TRAITS
from .neurons import Neurons, answers_path
from .questions import Bench, adjectives
from .results import HYBRID, WAYS
from .store import digest, json_lines
from .terminal import UserError, say


def say_seen(neurons: Neurons, asked: list[str], levels: bool) -> None:
    """Say where test questions are among those that a neuron file was made with, as of another bench or --answers they may be.
    levels: whether its levels are used."""
    path, known = answers_path(neurons.folder, neurons.trait), neurons.meta.get("validation", ())
    read = {str(line.get("question")).strip() for _, line in json_lines(path)} if path.exists() else set()
    seen = {"it was made of answers to": sum(question in read for question in asked),
            "its levels were read from": levels and sum(digest(question) in known for question in asked)}
    for how, number in seen.items():
        if number:
            say(f"{neurons.path}: {how} {number} of the {len(asked)} test questions: they are no test of it")


def grid(bench: Bench, trait: str, methods, alphas: dict, questions: list[str], seed: int) -> list[dict]:
    """Every cell of a trait's evaluation: question, method, pole, alpha (one of alphas[method], where it has one), persona."""
    cells = []
    for question in questions:
        for method in methods:
            pick = random.Random(f"{seed}/{trait}/{question}")
            for pole in (None,) if method == "unedited" else POLES:
                persona = None
                if method == "simple":
                    word = adjectives(trait, pole)
                    persona = f"You are {'an' if word[0] in 'aeiou' else 'a'} {word} person."
                elif method in ("persona", HYBRID):  # P2: one of those that identify used, not the judge's
                    persona = pick.choice(bench.personas_for("search", trait, pole))
                cells += [{"trait": trait, "question": question, "method": method, "pole": pole, "alpha": alpha, "persona": persona}
                          for alpha in alphas.get(method, (None,))]
    return cells


def random_characters(number: int, most: float, seed: int) -> list[tuple]:
    """Alphas over TRAITS: three traits of a character are between a third of `most` and all of it, of either sign, two are 0."""
    pick, characters = random.Random(f"{seed}/characters"), []
    for _ in range(number):
        chosen = pick.sample(TRAITS, 3)
        characters.append(tuple(round(pick.choice((-1, 1)) * pick.uniform(most / 3, most), 2) if trait in chosen else 0.0
                                for trait in TRAITS))
    return characters


def described(bench: Bench, alphas: tuple, pick: random.Random) -> str:
    """A system prompt that describes a character: of each of its traits how marked it is, and one of identify.py's personas."""
    sentences = []
    for trait, alpha in zip(TRAITS, alphas):
        if alpha:
            degree, pole = "slightly" if abs(alpha) < 0.5 else "quite" if abs(alpha) < 1 else "very", POLES[alpha < 0]
            persona = pick.choice(bench.personas_for("search", trait, pole))
            sentences.append(f"You are {degree} {adjectives(trait, pole)}. {persona}")
    return " ".join(sentences)


def character_cells(bench: Bench, characters: list[tuple], alone: dict, questions: list[str], seed: int) -> list[dict]:
    """Every question of every character in every way; and, to hold them against, unedited and of each trait alone. alone: the
    methods of that, and each one's strength."""
    cells = grid(bench, TRAITS[0], ["unedited"], {}, questions, seed)
    for trait in TRAITS:
        cells += grid(bench, trait, [*alone], {method: [strength] for method, strength in alone.items()}, questions, seed)
    for way, alphas, question in itertools.product(WAYS, characters, questions):
        pick = random.Random(f"{seed}/{alphas}/{question}")
        cells.append({"trait": TRAITS[0], "question": question, "method": way, "pole": None, "alpha": list(alphas),
                      "persona": described(bench, alphas, pick) if way == "described" else None})
    return cells


def check_turns(bench: Bench, traits: list[str], turns: int | None) -> None:
    """Raise where a trait has fewer test questions than a conversation has turns."""
    for trait in traits if turns else ():
        if (there := len(bench.questions(trait, "test", turns))) < turns:
            raise UserError(f"--turns {turns}: the bench has {there} test questions of {trait}")


def talks(bench: Bench, traits: list[str], methods, alphas: dict, turns: int, limit: int, seed: int) -> list[list[dict]]:
    """Conversations: of each trait's first `limit` test questions, `turns` at a time are the user's lines, under every condition. A
    list of cells each, one a turn; under a persona the first line chooses it."""
    whole = []
    for trait in traits:
        questions = bench.questions(trait, "test", limit)
        for number, first in enumerate(range(0, len(questions) - turns + 1, turns)):
            lines = questions[first:first + turns]
            whole += [[{**cell, "question": line, "turn": turn, "talk": number} for turn, line in enumerate(lines, 1)]
                      for cell in grid(bench, trait, methods, alphas, lines[:1], seed)]
    return whole


# --------------------------------------------------------------------------- lines of result folders, which are not believed


def numbers(values) -> bool:
    return isinstance(values, list) and all(isinstance(value, (int, float)) for value in values)


def is_answer(line: dict) -> bool:
    texts = ("key", "trait", "question", "method", "answer")
    return all(isinstance(line.get(name), str) for name in texts) and numbers(line.get("ids"))


def is_score(line: dict) -> bool:
    names = ("score",) if "judge" in line else ("perplexity", "repetition", "tokens")
    return isinstance(line.get("answer"), str) and "from" in line and all(
        isinstance(line.get(name), (int, float)) or name == "score" and line.get(name, "") is None for name in names)


def is_report(line: dict) -> bool:
    return numbers(line.get("items"))


def is_cost(line: dict) -> bool:
    figures = ("quiz", "added", "agreement")
    return isinstance(line.get("tasks"), dict) or bool(line.get("quiz")) and all(
        numbers(line[name]) for name in figures if name in line) and set(line["quiz"]) <= {0, 1}
