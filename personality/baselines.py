"""What others would train on the same answers; evaluate.py sets the trained edits beside both.

residual    a constant on every layer's output, from the edits' answers and teacher and with their levels, but by Adam. PSR (ICML
            2026) trains such constants; they are layers times hidden_size numbers, where the edits are of SHARE of the neurons
lora        fine-tuning, the paper's own yardstick: low-rank adapters of all linear layers, trained to give the persona's answers
            without the persona, for as many passes as the constants. Needs peft (pip install -e '.[finetune]')
"""

import contextlib
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from . import POLES
from .doses import levels
from .methods import multiple_at
from .mlp import find_mlps, layers_of
from .model import BatchSize, answer_inputs, enough_memory
from .neurons import NeuronFolder, Neurons
from .questions import Bench
from .steer import Profile, hidden_states
from .store import digest, lock_of, only_run, write_atomically
from .terminal import UserError, progress, resumable
from .train import ANSWERS, NO_ROOM, ROWS, answers_to_learn, divergence, frozen, options, slopes_of, student_says, trained_on

PASSES = 4  # over the answers
RESIDUAL_RATE = 0.01  # Adam's first step size for the constants
RANK, LORA_RATE = 8, 1e-3  # of the adapters


@contextlib.contextmanager
def shifted(model, constants):
    """The model with constants, float32 (layers, hidden_size), added to its layers' outputs; gradients flow to them alone."""
    def adding(number):
        def add(module, args, output):
            hidden = hidden_states(output)
            hidden = hidden + constants[number].to(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return add

    with frozen(model), contextlib.ExitStack() as undo:
        for number, layer in enumerate(layers_of(model)):
            undo.callback(layer.register_forward_hook(adding(number)).remove)
        yield


def fitted(model, lessons, sign: int, constants, step) -> torch.Tensor:
    """The constants of one pole, trained on from `constants`; step() is called after each batch."""
    steps, adam, size = PASSES * len(lessons), torch.optim.Adam([constants], betas=(0.9, 0.99)), BatchSize(ROWS)
    for k in range(steps):
        adam.param_groups[0]["lr"] = RESIDUAL_RATE * (1 - k / steps)
        lesson = lessons[k % len(lessons)]

        def slope(rows):
            def loss(part):
                return divergence(part, sign, student_says(model, part)).sum() / lesson.counted.sum()

            return sum(slopes_of(model, lambda: [loss(part)], constants, shifted)[0] for part in lesson.parts(rows))

        constants.grad = size.fit(slope, len(lesson.ids))
        adam.step()
        step()
    return constants.cpu()


def import_peft():
    """peft, where it is installed."""
    if not importlib.util.find_spec("peft"):
        raise UserError("--method lora needs peft: pip install -e '.[finetune]'")
    import peft

    return peft


class Baselines:
    """The baselines of a folder of neurons, each made when it is first asked for and kept in FOLDER/baselines, under a name that
    tells what it was made from."""

    def __init__(self, model, tokenizer, bench: Bench, neurons: NeuronFolder, seed: int = 0):
        self.model, self.tokenizer, self.bench, self.neurons, self.seed, self.read = model, tokenizer, bench, neurons, seed, {}

    def key(self, trait: str, method: str) -> str:
        """What a trait's baseline depends on, residual or lora."""
        own = [options(self.seed), RESIDUAL_RATE] if method == "residual" else [ANSWERS, ROWS, self.seed, RANK, LORA_RATE]
        return digest(self.neurons[trait].key, self.bench.fingerprint_of_training(), method, PASSES, *own)

    def path(self, trait: str, method: str, name: str) -> Path:
        return Path(self.neurons.folder) / "baselines" / f"{trait}.{self.key(trait, method)}.{name}"

    @contextlib.contextmanager
    def to_be_made(self, path: Path):
        """Yields whether it has to be made, which no other run does meanwhile: one that wants it too waits for it."""
        if path.exists():
            yield False
            return
        path.parent.mkdir(exist_ok=True)
        with resumable(), only_run(lock_of(path), f"{path}: another run trains it, this one waits"):
            yield not path.exists()

    # ------------------------------------------------------------------------------------- constants on the residual stream

    def residual(self, trait: str, level: float, name: str = "") -> Profile:
        """The profile of a level, -1 to 1, of residual constants."""
        if trait not in self.read:
            self.read[trait] = self.read_constants(trait)
        constants, dose = self.read[trait]
        pole = POLES.index("high" if level >= 0 else "low")
        return constant_profile(multiple_at(dose[pole], abs(level)) * constants[pole], name)

    def read_constants(self, trait: str):
        """(float32 (2, layers, hidden_size), the dose response (2, doses, 4)), trained where they are not there."""
        path = self.path(trait, "residual", "residual.safetensors")
        with self.to_be_made(path) as missing:
            if missing:
                write_atomically(path, save(self.train_constants(self.neurons[trait])))
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor("constants"), file.get_tensor("dose")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: damaged: {error}: delete it, and it is made anew") from error

    def train_constants(self, neurons: Neurons) -> dict:
        def fit(lessons, sign, step):
            none = torch.zeros((len(layers_of(self.model)), find_mlps(self.model)[0].hidden), device=self.model.device)
            return fitted(self.model, [*lessons], sign, none, step)

        with enough_memory(NO_ROOM):
            both = [trained_on(self.model, self.tokenizer, self.bench, neurons, pole, self.seed, fit, PASSES) for pole in POLES]
            dose = levels(self.model, self.tokenizer, self.bench, neurons,
                          lambda pole, multiple: constant_profile(multiple * both[POLES.index(pole)]))
        return {"constants": torch.stack(both), "dose": dose}

    # ----------------------------------------------------------------------------------------------------------- fine-tuning

    @contextlib.contextmanager
    def tuned(self, trait: str, pole: str):
        """The model with a pole's adapters, which are trained where they are not there."""
        peft, path = import_peft(), self.path(trait, "lora", f"{pole}.lora")
        with self.to_be_made(path) as missing:
            if missing:
                with enough_memory(NO_ROOM):
                    self.train_adapters(self.neurons[trait], pole, path)
        try:
            config, weights = peft.PeftConfig.from_pretrained(path), load_file(path / "adapter_model.safetensors")
        except Exception as error:  # of a damaged folder, in many ways
            raise UserError(f"{path}: damaged: {str(error)[:200]}: delete it, and it is made anew") from error
        with frozen(self.model):
            inside = peft.get_peft_model(self.model, config).eval()
            try:
                peft.set_peft_model_state_dict(inside, weights)
                yield
            finally:
                unwrap(inside)

    def train_adapters(self, neurons: Neurons, pole: str, path: Path) -> None:
        """Write a pole's adapters to path, a folder that peft reads."""
        peft, parts = import_peft(), answers_to_learn(self.tokenizer, neurons, pole)
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        steps, size, part = PASSES * len(parts), BatchSize(ROWS), path.with_name(f".{path.name}.part")
        with frozen(self.model), torch.enable_grad(), torch.random.fork_rng([]), progress(
                steps, 0, f"{neurons.trait}, {pole}: fine-tuning", "batch") as bar:
            torch.manual_seed(self.seed)
            inside = peft.get_peft_model(self.model, config)
            try:
                weights = [weight for weight in inside.parameters() if weight.requires_grad]
                adam = torch.optim.AdamW(weights, weight_decay=0)
                for step in range(steps):
                    adam.param_groups[0]["lr"] = LORA_RATE * (1 - step / steps)
                    self.set_slopes(inside, adam, neurons.frame, parts[step % len(parts)], size)
                    adam.step()
                    bar.update()
                shutil.rmtree(part, ignore_errors=True)
                inside.save_pretrained(part)
            finally:
                unwrap(inside)
        os.replace(part, path)

    def set_slopes(self, model, adam, frame, items: list[dict], size: BatchSize) -> None:
        """Have the weights' gradients be those of the answers' negative log-likelihood in nats a token, asked without a persona."""
        def tokens(some):
            return sum(len(item["ids"]) for item in some)

        def backward(rows):
            adam.zero_grad()
            for part in (items[k:k + rows] for k in range(0, len(items), rows)):
                (surprise(model, self.tokenizer, frame, part) * (tokens(part) / tokens(items))).backward()

        size.fit(backward, len(items))


def constant_profile(constants, name: str = "") -> Profile:
    """Of (layers, hidden_size)."""
    profile = Profile.empty(name)
    profile.residual = dict(enumerate(constants))
    return profile


def surprise(model, tokenizer, frame, items: list[dict]):
    """The answers' negative log-likelihood in nats a token, asked without a persona."""
    inputs, _ = answer_inputs(model, tokenizer, [{**item, "persona": None} for item in items], frame)
    logits = model(**inputs, use_cache=False).logits
    said = [logits[k, -len(item["ids"]):].float() for k, item in enumerate(items)]  # the last input gives the last token
    ids = torch.tensor(sum((item["ids"] for item in items), []), device=logits.device)
    return torch.nn.functional.cross_entropy(torch.cat(said), ids)


def unwrap(inside) -> None:
    """Take the adapters off: the model is as it was."""
    model = inside.unload()
    vars(model).pop("peft_config", None)
