"""Makes the scripts importable for pytest, offline, and gives every test the same small models."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # these models are so small that a second thread costs more than it gives


@pytest.fixture(scope="session")
def op():
    import identify

    return identify.op()


def tiny(family="llama", **options):
    """A random float32 model of a family, two layers, small enough for exact comparisons."""
    import transformers

    torch.manual_seed(0)
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "phi3": "Phi3"}
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=128,
                                         pad_token_id=0, bos_token_id=1, eos_token_id=2)
        model = transformers.GPT2LMHeadModel(config)
    elif family == "gemma3":
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**shape, **options}))
    else:
        config = getattr(transformers, names[family] + "Config")(**{**shape, **options})
        model = getattr(transformers, names[family] + "ForCausalLM")(config)
    for parameter in model.parameters():  # far from zero, so that edits and rows show
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompts(batch=4, length=6, pad_rows=True, seed=0):
    """Random left-padded ids and mask."""
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if pad_rows:
        for row in range(batch):
            mask[row, : row % 3] = 0
            ids[row, : row % 3] = 0
    return {"input_ids": ids, "attention_mask": mask}
