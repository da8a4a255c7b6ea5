"""observe() and Statistics: what is counted equals what hooks see, shards add up, and planted neurons are found by it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import prompts, tiny
from personality import POLES, Neurons, Statistics, UserError, observe, steer
from personality.mlp import plain_sites
from personality.op import op
from reference import FAMILIES, close, decoding, hooks, random_profile, shared, state_of, write


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
    layers = statistics.flush().sites
    for (count, sketch, moments, *_), a, h in zip(layers, activations, products, strict=True):
        a, h = torch.cat(a[1:], 1), torch.cat(h[1:], 1).double()  # (rows, steps, d_ff)
        for group, rows in enumerate(([0, 3], [1, 2])):
            assert torch.equal(count[group], (a[rows] > 0)[fed[rows]].sum(0).int())
            assert torch.equal(sketch[group].sum(-1), count[group])
            mine = h[rows][fed[rows]]
            assert close(moments[group, 0], mine.sum(0)) and close(moments[group, 1], (mine ** 2).sum(0))


def test_statistics_are_of_unedited_activations():
    """While a layer's neurons are edited, what is observed of them is what its hook sees before the edit."""
    model, edits = shared("llama"), random_profile(3)
    with hooks(model, [edits], decoding([1, 1, 1, 1])) as (activations, _):
        write(model)
    statistics = Statistics.of(model)
    with observe(model, statistics), steer(model, edits):
        write(model)
    for (count, *_), a in zip(statistics.flush().sites, activations, strict=True):
        assert torch.equal(count[0], (torch.cat(a[1:], 1) > 0).flatten(0, 1).sum(0).int())


def test_percentiles_of_ranks_that_are_just_met():
    """Of four tokens that two fire on, the second smallest activation is not positive, and the third is the smaller of the two."""
    statistics = Statistics(plain_sites(1, 3))
    count, sketch, moments, *_ = statistics.sites[0]
    statistics.tokens += 4
    count += 2
    sketch[0, :, [100, 150]] += 1
    edges = torch.tensor(op().edges)
    for q, near in ((0.5, None), (0.51, 100), (0.75, 100), (0.76, 150), (1.0, 150)):
        value = statistics.percentile(q)
        assert bool((value == 0).all()) if near is None else bool(((edges[near] <= value) & (value <= edges[near + 1])).all())
    statistics.tokens -= 1
    moments[0] = torch.tensor([0.1 + 0.1 + 0.1, 0.03])[:, None]
    summary = statistics.summary()
    assert bool((summary["variance"] >= 0).all()), "the same three times: 0, which rounding would make less"


def test_groups_by_default():
    """One group: for all; several: prompt i is in group i."""
    model = shared("llama")
    for groups, given, expected in ((1, None, [16]), (4, None, [4, 4, 4, 4]), (4, [3, 3, -1, 0], [4, 0, 0, 8])):
        statistics = Statistics.of(model, groups)
        with observe(model, statistics, given):
            write(model)
        assert statistics.tokens.tolist() == expected


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
                for index in (index for of_layer, index in planted[pole] if of_layer == number):
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


# ----------------------------------------------------------------------------------------- kept, added up, read again


def observed(model, groups, seeds):
    statistics = Statistics.of(model, max(groups) + 1)
    with observe(model, statistics, groups):
        for seed in seeds:
            write(model, **prompts(seed=seed))
    return statistics


def same(first, second, tolerance=0.0):
    first, second = first.state(), second.state()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=tolerance, atol=tolerance), name


def test_shards_of_the_prompts_add_up():
    model = shared("llama")
    groups = [0, 1, -1, 1]
    whole, parts = observed(model, groups, range(5)), [observed(model, groups, seeds) for seeds in ((3, 0), (1, 4, 2))]
    parts[0].add(parts[1])
    same(parts[0], whole, 1e-12)
    assert whole.tokens.tolist() == [20, 40]


def test_state_goes_on_in_another_run(tmp_path):
    """What state() gives is all of it, what is pending on a CPU as well: loaded and gone on with, it is as if never left."""
    model = shared("llama")
    whole, first = observed(model, [0] * 4, (0, 1)), observed(model, [0] * 4, (0,))
    save_file(first.state(), tmp_path / "state")
    resumed = Statistics.of(model)
    resumed.load(load_file(tmp_path / "state"))
    same(resumed, first)
    with observe(model, resumed):
        write(model, **prompts(seed=1))
    same(resumed, whole)
    for name, tensor in whole.summary().items():
        assert torch.equal(tensor, resumed.summary()[name]), name
    resumed.zero()
    same(resumed, Statistics.of(model))
    same(first, observed(model, [0] * 4, (0,)))


def test_state_of_another_model_is_refused():
    statistics = Statistics.of(shared("llama"))
    before = {name: tensor.clone() for name, tensor in statistics.state().items()}
    for other in (Statistics(plain_sites(2, 40)), Statistics(plain_sites(3, 48)), Statistics(plain_sites(2, 48), 2)):
        other.tokens += 1
        with pytest.raises(UserError, match="another shape"):
            statistics.load(other.state())
    assert all(torch.equal(before[name], tensor) for name, tensor in statistics.state().items())


def test_broken_layer_is_the_first_that_saw_no_number():
    model = tiny()
    assert observed(model, [0] * 4, (0,)).broken_layer() is None
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    assert observed(model, [0] * 4, (0,)).broken_layer() == 1
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = float("inf")
    assert observed(model, [0] * 4, (0,)).broken_layer() == 0


def test_wrong_groups_are_user_errors():
    model, before = shared("llama"), state_of(shared("llama"))
    for wrong in ([0, 1, 2, 0], [0, -2, 1, 1], [0.5, 1, 1, 1], [True, False, True, True]):
        with pytest.raises(UserError, match="rows: expected a whole number from -1 to 1"):
            with observe(model, Statistics.of(model, 2), wrong):
                pass
    assert state_of(model) == before
