"""Mixtures of experts: edits and statistics follow the routed token, against plain PyTorch that goes through the experts one by one."""

import contextlib
import math
import sys

import pytest
import torch
import transformers

import identify
from conftest import prompts, run
from personality import POLES, Neurons, Profile, Statistics, UserError, dpn_le, observe, steer
from personality.inflight import Engine
import personality.observe  # noqa: F401  (the module, of which the package shows the function)
from personality.mlp import Experts, find_mlps, plain_sites, shape_of
from personality.model import fingerprint
from personality.neurons import show_neurons
from personality.op import op
from personality.rows import replace
from personality.steer import Tables
from personality.train import biased
from reference import close, decoding, random_profile, shifts, state_of, with_logits, write

observed = sys.modules["personality.observe"]
SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    "Mixtral": dict(intermediate_size=20, num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2),
    "Olmoe": dict(intermediate_size=20, num_experts=4, num_experts_per_tok=3),
    "Qwen2Moe": dict(moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=24),
    "DeepseekV3": dict(moe_intermediate_size=20, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=2,
                       num_key_value_heads=4, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, head_dim=4, qk_rope_head_dim=4, qk_nope_head_dim=4,
                       v_head_dim=8),
}


def tiny(family="Mixtral", **options):
    torch.manual_seed(0)
    values = {**SHAPE, **FAMILIES.get(family, {}), **options}
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**values)).eval()
    for parameter in model.parameters():  # far from zero, so that edits and rows show
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def profile_of(model, seed=0, strength=6.0):
    depth, width = shape_of(find_mlps(model))
    return random_profile(seed, depth * width // 4, strength, width, depth)


@contextlib.contextmanager
def plainly(model, profiles=(), number=decoding([1])):
    """The model with its experts one after the other, and its plain MLPs, in plain PyTorch, edited as the op's contract says; yields
    by site a list of (numbers (tokens), activations (tokens, neurons), products), one a forward, NaN where an expert was not asked."""
    calls, latest, seen = [], [], [[] for _ in find_mlps(model)]

    def before(module, args, kwargs):
        latest[:] = [number(len(calls), *kwargs["input_ids"].shape).flatten()]
        calls.append(1)

    def edited(mlp, a, u, who, first):
        product = a * u
        for k, profile in enumerate(profiles, 1):
            for layer, index, (cap, scale, shift, bias) in zip(profile.layer.tolist(), profile.index.tolist(), profile.value.tolist()):
                j = index - first
                if layer == mlp.layer and 0 <= j < mlp.width:
                    own = (scale * a[:, j].clamp(max=cap) + shift) * u[:, j] + bias
                    product[:, j] = torch.where(who == k, own, product[:, j])
        return product

    def experts(mlp, site):
        def forward(x, index, weights):
            y, who = torch.zeros_like(x), latest[0]
            a, h = (torch.full((len(x), mlp.neurons), math.nan) for _ in range(2))
            for e in range(mlp.experts):
                token, k = (index == e).nonzero(as_tuple=True)
                gate, up = (x[token] @ mlp.module.gate_up_proj[e].T).chunk(2, -1)
                act, own = mlp.act_module(gate), slice(e * mlp.width, (e + 1) * mlp.width)
                a[token, own], h[token, own] = act, act * up
                product = edited(mlp, act, up, who[token], mlp.first + e * mlp.width)
                y.index_add_(0, token, (product @ mlp.module.down_proj[e].T) * weights[token, k, None])
            seen[site].append((who, a, h))
            return y
        return forward

    def plain(mlp, site):
        def forward(x):
            a, up = mlp.act_module(mlp.gate(x)).flatten(0, -2), mlp.up(x).flatten(0, -2)
            seen[site].append((latest[0], a.clone(), a * up))
            return mlp.down(edited(mlp, a, up, latest[0], mlp.first).view(*x.shape[:-1], -1))
        return forward

    with contextlib.ExitStack() as undo, torch.no_grad():
        undo.callback(model.model.register_forward_pre_hook(before, with_kwargs=True).remove)
        for site, mlp in enumerate(find_mlps(model)):
            replace(undo, mlp.module, "forward", (experts if isinstance(mlp, Experts) else plain)(mlp, site))
        yield seen


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_follow_the_routed_token(family):
    """Rows of a batch with personalities of their own, over a whole generation; afterwards the model is as it was."""
    model, before = tiny(family), None
    before, plain = state_of(model), with_logits(model)
    edits = [profile_of(model, seed) for seed in (1, 2)]
    with plainly(model, edits, decoding([0, 1, 2, 1])):
        ids, logits = with_logits(model)
    with steer(model, edits, rows=[0, 1, 2, 1]):
        ours, our_logits = with_logits(model)
    assert torch.equal(ours, ids) and close(our_logits, logits, 1e-3) and not torch.equal(ours[1:], plain[0][1:])
    assert close(our_logits[:, 0], plain[1][:, 0], 1e-4), "the row without a personality"
    assert state_of(model) == before and torch.equal(with_logits(model)[1], plain[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_of_the_tokens_that_an_expert_saw(family, monkeypatch):
    model = tiny(family)
    number = decoding([1, 2, 2, 1])
    with plainly(model, number=number) as seen:
        write(model, 9)
    statistics = Statistics.of(model, 2)
    with observe(model, statistics, [0, 1, 1, 0]), steer(model, profile_of(model), rows=[0] * 4):
        write(model, 9)
    monkeypatch.setattr(observed, "FEWEST", 6)
    found, some = statistics.summary(), 0
    for mlp, forwards in zip(find_mlps(model), seen, strict=True):
        who, a, h = map(torch.cat, zip(*forwards))
        where = slice(mlp.first, mlp.first + mlp.neurons)
        both = [~a[who == group].isnan() for group in (1, 2)]
        few = torch.stack([asked.sum(0) for asked in both]).min(0).values < 6
        for group, asked in enumerate(both):
            mine = {name: found[name][group, mlp.layer, where] for name in found}
            assert torch.equal(mine["seen"], asked.sum(0).int())
            prob = (a[who == group + 1].nan_to_num() > 0).sum(0) / asked.sum(0).clamp(min=1)
            mean = h[who == group + 1].double().nanmean(0).nan_to_num()
            assert close(mine["prob"], prob.masked_fill(few, 0), 1e-5) and close(mine["mean"], mean.masked_fill(few, 0).float(), 1e-4)
            some += int((~few).sum())
    assert some > 40 and bool((found["seen"] == 0).any() or family != "DeepseekV3"), "a narrow layer's end is empty"


@pytest.mark.parametrize("share", (1, 3))
def test_statistics_do_not_hang_on_which_experts_share_a_ring(share, monkeypatch):
    """Of two groups, in both of which an expert has several hundred tokens; and what is pending counts as memory."""
    model, found = tiny(), []
    ids = torch.randint(3, 97, (16, 100), generator=torch.Generator().manual_seed(0))
    for experts in (4, share):
        monkeypatch.setattr(observed, "SHARE_A_RING", experts)
        statistics = Statistics.of(model, 2)
        with torch.no_grad(), observe(model, statistics, [0, 1] * 8, "all"):
            for part in ids.split(40, 1):
                model(input_ids=part, use_cache=False)
        found.append(statistics)
    one, several = found
    assert [len(site[3]) for site in one.sites] == [1, 1] and [len(site[3]) for site in several.sites] == [-(-4 // share)] * 2
    assert several.bytes - one.bytes == 2 * (-(-4 // share) - 1) * op().pending_bytes
    assert one.tokens.tolist() == [800, 800] and all(torch.equal(a, b) for a, b in zip(one.state().values(), several.state().values()))


def test_planted_neurons_of_experts_are_recovered(monkeypatch):
    """As in test_observe.py: neurons that fire if a marker stands in the prompt. In an expert, and in a shared one."""
    model, high, low = tiny("Qwen2Moe"), 50, 60
    planted = {"high": {(0, 7), (1, 20 * 3 + 5), (1, 80 + 3)}, "low": {(0, 20 + 19), (1, 11)}}
    with torch.no_grad():
        for parameter in (model.model.embed_tokens.weight, model.lm_head.weight):
            parameter[:, 30:] = 0
        model.model.embed_tokens.weight[high, 30] = model.model.embed_tokens.weight[low, 31] = 8
        for number, layer in enumerate(model.model.layers):
            attention, block = layer.self_attn, layer.mlp
            attention.o_proj.weight[30:] = 0
            block.gate.weight[:, 30:] = block.shared_expert_gate.weight[:, 30:] = 0
            block.experts.down_proj[:, 30:] = block.shared_expert.down_proj.weight[30:] = 0
            block.experts.gate_up_proj[..., 30:] = block.shared_expert.gate_proj.weight[:, 30:] = 0
            if number == 0:  # the same attention everywhere
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    getattr(attention, name).weight.zero_()
                    if getattr(attention, name).bias is not None:
                        getattr(attention, name).bias.zero_()
                for k in (0, 1):
                    attention.v_proj.weight[k, 30 + k] = attention.o_proj.weight[30 + k, k] = 1
            for pole, sign in zip(POLES, (40, -40)):
                for index in (index for of_layer, index in planted[pole] if of_layer == number):
                    e, j = divmod(index, 20)
                    gate, down = ((block.experts.gate_up_proj[e], block.experts.down_proj[e]) if e < 4 else
                                  (block.shared_expert.gate_proj.weight, block.shared_expert.down_proj.weight))
                    gate[j], down[:, j] = 0, 0
                    gate[j, 30:] = torch.tensor([sign, -sign])
    x = prompts(40, 7, pad_rows=False)
    x["input_ids"][:, 0] = torch.tensor([high, low] * 20)
    x["input_ids"][:, 1:][(x["input_ids"][:, 1:] == high) | (x["input_ids"][:, 1:] == low)] = 5
    statistics = Statistics.of(model, 2)
    with observe(model, statistics, [0, 1] * 20):
        write(model, 8, **x, suppress_tokens=[high, low])
    monkeypatch.setattr(observed, "FEWEST", 10)
    neurons = Neurons(statistics.summary(), {})
    for pole in POLES:
        layer, index, delta, _ = neurons.select(pole, min_delta=0.9, min_neurons=0)
        assert set(zip(layer.tolist(), index.tolist())) == planted[pole] and (delta > 0.99).all()
    monkeypatch.setattr(observed, "FEWEST", 10**6)
    assert not any(tensor[..., :80].any() for name, tensor in statistics.summary().items() if name != "seen"), "too few for any expert"


def test_experts_that_saw_few_tokens(small, tmp_path, monkeypatch, capsys):
    """identify.py says how many neurons have no statistics for that, and writes no file where none has; DPN-LE's quantile and NPTI's
    share are of those that have."""
    model = mixture()
    monkeypatch.setattr(observed, "FEWEST", 40)
    neurons = run(small, tmp_path / "out", model=(model, small.tokenizer), limit=8).identify()
    there, known = int((neurons.seen > 0).any(0).sum()), int(neurons.known.sum())
    assert 0 < known < there == 2 * 104
    show_neurons(neurons)
    assert f"{there - known} of {there} neurons are of experts that saw too few tokens" in capsys.readouterr().err
    chosen = dpn_le([(neurons, 1.0)], min_effect=0.0)
    assert neurons.known[chosen.layer, chosen.index].all() and len(chosen) == 1, "0.5 % of a layer's that are known, so its best"
    monkeypatch.setattr(observed, "FEWEST", 10**6)
    neurons = run(small, tmp_path / "shared", model=(model, small.tokenizer), limit=8).identify()
    assert int(neurons.known.sum()) == 2 * 24, "the shared expert sees all"
    model = mixture("Mixtral")
    with pytest.raises(UserError, match="no expert saw .* tokens under either pole: a higher --limit"):
        run(small, tmp_path / "none", model=(model, small.tokenizer), limit=8).identify()


def mixture(family="Qwen2Moe"):
    """With the name that a loaded model has."""
    model = tiny(family)
    model.source = family
    return model


def test_large_statistics_are_kept_once(small, tmp_path, monkeypatch):
    """Then answers are read once they are written, which counts the same; and no room for them is one line."""
    model = mixture()
    monkeypatch.setattr(observed, "FEWEST", 1)
    twice = run(small, tmp_path / "twice", model=(model, small.tokenizer)).identify()
    monkeypatch.setattr(identify.Run, "LARGE", 0)
    once = run(small, tmp_path / "once", model=(model, small.tokenizer)).identify()
    assert once.meta["tokens"] == twice.meta["tokens"] and (once.prob - twice.prob).abs().max() < 0.05

    def none(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Statistics, "of", none)
    with pytest.raises(UserError, match="out of memory: the statistics of 208 neurons"):
        run(small, tmp_path / "no", model=(model, small.tokenizer)).identify()


def test_latent_attention_is_not_served(small):
    with pytest.raises(UserError, match="DeepseekV3ForCausalLM: .*latent attention: this model can't be served"):
        Engine(lambda: (tiny("DeepseekV3"), small.tokenizer))


def test_a_file_of_a_mixture_is_kept_and_read(tmp_path, small, made):
    """The statistics of a mixture have one tensor more; a file whose tensor is another shape is refused."""
    there = Neurons.load(made / "extraversion.safetensors")
    seen = torch.full(there.prob.shape, 300, dtype=torch.int32)
    Neurons({**there.tensors, "seen": seen}, there.meta).save(tmp_path / "a.safetensors")
    assert torch.equal(Neurons.load(tmp_path / "a.safetensors").seen, seen)
    Neurons({**there.tensors, "seen": seen[:, :1]}, there.meta).save(tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="b.safetensors: expected .*seen"):
        Neurons.load(tmp_path / "b.safetensors")


def test_statistics_of_experts_add_up_and_load():
    model = tiny("Qwen2Moe")
    whole, parts = Statistics.of(model), [Statistics.of(model) for _ in range(2)]
    for statistics, rows in ((whole, [0, 0, 0, 0]), (parts[0], [0, -1, 0, -1]), (parts[1], [-1, 0, -1, 0])):
        with observe(model, statistics, rows):
            write(model)
    parts[0].add(parts[1])
    read = Statistics.of(model)
    read.load({name: tensor.clone() for name, tensor in parts[0].state().items()})
    for name, tensor in whole.state().items():
        expected = tensor[1:] if name.startswith("seen") else tensor
        ours = read.state()[name][1:] if name.startswith("seen") else read.state()[name]
        assert close(ours.double(), expected.double(), 1e-12), name
    with pytest.raises(UserError, match="another shape"):
        Statistics(plain_sites(2, 104)).load(read.state())


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_biases_reach_the_experts(family):
    """biased(), which has gradients, gives what the op gives; and a row's own bias stays in its row."""
    model, x = tiny(family), prompts(3)
    depth, width = shape_of(find_mlps(model))
    bias = torch.randn((depth, 3, 1, width), generator=torch.Generator().manual_seed(0)) * 0.3
    with steer(model, [Profile.dense(bias=bias[:, row, 0]) for row in range(3)], where="all"), torch.no_grad():
        expected = model(**x).logits
    own = bias.clone().requires_grad_()
    with biased(model, own):
        logits = model(**x).logits
    real = x["attention_mask"].bool()
    assert close(logits[real], expected[real], 1e-3)
    logits[1].sum().backward()
    assert own.grad[:, 1].any() and not own.grad[:, [0, 2]].any()


def test_shapes_that_are_refused(monkeypatch):
    model = tiny("GptOss", intermediate_size=20, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(UserError, match=r"layer 0, mlp.experts \(GptOssExperts\): not experts"), steer(model, shifts([0], [1], [1.0])):
        pass
    model = tiny()
    monkeypatch.setattr(model.model.layers[1].mlp.experts, "_is_expert_parallel", True)
    with pytest.raises(UserError, match="layer 1, mlp.experts: experts that several processes share"):
        find_mlps(model)
    model = tiny()
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    with pytest.raises(UserError, match=r"layer 0, mlp.experts \(ModuleList\): not experts"):
        find_mlps(model)


def test_fingerprint_of_experts():
    model = tiny()
    mine = fingerprint(model)
    assert mine.startswith("2x80-") and fingerprint(tiny().bfloat16()) == mine
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.neg_()
    assert fingerprint(model) != mine


def test_tables_of_experts():
    """(p - 1) * experts + e + 1 is where an expert's edits stand; what no neuron has is passed over."""
    sites = find_mlps(tiny("Qwen2Moe"))
    tables = Tables([shifts([0, 0, 1], [3, 25, 81], [1.0, 2.0, 3.0]), shifts([0], [25], [4.0])], sites)
    routed, shared = tables.sites[0], tables.sites[3]
    assert routed[0].diff(dim=1).flatten().tolist() == [0, 1, 1, 0, 0, 0, 1, 0, 0] and shared[0].diff(dim=1).flatten().tolist() == [0, 1, 0]
    assert routed[1].tolist() == [3, 5, 5, 1] and routed[2][:, 2].tolist() == [1.0, 2.0, 4.0, 3.0]
    narrow = Tables([shifts([1, 0], [47, 47], [1.0, 2.0])], [*plain_sites(1, 48), *(site for site in plain_sites(2, 40) if site.layer)])
    assert narrow.sites[1][0].diff().sum() == 0 and narrow.sites[0][0].diff().sum() == 1
