"The two generated medical-looking worlds: physics of speckle, exact masks, determinism, faults. Nothing clinical is claimed or tested."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data import endoscopy as E, speckle as S, tissue as A, ultrasound as U
from timet_nb.data.frames import read_image, read_mask
from timet_nb.data.layout import find_layout


def rng(*seed): return np.random.default_rng(seed or 0)


def flat(scanner=S.Scanner(loss=0., gain_loss=0., noise=-200.), rate=1., level=0., size=128, speckle=1., seed=0):
    "Envelope of homogeneous tissue."
    shape = 3 * size // 2, size
    full = lambda v: np.full(shape, v, np.float32)
    db = S.echoes(full(level), full(rate), S.scatterers(rng(seed, 1), shape), S.scatterers(rng(seed, 2), shape), scanner, speckle)
    return 10 ** (db / 20)


# ---- speckle

def test_envelope_of_homogeneous_tissue_is_rayleigh():
    e = np.concatenate([flat(seed=i)[8:-8, 8:-8].ravel() for i in range(8)])
    assert e.mean() / e.std() == pytest.approx(math.sqrt(math.pi / (4 - math.pi)), abs=.04)   # 1.913
    assert np.square(e).mean() == pytest.approx(1, abs=.05)
    q = np.quantile(e, (.1, .5, .9))
    assert q == pytest.approx(np.sqrt(-np.log([.9, .5, .1])), abs=.03)
    assert np.mean((e - e.mean()) ** 3) / e.std() ** 3 == pytest.approx(.631, abs=.05)       # Rayleigh's skewness


def test_speckle_option_goes_from_calm_to_full_at_the_same_power():
    spread = []
    for s in (0., .5, 1.):
        e = flat(speckle=s)[20:-20, 20:-20]
        spread.append(e.std() / e.mean()); assert np.square(e).mean() == pytest.approx(1, abs=.15)
    assert spread[0] < 1e-3 < spread[1] < spread[2]


@pytest.mark.parametrize("memory", (0., .5, .9, 1.))
def test_scatterers_forget_at_the_rate_that_is_set(memory):
    a = first = S.scatterers(rng(3), (200, 150)); r = rng(4)
    for k in range(1, 4):
        a = S.renew(a, r, memory)
        assert (first * a).sum() / (first ** 2).sum() == pytest.approx(memory ** k, abs=.02)
        assert np.square(a).sum(0).mean() == pytest.approx(1, abs=.03)


def test_spread_equals_a_loop_and_keeps_the_power_of_noise():
    x = S.scatterers(rng(5), (24, 20)); y = S.spread(x, .9, 1.2)
    bell = lambda s: (lambda k: k / np.sqrt((k ** 2).sum()))(np.exp(-.5 * (np.arange(-math.ceil(3 * s), math.ceil(3 * s) + 1) / s) ** 2))
    a, b = bell(.9), bell(1.2)
    pad = np.pad(x, ((0, 0), (len(a) // 2,) * 2, (len(b) // 2,) * 2), mode="edge")
    slow = sum(a[i] * b[j] * pad[:, i:i + 24, j:j + 20] for i in range(len(a)) for j in range(len(b)))
    assert np.abs(y - slow).max() < 1e-5
    big = S.scatterers(rng(6), (300, 300))
    assert np.square(S.spread(big, 1.5, 2.))[:, 10:-10, 10:-10].sum(0).mean() == pytest.approx(1, abs=.03)


def test_attenuation_falls_with_depth_and_the_time_gain_gives_it_back():
    deep = lambda **k: (lambda d: d[-30:].mean() - d[:30].mean())(20 * np.log10(flat(S.Scanner(noise=-200., **k))))
    assert deep(loss=30., gain_loss=0.) == pytest.approx(-30 * (162 / 192), abs=1.)
    assert deep(loss=30., gain_loss=30.) == pytest.approx(0, abs=1.)
    assert deep(loss=30., gain_loss=40.) > 5


def test_shadow_behind_what_takes_and_light_behind_what_does_not():
    rate = np.ones((192, 128), np.float32); rate[60:90, 50:78] = 2.5; rate[60:90, 10:38] = 0
    lost = S.loss_along(rate, 30.)
    assert (np.diff(lost, axis=0) >= 0).all()
    plain, dark, light = (lost[150, c] for c in (45, 64, 24))
    assert dark - plain == pytest.approx(1.5 * 30 * 30 / 192, abs=1e-3) and light - plain == pytest.approx(-30 * 30 / 192, abs=1e-3)
    assert lost[50, 64] == lost[50, 45]                            # nothing above


@pytest.mark.parametrize("probe", [S.Probe(), S.Probe(.6, .3, 1.8, -1.), S.Probe(.65, .02, 1.9, -.95)])
def test_beams_there_and_back(probe):
    beam, depth = np.meshgrid(np.linspace(-1, 1, 7), np.linspace(.05, 1, 9))
    back = probe.to_beam(*probe.to_picture(beam, depth))
    assert np.allclose(back[0], beam) and np.allclose(back[1], depth)


def test_scan_conversion_reads_the_right_sample():
    probe, size = S.Probe(.6, .3, 1.8, -1.), 96
    beam, depth = np.broadcast_arrays(*S.beam_grid(size))
    inside = S.sector(probe, size).numpy()
    for source, want in zip((beam, depth), probe.to_beam(*S.picture_grid(size))):
        got = S.scan_convert(source, probe, size).numpy()
        edge = inside & (np.abs(want) < .98) & (want > .02 if source is depth else True)
        assert np.abs(got - want)[edge].max() < 1e-4 and (got[~inside] == 0).all()


def test_display_is_monotone_and_cut():
    g = S.display(np.linspace(-100, 60, 50, dtype=np.float32))
    assert (np.diff(g) >= 0).all() and g[0] == 0 and g[-1] == 1 and g.dtype == np.float32


@pytest.mark.parametrize("bad", [dict(half=-1.), dict(near=2.), dict(near=-.1), dict(half=2.)])
def test_bad_probe(bad):
    with pytest.raises(ConfigError, match="Probe"): S.Probe(**bad)


# ---- tissue

@pytest.mark.parametrize("organ", A.ORGANS)
def test_tissue_is_the_same_wherever_it_is_asked(organ):
    "The map is a function of the place: a part of the grid gives a part of the map."
    x, y = S.picture_grid(64)
    a = A.tissue_of(organ, rng(7), x, y, .5); b = A.tissue_of(organ, rng(7), x[10:30, 5:50], y[10:30, 5:50], .5)
    for f in ("level", "rate", "inside"): assert np.allclose(getattr(a, f)[10:30, 5:50], getattr(b, f), atol=1e-4), f
    assert (a.rate > -1e-5).all() and np.isfinite(a.level).all() and (a.inside < 1).any()


def test_each_organ_has_its_own_object():
    x, y = S.picture_grid(96); gap, rate = {}, {}
    for organ in A.ORGANS:
        maps = [A.tissue_of(organ, rng(8, i), x, y) for i in range(12)]
        core, ring = (lambda m: m.inside < .75), (lambda m: (m.inside > 1.15) & (m.inside < 1.4))
        gap[organ] = np.mean([m.level[core(m)].mean() - m.level[ring(m)].mean() for m in maps])
        rate[organ] = np.mean([m.rate[core(m)].mean() for m in maps])
    assert gap["breast"] < -10 and gap["ovary"] < -20 and gap["heart"] < -18 and gap["thyroid"] > 2
    assert rate["breast"] > 2 and rate["ovary"] < .2 and abs(rate["thyroid"] - 1) < .2
    with pytest.raises(ConfigError, match="breast, thyroid, ovary, heart"): A.tissue_of("liver", rng(), x, y)


def test_outline_of_a_plain_ellipse():
    f = A.outline(np.array([.5, .1, .3]), np.array([0., .2, .1]), (.1, 0.), (.4, .2))
    assert np.allclose(f, [1., 1., math.hypot(.5, .5)])
    c = A.draw_chamber(rng(9)); u, v = np.array([0., 1., .3]), np.array([0., -1., .5])
    assert np.allclose(c.to_axes(*c.from_axes(u, v)), (u, v))


# ---- ultrasound

@pytest.mark.parametrize("organ", U.ORGANS)
def test_clip_has_its_shapes_and_is_the_same_again(organ):
    w = U.UltrasoundWorld(organ, 64, 3, seed=3, shift=.4)
    a, b = U.render_ultrasound(w, 2), U.render_ultrasound(w, 2)
    assert a.frames.shape == (3, 3, 64, 64) and a.frames.dtype == torch.float32 and 0 <= a.frames.min() <= a.frames.max() <= 1
    assert a.masks.shape == (3, 64, 64) and a.masks.dtype == torch.int64 and a.masks.unique().tolist() == [0, 1]
    assert a.sector.shape == (64, 64) and a.sector.dtype == torch.bool and not (a.masks[:, ~a.sector]).any()
    assert (a.frames[:, 0] == a.frames[:, 1]).all() and (a.frames[:, 0] == a.frames[:, 2]).all() and (a.frames[:, :, ~a.sector] == 0).all()
    assert torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks)
    longer = U.render_ultrasound(replace(w, frames=5), 2)
    assert torch.equal(longer.frames[:3], a.frames)                       # a longer clip begins with the shorter one
    for other in (U.render_ultrasound(w, 3), U.render_ultrasound(replace(w, seed=4), 2)): assert not torch.equal(other.frames, a.frames)


def test_the_global_generators_are_not_touched():
    torch.manual_seed(0); np.random.seed(0); t, n = torch.get_rng_state(), np.random.get_state()[1].copy()
    U.render_ultrasound(U.UltrasoundWorld("heart", 48, 2)); E.render_endoscopy(E.EndoscopyWorld(size=48))
    assert torch.equal(t, torch.get_rng_state()) and (n == np.random.get_state()[1]).all()


def test_the_cavity_is_dark_right_up_to_its_mask():
    "Without speckle the mask's inside is darker than the wall around it, in every frame of the beat."
    import torch.nn.functional as F
    w = U.UltrasoundWorld("heart", 128, 8, speckle=0., dropouts=0.)
    for i in range(3):
        c = U.render_ultrasound(w, i)
        for frame, mask in zip(c.frames[:, 0], c.masks.float()):
            grow = lambda m, n: F.max_pool2d(m[None, None], 2 * n + 1, 1, n)[0, 0] > 0
            core, ring = ~grow(1 - mask, 3), grow(mask, 5) & ~grow(mask, 2) & c.sector
            assert frame[core].mean() + .15 < frame[ring].mean()
            assert frame[core].quantile(.9) < frame[ring].median()


def test_mask_is_the_outline_function_at_the_pixel_centres():
    w = U.UltrasoundWorld("heart", 96, 4, seed=2); c = U.render_ultrasound(w, 1)
    x, y = S.picture_grid(96)
    for t in range(4):
        at = U.at_rest(w, 1, t, x, y)
        inside = A.tissue_of("heart", np.random.default_rng([2, 3, 1, 0]), *at).inside < 1
        assert torch.equal(c.masks[t].bool(), torch.from_numpy(inside) & c.sector)


def test_the_heart_beats_with_its_period():
    w = U.UltrasoundWorld("heart", 96, 17, period=16.); area = U.render_ultrasound(w, 0).masks.sum((1, 2))
    assert area[0] == area[16] and area.max() > 1.25 * area.min()
    tight = [U.squeeze(w, 0, t) for t in range(17)]
    assert np.corrcoef(tight, area.numpy())[0, 1] < -.98
    still = U.render_ultrasound(replace(w, motion=0.), 0)
    assert (still.masks == still.masks[:1]).all()


def test_movement_does_not_fold():
    "The map back to rest keeps its orientation everywhere, also where it moves most."
    for organ in U.ORGANS:
        for i in range(6):
            w = U.UltrasoundWorld(organ, 96, shift=1., motion=1.); x, y = (a.astype(np.float64) for a in S.picture_grid(96))
            for t in range(0, 16, 3):
                u, v = U.at_rest(w, i, t, x, y); d = np.gradient
                assert (d(u, axis=1) * d(v, axis=0) - d(u, axis=0) * d(v, axis=1)).min() > 0, (organ, i, t)


@pytest.mark.parametrize("memory", (.5, .9))
def test_speckle_in_frames_forgets_as_set(memory):
    "At rest only the scatterers change: the correlation of intensities is memory ** (2 k), falling with every frame."
    w = U.UltrasoundWorld("thyroid", 96, 4, memory=memory, motion=0., dropouts=0.)
    c = U.render_ultrasound(w, 0); calm = U.render_ultrasound(replace(w, speckle=0., frames=1), 0).frames[0, 0]
    level = (c.frames[:, 0] - calm)[:, 20:60, 15:70]; level = level.flatten(1) - level.flatten(1).mean(1, keepdim=True)
    r = [float((level[0] * level[k]).sum() / (level[0].norm() * level[k].norm())) for k in range(4)]
    assert r[0] == pytest.approx(1) and r[0] > r[1] > r[2] > r[3] > -.1
    assert r[1] == pytest.approx(memory ** 2, abs=.12)
    kept = U.render_ultrasound(replace(w, memory=1., frames=2), 0).frames[:, 0]
    assert (kept[0] - kept[1]).abs().mean() < .02                        # only the electronics differ


def test_speckle_moves_with_the_tissue():
    "Pulled back to rest, two frames of a kept pattern agree better than where they are."
    import torch.nn.functional as F
    w = U.UltrasoundWorld("breast", 128, 9, memory=1., dropouts=0., motion=2.); c = U.render_ultrasound(w, 1)
    a, b = (int(np.argmin(s)), int(np.argmax(s))) if (s := [U.squeeze(w, 1, t) for t in range(9)]) else None
    x, y = S.picture_grid(128); corr = lambda p, q: float(torch.corrcoef(torch.stack([p.flatten(), q.flatten()]))[0, 1])
    at = U.at_rest(w, 1, b, x, y)[0] - U.at_rest(w, 1, a, x, y)[0], U.at_rest(w, 1, b, x, y)[1] - U.at_rest(w, 1, a, x, y)[1]
    grid = torch.from_numpy(np.stack([x + at[0], y + at[1]], -1).astype(np.float32))[None]
    pulled = F.grid_sample(c.frames[a, :1][None], grid, align_corners=False)[0, 0]
    box = (slice(30, 100), slice(20, 108))
    assert corr(pulled[box], c.frames[b, 0][box]) > corr(c.frames[a, 0][box], c.frames[b, 0][box]) + .1


def test_dropouts_darken_some_frames_but_never_the_first():
    w = U.UltrasoundWorld("heart", 64, 6, dropouts=1.); c, d = U.render_ultrasound(w, 0), U.render_ultrasound(replace(w, dropouts=0.), 0)
    less = (d.frames - c.frames).mean((1, 2, 3))
    assert torch.equal(c.frames[0], d.frames[0]) and (less[1:] > .005).all() and torch.equal(c.masks, d.masks)


def test_shift_moves_the_look_continuously():
    for organ in U.ORGANS:
        look = [U.render_ultrasound(U.UltrasoundWorld(organ, 64, shift=s), 0) for s in (0., .02, .5, 1.)]
        away = [float((c.frames - look[0].frames).abs().mean()) for c in look]
        assert 0 < away[1] < .05 and away[1] < away[2] < away[3] and away[3] > .05, (organ, away)


def test_shift_makes_the_object_harder_to_see():
    gap = lambda o, s: np.mean([(lambda c: abs(float(c.frames[0, 0][c.masks[0] > 0].mean() - c.frames[0, 0][c.sector & (c.masks[0] == 0)].mean())))(
        U.render_ultrasound(U.UltrasoundWorld(o, 64, shift=s), i)) for i in range(10)])
    for organ in ("thyroid", "ovary", "heart"): assert gap(organ, 1.) < gap(organ, 0.), organ


def test_image_sets():
    s = U.UltrasoundImages(U.UltrasoundWorld("ovary", 48, frames=5), 3, start=10)
    assert len(s) == 3 and s.group == "ovary" and len(list(s)) == 3
    image, mask = s[2]
    assert image.shape == (3, 48, 48) and mask.shape == (48, 48) and mask.dtype == torch.int64
    assert torch.equal(image, U.render_ultrasound(U.UltrasoundWorld("ovary", 48), 12).frames[0])
    with pytest.raises(IndexError): s[3]
    for bad in (dict(n=0), dict(n=2, start=-1)):
        with pytest.raises(ConfigError, match="UltrasoundImages"): U.UltrasoundImages(U.UltrasoundWorld(), **bad)


def test_every_object_is_large_enough_to_be_found():
    for organ in U.ORGANS:
        share = [float(U.UltrasoundImages(U.UltrasoundWorld(organ, 48), 30)[i][1].float().mean()) for i in range(30)]
        assert min(share) > .012 and max(share) < .35, (organ, min(share), max(share))


@pytest.mark.parametrize("bad, word", [(dict(organ="liver"), "breast, thyroid, ovary, heart"), (dict(size=8), "from 32"), (dict(size=64.), "from 32"),
                                       (dict(frames=0), "frames"), (dict(seed=-1), "seed"), (dict(shift=1.5), "shift"), (dict(shift=float("nan")), "shift"),
                                       (dict(memory=-.1), "memory"), (dict(dropouts=2), "dropouts"), (dict(speckle=2), "speckle"), (dict(period=1), "period"),
                                       (dict(motion=-1), "motion")])
def test_bad_ultrasound_world(bad, word):
    with pytest.raises(ConfigError, match=word): U.UltrasoundWorld(**bad)


@pytest.mark.parametrize("index", (-1, 1.5, "a"))
def test_bad_index(index):
    with pytest.raises(DataError, match="index"): U.render_ultrasound(U.UltrasoundWorld(size=32), index)
    with pytest.raises(DataError, match="index"): E.render_endoscopy(E.EndoscopyWorld(size=32), index)


def test_written_stills_and_films_are_read_back(tmp_path):
    for module, world, write, render in ((U, U.UltrasoundWorld("breast", 48), U.write_ultrasound, U.render_ultrasound),
                                         (E, E.EndoscopyWorld("laryngeal", 48), E.write_endoscopy, E.render_endoscopy)):
        name = getattr(world, "organ", None) or world.kind
        root = write(tmp_path / f"{name}-stills", world, 2, start=5)
        assert len(list(root.rglob("*.png"))) == 4
        clip = render(world, 5); image = read_image(root / name / f"{name} (1).png"); mask = read_mask(root / name / f"{name} (1)_mask.png", kind="binary")
        assert torch.equal((image * 255).round(), (clip.frames[0] * 255).round()) and torch.equal(mask.clamp(max=1), clip.masks[0])
        layout = find_layout(write(tmp_path / f"{name}-films", replace(world, frames=3), 2))
        assert len(layout) == 2 and layout.n_frames() == 6
        assert torch.equal(read_mask(layout[0].masks[2]), render(replace(world, frames=3), 0).masks[2])
        with pytest.raises(DataError, match="new or empty"): write(root, world, 1)
        with pytest.raises(ConfigError, match="1 or more"): write(tmp_path / "none", world, 0)


def test_masks_do_not_depend_on_what_only_changes_the_look():
    w = U.UltrasoundWorld("heart", 64, 4); want = U.render_ultrasound(w, 2).masks
    for changed in (dict(speckle=0.), dict(memory=.3), dict(dropouts=1.)): assert torch.equal(U.render_ultrasound(replace(w, **changed), 2).masks, want)


KNOWN = {"breast": (.2924, .2000, [219, 215]), "thyroid": (.3648, .2094, [343, 342]), "ovary": (.1959, .2285, [326, 332]), "heart": (.1445, .2056, [439, 439]),
         "laryngeal": (0.3318, 0.2743, [77, 76]), "colon": (0.2405, 0.2194, [203, 199])}


@pytest.mark.parametrize("name", U.ORGANS + E.KINDS)
def test_clip_3_is_clip_3_on_every_machine(name):
    "Means, spreads and areas of one clip, written down once: a change of the world must not pass unseen."
    if name in U.ORGANS: c = U.render_ultrasound(U.UltrasoundWorld(name, 64, 2, seed=5, shift=.5), 3)
    else: c = E.render_endoscopy(E.EndoscopyWorld(name, 64, 2, seed=5, shift=.5), 3)
    mean, std, areas = KNOWN[name]
    assert float(c.frames.mean()) == pytest.approx(mean, abs=2e-3) and float(c.frames.std()) == pytest.approx(std, abs=2e-3)
    assert c.masks.sum((1, 2)).tolist() == pytest.approx(areas, abs=2)


# ---- endoscopy

@pytest.mark.parametrize("kind", E.KINDS)
def test_endoscopy_clip_has_its_shapes_and_is_the_same_again(kind):
    w = E.EndoscopyWorld(kind, 64, 3, seed=1, shift=.4); a, b = E.render_endoscopy(w, 2), E.render_endoscopy(w, 2)
    assert a.frames.shape == (3, 3, 64, 64) and a.frames.dtype == torch.float32 and 0 <= a.frames.min() <= a.frames.max() <= 1
    assert a.masks.dtype == torch.int64 and a.masks.unique().tolist() == [0, 1] and a.valid.dtype == torch.bool
    assert (a.frames[:, :, ~a.valid] == 0).all() and not a.masks[:, ~a.valid].any()
    assert torch.equal(a.frames, b.frames) and torch.equal(a.masks, b.masks)
    assert not torch.equal(E.render_endoscopy(w, 3).frames, a.frames)


def test_endoscopy_is_pink_vignetted_and_shines():
    for kind in E.KINDS:
        c = E.render_endoscopy(E.EndoscopyWorld(kind, 128), 0); r, g, b = c.frames[0][:, c.valid].mean(1)
        assert r > 1.2 * g and r > 1.2 * b
        x, y = (torch.from_numpy(a) for a in S.picture_grid(128)); far = (x ** 2 + y ** 2).sqrt()
        if kind == "laryngeal":
            wall = c.valid & (c.masks[0] == 0) & (x.abs() > .4)
            f = c.frames[0].mean(0); assert f[wall & (far > .85)].median() < f[wall & (far < .7)].median()
        shiny = [float((E.render_endoscopy(E.EndoscopyWorld(kind, 96, shift=s), i).frames[0].min(0).values > .9).float().mean()) for s in (0., 1.) for i in range(6)]
        assert 0 < np.mean(shiny[:6]) < np.mean(shiny[6:]) < .1


def test_lesion_stands_out_at_shift_0_and_less_at_1():
    def gap(kind, s):
        out = []
        for i in range(8):
            c = E.render_endoscopy(E.EndoscopyWorld(kind, 64, shift=s), i); m = c.masks[0] > 0
            tone = c.frames[0] / c.frames[0].sum(0).clamp(min=.1); out.append(float((tone[:, m].mean(1) - tone[:, ~m & c.valid].mean(1)).abs().sum()))
        return np.mean(out)
    for kind in E.KINDS: assert gap(kind, 0.) > 1.5 * gap(kind, 1.) and gap(kind, 0.) > .1


def test_the_lesion_leaves_for_the_share_of_frames_that_is_asked():
    for i in range(4):
        for away, T in ((.25, 12), (.5, 20), (0., 12)):
            c = E.render_endoscopy(E.EndoscopyWorld("colon", 64, T, away=away), i); empty = (c.masks.sum((1, 2)) == 0)
            assert empty.sum() >= round(away * T) and empty.sum() <= round(away * T) + 5 * (away > 0) and not empty[0]
            assert not empty[0] and (not away or not empty[-1] or T < 8)


def test_the_camera_drifts_smoothly():
    c = E.render_endoscopy(E.EndoscopyWorld("colon", 64, 8), 0); step = (c.frames[1:] - c.frames[:-1]).abs().mean((1, 2, 3))
    assert 0 < step.max() < .12 and not torch.equal(c.masks[0], c.masks[4])
    still = E.render_endoscopy(E.EndoscopyWorld("colon", 64, 3, motion=0.), 0)
    assert torch.equal(still.masks[0], still.masks[2])


def test_endoscopy_images_and_faults():
    s = E.EndoscopyImages(E.EndoscopyWorld(size=48, frames=4, away=.5), 3)
    assert s.group == "laryngeal" and len(list(s)) == 3 and all(m.sum() > 0 for _, m in s)
    with pytest.raises(IndexError): s[3]
    with pytest.raises(ConfigError, match="EndoscopyImages"): E.EndoscopyImages(E.EndoscopyWorld(), 0)
    for bad, word in ((dict(kind="knee"), "laryngeal, colon"), (dict(size=8), "from 32"), (dict(frames=0), "frames"), (dict(seed=-1), "seed"),
                      (dict(shift=-.1), "shift"), (dict(away=.9), "away"), (dict(period=0), "period"), (dict(motion=3), "motion")):
        with pytest.raises(ConfigError, match=word): E.EndoscopyWorld(**bad)


def test_matt_light_by_hand():
    y = np.tile(np.arange(8, dtype=np.float32)[:, None], (1, 8))
    assert np.allclose(E.shine(0 * y, 1., 0.), 1) and np.allclose(E.shine(y, 1., 0.), 2 ** -.5)
    assert E.shine(y, 1., .5)[4, 4] == pytest.approx(1.5 / math.sqrt(2 * 1.25)) and E.shine(y, 1., .5)[4, 4] > E.shine(-y, 1., .5)[4, 4]


def test_no_lesion_is_lost():
    for kind in E.KINDS:
        share = [float(E.EndoscopyImages(E.EndoscopyWorld(kind, 48), 30)[i][1].float().mean()) for i in range(30)]
        assert min(share) > .008 and max(share) < .35, (kind, min(share))


def test_the_loader_of_public_sets_reads_what_we_write(tmp_path):
    from timet_nb.data.medical import find_medical
    found = find_medical(U.write_ultrasound(tmp_path / "set", U.UltrasoundWorld("ovary", 64), 2)).images(64)
    for got, (image, mask) in zip(found, U.UltrasoundImages(U.UltrasoundWorld("ovary", 64), 2)):
        assert torch.allclose(got[0], image, atol=1e-3) and torch.equal(got[1], mask)
    assert len(found) == 2
