"""What steered and observed models are held against: plain PyTorch, by forward hooks. And what the tests of them share."""

import contextlib
import functools
import math

import torch

from conftest import prompts, tiny
from personality.op import op
from personality.steer import Profile

op()
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
shared = functools.cache(tiny)  # for tests that leave the model as it was, which all of them must


def random_profile(seed=0, number=24, strength=6.0, width=48, layers=2):
    """Random edits of every kind: caps, scales, shifts and biases."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(layers * width, generator=generator)[:number]
    value = torch.randn(number, 4, generator=generator) * torch.tensor([0.2, 0.5, strength, 1.0])
    value[: number // 2, 0], value[number // 3:, 1], value[::3, 3] = math.inf, 1.0, 0.0
    return Profile(at // width, at % width, value)


def shifts(layer, index, shift, name=""):
    value = torch.tensor([math.inf, 1.0, 0.0, 0.0]).repeat(len(layer), 1)
    value[:, 2] = torch.tensor(shift)
    return Profile(torch.tensor(layer), torch.tensor(index), value, name)


def write(model, tokens=5, ends=False, **options):
    """generate(), greedy and of a fixed length unless options say otherwise."""
    fixed = {} if ends else {"min_new_tokens": tokens}
    options = {**prompts(), "max_new_tokens": tokens, "do_sample": False, **fixed, **options}
    return model.generate(**options)


def with_logits(model, **options):
    """(tokens, logits (steps, rows, vocabulary))."""
    output = write(model, return_dict_in_generate=True, output_logits=True, **options)
    return output.sequences, torch.stack(output.logits)


def mlp_modules(model):
    return [module for name, module in model.named_modules() if name.endswith(".mlp")]


def part(mlp, *names):
    return next(getattr(mlp, name) for name in names if hasattr(mlp, name))


def decoding(rows):
    """The profile of every token of a forward of generate(): none in the first one, which is the prompt's."""
    def number(call, batch, tokens):
        return (torch.tensor(rows).repeat_interleave(batch // len(rows))[:, None] * (call > 0)).expand(batch, tokens)
    return number


@contextlib.contextmanager
def hooks(model, profiles=(), number=decoding([1])):
    """Forward hooks on an unpatched model that edit as the contract says, and record by layer the activations and products
    of every forward: yields (activations, products)."""
    mlps = mlp_modules(model)
    activations, products, handles = [[] for _ in mlps], [[] for _ in mlps], []

    def edits(layer, which):
        for k, profile in enumerate(profiles, 1):
            for j in (profile.layer == layer).nonzero().flatten().tolist():
                yield which == k, int(profile.index[j]), profile.value[j].tolist()

    def on_act(layer):
        def hook(module, args, output):
            which = number(len(activations[layer]), *output.shape[:2])
            activations[layer].append(output.clone())
            edited = output.clone()
            for mask, index, (cap, scale, shift, _) in edits(layer, which):
                a = edited[..., index]
                edited[..., index] = torch.where(mask, scale * a.clamp(max=cap) + shift, a)
            return edited
        return hook

    def on_down(layer):
        def hook(module, args):
            which = number(len(products[layer]), *args[0].shape[:2])
            products[layer].append(args[0].clone())
            edited = args[0].clone()
            for mask, index, (_, _, _, bias) in edits(layer, which):
                edited[..., index] += bias * mask
            return (edited,)
        return hook

    for layer, mlp in enumerate(mlps):
        handles.append(part(mlp, "act_fn", "activation_fn", "act").register_forward_hook(on_act(layer)))
        handles.append(part(mlp, "down_proj", "c_proj").register_forward_pre_hook(on_down(layer)))
    try:
        with torch.no_grad():
            yield activations, products
    finally:
        for handle in handles:
            handle.remove()


def close(ours, theirs, tolerance=1e-4):
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def state_of(model):
    """All that patching could leave behind: attributes of every module, its hooks, and whether it trains."""
    return {name: (set(module.__dict__), module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
                   len(module._forward_hooks_with_kwargs), len(module._forward_pre_hooks_with_kwargs),
                   module.__dict__.get("forward"), module.__dict__.get("generate"))
            for name, module in model.named_modules()}
