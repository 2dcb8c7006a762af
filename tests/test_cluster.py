"31_cluster: k-means, maps and scores against brute force, planted regions, and every bad input."
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.conftest import ROOT, STEADY_MALLOC
from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.classes import ClassSet, Item, class_set
from timet_nb.data.frames import read_image, voc_palette, write_image, write_mask
from timet_nb.data.layout import Clip
from timet_nb.evaluate import overcluster
from timet_nb.evaluate.cluster import (CLUSTER_PRESETS, assign_maps, best_union, cluster_maps, cluster_report, cluster_stream,
                                       draw_pixels, evaluate_clustering, kmeans, least_border, nearest, prototype_scores, score_maps,
                                       store_maps, upsampled_points)
from timet_nb.evaluate.overlap import score
from timet_nb.features.pca import pca_fit


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


# ---- a data set of any size ----

class Forgetful:
    "Features that are made when asked for; counts how often."
    def __init__(self, clips): self.clips, self.asked = clips, 0
    def __len__(self): return len(self.clips)
    def __getitem__(self, i): self.asked += 1; return self.clips[i].clone()


@pytest.mark.parametrize("mode", ["frame", "clip", "dataset"])
@pytest.mark.parametrize("official", [False, True])
def test_stream_equals_memory_to_the_bit(mode, official):
    clips = [planted(T, noise=1., seed=s)[0] for s, T in enumerate((3, 1, 40))]
    lazy = Forgetful(clips)
    got = list(cluster_stream(lazy, 5, mode, 6, (13, 17), official=official))
    want = cluster_maps(clips, 5, mode, 6, (13, 17), official=official)
    assert all((a == b).all() for a, b in zip(got, want)) and len(got) == 3
    assert lazy.asked <= 9                                       # three passes at most


@pytest.mark.parametrize("mode", ["frame", "clip", "dataset"])
def test_stream_equals_upsampling_everything_with_the_same_sample(mode):
    clips, size, k = [planted(2, noise=1., seed=s)[0] for s in range(3)], (24, 32), 4
    got = list(cluster_stream(clips, k, mode, 6, size, masks=None))
    groups = {"frame": [[(c, t)] for c in range(3) for t in range(2)], "clip": [[(c, 0), (c, 1)] for c in range(3)],
              "dataset": [[(c, t) for c in range(3) for t in range(2)]]}[mode]
    for members in groups:
        shared = range(3) if mode == "dataset" else [members[0][0]]
        fit = pca_fit(torch.cat([clips[c].movedim(1, -1).flatten(0, 2) for c in shared]), 6)
        grown = torch.cat([F.interpolate(fit.maps(clips[c][t:t + 1]), size=size, mode="bilinear").movedim(1, -1).flatten(0, 2) for c, t in members])
        pick = draw_pixels(len(grown), min(len(grown), 256 * k))
        pick = pick[(pick // (size[0] * size[1])).argsort(stable=True)]
        want = nearest(grown, kmeans(grown[pick], k)[1])
        have = torch.cat([got[c][t].flatten() for c, t in members])
        assert (have != want).float().mean() < 2e-3              # ties of rounding only


def test_assign_maps_in_pieces_is_the_same():
    g = torch.Generator().manual_seed(0)
    z, centres = torch.randn(2, 5, 6, 8, generator=g), torch.randn(23, 5, generator=g)
    whole = assign_maps(z, centres, (24, 32))
    for some in (1, 2, 7, 22): assert (assign_maps(z, centres, (24, 32), room=some * 24 * 32) == whole).all()


def test_a_draw_is_without_repeats_and_needs_no_permutation():
    for total in (100, 2**22, 2**22 + 1, 10**13):
        pick = draw_pixels(total, 100, seed=3)
        assert len(pick.unique()) == 100 and 0 <= pick.min() and pick.max() < total
        assert (pick == draw_pixels(total, 100, seed=3)).all() and not (pick == draw_pixels(total, 100, seed=4)).all()


@pytest.mark.parametrize("lot", [1, 3, 64])
def test_stored_maps_are_the_features(clips, tmp_path, monkeypatch, lot):
    monkeypatch.setattr(overcluster, "LOT", lot)
    paths = [c.frames[:n] for c, n in zip(clips, (2, 4, 1))]
    stored = store_maps(Colours(), paths, 32, tmp_path, batch=2)
    for i, files in enumerate(paths):
        want = Colours().tokens(torch.stack([read_image(f, (32, 32)) for f in files]))
        assert stored[i].shape == want.shape and (stored[i] - want).abs().max() < 1e-5
    with pytest.raises(IndexError): stored[3]


def test_features_are_kept_in_a_folder_when_asked(clips, tmp_path):
    class Counting(Colours):
        calls = 0
        def tokens(self, x, **_): Counting.calls += len(x); return super().tokens(x)
    kw = dict(k=3, frames=2, size=32, map_size=16, pca=4, cache=tmp_path)
    first = evaluate_clustering(Counting(), clips.select(clips.names()[:2]), **kw)
    again = evaluate_clustering(Counting(), clips.select(clips.names()[:2]), **kw | dict(mode="frame"))
    assert Counting.calls == 4 and first["miou"] > 0 and again["pictures"] == 4


PEAK = '''
import sys, threading, psutil, torch
from tests.test_cluster import Colours
from timet_nb.data.catalog import Clip
from timet_nb.data.layout import find_layout
from timet_nb.data.worlds import shipped_clips
from timet_nb.evaluate.cluster import evaluate_clustering
torch.set_num_threads(1)
base = list(find_layout(shipped_clips()))[:2]
def clips(times): return [Clip(f"{c.name}-{i}", c.frames, c.masks) for i in range(times) for c in base]
resident = lambda: psutil.Process().memory_info().rss / 2**20
def peak(times, mode):
    top, done = [0.], threading.Event()
    def look():
        while not done.wait(.002): top[0] = max(top[0], resident())
    eye = threading.Thread(target=look); eye.start()
    r = evaluate_clustering(Colours(), clips(times), k=10, mode=mode, how="precision", size=64, map_size=448, keep=int(sys.argv[1]), pca=6)
    done.set(); eye.join()
    return top[0]
peak(1, "clip")
for mode in ("clip", "dataset"): print(*[peak(n, mode) for n in (1, 2, 4)])
'''


def peaks(keep):
    done = subprocess.run([sys.executable, "-c", PEAK, str(keep)], capture_output=True, text=True, cwd=ROOT, env=os.environ | STEADY_MALLOC)
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(map(float, line.split())) for line in done.stdout.splitlines()]


def test_memory_does_not_grow_with_the_clips():
    "8 clips of 4 maps of 448 x 448 are 51 MB of labels, as much of masks, and 154 MB of features for every pixel: none is held."
    for one, two, four in peaks(keep=0): assert max(two, four) < one + 15, (one, two, four)


# ---- class ids, and every bad input ----

RED, BLUE = (220, 30, 30), (30, 60, 220)


def make_set(root, kind="palette", n=3, clips=2, void=False, side=48):
    "Clips with a red square (class 1) and a blue bar (class 2) that change places; masks of several kinds."
    layout = []
    for c in range(clips):
        frames, masks = [], []
        for t in range(n):
            ids = torch.zeros(side, side, dtype=torch.int64)
            ids[8:24, 4 + 6 * t:20 + 6 * t] = 1 if c % 2 == 0 else 2
            ids[32:40, 4:44] = 2 if c % 2 == 0 else 1
            if void: ids[:4] = 255
            image = torch.full((3, side, side), .4) + .1 * torch.rand(3, side, side, generator=torch.Generator().manual_seed(t))
            for i, colour in ((1, RED), (2, BLUE)): image[:, ids == i] = torch.tensor(colour)[:, None] / 255
            f, m = root / "JPEGImages" / f"c{c}" / f"{t:05d}.png", root / "Annotations" / f"c{c}" / f"{t:05d}.png"
            write_image(f, image)
            if kind == "palette": write_mask(m, ids)
            else:
                from PIL import Image
                m.parent.mkdir(parents=True, exist_ok=True)
                values = voc_palette()[ids.numpy()] if kind == "rgb" else ids.numpy().astype(np.uint8)
                Image.fromarray(values).save(m)
            frames.append(f); masks.append(m)
        layout.append(Clip(f"c{c}", tuple(frames), tuple(masks)))
    return layout


def as_classes(layout, names=("red", "blue")):
    items = [Item(f"{c.name}/{f.stem}", f, m, c.name) for c in layout for f, m in zip(c.frames, c.masks)]
    return ClassSet(("background", *names), tuple(items))


SMALL = dict(size=48, map_size=48, pca=None)


@pytest.mark.parametrize("kind", ["palette", "rgb", "grey"])
@pytest.mark.parametrize("mode", ["frame", "clip", "dataset"])
def test_masks_of_every_kind_score_alike(tmp_path, kind, mode):
    classes = as_classes(make_set(tmp_path, kind))
    r = evaluate_clustering(Colours(), classes, mode=mode, **SMALL)
    assert r["masks"][0].unique().tolist() == [0, 1, 2] and set(r["iou"]) == {"background", "red", "blue"}
    want = evaluate_clustering(Colours(), as_classes(make_set(tmp_path / "again")), mode=mode, **SMALL)
    assert r["miou"] == want["miou"] > .6 and r["absent"] == ()


@pytest.mark.parametrize("mode", ["frame", "clip", "dataset"])
def test_255_is_left_out_in_every_mode(tmp_path, mode):
    classes = as_classes(make_set(tmp_path, void=True))
    r = evaluate_clustering(Colours(), classes, mode=mode, **SMALL)
    assert 255 in r["masks"][0] and set(r["iou"]) == {"background", "red", "blue"}
    changed = [torch.where(g == 255, (p + 1) % 3, p) for g, p in zip(r["masks"], r["maps"])]
    assert score_maps(r["masks"], changed, mode).miou == r["miou"]          # what is predicted there does not matter
    official = evaluate_clustering(Colours(), classes, mode=mode, official=True, **SMALL)
    assert ("255" in official["iou"]) == (mode != "dataset")                # the authors drop it data-set-wise alone
    assert len(r["maps"][0][0].unique()) <= 3                               # nor is it counted as a label


@pytest.mark.parametrize("mode", ["frame", "clip", "dataset"])
def test_pixels_all_unknown_leave_their_item_out(mode):
    gt, pred = labels(0)
    r = score_maps([gt, torch.full_like(gt, 255)], [pred, pred], mode)
    assert r.miou == pytest.approx(score_maps([gt], [pred], mode).miou)
    assert len(r.skipped) == {"frame": 3, "clip": 1, "dataset": 0}[mode]
    assert math.isnan(score_maps([torch.full_like(gt, 255)], [pred], mode).miou)


def test_absent_classes_are_named_and_not_in_the_mean(tmp_path):
    layout = make_set(tmp_path)
    full = evaluate_clustering(Colours(), as_classes(layout), k=3, mode="dataset", **SMALL)
    more = evaluate_clustering(Colours(), as_classes(layout, ("red", "blue", "green", "grey")), k=3, mode="dataset", **SMALL)
    assert more["absent"] == ("green", "grey") and more["miou"] == full["miou"]
    assert math.isnan(more["iou"]["green"]) and more["iou"]["red"] == full["iou"]["red"]


def test_ids_beyond_the_classes_name_the_mask(tmp_path):
    with pytest.raises(DataError, match=r"00000.png.*\n?.*class 2"): evaluate_clustering(Colours(), as_classes(make_set(tmp_path), ("red",)), **SMALL)


@pytest.mark.parametrize("mode, words", [("frame", "clip c0, frame 0: k=3000 clusters of 2304 pixels"),
                                         ("clip", r"clip c0 \(3 frames\): k=7000"), ("dataset", "all 6 frames: k=14000")])
def test_more_clusters_than_pixels(tmp_path, mode, words):
    k = {"frame": 3000, "clip": 7000, "dataset": 14000}[mode]
    with pytest.raises(DataError, match=words): evaluate_clustering(Colours(), as_classes(make_set(tmp_path)), k=k, mode=mode, **SMALL)


@pytest.mark.parametrize("mode", ["frame", "clip", "dataset"])
def test_nan_features_name_the_picture(tmp_path, mode):
    class Broken(Colours):
        def tokens(self, x, **_):
            f = super().tokens(x)
            f[(x[:, 0, 8:24, 16:32].mean((1, 2)) > .8)] = math.nan             # the red square in the middle: frame 2 of c0
            return f
    with pytest.raises(DataError, match=r"c0.00002.png.*NaN"): evaluate_clustering(Broken(), as_classes(make_set(tmp_path)), mode=mode, **SMALL)
    maps = torch.zeros(4, 3, 5, 5); maps[2, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match=r"features\[horse\]: NaN.*frame 2"): list(cluster_stream([maps], 2, mode, names=["horse"]))


def test_images_smaller_than_a_patch(tmp_path):
    classes = as_classes(make_set(tmp_path / "small", side=48))
    from timet_nb.features.backbone import create_backbone
    vit = create_backbone("test-vit").eval()
    with pytest.raises(DataError, match="patch"): evaluate_clustering(vit, classes, size=4, map_size=16, k=2)
    tiny, ids = tmp_path / "t.png", tmp_path / "m.png"
    write_image(tiny, torch.rand(3, 5, 3)); write_mask(ids, torch.tensor([[0, 1, 1]] * 5))
    r = evaluate_clustering(vit, ClassSet(("background", "a"), (Item("t", tiny, ids, "t"),)), size=32, map_size=16, k=2)
    assert r["maps"][0].shape == (1, 16, 16) and 0 < r["miou"] <= 1          # it is brought to the size of the input


@pytest.mark.parametrize("how", ["hungarian", "precision", "many_to_one"])
def test_an_empty_cluster_and_an_empty_class_change_nothing(how):
    gt, pred = labels(0)
    hole, gap = torch.where(pred >= 2, pred + 1, pred), torch.where(gt == 2, 3, gt)      # cluster 2, class 2 do not occur
    a, b = (score_maps([g], [p], "clip", how) for g, p in ((gt, pred), (gap, hole)))
    assert a.miou == b.miou and b.items[0].n_clusters == a.items[0].n_clusters and 2 not in b.iou
    extreme = torch.cat([torch.randn(3, 4, 6, 8), torch.full((1, 4, 6, 8), 50.)])        # k-means with more centres than heaps
    m, = cluster_maps([extreme], 40, "clip", None)
    assert m.max() < 40 and score_maps([m.clamp(max=1)], [m], "clip", how).miou > 0


# ---- presets and sources ----

def test_presets_are_the_rows_of_the_papers():
    rows = {n: (p["mode"], p["k"], p["how"]) for n, p in CLUSTER_PRESETS.items()}
    assert rows == {"F": ("frame", None, "hungarian"), "C": ("clip", None, "hungarian"), "D": ("dataset", None, "hungarian"),
                    "OC-F": ("frame", 10, "precision"), "OC-C": ("clip", 10, "precision"), "OC-D": ("dataset", "paper", "precision"),
                    "VOC-21": ("dataset", 21, "hungarian"), "VOC-500": ("dataset", 500, "precision")}
    assert all(p["size"] == 224 and p["pca"] == 50 for p in CLUSTER_PRESETS.values())


@pytest.mark.parametrize("name", list(CLUSTER_PRESETS))
def test_every_preset_runs_on_a_class_set(tmp_path, name):
    r = evaluate_clustering(Colours(), as_classes(make_set(tmp_path)), **CLUSTER_PRESETS[name] | SMALL)
    assert 0 < r["miou"] <= 1 and r["k"] == {"OC-D": 500, "VOC-21": 21, "VOC-500": 500, "OC-F": 10, "OC-C": 10}.get(name)


def test_the_papers_k_depends_on_the_data(clips, tmp_path):
    few = clips.select(clips.names()[:2])
    assert evaluate_clustering(Colours(), few, "paper", "dataset", frames=1, **SMALL)["k"] == 200      # laid out as DAVIS
    foreground = class_set(few, meaning="foreground").select([0, 25])
    assert evaluate_clustering(Colours(), foreground, "paper", "dataset", frames=1, **SMALL)["k"] == 200
    with pytest.raises(ConfigError, match="'paper'"): evaluate_clustering(Colours(), few, "many", **SMALL)
    with pytest.raises(ConfigError, match="k=0"): evaluate_clustering(Colours(), few, 0, **SMALL)


def test_stills_are_scored_picture_by_picture(tmp_path):
    layout = make_set(tmp_path, n=1, clips=5)
    r = evaluate_clustering(Colours(), as_classes(layout), mode="frame", **SMALL)
    assert len(r["score"].items) == r["pictures"] == 5                      # no picture is drawn twice
    clip = evaluate_clustering(Colours(), as_classes(layout), mode="clip", **SMALL)
    assert clip["miou"] == r["miou"]                                        # a still is a clip of one frame
    official = evaluate_clustering(Colours(), as_classes(layout), mode="frame", official=True, **SMALL)
    assert official["pictures"] == 20                                       # the authors draw with repeats


def test_ids_are_semantic_in_a_class_set(clips):
    "horse-desert has objects 1 and 2; in the class set they are horse and person, as in the other clips."
    classes = class_set(clips)
    few = classes.select(lambda i: i.group in ("horse-desert", "astronaut-lawn"))
    r = evaluate_clustering(Colours(), few, mode="dataset", frames=2, **SMALL)
    seen = {n for n, v in r["iou"].items() if not math.isnan(v)}
    assert seen == {"background", "horse", "person"} and r["k"] is None
    assert set(r["absent"]) == {"cat", "cup", "helmet", "rocket"}
    assert len(torch.cat(r["maps"]).unique()) <= 3


def test_large_results_are_scored_and_forgotten(clips):
    few = clips.select(clips.names()[:2])
    kept = evaluate_clustering(Colours(), few, 3, frames=2, **SMALL)
    gone = evaluate_clustering(Colours(), few, 3, frames=2, keep=1000, **SMALL)
    assert gone["maps"] is gone["masks"] is None and gone["miou"] == kept["miou"] and len(kept["maps"]) == 2


@pytest.mark.data
def test_real_pairs_have_their_classes(real_data):
    classes = class_set(real_data / "davis2016_pairs")
    few = classes.select(range(12))
    r = evaluate_clustering(Colours(), few, 20, "dataset", "precision", size=64, map_size=56, pca=6)
    assert len(r["iou"]) == 24 and 0 < r["miou"] < 1 and r["pictures"] == 12
