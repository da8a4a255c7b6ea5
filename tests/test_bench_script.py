"""tests/bench.py: what it times, and how."""

import functools
import time

import pytest
import torch

import bench
from conftest import exit_of
from reference import close, shared, write


def test_what_is_timed_computes_the_same():
    """Ours does the same work as what it is held against; and each is timed."""
    gate, up = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)), torch.ones(64, 300)
    ways = bench.variants(64, 300, torch.float32, "cpu", bench.eager)
    results = {}
    for name, call in ways.items():
        source = gate.clone()
        result = call(source, up)
        results[name] = source if result is None else result  # ours writes over gate
    edited = {name for name in ways if "edits" in name or "profiles" in name or name == "both"}
    assert {"hook, edits", "60 edits", "1800 edits", "both", "32 profiles", "1000 profiles"} == edited
    for name in ways.keys() - edited:
        assert close(results[name], results["eager"], 1e-5), name
    for name in ("60 edits", "both"):
        assert close(results[name], results["hook, edits"], 1e-5) and not close(results[name], results["eager"], 0.01)
    times = bench.time_cpu({"limit": bench.eager, **ways}, [(gate, up)], 0.01)
    assert times.keys() == {"limit", *ways} and all(len(values) >= 3 and min(values) > 0 for values in times.values())


@pytest.mark.parametrize("name, changes", (("plain", False), ("observed", False), ("steered", True), ("3 profiles", True)))
def test_ways_to_generate(name, changes):
    model = shared("llama")
    plain = write(model)
    with bench.way(name, model, 4):
        assert torch.equal(write(model), plain) != changes
    assert torch.equal(write(model), plain)


def steps(pipe, seconds):
    turn = bench.Turn(pipe)
    while True:
        time.sleep(seconds)
        turn(torch.zeros(2, 1), None)


def generation(pipe):
    """Two tokens of 0.05 s, which are not timed, and two of 0.01 s."""
    turn = bench.Turn(pipe, 2, 2)
    while True:
        for seconds in (0.05, 0.05, 0.01, 0.01):
            time.sleep(seconds)
            turn(torch.zeros(2, 1), None)


def fails(pipe):
    bench.Turn(pipe)
    raise ValueError("on purpose")


def test_turns():
    """bench.py lets generations take turns, a process each; only what one does itself counts, and an error in one ends all."""
    works = {"slow": functools.partial(steps, seconds=0.03), "fast": functools.partial(steps, seconds=0.01)}
    times = bench.in_turns(works, 4)
    assert [len(times[name]) for name in ("slow", "fast")] == [4, 4]
    assert min(times["slow"]) >= 0.03 and 0.01 <= sorted(times["fast"])[1] < 0.03, "a turn's wait for the other is left out"
    assert 0.01 <= min(bench.in_turns({"whole": generation}, 3)["whole"]) < 0.05, "a turn can be a whole generation, without its first tokens"
    with pytest.raises(RuntimeError, match="broken: ValueError: on purpose"):
        bench.in_turns({"fine": functools.partial(steps, seconds=0.01), "broken": fails}, 4)


def test_checks_alone_are_timed(monkeypatch, capsys):
    """Code that is kept() runs once; what is timed is what torch.compile does around it, of models that are patched indeed."""
    ran, inputs, kept = [], [], bench.kept
    call = torch.compile(lambda x: x + 1, backend=lambda graph, given: kept(lambda *args: ran.append(1) or graph(*args), given))
    assert [float(call(torch.tensor(number))) for number in (1.0, 5.0)] == [2.0, 2.0] and ran == [1]
    monkeypatch.setattr(bench, "kept", lambda graph, given: inputs.append(len(given)) or kept(graph, given))
    least = bench.checks(1, layers=2)
    assert list(least) == ["plain", "steered", "observed"] and min(least.values()) > 0
    assert len(inputs) >= 3 and inputs[0] < min(inputs[1:]), "edits, or statistics, go in too"
    assert max(least.values()) < 1e5, "a compilation was timed"
    assert [line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines()] == list(least)


@pytest.mark.parametrize("flags, words", (
    (("--pairs", "-1"), "--pairs"), (("--pairs", "0"), "--pairs"), (("--seconds", "nan"), "--seconds"), (("--baked", "/none/such"), "/none/such"),
    (("--json", "/none/such/out.json"), "/none/such"), (("--json", "/tmp"), "is a folder"), (("--device", "tpu"), "tpu"),
    *([] if torch.cuda.is_available() else [(("--device", "cuda"), "no GPU")])))
def test_hostile_flags_of_the_benchmark(monkeypatch, capsys, flags, words):
    code, error = exit_of(bench, monkeypatch, capsys, *flags)
    assert code == 2 and words in error and len(error.strip().splitlines()) == 1
