"""neurons::glu_ against plain PyTorch: values, edits, statistics, layouts, checks, compilation."""

import importlib.util
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from torch.utils import cpp_extension

import cuda_on_cpu
from conftest import ROOT
from personality import UserError
from personality.mlp import plain_sites
from personality.observe import Statistics
from personality.load import on_device
from personality.op import cuda_home, find_ninja, op

ACTS = (F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
WIDTHS = (1, 7, 8, 129, 256, 1134)
op()
glu_ = torch.ops.neurons.glu_


def plain(gate, up, act, *rest):
    glu_(gate, up, act, *(rest or (None,) * 8))
    return gate


def inputs(tokens, width, dtype, device="cpu", seed=0, layout="separate", scale=2.0):
    """gate and up (None for layout "ungated"); "fused": both halves of one tensor; "strided": rows with a gap."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(tokens, 2 * width + 5, generator=generator).mul(scale).to(device, dtype)
    if layout == "fused":
        both = both[:, : 2 * width].contiguous()
        return both[:, :width], both[:, width:]
    gate, up = both[:, :width], both[:, width : 2 * width].clone()
    return (gate if layout == "strided" else gate.clone()), (None if layout == "ungated" else up)


def tables(profiles, width, device="cpu", spare=3):
    """edit_ptr, edit_index, edit_value of [{column: (cap, scale, shift, bias)}]; profile 0 is none."""
    tile = op().tile
    tiles = -(-width // tile)
    ptr, index, value = [[0] * (tiles + 1)], [], []
    for profile in profiles:
        row = []
        for t in range(tiles):
            row.append(len(index))
            for j in sorted(profile):
                if j // tile == t:
                    index.append(j)
                    value.append(profile[j])
        ptr.append(row + [len(index)])
    value += [(0.0, 9.0, 9.0, 9.0)] * spare
    return (torch.tensor(ptr, dtype=torch.int32, device=device),
            torch.tensor(index + [0] * spare, dtype=torch.int32, device=device),
            torch.tensor(value, dtype=torch.float32, device=device).reshape(-1, 4))


def reference(gate, up, act, token_profile=None, profiles=()):
    """The contract of csrc/neurons.h in float64."""
    a = ACTS[act](gate.double())
    u = torch.ones_like(a) if up is None else up.double()
    result = a * u
    for t, p in enumerate(token_profile.tolist() if token_profile is not None else []):
        for j, (cap, scale, shift, bias) in (profiles[p - 1] if 0 < p <= len(profiles) else {}).items():
            result[t, j] = (scale * min(a[t, j].item(), cap) + shift) * u[t, j] + bias
    return result


def assert_close(ours, exact, theirs, dtype):
    """Within twice PyTorch's own error in that dtype, and a rounding of the result."""
    eps = torch.finfo(dtype).eps
    allowed = 2 * (theirs.double() - exact).abs().max() + eps * exact.abs() + 2e-7
    worst = ((ours.double() - exact).abs() - allowed).max()
    assert not worst > 0, f"off by {worst:.3g} beyond the allowed"
    assert ours.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("separate", "fused", "strided", "ungated"))
@pytest.mark.parametrize("width", WIDTHS)
def test_product(width, layout, dtype, device):
    for act in range(4):
        for tokens in (1, 5, 33):
            gate, up = inputs(tokens, width, dtype, device, act, layout)
            exact = reference(gate, up, act)
            theirs = ACTS[act](gate) if up is None else ACTS[act](gate) * up
            before = None if up is None else up.clone()
            assert_close(plain(gate, up, act), exact, theirs, dtype)
            assert up is None or torch.equal(up, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_range_of_values(dtype, device):
    """Every finite bfloat16 and float16 number, as gate; NaN stays NaN."""
    kind = torch.bfloat16 if dtype == torch.float32 else dtype
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(kind).to(dtype).to(device)
    x = x[~x.isinf()].view(1, -1)
    for act in range(4):
        ours = plain(x.clone(), None, act)
        exact = ACTS[act](x.double())
        theirs = ACTS[act](x)
        good = ~x.isnan()
        assert ours[~good].isnan().all()
        eps = torch.finfo(dtype).eps
        error = (ours[good].double() - exact[good]).abs()
        allowed = 2 * (theirs[good].double() - exact[good]).abs() + eps * exact[good].abs() * 2 + (3e-7 if act else 1e-9)
        assert not (error > allowed).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_of_the_exponential(dtype, device):
    """The bound that csrc/neurons.h states, seen before rounding: in the moments of a single token."""
    x = torch.linspace(-80, 80, 40001).to(dtype).unique().view(1, -1).to(device)
    count, sketch, moments = new_statistics(1, x.shape[1], device)
    group = torch.zeros(1, dtype=torch.int32, device=device)
    plain(x.clone(), torch.ones_like(x), 0, None, None, None, None, group, count, sketch, moments)
    exact = F.silu(x.double())[0]
    error = ((moments[0, 0] - exact).abs() / exact.abs().clamp(1e-30)).max()
    assert error < (4e-7 if dtype == torch.float32 else 8e-5 + 4e-7 if device == "cpu" else 1e-5), error


edit = st.tuples(st.floats(-1, 3) | st.just(math.inf), st.sampled_from([0.0, 0.5, 1.0]), st.floats(-2, 2), st.floats(-1, 1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_edits_property(data):
    width, tokens = data.draw(st.sampled_from((1, 7, 129, 256, 300, 1134))), data.draw(st.integers(1, 9))
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(("separate", "fused", "strided", "ungated")))
    act, device = data.draw(st.integers(0, 3)), data.draw(st.sampled_from(DEVICES))
    profiles = data.draw(st.lists(st.dictionaries(st.integers(0, width - 1), edit, max_size=40), min_size=1, max_size=4))
    token_profile = torch.tensor(data.draw(st.lists(st.integers(-2, len(profiles) + 2), min_size=tokens, max_size=tokens)),
                                 dtype=torch.int32, device=device)
    gate, up = inputs(tokens, width, dtype, device, data.draw(st.integers(0, 99)), layout)
    exact = reference(gate, up, act, token_profile, profiles)
    untouched = plain(gate.clone(), up, act)
    theirs = ACTS[act](gate) if up is None else ACTS[act](gate) * up
    plain(gate, up, act, token_profile, *tables(profiles, width, device), None, None, None, None)
    assert_close(gate, exact, theirs, dtype)
    for t, p in enumerate(token_profile.tolist()):  # outside its edits, and with profile 0, a row is the same bit for bit
        same = torch.ones(width, dtype=torch.bool, device=device)
        same[list(profiles[p - 1]) if 0 < p <= len(profiles) else []] = False
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(gate[t][same].view(bits), untouched[t][same].view(bits))


def test_cap_comes_before_shift():
    gate = torch.full((1, 1), 5.0)
    plain(gate, None, 3, torch.tensor([1], dtype=torch.int32), *tables([{0: (0.0, 1.0, 0.7, 0.0)}], 1), None, None, None, None)
    assert gate.item() == pytest.approx(0.7)


def new_statistics(groups, width, device="cpu"):
    return (torch.zeros(groups, width, dtype=torch.int32, device=device),
            torch.zeros(groups, width, op().bins, dtype=torch.int32, device=device),
            torch.zeros(groups, 2, width, dtype=torch.float64, device=device))


def new_pending(width, rings=1):
    return torch.zeros(rings, -(-width // op().tile), op().pending_bytes, dtype=torch.uint8)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_statistics_property(device, data):
    width, tokens = data.draw(st.sampled_from((1, 7, 64, 129, 300))), data.draw(st.integers(1, 600))
    groups, dtype, act = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    group = torch.randint(-1, groups + 1, (tokens,), generator=generator, dtype=torch.int32).to(device)
    profile = torch.randint(0, 2, (tokens,), generator=generator, dtype=torch.int32).to(device)
    layout = data.draw(st.sampled_from(("separate", "fused", "ungated")))
    gate, up = inputs(tokens, width, dtype, device, 1, layout)
    original, statistics = gate.clone(), new_statistics(groups, width, device)
    edits = tables([{0: (0.0, 1.0, 0.5, 0.0)}], width, device)
    expected = plain(gate.clone(), up, act, profile, *edits, None, None, None, None)
    plain(gate, up, act, profile, *edits, group, *statistics)
    assert torch.equal(gate, expected), "observing changes what is computed"
    count, sketch, moments = (tensor.cpu() for tensor in statistics)
    a = ACTS[act](original.double()).cpu()
    h = a if up is None else a * up.double().cpu()
    edges = torch.tensor(op().edges, dtype=torch.float64)
    for g in range(groups):
        mine = (group == g).cpu()
        positive = (original.cpu() > 0)[mine]
        assert torch.equal(count[g], positive.sum(0).int())
        assert torch.equal(sketch[g].sum(-1), count[g]), "the sketch holds every positive activation, clamped ones too"
        # a bin may be its neighbour where the activation is within the arithmetic's error of an edge
        slack = 2e-4 if dtype != torch.float32 else 1e-6
        for sign in (1 - slack, 1 + slack):
            bins = torch.bucketize(a[mine].clamp(1e-30) * sign, edges, right=True).sub(1).clamp(0, op().bins - 1)
            exact = torch.stack([torch.bincount(bins[:, j][positive[:, j]], minlength=op().bins) for j in range(width)])
            cumulative, ours = exact.cumsum(-1), sketch[g].cumsum(-1)
            assert (ours >= cumulative).all() if sign > 1 else (ours <= cumulative).all()
        tolerance = 1e-3 if dtype != torch.float32 else 1e-5
        for ours, exact in zip(moments[g], (h[mine].sum(0), (h[mine] ** 2).sum(0))):
            assert torch.allclose(ours, exact, rtol=tolerance, atol=tolerance * tokens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("values", ("normal", "heavy", "constant", "outside"))
def test_percentiles_within_two_percent(values, device):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 8, generator=generator)
    x = {"normal": x, "heavy": (x * 2).exp() * 0.05, "constant": torch.full_like(x, 0.317),
         "outside": torch.where(x > 0, 1e-5, 200.0)}[values].to(device)
    statistics = Statistics(plain_sites(1, 8, device))
    statistics.count_tokens(torch.zeros(4000, dtype=torch.int32, device=device))
    glu_(x.clone(), None, 3, None, None, None, None, torch.zeros(4000, dtype=torch.int32, device=device), *statistics.sites[0])
    for q in (0.05, 0.5, 0.95, 0.99):
        exact = x.sort(0).values[math.ceil(q * 4000) - 1].clamp(min=0).cpu()
        ours = statistics.percentile(q)[0, 0]
        if values == "outside":  # clamped into the first and last bin, and counted
            assert torch.allclose(ours, torch.where(exact < 1, 2**-11, 2**6).float(), rtol=0.02)
        else:
            exact = torch.where(exact > 0, exact.clamp(2**-11, 2**6), exact)
            assert ((ours - exact).abs() <= 0.02 * exact).all()


def test_sketch_bins_cover_the_range_within_two_percent():
    edges = torch.tensor(op().edges, dtype=torch.float64)
    assert edges[0] == 2**-11 and edges[-1] == 2**6 and (edges.diff() > 0).all()
    assert ((edges[1:] - edges[:-1]) / (edges[1:] + edges[:-1])).max() < 0.02


@pytest.mark.parametrize("device", DEVICES)
def test_shards_add_up(device):
    gate, up = inputs(700, 129, torch.float32, device)
    group = (torch.arange(700, dtype=torch.int32) % 3 - 1).to(device)
    whole, parts = new_statistics(2, 129, device), [new_statistics(2, 129, device) for _ in range(2)]
    plain(gate.clone(), up, 0, None, None, None, None, group, *whole)
    for part, rows in zip(parts, (slice(0, 123), slice(123, None))):
        plain(gate[rows].clone(), up[rows], 0, None, None, None, None, group[rows].contiguous(), *part)
    assert torch.equal(whole[0], parts[0][0] + parts[1][0]) and torch.equal(whole[1], parts[0][1] + parts[1][1])
    assert torch.allclose(whole[2], parts[0][2] + parts[1][2], rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_pending_counts_late_and_the_same(data):
    """Calls of a few rows and of many, with counts wanted in between: with pending as without, in however many rings."""
    width, groups = data.draw(st.sampled_from((1, 33, 256, 300))), data.draw(st.integers(1, 7))
    at_once, late = new_statistics(groups, width), new_statistics(groups, width)
    pending = new_pending(width, data.draw(st.integers(1, groups + 1)))
    for seed, tokens in enumerate(data.draw(st.lists(st.sampled_from((0, 1, 5, 31, 64, 511, 700)), min_size=1, max_size=8))):
        gate, up = inputs(tokens, width, data.draw(st.sampled_from(DTYPES)), "cpu", seed)
        group = torch.randint(-1, groups + 1, (tokens,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        expected = plain(gate.clone(), up, 0, None, None, None, None, group, *at_once)
        assert torch.equal(plain(gate, up, 0, None, None, None, None, group, *late, pending), expected)
        assert torch.equal(at_once[2], late[2]), "moments are added up at once"
        if data.draw(st.booleans()):
            torch.ops.neurons.flush_(*late[:2], pending)
            assert all(torch.equal(a, b) for a, b in zip(at_once, late)) and not pending.any()
    for _ in range(2):  # the second time there is nothing left
        torch.ops.neurons.flush_(*late[:2], pending)
        assert all(torch.equal(a, b) for a, b in zip(at_once, late))


def test_pending_counts_what_is_due_by_itself():
    """Else a long run would lose what pending has no room for."""
    statistics, pending = new_statistics(1, 40), new_pending(40)
    for _ in range(100):
        plain(torch.ones(32, 40), None, 0, None, None, None, None, torch.zeros(32, dtype=torch.int32), *statistics, pending)
    assert (statistics[0] >= 3200 - 512).all() and torch.equal(statistics[0], statistics[1].sum(-1)[0][None].int())


def test_each_ring_counts_what_is_due_to_its_groups():
    """Group g waits in ring g % rings: there the groups of others make nothing due, and leave it nothing to count."""
    statistics, pending = new_statistics(4, 40), new_pending(40, 2)
    for group in (0, 1, 2, 2):  # of each 300 rows; ring 0 gets 900, ring 1 300
        plain(torch.ones(300, 40), None, 0, None, None, None, None, torch.full((300,), group, dtype=torch.int32), *statistics, pending)
    counts = statistics[0].sum(1) // 40
    assert counts[0] == 300 and 900 - 512 - 300 <= counts[2] < 600 and counts[1] < 300 and counts[3] == 0
    assert pending.flatten(1).any(1).all()
    torch.ops.neurons.flush_(*statistics[:2], pending)
    assert (statistics[0].T == torch.tensor([300, 300, 600, 0])).all() and torch.equal(statistics[0], statistics[1].sum(-1).int())


@pytest.mark.parametrize("width, groups, rings", ((1134, 1, 1), (40, 8, 4), (300, 6, 3), (300, 5, 16)))
def test_thread_count_does_not_change_statistics(width, groups, rings):
    """Where tiles are few, threads share the rings; rows that are not observed go to any of them."""
    results, before = [], torch.get_num_threads()
    group = torch.randint(-1, groups + 1, (700,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        gate, up = inputs(700, width, torch.float32)
        statistics, pending = new_statistics(groups, width), new_pending(width, rings)
        plain(gate, up, 0, None, None, None, None, group, *statistics, pending)
        torch.ops.neurons.flush_(*statistics[:2], pending)
        torch.set_num_threads(before)
        results.append((gate, *statistics))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    assert (results[0][1].sum(1) > 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_indices_out_of_range_edit_nothing(device):
    gate, up = inputs(6, 40, torch.float32, device)
    expected = plain(gate.clone(), up, 0)
    ptr, index, value = tables([{3: (0.0, 1.0, 1.0, 0.0)}], 40, device)
    profile = torch.tensor([0, -1, 2, 99, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device)
    assert torch.equal(plain(gate.clone(), up, 0, profile, ptr, index, value, None, None, None, None), expected)
    ones = torch.ones(6, dtype=torch.int32, device=device)
    for wrong in (-1, 40, 2**31 - 1):
        edits = ones, ptr, torch.full_like(index, wrong), value
        assert torch.equal(plain(gate.clone(), up, 0, *edits, None, None, None, None), expected)
    group = torch.tensor([-5, 1, 7, -1, -1, 2**31 - 1], dtype=torch.int32, device=device)
    for groups in (0, 1):
        statistics = new_statistics(groups, 40, device)
        assert torch.equal(plain(gate.clone(), up, 0, None, None, None, None, group, *statistics), expected)
        assert not any(tensor.any() for tensor in statistics)


def test_errors_name_both_sides():
    gate, up = torch.randn(4, 8), torch.randn(4, 8)
    none = (None,) * 8

    def fails(pattern, gate, up, act=0, rest=none):
        with pytest.raises(RuntimeError, match=pattern):
            glu_(gate, up, act, *rest)

    fails(r"up: expected shape \[4, 8\] like gate, got \[4, 7\]", gate, up[:, :7])
    fails("up: expected dtype Float like gate, got BFloat16", gate, up.bfloat16())
    fails("gate: expected float32, bfloat16 or float16, got Double", gate.double(), up.double())
    fails(r"gate: expected 2 dimensions", gate[None], up)
    fails("gate: expected last stride 1", torch.randn(8, 4).t(), up)
    fails("act: expected 0", gate, up, 4)
    both = torch.randn(4, 12)
    fails("overlapping", both[:, :8], both[:, 4:])
    fails("overlapping", gate, gate)
    fails("rows that do not overlap", torch.randn(8).expand(4, 8), up)
    profile, index = torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    ptr, value = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 4)
    edits = lambda *four: (*four, None, None, None, None)  # noqa: E731
    fails("all four or none, got 1", gate, up, 0, edits(profile, None, None, None))
    fails("edit_value: expected memory aligned", gate, up, 0, edits(profile, ptr, index, torch.zeros(9)[1:].view(2, 4)))
    fails(r"token_profile: expected shape \[4\].*got \[3\]", gate, up, 0, edits(profile[:3], ptr, index, value))
    fails("token_profile: expected dtype Int, got Long", gate, up, 0, edits(profile.long(), ptr, index, value))
    fails(r"edit_ptr: expected shape \[-1, 2\]", gate, up, 0, edits(profile, torch.zeros(2, 3, dtype=torch.int32), index, value))
    fails(r"edit_value: expected shape \[2, 4\]", gate, up, 0, edits(profile, ptr, index, value[:1]))
    count, sketch, moments = new_statistics(2, 8)
    observed = lambda *four: (None, None, None, None, *four)  # noqa: E731
    fails("all four or none, got 3", gate, up, 0, observed(profile, count, sketch, None))
    fails(r"count: expected shape \[-1, 8\]", gate, up, 0, observed(profile, count[:, :7].contiguous(), sketch, moments))
    fails(r"sketch: expected shape \[2, 8, 304\]", gate, up, 0, observed(profile, count, sketch[:1], moments))
    fails("moments: expected dtype Double", gate, up, 0, observed(profile, count, sketch, moments.float()))
    pending = new_pending(8)
    fails("pending: expected with count, sketch and moments", gate, up, 0, (*none, pending))
    for wrong, shape in ((pending[..., 1:].contiguous(), "-1"), (pending[0], "-1"), (pending[:0], "1")):
        fails(rf"pending: expected shape \[{shape}, 1, \d+\] \(-1: any\), got " + re.escape(str(list(wrong.shape))), gate, up, 0,
              (*observed(profile, count, sketch, moments), wrong))
    with pytest.raises(RuntimeError, match=r"count: expected shape \[2, 8\]"):
        torch.ops.neurons.flush_(count[:1], sketch, pending)
    for wrong in (new_pending(300), pending[:0]):
        with pytest.raises(RuntimeError, match=r"pending: expected shape \[-?1, 1, \d+\]"):
            torch.ops.neurons.flush_(count, sketch, wrong)
    bytes = torch.zeros(pending.numel() + 1, dtype=torch.uint8)[1:].view(1, 1, -1)
    with pytest.raises(RuntimeError, match="pending: expected memory aligned"):
        torch.ops.neurons.flush_(count, sketch, bytes)


def test_empty_input():
    for shape in ((0, 8), (4, 0), (0, 0)):
        plain(torch.empty(shape), torch.empty(shape), 0)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    edits = tables([{3: (0.0, 1.0, 0.5, 0.1)}], 40, device)
    ones, statistics = torch.ones(5, dtype=torch.int32, device=device), new_statistics(1, 40, device)
    group = torch.zeros(5, dtype=torch.int32, device=device)
    late = [(group, *statistics, new_pending(40, rings)) for rings in (1, 3)] if device == "cpu" else []
    for up in (True, False):
        for edited in ((ones, *edits), (None,) * 4):
            for observed in ((group, *statistics), (None,) * 4, *late):
                gate, other = inputs(5, 40, torch.float32, device)
                torch.library.opcheck(glu_, (gate, other if up else None, 0, *edited, *observed))
    torch.library.opcheck(torch.ops.neurons.flush_, (*new_statistics(1, 40)[:2], new_pending(40)))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_results_are_rounded_to_nearest(dtype):
    """And not cut off, by which each would be too small by half a unit of its last place."""
    up = (1 + torch.arange(256) * torch.finfo(dtype).eps).to(dtype)[None]
    gate = torch.full((1, 256), 3.0, dtype=dtype)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    glu_(gate, up, 0, *(None,) * 8)
    assert abs(float(((gate.double() - exact) / exact).mean())) < 0.2 * torch.finfo(dtype).eps


def test_no_autograd():
    x = torch.randn(3, 8, requires_grad=True)
    gate = x * 1.0
    glu_(gate, torch.randn(3, 8), 0, *(None,) * 8)  # forward works without no_grad
    with pytest.raises(RuntimeError, match="not implemented"):
        gate.sum().backward()
    half = (torch.randn(3, 16, requires_grad=True) * 1.0)[:, :8]  # a view, as in a fused gate_up
    glu_(half, torch.randn(3, 8), 0, *(None,) * 8)
    with pytest.raises(RuntimeError, match="not implemented"):
        half.sum().backward()


@pytest.mark.parametrize("of", ("gate", "up"))
def test_no_forward_mode_either(of):
    """It writes to gate, whose tangent would stay what it was."""
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    for call in (lambda x: glu_(x.clone(), up, 0, *(None,) * 8), lambda x: glu_(gate.clone(), x.clone(), 0, *(None,) * 8)):
        call(gate)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.func.jvp(lambda x: glu_(x.clone() if of == "gate" else gate.clone(), up if of == "gate" else x, 0, *(None,) * 8),
                       (gate,), (torch.ones(3, 8),))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_copies(device):
    """Inductor calls the op on the gate that the matmul wrote: no clone of it, nor of the statistics."""
    from torch._inductor.utils import run_and_get_code

    width, statistics = 64, (*new_statistics(1, 64, device), *([new_pending(64)] if device == "cpu" else []))
    group = torch.zeros(4, dtype=torch.int32, device=device)

    def f(x, w):
        both = x @ w
        gate, up = both[:, :width], both[:, width:]
        glu_(gate, up, 0, None, None, None, None, group, *statistics)
        return gate.sum(1)

    x, w = torch.randn(4, 16, device=device), torch.randn(16, 2 * width, device=device)
    expected = f(x, w)
    for tensor in statistics:
        tensor.zero_()
    result, code = run_and_get_code(torch.compile(f, fullgraph=True), x, w)
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5)
    if device == "cpu":
        torch.ops.neurons.flush_(*statistics[:2], statistics[3])
    assert statistics[0].sum() > 0 and torch.equal(statistics[1].sum(-1), statistics[0])
    assert not re.search(r"copy_\(|\.clone\(", "".join(code))
    call, = (line for line in "".join(code).splitlines() if "glu_.default(" in line)
    assert len(re.findall(r"\barg\d+_1\b", call)) == 1 + len(statistics), "the groups and the statistics are what was given"
    assert not re.search(r"clone|copy_", "".join(line for line in code[0].splitlines() if line.startswith(("cpp_fused", "triton_")))), call


@pytest.mark.skipif(not cuda_home(), reason="no nvcc")
@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100"))
def test_cuda_source_compiles_without_spills(arch, tmp_path):
    known = subprocess.run([f"{cuda_home()}/bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    if arch.replace("sm", "compute") not in known.split():
        pytest.skip(f"this nvcc is older than {arch}")
    run = subprocess.run([f"{cuda_home()}/bin/nvcc", "-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-c", str(ROOT / "csrc/neurons_cuda.cu"),
                          "-o", str(tmp_path / "neurons.o")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "spill stores" in run.stderr and not re.search(r"[1-9]\d* bytes (spill|stack)", run.stderr)  # nor in memory otherwise


@pytest.mark.skipif(not cuda_home(), reason="no nvcc")
def test_cuda_glue_compiles(tmp_path):
    """What a GPU build compiles of neurons.cpp, against whatever torch is here."""
    import sysconfig

    from torch.utils.cpp_extension import include_paths

    include = [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    run = subprocess.run(["g++", "-std=c++20", "-fsyntax-only", "-DNEURONS_CUDA=v9.0", "-DTORCH_EXTENSION_NAME=_neurons",
                          *include, str(ROOT / "csrc/neurons.cpp")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_compiler_of_the_packages_is_found(monkeypatch, tmp_path):
    """NVIDIA's packages of torch's major version; $CUDA_HOME and PATH go before them. A GPU without any compiler: one line."""
    for version in ("cu12", "cu13"):
        nvcc = tmp_path / "site/nvidia" / version / "bin/nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: not str(path).startswith("/usr/local/cuda") and exists(path))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert cuda_home() == str(tmp_path / "site/nvidia/cu13")
    monkeypatch.setattr(torch.version, "cuda", "14.0")
    assert cuda_home() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if importlib.util.find_spec("_neurons") is None:  # else it is that build which has kernels or not
        with pytest.raises(UserError, match=r"nvcc was not found: pip install -e '.\[cuda\]'"):
            on_device("cuda")
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        (tmp_path / "site/nvidia/cu12/bin/nvcc").rename(tmp_path / "away")
        with pytest.raises(UserError, match="nvcc was not found: install the toolkit of CUDA 12.8, or torch for CUDA 13"):
            on_device("cuda")
        (tmp_path / "away").rename(tmp_path / "site/nvidia/cu12/bin/nvcc")
        monkeypatch.setattr(torch.version, "cuda", "14.0")
    monkeypatch.setenv("PATH", str(tmp_path / "site/nvidia/cu12/bin"))
    assert cuda_home() == str(tmp_path / "site/nvidia/cu12")
    runtime = tmp_path / "site/nvidia/cu13/lib/libcudart.so.13"
    runtime.parent.mkdir()
    runtime.touch()
    assert cuda_home() == str(tmp_path / "site/nvidia/cu12"), "of another version than torch's"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cuda_home() == str(tmp_path / "site/nvidia/cu13"), "the one in PATH has no runtime: it calls another"
    monkeypatch.setenv("CUDA_HOME", "/somewhere")
    assert cuda_home() == "/somewhere"


def test_ninja_is_found_where_its_environment_is_not_active(monkeypatch):
    """As with .venv/bin/python identify.py."""
    monkeypatch.setenv("PATH", "/nowhere")
    find_ninja()
    assert shutil.which("ninja")


@pytest.mark.parametrize("asked, built", (("", "8.0;9.0;12.0+PTX"), ("9.0", "9.0")))
def test_built_ahead_for_all_cards_where_there_is_none(monkeypatch, tmp_path, asked, built):
    """On a login node, or for a container: torch itself builds for the cards that it sees, and fails where that is none."""
    kept = {}
    for name, value in {"CUDA_HOME": str(tmp_path), "TORCH_CUDA_ARCH_LIST": asked}.items():
        monkeypatch.setenv(name, value)
    for place, name, value in ((torch.version, "cuda", "13.0"), (torch.cuda, "is_available", lambda: False), (cpp_extension, "CUDA_HOME", None),
                               (torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_120", "sm_90", "sm_100a", "compute_120"]),
                               (setuptools, "setup", kept.update), (sys, "argv", ["setup.py", "bdist_wheel"]), (sys, "path", [*sys.path])):
        monkeypatch.setattr(place, name, value)
    runpy.run_path(str(ROOT / "setup.py"))
    [extension] = kept["ext_modules"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == built and any(source.endswith(".cu") for source in extension.sources)
    assert f"-DNEURONS_CUDA=v{built.replace(';', '_').replace('+', '')}" in extension.extra_compile_args["cxx"]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
def test_cuda_graph_replay_follows_swapped_edits():
    gate, up = inputs(8, 512, torch.bfloat16, "cuda")
    source = gate.clone()
    profile = torch.ones(8, dtype=torch.int32, device="cuda")
    edits = tables([{3: (math.inf, 1.0, 1.0, 0.0)}], 512, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        glu_(gate, up, 0, profile, *edits, None, None, None, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gate.copy_(source)
        glu_(gate, up, 0, profile, *edits, None, None, None, None)
    for shift, column in ((1.0, 3), (-2.0, 300)):
        for target, new in zip(edits, tables([{column: (math.inf, 1.0, shift, 0.0)}], 512, "cuda")):
            target.copy_(new)
        graph.replay()
        expected = plain(source.clone(), up, 0, profile, *edits, None, None, None, None)
        assert torch.equal(gate, expected)
        unedited = plain(source.clone(), up, 0)
        assert (gate != unedited).any(0).nonzero().flatten().tolist() == [column]


@needs_gpu
def test_cuda_allocates_nothing():
    gate, up = inputs(300, 4096, torch.bfloat16, "cuda")
    statistics, group = new_statistics(2, 4096, "cuda"), torch.zeros(300, dtype=torch.int32, device="cuda")
    profile, edits = torch.ones(300, dtype=torch.int32, device="cuda"), tables([{3: (0.0, 1.0, 1.0, 0.0)}], 4096, "cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    glu_(gate, up, 0, profile, *edits, group, *statistics)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.fixture(scope="module")
def cuda_source(tmp_path_factory):
    """The kernels for a GPU as a function like glu_, run on the CPU."""
    return cuda_on_cpu.glu_of(cuda_on_cpu.build(tmp_path_factory.mktemp("cuda")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("separate", "fused", "strided", "ungated"))
@pytest.mark.parametrize("width", (1, 129, 264, 1134))
def test_cuda_source_computes_the_product(cuda_source, width, layout, dtype):
    for act in range(4):
        gate, up = inputs(5, width, dtype, seed=act, layout=layout)
        exact, theirs = reference(gate, up, act), ACTS[act](gate) if up is None else ACTS[act](gate) * up
        beside = None if up is None else up.clone()
        cuda_source(gate, up, act)
        assert_close(gate, exact, theirs, dtype)
        assert up is None or torch.equal(up, beside), "up was written"


@pytest.mark.parametrize("where", (pytest.param("GPU", marks=needs_gpu), "the GPU's source on the CPU"))
@pytest.mark.parametrize("dtype, tokens, width", (
    *((torch.float32, *shape) for shape in ((100, 300), (2100, 300), (2100, 301), (300, 2000), (300, 9000))),
    *((torch.bfloat16, *shape) for shape in ((5, 300), (100, 300), (300, 600), (2100, 301), (200, 4000), (200, 9000))),
    *((torch.float16, *shape) for shape in ((100, 300), (300, 600), (300, 601)))))
def test_cuda_and_cpu_agree(dtype, tokens, width, where, request):
    """Each of the GPU's ways to gather statistics: few tokens; many, in blocks of few and of many columns; in elements, where rows
    are not aligned. Tokens are in two groups and in none, and edits lie side by side. And edits without statistics."""
    gate, up = inputs(tokens, width, dtype)
    profiles = [{}, {3: (0.0, 1.0, 1.0, 0.5)}, {column: (1.0, -2.0, 0.5, 0.0) for column in (0, 1, 2, 130, 255, 256, width - 1)}]
    pick = torch.Generator().manual_seed(0)
    profile, group = (torch.randint(low, 4, (tokens,), generator=pick, dtype=torch.int32) for low in (0, -1))
    ways = (("cpu", glu_), ("cuda", glu_) if where == "GPU" else ("cpu", request.getfixturevalue("cuda_source")))
    results = []
    for device, call in ways:
        statistics, own, edited = new_statistics(2, width, device), gate.clone().to(device), gate.clone().to(device)
        edits = (profile.to(device), *tables(profiles, width, device))
        call(own, up.to(device), 3, *edits, group.to(device), *statistics)
        call(edited, up.to(device), 3, *edits, *(None,) * 4)
        results.append([tensor.cpu() for tensor in (own, edited, *statistics)])
    (cpu, cpu_edited, *counts, moments), (gpu, gpu_edited, *gpu_counts, gpu_moments) = results
    assert torch.allclose(cpu, gpu, rtol=1e-6) and torch.allclose(cpu_edited, gpu_edited, rtol=1e-6)
    assert torch.allclose(cpu, cpu_edited, rtol=1e-6) and all(map(torch.equal, counts, gpu_counts))
    assert torch.allclose(moments, gpu_moments, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("where", (pytest.param("GPU", marks=needs_gpu), "the GPU's source on the CPU"))
@pytest.mark.parametrize("act", range(4))
def test_cuda_looks_up_the_bins_that_it_computes(act, where, request):
    """Of every bfloat16 there is, not-a-number and subnormals too: many tokens look up what few compute. But for infinity, of
    which a CPU's gelu is not a number."""
    device, call = ("cuda", glu_) if where == "GPU" else ("cpu", request.getfixturevalue("cuda_source"))
    every = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int16).view(torch.bfloat16).view(256, 256)
    every[every.isinf()] = 0
    group, both = torch.zeros(256, dtype=torch.int32, device=device), []
    for tokens in (256, 128):
        count, sketch, moments = new_statistics(1, 256, device)
        for some in every.clone().to(device).split(tokens):
            call(some, torch.ones_like(some), act, *(None,) * 4, group[:tokens], count, sketch, moments)
        both.append((count.cpu(), sketch.cpu()))
    assert all(map(torch.equal, *both)) and int(both[0][0].sum()) == int((every > 0).sum())


def begun_at(start, values, device):
    """A tensor of these values that begins `start` elements into its memory."""
    return torch.empty(start + values.numel(), dtype=values.dtype, device=device)[start:].view_as(values).copy_(values)


@pytest.mark.parametrize("where", (pytest.param("GPU", marks=needs_gpu), "the GPU's source on the CPU"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (5, 200))
def test_cuda_rows_that_begin_anywhere(tokens, dtype, where, request):
    """Rows of whole words, but from an odd element on: of gate, up, or both. A card refuses an address that is not aligned, and so
    does the build for a CPU."""
    device, call = ("cuda", glu_) if where == "GPU" else ("cpu", request.getfixturevalue("cuda_source"))
    gate, up = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    group, results = torch.zeros(tokens, dtype=torch.int32, device=device), []
    for gate_start, up_start in ((0, 0), (1, 0), (0, 1), (1, 1)):
        plain, observed, factor = (begun_at(start, values, device) for start, values in ((gate_start, gate), (gate_start, gate), (up_start, up)))
        statistics = new_statistics(1, 64, device)
        call(plain, factor, 3, *(None,) * 8)
        call(observed, factor, 3, *(None,) * 4, group, *statistics)
        results.append((plain, observed, *statistics[:2]))
    assert all(map(torch.equal, results[0] * 3, sum(results[1:], ())))


@pytest.mark.parametrize("processors, room", ((108, 163), (82, 99), (1, 64)))
def test_cuda_blocks_are_as_wide_as_a_card_has_room(cuda_source, processors, room):
    """However many columns a block has on some card, in KiB of shared memory, the statistics are the same."""
    gate, up = inputs(200, 1032, torch.bfloat16)
    group, results = torch.arange(200, dtype=torch.int32) % 2, []
    for call in (cuda_source, cuda_on_cpu.glu_of(cuda_source.library, processors, room * 1024)):
        statistics = new_statistics(2, 1032, "cpu")
        call(gate.clone(), up, 3, *(None,) * 4, group, *statistics)
        results.append(statistics)
    (*counts, moments), (*other_counts, other_moments) = results
    assert all(map(torch.equal, counts, other_counts)) and torch.allclose(moments, other_moments, rtol=1e-12)
    assert counts[0].sum() > 0
