"Dense retrieval: exact neighbours in bounded memory, the choice of patches, the protocol and what it refuses."
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.classes import ClassSet, Item, class_set
from timet_nb.data.frames import clip_colours
from timet_nb.data.layout import Clip
from timet_nb.evaluate import memory as room
from timet_nb.evaluate.retrieve import (
    FRACTIONS, SHARE_SEEDS, Memory, RetrieveConfig, ask_memories, augmented, blend_labels,
    checked_neighbours, evaluate_retrieval, fill_memories, low_data, nearest_patches, new_memory,
    patch_labels, patches_per_image, piece_sizes, rare_patches, score_table, search, top_of_groups)

torch.set_num_threads(1)
COLOURS = {0: (40, 40, 40), 1: (220, 30, 30), 2: (30, 200, 60), 3: (40, 60, 230)}


class Colours:
    "A backbone whose feature of a patch is its mean colour; a marker colour may give NaN."
    patch, multiple, dim, device, name = 8, 8, 4, torch.device("cpu"), "colours"
    mean, std = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    seen = 0

    def fit_size(self, h, w, how="nearest"): return round(h / 8) * 8, round(w / 8) * 8

    def tokens(self, x, **options):
        self.seen += len(x)
        f = F.avg_pool2d(x, 8)
        f = torch.where(f[:, 1:2] > .99, torch.nan, f)
        return torch.cat([f, torch.full_like(f[:, :1], .05)], 1)


def paint(folder, name, ids, palette=False, rgb=False, noise=0):
    "A picture in the colours of its classes, and its mask."
    ids = np.asarray(ids, np.uint8)
    colours = np.zeros((256, 3), np.uint8)
    for i, c in COLOURS.items(): colours[i] = c
    colours[255] = (250, 0, 250)
    rng = np.random.default_rng(noise)
    picture = colours[np.where(ids == 255, 0, ids)].astype(int) + rng.integers(0, 9, (*ids.shape, 3))
    Image.fromarray(picture.astype(np.uint8)).save(folder / f"{name}.png")
    mask = Image.fromarray(ids)
    if palette: mask.putpalette(colours.flatten().tolist())
    if rgb: mask = Image.fromarray(colours[ids])
    mask.save(folder / f"{name}_mask.png")
    files = folder / f"{name}.png", folder / f"{name}_mask.png"
    table = clip_colours(Clip(name, files[:1], files[1:])) if rgb else None
    return Item(name, *files, name, colours=table)


def halves(a, b, size=64):
    ids = np.full((size, size), a, np.uint8)
    ids[:, size // 2:] = b
    return ids


NAMES = ("background", "red", "green", "blue")


def painted(folder, pairs, start=0, **options):
    items = tuple(paint(folder, f"p{start + i}", halves(a, b), noise=start + i, **options) for i, (a, b) in enumerate(pairs))
    return ClassSet(NAMES, items)


@pytest.fixture
def sides(tmp_path):
    every = [(0, 1), (0, 2), (0, 3), (1, 2)]
    return painted(tmp_path, every), painted(tmp_path, every[::-1], 10)


CONFIG = RetrieveConfig(size=64, k=5)


# ---- the search

@pytest.mark.parametrize("Q,M,k,cut", [(3, 40, 5, {}), (300, 5000, 30, {}), (7, 5000, 30, dict(chunk=33)),
                                       (50, 4099, 1, dict(chunk_bytes=4096)), (5, 64, 64, {}), (2, 5000, 30, dict(chunk_bytes=4))])
def test_neighbours_are_those_of_a_sort_and_of_faiss(Q, M, k, cut):
    if cut.get("chunk_bytes") == 4: M = 70
    g = torch.Generator().manual_seed(Q)
    rows, q = F.normalize(torch.randn(M, 24, generator=g), dim=1), torch.randn(Q, 24, generator=g)
    want = (F.normalize(q, dim=1).double() @ rows.double().T).topk(k)
    cos, at = nearest_patches(q, rows, k, **cut)
    torch.testing.assert_close(cos, want.values.float(), atol=2e-6, rtol=0)
    assert (at == want.indices).float().mean() > .999        # but for ties in the last digit
    theirs = search(q, rows, k, "faiss")
    assert (theirs[1].sort().values == at.sort().values).float().mean() > .999


@pytest.mark.parametrize("S,k,group", [(5, 5, 64), (640, 1, 64), (641, 30, 8), (999, 3, 64), (130, 1, 64)])
def test_groups_hold_the_largest(S, k, group):
    x = torch.randn(9, S, generator=torch.Generator().manual_seed(S))
    value, at = top_of_groups(x, k, group)
    want = x.topk(k)
    assert torch.equal(value, want.values) and torch.equal(at, want.indices)


def test_ties_and_duplicates_give_valid_rows():
    x = torch.zeros(2, 1000)
    value, at = top_of_groups(x, 7)
    assert (value == 0).all() and all(len(set(r)) == 7 for r in at.tolist())
    rows = F.normalize(torch.randn(3, 8), dim=1).repeat(500, 1)
    cos, at = nearest_patches(rows[:3], rows, 10)
    torch.testing.assert_close(cos, torch.ones(3, 10), atol=1e-5, rtol=0)
    assert all(len(set(r)) == 10 for r in at.tolist()) and (at % 3 == torch.arange(3)[:, None]).all()


def test_too_many_neighbours_by_policy():
    rows, q = F.normalize(torch.randn(6, 8), dim=1), torch.randn(4, 8)
    with pytest.raises(ConfigError, match="k=9 .* 6 patches"): nearest_patches(q, rows, 9)
    assert nearest_patches(q, rows, 9, few="clamp")[1].shape == (4, 6)
    with pytest.raises(ConfigError, match="few"): nearest_patches(q, rows, 2, few="guess")
    with pytest.raises(ConfigError): nearest_patches(q, rows, 0, few="clamp")
    with pytest.raises(DataError, match="no patches"): nearest_patches(q, rows[:0], 1, few="clamp")


def test_nan_never_wins_a_search():
    rows, q = F.normalize(torch.randn(600, 8), dim=1), torch.randn(4, 8)
    rows[77] = torch.nan
    with pytest.raises(DataError, match="nan"): nearest_patches(q, rows, 3)
    with pytest.raises(DataError, match="nan"): nearest_patches(q * torch.nan, rows[:50], 3)


def test_inputs_with_gradient_and_no_queries():
    rows, q = F.normalize(torch.randn(60, 8), dim=1), torch.randn(4, 8, requires_grad=True)
    assert nearest_patches(q, rows, 3)[1].shape == (4, 3)
    assert nearest_patches(q[:0], rows, 3)[0].shape == (0, 3)


@pytest.mark.parametrize("room_bytes", [4, 100, 4096, 2 ** 20])
def test_pieces_stay_within_their_bound(room_bytes):
    q, rows = piece_sizes(1296, "cpu", room_bytes)
    assert q >= 1 and rows >= 1 and 4 * q * rows <= room_bytes


# ---- an index that says -1

class Short:
    "An index that finds only the first `n` of what it is asked for."
    def __init__(self, rows, n): self.rows, self.n = rows, n

    def search(self, q, k):
        cos, at = (torch.from_numpy(q) @ self.rows.T).topk(k)
        cos[:, self.n:], at[:, self.n:] = -3e38, -1
        return cos.numpy(), at.numpy()


def test_minus_one_is_never_an_index():
    g = torch.Generator().manual_seed(3)
    rows, q = F.normalize(torch.randn(40, 8, generator=g), dim=1), torch.randn(6, 8, generator=g)
    labels = torch.zeros(40, 2)
    labels[:, 0], labels[-1] = 1, torch.tensor([0., 1000.])      # row -1 would be seen at once
    keep = nearest_patches(q, rows[:-1], 3)
    cos, at = search(q, rows, 6, Short(rows[:-1], 3))
    assert (at >= 0).all() and torch.equal(at[:, :3], keep[1])
    torch.testing.assert_close(blend_labels(cos, labels[at]), blend_labels(keep[0], labels[keep[1]]))
    with pytest.raises(DataError, match="no neighbour for query 0"): search(q, rows, 6, Short(rows, 0))
    with pytest.raises(DataError, match=r"rows 0\.\.9"): checked_neighbours([[1.]], [[10]], 10)


def test_a_memory_asks_such_an_index(sides):
    memory = Memory(4, k=6)
    fill_memories(Colours(), sides[0], [(memory, {i.name for i in sides[0]})], CONFIG)
    x = torch.rand(1, 4, 8, 8)
    want = memory.soft(x, k=3)
    memory.search = Short(memory.rows, 3)
    torch.testing.assert_close(memory.soft(x), want, atol=1e-5, rtol=0)


def test_without_faiss_only_faiss_is_missing(monkeypatch):
    def gone(name, extra=None): raise ConfigError(f"{name} is not installed")
    monkeypatch.setattr(room, "need", gone)
    rows, q = F.normalize(torch.randn(40, 8), dim=1), torch.randn(6, 8)
    assert search(q, rows, 4)[1].shape == (6, 4)
    with pytest.raises(ConfigError, match="faiss is not installed"): search(q, rows, 4, "faiss")
    with pytest.raises(ConfigError, match="pieces"): search(q, rows, 4, "scann")


# ---- labels and the choice of patches

def test_unknown_pixels_in_the_memory_have_two_policies():
    ids = torch.tensor([[[1, 1, 255, 255], [1, 255, 255, 255]]])
    assert patch_labels(ids, (1, 2), 2).tolist() == [[[[.25, .75], [1., 0.]]]]                 # as the peers count
    assert patch_labels(ids, (1, 2), 2, unknown="leave").tolist() == [[[[0., 1.], [0., 0.]]]]  # known pixels only
    with pytest.raises(DataError, match="255"): patch_labels(ids, (1, 2), 2, ignore=None)
    with pytest.raises(ConfigError, match="unknown"): patch_labels(ids, (1, 2), 2, unknown="?")
    memory = Memory(2, unknown="leave")
    assert memory.add(torch.rand(1, 3, 1, 2), ids) == 1          # the patch nobody knows is not remembered


def test_labels_of_any_patch_size_sum_to_one():
    ids = torch.randint(0, 5, (2, 12, 20))
    for grid in ((12, 20), (3, 5), (1, 1), (6, 4)): torch.testing.assert_close(patch_labels(ids, grid, 5).sum(-1), torch.ones(2, *grid))
    with pytest.raises(DataError, match="equal patches"): patch_labels(ids, (5, 5), 5)


def test_choice_is_seeded_distinct_and_prefers_the_rare():
    labels = torch.zeros(200, 3)
    labels[:, 0], labels[:5] = 1, torch.tensor([0., 0., 1.])
    a, b = (rare_patches(labels, 20, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(a, b) and len(set(a.tolist())) == 20 and len(set(a.tolist()) & set(range(5))) >= 4
    with pytest.raises(ConfigError): rare_patches(labels, 201)


def test_budget_is_shared_and_refused_when_too_small():
    assert patches_per_image(1024 * 10 ** 4, 10582, 2) == 483
    with pytest.raises(ConfigError, match="21164 or more"): patches_per_image(20000, 10582, 2)


# ---- the protocol

def test_colours_find_their_classes(sides):
    r = evaluate_retrieval(Colours(), *sides, CONFIG)
    assert r.miou > .9 and r.direct > .9 and r.absent == r.untaught == r.notes == ()
    assert list(r.iou) == list(NAMES) and r.memory_rows == 4 * 64 and r.pictures == (4, 4)
    assert "miou=" in repr(r) and r.blind < .2


def test_results_do_not_depend_on_batches_pieces_or_search(sides):
    want = evaluate_retrieval(Colours(), *sides, CONFIG).table
    for other in (dict(batch=1), dict(chunk_bytes=64), dict(search="faiss"), dict(search="pieces")):
        assert torch.equal(evaluate_retrieval(Colours(), *sides, replace(CONFIG, **other)).table, want), other


def test_ignored_truth_is_not_counted(sides, tmp_path):
    ids = halves(0, 1); ids[:, :32] = 255
    val = ClassSet(NAMES, (paint(tmp_path, "half", ids),))
    r = evaluate_retrieval(Colours(), sides[0], val, CONFIG)
    assert r.table.sum() == 64 * 32 and r.absent == ("background", "green", "blue") and math.isnan(r.iou["background"])
    assert r.miou == r.iou["red"]                                # absent classes: left out of the mean, and named
    gone = ClassSet(NAMES, (paint(tmp_path, "gone", ids * 0 + 255, palette=True),))
    with pytest.raises(DataError, match="no pixel but 255"): evaluate_retrieval(Colours(), sides[0], gone, CONFIG)


def test_a_class_that_was_never_shown_counts_and_is_named(tmp_path):
    train, val = painted(tmp_path, [(0, 1)]), painted(tmp_path, [(0, 1), (0, 2)], 5)
    r = evaluate_retrieval(Colours(), train, val, replace(CONFIG, how="none"))
    assert r.untaught == ("green",) and r.iou["green"] == 0 and r.absent == ("blue",)
    assert "never shown: green" in r.notes
    assert r.miou == pytest.approx(np.mean([r.iou[n] for n in NAMES[:3]]))


def test_memory_without_a_known_pixel_is_refused(tmp_path, sides):
    ids = halves(0, 1) * 0 + 255
    train = ClassSet(NAMES, (paint(tmp_path, "none", ids, palette=True),))
    with pytest.raises(DataError, match="no known pixel"): evaluate_retrieval(Colours(), train, sides[1], CONFIG)
    r = evaluate_retrieval(Colours(), train, sides[1], replace(CONFIG, unknown="background"))
    assert r.direct == pytest.approx(r.blind)                    # all it can say is background
    with pytest.raises(DataError, match="empty"): Memory(2).soft(torch.rand(1, 3, 2, 2))


@pytest.mark.parametrize("kind", ["palette", "rgb"])
def test_palette_and_rgb_masks_are_the_same_classes(kind, tmp_path):
    pairs = [(0, 1), (2, 3)]
    for name in ("plain", "odd"): (tmp_path / name).mkdir()
    plain, odd = painted(tmp_path / "plain", pairs), painted(tmp_path / "odd", pairs, **{kind: True})
    assert len(odd.read(1)[1].unique()) == 2
    a, b = (evaluate_retrieval(Colours(), s, s, CONFIG) for s in (plain, odd))
    assert a.miou > .9 and b.miou > .9 and torch.equal(a.table, b.table) == (kind == "palette")   # colours carry no class numbers


def test_nan_features_name_the_picture(sides, tmp_path):
    item = paint(tmp_path, "bright", halves(0, 1))
    Image.new("RGB", (64, 64), (255, 255, 255)).save(item.image)
    bad = ClassSet(NAMES, (*sides[0].items, item))
    for train, val in ((bad, sides[1]), (sides[0], bad)):
        with pytest.raises(DataError, match="features of bright"): evaluate_retrieval(Colours(), train, val, CONFIG)


def test_small_pictures_grow_and_small_sizes_are_refused(sides, tmp_path):
    tiny = ClassSet(NAMES, (paint(tmp_path, "tiny", halves(0, 1, 4)),))
    assert evaluate_retrieval(Colours(), sides[0], tiny, CONFIG).direct > .8     # 4 x 4 pixels, brought to 64
    with pytest.raises(ConfigError, match="at least one patch of 8"): evaluate_retrieval(Colours(), *sides, replace(CONFIG, size=7))
    r = evaluate_retrieval(Colours(), *sides, replace(CONFIG, size=62))
    assert r.side == 64 and "62 px became 64" in r.notes[0]


def test_more_neighbours_than_patches_leaves_a_note(sides):
    r = evaluate_retrieval(Colours(), sides[0], sides[1], replace(CONFIG, k=30, memory=8))
    assert r.memory_rows == 8 and "k=30" in r.notes[0] and "8 patches" in r.notes[0]


def test_clips_on_both_sides_are_noted(sides):
    assert "4 clips are on both sides" in evaluate_retrieval(Colours(), sides[0], sides[0], CONFIG).notes[0]


def test_two_sides_must_mean_the_same(sides):
    other = replace(sides[1], names=("background", "red", "blue", "green"))
    with pytest.raises(ConfigError, match="order"): evaluate_retrieval(Colours(), sides[0], other, CONFIG)


def test_matching_hides_names_and_direct_does_not():
    t = torch.tensor([[50, 0, 0], [0, 0, 20], [0, 30, 0]])
    got = score_table(t, "abc")
    assert got["miou"] == got["hungarian"] == 1 and got["direct"] == pytest.approx(1 / 3) and got["renamed"] == {"b": "c", "c": "b"}
    assert score_table(t, "abc", "none")["miou"] == got["direct"]


def test_low_data_equals_one_by_one_and_looks_once(sides):
    some = (1., .5)
    backbone = Colours()
    both = low_data(backbone, *sides, CONFIG, some, (42, 400))
    assert backbone.seen == 2 * 8                                # each picture once a seed, for both shares
    for (f, s), r in both.items():
        alone = evaluate_retrieval(Colours(), *sides, CONFIG, f, s)
        assert torch.equal(alone.table, r.table) and alone.memory_rows == r.memory_rows
    assert FRACTIONS == (1, 1 / 8, 1 / 64, 1 / 128) and SHARE_SEEDS == (42, 400, 783, 1293, 4019)


def test_augmentation_is_seeded_by_name_and_keeps_ids(sides):
    config = replace(CONFIG, augment=True, epochs=2, memory=64)
    a, b, c = (evaluate_retrieval(Colours(), *sides, replace(config, batch=n), seed=s) for n, s in ((8, 1), (3, 1), (8, 2)))
    assert torch.equal(a.table, b.table) and a.memory_rows == 64
    one, two = new_memory(sides[0], config, 1), new_memory(sides[0], config, 2)
    for m, s in ((one, 1), (two, 2)): fill_memories(Colours(), sides[0], [(m, {i.name for i in sides[0]})], config, s)
    assert not torch.equal(one.rows, two.rows) and c.memory_rows == 64
    import random
    x, ids = augmented(*sides[0].read(3), CONFIG, 32, random.Random(0))
    assert x.shape == (3, 32, 32) and ids.shape == (32, 32) and set(ids.unique().tolist()) <= {1, 2}


def test_memory_is_laid_out_not_held_twice():
    memory = Memory(2, capacity=300)
    for _ in range(3): memory.add(torch.rand(1, 5, 10, 10), torch.zeros(1, 20, 20, dtype=torch.long))
    assert len(memory) == 300 and len(memory._rows) == 300 and memory.rows.data_ptr() == memory._rows.data_ptr()
    memory.add(torch.rand(1, 5, 10, 10), torch.zeros(1, 20, 20, dtype=torch.long))
    assert len(memory) == 400 and len(memory._rows) == 600


def test_colour_constants_of_others(sides):
    class Own(Colours): mean, std = torch.full((1, 3, 1, 1), .45), torch.full((1, 3, 1, 1), .22)
    from timet_nb.evaluate.retrieve import _recoloured
    from timet_nb.features.inputs import NORMALISE
    x = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in NORMALISE["hummingbird"])
    torch.testing.assert_close((_recoloured(x, Own(), "hummingbird") - Own.mean) / Own.std, (x - mean) / std)
    assert torch.equal(_recoloured(x, Own(), "model"), x) and NORMALISE["hummingbird"][1][2] == .255


@pytest.mark.parametrize("wrong", [dict(k=0), dict(beta=0), dict(size=0), dict(memory=0), dict(unknown="x"), dict(how="x"),
                                   dict(epochs=0), dict(normalise="x"), dict(jitter_p=2)])
def test_settings_that_cannot_be_meant(wrong):
    with pytest.raises(ConfigError, match="RetrieveConfig"): RetrieveConfig(**wrong)


def test_presets_and_their_round_trip():
    for c in (RetrieveConfig.paper(), RetrieveConfig.official(102400), RetrieveConfig.mini()): assert RetrieveConfig(**asdict(c)) == c
    p, o = RetrieveConfig.paper(1024 * 100), RetrieveConfig.official()
    assert (p.k, p.beta, p.size, p.epochs, p.how, p.memory) == (30, .02, 512, 2, "hungarian", 102400)
    assert (o.unknown, o.normalise, p.unknown, p.normalise) == ("background", "hummingbird", "leave", "model")


def test_asking_is_linear_in_pictures_and_forgets_them(sides):
    "Tables of two halves add up to the table of the whole."
    memory = new_memory(sides[0], CONFIG)
    fill_memories(Colours(), sides[0], [(memory, {i.name for i in sides[0]})], CONFIG)
    whole = ask_memories(Colours(), sides[1], {"": memory}, CONFIG)[""]
    parts = [ask_memories(Colours(), sides[1].select(p), {"": memory}, CONFIG)[""] for p in ([0, 1], [2, 3])]
    assert torch.equal(whole, sum(parts))


@pytest.mark.data
def test_real_pairs_absent_classes_are_named(real_data):
    from timet_nb.features.backbone import create_backbone
    whole = class_set(real_data / "davis2016_pairs")
    train, val = whole.split(.5, 0)
    r = evaluate_retrieval(create_backbone("test-vit"), train.select(range(0, len(train), 6)),
                           val.select(range(0, len(val), 6)), RetrieveConfig(size=64))
    assert 0 < r.miou < 1 and set(r.absent) | {n for n, v in r.iou.items() if not math.isnan(v)} == set(whole.names)
    assert set(r.untaught).isdisjoint(r.absent) and not any("both sides" in n for n in r.notes)
