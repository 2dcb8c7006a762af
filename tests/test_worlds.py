"Worlds: exact masks, flow and visibility; cut-outs; the shipped clips, byte for byte."
import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data import layers as L
from timet_nb.data import photos as P
from timet_nb.data import worlds as W
from timet_nb.data.layers import Layer, Light, Motion, Scene, Shadow, Sprite
from timet_nb.data.worlds import WORLDS, Actor, World, build, random_world, render_clip

ROOT = Path(__file__).resolve().parent.parent
CLIPS = ROOT / "data" / "clips"
NAMES = [w.name for w in WORLDS]


def has_skimage():
    try: import skimage  # noqa: F401
    except ImportError: return False
    return True


photos = pytest.mark.skipif(not has_skimage(), reason="scikit-image, whose photos the worlds use, is not installed")


def manifest(folder=CLIPS): return json.loads((folder / "MANIFEST.json").read_text())


def disc(r, name="disc"):
    y, x = np.mgrid[-r - 2:r + 3, -r - 2:r + 3]
    alpha = np.clip(r + .5 - np.hypot(x, y), 0, 1).astype(np.float32)
    pattern = .5 + .4 * np.stack([np.sin(x / 3), np.cos(y / 4), np.sin((x + y) / 5)], -1)
    return Sprite(name, alpha, (alpha[..., None] * pattern).astype(np.float32), (r + 2, r + 2))


def block(h, w):
    "A hard rectangle whose anchor is its top left pixel."
    alpha = np.pad(np.ones((h, w), np.float32), 1)
    return Sprite("block", alpha, alpha[..., None].repeat(3, -1), (1, 1))


def plane(seed=0):
    v, u = np.mgrid[:90, :150] / 9.
    return Sprite("plane", None, (.5 + .3 * np.stack([np.sin(u), np.cos(v + u), np.sin(v)], -1)).astype(np.float32))


def scene(*layers, size=(60, 90), n=6, **kw):
    return Scene((Layer(plane()), *layers), size, n, light=Light(noise=0, blur=0, drift=0), **kw)


BUSY = Motion((45, 30), (2.3, -1.1), .9, .03, 25, 6, (3, 2), 8, 3, 25, 9, .3, True)


# ---- geometry -------------------------------------------------------------------------------------------------

finite = st.floats(-40, 40, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(at=st.tuples(finite, finite), v=st.tuples(finite, finite), scale=st.floats(.2, 4), growth=st.floats(-.02, .1), angle=finite,
       spin=finite, sway=st.tuples(finite, finite), rock=finite, bend=st.floats(-6, 6), wave=st.floats(8, 90), period=st.floats(2, 30),
       mirror=st.booleans(), t=st.integers(0, 20), parallax=st.floats(0, 1))
def test_there_and_back(at, v, scale, growth, angle, spin, sway, rock, bend, wave, period, mirror, t, parallax):
    "to_sprite undoes to_screen for every motion, whatever the camera does."
    layer = Layer(disc(9), Motion(at, v, scale, growth, angle, spin, sway, rock, bend, wave, period, 0., mirror), 1, "x", parallax)
    s = scene(layer, camera=Motion(velocity=(1.5, -.5), sway=(2, 1)))
    rng = np.random.default_rng(t)
    u, w = rng.uniform(-10, 30, (2, 50))
    got = L.to_sprite(s, layer, t, *L.to_screen(s, layer, t, u, w))
    assert np.abs(np.array(got) - np.array([u, w])).max() < 1e-7


@pytest.mark.parametrize("velocity", [(3, 0), (0, -2), (2.5, 1.25), (-.4, .7)])
def test_constant_translation_is_the_velocity(velocity):
    clip = L.render(scene(Layer(disc(12), Motion((40, 30), velocity), 1, "ball")), frames=False)
    on = clip.masks[:-1] == 1
    flow = clip.flow_fw.permute(0, 2, 3, 1)
    assert (flow[on] - torch.tensor(velocity)).abs().max() < 1e-5
    assert flow[~on].abs().max() == 0
    back = clip.flow_bw.permute(0, 2, 3, 1)[clip.masks[1:] == 1]
    assert (back + torch.tensor(velocity)).abs().max() < 1e-5


def test_order_is_dx_dy():
    "A layer that goes right has its motion in channel 0, one that goes down in channel 1."
    right = L.render(scene(Layer(disc(9), Motion((40, 30), (4, 0)), 1, "a")), frames=False)
    down = L.render(scene(Layer(disc(9), Motion((40, 30), (0, 4)), 1, "a")), frames=False)
    assert right.flow_fw[0, 0, 30, 40] == 4 and right.flow_fw[0, 1, 30, 40] == 0
    assert down.flow_fw[0, 0, 30, 40] == 0 and down.flow_fw[0, 1, 30, 40] == 4


def test_rotation_and_growth_have_their_closed_form():
    spin, grow = 5., .04
    s = scene(Layer(disc(20), Motion((45, 30), spin=spin, growth=grow), 1, "a"))
    clip = L.render(s, frames=False)
    y, x = np.mgrid[:60, :90].astype(float)
    for t in (0, 3):
        angle, size = math.radians(spin), (1 + grow * (t + 1)) / (1 + grow * t)
        dx, dy = x - 45, y - 30
        x2 = size * (math.cos(angle) * dx - math.sin(angle) * dy)
        y2 = size * (math.sin(angle) * dx + math.cos(angle) * dy)
        on = (clip.masks[t] == 1).numpy()
        assert np.abs(clip.flow_fw[t].numpy()[:, on] - np.stack([x2 - dx, y2 - dy])[:, on]).max() < 1e-4


def test_camera_moves_layers_by_their_parallax():
    far, near = Layer(disc(8), Motion((20, 20)), 1, "a", parallax=.25), Layer(disc(8), Motion((65, 40)), 2, "b")
    s = replace(scene(far, near), layers=(Layer(plane(), parallax=.5), far, near), camera=Motion(velocity=(4, -2)))
    clip = L.render(s, frames=False)
    for k, share in ((0, .5), (1, .25), (2, 1.)):
        flow = clip.flow_fw[0][:, clip.masks[0] == k]
        assert torch.allclose(flow.mean(1), -share * torch.tensor([4., -2.]), atol=1e-5), k


def ask_slow(s, t, x, y):
    "The rule for masks, one point at a time, from the top layer down."
    for k in range(len(s.layers) - 1, 0, -1):
        layer = s.layers[k]
        u, v = L.to_sprite(s, layer, t, x, y)
        h, w = layer.sprite.alpha.shape
        if not (0 <= u <= w - 1 and 0 <= v <= h - 1): continue
        i, j = min(int(v), h - 2), min(int(u), w - 2)
        a, b, m = v - i, u - j, layer.sprite.alpha.astype(float)
        alpha = (m[i, j] * (1 - b) + m[i, j + 1] * b) * (1 - a) + (m[i + 1, j] * (1 - b) + m[i + 1, j + 1] * b) * a
        if abs(alpha - .5) < 1e-5: return None          # too close to call in single precision
        if alpha > .5: return k
    return 0


@pytest.mark.parametrize("seed", range(4))
def test_masks_equal_the_naive_rule(seed):
    s = build(random_world(seed, n_frames=4, size=(40, 64)), photos=False)
    for t in (0, 3):
        y, x = np.mgrid[:40, :64].astype(float)
        fast = L.top_layer(s, t, x, y)
        slow = [[ask_slow(s, t, float(j), float(i)) for j in range(64)] for i in range(40)]
        for i in range(40):
            for j in range(64): assert slow[i][j] is None or slow[i][j] == fast[i, j], (t, i, j)


def test_visibility_is_occlusion_or_leaving():
    "Whole-pixel motion, hard blocks: visibility by brute force on pasted id maps."
    a, b = Layer(block(20, 16), Motion((5, 15), (7, 0)), 1, "a"), Layer(block(30, 10), Motion((40, 10), (-3, 2)), 2, "b")
    s = scene(a, b)
    for step in (1, -1):
        for t in (2, 3):
            tops = []
            for at in (t, t + step):
                top = np.zeros((60, 90), int)
                for k, l in ((1, a), (2, b)):
                    x, y = (int(c) for c in L.position(l.motion, at))
                    h, w = np.array(l.sprite.alpha.shape) - 2
                    top[max(y, 0):max(y + h, 0), max(x, 0):max(x + w, 0)] = k
                tops.append(top)
            flow, visible = L.exact_flow(s, t, t + step)
            for i in range(60):
                for j in range(90):
                    k = tops[0][i, j]
                    dx, dy = ((0, 0), (7, 0), (-3, 2))[k]
                    x2, y2 = j + step * dx, i + step * dy
                    truth = 0 <= x2 < 90 and 0 <= y2 < 60 and tops[1][y2, x2] == k
                    assert visible[i, j] == truth, (step, t, i, j)


def test_what_leaves_the_frame_is_not_visible():
    clip = L.render(scene(Layer(block(20, 20), Motion((60, 20), (8, 0)), 1, "a"), n=4), frames=False)
    assert clip.visible[0][20:40, 60:80].all()
    assert not clip.visible[1][20:40, 82:88].any(), "columns 82 to 87 end at 90 to 95, outside 90 columns"
    assert clip.visible[1][20:40, 68:82].all()


def neighbours_pure(clip, t):
    "Pixels of t whose landing place in t+1 has four neighbours of their own id."
    T, H, W = clip.masks.shape
    gy, gx = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    x, y = gx + clip.flow_fw[t, 0], gy + clip.flow_fw[t, 1]
    i, j = y.floor().long().clamp(0, H - 2), x.floor().long().clamp(0, W - 2)
    after = clip.masks[t + 1]
    pure = torch.stack([after[i + a, j + b] == clip.masks[t] for a in (0, 1) for b in (0, 1)]).all(0)
    return pure & clip.visible[t], x, y


@pytest.mark.parametrize("name", ["helmet-path", "cup-wall", "shuttle-clouds"])
def test_forward_and_backward_flow_bring_a_pixel_home(name):
    clip = render_clip(name, frames=False)
    H, W = clip.masks.shape[1:]
    for t in (0, 9, 18):
        ok, x, y = neighbours_pure(clip, t)
        at = torch.stack([x / (W - 1), y / (H - 1)], -1)[None] * 2 - 1
        back = torch.nn.functional.grid_sample(clip.flow_bw[t][None], at, padding_mode="border", align_corners=True)[0]
        assert ok.float().mean() > .9
        assert (clip.flow_fw[t] + back)[:, ok].abs().max() < 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_ids_agree_along_the_flow(name):
    "The mask of t+1 at x + flow is the mask of t at x, wherever x is visible: at exact points always, at the nearest pixel nearly."
    s = build(W.shipped_world(name), photos=False)
    ids = np.array([l.id for l in s.layers])
    y, x = np.mgrid[:s.size[0], :s.size[1]].astype(float)
    for t in (0, 11):
        flow, visible = L.exact_flow(s, t, t + 1)
        mask = ids[L.top_layer(s, t, x, y)]
        there = ids[L.top_layer(s, t + 1, x + flow[0], y + flow[1])]
        assert (there == mask)[visible].all()
        i, j = np.round(y + flow[1]).astype(int).clip(0, s.size[0] - 1), np.round(x + flow[0]).astype(int).clip(0, s.size[1] - 1)
        nearest = ids[L.top_layer(s, t + 1, x, y)][i, j]
        assert (nearest == mask)[visible].mean() > .98


def test_colours_agree_along_the_flow():
    "A test that shares nothing with the renderer: pixels of t+1 read at x + flow look like those of t, only with the right flow."
    s = scene(Layer(disc(18), BUSY, 1, "a"), camera=Motion(velocity=(1.2, .4)))
    clip = L.render(s)
    H, W = s.size
    for t in (0, 3):
        ok, x, y = neighbours_pure(clip, t)
        def gap(x, y):
            at = torch.stack([x / (W - 1), y / (H - 1)], -1)[None] * 2 - 1
            got = torch.nn.functional.grid_sample(clip.frames[t + 1][None], at, padding_mode="border", align_corners=True)[0]
            return (got - clip.frames[t]).abs().mean(0)[ok].mean()
        gy, gx = torch.meshgrid(torch.arange(H).float(), torch.arange(W).float(), indexing="ij")
        right, none, swapped = gap(x, y), gap(gx, gy), gap(gx + clip.flow_fw[t, 1], gy + clip.flow_fw[t, 0])
        assert right < .012 and none > 3 * right and swapped > 3 * right


def test_shadow_and_light_change_colours_only():
    base = scene(Layer(disc(12), Motion((40, 30), (3, 1)), 1, "a"))
    dark = replace(base, layers=(base.layers[0], replace(base.layers[1], shadow=Shadow())), light=Light((.5, 1, 1)))
    a, b = L.render(base), L.render(dark)
    assert torch.equal(a.masks, b.masks) and torch.equal(a.flow_fw, b.flow_fw) and torch.equal(a.visible, b.visible)
    assert not torch.equal(a.frames, b.frames)


def test_shapes_types_and_ranges():
    clip = render_clip(random_world(3, n_frames=3, size=(48, 80)), frames=has_skimage())
    if clip.frames is not None:
        assert clip.frames.shape == (3, 3, 48, 80) and clip.frames.dtype == torch.float32
        assert 0 <= clip.frames.min() and clip.frames.max() <= 1
    assert clip.masks.shape == (3, 48, 80) and clip.masks.dtype == torch.int64
    for f, v in ((clip.flow_fw, clip.visible), (clip.flow_bw, clip.visible_bw)):
        assert f.shape == (2, 2, 48, 80) and f.dtype == torch.float32 and torch.isfinite(f).all()
        assert v.shape == (2, 48, 80) and v.dtype == torch.bool


def test_one_frame_has_empty_flow():
    clip = L.render(scene(Layer(disc(9), Motion((40, 30)), 1, "a"), n=1))
    assert clip.masks.shape[0] == 1 and clip.flow_fw.shape == (0, 2, 60, 90) and clip.visible.shape == (0, 60, 90)


# ---- cut-outs -------------------------------------------------------------------------------------------------

def shoelace(p):
    q = np.roll(p, -1, axis=0)
    return abs((p[:, 0] * q[:, 1] - q[:, 0] * p[:, 1]).sum()) / 2


@settings(max_examples=40, deadline=None)
@given(radii=st.lists(st.floats(4, 18), min_size=4, max_size=24), turn=st.floats(0, 6.28))
def test_rasterize_has_the_right_area_either_way_round(radii, turn):
    angle = turn + 2 * np.pi * np.arange(len(radii)) / len(radii)
    p = 20 + np.array(radii)[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    alpha = P.rasterize(p, (0, 0), (40, 40))
    rim = np.linalg.norm(p - np.roll(p, -1, axis=0), axis=1).sum()
    assert abs(alpha.sum() - shoelace(p)) < .13 * rim, "a sample is a quarter of a pixel: an eighth along the rim is the worst"
    assert 0 <= alpha.min() and alpha.max() <= 1
    assert (alpha != P.rasterize(p[::-1].copy(), (0, 0), (40, 40))).mean() < .01


@pytest.mark.parametrize("name", list(P.CUTOUTS))
def test_outlines_are_clean(name):
    "Corner cutting keeps an outline inside its points, and the sprite has an empty rim at every size and blur."
    raw, p = P.polygon(P.OUTLINES[name], rounds=0), P.polygon(P.OUTLINES[name])
    assert (p.min(0) >= raw.min(0) - 1e-9).all() and (p.max(0) <= raw.max(0) + 1e-9).all()
    for height in (40, 60, 150):
        for soft in (0, 1) if height < 150 else (0, 2):
            s = P.cutout(name, height, photos=False, soft=soft)
            rim = np.concatenate([s.alpha[0], s.alpha[-1], s.alpha[:, 0], s.alpha[:, -1]])
            assert rim.max() == 0 and s.alpha.max() > .75
            rows = np.nonzero(s.alpha.max(1) >= .5)[0]
            assert abs((np.ptp(rows) + 1) * s.scale - height) < .12 * height + 1


@photos
def test_outlines_lie_on_their_photos():
    for name, (source, _, _) in P.CUTOUTS.items():
        if source not in P.PHOTOS: continue
        h, w = P.photo(source).shape[:2]
        p = P.polygon(P.OUTLINES[name])
        assert p.min() >= 0 and p[:, 0].max() <= w and p[:, 1].max() <= h, name


@photos
def test_horse_outline_fits_its_silhouette():
    "The only photo with a mask of its own: our hand-set outline agrees with it."
    truth = P.photo("horse").max(-1) < 128
    ours = P.rasterize(P.polygon(P.OUTLINES["horse"]), (0, 0), truth.shape) >= .5
    assert (truth & ours).sum() / (truth | ours).sum() > .94


@photos
def test_geometry_does_not_look_at_photos():
    w = replace(W.shipped_world("cat-lawn"), n_frames=2)
    a, b = render_clip(w), render_clip(w, frames=False)
    assert b.frames is None and torch.equal(a.masks, b.masks) and torch.equal(a.flow_fw, b.flow_fw)


def test_geometry_needs_no_scikit_image():
    "Masks and flow in a process in which scikit-image cannot be imported; frames say how to install it."
    code = ("import sys; sys.modules['skimage'] = None\n"
            "from timet_nb.data.worlds import render_clip, shipped_world\n"
            "from dataclasses import replace\n"
            "w = replace(shipped_world('cup-wall'), n_frames=2)\n"
            "print(sorted(render_clip(w, frames=False).masks.unique().tolist()))\n"
            "try: render_clip(w)\n"
            "except ValueError as e: print(type(e).__name__, 'timet_nb[worlds]' in str(e))\n")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert out.returncode == 0, out.stderr[-500:]
    assert out.stdout.split("\n")[:2] == ["[0, 1, 2]", "ConfigError True"]


def test_every_photo_is_free():
    for name, (file, source, terms) in P.PHOTOS.items():
        assert "CC0" in terms or "public domain" in terms, name
        text = (ROOT / "data" / "README.md").read_text()
        assert f"`{file}`" in text, f"{file} is not in data/README.md"


# ---- recipes --------------------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_worlds_repeat_and_hold_together(seed):
    a, b = random_world(seed, n_frames=3, size=(36, 56)), random_world(seed, n_frames=3, size=(36, 56))
    assert a == b
    clip = render_clip(a, frames=False)
    present = set(clip.masks.unique().tolist()) - {0}
    assert present <= set(clip.classes) and sorted(clip.classes) == list(range(1, len(clip.classes) + 1))
    assert all(clip.classes.values()) and torch.isfinite(clip.flow_fw).all()
    ok = (clip.masks[:-1] > 0).any() or (clip.masks > 0).any()
    assert ok, "a random world shows at least one object"


@photos
def test_frames_depend_on_recipe_and_seed_only():
    "Neither global generators, nor threads, nor the other frames matter."
    w = replace(random_world(5, size=(40, 64)), n_frames=4)
    np.random.seed(1); torch.manual_seed(1)
    a = render_clip(w, flow=False).frames
    np.random.seed(2); torch.manual_seed(2); np.random.rand(5)
    b = render_clip(w, flow=False).frames
    s = build(w)
    alone = L.expose(L.paint(s, 3), s.light, 3, s.seed)
    assert torch.equal(a, b)
    assert np.array_equal((a[3].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8), alone)
    assert not torch.equal(a, render_clip(replace(w, seed=w.seed + 1), flow=False).frames)


def test_classes_have_two_clips_and_one_split():
    where = {}
    for w in WORLDS:
        for label in set(build(w, photos=False).classes.values()): where.setdefault(label, []).append(w.split)
    assert len(where) >= 6 and all(len(s) >= 2 for s in where.values()), where
    assert all(len(set(s)) == 1 for s in where.values()), where
    assert {w.split for w in WORLDS} == {"train", "val"} and len(set(NAMES)) == len(NAMES)


# ---- the shipped folder ---------------------------------------------------------------------------------------

def test_shipped_files_are_those_of_the_manifest():
    told = manifest()["files"]
    there = {p.relative_to(CLIPS).as_posix() for p in CLIPS.rglob("*") if p.is_file()} - {"MANIFEST.json"}
    assert there == set(told)
    for name, digest in told.items(): assert hashlib.sha256((CLIPS / name).read_bytes()).hexdigest() == digest, name
    assert sum(p.stat().st_size for p in CLIPS.rglob("*") if p.is_file()) < 3e6


@pytest.mark.parametrize("name", NAMES)
def test_shipped_masks_are_exact(name):
    "What is on disk equals what the geometry says, id by id; palette images with the colours of DAVIS."
    truth = render_clip(name, frames=False, flow=False)
    for t in range(len(truth.masks)):
        image = Image.open(CLIPS / "Annotations" / "480p" / name / f"{t:05d}.png")
        assert image.mode == "P" and image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        assert np.array_equal(np.asarray(image), truth.masks[t].numpy()), t
    about = json.loads((CLIPS / "clips.json").read_text())[name]
    assert {int(k): c for k, c in about["classes"].items()} == truth.classes
    assert set(truth.masks.unique().tolist()) == {0, *truth.classes}, "every object is seen, and the background too"


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    "A fresh copy, made by the command that ships."
    if not has_skimage(): pytest.skip("scikit-image, whose photos the worlds use, is not installed")
    out = tmp_path_factory.mktemp("worlds") / "clips"
    assert W.main([str(out)]) == 0
    return out


def test_regenerated_byte_for_byte(regenerated):
    pinned, here = manifest()["made_with"], W.made_with()
    if pinned != here:
        other = ", ".join(f"{k} {here[k]}, not {pinned[k]}" for k in pinned if here.get(k) != pinned[k])
        pytest.skip(f"the stored bytes were made with other versions: {other}")
    names = {p.relative_to(CLIPS) for p in CLIPS.rglob("*") if p.is_file()}
    assert names == {p.relative_to(regenerated) for p in regenerated.rglob("*") if p.is_file()}
    different = [str(p) for p in sorted(names) if (CLIPS / p).read_bytes() != (regenerated / p).read_bytes()]
    assert not different, f"{len(different)} files differ, such as {different[:3]}"


def test_regenerated_pixels(regenerated):
    "With other encoders the pixels before encoding are still the same."
    if manifest()["made_with"]["scikit-image"] != W.made_with()["scikit-image"]: pytest.skip("other photos: another scikit-image")
    assert manifest(regenerated)["pixels"] == manifest()["pixels"]


def test_stored_frames_are_near_the_rendered_ones():
    clip = Image.open(CLIPS / "JPEGImages" / "480p" / "cup-table" / "00007.jpg")
    assert clip.size == (320, 192)
    if not has_skimage(): pytest.skip("scikit-image, whose photos the worlds use, is not installed")
    s = build(W.shipped_world("cup-table"))
    truth = L.expose(L.paint(s, 7), s.light, 7, s.seed).astype(float)
    assert np.abs(np.asarray(clip) - truth).mean() < 4


def test_layout_reads_the_shipped_clips():
    from timet_nb.data.layout import find_layout
    layout = find_layout(W.shipped_clips())
    assert sorted(c.name for c in layout) == sorted(NAMES) and layout["cup-wall"].classes == {1: "cup", 2: "cup"}
    for split in ("train", "val"):
        assert {c.name for c in find_layout(CLIPS, split=split)} == {w.name for w in WORLDS if w.split == split}


TINY = World("tiny", "path", (Actor("cat", 20, Motion((20, 16), (2, 0))),), n_frames=2, size=(32, 48))


@photos
def test_shipped_clips_are_rendered_into_the_cache_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(W, "__file__", str(tmp_path / "site" / "timet_nb" / "data" / "worlds.py"))
    monkeypatch.setattr(W, "WORLDS", (TINY,))
    assert W.shipped_clips.__module__ == "timet_nb.data.worlds"
    first = W.shipped_clips()
    assert first.is_relative_to(tmp_path) and (first / "Annotations/480p/tiny/00001.png").is_file()
    stamp = (first / "MANIFEST.json").stat().st_mtime_ns
    assert W.shipped_clips() == first and (first / "MANIFEST.json").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in first.parent.iterdir()) == [first.name], "no half-made folder is left"


@photos
def test_write_world_leaves_other_files_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    W.write_world(tmp_path, [TINY])
    assert (tmp_path / "mine.txt").read_text() == "mine" and "mine.txt" not in manifest(tmp_path)["files"]


# ---- faults ---------------------------------------------------------------------------------------------------

def test_scenes_that_cannot_keep_their_promises_are_refused():
    ball = Layer(disc(5), Motion((20, 20)), 1, "ball")
    for bad, word in ((lambda: Scene((ball,)), "endless plane"), (lambda: Scene(()), "endless plane"),
                      (lambda: scene(replace(ball, id=255)), "ignore"), (lambda: scene(replace(ball, id=-1)), "ignore"),
                      (lambda: scene(replace(ball, label="")), "label"), (lambda: scene(replace(ball, id=0)), "label"),
                      (lambda: scene(ball, replace(ball, label="cat")), "'ball'"), (lambda: scene(ball, n=0), "frame"),
                      (lambda: scene(ball, size=(0, 5)), "pixel")):
        with pytest.raises(DataError, match=word): bad()


def test_two_layers_may_be_one_object():
    left, right = (Layer(disc(6), Motion((x, 30)), 1, "twin") for x in (30, 50))
    assert L.render(scene(left, right), frames=False).classes == {1: "twin"}


def test_unknown_names_are_answered_with_the_known_ones():
    for bad, word in ((lambda: P.cutout("dog", 50), "cat"), (lambda: P.backdrop("sea"), "lawn"), (lambda: P.photo("moon"), "chelsea"),
                      (lambda: render_clip("cats"), "cat-lawn"), (lambda: random_world(0, classes=["dog"]), "cat"),
                      (lambda: random_world(0, classes=["cat", "dog"]), "helmet"), (lambda: random_world(0, classes=[]), "cat")):
        with pytest.raises(DataError, match=word): bad()
    assert set(random_world(1, classes=["cup"]).actors[0].cutout for _ in range(1)) == {"cup"}


def test_a_cutout_too_small_to_be_seen_is_refused():
    for height, soft in ((0, 0), (-3, 0), (12, 3)):
        with pytest.raises(DataError, match="falcon"): P.cutout("falcon", height, photos=False, soft=soft)


def test_painting_without_colours_says_so():
    with pytest.raises(DataError, match="no colours"): L.render(build(TINY, photos=False))


@photos
def test_a_photo_missing_from_scikit_image_is_named(tmp_path, monkeypatch):
    import types
    fake = types.ModuleType("skimage"); fake.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, "skimage", fake)
    P.photo.cache_clear()
    try:
        with pytest.raises(DataError, match="chelsea.png"): P.photo("chelsea")
    finally: P.photo.cache_clear()


def test_missing_scikit_image_gives_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    P.photo.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"timet_nb\[worlds\]"): P.photo("chelsea")
    finally: P.photo.cache_clear()


def test_write_world_refuses_before_it_writes(tmp_path):
    file = tmp_path / "file"; file.write_text("x")
    for out, worlds, quality, word in ((file, [TINY], 85, "a file"), (tmp_path / "o", [TINY, TINY], 85, "differ"),
                                       (tmp_path / "o", [TINY], 0, "1 to 95"), (tmp_path / "o", [replace(TINY, name="../up")], 85, "folder name"),
                                       (tmp_path / "o", [replace(TINY, name="")], 85, "folder name")):
        with pytest.raises(DataError, match=word): W.write_world(out, worlds, quality)
    assert not (tmp_path / "o").exists() and file.read_text() == "x"


def test_the_command_reports_a_fault_and_returns_1(tmp_path, capsys):
    file = tmp_path / "file"; file.write_text("x")
    assert W.main([str(file)]) == 1
    said = capsys.readouterr().err
    assert str(file) in said and "Traceback" not in said


def test_import_is_light():
    "The modules leave matplotlib, cv2, scikit-image and timm alone."
    code = ("import sys; import timet_nb.data.worlds\n"
            "print([m for m in ('matplotlib', 'cv2', 'skimage', 'timm', 'IPython') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, env={**os.environ})
    assert out.stdout.strip() == "[]", out.stdout + out.stderr[-300:]
