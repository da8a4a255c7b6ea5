"""OpenAI's requests and replies, and what stands beside them here: personality, repetition_penalty, perplexity.

What a client sends is honoured or refused by name, never passed over, unless it is null: the bodies know no other fields.
"""

import itertools
import time
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from . import TRAITS
from .inflight import Sampling
from .methods import Character
from .model import TEST_PENALTY
from .terminal import UserError

MOST = 16  # choices, prompts, and stop strings of a request


class Refusal(Exception):
    """An error that a client gets, in OpenAI's form."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", param: str | None = None):
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, given):
        """A null asks for nothing, whatever its name, but where something has to be said: some clients send one for each field
        that isn't set."""
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        if isinstance(given, dict):
            given = {name: value for name, value in given.items() if value is not None or name in needed}
        return given


Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Part(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    refusal: None = None  # these five stand in every message that OpenAI's client got, and gives back
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list, Field(max_length=0)] | None = None

    def turn(self) -> dict:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    include_usage: bool = False


class Body(Strict):
    """What both kinds of request have."""

    model: str = Field("", max_length=500)
    personality: str | dict | None = None
    perplexity: bool = False
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    n: int | None = Field(None, ge=1, le=MOST)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def sampling(self, choice: int) -> Sampling:
        """Of the choice of this number. What is not sent is as induce.py has it: greedy, with NPTI's repetition penalty; a top_p
        or a seed alone asks to be drawn, at temperature 1."""
        drawn = self.temperature is None and (self.top_p is not None or self.seed is not None)
        return Sampling(1.0 if drawn else self.temperature or 0.0, self.top_p or 1.0, self.repetition_penalty or TEST_PENALTY,
                        self.frequency_penalty or 0.0, self.presence_penalty or 0.0,
                        None if self.seed is None else self.seed + choice, self.alternatives())

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @model_validator(mode="after")
    def check(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options goes with stream")
        return self


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def check_chat(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs")
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens: expected one of them")
        return self

    def length(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    prompt: str | list[int] | Annotated[list[str | list[int]], Field(min_length=1, max_length=MOST)]
    logprobs: int | None = Field(None, ge=0, le=5)

    def length(self) -> int | None:
        return self.max_tokens

    def alternatives(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list:
        """Texts or lists of ids."""
        whole = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        return [self.prompt] if whole else self.prompt


class PersonalityBody(Strict):
    personality: str | dict
    model: str = Field("", max_length=500)


def parsed(kind, data: bytes):
    """A body of this kind."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        at = ".".join(str(part) for part in first["loc"][:3])
        unknown = first["type"] == "extra_forbidden"
        why = "is not supported by this server" if unknown else first["msg"]
        raise Refusal(400, f"{at}: {why}" if at else why, param=str(first["loc"][0]) if first["loc"] else None) from None


# --------------------------------------------------------------------------------------------------------- personalities


def as_character(given: str | dict, characters: dict[str, Character]) -> Character:
    """From the name of a character file, from "extraversion=0.8,neuroticism=-0.5" (levels; "npti:extraversion=2" has another
    method's strengths), or from {"traits": {...}, "method": ...}, as a line of induce.py --questions has it, but levels where no
    method is named."""
    if isinstance(given, dict):
        return Character.of(given, "personality", "trained")
    if given in characters:  # looked up, never a part of a path
        return characters[given]
    method, _, listed = given.rpartition(":")
    try:
        pairs = [part.split("=") for part in listed.split(",")]
        traits = {trait.strip(): float(strength) for trait, strength in pairs}
        fine = len(traits) == len(pairs)
    except ValueError:
        fine = False
    if not fine:
        names = ", ".join(characters) or "there are none"
        raise UserError(f"personality: expected the name of a character ({names}) or trait=level, commas between, of "
                        f"{', '.join(TRAITS)}; got {given[:80]!r}")
    return Character.of({"traits": traits, "method": method or "trained"}, "personality")


def of_request(body, served: str, characters: dict[str, Character]) -> Character | None:
    """The character that a request asks for, in its personality or after a + in the model's name; None: the unedited model."""
    name, inside = body.model[:len(served)], body.model[len(served):]
    if body.model and (name.lower() != served.lower() or inside and (inside[0] != "+" or len(inside) < 2)):
        raise Refusal(404, f"model: expected {served}, or that with +CHARACTER or +trait=level after it; got {body.model[:80]!r}",
                      param="model")
    inside = inside[1:]
    if inside and body.personality is not None:
        raise Refusal(400, "personality: stands in the model's name already", param="personality")
    try:
        return as_character(inside or body.personality, characters) if inside or body.personality is not None else None
    except UserError as error:
        raise Refusal(400, str(error), param="model" if inside else "personality") from None


# --------------------------------------------------------------------------------------------------------------- replies


class Reply:
    """The outer form of a request's replies. kind: chat.completion or text_completion."""

    def __init__(self, chat: bool, name: str, model: str, personality: dict | None):
        self.chat, self.head = chat, {"id": name, "created": int(time.time()), "model": model}
        self.personality = {"personality": personality} if personality else {}

    def whole(self, choices: list[dict], usage: dict) -> dict:
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": usage, **self.personality}

    def part(self, index: int, text: str | None = None, finish: str | None = None, logprobs=None, begins=False, **more) -> dict:
        """A chunk of a stream: its role (begins), a piece of text, or why it ended."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        delta = ({"role": "assistant", "content": ""} if begins else {}) | ({"content": text} if text is not None else {})
        said = {"delta": delta} if self.chat else {"text": text or ""}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish, **more}
        return {**self.head, "object": kind, "choices": [choice], **(self.personality if begins or finish else {})}

    def usage(self, usage: dict) -> dict:
        return {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion", "choices": [], "usage": usage}

    def choice(self, index: int, text: str, finish: str, logprobs=None, **more) -> dict:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish, **more}


def usage_of(prompt: int, completion: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def whole_bytes(word: str) -> list[int] | None:
    """A token's bytes; of a token that is a part of a character they are not known."""
    return None if "\ufffd" in word else list(word.encode())


def logprobs_of(told: list[tuple], chat: bool) -> dict:
    """OpenAI's form of some tokens' log-probabilities. told: of each, at which character of a completion's text it begins, it as
    text, its own, and the best as text with theirs, which may be alike as text."""
    if not chat:
        offsets, tokens, values, best = map(list, zip(*told))
        values_of = [{**dict(reversed(others)), word: value} for word, value, others in zip(tokens, values, best)]
        return {"tokens": tokens, "token_logprobs": values, "text_offset": offsets,
                "top_logprobs": [dict(sorted(of_text.items(), key=lambda pair: -pair[1])) for of_text in values_of]}
    one = lambda word, value: {"token": word, "logprob": value, "bytes": whole_bytes(word)}  # noqa: E731
    return {"content": [{**one(word, value), "top_logprobs": list(itertools.starmap(one, best))}
                        for _, word, value, best in told], "refusal": None}
