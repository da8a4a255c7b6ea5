"""identify.py with a server that writes the answers (--engine), and shared by several processes (torchrun)."""

import collections
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import identify
from conftest import Server, lines_of, main_of, prompt_of, run, save_bench, save_model, shared_flags
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
def test_an_engine_for_identify_as_a_function(small, tmp_path):
    with Server(engine_of(small)) as server:
        identify.identify(small.model, small.tokenizer, "extraversion", bench=str(small.bench_dir), limit=2, max_new_tokens=6,
                          out=str(tmp_path), engine=server.url)
        assert len(server.seen) == 4


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
