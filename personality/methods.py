"""From neurons to edits: NPTI, DPN-LE, activation addition, the composition of several traits; whole characters."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import POLES, TRAITS
from .frame import Frame, declines
from .mlp import decoder_of, layers_of
from .model import BatchSize, answer_inputs, shown_name, with_ids
from .neurons import NeuronFolder, Neurons, answers_path
from .questions import read_answers
from .steer import Profile, hidden_states, no_edits
from .store import read_toml
from .terminal import METHODS, SUPPRESS, UserError, say


# --------------------------------------------------------------------------------------------------------------- NPTI


def strength(delta, p95):
    """What a neuron is raised by at alpha 1: p95 * f(delta), f(delta) = 1 / (1 + exp(-10 (delta - 0.15))) (NPTI, section 3.3)."""
    return p95 * torch.sigmoid(10 * (delta - 0.15))


def npti_edits(neurons, alpha: float, *limits) -> list[tuple]:
    """NPTI's two sets of edits, (layer, index, cap, shift) each: neurons of the opposite pole are capped at 0, those of the
    target pole raised by alpha times their strength (section 3.3). limits: min_delta and min_neurons of Neurons.select."""
    if not math.isfinite(alpha):
        raise UserError(f"alpha: expected a finite number, got {alpha}")
    if alpha == 0:
        return []
    target, opposite = POLES if alpha > 0 else POLES[::-1]
    layer, index, delta, _ = neurons.select(opposite, *limits)
    capped = layer, index, torch.zeros_like(delta), torch.zeros_like(delta)
    layer, index, delta, p95 = neurons.select(target, *limits)
    return [capped, (layer, index, torch.full_like(delta, math.inf), abs(alpha) * strength(delta, p95))]


def npti(neurons, alpha: float, min_delta: float = 0.1, min_neurons: int | None = None) -> Profile:
    """The profile of one trait: alpha > 0 for its high pole, alpha < 0 for its low one, 0 for no edit at all."""
    return Profile.of(npti_edits(neurons, alpha, min_delta, min_neurons), f"{neurons.trait} {alpha:+g}")


def pull(neurons, sign: float, *limits):
    """What NPTI does at alpha 1 (or -1) to every neuron for one trait, as one signed number, float64 (layers, d_ff): for one of
    the target pole, what it is raised by; for one of the opposite pole, which is capped, minus what that pole would raise it by."""
    result = torch.zeros(neurons.shape, dtype=torch.float64)
    for pole, direction in zip(POLES if sign > 0 else POLES[::-1], (1, -1)):
        layer, index, delta, p95 = neurons.select(pole, *limits)
        result[layer, index] = direction * strength(delta.double(), p95.double())
    return result


def in_order(parts: list[tuple]) -> list[tuple]:
    """Those (neurons, alpha) that have a strength, in the traits' order: so that no order of them shows in the last bit."""
    return sorted(((neurons, alpha) for neurons, alpha in parts if alpha), key=lambda part: TRAITS.index(part[0].trait))


def composed(parts: list[tuple], min_delta: float = 0.1, min_neurons: int | None = None, name: str = "") -> Profile:
    """The profile of several traits at once, from (neurons, alpha) each, in any order. One trait alone is npti().

    Neurons of different traits overlap (E+ with N-, say), so edits that are just added drag one trait along with another, and
    cap a neuron for one trait that they raise for the other. Here instead:
    1. To first order, a trait moves by the projection of the whole edit on its own pull (see there). So the strengths b are
       those at which each trait's projection is what it would be alone: G b = diag(G) |alpha|, where G holds the pulls' inner
       products at alpha 1. Traits that help each other are weakened, those that fight strengthened, from 0 to 2 |alpha|.
    2. Each neuron then has one edit, by the sum of its pulls: above 0 it is raised by it, below 0 it is capped at 0.
    """
    parts = in_order(parts)
    if len(parts) < 2:
        return replace(npti(*parts[0], min_delta, min_neurons) if parts else Profile.empty(), name=name)
    units = torch.stack([pull(neurons, alpha, min_delta, min_neurons).flatten() for neurons, alpha in parts])
    wanted = torch.tensor([abs(alpha) for _, alpha in parts], dtype=torch.float64)
    gram, strengths = units @ units.T, wanted.clone()
    for _ in range(500):  # coordinate descent on b G b / 2 - b diag(G) |alpha| within the bounds
        for k, own in enumerate(gram.diagonal().clamp(min=1e-12)):
            strengths[k] = (wanted[k] + strengths[k] - gram[k] @ strengths / own).clamp(0, 2 * wanted[k])
    total = (strengths[:, None] * units).sum(0).view(parts[0][0].shape)
    return Profile.dense(name, cap=torch.where(total < 0, 0.0, math.inf), shift=total.clamp(min=0))


# ------------------------------------------------------------------------------------------------------- trained edits

DEAREST = 1.3  # times the unedited perplexity: the most that level 1 costs, and that several traits' levels together should cost
LEVELS = 2  # version of how the levels of several traits become edits: one more where affordable() or trained() change


def with_none(dose) -> np.ndarray:
    """A dose response with the row of no edits above it: float64 (1 + doses, 4 or, of older files, 3)."""
    return np.concatenate([[[0.0, 0.0, *np.ones(dose.shape[1] - 2)]], dose.double().numpy()])


def multiple_at(dose, level: float) -> float:
    """By how much a pole's trained biases are multiplied at a level, 0 to 1 or beyond. dose (doses, 4): a multiple, how far the
    answers then move to the pole, by what factor their perplexity grows, and by what at most (see doses.dose_response();
    older files lack that). Level 1 is the largest multiple that is at most as dear as DEAREST; between the doses, what is measured
    is taken as linear; and where the answers move no further by then, the smallest that moves them as far. A level below 1 is the
    smallest multiple that moves the answers by that share of what level 1 does; beyond 1, multiples go on in proportion."""
    dose = with_none(dose)
    multiple, moved, dearer = dose[:, 0], np.maximum.accumulate(dose[:, 1]), np.maximum.accumulate(np.log(dose[:, -1]))
    most = float(np.interp(math.log(DEAREST), dearer, multiple)) if dearer[-1] > math.log(DEAREST) else multiple[-1]
    full = float(np.interp(most, multiple, moved))
    if full <= 0:
        return level * most
    fine = np.linspace(0, most, 1001)
    return max(level, 1.0) * float(fine[np.argmax(np.interp(fine, multiple, moved) >= min(level, 1.0) * full)])


def price_at(dose, multiple: float) -> float:
    """What a multiple of a pole's biases is expected to add to the answers' perplexity, in nats a token; beyond the doses in
    proportion. dose (doses, 3 or 4): as above."""
    dose = with_none(dose)
    return float(np.interp(multiple, dose[:, 0], np.log(dose[:, 2]))) * max(1.0, multiple / dose[-1, 0])


def at_levels(parts: list[tuple]) -> list[tuple]:
    """Of those (neurons, level) that have a level, in the traits' order: (neurons, pole, that pole's dose response, multiple)."""
    poles = [(neurons, int(level < 0), abs(level)) for neurons, level in in_order(parts)]
    return [(neurons, POLES[pole], neurons.dose[pole], multiple_at(neurons.dose[pole], level)) for neurons, pole, level in poles]


def affordable(parts: list[tuple]) -> float:
    """A share, 0 to 1, of the trained biases of several traits, (neurons, level) each, at which they are expected to cost no more
    together than DEAREST, or than the dearest of them alone; in all layers, whichever of them are edited then. Prices add up,
    as if traits were independent (so much was measured, or less: tests/MEASURED.md, Whole characters)."""
    asked = at_levels(parts)

    def prices(share):  # what makes answers likelier pays for no other trait
        return [max(0.0, price_at(dose, share * multiple)) for _, _, dose, multiple in asked]

    limit = max([math.log(DEAREST), *prices(1.0)])
    if sum(prices(1.0)) <= limit:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(prices(middle)) <= limit else (low, middle)
    return low


def trained(parts: list[tuple], name: str = "") -> Profile:
    """The trained edits of several traits, from (neurons, level) each; a level below 0 is the low pole's. They add up, at the share
    that is affordable()."""
    for neurons, level in parts:
        if "dose" not in getattr(neurons, "tensors", {}):
            raise UserError(f"{getattr(neurons, 'path', '') or neurons.trait}: no trained edits in it: python identify.py --train "
                            "makes them")
        if not math.isfinite(level):
            raise UserError(f"level: expected a finite number, got {level}")
    total, share = torch.zeros(parts[0][0].shape if parts else (0, 0), dtype=torch.float64), affordable(parts)
    for neurons, pole, _, multiple in at_levels(parts):
        place, bias = neurons.tensors[f"{pole}_place"].long(), neurons.tensors[f"{pole}_bias"].double()
        total[place[:, 0], place[:, 1]] += share * multiple * bias
    held = f", at {share:.0%} of that" if name and share < 0.995 else ""
    return Profile.dense(name + held, bias=total)


# -------------------------------------------------------------------------------------------------- the other methods


def dpn_le(parts: list[tuple], weighted: bool = False, min_effect: float = 0.1, name: str = "") -> Profile:
    """DPN-LE's selection and edit (ACL 2026), from (neurons, alpha) each: of the layers after the first three eighths, the
    neurons whose difference s of the mean product between the poles is over its layer's 0.995 quantile and whose effect size
    (Cohen's d) is at least min_effect; alpha * s is added to the product, weighted 0.75 to 1 by the rank of |d|.

    The release takes s and d at the last prompt token, with d >= 0.8 or 0.3; neuron files hold them over the answers' tokens,
    whose spread is wider: hence the lower min_effect. Several traits add up."""
    total = 0
    for neurons, alpha in in_order(parts):
        if not isinstance(neurons, Neurons):
            raise UserError("--method dpn-le needs neuron files of identify.py: the released ones hold no means")
        difference = (neurons.mean[0] - neurons.mean[1]).double()
        effect = (difference / ((neurons.variance[0] + neurons.variance[1]).double() / 2).sqrt().clamp(min=1e-12)).abs()
        high = torch.nanquantile(difference.abs().masked_fill(~neurons.known, math.nan), 0.995, dim=1, keepdim=True)
        allowed = difference.abs() > high
        allowed[:round(len(allowed) * 3 / 8)] = False
        chosen = allowed & (effect >= min_effect)
        if not bool(chosen.any()):
            raise UserError(f"dpn-le: no neuron of {neurons.trait} has an effect of {min_effect} or more, so nothing would be "
                            f"edited; of those that it takes the largest is {float(torch.where(allowed, effect, 0.0).max()):.3f}")
        weight = torch.ones_like(effect)
        if weighted and int(chosen.sum()) > 1:
            rank = effect[chosen].argsort().argsort().double()
            weight[chosen] = 0.75 + 0.25 * rank / (len(rank) - 1)
        total = total + alpha * torch.where(chosen, difference * weight, 0.0)
    return Profile.dense(name, bias=total) if torch.is_tensor(total) else Profile.empty(name)


def mean_difference(model, tokenizer, path, trait: str, frame: Frame, layer: int | None = None, most: int = 64) -> dict:
    """The direction of activation addition: {layer: float32 (hidden_size)}, the mean of a layer's output over the answers'
    tokens under the high pole less that under the low one, from the first `most` answers, half of each pole, that identify.py
    wrote to path, asking in `frame`. layer: by default the one in the middle. (As CAA, Rimsky et al., arXiv 2312.06681, and
    repeng have it.)"""
    layer = len(layers_of(model)) // 2 if layer is None else layer
    table, _ = read_answers(path, trait)
    plays = [not declines(answer) for answer in table["answer"]]
    first = [[number for number, of in enumerate(table["pole"]) if of == pole and plays[number]] for pole in POLES]
    first = [numbers[:most // 2] for numbers in first]
    if not all(first):
        raise UserError(f"{path}: no answers of both poles of {trait}")
    items = with_ids(tokenizer, table.select(sorted(sum(first, []))).to_list())
    total, tokens = dict.fromkeys(POLES, 0), dict.fromkeys(POLES, 0)

    def read(batch):  # the sum over its tokens and their number, for each answer
        outputs, (inputs, counted) = [], answer_inputs(model, tokenizer, batch, frame)
        hook = layers_of(model)[layer].register_forward_hook(lambda module, args, output: outputs.append(hidden_states(output)))
        with torch.no_grad(), hook:
            decoder_of(model)(**inputs, use_cache=False)
        return [(item["pole"], hidden[mask.to(hidden.device)].double().sum(0).cpu(), int(mask.sum()))
                for item, hidden, mask in zip(batch, outputs[0], counted)]  # (tokens, hidden), (tokens)

    for pole, added, number in sum(BatchSize(16).each(read, items), []):
        total[pole], tokens[pole] = total[pole] + added, tokens[pole] + number
    return {layer: (total["high"] / tokens["high"] - total["low"] / tokens["low"]).float()}


def activation_addition(parts: list[tuple], name: str = "") -> Profile:
    """The profile that adds alpha times a mean difference to the residual stream, from (direction, alpha) each; alpha < 0 is
    the low pole. Several add up."""
    profile = Profile.empty(name)
    for direction, alpha in parts:
        for layer, vector in direction.items() if alpha else ():
            profile.residual[layer] = profile.residual.get(layer, 0) + alpha * vector
    return profile


# ---------------------------------------------------------------------------------------------------------- whole edits


def restricted(profile: Profile, layers: tuple[int, int] | None) -> Profile:
    """The part of a profile that lies in the layers from the first to the last, both counted."""
    if layers is None:
        return profile
    first, last = layers
    residual = {layer: vector for layer, vector in profile.residual.items() if first <= layer <= last}
    return replace(profile.chosen((profile.layer >= first) & (profile.layer <= last)), residual=residual)


def suppressed(profile: Profile, how: str) -> Profile:
    """The profile with its suppressed neurons (cap 0) as NPTI has them ("cap"), removed ("zero"), or left as they are ("none")."""
    if how not in SUPPRESS:
        raise UserError(f"suppress: expected {', '.join(SUPPRESS[:-1])} or {SUPPRESS[-1]}, got {how!r}")
    if how == "cap":
        return profile
    capped, value = profile.value[:, 0] == 0, profile.value.clone()
    value[capped, 0] = math.inf
    if how == "zero":
        value[capped, 1] = 0
    edited = (value != no_edits(1)).any(1)
    return replace(replace(profile, value=value).chosen(edited), residual=profile.residual)


@dataclass
class Character:
    """A whole personality: alpha by trait, and optionally the method, the layers (first and last) that are edited, the model
    it was made for, and a name."""

    strengths: dict
    method: str = "npti"
    layers: tuple | None = None
    model: str = ""
    name: str = ""

    def __post_init__(self):
        wrong = [trait for trait, own in self.strengths.items()
                 if trait not in TRAITS or not isinstance(own, (int, float)) or not math.isfinite(own)]
        if wrong or self.method not in list(METHODS):
            raise UserError(f"Character: expected a finite number for some of {', '.join(TRAITS)}, and a method of "
                            f"{', '.join(METHODS)}, got {self.strengths!r} and {self.method!r}")

    @classmethod
    def of(cls, values, where: str, method: str = "npti") -> "Character":
        """From what a profile file or a line of --questions holds: {"traits": {trait: alpha}, "method": ..., "layers": [first,
        last], "model": ..., "name": ...}, or the traits alone."""
        values = values if isinstance(values, dict) and "traits" in values else {"traits": values}
        traits, unknown = values["traits"], set(values) - {"traits", "method", "layers", "model", "name"}
        method, layers, model = values.get("method", method), values.get("layers"), values.get("model", "")
        if not isinstance(traits, dict) or not traits or not all(
                trait.lower() in TRAITS and type(alpha) in (int, float) and abs(alpha) <= 1e3 for trait, alpha in traits.items()):
            raise UserError(f"{where}: expected some of {', '.join(TRAITS)} with a number each, of at most 1000, got "
                            f"{repr(traits)[:200]}")
        strengths = {trait.lower(): float(alpha) for trait, alpha in traits.items()}
        if len(strengths) < len(traits):
            raise UserError(f"{where}: a trait stands twice in {traits!r}")
        if unknown:
            raise UserError(f"{where}: expected traits, method, layers, model and name, got {repr(sorted(unknown))[:200]}")
        if method not in list(METHODS):
            raise UserError(f"{where}: method: expected one of {', '.join(METHODS)}, got {repr(method)[:200]}")
        if layers is not None and not (isinstance(layers, list) and [type(layer) for layer in layers] == [int, int]
                                       and 0 <= layers[0] <= layers[1] < 1 << 31):
            raise UserError(f"{where}: layers: expected [first, last], got {repr(layers)[:200]}")
        if not isinstance(model, str):
            raise UserError(f"{where}: model: expected a name, got {model!r}")
        return cls(strengths, method, layers and tuple(layers), model, str(values.get("name", "")))

    @classmethod
    def read(cls, path: str, method: str = "npti") -> "Character":
        """From a profile file, in TOML; method: where it names none."""
        return cls.of(read_toml(path, "--profile "), path, method)

    def opposite(self) -> "Character":
        return replace(self, strengths={trait: -alpha for trait, alpha in self.strengths.items()}, name="")

    def describe(self) -> str:
        listed = ", ".join(f"{trait} {self.strengths[trait]:+g}" for trait in TRAITS if trait in self.strengths) or "no edit"
        how = {"npti": "", "trained": " (levels)"}.get(self.method, f" ({self.method})")
        return (f"{self.name}: " if self.name else "") + listed + how


class Profiles:
    """The profiles that a folder of neurons makes of characters. limits: min_delta and min_neurons of Neurons.select; suppress:
    what becomes of the opposite pole's neurons."""

    def __init__(self, model, tokenizer, neurons: NeuronFolder, limits: tuple = (0.1, None), suppress: str = "cap"):
        self.model, self.tokenizer, self.neurons, self.limits, self.suppress = model, tokenizer, neurons, limits, suppress
        self.directions = {}

    def direction(self, trait: str) -> dict:
        """A trait's mean difference, for activation addition."""
        if trait not in self.directions:
            if self.neurons.released:
                raise UserError("--method activation needs the answers that identify.py keeps beside its neuron files")
            frame = self.neurons[trait].frame  # makes the answers, where they are not there yet
            path = answers_path(self.neurons.folder, trait)
            say(f"{trait}: the mean difference for activation addition, from {path}")
            self.directions[trait] = mean_difference(self.model, self.tokenizer, path, trait, frame)
        return self.directions[trait]

    def of(self, character: Character) -> Profile:
        source, name, meant = getattr(self.model, "source", None), character.describe(), character.model
        if meant and source and meant not in (source, here := shown_name(self.model), source.rpartition("/")[2]):
            raise UserError(f"the profile {character.name or name} is for {meant}, the model is {here}")
        strengths = [(trait, character.strengths[trait]) for trait in TRAITS if character.strengths.get(trait)]
        if character.method == "activation":
            profile = activation_addition([(self.direction(trait), alpha) for trait, alpha in strengths], name)
        elif character.method == "trained":
            profile = trained([(self.neurons.trained(trait), level) for trait, level in strengths], name)
        else:
            parts = [(self.neurons[trait], alpha) for trait, alpha in strengths]
            profile = (composed(parts, *self.limits, name) if character.method == "npti" else
                       dpn_le(parts, character.method == "dpn-le-weighted", name=name))
        inside = suppressed(restricted(profile, character.layers), self.suppress)
        if (len(profile) or profile.residual) and not (len(inside) or inside.residual):
            raise UserError(f"{name}: layers {list(character.layers or ())} hold nothing of what would be edited")
        if character.layers and character.layers[1] >= len(layers_of(self.model)):
            raise UserError(f"{name}: layers {list(character.layers)}: the model's are 0 to {len(layers_of(self.model)) - 1}")
        return inside
