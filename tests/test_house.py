"""The house: modules import only what stands below them, functions fit a screen, a script's --help answers at once."""

import ast
import sys
from pathlib import Path

import pytest

from conftest import ROOT, command
from personality import __version__

# From low to high: a module may import only those that stand before it. The README draws the same.
ROOMS = ("terminal", "store", "world", "op", "mlp", "calls", "rows", "observe", "steer", "gguf", "frame", "model", "load", "questions", "neurons", "estimates", "methods",
         "endpoint", "judges", "doses", "train", "baselines", "capability", "results", "grid", "report", "write_bench", "bake", "chat",
         "places", "attention", "inflight", "api", "people", "vllm", "answering", "serve")
SCRIPTS = {"identify": 400, "induce": 350, "evaluate": 450}
FILES = [ROOT / f"{name}.py" for name in SCRIPTS] + sorted((ROOT / "personality").glob("*.py"))
HEAVY = {"torch", "transformers", "numpy", "pandas", "scipy", "matplotlib", "datasets", "safetensors", "rich", "tqdm"}


def imports_of(path: Path, top_only: bool = False) -> set[str]:
    """The modules that a file imports, wherever in it or (top_only) when it is imported; of the package as "personality.NAME"."""
    tree, found = ast.parse(path.read_text()), set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "personality" + (f".{node.module}" if node.module else "") if node.level else node.module
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "personality" else {base}
    return found


def test_every_room_has_its_place():
    assert {path.stem for path in (ROOT / "personality").glob("*.py")} == {*ROOMS, "__init__"}
    readme = (ROOT / "README.md").read_text().partition("## The house")[2].partition("## ")[0].split()
    places = [readme.index(room) for room in ROOMS]
    assert places == sorted(places), "the README draws another order"


@pytest.mark.parametrize("room", ("__init__", *ROOMS))
def test_a_room_imports_only_lower_ones(room):
    """So there is no cycle; what `import personality` itself runs stands below all rooms."""
    known, order = imports_of(ROOT / "personality" / f"{room}.py"), ("__init__", *ROOMS)
    above = [other for other in order[order.index(room):] if f"personality.{other}" in known]
    assert not above, f"{room} imports {above}"
    assert not known & set(SCRIPTS), "a module imports a script"


def test_the_version_is_one():
    assert f'version="{__version__}",' in (ROOT / "setup.py").read_text()


def test_mlp_knows_nothing_of_generate():
    text = (ROOT / "personality" / "mlp.py").read_text()
    assert "personality.rows" not in imports_of(ROOT / "personality" / "mlp.py") and ".generate" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= SCRIPTS.get(path.stem, 350)
    assert max(map(len, text.splitlines())) <= 132
    long = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60}
    assert not long


def test_csrc_is_no_longer_than_it_was():
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "csrc").iterdir()) <= 1113


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script, monkeypatch, capsys):
    """What stands above a script's last flag needs nothing but the standard library."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    run = next(node for node in tree.body if isinstance(node, ast.If))
    early = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno < run.lineno]
    names = {alias.name for node in early if isinstance(node, ast.Import) for alias in node.names} | {
        node.module for node in early if isinstance(node, ast.ImportFrom)}
    assert names <= {"argparse", "os", "personality", "personality.terminal"}
    for room in ("__init__", "terminal"):
        top = {name.split(".")[0] for name in imports_of(ROOT / "personality" / f"{room}.py", top_only=True)} - {"personality"}
        assert not top & HEAVY and top <= sys.stdlib_module_names


def test_help_answers():
    result = command("identify.py", "--help")
    assert result.returncode == 0 and "python identify.py" in result.stdout and "--trait" in result.stdout


def test_the_package_gives_functions_where_modules_have_their_names():
    import personality
    import personality.steer  # noqa: F401
    from personality import observe, steer

    assert callable(steer) and callable(observe) and personality.steer is steer
    assert set(personality.__all__) > {"load_model", "observe", "steer", "Neurons", "npti", "TRAITS"}
    with pytest.raises(AttributeError, match="nothing_like_it"):
        personality.nothing_like_it
