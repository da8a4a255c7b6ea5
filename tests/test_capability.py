"""What an edit costs in general: neutral text, the quiz, lm-evaluation-harness."""

import json
import math
import sys

import pytest
import torch

import evaluate
from conftest import ROOT, main_of, shared_flags
from personality import Neurons, capability, npti, steer
from personality.capability import harness, hugging_face_evaluate, lm_eval_modules, neutral_pass, quiz, quiz_questions
from personality.frame import conversation
from personality.judges import log_likelihoods
from personality.model import answer_ids
from personality.store import lines_of
from personality.terminal import UserError


def test_quiz_and_neutral_text_are_whole():
    for question, options in quiz_questions():
        assert question.endswith("?") and len(set(options)) == 4 == len(options) and all(options)
    assert len(quiz_questions()) == 40 and all(len(text) > 150 for text in lines_of("neutral.txt"))


def test_neutral_text_is_read_as_alone(small):
    """In the padded batch each text has the loss, and the first choices, that it has by itself."""
    losses, choices = neutral_pass(small.model, small.tokenizer)
    assert len(losses) == len(choices) == 12
    for text, loss, chosen in zip(lines_of("neutral.txt"), losses, choices):
        ids = torch.tensor([small.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            alone = small.model(input_ids=ids, labels=ids)
        assert loss == pytest.approx(float(alone.loss), abs=1e-4) and torch.equal(chosen, alone.logits[0, :-1].argmax(-1))


def test_a_steered_model_reads_otherwise(small, made):
    neurons = Neurons.load(made / "extraversion.safetensors", small.model)
    losses, _ = neutral_pass(small.model, small.tokenizer)
    with steer(small.model, npti(neurons, 2), where="all"):
        assert max(abs(a - b) for a, b in zip(neutral_pass(small.model, small.tokenizer)[0], losses)) > 1e-4
    assert neutral_pass(small.model, small.tokenizer)[0] == losses


def test_the_quiz_takes_the_likeliest_option_a_token(small, monkeypatch):
    asked = [(f"w{10 + k} ?", [f"w{20 + k}", f"w{40 + k} w{50 + k}", f"w{60 + k}", f"w{30 + k} w3 w4"]) for k in range(10)]
    monkeypatch.setattr(capability, "quiz_questions", lambda: asked)
    right = quiz(small.model, small.tokenizer, "w50 w51", 8)
    assert len(right) == 10 and set(right) == {0, 1}
    for (question, options), is_right in zip(asked, right):
        ids = [answer_ids(small.tokenizer, option) for option in options]
        scores = log_likelihoods(small.model, small.tokenizer, [conversation(question, "w50 w51")], [ids])[0]
        assert is_right == int((scores / torch.tensor([len(row) for row in ids])).argmax() == 0)


@pytest.mark.parametrize("score", (math.nan, 1.0))
def test_numbers_that_are_none_and_ties_are_no_right_answers(small, monkeypatch, score):
    monkeypatch.setattr(capability, "log_likelihoods", lambda *_: torch.full((40, 4), score))
    monkeypatch.setattr(capability, "answer_ids", lambda *_: [5])
    assert quiz(small.model, small.tokenizer, None, 8) == [0] * 40


# ---------------------------------------------------------------------------------------------- lm-evaluation-harness


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A stand-in for Hugging Face's evaluate and for lm_eval, behind the checkout on the path."""
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "__init__.py").write_text("whose = 'Hugging Face'\n")
    (tmp_path / "lm_eval" / "models").mkdir(parents=True)
    (tmp_path / "lm_eval" / "models" / "__init__.py").write_text("")
    (tmp_path / "lm_eval" / "models" / "huggingface.py").write_text(
        "class HFLM:\n    def __init__(self, pretrained, tokenizer, batch_size):\n        self.model = pretrained\n")
    (tmp_path / "lm_eval" / "__init__.py").write_text(
        "def simple_evaluate(model, tasks, random_seed, **options):\n"
        "    import evaluate, torch\n"
        "    assert evaluate.whose == 'Hugging Face'\n"
        "    if 'unknown' in tasks:\n"
        "        raise KeyError('unknown')\n"
        "    ids = torch.arange(9, 30)\n"
        "    loss = sum(float(model.model(input_ids=ids.repeat(rows, 1)).logits.detach().std()) for rows in (1, 3))\n"
        "    return {'results': {task: {'acc,none': loss, 'alias': task} for task in tasks}}\n")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path, str(tmp_path)])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


@pytest.mark.usefixtures("elsewhere")
def test_lm_eval_finds_the_right_evaluate(small, made, monkeypatch, tmp_path):
    """Its lazy `import evaluate` must not find this script, whose name is the same; and the model that it scores is edited."""
    if any(path.joinpath("lm_eval").exists() for path in map(type(tmp_path), sys.path[:-1])):
        pytest.skip("the real lm_eval is installed, and comes first")
    main_of(evaluate, monkeypatch, *shared_flags(small), "--neurons", made, "--bench", small.bench_dir, "--limit", "4",
            "--trait", "extraversion", "--max-new-tokens", "5", "--alpha", "2", "--batch-size", "8", "--out", tmp_path / "out",
            "--capability", "first,second", "--method", "unedited", "npti")
    import evaluate as ours

    assert ours is evaluate and sys.modules["evaluate"] is evaluate and str(ROOT) in sys.path
    rows = json.loads((tmp_path / "out" / "details.json").read_text())["harness"]
    first, second = ([row for row in rows if row["task"] == task] for task in ("first", "second"))
    assert [(row["method"], row["pole"]) for row in first] == [("unedited", None), ("npti", "high"), ("npti", "low")]
    assert {row["metric"] for row in rows} == {"acc,none"} and len(rows) == 6, "figures only"
    values = [row["value"] for row in first]
    assert len(set(values)) == 3 and [row["value"] for row in second] == values
    assert "lm-evaluation-harness" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.usefixtures("elsewhere")
def test_what_lm_eval_raises_is_one_line(small):
    with pytest.raises(UserError, match="lm-evaluation-harness, unknown: KeyError: 'unknown'"):
        harness(small.model, small.tokenizer, "unknown", 8, 0)
    assert sys.modules["evaluate"] is evaluate


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    path = list(sys.path)
    with hugging_face_evaluate(), pytest.raises(UserError, match="needs lm-evaluation-harness: pip install"):
        lm_eval_modules()
    assert sys.path == path and sys.modules["evaluate"] is evaluate
