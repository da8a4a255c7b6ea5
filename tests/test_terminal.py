"""The command lines: errors of one line, exit codes, help at once."""

import os
import subprocess
import sys
import time
import types

import pytest
import torch

import evaluate
import identify
import induce
from conftest import ROOT, command, exit_of, shared_flags
from personality import TRAITS
from personality.neurons import Neurons
from personality.terminal import UserError, script, show_table

SCRIPTS = {"identify.py": identify, "induce.py": induce, "evaluate.py": evaluate}


def one_line(script, monkeypatch, capsys, *arguments) -> str:
    """The only line that a script says, with exit code 2."""
    code, error = exit_of(SCRIPTS[script], monkeypatch, capsys, *arguments)
    assert code == 2 and len(error.splitlines()) == 1 and error.startswith("error:"), error
    return error


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_trait_lists_the_five(script, monkeypatch, capsys):
    alpha = ["--alpha", "1"] if script == "induce.py" else []
    error = one_line(script, monkeypatch, capsys, "--trait", "charisma", *alpha)
    assert all(text in error for text in ("charisma", *TRAITS))


@pytest.mark.parametrize("arguments, expected", (
    (("induce.py", "--trait", "openness", "--alpha", "nan"), "alpha"),
    (("induce.py", "--trait", "openness", "--alpha", "strong"), "alpha"),
    (("induce.py", "--trait", "openness", "--alpha", "1", "--alpha", "2"), "alpha"),
    (("induce.py", "--trait", "openness"), "alpha"),
    (("induce.py", "--trait", "openness", "--trait", "openness", "--alpha", "1"), "openness"),
    (("induce.py", "--trait", "openness", "--alpha", "1", "--questions", "/none/such.txt"), "/none/such.txt"),
    (("induce.py", "--trait", "openness", "--alpha", "1", "--out", "a.jsonl"), "--questions"),
    (("induce.py", "--trait", "openness", "--alpha", "1", "--keep", "0"), "keep"),
    (("evaluate.py", "--alpha", "-1"), "alpha"),
    (("evaluate.py", "--alpha", "inf"), "alpha"),
    (("evaluate.py", "--bench", "/none/such"), "/none/such"),
    (("evaluate.py", "--method", "magic"), "magic"),
    (("identify.py", "--bench", "/none/such"), "/none/such"),
    (("identify.py", "--limit", "0"), "limit"),
    (("identify.py", "--build-bench", "bench", "--trait", "openness"), "--trait"),
    (("identify.py", "--answers", "a.jsonl", "--limit", "4"), "--limit"),
    (("identify.py", "--device", "cpux"), "cpux"),
    (("identify.py", "--device", "cuda:x"), "cuda:x"),
    (("identify.py", "--device", "meta"), "meta"),
    (("evaluate.py", "--seed", "-1"), "seed"),
    (("identify.py", "--answers", "/none/such.jsonl"), "/none/such.jsonl"),
    (("identify.py", "--nonsense"), "--nonsense"),
    (("identify.py", "--model", "/none/such.gguf"), "/none/such.gguf"),
    (("identify.py", "--model", "/none/such"), "/none/such")))
def test_wrong_arguments_are_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in one_line(*arguments[:1], monkeypatch, capsys, *arguments[1:])
    assert not list(tmp_path.iterdir())


def test_wrong_files_are_one_line(small, made, tmp_path, monkeypatch, capsys):
    """What shows only when the model is loaded: another model's neuron file, a damaged one, answers that are not JSON."""
    (tmp_path / "given.jsonl").write_text("high: I love parties\n")
    base = (*shared_flags(small), "--trait", "extraversion")
    error = one_line("identify.py", monkeypatch, capsys, *base, "--answers", tmp_path / "given.jsonl", "--out", tmp_path)
    assert "given.jsonl" in error
    neurons = Neurons.load(made / "extraversion.safetensors")
    foreign = {**neurons.meta, "model": "somebody/else", "fingerprint": "1x1-0"}
    Neurons(neurons.tensors, foreign).save(tmp_path / "extraversion.safetensors")
    error = one_line("induce.py", monkeypatch, capsys, *base, "--alpha", "1", "--neurons", tmp_path)
    assert "somebody/else" in error and str(small.model_dir) in error


def test_damaged_gguf_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    code, error = exit_of(induce, monkeypatch, capsys, "--trait", "openness", "--alpha", "1", "--model", tmp_path / "model.gguf")
    assert code == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("error:") and "model.gguf" in error.splitlines()[-1]


def test_exit_codes(monkeypatch, capsys):
    """Of the whole command, in a process of its own: an error of the user's, and none."""
    result = command("induce.py", "--trait", "charisma", "--alpha", "1")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error:") and len(result.stderr.splitlines()) == 1
    for raised, code, words in ((KeyboardInterrupt("x is kept"), 130, "interrupted: x is kept"),
                                (KeyboardInterrupt(), 130, "interrupted\n"),
                                (UserError("of \x1b[31mred\x9b\r ones"), 2, "error: of \\x1b[31mred\\x9b ones"),
                                (OSError(28, "No space left on device", "/a/b"), 2, "/a/b: No space left on device"),
                                (UserError("two\nlines"), 2, "error: two lines"), (None, 0, "")):
        module = types.ModuleType("fake_script")

        def main(args, raised=raised):
            if raised:
                raise raised

        module.main = main
        monkeypatch.setitem(sys.modules, "fake_script", module)
        with pytest.raises(SystemExit) as ended:
            script(lambda: None, "fake_script")
        error = capsys.readouterr().err
        assert ended.value.code == code and words in error and "Traceback" not in error


def script_of(main, **streams):
    """(exit code, stderr or None) of script() with a main() of these lines, in a process whose streams hold what is not flushed."""
    code = ("import sys, types; from personality.terminal import UserError, script\ndef main(args):\n"
            + "".join(f"    {line}\n" for line in main)
            + "sys.modules['fake_script'] = types.SimpleNamespace(main=main); script(lambda: None, 'fake_script')")
    without = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, env=without, **streams) as process:
        return process.wait(60), process.stderr and process.stderr.read()


def test_what_is_still_to_be_written_has_its_exit_code():
    """Python writes it at its end, and would say so in its own way."""
    read, gone = os.pipe()
    os.close(read)
    assert script_of(["print('a')"], stdout=gone, stderr=subprocess.PIPE) == (141, "")
    assert script_of(["print('a')", "raise UserError('x')"], stdout=gone, stderr=subprocess.PIPE) == (2, "error: x\n")
    os.close(gone)
    with open("/dev/full", "w") as full:
        assert script_of(["raise UserError('x')"], stderr=full) == (2, None)
        code, said = script_of(["print('a')"], stdout=full, stderr=subprocess.PIPE)
        assert code == 2 and said.startswith("error: No space left") and len(said.splitlines()) == 1


@pytest.mark.parametrize("gone", ("stdout", "stderr"))
def test_a_reader_that_has_gone_is_no_success(gone):
    """What `head` has cut off may be what the command was to make."""
    code = ("import sys, types; from personality.terminal import script, show_table\n"
            "def main(args):\n    while True:\n        show_table('t', ('a',), [['b']]) if sys.argv[1] == 'stdout' else print('a', file=sys.stderr)\n"
            "sys.modules['fake_script'] = types.SimpleNamespace(main=main); script(lambda: None, 'fake_script')")
    with subprocess.Popen([sys.executable, "-c", code, gone], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        stream, other = (process.stdout, process.stderr)[::1 if gone == "stdout" else -1]
        stream.readline()
        stream.close()
        assert "Traceback" not in other.read() and process.wait(60) == 141


def test_an_environment_without_a_package(monkeypatch, capsys):
    def main(args):
        import no_such_package  # noqa: F401

    monkeypatch.setitem(sys.modules, "fake_script", types.SimpleNamespace(main=main))
    with pytest.raises(SystemExit) as ended:
        script(lambda: None, "fake_script")
    assert ended.value.code == 2 and "has no module no_such_package: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                                   RuntimeError("unable to mmap 9 bytes from file <a>: Cannot allocate memory (12)")))
def test_out_of_memory_is_one_line(monkeypatch, capsys, error):
    def main(args):
        raise error

    monkeypatch.setitem(sys.modules, "fake_script", types.SimpleNamespace(main=main))
    with pytest.raises(SystemExit) as ended:
        script(lambda: None, "fake_script")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: out of memory (") and "): a smaller --batch-size" in said
    assert str(error) in said and len(said.splitlines()) == 1


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def main(args):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setitem(sys.modules, "fake_script", types.SimpleNamespace(main=main))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        script(lambda: None, "fake_script")


def test_a_notebooks_backend_of_pictures(monkeypatch, tmp_path):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    result = command("evaluate.py", "--compare", tmp_path / "a", tmp_path / "b")
    assert result.returncode == 2 and result.stderr.startswith("error:") and len(result.stderr.splitlines()) == 1


def test_closed_streams(monkeypatch):
    """A service may have none of the three: what is said goes nowhere, and there is nothing to read."""
    def main(args):
        assert sys.stdout.write("a") == sys.stderr.write("b") == 1 and not sys.stdin.read()

    monkeypatch.setitem(sys.modules, "fake_script", types.SimpleNamespace(main=main))
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        script(lambda: None, "fake_script")
    assert ended.value.code == 0


def test_tables_take_text_as_text(capsys):
    show_table("[red]t[/red]", ("[b]a", "b"), [["[/bold]x", "1"], ["\x1b[2J\x07", "2"]])
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown and "\\x07" in shown and "\x1b" not in shown and "\x07" not in shown
    assert "[red]t[/red]" in shown and "[b]a" in shown and "[/bold]x" in shown


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_at_once(name):
    """The best of three, since the machine may be busy."""
    times = []
    for _ in range(3):
        start = time.time()
        result = command(name, "--help")
        times.append(time.time() - start)
        assert result.returncode == 0 and f"python {name}" in result.stdout and "--trait" in result.stdout
    assert min(times) < 1


def test_help_loads_nothing_heavy():
    """Neither torch nor what comes with it; that of all scripts in one process."""
    code = ("import sys, runpy, contextlib, io; sys.path.insert(0, '.')\n"
            "for name in sys.argv[1:]:\n"
            "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
            "        sys.argv = [name, '--help']; runpy.run_path(name, run_name='__main__')\n"
            "print({'torch', 'transformers', 'numpy', 'pandas', 'safetensors', 'rich', 'tqdm'} & set(sys.modules))")
    result = subprocess.run([sys.executable, "-c", code, *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "set()\n" and result.stderr == ""
