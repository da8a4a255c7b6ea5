"""What an edit costs in general: neutral text, a quiz, lm-evaluation-harness. Scoring passes hold no generated token, so that
steering is with where="all" around all of these."""

import contextlib
import csv
import sys
from pathlib import Path

import torch

from .judges import log_likelihoods
from .frame import conversation
from .model import answer_ids, pad_left
from .store import TEXTS, lines_of
from .terminal import UserError


def quiz_questions() -> list[tuple[str, list[str]]]:
    """(question, four options, the right one first)."""
    with open(TEXTS / "quiz.csv", encoding="utf-8", newline="") as file:
        return [(question, options) for question, *options in list(csv.reader(file))[1:]]


def neutral_pass(model, tokenizer, rows: int = 64) -> tuple[list[float], list]:
    """Nats a token of each neutral text, and the model's first choice at each of its positions. rows: of a batch."""
    texts, losses, choices = [tokenizer(text)["input_ids"] for text in lines_of("neutral.txt")], [], []
    for some in (texts[k:k + rows] for k in range(0, len(texts), rows)):
        ids, mask = pad_left(some, tokenizer.pad_token_id, model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        for text, own, scores in zip(some, ids, logits):
            scores = scores[-len(text):-1].float()  # (tokens - 1, vocabulary)
            losses.append(float(torch.nn.functional.cross_entropy(scores, own[-len(scores):])))
            choices.append(scores.argmax(-1))
    return losses, choices


def quiz(model, tokenizer, system: str | None, rows: int) -> list[int]:
    """1 for each question whose right option has the best mean log-likelihood a token of the four; ties and NaN are not
    right."""
    ids = [[answer_ids(tokenizer, option) for option in options] for _, options in quiz_questions()]
    turns = [conversation(question, system) for question, _ in quiz_questions()]
    scores = log_likelihoods(model, tokenizer, turns, ids, rows).cpu() / torch.tensor([[len(row) for row in four] for four in ids])
    return (scores[:, 0] > scores[:, 1:].amax(1)).int().tolist()


@contextlib.contextmanager
def hugging_face_evaluate():
    """lm_eval imports Hugging Face's `evaluate`, lazily; from a checkout's root that name is evaluate.py's."""
    kept, path = sys.modules.pop("evaluate", None), sys.path[:]
    sys.path[:] = [entry for entry in path if not (Path(entry or ".") / "evaluate.py").exists()]
    try:
        yield
    finally:
        sys.path[:] = path
        sys.modules.pop("evaluate", None)
        if kept:
            sys.modules["evaluate"] = kept


def lm_eval_modules():
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError("--capability TASKS needs lm-evaluation-harness: pip install -e '.[capability]'") from error
    return lm_eval, HFLM


def harness(model, tokenizer, tasks: str, batch_size: int, seed: int) -> dict:
    """lm-evaluation-harness on the model as it is steered: {task: {metric: value}}. tasks: names, commas between."""
    with hugging_face_evaluate():
        lm_eval, HFLM = lm_eval_modules()
        try:
            model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            result = lm_eval.simple_evaluate(model, tasks=tasks.split(","), random_seed=seed)
        except Exception as error:  # an unknown task, no network for its data: the harness raises what it likes
            raise UserError(f"lm-evaluation-harness, {tasks}: {type(error).__name__}: {error}") from error
    return {task: {name: value for name, value in scores.items() if isinstance(value, (int, float))}
            for task, scores in result["results"].items()}
