"""The neuron file: how all neurons of a model fire under both poles of a trait. NPTI's released files, and a folder of them."""

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
from .frame import Frame
from .mlp import find_mlps, shape_of
from .model import fingerprint, name_of
from .questions import published_names
from .steer import check_places
from .store import digest, lock_of, only_run, parse_json, read_text, write_atomically
from .terminal import UserError, printable, say, show_table

FORMAT = 2  # with a digest of all that a file holds; format 1, which has none, is read too
TENSORS = {"mean": torch.float32, "p50": torch.float16, "p95": torch.float32, "p99": torch.float16, "prob": torch.float32,
           "variance": torch.float32}
SEEN = {"seen": torch.int32}  # where not all neurons were counted on the same tokens
TRAINED = {"dose": torch.float32, **{f"{pole}_{what}": dtype for pole in POLES
                                     for what, dtype in (("place", torch.int32), ("bias", torch.float32))}}  # see train.py
TRAINING = 5  # version of training, doses and bench: one more when the same answers come to other edits; older files are reported
META = {"model": str, "fingerprint": str, "key": str, "bench": str, "questions": int, "max_new_tokens": int, "seed": int}
BARS = 24  # at most, of the picture of the layers in which a pole's neurons are
NPTI_SHARE = 2000 / 458752  # of all neurons, a pole: NPTI's 2,000 of Llama-3-8B's


@dataclass(eq=False, repr=False)  # of tensors: they are compared by their keys
class Neurons:
    """A neuron file. Tensors are (2, layers, d_ff), pole high first: prob, p50, p95, p99 (of the activation), mean, variance (of
    the product). Of a model whose layers have experts, or are of different widths, also seen: int32, the tokens that a neuron was
    counted on (see observe.Statistics). Where there are trained edits (train.py), also: high_place, low_place int32 (n, 2), layer
    and index of their neurons; high_bias, low_bias float32 (n); dose float32 (2, doses, 4), see doses.dose_response()."""

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
    def trained_key(self) -> str:
        """Tells trained edits apart; empty where the file has none."""
        return self.meta.get("trained", "")

    @property
    def folder(self) -> Path:
        return Path(self.path).parent

    @property
    def frame(self) -> Frame:
        """How the questions were put."""
        return Frame.named(self.meta.get("frame", "none"))

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, d_ff)."""
        return tuple(self.prob.shape[1:])

    @property
    def known(self):
        """bool (layers, d_ff): which neurons have statistics: all but those of experts that saw few tokens and of narrow layers."""
        return (self.variance > 0).any(0) if "seen" in self.tensors else torch.ones(self.shape, dtype=torch.bool)

    def __repr__(self) -> str:
        shape = self.tensors["prob"].shape[1:] if "prob" in self.tensors else ()
        return f"Neurons({self.path!r}: {self.trait}, {' x '.join(map(str, shape))})"

    def digest_of(self, meta: dict, names) -> str:
        """A digest of what is said in meta, but the digest itself, and of these tensors."""
        content = hashlib.sha256(json.dumps({**meta, "digest": None}, sort_keys=True).encode())
        for name in sorted(names):
            content.update(name.encode() + self.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        return content.hexdigest()[:16]

    def contents(self) -> dict:
        """{"key", and "trained" where there is one: (that key, a digest of the tensors that it stands for)}."""
        own = {"key": self.tensors.keys() - TRAINED.keys(), "trained": self.tensors.keys() & TRAINED.keys()}
        return {name: (self.meta[name], self.digest_of({}, names)) for name, names in own.items() if self.meta.get(name)}

    def save(self, path: str | Path) -> None:
        """Write the file. Tensors that were altered since they were read or saved, under the same key, get a new key: what was
        answered with the old ones is not taken for theirs."""
        said = {**self.meta, "format": FORMAT}
        known = said.pop("contents", {})  # of what was read or saved last: not in the file
        for name, (key, content) in (contents := self.contents()).items():
            if name in known and known[name][0] == key and known[name][1] != content:
                said[name] = digest(key, content)
        said["digest"] = self.digest_of(said, self.tensors)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        write_atomically(Path(path), save(tensors, metadata={"neurons": json.dumps(said, sort_keys=True)}))
        self.meta = said | {"contents": {name: (said[name], content) for name, (_, content) in contents.items()}}

    def save_over(self) -> None:
        """Put it, with what was added, in the place of the file that it was read from, unless that is another one by now."""
        with only_run(lock_of(path := Path(self.path))):
            if Neurons.load(path).key != self.key:
                raise UserError(f"{path}: was replaced while its edits were trained: start it again")
            self.save(path)

    @classmethod
    def load(cls, path: Path, model=None) -> "Neurons":
        """Read a file; with a model, refuse one that was made with another."""
        try:
            if Path(path).is_fifo():  # opening it would wait for a writer
                raise UserError(f"{path}: a pipe, not a neuron file")
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {}).get("neurons", "null"))
                if not isinstance(meta, dict) or "format" not in meta:
                    raise UserError(f"{path}: a safetensors file, but not a neuron file of identify.py")
                if meta["format"] not in (1, FORMAT):
                    raise UserError(f"{path}: expected format {FORMAT} or 1, got {meta['format']}: run identify.py again")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except UserError:
            raise
        except FileNotFoundError as error:  # which safetensors also says of a file that may not be read
            how = f"no such neuron file; python identify.py --out {Path(path).parent} makes it, with --train for levels"
            raise UserError(f"{path}: {'it may not be read' if Path(path).exists() else how}") from error
        except PermissionError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except (SafetensorError, ValueError, RecursionError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file: {error}") from error
        neurons = cls(tensors, meta, str(path))
        neurons.check()
        meta["contents"] = neurons.contents()
        if model is not None and fingerprint(model) != meta["fingerprint"]:
            raise UserError(f"{path} was made with {meta['model']} ({meta['fingerprint']}), but the model is "
                            f"{name_of(model)} ({fingerprint(model)}): run identify.py for it")
        if model is not None and neurons.shape != (shape := shape_of(find_mlps(model))):
            raise UserError(f"{path}: damaged: it is of {neurons.shape} layers and neurons, the model of {shape}")
        return neurons

    def check(self) -> None:
        """Raise for what no run of identify.py writes: a file may be damaged, or somebody's."""
        meta, shapes = self.meta, {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        shape = shapes.get("prob", ())
        trained = {name: shapes.pop(name) for name in TRAINED if name in shapes}
        expected = {**TENSORS, **SEEN} if "seen" in shapes else TENSORS
        if shapes != dict.fromkeys(expected, shape) or len(shape) != 3 or shape[0] != 2:
            raise UserError(f"{self.path}: expected {', '.join(TENSORS)} of one shape (2, layers, d_ff), got {shapes}")
        if trained or self.trained_key:
            self.check_trained(trained)
        fine = {name: isinstance(meta.get(name), kind) for name, kind in META.items()}
        for name, dtype in expected.items():
            tensor, least, most = self.tensors[name], -math.inf if name == "mean" else 0, 1 if name == "prob" else math.inf
            fine[name] = tensor.dtype == dtype and bool((tensor.isfinite() & (tensor >= least) & (tensor <= most)).all())
        fine["trait"], tokens = meta.get("trait") in TRAITS, meta.get("tokens")
        fine["tokens"] = isinstance(tokens, list) and len(tokens) == 2 and all(isinstance(n, int) and n > 0 for n in tokens)
        fine["frame"], fine["validation"] = isinstance(meta.get("frame", ""), str), isinstance(meta.get("validation", []), list)
        for name in ("asked", "declined"):  # since there are frames
            fine[name] = isinstance(meta.get(name, []), list) and all(isinstance(n, int) and n >= 0 for n in meta.get(name, []))
        fine["digest"] = meta["format"] == 1 or meta.get("digest") == self.digest_of(meta, self.tensors)
        wrong = ", ".join(name for name, holds in fine.items() if not holds)
        if wrong:
            raise UserError(f"{self.path}: damaged, or not of identify.py: its {wrong} can't be right: run identify.py again")

    def check_trained(self, shapes: dict) -> None:
        """Raise for trained edits that no training writes."""
        fine = set(shapes) == set(TRAINED) and isinstance(self.trained_key, str) and self.trained_key and all(
            self.tensors[name].dtype == dtype and bool(self.tensors[name].isfinite().all()) for name, dtype in TRAINED.items())
        if fine:
            doses, most = shapes["dose"], torch.tensor(self.shape)
            fine = len(doses) == 3 and doses[0] == 2 and doses[1] > 0 and doses[2] in (3, 4)  # 3: older, see multiple_at()
            fine = fine and bool((self.dose[..., [0, *range(2, doses[2])]] > 0).all())
            for pole in POLES:
                place, bias = self.tensors[f"{pole}_place"], self.tensors[f"{pole}_bias"]
                fine = fine and bias.dim() == 1 and place.shape == (len(bias), 2) and bool(((place >= 0) & (place < most)).all())
                fine = fine and len(torch.unique(place, dim=0)) == len(place)
        if not fine:
            raise UserError(f"{self.path}: damaged, or not of identify.py: its trained edits can't be right: run identify.py "
                            "--train again")

    def select(self, pole: str, min_delta: float = 0.1, min_neurons: int | None = None):
        """(layer, index, delta, p95) tensors of a pole's neurons, largest delta first: those whose prob is higher than under
        the other pole by min_delta, and at least the min_neurons best (NPTI, section 3.2; its 2,000 are taken as a share of the
        model's own number)."""
        k = POLES.index(pole)
        delta = (self.prob[k] - self.prob[1 - k]).flatten()
        least = round(int(self.known.sum()) * NPTI_SHARE) if min_neurons is None else min_neurons
        number = min(max(int((delta >= min_delta).sum()), least), int((delta > 0).sum()))
        at = torch.argsort(delta, descending=True, stable=True)[:number]
        return at // self.shape[1], at % self.shape[1], delta[at], self.p95[k].flatten()[at]


class Released:
    """NPTI's released neuron files, DIR/<Trait>_dict.json (high pole) and DIR/<Trait>_reversed_dict.json (low): an object from
    layer to a list of [layer, index, delta, prob, p95]. What stands there was selected already."""

    def __init__(self, folder: str, trait: str, model):
        self.trait, self.frame, self.shape, self.poles = trait, Frame(), shape_of(find_mlps(model)), {}
        for pole, name in published_names(trait).items():
            path = Path(folder) / f"{name}_dict.json"
            try:
                rows = [row for rows in parse_json(read_text(path), str(path)).values() for row in rows]
                table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
            except UserError:
                raise
            except (TypeError, AttributeError, RuntimeError, ValueError) as error:
                raise UserError(f"{path}: expected an object from layer to lists of [layer, index, delta, prob, p95]: "
                                f"{error}") from error
            layer, index, delta, _, p95 = table[torch.argsort(table[:, 2], descending=True, stable=True)].unbind(1)
            layer, index = layer.long(), index.long()
            check_places(layer, index, *self.shape, path, f" ({name_of(model)}): it was made for another model")
            if len(torch.unique(layer * self.shape[1] + index)) < len(layer):
                raise UserError(f"{path}: a neuron stands twice in it")
            self.poles[pole] = (layer, index, delta.float(), p95.float())
        self.key = digest([[part.tolist() for part in self.poles[pole]] for pole in POLES])

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
    identify(trait): makes a file that is not there yet; train(neurons): adds its trained edits (train.add_trained); without
    them, what is missing is an error. frame: how questions are put now. A line says where a file was made with another frame, or
    before there were any, and where its trained edits are of another version of the training."""

    def __init__(self, model, folder: str, identify=None, frame: Frame | None = None, train=None):
        self.model, self.identify, self.train, self.frame, self.files, self.told = model, identify, train, frame, {}, set()
        self.folder, self.released = folder.removeprefix("npti:"), folder.startswith("npti:")

    def __getitem__(self, trait: str) -> Neurons | Released:
        if trait not in self.files:
            self.files[trait] = self.read(trait)
        return self.files[trait]

    def read(self, trait: str) -> Neurons | Released:
        if self.released:
            say(f"{self.folder}: {trait}: these files don't say which model they were made with: nothing vouches for it but their "
                "shape")
            return Released(self.folder, trait, self.model)
        path = neuron_path(self.folder, trait)
        if not path.exists() and self.identify:
            say(f"{path}: no neuron file yet, so the {trait} neurons are identified first")
            self.identify(trait)
        neurons = Neurons.load(path, self.model)
        if neurons.trait != trait:
            raise UserError(f"{path}: holds the neurons of {neurons.trait}")
        if self.frame and self.frame != neurons.frame:
            say(f"{path}: its questions were put in the frame {neurons.frame}, now they are put in the frame {self.frame}")
        return neurons

    def trained(self, trait: str) -> Neurons:
        """A trait's file with its trained edits, which are made where it has none."""
        if self.released:
            raise UserError("trained edits need neuron files of identify.py: the released ones come without the answers")
        if not self[trait].trained_key:
            if not self.train:
                raise UserError(f"{self[trait].path}: no trained edits: python identify.py --train --out {self.folder} makes them")
            say(f"{self[trait].path}: no trained edits yet, so they are trained first")
            self.files[trait] = self.train(self[trait])
        elif self[trait].meta.get("training") != TRAINING and trait not in self.told:
            self.told.add(trait)
            say(f"{self[trait].path}: its trained edits are of another version of the training: python identify.py --train makes "
                "new ones")
        return self.files[trait]

    def check_unchanged(self) -> None:
        """Raise where a file that was read is another one by now."""
        for neurons in self.files.values() if not self.released else ():
            there = Neurons.load(neurons.path)
            if (there.key, there.trained_key) != (neurons.key, neurons.trained_key):
                raise UserError(f"{neurons.path}: was replaced while this ran: start it again")


def show_folder(folder: str) -> None:
    """Print what a neuron folder holds."""
    from rich.text import Text

    paths = sorted(path for path in Path(folder).glob("*.safetensors") if not (path.is_fifo() or path.name.startswith(".")))
    rows = []
    if not paths:
        raise UserError(f"--list: no neuron files in {folder}: python identify.py --out {folder} makes them")
    for path in paths:
        name = path.stem.replace(".", "\n.", 1)  # TRAIT.KEY, over two lines
        try:
            neurons, date = Neurons.load(path), datetime.fromtimestamp(path.stat().st_mtime)
        except (UserError, OSError) as error:  # damaged, or of a run that puts another one there just now
            rows.append([name, Text(printable(" ".join(str(error).split())), style="red")])
            continue
        meta = neurons.meta
        rows.append([name, meta["model"], ", ".join(str(len(neurons.select(pole)[0])) for pole in POLES),
                     f"{sum(meta['tokens']):,}", f"{date:%Y-%m-%d}",
                     f"{meta['questions']} questions, {meta['bench']}, {meta['max_new_tokens']} tokens, seed {meta['seed']}"
                     + (f"; {len(neurons.high_bias)} trained a pole" if neurons.trained_key else "")])
    show_table(folder, ("file", "model", "high, low", "tokens", "made", "from"), rows, whole=("file", "tokens", "made"))


def say_compliance(meta: dict) -> None:
    """Say how many answers under a persona declined to be anyone, where any did."""
    asked, declined = (sum(meta.get(name, [0])) for name in ("asked", "declined"))
    if declined:
        say(f"{meta['trait']}: {declined} of {asked} answers under a persona declined to be anyone, and were left out")
    if 2 * declined > asked:
        say(f"{meta['trait']}: these neurons won't carry a persona: most answers under one are a refusal to have any. Another "
            "--frame or model may play")


def show_neurons(neurons: Neurons) -> None:
    """Print what was found: tokens, neurons a pole, the strongest, and where in the model they are."""
    meta, rows, strongest, layers = neurons.meta, [], "strongest,\nlayer.index: delta, p95", "first to last layer"
    say_compliance(meta)
    if "seen" in neurons.tensors:
        there, known = int((neurons.seen > 0).any(0).sum()), int(neurons.known.sum())
        if known < there:
            say(f"{neurons.trait}: {there - known:,} of {there:,} neurons are of experts that saw too few tokens to tell: a higher "
                "--limit or --max-new-tokens has more of them")
    for k, pole in enumerate(POLES):
        layer, index, delta, p95 = neurons.select(pole)
        clear = len(neurons.select(pole, min_neurons=0)[0])
        best = [f"{a}.{b}: {c:.2f}, {d:.2f}" for a, b, c, d in zip(*(x[:3].tolist() for x in (layer, index, delta, p95)))]
        several = -(-neurons.shape[0] // BARS)  # layers a bar
        spread = (layer // several).bincount(minlength=-(-neurons.shape[0] // several)).float()
        picture = "".join(" ▁▂▃▄▅▆▇█"[round(8 * float(share))] for share in spread / spread.max().clamp(min=1))
        rows.append([pole, f"{meta['tokens'][k]:,}", str(clear), "\n".join(best), picture])
    show_table(f"{neurons.trait}: {meta['questions']} questions a pole, {meta['model']}",
               ("pole", "tokens", "prob differs by 0.1", strongest, layers), rows,
               whole=("pole", "tokens", strongest, layers))
