"""A model's MLPs, and their forward through the op. Knows nothing of generate(): any engine that runs the modules can use it.

A gated MLP is down(act(gate(x)) * up(x)). A neuron is one column of gate: (layer, index).
"""

import re
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .op import op
from .terminal import UserError


@dataclass
class Mlp:
    """One decoder layer's MLP. gate and up are projections to (..., width); up is None in a non-gated MLP, and the gate
    itself where gate holds both halves."""

    name: str
    layer: object  # the decoder layer that it is part of
    module: object
    gate: object
    up: object
    down: object
    act_module: object
    act: int  # the op's number of the activation
    width: int  # d_ff
    dropout: object

    @property
    def hidden(self) -> int:
        """Numbers that go in, and come out, for a token."""
        return self.gate.weight.numel() // (self.width * (2 if self.up is self.gate else 1))


# Names under which families keep gate, up and down. What a module computes is not read off its name: compare() runs it.
NAMES = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "gate_up_proj", "down_proj"), ("w1", "w3", "w2"),
         ("c_fc", None, "c_proj"), ("fc1", None, "fc2"), ("dense_h_to_4h", None, "dense_4h_to_h"),
         ("up_proj", None, "down_proj"))
ACT_NAMES = ("act_fn", "activation_fn", "act", "activation", "hidden_act")


def decoder_of(model):
    return getattr(model, "get_decoder", lambda: model)() or model


def find_mlps(model) -> list[Mlp]:
    """The MLP of every decoder layer, by structure: a direct child of the layer with projections and an activation."""
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{kind}: encoder-decoder models are not supported")
    stacks = [module for module in decoder_of(model).modules() if type(module).__name__ == "ModuleList" and len(module) > 0]
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stack = next((module for module in stacks if len(module) == depth), None) or max(stacks, key=len, default=[])
    mlps, others = [], {}
    for number, layer in enumerate(stack):
        children = dict(layer.named_children())
        mixed = [name for name in children if re.search("moe|experts|router", name)]
        if mixed:  # beside a plain MLP, as Gemma 4 has them
            raise UserError(f"{kind}: layer {number} has {', '.join(mixed)}: mixtures of experts are not supported")
        here = [mlp for name, module in children.items() if (mlp := as_mlp(f"layer {number}, {name}", layer, module))]
        mlps += here[:1]
        others |= {type(module).__name__: [child for child, _ in module.named_children()] for name, module in children.items()
                   if not here and re.search("mlp|ffn|feed_forward", name)}
    if not mlps:
        known = [[name for name in names if name] for names in NAMES]
        raise UserError(f"{kind}: no MLP of a known structure among its {len(stack)} layers; saw "
                        f"{others or 'no module named mlp'}; known: {known}")
    if len(mlps) < len(stack):
        raise UserError(f"{kind}: only {len(mlps)} of {len(stack)} layers have a plain MLP, the others hold {others}")
    widths = sorted({mlp.width for mlp in mlps})
    if len(widths) > 1:
        raise UserError(f"{kind}: layers of different widths {widths} are not supported")
    return mlps


def as_mlp(name: str, layer, module) -> Mlp | None:
    for names in NAMES:
        parts = {part: getattr(module, part, None) for part in names if part}
        if not all(hasattr(part, "weight") for part in parts.values()):
            continue
        gate, up, down = map(parts.get, names)
        for function in (getattr(module, act_name, None) for act_name in ACT_NAMES):
            act = which_act(function)
            if act is not None:  # down's weight is (hidden, d_ff); Conv1D, as in GPT-2, has it transposed
                width = down.weight.shape[0 if type(down).__name__ == "Conv1D" else 1]
                return Mlp(name, layer, module, gate, up, down, function, act, width, getattr(module, "dropout", None))
    return None


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


def through_op(mlp: Mlp, index: int, arguments):
    """The MLP's forward through the op, which overwrites gate: nothing reads it afterwards. arguments(index): what the op takes
    after act, for this layer and the forward that runs."""
    op()
    glu_, fused, width = torch.ops.neurons.glu_, mlp.up is mlp.gate, mlp.width

    def forward(x):
        gate = mlp.gate(x)  # (batch, tokens, d_ff), or 2 d_ff where fused
        if fused:
            gate, up = gate[..., :width], gate[..., width:]
        else:
            up = mlp.up(x) if mlp.up is not None else None
        if not torch.compiler.is_compiling():
            refuse_hooks(mlp)
        # view, never a copy: what the op writes must reach down()
        glu_(gate.view(-1, width), None if up is None else up.view(-1, width), mlp.act, *arguments(index))
        y = mlp.down(gate)  # (batch, tokens, hidden)
        return y if mlp.dropout is None else mlp.dropout(y)

    return forward


def refuse_hooks(mlp: Mlp) -> None:
    """Another tool's hook on the activation would never fire, and one on gate would see overwritten data."""
    for part in (mlp.act_module, mlp.gate):
        if getattr(part, "_forward_hooks", None) or getattr(part, "_forward_pre_hooks", None):
            raise RuntimeError(f"{mlp.name}: {type(part).__name__} has a forward hook, which can't work while the model is "
                               "patched: remove the hook, or leave steer() / observe() first (down_proj can be hooked)")


def compare(mlp: Mlp, forward) -> None:
    """Families share attribute names with different mathematics; so both forwards must agree on a random vector."""
    what, weight = f"{mlp.name} ({type(mlp.module).__name__})", mlp.gate.weight
    x = torch.randn((1, 2, mlp.hidden), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    modes = [(module, module.training) for module in mlp.module.modules()]
    try:
        with torch.no_grad():
            mlp.module.eval()
            own, ours = mlp.module.forward(x), forward(x)
    except UserError:
        raise
    except (TypeError, RuntimeError, ValueError, IndexError) as error:  # it takes more than x, say
        if "hook" in str(error):
            raise
        raise UserError(f"{what} can't be called as down(act(gate(x)) * up(x)): {error}") from error
    finally:
        for module, training in modes:
            module.training = training
    apart = 1.0
    if own.shape == ours.shape:
        apart = float((own - ours).float().abs().max() / own.float().abs().max().clamp_min(1e-9))
    # broken weights, which give no finite number either way, are for identify's own check to report
    if not apart < (1e-3 if own.dtype == torch.float32 else 5e-2) and bool(own.isfinite().all()):
        raise UserError(f"{what} is not down(act(gate) * up): its own result and ours differ by {apart:.0%} on a random vector, so "
                        "its neurons can't be edited by this tool")
