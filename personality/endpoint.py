"""A model behind any OpenAI-compatible server, as writer, engine or judge; and replies, of which none is asked for twice."""

import importlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlsplit

from .frame import Frame
from .model import SEARCH_PENALTY, answer_ids, answer_text, prompt_ids
from .store import Journal, digest
from .terminal import UserError, say

MALFORMED, AGAIN = 3, {"temperature": 0.7}  # tries for a reply that is not what was asked for; at 0 it would be the same
NEWER = {"max_tokens": "max_completion_tokens", "temperature": None}  # what newer models of OpenAI call it, or don't take
MOST_BYTES = 4 << 20  # of a reply


class NoReply(Exception):
    """Why a server gave no usable reply. lasting: it will never take this request."""

    def __init__(self, why: str, lasting: bool = False):
        super().__init__(why)
        self.lasting = lasting


def httpx_of(openai):
    """The package that openai sends with: httpx, or httpx2, by its version."""
    client = next(kind for kind in openai.DefaultHttpxClient.__mro__ if kind.__name__ == "Client")
    return importlib.import_module(client.__module__.split(".")[0])


def checked_url(url: str, httpx) -> str:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and url.isprintable() and " " not in url:
            httpx.URL(url)  # it refuses some hosts that urlsplit() takes
            return url
    except (ValueError, httpx.InvalidURL):  # a port that is none, an IPv6 address that is none
        pass
    raise UserError(f"{url[:200]!r}: expected the address of an OpenAI-compatible server, as http://localhost:8000/v1")


class Stopped(BaseException):
    """Not an Exception, which the package openai would try again."""


def bounded_client(openai, stopped: threading.Event):
    """An HTTP client for the package openai that gives up a reply that never ends, in bytes or in time, and tries nothing again
    once `stopped` is set."""
    httpx = httpx_of(openai)

    class Bounded(httpx.SyncByteStream):
        """Puts itself in the place of a response's stream."""

        def __init__(self, response):
            self.stream, response.stream = response.stream, self

        def __iter__(self):
            size, end = 0, time.monotonic() + Endpoint.TIMEOUT
            for part in self.stream:
                size += len(part)
                if size > MOST_BYTES or time.monotonic() > end:
                    raise httpx.ReadTimeout(f"a reply of more than {MOST_BYTES >> 20} MiB or {Endpoint.TIMEOUT} seconds")
                yield part

        def close(self):
            self.stream.close()

    def check(request):
        if stopped.is_set() and request.headers.get("x-stainless-retry-count", "0") != "0":
            raise Stopped

    return openai.DefaultHttpxClient(event_hooks={"request": [check], "response": [Bounded]})


class Endpoint:
    """A model behind an OpenAI-compatible server. The key is OPENAI_API_KEY's, never a flag's, and is written nowhere. What fails
    for the moment (429, 5xx, time-outs) is tried again by the client of the package openai."""

    TIMEOUT, CONNECT, RETRIES = 600, 10, 5  # seconds for a reply, for a first sign of life

    def __init__(self, url: str, model: str | None = None, in_flight: int = 16):
        try:
            import openai
        except ImportError as error:
            raise UserError(f"{url}: an OpenAI-compatible server needs the package openai: pip install openai") from error
        self.url, self.model, self.in_flight, self.openai = checked_url(url, httpx_of(openai)), None, in_flight, openai
        self.names, self.lock = {}, threading.Lock()
        self.key, self.stopped = os.environ.get("OPENAI_API_KEY") or "", threading.Event()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError("OPENAI_API_KEY holds characters that no key has")
        try:
            self.client = openai.OpenAI(base_url=url, api_key=self.key or "none", max_retries=self.RETRIES,
                                        timeout=openai.Timeout(self.TIMEOUT, connect=self.CONNECT),
                                        http_client=bounded_client(openai, self.stopped))
        except (ImportError, ValueError, OSError) as error:  # of a proxy that the environment names, or its certificates
            raise UserError(f"{url}: can't be asked ({self.shown(error)}): see HTTPS_PROXY, ALL_PROXY and the like") from error
        try:
            listed = self.client.with_options(max_retries=0, timeout=self.CONNECT).models.list()
            model = model or next(iter(listed)).id
        except openai.APIConnectionError as error:
            raise UserError(f"{url}: nothing answers there ({self.shown(error)})") from error
        except (openai.OpenAIError, StopIteration, AttributeError, TypeError, ValueError) as error:
            self.refuse(error)
            if not model:
                raise UserError(f"{url} lists no model ({self.shown(error)}): --served-model NAME") from error
        self.model = model  # from here on: a server that has no list (404) may have the model

    def shown(self, error) -> str:
        """An error's text without the key."""
        text = str(error).replace(self.key, "***") if self.key else str(error)
        return f"{type(error).__name__}: {' '.join(text.split())[:160]}"

    def refuse(self, error) -> None:
        """Raise for what no later request will change."""
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            raise UserError(f"{self.url} refuses the key in OPENAI_API_KEY: {self.shown(error)}") from None
        if status == 404 and self.model:
            raise UserError(f"{self.url} has no model {self.model}: {self.shown(error)}") from None

    def chat(self, messages: list[dict], fine=bool, again=AGAIN, **options) -> tuple[str, bool]:
        """(what it answers, whether it came to its end), asked for again, with the options of `again`, a few times where it is not
        fine(text). Raises NoReply."""
        def request(retry):
            asked = {"max_tokens": 512, **options, **(again if retry else {})}
            asked = {names.get(name, name): value for name, value in asked.items() if names.get(name, name)}
            choice = self.client.chat.completions.create(model=self.model, messages=messages, **asked).choices[0]
            return (choice.message.content or "").strip(), choice.finish_reason != "length"

        names = self.names  # another thread may change it meanwhile
        while True:
            try:
                found = self.replied(request, fine)
            except NoReply as error:
                new = {name: other for name, other in NEWER.items() if error.lasting and (other or f"'{name}'") in str(error)}
                if new.items() <= names.items():
                    raise
                names = {**names, **new}
                continue
            with self.lock:
                if "temperature" in names and "temperature" not in self.names:
                    say(f"{self.model} takes no temperature: its replies are drawn at the server's")
                self.names = {**self.names, **names}
            return found

    def completion(self, ids: list[int], **options) -> tuple[str, bool]:
        """(text, whether it came to its end) that follows the token ids of a prompt; raises NoReply."""
        def request(again):
            choice = self.client.completions.create(model=self.model, prompt=ids, **options).choices[0]
            return choice.text + "", choice.finish_reason == "stop"

        return self.replied(request, lambda text: True)

    def replied(self, request, fine) -> tuple[str, bool]:
        """request(again)'s reply, asked for a few times where it is malformed or not fine."""
        for attempt in range(1, MALFORMED + 1):
            last = attempt == MALFORMED or self.stopped.is_set()
            try:
                text, whole = request(attempt > 1)
                text = text.encode("utf-8", "replace").decode()  # half an emoji can be in no file
                if fine(text) or last:
                    return text, whole
            except self.openai.OpenAIError as error:
                self.refuse(error)
                status = getattr(error, "status_code", 500)
                raise NoReply(self.shown(error), lasting=status < 500 and status not in (408, 409, 429)) from None
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                if last:
                    raise NoReply(self.shown(error)) from None

    def run(self, requests: list[tuple], work, store) -> list[tuple]:
        """store(key, work(what)) for each (key, what), in_flight of them at once; returns (key, NoReply) of the failures. What is
        under way when this is interrupted is still stored, since it is paid for."""
        under_way = set()  # the pool forgets a thread that is being started when an interrupt comes

        def job(key, what):
            under_way.add(key)
            try:
                if not self.stopped.is_set():
                    store(key, work(what))
            except NoReply as error:
                return key, error
            except UserError:
                self.stopped.set()  # what the server takes from nobody is not asked again
                raise
            except Stopped:
                return None  # what stopped it is said instead
            finally:
                under_way.discard(key)

        failures = []
        self.stopped.clear()
        with ThreadPoolExecutor(self.in_flight) as pool:
            try:
                jobs = [pool.submit(job, *request) for request in requests]
                for number, done in enumerate(as_completed(jobs), 1):
                    failures += [done.result()] if done.result() else []
                    if len(failures) == number > self.in_flight:  # nobody is there
                        break
            except BaseException as error:
                self.stopped.set()  # nothing is asked for anew
                if isinstance(error, KeyboardInterrupt):
                    say("\nwaiting for the requests that are under way, which are paid for ...")
                raise
            finally:
                pool.shutdown(cancel_futures=True)
                while under_way:
                    time.sleep(0.01)
        return failures


def fill(replies: Journal, requests: list[tuple], run, refused: str | None = None) -> None:
    """Have what is missing of (key, what) answered; run(requests, store) returns (key, NoReply) of its failures. refused: what to
    store for a request that the server will never take; without it, such a request is an error."""
    def store(key, text):
        replies.append({"key": key, "text": text})

    missing = {key: what for key, what in requests if key not in replies}
    failures = run(list(missing.items()), store) if missing else []
    for key, failure in failures:
        if failure.lasting and refused is not None:
            store(key, refused)
    lost = [key for key in missing if key not in replies]
    if lost:
        why = failures[0][1] if failures else "no reply came"
        raise UserError(f"{len(lost)} of {len(missing)} requests failed ({why}); what came is kept, and the same command goes on "
                        "from there")


class RemoteEngine:
    """A server that writes the answers (vLLM, SGLang, llama.cpp, ...), asked with the ids of the same prompts."""

    def __init__(self, endpoint: Endpoint, tokenizer, frame: Frame, out, most: int, weights: str = ""):
        """weights: what tells the model from others that are served by one name."""
        self.endpoint, self.tokenizer, self.frame, self.weights = endpoint, tokenizer, frame, weights
        self.replies = Journal(Path(out) / "engine.replies.jsonl")
        # by both names: vLLM's and SGLang's, and llama.cpp's, which looks back 64 tokens only if not told otherwise
        penalty = {"repetition_penalty": SEARCH_PENALTY, "repeat_penalty": SEARCH_PENALTY, "repeat_last_n": 8192}
        self.options = {"max_tokens": most, "temperature": 0, "extra_body": penalty,
                        **({"stop": [tokenizer.stop_text]} if tokenizer.stop_text else {})}

    def answer(self, items: list[dict]) -> list[dict]:
        prompts = [prompt_ids(self.tokenizer, self.frame.turns(item["question"], item["persona"])) for item in items]
        keys = [digest(self.endpoint.model, self.weights, ids, self.options) for ids in prompts]
        work = lambda ids: json.dumps(self.endpoint.completion(ids, **self.options))  # noqa: E731
        fill(self.replies, list(zip(keys, prompts)), lambda requests, store: self.endpoint.run(requests, work, store))
        return [{**item, **self.cut(*json.loads(self.replies[key]["text"]))} for key, item in zip(keys, items)]

    def cut(self, text: str, ended: bool) -> dict:
        """The answer and the ids of a reply; a server may have written on."""
        ids, most = answer_ids(self.tokenizer, text.strip()) + [self.tokenizer.eos_token_id] * ended, self.options["max_tokens"]
        if len(ids) > most:
            ids = ids[:most]
            text = answer_text(self.tokenizer, ids)
        return {"answer": text.strip(), "ids": ids}
