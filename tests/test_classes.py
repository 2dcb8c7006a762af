"Pictures with classes: what a number means, 255, colours, splits and shares."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.classes import ClassSet, Item, class_set, read_classes, to_classes
from timet_nb.data.frames import write_image, write_mask
from timet_nb.data.layout import find_layout

H, W = 20, 30


def put(where, name, mask, masks=None):
    where = Path(where)
    write_image(where / f"{name}.jpg", torch.rand(3, H, W))
    write_mask((Path(masks) if masks else where) / f"{name}.png", mask)


def blob(*ids, rim=False):
    "Columns of ids on background; a rim of 255 when asked for."
    y = torch.zeros(H, W, dtype=torch.int64)
    for k, i in enumerate(ids): y[5:15, 2 + 9 * k: 8 + 9 * k] = i
    if rim: y[4] = 255
    return y


@pytest.fixture
def voc(tmp_path):
    for k, ids in enumerate(((1,), (2, 20), (15,))):
        put(tmp_path / "voc/images", f"p{k}", blob(*ids, rim=True), tmp_path / "voc/SegmentationClass")
    for name, which in (("train", "p0 p1"), ("val", "p2")):
        file = tmp_path / f"voc/sets/{name}.txt"
        file.parent.mkdir(exist_ok=True); file.write_text("\n".join(which.split()))
    return tmp_path / "voc"


@pytest.fixture
def pairs(tmp_path):
    rows = ["class,sequence,frame"]
    for clip, kind in (("a", "dog"), ("b", "dog"), ("c", "cat"), ("d", "owl"), ("e", "owl")):
        for t in range(2):
            put(tmp_path / "pairs" / clip, f"{t:05d}", blob(1) * 255 // 255)
            rows.append(f"{kind},{clip},{t:05d}")
    (tmp_path / "pairs/index.csv").write_text("\n".join(rows))
    return tmp_path / "pairs"


@pytest.fixture
def ytvos(tmp_path):
    about = {"a": ["dog", "cat"], "b": ["cat", "dog"], "c": ["dog", "owl"]}
    for clip in about:
        for t in range(2): put(tmp_path / f"yt/JPEGImages/{clip}", f"{t:05d}", blob(1, 2, rim=True), tmp_path / f"yt/Annotations/{clip}")
    meta = {c: {"objects": {str(i): {"category": k} for i, k in enumerate(v, 1)}} for c, v in about.items()}
    (tmp_path / "yt/meta.json").write_text(json.dumps({"videos": meta}))
    return tmp_path / "yt"


def found(s, i, size=None): return set(s.read(i, size)[1].unique().tolist())


# ---- meanings ----

def test_voc_numbers_are_classes(voc):
    s = class_set(voc)
    assert (s.meaning, s.n_classes, s.names[15]) == ("ids", 21, "person") and len(s) == 3
    assert found(s, 1) == {0, 2, 20, 255} and s.tally()["tvmonitor"] == 1 and s.tally()["cat"] == 0
    assert [i.name for i in class_set(voc, split="val")] == ["p2"]


def test_the_class_of_a_clip(pairs):
    s = class_set(pairs)
    assert s.names == ("background", "cat", "dog", "owl") and s.meaning == "label"
    assert {i.group: found(s, k) - {0} for k, i in enumerate(s)} == dict(a={2}, b={2}, c={1}, d={3}, e={3})
    assert s.tally() == dict(cat=2, dog=4, owl=4)


def test_objects_with_classes(ytvos):
    s = class_set(ytvos)
    assert s.meaning == "objects" and s.names == ("background", "cat", "dog", "owl")
    by_clip = {i.group: s.read(k)[1] for k, i in enumerate(s)}
    assert [int(by_clip[c][10, 4]) for c in "abc"] == [2, 1, 2] and [int(by_clip[c][10, 13]) for c in "abc"] == [1, 2, 3]
    assert all((y[4] == 255).all() for y in by_clip.values())


def test_foreground(tmp_path):
    put(tmp_path / "JPEGImages/480p/walk", "00000", blob(1, 3, rim=True), tmp_path / "Annotations/480p/walk")
    s = class_set(tmp_path)
    assert s.meaning == "foreground" and s.names == ("background", "object") and found(s, 0) == {0, 1, 255}


def test_the_caller_may_know_better(ytvos):
    s = class_set(ytvos, "foreground")
    assert found(s, 0) == {0, 1, 255} and s.names == ("background", "object")
    s = class_set(ytvos, "ids", names=["one", "two"])
    assert found(s, 0) == {0, 1, 2, 255}


@pytest.mark.parametrize("meaning", ["ids", "label", "objects", "foreground"])
def test_255_and_0_stay(meaning):
    ids = torch.tensor([[0, 255, 1]])
    out = to_classes(ids, Item("x", "", "", "x", meaning, 5, {1: 7}))
    assert out[0, :2].tolist() == [0, 255] and out.dtype == torch.int64


# ---- files ----

def test_palette_grey_and_colours_agree(tmp_path, voc):
    from timet_nb.data.decode_masks import voc_palette
    for way in ("grey", "rgb"):
        for k in range(3):
            image, y = class_set(voc).read(k)
            put(tmp_path / way / "images", f"p{k}", y, tmp_path / way / "SegmentationClass")
            a = y.numpy().astype(np.uint8)
            Image.fromarray(a if way == "grey" else voc_palette()[a]).save(tmp_path / way / f"SegmentationClass/p{k}.png")
    sets = [class_set(p) for p in (voc, tmp_path / "grey", tmp_path / "rgb")]
    for k in range(3): assert len({s.read(k)[1].numpy().tobytes() for s in sets}) == 1


def test_own_colours_have_one_table_for_the_whole_set(tmp_path):
    red, blue = (200, 0, 0), (0, 0, 200)
    for k, colours in enumerate(([red], [blue], [blue, red])):
        put(tmp_path / "images", f"p{k}", blob(1), tmp_path / "masks")
        a = np.zeros((H, W, 3), np.uint8)
        for j, c in enumerate(colours): a[5:15, 2 + 9 * j: 8 + 9 * j] = c
        Image.fromarray(a).save(tmp_path / f"masks/p{k}.png")
    names = ["red", "blue"]
    s = class_set(tmp_path, "ids", names=names, colours={red: 1, blue: 2})
    assert [found(s, k) for k in range(3)] == [{0, 1}, {0, 2}, {0, 1, 2}]
    assert s.read(2)[1][10, 4] == 2 and s.read(2)[1][10, 13] == 1
    numbered = class_set(tmp_path, "ids", names=names)
    assert found(numbered, 0) != found(numbered, 1), "red and blue must not both become class 1"


def test_a_mask_of_another_size_is_brought_to_the_picture(voc):
    write_mask(voc / "SegmentationClass/p0.png", blob(1).repeat_interleave(2, 0).repeat_interleave(2, 1))
    x, y = class_set(voc).read(0)
    assert y.shape == x.shape[-2:] == (H, W) and (y == blob(1)).all()


# ---- reading ----

def test_batches_cover_the_set_in_order(pairs):
    s = class_set(pairs)
    parts = list(s.batches((10, 15), 4))
    assert [len(p[2]) for p in parts] == [4, 4, 2] and parts[0][0].shape == (4, 3, 10, 15)
    assert tuple(i for p in parts for i in p[2]) == s.items
    assert torch.equal(parts[1][1][0], s.read(4, (10, 15))[1])
    assert len(class_set(pairs, step=2)) == 5


def test_clips_keep_groups_together(pairs):
    clips = class_set(pairs).clips()
    assert [c.name for c in clips] == list("abcde") and all(len(c) == c.n_masks() == 2 for c in clips)


# ---- faults ----

def test_a_class_beyond_the_names_is_named(voc):
    s = class_set(voc, names=["one"])
    with pytest.raises(DataError, match=r"p1\.png.*class 20"): s.read(1)


def test_an_object_without_class_is_named(ytvos):
    about = json.loads((ytvos / "meta.json").read_text())
    del about["videos"]["a"]["objects"]["2"]
    (ytvos / "meta.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="does not name"): class_set(ytvos).read(0)


@pytest.mark.parametrize("options, error, words", [
    (dict(meaning="class"), ConfigError, "foreground"),
    (dict(names=["dog", "dog"]), ConfigError, "dog twice"),
    (dict(names=["background"]), ConfigError, "background twice"),
    (dict(names=["dog"]), DataError, "class 'cat'"),
    (dict(step=0), ConfigError, "step"),
])
def test_bad_settings(pairs, options, error, words):
    with pytest.raises(error, match=words): class_set(pairs, **options)


def test_no_masks(tmp_path):
    write_image(tmp_path / "a.jpg", torch.rand(3, 8, 8))
    with pytest.raises(DataError, match="no frame with a mask"): class_set(tmp_path)


def test_a_missing_mask_is_named(pairs):
    s = class_set(pairs)
    (pairs / "a/00001.png").unlink()
    with pytest.raises(DataError, match=r"00001\.png"): s.read(1)


def test_an_unknown_clip_in_the_index_is_named(pairs):
    with open(pairs / "index.csv", "a") as f: f.write("\ndog,nowhere,00000")
    with pytest.raises(DataError, match="nowhere"): class_set(pairs)


def test_nothing_selected(pairs):
    with pytest.raises(DataError, match="no picture"): class_set(pairs).select(lambda i: False)


# ---- splits and shares ----

def toy(counts, frames=1):
    items = [Item(f"c{c}k{k}/{t}", Path("x"), Path("x"), f"c{c}k{k}", "label", c)
             for c, n in enumerate(counts, 1) for k in range(n) for t in range(frames)]
    return ClassSet(("background", *(f"c{c}" for c in range(1, len(counts) + 1))), tuple(items), None, "label")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.floats(.05, .95), st.integers(0, 99))
def test_split_rules(counts, train, seed):
    s = toy(counts, 2)
    try: a, b = s.split(train, seed)
    except ConfigError: assert max(counts) == 1; return
    assert not {i.group for i in a} & {i.group for i in b} and sorted(i.name for i in (*a, *b)) == sorted(i.name for i in s)
    for c, n in enumerate(counts, 1):
        if n > 1: assert a.tally()[f"c{c}"] and b.tally()[f"c{c}"], "a class with two clips is on both sides"
    alone = [c for c, n in enumerate(counts, 1) if n == 1]
    assert len(a.notes) == bool(alone) and all(f"c{c}" in a.notes[0] for c in alone)
    again = replace(s, items=s.items[::-1]).split(train, seed)
    assert {i.name for i in again[0]} == {i.name for i in a}, "the order of files must not matter"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=6).filter(lambda c: max(c) > 1), st.integers(0, 99))
def test_shared_leaves_no_class_on_one_side(counts, seed):
    a, b = toy(counts).split(.5, seed, shared=True)
    assert {k for k, n in a.tally().items() if n} == {k for k, n in b.tally().items() if n}
    assert a.names == b.names and len(a) + len(b) == sum(n for n in counts if n > 1)
    if 1 in counts: assert "left out" in a.notes[0]


def test_the_same_split_on_every_machine():
    assert sorted({i.group for i in toy([4, 3]).split(.5, 0)[0]}) == ["c1k0", "c1k1", "c2k0", "c2k1"]


def test_objects_are_split_by_class_and_unshared_ones_become_unknown(ytvos):
    s = class_set(ytvos)
    for seed in range(4):
        a, b = s.split(.5, seed)
        assert a.tally()["dog"] and b.tally()["dog"] and a.tally()["cat"] and b.tally()["cat"]
        a, b = s.split(.5, seed, shared=True)
        at = next((h, k) for h in (a, b) for k, i in enumerate(h) if i.group == "c")
        assert found(*at) == {0, 2, 255} and "owl" in a.notes[0]


def test_shared_classes_of_numbers(voc):
    put(voc / "images", "p3", blob(2, 7), voc / "SegmentationClass")
    s = class_set(voc).select(lambda i: i.name in ("p1", "p3"))
    a, b = s.split(.5, 0, shared=True)
    assert found(a, 0) - {255} == found(b, 0) - {255} == {0, 2}
    assert s.split(.5, 0)[0].notes == (), "without shared=True the masks of `ids` are not read"


def test_one_clip_has_no_halves(pairs):
    with pytest.raises(ConfigError, match="empty"): class_set(pairs).select(lambda i: i.group == "a").split()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(.01, 1), st.floats(.01, 1), st.integers(0, 9))
def test_shares_are_nested(n, f, g, seed):
    s = toy([n])
    small, large = (s.share(x, seed) for x in sorted((f, g)))
    assert set(small.items) <= set(large.items) and len(small) == max(1, round(min(f, g) * n))
    assert list(small.items) == [i for i in s.items if i in set(small.items)]


@pytest.mark.parametrize("fraction", [0, -1, 1.5])
def test_bad_share(fraction):
    with pytest.raises(ConfigError, match="share in"): toy([3]).share(fraction)


def test_a_label_set_is_not_an_object(voc):
    item = replace(class_set(voc).items[1], meaning="label", to=4)
    assert set(read_classes(item).unique().tolist()) == {0, 4, 255}


@pytest.mark.data
def test_real_pairs(real_data):
    s = class_set(real_data / "davis2016_pairs")
    assert (len(s), len({i.group for i in s}), s.n_classes) == (126, 42, 24)
    a, b = s.split(.5, 0)
    assert len(a) + len(b) == 126 and "14 classes on one side only" in a.notes[0]
    c, d = s.split(.5, 0, shared=True)
    assert sum(n > 0 for n in c.tally().values()) == sum(n > 0 for n in d.tally().values()) == 9
    assert find_layout(real_data / "davis2016_pairs").labels.keys() == set(s.names[1:])
