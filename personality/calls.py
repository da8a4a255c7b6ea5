"""Calls of generate(): what they ask for, and what is refused while a model is steered or observed."""

import inspect
import sys

import torch
from transformers import GenerationMixin

from .terminal import UserError


def cached(kwargs) -> int:
    """Tokens that a call's cache holds already."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # since transformers 5.24, and before
    return 0 if cache is None else int(cache.get_seq_length())


def inside_generate(model) -> bool:
    """Whether a model's generate() is on the stack, whatever wraps it."""
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, sys._getframe(1)
    while frame and not (frame.f_code is code and frame.f_locals.get("self") is model):
        frame = frame.f_back
    return frame is not None


def option_of(model, kwargs, name: str):
    """An option as generate() looks it up: what is not given is the model's own."""
    configs = (kwargs.get("generation_config"), model.generation_config)
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def refuse_batching(*args, **kwargs):
    raise UserError("generate_batch() and continuous batching mix the rows of a batch: not supported while steering or observing")


def refuse_mixing(option) -> None:
    assisted = option("assistant_model") is not None or option("prompt_lookup_num_tokens")
    guided = option("guidance_scale") not in (None, 1)
    for applies, what in ((assisted, "assisted decoding mixes the rows of a batch"),
                          (option("use_cache") is False, "generate(use_cache=False) feeds every token again at every step"),
                          (guided, "classifier-free guidance calls the model inside its own generate()")):
        if applies:
            raise UserError(f"{what}: not supported while steering or observing")


def prompt_of(kwargs, option):
    """(the prompt's mask (rows, tokens), the end tokens) of a call of generate()."""
    prompt = next((kwargs[name] for name in ("inputs_embeds", "inputs", "input_ids") if kwargs.get(name) is not None), None)
    if prompt is None:
        raise UserError("generate(): expected input_ids or inputs_embeds")
    mask, pad, ends = kwargs.get("attention_mask"), option("pad_token_id"), option("eos_token_id")
    ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=prompt.device).flatten()
    if mask is None:  # as generate() does it
        padded = prompt.dim() == 2 and pad is not None and pad not in ends.tolist()
        mask = prompt != pad if padded else torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
    return mask, ends
