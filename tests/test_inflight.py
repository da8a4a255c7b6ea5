"""Requests of different personalities in one batch: each is what it would be alone, and gets what it asked for."""

import asyncio
import functools
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from conftest import FRAMED, tiny
from personality import Profile, UserError, attention, steer
from personality.inflight import PAGE, Engine, Request, Sampling, cache_blocks, chosen, nucleus, penalised
from personality.mlp import find_mlps
from personality.model import answers, prompt_ids, sampling
from personality.steer import Tables


def profile_of(small, seed: int) -> Profile:
    mlps = find_mlps(small.model)
    bias = torch.randn((len(mlps), mlps[0].width), generator=torch.Generator().manual_seed(seed))
    return Profile.dense(f"bias {seed}", bias=bias * (bias.abs() > 1.2))


@pytest.fixture
def alone(small):
    """What request 1 gets alone, unedited."""
    return expected(small, 1, None)


@pytest.fixture
def engine(small, alone):
    engine = Engine(lambda: (small.model, small.tokenizer), rows=4)
    yield engine
    engine.stop()
    assert "forward" not in vars(find_mlps(small.model)[0].module), "the model is left as it was"


def asked(k: int) -> list[dict]:
    return FRAMED.turns(" ".join(f"w{10 + (k * 7 + j) % 80}" for j in range(3 + k % 5)) + " ?")


def asking(small, k: int, profile=None) -> Request:
    return Request(prompt_ids(small.tokenizer, asked(k)), Sampling(), profile, 12)


async def whole(engine, request, after: float = 0.0) -> list[int]:
    await asyncio.sleep(after)
    ids = []
    async for ids in engine.write(request):
        pass
    return ids


def written(small, requests, rows=2, where="generated", together=True) -> list[list[int]]:
    """What an engine writes for these, all at once or one after the other."""
    async def scene():
        tasks = [whole(engine, request) for request in requests]
        return await asyncio.gather(*tasks) if together else [await task for task in tasks]

    engine = Engine(lambda: (small.model, small.tokenizer), rows, where)
    try:
        return asyncio.run(scene())
    finally:
        engine.stop()


def expected(small, k: int, profile, where="generated", length=12):
    with steer(small.model, profile or Profile.empty(), where=where):
        return answers(small.model, small.tokenizer, [asked(k)], length, **sampling())[0][1]


@pytest.mark.parametrize("where", ["generated", "all"])
def test_each_request_is_what_it_would_be_alone(small, where):
    """Eleven, of seven personalities and none, that come one after the other, four rows at a time: more of them than the tables
    have room for at once."""
    people = [None, *(profile_of(small, seed) for seed in range(7))]
    alone = [expected(small, k, people[k % 8], where) for k in range(11)]
    assert len({tuple(ids) for ids in alone[:8]}) > 4
    engine = Engine(lambda: (small.model, small.tokenizer), 4, where)
    try:
        async def all_of_them():
            requests = [asking(small, k, people[k % 8]) for k in range(11)]
            return await asyncio.gather(*(whole(engine, request, 0.004 * k) for k, request in enumerate(requests)))

        assert asyncio.run(all_of_them()) == alone
        assert not engine.requests and engine.tokens >= sum(map(len, alone))
    finally:
        engine.stop()


def test_a_long_prompt_is_read_in_parts(small, monkeypatch):
    """Chunks of a prompt are no answer's, wherever they are cut."""
    monkeypatch.setattr("personality.inflight.TOGETHER", 7)
    profile = profile_of(small, 3)
    alone = [expected(small, k, profile) for k in (0, 4)]
    engine = Engine(lambda: (small.model, small.tokenizer), 2)
    try:
        async def both():
            return await asyncio.gather(*(whole(engine, Request(prompt_ids(small.tokenizer, asked(k)), Sampling(), profile, 12))
                                          for k in (0, 4)))

        assert asyncio.run(both()) == alone
    finally:
        engine.stop()


def test_a_full_cache_changes_nothing(small, monkeypatch):
    """Requests that have to leave are read again, answer and all; what was an answer is edited as an answer."""
    monkeypatch.setattr("personality.inflight.cache_blocks", lambda *_: 3)
    people, texts = [profile_of(small, seed) for seed in range(3)], [" ".join(["w20 w31 w47 ?"] * (50 + k)) for k in range(3)]
    prompts, alone = [prompt_ids(small.tokenizer, FRAMED.turns(text)) for text in texts], []
    for text, profile in zip(texts, people):
        with steer(small.model, profile):
            alone.append(answers(small.model, small.tokenizer, [FRAMED.turns(text)], 90, **sampling())[0][1])
    engine, resets = Engine(lambda: (small.model, small.tokenizer), rows=3), []
    scheduler = engine.manager.batch_processor.scheduler
    waiting = scheduler.add_waiting_request
    scheduler.add_waiting_request = lambda state: (resets.append(state._true_initial_tokens), waiting(state))
    try:
        async def all_of_them():
            return await asyncio.gather(*(whole(engine, Request(ids, Sampling(), profile, 90))
                                          for ids, profile in zip(prompts, people)))

        assert asyncio.run(all_of_them()) == alone and any(resets), "none had to leave"
    finally:
        engine.stop()


def test_those_who_leave_a_full_cache_let_others_in(small, monkeypatch):
    """transformers lets nobody in where the cache was full, until somebody has finished: who is cancelled never does."""
    monkeypatch.setattr("personality.inflight.cache_blocks", lambda *_: 3)
    engine = Engine(lambda: (small.model, small.tokenizer), rows=3)
    scheduler, ids = engine.manager.batch_processor.scheduler, prompt_ids(small.tokenizer, FRAMED.turns("w20 w31 w47 " * 55))
    try:
        async def scene():
            hogs = [asyncio.ensure_future(whole(engine, Request(ids, Sampling(), None, 250))) for _ in range(3)]
            while not scheduler.block_new_requests and not all(hog.done() for hog in hogs):
                await asyncio.sleep(0.001)
            assert scheduler.block_new_requests, "the cache was never full"
            for hog in hogs:
                hog.cancel()
            return await asyncio.wait_for(whole(engine, Request(ids, Sampling(), None, 3)), 30)

        assert len(asyncio.run(scene())) == 3
    finally:
        engine.stop()


def test_who_goes_while_work_waits_harms_nobody(small, engine):
    async def scene():
        for _ in range(30):
            work = asyncio.ensure_future(engine.between(lambda: time.sleep(0.002)))
            await asyncio.sleep(0.001)
            work.cancel()
        return await engine.between(lambda: 7)

    assert asyncio.run(scene()) == 7 and engine.running()


def test_nothing_is_kept_of_those_who_leave(small, engine):
    async def scene():
        for k in range(12):
            leaver = asyncio.ensure_future(whole(engine, Request(prompt_ids(small.tokenizer, asked(k)), Sampling(), None, 300)))
            await asyncio.sleep(0.02)
            leaver.cancel()
            await asyncio.gather(leaver, return_exceptions=True)
        await whole(engine, Request([5, 6], Sampling(), None, 2))

    asyncio.run(scene())
    router = engine.manager.output_router
    assert not router.result_handlers and not engine.requests and not hasattr(router.output_queue, "get")


def test_a_leaver_frees_its_row(small, alone, engine):
    """Four endless answers hold the four rows; when their readers leave, a fifth gets in."""
    async def scene():
        ids = prompt_ids(small.tokenizer, asked(1))
        hogs = [asyncio.ensure_future(whole(engine, Request(ids, Sampling(), None, 400))) for _ in range(4)]
        await asyncio.sleep(0.3)
        assert len(engine.requests) == 4
        for hog in hogs:
            hog.cancel()
        await asyncio.gather(*hogs, return_exceptions=True)
        steps = engine.steps
        answer = await whole(engine, Request(ids, Sampling(), None, 2))
        return answer, engine.steps - steps

    answer, steps = asyncio.run(scene())
    assert answer == alone[:2] and steps <= 6 and not engine.requests
    assert not engine.manager.batch_processor.scheduler.active_requests


def test_work_between_steps_is_on_the_unedited_model(small, engine):
    ids = torch.tensor([prompt_ids(small.tokenizer, asked(2))])
    with torch.no_grad():
        plain = small.model(input_ids=ids).logits

    async def scene():
        writing = asyncio.ensure_future(whole(engine, Request(ids[0].tolist(), Sampling(), profile_of(small, 1), 200)))
        await asyncio.sleep(0.05)
        logits = await engine.between(lambda: small.model(input_ids=ids).logits)
        with pytest.raises(ZeroDivisionError):
            await engine.between(lambda: 1 / 0)
        writing.cancel()
        return logits

    assert torch.allclose(asyncio.run(scene()), plain, atol=1e-4)


def test_a_model_that_cannot_be_loaded():
    def load():
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        Engine(load)


LOADING = """
import os, signal, sys, torch
from personality.inflight import Engine

def load():
    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does
    while True:
        torch.ones(500, 500) @ torch.ones(500, 500)

try:
    Engine(load)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_while_a_model_loads():
    """The thread that loads can't be stopped: Python that ended under it would abort the process."""
    ended = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_an_error_in_a_step_reaches_who_waits(small, monkeypatch):
    engine = Engine(lambda: (small.model, small.tokenizer), rows=2)
    monkeypatch.setattr(Tables, "fill", lambda *_: 1 / 0)
    try:
        with pytest.raises(RuntimeError, match="division"):
            asyncio.run(whole(engine, Request([5, 6, 7], Sampling(), profile_of(small, 1), 4)))
        deadline = time.monotonic() + 20
        while engine.running() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not engine.running()
        with pytest.raises(UserError, match="has stopped"):
            asyncio.run(whole(engine, Request([5, 6, 7], Sampling(), None, 4)))
        with pytest.raises(UserError, match="has stopped"):
            asyncio.run(engine.between(lambda: 1))
    finally:
        engine.stop()


def test_work_that_comes_as_the_engine_ends_is_refused(small):
    """Between its last look for work and its thread's end; nobody would ever answer it."""
    engine, looked, go = Engine(lambda: (small.model, small.tokenizer), rows=2), threading.Event(), threading.Event()
    engine.ended = lambda: (looked.set(), go.wait(20))
    stopping = threading.Thread(target=engine.stop)
    stopping.start()
    assert looked.wait(20)
    try:
        with pytest.raises(UserError, match="has stopped"):
            asyncio.run(asyncio.wait_for(engine.between(lambda: 1), 5))
    finally:
        go.set()
        stopping.join()


# ------------------------------------------------------------------------------------------------------------- sampling


def request_of(**how):
    return Request([1, 2], Sampling(**{"repetition_penalty": 1.0, **how}))


def test_penalties():
    scores = torch.tensor([2.0, -1.0, 0.5, 3.0])
    like_generate = penalised(scores, request_of(repetition_penalty=2.0), [0, 1], [1, 3])
    assert like_generate.tolist() == [1.0, -2.0, 0.5, 1.5]
    openai = penalised(scores, request_of(frequency_penalty=0.5, presence_penalty=1.0), [0], [3, 3, 2])
    assert openai.tolist() == [2.0, -1.0, -1.0, 1.0], "of the answer only, the prompt's tokens are free"
    assert penalised(scores, request_of(), [0], [1]) is scores


@pytest.mark.parametrize("first", [2, 100])
def test_nucleus(first, monkeypatch):
    monkeypatch.setattr("personality.inflight.FIRST", first)
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    for top_p, kept in ((0.39, [1]), (0.41, [1, 2]), (0.75, [1, 2, 3]), (1e-6, [1])):
        left = nucleus(scores, top_p)
        assert left.isfinite().nonzero().flatten().tolist() == sorted(kept) and torch.equal(left[kept], scores[kept])


def test_draws_follow_the_probabilities_and_the_seed():
    scores, seeded = torch.tensor([0.2, 0.5, 0.3]).log(), request_of(temperature=1.0, seed=7)
    draws = [chosen(scores, seeded) for _ in range(3000)]
    shares = [draws.count(token) / len(draws) for token in range(3)]
    assert all(abs(share - p) < 4 * math.sqrt(p * (1 - p) / 3000) for share, p in zip(shares, (0.2, 0.5, 0.3)))
    again = request_of(temperature=1.0, seed=7)
    assert [chosen(scores, again) for _ in range(50)] == draws[:50]
    cold = request_of(temperature=0.1, seed=7)
    assert [chosen(scores, cold) for _ in range(50)].count(1) > 45
    assert [chosen(scores, request_of()) for _ in range(3)] == [1, 1, 1]


def test_logprobs_are_the_steered_models_own(small, engine):
    """Before penalties and temperature."""
    profile = profile_of(small, 5)
    request = Request(prompt_ids(small.tokenizer, asked(3)), Sampling(top_logprobs=2), profile, 5)
    ids = asyncio.run(whole(engine, request))
    whole_text = torch.tensor([request.ids + ids])
    edited = torch.zeros_like(whole_text, dtype=torch.bool)
    edited[0, len(request.ids):] = True
    engine.stop()
    with torch.no_grad(), steer(small.model, profile, where=edited):
        logprobs = small.model(input_ids=whole_text).logits[0, len(request.ids) - 1:-1].log_softmax(-1)
    assert len(request.logprobs) == len(ids)
    for k, (own, best) in enumerate(request.logprobs):
        assert own == pytest.approx(float(logprobs[k, ids[k]]), abs=1e-3)
        assert [token for token, _ in best] == logprobs[k].topk(2).indices.tolist()


def test_who_gives_no_seed_draws_anew_and_0_is_a_seed():
    def draw(**how):
        request = request_of(temperature=1.0, **how)
        return [chosen(torch.zeros(1000), request) for _ in range(5)]

    assert draw(seed=0) == draw(seed=0) != draw(seed=1) and draw() != draw()


def test_the_coldest_temperature_is_greedy():
    assert chosen(torch.tensor([0.2, 0.5, 0.3]).log(), request_of(temperature=1e-40, seed=1)) == 1


def test_nothing_is_read_from_another_personalitys_keys(small):
    """Of three that ask the same, edited from its beginning or not at all, with a prompt of more than a block."""
    prompt, people = [10 + k % 80 for k in range(PAGE + 40)], [*(profile_of(small, seed) for seed in range(2)), None]
    requests = [Request(prompt, Sampling(), who, 12) for who in people]
    assert written(small, requests, 2, "all", together=False)[1:] == written(small, requests[1:], 2, "all", together=False)


def test_every_row_has_room_for_a_whole_profile(small, monkeypatch):
    """Of the most neurons that a personality may have."""
    people = [profile_of(small, seed) for seed in range(4)]
    monkeypatch.setattr("personality.inflight.EDITS", max(map(len, people)))
    alone = [expected(small, k, profile) for k, profile in enumerate(people)]
    assert written(small, [asking(small, k, who) for k, who in enumerate(people)], rows=4) == alone


def test_who_has_gone_when_the_engine_ends_is_passed_over(small):
    engine, gone, there, ended = Engine(lambda: (small.model, small.tokenizer), rows=2), Future(), Future(), []
    engine.ended = lambda: ended.append(True)
    engine.stop()
    gone.cancel()
    for result in (gone, there):
        engine.jobs.put((lambda: 1, result))
    engine.refuse_jobs()
    assert ended and isinstance(there.exception(0), UserError)


def test_blocks_of_the_cache(small, monkeypatch):
    """For all rows at the model's longest, 512 tokens of 256 bytes; as many as fit; and never none."""
    assert cache_blocks(small.model, 8) == 8 * 512 // PAGE and cache_blocks(small.model, 1) == 4
    monkeypatch.setattr("personality.inflight.CACHE_BYTES", 5 * PAGE * 2 * 2 * 2 * 8 * 4 + 1)
    assert cache_blocks(small.model, 8) == 5


def test_top_p_is_of_the_heated_probabilities():
    """As generate() has it: at 0.5 the likeliest of 0.5, 0.3 and 0.2 has 0.66."""
    scores, request = torch.tensor([0.5, 0.3, 0.2]).log(), request_of(temperature=0.5, top_p=0.55, seed=3)
    assert {chosen(scores, request) for _ in range(60)} == {0}


def test_each_request_looks_at_its_own_keys(small, monkeypatch):
    """Whatever transformers calls when: no step of the engine attends to everybody's."""
    alone = [expected(small, k, None) for k in range(3)]
    monkeypatch.setattr("personality.attention.sdpa_attention_forward", lambda *_, **options: 1 / 0)
    assert written(small, [asking(small, k) for k in range(3)], rows=3) == alone


def test_what_that_attention_cannot_do_is_left_to_transformers(small, monkeypatch):
    """A bias of positions: over everybody's keys, behind a mask."""
    alone, own, seen = [expected(small, k, None) for k in range(3)], attention.sdpa_attention_forward, []
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.BY_ROW,
                        functools.partial(attention.attend_by_row, position_bias=torch.zeros(1)))
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **options: seen.append(args[2].shape[2]) or own(*args, **options))
    assert written(small, [asking(small, k) for k in range(3)], rows=3) == alone and max(seen) > 20


def test_the_attention_is_put_back(small):
    before = small.model.config._attn_implementation
    engine = Engine(lambda: (small.model, small.tokenizer), 2)
    inside = small.model.config._attn_implementation
    engine.stop()
    assert (before, inside, small.model.config._attn_implementation) == ("sdpa", "personality_by_row", "sdpa")


def steered_alike(model, small) -> bool:
    """Whether the engine says of this model what answers() does, with and without a personality."""
    other = SimpleNamespace(model=model, tokenizer=small.tokenizer)
    people = [None, profile_of(other, 3)]
    alone = [expected(other, k, who) for k, who in enumerate(people)]
    return written(other, [asking(small, k, who) for k, who in enumerate(people)]) == alone


def test_a_scale_of_a_models_own(small):
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.scaling = 3.0
    assert steered_alike(model, small)


def test_a_sliding_window(small):
    model = tiny("mistral", sliding_window=4)
    assert steered_alike(model, small)


def test_answers_that_grow_side_by_side_over_blocks(small):
    """Their blocks lie in turn: the keys of one that has several are gathered."""
    prompts, people = [[10 + (k * step) % 80 for k in range(PAGE - 20)] for step in (1, 3)], [profile_of(small, seed) for seed in (1, 2)]
    results = []
    for together in (False, True):
        requests = [Request(ids, Sampling(top_logprobs=0), who, 60) for ids, who in zip(prompts, people)]
        said = written(small, requests, together=together)
        results.append((said, [own for request in requests for own, _ in request.logprobs]))
    assert results[0][0] == results[1][0] and results[0][1] == pytest.approx(results[1][1], abs=1e-3)
