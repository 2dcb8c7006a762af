"STCR's image model: pyramids, pictures of any size, shots, odd masks, files, episodes, training, scores. Properties and faults."
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.data.ultrasound import UltrasoundImages, UltrasoundWorld
from timet_nb.features.backbone import create_backbone
from timet_nb.features.checkpoints import load_header, save_state
from timet_nb.relearn import image_phase
from timet_nb.relearn.episodes import EpisodeBatch, Episodes, ImagePhaseConfig, _aside
from timet_nb.relearn.fewshot import (SHIPPED_IMAGES, FewShotConfig, FewShotSegmenter, Support, create_fewshot,
                                      load_fewshot, shipped_images, square_images, square_masks)
from timet_nb.relearn.image_phase import (ask_each, episode_loss, judge_images, keep_statistics, main, make_images, mask_loss,
                                          overlap_of, train_images)
from timet_nb.relearn.listen import SUPPORTS, crossed, hear_out, spoilt_supports, two_questions
from timet_nb.relearn.prior import HOWS, MASKINGS
from timet_nb.relearn.pyramid import Pyramid, create_pyramid


def rand(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def disc(size=64, at=(.5, .5), r=.2):
    y, x = torch.meshgrid(*[(torch.arange(n) + .5) / n for n in ((size, size) if isinstance(size, int) else size)], indexing="ij")
    return ((y - at[0]) ** 2 + (x - at[1]) ** 2 < r ** 2).long()


@pytest.fixture(scope="module")
def net(): return create_fewshot(FewShotConfig.test())


@pytest.fixture(scope="module")
def sets(): return [[*UltrasoundImages(UltrasoundWorld(o, 64, seed=3), 6)] for o in ("breast", "ovary")]


@pytest.fixture(scope="module")
def shown(net): return net.support(rand(1, 3, 64, 64), disc()[None])


# pyramids
@pytest.mark.parametrize("name,strides,dims", [("resnet10t", (4, 8, 16), (64, 128, 256)), ("resnet10t", (8, 16), (128, 256)),
                                               ("efficientnet-lite0-imagenet", (4, 8, 16), (24, 40, 112))])
def test_a_cnn_gives_its_strides(name, strides, dims):
    p = create_pyramid(name, strides, False)
    maps = p(rand(2, 3, 64, 96))
    assert p.dims == dims and p.multiple == strides[-1]
    assert [tuple(m.shape) for m in maps] == [(2, d, 64 // s, 96 // s) for d, s in zip(dims, strides)]


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_a_vit_gives_levels_of_half_the_cells(levels):
    p = create_pyramid("test-vit", (1,) * levels, False).eval()
    maps = p(rand(2, 3, 64, 32))
    assert [tuple(m.shape[2:]) for m in maps] == [(8 * 2 ** k, 4 * 2 ** k) for k in range(levels)][::-1]
    assert p.blocks()[-1] == p.backbone.depth - 1 and len(p.blocks()) == levels
    torch.testing.assert_close(maps[-1], p.backbone.tokens(rand(2, 3, 64, 32)))          # the coarsest is the last block's


def test_more_levels_than_blocks_are_refused():
    with pytest.raises(ConfigError, match="levels of 4 blocks"): create_pyramid("test-vit", (1,) * 9, False)


@pytest.mark.parametrize("strides", [(8,), (4, 16), (4, 8, 32)])
def test_strides_that_do_not_double_are_refused(strides):
    with pytest.raises(ConfigError, match="twice"): create_pyramid("resnet10t", strides, False)


def test_a_pyramid_of_one_level_is_refused():
    with pytest.raises(ConfigError, match="2 or more"): Pyramid(create_backbone("test-vit", pretrained=False), 1)


@pytest.mark.parametrize("name,strides", [("resnet10t", (4, 8, 16)), ("efficientnet-lite0-imagenet", (4, 8, 16)),
                                          ("mobilenetv3_small_050", (4, 8)), ("test-vit", (4, 8, 16))])
def test_gradient_reaches_everything_trainable(name, strides):
    net = create_fewshot(FewShotConfig(name, strides, 64, width=8, layers=2, pretrained=False)).train()
    for p in net.parameters(): p.data += .05 * (not p.any())             # timm starts some norms at zero: they block what lies before
    b = EpisodeBatch(rand(2, 2, 3, 64, 64), disc().expand(2, 2, -1, -1), rand(2, 3, 64, 64, seed=1), disc(at=(.4, .6)).expand(2, -1, -1))
    episode_loss(net, b)["loss"].backward()
    silent = [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    assert not silent, silent


# squares
@pytest.mark.parametrize("size", [(64, 64), (257, 257), (31, 200), (7, 5), (64, 63)])
def test_pictures_and_masks_of_any_size_come_to_the_square(size):
    x, m = square_images(rand(2, 3, *size), 64), square_masks(disc(size).expand(2, -1, -1), 64)
    assert x.shape == (2, 3, 64, 64) and m.shape == (2, 64, 64) and m.dtype == torch.int64
    assert 0 <= x.min() and x.max() <= 1 and set(m.unique().tolist()) <= {0, 1}
    assert abs(m[0].float().mean() - disc(size).float().mean()) < .05


def test_masks_keep_thin_things_ignore_and_only_the_object():
    m = torch.zeros(1, 256, 256, dtype=torch.long)
    m[0, 100, 20:220] = 1                                  # one pixel high: a quarter of a cell
    assert square_masks(m, 64).sum() == 50
    m[0, 200:] = 255; m[0, :20] = 7
    small = square_masks(m, 64)
    assert (small[0, 50:] == 255).all() and (small[0, :5] == 0).all()
    same = square_masks(m[:, :64, 60:124], 64)             # the same size: ids other than 1 and 255 are background
    assert set(same.unique().tolist()) <= {0, 1, 255} and not (same[0, :20]).any()


# the model
@pytest.mark.parametrize("size", [(64, 64), (257, 257), (50, 91), (128, 32)])
def test_answers_have_the_size_of_the_question(net, size):
    s = net.support(rand(1, 3, *size), disc(size)[None])
    p = net.predict(rand(3, 3, *size, seed=1), s)
    assert p.shape == (3, *size) and (p >= 0).all() and (p <= 1).all()


def test_support_and_query_may_differ_in_size(net):
    s = net.support([rand(3, 80, 60), rand(3, 64, 64)], [disc((80, 60)), disc()])
    assert [m.shape[:2] for m in s.maps] == [(1, 2)] * 3
    assert net.predict(rand(1, 3, 33, 47), s).shape == (1, 33, 47)


def test_a_batch_is_its_single_pictures(net, shown):
    x = rand(4, 3, 64, 64, seed=5)
    one = torch.cat([net.predict(x[i:i + 1], shown) for i in range(4)])
    torch.testing.assert_close(net.predict(x, shown), one, atol=1e-5, rtol=1e-4)


def test_each_episode_of_a_batch_has_its_own_support(net):
    x, m, q = rand(3, 2, 3, 64, 64), torch.stack([disc(at=(a, .5)) for a in (.3, .5, .7)])[:, None].expand(-1, 2, -1, -1), rand(3, 3, 64, 64, seed=2)
    both = net.predict(q, net.look(x, m))
    one = torch.cat([net.predict(q[i:i + 1], net.support(x[i], m[i])) for i in range(3)])
    torch.testing.assert_close(both, one, atol=1e-5, rtol=1e-4)


def test_shots_are_a_mean_whatever_their_order(net):
    x, m, q = rand(3, 3, 64, 64), torch.stack([disc(at=(a, .5)) for a in (.3, .5, .7)]), rand(2, 3, 64, 64, seed=2)
    ways = [net.predict(q, net.support(x[i], m[i])) for i in ([0, 1, 2], [2, 0, 1])]
    torch.testing.assert_close(*ways, atol=1e-5, rtol=1e-4)
    twice = [net.predict(q, net.support(x[i], m[i])) for i in ([0], [0, 0, 0])]
    torch.testing.assert_close(*twice, atol=1e-5, rtol=1e-4)
    assert (ways[0] - twice[0]).abs().max() > 1e-5


def test_outside_of_the_mask_nothing_is_seen(net):
    x, m, q = rand(1, 3, 64, 64), disc()[None], rand(1, 3, 64, 64, seed=2)
    other = torch.where(m[:, None] == 1, x, rand(1, 3, 64, 64, seed=9))
    assert torch.equal(net.predict(q, net.support(x, m)), net.predict(q, net.support(other, m)))
    ignored = torch.where(m == 1, 1, 255)                  # 255 counts as outside, too
    assert torch.equal(net.predict(q, net.support(x, m)), net.predict(q, net.support(x, ignored)))


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("how", HOWS)
def test_every_reading_gives_finite_answers_to_odd_supports(how, masking):
    net = create_fewshot(FewShotConfig.test(how=how, masking=masking))
    q, grey = torch.cat([rand(1, 3, 64, 64), torch.full((1, 3, 64, 64), .5)]), torch.full((1, 3, 64, 64), .5)
    for x, m in ((rand(1, 3, 64, 64), disc() * 0), (rand(1, 3, 64, 64), disc() * 0 + 1), (grey, disc()), (grey * 0, disc())):
        assert net.predict(q, net.support(x, m[None])).isfinite().all()


def test_an_empty_mask_is_a_black_picture(net):
    q, x = rand(1, 3, 64, 64), rand(1, 3, 64, 64, seed=1)
    empty, black = net.support(x, disc()[None] * 0), net.support(x * 0, disc()[None] * 0 + 1)
    assert all(torch.equal(a, b) for a, b in zip(empty.maps, black.maps))
    both = create_fewshot(FewShotConfig.test(masking="both"))
    nothing = both.support(x, disc()[None] * 0)
    assert not any(m.any() for m in nothing.maps)          # masked twice: no features at all
    assert not both.locate(both.pyramid(q)[-1], nothing).any()


@torch.no_grad()
def test_a_constant_pseudo_map_is_zero(net):
    top = net.pyramid(rand(1, 3, 64, 64))[-1]
    same = top.mean((2, 3), keepdim=True).expand_as(top)
    assert not net.locate(same, Support((same[:, None],))).any()
    found = net.locate(top, Support((top[:, None, :, :2, :2],)))
    assert found.min() == 0 and found.max() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("x,m,said", [
    (rand(1, 3, 64, 64), disc((60, 64))[None], "as its picture"), (rand(2, 3, 64, 64), disc()[None], "2 pictures, 1 masks"),
    (rand(1, 3, 64, 64), [], "1 pictures, 0 masks"), ([], disc()[None], "0 pictures, 1 masks"), ([], [], "0 pictures"),
    (rand(1, 3, 64, 64), disc()[None] * 255, "255 means unknown"), (rand(1, 1, 64, 64), disc()[None], "support picture 0"), (rand(1, 3, 64, 64), disc()[None, None], "support mask 0")])
def test_supports_that_do_not_fit_are_refused(net, x, m, said):
    with pytest.raises(DataError, match=said): net.support(x, m)


@pytest.mark.parametrize("value", [2, 128, .7])
def test_a_mask_that_marks_nothing_under_another_number_is_refused(net, value):
    with pytest.raises(DataError, match="no 1"): net.support(rand(1, 3, 64, 64), disc()[None] * value)
    both = net.support(rand(1, 3, 64, 64), (disc() + 2 * disc(at=(.2, .2), r=.1))[None])       # other objects beside the object
    assert torch.equal(both.maps[0], net.support(rand(1, 3, 64, 64), disc()[None]).maps[0])


def test_one_support_needs_no_batch_and_no_question_is_refused(net, shown):
    one = net.support(rand(1, 3, 64, 64)[0], disc())
    for a, b in zip(one.maps, net.support(rand(1, 3, 64, 64), disc()[None]).maps, strict=True): assert torch.equal(a, b)
    with pytest.raises(DataError, match="no picture"): net.predict(rand(0, 3, 64, 64), shown)
    with pytest.raises(ConfigError, match="FewShotConfig"): create_fewshot(size=64, pretrained=False)


def test_queries_that_do_not_fit_are_refused(net, shown):
    for bad in (rand(3, 64, 64), rand(1, 1, 64, 64), (rand(1, 3, 64, 64) * 255).byte()):
        with pytest.raises(DataError, match="queries"): net.predict(bad, shown)
    with pytest.raises(DataError, match="features"): net.predict(rand(3, 3, 64, 64), Support(tuple(m.expand(2, -1, -1, -1, -1) for m in shown.maps)))


@pytest.mark.parametrize("changes,said", [(dict(size=60), "multiple of 16"), (dict(how="best"), "max, same"), (dict(masking="x"), "image, features"),
                                          (dict(width=0), "1 or more"), (dict(strides=(4, 16)), "twice"), (dict(strides=(4, 7)), "some of")])
def test_settings_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said): create_fewshot(FewShotConfig.test(**changes))


def test_the_seed_makes_the_weights():
    a, b, c = (create_fewshot(FewShotConfig.test(), s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["mixers.0.weight"], c["mixers.0.weight"])
    assert FewShotConfig.paper().backbone == "resnet50" and FewShotConfig.mini() == FewShotConfig()


# files
@pytest.mark.parametrize("half", [False, True])
def test_a_saved_model_answers_the_same(net, shown, tmp_path, half):
    path = net.save(tmp_path / "net.safetensors", half, dict(seed=3))
    back, q = load_fewshot(path), rand(1, 3, 64, 64, seed=4)
    assert back.config == net.config and not back.training
    torch.testing.assert_close(back.predict(q, back.support(rand(1, 3, 64, 64), disc()[None])), net.predict(q, shown),
                               atol=5e-3 if half else 0, rtol=0)
    sizes = path.stat().st_size / net.save(tmp_path / "full.safetensors").stat().st_size
    assert (sizes < .55) == half


def test_wrong_files_are_refused(net, tmp_path):
    other = save_state(tmp_path / "other.safetensors", dict(x=torch.zeros(2)), dict(kind="sam-mini"))
    with pytest.raises(CheckpointError, match="sam-mini"): load_fewshot(other)
    with pytest.raises(CheckpointError, match="no such file"): load_fewshot(tmp_path / "none.safetensors")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="kind None"): load_fewshot(tmp_path / "net.pth")
    config = dict(net.config.__dict__, strides=[4, 8, 16])
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("head")}
    for s, c, said in ((state, config, "head"), (net.state_dict(), dict(config, width=8), "mixers|shape|fit"),
                       (net.state_dict(), dict(config, wide=8), "width")):
        path = save_state(tmp_path / "bad.safetensors", s, dict(kind="stcr-images", config=c))
        with pytest.raises((CheckpointError, ConfigError), match=said): load_fewshot(path)


def test_the_shipped_model_segments_an_organ_it_was_trained_on():
    if shipped_images() is None: pytest.skip(f"no data/weights/{SHIPPED_IMAGES}: this is no checkout")
    net, pictures = load_fewshot(), [*UltrasoundImages(UltrasoundWorld("breast", 128, seed=77), 6)]
    assert judge_images(net, pictures, 6).dice > .85
    assert shipped_images().stat().st_size < 8e6


def test_the_model_that_was_taught_to_listen_does():
    if shipped_images(True) is None: pytest.skip("no data/weights with the model that listens: this is no checkout")
    net = load_fewshot(shipped_images(True)); size = net.config.size
    breast, thyroid = ([*UltrasoundImages(UltrasoundWorld(o, size, seed=77), 4)] for o in ("breast", "thyroid"))
    def dice(queries, supports):
        p = [net.predict(x[None], net.support(a[None], b[None])) > .5 for (x, _), (a, b) in zip(queries, supports)]
        return overlap_of(torch.cat(p), torch.stack([m for _, m in queries])).dice
    assert dice(thyroid, thyroid[::-1]) > .85 and dice(breast, breast[::-1]) > .85
    assert not dice(thyroid, breast) > .2 and not dice(breast, thyroid) > .2


# behind the common interface
def test_several_classes_behind_the_common_interface(net, tmp_path):
    ask, x = FewShotSegmenter(net), rand(3, 70, 90)
    ids = disc((70, 90), (.3, .3)) + 2 * disc((70, 90), (.7, .7), .15)
    prompt = ask.prompt([x, rand(3, 64, 64, seed=1)], [ids, disc()])
    a = ask.segment(rand(3, 50, 40, seed=2), prompt)
    assert a.scores.shape == (2, 50, 40) and a.ids.shape == (50, 40) and prompt.shots == (2, 1)
    alone = net.predict(rand(3, 50, 40, seed=2)[None], net.support([x], [(ids == 2).long()]))[0]
    torch.testing.assert_close(a.scores[1], alone, atol=1e-5, rtol=1e-4)
    again = FewShotSegmenter(create_fewshot(FewShotConfig.test()))
    assert again.fingerprint() == ask.fingerprint() != FewShotSegmenter(create_fewshot(FewShotConfig.test(how="mean"))).fingerprint()


# episodes
def test_episodes_depend_on_seed_and_number_alone(sets):
    c = ImagePhaseConfig(batch=3, shots=2)
    a, b = Episodes(sets, c, 64, 1), Episodes(sets, c, 64, 1)
    for k in (5, 0, 5): a(k)
    assert all(torch.equal(x, y) for x, y in zip(a(4), b(4)))
    assert not torch.equal(a(4).query, a(3).query) and not torch.equal(a(4).query, Episodes(sets, c, 64, 2)(4).query)
    assert [tuple(x.shape) for x in a(0)] == [(3, 2, 3, 64, 64), (3, 2, 64, 64), (3, 3, 64, 64), (3, 64, 64)]


def test_an_episode_stays_within_one_set_and_repeats_no_picture():
    flat = lambda v: [(torch.full((3, 8, 8), v + i / 100), disc(8)) for i in range(4)]
    draw = Episodes([flat(.1), flat(.6)], ImagePhaseConfig(batch=8, shots=2, flip=False), 8)
    for k in range(5):
        b = draw(k)
        values = torch.cat([b.support[:, :, 0, 0, 0], b.query[:, None, 0, 0, 0]], 1)
        assert ((values < .5).all(1) | (values > .5).all(1)).all()
        assert all(len(set(row.tolist())) == 3 for row in values)


def test_pictures_of_other_sizes_and_ignore_are_brought_along():
    one = [(rand(3, 40, 52, seed=i), torch.where(disc((40, 52)) == 1, 1, 255)) for i in range(3)]
    b = Episodes([one], ImagePhaseConfig(batch=2), 32)(0)
    assert b.query.shape == (2, 3, 32, 32) and set(b.query_masks.unique().tolist()) == {1, 255}


def test_decoys_paste_an_object_of_another_set(sets):
    plain, tricky = (Episodes(sets, ImagePhaseConfig(batch=16, flip=False, decoys=d), 64, 0)(0) for d in (0., 1.))
    known = torch.stack([x for s in sets for x, _ in s])
    seen = lambda b: sum(any(torch.equal(x, y) for y in known) for x in b.query)
    assert seen(plain) == 16 and seen(tricky) == 0
    assert set(tricky.query_masks.unique().tolist()) == {0, 1}


def test_a_decoy_stays_whole_and_aside():
    "A move by `roll` may push an object over the edge, and it comes back on the other side: such moves are not drawn."
    for k in range(40):
        new, mine, rng = disc(48, at=(.1 + .02 * k, .9 - .02 * k), r=.09), disc(48, r=.2), random.Random(k)
        moved = new.roll(_aside(new, mine, rng), (0, 1))
        size = lambda m: [int(t[-1] - t[0]) for t in (m.any(d).nonzero().flatten() for d in (0, 1))]
        assert size(moved) == size(new) and not (moved & mine).any()
    whole = torch.ones(9, 9, dtype=torch.long)
    assert _aside(whole, whole, random.Random(0)) == (0, 0) and len(_aside(whole * 0, whole, random.Random(0))) == 2


@pytest.mark.parametrize("bad,said", [([], "none"), ([[(rand(3, 8, 8), disc(8))]], "2 pictures or more")])
def test_image_sets_that_are_too_small_are_refused(bad, said):
    with pytest.raises(DataError, match=said): Episodes(bad, ImagePhaseConfig(), 8)


def test_training_settings_that_cannot_be_are_refused(sets):
    for changes in (dict(steps=0), dict(batch=0), dict(shots=0), dict(decoys=1.5)):
        with pytest.raises(ConfigError): ImagePhaseConfig(**changes)
    with pytest.raises(DataError, match="decoy"): Episodes(sets[:1], ImagePhaseConfig(decoys=.5), 64)


# loss and scores
def test_mask_loss_against_plain_sums():
    logits, y = rand(2, 2, 4, 4) * 4, disc(4, r=.3).expand(2, -1, -1).clone()
    y[0, 0] = 255
    p, parts = logits.softmax(1)[:, 1], []
    for q, m in zip(p, y):
        k = m != 255
        parts.append(1 - (2 * (q[k] * (m[k] == 1)).sum() + 1) / (q[k].sum() + (m[k] == 1).sum() + 1))
    got = mask_loss(logits, y, .5)
    torch.testing.assert_close(got["dice"], torch.stack(parts).mean())
    torch.testing.assert_close(got["ce"], nn.functional.cross_entropy(logits, y, ignore_index=255))
    torch.testing.assert_close(got["loss"], got["ce"] + .5 * got["dice"])
    assert mask_loss(logits, y * 0 + 255)["loss"].isfinite()


def test_overlap_of_counts_as_the_golden_file(golden):
    with np.load(golden / "stcr" / "dice_iou_derived.npz") as g: a = {k: torch.from_numpy(np.asarray(g[k])) for k in g.files}
    o = overlap_of(a["in/pred"].bool(), a["in/true"].long())
    assert (o.n, o.empty) == (3, 1)                        # the fourth pair is empty and empty
    rows = torch.tensor(o.rows, dtype=torch.float64)
    torch.testing.assert_close(rows[:, 0], a["out/dice_first3"]); torch.testing.assert_close(rows[:, 1], a["out/iou_first3"])
    assert o.dice == pytest.approx(float(a["out/dice_first3"].mean()))


def test_overlap_of_by_hand():
    t = torch.zeros(5, 2, 2, dtype=torch.long); f = torch.zeros(5, 2, 2, dtype=torch.bool)
    t[0, 0] = 1; f[0, 0] = True                            # all found
    t[1, 0] = 1; f[1, :, 0] = True                         # half: Dice 1/2, IoU 1/3
    t[2, 0] = 1                                            # missed
    f[3, 0, 0] = True                                      # invented
    o = overlap_of(f, t)                                   # the fifth: nothing there, nothing said
    assert (o.n, o.empty) == (4, 1) and o.rows == ((1., 1.), (.5, pytest.approx(1 / 3)), (0., 0.), (0., 0.))
    assert o.dice == .375 and o.iou == pytest.approx(1 / 3)
    t[3, 0, 0] = 255
    assert overlap_of(f, t).empty == 2                     # what is unknown cannot be wrong
    assert math.isnan(overlap_of(f[4:], t[4:]).dice)
    with pytest.raises(DataError, match="one shape"): overlap_of(f, t[:3])


# training
def tiny(**changes): return ImagePhaseConfig(**{**dict(steps=4, batch=2, lr=2e-3), **changes})


def test_a_killed_training_ends_with_the_same_bits(sets, tmp_path):
    def run(out, stop=None):
        net = create_fewshot(FewShotConfig.test(size=32))
        class Stop(Exception): pass
        def after(m, i):
            if i + 1 == stop: raise Stop
        try: train_images(net, sets, tiny(), out, save_every=1, after_step=after)
        except Stop: train_images(net, sets, tiny(), out, save_every=1, after_step=lambda m, i: None)
        return net.state_dict()
    a, b = run(tmp_path / "a"), run(tmp_path / "b", stop=3)
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises((ConfigError, CheckpointError), match="dice"):
        train_images(create_fewshot(FewShotConfig.test(size=32)), sets, tiny(dice=.5), tmp_path / "a")


def test_training_moves_all_but_the_batch_statistics_of_the_backbone(sets):
    net = create_fewshot(FewShotConfig.test()); before = {k: v.clone() for k, v in net.state_dict().items()}
    train_images(net, sets, tiny(steps=3))
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert not any("running" in k for k in moved if k.startswith("pyramid"))
    assert {k for k, _ in net.named_parameters()} <= moved and not net.training
    assert any(k.startswith("neck") and "running" in k for k in moved)


def test_a_frozen_backbone_stays_and_is_trainable_again_afterwards(sets):
    net = create_fewshot(FewShotConfig.test()); before = {k: v.clone() for k, v in net.pyramid.state_dict().items()}
    train_images(net, sets, tiny(steps=2, backbone_lr=0.))
    assert all(torch.equal(v, before[k]) for k, v in net.pyramid.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_keep_statistics_touches_batch_norms_alone():
    m = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout()).train(); keep_statistics(m)
    assert [x.training for x in m] == [True, False, True]


def test_a_few_steps_learn(sets):
    try: net = create_fewshot(FewShotConfig(size=64))
    except CheckpointError as e: pytest.skip(f"the small CNN cannot be had: {str(e).splitlines()[0]}")
    first = judge_images(net, sets[1], 6).dice
    r = train_images(net, sets, tiny(steps=30, batch=3))
    assert judge_images(net, sets[1], 6).dice > max(.5, first + .2), (first, r.history[-1])
    assert r.history[-1]["loss"] < .7 * r.history[0]["loss"]


def test_the_command_writes_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(image_phase, "FewShotConfig", FewShotConfig.test)
    words = ["--budget", "smoke", "--steps", "1", "--decoys", "0.5", "--size", "32", "--masking", "both", "--how", "mean"]
    path = main(["--out", str(tmp_path / "m.safetensors"), *words])
    assert load_fewshot(path).config == FewShotConfig.test(size=32, masking="both", how="mean") and "MB" in capsys.readouterr().out
    notes = load_header(path)
    assert notes["train"]["steps"] == 1 and notes["train"]["decoys"] == .5
    assert set(words) <= set(notes["made_by"].split())     # the header names the command
    with pytest.raises(ConfigError, match="smoke, cpu, gpu"): make_images(budget="large")


# does it listen?
def test_spoilt_supports_by_hand():
    shots, other = [(rand(3, 8, 8), disc(8))] * 2, [(rand(3, 8, 8), disc(8, r=.4))] * 2
    found = spoilt_supports(shots, other)
    assert tuple(found) == SUPPORTS and all(len(v) == 2 for v in found.values())
    (_, m), masks = shots[0], {k: v[0][1] for k, v in found.items()}
    assert torch.equal(masks["right"], m) and torch.equal(masks["background"], 1 - m) and not masks["nothing"].any()
    assert masks["elsewhere"].any() and not (masks["elsewhere"] & m).any() and torch.equal(masks["other set"], other[0][1])
    unknown = m.clone(); unknown[0] = 255
    kept = spoilt_supports([(shots[0][0], unknown)], other[:1])["background"][0][1]
    assert (kept[0] == 255).all() and set(kept[1:].unique().tolist()) == {0, 1}
    with pytest.raises(DataError, match="1, as many"): spoilt_supports(shots[:1], other)


class Stub(torch.nn.Module):
    "Marks what a rule says: the whole picture, or where the picture is as bright as the example's object."
    def __init__(self, how): super().__init__(); self.how, self.device, self.config = how, torch.device("cpu"), FewShotConfig(size=32, pretrained=False)
    def support(self, images, masks): return Support(tuple(torch.stack([x[0][m == 1].mean() for x, m in zip(images, masks)])[None]))
    def look(self, images, masks): return Support((torch.stack([x[0, 0][m[0] == 1].mean() for x, m in zip(images, masks)]),))
    def predict(self, queries, support):
        x, level = queries[:, 0], torch.as_tensor(support.maps[0]).reshape(-1, 1, 1)
        return ((x - level).abs() < .05).float() if self.how == "listens" else (x > .3).float()


def bright(level, n=4):
    "Pictures with one disc of a brightness, each elsewhere."
    masks = [disc(32, at=(.3 + .1 * k, .3), r=.15) for k in range(n)]
    return [((level * m.float()).expand(3, -1, -1), m) for m in masks]


def test_controls_tell_a_model_that_listens_from_one_that_does_not():
    sets = dict(dim=bright(.5), light=bright(.9))
    deaf, keen = hear_out(Stub("deaf"), sets), hear_out(Stub("listens"), sets)
    for row in deaf.values(): assert set(row) == set(SUPPORTS) and min(row.values()) == 1
    for row in keen.values(): assert row["right"] == 1 and row["other set"] == 0 == row["nothing"]
    assert crossed(Stub("listens"), sets) == dict(dim=dict(dim=1., light=0.), light=dict(dim=0., light=1.))
    assert set(crossed(Stub("deaf"), sets)["dim"].values()) == {1.}


def test_two_questions_of_one_picture():
    sets = [bright(.5), bright(.9)]
    deaf = two_questions(Stub("deaf"), sets, 3)
    assert deaf["alike"] == 1 and .5 < deaf["fits"] < .8           # it marks both of two alike: 2/3
    assert two_questions(Stub("listens"), sets, 3)["fits"] > deaf["fits"] + .1
    assert two_questions(Stub("listens"), sets, 3) == two_questions(Stub("listens"), sets, 3)
    with pytest.raises(DataError, match="change places"): two_questions(Stub("deaf"), sets, batch=1)
    with pytest.raises(DataError, match="two or more"): hear_out(Stub("deaf"), dict(dim=bright(.5)))


def test_ask_each_is_one_question_at_a_time(net, sets):
    q, s = sets[0][:3], sets[1][:3]
    with torch.no_grad(): one = [net.predict(x[None], net.support([a], [b])) > .5 for (x, _), (a, b) in zip(q, s)]
    assert ask_each(net, q, s) == overlap_of(torch.cat(one), torch.stack([m for _, m in q]))
    with pytest.raises(DataError, match="one per question"): ask_each(net, q, s[:2])


# readings and refusals
@pytest.mark.parametrize("bad", [dict(steps=2.5), dict(steps=0), dict(batch=2.5), dict(shots=1.5), dict(shots=True), dict(lr=-1e-3), dict(lr=float("nan")),
    dict(backbone_lr=float("nan")), dict(backbone_lr=-1e-3), dict(weight_decay=-1), dict(dice=-1), dict(dice=float("nan")), dict(cross_entropy=-1),
    dict(cross_entropy=float("nan")), dict(dice=0, cross_entropy=0), dict(clip=-1), dict(clip=0), dict(clip=float("nan")), dict(decoys=float("nan"))])
def test_image_settings_without_a_meaning_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=[*bad][0]): ImagePhaseConfig(**bad)


@pytest.mark.parametrize("bad", [dict(size=64.5), dict(size=0), dict(width=2.5), dict(layers=1.5), dict(head_act="elu"), dict(shots="sum")])
def test_sizes_without_a_meaning_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=[*bad][0]): FewShotConfig(**bad)


def test_either_part_of_the_loss_can_be_left_out(net, sets):
    logits, y = rand(2, 2, 8, 8), (rand(2, 8, 8, seed=1) < .3).long()
    parts = mask_loss(logits, y)
    assert torch.equal(mask_loss(logits, y, cross_entropy=0)["loss"], parts["dice"])
    assert torch.equal(mask_loss(logits, y, dice=0)["loss"], parts["ce"])
    assert torch.equal(mask_loss(logits, y, 1., 1.)["loss"], parts["loss"])
    torch.testing.assert_close(mask_loss(logits, y, .5, 2.)["loss"], 2 * parts["ce"] + .5 * parts["dice"])
    row = train_images(create_fewshot(FewShotConfig.test()), sets, ImagePhaseConfig(steps=1, batch=2, cross_entropy=0)).history[0]
    assert row["loss"] == row["dice"] != row["ce"]


def old_draw(e, number):
    "Episodes as they were drawn before empty masks were looked at: the same random numbers."
    from timet_nb.base.order import item_seed
    rng, out = random.Random(item_seed(e.seed, 0, number)), []
    for _ in range(e.config.batch):
        home = rng.randrange(len(e.sets))
        pairs = [e._read(home, i, rng) for i in rng.sample(range(len(e.sets[home])), e.config.shots + 1)]
        out.append(pairs)
    return torch.stack([torch.stack([x for x, _ in p]) for p in out]), torch.stack([torch.stack([m for _, m in p]) for p in out])


def test_sets_whose_masks_show_something_are_drawn_as_before(sets):
    e = Episodes(sets, ImagePhaseConfig(batch=3, shots=2), 64, 5)
    for k in range(4):
        b, (x, m) = e(k), old_draw(e, k)
        assert torch.equal(b.query, x[:, 0]) and torch.equal(b.support, x[:, 1:])
        assert torch.equal(b.query_masks, m[:, 0]) and torch.equal(b.support_masks, m[:, 1:])


@pytest.mark.parametrize("shots", [1, 2])
def test_supports_show_an_object_and_questions_need_not(sets, shots):
    half = [[(x, m * (k % 2)) for k, (x, m) in enumerate(s)] for s in sets]
    config = ImagePhaseConfig(batch=60, shots=shots)
    b = Episodes(half, config, 64, 3)(0)
    shows = lambda m: (m == 1).flatten(-2).any(-1)
    assert shows(b.support_masks).all() and shows(b.query_masks).any() and not shows(b.query_masks).all()
    for s, q in zip(b.support, b.query):                             # still no picture twice
        seen = [q, q.flip(-1)]
        for x in s:
            assert not any(torch.equal(x, y) for y in seen); seen += [x, x.flip(-1)]
    for x, y in zip(b, Episodes(half, config, 64, 3)(0)): assert torch.equal(x, y)


def test_sets_that_show_too_little_are_refused_by_name(sets):
    class Named(list): group = "busi"
    none = Named((x, 0 * m) for x, m in sets[0])
    with pytest.raises(DataError, match="(?s)image set busi: got an object in 0 of 6 masks.*2 or more"): Episodes([sets[1], none], ImagePhaseConfig(), 64)
    one = [(x, m * (k == 3)) for k, (x, m) in enumerate(sets[0])]
    with pytest.raises(DataError, match="image set 1: got an object in 1 of 6"): Episodes([sets[1], one], ImagePhaseConfig(), 64)
    two = [(x, m * (k in (3, 5))) for k, (x, m) in enumerate(sets[0])]
    assert (Episodes([two], ImagePhaseConfig(batch=9), 64)(0).support_masks == 1).any()


def test_the_head_has_other_functions_and_the_same_keys():
    made = {a: create_fewshot(FewShotConfig.test(head_act=a)) for a in ("relu", "gelu", "none")}
    z = rand(1, 16, 8, 8) - .5
    for a, f in (("relu", torch.relu), ("gelu", nn.functional.gelu), ("none", lambda t: t)):
        first, _, last = made[a].head
        torch.testing.assert_close(made[a].head(z), last(f(first(z))))
    assert [*made["relu"].state_dict()] == [*made["none"].state_dict()] and made["relu"].config == FewShotConfig.test()


def test_several_shots_may_be_their_largest(net, tmp_path):
    most = create_fewshot(FewShotConfig.test(shots="max")).eval(); most.load_state_dict(net.state_dict())
    x, m, q = rand(3, 3, 64, 64), disc().expand(3, -1, -1), rand(1, 3, 64, 64, seed=2)
    s = net.support(x, m)
    assert torch.equal(most.predict(q, most.support(x[:1], m[:1])), net.predict(q, net.support(x[:1], m[:1])))
    one = Support(tuple(f.amax(1, keepdim=True) for f in s.maps))     # the fused maps; the pseudo mask is the largest cosine
    from timet_nb.relearn.prior import cosine_maps, min_max
    top = net.pyramid(square_images(q, 64))[-1]
    assert torch.equal(most.locate(top, s), min_max(cosine_maps(top, s.maps[-1], net.config.how).amax(1)))
    most.locate = lambda top, _: torch.zeros(1, *top.shape[2:]); net_zero = create_fewshot(FewShotConfig.test()); net_zero.load_state_dict(net.state_dict())
    net_zero.eval().locate = most.locate
    with torch.no_grad(): torch.testing.assert_close(most(q, s), net_zero(q, one))
    assert not torch.equal(most(q, s), net_zero(q, s))
    back = load_fewshot(create_fewshot(FewShotConfig.test(shots="max", head_act="gelu")).save(tmp_path / "m.safetensors"))
    assert (back.config.shots, back.config.head_act) == ("max", "gelu")


def test_files_of_before_the_new_settings_still_load(net, tmp_path):
    from dataclasses import asdict
    old = {k: v for k, v in asdict(net.config).items() if k not in ("head_act", "shots")}
    save_state(tmp_path / "old.safetensors", net.state_dict(), dict(kind="stcr-images", config=old))
    assert load_fewshot(tmp_path / "old.safetensors").config == net.config
    assert FewShotSegmenter(net).fingerprint() != FewShotSegmenter(create_fewshot(FewShotConfig.test(shots="max"))).fingerprint()
