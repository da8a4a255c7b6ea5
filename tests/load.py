"""Load on the server: clients that each ask again as soon as they are answered, beside generate() with as many rows. Some of them stop
at a string, ask for perplexity, or hang up.

    python tests/load.py --neurons DIR [--clients 64] [--seconds 60] [--model M] [--dtype float32]

Prints tokens a second of both (the server's in the middle of the run; generate()'s in a process of its own, before and after), what
was lost, and the server's memory over time.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOKENS = 96


def identified(neurons: str) -> list[str]:
    """The traits that have a neuron file there."""
    from personality import TRAITS

    traits = [trait for trait in TRAITS if (Path(neurons) / f"{trait}.safetensors").exists()]
    if not traits:
        sys.exit(f"load.py: no neuron file in {neurons}; identify.py --train makes one")
    return traits


def generate(args) -> float:
    """Tokens a second of batches of as many rows, steered, in this process."""
    from personality.frame import Frame
    from personality.methods import Character, Profiles
    from personality.load import load_model
    from personality.model import answers, sampling
    from personality.neurons import NeuronFolder
    from personality.questions import load_bench
    from personality.steer import steer

    model, tokenizer = load_model(args.model, "cpu", args.dtype)
    frame, pick = Frame.named("person"), random.Random(0)
    profiles = Profiles(model, tokenizer, NeuronFolder(model, args.neurons, frame=frame))
    traits = identified(args.neurons)
    people = [profiles.of(Character({pick.choice(traits): round(pick.uniform(-1, 1), 2)}, "trained")) for _ in range(args.clients)]
    questions = load_bench(None).test["extraversion"]
    turns = [frame.turns(questions[k % len(questions)]) for k in range(args.clients)]
    speeds = []
    with steer(model, people):
        answers(model, tokenizer, turns, 4, **sampling())
        for _ in range(2):
            begin = time.perf_counter()
            said = answers(model, tokenizer, turns, TOKENS, **sampling())
            speeds.append(sum(len(ids) for _, ids in said) / (time.perf_counter() - begin))
    return statistics.median(speeds)


def alone(args) -> float:
    line = [sys.executable, __file__, "--generate", "--neurons", args.neurons, "--clients", str(args.clients)]
    line += [part for name in ("model", "dtype") if getattr(args, name) for part in (f"--{name}", getattr(args, name))]
    return float(subprocess.run(line, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()[-1])


def memory(process: int) -> float:
    """MiB that a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


async def client(openai, number: int, name: str, traits: list[str], questions: list[str], until: float, done: list) -> None:
    from personality.frame import Frame

    pick, frame, kept = random.Random(number), Frame.named("person"), 0
    while time.monotonic() < until:
        who = {pick.choice(traits): round(pick.uniform(-1, 1), 2)}
        begin, stream, kept = time.monotonic(), number % 2 == 0, kept + 1
        more = {"stop": "!"} if kept % 5 == 1 else {}
        try:
            reply = await openai.chat.completions.create(
                model=name, messages=frame.turns(pick.choice(questions)), max_tokens=TOKENS, stream=stream,
                extra_body={"personality": {"traits": who}, "perplexity": (number + kept) % 40 == 1}, **more,
                **({"stream_options": {"include_usage": True}} if stream else {}))
            if stream and kept % 6 == 2:  # it reads a little, and hangs up
                await anext(aiter(reply))
                await reply.close()
                continue
            if stream:
                async for reply in reply:
                    pass
            done.append((time.monotonic(), time.monotonic() - begin, reply.usage.completion_tokens))
        except Exception as error:  # a request that was lost, however
            done.append((time.monotonic(), time.monotonic() - begin, error))


async def load(args, url: str, process: int) -> dict:
    import openai

    from personality.questions import load_bench

    begin, done, held, counts = time.monotonic(), [], [], []
    traits, questions = identified(args.neurons), load_bench(None).test["extraversion"]
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600) as client_of:
        name = (await client_of.models.list()).data[0].id
        tasks = [asyncio.ensure_future(client(client_of, number, name, traits, questions, begin + args.seconds, done))
                 for number in range(args.clients)]
        while time.monotonic() < begin + args.seconds:
            await asyncio.sleep(1)
            held.append(memory(process))
            counts.append((time.monotonic(), await written(url)))
        await asyncio.gather(*tasks)
    first, last = (counts[min(len(counts) - 1, round(share * len(counts)))] for share in (0.2, 0.95))
    lost = [answer for _, _, answer in done if not isinstance(answer, int)]
    return {"tokens a second": (last[1] - first[1]) / (last[0] - first[0]), "answers": len(done) - len(lost), "lost": len(lost),
            "why": sorted({repr(error)[:200] for error in lost}), "seconds an answer": statistics.median(took for _, took, _ in done),
            "MiB after 1/4, 1/2, 1": [round(held[round(share * (len(held) - 1))]) for share in (0.25, 0.5, 1)]}


async def written(url: str) -> int:
    """Tokens that the engine has written, by its own count."""
    import urllib.request

    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url + "/metrics").read().decode())
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("personality_written_total"))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--neurons", required=True)
    flags.add_argument("--clients", type=int, default=64)
    flags.add_argument("--seconds", type=float, default=60)
    flags.add_argument("--model")
    flags.add_argument("--dtype")
    flags.add_argument("--generate", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args()
    identified(args.neurons)
    if args.generate:
        return print(generate(args))
    before, begin = alone(args), time.monotonic()
    line = [sys.executable, "-m", "personality.serve", "--neurons", args.neurons, "--port", "0", "--rows", str(args.clients)]
    line += [part for name in ("model", "dtype") if getattr(args, name) for part in (f"--{name}", getattr(args, name))]
    server = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        url = next(part.rstrip("/") for part in server.stderr.readline().split() if part.startswith("http://"))
        said = []
        threading.Thread(target=lambda: said.extend(server.stderr), daemon=True).start()
        found = {"seconds until it listens": time.monotonic() - begin, **asyncio.run(load(args, url, server.pid))}
    finally:
        server.terminate()
        server.wait()
    after = alone(args)
    found |= {"lines in the server's log": len(said), "generate(), tokens a second": [round(before, 1), round(after, 1)],
              "server / generate()": found["tokens a second"] / statistics.mean((before, after))}
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
