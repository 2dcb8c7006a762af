"Linear heads: two orders that agree, a head that must reach 1, a killed run that ends with the same bits, and every fault by name."
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from tests.conftest import ROOT
from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.data.classes import ClassSet, Item
from timet_nb.data.frames import write_image, write_mask
from timet_nb.evaluate.linear import (CachedPairs, FreshViews, LinearConfig, LinearHead, MaskStore, evaluate_linear, fit_head, linear_result, pixel_loss,
                                      score_head)
from timet_nb.features.backbone import create_backbone
from timet_nb.features.dense import extract
from timet_nb.features.inputs import ImageInput

COLOURS = torch.tensor([[.1, .1, .1], [.9, .1, .1], [.1, .9, .1], [.1, .1, .9]])
SMALL = dict(size=32, map_size=4, epochs=40, batch=4, lr=1., weight_decay=0.)


class Colours(ImageInput):
    "A backbone that reports the mean colour of each patch of 8 pixels."
    name, dim = "colours", 3

    def __init__(self, bad=None):
        super().__init__(8, 8, "none")
        self.scale, self.bad, self.calls = nn.Parameter(torch.ones(1), requires_grad=False), bad, 0

    def tokens(self, x, block=-1, norm=True):
        self.calls += 1
        maps = F.avg_pool2d(self.prepare(x), 8) * self.scale
        if self.bad is not None: maps[(x.mean((1, 2, 3)) - self.bad).abs() < 1e-4] = math.nan
        return maps

    def fingerprint(self): return f"{float(self.scale):064.8f}"


def make_set(folder, grids, names=("background", "red", "green", "blue"), block=8, save=write_mask, groups=None):
    "Pictures of coloured blocks: `grids` are (h, w) class ids, 255 stays a colourless patch without a class."
    items = []
    for i, grid in enumerate(grids):
        ids = torch.as_tensor(grid).repeat_interleave(block, 0).repeat_interleave(block, 1)
        colour = COLOURS[ids.clamp(max=3) * (ids != 255)].permute(2, 0, 1)
        image, mask = folder / f"p{i}.png", folder / f"m{i}.png"
        write_image(image, colour); save(mask, ids)
        items.append(Item(f"p{i}", image, mask, groups[i] if groups else f"p{i}"))
    return ClassSet(tuple(names), tuple(items))


def random_grids(n, seed, ids=(0, 1, 2, 3)):
    g = torch.Generator().manual_seed(seed)
    return [torch.tensor(ids)[torch.randint(len(ids), (4, 4), generator=g)] for _ in range(n)]


@pytest.fixture
def pair(tmp_path):
    return make_set(tmp_path / "a", random_grids(6, 0)), make_set(tmp_path / "b", random_grids(3, 1))


def run(train, val, backbone=None, **changes):
    options = {k: changes.pop(k) for k in ("seed", "out", "cache") if k in changes}
    config = LinearConfig(**{**SMALL, **changes})
    return evaluate_linear(backbone or Colours(), train, val, config, device="cpu", **{"cache": False, **options})


def test_presets_are_the_published_settings():
    paper = LinearConfig.paper()
    want = dict(size=448, map_size=100, epochs=50, batch=60, lr=.01, momentum=.9, weight_decay=1e-4, drop_every=20, drop=.1, shuffle=True, crop=None,
                flip=0., norm="none")
    assert {k: getattr(paper, k) for k in want} == want and paper == LinearConfig()
    assert LinearConfig.official() == replace(paper, shuffle=False)
    assert LinearConfig.leopart() == replace(paper, epochs=25, crop=(.8, 1.), flip=.5)
    assert LinearConfig.clean() == replace(paper, size=224, epochs=20)
    assert LinearConfig.mini().norm == "batch" and LinearConfig.mini(lr=.5).lr == .5
    assert LinearConfig.leopart().moves and not paper.moves


@pytest.mark.parametrize("name", ["paper", "official", "leopart", "clean", "mini"])
def test_every_preset_runs(pair, name):
    config = getattr(LinearConfig, name)(epochs=1)
    result = evaluate_linear(Colours(), *pair, config, device="cpu", cache=False)
    assert int(result.table.sum()) == len(pair[1]) * config.map_size ** 2 and len(result.history) == 1 and result.history[0]["lr/head"] == config.lr


@pytest.mark.parametrize("wrong", [dict(size=0), dict(epochs=-1), dict(batch=2.5), dict(lr=0), dict(norm="layer"), dict(order="pixels"), dict(flip=2),
                                   dict(crop=(.9, .5)), dict(lr=math.nan)])
def test_settings_that_cannot_be_a_run(wrong):
    with pytest.raises(ConfigError, match=f"LinearConfig.{next(iter(wrong))}"): LinearConfig(**wrong)


def test_linearly_separable_features_reach_one(pair):
    result = run(*pair)
    assert result.miou == 1 and set(result.iou.values()) == {1.}
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 3
    x = torch.cat([COLOURS, torch.ones(4, 1)], 1)                        # closed form: least squares separates them as well
    plane = torch.linalg.lstsq(x, torch.eye(4)).solution
    assert (x @ plane).argmax(1).tolist() == [0, 1, 2, 3]
    assert result.head(COLOURS.T.reshape(1, 3, 2, 2)).argmax(1).flatten().tolist() == [0, 1, 2, 3]


def test_not_separable_does_not_reach_one(pair):
    class Grey(Colours):
        def tokens(self, x, block=-1, norm=True): return super().tokens(x).mean(1, keepdim=True).expand(-1, 3, -1, -1) * 0 + 1
    result = run(*pair, backbone=Grey())
    assert result.miou < .3


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_both_orders_of_upsampling_are_equal(norm):
    a, b = (LinearHead(20, "abcde", norm, order, seed=3) for order in ("logits", "features"))
    for trial, (grid, size) in enumerate([((7, 5), (33, 40)), ((16, 16), (100, 100)), ((9, 9), (4, 5)), ((1, 1), (8, 8))]):
        x = torch.randn(3, 20, *grid, generator=torch.Generator().manual_seed(trial))
        assert torch.allclose(a(x, size), b(x, size), atol=1e-5)
    for head in (a, b): pixel_loss(head(x, size), torch.zeros(3, *size, dtype=torch.int64)).backward()
    assert torch.allclose(a.linear.weight.grad, b.linear.weight.grad, atol=1e-5)


def test_both_orders_train_the_same_head(pair):
    one, two = (run(*pair, order=order, map_size=12).head for order in ("logits", "features"))
    assert torch.allclose(one.linear.weight, two.linear.weight, atol=1e-3)


def test_the_same_seed_gives_the_same_head_and_shuffling_is_seeded(pair, tmp_path):
    few = dict(epochs=2, lr=.1)
    weight = lambda **k: run(*pair, **few, **k).head.linear.weight
    assert torch.equal(weight(seed=1), weight(seed=1)) and not torch.equal(weight(seed=1), weight(seed=2))
    assert not torch.equal(weight(seed=1), weight(seed=1, shuffle=False))
    seen = []
    class Spy(CachedPairs):
        def __getitem__(self, i): seen.append(int(i)); return super().__getitem__(i)
    spied = Spy(extract(Colours(), pair[0].clips(), (32, 32), cache=False), pair[0], 4)
    fit_head(spied, LinearConfig(**{**SMALL, "epochs": 2, "shuffle": False}), device="cpu")
    assert seen == [*range(6)] * 2


def test_randomness_outside_is_left_alone(pair):
    torch.manual_seed(5); before = torch.get_rng_state()
    run(*pair, epochs=1)
    assert torch.equal(before, torch.get_rng_state())


KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_linear import *
from timet_nb.evaluate import linear as room
torch.set_num_threads(1)
seen, whole = [], room.pixel_loss
def deadly(*a):
    seen.append(1)
    if len(seen) == 11: os.kill(os.getpid(), signal.SIGKILL)
    return whole(*a)
room.pixel_loss = deadly
train = make_set(Path({folder!r}) / "a", random_grids(6, 0))
run(train, train, epochs=8, lr=.1, out={out!r})
"""

def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path):
    code = KILLED.format(root=str(ROOT), folder=str(tmp_path), out=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    train = make_set(tmp_path / "a", random_grids(6, 0))
    went_on = run(train, train, epochs=8, lr=.1, out=tmp_path / "run")
    unbroken = run(train, train, epochs=8, lr=.1)
    assert torch.equal(went_on.head.linear.weight, unbroken.head.linear.weight)
    assert went_on.history == unbroken.history and len(unbroken.history) == 16
    assert (tmp_path / "run" / "log.csv").exists() and (tmp_path / "run" / "result.json").exists()
    with pytest.raises(ConfigError, match="lr"): run(train, train, epochs=8, lr=.2, out=tmp_path / "run")


def test_255_is_no_part_of_the_loss():
    logits, masks = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(3, (2, 4, 4))
    masks[:, :2] = 255
    assert torch.allclose(pixel_loss(logits, masks), F.cross_entropy(logits[:, :, 2:], masks[:, 2:]))
    empty = pixel_loss(logits, torch.full_like(masks, 255)); empty.backward()
    assert empty.item() == 0 and not logits.grad.any()


def test_255_is_no_part_of_the_score(tmp_path, pair):
    grids = random_grids(3, 1)
    for g in grids: g[:2] = 255
    result = run(pair[0], make_set(tmp_path / "c", grids))
    assert int(result.table.sum()) == 3 * 8 and result.miou == 1


def test_a_picture_without_a_label_in_train_is_harmless_but_a_set_is_refused(tmp_path, pair):
    blank = make_set(tmp_path / "c", [torch.full((4, 4), 255)])
    assert run(make_set(tmp_path / "d", [*random_grids(5, 0), torch.full((4, 4), 255)]), pair[1], batch=1).miou == 1
    with pytest.raises(DataError, match="no labelled pixel"): run(blank, pair[1])
    with pytest.raises(DataError, match="no labelled pixel"): run(pair[0], blank)


def test_palette_grey_and_rgb_masks_score_the_same(tmp_path, pair):
    def grey(path, ids): Image.fromarray(ids.numpy().astype(np.uint8)).save(path)
    def rgb(path, ids):
        from timet_nb.data.decode_masks import voc_palette
        Image.fromarray(voc_palette()[ids.numpy()]).save(path)
    for name, save in dict(palette=write_mask, grey=grey, rgb=rgb).items():
        val = make_set(tmp_path / name, random_grids(3, 1), save=save)
        assert torch.equal(run(pair[0], val).table, run(*pair).table), name


def test_a_class_absent_from_val_is_left_out_and_named(tmp_path, pair):
    result = run(pair[0], make_set(tmp_path / "c", random_grids(2, 1, (0, 1, 2))))
    assert result.absent == ("blue",) and math.isnan(result.iou["blue"]) and result.miou == 1 and "blue" in repr(result)


def test_a_class_absent_from_train_counts_and_is_named(tmp_path, pair):
    result = run(make_set(tmp_path / "c", random_grids(6, 0, (0, 1, 2))), pair[1])
    assert result.untrained == ("blue",) and result.iou["blue"] == 0 and not result.absent and "untrained: blue" in repr(result)
    assert result.miou_trained == pytest.approx(sum(result.iou.values()) / 3)
    assert result.miou == pytest.approx(sum(result.iou.values()) / 4) and result.miou < .8


def test_a_class_that_is_predicted_but_absent_costs_the_class_it_covers():
    table = torch.tensor([[6, 0, 2], [0, 4, 0], [0, 0, 0]])
    result = linear_result(table, ("background", "red", "blue"), torch.tensor([1, 1, 1]))
    assert result.iou["background"] == .75 and result.iou["red"] == 1 and result.miou == .875 and result.absent == ("blue",)


def test_nan_features_name_the_picture(pair):
    first = Image.open(pair[0].items[0].image)
    dull = float(np.asarray(first).mean()) / 255
    for changes in (dict(), dict(flip=1.)):
        with pytest.raises(DataError, match=r"p0\.png"): run(*pair, backbone=Colours(bad=dull), **changes)


def test_a_picture_smaller_than_a_patch(tmp_path, pair):
    with pytest.raises(DataError, match="smaller than one patch"): run(*pair, size=4)
    tiny = make_set(tmp_path / "c", [torch.full((3, 2), k) for k in range(4)], block=1)       # 3 x 2 pixels: brought to size
    assert run(tiny, tiny).miou == 1


def test_a_mask_value_beyond_the_classes_names_the_mask(tmp_path, pair):
    odd = make_set(tmp_path / "c", [torch.full((4, 4), 7)])
    with pytest.raises(DataError, match=r"(?s)m0\.png.*class 7"): run(odd, pair[1])
    with pytest.raises(DataError, match=r"(?s)m0\.png.*class 7"): run(pair[0], odd)


def test_one_picture_and_a_batch_larger_than_the_set(tmp_path, pair):
    one = make_set(tmp_path / "c", [torch.arange(4)[:, None].expand(4, 4).contiguous()])
    assert run(one, pair[1], batch=60).miou == 1
    assert len(run(one, pair[1], batch=60, epochs=3).history) == 3
    assert run(one, pair[1], norm="batch", batch=60).miou == 1
    with pytest.raises(ConfigError, match="one patch"): run(one, one, size=8, norm="batch")


def test_sets_of_other_classes_are_refused_and_shared_clips_are_told(tmp_path, pair):
    other = make_set(tmp_path / "c", random_grids(1, 0), names=("background", "red", "green", "sky"))
    with pytest.raises(ConfigError, match="blue, sky"): run(pair[0], other)
    same = make_set(tmp_path / "d", random_grids(4, 0), groups=["x", "x", "y", "y"])
    half = same.select([0, 2]), same.select([1, 3])
    assert "2 clips are in train and in val: x, y" in repr(run(*half, epochs=1))
    assert not run(*pair, epochs=1).notes
    with pytest.raises(ConfigError, match="255"): MaskStore(replace(same, names=tuple(map(str, range(300)))), 4)


def test_groups_keep_picture_and_mask_together(tmp_path):
    grids = [torch.full((4, 4), k) for k in (0, 1, 2, 3, 1, 2)]
    data = make_set(tmp_path, grids, groups=["x", "y", "x", "y", "x", "x"])
    pairs = CachedPairs(extract(Colours(), data.clips(), (32, 32), cache=False), data, 4)
    for i, g in enumerate(grids):
        assert torch.allclose(pairs[i]["features"], COLOURS[g].permute(2, 0, 1), atol=.01) and torch.equal(pairs[i]["masks"], g)


def test_features_are_computed_once_and_stay_on_disk(tmp_path, pair):
    backbone = Colours()
    run(*pair, backbone=backbone, cache=tmp_path / "cache"); calls = backbone.calls
    again = run(*pair, backbone=backbone, cache=tmp_path / "cache", lr=.5)
    assert calls == 9 and backbone.calls == calls and again.miou == 1        # 9 pictures, each its own clip
    kept = extract(backbone, pair[0].clips(), (32, 32), cache=tmp_path / "cache")
    assert kept.computed == 0 and all(isinstance(a, np.memmap) for a in kept.arrays.values())
    assert isinstance(MaskStore(pair[0], 4).maps, np.memmap)


def test_views_move_picture_and_mask_together_and_depend_on_the_item(tmp_path, pair):
    mirrored = FreshViews(Colours(), pair[0], LinearConfig(**{**SMALL, "flip": 1.}))[1]
    image, ids = pair[0].read(1, (32, 32))
    assert torch.equal(mirrored["images"], image.flip(-1)) and torch.equal(mirrored["masks"], ids[::8, ::8].flip(-1))
    moving = dict(crop=(.5, 1.), flip=.5, map_size=8, epochs=12, lr=.5)
    a, b, c = (run(*pair, **moving, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.head.linear.weight, b.head.linear.weight) and not torch.equal(a.head.linear.weight, c.head.linear.weight)
    assert a.miou > .5


def test_the_backbone_is_left_as_it_was(pair):
    backbone = create_backbone("test-vit").train()
    before = backbone.fingerprint()
    run(*pair, backbone=backbone, epochs=1)
    assert backbone.training and backbone.fingerprint() == before
    assert all(m.training for m in backbone.vit.blocks)


def test_heads_are_saved_loaded_and_matched_to_their_backbone(tmp_path, pair):
    backbone = Colours(); head = run(*pair, backbone=backbone, norm="batch", out=tmp_path / "run").head
    back = LinearHead.load(tmp_path / "run" / "head.safetensors", backbone)
    x = torch.rand(2, 3, 32, 40)
    assert back.names == head.names and back.notes["config"]["norm"] == "batch" and not back.training
    assert torch.equal(back.predict(backbone, x), head.predict(backbone, x))
    other = Colours(); other.scale.fill_(2.)
    with pytest.raises(CheckpointError, match="trained on colours"): LinearHead.load(tmp_path / "run" / "head.safetensors", other)
    create_backbone("test-vit").save_timm(tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match="a linear head"): LinearHead.load(tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match="no such file"): LinearHead.load(tmp_path / "none.safetensors")


def test_predict_takes_any_size_and_refuses_another_width(pair):
    result, vit = run(*pair, backbone=create_backbone("test-vit"), epochs=1), create_backbone("test-vit")
    for size in ((64, 64), (100, 37), (5, 9)):
        found = result.head.predict(vit, torch.rand(2, 3, *size))
        assert found.shape == (2, *size) and found.dtype == torch.int64
    assert result.head.dim == 48
    with pytest.raises(DataError, match="48"): result.head.predict(Colours(), torch.rand(1, 3, 32, 32))


def test_predict_is_what_was_scored(pair):
    backbone = Colours(); result = run(*pair, backbone=backbone, map_size=32)
    images, ids = (torch.stack(x) for x in zip(*(pair[1].read(i, (32, 32)) for i in range(3))))
    from timet_nb.evaluate.overlap import contingency
    assert torch.equal(contingency(ids, result.head.predict(backbone, images), 4, 4), result.table)


def test_scoring_does_not_depend_on_the_batch(pair):
    head = run(*pair, epochs=3).head
    pairs = CachedPairs(extract(Colours(), pair[1].clips(), (32, 32), cache=False), pair[1], 12)
    assert torch.equal(score_head(head, pairs, 1), score_head(head, pairs, 8))


def test_a_cnn_works(pair):
    cnn = create_backbone("efficientnet-lite0-imagenet", pretrained=False)
    result = run(*pair, backbone=cnn, size=64, map_size=16, epochs=20, norm="batch", lr=.1)
    assert result.head.dim == cnn.dim and .2 < result.miou <= 1


@pytest.mark.data
@pytest.mark.weights
def test_real_features_beat_random_ones(real_data, vit, tmp_path):
    from timet_nb.data.classes import class_set
    whole = class_set(real_data / "davis2016_pairs")
    kinds = [whole.names.index(n) for n in ("car", "motorcycle+rider")]
    train, val = whole.select(lambda i: i.to in kinds).split(.5)
    config = LinearConfig.mini(size=112, map_size=40, batch=4)
    known, unknown = (evaluate_linear(b, train, val, config, device="cpu", cache=tmp_path) for b in (vit, vit.random_like()))
    assert known.miou > 1.3 * unknown.miou and len(known.absent) == 21 and not known.untrained and not known.notes
