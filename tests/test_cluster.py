"31_cluster: k-means, maps and scores against brute force, planted regions, and every bad input."
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.evaluate.cluster import (assign_maps, best_union, cluster_maps, cluster_report, evaluate_clustering, kmeans,
                                       least_border, nearest, prototype_scores, score_maps, upsampled_points)
from timet_nb.evaluate.overlap import score


def planted(T=3, D=12, h=6, w=8, k=3, noise=.05, seed=0):
    "Vertical stripes, each with its own feature: (T, D, h, w) maps and (T, h, w) labels."
    g = torch.Generator().manual_seed(seed)
    ids = (torch.arange(w) * k // w).expand(T, h, w).clone()
    centres = torch.randn(k, D, generator=g) * 2
    return centres[ids].permute(0, 3, 1, 2) + noise * torch.randn(T, D, h, w, generator=g), ids


# ---- k-means ----

def test_kmeans_finds_separated_groups():
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(5).repeat_interleave(40)
    x = torch.eye(5)[truth] * 10 + torch.randn(200, 5, generator=g) * .1
    labels, centres = kmeans(x, 5)
    assert score(truth, labels).miou == 1 and centres.shape == (5, 5) and labels.dtype == torch.int64
    assert (labels == nearest(x, centres)).all()


def test_kmeans_repeats_whatever_the_thread_count():
    import faiss
    x = torch.randn(3000, 16, generator=torch.Generator().manual_seed(1))
    first = kmeans(x, 7, seed=3)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        again = kmeans(x, 7, seed=3)
        assert faiss.omp_get_max_threads() == 2                       # given back as it was
    finally: faiss.omp_set_num_threads(before)
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert not (kmeans(x, 7, seed=4)[1] == first[1]).all()


def test_kmeans_takes_any_float_layout():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    want = kmeans(x, 3)[0]
    for y in (x.double(), x.T.contiguous().T, x.numpy(), x.clone().requires_grad_()): assert (kmeans(y, 3)[0] == want).all()


@pytest.mark.parametrize("x, k, words", [
    (torch.randn(4, 2), 5, "k=5 clusters of 4 points"), (torch.randn(4, 2), 0, "k=0"), (torch.randn(4), 2, r"expected \(M, D\)"),
    (torch.tensor([[0., 1.], [math.nan, 0.]]), 2, "the first is point 1"),
    (torch.tensor([[math.inf, 1.], [0., 0.]]), 2, "NaN or infinity"), (torch.ones(9, 3), 2, "all 9 points are equal"),
    (torch.zeros(0, 3), 1, "of 0 points")])
def test_kmeans_names_what_is_wrong(x, k, words):
    with pytest.raises(DataError, match=words): kmeans(x, k)


def test_one_cluster_of_equal_points_and_duplicates_are_fine():
    assert (kmeans(torch.ones(5, 2), 1)[0] == 0).all()
    x = torch.tensor([[0., 0.]] * 6 + [[1., 1.]] * 6)
    assert score(torch.tensor([0] * 6 + [1] * 6), kmeans(x, 2)[0]).miou == 1


# ---- maps ----

@pytest.mark.parametrize("size", [(6, 8), (13, 9), (24, 40), (3, 4)])
def test_upsampled_points_equal_interpolate(size):
    z = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    full = F.interpolate(z, size=size, mode="bilinear").permute(0, 2, 3, 1).reshape(-1, 5)
    index = torch.randperm(len(full))
    assert (upsampled_points(z, index, size) - full[index]).abs().max() < 1e-5


def test_assign_maps_equal_nearest_of_upsampled_features():
    g = torch.Generator().manual_seed(0)
    z, centres = torch.randn(2, 5, 6, 8, generator=g), torch.randn(4, 5, generator=g)
    up = F.interpolate(z, size=(24, 32), mode="bilinear").permute(0, 2, 3, 1).reshape(-1, 5)
    slow = torch.cdist(up, centres).argmin(1).reshape(2, 24, 32)
    assert (assign_maps(z, centres, (24, 32)) != slow).float().mean() < 1e-3      # ties of rounding only


def test_prototype_scores_are_upsampled_cosines():
    g = torch.Generator().manual_seed(0)
    z, p = torch.randn(2, 5, 3, 4, generator=g), torch.randn(7, 5, generator=g)
    s = prototype_scores(z, p, (3, 4))
    assert s[1, 6, 2, 3] == pytest.approx(F.cosine_similarity(z[1, :, 2, 3], p[6], dim=0).item(), abs=1e-6)


@pytest.mark.parametrize("mode", ["frame", "clip", "dataset"])
def test_planted_stripes_are_found(mode):
    clips = [planted(seed=0), planted(seed=0, T=2)]
    maps = cluster_maps([f for f, _ in clips], 3, mode, pca=6)
    assert [m.shape for m in maps] == [(3, 6, 8), (2, 6, 8)]
    assert score_maps([m for _, m in clips], maps, mode).miou == 1


def test_maps_of_another_size_and_k_from_the_labels():
    f, ids = planted(k=4)
    big = F.interpolate(ids[:, None].float(), size=(48, 64), mode="nearest")[:, 0].long()
    big[:, :5] = 255
    m, = cluster_maps([f], None, "clip", pca=6, size=(48, 64), masks=[big])
    assert m.shape == (3, 48, 64) and len(m.unique()) == 4            # 255 is not counted
    m, = cluster_maps([f], None, "clip", pca=6, size=(48, 64), masks=[big], official=True)
    assert len(m.unique()) == 5                                        # ... but it is by the authors
    assert score_maps([big], cluster_maps([f], 4, "clip", 6, (48, 64))).miou > .85


def test_frames_of_different_size_share_a_clustering():
    a, b = planted(seed=0), planted(seed=0, h=4, w=12)
    maps = cluster_maps([a[0], b[0]], 3, "dataset", pca=6)
    assert [tuple(m.shape[1:]) for m in maps] == [(6, 8), (4, 12)]
    assert score_maps([a[1], b[1]], maps, "dataset").miou == 1


def test_a_clip_does_not_depend_on_its_neighbours_unless_official():
    f, other = torch.randn(2, 12, 6, 8), 5 * torch.randn(3, 12, 6, 8) + 2
    alone, together = cluster_maps([f], 4, "clip", 3), cluster_maps([f, other], 4, "clip", 3)
    assert (alone[0] == together[0]).all()
    official = cluster_maps([f, other], 4, "clip", 3, official=True)
    assert not (official[0] == alone[0]).all()


def test_same_seed_same_maps():
    f = torch.randn(2, 12, 6, 8)
    assert (cluster_maps([f], 4, seed=5)[0] == cluster_maps([f], 4, seed=5)[0]).all()


@pytest.mark.parametrize("call, error, words", [
    (lambda f: cluster_maps([f], 3, "video"), ConfigError, "frame, clip, dataset"),
    (lambda f: cluster_maps([f], None), ConfigError, "give masks"),
    (lambda f: cluster_maps([], 3), DataError, "no clip"),
    (lambda f: cluster_maps([f[0]], 3), DataError, r"features\[0\]: expected \(T, D, h, w\)"),
    (lambda f: cluster_maps([f, f * math.nan], 3), DataError, r"features\[1\]: NaN"),
    (lambda f: cluster_maps([f, torch.ones_like(f)], 3), DataError, "clip 1 .3 frames.*equal"),
    (lambda f: cluster_maps([f], 500, "frame"), DataError, "clip 0, frame 0: k=500 clusters of 48 pixels"),
    (lambda f: cluster_maps([f], None, masks=[]), DataError, "1 clips of features but 0 of masks"),
    (lambda f: cluster_maps([f[:, :, :1, :1]], 9), DataError, "k=9 clusters of 3 pixels"),
])
def test_cluster_maps_names_what_is_wrong(call, error, words):
    with pytest.raises(error, match=words): call(planted()[0])


# ---- scores ----

def labels(seed, T=3, G=3, P=4, void=True):
    g = torch.Generator().manual_seed(seed)
    gt = torch.randint(0, G, (T, 7, 9), generator=g)
    pred = torch.where(torch.rand(gt.shape, generator=g) < .5, gt, torch.randint(0, P, gt.shape, generator=g))
    if void: gt[torch.rand(gt.shape, generator=g) < .1] = 255
    return gt, pred


@pytest.mark.parametrize("how", ["hungarian", "precision"])
def test_score_maps_are_means_of_scores(how):
    gt, pred = zip(*[labels(s, T) for s, T in enumerate((3, 1, 2))])
    frames = [score(g, p, how).miou for G, P in zip(gt, pred) for g, p in zip(G, P)]
    assert score_maps(gt, pred, "frame", how).miou == pytest.approx(np.mean(frames))
    assert score_maps(gt, pred, "clip", how).miou == pytest.approx(np.mean([score(g, p, how).miou for g, p in zip(gt, pred)]))
    pooled = score(torch.cat([g.flatten() for g in gt]), torch.cat([p.flatten() for p in pred]), how)
    assert score_maps(gt, pred, "dataset", how).miou == pytest.approx(pooled.miou)


def test_official_counts_255_and_averages_batches():
    gt, pred = zip(*[labels(s) for s in range(3)])
    clip = [score(g, p, ignore=None).miou for g, p in zip(gt, pred)]
    assert score_maps(gt, pred, "clip", official=True).miou == pytest.approx(np.mean(clip))
    got = score_maps(gt, pred, "clip", official=True, batch=2).miou         # batches of 2 and 1 weigh the same
    assert got == pytest.approx((np.mean(clip[:2]) + clip[2]) / 2)
    assert score_maps(gt, pred, "clip").miou > got
    assert score_maps(gt, pred, "dataset", official=True).miou == score_maps(gt, pred, "dataset").miou


def test_items_without_classes_are_skipped_and_counted():
    gt, pred = labels(0, void=False)
    empty = torch.zeros_like(gt)
    r = score_maps([gt, empty], [pred, pred], "clip", background=False)
    assert r.skipped == (1,) and r.miou == pytest.approx(score(gt, pred, background=False).miou)
    official = score_maps([gt, empty], [pred, pred], "clip", background=False, official=True)
    assert official.miou == pytest.approx(r.miou / 2)                       # the authors count it as 0
    assert math.isnan(score_maps([empty], [pred], "clip", background=False).miou)


def test_score_maps_names_what_is_wrong():
    gt, pred = labels(0)
    with pytest.raises(DataError, match="2 clips of gt but 1"): score_maps([gt, gt], [pred])
    with pytest.raises(DataError, match="clip 0: gt is"): score_maps([gt], [pred[:2]])
    with pytest.raises(DataError, match="no clip"): score_maps([], [])
    with pytest.raises(ConfigError, match="mode="): score_maps([gt], [pred], "video")
    with pytest.raises(DataError, match="integer ids"): score_maps([gt.float()], [pred])


def test_best_union_equals_all_subsets():
    for seed in range(20):
        table = torch.from_numpy(np.random.default_rng(seed).integers(0, 50, (2, 7)))
        best = 0
        for n in range(1, 8):
            for some in itertools.combinations(range(7), n):
                some = list(some)
                hit, miss = int(table[1, some].sum()), int(table[0, some].sum())
                best = max(best, hit / max(int(table[1].sum()) + miss, 1))
        iou, chosen = best_union(table)
        assert iou == pytest.approx(best)
        assert table[1][chosen].sum() / (table[1].sum() + table[0][chosen].sum()) == pytest.approx(best)


def test_least_border_is_the_middle():
    m = torch.zeros(2, 8, 8, dtype=torch.int64); m[:, 2:6, 2:6] = 1; m[:, 0, :2] = 1
    assert least_border(m, 2) == 1 and least_border(1 - m, 2) == 0
    assert least_border(m, 3) == 1                                          # a cluster that does not occur is not chosen


# ---- the report ----

def square_world(T=4, s=16, noise=.3, seed=0):
    "A square with a feature of its own on two backgrounds."
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(T, s, s, dtype=torch.int64)
    for t in range(T): ids[t, 4:11, 2 + t:9 + t] = 1
    kind = ids.clone(); kind[(ids == 0) & (torch.arange(s) > s // 2)] = 2
    basis = torch.eye(3, 20) * 6
    return basis[kind].permute(0, 3, 1, 2) + noise * torch.randn(T, 20, s, s, generator=g), ids


def test_report_of_a_world_that_can_be_clustered():
    f, m = square_world()
    r = cluster_report([f], [m], names=["square"], pca=5)
    row, = r["clips"]
    assert row["clip"] == "square" and row["OC10"] > .95 and row["OCb"] >= row["OC10fg"] - 1e-9 and row["OCb"] > .95
    assert r["mean"]["OCb"] == row["OCb"] and r["skipped"] == []


def test_report_equals_its_definition():
    f, m = square_world(noise=4.)
    m[0, :2] = 255
    got = cluster_report([f], [m], seeds=(3,), pca=5)["clips"][0]
    two, = cluster_maps([f], 2, "clip", 5, (16, 16), seed=3)
    ten, = cluster_maps([f], 10, "clip", 5, (16, 16), seed=3)
    k2, oc = score(m, two), score(m, ten, "precision")
    assert got["K2"] == k2.miou and got["K2fg"] == k2.iou[1] and got["OC10"] == oc.miou and got["OC10fg"] == oc.iou[1]
    fg = two == least_border(two, 2)
    assert got["FG"] == pytest.approx(float((fg & (m == 1)).sum() / ((fg & (m != 255)) | (m == 1)).sum()))
    three = cluster_report([f], [m], seeds=(0, 1, 2), pca=5)["clips"][0]
    singles = [cluster_report([f], [m], seeds=(s,), pca=5)["clips"][0]["OC10"] for s in range(3)]
    assert three["OC10"] == pytest.approx(np.mean(singles))


def test_report_skips_and_names_clips_without_foreground():
    f, m = square_world()
    r = cluster_report([f, f], [m, m * 0], names=["a", "b"], pca=5)
    assert r["skipped"] == ["b"] and len(r["clips"]) == 1
    assert math.isnan(cluster_report([f], [m * 0])["mean"]["K2"])
    with pytest.raises(DataError, match=r"masks of 0: expected \(4, H, W\)"): cluster_report([f], [m[:2]])


# ---- a data set, from files ----

class Colours(torch.nn.Module):
    "A stand-in for a backbone: mean colour, its square and its gradient in each 8 x 8 patch."
    patch = 8
    def __init__(self): super().__init__(); self.one = torch.nn.Parameter(torch.ones(1))
    def tokens(self, x, **_): p = F.avg_pool2d(x * self.one, 8); return torch.cat([p, p * p, p.roll(1, 1) * p], 1)


@pytest.fixture(scope="module")
def clips():
    from timet_nb.data.layout import find_layout
    from timet_nb.data.worlds import shipped_clips
    return find_layout(shipped_clips())


def test_evaluate_clustering_end_to_end(clips):
    some = clips.select(clips.names()[:3])
    r = evaluate_clustering(Colours(), some, mode="clip", frames=3, size=64, map_size=32, pca=4)
    assert 0 < r["miou"] < 1 and len(r["score"].items) == 3 and r["clips"] == some.names()
    again = evaluate_clustering(Colours(), some, mode="clip", frames=3, size=64, map_size=32, pca=4)
    assert again["miou"] == r["miou"]
    d = evaluate_clustering(Colours(), some, k=12, mode="dataset", how="precision", frames=2, size=64, map_size=32, pca=4)
    assert len(d["score"].items) == 1 and d["maps"][0].shape == (2, 32, 32)


def test_evaluate_clustering_wants_masks(clips):
    import dataclasses
    bare = [dataclasses.replace(clips[0], masks=None)]
    with pytest.raises(DataError, match="no masks"): evaluate_clustering(Colours(), bare, frames=2, size=64)
