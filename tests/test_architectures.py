"""The forty causal model types that people load most, as tiny random models: which work, and how the others are refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import prompts
from personality import Statistics, UserError, observe, steer
from personality.judges import log_likelihoods, prefill
from personality.mlp import find_mlps, shape_of
from personality.model import read_once
from personality.train import go_on
from reference import close, random_profile, with_logits, write

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MOE = dict(moe_intermediate_size=20, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
           topk_group=1, n_shared_experts=1, first_k_dense_replace=1, shared_expert_intermediate_size=24)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8, head_dim=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
HYBRID = dict(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
              linear_key_head_dim=8, linear_value_head_dim=8)
MPT = dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=128)
WORKS = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "gemma4_text": {}, "phi": {},
    "phi3": {}, "gpt2": dict(n_inner=48), "gpt_neo": dict(num_layers=2, attention_types=[[["global", "local"], 1]]), "gpt_neox": {},
    "gptj": dict(rotary_dim=4), "falcon": dict(head_dim=None), "codegen": dict(rotary_dim=4), "starcoder2": {}, "stablelm": {},
    "olmo2": {}, "olmoe": dict(intermediate_size=20, num_experts=4, num_experts_per_tok=2),
    "mixtral": dict(intermediate_size=20, num_local_experts=4),
    "qwen2_moe": MOE, "qwen3_moe": MOE, "qwen3_next": {**MOE, **HYBRID}, "qwen3_5_text": HYBRID, "deepseek_v2": {**MOE, **LATENT},
    "deepseek_v3": {**MOE, **LATENT}, "glm4": {}, "glm4_moe": MOE, "cohere2": {}, "granite": {}, "smollm3": {}, "exaone4": {},
}
KEEPS_A_STATE = ("qwen3_next", "qwen3_5_text")
REFUSED = {  # and by which words
    "gemma3n_text": (dict(num_kv_shared_layers=0, layer_types=["full_attention"] * 2, activation_sparsity_pattern=[0.95] * 2),
                     "Gemma3nTextMLP.*is not down"),
    "gpt_oss": (dict(num_local_experts=4), "GptOssExperts.*not experts of transformers' experts interface"),
    "llama4_text": (dict(num_local_experts=4, intermediate_size_mlp=48), "Llama4TextExperts.*not experts of transformers' experts"),
    "bloom": ({}, "no MLP of a known structure.*BloomMLP"),
    "opt": (dict(ffn_dim=48, word_embed_proj_dim=32), "no MLP of a known structure.*no module named mlp"),
    "lfm2": (dict(layer_types=["conv", "full_attention"]), "no MLP of a known structure.*Lfm2MLP"),
    "mamba": ({}, "no MLP of a known structure"),
}


def random_model(kind, options):
    torch.manual_seed(0)
    values = {name: value for name, value in {**SHAPE, **options}.items() if value is not None}
    model = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_there_are_forty():
    assert len(WORKS) + len(REFUSED) == 40 and len(WORKS) >= 30


@pytest.mark.parametrize("kind", WORKS)
def test_works(kind):
    """Rows without edits write what the model itself writes, the others don't, and what is fed is counted."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model, x = random_model(kind, WORKS[kind]), prompts(pad_rows=False)
    depth, width = shape_of(find_mlps(model))
    plain, logits = with_logits(model, **x)
    statistics = Statistics.of(model)
    with observe(model, statistics), steer(model, random_profile(0, depth * width // 4, 6.0, width, depth), rows=[0, 1, 0, 1]):
        ours, our_logits = with_logits(model, **x)
    assert torch.equal(ours[::2], plain[::2]) and close(our_logits[:, ::2], logits[:, ::2], 1e-3)
    assert not close(our_logits[1, 1::2], logits[1, 1::2], 1e-2), "the first step that is edited"
    assert statistics.tokens.item() == 16 and any(count.any() for count, *_ in statistics.flush().sites)


@pytest.mark.parametrize("kind", [*WORKS, "mpt"])
def test_reads_as_alone(kind, monkeypatch):
    """Prompts of three lengths that begin alike, as judges and training read them, beside a forward of each whole text; with a
    window that is shorter than some of them and longer than others, where a model of the kind may have one."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    window = {"gpt_neo": {"window_size": 14}, **dict.fromkeys(("mistral", "gemma2", "gemma3_text"), {"sliding_window": 14})}
    model, tokenizer = random_model(kind, {**WORKS.get(kind, MPT), **window.get(kind, {})}), SimpleNamespace(pad_token_id=0)
    asked, said = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [5, 6, 7, 20, 21], [5, 6, 7, 30, 31, 32]], [[11, 12, 13, 2], [20], [30, 31, 32, 33]]
    monkeypatch.setattr("personality.judges.prompt_ids", lambda tokenizer, turns: turns)

    def alone(prompt, answer):
        with torch.no_grad():
            return model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:].float().log_softmax(-1)

    likely = log_likelihoods(model, tokenizer, asked, [said] * 3)
    expected = [[sum(float(alone(prompt, answer)[k, token]) for k, token in enumerate(answer)) for answer in said] for prompt in asked]
    assert close(likely, torch.tensor(expected), 1e-3)
    _, *prompts, _ = prefill(model, tokenizer, asked)
    with torch.no_grad():
        first, again = (go_on(model, prompts, torch.tensor([said[0]] * 3)) for _ in range(2))
    assert torch.equal(first, again), "what was read stays as it is"
    assert close(first, torch.stack([alone(prompt, said[0])[1:] for prompt in asked]), 1e-3)


@pytest.mark.parametrize("kind", WORKS)
def test_a_prompt_of_several_rows_is_read_once(kind):
    """Two prompts, one padded, in five rows, each in edits of its own: what they write is what they write where each reads its own."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model, x, read = random_model(kind, WORKS[kind]), {name: two[[0, 1, 1, 0, 0]] for name, two in prompts(2).items()}, []
    depth, width = shape_of(find_mlps(model))
    with steer(model, random_profile(0, depth * width // 4, 6.0, width, depth), rows=[0, 1, 0, 1, 0]):
        expected, logits = with_logits(model, **x)
        look = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.append(given[0].shape))
        ours, our_logits = with_logits(model, **x, **read_once(model, x["input_ids"], x["attention_mask"], {}))
        look.remove()
    assert torch.equal(ours, expected) and close(our_logits, logits, 1e-3)
    assert read[:2] == ([(5, 6), (5, 1)] if kind in KEEPS_A_STATE else [(2, 5), (5, 1)])


@pytest.mark.parametrize("kind", ("openai-gpt", "modernbert-decoder", "mpt"))
def test_models_that_take_no_cache_read_each_prompt(kind):
    """Writers and judges may be of any kind: these take none, have no decoder that reads ids, or go without (use_cache false)."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    model, x = random_model(kind, MPT if kind == "mpt" else {}), {name: two[[0, 1, 1, 0, 0]] for name, two in prompts(2).items()}
    assert read_once(model, x["input_ids"], x["attention_mask"], {}) == {} and write(model, **x).shape == (5, 11)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind):
    options, words = REFUSED[kind]
    model = random_model(kind, options)
    with pytest.raises(UserError, match=words) as error, steer(model, random_profile()):
        pass
    assert "\n" not in str(error.value)
