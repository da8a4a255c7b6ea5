"""The neuron file: for all neurons of a model, how they fire under both poles of a trait. NPTI's released files, and a folder of them."""

import hashlib
import json
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import POLES, TRAITS
from .mlp import find_mlps
from .model import fingerprint, name_of
from .questions import published_names
from .store import parse_json, read_text, write_atomically
from .terminal import UserError, say, show_table

FORMAT = 2  # with a digest of all that a file holds; format 1, which has none, is read too
TENSORS = {"mean": torch.float32, "p50": torch.float16, "p95": torch.float32, "p99": torch.float16, "prob": torch.float32,
           "variance": torch.float32}
NPTI_SHARE = 2000 / 458752  # of all neurons, a pole: NPTI's 2,000 of Llama-3-8B's


@dataclass
class Neurons:
    """A neuron file. Tensors are (2, layers, d_ff), pole high first: prob, p50, p95, p99 (of the activation), mean, variance (of
    the product)."""

    tensors: dict
    meta: dict
    path: str = ""

    def __getattr__(self, name):
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def trait(self) -> str:
        return self.meta.get("trait", "")

    @property
    def key(self) -> str:
        """Tells files apart: a digest of what they were made from."""
        return self.meta["key"]

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, d_ff)."""
        return tuple(self.prob.shape[1:])

    def digest(self) -> str:
        """Of everything in the file but the digest itself."""
        content = hashlib.sha256(json.dumps({**self.meta, "digest": None}, sort_keys=True).encode())
        for name in sorted(self.tensors):
            content.update(name.encode() + self.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        return content.hexdigest()[:16]

    def save(self, path: Path) -> None:
        self.meta = {**self.meta, "format": FORMAT}
        self.meta["digest"] = self.digest()
        write_atomically(path, save({name: tensor.contiguous() for name, tensor in self.tensors.items()},
                                    metadata={"neurons": json.dumps(self.meta, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path, model=None) -> "Neurons":
        """Read a file; with a model, refuse one that was made with another."""
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {}).get("neurons", "null"))
                if not isinstance(meta, dict) or "format" not in meta:
                    raise UserError(f"{path}: a safetensors file, but not a neuron file of identify.py")
                if meta["format"] not in (1, FORMAT):
                    raise UserError(f"{path}: expected format {FORMAT} or 1, got {meta['format']}: run identify.py again")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such neuron file; python identify.py makes it") from error
        except PermissionError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except (SafetensorError, ValueError, RecursionError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: not a whole safetensors file: {error}") from error
        neurons = cls(tensors, meta, str(path))
        neurons.check()
        if model is not None and fingerprint(model) != meta["fingerprint"]:
            raise UserError(f"{path} was made with {meta['model']} ({meta['fingerprint']}), but the model is "
                            f"{name_of(model)} ({fingerprint(model)}): run identify.py for it")
        return neurons

    def check(self) -> None:
        """Raise for what no run of identify.py writes: a file may be damaged, or somebody's."""
        shapes = {tuple(tensor.shape) for tensor in self.tensors.values()}
        if self.tensors.keys() != TENSORS.keys() or len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[0] != 2:
            raise UserError(f"{self.path}: expected {', '.join(TENSORS)} of one shape (2, layers, d_ff), got "
                            f"{ {name: tuple(tensor.shape) for name, tensor in self.tensors.items()} }")
        meta, fine = self.meta, {name: self.tensors[name].dtype == dtype for name, dtype in TENSORS.items()}
        for name, tensor in self.tensors.items():
            least, most = (-math.inf, math.inf) if name == "mean" else (0, 1 if name == "prob" else math.inf)
            fine[name] &= bool(tensor.isfinite().all() & (tensor >= least).all() & (tensor <= most).all())
        fine |= {name: isinstance(meta.get(name), str) for name in ("model", "fingerprint", "key", "bench")}
        fine["trait"] = meta.get("trait") in TRAITS
        fine["tokens"] = isinstance(meta.get("tokens"), list) and all(isinstance(number, int) and number > 0 for number in meta["tokens"])
        if meta["format"] > 1:
            fine["digest"] = meta.get("digest") == self.digest()
        wrong = [name for name, holds in fine.items() if not holds]
        if wrong:
            raise UserError(f"{self.path}: damaged, or not of identify.py: what it holds as {', '.join(wrong)} can't be: run identify.py again")

    def select(self, pole: str, min_delta: float = 0.1, min_neurons: int | None = None):
        """(layer, index, delta, p95) tensors of a pole's neurons, largest delta first: those whose prob is higher than under
        the other pole by min_delta, and at least the min_neurons best (NPTI, section 3.2; its 2,000 are taken as a share of the
        model's own number)."""
        k = POLES.index(pole)
        delta = self.prob[k] - self.prob[1 - k]
        if min_neurons is None:
            min_neurons = round(delta.numel() * NPTI_SHARE)
        number = min(max(int((delta >= min_delta).sum()), min_neurons), int((delta > 0).sum()))
        values, at = torch.sort(delta.flatten(), descending=True, stable=True)
        at = at[:number]
        return at // delta.shape[1], at % delta.shape[1], values[:number], self.p95[k].flatten()[at]


class Released:
    """NPTI's released neuron files, DIR/<Trait>_dict.json (high pole) and DIR/<Trait>_reversed_dict.json (low): an object from
    layer to a list of [layer, index, delta, prob, p95]. What stands there was selected already."""

    key = "released files"

    def __init__(self, folder: str, trait: str, model):
        mlps = find_mlps(model)
        self.trait, self.shape, self.poles = trait, (len(mlps), mlps[0].width), {}
        for pole, name in published_names(trait).items():
            path = Path(folder) / f"{name}_dict.json"
            try:
                rows = [row for rows in parse_json(read_text(path), str(path)).values() for row in rows]
                table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
            except (TypeError, AttributeError, RuntimeError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{path}: expected an object from layer to lists of [layer, index, delta, prob, p95]: {error}") from error
            where = table[:, :2].long()
            for k, (what, most, of) in enumerate(zip(("layer", "neuron"), self.shape, ("layers", "neurons a layer"))):
                wrong = where[(where[:, k] < 0) | (where[:, k] >= most), k]
                if len(wrong):
                    raise UserError(f"{path}: {what} {int(wrong[0])} of a model of {most} {of} ({name_of(model)}): it was made for another "
                                    "model")
            if len(where.unique(dim=0)) < len(where):
                raise UserError(f"{path}: a neuron stands twice in it")
            order = torch.argsort(table[:, 2], descending=True, stable=True)
            self.poles[pole] = (where[order, 0], where[order, 1], table[order, 2].float(), table[order, 4].float())

    def select(self, pole: str, min_delta: float = 0.1, min_neurons: int | None = None):
        """All of a pole's neurons, as Neurons.select gives them."""
        return self.poles[pole]


def neuron_path(folder, trait: str) -> Path:
    return Path(folder) / f"{trait}.safetensors"


def answers_path(folder, trait: str) -> Path:
    """Where identify.py keeps the answers that a neuron file was made from."""
    return Path(folder) / f"{trait}.answers.jsonl"


class NeuronFolder:
    """A folder of neuron files, each read when it is first asked for. folder: of identify.py, or npti:DIR of the released ones.
    identify(trait): makes a file that is not there yet; without it, that is an error."""

    def __init__(self, model, folder: str, identify=None):
        self.model, self.folder, self.identify, self.files = model, folder.removeprefix("npti:"), identify, {}
        self.released = folder.startswith("npti:")

    def __getitem__(self, trait: str) -> Neurons | Released:
        if trait not in self.files:
            self.files[trait] = self.read(trait)
        return self.files[trait]

    def read(self, trait: str) -> Neurons | Released:
        if self.released:
            say(f"{self.folder}: {trait}: these files don't say which model they were made with: nothing vouches for it but their shape")
            return Released(self.folder, trait, self.model)
        path = neuron_path(self.folder, trait)
        if not path.exists() and self.identify:
            say(f"{path}: no neuron file yet, so the {trait} neurons are identified first")
            self.identify(trait)
        neurons = Neurons.load(path, self.model)
        if neurons.trait != trait:
            raise UserError(f"{path}: holds the neurons of {neurons.trait}")
        return neurons

    def check_unchanged(self) -> None:
        """Raise where a file that was read is another one by now."""
        for trait, neurons in self.files.items() if not self.released else ():
            if Neurons.load(neuron_path(self.folder, trait)).key != neurons.key:
                raise UserError(f"{neuron_path(self.folder, trait)}: was replaced while this ran: start it again")


# ----------------------------------------------------------------------------------------------------- in the terminal


def show_folder(folder: str) -> None:
    """Print what a neuron folder holds."""
    from rich.text import Text

    paths, rows = sorted(Path(folder).glob("*.safetensors")), []
    if not paths:
        raise UserError(f"--list: no neuron files in {folder}: python identify.py makes them")
    for path in paths:
        try:
            neurons = Neurons.load(path)
        except UserError as error:
            rows.append([path.stem, Text(" ".join(str(error).split()), style="red")])
            continue
        meta = neurons.meta
        made = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d")
        rows.append([neurons.trait, meta["model"], ", ".join(str(len(neurons.select(pole)[0])) for pole in POLES),
                     f"{sum(meta['tokens']):,}", made,
                     f"{meta['questions']} questions, {meta['bench']}, {meta['max_new_tokens']} tokens, seed {meta['seed']}"])
    show_table(folder, ("trait", "model", "high, low", "tokens", "made", "from"), rows)


def show_neurons(neurons: Neurons) -> None:
    """Print what was found: tokens, neurons a pole, the strongest, and where in the model they are."""
    meta, rows = neurons.meta, []
    for k, pole in enumerate(POLES):
        layer, index, delta, p95 = neurons.select(pole)
        found = int(((neurons.prob[k] - neurons.prob[1 - k]) >= 0.1).sum())
        strongest = [f"{a}.{b}: {c:.2f}, {d:.2f}" for a, b, c, d in zip(*(x[:3].tolist() for x in (layer, index, delta, p95)))]
        spread = layer.bincount(minlength=neurons.shape[0]).float()
        bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * float(v / spread.max()))] for v in spread) if len(layer) else ""
        rows.append([pole, f"{meta['tokens'][k]:,}", str(found), "\n".join(strongest), bars])
    show_table(f"{neurons.trait}: {meta['questions']} questions a pole, {meta['model']}",
               ("pole", "tokens", "prob differs by 0.1", "strongest (layer.index: delta, p95)", "first to last layer"), rows)
