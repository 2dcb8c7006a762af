"30_overlap: counts, matching, J, F and their statistics against loops written out, and every bad input."
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.ndimage import binary_dilation

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.evaluate.boundary import mask_iou
from timet_nb.evaluate.overlap import (as_ids, as_masks, boundary_f, boundary_radius, contingency, dice, disk,
                                       fb_iou, iou_matrix, jf_stats, match, objects_in, outline, pair_scores,
                                       region_j, score)


# ---- oracles: the definitions as loops ----

def table_slow(gt, pred, G, P, ignore=255):
    out = np.zeros((G, P), int)
    for g, p in zip(gt.flatten().tolist(), pred.flatten().tolist()):
        if g != ignore: out[g, p] += 1
    return out


def miou_slow(gt, pred, how="hungarian", background=True, ignore=255):
    "Matching and mean IoU with boolean passes over the pixels."
    gt, pred = gt.flatten().numpy(), pred.flatten().numpy()
    keep = gt != ignore
    gt, pred = gt[keep], pred[keep]
    classes, clusters = np.unique(gt), np.unique(pred)
    iou = lambda a, b: (a & b).sum() / max((a | b).sum(), 1)
    S = np.array([[iou(gt == c, pred == k) for k in clusters] for c in classes])
    P = np.array([[((gt == c) & (pred == k)).sum() / (pred == k).sum() for k in clusters] for c in classes])
    new = np.zeros_like(pred)
    if how == "none": new = pred
    elif how == "hungarian":
        best, pairs = -1, []
        short, long = sorted((len(classes), len(clusters)))
        for perm in itertools.permutations(range(long), short):
            ps = [(c, k) if len(classes) <= len(clusters) else (k, c) for c, k in enumerate(perm)]
            value = sum(S[c, k] for c, k in ps)
            if value > best + 1e-12: best, pairs = value, ps
        for c, k in pairs: new[pred == clusters[k]] = classes[c]
    else:
        M = S if how == "many_to_one" else P
        for k in range(len(clusters)): new[pred == clusters[k]] = classes[M[:, k].argmax()]
    values = [iou(gt == c, new == c) for c in classes if background or c != 0]
    return np.mean(values) if values else math.nan


def f_slow(gt, pred, th=.008):
    "Boundary F on the whole frame with scipy's dilation."
    def edge(m):
        out = np.zeros_like(m)
        H, W = m.shape
        for i in range(H):
            for j in range(W):
                a, b = min(i + 1, H - 1), min(j + 1, W - 1)
                out[i, j] = m[i, j] != m[a, j] or m[i, j] != m[i, b] or m[i, j] != m[a, b]
        return out
    a, b = edge(gt), edge(pred)
    d = disk(boundary_radius(*gt.shape, th)).astype(bool)
    if not a.any() or not b.any(): return float(a.any() == b.any())
    p = (b & binary_dilation(a, d)).sum() / b.sum()
    r = (a & binary_dilation(b, d)).sum() / a.sum()
    return 2 * p * r / (p + r) if p + r else 0.


def blobs(rng, h=40, w=56):
    m = np.zeros((h, w), bool)
    for _ in range(rng.integers(1, 4)):
        y, x, r = rng.integers(0, h), rng.integers(0, w), rng.integers(1, 14)
        yy, xx = np.ogrid[:h, :w]
        m |= (yy - y) ** 2 + (xx - x) ** 2 < r * r
    return m


def labels(seed, G=5, P=6, n=300, void=.1):
    g = torch.Generator().manual_seed(seed)
    gt, pred = torch.randint(0, G, (n,), generator=g), torch.randint(0, P, (n,), generator=g)
    pred = torch.where(torch.rand(n, generator=g) < .5, gt % P, pred)
    gt[torch.rand(n, generator=g) < void] = 255
    return gt, pred


# ---- the table ----

def test_contingency_equals_the_loop():
    for seed in range(5):
        gt, pred = labels(seed)
        assert (contingency(gt, pred, 5, 6).numpy() == table_slow(gt, pred, 5, 6)).all()


def test_ignore_none_keeps_255_as_a_class():
    gt, pred = torch.tensor([0, 1, 255]), torch.tensor([0, 1, 1])
    assert contingency(gt, pred).shape == (2, 2)
    t = contingency(gt, pred, ignore=None)
    assert t.shape == (256, 2) and t[255, 1] == 1 and t.sum() == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_any_integer_type_and_numpy_and_batches(dtype):
    gt, pred = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 1], [0, 1]])
    want = contingency(gt, pred)
    assert (contingency(gt.to(dtype), pred.to(dtype)) == want).all()
    assert (contingency(gt.to(dtype).numpy(), pred.T.T.numpy()) == want).all()


def test_uint8_does_not_wrap():
    gt = torch.full((10,), 200, dtype=torch.uint8); pred = torch.full((10,), 250, dtype=torch.uint8)
    assert contingency(gt, pred)[200, 250] == 10


@pytest.mark.parametrize("gt, pred, words", [
    ([0., 1.], [0, 1], "integer ids"), ([0, 1], [0., .5], "integer ids"), ([0, -1], [0, 1], "negative"),
    ([0, 1], [0, -3], "pred"), ([0, 1], [0, 1, 1], "pixels"), ([0, 1], [0, 16711680], "65535")])
def test_wrong_labels_are_named(gt, pred, words):
    with pytest.raises(DataError, match=words): contingency(torch.tensor(gt), torch.tensor(pred))


def test_id_that_does_not_fit_is_named():
    with pytest.raises(DataError, match="id 7 does not fit into 5 classes"): contingency(torch.tensor([7]), torch.tensor([0]), n_gt=5)


def test_everything_ignored_is_an_empty_table():
    t = contingency(torch.full((4,), 255), torch.zeros(4, dtype=torch.int64))
    assert t.sum() == 0 and math.isnan(match(t).miou) and len(match(t).classes) == 0


# ---- matching ----

@pytest.mark.parametrize("how", ["hungarian", "many_to_one", "precision", "none"])
@pytest.mark.parametrize("background", [True, False])
def test_match_equals_the_loop(how, background):
    for seed, (G, P) in enumerate([(4, 4), (3, 6), (5, 3), (1, 3), (4, 1)]):
        gt, pred = labels(seed, G, P)
        ours, slow = score(gt, pred, how, background).miou, miou_slow(gt, pred, how, background)
        assert ours == pytest.approx(slow, abs=1e-12, nan_ok=True), (how, background, G, P)


def test_absent_classes_do_not_enter_the_mean():
    gt, pred = torch.tensor([0, 0, 7, 7]), torch.tensor([3, 3, 1, 1])
    m = score(gt, pred)
    assert m.miou == 1 and m.classes.tolist() == [0, 7] and m.mapping[3] == 0 and m.mapping[1] == 7
    assert score(gt, pred, n_classes=8).miou == pytest.approx(2 / 8)


def test_missed_class_scores_zero_and_spare_cluster_goes_where_it_is_told():
    gt, pred = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 1, 1])
    m = score(gt, pred)
    assert m.iou.tolist() == [1, .5, 0] or m.iou.tolist() == [1, 0, .5]
    gt, pred = torch.tensor([1, 1, 1, 2, 2, 2]), torch.tensor([0, 0, 2, 1, 1, 1])
    assert score(gt, pred).mapping.tolist() == [1, 2, 0]                    # spare cluster 2 becomes class 0, official
    assert score(gt, pred, unmatched=None).mapping.tolist() == [1, 2, -1]
    assert score(gt, pred).relabel(pred).tolist() == [1, 1, 0, 2, 2, 2]


def test_unmatched_to_zero_costs_class_zero():
    gt, pred = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 2])
    assert score(gt, pred).iou[0] == .75 and score(gt, pred, unmatched=None).iou[0] == 1


def test_first_best_wins_in_ties():
    gt, pred = torch.tensor([0, 1]), torch.tensor([5, 5])
    assert score(gt, pred, "many_to_one").mapping[5] == 0 and score(gt, pred, "precision").mapping[5] == 0


def test_counts_add_up():
    gt, pred = labels(3)
    m = score(gt, pred)
    keep = gt != 255
    assert (m.tp + m.fn).sum() == keep.sum() and (m.iou == m.tp / (m.tp + m.fp + m.fn).double()).all()
    new = m.relabel(pred)
    for c, tp in zip(m.classes, m.tp): assert ((gt == c) & (new == c)).sum() == tp


def test_no_class_left_is_nan_not_zero():
    gt = torch.zeros(4, dtype=torch.int64)
    assert math.isnan(score(gt, gt, background=False).miou) and score(gt, gt).miou == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6))
def test_renaming_clusters_or_pixels_changes_nothing(seed, G, P):
    gt, pred = labels(seed, G, P, n=80)
    g = torch.Generator().manual_seed(seed)
    names, order = torch.randperm(P, generator=g) + 11, torch.randperm(80, generator=g)
    for how in ("hungarian", "precision", "many_to_one"):
        a, b = score(gt, pred, how), score(gt[order], names[pred][order], how)
        # ties between equally good matchings may be broken otherwise: the Hungarian objective cannot differ
        ia, ib = iou_matrix(contingency(gt, pred)), iou_matrix(contingency(gt, names[pred]))
        if how == "hungarian": assert _objective(ia, a) == pytest.approx(_objective(ib, b), abs=1e-9)
        else: assert a.miou == pytest.approx(b.miou, abs=1e-9, nan_ok=True)


def _objective(iou, m):
    pairs = {}
    for p, c in enumerate(m.mapping.tolist()):
        if c >= 0 and c < len(iou): pairs[c] = max(pairs.get(c, 0), float(iou[c, p]))
    return sum(pairs.values())


def test_match_refuses_an_unknown_way():
    with pytest.raises(ConfigError, match="hungarian"): match(torch.ones(2, 2), "greedy")


def test_relabel_refuses_clusters_it_has_not_seen():
    m = score(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="id 5"): m.relabel(torch.tensor([5]))


def test_iou_matrix_equals_the_loop_over_pairs():
    rng = np.random.default_rng(0)
    gt, pred = rng.integers(0, 21, 120_000), rng.integers(0, 50, 120_000)
    def slow():
        return [[((gt == c) & (pred == k)).sum() / max(((gt == c) | (pred == k)).sum(), 1) for k in range(50)] for c in range(21)]
    a = slow()
    gt_, pred_ = torch.from_numpy(gt), torch.from_numpy(pred)
    b = iou_matrix(contingency(gt_, pred_))
    assert np.abs(np.array(a) - b.numpy()).max() < 1e-12


# ---- J, Dice, FB-IoU ----

def test_identical_empty_and_one_empty():
    m, none = torch.zeros(6, 8, dtype=torch.bool), torch.zeros(6, 8, dtype=torch.bool)
    m[1:4, 2:5] = True
    for f in (region_j, dice, boundary_f):
        assert f(m, m) == 1 and f(none, none) == 1 and f(m, none) == 0 and f(none, m) == 0, f.__name__


def test_j_and_dice_by_hand():
    a, b = torch.zeros(4, 4), torch.zeros(4, 4)
    a[:2], b[1:3] = 1, 1                                       # 8 and 8 pixels, 4 shared
    assert region_j(a, b) == pytest.approx(4 / 12) and dice(a, b) == pytest.approx(8 / 16)
    assert region_j(a * 255, (b * 255).to(torch.uint8)).item() == pytest.approx(4 / 12)   # 0/255 masks


def test_void_pixels_do_not_count():
    a, b, void = (torch.zeros(4, 4, dtype=torch.bool) for _ in range(3))
    a[:2], b[:3], void[2:] = True, True, True
    assert region_j(a, b) < 1 and region_j(a, b, void) == 1 and boundary_f(a, b, void=void) == 1


def test_fb_iou_by_hand():
    gt, pred = torch.tensor([[0, 0, 1, 3], [0, 0, 255, 255]]), torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
    assert fb_iou(gt, pred) == pytest.approx((3 / 4 + 2 / 3) / 2)
    assert fb_iou(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)) == 1


def test_shapes_and_kinds_are_checked():
    a = torch.zeros(4, 4)
    with pytest.raises(DataError, match="must be equal"): region_j(a, torch.zeros(4, 5))
    with pytest.raises(DataError, match="binary mask"): region_j(torch.rand(4, 4), a)
    with pytest.raises(DataError, match=r"\(\.\.\., H, W\)"): as_masks(torch.zeros(4))
    with pytest.raises(DataError, match="integer ids"): as_ids(torch.zeros(3))


# ---- boundary F ----

def test_boundary_f_equals_the_full_frame():
    rng = np.random.default_rng(1)
    for _ in range(25):
        a, b = blobs(rng), blobs(rng)
        th = rng.choice([.008, .03, 2])
        assert boundary_f(a, b, float(th)).item() == pytest.approx(f_slow(a, b, th), abs=1e-12)


def test_boundary_f_at_the_border_and_on_full_frames():
    full = np.ones((20, 30), bool); left = full.copy(); left[:, 15:] = False
    for a, b in [(full, full), (full, left), (left, full), (full, ~full), (left, ~left)]:
        assert boundary_f(a, b).item() == pytest.approx(f_slow(a, b), abs=1e-12)


def test_outline_by_hand():
    m = torch.zeros(4, 4, dtype=torch.bool); m[1, 1] = True
    assert outline(m).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]     # half a pixel towards the origin
    assert not outline(torch.ones(3, 3, dtype=torch.bool)).any()


def test_batches_of_masks():
    rng = np.random.default_rng(2)
    a, b = (np.stack([blobs(rng) for _ in range(6)]).reshape(2, 3, 40, 56) for _ in range(2))
    f = boundary_f(a, b)
    assert f.shape == (2, 3) and f[1, 2] == boundary_f(a[1, 2], b[1, 2])


def test_disk_is_the_set_of_near_offsets():
    for r in range(0, 9):
        d = disk(r)
        assert d.shape == (2 * r + 1,) * 2 and all(d[y + r, x + r] == (x * x + y * y <= r * r)
                                                   for y in range(-r, r + 1) for x in range(-r, r + 1))


def test_pair_scores_equal_single_scores():
    rng = np.random.default_rng(3)
    for _ in range(10):
        gt, pred = (sum(k * blobs(rng) for k in (1, 2)).clip(0, 3) for _ in range(2))
        if rng.random() < .5: gt[:5] = 255
        void = torch.from_numpy(gt == 255)
        J, F = pair_scores(gt, pred, [1, 2, 3, 9], [1, 2, 3])
        for i, g in enumerate([1, 2, 3, 9]):
            for j, p in enumerate([1, 2, 3]):
                assert J[i, j] == pytest.approx(region_j(gt == g, pred == p, void).item(), abs=1e-12)
                assert F[i, j] == pytest.approx(boundary_f(gt == g, pred == p, void=void).item(), abs=1e-12)
            assert J[i, -1] == region_j(gt == g, np.zeros_like(gt)) and F[i, -1] == boundary_f(gt == g, np.zeros_like(gt))


def test_pair_scores_of_nothing():
    J, F = pair_scores(np.zeros((5, 6), int), np.zeros((5, 6), int), [], [])
    assert J.tolist() == [[1]] and F.tolist() == [[1]]
    J, F = pair_scores(np.zeros((5, 6), int), np.ones((5, 6), int), [], [1])
    assert J.tolist() == [[0, 1]] and F.tolist() == [[1, 1]]         # a mask of the whole frame has no outline


def test_objects_in():
    assert objects_in(torch.tensor([0, 3, 3, 255, 1])) == [1, 3] and objects_in(torch.tensor([255]), ignore=None) == [255]


# ---- statistics ----

def stats_slow(v, wrap=False):
    ids = np.round(np.linspace(1, len(v), 5) + 1e-10) - 1
    ids = ids.astype(np.uint8) if wrap else ids.astype(int)
    parts = [v[ids[i]:ids[i + 1] + 1] for i in range(4)]
    return np.mean(v), np.mean(np.array(v) > .5), np.mean(parts[0]) - np.mean(parts[3])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 100, 255])
def test_stats_equal_the_evaluator(n):
    v = np.random.default_rng(n).random(n)
    assert jf_stats(v) == pytest.approx(stats_slow(v)) and jf_stats(v, official=True) == pytest.approx(jf_stats(v))


def test_stats_of_a_long_video_do_not_wrap():
    v = np.linspace(1, 0, 400)
    assert jf_stats(v)[2] == pytest.approx(.75, abs=.01)
    assert jf_stats(v, official=True) == pytest.approx(stats_slow(v, wrap=True), nan_ok=True)
    assert jf_stats(v, official=True)[2] != pytest.approx(.75, abs=.01)


def test_stats_by_hand():
    assert jf_stats([1, 1, .2, .2]) == pytest.approx((.6, .5, .8)) and jf_stats([.5] * 8) == (.5, 0, 0)
    assert all(math.isnan(x) for x in jf_stats([]))
    assert jf_stats([math.nan, 1.])[0] == 1


# ---- mask_iou: the one count behind every overlap of masks

shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))


def two_stacks(n, H, W, seed):
    "Masks of every density, the first pair empty on both sides."
    g = torch.Generator().manual_seed(seed)
    share = torch.rand(2, n, 1, 1, generator=g); share[:, 0] = 0
    return torch.rand(2, n, H, W, generator=g) < share


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_mask_iou_is_symmetric_one_on_itself_and_the_same_in_a_batch(shape):
    a, b = two_stacks(*shape)
    for empty in (1., 0., .25):
        got = mask_iou(a, b, empty)
        assert got.dtype == torch.float64 and got.shape == a.shape[:1] and got[0] == empty
        assert got.equal(mask_iou(b, a, empty)) and ((got >= 0) & (got <= 1)).all()
        assert got.tolist() == [mask_iou(x, y, empty).item() for x, y in zip(a, b)]
    some = a.flatten(1).any(1)
    assert mask_iou(a, a, 0.).equal(some.double()) and mask_iou(a, ~a, 1.).eq(0).all()
    assert mask_iou(a, b, math.nan).isnan().equal(~(a | b).flatten(1).any(1))


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_mask_iou_equals_counting_pixel_by_pixel_and_region_j(shape):
    a, b = two_stacks(*shape)
    slow = lambda x, y: (sum(p and q for p, q in zip(x, y)) / n if (n := sum(p or q for p, q in zip(x, y))) else 1.)
    want = [[slow(x.flatten().tolist(), y.flatten().tolist()) for y in b] for x in a]
    assert mask_iou(a[:, None], b).tolist() == want                       # every pair: front axes broadcast
    assert region_j(a, b).equal(mask_iou(a, b, empty=1.))


@given(shapes)
@settings(max_examples=40, deadline=None)
def test_mask_iou_in_single_precision_is_the_rounded_double(shape):
    a, b = two_stacks(*shape)
    single = mask_iou(a, b, empty=0., dtype=torch.float32)
    assert single.dtype == torch.float32 and single.equal(mask_iou(a, b, empty=0.).float())
    assert single.equal((a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1))      # what the losses had
    assert mask_iou(a[0], b[0], dtype=torch.float32).dtype == torch.float32          # a single pair, too


def test_mask_iou_refuses_what_is_no_pair_of_masks():
    m = torch.ones(4, 5, dtype=torch.bool)
    for a, b in ((m, m.float()), (m.long(), m), (m, m[:3]), (m, m[:, :1]), (m[None], m.T)):
        with pytest.raises(DataError, match="bool masks of one"): mask_iou(a, b)
