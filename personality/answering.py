"""A request and its answer: whose personality it is in, its text as it grows, what it costs. Knows nothing of HTTP."""

import asyncio
import contextlib
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from . import POLES, TRAITS
from .api import ChatBody, Refusal, Reply, logprobs_of, of_request, parsed, usage_of
from .frame import Frame
from .inflight import Engine, Request
from .methods import Character, Profiles, multiple_at
from .model import end_tokens, load_model, name_of, prompt_ids
from .neurons import NeuronFolder, neuron_path
from .questions import adjectives
from .steer import Profile
from .store import digest
from .terminal import UserError, say

LENGTH = 512  # tokens of an answer where neither the client nor --max-new-tokens says how many
KEPT = 512  # personalities whose edits are kept


# ----------------------------------------------------------------------------------------------------------------- people


class People:
    """The personalities that a folder of neuron files has. All but its constructor runs between two steps of the engine."""

    def __init__(self, args):
        self.args, self.frame = args, Frame.named(args.frame)
        self.characters = read_characters(args.characters)

    def load(self):
        """(model, tokenizer), and what the files hold; called once, in the engine's thread."""
        args = self.args
        model, tokenizer = load_model(args.model, args.device, args.dtype)
        self.neurons = NeuronFolder(model, args.neurons, frame=self.frame)
        self.profiles = Profiles(model, tokenizer, self.neurons, (args.min_delta, args.min_neurons), args.suppress)
        self.kept: dict[str, tuple[Profile, dict]] = {}
        self.traits = {trait: self.neurons[trait] for trait in TRAITS
                       if self.neurons.released or neuron_path(self.neurons.folder, trait).exists()}
        if not self.traits:
            say(f"--neurons {args.neurons}: no neuron files, so everybody gets the unedited model: python identify.py --train "
                "makes them")
        return model, tokenizer

    def of(self, character: Character) -> tuple[Profile, dict]:
        """(profile, what is said of it in replies): the same objects each time, as the engine wants them."""
        key = digest(character.strengths, character.method, character.layers)
        if key not in self.kept:
            missing = [trait for trait, own in character.strengths.items() if own and trait not in self.traits]
            if missing:
                raise UserError(f"personality: there are no neuron files here of {', '.join(missing)}, but of "
                                f"{', '.join(self.traits) or 'no trait'}: python identify.py --train makes them")
            profile = self.profiles.of(character)
            self.kept[key] = profile, self.described(character, profile)
        self.kept[key] = self.kept.pop(key)  # the latest last
        while len(self.kept) > KEPT:
            self.kept.pop(next(iter(self.kept)))
        return self.kept[key]

    def described(self, character: Character, profile: Profile) -> dict:
        layers = profile.layer.bincount().tolist()
        found = {"name": character.name, "method": character.method, "traits": character.strengths, "neurons": len(profile),
                 "layers": {str(layer): n for layer, n in enumerate(layers) if n}}
        if profile.residual:
            found["residual_layers"] = sorted(profile.residual)
        if character.method == "trained":
            found |= {"range": [-1, 1], "expected_perplexity": self.expected(character)}
        return found

    def expected(self, character: Character) -> float:
        """By what factor a character's perplexity grows, by the traits' dose responses: as if they were independent."""
        total = 0.0
        for trait, level in character.strengths.items():
            if level:
                dose = self.traits[trait].dose[0 if level > 0 else 1]
                doses = np.concatenate([[[0.0, 1.0]], dose[:, [0, 2]].double().numpy()])
                total += float(np.interp(multiple_at(dose, abs(level)), doses[:, 0], np.log(doses[:, 1])))
        return round(math.exp(total), 3)


def read_characters(folder: str | None) -> dict[str, Character]:
    """The profile files of a folder, by their names without .toml."""
    if folder is None:
        return {}
    paths = sorted(Path(folder).glob("*.toml"))
    if not paths:
        raise UserError(f"--characters {folder}: no profile files (*.toml) there")
    wrong = [path.name for path in paths if not re.fullmatch(r"[\w.-]{1,64}", path.stem)]
    if wrong:
        raise UserError(f"--characters {folder}: {wrong[0]!r}: expected a name of letters, digits, dots and dashes")
    return {path.stem: Character.read(str(path), "trained") for path in paths}


# ---------------------------------------------------------------------------------------------------------------- writing


class Text:
    """An answer's text as it grows: what can be shown of it, which a stop string or half a character may not be."""

    def __init__(self, tokenizer, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, [*stops, *filter(None, [tokenizer.stop_text])]
        self.begun, self.read, self.text, self.shown, self.stopped = 0, 0, "", 0, False

    def add(self, ids: list[int], last: bool) -> str:
        """The text that can be shown now, of all ids so far; last: nothing follows."""
        decode = lambda part: self.tokenizer.decode(part, skip_special_tokens=True)  # noqa: E731
        before, after = decode(ids[self.begun:self.read]), decode(ids[self.begun:])
        if len(after) > len(before) and (last or not after.endswith("�")):
            self.text, self.begun, self.read = (self.text + after[len(before):]).lstrip(), self.read, len(ids)
        found = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.stopped = self.text[:min(found)], True
        held = 0 if last or self.stopped else max(
            (k for stop in self.stops for k in range(1, len(stop)) if self.text.endswith(stop[:k])), default=0)
        end = len(self.text[:len(self.text) - held].rstrip())
        piece, self.shown = self.text[self.shown:end], max(self.shown, end)
        return piece


class Choice:
    """One answer of a request: run() writes it."""

    def __init__(self, server: "Server", index: int, prompt: list[int], body, person):
        self.server, self.index, self.body = server, index, body
        self.profile, self.person = person
        self.request = Request(prompt, body.sampling(index), self.profile, server.length(body, prompt))
        self.text, self.ids, self.finish, self.sent = Text(server.engine.tokenizer, body.stops()), [], None, 0

    async def run(self, tell=None) -> "Choice":
        """tell(choice, piece, finish): called with each piece of text, the last time with why it ended."""
        engine, ends = self.server.engine, self.server.ends
        async with contextlib.aclosing(engine.write(self.request)) as grown:
            async for ids in grown:
                self.ids = ids
                over = ids[-1] in ends or len(ids) >= self.request.max_new_tokens
                piece = self.text.add(ids, over)
                if over or self.text.stopped:
                    self.finish = "length" if not self.text.stopped and ids[-1] not in ends else "stop"
                if tell and (piece or self.finish):
                    tell(self, piece, self.finish)
                if self.finish:
                    break
        self.server.counts["tokens"] += len(self.ids)
        return self

    def logprobs(self, chat: bool):
        """Of the tokens that were not told yet; None where they were not asked for."""
        if self.request.sampling.top_logprobs is None:
            return None
        begin, self.sent = self.sent, len(self.ids)
        return logprobs_of(chat, self.server.engine.tokenizer, self.ids[begin:], self.request.logprobs[begin:len(self.ids)])

    async def more(self) -> dict:
        """What the request asked for beside OpenAI's fields."""
        if not self.body.perplexity or not self.ids:
            return {}
        prompt, ids = self.request.ids, self.ids
        nats = await self.server.engine.between(lambda: surprise(self.server.engine.model, prompt, ids))
        return {"perplexity": math.exp(min(nats, 50.0))}


def surprise(model, prompt: list[int], answer: list[int]) -> float:
    """The unedited model's nats a token of an answer."""
    logits = model(input_ids=torch.tensor([prompt + answer[:-1]], device=model.device), use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits[0, -len(answer):].float(), torch.tensor(answer, device=model.device)))


async def collect(choices: list[Choice]) -> list[Choice]:
    tasks = [asyncio.ensure_future(choice.run()) for choice in choices]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:  # where one has failed
            task.cancel()


async def pieces(choices: list[Choice]):
    """(choice, piece of its text, why it ended or None) as they come; who stops reading stops the writing."""
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


class Server:
    """What the routes share. args: of induce.py --serve."""

    def __init__(self, args):
        self.args, self.people = args, People(args)
        self.engine = Engine(self.people.load, args.rows, args.where)
        model = self.engine.model
        self.name = args.served_model or Path(name_of(model).removesuffix(".gguf")).name
        self.ends = set(end_tokens(model))
        self.most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
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
                return [prompt_ids(tokenizer, [message.turn() for message in body.messages])]
            except UserError as error:
                raise Refusal(400, str(error), param="messages") from None
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
            return await self.engine.between(lambda: self.people.of(character))
        except UserError as error:
            raise Refusal(400, str(error), param="personality") from None

    def check_engine(self) -> None:
        if not self.engine.running():
            raise Refusal(503, "the engine has stopped: see the server's log", "server_error")

    def check_room(self, more: int) -> None:
        self.check_engine()
        if len(self.engine.requests) + more > self.args.rows + self.args.queue:
            raise Refusal(429, f"{len(self.engine.requests)} requests are being written or wait: try again", "rate_limit_exceeded")

    async def complete(self, kind, data: bytes, gone):
        """A reply as a dict, or the chunks of a stream, to the body `data`; gone(): returns when the client has hung up."""
        body = parsed(kind, data)
        chat, person, prompts = kind is ChatBody, await self.person(body), self.prompts(body)
        number = body.n or 1
        self.check_room(len(prompts) * number)
        choices = [Choice(self, k, prompts[k // number], body, person) for k in range(len(prompts) * number)]
        reply = Reply(chat, f"{'chatcmpl' if chat else 'cmpl'}-{next(self.serial)}", body.model or self.name, person[1])
        usage = lambda: usage_of(sum(map(len, prompts)), sum(len(choice.ids) for choice in choices))  # noqa: E731
        if body.stream:
            return self.stream(body, reply, choices, usage)
        work, left = asyncio.ensure_future(collect(choices)), asyncio.ensure_future(gone())
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not work.done():
            work.cancel()
            self.counts["cancelled"] += 1
            raise Refusal(499, "the client has gone")
        await work
        whole = [reply.choice(choice.index, choice.text.text.rstrip(), choice.finish, choice.logprobs(chat), **await choice.more())
                 for choice in choices]
        return reply.whole(whole, usage())

    async def stream(self, body, reply: Reply, choices: list[Choice], usage):
        """The lines of a stream: role first, then pieces, why each ended, usage if it was asked for, and [DONE]."""
        line, over = lambda found: f"data: {json.dumps(found, ensure_ascii=False)}\n\n", False  # noqa: E731
        try:
            for choice in choices if reply.chat else ():
                yield line(reply.part(choice.index, begins=True))
            async for choice, piece, finish in pieces(choices):
                if piece:
                    yield line(reply.part(choice.index, piece, logprobs=choice.logprobs(reply.chat)))
                if finish:
                    rest = choice.logprobs(reply.chat) if choice.sent < len(choice.ids) else None
                    yield line(reply.part(choice.index, finish=finish, logprobs=rest, **await choice.more()))
            if body.stream_options and body.stream_options.include_usage:
                yield line(reply.usage(usage()))
            over = True
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status has gone out already
            over = True
            yield line({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
        finally:
            self.counts["cancelled"] += not over

    def inventory(self) -> dict:
        """What can be asked for: for the page, and for clients that choose."""
        traits = {trait: {"low": adjectives(trait, "low"), "high": adjectives(trait, "high"), "levels": bool(getattr(
            neurons, "trained", ""))} for trait, neurons in self.people.traits.items()}
        model, frame = self.engine.model, self.people.frame
        return {"model": self.name, "layers": len(self.engine.steering.mlps), "neurons": sum(
                    mlp.width for mlp in self.engine.steering.mlps), "context": self.most, "dtype": str(model.dtype)[6:],
                "traits": traits, "frame": {"system": frame.system, "question": frame.question}, "poles": POLES, "characters": {
                    name: {"traits": who.strengths, "method": who.method} for name, who in self.people.characters.items()}}

    def models(self) -> dict:
        names = [self.name, *(f"{self.name}+{name}" for name in self.people.characters)]
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "personality-neurons"}
                                           for name in names]}

    def metrics(self) -> str:
        """Prometheus' text."""
        engine = self.engine
        rows = [("requests_running", "gauge", "", len(engine.requests)), ("steps_total", "counter", "", engine.steps),
                ("written_total", "counter", "", engine.tokens), ("tokens_total", "counter", "", self.counts["tokens"]),
                ("cancelled_total", "counter", "", self.counts["cancelled"]),
                *(("replies_total", "counter", f'{{code="{code}"}}', n) for code, n in sorted(self.codes.items()))]
        kinds = dict.fromkeys((name, kind) for name, kind, _, _ in rows)
        return "".join(f"# TYPE personality_{name} {kind}\n" + "".join(
            f"personality_{name}{labels} {value}\n" for other, _, labels, value in rows if other == name) for name, kind in kinds)
