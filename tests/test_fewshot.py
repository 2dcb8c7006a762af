"Few-shot scores: rules, faults, and properties against a loop over pixels."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.evaluate.fewshot import FewShotScore
from timet_nb.evaluate.overlap import FewShotScore as reexported, fb_iou, score


def filled(episodes, **options):
    s = FewShotScore(**options)
    for e in episodes: s.add(*e)
    return s


def slow(episodes):
    inter, union, both = {}, {}, np.zeros((2, 2))
    for pred, gt, c in episodes:
        for p, g in zip(np.ravel(pred), np.ravel(gt)):
            if g == 255: continue
            inter[c] = inter.get(c, 0) + int(p == 1 and g == 1)
            union[c] = union.get(c, 0) + int(p == 1 or g == 1)
            for side in (0, 1): both[side] += int(p == g == side), int(p == side or g == side)
    iou = {c: inter[c] / union[c] for c in inter if union[c]}
    two = [i / u for i, u in both if u]
    return (np.mean(list(iou.values())) if iou else math.nan), (np.mean(two) if two else math.nan)


@st.composite
def many(draw):
    n, rng = draw(st.integers(1, 8)), np.random.default_rng(draw(st.integers(0, 10 ** 6)))
    p = draw(st.sampled_from([0., .1, .5, 1.]))
    shapes = [tuple(rng.integers(1, 6, 2)) for _ in range(n)]
    return [((rng.random(s) < p).astype(int), rng.choice([0, 1, 255], s, p=[.5, .3, .2]), int(rng.integers(3, 6)))
            for s in shapes]


@settings(max_examples=60, deadline=None)
@given(many())
def test_equals_the_loop(episodes):
    r = filled(episodes).result()
    assert np.allclose([r.miou, r.fb_iou], slow(episodes), atol=1e-12, equal_nan=True)
    a, b = filled(episodes[::2]), filled(episodes[1::2])
    assert repr(a.merge(b).result().__dict__) == repr(r.__dict__)          # to the bit; repr: nan is nan
    assert repr(filled(episodes[::-1]).result().__dict__) == repr(r.__dict__)
    assert r.episodes == len(episodes)


@settings(max_examples=30, deadline=None)
@given(many())
def test_bounds_and_perfect_answers(episodes):
    perfect = filled([((g == 1).astype(int), g, c) for _, g, c in episodes]).result()
    assert all(v == 1 or math.isnan(v) for v in perfect.iou.values())
    r = filled(episodes).result()
    assert all(math.isnan(v) or 0 <= v <= 1 for v in (r.miou, r.fb_iou, r.episode_iou))
    official = filled(episodes, classes=(3, 4, 5), official=True).result()
    assert 0 <= official.miou <= 1 and (math.isnan(r.miou) or official.miou <= r.miou + 1e-12)


def test_one_episode_is_the_score_of_its_picture():
    g = torch.Generator().manual_seed(0)
    pred, gt = (torch.randint(0, 2, (9, 7), generator=g) for _ in range(2))
    r = filled([(pred, gt, 2)]).result()
    assert r.fb_iou == pytest.approx(fb_iou(gt, pred), abs=1e-12)
    assert r.iou[2] == pytest.approx(score(gt, pred, "none").iou[1].item(), abs=1e-12)
    assert reexported is FewShotScore


def test_a_batch_is_its_episodes():
    g = torch.Generator().manual_seed(1)
    pred, gt = (torch.randint(0, 2, (5, 4, 4), generator=g) for _ in range(2))
    ids = torch.tensor([1, 2, 1, 2, 3])
    s = FewShotScore(); s.add(pred, gt, ids)
    assert s.result() == filled(zip(pred, gt, ids.tolist())).result()
    with pytest.raises(DataError, match="as many of each"): s.add(pred, gt, ids[:4])


def test_bool_numpy_and_lists_are_the_same():
    a = filled([(torch.tensor([[True, False]]), np.array([[1, 255]], np.uint8), np.int64(4))]).result()
    assert a == filled([([[1, 0]], [[1, 255]], 4)]).result() and a.counts[4] == (0, 0, 0, 1)


def test_an_absent_class_is_left_out_and_named():
    names = ["background", "cat", "dog", "owl"]
    s = filled([([[1, 1]], [[1, 0]], 1), ([[0]], [[0]], 2)], classes=(1, 2, 3), names=names)
    r = s.result()
    assert r.miou == .5 and r.absent == ("dog", "owl") and r.iou["cat"] == .5 and math.isnan(r.iou["owl"])
    assert "absent: dog, owl" in repr(r)
    s.official = True
    assert s.result().miou == pytest.approx(.5 / 3) and s.result().absent == r.absent


def test_ignored_pixels_leave_both():
    r = filled([([[1, 1, 0, 0]], [[255, 1, 0, 255]], 1)]).result()
    assert r.miou == 1 and r.fb_iou == 1 and sum(r.counts[1]) == 2
    everything = filled([([[1]], [[255]], 1)]).result()
    assert math.isnan(everything.miou) and everything.absent == (1,) and everything.episodes == 1


def test_nothing_added():
    r = FewShotScore().result()
    assert math.isnan(r.miou) and math.isnan(r.fb_iou) and r.episodes == 0
    assert FewShotScore((1, 2), official=True).result().miou == 0


def test_counts_stay_whole_beyond_single_precision():
    s = FewShotScore()
    s.counts[1], s.ratios[1] = torch.tensor([0, 0, 0, 2 ** 24]), [1., 1]
    s.add([[1]], [[1]], 1)
    assert s.result().counts[1][3] == 2 ** 24 + 1


@pytest.mark.parametrize("args, words", [
    (([[0, 7]], [[0, 1]], 1), "0 and 1"),
    ((torch.rand(2, 2), torch.ones(2, 2).long(), 1), "integer ids"),
    (([[0, 1]], [[0], [1]], 1), "shape"),
    (([[0, 1]], [[0, 3]], 1), "0, 1 and 255"),
    (([[0, 1]], [[0, -1]], 1), "-1"),
    (([[0, 1]], [[0, 1]], 9), "of the fold"),
])
def test_faults(args, words):
    with pytest.raises(DataError, match=words): FewShotScore((1, 2)).add(*args)


def test_255_without_an_ignore_value_is_refused():
    with pytest.raises(DataError, match="255"): FewShotScore(ignore=None).add([[1]], [[255]], 1)


def test_bad_settings():
    with pytest.raises(ConfigError, match="classes"): FewShotScore(official=True)
    with pytest.raises(ConfigError, match="each id once"): FewShotScore((1, 1))


def test_a_refused_episode_leaves_no_trace():
    s = filled([([[1]], [[1]], 1)])
    before = s.result()
    with pytest.raises(DataError): s.add([[2]], [[1]], 1)
    assert s.result() == before
