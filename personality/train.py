"""Trained edits: constants on a few neurons, with which the model without a persona writes as it does under one.

NPTI takes the neurons that fire under a persona. Here the model says itself, by its gradient, which neurons would bring the
persona's words about, and how far. For each pole of a trait, from answers y that identify.py got under it:

    teacher   softmax(log p(.|q, y) + GAIN (log p(.|pole, q, y) - log p(.|other pole, q, y))): the unedited model, asked three times
    student   no persona; act(gate) * up + bias at the answer's positions. Both over the TOP likeliest tokens, where each sums to 1
    chosen    SHARE of the neurons: those by which a step would gain most, were each alone: g^2 / c. g: d KL(teacher, student) /
              d bias at bias 0, the mean over the answers' tokens; c: the diagonal of C
    step      one step of natural gradient (Amari 1998) of those neurons, -C^-1 g, brought to the size that UNIT says. C: Fisher's
              matrix of the answers, with OFF_DIAGONAL of what lies off its diagonal, + PRICE times the diagonal of that of neutral
              text, see price_of(): a bias that does much there is made small

Then both poles are tried at some multiples of their biases, see doses.py. No judge takes part, and the judges' personas are not
used. What else was tried: tests/MEASURED.md.
"""

import contextlib
import copy
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import DynamicCache

from . import POLES, doses
from .frame import Frame, declines
from .judges import prefill
from .mlp import find_mlps, shape_of
from .model import CACHE, BatchSize, enough_memory, prompt_ids, with_ids
from .neurons import TRAINING, Neurons, answers_path
from .questions import Bench, read_answers
from .rows import replace_forward
from .steer import Profile
from .store import digest, lines_of, only_run, write_atomically
from .terminal import UserError, progress, resumable, say

GAIN = 2.0  # how much further than the persona itself the teacher goes
SHARE = 0.005  # of all neurons, a pole
ANSWERS, ROWS = 32, 16  # answers a pole, rows of a batch
TOP = 256  # tokens of the vocabulary in which student and teacher are compared
# answers drawn for each that is there; the share kept of Fisher's matrix off its diagonal; added to its diagonal, in its means
DRAWS, OFF_DIAGONAL, RIDGE = 2, 0.5, 1e-3
PRICE, WINDOW = 3.0, 24  # weight of what biases do to neutral text; its tokens in a row
UNIT = 0.001  # nats a token that the biases add to neutral text, by the diagonal of its matrix: about one size on every model
NO_ROOM = "training keeps what a backward pass needs, and its levels some rows: --device-map auto or --dtype bfloat16 leaves room"
NOT_FINITE = "training: a gradient is no finite number: try --dtype float32"


# ------------------------------------------------------------------------------------------------------------- teacher


@dataclass
class Lesson:
    """A batch of answers, and what the student is to say in them. cache, mask (rows, prompt): of the prompts without a persona; ids
    (rows, tokens), what is fed; counted (rows, tokens), where a fed token is an answer's; top (rows, tokens, TOP), tokens of the
    vocabulary; plain, apart: of each of them log p, and log p(high) - log p(low)."""

    cache: DynamicCache
    mask: torch.Tensor
    ids: torch.Tensor
    counted: torch.Tensor
    top: torch.Tensor
    plain: torch.Tensor
    apart: torch.Tensor

    def teacher(self, sign: int):
        """The teacher's probabilities of the tokens `top`, which sum to 1; sign: 1 for the high pole, -1 for the low one."""
        return (self.plain + sign * GAIN * self.apart).softmax(-1)

    def parts(self, most: int):
        """Yield it in lessons of at most so many rows, which stay as wide as they are."""
        for rows in torch.arange(len(self.ids), device=self.ids.device).split(most):
            rest = (tensor[rows] for tensor in (self.ids, self.counted, self.top, self.plain, self.apart))
            yield Lesson(*some_of((self.cache, self.mask), rows), *rest)


def some_of(prompts, rows):
    """These rows of prompts, (cache, mask): the very same where they are all."""
    cache, mask = prompts
    if len(rows) < len(mask):
        cache = copy.deepcopy(cache)
        cache.reorder_cache(rows)
    return cache, mask[rows]


def go_on(model, prompts, ids):
    """Log-probabilities after each of the tokens ids (rows, tokens) that follow prompts, (cache, mask) of what was read without
    edits: (rows, tokens, vocabulary)."""
    cache, mask = prompts
    mask = torch.cat([mask, mask.new_ones(ids.shape)], 1)
    positions = (mask.cumsum(1) - 1)[:, -ids.shape[1]:]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: copy.deepcopy(cache)}).logits
    return logits.float().log_softmax(-1)


def make_lesson(model, tokenizer, bench: Bench, trait: str, frame: Frame, items: list[dict], seed: int, size: BatchSize) -> Lesson:
    """The lesson of these answers (with ids), a row each. size: of what is read at once."""
    longest = max(len(item["ids"]) for item in items) - 1
    fed = [item["ids"][:-1] for item in items]  # the last token was never an input
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in fed], device=model.device)
    counted = torch.tensor([[k < len(row) for k in range(longest)] for row in fed], device=model.device)

    def asked(pole: str | None):
        def persona(item):
            if pole is None:
                return None
            pick = random.Random(f"{seed}/{trait}/{item['question']}/{pole}")
            return item["persona"] if pole == item["pole"] else pick.choice(bench.personas_for("search", trait, pole))

        turns = [frame.turns(item["question"], persona(item)) for item in items]
        return prefill(model, tokenizer, [prompt_ids(tokenizer, conversation) for conversation in turns])[1:3]

    under = [asked(pole) for pole in (None, *POLES)]

    def compared(rows):
        with torch.no_grad():
            plain, high, low = (go_on(model, some_of(prompts, rows), ids[rows]) for prompts in under)
        apart = high - low
        both = torch.maximum(*((plain + sign * GAIN * apart).log_softmax(-1) for sign in (1, -1)))
        top = torch.maximum(plain, both).topk(min(TOP, plain.shape[-1]), -1).indices
        return top, plain.gather(-1, top), apart.gather(-1, top)

    every = torch.arange(len(ids), device=model.device)
    taught = size.fit(lambda rows: [*zip(*map(compared, every.split(rows)))], len(ids))
    return Lesson(*under[0], ids, counted, *map(torch.cat, taught))


# ------------------------------------------------------------------------------------------------------------- student


@contextlib.contextmanager
def frozen(model):
    """The model's weights get no gradients."""
    weights = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        for weight, _ in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, before in weights:
            weight.requires_grad_(before)


@contextlib.contextmanager
def biased(model, bias):
    """The model with its MLPs in plain PyTorch, through which gradients flow to bias, float32 (layers, d_ff) or
    (layers, rows, 1, d_ff), which is added to each neuron's product; the weights get none. (The op has no backward.)"""
    def adding(mlp):
        def middle(gate, up, routed):
            product = mlp.act_module(gate) if up is None else mlp.act_module(gate) * up
            own = bias[mlp.layer, ..., mlp.begin:mlp.begin + mlp.neurons].to(gate)
            if gate.dim() == 2:  # tokens in one row, or (n, d_expert) of experts: to each the bias of its row of the batch
                own = own.reshape(-1, mlp.experts, mlp.width)
                token, expert, tokens, _ = routed or (torch.arange(len(gate), device=gate.device), 0, len(gate), 1)
                own = own[token * len(own) // tokens, expert]
            return product + own

        return middle

    with frozen(model), contextlib.ExitStack() as undo:
        for mlp in find_mlps(model):
            replace_forward(undo, mlp.module, mlp.through(adding(mlp)))
        yield


def student_says(model, lesson: Lesson):
    """Log-probabilities at the answers' tokens: (rows, tokens, vocabulary)."""
    return go_on(model, (lesson.cache, lesson.mask), lesson.ids)


def divergence(lesson: Lesson, sign: int, said):
    """KL(teacher, student) in nats at each of the answers' tokens, both over the tokens `top`: (rows, tokens)."""
    teacher, student = lesson.teacher(sign), said.gather(-1, lesson.top).log_softmax(-1)
    return (teacher * (teacher.clamp(min=1e-9).log() - student)).sum(-1) * lesson.counted


def drawn(said, generator):
    """log p(y) at each place of log-probabilities (rows, tokens, vocabulary), y drawn from them DRAWS times: (DRAWS, rows, tokens).
    The outer product of a draw's slopes is Fisher's matrix, in expectation."""
    if not bool(said.isfinite().all()):
        raise UserError(NOT_FINITE)
    y = torch.multinomial(said.detach().exp().flatten(0, 1), DRAWS, replacement=True, generator=generator)
    return said.gather(-1, y.view(*said.shape[:2], DRAWS)).permute(2, 0, 1)


def slopes_of(model, losses, constants, student=biased) -> list:
    """d loss / d constants of each of losses(), in their shape, as student(model, constants), a context, takes them."""
    constants = constants.detach().requires_grad_()
    with student(model, constants), torch.enable_grad():
        slopes = [torch.autograd.grad(loss, constants, retain_graph=True)[0] for loss in losses()]
    if not all(bool(slope.isfinite().all()) for slope in slopes):
        raise UserError(NOT_FINITE)
    return slopes


def no_biases(model, rows: int):
    """For slopes by row of a batch: float32 (layers, rows, 1, d_ff)."""
    depth, width = shape_of(find_mlps(model))
    return torch.zeros((depth, rows, 1, width), device=model.device)


def price_of(model, tokenizer, seed: int) -> torch.Tensor:
    """What each neuron's bias does where nobody asks for a personality: float32 (layers, d_ff), the diagonal of Fisher's matrix, a
    token of neutral text: so to second order twice what KL(unedited, biased) has of bias^2. (Not evaluate.py's texts.)"""
    texts = [tokenizer(text)["input_ids"] for text in lines_of("neutral_training.txt")]
    rows = [text[k:k + WINDOW] for text in texts for k in range(0, len(text) - WINDOW + 1, WINDOW)]
    ids = torch.tensor(rows, device=model.device)

    def squares(most):
        generator, total = torch.Generator(model.device).manual_seed(seed), 0
        for part in ids.split(most):
            def losses():
                said = model(input_ids=part, use_cache=False).logits.float().log_softmax(-1)
                return drawn(said, generator).sum((1, 2))

            slopes = slopes_of(model, losses, no_biases(model, len(part)))
            total = total + sum(slope[:, :, 0].square().sum(1) for slope in slopes).cpu()
        return total

    return BatchSize(len(ids)).fit(squares) / (DRAWS * ids.numel())


def slopes_by_row(model, lesson: Lesson, sign: int, generator) -> list:
    """d KL(teacher, student) / d bias, then DRAWS slopes, each of a drawn answer's log-likelihood: (rows, layers, d_ff) each."""
    def losses():
        said = student_says(model, lesson)
        return [divergence(lesson, sign, said).sum(), *(drawn(said, generator) * lesson.counted).sum((1, 2))]

    return [slope[:, :, 0].transpose(0, 1).cpu() for slope in slopes_of(model, losses, no_biases(model, len(lesson.ids)))]


def slopes_and_scores(model, lessons: Iterable[Lesson], sign: int, seed: int, step):
    """At bias 0, on the CPU: (the mean over the answers' tokens of d KL(teacher, student) / d bias, float32 (layers, d_ff); scores
    (DRAWS * answers, layers, d_ff), each the slope of a drawn answer's log-likelihood, in such a size that the sum of their outer
    products is Fisher's matrix, a token, in expectation). step() is called after each batch. Where memory is short, a batch goes
    through the model in parts, which draw the same tokens (on a GPU others)."""
    generator, size = torch.Generator(model.device).manual_seed(seed), BatchSize(ROWS)
    total, scores, tokens = 0, [], 0
    for lesson in lessons:
        state = generator.get_state()

        def slopes(rows):
            generator.set_state(state)  # after a part that was too large, too
            found = [slopes_by_row(model, part, sign, generator) for part in lesson.parts(rows)]
            return [torch.cat(of_parts) for of_parts in zip(*found)]

        slope, *drawn_ones = size.fit(slopes, len(lesson.ids))
        total, tokens = total + slope.sum(0), tokens + int(lesson.counted.sum())
        scores += drawn_ones
        step()
    return total / tokens, torch.cat(scores).div_(math.sqrt(DRAWS * tokens))


def natural_step(slope, scores, price, number: int) -> torch.Tensor:
    """The biases of one pole, float32 (layers, d_ff), 0 but for `number` neurons. See slopes_and_scores() and price_of()."""
    fisher = sum(score.square() for score in scores)
    alone = PRICE * price + RIDGE * fisher.mean()
    chosen = (slope.square() / (fisher + alone)).flatten().topk(number).indices
    parts = slope[None], (alone + (1 - OFF_DIAGONAL) * fisher)[None], scores
    g, rest, own = (part.flatten(1)[:, chosen].double() for part in parts)
    few = torch.eye(len(own)) / OFF_DIAGONAL + own / rest @ own.T  # C = diag(rest) + OFF_DIAGONAL own^T own; by Woodbury's identity
    biases = torch.zeros_like(slope)
    biases.view(-1)[chosen] = -((g - own.T @ torch.linalg.solve(few, own @ (g / rest).T)[:, 0]) / rest)[0].float()
    dear = (price * biases.square()).sum() / 2
    return biases * (UNIT / dear.clamp(min=RIDGE * price.mean() * biases.square().sum())).sqrt()


# ------------------------------------------------------------------------------------------------------------ one trait


def options(seed: int) -> dict:
    """What the trained edits of a neuron file depend on beside the file itself."""
    return {"version": TRAINING, "gain": GAIN, "share": SHARE, "answers": ANSWERS, "rows": ROWS, "top": TOP,
            "fisher": [DRAWS, OFF_DIAGONAL, RIDGE], "neutral": [PRICE, WINDOW, UNIT, lines_of("neutral_training.txt")],
            **doses.options(), "seed": seed}


def answers_to_learn(tokenizer, neurons: Neurons, pole: str) -> list[list[dict]]:
    """The answers of one pole that lie beside a neuron file, with ids, in batches of like lengths."""
    path = answers_path(neurons.folder, neurons.trait)
    own = [item for item in read_answers(path, neurons.trait)[0] if item["pole"] == pole and not declines(item["answer"])]
    items = sorted((item for item in with_ids(tokenizer, own[:ANSWERS]) if len(item["ids"]) > 1), key=lambda item: len(item["ids"]))
    if not items:
        raise UserError(f"{path}: no answers of the {pole} pole to train with")
    return [items[k:k + ROWS] for k in range(0, len(items), ROWS)]


def trained_on(model, tokenizer, bench: Bench, neurons: Neurons, pole: str, seed: int, fit, passes: int = 1) -> torch.Tensor:
    """The constants of one pole, from the answers beside a neuron file: what fit(lessons, sign, step) makes of them, in `passes`
    passes over them. lessons: an iterator, since they need not be in memory together."""
    parts, size = answers_to_learn(tokenizer, neurons, pole), BatchSize(ROWS)
    with progress(len(parts) * (1 + passes), 0, f"{neurons.trait}, {pole}: training", "batch") as bar:
        def lessons():
            for part in parts:
                made = make_lesson(model, tokenizer, bench, neurons.trait, neurons.frame, part, seed, size)
                bar.update()
                yield made

        return fit(lessons(), 1 if pole == "high" else -1, bar.update)


def both_poles(model, tokenizer, bench: Bench, neurons: Neurons, seed: int, kept: Path) -> dict:
    """{pole: its biases, float32 (layers, d_ff)}; each is written to `kept` when it is done, and read from there."""
    biases, number = {}, max(1, round(SHARE * sum(mlp.neurons for mlp in find_mlps(model))))
    with contextlib.suppress(OSError, SafetensorError), safe_open(kept, "pt") as file:
        biases = {pole: file.get_tensor(pole) for pole in file.keys()}
    todo = [pole for pole in POLES if pole not in biases or biases[pole].shape != neurons.shape]
    price = price_of(model, tokenizer, seed) if todo else None

    def fit(lessons, sign, step):
        return natural_step(*slopes_and_scores(model, lessons, sign, seed, step), price, number)

    for pole in todo:
        biases[pole] = trained_on(model, tokenizer, bench, neurons, pole, seed, fit).contiguous()
        write_atomically(kept, save(biases))
    return biases


def add_trained(model, tokenizer, bench: Bench, neurons: Neurons, seed: int = 0) -> Neurons:
    """The neuron file with trained edits of both poles, written in its place. After a kill, a pole that was done is found."""
    made_with, path = digest(options(seed), bench.fingerprint_of_training()), Path(neurons.path)
    if neurons.trained_key == made_with:
        return neurons
    if any("_neurons_patch" in vars(mlp.module) for mlp in find_mlps(model)):  # its edits would be in the teacher
        raise UserError(f"{path}: no training while the model is steered: run identify.py --train --trait {neurons.trait} first")
    asked = bench.check_validation(neurons.trait, doses.VALIDATION)  # before anything is trained
    kept = neurons.folder / f".{neurons.trait}.trained.{digest(neurons.key, made_with)}.safetensors"
    with resumable(), only_run(kept.with_suffix(".lock"), f"{path}: another run trains its edits, this one waits"):
        if (neurons := Neurons.load(path)).trained_key == made_with:
            return neurons
        with enough_memory(NO_ROOM):
            biases = both_poles(model, tokenizer, bench, neurons, seed, kept)
            tensors = {"dose": doses.levels(model, tokenizer, bench, neurons,
                                            lambda pole, by: Profile.dense(bias=by * biases[pole]))}
        for pole, moved in zip(POLES, tensors["dose"][..., 1].amax(1)):
            place = biases[pole].nonzero()
            tensors |= {f"{pole}_place": place.int(), f"{pole}_bias": biases[pole][place[:, 0], place[:, 1]]}
            if moved <= 0:
                say(f"{path}: the trained edits of the {pole} pole moved no answers to it, at any strength")
        meta = {**neurons.meta, "trained": made_with, "training": TRAINING, "validation": [*map(digest, asked)]}
        neurons = Neurons({**neurons.tensors, **tensors}, meta, str(path))
        neurons.save_over()
        kept.unlink(missing_ok=True)
    return neurons
