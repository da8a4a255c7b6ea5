"""Give a language model a Big Five personality by setting a few of its MLP neurons while it writes (NPTI, ICLR 2025).

    from personality import Neurons, answer, load_model, npti, steer

    model, tokenizer = load_model()
    neurons = Neurons.load("neurons/extraversion.safetensors", model)
    with steer(model, npti(neurons, alpha=2)):
        print(answer(model, tokenizer, "What do you like to do with your friends?"))

A name is imported from its module when it is first used, so that `import personality` loads nothing heavy.
"""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.2.0"
TRAITS = ("openness", "conscientiousness", "extraversion", "agreeableness", "neuroticism")
POLES = ("high", "low")
HOMES = {
    "terminal": ("UserError",),
    "observe": ("Statistics", "observe"),
    "steer": ("Profile", "steer"),
    "frame": ("Frame",),
    "load": ("load_model",),
    "model": ("answer", "answers"),
    "questions": ("Bench", "load_bench"),
    "neurons": ("NeuronFolder", "Neurons", "Released"),
    "methods": ("Character", "composed", "dpn_le", "npti", "trained"),
}
HOME_OF = {name: module for module, names in HOMES.items() for name in names}
__all__ = ["POLES", "TRAITS", *HOME_OF]


class Package(ModuleType):
    """observe and steer are modules and functions: from here one gets the functions, whatever was imported before."""

    def __setattr__(self, name, value):
        if not (name in HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name):
        if name not in HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{HOME_OF[name]}"), name)
        setattr(self, name, value)
        return value


sys.modules[__name__].__class__ = Package
