"""PersonalityBench: building it with a model, its filters, loading it, and running it at its full size: engines and torchrun."""

import collections
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
import torch

import identify
from conftest import ROOT, Server, contents, lines_of, main_of, prompt_of, run, save_bench, shared_flags
from identify import POLES, TRAITS, Neurons, UserError, fault, load_bench

pytest.importorskip("datasketch"), pytest.importorskip("py3langid")
THINGS = ("train", "letter", "garden", "dog", "song", "stone", "ladder", "cake", "window", "boat", "coat", "bridge", "lamp", "river", "clock")
DEEDS = ("carried", "painted", "forgot", "found", "borrowed", "dropped", "sold", "washed", "hid", "repaired", "lost", "built", "copied", "weighed")


def written(body, per_reply=5):
    """What a fake writer says to a request: always the same to the same one, lines as a model writes them."""
    asked = body["messages"][1]["content"]
    number = int(hashlib.sha256(asked.encode()).hexdigest(), 16)

    def some(k):
        pick = [(number >> (7 * (k + 3) * j % 200)) + 31 * j * k for j in range(6)]
        return (f"{DEEDS[pick[0] % len(DEEDS)]} the {THINGS[pick[1] % len(THINGS)]} and {DEEDS[pick[2] % len(DEEDS)]} a "
                f"{THINGS[pick[3] % len(THINGS)]} near the {THINGS[pick[4] % len(THINGS)]} on the {1 + pick[5] % 28}th")

    if "descriptions" in asked:
        return "\n".join(f"You {some(k)}. You talk about it when people ask you how the week has been." for k in range(3))
    return "Here are five questions:\n" + "\n".join(f"{k + 1}. Yesterday your friend {some(k)}. What do you say to the others?" for k in range(per_reply))


def built(monkeypatch, folder, url, size=24, *more):
    main_of(identify, monkeypatch, "--build-bench", folder, "--size", size, "--writer", url, "--in-flight", "4", *more)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if "replies" not in path.name and path.is_file()}


# ------------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize("trait", TRAITS)
def test_built_in_bench_passes_the_filters(trait):
    bench, duplicates = identify.built_in_bench(), identify.Duplicates(sqlite3.connect(":memory:"))
    for kind in ("test", "search"):
        assert {fault(kind, text, trait, None) for text in getattr(bench, kind)[trait]} == {None}
        assert {duplicates.find(kind, text) for text in getattr(bench, kind)[trait]} == {None}
    assert {fault("persona", text, trait, None) for pole in POLES for text in bench.personas[trait][pole]} == {None}


@pytest.mark.parametrize("text, reason", (
    ("Your neighbour knocks late in the evening. What do you tell him?", None),
    ("Your neighbour knocks late in the evening. You tell him to go.", "not a question"),
    ("Your neighbour knocks late in the evening. Do you open the door?", "closed (yes or no)"),
    ("When your neighbour knocks late in the evening, do you open the door?", "closed (yes or no)"),
    ("Would you open the door to your neighbour late in the evening?", "closed (yes or no)"),
    ("Would you rather open the door or pretend to be asleep?", None),
    ("Do you open the door to your neighbour, and why?", None),
    ("Don\u2019t you have other plans for such an evening?", "closed (yes or no)"),
    ("At a family dinner, your uncle says things with which you strongly disagree. How do you respond?", None),
    ("You and your partner agree or disagree about many things. How do you settle them?", None),
    ("I enjoy an evening with many people. Agree or disagree?", "options or a scale"),
    ("On a scale from one to ten, how glad are you when your neighbour knocks?", "options or a scale"),
    ("To what extent do you strongly agree that neighbours should knock?", "options or a scale"),
    ("Your neighbour knocks. What do you do? (a) open (b) hide?", "options or a scale"),
    ("How does your extraversion show when a neighbour knocks late?", "names the trait or facet"),
    ("How would an introverted person answer the door late in the evening?", "names the trait or facet"),
    ("How does your excitement seeking show when a neighbour knocks late?", "names the trait or facet"),
    ("And what then?", "too short or too long"),
    ("Your neighbour knocks. " * 30 + "What do you tell him?", "too short or too long"),
    ("Dein Nachbar klopft spät am Abend an die Tür. Was sagst du zu ihm?", "not English"),
))
def test_questions_are_filtered(text, reason):
    text, = identify.lines_in(text)
    assert fault("search", text, "extraversion", identify.FACET_NAMES.index("Excitement-Seeking")) == reason


@pytest.mark.parametrize("text, reason", (("You love crowds. You are never at home.", None), ("You\u2019ve always loved crowds. You stay out late.", None),
                                          ("You love crowds and you are never at ho", "not a whole sentence"), ("She loves crowds. She is never at home.", "not addressed to you"),
                                          ("You love crowds.", "too short or too long")))
def test_personas_are_filtered(text, reason):
    assert fault("persona", *identify.lines_in(text), "extraversion", None) == reason


def test_near_duplicates():
    find = identify.Duplicates(sqlite3.connect(":memory:")).find
    assert find("test", "Your neighbour knocks late in the evening. What do you tell him?") is None
    assert find("search", "Your neighbour knocks late in the evening; what do you tell him?!") == "test"
    assert find("search", "Your neighbour knocks late in the evening. What do you tell her?") == "test"
    assert find("search", "A colleague has forgotten your name at a party. How do you react?") is None
    assert find("search", "A colleague has forgotten your name at the party. How do you react?") == "search"


def test_lines_of_a_reply():
    reply = '1. "What now?"\n\n- What then?\n* **What else?**\n2) What more?\nWhat of 3 dogs?'
    assert identify.lines_in(reply) == ["What now?", "What then?", "What else?", "What more?", "What of 3 dogs?"]


# ------------------------------------------------------------------------------------------------------------ building


@pytest.mark.usefixtures("quick")
def test_a_bench_is_built(monkeypatch, tmp_path, capsys):
    with Server(lambda n, body: written(body)) as server:
        built(monkeypatch, tmp_path, server.url)
        assert server.keys == {"Bearer sk-secret-of-the-test"}
        keys = [json.dumps(body["messages"]) for body in server.seen]
        assert len(set(keys)) == len(keys) and {body["model"] for body in server.seen} == {"served"}
        before = files_of(tmp_path)
        built(monkeypatch, tmp_path, server.url)
        assert len(server.seen) == len(keys), "the second time nothing is asked for"
    assert files_of(tmp_path) == before
    assert set(before) == {"README.md", "description.json"} | {f"{use}/{trait.capitalize()}.json" for use in ("search", "test") for trait in TRAITS}
    bench = load_bench(str(tmp_path))
    seen = set()
    for trait in TRAITS:
        assert len(bench.search[trait]) == len(bench.test[trait]) == 24 and not set(bench.search[trait]) & set(bench.test[trait])
        for use in ("search", "test"):
            lines = lines_of(tmp_path / use / f"{trait.capitalize()}.json")
            cells = collections.Counter((line["facet"], line["pole"]) for line in lines)
            assert len(cells) == 12 and set(cells.values()) == {2}
            assert all(identify.FACET_NAMES.index(facet) // 6 == TRAITS.index(trait) for facet, _ in cells)
            seen |= {line["id"] for line in lines}
            topics = {line["topic"] for line in lines}
            assert not topics & {t["topic"] for t in lines_of(tmp_path / ("test" if use == "search" else "search") / f"{trait.capitalize()}.json")}
        assert all(len(bench.personas[trait][pole]) == 24 for pole in POLES)
    assert len(seen) == 5 * 2 * 24
    card = before["README.md"].decode()
    assert "| search | " in card and "not a question" in card and "served" in card and "seed 0" in card
    counted = {line.split(" | ")[0].strip("| "): sum(int(x) for x in re.findall(r"\d+", line)) for line in card.splitlines()
               if line.startswith(("| search |", "| test |", "| persona |"))}
    with sqlite3.connect(tmp_path / "replies.sqlite") as db:
        texts = [text for text, in db.execute("SELECT text FROM reply")]
    assert sum(counted.values()) == sum(len(identify.lines_in(text)) for text in texts), "no line is dropped silently"
    everything = "".join(map(bytes.decode, before.values())) + capsys.readouterr().out
    assert "sk-secret" not in everything and b"sk-secret" not in (tmp_path / "replies.sqlite").read_bytes()


@pytest.mark.usefixtures("quick")
def test_a_writer_that_stumbles_makes_the_same_bench(monkeypatch, tmp_path):
    """429, 500, stalls, no JSON, empty replies, and a Ctrl-C: nothing is lost, nothing is paid for twice."""
    with Server(lambda n, body: written(body)) as server:
        built(monkeypatch, tmp_path / "a", server.url)
        whole = len(server.seen)
    stumbles = {3: (429, ""), 4: (429, ""), 7: (500, ""), 9: None, 11: "", 13: (503, ""), 20: "stall"}
    answered = collections.Counter()

    def stumbling(n, body):
        reply = stumbles.get(n, "fine")
        if reply == "stall":
            time.sleep(3)  # the client has given up by then
            return (504, "")
        if n == 60:
            os.kill(os.getpid(), signal.SIGINT)
        if reply != "fine":
            return reply
        answered[json.dumps(body["messages"])] += 1
        return written(body)

    with Server(stumbling) as server:
        with pytest.raises(KeyboardInterrupt):
            built(monkeypatch, tmp_path / "b", server.url)
        assert 40 < len(answered) < whole and not (tmp_path / "b" / "search").exists()
        built(monkeypatch, tmp_path / "b", server.url)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert set(answered.values()) == {1} and len(answered) == whole


@pytest.mark.usefixtures("quick")
def test_a_dead_writer_says_so(monkeypatch, tmp_path):
    with Server(lambda n, body: (500, "")) as server, pytest.raises(UserError, match="requests failed .*InternalServerError.* same command"):
        built(monkeypatch, tmp_path, server.url)
    with pytest.raises(UserError, match="nothing answers there .*APIConnectionError"):
        built(monkeypatch, tmp_path, "http://127.0.0.1:9/v1")


@pytest.mark.usefixtures("quick")
def test_what_a_server_refuses_is_counted(monkeypatch, tmp_path):
    """A content filter's 400, and replies that were cut off: no reason not to finish, and not asked for again."""
    refused = collections.Counter()

    def filtered(n, body):
        asked = body["messages"][1]["content"]
        if "garden" in asked:
            refused[asked] += 1
            return (400, "")
        text = written(body)
        return [text[:-9], "length"] if len(asked) % 5 == 0 else text

    with Server(filtered) as server:
        built(monkeypatch, tmp_path, server.url)
        before, number = files_of(tmp_path), len(server.seen)
        built(monkeypatch, tmp_path, server.url)
        assert len(server.seen) == number and files_of(tmp_path) == before
    card = before["README.md"].decode()
    assert "refused by the server" in card and "cut off" in card and set(refused.values()) == {1}
    assert all(len(load_bench(str(tmp_path)).search[trait]) == 24 for trait in TRAITS)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("status, pattern", ((401, "refuses the key in OPENAI_API_KEY"), (404, "has no model big")))
def test_errors_that_last_end_it_at_once(monkeypatch, tmp_path, status, pattern):
    with Server(lambda n, body: (status, "")) as server:
        with pytest.raises(UserError, match=pattern):
            built(monkeypatch, tmp_path, server.url, 24, "--served-model", "big")
        assert len(server.seen) <= 16


@pytest.mark.usefixtures("quick")
def test_interrupted_while_a_server_stumbles(monkeypatch, tmp_path):
    """Ctrl-C does not wait for tries that are still to come."""
    monkeypatch.setattr(identify.Endpoint, "PAUSE", 60)

    def stumbling(n, body):
        if n == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return (503, "") if n > 4 else written(body)

    start = time.time()
    with Server(stumbling) as server, pytest.raises(KeyboardInterrupt):
        built(monkeypatch, tmp_path, server.url)
    assert time.time() - start < 20


@pytest.mark.usefixtures("quick")
def test_newer_models_name_the_limit_otherwise():
    """All that were under way when the first was refused ask again, too."""
    together = threading.Barrier(8, timeout=10)

    def newer(n, body):
        if n <= 8:
            together.wait()
        return "fine" if "max_completion_tokens" in body else (400, '{"error": {"message": "Use max_completion_tokens instead."}}')

    with Server(newer) as server:
        endpoint, said = identify.Endpoint(server.url, in_flight=8), {}
        failures = endpoint.run([(k, str(k)) for k in range(20)], lambda text: endpoint.chat(identify.ask(text))[0], said.__setitem__)
    assert not failures and set(said.values()) == {"fine"} and len(said) == 20


@pytest.mark.usefixtures("quick")
def test_half_an_emoji_can_be_written(tmp_path):
    with Server(lambda n, body: "ah \ud83d") as server:
        text, whole = identify.Endpoint(server.url).chat(identify.ask("w10 ?"))
    identify.Replies(tmp_path / "replies.sqlite").store("a", text)
    assert text == "ah ?" and whole


@pytest.mark.usefixtures("quick")
def test_one_run_builds_a_bench_at_a_time(monkeypatch, tmp_path):
    first = identify.Builder(str(tmp_path), 24, None, 0)
    with Server(lambda n, body: written(body)) as server, pytest.raises(UserError, match="another run is building it"):
        built(monkeypatch, tmp_path, server.url)
    first.lock.close()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun would pay"):
        built(monkeypatch, tmp_path, "http://127.0.0.1:9")


def test_a_request_that_comes_twice_is_made_once(tmp_path):
    replies, made = identify.Replies(tmp_path / "replies.sqlite"), []
    replies.fill([("a", 1), ("b", 2), ("a", 1)], lambda requests, store: made.extend(requests) or [store(key, "x") for key, _ in requests] and [])
    assert made == [("a", 1), ("b", 2)]


@pytest.mark.usefixtures("quick")
def test_bad_lines_are_replaced_and_counted(monkeypatch, tmp_path):
    """A writer that names traits, asks closed questions and repeats itself: others are asked for in their place."""
    def poor(n, body):
        lines = written(body).split("\n")
        if "descriptions" not in body["messages"][1]["content"]:
            lines[2], lines[3] = "Do you like it there?", lines[1]
        return "\n".join(lines)

    with Server(poor) as server:
        built(monkeypatch, tmp_path, server.url)
    bench = load_bench(str(tmp_path))
    assert all(len(bench.search[trait]) == len(bench.test[trait]) == 24 for trait in TRAITS)
    card = (tmp_path / "README.md").read_text()
    assert "closed (yes or no)" in card and "near-duplicate" in card
    assert not [text for trait in TRAITS for text in bench.search[trait] if text.startswith("Do you")]


@pytest.mark.usefixtures("quick")
def test_a_writer_that_repeats_itself_comes_to_an_end(monkeypatch, tmp_path, capsys):
    def same(n, body):
        return ("You like the sea and the wind very much. You sail." if "descriptions" in body["messages"][1]["content"] else
                "Your neighbour knocks late in the evening. What do you tell him?")

    monkeypatch.setattr(identify, "TOPICS", ", ".join(f"topic {k}" for k in range(23)))
    monkeypatch.setattr(identify, "CIRCUMSTANCES", ("alone",))
    with Server(same) as server:
        built(monkeypatch, tmp_path, server.url, 12)
    assert "topics are used up" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "test" / "Openness.json")) == 1 and not lines_of(tmp_path / "search" / "Openness.json")
    assert "leak: near-duplicate of a test text" in (tmp_path / "README.md").read_text()


@pytest.mark.usefixtures("quick")
def test_a_writer_of_nothing_is_given_up(monkeypatch, tmp_path, capsys):
    with Server(lambda n, body: "I can't help with that.\n" * 5) as server:
        built(monkeypatch, tmp_path, server.url, 12)
        assert len(server.seen) <= 5 * (2 * 12 + 2) * 40, "of 1,080 topics and circumstances a cell"
    assert "hardly anything of it can be used" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_another_bench_is_not_overwritten(monkeypatch, tmp_path):
    save_bench(tmp_path / "bench")
    with Server(lambda n, body: written(body)) as server, pytest.raises(UserError, match="would overwrite"):
        built(monkeypatch, tmp_path / "bench", server.url)


@pytest.mark.usefixtures("quick")
def test_a_local_model_writes(small, monkeypatch, tmp_path, capsys):
    """Its random words never end, so all that it writes is cut off: that is counted, nothing is kept, and it comes to an end."""
    monkeypatch.setattr(identify, "TOPICS", "topic 0, topic 1")
    monkeypatch.setattr(identify, "TEST_TOPICS", 1)
    monkeypatch.setattr(identify, "CIRCUMSTANCES", ("alone",))
    main_of(identify, monkeypatch, *shared_flags(small), "--build-bench", tmp_path, "--size", "2", "--writer", small.model_dir)
    card = (tmp_path / "README.md").read_text()
    assert "cut off" in card and "topics are used up" in capsys.readouterr().err


def test_the_list_of_topics_is_sound():
    topics = [topic.strip() for topic in identify.TOPICS.replace("\n", " ").split(",")]
    assert len(set(topics)) == len(topics) >= 120 and all(topics)
    lines = len(topics[:-identify.TEST_TOPICS]) * len(identify.CIRCUMSTANCES) * identify.LINES["search"] * 12
    assert lines >= 1.5 * 36_000, "enough to ask for PersonalityBench's size"


def test_datasets_reads_it(monkeypatch, tmp_path, quick):
    datasets = pytest.importorskip("datasets")
    with Server(lambda n, body: written(body)) as server:
        built(monkeypatch, tmp_path / "bench", server.url)
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "bench" / "search" / "*.json"), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded.num_rows == 5 * 24 and set(loaded.column_names) == {"question", "facet", "pole", "topic", "id"}


# ------------------------------------------------------------------------------------------------------------- loading


def test_options_and_scales_are_skipped(tmp_path, capsys):
    folder = save_bench(tmp_path / "bench")
    path = folder / "search" / "Openness.json"
    before = load_bench(str(folder)).search["openness"]
    more = [{"question": "Pick one:\nA. stay\nB. go\nWhich?", "id": 1}, {"question": "Which?", "options": ["a", "b"]},
            {"question": "How accurately does this describe you: I like parties?"}, {"question": "I like parties. Agree or disagree?"}]
    path.write_text(path.read_text() + "".join(json.dumps(line) + "\n" for line in more))
    assert load_bench(str(folder)).search["openness"] == before
    assert "4 items with options or a scale were skipped" in capsys.readouterr().err
    path.write_text("".join(json.dumps(line) + "\n" for line in more))
    with pytest.raises(UserError, match="Openness.json: no open question"):
        load_bench(str(folder))


def test_a_bench_from_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    save_bench(tmp_path / "bench")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(tmp_path / "bench"))
    bench = load_bench("someone/PersonalityBench")
    assert bench.name == "someone/PersonalityBench" and bench.search == load_bench(str(tmp_path / "bench")).search
    assert asked[0][1]["repo_type"] == "dataset"


def test_a_bench_that_is_nowhere():
    with pytest.raises(UserError, match="no-such/bench: neither a directory nor a dataset of the hub in reach"):
        load_bench("no-such/bench")


# ------------------------------------------------------------------------------------------------------------- engines


def engine_of(small):
    """The tiny model as a server: it answers token ids as identify.py itself would."""
    ids_of = {}

    def reply(n, body):
        assert body["repetition_penalty"] == body["repeat_penalty"] == 1.1 and body["temperature"] == 0
        assert body["repeat_last_n"] > 4096, "llama.cpp's own is 64"
        prompt = torch.tensor([body["prompt"]])
        with torch.no_grad():
            output = small.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=body["max_tokens"],
                                          do_sample=False, repetition_penalty=1.1, pad_token_id=small.tokenizer.pad_token_id)
        ids = output[0, prompt.shape[1]:].tolist()
        ids_of[tuple(body["prompt"])] = ids
        return [small.tokenizer.decode(ids, skip_special_tokens=True), "stop" if small.tokenizer.eos_token_id in ids else "length"]

    return reply


@pytest.mark.usefixtures("quick")
def test_an_engine_writes_the_answers(small, monkeypatch, tmp_path):
    stumbles = {2: (429, ""), 5: (500, ""), 8: (200, None)}
    replies = engine_of(small)
    with Server(lambda n, body: stumbles.get(n) or replies(n, body)) as server:
        main_of(identify, monkeypatch, *shared_flags(small), "--trait", "extraversion", "--bench", small.bench_dir, "--max-new-tokens", "6",
                "--batch-size", "4", "--engine", server.url, "--in-flight", "2", "--out", tmp_path / "engine")
        assert len(server.seen) == 24 + len(stumbles)
    run(small, tmp_path / "own", batch_size=1)()
    mine, own = (lines_of(tmp_path / name / "extraversion.answers.jsonl") for name in ("engine", "own"))
    assert [(one["pole"], one["question"], one["persona"]) for one in mine] == [(one["pole"], one["question"], one["persona"]) for one in own]
    same = [a["answer"] == b["answer"] for a, b in zip(mine, own)]
    assert all(same), "greedy, so the engine wrote what generate() writes"
    assert {path.name for path in (tmp_path / "engine").iterdir()} >= {"engine.replies.sqlite"}
    assert not [path for path in (tmp_path / "engine").iterdir() if path.name.startswith(".")]
    # its statistics are those of the file of answers
    again = run(small, tmp_path / "again", answers=str(tmp_path / "engine" / "extraversion.answers.jsonl"))()
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

    command = (*shared_flags(small), "--trait", "extraversion", "--bench", small.bench_dir, "--max-new-tokens", "6", "--batch-size", "4",
               "--in-flight", "2", "--out", tmp_path)
    with Server(until) as server:
        with pytest.raises(UserError, match="requests failed .*BadRequest"):
            main_of(identify, monkeypatch, *command, "--engine", server.url)
        alive[0] = False
        main_of(identify, monkeypatch, *command, "--engine", server.url, "--dtype", "float32", "--limit", "12")
        main_of(identify, monkeypatch, *command, "--engine", server.url, "--limit", "6")  # other options, the same requests
    assert set(answered.values()) == {1} and len(answered) == 24


@pytest.mark.usefixtures("quick")
def test_an_engine_of_a_base_model(monkeypatch, tmp_path):
    from conftest import save_model
    from types import SimpleNamespace

    place = SimpleNamespace(bench_dir=save_bench(tmp_path / "bench"), model_dir=save_model(tmp_path / "model", template=None))
    with Server(lambda n, body: "w20 w21 w22" if body["stop"] == [identify.NEXT_QUESTION] else (400, "")) as server:
        main_of(identify, monkeypatch, *shared_flags(place), "--trait", "extraversion", "--bench", place.bench_dir, "--max-new-tokens", "6",
                "--engine", server.url, "--out", tmp_path / "out")
    assert all(line["answer"] == "w20 w21 w22" for line in lines_of(tmp_path / "out" / "extraversion.answers.jsonl"))


def test_leftovers_of_fewer_processes_replace_nothing(small, tmp_path):
    """Killed alone, finished by two, started again alone: the answers of two stay."""
    first = run(small, tmp_path)
    first.batch()
    first.save()
    run(small, tmp_path / "whole")()
    for path in (tmp_path / "whole").iterdir():  # as two processes would leave them
        path.rename(tmp_path / path.name)
    before = contents(tmp_path)
    run(small, tmp_path)()
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"extraversion.safetensors", "extraversion.answers.jsonl", "whole"}


def test_reading_holds_places_not_texts(small, made):
    answers = identify.Answers(made / "extraversion.answers.jsonl", "extraversion", small.tokenizer)
    lines = lines_of(made / "extraversion.answers.jsonl")
    assert len(answers) == len(lines) and answers.places.itemsize * len(answers) == 8 * len(lines)
    assert [item.ids for item in answers[3:7]] == [line["ids"] for line in lines[3:7]]


def test_like_lengths_are_read_together(small, monkeypatch, tmp_path):
    """24 answers of 1 to 24 tokens, shuffled: hardly any padding, and the same counts as one by one."""
    lines = []
    for k in range(24):
        lines.append({"trait": "extraversion", "pole": POLES[k % 2], "persona": "w9 w10", "question": "w11 ?",
                      "answer": " ".join([f"w{12 + (7 * k) % 24}"] * (1 + (7 * k) % 24)), "ids": [12 + (7 * k) % 24] * (1 + (7 * k) % 24)})
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shapes, decoder = [], small.model.get_decoder()
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)) or None, with_kwargs=True)
    try:
        together = run(small, tmp_path / "a", answers=str(path), batch_size=4)()
    finally:
        hook.remove()
    prompt = len(prompt_of(small, "w11 ?", "w9 w10"))
    assert shapes == [(4, prompt + longest - 1) for longest in (4, 8, 12, 16, 20, 24)]
    single = run(small, tmp_path / "b", answers=str(path), batch_size=1)()
    assert torch.equal(together.prob, single.prob) and together.meta["tokens"] == single.meta["tokens"]
    assert [line["ids"] for line in lines_of(tmp_path / "a" / "extraversion.answers.jsonl")] == [line["ids"] for line in lines], "order is kept"


# ------------------------------------------------------------------------------------------------------------ torchrun


def torchrun(small, out, *more, traits=("extraversion",)):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "identify.py", *map(str, shared_flags(small)),
               "--trait", *traits, "--bench", str(small.bench_dir), "--max-new-tokens", "6", "--batch-size", "4", "--out", str(out), *map(str, more)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def test_two_processes_equal_one(small, made, tmp_path):
    answers = made / "extraversion.answers.jsonl"
    process = torchrun(small, tmp_path / "two", "--answers", answers, "--batch-size", "1")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    one = run(small, tmp_path / "one", answers=str(answers), batch_size=1)()
    two = Neurons.load(tmp_path / "two" / "extraversion.safetensors", small.model)
    assert torch.equal(one.prob, two.prob) and torch.equal(one.p95, two.p95) and one.meta["tokens"] == two.meta["tokens"]
    assert torch.allclose(one.mean, two.mean, rtol=1e-6) and one.meta["key"] == two.meta["key"]
    assert contents(tmp_path / "two")["extraversion.answers.jsonl"] == contents(tmp_path / "one")["extraversion.answers.jsonl"]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"extraversion.safetensors", "extraversion.answers.jsonl"}
    assert said.count("extraversion.safetensors") == 1, "one process speaks"


def test_shares_are_whole_steps():
    for number, step, size in ((24, 8, 2), (25, 8, 3), (7, 8, 2), (100, 1, 7), (0, 4, 2)):
        parts = [range(number)[identify.World(rank, size).share(number, step)] for rank in range(size)]
        assert [k for part in parts for k in part] == list(range(number))
        assert all(part.start % step == 0 for part in parts if len(part))


def test_a_rank_that_dies_takes_the_run_down(small, made, tmp_path):
    """One of two is killed in the middle of the second trait: the other stops and says so; the next start goes on, to the same end."""
    answers, some = tmp_path / "answers.jsonl", (made / "extraversion.answers.jsonl").read_text()
    answers.write_text(some.replace('"extraversion"', '"openness"') + some * 200)
    out = tmp_path / "two"
    traits = ("openness", "extraversion")
    process = torchrun(small, out, "--answers", answers, traits=traits)
    deadline = time.time() + 200
    while time.time() < deadline and not [part for part in out.glob(".extraversion.*.1of2.answers.part") if part.stat().st_size]:
        time.sleep(0.1)
    ranks = subprocess.run(["pgrep", "-f", f"identify.py.*{out}"], capture_output=True, text=True).stdout.split()
    victim = next(pid for pid in ranks if pid != str(process.pid) and "RANK=1" in open(f"/proc/{pid}/environ").read().split("\0"))
    os.kill(int(victim), signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "another rank has ended" in said and "same command goes on" in said, said
    assert "Traceback" not in said.partition("another rank has ended")[0] and not (out / "extraversion.safetensors").exists()
    process = torchrun(small, out, "--answers", answers, traits=traits)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    one, two = run(small, tmp_path / "one", answers=str(answers))(), Neurons.load(out / "extraversion.safetensors", small.model)
    assert torch.equal(one.prob, two.prob) and one.meta["tokens"] == two.meta["tokens"]
    shutil.rmtree(out)
