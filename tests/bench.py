"""The microbenchmark: neurons::glu_ against a copy, eager and compiled PyTorch, a Python hook, and Liger's SwiGLU.

    python tests/bench.py                     the whole table, and generation
    python tests/bench.py --quick --only kernel

Every number is a median of runs in turn: of kernels in one process, of generations in a process each. (Of --only checks it is the
least.) Bytes are counted from the contract (gate and up read once, the result written once), and "limit" is a copy that moves the
same number of bytes on the same device.
"""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import platform
import random
import statistics as stats
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import CompileConfig, StoppingCriteria  # noqa: E402

from personality.mlp import find_mlps, plain_sites, shape_of  # noqa: E402
from personality.load import default_dtype, load_model  # noqa: E402
from personality.observe import Statistics, observe  # noqa: E402
from personality.op import op  # noqa: E402
from personality.steer import Profile, Tables, steer  # noqa: E402
from personality.terminal import Flags, number, positive, refuse, script  # noqa: E402

PROFILES = (1, 32, 1000)


def random_profile(number: int, depth: int, width: int, seed: int) -> Profile:
    """`number` edited neurons a layer: half capped at 0, half raised."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.cat([torch.randperm(width, generator=generator)[:number].sort().values for _ in range(depth)])
    layer = torch.arange(depth).repeat_interleave(min(number, width))
    value = torch.tensor([[0.0, 1.0, 0.0, 0.0], [math.inf, 1.0, 0.3, 0.0]]).repeat(len(index) // 2 + 1, 1)[: len(index)]
    return Profile(layer, index, value, f"random {seed}")


def machine(device) -> dict:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    name = torch.cuda.get_device_name() if device == "cuda" else next(iter(names), platform.machine())
    return {"device": name, "threads": torch.get_num_threads(), "vector": op().vector, "torch": torch.__version__,
            "commit": commit, "source": op().source}


# ---------------------------------------------------------------------------------------------------------- kernels


def eager(gate, up):
    return F.silu(gate) * up


def hook_edits(gate, up, capped, raised, shift):
    """What NPTI's release does in a layer while it steers, in Python."""
    a = F.silu(gate)
    a[:, capped] = a[:, capped].clamp(max=0)
    a[:, raised] += shift
    return a * up


def hook_statistics(gate, up, count, histogram):
    """... and while it searches: how many activations are positive, and a histogram in steps of 0.01 up to 3."""
    a = F.silu(gate)
    count += (a > 0).sum(0)
    histogram.scatter_add_(0, (a.clamp(0, 3) * 100).long(), torch.ones_like(a, dtype=histogram.dtype))
    return a * up


@functools.cache
def tables_of(width: int, device: str) -> dict:
    """{(edited neurons, profiles): Tables}"""
    sizes = [*((60, profiles) for profiles in PROFILES), (1800, 1)]
    return {(edited, profiles): Tables([random_profile(edited, 1, width, seed) for seed in range(profiles)],
                                       plain_sites(1, width, device)) for edited, profiles in sizes}


def variants(tokens: int, width: int, dtype, device: str, compiled) -> dict:
    """name -> function of (gate, up). Ours write over gate; the others return a new tensor."""
    glu_, none, tables = torch.ops.neurons.glu_, (None,) * 4, tables_of(width, device)
    statistics, statistics_of_both = (Statistics(plain_sites(1, width, device)) for _ in range(2))
    group = torch.zeros(tokens, dtype=torch.int32, device=device)

    def edits(number, profiles=1):
        rows = (torch.arange(tokens, device=device) % profiles + 1).to(torch.int32)
        return (rows, *tables[number, profiles].sites[0])

    observed, observed_too = (group, *statistics.sites[0]), (group, *statistics_of_both.sites[0])
    one = random_profile(60, 1, width, 0)
    index = one.index.to(device)
    count = torch.zeros(width, dtype=torch.int64, device=device)
    histogram = torch.zeros(301, width, dtype=torch.float32, device=device)
    shift = torch.full((len(index[1::2]),), 0.3, dtype=dtype, device=device)
    result = {"eager": eager, "compiled": compiled}
    try:
        if device == "cuda":
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            result["liger"] = LigerSiLUMulFunction.apply
    except ImportError:
        pass
    result |= {
        "hook, edits": lambda gate, up: hook_edits(gate, up, index[::2], index[1::2], shift),
        "hook, statistics": lambda gate, up: hook_statistics(gate, up, count, histogram),
        "plain": lambda gate, up: glu_(gate, up, 0, *none, *none)}
    for edited in (60, 1800):
        result[f"{edited} edits"] = lambda gate, up, e=edits(edited): glu_(gate, up, 0, *e, *none)
    result["statistics"] = lambda gate, up: glu_(gate, up, 0, *none, *observed)
    result["both"] = lambda gate, up, e=edits(60): glu_(gate, up, 0, *e, *observed_too)
    for profiles in PROFILES[1:]:
        result[f"{profiles} profiles"] = lambda gate, up, e=edits(60, profiles): glu_(gate, up, 0, *e, *none)
    return result


def time_cpu(functions, sets, seconds):
    """Microseconds of each call, the functions in turn; gate is restored before each. Where calls are of fewer than 64 tokens, of
    which statistics are counted at once, each number is the mean of as many calls as make 64."""
    (gate, up), source = sets[0], sets[0][0].clone()
    several = max(1, 64 // len(gate))
    times = {name: [] for name in functions}
    start = time.perf_counter()
    while len(times["limit"]) < 4 * several or (time.perf_counter() - start < seconds and len(times["limit"]) < 400 * several):
        for name, function in functions.items():
            if name != "limit":
                gate.copy_(source)
            begin = time.perf_counter()
            function(gate, up)
            times[name].append(1e6 * (time.perf_counter() - begin))
    return {name: [stats.mean(values[k:k + several]) for k in range(several, len(values) - several + 1, several)]
            for name, values in times.items()}


def time_cuda(functions, sets, seconds):
    """Microseconds a call, from replays of a captured graph that goes through all sets: no launch gaps, and inputs come from
    memory where they are larger than the cache together. up = 1 + exp(-gate), so that gate stays what it was."""
    graphs, turns = {}, max(1, 16 // len(sets))  # calls enough that a replay's own start doesn't count
    for name, function in functions.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for gate, up in sets[:2]:
                function(gate, up)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for gate, up in sets * turns:
                function(gate, up)
        graphs[name] = graph
    times = {name: [] for name in functions}
    start = time.perf_counter()
    while len(times["limit"]) < 5 or (time.perf_counter() - start < seconds and len(times["limit"]) < 50):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(1e3 * begin.elapsed_time(end) / len(sets) / turns)
    return {name: values[1:] for name, values in times.items()}


def kernels(device: str, quick: bool, seconds: float) -> list[dict]:
    rows = []
    shapes = [(tokens, width) for width in (1536, 14336, 28672) for tokens in (1, 16, 32, 256, 1024, 4096)]
    if quick:
        shapes = [(32, 14336), (1024, 14336)]
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, width in shapes:
            torch._dynamo.reset()
            compiled = torch.compile(eager, dynamic=False)  # one for all sizes would be made for the first of them
            size = tokens * width * torch.finfo(dtype).bits // 8
            sets = []
            # a GPU's cache still holds what the products of a decode step, which has few tokens, have just written
            for _ in range(1 if device == "cpu" or tokens <= 32 else max(2, min(32, 300_000_000 // (2 * size)))):
                gate = torch.randn(tokens, width, device=device).to(dtype)
                sets.append((gate, (1 + torch.exp(-gate.float())).to(dtype)))
            # 1.5 times the elements, read and written, is what gate, up and the result are together
            halves = [torch.randn(3 * tokens * width // 2, device=device).to(dtype) for _ in range(2 * len(sets))]
            turn = iter(range(1 << 60))

            def limit(gate, up, halves=halves, turn=turn):
                k = next(turn) % (len(halves) // 2) * 2
                halves[k].copy_(halves[k + 1])

            functions = {"limit": limit, **variants(tokens, width, dtype, device, compiled)}
            with torch.no_grad():
                times = (time_cuda if device == "cuda" else time_cpu)(functions, sets, seconds)
            del functions, sets, halves
            for name, values in times.items():
                quartiles = stats.quantiles(values, n=4)
                rows.append({"tokens": tokens, "width": width, "dtype": str(dtype).split(".")[-1], "name": name,
                             "us": stats.median(values), "quartiles": [quartiles[0], quartiles[2]], "n": len(values),
                             "gb_per_s": 3 * size / stats.median(values) / 1e3})
            show_row(rows[-len(times):])
    return rows


def show_row(rows):
    first, limit = rows[0], rows[0]["us"]
    print(f"\n{first['dtype']}, {first['tokens']} x {first['width']}")
    for row in rows:
        print(f"  {row['name']:18} {row['us']:10.1f} us ({row['quartiles'][0]:.1f} to {row['quartiles'][1]:.1f})"
              f" {row['gb_per_s']:8.1f} GB/s {limit / row['us']:7.1%} of the limit", flush=True)


def kernel_targets(rows) -> None:
    """The ratios that the project promises, where this run measured them."""
    us = {(row["dtype"], row["tokens"], row["width"], row["name"]): row["us"] for row in rows}
    print("\nratios")
    for dtype, tokens, width in dict.fromkeys(key[:3] for key in us):
        get = lambda name: us[dtype, tokens, width, name]  # noqa: E731
        hook = get("hook, statistics") + get("hook, edits") - get("eager")
        print(f"  {dtype:8} {tokens:5} x {width:5}: edits / eager {get('60 edits') / get('eager'):.2f}, "
              f"both / hook {get('both') / hook:.2f}, both / plain {get('both') / get('plain'):.2f}, "
              f"1,000 profiles / 1 {get('1000 profiles') / get('60 edits'):.2f}, "
              f"plain of limit {get('limit') / get('plain'):.0%}, edits of limit {get('limit') / get('60 edits'):.0%}")


# ------------------------------------------------------------------------------------------------------- generation


def bound(ratios, seed=0) -> tuple[float, float]:
    """The median of paired ratios and the upper end of its bootstrap 95 % interval."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(ratios, dtype=torch.float64)
    draws = values[torch.randint(0, len(values), (4000, len(values)), generator=generator)].quantile(0.5, 1)
    return float(values.quantile(0.5)), float(draws.quantile(0.975))


def wait_for(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def paired(ways: dict, pairs: int, device: str) -> dict:
    """Seconds of each way, in turn, after a call that doesn't count."""
    times = {name: [] for name in ways}
    for call in ways.values():
        call()
    for k in range(pairs):
        for name in list(ways)[k % len(ways):] + list(ways)[:k % len(ways)]:
            wait_for(device)
            start = time.perf_counter()
            ways[name]()
            wait_for(device)
            times[name].append(time.perf_counter() - start)
    return times


class Turn(StoppingCriteria):
    """Stops generate() after `timed` tokens, before which `untimed` pass, until it is this process's turn again; sends the seconds
    that one of the timed ones took."""

    def __init__(self, pipe, untimed: int = 0, timed: int = 1):
        self.pipe, self.untimed, self.timed = pipe, untimed, timed
        self.pipe.send(None)  # all is ready
        self.wait()

    def wait(self) -> None:
        self.pipe.recv()
        self.passed, self.start = 0, time.perf_counter()

    def __call__(self, input_ids, scores, **kwargs):
        wait_for(input_ids.device)
        self.passed += 1
        if self.passed == self.untimed:
            self.start = time.perf_counter()
        elif self.passed == self.untimed + self.timed:
            self.pipe.send((time.perf_counter() - self.start) / self.timed)
            self.wait()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def process(pipe, work) -> None:
    try:
        work(pipe)
    except EOFError:  # no more is wanted
        pass
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise


def in_turns(works: dict, steps: int, seed: int = 0) -> dict:
    """{name: seconds of each of `steps` steps} of work(pipe) functions, a process each, of which one takes a step at a time, in
    another order each time, so that what else the machine does slows them all alike. (Not threads: OpenMP keeps a team for each,
    and with more threads than cores every loop begins with waking one up.)"""
    context, pick, running = multiprocessing.get_context("spawn"), random.Random(seed), {}
    seconds = {name: [] for name in works}

    def heard(name):
        value = running[name][0].recv()
        if isinstance(value, str):
            raise RuntimeError(f"{name}: {value}")
        return value

    try:
        for name, work in works.items():
            ours, theirs = context.Pipe()
            running[name] = ours, context.Process(target=process, args=(theirs, work), daemon=True)
            running[name][1].start()
            theirs.close()
        for name in works:
            heard(name)
        for _ in range(steps):
            for name in pick.sample(list(works), len(works)):
                running[name][0].send(True)
                seconds[name].append(heard(name))
    finally:
        for pipe, one in running.values():
            pipe.close()
            one.join(60)
            one.terminate()
    return seconds


def write(model, ids, new_tokens: int, *criteria, **options) -> None:
    """One generate() of exactly so many tokens."""
    with torch.no_grad():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                       do_sample=False, stopping_criteria=list(criteria), **options)


def random_ids(rows: int, length: int, device):
    return torch.randint(10, 1000, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


def way(name: str, model, rows: int, where: str = "generated"):
    """What a model of the benchmark is put under: nothing ("plain", or a name that says nothing), observing, or profiles of 60
    edits a layer: one ("steered"), or as many as the name begins with, by turns over the rows."""
    if name == "observed":
        return observe(model, Statistics.of(model), where=where)
    number = 1 if name == "steered" else int(name.split()[0]) if "profile" in name else 0
    if not number:
        return contextlib.nullcontext()
    mlps = find_mlps(model)
    made = [random_profile(60, *shape_of(mlps), seed) for seed in range(number)]
    return steer(model, made, [i % number + 1 for i in range(rows)], where)


def generate_options(compiled: bool) -> dict:
    if not compiled:
        return {}
    config = CompileConfig()
    config._compile_all_devices = True  # generate() leaves a CPU's decoding uncompiled otherwise
    return {"cache_implementation": "static", "compile_config": config}


# of a generation that is one turn: the prompt's token, those in which compiled code is captured for a new cache, and those in which
# a GPU comes over from another process
UNTIMED = 8


def generates(pipe, name: str, source: str | None, dtype: str | None, rows: int, new_tokens: int, compiled: bool,
              whole: bool) -> None:
    """What a process of in_turns does: one generation after the other."""
    model = KINDS[source](dtype) if source in KINDS else load_model(source, "cpu", dtype)[0]
    ids, options = random_ids(rows, 24, model.device), generate_options(compiled)
    with way(name, model, rows):
        for _ in range(3 if compiled else 1):  # these don't count, and all processes do them at once
            write(model, ids, new_tokens, **options)
        turn = Turn(pipe, UNTIMED, new_tokens - UNTIMED) if whole else Turn(pipe)
        while True:
            write(model, ids, new_tokens, turn, **options)


def token_seconds(names: dict, rows: int, pairs: int, new_tokens: int, compiled: bool = False, dtype: str | None = None,
                  whole: bool = False) -> dict:
    """{name: seconds of a token of all rows} of `pairs` generations; names: {name: the model, as --model takes it, or of KINDS}. A
    mean of every two, since on a CPU statistics are counted every 64 tokens, which at 32 rows is in every second step. whole:
    generations take turns, not tokens, and each gives one mean."""
    works = {name: functools.partial(generates, name=name, source=source, dtype=dtype, rows=rows, new_tokens=new_tokens,
                                     compiled=compiled, whole=whole) for name, source in names.items()}
    if whole:  # new_tokens is above UNTIMED
        return in_turns(works, pairs)
    seconds = in_turns(works, pairs * new_tokens)
    return {name: [(a + b) / 2 for a, b in zip(steps[::2], steps[1::2])] for name, steps in seconds.items()}


def random_mixture(dtype: str | None):
    """Of OLMoE's shape, eight of 64 experts a token, but a quarter as wide and deep."""
    import transformers

    config = transformers.OlmoeConfig(vocab_size=50304, hidden_size=512, intermediate_size=256, num_hidden_layers=8,
                                      num_attention_heads=8, num_key_value_heads=8, num_experts=64, num_experts_per_tok=8,
                                      eos_token_id=2, pad_token_id=2)
    torch.manual_seed(0)
    return transformers.OlmoeForCausalLM(config).to(getattr(torch, dtype or default_dtype("cpu"))).eval()


def quantized(kind: str):
    return lambda dtype: load_model(None, "cpu", dtype, quantize=kind)[0]


def on_disk(dtype: str | None):
    """The default model with the last two of its layers on disk."""
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    layers = {f"model.layers.{number}": "disk" if number > 27 else "cpu" for number in range(30)}
    return load_model(None, None, dtype, device_map=places | layers)[0]


def large(device: str, pairs: int) -> list[dict]:
    """Each kind of model, generating on a CPU, plain and otherwise."""
    names, results = ("plain", "steered", "observed"), []
    for kind in [kind for kind in KINDS if kind != EIGHT_BILLION]:
        times = token_seconds(dict.fromkeys(names, kind), 32, pairs, 24)
        results += [ratio(f"{kind}, {default_dtype('cpu')}, 32 rows", name, "plain", times, 32, "tokens") for name in names[1:]]
    return results


EIGHT_BILLION = "Llama-3-8B's shape, random weights"


def random_llama(dtype: str | None):
    import transformers

    config = transformers.LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                      num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
                                      eos_token_id=2, pad_token_id=2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype or default_dtype(device)))
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


# of models that are not just loaded: how they are made, from a dtype or None
KINDS = {"64 experts": random_mixture, "int8 by torchao": quantized("int8"), "8bit by bitsandbytes": quantized("8bit"),
         "two layers on disk": on_disk, EIGHT_BILLION: random_llama}


def generation(device: str, rows: int, pairs: int, new_tokens: int, compiled: bool, profiles: int = 0) -> list[dict]:
    """generate() calls with the same number of tokens, plain and otherwise; pairs are of two tokens, on a GPU of generations."""
    names = ["1 profile", f"{profiles} profiles"] if profiles else ["plain", "steered", "observed"]
    source = EIGHT_BILLION if device == "cuda" else None
    times = token_seconds(dict.fromkeys(names, source), rows, pairs, new_tokens, compiled, whole=device == "cuda")
    title = (f"{source or 'SmolLM2-135M'}, {default_dtype(device)}, {rows} rows, {new_tokens} tokens, "
             f"{'static cache, compiled' if compiled else 'eager'}")
    return [ratio(title, name, names[0], times, rows, "tokens") for name in names[1:]]


class Clock(StoppingCriteria):
    """Keeps the time of each token; stops nothing."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        wait_for(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def identification(model, rows: int, new_tokens: int = 500, prompt: int = 96, answers: int = 72000) -> dict:
    """Answers of both poles in batches, with statistics, as identify.py gets them: one batch, and what NPTI's setting (36,000
    questions of a trait, asked twice, 500 tokens) comes to by it. The interval is that of the mean over pieces of ten tokens,
    which takes in how unevenly they go, not how one batch differs from the next."""
    statistics, clock = Statistics.of(model, 2), Clock()
    ids = random_ids(rows, prompt, model.device)
    with observe(model, statistics, [k % 2 for k in range(rows)]):
        write(model, ids, 8, repetition_penalty=1.1)
        start = time.perf_counter()
        write(model, ids, new_tokens, clock, repetition_penalty=1.1)
    times = [start, *clock.times]
    pieces = torch.tensor([times[k + 10] - times[k] for k in range(0, len(times) - 10, 10)], dtype=torch.float64)
    line = torch.stack([torch.ones(len(pieces)), torch.arange(len(pieces))], 1).double()  # later tokens see more before them
    rest = pieces - line @ torch.linalg.lstsq(line, pieces[:, None]).solution[:, 0]
    error = 1.96 * float(rest.std()) * len(pieces) ** 0.5
    seconds, scale = times[-1] - start, answers / rows / 3600
    result = {"rows": rows, "tokens": new_tokens, "seconds": seconds, "error": error, "hours": scale * seconds,
              "hours_error": scale * error, "tokens_per_s": rows * new_tokens / seconds, "statistics_bytes": statistics.bytes}
    print(f"  identification, {rows} rows of {prompt} + {new_tokens} tokens: {seconds:.1f} s a batch, {result['tokens_per_s']:.0f} "
          f"tokens/s; {answers} answers {result['hours']:.2f} hours (+- {result['hours_error']:.2f}){memory(model)}", flush=True)
    return result


def memory(model) -> str:
    return f"; at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if model.device.type == "cuda" else ""


def training(model, length: int = 64) -> dict:
    """Trained edits of both poles of a trait, and their levels, as identify.py --train makes them, but from answers of random
    tokens; each word of a prompt is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from personality import doses, train
    from personality.frame import Frame
    from personality.model import BatchSize
    from personality.questions import load_bench

    raw = Tokenizer(models.WordLevel({"<unk>": 3, "</s>": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'] }} : {{ turn['content'] }} {% endfor %}"
    tokenizer.stop_text, tokenizer.answer_prefix = None, ""
    bench, frame, trait = load_bench(None), Frame.named("person"), "extraversion"
    biases, start = {}, time.perf_counter()
    price = train.price_of(model, tokenizer, 0)
    for sign, pole in ((1, "high"), (-1, "low")):
        persona = bench.personas_for("search", trait, pole)[0]
        rows = zip(bench.questions(trait, "search", train.ANSWERS), random_ids(train.ANSWERS, length, "cpu").tolist())
        items = [{"question": question, "persona": persona, "pole": pole, "ids": row} for question, row in rows]
        lessons = (train.make_lesson(model, tokenizer, bench, trait, frame, items[k:k + train.ROWS], 0, BatchSize(train.ROWS))
                   for k in range(0, len(items), train.ROWS))
        found = train.slopes_and_scores(model, lessons, sign, 0, lambda: None)
        biases[pole] = train.natural_step(*found, price, round(train.SHARE * price.numel()))
    fitted = time.perf_counter()
    multiples = (*doses.MULTIPLES, *doses.LARGER)
    profiles = [Profile.dense(bias=multiple * biases[pole]) for pole in biases for multiple in multiples]
    doses.dose_response(model, tokenizer, bench, trait, frame, profiles, multiples, lambda: None)
    result = {"fit_s": fitted - start, "levels_s": time.perf_counter() - fitted}
    print(f"  training a trait, {train.ANSWERS} answers of {length} tokens a pole: {result['fit_s']:.1f} s, its levels "
          f"{result['levels_s']:.1f} s{memory(model)}", flush=True)
    return result


def eight_billion() -> dict:
    """Identification and training of a trait on a GPU."""
    model = random_llama(None)
    result = {"training": training(model)}
    torch.cuda.reset_peak_memory_stats()
    return {**result, "identification": identification(model, 384)}


def ratio(title: str, first: str, second: str, times: dict, amount: int, unit: str) -> dict:
    median, upper = bound([a / b for a, b in zip(times[first], times[second])])
    speed = {name: amount / stats.median(times[name]) for name in (first, second)}
    print(f"  {title}: time of {first} / {second} {median:.4f} (95 % bound {upper:.4f}), "
          f"{speed[first]:.0f} against {speed[second]:.0f} {unit}/s", flush=True)
    return {"title": title, "first": first, "second": second, "ratio": median, "upper95": upper, "pairs": len(times[first]),
            "per_s": speed}


def reading(device: str, pairs: int) -> list[dict]:
    """Forward passes over answers that are there, as identify.py --answers does: plain, and observed in two groups."""
    model, _ = load_model(device=device)
    rows, prompt, tokens = 32, 64, 128
    ids = random_ids(rows, tokens, model.device)
    counted = (torch.arange(tokens, device=model.device) >= prompt).expand(rows, tokens)
    statistics = Statistics.of(model, 2)

    def forward():
        with torch.no_grad():
            model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    def observed():
        with observe(model, statistics, [k % 2 for k in range(rows)], counted):
            forward()

    title = f"{model.source}, reading {rows} rows of {tokens} tokens, of which {tokens - prompt} count"
    return [ratio(title, "observed", "plain", paired({"plain": forward, "observed": observed}, pairs, device), rows * tokens, "tokens")]


def kept(graph, inputs):
    """A backend of torch.compile whose code gives what it gave first: what is left is what goes on around it."""
    first = []

    def run(*args):
        if not first:
            first.append(graph(*args))
        return first[0]

    return run


def checks(rounds: int, layers: int = 32) -> dict:
    """{name: microseconds} of a call of compiled code whose graph does nothing: it checks what it has assumed and what goes in, and a
    GPU waits for that. A Llama of tiny layers on a CPU; the least of many rounds, since what else the machine does only adds."""
    import transformers

    config = transformers.LlamaConfig(vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                                      num_attention_heads=4, num_key_value_heads=2)
    ids, least = random_ids(4, 1, "cpu"), {}
    for name in ("plain", "steered", "observed"):
        torch._dynamo.reset()  # models of one class share their compiled code, and the first would be looked at for all
        model = transformers.LlamaForCausalLM(config).eval()
        with way(name, model, 4, where="all"), torch.no_grad():
            call = functools.partial(torch.compile(model, backend=kept), input_ids=ids, use_cache=False)
            for _ in range(3):  # the second call finds what the first has left behind, and is compiled once more
                call()
            least[name] = math.inf
            for _ in range(rounds):
                start = time.perf_counter()
                for _ in range(8):
                    call()
                least[name] = min(least[name], 1e6 / 8 * (time.perf_counter() - start))
    for name, microseconds in least.items():
        print(f"  {name}: {microseconds:.0f} us a call, {microseconds - least['plain']:.0f} more than plain")
    return least


def batches(device: str, pairs: int) -> list[dict]:
    """Many personalities of a few questions each: in shared batches, as evaluate.py asks them, and one batch a personality; and a
    batch of as many personalities as rows against one of a single one."""
    model, _ = load_model(device=device)
    mlps = find_mlps(model)
    people, each, new_tokens, size = 16, 4, 24, 64
    made = [random_profile(60, *shape_of(mlps), seed) for seed in range(1000)]
    ids = random_ids(1000, 24, model.device)

    def steered(part, profiles, rows, new_tokens=new_tokens):
        with steer(model, profiles, rows):
            write(model, part, new_tokens)

    def shared():
        whose = [k // each + 1 for k in range(people * each)]
        for start in range(0, len(whose), size):
            steered(ids[start:start + size], made[:people], whose[start:start + size])

    def alone():
        for k in range(people):
            steered(ids[k * each:(k + 1) * each], made[k:k + 1], [1] * each)

    results = [ratio(f"{model.source}, {people} personalities of {each} questions", "batches shared", "a batch each",
                     paired({"batches shared": shared, "a batch each": alone}, pairs, device), people * each * new_tokens, "tokens")]
    results.append(ratio(f"{model.source}, 1,000 rows", "1,000 profiles", "1 profile", paired({
        "1,000 profiles": lambda: steered(ids[:, :4], made, list(range(1, 1001)), 8),
        "1 profile": lambda: steered(ids[:, :4], made[:1], [1] * 1000, 8)}, max(3, pairs // 3), device), 1000 * 8, "tokens"))
    return results


def baked(pairs: int, folder: str) -> list[dict]:
    """Generation on a CPU of a checkpoint that induce.py --save made of the default model, against that model."""
    dtype = default_dtype(torch.device("cpu"))
    results = []
    for rows in (32, 1):
        times = token_seconds({"base": None, "baked": folder}, rows, pairs, 24, dtype=dtype)
        results.append(ratio(f"{folder}, {dtype}, {rows} rows", "baked", "base", times, rows, "tokens"))
    return results


def arguments():
    flags = Flags(__doc__)
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--json", metavar="FILE")
    flags.add_argument("--quick", action="store_true", help="two shapes, and fewer pairs of generations")
    what = flags.add_mutually_exclusive_group()
    what.add_argument("--only", choices=("kernel", "generation", "reading", "batches", "large", "checks"))
    what.add_argument("--baked", metavar="DIR",
                      help="only the speed of a checkpoint that induce.py --save made of the default model")
    flags.add_argument("--seconds", type=number(0, 3600), default=2.0, help="for each shape (default: %(default)s)")
    flags.add_argument("--pairs", type=positive, help="of generations, on a CPU by every two tokens; of checks, hundreds of runs (default: 21, quick: 7)")
    args = flags.parse_args()
    refuse(args, ((lambda args: args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: this torch sees no GPU"),
                  (lambda args: args.baked and not (Path(args.baked) / "config.json").is_file(), "--baked {baked}: no checkpoint is there"),
                  (lambda args: args.json and not Path(args.json).resolve().parent.is_dir(), "--json {json}: its folder is not there"),
                  (lambda args: args.json and Path(args.json).is_dir(), "--json {json}: is a folder")))
    args.pairs = args.pairs or (7 if args.quick else 21)
    return args


def main(args) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result = {"machine": machine("cpu" if args.baked or args.only == "checks" else args.device)}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    if args.baked:
        result["baked"], args.only = baked(args.pairs, args.baked), "baked"
    if args.only in (None, "kernel"):
        result["kernels"] = kernels(args.device, args.quick, args.seconds)
        kernel_targets(result["kernels"])
    if args.only in (None, "generation"):
        print("\ngeneration")
        result["generation"] = generation(args.device, 32, args.pairs, 24, False)
        result["generation"] += generation(args.device, 32, args.pairs, 24, True)
        if args.device == "cuda":
            result["generation"] += generation(args.device, 1000, max(3, args.pairs // 3), 24, False, profiles=1000)
    for name, measure in (("reading", reading), ("batches", batches)):
        if args.only in (None, name):
            print(f"\n{name}")
            result[name] = measure(args.device, args.pairs)
    if args.only == "checks":
        result["checks"] = checks(100 * args.pairs)
    if args.only == "large":
        result["large"] = eight_billion() if args.device == "cuda" else large(args.device, args.pairs)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    script(arguments, "bench")
