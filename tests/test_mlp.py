"""Finding a model's MLPs and running them through the op: the same mathematics in each family; what is refused by structure."""

import functools
import math

import pytest
import torch
import transformers
from torch.nn import functional as F

from conftest import prompts, tiny
from personality import Profile, Statistics, UserError, observe, steer
from personality.mlp import find_mlps
from personality.model import fingerprint
from reference import FAMILIES, close, hooks, mlp_modules, random_profile, shared, shifts, state_of, with_logits


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


# ------------------------------------------------------------------------------------------------ other tools' hooks


@pytest.mark.parametrize("family, name", (("llama", "act_fn"), ("llama", "gate_proj"), ("phi3", "gate_up_proj"),
                                          ("gpt2", "act")))
def test_hooks_that_could_not_fire_raise(family, name):
    """Both when the hook is put on while the model is patched, and before."""
    model = tiny(family)
    module = getattr(mlp_modules(model)[1], name)
    with steer(model, random_profile(), where="all"):
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


def test_training_mode_survives_a_refused_patch():
    model = tiny().train()
    before = state_of(model)
    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match="hook"), steer(model, random_profile()):
        pass
    handle.remove()
    assert state_of(model) == before


# ------------------------------------------------------------------------------------------------------------ refused


def test_layers_without_an_mlp_are_refused():
    model = tiny()
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(UserError, match="only 1 of 2 layers have an MLP.*Identity"), steer(model, random_profile()):
        pass


def test_unknown_mlp_lists_what_was_seen():
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(UserError, match="BloomMLP.*dense_h_to_4h.*gate_proj") as error:
        Statistics.of(model)
    assert "\n" not in str(error.value)


def test_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(UserError, match="T5ForConditionalGeneration: encoder-decoder"):
        find_mlps(model)


class Other(torch.nn.Module):
    """The names of Llama's MLP, another formula."""

    def __init__(self, mlp, formula):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
        self.formula = formula

    def forward(self, x):
        return self.formula(self, x)


def test_different_mathematics_is_refused():
    """Told by the numbers."""
    formulas = (lambda m, x: m.down_proj(m.act_fn(2 * m.gate_proj(x)) * m.up_proj(x)),
                lambda m, x: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x)),
                lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * (m.up_proj(x) + 1)),
                lambda m, x: 1.02 * m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)))
    for formula in formulas:
        model = tiny()
        model.model.layers[1].mlp = Other(model.model.layers[1].mlp, formula).eval()
        before = state_of(model)
        with pytest.raises(UserError, match=r"layer 1, mlp \(Other\)"), steer(model, random_profile()):
            pass
        assert state_of(model) == before


def test_the_same_mathematics_under_another_class_is_taken():
    model, x = tiny(), prompts()
    with steer(model, random_profile(), where="all"):
        expected = model(**x).logits
    formula = lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x))  # noqa: E731
    model.model.layers[1].mlp = Other(model.model.layers[1].mlp, formula).eval()
    with steer(model, random_profile(), where="all"):
        assert torch.equal(model(**x).logits, expected)


def test_layers_of_different_widths():
    """The narrow layer's indices just end earlier: what a profile has beyond them edits nothing, what is there is edited."""
    model, x = tiny(), prompts(pad_rows=False)
    model.model.layers[1] = tiny(intermediate_size=40).model.layers[1]
    assert [mlp.width for mlp in find_mlps(model)] == [48, 40] and fingerprint(model).startswith("2x48-")
    plain = model(**x).logits
    with steer(model, shifts([1], [47], [9.0]), where="all"):
        assert close(model(**x).logits, plain, 2e-5)
    edits = shifts([0, 1], [47, 39], [9.0, 9.0])
    with hooks(model, [edits], lambda call, batch, tokens: torch.ones(batch, tokens)):
        expected = model(**x).logits
    with steer(model, edits, where="all"):
        assert close(model(**x).logits, expected) and not close(expected, plain, 1e-2)


def test_unknown_activation_is_refused():
    model = tiny(hidden_act="quick_gelu")
    with pytest.raises(UserError, match="LlamaMLP"), steer(model, random_profile()):
        pass
