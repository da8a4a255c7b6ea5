"""steer(): edits equal hooks; profiles, the tables in which the op reads them, keep, update, residual vectors, leaving."""

import itertools
import math

import pytest
import torch

from conftest import prompts, tiny
from personality import Profile, UserError, steer
from personality.mlp import plain_sites
from personality.steer import Tables
from reference import FAMILIES, close, decoding, hooks, random_profile, shared, shifts, state_of, with_logits, write


@pytest.mark.parametrize("family", FAMILIES)
def test_edit_equals_hooks(family):
    """cap, scale, shift and bias, two profiles in a batch, on the whole prompt and while generating."""
    model, x, profiles, rows = shared(family), prompts(), [random_profile(1), random_profile(2)], [1, 2, 0, 1]
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


# ------------------------------------------------------------------------------------------------------------ leaving


def test_left_by_an_exception_while_entering():
    """What is refused after the patch, a residual vector of a layer that is not there, takes the patch off again."""
    model, before = shared("llama"), state_of(shared("llama"))
    wrong = Profile.empty("mine")
    wrong.residual = {7: torch.ones(32)}
    with pytest.raises(UserError, match="profile 'mine': layer 7 of a model of 2"), steer(model, wrong):
        pass
    assert state_of(model) == before
    with steer(model, random_profile()):
        write(model)
    assert state_of(model) == before


@pytest.mark.parametrize("profiles, pattern", (
    ([], "at least one, got none"), (["extraversion"], "Profile objects, got str"), ([None], "Profile objects, got NoneType"),
    ([random_profile(), {"layer": 1}], "Profile objects, got dict"), ("npti", "Profile objects, got str"), (None, "Profile objects, got NoneType")))
def test_what_is_no_profile_is_a_user_error(profiles, pattern):
    model, before = shared("llama"), state_of(shared("llama"))
    with pytest.raises(UserError, match=f"profiles: expected {pattern}"), steer(model, profiles):
        pass
    assert state_of(model) == before
    with steer(model, random_profile()) as steering:
        expected = write(model)
        with pytest.raises(UserError, match=f"profiles: expected {pattern}"):
            steering.update(profiles)
        assert torch.equal(write(model), expected)


@pytest.mark.parametrize("keep", (0, 1.5, -1, math.nan))
def test_wrong_keep_is_a_user_error(keep):
    model, before = shared("llama"), state_of(shared("llama"))
    with pytest.raises(UserError, match="keep: expected a number above 0, at most 1"), steer(model, random_profile(), keep=keep):
        pass
    assert state_of(model) == before


# --------------------------------------------------------------------------------------------------------------- keep


def test_keep_is_reproducible():
    model, edits = shared("llama"), shifts([0] * 20 + [1] * 20, [*range(20)] * 2, [3.0] * 40)
    results = []
    for options in ({}, {"keep": 0.5, "seed": 1}, {"keep": 0.5, "seed": 1}, {"keep": 0.5, "seed": 2}):
        with steer(model, edits, **options):
            results.append(with_logits(model)[1])
    full, first, again, other = results
    assert torch.equal(first, again)
    assert not close(first[1], full[1], 1e-2) and not close(first[1], other[1], 1e-2)


def values_of(tables):
    return tables.sites[0][2]


def test_keep_redraws_at_every_step():
    """The same token again, at the second step, is edited otherwise: a share of each layer's raised neurons."""
    profiles = [shifts([0] * 10 + [1] * 10, [*range(10)] * 2, [1.0] * 20), shifts([1] * 20, range(20), [2.0] * 20)]
    tables = Tables(profiles, plain_sites(2, 48))
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(50):
        tables.thin(0.9, generator)
        drawn.append(values_of(tables)[:, 2].clone())
    drawn = torch.stack(drawn)
    for start, size in ((0, 10), (10, 10), (20, 20)):
        assert ((drawn[:, start:start + size] != 0).sum(1) == round(0.9 * size)).all()
    assert len(drawn.unique(dim=0)) > 40 and ((drawn != 0).float().mean(0) - 0.9).abs().max() < 0.2
    calls = []
    model = shared("llama")
    with steer(model, shifts([0] * 10, range(10), [1.0] * 10), keep=0.5) as steering:
        value = values_of(steering.tables)
        handle = model.model.register_forward_pre_hook(lambda *args: calls.append(tuple(value[:10, 2].tolist())))
        write(model, 6)
        handle.remove()
    assert len(set(calls[1:])) > 2 and all(sum(call) == 5 for call in calls)


def test_keep_leaves_caps_alone():
    capped = Profile.of([(torch.zeros(8, dtype=torch.long), torch.arange(8), torch.zeros(8), torch.zeros(8))])
    tables = Tables([capped], plain_sites(1, 48))
    before = values_of(tables).clone()
    tables.thin(0.1, torch.Generator().manual_seed(0))
    assert torch.equal(values_of(tables), before) and (before[:, 0] == 0).all()


def test_keep_goes_on_with_updated_profiles():
    """update() between two generations, of fewer and of more edits: each draws from what is there now."""
    model = shared("llama")
    few, many = shifts([1] * 4, range(4), [2.0] * 4), shifts([0] * 10 + [1] * 20, [*range(10), *range(20)], [1.0] * 30)
    with steer(model, few, keep=0.5, capacity=30) as steering:
        for profile, kept in ((many, {1.0: 15}), (few, {2.0: 2}), (many, {1.0: 15})):
            steering.update(profile)
            write(model)
            shown = values_of(steering.tables)[:len(profile), 2]
            assert {shift: int((shown == shift).sum()) for shift in shown[shown != 0].tolist()} == kept


# --------------------------------------------------------------------------------------------------- update and tables


def test_update_swaps_edits():
    model, first, second = shared("llama"), random_profile(1), random_profile(2, 30)
    with steer(model, second):
        expected = write(model)
    with steer(model, first, capacity=30) as steering:
        before = write(model)
        steering.update(second)
        assert torch.equal(write(model), expected) and not torch.equal(before, expected)
        for wrong, pattern in ((random_profile(3, 31), "capacity of 30.*capacity=31"), ([first, first], "expected 1")):
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
        Tables([shifts([0], [0], [1.0]), shifts(layer, index, shift, "mine")], plain_sites(2, 48))


@pytest.mark.parametrize("wrong", (Profile(torch.tensor([0, 1]), torch.tensor([1]), torch.ones(2, 4)),
                                   Profile(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.ones(2, 3)),
                                   Profile(torch.tensor([0]), torch.tensor([1]), torch.tensor([[math.nan, 1, 0, 0]]))))
def test_tables_check_shapes_and_caps(wrong):
    with pytest.raises(UserError, match="profile"):
        Tables([wrong], plain_sites(2, 48))


def test_same_neuron_in_two_profiles_is_fine():
    tables = Tables([shifts([0], [5], [1.0]), shifts([0], [5], [2.0])], plain_sites(2, 48))
    assert tables.sites[0][1].tolist() == [5, 5] and values_of(tables)[:, 2].tolist() == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------------------ profiles


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


def test_dense_profile_holds_what_changes_something():
    cap, shift, bias = torch.full((2, 48), math.inf), torch.zeros(2, 48), torch.zeros(2, 48, dtype=torch.float64)
    cap[0, 3], shift[1, 40], bias[1, 40], bias[0, 7] = 0.0, 2.0, -1.0, 0.5
    dense = Profile.dense("mine", cap=cap, shift=shift, bias=bias)
    found = dict(zip(zip(dense.layer.tolist(), dense.index.tolist()), dense.value.tolist()))
    assert found == {(0, 3): [0, 1, 0, 0], (0, 7): [math.inf, 1, 0, 0.5], (1, 40): [math.inf, 1, 2, -1]}
    assert dense.name == "mine" and dense.value.dtype == torch.float32
    assert len(Profile.dense(shift=torch.zeros(2, 48))) == len(Profile.empty()) == len(Profile.of([])) == 0
    part = dense.chosen(dense.layer == 1)
    assert (part.layer.tolist(), part.index.tolist(), part.name) == ([1], [40], "mine")


# ------------------------------------------------------------------------------------------------------------ residual


def with_residual(layer, vector, edits=None):
    profile = edits or Profile.empty()
    profile.residual = {layer: vector}
    return profile


@pytest.mark.parametrize("family", ("llama", "gemma3", "gpt2"))
def test_residual_equals_a_hook(family):
    """A vector a profile is added to a layer's output, for its rows and generated tokens, beside edits of neurons."""
    model, rows, generator = shared(family), [1, 0, 2, 1], torch.Generator().manual_seed(5)
    vectors = [torch.zeros(32), *(2 * torch.randn(2, 32, generator=generator))]
    profiles = [with_residual(1, vectors[1], random_profile(1)), with_residual(1, vectors[2])]
    table, calls = torch.stack(vectors)[torch.tensor(rows)][:, None], []

    def add(module, args, output):
        calls.append(0)
        if len(calls) == 1:  # the prompt
            return output
        hidden = (output[0] if isinstance(output, tuple) else output) + table
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layer = dict(model.named_modules())["transformer.h.1" if family == "gpt2" else "model.layers.1"]
    before = state_of(model)
    handle = layer.register_forward_hook(add)
    with hooks(model, [profiles[0]], decoding([1, 0, 0, 1])):
        expected, expected_logits = with_logits(model)
    handle.remove()
    with steer(model, profiles, [0] * 4) as steering:
        plain = with_logits(model)[1]
        steering.assign(rows)
        ours, logits = with_logits(model)
    assert torch.equal(ours, expected) and close(logits, expected_logits)
    assert torch.equal(logits[:, 1], plain[:, 1]) and not close(logits[1, 2], plain[1, 2], 0.05)
    assert state_of(model) == before


def test_residual_in_the_models_dtype():
    model, vector = tiny().bfloat16(), torch.linspace(-3, 3, 32)
    plain = model(**prompts()).logits
    with steer(model, with_residual(0, vector), where="all"):
        edited = model(**prompts()).logits
    assert edited.dtype == torch.bfloat16 and not close(edited, plain, 0.05)


def test_refused_residual_update_changes_nothing():
    model = shared("llama")
    with steer(model, with_residual(1, torch.ones(32))) as steering:
        expected = write(model)
        with pytest.raises(UserError, match="layer 7 of a model of 2"):
            steering.update(with_residual(7, torch.ones(32)))
        assert torch.equal(write(model), expected)
    with steer(model, random_profile()) as steering:
        expected, wrong = write(model), random_profile(1)
        wrong.residual = {7: torch.ones(32)}
        with pytest.raises(UserError, match="layer 7 of a model of 2"):
            steering.update(wrong)
        assert torch.equal(write(model), expected), "nor its neurons"


def test_residual_of_another_width_is_a_user_error():
    model, before = shared("llama"), state_of(shared("llama"))
    for vectors in ([torch.ones(31)], [torch.ones(32), torch.ones(8)], [torch.ones(1)], [torch.ones(2, 32)]):
        with pytest.raises(UserError, match="residual|width|hidden"), \
                steer(model, [with_residual(1, vector) for vector in vectors], [1] * 4, where="all"):
            model(**prompts())
    with pytest.raises(UserError, match="finite"), steer(model, with_residual(1, torch.full((32,), math.nan))):
        pass
    assert state_of(model) == before
