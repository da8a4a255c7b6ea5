"""The dose response of a trait's constants: how far the answers to validation questions move at some multiples, and at what price.

A level is read from it, see methods.multiple_at(). No judge takes part, and the judges' personas are not used.
"""

import math

import torch

from . import POLES
from .frame import Frame
from .judges import log_likelihoods
from .methods import DEAREST
from .model import TEST_PENALTY, BatchSize, answers, without_stop
from .neurons import Neurons
from .questions import Bench
from .steer import steer
from .terminal import progress

MULTIPLES, SMALLER, LARGER = (1.5, 3.0, 5.0), (0.375, 0.75), (8.0,)  # of the constants, that are tried; see levels()
VALIDATION, TOGETHER, TOKENS = 18, 6, 64  # questions, of which some are asked in one batch; tokens of an answer
SURE = 1.64  # standard errors on top of the perplexity that is measured, so that it is higher in one of twenty cases only, or so:
# of the built-in 18 questions in one of 17 by Student's distribution, of six in one of 12; of a single question nothing is known.
# (Eighteen are of eight situations, which have perhaps a tenth of the variance in common: then the error is 6 % too small.)


def options() -> dict:
    """What a dose response depends on beside constants, model and bench."""
    return {"multiples": [*SMALLER, *MULTIPLES, *LARGER], "validation": VALIDATION, "tokens": TOKENS, "sure": SURE}


def dose_response(model, tokenizer, bench: Bench, trait: str, frame: Frame, profiles: list, multiples, step,
                  together: int | None = None) -> torch.Tensor:
    """float32 (2, multiples, 4), pole high first: a multiple of the constants; how far the answers to validation questions move to
    their pole, in nats a token of log p(answer|high) - log p(answer|low) under search personas; by what factor their perplexity
    under the unedited model grows (the geometric mean), and that with SURE standard errors on top. profiles: pole by pole, too;
    together: questions in a batch, TOGETHER by default."""
    numbers, together, moved, dearer = range(len(profiles) + 1), together or TOGETHER, [], []
    personas = [bench.personas_for("search", trait, pole)[0] for pole in POLES]
    questions = bench.questions(trait, "validation", VALIDATION)
    for part in (questions[k:k + together] for k in range(0, len(questions), together)):
        with steer(model, profiles, [*numbers] * len(part)):
            asked = [frame.turns(question) for question in part for _ in numbers]
            said = answers(model, tokenizer, asked, TOKENS, repetition_penalty=TEST_PENALTY)
        for k, question in enumerate(part):
            ids = [without_stop(tokenizer, row) or [tokenizer.eos_token_id] for _, row in said[k * len(numbers):][:len(numbers)]]
            turns = [frame.turns(question, persona) for persona in (None, *personas)]
            likely = log_likelihoods(model, tokenizer, turns, [ids] * len(turns), together * len(numbers)).cpu()
            plain, high, low = likely / torch.tensor([len(row) for row in ids])
            moved.append((high - low)[1:] - (high - low)[0])
            dearer.append(plain[0] - plain[1:])
            step()
    towards = torch.tensor([1.0, -1.0]).repeat_interleave(len(multiples))
    moved, dearer = torch.stack(moved), torch.stack(dearer)  # (questions, poles * multiples)
    error = dearer.std(0, correction=min(1, len(dearer) - 1)) / math.sqrt(len(dearer))
    rows = torch.tensor(multiples).repeat(2), towards * moved.mean(0), dearer.mean(0).exp(), (dearer.mean(0) + SURE * error).exp()
    return torch.stack(rows, 1).view(2, len(multiples), 4).float()


def levels(model, tokenizer, bench: Bench, neurons: Neurons, profile_of) -> torch.Tensor:
    """The dose response of profile_of(pole, multiple) at MULTIPLES; at LARGER, too, where a pole's level 1 may lie beyond them,
    and at SMALLER where a pole's first multiple is too dear already."""
    size, trait = BatchSize(TOGETHER), neurons.trait

    def tried(multiples):
        profiles = [profile_of(pole, multiple) for pole in POLES for multiple in multiples]

        def response(together):
            with progress(len(bench.questions(trait, "validation", VALIDATION)), 0, f"{trait}: levels", "question") as bar:
                return dose_response(model, tokenizer, bench, trait, neurons.frame, profiles, multiples, bar.update, together)

        return size.fit(response)

    dose = tried(MULTIPLES)
    if bool((dose[..., 3].amax(1) <= DEAREST).any()):
        dose = torch.cat([dose, tried(LARGER)], 1)
    return torch.cat([tried(SMALLER), dose], 1) if bool((dose[:, 0, 2] > DEAREST).any()) else dose
