"""Let a language model write in a personality, by editing the neurons that identify.py found.

    python induce.py --trait extraversion --alpha 2
    python induce.py --trait neuroticism --alpha -1.5 --chat

Raises the neurons of the pole that is asked for and suppresses those of the other one while the model writes: no prompt,
no training, no changed weights, and no time (the edit rides in the op that computes the MLP). A negative alpha is the low
pole. Where there is no neuron file yet, it is made first. The method is NPTI (ICLR 2025, arXiv 2410.12327), section 3.3.

From Python: `with steer(model, npti(Neurons.load(path, model), alpha=2)): model.generate(...)`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from identify import (POLES, TRAITS, Flags, Neurons, Rows, UserError, answer, answered_inputs, ask, chat, check_trait, find_mlps,
                      identify, load_model, model_arguments, neuron_path, op, patched, positive, read_answers, say, script, token_ids,
                      write_atomically)

QUESTIONS = (
    "What do you like to do with your friends?",
    "You are invited to a big party. How do you feel about it?",
    "A new colleague joins your team. What do you do?",
    "How would you like to spend a free Friday evening?",
)
REPETITION_PENALTY = 1.15  # the paper's, when it tests

# --------------------------------------------------------------------------------------------------------- profiles


@dataclass
class Profile:
    """The edits of one personality over all layers. layer, index: int64 (n); value: float32 (n, 4), a row being
    cap, scale, shift, bias of (scale * min(a, cap) + shift) * up + bias. No neuron stands twice. residual: {layer: float32
    (hidden_size)}, what is added to the layer's output instead, by activation addition."""

    layer: object
    index: object
    value: object
    name: str = ""
    residual: dict = field(default_factory=dict)

    @classmethod
    def of(cls, edits: list[tuple], name: str = "") -> "Profile":
        """From (layer, index, cap, shift) tensors, one tuple a set of neurons. A neuron in several sets gets the lowest
        cap and the sum of the shifts: capped before shifted, as in NPTI, whatever the order of the sets."""
        import torch

        if not edits:
            return cls(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0, 4), name)
        layer, index, cap, shift = (torch.cat(parts) for parts in zip(*edits))
        keys, at = torch.unique(torch.stack([layer, index], 1), dim=0, return_inverse=True)
        value = torch.tensor([math.inf, 1.0, 0.0, 0.0]).repeat(len(keys), 1)
        value[:, 0] = value[:, 0].scatter_reduce(0, at, cap.float(), "amin")
        # summed in float64 and in sorted order, so that the order of the sets does not show in the last bit
        order = torch.argsort(shift, stable=True)
        value[:, 2] = torch.zeros(len(keys), dtype=torch.float64).index_add(0, at[order], shift[order].double()).float()
        return cls(keys[:, 0], keys[:, 1], value, name)

    def __len__(self):
        return len(self.layer)


def npti_edits(neurons: Neurons, alpha: float, min_delta: float = 0.1, min_neurons: int | None = None) -> list[tuple]:
    """NPTI's two sets of edits, (layer, index, cap, shift) each: neurons of the opposite pole are capped at 0, those of the
    target pole raised by alpha * p95 * f(delta), f(delta) = 1 / (1 + exp(-10 (delta - 0.15))) (section 3.3)."""
    import torch

    if not math.isfinite(alpha):
        raise UserError(f"alpha: expected a finite number, got {alpha}")
    if alpha == 0:
        return []
    target, opposite = POLES if alpha > 0 else POLES[::-1]
    layer, index, _, _ = neurons.select(opposite, min_delta, min_neurons)
    capped = layer, index, torch.zeros(len(layer)), torch.zeros(len(layer))
    layer, index, delta, p95 = neurons.select(target, min_delta, min_neurons)
    return [capped, (layer, index, torch.full((len(layer),), math.inf), abs(alpha) * p95 * torch.sigmoid(10 * (delta - 0.15)))]


def npti(neurons: Neurons, alpha: float, min_delta: float = 0.1, min_neurons: int | None = None) -> Profile:
    """The profile of one trait: alpha > 0 for its high pole, alpha < 0 for its low one, 0 for no edit at all."""
    return Profile.of(npti_edits(neurons, alpha, min_delta, min_neurons), f"{neurons.meta.get('trait', '')} {alpha:+g}")


def mean_difference(model, tokenizer, path, trait: str, layer: int | None = None, most: int = 64):
    """The direction of activation addition: {layer: float32 (hidden_size)}, the mean of a layer's output over the answers'
    tokens under the high pole less that under the low one, from the first `most` answers that identify.py wrote to path.
    layer: by default the one in the middle. (CAA, Rimsky et al., arXiv 2312.06681, adds such a difference; repeng likewise.)"""
    import torch

    mlps = find_mlps(model)
    layer = len(mlps) // 2 if layer is None else layer
    items = read_answers(path, trait, tokenizer)[:most]
    total, tokens = {pole: 0 for pole in POLES}, {pole: 0 for pole in POLES}
    for start in range(0, len(items), 16):
        batch = items[start:start + 16]
        inputs, where = answered_inputs(tokenizer, batch, "generated", model.device)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            seen = []
            hook = mlps[layer].layer.register_forward_hook(lambda module, args, output: seen.append(first_of(output)))
            stack.callback(hook.remove)
            model.get_decoder()(**inputs, use_cache=False)
        for k, item in enumerate(batch):
            total[item.pole] = total[item.pole] + seen[0][k][where[k]].double().sum(0).cpu()
            tokens[item.pole] += int(where[k].sum())
    if not all(tokens.values()):
        raise UserError(f"{path}: no answers of both poles of {trait}")
    return {layer: (total["high"] / tokens["high"] - total["low"] / tokens["low"]).float()}


def activation_addition(direction: dict, alpha: float, name: str = "") -> Profile:
    """The profile that adds alpha times a mean difference to the residual stream; alpha < 0 is the low pole."""
    profile = Profile.of([], name)
    profile.residual = {layer: alpha * vector for layer, vector in direction.items()} if alpha else {}
    return profile


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


@contextlib.contextmanager
def residual_added(model, profiles: list[Profile], rows: Rows):
    """Add the profiles' residual vectors to the outputs of their layers, for the tokens that rows tells."""
    import torch

    mlps = find_mlps(model)
    tables = {}
    for number, profile in enumerate(profiles, 1):
        for layer, vector in profile.residual.items():
            if layer not in tables:
                weight = mlps[layer].gate.weight
                tables[layer] = torch.zeros((len(profiles) + 1, len(vector)), dtype=weight.dtype, device=weight.device)
            tables[layer][number] = vector
    with contextlib.ExitStack() as stack:
        for layer, table in tables.items():
            def add(module, args, output, table=table):
                if rows.tokens is None:
                    return output
                hidden = first_of(output)
                hidden = hidden + table[rows.tokens.long()].view(hidden.shape)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            stack.callback(mlps[layer].layer.register_forward_hook(add).remove)
        yield


class Tables:
    """The edit tables of several profiles, as the op reads them. They keep their addresses and capacity, so that edits can
    be swapped under a captured graph. layers[l]: (edit_ptr int32 (P + 1, tiles + 1), edit_index, edit_value)."""

    def __init__(self, profiles: list[Profile], depth: int, width: int, device, capacity: int | None = None):
        import torch

        self.depth, self.width, self.number = depth, width, len(profiles)
        self.tiles = -(-width // op().tile)
        self.capacity = max(1, sum(map(len, profiles)) if capacity is None else capacity)
        self.ptr = [torch.zeros((self.number + 1, self.tiles + 1), dtype=torch.int32, device=device) for _ in range(depth)]
        self.index = torch.zeros(self.capacity, dtype=torch.int32, device=device)
        self.value = torch.zeros((self.capacity, 4), device=device)
        for tensor in (*self.ptr, self.index, self.value):
            torch._dynamo.mark_static_address(tensor)
        self.layers = [(ptr, self.index, self.value) for ptr in self.ptr]
        self.fill(profiles)

    def fill(self, profiles: list[Profile]) -> None:
        """Check everything that the kernel can't, and write the tables."""
        import torch

        if not profiles:
            raise UserError("profiles: expected at least one, got none")
        if len(profiles) != self.number:
            raise UserError(f"profiles: expected {self.number}, as when steering began, got {len(profiles)}")
        total = sum(map(len, profiles))
        if total > self.capacity:
            raise UserError(f"profiles: {total} edits are over the capacity of {self.capacity}: steer(..., capacity={total})")
        for profile in profiles:
            n = len(profile)
            if profile.index.shape != (n,) or profile.value.shape != (n, 4):
                raise UserError(f"profile {profile.name!r}: expected index ({n},) and value ({n}, 4), got "
                                f"{tuple(profile.index.shape)} and {tuple(profile.value.shape)}")
            for what, numbers, most, of in (("layer", profile.layer, self.depth, "layers"), ("neuron", profile.index, self.width, "a layer")):
                wrong = numbers[(numbers < 0) | (numbers >= most)]
                if len(wrong):
                    raise UserError(f"profile {profile.name!r}: {what} {int(wrong[0])} of a model of {most} {of}")
            if bool(profile.value.isnan().any() | profile.value[:, 1:].isinf().any() | (profile.value[:, 0] == -math.inf).any()):
                raise UserError(f"profile {profile.name!r}: cap, scale, shift or bias is not a finite number (a cap can be infinite)")
        layer = torch.cat([profile.layer for profile in profiles])
        index = torch.cat([profile.index for profile in profiles])
        number = torch.cat([torch.full((len(profile),), k + 1) for k, profile in enumerate(profiles)])
        value = torch.cat([profile.value.float() for profile in profiles])
        segment = layer * (self.number + 1) + number
        key = segment * self.width + index
        order = torch.argsort(key)
        if len(key) and bool((key[order].diff() == 0).any()):
            raise UserError("profiles: a neuron stands twice in a profile")
        cell = segment * self.tiles + index // op().tile
        count = torch.bincount(cell, minlength=self.depth * (self.number + 1) * self.tiles)
        start = torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)])
        base = torch.arange(self.depth * (self.number + 1)).view(self.depth, self.number + 1, 1) * self.tiles
        ptr = start[base + torch.arange(self.tiles + 1)].to(torch.int32)
        for target, source in zip(self.ptr, ptr):
            target.copy_(source)
        self.index[:total].copy_(index[order].to(torch.int32))
        self.value[:total].copy_(value[order])
        # for thin(): the raised neurons, by layer and profile
        self.shift = value[order][:, 2].to(self.value.device)
        self.segment = segment[order].to(self.value.device)

    def thin(self, keep: float, generator) -> None:
        """Raise a random share `keep` of each layer's neurons only. NPTI's release redraws it at every step."""
        import torch

        raised = (self.shift != 0).nonzero().flatten()
        segment = self.segment[raised]
        order = torch.argsort(segment + torch.rand(len(raised), generator=generator, dtype=torch.float64).to(segment.device))
        sizes = segment.bincount()
        rank = torch.arange(len(raised), device=segment.device) - (sizes.cumsum(0) - sizes)[segment[order]]
        chosen = raised[order][rank < (keep * sizes[segment[order]]).round()]
        self.value[:len(self.shift), 2] = 0
        self.value[chosen, 2] = self.shift[chosen]


class Steering:
    """What `with steer(...) as steering` gives: change profiles or rows between two generate() calls."""

    def __init__(self, tables: Tables, rows: Rows):
        self.tables, self.rows = tables, rows

    def update(self, profiles) -> None:
        """Other edits of neurons, under a captured graph too. (Residual vectors stay as they were when steering began.)"""
        self.tables.fill([profiles] if isinstance(profiles, Profile) else list(profiles))

    def assign(self, rows) -> None:
        self.rows.assign(rows)


@contextlib.contextmanager
def steer(model, profiles, rows=None, where="generated", keep: float = 1.0, seed: int = 0, capacity: int | None = None):
    """Edit the model's neurons while it runs: `with steer(model, profile): model.generate(...)`. Afterwards, also after an
    exception, the model is untouched.

    profiles: one Profile or a list. rows: for each prompt of the batch 0 (no edit) or the number, from 1, of its profile;
    None: all have the one profile, or prompt i has profile i + 1. where: "generated" (positions whose input is a generated
    token, as in NPTI), "all" (also the prompt, and forwards outside generate()), or a bool tensor (rows, tokens).
    keep < 1 raises only a random share of each layer's neurons, redrawn at every step, as NPTI's release does with 0.9.
    capacity: room for edits, if larger profiles are to follow by update().
    """
    import torch

    if not 0 < keep <= 1:
        raise UserError(f"keep: expected a number above 0, at most 1, got {keep}")
    profiles = [profiles] if isinstance(profiles, Profile) else list(profiles)
    mlps = find_mlps(model)
    tables = Tables(profiles, len(mlps), mlps[0].width, mlps[0].gate.weight.device, capacity)
    steering = Steering(tables, Rows(rows, len(profiles), 0, where))
    generator = torch.Generator().manual_seed(seed)
    with patched(model, "steering", (steering.rows, tables.layers)) as patch:
        if keep < 1:
            redraw = lambda: tables.thin(keep, generator)  # noqa: E731
            redraw()
            patch.before_decode.append(redraw)
        try:
            with residual_added(model, profiles, steering.rows):
                yield steering
        finally:
            if keep < 1:
                patch.before_decode.remove(redraw)


# ------------------------------------------------------------------------------------------------------ personality


def neurons_of(model, tokenizer, trait: str, folder: str, **options) -> Neurons:
    """A trait's neuron file for this model, made now if it is not there."""
    path = neuron_path(folder, trait)
    if not path.exists():
        say(f"{path}: no neuron file yet, so the {trait} neurons are identified first")
        identify(model, tokenizer, trait, out=folder, **options)
    return Neurons.load(path, model)


class Personality:
    """Strengths by trait, and the neuron files to make a profile of them."""

    def __init__(self, model, tokenizer, args):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.strengths, self.files = {}, {}

    def set(self, trait: str, alpha: float) -> None:
        trait = check_trait(trait)
        if trait not in self.files:
            options = {name: getattr(self.args, name) for name in ("where", "batch_size", "seed")}
            self.files[trait] = neurons_of(self.model, self.tokenizer, trait, self.args.neurons, **options)
        self.strengths[trait] = alpha

    def profile(self, sign: float = 1) -> Profile:
        args, edits = self.args, []
        for trait in TRAITS:
            if self.strengths.get(trait):
                edits += npti_edits(self.files[trait], sign * self.strengths[trait], args.min_delta, args.min_neurons)
        return Profile.of(edits, self.describe(sign))

    def describe(self, sign: float = 1) -> str:
        return ", ".join(f"{trait} {sign * alpha:+g}" for trait, alpha in self.strengths.items()) or "no edit"


def sampling(args) -> dict:
    """generate()'s options for the flags: greedy unless a temperature or top-p is asked for."""
    options = {"repetition_penalty": REPETITION_PENALTY}
    if args.temperature is not None or args.top_p is not None:
        options |= {"do_sample": True, "temperature": 1.0 if args.temperature is None else args.temperature,
                    "top_p": 1.0 if args.top_p is None else args.top_p}
    return options


def side_by_side(model, tokenizer, personality: Personality, args) -> None:
    """The model's own answer beside the personality's and its opposite's, all in one batch."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    profiles = [personality.profile(), personality.profile(-1)]
    console = Console()
    questions = args.question or QUESTIONS
    with steer(model, profiles, [0, 1, 2] * len(questions), args.where, args.keep, args.seed):
        answers = answer(model, tokenizer, [ask(question) for question in questions for _ in range(3)],
                         args.max_new_tokens, **sampling(args))
    for k, question in enumerate(questions):
        table = Table(title=Text(question), title_justify="left", title_style="bold", show_lines=True, expand=True)
        for title in ("the model itself", *(profile.name for profile in profiles)):
            table.add_column(title, ratio=1)
        table.add_row(*(Text(text) for text, _ in answers[3 * k:3 * k + 3]))
        console.print(table)


def read_questions(path: str) -> list[str]:
    """One question a line: plain text, or a JSON object with the key question."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {path}: {error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("{"):
            try:
                line = json.loads(line)["question"]
                if not isinstance(line, str):
                    raise ValueError(f"question is a {type(line).__name__}")
            except (ValueError, KeyError) as error:
                raise UserError(f'{path}, line {number}: expected {{"question": text}}: {error}') from error
        if line.strip():
            questions.append(line.strip())
    if not questions:
        raise UserError(f"--questions {path}: no question in it")
    return questions


def answer_file(model, tokenizer, personality: Personality, args) -> None:
    """Answer a file of questions in the personality, JSON lines out."""
    from tqdm import tqdm

    questions = read_questions(args.questions)
    lines, profile = [], personality.profile()
    with steer(model, profile, None, args.where, args.keep, args.seed), \
            tqdm(total=len(questions), unit="answer", disable=not args.out) as bar:
        for start in range(0, len(questions), args.batch_size):
            batch = questions[start:start + args.batch_size]
            for question, (text, ids) in zip(batch, answer(model, tokenizer, [ask(question) for question in batch],
                                                           args.max_new_tokens, **sampling(args))):
                lines.append(json.dumps({"question": question, "answer": text, "personality": personality.strengths,
                                         "ids": ids}, ensure_ascii=False) + "\n")
                if not args.out:
                    sys.stdout.write(lines[-1])
            bar.update(len(batch))
    if args.out:
        write_atomically(Path(args.out), "".join(lines).encode())


CHAT_HELP = "/trait NAME [ALPHA], /alpha NUMBER (of the last trait), /reset (forget the conversation), /quit"


def converse(model, tokenizer, personality: Personality, args) -> None:
    """A conversation in the terminal, streamed token by token; the personality can be changed between turns."""
    import torch
    from transformers import DynamicCache, TextStreamer

    turns, cached, cache, latest = [], [], DynamicCache(config=model.config), list(personality.strengths)[-1]
    capacity = 2 * len(TRAITS) * len(find_mlps(model)) * find_mlps(model)[0].width // 10
    print(f"{personality.describe()}    {CHAT_HELP}")
    with steer(model, personality.profile(), None, args.where, args.keep, args.seed, capacity) as steering:
        while True:
            try:
                line = input("you: ").strip()
            except EOFError:
                print()
                return
            command, *words = line.split()[:3] if line else [""]
            try:
                if command in ("/quit", "/exit"):
                    return
                if command == "/reset":
                    turns, cached, cache = [], [], DynamicCache(config=model.config)
                elif command == "/trait" and words:
                    latest = check_trait(words[0])
                    personality.set(latest, float(words[1]) if len(words) > 1 else personality.strengths.get(latest, 1.0))
                elif command == "/alpha" and words:
                    personality.set(latest, float(words[0]))
                elif command.startswith("/"):
                    print(CHAT_HELP)
                if command.startswith("/"):
                    steering.update(personality.profile())
                    print(personality.describe())
            except ValueError as error:  # UserError among them
                print(error)
            if not line or command.startswith("/"):
                continue
            turns.append({"role": "user", "content": line})
            ids = token_ids(tokenizer, chat(tokenizer, turns))
            shared = next((i for i, (a, b) in enumerate(zip(cached, ids)) if a != b), min(len(cached), len(ids)))
            shared = min(shared, len(ids) - 1)
            try:  # what was said is not computed again
                cache.crop(shared)
            except (ValueError, RuntimeError, NotImplementedError):  # a sliding window can't be cropped
                cache = DynamicCache(config=model.config)
            prompt = torch.tensor([ids], device=model.device)
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            try:
                with torch.no_grad():
                    output = model.generate(
                        input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, streamer=streamer,
                        max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                        **{"do_sample": False, **sampling(args)})[0].tolist()
            except KeyboardInterrupt:  # stops this answer only
                print()
                turns, cached, cache = turns[:-1], [], DynamicCache(config=model.config)
                continue
            cached = output[:-1]  # the last token was never fed
            turns.append({"role": "assistant", "content": tokenizer.decode(output[len(ids):], skip_special_tokens=True).strip()})


def parser() -> Flags:
    flags = Flags(__doc__)
    flags.add_argument("--trait", action="append", metavar="T", help=f"{', '.join(TRAITS)}; again for several")
    flags.add_argument("--alpha", action="append", type=float, metavar="A",
                       help="strength, one a trait; negative: the low pole (the paper: 0.6 to 1.5)")
    flags.add_argument("--neurons", default="neurons", metavar="DIR", help="folder of neuron files (default: %(default)s)")
    flags.add_argument("-q", "--question", action="append", metavar="TEXT", help="ask this instead of the everyday questions")
    flags.add_argument("--questions", metavar="FILE", help="answer a file of questions, one a line")
    flags.add_argument("--out", metavar="FILE", help="where the answers to --questions go (default: the terminal)")
    flags.add_argument("--chat", action="store_true", help="talk to it; in the chat: " + CHAT_HELP)
    flags.add_argument("--keep", type=float, default=1.0, metavar="P",
                       help="raise a random share of the neurons, redrawn each step (default: all; NPTI's release: 0.9)")
    flags.add_argument("--min-delta", type=float, default=0.1, metavar="D", help="default: %(default)s")
    flags.add_argument("--min-neurons", type=positive, metavar="N",
                       help="at least so many neurons a pole (default: 0.436 %% of all, NPTI's 2,000 of Llama-3-8B's)")
    flags.add_argument("--where", choices=("generated", "all"), default="generated",
                       help="edit the answer's tokens, as NPTI does, or the prompt's as well (default: %(default)s)")
    flags.add_argument("--temperature", type=float, metavar="X", help="sample (default: greedy)")
    flags.add_argument("--top-p", type=float, metavar="X")
    model_arguments(flags)
    return flags


def main() -> None:
    args = parser().parse_args()
    traits, alphas = [check_trait(trait) for trait in args.trait or []], args.alpha or []
    if not traits or len(alphas) not in (1, len(traits)) or len(set(traits)) < len(traits):
        raise UserError("expected --trait T --alpha A, again for each further trait: "
                        f"got the traits {traits} and the alphas {alphas}")
    for flag, values, fine in (("--alpha", alphas, lambda x: abs(x) < 1e3), ("--keep", [args.keep], lambda x: 0 < x <= 1),
                               ("--min-delta", [args.min_delta], lambda x: 0 <= x <= 1),
                               ("--temperature", [args.temperature], lambda x: x is None or 0 < x < 100),
                               ("--top-p", [args.top_p], lambda x: x is None or 0 < x <= 1)):
        if not all(map(fine, values)):  # NaN is in no range
            raise UserError(f"{flag}: {values} is out of range")
    if args.out and not args.questions:
        raise UserError("--out FILE goes with --questions FILE")
    if args.questions:
        read_questions(args.questions)  # before the model is loaded
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    import torch

    torch.manual_seed(args.seed)
    personality = Personality(model, tokenizer, args)
    for trait, alpha in zip(traits, alphas if len(alphas) == len(traits) else alphas * len(traits)):
        personality.set(trait, alpha)
    work = converse if args.chat else answer_file if args.questions else side_by_side
    work(model, tokenizer, personality, args)


if __name__ == "__main__":
    script(main)
