"Sampling, clip-consistent augmentation, data set and loader."
import random
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.clips import ClipAugment, ClipDataset, Geometry, blur, clip_length, clip_loader, crop_box, find_bad, luma, sample_indices, shift_hue
from timet_nb.data.decode import ball_scene
from timet_nb.data.frames import read_clip, resize, write_image, write_mask, write_video
from timet_nb.data.layout import Clip, find_layout

REGIMES = ["uniform", "dense", "regular", "all"]


# ---- sampling -------------------------------------------------------------------------------------------------------

def test_every_recorded_draw_of_the_authors(golden):
    with np.load(golden / "timet/sampling.npz") as z: z = dict(z)
    seed, compared = int(z.pop("python_random_seed")), 0
    clips = int(z.pop("num_clips"))
    for name, want in z.items():
        rng = random.Random(seed)
        if m := re.fullmatch(r"(\w+)_size(\d+)_n(\d+)_step(\d+)", name):
            mode, n, T, step = m[1], *map(int, m.groups()[1:])
            regime, gap = ("all", 1) if mode == "full" else (mode, step if mode == "regular" else 1)
            got = [sample_indices(n, T, regime, gap, rng, official=True) for _ in range(clips)]
        else:
            w, h = map(int, re.fullmatch(r"crop_w(\d+)_h(\d+)_ijhw", name).groups())
            got = [crop_box(h, w, rng=rng) for _ in range(len(want))]
        assert np.array_equal(np.array(got), want), name
        compared += 1
    assert compared == 16


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 60), T=st.integers(1, 20), gap=st.integers(1, 12), regime=st.sampled_from(REGIMES), seed=st.integers(0, 10**6))
def test_indices_are_valid_for_any_length(n, T, gap, regime, seed):
    ids = sample_indices(n, T, regime, gap, random.Random(seed))
    assert ids == sorted(ids) and 0 <= ids[0] and ids[-1] < n and ids == sample_indices(n, T, regime, gap, random.Random(seed))
    steps = np.diff(ids)
    if regime == "all": assert ids == list(range(0, n, gap)); return
    assert len(ids) == T
    if n >= T: assert len(set(ids)) == T
    if n < T and regime != "uniform": assert ids == [*range(n), *[n - 1] * (T - n)]
    if T > 1 and n >= 1 + (T - 1) * gap:
        if regime == "uniform": assert steps.min() >= gap
        if regime == "regular": assert (steps == gap).all()
    if regime == "dense" and n >= T: assert (steps == 1).all()


def test_every_frame_can_be_drawn():
    for regime, gap in (("uniform", 1), ("uniform", 3), ("dense", 1), ("regular", 3)):
        seen = {i for s in range(600) for i in sample_indices(12, 4, regime, gap, random.Random(s))}
        assert seen == set(range(12)), (regime, gap)


def test_sampling_refuses():
    for bad in (dict(n=0, T=4), dict(n=-1, T=4)):
        with pytest.raises(DataError): sample_indices(**bad)
    for bad in (dict(n=5, T=0), dict(n=5, T=2, gap=0), dict(n=5, T=2, regime="random")):
        with pytest.raises(ConfigError): sample_indices(**bad)
    for regime in ("dense", "regular"):
        with pytest.raises(DataError, match="authors"): sample_indices(3, 4, regime, official=True)


@settings(max_examples=200, deadline=None)
@given(h=st.integers(1, 300), w=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_boxes_lie_inside(h, w, seed):
    t, l, bh, bw = crop_box(h, w, rng=random.Random(seed))
    assert 0 <= t and 0 <= l and bh >= 1 and bw >= 1 and t + bh <= h and l + bw <= w
    if min(h, w) > 60: assert .7 < bw / bh < 1.45
    if .8 < h / w < 1.25 and min(h, w) > 60: assert .35 < bh * bw / (h * w) <= 1


# ---- geometry -------------------------------------------------------------------------------------------------------

def clip(T=3, H=60, W=88):
    frames, masks = zip(*[ball_scene(k / T, H, W) for k in range(T)])
    return torch.stack(frames), torch.stack(masks)


def geometries(H=60, W=88):
    return st.builds(lambda t, l, h, w, oh, ow, flip: Geometry((H, W), (t, l, h, w), (oh, ow), flip),
                     st.integers(-20, H - 5), st.integers(-20, W - 5), st.integers(22, 70), st.integers(22, 90), st.integers(1, 90), st.integers(1, 90), st.booleans())


@settings(max_examples=60, deadline=None)
@given(g=geometries())
def test_masks_come_from_the_pixels_that_coords_name(g):
    _, masks = clip()
    m, at = g.masks(masks), g.coords()
    assert m.shape == (3, *g.out) and at.shape == (*g.out, 2)
    x, y = (at + .5).floor().long().unbind(-1)              # a pixel owns [-.5, .5) around its middle
    inside = (x >= 0) & (x < 88) & (y >= 0) & (y < 60)
    want = torch.where(inside, masks[:, y.clamp(0, 59), x.clamp(0, 87)], 255)
    sure = ((at + .5 - (at + .5).round()).abs() > 1e-3).all(-1)
    assert torch.equal(m[:, sure], want[:, sure])


@settings(max_examples=40, deadline=None)
@given(t=st.integers(0, 30), l=st.integers(0, 40), h=st.integers(10, 30), w=st.integers(10, 48), zoom=st.integers(1, 4), flip=st.booleans())
def test_sampling_the_source_at_coords_gives_the_frames(t, l, h, w, zoom, flip):
    frames, _ = clip()
    g = Geometry((60, 88), (t, l, h, w), (h * zoom, w * zoom), flip)
    grid = (g.coords() + .5) * 2 / torch.tensor([88., 60.]) - 1
    want = torch.nn.functional.grid_sample(frames, grid.expand(3, -1, -1, -1), padding_mode="border", align_corners=False)
    inner = (..., slice(zoom, -zoom), slice(zoom, -zoom))
    assert torch.allclose(g.frames(frames)[inner], want[inner], atol=1e-5)


def test_coords_follow_any_change_on_a_ramp():
    y, x = torch.meshgrid(torch.arange(60.), torch.arange(88.), indexing="ij")
    ramp = torch.stack([x / 88, y / 60, x * 0])[None]
    for seed in range(30):
        for aug in (ClipAugment(40, jitter_p=0, grey_p=0, blur_p=0), ClipAugment(40, jitter_p=0, grey_p=0, blur_p=0, as_authors=True), ClipAugment.none(40, "squash")):
            f, _, at = aug(ramp, None, True, seed)
            seen = f[0, :2].permute(1, 2, 0) * torch.tensor([88., 60.])
            assert (seen - at)[6:-6, 6:-6].abs().max() < .2, (seed, aug)


def test_coords_of_coords_compose():
    a, b = Geometry((60, 88), (3, 5, 50, 70), (40, 40), True), Geometry((40, 40), (2, 4, 30, 33), (24, 24), True)
    xs = 5 + (torch.arange(40).flip(0) + .5) * 70 / 40 - .5
    inner = 4 + (torch.arange(24).flip(0) + .5) * 33 / 24 - .5
    want = 5 + (39 - inner + .5) * 70 / 40 - .5
    assert torch.allclose(a.coords()[0, :, 0], xs) and torch.allclose(b.coords(a.coords())[7, :, 0], want, atol=1e-4)
    out = ClipAugment.none(24, "squash")(torch.rand(1, 3, 40, 40), None, a.coords(), 0)[2]
    assert torch.allclose(out, Geometry((40, 40), (0, 0, 40, 40), (24, 24)).coords(a.coords()))


def test_mirror_twice_is_nothing():
    frames, masks = clip(); g = Geometry((60, 88), (0, 0, 60, 88), (60, 88), True)
    assert torch.equal(g.frames(g.frames(frames)), frames) and torch.equal(g.masks(g.masks(masks)), masks)
    assert torch.allclose(g.coords(g.coords()), Geometry((60, 88), (0, 0, 60, 88), (60, 88)).coords())


def test_outside_is_black_and_ignored():
    frames, masks = clip(); g = Geometry((60, 88), (-10, -10, 100, 120), (100, 120))
    f, m = g.frames(frames), g.masks(masks)
    assert (m[:, :10] == 255).all() and (m[:, 70:] == 255).all() and (m[:, :, :10] == 255).all() and (m[:, :, 98:] == 255).all()
    assert torch.equal(m[:, 10:70, 10:98], masks) and torch.allclose(f[..., 10:70, 10:98], frames) and (f[..., :10, :] == 0).all()
    assert (Geometry((60, 88), (200, 300, 5, 5), (4, 4)).masks(masks) == 255).all(), "a window beside the picture"


# ---- colours --------------------------------------------------------------------------------------------------------

def test_hue_agrees_with_the_standard_library():
    import colorsys
    x = torch.rand(3, 6, 7)
    for shift in (-.5, -.2, 0, .1, .37, .5):
        y = shift_hue(x, shift)
        for i in range(6):
            for j in range(7):
                h, s, v = colorsys.rgb_to_hsv(*x[:, i, j].tolist())
                assert np.allclose(y[:, i, j], colorsys.hsv_to_rgb((h + shift) % 1, s, v), atol=1e-5)


def test_blur_agrees_with_scipy():
    from scipy.ndimage import gaussian_filter
    x = torch.rand(2, 3, 30, 40, dtype=torch.float64)
    for sigma in (.1, .7, 2.):
        want = gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=np.ceil(3 * sigma) / sigma)
        assert np.allclose(blur(x, sigma), want, atol=1e-6)
    assert blur(torch.rand(3, 1, 5), 2.).shape == (3, 1, 5) and torch.equal(blur(x, 0.), x)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["paper", "official", "mini"]), byte=st.booleans())
def test_augmented_clips_are_valid_and_repeatable(seed, kind, byte):
    frames, masks = clip(2, 40, 56)
    if byte: frames = (frames * 255).byte()
    keep = frames.clone(), masks.clone(); aug = getattr(ClipAugment, kind)(32)
    a, b = aug(frames, masks, True, seed), aug(frames, masks, True, random.Random(seed))
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and torch.equal(frames, keep[0]) and torch.equal(masks, keep[1])
    f, m, at = a
    assert f.shape == (2, 3, 32, 32) and f.dtype == torch.float32 and 0 <= f.min() and f.max() <= 1 and f.isfinite().all()
    assert m.shape == (2, 32, 32) and set(m.unique().tolist()) <= {0, 1, 2} and at.shape == (32, 32, 2)
    assert at[..., 0].min() >= -.5 and at[..., 0].max() <= 55.5 and at[..., 1].min() >= -.5 and at[..., 1].max() <= 39.5


def test_all_frames_change_alike():
    still = clip(1)[0].expand(4, -1, -1, -1)
    for seed in range(20):
        f, *_ = ClipAugment.paper(32)(still, rng=seed)
        assert torch.equal(f, f[:1].expand_as(f))
    restless = ClipAugment(32, blur_p=1., as_authors=True)
    assert any(not torch.equal(f, f[:1].expand_as(f)) for f in (restless(still, rng=s)[0] for s in range(5)))
    a, b = clip(2)[0]                                       # equal colours in two frames get equal colours
    same = (a == b).all(0)
    only = ClipAugment(60, "squash", flip=0., jitter_p=1., blur_p=0.)
    x = ClipAugment((60, 88), "squash", flip=0., jitter_p=1., blur_p=0.)(torch.stack([a, b]), rng=1)[0]
    assert torch.allclose(x[0][:, same], x[1][:, same], atol=1e-6) and only.size == 60


def test_masks_stay_on_their_objects():
    frames, masks = clip(); painted = masks[:, None].expand(-1, 3, -1, -1).float() / 2
    for seed in range(20):
        for authors in (False, True):
            f, m, _ = ClipAugment(64, jitter_p=0, grey_p=0, blur_p=0, as_authors=authors)(painted, masks, rng=seed)
            assert ((f[:, 0] * 2).round() == m).float().mean() > .95


def test_presets_and_refusals():
    x, y = clip()
    for fit, size in (("centre", 32), ("squash", (20, 40)), ("pad", 32)):
        a = ClipAugment.none(size, fit)(x, y, rng=1)[0]; assert torch.equal(a, ClipAugment.none(size, fit)(x, y, rng=2)[0])
    assert torch.allclose(ClipAugment.none((60, 88), "squash")(x)[0], x)
    assert ClipAugment.paper().size == 224 and ClipAugment.official().as_authors and not ClipAugment.paper().as_authors and ClipAugment.mini().size == 112
    for bad in (dict(fit="stretch"), dict(flip=2), dict(scale=(.5, .4)), dict(scale=(0, 1)), dict(ratio=(2, 1))):
        with pytest.raises(ConfigError): ClipAugment(**bad)
    for bad in ((x[0],), (x, y[:2]), (x, y, torch.zeros(3, 3, 2)), (x.long(),), (x[:0],)):
        with pytest.raises(DataError): ClipAugment.none(8)(*bad)


# ---- data set and loader --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A layout of three folders (3, 7, 12 frames) and one film of 9 frames."
    root = tmp_path_factory.mktemp("world")
    for name, n in (("a", 3), ("b", 7), ("c", 12)):
        for k in range(n):
            x, y = ball_scene(k / n, 48, 64)
            write_image(root / f"d/JPEGImages/480p/{name}/{k:05d}.jpg", x); write_mask(root / f"d/Annotations/480p/{name}/{k:05d}.png", y)
    film = write_video(root / "film.avi", torch.stack([ball_scene(k / 9, 48, 64)[0] for k in range(9)]))
    return [*find_layout(root / "d"), Clip("film", video=film)]


def dataset(world, **k): return ClipDataset(world, **dict(dict(T=4, size=32, augment=ClipAugment.paper(), seed=3, masks=True, coords=True), **k))


def same(a, b): return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a) and a.keys() == b.keys()


def test_items(world):
    d = dataset(world)
    assert len(d) == 4 and [d[i]["name"] for i in range(4)] == ["a", "b", "c", "film"] and clip_length(world[3]) == 9
    for i in range(4):
        x = d[i]
        assert x["frames"].shape == (4, 3, 32, 32) and x["masks"].shape == (4, 32, 32) and x["coords"].shape == (32, 32, 2) and x["frame_ids"].shape == (4,) and x["index"] == i
        assert same(x, d[i])
    assert (d[3]["masks"] == 255).all() and set(d[2]["masks"].unique().tolist()) <= {0, 1, 2}
    before = d[2]; d.set_epoch(1); assert not torch.equal(before["frames"], d[2]["frames"])
    assert not torch.equal(dataset(world, seed=4)[2]["frames"], before["frames"])
    assert set(dataset(world, masks=False, coords=False)[0]) == {"frames", "index", "name", "frame_ids"}
    assert dataset(world, regime="all", masks=False)[2]["frames"].shape[0] == 12
    plain = ClipDataset(world, T=2); assert plain[0]["frames"].shape == (2, 3, 224, 224)


def test_items_do_not_touch_global_generators(world):
    d = dataset(world); random.seed(5); torch.manual_seed(5); a = random.random(), torch.rand(1)
    random.seed(5); torch.manual_seed(5); d[1]; assert (random.random(), torch.rand(1)) == a
    random.seed(9); x = d[1]; random.seed(10); assert same(x, d[1])


def test_refusals(world):
    for bad, error in ((dict(regime="sparse"), ConfigError), (dict(T=0), ConfigError), (dict(gap=0), ConfigError)):
        with pytest.raises(error): dataset(world, **bad)
    with pytest.raises(DataError, match="no clips"): ClipDataset([])
    with pytest.raises(DataError, match="authors"): dataset(world, regime="dense", official=True)[0]


def batches(world, workers, start=0, stop=5, **k):
    loader = clip_loader(dataset(world), 2, workers=workers, **k); loader.batch_sampler.seek(start, stop)
    return list(loader)


def test_workers_do_not_matter(world):
    alone = batches(world, 0)
    assert len(alone) == 5
    for w in (1, 2): assert all(same(a, b) for a, b in zip(alone, batches(world, w), strict=True))
    assert not torch.equal(alone[0]["frames"], alone[2]["frames"])
    assert all(same(a, b) for a, b in zip(alone[3:], batches(world, 0, 3), strict=True)), "begun at batch 3"
    assert all(same(a, b) for a, b in zip(alone[3:], batches(world, 2, 3), strict=True))


def test_loader_items_are_dataset_items(world):
    d, seen = dataset(world), []
    for k, batch in enumerate(clip_loader(dataset(world), 2, steps=4)):
        for j, i in enumerate(batch["index"].tolist()):
            d.set_epoch(k // 2); item = d[i]
            assert torch.equal(batch["frames"][j], item["frames"]) and torch.equal(batch["masks"][j], item["masks"])
            seen.append((k // 2, i))
    assert sorted(seen) == [(e, i) for e in (0, 1) for i in range(4)], "each clip once an epoch"


def test_ranks_share_an_epoch(world):
    parts = [[n for b in clip_loader(dataset(world), 1, rank=r, world=2) for n in b["name"]] for r in (0, 1)]
    assert sorted(sum(parts, [])) == ["a", "b", "c", "film"]
    assert [b["name"] for b in clip_loader(dataset(world), 4, shuffle=False)] == [["a", "b", "c", "film"]]
    assert len(list(clip_loader(dataset(world), 3, drop_last=False))) == 2 and len(list(clip_loader(dataset(world), 4, steps=3))) == 3
    assert not same(next(iter(clip_loader(dataset(world), 2, seed=1))), next(iter(clip_loader(dataset(world), 2, seed=2))))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_frame_is_named_from_any_worker(world, tmp_path, workers):
    shutil.copytree(world[0].frames[0].parents[3], tmp_path / "d")
    bad = tmp_path / "d/JPEGImages/480p/b/00003.jpg"; bad.write_bytes(bad.read_bytes()[:300])
    layout = find_layout(tmp_path / "d")
    with pytest.raises(DataError) as e: list(clip_loader(dataset(layout, T=7), 3, workers=workers))
    assert str(bad) in str(e.value)
    found = find_bad(layout)
    assert list(found) == ["b"] and str(bad) in found["b"] and find_bad([c for c in layout if c.name not in found]) == {}


def test_memory_is_bounded(world):
    import resource
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    d = dataset([Clip("long", world[2].frames[:1] * 20_000, (None,) * 20_000)])
    d[0]; before = peak()
    for e in range(30): d.set_epoch(e); d[0]
    assert peak() - before < 20


@pytest.mark.data
def test_real_clips(real_data):
    layout = find_layout(real_data / "davis2016")
    d = ClipDataset(layout, T=4, size=112, augment=ClipAugment.paper(), masks=True)
    a, b = (list(clip_loader(d, 2, workers=w, steps=3)) for w in (0, 2))
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert all(set(x["masks"].unique().tolist()) <= {0, 1} and x["frames"].shape == (2, 4, 3, 112, 112) for x in a)
    one = layout["dog"]; x, y = read_clip(one, [0, 30], 240)
    f, m, at = ClipAugment((240, 427), "squash", flip=1., jitter_p=0, grey_p=0, blur_p=0)(x, y, True, 0)
    assert torch.equal(f, resize(x, (240, 427)).flip(-1)) and torch.equal(m, y.flip(-1)) and at[5, 0].tolist() == [426., 5.]


def test_luma_weighs_as_the_eye():
    assert torch.allclose(luma(torch.eye(3)[:, :, None].permute(1, 0, 2)[..., None])[:, 0, 0, 0], torch.tensor([.299, .587, .114]))
