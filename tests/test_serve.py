"""The server: OpenAI's client against it, every refusal, clients that go, stall or send garbage, and the page in a browser."""

import asyncio
import concurrent.futures
import contextlib
import gc
import importlib
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy
import openai
import pytest
import torch
import transformers
import uvicorn

import induce
from conftest import FRAMED, ROOT, exit_of, run
from personality import Character, Neurons, Profile, UserError, serve, steer
from personality.answering import Choice, Server, Text
from personality.api import ChatBody, CompletionBody, whole_bytes
from personality.inflight import Request
from personality.methods import Profiles, affordable, multiple_at
from personality.model import answers, sampling
from personality.neurons import NeuronFolder
from personality.people import People
from personality.serve import IDLE, KEY, application, ended_by_engine, listening, page
from personality.serve import arguments as arguments_of_the_program
from personality.train import add_trained

# httpx or httpx2: what this version of openai is built on
httpx = importlib.import_module(next(
    kind for kind in openai.DefaultHttpxClient.__mro__ if kind.__name__ == "Client").__module__.split(".")[0])
CHARACTERS = {"ada": 'name = "Ada"\nmethod = "trained"\n[traits]\nextraversion = 1\nopenness = -0.7\n',
              "bob": "[traits]\nextraversion = 2\n",
              "cyd": 'method = "activation"\n[traits]\nextraversion = 1\nopenness = 1\n'}


def arguments(small, neurons, **changes):
    return SimpleNamespace(**{**dict(
        model=str(small.model_dir), device="cpu", dtype="float32", device_map=None, quantize=None, batch_size=64,
        frame="person", neurons=str(neurons), min_delta=0.1, min_neurons=None,
        suppress="cap", where="generated", characters=None, host="127.0.0.1", port=0, api_key=None, rows=8, queue=40,
        served_model="tiny", max_new_tokens=None, seed=0), **changes})


@contextlib.contextmanager
def serving(args):
    """A server in this process; yields (server, its address)."""
    with listening(args) as listener:
        server = Server(args)
        web = uvicorn.Server(uvicorn.Config(application(server), log_level="error", access_log=False, lifespan="off",
                                            timeout_graceful_shutdown=5, timeout_keep_alive=IDLE))
        thread = threading.Thread(target=lambda: asyncio.run(web.serve([listener])))
        thread.start()
        try:
            yield server, "http://127.0.0.1:%d" % listener.getsockname()[1]
        finally:
            web.should_exit = True
            thread.join()
            server.engine.stop()


@pytest.fixture(scope="module")
def neurons(small, tmp_path_factory):
    """Two traits with trained edits, and a folder of characters beside them."""
    out = tmp_path_factory.mktemp("served")
    for trait in ("extraversion", "openness"):
        add_trained(small.model, small.tokenizer, small.bench, run(small, out, trait).identify())
    (out / "characters").mkdir()
    for name, text in CHARACTERS.items():
        (out / "characters" / f"{name}.toml").write_text(text)
    return out


@pytest.fixture(scope="module")
def served(small, neurons):
    with serving(arguments(small, neurons, characters=str(neurons / "characters"))) as (server, url):
        yield SimpleNamespace(server=server, url=url, client=openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0))


def asked(k: int = 0) -> list[dict]:
    return FRAMED.turns(" ".join(f"w{10 + (k * 7 + j) % 80}" for j in range(3 + k % 5)) + " ?")


def expected(small, neurons, k: int, character, length=10) -> str:
    """What induce.py says."""
    profiles = Profiles(small.model, small.tokenizer, NeuronFolder(small.model, str(neurons), frame=FRAMED))
    with steer(small.model, profiles.of(character) if character else Profile.empty()):
        return answers(small.model, small.tokenizer, [asked(k)], length, **sampling())[0][0]


def post(served, path="/v1/chat/completions", content=None, headers=None, **body):
    body = {"messages": asked(), "max_tokens": 4, **body} if "chat" in path and content is None else body
    data = json.dumps(body).encode() if content is None else content
    return httpx.post(served.url + path, content=data, headers={"content-type": "application/json", **(headers or {})}, timeout=60)


# --------------------------------------------------------------------------------------------------- OpenAI's own client


def test_nobody_waits_for_a_mean_difference(small, neurons, tmp_path):
    """It is read when the server starts, for the characters; else a request of it is refused."""
    people = People(arguments(small, neurons))
    people.take(small.model, small.tokenizer)
    with pytest.raises(UserError, match="activation: .* none of that method has extraversion"):
        people.of(Character({"extraversion": 1.0}, "activation"))
    (tmp_path / "dan.toml").write_text('method = "activation"\n[traits]\nneuroticism = 1\nopenness = 0\n')
    people = People(arguments(small, neurons, characters=str(tmp_path)))
    people.load()  # of whom there is no neuron file, or who asks for 0, does not keep the server from starting
    assert not people.profiles.directions


def test_thirty_two_requests_of_thirty_two_personalities(small, neurons, served):
    """At once, streamed and whole in turn: each is to the letter what induce.py says."""
    people = [None] + [Character({"extraversion": round(-1.5 + k / 10, 2)}, "trained") for k in range(22)] + [
        Character({"extraversion": 2.0, "openness": -1.0}, "activation"), Character({"extraversion": -4.0}, "dpn-le"),
        Character({"extraversion": 3.0}, "npti", (1, 1))] + [
        Character({"extraversion": 0.5, "openness": -k / 4}, "trained") for k in range(1, 4)] + [
        Character({"extraversion": alpha}, "npti") for alpha in (-2.0, 1.0, 2.0)]
    assert len(people) == 32

    def ask(k):
        who = people[k]
        extra = {"personality": {"traits": who.strengths, "method": who.method, "layers": who.layers}} if who else {}
        reply = served.client.chat.completions.create(model="tiny", messages=asked(k), max_tokens=10, extra_body=extra, stream=k % 2 == 1)
        if k % 2:
            parts = list(reply)
            assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason in ("stop", "length")
            return "".join(part.choices[0].delta.content or "" for part in parts)
        if who:
            assert reply.model_extra["personality"]["traits"] == who.strengths
            assert reply.model_extra["personality"]["method"] == who.method
        return reply.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        said = list(pool.map(ask, range(32)))
    reference = subprocess_free(small, neurons, people)
    assert said == reference and len(set(reference)) > 16


def subprocess_free(small, neurons, people):
    """In a model of its own: the served one is steered."""
    from personality import load_model

    model, tokenizer = load_model(str(small.model_dir), "cpu", "float32")
    own = SimpleNamespace(model=model, tokenizer=tokenizer)
    return [expected(own, neurons, k, who) for k, who in enumerate(people)]


def test_layers_are_a_part_of_who_is_asked_for():
    """Each has edits of its own, and the same ones when it comes again."""
    people = People(SimpleNamespace(frame="none", characters=None))
    people.kept, people.traits, made = {}, {"openness": 1}, []
    people.profiles = SimpleNamespace(directions={}, of=lambda who: made.append(who) or Profile.empty(str((who.method, who.layers, who.model))))
    asked = [Character({"openness": 1.0}, *more) for more in (("npti", (0, 0)), ("npti", (1, 1)), ("dpn-le", (1, 1)), ("npti", (1, 1), "m"))]
    assert len({people.of(who)[0].name for who in asked}) == 4 and [people.of(who)[0] for who in asked] and len(made) == 4


def test_penalties_keep_their_names():
    from personality.api import ChatBody

    how = ChatBody(messages=[{"role": "user", "content": "x"}], frequency_penalty=2, presence_penalty=0.5).sampling(0)
    assert (how.frequency_penalty, how.presence_penalty) == (2, 0.5)


def test_the_model_name_can_hold_the_personality(served):
    ask = lambda model, **extra: served.client.chat.completions.create(  # noqa: E731
        model=model, messages=asked(), max_tokens=8, extra_body=extra).choices[0].message.content
    assert ask("tiny+extraversion=-1.5") == ask("tiny", personality="extraversion=-1.5") != ask("tiny")
    assert ask("tiny+ada") == ask("tiny", personality="ada") == ask("TINY", personality={"extraversion": 1, "openness": -0.7})
    assert ask("tiny+npti:extraversion=2") == ask("tiny", personality="bob")
    assert {model.id for model in served.client.models.list()} == {"tiny", "tiny+ada", "tiny+bob", "tiny+cyd"}


def test_streams_have_openais_form(served):
    parts = list(served.client.chat.completions.create(
        model="tiny+ada", messages=asked(), max_completion_tokens=6, n=2, temperature=1, seed=5, stream=True, logprobs=True,
        top_logprobs=3, stream_options={"include_usage": True}))
    usage, chunks = parts[-1].usage, [choice for part in parts for choice in part.choices]
    assert {chunk.index for chunk in chunks} == {0, 1} and usage.completion_tokens <= 12
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens and parts[-1].choices == []
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert own[0].delta.role == "assistant" and [chunk.finish_reason for chunk in own[:-1]] == [None] * (len(own) - 1)
        tokens = [token for chunk in own if chunk.logprobs for token in chunk.logprobs.content]
        assert len(tokens) <= 6 and all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    again = list(served.client.chat.completions.create(model="tiny+ada", messages=asked(), max_completion_tokens=6, n=2,
                                                       temperature=1, seed=5, stream=True))
    text = lambda found, index: "".join(choice.delta.content or "" for part in found for choice in part.choices  # noqa: E731
                                        if choice.index == index)
    assert [text(parts, k) for k in (0, 1)] == [text(again, k) for k in (0, 1)] and text(parts, 0) != text(parts, 1)
    raw = post(served, stream=True).text.split("\n\n")
    assert raw[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in raw[:-1])


def test_stop_strings_end_an_answer_before_they_show(served):
    whole = served.client.chat.completions.create(model="tiny", messages=asked(), max_tokens=10).choices[0].message.content.split()
    assert len(set(whole)) > 3
    stop = " " + whole[3]
    for stream in (False, True):
        reply = served.client.chat.completions.create(model="tiny", messages=asked(), max_tokens=10, stop=[stop, "never"], stream=stream)
        text = reply.choices[0].message.content if not stream else "".join(part.choices[0].delta.content or "" for part in reply)
        assert text == " ".join(whole[:3])
    assert post(served, stop=stop, max_tokens=10).json()["choices"][0]["finish_reason"] == "stop"


def test_completions(small, served):
    ids = small.tokenizer("w10 w11 w12")["input_ids"]
    one = served.client.completions.create(model="tiny", prompt="w10 w11 w12", max_tokens=5, logprobs=2)
    two = served.client.completions.create(model="tiny", prompt=[ids, "w13 w14"], max_tokens=5, n=2)
    assert one.choices[0].text == two.choices[0].text == two.choices[1].text and [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert len(one.choices[0].logprobs.token_logprobs) == one.usage.completion_tokens == 5
    parts = list(served.client.completions.create(model="tiny", prompt="w10 w11 w12", max_tokens=5, stream=True))
    assert "".join(part.choices[0].text for part in parts) == one.choices[0].text


def test_penalties_are_heeded(served):
    bare = post(served, max_tokens=24, repetition_penalty=1).json()["choices"][0]["message"]["content"].split()
    for more in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 3}):
        words = post(served, max_tokens=24, **{"repetition_penalty": 1, **more}).json()["choices"][0]["message"]["content"].split()
        assert len(set(words)) > len(set(bare))


def test_perplexity_is_the_unedited_models(small, served):
    from personality import load_model
    from personality.model import prompt_ids

    model, tokenizer = load_model(str(small.model_dir), "cpu", "float32")
    reply = post(served, personality="extraversion=1.5", perplexity=True, max_tokens=8).json()["choices"][0]
    prompt, ids = prompt_ids(tokenizer, asked()), tokenizer(reply["message"]["content"])["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
    assert reply["perplexity"] == pytest.approx(math.exp(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids)))), rel=1e-3)


def test_what_a_character_is_made_of(small, neurons, served):
    found = post(served, "/v1/personality", personality="ada").json()
    file = Neurons.load(neurons / "extraversion.safetensors", small.model)
    assert found["method"] == "trained" and found["range"] == [-1, 1]
    doses = file.dose[0].double(), Neurons.load(neurons / "openness.safetensors", small.model).dose[1].double()
    grown = [numpy.interp(multiple_at(dose, level), [0, *dose[:, 0]], [0, *dose[:, 2].log()]) for dose, level in zip(doses, (1, 0.7))]
    assert found["expected_perplexity"] == pytest.approx(math.exp(sum(grown)), abs=1e-3)
    assert max(grown) <= math.log(1.3) + 1e-6
    both = [(file, 1.0), (Neurons.load(neurons / "openness.safetensors", small.model), -0.7)]
    assert found["share"] == pytest.approx(affordable(both), abs=1e-3)
    assert sum(found["layers"].values()) == found["neurons"] >= len(file.high_bias)
    assert post(served, "/v1/personality", personality="bob").json()["method"] == "npti"
    there = httpx.get(served.url + "/v1/personality").json()
    assert set(there["traits"]) == {"extraversion", "openness"} and there["characters"]["ada"]["traits"]["openness"] == -0.7
    assert there["frame"]["system"] == FRAMED.system


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("body", "named"), [
    ({"tools": []}, "tools"), ({"logit_bias": {}}, "logit_bias"), ({"response_format": {"type": "text"}}, "response_format"),
    ({"temperature": 3}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n:"), ({"n": 99}, "n:"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 4}, "max_completion_tokens"), ({"stop": [""]}, "stop"), ({"stop": ["a"] * 17}, "stop"),
    ({"frequency_penalty": 9}, "frequency_penalty"), ({"top_logprobs": 2}, "logprobs"), ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role"), ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "name"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "tool_calls"), ({"max_tokens": "3"}, "max_tokens"), ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"personality": "nobody"}, "ada, bob"), ({"personality": "../../etc/passwd"}, "personality"), ({"personality": "extraversion=x"}, "personality"),
    ({"personality": "extraversion=1,extraversion=1"}, "personality"), ({"personality": {"traits": {"charm": 1}}}, "charm"),
    ({"personality": {"traits": {"extraversion": 1}, "method": "magic"}}, "magic"), ({"personality": {"extraversion": 1e9}}, "extraversion"),
    ({"personality": "neuroticism=1"}, "neuroticism"), ({"personality": 7}, "personality"), ({"personality": "dpn:extraversion=1"}, "dpn"),
    ({"model": "tiny+ada", "personality": "bob"}, "model's name"), ({"max_tokens": 10_000}, "context"), ({"seed": 1.5}, "seed")])
def test_refused_by_name(served, body, named):
    reply = post(served, **body)
    assert reply.status_code == 400 and named in reply.json()["error"]["message"]
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_other_refusals(served):
    for name in ("gpt-5", "gpt-5+ada", "tiny+", "+", "+ada", "tinyada"):
        assert post(served, model=name).status_code == 404
    assert len(post(served, personality={"traits": {"x" * 100_000: 1}}).content) < 1000
    assert post(served, "/v1/completions", prompt=["w10"] * 16, n=16).status_code == 400, "more than there will ever be room for"
    assert httpx.get(served.url + "/v1/nothing").status_code == 404 and httpx.get(served.url + "/v1/chat/completions").status_code == 405
    assert post(served, content=b"{").status_code == 400 and post(served, content=b"[]").status_code == 400
    assert post(served, content=b"\xff\xfe").status_code == 400
    assert post(served, content=b" " * (1 << 20) + b"{}").status_code == 413
    assert post(served, headers={"content-type": "text/plain"}).status_code == 415
    assert post(served, headers={"host": "evil.example"}).status_code == 403
    assert post(served, "/v1/completions", prompt=[]).status_code == 400
    assert post(served, "/v1/completions", prompt=[10 ** 6]).status_code == 400
    with pytest.raises(openai.BadRequestError, match="tools"):
        served.client.chat.completions.create(model="tiny", messages=asked(), tools=[])


def test_a_reply_can_be_given_back(served):
    """As OpenAI's client does it, with all the fields that its messages have."""
    said = served.client.chat.completions.create(model="tiny", messages=asked(), max_tokens=5).choices[0].message
    more = [*asked(), said, {"role": "user", "content": [{"type": "text", "text": "w10 ?"}]}]
    assert served.client.chat.completions.create(model="tiny", messages=more, max_tokens=3).choices


def test_names_stay_with_who_gave_them(served):
    traits = {"traits": {"extraversion": 0.31}}
    mine = post(served, "/v1/personality", personality={**traits, "name": "mine"}).json()
    assert mine["name"] == "mine" and post(served, "/v1/personality", personality=traits).json()["name"] == ""
    assert post(served, personality="ada").json()["personality"]["name"] == "Ada"
    assert post(served, "/v1/personality", personality="extraversion=40").json()["expected_perplexity"] is None, "never tried"


def test_logprobs_are_of_their_chunk(served):
    parts = list(served.client.chat.completions.create(model="tiny", messages=asked(), max_tokens=10, stream=True, logprobs=True))
    for part in parts:
        choice = part.choices[0]
        if choice.delta.content:
            assert "".join(token.token for token in choice.logprobs.content) == choice.delta.content
    whole = served.client.chat.completions.create(model="tiny", messages=asked(), max_tokens=10).choices[0].message.content.split()
    cut = served.client.chat.completions.create(model="tiny", messages=asked(), max_tokens=10, logprobs=True, stop=" " + whole[3])
    assert "".join(token.token for token in cut.choices[0].logprobs.content) == " ".join(whole[:3]), "no token of the stop string"
    told = served.client.completions.create(model="tiny", prompt="w10 w11", max_tokens=5, logprobs=1).choices[0].logprobs
    assert len(told.text_offset) == len(told.tokens) == 5 and told.text_offset[0] == 0
    assert all(token in best for token, best in zip(told.tokens, told.top_logprobs))


def test_too_much_for_the_tables_is_refused(small, neurons, monkeypatch):
    monkeypatch.setattr("personality.inflight.EDITS", 3)
    monkeypatch.setattr("personality.inflight.SHARE", 0.0)
    with serving(arguments(small, neurons)) as (server, url):
        served = SimpleNamespace(url=url)
        reply = post(served, personality="npti:extraversion=1")
        assert reply.status_code == 400 and "room for 3" in reply.json()["error"]["message"]
        assert post(served, personality="extraversion=1").status_code in (200, 400) and server.engine.running()


def test_more_than_the_cache_holds_is_refused(small, neurons, monkeypatch):
    monkeypatch.setattr("personality.inflight.cache_blocks", lambda *_: 2)
    with serving(arguments(small, neurons)) as (server, url):
        served = SimpleNamespace(url=url)
        assert server.most == 256 and post(served, max_tokens=250).status_code == 400
        assert post(served, max_tokens=30).json()["usage"]["completion_tokens"] > 0


def test_hanging_up_while_perplexity_is_asked_for(served):
    host, port = served.url.removeprefix("http://").split(":")
    for k in range(20):
        with socket.create_connection((host, int(port))) as line:
            line.sendall(request_of({"messages": asked(), "max_tokens": 3, "stream": True, "perplexity": True}))
            time.sleep(0.01 + 0.002 * k)
    idle(served)
    assert served.server.engine.running() and post(served, perplexity=True).json()["choices"][0]["perplexity"] > 1


def test_a_full_queue(small, neurons):
    with serving(arguments(small, neurons, rows=1, queue=1)) as (server, url):
        served = SimpleNamespace(url=url)
        ask = lambda _: post(served, max_tokens=200, personality="extraversion=1").status_code  # noqa: E731
        with concurrent.futures.ThreadPoolExecutor(12) as pool:  # all at once, before any is written
            codes = list(pool.map(ask, range(12)))
        assert set(codes) == {200, 429} and server.taken == 0
        hogs = [threading.Thread(target=lambda: post(served, max_tokens=400)) for _ in range(2)]
        for hog in hogs:
            hog.start()
        deadline = time.monotonic() + 10
        while len(server.engine.requests) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        reply = post(served)
        assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
        for hog in hogs:
            hog.join()
        assert post(served).status_code == 200


def test_an_engine_that_died(small, neurons):
    """Who is being answered and who comes later are told, and so is /health."""
    with serving(arguments(small, neurons)) as (server, url):
        served = SimpleNamespace(url=url)
        assert httpx.get(url + "/health").status_code == 200
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(post, served, max_tokens=400, stream=stream) for stream in (False, True)]
            deadline = time.monotonic() + 10

            def wait_for(happened):
                while not happened() and time.monotonic() < deadline:
                    time.sleep(0.002)

            wait_for(lambda: server.taken == 2)
            there = server.engine.tokens
            wait_for(lambda: server.engine.tokens >= there + 10)  # both are being answered
            server.engine.manager.batch_processor.prepare_next_batch = lambda: 1 / 0
            server.engine.thread.join(20)
            whole, stream = (reply.result() for reply in waiting)
        assert whole.status_code == 500 and whole.json()["error"]["type"] == "server_error"
        assert '"error"' in stream.text.strip().split("\n\n")[-1]
        assert httpx.get(url + "/health").status_code == 503
        assert post(served).status_code == post(served, personality="extraversion=1").status_code == 503


def test_the_key(small, neurons, monkeypatch):
    with serving(arguments(small, neurons, api_key="s3cret")) as (_, url):
        served = SimpleNamespace(url=url)
        assert post(served).status_code == 401 and post(served, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert post(served, headers={"authorization": "Bearer s3cret"}).status_code == 200
        assert httpx.get(url + "/").status_code == httpx.get(url + "/health").status_code == 200
        assert httpx.get(url + "/metrics").status_code == 401
    for host in ("0.0.0.0", "192.0.2.1", "example.org"):
        with pytest.raises(UserError, match=KEY):
            listening(arguments(small, neurons, host=host))
    with serving(arguments(small, neurons, host="127.0.0.2")) as (_, url):
        assert httpx.get(url.replace("127.0.0.1", "127.0.0.2") + "/health").status_code == 200
    with listening(arguments(small, neurons)) as taken, pytest.raises(UserError, match="in use"):
        listening(arguments(small, neurons, port=taken.getsockname()[1]))


# -------------------------------------------------------------------------------------------------- clients that misbehave


def raw(served, data: bytes, wait: float = 0.0) -> bytes:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(data)
        time.sleep(wait)
        line.shutdown(socket.SHUT_WR)
        return line.recv(4096)


def request_of(body: dict) -> bytes:
    data = json.dumps(body).encode()
    return (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data)) + data


def idle(served) -> None:
    deadline = time.monotonic() + 10
    while served.server.engine.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not served.server.engine.requests


def test_garbage_and_half_requests(served, caplog):
    assert b"400" in raw(served, b"\x16\x03\x01\x00garbage\r\n\r\n")
    raw(served, request_of({"messages": asked()})[:-10])
    raw(served, b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
    assert post(served).status_code == 200 and "Traceback" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_row(served, stream):
    before, tokens = served.server.counts["cancelled"], served.server.engine.tokens
    host, port = served.url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)))
    line.sendall(request_of({"messages": asked(), "max_tokens": 450, "stream": stream}))
    deadline = time.monotonic() + 10
    while served.server.engine.tokens < tokens + 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    line.close()
    idle(served)
    assert served.server.counts["cancelled"] == before + 1 and served.server.engine.tokens < tokens + 440


def test_a_slow_reader_holds_up_nobody(served):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        line.sendall(request_of({"messages": asked(), "max_tokens": 100, "stream": True}))
        for _ in range(5):
            line.recv(1)
            begin = time.monotonic()
            assert post(served).status_code == 200 and time.monotonic() - begin < 5
    idle(served)


def test_metrics_count(served):
    read = lambda: dict(line.rsplit(" ", 1) for line in httpx.get(served.url + "/metrics").text.splitlines()  # noqa: E731
                        if not line.startswith("#"))
    before = read()
    post(served, max_tokens=4)
    post(served, tools=[])
    after = read()
    grown = lambda name: float(after[name]) - float(before.get(name, 0))  # noqa: E731
    assert grown("personality_tokens_total") == 4 and grown('personality_replies_total{code="400"}') == 1
    assert float(after["personality_requests_in_flight"]) == 0


# ------------------------------------------------------------------------------------------------------------ the process


def start(small, neurons, *more):
    process = subprocess.Popen([sys.executable, "-m", "personality.serve", "--model", small.model_dir, "--device", "cpu", "--dtype",
                                "float32", "--neurons", neurons, "--port", "0", "--served-model", "tiny", *map(str, more)],
                               cwd=ROOT, stderr=subprocess.PIPE, text=True)
    before = []
    for line in process.stderr:  # torchao, say, where it is installed, has something to say before
        if line.startswith("tiny: http://"):
            break
        before.append(line)
    else:
        raise AssertionError("".join(before))
    return process, SimpleNamespace(url=line.split()[1].rstrip("/"))


@pytest.mark.parametrize("early", (True, False))
def test_a_server_whose_engine_died_goes(small, neurons, monkeypatch, early):
    """So that whoever watches over it starts it anew; early: while the routes are made."""

    def die():
        servers[0].engine.manager.batch_processor.prepare_next_batch = lambda: 1 / 0
        servers[0].engine.manager._wake_up_loop.set()

    def routes(server):
        if early:
            die()
            server.engine.thread.join(20)
        return application(server)

    args = arguments(small, neurons)
    monkeypatch.setattr(serve, "Server", lambda args: servers.append(Server(args)) or servers[0])
    monkeypatch.setattr(serve, "application", routes)
    servers, errors = [], []

    def run():
        try:
            serve.serve(args)
        except UserError as error:
            errors.append(str(error))

    monkeypatch.setattr("uvicorn.Server.capture_signals", lambda self: contextlib.nullcontext())  # of the main thread only
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not servers and thread.is_alive():
        time.sleep(0.01)
    if not early:
        time.sleep(0.3)
        die()
    thread.join(20)
    assert not thread.is_alive() and errors == ["the engine has stopped: division by zero"]


def test_sigterm_finishes_what_runs_and_a_killed_server_starts_again(small, neurons):
    process, served = start(small, neurons)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(post, served, max_tokens=300, personality="extraversion=1")
        line = "personality_requests_in_flight 1"
        while line not in httpx.get(served.url + "/metrics").text and not reply.done():
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert reply.result().json()["usage"]["completion_tokens"] > 0
    assert process.wait(20) in (0, -signal.SIGTERM) and "Traceback" not in process.stderr.read()
    process, served = start(small, neurons)
    assert post(served).status_code == 200
    process.kill()
    process.wait(20)
    process, served = start(small, neurons)
    assert post(served).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("begun", (True, False))
def test_what_is_written_when_the_server_ends_is_told_so(small, neurons, capfd, begun):
    """In a line of the stream, or by a 503, not by a connection that is cut, nor by a traceback."""
    with serving(arguments(small, neurons)) as (server, url), concurrent.futures.ThreadPoolExecutor(1) as pool:
        processor = server.engine.manager.batch_processor
        step = processor.prepare_next_batch
        processor.prepare_next_batch = lambda: (time.sleep(0.05), step())[1]
        whole = pool.submit(post, SimpleNamespace(url=url), max_tokens=400)
        body = json.dumps({"messages": asked(), "max_tokens": 400, "stream": True})
        with httpx.stream("POST", url + "/v1/chat/completions", content=body, timeout=30, headers={"content-type": "application/json"}) as reply:
            lines = reply.iter_lines()
            assert "assistant" in next(lines)
            while len(server.engine.requests) < 2 or begun and server.engine.tokens < 20:
                time.sleep(0.01)
            server.engine.stop()
            said = list(lines)
        assert "the server was stopped" in said[-2] + said[-1] and "[DONE]" not in "".join(said)
        reply = whole.result()
        assert reply.status_code == 503 and reply.json()["error"]["message"] == "the server was stopped"
    assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_waits_once(monkeypatch, capsys):
    monkeypatch.setattr("personality.serve.PATIENCE", 60)
    stopped, ended = [], []
    engine = SimpleNamespace(requests={"a": 1, "b": 2}, stop=lambda: stopped.append(True))
    web = ended_by_engine(SimpleNamespace(handle_exit=lambda *given: ended.append(given), force_exit=False), engine)
    web.handle_exit(signal.SIGINT, None)
    assert ended == [(signal.SIGINT, None)] and not stopped and "waiting up to 60 seconds for what is being written; Ctrl-C again" in capsys.readouterr().err
    web.handle_exit(signal.SIGTERM, None)
    assert not stopped and ended.pop() == (signal.SIGTERM, None), "a supervisor's word is no second Ctrl-C"
    web.handle_exit(signal.SIGINT, None)
    assert happens(lambda: web.force_exit) and stopped == [True] and len(ended) == 1, "what is written ends, and then whoever is connected"
    web.handle_exit(signal.SIGINT, None)
    assert len(ended) == 2, "the third time nobody is waited for"
    monkeypatch.setattr("personality.serve.PATIENCE", 0.05)
    ended_by_engine(SimpleNamespace(handle_exit=lambda *given: None), engine).handle_exit(signal.SIGTERM, None)
    assert happens(lambda: stopped == [True, True])


def happens(thing, seconds=20) -> bool:
    end = time.monotonic() + seconds
    while not thing() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(thing())


def test_ctrl_c_twice_ends_it_whoever_is_connected(small, neurons):
    """Also one whose body does not come."""
    process, served = start(small, neurons)
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 130 and "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(("flags", "named"), [
    (("--serve", "--trait", "extraversion"), "--serve"), (("--serve", "--level", "1"), "--serve"), (("--characters", "x"), "--serve"),
    (("--serve", "--chat"), "not allowed"), (("--serve", "--keep", "0.9"), "--keep"), (("--serve", "--temperature", "1"), "temperature"),
    (("--serve", "--port", "70000"), "port"), (("--serve", "--host", "0.0.0.0"), KEY),
    (("--serve", "--characters", "nowhere"), "nowhere"), (("--serve", "--model", "nowhere.gguf"), "nowhere.gguf"),
    (("--serve", "--seed", "7"), "--seed and --batch-size go without it"), (("--serve", "--batch-size", "8"), "--rows N is the batch"),
    (("--serve", "--neurons", "npti:x", "--min-neurons", "8"), "selected already")])
def test_wrong_flags(monkeypatch, capsys, flags, named):
    monkeypatch.delenv(KEY, raising=False)
    code, said = exit_of(induce, monkeypatch, capsys, *flags, *(() if "--port" in flags else ("--port", "0")))
    assert code == 2 and named in said


@pytest.mark.parametrize(("flags", "named"), [
    (("--bad",), "unrecognized arguments: --bad (python -m personality.serve --help)"), (("--seed", "7"), "--seed"),
    (("--neurons", "npti:x", "--min-delta", "0.2"), "selected already")])
def test_the_program_itself_takes_what_it_uses(monkeypatch, capsys, flags, named):
    monkeypatch.setattr(sys, "argv", ["serve.py", *flags])
    with pytest.raises(UserError, match=re.escape(named)):
        arguments_of_the_program()


def test_the_programs_help_is_of_the_server(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--help"])
    with pytest.raises(SystemExit):
        arguments_of_the_program()
    said = " ".join(capsys.readouterr().out.split())
    assert "where the client asks for none (default: 512)" in said and "(default: 64" not in said
    assert not [flag for flag in ("--batch-size", "--seed", "--save", "--verify-server") if flag in said]
    monkeypatch.setattr(sys, "argv", ["serve.py"])
    assert vars(arguments_of_the_program())["max_new_tokens"] is None


# ------------------------------------------------------------------------------------------------------------------ text


def test_text_never_shows_half_a_character_or_a_stop(small):
    class Bytes:
        """A tokenizer of bytes."""

        stop_text = None

        def decode(self, ids, skip_special_tokens=True):
            return bytes(ids).decode(errors="replace")

    said = "  Čau ✌️, ab\nabc!  "
    ids, text, shown = list(said.encode()), Text(Bytes(), ["abc"]), ""
    for k in range(1, len(ids) + 1):
        if text.stopped:
            break
        shown += text.add(ids[:k], k == len(ids))
        assert "\ufffd" not in shown and "abc" not in shown
    assert shown == "Čau ✌️, ab" and text.stopped
    for prompt in (None, [], list("é ?".encode())):  # of a completion the outer spaces are a part
        text, shown = Text(Bytes(), [], prompt), ""
        for k in range(1, len(ids) + 1):
            shown += text.add(ids[:k], k == len(ids))
        assert shown == text.stripped(text.text) == (said.strip() if prompt is None else said)


@pytest.fixture
def stripping(small):
    """A tokenizer whose decoder drops the first space, as those of Llama 2, Mistral and Phi-3 do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "a", *(f"\u2581{word}" for word in ("a", "b", "c", "d", "\U0001f600"))]
    tokenizer = Tokenizer(models.WordLevel({name: k for k, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    tokenizer.stop_text = None
    return tokenizer


@pytest.mark.parametrize("chat", (False, True))
def test_an_answer_and_its_tokens_go_on_where_the_prompt_ends(stripping, chat):
    """Also of a tokenizer that writes what it is given alone without its space."""
    prompt, ids = stripping("b c a")["input_ids"], [4, 5, 3, 8, 7, 2]
    server = SimpleNamespace(length=lambda *_: 6, engine=SimpleNamespace(tokenizer=stripping))
    body = (ChatBody(messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=2) if chat else
            CompletionBody(prompt="x", logprobs=2))
    choice = Choice(server, 0, prompt, body, None)
    choice.request.logprobs = [(-1.0, [(4, -2.0), (3, -3.0)])] * len(ids)
    for k in range(1, len(ids) + 1):
        choice.ids = ids[:k]
        choice.text.add(choice.ids, k == len(ids))
    assert choice.text.text == ("a ba \U0001f600 d" if chat else " a ba \U0001f600 d")
    told = choice.logprobs(len(ids))
    if chat:
        tokens = [one["token"] for one in told["content"]]
        assert [other["token"] for other in told["content"][1]["top_logprobs"]] == [" a", "a"], "two tokens are told apart"
    else:
        tokens = told["tokens"]
        assert stripping.decode(prompt + ids[:-1]) == stripping.decode(prompt) + choice.text.text
        assert told["text_offset"] == [0, 2, 4, 5, 7, 9] and list(told["top_logprobs"][1]) == [" b", " a", "a"], "the likeliest first"
    assert "".join(tokens) == choice.text.text + "</s>"


def test_what_is_alike_as_text_is_told_apart_in_a_chat():
    """Parts of characters, and at its beginning a word with its space and without: each of the best, with its own value."""
    tokenizer = SimpleNamespace(stop_text=None, decode=lambda ids, **options: bytes(ids).decode(errors="replace"))
    server = SimpleNamespace(length=lambda *_: 6, engine=SimpleNamespace(tokenizer=tokenizer))
    body = dict(logprobs=True, top_logprobs=3, messages=[{"role": "user", "content": "x"}]), dict(prompt="x", logprobs=3)
    for kind, asked in zip((ChatBody, CompletionBody), body):
        choice = Choice(server, 0, [65], kind(**asked), None)
        choice.ids, choice.request.logprobs = [0xc4], [(-0.1, [(0xc4, -0.1), (0xc5, -3.0), (0x41, -9.0)])]
        choice.text.add(choice.ids, True)
        told = choice.logprobs(1)
        if kind is ChatBody:
            best = [(one["token"], one["logprob"]) for one in told["content"][0]["top_logprobs"]]
            assert best == [("\ufffd", -0.1), ("\ufffd", -3.0), ("A", -9.0)] and told["content"][0]["logprob"] == -0.1
        else:
            (best,) = told["top_logprobs"]
            assert list(best.items()) == [("\ufffd", -0.1), ("A", -9.0)]


def test_tokens_that_are_shown_of_a_text_with_a_character_of_many_bytes():
    """Of a decoder that writes each byte of a part of a character as one character, so that the part is longer than the whole."""
    def decode(ids, **options):
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError as error:
            return bytes(ids)[:error.start].decode() + "\ufffd" * (len(ids) - error.start)

    for prompt in (None, list(b"x ")):
        text, ids = Text(SimpleNamespace(stop_text=None, decode=decode), [" b"], prompt), list("a\U0001f600c b".encode())
        assert (text.add(ids, True), text.stopped, text.tokens_shown(ids)) == ("a\U0001f600c", True, 6)


def test_only_a_chats_answer_is_over_when_a_base_model_asks_on():
    tokenizer = SimpleNamespace(stop_text="\nQuestion:", decode=lambda ids, **options: bytes(ids).decode())
    said = list(b"4\n\nQuestion: 5")
    for prompt, shown, stopped in ((None, "4", True), (list(b"Answer: "), "4\n\nQuestion: 5", False)):
        text = Text(tokenizer, [], prompt)
        assert (text.add(said, True), text.stopped) == (shown, stopped)


# ------------------------------------------------------------------------------------------------------------------ page


def test_the_page_needs_nothing_from_elsewhere(served):
    reply = httpx.get(served.url + "/")
    html, policy = page()
    assert reply.content == html and reply.headers["content-security-policy"] == policy and "unsafe" not in policy
    text = html.decode()
    assert "style=" not in text and "onclick=\"" not in text
    assert [part for part in text.split('"') if part.startswith(("http:", "https:", "//"))] == ["http://www.w3.org/2000/svg"]


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        pytest.skip("no chromium here")
    # in a thread of its own: playwright's event loop would be in the way of others'
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(lambda: sync_api.sync_playwright().start()).result()
        try:
            chromium = pool.submit(lambda: whole.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])).result()
        except sync_api.Error as error:
            pool.submit(whole.stop).result()
            pytest.skip(f"{BROWSER} doesn't start: {str(error)[:200]}")
        yield lambda work, *given: pool.submit(work, chromium, *given).result()
        pool.submit(chromium.close).result()
        pool.submit(whole.stop).result()


def test_the_page_in_a_browser(served, browser, tmp_path):
    def scene(chromium):
        wrong, view = [], chromium.new_page(viewport={"width": 1440, "height": 900})
        view.on("pageerror", lambda error: wrong.append(str(error)))
        view.goto(served.url + "/#extraversion=-1.45")
        slider = view.get_by_role("slider", name="Extraversion")
        slider.wait_for()
        assert slider.input_value() == "-1.45" and "introverted" in slider.get_attribute("aria-valuetext")
        slider.press("ArrowLeft")
        assert slider.input_value() == "-1.5" and "may not be fluent" in slider.get_attribute("aria-valuetext")
        view.wait_for_url(served.url + "/#extraversion=-1.5")
        view.locator("details summary").click()
        view.get_by_label("Tokens").fill("12")
        view.get_by_label("Temperature").fill("0")
        view.get_by_label("Your message").fill("w10 w11 w12 ?")
        view.get_by_label("Your message").press("Enter")
        view.locator(".facts").nth(1).filter(has_text="tokens/s").wait_for()
        edited, plain = view.locator(".answer p").all_text_contents()
        assert edited != plain
        assert view.locator(".facts").first.text_content().split(" ·")[0].endswith("neurons") and view.locator("svg.layers").count() == 1
        view.get_by_role("button", name="Regenerate").click()
        view.locator("#said", has_text="Both answers").wait_for()
        assert view.locator(".answer p").all_text_contents() == [edited, plain], "greedy: the same again"
        view.get_by_label("Your message").fill("<b>w13</b>")
        view.get_by_role("button", name="Ask", exact=True).click()
        view.locator(".facts").nth(3).filter(has_text="neurons").wait_for()
        assert view.locator(".asked p").nth(1).text_content() == "<b>w13</b>", "what is typed is text"
        view.get_by_role("button", name="Edit", exact=True).first.click()
        view.get_by_label("Your message").press("Escape")
        view.get_by_label("Your message").fill("w14 ?")
        view.get_by_label("Your message").press("Enter")
        view.locator(".facts").nth(5).filter(has_text="neurons").wait_for()
        view.get_by_role("button", name="Edit", exact=True).nth(1).click()
        assert view.get_by_label("Your message").input_value() == "<b>w13</b>"
        view.get_by_label("Your message").fill("w15 ?")
        view.get_by_label("Your message").press("Enter")
        view.locator(".asked p", has_text="w15").wait_for()
        view.locator("#said", has_text="Both answers").wait_for()
        assert view.locator(".asked p").all_text_contents() == ["w10 w11 w12 ?", "w15 ?"], "what followed is gone"
        view.get_by_label("Choose a character").select_option("bob")
        view.get_by_role("button", name="Regenerate").nth(1).click()
        view.locator(".answer h3", has_text="bob: extraversion +2").wait_for()
        view.locator("#said", has_text="Both answers").wait_for()
        view.get_by_label("Choose a character").select_option("ada")
        assert view.get_by_role("slider", name="Openness").input_value() == "-0.7"
        view.wait_for_url(served.url + "/#ada")
        with view.expect_download() as saved:
            view.get_by_role("button", name="Save").click()
        saved.value.save_as(tmp_path / "saved.toml")
        view.get_by_role("button", name="Unedited").click()
        view.locator("#cost", has_text="Nothing").wait_for()
        assert slider.input_value() == "0" and "#" not in view.url
        assert Character.read(str(tmp_path / "saved.toml")).strengths == {"extraversion": 1.0, "openness": -0.7}
        assert not wrong
        for width in (390, 768):
            view.set_viewport_size({"width": width, "height": 844})
            assert view.evaluate("() => document.documentElement.scrollWidth") <= width, "nothing sticks out"
        view.set_viewport_size({"width": 390, "height": 844})
        view.get_by_label("Your message").fill("w16 ?")
        view.get_by_label("Your message").press("Enter")
        view.locator("#said", has_text="Both answers").wait_for()
        assert 0 <= view.locator(".answer").nth(4).bounding_box()["y"] < 600, "the answer is in sight"
        view.close()

    browser(scene)


def test_stop_on_the_page_frees_both_rows(served, browser):
    def scene(chromium):
        view = chromium.new_page()
        view.goto(served.url + "/#openness=-1")
        view.get_by_role("slider", name="Openness").wait_for()
        view.locator("details summary").click()
        view.get_by_label("Tokens").fill("400")
        view.get_by_label("Your message").fill("w10 ?")
        view.get_by_role("button", name="Ask", exact=True).click()
        view.get_by_role("button", name="Stop").click()
        view.locator("#said", has_text="Stopped").wait_for()
        view.close()

    before = served.server.counts["cancelled"]
    browser(scene)
    idle(served)
    assert served.server.counts["cancelled"] > before


def test_a_host_that_is_no_name():
    with pytest.raises(UserError, match="--host 0.0.0..0"):
        listening(SimpleNamespace(host="0.0.0..0", port=0, api_key="k"))


def test_tokens_beyond_the_vocabulary_are_refused(small, served):
    """Before they reach the model, which would fail for everybody."""
    size = small.model.get_input_embeddings().num_embeddings
    for token in (size, -1):
        assert post(served, "/v1/completions", prompt=[10, token]).status_code == 400
    assert post(served, "/v1/completions", prompt=[10, size - 1], max_tokens=2).status_code == 200 and served.server.engine.running()


def test_the_whole_context_can_be_used_and_no_more(served):
    """512 tokens, though the cache holds more; who says no length gets what is left."""
    ask = lambda **body: post(served, "/v1/completions", **body)  # noqa: E731
    assert served.server.most == 512 < served.server.engine.longest
    assert ask(prompt=[10] * 510, max_tokens=2).status_code == 200 and ask(prompt=[10] * 510, max_tokens=3).status_code == 400
    assert 1 <= ask(prompt=[10] * 509).json()["usage"]["completion_tokens"] <= 3 and ask(prompt=[10] * 512).status_code == 400


def test_why_an_answer_ended(small, neurons, served, tmp_path):
    """At its length, or at any of the end tokens that the model's own configuration names."""
    whole = post(served, max_tokens=6).json()["choices"][0]
    assert whole["finish_reason"] == "length"
    last = small.tokenizer(whole["message"]["content"])["input_ids"][3]
    folder = shutil.copytree(small.model_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, last]}))
    with serving(arguments(small, neurons, model=str(folder), max_new_tokens=5)) as (server, url):
        other = SimpleNamespace(url=url)
        reply = post(other, max_tokens=6).json()
        assert reply["choices"][0]["finish_reason"] == "stop" and reply["usage"]["completion_tokens"] <= 4
        raw = post(other, max_tokens=6, stream=True).text
        assert '"finish_reason": "stop"' in raw
        assert post(other, messages=[{"role": "user", "content": "w40 w41 w42"}], max_tokens=None).json()["usage"]["completion_tokens"] <= 5


def test_a_template_that_takes_no_such_messages_is_the_clients_affair(served, monkeypatch):
    monkeypatch.setattr(served.server.engine.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    reply = post(served)
    assert reply.status_code == 400 and "roles must alternate" in reply.json()["error"]["message"]


def test_a_prompt_of_nothing_is_refused(served, monkeypatch):
    """As Llama 2's template makes of system messages alone: it would end the engine for all."""
    monkeypatch.setattr(served.server.engine.tokenizer, "chat_template", "{% for turn in messages if turn['role'] == 'user' %}{{ turn['content'] }}{% endfor %}")
    reply = post(served, messages=[{"role": "system", "content": "w10"}])
    assert reply.status_code == 400 and "makes nothing of them" in reply.json()["error"]["message"]
    with pytest.raises(UserError, match="an empty prompt"):
        asyncio.run(anext(served.server.engine.write(Request([], ChatBody(messages=asked()).sampling(0), None, 4))))
    assert post(served).status_code == 200


def test_a_null_asks_for_nothing(served):
    whole = post(served).json()["choices"]
    nulls = dict.fromkeys(("tools", "tool_choice", "response_format", "logit_bias", "functions", "stop", "seed", "whatever", "perplexity", "model"))
    messages = [{**turn, "name": None, "reasoning_content": None} for turn in asked()]
    assert post(served, messages=messages, **nulls).json()["choices"] == whole
    assert served.client.chat.completions.create(model="tiny", messages=asked(), max_tokens=4, tools=None, extra_body=nulls).choices
    assert post(served, messages=None).status_code == 400 and post(served, tools=[]).status_code == 400


def test_a_model_can_be_looked_up(served):
    for name in ("tiny", "tiny+ada", "tiny+extraversion=0.5"):
        assert served.client.models.retrieve(name).id == name
    assert httpx.get(served.url + "/v1/models/").json() == httpx.get(served.url + "/v1/models").json()
    for name in ("gpt-5", "tiny+", "x/y"):
        with pytest.raises(openai.NotFoundError, match="model: expected tiny"):
            served.client.models.retrieve(name)
    assert httpx.get(served.url + "/v1/models/tiny+nobody").status_code == 400


def test_perplexity_is_of_what_is_shown(served):
    """As logprobs are, which stop where the stop string begins."""
    words = post(served, max_tokens=12).json()["choices"][0]["message"]["content"].split()
    cut = post(served, max_tokens=12, stop=" " + words[5], perplexity=True, logprobs=True).json()["choices"][0]
    told = [token["logprob"] for token in cut["logprobs"]["content"]]
    assert cut["message"]["content"].split() == words[:5] and len(told) == 5
    whole = post(served, max_tokens=5, perplexity=True).json()["choices"][0]
    assert whole["message"] == cut["message"] and cut["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-4)
    assert "perplexity" not in post(served, max_tokens=12, stop=words[0], perplexity=True).json()["choices"][0]


def test_a_stream_tells_what_a_whole_reply_does(served):
    """Its perplexity, who it is, and where each token begins."""
    def chunks(path, **body):
        lines = post(served, path, stream=True, **body).text.strip().split("\n\n")[:-1]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    whole = post(served, personality="ada", perplexity=True, max_tokens=6).json()
    parts = chunks("/v1/chat/completions", personality="ada", perplexity=True, max_tokens=6)
    assert [part["choices"][0]["perplexity"] for part in parts if "perplexity" in part["choices"][0]] == [
        pytest.approx(whole["choices"][0]["perplexity"], rel=1e-4)]
    asked = dict(prompt="w10 w11", personality="ada", logprobs=1, max_tokens=6)
    whole, parts = post(served, "/v1/completions", **asked).json(), chunks("/v1/completions", **asked)
    assert [part["personality"] for part in parts if "personality" in part] == [whole["personality"]]
    told = [part["choices"][0]["logprobs"] for part in parts if part["choices"][0]["logprobs"]]
    assert sum((found["tokens"] for found in told), []) == whole["choices"][0]["logprobs"]["tokens"]
    begins = sum((found["text_offset"] for found in told), [])
    assert len(told) > 1 and len(set(begins)) == 6 and begins == sorted(begins), "they go on from chunk to chunk"
    assert whole["choices"][0]["logprobs"]["text_offset"] == begins, "also of a tokenizer that writes a token alone without its space"


def test_offsets_cost_as_much_as_there_are_tokens(served):
    """Not as much as their square, while everybody waits."""
    tokenizer, decoded = served.server.engine.tokenizer, []
    server = SimpleNamespace(length=lambda *_: 400, engine=SimpleNamespace(tokenizer=SimpleNamespace(
        stop_text=None, decode=lambda ids, **options: decoded.append(len(ids)) or tokenizer.decode(ids, **options))))
    choice = Choice(server, 0, [1], CompletionBody(prompt="x", logprobs=0), None)
    choice.ids, choice.request.logprobs = [10 + k % 80 for k in range(400)], [(0.0, [])] * 400
    found = [place for end in (7, 200, 400) for place in choice.logprobs(end)["text_offset"]]
    assert found == [len(tokenizer.decode(choice.ids[:k])) for k in range(400)] and sum(decoded) < 20 * 400


@pytest.mark.parametrize("asked_for", (False, True))
def test_a_stop_string_costs_little_more_than_the_text(served, asked_for):
    """Nothing where no log-probabilities were asked for, and no square of the tokens where they were: everybody waits meanwhile."""
    tokenizer, decoded = served.server.engine.tokenizer, []
    server = SimpleNamespace(length=lambda *_: 2000, engine=SimpleNamespace(tokenizer=SimpleNamespace(
        stop_text=None, decode=lambda ids, **options: decoded.append(len(ids)) or tokenizer.decode(ids, **options))))
    choice = Choice(server, 0, [1], ChatBody(messages=[{"role": "user", "content": "x"}], logprobs=asked_for, stop=["never"]), None)
    choice.ids, choice.request.logprobs = [10 + k % 80 for k in range(2000)], [(0.0, [])] * 2000
    choice.text.text, choice.text.stopped = tokenizer.decode(choice.ids[:1500]), True
    told = choice.logprobs(2000)
    assert (len(told["content"]), sum(decoded) < 40 * 2000) == (1500, True) if asked_for else told is None and not decoded


def test_where_the_model_lies_is_nobodys_affair(small, served):
    reply = post(served, personality={"traits": {"extraversion": 1}, "model": "another"})
    assert reply.status_code == 400 and "is for another, the model is" in reply.text
    assert str(small.model_dir) not in reply.text and small.model_dir.name in reply.text


def test_a_developer_is_the_system_and_parts_are_one_text(served):
    said = lambda *messages: post(served, messages=list(messages), max_tokens=8).json()["choices"][0]["message"]["content"]  # noqa: E731
    turn = lambda role, *texts: {"role": role, "content": [{"type": "text", "text": text} for text in texts]}  # noqa: E731
    plain = said({"role": "system", "content": "w10 w11"}, {"role": "user", "content": "w12 w13 ?"})
    assert said(turn("developer", "w10 w11"), turn("user", "w12 ", "w13 ?")) == plain
    assert said(turn("user", "w10 w11"), turn("user", "w12 w13 ?")) != plain


def test_who_asks_for_a_seed_or_top_p_alone_asks_to_be_drawn():
    how = lambda **more: ChatBody(messages=[{"role": "user", "content": "x"}], **more).sampling(1)  # noqa: E731
    assert how().temperature == 0 and how(seed=5, temperature=0.0).temperature == 0
    assert (how(seed=5).temperature, how(seed=5).seed) == (1, 6) and how(seed=0).temperature == 1
    assert (how(top_p=0.5).temperature, how(top_p=0.5).top_p) == (1, 0.5)


@pytest.mark.parametrize("given", ("", {}))
def test_an_empty_personality_is_not_none(served, given):
    reply = post(served, personality=given)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "personality"


def test_what_is_open_without_the_key(small, neurons):
    with serving(arguments(small, neurons, api_key="s3cret")) as (_, url):
        for path in ("/v1/models", "/v1/personality", "/metrics", "/v1/nothing", "/docs"):
            assert httpx.get(url + path).status_code == 401, path
        assert post(SimpleNamespace(url=url), "/v1/personality", personality="extraversion=1").status_code == 401


def test_names_of_this_machine(served):
    for host, code in (("[::1]:8000", 200), ("localhost:1", 200), ("LOCALHOST", 200), ("127.8.8.8", 200), ("localhost.evil.example", 403),
                       ("10.0.0.1", 403), ("", 403)):
        assert httpx.get(served.url + "/health", headers={"host": host}).status_code == code, host


def test_a_body_that_never_ends_is_given_up(served, monkeypatch):
    """At its first byte too many, and after PATIENCE seconds, though its sender goes on."""
    host, port = served.url.removeprefix("http://").split(":")
    head = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n")
    monkeypatch.setattr("personality.serve.MOST_BYTES", 1 << 16)
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(head + b"10000\r\n" + b" " * 0x10000 + b"\r\n1\r\n \r\n")
        assert b"413" in line.recv(4096).partition(b"\r\n")[0]
    monkeypatch.setattr("personality.serve.PATIENCE", 0.2)
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(head + b"1\r\n{\r\n")
        assert b"408" in line.recv(4096).partition(b"\r\n")[0]


def test_what_went_wrong_inside_is_told_to_the_log_alone(served, monkeypatch, caplog):
    def wrong():
        raise ValueError("of /home/somebody/secret")

    monkeypatch.setattr(served.server, "models", wrong)
    reply = httpx.get(served.url + "/v1/models")
    assert reply.status_code == 500 and "ValueError" in reply.text and "secret" not in reply.text
    monkeypatch.setattr("personality.answering.surprise", lambda *_: wrong())
    reply = post(served, stream=True, perplexity=True)
    assert "ValueError: see the server's log" in reply.text and "secret" not in reply.text
    assert [record.message for record in caplog.records if record.name == "uvicorn.error"] == ["a request failed", "a stream failed"]


def test_refusals_at_the_door_are_counted(served):
    before = served.server.codes.get(403, 0)
    post(served, headers={"host": "evil.example"})
    assert served.server.codes[403] == before + 1


def test_of_many_personalities_the_latest_are_kept(small, neurons, monkeypatch):
    monkeypatch.setattr("personality.people.KEPT", 2)
    people = People(arguments(small, neurons))
    people.take(small.model, small.tokenizer)
    one, two, three = (Character({"extraversion": level}, "trained") for level in (0.1, 0.2, 0.3))
    first, second = people.of(one)[0], people.of(two)[0]
    assert people.of(one)[0] is first  # and so the latest
    people.of(three)
    assert len(people.kept) == 2 and people.of(one)[0] is first and people.of(two)[0] is not second


@pytest.mark.parametrize("given", ("s3cret", ""))
def test_the_key_of_the_environment(small, neurons, monkeypatch, given):
    taken = []
    monkeypatch.setenv(KEY, given)
    monkeypatch.setattr(serve, "Server", lambda args: taken.append(args.api_key) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        serve.serve(arguments(small, neurons))
    assert taken == [given or None]
    with pytest.raises(ZeroDivisionError):
        serve.serve(arguments(small, neurons, api_key="another"))
    assert taken[1] == "another"


def test_a_key_that_no_header_can_hold(small, neurons):
    with pytest.raises(UserError, match="--api-key"):
        serve.serve(arguments(small, neurons, api_key="ключ"))


def test_levels_are_said_of_trained_traits_alone(small, neurons, served, tmp_path):
    there = httpx.get(served.url + "/v1/personality").json()
    assert there["traits"]["extraversion"]["levels"] is True
    run(small, tmp_path, "neuroticism").identify()
    with serving(arguments(small, tmp_path)) as (_, url):
        assert httpx.get(url + "/v1/personality").json()["traits"]["neuroticism"]["levels"] is False


def test_neuron_files_of_another_frame_are_told_of(small, neurons, capsys):
    for frame in ("person", "none"):
        People(arguments(small, neurons, frame=frame)).take(small.model, small.tokenizer)
        assert ("now they are put in the frame none" in capsys.readouterr().err) == (frame == "none")


@pytest.mark.parametrize("where", ("generated", "all"))
def test_levels_on_every_token_are_told_of(small, neurons, capsys, where):
    People(arguments(small, neurons, where=where)).take(small.model, small.tokenizer)
    assert ("as a checkpoint has them, they cost more" in capsys.readouterr().err) == (where == "all")


def test_the_servers_flags_about_edits(small, neurons):
    """--suppress, --min-delta and --min-neurons are heeded."""
    def profile(**changes):
        people = People(arguments(small, neurons, **changes))
        people.take(small.model, small.tokenizer)
        return people.of(Character({"extraversion": 2.0}, "npti"))[0]

    plain = profile()
    assert len(profile(min_delta=0.3)) < len(plain) and len(profile(min_delta=2.0, min_neurons=7)) > 0
    assert not torch.equal(profile(suppress="zero").value, plain.value)


def test_a_reply_that_never_begins_takes_no_place(served):
    """Its client has gone before the first line was sent."""
    def begun():
        body = json.dumps({"messages": asked(), "stream": True}).encode()
        found = asyncio.run(served.server.complete(ChatBody, body, None))
        assert served.server.taken == 1 and not isinstance(found, dict)

    begun()
    gc.collect()
    assert served.server.taken == 0


def test_a_profile_of_one_neuron_too_many(small, neurons):
    people = People(arguments(small, neurons))
    people.take(small.model, small.tokenizer)
    who = Character({"extraversion": 2.0}, "npti")
    people.most = len(people.of(who)[0])
    people.kept.clear()
    assert len(people.of(who)[0]) == people.most
    people.most, people.kept = people.most - 1, {}
    with pytest.raises(UserError, match=f"there is room for {people.most}"):
        people.of(who)


@pytest.mark.parametrize("name", ("a b", "extraversion=1", "x" * 65))
def test_a_character_whose_name_no_client_can_say(small, neurons, tmp_path, name):
    (tmp_path / f"{name}.toml").write_text(CHARACTERS["bob"])
    with pytest.raises(UserError, match="expected a name of letters"):
        People(arguments(small, neurons, characters=str(tmp_path)))


def test_bytes_of_a_token():
    assert (whole_bytes("é"), whole_bytes(" a"), whole_bytes("\ufffd")) == ([195, 169], [32, 97], None)


def test_a_trait_of_0_needs_no_file(served):
    said = [post(served, personality=given).json()["choices"][0]["message"]["content"] for given in (
        "neuroticism=0,extraversion=1.5", "extraversion=1.5")]
    assert said[0] == said[1]
