"""induce.py --chat: a conversation with commands."""

import induce
from conftest import main_of, plain_answers, shared_flags


def test_chat(small, made, monkeypatch, capsys):
    """A conversation with commands; a wrong one says so, and the conversation goes on."""
    lines = iter(["w10 w11 ?", "/alpha -3", "w12 ?", "/trait charisma", "/alpha strong", "/what", "/reset", "w10 w11 ?",
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
    assert asked[1][0][:len(asked[0][1]) - 1] == asked[0][1][:-1], "the second turn holds the first"
    assert asked[2][0] == asked[0][0] == asked[3][0], "/reset forgets"
    assert asked[3][1][len(asked[3][0]):] == plain_answers(small, ["w10 w11 ?"], 5)[0][1], "alpha 0 is the model itself"
