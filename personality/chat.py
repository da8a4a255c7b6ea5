"""induce.py --chat: a conversation in the terminal, streamed token by token; the personality can be changed between turns."""

import os
import sys

import torch
from transformers import DynamicCache, TextStreamer

from .frame import Frame, with_a_clock
from .methods import Character, Profiles
from .mlp import find_mlps
from .model import CACHE, answer_text, check_length, generate_options, prompt_ids, sampling
from .steer import Profile, steer
from .terminal import CHAT_HELP, UserError, check_alpha, check_trait, printable


class Streamer(TextStreamer):
    """Prints an answer as it comes; of a base model's, not the beginning of the question that it would ask itself next."""

    held = ""

    def on_finalized_text(self, text, stream_end=False):
        stop = self.tokenizer.stop_text or ""
        self.held = (self.held + text).partition(stop)[0] if stop else self.held + text
        begun = 0 if stream_end else max(k for k in range(len(stop) + 1) if self.held.endswith(stop[:k]))
        shown = len(self.held) - begun
        super().on_finalized_text(printable(self.held[:shown]), stream_end)
        self.held = self.held[shown:]


class Chat:
    """One conversation: its turns, and the cache of what the model has read of them."""

    def __init__(self, model, tokenizer, args):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.forget()

    def forget(self) -> None:
        system = Frame.named(self.args.frame).system
        self.turns = [{"role": "system", "content": system}] if system else []
        self.forget_cache()

    def forget_cache(self) -> None:
        self.cached, self.cache = [], DynamicCache(config=self.model.config)

    def fitting(self, turns: list[dict]) -> tuple[list[dict], list[int]]:
        """Turns that end with a question, and their ids. Where the model's context has no room for them, the older half of what was
        said goes, again and again: not as little as will do, since the rest is to be read anew each time."""
        system = [turn for turn in turns[:1] if turn["role"] == "system"]
        said = kept = turns[len(system):-1]  # questions and their answers
        while True:
            asked = [*system, *kept, turns[-1]]
            ids = prompt_ids(self.tokenizer, asked)
            try:
                check_length(self.model, [asked], [ids], [self.args.max_new_tokens])
                break
            except UserError:
                if not kept:
                    raise
                kept = kept[2 * -(-len(kept) // 4):]
        if len(kept) < len(said):
            print(f"(the first {(len(said) - len(kept)) // 2} of {len(said) // 2} answers are forgotten: the context is full)")
        return asked, ids

    def ask(self, line: str) -> None:
        """Print the answer to a line; Ctrl-C stops this answer only."""
        turns, ids = self.fitting([*self.turns, {"role": "user", "content": line}])
        shared = min(len(os.path.commonprefix([self.cached, ids])), len(ids) - 1)
        if shared < len(self.cached):  # what was said is not computed again; a negative number: so many tokens go
            try:
                self.cache.crop(shared - len(self.cached))
            except (ValueError, RuntimeError):  # a sliding window can't be cropped
                self.forget_cache()
        prompt, streamer = torch.tensor([ids], device=self.model.device), Streamer(self.tokenizer, True, skip_special_tokens=True)
        options = generate_options(self.tokenizer, len(ids), max_new_tokens=self.args.max_new_tokens,
                                   **sampling(self.args.temperature, self.args.top_p))
        try:
            with torch.no_grad():
                output = self.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **{CACHE: self.cache},
                                             streamer=streamer, **options)[0].tolist()
        except KeyboardInterrupt:
            print()
            return self.forget_cache()
        self.cached = output[:-1]  # the last token was never fed
        self.turns = [*turns, {"role": "assistant", "content": answer_text(self.tokenizer, output[len(ids):])}]


def changed(character: Character, latest: str, command: str, words: list[str]) -> str:
    """Set a strength as /trait NAME [ALPHA] or /alpha NUMBER say; returns the trait that it is about."""
    trait, *given = [check_trait(words[0]), *words[1:]] if command == "/trait" else [latest, *words]
    if len(given) > 1:
        raise UserError(CHAT_HELP)
    character.strengths[trait] = check_alpha(given[0] if given else character.strengths.get(trait, 1.0))
    return trait


def converse(model, tokenizer, profiles: Profiles, character: Character, args) -> None:
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # what is typed need not be UTF-8
    chat, latest = Chat(model, with_a_clock(tokenizer), args), list(character.strengths)[-1]
    capacity = sum(mlp.neurons for mlp in find_mlps(model))  # room for whatever /trait and /alpha may ask for
    profile = profiles.of(character)
    if character.method == "trained":  # no edits are trained while the model is steered: nothing is begun that comes to that
        profiles.neurons.identify = profiles.neurons.train = None
    print(f"{printable(profile.name)}    {CHAT_HELP}")
    with steer(model, profile, None, args.where, args.keep, args.seed, capacity) as steering:
        while True:
            try:
                line = input("you: ").strip()
            except EOFError:
                return print()
            command, *words = line.split() or [""]
            if command in ("/quit", "/exit"):
                return
            before = dict(character.strengths), latest
            try:
                if not command.startswith("/"):
                    if line:
                        chat.ask(line)
                    continue
                if command == "/reset":
                    chat.forget()
                elif command in ("/trait", "/alpha") and words:
                    latest = changed(character, latest, command, words)
                    steering.update(Profile.empty())  # so that neurons that are identified now are the model's own
                    profiles.neurons[latest]
                else:
                    print(CHAT_HELP)
                profile = profiles.of(character)
                steering.update(profile)
                print(printable(profile.name))
            except UserError as error:
                print(printable(error))
                character.strengths, latest = before
                steering.update(profiles.of(character))
