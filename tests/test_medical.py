"""Medical data sets: folders made here after the public conventions, with everything that goes wrong in them."""
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.decode_video import write_video
from timet_nb.data.medical import KINDS, LARYNX, MedicalImages, Pair, find_medical, read_pair
from timet_nb.data.medical_read import cut_levels, read_polygons
from timet_nb.data.medical_video import MedicalVideo, count_mat, read_cycles, read_mat, read_rows

H, W = 40, 60
BOX = np.zeros((H, W), np.uint8)
BOX[10:25, 15:40] = 1
TRUE = torch.from_numpy(BOX).long()


def picture(path, seed=0, shape=(H, W)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*shape, 3), np.uint8)).save(path)
    return path


def grey(path, a=BOX * 255, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(a)).save(path, **options)
    return path


def stamp(root):
    "Name, size, time and content of every file."
    return {p.relative_to(root).as_posix(): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(root.rglob("*")) if p.is_file()}


def noted(found, word):
    "The one note that has a word in it."
    (hit,) = [n for n in found.notes if word in n]
    return hit


# ---------------------------------------------------------------- masks, however they are stored
def pair(tmp_path, mask, image_shape=(H, W), name="m.png", **options):
    return Pair(picture(tmp_path / "i.png", shape=image_shape), (grey(tmp_path / name, mask, **options),), "i")


@pytest.mark.parametrize("stored", ["0/255", "0/1", "bool", "16 bit", "rgb", "rgba", "palette", "colour", "dark colour", "jpeg", "LA", "float"])
def test_every_way_to_store_a_mask(tmp_path, stored):
    path = tmp_path / ("m.jpg" if stored == "jpeg" else "m.tif" if stored == "float" else "m.png")
    white = Image.fromarray(BOX * 255)
    if stored == "0/255": white.save(path)
    if stored == "0/1": Image.fromarray(BOX).save(path)
    if stored == "bool": white.convert("1").save(path)
    if stored == "16 bit": Image.fromarray(BOX.astype(np.uint16) * 65535).save(path)
    if stored in ("rgb", "rgba"): white.convert(stored.upper()).save(path)
    if stored == "LA": white.convert("LA").save(path)
    if stored == "jpeg": white.save(path, quality=60)
    if stored == "float": Image.fromarray(BOX.astype(np.float32)).save(path)
    if stored == "palette":
        im = Image.fromarray(BOX); im.putpalette([0, 0, 0, 128, 0, 0] + [9] * 762); im.save(path)
    if "colour" in stored:
        Image.fromarray(BOX[..., None] * np.array([64, 0, 64] if "dark" in stored else [0, 128, 0], np.uint8)).save(path)
    image, mask = read_pair(Pair(picture(tmp_path / "i.png"), (path,), "i"))
    assert image.shape == (3, H, W) and image.dtype == torch.float32 and mask.dtype == torch.int64
    assert torch.equal(mask, TRUE)


def soft(shape=(H, W)):
    "A mask that somebody resized: levels between 0 and 255 along its edge."
    big = Image.fromarray(BOX * 255).resize((W * 3, H * 3))
    return np.asarray(big.resize(shape[::-1], Image.BILINEAR))


def test_grey_edges_are_cut_at_half_or_where_told(tmp_path):
    p = pair(tmp_path, soft())
    half, low, high = (int(read_pair(p, threshold=t)[1].sum()) for t in (None, 10, 250))
    assert high < half < low and abs(half - int(TRUE.sum())) <= 20
    assert torch.equal(read_pair(p, threshold=10)[1].bool(), torch.from_numpy(soft().astype(int) > 10))


def test_official_rule_resizes_first_and_cuts_at_10(tmp_path):
    "As STCR's script: cv2.resize to 256 x 256, then > 10. A fatter mask than ours."
    import cv2
    p = pair(tmp_path, BOX * 255)
    want = torch.from_numpy(cv2.resize(BOX * 255, (256, 256)).astype(int) > 10).long()
    got = read_pair(p, (256, 256), official=True)[1]
    assert (got != want).sum() <= 2 and got.sum() > read_pair(p, (256, 256))[1].sum()


def test_one_dark_level_is_the_object_and_is_noted(tmp_path):
    notes = []
    assert torch.equal(read_pair(pair(tmp_path, BOX * 38), notes=notes)[1], TRUE) and "38" in notes[0]
    read_pair(pair(tmp_path, BOX * 38), notes=notes)
    assert len(notes) == 1                                        # once, however often it is read


def test_faint_levels_are_empty_and_are_noted(tmp_path):
    notes = []
    a = (BOX * np.random.default_rng(0).integers(20, 90, BOX.shape)).astype(np.uint8)
    assert read_pair(pair(tmp_path, a), notes=notes)[1].sum() == 0 and "none reaches half" in notes[0]
    assert torch.equal(read_pair(pair(tmp_path, a), threshold=10)[1], TRUE)


def test_empty_mask_stays_empty_also_as_jpeg(tmp_path):
    assert read_pair(pair(tmp_path, BOX * 0))[1].sum() == 0
    assert read_pair(pair(tmp_path, (BOX * 2).astype(np.uint8), name="m.jpg", quality=40))[1].sum() == 0


@pytest.mark.parametrize("level", [1, 2, 9])
def test_noise_of_a_lossy_black_mask_is_no_object(tmp_path, level):
    "A JPEG cannot keep 0 and 1: what looks like it is noise, also where it has one level only."
    assert read_pair(pair(tmp_path, BOX * level, name="m.jpg", quality=100))[1].sum() == 0


@pytest.mark.parametrize("level", [1, 255])
def test_all_foreground(tmp_path, level):
    assert bool((read_pair(pair(tmp_path, np.full((H, W), level, np.uint8)))[1] == 1).all())


def test_several_masks_are_one_object(tmp_path):
    other = np.zeros((H, W), np.uint8); other[30:38, 5:50] = 255
    p = Pair(picture(tmp_path / "i.png"), (grey(tmp_path / "a.png"), grey(tmp_path / "b.png", other)), "i")
    assert torch.equal(read_pair(p)[1], (TRUE.bool() | torch.from_numpy(other > 0)).long())


def test_sizes_that_differ_are_refused_with_both_names(tmp_path):
    with pytest.raises(DataError) as e: read_pair(pair(tmp_path, BOX * 255, (H, W + 1)))
    assert "m.png" in str(e.value) and "i.png" in str(e.value) and "40 x 60" in str(e.value) and "40 x 61" in str(e.value)
    with pytest.raises(DataError, match="40 x 60"): read_pair(pair(tmp_path, BOX * 255, (H, W + 1)), 32, official=True)


@pytest.mark.parametrize("size, shape", [(None, (H, W)), (20, (20, 30)), ((16, 16), (16, 16))])
def test_image_and_mask_come_in_one_size(tmp_path, size, shape):
    image, mask = read_pair(pair(tmp_path, BOX * 255), size)
    assert image.shape[1:] == mask.shape == shape and set(mask.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\nbroken"])
def test_unreadable_files_are_named(tmp_path, content):
    p = pair(tmp_path, BOX * 255)
    p.masks[0].write_bytes(content)
    with pytest.raises(DataError, match="m.png"): read_pair(p)
    p = pair(tmp_path, BOX * 255)
    p.image.write_bytes(content)
    with pytest.raises(DataError, match="i.png"): read_pair(p)


def test_levels_and_cut_by_hand():
    v = torch.tensor([[0., 10, 11, 127], [128, 200, 255, 0]])
    assert cut_levels(v).tolist() == [[0, 0, 0, 0], [1, 1, 1, 0]]
    assert cut_levels(v, 10).tolist() == [[0, 0, 1, 1], [1, 1, 1, 0]]


# ---------------------------------------------------------------- BUSI
@pytest.fixture
def busi(tmp_path):
    root = tmp_path / "Dataset_BUSI_with_GT"
    for c in ("benign", "malignant", "normal"):
        for i in (1, 2, 10):
            picture(root / c / f"{c} ({i}).png", i)
            grey(root / c / f"{c} ({i})_mask.png", BOX * (0 if c == "normal" else 255))
    other = np.zeros((H, W), np.uint8); other[30:38, 5:50] = 255
    grey(root / "benign" / "benign (2)_mask_1.png", other)
    grey(root / "benign" / "benign (2)_mask_2.png", other)
    return root


def test_busi(busi):
    s = find_medical(busi)
    assert s.kind == "busi" and [p.name for p in s.items] == [f"{c} ({i})" for c in ("benign", "malignant") for i in (1, 2, 10)]
    assert [len(p.masks) for p in s.items[:3]] == [1, 3, 1] and s.items[0].label == "benign"
    assert "normal (1).png" in noted(s, "normal=True") and ": 3 (" in noted(s, "normal=True")
    assert s.describe() == "Dataset_BUSI_with_GT [busi]: 6 pairs, 1 note"


def test_busi_with_normal_images(busi):
    s = find_medical(busi, normal=True)
    assert len(s.items) == 9 and s.notes == ()
    assert all(read_pair(p)[1].sum() == 0 for p in s.items if p.label == "normal")


def test_busi_strangers_are_named_and_counted(busi):
    picture(busi / "benign" / "benign (7).png"); grey(busi / "malignant" / "malignant (8)_mask.png")
    s = find_medical(busi)
    assert len(s.items) == 6
    assert "benign/benign (7).png" in noted(s, "images without a mask") and ": 1 (" in noted(s, "images without a mask")
    assert "malignant/malignant (8)_mask.png" in noted(s, "masks without an image")


def test_every_file_is_used_or_named(busi):
    "Nothing is dropped in silence: files of pairs and files in notes are all files there are."
    picture(busi / "benign" / "benign (7).png"); grey(busi / "malignant" / "malignant (8)_mask.png")
    s = find_medical(busi)
    told = {p.name for i in s.items for p in (i.image, *i.masks)} | {n.split("/")[-1] for names in s.details.values() for n in names}
    masks_of_normal = {p.name for p in (busi / "normal").glob("*_mask.png")}
    assert {p.name for p in busi.rglob("*.png")} - masks_of_normal == told


def test_source_is_only_read(busi):
    before = stamp(busi)
    list(find_medical(busi, normal=True).images(32))
    assert stamp(busi) == before


def test_images_of_a_set(busi):
    images = find_medical(busi).images((32, 48))
    assert isinstance(images, MedicalImages) and len(images) == 6 and images.group == "busi"
    assert images[1][0].shape == (3, 32, 48) and images[-1][1].shape == (32, 48)
    assert len(list(images)) == 6


def test_found_one_folder_down(busi):
    s = find_medical(busi.parent)
    assert s.kind == "busi" and "one folder down" in s.notes[0]


def test_select(busi):
    s = find_medical(busi)
    assert len(s.select(lambda p: p.label == "malignant")) == 3
    with pytest.raises(DataError, match="none of 6"): s.select(lambda p: p.split == "train")


# ---------------------------------------------------------------- MMOTU
@pytest.fixture
def mmotu(tmp_path):
    root = tmp_path / "MMOTU"
    for i in (1, 2, 3, 4):
        picture(root / "OTU_2d" / "images" / f"{i}.JPG", i)
        grey(root / "OTU_2d" / "annotations" / f"{i}.PNG", BOX[..., None] * np.array([64, 0, 0], np.uint8))
        if i != 3: grey(root / "OTU_2d" / "annotations" / f"{i}_binary.PNG", BOX)
        grey(root / "OTU_2d" / "annotations" / f"{i}_binary_binary.PNG", BOX)
    picture(root / "OTU_3d" / "images" / "1.JPG")
    (root / "OTU_2d" / "train.txt").write_text("1\n2\n\n9\n")
    (root / "OTU_2d" / "val.txt").write_text("3\n")
    (root / "OTU_2d" / "train_cls.txt").write_text("1.JPG  0\n2.JPG  6\n")
    return root


def test_mmotu(mmotu):
    s = find_medical(mmotu)
    assert s.kind == "mmotu" and [(p.name, p.split, p.label) for p in s.items] == [
        ("1", "train", "0"), ("2", "train", "6"), ("3", "val", None), ("4", None, None)]
    assert [p.masks[0].name for p in s.items] == ["1_binary.PNG", "2_binary.PNG", "3.PNG", "4_binary.PNG"]
    assert all(torch.equal(read_pair(p)[1], TRUE) for p in s.items)           # 0 and 1, or dark red
    assert "9" in noted(s, "listed, but") and "4" in noted(s, "in no list") and "OTU_3d" in noted(s, "beside it")
    assert find_medical(mmotu / "OTU_2d").kind == "mmotu"


def test_images_beside_annotations_alone_are_no_mmotu(tmp_path):
    picture(tmp_path / "s" / "images" / "photo.jpg"); grey(tmp_path / "s" / "annotations" / "photo.png")
    assert find_medical(tmp_path / "s").kind == "pairs"


# ---------------------------------------------------------------- TN3K
@pytest.fixture
def tn3k(tmp_path):
    root = tmp_path / "tn3k"
    for half, n in (("trainval", 6), ("test", 2)):
        for i in range(n):
            picture(root / f"{half}-image" / f"{i:04d}.jpg", i)
            grey(root / f"{half}-mask" / f"{i:04d}.jpg", BOX * 255)
    (root / "tn3k-trainval-fold0.json").write_text(json.dumps(dict(train=[0, 1, 2, 3], val=[4, 5])))
    return root


def test_tn3k(tn3k):
    s = find_medical(tn3k)
    assert s.kind == "tn3k" and s.notes == ()
    assert [p.split for p in s.items] == ["test"] * 2 + ["train"] * 4 + ["val"] * 2
    assert len({p.name for p in s.items}) == 8 and torch.equal(read_pair(s.items[0])[1], TRUE)


def test_tn3k_split_goes_by_the_number_in_the_name(tn3k):
    "The published loader counts places in the listing: with one file gone, all later ones shift."
    (tn3k / "trainval-image" / "0001.jpg").unlink()
    s = find_medical(tn3k)
    split = {p.image.stem: p.split for p in s.items if "trainval" in p.name}
    assert split == {"0000": "train", "0002": "train", "0003": "train", "0004": "val", "0005": "val"}
    assert "0001" in noted(s, "listed, but") and "trainval/0001.jpg" in noted(s, "masks without an image")


def test_tn3k_without_the_list(tn3k):
    s = find_medical(tn3k, fold=3)
    assert {p.split for p in s.items} == {"trainval", "test"} and "fold3.json" in noted(s, "no list")


@pytest.mark.parametrize("text", ["[1, 2]", '{"train": [0]}', '{"train": ["a"], "val": []}', "{"])
def test_tn3k_with_a_broken_list(tn3k, text):
    (tn3k / "tn3k-trainval-fold0.json").write_text(text)
    with pytest.raises(DataError, match="fold0.json"): find_medical(tn3k)


def test_tn3k_without_masks(tn3k):
    import shutil
    shutil.rmtree(tn3k / "test-mask")
    assert ": 2 (" in noted(find_medical(tn3k), "images without a mask")


# ---------------------------------------------------------------- DDTI
@pytest.mark.parametrize("names", [("image", "mask"), ("p_image", "p_mask")])
def test_ddti_prepared(tmp_path, names):
    for i in (1, 2, 10):
        picture(tmp_path / "d" / names[0] / f"{i}.PNG", i); grey(tmp_path / "d" / names[1] / f"{i}.PNG")
    s = find_medical(tmp_path / "d")
    assert s.kind == "ddti" and [p.name for p in s.items] == ["1", "2", "10"] and torch.equal(read_pair(s.items[0])[1], TRUE)


SQUARE = [dict(x=x, y=y) for x, y in ((15, 10), (39, 10), (39, 24), (15, 24))]


def case(path, *marks):
    "An annotation of DDTI: (number of the image, text of <svg>)."
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(f"<mark><image>{n}</image><svg>{t}</svg></mark>" for n, t in marks)
    path.write_text(f"<case><number>1</number><age>40</age>{body}</case>")


@pytest.fixture
def ddti(tmp_path):
    root = tmp_path / "DDTI"
    shape = dict(points=SQUARE, annotation={}, regionType="freehand")
    second = dict(points=[dict(x=2, y=30), dict(x=12, y=30), dict(x=2, y=38)], regionType="freehand")
    arrow = dict(points=[dict(x=1, y=1), dict(x=5, y=5), dict(x=9, y=9)], regionType="arrow")
    case(root / "1.xml", (1, json.dumps([shape])), (2, json.dumps([shape, second])))
    case(root / "10.xml", (1, json.dumps([arrow])), (2, ""))
    case(root / "97.xml", (1, json.dumps([shape, second])[:-40]))               # cut off in the release
    (root / "98.xml").write_text("<case><mark>")
    case(root / "99.xml", (1, json.dumps([shape])))
    for n in ("1_1", "1_2", "1_3", "10_1", "97_1", "98_1"): picture(root / f"{n}.jpg")
    return root


def test_ddti_as_released(ddti):
    s = find_medical(ddti)
    assert s.kind == "ddti" and [(p.name, p.group) for p in s.items] == [("1_1", "1"), ("1_2", "1"), ("97_1", "97")]
    one, two, cut = (read_pair(p)[1] for p in s.items)
    assert torch.equal(one, TRUE) and torch.equal(cut, TRUE)
    assert two.sum() > one.sum() and torch.equal(two * one, one)               # both nodules
    assert noted(s, "images without a mask").count("_") == 3                   # 1_3, 10_1, 98_1
    assert "98.xml" in noted(s, "broken") and "99.xml" in noted(s, "masks without an image")
    assert "10.xml" in noted(s, "without an outline")
    assert "cut off" in noted(s, "read in part") and "arrow" in noted(s, "read in part")


def test_a_line_is_no_outline(tmp_path):
    case(tmp_path / "1.xml", (1, json.dumps([dict(points=SQUARE[:2], regionType="freehand")])))
    notes = []
    assert read_polygons(tmp_path / "1.xml", notes) == {} and "no outline" in notes[0]


def test_two_outlines_that_overlap_are_a_union(tmp_path):
    shape = dict(points=SQUARE, regionType="freehand")
    case(tmp_path / "1.xml", (1, json.dumps([shape, shape])))
    p = Pair(picture(tmp_path / "1_1.jpg"), (tmp_path / "1.xml",), "1_1")
    assert torch.equal(read_pair(p)[1], TRUE)                                  # no hole where they overlap


def test_polygons_alone(ddti):
    notes = []
    assert {n: len(v) for n, v in read_polygons(ddti / "1.xml").items()} == {1: 1, 2: 2}
    assert read_polygons(ddti / "10.xml", notes) == {} and len(notes) == 1
    with pytest.raises(DataError, match="98.xml"): read_polygons(ddti / "98.xml")
    with pytest.raises(DataError, match="77.xml"): read_polygons(ddti / "77.xml")


# ---------------------------------------------------------------- larynx
@pytest.fixture
def larynx(tmp_path):
    root = tmp_path / "vocalfolds"
    for patient, seq in (("patient1", "seq1"), ("patient1", "seq2"), ("patient2", "seq8")):
        for i in range(2):
            picture(root / "img" / patient / seq / f"{i:04d}.png")
            grey(root / "annot" / patient / seq / f"{i:04d}.png", (BOX + 2 * (BOX == 0) * (np.arange(W) > 50)).astype(np.uint8))
    return root


def test_laryngeal(larynx):
    s = find_medical(larynx)
    assert s.kind == "laryngeal" and len(s.items) == 6 and {p.group for p in s.items} == {"patient1/seq1", "patient1/seq2", "patient2/seq8"}
    assert torch.equal(read_pair(s.items[0])[1], TRUE)                         # class 1, the vocal folds
    tissue = find_medical(larynx, target="other tissue")
    assert read_pair(tissue.items[0])[1][:, 51:].min() == 1 and read_pair(tissue.items[0])[1][:, :50].max() == 0
    assert read_pair(find_medical(larynx, target="pathology").items[0])[1].sum() == 0
    assert s.describe() == "vocalfolds [laryngeal]: 6 pairs, 3 patients or clips" and len(LARYNX) == 7


def test_laryngeal_faults(larynx):
    with pytest.raises(ConfigError, match="vocal folds"): find_medical(larynx, target="vocal fold")
    grey(larynx / "annot" / "patient1" / "seq1" / "0000.png", BOX * 200)
    with pytest.raises(DataError, match="class numbers"): read_pair(find_medical(larynx).items[0])


# ---------------------------------------------------------------- HMC-QU
def mat(path, a, name="predicted"):
    from scipy.io import savemat
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {name: a})
    return path


def xlsx(path, rows, shared=True):
    "A small workbook, as spreadsheets write it."
    words = sorted({c for r in rows for c in r if isinstance(c, str)})
    def cell(c):
        if not isinstance(c, str): return f"<c><v>{c}</v></c>"
        return f'<c t="s"><v>{words.index(c)}</v></c>' if shared else f'<c t="inlineStr"><is><t>{c}</t></is></c>'
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>" + "".join(
            "<row>" + "".join(map(cell, r)) + "</row>" for r in rows) + "</sheetData></worksheet>")
        if shared: z.writestr("xl/sharedStrings.xml", f"<sst {space}>" + "".join(f"<si><t>{w}</t></si>" for w in words) + "</sst>")
    return path


HEAD = ["ECHO", "SEG1", "SEG2", "Reference Frame", "End of Cycle", "Masks"]


@pytest.fixture
def hmcqu(tmp_path):
    root = tmp_path / "hmcqu-dataset"
    films = root / "HMC-QU" / "A4C"
    films.mkdir(parents=True); (root / "HMC-QU" / "A2C").mkdir()
    frames = [torch.full((3, 48, 64), t / 12) for t in range(12)]
    for name in ("ES0001 _4CH_1", "ES0002_4CH_1", "ES0003_4CH_1"): write_video(films / f"{name}.avi", frames, 25)
    masks = np.zeros((5, 32, 32)); masks[:, 8:24, 8:16] = 1; masks[2, :, 24:] = 1
    mat(root / "LV Ground-truth Segmentation Masks" / "Mask_ES0001 _4CH_1.mat", masks)
    mat(root / "LV Ground-truth Segmentation Masks" / "Mask_ES0009_4CH_1.mat", masks)
    xlsx(root / "A4C.xlsx", [HEAD, ["ES0001 _4CH_1", 0, 1, 4, 8, "ü"], ["ES0002_4CH_1", 0, 1, 2, 9, "x"]])
    return root


def test_hmcqu(hmcqu):
    s = find_medical(hmcqu)
    assert s.kind == "hmcqu" and s.items == () and [v.name for v in s.videos] == ["ES0001 _4CH_1", "ES0002_4CH_1", "ES0003_4CH_1"]
    v = s.videos[0]
    assert sorted(v.masks) == [3, 4, 5, 6, 7] and v.n_frames() == 12 and v.shape() == (48, 64)
    assert "Mask_ES0009" in noted(s, "masks without a video") and ": 2 (" in noted(s, "videos without masks") and "A2C" in noted(s, "other views")
    assert s.describe() == "hmcqu-dataset [hmcqu]: 3 videos, 5 masks, 3 notes"


def test_hmcqu_masks_fit_their_frames(hmcqu):
    "A mask is 32 x 32 and stands for the whole frame of 48 x 64: stretched."
    v = find_medical(hmcqu).videos[0]
    m = v.mask(3)
    assert m.shape == (48, 64) and m.dtype == torch.int64 and torch.equal(m[24], (torch.arange(64) // 2 >= 8).long() * (torch.arange(64) // 2 < 16))
    assert v.mask(5)[:, 60].min() == 1 and v.mask(4)[:, 60].max() == 0          # the third mask is of frame 5
    assert v.mask(3, 24).shape == (24, 32) and next(v.frames(24)).shape == (3, 24, 32)
    with pytest.raises(DataError, match="3 to 7"): v.mask(2)


def test_hmcqu_frames_stream(hmcqu):
    v = find_medical(hmcqu).videos[0]
    got = [float(f.mean()) for f in v.frames(start=3, stop=8)]
    assert len(got) == 5 and got == sorted(got) and abs(got[0] - 3 / 12) < .03
    images, masks = v.support(24, n=2)
    assert images.shape == (2, 3, 24, 32) and masks.shape == (2, 24, 32) and torch.equal(masks[0], v.mask(3, 24))
    with pytest.raises(DataError, match="5 masks"): v.support(n=6)


def test_hmcqu_without_a_table(hmcqu):
    (hmcqu / "A4C.xlsx").unlink()
    s = find_medical(hmcqu)
    assert s.videos[0].masks == {} and "5 masks, 12 frames" in noted(s, "A4C.xlsx")
    mat(hmcqu / "LV Ground-truth Segmentation Masks" / "Mask_ES0002_4CH_1.mat", np.zeros((12, 32, 32)))
    assert sorted(find_medical(hmcqu).videos[1].masks) == list(range(12))       # as many as frames: no doubt


@pytest.mark.parametrize("row", [[4, 9], [9, 13]])
def test_hmcqu_table_that_does_not_fit(hmcqu, row):
    xlsx(hmcqu / "A4C.xlsx", [HEAD, ["ES0001 _4CH_1", 0, 1, *row, "ü"]])
    s = find_medical(hmcqu)
    assert s.videos[0].masks == {} and "5 masks" in noted(s, "do not fit")


def test_tables(tmp_path):
    rows = [HEAD, ["ES1", 0, 1, 4, 8, "ü"]]
    a, b = (read_rows(xlsx(tmp_path / f"{s}.xlsx", rows, s)) for s in (True, False))
    (tmp_path / "t.csv").write_text("\ufeffECHO,a,b\nES1,0,4,8.0,ü\n", encoding="utf-8")
    assert a == b == [[str(c) for c in r] for r in rows]
    assert read_cycles(tmp_path / "True.xlsx") == read_cycles(tmp_path / "t.csv") == {"ES1": (3, 8)}
    (tmp_path / "x.xlsx").write_bytes(b"no zip")
    for name in ("x.xlsx", "gone.csv"):
        with pytest.raises(DataError, match=name): read_rows(tmp_path / name)


@pytest.mark.parametrize("a, name", [(np.ones((3, 8, 9)), "predicted"), (np.ones((3, 8, 9), np.uint8) * 255, "predicted"),
                                     (np.ones((3, 8, 9), bool), "other"), (np.ones((8, 8, 3)), "predicted")])
def test_mat_files(tmp_path, a, name):
    m = read_mat(mat(tmp_path / "a.mat", a, name))
    assert m.dtype == torch.bool and m.all() and m.shape[0] == 3 == count_mat(tmp_path / "a.mat")


def test_mat_faults(tmp_path, monkeypatch):
    (tmp_path / "x.mat").write_bytes(b"no matlab file at all" * 20)
    (tmp_path / "v73.mat").write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64" + b"\0" * 500)
    from scipy.io import savemat
    savemat(tmp_path / "two.mat", {"a": np.ones((3, 8, 9)), "b": np.ones((3, 8, 9))})
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    for name, word in (("x.mat", "no MATLAB file"), ("v73.mat", "pip install h5py"), ("two.mat", "'predicted'"), ("gone.mat", "No such")):
        with pytest.raises(DataError, match=word) as e: read_mat(tmp_path / name)
        assert name in str(e.value)


def test_mat_of_version_73_is_read_where_h5py_is_there(tmp_path, monkeypatch):
    "HDF5 keeps MATLAB's axes in reverse. A stand-in for the package: what matters is the order."
    import sys, types
    (tmp_path / "v73.mat").write_bytes(b"MATLAB 7.3 MAT-file" + b"\0" * 500)
    a = np.zeros((5, 8, 9)); a[2, 1, 7] = 1

    class File(dict):
        def __init__(self, path): super().__init__(predicted=a.T)
        def __enter__(self): return self
        def __exit__(self, *_): return False
    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=File))
    m = read_mat(tmp_path / "v73.mat")
    assert m.shape == (5, 8, 9) and m.nonzero().tolist() == [[2, 1, 7]] and count_mat(tmp_path / "v73.mat") == 5


def test_hmcqu_with_a_broken_mask_file(hmcqu):
    (hmcqu / "LV Ground-truth Segmentation Masks" / "Mask_ES0002_4CH_1.mat").write_bytes(b"MATLAB 7.3" + b"\0" * 200)
    (hmcqu / "LV Ground-truth Segmentation Masks" / "Mask_ES0003_4CH_1.mat").write_bytes(b"junk" * 99)
    s = find_medical(hmcqu)
    assert len(s.videos) == 3 and len(s.videos[0].masks) == 5
    assert "Mask_ES0002" in noted(s, "cannot be read") and "Mask_ES0003" in noted(s, "cannot be read")


def test_frames_are_read_one_at_a_time(tmp_path, monkeypatch):
    "After k frames were taken, k files were read: nothing is collected ahead."
    from timet_nb.data import medical_video as room
    files, seen, real = tuple(picture(tmp_path / f"{i:03d}.png") for i in range(20)), [], room.read_image
    monkeypatch.setattr(room, "read_image", lambda path, *a, **k: seen.append(path) or real(path, *a, **k))
    stream = MedicalVideo("long", files).frames(16)
    for k in range(1, 6): next(stream); assert len(seen) == k
    assert [p.name for p in seen] == [f"{i:03d}.png" for i in range(5)]


# ---------------------------------------------------------------- ASU-Mayo
def asu(root, order="video first", names=("1", "2"), masks=4):
    for v in names:
        for t in range(1, 5):
            a, b = (root / v / "Frame", root / v / "GT") if order == "video first" else (root / "Frame" / v, root / "GT" / v)
            picture(a / f"{t:03d}.jpg", t)
            if t <= masks: grey(b / f"{t:03d}.png")


@pytest.mark.parametrize("order", ["video first", "folder first"])
def test_asu_mayo(tmp_path, order):
    root = tmp_path / "ASU-Mayo_Clinic"
    asu(root / "Train", order)
    s = find_medical(root)
    assert s.kind == "asu-mayo" and [v.name for v in s.videos] == ["Train/1", "Train/2"] and s.notes == ()
    assert s.videos[0].split == "train" and sorted(s.videos[0].masks) == [0, 1, 2, 3] and torch.equal(s.videos[0].mask(2), TRUE)
    with pytest.raises(DataError, match="videos"): s.images(32)


def test_asu_mayo_strangers(tmp_path):
    asu(tmp_path / "v", masks=2)
    grey(tmp_path / "v" / "1" / "GT" / "009.png")
    (tmp_path / "v" / "3" / "Frame").mkdir(parents=True); (tmp_path / "v" / "3" / "GT").mkdir()
    s = find_medical(tmp_path / "v")
    assert len(s.videos) == 2 and "1/009.png" in noted(s, "masks without a frame") and "2: 2 of 4" in noted(s, "some frames")
    assert "3" in noted(s, "videos without a frame")


def test_videos_that_lie_deep_do_not_swallow_their_neighbours(tmp_path, busi):
    asu(busi.parent / "colon" / "Train")
    with pytest.raises(DataError, match="2 data sets"): find_medical(busi.parent)


def test_asu_mayo_pairs_by_number_when_stems_differ(tmp_path):
    for t in range(4):
        picture(tmp_path / "v" / "short_1" / "Frame" / f"image_{t:05d}.jpg"); grey(tmp_path / "v" / "short_1" / "GT" / f"mask{t}.png")
    v = find_medical(tmp_path / "v").videos[0]
    assert [v.masks[i].name for i in range(4)] == [f"mask{i}.png" for i in range(4)]


def test_numbers_that_occur_twice_pair_nothing(tmp_path):
    for s in "ab":
        picture(tmp_path / "v" / "1" / "Frame" / f"{s}_001.jpg"); grey(tmp_path / "v" / "1" / "GT" / f"{s}_001.png")
    grey(tmp_path / "v" / "1" / "GT" / "other_001.png")
    s = find_medical(tmp_path / "v")
    assert [m.name for m in s.videos[0].masks.values()] == ["a_001.png", "b_001.png"]
    assert "1/other_001.png" in noted(s, "masks without a frame")


def test_frames_of_two_sizes_and_masks_of_another(tmp_path):
    asu(tmp_path / "v", names=("1",))
    picture(tmp_path / "v" / "1" / "Frame" / "003.jpg", shape=(H, W + 2)); grey(tmp_path / "v" / "1" / "GT" / "001.png", BOX[:30] * 255)
    v = find_medical(tmp_path / "v").videos[0]
    with pytest.raises(DataError, match="003.jpg"): list(v.frames())
    assert len(list(v.frames((32, 32)))) == 4
    with pytest.raises(DataError, match="001.png"): v.mask(0)


# ---------------------------------------------------------------- plain forms, wrong kinds
def test_pairs_flat_and_side_by_side(tmp_path):
    for i in (1, 2):
        picture(tmp_path / "flat" / f"{i}.png"); grey(tmp_path / "flat" / f"{i}_mask.png")
        picture(tmp_path / "side" / "images" / f"photo{'ab'[i - 1]}.jpg"); grey(tmp_path / "side" / "masks" / f"photo{'ab'[i - 1]}.png")
    picture(tmp_path / "side" / "images" / "photoz.jpg")
    for name, n in (("flat", 0), ("side", 1)):
        s = find_medical(tmp_path / name)
        assert s.kind == "pairs" and len(s.items) == 2 and torch.equal(read_pair(s.items[0])[1], TRUE)
        assert sum("without" in x for x in s.notes) >= n


def test_pairs_takes_videos_in_davis_layout(tmp_path):
    for t in range(3):
        picture(tmp_path / "JPEGImages" / "480p" / "a" / f"{t:05d}.jpg")
        if t == 0: grey(tmp_path / "Annotations" / "480p" / "a" / f"{t:05d}.png")
    s = find_medical(tmp_path, "pairs")
    assert len(s.videos) == 1 and list(s.videos[0].masks) == [0] and torch.equal(s.videos[0].mask(0), TRUE)
    assert s.videos[0].clip().n_frames() == 3


def test_generated_ultrasound_comes_back(tmp_path):
    world = pytest.importorskip("timet_nb.data.ultrasound")
    w = world.UltrasoundWorld("breast", size=64)
    s = find_medical(world.write_ultrasound(tmp_path / "u", w, 3))
    assert s.kind == "pairs" and len(s.items) == 3
    image, mask = read_pair(s.items[0])
    clip = world.render_ultrasound(w, 0)
    assert torch.equal(mask, clip.masks[0]) and (image - clip.frames[0]).abs().max() < 3 / 255


def test_wrong_kind_says_what_it_looks_like(busi, tn3k):
    with pytest.raises(DataError, match="looks like 'busi'"): find_medical(busi, "tn3k")
    with pytest.raises(DataError, match="looks like 'tn3k'"): find_medical(tn3k, "hmcqu")


def test_no_data_set_at_all(tmp_path):
    picture(tmp_path / "a" / "x.png")
    with pytest.raises(DataError) as e: find_medical(tmp_path / "a")
    assert all(k in str(e.value) for k in KINDS) and "1 image" in str(e.value)
    with pytest.raises(DataError, match="no such folder"): find_medical(tmp_path / "gone")
    with pytest.raises(ConfigError, match="busi"): find_medical(tmp_path, "buzi")


def test_two_data_sets_in_one_folder(busi, tn3k):
    assert busi.parent == tn3k.parent
    with pytest.raises(DataError, match="2 data sets"): find_medical(busi.parent)


def test_folders_without_a_pair(tmp_path):
    picture(tmp_path / "b" / "benign" / "benign (1).png")
    with pytest.raises(DataError, match="no pair"): find_medical(tmp_path / "b")


# ---------------------------------------------------------------- what was damaged on the way
ODD = {"an object at the top": dict(points=SQUARE), "a number": 3, "null in the list": [None], "a list in the list": [[1, 2]], "a text in the list": ["x"],
       "no points": [dict(regionType="freehand")], "points are a number": [dict(points=7)], "points are a text": [dict(points="abc")],
       "points are no pairs": [dict(points=[[1, 2], [3, 4], [5, 6]])], "a corner without y": [dict(points=[dict(x=1)])],
       "words for numbers": [dict(points=[dict(x="left", y="up")])], "null for a number": [dict(points=[dict(x=None, y=1)])],
       "infinite": [dict(points=[dict(x=float("inf"), y=1)])], "not a number": [dict(points=[dict(x=float("nan"), y=1)])],
       "far away": [dict(points=[dict(x=1e12, y=1)])]}


@pytest.mark.parametrize("what", ODD)
def test_outlines_of_another_form_are_refused_by_name(tmp_path, what):
    case(tmp_path / "1.xml", (1, json.dumps(ODD[what])))
    with pytest.raises(DataError, match="(?s)1.xml.*expected.*(list of regions|corners)"): read_polygons(tmp_path / "1.xml")


def test_outlines_of_another_form_do_not_stop_the_set(ddti):
    "The case is named and its image left out; the others are read."
    case(ddti / "1.xml", (1, json.dumps(dict(points=SQUARE))))
    s = find_medical(ddti)
    assert [p.name for p in s.items] == ["97_1"] and "1.xml" in noted(s, "broken") and "1_1.jpg" in noted(s, "images without a mask")


def test_numbers_as_texts_and_cut_off_points(tmp_path):
    case(tmp_path / "1.xml", (1, json.dumps([dict(points=[{k: str(v) for k, v in p.items()} for p in SQUARE])])))
    assert read_polygons(tmp_path / "1.xml") == {1: [[(p["x"], p["y"]) for p in SQUARE]]}
    notes = []
    case(tmp_path / "2.xml", (1, '[{"points": [{"x": 1 "y"}]}, {"points": ' + json.dumps(SQUARE) + "}, {"))
    assert len(read_polygons(tmp_path / "2.xml", notes)[1]) == 1 and "1 complete" in notes[0]
    (tmp_path / "3.xml").write_bytes(b'<?xml version="1.0" encoding="klingon"?><case/>')
    with pytest.raises(DataError, match="3.xml"): read_polygons(tmp_path / "3.xml")
    with pytest.raises(DataError, match="name of an XML file"): read_polygons(None)
    case(tmp_path / "4.xml", ("²", json.dumps([dict(points=SQUARE)])))
    assert read_polygons(tmp_path / "4.xml") == {}


def test_masks_that_are_no_numbers(tmp_path):
    nan = np.where(BOX > 0, np.nan, 0).astype(np.float32)
    with pytest.raises(DataError, match="m.tif"): read_pair(pair(tmp_path, nan, name="m.tif"))


@pytest.mark.parametrize("a", [np.ones((1, 8, 9)), np.ones((8, 9, 1)), np.ones((8, 9)), np.ones((1, 9, 9)), np.ones((9, 9, 1))])
def test_a_block_of_one_mask(tmp_path, a):
    m = read_mat(mat(tmp_path / "a.mat", a))
    assert m.shape == (1, *(n for n in a.shape if n > 1)) and m.all() and count_mat(tmp_path / "a.mat") == 1


@pytest.mark.parametrize("fields", [dict(predicted=np.ones((1, 9))), dict(predicted=np.ones((2, 2, 8, 9))), dict(predicted=np.ones((2, 2, 8, 9)), other=np.ones((3, 8, 9))),
                                    dict(predicted=np.full((3, 8, 9), np.nan)), dict(predicted=np.ones((3, 8, 9)) * 1j), dict(n=np.ones((1, 1))),
                                    dict(predicted=np.array([[1, "x"], [2, "y"]], object))])
def test_blocks_that_are_no_masks(tmp_path, fields):
    from scipy.io import savemat
    savemat(tmp_path / "a.mat", fields)
    with pytest.raises(DataError, match="a.mat"): read_mat(tmp_path / "a.mat")


def shown(tmp_path, masks, name="late"):
    "A film of as many frames as masks."
    return MedicalVideo(name, tuple(picture(tmp_path / f"{i:03d}.png", i) for i in range(len(masks))),
                        masks={i: grey(tmp_path / "gt" / f"{i:03d}.png", m * 255) for i, m in enumerate(masks)})


def test_support_is_the_first_frame_with_an_object(tmp_path):
    images, masks = shown(tmp_path, [0 * BOX, 0 * BOX, BOX, BOX]).support(n=2)
    assert images.shape == (2, 3, H, W) and torch.equal(masks, torch.stack([TRUE, TRUE]))
    assert torch.equal(images[0], list(shown(tmp_path, [BOX] * 4).frames())[2])


def test_support_of_a_film_that_never_shows_the_object(tmp_path):
    film = shown(tmp_path, [0 * BOX] * 3, "never")
    with pytest.raises(DataError, match="(?s)never: got 0 of 3 masks with an object.*expected: 1"): film.support()
    with pytest.raises(DataError, match="late: got 1 of 2"): shown(tmp_path, [0 * BOX, BOX]).support(n=2)
    with pytest.raises(DataError, match="late: got 0 of 0"): shown(tmp_path, []).support()
    with pytest.raises(DataError, match="n=0"): shown(tmp_path, [BOX]).support(n=0)


def test_support_of_a_frame_that_is_not_there(tmp_path):
    "A mask behind the end, in a folder and in a file: our error, never StopIteration."
    m = grey(tmp_path / "gt.png")
    with pytest.raises(DataError, match="short, frame 5"): MedicalVideo("short", (picture(tmp_path / "0.png"),), masks={5: m}).support()
    write_video(tmp_path / "v.avi", [torch.zeros(3, H, W)] * 3, 25)
    with pytest.raises(DataError, match="short|v.avi"): MedicalVideo("short", video=tmp_path / "v.avi", masks={5: m}).support()


def test_support_of_frames_of_two_sizes(tmp_path):
    film = shown(tmp_path, [BOX, BOX], "turned")
    picture(tmp_path / "001.png", shape=(H, W + 20))
    with pytest.raises(DataError, match="(?s)turned, frame 1.*size=") : film.support(n=2)
    assert film.support((16, 16), n=2)[0].shape == (2, 3, 16, 16)


def test_a_block_that_became_shorter(tmp_path):
    v = MedicalVideo("v", (picture(tmp_path / "0.png", shape=(8, 9)),), masks={0: (mat(tmp_path / "a.mat", np.ones((3, 8, 9))), 4)})
    with pytest.raises(DataError, match="(?s)a.mat.*5 or more"): v.mask(0)


def test_table_with_absurd_numbers(tmp_path):
    (tmp_path / "t.csv").write_text(f"a,{'9' * 400},3,5\nb,{'9' * 5000},7\n")
    assert read_cycles(tmp_path / "t.csv") == {"a": (2, 5)}


# ---------------------------------------------------------------- lists and folders that disagree
def test_tn3k_with_a_list_of_pictures_that_are_not_there(tn3k):
    (tn3k / "tn3k-trainval-fold0.json").write_text(json.dumps(dict(train=[0, 1, 2, 3], val=[4, 5, 7, 2999])))
    with pytest.raises(DataError, match="(?s)tn3k-trainval-fold0.json: got 2 pictures .*0007.jpg, 2999.jpg.*places in the listing") as e: find_medical(tn3k)
    assert "trainval stays one part" in str(e.value)
    (tn3k / "tn3k-trainval-fold0.json").write_text(json.dumps(dict(train=[-1], val=[0])))
    with pytest.raises(DataError, match="1 picture"): find_medical(tn3k)


def test_tn3k_whose_names_are_no_places(tn3k):
    "Names from 1: the list's number 0 is a place, and no name. Guessing would shift every picture."
    for half in ("image", "mask"): (tn3k / f"trainval-{half}" / "0000.jpg").rename(tn3k / f"trainval-{half}" / "0006.jpg")
    with pytest.raises(DataError, match="0000.jpg"): find_medical(tn3k)


def test_tn3k_pictures_in_no_list_are_counted_and_named(tn3k):
    (tn3k / "tn3k-trainval-fold0.json").write_text(json.dumps(dict(train=[0, 1], val=[4])))
    s = find_medical(tn3k)
    text = noted(s, "in no list")
    assert ": 3 (0002.jpg, 0003.jpg, 0005.jpg)" in text and "places in the listing" in text
    assert sorted(p.image.name for p in s.items if p.split == "trainval") == ["0002.jpg", "0003.jpg", "0005.jpg"]


def test_tn3k_note_of_a_lost_half_says_how_the_list_is_read(tn3k):
    (tn3k / "trainval-mask" / "0003.jpg").unlink()
    text = noted(find_medical(tn3k), "listed, but")
    assert "0003.jpg" in text and "places in the listing" in text


@pytest.mark.parametrize("text", ["null", '{"train": {"0": 1}, "val": [4]}', '{"train": "0123", "val": [4]}', '{"train": [0.5], "val": [4]}', '{"train": [true], "val": [4]}',
                                  '{"train": [0], "val": [1e999]}', '{"train": [0, 1], "val": [1]}'])
def test_tn3k_lists_of_another_form(tn3k, text):
    "A number in both parts would be a leak; the last one used to win."
    (tn3k / "tn3k-trainval-fold0.json").write_text(text)
    with pytest.raises(DataError, match="fold0.json"): find_medical(tn3k)


def test_mmotu_list_that_is_no_text(mmotu):
    (mmotu / "OTU_2d" / "train.txt").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(DataError, match="train.txt"): find_medical(mmotu)
    (mmotu / "OTU_2d" / "train.txt").write_bytes("\ufeff1\n2\n".encode())          # as a Windows editor writes it
    assert [p.split for p in find_medical(mmotu).items] == ["train", "train", "val", None]


# ---------------------------------------------------------------- folders of other people
def test_links_that_lead_nowhere_are_refused_when_read(busi):
    "A data set under git-annex whose content was never fetched: every picture is such a link."
    for p in sorted((busi / "benign").iterdir()): p.unlink(); p.symlink_to("/no/such/place/" + p.name)
    s = find_medical(busi)
    assert len(s.items) == 6
    with pytest.raises(DataError, match=r"benign \(1\).png"): read_pair(s.items[0])


@pytest.mark.skipif(not hasattr(__import__("os"), "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_picture(busi):
    import os
    os.mkfifo(busi / "benign" / "benign (3).png")
    assert len(find_medical(busi).items) == 6


def test_folders_that_cannot_be_read_are_named(busi, monkeypatch):
    "The class folder of somebody else: without the error, a third of the set would be gone in silence."
    import os
    real = os.scandir
    def shut(path):
        if str(path).endswith("malignant"): raise PermissionError(13, "Permission denied")
        return real(path)
    monkeypatch.setattr(os, "scandir", shut)
    with pytest.raises(DataError, match="malignant: got Permission denied"): find_medical(busi)
    with pytest.raises(DataError, match="malignant: got Permission denied"): find_medical(busi / "malignant")


def test_names_in_other_writings_and_cases(tmp_path):
    import unicodedata
    root = tmp_path / "BUSI é"
    for i, name in enumerate(("café (1)", "ÜBER (2)", "图像 (3)")):
        picture(root / "Benign" / f"{unicodedata.normalize('NFD', name)}.PNG", i)
        grey(root / "Benign" / f"{unicodedata.normalize('NFC', name)}_MASK.PNG")
    s = find_medical(root)
    assert s.kind == "busi" and len(s.items) == 3 and all(torch.equal(read_pair(p)[1], TRUE) for p in s.items)


def test_read_only_folder_is_read(busi):
    import os
    for p in (busi / "benign", busi): os.chmod(p, 0o555)
    try: assert len(list(find_medical(busi).images(16))) == 6
    finally:
        for p in (busi, busi / "benign"): os.chmod(p, 0o755)
