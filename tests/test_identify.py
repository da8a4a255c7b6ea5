"""identify.py: what is asked and counted; runs that were killed, interrupted or short of memory; the whole command."""

import contextlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import identify
from conftest import FRAMED, ROOT, contents, exit_of, lines_of, prompt_of, run, said_in_time, save_model, shared_flags
from personality import POLES
from personality.load import load_model
from personality.model import answers
from personality.neurons import Neurons, answers_path, neuron_path
from personality.terminal import UserError
from personality.train import add_trained


def test_answers_are_of_every_question_under_both_poles(small, made):
    written = lines_of(made / "extraversion.answers.jsonl")
    asked = [(line["question"], line["pole"]) for line in written]
    assert asked == [(question, pole) for question in small.bench.search["extraversion"] for pole in POLES]
    for line in written:
        assert set(line) == {"trait", "pole", "persona", "question", "answer", "ids", "declined"} and line["trait"] == "extraversion"
        assert line["persona"] in small.bench.personas_for("search", "extraversion", line["pole"])
        assert small.tokenizer.decode(line["ids"], skip_special_tokens=True) == line["answer"]
        expected = answers(small.model, small.tokenizer, [FRAMED.turns(line["question"], line["persona"])], 6,
                           repetition_penalty=1.1)
        assert expected == [(line["answer"], line["ids"])]
    assert len({line["persona"] for line in written}) > 4


def test_prob_is_the_share_of_generated_tokens(small, made):
    """Recomputed with a hook on an unpatched model, by forward passes over the answers."""
    neurons = Neurons.load(made / "extraversion.safetensors", small.model)
    fired, tokens = torch.zeros(2, 2, 48), torch.zeros(2)
    for line in lines_of(made / "extraversion.answers.jsonl"):
        prompt = prompt_of(small, line["question"], line["persona"])
        seen, pole = [], POLES.index(line["pole"])
        hook = lambda module, args, output: seen.append(output[0, len(prompt):] > 0)  # noqa: E731, B023
        handles = [layer.mlp.gate_proj.register_forward_hook(hook) for layer in small.model.model.layers]
        small.model(input_ids=torch.tensor([prompt + line["ids"][:-1]]))
        for handle in handles:
            handle.remove()
        fired[pole] += torch.stack(seen).sum(1)
        tokens[pole] += len(line["ids"]) - 1
    assert (neurons.prob - fired / tokens[:, None, None]).abs().max() < 1.5 / tokens.min()  # one may lie on the edge
    assert (neurons.prob - fired / tokens[:, None, None]).abs().mean() < 1e-3


@pytest.mark.parametrize("where", ("generated", "all"))
def test_reading_answers_gives_the_same_as_generating_them(small, tmp_path, where):
    run(small, tmp_path / "a", where=where).identify()
    written = str(tmp_path / "a" / "extraversion.answers.jsonl")
    run(small, tmp_path / "b", where=where, answers=written, batch_size=5).identify()
    first, second = (Neurons.load(tmp_path / name / "extraversion.safetensors") for name in "ab")
    assert first.meta["tokens"] == second.meta["tokens"]
    least = min(first.meta["tokens"])
    assert (first.prob - second.prob).abs().max() < 1.5 / least and (first.prob != second.prob).float().mean() < 0.02
    for name in ("p50", "p95", "p99"):
        a, b = first.tensors[name].float(), second.tensors[name].float()
        assert ((a - b).abs() <= 0.05 * a).float().mean() > 0.98
    for name in ("mean", "variance"):
        assert torch.allclose(first.tensors[name], second.tensors[name], atol=1e-4, rtol=1e-3)
    ours, theirs = (lines_of(tmp_path / name / "extraversion.answers.jsonl") for name in "ab")
    assert ours == theirs


def test_where_all_counts_the_prompt_too(small, made, tmp_path):
    run(small, tmp_path, where="all").identify()
    both = [Neurons.load(folder / "extraversion.safetensors").meta["tokens"] for folder in (made, tmp_path)]
    prompts = [sum(len(prompt_of(small, line["question"], line["persona"]))
                   for line in lines_of(made / "extraversion.answers.jsonl") if line["pole"] == pole) for pole in POLES]
    assert both[1] == [a + b for a, b in zip(both[0], prompts)]


def test_answers_of_another_program(small, tmp_path):
    """Without ids the text is tokenised and taken as complete: an end token was chosen after it, and all of it was fed."""
    texts = [("high", "w20 w21 w22"), ("low", "w30"), ("high", "w40 w41")]
    asked = {"trait": "Extraversion", "persona": "w9", "question": "w10 ?"}
    lines = [{**asked, "pole": pole, "answer": text} for pole, text in texts]
    lines.append({**asked, "trait": "openness", "pole": "high", "answer": "w11"})
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    neurons = run(small, tmp_path, answers=str(tmp_path / "given.jsonl")).identify()
    assert neurons.meta["tokens"] == [5, 1]
    lines[0]["ids"], lines[1]["ids"] = [20, 21, 22, 23, 24, 25, 2], [500, 2]  # of another model's tokenizer
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(small, tmp_path, answers=str(tmp_path / "given.jsonl")).identify().meta["tokens"] == [5, 1]


@pytest.mark.parametrize("line, pattern", (
    ('{"trait": "extraversion", "pole": "up", "persona": "", "question": "", "answer": ""}', "line 2.*'up'"),
    ('{"trait": "extraversion", "pole": "low", "persona": "", "question": ""}', "line 2.*answer"),
    ('{"trait": "extraversion", "pole": "low", "persona": "", "question": "", "answer": "", "ids": [5, "6"]}', "line 2.*ids"),
    ('{"trait": "extraversion", "pole": "low", "persona": "", "question": "", "answer": "", "ids": 5}', "line 2.*ids"),
    ("nonsense", "line 2"), ("[]", "line 2.*object")))
def test_wrong_answers_name_file_and_line(small, tmp_path, line, pattern):
    good = {"trait": "extraversion", "pole": "low", "persona": "w9", "question": "w10 ?", "answer": "w11"}
    (tmp_path / "given.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"given.jsonl.*{pattern}"):
        run(small, tmp_path, answers=str(tmp_path / "given.jsonl"))
    with pytest.raises(UserError, match="no answers for openness.*extraversion"):
        (tmp_path / "given.jsonl").write_text(json.dumps(good) + "\n")
        run(small, tmp_path, "openness", answers=str(tmp_path / "given.jsonl"))


@contextlib.contextmanager
def each_batch(model, call):
    """call(number, rows) when the model begins to read the prompts of a batch."""
    number = itertools.count()

    def read(module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            call(next(number), len(kwargs["input_ids"]))

    handle = model.model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def stop_at(batch):
    """A Ctrl-C when that batch begins."""
    def call(number, rows):
        if number == batch:
            raise KeyboardInterrupt

    return call


def interrupted(small, out, batch, **options):
    with each_batch(small.model, stop_at(batch)), pytest.raises(KeyboardInterrupt, match="what was finished is kept"):
        run(small, out, **options).identify()


@pytest.fixture
def eager_saving(monkeypatch):
    """State is saved after every batch."""
    monkeypatch.setattr(identify.Run, "PAUSE", 0)


def test_finished_run_is_not_redone(small, made):
    before = contents(made), (made / "extraversion.safetensors").stat().st_mtime_ns
    with each_batch(small.model, lambda *_: pytest.fail("asked again")):
        run(small, made).identify()
    assert (contents(made), (made / "extraversion.safetensors").stat().st_mtime_ns) == before


@pytest.mark.parametrize("change", ({"seed": 1}, {"max_new_tokens": 5}, {"limit": 11}, {"where": "all"}))
def test_other_options_are_another_run(small, tmp_path, change):
    run(small, tmp_path).identify()
    before, key = contents(tmp_path), Neurons.load(tmp_path / "extraversion.safetensors").meta["key"]
    run(small, tmp_path, **change).identify()
    assert contents(tmp_path)["extraversion.safetensors"] != before["extraversion.safetensors"]
    assert list(contents(tmp_path, f"extraversion.{key}").values()) == list(before.values()), "what was there is kept"


def test_a_file_that_was_set_aside_comes_back(small, made, tmp_path):
    """With its trained edits, when it is asked for again: it is neither made anew nor written over."""
    add_trained(small.model, small.tokenizer, small.bench, run(small, tmp_path).identify())
    before, other = contents(tmp_path), run(small, tmp_path, seed=1)
    other.identify()
    there = contents(tmp_path)
    with each_batch(small.model, lambda *_: pytest.fail("asked again")):
        for expected in (before, there, before):
            found = run(small, tmp_path).identify() if expected is before else run(small, tmp_path, seed=1).identify()
            assert contents(tmp_path) == expected and bool(found.trained_key) == (expected is before)
            assert len([*tmp_path.iterdir()]) == 4
    (tmp_path / f"extraversion.{other.key}.safetensors").write_bytes(b"damaged")
    assert run(small, tmp_path, seed=1).identify().key == other.key and contents(tmp_path) == there


@pytest.mark.parametrize("next_seed", (0, 1, 2))
@pytest.mark.parametrize("moment", ("answers gone", "half set aside", "half brought back"))
def test_killed_while_files_change_places(small, tmp_path, moment, next_seed):
    """Neither of two files of other options, nor its answers, is lost to whoever comes next: one of them, or a third."""
    first, second = run(small, tmp_path), run(small, tmp_path, seed=1)
    first.identify()
    whole = [contents(tmp_path)]
    second.identify()
    whole.append(contents(tmp_path))
    file, answers = first.path, first.answers
    if moment == "answers gone":  # by hand: they are the larger file
        answers_path(tmp_path, f"extraversion.{first.key}").unlink()
    else:
        answers.rename(answers_path(tmp_path, f"extraversion.{second.key}"))
    if moment == "half brought back":
        file.rename(neuron_path(tmp_path, f"extraversion.{second.key}"))
        neuron_path(tmp_path, f"extraversion.{first.key}").rename(file)
    for seed in (next_seed, 0, 1, 0):
        run(small, tmp_path, seed=seed).identify()
        assert seed == 2 or contents(tmp_path) == whole[seed]


def test_two_runs_of_the_same_at_once(small, made, tmp_path, capsys):
    """The second waits, and finds all done."""
    first, second = run(small, tmp_path), threading.Thread(target=lambda: run(small, tmp_path).identify())

    def begin(number, rows):
        if number == 0:
            second.start()
            assert said_in_time(capsys, "another run makes it, this one waits")

    with each_batch(small.model, begin):
        first.identify()
        second.join()
    assert contents(tmp_path) == contents(made)
    assert {path.name for path in tmp_path.iterdir()} == set(contents(made))


def test_runs_of_other_options_at_once(small, made, tmp_path, monkeypatch):
    """The second comes while the first, whose neuron file is there, has yet to put its answers beside it."""
    first, other = run(small, tmp_path), run(small, tmp_path, seed=7)
    second, collect = threading.Thread(target=other.identify), first.collect_answers

    def meanwhile():
        second.start()
        second.join(1)  # it has long written its answers by then
        collect()

    monkeypatch.setattr(first, "collect_answers", meanwhile)
    assert first.identify().key == first.key
    second.join()
    assert list(contents(tmp_path, f"extraversion.{first.key}").values()) == list(contents(made).values()), "kept, with its own answers"
    run(small, tmp_path / "alone", seed=7).identify()
    assert contents(tmp_path) == contents(tmp_path / "alone")
    assert len([*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.jsonl")]) == 4


def test_a_file_that_is_replaced_while_it_is_looked_at(small, made, tmp_path, monkeypatch):
    """Nobody gets the neurons of other options in the place of those asked for."""
    first = run(small, tmp_path)
    there = first.identify()
    run(small, tmp_path, seed=7).identify()
    before = contents(tmp_path)
    monkeypatch.setattr(first, "file_there", lambda: there)
    with pytest.raises(UserError, match="replaced by a run of other options meanwhile: start it again"):
        first.identify()
    assert contents(tmp_path) == before


def test_identify_from_python(small, made, tmp_path):
    neurons = identify.identify(small.model, small.tokenizer, "Extraversion", bench=str(small.bench_dir), out=str(tmp_path),
                                max_new_tokens=6, batch_size=4)
    assert neurons.meta["tokens"] and contents(tmp_path) == contents(made)
    with pytest.raises(UserError, match="batchsize"):
        identify.identify(small.model, small.tokenizer, "extraversion", batchsize=4)


KILLS = """
import contextlib, io, json, os, signal, sys

import torch

torch.set_num_threads(1)
import identify
from personality.load import load_model
from personality.questions import load_bench

model_dir, bench_dir, out = sys.argv[1:4]
model, tokenizer = load_model(model_dir, "cpu", "float32")
bench = load_bench(bench_dir)
identify.Run.PAUSE = 0  # state is saved after every batch


def trap(owner, name, number, after):
    inner, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


def start(folder, *moment):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    with contextlib.redirect_stderr(io.StringIO()):
        if moment:
            trap({"os": os, "model": model.model}[moment[0]], *moment[1:])
        args = identify.parser().parse_args(["--out", folder, "--max-new-tokens", "6", "--batch-size", "4"])
        identify.Run(model, tokenizer, bench, "extraversion", args).identify()
    os._exit(0)


results = {"whole": start(f"{out}/whole")}
for moments in json.load(sys.stdin):
    name = "+".join(f"{where}.{number}.{after}" for _, where, number, after in moments)
    results[name] = [start(f"{out}/{name}", *moment) for moment in moments] + [start(f"{out}/{name}")]
print(json.dumps(results))
"""


def test_killed_at_any_moment_ends_with_the_same_files(small, tmp_path):
    """kill -9 before and after each file operation and in the middle of answers, also twice in a row."""
    moments = [[("os", "replace", n, after)] for n in range(1, 6) for after in (False, True)]
    moments += [[("os", "fsync", n, False)] for n in (1, 2, 3, 5, 9, 10)]
    moments += [[("model", "forward", n, False)] for n in (1, 4, 20, 33)]
    moments += [[("os", "replace", 1, True), ("model", "forward", 15, False)],
                [("os", "fsync", 4, True), ("os", "fsync", 1, True)]]
    result = subprocess.run([sys.executable, "-c", KILLS, small.model_dir, small.bench_dir, tmp_path], cwd=ROOT,
                            input=json.dumps(moments), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    results = json.loads(result.stdout)
    assert results.pop("whole") == 0 and len(results) == len(moments)
    expected = contents(tmp_path / "whole")
    assert expected["extraversion.answers.jsonl"].count(b"\n") == 24
    for name, codes in results.items():
        assert codes == [signal.SIGKILL] * (len(codes) - 1) + [0], name
        assert contents(tmp_path / name) == expected, name
        left = [path.name for path in (tmp_path / name).iterdir() if path.name.endswith((".part", ".state.safetensors"))]
        assert not left, name


def test_resumed_where_it_was(small, made, tmp_path, eager_saving):
    """Answers whose state was saved are not asked again."""
    interrupted(small, tmp_path, 3)
    batches = []
    with each_batch(small.model, lambda number, rows: batches.append(rows)):
        run(small, tmp_path).identify()
    assert batches == [4, 4, 4], "three of six were done"
    assert contents(tmp_path) == contents(made)


def test_damaged_state_is_from_the_beginning(small, made, tmp_path, eager_saving):
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-50]), lambda path: path.write_bytes(b""),
                   lambda path: save_file({"a": torch.zeros(1)}, path),
                   lambda path: path.with_name(path.name.replace("state.safetensors", "answers.part")).unlink()):
        interrupted(small, tmp_path, 2)
        damage(*tmp_path.glob(".extraversion.*.state.safetensors"))
        run(small, tmp_path).identify()
        assert contents(tmp_path) == contents(made)
        (tmp_path / "extraversion.safetensors").unlink()


def test_few_tokens_are_told_of(small, tmp_path, monkeypatch, capsys):
    run(small, tmp_path / "few", limit=4).identify()
    assert "tokens were counted under a pole, so neurons differ by chance" in capsys.readouterr().err
    for number, tokens in enumerate(([10, 5000], [5000, 10])):
        one_pole = run(small, tmp_path / str(number), limit=4)
        one_pole.compliance = lambda: {}
        one_pole.write(tokens, Neurons.load(tmp_path / "few" / "extraversion.safetensors").tensors)
        assert "only 10 tokens were counted under a pole" in capsys.readouterr().err
    monkeypatch.setattr(identify, "FEWEST", 2)
    run(small, tmp_path / "more", limit=4).identify()
    assert "by chance" not in capsys.readouterr().err


def test_interrupted_run_with_other_options_spares_what_is_finished(small, made, tmp_path):
    """Run, start one with another seed and interrupt it, run the first again: its answers are still its own."""
    run(small, tmp_path).identify()
    interrupted(small, tmp_path, 2, seed=1)
    run(small, tmp_path).identify()
    assert contents(tmp_path) == contents(made)


def short_of_memory(small, job, item, size, error=torch.OutOfMemoryError("CUDA out of memory"), interrupt_after=math.inf):
    """Do the job on a machine that has no room for `size` rows from the given item on; returns (items done, rows)
    of each batch."""
    sizes = []

    def begin(number, rows):
        sizes.append((job.done, rows))
        if job.done >= item and rows >= size:
            job.statistics.sites[0][0].add_(1)  # the batch was half done
            raise error
        if job.done >= interrupt_after:
            raise KeyboardInterrupt

    with each_batch(small.model, begin):
        job.identify()
    return sizes


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")))
def test_out_of_memory_halves_the_batch(small, made, tmp_path, eager_saving, error, capsys):
    sizes = short_of_memory(small, run(small, tmp_path), 8, 3, error)
    assert sizes == [(0, 4), (4, 4), (8, 4)] + [(done, 2) for done in range(8, 24, 2)]
    assert "out of memory" in capsys.readouterr().err
    neurons, whole = (Neurons.load(folder / "extraversion.safetensors") for folder in (tmp_path, made))
    assert neurons.meta["tokens"] == whole.meta["tokens"] and torch.equal(neurons.prob, whole.prob)
    assert lines_of(tmp_path / "extraversion.answers.jsonl") == lines_of(made / "extraversion.answers.jsonl")


def test_out_of_memory_then_killed_ends_the_same(small, tmp_path, monkeypatch):
    """The batch schedule is part of the state: when state was saved, and whether the run was killed, does not show."""
    results = {}
    for name, pause, stop in (("straight", 0, math.inf), ("killed after", 0, 14), ("killed before", 0, 4),
                              ("seldom saved", 1e9, math.inf)):
        monkeypatch.setattr(identify.Run, "PAUSE", pause)
        if stop < math.inf:
            with pytest.raises(KeyboardInterrupt):
                short_of_memory(small, run(small, tmp_path / name), 8, 3, interrupt_after=stop)
        short_of_memory(small, run(small, tmp_path / name), 8, 3)
        results[name] = contents(tmp_path / name)
    assert all(result == results["straight"] for result in results.values())


def test_a_batch_size_that_fits_is_remembered(small, tmp_path, eager_saving):
    """Also where a run goes on with more memory: what is in a batch shows in the last bits."""
    with pytest.raises(KeyboardInterrupt):
        short_of_memory(small, run(small, tmp_path), 8, 3, interrupt_after=14)
    assert short_of_memory(small, run(small, tmp_path), 99, 99) == [(done, 2) for done in range(14, 24, 2)]


def test_a_batch_of_one_that_is_too_large_says_so(small, tmp_path):
    with pytest.raises(UserError, match="out of memory with a batch of one: --max-new-tokens below 6"):
        short_of_memory(small, run(small, tmp_path), 0, 1)


def test_other_errors_are_not_taken_for_a_lack_of_memory(small, tmp_path):
    with pytest.raises(RuntimeError, match="shapes"):
        short_of_memory(small, run(small, tmp_path), 0, 1, RuntimeError("shapes do not match"))


@pytest.mark.parametrize("weight", ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"))
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_broken_weights_stop_with_their_layer(small, tmp_path, weight, value):
    broken = save_model(tmp_path / "model", **{f"model.layers.1.{weight}.weight": value})
    with pytest.raises(UserError, match=r"layer 1 gave NaN .* answers 1 to 4: try --dtype float32"):
        run(small, tmp_path, model=load_model(str(broken), "cpu", "float32")).identify()
    assert not (tmp_path / "extraversion.safetensors").exists()


def started(small, out):
    arguments = (*shared_flags(small), "--bench", small.bench_dir, "--trait", "extraversion", "--out", out,
                 "--batch-size", "1", "--max-new-tokens", "30")
    return subprocess.Popen([sys.executable, str(ROOT / "identify.py"), *map(str, arguments)], stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_until(condition, process):
    end = time.time() + 60
    while not condition():
        assert process.poll() is None and time.time() < end, process.stderr.read()
        time.sleep(0.01)


def answered(folder) -> int:
    """Bytes of answers that a run has written so far."""
    return sum(path.stat().st_size for path in folder.glob(".extraversion.*.answers.part"))


def test_control_c_while_answering(small, tmp_path):
    process = started(small, tmp_path)
    wait_until(lambda: answered(tmp_path), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error and "interrupted: what was finished is kept" in error


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_control_c_while_loading(small, tmp_path):
    process = started(small, tmp_path)
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error


def test_command_line_killed_and_repeated(small, tmp_path):
    """The whole command, killed from outside, and the same command again: as one that ran through."""
    process = started(small, tmp_path / "killed")
    wait_until(lambda: answered(tmp_path / "killed") > 2000, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "extraversion.safetensors").exists()
    again = started(small, tmp_path / "killed")
    output, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    assert str(tmp_path / "killed" / "extraversion.safetensors") in output.splitlines()[-1]
    run(small, tmp_path / "whole", batch_size=1, max_new_tokens=30).identify()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_answers_from_a_pipe_are_refused(monkeypatch, capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, error = exit_of(identify, monkeypatch, capsys, "--answers", tmp_path / "pipe")
    assert code == 2 and "is a pipe" in error
