"""Edit a model's neurons while it runs: profiles, the tables in which the op reads them, and steer()."""

import contextlib
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .mlp import Mlp, Site, find_mlps, shape_of
from .op import SiteTensors, op
from .rows import Rows, patched
from .terminal import UserError

NO_EDIT = {"cap": math.inf, "scale": 1.0, "shift": 0.0, "bias": 0.0}  # the edit that changes nothing


def no_edits(number: int):
    """So many edits that change nothing: float32 (number, 4)."""
    return torch.tensor(list(NO_EDIT.values())).repeat(number, 1)


def check_places(layer, index, depth: int, width: int, what: str, so: str = "") -> None:
    """Raise for neurons that a model of this shape lacks; the message begins with `what` and ends with `so`."""
    for kind, at, most, of in (("layer", layer, depth, "layers"), ("neuron", index, width, "neurons a layer")):
        wrong = at[(at < 0) | (at >= most)]
        if len(wrong):
            raise UserError(f"{what}: {kind} {int(wrong[0])} of a model of {most} {of}{so}")


@dataclass(eq=False)  # of tensors: two are the same where they are one
class Profile:
    """The edits of one personality over all layers. layer, index: int64 (n); value: float32 (n, 4), a row being
    cap, scale, shift, bias of (scale * min(a, cap) + shift) * up + bias. No neuron stands twice. residual: {layer: float32
    (hidden_size)}, what is added to the layer's output instead, by activation addition."""

    layer: torch.Tensor
    index: torch.Tensor
    value: torch.Tensor
    name: str = ""
    residual: dict = field(default_factory=dict)

    @classmethod
    def empty(cls, name: str = "") -> "Profile":
        nowhere = torch.empty(0, dtype=torch.long)
        return cls(nowhere, nowhere, torch.empty(0, 4), name)

    @classmethod
    def of(cls, edits: list[tuple], name: str = "") -> "Profile":
        """From (layer, index, cap, shift) tensors, one tuple a set of neurons. A neuron in several sets gets the lowest
        cap and the sum of the shifts: capped before shifted, as in NPTI, whatever the order of the sets."""
        if not edits:
            return cls.empty(name)
        layer, index, cap, shift = (torch.cat(parts) for parts in zip(*edits))
        neurons, at = torch.unique(torch.stack([layer, index], 1), dim=0, return_inverse=True)
        value = no_edits(len(neurons))
        value[:, 0] = value[:, 0].scatter_reduce(0, at, cap.float(), "amin")
        # summed in float64 and in sorted order, so that the order of the sets does not show in the last bit
        order = torch.argsort(shift, stable=True)
        value[:, 2] = torch.zeros(len(neurons), dtype=torch.float64).index_add(0, at[order], shift[order].double()).float()
        return cls(neurons[:, 0], neurons[:, 1], value, name)

    @classmethod
    def dense(cls, name: str = "", **columns) -> "Profile":
        """From tensors (layers, d_ff) by their names in an edit: cap, scale, shift, bias. A neuron is edited where one of them
        changes something."""
        if not columns or columns.keys() - NO_EDIT.keys():
            raise UserError(f"Profile.dense(): expected some of {', '.join(NO_EDIT)}, got {', '.join(columns) or 'none'}")
        layer, index = torch.stack([column != NO_EDIT[what] for what, column in columns.items()]).any(0).nonzero(as_tuple=True)
        value = no_edits(len(layer))
        for what, column in columns.items():
            value[:, list(NO_EDIT).index(what)] = column[layer, index].float()
        return cls(layer, index, value, name)

    def chosen(self, mask) -> "Profile":
        """The edits where the bool tensor (n) says so, and none of the residual stream."""
        return Profile(self.layer[mask], self.index[mask], self.value[mask], self.name)

    def __len__(self):
        return len(self.layer)


class Tables:
    """The edit tables of several profiles, as the op reads them. They keep their addresses and capacity, so that edits can
    be swapped under a captured graph. sites[i]: (edit_ptr int32 (P * experts + 1, tiles + 1), edit_index, edit_value), where the
    edits of profile p, from 1, in expert e stand at (p - 1) * experts + e + 1."""

    def __init__(self, profiles: list[Profile], sites: list[Site], capacity: int | None = None):
        self.layout, self.number = sites, len(profiles)
        self.depth, self.width = shape_of(sites)
        self.capacity = max(1, sum(map(len, profiles)) if capacity is None else capacity)
        self.experts, self.columns, begin = (torch.tensor([getattr(site, name) for site in sites])
                                             for name in ("experts", "width", "begin"))
        self.starts = torch.tensor([site.layer for site in sites]) * self.width + begin  # ascending
        segments = self.number * self.experts + 1  # of a site: one an edited profile and expert, and the empty one of profile 0
        self.segments = segments.cumsum(0) - segments
        tiles, widest = -(-self.columns // op().tile), int(self.columns.max())
        # where the tiles of each segment begin and end, as numbers that grow with segment and column
        self.widest, self.shapes = widest, [(int(rows), int(tiles) + 1) for rows, tiles in zip(segments, tiles)]
        self.edges = torch.cat([((first + torch.arange(rows))[:, None] * widest
                                 + (torch.arange(many) * op().tile).clamp(max=int(width))).flatten()
                                for first, width, (rows, many) in zip(self.segments, self.columns, self.shapes)])
        self.held = SiteTensors([[(shape, torch.int32)] for shape in self.shapes], [site.device for site in sites])
        self.ptr = [ptr for ptr, in self.held.each]
        self.edits = {device: (torch.zeros(self.capacity, dtype=torch.int32, device=device),
                               torch.zeros((self.capacity, 4), device=device)) for device in {site.device for site in sites}}
        for tensor in (tensor for edits in self.edits.values() for tensor in edits):
            torch._dynamo.mark_static_address(tensor)
        self.sites = [(ptr, *self.edits[site.device]) for ptr, site in zip(self.ptr, sites)]
        self.fill(profiles)

    def fill(self, profiles: list[Profile]) -> None:
        """Check everything that the kernel can't, and write the tables."""
        self.check(profiles)
        layer, index, value, number = map(torch.cat, zip(*(
            (profile.layer, profile.index, profile.value.float(), torch.full((len(profile),), number))
            for number, profile in enumerate(profiles))))
        place = layer * self.width + index
        site = torch.searchsorted(self.starts, place, right=True) - 1
        at = place - self.starts[site]
        here = (at >= 0) & (at < self.experts[site] * self.columns[site])  # not on another rank, nor beyond a narrow layer's end
        site, at, value, number, layer = (tensor[here] for tensor in (site, at, value, number, layer))
        expert, column = at // self.columns[site], at % self.columns[site]
        segment = self.segments[site] + number * self.experts[site] + expert + 1
        place, order = torch.sort(segment * self.widest + column)
        if bool((place.diff() == 0).any()):
            raise UserError("profiles: a neuron stands twice in a profile")
        starts = torch.searchsorted(place, self.edges).split([rows * many for rows, many in self.shapes])
        for ptr, first in zip(self.ptr, starts):
            ptr.copy_(first.view(ptr.shape))
        for index, values in self.edits.values():
            index[:len(order)].copy_(column[order])
            values[:len(order)].copy_(value[order])
        # for thin(): what neurons are raised by, and whose of which layer they are
        self.shift, self.owner = value[order, 2], (layer * self.number + number)[order]

    def check(self, profiles: list[Profile]) -> None:
        if not profiles:
            raise UserError("profiles: expected at least one, got none")
        if len(profiles) != self.number:
            raise UserError(f"profiles: expected {self.number}, as when steering began, got {len(profiles)}")
        total = sum(map(len, profiles))
        if total > self.capacity:
            raise UserError(f"profiles: {total} edits are over the capacity of {self.capacity}: steer(..., capacity={total})")
        for profile in profiles:
            n, name = len(profile), f"profile {profile.name!r}"
            if profile.index.shape != (n,) or profile.value.shape != (n, 4):
                raise UserError(f"{name}: expected index ({n},) and value ({n}, 4), got {tuple(profile.index.shape)} and "
                                f"{tuple(profile.value.shape)}")
            check_places(profile.layer, profile.index, self.depth, self.width, name)
            if bool(profile.value.isnan().any() | profile.value[:, 1:].isinf().any() | (profile.value[:, 0] == -math.inf).any()):
                raise UserError(f"{name}: cap, scale, shift or bias is not a finite number (a cap can be infinite)")

    def thin(self, keep: float, generator) -> None:
        """Raise a random share `keep` of each layer's neurons only. NPTI's release redraws it at every step."""
        raised = (self.shift != 0).nonzero().flatten()
        owner = self.owner[raised]
        order = torch.argsort(owner + torch.rand(len(raised), generator=generator, dtype=torch.float64))
        sizes = owner.bincount()
        rank = torch.arange(len(raised)) - (sizes.cumsum(0) - sizes)[owner[order]]
        shift, kept = torch.zeros_like(self.shift), raised[order][rank < (keep * sizes[owner[order]]).round()]
        shift[kept] = self.shift[kept]
        for _, values in self.edits.values():
            values[:len(shift), 2].copy_(shift)


def hidden_states(output):
    """What a decoder layer gives on, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def residual_tables(mlps: list[Mlp], profiles: list[Profile]) -> dict:
    """The profiles' residual vectors, {layer: (profiles + 1, hidden)}; the first one of each is 0."""
    tables, of = {}, {mlp.layer: mlp for mlp in mlps}
    for number, profile in enumerate(profiles, 1):
        for layer, vector in profile.residual.items():
            if layer not in of:
                raise UserError(f"profile {profile.name!r}: layer {layer} of a model of {len(of)} layers")
            mlp = of[layer]
            if tuple(vector.shape) != (mlp.hidden,) or not bool(vector.isfinite().all()):
                raise UserError(f"profile {profile.name!r}: residual of layer {layer}: expected {mlp.hidden} finite numbers, got "
                                f"shape {tuple(vector.shape)}")
            if layer not in tables:
                tables[layer] = torch.zeros((len(profiles) + 1, mlp.hidden), dtype=mlp.dtype, device=mlp.device)
            tables[layer][number] = vector
    return tables


def adding(table, rows: Rows):
    """A forward hook that adds each token's residual vector to a layer's output."""
    def add(module, args, output):
        if rows.tokens is None:
            return output
        hidden = hidden_states(output)  # (batch, tokens, hidden)
        hidden = hidden + table[rows.tokens.long().to(table.device)].view(hidden.shape)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return add


class Steering:
    """What `with steer(...) as steering` gives: change profiles or rows between two generate() calls."""

    def __init__(self, tables: Tables, mlps, rows: Rows):
        self.tables, self.mlps, self.rows, self.hooks = tables, mlps, rows, []

    def update(self, profiles) -> None:
        """Other profiles, as many as before. Edits of neurons swap under a captured graph too; residual vectors don't."""
        profiles = as_list(profiles)
        residual = residual_tables(self.mlps, profiles)  # a refused update changes nothing
        self.tables.fill(profiles)
        self.hook(residual)

    def hook(self, residual: dict) -> None:
        """Put on the hooks of these residual tables, in the place of those that are on."""
        while self.hooks:
            self.hooks.pop().remove()
        blocks = {mlp.layer: mlp.block for mlp in self.mlps}
        self.hooks = [blocks[layer].register_forward_hook(adding(table, self.rows)) for layer, table in residual.items()]

    def assign(self, rows) -> None:
        self.rows.assign(rows)


def as_list(profiles) -> list[Profile]:
    profiles = list(profiles) if isinstance(profiles, Iterable) else [profiles]
    for profile in profiles:
        if not isinstance(profile, Profile):
            raise UserError(f"profiles: expected Profile objects, got {type(profile).__name__}")
    return profiles


@contextlib.contextmanager
def steer(model, profiles, rows=None, where="generated", keep: float = 1.0, seed: int = 0, capacity: int | None = None):
    """Edit the model's neurons while it runs: `with steer(model, profile): model.generate(...)`. Afterwards, also after an
    exception, the model is untouched. Its weights never change: save_pretrained() writes the unedited model, personality/bake.py an
    edited one. Gives a Steering, whose update() and assign() change profiles and rows. Where another thread is in generate() at the
    end of the with, it is waited for; a second steer() of the model is refused.

    profiles: one Profile or a list. rows: for each prompt of the batch 0 (no edit) or the number, from 1, of its profile;
    None: all have the one profile, or prompt i has profile i + 1. where: "generated" (positions whose input is a generated
    token, as in NPTI), "all" (also the prompt, and forwards outside generate()), a bool tensor (rows, tokens), or an engine's
    function of a forward's rows and tokens, which gives an int32 number, as in rows, for each token (see rows.Rows).
    keep < 1 raises only a random share of each layer's neurons, redrawn at every step, as NPTI's release does with 0.9.
    capacity: room for edits, if larger profiles are to follow by update().
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep: expected a number above 0, at most 1, got {keep}")
    profiles, mlps = as_list(profiles), find_mlps(model)
    tables = Tables(profiles, mlps, capacity)
    rows = Rows(rows, len(profiles), 0, where, tables.held, tables.edits)
    steering, residual = Steering(tables, mlps, rows), residual_tables(mlps, profiles)
    if keep < 1:
        rows.before_decode = functools.partial(tables.thin, keep, torch.Generator().manual_seed(seed))
        rows.before_decode()
    try:
        steering.hook(residual)
        with patched(model, "steered", rows):
            yield steering
    finally:
        steering.hook({})
