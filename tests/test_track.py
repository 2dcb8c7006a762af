"35_track: streams, masks, the DAVIS measures on folders, the other evaluator, and the real clips."
import csv
import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.frames import write_mask
from timet_nb.evaluate.overlap import boundary_f, jf_stats, region_j
from timet_nb.evaluate.track import (NUMBERS, Tracker, TrackScore, accumulated_iou, evaluate_folder, evaluate_tracking,
                                     network_size, score_track, track, write_tracks)


class Colours(torch.nn.Module):
    "A stand-in for a backbone: the mean colour of each 8 x 8 patch, and a constant so that no patch is zero."
    patch = 8
    def __init__(self): super().__init__(); self.one = torch.nn.Parameter(torch.ones(1)); self.seen = []
    def tokens(self, x, block=-1, norm=True):
        self.seen.append(tuple(x.shape))
        p = F.avg_pool2d(x * self.one, 8) - .5
        return torch.cat([p, torch.full_like(p[:, :1], .2)], 1)


def moving(T=8, H=64, W=96, step=4):
    "A red and a green square that move apart on blue."
    frames = torch.zeros(T, 3, H, W); frames[:, 2] = .6
    ids = torch.zeros(T, H, W, dtype=torch.int64)
    for t in range(T):
        for k, (y, x) in {3: (8, 40 - step * t), 7: (40, 40 + step * t)}.items():
            ids[t, y:y + 16, x:x + 16] = k
            frames[t, :, y:y + 16, x:x + 16] = torch.tensor([1., .1, .1] if k == 3 else [.1, 1., .1])[:, None, None]
    return frames, ids


# ---- tracking ----

def test_two_squares_are_followed_and_keep_their_ids():
    frames, ids = moving()
    out = torch.stack(list(track(Colours(), frames, ids[0], radius=0)))
    assert out.shape == ids.shape and out.dtype == torch.int64 and set(out.unique().tolist()) == {0, 3, 7}
    assert (out[0] == ids[0]).all()
    for k in (3, 7): assert region_j(out == k, ids == k).mean() > .8


def test_radius_limits_how_far_a_label_may_jump():
    frames, ids = moving(T=2, step=40)                       # 40 pixels in one frame: 5 patches
    far, near = (list(track(Colours(), frames, ids[0], radius=r))[1] for r in (0, 2))
    assert region_j(far == 3, ids[1] == 3) > .8 and region_j(near == 3, ids[1] == 3) == 0


def test_streaming_takes_one_frame_at_a_time_and_holds_nothing():
    frames, ids = moving()
    taken = []
    def source():
        for f in frames: taken.append(1); yield f
    out = track(Colours(), source(), ids[0])
    assert not taken
    next(out); assert len(taken) == 1
    next(out); assert len(taken) == 2


def test_memory_does_not_grow_with_the_length():
    import gc
    frames, ids = moving()
    t = Tracker(Colours(), frames[0], ids[0], n_last=3)
    held = sum(x.numel() for x in (t.state.sources, t.state.labels))
    def rss(): gc.collect(); return int(open("/proc/self/statm").read().split()[1]) * 4096
    for i in range(40): t.step(frames[i % 8])
    start = rss()
    for i in range(1000): t.step(frames[i % 8])
    assert sum(x.numel() for x in (t.state.sources, t.state.labels)) == held
    assert rss() - start < 30e6


def test_any_resolution_and_the_size_the_backbone_sees():
    frames, ids = moving(H=70, W=101)
    b = Colours()
    out = list(track(b, frames, ids[0], radius=0))
    assert b.seen[0] == (1, 3, 72, 104) and out[3].shape == (70, 101)
    b = Colours(); list(track(b, frames[:2], ids[0], size=32, radius=0)); assert b.seen[0] == (1, 3, 32, 48)
    b = Colours(); list(track(b, frames[:2], ids[0], size=(40, 40), radius=0)); assert b.seen[0] == (1, 3, 40, 40)


def test_network_size_by_hand():
    assert network_size(480, 854, 14, 364) == (364, 644) and network_size(480, 854, 16) == (480, 848)
    assert network_size(854, 480, 14, 364) == (644, 364) and network_size(30, 30, 16, (33, 47)) == (32, 48)
    with pytest.raises(ConfigError, match="less than one patch of 14"): network_size(480, 854, 14, 8)


def test_unknown_pixels_of_the_first_mask_belong_to_nobody():
    frames, ids = moving()
    first = ids[0].clone(); first[:4] = 255
    out = list(track(Colours(), frames, first, radius=0))
    assert 255 not in torch.stack(out) and region_j(out[-2] == 7, ids[-2] == 7) > .8


def test_uint8_frames_clips_and_readers_give_the_same(tmp_path):
    from timet_nb.data.frames import ClipReader, write_image
    from timet_nb.data.layout import find_layout
    frames, ids = moving()
    (tmp_path / "c").mkdir()
    for i, f in enumerate(frames): write_image(tmp_path / "c" / f"{i:05d}.png", f)
    clip = find_layout(tmp_path)[0]
    eight = (frames * 255).round().to(torch.uint8)
    want = torch.stack(list(track(Colours(), eight, ids[0], radius=0)))
    for source in (clip, ClipReader(clip), (f for f in eight)):
        assert (torch.stack(list(track(Colours(), source, ids[0], radius=0))) == want).all()
    assert len(list(track(Colours(), clip, ids[0], radius=0, step=3))) == 3


@pytest.mark.parametrize("frames, mask, words", [
    (torch.zeros(2, 3, 64, 96), torch.zeros(64, 96, dtype=torch.int64), "no object"),
    (torch.zeros(2, 3, 64, 96), torch.full((64, 96), 255), "no object"),
    (torch.zeros(2, 3, 64, 96), torch.ones(64, 96), "integer ids"),
    (torch.zeros(2, 3, 64, 96), torch.ones(1, 64, 96, dtype=torch.int64), r"expected \(H, W\)"),
    (torch.zeros(2, 64, 96, 3), torch.ones(64, 96, dtype=torch.int64), "move the colours to the front"),
    (torch.zeros(0, 3, 64, 96), torch.ones(64, 96, dtype=torch.int64), "no frame")])
def test_bad_input_is_named(frames, mask, words):
    with pytest.raises(DataError, match=words): list(track(Colours(), frames, mask))


def test_write_tracks_and_read_back(tmp_path):
    _, ids = moving()
    assert write_tracks(ids, tmp_path / "c", [f"f{i}" for i in range(8)]) == 8
    from timet_nb.data.frames import read_mask
    assert (read_mask(tmp_path / "c" / "f3.png") == ids[3]).all() and Image.open(tmp_path / "c" / "f3.png").mode == "P"
    with pytest.raises(DataError, match="more masks than the 2 names"): write_tracks(ids, tmp_path / "d", ["a", "b"])


# ---- scores ----

def wobble(ids, rng, p=.2):
    "A worse copy of a clip: shifted, with speckle."
    out = torch.stack([torch.roll(m, tuple(rng.integers(-3, 4, 2).tolist()), (0, 1)) for m in ids])
    noise = torch.from_numpy(rng.random(out.shape) < p * .05)
    return torch.where(noise, torch.from_numpy(rng.choice([0, 3, 7, 9], out.shape)), out)


def davis_slow(gt, pred, skip=True):
    "The evaluator's definition: every object of the clip, all frames but the ends, absent on both sides = 1."
    rows = {}
    for o in [i for i in gt.unique().tolist() if i not in (0, 255)]:
        g, p, v = gt == o, pred == o, gt == 255
        if skip: g, p, v = g[1:-1], p[1:-1], v[1:-1]
        rows[o] = (jf_stats(region_j(g, p, v)), jf_stats(boundary_f(g, p, void=v)))
    return rows


def test_scores_equal_the_definition():
    rng = np.random.default_rng(0)
    _, gt = moving(T=9)
    gt = gt.clone(); gt[:3][gt[:3] == 7] = 0                 # object 7 comes late
    gt[6][gt[6] == 3] = 0; gt[4, :6] = 255
    for skip in (True, False):
        pred = wobble(gt, rng)
        rows, slow = score_track(gt, pred, skip_ends=skip), davis_slow(gt, pred, skip)
        assert [r["object"] for r in rows] == list(slow) and rows[0]["n"] == (7 if skip else 9)
        for r in rows:
            got = (r["J_mean"], r["J_recall"], r["J_decay"]), (r["F_mean"], r["F_recall"], r["F_decay"])
            assert got[0] == pytest.approx(slow[r["object"]][0], abs=1e-12)
            assert got[1] == pytest.approx(slow[r["object"]][1], abs=1e-12)
            assert r["JF"] == pytest.approx((r["J_mean"] + r["F_mean"]) / 2)


def test_matching_equals_all_permutations():
    rng = np.random.default_rng(1)
    _, gt = moving(T=7)
    names = torch.zeros(256, dtype=torch.int64); names[[3, 7, 9]] = torch.tensor([20, 4, 3])
    pred = names[wobble(gt, rng)]
    rows = {r["object"]: r for r in score_track(gt, pred, matched=True)}
    assert rows[3]["found"] == 20 and rows[7]["found"] == 4
    s = TrackScore(matched=True)
    for g, p in zip(gt, pred): s.add(g, p)
    quality = lambda pairs: sum(np.mean(s.values(o, p)) for o, p in pairs)
    best = max(quality(zip((3, 7), perm)) for perm in itertools.permutations((3, 4, 20), 2))
    assert quality((o, r["found"]) for o, r in rows.items()) == pytest.approx(best)
    assert score_track(gt, pred)[0]["J_mean"] < .1                     # same ids: 3 is a stranger here


def test_more_objects_than_predictions():
    _, gt = moving(T=5)
    pred = torch.where(gt == 3, 1, 0)
    rows = {r["object"]: r for r in score_track(gt, pred, matched=True)}
    assert rows[3]["J_mean"] == 1 and rows[7]["found"] is None and rows[7]["J_mean"] == 0
    nothing = {r["object"]: r for r in score_track(gt, gt * 0, matched=True)}
    assert nothing[3]["J_mean"] == nothing[7]["F_mean"] == 0


def test_official_order_of_matched_objects():
    _, gt = moving(T=5)
    pred = torch.where(gt == 3, 8, torch.where(gt == 7, 2, 0))
    assert [r["object"] for r in score_track(gt, pred, matched=True)] == [3, 7]
    assert [r["object"] for r in score_track(gt, pred, matched=True, official=True)] == [7, 3]


def test_ends_are_skipped():
    _, gt = moving(T=4)
    bad = gt.clone(); bad[0] = bad[-1] = 0
    assert all(r["J_mean"] == 1 for r in score_track(gt, bad)) and score_track(gt, bad, skip_ends=False)[0]["J_mean"] == .5
    with pytest.raises(DataError, match="2 frames given: nothing is left"): score_track(gt[:2], gt[:2])


def test_properties_of_the_score():
    rng = np.random.default_rng(2)
    _, gt = moving(T=6)
    pred = wobble(gt, rng)
    a = score_track(gt, pred)
    back = score_track(gt.flip(0), pred.flip(0))
    assert [r["J_mean"] for r in a] == pytest.approx([r["J_mean"] for r in back])       # time reversed: same mean
    swap = {3: 7, 7: 3}
    change = torch.arange(256); change[[3, 7]] = torch.tensor([7, 3])
    renamed = {r["object"]: r for r in score_track(change[gt], change[pred])}
    for r in a: assert renamed[swap[r["object"]]]["JF"] == pytest.approx(r["JF"])


def test_accumulated_iou_by_hand():
    gt = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 0]]])
    pred = torch.tensor([[[1, 0, 0, 0]], [[1, 0, 0, 0]], [[1, 0, 0, 0]]])
    # running counts: 1/2, 2/3, 2/4, summed over all frames, divided by the 2 frames that show the object
    assert accumulated_iou(gt, pred)[1] == pytest.approx((1 / 2 + 2 / 3 + 2 / 4) / 2)
    assert accumulated_iou(gt, pred, official=True)[1] == pytest.approx((1 / 2 + 2 / 3 + 2 / 4) / 3)


# ---- folders ----

@pytest.fixture
def tree(tmp_path):
    "Two clips of truth and a prediction."
    rng = np.random.default_rng(3)
    for name in ("a", "b"):
        _, gt = moving(T=6, step=3 if name == "a" else 5)
        write_tracks(gt, tmp_path / "gt" / name)
        write_tracks(torch.where(wobble(gt, rng) == 9, 0, wobble(gt, rng)), tmp_path / "pred" / name)
    return tmp_path


def test_folder_equals_score_track(tree):
    from timet_nb.data.frames import read_mask
    rows = evaluate_folder(tree / "pred", tree / "gt")
    assert [(r["clip"], r["object"]) for r in rows] == [("a", 3), ("a", 7), ("b", 3), ("b", 7)]
    read = lambda w, c: torch.stack([read_mask(p) for p in sorted((tree / w / c).glob("*.png"))])
    slow = [r for c in "ab" for r in score_track(read("gt", c), read("pred", c))]
    for r, s in zip(rows, slow): assert all(r[k] == s[k] for k in NUMBERS)
    assert rows.mean["JF"] == pytest.approx(np.mean([s["JF"] for s in slow]))
    one = evaluate_folder(tree / "pred" / "a", tree / "gt" / "a")          # a single clip on either side
    assert one[0]["JF"] == rows[0]["JF"]


def test_the_other_evaluator_agrees(tree):
    from vos_benchmark.benchmark import benchmark
    for ends in (True, False):
        theirs = benchmark([str(tree / "gt")], [str(tree / "pred")], num_processes=1, verbose=False, skip_first_and_last=ends)[3][0]
        ours = evaluate_folder(tree / "pred", tree / "gt", skip_ends=ends)
        for r in ours:
            j, f = (theirs[r["clip"]][i][r["object"]] for i in (0, 1))
            assert 100 * r["J_mean"] == pytest.approx(j, abs=1e-9) and 100 * r["F_mean"] == pytest.approx(f, abs=1e-9)


def test_missing_clips_and_frames(tree):
    shutil.rmtree(tree / "pred" / "b")
    with pytest.raises(DataError, match="no masks of 1 of 2 clips: b"): evaluate_folder(tree / "pred", tree / "gt")
    rows = evaluate_folder(tree / "pred", tree / "gt", missing="empty")
    assert rows[2]["J_mean"] == 0 and any("clip b was not predicted" in n for n in rows.notes)
    assert len(evaluate_folder(tree / "pred", tree / "gt", clips=["a"])) == 2
    (tree / "pred" / "a" / "00002.png").unlink()
    with pytest.raises(DataError, match="clip a: 1 of 6 frames were not predicted: 00002"):
        evaluate_folder(tree / "pred", tree / "gt", clips=["a"])
    rows = evaluate_folder(tree / "pred", tree / "gt", clips=["a"], missing="empty")
    assert any("1 frames were not predicted and count as empty" in n for n in rows.notes)
    with pytest.raises(DataError, match="no clip z; there are a, b"): evaluate_folder(tree / "pred", tree / "gt", clips=["z"])
    with pytest.raises(ConfigError, match="missing="): evaluate_folder(tree / "pred", tree / "gt", missing="skip")


def test_missing_ends_are_fine_when_they_are_skipped(tree):
    want = evaluate_folder(tree / "pred", tree / "gt")
    for c in "ab": (tree / "pred" / c / "00000.png").unlink(); (tree / "pred" / c / "00005.png").unlink()
    assert list(evaluate_folder(tree / "pred", tree / "gt")) == list(want)
    with pytest.raises(DataError, match="2 of 6 frames"): evaluate_folder(tree / "pred", tree / "gt", skip_ends=False)


def test_extra_clips_frames_and_objects_are_counted_not_scored(tree):
    want = evaluate_folder(tree / "pred", tree / "gt")
    shutil.copytree(tree / "pred" / "a", tree / "pred" / "c")
    shutil.copy(tree / "pred" / "a" / "00001.png", tree / "pred" / "a" / "00099.png")
    m = np.array(Image.open(tree / "pred" / "b" / "00003.png")); was = m.copy(); m[:2, :2] = 50
    write_mask(tree / "pred" / "b" / "00003.png", torch.from_numpy(np.where(was == 0, m, was).astype(np.int64)))
    got = evaluate_folder(tree / "pred", tree / "gt")
    assert list(got) == list(want)
    for words in ("clip c has no truth", "1 predicted frames have no truth: 00099", "ids beyond the 2 true objects"):
        assert any(words in n for n in got.notes), words


def test_sparse_truth(tree):
    for p in sorted((tree / "gt" / "a").glob("*.png"))[1::2]: p.unlink()
    rows = evaluate_folder(tree / "pred", tree / "gt", clips=["a"])
    assert rows[0]["n"] == 1 and any("3 predicted frames have no truth" in n for n in rows.notes)


def test_other_sizes_names_and_damage(tree):
    small = np.array(Image.open(tree / "pred" / "a" / "00002.png"))[::2, ::2]
    write_mask(tree / "pred" / "a" / "00002.png", torch.from_numpy(small.astype(np.int64)))
    with pytest.raises(DataError, match=r"00002.png: \(32, 48\), but the truth .*\(64, 96\)"):
        evaluate_folder(tree / "pred", tree / "gt")
    for p in sorted((tree / "pred" / "b").glob("*.png")): p.rename(p.with_name("frame_" + p.name))
    with pytest.raises(DataError, match="clip b: no frame name in common"): evaluate_folder(tree / "pred", tree / "gt", clips=["b"])
    bad = tree / "gt" / "a" / "00001.png"; bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(DataError, match="00001.png"): evaluate_folder(tree / "pred", tree / "gt", clips=["a"])
    with pytest.raises(DataError, match="is no folder"): evaluate_folder(tree / "nowhere", tree / "gt")
    (tree / "hollow").mkdir()
    with pytest.raises(DataError, match="holds no masks"): evaluate_folder(tree / "hollow", tree / "gt")


def test_grey_0_255_masks_score_like_palette_ids(tree):
    want = evaluate_folder(tree / "pred", tree / "gt")
    for which in ("gt", "pred"):
        for p in (tree / which).rglob("*.png"):
            m = np.array(Image.open(p)) == 3
            out = tree / f"{which}_grey" / p.parent.name / p.name; out.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((m * 255).astype(np.uint8)).save(out)
    rows = evaluate_folder(tree / "pred_grey", tree / "gt_grey")
    assert [r["object"] for r in rows] == [1, 1] and rows[0]["J_mean"] == want[0]["J_mean"]


def test_grey_ids_with_void_are_not_taken_for_binary(tmp_path):
    ids = np.zeros((3, 20, 30), np.uint8); ids[:, 5:12, 5:12] = 1; ids[1] = 0; ids[:, :2] = 255   # frame 1: only void
    for t, m in enumerate(ids):
        for which in ("gt", "pred"):
            out = tmp_path / which / "c" / f"{t}.png"; out.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(m if which == "gt" else m * (m < 255)).save(out)
    row, = evaluate_folder(tmp_path / "pred", tmp_path / "gt", skip_ends=False)
    assert row["object"] == 1 and row["J_mean"] == 1


def test_data_set_root_and_order_of_folders(tree):
    shutil.move(tree / "gt", tree / "Annotations"); (tree / "set" / "Annotations").mkdir(parents=True)
    shutil.move(tree / "Annotations", tree / "set" / "Annotations" / "480p")
    (tree / "set" / "JPEGImages").mkdir()
    assert len(evaluate_folder(tree / "pred", tree / "set")) == 4


# ---- a data set, from files ----

def test_evaluate_tracking_on_generated_clips(tmp_path):
    from timet_nb.data.layout import find_layout
    from timet_nb.data.worlds import shipped_clips
    layout = find_layout(shipped_clips())
    some = layout.select(layout.names()[:2])
    rows = evaluate_tracking(Colours(), some, size=64, step=2, frames=6, out=tmp_path, radius=6)
    assert {r["clip"] for r in rows} == set(some.names()) and all(0 <= r["JF"] <= 1 for r in rows) and rows[0]["n"] == 4
    assert len(list((tmp_path / some[0].name).glob("*.png"))) == 6
    import dataclasses
    half = [some[0], dataclasses.replace(some[1], masks=None)]
    assert "not tracked" in evaluate_tracking(Colours(), half, size=64, step=2, frames=4).notes[0]
    with pytest.raises(DataError, match="no clip could be tracked"): evaluate_tracking(Colours(), half[1:], size=64)


# ---- real data ----

def figures(path): return list(csv.DictReader(open(path)))


@pytest.mark.data
def test_real_osvos_masks_equal_the_official_figures(real_data):
    want = {r["sequence"]: r for r in figures(real_data / "evaluator" / "osvos_vs_davis16.csv")}
    truth = real_data / "davis2016" / "Annotations"
    there = [p.name for p in truth.iterdir() if p.name in want]
    assert len(there) == 7
    for r in evaluate_folder(real_data / "evaluator" / "osvos", truth, clips=sorted(there)):
        w = want[r["clip"]]
        assert r["n"] == int(w["n"]) and all(abs(r[k] - float(w[k])) < 1e-4 for k in NUMBERS[:6]), r["clip"]


@pytest.mark.data
@pytest.mark.parametrize("protocol", ["same-id", "hungarian"])
def test_real_multi_object_equals_the_official_figures(real_data, protocol):
    want = [r for r in figures(real_data / "evaluator" / "rvos_vs_osvos_multi.csv") if r["protocol"] == protocol]
    got = evaluate_folder(real_data / "evaluator" / "rvos", real_data / "evaluator" / "osvos", protocol == "hungarian",
                          clips=sorted({r["sequence"] for r in want}), official=True, skip_ends=True)
    assert len(got) == len(want) == 8
    for r, w in zip(got, want):
        assert r["clip"] == w["sequence"] and all(abs(r[k] - float(w[k])) < 1e-4 for k in ("J_mean", "F_mean"))


@pytest.mark.data
def test_real_the_other_evaluator_agrees(real_data, tmp_path):
    from vos_benchmark.benchmark import benchmark
    for name in ("blackswan", "car-shadow"):
        for p in sorted((real_data / "davis2016" / "Annotations" / name).glob("*.png"))[:12]:
            g, q = np.array(Image.open(p)), np.array(Image.open(real_data / "evaluator" / "osvos" / name / p.name))
            for which, m in (("gt", g > 0), ("pred", q == 1)):
                out = tmp_path / which / name / p.name; out.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(m.astype(np.uint8)).save(out)
    theirs = benchmark([str(tmp_path / "gt")], [str(tmp_path / "pred")], num_processes=1, verbose=False)[3][0]
    for r in evaluate_folder(tmp_path / "pred", tmp_path / "gt"):
        assert 100 * r["J_mean"] == pytest.approx(theirs[r["clip"]][0][1], abs=1e-9)
        assert 100 * r["F_mean"] == pytest.approx(theirs[r["clip"]][1][1], abs=1e-9)


def mean_j(backbone, clip, frames=25):
    "Every second frame at 364 x 644, 7 context frames, top 5, radius 12, as the reference figures were made."
    from timet_nb.evaluate.track import _track_clip
    pairs = list(_track_clip(backbone, clip, (364, 644), 2, frames, dict(n_last=6, topk=5, radius=12)))[1:]
    return float(region_j(torch.stack([g > 0 for g, _ in pairs]), torch.stack([p > 0 for _, p in pairs])).mean())


@pytest.mark.data
@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize("name, figure", [("dog", .871), ("blackswan", .872), ("camel", .844)])
def test_real_propagation_reaches_the_reference(real_data, vit, name, figure):
    from timet_nb.data.layout import find_layout
    assert abs(mean_j(vit, find_layout(real_data / "davis2016")[name]) - figure) < .03


@pytest.mark.data
@pytest.mark.slow
def test_real_random_weights_are_far_below(real_data):
    from timet_nb.data.layout import find_layout
    from timet_nb.features.backbone import create_backbone
    assert mean_j(create_backbone("random-vit-s14"), find_layout(real_data / "davis2016")["dog"]) < .4


def test_a_cnn_tracks_at_whole_cells_of_its_coarsest_stride():
    "A CNN halves more often than its patch says: sizes are multiples of the last stride."
    from timet_nb.data.layout import find_layout
    from timet_nb.data.worlds import shipped_clips
    from timet_nb.features.backbone import create_backbone
    net = create_backbone("efficientnet-lite0-imagenet", pretrained=False).eval()
    rows = evaluate_tracking(net, find_layout(shipped_clips()).clips[:1], size=100, frames=4)
    assert len(rows) >= 1 and 0 <= rows.mean["J_mean"] <= 1
