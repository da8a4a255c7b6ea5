"""Activation statistics while a model runs: how often, and how strongly, every MLP neuron fires (NPTI, section 3.2)."""

import torch

from . import POLES
from .mlp import Site, find_mlps, shape_of
from .op import SiteTensors, op
from .rows import Rows, patched
from .terminal import UserError

# tokens that an expert must have seen of each group: the difference of two prob is then off by 0.025 at most (one standard
# error), a quarter of the 0.1 that NPTI asks for; with fewer, experts that are seldom asked would win by chance
FEWEST = 800
# experts whose bins wait in one ring, on a CPU: it takes 1 KiB for each neuron of one of them. A ring of their own each would be
# that much more memory, and hardly faster
SHARE_A_RING = 4


def groups_of(items: list[dict]) -> list[int]:
    """The group of each answer: its pole's."""
    return [POLES.index(item["pole"]) for item in items]


def shapes_at(site: Site, groups: int) -> list[tuple]:
    """(shape, dtype) of what is kept of a site: count, sketch, moments and, on a CPU, pending."""
    many, width = groups * site.experts, site.width
    shapes = [((many, width), torch.int32), ((many, width, op().bins), torch.int32), ((many, 2, width), torch.float64)]
    if site.device.type == "cpu":
        shapes.append(((-(-site.experts // SHARE_A_RING), -(-width // op().tile), op().pending_bytes), torch.uint8))
    return shapes


class Statistics:
    """What fired how often and how strongly, for G groups of tokens (identify.py: group 0 is the high pole, 1 the low one).

    sites[i]: of the MLPs of find_mlps(), count int32 (G, d_ff), of activations > 0; sketch int32 (G, d_ff, bins), of their sizes;
    moments float64 (G, 2, d_ff), sum and sum of squares of the product act(gate) * up; on a CPU also pending, the bins that the
    sketch has yet to count: flush() before you read them. Of experts, each of which has a group of its own for each of G, they are
    (G * experts, d_expert ...). tokens: int64 (G). seen[i]: int64 (1 + G * experts), tokens that came by each expert, after those
    that are not observed. Shards of the questions add up.
    """

    def __init__(self, sites: list[Site], groups: int = 1):
        self.layout, self.groups = sites, groups
        self.held = SiteTensors([shapes_at(site, groups) for site in sites], [site.device for site in sites])
        self.sites = self.held.each
        self.seen = {number: torch.zeros(1 + groups * site.experts, dtype=torch.int64, device=site.device)
                     for number, site in enumerate(sites) if site.experts > 1}
        self.tokens = torch.zeros(groups, dtype=torch.int64, device=sites[0].device)
        self.range = torch.arange(groups, dtype=torch.int32, device=sites[0].device)
        for tensor in (*self.seen.values(), self.tokens):
            torch._dynamo.mark_static_address(tensor)

    @classmethod
    def of(cls, model, groups: int = 1) -> "Statistics":
        return cls(find_mlps(model), groups)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple:
        """All that it keeps, what is pending as well."""
        return (*(tensor for site in self.sites for tensor in site), *self.seen.values(), self.tokens)

    def flush(self) -> "Statistics":
        """Count what is pending: on a CPU some 500 tokens are counted at once, which is faster."""
        for count, sketch, _, *pending in self.sites:
            if pending:
                torch.ops.neurons.flush_(count, sketch, *pending)
        return self

    def count_tokens(self, token_group) -> None:
        self.tokens += (token_group.to(self.tokens.device)[:, None] == self.range).sum(0)

    def count_routed(self, site: int, numbers) -> None:
        """numbers: int32 (n), the group of each row of the experts of a site, or -1."""
        self.seen[site].index_add_(0, numbers + 1, torch.ones_like(numbers, dtype=torch.int64))

    def state(self) -> dict:
        """The tensors that hold all of it, by name."""
        sites = enumerate(self.flush().sites)
        return {"tokens": self.tokens, **{f"seen.{number:03}": seen for number, seen in self.seen.items()},
                **{f"{name}.{number:03}": tensor for number, site in sites
                   for name, tensor in zip(("count", "sketch", "moments"), site)}}

    def load(self, state: dict) -> None:
        """Take over what state() gave."""
        own = self.state()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise UserError("statistics: saved for a model of another shape")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def add(self, other: "Statistics") -> None:
        other = other.state()
        for name, tensor in self.state().items():
            tensor += other[name].to(tensor.device)

    def zero(self) -> None:
        for tensor in self.state().values():
            tensor.zero_()

    def broken_layer(self) -> int | None:
        """The first layer that saw a NaN or an infinity."""
        broken = torch.stack([~moments.isfinite().all().to(self.tokens.device) for _, _, moments, *_ in self.sites]).nonzero()
        return self.layout[int(broken[0])].layer if len(broken) else None

    def tokens_of(self, number: int):
        """int64 (G * experts): how many tokens the neurons of a site were counted on."""
        return (self.seen[number][1:] if number in self.seen else self.tokens).cpu()

    def percentile(self, q: float):
        """float32 (G, layers, d_ff): the smallest activation that at least a share q of the counted tokens do not exceed,
        within 2 % (the sketch's bins) on [2^-11, 2^6]; 0 where it is not positive."""
        edges = torch.tensor(op().edges)
        values = 2 * edges[:-1] * edges[1:] / (edges[:-1] + edges[1:])  # equally far, relatively, from both edges
        result = []
        for number, (count, sketch, *_) in enumerate(self.flush().sites):
            tokens = self.tokens_of(number)[:, None]
            rank = torch.ceil(q * tokens.double()).clamp(min=1)
            below = tokens - count.cpu()  # not positive
            bins = (below[..., None] + sketch.cpu().cumsum(-1) < rank[..., None]).sum(-1).clamp(max=len(values) - 1)
            result.append(torch.where(rank <= below, 0.0, values[bins]))
        return self.by_layer(result)

    def by_layer(self, parts: list):
        """(G, layers, d_ff) from what each site has, (G * experts, d_expert); 0 where there is no neuron here."""
        grid = torch.zeros((self.groups, *shape_of(self.layout)), dtype=parts[0].dtype)
        for site, part in zip(self.layout, parts):
            grid[:, site.layer, site.begin:site.begin + site.neurons] = part.reshape(self.groups, -1)
        return grid

    def summary(self, place: int = 0) -> dict:
        """The tensors of the neuron file, (G, layers, d_ff) each: prob, p50, p95, p99, mean, variance. Where not all neurons were
        counted on the same tokens, also seen: on how many. Experts that saw fewer than FEWEST have no statistics, all are 0. place:
        of this process among those that hold the model together; what all of them have is left out but in the first."""
        tokens = [self.tokens_of(number)[:, None] for number in range(len(self.sites))]
        counted = [number.double().clamp(min=1) for number in tokens]
        totals, squares = zip(*(moments.cpu().unbind(1) for _, _, moments, *_ in self.flush().sites))
        count, total, square = ([part.cpu() / of for part, of in zip(parts, counted)]
                                for parts in ([count for count, *_ in self.sites], totals, squares))
        prob, mean, mean_square = map(self.by_layer, (count, total, square))
        tensors = {"prob": prob.float(), "p50": self.percentile(0.5).half(), "p95": self.percentile(0.95),
                   "p99": self.percentile(0.99).half(), "mean": mean.float(),
                   "variance": (mean_square - mean ** 2).clamp(min=0).float()}
        if len({(site.first, site.end) for site in self.layout}) > 1 or self.seen:
            seen = self.by_layer([of.expand(-1, site.width) for of, site in zip(tokens, self.layout)])
            few = self.by_layer([((of < FEWEST) & (site.experts > 1)).expand(-1, site.width)
                              for of, site in zip(tokens, self.layout)]).any(0)
            tensors = {"seen": seen.int(), **{name: tensor.masked_fill(few, 0) for name, tensor in tensors.items()}}
        for site in self.layout if place else ():
            for tensor in tensors.values() if site.whole else ():
                tensor[:, site.layer, site.first:site.end] = 0
        return tensors


def observe(model, statistics: Statistics, groups=None, where="generated"):
    """Gather statistics while the model runs: `with observe(model, statistics): model.generate(...)`.

    groups: the group of each prompt (-1: not observed); None: group 0, or prompt i in group i where there are several. where:
    which tokens, see Rows. The statistics are of the unedited activations, also while steering. """
    rows = Rows(groups, statistics.groups, -1, where, statistics.held, {})
    rows.on_map, rows.on_routed = statistics.count_tokens, statistics.count_routed
    return patched(model, "observed", rows)
