"24_attention and 34_foreground: masks, counts, cuts, scores and the whole protocol on planted features, and every bad input."
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.classes import class_set
from timet_nb.data.layout import find_layout
from timet_nb.evaluate.foreground import (FREE, Evidence, ForegroundConfig, boundary_score, centre_blob, choose_threshold,
                                          cluster_evidence, cluster_patches, cluster_precision, cut_scores, draw_pixels,
                                          evaluate_foreground, find_foreground, foreground, free_threshold, gather, grow, image_iou,
                                          otsu_cuts, precision_of, reduce, tally, truth_of)
from timet_nb.features.attention import PRIORS, attention_mask, border_prior, centre_prior, check_prior, where_it_looks

SMALL = dict(map_size=24, k=4, pca=8, niter=10, nredo=2, low=0., high=1., tolerance=2.)


def config(**more): return ForegroundConfig(**(SMALL | more))


def planted(n=6, grid=8, S=24, D=12, seed=0, noise=.05, classes=("background", "object"), empty=()):
    "A square object with its own feature; attention is the object, blurred and moved by one patch."
    g = torch.Generator().manual_seed(seed)
    kinds = torch.randn(4, D, generator=torch.Generator().manual_seed(9))   # 0..1 background, 2 object
    ids = (torch.arange(grid)[:, None] >= grid // 2).long().expand(n, grid, grid).clone()
    on = torch.zeros(n, grid, grid, dtype=torch.bool)
    for i in range(n):
        if i in empty: continue
        y, x = (int(v) for v in torch.randint(0, grid - 3, (2,), generator=g))
        on[i, y:y + 3, x:x + 3] = True
    ids[on] = 2
    z = kinds[ids].permute(0, 3, 1, 2) + noise * torch.randn(n, D, grid, grid, generator=g)
    look = .02 + on.float() + .3 * on.roll(1, 2).float()
    gt = grow(on, (S, S)).to(torch.uint8)
    return Evidence(z.numpy().astype(np.float16), look, gt, tuple(f"p{i}" for i in range(n)), classes)


# ---- where it looks ----

def test_attention_mask_equals_the_golden_arrays_from_both_doors(golden):
    from timet_nb.timet.loss import attention_mask as other_door
    z = np.load(golden / "timet" / "attention_mask.npz")
    S = int(z["spatial_resolution"])
    a = torch.from_numpy(z["cls_attention"]).unflatten(2, (S, S))
    assert other_door is attention_mask
    for name, keep in (("mask_065", .65), ("mask_050", .5)): assert (attention_mask(a, keep).numpy() == z[name][:, 0]).all()


@pytest.mark.parametrize("change, words", [(dict(keep=0.), "keep"), (dict(keep=1.), "keep"), (dict(kernel=4), "an odd number")])
def test_attention_mask_refuses_settings(change, words):
    with pytest.raises(ConfigError, match=words): attention_mask(torch.rand(1, 2, 8, 8), **change)


def test_attention_mask_refuses_what_is_no_attention():
    with pytest.raises(DataError, match=r"a grid of \(3, 9\)"): attention_mask(torch.rand(1, 2, 3, 9))
    with pytest.raises(DataError, match="attention"): attention_mask(-torch.rand(1, 2, 8, 8))
    with pytest.raises(DataError, match="attention"): attention_mask(torch.full((1, 2, 8, 8), math.nan))
    assert not attention_mask(torch.zeros(1, 2, 8, 8)).any()


def test_priors():
    assert centre_prior(6, 9).argmax() in (2 * 9 + 4, 3 * 9 + 4) and abs(float(centre_prior(6, 9).sum()) - 1) < 1e-6
    z = torch.zeros(1, 3, 6, 6); z[:, 0] = 1; z[:, :, 2:4, 2:4] = torch.tensor([0., 1., 0.])[:, None, None]
    assert (border_prior(z)[0, 2:4, 2:4] > .99).all() and (border_prior(z)[0, 0] < 1e-6).all()


def test_a_backbone_without_class_token_is_refused_with_a_way_out():
    cnn = type("Cnn", (), dict(name="lite", has_cls=False))()
    with pytest.raises(ConfigError, match="(?s)'lite'.*no CLS attention.*prior='border'"): check_prior(cnn)
    with pytest.raises(ConfigError, match="attention, border, centre"): check_prior(cnn, "eyes")
    check_prior(cnn, "border"); check_prior(cnn, "centre")


# ---- counts ----

def test_grow_is_torchs_nearest():
    x = torch.randn(2, 3, 7, 5)
    for size in ((100, 100), (7, 5), (3, 11)): assert grow(x, size).equal(torch.nn.functional.interpolate(x, size, mode="nearest"))


def test_counts_and_precision_equal_loops_in_any_chunk():
    g = torch.Generator().manual_seed(1)
    c, m = torch.randint(0, 5, (7, 6, 4), generator=g), torch.rand(7, 6, 4, generator=g) > .6
    size, hit = tally(c, m, 6)
    for i in range(7):
        for k in range(6): assert size[i, k] == (c[i] == k).sum() and hit[i, k] == ((c[i] == k) & m[i]).sum()
    for a, b in zip(tally(c, m, 6, chunk=2), (size, hit)): assert a.equal(b)
    p = cluster_precision(c, m, 6)
    want = [np.mean([float(m[i][c[i] == k].float().mean()) for i in range(7) if (c[i] == k).any()]) for k in range(5)]
    assert np.allclose(p[:5], want) and p[5].isnan()


def test_counts_refuse_ids_beyond_k_and_other_shapes():
    c = torch.zeros(2, 3, 3).long()
    with pytest.raises(DataError, match=r"0\.\.1"): tally(c + 2, c.bool(), 2)
    with pytest.raises(DataError, match="one B"): tally(c, c[:1].bool(), 2)
    with pytest.raises(DataError, match="integer ids"): tally(c.float(), c.bool(), 2)


def test_every_cut_equals_the_score_of_its_mask():
    g = torch.Generator().manual_seed(2)
    c, gt = torch.randint(0, 6, (5, 9, 9), generator=g), (torch.rand(5, 9, 9, generator=g) > .7).long()
    gt[0, 0] = 255
    for void in ("ignore", "foreground", "background"):
        true, seen = truth_of(gt, void)
        p = cluster_precision(c, torch.rand(5, 9, 9, generator=g) > .5, 6)
        order, iou = cut_scores(*tally(c, true, 6, seen), p)
        for i in range(6): assert abs(float(iou[i]) - image_iou(gt, torch.isin(c, torch.from_numpy(order[i:].copy())), void)) < 1e-12


# ---- 255, scores ----

def test_unknown_pixels():
    gt = torch.tensor([[[1, 255], [0, 0]]]); fg = torch.tensor([[[True, True], [False, False]]])
    assert [image_iou(gt, fg, v) for v in ("ignore", "foreground", "background")] == [1., 1., .5]
    assert boundary_score(gt, fg, 1).item() == boundary_score(gt, fg & (gt != 255), 1).item()
    with pytest.raises(ConfigError, match="void"): image_iou(gt, fg, "drop")


def test_nothing_and_everything():
    zero, one = torch.zeros(2, 8, 8).long(), torch.ones(2, 8, 8).long()
    assert image_iou(zero, zero.bool()) == 1 and image_iou(zero, one.bool()) == 0 and image_iou(one, one.bool()) == 1
    assert boundary_score(zero, zero.bool(), 2).tolist() == [1., 1.] and boundary_score(one, one.bool(), 2).tolist() == [1., 1.]
    assert boundary_score(one, zero.bool(), 2, official=True).tolist() == [0., 0.]
    half = zero.clone(); half[:, :4] = 1
    assert boundary_score(one, half.bool(), 2, official=True).isnan().all()       # no background, no outline, as shipped


def test_the_shipped_boundary_score_asks_for_the_background():
    gt = torch.zeros(1, 60, 60).long(); gt[0, 20:40, 20:40] = 1
    fg = gt.bool()
    assert boundary_score(gt, fg, 2) == 1
    assert boundary_score(gt, ~fg, 2, official=True) == 1 > boundary_score(gt, fg, 2, official=True)


# ---- thresholds ----

def test_threshold_policies():
    c = torch.arange(10).reshape(1, 1, 10); p = torch.arange(10).double() / 10
    assert choose_threshold(c, (c > 5).long(), p)[0] == .6
    assert choose_threshold(c, (c > 5).long(), p + .03)[0] == .65 and abs(choose_threshold(c, (c > 5).long(), p + .03, step=0)[0] - .63) < 1e-9
    with pytest.raises(DataError, match="no foreground pixel"): choose_threshold(c, c * 0, p)
    with pytest.raises(DataError, match="more clusters"): choose_threshold(c[..., :1], c[..., :1] + 1, p[:1])
    with_hole = torch.cat([p, torch.tensor([math.nan]).double()])                  # an empty cluster changes nothing
    assert choose_threshold(c, (c > 5).long(), with_hole)[0] == .6
    assert not foreground(c, torch.full((10,), math.nan), 0.).any()


def test_otsu_cuts_have_least_spread():
    g = torch.Generator().manual_seed(3)
    for _ in range(20):
        v, w = torch.rand(8, generator=g).double().sort().values, torch.rand(8, generator=g).double() + .1
        def spread(*ends):
            cost = 0.
            for a, b in zip((0, *ends), (*ends, 8)): cost += float((w[a:b] * (v[a:b] - (v[a:b] * w[a:b]).sum() / w[a:b].sum()) ** 2).sum())
            return cost
        assert otsu_cuts(v, w, 2) == min(range(1, 8), key=spread)
        assert otsu_cuts(v, w, 3) == min(((a, b) for a in range(1, 8) for b in range(a + 1, 8)), key=lambda e: spread(*e))[1]


@pytest.mark.parametrize("rule", FREE)
def test_free_rules_separate_what_is_separate(rule):
    size = torch.full((3, 6), 10); hit = torch.tensor([0, 1, 0, 1, 9, 10]).expand(3, 6).clone()
    t = free_threshold(size, hit, rule, low=.5, high=.9)
    assert .1 < t <= .95 and (precision_of(size, hit) >= t)[5]
    assert math.isnan(free_threshold(size * 0, hit * 0, rule))


# ---- clusters ----

def test_patches_weigh_what_their_pixels_weigh():
    pick = draw_pixels(3, (4, 5), 11, 10 ** 6)
    want = torch.bincount(grow(torch.arange(60).reshape(3, 4, 5), (11, 11)).flatten(), minlength=60)
    assert torch.bincount(pick, minlength=60).equal(want)
    assert len(draw_pixels(3, (4, 5), 11, 50)) == 50 and draw_pixels(3, (4, 5), 11, 50, 1).equal(draw_pixels(3, (4, 5), 11, 50, 1))


def test_clusters_recover_planted_regions_and_refuse_too_many():
    e = planted()
    rows = reduce(e.features, 8)
    assert rows.shape == (6 * 64, 8) and np.allclose(reduce(e.features, 8, chunk=1), rows, atol=1e-4)
    maps = cluster_patches(rows, (8, 8), 24, 3)
    on = grow(maps, (24, 24))[e.gt == 1]
    assert (on == on[0]).all() and (grow(maps, (24, 24))[e.gt == 0] != on[0]).all()
    with pytest.raises(DataError, match="k=400 clusters of 384 patches"): cluster_patches(rows, (8, 8), 24, 400, name="val")


def test_empty_clusters_are_background_and_noted():
    e = planted(noise=0.)                                       # three distinct points, so 8 clusters cannot all occur
    r = find_foreground(e, e, config(k=8))
    assert r.precision.isnan().any() and any("empty" in n for n in r.notes) and r.jaccard > .95


# ---- the protocol ----

@pytest.mark.parametrize("threshold", ["labels", "free", .5])
def test_planted_objects_are_found(threshold):
    r = find_foreground(planted(seed=1), planted(seed=2), config(threshold=threshold, k=3))
    assert r.jaccard > .95 and r.boundary_f > .95 and r.miou > .95, r
    assert r.jaccard > r.attention and r.centre < .5 and r.everything < .3
    assert set(r.iou) == {"background", "object"} and r.absent == () and len(r.images) == 6
    assert "jaccard=" in repr(r) and ("seen the labels" in " ".join(r.notes)) == (threshold == "labels")


def test_random_features_find_nothing_much():
    e = planted(noise=50.)
    assert find_foreground(e, e, config()).jaccard < .5


def test_free_and_fixed_thresholds_never_read_labels():
    a, b = planted(seed=1), planted(seed=1)
    b.gt = 1 - b.gt                                             # labels of train turned over
    for t in ("free", .6): assert find_foreground(a, planted(seed=2), config(threshold=t)).jaccard == find_foreground(b, planted(seed=2), config(threshold=t)).jaccard
    assert find_foreground(None, planted(seed=2), config(threshold="free", k=3)).jaccard > .9
    with pytest.raises(ConfigError, match="train"): find_foreground(None, a, config())


def test_absent_class_is_named_and_left_out():
    e = planted(classes=("background", "object", "ghost"))
    r = find_foreground(e, e, config(classes=3))
    assert r.absent == ("ghost",) and math.isnan(r.iou["ghost"]) and abs(r.miou - np.mean([r.iou["background"], r.iou["object"]])) < 1e-9


def test_pictures_without_object_and_full_pictures_are_noted():
    val = planted(seed=2, empty=(0, 3))
    r = find_foreground(planted(seed=1), val, config(k=3))
    assert any("2 of 6 pictures have no true foreground" in n for n in r.notes) and r.images["p0"] == 1
    val.gt = torch.ones_like(val.gt)
    r = find_foreground(planted(seed=1), val, config(k=3))
    assert any("6 of 6 pictures are all foreground" in n for n in r.notes) and r.everything == 1 and r.absent == ("background",)
    val.gt = torch.zeros_like(val.gt)
    assert any("6 of 6 pictures have no true" in n for n in find_foreground(planted(seed=1), val, config(k=3)).notes)
    with pytest.raises(DataError, match="no foreground pixel"): find_foreground(val, planted(), config())


def test_an_unreachable_threshold_finds_nothing_and_says_so():
    r = find_foreground(None, planted(), config(threshold=1.))
    if r.jaccard == 0: assert any("no cluster reaches" in n for n in r.notes)
    val = planted(); val.look = torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(0))
    r = find_foreground(None, val, config(threshold=1., k=2))
    assert r.jaccard == 0 and any("no cluster reaches" in n for n in r.notes) and r.iou["object"] == 0


def test_runs_are_averaged():
    e = planted(noise=1.5)
    r = find_foreground(e, e, config(runs=3))
    assert len(r.rows) == 3 and abs(r.jaccard - np.mean([x["jaccard"] for x in r.rows])) < 1e-12 and [x["seed"] for x in r.rows] == [1, 2, 3]
    assert find_foreground(e, e, config(), seed=2).jaccard == r.rows[2]["jaccard"]


def test_clusters_do_not_depend_on_labels_or_chunks():
    e = planted(noise=.5); f = planted(noise=.5); f.gt = f.gt * 0 + 255
    a, b = cluster_evidence(e, config()), cluster_evidence(f, config())
    assert a.clusters.equal(b.clusters) and a.precision.equal(b.precision)


@pytest.mark.parametrize("bad", [dict(size=0), dict(k=1), dict(threshold="otsu"), dict(threshold=2.), dict(threshold=True), dict(keep=1.),
                                 dict(void="x"), dict(prior="x"), dict(rule="x"), dict(low=.8), dict(classes=1), dict(runs=0)])
def test_bad_settings_are_named(bad):
    with pytest.raises(ConfigError, match=f"ForegroundConfig.{next(iter(bad))}"): ForegroundConfig(**bad)


def test_presets():
    p, o, lp, m = (getattr(ForegroundConfig, n)() for n in ("paper", "official", "leopart", "mini"))
    assert (p.size, p.k, p.void, p.official_boundary) == (448, 300, "ignore", False) and (o.void, o.official_boundary) == ("foreground", True)
    assert (lp.k, lp.runs) == (200, 5) and m.size == 224 and ForegroundConfig.mini(k=7).k == 7
    with pytest.raises(AttributeError): p.k = 3


# ---- files ----

class Probe(nn.Module):
    "Features are colours of 8-pixel patches; attention is redness."
    patch, dim, name, has_cls = 8, 3, "probe", True
    def __init__(self, poison=None):
        super().__init__(); self.poison = poison; self.seen = 0
        self.register_buffer("w", torch.zeros(1))
    device = property(lambda self: self.w.device)
    def fit_size(self, h, w): return max(h // 8, 1) * 8, max(w // 8, 1) * 8
    def grid(self, h, w): return h // 8, w // 8
    def tokens(self, x, attention=False):
        z = torch.nn.functional.avg_pool2d(x, 8) + .01 * torch.rand(len(x), 3, x.shape[2] // 8, x.shape[3] // 8, generator=torch.Generator().manual_seed(0))
        for i in range(len(x)):
            if self.seen + i == self.poison: z[i, 0, 0, 0] = math.nan
        self.seen += len(x)
        return (z, (z[:, :1] - z[:, 1:2]).clamp(min=0.)) if attention else z


def write_set(root, kind="palette", n=4, side=64, tiny=None):
    "Red squares on green, as DAVIS clips of one frame; masks as palette or RGB PNG."
    for i in range(n):
        s = 4 if i == tiny else side
        img = np.zeros((s, s, 3), np.uint8); img[..., 1] = 180
        ids = np.zeros((s, s), np.uint8)
        img[s // 4:s // 2, s // 4:s // 2] = (220, 10, 10); ids[s // 4:s // 2, s // 4:s // 2] = 1
        if kind != "rgb": ids[0, :s // 8] = 255
        for sub, data in (("JPEGImages", img), ("Annotations", ids)):
            folder = root / sub / "480p" / f"c{i}"; folder.mkdir(parents=True, exist_ok=True)
            if sub == "JPEGImages": Image.fromarray(data).save(folder / "00000.jpg", quality=95)
            elif kind == "palette":
                p = Image.fromarray(ids).copy(); p.putpalette([0, 0, 0, 128, 0, 0] + [0] * 756 + [224, 224, 192]); p.save(folder / "00000.png")
            else: Image.fromarray(np.stack([ids * 128, ids * 0, ids * 0], -1)).save(folder / "00000.png")
    return class_set(find_layout(root), meaning="foreground")


FILES = dict(size=64, map_size=32, k=3, pca=3, niter=10, low=0., high=1., tolerance=2., nredo=1)


@pytest.mark.parametrize("kind", ["palette", "rgb"])
def test_from_files(tmp_path, kind):
    s = write_set(tmp_path, kind)
    r = evaluate_foreground(Probe(), s, s, ForegroundConfig(**FILES), device="cpu")
    assert r.jaccard > .9 and any("4 pictures are in train and val" in n for n in r.notes), r
    e = gather(Probe(), s, ForegroundConfig(**FILES), "cpu")
    assert e.gt.dtype == torch.uint8 and (e.gt == 255).any() == (kind == "palette") and e.features.shape == (4, 3, 8, 8)
    if kind == "palette":
        shipped = evaluate_foreground(Probe(), s, s, ForegroundConfig(**FILES, void="foreground"), device="cpu")
        assert shipped.jaccard < r.jaccard


def test_bad_pictures_are_named(tmp_path):
    s = write_set(tmp_path / "a")
    with pytest.raises(DataError, match="picture c2/00000|picture c2"): gather(Probe(poison=2), s, ForegroundConfig(**FILES, batch=3), "cpu")
    t = write_set(tmp_path / "b", tiny=1)
    with pytest.raises(DataError, match=r"(?s)picture c1.*\(4, 4\) pixels.*one patch \(8 pixels\)"): gather(Probe(), t, ForegroundConfig(**FILES), "cpu")
    with pytest.raises(DataError, match="k=300 clusters of 256 patches"): evaluate_foreground(Probe(), s, s, ForegroundConfig(**FILES | dict(k=300)), device="cpu")


def test_a_cnn_is_refused_before_anything_is_read(tmp_path):
    s, cnn = write_set(tmp_path), Probe()
    cnn.has_cls = False
    with pytest.raises(ConfigError, match="no CLS attention"): evaluate_foreground(cnn, s, s, ForegroundConfig(**FILES))
    assert cnn.seen == 0
    r = evaluate_foreground(cnn, s, s, ForegroundConfig(**FILES, prior="border"), device="cpu")
    assert r.jaccard > .9 and any("prior='border'" in n for n in r.notes)


@pytest.mark.parametrize("prior", PRIORS)
def test_where_it_looks_on_the_test_vit(prior):
    from timet_nb.features.backbone import create_backbone
    vit = create_backbone("test-vit")
    z, look = where_it_looks(vit, torch.rand(2, 3, 64, 48), prior)
    assert z.shape == (2, 48, 8, 6) and look.shape == (2, 8, 6) and (look >= 0).all()
    if prior == "attention": assert torch.allclose(look, vit.cls_attention(torch.rand(2, 3, 64, 48)).mean(1), atol=1) and z.isfinite().all()


def test_centre_blob():
    b = centre_blob(2, 40, .25)
    assert b.shape == (2, 40, 40) and b[0].sum() == 400 and not b[0, 0].any()


@pytest.mark.data
@pytest.mark.weights
def test_a_pretrained_vit_beats_its_controls(real_data, vit):
    if not (real_data / "davis2016_pairs").is_dir(): pytest.skip("TIMET_DATA holds no davis2016_pairs/")
    s = class_set(find_layout(real_data / "davis2016_pairs"), meaning="foreground").share(.25)
    train, val = s.split(.5)
    r = evaluate_foreground(vit, train, val, ForegroundConfig.mini(k=30, threshold="free"), device="cpu")
    assert r.jaccard > r.everything + .15 and r.jaccard > r.centre, r
