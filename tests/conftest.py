"""Makes the scripts and the package importable for pytest, offline, and gives every test the same small models."""

import contextlib
import functools
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import identify  # noqa: E402
from personality import TRAITS, doses, train  # noqa: E402
from personality.endpoint import Endpoint  # noqa: E402
from personality.frame import Frame  # noqa: E402
from personality.load import load_model  # noqa: E402
from personality.model import TEST_PENALTY, answers, prompt_ids  # noqa: E402
from personality.op import op as load_op  # noqa: E402
from personality.questions import load_bench  # noqa: E402
from personality.terminal import script as run_script  # noqa: E402

FRAMED = Frame.named("person")  # how the scripts put questions by default
train.ANSWERS, train.ROWS, doses.VALIDATION, doses.TOKENS = 6, 3, 2, 6
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background: the tests of Ctrl-C would wait
torch.set_num_threads(1)  # these models are so small that a second thread costs more than it gives


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run what takes many minutes, too: tests/test_llama_cpp.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs on request, with --slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="runs on request: --slow"))


@pytest.fixture(scope="session")
def op():
    return load_op()


def tiny(family="llama", **options):
    """A random float32 model of a family, two layers, small enough for exact comparisons."""
    torch.manual_seed(0)
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "phi3": "Phi3"}
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=128,
                                         pad_token_id=0, bos_token_id=1, eos_token_id=2)
        model = transformers.GPT2LMHeadModel(config)
    elif family == "gemma3":
        model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**{**shape, **options}))
    else:
        config = getattr(transformers, names[family] + "Config")(**{**shape, **options})
        model = getattr(transformers, names[family] + "ForCausalLM")(config)
    for parameter in model.parameters():  # far from zero, so that edits and rows show
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompts(batch=4, length=6, pad_rows=True, seed=0):
    """Random left-padded ids and mask."""
    ids = torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if pad_rows:
        for row in range(batch):
            mask[row, : row % 3] = 0
            ids[row, : row % 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


# ---------------------------------------------------------------------------- a small model, a bench, a neuron file

TEMPLATE = ("{% for turn in messages %}{{ turn['role'] }} : {{ turn['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}assistant : {% endif %}")


def words(count, pick):
    return " ".join(f"w{pick.randrange(9, 92)}" for _ in range(count))


def save_model(folder, template=TEMPLATE, **changes):
    """A tiny random llama with a tokenizer of its 97 words, the digits 1 to 5 among them, as a directory that --model takes."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = tiny()
    with torch.no_grad():
        for name, value in changes.items():
            model.get_parameter(name).fill_(value)
    model.save_pretrained(folder)
    names = ["<pad>", "<s>", "</s>", "<unk>", "system", "user", "assistant", ":", "?"] + [f"w{i}" for i in range(9, 92)] + list("12345")
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                                     eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def save_bench(folder, questions=12, personas=8):
    """A bench in the published layout, in words that the tiny tokenizer knows."""
    pick = random.Random(0)
    for use in ("search", "test"):
        (folder / use).mkdir(parents=True)
        for trait in TRAITS:
            lines = [json.dumps({"question": words(3 + k % 4, pick) + " ?"}) for k in range(questions)]
            (folder / use / f"{trait.capitalize()}.json").write_text("\n".join(lines) + "\n")
    keys = [trait.capitalize() + end for trait in TRAITS for end in ("", "_reversed")]
    lines = [json.dumps({key: words(5, pick) for key in keys}) for _ in range(personas)]
    (folder / "description.json").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """model and bench directories, and both loaded."""
    folder = tmp_path_factory.mktemp("small")
    place = SimpleNamespace(model_dir=save_model(folder / "model"), bench_dir=save_bench(folder / "bench"))
    place.model, place.tokenizer = load_model(str(place.model_dir), "cpu", "float32")
    place.bench = load_bench(place.bench_dir)
    return place


def run(small, out, trait="extraversion", model=None, **options):
    """identify.py's run of one trait, in this process."""
    args = identify.parser().parse_args([])
    vars(args).update({"out": str(out), "max_new_tokens": 6, "batch_size": 4, **options})
    model, tokenizer = model or (small.model, small.tokenizer)
    return identify.Run(model, tokenizer, small.bench, trait, args)


@pytest.fixture(scope="session")
def made(small, tmp_path_factory):
    """A folder with the tiny model's extraversion neurons and answers."""
    out = tmp_path_factory.mktemp("made")
    run(small, out).identify()
    return out


@pytest.fixture(scope="session")
def several(small, tmp_path_factory):
    """A folder with two traits' neuron files of the tiny model."""
    out = tmp_path_factory.mktemp("several")
    for trait in ("extraversion", "neuroticism"):
        run(small, out, trait).identify()
    return out


def contents(out, trait="extraversion"):
    return {name: (out / name).read_bytes() for name in (f"{trait}.safetensors", f"{trait}.answers.jsonl")}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def said_in_time(capsys, words, seconds=20):
    """Whether they come on stderr, from another thread."""
    said, deadline = "", time.monotonic() + seconds
    while words not in said and time.monotonic() < deadline:
        said += capsys.readouterr().err
        time.sleep(0.01)
    return words in said


def prompt_of(small, question, persona=None):
    return prompt_ids(small.tokenizer, FRAMED.turns(question, persona))


def plain_answers(small, questions, tokens):
    """(text, ids) of the model itself, as induce.py asks it."""
    return answers(small.model, small.tokenizer, [FRAMED.turns(question) for question in questions], tokens, repetition_penalty=TEST_PENALTY)


def main_of(script, monkeypatch, *arguments):
    """A script's run in this process: flags, then work."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main(script.arguments())


def exit_of(script, monkeypatch, capsys, *arguments):
    """(exit code, standard error) of a script's whole run in this process, as its command line has it."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_script(script.arguments, script.__name__)
    return ended.value.code, capsys.readouterr().err


def command(*arguments, **options):
    """A script's run in a process of its own, from the checkout's root or options' cwd."""
    return subprocess.run([sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def torchrun(number, *arguments):
    """A script's run by so many processes, which goes on."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(number), "--standalone", *map(str, arguments)]
    return subprocess.Popen(start, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def rank_of(process, rank):
    """The id of a process that torchrun has started."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return next(int(child) for child in children if f"RANK={rank}" in open(f"/proc/{child}/environ").read().split("\0"))


def shared_flags(small):
    return ("--model", small.model_dir, "--device", "cpu", "--dtype", "float32")


@contextlib.contextmanager
def little_room(model, rows: int):
    """Models of this family fail meanwhile with more rows than that. Yields how many rows were asked for, in order."""
    plain, asked = type(model).forward, []

    @functools.wraps(plain)
    def forward(self, input_ids=None, **options):
        asked.append(len(input_ids))
        if asked[-1] > rows:
            raise torch.OutOfMemoryError("no room")
        return plain(self, input_ids=input_ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", forward)
        yield asked


# ------------------------------------------------------------------------------------------------------------- a server


class Server:
    """An OpenAI-compatible server on the loopback that says what replies(number, body) tells it to: a text, a list (text,
    finish_reason), or (status, text); `seen` are its requests. listing: the status of its list of models."""

    def __init__(self, replies, listing: int = 200):
        self.seen, self.keys, lock = [], set(), threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(listing, json.dumps({"object": "list", "data": [{"id": "served", "object": "model", "created": 0, "owned_by": "us"}]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.seen.append(body)
                    server.keys.add(self.headers["Authorization"])
                    number = len(server.seen)
                reply = replies(number, body)  # may take its time
                status, text = reply if isinstance(reply, tuple) else (200, reply)
                text, reason = text if isinstance(text, list) else (text, "stop")
                said = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
                whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                         "choices": [{"index": 0, "finish_reason": reason, **said}]}
                self.send(status, json.dumps(whole) if status == 200 and text is not None else text or "<html>not JSON</html>")

            def send(self, status, text):
                data = text.encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        class Web(http.server.ThreadingHTTPServer):
            request_queue_size = 128  # of 5, many clients at once fill it: some wait for seconds

        self.server = Web(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def quick(monkeypatch):
    """Nobody waits long for a server."""
    pytest.importorskip("openai")
    import openai._base_client

    for name in ("INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY"):
        monkeypatch.setattr(openai._base_client, name, 0.001)
    monkeypatch.setattr(Endpoint, "TIMEOUT", 60)  # a busy machine may take its time: what is asked is counted
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
