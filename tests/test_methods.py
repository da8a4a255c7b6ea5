"""From neurons to edits: NPTI, composition, DPN-LE, activation addition; released files; whole characters and profile files."""

import itertools
import json
import math
import shutil

import pytest
import torch

import induce
from conftest import FRAMED, lines_of, little_room, main_of, prompt_of, shared_flags, tiny
from personality import POLES, Character, Neurons, Released, UserError, composed, dpn_le, npti, steer
from personality.chat import converse
from personality.frame import conversation
from personality.methods import Profiles, activation_addition, mean_difference, pull, restricted, suppressed, trained
from personality.mlp import decoder_of, find_mlps
from personality.model import answers
from personality.neurons import NeuronFolder
from personality.steer import Profile

DEPTH, WIDTH = 2, 48


def random_neurons(trait, seed, shape=(DEPTH, WIDTH)):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand((2, *shape), generator=generator)  # noqa: E731
    tensors = {"prob": draw(), "p50": draw() / 2, "p95": draw(), "p99": 1 + draw(),
               "mean": draw() - 0.5, "variance": 0.1 + draw()}
    return Neurons(tensors, {"trait": trait, "key": f"{trait}{seed}"})


def same(a: Profile, b: Profile) -> bool:
    return all(torch.equal(x, y) for x, y in ((a.layer, b.layer), (a.index, b.index), (a.value, b.value)))


# ------------------------------------------------------------------------------------------------------------------ NPTI


@pytest.mark.parametrize("alpha", (1.5, -0.6))
def test_npti_edits_are_the_papers(alpha):
    """The opposite pole capped at 0, the target pole raised by alpha * p95 / (1 + exp(-10 (delta - 0.15)))."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(2, 3, 40, generator=generator) for name in ("prob", "p50", "p95", "p99", "mean", "variance")}
    ours = npti(Neurons(tensors, {"trait": "openness"}), alpha)
    k = 0 if alpha > 0 else 1
    expected = {}
    for layer, index in itertools.product(range(3), range(40)):
        delta = float(tensors["prob"][k, layer, index] - tensors["prob"][1 - k, layer, index])
        if delta >= 0.1:
            shift = abs(alpha) * float(tensors["p95"][k, layer, index]) / (1 + math.exp(-10 * (delta - 0.15)))
            expected[layer, index] = [math.inf, 1.0, pytest.approx(shift, rel=1e-5), 0.0]
        elif -delta >= 0.1:
            expected[layer, index] = [0.0, 1.0, 0.0, 0.0]
    assert dict(zip(zip(ours.layer.tolist(), ours.index.tolist()), ours.value.tolist())) == expected


def test_limits_are_of_both_poles():
    neurons = random_neurons("openness", 0)
    delta = neurons.prob[0] - neurons.prob[1]
    capped, raised = (npti(neurons, 1.0, *limits).value[:, 0].isinf().int().bincount().tolist() for limits in ((0.3, 0), (2.0, 5)))
    assert capped == [int((-delta >= 0.3).sum()), int((delta >= 0.3).sum())] and raised == [5, 5]


def test_suppression():
    value = torch.tensor([[0.0, 1, 0, 0], [math.inf, 1, 0.5, 0]])
    profile = Profile(torch.tensor([0, 1]), torch.tensor([2, 3]), value, "p")
    assert suppressed(profile, "cap") is profile
    zero, none = suppressed(profile, "zero"), suppressed(profile, "none")
    assert zero.value.tolist() == [[math.inf, 0, 0, 0], [math.inf, 1, 0.5, 0]] and none.layer.tolist() == [1]
    assert profile.value[0, 0] == 0, "the profile itself stays as it was"
    both = Profile(torch.tensor([0]), torch.tensor([2]), torch.tensor([[0.0, 1, 0.5, 0]]), "p")
    assert suppressed(both, "none").value.tolist() == [[math.inf, 1, 0.5, 0]], "capped for one trait, raised for another"


# ----------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("alpha", (1.5, -0.7))
def test_one_trait_alone_is_npti(alpha):
    neurons = random_neurons("openness", 0)
    others = [(random_neurons("neuroticism", 1), 0.0)]
    assert same(composed([(neurons, alpha)]), npti(neurons, alpha))
    assert same(composed([(neurons, alpha), *others]), npti(neurons, alpha))
    assert len(composed(others)) == len(composed([])) == 0


def test_order_does_not_matter():
    parts = [(random_neurons(trait, seed), alpha) for seed, (trait, alpha) in enumerate(
        (("extraversion", 2.0), ("neuroticism", -1.0), ("openness", 0.5), ("agreeableness", -1.5)))]
    first = composed(parts)
    assert all(same(first, composed(list(some))) for some in itertools.permutations(parts))
    first = dpn_le(parts, min_effect=0.01)
    assert all(same(first, dpn_le(list(some), min_effect=0.01)) for some in itertools.permutations(parts))


def test_each_trait_keeps_its_own_strength():
    """The whole edit's projection on a trait's pull is what that trait's edit alone has; added up naively it is not."""
    parts = [(random_neurons("extraversion", 3), 1.0), (random_neurons("neuroticism", 4), -1.1)]
    parts[1][0].tensors["prob"] = 0.7 * parts[0][0].prob.flip(0) + 0.3 * parts[1][0].prob  # E+ with N-
    units = [pull(neurons, math.copysign(1, alpha)) for neurons, alpha in parts]
    assert (units[0] * units[1]).sum() > 0.3 * (units[0] ** 2).sum(), "they overlap"
    profile, total = composed(parts), torch.zeros(DEPTH, WIDTH, dtype=torch.float64)
    raised = profile.value[:, 2] > 0
    assert torch.equal(profile.value[~raised, 0], torch.zeros(int((~raised).sum()))) and profile.value[raised, 0].isinf().all()
    gram = torch.tensor([[(a * b).sum() for b in units] for a in units])
    strengths = torch.linalg.solve(gram, gram.diagonal() * torch.tensor([1.0, 1.1], dtype=torch.float64))
    assert (strengths > 0).all() and (strengths < torch.tensor([1.0, 1.1])).all(), "traits that help each other are weakened"
    total = strengths[0] * units[0] + strengths[1] * units[1]
    for unit, alpha in zip(units, (1.0, 1.1)):
        assert (total * unit).sum() == pytest.approx(alpha * (unit ** 2).sum().item(), rel=1e-6)
    shift = torch.zeros(DEPTH, WIDTH, dtype=torch.float64)
    shift[profile.layer, profile.index] = profile.value[:, 2].double()
    assert torch.allclose(shift, total.clamp(min=0), atol=1e-4)


def test_a_neuron_has_one_edit():
    """Capped for one trait and raised for the other: the stronger pull decides, and not both happen."""
    parts = [(random_neurons("extraversion", 5), 1.0), (random_neurons("neuroticism", 6), 1.0)]
    profile = composed(parts)
    assert len(torch.stack([profile.layer, profile.index], 1).unique(dim=0)) == len(profile)
    capped, raised = profile.value[:, 0] == 0, profile.value[:, 2] > 0
    assert not (capped & raised).any() and (capped | raised).all() and capped.any() and raised.any()


def test_strengths_stay_within_bounds():
    """Two traits that are all but the same: no strength explodes or turns round."""
    neurons = random_neurons("extraversion", 7)
    twin = Neurons({**neurons.tensors, "p95": neurons.p95 * 1.001}, {"trait": "neuroticism", "key": ""})
    total = composed([(neurons, 1.0), (twin, 1.0)]).value[:, 2].sum()
    assert 0.9 < total / npti(neurons, 1.0).value[:, 2].sum() < 1.1
    against = composed([(neurons, 1.0), (twin, -0.999)])
    assert against.value[:, 2].max() <= 4 * npti(neurons, 1.0).value[:, 2].max()


@pytest.mark.parametrize("size, alpha, at_bound", ((3.0, 1.0, 0.0), (1.0, -1.0, 2.0)))
def test_strengths_are_the_best_within_bounds(size, alpha, at_bound):
    """As scipy's solver has them: a trait that a stronger one brings along is left out, those that fight go no further than twice."""
    from scipy.optimize import lsq_linear

    first, other = random_neurons("extraversion", 7), random_neurons("neuroticism", 8)
    other.tensors.update(prob=0.9 * first.prob + 0.1 * other.prob, p95=size * first.p95)
    units = torch.stack([pull(neurons, sign).flatten() for neurons, sign in ((first, 1.0), (other, alpha))])
    gram = units @ units.T
    root = torch.linalg.cholesky(gram)
    best = lsq_linear(root.T.numpy(), torch.linalg.solve(root, gram.diagonal()).numpy(), (0, 2), tol=1e-12).x
    assert best[0] == pytest.approx(at_bound, abs=1e-4)
    profile, shift = composed([(first, 1.0), (other, alpha)]), torch.zeros(DEPTH, WIDTH, dtype=torch.float64)
    shift[profile.layer, profile.index] = profile.value[:, 2].double()
    expected = (torch.from_numpy(best)[:, None] * units).sum(0).clamp(min=0).view(DEPTH, WIDTH)
    assert expected.max() > 0.5 and torch.allclose(shift, expected, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- DPN-LE


def test_dpn_le_is_the_papers():
    shape = (8, 400)
    neurons = random_neurons("openness", 8, shape)
    difference = neurons.mean[0] - neurons.mean[1]
    effect = difference.abs() / ((neurons.variance[0] + neurons.variance[1]) / 2).sqrt()
    chosen = {(layer, j) for layer in range(3, 8) for j in range(400)
              if abs(difference[layer, j]) > difference[layer].abs().quantile(0.995) and effect[layer, j] >= 0.9}
    profile = dpn_le([(neurons, -2.0)], min_effect=0.9)
    assert set(zip(profile.layer.tolist(), profile.index.tolist())) == chosen and 3 < len(chosen) < 5 * 3
    assert torch.allclose(profile.value[:, 3], -2 * difference[profile.layer, profile.index], rtol=1e-5)
    assert torch.equal(profile.value[:, :3], torch.tensor([math.inf, 1.0, 0.0]).expand(len(profile), 3)), "after the product"
    weights = dpn_le([(neurons, -2.0)], weighted=True, min_effect=0.9).value[:, 3] / profile.value[:, 3]
    order = effect[profile.layer, profile.index].argsort()
    assert torch.allclose(weights[order], torch.linspace(0.75, 1, len(chosen)), atol=1e-5)
    assert len(dpn_le([])) == len(dpn_le([(neurons, 0.0)], min_effect=99)) == 0
    largest = max(float(effect[layer, j]) for layer in range(3, 8) for j in range(400)
                  if abs(difference[layer, j]) > difference[layer].abs().quantile(0.995))
    assert largest < effect.max()
    with pytest.raises(UserError, match=f"no neuron of openness has an effect of 99 .*that it takes the largest is {largest:.3f}"):
        dpn_le([(neurons, 1.0)], min_effect=99)


def test_dpn_le_of_several_traits_adds_up():
    parts = [(random_neurons(trait, seed, (8, 400)), alpha) for trait, seed, alpha in (("openness", 8, -2.0), ("extraversion", 9, 1.0))]

    def biases(parts):
        profile, result = dpn_le(parts), torch.zeros(8, 400)
        result[profile.layer, profile.index] = profile.value[:, 3]
        return result

    both = [biases([part]) for part in parts]
    assert all(bias.any() for bias in both) and torch.allclose(biases(parts), sum(both), atol=1e-6)


def test_dpn_le_takes_its_share_of_the_neurons_that_are_known():
    """Experts that saw few tokens have zeros, which are no small differences."""
    neurons = random_neurons("openness", 8, (8, 400))
    wider = {name: torch.nn.functional.pad(tensor, (0, 400)) for name, tensor in neurons.tensors.items()}
    wider["seen"] = (wider["variance"] > 0).int() * 900
    assert same(dpn_le([(neurons, 1.0)]), dpn_le([(Neurons(wider, neurons.meta), 1.0)]))


def test_dpn_le_edits_the_product(small):
    """Through the op, as a hook that adds to down_proj's input does it."""
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(WIDTH, generator=generator)
    profile = Profile(torch.ones(WIDTH, dtype=torch.long), torch.arange(WIDTH),
                      torch.stack([torch.full((WIDTH,), math.inf), torch.ones(WIDTH), torch.zeros(WIDTH), bias], 1))
    ids = torch.randint(9, 90, (2, 7), generator=generator)
    with torch.no_grad(), steer(small.model, profile, where="all"):
        ours = small.model(input_ids=ids).logits
    hook = small.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] + bias,))
    try:
        with torch.no_grad():
            assert torch.allclose(ours, small.model(input_ids=ids).logits, atol=1e-4)
    finally:
        hook.remove()


# ---------------------------------------------------------------------------------------------- activation addition


def test_activation_addition_equals_a_hook(small):
    layer, vector = 1, torch.randn(32, generator=torch.Generator().manual_seed(3))
    asked = [conversation("w10 w11 ?"), conversation("w12 ?"), conversation("w13 w14 w15 ?")]
    answer = lambda some: answers(small.model, small.tokenizer, some, 6)  # noqa: E731
    plain = answer(asked)
    with steer(small.model, [activation_addition([({layer: vector}, alpha)]) for alpha in (2.0, -2.0)], [1, 0, 2]):
        mixed = answer(asked)
    assert answer(asked) == plain and mixed[1] == plain[1] and mixed[0] != plain[0]

    def add(sign, first):  # "generated": not in the prompt's pass, which is the longer one
        return lambda module, args, output: output + sign * 2.0 * vector if output.shape[1] == 1 else output

    for row, sign in ((0, 1), (2, -1)):
        hook = small.model.model.layers[layer].register_forward_hook(add(sign, row))
        try:
            assert answer([asked[row]]) == [mixed[row]]
        finally:
            hook.remove()
    assert activation_addition([({layer: vector}, 0)]).residual == {}
    both = activation_addition([({1: torch.ones(2)}, 2.0), ({1: torch.tensor([0.0, 10.0])}, -1.0)])
    assert both.residual[1].tolist() == [2, -8], "several add up"


def test_mean_difference_is_of_the_answers_tokens(small, made, tmp_path):
    """By hand: one answer at a time, the layer's output at positions whose input is a token of the answer."""
    path = made / "extraversion.answers.jsonl"
    ours = mean_difference(small.model, small.tokenizer, path, "extraversion", FRAMED, layer=0, most=10)
    rows = {pole: [] for pole in POLES}
    for line in lines_of(path)[:10]:
        prompt = prompt_of(small, line["question"], line["persona"])
        with torch.no_grad():
            output = small.model(input_ids=torch.tensor([prompt + line["ids"][:-1]]), output_hidden_states=True)
        rows[line["pole"]].append(output.hidden_states[1][0, len(prompt):])
    expected = torch.cat(rows["high"]).mean(0) - torch.cat(rows["low"]).mean(0)
    assert list(ours) == [0] and torch.allclose(ours[0], expected, atol=1e-4) and expected.abs().max() > 1e-3
    by_pole = sorted(path.read_text().splitlines(), key=lambda line: json.loads(line)["pole"] == "low")
    (tmp_path / "sorted.jsonl").write_text("\n".join(by_pole) + "\n")
    again = mean_difference(small.model, small.tokenizer, tmp_path / "sorted.jsonl", "extraversion", FRAMED, layer=0, most=10)
    assert torch.allclose(again[0], expected, atol=1e-4), "the first of each pole"


def test_mean_difference_is_in_the_middle_and_of_answers_that_play(small, made, tmp_path):
    lines = lines_of(made / "extraversion.answers.jsonl")
    for name, some in (("played", lines[4:]), ("all", [{**line, "answer": "As an AI language model, w10", "ids": []} for line in lines[:4]] + lines[4:])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in some))
    played, whole = (mean_difference(small.model, small.tokenizer, tmp_path / name, "extraversion", FRAMED) for name in ("played", "all"))
    assert list(played) == list(whole) == [1] and torch.equal(played[1], whole[1])


def test_short_of_memory_a_mean_difference_is_of_smaller_batches(small, made, monkeypatch, capsys):
    """Processes that share a model can't: the others would be left in the batch."""
    given = small.model, small.tokenizer, made / "extraversion.answers.jsonl", "extraversion", FRAMED, 0, 10
    whole = mean_difference(*given)
    with little_room(decoder_of(small.model), 2) as asked:
        parts = mean_difference(*given)
        assert asked == [10, 5, 2, 2, 2, 2, 2] and "out of memory: batches of 2" in capsys.readouterr().err
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(torch.OutOfMemoryError):
            mean_difference(*given)
        assert asked[7:] == [10]
    assert whole[0].abs().max() > 1e-3 and torch.allclose(whole[0], parts[0], atol=1e-5)


def test_update_changes_residual_vectors_too():
    model = tiny()
    make = lambda alpha: activation_addition([({1: torch.ones(32)}, alpha)])  # noqa: E731
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))

    def logits(profile):
        with torch.no_grad(), steer(model, profile, where="all"):
            return model(input_ids=ids).logits

    expected = [logits(make(alpha)) for alpha in (-2.0, 0.0)]
    assert not torch.equal(*expected)
    with torch.no_grad(), steer(model, make(1.0), where="all") as steering:
        for alpha, result in zip((-2.0, 0.0), expected):
            steering.update(make(alpha))
            assert torch.equal(model(input_ids=ids).logits, result)
    beyond = activation_addition([({7: torch.ones(32)}, 1.0)])
    with pytest.raises(UserError, match="layer 7 of a model of 2"), steer(model, beyond):
        pass
    assert not model.model.layers[1]._forward_hooks and find_mlps(model)


# --------------------------------------------------------------------------------------------------- released files


def release(folder, neurons, trait="Extraversion", min_neurons=7):
    """What NPTI would have released of these neurons."""
    folder.mkdir(exist_ok=True)
    for k, (pole, end) in enumerate(zip(POLES, ("", "_reversed"))):
        layers = {}
        for a, b, delta, p95 in zip(*(x.tolist() for x in neurons.select(pole, 0.1, min_neurons))):
            layers.setdefault(str(a), []).append([a, b, delta, float(neurons.prob[k, a, b]), p95])
        (folder / f"{trait}{end}_dict.json").write_text(json.dumps(layers))
    return folder


def test_released_files_make_the_same_profile(small, several, tmp_path):
    neurons = Neurons.load(several / "extraversion.safetensors", small.model)
    files = Released(release(tmp_path / "npti", neurons), "extraversion", small.model)
    for alpha in (1.4, -1.4):
        assert same(composed([(files, alpha)]), npti(neurons, alpha, min_neurons=7))
    with pytest.raises(UserError, match="no means"):
        dpn_le([(files, 1.0)])
    rows = [[0, index, delta, 0.5, 1.0] for index, delta in ((3, 0.2), (1, 0.4), (2, 0.3))]
    for end in ("", "_reversed"):
        (tmp_path / f"Extraversion{end}_dict.json").write_text(json.dumps({"0": rows}))
    assert Released(tmp_path, "extraversion", small.model).select("high")[1].tolist() == [1, 2, 3], "largest delta first, in any file"
    assert Released(tmp_path, "extraversion", small.model).key == Released(tmp_path, "extraversion", small.model).key != files.key


@pytest.mark.parametrize("text, pattern", (
    ('{"0": [[0, 3, 0.2, 0.5, 0.3], [5, 1, 0.2, 0.5, 0.3]]}', "layer 5 of a model of 2 layers .*another model"),
    ('{"0": [[0, 48, 0.2, 0.5, 0.3]]}', "neuron 48 of a model of 48"),
    ('{"0": [[0, 3, 0.2, 0.5, 0.3], [0, 3, 0.3, 0.5, 0.3]]}', "twice"),
    ('{"0": [[0, 3, 0.2]]}', "expected an object"), ("[1, 2]", "expected an object"), ("not JSON", "not JSON"),
    (None, "No such file")))
def test_wrong_released_files(small, several, tmp_path, text, pattern):
    folder = release(tmp_path / "npti", Neurons.load(several / "extraversion.safetensors"))
    path = folder / "Extraversion_reversed_dict.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=pattern):
        Released(folder, "extraversion", small.model)


def test_released_files_from_the_command_line(small, several, tmp_path, monkeypatch, capsys):
    folder = release(tmp_path / "npti", Neurons.load(several / "extraversion.safetensors"))
    main_of(induce, monkeypatch, *shared_flags(small), "--neurons", f"npti:{folder}", "--trait", "extraversion", "--alpha", "8",
            "-q", "w10 w11 ?", "--max-new-tokens", "4")
    captured = capsys.readouterr()
    assert "nothing vouches" in captured.err and "extraversion +8" in captured.out


# ------------------------------------------------------------------------------------------------------- characters


def test_profile_file(tmp_path):
    path = tmp_path / "ada.toml"
    path.write_text('name = "Ada"\nmethod = "dpn-le"\nlayers = [3, 9]\n[traits]\nneuroticism = -1\nOpenness = 2.5\n')
    ada = Character.read(str(path))
    assert (ada.name, ada.method, ada.layers) == ("Ada", "dpn-le", (3, 9))
    assert ada.strengths == {"openness": 2.5, "neuroticism": -1.0}
    assert ada.describe() == "Ada: openness +2.5, neuroticism -1 (dpn-le)"
    path.write_text("extraversion = 1\n")
    assert Character.read(str(path)) == Character({"extraversion": 1.0})


@pytest.mark.parametrize("text, pattern", (
    ("extraversion = ", "not TOML"), ("humour = 1", "expected some of openness"), ("[traits]\n", "expected some of"),
    ('extraversion = "much"', "a number each"), ("extraversion = true", "a number each"), ("extraversion = nan", "a number each"),
    ("method = 'magic'\n[traits]\nopenness = 1", "method: expected one of npti"), ("mood = 1\n[traits]\nopenness = 1", "'mood'"),
    ("layers = [5, 2]\n[traits]\nopenness = 1", "first, last")))
def test_wrong_profile_files(tmp_path, text, pattern):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=pattern):
        Character.read(str(path))


@pytest.mark.parametrize("make, pattern", (
    (lambda: Character({"neurotcism": 2}), "'neurotcism'"), (lambda: Character({"openness": 2}, "magic"), "'magic'"),
    (lambda: Character({"openness": math.nan}), "a finite number"), (lambda: Character({"openness": "2"}), "'2'"),
    (lambda: Character({"openness": 2}, ["npti"]), "'npti'.$"),
    (lambda: suppressed(Profile.empty(), "cpa"), "expected cap, zero or none, got 'cpa'"),
    (lambda: Profile.dense(bais=torch.ones(2, 3)), "expected some of cap, scale, shift, bias, got bais"), (lambda: Profile.dense("x"), "got none"),
    (lambda: trained([(random_neurons("openness", 0), 1.0)]), "openness: no trained edits in it: python identify.py --train"),
    (lambda: trained([(Neurons({"dose": torch.ones(2, 1, 4)}, {"trait": "openness"}), math.nan)]), "a finite number, got nan")))
def test_mistakes_in_python_are_named(make, pattern):
    with pytest.raises(UserError, match=pattern):
        make()


@pytest.mark.parametrize("flags, pattern", (
    (("--profile", "nowhere.toml"), "nowhere.toml: No such file"),
    (("--profile", "x.toml", "--trait", "openness"), "one or the other"),
    (("--method", "magic", "--trait", "openness", "--alpha", "1"), "invalid choice"),
    (("--list", "--neurons", "nowhere"), "no neuron files in nowhere: python identify.py --out nowhere makes them"),
    (("--list", "--neurons", "npti:nowhere"), "a folder of identify.py: --neurons npti:DIR goes without it"),
    *((("--trait", "openness", "--alpha", "1", "--neurons", "npti:nowhere", *more), "selected already")
      for more in (("--min-delta", "0.2"), ("--min-neurons", "9"))),
    (("--trait", "openness", "--alpha", "1", "--min-delta", "-1"), "expected a number at least 0, at most 1, got -1"),
    (("--trait", "openness", "--alpha", "1", "--neurons", "npti:nowhere"), "nowhere/Openness_dict.json"),
    ((), "--profile FILE")))
def test_wrong_flags(small, monkeypatch, flags, pattern):
    with pytest.raises(UserError, match=pattern):
        main_of(induce, monkeypatch, *shared_flags(small), *flags)


def test_profile_for_another_model(small, several, monkeypatch, tmp_path):
    (tmp_path / "ada.toml").write_text('model = "someone/else"\n[traits]\nextraversion = 1\n')
    with pytest.raises(UserError, match="is for someone/else, the model is"):
        main_of(induce, monkeypatch, *shared_flags(small), "--neurons", several, "--profile", tmp_path / "ada.toml")


def test_layers_restrict_all_that_is_edited():
    neurons = random_neurons("openness", 9)
    whole = npti(neurons, 1.0)
    whole.residual = {0: torch.ones(3), 1: torch.zeros(3)}
    part = restricted(whole, (1, 5))
    assert set(part.layer.tolist()) == {1} and list(part.residual) == [1] and len(part.value) == int((whole.layer == 1).sum()) > 0
    part = restricted(whole, (0, 1))
    assert same(part, whole) and list(part.residual) == [0, 1], "the last is one of them"
    assert restricted(whole, None) is whole


def test_layers_that_hold_nothing(small, several, monkeypatch, tmp_path):
    (tmp_path / "ada.toml").write_text("layers = [40, 50]\n[traits]\nextraversion = 1\n")
    with pytest.raises(UserError, match="hold nothing"):
        main_of(induce, monkeypatch, *shared_flags(small), "--neurons", several, "--profile", tmp_path / "ada.toml")


def test_chat_identifies_with_the_unedited_model(small, several, monkeypatch, tmp_path, capsys):
    """A trait that the folder lacks is identified in the middle of a chat, by the model itself; a mistake changes nothing."""
    folder = tmp_path / "neurons"
    shutil.copytree(several, folder)
    lines = iter(["/trait openness 3", "/trait humour 1", "/alpha much", "/trait neuroticism 1e9", "/quit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    said = lambda: answers(small.model, small.tokenizer, [FRAMED.turns("w10 w11 ?")], 6)  # noqa: E731
    plain, meanwhile = said(), []

    def identify(trait):
        meanwhile.append(said())
        neurons = Neurons.load(several / "extraversion.safetensors")
        Neurons(neurons.tensors, {**neurons.meta, "trait": trait}).save(folder / f"{trait}.safetensors")

    profiles = Profiles(small.model, small.tokenizer, NeuronFolder(small.model, str(folder), identify))
    character, args = Character({"extraversion": 40.0}), induce.parser().parse_args(["--where", "generated"])
    with steer(small.model, profiles.of(character)):
        assert said() != plain
    converse(small.model, small.tokenizer, profiles, character, args)
    assert meanwhile == [plain]
    assert capsys.readouterr().out.count("openness +3, extraversion +40") == 1


def test_list_shows_what_a_folder_holds(several, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    main_of(induce, monkeypatch, "--list", "--neurons", several)
    text = capsys.readouterr().out
    assert "extraversion" in text and "neuroticism" in text and "questions" in text and "seed 0" in text
    (tmp_path / "openness.safetensors").write_bytes(b"not one")
    main_of(induce, monkeypatch, "--list", "--neurons", tmp_path)
    assert "not a whole safetensors file" in capsys.readouterr().out


@pytest.mark.parametrize("sampled", (False, True))
def test_a_profile_a_line(small, several, monkeypatch, tmp_path, sampled):
    """Every line of a mixed batch is answered as in a batch of the same shape in which all have its profile."""
    (tmp_path / "ada.toml").write_text("extraversion = 9\n")
    both = {"extraversion": 9, "neuroticism": -4}
    asked = [("w10 w11 ?", both), ("w12 ?", str(tmp_path / "ada.toml")), ("w13 w14 w15 ?", None),
             ("w16 ?", {"traits": {"extraversion": -6}, "method": "activation"}), ("w17 w18 ?", {"neuroticism": 9})]
    more = ("--temperature", "1.5", "--seed", "3") if sampled else ()

    def answered(profiles, name):
        lines = [json.dumps({"question": question, **({"profile": profile} if profile else {})})
                 for (question, _), profile in zip(asked, profiles)]
        (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")
        main_of(induce, monkeypatch, *shared_flags(small), "--neurons", several, "--questions", tmp_path / "q.jsonl", "--out",
                tmp_path / name, "--max-new-tokens", "6", "--trait", "neuroticism", "--alpha", "-9", *more)
        return lines_of(tmp_path / name)

    mixed = answered([profile for _, profile in asked], "mixed")
    assert mixed == answered([profile for _, profile in asked], "again")
    assert [line["personality"] for line in mixed] == [both, {"extraversion": 9}, {"neuroticism": -9}, {"extraversion": -6},
                                                       {"neuroticism": 9}]
    different = 0
    for k, (_, profile) in enumerate(asked):
        alone = answered([profile] * 5, f"alone{k}")
        assert alone[k] == mixed[k]
        different += sum(a["ids"] != b["ids"] for a, b in zip(alone, mixed))
    assert different, "profiles change answers"


def test_questions_without_a_profile_need_one(small, monkeypatch, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "a ?", "profile": {"openness": 1}}\nb ?\n')
    with pytest.raises(UserError, match="no profile stands beside 'b .'"):
        main_of(induce, monkeypatch, *shared_flags(small), "--questions", tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text('{"question": "a ?", "profile": {"humour": 1}}\n')
    with pytest.raises(UserError, match="q.jsonl, line 1: expected some of"):
        main_of(induce, monkeypatch, *shared_flags(small), "--questions", tmp_path / "q.jsonl")


def test_strength_zero_is_no_edit(small, several):
    both = [Neurons.load(several / f"{trait}.safetensors", small.model) for trait in ("extraversion", "neuroticism")]
    ids = torch.randint(9, 90, (3, 8), generator=torch.Generator().manual_seed(1))
    results = []
    for profile in (composed([(neurons, 0.0) for neurons in both]), dpn_le([(both[0], 0.0)]),
                    activation_addition([({0: torch.ones(32)}, 0.0)])):
        with torch.no_grad(), steer(small.model, profile, where="all"):
            results.append(small.model(input_ids=ids).logits)
    with torch.no_grad(), steer(small.model, composed([(both[0], 1.0)]), [0, 0, 0], where="all"):
        results.append(small.model(input_ids=ids).logits)
    assert all(torch.equal(result.view(torch.int32), results[0].view(torch.int32)) for result in results)
