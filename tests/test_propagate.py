"23_propagate: against a loop that nobody can misread, its invariances, its memory, its faults, its speed."

import pytest
import torch

import timet_nb.features.propagate as room
from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.features.propagate import (Propagator, blend, blend_official, ids_to_grid, neighbourhood, propagate,
                                         unit_tokens)


def neighbourhood_slow(h, w, radius):
    out = torch.zeros(h * w, h * w, dtype=torch.bool)
    for i in range(h):
        for j in range(w):
            for a in range(h):
                for b in range(w):
                    out[i * w + j, a * w + b] = radius == 0 or max(abs(a - i), abs(b - j)) <= radius
    return out


def propagate_slow(features, labels, n_last, topk, radius, temperature):
    "One patch at a time, in float64."
    T, D, h, w = features.shape
    x = torch.nn.functional.normalize(features.double().flatten(2).transpose(1, 2), dim=-1)
    maps, near = [labels.double().flatten(1).T], neighbourhood_slow(h, w, radius)
    for t in range(1, T):
        context = [0, *range(max(1, t - n_last), t)] if n_last else [0]
        rows = []
        for q in range(h * w):
            found = [(float(x[t, q] @ x[c, s]), maps[c][s]) for c in context for s in range(h * w) if near[q, s]]
            best = sorted(found, key=lambda f: -f[0])[:topk]
            weight = torch.tensor([f[0] / temperature for f in best], dtype=torch.float64).softmax(0)
            rows.append(sum(p * f[1] for p, f in zip(weight, best)))
        maps.append(torch.stack(rows))
    return torch.stack([m.T.unflatten(1, (h, w)) for m in maps[1:]])


def clip(T=5, D=8, h=4, w=6, K=3, seed=0, B=None):
    g = torch.Generator().manual_seed(seed)
    lead = () if B is None else (B,)
    return torch.randn(*lead, T, D, h, w, generator=g), torch.rand(*lead, K, h, w, generator=g).softmax(-3)


@pytest.mark.parametrize("h,w,r", [(1, 1, 1), (3, 5, 1), (4, 6, 2), (7, 2, 3), (5, 5, 9), (3, 4, 0)])
def test_neighbourhood_equals_four_loops(h, w, r):
    assert torch.equal(neighbourhood(h, w, r), neighbourhood_slow(h, w, r))


@pytest.mark.parametrize("n_last,topk,radius", [(7, 5, 2), (1, 3, 1), (0, 4, 0), (2, 1, 6), (2, 500, 0), (3, 30, 1)])
@pytest.mark.parametrize("official", [False, True])
def test_equals_the_loop(n_last, topk, radius, official):
    f, l = clip()
    slow = propagate_slow(f, l, n_last, topk, radius, .1)
    fast = propagate(f, l, n_last, topk, radius, .1, official=official)
    assert fast.shape == (4, 3, 4, 6) and fast.dtype == (torch.float64 if official else torch.float32)
    assert (fast - slow).abs().max() < 2e-6


@pytest.mark.parametrize("official", [False, True])
def test_batch_chunk_and_stream_do_not_matter(official):
    f, l = clip(B=3, T=6, h=5, w=3)
    both = propagate(f, l, 2, 4, 2, official=official)
    alone = torch.stack([propagate(a, b, 2, 4, 2, official=official) for a, b in zip(f, l)])
    chunked = propagate(f, l, 2, 4, 2, official=official, chunk=3)
    stream = Propagator(l, f[:, 0], 2, 4, 2, official=official)
    stepped = torch.stack([stream.step(x) for x in f[:, 1:].unbind(1)], 1)
    for other in (alone, chunked, stepped): assert (both - other).abs().max() < 1e-6


def test_invariances():
    f, l = clip(T=4)
    out = propagate(f, l)
    assert (out.sum(1) - 1).abs().max() < 1e-6                                            # still a distribution
    assert (propagate(f * 7.3, l) - out).abs().max() < 1e-5                                # length does not count
    assert torch.equal(propagate(f, l[[2, 0, 1]]), out[:, [2, 0, 1]])                      # names of classes
    flipped = propagate(f.flip(-1), l.flip(-1)).flip(-1)
    assert (flipped - out).abs().max() < 1e-6                                              # mirror
    assert (propagate(f.double(), l, dtype=torch.float64) - out).abs().max() < 1e-5
    assert (propagate(f.half(), l) - out).abs().max() < .05                                # half in, float32 inside
    assert propagate(f.bfloat16(), l).dtype == torch.float32


def test_a_frozen_clip_keeps_its_labels():
    f, l = clip(T=1)
    still = f.expand(5, -1, -1, -1)
    assert (propagate(still, l, topk=1) - l).abs().max() < 1e-6


def test_a_moving_patch_takes_its_label_along():
    x = torch.randn(1, 16, 6, 6, generator=torch.Generator().manual_seed(3))
    rolled = torch.cat([x.roll(t, -1) for t in range(4)])
    ids = torch.zeros(6, 6, dtype=torch.long); ids[2:4, 1:3] = 1
    out = propagate(rolled, ids_to_grid(ids, 2, (6, 6)), topk=1, radius=0).argmax(1)
    for t in range(3): assert torch.equal(out[t], ids.roll(t + 1, -1))


def test_frame_0_is_kept_for_ever_and_the_rest_is_a_queue():
    f, l = clip(T=12, D=6)
    stream = Propagator(l, f[0], n_last=2)
    for x in f[1:]: stream.step(x)
    assert stream.sources.shape[0] == 3 and stream.seen == 12                              # memory does not grow
    kept = {tuple(s[0, 0].tolist()) for s in stream.sources}
    assert kept == {tuple(unit_tokens(f[t][None])[0, 0].tolist()) for t in (0, 10, 11)}


def test_k_beyond_the_sources_is_clamped():
    f, l = clip(T=2, h=1, w=2)
    assert (propagate(f, l, topk=99, radius=0) - propagate(f, l, topk=2, radius=0)).abs().max() == 0
    near = torch.tensor([[True, False], [True, True]])
    q, s = unit_tokens(f[1:]), unit_tokens(f[:1])[None]
    for rule in (blend, blend_official):                                                   # fewer near than k
        out = rule(q, s, l.flatten(1).T[None, None].contiguous(), near, 5, .1)
        assert torch.allclose(out[0, 0].float(), l.flatten(1)[:, 0]) and out.isfinite().all()


@pytest.mark.parametrize("official", [False, True])
def test_vanishing_affinities_never_give_nan(official):
    a = torch.zeros(2, 2, 2, 3); a[0, 0], a[1, 0], a[:, 1, 0, 0] = 1, -1, .5               # exp(-1000) is 0
    out = propagate(a, torch.rand(2, 2, 3), temperature=1e-3, radius=1, official=official)
    assert out.isfinite().all()


def test_ties_are_kept_only_by_the_official_rule():
    sources = torch.tensor([1., 0.]).expand(1, 1, 4, 2).contiguous()                       # four equal sources
    labels = torch.eye(4)[None, None]
    target = torch.tensor([[[1., 0.]]])
    assert torch.allclose(blend_official(target, sources, labels, None, 2)[0, 0].float(), torch.full((4,), .25))
    ours = blend(target, sources, labels, None, 2)[0, 0]
    assert sorted(ours.tolist()) == [0, 0, .5, .5]


def test_first_labels_may_have_another_size():
    f, l = clip(h=4, w=6)
    fine = l.repeat_interleave(3, 1).repeat_interleave(3, 2)
    assert torch.equal(propagate(f, fine), propagate(f, l))


@pytest.mark.parametrize("value,word", [(float("nan"), "NaN"), (float("inf"), "NaN"), (0., "zero length")])
def test_bad_features_name_the_frame_and_the_patch(value, word):
    f, l = clip(T=5)
    f[3, :, 1, 2] = value
    with pytest.raises(DataError, match=rf"frame 3(.|\n)*{word}(.|\n)*patch 8"): propagate(f, l)


def test_constant_features_name_the_frame():
    f, l = clip(T=3)
    f[2] = f[2, :, :1, :1]
    with pytest.raises(DataError, match="frame 2(.|\n)*same at all 24 patches"): propagate(f, l)
    one = torch.randn(3, 8, 1, 1)
    assert propagate(one, torch.ones(2, 1, 1)).shape == (2, 2, 1, 1)                       # one patch is never constant


def test_other_faults():
    f, l = clip()
    with pytest.raises(ConfigError, match="topk"): propagate(f, l, topk=0)
    with pytest.raises(ConfigError, match="temperature"): propagate(f, l, temperature=0)
    with pytest.raises(ConfigError, match="radius"): propagate(f, l, radius=-1)
    with pytest.raises(DataError, match="T >= 2"): propagate(f[:1], l)
    with pytest.raises(DataError, match="labels"): propagate(f, l[None].expand(2, -1, -1, -1))
    with pytest.raises(DataError, match="labels(.|\n)*NaN"): propagate(f, l * float("nan"))
    stream = Propagator(l, f[0])
    with pytest.raises(DataError, match="frame 1(.|\n)*one grid"): stream.step(f[1][:, :2])
    with pytest.raises(DataError): stream.step(f[1][:4])


def test_no_gradient_leaks():
    f, l = clip()
    assert not propagate(f.requires_grad_(), l.requires_grad_()).requires_grad


def test_similarities_stay_within_the_budget(monkeypatch):
    f, l = clip(T=6, h=12, w=10)
    whole = propagate(f, l)
    seen = []
    inner = room.blend
    def spy(target, sources, *a):
        seen.append(4 * target.shape[0] * target.shape[1] * sources.shape[0] * sources.shape[2]); return inner(target, sources, *a)
    monkeypatch.setattr(room, "blend", spy)
    monkeypatch.setattr(room, "LOGIT_BYTES", 60_000)
    assert (propagate(f, l) - whole).abs().max() < 1e-6
    assert max(seen) <= 60_000 and len(seen) > 5


def test_ids_to_grid():
    ids = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 1], [255, 255, 255, 0], [255, 255, 0, 2]])
    soft = ids_to_grid(ids, 3, (2, 2))
    assert torch.allclose(soft[:, 0, 0], torch.tensor([.75, 0, .25])) and torch.allclose(soft[:, 0, 1], torch.tensor([0., 1, 0]))
    assert torch.allclose(soft[:, 1, 0], torch.tensor([1., 0, 0]))                          # nothing but 255: background
    assert torch.allclose(soft[:, 1, 1], torch.tensor([2 / 3, 0, 1 / 3]))                   # 255 counts for no class
    assert (ids_to_grid(ids.expand(2, 4, 4), 3, (2, 2), "nearest").sum(1) == 1).all()
    with pytest.raises(DataError, match="id 2"): ids_to_grid(ids, 2, (2, 2))
    with pytest.raises(ConfigError, match="area"): ids_to_grid(ids, 3, (2, 2), "middle")


def test_equals_the_key_axis_form():
    "30 x 54 patches, 8 context frames, radius 12; the rival sorts a dense matrix along its source axis."
    h, w, D, K, C = 30, 54, 384, 2, 8
    x = torch.nn.functional.normalize(torch.randn(C + 1, h * w, D), dim=-1)
    labels, near = torch.rand(C, h * w, K), neighbourhood(h, w, 12).float()

    def key_axis(target, sources):
        aff = ((sources @ target.T) / .1).exp() * near
        aff = aff.reshape(-1, h * w)
        aff[aff < aff.topk(5, dim=0).values[-1]] = 0
        return labels.reshape(-1, K).T @ (aff / aff.sum(0))

    stream = Propagator(torch.rand(K, h, w), x[0].T.unflatten(1, (h, w)), radius=12)
    stream.sources[:, 0], stream.labels[:, 0], stream.seen = x[:C], labels, C
    assert (key_axis(x[C], x[:C]).T - stream._label(x[C:])[0]).abs().max() < 1e-5
