"Episodes: folds, masks of objects, sampler, controls, sources, faults."
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.episodes import (
    COCO_IDS, COCO_NAMES, PAIRINGS, PROTOCOLS, VOC_NAMES, Episode, EpisodeSource, Picture, all_episodes, class_pairs,
    coco20i, count_episodes, decode_rle, episode_source, fold_classes, fss, lvis92i, pascal5i, read_instances, region_mask,
    sample_episodes, wrong)
from timet_nb.data.frames import write_image, write_mask
from timet_nb.data.known import VOC

H, W = 24, 36


def put(where, name, mask, masks=None):
    write_image(Path(where) / f"{name}.jpg", torch.rand(3, *mask.shape))
    write_mask(Path(masks or where) / f"{name}.png", mask)


def blob(*ids, rim=False):
    y = torch.zeros(H, W, dtype=torch.int64)
    for k, i in enumerate(ids): y[6:18, 2 + 11 * k: 10 + 11 * k] = i
    if rim: y[5] = 255
    return y


def toy(shows, groups=None, pairing="any", n_classes=4, classes=None):
    "A source without files: shows[i] = classes of picture i."
    pictures = tuple(Picture(f"p{i}", Path(f"p{i}.jpg"), f"g{groups[i] if groups else i}", tuple((c, 10) for c in sorted(s)))
                     for i, s in enumerate(shows))
    return EpisodeSource("toy", ("background", *"abcdefgh"[:n_classes]), tuple(classes or range(1, n_classes + 1)), pictures, pairing)


sources = st.builds(
    lambda rows, pairing: toy([r[0] for r in rows], [r[1] for r in rows], pairing),
    st.lists(st.tuples(st.sets(st.integers(1, 4), min_size=1), st.integers(0, 3)), min_size=2, max_size=12),
    st.sampled_from(PAIRINGS))


# ---- folds and lists ----

def test_lists():
    assert VOC_NAMES == tuple(VOC) and len(set(VOC_NAMES)) == 20 and len(set(COCO_NAMES)) == len(COCO_IDS) == 80
    known = {1: "person", 2: "bicycle", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 27: "backpack", 31: "handbag",
             44: "bottle", 46: "wine glass", 65: "bed", 67: "dining table", 70: "toilet", 72: "tv", 82: "refrigerator", 84: "book", 90: "toothbrush"}
    assert {i: COCO_NAMES[COCO_IDS.index(i)] for i in known} == known
    assert set(range(1, 91)) - set(COCO_IDS) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def test_folds_by_hand():
    assert [fold_classes(20, f, rule="blocks") for f in range(4)] == [tuple(range(5 * f, 5 * f + 5)) for f in range(4)]
    assert fold_classes(80, 2) == tuple(2 + 4 * v for v in range(20))
    assert fold_classes(924, 9, 10)[-1] == 9 + 10 * 91 and len(fold_classes(924, 0, 10)) == 92


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 300), st.sampled_from(["stride", "blocks"]))
def test_folds_do_not_overlap(n_folds, n, rule):
    if n < n_folds:
        with pytest.raises(ConfigError): fold_classes(n, 0, n_folds, rule)
        return
    parts = [fold_classes(n, f, n_folds, rule) for f in range(n_folds)]
    every = [c for p in parts for c in p]
    assert len(every) == len(set(every)) == n // n_folds * n_folds and max(every) < n


@pytest.mark.parametrize("args", [(80, 4), (80, -1), (80, 0, 4, "random")])
def test_bad_folds(args):
    with pytest.raises(ConfigError): fold_classes(*args)


# ---- masks of objects ----

def encode(runs):
    text = ""
    for i, n in enumerate(runs):
        n, more = n - (runs[i - 2] if i > 2 else 0), True
        while more:
            code, n = n & 31, n >> 5
            more = n != (-1 if code & 16 else 0)
            text += chr((code | 32 * more) + 48)
    return text


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12), st.integers(1, 7))
def test_rle_equals_the_naive_decoder(runs, height):
    runs = [*runs, -sum(runs) % height + height]
    size = height, sum(runs) // height
    flat = [i % 2 for i, n in enumerate(runs) for _ in range(n)]
    want = torch.tensor(flat).bool().reshape(size[1], height).T
    for form in (runs, encode(runs), encode(runs).encode()): assert torch.equal(decode_rle(form, size), want)


def test_rle_and_polygons_against_pycocotools():
    M = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed: an oracle only")
    rng = np.random.default_rng(0)
    for _ in range(100):
        h, w = rng.integers(1, 90, 2)
        a = (rng.random((h, w)) < rng.choice([0, .02, .5, 1])).astype(np.uint8)
        assert (decode_rle(M.encode(np.asfortranarray(a))["counts"], (h, w)).numpy() == a).all()
    for _ in range(30):
        t, r, c = np.sort(rng.random(9)) * 6.28, rng.uniform(30, 55, 9), rng.uniform(60, 80, 2)
        poly = np.stack([c[0] + r * np.cos(t), c[1] + r * np.sin(t)], 1).ravel().tolist()
        ref, ours = M.decode(M.frPyObjects([poly], 140, 150))[..., 0] > 0, region_mask([poly], (140, 150)).numpy()
        assert (ref & ours).sum() / (ref | ours).sum() > .85 and abs(ours.sum() / ref.sum() - 1) < .15


@pytest.mark.parametrize("counts, words", [([1, 2], "cover 3"), ([7, -1], "none negative"), ("1}~", "no run lengths"),
                                           ("P", "cut off"), ("6 ", "no run lengths")])
def test_bad_rle(counts, words):
    with pytest.raises(DataError, match=words): decode_rle(counts, (2, 3), "annotation 7")


def test_polygon_parts_are_united():
    a, b = [2, 2, 10, 2, 10, 10, 2, 10], [4, 4, 14, 4, 14, 14, 4, 14]
    both = region_mask([a, b], (20, 20))
    assert torch.equal(both, region_mask([a], (20, 20)) | region_mask([b], (20, 20))), "an overlap is no hole"


# ---- partners and counts ----

@settings(max_examples=80, deadline=None)
@given(sources)
def test_counts_equal_lists(s):
    for q in range(len(s)):
        for c in range(1, 5):
            partners = s.partners(q, c)
            assert len(partners) == s.n_partners(q, c) and partners == sorted(partners)
            assert all(c in s.pictures[i].classes for i in partners)
            same = [s.pictures[i].group == s.pictures[q].group for i in partners]
            if s.pairing == "across": assert not any(same)
            if s.pairing == "within": assert all(same) and q not in partners
            if s.pairing == "image": assert partners in ([], [q])
    total = sum(count_episodes(s).values())
    if total: assert len(all_episodes(s)) == total


def test_any_is_across_and_within():
    s = toy([{1}] * 6, [0, 0, 0, 1, 1, 2], n_classes=1)
    n = {p: count_episodes(replace(s, pairing=p))["a"] for p in PAIRINGS}
    assert n == dict(any=30, across=36 - 9 - 4 - 1, within=6 + 2, image=6)


# ---- sampler ----

@settings(max_examples=80, deadline=None)
@given(sources, st.integers(1, 3), st.sampled_from(PROTOCOLS), st.booleans(), st.integers(0, 50))
def test_sampled_episodes_keep_the_rules(s, shots, protocol, repeats, seed):
    try: drawn = sample_episodes(s, 12, shots, seed, protocol, repeats)
    except DataError:
        assert all(not s.queries(c, shots, repeats) for c in s.classes); return
    need = 1 if repeats else shots
    for i, e in enumerate(drawn):
        assert e.index == i and e.class_id in e.query.classes and e.class_name == s.names[e.class_id] and e.wrong_id is None
        assert len(e.support) == shots and all(e.class_id in p.classes for p in e.support)
        if not repeats: assert len(set(e.support)) == shots
        if s.pairing != "image": assert e.query not in e.support
        if s.pairing == "across": assert all(p.group != e.query.group for p in e.support)
        assert s.n_partners(s.places[e.query.name], e.class_id) >= need
    assert sample_episodes(s, 5, shots, seed, protocol, repeats).items == drawn.items[:5]
    asked = {c for c in s.classes if s.queries(c, shots, repeats)}
    assert set(drawn.left_out) == {s.names[c] for c in s.classes} - {s.names[c] for c in asked}


def test_the_same_draw_on_every_machine():
    s = toy([{1}, {1, 2}, {2}, {3}, {3, 1}, {2, 3}], n_classes=3)
    assert [(e.class_id, e.query.name, e.support[0].name) for e in sample_episodes(s, 6, seed=5)] == RECORDED


RECORDED = [(3, "p4", "p3"), (3, "p5", "p3"), (1, "p4", "p1"), (3, "p5", "p4"), (2, "p1", "p5"), (1, "p1", "p4")]


def test_protocols():
    s = toy([{1}] * 8 + [{2}] * 2, n_classes=2)
    share = {p: Counter(e.class_id for e in sample_episodes(s, 1000, protocol=p))[1] / 1000 for p in PROTOCOLS}
    assert abs(share["classes"] - .5) < .06 and share["cycle"] == .5 and share["queries"] == .8
    names = [e.query.name for e in sample_episodes(s, 25, protocol="queries")]
    assert names[:10] == [f"p{i}" for i in range(10)] and names[10:20] == names[:10]


def test_draws_are_uniform():
    s = toy([{1}] * 5, n_classes=1)
    n = Counter((e.query.name, e.support[0].name) for e in sample_episodes(s, 4000))
    assert len(n) == 20 and min(n.values()) > 140 and max(n.values()) < 260


def test_one_picture_per_class_is_left_out_and_named():
    s = toy([{1}, {1}, {2}, {3}], n_classes=3)
    drawn = sample_episodes(s, 10)
    assert drawn.left_out == {"b": "1 picture", "c": "1 picture"} and drawn.names == ["a"] and "left out 2" in repr(drawn)
    with pytest.raises(DataError, match="no class with a query and 2 supports.*\n.*\n.*a \\(2 pictures\\)"): sample_episodes(s, 10, shots=2)
    with pytest.raises(DataError, match="1 picture"): sample_episodes(toy([{1}, {2}], n_classes=2), 3)


@pytest.mark.parametrize("options, words", [(dict(n=0), "n"), (dict(shots=0), "shots"), (dict(protocol="hsnet"), "classes")])
def test_bad_draws(options, words):
    with pytest.raises(ConfigError, match=words): sample_episodes(toy([{1}] * 3, n_classes=1), **{"n": 2, **options})


# ---- controls ----

@settings(max_examples=80, deadline=None)
@given(sources, st.integers(1, 3), st.integers(0, 20))
def test_wrong_references(s, shots, seed):
    try: drawn = sample_episodes(s, 6, shots, seed, repeats=True)
    except DataError: return
    for e in drawn:
        for kind in ("present", "absent"):
            w = wrong(e, kind, seed)
            at = s.places[e.query.name]
            fit = [c for c in range(1, 5) if c != e.class_id and (c in e.query.classes) == (kind == "present") and s.n_partners(at, c)]
            assert (w is None) == (not fit)
            if w is None: continue
            assert w.wrong_id in fit and w.support_id == w.wrong_id and (w.query, w.class_id) == (e.query, e.class_id)
            assert len(w.support) == shots and all(w.wrong_id in p.classes for p in w.support)
            if s.pairing != "image": assert w.query not in w.support
            assert w == wrong(e, kind, seed)


def test_bad_controls():
    e = sample_episodes(toy([{1}] * 3, n_classes=1), 1)[0]
    assert wrong(e) is None and wrong(e, "absent") is None
    with pytest.raises(ConfigError, match="absent"): wrong(e, "any")
    with pytest.raises(ConfigError, match="source"): wrong(replace(e, source=None))


# ---- reading ----

@pytest.fixture
def voc(tmp_path):
    for k, ids in enumerate([(1,), (2,), (1, 7), (2,), (1,), (7, 6), (2, 20)]):
        put(tmp_path / "images", f"p{k}", blob(*ids, rim=True), tmp_path / "SegmentationClass")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/train.txt").write_text("\n".join(f"p{k}" for k in range(7)))
    (tmp_path / "sets/val.txt").write_text("\n".join(f"p{k}" for k in range(6)))
    return tmp_path


def test_read_keeps_255_and_pads(voc):
    e = sample_episodes(pascal5i(voc), 3)[0]
    d = e.read((20, 30), pad=(28, 32))
    assert d.support.shape == (1, 3, 28, 32) and d.query_mask.shape == (28, 32) and d.valid == (20, 30)
    assert (d.query_mask[20:] == 255).all() and (d.query_mask[:, 30:] == 255).all() and (d.query[:, 20:] == 0).all()
    assert set(d.query_mask[:20, :30].unique().tolist()) == {0, 1, 255} == set(e.query.mask(e.class_id).unique().tolist())
    assert e.read(20, pad=14).query.shape == (3, 28, 42) and e.read().query_mask.shape == (H, W)
    with pytest.raises(ConfigError, match="at least"): e.read((20, 30), pad=(10, 10))


def test_supports_of_unlike_sizes_are_padded(voc):
    put(voc / "images", "p4", blob(1).repeat_interleave(2, 0), voc / "SegmentationClass")
    e = next(e for e in sample_episodes(pascal5i(voc), 40, shots=2) if e.query.name == "p0" and e.class_id == 1)
    d = e.read()
    assert d.support.shape == (2, 3, 2 * H, W) and sorted((m[H:] == 255).all().item() for m in d.support_masks) == [False, True]


def test_an_image_pairing_mirrors_the_support(voc):
    s = episode_source(voc, ["aeroplane"], "image", split="train")
    d = sample_episodes(s, 1)[0].read()
    assert torch.equal(d.support[0].flip(-1), d.query) and torch.equal(d.support_masks[0].flip(-1), d.query_mask)


def test_a_wrong_support_has_the_mask_of_its_class(voc):
    s = episode_source(voc, split="train")
    e = next(w for e in sample_episodes(s, 60) if (w := wrong(e)) and w.wrong_id == 7)
    assert torch.equal(e.read().support_masks[0], e.support[0].mask(7)) and torch.equal(e.read().query_mask, e.query.mask(e.class_id))


def test_a_missing_mask_is_named(voc):
    e = sample_episodes(pascal5i(voc), 1)[0]
    e.support[0].item.mask.unlink()
    with pytest.raises(DataError, match=e.support[0].item.mask.name): e.read()


def test_a_mask_that_lost_its_class_is_named(voc):
    e = sample_episodes(pascal5i(voc), 1)[0]
    write_mask(e.support[0].item.mask, blob(9))
    with pytest.raises(DataError, match="no pixel of class"): e.read()


def test_an_object_too_small_for_the_size_is_named(voc):
    tiny = torch.zeros(H, W, dtype=torch.int64); tiny[1, 1] = 1
    for p in voc.glob("SegmentationClass/*.png"): write_mask(p, tiny)
    with pytest.raises(DataError, match=r"at \(4, 6\)"): sample_episodes(pascal5i(voc), 1)[0].read((4, 6))
    with pytest.raises(DataError, match="no picture of"): pascal5i(voc, min_pixels=2)


# ---- sources ----

def test_pascal(voc):
    s = pascal5i(voc, 0)
    assert [s.names[c] for c in s.classes] == ["aeroplane", "bicycle"] and [p.name for p in s.pictures] == [f"p{k}" for k in range(5)]
    assert (s.protocol, s.episodes, s.pairing) == ("queries", 1000, "any")
    assert any("bird, boat, bottle" in n for n in s.notes) and any("p5" in n for n in s.notes)
    train = pascal5i(voc, 0, "train")
    assert [p.name for p in train.pictures] == ["p5"] and any("class of the fold, left out: 6" in n for n in train.notes)
    kept = pascal5i(voc, 0, "train", purge=False)
    assert [p.name for p in kept.pictures] == ["p2", "p5", "p6"] and set(kept.classes) == {6, 7, 20}
    with pytest.raises(ConfigError, match="0 to 3"): pascal5i(voc, 4)
    with pytest.raises(ConfigError, match="part"): pascal5i(voc, 0, "val")


def test_bad_class_lists(voc):
    for classes, words in ((["dog", "unicorn"], "unicorn"), ([0], "0"), ([21], "21"), (["dog", "dog"], "dog twice"), ([], "none")):
        with pytest.raises(ConfigError, match=words): episode_source(voc, classes, split="train")
    with pytest.raises(DataError, match="no picture of dog"): episode_source(voc, ["dog"], split="train")
    with pytest.raises(ConfigError, match="pairing"): episode_source(voc, pairing="video", split="train")


@pytest.fixture
def pairs(tmp_path):
    rows = ["class,sequence,frame"]
    for clip, kind, n in (("a", "dog", 3), ("b", "dog", 2), ("c", "cat", 2), ("d", "owl", 1), ("e", "owl", 2)):
        for t in range(n): put(tmp_path / clip, f"{t:05d}", blob(1)); rows.append(f"{kind},{clip},{t:05d}")
    (tmp_path / "index.csv").write_text("\n".join(rows))
    return tmp_path


def test_pairs_across_videos(pairs):
    s = class_pairs(pairs)
    assert count_episodes(s) == dict(cat=0, dog=2 * 3 * 2, owl=2 * 1 * 2)
    assert count_episodes(class_pairs(pairs, pairing="within")) == dict(cat=2, dog=6 + 2, owl=2)
    assert count_episodes(class_pairs(pairs, step=9)) == dict(cat=0, dog=2, owl=2)
    assert sample_episodes(s, 9).left_out == {"cat": "2 pictures"}


def test_an_empty_mask_is_left_out_and_named(pairs):
    write_mask(pairs / "a/00001.png", torch.zeros(H, W, dtype=torch.int64))
    s = class_pairs(pairs)
    assert count_episodes(s)["dog"] == 2 * 2 * 2 and s.notes == ("pictures whose mask is empty, left out: 1 (a/00001)",)


def test_an_index_with_an_unknown_clip(pairs):
    with open(pairs / "index.csv", "a") as f: f.write("\ndog,nowhere,00000")
    with pytest.raises(DataError, match="nowhere"): class_pairs(pairs)


def coco_json(root, annotations, n=3, kinds=None, **more):
    for k in range(n): write_image(root / f"val2014/c{k}.jpg", torch.rand(3, H, W))
    made = dict(images=[dict(id=k, file_name=f"c{k}.jpg", height=H, width=W) for k in range(n)], annotations=annotations,
                categories=[dict(id=i, name=x) for i, x in (kinds or zip(COCO_IDS, COCO_NAMES))]) | more
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations/instances_val2014.json").write_text(json.dumps(made))
    return root


def note(image, kind, region=None, crowd=0): return dict(image_id=image, category_id=kind, iscrowd=crowd, area=64, segmentation=region or [[4, 4, 12, 4, 12, 12, 4, 12]])


def test_coco_json(tmp_path):
    runs = {"counts": [H * 10, H * 2, H * W - H * 12], "size": [H, W]}
    root = coco_json(tmp_path, [note(0, 44), note(0, 44, [[20, 4, 30, 4, 30, 12]]), note(1, 44, runs), note(1, 44, {**runs, "counts": encode([H * 20, H * 2, H * W - H * 22])}, 1),
                                note(2, 1), note(2, 90)])
    s = coco20i(root, 3)
    assert [s.names[c] for c in s.classes] == ["bottle", "toothbrush"] and (s.protocol, s.episodes) == ("classes", 1000)
    assert count_episodes(s) == dict(bottle=2, toothbrush=0) and dict(s.pictures[0].areas) == {40: 128}
    m = s.pictures[1].mask(40)
    assert (m[:, 10:12] == 1).all() and (m[:, 20:22] == 255).all() and int((m == 1).sum()) == 2 * H
    assert (coco20i(root, 3, crowd="object").pictures[1].mask(40) == 1).sum() == 4 * H
    assert (coco20i(root, 3, crowd="leave").pictures[1].mask(40) == 255).sum() == 0
    assert s.pictures[2].mask(1).sum() > 50 and (sample_episodes(s, 4)[0].read((12, 18)).query_mask == 1).any()
    with pytest.raises(DataError, match="instances_train2014"): coco20i(root, 3, "train")


def test_coco_pngs(tmp_path):
    for k, ids in enumerate([(1, 80), (1,), (80,)]): put(tmp_path / "val2014", f"c{k}", blob(*ids), tmp_path / "annotations/val2014")
    s = coco20i(tmp_path, 3)
    assert s.classes == (80,) and count_episodes(s) == dict(toothbrush=2) and s.names[80] == "toothbrush"
    write_mask(tmp_path / "annotations/val2014/c1.png", blob(81))
    with pytest.raises(DataError, match=r"c1\.png.*81"): coco20i(tmp_path, 3)
    (tmp_path / "val2014/c2.jpg").unlink()
    with pytest.raises(DataError, match="c2.png"): coco20i(tmp_path, 3)


def test_bad_coco(tmp_path):
    with pytest.raises(DataError, match="does not exist"): coco20i(tmp_path / "none")
    with pytest.raises(DataError, match="categories"): coco20i(coco_json(tmp_path, [note(0, 44)], kinds=[(44, "bottle"), (1, "person")]))
    with pytest.raises(DataError, match="annotation None.*category 12"): coco20i(coco_json(tmp_path, [note(0, 12)]))
    with pytest.raises(ConfigError, match="crowd"): read_instances(tmp_path / "annotations/instances_val2014.json", crowd="drop")
    (tmp_path / "annotations/instances_val2014.json").write_text("{}")
    with pytest.raises(DataError, match="images, annotations"): coco20i(tmp_path)
    (tmp_path / "annotations/instances_val2014.json").write_text("{")
    with pytest.raises(DataError, match="no JSON"): coco20i(tmp_path)


def test_a_picture_of_another_size_than_its_json(tmp_path):
    root = coco_json(tmp_path, [note(0, 44), note(1, 44)])
    s = coco20i(root, 3)
    for k in range(2): write_image(root / f"val2014/c{k}.jpg", torch.rand(3, H + 2, W))
    with pytest.raises(DataError, match=r"c\d\.jpg.*26"): sample_episodes(s, 1)[0].read()


def lvis(root, counts):
    "Pictures of classes 1..len(counts); class k is in the first counts[k] pictures."
    n = max(counts)
    kinds = [(i, f"k{i}") for i in range(1, len(counts) + 1)]
    notes = [note(k, i) for (i, _), m in zip(kinds, counts) for k in range(m)]
    coco_json(root, notes, n, kinds)
    return root / "annotations/instances_val2014.json"


def test_lvis_folds_depend_on_shots(tmp_path):
    counts = [3, 1, 3, 2, 3, 3, 2, 3]
    file = lvis(tmp_path, counts)
    one = [lvis92i(tmp_path, f, annotations=file, n_folds=3) for f in range(3)]
    usable = [i for i, n in enumerate(counts, 1) if n > 1]
    assert [s.classes for s in one] == [tuple(usable[f + 3 * v] for v in range(2)) for f in range(3)]
    assert one[0].protocol == "cycle" and one[0].episodes == 50
    assert any("at most 1 picture, left out: 1 (k2)" in n for n in one[0].notes) and any("leave over, left out: 1 (k8)" in n for n in one[0].notes)
    two = lvis92i(tmp_path, 0, 2, annotations=file, n_folds=2)
    assert two.classes == (1, 5) and [e.class_id for e in sample_episodes(two, 4, shots=2)] == [1, 5, 1, 5]
    with pytest.raises(DataError, match="more than 3 pictures"): lvis92i(tmp_path, 0, 3, annotations=file)


def test_fss(tmp_path):
    for kind, n in (("abacus", 3), ("zebra", 2), ("yak", 1)):
        for k in range(1, n + 1):
            put(tmp_path / kind, str(k), blob(1))
            Image.fromarray(255 * blob(1).numpy().astype(np.uint8)).save(tmp_path / kind / f"{k}.png")
    write_image(tmp_path / "yak/2.jpg", torch.rand(3, H, W))
    s = fss(tmp_path)
    assert count_episodes(s) == dict(abacus=6, yak=0, zebra=2) and s.notes == ("pictures without a mask, left out: 1 (yak/2.jpg)",)
    assert sample_episodes(s, 5).left_out == {"yak": "1 picture"}
    assert set(sample_episodes(s, 1)[0].read().query_mask.unique().tolist()) == {0, 1}
    (tmp_path / "test.txt").write_text("zebra\n")
    assert fss(tmp_path, tmp_path / "test.txt").names == ("background", "zebra")
    for bad, words in ((["yeti"], "yeti"), (tmp_path / "no.txt", "no.txt")):
        with pytest.raises(DataError, match=words): fss(tmp_path, bad)
    with pytest.raises(DataError): fss(tmp_path / "nowhere")


def test_counts_of_large_sets_are_remembered(voc, monkeypatch, tmp_path):
    from timet_nb.data import draws
    monkeypatch.setenv("TIMET_CACHE", str(tmp_path / "cache"))
    s = episode_source(voc, split="train")
    items = [p.item for p in s.pictures] * 100
    first = draws._counted(items)
    monkeypatch.setattr(draws, "_areas", lambda i: pytest.fail("counted again"))
    assert draws._counted(items) == first == [p.areas for p in s.pictures] * 100


# ---- real data ----

@pytest.mark.data
def test_real_pairs_by_hand(real_data):
    "42 clips of three frames. n clips of a class make 9 n (n - 1) ordered pairs across; one mask of bmx-bumps is empty."
    s = class_pairs(real_data / "davis2016_pairs")
    n = count_episodes(s)
    hand = {"bird": 4, "car": 3, "dog": 2, "horse+rider": 2, "kite+rider": 2, "motorcycle+rider": 3, "paraglider": 2, "person": 8}
    assert {k: v for k, v in n.items() if v} == {k: 9 * m * (m - 1) for k, m in hand.items()} | {"bmx+rider": 2 * (2 * 3)}
    assert len(n) == 23 and len(s) == 125 and s.notes == ("pictures whose mask is empty, left out: 1 (bmx-bumps/00060)",)
    assert sum(n.values()) == len(all_episodes(s)) == 804
    first = {k: v for k, v in count_episodes(class_pairs(real_data / "davis2016_pairs", step=99)).items() if v}
    assert first == {k: m * (m - 1) for k, m in (hand | {"bmx+rider": 2}).items()}
    drawn = sample_episodes(s, 30)
    assert len(drawn.left_out) == 14 and all(wrong(e) is None and wrong(e, "absent") for e in drawn)
    assert isinstance(drawn[0], Episode) and drawn[0].read((112, 196)).support.shape == (1, 3, 112, 196)
