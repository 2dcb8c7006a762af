"The small SAM 2: its canvas, its start, its training, its file; the worlds in which things hide."
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.features.backbone import create_backbone
from timet_nb.features.checkpoints import load_header, load_state, save_state
from timet_nb.sam import mini_track as track
from timet_nb.sam.hiding import CAST, hides, hiding_clip, hiding_scene, seen_share
from timet_nb.sam.memory import Session, to_ids, track as walk
from timet_nb.sam.mini import create_mini
from timet_nb.sam.mini_follow import carry, first_only, follow, score_film
from timet_nb.sam.mini_track import (
    CELL, TrackTrainConfig, calibrate, coarser, create_mini_track, develop, draw_rolls, grid_sam,
    load_mini_track, memory_parts, roll_loss, save_mini_track, shoot, starts, train_track)
from timet_nb.sam.sam2 import Sam2Config
from timet_nb.sam.segment import SamConfig, create_sam

SIZES = Sam2Config.mini(memory_dim=16, layers=1, hidden=32)


@pytest.fixture(scope="module")
def vit(): return create_backbone("test-vit", seed=0)

@pytest.fixture(scope="module")
def sam(vit): return create_mini(SamConfig.mini_test(), vit, 0)

@pytest.fixture(scope="module")
def clip(): return hiding_clip(1, "train", 5, True, size=(96, 168))

@pytest.fixture(scope="module")
def reel(sam, clip): return shoot(sam, clip.frames, clip.masks, clip.name)

@pytest.fixture(scope="module")
def films(sam, reel): return [develop(sam, reel)], [develop(sam, reel, True)]

@pytest.fixture
def model(sam): return create_mini_track(sam, SIZES, 0)


# worlds

def test_worlds_repeat(clip):
    again = hiding_clip(1, "train", 5, True, size=(96, 168))
    assert torch.equal(again.frames, clip.frames) and torch.equal(again.masks, clip.masks)

def test_parts_share_nothing():
    for a, b in zip(CAST["train"], CAST["val"]): assert not set(a) & set(b)

def test_board_hides():
    assert sum(hides(hiding_clip(s, "val", 10, True, size=(96, 168)).masks) for s in range(5)) >= 3

def test_no_board_when_not_asked():
    names = [layer.sprite.name for s in range(3) for layer in hiding_scene(s, hide=False).layers]
    assert "board" not in names
    assert all("board" in [x.sprite.name for x in hiding_scene(s, hide=True).layers] for s in range(2))

def test_unknown_part():
    with pytest.raises(ConfigError, match="test"): hiding_scene(0, "test")

def test_hides_needs_a_return():
    ids = torch.zeros(4, 8, 8, dtype=torch.long); ids[0, :4] = 1; ids[1, :4] = 1
    assert not hides(ids)                                    # gone for good
    ids[3, :4] = 1
    assert hides(ids) and seen_share(ids).tolist() == [1, 1, 0, 1]


# canvas

class Pooled(torch.nn.Module):
    "Eyes with patches of 14 pixels that cost nothing."
    def __init__(self): super().__init__(); self.lift = torch.nn.Conv2d(3, 32, 1)
    def forward(self, x):
        maps = [self.lift(F.adaptive_avg_pool2d(x, n)) for n in (8, 32, 16)]
        return maps[0], tuple(maps[1:])

def test_grid_sam_answers_alike():
    sam = create_sam(SamConfig.mini_test(size=112, stride=14), Pooled())
    image, at = torch.rand(3, 60, 90), dict(points=[[30., 20.]], labels=[1])
    other = grid_sam(sam)
    assert other.config.size == 8 * CELL and other.config.stride == CELL
    a, b = (s.ask(s.look(image), **{k: torch.tensor(v) for k, v in at.items()}) for s in (sam, other))
    assert (a.masks - b.masks).abs().max() < .02 * a.masks.std() + .005   # a third of a pixel
    assert other.look(image).view.canvas == (64, 64)

def test_grid_sam_shares(sam):
    mine = {id(p) for p in sam.parameters()}
    assert all(id(p) in mine for p in grid_sam(sam).parameters())
    with pytest.raises(DataError, match="picture"): grid_sam(sam).look([])


# start

def test_only_memory_learns(model):
    learns = {k for k, p in model.named_parameters() if p.requires_grad}
    assert learns and all(k.split(".")[0] in (*track.PARTS, *track.WORDS) for k in learns)

def test_begins_alike(sam, films):
    model, film = create_mini_track(sam, SIZES, 0), films[0][0]
    seen = film.seen(0)
    found = model.given(seen, (film.small[:1] == 1)[None].float())
    bank = {0: model.store(seen, found, True)}
    w = model.watch(seen, bank, track.recent_frames(1, {0}, (), 5, 5))[0, 0]
    n = model.config.grid[0] ** 2
    own, chance = w[:, :n].diagonal().mean(), w[:, :n].mean()
    assert own > 3 * chance                                   # a still picture finds itself

def test_twin_shares(model):
    twin = coarser(model)
    assert twin.config.grid == tuple(g // 2 for g in model.config.grid)
    for k in (*track.PARTS, *track.WORDS): assert getattr(twin, k) is getattr(model, k), k
    assert twin.sam_mask_decoder is model.sam_mask_decoder

def test_own_decoder_is_a_copy(sam):
    own = create_mini_track(sam, SIZES, 0, own=True)
    assert own.sam_mask_decoder is not sam.mask_decoder
    assert coarser(own).sam_mask_decoder is own.sam_mask_decoder


# clips

def test_film_is_what_the_sam_sees(sam, clip, films):
    seen, film = grid_sam(sam).look(clip.frames[2]), films[0][0]
    torch.testing.assert_close(film.seen(2).embedding, seen.embedding, atol=.06, rtol=.02)
    for a, b in zip(film.seen(2).high_res, seen.high_res): assert (a - b).abs().mean() < .02
    assert film.seen(2).view == seen.view

def test_shoot_through_either_canvas(sam, model, clip, reel):
    assert torch.equal(shoot(model.sam, clip.frames[:1], clip.masks[:1]).raw, reel.raw[:1])

def test_follow_equals_track(model, clip, films):
    found, score = follow(model, films[0][0])
    steps = list(walk(model, clip.frames, clip.masks[0]))
    other = torch.stack([to_ids(masks, clip.masks.shape[1:]) for _, masks, _, _ in steps])
    assert (found == other).float().mean() > .99 and score.shape == (5, len(steps[0][1]))

def test_rolls_repeat_and_begin_well(films):
    config, places = TrackTrainConfig(batch=3, frames=5), starts(films[0])
    for step in range(20):
        rolls = draw_rolls(films[0], places, config, 0, step)
        assert rolls == draw_rolls(films[0], places, config, 0, step)
        for i, o, f in zip(rolls.films, rolls.objects, rolls.frames):
            assert len(f) == 5 and (i, o, f[0]) in places and set(f) <= set(range(5))
            assert all(abs(a - b) == 1 for a, b in zip(f, f[1:]))

def test_no_object_no_start(films):
    empty = replace(films[0][0], small=films[0][0].small * 0)
    with pytest.raises(DataError, match="object"): starts([empty])


# training

def test_training_touches_the_memory_only(sam, films):
    model = create_mini_track(sam, SIZES, 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train_track(model, *films, TrackTrainConfig(steps=3, coarse=2, batch=2, frames=3, warmup=1))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.split(".")[0] in (*track.PARTS, *track.WORDS) for k in changed)
    assert any(k.startswith("memory_encoder") for k in changed)

def test_own_decoder_learns_slowly(sam, films):
    kept = {k: v.clone() for k, v in sam.state_dict().items()}
    model = create_mini_track(sam, SIZES, 0, own=True)
    train_track(model, *films, TrackTrainConfig(steps=2, coarse=1, batch=1, frames=3, warmup=1, decoder=.1))
    assert all(torch.equal(v, kept[k]) for k, v in sam.state_dict().items())
    first = model.sam_mask_decoder.iou_token.weight
    assert not torch.equal(first, sam.mask_decoder.iou_token.weight)

def test_loss_falls(sam, films):
    model = create_mini_track(sam, SIZES, 0, own=True)
    train = TrackTrainConfig(steps=30, coarse=30, batch=2, frames=3, lr=3e-3, decoder=1., warmup=2)
    log = [r["loss"] for r in train_track(model, *films, train).history]
    assert sum(log[-5:]) < .8 * sum(log[:5])

def test_hidden_objects_cost_presence_only(model, films):
    film = films[0][0]
    gone = replace(film, small=torch.cat([film.small[:1], film.small[1:] * 0]))
    rolls = track.Rolls((0,), (1,), ((0, 1, 2),))
    out = roll_loss(model, [gone], rolls, TrackTrainConfig(score=0.))
    assert out["loss"].item() == 0 and out["iou"].item() == 0


def test_calibration_moves_the_zero(sam, films):
    own = create_mini_track(sam, SIZES, 0, own=True)
    with torch.no_grad(): own.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.)
    _, before = follow(own, films[0][0])
    shift = calibrate(own, films[0], .5)
    _, after = follow(own, films[0][0])
    assert shift > 0 and after[1:].min() < before[1:].min()
    with pytest.raises(ConfigError, match="own"): calibrate(create_mini_track(sam, SIZES), films[0])

def test_a_decoder_of_sam_may_not_learn(sam, films):
    kept = {k: v.clone() for k, v in sam.mask_decoder.state_dict().items()}
    shared = TrackTrainConfig(steps=2, coarse=1, batch=1, frames=3, warmup=1, decoder=1.)
    train_track(create_mini_track(sam, SIZES), *films, shared)
    assert all(torch.equal(v, kept[k]) for k, v in sam.mask_decoder.state_dict().items())


# files

def test_whole_file_needs_no_sam(sam, vit, tmp_path):
    model = create_mini_track(sam, SIZES, 0)
    path = save_mini_track(model, tmp_path / "m.safetensors", sam, whole=True)
    other = create_mini(SamConfig.mini_test(), vit, 1)
    kept = {k: v.clone() for k, v in other.state_dict().items()}
    back = load_mini_track(other, path)
    for k, v in model.state_dict().items():
        if ".backbone." not in k: torch.testing.assert_close(v.half().float(), back.state_dict()[k], msg=k)
    assert all(torch.equal(v, kept[k]) for k, v in other.state_dict().items())

def test_file_round_trip(sam, films, tmp_path):
    model = create_mini_track(sam, SIZES, 3)
    path = save_mini_track(model, tmp_path / "m.safetensors", sam, seed=3)
    assert not any("backbone" in k or "sam_" in k for k in load_state(path))
    back = load_mini_track(sam, path)
    for (k, a), b in zip(memory_parts(model).state_dict().items(), memory_parts(back).state_dict().values()):
        torch.testing.assert_close(a.half().float(), b, msg=k)
    assert not any(p.requires_grad for p in memory_parts(back).parameters())
    assert load_header(path)["seed"] == 3 and back.config.memories == 5

def test_own_decoder_travels(sam, tmp_path):
    model = create_mini_track(sam, SIZES, 0, own=True)
    with torch.no_grad(): model.sam_mask_decoder.iou_token.weight.add_(1)
    back = load_mini_track(sam, save_mini_track(model, tmp_path / "m.safetensors", sam))
    gap = back.sam_mask_decoder.iou_token.weight - sam.mask_decoder.iou_token.weight
    torch.testing.assert_close(gap, torch.ones_like(gap), atol=2e-3, rtol=0)

def test_other_sam_is_refused(sam, vit, tmp_path):
    path = save_mini_track(create_mini_track(sam, SIZES), tmp_path / "m.safetensors", sam)
    with pytest.raises(CheckpointError, match="train it again"):
        load_mini_track(create_mini(SamConfig.mini_test(), vit, 1), path)

def test_other_file_is_refused(sam, tmp_path):
    path = save_state(tmp_path / "x.safetensors", dict(a=torch.zeros(2)))
    with pytest.raises(CheckpointError, match="save_mini_track"): load_mini_track(sam, path)
    good = save_mini_track(create_mini_track(sam, SIZES), tmp_path / "m.safetensors", sam)
    state = load_state(good); state.pop("no_obj_ptr")
    with pytest.raises(CheckpointError, match="no_obj_ptr"):
        track.fill_mini_track(create_mini_track(sam, SIZES), state)

def test_unknown_budget(sam):
    with pytest.raises(ConfigError, match="huge"): track.make_mini_track(budget="huge", sam=sam)

def test_make(sam, tmp_path, monkeypatch):
    monkeypatch.setitem(track.BUDGETS, "smoke", (1, 2, 1, 1))
    path = tmp_path / "m.safetensors"
    track.make_mini_track(path, "smoke", 0, sam, SIZES)
    assert load_header(path)["made_by"].startswith("python -m timet_nb.sam.mini_track")
    assert load_mini_track(sam, path).config.memory_dim == 16


# following

def test_first_only_reads_what_was_given():
    chosen = first_only(5, {0}, {1, 2, 3, 4}, 5, 5, False, None)
    assert {f for f, _ in chosen.cells} == {0} and {f for f, _ in chosen.pointers} == {0}

def test_carry_keeps_a_still_picture(sam, clip):
    ids = torch.where(clip.masks[:1] == 1, 7, 0)
    reel = shoot(sam, clip.frames[:1].expand(3, -1, -1, -1), ids.expand(3, -1, -1))
    out = carry(reel, dim=48)
    assert set(out.unique().tolist()) <= {0, 7}
    row = score_film(reel.ids.long(), out)[0]
    assert row["object"] == 7 and row["J"] > .5 and row["lost"] == 0

def test_score_of_the_truth(clip):
    for row in score_film(clip.masks, clip.masks):
        assert row["J"] == 1 and row["F"] == 1 and row["lost"] == 0
        assert row["empty"] != row["empty"] or row["empty"] == 1

def test_score_counts_ghosts_and_losses():
    t = torch.zeros(4, 40, 40, dtype=torch.long); t[[0, 1, 3], :20] = 1
    ghost = torch.zeros_like(t); ghost[:, :20] = 1
    row = score_film(t, ghost)[0]
    assert (row["J"], row["empty"], row["J_back"]) == (1, 0, 1)
    row = score_film(t, torch.zeros_like(t))[0]
    assert (row["J"], row["empty"], row["lost"]) == (0, 1, 1)

def test_the_rule_matters(model, films):
    a, b = (Session(model, n_frames=5, rule=r) for r in (track.recent_frames, first_only))
    film = films[0][0]
    for s in (a, b):
        s.add(0, 1, mask=film.ids[0] == 1)
        for t in range(3): last = s.step(film.seen(t), t)
        s.read = last.read[1]
    assert len(a.read.cells) == 2 and len(b.read.cells) == 1


# the shipped file

@pytest.mark.weights
def test_shipped_memory_follows():
    from timet_nb.features.weights import is_cached
    if track.shipped_track() is None or not is_cached("dinov2-s14-imgfocus"):
        pytest.skip("no shipped memory, or the ViT is not in the cache")
    assert Path(track.shipped_track()).stat().st_size < 4e6
    model, clip = load_mini_track(), hiding_clip(1, "val", 4, True)
    steps = list(walk(model, clip.frames, (clip.masks[0] == 1).long()))
    ids = torch.stack([to_ids(m, clip.masks.shape[1:]) for _, m, _, _ in steps])
    assert score_film((clip.masks == 1).long(), ids)[0]["J"] > .5
