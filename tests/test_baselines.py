"""What others would train: residual constants and adapters, each beside the trained edits in one evaluation."""

import json
import shutil
import threading

import pytest
import torch

import evaluate
from conftest import FRAMED, exit_of, little_room, main_of, said_in_time, shared_flags
from personality import train
from personality.baselines import Baselines, import_peft, constant_profile, fitted, shifted, surprise
from personality.mlp import find_mlps
from personality.model import BatchSize, prompt_ids, with_ids
from personality.neurons import NeuronFolder
from personality.questions import read_answers
from personality.steer import steer
from personality.terminal import UserError


@pytest.fixture
def folder(small, made, tmp_path):
    shutil.copytree(made, tmp_path / "neurons")
    return tmp_path / "neurons"


@pytest.fixture
def baselines(small, folder):
    return Baselines(small.model, small.tokenizer, small.bench, NeuronFolder(small.model, str(folder), frame=FRAMED))


def logits_of(small):
    ids = torch.tensor([prompt_ids(small.tokenizer, FRAMED.turns("w10 w11 ?"))])
    with torch.no_grad():
        return small.model(input_ids=ids).logits


def test_the_student_is_the_steered_model(small):
    mlps = find_mlps(small.model)
    constants = torch.randn((len(mlps), mlps[0].hidden), generator=torch.Generator().manual_seed(0)) * 0.3
    plain = logits_of(small)
    with shifted(small.model, constants):
        student = logits_of(small)
    with steer(small.model, constant_profile(constants), where="all"):
        steered = logits_of(small)
    assert (student - steered).abs().max() < 1e-4 < (student - plain).abs().max()
    assert torch.equal(logits_of(small), plain) and all(weight.requires_grad for weight in small.model.parameters())


def test_residual_constants_come_nearer_to_the_teacher(small, baselines, monkeypatch):
    """And are kept: the second time nothing is trained."""
    monkeypatch.setattr("personality.baselines.PASSES", 12)
    pairs, plain = [], fitted

    def watched(model, of, sign, *more):
        constants = plain(model, of, sign, *more)

        def apart():
            return sum(float(train.divergence(part, sign, train.student_says(model, part)).sum()) for part in of)

        with torch.no_grad():
            before = apart()
            with shifted(model, constants):
                pairs.append((apart(), before))
        return constants

    monkeypatch.setattr("personality.baselines.fitted", watched)
    profile = baselines.residual("extraversion", 1.0, "E+")
    assert len(pairs) == 2 and all(after < before for after, before in pairs)
    assert set(profile.residual) == {0, 1} and len(profile) == 0 and profile.name == "E+"
    low, half = (baselines.residual("extraversion", level) for level in (-1.0, 0.5))
    assert not torch.allclose(low.residual[0], profile.residual[0])
    ratio = half.residual[1] / profile.residual[1]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-4) and 0 < ratio[0] <= 1
    again = Baselines(small.model, small.tokenizer, small.bench, baselines.neurons)
    assert torch.equal(again.residual("extraversion", 1.0).residual[0], profile.residual[0]) and len(pairs) == 2
    other = Baselines(small.model, small.tokenizer, small.bench, baselines.neurons, seed=1)
    other.residual("extraversion", 1.0)
    assert len(pairs) == 4, "of another seed they are others"


def test_who_waited_finds_the_constants(small, baselines, folder, monkeypatch, capsys):
    """Two runs want them at once: the second once trained its own, and went on with them."""
    other, made, calls = Baselines(small.model, small.tokenizer, small.bench, baselines.neurons), {}, []
    wants = threading.Thread(target=lambda: made.update(late=other.residual("extraversion", 1.0)))

    def train_constants(neurons):
        calls.append(wants.start())
        assert said_in_time(capsys, "another run trains it, this one waits")
        return Baselines.train_constants(baselines, neurons)

    monkeypatch.setattr(baselines, "train_constants", train_constants)
    monkeypatch.setattr(other, "train_constants", lambda neurons: pytest.fail("it is there"))
    first = baselines.residual("extraversion", 1.0)
    wants.join()
    assert torch.equal(first.residual[1], made["late"].residual[1]) and len(calls) == 1


def test_damaged_constants_are_one_line(baselines, folder):
    baselines.residual("extraversion", 1.0)
    path, = (folder / "baselines").iterdir()
    path.write_bytes(path.read_bytes()[:40])
    baselines.read.clear()
    with pytest.raises(UserError, match="made anew"):
        baselines.residual("extraversion", 1.0)


def test_short_of_memory_is_one_line(baselines, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("personality.baselines.levels", no_room)
    monkeypatch.setattr("personality.baselines.trained_on", lambda *_: None)
    with pytest.raises(UserError, match="out of memory: training keeps"):
        baselines.train_constants(baselines.neurons["extraversion"])


def test_short_of_memory_training_takes_fewer_rows_at_once(small, baselines, capsys):
    """Constants and adapters are of the same slopes."""
    items = train.answers_to_learn(small.tokenizer, baselines.neurons["extraversion"], "high")[0]
    of = train.make_lesson(small.model, small.tokenizer, small.bench, "extraversion", FRAMED, items, 0, BatchSize(len(items)))
    weight = small.model.model.layers[0].mlp.up_proj.weight
    adam, found = torch.optim.Adam([weight]), []

    def slopes():
        none = torch.zeros((len(find_mlps(small.model)), find_mlps(small.model)[0].hidden))
        constants = fitted(small.model, [of], 1, none, lambda: None)
        baselines.set_slopes(small.model, adam, FRAMED, items, BatchSize(len(items)))
        found.append((constants, weight.grad))

    try:
        slopes()
        with little_room(small.model, 2):
            slopes()
    finally:
        small.model.zero_grad()
    assert len(items) == 3 and capsys.readouterr().err.split("\n").count("out of memory: batches of 1") == 2
    for whole, parts in zip(*found):
        assert whole.abs().max() > 1e-4 and torch.allclose(whole, parts, rtol=1e-3, atol=1e-5)


def test_adapters_learn_the_answers_and_come_off(small, baselines, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr("personality.baselines.PASSES", 30)
    items = read_answers(baselines.neurons.folder + "/extraversion.answers.jsonl", "extraversion")[0]
    items = with_ids(small.tokenizer, [item for item in items if item["pole"] == "high"][:train.ANSWERS])
    names, plain = [name for name, _ in small.model.named_parameters()], logits_of(small)
    with torch.no_grad():
        before = float(surprise(small.model, small.tokenizer, FRAMED, items))
        with baselines.tuned("extraversion", "high"):
            tuned, learnt = logits_of(small), float(surprise(small.model, small.tokenizer, FRAMED, items))
        with baselines.tuned("extraversion", "high"):  # read from its folder, now
            assert torch.equal(logits_of(small), tuned)
    assert learnt < before - 0.05 and not torch.equal(tuned, plain)
    assert torch.equal(logits_of(small), plain) and [name for name, _ in small.model.named_parameters()] == names
    assert all(weight.requires_grad for weight in small.model.parameters())


def test_damaged_adapters_are_one_line(small, baselines):
    pytest.importorskip("peft")
    names = [name for name, _ in small.model.named_parameters()]
    with baselines.tuned("extraversion", "low"):
        pass
    folder = next((baselines.path("extraversion", "lora", "x").parent).glob("*.low.lora"))
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="made anew"), baselines.tuned("extraversion", "low"):
        pass
    assert [name for name, _ in small.model.named_parameters()] == names


def test_surprise_is_the_answers_negative_log_likelihood(small, made):
    items = [dict(item) for item in read_answers(made / "extraversion.answers.jsonl", "extraversion")[0]][:3]
    items, total = with_ids(small.tokenizer, items), 0
    for item in items:
        prompt = prompt_ids(small.tokenizer, FRAMED.turns(item["question"]))
        with torch.no_grad():
            logits = small.model(input_ids=torch.tensor([prompt + item["ids"]])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        total -= float(logits.gather(-1, torch.tensor(item["ids"])[:, None]).sum())
    with torch.no_grad():
        ours = float(surprise(small.model, small.tokenizer, FRAMED, items))
    assert ours == pytest.approx(total / sum(len(item["ids"]) for item in items), rel=1e-4)


def test_beside_the_trained_edits_in_one_evaluation(small, folder, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    flags = (*shared_flags(small), "--max-new-tokens", 6, "--neurons", folder, "--trait", "extraversion", "--limit", 2,
             "--out", tmp_path / "results", "--capability", "--method", "unedited", "trained", "residual", "lora")
    main_of(evaluate, monkeypatch, *flags)
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    sides = {(row["method"], row["pole"], row["alpha"]) for row in summary}
    assert sides >= {("residual", "high", 1.0), ("residual", "low", 1.0), ("lora", "high", None), ("lora", "low", None)}
    details = json.loads((tmp_path / "results" / "details.json").read_text())
    assert {row["method"] for row in details["capability"] if "added" in row} == {"unedited", "trained", "residual", "lora"}
    lines = (tmp_path / "results" / "answers.jsonl").read_text()
    main_of(evaluate, monkeypatch, *flags)
    assert (tmp_path / "results" / "answers.jsonl").read_text() == lines, "nothing is answered twice"


def test_lora_without_peft_is_one_line(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    with pytest.raises(UserError, match=r"\[finetune\]"):
        import_peft()
    code, said = exit_of(evaluate, monkeypatch, capsys, *shared_flags(small), "--method", "lora", "--out", tmp_path)
    assert code == 2 and "finetune" in said
