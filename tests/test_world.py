"""torchrun: processes that share the questions, that hold one model together, and both; and what becomes of the others if one dies."""

import itertools
import os
import re
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch

import identify
import induce
from conftest import Server, contents, exit_of, lines_of, main_of, rank_of, run, save_model, shared_flags, tiny, torchrun
from personality import Neurons, UserError
from personality.load import load_asked, load_model
from personality.world import World


def test_shares_are_whole_steps():
    for number, step, size in ((24, 8, 2), (25, 8, 3), (7, 8, 2), (100, 1, 7), (0, 4, 2)):
        parts = [World(rank, size).share(number, step) for rank in range(size)]
        assert [k for part in parts for k in part] == list(range(number))
        assert all(part.start % step == 0 for part in parts if len(part))


def test_one_process_says_what_all_go_by():
    """Each looks at a file by itself; where they saw another one, they waited for each other for ever."""
    store, heard = torch.distributed.HashStore(), {}

    def look(rank):
        world = World(rank, 2, everyone=torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20)))
        heard[rank] = [world.told(rank == 0), world.told(rank == 1)]

    threads = [threading.Thread(target=look, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert heard == {0: [True, False], 1: [True, False]} and World().told(True) and not World().told(False)


def test_leftovers_of_fewer_processes_replace_nothing(small, tmp_path):
    """Killed alone, finished by two, started again alone: the answers of two stay."""
    first, calls = run(small, tmp_path), itertools.count(1)

    def interrupt(module, args):
        if next(calls) == 8:  # in the second batch
            raise KeyboardInterrupt

    hook = small.model.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            first.identify()
    finally:
        hook.remove()
    first.save()
    left = {path.name for path in tmp_path.iterdir()}
    assert any(name.endswith("answers.part") for name in left) and any(name.endswith("state.safetensors") for name in left)
    run(small, tmp_path / "whole").identify()
    for path in (tmp_path / "whole").iterdir():  # as two processes would leave them
        path.rename(tmp_path / path.name)
    before = contents(tmp_path)
    run(small, tmp_path).identify()
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"extraversion.safetensors", "extraversion.answers.jsonl", "whole"}


def test_equal_runs_at_once(small, made, tmp_path):
    """Two of two processes each and one of one: while each process had a lock of its own, two runs could wait for each other."""
    (tmp_path / "answers.jsonl").write_text((made / "extraversion.answers.jsonl").read_text() * 40)
    flags = ("identify.py", *shared_flags(small), "--bench", small.bench_dir, "--batch-size", 4, "--out", tmp_path / "out", "--answers",
             tmp_path / "answers.jsonl", "--trait", "extraversion")
    processes = [torchrun(number, *flags) for number in (2, 2, 1)]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        [process.terminate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert sum("is there, made with the same" in words for words in said) == 2, "one has made it"
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(contents(made))


def test_two_processes_equal_one(small, made, tmp_path):
    """One of two is killed in the middle of the second trait: the other stops and says so. The next start goes on, and in the end
    there is what one process makes: of a trait that ran through and of one that was interrupted."""
    answers, some, out = tmp_path / "answers.jsonl", (made / "extraversion.answers.jsonl").read_text(), tmp_path / "two"
    answers.write_text(some.replace('"extraversion"', '"openness"') * 3 + some * 100)
    flags = ("--bench", small.bench_dir, "--batch-size", 4, "--out", out, "--answers", answers, "--trait", "openness", "extraversion")
    process = torchrun(2, "identify.py", *shared_flags(small), *flags)
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None and not [
            part for part in out.glob(".extraversion.*.1of2.answers.part") if part.stat().st_size]:
        time.sleep(0.02)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and "another rank has ended" in said and "same command goes on" in said, said
    assert "Traceback" not in said.partition("another rank has ended")[0] and not (out / "extraversion.safetensors").exists()
    assert said.count("openness.safetensors") == 1, "one process speaks"
    whole = contents(out, "openness")

    process = torchrun(2, "identify.py", *shared_flags(small), *flags)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "openness.safetensors is there, made with the same" in said and contents(out, "openness") == whole
    assert said.count("extraversion.safetensors") == 1, "one process speaks"
    assert {path.name for path in out.iterdir()} == {*whole, "extraversion.safetensors", "extraversion.answers.jsonl"}
    for trait in ("openness", "extraversion"):
        alone = run(small, tmp_path / "one", trait, answers=str(answers), max_new_tokens=64).identify()
        two = Neurons.load(out / f"{trait}.safetensors", small.model)
        assert torch.equal(alone.prob, two.prob) and torch.equal(alone.p95, two.p95)
        assert torch.allclose(alone.mean, two.mean, rtol=1e-6)
        assert alone.meta["tokens"] == two.meta["tokens"] and alone.meta["key"] == two.meta["key"]
        name = f"{trait}.answers.jsonl"
        assert contents(out, trait)[name] == contents(tmp_path / "one", trait)[name]


LEAVING = """
import atexit, pathlib
from personality.world import World

def threads():
    return [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")].count("pt_gloo_runloop")

atexit.register(lambda: print(f"at the end {threads()}."))  # what is registered first runs last
world = World.join(%d)
world.wait()
print(f"at work {threads() > 0}.")
"""


@pytest.mark.parametrize("tp", (1, 2))
def test_no_thread_of_a_group_outlives_python(tmp_path, tp):
    """One that lets go of a collective's tensors after Python has ended aborts a process that has done its work."""
    (tmp_path / "script.py").write_text(LEAVING % tp)
    process = torchrun(2, tmp_path / "script.py")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and said.count("at work True.") == said.count("at the end 0.") == 2, said


ABSENT = """
import os, sys, time
from personality.world import World

if os.environ["RANK"] == "1":
    time.sleep(1)
    sys.exit("not today")
World.join(%d)
"""


@pytest.mark.parametrize("tp", (1, 2))
def test_who_waits_for_one_that_does_not_come_ends(tmp_path, tp):
    """When torchrun says so; after 30 seconds it would be killed."""
    (tmp_path / "script.py").write_text(ABSENT % tp)
    said = torchrun(2, tmp_path / "script.py").communicate(timeout=300)[0]
    assert "not today" in said and "Signal 15 (SIGTERM)" in said and "SIGKILL" not in said, said


# ------------------------------------------------------------------------------------------------------ tensor parallel


def shared_model(folder, family):
    """With a width that 3 does not divide, and heads and a vocabulary that 2 and 3 do (which transformers 5.20 asks for)."""
    save_model(folder)
    tiny(family, num_attention_heads=6, num_key_value_heads=6, hidden_size=48, intermediate_size=50, vocab_size=108).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family, processes, flags", (("llama", 3, ["--tp"]), ("phi3", 4, ["--tp", "2"])))
def test_a_shared_model_gives_the_same_file(small, tmp_path, family, processes, flags):
    """Three processes hold it together, one with a shorter part; or two teams of two share the questions, and each of a team computes
    all of gate and up (Phi-3's plan gathers them), which must not be counted twice."""
    folder = str(shared_model(tmp_path / "model", family))
    more = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--bench", small.bench_dir, "--batch-size", 4, "--limit", 6,
            "--max-new-tokens", 6, "--trait", "openness", "--out", tmp_path / "together"]
    process = torchrun(processes, "identify.py", *more, *flags)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and said.count("openness.safetensors") == 1, said
    alone = run(small, tmp_path / "alone", "openness", model=load_model(folder, "cpu", "float32"), limit=6).identify()
    together = Neurons.load(tmp_path / "together" / "openness.safetensors")
    assert alone.key == together.key and alone.meta["tokens"] == together.meta["tokens"] and alone.shape == (2, 50)
    for name in ("prob", "p50", "p95", "p99"):
        assert torch.equal(alone.tensors[name], together.tensors[name])
    assert torch.allclose(alone.mean, together.mean, atol=1e-5) and torch.allclose(alone.variance, together.variance, atol=1e-4)
    name = "openness.answers.jsonl"
    assert contents(tmp_path / "together", "openness")[name] == contents(tmp_path / "alone", "openness")[name]
    assert len(list((tmp_path / "together").iterdir())) == 2


def test_a_shared_model_answers_the_same(small, tmp_path, monkeypatch):
    """Edits are cut by each process's part."""
    folder = shared_model(tmp_path / "model", "llama")
    run(small, tmp_path / "neurons", "openness", model=load_model(str(folder), "cpu", "float32")).identify()
    (tmp_path / "asked").write_text("w10 w11 ?\nw20 ?\n" + '{"question": "w31 ?", "profile": {"openness": -3}}\n' * 2)
    more = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--neurons", tmp_path / "neurons", "--trait", "openness", "--alpha",
            4, "--questions", tmp_path / "asked", "--max-new-tokens", 12, "--batch-size", 3]
    process = torchrun(3, "induce.py", *more, "--out", tmp_path / "together", "--tp")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    main_of(induce, monkeypatch, *more, "--out", tmp_path / "alone")
    assert (tmp_path / "alone").read_text() == (tmp_path / "together").read_text()
    assert len({line["answer"] for line in lines_of(tmp_path / "alone")}) > 1


def test_one_of_a_team_asks_the_engine(small, tmp_path):
    """A reply is paid for once, and all read the same one, whatever a server says the second time."""
    with Server(lambda n, body: f" w{10 + n % 80} w{10 + n % 7} w20") as server:
        process = torchrun(2, "identify.py", *shared_flags(small), "--bench", small.bench_dir, "--trait", "extraversion",
                           "--out", tmp_path, "--engine", server.url, "--tp")
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        assert len(server.seen) == 24 and len(lines_of(tmp_path / "extraversion.answers.jsonl")) == 24


@pytest.mark.parametrize("flags, pattern", (
    (["--tp"], "--tp: expected to be started by torchrun"), (["--tp", "2"], "--tp 2: .*got 1"),
    (["--tp", "2", "--train"], "--train: .*one process")))
def test_tp_needs_torchrun(small, monkeypatch, capsys, tmp_path, flags, pattern):
    code, said = exit_of(identify, monkeypatch, capsys, *shared_flags(small), "--out", tmp_path, *flags)
    assert code == 2 and re.search(pattern, said), said


def test_what_a_team_can_not_do(small, monkeypatch, capsys):
    for flag in (["--chat"], ["--save", "d"]):
        code, said = exit_of(induce, monkeypatch, capsys, *shared_flags(small), "--trait", "openness", "--alpha", 1, "--tp", 2, *flag)
        assert code == 2 and "--tp" in said
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, said = exit_of(induce, monkeypatch, capsys, *shared_flags(small), "--trait", "openness", "--alpha", 1)
    assert code == 2 and "--tp says so" in said
    for script, more in ((identify, []), (induce, ["--trait", "openness", "--alpha", 1, "--tp"])):
        code, said = exit_of(script, monkeypatch, capsys, "--device-map", "auto", "--model", small.model_dir, *more)
        assert code == 2 and "--device-map auto" in said and "one process" in said
        code, said = exit_of(script, monkeypatch, capsys, "--quantize", "8bit", "--tp", *more)
        assert code == 2 and "--quantize 8bit: --tp goes without it" in said
        code, said = exit_of(script, monkeypatch, capsys, "--device", "cuda:1", "--tp", *more)
        assert code == 2 and "--device cuda:1: --tp gives each process a card of its own" in said


def test_batch_size_auto_is_of_one_process(small):
    """Two might find different numbers: they would share the questions in two ways."""
    args = identify.parser().parse_args(["--model", str(small.model_dir), "--batch-size", "auto", "--device", "cpu"])
    with pytest.raises(UserError, match="--batch-size auto: is tried by one process"):
        load_asked(args, world=World(0, 2))


def test_teams():
    teams = [World(rank, 6, 2) for rank in range(6)]
    assert [(world.team, world.place) for world in teams] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    parts = [world.share(24, 4) for world in teams]
    assert parts[::2] == parts[1::2] == [range(0, 8), range(8, 16), range(16, 24)]


@pytest.mark.parametrize("size, tp, fine", ((4, 3, False), (4, 2, True), (3, 2, False), (2, 4, False)))
def test_teams_are_whole(monkeypatch, size, tp, fine):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", str(size)), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(World, "meet", lambda self: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    if fine:
        assert World.join(tp).teams == size // tp
    else:
        with pytest.raises(UserError, match=f"--tp {tp}"):
            World.join(tp)


@pytest.mark.parametrize("changes", ({"RANK": "2"}, {"MASTER_PORT": None}, {"MASTER_ADDR": None}, {"RANK": "-1"}))
def test_not_as_torchrun_sets_them(monkeypatch, changes):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", **changes}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(World, "meet", lambda self: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(UserError, match="expected as torchrun sets them"):
        World.join()


def test_an_error_of_one_process_is_its_own():
    """Only what says that the others are gone is told as that."""
    World().check(ConnectionError("connection refused"))
    with pytest.raises(UserError, match="rank 1: another rank has ended"):
        World(1, 2).check(RuntimeError("Gloo: Connection closed by peer"))
    World(1, 2).check(RuntimeError("shapes"))
