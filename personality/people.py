"""Who can be served: the personalities that a folder of neuron files and one of characters have."""

import math
import re
from pathlib import Path

from . import TRAITS
from .frame import Frame, with_a_clock
from .methods import Character, Profiles, affordable, at_levels, price_at
from .load import load_asked
from .neurons import NeuronFolder, neuron_path
from .steer import Profile
from .store import digest
from .terminal import EVERYWHERE, UserError, say

KEPT = 512  # personalities whose edits are kept


class People:
    """The personalities that a folder of neuron files has. All but its constructor runs between two steps of the engine."""

    def __init__(self, args):
        self.args, self.frame, self.most = args, Frame.named(args.frame), 1 << 30  # most: edits of a profile
        self.characters = read_characters(args.characters)

    def load(self):
        """(model, tokenizer), and what the files hold; called once, in the engine's thread."""
        model, tokenizer = load_asked(self.args)
        self.take(model, tokenizer)
        for character in self.characters.values():  # while nobody waits yet: it takes as long as reading 64 answers
            asked = [trait for trait, own in character.strengths.items() if own and trait in self.traits]
            for trait in asked if character.method == "activation" and not self.neurons.released else ():
                self.profiles.direction(trait)
        return model, with_a_clock(tokenizer)

    def take(self, model, tokenizer) -> None:
        """Read what the files hold for this model."""
        args = self.args
        self.neurons = NeuronFolder(model, args.neurons, frame=self.frame)
        self.profiles = Profiles(model, tokenizer, self.neurons, (args.min_delta, args.min_neurons), args.suppress)
        self.kept: dict[str, tuple[Profile, dict]] = {}
        self.traits = {trait: self.neurons[trait] for trait in TRAITS
                       if self.neurons.released or neuron_path(self.neurons.folder, trait).exists()}
        if not self.traits:
            say(f"--neurons {args.neurons}: no neuron files, so everybody gets the unedited model: python identify.py --train "
                f"--out {args.neurons} makes them")
        if args.where == "all" and any(getattr(neurons, "trained_key", "") for neurons in self.traits.values()):
            say(EVERYWHERE)

    def of(self, character: Character) -> tuple[Profile, dict]:
        """(profile, what is said of it in replies): the same objects each time, as the engine wants them."""
        key = digest(character.strengths, character.method, character.layers, character.model)
        if key not in self.kept:
            missing = [trait for trait, own in character.strengths.items() if own and trait not in self.traits]
            if missing:
                raise UserError(f"personality: there are no neuron files here of {', '.join(missing)}, but of "
                                f"{', '.join(self.traits) or 'no trait'}: python identify.py --train makes them")
            late = [trait for trait, own in character.strengths.items() if own and trait not in self.profiles.directions]
            if character.method == "activation" and late:
                raise UserError("personality: activation: what is added is read when the server starts, for the files of "
                                f"--characters: none of that method has {', '.join(late)}")
            profile = self.profiles.of(character)
            if len(profile) > self.most:
                raise UserError(f"personality: {len(profile)} neurons would be edited, there is room for {self.most} a request")
            self.kept[key] = profile, self.described(character, profile)
        self.kept[key] = self.kept.pop(key)  # the latest last
        while len(self.kept) > KEPT:
            self.kept.pop(next(iter(self.kept)))
        return self.kept[key]

    def described(self, character: Character, profile: Profile) -> dict:
        layers = profile.layer.bincount().tolist()
        found = {"method": character.method, "traits": character.strengths, "neurons": len(profile),
                 "layers": {str(layer): n for layer, n in enumerate(layers) if n}}
        if profile.residual:
            found["residual_layers"] = sorted(profile.residual)
        if character.method == "trained":
            levels = [(self.traits[trait], level) for trait, level in character.strengths.items() if level]
            share = affordable(levels)
            found |= {"range": [-1, 1], "share": round(share, 3), "expected_perplexity": expected_perplexity(levels, share)}
        return found


def expected_perplexity(levels: list[tuple], share: float) -> float | None:
    """By what factor the perplexity of a character, (neurons, level) a trait, grows at a share of its traits' biases, by their dose
    responses, as if they were independent; None beyond the doses that were tried. (Below what affordable() reckons with, where a
    trait makes answers likelier.)"""
    asked = [(dose, share * multiple) for _, _, dose, multiple in at_levels(levels)]
    if any(multiple > float(dose[-1, 0]) + 1e-6 for dose, multiple in asked):
        return None
    return round(math.exp(sum(price_at(dose, multiple) for dose, multiple in asked)), 3)


def read_characters(folder: str | None) -> dict[str, Character]:
    """The profile files of a folder, by their names without .toml."""
    if folder is None:
        return {}
    paths = sorted(Path(folder).glob("*.toml"))
    if not paths:
        raise UserError(f"--characters {folder}: no profile files (*.toml) there")
    wrong = [path.name for path in paths if not re.fullmatch(r"[\w.-]{1,64}", path.stem)]
    if wrong:
        raise UserError(f"--characters {folder}: {wrong[0]!r}: expected a name of letters, digits, dots and dashes")
    return {path.stem: Character.read(str(path)) for path in paths}
