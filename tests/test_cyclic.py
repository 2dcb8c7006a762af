"The cyclic-consistent attention: the walk, the row that never dies, masks of a batch, the layer without keys."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.dcsam.cyclic import CyclicAttention, CyclicLayer, cycle_keeps, cyclic_attention, head_masks, round_trip


@st.composite
def heads(draw, values=st.integers(-2, 2)):
    "Scores of few values, so that ties are everywhere, and a mask."
    L, S = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    scores = draw(st.lists(st.lists(values, min_size=S, max_size=S), min_size=L, max_size=L))
    mask = draw(st.lists(st.booleans(), min_size=S, max_size=S))
    return torch.tensor(scores, dtype=torch.float), torch.tensor(mask)


@settings(deadline=None, max_examples=150)
@given(heads())
def test_no_row_dies(case):
    "The first key that has the greatest score returns to itself, whatever the mask and the ties."
    scores, mask = case
    first = int((scores == scores.max()).any(0).nonzero()[0])
    assert round_trip(scores)[1][first] == first
    assert cycle_keeps(scores, mask)[first]
    out, weights = cyclic_attention(torch.eye(len(scores)), scores.T * math.sqrt(len(scores)), torch.ones(len(mask), 2), mask)
    assert torch.isfinite(weights).all() and torch.allclose(weights.sum(-1), torch.ones(len(scores)))


@settings(deadline=None, max_examples=100)
@given(heads(st.floats(-9, 9, width=32)))
def test_the_walk_is_the_formula(case):
    "Against loops; equal scores of two queries may send a key to either, so those cases say less."
    scores, mask = case
    A, m = scores.tolist(), mask.tolist()
    got = cycle_keeps(scores, mask).tolist()
    for j in range(len(m)):
        best = max(row[j] for row in A)
        ends = {m[row.index(max(row))] for row in A if row[j] == best}
        assert got[j] in {m[j] == e for e in ends}


@settings(deadline=None, max_examples=60)
@given(heads(), st.randoms(use_true_random=False))
def test_the_other_side_and_the_order_of_queries_do_not_matter(case, dice):
    scores, mask = case
    scores = scores + torch.arange(scores.numel()).view(scores.shape) * 1e-3          # no ties
    keep = cycle_keeps(scores, mask)
    assert torch.equal(keep, cycle_keeps(scores, ~mask))
    order = list(range(len(scores))); dice.shuffle(order)
    assert torch.equal(keep, cycle_keeps(scores[order], mask))
    assert cycle_keeps(scores, mask | True).all() and cycle_keeps(scores, mask & False).all()


def layer_and_input(B=3, S=50, D=24, L=6, heads=4, seed=0, **switches):
    torch.manual_seed(seed)
    layer = CyclicAttention(D, heads, **switches).eval()
    nn.init.normal_(layer.in_proj_bias); nn.init.normal_(layer.out_proj.bias)
    return layer, (torch.randn(B, L, D), torch.randn(B, S, D), (torch.rand(B, S) < .4), torch.randn(S, D))


def plain(layer, query, memory, mask, pos):
    "Keys, values and one head after the other."
    d, outs = layer.dim // layer.heads, []
    w, b = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    q, k, v = query @ w[0].T + b[0], (memory + pos) @ w[1].T + b[1], memory @ w[2].T + b[2]
    masks = head_masks(mask, layer.heads, layer.official_batch_order)
    for h in range(layer.heads):
        at = slice(h * d, (h + 1) * d)
        outs.append(cyclic_attention(q[..., at], k[..., at], v[..., at], masks[:, h] if layer.cycle else None)[0])
    return layer.out_proj(torch.cat(outs, -1))


@pytest.mark.parametrize("switches", [{}, dict(cycle=False), dict(official_batch_order=True)])
def test_the_layer_without_keys_is_the_layer_with_keys(switches):
    layer, args = layer_and_input(**switches)
    assert torch.allclose(layer(*args), plain(layer, *args), atol=1e-5)
    out, weights = layer(*args, weights=True)
    assert torch.equal(out, layer(*args)) and weights.shape == (3, 4, 6, 50)


def test_positions_may_differ_by_sample():
    layer, (query, memory, mask, pos) = layer_and_input()
    places = torch.stack([pos, pos.flip(0), -pos])
    each = torch.cat([layer(query[b:b + 1], memory[b:b + 1], mask[b:b + 1], places[b]) for b in range(3)])
    assert torch.allclose(layer(query, memory, mask, places), each, atol=1e-6)


@pytest.mark.parametrize("B", [1, 2, 5])
def test_a_sample_is_not_changed_by_its_company(B):
    layer, (query, memory, mask, pos) = layer_and_input(B)
    each = torch.cat([layer(query[b:b + 1], memory[b:b + 1], mask[b:b + 1], pos) for b in range(B)])
    assert torch.allclose(layer(query, memory, mask, pos), each, atol=1e-6)
    layer.official_batch_order = True
    assert torch.allclose(layer(query, memory, mask, pos), each, atol=1e-6) == (B == 1)


def test_torchs_attention_when_the_cycle_is_off():
    layer, (query, memory, mask, pos) = layer_and_input(cycle=False)
    other = nn.MultiheadAttention(24, 4, batch_first=True).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(query, memory, mask, pos), other(query, memory + pos, memory)[0], atol=1e-5)


def test_gradients_equal_those_of_the_plain_way():
    layer, args = layer_and_input()
    got = []
    for f in (lambda: layer(*args), lambda: plain(layer, *args)):
        layer.zero_grad(); f().pow(2).sum().backward()
        got.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*got): assert torch.allclose(a, b, atol=1e-4)


def test_a_blank_picture_gives_numbers():
    "All scores equal: every key walks to the first one, and those of its side are heard."
    layer, (query, memory, mask, pos) = layer_and_input()
    out = layer(query * 0, memory * 0, mask, pos * 0)
    assert torch.isfinite(out).all()


def test_the_walk_lets_gradients_through_only_what_is_heard():
    layer, (query, memory, mask, _) = layer_and_input(B=1, heads=1)
    x = memory.clone().requires_grad_()
    out, weights = layer(query, x, mask, None, weights=True)
    out.sum().backward()
    deaf = (weights == 0).all(2).all(1)[0]
    assert deaf.any() and (x.grad[0][deaf] == 0).all() and (x.grad[0][~deaf] != 0).any(1).all()


def test_names_are_the_published_ones():
    names = {f"{a}.{b}" for a, bs in dict(multihead_attn=("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"),
                                          norm=("weight", "bias")).items() for b in bs}
    assert set(CyclicLayer(32, 4).state_dict()) == names


def test_faults():
    layer, (query, memory, mask, pos) = layer_and_input()
    with pytest.raises(DataError, match=r"mask: got shape \(3, 49\)"): layer(query, memory, mask[:, :-1], pos)
    with pytest.raises(DataError, match="mask"): layer(query, memory, mask[:2], pos)
    with pytest.raises(ConfigError, match="heads"): CyclicAttention(30, 4)


def test_no_keys_are_held():
    "Under no_grad the layer makes no tensor as big as the keys of the whole batch."
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel(): sizes.append(out.untyped_storage().nbytes() // out.element_size())
            return out
    layer, (query, memory, mask, pos) = layer_and_input(B=4, S=400, D=64, L=3)
    own = memory.numel()
    with torch.no_grad(), Watch(): layer(query, memory.view(4, 400, 64), mask, None)
    assert sorted({s for s in sizes if s >= own}) in ([], [own])          # views of the memory itself


def test_whose_mask_each_row_reads():
    own = torch.arange(3)[:, None]
    assert head_masks(own, 2)[..., 0].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert head_masks(own, 2, True)[..., 0].tolist() == [[0, 1], [2, 0], [1, 2]]          # rows 0 to 5, modulo 3
