"""A GGUF file is unpacked once, told from its like, and again where what is there is not whole."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from conftest import tiny
from personality import gguf
from personality.gguf import dequantised, is_whole
from personality.load import load_model


@pytest.fixture
def unpacked(small, monkeypatch, tmp_path):
    """dequantised() with a reader of files that hold any bytes: the small model. `made`: how often one was read."""
    monkeypatch.setattr(gguf, "cache_folder", lambda name: tmp_path / "cache" / name)
    (tmp_path / "cache" / "models").mkdir(parents=True)
    made, auto = [], transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained

    def read(where, gguf_file=None, **options):
        if gguf_file is None:
            return auto(where, **options)
        made.append(Path(where, gguf_file).read_bytes())
        model = tiny()
        with torch.no_grad():
            model.model.norm.weight.fill_(made[-1][-1])
        model.generation_config.eos_token_id = [2, 7]
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda where, gguf_file=None, **options: (
        tokenizer(small.model_dir) if gguf_file else tokenizer(where, **options)))
    return SimpleNamespace(made=made, cache=tmp_path / "cache" / "models")


def test_files_that_begin_alike_are_two_models(unpacked, tmp_path):
    """Fine-tunes of one model have the same metadata, the same size, and often the same name."""
    folders = []
    for folder, last in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.gguf").write_bytes(bytes(3 << 20) + bytes([last]))
        folders.append(dequantised(tmp_path / folder / "model.gguf"))
        assert load_model(str(tmp_path / folder / "model.gguf"), "cpu", "float32")[0].model.norm.weight[0].item() == last
    assert folders[0] != folders[1] and len(unpacked.made) == 2, "each is unpacked once"


def test_files_that_differ_in_the_middle_are_two_models(unpacked, tmp_path):
    """As fine-tunes of some layers do, or another conversion."""
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.gguf").write_bytes(bytes(2 << 20) + bytes([number]) + bytes(2 << 20))
    assert dequantised(tmp_path / "a" / "model.gguf") != dequantised(tmp_path / "b" / "model.gguf")


@pytest.mark.parametrize("damage", (lambda folder: os.truncate(folder / "model.safetensors", 5000), lambda folder: (folder / "tokenizer.json").unlink(),
                                    lambda folder: (folder / gguf.SIZES).unlink(), lambda folder: (folder / gguf.SIZES).write_text("{")),
                         ids=("weights cut", "no tokenizer", "no sizes", "sizes damaged"))
def test_what_is_not_whole_is_unpacked_again(unpacked, tmp_path, damage):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    folder = dequantised(tmp_path / "model.gguf")
    assert is_whole(folder) and dequantised(tmp_path / "model.gguf") == folder and len(unpacked.made) == 1
    damage(folder)
    assert not is_whole(folder) and dequantised(tmp_path / "model.gguf") == folder and is_whole(folder) and len(unpacked.made) == 2
    assert [path.name for path in unpacked.cache.iterdir()] == [folder.name], "nothing is left beside it"


def test_end_tokens_of_a_gguf_file_are_kept(unpacked, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert load_model(str(tmp_path / "model.gguf"), "cpu", "float32")[0].generation_config.eos_token_id == [2, 7]


def test_two_that_unpack_one_file_at_once(unpacked, tmp_path, monkeypatch):
    """Who comes second takes what the first has made; and a full disk is said, and leaves nothing."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    folder = dequantised(tmp_path / "model.gguf")
    monkeypatch.setattr(gguf, "is_whole", lambda folder: False)
    monkeypatch.setattr(gguf.shutil, "rmtree", lambda path, rmtree=gguf.shutil.rmtree, **options: path == folder or rmtree(path, **options))
    assert dequantised(tmp_path / "model.gguf") == folder
    assert [path.name for path in unpacked.cache.iterdir()] == [folder.name]

    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        dequantised(tmp_path / "other.gguf")
    assert [path.name for path in unpacked.cache.iterdir()] == [folder.name]
