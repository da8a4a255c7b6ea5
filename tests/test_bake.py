"""Personalities folded into plain checkpoints: exactly the live edit, in transformers alone."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import evaluate
import induce
from conftest import FRAMED, ROOT, Server, main_of, prompts, shared_flags, tiny
from personality import Character, NeuronFolder, Neurons, Profile, UserError, bake, load_model, steer
from personality.bake import Baking
from personality.methods import Profiles
from personality.mlp import find_mlps
from personality.model import fingerprint
from personality.store import lock_of, only_run
from personality.terminal import DTYPES

FAMILIES = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {"tie_word_embeddings": True}}


def edits(seed=0, raised=9, removed=5, biased=4, residual=False, width=48, depth=2):
    """Some neurons of each kind, none twice."""
    generator = torch.Generator().manual_seed(seed)
    layers, indices, values = [], [], []
    for layer in range(depth):
        index = torch.randperm(width, generator=generator)[:raised + removed + biased + layer]  # layers of unlike numbers
        value = torch.tensor([math.inf, 1.0, 0.0, 0.0]).repeat(len(index), 1)
        value[:raised, 2] = torch.rand(raised, generator=generator) + 0.2
        value[raised:raised + removed, 1] = 0
        value[raised + removed:, 3] = torch.rand(biased + layer, generator=generator)
        layers.append(torch.full((len(index),), layer)), indices.append(index), values.append(value)
    vectors = {1: torch.randn(32, generator=generator)} if residual else {}
    return Profile(torch.cat(layers), torch.cat(indices), torch.cat(values), "some", vectors)


def both(model, baked, profile):
    batch = prompts()
    with torch.no_grad():
        with steer(model, profile, where="all"):
            live = model(**batch).logits
        plain, ours = model(**batch).logits, baked(**batch).logits
    real = batch["attention_mask"].bool()
    return live[real], ours[real], plain[real]


def saved(model, profile, folder, **options):
    folder.mkdir()
    baking = Baking(model, profile, options.pop("rank", None))
    baking.save(folder, **options)
    return baking, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_baked_is_live(family, residual, tmp_path):
    model = tiny(family, **FAMILIES[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    profile = edits(residual=residual)
    baking, baked = saved(model, profile, tmp_path / "baked")
    live, ours, plain = both(model, baked, profile)
    assert (live - plain).abs().max() > 1 and (live - ours).abs().max() < 1e-3
    assert type(baked).__name__ == "LlamaForCausalLM" and baking.width == baked.config.intermediate_size == 256
    config = json.loads((tmp_path / "baked" / "config.json").read_text())
    assert config["mlp_bias"] is True and config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is (family == "qwen2")


def test_a_model_with_biases_in_its_mlp(tmp_path):
    model = tiny("llama", mlp_bias=True, attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    live, ours, plain = both(model, saved(model, edits(), tmp_path / "baked")[1], edits())
    assert (live - plain).abs().max() > 1 and (live - ours).abs().max() < 1e-3


def test_removed_neurons_make_room(tmp_path):
    profile = edits(raised=5, removed=8)
    baking, baked = saved(tiny(), profile, tmp_path / "baked")
    assert baking.width == 48 == baked.config.intermediate_size, "no neuron had to be added"
    live, ours, _ = both(tiny(), baked, profile)
    assert (live - ours).abs().max() < 1e-3
    assert "+0.00% FLOPs" in baking.cost()


@pytest.mark.parametrize("rank", (1, 3, 9, 40))
def test_rank_keeps_the_best_part(rank, tmp_path):
    """The added neurons' map is as near to the sum of the raises as any of that rank (Eckart and Young)."""
    model, profile = tiny(), edits(removed=0, biased=0)
    profile = Profile(profile.layer[:9], profile.index[:9], profile.value[:9], "one layer")
    baking, baked = saved(model, profile, tmp_path / "baked", rank=rank)
    mlp = model.model.layers[0].mlp
    index, shift = profile.index, profile.value[:, 2]
    whole = (mlp.down_proj.weight[:, index] * shift) @ mlp.up_proj.weight[index]
    new = baked.model.layers[0].mlp
    act = torch.nn.functional.silu(new.gate_proj.bias[48:])
    low = (new.down_proj.weight[:, 48:] * act) @ new.up_proj.weight[48:]
    singular = torch.linalg.svdvals(whole)
    assert torch.allclose((whole - low).norm(), singular[rank:].norm(), atol=1e-4)
    assert int((new.gate_proj.bias != 0).sum()) == min(rank, 9)


def test_shards_hold_the_same(tmp_path):
    model, profile = tiny("qwen2", tie_word_embeddings=False), edits()
    saved(model, profile, tmp_path / "one")
    saved(model, profile, tmp_path / "many", shard=40_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == {path.name for path in files}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in whole.values())


def test_no_more_memory_than_a_shard_and_a_layer(tmp_path):
    """Beyond the model, whose own weights the system maps from disk."""
    config = transformers.LlamaConfig(vocab_size=128, hidden_size=512, intermediate_size=2048, num_hidden_layers=16,
                                      num_attention_heads=4)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    shard, watch = 24 * 2**20, """
import re, sys, threading, time
from pathlib import Path
sys.path[:0] = [%r, %r]
import torch, transformers
from test_bake import edits
from personality.bake import Baking
anonymous = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
baking, most, folder = Baking(model, edits(width=2048, depth=16)), [0], Path(sys.argv[2])
def look():
    while True:
        most[0] = max(most[0], anonymous())
        time.sleep(0.002)
baking.layer(0)  # what is loaded on first use
before = anonymous()
threading.Thread(target=look, daemon=True).start()
baking.save(folder, shard=int(sys.argv[3]))
print(most[0] - before, 3 * baking.width * 512 * 4, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
""" % (str(ROOT), str(ROOT / "tests"))
    (tmp_path / "baked").mkdir()
    command = [sys.executable, "-c", watch, tmp_path / "source", tmp_path / "baked", str(shard)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    more, layer, whole = map(int, result.stdout.split())
    assert more < shard + layer + 8 * 2**20 < whole / 3


def test_bfloat16_rounds_once(tmp_path):
    """The activation of an added neuron is divided out as the model computes it, rounding included."""
    model, profile = tiny().to(torch.bfloat16), edits(biased=0)
    folder = tmp_path / "baked"
    folder.mkdir()
    Baking(model, profile).save(folder)
    baked = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    live, ours, plain = both(model, baked, profile)
    assert (live - ours).float().abs().max() < 0.05 * (live - plain).float().abs().max()
    shift = torch.zeros(2, 48)
    shift[0, :10] = torch.linspace(0.1, 2, 10)
    made = Baking(model, Profile.dense(shift=shift)).layer(0)
    act = torch.nn.functional.silu(torch.tensor([bake.GATE_BIAS], dtype=torch.bfloat16)).float()
    assert act != torch.nn.functional.silu(torch.tensor([bake.GATE_BIAS])), "rounded"
    expected = (model.model.layers[0].mlp.down_proj.weight[:, :10].float() * shift[0, :10] / act).bfloat16()
    assert torch.equal(made["down_proj.weight"][:, made["gate_proj.bias"] == bake.GATE_BIAS], expected)


@pytest.mark.parametrize("family, options, pattern", (
    ("gemma2", {}, "gemma2 can't be baked: expected one of llama, mistral, qwen2"),
    ("phi3", {}, "phi3 can't be baked"),
    ("mistral", {"sliding_window": 8}, "mistral with a sliding window of 8"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "qwen2 with a sliding window of 8")))
def test_what_cannot_be_baked(family, options, pattern):
    with pytest.raises(UserError, match=pattern):
        Baking(tiny(family, **options), edits())


def test_a_cap_cannot_be_baked():
    profile = edits()
    profile.value[3, 0] = 0
    with pytest.raises(UserError, match="a cap of 0 can't be folded"):
        Baking(tiny(), profile)


# ------------------------------------------------------------------------------------------------------ command line


def command(small, several, *more):
    few = () if "--method" in more else ("--min-neurons", "12")
    return (*shared_flags(small), "--neurons", several, *few, *more)


def baked_by(small, several, monkeypatch, folder, *more):
    main_of(induce, monkeypatch, *command(small, several, "--trait", "extraversion", "--alpha", "2", "--save", folder, *more))


@pytest.mark.parametrize("more", (
    (), ("--method", "dpn-le"), ("--method", "activation"), ("--suppress", "none"), ("--rank", "64")))
def test_saved_and_verified(small, several, monkeypatch, tmp_path, capsys, more):
    baked_by(small, several, monkeypatch, tmp_path / "baked", "--verify", *more)
    said = capsys.readouterr()
    assert "baked against live" in said.out and "--where all" in said.err and "FLOPs a token" in said.err
    assert ("suppressed neurons" in said.err) == ("--method" not in more), "NPTI's"
    names = {path.name for path in (tmp_path / "baked").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md",
            "verify.json"} <= names
    assert not [path for path in tmp_path.iterdir() if path.name != "baked"], "nothing else is left"
    card = (tmp_path / "baked" / "README.md").read_text()
    assert fingerprint(small.model) in card and "extraversion +2" in card
    method = more[1] if more[:1] == ("--method",) else "npti"
    assert ("NPTI" in card) == (method == "npti") and (f"A personality ({method}) folded" in card) == (method != "npti")
    assert ("raised" in card or "removed" in card) <= (method == "npti"), "the others raise and remove nothing"
    assert "`mlp_bias`.\n\nIt was found" in card and "anyone.\n\n| |" in card, "paragraphs are apart"
    baked_by(small, several, monkeypatch, tmp_path / "baked", *more)  # its own kind may be written over


def test_the_card_has_the_frame_of_the_neuron_files(small, several, monkeypatch, tmp_path):
    """Not the one in which questions would be put now."""
    baked_by(small, several, monkeypatch, tmp_path / "baked", "--frame", "none")
    assert f'questions with the system prompt "{FRAMED.system}"' in (tmp_path / "baked" / "README.md").read_text()


def test_licences_come_along(small, several, monkeypatch, tmp_path, capsys):
    """From the model's directory, or from the hub; where there is no network, it says so, and bakes."""
    (tmp_path / "LICENSE.txt").write_text("do as you like")
    asked = []
    model = load_model(str(small.model_dir), "cpu", "float32")[0]
    model.name_or_path = str(tmp_path)
    assert [path.name for path in bake.licences(model)] == ["LICENSE.txt"]
    model.name_or_path = "some/model"
    monkeypatch.setattr(bake, "snapshot_download", lambda name, **options: asked.append((name, options)) or tmp_path)
    assert [path.name for path in bake.licences(model)] == ["LICENSE.txt"]
    assert asked[0][0] == "some/model" and "LICENSE*" in asked[0][1]["allow_patterns"], "no weights are downloaded"
    (tmp_path / "LICENSE.txt").unlink(), (tmp_path / "LICENSES").mkdir()
    assert bake.licences(model) == [] and "there is none beside it" in capsys.readouterr().err, "as a cache without network says"
    monkeypatch.setattr(bake, "snapshot_download", lambda name, **options: 1 / 0)
    assert bake.licences(model) == [] and "(division by zero): add it yourself" in capsys.readouterr().err


def damaged(folder, factor):
    """A checkpoint whose down projections are not what was written."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * (factor if name.endswith("down_proj.weight") else 1) for name, tensor in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype, factors", (("fp32", (1.01,)), ("bf16", (1.05, math.nan)), ("fp16", (1.05, math.nan))))
def test_verify_fails_where_it_should(small, several, monkeypatch, tmp_path, capsys, dtype, factors):
    """The weights' rounding is allowed for, more than that is not."""
    folder = tmp_path / "baked"
    baked_by(small, several, monkeypatch, folder, "--verify", "--dtype", dtype)
    assert f"{DTYPES[dtype]} weights" in capsys.readouterr().out
    whole = (folder / "model.safetensors").read_bytes()
    for factor in factors:
        model, tokenizer = load_model(str(small.model_dir), "cpu", DTYPES[dtype])
        profiles = Profiles(model, tokenizer, NeuronFolder(model, str(several)), (0.1, 12), "zero")
        damaged(folder, factor)
        with pytest.raises(UserError, match="baked and live differ by"):
            bake.verify(model, tokenizer, profiles.of(Character({"extraversion": 2.0})), folder, exact=True)
        (folder / "model.safetensors").write_bytes(whole)


def test_save_fails_where_its_verification_does(small, several, monkeypatch, tmp_path):
    """Here the live model computes something else than its weights say. What was written is left for a look at it."""
    flags = command(small, several, "--trait", "extraversion", "--alpha", "2", "--save", tmp_path / "baked", "--verify")
    monkeypatch.setattr(sys, "argv", ["induce.py", *map(str, flags)])
    model, tokenizer = load_model(str(small.model_dir), "cpu", "float32")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.01)
    profiles = Profiles(model, tokenizer, NeuronFolder(model, str(several)), (0.1, 12), "zero")
    with pytest.raises(UserError, match="baked and live differ by"):
        bake.bake(model, tokenizer, profiles, Character({"extraversion": 2.0}), induce.arguments())
    assert (tmp_path / "baked" / "model.safetensors").exists()


def test_a_rank_that_leaves_something_out(small, several, monkeypatch, tmp_path, capsys):
    """--verify tells how much, and does not fail; a server is asked for what was written, not for the live edit."""
    pytest.importorskip("openai")
    folder = tmp_path / "baked"
    baked_by(small, several, monkeypatch, folder, "--rank", "1", "--suppress", "none", "--verify")
    assert "--rank leaves a part out" in capsys.readouterr().out
    baked, tokenizer = load_model(str(folder), "cpu", "float32")
    expected = json.loads((folder / "verify.json").read_text())["expected"]
    assert expected
    for probe in expected:
        assert tokenizer.decode(bake.probe(baked, tokenizer, probe["question"])[1], skip_special_tokens=True) == probe["text"]
    (folder / "verify.json").write_text(json.dumps({"expected": []}))
    with pytest.raises(UserError, match="nothing can tell"):
        main_of(induce, monkeypatch, "--save", folder, "--verify-server", "http://127.0.0.1:9")


@pytest.mark.parametrize("flags, pattern", (
    (("--where", "generated"), "can't be had with --where generated"), (("--keep", "0.9"), "can't be had with --keep"),
    (("--suppress", "cap"), "can't be had with --suppress cap"),
    (("--chat",), "--chat: not allowed with argument --save"),
    (("--questions", "q.txt"), "--questions: not allowed with argument --save")))
def test_what_baking_cannot_express(small, several, monkeypatch, tmp_path, flags, pattern):
    with pytest.raises(UserError, match=pattern):
        baked_by(small, several, monkeypatch, tmp_path / "baked", *flags)


def test_something_else_is_not_overwritten(small, several, monkeypatch, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for verified in ("", "{}", "[]", "no JSON"):
        if verified:
            (tmp_path / "verify.json").write_text(verified)
        with pytest.raises(UserError, match="did not write: thesis.txt" if not verified else "did not write"):
            baked_by(small, several, monkeypatch, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    folder = tmp_path / "baked"
    baked_by(small, several, monkeypatch, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "LICENSE").write_text("added by hand")
    with pytest.raises(UserError, match="did not write: LICENSE"):
        baked_by(small, several, monkeypatch, folder)
    (folder / "LICENSE").unlink()
    work = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: 1 / 0 if Path(b) == folder and not str(a).endswith(".replaced") else work(a, b))
    with pytest.raises(ZeroDivisionError):
        baked_by(small, several, monkeypatch, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "the old one or the new one, never half of one"


def test_something_that_comes_meanwhile_is_not_overwritten(small, several, monkeypatch, tmp_path):
    folder, work = tmp_path / "baked", bake.probes
    for left in (".baked.unfinished", ".baked.notes"):  # the first of a run that was killed
        (tmp_path / left).mkdir()
        (tmp_path / left / "model.safetensors").write_bytes(b"half")

    def meanwhile(*arguments):
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        return work(*arguments)

    with monkeypatch.context() as busy:
        busy.setattr(bake, "probes", meanwhile)
        with pytest.raises(UserError, match="did not write: thesis.txt"):
            baked_by(small, several, monkeypatch, folder)
    assert {path.name for path in tmp_path.iterdir()} == {"baked", ".baked.notes"}
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_killed_between_two_checkpoints(small, several, monkeypatch, tmp_path):
    """The old one has been moved away, the new one is not there yet: the next run brings the old one back before it begins."""
    baked_by(small, several, monkeypatch, tmp_path / "baked")
    before = (tmp_path / "baked" / "verify.json").read_bytes()
    (tmp_path / "baked").rename(tmp_path / ".baked.replaced")
    monkeypatch.setattr(Baking, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        baked_by(small, several, monkeypatch, tmp_path / "baked")
    assert [path.name for path in tmp_path.iterdir()] == ["baked"] and (tmp_path / "baked" / "verify.json").read_bytes() == before


def test_one_run_saves_at_a_time(small, several, monkeypatch, tmp_path):
    with only_run(lock_of(tmp_path / "baked")), pytest.raises(UserError, match="another run is writing it"):
        baked_by(small, several, monkeypatch, tmp_path / "baked")
    assert not list(tmp_path.iterdir())


def test_the_folder_one_is_in_is_not_replaced(small, several, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="of its own"):
        baked_by(small, several, monkeypatch, ".")


def test_a_baked_directory_is_a_model(small, several, monkeypatch, tmp_path):
    """identify, induce and evaluate take it as --model; and its neurons are not those of the base model's file."""
    baked_by(small, several, monkeypatch, tmp_path / "baked")
    model, tokenizer = load_model(str(tmp_path / "baked"), "cpu", "float32")
    assert len(find_mlps(model)) == 2 and tokenizer.chat_template == small.tokenizer.chat_template
    with pytest.raises(UserError, match="was made with"):
        Neurons.load(several / "extraversion.safetensors", model)


def test_evaluated_by_the_base_model(small, several, monkeypatch, tmp_path):
    """In float32 a baked checkpoint writes what the live edit writes, and with one judge for both it scores the same."""
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", several, "--trait", "extraversion", "--alpha", "2",
            "--save", tmp_path / "baked")  # with as many neurons as evaluate.py edits
    flags = ("--trait", "extraversion", "--alpha", "2", "--limit", "4", "--max-new-tokens", "5", "--dtype", "fp32",
             "--device", "cpu")
    live = ("--model", small.model_dir, "--neurons", several, "--suppress", "zero", "--where", "all",
            "--method", "unedited", "npti")
    main_of(evaluate, monkeypatch, *flags, *live, "--out", tmp_path / "live")
    baked = ("--model", tmp_path / "baked", "--judge-model", small.model_dir, "--method", "unedited")
    main_of(evaluate, monkeypatch, *flags, *baked, "--out", tmp_path / "results")
    summary_of = lambda name: json.loads((tmp_path / name / "summary.json").read_text())  # noqa: E731
    rows = {name: {row["method"]: row for row in summary_of(name) if row["pole"] != "low"} for name in ("live", "results")}
    for name in ("mean", "perplexity", "repetition"):
        assert rows["results"]["unedited"][name] == pytest.approx(rows["live"]["npti"][name], abs=1e-5)
    assert abs(rows["live"]["npti"]["mean"] - rows["live"]["unedited"]["mean"]) > 1e-3, "the edit did something"
    assert "judged by" in json.loads((tmp_path / "results" / "details.json").read_text())["head"]


def test_a_server_is_checked(small, several, monkeypatch, tmp_path, capsys):
    pytest.importorskip("openai")
    baked_by(small, several, monkeypatch, tmp_path / "baked")
    expected = json.loads((tmp_path / "baked" / "verify.json").read_text())["expected"]
    check = lambda server: main_of(induce, monkeypatch, "--save", tmp_path / "baked", "--verify-server", server.url)  # noqa: E731
    with Server(lambda n, body: expected[n - 1]["text"]) as server:
        check(server)
    number, prompts_asked = len(expected), [body["prompt"] for body in server.seen]
    assert prompts_asked == [one["prompt"] for one in expected], "as token ids"
    assert number > 3 and f"{number} of {number} answers begin as they should" in capsys.readouterr().out
    with Server(lambda n, body: "something else" if n == 1 else expected[n - 1]["text"]) as server:
        check(server)
    assert f"{number - 1} of {number} answers begin as they should; rounding" in capsys.readouterr().out
    assert number % 2 == 0, "so that half of them is a number"
    with (Server(lambda n, body: "something else" if n % 2 else expected[n - 1]["text"]) as server,
          pytest.raises(UserError, match=f"{number // 2} of {number} answers begin")):
        check(server)
    with (Server(lambda n, body: expected[n - 1]["without biases"]) as server,
          pytest.raises(UserError, match="without the biases of the MLPs: this engine drops them")):
        check(server)
    with (Server(lambda n, body: "something else") as server,
          pytest.raises(UserError, match="0 of . answers begin .* another model")):
        check(server)
    with Server(lambda n, body: (400, "")) as server, pytest.raises(UserError, match="BadRequest"):
        check(server)
    for text, why in ((None, f": .*{tmp_path}"), ("{}", ", but one of another form$"), ('{"expected": [1]}', ", but one of another form$")):
        if text:
            (tmp_path / "verify.json").write_text(text)
        with pytest.raises(UserError, match=f"holds no verify.json that this version wrote{why}"):
            main_of(induce, monkeypatch, "--save", tmp_path, "--verify-server", "http://127.0.0.1:9")
