"42_model and 42_tune: settings, the shared prefix against six passes, teacher, bank, resume, files, the authors' checkpoints, real video."
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.base.train import Item
from timet_nb.data.layout import find_layout
from timet_nb.data.worlds import shipped_clips
from timet_nb.features.backbone import create_backbone
from timet_nb.timet.loss import KINDS
from timet_nb.timet.config import TimeTConfig
from timet_nb.timet.model import TimeT
from timet_nb.timet.tune import TokenBank, load_official, load_tuned, save_tuned, start_prototypes, thin, time_tune

SMALL = dict(backbone="test-vit", depth=None, size=64, views=0, augment="mini", max_frames=6, batch=4, steps=4,
             prototypes=12, head=(24, 16))


def small(**changes): return TimeTConfig.mini(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def clips(): return list(find_layout(shipped_clips()))[:5]


@pytest.fixture(scope="module")
def clip_batch(): return torch.rand(2, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def weights(result): return {n: t.cpu() for n, t in result.model.state_dict().items()}


def same(a, b): return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


# ---------------------------------------------------------------- settings
@pytest.mark.parametrize("wrong,word", [
    (dict(target="forward"), "same-position"), (dict(forwarder="teacher"), "prefix"), (dict(prototypes=0), "prototypes"),
    (dict(epsilon=0), "epsilon"), (dict(frames=1), "frames"), (dict(frames=2.5), "whole number"), (dict(batch=True), "batch"),
    (dict(queue=9, joint=False), "joint=False"), (dict(inverted_ema=True), "teacher=True"), (dict(official=True, soft=True), "argmax"),
    (dict(momentum=1.2), "momentum"), (dict(mask_keep=1.), "share"), (dict(mask=True, trained_blocks=0), "trained_blocks=0"),
    (dict(steps=0, epochs=0), "steps or epochs"), (dict(head=(0,)), "widths"), (dict(steps=5, warmup=5), "fewer than steps"),
    (dict(max_frames=3), "max_frames"), (dict(normalise="sometimes"), "never"), (dict(augment="much"), "mini")])
def test_contradictions_are_refused_by_name(wrong, word):
    with pytest.raises(ConfigError, match=word): TimeTConfig(**wrong)


def test_presets_and_files():
    for c in (TimeTConfig(), TimeTConfig.paper(), TimeTConfig.official(), TimeTConfig.mini()):
        assert TimeTConfig.from_dict(json.loads(json.dumps(asdict(c)))) == c
        with pytest.raises(Exception): c.steps = 1                                       # frozen
    with pytest.raises(ConfigError, match="did you mean 'lr_blocks'"): TimeTConfig.from_dict(dict(lr_block=1))
    d = TimeTConfig()
    effective = dict(epsilon=.05, iterations=10, temperature=.1, topk=5, radius=6, n_last=7, prototypes=200, frames=4,
                     batch=128, head=(1024, 1024, 512, 256), trained_blocks=2, queue=0, normalise="after", joint=True)
    assert all(getattr(d, k) == v for k, v in effective.items())
    o = TimeTConfig.official()
    assert o.teacher and o.inverted_ema and o.std228 and o.official


def test_the_authors_parameters_and_groups():
    model = TimeT(TimeTConfig(), create_backbone("vit_small_patch16_224", pretrained=False))
    assert sum(p.numel() for p in model.learning().values()) == 5_700_096 and len(model.learning()) == 33
    groups = {g["name"]: g for g in model.groups(1000)}
    assert {n: len(g["params"]) for n, g in groups.items()} == {
        "prototypes": 1, "head": 4, "head-biases": 4, "blocks": 8, "blocks-vectors": 16}
    rate = {n: (g["lr"](0), g["weight_decay"](0), g["weight_decay"](1000)) if callable(g["weight_decay"]) else
            (g["lr"](0), g["weight_decay"], g["weight_decay"]) for n, g in groups.items()}
    expected = {"prototypes": (1e-4, .04, .4), "head": (1e-4, .04, .4), "head-biases": (1e-4, 0, 0),
                "blocks": (1e-5, .04, .4), "blocks-vectors": (1e-5, 0, 0)}
    for n, e in expected.items(): assert rate[n] == pytest.approx(e)
    assert len(TimeT(small(head=(), trained_blocks=0)).groups(5)) == 1                    # nothing but prototypes


def test_bad_backbones():
    with pytest.raises(ConfigError, match="at most the 4"): TimeT(small(trained_blocks=5))
    with pytest.raises(ConfigError, match="a ViT"):
        TimeT(small(), create_backbone("efficientnet-lite0-imagenet", pretrained=False))
    with pytest.raises(DataError, match="60"): TimeT(small(size=60))                      # not a whole number of patches


# ---------------------------------------------------------------- the network
KINDS_OF_MODEL = [dict(target=t, soft=s, teacher=e, forwarder=f) for t in KINDS for s, e, f in
                  ((False, False, "student"), (True, True, "prefix"), (False, True, "student"))]
KINDS_OF_MODEL += [dict(mask=True), dict(mask=True, target="same-frame"), dict(queue=60), dict(joint=False), dict(head=()),
                   dict(trained_blocks=0), dict(trained_blocks=4), dict(official=True, teacher=True, inverted_ema=True, mask=True)]


@pytest.mark.parametrize("settings", KINDS_OF_MODEL, ids=str)
def test_shared_equals_unshared(settings, clip_batch):
    models = [TimeT(small(**{"forwarder": "student", **settings})) for _ in range(2)]
    for m in models:
        if m.queue is not None: m.queue.rows.copy_(torch.randn(60, 16, generator=torch.Generator().manual_seed(2)))
    seen = []
    for m, unshared in zip(models, (True, False)):
        out = m(clip_batch, unshared=unshared, generator=torch.Generator().manual_seed(1))
        out["loss"].backward()
        seen.append((out["loss"], {n: p.grad for n, p in m.learning().items()}))
    assert abs(seen[0][0] - seen[1][0]) < 1e-5
    for n, g in seen[0][1].items(): assert (g - seen[1][1][n]).abs().max() < 1e-5, n
    assert all(p.grad is None for p in models[1].parameters() if not p.requires_grad)


def test_shared_equals_unshared_at_the_shape_of_vit_s():
    m = TimeT(TimeTConfig(teacher=True), create_backbone("vit_small_patch16_224", pretrained=False))
    x = torch.rand(1, 4, 3, 224, 224)
    with torch.no_grad(): shared, unshared = (m(x, unshared=u)["loss"].item() for u in (False, True))
    assert abs(shared - unshared) < 1e-6


def test_tokens_and_frames_give_the_same_loss(clip_batch):
    m = TimeT(small())
    assert torch.equal(m(clip_batch)["loss"], m(tokens=m.prefix(clip_batch))["loss"])
    with pytest.raises(ConfigError, match="frames"): m()
    with pytest.raises(ConfigError, match="frames"): m(tokens=m.prefix(clip_batch), unshared=True)


@pytest.mark.parametrize("inverted", [False, True])
def test_teacher_rules_are_the_authors_two(golden, inverted):
    z = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden / "timet" / "ema.npz").items()}
    m = float(z["momentum"])
    model = TimeT(small(teacher=True, inverted_ema=inverted, head=(2,), momentum=m, momentum_end=m))
    twin, rows, k = model.teacher.tensors(), model.head[0].weight, 3
    with torch.no_grad():
        rows.zero_(); rows[:2, :3] = z["student_weight"]
        twin["tail.head.0.weight"].zero_(); twin["tail.head.0.weight"][:2, :3] = z["teacher_weight_before"]
    model.after_step(k, 100)
    want = z["teacher_weight_after_training_script" if inverted else "teacher_weight_after_eval_script_rule"]
    assert (twin["tail.head.0.weight"][:2, :3] - want).abs().max() < 1e-6


def test_teacher_prototypes_follow_and_stay_on_the_sphere(golden):
    z = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(golden / "timet" / "ema.npz").items()}
    m = float(z["momentum"])
    model = TimeT(small(teacher=True, inverted_ema=True, head=(2,), prototypes=4, momentum=m, momentum_end=m, normalise="after"))
    held = model.teacher.tensors()["prototypes.weight"]
    with torch.no_grad():
        model.prototypes.weight.copy_(z["student_prototypes"]); held.copy_(z["teacher_prototypes_before"])
    expected = F.normalize(z["teacher_prototypes_before"] * (1 - m) + F.normalize(z["student_prototypes"], dim=-1) * m, dim=-1)
    model.after_step(0, 10)
    assert (held - expected).abs().max() < 1e-6 and (held.norm(dim=1) - 1).abs().max() < 1e-6


def test_targets_for(clip_batch):
    m = TimeT(small(teacher=True))
    both = m.targets_for(clip_batch)
    assert both["ids"].shape == (2, 4, 8, 8) and both["maps"].shape == (2, 4, 12, 8, 8)
    one = m.targets_for(clip_batch[0])
    assert one["ids"].shape == (4, 8, 8) and (one["maps"].sum(1) - 1).abs().max() < 1e-5
    assert m.targets_for(torch.rand(2, 3, 48, 80))["ids"].shape == (2, 6, 10)


# ---------------------------------------------------------------- data
def test_thin():
    c = small(frame_start=1, frame_step=3, max_frames=4)
    assert thin(100, c) == [1, 4, 7, 10] and thin(5, c) == [1, 4]
    with pytest.raises(DataError, match="clip 'x'"): thin(1, c, "x")


def test_bank_holds_the_prefix_of_its_views(clips):
    m = TimeT(small(views=2))
    bank = TokenBank(clips[:2], m)
    assert bank.tokens[0].shape == (2, 6, 65, 48) and bank.tokens[0].dtype == torch.float16 and len(bank) == 4
    from timet_nb.data.clips import ClipAugment
    from timet_nb.data.frames import read_clip
    frames = read_clip(clips[0], thin(20, m.config), masks=False, dtype=torch.uint8)[0]
    whole = ClipAugment.none(64, fit="squash")(frames)[0]
    assert (m.backbone.frozen(whole) - bank.tokens[0][0].float()).abs().max() < .01
    again = TokenBank(clips[:2], m)
    assert torch.equal(again.tokens[1], bank.tokens[1])                                    # nothing is left to chance
    assert not torch.equal(TokenBank(clips[:2], m, seed=1).tokens[1][1], bank.tokens[1][1])
    item = bank[Item(3, 0, 5)]
    assert item["index"] == 1 and item["tokens"].shape == (4, 65, 48) and torch.equal(item["tokens"], bank[Item(1, 0, 5)]["tokens"])


def test_a_bank_for_another_model_is_refused(clips):
    bank = TokenBank(clips[:2], TimeT(small(views=1)))
    for other in (dict(trained_blocks=3), dict(size=72), dict(frames=3)):
        with pytest.raises(ConfigError, match="TokenBank"): time_tune(bank, small(views=1, **other), device="cpu")


def test_prototypes_start_from_patches(clips):
    m = TimeT(small(views=1, teacher=True))
    bank = TokenBank(clips[:2], m)
    start_prototypes(m, bank)
    assert torch.equal(m.teacher.tensors()["prototypes.weight"], m.prototypes.weight)
    rows = F.normalize(torch.cat([m.student(v.float())[1].flatten(0, 1) for t in bank.tokens for v in t]), dim=-1)
    assert ((rows @ m.prototypes.weight.T).amax(0) > .999).all()                           # each is the head feature of a patch
    with pytest.raises(DataError, match="at least 5000"): start_prototypes(TimeT(small(views=1, prototypes=5000)), bank)


# ---------------------------------------------------------------- runs
@pytest.mark.parametrize("settings", [dict(), dict(views=2), dict(teacher=True, queue=30, mask=True, forwarder="student"),
                                      dict(target="same-frame"), dict(normalise="before"), dict(joint=False, soft=True)], ids=str)
def test_a_run_is_sound(clips, settings):
    config = small(**settings)
    start = TimeT(config).state_dict()
    r = time_tune(clips, config, device="cpu")
    end, learn = weights(r), set(r.model.learning())
    assert len(r.history) == 4 and all(np.isfinite(h["loss"]) and 0 < h["used"] <= 1 for h in r.history)
    for n in learn: assert not torch.equal(start[n], end[n]), f"{n} did not learn"
    for n in start:
        if n.startswith("tail.backbone") and n not in learn: assert torch.equal(start[n], end[n]), f"{n} is frozen"
    unit = (end["prototypes.weight"].norm(dim=1) - 1).abs().max() < 1e-5
    assert unit == (config.normalise == "after")
    assert same(end, weights(time_tune(clips, config, device="cpu")))                      # repeatable
    assert not same(end, weights(time_tune(clips, config, device="cpu", seed=1)))


def test_workers_do_not_matter(clips):
    a, b = [weights(time_tune(clips, small(steps=2), device="cpu", workers=n)) for n in (0, 2)]
    assert same(a, b)


def test_killed_and_resumed_ends_with_the_same_bits(clips, tmp_path, monkeypatch):
    config = small(steps=6, teacher=True, queue=30)
    smooth = time_tune(clips, config, out=tmp_path / "smooth", device="cpu")

    class Killed(Exception): pass
    usual = TimeT.after_step

    def dies(self, i, total):
        usual(self, i, total)
        if i == 4: raise Killed
    monkeypatch.setattr(TimeT, "after_step", dies)
    with pytest.raises(Killed): time_tune(clips, config, out=tmp_path / "cut", device="cpu", save_every=2)
    monkeypatch.setattr(TimeT, "after_step", usual)
    cut = time_tune(clips, config, out=tmp_path / "cut", device="cpu", save_every=2)
    assert cut.fit.resumed == 4 and same(weights(smooth), weights(cut))
    assert [h["loss"] for h in smooth.history] == [h["loss"] for h in cut.history]
    with pytest.raises(ConfigError, match="epsilon"): time_tune(clips, replace(config, epsilon=.1), out=tmp_path / "cut", device="cpu")


def test_one_clip_one_video_file_and_a_folder(clips, tmp_path):
    from timet_nb.data.frames import read_clip, write_video
    one = time_tune(clips[:1], small(steps=1), device="cpu")
    assert len(one.history) == 1
    write_video(tmp_path / "my film.mp4", read_clip(clips[0], range(8), masks=False)[0], 8)
    film = time_tune(tmp_path / "my film.mp4", small(steps=1, views=1), device="cpu")
    assert film.bank.names == ["my film"] and film.bank.tokens[0].shape[1] == 4            # every second of 8 frames
    fresh = time_tune(tmp_path / "my film.mp4", small(steps=1, frame_step=1, max_frames=0), device="cpu")
    assert np.isfinite(fresh.history[0]["loss"])
    with pytest.raises(ConfigError, match="video file"): time_tune(tmp_path / "my film.mp4", small(steps=1), device="cpu")
    assert time_tune(shipped_clips(), small(steps=1, batch=2), device="cpu").fit.step == 1
    with pytest.raises(DataError): time_tune(tmp_path / "nothing here", small(), device="cpu")


# ---------------------------------------------------------------- files
def test_round_trip_and_plain_timm(clips, tmp_path):
    from timet_nb.base.runtime import import_timm
    from timet_nb.features.weights import load_header
    r = time_tune(clips, small(teacher=True, queue=30, norm="plain"), out=tmp_path, device="cpu")
    back = load_tuned(tmp_path)
    x = torch.rand(1, 4, 3, 64, 64)
    assert back.config == r.model.config
    assert torch.equal(back.targets_for(x)["maps"], r.model.targets_for(x)["maps"])
    assert same({n: t for n, t in back.state_dict().items() if ".norm." not in n}, {n: t for n, t in weights(r).items() if ".norm." not in n})
    header = load_header(tmp_path / "backbone.safetensors")["tuned"]
    assert header["config"]["target"] == "propagated" and header["steps"] == 4 and "torch" in header["environment"]["packages"]
    vit = eval(r.backbone.timm_call(str(tmp_path / "backbone.safetensors")), dict(timm=import_timm())).eval()
    with torch.no_grad():
        theirs = vit.forward_features((x[0] - r.backbone.mean) / r.backbone.std)[:, 1:]
    assert (theirs - r.backbone.tokens(x[0]).flatten(2).mT).abs().max() < 1e-4


def test_damaged_and_missing_files(clips, tmp_path):
    from timet_nb.features.weights import load_header, load_state, save_state
    with pytest.raises(CheckpointError, match="backbone.safetensors and no head"): load_tuned(tmp_path)
    save_tuned(TimeT(small()), tmp_path)
    head = tmp_path / "head.safetensors"
    state, about = load_state(head), load_header(head)
    save_state(head, {n: t for n, t in state.items() if n != "prototypes.weight"}, about)
    with pytest.raises(CheckpointError, match="prototypes.weight"): load_tuned(tmp_path)
    save_state(head, state, {})
    with pytest.raises(CheckpointError, match="no settings"): load_tuned(tmp_path)
    about["config"]["colour"] = "red"; save_state(head, state, about)
    with pytest.raises(ConfigError, match="colour"): load_tuned(tmp_path)
    head.write_bytes(head.read_bytes()[:200])
    with pytest.raises(CheckpointError): load_tuned(tmp_path)


def test_official_checkpoints(tmp_path):
    vit = create_backbone("vit_tiny_patch16_224", pretrained=False, depth=2)
    donor = TimeT(TimeTConfig(size=64, head=(20, 20, 18, 16), prototypes=9), vit, seed=4)
    flat = {f"feature_extractor.backbone.{n}": t for n, t in donor.backbone.vit.state_dict().items()}
    flat |= {f"feature_extractor.head.{n}": t for n, t in donor.head.state_dict().items()} | {"prototypes": donor.prototypes.weight.detach()}
    torch.save(flat, tmp_path / "TimeT.pth")
    read = load_official(tmp_path / "TimeT.pth", size=64)
    x = torch.rand(1, 4, 3, 64, 64)
    assert torch.equal(read(x)["loss"], donor(x)["loss"]) and list(read.config.head) == [20, 20, 18, 16]
    twin = {n.replace("feature_extractor", "teacher"): t + 1 for n, t in flat.items() if n != "prototypes"}
    torch.save(flat | twin | {"teacher_prototypes": flat["prototypes"].flip(0)}, tmp_path / "ema.pth")
    with pytest.raises(CheckpointError, match="student"): load_official(tmp_path / "ema.pth", size=64)
    s, t = [load_official(tmp_path / "ema.pth", network=n, size=64) for n in ("student", "teacher")]
    assert torch.equal(s.prototypes.weight, t.prototypes.weight.flip(0)) and not torch.equal(s.head[0].bias, t.head[0].bias)
    with_teacher = load_official(tmp_path / "TimeT.pth", size=64, teacher=True)
    assert torch.equal(with_teacher.teacher.tensors()["tail.head.0.weight"], donor.head[0].weight)
    bare = {n: v for n, v in flat.items() if ".backbone." in n}
    torch.save(bare, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="without head"): load_official(tmp_path / "bare.pth")
    nested = dict(epoch=3, model=flat)
    torch.save(nested, tmp_path / "resume.pth")
    assert torch.equal(load_official(tmp_path / "resume.pth", size=64).prototypes.weight, donor.prototypes.weight)


@pytest.mark.data
@pytest.mark.weights
def test_real_video_is_tuned(real_data, vit):
    layout = find_layout(real_data / "davis2016_train")
    r = time_tune(layout.clips[:2], TimeTConfig.mini(steps=2, batch=2, views=1, max_frames=4, size=112, prototypes=40), device="cpu")
    assert r.backbone.depth == 6 and all(np.isfinite(h["loss"]) for h in r.history)
    assert r.history[0]["moved"] > .1                                                      # real things move
