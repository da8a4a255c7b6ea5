"""Let a language model write in a personality, by editing the neurons that identify.py found.

    python induce.py --trait extraversion --alpha 2
    python induce.py --trait neuroticism --alpha -1.5 --trait openness --alpha 1 --chat
    python induce.py --profile ada.toml --questions FILE --out FILE
    python induce.py --list

Raises the neurons of the pole that is asked for and suppresses those of the other one while the model writes: no prompt,
no training, no changed weights, and no time (the edit rides in the op that computes the MLP). A negative alpha is the low
pole. Where there is no neuron file yet, it is made first. The method is NPTI (ICLR 2025, arXiv 2410.12327), section 3.3.

From Python: `with steer(model, npti(Neurons.load(path, model), alpha=2)): model.generate(...)`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from identify import (NEXT_QUESTION, POLES, TRAITS, Answers, Endpoint, Flags, Neurons, NoReply, Rows, UserError, answer, answer_text,
                      answered_inputs, ask, built_in_bench, chat, check_trait, digest, ending, find_mlps, fingerprint, identify,
                      load_model, model_arguments, neuron_path, op, out_of_memory, patched, positive, published, resumable, say, script,
                      token_ids)

QUESTIONS = (
    "What do you like to do with your friends?",
    "You are invited to a big party. How do you feel about it?",
    "A new colleague joins your team. What do you do?",
    "How would you like to spend a free Friday evening?",
)
REPETITION_PENALTY = 1.15  # the paper's, when it tests
METHODS = ("npti", "dpn-le", "dpn-le-weighted", "activation")
OWN_SCALE = {"dpn-le": "alpha times the mean difference of a neuron's product", "activation": "alpha times the mean difference of the "
             "residual stream", "dpn-le-weighted": "alpha times 0.75 to 1 of the mean difference of a neuron's product"}

# --------------------------------------------------------------------------------------------------------- profiles


def no_edits(number: int):
    """float32 (number, 4): cap, scale, shift and bias that change nothing."""
    import torch

    return torch.tensor([math.inf, 1.0, 0.0, 0.0]).repeat(number, 1)


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
        value = no_edits(len(keys))
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


def pull(neurons, alpha: float, min_delta: float = 0.1, min_neurons: int | None = None):
    """What NPTI does to every neuron for one trait, as one signed number, float64 (layers, d_ff): what a neuron of the target
    pole is raised by, and for one of the opposite pole, which is capped, less what the opposite pole would raise it by."""
    import torch

    result = torch.zeros(neurons.shape, dtype=torch.float64)
    for pole, sign in zip(POLES if alpha > 0 else POLES[::-1], (1, -1)):
        layer, index, delta, p95 = neurons.select(pole, min_delta, min_neurons)
        result[layer, index] = sign * abs(alpha) * p95.double() * torch.sigmoid(10 * (delta.double() - 0.15))
    return result


def composed(parts: list[tuple], min_delta: float = 0.1, min_neurons: int | None = None, name: str = "") -> Profile:
    """The profile of several traits at once, from (neurons, alpha) each, in any order. One trait alone is npti().

    Neurons of different traits overlap (E+ with N-, say), so edits that are just added drag one trait along with another, and
    cap a neuron for one trait that they raise for the other. Here instead:
    1. To first order, a trait moves by the projection of the whole edit on its own pull (see there). So the strengths b are
       those at which each trait's projection is what it would be alone: G b = diag(G) |alpha|, where G holds the pulls' inner
       products at alpha 1. Traits that help each other are weakened, those that fight strengthened, from 0 to 2 |alpha|.
    2. Each neuron then has one edit, by the sum of its pulls: above 0 it is raised by it, below 0 it is capped at 0.
    """
    import torch

    parts = sorted(((neurons, alpha) for neurons, alpha in parts if alpha), key=lambda part: TRAITS.index(part[0].meta["trait"]))
    if len(parts) < 2:
        profile = npti(*parts[0], min_delta, min_neurons) if parts else Profile.of([])
        profile.name = name
        return profile
    units = torch.stack([pull(neurons, math.copysign(1, alpha), min_delta, min_neurons).flatten() for neurons, alpha in parts])
    wanted = torch.tensor([abs(alpha) for _, alpha in parts], dtype=torch.float64)
    gram, strengths = units @ units.T, wanted.clone()
    for _ in range(500):  # coordinate descent on b G b / 2 - b diag(G) |alpha| within the bounds
        for k, own in enumerate(gram.diagonal().clamp(min=1e-12)):
            strengths[k] = (wanted[k] + strengths[k] - gram[k] @ strengths / own).clamp(0, 2 * wanted[k])
    total = (strengths[:, None] * units).sum(0).view(parts[0][0].shape)
    layer, index = (total != 0).nonzero(as_tuple=True)
    value = no_edits(len(layer))
    value[:, 0] = torch.where(total[layer, index] < 0, 0.0, math.inf)
    value[:, 2] = total[layer, index].clamp(min=0).float()
    return Profile(layer, index, value, name)


def dpn_le(parts: list[tuple], weighted: bool = False, min_effect: float = 0.1, name: str = "") -> Profile:
    """DPN-LE's selection and edit (ACL 2026), from (neurons, alpha) each: of the layers behind the first three eighths, the
    neurons whose difference s of the mean product between the poles is over its layer's 0.995 quantile and whose effect size
    (Cohen's d) is at least min_effect; alpha * s is added to the product, weighted 0.75 to 1 by the rank of |d|.

    The release takes s and d at the last prompt token, with d >= 0.8 or 0.3; neuron files hold them over the answers' tokens,
    whose spread is wider: hence the lower min_effect. Alpha has a scale of its own. Several traits add up."""
    import torch

    total = 0
    for neurons, alpha in sorted(parts, key=lambda part: TRAITS.index(part[0].meta["trait"])):
        if not hasattr(neurons, "tensors"):
            raise UserError("--method dpn-le needs neuron files of identify.py: the released ones hold no means")
        difference = (neurons.mean[0] - neurons.mean[1]).double()
        effect = (difference / ((neurons.variance[0] + neurons.variance[1]).double() / 2).sqrt().clamp(min=1e-12)).abs()
        high = torch.quantile(difference.abs(), 0.995, dim=1, keepdim=True)
        chosen = (difference.abs() > high) & (effect >= min_effect)
        chosen[:round(len(chosen) * 3 / 8)] = False
        if alpha and not bool(chosen.any()):
            raise UserError(f"dpn-le: no neuron of {neurons.meta['trait']} has an effect of {min_effect} or more, so nothing would be "
                            f"edited; the largest is {float(effect.max()):.3f}")
        weight = torch.ones_like(effect)
        if weighted and int(chosen.sum()) > 1:
            rank = effect[chosen].argsort().argsort().double()
            weight[chosen] = 0.75 + 0.25 * rank / (len(rank) - 1)
        total = total + alpha * torch.where(chosen, difference * weight, 0.0)
    layer, index = (total != 0).nonzero(as_tuple=True) if parts else (torch.empty(0, dtype=torch.long),) * 2
    value = no_edits(len(layer))
    if len(layer):
        value[:, 3] = total[layer, index].float()
    return Profile(layer, index, value, name)


class Released:
    """NPTI's released neuron files, DIR/<Trait>_dict.json (high pole) and DIR/<Trait>_reversed_dict.json (low): an object from
    layer to a list of [layer, index, delta, prob, p95]. What stands there was selected already."""

    def __init__(self, folder: str, trait: str, model):
        import torch

        mlps = find_mlps(model)
        self.shape, self.meta, self.poles = (len(mlps), mlps[0].width), {"trait": trait}, {}
        for pole, key in published(trait).items():
            path = Path(folder) / f"{key}_dict.json"
            try:
                rows = [row for rows in json.loads(path.read_bytes()).values() for row in rows]
                table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from error
            except (ValueError, TypeError, AttributeError, RuntimeError) as error:
                raise UserError(f"{path}: expected an object from layer to lists of [layer, index, delta, prob, p95]: {error}") from error
            where = table[:, :2].long()
            for k, (what, most) in enumerate(zip(("layer", "neuron"), self.shape)):
                wrong = where[(where[:, k] < 0) | (where[:, k] >= most), k]
                if len(wrong):
                    raise UserError(f"{path}: {what} {int(wrong[0])} of a model of {most} {('layers', 'neurons a layer')[k]} "
                                    f"({getattr(model, 'source', type(model).__name__)}): it was made for another model")
            if len(where.unique(dim=0)) < len(where):
                raise UserError(f"{path}: a neuron stands twice in it")
            order = torch.argsort(table[:, 2], descending=True, stable=True)
            self.poles[pole] = (where[order, 0], where[order, 1], table[order, 2].float(), table[order, 4].float())

    def select(self, pole: str, min_delta: float = 0.1, min_neurons: int | None = None):
        """All of a pole's neurons, as Neurons.select gives them."""
        return self.poles[pole]


def restricted(profile: Profile, layers: tuple[int, int] | None) -> Profile:
    """The part of a profile that lies in the layers from the first to the last, both counted."""
    if layers is None:
        return profile
    inside = (profile.layer >= layers[0]) & (profile.layer <= layers[1])
    return Profile(profile.layer[inside], profile.index[inside], profile.value[inside], profile.name,
                   {layer: vector for layer, vector in profile.residual.items() if layers[0] <= layer <= layers[1]})


def suppressed(profile: Profile, how: str) -> Profile:
    """The profile with its suppressed neurons (cap 0) as NPTI has them ("cap"), removed ("zero"), or left as they are ("none")."""
    if how == "cap":
        return profile
    value, capped = profile.value.clone(), profile.value[:, 0] == 0
    value[capped, 0] = math.inf
    if how == "zero":
        value[capped, 1] = 0
        capped[:] = False
    return Profile(profile.layer[~capped], profile.index[~capped], value[~capped], profile.name, profile.residual)


def mean_difference(model, tokenizer, path, trait: str, layer: int | None = None, most: int = 64):
    """The direction of activation addition: {layer: float32 (hidden_size)}, the mean of a layer's output over the answers'
    tokens under the high pole less that under the low one, from the first `most` answers, half of each pole, that identify.py
    wrote to path. layer: by default the one in the middle. (CAA, Rimsky et al., arXiv 2312.06681, adds such a difference; repeng likewise.)"""
    import torch

    mlps = find_mlps(model)
    layer = len(mlps) // 2 if layer is None else layer
    answers = Answers(path, trait, tokenizer)
    high, low = ([number for number, pole in enumerate(answers.poles) if pole == k][:most // 2] for k in range(len(POLES)))
    items = answers.at(sorted(high + low))
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


def activation_addition(parts: list[tuple], name: str = "") -> Profile:
    """The profile that adds alpha times a mean difference to the residual stream, from (direction, alpha) each; alpha < 0 is
    the low pole. Several add up."""
    profile = Profile.of([], name)
    for direction, alpha in parts:
        for layer, vector in direction.items() if alpha else ():
            profile.residual[layer] = profile.residual.get(layer, 0) + alpha * vector
    return profile


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


class Residual:
    """Adds the profiles' residual vectors to the outputs of their layers, for the tokens that rows tells."""

    def __init__(self, mlps, rows: Rows):
        self.mlps, self.rows, self.hooks = mlps, rows, []

    def fill(self, profiles: list[Profile]) -> None:
        import torch

        self.remove()
        tables = {}
        for number, profile in enumerate(profiles, 1):
            for layer, vector in profile.residual.items():
                if not 0 <= layer < len(self.mlps):
                    raise UserError(f"profile {profile.name!r}: layer {layer} of a model of {len(self.mlps)} layers")
                if layer not in tables:
                    weight = self.mlps[layer].gate.weight
                    tables[layer] = torch.zeros((len(profiles) + 1, len(vector)), dtype=weight.dtype, device=weight.device)
                tables[layer][number] = vector
        for layer, table in tables.items():
            def add(module, args, output, table=table):
                if self.rows.tokens is None:
                    return output
                hidden = first_of(output)
                hidden = hidden + table[self.rows.tokens.long()].view(hidden.shape)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            self.hooks.append(self.mlps[layer].layer.register_forward_hook(add))

    def remove(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()


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

    def __init__(self, tables: Tables, residual: Residual, rows: Rows):
        self.tables, self.residual, self.rows = tables, residual, rows

    def update(self, profiles) -> None:
        """Other profiles, as many as before. Edits of neurons swap under a captured graph too; residual vectors don't."""
        profiles = [profiles] if isinstance(profiles, Profile) else list(profiles)
        self.tables.fill(profiles)
        self.residual.fill(profiles)

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
    rows = Rows(rows, len(profiles), 0, where)
    steering = Steering(tables, Residual(mlps, rows), rows)
    generator = torch.Generator().manual_seed(seed)
    with patched(model, "steering", (steering.rows, tables.layers)) as patch:
        if keep < 1:
            redraw = lambda: tables.thin(keep, generator)  # noqa: E731
            redraw()
            patch.before_decode.append(redraw)
        try:
            steering.residual.fill(profiles)
            yield steering
        finally:
            steering.residual.remove()
            if keep < 1:
                patch.before_decode.remove(redraw)


# ------------------------------------------------------------------------------------------------------ personality


@dataclass
class Character:
    """A whole personality: alpha by trait, and optionally the method, the layers (first and last) that are edited, the model
    it was made for, and a name."""

    strengths: dict
    method: str = "npti"
    layers: tuple | None = None
    model: str | None = None
    name: str = ""

    @classmethod
    def of(cls, values, where: str, method: str = "npti") -> "Character":
        """From what a profile file or a line of --questions holds: {"traits": {trait: alpha}, "method": ..., "layers": [first,
        last], "model": ..., "name": ...}, or the traits alone."""
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected traits and their alphas, got {values!r}")
        values = dict(values) if "traits" in values else {"traits": values}
        traits = values.pop("traits")
        number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e3  # noqa: E731
        if not isinstance(traits, dict) or not traits or not all(trait.lower() in TRAITS and number(x) for trait, x in traits.items()):
            raise UserError(f"{where}: expected some of {', '.join(TRAITS)} with a number each, got {traits!r}")
        unknown = set(values) - {"method", "layers", "model", "name"}
        if unknown:
            raise UserError(f"{where}: expected traits, method, layers, model and name, got {sorted(unknown)}")
        method, layers = values.get("method", method), values.get("layers")
        if method not in METHODS:
            raise UserError(f"{where}: method: expected one of {', '.join(METHODS)}, got {method!r}")
        if layers is not None and not (isinstance(layers, list) and len(layers) == 2 and all(isinstance(x, int) for x in layers)
                                       and 0 <= layers[0] <= layers[1]):
            raise UserError(f"{where}: layers: expected [first, last], got {layers!r}")
        return cls({trait.lower(): float(x) for trait, x in traits.items()}, method, tuple(layers) if layers else None,
                   values.get("model"), str(values.get("name", "")))

    @classmethod
    def read(cls, path: str, method: str = "npti") -> "Character":
        """From a profile file, in TOML; method: where it names none."""
        try:
            import tomllib
        except ImportError:  # Python 3.10
            import tomli as tomllib

        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--profile {path}: {error.strerror}") from error
        except ValueError as error:  # of UTF-8 or of TOML
            raise UserError(f"--profile {path}: not TOML: {error}") from error
        return cls.of(values, path, method)

    def describe(self, sign: float = 1) -> str:
        listed = ", ".join(f"{trait} {sign * self.strengths[trait]:+g}" for trait in TRAITS if trait in self.strengths) or "no edit"
        return (f"{self.name}: " if self.name and sign > 0 else "") + listed + ("" if self.method == "npti" else f" ({self.method})")


class NeuronFolder:
    """A folder of neuron files, each read or made when it is first asked for, and the profiles that they make. folder: of
    identify.py, or npti:DIR of the released ones. min_delta, min_neurons: see Neurons.select; options: of identify()."""

    def __init__(self, model, tokenizer, folder: str, min_delta: float = 0.1, min_neurons: int | None = None, suppress: str = "cap",
                 **options):
        self.model, self.tokenizer, self.folder, self.options = model, tokenizer, folder, options
        self.limits, self.suppress = (min_delta, min_neurons), suppress
        self.released = folder.removeprefix("npti:") if folder.startswith("npti:") else None
        self.files, self.directions = {}, {}

    def neurons(self, trait: str):
        """A trait's neuron file for this model, made now if it is not there."""
        path = neuron_path(self.folder, trait)
        if trait in self.files:
            pass
        elif self.released:
            self.files[trait] = Released(self.released, trait, self.model)
            say(f"{self.released}: {trait}: these files don't say which model they were made with: nothing vouches for it but their "
                "shape")
        else:
            if not path.exists():
                say(f"{path}: no neuron file yet, so the {trait} neurons are identified first")
                identify(self.model, self.tokenizer, trait, out=self.folder, **self.options)
            self.files[trait] = Neurons.load(path, self.model)
        return self.files[trait]

    def direction(self, trait: str) -> dict:
        """A trait's mean difference, for activation addition."""
        if trait not in self.directions:
            if self.released:
                raise UserError("--method activation needs the answers that identify.py keeps beside its neuron files")
            self.neurons(trait)  # makes the answers, where they are not there yet
            path = neuron_path(self.folder, trait).with_suffix(".answers.jsonl")
            say(f"{trait}: the mean difference for activation addition, from {path}")
            self.directions[trait] = mean_difference(self.model, self.tokenizer, path, trait)
        return self.directions[trait]

    def profile(self, character: Character, sign: float = 1) -> Profile:
        source = getattr(self.model, "source", None)
        if character.model and source and character.model not in (source, Path(source).name):
            raise UserError(f"the profile {character.name or character.describe()} is for {character.model}, the model is {source}")
        strengths = [(trait, sign * character.strengths[trait]) for trait in TRAITS if character.strengths.get(trait)]
        name = character.describe(sign)
        if character.method == "activation":
            made = activation_addition([(self.direction(trait), alpha) for trait, alpha in strengths], name)
        elif character.method.startswith("dpn-le"):
            made = dpn_le([(self.neurons(trait), alpha) for trait, alpha in strengths], character.method == "dpn-le-weighted", name=name)
        else:
            made = composed([(self.neurons(trait), alpha) for trait, alpha in strengths], *self.limits, name)
        inside = suppressed(restricted(made, character.layers), self.suppress)
        if (len(made) or made.residual) and not (len(inside) or inside.residual):
            raise UserError(f"{name}: layers {list(character.layers)} hold nothing of what would be edited")
        return inside


# ------------------------------------------------------------------------------------------------- a plain checkpoint

BAKED = ("llama", "mistral", "qwen2")  # what can be written as a Llama checkpoint, whose MLPs can have biases
SUPPRESS = ("cap", "zero", "none")
GATE_BIAS = 2.0  # of an added neuron: exact in every dtype; its activation is divided out of the down column
PROBES = ("What do you like to do with your friends?", "Tell me about a book.", "How do you cook rice?", "Describe your day.",
          "What makes you angry?", "How do you spend a rainy Sunday?", "What do you think of your neighbours?", "Plan a trip with me.")


class Baking:
    """A profile folded into the weights: a Llama checkpoint with mlp_bias that plain transformers, and any engine, runs.

    A raised neuron i becomes one more neuron, with a gate row of 0, gate bias b, up row U_i and down column D_i * shift / act(b):
    it adds shift * (U_i x) D_i, exactly what the edit adds. A removed neuron's weights are 0, and its place is used first. What is
    added to products or to the residual stream (DPN-LE, activation addition) is constant, and goes into the bias of down. All layers
    have one width, a multiple of 256. rank: keep the best rank-R part only of the sum of a layer's raises, a linear map."""

    def __init__(self, model, profile: Profile, rank: int | None = None):
        import torch

        self.model, self.profile, self.rank, self.mlps = model, profile, rank, find_mlps(model)
        cap = profile.value[:, 0]
        if not bool(torch.isinf(cap).all()):
            raise UserError(f"--save: a cap of {float(cap[~torch.isinf(cap)][0]):g} can't be folded into weights: --suppress zero or none")
        if self.mlps[0].up is None or self.mlps[0].up is self.mlps[0].gate or model.config.model_type not in BAKED:
            raise UserError(f"--save: {model.config.model_type} can't be baked: expected one of {', '.join(BAKED)}")
        window = getattr(model.config, "sliding_window", None)
        if window and (model.config.model_type == "mistral" or getattr(model.config, "use_sliding_window", False)):
            raise UserError(f"--save: {model.config.model_type} with a sliding window of {window}: a Llama checkpoint has none")
        added, self.exact = [], True
        for layer in range(len(self.mlps)):
            value = profile.value[profile.layer == layer]
            raised, free = int((value[:, 2] != 0).sum()), int((value[:, 1] == 0).sum())
            added.append(min(raised, rank or raised) - free)
            self.exact &= raised <= (rank or raised)
        width = self.mlps[0].width
        self.width = width if max(added) <= 0 else -(-(width + max(added)) // 256) * 256

    def layer(self, number: int) -> dict:
        """The tensors of a layer's MLP, by their names in it."""
        import torch

        mlp, mine = self.mlps[number], self.profile.layer == number
        index, value = self.profile.index[mine].to(mlp.gate.weight.device), self.profile.value[mine].to(mlp.gate.weight.device)
        dtype, device = mlp.gate.weight.dtype, mlp.gate.weight.device
        width, hidden = mlp.gate.weight.shape
        shapes = {"gate": (self.width, hidden), "up": (self.width, hidden), "down": (hidden, self.width)}
        weight = {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
        bias = {name: torch.zeros(shape[0], device=device) for name, shape in shapes.items()}
        for name, part in (("gate", mlp.gate), ("up", mlp.up), ("down", mlp.down)):
            old = part.weight.detach()
            weight[name][:old.shape[0], :old.shape[1]] = old
            if part.bias is not None:
                bias[name][:len(part.bias)] = part.bias.detach()
        up, down, up_bias = weight["up"][index].float(), weight["down"][:, index].T.float(), bias["up"][index]  # of the edited neurons
        scale, shift, constant = value[:, 1], value[:, 2], value[:, 3]
        bias["down"] += constant @ down
        if number in self.profile.residual:
            bias["down"] += self.profile.residual[number].to(device, torch.float32)
        weight["down"][:, index] *= scale.to(dtype)
        free = index[scale == 0]
        for tensor in (weight["gate"], weight["up"], bias["gate"], bias["up"]):
            tensor[free] = 0
        raised = shift != 0
        up, down, up_bias = up[raised], down[raised] * shift[raised, None], up_bias[raised]
        if self.rank and self.rank < len(up):
            if bool(up_bias.any()):
                raise UserError("--rank: this model's up projection has a bias, which a map of lower rank can't carry")
            q, r = torch.linalg.qr(down.T)  # down.T @ up is (hidden, hidden) of rank len(up) at most
            u, s, v = torch.linalg.svd(r @ up, full_matrices=False)
            up, down, up_bias = v[:self.rank], (q @ u[:, :self.rank] * s[:self.rank]).T, up_bias[:self.rank]
        places = torch.cat([free, torch.arange(width, self.width, device=device)])[:len(up)]
        # the activation as the model will compute it, in its own dtype: so its rounding is divided out too
        act = mlp.act_module(torch.tensor([GATE_BIAS], device=device, dtype=dtype)).float()
        weight["up"][places], weight["down"].T[places] = up.to(dtype), (down / act).to(dtype)
        bias["gate"][places], bias["up"][places] = GATE_BIAS, up_bias
        return {f"{name}_proj.{what}": tensor.to(dtype).cpu()
                for what, tensors in (("weight", weight), ("bias", bias)) for name, tensor in tensors.items()}

    def config(self) -> dict:
        """config.json, of a LlamaForCausalLM."""
        import transformers

        old = self.model.config.to_dict()
        kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
                "max_position_embeddings", "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
                "tie_word_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "attention_bias")
        values = {name: old[name] for name in kept if old.get(name) is not None}
        if old["model_type"] == "qwen2":
            values["attention_bias"] = True
        values |= {"intermediate_size": self.width, "mlp_bias": True, "architectures": ["LlamaForCausalLM"],
                   "dtype": str(self.mlps[0].gate.weight.dtype).split(".")[-1]}
        new = transformers.LlamaConfig(**values).to_dict()
        theta = (new.get("rope_parameters") or {}).get("rope_theta")
        return {**new, **({"rope_theta": theta} if theta else {})}  # where older readers look for it

    def tensors(self):
        """Yield (name, size in bytes, a function that makes the tensor) of the whole checkpoint."""
        width, hidden = self.width, self.mlps[0].gate.weight.shape[1]
        cache = {}

        def of_layer(number, name):
            if number not in cache:
                cache.clear()  # one layer at a time
                cache[number] = self.layer(number)
            return cache[number][name]

        shapes = {f"{part}_proj.{what}": number for what in ("weight", "bias") for part in ("gate", "up", "down")
                  for number in [width * hidden if what == "weight" else hidden if part == "down" else width]}
        for name, tensor in self.model.state_dict().items():
            if ".mlp." in name:
                if name.endswith("gate_proj.weight"):
                    stem, number = name.removesuffix("gate_proj.weight"), int(re.search(r"layers\.(\d+)\.", name)[1])
                    for part, size in shapes.items():
                        yield stem + part, size * tensor.element_size(), (lambda number=number, part=part: of_layer(number, part))
            elif not (name == "lm_head.weight" and self.model.config.tie_word_embeddings):
                yield name, tensor.numel() * tensor.element_size(), (lambda tensor=tensor: tensor.detach().cpu().contiguous())
                if self.model.config.model_type == "qwen2" and name.endswith("v_proj.bias"):  # Llama's flag is for all four
                    yield (name.replace("v_proj", "o_proj"), hidden * tensor.element_size(),
                           lambda tensor=tensor: tensor.new_zeros(hidden).cpu())

    def save(self, folder: Path, shard: int = 5 * 10**9) -> None:
        """model.safetensors, or its shards and their index, and config.json."""
        from safetensors.torch import save_file

        shards, total = [[]], 0
        for name, size, make in self.tensors():
            if shards[-1] and sum(one[1] for one in shards[-1]) + size > shard:
                shards.append([])
            shards[-1].append((name, size, make))
            total += size
        names = {}
        for k, some in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{k:05}-of-{len(shards):05}.safetensors"
            save_file({name: make() for name, _, make in some}, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # for a server, which may be another user; safetensors makes it private
            names |= {name: file for name, _, _ in some}
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": names}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (folder / "config.json").write_text(json.dumps(self.config(), indent=1) + "\n")

    def cost(self) -> str:
        """What it adds to the model."""
        old = sum(parameter.numel() for parameter in self.model.parameters())
        width, hidden = self.mlps[0].width, self.mlps[0].gate.weight.shape[1]
        depth, embedded = len(self.mlps), self.model.get_input_embeddings().weight.numel()
        weights = depth * 3 * (self.width - width) * hidden
        work = old if self.model.config.tie_word_embeddings else old - embedded  # weights that a token is multiplied with
        return (f"d_ff {width} -> {self.width}: {(weights + depth * (2 * self.width + hidden)) / old:+.2%} parameters, "
                f"{weights / work:+.2%} FLOPs a token")


def bake(model, tokenizer, folder: NeuronFolder, character: Character, args) -> None:
    """Write --save DIR: a whole directory or none."""
    import shutil

    target = Path(os.path.realpath(args.save))
    if target in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"--save {args.save}: expected a directory of its own")
    if target.exists():
        others = sorted(path.name for path in target.iterdir() if path.name not in written(target)) if target.is_dir() else [target.name]
        if others:
            raise UserError(f"--save {target}: there is something already that it did not write: {others[0]}")
    profile = folder.profile(character)
    baking, texts = Baking(model, profile, args.rank), licences(model)
    temporary, old = (target.with_name(f".{target.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        temporary.mkdir(parents=True)
        baking.save(temporary)
        tokenizer.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        for path in texts:
            shutil.copy(path, temporary)
        expected = probes(model, tokenizer, profile, None if baking.exact else temporary)
        if len(expected) < 3:
            say(f"{target}: the biases turn {len(expected)} of the answers that were tried: --verify-server has little to go by")
        made = {"base": model.source, "base fingerprint": fingerprint(model), "character": character.describe(), "suppress": args.suppress,
                "rank": args.rank, "dtype": str(model.dtype).split(".")[-1], "cost": baking.cost(),
                "neurons": {trait: neurons.meta.get("key", "released files") for trait, neurons in folder.files.items()}}
        (temporary / "README.md").write_text(card(made))
        files = sorted([*(path.name for path in temporary.iterdir()), "verify.json"])
        (temporary / "verify.json").write_text(json.dumps({**made, "files": files, "expected": expected}, ensure_ascii=False) + "\n")
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        for path in (temporary, old):
            shutil.rmtree(path, ignore_errors=True)
    say(f"{target}: {character.describe()}, edits on every token (--where all), suppressed neurons: {args.suppress}; {baking.cost()}")
    if args.verify:
        try:
            verify(model, tokenizer, profile, target, baking.exact)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"--verify holds both models in float32, for which there is not enough memory: --device cpu ({target} is "
                            "whole, but not verified)") from error


def written(folder: Path) -> list[str]:
    """The names that an earlier --save wrote there; none if it wasn't one."""
    try:
        files = json.loads((folder / "verify.json").read_text())["files"]
        return files if isinstance(files, list) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def licences(model) -> list[Path]:
    """The licence files of the base model, from its directory or the hub's."""
    from huggingface_hub import snapshot_download

    patterns, name = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"), getattr(model, "name_or_path", "")
    source, why = Path(name or "?"), "there is none beside it"
    if name and not source.is_dir():
        try:
            source = Path(snapshot_download(name, revision=getattr(model.config, "_commit_hash", None), allow_patterns=patterns))
        except Exception as error:  # of the network, in many ways: no reason not to bake
            why = str(error).strip().split("\n")[0]
    found = [path for pattern in patterns for path in sorted(source.glob(pattern)) if path.is_file()]
    if not found:
        say(f"{name}: no licence file came along ({why}): add it yourself before you pass the checkpoint on")
    return found


def probe(model, tokenizer, question: str, tokens: int = 12) -> tuple[list[int], list[int]]:
    """(the ids of a question's prompt, the first greedy tokens of its answer)."""
    import torch

    ids = token_ids(tokenizer, chat(tokenizer, ask(question)))
    prompt = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        new = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
                             repetition_penalty=1.0, pad_token_id=tokenizer.pad_token_id)[0, len(ids):].tolist()
    return ids, new


def alike(first: str, second: str) -> bool:
    """Whether two answers begin alike; further on, rounding may turn either."""
    return " ".join(first.split())[:24] == " ".join(second.split())[:24]


def probes(model, tokenizer, profile: Profile, saved: Path | None = None) -> list[dict]:
    """What verify.json holds: a few prompts as token ids, how the answers to them begin, and how they do where an engine drops the
    biases, which leaves only what is removed. Prompts that can't tell these apart are passed over. saved: the checkpoint, where it does
    something else than the live edit."""
    import transformers

    words = lambda new: tokenizer.decode(new, skip_special_tokens=True)  # noqa: E731 - as a server sends them
    baked = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=model.dtype).to(model.device).eval() if saved else None
    free = profile.value[:, 1] == 0
    rest = Profile(profile.layer[free], profile.index[free], profile.value[free], "removed")
    made, questions = [], [*PROBES, *(text for few in zip(*(built_in_bench().test[trait][:4] for trait in TRAITS)) for text in few)]
    for question in questions:
        if len(made) == 6:
            break
        with contextlib.nullcontext() if baked else steer(model, profile, where="all"):
            ids, new = probe(baked or model, tokenizer, question)
        with steer(model, rest, where="all"):
            without = probe(model, tokenizer, question)[1]
        if not alike(words(new), words(without)):
            made.append({"prompt": ids, "question": question, "text": words(new), "without biases": words(without)})
    return made


def card(made: dict) -> str:
    """The model card."""
    neurons = ", ".join(f"{trait} {key}" for trait, key in made["neurons"].items())
    others = "removed" if made["suppress"] == "zero" else "left as they are"
    return f"""---
base_model: {json.dumps(made["base"])}
---

# {made["base"]}, {made["character"]}

A personality (NPTI, ICLR 2025, arXiv 2410.12327) folded into the weights: neurons that fire for a pole of a Big Five trait are raised
by biased neurons that were added to the MLPs; those of the other pole are {others}. A plain Llama checkpoint with `mlp_bias`.

| | |
|---|---|
| base model | {made["base"]}, {made["base fingerprint"]} |
| neuron files | {neurons} |
| strengths | {made["character"]} |
| cost | {made["cost"]} |

Some engines drop the biases of MLPs without a word; then something near the base model answers, not this one. `verify.json` holds a
few prompts, as token ids, with the first greedy tokens that should follow, and those that follow without the biases; `python induce.py
--save DIR --verify-server URL` compares them with what a server says.
"""


def verify(model, tokenizer, profile: Profile, folder: Path, exact: bool) -> None:
    """Compare the checkpoint, in plain transformers, with the live edit; raise if they differ by more than rounding, where it is meant
    to be exact. Both compute in float32, whatever the weights were saved in: bfloat16's own rounding moves logits by a third of what
    a strong edit does."""
    import torch
    import transformers
    from tqdm import tqdm

    dtype, model = model.dtype, model.float()
    baked = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device).eval()
    found, ties, questions = [], [], [*PROBES, *built_in_bench().test[TRAITS[0]][:12]]
    for question in tqdm(questions, desc="verify", unit="prompt"):
        ids = torch.tensor([token_ids(tokenizer, chat(tokenizer, ask(question)))], device=model.device)
        with torch.no_grad():
            with steer(model, profile, where="all"):
                live = model(input_ids=ids).logits[0]
                mine = probe(model, tokenizer, question, 24)[1]
            plain, ours = model(input_ids=ids).logits[0], baked(input_ids=ids).logits[0]
        divergence = (live.softmax(-1) * (live.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).max()
        found.append(torch.stack([(live - ours).abs().max(), (live - plain).abs().max(), divergence]))
        theirs = probe(baked, tokenizer, question, 24)[1]
        at = next((k for k, (a, b) in enumerate(zip(mine, theirs)) if a != b), None)
        if at is not None:
            with torch.no_grad(), steer(model, profile, where="all"):
                so_far = torch.cat([ids, torch.tensor([mine[:at]], device=ids.device, dtype=ids.dtype)], 1)
                best = model(input_ids=so_far).logits[0, -1]
            ties.append(float(best.topk(2).values.diff().abs()))
    worst, effect, divergence = torch.stack(found).amax(0).tolist()  # where one is NaN, so is this
    # an added neuron's weights are rounded to the dtype once more: 0.2 % in bfloat16
    bound = 1e-3 if dtype == torch.float32 else 0.01 * max(1.0, effect)
    print(f"baked against live, {len(questions)} prompts, {str(dtype).split('.')[-1]} weights: logits differ by {worst:.2g} at most "
          f"({f'bound {bound:.2g}' if exact else '--rank leaves a part out'}; the edit moves them by {effect:.2g}), "
          f"KL {divergence:.2g} at most; greedy answers differ in {len(ties)}"
          + (f", where the best two logits are {max(ties):.2g} apart at most" if ties else ""))
    if exact and not worst <= bound:  # NaN is none
        raise UserError(f"{folder}: baked and live differ by {worst:.2g}, more than {bound:.2g}")


def verify_server(folder: str, url: str, served: str | None) -> None:
    """Ask a server what it makes of a baked checkpoint: its first tokens against verify.json's."""
    try:
        expected = json.loads((Path(folder) / "verify.json").read_text())["expected"]
        expected = [(one["prompt"], one["question"], one["text"], one["without biases"]) for one in expected]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--save {folder} holds no verify.json that this version wrote: {type(error).__name__}: {error}") from error
    if not expected:
        raise UserError(f"--save {folder}: the biases of this model are too weak to turn any answer that was tried: nothing can tell")
    endpoint = Endpoint(url, served)
    right = dropped = 0
    for prompt, question, text, without in expected:
        try:
            said = endpoint.completion(prompt, max_tokens=12, temperature=0)[0]
        except NoReply as error:
            raise UserError(f"{url}: {error}") from error
        right, dropped = right + alike(said, text), dropped + alike(said, without)
        print(f"{question}\n  expected: {text!r}\n  served:   {said!r}")
    if dropped > right:
        raise UserError(f"{url}: {dropped} of {len(expected)} answers are those without the biases of the MLPs: this engine drops them")
    if right <= len(expected) / 2:
        raise UserError(f"{url}: {right} of {len(expected)} answers begin as they should: another model, or one in too few bits")
    print(f"{url}: {right} of {len(expected)} answers begin as they should"
          + ("" if right == len(expected) else "; rounding can turn the others, above all in fewer bits"))


# ------------------------------------------------------------------------------------------------- the command line


def list_neurons(folder: str) -> None:
    """Print what a neuron folder holds."""
    from rich.console import Console
    from rich.table import Table

    paths = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_dir() else []
    if not paths:
        raise UserError(f"--list: no neuron files in {folder}: python identify.py makes them")
    table = Table(title=f"{folder}", title_justify="left", box=None, header_style="bold")
    for column in ("trait", "model", "high, low", "tokens", "made", "from"):
        table.add_column(column)
    for path in paths:
        try:
            neurons = Neurons.load(path)
        except UserError as error:
            table.add_row(path.stem, f"[red]{' '.join(str(error).split())}[/red]")
            continue
        meta = neurons.meta
        counts = ", ".join(str(len(neurons.select(pole)[0])) for pole in POLES)
        made = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d")
        table.add_row(meta["trait"], meta["model"], counts, f"{sum(meta['tokens']):,}", made,
                      f"{meta['questions']} questions, {meta['bench']}, {meta['max_new_tokens']} tokens, seed {meta['seed']}")
    Console().print(table)


def sampling(args) -> dict:
    """generate()'s options for the flags: greedy unless a temperature or top-p is asked for."""
    options = {"repetition_penalty": REPETITION_PENALTY}
    if args.temperature is not None or args.top_p is not None:
        options |= {"do_sample": True, "temperature": 1.0 if args.temperature is None else args.temperature,
                    "top_p": 1.0 if args.top_p is None else args.top_p}
    return options


def side_by_side(model, tokenizer, folder: NeuronFolder, character: Character, args) -> None:
    """The model's own answer beside the personality's and its opposite's, all in one batch."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    profiles = [folder.profile(character), folder.profile(character, -1)]
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


def read_questions(path: str, method: str = "npti") -> list[tuple[str, Character | None]]:
    """One question a line: plain text, or a JSON object with the key question and, optionally, a profile of its own (traits
    and alphas, or the name of a profile file)."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {path}: {error}") from error
    questions, read = [], {}
    for number, line in enumerate(lines, 1):
        where, character = f"{path}, line {number}", None
        if line.lstrip().startswith("{"):
            try:
                values = json.loads(line)
                line = values["question"]
                if not isinstance(line, str):
                    raise ValueError(f"question is a {type(line).__name__}")
            except (ValueError, KeyError) as error:
                raise UserError(f'{where}: expected {{"question": text}}: {error}') from error
            asked = values.get("profile")
            if asked is not None:
                key = json.dumps(asked, sort_keys=True)
                if key not in read:
                    read[key] = Character.read(asked, method) if isinstance(asked, str) else Character.of(asked, where, method)
                character = read[key]
        if line.strip():
            questions.append((line.strip(), character))
    if not questions:
        raise UserError(f"--questions {path}: no question in it")
    return questions


def answer_file(model, tokenizer, folder: NeuronFolder, character: Character, args) -> None:
    """Answer a file of questions, JSON lines out: each in its own personality, or in the one of --trait or --profile. What is written
    to --out grows beside it, under a name that tells what is answered, and is there when it is whole."""
    import fcntl

    import torch
    from tqdm import tqdm

    questions, profiles = [(text, own or character) for text, own in args.questions], {}
    out, done = args.out and Path(args.out), 0
    with contextlib.ExitStack() as stack:
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            options = [getattr(args, name) for name in ("batch_size", "max_new_tokens", "seed", "where", "keep", "suppress", "min_delta",
                                                        "min_neurons", "temperature", "top_p")]
            neurons = {trait: folder.neurons(trait).meta.get("key") for trait in TRAITS if any(who.strengths.get(trait) for _, who in questions)}
            asked = [(text, who.strengths, who.method, who.layers) for text, who in questions]
            key = digest(fingerprint(model), str(model.dtype), tokenizer.chat_template, neurons, asked, options)
            part = out.with_name(f".{out.name}.{key}.part")
            file = stack.enter_context(open(part, "a+b"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--out {out}: another run is writing it") from None
            done = kept_lines(file, args.batch_size)
            if done:
                say(f"going on after {done} of {len(questions)} answers")
            stack.enter_context(resumable())
        bar = stack.enter_context(tqdm(total=len(questions), initial=done, unit="answer", disable=not out))
        for start in range(done, len(questions), args.batch_size):
            batch = questions[start:start + args.batch_size]
            torch.manual_seed(args.seed + start)  # the same, if it is sampled, where a run goes on
            for _, who in batch:
                if id(who) not in profiles:
                    profiles[id(who)] = folder.profile(who)
            here = list(dict.fromkeys(id(who) for _, who in batch))
            with steer(model, [profiles[one] for one in here], [here.index(id(who)) + 1 for _, who in batch], args.where, args.keep,
                       args.seed):
                answers = answer(model, tokenizer, [ask(question) for question, _ in batch], args.max_new_tokens, **sampling(args))
            lines = "".join(json.dumps({"question": question, "answer": text, "personality": who.strengths, "method": who.method,
                                        "ids": ids}, ensure_ascii=False) + "\n" for (question, who), (text, ids) in zip(batch, answers))
            if out:
                file.write(lines.encode())
                file.flush()
            else:
                sys.stdout.write(lines)
            bar.update(len(batch))
        if out:
            os.replace(part, out)


def kept_lines(file, step: int) -> int:
    """How many lines, in whole steps, an interrupted run left in a file; what comes after them is cut off."""
    file.seek(0)
    ends = [0, *(file.tell() for line in iter(file.readline, b"") if line.endswith(b"\n"))]
    done = (len(ends) - 1) // step * step
    file.truncate(ends[done])
    return done


def streamer_of(tokenizer):
    """Prints an answer as it comes; of a base model's, not the beginning of the question that it would ask itself next."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        held = ""

        def on_finalized_text(self, text, stream_end=False):
            self.held = (self.held + text).partition(NEXT_QUESTION)[0]
            could = (NEXT_QUESTION[:k] for k in range(len(NEXT_QUESTION), 0, -1))
            keep = 0 if stream_end else next((len(start) for start in could if self.held.endswith(start)), 0)
            super().on_finalized_text(self.held[:len(self.held) - keep], stream_end)
            self.held = self.held[len(self.held) - keep:]

    return (TextStreamer if tokenizer.chat_template else Streamer)(tokenizer, skip_prompt=True, skip_special_tokens=True)


CHAT_HELP = "/trait NAME [ALPHA], /alpha NUMBER (of the last trait), /reset (forget the conversation), /quit"


def converse(model, tokenizer, folder: NeuronFolder, character: Character, args) -> None:
    """A conversation in the terminal, streamed token by token; the personality can be changed between turns."""
    import torch
    from transformers import DynamicCache

    turns, cached, cache, latest = [], [], DynamicCache(config=model.config), list(character.strengths)[-1]
    capacity = 2 * len(TRAITS) * len(find_mlps(model)) * find_mlps(model)[0].width // 10
    print(f"{character.describe()}    {CHAT_HELP}")
    with steer(model, folder.profile(character), None, args.where, args.keep, args.seed, capacity) as steering:
        while True:
            try:
                line = input("you: ").strip()
            except EOFError:
                print()
                return
            command, *words = line.split()[:3] if line else [""]
            before = dict(character.strengths)
            try:
                if command in ("/quit", "/exit"):
                    return
                if command == "/reset":
                    turns, cached, cache = [], [], DynamicCache(config=model.config)
                elif command in ("/trait", "/alpha") and words:
                    trait = check_trait(words[0]) if command == "/trait" else latest
                    alpha = words[1] if len(words) > 1 else before.get(trait, 1.0) if command == "/trait" else words[0]
                    # neurons that are identified now must not be those of the personality that is on
                    steering.update(Profile.of([]))
                    if not abs(float(alpha)) < 1e3:
                        raise UserError(f"alpha: expected a number below 1000, got {alpha}")
                    folder.neurons(trait)
                    character.strengths[trait], latest = float(alpha), trait
                elif command.startswith("/"):
                    print(CHAT_HELP)
                if command.startswith("/"):
                    steering.update(folder.profile(character))
                    print(character.describe())
            except ValueError as error:  # UserError among them
                print(error)
                character.strengths = before
                steering.update(folder.profile(character))
            if not line or command.startswith("/"):
                continue
            turns.append({"role": "user", "content": line})
            ids = token_ids(tokenizer, chat(tokenizer, turns))
            shared = next((i for i, (a, b) in enumerate(zip(cached, ids)) if a != b), min(len(cached), len(ids)))
            shared = min(shared, len(ids) - 1)
            try:  # what was said is not computed again
                cache.crop(shared)
            except (ValueError, RuntimeError):  # a sliding window can't be cropped
                cache = DynamicCache(config=model.config)
            prompt = torch.tensor([ids], device=model.device)
            streamer = streamer_of(tokenizer)
            try:
                with torch.no_grad():
                    output = model.generate(
                        input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, streamer=streamer,
                        max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                        **{"do_sample": False, **ending(tokenizer, len(ids)), **sampling(args)})[0].tolist()
            except KeyboardInterrupt:  # stops this answer only
                print()
                turns, cached, cache = turns[:-1], [], DynamicCache(config=model.config)
                continue
            cached = output[:-1]  # the last token was never fed
            turns.append({"role": "assistant", "content": answer_text(tokenizer, output[len(ids):])})


def parser() -> Flags:
    flags = Flags(__doc__)
    flags.add_argument("--trait", action="append", metavar="T", help=f"{', '.join(TRAITS)}; again for several")
    flags.add_argument("--alpha", action="append", type=float, metavar="A",
                       help="strength, one a trait; negative: the low pole (the paper: 0.6 to 1.5)")
    flags.add_argument("--profile", metavar="FILE", help="a whole character, in TOML: [traits], and method, layers, model, name")
    flags.add_argument("--method", choices=METHODS, default="npti", help="default: %(default)s; alpha has a scale of its own in each")
    flags.add_argument("--neurons", default="neurons", metavar="DIR",
                       help="folder of neuron files (default: %(default)s); npti:DIR: of NPTI's released ones")
    flags.add_argument("--list", action="store_true", help="show what the folder holds")
    flags.add_argument("-q", "--question", action="append", metavar="TEXT", help="ask this instead of the everyday questions")
    flags.add_argument("--questions", metavar="FILE", help="answer a file of questions, one a line")
    flags.add_argument("--out", metavar="FILE", help="where the answers to --questions go (default: the terminal)")
    flags.add_argument("--chat", action="store_true", help="talk to it; in the chat: " + CHAT_HELP)
    flags.add_argument("--keep", type=float, default=1.0, metavar="P",
                       help="raise a random share of the neurons, redrawn each step (default: all; NPTI's release: 0.9)")
    flags.add_argument("--min-delta", type=float, default=0.1, metavar="D", help="default: %(default)s")
    flags.add_argument("--min-neurons", type=positive, metavar="N",
                       help="at least so many neurons a pole (default: 0.436 %% of all, NPTI's 2,000 of Llama-3-8B's)")
    flags.add_argument("--where", choices=("generated", "all"),
                       help="edit the answer's tokens, as NPTI does, or the prompt's as well (default: generated; --save: all)")
    flags.add_argument("--suppress", choices=SUPPRESS,
                       help="what becomes of the opposite pole's neurons: capped at 0, as in NPTI, set to 0, or nothing (default: cap; "
                            "--save: zero)")
    flags.add_argument("--save", metavar="DIR", help="write the personality into a plain Llama checkpoint, for any engine")
    flags.add_argument("--rank", type=positive, metavar="R", help="of --save: the best rank-R part only of what a layer's raised neurons do")
    flags.add_argument("--verify", action="store_true", help="of --save: compare with the live edit, in plain transformers")
    flags.add_argument("--verify-server", metavar="URL", help="with --save DIR: compare what a server of that checkpoint says; "
                                                             "nothing is written")
    flags.add_argument("--served-model", metavar="NAME", help="its name there (default: the first that it lists)")
    flags.add_argument("--temperature", type=float, metavar="X", help="sample (default: greedy)")
    flags.add_argument("--top-p", type=float, metavar="X")
    model_arguments(flags)
    return flags


def main() -> None:
    args = parser().parse_args()
    if args.list:
        return list_neurons(args.neurons.removeprefix("npti:"))
    if args.verify_server:
        if not args.save:
            raise UserError("--verify-server URL needs --save DIR, where the baked checkpoint is")
        return verify_server(args.save, args.verify_server, args.served_model)
    for flag, given in (("--where generated", args.where == "generated"), ("--keep", args.keep < 1),
                        ("--suppress cap", args.suppress == "cap"), ("--questions", args.questions), ("--chat", args.chat)):
        if args.save and given:
            why = {"--questions": "it holds one character", "--chat": "it is for later"}.get(
                flag, "a checkpoint can't tell prompt from answer, can't draw neurons, and can't cap an activation")
            raise UserError(f"--save can't be had with {flag}: {why}")
    for flag in ("rank", "verify"):
        if getattr(args, flag) and not args.save:
            raise UserError(f"--{flag} goes with --save DIR")
    args.where = args.where or ("all" if args.save else "generated")
    args.suppress = args.suppress or ("zero" if args.save else "cap")
    traits, alphas = [check_trait(trait) for trait in args.trait or []], args.alpha or []
    if args.profile and (traits or alphas):
        raise UserError("--profile FILE says what --trait and --alpha would say: expected one or the other")
    own = args.questions and not (args.profile or traits or alphas)  # its lines can have profiles of their own
    if not (args.profile or own) and (not traits or len(alphas) not in (1, len(traits)) or len(set(traits)) < len(traits)):
        raise UserError("expected --trait T --alpha A, again for each further trait, or --profile FILE: "
                        f"got the traits {traits} and the alphas {alphas}")
    for flag, values, fine in (("--alpha", alphas, lambda x: abs(x) < 1e3), ("--keep", [args.keep], lambda x: 0 < x <= 1),
                               ("--min-delta", [args.min_delta], lambda x: 0 <= x <= 1),
                               ("--temperature", [args.temperature], lambda x: x is None or 0 < x < 100),
                               ("--top-p", [args.top_p], lambda x: x is None or 0 < x <= 1)):
        if not all(map(fine, values)):  # NaN is in no range
            raise UserError(f"{flag}: {values} is out of range")
    if args.chat and args.questions:
        raise UserError("--chat and --questions FILE: expected one or the other")
    if args.keep < 1 and args.method != "npti":
        raise UserError(f"--keep: a random share of the raised neurons is NPTI's; {args.method} raises none")
    if args.out and not args.questions:
        raise UserError("--out FILE goes with --questions FILE")
    character = Character.read(args.profile, args.method) if args.profile else Character(
        dict(zip(traits, alphas if len(alphas) == len(traits) else alphas * len(traits))), args.method)
    if args.questions:  # before the model is loaded
        asked, args.questions = args.questions, read_questions(args.questions, args.method)  # once: it may be a pipe
        without = [text for text, one in args.questions if one is None]
        if own and without:
            raise UserError(f"--questions {asked}: no profile stands beside {without[0]!r}: --trait and --alpha, or "
                            "--profile, say what such a question is answered in")
    if (args.chat or args.save) and not character.strengths:
        raise UserError("--chat and --save: expected --trait T --alpha A, or --profile FILE")
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    import torch

    torch.manual_seed(args.seed)
    if character.method in OWN_SCALE:
        say(f"{character.method}: the scale of alpha is its own: {OWN_SCALE[character.method]}")
    options = {name: getattr(args, name) for name in ("batch_size", "seed")} | ({} if args.save else {"where": args.where})
    folder = NeuronFolder(model, tokenizer, args.neurons, args.min_delta, args.min_neurons, args.suppress, **options)
    if args.save:
        return bake(model, tokenizer, folder, character, args)
    work = converse if args.chat else answer_file if args.questions else side_by_side
    work(model, tokenizer, folder, character, args)


if __name__ == "__main__":
    script(main)
