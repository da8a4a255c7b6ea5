"""Activation statistics while a model runs: how often, and how strongly, every MLP neuron fires (NPTI, section 3.2)."""

import torch

from .mlp import find_mlps
from .op import op
from .rows import Rows, patched
from .terminal import UserError


class Statistics:
    """What fired how often and how strongly, for G groups of tokens (identify.py: group 0 is the high pole, 1 the low one).

    layers[l]: count int32 (G, d_ff), of activations > 0; sketch int32 (G, d_ff, bins), of their sizes; moments float64
    (G, 2, d_ff), sum and sum of squares of the product act(gate) * up; on a CPU also pending, the bins that the sketch has yet to
    count: flush() before you read them. tokens: int64 (G). Shards of the questions add up.
    """

    def __init__(self, depth: int, width: int, groups: int = 1, device="cpu"):
        self.groups = groups
        shapes = [((groups, width), torch.int32), ((groups, width, op().bins), torch.int32), ((groups, 2, width), torch.float64)]
        if torch.device(device).type == "cpu":
            shapes.append(((-(-width // op().tile), op().pending_bytes), torch.uint8))
        self.layers = [tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes) for _ in range(depth)]
        self.tokens = torch.zeros(groups, dtype=torch.int64, device=device)
        self.range = torch.arange(groups, dtype=torch.int32, device=device)
        for tensor in (*(tensor for layer in self.layers for tensor in layer), self.tokens):
            torch._dynamo.mark_static_address(tensor)  # else compiled code that writes them can't use CUDA graphs

    @classmethod
    def of(cls, model, groups: int = 1) -> "Statistics":
        mlps = find_mlps(model)
        return cls(len(mlps), mlps[0].width, groups, mlps[0].gate.weight.device)

    def flush(self) -> "Statistics":
        """Count what is pending: on a CPU some 500 tokens are counted at once, which is faster."""
        for count, sketch, _, *pending in self.layers:
            if pending:
                torch.ops.neurons.flush_(count, sketch, *pending)
        return self

    def count_tokens(self, token_group) -> None:
        self.tokens += (token_group[:, None] == self.range).sum(0)

    def state(self) -> dict:
        """The tensors that hold all of it, by name."""
        layers = enumerate(self.flush().layers)
        return {"tokens": self.tokens, **{f"{name}.{number:03}": tensor for number, layer in layers
                                          for name, tensor in zip(("count", "sketch", "moments"), layer)}}

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
        broken = torch.stack([~moments.isfinite().all() for _, _, moments, *_ in self.layers]).nonzero()
        return int(broken[0]) if len(broken) else None

    def percentile(self, q: float):
        """float32 (G, layers, d_ff): the smallest activation that at least a share q of the counted tokens do not exceed,
        within 2 % (the sketch's bins) on [2^-11, 2^6]; 0 where it is not positive."""
        edges = torch.tensor(op().edges)
        values = 2 * edges[:-1] * edges[1:] / (edges[:-1] + edges[1:])  # equally far, relatively, from both edges
        tokens, result = self.tokens.cpu()[:, None], []
        rank = torch.ceil(q * tokens.double()).clamp(min=1)
        for count, sketch, *_ in self.flush().layers:
            below = tokens - count.cpu()  # not positive
            bins = (below[..., None] + sketch.cpu().cumsum(-1) < rank[..., None]).sum(-1).clamp(max=len(values) - 1)
            result.append(torch.where(rank <= below, 0.0, values[bins]))
        return torch.stack(result, 1)

    def summary(self) -> dict:
        """The tensors of the neuron file, (G, layers, d_ff) each: prob, p50, p95, p99, mean, variance."""
        tokens = self.tokens.cpu().double().clamp(min=1)[:, None, None]
        count = torch.stack([count.cpu() for count, *_ in self.flush().layers], 1)
        total, squares = torch.stack([moments.cpu() for _, _, moments, *_ in self.layers], 2).unbind(1)  # (G, layers, d_ff)
        mean = total / tokens
        return {"prob": (count / tokens).float(), "p50": self.percentile(0.5).half(), "p95": self.percentile(0.95),
                "p99": self.percentile(0.99).half(), "mean": mean.float(),
                "variance": (squares / tokens - mean ** 2).clamp(min=0).float()}


def observe(model, statistics: Statistics, groups=None, where="generated"):
    """Gather statistics while the model runs: `with observe(model, statistics): model.generate(...)`.

    groups: the group of each prompt (-1: not observed); None: group 0, or prompt i in group i where there are several. where:
    which tokens, see Rows. The statistics are of the unedited activations, also while steering. """
    rows = Rows(groups, statistics.groups, -1, where, statistics.layers)
    rows.on_map = statistics.count_tokens
    return patched(model, "observed", rows)
