"""induce.py --save: a personality folded into a plain checkpoint that any engine serves; and what shows that it is there."""

import contextlib
import functools
import itertools
import json
import os
import shutil
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, torch as safetensors_torch

from . import TRAITS
from .endpoint import Endpoint, NoReply
from .methods import Character, Profiles
from .mlp import find_mlps
from .frame import Frame, conversation
from .model import answers, as_published, dtype_of, enough_memory, fingerprint, prompt_ids
from .questions import built_in_bench
from .steer import Profile, steer
from .store import lock_of, only_run, parse_json, read_text, rendered
from .terminal import UserError, say

BAKEABLE = ("llama", "mistral", "qwen2")  # what can be written as a Llama checkpoint, whose MLPs can have biases
GATE_BIAS = 2.0  # of an added neuron: exact in every dtype; its activation is divided out of the down column
PROBES = ("What do you like to do with your friends?", "Tell me about a book.", "How do you cook rice?", "Describe your day.",
          "What makes you angry?", "How do you spend a rainy Sunday?", "What do you think of your neighbours?",
          "Plan a trip with me.")
KEPT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
        "max_position_embeddings", "initializer_range", "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id",
        "tie_word_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "attention_bias")  # of the configuration


class Baking:
    """A profile folded into the weights: a Llama checkpoint with mlp_bias that plain transformers, and any engine, runs.

    A raised neuron i becomes one more neuron, with a gate row of 0, gate bias b, up row U_i and down column D_i * shift / act(b):
    it adds shift * (U_i x) D_i, exactly what the edit adds. A removed neuron's weights are 0, and its place is used first. What
    is added to products or to the residual stream (DPN-LE, activation addition) is constant, and goes into the bias of down. All
    layers have one width, a multiple of 256. rank: keep the best rank-R part only of the sum of a layer's raises, a linear map."""

    def __init__(self, model, profile: Profile, rank: int | None = None):
        self.model, self.profile, self.rank, self.mlps = model, profile, rank, find_mlps(model)
        self.check()
        self.old, self.hidden = self.mlps[0].gate.weight.shape
        layers, value = profile.layer, profile.value
        raised, free = (torch.bincount(layers[chosen], minlength=len(self.mlps)) for chosen in (value[:, 2] != 0, value[:, 1] == 0))
        kept = raised.clamp(max=rank) if rank else raised
        more, self.exact = max(0, int((kept - free).max())), bool((kept == raised).all())
        self.width = -(-(self.old + more) // 256) * 256 if more else self.old
        self.shapes = {"gate": (self.width, self.hidden), "up": (self.width, self.hidden), "down": (self.hidden, self.width)}

    def check(self) -> None:
        config, mlp, cap = self.model.config, self.mlps[0], self.profile.value[:, 0]
        finite = cap[~torch.isinf(cap)]
        if len(finite):
            raise UserError(f"--save: a cap of {finite[0]:g} can't be folded into weights: --suppress zero or none")
        if mlp.up is None or mlp.up is mlp.gate or config.model_type not in BAKEABLE:
            raise UserError(f"--save: {config.model_type} can't be baked: expected one of {', '.join(BAKEABLE)}")
        plain = type(mlp.gate) is torch.nn.Linear and type(mlp.gate.weight.data) is torch.Tensor
        if not plain or any(weight.is_meta for weight in self.model.parameters()):
            raise UserError("--save: layers that are quantised, or on disk, can't be baked: load the model as it was, on the CPU")
        if getattr(config, "sliding_window", None) and (config.model_type == "mistral" or getattr(config, "use_sliding_window", 0)):
            raise UserError(f"--save: {config.model_type} with a sliding window of {config.sliding_window}: a Llama has none")

    def layer(self, number: int) -> dict:
        """The tensors of a layer's MLP, by their names in it."""
        mlp, edited = self.mlps[number], self.profile.layer == number
        dtype, device = mlp.gate.weight.dtype, mlp.gate.weight.device
        index, value = self.profile.index[edited].to(device), self.profile.value[edited].to(device)
        weight = {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in self.shapes.items()}
        bias = {name: torch.zeros(shape[0], device=device) for name, shape in self.shapes.items()}
        for name in self.shapes:
            part = getattr(mlp, name)
            weight[name][:part.weight.shape[0], :part.weight.shape[1]] = part.weight.detach()
            if part.bias is not None:
                bias[name][:len(part.bias)] = part.bias.detach()
        up, down, up_bias = weight["up"][index].float(), weight["down"][:, index].T.float(), bias["up"][index]  # the edited ones'
        scale, shift, constant = value[:, 1:].unbind(1)
        bias["down"] += constant @ down
        if number in self.profile.residual:
            bias["down"] += self.profile.residual[number].to(device, torch.float32)
        weight["down"][:, index] *= scale.to(dtype)
        free, raised = index[scale == 0], shift != 0
        for tensor in (weight["gate"], weight["up"], bias["gate"], bias["up"]):
            tensor[free] = 0
        up, down, up_bias = self.reduced(up[raised], down[raised] * shift[raised, None], up_bias[raised])
        places = torch.cat([free, torch.arange(self.old, self.width, device=device)])[:len(up)]
        # the activation as the model will compute it, in its own dtype: so its rounding is divided out too
        act = mlp.act_module(torch.tensor([GATE_BIAS], device=device, dtype=dtype)).float()
        weight["up"][places], weight["down"].T[places] = up.to(dtype), (down / act).to(dtype)
        bias["gate"][places], bias["up"][places] = GATE_BIAS, up_bias
        return {f"{name}_proj.{what}": tensor.to(dtype).cpu()
                for what, tensors in (("weight", weight), ("bias", bias)) for name, tensor in tensors.items()}

    def reduced(self, up, down, up_bias):
        """(up, down, up_bias) of the added neurons: all of them, or as many as make the best map of rank R."""
        if not self.rank or self.rank >= len(up):
            return up, down, up_bias
        if bool(up_bias.any()):
            raise UserError("--rank: this model's up projection has a bias, which a map of lower rank can't carry")
        q, r = torch.linalg.qr(down.T)  # down.T @ up is (hidden, hidden) of rank len(up) at most
        u, s, v = torch.linalg.svd(r @ up, full_matrices=False)
        return v[:self.rank], (q @ u[:, :self.rank] * s[:self.rank]).T, up_bias[:self.rank]

    def config(self) -> dict:
        """config.json, of a LlamaForCausalLM."""
        old = self.model.config.to_dict()
        values = {name: old[name] for name in KEPT if old.get(name) is not None}
        if old["model_type"] == "qwen2":
            values["attention_bias"] = True
        new = transformers.LlamaConfig(**values, intermediate_size=self.width, mlp_bias=True, architectures=["LlamaForCausalLM"],
                                       dtype=dtype_of(self.mlps[0].gate.weight)).to_dict()
        theta = (new.get("rope_parameters") or {}).get("rope_theta")
        return {**new, **({"rope_theta": theta} if theta else {})}  # where older readers look for it

    def outline(self) -> dict:
        """The whole checkpoint as tensors without data, by name."""
        tensors = {}
        for name, tensor in self.model.state_dict().items():
            stem, _, part = name.partition(".mlp.")
            if part == "gate_proj.weight":
                for what, shape in self.shapes.items():
                    tensors[f"{stem}.mlp.{what}_proj.weight"] = tensor.new_empty(shape, device="meta")
                    tensors[f"{stem}.mlp.{what}_proj.bias"] = tensor.new_empty(shape[0], device="meta")
            elif not part and not (name == "lm_head.weight" and self.model.config.tie_word_embeddings):
                tensors[name] = tensor.to("meta")
                if self.model.config.model_type == "qwen2" and name.endswith("v_proj.bias"):  # Llama's flag is for all four
                    tensors[name.replace("v_proj", "o_proj")] = tensor.new_empty(self.hidden, device="meta")
        return tensors

    def tensors(self, outline: dict) -> dict:
        """The tensors of a part of the outline; one layer's MLP is made at a time."""
        weights, tensors, layer = self.model.state_dict(), {}, functools.lru_cache(1)(self.layer)
        for name, tensor in outline.items():
            stem, _, part = name.partition(".mlp.")
            if part:
                tensors[name] = layer(int(stem.rpartition(".")[2]))[part]
            elif name in weights:
                tensors[name] = weights[name].detach().cpu().contiguous()
            else:
                tensors[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return tensors

    def save(self, folder: Path, shard: int = 5 * 10**9) -> None:
        """model.safetensors, or its shards and their index, and config.json. Memory: a shard and a layer."""
        outline = self.outline()
        split = split_torch_state_dict_into_shards(outline, max_shard_size=shard)
        for file, names in split.filename_to_tensors.items():
            part = {name: outline[name] for name in names}
            safetensors_torch.save_file(self.tensors(part), folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # for a server, which may be another user; safetensors makes it private
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (folder / "config.json").write_text(json.dumps(self.config(), indent=1) + "\n")

    def cost(self) -> str:
        """What it adds to the model."""
        old, depth = sum(parameter.numel() for parameter in self.model.parameters()), len(self.mlps)
        weights, embedded = depth * 3 * (self.width - self.old) * self.hidden, self.model.get_input_embeddings().weight.numel()
        work = old if self.model.config.tie_word_embeddings else old - embedded  # weights that a token is multiplied with
        return (f"d_ff {self.old} -> {self.width}: {(weights + depth * (2 * self.width + self.hidden)) / old:+.2%} parameters, "
                f"{weights / work:+.2%} FLOPs a token")


def bake(model, tokenizer, profiles: Profiles, character: Character, args) -> None:
    """Write --save DIR, and verify it if that is asked for."""
    target = free_target(args.save)
    baking = Baking(model, profiles.of(character), args.rank)
    target.parent.mkdir(parents=True, exist_ok=True)
    with only_run(lock_of(target), f"--save {target}: another run is writing it", wait=False):
        write_checkpoint(baking, target, tokenizer, profiles, character, args)
    without = f", suppressed neurons: {args.suppress}" if character.method == "npti" else ""
    say(f"{target}: {baking.profile.name}, edits on every token (--where all){without}; {baking.cost()}")
    with enough_memory(f"--verify holds both models in float32: --device cpu ({target} is whole, but not verified)"):
        if args.verify:
            verify(model, tokenizer, baking.profile, target, baking.exact)


def write_checkpoint(baking: Baking, target: Path, tokenizer, profiles: Profiles, character: Character, args) -> None:
    """A whole directory or none."""
    model, profile, licence_files = baking.model, baking.profile, licences(baking.model)
    temporary, old = (target.with_name(f".{target.name}.{what}") for what in ("unfinished", "replaced"))
    if old.exists() and not target.exists():  # of a run that was killed: nobody else has the lock
        os.replace(old, target)
    for path in (temporary, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        temporary.mkdir()
        baking.save(temporary)
        as_published(tokenizer).save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        for path in licence_files:
            shutil.copy(path, temporary)
        expected = probes(model, tokenizer, profile, None if baking.exact else temporary)
        if len(expected) < 3:
            say(f"{target}: the biases turn {len(expected)} of the answers that were tried: --verify-server has little to go by")
        frame = next((neurons.frame for neurons in profiles.neurons.files.values()), Frame())
        made = {"base": model.source, "base fingerprint": fingerprint(model), "character": baking.profile.name,
                "method": character.method, "frame": frame.system, "suppress": args.suppress, "rank": args.rank,
                "dtype": dtype_of(model), "cost": baking.cost(),
                "neurons": {trait: neurons.key for trait, neurons in profiles.neurons.files.items()}}
        (temporary / "README.md").write_text(rendered("checkpoint_card.md", made=made))
        made |= {"files": sorted([*(path.name for path in temporary.iterdir()), "verify.json"]), "expected": expected}
        (temporary / "verify.json").write_text(json.dumps(made, ensure_ascii=False) + "\n")
        if free_target(args.save).exists():  # looked at again: it may have taken long
            os.replace(target, old)
        os.replace(temporary, target)
    except SafetensorError as error:  # a full disk, as safetensors says it
        raise UserError(f"--save {target}: {error}") from error
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        for path in (temporary, old):
            shutil.rmtree(path, ignore_errors=True)


def free_target(save: str) -> Path:
    """The directory to write: not there yet, or of nothing but what an earlier --save wrote."""
    target = Path(os.path.realpath(save))
    if target in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"--save {save}: expected a directory of its own")
    if target.exists():
        try:
            written = json.loads((target / "verify.json").read_text())["files"]
            written = written if isinstance(written, list) else []
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            written = []
        others = sorted(path.name for path in target.iterdir() if path.name not in written) if target.is_dir() else [target.name]
        if others:
            raise UserError(f"--save {target}: there is something already that it did not write: {others[0]}")
    return target


def licences(model) -> list[Path]:
    """The licence files of the base model, from its directory or the hub's."""
    patterns, name = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"), getattr(model, "name_or_path", "")
    source, why = Path(name or "?"), "there is none beside it"
    if name and not source.is_dir():
        try:
            source = Path(snapshot_download(name, revision=getattr(model.config, "_commit_hash", None), allow_patterns=patterns))
        except Exception as error:  # of the network, in many ways: no reason not to bake
            why = str(error).strip().split("\n")[0]
    found = [path for pattern in patterns for path in sorted(source.glob(pattern)) if path.is_file()]
    if not found:
        say(f"{name}: no licence file came along ({why}): add it yourself before you pass the checkpoint on")
    return found


def probe(model, tokenizer, question: str, tokens: int = 12) -> tuple[list[int], list[int]]:
    """(the ids of a question's prompt, the first greedy tokens of its answer)."""
    turns = conversation(question)
    [(_, new)] = answers(model, tokenizer, [turns], tokens, repetition_penalty=1.0, stopping_criteria=None)
    return prompt_ids(tokenizer, turns), new


def alike(first: str, second: str) -> bool:
    """Whether two answers begin alike; further on, rounding may turn either."""
    return " ".join(first.split())[:24] == " ".join(second.split())[:24]


def probes(model, tokenizer, profile: Profile, saved: Path | None = None) -> list[dict]:
    """What verify.json holds: a few prompts as token ids, how the answers to them begin, and how they do where an engine drops
    the biases, which leaves only what is removed. Prompts that can't tell these apart are passed over. saved: the checkpoint,
    where it does something else than the live edit."""
    baked = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=model.dtype).to(model.device).eval() if saved else None
    rest, found = profile.chosen(profile.value[:, 1] == 0), []
    for question in (*PROBES, *itertools.chain(*zip(*(built_in_bench().test[trait][:4] for trait in TRAITS)))):
        if len(found) == 6:
            break
        with contextlib.nullcontext() if baked else steer(model, profile, where="all"):
            ids, new = probe(baked or model, tokenizer, question)
        with steer(model, rest, where="all"):
            _, without = probe(model, tokenizer, question)
        text, other = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (new, without))  # as a server sends them
        if not alike(text, other):
            found.append({"prompt": ids, "question": question, "text": text, "without biases": other})
    return found


def difference(model, baked, tokenizer, profile: Profile, question: str) -> tuple:
    """Of a checkpoint from the live edit, for one prompt: (most in logits, what the edit does to them, KL divergence, how far
    the best two logits are apart where the greedy answers part, or None)."""
    prompt, theirs = probe(baked, tokenizer, question, 24)
    ids, tie = torch.tensor([prompt], device=model.device), None
    with torch.no_grad():
        plain, ours = model(input_ids=ids).logits[0], baked(input_ids=ids).logits[0]
        with steer(model, profile, where="all"):
            live, own = model(input_ids=ids).logits[0], probe(model, tokenizer, question, 24)[1]
            parting = next((k for k, (a, b) in enumerate(zip(own, theirs)) if a != b), None)
            if parting is not None:
                so_far = torch.tensor([prompt + own[:parting]], device=model.device)
                tie = float(model(input_ids=so_far).logits[0, -1].topk(2).values.diff().abs())
        divergence = (live.softmax(-1) * (live.log_softmax(-1) - ours.log_softmax(-1))).sum(-1).max()
    return float((live - ours).abs().max()), float((live - plain).abs().max()), float(divergence), tie


def verify(model, tokenizer, profile: Profile, folder: Path, exact: bool) -> None:
    """Compare the checkpoint, in plain transformers, with the live edit; raise if they differ by more than rounding, where it is
    meant to be exact. Both compute in float32, whatever the weights were saved in: bfloat16's own rounding moves logits by a third
    of what a strong edit does."""
    from tqdm import tqdm

    dtype, model = dtype_of(model), model.float()
    baked = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(model.device).eval()
    questions = [*PROBES, *built_in_bench().test[TRAITS[0]][:12]]
    found = [difference(model, baked, tokenizer, profile, question) for question in tqdm(questions, desc="verify", unit="prompt")]
    worst, effect, divergence = torch.tensor([numbers for *numbers, _ in found]).amax(0).tolist()  # NaN where one is
    ties = [tie for *_, tie in found if tie is not None]
    # an added neuron's weights are rounded to the dtype once more: 0.2 % in bfloat16
    bound = 1e-3 if dtype == "float32" else 0.01 * max(1.0, effect)
    print(f"baked against live, {len(questions)} prompts, {dtype} weights: logits differ by {worst:.2g} at most "
          f"({f'bound {bound:.2g}' if exact else '--rank leaves a part out'}; the edit moves them by {effect:.2g}), "
          f"KL {divergence:.2g} at most; greedy answers differ in {len(ties)}"
          + (f", where the best two logits are {max(ties):.2g} apart at most" if ties else ""))
    if exact and not worst <= bound:  # NaN is none
        raise UserError(f"{folder}: baked and live differ by {worst:.2g}, more than {bound:.2g}")


def verify_server(folder: str, url: str, served: str | None) -> None:
    """Ask a server what it makes of a baked checkpoint: its first tokens against verify.json's."""
    path = Path(folder) / "verify.json"
    try:
        expected = [(probe["prompt"], probe["question"], probe["text"], probe["without biases"])
                    for probe in parse_json(read_text(path), str(path))["expected"]]
    except (UserError, KeyError, TypeError) as error:
        why = f": {error}" if isinstance(error, UserError) else ", but one of another form"
        raise UserError(f"--save {folder} holds no verify.json that this version wrote{why}") from error
    if not expected:
        raise UserError(f"--save {folder}: the biases of this model turned no answer that was tried: nothing can tell")
    endpoint, right, dropped = Endpoint(url, served), 0, 0
    for prompt, question, text, without in expected:
        try:
            served_text = endpoint.completion(prompt, max_tokens=12, temperature=0)[0]
        except NoReply as error:
            raise UserError(f"{url}: {error}") from error
        right, dropped = right + alike(served_text, text), dropped + alike(served_text, without)
        print(f"{question}\n  expected: {text!r}\n  served:   {served_text!r}")
    if dropped > right:
        raise UserError(f"{url}: {dropped} of {len(expected)} answers are those without the biases of the MLPs: this engine "
                        "drops them")
    if right <= len(expected) / 2:
        raise UserError(f"{url}: {right} of {len(expected)} answers begin as they should: another model, or one in too few bits")
    others = "" if right == len(expected) else "; rounding can turn the others, above all in fewer bits"
    print(f"{url}: {right} of {len(expected)} answers begin as they should{others}")
