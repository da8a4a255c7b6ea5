"""induce.py --chat: a conversation with commands."""

from types import SimpleNamespace

import pytest

import induce
from conftest import FRAMED, main_of, run, shared_flags, tiny
from personality import UserError
from personality.chat import Chat, converse
from personality.frame import conversation
from personality.methods import Character, Profiles
from personality.model import TEST_PENALTY, answers, prompt_ids
from personality.neurons import NeuronFolder
from personality.train import add_trained


def test_chat(small, made, monkeypatch, capsys):
    """A conversation with commands; a wrong one says so, and the conversation goes on."""
    lines = iter(["w10 w11 ?", "/alpha -3", "/alpha 4 9", "/trait extraversion 4 9", "w12 ?", "/trait charisma", "/alpha strong",
                  "/what", "/reset", "w10 w11 ?",
                  "/alpha 0", "/reset", "w10 w11 ?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    asked, before = [], small.model.__class__.generate

    def spy(model, *args, **kwargs):
        output = before(model, *args, **kwargs)
        asked.append((kwargs["input_ids"][0].tolist(), output[0].tolist()))
        return output

    monkeypatch.setattr(small.model.__class__, "generate", spy)
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "3",
            "--chat", "--max-new-tokens", "5", "--min-neurons", "30")
    text = capsys.readouterr().out
    assert len(asked) == 4 and next(lines, None) is None
    assert all(word in text for word in ("extraversion -3", "charisma", "openness", "strong", "/reset"))
    assert "extraversion +4" not in text and "extraversion +9" not in text, "two strengths are none"
    assert asked[1][0][:len(asked[0][1]) - 1] == asked[0][1][:-1], "the second turn holds the first"
    turns = conversation("w10 w11 ?", FRAMED.system)  # in the frame's system prompt, and each line as it was typed
    alone = answers(small.model, small.tokenizer, [turns], 5, repetition_penalty=TEST_PENALTY)[0][1]
    assert asked[2][0] == asked[0][0] == asked[3][0], "/reset forgets"
    assert asked[3][1][len(asked[3][0]):] == alone, "alpha 0 is the model itself"


def test_what_is_refused_changes_nothing(small, made, monkeypatch, capsys):
    """Nor which trait /alpha is about: the folder has no openness, and nothing makes it."""
    lines = iter(["/trait openness 3", "/alpha 7", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    profiles = Profiles(small.model, small.tokenizer, NeuronFolder(small.model, str(made)))
    args = induce.parser().parse_args(["--where", "generated"])
    converse(small.model, small.tokenizer, profiles, Character({"extraversion": 2.0}), args)
    first, refusal, second = capsys.readouterr().out.splitlines()
    assert first.startswith("extraversion +2 ") and "no such neuron file" in refusal and second == "extraversion +7"


def test_a_chat_by_levels_begins_no_training_that_it_could_not_end(small, tmp_path, monkeypatch, capsys):
    """What the model is steered by would be in the teacher: so nothing is identified for it, either."""
    add_trained(small.model, small.tokenizer, small.bench, run(small, tmp_path).identify())
    lines = iter(["/trait openness", "/alpha -1", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    capsys.readouterr()
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", tmp_path, "--trait", "extraversion", "--level", "1", "--chat")
    first, refusal, second = capsys.readouterr().out.splitlines()
    assert f"no such neuron file; python identify.py --out {tmp_path} makes it" in refusal
    assert second.startswith("extraversion -1") and not list(tmp_path.glob("*openness*"))


def test_a_long_conversation_goes_on(small, capsys):
    """Its older half is forgotten where the model's 512 positions are full, and nothing is where a question alone is too long."""
    chat = Chat(small.model, small.tokenizer, SimpleNamespace(max_new_tokens=6, temperature=None, top_p=None, frame="person"))
    lines, forgotten = [f"w{k} " + "w1 " * 30 + "?" for k in range(40)], 0
    for line in lines:
        before = chat.turns
        chat.ask(line)
        assert chat.turns[0] == before[0] and chat.turns[-2] == {"role": "user", "content": line}
        assert chat.turns[-1] == {"role": "assistant", "content": asked_afresh(small.model, small.tokenizer, chat.turns[:-1])}
        kept, had = chat.turns[1:-2], before[1:]
        if len(kept) < len(had):
            forgotten += 1
            assert kept == had[-len(kept):] and len(kept) == 2 * (len(had) // 4)
            assert f"the first {(len(had) - len(kept)) // 2} of {len(had) // 2} answers are forgotten" in capsys.readouterr().out
    assert 2 < forgotten < 20
    before = chat.turns
    with pytest.raises(UserError, match="beyond this model's context of 512: ask shorter"):
        chat.ask("w1 " * 600)
    assert chat.turns == before and "forgotten" not in capsys.readouterr().out
    chat.ask("w3 ?")
    assert chat.turns[:-2] == before


def asked_afresh(model, tokenizer, turns):
    """What the model says to a conversation of which it has read nothing yet."""
    return answers(model, tokenizer, [turns], 6, repetition_penalty=TEST_PENALTY)[0][0]


@pytest.mark.parametrize("family, options", (("llama", {}), ("mistral", {"sliding_window": 4}),
                                             ("gemma2", {"sliding_window": 64})))
def test_what_is_read_already_does_not_show(small, family, options):
    """Nor where the cache can't be cut back, as with a sliding window."""
    model, tokenizer = tiny(family, **options), small.tokenizer
    chat = Chat(model, tokenizer, SimpleNamespace(max_new_tokens=6, temperature=None, top_p=None, frame="person"))
    for line in ("w10 w11 w12 ?", "w13 ?", "w14 w15 ?", "w16 ?"):
        if line == "w16 ?":
            del chat.turns[2:]  # the prompt does not begin as before: so it is where a template writes earlier answers otherwise
        before = list(chat.turns)
        chat.ask(line)
        assert chat.turns[:-1] == [*before, {"role": "user", "content": line}]
        assert chat.turns[-1] == {"role": "assistant", "content": asked_afresh(model, tokenizer, chat.turns[:-1])}


def test_what_was_said_is_not_computed_again(small):
    chat, read = Chat(small.model, small.tokenizer, SimpleNamespace(max_new_tokens=6, temperature=None, top_p=None, frame="person")), []
    handle = small.model.model.register_forward_pre_hook(lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]),
                                                         with_kwargs=True)
    chat.ask("w10 w11 w12 ?")
    known = len(chat.cached)
    chat.ask("w13 ?")
    handle.remove()
    prompt = len(prompt_ids(small.tokenizer, chat.turns[:-1]))
    assert read[0] + 5 == known and max(read[1:]) <= prompt - read[0], "the first question is read again"


def test_control_c_stops_one_answer_only(small):
    chat = Chat(small.model, small.tokenizer, SimpleNamespace(max_new_tokens=6, temperature=None, top_p=None, frame="person"))
    chat.ask("w10 w11 ?")
    before, steps = list(chat.turns), []

    def interrupt(*_):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt

    handle = small.model.model.register_forward_pre_hook(interrupt)
    chat.ask("w12 ?")
    handle.remove()
    assert len(steps) == 3 and chat.turns == before, "what was not answered was not said"
    chat.ask("w13 ?")
    assert chat.turns[-1]["content"] == asked_afresh(small.model, small.tokenizer, chat.turns[:-1])
