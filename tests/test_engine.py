"""identify.py with a server that writes the answers (--engine), and shared by several processes (torchrun)."""

import collections
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import identify
from conftest import ROOT, Server, contents, lines_of, main_of, prompt_of, run, save_bench, save_model, shared_flags
from personality import POLES, Neurons, UserError
from personality.model import NEXT_QUESTION

# ------------------------------------------------------------------------------------------------------------- engines


def engine_of(small):
    """The tiny model as a server: it answers token ids as identify.py itself would."""

    def reply(n, body):
        assert body["repetition_penalty"] == body["repeat_penalty"] == 1.1 and body["temperature"] == 0
        assert body["repeat_last_n"] > 4096, "llama.cpp's own is 64"
        prompt = torch.tensor([body["prompt"]])
        with torch.no_grad():
            output = small.model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=body["max_tokens"], do_sample=False,
                repetition_penalty=1.1, pad_token_id=small.tokenizer.pad_token_id)
        ids = output[0, prompt.shape[1]:].tolist()
        ended = small.tokenizer.eos_token_id in ids
        return [small.tokenizer.decode(ids, skip_special_tokens=True), "stop" if ended else "length"]

    return reply


def engine_flags(place, out, url):
    return (*shared_flags(place), "--trait", "extraversion", "--bench", place.bench_dir, "--max-new-tokens", "6",
            "--batch-size", "4", "--in-flight", "2", "--out", out, "--engine", url)


@pytest.mark.usefixtures("quick")
def test_an_engine_writes_the_answers(small, monkeypatch, tmp_path):
    stumbles = {2: (429, ""), 5: (500, ""), 8: (200, None)}
    replies = engine_of(small)
    with Server(lambda n, body: stumbles.get(n) or replies(n, body)) as server:
        main_of(identify, monkeypatch, *engine_flags(small, tmp_path / "engine", server.url))
        assert len(server.seen) == 24 + len(stumbles)
    run(small, tmp_path / "own", batch_size=1).identify()
    mine, own = (lines_of(tmp_path / name / "extraversion.answers.jsonl") for name in ("engine", "own"))
    asked = [[(line["pole"], line["question"], line["persona"]) for line in lines] for lines in (mine, own)]
    assert asked[0] == asked[1]
    assert all(a["answer"] == b["answer"] for a, b in zip(mine, own)), "greedy, so the engine wrote what generate() writes"
    assert {path.name for path in (tmp_path / "engine").iterdir()} == {"extraversion.safetensors", "extraversion.answers.jsonl",
                                                                       "engine.replies.jsonl"}
    # its statistics are those of the file of answers
    again = run(small, tmp_path / "again", answers=str(tmp_path / "engine" / "extraversion.answers.jsonl")).identify()
    neurons = Neurons.load(tmp_path / "engine" / "extraversion.safetensors", small.model)
    assert torch.equal(neurons.prob, again.prob) and neurons.meta["tokens"] == again.meta["tokens"]


@pytest.mark.usefixtures("quick")
def test_an_engine_that_dies_is_not_asked_twice(small, monkeypatch, tmp_path):
    """Killed after some answers, whose statistics were not saved: the answers were."""
    replies, alive, answered = engine_of(small), [True], collections.Counter()

    def until(n, body):
        if alive[0] and n > 9:
            return (400, "")
        answered[str(body["prompt"])] += 1
        return replies(n, body)

    with Server(until) as server:
        command = engine_flags(small, tmp_path, server.url)
        with pytest.raises(UserError, match="requests failed .*BadRequest"):
            main_of(identify, monkeypatch, *command)
        alive[0] = False
        main_of(identify, monkeypatch, *command, "--limit", "12")
        main_of(identify, monkeypatch, *command, "--limit", "6")  # other options, the same requests
    assert set(answered.values()) == {1} and len(answered) == 24


@pytest.mark.usefixtures("quick")
def test_an_engine_of_a_base_model(monkeypatch, tmp_path):
    place = SimpleNamespace(bench_dir=save_bench(tmp_path / "bench"), model_dir=save_model(tmp_path / "model", template=None))
    with Server(lambda n, body: "w20 w21 w22" if body["stop"] == [NEXT_QUESTION] else (400, "")) as server:
        main_of(identify, monkeypatch, *engine_flags(place, tmp_path / "out", server.url))
    assert all(line["answer"] == "w20 w21 w22" for line in lines_of(tmp_path / "out" / "extraversion.answers.jsonl"))


def test_like_lengths_are_read_together(small, tmp_path):
    """24 answers of 1 to 24 tokens, shuffled: hardly any padding, and the same counts as one by one."""
    lines = []
    for k, pole in zip(range(24), itertools.cycle(POLES)):
        length, token = 1 + 7 * k % 24, 12 + 7 * k % 24
        lines.append({"trait": "extraversion", "pole": pole, "persona": "w9 w10", "question": "w11 ?",
                      "answer": " ".join([f"w{token}"] * length), "ids": [token] * length})
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shapes, decoder = [], small.model.get_decoder()
    seen = lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
    hook = decoder.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        together = run(small, tmp_path / "a", answers=str(path), batch_size=4).identify()
    finally:
        hook.remove()
    prompt = len(prompt_of(small, "w11 ?", "w9 w10"))
    assert shapes == [(4, prompt + longest - 1) for longest in (4, 8, 12, 16, 20, 24)]
    single = run(small, tmp_path / "b", answers=str(path), batch_size=1).identify()
    assert torch.equal(together.prob, single.prob) and together.meta["tokens"] == single.meta["tokens"]
    kept = lines_of(tmp_path / "a" / "extraversion.answers.jsonl")
    assert [line["ids"] for line in kept] == [line["ids"] for line in lines], "order is kept"


# ------------------------------------------------------------------------------------------------------------ torchrun


def test_shares_are_whole_steps():
    for number, step, size in ((24, 8, 2), (25, 8, 3), (7, 8, 2), (100, 1, 7), (0, 4, 2)):
        parts = [identify.World(rank, size).share(number, step) for rank in range(size)]
        assert [k for part in parts for k in part] == list(range(number))
        assert all(part.start % step == 0 for part in parts if len(part))


def test_leftovers_of_fewer_processes_replace_nothing(small, tmp_path):
    """Killed alone, finished by two, started again alone: the answers of two stay."""
    first, calls = run(small, tmp_path), itertools.count(1)

    def interrupt(module, args):
        if next(calls) == 8:  # in the second batch
            raise KeyboardInterrupt

    hook = small.model.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            first.identify()
    finally:
        hook.remove()
    first.save()
    left = {path.name for path in tmp_path.iterdir()}
    assert any(name.endswith("answers.part") for name in left) and any(name.endswith("state.safetensors") for name in left)
    run(small, tmp_path / "whole").identify()
    for path in (tmp_path / "whole").iterdir():  # as two processes would leave them
        path.rename(tmp_path / path.name)
    before = contents(tmp_path)
    run(small, tmp_path).identify()
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"extraversion.safetensors", "extraversion.answers.jsonl", "whole"}


def torchrun(small, out, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "identify.py",
               *map(str, shared_flags(small)), "--bench", str(small.bench_dir), "--batch-size", "4", "--out", str(out),
               *map(str, more)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def rank_of(process, rank):
    """The id of a process that torchrun has started."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return next(int(child) for child in children if f"RANK={rank}" in open(f"/proc/{child}/environ").read().split("\0"))


def test_two_processes_equal_one(small, made, tmp_path):
    """One of two is killed in the middle of the second trait: the other stops and says so. The next start goes on, and in the end
    there is what one process makes: of a trait that ran through and of one that was interrupted."""
    answers, some, out = tmp_path / "answers.jsonl", (made / "extraversion.answers.jsonl").read_text(), tmp_path / "two"
    answers.write_text(some.replace('"extraversion"', '"openness"') * 3 + some * 100)
    flags = ("--answers", answers, "--trait", "openness", "extraversion")
    process = torchrun(small, out, *flags)
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None and not [
            part for part in out.glob(".extraversion.*.1of2.answers.part") if part.stat().st_size]:
        time.sleep(0.02)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "another rank has ended" in said and "same command goes on" in said, said
    assert "Traceback" not in said.partition("another rank has ended")[0] and not (out / "extraversion.safetensors").exists()
    assert said.count("openness.safetensors") == 1, "one process speaks"
    whole = contents(out, "openness")

    process = torchrun(small, out, *flags)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "openness.safetensors is there, made with the same" in said and contents(out, "openness") == whole
    assert said.count("extraversion.safetensors") == 1, "one process speaks"
    assert {path.name for path in out.iterdir()} == {*whole, "extraversion.safetensors", "extraversion.answers.jsonl"}
    for trait in ("openness", "extraversion"):
        alone = run(small, tmp_path / "one", trait, answers=str(answers), max_new_tokens=64).identify()
        two = Neurons.load(out / f"{trait}.safetensors", small.model)
        assert torch.equal(alone.prob, two.prob) and torch.equal(alone.p95, two.p95)
        assert torch.allclose(alone.mean, two.mean, rtol=1e-6)
        assert alone.meta["tokens"] == two.meta["tokens"] and alone.meta["key"] == two.meta["key"]
        name = f"{trait}.answers.jsonl"
        assert contents(out, trait)[name] == contents(tmp_path / "one", trait)[name]
