"""Following generate(): which token is generated, which row has ended, whose personality it has; what is refused."""

import contextlib
import copy
import re
import threading
import time
import warnings

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria

from conftest import prompts, tiny
from personality import Neurons, Profile, Statistics, UserError, npti, observe, rows, steer
from personality.calls import prompt_of
from personality.methods import activation_addition
from personality.model import CACHE
from reference import close, decoding, hooks, random_profile, shared, state_of, with_logits, write

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
        with steer(model, [random_profile(), nothing], rows, where="all"):
            results.append((model(**x).logits, with_logits(model)[1].transpose(0, 1).contiguous()))
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for plain, edited in zip(*results):
        assert torch.equal(plain[[0, 2]].view(bits), edited[[0, 2]].view(bits))
        assert not torch.equal(plain[1], edited[1]) and not torch.equal(plain[3], edited[3])


def test_restored_after_an_exception():
    model = shared("llama")
    before, plain = state_of(model), write(model)
    with pytest.raises(ZeroDivisionError):
        with steer(model, random_profile()), observe(model, Statistics.of(model)):
            assert state_of(model) != before
            write(model)
            raise ZeroDivisionError
    assert state_of(model) == before and torch.equal(write(model), plain)


class Calls(StoppingCriteria):
    """Does something at one of its calls, and stops nothing."""

    def __init__(self, action, at=3):
        self.action, self.at, self.calls = action, at, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            self.action()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_exception_within_generate():
    """The next generate() starts with a prompt again, and what is outside the block is plain."""
    model, before = shared("llama"), state_of(shared("llama"))
    with steer(model, random_profile()):
        expected = write(model)
        with pytest.raises(ZeroDivisionError):
            write(model, stopping_criteria=[Calls(lambda: 1 / 0)])
        assert torch.equal(write(model), expected)
    assert state_of(model) == before


@pytest.mark.parametrize("enter", (("steer", "observe"), ("observe", "steer")))
@pytest.mark.parametrize("leave", (("steer", "observe"), ("observe", "steer")))
def test_any_order_of_exit(enter, leave):
    """What is left first has no effect any more, the other goes on, and in the end the model is as it was."""
    model, before, plain = shared("llama"), state_of(shared("llama")), write(shared("llama"))
    statistics = Statistics.of(model)
    with steer(model, random_profile()):
        edited = write(model)
    assert not torch.equal(edited, plain)
    make = {"steer": lambda: steer(model, random_profile()), "observe": lambda: observe(model, statistics)}
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
    with steer(model, random_profile()):
        expected = write(model)
        with pytest.raises(UserError, match="steered already"), steer(model, random_profile(1)):
            pass
        assert torch.equal(write(model), expected), "the first one goes on"
    with observe(model, Statistics.of(model)), pytest.raises(UserError, match="observed already"):
        with observe(model, Statistics.of(model)):
            pass
    assert state_of(model) == before


def test_two_models_at_once():
    first, second = shared("llama"), shared("qwen2")
    plain_first, plain = write(first), write(second)
    with steer(first, random_profile()):
        assert torch.equal(write(second), plain)
        with steer(second, random_profile()):
            assert not torch.equal(write(second), plain)
        assert torch.equal(write(second), plain) and not torch.equal(write(first), plain_first)


def test_copy_of_a_steered_model_is_refused():
    """Its forwards would go on asking the original's record."""
    model, plain = tiny(), write(tiny())
    for context in (lambda: steer(model, random_profile()), lambda: observe(model, Statistics.of(model))):
        with context(), pytest.raises(UserError, match="copied while it is steered or observed"):
            copy.deepcopy(model)
    assert torch.equal(write(copy.deepcopy(model)), plain), "afterwards it can be"


# ------------------------------------------------------------------------------------------------ generated tokens


def test_prompt_is_untouched():
    model = shared("llama")
    with steer(model, [random_profile()], [0] * 4):
        plain = with_logits(model)[1]
    with steer(model, random_profile(strength=50)):
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
    with hooks(model, [random_profile()], decoding([1] * 4)):
        expected = write(model, **x)
    with steer(model, random_profile()), observe(model, statistics):
        assert torch.equal(write(model, **x), expected)
    assert statistics.tokens == 4 * 4


def test_left_padding():
    """A row alone and padded in a batch gets the same tokens, edited and unedited."""
    model, x, rows = shared("llama"), prompts(), [1, 2, 0, 2]
    with steer(model, [random_profile(1), random_profile(2)], rows, where="all") as steering:
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


def test_a_pad_token_that_ends_answers_is_no_padding():
    """Where no mask is given, as in generate()."""
    ids = torch.tensor([[2, 5, 2, 6]])
    for ends, expected in ((2, [True] * 4), ([1, 2], [True] * 4), (1, [False, True, False, True]), (None, [False, True, False, True])):
        mask, _ = prompt_of({"input_ids": ids}, {"pad_token_id": 2, "eos_token_id": ends}.get)
        assert mask.tolist() == [expected]


def test_continued_conversation():
    """With past_key_values only what is new is the prompt; it is untouched, or with where="all" edited."""
    model, x = shared("llama"), prompts()
    first = write(model, return_dict_in_generate=True)
    more = torch.cat([first.sequences, prompts(4, 3, False, 9)["input_ids"]], 1)
    x = {"input_ids": more, "attention_mask": torch.cat([x["attention_mask"], torch.ones(4, 8, dtype=torch.long)], 1)}
    cached = first.past_key_values.get_seq_length()
    assert cached == 10
    kept = [(layer.keys, layer.values) for layer in first.past_key_values.layers]
    cache = lambda: DynamicCache([(keys.clone(), values.clone()) for keys, values in kept])  # noqa: E731
    with steer(model, random_profile()):
        expected = write(model, **x)
        assert torch.equal(write(model, **x, **{CACHE: cache()}), expected)
    new = {**x, "input_ids": more[:, cached:]}  # with a mask of all tokens, those alone will do
    for where, prompt in (("generated", 0), ("all", more.shape[1] - cached)):
        for given in (x, new):
            statistics = Statistics.of(model)
            with observe(model, statistics, where=where):
                write(model, **given, **{CACHE: cache()})
            assert statistics.tokens == 4 * (prompt + 4)


@pytest.mark.parametrize("where", ("generated", "all"))
def test_prompt_read_in_parts(where):
    """prefill_chunk_size makes several forwards of the prompt, of one token even."""
    model, results = shared("llama"), []
    for size in (None, 4, 1):
        statistics = Statistics.of(model)
        with steer(model, random_profile(), where=where), observe(model, statistics, where=where):
            results.append((write(model, prefill_chunk_size=size).tolist(), statistics.tokens.tolist()))
    assert results[1] == results[0] == results[2]


def test_inputs_embeds():
    model, x = shared("llama"), prompts()
    embeds = {"inputs_embeds": model.model.embed_tokens(x["input_ids"]), "attention_mask": x["attention_mask"]}
    with steer(model, random_profile()):
        expected = write(model)[:, 6:]
        ours = model.generate(**embeds, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("where", ("generated", "all"))
def test_inputs_embeds_beside_input_ids(where):
    """input_ids, of any length, are what is written in front of the answer then; read are inputs_embeds."""
    model, x = shared("llama"), prompts(pad_rows=False)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with steer(model, random_profile(), where=where):
        expected = model.generate(**x, **options)[:, 6:]
        for beside in (x["input_ids"], x["input_ids"][:, :0]):
            ours = model.generate(input_ids=beside, inputs_embeds=model.model.embed_tokens(x["input_ids"]), **options)
            assert torch.equal(ours[:, beside.shape[1]:], expected)


def test_prompt_given_by_position():
    model, x = shared("llama"), prompts()
    with steer(model, random_profile()):
        expected = write(model)
        assert torch.equal(model.generate(x["input_ids"], attention_mask=x["attention_mask"], max_new_tokens=5,
                                          min_new_tokens=5, do_sample=False), expected)


# ------------------------------------------------------------------------------------------------- rows that have ended


def test_ended_rows_are_neither_counted_nor_edited():
    """Row 0 ends with its very first token: it is never edited, so its logits stay those of an unedited run."""
    model, length = shared("llama"), 6
    end = int(write(model)[0, length])
    statistics = Statistics.of(model)
    with steer(model, [random_profile()], [0] * 4):
        plain = with_logits(model, ends=True, eos_token_id=end)[1]
    with steer(model, random_profile()), observe(model, statistics):
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


class StopAll(StoppingCriteria):
    """Ends all rows after so many tokens, with a verdict that is no tensor."""

    def __init__(self, kind, length):
        self.kind, self.length = kind, length

    def __call__(self, input_ids, scores, **kwargs):
        return self.kind(input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("kind", (bool, np.bool_, lambda value: np.full(4, value), lambda value: [value] * 4, torch.tensor))
def test_verdicts_of_any_form(kind):
    """A criterion may say a Python or numpy bool for all rows, as one of its own making often does."""
    model, statistics = shared("llama"), Statistics.of(shared("llama"))
    with steer(model, random_profile()):
        expected = write(model, 3)
    with steer(model, random_profile()), observe(model, statistics):
        ours = write(model, 7, ends=True, stopping_criteria=[StopAll(kind, 9)])
    assert torch.equal(ours, expected) and statistics.tokens == 4 * 2


def test_criteria_given_by_position():
    """generate(inputs, generation_config, logits_processor, stopping_criteria)."""
    model, x = shared("llama"), prompts()
    end, config = int(write(model, 7)[1, 7]), GenerationConfig(max_new_tokens=7, pad_token_id=0)

    def by_position():
        return model.generate(x["input_ids"], config, None, [StopOn(end)], attention_mask=x["attention_mask"])

    def by_name():
        return model.generate(**x, generation_config=config, stopping_criteria=[StopOn(end)])

    plain = by_position()
    counts = []
    for call in (by_position, by_name):
        statistics = Statistics.of(model)
        with observe(model, statistics):
            assert torch.equal(call(), plain)
        counts.append(int(statistics.tokens))
        with steer(model, random_profile()):
            counts.append(call().tolist())
    assert counts[:2] == counts[2:] and 0 < counts[0] < 4 * 6


# --------------------------------------------------------------------------------------------- whose personality it is


@pytest.mark.parametrize("options", (
    {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "do_sample": True},
    {"num_return_sequences": 2, "do_sample": True, "temperature": 1.5}, {"do_sample": True, "top_p": 0.9}))
def test_beams_and_sampling_equal_hooks(options):
    """Each beam and each of several returned sequences has its prompt's profile."""
    model, profiles, rows = shared("llama"), [random_profile(1), random_profile(2)], [1, 2, 0, 1]
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


def test_mixed_batch_gives_each_row_its_own_answer():
    model, profiles, rows = shared("llama"), [random_profile(1), random_profile(2)], [2, 0, 1, 2]
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
    model, profiles = shared("llama"), [random_profile(k) for k in range(4)]
    for given, same in ((None, [1, 2, 3, 4]), (torch.tensor([4, 0, 0, 1]), [4, 0, 0, 1]), (np.array([4, 0, 0, 1]), [4, 0, 0, 1])):
        with steer(model, profiles, given):
            ours = write(model)
        with steer(model, profiles, same):
            assert torch.equal(write(model), ours)
    with steer(model, profiles[1]):
        ours = write(model)
    with steer(model, profiles, [2] * 4):
        assert torch.equal(write(model), ours)


# --------------------------------------------------------------------------------------------------- all, and a mask


def test_where_all_edits_prompt_and_answer():
    model, rows, mask = shared("llama"), [1, 0, 1, 1], prompts()["attention_mask"]

    def number(call, batch, tokens):
        return torch.tensor(rows)[:, None] * (mask if call == 0 else torch.ones(4, 1, dtype=torch.long))

    with hooks(model, [random_profile()], number):
        expected, logits = with_logits(model)
    with steer(model, random_profile(), rows, where="all"):
        ours, ours_logits = with_logits(model)
    assert torch.equal(ours, expected) and close(ours_logits, logits)


def test_where_mask():
    model, x, rows = shared("llama"), prompts(), [1, 2, 1, 0]
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    with hooks(model, [random_profile(1), random_profile(2)], lambda call, batch, tokens: torch.tensor(rows)[:, None] * mask):
        expected = model(**x).logits
    statistics = Statistics.of(model, 2)
    with steer(model, [random_profile(1), random_profile(2)], rows, where=mask), \
            observe(model, statistics, [0, 0, -1, 1], where=mask):
        ours = model(**x).logits
    real = x["attention_mask"].bool()
    assert close(ours[real], expected[real])
    assert statistics.tokens.tolist() == [int(mask[:2].sum()), int(mask[3].sum())]


def test_plain_forward_warns():
    """With where="generated" a scoring pass would silently not be steered."""
    model, x = shared("llama"), prompts()
    with steer(model, [random_profile()], [0] * 4, where="all"):
        expected = model(**x).logits
    with steer(model, random_profile()):
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
        with pytest.raises(UserError, match=pattern), steer(model, random_profile() if profiles is None else profiles, **options):
            action()

    fails("where", where="prompt")
    fails("rows", rows=[0, 1, 2, 0])
    fails("rows", rows=[0, -1, 0, 0])
    fails("rows", rows=[[0, 1], [0, 1]])
    fails(r"rows: expected a whole number from 0 to 1 for each prompt, got \[0\.5, 1", rows=[0.5, 1])
    fails("rows: expected a whole number", rows=[True, False])
    fails("rows: expected a whole number", rows=torch.tensor([0, 1]).bool())
    fails("4 prompts, got 3", lambda: write(model), rows=[1, 0, 1])
    fails("4 prompts, got 3", lambda: model(**x), rows=[1, 0, 1], where="all")
    fails("4 prompts, got 3", lambda: write(model), profiles=[random_profile()] * 3)
    fails(r"where: expected shape \(4, 6\).*got \(4, 5\)", lambda: model(**x), where=torch.ones(4, 5, dtype=torch.bool))
    fails("outside generate", lambda: write(model), where=torch.ones(4, 6, dtype=torch.bool))
    fails("input_ids", lambda: model.generate(max_new_tokens=3))
    with pytest.raises(UserError, match="rows"), observe(model, Statistics.of(model, 2), [0, 1, 2, 0]):
        pass
    assert state_of(model) == before


@pytest.mark.parametrize("rows", (1, "12", ["a", "b"], [[1], [1, 1]], [2**40, 1], [None, 1]))
def test_rows_of_another_kind_are_user_errors(rows):
    model, before = shared("llama"), state_of(shared("llama"))
    with pytest.raises(UserError, match="rows: expected"), steer(model, random_profile(), rows):
        pass
    assert state_of(model) == before


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("options, pattern", (
    ({"assistant_model": None}, "assisted"), ({"prompt_lookup_num_tokens": 3}, "assisted"),
    ({"use_cache": False}, "use_cache"),
    ({"generation_config": GenerationConfig(use_cache=False, max_new_tokens=3)}, "use_cache"),
    ({"guidance_scale": 1.5}, "guidance"),
    ({"generation_config": GenerationConfig(guidance_scale=1.5, max_new_tokens=3)}, "guidance")))
def test_refused_ways_to_generate(options, pattern):
    model = shared("llama")
    if "assistant_model" in options:
        options = {"assistant_model": shared("qwen2")}
    with steer(model, random_profile()), pytest.raises(UserError, match=pattern):
        model.generate(**prompts(1), max_new_tokens=3, **options)


def test_guidance_that_changes_nothing_is_taken():
    model = shared("llama")
    with steer(model, random_profile()):
        assert torch.equal(write(model, guidance_scale=1), write(model))


def test_generate_batch_is_refused():
    model = shared("llama")
    assert hasattr(model, "generate_batch")
    with steer(model, random_profile()), pytest.raises(UserError, match="generate_batch"):
        model.generate_batch([[3, 4, 5]])


def test_continuous_batching_is_refused():
    model = shared("llama")
    with steer(model, random_profile()), pytest.raises(UserError, match="batch"):  # what generate_batch() starts
        model.init_continuous_batching()


def test_generate_in_two_threads_is_refused():
    """The second one would be followed as if it were the first; that one goes on, unharmed."""
    model, results = shared("llama"), []
    with steer(model, random_profile()):
        expected = write(model)

        def second():
            for call in (lambda: write(model), lambda: model(**prompts())):
                try:
                    results.append(call())
                except UserError as error:
                    results.append(str(error))

        def elsewhere():
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

        assert torch.equal(write(model, stopping_criteria=[Calls(elsewhere)]), expected)
        assert torch.equal(write(model), expected), "one after the other is fine"
        thread = threading.Thread(target=lambda: results.append(write(model)))
        thread.start()
        thread.join()
    assert "generate() of this model is running already" in results[0]
    assert "another thread is in generate() of this model" in results[1]
    assert torch.equal(results[2], expected), "in another thread, too"


def in_background(work):
    thread = threading.Thread(target=work, daemon=True)  # a test that fails leaves nobody to wait for
    thread.start()
    return thread


def test_two_threads_that_steer_at_once(monkeypatch):
    """One of them is refused, whatever comes between; in the end the model is as it was."""
    model, before, refused, plain_compare = shared("llama"), state_of(shared("llama")), [], rows.compare
    entered, tried = threading.Event(), threading.Event()

    def slowly(*given):
        entered.set()
        time.sleep(0.05)  # so that the other one comes while the layers are compared
        plain_compare(*given)

    def second():
        entered.wait(20)
        try:
            with steer(model, random_profile(1)):
                refused.append("not at all")
        except UserError as error:
            refused.append(str(error))
        tried.set()

    monkeypatch.setattr(rows, "compare", slowly)
    thread = in_background(second)
    with steer(model, random_profile()):
        assert tried.wait(20)
    thread.join(20)
    assert len(refused) == 1 and "steered already" in refused[0] and state_of(model) == before


def test_who_leaves_does_not_come_between_who_enters():
    """Else the last one to leave took off what the other one has just found on the model."""
    model, before, leave = shared("llama"), state_of(shared("llama")), threading.Event()

    def other():
        with steer(model, random_profile()):
            leave.wait(20)

    with rows.PATCHING:
        thread = in_background(other)
        leave.set()
        thread.join(0.2)
        assert thread.is_alive() and state_of(model) == before, "who enters waits"
    thread.join(20)
    leave.clear()
    thread = in_background(other)
    while "_neurons_patch" not in vars(model):
        time.sleep(0.01)
    with rows.PATCHING:
        leave.set()
        thread.join(0.2)
        assert thread.is_alive() and state_of(model) != before, "and who leaves"
    thread.join(20)
    assert state_of(model) == before


def steered_both_ways():
    """Neurons, and the residual stream; and rows of which one is unedited."""
    vector = 10 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    return [random_profile(), activation_addition([({1: vector}, 1.0)])], [1, 2, 0, 2]


def test_a_generate_that_has_begun_ends_as_it_began(monkeypatch):
    """In another thread, as with a streamer: who leaves the with meanwhile waits for it."""
    model, before, results = shared("llama"), state_of(shared("llama")), []
    plain, chosen, leaving, plain_leave = write(model), threading.Event(), threading.Event(), rows.Patch.leave
    with steer(model, *steered_both_ways()):
        expected = write(model)
    assert (expected != plain).any(1).tolist() == [True, True, False, True]

    def leave(self, what):
        leaving.set()
        plain_leave(self, what)

    def wait():
        chosen.set()
        leaving.wait(20)
        time.sleep(0.05)  # so that who leaves is further than that

    monkeypatch.setattr(rows.Patch, "leave", leave)
    statistics = Statistics.of(model)
    with steer(model, *steered_both_ways()), observe(model, statistics):
        thread = in_background(lambda: results.append(write(model, stopping_criteria=[Calls(wait, at=1)])))
        assert chosen.wait(20)
    assert state_of(model) == before and statistics.tokens == 16
    thread.join(20)
    assert torch.equal(results[0], expected)


def test_answers_before_and_after_leaving(monkeypatch):
    """Of a thread that goes on asking: each is wholly steered or not at all, and none is refused."""
    model, results, off = shared("llama"), [], rows.Patch.take_off
    plain, left = write(model), threading.Event()
    with steer(model, *steered_both_ways()):
        steered = write(model)

    def slowly(self, what):
        time.sleep(0.02)
        off(self, what)

    def ask():
        while not left.is_set():
            try:
                results.append(write(model))
            except Exception as error:  # noqa: BLE001  it is what is looked for
                results.append(error)
        results.append(write(model))

    monkeypatch.setattr(rows.Patch, "take_off", slowly)
    with steer(model, *steered_both_ways()):
        thread = in_background(ask)
        while not results:
            time.sleep(0.01)
    left.set()
    thread.join(20)
    kinds = ["error" if isinstance(found, Exception) else "steered" if torch.equal(found, steered) else
             "plain" if torch.equal(found, plain) else "neither" for found in results]
    assert set(kinds) == {"steered", "plain"} and kinds[0] == "steered" and kinds[-1] == "plain"


def test_who_is_thrown_out_waits_for_nobody():
    """An answer that another thread has begun may wait for just this one: its streamer's queue is full, say."""
    model, before, chosen, go = shared("llama"), state_of(shared("llama")), threading.Event(), threading.Event()

    def ask():
        with contextlib.suppress(Exception):
            write(model, stopping_criteria=[Calls(lambda: (chosen.set(), go.wait(20)), at=1)])

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError), steer(model, random_profile()):
        thread = in_background(ask)
        assert chosen.wait(20)
        1 / 0
    assert time.monotonic() - start < 15 and state_of(model) == before and thread.is_alive()
    go.set()
    thread.join(20)


def test_what_leaves_has_no_token_any_more():
    """Its hooks, which are off a moment later, add nothing to a forward that comes between."""
    model = shared("llama")
    with steer(model, *steered_both_ways(), where="all") as steering:
        model(**prompts())
        assert steering.rows.tokens is not None
    assert steering.rows.tokens is None


def test_two_layers_of_one_mlp():
    model = tiny()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    plain = write(model)
    with steer(model, Profile.empty()):
        assert torch.equal(write(model), plain)
    assert "_neurons_patch" not in vars(model.model.layers[0].mlp)


def test_a_part_of_a_steered_model_is_no_other_model():
    """Both would put their forwards on the same MLPs, and the one that comes last has what the other one wants."""
    model, before = shared("llama"), state_of(shared("llama"))
    for first, second in ((model, model.model), (model.model, model)):
        with steer(first, random_profile()), pytest.raises(UserError, match="name one model to both"):
            with observe(second, Statistics.of(second)):
                pass
        assert state_of(model) == before
    with steer(model, random_profile()), pytest.raises(UserError, match="copied while it is steered"):
        copy.deepcopy(model.model.layers[0])


class CallsModel(LogitsProcessor):
    def __init__(self, action):
        self.action = action

    def __call__(self, input_ids, scores):
        self.action()
        return scores


@pytest.mark.parametrize("at", (1, 3))
def test_model_called_inside_its_own_generate_is_refused(at):
    """By a stopping criterion: a forward of its own would be taken for a step of the generation."""
    model, before = shared("llama"), state_of(shared("llama"))
    with steer(model, random_profile()):
        expected = write(model)
        with pytest.raises(UserError, match="called inside its own generate"):
            write(model, stopping_criteria=[Calls(lambda: model(**prompts(4, 1, False)), at)])
        assert torch.equal(write(model), expected)
    assert state_of(model) == before


def test_model_called_by_a_logits_processor_is_refused():
    model = shared("llama")
    with steer(model, random_profile()), pytest.raises(UserError, match="called inside its own generate"):
        write(model, logits_processor=[CallsModel(lambda: model(**prompts(4, 1, False)))])


def test_generate_inside_its_own_generate_is_refused():
    model = shared("llama")
    with steer(model, random_profile()):
        with pytest.raises(UserError, match="generate.. of this model is running already"):
            write(model, stopping_criteria=[Calls(lambda: write(model))])
        write(model)


@pytest.mark.parametrize("where", ("generated", "all"))
def test_generate_taken_before_the_with_is_refused(where):
    """It would not be followed: nothing of it steered, or all its tokens taken for a prompt's."""
    model = shared("llama")
    taken, plain = model.generate, write(shared("llama"))
    options = {**prompts(), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with steer(model, random_profile(), where=where):
        with pytest.raises(UserError, match="taken from the model before it was steered"):
            taken(**options)
        write(model)
    assert torch.equal(taken(**options), plain)


def test_generate_taken_within_the_with():
    """Afterwards it writes as the plain model does; where the model is steered anew, it was taken before that."""
    model, plain = shared("llama"), write(shared("llama"))
    with steer(model, random_profile()):
        taken = model.generate
    options = {**prompts(), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(taken(**options), plain)
    with steer(model, random_profile()), pytest.raises(UserError, match="taken from the model before it was steered"):
        taken(**options)


# ------------------------------------------------------------------------------- wrappers, autograd modes, other dtypes


class Wrapper(torch.nn.Module):
    """Holds a model and calls its generate(), as peft's PeftModel does."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    @property
    def config(self):
        return self.base_model.config

    def forward(self, **inputs):
        return self.base_model(**inputs)

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


def test_steer_takes_a_wrapper_of_a_model():
    """What is called, the wrapper or the model in it, makes no difference, nor does which of them steer() got."""
    model = tiny()
    wrapper, plain = Wrapper(model).eval(), write(model)
    before = state_of(wrapper)
    with steer(model, random_profile()):
        expected = write(model)
    assert not torch.equal(expected, plain)
    for steered in (wrapper, model):
        statistics = Statistics.of(steered)
        with steer(steered, random_profile()), observe(wrapper, statistics):
            for called in (wrapper, model):
                assert torch.equal(write(called), expected)
            with pytest.raises(UserError, match="steered already"), steer(wrapper, random_profile()):
                pass
        assert statistics.tokens == 32
        assert torch.equal(write(wrapper), plain)
    assert state_of(wrapper) == before


def test_steer_takes_a_peft_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    plain = write(model)
    with steer(model, random_profile()):
        edited = write(model)
        assert torch.equal(write(model.base_model.model), edited) and not torch.equal(edited, plain)
    assert torch.equal(write(model), plain)


def test_inference_mode_around():
    model, statistics, expected_statistics = tiny(), Statistics.of(tiny()), Statistics.of(tiny())
    plain = write(model)
    with steer(model, random_profile()), observe(model, expected_statistics):
        expected = write(model)
    with torch.inference_mode(), steer(model, random_profile()), observe(model, statistics):
        assert torch.equal(write(model), expected)
    with steer(model, random_profile()), torch.inference_mode():
        assert torch.equal(write(model), expected)
    with torch.inference_mode(), steer(model, random_profile(2)) as steering:
        write(model)
        steering.update(random_profile())
        steering.assign([1] * 4)
        assert torch.equal(write(model), expected)
    for name, tensor in expected_statistics.state().items():
        assert torch.equal(tensor, statistics.state()[name])
    assert torch.equal(write(model), plain)


def test_inference_mode_inside_and_left_again():
    """Maps that were made in inference mode serve outside of it, and the other way round."""
    model = tiny()
    with steer(model, random_profile(), where="all"):
        expected = write(model)
    statistics = Statistics.of(model)
    with steer(model, random_profile(), where="all"), observe(model, statistics):
        with torch.inference_mode():
            assert torch.equal(write(model), expected)
        assert torch.equal(write(model), expected)
        with torch.inference_mode():
            assert torch.equal(write(model), expected)


def test_autocast_around():
    """The op computes in the dtype that gate has, and autocast makes that bfloat16."""
    model, statistics, x = tiny(), Statistics.of(tiny()), prompts()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            plain = model(**x).logits
        with torch.no_grad(), hooks(model, [random_profile()], lambda call, batch, tokens: torch.ones(4, 1, dtype=torch.long)):
            expected = model(**x).logits
        with torch.no_grad(), steer(model, random_profile(), where=torch.ones(4, 6, dtype=torch.bool)), \
                observe(model, statistics, where="all"):
            ours = model(**x).logits
    real = x["attention_mask"].bool()
    assert statistics.tokens == x["attention_mask"].sum()
    scale = (expected - plain)[real].abs().max()
    assert (ours - expected)[real].abs().max() < 0.1 * scale
    with steer(model, random_profile()):
        outside = write(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert write(model).shape == outside.shape


def test_float64_is_refused_by_name():
    model = tiny().double()
    before = state_of(model)
    for context in (lambda: steer(model, random_profile()), lambda: observe(model, Statistics.of(model))):
        with pytest.raises(UserError, match="gate: expected float32, bfloat16 or float16, got Double"), context():
            pass
    assert state_of(model) == before


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", ("llama", "uneven"))
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled_while_steered(backend, family):
    """Also where layers are of different widths, so that no tensor holds what all have."""
    model, x, rows, profiles = tiny(), prompts(), [1, 0, 2, 1], [random_profile(1), random_profile(2)]
    if family == "uneven":
        mlp, width = model.model.layers[1].mlp, model.config.intermediate_size // 2
        mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(model.config.hidden_size, width) for _ in range(2))
        mlp.down_proj = torch.nn.Linear(width, model.config.hidden_size)
        profiles = [profile.chosen(profile.index < width) for profile in profiles]
    statistics, expected_statistics = Statistics.of(model), Statistics.of(model)
    assert bool(statistics.held.whole) == (family == "llama")
    with torch.no_grad():
        plain = model(**x).logits
        with steer(model, profiles, rows, where="all"), observe(model, expected_statistics, where="all"):
            expected = model(**x).logits
        with steer(model, profiles, rows, where="all"), observe(model, statistics, where="all"):
            assert close(torch.compile(model, fullgraph=True, backend=backend)(**x).logits, expected)
    assert not close(expected, plain, 0.05) and statistics.tokens == expected_statistics.tokens
    for (ours, *_), (theirs, *_) in zip(statistics.flush().sites, expected_statistics.flush().sites):
        assert ours.sum() > 0 and (ours - theirs).abs().sum() <= 2  # a sum in another order may cross 0


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_copies():
    """Layers' tables and statistics, which are parts of one tensor for all layers, are read and written where they are."""
    from torch._inductor.utils import run_and_get_code

    model, uncached = tiny(num_hidden_layers=4), torch._inductor.config.patch(force_disable_caches=True)  # no old code
    with uncached, torch.no_grad(), steer(model, random_profile(1), where="all"), observe(model, Statistics.of(model), where="all"):
        _, code = run_and_get_code(torch.compile(model, fullgraph=True), **prompts())
    calls = [line for line in "".join(code).splitlines() if "torch.ops.neurons.glu_.default(" in line]
    assert len(calls) == 4, "a call a layer"
    for line in calls:  # edit_ptr, count, sketch, moments and pending are parts of what the code was given
        assert len(re.findall(r"reinterpret_tensor\(arg\d+_1,", line)) == 5, line


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_before_steer():
    """The patch is seen by a model that was compiled, and has run, before; and so is its end."""
    model, x = tiny(), prompts()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        plain = compiled(**x).logits
        for seed in (1, 2):
            with steer(model, random_profile(seed), where="all"):
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
        with steer(model, random_profile(), where="all"):
            expected = model(**x).logits
        with steer(compiled, random_profile(), where="all"):
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
    with steer(model, [random_profile(1), random_profile(2)], [1, 0, 2, 1]) as steering:
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
    with steer(model, random_profile()):
        assert "_compiled_call" not in model.__dict__, "it may hold a graph that does not steer"
        ours = static(model)
        assert torch.equal(ours, write(model)) and not torch.equal(ours, plain)
    assert torch.equal(static(model), plain)


def more_for_two_layers(count, *entered) -> int:
    """By how much count(model), which compiles it, is larger for four layers than for two; entered: what the model is put under."""
    found = []
    for layers in (2, 4):
        model = tiny(num_hidden_layers=layers)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for enter in entered:
                stack.enter_context(enter(model))
            torch._dynamo.reset()
            found.append(count(model))
    return found[1] - found[0]


STEERED_AND_OBSERVED = (lambda model: steer(model, [random_profile(1)] * 4, where="all"),
                        lambda model: observe(model, Statistics.of(model), where="all"))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_checks_nothing_more_in_python_for_each_layer(monkeypatch):
    """The checks before each call of compiled code that are expressions of Python are the slow ones, and a GPU waits for them."""
    from torch._dynamo.guards import GuardBuilder

    checks, add = [], GuardBuilder.add_python_lambda_leaf_guard_to_root
    monkeypatch.setattr(GuardBuilder, "add_python_lambda_leaf_guard_to_root",
                        lambda self, code, *args, **kwargs: checks.extend(code) or add(self, code, *args, **kwargs))

    def count(model):
        checks.clear()
        torch.compile(model, backend="eager")(**prompts())
        return len(checks)

    with torch._dynamo.config.patch(enable_cpp_symbolic_shape_guards=False):  # plain layers of torch 2.14 have none in Python
        torch.compile(torch.sin, backend="eager", dynamic=True)(torch.ones(3, 4))
    assert checks, "nothing was counted, so this test proves nothing"
    assert more_for_two_layers(count, *STEERED_AND_OBSERVED) <= more_for_two_layers(count)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_takes_in_nothing_more_for_each_layer():
    """Tensors that go in are checked too, some ten ways each."""
    def count(model):
        inputs = []
        torch.compile(model, backend=lambda graph, given: inputs.extend(given) or graph.forward)(**prompts())
        return len(inputs)

    plain = more_for_two_layers(count)
    assert plain > 0, "nothing was counted, so this test proves nothing"
    assert more_for_two_layers(count, *STEERED_AND_OBSERVED) == plain
