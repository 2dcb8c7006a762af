"Training SINE: readers of labels, pairs, the loss, resuming, the third map, the shipped decoder."
import json
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.data.classes import class_set
from timet_nb.data.frames import write_image
from timet_nb.data.textures import texture_world, write_textures
from timet_nb.features.backbone import create_backbone
from timet_nb.sine import evidence as V
from timet_nb.sine import sources as S
from timet_nb.sine import train as T
from timet_nb.sine.matching import CriterionConfig
from timet_nb.sine.model import SineConfig, create_sine
from timet_nb.sine.mformer import MFormerConfig
from timet_nb.sine.release import load_sine
from timet_nb.sine.segment import SineSegmenter

FEW = CriterionConfig(points=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_textures(tmp_path_factory.mktemp("t") / "world", 8, 5, texture_world(photos=False), n_novel=2)


@pytest.fixture(scope="module")
def cnn(): return create_backbone("efficientnet-lite0-imagenet", strides=(8, 16, 32), pretrained=False).eval()


def tiny(cnn, seed=0, **changes):
    small = MFormerConfig.mini(dim=32, heads=2, mlp=32, depth=1, queries=6)
    return create_sine(SineConfig.shipped(decoder=small, size=96, longest=192, **changes), cnn, seed)


@pytest.fixture(scope="module")
def bank(folder, cnn):
    return T.fill_bank(tiny(cnn), S.layout_set(folder, texture_world(photos=False).classes, split="train"), (96, 168))


# --- sources ---

def coco(tmp_path, annotations, **more):
    about = dict(images=[dict(id=1, file_name="a.jpg", height=40, width=60)],
                 categories=[dict(id=3, name="cat"), dict(id=8, name="dog")], annotations=annotations, **more)
    write_image(tmp_path / "a.jpg", torch.rand(3, 40, 60))
    (tmp_path / "instances_x.json").write_text(json.dumps(about))
    return tmp_path / "instances_x.json"


def box(i, c, x, y, w, h, crowd=0):
    return dict(id=i, image_id=1, category_id=c, iscrowd=crowd, area=w * h,
                segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])


def test_clip_folder_keeps_ids(folder):
    s = S.layout_set(folder, texture_world(photos=False).classes, split="train")
    assert len(s) == 16 and len({p.group for p in s.pictures}) == 8
    for a, b in zip(s.pictures[::2], s.pictures[1::2]): assert a.group == b.group and a.objects == b.objects


def test_coco_sorts_by_class_and_lays_small_ones_on_top(tmp_path):
    s = S.coco_set(coco(tmp_path, [box(1, 8, 0, 0, 50, 30), box(2, 3, 10, 10, 10, 10), box(3, 3, 50, 30, 3, 3)]))
    p = s.pictures[0]
    assert p.objects == ((1, 1), (2, 2)) and s.names == ("background", "cat", "dog")
    ids = p.read()
    assert ids[15, 15] == 1 and ids[2, 2] == 2 and ids[31, 51] == 255 and ids[38, 5] == 0


def test_coco_crowd_is_unknown(tmp_path):
    crowd = dict(id=9, image_id=1, category_id=3, iscrowd=1, area=600,
                 segmentation=dict(counts=[0, 40 * 10, 40 * 50], size=[40, 60]))
    p = S.coco_set(coco(tmp_path, [box(1, 8, 30, 0, 20, 20), crowd])).pictures[0]
    ids = p.read()
    assert ids[5, 3] == 255 and ids[5, 35] == 1 and p.objects == ((1, 2),)


def test_panoptic(tmp_path):
    code = torch.zeros(20, 30, dtype=torch.long)
    code[:, :15], code[:, 15:] = 65_537, 258
    rgb = torch.stack([code % 256, code // 256 % 256, code // 65536]).float() / 255
    (tmp_path / "panoptic_v").mkdir()
    write_image(tmp_path / "panoptic_v" / "a.png", rgb)
    write_image(tmp_path / "a.jpg", torch.rand(3, 20, 30))
    rows = [dict(id=65_537, category_id=5, area=300, iscrowd=0), dict(id=258, category_id=1, area=300, iscrowd=0)]
    about = dict(images=[dict(id=1, file_name="a.jpg")], categories=[dict(id=1, name="sky"), dict(id=5, name="cow")],
                 annotations=[dict(image_id=1, file_name="a.png", segments_info=rows)])
    path = tmp_path / "panoptic_v.json"
    path.write_text(json.dumps(about))
    s = S.train_set(path)
    assert s.pictures[0].objects == ((1, 1), (2, 2))
    ids = s.pictures[0].read()
    assert ids[3, 3] == 2 and ids[3, 20] == 1
    image, ids = S.read_picture(s.pictures[0], (10, 16))
    assert image.shape == (3, 10, 16) and ids.shape == (10, 16)
    rows[0]["category_id"] = 77
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match="category 77"): S.train_set(path)


def test_class_regions_and_unknown_names(folder):
    shown = class_set(folder, "objects", names=texture_world(photos=False).classes, split="novel")
    s = S.class_regions(shown)
    assert all(v == c for p in s.pictures for v, c in p.objects)
    with pytest.raises(ConfigError, match="names"): S.layout_set(folder, ["moon"], split="train")


def test_faults_of_sources(tmp_path):
    with pytest.raises(DataError, match="no picture with an object"): S.coco_set(coco(tmp_path, []))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="annotations"): S.train_set(tmp_path / "x.json")


def test_second_view_is_seeded_and_holds_an_object():
    image, ids = torch.rand(3, 40, 60), torch.zeros(40, 60, dtype=torch.long)
    ids[15:30, 20:40] = 3
    for n in range(30):
        a, b = (S.second_view(image, ids, random.Random(n)) for _ in range(2))
        assert torch.equal(a[0], b[0]) and a[1].shape == ids.shape and set(a[1].unique().tolist()) <= {0, 3} and (a[1] == 3).any()


# --- pairs ---

def test_pairs_are_what_they_say(bank):
    pairs = T.Pairs(bank, T.SineTrainConfig.mini(batch=300), 1)(0)
    for p in pairs:
        r, t = bank.pictures[p.reference], bank.pictures[p.target]
        assert p.reference != p.target and (r.group == t.group) == (p.kind == "same")
        assert set(p.wanted) == {o for o, c in t.objects if c in p.classes}
        assert p.marked and all(dict(r.objects)[o] in p.classes for o in p.marked)
        assert bool(p.wanted) == (p.kind != "absent")
    share = Counter(p.kind for p in pairs)
    assert abs(share["same"] / 300 - .35) < .09 and abs(share["absent"] / 300 - .35) < .09


def test_pairs_depend_on_number_and_seed_only(bank):
    c = T.SineTrainConfig.mini(batch=5)
    a, b = T.Pairs(bank, c, 3), T.Pairs(bank, c, 3)
    a(0), a(1)
    assert a(7) == b(7) and a(7) != a(8) and a(7) != T.Pairs(bank, c, 4)(7)


def test_one_of_several_is_marked_and_all_are_wanted(bank):
    pairs = T.Pairs(bank, T.SineTrainConfig.mini(batch=400, one=1., same=1., absent=0., twins=1.), 0)(0)
    twins = [p for p in pairs if len(p.wanted) == 2]
    assert len(twins) > 50 and all(len(p.marked) == 1 for p in twins)
    whole = T.Pairs(bank, T.SineTrainConfig.mini(batch=400, one=0., same=1., absent=0., twins=1.), 0)(0)
    assert any(len(p.marked) == 2 for p in whole)


def test_all_classes_of_the_reference(bank):
    for p in T.Pairs(bank, T.SineTrainConfig.paper(batch=200), 0)(0):
        assert p.classes == tuple(sorted({c for _, c in bank.pictures[p.reference].objects}))


def test_banks_that_give_no_pair(bank):
    with pytest.raises(DataError, match="pictures to make pairs"): T.Pairs(T.Bank(bank.pictures[:1], bank.names), T.SineTrainConfig.mini())
    lone = [p for p in bank.pictures[:1]] + [replace(bank.pictures[2], objects=((1, 99),))]
    with pytest.raises(DataError, match="no pair"): T.Pairs(T.Bank(lone, bank.names), T.SineTrainConfig.mini())(0)


@pytest.mark.parametrize("bad, word", [(dict(same=1.5), "same"), (dict(same=.7, absent=.5), "absent"), (dict(steps=0), "steps"),
                                       (dict(batch=0), "batch"), (dict(schedule="x"), "schedule"), (dict(classes="x"), "classes")])
def test_settings_that_cannot_be(bad, word):
    with pytest.raises(ConfigError, match=word): T.SineTrainConfig(**bad)


def test_second_views_join_the_group_of_their_picture(folder, cnn):
    shown = class_set(folder, "objects", names=texture_world(photos=False).classes, split="novel")
    b = T.fill_bank(tiny(cnn), S.class_regions(shown), (96, 168), views=2)
    assert len(b) == 8 and all(len(g) == 2 for g in b.groups.values())


def test_small_objects_become_unknown(folder, cnn):
    data = S.layout_set(folder, texture_world(photos=False).classes, split="train")
    b = T.fill_bank(tiny(cnn), data, (96, 168), least=.07)
    for p in b.pictures:
        assert {v for v, _ in p.objects} == set(p.ids.unique().tolist()) - {0, 255}
    assert any((p.ids == 255).any() for p in b.pictures)


# --- loss and training ---

def test_loss_reaches_what_learns_only(bank, cnn):
    m = tiny(cnn).train()
    m.measure([p.raw for p in bank.pictures])
    loss = T.pair_loss(m, T.Pairs(bank, T.SineTrainConfig.mini(batch=4), 0)(0), [bank], FEW)
    loss["loss"].backward()
    assert torch.isfinite(loss["loss"]) and all(p.grad is None for p in m.backbone.parameters())
    for part in (m.neck, m.decoder.interaction, m.lateral, m.prior_net):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_identity_is_taught_in_the_same_group_only(bank):
    p = T.Pairs(bank, T.SineTrainConfig.mini(), 0).pair(random.Random(1), "other")
    t = T.truth_of(bank.pictures[p.target], p, torch.tensor(p.classes), torch.tensor(p.marked))
    assert not t.same_scene
    p = T.Pairs(bank, T.SineTrainConfig.mini(), 0).pair(random.Random(1), "same")
    assert T.truth_of(bank.pictures[p.target], p, torch.tensor(p.classes), torch.tensor(p.marked)).same_scene


def test_pictures_of_two_sizes_train_together(bank, folder, cnn):
    other = T.fill_bank(tiny(cnn, ), S.layout_set(folder, texture_world(photos=False).classes, split="train"), (96, 128))
    m = tiny(cnn).train()
    pairs = T.Pairs([bank, other], T.SineTrainConfig.mini(batch=6), 0)(0)
    assert {p.bank for p in pairs} == {0, 1}
    assert torch.isfinite(T.pair_loss(m, pairs, [bank, other], FEW)["loss"])


def test_a_killed_run_ends_with_the_same_bits(bank, cnn, tmp_path):
    c = T.SineTrainConfig.mini(steps=4, batch=2, criterion=FEW)
    whole = tiny(cnn, 3)
    T.train_sine(whole, bank, c, tmp_path / "a", 3)
    cut = tiny(cnn, 3)
    def stop(model, step):
        if step == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): T.train_sine(cut, bank, c, tmp_path / "b", 3, after_step=stop, save_every=1)
    again = tiny(cnn, 3)
    T.train_sine(again, bank, c, tmp_path / "b", 3)
    for (n, a), b in zip(whole.state_dict().items(), again.state_dict().values()): assert torch.equal(a, b), n


def test_training_lowers_the_loss(bank, cnn):
    m = tiny(cnn)
    r = T.train_sine(m, bank, T.SineTrainConfig.mini(steps=40, batch=4, lr=2e-3, warmup=5, criterion=FEW), seed=0)
    first, last = (sum(h["loss"] for h in part) / 8 for part in (r.history[:8], r.history[-8:]))
    assert last < .9 * first


def test_rates_of_the_paper():
    rate = T.falling(T.SineTrainConfig.paper())
    assert rate(0) == pytest.approx(1e-6) and rate(99) == pytest.approx(1e-4) and rate(50_000) == 0
    assert rate(25_050) == pytest.approx(5e-5)


def test_calibration_refuses_more_with_a_higher_threshold(bank, cnn):
    best, rows = T.calibrate(tiny(cnn), bank, n=3)
    assert best in [r["threshold"] for r in rows]
    assert [r["refused"] for r in rows] == sorted(r["refused"] for r in rows)


# --- the third map ---

def test_evidence_is_the_cosine_of_means():
    g = torch.Generator().manual_seed(0)
    t, k, c = torch.randn(5, 6, 8, generator=g), torch.randn(30, 5, generator=g), torch.rand(30, generator=g)
    e = V.class_evidence(t, k, c, 3)
    want = F.cosine_similarity(t[:, 1:4, 2:5].flatten(1).mean(1), k[c > .5].mean(0), dim=0)
    assert e[2, 3] == pytest.approx(float(want), abs=1e-5) and e.abs().max() <= 1.0001
    assert torch.equal(V.class_evidence(t, k, c * .4, 3), V.class_evidence(t, k[c == c.max()], torch.ones(1), 3))


def test_standardised_keys():
    x = torch.randn(400, 3) * torch.tensor([1., 50., .01]) + 9
    z = V.standardise(x, x.mean(0), x.std(0))
    assert torch.allclose(z.norm(dim=1), torch.ones(400), atol=1e-5)
    assert torch.isfinite(V.standardise(torch.ones(4, 2), torch.ones(2), torch.zeros(2))).all()


def test_evidence_model_is_saved_and_loaded(cnn, tmp_path):
    m = tiny(cnn)
    path = m.save(tmp_path / "a.safetensors")
    back = load_sine(path, cnn)
    assert back.config == m.config and all(torch.equal(a, b) for a, b in zip(m.neck.parameters(), back.neck.parameters()))
    assert m.prior_net.net[0].weight.shape[1] == 3 and torch.equal(m.prior_net.net[0].weight, back.prior_net.net[0].weight)
    for bad in (dict(evidence=4), dict(prior=False), dict(standard=False)):
        with pytest.raises(ConfigError, match="evidence"): create_sine(SineConfig.shipped(**bad), cnn)
    assert SineSegmenter.mini(path, cnn).model.config == m.config
    other = create_backbone("efficientnet-lite0-imagenet", strides=(8, 16, 32), pretrained=False, seed=5).eval()
    with pytest.raises(CheckpointError, match="other features"): load_sine(path, other)


# --- the shipped decoder ---

@pytest.mark.skipif(T.shipped_mini() is None, reason="data/weights holds no mini decoder")
def test_shipped_file_is_small_and_says_how_it_was_made():
    from timet_nb.features.checkpoints import load_header, load_state
    path = T.shipped_mini()
    notes, state = load_header(path), load_state(path)
    assert path.stat().st_size < 6e6 and notes["made_by"].startswith("python -m timet_nb.sine.train")
    assert notes["config"]["backbone"] == "efficientnet-lite0-imagenet" and notes["train"]["steps"] == T.BUDGETS["cpu"][1]
    assert all(torch.isfinite(v.float()).all() for v in state.values())
    assert {v.dtype for k, v in state.items() if k not in ("shift", "spread")} == {torch.float16}


@pytest.mark.skipif(T.shipped_mini() is None, reason="data/weights holds no mini decoder")
@pytest.mark.weights
def test_shipped_decoder_reads_the_reference(tmp_path):
    from timet_nb.data.draws import sample_episodes
    from timet_nb.data.textures import render_textures, texture_source
    from timet_nb.evaluate.pick import evaluate_twins, selective
    from timet_nb.features.weights import is_cached
    if not is_cached("efficientnet-lite0-imagenet"): pytest.skip("the small CNN is not in the cache")
    world = texture_world()
    if world.notes: pytest.skip("scikit-image, whose photos the world uses, is not installed")
    out = write_textures(tmp_path / "w", 1, 11, world, n_novel=30)
    s = SineSegmenter(T.load_mini(), keep=64)
    row = selective({"mini": s}, sample_episodes(texture_source(out, "novel"), 12, seed=4))[0]
    assert row["gap"] > .3 and row["choice"] > .8 and row["wrong, absent"] < row["right"] / 2
    twins = [x for x in render_textures(world.only("novel"), 30, 12) if x.twins][:4]
    t = evaluate_twins(s, twins)
    assert t.choice > .8 and t.recall_twin > .6 > t.other
