"""Hostile and broken input, a class of it a table: each is answered by one line and exit code 2, and nothing is believed that was damaged.

`python -m pytest -k hostile` runs all of it.
"""

import json
import math
import os
import random
import re
import shutil
import socket
import threading
import time

import pytest
import transformers
from safetensors.torch import load_file, save_file

import evaluate
import identify
import induce
from conftest import Server, command, exit_of, main_of, save_bench, shared_flags
from personality import TRAITS, Statistics, observe
from personality.endpoint import Endpoint, NoReply
from personality.frame import conversation
from personality.grid import is_answer
from personality.methods import Character
from personality.load import load_model
from personality.model import answers
from personality.neurons import Neurons
from personality.op import build, build_arguments
from personality.questions import load_bench, read_answers, read_given, read_inventory
from personality.store import Journal
from personality.terminal import UserError


def refused(script, monkeypatch, capsys, *arguments) -> str:
    """The one line by which a script refuses its arguments."""
    code, error = exit_of(script, monkeypatch, capsys, *arguments)
    last = error.strip().split("\n")[-1].split("\r")[-1]
    assert code == 2 and "Traceback" not in error and last.startswith("error: "), error
    return last


# ------------------------------------------------------------------------------------------------------- models


def edited_json(name, change):
    def damage(folder):
        values = json.loads((folder / name).read_text())
        values = change(values) or values
        (folder / name).write_text(json.dumps(values))

    return damage


def without_tensor(name):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def written(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def template(text):
    return lambda folder: [(folder / "chat_template.jinja").write_text(text)] and None


MODELS = {
    "a layer's tensor is missing": (without_tensor("model.layers.1.mlp.up_proj.weight"), "lack 1 tensors.*up_proj"),
    "the embedding is missing": (without_tensor("model.embed_tokens.weight"), "lack .*embed_tokens"),
    "the head is missing": (without_tensor("lm_head.weight"), "lack .*lm_head"),
    "more layers than the files hold": (edited_json("config.json", lambda c: c.update(num_hidden_layers=3)), "lack .*layers.2"),
    "weights cut off": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "--model"),
    "weights of nothing": (written("model.safetensors", b""), "--model"),
    "weights of garbage": (written("model.safetensors", b"\xff" * 3000), "model: can't be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "--model"),
    "a configuration that is a list": (written("config.json", b"[1, 2]"), "--model"),
    "a configuration that is cut off": (lambda folder: os.truncate(folder / "config.json", 40), "--model"),
    "sizes of text": (edited_json("config.json", lambda c: c.update(hidden_size="large")), "--model"),
    "negative sizes": (edited_json("config.json", lambda c: c.update(intermediate_size=-3)), "--model"),
    "heads that don't divide": (edited_json("config.json", lambda c: c.update(num_attention_heads=7)), "--model"),
    "a vocabulary that doesn't fit": (edited_json("config.json", lambda c: c.update(vocab_size=50)), "--model"),
    "an unknown architecture": (edited_json("config.json", lambda c: c.update(model_type="nonsense")), "model: can't be loaded: .*nonsense"),
    "a quantisation whose package is missing": (edited_json("config.json", lambda c: c.update(quantization_config={
        "quant_method": "gptq", "bits": 4, "group_size": 128})), "--model"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("token*")], "--model"),
    "a tokenizer of garbage": (written("tokenizer.json", b"{]"), "--model"),
    "a tokenizer without end token": (edited_json("tokenizer_config.json", lambda c: [c.pop(k, None) for k in ("eos_token", "pad_token")]
                                                  and None), "no end token"),
    "a template that raises": (template("{{ raise_exception('not today') }}"), "not today"),
    "a template that doesn't parse": (template("{% for %}"), "--model"),
    "a template of nothing": (template(""), "--model"),
    "a template that calls itself": (template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"), "--model"),
    "several answers a prompt": (edited_json("generation_config.json", lambda c: c.update(num_return_sequences=3)), "num_return_sequences"),
    "an end token of text": (edited_json("generation_config.json", lambda c: c.update(eos_token_id="</s>")), "--model"),
}


@pytest.mark.parametrize("name", MODELS)
def test_hostile_models(small, tmp_path, monkeypatch, capsys, name):
    damage, pattern = MODELS[name]
    shutil.copytree(small.model_dir, tmp_path / "model")
    damage(tmp_path / "model")
    line = refused(induce, monkeypatch, capsys, "--model", tmp_path / "model", "--device", "cpu", "--dtype", "float32", "--trait", "openness",
                   "--alpha", "1", "--neurons", tmp_path / "neurons")
    assert re.search(pattern, line) and len(line) < 700, line


def test_hostile_generation_options_are_overruled(small, tmp_path):
    shutil.copytree(small.model_dir, tmp_path / "model")
    edited_json("generation_config.json", lambda c: c.update(stop_strings=["w10"]))(tmp_path / "model")
    model, tokenizer = load_model(str(tmp_path / "model"), "cpu", "float32")
    asked = [conversation("w10 w11 ?"), conversation("w12 ?")]
    assert answers(model, tokenizer, asked, 5) == answers(small.model, small.tokenizer, asked, 5)


@pytest.mark.parametrize("script, more", ((identify, ("--trait", "openness")), (induce, ("--trait", "openness", "--alpha", "1")),
                                          (evaluate, ("--trait", "extraversion", "--method", "unedited", "npti"))))
def test_hostile_context(small, made, tmp_path, monkeypatch, capsys, script, more):
    """The tiny model has 512 positions."""
    place = ("--out", tmp_path / "out") if script is identify else ("--neurons", made)
    place += ("--out", tmp_path / "out") if script is evaluate else ()
    line = refused(script, monkeypatch, capsys, *shared_flags(small), *more, *place, "--max-new-tokens", "600")
    assert "beyond this model's context of 512" in line


def test_hostile_architecture():
    """One whose MLP looks plain, and wants more than its input when it is called."""
    model = transformers.MptForCausalLM(transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=97)).eval()
    with pytest.raises(UserError, match=r"layer 0, ffn \(MptMLP\) can't be called as down"), observe(model, Statistics.of(model)):
        pass
    assert not model.__dict__.get("_neurons_patch") and "forward" not in vars(model.transformer.blocks[0].ffn)


def test_hostile_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/false")
    for _ in range(2):  # the second time, it is compiled again, not taken for built
        with pytest.raises(UserError, match="the op could not be compiled: .*/bin/false"):
            build(*build_arguments(False), tmp_path)


def test_interrupted_compilation(monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.cpp_extension._write_ninja_file_and_build_library", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(*build_arguments(False), tmp_path)
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(UserError, match="/bin/false"):  # so it is compiled
        build(*build_arguments(False), tmp_path)


# ------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("script, arguments, pattern", (
    (induce, ("--alpha=--", "--trait", "openness"), "--alpha"), (induce, ("--device", "cuda:٣", "--trait", "openness", "--alpha", "1"), "cuda"),
    (induce, ("--trait", "openness", "--alpha", "1", "-q", ""), "--question"), (induce, ("--trait", "openness", "--alpha", "1", "-q", "\ud83d"), "--question"),
    (induce, ("--trait", "openness", "--alpha", "1", "--save", ""), "--save"), (identify, ("--answers", ""), "--answers"),
    (identify, ("--engine", ""), "--engine"), (identify, ("--max-new-tokens", "1", "--trait", "openness"), "nothing to count"),
    (identify, ("--engine", "http://localhost:99999/v1"), "address"), (identify, ("--engine", "http://[::zz]/v1"), "address"),
    (identify, ("--engine", "http://999.1.1.1/v1"), "address"), (identify, ("--engine", "http://[::1]x/v1"), "address"),
    (identify, ("--engine=--",), "expected"), (identify, ("--engine", "localhost:8000"), "address"), (identify, ("--engine", "http://local\thost/"), "address"),
    (identify, ("--limit", "٣"), "--limit"), (evaluate, ("--dose", "nan"), "--dose"), (evaluate, ("--judge-model", "/none/such"), "--judge-model"),
))
def test_hostile_command_lines(small, tmp_path, monkeypatch, capsys, script, arguments, pattern):
    monkeypatch.chdir(tmp_path)
    given = arguments if "--device" in arguments else (*arguments, *shared_flags(small))
    assert pattern in refused(script, monkeypatch, capsys, *given)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("variables", ({"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"}, {"RANK": "5", "WORLD_SIZE": "2"},
                                       {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}))
def test_hostile_ranks(small, tmp_path, monkeypatch, capsys, variables):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "torchrun sets them" in refused(identify, monkeypatch, capsys, *shared_flags(small), "--out", tmp_path, "--trait", "openness")


def test_hostile_terminal(small, made, monkeypatch, capsys):
    """One that can't print a box or a dash, and typing that is no UTF-8."""
    result = command("induce.py", *shared_flags(small), "--neurons", made, "--trait", "extraversion", "--alpha", "1", "--chat",
                     "--max-new-tokens", "3", input="w10 é\n/quit\n".encode("latin1").decode("latin1"), errors="replace")
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_hostile_names_are_no_markup(small, made, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.toml").write_text('name = "[/bold][red]x"\n[traits]\nextraversion = 1\n')
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", made, "--profile", tmp_path / "p.toml", "-q", "w10 [/bold] ?",
            "--max-new-tokens", "2")
    text = capsys.readouterr().out
    assert "[/bold][red]x" in text and "w10 [/bold] ?" in text


# ---------------------------------------------------------------------------------------------------------- files


DEEP = b"[" * 100_000


@pytest.mark.parametrize("data", (DEEP, b'{"question": ' + DEEP, b'{"question": "\\ud83d ?"}', b"\xff\xfe", b"[1]", b'"text"', b"{", b"",
                                  b'{"question": ""}', b'{"question": "  "}', b'{"question": 5}', b'{"question": null}', b"\x00" * 50))
def test_hostile_questions(small, tmp_path, monkeypatch, capsys, data):
    (tmp_path / "q.txt").write_bytes(data)
    if data.lstrip().startswith((b"{", b"\xff")) or not data:
        line = refused(induce, monkeypatch, capsys, *shared_flags(small), "--neurons", tmp_path, "--trait", "openness", "--alpha", "1",
                       "--questions", tmp_path / "q.txt")
        assert "q.txt" in line
    folder = save_bench(tmp_path / "bench")
    (folder / "search" / "Openness.json").write_bytes(data)
    assert "Openness.json" in refused(identify, monkeypatch, capsys, *shared_flags(small), "--bench", folder, "--out", tmp_path / "out")


@pytest.mark.parametrize("text", ('{"extraversion": 1, "Extraversion": -2}', '{"traits": {"openness": true}}', '{"openness": 1e400}',
                                  '{"traits": {"openness": 1}, "layers": [0, 99999999999999999999]}', '{"traits": {"openness": "1"}}',
                                  '{"traits": []}', '{"traits": {}}', "[]", "5", '{"traits": {"openness": 1}, "method": ["npti"]}',
                                  '{"traits": {"openness": 1}, "model": {}}'))
def test_hostile_characters(text):
    with pytest.raises(UserError):
        Character.of(json.loads(text), "here")


@pytest.mark.parametrize("text", ("a = " + "[" * 50_000, "[traits]\nopenness = 1\nopenness = 2\n", "\ud83d", "traits = 3", ""))
def test_hostile_profiles(tmp_path, text):
    (tmp_path / "p.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="p.toml"):
        Character.read(str(tmp_path / "p.toml"))


ANSWER = {"trait": "extraversion", "pole": "high", "persona": "w9", "question": "w10 ?", "answer": "w11 w12"}


@pytest.mark.parametrize("lines, pattern", (
    ([ANSWER] * 3, "3?.*tokens were counted under the high pole, 0 under the low"), ([{**ANSWER, "answer": ""}, {**ANSWER, "pole": "low", "answer": ""}], "0 tokens"),
    ([{**ANSWER, "ids": [1 << 70]}], "ids"), ([{**ANSWER, "ids": [True, "x"]}], "ids"), ([{**ANSWER, "pole": None}], "pole"), ([], "answers of no trait")))
def test_hostile_answers(small, tmp_path, monkeypatch, capsys, lines, pattern):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = refused(identify, monkeypatch, capsys, *shared_flags(small), "--answers", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert re.search(pattern, line), line
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_hostile_inventory(tmp_path):
    (tmp_path / "i.csv").write_text("item,key,facet\n" + "x" * 200_000 + ",+,Trust\n")
    with pytest.raises(UserError, match="i.csv"):
        read_inventory(tmp_path / "i.csv")


@pytest.mark.parametrize("damage", (
    lambda out: (out / "summary.json").write_text("[1, 2]"), lambda out: (out / "summary.json").write_bytes(DEEP),
    lambda out: (out / "summary.json").write_text(json.dumps([{**json.loads((out / "summary.json").read_text())[0], "mean": "high"}])),
    lambda out: (out / "details.json").unlink()))
def test_hostile_results_to_compare(small, made, tmp_path, monkeypatch, capsys, damage):
    out = tmp_path / "out"
    out.mkdir()
    row = {"trait": "openness", "pole": "high", "method": "npti", "alpha": 1.0, "judge": "contrast", "n": 2, "mean": 0.1, "ci95": [0.0, 0.2],
           "variance": 0.1, "perplexity": 2.0, "repetition": 0.0}
    (out / "summary.json").write_text(json.dumps([row]))
    (out / "details.json").write_text('{"head": "x"}')
    damage(out)
    assert "--compare" in refused(evaluate, monkeypatch, capsys, "--compare", out, out)


def test_hostile_result_folder(small, made, tmp_path, monkeypatch, capsys):
    """Answers without ids are no answers of this program."""
    flags = (*shared_flags(small), "--neurons", made, "--bench", small.bench_dir, "--limit", "1", "--trait", "extraversion", "--max-new-tokens",
             "3", "--method", "unedited", "--out", tmp_path / "out")
    main_of(evaluate, monkeypatch, *flags)
    path = tmp_path / "out" / "answers.jsonl"
    header, line = path.read_text().splitlines()
    path.write_text(header + "\n" + json.dumps({key: value for key, value in json.loads(line).items() if key != "ids"}) + "\n")
    assert "answers.jsonl, line 2" in refused(evaluate, monkeypatch, capsys, *flags)


def test_hostile_neuron_file_of_another_trait(small, made, tmp_path, monkeypatch, capsys):
    shutil.copy(made / "extraversion.safetensors", tmp_path / "openness.safetensors")
    assert "neurons of extraversion" in refused(induce, monkeypatch, capsys, *shared_flags(small), "--neurons", tmp_path, "--trait", "openness",
                                                "--alpha", "1")


@pytest.mark.parametrize("change", (
    lambda t, m: t["p95"].fill_(math.nan), lambda t, m: t["prob"].fill_(1.5), lambda t, m: t["variance"].fill_(-1), lambda t, m: t["p50"].fill_(math.inf),
    lambda t, m: t.update(prob=t["prob"].int()), lambda t, m: t.update(p95=t["p95"].half()), lambda t, m: m.update(trait="charm"),
    lambda t, m: m.update(tokens=[0, 5]), lambda t, m: m.update(tokens="many"), lambda t, m: m.update(fingerprint=3)))
def test_hostile_neuron_files(made, tmp_path, change):
    """Also where the digest was made to fit: no run writes such a file."""
    neurons = Neurons.load(made / "extraversion.safetensors")
    change(neurons.tensors, neurons.meta)
    neurons.save(tmp_path / "extraversion.safetensors")
    with pytest.raises(UserError, match="damaged, or not of identify.py"):
        Neurons.load(tmp_path / "extraversion.safetensors")


# ------------------------------------------------------------------------------------------------------ mutations


def mutated(data: bytes, pick: random.Random) -> bytes:
    """A few bytes flipped, cut, doubled, or put in."""
    data = bytearray(data)
    for _ in range(pick.randrange(1, 4)):
        at = pick.randrange(len(data)) if data else 0
        kind = pick.randrange(5)
        if kind == 0 and data:
            data[at] ^= 1 << pick.randrange(8)
        elif kind == 1:
            del data[at:at + pick.randrange(1, 40)]
        elif kind == 2:
            data[at:at] = data[at:at + pick.randrange(1, 40)]
        elif kind == 3:
            data[at:at] = pick.choice((b"\x00", b"\xff", b"[", b"}", b'"', b"\\ud83d", b"null", b"-1e999", b"\n"))
        else:
            del data[at:]
    return bytes(data)


def read_neurons(path):
    neurons = Neurons.load(path)
    return neurons.tensors, neurons.meta


def read_journal(path):
    return list(Journal(path, {"model": "x"}, is_answer))


READERS = {  # of every kind of file that is read: its name, and what reads it
    "neurons": ("extraversion.safetensors", read_neurons),
    "answers": ("answers.jsonl", lambda path: read_answers(str(path), "extraversion")),
    "given": ("given.jsonl", lambda path: read_given(str(path))),
    "questions": ("questions.txt", lambda path: induce.read_questions(str(path))),
    "profile": ("ada.toml", lambda path: Character.read(str(path))),
    "inventory": ("items.csv", lambda path: read_inventory(str(path))),
    "journal": ("answers.jsonl", read_journal),
}


@pytest.fixture(scope="session")
def originals(made, tmp_path_factory):
    """A whole file of each kind."""
    folder = tmp_path_factory.mktemp("originals")
    journal = Journal(folder / "answers.jsonl", {"model": "x"})
    journal.append(*({"key": f"k{n}", "trait": "openness", "question": "w10 ?", "method": "npti", "answer": "w11", "ids": [11, 2]} for n in range(3)))
    return {
        "neurons": (made / "extraversion.safetensors").read_bytes(), "answers": (made / "extraversion.answers.jsonl").read_bytes()[:1500],
        "given": json.dumps({"trait": "openness", "pole": "low", "question": "w9 ?", "answer": "w10"}).encode() + b"\n",
        "questions": b'w10 ?\n{"question": "w11 ?", "profile": {"openness": 1, "neuroticism": -2}}\n',
        "profile": b'name = "Ada"\nlayers = [0, 1]\n[traits]\nopenness = 2\nneuroticism = -1.5\n',
        "inventory": b"item,key,facet\nI like parties.,+,Gregariousness\nI lie.,-1,Morality\n",
        "journal": (folder / "answers.jsonl").read_bytes()}


@pytest.mark.parametrize("kind", READERS)
def test_hostile_mutations(kind, originals, tmp_path):
    """500 of each: read, or refused by a line that names the file; a damaged neuron file is never read."""
    name, read = READERS[kind]
    pick, refusals = random.Random(kind), 0
    number = 500 if kind != "answers" else 100  # each writes a table
    for _ in range(number):
        data = mutated(originals[kind], pick)
        (tmp_path / name).write_bytes(data)
        try:
            read(tmp_path / name)
            assert kind != "neurons" or data == originals[kind]
        except UserError as error:
            refusals += 1
            assert name in str(error)
    assert refusals > number / 10


def test_hostile_mutations_of_a_model(small, tmp_path, monkeypatch):
    """Of its configuration, generation options, template and tokenizer: it loads, or one line says why not."""
    pick = random.Random(0)
    for number in range(60):
        folder = tmp_path / str(number)
        shutil.copytree(small.model_dir, folder)
        path = pick.choice([path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja")])
        path.write_bytes(mutated(path.read_bytes(), pick))
        try:
            load_model(str(folder), "cpu", "float32")
        except UserError as error:
            assert str(folder) in str(error)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ("search/Openness.json", "test/Openness.json", "description.json"))
def test_hostile_mutations_of_a_bench(name, small, tmp_path):
    pick = random.Random(name)
    shutil.copytree(small.bench_dir, tmp_path / "bench")
    path = tmp_path / "bench" / name
    original = path.read_bytes()
    for _ in range(200):
        path.write_bytes(mutated(original, pick))
        try:
            bench = load_bench(str(tmp_path / "bench"))
            assert all(text.strip() for trait in TRAITS for text in bench.search[trait] + bench.test[trait])
        except UserError as error:
            assert str(path) in str(error)


# -------------------------------------------------------------------------------------------------------- servers


class BadServer:
    """On the loopback: "stalls" (accepts and never answers) or "floods" (an answer without end)."""

    def __init__(self, kind):
        self.kind, self.socket, self.open = kind, socket.create_server(("127.0.0.1", 0)), True
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while self.open:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        try:
            connection.recv(4096)
            if self.kind == "floods":
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
                for _ in range(400):
                    connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            while self.open and self.kind == "stalls":
                time.sleep(0.05)
        except OSError:
            pass
        connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open = False
        self.socket.close()


@pytest.fixture
def impatient(monkeypatch, quick):
    monkeypatch.setattr(Endpoint, "CONNECT", 0.3)
    monkeypatch.setattr(Endpoint, "TIMEOUT", 1)
    monkeypatch.setattr(Endpoint, "RETRIES", 1)


BAD = ("refuses", "stalls", "floods")


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("role", ("engine", "writer", "judge", "checkpoint"))
def test_hostile_servers(small, made, tmp_path, monkeypatch, capsys, impatient, kind, role):
    """Whatever the server is to do: one line, and soon."""
    (tmp_path / "verify.json").write_text(json.dumps({"expected": [{"prompt": [9], "question": "q", "text": "a", "without biases": "b"}]}))
    start = time.time()
    with BadServer(kind) as server:
        url = "http://127.0.0.1:9/v1" if kind == "refuses" else server.url
        script, arguments = {
            "engine": (identify, ("--engine", url, "--trait", "openness", "--out", tmp_path / "out", *shared_flags(small))),
            "writer": (identify, ("--build-bench", tmp_path / "bench", "--writer", url)),
            "judge": (evaluate, ("--method", "unedited", "npti", "--judge", "llm", "--judge-url", url, "--judge-model", "big", "--neurons", made, "--bench", small.bench_dir,
                                 "--limit", "1", "--trait", "extraversion", "--max-new-tokens", "2", "--out", tmp_path / "out", *shared_flags(small))),
            "checkpoint": (induce, ("--save", tmp_path, "--verify-server", url))}[role]
        assert url in refused(script, monkeypatch, capsys, *arguments) and time.time() - start < 20


@pytest.mark.parametrize("kind", ("stalls", "floods"))
def test_hostile_replies(kind, impatient):
    """A server that lists its models, and then is bad."""
    with BadServer(kind) as bad, Server(lambda n, body: "fine") as good:
        endpoint = Endpoint(good.url)
        endpoint.client = endpoint.client.with_options(base_url=bad.url)
        start = time.time()
        with pytest.raises(NoReply):
            endpoint.chat(conversation("w10 ?"))
        assert time.time() - start < 10


@pytest.mark.parametrize("key", ("a\nb", "ключ"))
def test_hostile_keys(monkeypatch, quick, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        Endpoint("http://127.0.0.1:9/v1")
    assert key not in str(error.value)
