"""A .gguf file's weights as a directory that transformers loads."""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import transformers

from .store import cache_folder, name_beside
from .terminal import UserError, say

SIZES = "sizes.json"  # of a folder's other files, by name


def sizes_of(folder: Path) -> dict:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*")) if file.name != SIZES}


def is_whole(folder: Path) -> bool:
    """Whether it holds what it held when it was written."""
    try:
        return json.loads((folder / SIZES).read_text()) == sizes_of(folder)
    except (OSError, ValueError):
        return False


def dequantised(path: Path) -> Path:
    """The directory of a .gguf file's weights in float32. Unpacking takes some 20 s, so it is kept in the cache, by a digest of the
    file, which is read whole for that each time."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):  # of all: a fine-tune may differ in some layers only
            whole.update(part)
    directory = cache_folder("models") / f"{path.stem}-{path.stat().st_size}-{whole.hexdigest()[:12]}"
    if is_whole(directory):
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    say(f"unpacking {path.name} (once) ...")
    where, options = str(path.parent), {"gguf_file": path.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        if hasattr(transformers, "GgufConfig"):  # newer versions can leave weights packed
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            packed = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    except Exception as error:  # the reader of a damaged file fails in many ways
        raise UserError(f"{path}: not a GGUF file that transformers {transformers.__version__} reads: {error}") from error
    # saved from a plain model of the same configuration: a model that was loaded from GGUF refuses to be saved
    config = packed.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    plain = type(packed)(type(packed.config).from_dict(config))
    plain.load_state_dict(packed.state_dict())
    plain.generation_config = packed.generation_config
    temporary = name_beside(directory)
    try:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / SIZES).write_text(json.dumps(sizes_of(temporary)))
        os.replace(temporary, directory)
    except OSError:
        if not directory.exists():  # where another run was first, it is
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory
