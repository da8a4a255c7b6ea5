"""Models that don't fit one device, or are quantised: spread by accelerate, with layers on disk; and other layers than torch's."""

import pytest
import torch
import transformers
from torch.nn import functional as F

import identify
import induce
from conftest import exit_of, main_of, prompts, run, save_model, shared_flags, tiny
from personality import Neurons, Statistics, UserError, load, observe, steer
from personality.bake import Baking
from personality.load import batch_that_fits, load_model, on_device, quantization
from personality.mlp import find_mlps, plain_sites
from personality.model import fingerprint
from personality.rows import Rows
from personality.steer import Tables
from personality.train import biased
from reference import close, random_profile, shifts, state_of, with_logits, write
from test_experts import tiny as mixture

# ------------------------------------------------------------------------------------------------------- several devices


@pytest.fixture(scope="module")
def offloaded(small, tmp_path_factory):
    """The tiny model with the second layer on disk."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return load_model(str(small.model_dir), None, "float32", device_map=places)[0]


def test_layers_on_disk_are_steered_and_observed(small, offloaded):
    """The same in every bit as in memory; and afterwards accelerate's hooks are there as before."""
    mlp, before = offloaded.model.layers[1].mlp, state_of(offloaded)
    assert mlp.gate_proj.weight.is_meta and find_mlps(offloaded)[1].device == torch.device("cpu")
    assert fingerprint(offloaded) == fingerprint(small.model)
    results = []
    for model in (small.model, offloaded):
        statistics = Statistics.of(model, 2)
        with steer(model, [random_profile(1), random_profile(2)], rows=[0, 1, 2, 1]), observe(model, statistics, [0, 1, 1, 0]):
            results.append((*with_logits(model), *statistics.state().values()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert state_of(offloaded) == before and mlp.gate_proj.weight.is_meta


def test_biases_of_layers_on_disk(small, offloaded):
    bias = torch.randn((2, 48), generator=torch.Generator().manual_seed(0))
    with biased(small.model, bias), torch.no_grad():
        expected = small.model(**prompts()).logits
    with biased(offloaded, bias), torch.no_grad():
        assert torch.equal(offloaded(**prompts()).logits, expected)


def test_experts_on_disk(tmp_path):
    """They hold their weights themselves: accelerate fetches them around their forward."""
    model = mixture("Qwen2Moe")
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}
    away = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=str(tmp_path / "away")).eval()
    assert away.model.layers[1].mlp.experts.down_proj.is_meta and fingerprint(away) == fingerprint(model)
    results = []
    for which in (model, away):
        statistics = Statistics.of(which, 2)
        with observe(which, statistics, [0, 1, 1, 0]), steer(which, random_profile(1, 50, 6.0, 104), rows=[0, 1, 1, 0]):
            results.append((*with_logits(which), *statistics.state().values()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_an_offloaded_model_is_not_baked(offloaded):
    with pytest.raises(UserError, match="--save: layers that are .* on disk"):
        Baking(offloaded, shifts([0], [1], [1.0]))


def test_an_embedding_on_disk_is_refused(small):
    with pytest.raises(UserError, match="embedding.*on disk"):
        load_model(str(small.model_dir), None, "float32", device_map={"model": "disk", "lm_head": "cpu"})


def test_tables_and_maps_lie_where_each_mlp_is():
    """The meta device stands for a second GPU: each tensor that the op would take is on the device of its layer."""
    sites = plain_sites(3, 48)
    sites[1].device = torch.device("meta")
    tables = Tables([shifts([0, 1], [3, 4], [1.0, 2.0])], sites)
    assert [{tensor.device.type for tensor in site} for site in tables.sites] == [{"cpu"}, {"meta"}, {"cpu"}]
    assert [{tensor.device.type for tensor in site[:3]} for site in Statistics(sites).sites] == [{"cpu"}, {"meta"}, {"cpu"}]
    rows = Rows(None, 1, 0, "all", tables.held, tables.edits)
    for tokens in (torch.ones(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)):
        rows.put(tokens)
        maps = [rows.arguments(index, None)[0] for index in (0, 1, 2, 1)]
        assert [(len(numbers), numbers.device.type) for numbers in maps] == [(len(tokens), site.device.type) for site in
                                                                             (sites[0], sites[1], sites[2], sites[1])]
        assert maps[0] is maps[2] is tokens and maps[1] is maps[3], "one copy a device and forward"


def test_device_map_is_a_flag(small, tmp_path, monkeypatch, capsys):
    flags = [flag for flag in map(str, shared_flags(small)) if flag not in ("--device", "cpu")]
    main_of(identify, monkeypatch, *flags, "--device-map", "auto", "--trait", "openness", "--limit", 2, "--bench", small.bench_dir,
            "--max-new-tokens", 4, "--out", tmp_path)
    assert (tmp_path / "openness.safetensors").exists()
    code, said = exit_of(induce, monkeypatch, capsys, "--trait", "openness", "--alpha", "1", "--device", "cpu", "--device-map", "auto")
    assert code == 2 and "--device-map: not allowed with argument --device" in said


@pytest.mark.parametrize("most, expected", ((5000, 512), (300, 256), (64, 64), (63, 32), (1, 1)))
def test_batch_size_auto(most, expected):
    """A model on a GPU that holds so many rows."""
    class Model:
        device = torch.device("meta")

        def __call__(self, input_ids, **options):
            if len(input_ids) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            assert input_ids.shape[1] == 400

    assert batch_that_fits(Model(), 64) == expected
    assert batch_that_fits(tiny(), 64) == 64
    most = 0
    with pytest.raises(UserError, match="--batch-size auto: not even one answer of 64 tokens"):
        batch_that_fits(Model(), 64)


def test_batch_size_auto_is_a_flag(small, tmp_path, monkeypatch, capsys):
    main_of(identify, monkeypatch, *shared_flags(small), "--trait", "openness", "--limit", 2, "--bench", small.bench_dir, "--out", tmp_path,
            "--max-new-tokens", 4, "--batch-size", "auto")
    assert "--batch-size auto: 64" in capsys.readouterr().err
    assert Neurons.load(tmp_path / "openness.safetensors").meta["batch_size"] == 64
    code, said = exit_of(identify, monkeypatch, capsys, "--batch-size", "many")
    assert code == 2 and "many" in said


# ------------------------------------------------------------------------------------------------------ quantised layers


class Packed(torch.nn.Module):
    """A linear layer as quantisers make them: no weight of numbers, just codes (of 8 bits, or two of 4 in a byte) and scales."""

    def __init__(self, linear, bits, name):
        super().__init__()
        self.in_features, self.out_features, self.bits, self.bias = linear.in_features, linear.out_features, bits, linear.bias
        scale = linear.weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        codes = (linear.weight / scale).round().to(torch.int8)
        if bits == 4:
            codes = (codes[:, ::2].to(torch.uint8) << 4 | codes[:, 1::2].to(torch.uint8) & 15).flatten()[:, None]  # (numbers / 2, 1)
        self.register_buffer("scale", scale.detach())
        if name == "weight":
            self.weight = torch.nn.Parameter(codes, requires_grad=False)
        else:  # GPTQ and AWQ have no weight at all
            self.register_buffer(name, codes)

    def forward(self, x):
        codes = next(tensor for tensor in (*self.parameters(), *self.buffers()) if not tensor.is_floating_point())
        if self.bits == 4:
            codes = torch.stack([codes.view(torch.int8) >> 4, codes.view(torch.int8) << 4 >> 4], -1).view(self.out_features, -1)
        return F.linear(x, codes.to(x.dtype) * self.scale, self.bias)


def packed(bits, name="weight"):
    model = tiny()
    for layer in model.model.layers:
        for part in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, part, Packed(getattr(layer.mlp, part), bits, name))
    model.config.quantization_config = {"quant_method": "of the test"}
    return model


def unpacked(model):
    """The same model with plain linear layers of what the codes stand for."""
    plain = tiny()
    for ours, theirs in zip(plain.model.layers, model.model.layers):
        for part in ("gate_proj", "up_proj", "down_proj"):
            layer = getattr(theirs.mlp, part)
            getattr(ours.mlp, part).weight.data = layer(torch.eye(layer.in_features)).T.detach().clone()
    return plain


@pytest.mark.parametrize("bits, name", ((8, "weight"), (4, "weight"), (8, "qweight"), (4, "qweight")))
def test_packed_layers(bits, name):
    """Their sizes are in_features and out_features; edits, statistics and gradients are those of the numbers that they stand for."""
    model = packed(bits, name)
    plain, profile, results = unpacked(model), random_profile(1), []
    assert [(mlp.width, mlp.hidden, mlp.dtype) for mlp in find_mlps(model)] == [(48, 32, torch.float32)] * 2
    for which in (model, plain):
        statistics = Statistics.of(which)
        with steer(which, profile), observe(which, statistics):
            results.append((*with_logits(which), *statistics.state().values()))
    for ours, theirs in zip(*results, strict=True):
        assert close(ours.double(), theirs.double(), 1e-3)
    bias = torch.zeros((2, 48), requires_grad=True)
    slopes = []
    for which in (model, plain):
        with biased(which, bias):
            slopes.append(torch.autograd.grad(which(**prompts()).logits.square().sum(), bias)[0])
    assert close(slopes[0], slopes[1], 1e-3) and slopes[0].any()
    with pytest.raises(UserError, match="quantised"):
        Baking(model, shifts([0], [1], [1.0]))


def test_fingerprint_reads_no_packed_bits_as_numbers():
    """Yet every model has its own: another code changes it, another dtype of the rest doesn't."""
    for name in ("weight", "qweight"):
        model, other = packed(4, name), packed(4, name)
        assert fingerprint(model) == fingerprint(packed(4, name).bfloat16()) != fingerprint(unpacked(model)) != fingerprint(packed(8, name))
        codes = getattr(other.model.layers[1].mlp.up_proj, name)
        codes.data = codes.data ^ 1
        assert fingerprint(other) != fingerprint(model)


@pytest.mark.parametrize("kind", ("8bit", "4bit", "int8"))
def test_quantised_for_real(kind, small, tmp_path):
    """By the libraries themselves, as far as they run on a CPU: the model is told apart, written with, and identified."""
    pytest.importorskip({"8bit": "bitsandbytes", "4bit": "bitsandbytes", "int8": "torchao"}[kind])
    folder = save_model(tmp_path / "model")
    tiny(hidden_size=64, intermediate_size=128, num_key_value_heads=4, head_dim=16).save_pretrained(folder)  # in blocks of 64
    model, tokenizer = load_model(str(folder), "cpu", "bfloat16", quantize=kind)
    assert type(find_mlps(model)[0].gate) is not torch.nn.Linear or type(model.model.layers[0].mlp.gate_proj.weight.data) is not torch.Tensor
    assert fingerprint(model) != fingerprint(small.model)
    steered_and_identified(model, tokenizer, small, tmp_path, 128)
    with pytest.raises(UserError, match="--save: layers that are quantised"):
        Baking(model, shifts([0], [1], [1.0]))


def steered_and_identified(model, tokenizer, small, folder, width):
    with observe(model, Statistics.of(model)):
        plain = write(model)
        with steer(model, random_profile(width=width), rows=[0, 1, 0, 1]):
            ours = write(model)
    assert torch.equal(ours[::2], plain[::2]) and not torch.equal(ours[1::2], plain[1::2])
    neurons = run(small, folder / "out", model=(model, tokenizer)).identify()
    assert neurons.meta["fingerprint"] == fingerprint(model) and neurons.prob.any()


def test_fp8_for_real(small, tmp_path):
    """torchao's weights, which keep every sign of the model that they are of."""
    torchao = pytest.importorskip("torchao.quantization")
    folder, config = save_model(tmp_path / "model"), transformers.TorchAoConfig(torchao.Float8WeightOnlyConfig())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
    model.source = "fp8"
    assert fingerprint(model) != fingerprint(small.model)
    steered_and_identified(model, small.tokenizer, small, tmp_path, 48)


@pytest.mark.parametrize("form, bits, number, largest", (("int-quantized", 8, "int", 127), ("float-quantized", 8, "float", 448),
                                                         ("pack-quantized", 4, "int", 7)))
def test_compressed_checkpoint_for_real(form, bits, number, largest, small, tmp_path):
    """In compressed-tensors' forms of int8, FP8 and packed int4: the library unpacks such a model in its first forward, with weights
    of another kind from then on. It is steered before any, and it is the same model before and after."""
    quantization, compressors = (pytest.importorskip(f"compressed_tensors.{part}") for part in ("quantization", "compressors"))
    folder = save_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    weights = quantization.QuantizationArgs(num_bits=bits, type=number, strategy="channel", symmetric=True)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    config = quantization.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=form)
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = (module.weight.abs().amax(1, keepdim=True) / largest).to(module.weight_scale)
    compressor = compressors.ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    model, tokenizer = load_model(str(folder), "cpu", "float32")
    first = fingerprint(model)
    steered_and_identified(model, tokenizer, small, tmp_path, 48)
    assert first == fingerprint(model) != fingerprint(small.model)


def test_experts_are_left_as_they_are(tmp_path, capsys):
    """transformers quantises linear layers: that is said, since experts are nearly all of such a model."""
    pytest.importorskip("bitsandbytes")
    folder = save_model(tmp_path / "model")
    mixture("Mixtral").save_pretrained(folder)
    model, _ = load_model(str(folder), "cpu", "float32", quantize="8bit")
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.float32
    assert "--quantize 8bit: the routed experts stay as they are saved" in capsys.readouterr().err


def test_what_can_not_be_quantised(monkeypatch, small):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--quantize 4bit needs bitsandbytes: pip install -e '.\[quantize\]'"):
        quantization("4bit")


def test_what_is_wrong_with_a_model_is_not_that_it_fits_not():
    class Model:
        device = torch.device("meta")

        def __call__(self, input_ids, **options):
            raise RuntimeError("device-side assert triggered")

    with pytest.raises(RuntimeError, match="assert"):
        batch_that_fits(Model(), 64)


def test_gpus_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(load, "check_cuda", lambda device: None)
    assert on_device("cuda:1").index == 1
    with pytest.raises(UserError, match="expected cuda:0 to cuda:1"):
        on_device("cuda:2")
    for wrong in ("mps", "meta", "cuda:", "gpu"):
        with pytest.raises(UserError, match="expected cpu, cuda or cuda:1"):
            on_device(wrong)


def test_a_tensor_of_another_shape_is_refused():
    info = {"missing_keys": set(), "mismatched_keys": {("model.norm.weight", (3,), (4,))}}
    with pytest.raises(UserError, match="lack 1 tensors.*norm"):
        load.check_loaded(tiny(), info)
