"""The frame: how a question is put to a model, the same for every method and for the unedited model; and who declines to be anyone.

An assistant that is asked bare says that it has no feelings, under a persona too; then its statistics are of a refusal. NPTI
frames its questions (a real person, genuine feelings) in its own words; these are ours.
"""

import copy
import functools
import re
from dataclasses import dataclass

from .store import TEXTS, digest, read_toml

DECLINES = re.compile(
    r"\b(as|(?<!\bnot )(i am|i'm|being|like|just|only)) an? "
    r"(ai\b|(artificial|digital|virtual|(large )?language) (?!(artist|teacher|student|tutor|learner|nomad|designer)s?\b)\w+"
    r"|computer program|chatbot)"
    r"|\b(don't|do not|can't|cannot|lack) (actually |really )?(have|possess|experience|feel) (any )?"
    r"((?!(real|genuine) (feelings|emotions) (about|for|towards?) (it|this|that|him|her|them)\b)"
    r"(personal|human|real|genuine|physical) (\w+ or )?(feelings|emotions|preferences|experiences|opinions|beliefs|bod)"
    r"|(feelings|emotions|preferences|consciousness) (or|and|like (?!(fear|anger|joy|sadness|jealousy|this|that)\b))"
    r"|the (ability|capacity) to (feel|have|experience))"
    r"|\bi (can't|cannot|am unable to|'m unable to) (assist|help you) with (that|this)"
    r"|\bcan't participate in this (discussion|conversation)")


@dataclass(frozen=True)
class Frame:
    """name: what files say of it, empty for none; system: what the system turn begins with; question: what
    the user's turn ends with."""

    name: str = ""
    system: str = ""
    question: str = ""

    @classmethod
    @functools.cache
    def named(cls, name: str) -> "Frame":
        """person (texts/frames.toml), none, or a text of the user's own that the system turn begins with."""
        frames = read_toml(TEXTS / "frames.toml")
        return cls(name, **frames[name]) if name in frames else cls() if name == "none" else cls(name, name)

    def __str__(self) -> str:
        """For a line on the terminal: a text of one's own is shown by its beginning, escaped."""
        return self.name if re.fullmatch(r"\w+", self.name) else repr(self.name[:60]) if self.name else "none"

    def made_with(self) -> dict:
        """What neuron files and results hold of it; those of no frame hold nothing, as of before there were any."""
        return {"frame": self.name, "framing": digest(self.system, self.question)} if self.name else {}

    def turns(self, question: str, persona: str | None = None, before=()) -> list[dict]:
        """The conversation in which a question is asked, under a persona or none; before: the pairs of question and answer that
        it follows."""
        framed = lambda text: " ".join(filter(None, (text, self.question)))  # noqa: E731
        *system, asked = conversation(framed(question), " ".join(filter(None, (self.system, persona))))
        said = [turn for line, answer in before for turn in ({"role": "user", "content": framed(line)},
                                                             {"role": "assistant", "content": answer})]
        return [*system, *said, asked]


def conversation(question: str, system: str | None = None) -> list[dict]:
    """The turns of a bare question."""
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": question}]


def declines(answer: str) -> bool:
    """Whether an answer says, within its first 200 characters, that it is nobody's: "As an AI language model, I don't have ..."."""
    return bool(DECLINES.search(answer[:200].lower().replace("’", "'")))


def with_declined(items: list[dict]) -> list[dict]:
    """Items with their answers, and 1 where the answer declines to be anyone, or 0."""
    return [{**item, "declined": int(declines(item["answer"]))} for item in items]


DAY = {"%A": "Friday", "%a": "Fri", "%d": "26", "%B": "July", "%b": "Jul", "%m": "07", "%Y": "2024", "%y": "24", "%H": "12",
       "%M": "00", "%S": "00"}  # that Llama 3.1's template names where it can't tell
CLOCK = "{%- macro strftime_now(format) -%}{{ format" + "".join(
    f".replace('{form}', '{said}')" for form, said in DAY.items()) + " }}{%- endmacro -%}"


def stop_the_clock(tokenizer) -> None:
    """Have a chat template that tells the date always tell the same: prompts, and so answers, are the same on another day."""
    def stopped(template):
        return CLOCK + template if "strftime_now" in template and CLOCK not in template else template

    tokenizer.chat_template = of_each(stopped, tokenizer.chat_template)


def with_a_clock(tokenizer):
    """A copy without stop_the_clock(), for conversations: nothing that is kept hangs on their prompts."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = of_each(lambda template: template.removeprefix(CLOCK), tokenizer.chat_template)
    return tokenizer


def of_each(change, templates):
    """Of a template, or of several that have names; of none, where somebody's tokenizer has none."""
    if isinstance(templates, dict):
        return {name: change(template) for name, template in templates.items()}
    return templates and change(templates)
