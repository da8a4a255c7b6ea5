"""An attention for continuous batching on a CPU, where transformers has none that is made for it."""

import contextlib
import functools

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def attend_by_row(module, query, key, value, attention_mask, scaling=None, cache=None, **kwargs):
    """An attention function of transformers for a CPU: in a batch of continuous batching each request looks at its own keys. (SDPA
    gets a mask over everyone's: 32 requests cost 32 times as much, and every step copies all keys and values.)

    query (1, heads, tokens, size); key, value (1, key heads, tokens, size): of all requests, one after the other."""
    if cache is None or kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None:
        if cache is not None:
            key, value = type(cache).update(cache, key, value, module.layer_idx, kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    pages, layer = cache.layer_to_allocator[module.layer_idx], module.layer_idx
    write, read = kwargs["write_index"][pages.index], kwargs["read_index"][pages.index]
    keys, values = pages._kv_token_views[layer]  # (places, key heads, size)
    keys.index_copy_(0, write, key[0].transpose(0, 1))
    values.index_copy_(0, write, value[0].transpose(0, 1))
    places, result, scores = read if len(read) else write, torch.empty_like(query), torch.nn.functional.scaled_dot_product_attention
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]  # (1, key heads, places, size)
    groups = (1, keys.shape[1], -1, query.shape[-1])  # heads that share keys, in the place of tokens
    ends = kwargs["cu_seq_lens_k"][pages.layer_type]
    new, old, begins = kwargs["cu_seq_lens_q"].tolist(), ends.tolist(), places[ends[:-1].long()].tolist()
    for begin, end, first, last, place in zip(new, new[1:], old, old[1:], begins):
        in_a_row = last - first <= pages.tokens_per_page
        where = slice(place, place + last - first) if in_a_row else places[first:last]
        own, asked = (keys[:, :, where], values[:, :, where]), query[:, :, begin:end]
        if end - begin == 1:  # three times as fast as enable_gqa
            said = scores(asked.view(groups), *own, scale=scaling)
        else:
            mask = attention_mask[..., begin:end, first:last] if end - begin < last - first else None
            said = scores(asked, *own, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
        result[:, :, begin:end] = said.view(asked.shape)
    return result.transpose(1, 2).contiguous(), None


def put_off(cache, key, value, layer, kwargs):
    """Stands for a cache's update(), which models of transformers 5.24 call before they attend, and which would copy everyone's
    keys and values. kwargs are those that the model then passes to the attention: so it gets the cache, as before 5.24."""
    kwargs["cache"] = cache
    return key, value


BY_ROW = "personality_by_row"
AttentionInterface.register(BY_ROW, attend_by_row)
AttentionMaskInterface.register(BY_ROW, sdpa_mask)


@contextlib.contextmanager
def attending_by_row(model, cache):
    """The model with that attention, where it can have it."""
    before = model.config._attn_implementation
    fit = (model.device.type == "cpu" and before == "sdpa" and list(cache.cache_allocators) == ["full_attention"]
           and all(hasattr(pages, "_kv_token_views") for pages in cache.cache_allocators.values()))
    if fit:
        model.set_attn_implementation(BY_ROW)
        cache.update = functools.partial(put_off, cache)
    try:
        yield
    finally:
        if fit:
            del cache.update
            model.set_attn_implementation(before)
