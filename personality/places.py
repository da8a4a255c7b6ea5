"""Profiles of many requests in one batch, for engines that run the model themselves, perhaps compiled, captured, cut over workers:
a table of them, at fixed addresses, which place each has in it, and whose each token of a batch is.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from .mlp import plain_sites
from .op import op
from .steer import Profile, Tables
from .terminal import UserError

LIBRARY = torch.library.Library("neurons", "FRAGMENT")  # what is registered lives as long as this


def cut(profile: Profile, layers: range, neurons: range) -> Profile:
    """The part of a profile that a worker holds, counted from its first layer and its first neuron."""
    here = (profile.layer >= layers.start) & (profile.layer < layers.stop)
    part = profile.chosen(here & (profile.index >= neurons.start) & (profile.index < neurons.stop))
    return replace(part, layer=part.layer - layers.start, index=part.index - neurons.start)


class Places:
    """Which place in the table, from 1, each profile has."""

    def __init__(self, number: int):
        self.number, self.of = number, {}  # of: the least recently used first

    def seat(self, keys) -> dict:
        """The places of those that came in now, in the stead of the least recently used ones; afterwards all keys have one."""
        kept = {key: self.of.pop(key) for key in keys if key in self.of}
        taken = {*kept.values(), *self.of.values()}
        free = iter([*(place for place in range(1, self.number + 1) if place not in taken), *list(self.of.values())]
                    if len(kept) < len(keys) else ())
        fresh = {key: next(free) for key in keys if key not in kept}
        self.of = {key: place for key, place in self.of.items() if place not in fresh.values()} | kept | fresh
        return fresh


class Table:
    """The edits of `number` profiles, at fixed addresses, with room for `most` in each: one can be written without the others."""

    def __init__(self, number: int, most: int, depth: int, width: int, device):
        self.number, self.most, self.depth, self.width = number, most, depth, width
        tiles = -(-width // op().tile)
        self.ptr = torch.zeros((depth, number + 1, tiles + 1), dtype=torch.int32, device=device)
        self.index = torch.zeros(number * most, dtype=torch.int32, device=device)
        self.value = torch.zeros((number * most, 4), device=device)

    def built(self, profile: Profile):
        """(ptr (layers, tiles + 1), index, value) of a profile alone, checked."""
        alone = Tables([profile], plain_sites(self.depth, self.width))
        _, index, value = alone.sites[0]
        return torch.stack([ptr[1] for ptr in alone.ptr]), index[:len(profile)], value[:len(profile)]

    def write(self, place: int, built) -> None:
        ptr, index, value = built
        start = (place - 1) * self.most
        self.index[start:start + len(index)].copy_(index)
        self.value[start:start + len(index)].copy_(value)
        self.ptr[:, place].copy_(ptr + start)


class Batches:
    """Whose each token of a batch is. table: of the profiles; profile_of(key): a request's, which may take its time; tokens: int32,
    where each token's place in the table is written; where: "generated" or "all", as in steer()."""

    def __init__(self, table: Table, profile_of, tokens, where: str):
        self.table, self.profile_of, self.tokens, self.where = table, profile_of, tokens, where
        self.places, self.written = Places(table.number), 0  # written: tokens of the map that may not be 0
        self.builder, self.begun = ThreadPoolExecutor(1, "profiles"), {}  # begun: futures by key

    def begin(self, key):
        """Have a profile's tables built, beside the forward that runs."""
        if key not in self.begun:
            self.begun[key] = self.builder.submit(lambda: self.table.built(self.profile_of(key)))
            while len(self.begun) > self.table.number:
                self.begun.pop(next(iter(self.begun)))
        return self.begun[key]

    def before_forward(self, requests) -> None:
        """Write the map. requests, in the batch's order: (key or None, tokens of the prompt as it was asked, tokens that are
        computed, tokens of this forward) of each. What stands after the prompt is answer, computed for the first time or again.
        A request's prompt is read before its first token is edited: its profile is built meanwhile."""
        spans, wanted = [], {}
        for key, prompt, done, new in requests:
            plain = new if key is None else 0 if self.where == "all" else min(new, max(0, prompt - done))
            spans.append((plain, new - plain, key))
            if plain < new:
                wanted[key] = None
            elif key is not None and key not in self.places.of:
                self.begin(key)
        for key, place in self.places.seat(wanted).items():
            self.table.write(place, self.begin(key).result())
            self.begun.pop(key, None)
        numbers = [number for _, edited, key in spans for number in (0, self.places.of[key] if edited else 0)]
        lengths = [length for plain, edited, _ in spans for length in (plain, edited)]
        self.write(np.repeat(numbers, lengths).astype(np.int32) if wanted else np.zeros(0, np.int32))

    def write(self, numbers) -> None:
        """Write the first numbers of the map; after them, where a batch may be padded, it is 0."""
        changed = max(len(numbers), self.written)
        if changed:
            source = torch.from_numpy(np.pad(numbers, (0, changed - len(numbers))))
            source = source.pin_memory() if self.tokens.is_cuda else source  # else the copy would wait for the forward before
            self.tokens[:changed].copy_(source, non_blocking=True)
        self.written = len(numbers)


class Activation(nn.Module):
    """In the place of an activation that takes both halves of what a merged gate_up gives: the op. Its buffers are the layer's
    tables and the map that all layers share; a compiler that compiles alike layers once finds these alike."""

    def __init__(self, act: int, tokens, ptr, index, value):
        super().__init__()
        self.act, self.fused = act, fused_op()
        for name, tensor in (("tokens", tokens), ("ptr", ptr), ("index", index), ("value", value)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, gate_up):  # (tokens, 2 width)
        self.fused(gate_up, self.act, self.tokens, self.ptr, self.index, self.value)
        return gate_up[..., :gate_up.shape[-1] // 2]


def compare(theirs, ours, width: int, device, dtype) -> None:
    """Raise where the op is not what it stands in for."""
    gate_up = torch.randn((3, 2 * width), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    own, result = theirs(gate_up).float(), ours(gate_up.clone()).float()
    if not bool((own - result).abs().max() < (1e-3 if dtype == torch.float32 else 5e-2)):
        raise UserError(f"{type(theirs).__name__}: its own result and the op's differ on a random vector")


@functools.cache
def fused_op():
    """neurons::gate_up_, which is neurons::glu_ on the two halves of one tensor. Where torch's second way to functionalise is
    switched off, as vLLM does it, compiled code copies the halves before and after glu_; what is changed as a whole it leaves."""
    op()
    glu_ = torch.ops.neurons.glu_.default
    LIBRARY.define("gate_up_(Tensor(a!) gate_up, int act, Tensor token_profile, Tensor edit_ptr, Tensor edit_index, "
                   "Tensor edit_value) -> ()")

    def gate_up_(gate_up, act, tokens, *tables):
        gate, up = gate_up.chunk(2, -1)  # (tokens, width) each
        glu_(gate, up, act, tokens[:len(gate_up)], *tables, None, None, None, None)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl("gate_up_", gate_up_, key)
    LIBRARY.impl("gate_up_", lambda *_: None, "Meta")
    return torch.ops.neurons.gate_up_.default
