"timet_nb.data.layout: every layout recognised, nothing written to, every fault named."
import hashlib
import io
import json
import os
import random
import shutil
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data import convert as V, layout as L
from timet_nb.data.layout import (Clip, Found, Layout, convert_visor, find_layout, frame_numbers, list_folder,
                                  map_ids, natural_key)


# ---------------------------------------------------------------- trees
def put(root, *names, data=b"x"):
    "Make small files; the layout never opens a frame."
    for name in names:
        path = Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def frames(root, folder, n=3, suffix=".jpg", start=0, step=1, pattern="{:05d}"):
    put(root, *(f"{folder}/{pattern.format(start + i * step)}{suffix}" for i in range(n)))


def jpeg(width=64, height=36, seed=0):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


def visor_json(video, n=2, canvas=(64, 36)):
    w, h = canvas
    shots = []
    for i in range(n):
        name = f"{video}_frame_{140 + 37 * i:010d}.jpg"
        notes = [{"name": "left hand", "class_id": 300, "segments": [[[0, 0], [w / 2 - 1, 0], [w / 2 - 1, h - 1], [0, h - 1]]]},
                 {"name": "knife", "class_id": 4, "segments": [[[w / 2, 0], [w - 1, 0], [w - 1, h / 2], [w / 2, h / 2]]]}]
        shots.append({"image": {"name": name, "image_path": f"{video}/{name}", "video": video,
                                "subsequence": f"{video}_seq_00001"}, "annotations": notes})
    return json.dumps({"info": {}, "video_annotations": shots}).encode()


def make_visor(root, zipped=True, canvas=(64, 36)):
    for part, video in (("train", "P01_01"), ("val", "P02_03")):
        text = visor_json(video, canvas=canvas)
        put(root, f"annotations/{part}/{video}.json", data=text)
        names = [s["image"]["name"] for s in json.loads(text)["video_annotations"]]
        if zipped:
            path = Path(root) / f"rgb_frames/{part}/{video[:3]}/{video}.zip"
            path.parent.mkdir(parents=True)
            with zipfile.ZipFile(path, "w") as z:
                for i, n in enumerate(names): z.writestr(n, jpeg(seed=i))
        else:
            for i, n in enumerate(names): put(root, f"rgb_frames/{part}/{video[:3]}/{video}/{n}", data=jpeg(seed=i))


def meta(objects):
    return json.dumps({"videos": {c: {"objects": {i: {"category": k, "frames": ["00000"]} for i, k in o.items()}}
                                  for c, o in objects.items()}}).encode()


def make_tree(kind, root):
    "Make a small tree of one kind; returns the root."
    root = Path(root)
    if kind == "davis2017":
        for c in ("bear", "dog", "bike-packing"):
            for size in ("480p", "Full-Resolution"):
                frames(root, f"JPEGImages/{size}/{c}")
                frames(root, f"Annotations/{size}/{c}", suffix=".png")
                frames(root, f"Annotations_unsupervised/{size}/{c}", suffix=".png")
        put(root, "ImageSets/2016/val.txt", data=b"bear\n")
        put(root, "ImageSets/2017/train.txt", data=b"bear\ndog\n")
        put(root, "ImageSets/2017/val.txt", data=b"bike-packing\n")
    elif kind == "davis2016":
        for size in ("480p", "1080p"):
            for c in ("bear", "dog"):
                frames(root, f"JPEGImages/{size}/{c}"), frames(root, f"Annotations/{size}/{c}", suffix=".png")
            for part, c in (("train", "bear"), ("val", "dog")):
                lines = [f"/JPEGImages/{size}/{c}/{i:05d}.jpg /Annotations/{size}/{c}/{i:05d}.png" for i in range(3)]
                put(root, f"ImageSets/{size}/{part}.txt", data="\n".join(lines).encode())
    elif kind == "davis_flat":
        for c in ("bear", "dog"): frames(root, f"JPEGImages/{c}"), frames(root, f"Annotations/{c}", suffix=".png")
        put(root, "README.md", "db_info.yml")
    elif kind == "ytvos":
        frames(root, "train/JPEGImages/0043f083b5", 11), frames(root, "train/Annotations/0043f083b5", 3, ".png", step=5)
        frames(root, "train/JPEGImages/00ad5016a4", 6, step=5), frames(root, "train/Annotations/00ad5016a4", 6, ".png", step=5)
        put(root, "train/meta.json", data=meta({"0043f083b5": {"1": "dog", "2": "person", "3": "ape"}, "00ad5016a4": {"1": "sedan"}}))
        frames(root, "valid/JPEGImages/0062f687f1", 4, step=5), put(root, "valid/Annotations/0062f687f1/00000.png")
        put(root, "valid/meta.json", data=meta({"0062f687f1": {"1": "zebra"}}))
        frames(root, "train_all_frames/JPEGImages/0043f083b5", 11)
    elif kind == "mose":
        for c in ("0fae12", "1a2b3c"): frames(root, f"train/JPEGImages/{c}"), frames(root, f"train/Annotations/{c}", suffix=".png")
        frames(root, "valid/JPEGImages/9f0e1d"), put(root, "valid/Annotations/9f0e1d/00000.png")
        put(root, "meta_train.json", data=meta({"0fae12": {"1": "cow"}, "1a2b3c": {"1": "cat", "2": "cat"}}))
    elif kind == "visor_raw": make_visor(root)
    elif kind == "visor_unpacked": make_visor(root, zipped=False)
    elif kind == "voc":
        names = [f"2007_00{i:04d}" for i in range(6)]
        put(root, *(f"images/{n}.jpg" for n in names))
        put(root, *(f"SegmentationClass/{n}.png" for n in names[:3]), *(f"SegmentationClassAug/{n}.png" for n in names[1:5]))
        put(root, "sets/train.txt", data="\n".join(names[:2]).encode())
        put(root, "sets/trainaug.txt", data="\n".join(names[1:5]).encode())
        put(root, "sets/val.txt", data=names[2].encode())
    elif kind == "vocdevkit":
        names = [f"2007_00{i:04d}" for i in range(4)]
        base = "VOCdevkit/VOC2012"
        put(root, *(f"{base}/JPEGImages/{n}.jpg" for n in names), *(f"{base}/SegmentationClass/{n}.png" for n in names[:3]))
        put(root, f"{base}/ImageSets/Segmentation/train.txt", data="\n".join(names[:2]).encode())
        put(root, f"{base}/ImageSets/Segmentation/val.txt", data=names[2].encode())
        put(root, f"{base}/ImageSets/Main/val.txt", data=b"other")
    elif kind == "pairs":
        rows = ["class,sequence,frame"]
        for k, c in (("bird", "swan"), ("bird", "duck"), ("cow", "cows")):
            for i in (0, 27):
                rows.append(f"{k},{c},{i:05d}")
                put(root, f"{c}/{i:05d}.jpg", f"{c}/{i:05d}.png")
        put(root, "index.csv", data="\n".join(rows).encode())
    elif kind == "paired":
        put(root, *(f"images/{n}.jpg" for n in "abc"), *(f"masks/{n}.png" for n in "ac"))
    elif kind == "clips1": frames(root, "cat"), frames(root, "dog", 5)
    elif kind == "clips2": frames(root, "train/cat"), frames(root, "val/dog", 5)
    elif kind == "clip": frames(root, ".", 4, pattern="frame_{:d}", start=8)
    elif kind == "images": put(root, "beach.jpg", "Forest.PNG", "a lake.webp")
    elif kind == "videos": put(root, "a.mp4", "b.AVI", "c.mov", "d.webm", "more/e.mkv")
    elif kind == "mixed": frames(root, "cat"), put(root, "dog.mp4", "cover.jpg", "notes.txt")
    else: raise KeyError(kind)
    return root


KINDS = {"davis2017": "davis", "davis2016": "davis", "davis_flat": "davis", "ytvos": "ytvos", "mose": "mose",
         "visor_unpacked": "visor", "voc": "voc", "vocdevkit": "vocdevkit", "pairs": "pairs", "paired": "paired",
         "clips1": "clips", "clips2": "clips", "clip": "clip", "images": "images", "videos": "videos", "mixed": "mixed"}


def fingerprint(root):
    "Names, sizes, times, rights and bytes of everything below a folder."
    digest = hashlib.sha256()
    for path in sorted(Path(root).rglob("*")):
        s = path.lstat()
        digest.update(repr((str(path), s.st_mode, s.st_size, s.st_mtime_ns, s.st_ino)).encode())
        if path.is_file(): digest.update(path.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- recognising
@pytest.mark.parametrize("tree", KINDS)
def test_recognised_and_untouched(tree, tmp_path):
    root = make_tree(tree, tmp_path / "data set é")
    before = fingerprint(root)
    found = find_layout(root)
    assert found.kind == KINDS[tree]
    assert len(found) and all(p.is_file() for c in found for p in c.files())
    assert "\n" not in found.describe() and str(len(found)) in found.describe()
    names = [c.name for c in found]
    assert len(set(names)) == len(names) and names == sorted(names, key=natural_key)
    found.table(), found._repr_markdown_(), str(found), found.rows(), found.labels, found.pair_classes()
    find_layout(root, labels=False)
    for part in found.splits: find_layout(root, split=part)
    assert fingerprint(root) == before


@pytest.mark.parametrize("tree", KINDS)
def test_read_only_tree_is_enough(tree, tmp_path):
    "Nothing needs the right to write (as root the bits do not bind, so opening for writing is watched too)."
    root = make_tree(tree, tmp_path / "ro")
    for path in sorted(root.rglob("*"), reverse=True): path.chmod(0o555 if path.is_dir() else 0o444)
    root.chmod(0o555)
    try: assert find_layout(root).kind == KINDS[tree]
    finally:
        for path in [root, *root.rglob("*")]:
            if path.is_dir(): path.chmod(0o755)


@pytest.mark.parametrize("tree", ["davis2017", "ytvos", "voc", "mixed"])
def test_no_writing_call_is_made(tree, tmp_path):
    import subprocess, sys
    root = make_tree(tree, tmp_path / "watched")
    code = """
import sys, os
from timet_nb.data.layout import find_layout
bad = []
def hook(event, args):
    if event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
                 "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile"): bad.append((event, args))
    if event == "open" and (isinstance(args[1], str) and set(args[1]) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        bad.append((event, args))
    if event == "open" and str(args[0]).lower().endswith((".jpg", ".png", ".mp4", ".avi")): bad.append(("frame opened", args))
sys.addaudithook(hook)
found = find_layout(sys.argv[1])
print(found.kind); assert not bad, bad
"""
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.strip() == KINDS[tree]


def test_davis_2017(tmp_path):
    root = make_tree("davis2017", tmp_path)
    found = find_layout(root)
    assert found.resolution == "480p" and set(found.splits) == {"train", "val"}
    assert [c.name for c in found] == ["bear", "bike-packing", "dog"]
    assert found["dog"].masks[2] == root / "Annotations/480p/dog/00002.png"
    assert any("Full-Resolution" in n for n in found.notes)
    assert find_layout(root, split="val").names() == ["bike-packing"]           # the newest year
    assert find_layout(root, split="2016/val").names() == ["bear"]              # asked for by name
    full = find_layout(root, split="train", resolution="Full-Resolution")
    assert full.resolution == "Full-Resolution" and full.names() == ["bear", "dog"] and full["dog"].split == "train"
    assert "Full-Resolution" in str(full["dog"].masks[0])
    other = find_layout(root, labels="Annotations_unsupervised")
    assert "Annotations_unsupervised" in str(other["dog"].masks[0])
    assert find_layout(root, labels=False)["dog"].masks is None
    with pytest.raises(DataError, match="no split 'test'; there are: 2017/train"): find_layout(root, split="test")
    with pytest.raises(DataError, match="Full-Resolution"): find_layout(root, resolution="720p")
    with pytest.raises(DataError, match="Annotations_unsupervised"): find_layout(root, labels="Masks")


def test_davis_2016_lists_frames(tmp_path):
    root = make_tree("davis2016", tmp_path)
    assert find_layout(root, split="val").names() == ["dog"]
    assert len(find_layout(root, split="train", resolution="1080p")["bear"]) == 3
    (root / "JPEGImages/480p/dog/00001.jpg").unlink()
    with pytest.raises(DataError, match="dog.*00001"): find_layout(root, split="val")
    put(root, "JPEGImages/480p/bear/00003.jpg")
    found = find_layout(root, split="train")
    assert len(found["bear"]) == 3 and any("bear: 1" in n for n in found.notes)


def test_split_that_names_missing_clips(tmp_path):
    root = make_tree("davis2017", tmp_path)
    put(root, "ImageSets/2017/val.txt", data=b"\xef\xbb\xbfbike-packing\r\ngoat\r\nzebra\r\n")
    with pytest.raises(DataError, match="goat, zebra") as e: find_layout(root, split="val")
    assert "val.txt" in str(e.value) and "2 of them" in str(e.value)
    put(root, "ImageSets/2017/val.txt", data=b"\n\n")
    with pytest.raises(DataError, match="names no clip"): find_layout(root, split="val")
    put(root, "ImageSets/2017/val.txt", data=b"\xff\xfe\x00bad")
    with pytest.raises(DataError, match="val.txt"): find_layout(root, split="val")


def test_masks_at_another_resolution_are_not_taken(tmp_path):
    root = make_tree("davis2017", tmp_path)
    shutil.rmtree(root / "Annotations/Full-Resolution"), shutil.rmtree(root / "Annotations_unsupervised")
    found = find_layout(root, resolution="Full-Resolution")
    assert found.n_masks() == 0 and any("another resolution" in n and "480p" in n for n in found.notes)


def test_youtube_vos(tmp_path):
    root = make_tree("ytvos", tmp_path)
    found = find_layout(root)
    assert found.names() == ["00ad5016a4", "0043f083b5", "0062f687f1"] or len(found) == 3
    assert found.categories == ("ape", "dog", "person", "sedan", "zebra")       # alphabetical, ids from 1
    clip = found["0043f083b5"]
    assert len(clip) == 11 and [i for i, m in enumerate(clip.masks) if m] == [0, 5, 10]
    assert found.category_map(clip) == {1: 2, 2: 3, 3: 1} and clip.split == "train"
    assert any("train_all_frames" in n for n in found.notes)
    valid = find_layout(root, split="valid")
    assert valid[0].masks[0] is not None and valid[0].masks[1:] == (None,) * 3
    assert "first-frame masks only" in valid.describe()
    assert find_layout(root, split="val").names() == valid.names()
    assert valid.categories == found.categories                                 # same ids in every split
    alone = find_layout(root / "train")
    assert alone.kind == "ytvos" and len(alone) == 2 and alone.categories == ("ape", "dog", "person", "sedan")
    assert len(find_layout(root, split="train_all_frames")) == 1
    with pytest.raises(DataError, match="there are: train"): find_layout(root, split="test")


def test_youtube_vos_meta_faults(tmp_path):
    root = make_tree("ytvos", tmp_path)
    put(root, "valid/meta.json", data=meta({"0062f687f1": {"1": "zebra"}, "ffff000000": {"1": "cow"}}))
    assert any("ffff000000" in n for n in find_layout(root).notes)
    put(root, "valid/meta.json", data=b'{"videos": {"0062f')
    with pytest.raises(DataError, match="meta.json is not valid JSON"): find_layout(root)
    put(root, "valid/meta.json", data=b"[1, 2]")
    with pytest.raises(DataError, match="meta.json"): find_layout(root)
    put(root, "valid/meta.json", data=b'{"videos": {"0062f687f1": {"objects": {"one": 3}}}}')
    with pytest.raises(DataError, match="meta.json"): find_layout(root)


def test_mose(tmp_path):
    root = make_tree("mose", tmp_path)
    found = find_layout(root)
    assert found.splits == ("train", "valid") and found["1a2b3c"].classes == {1: "cat", 2: "cat"}
    assert found["1a2b3c"].label == "cat" and found.categories == ("cat", "cow")
    (root / "meta_train.json").unlink()
    assert find_layout(root, split="train").kind == "mose"
    shutil.move(root / "train", tmp_path / "alone")
    assert find_layout(tmp_path / "alone").kind == "davis"                     # the same folders, nothing says MOSE
    assert find_layout(tmp_path / "alone", kind="mose").kind == "mose"


def test_voc(tmp_path):
    root = make_tree("voc", tmp_path)
    aug, train = find_layout(root, split="trainaug"), find_layout(root, split="train")
    assert len(aug) == 4 and all("SegmentationClassAug" in str(c.masks[0]) for c in aug)
    assert all(c.masks[0].parent.name == "SegmentationClass" for c in train)
    whole = find_layout(root)
    assert len(whole) == 6 and whole.n_masks() == 5 and any("without a mask: 1" in n for n in whole.notes)
    assert len(whole.categories) == 20 and whole.categories[14] == "person" and list(whole.categories) == sorted(whole.categories)
    with pytest.raises(DataError, match="trainaug"): find_layout(root, split="test")


@pytest.mark.parametrize("depth", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_vocdevkit_from_any_level(depth, tmp_path):
    make_tree("vocdevkit", tmp_path)
    found = find_layout(tmp_path / depth)
    assert found.kind == "vocdevkit" and set(found.splits) == {"train", "val"}
    assert len(find_layout(tmp_path / depth, split="val")) == 1


def test_pairs(tmp_path):
    root = make_tree("pairs", tmp_path)
    found = find_layout(root)
    assert found.labels == {"bird": ["duck", "swan"], "cow": ["cows"]}
    assert [(k, a.name, b.name) for k, a, b in found.pair_classes()] == [("bird", "duck", "swan"), ("bird", "swan", "duck")]
    (root / "swan/00027.jpg").unlink()
    with pytest.raises(DataError, match="swan.*00027"): find_layout(root)
    shutil.rmtree(root / "swan")
    with pytest.raises(DataError, match="swan"): find_layout(root)


def test_one_sequence_with_two_classes(tmp_path):
    root = make_tree("pairs", tmp_path)
    with open(root / "index.csv", "a") as f: f.write("\nwater,duck,00000")
    assert find_layout(root).names() == ["bird/duck", "cows", "swan", "water/duck"]


def test_masks_beside_frames_without_an_index(tmp_path):
    root = make_tree("pairs", tmp_path)
    (root / "index.csv").unlink()
    found = find_layout(root)
    assert found.kind == "clips" and found.n_masks() == 6 and len(found["swan"]) == 2
    assert len(find_layout(root, labels=False)["swan"]) == 2 and find_layout(root, labels=False).n_masks() == 0


def test_clips_at_two_depths_and_groups(tmp_path):
    root = make_tree("clips2", tmp_path)
    found = find_layout(root)
    assert found.names() == ["cat", "dog"] and found.splits == ("train", "val")
    assert find_layout(root, split="val").names() == ["dog"]
    frames(root, "val/cat", 2)
    assert find_layout(root).names() == ["dog", "train/cat", "val/cat"]         # a name twice is made longer
    with pytest.raises(DataError, match="no split 'test'"): find_layout(root, split="test")


def test_clip_or_photographs(tmp_path):
    clip = find_layout(make_tree("clip", tmp_path / "c"))
    assert len(clip) == 1 and [f.stem for f in clip[0].frames] == ["frame_8", "frame_9", "frame_10", "frame_11"]
    assert any("kind='images'" in n for n in clip.notes)
    assert len(find_layout(tmp_path / "c", kind="images")) == 4
    put(tmp_path / "coco", *(f"{i:012d}.jpg" for i in (139, 285, 632, 724, 776)))
    assert find_layout(tmp_path / "coco").kind == "images"                      # numbers without a step
    assert len(find_layout(tmp_path / "coco", kind="clip")[0]) == 5


def test_videos_and_single_files(tmp_path):
    root = make_tree("videos", tmp_path)
    found = find_layout(root)
    assert found.names() == ["a", "b", "c", "d", "e"] and all(c.video for c in found)
    assert found[0].n_frames() is None and found.n_frames() == 0 and bool(found[0])
    with pytest.raises(DataError, match="a.mp4"): len(found[0])
    one = find_layout(root / "b.AVI")
    assert one.kind == "video" and one[0].video.name == "b.AVI" and one.describe()
    put(root, "a.mkv")
    assert set(find_layout(root).names()) == {"a.mkv", "a.mp4", "b", "c", "d", "e"}
    put(root, "still.jpg", "doc.txt", "x.zip")
    assert find_layout(root / "still.jpg").kind == "image"
    with pytest.raises(DataError, match="neither a video"): find_layout(root / "doc.txt")
    with pytest.raises(DataError, match="unpack it first"): find_layout(root / "x.zip")
    with pytest.raises(DataError, match="one file"): find_layout(root / "b.AVI", split="val")


def test_mixed_is_counted_and_named(tmp_path):
    found = find_layout(make_tree("mixed", tmp_path))
    assert found.names() == ["cat", "dog"] and found["dog"].video
    text = "\n".join(found.notes)
    assert "1 folders" in text and "1 files" in text and "cover.jpg" in text and "notes.txt" in text


def test_videos_where_clips_should_be(tmp_path):
    put(tmp_path, "JPEGImages/480p/a.mp4", "JPEGImages/480p/b.mp4")
    found = find_layout(tmp_path)
    assert found.kind == "videos" and len(found) == 2


def test_one_folder_down_and_several(tmp_path):
    make_tree("davis2017", tmp_path / "download/DAVIS")
    put(tmp_path, "download/readme.txt", "download/extra/a.jpg")
    found = find_layout(tmp_path / "download", split="val")
    assert found.kind == "davis" and found.names() == ["bike-packing"]
    assert any("one folder down" in n for n in found.notes) and any("extra" in n for n in found.notes)
    make_tree("pairs", tmp_path / "download/pairs")
    with pytest.raises(DataError, match="2 data sets: DAVIS, pairs"): find_layout(tmp_path / "download")


def test_stated_order(tmp_path):
    "A folder that fits several layouts is given to the first of the list; `kind` decides otherwise."
    order = list(L.LAYOUTS)
    assert order.index("ytvos") < order.index("mose") < order.index("davis") < order.index("clips") < order.index("mixed")
    frames(tmp_path, "JPEGImages/cat"), put(tmp_path, "meta.json", data=meta({"cat": {"1": "cat"}}))
    put(tmp_path, "index.csv", data=b"class,sequence,frame\ncat,JPEGImages,00000")
    assert find_layout(tmp_path).kind == "ytvos"
    assert find_layout(tmp_path, kind="davis").kind == "davis"
    assert find_layout(tmp_path, kind="clips").kind == "clips"
    with pytest.raises(ConfigError, match="near: davis"): find_layout(tmp_path, kind="davi")
    with pytest.raises(DataError, match="no data set found"): find_layout(tmp_path, kind="voc")


def test_a_new_layout_is_one_function(tmp_path):
    frames(tmp_path, "patient01/4CH"), put(tmp_path, "patient01/Info.cfg")
    before = list(L.LAYOUTS)
    try:
        @L.layout("echo", "patient*/4CH/*.jpg", before="inside")
        def echo(tree, ask):
            people = [d for d in tree.folder().dirs if d.startswith("patient")]
            return Found([L.make_clip(tree, p, (p, "4CH")) for p in people]) if people else None
        assert find_layout(tmp_path).kind == "echo" and list(L.LAYOUTS).index("echo") == before.index("inside")
        L.layout("echo", "again", before="inside")(echo)                        # a cell that is run twice
        assert list(L.LAYOUTS).count("echo") == 1
        with pytest.raises(ConfigError): L.layout("x", "y", before="nothing")
    finally: L.LAYOUTS.pop("echo", None)
    assert list(L.LAYOUTS) == before and find_layout(tmp_path).kind == "clips"


# ---------------------------------------------------------------- faults
def test_empty_missing_and_wrong_roots(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="it is empty") as e: find_layout(tmp_path / "empty")
    for kind in L.LAYOUTS: assert kind in str(e.value)
    (tmp_path / "davis").mkdir()
    with pytest.raises(DataError, match="does not exist.*near: davis"): find_layout(tmp_path / "davsi")
    for wrong in (None, 3, ["a.mp4"], torch.zeros(2)):
        with pytest.raises(DataError, match="one path"): find_layout(wrong)
    with pytest.raises(DataError, match="empty path"): find_layout(" ")
    with pytest.raises(DataError, match="no path|does not exist"): find_layout("a\0b")
    put(tmp_path / "packed", "DAVIS.zip", "b.tar.gz")
    with pytest.raises(DataError, match="unpack DAVIS.zip|unpack b.tar.gz"): find_layout(tmp_path / "packed")
    with pytest.raises(ConfigError, match="split"): find_layout(tmp_path, split=.8)
    found = find_layout(make_tree("clips1", tmp_path / "c"))
    assert find_layout(found) is found


def test_clip_folders_without_frames(tmp_path):
    make_tree("davis_flat", tmp_path)
    (tmp_path / "JPEGImages/empty").mkdir()
    put(tmp_path, "JPEGImages/text/readme.txt")
    found = find_layout(tmp_path)
    assert found.names() == ["bear", "dog"] and any("empty, text" in n for n in found.notes)
    bare = tmp_path / "bare"
    (bare / "JPEGImages/a").mkdir(parents=True)
    with pytest.raises(DataError, match="no clip there has a frame"): find_layout(bare)


def test_masks_pair_by_stem_not_by_rank(tmp_path):
    frames(tmp_path, "JPEGImages/dog", 4), frames(tmp_path, "Annotations/dog", 3, ".png", start=1)
    put(tmp_path, "Annotations/dog/00009.png")
    found = find_layout(tmp_path)
    assert [m and m.stem for m in found["dog"].masks] == [None, "00001", "00002", "00003"]
    assert any("dog: 3 of 4" in n for n in found.notes) and any("dog/00009.png" in n for n in found.notes)


def test_accents_in_two_forms(tmp_path):
    a, b = unicodedata.normalize("NFC", "été 1"), unicodedata.normalize("NFD", "été 1")
    put(tmp_path, f"JPEGImages/plage à midi/{a}.jpg", f"Annotations/plage à midi/{b}.png")
    found = find_layout(tmp_path)
    assert found["plage à midi"].masks[0].is_file()


def test_system_files_are_ignored_and_counted(tmp_path):
    make_tree("davis_flat", tmp_path)
    put(tmp_path, "JPEGImages/dog/._00000.jpg", "JPEGImages/dog/Thumbs.db", "JPEGImages/.DS_Store", "__MACOSX/JPEGImages/x.jpg")
    found = find_layout(tmp_path)
    assert len(found["dog"]) == 3
    note = next(n for n in found.notes if "hidden" in n)
    assert ": 4 (" in note and len(found.details["hidden or system files, ignored"]) == 4


def test_symlink_loops_and_broken_links(tmp_path):
    make_tree("clips1", tmp_path / "data")
    root = tmp_path / "data"
    (root / "up").symlink_to(tmp_path), (root / "here").symlink_to(root), (root / "self").symlink_to(root / "self")
    (root / "cat/loop").symlink_to(root), (root / "cat/00009.jpg").symlink_to(root / "gone.jpg")
    found = find_layout(root)
    assert found.names() == ["cat", "dog"] and len(found["cat"]) == 3
    text = "\n".join(found.notes)
    for word in ("up", "here", "self", "00009.jpg"): assert word in text
    (tmp_path / "linked").symlink_to(root)                                      # a link as the root is fine
    (tmp_path / "other").mkdir(), (tmp_path / "other/cat").symlink_to(root / "cat")
    assert find_layout(tmp_path / "linked").names() == ["cat", "dog"]
    assert find_layout(tmp_path / "other").names() == ["cat"]                   # and so is one to a clip elsewhere


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    make_tree("davis_flat", tmp_path)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("JPEGImages/dog"): raise PermissionError(13, "Permission denied")
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    found = find_layout(tmp_path)
    assert found.names() == ["bear"] and any("JPEGImages/dog: Permission denied" in n for n in found.notes)
    monkeypatch.setattr(os, "scandir", lambda p: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(DataError, match="cannot be read: Permission denied"): find_layout(tmp_path)


def test_gaps_doubles_and_steps(tmp_path):
    frames(tmp_path, "gap", 8), (tmp_path / "gap/00004.jpg").unlink()
    frames(tmp_path, "fives", 6, step=5)
    put(tmp_path, *(f"twice/{n}.jpg" for n in ("1", "2", "02", "3", "10")))
    put(tmp_path, *(f"wild/{n}.jpg" for n in (1, 4, 9, 22, 23, 40)))
    found = find_layout(tmp_path)
    text = "\n".join(found.notes)
    assert "gap: 3 to 5" in text and "twice: 2" in text and "fixed step: 1 (wild)" in text and "fives" not in text
    assert [f.name for f in found["twice"].frames] == ["1.jpg", "02.jpg", "2.jpg", "3.jpg", "10.jpg"]


def test_zero_byte_files_are_left_to_the_reader(tmp_path):
    frames(tmp_path, "cat"), put(tmp_path, "cat/00003.jpg", data=b"")
    assert len(find_layout(tmp_path)["cat"]) == 4


def test_five_thousand_clips(tmp_path):
    for i in range(5000):
        d = f"{tmp_path}/JPEGImages/{i:05d}"
        os.makedirs(d)
        for t in range(3): os.close(os.open(f"{d}/{t:05d}.jpg", os.O_CREAT))
    found = find_layout(tmp_path)
    assert len(found) == 5000 and found.n_frames() == 15000
    half = found.select(found.names()[::2]).split(train=.5)
    assert len(half[0]) == 1250


def damaged(good):
    "Bytes near a good file: cut, flipped, or something else altogether."
    return st.one_of(st.binary(max_size=60), st.integers(0, len(good)).map(lambda n: good[:n]),
                     st.tuples(st.integers(0, len(good) - 1), st.integers(0, 255)).map(
                         lambda c: good[:c[0]] + bytes([c[1]]) + good[c[0] + 1:]),
                     st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4),
                                  lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(
                                      ["videos", "dog", "objects", "classes", "1", "category"]), x, max_size=3),
                                  max_leaves=6).map(lambda x: json.dumps(x).encode()),
                     st.just(b"[" * 100000))


META = meta({"dog": {"1": "dog", "2": "ball"}})
SMALL = {"meta.json": META, "meta_train.json": META, "clips.json": b'{"dog": {"classes": {"1": "dog"}}}',
         "index.csv": b"class,sequence,frame\ndog,dog,00000\n", "ImageSets/2017/val.txt": b"dog\n",
         "ImageSets/480p/train.txt": b"/JPEGImages/480p/dog/00000.jpg /Annotations/480p/dog/00000.png\n"}


@pytest.mark.parametrize("name", SMALL)
def test_damaged_lists_never_crash(name, tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    frames(root, "dog", 2), frames(root, "JPEGImages/dog", 2), frames(root, "Annotations/dog", 2, ".png")

    @given(damaged(SMALL[name]))
    @settings(max_examples=60, deadline=None)
    def check(data):
        put(root, name, data=data)
        for part in (None, "val" if "val" in name else "train"):
            try: assert isinstance(find_layout(root, split=part), Layout)
            except DataError as e: assert str(e)
    check()


def test_damaged_visor_json_never_crashes(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz visor")
    make_visor(root / "src")
    path = root / "src/annotations/train/P01_01.json"
    good = path.read_bytes()

    @given(damaged(good))
    @settings(max_examples=60, deadline=None)
    def check(data):
        path.write_bytes(data)
        shutil.rmtree(root / "out", ignore_errors=True)
        try: assert isinstance(convert_visor(root / "src", root / "out"), Layout)
        except DataError as e: assert str(e)
    check()


# ---------------------------------------------------------------- parts
def test_natural_key():
    names = ["10.jpg", "2.jpg", "1.jpg", "a10", "a9", "A2", "clip.v10", "clip.v9", "1 (2).jpg", "01.jpg"]
    assert sorted(names, key=natural_key) == ["01.jpg", "1.jpg", "1 (2).jpg", "2.jpg", "10.jpg", "A2", "a9", "a10", "clip.v9", "clip.v10"]


@given(st.lists(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0/"), min_size=1, max_size=8), max_size=8),
       st.randoms())
@settings(deadline=None)
def test_natural_order_is_total_and_stable(names, rng):
    names = list(set(names))
    first = sorted(names, key=natural_key)
    rng.shuffle(names)
    assert sorted(names, key=natural_key) == first == L.natural(names)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True))
def test_natural_order_counts(numbers):
    names = [f"frame_{n}.jpg" for n in numbers]
    assert L.natural(names) == [f"frame_{n}.jpg" for n in sorted(numbers)]


@given(st.integers(0, 50), st.integers(1, 7), st.integers(5, 30), st.data())
def test_one_missing_frame_is_one_gap(start, step, n, data):
    numbers = [start + i * step for i in range(n)]
    gone = data.draw(st.integers(1, n - 2))
    lost = numbers.pop(gone)
    found = frame_numbers([f"x{v:04d}.jpg" for v in numbers])
    assert (found.step, found.gaps, found.twice) == (step, ((lost - step, lost + step),), ())


def test_frame_numbers_of_odd_names():
    assert frame_numbers(["a.jpg", "b.jpg"]) is None and frame_numbers(["a1", "b2"]) is None
    assert frame_numbers(["x_000019_left.png", "x_000020_left.png"]).step == 1
    assert frame_numbers(["7.jpg"]).gaps == ()


def test_listing_is_one_scandir_a_folder(tmp_path, monkeypatch):
    make_tree("davis2017", tmp_path)
    seen, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda p: (seen.append(str(p)), real(p))[1])
    find_layout(tmp_path)
    assert len(seen) == len(set(seen))


def test_list_folder_sorts_types(tmp_path):
    put(tmp_path, "a.JPG", "b.mp4", "c.txt", ".d", "e/x.jpg")
    box = list_folder(tmp_path)
    assert (box.images, box.videos, box.others, box.hidden, box.dirs) == (["a.JPG"], ["b.mp4"], ["c.txt"], [".d"], ["e"])
    assert list_folder(tmp_path / "no").problem and list_folder(tmp_path / "c.txt").problem


def test_select_and_errors(tmp_path):
    for c in ("car-shadow", "car-turn", "dog"): frames(tmp_path, c)
    found = find_layout(tmp_path)
    assert found.select("car-*").names() == ["car-shadow", "car-turn"] and found.select(["dog"]).names() == ["dog"]
    assert found.select(lambda c: len(c.name) == 3).names() == ["dog"]
    with pytest.raises(DataError, match="near: dog"): found.select(["dgo"])
    with pytest.raises(DataError, match="no clip of .* is chosen"): found.select(lambda c: False)
    with pytest.raises(DataError, match="near: car-turn"): found["car-trun"]
    assert found[-1].name == "dog" and {hash(c) for c in found}


def toy(n): return Layout("toy", Path("toy"), tuple(Clip(f"c{i}", (Path(f"{i}.jpg"),)) for i in range(n)))


@given(st.integers(2, 40), st.integers(0, 1000))
def test_split_is_a_partition_that_does_not_depend_on_order(n, seed):
    found = toy(n)
    a, b = found.split(train=.5, seed=seed)
    assert sorted(a.names() + b.names()) == sorted(found.names()) and not set(a.names()) & set(b.names())
    assert len(a) == round(.5 * n)
    mixed = list(found.clips)
    random.Random(seed).shuffle(mixed)
    assert set(Layout("toy", Path("toy"), tuple(mixed)).split(train=.5, seed=seed)[0].names()) == set(a.names())


def test_split_is_fixed_for_ever_and_keeps_groups():
    assert toy(8).split(train=.5, seed=0)[0].names() == ["c3", "c4", "c5", "c6"]       # the same on every machine
    by = lambda c: int(c.name[1:]) // 2
    a, b = toy(8).split(train=2, seed=3, by=by)
    assert not {by(c) for c in a} & {by(c) for c in b} and len(a) == 4
    for bad in (0., 1., 0, 8, 1.5):
        with pytest.raises(ConfigError, match="leaves one side empty"): toy(8).split(train=bad)


# ---------------------------------------------------------------- class ids
def test_category_ids_at_once_and_the_official_way():
    ids = torch.tensor([1, 1, 2, 2, 0, 3])
    mapping = {1: 2, 2: 3, 3: 1}
    assert map_ids(ids, mapping).tolist() == [2, 2, 3, 3, 0, 1]
    assert map_ids(ids, mapping, official=True).tolist() == [1, 1, 1, 1, 0, 1]
    assert ids.tolist() == [1, 1, 2, 2, 0, 3]                                   # the input is not changed


@given(st.lists(st.sampled_from([0, 255, 1, 2, 7, 300, 70000]), min_size=1, max_size=40),
       st.permutations([1, 2, 7, 300, 70000]))
def test_map_ids_equals_a_loop(values, targets):
    mapping = dict(zip([1, 2, 7, 300, 70000], targets))
    slow = [mapping.get(v, v) for v in values]
    assert map_ids(torch.tensor(values), mapping).tolist() == slow
    assert map_ids(torch.tensor(values, dtype=torch.int32).reshape(1, -1), mapping).dtype == torch.int64


def test_map_ids_refuses_ids_without_a_class():
    with pytest.raises(DataError, match="ids 4"): map_ids(torch.tensor([1, 4, 255]), {1: 2})
    found = Layout("x", Path("x"), (Clip("a", classes={1: "cow"}), Clip("b")), categories=("dog",))
    with pytest.raises(DataError, match="cow"): found.category_map("a")
    with pytest.raises(DataError, match="names no class"): found.category_map("b")
    assert found.category_map("a", ["cow", "dog"]) == {1: 1}


# ---------------------------------------------------------------- VISOR
def test_visor_raw_says_what_to_do(tmp_path):
    make_visor(tmp_path / "zipped"), make_visor(tmp_path / "open", zipped=False)
    with pytest.raises(DataError, match="convert_visor"): find_layout(tmp_path / "zipped")
    found = find_layout(tmp_path / "open")
    assert found.names() == ["P01_01", "P02_03"] and found.n_masks() == 0 and "convert_visor" in found.notes[0]


@pytest.mark.parametrize("zipped", [True, False])
def test_convert_visor(tmp_path, zipped):
    src, out = tmp_path / "src", tmp_path / "out"
    make_visor(src, zipped)
    before = fingerprint(src)
    found = convert_visor(src, out)
    assert fingerprint(src) == before
    assert found.kind == "davis" and found.names() == ["P01_01_seq_00001", "P02_03_seq_00001"]
    assert found.n_frames() == found.n_masks() == 4 and set(found.splits) == {"train", "val"}
    clip = found[0]
    assert clip.classes == {1: "knife", 2: "left hand"}                         # alphabetical, from 1
    assert clip.frames[0].read_bytes() == jpeg(seed=0)                          # copied, not encoded again
    mask = Image.open(clip.masks[0])
    assert mask.mode == "P" and mask.size == (64, 36) and mask.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]
    ids = np.array(mask)
    assert ids[5, 5] == 2 and ids[5, 50] == 1 and ids[30, 50] == 0
    assert find_layout(out, split="val").names() == ["P02_03_seq_00001"]
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    convert_visor(src, out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.png")} == stamps       # done frames are not done again


def test_convert_visor_goes_on_after_a_stop(tmp_path, monkeypatch):
    src, out = tmp_path / "src", tmp_path / "out"
    make_visor(src)
    real, calls = V._convert_frame, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 3: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(V, "_convert_frame", stops)
    with pytest.raises(KeyboardInterrupt): convert_visor(src, out)
    monkeypatch.setattr(V, "_convert_frame", real)
    whole = convert_visor(src, out)
    fresh = convert_visor(src, tmp_path / "fresh")
    a, b = ({p.relative_to(d).as_posix(): p.read_bytes() for p in Path(d).rglob("*") if p.is_file()} for d in (out, tmp_path / "fresh"))
    assert a == b and len(whole) == len(fresh)


def test_convert_visor_sizes(tmp_path):
    src = tmp_path / "src"
    make_visor(src, canvas=(1920, 1080))
    with pytest.raises(DataError, match=r"canvas=\(1080, 1920\)"): convert_visor(src, tmp_path / "a")
    found = convert_visor(src, tmp_path / "b", size=(18, 32), canvas=(1080, 1920))
    assert found.resolution == "18p" and Image.open(found[0].frames[0]).size == (32, 18)
    ids = np.array(Image.open(found[0].masks[0]))
    assert ids.shape == (18, 32) and ids[9, 5] == 2 and ids[3, 25] == 1


def test_polygon_in_a_polygon_is_a_hole_and_later_is_on_top():
    square = lambda a, b: [[a, a], [b, a], [b, b], [a, b]]
    ids = V.draw_polygons([(1, [square(0, 19), square(5, 14)]), (2, [square(16, 19), []])], (20, 20))
    assert ids[2, 2] == 1 and ids[9, 9] == 0 and ids[18, 18] == 2 and ids.dtype == torch.int64


def test_convert_visor_refusals(tmp_path):
    src = tmp_path / "src"
    make_visor(src)
    before = fingerprint(src)
    for out in (src, src / "out", tmp_path):
        with pytest.raises(DataError, match="lie in each other"): convert_visor(src, out)
    (tmp_path / "sly").symlink_to(src)
    with pytest.raises(DataError, match="lie in each other"): convert_visor(src, tmp_path / "sly" / "out")
    put(tmp_path, "full/other.txt")
    with pytest.raises(DataError, match="not empty"): convert_visor(src, tmp_path / "full")
    with pytest.raises(DataError, match="video_annotations"): convert_visor(tmp_path / "full", tmp_path / "x")
    convert_visor(src, tmp_path / "out")
    with pytest.raises(DataError, match="another folder"): convert_visor(src, tmp_path / "out", size=(18, 32))
    assert fingerprint(src) == before


@pytest.mark.parametrize("fault,words", [
    ("json", "P01_01.json"), ("shape", "P01_01.json"), ("escape", "no plain file name"),
    ("zip", "P01_01.zip"), ("jpeg", "P01_01_frame"), ("crowd", "more objects")])
def test_convert_visor_faults(tmp_path, fault, words):
    src = tmp_path / "src"
    make_visor(src)
    path = src / "annotations/train/P01_01.json"
    good = json.loads(path.read_text())
    if fault == "json": path.write_text(path.read_text()[:-40])
    if fault == "shape": del good["video_annotations"][0]["annotations"][0]["segments"]; path.write_text(json.dumps(good))
    if fault == "escape": good["video_annotations"][0]["image"]["subsequence"] = "../../evil"; path.write_text(json.dumps(good))
    if fault == "zip": (src / "rgb_frames/train/P01/P01_01.zip").write_bytes(b"PK\3\4 cut")
    if fault == "jpeg":
        with zipfile.ZipFile(src / "rgb_frames/train/P01/P01_01.zip", "w") as z:
            for s in good["video_annotations"]: z.writestr(s["image"]["name"], jpeg()[:100])
    if fault == "crowd":
        one = good["video_annotations"][0]["annotations"]
        good["video_annotations"][0]["annotations"] = [{**one[0], "name": f"thing {i}"} for i in range(255)]
        path.write_text(json.dumps(good))
    with pytest.raises(DataError, match=words): convert_visor(src, tmp_path / "out")


def test_convert_visor_names_missing_frames(tmp_path):
    make_visor(tmp_path / "src")
    (tmp_path / "src/rgb_frames/val/P02/P02_03.zip").unlink()
    found = convert_visor(tmp_path / "src", tmp_path / "out")
    assert found.names() == ["P01_01_seq_00001"] and found.splits == ("train",)
    assert any("P02_03_frame_0000000140" in n and ": 2 (" in n for n in found.notes)
    shutil.rmtree(tmp_path / "src/rgb_frames")
    with pytest.raises(DataError, match="none of its 4 annotated frames"): convert_visor(tmp_path / "src", tmp_path / "none")


# ---------------------------------------------------------------- real data
@pytest.mark.data
def test_real_davis(real_data):
    val, train, pairs = (find_layout(real_data / d) for d in ("davis2016", "davis2016_train", "davis2016_pairs"))
    assert (val.kind, len(val), val.n_masks() == val.n_frames()) == ("davis", 10, True) and "every frame" in val.describe()
    assert (train.kind, len(train), train.n_masks()) == ("davis", 26, 0) and "no masks" in train.describe()
    assert (pairs.kind, len(pairs), pairs.n_frames(), pairs.n_masks(), len(pairs.labels)) == ("pairs", 42, 126, 126, 23)
    assert sum(len(v) > 1 for v in pairs.labels.values()) == 9
    assert all(f.stem == m.stem for c in val for f, m in zip(c.frames, c.masks))
    with pytest.raises(DataError, match="3 data sets"): find_layout(real_data)
