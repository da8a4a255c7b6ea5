"""Personalities inside vLLM. Here: the parts that need no vLLM, and those that meet its classes where it is installed. The engine
itself is in test_vllm_engine.py."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from conftest import run, save_model
from personality import Profile, UserError, load, vllm
from personality.mlp import find_mlps
from personality.load import mapped_model
from personality.model import fingerprint
from personality.places import Activation, Batches, Places, Table, compare, cut
from personality.train import add_trained
from reference import random_profile

DEPTH, WIDTH, MOST = 2, 48, 64


# ----------------------------------------------------------------------------------------------- tables, shards, the map


def batches(number=3, where="generated", profiles=None, layers=range(DEPTH), neurons=range(WIDTH)):
    """A worker's part, and an activation for each of its layers. Keys are seeds."""
    table = Table(number, MOST, len(layers), len(neurons), "cpu")
    tokens = torch.zeros(40, dtype=torch.int32)
    whose = Batches(table, lambda seed: cut(profiles[seed] if profiles else random_profile(seed), layers, neurons), tokens, where)
    return whose, [Activation(0, tokens, ptr, table.index, table.value) for ptr in table.ptr]


def edited(gate_up, profile: Profile, layer: int):
    """What the op's contract says of tokens of one profile, neuron by neuron."""
    gate, up = gate_up.chunk(2, -1)
    act, bias = F.silu(gate), torch.zeros_like(gate)
    for at, index, (cap, scale, shift, add) in zip(profile.layer.tolist(), profile.index.tolist(), profile.value.tolist()):
        if at == layer:
            act[:, index], bias[:, index] = scale * act[:, index].clamp(max=cap) + shift, add
    return act * up + bias


def check(whose, activations, requests, expected):
    """expected: the seed of each token's profile, or None."""
    whose.before_forward(requests)
    x = torch.randn(len(expected) + 3, 2 * WIDTH)  # three of padding
    for layer, act in enumerate(activations):
        ours = act(x.clone())
        for k, seed in enumerate([*expected, None, None, None]):
            one = edited(x[k:k + 1], random_profile(seed) if seed is not None else Profile.empty(), layer)
            assert torch.allclose(ours[k], one[0], atol=1e-5), f"token {k}"


def test_each_token_has_its_requests_profile():
    whose, acts = batches()
    check(whose, acts, [(1, 3, 0, 3), (None, 2, 0, 4), (2, 1, 5, 1)], [None] * 7 + [2])
    check(whose, acts, [(1, 3, 3, 1), (2, 1, 6, 1), (None, 2, 4, 1)], [1, 2, None])
    check(whose, acts, [(None, 2, 5, 1)], [None])


def test_what_stands_after_the_prompt_is_answer():
    """Chunks of a prompt, a prefix that was found in the cache, an answer that is computed again after its request had to leave."""
    whose, acts = batches()
    check(whose, acts, [(1, 6, 0, 4)], [None] * 4)
    check(whose, acts, [(1, 6, 4, 2)], [None] * 2)
    check(whose, acts, [(1, 6, 6, 1)], [1])
    check(whose, acts, [(1, 6, 0, 9)], [None] * 6 + [1] * 3)
    check(whose, acts, [(1, 6, 4, 4), (2, 8, 7, 2)], [None] * 2 + [1] * 2 + [None, 2])


def test_where_all_edits_the_prompt():
    whose, acts = batches(where="all")
    check(whose, acts, [(1, 6, 0, 4), (None, 4, 0, 2)], [1] * 4 + [None] * 2)


def test_more_profiles_than_places():
    whose, acts = batches(number=2)
    for step in range(9):
        seeds = [step % 5, (step + 1) % 5]
        check(whose, acts, [(seed, 1, 1 + step, 1) for seed in seeds], seeds)
    assert len(whose.begun) <= 2 and sorted(whose.places.of.values()) == [1, 2]


def test_a_profile_is_built_while_its_prompt_is_read():
    whose, _ = batches()
    whose.before_forward([(7, 4, 0, 4)])
    assert 7 in whose.begun and 7 not in whose.places.of
    whose.before_forward([(7, 4, 4, 1)])
    assert 7 not in whose.begun and 7 in whose.places.of
    for seed in range(20):  # requests that never write an answer
        whose.before_forward([(seed, 4, 0, 4)])
    assert len(whose.begun) <= 3


def test_the_least_recently_used_place_is_given_away():
    places = Places(3)
    assert places.seat(dict.fromkeys("abc")) == {"a": 1, "b": 2, "c": 3}
    assert places.seat(dict.fromkeys("a")) == {} and places.seat(dict.fromkeys("ad")) == {"d": 2}
    assert places.seat(dict.fromkeys("be")) == {"b": 3, "e": 1} and places.of == {"d": 2, "b": 3, "e": 1}


def test_no_edit_is_the_op_itself():
    """Bit for bit, beside requests that are edited."""
    whose, acts = batches()
    x = torch.randn(4, 2 * WIDTH)
    plain = acts[0](x.clone())
    whose.before_forward([(None, 1, 1, 2), (1, 1, 1, 2)])
    among = acts[0](x.clone())
    assert torch.equal(among[:2], plain[:2]) and not torch.equal(among[2:], plain[2:])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_tables_are_cut_over_ranks(ranks):
    """Tensor parallel: a rank's part of gate_up gives its part of the whole's; pipeline parallel: a stage's layers alone."""
    profile, x, width = random_profile(3), torch.randn(5, 2 * WIDTH), WIDTH // ranks
    for layer in range(DEPTH):
        whole, parts = edited(x, profile, layer), []
        for rank in range(ranks):
            neurons = range(rank * width, (rank + 1) * width)
            whose, acts = batches(layers=range(layer, layer + 1), neurons=neurons)
            whose.before_forward([(3, 0, 0, 5)])
            own = torch.cat([half[:, neurons.start:neurons.stop] for half in x.chunk(2, -1)], -1)
            parts.append(acts[0](own))
        assert torch.allclose(torch.cat(parts, -1), whole, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_op_compiles_whole(dtype):
    whose, acts = batches()
    whose.before_forward([(1, 0, 0, 3)])
    x = torch.randn(5, 2 * WIDTH, dtype=dtype)

    def layer(x):
        return acts[1](x * 2) @ torch.ones(WIDTH, 3, dtype=dtype)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-4 if dtype == torch.float32 else 0.3)
    whose.before_forward([(2, 0, 0, 5)])
    assert torch.allclose(compiled(x), layer(x), atol=1e-4 if dtype == torch.float32 else 0.3), "tables and map are read anew"
    torch.library.opcheck(torch.ops.neurons.gate_up_, (x.clone(), 0, acts[0].tokens, acts[0].ptr, acts[0].index, acts[0].value))


# ------------------------------------------------------------------------------------- settings, spelling, keys and values


@pytest.fixture(scope="module")
def neurons(small, tmp_path_factory):
    """Two traits, one with trained edits, and a character."""
    out = tmp_path_factory.mktemp("served")
    add_trained(small.model, small.tokenizer, small.bench, run(small, out, "extraversion").identify())
    run(small, out, "openness").identify()
    (out / "characters").mkdir()
    (out / "characters" / "ada.toml").write_text('method = "npti"\n[traits]\nextraversion = 1\nopenness = -0.7\n')
    return out


def config_of(small, neurons, given=None, **changes):
    """As much of vLLM's configuration as is looked at."""
    parts = {"model_config": dict(model=str(small.model_dir), revision=None, is_moe=False, quantization=None, runner_type="generate"),
             "parallel_config": dict(use_ubatching=False, prefill_context_parallel_size=1),
             "cache_config": dict(kv_sharing_fast_prefill=False), "load_config": dict(download_dir=None),
             "device_config": dict(device_type="cpu"),
             "scheduler_config": dict(max_num_seqs=4)}
    for key, value in changes.items():
        next((part for part in parts.values() if key in part), {})[key] = value
    parts = {name: SimpleNamespace(**part) for name, part in parts.items()}
    given = {"neurons": str(neurons), "characters": str(neurons / "characters"), **(given or {})}
    rest = {key: changes.get(key) for key in ("speculative_config", "lora_config", "kv_transfer_config")}
    return SimpleNamespace(**parts, **rest, additional_config={"personality": given})


@pytest.fixture(scope="module")
def served(small, neurons):
    return vllm.Served(config_of(small, neurons))


def test_settings(small, neurons):
    settings = vllm.settings_of(config_of(small, neurons))
    assert (settings.profiles, settings.where, settings.suppress) == (256, "generated", "cap")
    assert vllm.settings_of(config_of(small, neurons, max_num_seqs=300)).profiles == 300
    assert vllm.settings_of(SimpleNamespace(additional_config={})) is None
    for given, words in (({"profiles": 3}, "at least --max-num-seqs, 4, got 3"), ({"where": "nowhere"}, "where"),
                         ({"neuronz": "x"}, "unrecognized"), ({"profiles": "many"}, "whole number")):
        with pytest.raises(UserError, match=words):
            vllm.settings_of(config_of(small, neurons, given))
    with pytest.raises(UserError, match="^--additional-config, personality: unrecognized arguments: --neuronz=x$"):
        vllm.settings_of(config_of(small, neurons, {"neuronz": "x"}))
    with pytest.raises(UserError, match="these neurons were selected already"):
        vllm.settings_of(config_of(small, neurons, {"neurons": "npti:x", "min_delta": 0.2}))


@pytest.mark.parametrize("changes, words", [
    ({"speculative_config": 1}, "speculative decoding"), ({"is_moe": True}, "mixtures of experts"), ({"lora_config": 1}, "LoRA"),
    ({"quantization": "fp8"}, r"quantised layers \(fp8\)"), ({"kv_transfer_config": 1}, "KV transfer"),
    ({"device_type": "tpu"}, "the device tpu"), ({"use_ubatching": True}, "dual batch"),
    ({"kv_sharing_fast_prefill": True}, "fast-prefill")])
def test_what_cannot_be_is_refused_at_start(small, neurons, changes, words):
    with pytest.raises(UserError, match=words) as refusal:
        vllm.Served(config_of(small, neurons, **changes))
    assert "\n" not in str(refusal.value)


def test_neuron_files_of_another_model_are_refused(small, neurons, tmp_path):
    config = config_of(small, neurons)
    config.model_config.model = str(save_model(tmp_path / "other", **{"model.layers.0.mlp.gate_proj.weight": 1.0}))
    with pytest.raises(UserError, match="was made with"):
        vllm.Served(config)


def test_the_mapped_model_has_the_loaded_ones_fingerprint(small):
    assert fingerprint(mapped_model(str(small.model_dir))) == fingerprint(small.model)


def test_spellings(served):
    texts = {served.read(given) for given in ("extraversion=1,openness=0", " extraversion = 1", '{"traits": {"Extraversion": 1}}')}
    assert len(texts) == 1 and len(served.profile(texts.pop())), "one personality, one profile, one key"
    assert served.read("extraversion=0") == "" and served.read("ada") == served.read("npti:openness=-0.7,extraversion=1")
    assert served.read("npti:extraversion=1") != served.read("extraversion=1")


@pytest.mark.parametrize("given, words", [
    ("extraversion=much", "expected the name of a character"), ("cheerfulness=1", "expected some of"), ("", "expected a text"),
    (7, "expected a text"),
    ("agreeableness=1", "no neuron files here of agreeableness"), ("openness=1", "no trained edits"), ("{", "personality"),
    ("activation:extraversion=1", "residual"), ("npti:extraversion=nan", "expected some of"), ("ada.toml", "name of a character")])
def test_what_makes_no_sense_is_refused(served, given, words):
    with pytest.raises(UserError, match=words):
        served.read(given)


def test_too_many_edits_are_refused(served, monkeypatch):
    monkeypatch.setattr(served, "most", 1)
    monkeypatch.setattr(served, "kept", {})
    with pytest.raises(UserError, match="there is room for 1 a request"):
        served.read("npti:extraversion=1")


def request_of(text, prompt: int):
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=text and {"personality": text}), num_prompt_tokens=prompt)


def test_keys_of_blocks():
    """Of blocks of 4 tokens: who may use which. What follows a block has its hash, so only its own edits stand in a block's key."""
    keys = vllm.with_profile(lambda request, start, end, at: ((("salt", "s"),) if start == 0 else None, at + 1))
    one, other = (json.dumps({"strengths": {"openness": level}, "where": "generated"}) for level in (1, 0.5))

    def of(text, prompt):
        return [keys(request_of(text, prompt), start, start + 4, 0)[0] for start in (0, 4, 8)]

    plain = of(None, 6)
    assert plain == [(("salt", "s"),), None, None]
    assert of(one, 12) == plain, "a prompt that is not edited is everybody's"
    assert of(one, 6)[0] == plain[0] and of(one, 6)[1] not in (None, of(other, 6)[1], of(one, 5)[1], of(one, 4)[1])
    assert of(one, 8)[:2] == plain[:2] and of(one, 8)[2] != plain[2], "who asks with the answer as a prompt has it unedited"
    everywhere = json.dumps({"strengths": {"openness": 1}, "where": "all"})
    assert all(key != other for key, other in zip(of(everywhere, 12), plain))
    assert keys(SimpleNamespace(sampling_params=None, num_prompt_tokens=6), 0, 4, 0) == (plain[0], 1), "a pooling request has none"


# --------------------------------------------------------------------------------------------------- vLLM's own classes


def test_the_state_of_model_runner_v2(small, neurons, monkeypatch):
    """With input batches as vLLM makes them; their padding, and dummy batches, are nobody's."""
    pytest.importorskip("vllm")
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    base = type("State", (), {"__init__": lambda self, *_: None, "add_request": lambda self, index, data: None,
                              "remove_request": lambda self, name: None,
                              "prepare_inputs": lambda self, batch, states: {"positions": 1}})
    whose, acts = batches()
    monkeypatch.setattr(vllm, "steer_modules", lambda config, model, device: whose)
    state = vllm.steered_state(base)(None, None, None, "cpu")

    def add(name, seed, prompt):
        params = SimpleNamespace(extra_args=None if seed is None else {"personality": seed, "other": 1})
        state.add_request(0, SimpleNamespace(req_id=name, sampling_params=params, prompt_len=prompt))

    def step(names, done, new, padded):
        batch = InputBatch.make_dummy(len(names), sum(new), InputBuffers(8, 64, torch.device("cpu")))
        batch = replace(batch, req_ids=names, num_tokens_after_padding=padded, num_computed_tokens_np=np.array(done, np.int32),
                        num_scheduled_tokens=np.array(new, np.int32))
        assert state.prepare_inputs(batch, None) == {"positions": 1}
        return whose.tokens.tolist()[:padded]

    add("a", 1, 3), add("b", None, 4), add("c", 2, 2)
    assert step(["a", "b", "c"], [0, 0, 0], [3, 4, 2], 16) == [0] * 16
    one, two = step(["c", "a"], [2, 3], [1, 1], 8)[:2]
    assert {one, two} == {1, 2} and step(["b", "a"], [4, 4], [1, 1], 4) == [0, two, 0, 0]
    state.remove_request("a")  # to make room; it comes back with a part of its answer
    add("a", 1, 3)
    assert step(["a", "c"], [0, 3], [6, 1], 8) == [0] * 3 + [two] * 3 + [one, 0]
    assert step(["d", "e"], [5, 5], [1, 1], 4) == [0] * 4


def test_the_state_is_put_where_vllm_looks_for_it(monkeypatch):
    pytest.importorskip("vllm")
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    assert issubclass(vllm.with_state(lambda *_: DefaultModelState)(None, None), DefaultModelState)
    with pytest.raises(UserError, match="SimpleNamespace"):
        vllm.with_state(lambda *_: SimpleNamespace)(None, None)


def test_refusals_are_vllms(served):
    """HTTP 400, in its server."""
    exceptions = pytest.importorskip("vllm.exceptions")

    def process(self, request_id, prompt, params, supported):
        return SimpleNamespace(sampling_params=SimpleNamespace(**vars(params)))

    ask, params = vllm.with_personality(process), SimpleNamespace(extra_args={"personality": "extraversion=1", "other": 1})
    inputs = SimpleNamespace(personality=served)
    text = served.read("extraversion=1")
    assert ask(inputs, "r", "p", params, ()).sampling_params.extra_args == {"other": 1, "personality": text}
    assert params.extra_args["personality"] == "extraversion=1", "the caller's own are left alone"
    params.extra_args = {"personality": "extraversion=0"}
    assert ask(inputs, "r", "p", params, ()).sampling_params.extra_args == {}
    params.extra_args = {"personality": "cheerfulness=1"}
    with pytest.raises(exceptions.VLLMValidationError, match="expected some of"):
        ask(inputs, "r", "p", params, ())
    with pytest.raises(exceptions.VLLMValidationError, match="no neuron files"):
        ask(SimpleNamespace(personality=None), "r", "p", params, ())


def test_registering_twice_is_as_once():
    pytest.importorskip("vllm")
    from vllm.v1.core import kv_cache_utils

    vllm.register()
    first = kv_cache_utils.generate_block_hash_extra_keys
    vllm.register()
    assert kv_cache_utils.generate_block_hash_extra_keys is first and not hasattr(first.__wrapped__, "personality")


def test_depth_and_width(served, small):
    mlps = find_mlps(small.model)
    assert (served.depth, served.width) == (len(mlps), mlps[0].width)


@pytest.mark.parametrize("changes, words", [({"runner_type": "pooling"}, "--runner pooling"),
                                            ({"prefill_context_parallel_size": 2}, "prefill context")])
def test_more_that_cannot_be(small, neurons, changes, words):
    with pytest.raises(UserError, match=words):
        vllm.Served(config_of(small, neurons, **changes))


def test_one_thread_at_a_time_makes_a_profile(served, monkeypatch):
    """vLLM reads requests in several; what they share holds no lock of its own."""
    locked, of = [], served.of
    monkeypatch.setattr(served, "of", lambda who: locked.append(served.lock.locked()) or of(who))
    served.read("extraversion=1")
    assert locked == [True] and not served.lock.locked()


def test_a_name_makes_no_other_personality(served):
    assert served.read('{"traits": {"extraversion": 1}, "name": "Ada"}') == served.read("extraversion=1")


def test_spaces_before_json(served):
    assert served.read(' {"traits": {"extraversion": 1}}') == served.read("extraversion=1")
    with pytest.raises(UserError, match="expected a text"):
        served.read(" ")


def test_what_else_tells_blocks_apart_still_does():
    """A salt, or an image, beside a personality."""
    keys = vllm.with_profile(lambda request, start, end, at: ((("salt", "s"),), at))
    everywhere = json.dumps({"strengths": {"openness": 1}, "where": "all"})
    assert keys(request_of(everywhere, 12), 0, 4, 0)[0][0] == ("salt", "s") and len(keys(request_of(everywhere, 12), 0, 4, 0)[0]) == 2


def test_the_servers_where_goes_with_each_request(small, neurons):
    """Else blocks of edited prompts would be everybody's."""
    everywhere = vllm.Served(config_of(small, neurons, {"where": "all"}))
    assert json.loads(everywhere.read("extraversion=1"))["where"] == "all"


def test_settings_are_heeded(small, neurons):
    """--suppress, --min-delta."""
    def profile(**given):
        which = vllm.Served(config_of(small, neurons, given))
        return which.profile(which.read("npti:extraversion=-1"))

    plain = profile()
    assert 0 < len(profile(min_delta=0.15)) < len(plain) and not plain.value[:, 0].isinf().all()
    assert profile(suppress="none").value[:, 0].isinf().all()


def test_a_trait_of_0_needs_no_file(served):
    assert served.read("agreeableness=0,extraversion=1") == served.read("extraversion=1")


def test_an_activation_that_is_another_is_refused():
    """Numbers that differ, and such that are none."""
    gelu = lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]  # noqa: E731
    silu = lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]  # noqa: E731
    _, acts = batches()
    compare(silu, acts[0], WIDTH, "cpu", torch.float32)
    for wrong in (gelu, lambda x: silu(x) * torch.nan):
        with pytest.raises(UserError, match="differ on a random vector"):
            compare(wrong, acts[0], WIDTH, "cpu", torch.float32)


def test_a_model_of_several_files_and_one_that_lacks_some(small, tmp_path):
    small.model.save_pretrained(tmp_path / "several", max_shard_size="30KB")
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2 and fingerprint(mapped_model(str(tmp_path / "several"))) == fingerprint(small.model)
    for file in files[1:]:
        file.unlink()
    with pytest.raises(UserError, match="no weights of layer"):
        mapped_model(str(tmp_path / "several"))


def test_the_mapped_model_is_of_the_revision(small, neurons, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(load, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(small.model_dir))
    config = config_of(small, neurons, model="somebody/model", revision="v2", download_dir=str(tmp_path))
    vllm.Served(config)
    (name, options), = asked
    assert (name, options["revision"], options["cache_dir"]) == ("somebody/model", "v2", str(tmp_path))
