"DC-SAM: the published procedure, the miniature, its training, and the face of both. Properties and faults."
import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.data.draws import sample_episodes
from timet_nb.data.textures import texture_source, write_textures
from timet_nb.dcsam.evaluate import evaluate_fewshot
from timet_nb.dcsam.fusion import DCSAMConfig
from timet_nb.dcsam.mini import DcsamMini, MiniConfig, cells_of, class_evidence, create_mini, load_mini, shipped_mini
from timet_nb.dcsam.phases import DCSAMTrainConfig, epochs_of, train_dcsam, train_image
from timet_nb.dcsam.segment import DCSAM, DCSAMSegmenter, create_dcsam, load_dcsam, pack, unpack
from timet_nb.dcsam.train import (Bank, MiniTrainConfig, Questions, calibrate, make_mini, pair_loss, run,
                                  train_mini, world_bank)
from timet_nb.evaluate.references import load_prompt
from timet_nb.features.backbone import create_backbone
from timet_nb.features.checkpoints import save_state
from timet_nb.features.weights import is_cached
from timet_nb.sam.segment import SamConfig, create_sam

SMALL = MiniConfig(canvas=(96, 160))


@pytest.fixture(scope="module")
def cnn(): return create_backbone("efficientnet-lite0-imagenet", strides=(8, 16, 32), pretrained=False).eval()


@pytest.fixture(scope="module")
def mini(cnn): return create_mini(SMALL, cnn, 0)


@pytest.fixture(scope="module")
def bank(mini, tmp_path_factory): return world_bank(mini, 6, 0, work=tmp_path_factory.mktemp("bank"))


@pytest.fixture(scope="module")
def published(): return create_dcsam(create_sam(SamConfig.tiny(fit="corners")), create_backbone("test-vit"), side=112)


def picture(seed=0, size=(60, 90)):
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(size, dtype=torch.long); ids[10:40, 20:60] = 1
    return torch.rand(3, *size, generator=g), ids


# ---- cells

def test_no_mark_is_ever_lost():
    for n in range(40):
        g = torch.Generator().manual_seed(n)
        mask = torch.zeros(64, 96)
        y, x = int(torch.randint(0, 60, (), generator=g)), int(torch.randint(0, 90, (), generator=g))
        mask[y:y + 1 + n % 4, x:x + 1 + n % 5] = 1
        assert cells_of(mask, (4, 6)).sum() >= 1
    assert cells_of(torch.zeros(64, 96), (4, 6)).sum() == 0
    assert cells_of(torch.ones(64, 96), (4, 6)).min() == 1


def test_evidence_of_the_same_features_is_one():
    k = F.normalize(torch.ones(1, 6, 5, 7), dim=1)
    e = class_evidence(k[:, None], torch.ones(1, 1, 5, 7), k, 3)
    assert torch.allclose(e, torch.ones_like(e), atol=1e-5)


# ---- the miniature

@pytest.mark.parametrize("changes", [{}, dict(cycle=False), dict(negative=False), dict(stages=1)])
def test_a_batch_answers_as_its_pairs(cnn, changes):
    model = create_mini(replace(SMALL, generator=replace(SMALL.generator, **changes)), cnn)
    pictures = [picture(n) for n in range(3)]
    raws = model.look([x for x, _ in pictures]); model.measure(raws)
    with torch.no_grad():
        both = model(raws[:2], [[raws[2]], [raws[0]]], [[pictures[2][1]], [pictures[0][1]]])
        alone = model(raws[1:2], [[raws[0]]], [[pictures[0][1]]])
    assert torch.allclose(both.logits[1:], alone.logits, atol=1e-3)


def test_only_the_generator_and_its_decoder_learn(mini):
    x, ids = picture(); raws = mini.look([x, picture(1)[0]])
    mini.train()
    mini(raws[:1], [raws[1:]], [[ids]]).logits.square().mean().backward()
    assert all(p.grad is not None for p in mini.parameters() if p.requires_grad)
    assert not any(p.grad is not None for p in mini.eyes.parameters()) and not mini.eyes.training
    mini.zero_grad(set_to_none=True); mini.eval()


def test_the_cycle_costs_no_weight_and_no_other_start(cnn):
    a, b = (create_mini(replace(SMALL, generator=replace(SMALL.generator, cycle=c)), cnn, 4) for c in (True, False))
    for (k, p), q in zip(a.named_parameters(), b.parameters()): assert torch.equal(p, q), k


def test_a_file_comes_back_and_refuses_another_network(mini, cnn, tmp_path):
    path = mini.save(tmp_path / "m.safetensors", half=True)
    back = load_mini(path, cnn)
    assert back.config == mini.config and back.source() == mini.source()
    other = create_backbone("efficientnet-lite0-imagenet", strides=(8, 16, 32), pretrained=False, seed=3).eval()
    with pytest.raises(CheckpointError, match="other features"): load_mini(path, other)
    with pytest.raises(CheckpointError, match="DcsamMini.save"):
        load_mini(save_state(tmp_path / "x.safetensors", {"a": torch.zeros(1)}), cnn)
    with pytest.raises(CheckpointError, match="no such file"): load_mini(tmp_path / "none.safetensors", cnn)


def test_the_wrong_backbone_is_refused():
    with pytest.raises(ConfigError, match="strides"): DcsamMini(create_backbone("test-vit"))


# ---- training

def test_questions_ask_what_they_say(bank):
    draw = Questions(bank, MiniTrainConfig(absent=.5), 0)
    asked = [q for n in range(30) for q in draw(n)]
    for q in asked:
        r, t = bank.pictures[q.reference], bank.pictures[q.target]
        assert q.class_id in r.classes and r.group != t.group
    share = sum(q.class_id not in bank.pictures[q.target].classes for q in asked) / len(asked)
    assert .3 < share < .7 and draw(5) == Questions(bank, MiniTrainConfig(absent=.5), 0)(5)


def test_a_bank_without_pairs_says_so(bank):
    with pytest.raises(DataError, match="no two pictures"):
        Questions(Bank(bank.pictures[:2], bank.names), MiniTrainConfig(absent=0.)).draw(random.Random(0))


def test_unknown_pixels_cost_nothing_and_give_no_gradient(mini, bank):
    q = Questions(bank, MiniTrainConfig(absent=0.)).draw(random.Random(1))
    dark = list(bank.pictures)
    dark[q.target] = replace(dark[q.target], ids=torch.full_like(dark[q.target].ids, 255))
    mini.train()
    loss = pair_loss(mini, [q], Bank(dark, bank.names))
    loss["loss"].backward()
    assert float(loss["bce"].detach()) < 1e-3
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-3 for p in mini.parameters())
    mini.zero_grad(set_to_none=True); mini.eval()


def test_training_changes_no_frozen_weight_and_is_repeatable(cnn, bank):
    before = {k: v.clone() for k, v in cnn.state_dict().items()}
    losses = [train_mini(create_mini(SMALL, cnn, 1), bank, MiniTrainConfig(steps=2, batch=2), seed=3).column()
              for _ in range(2)]
    assert losses[0] == losses[1]
    for k, v in cnn.state_dict().items(): assert torch.equal(v, before[k]), k


def test_the_threshold_keeps_most_of_the_iou(mini, bank):
    threshold, tried = calibrate(mini, bank, 4)
    assert tried[threshold] >= .95 * max(tried.values())


def test_faults_of_training(mini, tmp_path):
    with pytest.raises(ConfigError, match="budget"): make_mini(budget="huge")
    with pytest.raises(ConfigError, match="absent"): MiniTrainConfig(absent=1.)
    with pytest.raises(ConfigError, match="mini"): run("clip")
    with pytest.raises(ConfigError, match="sam"): run("image", data=tmp_path)
    with pytest.raises(DataError, match="no picture"): mini.measure([])


# ---- the published procedure

def test_stage_two_uses_the_first_answer(published):
    (x, ids), (y, _) = picture(), picture(1)
    q, r = published.look([y, x])
    with torch.no_grad(): a = published([q], [[r]], [[ids]])
    assert a.second is not None and not torch.allclose(a.coarse, a.logits)
    assert a.logits.shape == (1, 1, 112, 112)


def test_one_stage_is_the_first_answer(published):
    config = replace(published.config, stages=1)
    model = create_dcsam(published.sam, published.eyes, config, side=112)
    (x, ids), (y, _) = picture(), picture(1)
    q, r = model.look([y, x])
    with torch.no_grad(): a = model([q], [[r]], [[ids]])
    assert a.second is None and torch.equal(a.coarse, a.logits)


def test_sam_2_flavour_runs():
    from timet_nb.sam.sam2 import Sam2Config, create_sam2
    sam = create_sam2(Sam2Config.test(), 0).sam
    model = create_dcsam(sam, create_backbone("test-vit"), side=64)
    assert model.config.sam_version == 2
    x, ids = picture()
    s = DCSAMSegmenter(model)
    assert s.segment(x, s.prompt(x, ids, ["it"])).scores.shape == (1, 60, 90)


def test_a_padding_sam_and_wrong_widths_are_refused():
    eyes = create_backbone("test-vit")
    with pytest.raises(ConfigError, match="squares"): create_dcsam(create_sam(SamConfig.tiny()), eyes)
    with pytest.raises(ConfigError, match="dim 32"):
        DCSAM(create_sam(SamConfig.tiny(fit="corners")), eyes, DCSAMConfig(channels=48))


def test_generator_files(published, tmp_path):
    path = published.save(tmp_path / "g.safetensors")
    back = load_dcsam(path, published.sam, published.eyes)
    assert back.config == published.config
    with pytest.raises(CheckpointError, match="other networks"):
        load_dcsam(path, create_sam(SamConfig.tiny(fit="corners"), seed=8), published.eyes)
    with pytest.raises(ConfigError, match="eyes"): load_dcsam(path, published.sam)


def test_published_training_moves_the_generator_only(published, tmp_path):
    write_textures(tmp_path / "w", n=6, n_novel=4, seed=0)
    source = texture_source(tmp_path / "w", "train")
    frozen = {k: v.clone() for m in (published.sam, published.eyes) for k, v in m.state_dict().items()}
    model = create_dcsam(published.sam, published.eyes, side=112)
    old = model.generator.merge_1[0].weight.detach().clone()
    c = DCSAMTrainConfig(epochs=1, per_epoch=4, batch=2, lr=1e-3)
    done = train_dcsam(model, source, c)
    assert done.step == 2 and not torch.equal(old, model.generator.merge_1[0].weight)
    for m in (published.sam, published.eyes):
        for k, v in m.state_dict().items(): assert torch.equal(v, frozen[k]), k
    assert [e.query.name for e in epochs_of(source, c)(1)] == [e.query.name for e in epochs_of(source, c)(1)]
    with torch.no_grad():
        few = evaluate_fewshot(DCSAMSegmenter(model), source, 3, size=(112, 112), controls=True)
    assert 0 <= few.few_shot <= 1 and few.wrong == few.wrong


def test_faults_of_published_training(tmp_path):
    with pytest.raises(ConfigError, match="pascal5i"): train_image(tmp_path, "sam.pth", benchmark="voc")
    with pytest.raises(ConfigError, match="0 to 3"): DCSAMTrainConfig.pascal5i(7)
    with pytest.raises(ConfigError, match="1 or 2"): DCSAMTrainConfig.video(0)


# ---- one face

@pytest.mark.parametrize("which", ["mini", "published"])
def test_prompts_are_kept_and_pictures_seen_once(which, request, tmp_path):
    model = request.getfixturevalue(which)
    s, (x, ids), (y, _) = DCSAMSegmenter(model), picture(), picture(1)
    before = model.passes
    told = s.prompt(x, ids, ["thing"])
    a = s.segment(y, told)
    assert model.passes == before + 2 and a.scores.shape == (1, 60, 90) and a.ids.max() <= 1
    b = s.segment(y, load_prompt(told.save(tmp_path / "p.safetensors")))
    assert torch.equal(a.scores, b.scores) and model.passes == before + 2
    assert float(a.scores.min()) >= 0 and float(a.scores.max()) <= 1
    for look in model.look([x]):
        assert pack(unpack(pack(look))).keys() == pack(look).keys()


@pytest.mark.parametrize("size", [(40, 300), (300, 40), (33, 33)])
def test_pictures_of_any_shape(mini, size):
    s, (x, ids) = DCSAMSegmenter(mini), picture()
    assert s.segment(torch.rand(3, *size), s.prompt(x, ids, ["it"])).scores.shape == (1, *size)


def test_full_empty_and_tiny_masks(mini):
    s, (x, ids) = DCSAMSegmenter(mini), picture()
    whole = s.segment(x, s.prompt(x, torch.ones_like(ids), ["all"]))
    dot = torch.zeros_like(ids); dot[3, 3] = 1
    small = s.segment(x, s.prompt(x, dot, ["dot"]))
    assert torch.isfinite(whole.scores).all() and torch.isfinite(small.scores).all()
    with pytest.raises(DataError, match="no object"): s.prompt(x, torch.zeros_like(ids), ["none"])
    unknown = torch.where(ids == 0, 255, ids)
    assert torch.isfinite(s.segment(x, s.prompt(x, unknown, ["it"])).scores).all()


def test_classes_and_shots(mini):
    s, (x, ids), (y, other) = DCSAMSegmenter(mini), picture(), picture(1)
    two = s.prompt([x, y], [ids, other], ["a", "b"])
    assert s.segment(x, two).scores.shape == (2, 60, 90)
    one = s.segment(x, s.prompt(y, other, ["b"])).scores[0]
    assert torch.allclose(s.segment(x, two).scores[1], one, atol=1e-4)         # classes do not mix
    assert s.prompt([x, y], [ids, other], ["a", "a"]).shots == (2,)


def test_prompts_of_other_networks_are_refused(mini, published):
    x, ids = picture()
    told = DCSAMSegmenter(published).prompt(x, ids, ["it"])
    with pytest.raises(DataError, match="another backbone"): DCSAMSegmenter(mini).segment(x, told)
    with pytest.raises(ConfigError, match="load_mini"): DCSAMSegmenter(torch.nn.Identity())


def test_videos_frame_by_frame(mini):
    s, (x, ids) = DCSAMSegmenter(mini), picture()
    told = s.prompt(x, ids, ["it"])
    film = torch.stack([picture(n)[0] for n in range(3)])
    assert all(torch.equal(a, s.segment(f, told).ids) for a, f in zip(s.track(film, told), film))


# ---- what is shipped

@pytest.mark.skipif(shipped_mini() is None or not is_cached("efficientnet-lite0-imagenet"),
                    reason="needs data/weights/dcsam-mini.safetensors and the small CNN in the cache")
def test_the_shipped_weights_follow_the_reference(tmp_path):
    cnn = create_backbone("efficientnet-lite0-imagenet", strides=(8, 16, 32)).eval()
    assert shipped_mini().stat().st_size < 8e6
    s = DCSAMSegmenter(load_mini(backbone=cnn), keep=64)
    write_textures(tmp_path / "w", n=1, n_novel=24, seed=31)
    episodes = sample_episodes(texture_source(tmp_path / "w"), 10, seed=2)
    from timet_nb.evaluate.incontext import evaluate_incontext
    r = evaluate_incontext(s, episodes)
    assert r.miou - r.wrong_present > .25 and r.choice > .7
