"""identify.py --build-bench: its filters, near-duplicates, and building a PersonalityBench with a writer of any kind."""

import collections
import hashlib
import json
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
from tqdm import tqdm

import identify
from conftest import Server, lines_of, little_room, main_of, save_bench
from personality import POLES, TRAITS, UserError, load_bench, write_bench
from personality.endpoint import Endpoint
from personality.frame import conversation
from personality.questions import all_facets, built_in_bench, text_table
from personality.store import only_run
from personality.write_bench import PER_REPLY, Builder, Duplicates, LocalWriter, fault, reply_lines

pytest.importorskip("datasketch"), pytest.importorskip("py3langid")
THINGS = ("train", "letter", "garden", "dog", "song", "stone", "ladder", "cake", "window", "boat", "coat", "bridge", "lamp",
          "river", "clock")
DEEDS = ("carried", "painted", "forgot", "found", "borrowed", "dropped", "sold", "washed", "hid", "repaired", "lost", "built",
         "copied", "weighed")


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
    return "Here are five questions:\n" + "\n".join(f"{k + 1}. Yesterday your friend {some(k)}. What do you say to the others?"
                                                    for k in range(per_reply))


def built(monkeypatch, folder, url, size=24, *more):
    main_of(identify, monkeypatch, "--build-bench", folder, "--size", size, "--writer", url, "--in-flight", "4", *more)


@pytest.mark.parametrize("flag", ("--writer", "--size"))
def test_what_builds_a_bench_does_nothing_else(monkeypatch, flag):
    """--writer URL is easily taken for --engine URL."""
    with pytest.raises(UserError, match="go with --build-bench DIR.*--engine URL a server that writes the answers"):
        main_of(identify, monkeypatch, flag, "9", "--trait", "openness")


@pytest.mark.parametrize("flags", (("--in-flight", "3"), ("--served-model", "big")))
def test_what_is_said_of_a_server_needs_one(monkeypatch, flags):
    with pytest.raises(UserError, match="go with --engine URL or --build-bench DIR"):
        main_of(identify, monkeypatch, *flags, "--trait", "openness")
    if flags[0] == "--served-model":
        monkeypatch.setenv("OPENAI_MODEL", "big")  # of the environment it may be anybody's
        with pytest.raises(UserError, match="nowhere.gguf"):
            main_of(identify, monkeypatch, "--trait", "openness", "--model", "nowhere.gguf")


def test_the_writer_of_the_environment_builds_a_bench_and_is_nothing_else(monkeypatch, tmp_path):
    """Its URL is that of OpenAI's own clients, which whoever identifies may have set as well."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    for more, words in ((("--build-bench", tmp_path / "bench"), "127.0.0.1:9"), (("--trait", "openness", "--model", "nowhere.gguf"), "nowhere.gguf")):
        with pytest.raises(UserError, match=words):
            main_of(identify, monkeypatch, *more)


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if "replies" not in path.name and path.is_file()}


@pytest.fixture
def topics(monkeypatch):
    """Have the writer asked about so many topics only, under one circumstance."""
    def few(search, test):
        table = text_table("topics.toml")
        for use, number in (("search", search), ("test", test)):
            monkeypatch.setitem(table, use, [f"{use} topic {k}" for k in range(number)])
        monkeypatch.setitem(table, "circumstances", ["alone"])

    return few


# ------------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize("trait", TRAITS)
def test_built_in_bench_passes_the_filters(trait):
    bench, duplicates = built_in_bench(), Duplicates()
    for kind in ("test", "search"):
        assert {fault(kind, text, trait, None) for text in getattr(bench, kind)[trait]} == {None}
        assert {duplicates.find(kind, text) for text in getattr(bench, kind)[trait]} == {None}
    assert {fault("persona", text, trait, None) for pole in POLES for text in bench.personas[trait][pole]} == {None}


def test_a_part_of_a_text_is_another_text():
    """Alike is what has most of both."""
    duplicates, start = Duplicates(), "Your neighbour knocks late in the evening and asks you for a cup of sugar."
    assert duplicates.find("test", f"{start} What do you tell him?") is None
    assert duplicates.find("search", start) is None and duplicates.find("search", start.upper()) == "search"
    assert duplicates.find("search", f"{start} What do you tell her?") == "test"


def test_empty_replies_are_counted(tmp_path, monkeypatch):
    """A cell is given up after some replies of which none can be used, and asks not for all that there are."""
    builder, asked = Builder(tmp_path, 5, SimpleNamespace(run=None, name="a"), 0), []
    builder.replies, builder.check_usable = {}, lambda: None

    def say_nothing(replies, batch, *_, **__):
        for key, _ in batch:
            asked.append(key)
            replies[key] = {"text": ""}

    monkeypatch.setattr(write_bench, "fill", say_nothing)
    requests = ((str(number), "t", []) for number in range(2000))
    builder.cells = lambda kind, trait: [write_bench.Cell("test", trait, None, "high", 5, requests)]
    builder.build_trait("test", "openness", None)
    assert 0 < len(asked) < 300


def test_replies_are_of_their_writer(tmp_path):
    """And of their seed: what another one said is no answer to the same request."""
    def first(name, seed):
        key, _, messages = next(Builder(tmp_path, 2, SimpleNamespace(name=name), seed).requests("search", "openness", 0, "high"))
        return key

    assert len({first("a", 0), first("b", 0), first("a", 1)}) == 3 and first("a", 0) == first("a", 0)


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
    text, = reply_lines(text)
    assert fault("search", text, "extraversion", "Excitement-Seeking") == reason


@pytest.mark.parametrize("text, reason", (
    ("You love crowds. You are never at home.", None),
    ("You\u2019ve always loved crowds. You stay out late.", None),
    ("You love crowds and you are never at ho", "not a whole sentence"),
    ("She loves crowds. She is never at home.", "not addressed to you"),
    ("You love crowds.", "too short or too long")))
def test_personas_are_filtered(text, reason):
    assert fault("persona", *reply_lines(text), "extraversion", None) == reason


def test_near_duplicates():
    duplicates = Duplicates()
    find = duplicates.find
    assert find("test", "Your neighbour knocks late in the evening. What do you tell him?") is None
    assert find("search", "Your neighbour knocks late in the evening; what do you tell him?!") == "test"
    assert find("search", "Your neighbour knocks late in the evening. What do you tell her?") == "test"
    assert find("search", "A colleague has forgotten your name at a party. How do you react?") is None
    assert find("search", "A colleague has forgotten your name at the party. How do you react?") == "search"
    duplicates.forget("search")
    assert find("search", "A colleague has forgotten your name at the party. How do you react?") is None
    assert find("search", "Your neighbour knocks late in the evening. What do you tell her?") == "test", "which is kept"


def test_lines_of_a_reply():
    reply = '1. "What now?"\n\n- What then?\n* **What else?**\n2) What more?\nWhat of 3 dogs?'
    assert reply_lines(reply) == ["What now?", "What then?", "What else?", "What more?", "What of 3 dogs?"]


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
    assert set(before) == {"README.md", "description.json"} | {f"{use}/{trait.capitalize()}.json" for use in ("search", "test")
                                                              for trait in TRAITS}
    bench, trait_of = load_bench(str(tmp_path)), {row["name"]: row["trait"] for row in all_facets()}
    seen = set()
    for trait in TRAITS:
        assert len(bench.search[trait]) == len(bench.test[trait]) == 24 and not set(bench.search[trait]) & set(bench.test[trait])
        lines = {use: lines_of(tmp_path / use / f"{trait.capitalize()}.json") for use in ("search", "test")}
        for use in lines:
            cells = collections.Counter((line["facet"], line["pole"]) for line in lines[use])
            assert len(cells) == 12 and set(cells.values()) == {2}
            assert all(trait_of[facet] == trait for facet, _ in cells)
            seen |= {line["id"] for line in lines[use]}
        assert not {line["topic"] for line in lines["search"]} & {line["topic"] for line in lines["test"]}
        assert all(len(bench.personas[trait][pole]) == 24 for pole in POLES)
    assert len(seen) == 5 * 2 * 24
    card = before["README.md"].decode()
    assert "| search | " in card and "not a question" in card and "served" in card and "seed 0" in card
    counted = {line.split(" | ")[0].strip("| "): sum(int(x) for x in re.findall(r"\d+", line)) for line in card.splitlines()
               if line.startswith(("| search |", "| test |", "| persona |"))}
    texts = [line["text"] for line in lines_of(tmp_path / "replies.jsonl")]
    assert sum(counted.values()) == sum(len(reply_lines(text)) for text in texts), "no line is dropped silently"
    everything = "".join(map(bytes.decode, before.values())) + capsys.readouterr().out
    assert "sk-secret" not in everything and b"sk-secret" not in (tmp_path / "replies.jsonl").read_bytes()


@pytest.mark.usefixtures("quick")
def test_a_writer_that_stumbles_makes_the_same_bench(monkeypatch, tmp_path):
    """429, 500, stalls, no JSON, empty replies, and a Ctrl-C: nothing is lost, nothing is paid for twice."""
    with Server(lambda n, body: written(body)) as server:
        built(monkeypatch, tmp_path / "a", server.url, 12)
        whole = len(server.seen)
    stumbles = {3: (429, ""), 4: (429, ""), 7: (500, ""), 9: None, 11: "", 13: (503, ""), 20: "stall"}
    monkeypatch.setattr(Endpoint, "TIMEOUT", 4)
    answered = collections.Counter()

    def stumbling(n, body):
        reply = stumbles.get(n, "fine")
        if reply == "stall":
            time.sleep(6)  # the client has given up by then
            return (504, "")
        if n == 60:
            os.kill(os.getpid(), signal.SIGINT)
        if reply != "fine":
            return reply
        answered[json.dumps(body["messages"])] += 1
        return written(body)

    with Server(stumbling) as server:
        with pytest.raises(KeyboardInterrupt):
            built(monkeypatch, tmp_path / "b", server.url, 12)
        assert 40 < len(answered) < whole and not (tmp_path / "b" / "search").exists()
        built(monkeypatch, tmp_path / "b", server.url, 12)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert set(answered.values()) == {1} and len(answered) == whole


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
def test_one_run_builds_a_bench_at_a_time(monkeypatch, tmp_path):
    with only_run(tmp_path / ".lock"):
        with Server(lambda n, body: written(body)) as server, pytest.raises(UserError, match="another run is building it"):
            built(monkeypatch, tmp_path, server.url)
        assert not server.seen
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun would pay"):
        built(monkeypatch, tmp_path, "http://127.0.0.1:9")


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
def test_a_writer_that_repeats_itself_comes_to_an_end(monkeypatch, tmp_path, capsys, topics):
    def same(n, body):
        return ("You like the sea and the wind very much. You sail." if "descriptions" in body["messages"][1]["content"] else
                "Your neighbour knocks late in the evening. What do you tell him?")

    topics(search=3, test=3)
    with Server(same) as server:
        built(monkeypatch, tmp_path, server.url, 12)
    assert "topics are used up" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "test" / "Openness.json")) == 1 and not lines_of(tmp_path / "search" / "Openness.json")
    assert "leak: near-duplicate of a test text" in (tmp_path / "README.md").read_text()


@pytest.mark.usefixtures("quick")
def test_a_kind_of_which_nothing_can_be_used_is_given_up(monkeypatch, tmp_path, capsys):
    """The personas are fine, so it goes on to the end, without the questions."""
    useless = "I can't help with that.\n" * 50
    with Server(lambda n, body: written(body) if "descriptions" in body["messages"][1]["content"] else useless) as server:
        built(monkeypatch, tmp_path, server.url, 12)
        assert len(server.seen) <= 5 * (2 * 12 + 2) * 4, "of 1,080 topics and circumstances a cell"
    assert "hardly anything of it can be used" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "description.json")) == 12 and not lines_of(tmp_path / "test" / "Openness.json")


@pytest.mark.usefixtures("quick")
def test_a_writer_of_nothing_is_given_up(monkeypatch, tmp_path, capsys):
    with Server(lambda n, body: "I can't help with that.\n" * 5) as server:
        with pytest.raises(UserError, match="served: nothing of its first .* replies can be used"):
            built(monkeypatch, tmp_path, server.url, 12)
        assert len(server.seen) <= 5 * (2 * 12 + 2) * 40, "of 1,080 topics and circumstances a cell"
    assert "hardly anything of it can be used" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_another_bench_is_not_overwritten(monkeypatch, tmp_path):
    save_bench(tmp_path / "bench")
    with Server(lambda n, body: written(body)) as server, pytest.raises(UserError, match="would overwrite"):
        built(monkeypatch, tmp_path / "bench", server.url)
    assert not server.seen


def test_a_local_model_writes(small, monkeypatch, tmp_path, capsys, topics):
    """Its random words never end, so all that it writes is cut off: that is counted, nothing is kept, and it comes to an end."""
    topics(search=1, test=1)
    roomy = shutil.copytree(small.model_dir, tmp_path / "model")
    config = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))  # for a request and its reply
    flags = identify.parser().parse_args(["--device", "cpu", "--dtype", "float32"])
    builder = Builder(tmp_path, 2, LocalWriter(str(roomy), flags), seed=0)
    for kind in PER_REPLY:
        builder.build_trait(kind, "openness", tqdm(disable=True))
    builder.write()
    card = (tmp_path / "README.md").read_text()
    assert "cut off" in card and "topics are used up" in capsys.readouterr().err and not builder.texts


def test_short_of_memory_a_local_model_writes_the_same(small, capsys):
    requests, written = [(f"key {k}", conversation(f"w1{k} w2{k} ?")) for k in range(5)], []
    for batch, room in (("2", 2), ("4", 2)):
        flags, replies = identify.parser().parse_args(["--device", "cpu", "--dtype", "float32", "--batch-size", batch]), {}
        with little_room(small.model, room):
            LocalWriter(str(small.model_dir), flags).run(requests, replies.__setitem__)
        written.append(replies)
    assert written[0] == written[1] and [*written[0]] == [key for key, _ in requests]
    assert capsys.readouterr().err.count("out of memory: batches of 2") == 1


def test_a_writer_that_is_no_address_is_a_local_model(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--writer /none/such: neither a readable directory"):
        built(monkeypatch, tmp_path, "/none/such")


def test_the_list_of_topics_is_sound():
    table = text_table("topics.toml")
    topics = table["search"] + table["test"]
    assert len(set(topics)) == len(topics) >= 120 and all(topics)
    lines = len(table["search"]) * len(table["circumstances"]) * PER_REPLY["search"] * 12
    assert lines >= 1.5 * 36_000, "enough to ask for PersonalityBench's size"


@pytest.mark.usefixtures("quick")
def test_datasets_reads_it(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    with Server(lambda n, body: written(body)) as server:
        built(monkeypatch, tmp_path / "bench", server.url, 12)
    files = str(tmp_path / "bench" / "search" / "*.json")
    loaded = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded.num_rows == 5 * 12 and set(loaded.column_names) == {"question", "facet", "pole", "topic", "id"}
