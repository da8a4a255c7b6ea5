"""How questions are put, and who declines to be anyone."""

import json
from dataclasses import replace

import pytest
import torch

import identify
from conftest import FRAMED, Server, contents, exit_of, lines_of, run, shared_flags
from personality import frame
from personality.endpoint import Endpoint
from personality.frame import Frame, declines
from personality.neurons import NeuronFolder, Neurons, show_neurons
from personality.observe import Statistics
from personality.store import TEXTS, digest, read_toml
from personality.terminal import FRAMES, UserError


def test_turns():
    asked = Frame("x", "You are somebody.", "Be brief.").turns("Who?", "You like tea.")
    assert asked == [{"role": "system", "content": "You are somebody. You like tea."}, {"role": "user", "content": "Who? Be brief."}]
    assert Frame.named("none").turns("Who?") == [{"role": "user", "content": "Who?"}]
    assert Frame.named("You are Ada.").turns("Who?", "Shy.")[0]["content"] == "You are Ada. Shy."
    assert set(FRAMES) == {"none", *read_toml(TEXTS / "frames.toml")}
    assert Frame.named("none").made_with() == {}, "so that the files of before are still its own"
    assert len({Frame.named(name).made_with()["framing"] for name in ("person", "You are Ada.")}) == 2
    assert [str(Frame.named(name)) for name in ("person", "none", "You\x1b[2J")] == ["person", "none", "'You\\x1b[2J'"]
    before = Frame("x", "", "Be brief.").turns("And?", before=[("Who?", "Me.")])
    assert [turn["content"] for turn in before] == ["Who? Be brief.", "Me.", "And? Be brief."], "each question as it was asked"
    system, user = FRAMED.turns("Who?", "Shy.")
    assert system["content"].endswith(" Shy.") and user["content"].startswith("Who? ")


@pytest.mark.parametrize("answer", [
    "As an AI language model, I don't have personal preferences.", "I'm just an AI, so I can't say.", "As a virtual assistant, I like it.",
    "I am a computer program.", "I do not have feelings or emotions like humans do.", "I don't have the ability to feel joy.",
    "I’m sorry, but I can’t assist with that request.", "As a digital assistant I don’t experience human emotions.",
    "I don't have emotions like a human.", "I am a large language model.", "Being an artificial intelligence, I see it otherwise.",
    "I don't have personal opinions about politics.", "I do not have personal feelings towards it.", "As a virtual chatbot, I like it.",
    "I cannot as an AI language model express opinions.", "I'm just a virtual AI.", "As a digital tool, I help.",
    "I don't experience emotions like other people."])
def test_declines(answer):
    assert declines(answer)


@pytest.mark.parametrize("answer", [
    "I don't have many friends, and I like it that way.", "I'm sorry, but I can't come to your party.", "I feel nothing much.",
    "As an introvert, I stay at home.", "I don't have strong feelings about it.", "I'm an artist. " * 20 + "As an AI language model, no.",
    "As an aide to the mayor, I meet people.", "Being an airline pilot, I can't stand heights.",
    "I'm a human being with feelings, not just a computer program, so of course I was nervous.", "I'm not just a computer program!",
    "I'm a language teacher, and I love it.", "As a digital artist I see beauty everywhere.", "Not being a chatbot, I get tired.",
    "I don't feel emotions like fear very often; I stay calm.", "I don't have any real feelings about it. I just move the boxes."])
def test_plays(answer):
    assert not declines(answer)


def some_decline(monkeypatch, plays):
    """Answers that begin otherwise than `plays` decline."""
    for place in (identify, frame):
        monkeypatch.setattr(place, "declines", lambda answer: not plays(answer))


def test_answers_that_decline_are_asked_for_anew_and_not_counted(small, tmp_path, monkeypatch):
    first = {line["question"]: line["answer"] for line in map(json.loads, contents_of_a_run(small, tmp_path / "all").splitlines())}
    bad = set(list(first.values())[::3])
    some_decline(monkeypatch, lambda answer: answer not in bad)
    neurons = run(small, tmp_path / "some").identify()
    lines = lines_of(tmp_path / "some" / "extraversion.answers.jsonl")
    played = [line for line in lines if line["answer"] not in bad]
    assert any(line["declined"] for line in lines) and any(line["declined"] and line["answer"] not in bad for line in lines)
    assert all(line["declined"] == identify.Run.AGAIN + 1 for line in lines if line["answer"] in bad)
    assert sum(neurons.meta["declined"]) == sum(line["declined"] for line in lines)
    assert sum(neurons.meta["asked"]) == sum(neurons.meta["declined"]) + len(played)
    expected = Statistics.of(small.model, 2)
    identify.read_batches(small.model, small.tokenizer, played, FRAMED, expected, "generated", 4)
    assert neurons.meta["tokens"] == expected.tokens.tolist()
    assert torch.equal(neurons.prob, expected.summary()["prob"])


def test_who_declines_is_asked_under_another_persona(small, tmp_path):
    """Another one each time, by the seed; where there is one only, under that."""
    some = replace(small.bench, personas={"extraversion": {"high": [f"w{k}" for k in range(10, 40)], "low": ["w9"] * 4}})
    asked = run(small, tmp_path)
    asked.bench = some
    items = [{"question": f"w{k} ?", "pole": "high", "persona": "w10"} for k in range(30)]
    first, second = ([asked.another_persona(item, attempt)["persona"] for item in items] for attempt in (0, 1))
    assert "w10" not in first + second and sum(a != b for a, b in zip(first, second)) > 20
    assert set(first + second) <= set(some.personas_for("search", "extraversion", "high")), "the judge's are for the judge"
    assert first == [asked.another_persona(item, 0)["persona"] for item in items]
    assert asked.another_persona({"question": "w1 ?", "pole": "low", "persona": "w9"}, 0)["persona"] == "w9"


def contents_of_a_run(small, out) -> str:
    run(small, out).identify()
    return contents(out)["extraversion.answers.jsonl"].decode()


def test_most_decline(small, tmp_path, monkeypatch, capsys):
    some_decline(monkeypatch, lambda answer: digest(answer)[0] in "01234")
    show_neurons(run(small, tmp_path).identify())
    said = capsys.readouterr().err
    assert "declined to be anyone" in said and "won't carry a persona" in said


def test_a_file_of_another_frame_loads_with_a_line(small, made, tmp_path, capsys):
    bare = run(small, tmp_path, frame="none").identify()
    assert "frame" not in bare.meta and Neurons.load(made / "extraversion.safetensors").frame == FRAMED
    capsys.readouterr()
    NeuronFolder(small.model, str(tmp_path), frame=FRAMED)["extraversion"]
    said = capsys.readouterr().err
    assert "frame none" in said and "frame person" in said and said.count("\n") == 1
    NeuronFolder(small.model, str(made), frame=FRAMED)["extraversion"]
    assert not capsys.readouterr().err


def test_a_server_is_asked_in_the_frame(small, tmp_path):
    with Server(lambda number, body: "w10 w11") as server:
        run(small, tmp_path, limit=1, frame="w20 w21")
        args = identify.parser().parse_args([])
        vars(args).update(out=str(tmp_path), max_new_tokens=6, limit=2, frame="w20 w21")
        neurons = identify.Run(small.model, small.tokenizer, small.bench, "extraversion", args, endpoint=Endpoint(server.url)).identify()
        asked = [small.tokenizer.decode(body["prompt"]) for body in server.seen]
    assert neurons.frame.system == "w20 w21" and all("w20 w21" in text for text in asked)


@pytest.mark.parametrize("text, meant", (("Person", "person"), ("persona", "person"), ("NONE", "none"), ("prson", "person")))
def test_a_mistyped_frame_is_not_taken_for_a_text(text, meant):
    with pytest.raises(UserError, match=f"--frame: .*got {text}: is {meant} meant"):
        identify.parser().parse_args(["--frame", text])


@pytest.mark.parametrize("text", ("person", "none", "pirates", "a person", "You are a person.", "海賊として答えてください"))
def test_names_of_frames_and_texts_are_taken_as_they_are(text):
    assert identify.parser().parse_args(["--frame", text]).frame == text


def test_an_empty_frame_is_an_error(small, monkeypatch, capsys):
    code, said = exit_of(identify, monkeypatch, capsys, *shared_flags(small), "--frame", "")
    assert code == 2 and "--frame" in said
