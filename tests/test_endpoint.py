"""A model behind an OpenAI-compatible server: one that stumbles, refuses, or is not there; Ctrl-C; nothing is asked for twice."""

import contextlib
import json
import os
import signal
import socket
import threading
import time

import pytest

from conftest import Server, lines_of
from personality import UserError
from personality.endpoint import Endpoint, NoReply, RemoteEngine, fill
from personality.frame import Frame, conversation
from personality.store import Journal

pytestmark = pytest.mark.usefixtures("quick")


def asked(endpoint, journal, number, **options):
    """Have `number` questions answered into a journal."""
    fill(journal, [(str(k), f"w{k} ?") for k in range(number)],
         lambda requests, store: endpoint.run(requests, lambda text: endpoint.chat(conversation(text))[0], store), **options)


def questions_of(server):
    return [body["messages"][0]["content"] for body in server.seen]


def test_a_server_that_stumbles_answers_all_the_same(monkeypatch, tmp_path):
    """429, 500, 503, a stall, no JSON and an empty reply cost tries of their own requests only, and each reply is kept once."""
    stumbles = {2: (429, ""), 3: (500, ""), 5: (200, None), 6: "", 8: (503, ""), 10: "stall"}
    monkeypatch.setattr(Endpoint, "TIMEOUT", 4)

    def stumbling(n, body):
        if stumbles.get(n) == "stall":
            time.sleep(6)  # the client has given up by then
        return stumbles.get(n, f"about {body['messages'][0]['content']}")

    journal = Journal(tmp_path / "replies.jsonl")
    with Server(stumbling) as server:
        asked(Endpoint(server.url, in_flight=3), journal, 20)
        assert len(server.seen) == 20 + len(stumbles)
    assert sorted(line["text"] for line in lines_of(tmp_path / "replies.jsonl")) == sorted(f"about w{k} ?" for k in range(20))


def test_a_dead_server_says_so(tmp_path):
    with Server(lambda n, body: (500, "")) as server:
        with pytest.raises(UserError, match="30 of 30 requests failed .*InternalServerError.* same command"):
            asked(Endpoint(server.url, in_flight=4), Journal(tmp_path / "replies.jsonl"), 30)
        assert len(set(questions_of(server))) < 30, "it is not asked for everything"
    with pytest.raises(UserError, match="nothing answers there .*APIConnectionError"):
        Endpoint("http://127.0.0.1:9/v1")


@pytest.mark.parametrize("status, pattern", ((401, "refuses the key in OPENAI_API_KEY"), (404, "has no model big")))
def test_errors_that_last_end_it_at_once(tmp_path, status, pattern):
    with Server(lambda n, body: (status, "")) as server:
        with pytest.raises(UserError, match=pattern):
            asked(Endpoint(server.url, "big", in_flight=4), Journal(tmp_path / "replies.jsonl"), 100)
        assert len(server.seen) <= 16


def test_a_server_without_a_list_of_models_has_the_one_that_is_named(tmp_path):
    with Server(lambda n, body: body["model"], listing=404) as server:
        assert Endpoint(server.url, "big").chat(conversation("w9 ?")) == ("big", True)
        with pytest.raises(UserError, match="lists no model .*404.*: --served-model NAME"):
            Endpoint(server.url)


def test_an_error_that_lasts_is_what_is_said_of_several(tmp_path):
    """The first of eight is refused for good, the others for the moment; several have ended when they are looked at."""
    together = threading.Barrier(8, timeout=10)

    def refusing(n, body):
        if n <= 8:
            together.wait()
        time.sleep(0.05 * (n > 1) if n <= 8 else 1)  # a second try waits, however late the first one's reply is read
        return (401 if n == 1 else 503, "")

    with Server(refusing) as server:
        with pytest.raises(UserError, match="refuses the key"):
            asked(Endpoint(server.url, "big", in_flight=8), Journal(tmp_path / "replies.jsonl"), 30_000)
        assert len(server.seen) <= 16, "no tries that would bring nothing"


@pytest.mark.parametrize("more", (0, 105))
def test_an_error_does_not_tell_the_key(tmp_path, more):
    """Nor the beginning of it, where a long error is cut off."""
    said = json.dumps({"error": {"message": "." * more + "Incorrect API key provided: sk-secret-of-the-test."}})
    with Server(lambda n, body: (401, said)) as server:
        with pytest.raises(UserError, match=r"Incorrect API key provided: \*\*\*") as refused:
            asked(Endpoint(server.url), Journal(tmp_path / "replies.jsonl"), 1)
    assert "sk-" not in str(refused.value)


def test_what_is_refused_is_kept_where_that_is_wanted(tmp_path):
    """A content filter's 400, say: it is not asked for again, and where a reply is needed it is an error, after the others."""
    journal = Journal(tmp_path / "replies.jsonl")
    with Server(lambda n, body: (400, "") if body["messages"][0]["content"] == "w3 ?" else "fine") as server:
        endpoint = Endpoint(server.url)
        with pytest.raises(UserError, match="1 of 5 requests failed .*BadRequest.* same command"):
            asked(endpoint, journal, 5)
        assert len(journal) == 4 and len(server.seen) == 5
        asked(endpoint, journal, 5, refused="no")
        assert journal["3"]["text"] == "no" and len(server.seen) == 6
        asked(endpoint, journal, 5)
        assert len(server.seen) == 6, "nothing is asked for again"


def test_interrupted_while_a_server_stumbles(tmp_path, capsys):
    """Ctrl-C waits for no tries that are still to come and begins no further request; what has come is kept."""
    interrupted = threading.Event()

    def stumbling(n, body):
        if n <= 4:
            return "fine"
        if n == 6:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
            interrupted.set()
        assert interrupted.wait(10)
        return (503, "")

    journal, start = Journal(tmp_path / "replies.jsonl"), time.time()
    with Server(stumbling) as server:
        with pytest.raises(KeyboardInterrupt):
            asked(Endpoint(server.url, in_flight=4), journal, 200)
        assert 6 <= len(server.seen) <= 8, "four answered, and at most four under way, each tried once"
    assert time.time() - start < 20 and "requests that are under way, which are paid for" in capsys.readouterr().err
    assert len(journal) == len(Journal(tmp_path / "replies.jsonl")) == 4


def test_newer_models_name_the_limit_otherwise():
    """All that were under way when the first was refused ask again, too."""
    together = threading.Barrier(8, timeout=10)

    def newer(n, body):
        if n <= 8:
            together.wait()
        return "fine" if "max_completion_tokens" in body else (400, '{"error": {"message": "max_completion_tokens instead."}}')

    with Server(newer) as server:
        endpoint, said = Endpoint(server.url, in_flight=8), {}
        work = lambda text: endpoint.chat(conversation(text))[0]  # noqa: E731
        failures = endpoint.run([(k, str(k)) for k in range(20)], work, said.__setitem__)
        assert len(server.seen) == 8 + 20, "once is enough to learn it"
    assert not failures and set(said.values()) == {"fine"} and len(said) == 20


def test_newer_models_have_a_temperature_of_their_own(capsys):
    def newer(n, body):
        if "max_tokens" in body:
            return 400, '{"error": {"message": "Use max_completion_tokens instead."}}'
        return (400, '{"error": {"message": "Unsupported value: \'temperature\'."}}') if "temperature" in body else "fine"

    with Server(newer) as server:
        endpoint = Endpoint(server.url)
        assert [endpoint.chat(conversation("w10 ?"), temperature=0) for _ in range(2)] == 2 * [("fine", True)] and len(server.seen) == 4
        assert capsys.readouterr().err.count("takes no temperature") == 1
    with Server(lambda n, body: (400, '{"error": {"message": "max_completion_tokens, \'temperature\'?"}}')) as server:
        with pytest.raises(NoReply, match="temperature"):
            Endpoint(server.url).chat(conversation("w10 ?"), temperature=0)
        assert len(server.seen) == 2, "who takes neither is not asked for ever"
    quoting = lambda n, body: (400, '{"error": {"message": "refused: What temperature do you like, 5?"}}') if n == 1 else "fine"  # noqa: E731
    with Server(quoting) as server:
        endpoint = Endpoint(server.url)
        with pytest.raises(NoReply):
            endpoint.chat(conversation("w10 ?"), temperature=0)
        endpoint.chat(conversation("w10 ?"), temperature=0)
        assert [body["temperature"] for body in server.seen] == [0, 0], "a filter that quotes what was asked is no such word"


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Server(lambda n, body: "fine") as server:
        monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
        assert Endpoint("http://nowhere.invalid/v1").chat(conversation("w10 ?")) == ("fine", True)


def test_a_reply_that_is_not_fine_is_asked_for_again_and_warmer():
    with Server(lambda n, body: ["no idea", "five", "4"][n - 1]) as server:
        text, whole = Endpoint(server.url).chat(conversation("w10 ?"), fine=str.isdigit, temperature=0)
    assert (text, whole) == ("4", True) and [body["temperature"] for body in server.seen] == [0, 0.7, 0.7]


def test_what_never_becomes_a_reply_is_a_failure_for_the_moment():
    with Server(lambda n, body: (200, None)) as server, pytest.raises(NoReply) as failed:
        Endpoint(server.url).chat(conversation("w10 ?"))
    assert not failed.value.lasting


def test_half_an_emoji_can_be_written(tmp_path):
    with Server(lambda n, body: "ah \ud83d") as server:
        text, whole = Endpoint(server.url).chat(conversation("w10 ?"))
    Journal(tmp_path / "replies.jsonl").append({"key": "a", "text": text})
    assert text == "ah ?" and whole


def test_a_request_that_comes_twice_is_made_once(tmp_path):
    replies, made = Journal(tmp_path / "replies.jsonl"), []

    def work(requests, store):
        for key, what in requests:
            made.append((key, what))
            store(key, f"reply {len(made)}")
        return []

    fill(replies, [("a", 1), ("b", 2), ("a", 1)], work)
    assert made == [("a", 1), ("b", 2)] and len(replies) == 2
    fill(replies, [("b", 2), ("c", 3)], work)
    assert made[2:] == [("c", 3)] and (replies["b"]["text"], replies["c"]["text"]) == ("reply 2", "reply 3")


@pytest.mark.parametrize("name, proxy", (("ALL_PROXY", "socks5://127.0.0.1:1"), ("HTTP_PROXY", "ftp://x:1")))
def test_a_proxy_that_cannot_be_used(monkeypatch, name, proxy):
    """Whether socksio is there or not: one line."""
    for other in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, proxy)
    with pytest.raises(UserError, match="http://192.0.2.1:9/v1: (can't be asked|nothing answers)"):
        Endpoint("http://192.0.2.1:9/v1")


def test_a_key_that_may_not_is_refused_as_well(tmp_path):
    """403, as 401: nobody is asked again."""
    with Server(lambda n, body: (403, "")) as server:
        with pytest.raises(UserError, match="refuses the key in OPENAI_API_KEY"):
            asked(Endpoint(server.url, "big", in_flight=4), Journal(tmp_path / "replies.jsonl"), 100)
        assert len(server.seen) <= 16


def test_a_reply_that_trickles_is_given_up(monkeypatch):
    """A byte now and then is no reply in time."""
    monkeypatch.setattr(Endpoint, "TIMEOUT", 1)
    monkeypatch.setattr(Endpoint, "RETRIES", 0)
    with Server(lambda n, body: "fine") as server:
        endpoint = Endpoint(server.url)

    def trickle():
        with contextlib.suppress(OSError), listener.accept()[0] as line:
            line.recv(4096)
            line.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(40):
                line.sendall(b" ")
                time.sleep(0.2)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        thread, start = threading.Thread(target=trickle, daemon=True), time.monotonic()
        thread.start()
        endpoint.client = endpoint.client.with_options(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        with pytest.raises(NoReply) as failed:
            endpoint.chat(conversation("w10 ?"))
        assert time.monotonic() - start < 5 and not failed.value.lasting
        thread.join(10)


@pytest.mark.parametrize("status", (408, 409, 429, 500, None))
def test_what_fails_for_the_moment_is_not_kept_as_a_refusal(monkeypatch, tmp_path, status):
    """A limit of requests, a time-out, a connection that breaks: asked for again by the next run."""
    monkeypatch.setattr(Endpoint, "RETRIES", 0)
    journal = Journal(tmp_path / "replies.jsonl")
    with Server(lambda n, body: (status or 200, "")) as server:
        endpoint = Endpoint(server.url)
        if status:
            with pytest.raises(UserError, match="2 of 2 requests failed"):
                asked(endpoint, journal, 2, refused="no")
    if not status:  # the server has gone
        with pytest.raises(UserError, match="2 of 2 requests failed"):
            asked(endpoint, journal, 2, refused="no")
    assert len(journal) == 0


def test_a_reply_that_was_cut_says_so():
    with Server(lambda n, body: ["w10 w11", "length"]) as server:
        assert Endpoint(server.url).chat(conversation("w10 ?")) == ("w10 w11", False)
        assert Endpoint(server.url).completion([5, 6]) == ("w10 w11", False)
    with Server(lambda n, body: ["w10 w11", "content_filter"]) as server:
        assert Endpoint(server.url).completion([5, 6]) == ("w10 w11", False), "it did not come to its end"


def test_an_endpoint_goes_on_after_a_run_that_was_stopped(tmp_path):
    with Server(lambda n, body: (401, "") if n == 1 else "fine") as server:
        endpoint = Endpoint(server.url, "big", in_flight=1)
        with pytest.raises(UserError):
            asked(endpoint, Journal(tmp_path / "a.jsonl"), 3)
        asked(endpoint, Journal(tmp_path / "b.jsonl"), 3)
        assert len(Journal(tmp_path / "b.jsonl")) == 3


def test_replies_are_of_a_model_and_its_options(small, tmp_path):
    """Of another model, or with another limit, they are asked for anew."""
    with Server(lambda n, body: [" ".join(["w20"] * body["max_tokens"]), "length"]) as server:
        def told(model, most, weights="a"):
            engine = RemoteEngine(Endpoint(server.url, model), small.tokenizer, Frame.named("person"), tmp_path, most, weights)
            (line,), number = engine.answer([{"question": "w10 ?", "persona": None}]), len(server.seen)
            return len(line["ids"]), number

        assert [told("one", 2), told("one", 2), told("one", 4), told("two", 4)] == [(2, 1), (2, 1), (4, 2), (4, 3)]
        assert [told("two", 4, "b"), told("two", 4, "b")] == [(4, 4), (4, 4)], "or of other weights by the same name"


def test_a_server_that_writes_on_is_cut(small, tmp_path):
    with Server(lambda n, body: [" w20 w21 w22 w23", "stop" if n == 1 else "length"]) as server:
        for most, expected in ((3, ("w20 w21 w22", 3)), (4, ("w20 w21 w22 w23", 4)), (8, ("w20 w21 w22 w23", 4))):
            engine = RemoteEngine(Endpoint(server.url, "one"), small.tokenizer, Frame.named("person"), tmp_path, most)
            line, = engine.answer([{"question": "w10 ?", "persona": None}])
            assert (line["answer"], len(line["ids"])) == expected and line["ids"][-1] != small.tokenizer.eos_token_id
