"""A model's MLPs, and their forward through the op. Knows nothing of generate(): any engine that runs the modules can use it.

A gated MLP is down(act(gate(x)) * up(x)). A neuron is one column of gate: (layer, index). In a layer of experts, each of which is
such an MLP for the tokens that are routed to it, neuron j of expert e has the index e * d_expert + j; shared experts come after
them. Layers may be of different widths: the indices of a narrow one just end earlier.
"""

import re
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .op import op
from .terminal import UserError


@dataclass(kw_only=True)
class Site:
    """Neurons of one decoder layer that are computed together: those of an MLP, or of a layer's experts. In the layer they have
    the numbers begin + expert * width + column."""

    layer: int  # the layer's number
    width: int  # neurons of an expert; of an MLP that several processes share, those that are here
    first: int = 0  # in the layer: the number of its first neuron, and of the one after its last (end), on whichever process
    end: int = 0
    offset: int = 0  # neurons between that and the first one that this process has
    experts: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def begin(self) -> int:
        """The number of the first neuron here."""
        return self.first + self.offset

    @property
    def whole(self) -> bool:
        """Whether all of it is here."""
        return self.neurons == self.end - self.first

    @property
    def neurons(self) -> int:
        """How many this process has."""
        return self.experts * self.width


def plain_sites(depth: int, width: int, device="cpu") -> list[Site]:
    """Those of a model with one plain MLP a layer."""
    return [Site(layer=layer, width=width, end=width, device=torch.device(device)) for layer in range(depth)]


def shape_of(sites: list[Site]) -> tuple[int, int]:
    """(layers, d_ff): d_ff is the widest layer's number of neurons, all experts together."""
    return max(site.layer for site in sites) + 1, max(site.end for site in sites)


class Routed(NamedTuple):
    """Which token (int64 (n)) and expert (int64 (n), ascending) each row of an experts' gate is of; tokens of the forward; experts
    of the layer."""

    token: torch.Tensor
    expert: torch.Tensor
    tokens: int
    experts: int


@dataclass(kw_only=True)
class Mlp(Site):
    """The MLP of a decoder layer. gate and up are projections to (..., width); up is None in a non-gated MLP, and the gate itself
    where gate holds both halves."""

    name: str
    block: object  # the decoder layer that it is part of
    module: object
    gate: object
    up: object
    down: object
    act_module: object
    act: int  # the op's number of the activation
    dropout: object
    hidden: int  # numbers that go in, and come out, for a token
    dtype: torch.dtype  # of what goes in

    def through(self, middle):
        """Its forward with middle(gate, up, routed) in the place of act(gate) * up. routed: None, or of an experts' rows."""
        # none of them is read off self in a forward: compiled code checks, in each layer, all that a forward reads
        gate, up, down, dropout, width = self.gate, self.up, self.down, self.dropout, self.width

        def gated(x):
            return down(middle(gate(x), up(x), None))  # (batch, tokens, hidden), of two (batch, tokens, d_ff)

        def fused(x):
            both = gate(x)  # (batch, tokens, 2 d_ff)
            return down(middle(both[..., :width], both[..., width:], None))

        def alone(x):
            return down(middle(gate(x), None, None))

        forward = alone if up is None else fused if up is gate else gated
        return forward if dropout is None else lambda x: dropout(forward(x))

    def probe(self) -> tuple:
        """A random input."""
        return torch.randn((1, 2, self.hidden), generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype),


class Experts(Mlp):
    """A layer's routed experts, as transformers' experts interface has them: gate_up_proj (experts, 2 width, hidden) and
    down_proj (experts, hidden, width) in one module. Its forward here is the interface's grouped_mm."""

    def through(self, middle):
        from transformers.integrations.moe import _grouped_linear

        module, width, experts = self.module, self.width, self.experts

        def forward(hidden_states, top_k_index, top_k_weights):
            most = top_k_index.shape[-1]
            expert, order = torch.sort(top_k_index.flatten(), stable=True)  # (n): each token once for each of its experts
            token = order // most
            ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True).int()

            def linear(x, name):
                bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
                return _grouped_linear(x, getattr(module, name), ends, bias, module.is_transposed)

            gate = linear(hidden_states[token], self.gate)  # (n, 2 width), or width
            gate, up = (gate[:, :width], gate[:, width:]) if module.has_gate else (gate, None)
            product = middle(gate, up, Routed(token, expert, len(hidden_states), experts))
            said = linear(product, self.down) * top_k_weights.flatten()[order, None]  # (n, hidden)
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            return said[back].view(-1, most, said.shape[-1]).sum(1).to(hidden_states.dtype)

        return forward

    def probe(self) -> tuple:
        """Random hidden states, and a random routing that comes by every expert."""
        generator, most = torch.Generator().manual_seed(0), min(2, self.experts)
        x = torch.randn((self.experts, self.hidden), generator=generator).to(self.device, self.dtype)
        index = torch.stack([torch.randperm(self.experts, generator=generator) for _ in range(most)], 1)
        weights = torch.rand((self.experts, most), generator=generator)
        return x, index.to(self.device), weights.to(self.device, self.dtype)


# ------------------------------------------------------------------------------------------------------------- finding them

# Names under which families keep gate, up and down. What a module computes is not read off its name: compare() runs it.
NAMES = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "gate_up_proj", "down_proj"), ("w1", "w3", "w2"),
         ("c_fc", None, "c_proj"), ("fc1", None, "fc2"), ("dense_h_to_4h", None, "dense_4h_to_h"),
         ("up_proj", None, "down_proj"), ("fc_in", None, "fc_out"))
ACT_NAMES = ("act_fn", "activation_fn", "act", "activation", "hidden_act")
PARTS = "mlp|ffn|feed_forward|moe"  # what the part of a layer is called that has its MLPs


def decoder_of(model):
    return getattr(model, "get_decoder", lambda: model)() or model


def layers_of(model) -> list:
    """The decoder's layers."""
    stacks = [module for module in decoder_of(model).modules() if type(module).__name__ == "ModuleList" and len(module) > 0]
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return list(next((module for module in stacks if len(module) == depth), None) or max(stacks, key=len, default=[]))


def find_mlps(model) -> list[Mlp]:
    """The MLPs of all decoder layers, by structure: a direct child of the layer with projections and an activation, or with
    experts; or a child of such a child. In order of layer and first."""
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{kind}: encoder-decoder models are not supported")
    mlps, others, blocks = [], {}, layers_of(model)
    for number, block in enumerate(blocks):
        here = mlps_of(number, block)
        mlps += here
        others |= {type(module).__name__: [child for child, _ in module.named_children()] for name, module in block.named_children()
                   if not here and re.search(PARTS, name)}
    if not mlps:
        known = [[name for name in names if name] for names in NAMES]
        raise UserError(f"{kind}: no MLP of a known structure among its {len(blocks)} layers; saw "
                        f"{others or 'no module named mlp'}; known: {known}")
    known = len({mlp.layer for mlp in mlps})
    if known < len(blocks):
        raise UserError(f"{kind}: only {known} of {len(blocks)} layers have an MLP of a known structure, the others hold {others}")
    return mlps


def mlps_of(number: int, block) -> list[Mlp]:
    """Those of a layer, the routed experts first."""
    parts = dict(block.named_children())
    parts |= {f"{name}.{inner}": module for name, part in parts.items() if re.search(PARTS, name)
              for inner, module in part.named_children()}
    found = {name: mlp for name, module in parts.items()
             if (mlp := as_experts(f"layer {number}, {name}", block, module) or as_mlp(f"layer {number}, {name}", block, module))}
    for name, module in parts.items():
        if re.search("experts?$", name) and "shared" not in name and name not in found:
            raise UserError(f"layer {number}, {name} ({type(module).__name__}): not experts of transformers' experts interface, "
                            "each of them down(act(gate) * up), so their neurons can't be edited by this tool")
    first = 0
    for mlp in (mlps := sorted(found.values(), key=lambda mlp: not isinstance(mlp, Experts))):
        mlp.layer, mlp.first, mlp.end = number, first, first + mlp.end
        first = mlp.end
    return mlps


def as_mlp(name: str, block, module) -> Mlp | None:
    for names in NAMES:
        parts = {part: getattr(module, part, None) for part in names if part}
        if not all(map(is_linear, parts.values())):
            continue
        gate, up, down = map(parts.get, names)
        for function in (getattr(module, act_name, None) for act_name in ACT_NAMES):
            act = which_act(function)
            if act is not None:
                (width, hidden), (offset, here) = sizes(down), part_here(gate, up is gate)
                return Mlp(layer=0, width=here or width, offset=offset, end=width, device=device_of(gate), name=name, block=block,
                           module=module, gate=gate, up=up, down=down, act_module=function, act=act, hidden=hidden,
                           dropout=getattr(module, "dropout", None), dtype=dtype_of_activations(gate, block))
    return None


def as_experts(name: str, block, module) -> Experts | None:
    """Of a module of transformers' experts interface."""
    if not (hasattr(type(module), "_apply_gate") and hasattr(module, "has_gate")):
        return None
    gate = "gate_up_proj" if module.has_gate else "up_proj"
    weight, act = getattr(module, "down_proj", None), which_act(getattr(module, "act_fn", None))
    if act is None or not isinstance(weight, torch.nn.Parameter) or weight.dim() != 3 or not is_numbers(weight):
        return None
    if getattr(module, "_is_expert_parallel", False) or hasattr(weight, "device_mesh"):  # 5.17 has no such name
        raise UserError(f"{name}: experts that several processes share are not supported: one process, with --device-map auto "
                        "where one GPU is too small")
    experts, hidden, width = weight.shape if not module.is_transposed else (weight.shape[0], *weight.shape[:0:-1])
    return Experts(layer=0, width=width, experts=experts, end=experts * width, device=device_of(module), name=name, block=block,
                   module=module, gate=gate, up=None, down="down_proj", act_module=module.act_fn, act=act, dropout=None,
                   hidden=hidden, dtype=weight.dtype)


def is_linear(part) -> bool:
    """Whether it has sizes(); quantised layers may have no weight, or one of packed bits."""
    return hasattr(part, "in_features") or getattr(getattr(part, "weight", None), "ndim", 0) == 2


def sizes(linear) -> tuple[int, int]:
    """(numbers that go in, numbers that come out) for a token."""
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features
    return tuple(linear.weight.shape) if type(linear).__name__ == "Conv1D" else tuple(linear.weight.shape[::-1])  # as in GPT-2


LOCAL = weakref.WeakKeyDictionary()  # what part_here() found


def part_here(gate, fused: bool) -> tuple[int, int]:
    """(the number of the first neuron, how many there are) of a gate that several processes share; (0, 0) of one that is here
    alone. Told by what it returns: some plans share the weight, and gather what it gives."""
    weight = getattr(gate, "weight", None)
    if not hasattr(weight, "device_mesh"):
        return 0, 0
    if gate not in LOCAL:
        (hidden, full), mesh = sizes(gate), weight.device_mesh
        with torch.no_grad():
            width = gate(torch.zeros((1, hidden), device=device_of(gate), dtype=weight.dtype)).shape[-1]
        share = -(-full // mesh.size(mesh.ndim - 1))  # as torch.chunk has it: the last ones may be shorter
        first = 0 if width == full else min(full, share * mesh.get_local_rank(mesh.ndim - 1))
        LOCAL[gate] = tuple(number // 2 if fused else number for number in (first, width))
    return LOCAL[gate]


def device_of(module) -> torch.device:
    """Where a module computes: of a model that accelerate has spread, what it fetches the weights to."""
    hook = getattr(module, "_hf_hook", None)
    if getattr(hook, "offload", False):
        return torch.device(hook.execution_device)
    return next((tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors), torch.device("cpu"))


def dtype_of_activations(gate, block) -> torch.dtype:
    """What a gate takes: its weight's dtype, unless that is a code for other numbers."""
    return next((part.dtype for part in (getattr(gate, "weight", None), *block.parameters()) if is_numbers(part)), torch.float32)


def is_numbers(weight) -> bool:
    """Whether a tensor holds numbers, not packed bits or codes of 8 bits."""
    return torch.is_tensor(weight) and weight.is_floating_point() and weight.dtype.itemsize > 1


def which_act(function) -> int | None:
    """The op's number of an activation, told by its values; None for one that the op does not have."""
    x = torch.linspace(-6, 6, 1001)
    known = (F.silu(x), F.gelu(x), F.gelu(x, approximate="tanh"), F.relu(x))  # in the order of op().acts
    try:
        with torch.no_grad():
            y = function(x)
    except Exception:  # no function of one tensor
        return None
    return next((number for number, z in enumerate(known) if y.shape == z.shape and (y - z).abs().max() < 1e-5), None)


# ---------------------------------------------------------------------------------------------------------- through the op


ARGUMENTS = {}  # by a patch's number. A global: of an object that is reached in several ways, compiled code checks each


def through_op(mlp: Mlp, index: int, patch: int):
    """The MLP's forward through the op, which overwrites gate: nothing reads it afterwards. ARGUMENTS[patch](index, routed) are the
    op's after act, for this MLP and the forward that runs."""
    op()
    act = mlp.act  # as in through(), compiled code is to read little: not mlp, nor its width

    def middle(gate, up, routed):
        if not torch.compiler.is_compiling():
            refuse_hooks(mlp)
        shape = -1, gate.shape[-1]  # view, never a copy: what the op writes must reach down()
        torch.ops.neurons.glu_(gate.view(shape), None if up is None else up.view(shape), act, *ARGUMENTS[patch](index, routed))
        return gate

    return mlp.through(middle)


def refuse_hooks(mlp: Mlp) -> None:
    """Another tool's hook on the activation would never fire, and one on gate would see overwritten data."""
    for part in (mlp.act_module, mlp.gate):
        if getattr(part, "_forward_hooks", None) or getattr(part, "_forward_pre_hooks", None):
            raise RuntimeError(f"{mlp.name}: {type(part).__name__} has a forward hook, which can't work while the model is "
                               "patched: remove the hook, or leave steer() / observe() first (down_proj can be hooked)")


def compare(mlp: Mlp, forward) -> None:
    """Families share attribute names with different mathematics; so both forwards must agree on a random vector."""
    what, probe = f"{mlp.name} ({type(mlp.module).__name__})", mlp.probe()
    modes = [(module, module.training) for module in mlp.module.modules()]
    try:
        with torch.no_grad():
            mlp.module.eval()
            own, ours = mlp.module.forward(*probe), forward(*probe)
    except (TypeError, RuntimeError, ValueError, IndexError) as error:  # it takes more than x, say
        if isinstance(error, UserError) or "hook" in str(error):
            raise
        raise UserError(f"{what} can't be called as down(act(gate(x)) * up(x)): {error}") from error
    finally:
        for module, training in modes:
            module.training = training
    apart = float((own - ours).float().abs().max() / own.float().abs().max().clamp_min(1e-9)) if own.shape == ours.shape else 1.0
    # broken weights, which give no finite number either way, are for identify's own check to report
    if not apart < (1e-3 if own.dtype == torch.float32 else 5e-2) and bool(own.isfinite().all()):
        raise UserError(f"{what} is not down(act(gate) * up): its own result and ours differ by {apart:.0%} on a random vector, so "
                        "its neurons can't be edited by this tool")
