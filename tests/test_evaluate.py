"""evaluate.py: whole runs. What they write, how they go on, what they refuse; every step of --full; characters."""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import evaluate
import identify
from conftest import FRAMED, Server, lines_of, little_room, main_of, run, save_model, shared_flags
from personality import (POLES, TRAITS, Neurons, Profile, UserError, capability, composed, doses, dpn_le, load_model, npti,
                         steer)
from personality.baselines import Baselines
from personality.judges import contrast
from personality.methods import activation_addition, mean_difference, npti_edits, suppressed, trained
from personality.model import TEST_PENALTY, answer_ids, answers
from personality.neurons import NeuronFolder, neuron_path
from personality.questions import adjectives, built_in_bench, load_bench, read_inventory
from personality.report import write_reports
from personality.results import Condition
from personality.store import Journal
from personality.train import add_trained

FILES = {"answers.jsonl", "scores.jsonl", "summary.json", "details.json", "report.md", "report.html"}


def evaluation(small, made, monkeypatch, out, *more, alphas=("1", "2")):
    asked = ["--trait", "extraversion", *(flag for alpha in alphas for flag in ("--alpha", alpha))]
    main_of(evaluate, monkeypatch, *shared_flags(small), "--neurons", made, "--bench", small.bench_dir, "--limit", "4",
            "--max-new-tokens", "5", *(asked if "--answers" not in more else ()), "--batch-size", "8", "--out", out, *more)


def details_of(out):
    return json.loads((out / "details.json").read_text())


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """A folder with the tiny model's extraversion neurons, trained edits and answers."""
    out = tmp_path_factory.mktemp("trained")
    add_trained(small.model, small.tokenizer, small.bench, run(small, out).identify())
    return out


@pytest.fixture(scope="module")
def whole(small, made, tmp_path_factory):
    """One run with everything in it but a server."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        evaluation(small, made, monkeypatch, out, "--full", "--batch-size", "64", alphas=("2",))
    return out


@pytest.fixture(scope="module")
def all_five(small, tmp_path_factory):
    """A folder with all traits' neuron files of the tiny model, and trained edits in them."""
    out = tmp_path_factory.mktemp("all_five")
    for trait in TRAITS:
        add_trained(small.model, small.tokenizer, small.bench, run(small, out, trait).identify())
    return out


# ------------------------------------------------------------------------------------------------------------- answers


def test_writes_its_files(small, made, monkeypatch, tmp_path, capsys):
    evaluation(small, made, monkeypatch, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    rows = summary_of(tmp_path)
    cells = [("unedited", None, None)] + [(method, pole, None) for method in ("simple", "persona") for pole in POLES]
    cells += [("npti", pole, alpha) for pole in POLES for alpha in (1.0, 2.0)] + [("trained", pole, 1.0) for pole in POLES]
    assert sorted(map(str, cells)) == sorted(str((row["method"], row["pole"], row["alpha"])) for row in rows)
    made_answers, scores = (lines_of(tmp_path / name)[1:] for name in ("answers.jsonl", "scores.jsonl"))
    assert len(made_answers) == 4 * len(cells) and len({line["key"] for line in made_answers}) == len(made_answers)
    assert len(scores) == 2 * len(made_answers), "a score and a line on fluency each"
    score_of = {line["answer"]: line["score"] for line in scores if line.get("judge") == "contrast"}
    assert {line["trait"] for line in scores if "judge" in line} == {"extraversion"}
    fluency_of = {line["answer"]: line for line in scores if "perplexity" in line}
    for row in rows:
        assert set(row) == {"trait", "pole", "method", "alpha", "judge", "n", "mean", "ci95", "variance", "perplexity",
                            "repetition"}
        keys = [line["key"] for line in made_answers if all(line[key] == row[key] for key in ("method", "pole", "alpha"))]
        values, fluency = [score_of[key] for key in keys], [fluency_of[key] for key in keys]
        assert row["n"] == len(values) == 4 and row["trait"] == "extraversion" and row["judge"] == "contrast"
        assert row["mean"] == pytest.approx(np.mean(values)) and row["variance"] == pytest.approx(np.var(values))
        assert row["ci95"][0] <= row["mean"] <= row["ci95"][1]
        assert row["perplexity"] == pytest.approx(np.median([line["perplexity"] for line in fluency])) and row["perplexity"] >= 1
        assert row["repetition"] == pytest.approx(np.mean([line["repetition"] for line in fluency]))
    report, shown = (tmp_path / "report.md").read_text(), capsys.readouterr().out
    assert all(method in report and method in shown for method in evaluate.METHODS[:5]) and "High minus low" in report


def test_answers_are_steered_by_row(small, made, monkeypatch, tmp_path):
    """In the shared batches each row is what its method alone would give."""
    evaluation(small, made, monkeypatch, tmp_path, "--method", *evaluate.METHODS)
    neurons = Neurons.load(made / "extraversion.safetensors", small.model)
    direction = mean_difference(small.model, small.tokenizer, made / "extraversion.answers.jsonl", "extraversion", FRAMED)
    others = Baselines(small.model, small.tokenizer, small.bench, NeuronFolder(small.model, str(made), frame=FRAMED))
    asked = small.bench.questions("extraversion", "test", 4)
    seen = set()
    for line in lines_of(tmp_path / "answers.jsonl")[1:]:
        assert line["question"] in asked
        turns = FRAMED.turns(line["question"], line["persona"])
        signed = (1 if line["pole"] == "high" else -1) * (line["alpha"] or 0)
        profile = (npti(neurons, signed) if line["method"] == "npti" else activation_addition([(direction, signed)])
                   if line["method"] == "activation" else dpn_le([(neurons, signed)]) if line["method"] == "dpn-le"
                   else trained([(neurons, signed)]) if line["method"] in ("trained", "hybrid")
                   else others.residual("extraversion", signed) if line["method"] == "residual" else Profile.empty())
        tuned = others.tuned("extraversion", line["pole"]) if line["method"] == "lora" else contextlib.nullcontext()
        with tuned, steer(small.model, profile):
            alone = answers(small.model, small.tokenizer, [turns], 5, repetition_penalty=1.15)
        assert alone == [(line["answer"], line["ids"])]
        assert (line["persona"] is not None) == (line["method"] in ("simple", "persona", "hybrid"))
        if line["method"] in ("persona", "hybrid"):
            assert line["persona"] in small.bench.personas_for("search", "extraversion", line["pole"])
        seen.add(line["method"])
    assert seen == set(evaluate.METHODS)


def numbers_of(lines):
    values = [value for line in lines for value in line.values()]
    return [number for value in values for number in (value if isinstance(value, list) else [value])
            if isinstance(number, (int, float))]


def test_short_of_memory_batches_are_smaller(small, made, monkeypatch, tmp_path, capsys):
    """Of the answers, of every judge that is local, of the quiz and of neutral text: the same answers, the same figures."""
    methods, more = ("--method", "unedited", "persona", "npti"), ("--judge", "contrast", "llm", "questionnaire", "--capability")
    evaluation(small, made, monkeypatch, tmp_path / "roomy", *methods, *more, "--batch-size", "32", alphas=("2",))
    assert "out of memory" not in capsys.readouterr().err

    def short_of(room, *flags):
        """What is said of memory on a model that fails with more rows than that."""
        with little_room(small.model, room):
            evaluation(small, made, monkeypatch, tmp_path / "short", *methods, *flags, "--batch-size", "32", alphas=("2",))
        said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
        return [line.removeprefix("out of memory: batches of ") for line in said]

    assert short_of(7) == ["10", "5", "12", "6"], "of 20 answers; of 5 by the contrast judge, of 5 prompts: what fits is kept"
    assert short_of(7, "--judge", "contrast", "llm") == ["10", "5"]
    assert short_of(7, "--judge", "contrast", "questionnaire") == ["16", "8"]
    assert short_of(12, "--capability") == ["16", "8"], "of the quiz"
    assert short_of(7, *more) == ["6"], "of the 12 neutral texts: all else is done"
    roomy, short = ({name: sorted(lines_of(tmp_path / folder / f"{name}.jsonl")[1:], key=lambda line: line["key"])
                     for name in ("answers", "scores", "questionnaire", "capability")} for folder in ("roomy", "short"))
    assert roomy["answers"] == short["answers"] and len(roomy["scores"]) > 3 * len(roomy["answers"])
    for name in ("scores", "questionnaire", "capability"):
        assert [line["key"] for line in roomy[name]] == [line["key"] for line in short[name]]
        assert numbers_of(roomy[name]) == pytest.approx(numbers_of(short[name]), rel=1e-3, abs=1e-5)


def test_validation_and_test_share_no_question(small):
    for bench in (small.bench, built_in_bench()):
        for trait in TRAITS:
            test, validation = (bench.questions(trait, split, 999) for split in ("test", "validation"))
            assert not set(test) & set(validation) and len(test) + len(validation) == len(bench.test[trait])
            assert len(validation) >= 4


class Work:
    """What models do: rows that are asked for an answer, and forward passes of judges. stop(work): whether to interrupt, once."""

    def __init__(self, monkeypatch):
        self.rows, self.judged, self.stop, self.answering = 0, 0, lambda: False, False
        model = transformers.LlamaForCausalLM
        generate, forward = model.generate, model.forward

        def counted_generate(itself, **options):
            self.interrupt()
            self.rows, self.answering = self.rows + len(options["input_ids"]), True
            try:
                return generate(itself, **options)
            finally:
                self.answering = False

        @functools.wraps(forward)
        def counted_forward(itself, *arguments, **options):
            if not self.answering:
                self.interrupt()
                self.judged += 1
            return forward(itself, *arguments, **options)

        monkeypatch.setattr(model, "generate", counted_generate)
        monkeypatch.setattr(model, "forward", counted_forward)

    def interrupt(self):
        if self.stop():
            self.stop = lambda: False
            raise KeyboardInterrupt


def test_goes_on_where_it_was_killed(small, made, monkeypatch, tmp_path):
    work, killed = Work(monkeypatch), tmp_path / "killed"
    evaluation(small, made, monkeypatch, tmp_path / "whole")
    assert work.rows == 44
    judged, work.rows, work.judged = work.judged, 0, 0
    stops = {"after two batches": lambda: work.rows == 16,
             "after two questions": lambda: len(lines_of(killed / "scores.jsonl")) == 1 + 2 * 2 * 11}
    for stop in stops.values():
        work.stop = stop
        with pytest.raises(KeyboardInterrupt):
            evaluation(small, made, monkeypatch, killed)
        for name in ("answers.jsonl", "scores.jsonl"):
            with contextlib.suppress(FileNotFoundError), open(killed / name, "r+b") as file:
                file.seek(0, 2)
                file.write(b'{"key": "cut o')  # a line that the kill cut off
    evaluation(small, made, monkeypatch, killed)
    assert (work.rows, work.judged) == (44, judged), "nothing is done twice"
    assert {path.name for path in killed.iterdir()} == FILES
    for name in FILES:
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    evaluation(small, made, monkeypatch, killed, "--alpha", "3")
    assert work.rows == 44 + 8, "only what is new is asked"


@pytest.mark.parametrize("name", ("answers.jsonl", "scores.jsonl"))
def test_refuses_a_foreign_file(small, made, monkeypatch, tmp_path, name):
    """It neither fails with a traceback nor wipes somebody's file."""
    for text in ("my own notes\n", '{"question": "precious, and no end of line"}',
                 '{"text": "from another tool"}\n{"text": "and more"}\n'):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name):
            evaluation(small, made, monkeypatch, tmp_path)
        assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("flags, pattern", (
    (("--judge", "llm", "--judge-url", "http://localhost:1"), "--judge-model"),
    (("--judge-url", "http://localhost:1", "--judge-model", "big"), "--judge contrast llm"),
    (("--judge-model", "missing"), "missing"),
    (("--inventory", "x.csv"), "--judge contrast questionnaire"),
    (("--neurons", "npti:x"), "is for induce.py"),
    (("--dose", "0"), "--dose: expected a number above 0"),
    (("--alpha", "-1"), "--alpha: expected a number above 0"),
    (("--answers", "x.jsonl", "--judge", "questionnaire"), "need the model"),
    (("--answers", "missing.jsonl"), "missing.jsonl"),
    *((("--answers", "x.jsonl", *flag), "judged as they are")
      for flag in (("--alpha", "1"), ("--where", "all"), ("--suppress", "zero"))),
    (("--dose", "1", "--method", "unedited", "persona"), "no method that was asked for has a strength"),
    (("--judge", "questionnaire", "--inventory", "missing.csv"), "missing.csv"),
    (("--compare", "here", "there"), "summary.json"),
    (("--suppress", "zero", "--method", "unedited", "trained"), "only npti suppresses neurons: got .*trained"),
    (("--capability", "arithmetic"), "lm-evaluation-harness|arithmetic"),
    (("--turns", "12"), "each turn takes a test question of its own, and --limit is 4: --limit 12 or more"),
    (("--turns", "9", "--limit", "9"), "--turns 9: the bench has 8 test questions of extraversion"),
))
def test_wrong_flags(small, made, monkeypatch, tmp_path, flags, pattern):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=pattern):
        evaluation(small, made, monkeypatch, tmp_path, *flags)


def test_full_asks_for_what_the_methods_have(monkeypatch):
    """Doses as well, but of no method that has no strength."""
    monkeypatch.setattr(sys, "argv", "x --full --method unedited persona".split())
    assert evaluate.arguments().method == ["unedited", "persona"]


def test_a_flag_of_several_values_may_come_again(monkeypatch):
    monkeypatch.setattr(sys, "argv", "x --trait openness Neuroticism --trait openness".split())
    assert evaluate.arguments().trait == identify.arguments().traits == ["openness", "neuroticism"]
    monkeypatch.setattr(sys, "argv", "x --method npti persona --method trained npti --judge llm --judge contrast --dose 2 --dose 1".split())
    args = evaluate.arguments()
    assert args.method == ["npti", "persona", "trained"] and args.judge == ["llm", "contrast"] and args.dose == [1, 2]


def test_who_declines_is_counted(small, made, monkeypatch, tmp_path):
    monkeypatch.setattr("personality.results.declines", lambda answer: True)
    evaluation(small, made, monkeypatch, tmp_path, "--method", "unedited", "npti", alphas=("1",))
    assert "12 of 12 answers decline to be anyone" in details_of(tmp_path)["head"]


def test_answers_of_another_source(small, made, monkeypatch, tmp_path):
    lines = [{"trait": "openness", "pole": pole, "question": f"w1{k} ?", "answer": f"w2{k} {word} w32"}
             for k in range(3) for pole, word in zip(POLES, ("w30", "w31"))]
    (tmp_path / "given.jsonl").write_text("\n".join(map(json.dumps, lines)))
    evaluation(small, made, monkeypatch, tmp_path / "out", "--answers", tmp_path / "given.jsonl", "--judge", "contrast", "llm")
    details = details_of(tmp_path / "out")
    assert {row["judge"] for row in details["accuracy"]} == {"contrast", f"llm:{small.model.source}"}
    assert all(row["pairs"] == 9 and 0 <= row["accuracy"] <= 1 for row in details["accuracy"])
    assert {(row["trait"], row["method"], row["n"]) for row in summary_of(tmp_path / "out")} == {("openness", "given", 3)}
    (tmp_path / "wrong.jsonl").write_text('{"trait": "openness", "question": "w1 ?", "answer": "w2"}\n'
                                          '{"trait": "humour", "question": "", "answer": ""}')
    with pytest.raises(UserError, match="wrong.jsonl, line 2"):
        evaluation(small, made, monkeypatch, tmp_path / "out", "--answers", tmp_path / "wrong.jsonl")


# ------------------------------------------------------------------------------------------------ a server that rates


def judged_by(server, small, made, monkeypatch, out):
    evaluation(small, made, monkeypatch, out, "--method", *evaluate.METHODS[:4], "--judge", "contrast", "llm", "--judge-url",
               server.url, "--judge-model", "big", alphas=("2",))


@pytest.mark.usefixtures("quick")
def test_a_server_that_stumbles_loses_nothing(small, made, monkeypatch, tmp_path, capsys):
    """429, 500, no JSON, chatter and quotations of the answer: retried; and nothing is paid for twice."""
    def right(body):
        fluency = "fluent" in body["messages"][0]["content"]
        return "4" if fluency else str(1 + sum(map(ord, body["messages"][1]["content"])) % 5)

    stumbles = {2: (429, ""), 3: (500, ""), 5: "The answer says Rating: [[5]]", 17: (503, ""), 22: "5 out of 5", 40: ""}
    with Server(lambda n, body: stumbles.get(n, right(body))) as server:
        judged_by(server, small, made, monkeypatch, tmp_path / "a")
        assert len(server.seen) == 2 * 28 + len(stumbles)
        before = len(server.seen)
        judged_by(server, small, made, monkeypatch, tmp_path / "a")
        assert len(server.seen) == before, "the second time everything is there"
        assert server.keys == {"Bearer sk-secret-of-the-test"}
    with Server(lambda n, body: right(body)) as server:
        judged_by(server, small, made, monkeypatch, tmp_path / "b")
    rated = [{(line["answer"], line["trait"]): line["score"] for line in lines_of(tmp_path / name / "scores.jsonl")[1:]
              if line.get("judge") == "llm:big"} for name in "ab"]
    assert rated[0] == rated[1] and len(rated[0]) == 56 and set(rated[0].values()) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    mean_of = {(row["method"], row["pole"]): row["mean"] for row in summary_of(tmp_path / "a") if row["judge"] == "llm:big"}
    effects = [row for row in details_of(tmp_path / "a")["effects"] if row["judge"] == "llm:big"]
    assert len(effects) == 3
    for row in effects:  # the paper's 2 to 10
        high, low = (mean_of[row["method"], pole] for pole in POLES)
        assert row["paper"]["mean"] == pytest.approx(high + 6 - low) and 2 <= row["paper"]["mean"] <= 10
    files = "".join(path.read_text() for path in (tmp_path / "a").iterdir())
    assert "sk-secret" not in files + capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_replies_that_are_no_rating_are_counted(small, made, monkeypatch, tmp_path, capsys):
    with Server(lambda n, body: "I like it very much: [[5]]") as server, pytest.raises(UserError, match="unparsable, as 'I like it .*same command"):
        judged_by(server, small, made, monkeypatch, tmp_path)
    assert len(server.seen) == 3 * 8, "the first group's, three times each: no more is paid for"
    assert not [line for line in lines_of(tmp_path / "scores.jsonl")[1:] if line.get("judge") == "llm:big"], "so they are asked for again"
    rates = lambda body: sum(map(ord, body["messages"][1]["content"])) % 2 == 0 or "fluent" in body["messages"][0]["content"]  # noqa: E731
    with Server(lambda n, body: "4" if rates(body) else "I like it very much: [[5]]") as server:
        judged_by(server, small, made, monkeypatch, tmp_path)
        lost = sum(line["score"] is None for line in lines_of(tmp_path / "scores.jsonl")[1:] if line.get("judge") == "llm:big")
        assert 0 < lost < 28 and f"llm:big: {lost} replies are no rating and count as none: unparsable, as 'I like" in capsys.readouterr().err
        before = len(server.seen)
        judged_by(server, small, made, monkeypatch, tmp_path)
        assert len(server.seen) == before
    assert f"{lost} replies were no rating" in (tmp_path / "report.md").read_text()
    assert {row["n"] for row in summary_of(tmp_path) if row["judge"] == "llm:big"} <= set(range(5)), "nothing is guessed"


@pytest.mark.usefixtures("quick")
def test_replies_that_are_no_rating_are_kept_when_a_run_is_killed(small, made, monkeypatch, tmp_path):
    """So that the run that goes on needs no rating to finish."""
    rates = lambda body: sum(map(ord, body["messages"][1]["content"])) % 2 == 0  # noqa: E731
    with Server(lambda n, body: (n == 60 and os.kill(os.getpid(), signal.SIGINT)) or ("4" if rates(body) else "no idea")) as server:
        with pytest.raises(KeyboardInterrupt):
            judged_by(server, small, made, monkeypatch, tmp_path)
        judged_by(server, small, made, monkeypatch, tmp_path)
        before = len(server.seen)
        judged_by(server, small, made, monkeypatch, tmp_path)
        assert len(server.seen) == before < 56 * 3
    lines = [line for line in lines_of(tmp_path / "scores.jsonl")[1:] if line.get("judge") == "llm:big"]
    lost = [line for line in lines if line["score"] is None]
    assert len(lines) == 56 and lost and f"{len(lost)} replies were no rating" in (tmp_path / "report.md").read_text()
    rest = [line for line in lines_of(tmp_path / "scores.jsonl") if line not in lost[:4]]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rest))  # as if only these had been left
    with Server(lambda n, body: "no idea") as server:
        monkeypatch.setattr("personality.judges.digest", lambda url: lost[0]["from"])
        judged_by(server, small, made, monkeypatch, tmp_path)
        assert len(server.seen) == 4 * 3
    rest = [line for line in lines_of(tmp_path / "scores.jsonl") if line not in lines[:40]]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rest))
    with Server(lambda n, body: (500, "")) as server, pytest.raises(UserError, match="none of .* answered"):
        judged_by(server, small, made, monkeypatch, tmp_path)
    assert len(server.seen) <= 8 * 6, "a server that is gone is not asked for all that is left"


@pytest.mark.usefixtures("quick")
def test_a_judge_may_think_first(small, made, monkeypatch, tmp_path):
    """Aloud, or where nobody sees it: what is cut off is asked for again with room for it, and once that was needed it has it."""
    for aloud in (True, False):
        def thinking(n, body):
            if body["max_tokens"] < 100:
                return ["<think>well, 5 or" if aloud else "", "length"]
            return "<think>well, 5 or 2?</think>\n\n**4**" if aloud else "4"

        with Server(thinking) as server:
            judged_by(server, small, made, monkeypatch, tmp_path / str(aloud))
            short = sum(body["max_tokens"] < 100 for body in server.seen)
            assert 1 <= short <= 8 and len(server.seen) == 56 + short, "of those that were under way together"
        assert {row["mean"] for row in summary_of(tmp_path / str(aloud)) if row["judge"] == "llm:big"} == {4.0}


@pytest.mark.usefixtures("quick")
def test_a_dead_server_loses_no_answer(small, made, monkeypatch, tmp_path):
    with Server(lambda n, body: (500, "")) as server, pytest.raises(UserError, match="none of .* answered"):
        judged_by(server, small, made, monkeypatch, tmp_path)
    written = (tmp_path / "answers.jsonl").read_bytes()
    assert len(written.splitlines()) == 1 + 28
    refused = []

    def all_but_one(n, body):  # one answer that the server never takes
        if not refused:
            refused.append(body["messages"][1])
        return (400, "") if body["messages"][1] == refused[0] else "3"

    with Server(all_but_one) as server:
        for _ in range(2):  # the second time it alone is asked for; the report is written all the same
            (tmp_path / "report.md").unlink(missing_ok=True)
            with pytest.raises(UserError, match="BadRequest"):
                judged_by(server, small, made, monkeypatch, tmp_path)
            assert (tmp_path / "report.md").exists()
    assert (tmp_path / "answers.jsonl").read_bytes() == written
    with Server(lambda n, body: "2") as other:  # another server by the same name is another judge
        judged_by(other, small, made, monkeypatch, tmp_path)
        assert len(other.seen) == 56


@pytest.mark.usefixtures("quick")
def test_an_interrupted_judge_keeps_what_is_paid_for(small, made, monkeypatch, tmp_path):
    def stopped(n, body):
        if n == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return "3"

    with Server(stopped) as server:
        with pytest.raises(KeyboardInterrupt, match="what was finished is kept"):
            judged_by(server, small, made, monkeypatch, tmp_path)
        served = len(server.seen)
        assert 10 <= served < 56
        assert sum(line.get("judge") == "llm:big" for line in lines_of(tmp_path / "scores.jsonl")) == served
        judged_by(server, small, made, monkeypatch, tmp_path)
        assert len(server.seen) == 56


def test_another_judge(small, made, monkeypatch, tmp_path):
    """Another model judges, with a tokenizer of its own: the answers stay, and their scores are the other's."""
    out, flags = tmp_path / "out", ("--method", "unedited", "npti")
    evaluation(small, made, monkeypatch, out, *flags, alphas=("1",))
    before, own = lines_of(out / "answers.jsonl"), summary_of(out)
    other = save_model(tmp_path / "other", **{"model.norm.weight": 0.5})
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<pad>"}))
    evaluation(small, made, monkeypatch, out, *flags, "--judge", "contrast", "llm", "--judge-model", other, alphas=("1",))
    assert lines_of(out / "answers.jsonl") == before, "nothing is asked again"
    assert "judged by" in details_of(out)["head"]
    judge, tokenizer = load_model(str(other), "cpu", "float32")
    scores = [line for line in lines_of(out / "scores.jsonl")[1:] if line["from"]]
    score_of = {line["answer"]: line["score"] for line in scores if line.get("judge") == "contrast"}
    perplexity_of = {line["answer"]: line["perplexity"] for line in scores if "perplexity" in line}
    rows = {(row["method"], row["pole"]): row for row in summary_of(out) if row["judge"] == "contrast"}
    for line in before[1:]:
        ids = answer_ids(tokenizer, line["answer"]) or [tokenizer.eos_token_id]
        expected, plain = contrast(judge, tokenizer, small.bench, ["extraversion"], line["question"], [ids], 8, FRAMED)
        assert score_of[line["key"]] == pytest.approx(float(expected["extraversion"]), abs=1e-5)
        assert perplexity_of[line["key"]] == pytest.approx(math.exp(-float(plain)), rel=1e-4)
    for (method, pole), row in rows.items():
        keys = [line["key"] for line in before[1:] if (line["method"], line["pole"]) == (method, pole)]
        assert row["mean"] == pytest.approx(np.mean([score_of[key] for key in keys])) and row["n"] == len(keys)
        assert row["perplexity"] == pytest.approx(np.median([perplexity_of[key] for key in keys]))
    evaluation(small, made, monkeypatch, out, *flags, alphas=("1",))
    assert summary_of(out) == own, "the model's own scores are still there"


# ------------------------------------------------------------------------------------- its steps, on figures that are given


def step_of(arguments=(), **people):
    """An evaluation that has no model, but these people."""
    it = object.__new__(evaluate.Evaluation)
    it.args, it.costs, it.reports, it.people = SimpleNamespace(**{"seed": 0, **dict(arguments)}), None, None, SimpleNamespace(**people)
    return it


def measured(conditions, title, journal, figures_of):
    return [(condition._asdict(), figures_of(condition)) for condition in conditions]


HIGH = Condition("npti", "openness", "high", 1.0)


def test_what_is_made_with_other_neurons_has_another_key(small, tmp_path):
    """Answers, and what is measured under an edit: else those of the old file stood for the new one's."""
    people, made = object.__new__(evaluate.Personalities), []
    journal, people.steered = Journal(tmp_path / "costs.jsonl", {}), lambda condition: contextlib.nullcontext()

    def figures(key):
        people.neurons = {"openness": SimpleNamespace(key=key)}
        return people.measure([HIGH], "costs", journal, lambda condition: made.append(key) or {"figure": len(made)})[0][1]["figure"]

    assert [figures(key) for key in ("a", "b", "a")] == [1, 2, 1] and made == ["a", "b"]
    assert people.key(HIGH) != people.key(HIGH._replace(method="dpn-le")) and people.key(HIGH._replace(method="persona")) is None


def test_an_edit_that_is_suppressed_otherwise_has_files_of_its_own(small, made, monkeypatch, tmp_path):
    flags = ("--method", "npti", "--limit", "1")
    evaluation(small, made, monkeypatch, tmp_path, *flags, alphas=("1",))
    with pytest.raises(UserError, match="answers.jsonl"):
        evaluation(small, made, monkeypatch, tmp_path, *flags, "--suppress", "zero", alphas=("1",))


def test_test_questions_that_a_file_was_made_with_are_said(small, made, monkeypatch, tmp_path, capsys):
    """Another bench may test with what this one searches with, or reads levels from."""
    shutil.copytree(small.bench_dir, tmp_path / "bench")
    place, bench = tmp_path / "bench", small.bench
    tested = bench.questions("extraversion", "search", 99) + bench.questions("extraversion", "validation", 99)
    (place / "test" / "Extraversion.json").write_text("".join(json.dumps({"question": text}) + "\n" for text in tested))
    (place / "search" / "Extraversion.json").write_text('{"question": "w10 ?"}\n')
    asked = load_bench(str(place)).questions("extraversion", "test", 9)
    read = len(set(asked) & {line["question"] for line in lines_of(made / "extraversion.answers.jsonl")})
    levels = len(set(asked) & set(bench.questions("extraversion", "validation", doses.VALIDATION)))
    assert 0 < read < len(asked) and levels
    flags = ("--method", "trained", "--limit", "9")
    evaluation(small, made, monkeypatch, tmp_path / "out", *flags, "--bench", place, alphas=())
    said = capsys.readouterr().err
    assert f"it was made of answers to {read} of the {len(asked)} test questions: they are no test of it" in said
    assert f"its levels were read from {levels} of the {len(asked)} test questions" in said
    evaluation(small, made, monkeypatch, tmp_path / "npti", "--method", "npti", "--limit", "9", "--bench", place, alphas=("1",))
    said = capsys.readouterr().err
    assert f"answers to {read} of the" in said and "its levels were read from" not in said, "no levels are used"
    evaluation(small, made, monkeypatch, tmp_path / "own", *flags, alphas=())
    assert "no test of it" not in capsys.readouterr().err


def test_the_price_of_an_edit_is_what_it_adds():
    """And of a prompt, which the quiz is asked under, it is the quiz alone."""
    texts, asked = iter([([2.0] * 2, [torch.tensor([1, 2])] * 2), ([2.5] * 2, [torch.tensor([1, 3])] * 2)]), []

    def in_batches(work, number, *more):
        return asked.append(more) or [1, 0] if work is capability.quiz else next(texts)

    step = step_of(in_batches=in_batches, system=lambda condition: f"w {condition.method}", measure=measured)
    edit, prompt = step.capability([HIGH, HIGH._replace(method="persona")])
    assert (edit["added"]["mean"], edit["agreement"]["mean"], edit["quiz"]["mean"]) == (0.5, 0.5, 0.5)
    assert not {"added", "agreement"} & set(prompt) and asked == [("w npti",), ("w persona",)]


def test_a_self_report_is_made_under_the_prompt():
    items, asked = [("I like it", "openness", "Ideas", 1)], []
    step = step_of({"items": items}, in_batches=lambda work, number, *more: asked.append(more) or [4.0], measure=measured,
                   system=lambda condition: condition.method)
    step.questionnaire([HIGH, HIGH._replace(method="persona")])
    assert asked == [(items, "npti"), (items, "persona")]


def test_a_poles_system_prompt_is_its_own(small):
    people = object.__new__(evaluate.Personalities)
    people.bench, people.args = small.bench, SimpleNamespace(seed=0)
    for pole in POLES:
        assert adjectives("openness", pole) in people.system(Condition("simple", "openness", pole, None))
        assert people.system(Condition("persona", "openness", pole, None)) in small.bench.personas_for("search", "openness", pole)
    assert people.system(HIGH) is None


def test_a_doses_perplexity_is_the_mean_of_its_poles():
    step = step_of({"method": ["npti"], "dose": [1.0], "limit": 2}, answer=lambda *_: [])
    step.answers, step.cells, key = None, lambda *_: [], {"trait": "openness", "method": "npti", "alpha": 1.0}
    step.judged = lambda *_: ([{**key, "perplexity": value} for value in (5.0, 7.0)] + [{**key, "alpha": 2.0, "perplexity": 99.0}], [key])
    assert [row["perplexity"] for row in step.doses()] == [6.0]


def test_spill_over_is_of_each_traits_first_questions(monkeypatch):
    """Of the methods that have a matrix."""
    line = lambda trait, question, method: {"trait": trait, "question": question, "method": method}  # noqa: E731
    made, judged = [line(trait, question, method) for question in "abc" for trait in TRAITS[:2] for method in ("unedited", "simple", "npti")], []
    step = step_of({"spill_over": 2, "seed": 0})
    step.contrast, step.scores = SimpleNamespace(judge=lambda *given: judged.append(given)), None
    step.tables = lambda made: (judged.append(made), None)
    monkeypatch.setattr(evaluate.results, "spill_over", lambda table, seed: [])
    assert step.spill_over(made) == []
    assert judged[0][0] == judged[1] == [line(trait, question, "npti") for question in "ab" for trait in TRAITS[:2]]
    assert judged[0][2] == TRAITS


def test_two_given_answers_of_the_same_words_are_two(small, tmp_path):
    text = '{"trait": "openness", "pole": "high", "question": "w10 ?", "answer": "w11 w12"}\n'
    (tmp_path / "given.jsonl").write_text(2 * text)
    assert len({line["key"] for line in step_of({"answers": str(tmp_path / "given.jsonl")}, tokenizer=small.tokenizer).given()}) == 2


# ---------------------------------------------------------------------------------------------------- all that there is


def test_full_run_has_everything(whole):
    details = details_of(whole)
    assert {row["method"] for row in details["dose"]} == set(evaluate.EDITS)
    assert {row["alpha"] for row in details["dose"]} == set(evaluate.DOSES)
    of_matrix = {(row["judge"], row["method"]) for row in details["spill_over"]}
    assert {("contrast", "npti"), ("questionnaire", "npti"), ("questionnaire", "persona")} <= of_matrix
    for of in (("contrast", "npti"), ("questionnaire", "npti")):
        assert {row["measured"] for row in details["spill_over"] if (row["judge"], row["method"]) == of} == set(TRAITS)
    for row in details["spill_over"]:
        assert row["ci95"] is None if row["judge"] == "questionnaire" else row["ci95"][0] <= row["mean"] <= row["ci95"][1]
    rows = summary_of(whole)
    assert {row["judge"].split(":")[0] for row in rows} == set(evaluate.JUDGES)
    assert {row["method"] for row in rows} == set(evaluate.METHODS) - {"lora"}
    assert len(details["questionnaire"]) == 17 and details["agreement"]
    mean_of = {(row["judge"], row["method"], row["pole"], row["alpha"]): row["mean"] for row in rows}
    for row in details["beside"]:
        judge, *condition = (row[name] for name in ("judge", "method", "pole", "alpha"))
        assert row["mean"] == pytest.approx(mean_of[judge, *condition] - mean_of[judge, "unedited", None, None]), condition
        assert row["times"]["mean"] > 0
    assert {(row["method"], row["pole"]) for row in details["beside"]} == {(row["method"], row["pole"]) for row in rows} - {("unedited", None)}
    assert {row["n"] for row in rows if row["judge"] == "questionnaire"} == {12}, "two items a facet"
    for row in details.get("matched", ()):
        assert {"mean", "perplexity", "repetition", "added", "quiz"} <= set(row)
    report = (whole / "report.md").read_text()
    for row in details["fluency"]:
        (low, high), mean = row["rating"]["ci95"], row["rating"]["mean"]
        assert row["n"] == 4 and 1 <= row["tokens"] <= 5 and low <= mean <= high
    for title in ("Scores", "High minus low", "Fluency", "Methods compared", "Spill-over", "Capability", "Questionnaire",
                  "Do the judges agree?"):
        assert f"## {title}" in report
    asked = [line["question"] for line in lines_of(whole / "answers.jsonl")[1:] if line["alpha"] in (0.5, 1.0, 1.5)]
    assert asked, "doses were tried"
    assert "judges: contrast, llm" in details["head"] and "alpha 2, level 1, seed 0" in details["head"]
    assert f"float32 on cpu, torch {torch.__version__}, transformers {transformers.__version__};" in details["head"]


def test_page_of_a_full_run_has_its_pictures(whole):
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', (whole / "report.html").read_text())
    assert len(pictures) == 8, "effects by both judges that have them by question; dose; two matrices; self-report; layers of two methods"


def test_steering_is_on_in_scoring_passes(whole):
    """where="all": without it these passes would measure the unedited model, and find that nothing is lost."""
    rows = details_of(whole)["capability"]
    plain, *edited = [row for row in rows if "added" in row]
    assert plain["method"] == "unedited" and plain["added"]["mean"] == 0 and plain["agreement"]["mean"] == 1
    assert {row["method"] for row in edited} == set(evaluate.EDITS) and len(edited) == 10
    for row in edited:
        assert abs(row["added"]["mean"]) > 1e-4 and 0 <= row["agreement"]["mean"] <= 1
        assert row["added"]["ci95"][0] <= row["added"]["mean"] <= row["added"]["ci95"][1]
    assert all(0 <= row["quiz"]["mean"] <= 1 for row in rows) and len(rows) == 17


class PlantedJudge:
    """A contrast judge for whom every edit works as far as its alpha says, activation addition twice as far."""

    origin = None

    def judge(self, answers, scores, traits, title):
        for line in answers:
            sign = 1 if line["pole"] == "high" else -1
            strength = sign * {"npti": 1, "activation": 2}.get(line["method"], 0) * (line["alpha"] or 0)
            lines = [{"key": f"{line['key']}/fluency", "perplexity": 2.0, "repetition": 0.0, "tokens": len(line["ids"])}]
            for trait in dict.fromkeys([line["trait"], *traits]):
                score = strength if trait == line["trait"] else strength / 10
                lines.append({"key": f"{line['key']}/contrast/{trait}", "judge": "contrast", "trait": trait, "score": score})
            scores.append(*({**found, "answer": line["key"], "from": None} for found in lines if found["key"] not in scores))


def test_matched_strength_is_reported_once_it_is_measured(small, made, monkeypatch, tmp_path):
    """The report that is written before the long steps has none yet, and the last one has all of it."""
    flags = (*shared_flags(small), "--neurons", made, "--bench", small.bench_dir, "--limit", "4", "--trait", "extraversion",
             "--max-new-tokens", "5", "--dose", "1", "--method", "unedited", "npti", "activation", "--spill-over", "2",
             "--capability", "--alpha", "2", "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    args = evaluate.arguments()
    args.items, written = read_inventory(None), []
    people = evaluate.Personalities(small.model, small.tokenizer, small.bench, args)

    def write(found, made):
        written.append(found.get("matched"))
        write_reports(tmp_path, {"head": "", **found}, made, people.neurons.files)

    evaluate.steps(evaluate.Evaluation(people, PlantedJudge(), None, args, {}), args, write)
    assert [len(rows or ()) for rows in written] == [0, 2]
    rows = {row["method"]: row for row in details_of(tmp_path)["matched"]}
    assert {method: row["alpha"] for method, row in rows.items()} == {"npti": 0.9, "activation": 0.45}, "0.9 of the weaker one's"
    for row in rows.values():
        assert {"mean", "ci95", "n", "perplexity", "repetition", "spill_over", "added", "quiz"} <= set(row)
        assert (row["mean"], row["n"], row["perplexity"], row["spill_over"]) == (pytest.approx(1.8), 4, 2.0, pytest.approx(0.18))
    assert "## At matched strength" in (tmp_path / "report.md").read_text()


def test_strength_is_not_chosen_on_test_questions(whole, small):
    """Doses are answered on validation questions only; test questions see --alpha, --level and what was matched."""
    asked = set(small.bench.questions("extraversion", "test", 99))
    matched = {row["alpha"] for row in details_of(whole).get("matched", ())}
    on_test = {line["alpha"] for line in lines_of(whole / "answers.jsonl")[1:] if line["question"] in asked}
    assert on_test <= {None, 2.0, 1.0} | matched


def test_two_folders_are_compared(whole, small, made, monkeypatch, tmp_path, capsys):
    evaluation(small, made, monkeypatch, tmp_path, "--batch-size", "64", alphas=("3",))
    capsys.readouterr()
    main_of(evaluate, monkeypatch, "--compare", whole, tmp_path)
    first, _, second, _, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{whole}: ") and "judges: contrast, llm" in first and second.startswith(f"{tmp_path}: "), "made how"
    header = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert header[:4] == ["judge", "trait", "method", "pole"] and len({line.count("|") for line in lines}) == 1
    persona = next(line for line in lines if "contrast | extraversion | persona | high" in line)
    assert re.search(r"\| [+-]0\.0 \|", persona), "the same answers"
    assert any("npti 3" in line for line in lines) and any("npti 2" in line for line in lines)


def test_conversations_without_the_unedited_model(small, made, monkeypatch, tmp_path):
    evaluation(small, made, monkeypatch, tmp_path, "--method", "npti", "--turns", "2", "--batch-size", "64", alphas=("2",))
    assert [row["unedited"] for row in details_of(tmp_path)["conversations"]] == [None, None]
    assert "nan" not in (tmp_path / "report.md").read_text().lower()


def test_conversations(small, made, monkeypatch, tmp_path):
    """Each turn is asked after what was said; the second run adds nothing."""
    flags = ("--method", "unedited", "persona", "npti", "--turns", "2", "--batch-size", "64")
    evaluation(small, made, monkeypatch, tmp_path, *flags, alphas=("2",))
    rows = details_of(tmp_path)["conversations"]
    assert [(row["turn"], row["method"], row["n"]) for row in rows] == [
        (turn, method, 2) for turn in (1, 2) for method in ("persona", "npti")], "four questions: two conversations of two"
    assert all(row["perplexity"] >= 1 and row["unedited"] >= 1 and 0 <= row["repetition"] <= 1 for row in rows)
    lines = [line for line in lines_of(tmp_path / "answers.jsonl")[1:] if "turn" in line]
    perplexity_of = {line["answer"]: line["perplexity"] for line in lines_of(tmp_path / "scores.jsonl")[1:] if "perplexity" in line}
    for row in rows:
        of = {(method, pole): np.median([perplexity_of[line["key"]] for line in lines if (line["turn"], line["method"], line["pole"]) == (
            row["turn"], method, pole)]) for method, pole in (("unedited", None), *((row["method"], pole) for pole in POLES))}
        assert row["unedited"] == pytest.approx(of.pop(("unedited", None))) and row["perplexity"] == pytest.approx(np.mean([*of.values()]))
    neurons, asked = Neurons.load(made / "extraversion.safetensors", small.model), small.bench.questions("extraversion", "test", 4)
    for line in lines:
        assert line["question"] == asked[2 * line["talk"] + line["turn"] - 1] and len(line["before"]) == line["turn"] - 1
        for question, answer in line["before"]:
            first = next(one for one in lines if one["question"] == question and all(
                one[name] == line[name] for name in ("talk", "method", "pole")))
            assert first["answer"] == answer and first["turn"] == 1 and first["persona"] == line["persona"]
        turns = FRAMED.turns(line["question"], line["persona"], line["before"])
        assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * (line["turn"] - 1), "user"]
        profile = npti(neurons, {"high": 2, "low": -2}[line["pole"]]) if line["method"] == "npti" else Profile.empty()
        with steer(small.model, profile):
            alone = answers(small.model, small.tokenizer, [turns], 5, repetition_penalty=TEST_PENALTY)
        assert alone == [(line["answer"], line["ids"])]
    assert "Over a conversation" in (tmp_path / "report.md").read_text()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    evaluation(small, made, monkeypatch, tmp_path, *flags, alphas=("2",))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------------------ requested against measured


def test_random_characters():
    some = evaluate.random_characters(12, 1.5, 0)
    assert some == evaluate.random_characters(12, 1.5, 0) != evaluate.random_characters(12, 1.5, 1)
    assert len(set(some)) == 12 and all(sum(alpha != 0 for alpha in alphas) == 3 for alphas in some)
    assert all(alpha == 0 or 0.5 <= abs(alpha) <= 1.5 for alphas in some for alpha in alphas)
    assert all(len({alpha > 0 for alpha in of_trait if alpha}) == 2 for of_trait in zip(*some)), "both signs of each trait"


def character_profile(neurons, way, alphas, most=1.5):
    """By hand: (neuron files by trait, how, alphas over TRAITS)."""
    parts = [(neurons[trait], alpha) for trait, alpha in zip(TRAITS, alphas)]
    return (composed(parts) if way == "composed" else Profile.empty() if way == "described" else
            trained([(own, alpha / most) for own, alpha in parts]) if way == "levels" else
            Profile.of([edits for part in parts for edits in npti_edits(*part)]))


def test_characters_are_evaluated(small, all_five, monkeypatch, tmp_path):
    flags = (*shared_flags(small), "--neurons", all_five, "--bench", small.bench_dir, "--limit", "4", "--max-new-tokens", "4",
             "--batch-size", "64", "--out", tmp_path / "out", "--method", "unedited", "--judge", "contrast", "questionnaire",
             "--characters", "3")
    main_of(evaluate, monkeypatch, *flags)
    made = lines_of(tmp_path / "out" / "answers.jsonl")[1:]
    characters = evaluate.random_characters(3, 1.5, 0)
    neurons = {trait: Neurons.load(neuron_path(all_five, trait), small.model) for trait in TRAITS}
    for way in evaluate.WAYS:
        of_way = [line for line in made if line["method"] == way]
        assert {tuple(line["alpha"]) for line in of_way} == set(characters) and len(of_way) == 3 * 4
        assert len({line["question"] for line in of_way}) == 4
        line = of_way[0]
        with steer(small.model, character_profile(neurons, way, line["alpha"])):
            turns = FRAMED.turns(line["question"], line["persona"])
            alone = answers(small.model, small.tokenizer, [turns], 4, repetition_penalty=TEST_PENALTY)
        assert alone == [(line["answer"], line["ids"])]
        told = line["persona"] or ""
        assert all((adjectives(trait, POLES[alpha < 0]) in told) == (way == "described" and alpha != 0)
                   for trait, alpha in zip(TRAITS, line["alpha"]))
    details = details_of(tmp_path / "out")
    assert [(row["judge"], row["method"]) for row in details["characters"]] == [
        (judge, way) for judge in ("contrast", "questionnaire") for way in evaluate.WAYS]
    perplexity_of = {line["answer"]: line["perplexity"] for line in lines_of(tmp_path / "out" / "scores.jsonl")[1:] if "perplexity" in line}
    for row in details["characters"][:len(evaluate.WAYS)]:
        of_each = [[perplexity_of[line["key"]] for line in made if line["method"] == row["method"] and tuple(line["alpha"]) == alphas]
                   for alphas in characters]
        assert row["perplexity"] == pytest.approx(np.mean([np.median(of_one) for of_one in of_each]))
    assert "requested against measured" in (tmp_path / "out" / "report.md").read_text()
    assert "what was requested of each trait" in (tmp_path / "out" / "report.html").read_text()
    before = (tmp_path / "out" / "scores.jsonl").read_bytes()
    main_of(evaluate, monkeypatch, *flags)  # nothing is done twice
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == before
    assert details_of(tmp_path / "out") == details
    main_of(evaluate, monkeypatch, *flags, "--level", "8")
    further = lines_of(tmp_path / "out" / "answers.jsonl")[1 + len(made):]
    assert {line["method"] for line in further} == {"levels", "trained"}, "what depends on the level is answered anew"
    line = next(line for line in further if line["method"] == "levels")
    with steer(small.model, character_profile(neurons, "levels", [8 * alpha for alpha in line["alpha"]])):
        alone = answers(small.model, small.tokenizer, [FRAMED.turns(line["question"])], 4, repetition_penalty=TEST_PENALTY)
    assert alone == [(line["answer"], line["ids"])]


def test_edits_as_a_checkpoint_has_them(small, all_five, monkeypatch, tmp_path):
    """--suppress and --where reach every method's edits, those that are just added up as well."""
    evaluation(small, all_five, monkeypatch, tmp_path, "--suppress", "zero", "--where", "all", "--characters", "2",
               "--method", "npti", alphas=("1",))
    neurons = {trait: Neurons.load(neuron_path(all_five, trait), small.model) for trait in TRAITS}
    made, differ, edited = lines_of(tmp_path / "answers.jsonl")[1:], set(), ("npti", "composed", "added")
    for line in made:
        signed = {"high": 1, "low": -1}.get(line["pole"], 0) * (line["alpha"] or 0)
        profile = (npti(neurons[line["trait"]], signed) if line["method"] in ("npti", "unedited") else
                   trained([(neurons[line["trait"]], signed)]) if line["method"] == "trained" else
                   character_profile(neurons, line["method"], line["alpha"], 1.0))
        removed = suppressed(profile, "zero")
        assert bool(removed.value[:, 0].isinf().all()), "no cap"
        assert bool((removed.value[:, 1] == 0).any()) == bool((profile.value[:, 0] == 0).any()), "what was capped is removed"
        turns = [FRAMED.turns(line["question"], line["persona"])]
        for what, edits, where in (("as asked", removed, "all"), ("suppress", profile, "all"), ("where", removed, "generated")):
            with steer(small.model, edits, where=where):
                alone = answers(small.model, small.tokenizer, turns, 5, repetition_penalty=TEST_PENALTY)
            if alone != [(line["answer"], line["ids"])]:
                differ.add((line["method"], what))
    assert differ - {("levels", "where"), ("trained", "where")} == {(method, flag) for method in edited for flag in ("suppress", "where")}, "each shows"
    assert "edits with --where all --suppress zero" in details_of(tmp_path)["head"]
