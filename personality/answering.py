"""A request and its answer: its text as it grows, its place in the server, what it costs. Knows nothing of HTTP."""

import asyncio
import bisect
import contextlib
import itertools
import json
import logging
import math
import weakref
from pathlib import Path

import torch

from . import POLES
from .api import ChatBody, Refusal, Reply, logprobs_of, of_request, parsed, usage_of
from .inflight import Engine, EngineStopped, Request
from .model import dtype_of, end_tokens, name_of, prompt_ids
from .people import People
from .questions import adjectives
from .steer import Profile
from .terminal import UserError

BEFORE = 8  # tokens that are decoded before others to see what these add: alone, the first may lose its space
LENGTH = 512  # tokens of an answer where neither the client nor --max-new-tokens says how many


# ---------------------------------------------------------------------------------------------------------------- writing


class Text:
    """An answer's text as it grows: what can be shown of it, which a stop string or half a character may not be."""

    def __init__(self, tokenizer, stops: list[str], prompt: list[int] | None = None):
        """prompt: of a completion, whose outer spaces are a part of it, and which goes on with the prompt's text; None: of a chat,
        where a base model's answer is over when it asks the next question."""
        self.chat, self.before, self.tokenizer = prompt is None, (prompt or [])[-BEFORE:], tokenizer
        self.stops = [*stops, *filter(None, [tokenizer.stop_text if self.chat else None])]
        self.begun, self.read, self.text, self.shown, self.stopped = 0, len(self.before), "", 0, False

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def add(self, ids: list[int], last: bool) -> str:
        """The text that can be shown now, of all ids so far; last: nothing follows."""
        ids = self.before + ids
        before, after = self.decode(ids[self.begun:self.read]), self.decode(ids[self.begun:])
        if len(after) > len(before) and (last or not after.endswith("�")):
            self.text, self.begun, self.read = self.text + after[len(before):], self.read, len(ids)
            if self.chat and not self.shown:
                self.text = self.text.lstrip()
        found = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.stopped = self.text[:min(found)], True
        held = 0 if last or self.stopped else max(
            (k for stop in self.stops for k in range(1, len(stop)) if self.text.endswith(stop[:k])), default=0)
        end = len(self.text) - held
        end = len(self.text[:end].rstrip()) if self.chat else end
        piece, self.shown = self.text[self.shown:end], max(self.shown, end)
        return piece

    def stripped(self, text: str) -> str:
        return text.strip() if self.chat else text

    def tokens_shown(self, ids: list[int]) -> int:
        """How many of all ids it takes to write the text that is shown."""
        begin, end = len(self.decode(self.before)), len(self.stripped(self.text))

        def written(number):  # without a part of a character, which some decoders write longer than the whole
            return len(self.stripped(self.decode(self.before + ids[:number])[begin:].rstrip("\ufffd")))

        return bisect.bisect_left(range(len(ids)), end, key=written)


class Choice:
    """One answer of a request: run() writes it."""

    def __init__(self, server: "Server", index: int, prompt: list[int], body, profile: Profile | None):
        self.server, self.index, self.body = server, index, body
        self.request = Request(prompt, body.sampling(index), profile, server.length(body, prompt))
        self.ids, self.finish = [], None
        self.sent = self.at = 0  # tokens told of in logprobs, and at which character of the text the next one begins
        self.text = Text(server.engine.tokenizer, body.stops(), None if isinstance(body, ChatBody) else prompt)

    async def run(self, tell=None) -> "Choice":
        """tell(choice, piece, tokens, finish): called with each piece of text, the number of tokens so far, and the last time with
        why it ended."""
        engine, ends = self.server.engine, self.server.ends
        async with contextlib.aclosing(engine.write(self.request)) as grown:
            async for ids in grown:
                self.ids = ids
                over = ids[-1] in ends or len(ids) >= self.request.max_new_tokens
                piece = self.text.add(ids, over)
                if over or self.text.stopped:
                    self.finish = "length" if not self.text.stopped and ids[-1] not in ends else "stop"
                if tell and (piece or self.finish):
                    tell(self, piece, len(ids), self.finish)
                if self.finish:
                    break
        self.server.counts["tokens"] += len(self.ids)
        return self

    def logprobs(self, tokens: int):
        """Of the tokens up to this number that were not told yet, but for those of a stop string; None where they were not asked
        for, or where there are none."""
        if self.request.sampling.top_logprobs is None:
            return None
        if self.text.stopped:
            tokens = min(tokens, self.text.tokens_shown(self.ids))
        if tokens <= self.sent:
            return None
        begin, self.sent = self.sent, tokens
        return logprobs_of([self.tell_of(k) for k in range(begin, tokens)], self.text.chat)

    def tell_of(self, k: int) -> tuple[int, str, float, list]:
        """At which character of the text token k begins, the token as text, its log-probability, and the best as text with theirs.
        A token's text is what it adds here, or, where that is nothing or a part of a character, what it is alone. self.at goes on
        to where token k ends."""
        few, tokenizer = (self.text.before + self.ids[max(0, k - BEFORE):k])[-BEFORE:], self.server.engine.tokenizer
        before, after, at = self.text.decode(few), self.text.decode([*few, self.ids[k]]), self.at
        self.at += len(after) - len(before)

        def word(token, after):
            alone = tokenizer.decode([token])
            return alone if "\ufffd" in alone else after[len(before):] or alone

        own, best = self.request.logprobs[k]
        return at, word(self.ids[k], after), own, [(word(token, self.text.decode([*few, token])), value) for token, value in best]

    async def more(self) -> dict:
        """What the request asked for beside OpenAI's fields."""
        ids = self.ids[:self.text.tokens_shown(self.ids)] if self.text.stopped else self.ids  # not of a stop string
        if not self.body.perplexity or not ids:
            return {}
        prompt = self.request.ids
        nats = await self.server.engine.between(lambda: surprise(self.server.engine.model, prompt, ids))
        return {"perplexity": math.exp(min(nats, 50.0))}


def surprise(model, prompt: list[int], answer: list[int]) -> float:
    """The unedited model's nats a token of an answer."""
    few = {"logits_to_keep": len(answer)} if model._supports_logits_to_keep() else {}  # not of the whole prompt
    logits = model(input_ids=torch.tensor([prompt + answer[:-1]], device=model.device), use_cache=False, **few).logits
    return float(torch.nn.functional.cross_entropy(logits[0, -len(answer):].float(), torch.tensor(answer, device=model.device)))


def as_model(name: str) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": "personality-neurons"}


async def collect(choices: list[Choice]) -> list[Choice]:
    tasks = [asyncio.ensure_future(choice.run()) for choice in choices]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:  # where one has failed
            task.cancel()


async def pieces(choices: list[Choice]):
    """(choice, piece of its text, tokens so far, why it ended or None) as they come; who stops reading stops the writing."""
    told, tasks = asyncio.Queue(), []
    try:
        tasks = [asyncio.ensure_future(choice.run(lambda *piece: told.put_nowait(piece))) for choice in choices]
        for task in tasks:
            task.add_done_callback(lambda task: told.put_nowait(task))
        left = len(tasks)
        while left:
            found = await told.get()
            if isinstance(found, asyncio.Future):
                left -= 1
                found.result()  # raises what went wrong
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()


# ----------------------------------------------------------------------------------------------------------------- server


class Reservation:
    """The places that a request takes in the server, from when it comes in until it is answered, or forgotten."""

    def __init__(self, server: "Server", number: int):
        server.taken += number

        def free():
            server.taken -= number

        self.free = weakref.finalize(self, free)  # at once, or where a reply was never begun; only the first call counts


class Server:
    """What the routes share. args: of induce.py --serve."""

    def __init__(self, args):
        self.args, self.people = args, People(args)
        self.engine = Engine(self.people.load, args.rows, args.where)
        model = self.engine.model
        self.name = args.served_model or Path(name_of(model).removesuffix(".gguf")).name
        self.ends = set(end_tokens(model))
        self.most = min(self.engine.longest, getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)
        self.people.most, self.taken = self.engine.most, 0  # taken: places that requests have, from when they come in
        self.counts, self.codes, self.serial = {"tokens": 0, "cancelled": 0}, {}, itertools.count(1)

    def length(self, body, prompt: list[int]) -> int:
        """Tokens that an answer may have."""
        asked = body.length()
        if len(prompt) + (asked or 1) > self.most:
            raise Refusal(400, f"a prompt of {len(prompt)} tokens and {asked or 1} of an answer are beyond this model's context of "
                               f"{self.most}", param="messages" if isinstance(body, ChatBody) else "prompt")
        return asked or min(self.args.max_new_tokens or LENGTH, self.most - len(prompt))

    def prompts(self, body) -> list[list[int]]:
        tokenizer, size = self.engine.tokenizer, self.engine.model.get_input_embeddings().num_embeddings
        if isinstance(body, ChatBody):
            try:
                prompt = prompt_ids(tokenizer, [message.turn() for message in body.messages])
            except UserError as error:
                raise Refusal(400, str(error), param="messages") from None
            if not prompt:
                raise Refusal(400, "messages: this model's chat template makes nothing of them", param="messages")
            return [prompt]
        prompts = [tokenizer(given)["input_ids"] if isinstance(given, str) else given for given in body.prompts()]
        if not all(ids and all(0 <= token < size for token in ids) for ids in prompts):
            raise Refusal(400, f"prompt: expected texts, or whole numbers from 0 to {size - 1}, none of them empty", param="prompt")
        return prompts

    async def person(self, body) -> tuple[Profile | None, dict | None]:
        """The profile that a request asks for, and what is said of it."""
        character = of_request(body, self.name, self.people.characters)
        if character is None:
            return None, None
        self.check_engine()
        try:
            profile, found = await self.engine.between(lambda: self.people.of(character))
            return profile, {"name": character.name, **found}
        except EngineStopped:
            raise
        except UserError as error:
            raise Refusal(400, str(error), param="personality") from None

    def check_engine(self) -> None:
        if not self.engine.running():
            raise Refusal(503, "the engine has stopped: see the server's log", "server_error")

    def take(self, places: int) -> "Reservation":
        """Room for a request's choices, or a refusal."""
        self.check_engine()
        room = self.args.rows + self.args.queue
        if places > room:
            raise Refusal(400, f"n: {places} answers at once are more than the server has room for, which is {room}", param="n")
        if self.taken + places > room:
            raise Refusal(429, f"{self.taken} answers are being written or wait: try again", "rate_limit_exceeded")
        return Reservation(self, places)

    async def complete(self, kind, data: bytes, gone):
        """A reply as a dict, or the chunks of a stream, to the body `data`; gone(): returns when the client has hung up."""
        body, streamed = parsed(kind, data), None
        chat, prompts, number = kind is ChatBody, self.prompts(body), body.n or 1
        places = self.take(len(prompts) * number)
        try:
            profile, found = await self.person(body)
            choices = [Choice(self, k, prompts[k // number], body, profile) for k in range(len(prompts) * number)]
            reply = Reply(chat, f"{'chatcmpl' if chat else 'cmpl'}-{next(self.serial)}", body.model or self.name, found)
            usage = lambda: usage_of(sum(map(len, prompts)), sum(len(choice.ids) for choice in choices))  # noqa: E731
            streamed = self.stream(body, reply, choices, usage, places) if body.stream else None
            return streamed or await self.whole(reply, choices, usage, gone)
        finally:
            if streamed is None:
                places.free()

    async def whole(self, reply: Reply, choices: list[Choice], usage, gone) -> dict:
        """A reply that is not streamed."""
        work, left = asyncio.ensure_future(collect(choices)), asyncio.ensure_future(gone())
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not work.done():
            work.cancel()
            self.counts["cancelled"] += 1
            raise Refusal(499, "the client has gone")
        await work
        whole = [reply.choice(choice.index, choice.text.stripped(choice.text.text), choice.finish, choice.logprobs(len(choice.ids)),
                              **await choice.more()) for choice in choices]
        return reply.whole(whole, usage())

    async def stream(self, body, reply: Reply, choices: list[Choice], usage, places: "Reservation"):
        """The lines of a stream: role first, then pieces, why each ended, usage if it was asked for, and [DONE]."""
        line, over = lambda found: f"data: {json.dumps(found, ensure_ascii=False)}\n\n", False  # noqa: E731
        try:
            for choice in choices if reply.chat else ():
                yield line(reply.part(choice.index, begins=True))
            async for choice, piece, tokens, finish in pieces(choices):
                if piece:
                    yield line(reply.part(choice.index, piece, logprobs=choice.logprobs(tokens)))
                if finish:
                    yield line(reply.part(choice.index, finish=finish, logprobs=choice.logprobs(tokens)))
                    if more := await choice.more():
                        yield line(reply.part(choice.index, **more))
            if body.stream_options and body.stream_options.include_usage:
                yield line(reply.usage(usage()))
            over = True
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status has gone out already
            over, told = True, isinstance(error, (UserError, Refusal))
            if not told:
                logging.getLogger("uvicorn.error").exception("a stream failed")
            message = str(error) if told else f"{type(error).__name__}: see the server's log"
            yield line({"error": {"message": message, "type": "server_error", "param": None, "code": None}})
        finally:
            places.free()
            self.counts["cancelled"] += not over

    def inventory(self) -> dict:
        """What can be asked for: for the page, and for clients that choose."""
        traits = {trait: {"low": adjectives(trait, "low"), "high": adjectives(trait, "high"), "levels": bool(getattr(
            neurons, "trained_key", ""))} for trait, neurons in self.people.traits.items()}
        model, frame = self.engine.model, self.people.frame
        return {"model": self.name, "layers": len(self.engine.steering.mlps), "neurons": sum(
                    mlp.neurons for mlp in self.engine.steering.mlps), "context": self.most, "dtype": dtype_of(model),
                "traits": traits, "frame": {"system": frame.system, "question": frame.question}, "poles": POLES, "characters": {
                    name: {"traits": who.strengths, "method": who.method, "layers": who.layers}
                    for name, who in self.people.characters.items()}}

    def models(self) -> dict:
        names = [self.name, *(f"{self.name}+{name}" for name in self.people.characters)]
        return {"object": "list", "data": [*map(as_model, names)]}

    def metrics(self) -> str:
        """Prometheus' text."""
        engine = self.engine  # its tokens: all that were chosen; those of self.counts: of answers that ended
        rows = [("requests_in_flight", "gauge", "", len(engine.requests)), ("steps_total", "counter", "", engine.steps),
                ("written_total", "counter", "", engine.tokens), ("tokens_total", "counter", "", self.counts["tokens"]),
                ("cancelled_total", "counter", "", self.counts["cancelled"]),
                *(("replies_total", "counter", f'{{code="{code}"}}', n) for code, n in sorted(self.codes.items()))]
        kinds = dict.fromkeys((name, kind) for name, kind, _, _ in rows)
        return "".join(f"# TYPE personality_{name} {kind}\n" + "".join(
            f"personality_{name}{labels} {value}\n" for other, _, labels, value in rows if other == name) for name, kind in kinds)
