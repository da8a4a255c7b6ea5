"""steer() and observe() on tiny random models of each family: same mathematics, right tokens, nothing left behind."""

import contextlib
import functools
import itertools
import math
import warnings

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

from conftest import prompts, tiny
from identify import POLES, Neurons, Statistics, UserError, find_mlps, fingerprint, observe, op
from induce import Profile, Tables, npti, steer

op()
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
shared = functools.cache(tiny)  # for tests that leave the model as it was, which all of them must


def profile(seed=0, number=24, strength=6.0, width=48, layers=2):
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
        for k, one in enumerate(profiles, 1):
            for j in (one.layer == layer).nonzero().flatten().tolist():
                yield which == k, int(one.index[j]), one.value[j].tolist()

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


# ------------------------------------------------------------------------------------------------------ each family


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_model_computes_the_same(family):
    model, x = shared(family), prompts()
    expected = model(**x).logits
    ids, logits = with_logits(model)
    statistics = Statistics.of(model)
    with observe(model, statistics, where="all"):
        assert close(model(**x).logits, expected, 2e-5)
        ours, ours_logits = with_logits(model)
    assert statistics.tokens.item() == 2 * x["attention_mask"].sum() + 4 * 4
    assert torch.equal(ours, ids) and close(ours_logits, logits, 2e-5)
    assert torch.equal(model(**x).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_hooks(family):
    """Two groups, rows that end at different steps; counted are generated tokens that were fed, the end token never."""
    model, length = shared(family), prompts()["input_ids"].shape[1]
    end = int(write(model, 7)[1, length + 2])
    with hooks(model) as (activations, products):
        plain = write(model, 7, ends=True, eos_token_id=end)
    statistics = Statistics.of(model, 2)
    with observe(model, statistics, [0, 1, 1, 0]):
        assert torch.equal(write(model, 7, ends=True, eos_token_id=end), plain)
    new = plain[:, length:]
    fed = ((new == end).cumsum(1) == 0)[:, :-1]  # (rows, steps)
    assert statistics.tokens.tolist() == [int(fed[[0, 3]].sum()), int(fed[[1, 2]].sum())]
    assert 0 < fed.sum() < fed.numel()
    for (count, sketch, moments), a, h in zip(statistics.layers, activations, products, strict=True):
        a, h = torch.cat(a[1:], 1), torch.cat(h[1:], 1).double()  # (rows, steps, d_ff)
        for group, rows in enumerate(([0, 3], [1, 2])):
            assert torch.equal(count[group], (a[rows] > 0)[fed[rows]].sum(0).int())
            assert torch.equal(sketch[group].sum(-1), count[group])
            mine = h[rows][fed[rows]]
            assert close(moments[group, 0], mine.sum(0)) and close(moments[group, 1], (mine ** 2).sum(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_edit_equals_hooks(family):
    """cap, scale, shift and bias, two profiles in a batch, on the whole prompt and while generating."""
    model, x, profiles, rows = shared(family), prompts(), [profile(1), profile(2)], [1, 2, 0, 1]
    plain = model(**x).logits
    of_mask = lambda call, batch, tokens: torch.tensor(rows)[:, None] * x["attention_mask"]  # noqa: E731
    with hooks(model, profiles, of_mask):
        expected = model(**x).logits
    with steer(model, profiles, rows, where="all"):
        ours = model(**x).logits
    real = x["attention_mask"].bool()
    assert close(ours[real], expected[real])
    assert (ours - plain)[[0, 1, 3], -1].abs().amax(1).min() > 0.05 and close(ours[2][real[2]], plain[2][real[2]])
    with hooks(model, profiles, decoding(rows)):
        expected, expected_logits = with_logits(model)
    with steer(model, profiles, rows):
        ours, logits = with_logits(model)
    assert torch.equal(ours, expected) and close(logits, expected_logits)


def test_statistics_are_of_unedited_activations():
    """While a layer's neurons are edited, what is observed of them is what its hook sees before the edit."""
    model, edits = shared("llama"), profile(3)
    with hooks(model, [edits], decoding([1, 1, 1, 1])) as (activations, _):
        write(model)
    statistics = Statistics.of(model)
    with observe(model, statistics), steer(model, edits):
        write(model)
    for (count, _, _), a in zip(statistics.layers, activations):
        assert torch.equal(count[0], (torch.cat(a[1:], 1) > 0).flatten(0, 1).sum(0).int())


@pytest.mark.parametrize("where", ("generated", "all"))
def test_planted_neurons_are_recovered(where):
    """Neurons that fire if a marker stands somewhere in the prompt: attention carries it on, over two dimensions that
    nothing else uses."""
    model, high, low = tiny(), 50, 60
    planted = {"high": {(0, 7), (1, 40), (1, 3)}, "low": {(0, 19), (1, 11)}}
    with torch.no_grad():
        for parameter in (model.model.embed_tokens.weight, model.lm_head.weight):
            parameter[:, 30:] = 0
        model.model.embed_tokens.weight[high, 30] = model.model.embed_tokens.weight[low, 31] = 8
        for number, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            attention.o_proj.weight[30:] = 0
            layer.mlp.down_proj.weight[30:] = 0
            layer.mlp.gate_proj.weight[:, 30:] = 0
            if number == 0:  # the same attention everywhere
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                    projection.weight.zero_()
                for k in (0, 1):
                    attention.v_proj.weight[k, 30 + k] = attention.o_proj.weight[30 + k, k] = 1
            for pole, sign in zip(POLES, (40, -40)):
                for _, index in filter(lambda one: one[0] == number, planted[pole]):
                    layer.mlp.down_proj.weight[:, index] = layer.mlp.gate_proj.weight[index] = 0
                    layer.mlp.gate_proj.weight[index, 30:] = torch.tensor([sign, -sign])
    x = prompts(40, 7, pad_rows=False)
    x["input_ids"][:, 0] = torch.tensor([high, low] * 20)
    x["input_ids"][:, 1:][(x["input_ids"][:, 1:] == high) | (x["input_ids"][:, 1:] == low)] = 5
    statistics = Statistics.of(model, 2)
    with observe(model, statistics, [0, 1] * 20, where):
        write(model, 8, **x, suppress_tokens=[high, low])
    neurons = Neurons(statistics.summary(), {})
    for k, pole in enumerate(POLES):
        layer, index, delta, p95 = neurons.select(pole, min_delta=0.9, min_neurons=0)
        assert set(zip(layer.tolist(), index.tolist())) == planted[pole]
        assert (delta > 0.99).all() and (p95 > 0).all()
        strongest = neurons.select(pole, min_delta=1.1, min_neurons=len(planted[pole]))  # by rank alone
        assert set(zip(strongest[0].tolist(), strongest[1].tolist())) == planted[pole]


# ------------------------------------------------------------------------------------------ untouched rows and models


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_unedited_rows_are_bit_identical(dtype):
    """Profile 0, and the empty profile that alpha 0 gives, beside edited rows."""
    model, x = tiny().to(dtype), prompts()
    tensors = {name: torch.rand(2, 2, 48) for name in ("prob", "p50", "p95", "p99", "mean", "variance")}
    nothing = npti(Neurons(tensors, {}), 0)
    assert len(nothing) == 0
    results = []
    for rows in ([0, 0, 0, 0], [0, 1, 2, 1]):
        with steer(model, [profile(), nothing], rows, where="all"):
            results.append((model(**x).logits, with_logits(model)[1].transpose(0, 1).contiguous()))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for plain, edited in zip(*results):
        assert torch.equal(plain[[0, 2]].view(bits), edited[[0, 2]].view(bits))
        assert not torch.equal(plain[1], edited[1]) and not torch.equal(plain[3], edited[3])


def state_of(model):
    """All that patching could leave behind: attributes of every module, its hooks, and whether it trains."""
    return {name: (set(module.__dict__), module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
                   len(module._forward_hooks_with_kwargs), len(module._forward_pre_hooks_with_kwargs),
                   module.__dict__.get("forward"), module.__dict__.get("generate"))
            for name, module in model.named_modules()}


def test_restored_after_an_exception():
    model = shared("llama")
    before, plain = state_of(model), write(model)
    with pytest.raises(ZeroDivisionError):
        with steer(model, profile()), observe(model, Statistics.of(model)):
            assert state_of(model) != before
            write(model)
            raise ZeroDivisionError
    assert state_of(model) == before and torch.equal(write(model), plain)


def test_exception_within_generate():
    """The next generate() starts with a prompt again, and what is outside the block is plain."""
    class Stop(StoppingCriteria):
        calls = 0

        def __call__(self, ids, scores, **kwargs):
            self.calls += 1
            if self.calls == 3:
                raise ZeroDivisionError
            return torch.zeros(len(ids), dtype=torch.bool)

    model, before = shared("llama"), state_of(shared("llama"))
    with steer(model, profile()):
        expected = write(model)
        with pytest.raises(ZeroDivisionError):
            write(model, stopping_criteria=[Stop()])
        assert torch.equal(write(model), expected)
    assert state_of(model) == before


@pytest.mark.parametrize("enter", (("steer", "observe"), ("observe", "steer")))
@pytest.mark.parametrize("leave", (("steer", "observe"), ("observe", "steer")))
def test_any_order_of_exit(enter, leave):
    """What is left first has no effect any more, the other goes on, and in the end the model is as it was."""
    model, before, plain = shared("llama"), state_of(shared("llama")), write(shared("llama"))
    statistics = Statistics.of(model)
    with steer(model, profile()):
        edited = write(model)
    assert not torch.equal(edited, plain)
    make = {"steer": lambda: steer(model, profile()), "observe": lambda: observe(model, statistics)}
    active = {}
    for name in enter:
        active[name] = contextlib.ExitStack()
        active[name].enter_context(make[name]())
    assert torch.equal(write(model), edited) and statistics.tokens == 16
    active[leave[0]].close()
    assert torch.equal(write(model), plain if leave[0] == "steer" else edited)
    assert statistics.tokens == (32 if leave[0] == "steer" else 16)
    active[leave[1]].close()
    assert state_of(model) == before and torch.equal(write(model), plain) and statistics.tokens <= 32


def test_second_steer_inside_steer():
    model, before = shared("llama"), state_of(shared("llama"))
    with steer(model, profile()):
        expected = write(model)
        with pytest.raises(UserError, match="another steering"), steer(model, profile(1)):
            pass
        assert torch.equal(write(model), expected), "the first one goes on"
    with observe(model, Statistics.of(model)), pytest.raises(UserError, match="another observing"):
        with observe(model, Statistics.of(model)):
            pass
    assert state_of(model) == before


def test_two_models_at_once():
    one, two = shared("llama"), shared("qwen2")
    plain = write(two)
    with steer(one, profile()):
        assert torch.equal(write(two), plain)
        with steer(two, profile()):
            assert not torch.equal(write(two), plain)
        assert torch.equal(write(two), plain) and not torch.equal(write(one), shared_plain())


@functools.cache
def shared_plain():
    return write(tiny())


def test_training_mode_survives_a_refused_patch():
    model = tiny().train()
    before = state_of(model)
    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="hook"), steer(model, profile()):
        pass
    handle.remove()
    assert state_of(model) == before


# ------------------------------------------------------------------------------------------------ generated tokens


def test_prompt_is_untouched():
    model = shared("llama")
    with steer(model, [profile()], [0] * 4):
        plain = with_logits(model)[1]
    with steer(model, profile(strength=50)):
        edited = with_logits(model)[1]
    assert torch.equal(edited[0], plain[0]) and not close(edited[1], plain[1], 0.1)


@pytest.mark.parametrize("tokens", (1, 2, 5))
def test_last_token_is_not_counted(tokens):
    model, statistics = shared("llama"), Statistics.of(shared("llama"), 2)
    with observe(model, statistics, [0, 1, -1, 1]):
        write(model, tokens)
    assert statistics.tokens.tolist() == [tokens - 1, 2 * (tokens - 1)]


def test_prompt_of_one_token():
    """Its forward looks like a decode step."""
    model, statistics, x = shared("llama"), Statistics.of(shared("llama")), prompts(4, 1, pad_rows=False)
    with hooks(model, [profile()], decoding([1] * 4)):
        expected = write(model, **x)
    with steer(model, profile()), observe(model, statistics):
        assert torch.equal(write(model, **x), expected)
    assert statistics.tokens == 4 * 4


def test_left_padding():
    """A row alone and padded in a batch gets the same tokens, edited and unedited."""
    model, x, rows = shared("llama"), prompts(), [1, 2, 0, 2]
    with steer(model, [profile(1), profile(2)], rows, where="all") as steering:
        together = write(model)
        for row, number in enumerate(rows):
            start = int((x["attention_mask"][row] == 0).sum())
            steering.assign([number])
            alone = write(model, **{name: value[row:row + 1, start:] for name, value in x.items()})
            assert alone[0, -5:].tolist() == together[row, -5:].tolist()


def test_mask_left_out():
    """generate() reads the padding off the pad token then, and so do we."""
    model, x, statistics = shared("llama"), prompts(), Statistics.of(shared("llama"))
    with observe(model, statistics, where="all"):
        write(model, attention_mask=None)
    assert statistics.tokens == x["attention_mask"].sum() + 4 * 4


def test_ended_rows_are_neither_counted_nor_edited():
    """Row 0 ends with its very first token: it is never edited, so its logits stay those of an unedited run."""
    model, length = shared("llama"), 6
    end = int(write(model)[0, length])
    statistics = Statistics.of(model)
    with steer(model, [profile()], [0] * 4):
        plain = with_logits(model, ends=True, eos_token_id=end)[1]
    with steer(model, profile()), observe(model, statistics):
        ids, edited = with_logits(model, ends=True, eos_token_id=end)
    new = ids[:, length:]
    assert len(edited) == 5 and new[0, 0] == end
    assert torch.equal(edited[:, 0], plain[:, 0]) and not close(edited[1, 1], plain[1, 1], 0.05)
    assert statistics.tokens == int(((new == end).cumsum(1) == 0)[:, :-1].sum())


class StopOn(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def words(size=97):
    """A tokenizer of the words w0, w1, ...; transformers looks stop strings up behind the word abcdef."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}" if i != 95 else "abcdef": i for i in range(size)}, unk_token="w96"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2", unk_token="w96")


@pytest.mark.parametrize("how", ("criterion", "string", "config", "config without end token", "list of end tokens"))
def test_other_ways_to_end(how):
    """The user's criteria, stop strings and generation_config end rows just as the end token does."""
    model, length = tiny(), 6
    end = int(write(model, 7)[1, length + 1])
    model.generation_config.eos_token_id = end if how == "config without end token" else None
    options = {"criterion": {"stopping_criteria": [StopOn(end)]},
               "string": {"stop_strings": f"w{end}", "tokenizer": words()},
               "config": {"generation_config": GenerationConfig(max_new_tokens=7, eos_token_id=end, pad_token_id=0)},
               "config without end token": {"generation_config": GenerationConfig(max_new_tokens=7)},
               "list of end tokens": {"eos_token_id": [end, 96]}}[how]
    plain = write(model, 7, ends=True, **options)
    new = plain[:, length:]
    statistics = Statistics.of(model)
    with observe(model, statistics):
        assert torch.equal(write(model, 7, ends=True, **options), plain)
    stops = torch.isin(new, torch.tensor([end, 96] if "list" in how else [end]))
    fed = (stops.cumsum(1) == 0)[:, :-1]
    assert fed[1].sum() == 1 and fed.sum() > 6 and statistics.tokens == fed.sum()


@pytest.mark.parametrize("options", (
    {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "do_sample": True},
    {"num_return_sequences": 2, "do_sample": True, "temperature": 1.5}, {"do_sample": True, "top_p": 0.9}))
def test_beams_and_sampling_equal_hooks(options):
    """Each beam and each of several returned sequences has its prompt's profile."""
    model, profiles, rows = shared("llama"), [profile(1), profile(2)], [1, 2, 0, 1]
    torch.manual_seed(3)
    plain = write(model, **options)
    torch.manual_seed(3)
    with hooks(model, profiles, decoding(rows)) as (activations, _):
        expected = write(model, **options)
    assert not torch.equal(expected, plain)
    statistics = Statistics.of(model)
    torch.manual_seed(3)
    with steer(model, profiles, rows), observe(model, statistics, [0] * 4):
        assert torch.equal(write(model, **options), expected)
    assert statistics.tokens == sum(a.shape[0] for a in activations[0][1:])


def test_continued_conversation():
    """With past_key_values only what is new is the prompt; it is untouched, or with where="all" edited."""
    model, x = shared("llama"), prompts()
    first = write(model, return_dict_in_generate=True)
    more = torch.cat([first.sequences, prompts(4, 3, False, 9)["input_ids"]], 1)
    x = {"input_ids": more, "attention_mask": torch.cat([x["attention_mask"], torch.ones(4, 8, dtype=torch.long)], 1)}
    cached = first.past_key_values.get_seq_length()
    assert cached == 10
    kept = [(layer.keys, layer.values) for layer in first.past_key_values.layers]
    copy = lambda: DynamicCache([(keys.clone(), values.clone()) for keys, values in kept])  # noqa: E731
    with steer(model, profile()):
        expected = write(model, **x)
        assert torch.equal(write(model, **x, past_key_values=copy()), expected)
    for where, prompt in (("generated", 0), ("all", more.shape[1] - cached)):
        statistics = Statistics.of(model)
        with observe(model, statistics, where=where):
            write(model, **x, past_key_values=copy())
        assert statistics.tokens == 4 * (prompt + 4)


def test_mixed_batch_gives_each_row_its_own_answer():
    model, profiles, rows = shared("llama"), [profile(1), profile(2)], [2, 0, 1, 2]
    with steer(model, profiles, rows) as steering:
        mixed = write(model, 8)
        alike = []
        for number in range(3):
            steering.assign([number] * 4)
            alike.append(write(model, 8))
    for row, number in enumerate(rows):
        assert torch.equal(mixed[row], alike[number][row])
    assert not torch.equal(alike[1], alike[2]) and not torch.equal(alike[0], alike[1])


def test_rows_by_default():
    """One profile: for all; several: prompt i has profile i + 1."""
    model, profiles = shared("llama"), [profile(k) for k in range(4)]
    for given, same in ((None, [1, 2, 3, 4]), (torch.tensor([4, 0, 0, 1]), [4, 0, 0, 1])):
        with steer(model, profiles, given):
            ours = write(model)
        with steer(model, profiles, same):
            assert torch.equal(write(model), ours)
    with steer(model, profiles[1]):
        ours = write(model)
    with steer(model, profiles, [2] * 4):
        assert torch.equal(write(model), ours)


def test_inputs_embeds():
    model, x = shared("llama"), prompts()
    embeds = {"inputs_embeds": model.model.embed_tokens(x["input_ids"]), "attention_mask": x["attention_mask"]}
    with steer(model, profile()):
        expected = write(model)[:, 6:]
        ours = model.generate(**embeds, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(ours, expected)


def test_prompt_given_by_position():
    model, x = shared("llama"), prompts()
    with steer(model, profile()):
        expected = write(model)
        assert torch.equal(model.generate(x["input_ids"], attention_mask=x["attention_mask"], max_new_tokens=5,
                                          min_new_tokens=5, do_sample=False), expected)


# --------------------------------------------------------------------------------------------------- all, and a mask


def test_where_all_edits_prompt_and_answer():
    model, rows, mask = shared("llama"), [1, 0, 1, 1], prompts()["attention_mask"]

    def number(call, batch, tokens):
        return torch.tensor(rows)[:, None] * (mask if call == 0 else torch.ones(4, 1, dtype=torch.long))

    with hooks(model, [profile()], number):
        expected, logits = with_logits(model)
    with steer(model, profile(), rows, where="all"):
        ours, ours_logits = with_logits(model)
    assert torch.equal(ours, expected) and close(ours_logits, logits)


def test_where_mask():
    model, x, rows = shared("llama"), prompts(), [1, 2, 1, 0]
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    with hooks(model, [profile(1), profile(2)], lambda call, batch, tokens: torch.tensor(rows)[:, None] * mask):
        expected = model(**x).logits
    statistics = Statistics.of(model, 2)
    with steer(model, [profile(1), profile(2)], rows, where=mask), observe(model, statistics, [0, 0, -1, 1], where=mask):
        ours = model(**x).logits
    real = x["attention_mask"].bool()
    assert close(ours[real], expected[real])
    assert statistics.tokens.tolist() == [int(mask[:2].sum()), int(mask[3].sum())]


def test_plain_forward_warns():
    """With where="generated" a scoring pass would silently not be steered."""
    model, x = shared("llama"), prompts()
    with steer(model, [profile()], [0] * 4, where="all"):
        expected = model(**x).logits
    with steer(model, profile()):
        with pytest.warns(UserWarning, match='where="all"'):
            ours = model(**x).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough, and generate() is no reason
            model(**x)
            write(model)
    assert torch.equal(ours, expected)


def test_wrong_values_are_user_errors():
    model, before, x = shared("llama"), state_of(shared("llama")), prompts()

    def fails(pattern, action=lambda: None, profiles=None, **options):
        with pytest.raises(UserError, match=pattern), steer(model, profile() if profiles is None else profiles, **options):
            action()

    fails("where", where="prompt")
    fails("keep", keep=0)
    fails("keep", keep=1.5)
    fails("rows", rows=[0, 1, 2, 0])
    fails("rows", rows=[0, -1, 0, 0])
    fails("rows", rows=[[0, 1], [0, 1]])
    fails("4 prompts, got 3", lambda: write(model), rows=[1, 0, 1])
    fails("4 prompts, got 3", lambda: model(**x), rows=[1, 0, 1], where="all")
    fails("4 prompts, got 3", lambda: write(model), profiles=[profile()] * 3)
    fails(r"where: expected shape \(4, 6\).*got \(4, 5\)", lambda: model(**x), where=torch.ones(4, 5, dtype=torch.bool))
    fails("outside generate", lambda: write(model), where=torch.ones(4, 6, dtype=torch.bool))
    fails("input_ids", lambda: model.generate(max_new_tokens=3))
    with pytest.raises(UserError, match="rows"), observe(model, Statistics.of(model, 2), [0, 1, 2, 0]):
        pass
    assert state_of(model) == before


def test_no_profile_at_all():
    with pytest.raises(UserError, match="profile"), steer(shared("llama"), []):
        pass


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("options, pattern", (
    ({"assistant_model": None}, "assisted"), ({"prompt_lookup_num_tokens": 3}, "assisted"),
    ({"use_cache": False}, "use_cache"),
    ({"generation_config": GenerationConfig(use_cache=False, max_new_tokens=3)}, "use_cache")))
def test_refused_ways_to_generate(options, pattern):
    model = shared("llama")
    if "assistant_model" in options:
        options = {"assistant_model": shared("qwen2")}
    with steer(model, profile()), pytest.raises(UserError, match=pattern):
        model.generate(**prompts(1), max_new_tokens=3, **options)


def test_generate_batch_is_refused():
    model = shared("llama")
    assert hasattr(model, "generate_batch")
    with steer(model, profile()), pytest.raises(UserError, match="generate_batch"):
        model.generate_batch([[3, 4, 5]])


def test_continuous_batching_is_refused():
    model = shared("llama")
    with steer(model, profile()), pytest.raises(UserError, match="batch"):  # what generate_batch() starts
        model.init_continuous_batching()


@pytest.mark.parametrize("family, name", (("llama", "act_fn"), ("llama", "gate_proj"), ("phi3", "gate_up_proj"),
                                          ("gpt2", "act")))
def test_hooks_that_could_not_fire_raise(family, name):
    """Both when the hook is put on while the model is patched, and before."""
    model = tiny(family)
    module = getattr(mlp_modules(model)[1], name)
    with steer(model, profile(), where="all"):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *args: None)
            with pytest.raises(RuntimeError, match="hook"):
                model(**prompts())
            handle.remove()
        model(**prompts())
    before = state_of(model)
    handle = module.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="hook"), observe(model, Statistics.of(model)):
        pass
    handle.remove()
    assert state_of(model) == before


def test_hook_on_down_proj_sees_the_edit():
    """As DPN-LE's release hooks it."""
    model, x, seen = tiny(), prompts(pad_rows=False), []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    model(**x)
    value = torch.tensor([[math.inf, 1.0, 0.0, 7.0]])
    with steer(model, Profile(torch.tensor([0]), torch.tensor([5]), value), where="all"):
        seen = seen[:1]
        model(**x)
    handle.remove()
    expected = seen[0].clone()
    expected[..., 5] += 7
    assert close(seen[-1], expected, 1e-5) and len(seen) == 2


def test_mixture_of_experts_is_refused():
    """Only some layers have a plain MLP, or none."""
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                 num_key_value_heads=2, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    for plain, pattern in (([0], "only 1 of 2 layers"), ([], "no MLP of a known structure")):
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape, mlp_only_layers=plain))
        with pytest.raises(UserError, match=f"{pattern}.*Qwen3MoeSparseMoeBlock"), steer(model, profile()):
            pass


def test_unknown_mlp_lists_what_was_seen():
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(UserError, match="BloomMLP.*dense_h_to_4h.*gate_proj") as error:
        Statistics.of(model)
    assert "\n" not in str(error.value)


def test_different_mathematics_is_refused():
    """The names of Llama's MLP, another formula: told by the numbers."""
    class Other(torch.nn.Module):
        def __init__(self, mlp, forward):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
            self.formula = forward

        def forward(self, x):
            return self.formula(self, x)

    formulas = (lambda m, x: m.down_proj(m.act_fn(2 * m.gate_proj(x)) * m.up_proj(x)),
                lambda m, x: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x)),
                lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * (m.up_proj(x) + 1)),
                lambda m, x: 1.02 * m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)))
    for formula in formulas:
        model = tiny()
        model.model.layers[1].mlp = Other(model.model.layers[1].mlp, formula).eval()
        before = state_of(model)
        with pytest.raises(UserError, match=r"layer 1, mlp \(Other\)"), steer(model, profile()):
            pass
        assert state_of(model) == before


def test_unknown_activation_is_refused():
    model = tiny(hidden_act="quick_gelu")
    with pytest.raises(UserError, match="LlamaMLP"), steer(model, profile()):
        pass


@pytest.mark.parametrize("act, function", (("silu", F.silu), ("gelu", F.gelu), ("relu", F.relu),
                                           ("gelu_pytorch_tanh", functools.partial(F.gelu, approximate="tanh"))))
def test_activations_are_told_apart(act, function):
    mlps = find_mlps(tiny(hidden_act=act))
    x = torch.linspace(-4, 4, 99)
    gate = x[None].clone()
    torch.ops.neurons.glu_(gate, None, mlps[0].act, *(None,) * 8)
    assert len(mlps) == 2 and mlps[0].width == 48 and close(gate[0], function(x), 1e-6)


def test_fingerprint_tells_models_apart_but_not_dtypes():
    model = tiny()
    mine = fingerprint(model)
    assert fingerprint(tiny().bfloat16()) == mine and fingerprint(tiny("mistral", intermediate_size=40)) != mine
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.neg_()
    assert fingerprint(model) != mine


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_while_steered(backend):
    model, x, rows = tiny(), prompts(), [1, 0, 2, 1]
    statistics, expected_statistics = Statistics.of(model), Statistics.of(model)
    with torch.no_grad():
        plain = model(**x).logits
        with steer(model, [profile(1), profile(2)], rows, where="all"), observe(model, expected_statistics, where="all"):
            expected = model(**x).logits
        with steer(model, [profile(1), profile(2)], rows, where="all"), observe(model, statistics, where="all"):
            assert close(torch.compile(model, fullgraph=True, backend=backend)(**x).logits, expected)
    assert not close(expected, plain, 0.05) and statistics.tokens == expected_statistics.tokens
    for (ours, *_), (theirs, *_) in zip(statistics.layers, expected_statistics.layers):
        assert ours.sum() > 0 and (ours - theirs).abs().sum() <= 2  # a sum in another order may cross 0


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_before_steer():
    """The patch is seen by a model that was compiled, and has run, before; and so is its end."""
    model, x = tiny(), prompts()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(**x).logits
        for seed in (1, 2):
            with steer(model, profile(seed), where="all"):
                expected = model(**x).logits
                assert close(compiled(**x).logits, expected) and not close(expected, plain, 0.05)
            assert close(compiled(**x).logits, plain)


@pytest.mark.usefixtures("fresh_compiler")
def test_steer_takes_a_compiled_model():
    """steer() of what torch.compile returned works, and leaves it as it was."""
    model, x = tiny(), prompts()
    compiled = torch.compile(model, backend="eager")
    before = state_of(model)
    with torch.no_grad():
        with steer(model, profile(), where="all"):
            expected = model(**x).logits
        with steer(compiled, profile(), where="all"):
            assert close(compiled(**x).logits, expected)
    assert state_of(model) == before


def static(model, **options):
    """generate() with a static cache and a compiled decode step, as it does by itself on a GPU."""
    from transformers.generation import CompileConfig

    compile = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile._compile_all_devices = True
    return write(model, cache_implementation="static", compile_config=compile, **options)


@pytest.mark.usefixtures("fresh_compiler")
def test_static_cache_compiled_while_steered():
    model = tiny()
    plain = write(model)
    with steer(model, [profile(1), profile(2)], [1, 0, 2, 1]) as steering:
        expected = write(model)
        assert torch.equal(static(model), expected)
        assert "_compiled_call" in model.__dict__, "generate() has compiled nothing, so this test proves nothing"
        statistics = Statistics.of(model)
        with observe(model, statistics):  # enters and leaves a call that is compiled already
            assert torch.equal(static(model), expected) and statistics.tokens == 16
        assert torch.equal(static(model), expected) and statistics.tokens == 16
        steering.assign([2, 2, 0, 1])
        other = write(model)
        assert not torch.equal(other, expected) and torch.equal(static(model), other)
    assert "_compiled_call" not in model.__dict__, "it may hold a graph that steers"
    assert torch.equal(static(model), plain)


@pytest.mark.usefixtures("fresh_compiler")
def test_static_cache_compiled_before_steer():
    model = tiny()
    plain = static(model)
    assert "_compiled_call" in model.__dict__
    with steer(model, profile()):
        assert "_compiled_call" not in model.__dict__, "it may hold a graph that does not steer"
        ours = static(model)
        assert torch.equal(ours, write(model)) and not torch.equal(ours, plain)
    assert torch.equal(static(model), plain)


# ------------------------------------------------------------------------------------- profiles, tables, keep, update


def test_keep_is_reproducible():
    model, edits = shared("llama"), shifts([0] * 20 + [1] * 20, [*range(20)] * 2, [3.0] * 40)
    results = []
    for options in ({}, {"keep": 0.5, "seed": 1}, {"keep": 0.5, "seed": 1}, {"keep": 0.5, "seed": 2}):
        with steer(model, edits, **options):
            results.append(with_logits(model)[1])
    full, one, again, other = results
    assert torch.equal(one, again)
    assert not close(one[1], full[1], 1e-2) and not close(one[1], other[1], 1e-2)


def test_keep_redraws_at_every_step():
    """The same token again, at the second step, is edited otherwise: a share of each layer's raised neurons."""
    profiles = [shifts([0] * 10 + [1] * 10, [*range(10)] * 2, [1.0] * 20), shifts([1] * 20, range(20), [2.0] * 20)]
    tables = Tables(profiles, 2, 48, "cpu")
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(50):
        tables.thin(0.9, generator)
        drawn.append(tables.value[:, 2].clone())
    drawn = torch.stack(drawn)
    for start, size in ((0, 10), (10, 10), (20, 20)):
        assert ((drawn[:, start:start + size] != 0).sum(1) == round(0.9 * size)).all()
    assert len(drawn.unique(dim=0)) > 40 and ((drawn != 0).float().mean(0) - 0.9).abs().max() < 0.2
    calls = []
    model = shared("llama")
    with steer(model, shifts([0] * 10, range(10), [1.0] * 10), keep=0.5) as steering:
        value = steering.tables.value
        handle = model.model.register_forward_pre_hook(lambda *args: calls.append(tuple(value[:10, 2].tolist())))
        write(model, 6)
        handle.remove()
    assert len(set(calls[1:])) > 2 and all(sum(call) == 5 for call in calls)


def test_keep_leaves_caps_alone():
    capped = Profile.of([(torch.zeros(8, dtype=torch.long), torch.arange(8), torch.zeros(8), torch.zeros(8))])
    tables = Tables([capped], 1, 48, "cpu")
    before = tables.value.clone()
    tables.thin(0.1, torch.Generator().manual_seed(0))
    assert torch.equal(tables.value, before) and (before[:, 0] == 0).all()


def test_update_swaps_edits():
    model, first, second = shared("llama"), profile(1), profile(2, 30)
    with steer(model, second):
        expected = write(model)
    with steer(model, first, capacity=30) as steering:
        before = write(model)
        steering.update(second)
        assert torch.equal(write(model), expected) and not torch.equal(before, expected)
        for wrong, pattern in ((profile(3, 31), "capacity of 30.*capacity=31"), ([first, first], "expected 1")):
            with pytest.raises(UserError, match=pattern):
                steering.update(wrong)
        assert torch.equal(write(model), expected), "a refused update changes nothing"
        steering.update([first])
        assert torch.equal(write(model), before)
    with pytest.raises(UserError, match="capacity"), steer(model, first, capacity=3):
        pass


@pytest.mark.parametrize("layer, index, shift, pattern", (
    ([0, 2], [1, 1], [1.0, 1.0], "layer 2 of a model of 2 layers"), ([0, -1], [1, 1], [1.0, 1.0], "layer -1"),
    ([0, 1], [1, 48], [1.0, 1.0], "neuron 48 of a model of 48"), ([0, 1], [1, -3], [1.0, 1.0], "neuron -3"),
    ([0, 0], [5, 5], [1.0, 2.0], "twice"), ([0, 0], [5, 6], [1.0, math.nan], "not a finite"),
    ([0, 0], [5, 6], [1.0, math.inf], "not a finite")))
def test_tables_check_what_the_kernel_cannot(layer, index, shift, pattern):
    with pytest.raises(UserError, match=pattern):
        Tables([shifts([0], [0], [1.0]), shifts(layer, index, shift, "mine")], 2, 48, "cpu")


def test_tables_check_shapes_and_caps():
    for wrong in (Profile(torch.tensor([0, 1]), torch.tensor([1]), torch.ones(2, 4)),
                  Profile(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.ones(2, 3)),
                  Profile(torch.tensor([0]), torch.tensor([1]), torch.tensor([[math.nan, 1, 0, 0]]))):
        with pytest.raises(UserError, match="profile"):
            Tables([wrong], 2, 48, "cpu")


def test_same_neuron_in_two_profiles_is_fine():
    tables = Tables([shifts([0], [5], [1.0]), shifts([0], [5], [2.0])], 2, 48, "cpu")
    assert tables.index.tolist() == [5, 5] and tables.value[:, 2].tolist() == [1.0, 2.0]


def test_profile_does_not_hang_on_the_order_of_its_sets():
    generator = torch.Generator().manual_seed(0)
    sets = []
    for k in range(4):  # the same neurons in several sets
        at = torch.randperm(96, generator=generator)[:60]
        cap = torch.where(torch.rand(60, generator=generator) < 0.5, math.inf, torch.randn(60, generator=generator))
        sets.append((at // 48, at % 48, cap, torch.randn(60, generator=generator)))
    first = Profile.of(sets)
    for order in itertools.permutations(sets):
        other = Profile.of(list(order))
        assert torch.equal(other.layer, first.layer) and torch.equal(other.index, first.index)
        assert torch.equal(other.value.view(torch.int32), first.value.view(torch.int32))
    for layer, index, (cap, scale, shift, bias) in zip(first.layer.tolist(), first.index.tolist(), first.value.tolist()):
        mine = [(float(c[k]), float(s[k])) for a, b, c, s in sets for k in range(60) if (a[k], b[k]) == (layer, index)]
        assert cap == min(c for c, _ in mine) and (scale, bias) == (1, 0)
        assert shift == pytest.approx(sum(s for _, s in mine), abs=1e-6)


@pytest.mark.parametrize("alpha", (1.5, -0.6))
def test_npti_edits_are_the_papers(alpha):
    """The opposite pole capped at 0, the target pole raised by alpha * p95 / (1 + exp(-10 (delta - 0.15)))."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(2, 3, 40, generator=generator) for name in ("prob", "p50", "p95", "p99", "mean", "variance")}
    ours = npti(Neurons(tensors, {"trait": "openness"}), alpha)
    k = 0 if alpha > 0 else 1
    expected = {}
    for layer, index in itertools.product(range(3), range(40)):
        delta = float(tensors["prob"][k, layer, index] - tensors["prob"][1 - k, layer, index])
        if delta >= 0.1:
            shift = abs(alpha) * float(tensors["p95"][k, layer, index]) / (1 + math.exp(-10 * (delta - 0.15)))
            expected[layer, index] = [math.inf, 1.0, pytest.approx(shift, rel=1e-5), 0.0]
        elif -delta >= 0.1:
            expected[layer, index] = [0.0, 1.0, 0.0, 0.0]
    assert dict(zip(zip(ours.layer.tolist(), ours.index.tolist()), ours.value.tolist())) == expected


def test_at_least_so_many_neurons():
    prob = torch.zeros(2, 1, 1000)
    prob[0, 0, :300] = torch.linspace(0.3, 0.001, 300)
    tensors = {name: prob.clone() for name in ("prob", "p50", "p95", "p99", "mean", "variance")}
    neurons = Neurons(tensors, {})
    reached = int((prob[0] >= 0.1).sum())
    assert len(neurons.select("high")[0]) == reached and len(neurons.select("low")[0]) == 0
    assert len(neurons.select("high", min_neurons=250)[0]) == 250
    assert len(neurons.select("high", min_neurons=999)[0]) == 300  # none that speaks for the other pole, or for none
    assert len(neurons.select("high", min_delta=0.9)[0]) == round(1000 * 2000 / 458752)
