"Pieces of few-shot relearning: pseudo mask, giraffe graph and neck, the three losses. Properties, edge cases and faults."
import copy

import pytest
import torch
from torch.nn import functional as F

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.relearn.giraffe import GiraffeNeck, Joint, giraffe_graph, giraffe_state, resample
from timet_nb.relearn.losses import (ConsistencyConfig, consistency, feature_loss, frame_cosines, prediction_loss, safe_cosine,
                                     temporal_loss)
from timet_nb.relearn.prior import (HOWS, MASKINGS, cosine_maps, enlarge, masked_features, masked_images, masked_support, min_max,
                                    object_cells, pseudo_mask)


def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(q, s, how):
    "(C, h, w) against (C, h', w'), one pair after the other."
    unit = lambda v: v / max(float(v.norm()), 1e-8)
    cells, out = [c for c in s.flatten(1).T], []
    for i, v in enumerate(q.flatten(1).T):
        each = [float(unit(v) @ unit(c)) for c in cells]
        out.append({"max": max(each), "same": each[i] if i < len(each) else 0., "mean": sum(each) / len(each),
                    "prototype": float(unit(v) @ unit(s.flatten(1).mean(1)))}[how])
    return torch.tensor(out).view(q.shape[1:])


# pseudo mask
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("pairs", [1, 50, 1 << 22])
def test_cosine_maps_are_the_loops_in_pieces_of_any_size(how, pairs):
    q, s = rand(2, 5, 3, 4), rand(2, 3, 5, 3, 4, seed=1)
    want = torch.stack([torch.stack([slow(q[b], s[b, k], how) for k in range(3)]) for b in range(2)])
    torch.testing.assert_close(cosine_maps(q, s, how, pairs=pairs), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(cosine_maps(q.requires_grad_(), s, how, pairs=pairs), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", HOWS)
def test_one_support_serves_many_queries(how):
    q, s = rand(3, 5, 4, 4), rand(1, 2, 5, 4, 4, seed=1)
    torch.testing.assert_close(pseudo_mask(q, s, how), pseudo_mask(q, s.expand(3, -1, -1, -1, -1), how))


@pytest.mark.parametrize("how", ["max", "mean", "prototype"])
def test_grids_may_differ_except_for_same(how):
    q, s = rand(2, 5, 4, 6), rand(2, 1, 5, 3, 3, seed=1)
    maps = cosine_maps(q, s, how)
    assert maps.shape == (2, 1, 4, 6)
    torch.testing.assert_close(maps[1, 0], slow(q[1], s[1, 0], how), atol=1e-5, rtol=0)
    with pytest.raises(DataError, match=r"\(4, 6\).*\(3, 3\)"): cosine_maps(q, s, "same")


def test_gradient_of_max_is_that_of_the_whole_matrix():
    q, s = rand(2, 5, 4, 4).requires_grad_(), rand(2, 2, 5, 3, 4, seed=1).requires_grad_()
    w = rand(2, 2, 4, 4, seed=2)
    ours = torch.autograd.grad((cosine_maps(q, s, pairs=30) * w).sum(), (q, s))
    a, b = F.normalize(q.flatten(2), dim=1), F.normalize(s.flatten(3), dim=2)
    plain = torch.einsum("bcn,bkcm->bknm", a, b).amax(3).view(2, 2, 4, 4)
    for x, y in zip(ours, torch.autograd.grad((plain * w).sum(), (q, s))): torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_max_holds_few_pairs_at_a_time(monkeypatch):
    seen, plain = [], torch.Tensor.max
    monkeypatch.setattr(torch.Tensor, "max", lambda x, *a, **k: (seen.append(x.numel()), plain(x, *a, **k))[1])
    cosine_maps(rand(2, 3, 20, 20), rand(2, 2, 3, 10, 10, seed=1), pairs=4000)
    assert max(seen) <= 4000 and sum(seen) == 2 * 2 * 400 * 100


@pytest.mark.parametrize("how", HOWS)
def test_constant_features_give_no_mask(how):
    ones = torch.full((1, 64, 9, 7), .3)
    assert not pseudo_mask(ones, ones[:, None], how).any()


def test_min_max_reaches_both_ends_and_rounding_is_constant():
    raw = rand(3, 5, 6)
    y = min_max(raw)
    assert y.min() == 0 and y.amax((1, 2)).sub(1).abs().max() < 1e-6 and (y.flatten(1).argmax(1) == raw.flatten(1).argmax(1)).all()
    assert not min_max(.7 + 3e-7 * rand(1, 5, 6).sign()).any()      # rounding is not stretched
    assert min_max(.7 + 1e-4 * raw).max() > .9                      # a small difference is
    assert not min_max(torch.ones(2, 1, 1)).any()                   # one cell


def test_zero_vectors_resemble_nothing_and_have_finite_gradients():
    q, s = rand(1, 4, 3, 3), torch.zeros(1, 1, 4, 3, 3)
    q.requires_grad_(); s.requires_grad_()
    for how in HOWS:
        maps = cosine_maps(q, s, how)
        assert not maps.any() and not pseudo_mask(q, s, how).any()
    half = rand(1, 1, 4, 3, 3, seed=1); half[..., 0, :] = 0
    holes = rand(1, 4, 3, 3, seed=2); holes[..., 0, 0] = 0; holes.requires_grad_(); half.requires_grad_()
    for how in HOWS:
        for g in torch.autograd.grad(pseudo_mask(holes, half, how).square().sum(), (holes, half)):
            assert g.isfinite().all() and g.abs().max() < 100          # not 1 / clamp


def test_shots_are_averaged_before_the_one_stretch():
    q, s = rand(2, 6, 5, 5), rand(2, 3, 6, 5, 5, seed=1)
    torch.testing.assert_close(pseudo_mask(q, s), min_max(cosine_maps(q, s).mean(1)))
    torch.testing.assert_close(pseudo_mask(q, s), pseudo_mask(q, s[:, [2, 0, 1]]))
    torch.testing.assert_close(pseudo_mask(q, s[:, :1].expand(-1, 4, -1, -1, -1)), pseudo_mask(q, s[:, :1]))


def test_masked_images_edges():
    x, m = torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
    assert not masked_images(x, m).any()                            # empty: a black image
    assert torch.equal(masked_images(x, m + 1), x)                  # all object: the image itself
    m[0, 0, 0], m[0, 0, 1], m[0, 0, 2] = 1, 255, 2
    got = masked_images(x, m)
    assert torch.equal(got[0, :, 0, 0], x[0, :, 0, 0]) and got.count_nonzero() == x[0, :, 0, 0].count_nonzero()
    assert torch.equal(masked_images(x, m, 2)[0, :, 0, 2], x[0, :, 0, 2])
    assert torch.equal(masked_images(x, m > 0)[0, :, 0, 2], x[0, :, 0, 2])
    with pytest.raises(DataError, match="as the images"): masked_images(x, m[:, :3])


def test_empty_and_full_support_masks_have_a_defined_pseudo_mask():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8)).eval()
    x, q = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        for m in (torch.zeros(1, 8, 8), torch.ones(1, 8, 8)):
            s = net(masked_images(x, m))
            assert s.abs().max() > 0                                # biases: not zero vectors
            p = pseudo_mask(net(q), s[:, None])
            assert p.isfinite().all() and 0 <= p.min() and p.max() <= 1


def test_object_cells_keep_small_objects_and_drop_ignore():
    m = torch.zeros(5, 6, 12, dtype=torch.long)
    m[0, :3, :3], m[1, 5, 11], m[3, :3, :3], m[4] = 1, 1, 255, 1     # half of one cell; a pixel; nothing; ignore; all
    m[0, 3:, 6:9] = 2
    got = object_cells(m, (2, 2)).int()
    assert got[0].tolist() == [[1, 0], [0, 0]] and got[1].tolist() == [[0, 0], [0, 1]]
    assert not got[2].any() and not got[3].any() and got[4].all()
    assert object_cells(m[:1], (2, 2), 2)[0].int().tolist() == [[0, 0], [0, 1]]
    assert object_cells(m[0], (4, 5)).shape == (4, 5) and object_cells(m[None], (3, 3)).shape == (1, 5, 3, 3)


def test_masked_support_three_ways():
    net = torch.nn.Conv2d(3, 4, 3, padding=1); x, m = torch.rand(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long); m[:, 2:6, 2:6] = 1
    got = {k: masked_support(net, x, m, k) for k in MASKINGS}
    assert torch.equal(got["image"], net(masked_images(x, m))) and torch.equal(got["features"], net(x) * (m == 1)[:, None])
    assert torch.equal(got["both"], got["image"] * (m == 1)[:, None])
    assert torch.equal(masked_features(got["image"], m.repeat_interleave(3, 1).repeat_interleave(3, 2)), got["both"])    # masks of any size
    assert not pseudo_mask(torch.rand(1, 4, 8, 8), masked_support(net, x, m * 0, "both")[None]).any()
    with pytest.raises(ConfigError, match="image, features, both"): masked_support(net, x, m, "twice")
    with pytest.raises(DataError, match="as the images"): masked_support(net, x, m[:, :4], "features")
    with pytest.raises(DataError, match="as features"): masked_features(got["image"], m[:1])


@pytest.mark.parametrize("query,support,how,word", [
    ((2, 4, 3, 3), (2, 1, 4, 3, 3), "best", "max, same, mean, prototype"), ((2, 4, 3, 3), (2, 4, 3, 3), "max", "K, C"),
    ((2, 4, 3, 3), (3, 1, 4, 3, 3), "max", "B or 1"), ((2, 4, 3, 3), (2, 1, 5, 3, 3), "max", "one C"), ((2, 4, 3, 3), (2, 0, 4, 3, 3), "max", "K >= 1")])
def test_prior_refuses(query, support, how, word):
    with pytest.raises(ConfigError if how == "best" else DataError, match=word): pseudo_mask(torch.ones(query), torch.ones(support), how)


def test_prior_names_the_sample_with_nan():
    q, s = rand(3, 4, 3, 3), rand(1, 2, 4, 3, 3); q[2, 1, 0, 0] = float("nan")
    with pytest.raises(DataError, match="query features.*sample 2"): pseudo_mask(q, s)
    s[0, 1, 0, 0, 0] = float("inf")
    with pytest.raises(DataError, match="support features.*sample 0"): pseudo_mask(q[:2], s)


def test_enlarge_keeps_leading_axes():
    x = rand(2, 3, 4, 5)
    torch.testing.assert_close(enlarge(x, (8, 11)), F.interpolate(x, (8, 11), mode="bilinear", align_corners=False))
    torch.testing.assert_close(enlarge(x[0, 0], (8, 11)), enlarge(x, (8, 11))[0, 0])
    torch.testing.assert_close(enlarge(x[:, 0], (4, 5)), x[:, 0])


# giraffe
@pytest.mark.parametrize("levels", [2, 3, 4, 6])
@pytest.mark.parametrize("layers", [1, 2, 3, 8, 13])
def test_graphs_of_any_size_can_be_walked(levels, layers):
    g = giraffe_graph(levels, layers)
    assert [n.id for n in g] == list(range(levels, levels * (layers + 2)))
    for n in g:
        assert len(n.inputs) == len(n.kinds) == len(set(n.inputs)) and max(n.inputs) < n.id
        if not n.output: assert n.layer <= layers
    outputs = [n for n in g if n.output]
    assert [n.level for n in outputs] == list(range(levels)) and {n.kinds for n in outputs} == {("output",)}
    level = {**{i: i for i in range(levels)}, **{n.id: n.level for n in g}}
    for n in g:
        for i, kind in zip(n.inputs, n.kinds):
            want = {"same": 0, "skip": 0, "output": 0, "coarser": 1, "finer": -1, "step": 1 if n.layer % 2 else -1}[kind]
            assert level[i] - n.level == want


def test_skips_reach_back_by_powers_of_two():
    g = giraffe_graph(2, 9)
    layer = {**{0: 0, 1: 0}, **{n.id: n.layer for n in g}}
    last = next(n for n in g if n.layer == 9 and n.level == 0)
    gaps = [9 - layer[i] for i, k in zip(last.inputs, last.kinds) if k in ("same", "skip")]
    assert gaps == [8, 4, 2, 1]


@pytest.mark.parametrize("levels,layers", [(1, 3), (3, 0)])
def test_small_graphs_are_refused(levels, layers):
    with pytest.raises(ConfigError, match="2 or more levels"): giraffe_graph(levels, layers)


def test_kinds_can_be_left_out_but_not_a_level():
    whole = giraffe_graph(4, 5)
    for without in ((), ("skip",), ("step",), ("coarser", "finer"), ("skip", "step", "coarser", "finer")):
        for a, b in zip(whole, giraffe_graph(4, 5, without), strict=True):
            assert (b.id, b.level, b.layer, b.output) == (a.id, a.level, a.layer, a.output) and b.inputs
            assert list(zip(b.inputs, b.kinds)) == [e for e in zip(a.inputs, a.kinds) if e[1] not in without]
    assert all(y.shape == (2, 5, *x.shape[2:]) for x, y in zip(maps(), GiraffeNeck((4, 6, 8), 5, without=("step",)).eval()(maps())))
    for bad in ("same", "output", "steps"):
        with pytest.raises(ConfigError, match="skip, step, coarser, finer"): giraffe_graph(3, 3, (bad,))


def maps(sizes=((16, 24), (8, 12), (4, 6)), channels=(4, 6, 8), batch=2): return [rand(batch, c, *s, seed=c) for c, s in zip(channels, sizes)]


@pytest.mark.parametrize("sizes", [((16, 24), (8, 12), (4, 6)), ((17, 23), (9, 12), (5, 6)), ((12, 12), (12, 12), (6, 6)), ((20, 20), (5, 5), (2, 2))])
def test_neck_keeps_the_grids_and_the_inputs(sizes):
    x = maps(sizes); given, before = list(x), [v.clone() for v in x]
    y = GiraffeNeck((4, 6, 8), 5).eval()(x)
    assert [v.shape[1:] for v in y] == [(5, *s) for s in sizes]
    assert len(x) == 3 and all(a is b for a, b in zip(x, given)) and all(torch.equal(a, b) for a, b in zip(x, before))


def test_neck_options_are_not_modified():
    width, out = [7, 8, 9], (5, 6, 7)
    made = GiraffeNeck((4, 6, 8), out, 2, width)
    assert width == [7, 8, 9] and made.width == (7, 8, 9)
    assert [v.shape[1] for v in made.eval()(maps())] == list(out)


def test_resample_up_repeats_and_down_takes_the_largest():
    x = torch.arange(16.).view(1, 1, 4, 4)
    assert torch.equal(resample(x, (8, 8)), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(resample(x, (2, 2)), F.max_pool2d(x, 3, 2, 1)) and resample(x, (4, 4)) is x
    assert resample(x, (1, 1)).item() == 15


def test_neck_learns_everywhere():
    made = GiraffeNeck((4, 6, 8), 5, 3)
    sum(v.square().sum() for v in made(maps())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("change,word", [(lambda x: x[:2], "3 maps"), (lambda x: x[::-1], "fine to coarse"), (lambda x: [x[0], x[1], x[2][:1]], "one B"),
                                         (lambda x: [x[0][..., :2, :2], x[1], x[2]], "do not grow")])
def test_neck_refuses_maps(change, word):
    with pytest.raises(DataError, match=word): GiraffeNeck((4, 6, 8), 5)(change(maps()))


@pytest.mark.parametrize("options", [dict(out=(5, 5)), dict(out=5, width=(1, 2)), dict(out=0)])
def test_neck_refuses_widths(options):
    with pytest.raises(ConfigError, match="one per level"): GiraffeNeck((4, 6, 8), **options)


def official(made):
    names = {"mix": "conv1x1", "conv": "conv.conv", "norm": "conv.bn"}
    split = lambda k: k.split(".", 3)
    return {f"neck.cell.giraffeNeck.fnode.{i}.after_combine.{names[part]}.{rest}": v for k, v in made.state_dict().items()
            for _, i, part, rest in [split(k)]}


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("read", [(0,), (2,), (0, 1), (1,)])
def test_a_neck_read_at_some_levels_gives_the_bits_of_the_whole(read, layers):
    whole, part = GiraffeNeck((4, 6, 8), (3, 4, 5), layers).eval(), GiraffeNeck((4, 6, 8), (3, 4, 5), layers, read=read).eval()
    part.load(official(whole))                           # names are places in the whole graph, whatever is spared
    for y, level in zip(part(maps()), read, strict=True): assert torch.equal(y, whole(maps())[level])
    sum(y.sum() for y in part.train()(maps())).backward()
    assert all(p.grad is not None for p in part.parameters()) and len(part.joints) < len(whole.joints)
    again = GiraffeNeck((4, 6, 8), (3, 4, 5), layers, read=read); again.load(part.state_dict())
    for a, b in zip(part.eval()(maps()), again.eval()(maps())): assert torch.equal(a, b)


def test_a_spared_joint_costs_no_draw_of_the_seed():
    torch.manual_seed(4); whole = GiraffeNeck((4, 6, 8), 5, 2)
    torch.manual_seed(4); part = GiraffeNeck((4, 6, 8), 5, 2, read=(0,))
    for k, v in part.state_dict().items(): assert torch.equal(v, whole.state_dict()[k])


@pytest.mark.parametrize("read", [(), (3,), (-1,)])
def test_levels_that_are_not_there_cannot_be_read(read):
    with pytest.raises(ConfigError, match="levels 0 to 2"): GiraffeNeck((4, 6, 8), 5, read=read)


def test_official_names_load_and_incomplete_files_do_not():
    a, b = GiraffeNeck((4, 6, 8), 5), GiraffeNeck((4, 6, 8), 5)
    state = official(a) | {"backbone.conv.weight": torch.ones(1)}
    b.load(state)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    b.load(a.state_dict())
    assert giraffe_state(state).keys() == a.state_dict().keys()
    before = copy.deepcopy(b.state_dict()); state.pop(next(k for k in state if "fnode.4" in k))
    with pytest.raises(CheckpointError): b.load(state)
    with pytest.raises(CheckpointError): GiraffeNeck((4, 6, 9), 5).load(official(a))
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())


def test_eps_reaches_every_norm():
    made = GiraffeNeck((4, 6, 8), 5, eps=1e-3)
    assert {m.eps for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-3} and Joint(2, 3).norm.eps == 1e-5


# losses
@pytest.mark.parametrize("T", [2, 5])
@pytest.mark.parametrize("axis", ["pixel", "whole"])
def test_still_frames_reach_the_floor(T, axis):
    f = rand(1, 4, 3, 3).expand(T, -1, -1, -1)
    assert temporal_loss(f, axis, "paper").item() == pytest.approx(1 / T, abs=1e-6)
    assert temporal_loss(f, axis, "pairs").item() == pytest.approx(0, abs=1e-6)
    other = rand(T, 4, 3, 3, seed=2)
    assert temporal_loss(other, axis, "paper") > 1 / T and temporal_loss(-other, axis).item() == pytest.approx(temporal_loss(other, axis).item())


def test_divisors_differ_by_a_shift_and_a_factor():
    f = rand(5, 4, 3, 3).requires_grad_()
    paper, pairs = temporal_loss(f, divisor="paper"), temporal_loss(f, divisor="pairs")
    assert paper.item() == pytest.approx(.2 + .8 * pairs.item(), abs=1e-6)
    a, b = (torch.autograd.grad(v, f, retain_graph=True)[0] for v in (paper, pairs))
    torch.testing.assert_close(a, .8 * b)


@pytest.mark.parametrize("divisor", ["paper", "pairs"])
@pytest.mark.parametrize("axis", ["pixel", "whole"])
def test_a_single_frame_costs_nothing_and_can_be_followed(axis, divisor):
    f = rand(1, 4, 3, 3).requires_grad_()
    loss = temporal_loss(f, axis, divisor); loss.backward()
    assert loss.item() == 0 and f.grad is not None and not f.grad.any()


def test_zero_vectors_count_as_unlike_without_gradient():
    f = rand(3, 4, 3, 3); f[1] = 0; f.requires_grad_()
    for axis in ("pixel", "whole"):
        loss = temporal_loss(f, axis, "pairs")
        assert loss.item() == 1 and not torch.autograd.grad(loss, f)[0].any()
    g = rand(3, 4, 3, 3); g[1, :, 0, 0] = 0; g.requires_grad_()
    grad = torch.autograd.grad(temporal_loss(g), g)[0]
    assert grad.isfinite().all() and grad.abs().max() < 10


def test_cosine_is_scale_free():
    a, b = rand(6, 8), rand(6, 8, seed=1)
    torch.testing.assert_close(safe_cosine(a, b), F.cosine_similarity(a, b))
    torch.testing.assert_close(safe_cosine(3 * a, .01 * b), safe_cosine(a, b))


def test_axes_disagree_where_lengths_do():
    f = torch.zeros(2, 2, 1, 10); f[:, 0, 0, :9], f[0, 0, 0, 9], f[1, 0, 0, 9] = .1, 10, -10
    assert frame_cosines(f, "pixel").item() == pytest.approx(.8) and frame_cosines(f, "whole") < -.99


def test_divisors_of_the_other_two():
    a, b = rand(3, 4, 2, 5), rand(3, 4, 2, 5, seed=1)
    total = (a - b).square().sum().item()
    for d, n in (("elements", 120), ("channels", 12), ("sum", 3)): assert feature_loss(a, b, d).item() == pytest.approx(total / n, rel=1e-5)
    p, q = a.softmax(1), b.softmax(1)
    assert prediction_loss(p, q, "frames").item() == pytest.approx(40 * prediction_loss(p, q).item(), rel=1e-5)
    assert prediction_loss(p, p).item() == feature_loss(a, a).item() == 0


def test_the_teacher_takes_no_gradient():
    for loss, a, b in ((feature_loss, rand(3, 4, 2, 5), rand(3, 4, 2, 5, seed=1)), (prediction_loss, rand(3, 2, 4, 4).softmax(1), rand(3, 2, 4, 4, seed=1).softmax(1))):
        a, b = a.requires_grad_(), b.requires_grad_()
        loss(a, b).backward()
        assert a.grad.any() and b.grad is None


def parts(T=3): return rand(T, 4, 3, 3), rand(T, 4, 3, 3, seed=1), rand(T, 4, 3, 3, seed=2), rand(T, 2, 6, 6, seed=3).softmax(1), rand(T, 2, 6, 6, seed=4).softmax(1)


def test_consistency_adds_what_has_a_weight():
    f, zh, z, yh, y = parts(); f.requires_grad_(); zh.requires_grad_()
    got = consistency(ConsistencyConfig(2., 0., 3.), f, zh, z, yh, y)
    assert got["loss"].item() == pytest.approx(2 * got["temporal"].item() + 3 * got["prediction"].item()) and got["feature"] > 0
    got["loss"].backward()
    assert f.grad.any() and zh.grad is None
    nothing = consistency(ConsistencyConfig(0., 0., 0.), f, zh, z, yh, y)
    assert nothing["loss"].item() == 0 and nothing["loss"].requires_grad


@pytest.mark.parametrize("bad", [dict(axis="time"), dict(temporal_divisor="T"), dict(feature_divisor="mean"), dict(prediction_divisor="sum"), dict(temporal=-1.),
                                 dict(feature=float("nan")), dict(prediction=float("inf"))])
def test_config_refuses(bad):
    with pytest.raises(ConfigError): ConsistencyConfig(**bad)


def test_losses_refuse():
    f, zh, z, yh, y = parts()
    for call, word in ((lambda: temporal_loss(f[0]), "T, C, h, w"), (lambda: feature_loss(zh, z[:2]), "one shape"), (lambda: prediction_loss(yh[..., :3], y), "one shape"),
                       (lambda: prediction_loss(5 * f, y), "softmax"), (lambda: prediction_loss(yh - .1, y), "y_hat: got values"), (lambda: prediction_loss(yh, y + .5), "y: got values"), (lambda: temporal_loss(f * float("nan")), "f")):
        with pytest.raises(DataError, match=word): call()
    for call in (lambda: temporal_loss(f, "time"), lambda: temporal_loss(f, divisor="T"), lambda: feature_loss(zh, z, "mean"), lambda: prediction_loss(yh, y, "sum")):
        with pytest.raises(ConfigError): call()


# readings
def test_features_may_be_averaged_over_vectors():
    a, b = rand(3, 5, 4, 6), rand(3, 5, 4, 6, seed=1)
    want = sum(float((a[t, :, i, j] - b[t, :, i, j]).square().sum()) for t in range(3) for i in range(4) for j in range(6)) / (3 * 4 * 6)
    assert float(feature_loss(a, b, "vectors")) == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(feature_loss(a, b, "vectors"), 5 * feature_loss(a, b))
    assert ConsistencyConfig(feature_divisor="vectors").feature_divisor == "vectors"


def test_the_teachers_maps_may_be_hard():
    y_hat, y = rand(3, 2, 4, 6).softmax(1).requires_grad_(), rand(3, 2, 4, 6, seed=1).softmax(1)
    hard = F.one_hot(y.argmax(1), 2).movedim(-1, 1).float()
    got = prediction_loss(y_hat, y, maps="hard")
    torch.testing.assert_close(got, F.mse_loss(y_hat, hard))
    got.backward(); assert y_hat.grad.any()
    assert torch.equal(prediction_loss(y_hat, y), prediction_loss(y_hat, y, maps="soft"))
    with pytest.raises(ConfigError, match="soft, hard"): prediction_loss(y_hat, y, maps="sharp")
    with pytest.raises(ConfigError, match="soft, hard"): ConsistencyConfig(prediction_maps="sharp")
    f, z = rand(3, 5, 4, 6), rand(3, 5, 4, 6, seed=2)
    made = consistency(ConsistencyConfig(prediction_maps="hard"), f, z, z, y_hat, y)
    torch.testing.assert_close(made["prediction"], F.mse_loss(y_hat, hard).detach())


def test_shots_become_their_mean_or_the_largest():
    q, s = rand(2, 5, 4, 4), rand(2, 3, 5, 4, 4, seed=1)
    assert torch.equal(pseudo_mask(q, s, shots="max"), min_max(cosine_maps(q, s).amax(1)))
    assert torch.equal(pseudo_mask(q, s), pseudo_mask(q, s, shots="mean"))
    with pytest.raises(ConfigError, match="mean, max"): pseudo_mask(q, s, shots="sum")
