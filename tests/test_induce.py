"""induce.py: side by side, files of questions."""

import contextlib
import functools
import io
import json
import os
import sys

import pytest
from transformers import LlamaModel

import induce
from conftest import lines_of, little_room, main_of, plain_answers, shared_flags, tiny
from personality.neurons import Neurons
from personality.store import lock_of, only_run
from personality.terminal import UserError
from personality.train import add_trained


def killed_in_batch(monkeypatch, number):
    """A file of questions is interrupted there, once. A list: how many questions each batch has, from now on, that one too."""
    write, calls = induce.answered, []

    def stop(*given):
        calls.append(len(given[4]))
        if len(calls) == number:
            raise KeyboardInterrupt
        return write(*given)

    monkeypatch.setattr(induce, "answered", stop)
    return calls


def test_induce_side_by_side(small, made, monkeypatch, capsys):
    """The model's own answer, the personality's and its opposite's."""
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "8",
            "-q", "w10 w11 ?", "--max-new-tokens", "4", "--min-neurons", "30")
    text = capsys.readouterr().out
    assert "w10 w11 ?" in text and "extraversion +8" in text and "extraversion -8" in text
    assert all(word in text for word in plain_answers(small, ["w10 w11 ?"], 4)[0][0].split())


def test_induce_file_of_questions(small, made, monkeypatch, tmp_path):
    (tmp_path / "q.txt").write_text('w10 w11 ?\n\n{"question": "w12 ?"}\nw13 w14 w15 ?\n')
    flags = (*shared_flags(small), "--neurons", made, "--trait", "extraversion", "--questions", tmp_path / "q.txt",
             "--max-new-tokens", "8", "--batch-size", "2", "--min-neurons", "30")
    for alpha in ("8", "-8", "0"):
        main_of(induce, monkeypatch, *flags, "--alpha", alpha, "--out", tmp_path / f"{alpha}.jsonl")
    high, low, none = (lines_of(tmp_path / f"{alpha}.jsonl") for alpha in ("8", "-8", "0"))
    assert [line["question"] for line in high] == ["w10 w11 ?", "w12 ?", "w13 w14 w15 ?"]
    assert high[0]["personality"] == {"extraversion": 8.0} and low[0]["personality"] == {"extraversion": -8.0}
    plain = [ids for _, ids in plain_answers(small, [line["question"] for line in high], 8)]
    assert [line["ids"] for line in none] == plain
    assert [line["ids"] for line in high] != plain and [line["ids"] for line in low] != [line["ids"] for line in high]
    assert all(line["ids"][0] == ids[0] for line, ids in zip(high, plain)), "the prompt's pass is not edited"


def test_other_trained_edits_begin_the_file_anew(small, made, monkeypatch, tmp_path, capsys):
    """Answers of the edits of before don't stand beside those of the new ones."""
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    train = functools.partial(add_trained, small.model, small.tokenizer, small.bench)
    path = train(Neurons.load(tmp_path / "extraversion.safetensors")).path
    (tmp_path / "q.txt").write_text("w10 w20 ?\nw11 w21 ?\nw12 ?\n")
    flags = (*shared_flags(small), "--neurons", tmp_path, "--trait", "extraversion", "--level", "1", "--questions",
             tmp_path / "q.txt", "--max-new-tokens", "8", "--batch-size", "1", "--out", tmp_path / "out" / "a.jsonl")
    calls = killed_in_batch(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        main_of(induce, monkeypatch, *flags)
    train(Neurons.load(path), seed=1)
    main_of(induce, monkeypatch, *flags)
    assert len(calls) == 2 + 3 and "going on after" not in capsys.readouterr().err


@pytest.mark.parametrize("sampled", ((), ("--temperature", "1")))
def test_a_file_of_questions_goes_on_where_it_was(small, made, monkeypatch, tmp_path, sampled, capsys):
    (tmp_path / "q.txt").write_text("".join(f"w1{k} w2{k} ?\n" for k in range(7)))
    flags = (*shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "2",
             "--questions", tmp_path / "q.txt", "--max-new-tokens", "8", "--batch-size", "2", *sampled)
    main_of(induce, monkeypatch, *flags, "--out", tmp_path / "whole.jsonl")
    asked, out, forward = [], tmp_path / "new" / "out.jsonl", LlamaModel.forward

    def stop(self, input_ids=None, **options):
        if input_ids.shape[1] > 1:  # the prompts of a batch
            asked.append(len(input_ids))
            if len(asked) == 3:
                raise KeyboardInterrupt
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaModel, "forward", stop)
    with pytest.raises(KeyboardInterrupt, match="what was finished is kept"):
        main_of(induce, monkeypatch, *flags, "--out", out)
    part, = out.parent.iterdir()
    assert len(lines_of(part)) == 4
    part.write_bytes(part.read_bytes() + b'{"question": "cut o')
    main_of(induce, monkeypatch, *flags, "--out", out)
    assert asked[3:] == [2, 1] and "going on after 4 of 7" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("sampled", ((), ("--temperature", "1")))
def test_short_of_memory_a_file_goes_on_where_it_was(small, made, monkeypatch, tmp_path, sampled, capsys):
    """Batches of two, where four were asked for."""
    (tmp_path / "q.txt").write_text("".join(f"w1{k} w2{k} ?\n" for k in range(7)))
    flags = (*shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "2", "--questions", tmp_path / "q.txt",
             "--max-new-tokens", "8", "--batch-size", "4", *sampled)
    with little_room(small.model, 2):
        main_of(induce, monkeypatch, *flags, "--out", tmp_path / "whole.jsonl")
        calls = killed_in_batch(monkeypatch, 5)
        with pytest.raises(KeyboardInterrupt):
            main_of(induce, monkeypatch, *flags, "--out", tmp_path / "out.jsonl")
        assert calls == [4, 2, 2, 2, 1]
        main_of(induce, monkeypatch, *flags, "--out", tmp_path / "out.jsonl")
    assert calls[5:] == [1] and "going on after 6 of 7" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("sampled", ((), ("--temperature", "1")))
def test_short_of_memory_batches_are_smaller(small, made, monkeypatch, tmp_path, sampled, capsys):
    (tmp_path / "q.txt").write_text("".join(f"w1{k} w2{k} ?\n" for k in range(7)))
    flags = (*shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "2",
             "--questions", tmp_path / "q.txt", "--max-new-tokens", "8", *sampled)
    main_of(induce, monkeypatch, *flags, "--batch-size", "2", "--out", tmp_path / "two.jsonl")
    assert "out of memory" not in capsys.readouterr().err
    with little_room(small.model, 2) as asked:
        main_of(induce, monkeypatch, *flags, "--batch-size", "4", "--out", tmp_path / "four.jsonl")
    assert asked[0] == 4 and max(asked[1:]) == 2 and "out of memory: batches of 2" in capsys.readouterr().err
    assert (tmp_path / "four.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_one_run_writes_to_a_file_at_a_time(small, made, monkeypatch, tmp_path):
    """Of other options, too: else the last one's answers were those that stayed."""
    out, load = tmp_path / "out.jsonl", induce.load_asked
    (tmp_path / "q.txt").write_text("w10 w11 ?\n")
    flags = (*shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "2", "--questions", tmp_path / "q.txt", "--out", out,
             "--max-new-tokens", "2", "--batch-size", "1")
    with only_run(lock_of(out)), pytest.raises(UserError, match="another run is writing it"):
        main_of(induce, monkeypatch, *flags)
    monkeypatch.setattr(induce, "load_asked", lambda *given, **more: (out.write_text("another's"), load(*given, **more))[1])
    with pytest.raises(UserError, match="there is something already"):
        main_of(induce, monkeypatch, *flags)
    assert out.read_text() == "another's"
    out.unlink()
    write = induce.answered
    monkeypatch.setattr(induce, "load_asked", load)
    monkeypatch.setattr(induce, "answered", lambda *given: (out.write_text("another's"), write(*given))[1])
    with pytest.raises(UserError, match="there is something already.*: the answers wait in .*part"):
        main_of(induce, monkeypatch, *flags)
    assert out.read_text() == "another's"
    out.unlink()
    monkeypatch.setattr(induce, "answered", lambda *_: pytest.fail("they are there"))
    main_of(induce, monkeypatch, *flags)
    assert len(lines_of(out)) == 1 and {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "q.txt"}


@pytest.mark.parametrize("more", (("--temperature", "2"), ("--top-p", "0.5"), ("--frame", "none"), ("--method", "dpn-le"), ("--seed", "1"),
                                  ("--max-new-tokens", "3"), ("--min-delta", "0.3"), ("--keep", "0.5"), ()))
def test_other_options_begin_a_file_anew(small, made, monkeypatch, tmp_path, capsys, more):
    """Else one file held answers of both. (): of another model."""
    (tmp_path / "q.txt").write_text("w10 w11 ?\nw12 ?\n")
    flags = (*shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "2", "--questions", tmp_path / "q.txt",
             "--out", tmp_path / "out.jsonl", "--max-new-tokens", "2", "--batch-size", "1")
    calls = killed_in_batch(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        main_of(induce, monkeypatch, *flags)
    if not more:
        monkeypatch.setattr(induce, "fingerprint", lambda model: "another")
    main_of(induce, monkeypatch, *flags, *more)
    assert "going on after" not in capsys.readouterr().err and len(calls) == 4


def test_each_batch_is_sampled_anew(small, made, monkeypatch, tmp_path):
    (tmp_path / "q.txt").write_text("w10 w11 ?\n" * 4)
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "1",
            "--temperature", "1", "--questions", tmp_path / "q.txt", "--out", tmp_path / "out.jsonl", "--max-new-tokens", "8", "--batch-size", "2")
    answers = [line["ids"] for line in lines_of(tmp_path / "out.jsonl")]
    assert answers[:2] != answers[2:]


def test_questions_through_a_pipe(small, made, monkeypatch, tmp_path, capsys):
    read, write = os.pipe()
    os.write(write, '{"question": "w10\u2028w11 ?"}\nw12 ?\n'.encode())
    os.close(write)
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "1",
            "--questions", f"/dev/fd/{read}", "--max-new-tokens", "2")
    os.close(read)
    assert [json.loads(line)["question"] for line in capsys.readouterr().out.split("\n") if line] == ["w10\u2028w11 ?", "w12 ?"]


@pytest.mark.parametrize("text, pattern", (
    ('w10 ?\n{"text": 1}\n', "line 2"), ('{"question": 5}\n', "line 1"), ("{broken\n", "line 1"), ("\n\n", "no question"),
    (b"\xff\xfe", "decode")))
def test_questions_that_cannot_be_read(tmp_path, text, pattern):
    (tmp_path / "q.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"q.txt.*{pattern}|{pattern}.*q.txt"):
        induce.read_questions(str(tmp_path / "q.txt"))


@pytest.mark.parametrize("where", ("generated", "all"))
def test_missing_neuron_file_is_made_first(small, monkeypatch, tmp_path, capsys, where):
    """Always as identify.py makes it, whatever is asked of the edit."""
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", tmp_path / "new", "--trait", "openness", "--alpha", "2",
            "-q", "w10 ?", "--max-new-tokens", "4", "--where", where)
    assert "identified first" in capsys.readouterr().err
    assert Neurons.load(tmp_path / "new" / "openness.safetensors").meta["where"] == "generated"
    assert Neurons.load(tmp_path / "new" / "openness.safetensors", tiny()).meta["trait"] == "openness"


def test_what_a_file_says_is_not_passed_over(small, made, monkeypatch, tmp_path, capsys):
    """A key that nobody knows, a method beside the file's own, layers that the model lacks; and a line's levels beyond 1 are told."""
    (tmp_path / "q.jsonl").write_text('{"question": "w10 ?", "profil": {"extraversion": 1}}\n')
    flags = (*shared_flags(small), "--neurons", made, "--max-new-tokens", "4")
    with pytest.raises(UserError, match="q.jsonl, line 1: expected question and, optionally, profile, got .'profil', 'question'"):
        main_of(induce, monkeypatch, *flags, "--questions", tmp_path / "q.jsonl")
    (tmp_path / "ada.toml").write_text('method = "npti"\nlayers = [1, 9]\n[traits]\nextraversion = 1\n')
    with pytest.raises(UserError, match="--method trained: .*ada.toml says npti"):
        main_of(induce, monkeypatch, *flags, "--profile", tmp_path / "ada.toml", "--method", "trained", "-q", "w10 ?")
    with pytest.raises(UserError, match="the model's are 0 to 1"):
        main_of(induce, monkeypatch, *flags, "--profile", tmp_path / "ada.toml", "-q", "w10 ?")
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    add_trained(small.model, small.tokenizer, small.bench, Neurons.load(tmp_path / "extraversion.safetensors"))
    own = '{"traits": {"extraversion": 40}, "method": "trained"}'
    (tmp_path / "q.jsonl").write_text(f'{{"question": "w10 ?", "profile": {own}}}\n')
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", tmp_path, "--max-new-tokens", "4", "--questions", tmp_path / "q.jsonl")
    assert "levels beyond 1" in capsys.readouterr().err


@pytest.mark.parametrize("flags, expected", (
    (("--rank", "4"), "--rank goes with --save DIR"), (("--verify",), "--verify goes with --save DIR"),
    (("--verify-server", "http://127.0.0.1:9"), "--verify-server goes with --save DIR"),
    (("--out", "a.jsonl"), "--out FILE goes with --questions FILE"),
    (("--save", "a", "--out", "b"), "--out FILE goes with --questions FILE"),
    (("--save", "a", "-q", "w10 ?"), "not allowed with argument"), (("--save", "a", "--list"), "not allowed with argument"),
    (("--save", "a", "--where", "generated"), "can't tell prompt from answer"),
    (("--save", "a", "--keep", "0.9"), "can't draw neurons"),
    *((("--save", "a", *flag), "--save writes no answers") for flag in (("--top-p", "0.5"), ("--temperature", "1"), ("--max-new-tokens", "9"))),
    (("--list",), "--list shows the folder of --neurons"),
    (("--save", "a", "--suppress", "cap"), "can't cap an activation"),
    (("--save", "a", "--rank", "4", "--method", "trained"), "trained edits raise none"),
    (("--save", "a", "--rank", "4", "--method", "dpn-le"), "dpn-le edits raise none"),
    *((flag, f"{flag[0]} goes with --serve") for flag in (("--characters", "c"), ("--host", "::1"), ("--port", "9"),
                                                         ("--api-key", "k"), ("--rows", "2"), ("--queue", "0"))),
    (("--served-model", "m"), "--served-model goes with --serve or --verify-server"),
    (("--method", "trained", "--suppress", "zero", "--keep", "0.9"), "--keep, --suppress: of the neurons that npti"),
    (("--method", "trained", "--min-delta", "0.2"), "--min-delta: of the neurons that npti"),
    (("--method", "dpn-le", "--min-neurons", "9"), "--min-neurons: of the neurons that npti")))
def test_flags_that_do_not_go_together(monkeypatch, tmp_path, flags, expected):
    """Said before anything is loaded or written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        main_of(induce, monkeypatch, "--trait", "openness", "--alpha", "1", *flags)
    assert not list(tmp_path.iterdir())


def test_a_method_that_was_asked_for_is_not_overruled(monkeypatch, tmp_path):
    """By a profile file that says another; one that says the same, or a command line that says none, is no quarrel."""
    (tmp_path / "who.toml").write_text('method = "dpn-le"\n[traits]\nextraversion = 0.5\n')
    flags = ("--profile", tmp_path / "who.toml", "--model", "nowhere.gguf")
    with pytest.raises(UserError, match="--method npti: .*who.toml says dpn-le"):
        main_of(induce, monkeypatch, *flags, "--method", "npti")
    for more in ((), ("--method", "dpn-le")):
        with pytest.raises(UserError, match="nowhere.gguf"):
            main_of(induce, monkeypatch, *flags, *more)


def test_a_rank_is_of_what_the_profile_file_says(monkeypatch, tmp_path):
    (tmp_path / "who.toml").write_text('method = "trained"\n[traits]\nextraversion = 0.5\n')
    with pytest.raises(UserError, match="trained edits raise none"):
        main_of(induce, monkeypatch, "--profile", tmp_path / "who.toml", "--save", tmp_path / "a", "--rank", "4")


@pytest.mark.parametrize("method, refused", (("trained", True), ("npti", False)))
def test_what_only_npti_has_is_refused_where_nobody_is_by_it(small, made, monkeypatch, tmp_path, method, refused):
    """A profile file and the lines of --questions say it, too."""
    own = {"traits": {"extraversion": 0.5}, "method": method}
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "w10 ?", "profile": own}) + "\n")
    (tmp_path / "who.toml").write_text(f'method = "{method}"\n[traits]\nextraversion = 0.5\n')
    flags = (*shared_flags(small), "--neurons", made, "--max-new-tokens", "2", "--suppress", "zero")
    for work in (("--questions", tmp_path / "q.jsonl"), ("--profile", tmp_path / "who.toml")):
        with pytest.raises(UserError, match="--suppress: of the neurons that npti") if refused else contextlib.nullcontext():
            main_of(induce, monkeypatch, *flags, *work)


def test_answers_are_utf8_in_any_terminal(small, made, monkeypatch, tmp_path):
    (tmp_path / "questions.txt").write_text("Gr\u00fc\u00dfe \U0001f600 ?\n", encoding="utf-8")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="iso-8859-1", errors="replace"))
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "1",
            "--questions", tmp_path / "questions.txt", "--max-new-tokens", "2")
    sys.stdout.flush()
    assert json.loads(shown.getvalue().decode())["question"] == "Gr\u00fc\u00dfe \U0001f600 ?"
