"""Trained edits: recovered where they were planted, the same after a kill, and the levels that are read off them."""

import contextlib
import itertools
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

import identify
import induce
from conftest import FRAMED, contents, exit_of, lines_of, main_of, run, shared_flags
from personality import POLES, doses, train
from personality.frame import Frame
from personality.methods import Character, Profiles, affordable, multiple_at, price_at, trained
from personality.mlp import find_mlps
from personality.load import load_model
from personality.model import BatchSize, prompt_ids
from personality.neurons import TRAINED, NeuronFolder, Neurons
from personality.people import expected_perplexity
from personality.steer import Profile, steer
from personality.terminal import UserError


def lessons_of(small, made, pole="high", rows=3):
    items = [item for item in lines_of(made / "extraversion.answers.jsonl") if item["pole"] == pole][:6]
    return [train.make_lesson(small.model, small.tokenizer, small.bench, "extraversion", FRAMED, items[k:k + 3], 0, BatchSize(rows))
            for k in (0, 3)]


def shape_of(small):
    mlps = find_mlps(small.model)
    return len(mlps), mlps[0].width


def test_the_student_is_the_steered_model(small):
    bias = torch.randn(shape_of(small), generator=torch.Generator().manual_seed(0)) * 0.3
    ids = torch.tensor([prompt_ids(small.tokenizer, FRAMED.turns("w10 w11 ?"))])
    with torch.no_grad():
        plain = small.model(input_ids=ids).logits
        with train.biased(small.model, bias):
            student = small.model(input_ids=ids).logits
        with steer(small.model, Profile.dense(bias=bias), where="all"):
            steered = small.model(input_ids=ids).logits
        assert torch.equal(small.model(input_ids=ids).logits, plain), "the model is left as it was"
    assert (student - steered).abs().max() < 1e-4 < (student - plain).abs().max()
    assert all(weight.requires_grad for weight in small.model.parameters())


def test_a_lesson_is_of_three_passes(small, made):
    of, (item, *_) = lessons_of(small, made)[0], lines_of(made / "extraversion.answers.jsonl")
    prompt = prompt_ids(small.tokenizer, FRAMED.turns(item["question"]))
    personas = [item["persona"], *small.bench.personas_for("search", "extraversion", "low")]
    with torch.no_grad():
        plain, high, *low = (small.model(input_ids=torch.tensor([ids + item["ids"][:-1]])).logits[0, len(ids):].log_softmax(-1)
                             for ids in (prompt, *(prompt_ids(small.tokenizer, FRAMED.turns(item["question"], persona))
                                                   for persona in personas)))
    n = len(item["ids"]) - 1
    assert of.counted[0].tolist() == [k < n for k in range(of.ids.shape[1])]
    top = of.top[0, :n]
    assert torch.allclose(of.plain[0, :n], plain.gather(-1, top), atol=1e-4)
    fits = [torch.allclose(of.apart[0, :n], (high - other).gather(-1, top), atol=1e-4) for other in low]
    assert sum(fits) == 1, "high less low, by the answer's own persona and one of the other pole"
    for sign in (1, -1):
        teacher = (plain + sign * train.GAIN * (high - low[fits.index(True)])).gather(-1, top).softmax(-1)
        assert torch.allclose(of.teacher(sign)[0, :n], teacher, atol=1e-4)
        assert not torch.allclose(teacher, of.plain[0, :n].exp(), atol=1e-3)


@pytest.mark.parametrize(("layer", "index", "value"), [(0, 5, 1.5), (1, 3, -1.5), (1, 40, 2.0)])
def test_a_planted_bias_is_found(small, made, monkeypatch, layer, index, value):
    """A teacher that is the model itself with one biased neuron: of those that are chosen it is one of the most biased, to its side,
    and the student comes nearer."""
    monkeypatch.setattr(train, "DRAWS", 8)
    planted, lessons = torch.zeros(shape_of(small)), lessons_of(small, made)
    planted[layer, index] = value
    for of in lessons:
        with torch.no_grad(), train.biased(small.model, planted):
            said = train.student_says(small.model, of).gather(-1, of.top)
        of.apart = (said - of.plain) / train.GAIN
    found = train.slopes_and_scores(small.model, iter(lessons), 1, 0, lambda: None)
    bias = train.natural_step(*found, torch.full_like(planted, 1e-9), 10)
    assert (bias != 0).sum() == 10 and bias[layer, index] * value > 0
    assert bias[layer, index].abs() >= bias.abs().flatten().topk(3).values[-1]

    def apart(size):
        with torch.no_grad(), train.biased(small.model, bias * size / bias.abs().max()):
            return sum(float(train.divergence(of, 1, train.student_says(small.model, of)).sum()) for of in lessons)

    assert apart(abs(value) / 4) < 0.8 * apart(0)


def test_a_student_that_says_what_the_teacher_says_has_nothing_to_learn(small, made, monkeypatch):
    """Whatever it says beyond the tokens that are compared."""
    monkeypatch.setattr(train, "TOP", 20)
    of = lessons_of(small, made)[0]
    of.counted[0, -1] = False
    said = torch.full((*of.ids.shape, small.model.config.vocab_size), -3.0).scatter(-1, of.top, of.teacher(1).log() - 1)
    assert train.divergence(of, 1, said).abs().max() < 1e-5
    assert train.divergence(of, -1, said).sum() > 0.01 and (train.divergence(of, -1, said)[~of.counted] == 0).all()


def test_slopes_and_scores(small, made, monkeypatch):
    """By a backward pass for each answer, with drawn tokens that are known, and fewer tokens to compare than the vocabulary has."""
    monkeypatch.setattr(train, "TOP", 20)
    lessons, slopes, scores = lessons_of(small, made), [], []
    first, again, other = (train.slopes_and_scores(small.model, lessons, 1, seed, lambda: None)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first[:3], first[3:6])
    monkeypatch.setattr(torch, "multinomial", lambda likely, number, **_: likely.argmax(-1, keepdim=True).expand(-1, number))
    slope, score = train.slopes_and_scores(small.model, lessons, 1, 0, lambda: None)
    tokens = sum(int(of.counted.sum()) for of in lessons)
    for of in lessons:
        for alone in of.parts(1):
            bias = torch.zeros(shape_of(small), requires_grad=True)
            with train.biased(small.model, bias), torch.enable_grad():
                said = train.student_says(small.model, alone)
                kl = sum((p * (p.log() - said[0, t, alone.top[0, t]].log_softmax(-1))).sum()
                         for t, p in enumerate(alone.teacher(1)[0]) if alone.counted[0, t])
                likely = (said[0].max(-1).values * alone.counted[0]).sum()
                slopes.append(torch.autograd.grad(kl, bias, retain_graph=True)[0])
                scores.append(torch.autograd.grad(likely, bias)[0])
    assert torch.allclose(slope, sum(slopes) / tokens, rtol=1e-3, atol=1e-7) and slope.abs().max() > 1e-4
    order = [draw * 3 + k + 3 * train.DRAWS * part for part in (0, 1) for k in range(3) for draw in range(train.DRAWS)]
    expected = torch.stack(scores).repeat_interleave(train.DRAWS, 0) / (train.DRAWS * tokens) ** 0.5
    assert torch.allclose(score[order], expected, rtol=1e-3, atol=1e-6)


def test_a_model_of_no_finite_numbers_is_one_line(small, made):
    """As float16 may have them."""
    lessons, norm = lessons_of(small, made), small.model.model.norm.weight
    plain = norm.detach().clone()
    norm.data.fill_(torch.inf)
    try:
        with pytest.raises(UserError, match="try --dtype float32"):
            train.slopes_and_scores(small.model, lessons, 1, 0, lambda: None)
    finally:
        norm.data.copy_(plain)


def test_the_step_and_its_neurons():
    """By hand, with three draws of four neurons."""
    slope, price = torch.tensor([[1.0, -2.0], [0.5, 0.1]]), torch.tensor([[0.1, 0.2], [0.4, 9.0]])
    scores = torch.tensor([[[1.0, 1.0], [0.1, 0.0]], [[0.5, -1.0], [0.1, 0.0]], [[0.0, 2.0], [0.1, 0.2]]])
    cost = scores.square().sum(0) + train.PRICE * price + 1e-3 * scores.square().sum(0).mean()
    off = train.OFF_DIAGONAL * (1 * 1 - 0.5 * 1)
    expected = -torch.linalg.inv(torch.tensor([[cost[0, 0], off], [off, cost[0, 1]]])) @ slope[0]
    bias = train.natural_step(slope, scores, price, 2)
    assert bias[1].tolist() == [0, 0] and torch.allclose(bias[0] / bias[0, 0], expected / expected[0], rtol=1e-5)
    assert bias[0, 0] < 0 < bias[0, 1]
    assert float((price * bias.square()).sum()) / 2 == pytest.approx(train.UNIT, rel=1e-5)
    assert (train.natural_step(slope, scores, torch.tensor([[9.0, 0.2], [0.4, 9.0]]), 2) != 0).tolist() == [[False, True], [True, False]]
    free = train.natural_step(slope, scores, torch.tensor([[0.0, 0.0], [0.0, 9.0]]), 2)
    assert free.abs().max() < 1e3, "of neurons that neutral text never reaches, too"


def test_the_price_of_a_bias(small, monkeypatch):
    """Against Fisher's matrix, summed over all tokens that the model may say at each of two places."""
    monkeypatch.setattr(train, "lines_of", lambda name: ["w10 w11 w12"])
    monkeypatch.setattr(train, "WINDOW", 2)
    monkeypatch.setattr(train, "DRAWS", 1500)
    ids = torch.tensor([small.tokenizer("w10 w11 w12")["input_ids"][:2]])
    bias = torch.zeros(shape_of(small), requires_grad=True)
    with train.biased(small.model, bias), torch.enable_grad():
        said = small.model(input_ids=ids).logits[0].log_softmax(-1)
        exact = sum(likely.exp().detach() * torch.autograd.grad(likely, bias, retain_graph=True)[0].square()
                    for place in said for likely in place) / 2
    price = train.price_of(small.model, small.tokenizer, 0)
    assert torch.equal(price, train.price_of(small.model, small.tokenizer, 0)), "by seed"
    large = exact > exact.mean()
    assert large.sum() > 10 and (price[large] / exact[large] - 1).abs().max() < 0.35


@pytest.fixture
def learnt(small, made, tmp_path):
    """A folder of its own with a neuron file that has trained edits."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    train.add_trained(small.model, small.tokenizer, small.bench, Neurons.load(tmp_path / "extraversion.safetensors"))
    return tmp_path


def test_the_file_holds_both_poles(small, made, learnt):
    before, neurons = (Neurons.load(folder / "extraversion.safetensors", small.model) for folder in (made, learnt))
    number = max(1, round(train.SHARE * neurons.shape[0] * neurons.shape[1]))
    assert neurons.key == before.key and neurons.trained_key and not before.trained_key
    assert torch.equal(neurons.prob, before.prob)
    for pole in POLES:
        assert 0 < len(neurons.tensors[f"{pole}_bias"]) <= number
    assert neurons.dose.shape == (2, len(doses.MULTIPLES), 4)
    assert neurons.dose[..., 0].tolist() == [list(doses.MULTIPLES)] * 2
    again = train.add_trained(None, None, small.bench, neurons)
    assert again is neurons, "what is there is not trained again"


def test_a_killed_training_goes_on_and_ends_the_same(small, made, learnt, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("killed")
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    neurons, plain, calls = Neurons.load(folder / "extraversion.safetensors"), train.slopes_and_scores, []

    def killed(model, lessons, sign, *more):
        calls.append(sign)
        if calls == [1, -1]:
            raise KeyboardInterrupt
        return plain(model, lessons, sign, *more)

    monkeypatch.setattr(train, "slopes_and_scores", killed)
    with pytest.raises(KeyboardInterrupt, match="what was finished is kept"):
        train.add_trained(small.model, small.tokenizer, small.bench, neurons)
    run(small, folder).identify()  # identify.py --train comes by here first, and leaves what is kept
    assert not Neurons.load(folder / "extraversion.safetensors").trained_key
    train.add_trained(small.model, small.tokenizer, small.bench, neurons)
    assert calls == [1, -1, -1] and contents(folder) == contents(learnt)
    assert not list(folder.glob(".*safetensors"))


def test_a_file_that_is_replaced_meanwhile_stays(small, made, tmp_path, monkeypatch):
    """By identify.py with other options, say, whose statistics would be lost."""
    first, levels = run(small, tmp_path).identify(), doses.levels

    def meanwhile(*all_of):
        run(small, tmp_path, limit=4).identify()
        return levels(*all_of)

    monkeypatch.setattr(doses, "levels", meanwhile)
    with pytest.raises(UserError, match="extraversion.safetensors: was replaced while"):
        train.add_trained(small.model, small.tokenizer, small.bench, first)
    there = Neurons.load(tmp_path / "extraversion.safetensors")
    assert there.key != first.key and not there.trained_key


def test_what_can_not_be_trained_is_one_line(small, made, tmp_path, monkeypatch, capsys):
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    neurons = Neurons.load(tmp_path / "extraversion.safetensors")
    few = replace(small.bench, test={trait: texts[:2] for trait, texts in small.bench.test.items()})
    with pytest.raises(UserError, match="2 test questions of extraversion.*need 3 or more"):
        train.add_trained(small.model, small.tokenizer, few, neurons)
    dose = torch.tensor([[[1.0, 0.1, 1, 1]] * 4, [[1.0, -0.1, 1, 1]] * 4])
    monkeypatch.setattr(doses, "levels", lambda *_: dose)
    train.add_trained(small.model, small.tokenizer, small.bench, neurons)
    said = capsys.readouterr().err
    assert "the low pole moved no answers to it" in said and "the high pole moved" not in said

    def no_room(*_):
        raise torch.OutOfMemoryError("no room")

    for module, name in ((train, "price_of"), (doses, "levels")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory: training"):
            patch.setattr(module, name, no_room)
            train.add_trained(small.model, small.tokenizer, small.bench, neurons, seed=1)


def test_short_of_memory_training_takes_fewer_rows_at_once(small, made, tmp_path, capsys):
    """On a model that fails beyond two rows that keep what a backward pass needs, and beyond seven that are only read."""
    for path in made.iterdir():
        for folder in ("roomy", "short"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    roomy, short = (Neurons.load(tmp_path / folder / "extraversion.safetensors") for folder in ("roomy", "short"))
    roomy, asked = train.add_trained(small.model, small.tokenizer, small.bench, roomy), []

    def little_room(module, args, inputs):
        asked.append((torch.is_grad_enabled(), len(inputs["input_ids"])))
        if asked[-1][1] > (2 if asked[-1][0] else 7):
            raise torch.OutOfMemoryError("no room")

    hook = small.model.register_forward_pre_hook(little_room, with_kwargs=True)
    try:
        short = train.add_trained(small.model, small.tokenizer, small.bench, short)
    finally:
        hook.remove()
    assert (True, 1) in asked and (False, 7) in asked
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(said) >= 4 and {"out of memory: batches of 1", "out of memory: batches of 3"} <= set(said)
    assert torch.equal(short.tensors["high_place"], roomy.tensors["high_place"]), "the same tokens are drawn"
    for name in ("high_bias", "low_bias", "dose"):
        assert torch.allclose(short.tensors[name], roomy.tensors[name], rtol=1e-3, atol=1e-4)
    assert short.trained_key == roomy.trained_key


def test_a_lesson_holds_what_the_teacher_would_say(small, made, monkeypatch):
    """Of few tokens a place those that the model itself or the teacher of either pole finds likeliest."""
    monkeypatch.setattr(train, "TOP", 97)
    whole = lessons_of(small, made)[0]
    monkeypatch.setattr(train, "TOP", 3)
    few = lessons_of(small, made)[0]
    said = [(whole.plain + sign * train.GAIN * whole.apart).log_softmax(-1) for sign in (1, 0, -1)]
    likeliest = whole.top.gather(-1, torch.stack(said).amax(0).topk(3).indices)
    assert torch.equal(few.top.sort().values, likeliest.sort().values)
    assert not torch.equal(few.top.sort().values, whole.top.gather(-1, whole.plain.topk(3).indices).sort().values)


def test_answers_that_decline_are_not_learnt(small, made, tmp_path, monkeypatch):
    lines = [line for line in lines_of(made / "extraversion.answers.jsonl") if line["pole"] == "high"]
    shutil.copy(made / "extraversion.safetensors", tmp_path)
    (tmp_path / "extraversion.answers.jsonl").write_text("".join(
        json.dumps({**line, **({"answer": "As an AI language model, no.", "ids": []} if k % 2 else {})}) + "\n" for k, line in enumerate(lines)))
    neurons = Neurons.load(tmp_path / "extraversion.safetensors")
    learnt = [item for batch in train.answers_to_learn(small.tokenizer, neurons, "high") for item in batch]
    assert {item["question"] for item in learnt} <= {line["question"] for line in lines[::2]} and len(learnt) == train.ANSWERS


def test_another_bench_trains_anew(small, learnt, monkeypatch):
    neurons = Neurons.load(learnt / "extraversion.safetensors")
    monkeypatch.setattr(train, "both_poles", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train.add_trained(small.model, small.tokenizer, small.bench, neurons) is neurons
    other = replace(small.bench, test={trait: texts[1:] for trait, texts in small.bench.test.items()})
    with pytest.raises(KeyboardInterrupt):
        train.add_trained(small.model, small.tokenizer, other, neurons)


def test_parts_of_a_lesson(small, made):
    """Each row is what it is in the whole, when it is made and when it is learned."""
    of = lessons_of(small, made)[0]
    whole = train.student_says(small.model, of)
    parts = [*of.parts(2)]
    assert [len(part.ids) for part in parts] == [len(part.mask) for part in parts] == [2, 1]
    assert torch.allclose(torch.cat([train.student_says(small.model, part) for part in parts]), whole, atol=1e-5)
    assert torch.equal(torch.cat([part.teacher(1) for part in parts]), of.teacher(1))
    again = lessons_of(small, made, rows=2)[0]
    assert torch.equal(again.top.sort(-1).values, of.top.sort(-1).values) and torch.allclose(again.teacher(1).sort(-1).values,
                                                                                            of.teacher(1).sort(-1).values, atol=1e-5)


def test_no_training_while_steered(small, made):
    """As /trait in a chat would have it: one line, and the model is steered as before."""
    ids, bias = torch.tensor([[5, 9, 12]]), torch.full(shape_of(small), 0.3)
    with torch.no_grad(), steer(small.model, Profile.dense(bias=bias), where="all"):
        before = small.model(input_ids=ids).logits
        with pytest.raises(UserError, match="identify.py --train --trait extraversion"):
            train.add_trained(small.model, small.tokenizer, small.bench, Neurons.load(made / "extraversion.safetensors"))
        with train.biased(small.model, torch.zeros(shape_of(small))):
            assert not torch.equal(small.model(input_ids=ids).logits, before)
        assert torch.equal(small.model(input_ids=ids).logits, before)
    with steer(small.model.model, Profile.dense(bias=bias)), pytest.raises(UserError, match="no training while the model is steered"):
        train.add_trained(small.model, small.tokenizer, small.bench, Neurons.load(made / "extraversion.safetensors"))


def test_damaged_trained_edits_are_refused(learnt):
    neurons = Neurons.load(learnt / "extraversion.safetensors")
    for name, value in (("high_place", neurons.high_place + 10_000), ("low_bias", neurons.low_bias[:0]),
                        ("dose", -neurons.dose), ("high_bias", neurons.high_bias * torch.nan)):
        wrong = Neurons({**neurons.tensors, name: value}, dict(neurons.meta), neurons.path)
        with pytest.raises(UserError, match="trained edits"):
            wrong.check()
    few = {name: tensor for name, tensor in neurons.tensors.items() if name != "dose"}
    with pytest.raises(UserError, match="trained edits"):
        Neurons(few, dict(neurons.meta), neurons.path).check()


def test_files_from_before_the_bound_still_load(learnt):
    neurons = Neurons.load(learnt / "extraversion.safetensors")
    before = Neurons({**neurons.tensors, "dose": neurons.dose[..., :3].contiguous()}, dict(neurons.meta), neurons.path)
    before.check_trained({name: tensor.shape for name, tensor in before.tensors.items() if name in TRAINED})
    assert len(trained([(before, 0.5)])) == len(trained([(neurons, 0.5)]))


@pytest.mark.parametrize("questions", [1, 3])
def test_dose_response(small, monkeypatch, questions):
    """By hand: log p a token under nobody, the high and the low pole of the unedited answer and one a pole, for each question."""
    multiples, asked = (2.0,), small.bench.questions("extraversion", "validation", questions)
    scores = torch.randn((questions, 3, 3), generator=torch.Generator().manual_seed(0)).double()
    left = iter(scores)
    monkeypatch.setattr(doses, "VALIDATION", questions)
    rows, turns_asked = [], []

    @contextlib.contextmanager
    def steered(model, profiles, of_row):
        rows.extend(profiles[number - 1].name if number else "nobody" for number in of_row)
        yield

    def said(model, tokenizer, conversations, tokens, repetition_penalty):
        assert repetition_penalty == doses.TEST_PENALTY and conversations == [
            Frame.named("none").turns(question) for question in asked for _ in range(3)]
        return [("", [5, 6, 7])] * len(conversations)

    def scored(model, tokenizer, turns, ids, most):
        assert ids == [[[5, 6]] * 3] * 3, "a base model's next question is no part of an answer's price"
        turns_asked.append(turns)
        return 2 * next(left)

    monkeypatch.setattr(doses, "steer", steered)
    monkeypatch.setattr(doses, "without_stop", lambda tokenizer, row: row[:2])
    monkeypatch.setattr(doses, "answers", said)
    monkeypatch.setattr(doses, "log_likelihoods", scored)
    dose = doses.dose_response(small.model, small.tokenizer, small.bench, "extraversion", Frame.named("none"),
                               [Profile.empty("high"), Profile.empty("low")], multiples, lambda: None)
    assert len(asked) == questions and dose.shape == (2, 1, 4) and rows == ["nobody", "high", "low"] * questions
    personas = [small.bench.personas_for("search", "extraversion", pole)[0] for pole in POLES]
    assert turns_asked == [[Frame.named("none").turns(question, persona) for persona in (None, *personas)] for question in asked]
    apart = scores[:, 1] - scores[:, 2]
    for pole, sign in enumerate((1, -1)):
        dearer = scores[:, 0, 0] - scores[:, 0, 1 + pole]
        error = dearer.std() / questions ** 0.5 if questions > 1 else torch.tensor(0.0)
        expected = (2, sign * (apart[:, 1 + pole] - apart[:, 0]).mean(), dearer.mean().exp(), (dearer.mean() + 1.64 * error).exp())
        assert dose[pole, 0].tolist() == pytest.approx([float(value) for value in expected], rel=1e-5)


@pytest.mark.parametrize("price", [1.2, 1.4])
@pytest.mark.parametrize("at_most", [1.3, 1.31])
def test_what_else_is_tried(small, learnt, monkeypatch, price, at_most):
    """More where a pole's level 1 may lie beyond, less where one is too dear at once, as measured."""
    neurons, asked = Neurons.load(learnt / "extraversion.safetensors"), []

    def response(model, tokenizer, bench, trait, frame, profiles, multiples, step, most):
        asked.append((multiples, [profile.name for profile in profiles]))
        high = [[multiple, multiple, 1.1, at_most if multiple == 3 else 1.2] for multiple in multiples]
        return torch.tensor([high, [[multiple, multiple, price, 2.0] for multiple in multiples]])

    monkeypatch.setattr(doses, "dose_response", response)
    dose = doses.levels(small.model, small.tokenizer, small.bench, neurons, lambda pole, by: Profile.empty(f"{pole} {by}"))
    expected = [doses.MULTIPLES] + [doses.LARGER] * (at_most <= 1.3) + [doses.SMALLER] * (price > 1.3)
    assert asked == [(multiples, [f"{pole} {by}" for pole in ("high", "low") for by in multiples]) for multiples in expected]
    assert dose[..., 0].tolist() == [sorted(by for multiples in expected for by in multiples)] * 2


@pytest.mark.parametrize("dear", [[1.1, 1.35, 1.2], [1.1, 1.2, 1.25]])
def test_eight_times_moves_no_level_that_lies_below(dear):
    """Where one is too dear, wherever it is, levels() does not try it; else level 1 may lie there."""
    near = torch.tensor([[by, by / 50, price, price] for by, price in zip(doses.MULTIPLES, dear)])
    whole = torch.cat([near, torch.tensor([[8.0, 0.2, 1.9, 2.1]])])
    same = [multiple_at(near, level) == multiple_at(whole, level) for level in (0.25, 0.5, 1, 2)]
    assert same == [max(dear) > 1.3] * 4


def test_levels():
    dose = torch.tensor([[1.0, 0.02, 1.05], [2.0, 0.05, 1.1], [3.0, 0.06, 1.3], [4.0, 0.05, 2.0]])
    assert multiple_at(dose, 1) == pytest.approx(3, abs=1e-6)
    assert multiple_at(dose, 0.5) == pytest.approx(1 + 1 / 3, abs=0.01), "half of what level 1 moves: 0.03"
    assert multiple_at(dose, 2) == pytest.approx(6, abs=1e-5) and multiple_at(dose, 0) == 0
    cheap = torch.tensor([[1.0, 0.02, 1.0], [2.0, 0.04, 1.1]])
    assert multiple_at(cheap, 1) == 2, "no further than was tried"
    unsure = torch.cat([dose, torch.tensor([[1.1], [1.3], [1.4], [2.5]])], 1)
    assert multiple_at(unsure, 1) == pytest.approx(2, abs=1e-6), "what it may be at most counts, not what was measured"
    enough = torch.tensor([[1.0, 0.05, 1.0], [2.0, 0.04, 1.0], [3.0, 0.02, 1.1]])
    assert multiple_at(enough, 1) == pytest.approx(1, abs=0.01) and multiple_at(enough, 0.98) == pytest.approx(0.98, abs=0.01)
    assert multiple_at(enough, 2) == pytest.approx(2, abs=0.02), "no level jumps where more does no more"
    useless = torch.tensor([[1.0, -0.02, 1.2], [2.0, -0.04, 1.4]])
    assert multiple_at(useless, 0.5) == pytest.approx(multiple_at(useless, 1) / 2)


def priced(trait, expected, unsure, seed=0):
    """A trait whose answers move by a tenth a multiple, for so many nats a token: (expected, how many more they may be)."""
    dose = torch.tensor([[by, by / 10, math.exp(expected * by), math.exp((expected + unsure) * by)] for by in (1.0, 2.0, 4.0)])
    draw = torch.Generator().manual_seed(seed)
    edits = {f"{pole}_place": torch.stack([torch.randperm(8, generator=draw)[:3], torch.randperm(40, generator=draw)[:3]], 1).int()
             for pole in POLES} | {f"{pole}_bias": torch.randn(3, generator=draw) for pole in POLES}
    return Neurons({"prob": torch.rand(2, 8, 40), "dose": torch.stack([dose, dose]), **edits}, {"trait": trait})


def test_several_traits_cost_no_more_than_one_may():
    """What is expected of them adds up; all are brought down alike."""
    first, second = priced("openness", 0.1, 0.05), priced("neuroticism", 0.1, 0.05, 1)
    alone, limit = 0.1 / 0.15 * math.log(1.3), math.log(1.3)  # expected of level 1 of either
    assert affordable([(first, 1.0), (second, -1.0)]) == pytest.approx(limit / (2 * alone), abs=2e-3)
    assert affordable([(first, 1.0), (second, -0.8)]) == pytest.approx(limit / (1.8 * alone), abs=2e-3)
    assert affordable([(first, 2.0), (second, 1.0)]) == pytest.approx(2 / 3, abs=2e-3), "as dear as 2 alone"
    assert affordable([(first, 9.0), (second, 0.01)]) > 0.99, "beyond the doses a faint second trait changes nothing"
    assert affordable([(first, 9.0), (second, -9.0)]) == pytest.approx(0.5, abs=2e-3)
    for unchanged in ([], [(first, 0.0)], [(first, 1.0)], [(first, -1.5)], [(first, 1.0), (second, 0.0)], [(first, 1.0), (second, -0.4)]):
        assert affordable(unchanged) == 1
    free, cheaper = priced("extraversion", 0.0, 0.0), priced("agreeableness", -0.1, 0.0)
    assert affordable([(first, 1.0), (free, 1.0)]) == 1 == affordable([(first, 1.0), (cheaper, 1.0)])
    assert affordable([(first, 1.0), (second, 1.0), (cheaper, 1.0)]) == affordable([(first, 1.0), (second, 1.0)]), "it pays for nobody"
    some = [(first, 1.0), (second, 0.9), (free, 0.3), (cheaper, -1.0)]
    assert len({affordable(list(parts)) for parts in itertools.permutations(some)}) == 1


@pytest.mark.parametrize("columns", (3, 4))
def test_a_trait_that_moves_nothing_at_first_does_not_switch_the_others_off(columns):
    dull = torch.tensor([[1.5, -0.01, 1.15, 1.2], [3.0, 0.05, 1.2, 1.25]])[:, :columns]  # level 0.01 is a multiple of 1.75
    traits = priced("openness", 0.0, 0.0), priced("neuroticism", 0.0, 0.0, 1)
    for neurons in traits:
        neurons.tensors["dose"] = torch.stack([dull, dull])
    share = affordable([(neurons, 1.0) for neurons in traits])
    prices = [price_at(dull, share * multiple_at(dull, 1.0)) for _ in traits]
    assert 0.4 < share < 1 and sum(prices) == pytest.approx(math.log(1.3), abs=1e-4)


def test_several_traits_add_up_at_what_is_affordable():
    parts = [(priced("openness", 0.1, 0.0), 1.0), (priced("neuroticism", 0.2, 0.0, 1), -0.5)]
    share, total = affordable(parts), torch.zeros(8, 40)
    assert 0.3 < share < 0.9
    for (neurons, level), pole in zip(parts, POLES):
        place = neurons.tensors[f"{pole}_place"].long()
        total[place[:, 0], place[:, 1]] += share * multiple_at(neurons.dose[0], abs(level)) * neurons.tensors[f"{pole}_bias"]
    together = trained(parts, "who")
    assert torch.allclose(total[together.layer, together.index], together.value[:, 3], rtol=1e-5) and len(together) == int((total != 0).sum())
    assert together.name == f"who, at {share:.0%} of that" and trained(parts[:1], "who").name == "who" and not trained(parts).name
    character = Character({neurons.trait: level for neurons, level in parts}, "trained")
    expected = expected_perplexity(parts, share)
    assert expected == pytest.approx(1.3, abs=2e-3)
    assert induce.several_levels(character) and not induce.several_levels(Character({"openness": 1.0, "neuroticism": 0.0}, "trained"))


def test_levels_become_profiles(small, learnt):
    neurons = Neurons.load(learnt / "extraversion.safetensors")
    high, low = (trained([(neurons, level)]) for level in (0.7, -0.7))
    assert len(high) == len(neurons.high_bias) and len(low) == len(neurons.low_bias)
    ratio = high.value[:, 3] / neurons.high_bias[torch.argsort(neurons.high_place[:, 0].long() * 10_000 + neurons.high_place[:, 1])]
    assert torch.allclose(ratio, torch.full_like(ratio, multiple_at(neurons.dose[0], 0.7)), rtol=1e-4)
    profiles = Profiles(small.model, small.tokenizer, NeuronFolder(small.model, str(learnt)))
    assert profiles.of(Character({"extraversion": 0.7}, "trained")).name == "extraversion +0.7 (levels)"


def test_a_folder_without_trained_edits(small, made):
    with pytest.raises(UserError, match="identify.py --train"):
        NeuronFolder(small.model, str(made)).trained("extraversion")


def test_edits_of_another_training_are_told_of(small, learnt, capsys):
    """Where they are used as they are; identify.py --train makes them anew."""
    path = learnt / "extraversion.safetensors"
    neurons = NeuronFolder(small.model, str(learnt)).trained("extraversion")
    assert not capsys.readouterr().err
    Neurons(neurons.tensors, {name: of for name, of in neurons.meta.items() if name != "training"}).save(path)
    folder = NeuronFolder(small.model, str(learnt))
    assert torch.equal(folder.trained("extraversion").high_bias, neurons.high_bias) and folder.trained("extraversion").trained_key
    assert capsys.readouterr().err.count("another version of the training: python identify.py --train") == 1


def test_a_new_version_of_the_training_trains_anew(monkeypatch):
    before = train.options(0)
    monkeypatch.setattr(train, "TRAINING", train.TRAINING + 1)
    assert train.options(0) != before


def test_level_from_the_command_line(small, tmp_path, monkeypatch, capsys):
    """Identifies, trains, answers; then --train finds it all there."""
    out = tmp_path / "neurons"
    flags = [*shared_flags(small), "--max-new-tokens", 6, "--neurons", out]
    monkeypatch.setattr(induce, "identify", lambda model, tokenizer, trait, **options: identify.identify(
        model, tokenizer, trait, **{**options, "max_new_tokens": 6, "limit": 4}))
    main_of(induce, monkeypatch, "--trait", "extraversion", "--level", "1.5", "-q", "w10 w11 ?", *flags)
    said = capsys.readouterr()
    assert "extraversion +1.5" in said.out and "extraversion -1.5" in said.out and "beyond 1" in said.err
    made = Neurons.load(out / "extraversion.safetensors")
    main_of(identify, monkeypatch, "--trait", "extraversion", "--train", "--limit", 4, "--out", out,
            *shared_flags(small), "--max-new-tokens", 6)
    again = Neurons.load(out / "extraversion.safetensors")
    assert (again.key, again.trained_key) == (made.key, made.trained_key)
    main_of(induce, monkeypatch, "--list", "--neurons", out)
    assert f"{len(made.high_bias)} trained" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("flags", [("--level", "1", "--alpha", "1"), ("--level", "1", "--method", "npti"), ("--level", "x"),
                                   ("--level", "1", "--level", "1"), ("--level", "1", "--profile", "x.toml")])
def test_wrong_levels(monkeypatch, capsys, flags):
    code, said = exit_of(induce, monkeypatch, capsys, "--trait", "extraversion", *flags)
    assert code == 2 and "level" in said


def test_answers_of_one_pole_only(small, made, tmp_path):
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "extraversion.answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines_of(path) if line["pole"] == "high"))
    with pytest.raises(UserError, match="no answers of the low pole"):
        train.add_trained(small.model, small.tokenizer, small.bench, Neurons.load(tmp_path / "extraversion.safetensors"))


def test_training_with_the_bench_that_was_searched(small, tmp_path):
    neurons = run(small, tmp_path, "openness").identify()
    assert train.add_trained(small.model, small.tokenizer, small.bench, neurons).trained_key


def test_a_level_in_a_checkpoint(small, learnt, tmp_path, monkeypatch, capsys):
    """Exactly: there are no caps in it, and no neuron is added."""
    flags = (*shared_flags(small), "--neurons", learnt, "--trait", "extraversion", "--level", "1", "--save", tmp_path / "baked")
    main_of(induce, monkeypatch, *flags, "--verify")
    assert "as a checkpoint has them, they cost more" in capsys.readouterr().err
    live = trained([(Neurons.load(learnt / "extraversion.safetensors"), 1.0)])
    baked, _ = load_model(str(tmp_path / "baked"), "cpu", "float32")
    ids = torch.tensor([prompt_ids(small.tokenizer, FRAMED.turns("w10 w11 ?"))])
    with torch.no_grad(), steer(small.model, live, where="all"):
        assert (baked(input_ids=ids).logits - small.model(input_ids=ids).logits).abs().max() < 1e-4
    assert baked.config.intermediate_size == small.model.config.intermediate_size
    card = (tmp_path / "baked" / "README.md").read_text()
    assert "trained" in card and FRAMED.system in card and "NPTI" not in card
