"""The neuron file: what it holds, and what is refused."""

import json
import os
import re
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import lines_of, tiny
from personality import POLES
from personality.model import fingerprint
from personality.neurons import FORMAT, NeuronFolder, Neurons, show_folder, show_neurons
from personality.store import lock_of, only_run
from personality.terminal import UserError


def test_neuron_file_holds_all_of_both_poles(small, made):
    answers = lines_of(made / "extraversion.answers.jsonl")
    with safe_open(made / "extraversion.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        meta = json.loads(file.metadata()["neurons"])
    assert set(tensors) == {"prob", "p50", "p95", "p99", "mean", "variance"}
    assert all(tensor.shape == (2, 2, 48) and tensor.isfinite().all() for tensor in tensors.values())
    prob, p50, p95, p99 = (tensors[name].float() for name in ("prob", "p50", "p95", "p99"))
    assert ((0 <= prob) & (prob <= 1)).all() and 0.05 < prob.mean() < 0.95 and (tensors["variance"] >= 0).all()
    assert (p50 <= p95 * 1.001).all() and (p95 <= p99 * 1.001).all() and ((p50 > 0) == (prob > 0.5)).float().mean() > 0.95
    assert meta["format"] == FORMAT and meta["trait"] == "extraversion" and meta["where"] == "generated"
    assert meta["model"] == str(small.model_dir) and meta["fingerprint"] == fingerprint(small.model)
    assert meta["seed"] == 0 and meta["max_new_tokens"] == 6 and meta["questions"] == 12
    assert meta["bench"] == str(small.bench_dir)
    assert meta["template"] and meta["bench_fingerprint"] and meta["dtype"] == "float32" and "revision" in meta
    assert meta["tokens"] == [sum(len(line["ids"]) - 1 for line in answers if line["pole"] == pole) for pole in POLES]
    assert not [path for path in made.iterdir() if path.name.startswith(".")], "state is left behind"


@pytest.mark.parametrize("pole", POLES)
def test_only_neurons_that_fire_more_often_are_selected(made, pole):
    """However many are asked for: of a pole's neurons, never one that fires more often under the other."""
    neurons, k = Neurons.load(made / "extraversion.safetensors"), POLES.index(pole)
    layer, index, delta, p95 = neurons.select(pole, min_neurons=10 ** 6)
    more = neurons.prob[k] > neurons.prob[1 - k]
    assert 0 < len(layer) == int(more.sum()) < more.numel() and more[layer, index].all()
    assert torch.equal(p95, neurons.p95[k][layer, index]) and torch.equal(delta, delta.sort(descending=True).values)


def test_a_poles_neurons_by_default():
    """Those at 0.1 or more; and of all that are known, where these are fewer, NPTI's share: 2,000 of Llama-3-8B's 458,752."""
    prob = torch.zeros(2, 2, 5000, dtype=torch.float64)
    prob[0, 0, :3000] = torch.linspace(0.09, 0.01, 3000)
    neurons = Neurons({"prob": prob, "p95": torch.ones(2, 2, 5000), "variance": torch.ones(2, 2, 5000)}, {})
    assert len(neurons.select("high")[0]) == round(10_000 * 2000 / 458_752) == 44 and not len(neurons.select("low")[0])
    prob[0, 1, :100] = 0.1
    assert len(neurons.select("high")[0]) == 100, "0.1 is enough"
    prob[0, 1, :100], neurons.tensors["variance"][:, :, 2500:] = 0, 0
    neurons.tensors["seen"] = torch.ones(2, 2, 5000, dtype=torch.int32)
    assert len(neurons.select("high")[0]) == 22, "half of them are experts' that saw too few tokens"


def test_table_that_is_shown(made, capsys):
    show_neurons(Neurons.load(made / "extraversion.safetensors"))
    text = capsys.readouterr().out
    assert "high" in text and "low" in text and "tokens" in text and "extraversion" in text


@pytest.mark.parametrize("depth, picture", ((2, "█" * 2), (30, "█" * 15), (80, "█" * 20)))
def test_a_table_is_whole_in_a_narrow_terminal(made, tmp_path, monkeypatch, capsys, depth, picture):
    """80 columns: no cell that one reads as a whole is cut or broken; of 80 layers the picture has four a bar."""
    monkeypatch.setenv("COLUMNS", "80")
    neurons = Neurons.load(made / "extraversion.safetensors")
    deep = {name: tensor.repeat(1, depth // 2, 1) for name, tensor in neurons.tensors.items()}
    deep["prob"] = torch.full_like(deep["prob"], 0.5)
    deep["prob"][0, :, 39], deep["prob"][1, :, 1] = 1, 1  # one neuron a layer and pole
    show_neurons(replace(neurons, tensors=deep, meta={**neurons.meta, "tokens": [18_123_456, 18_123_457]}))
    lines = capsys.readouterr().out.splitlines()
    for pole, tokens, index in (("high", "18,123,456", 39), ("low", "18,123,457", 1)):
        row = next(line for line in lines if line.startswith(f" {pole} "))
        assert f" {tokens} " in row and f".{index}: 0.50, " in row and f" {picture} " in row
    assert any("layer.index: delta, p95" in line for line in lines)
    for name in ("conscientiousness", "conscientiousness.0123456789abcdef"):
        (tmp_path / f"{name}.safetensors").write_bytes((made / "extraversion.safetensors").read_bytes())
    show_folder(str(tmp_path))
    lines, tokens = capsys.readouterr().out.splitlines(), sum(neurons.meta["tokens"])
    assert sum(f" {tokens:,} " in line and re.search(r" 20\d\d-\d\d-\d\d ", line) is not None for line in lines) == 2
    assert sum(line.startswith(" conscientiousness ") for line in lines) == 2
    assert sum(line.startswith(" .0123456789abcdef ") for line in lines) == 1


def test_neurons_of_another_model_are_refused(small, made, tmp_path):
    other = tiny(intermediate_size=40)
    other.source = "the-other"
    with pytest.raises(UserError, match=f"{small.model_dir}.*the-other"):
        Neurons.load(made / "extraversion.safetensors", other)
    other = tiny()
    with torch.no_grad():  # of the same shape
        other.model.layers[0].mlp.gate_proj.weight.neg_()
    other.source = "its-twin"
    with pytest.raises(UserError, match=f"{small.model_dir}.*its-twin"):
        Neurons.load(made / "extraversion.safetensors", other)
    for name in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):  # fine-tuned
        other = tiny()
        with torch.no_grad():
            weight = other.model.layers[1].get_submodule(name).weight
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with pytest.raises(UserError, match="was made with"):
            Neurons.load(made / "extraversion.safetensors", other)
    assert Neurons.load(made / "extraversion.safetensors", tiny().bfloat16()).meta["trait"] == "extraversion"


def test_a_file_of_another_shape_is_damaged(small, made, tmp_path):
    """Whatever its fingerprint says: format 1 has no digest of its content."""
    neurons = Neurons.load(made / "extraversion.safetensors")
    meta = {"neurons": json.dumps({**neurons.meta, "format": 1})}
    save_file({name: tensor[:, :, :4].contiguous() for name, tensor in neurons.tensors.items()}, tmp_path / "a.safetensors", meta)
    with pytest.raises(UserError, match="damaged: it is of .2, 4. layers and neurons, the model of .2, 48."):
        Neurons.load(tmp_path / "a.safetensors", small.model)


def test_a_file_that_may_not_be_read_is_there(made, monkeypatch):
    """safetensors says of both that there is no such file."""
    def refused(*_):
        raise FileNotFoundError

    monkeypatch.setattr("personality.neurons.safe_open", refused)
    with pytest.raises(UserError, match="it may not be read"):
        Neurons.load(made / "extraversion.safetensors")
    with pytest.raises(UserError, match="no such neuron file"):
        Neurons.load(made / "other.safetensors")


def test_files_that_are_no_neuron_file(made, tmp_path):
    path, good = tmp_path / "extraversion.safetensors", (made / "extraversion.safetensors").read_bytes()
    neurons = Neurons.load(made / "extraversion.safetensors")

    def fails(pattern):
        with pytest.raises(UserError, match=f"extraversion.safetensors.*{pattern}") as error:
            Neurons.load(path)
        assert "\n" not in str(error.value).strip()

    fails("no such neuron file.*identify.py")
    for data in (good[:-100], good[:100], good[:4], b"", b"\xff" * 200, b'{"high": []}'):
        path.write_bytes(data)
        fails("not a whole safetensors file")
    save_file({"a": torch.zeros(3)}, path)
    fails("not a neuron file")
    save_file({"a": torch.zeros(3)}, path, metadata={"neurons": "{"})
    fails("not a")
    save_file(neurons.tensors, path, metadata={"neurons": json.dumps({**neurons.meta, "format": 99})})
    fails(f"expected format {FORMAT} or 1, got 99")
    Neurons({name: tensor for name, tensor in neurons.tensors.items() if name != "p95"}, neurons.meta).save(path)
    fails("expected .*p95")
    Neurons({**neurons.tensors, "p95": torch.zeros(2, 2, 47)}, neurons.meta).save(path)
    fails("one shape")
    path.unlink()
    path.mkdir()
    fails("")


@pytest.mark.parametrize("contents", (None, [1], {"key": "x"}, {"key": ["k", "d"]}))
def test_what_a_file_says_of_its_contents_is_not_believed(made, tmp_path, contents):
    neurons = Neurons.load(made / "extraversion.safetensors")
    neurons.meta |= {"contents": contents, "key": "my own", "format": 1}
    save_file(neurons.tensors, tmp_path / "a.safetensors", metadata={"neurons": json.dumps(neurons.meta)})
    neurons = Neurons.load(tmp_path / "a.safetensors")
    neurons.save(tmp_path / "b.safetensors")
    assert neurons.key == Neurons.load(tmp_path / "b.safetensors").key == "my own"
    neurons.tensors["prob"].mul_(0.5)
    neurons.save(tmp_path / "c.safetensors")
    assert neurons.key == Neurons.load(tmp_path / "c.safetensors").key != "my own"
    assert b"contents" not in (tmp_path / "c.safetensors").read_bytes()


@pytest.mark.parametrize("name", ("model", "bench", "questions", "max_new_tokens", "seed", "tokens"))
def test_a_file_that_lacks_what_is_shown_of_it(made, tmp_path, capsys, name):
    """--list says so in its place, and goes on."""
    neurons = Neurons.load(made / "extraversion.safetensors")
    Neurons(neurons.tensors, {key: value for key, value in neurons.meta.items() if key != name}).save(tmp_path / "a.safetensors")
    shutil.copy(made / "extraversion.safetensors", tmp_path / "b.safetensors")
    (tmp_path / ".extraversion.0123.state.safetensors").write_bytes(b"of a run that goes on")
    (tmp_path / "c.safetensors").symlink_to("as if a run were just replacing it")
    show_folder(str(tmp_path))
    text = "".join(capsys.readouterr().out.split())
    assert ".0123" not in text and "c.safetensors:nosuchneuronfile" in text
    assert f"its{name}can'tberight" in text and "12questions" in text


def test_who_adds_to_a_file_waits_for_who_replaces_it(made, tmp_path):
    path, errors = tmp_path / "extraversion.safetensors", []
    shutil.copy(made / "extraversion.safetensors", path)
    mine, others = Neurons.load(path), Neurons.load(path)
    others.meta["key"] = "other"

    def add():
        try:
            mine.save_over()
        except UserError as error:
            errors.append(str(error))

    with only_run(lock_of(path)):
        adds = threading.Thread(target=add)
        adds.start()
        adds.join(0.3)
        others.save(path)
    adds.join()
    assert "was replaced while its edits were trained" in errors[0] and Neurons.load(path).key == "other"


def test_neuron_files_survive_save_and_load(made, tmp_path):
    neurons = Neurons.load(made / "extraversion.safetensors")
    neurons.save(tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == (made / "extraversion.safetensors").read_bytes()


def test_files_of_format_1_still_load(small, made, tmp_path):
    """They have no digest; what is saved again has one."""
    neurons = Neurons.load(made / "extraversion.safetensors")
    meta = {name: value for name, value in neurons.meta.items() if name != "digest"} | {"format": 1}
    save_file(neurons.tensors, tmp_path / "old.safetensors", metadata={"neurons": json.dumps(meta)})
    old = Neurons.load(tmp_path / "old.safetensors", small.model)
    assert all(torch.equal(old.tensors[name], neurons.tensors[name]) for name in neurons.tensors)
    old.save(tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").read_bytes() == (made / "extraversion.safetensors").read_bytes()


def test_a_folder_notices_that_a_file_was_replaced(small, made, tmp_path):
    path = tmp_path / "extraversion.safetensors"
    shutil.copy(made / "extraversion.safetensors", path)
    folder = NeuronFolder(small.model, str(tmp_path))
    neurons = folder["extraversion"]
    folder.check_unchanged()
    Neurons(neurons.tensors, {**neurons.meta, "key": "another"}).save(path)
    with pytest.raises(UserError, match="was replaced while this ran"):
        folder.check_unchanged()
    with pytest.raises(UserError, match="no such neuron file"):
        folder["openness"]


def test_a_file_that_was_altered_has_another_key(small, made, tmp_path):
    """Else what was answered before would be taken for its answers. Trained edits, which are added, leave the statistics' key."""
    path = tmp_path / "extraversion.safetensors"
    shutil.copy(made / "extraversion.safetensors", path)
    folder = NeuronFolder(small.model, str(tmp_path))
    neurons, mine, first = folder["extraversion"], Neurons.load(path), Neurons.load(path).key
    place, more = torch.tensor([[0, 3]], dtype=torch.int32), {f"{pole}_bias": torch.ones(1) for pole in POLES}
    more |= {"dose": torch.ones(2, 1, 4), **{f"{pole}_place": place.clone() for pole in POLES}}
    Neurons({**neurons.tensors, **more}, {**neurons.meta, "trained": "some"}).save(str(path))
    edited = Neurons.load(path)
    assert (edited.key, edited.trained_key) == (first, "some")
    with pytest.raises(UserError, match="was replaced while this ran"):
        folder.check_unchanged()
    edited.tensors["high_bias"] = 2 * edited.high_bias
    edited.save(path)
    assert edited.key == first and edited.trained_key not in ("", "some") and Neurons.load(path).trained_key == edited.trained_key
    edited.tensors["prob"] = edited.prob.flip(0).contiguous()
    edited.save(path)
    assert Neurons.load(path).key == edited.key != first
    with pytest.raises(UserError, match="was replaced while this ran"):
        folder.check_unchanged()
    with pytest.raises(UserError, match="was replaced while its edits were trained"):
        mine.path = str(path)
        mine.save_over()
    assert repr(edited) == f"Neurons({str(made / 'extraversion.safetensors').replace(str(made), str(tmp_path))!r}: extraversion, 2 x 48)"


def test_a_pipe_in_the_folder_is_no_neuron_file(made, tmp_path, capsys):
    os.mkfifo(tmp_path / "openness.safetensors")
    shutil.copy(made / "extraversion.safetensors", tmp_path)
    show_folder(str(tmp_path))
    assert "extraversion" in (shown := capsys.readouterr().out) and "openness" not in shown
    with pytest.raises(UserError, match="a pipe"):  # and does not wait for a writer
        Neurons.load(tmp_path / "openness.safetensors")
