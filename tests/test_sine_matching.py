"52_matching: points, costs, pairs, losses; against plain loops, torch and scipy; gating; faults."
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.sine.matching import (
    CriterionConfig, Truth, class_loss, dice_loss, hungarian, mask_losses, match_cost, match_identities, match_instances,
    pair_ids, place_of, sample_points, sine_loss, split_answers, stage_loss, uncertain_points)
from timet_nb.sine.mformer import Answers, MFormer, MFormerConfig, Stage
from timet_nb.sine.prompts import Prompt

SMALL = CriterionConfig(points=64)


def seeded(seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda *s: torch.rand(*s, generator=g)


def close(a, b, eps=1e-5): assert (torch.as_tensor(a) - torch.as_tensor(b)).abs().max() < eps, (a, b)


def stage(I=3, Q=6, C=2, size=16, seed=0, cls=Stage, **more):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g)
    return cls(draw(1, I, 2), draw(1, I, size, size), draw(1, Q, C + 1), draw(1, Q, size, size), draw(1, I, 4), draw(1, Q, 4), **more)


def truth(ids=(10, 11, 12), ref=(10, 11, 12), labels=None, size=32, seed=0, same_scene=True):
    g = torch.Generator().manual_seed(seed)
    M = len(ids)
    labels = torch.arange(M) % 2 if labels is None else torch.tensor(labels)
    return Truth(labels, torch.rand(M, size, size, generator=g) > .5, torch.tensor(ids, dtype=torch.long), torch.tensor(ref, dtype=torch.long), same_scene)


# ---- points

def test_points_at_pixel_centres_are_pixels():
    maps = torch.rand(2, 4, 6)
    y, x = torch.meshgrid((torch.arange(4) + .5) / 4, (torch.arange(6) + .5) / 6, indexing="ij")
    close(sample_points(maps, torch.stack([x, y], -1).reshape(1, -1, 2)), maps.flatten(1))


def test_points_are_linear_between_pixels_and_x_comes_first():
    ramp = torch.arange(8.).expand(1, 4, 8)                    # value = column
    at = torch.tensor([[[.5, .2], [.25, .6]]])
    close(sample_points(ramp, at), [[3.5, 1.5]])


def test_uncertain_points_are_where_the_logit_is_near_zero():
    logits = torch.linspace(-8, 8, 64).expand(1, 64, 64).clone()     # zero in the middle column
    p = uncertain_points(logits, 400, draw=seeded())
    assert p.shape == (1, 400, 2)
    near = (p[0, :300, 0] - .5).abs()
    assert near.max() < .18 and (p[0, 300:, 0] - .5).abs().max() > .4
    flat = uncertain_points(logits, 400, oversample=1, importance=0, draw=seeded())
    close(flat, [seeded_after(400, 400)][0])


def seeded_after(first, n):
    draw = seeded(); draw(1, first, 2)
    return draw(1, n, 2)


def test_all_points_may_be_important():
    assert uncertain_points(torch.randn(2, 9, 9), 10, importance=1.).shape == (2, 10, 2)


# ---- cost and pairs

def cost_slow(class_logits, x, labels, y, w):
    out = torch.zeros(len(x), len(y))
    for q in range(len(x)):
        for m in range(len(y)):
            p = x[q].sigmoid()
            bce = F.binary_cross_entropy(p, y[m]); dice = 1 - (2 * (p * y[m]).sum() + 1) / (p.sum() + y[m].sum() + 1)
            out[q, m] = -w[0] * class_logits[q].softmax(0)[labels[m]] + w[1] * bce + w[2] * dice
    return out


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_cost_equals_loops(Q, M, C, P, seed):
    g = torch.Generator().manual_seed(seed)
    c, x, y = torch.randn(Q, C + 1, generator=g), torch.randn(Q, P, generator=g), (torch.rand(M, P, generator=g) > .5).float()
    labels = torch.randint(C, (M,), generator=g)
    close(match_cost(c, x, labels, y, (2., 5., 3.)), cost_slow(c, x, labels, y, (2., 5., 3.)), 1e-4)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_hungarian_is_the_best_of_all_pairings(Q, M, seed):
    cost = torch.rand(Q, M, generator=torch.Generator().manual_seed(seed))
    rows, cols = hungarian(cost)
    n = min(Q, M)
    assert len(rows) == n == len(set(rows.tolist())) == len(set(cols.tolist())) and rows.tolist() == sorted(rows.tolist())
    best = min(sum(float(cost[r, c]) for r, c in zip(rs, cs)) for rs in itertools.permutations(range(Q), n) for cs in itertools.combinations(range(M), n))
    assert abs(float(cost[rows, cols].sum()) - best) < 1e-5


def test_ids_by_value_and_by_position():
    ref, tar = torch.tensor([10, 11, 12]), torch.tensor([12, 30, 11])
    r, t = pair_ids(ref, tar)
    assert torch.equal(ref[r], tar[t]) and (r.tolist(), t.tolist()) == ([1, 2], [2, 0])
    r, t = pair_ids(ref, tar, "position")
    assert (ref[r].tolist(), tar[t].tolist()) == ([11, 12], [12, 11])          # 11 is paired with 12: the quirk
    for by in ("value", "position"): assert [len(x) for x in pair_ids(ref, torch.tensor([1, 2]), by)] == [0, 0]


@given(st.permutations(list(range(5))), st.permutations(list(range(3, 9))))
@settings(max_examples=30, deadline=None)
def test_ids_by_value_always_agree(ref, tar):
    ref, tar = torch.tensor(ref), torch.tensor(tar)
    r, t = pair_ids(ref, tar)
    assert torch.equal(ref[r], tar[t]) and len(r) == 2


def test_in_order_both_ways_are_one():
    ref, tar = torch.tensor([3, 5, 9]), torch.tensor([2, 5, 9])
    for a, b in zip(pair_ids(ref, tar), pair_ids(ref, tar, "position")): assert torch.equal(a, b)


# ---- losses

def test_dice():
    y = torch.tensor([[1., 1., 0., 0.]])
    close(dice_loss(y * 200 - 100, y), [0.]); close(dice_loss(100 - y * 200, y), [1 - 1 / 5])
    close(dice_loss(torch.full((1, 4), -100.), torch.zeros(1, 4)), [0.])       # nothing wanted, nothing said


def test_class_loss_weights_absent_rows():
    logits = torch.randn(5, 3)
    rows, cols = torch.tensor([1, 4]), torch.tensor([0, 1])
    want = torch.tensor([2, 0, 2, 2, 1])
    each = F.cross_entropy(logits, want, reduction="none")
    w = torch.tensor([.1, 1, .1, .1, 1])
    close(class_loss(logits, rows, cols), (each * w).sum() / w.sum())


def test_padded_classes_do_not_disturb_the_class_loss():
    logits = torch.randn(5, 3); wide = torch.cat([logits[:, :2], torch.full((5, 2), -torch.inf), logits[:, 2:]], 1)
    rows, cols = torch.tensor([1, 4]), torch.tensor([0, 1])
    close(class_loss(wide, rows, cols), class_loss(logits, rows, cols))


def test_perfect_masks_cost_nothing():
    masks = torch.zeros(2, 32, 32); masks[0, 4:20, 4:20] = 1; masks[1, 10:30, 16:30] = 1
    plain = CriterionConfig(points=400, importance=0)
    good, bad = (mask_losses(f * (masks * 2 - 1) * 30, masks, 2., plain, seeded()) for f in (1, -1))
    assert good[0] < .5 and good[1] < .1 and bad[0] > 20 and bad[1] > .9


def test_order_of_targets_and_queries_does_not_matter_for_the_pairs():
    s, y = stage(), truth()
    q, o = match_instances(s.ins_logits[0], s.ins_masks[0], y, SMALL, seeded())
    i = torch.tensor([2, 0, 1])
    y2 = Truth(y.labels[i], y.masks[i], y.ids[i], y.ref_ids)
    q2, o2 = match_instances(s.ins_logits[0], s.ins_masks[0], y2, SMALL, seeded())
    assert dict(zip(o.tolist(), q.tolist())) == {int(i[b]): a for a, b in zip(q2.tolist(), o2.tolist())}


def test_identities_are_supervised_in_the_same_scene_only():
    here, other = truth(), truth(same_scene=False)
    assert len(match_identities(here)[0]) == 3 and len(match_identities(other)[0]) == 0
    assert len(match_identities(other, CriterionConfig(gate=False))[0]) == 3       # the authors' way
    s = stage()
    gated, _ = (stage_loss([s], [other], c, seeded()) for c in (SMALL, CriterionConfig(points=64, gate=False)))
    want = F.cross_entropy(s.id_logits[0], torch.ones(3).long())
    close(gated["ce_id"], want)                                                    # everybody is absent


def test_total_is_the_weighted_sum_over_stages():
    a = stage(cls=Answers, aux=(stage(seed=1), stage(seed=2)))
    parts = sine_loss([a], [truth()], SMALL, seeded())
    by = lambda n: parts[n] + sum(parts[f"{n}_{k}"] for k in (0, 1))
    close(parts["loss"], 2 * by("ce_ins") + 2 * by("ce_id") + 5 * by("mask") + 5 * by("dice"), 1e-4)


def test_target_without_objects_and_prompt_without_identities():
    empty = truth(ids=(), labels=[], ref=(1, 2, 3))
    parts = sine_loss([stage(cls=Answers)], [empty], SMALL, seeded())
    assert parts["mask"] == 0 and parts["dice"] == 0 and parts["loss"].isfinite()
    none = sine_loss([stage(I=0, cls=Answers)], [truth(ref=())], SMALL, seeded())
    assert none["loss"].isfinite() and none["ce_id"] == 0


def test_more_objects_than_queries():
    parts = sine_loss([stage(Q=2, cls=Answers)], [truth()], SMALL, seeded())
    assert parts["loss"].isfinite()


def test_masks_of_other_sizes():
    a, b = stage(cls=Answers), stage(cls=Answers, size=24, seed=3)
    assert sine_loss([a, b], [truth(), truth(size=50)], SMALL, seeded())["loss"].isfinite()


def test_reduce_is_asked_for_the_number_of_masks():
    s, asked = stage(), []
    one = stage_loss([s], [truth()], SMALL, seeded())
    two = stage_loss([s], [truth()], SMALL, seeded(), reduce=lambda n: asked.append(float(n)) or 2 * n)
    assert asked == [6.]; close(two["mask"], one["mask"] / 2); close(two["ce_ins"], one["ce_ins"])


def small_net():
    torch.manual_seed(0)
    return MFormer(MFormerConfig(dim=32, heads=4, mlp=48, depth=2, queries=6))


def prompts():
    g = torch.Generator().manual_seed(1)
    make = lambda I, C: Prompt(torch.randn(I, 32, generator=g), torch.ones(I), torch.arange(I), torch.arange(I) % C, torch.randn(C, 32, generator=g), torch.ones(C), torch.arange(C))
    return [make(3, 2), make(1, 1)]


def test_a_padded_batch_has_the_loss_of_its_targets():
    net, p, t = small_net(), prompts(), torch.randn(2, 32, 6, 8)
    truths = [truth(ref=(0, 1, 2), ids=(0, 1, 7)), truth(ref=(0,), ids=(0,), labels=[0])]
    with torch.no_grad():
        many = sine_loss(net(p, t, deep=True), truths, SMALL, seeded())
        single = sine_loss([net(q, t[b:b + 1], deep=True) for b, q in enumerate(p)], truths, SMALL, seeded())
    for n in many: close(many[n], single[n], 1e-4)


def test_split_gives_back_each_target():
    net, p, t = small_net(), prompts(), torch.randn(2, 32, 6, 8)
    a, b = split_answers(net(p, t, deep=True))
    assert a.ins_logits.shape == (1, 6, 3) and b.ins_logits.shape == (1, 6, 2) and len(b.aux) == 2
    assert b.id_masks.shape == (1, 1, 24, 32) and b.aux[0].id_masks.shape == (1, 1, 24, 32)


def test_every_weight_learns_and_the_loss_falls():
    net, p, t = small_net(), prompts()[:1], torch.randn(1, 32, 8, 8)
    mask = torch.zeros(1, 32, 32, dtype=torch.bool); mask[0, 8:20, 8:24] = True
    y = [Truth(torch.tensor([0]), mask, torch.tensor([1]), torch.tensor([0, 1, 2]))]
    opt, seen = torch.optim.Adam(net.parameters(), 2e-3), []
    for step in range(40):
        loss = sine_loss(net(p, t, deep=True), y, SMALL, seeded(step))["loss"]
        opt.zero_grad(); loss.backward(); opt.step(); seen.append(loss.item())
        if not step: assert not [n for n, w in net.named_parameters() if w.grad is None]
    assert seen[-1] < .6 * seen[0]
    a = net(p, t)
    got, want = F.interpolate(a.id_masks, (32, 32), mode="bilinear")[0, 1] > 0, mask[0]
    assert (got & want).sum() / (got | want).sum() > .7 and a.id_logits[0, 1].argmax() == 0


# ---- faults

def test_faults():
    with pytest.raises(ConfigError, match="value or position"): pair_ids(torch.tensor([1]), torch.tensor([1]), "order")
    with pytest.raises(DataError, match="ids that differ"): pair_ids(torch.tensor([1, 1]), torch.tensor([1]))
    with pytest.raises(DataError, match="diverged"): hungarian(torch.tensor([[float("nan")]]))
    with pytest.raises(DataError, match="as many of each"): Truth(torch.zeros(2).long(), torch.zeros(1, 4, 4), torch.zeros(1).long(), torch.zeros(1).long())
    with pytest.raises(DataError, match="classes of the prompt"): place_of(torch.tensor([3, 4]), torch.tensor([3]))
    assert place_of(torch.tensor([5, 2, 5]), torch.tensor([2, 5])).tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="truths"): sine_loss([stage(cls=Answers)], [truth(), truth()], SMALL)
    with pytest.raises(DataError, match="place 7"): sine_loss([stage(cls=Answers)], [truth(labels=[0, 1, 7])], SMALL)
    with pytest.raises(DataError, match="ref_ids"): sine_loss([stage(cls=Answers)], [truth(ref=(1,))], SMALL)
