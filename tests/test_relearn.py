"Relearning: frames in a file, the student and what it may change, seeds, resume, inference of any length, files, faults."
import itertools
import json
import os
import random
import signal
import tracemalloc
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.data.decode import write_image
from timet_nb.data.decode_masks import read_mask, write_mask
from timet_nb.data.endoscopy import EndoscopyImages
from timet_nb.data.ultrasound import UltrasoundWorld, render_ultrasound, write_ultrasound
from timet_nb.features.weights import load_state, save_state
from timet_nb.relearn.apply import BUDGETS, GENERATED, Row, image_sets, open_images, run, steadiness, write_masks
from timet_nb.relearn.fewshot import FewShotConfig, create_fewshot
from timet_nb.relearn.films import Target, check_films, first_shown, open_videos, with_masks, with_support
from timet_nb.relearn.frames import Clips, FrameStore, as_video, bounce, draw_clip, windows
from timet_nb.relearn.losses import ConsistencyConfig, consistency
from timet_nb.relearn.relearn import _relearn_loss, load_images, load_relearned, relearn, segment_images
from timet_nb.relearn.report import counted, told, write_tinted
from timet_nb.relearn.student import RelearnConfig, Student
from timet_nb.relearn.support import read_annotation, read_support

S = 32
SMALL = dict(T=3, steps=3, clips=1, lr=1e-3, tau_lr=1e-2)


def film(n, seed=0, size=S):
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = torch.stack([(x - size / 3 - t) ** 2 + (y - size / 2) ** 2 < (size / 5) ** 2 for t in range(n)]).long()
    grain = .2 * torch.rand(n, 3, size, size, generator=g)
    return (.3 + .4 * masks[:, None] + grain), masks


@pytest.fixture(scope="module")
def net():
    net = create_fewshot(FewShotConfig.test(size=S, width=4, layers=2))
    g = torch.Generator().manual_seed(1)
    for m in net.modules():                  # as after training: statistics that are not those of a fresh network
        if isinstance(m, nn.BatchNorm2d): m.running_mean.copy_(.1 * torch.randn(len(m.running_mean), generator=g))
    return net


@pytest.fixture(scope="module")
def video():
    frames, masks = film(8)
    return as_video(frames, frames[0], masks[0], S, "film")


def state_of(m): return {k: v.clone() for k, v in m.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- frames

def test_store_gives_any_frame_and_keeps_bytes():
    frames = torch.randint(0, 256, (9, 3, 20, 20)).float() / 255
    store = FrameStore(frames, 20, "x")
    assert torch.equal(store[[7, 0, 7]], frames[[7, 0, 7]])
    assert store._map.nbytes == 9 * 3 * 400 and len(store) == 9
    with pytest.raises(DataError, match="frame 9"): store[[0, 9]]
    with pytest.raises(DataError, match="frame -1"): store[[-1]]
    with pytest.raises(ConfigError, match="size"): FrameStore(frames, 0)


def test_store_memory_is_flat_in_the_length():
    def held(n):
        tracemalloc.start()
        store = FrameStore((torch.full((3, 64, 64), k / n) for k in range(n)), 64)
        most = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        return most, store
    (few, _), (many, store) = held(8), held(128)
    assert many < 1.5 * few and many < store._map.nbytes / 4
    assert len(store) == 128 and abs(float(store[[64]].mean()) - .5) < .01


def test_frames_that_change_their_size_are_squares_and_keep_it(net):
    frames = [torch.rand(3, 20, 30), torch.rand(3, 30, 20), torch.rand(3, 48, 48)]
    v = as_video(frames, frames[0], torch.ones(20, 30).long(), S)
    assert v.frames.sizes == [(20, 30), (30, 20), (48, 48)] and v.frames[[0, 1, 2]].shape == (3, 3, S, S)
    r = relearn(net, v, RelearnConfig(**SMALL))
    assert [tuple(m.shape) for m in r.segment(v)] == v.frames.sizes
    assert [tuple(m.shape) for m in segment_images(net, v)] == v.frames.sizes


def test_a_broken_frame_is_named_with_its_video():
    frames, masks = film(5)
    frames[3, 0, 2, 2] = float("nan")
    with pytest.raises(DataError, match="film, frame 3"): as_video(frames, frames[0], masks[0], S, "film")
    with pytest.raises(DataError, match="no frame"): FrameStore([], S)
    with pytest.raises(DataError, match="frame 0"): FrameStore([torch.rand(1, 8, 8)], S)


def test_windows_cover_every_frame_with_neighbours():
    for n, T in itertools.product(range(2, 14), range(2, 6)):
        for overlap in range(T):
            plan = windows(n, T, overlap)
            assert {k for w in plan for k in w} == set(range(n)) and all(len(w) == T for w in plan)
            assert all(abs(a - b) == 1 for w in plan for a, b in zip(w, w[1:]))
    assert windows(7, 3) == [[0, 1, 2], [3, 4, 5], [4, 5, 6]] and windows(1, 3) == [[0, 0, 0]]
    for bad in ((0, 3, 0), (5, 0, 0), (5, 3, 3), (5, 3, -1)):
        with pytest.raises(ConfigError, match="windows"): windows(*bad)


def test_clips_are_neighbours_and_reach_both_ends():
    rng, seen = random.Random(0), Counter()
    for _ in range(300):
        c = draw_clip(9, 4, 1, rng); seen.update(c)
        assert [b - a for a, b in zip(c, c[1:])] == [1, 1, 1]
    assert set(seen) == set(range(9))
    assert all(abs(a - b) == 1 for _ in range(50) for c in [draw_clip(3, 5, 2, rng)] for a, b in zip(c, c[1:]))
    assert {b - a for c in [draw_clip(9, 4, 5, rng)] for a, b in zip(c, c[1:])} == {2}
    assert bounce(2, 5) == [0, 1, 0, 1, 0] and bounce(1, 3) == [0, 0, 0]


def test_batches_follow_from_seed_and_number_and_use_all_videos(video):
    frames, masks = film(5, 2)
    both = [video, as_video(frames, frames[0], masks[0], S)]
    c = SimpleNamespace(T=3, gap=1, clips=2)
    draw, again = Clips(both, c, 4), Clips(both, c, 4)
    assert torch.equal(draw(9)["frames"], again(9)["frames"])
    assert not torch.equal(Clips(both, c, 5)(9)["frames"], again(9)["frames"])
    counts = Counter(v for k in range(100) for v in draw(k)["video"].tolist())
    assert min(counts.values()) > 70 and set(counts) == {0, 1}


# --- support

def test_support_faults():
    frames, masks = film(3)
    bad = {"no object": (frames[0], 0 * masks[0]), "as its picture": (frames[0], masks[0][1:]),
           "2 pictures, 1 mask\\n": (frames[:2], masks[:1]), "0 pictures": ([], [])}
    for words, (x, m) in bad.items():
        with pytest.raises(DataError, match=words): as_video(frames, x, m, S, "film")
    unknown = torch.full_like(masks[0], 255)
    with pytest.raises(DataError, match="no object"): as_video(frames, frames[0], unknown, S)
    broken = frames[0].clone(); broken[0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="support picture 0 of film"): as_video(frames, broken, masks[0], S, "film")


def test_support_and_query_may_differ_in_size(net):
    frames, _ = film(4)
    big, mask = film(1, 3, 50)
    v = as_video(frames[:, :, :24], big[0], mask[0], S)
    assert [tuple(m.shape) for m in segment_images(net, v)] == [(24, 32)] * 4
    assert [tuple(m.shape) for m in relearn(net, v, RelearnConfig(**SMALL)).segment(v)] == [(24, 32)] * 4


# --- the student

def test_scale_zero_is_the_teacher_to_the_bit_and_the_published_scale_is_near(net, video):
    x = video.frames[[2, 3, 4]]
    with torch.no_grad():
        support = net.support(video.images, video.masks)
        want = net.head(net.fuse(x, support))
        for scale, most in ((0., 0.), (1e-2, .1)):
            f, z, got = Student(net, RelearnConfig(T=3, scale=scale))(x, support)
            assert float((got - want).abs().max()) <= most and (scale == 0) == torch.equal(f, z)
        far = Student(net, RelearnConfig(T=3, scale=1.))(x, support)[2]
        assert float((far - want).abs().max()) > .1


def test_without_tau_frames_do_not_see_each_other(net, video):
    x, support = video.frames[[2, 3, 4]], net.support(video.images, video.masks)
    other = torch.cat([x[:2], 1 - x[2:]])
    with torch.no_grad():
        for tau, moved in ((False, False), (True, True)):
            s = Student(net, RelearnConfig(T=3, tau=tau, scale=.5))
            assert torch.equal(s(x, support)[2][0], s(other, support)[2][0]) != moved


def test_frames_see_all_of_their_clip_and_nothing_of_another(net):
    s, z = Student(net, RelearnConfig(T=3, scale=.5)), torch.rand(6, 4, 8, 8)
    with torch.no_grad():
        plain = s.mix(z)
        for j in range(6):
            other = z.clone(); other[j] += 1
            moved = (s.mix(other) != plain).flatten(1).any(1).tolist()
            assert moved == [k // 3 == j // 3 for k in range(6)]
        assert torch.allclose(s.mix(z[3:]), plain[3:], atol=1e-5)  # a clip does not care for its neighbours in the batch


def test_the_student_is_where_it_was(net):
    import timet_nb.relearn.apply as apply
    import timet_nb.relearn.relearn as module
    assert (apply.Target, apply.first_shown, apply.open_videos, apply.with_support) == (Target, first_shown, open_videos, with_support)
    assert {"Target", "first_shown", "open_videos", "with_support", "run"} <= set(apply.__all__)
    assert module.Student is Student and module.RelearnConfig is RelearnConfig
    assert {"Clips", "Video", "as_video", "RelearnConfig", "Student", "relearn", "Relearned"} <= set(module.__all__)
    student, weights = Student(net, RelearnConfig(T=3)), net.state_dict()
    for k, v in student.net.state_dict().items(): assert torch.equal(v, weights[k]) and v.data_ptr() != weights[k].data_ptr()


def test_losses_are_taken_where_the_paper_takes_them(net, video):
    c = RelearnConfig(T=3, clips=1, scale=1.)
    student, batch = Student(net, c), Clips([video], c)(0)
    got = _relearn_loss(student, net, [video], batch)
    with torch.no_grad():
        support = net.support(video.images, video.masks)
        f, z_hat, logits = student(batch["frames"], support)
        z = net.fuse(batch["frames"], support); y = net.head(z).softmax(1)
        want = consistency(c.losses, f, z_hat, z, logits.softmax(1), y)
    for k in want: assert torch.allclose(got[k], want[k], atol=1e-6), k
    assert float(got["feature"]) < 1e-12 and float(got["prediction"]) > 0      # before TAU nothing moved, behind it much


def test_gradient_reaches_all_but_the_head_even_from_a_frozen_teacher(net, video):
    frozen = create_fewshot(net.config); frozen.load_state_dict(net.state_dict()); frozen.requires_grad_(False)
    student = Student(frozen, RelearnConfig(T=3, clips=1)).train()
    _relearn_loss(student, frozen, [video], Clips([video], student.config)(0))["loss"].backward()
    has = lambda m: any(p.grad is not None and bool(p.grad.any()) for p in m.parameters())
    assert has(student.net.pyramid) and has(student.net.mixers) and has(student.net.neck) and has(student.tau)
    assert not has(student.net.head) and not has(frozen)


def test_what_relearning_changes_and_what_not(net, video):
    before = state_of(net)
    r = relearn(net, video, RelearnConfig(**SMALL))
    assert same(before, state_of(net)) and not any(p.grad is not None for p in net.parameters())
    now = state_of(r.student.net)
    assert all(torch.equal(now[k], before[k]) for k in now if k.startswith("head."))
    assert all(torch.equal(now[k], before[k]) for k in now if "running" in k)       # statistics kept
    assert any(not torch.equal(now[k], before[k]) for k in now if k.startswith("pyramid."))
    assert not r.student.training and r.steps == 3 and len(r.history) == 3
    assert {"loss", "temporal", "feature", "prediction"} <= set(r.history[0])
    learned = relearn(net, video, RelearnConfig(**SMALL, head="learned", statistics="learned"))
    now = state_of(learned.student.net)
    assert any(not torch.equal(now[k], before[k]) for k in now if k.startswith("head."))
    assert any(not torch.equal(now[k], before[k]) for k in now if "neck" in k and "running_mean" in k)
    assert all(torch.equal(now[k], before[k]) for k in now if "pyramid" in k and "running" in k)


def test_seeds(net, video):
    c = RelearnConfig(**SMALL)
    a, b, other = (state_of(relearn(net, video, c, seed=s).student) for s in (3, 3, 4))
    assert same(a, b) and not same(a, other)


def test_a_stopped_run_ends_with_the_same_bits(net, video, tmp_path):
    c = RelearnConfig(**{**SMALL, "steps": 5})
    whole = relearn(net, video, c, tmp_path / "whole")
    class Stop(Exception): pass
    def stop(student, step):
        if step == 2: raise Stop
    with pytest.raises(Stop): relearn(net, video, c, tmp_path / "cut", after_step=stop, save_every=1)
    again = relearn(net, video, c, tmp_path / "cut", resume=True)
    assert same(state_of(whole.student), state_of(again.student))
    assert [h["loss"] for h in whole.history] == [h["loss"] for h in again.history]


def test_a_run_is_not_continued_with_another_T_or_another_teacher(net, video, tmp_path):
    c = RelearnConfig(**SMALL)
    relearn(net, video, c, tmp_path)
    with pytest.raises(ConfigError, match=r"config\.T: 3 then, 4 now"): relearn(net, video, replace(c, T=4), tmp_path)
    with pytest.raises(ConfigError, match="config.teacher"):
        relearn(create_fewshot(net.config, 9), video, c, tmp_path)


def test_a_set_uses_every_video_with_its_own_support(net, monkeypatch):
    films = [film(6, k) for k in range(3)]
    videos = [as_video(f, f[k], m[k], S, f"film {k}") for k, (f, m) in enumerate(films)]
    c, asked = RelearnConfig(**{**SMALL, "clips": 2, "steps": 6}), Counter()
    own = {id(v.images[0]): k for k, v in enumerate(videos)}
    look = type(net).support
    def seen(self, images, masks):
        k = own[id(images[0])]; asked[k] += 1
        assert masks[0] is videos[k].masks[0]
        return look(self, images, masks)
    monkeypatch.setattr(type(net), "support", seen)
    relearn(net, videos, c)
    assert set(asked) == {0, 1, 2}


def test_mixed_batches_equal_single_ones(net):
    films = [film(6, k) for k in range(2)]
    videos = [as_video(f, f[k], m[k], S, f"film {k}") for k, (f, m) in enumerate(films)]
    c = RelearnConfig(T=3, clips=2, scale=.5)
    student = Student(net, c)
    x = [v.frames[[1, 2, 3]] for v in videos]
    both = _relearn_loss(student, net, videos, dict(frames=torch.cat(x), video=torch.tensor([0, 1])))
    each = [_relearn_loss(student, net, videos, dict(frames=x[k], video=torch.tensor([k]))) for k in (0, 1)]
    for k in both: assert torch.allclose(both[k], (each[0][k] + each[1][k]) / 2, atol=1e-5), k


def test_the_teacher_looks_at_a_support_once_and_the_student_at_every_step(net, video, monkeypatch):
    asked, plain = [], type(net).support
    monkeypatch.setattr(type(net), "support", lambda self, *a: asked.append(self.training) or plain(self, *a))
    relearn(net, video, RelearnConfig(**SMALL | dict(steps=3)))
    assert asked.count(False) == 1 and asked.count(True) == 3          # the teacher is in eval mode


def test_relearn_faults(net, video):
    c = RelearnConfig(**SMALL)
    frames, masks = film(3)
    single = as_video(frames[:1], frames[0], masks[0], S, "still")
    with pytest.raises(DataError, match="still.*two or more"[:5]): relearn(net, single, c)
    with pytest.raises(DataError, match="the model's size"): relearn(net, as_video(frames, frames[0], masks[0], 48), c)
    with pytest.raises(DataError, match="as_video"): relearn(net, [frames], c)
    with pytest.raises(DataError, match="one or more"): relearn(net, [], c)
    two = as_video(frames, frames[:2], masks[:2], S, "two shots")
    with pytest.raises(DataError, match="annotated frames"): relearn(net, [video, two], c)
    relearn(net, [two], replace(c, steps=1))                                   # by itself it is fine
    for bad in (dict(T=1), dict(gap=0), dict(steps=0), dict(clips=0), dict(lr=-1.), dict(clip=0.), dict(head="thawed"),
                dict(statistics="batch"), dict(losses=dict(temporal=-1.))):
        with pytest.raises(ConfigError): RelearnConfig(**bad)
    with pytest.raises(ConfigError, match="tempora"): RelearnConfig(losses=dict(tempora=1.))


# --- inference

def test_a_video_shorter_than_T_and_a_still_are_answered(net):
    frames, masks = film(3)
    r = relearn(net, as_video(frames, frames[0], masks[0], S), RelearnConfig(**{**SMALL, "T": 5}))
    for n in (1, 2, 3):
        out = list(r.segment(as_video(frames[:n], frames[0], masks[0], S)))
        assert len(out) == n and all(set(m.unique().tolist()) <= {0, 1} for m in out)
    with pytest.raises(DataError, match="T = 5"): r.student.mix(torch.rand(3, 4, 8, 8))


def test_overlap_is_the_mean_of_the_windows(net, video):
    student = Student(net, RelearnConfig(T=3, scale=1.))
    support, by_hand = net.support(video.images, video.masks), {k: [] for k in range(8)}
    with torch.no_grad():
        for w in windows(8, 3, 2):
            logits = student(video.frames[w], support)[2]
            p = nn.functional.interpolate(logits, (S, S), mode="bilinear").softmax(1)[:, 1]
            for k, q in zip(w, p): by_hand[k].append(q)
    got = list(student.probabilities(video, 2))
    for k, p in enumerate(got): assert torch.allclose(p, torch.stack(by_hand[k]).mean(0), atol=1e-6)
    assert len(by_hand[3]) == 3
    with pytest.raises(ConfigError, match="overlap"): list(student.probabilities(video, 3))
    with pytest.raises(ConfigError, match="train mode"): next(student.train().probabilities(video))


def test_inference_keeps_a_window_of_maps_only(net):
    frames, masks = film(30)
    v, student = as_video(frames, frames[0], masks[0], S), Student(net, RelearnConfig(T=3))
    read, each = [], type(v.frames).__getitem__
    class Counting(type(v.frames)):
        def __getitem__(self, numbers): read.append(len(numbers)); return each(self, numbers)
    v.frames.__class__ = Counting
    walk = student.probabilities(v, 0)
    next(walk)
    assert read == [3]                                         # one window was read for the first frame
    assert sum(1 for _ in walk) == 29 and max(read) == 3


def test_tau_learns_with_one_clip_and_uses_its_statistics_afterwards(net, video):
    r = relearn(net, video, RelearnConfig(**SMALL))
    assert int(r.student.tau.norm1.num_batches_tracked) == 3
    before = state_of(r.student)
    list(r.segment(video))
    assert same(before, state_of(r.student))


# --- files

def test_saved_and_read_again(net, video, tmp_path):
    r = relearn(net, video, RelearnConfig(**SMALL, losses=ConsistencyConfig(temporal=2.)))
    path = r.save(tmp_path / "s.safetensors", dict(note="x"))
    back = load_relearned(path)
    assert back.student.config == r.student.config and back.steps == 3 and back.history == []
    assert all(torch.equal(a, b) for a, b in zip(r.segment(video), back.segment(video)))
    assert load_relearned(path, T=3).student.config.T == 3
    with pytest.raises(CheckpointError, match=r"T = 3 frames\n.*T = 5"): load_relearned(path, T=5)


def test_a_checkpoint_of_another_T_is_refused_in_words(net, video, tmp_path):
    three, five = Student(net, RelearnConfig(T=3)), Student(net, RelearnConfig(T=5))
    with pytest.raises(CheckpointError, match=r"T = 3 frames \(12 channels\)\n.*T = 5 frames"): five.load_state_dict(three.state_dict())
    none = Student(net, RelearnConfig(T=3, tau=False))
    with pytest.raises(CheckpointError, match="no TAU block"): three.load_state_dict(none.state_dict())
    five.load_state_dict(Student(net, RelearnConfig(T=5), seed=1).state_dict())
    r = relearn(net, video, RelearnConfig(**SMALL))            # a header that lies
    path = r.save(tmp_path / "s.safetensors")
    from timet_nb.features.weights import load_header
    notes = load_header(path); notes["config"]["T"] = 4
    save_state(tmp_path / "lies.safetensors", load_state(path), notes)
    with pytest.raises(CheckpointError, match="T = 3 frames"): load_relearned(tmp_path / "lies.safetensors")


def test_other_files_are_refused(net, tmp_path):
    path = net.save(tmp_path / "images.safetensors")
    with pytest.raises(CheckpointError, match="Relearned.save"): load_relearned(path)
    with pytest.raises(CheckpointError): load_relearned(tmp_path / "none.safetensors")


# --- folders to masks

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Two videos in DAVIS layout, an image model, and a reference in two files."
    root = tmp_path_factory.mktemp("world")
    write_ultrasound(root / "videos", UltrasoundWorld("heart", 64, frames=4), 2)
    create_fewshot(FewShotConfig.test()).save(root / "model.safetensors")
    clip = render_ultrasound(UltrasoundWorld("heart", 64, frames=1), 7)
    write_image(root / "frame.png", clip.frames[0]); write_mask(root / "mask.png", 2 * clip.masks[0])   # id 2: still the object
    return root


def test_steadiness_by_hand_and_that_it_is_no_score():
    a, b = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[0, 1, 0, 0]])
    assert steadiness([a, b, 0 * a, 0 * a]) == [2 / 3, 0, 1.] and steadiness([a]) == []
    assert steadiness([a] * 5) == [1.] * 4                     # a constant mask is perfectly steady
    wide = torch.tensor([[1] * 4 + [0] * 4] * 2)
    assert steadiness([a, wide]) == [1.]                       # another size: brought to it


def test_masks_are_written_and_judged(tmp_path):
    _, masks = film(4)
    truth = {k: lambda k=k: masks[k] for k in (0, 2, 3)}
    steady, known, n = write_masks((m for m in masks), tmp_path / "a", {k: truth[k] for k in (2, 3)})
    assert (n, len(steady), known.n, known.dice) == (4, 3, 2, 1.)
    assert torch.equal(read_mask(tmp_path / "a" / "00002.png"), masks[2])
    assert write_masks((m for m in masks), tmp_path / "b", truth)[1].n == 3
    steady, known, n = write_masks((m for m in masks), tmp_path / "c", {})
    assert known is None and n == 4


def test_per_video_and_per_set(world, tmp_path):
    rows = run(None, world / "videos", out=tmp_path / "each", model=world / "model.safetensors", budget="smoke", steps=1)
    assert [r.frames for r in rows] == [4, 4] and all(isinstance(r, Row) for r in rows)
    assert all(0 <= r.dice_after <= 1 and 0 <= r.steady_after <= 1 for r in rows)
    for r in rows:
        for kind in ("before", "masks"): assert len(list((tmp_path / "each" / kind / r.video).glob("*.png"))) == 4
    assert [r["video"] for r in json.loads((tmp_path / "each" / "answers.json").read_text())["videos"]] == [r.video for r in rows]
    run(None, world / "videos", out=tmp_path / "set", model=world / "model.safetensors", per="set", budget="smoke", steps=1)
    students = lambda d: sorted(p.parent.name for p in (tmp_path / d).rglob("student.safetensors"))
    assert students("set") == ["set"] and students("each") == sorted(r.video for r in rows)


def test_a_video_without_masks_needs_a_support(world, tmp_path):
    root = tmp_path / "plain"
    for k, f in enumerate(film(4, size=64)[0]): write_image(root / f"{k:05d}.png", f)
    model = world / "model.safetensors"
    with pytest.raises(DataError, match="--support"): run(None, root, out=tmp_path / "o", model=model)
    assert not (tmp_path / "o").exists()                       # refused before anything is written
    row, = run(None, root, [(world / "frame.png", world / "mask.png")], tmp_path / "o", model, budget="smoke", steps=1)
    assert row.dice_before is None and row.dice_after is None and row.frames == 4


def test_run_faults(world, tmp_path):
    model, videos = world / "model.safetensors", world / "videos"
    film_file = tmp_path / "film"
    for k, f in enumerate(film(3, size=64)[0]): write_image(film_file / f"{k}.png", f)
    (tmp_path / "full").mkdir(); (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(DataError, match="not empty"): run(None, videos, out=tmp_path / "full", model=model)
    with pytest.raises(DataError, match="inside the data"): run(None, videos, out=videos / "new", model=model)
    with pytest.raises(DataError, match="inside the data"): run(world, film_file, [(world / "frame.png", world / "mask.png")], world / "new", model)
    with pytest.raises(ConfigError, match="per: got 'frame'"): run(None, videos, out=tmp_path / "o", model=model, per="frame")
    with pytest.raises(ConfigError, match="budget: got 'huge'"): run(None, videos, out=tmp_path / "o", model=model, budget="huge")
    with pytest.raises(ConfigError, match="images"): run(None, videos, out=tmp_path / "p")
    with pytest.raises(DataError): run(None, tmp_path / "no-such", out=tmp_path / "o", model=model)
    (tmp_path / "text.txt").write_text("no video")
    with pytest.raises(DataError, match="text.txt"): run(None, tmp_path / "text.txt", out=tmp_path / "o", model=model)
    (tmp_path / "fake.dcm").write_text("no dicom" * 50)
    pytest.importorskip("pydicom")
    with pytest.raises(DataError, match="fake.dcm"):
        run(None, tmp_path / "fake.dcm", [(world / "frame.png", world / "mask.png")], tmp_path / "o2", model)
    empty = tmp_path / "empty.png"; write_mask(empty, torch.zeros(64, 64).long())
    with pytest.raises(DataError, match="no object"): run(None, videos, [(world / "frame.png", empty)], tmp_path / "o3", model)


def test_a_target_whose_mask_lies_beyond_its_end():
    t = Target("short", lambda: iter(film(2)[0]), {5: lambda: torch.ones(S, S).long()})
    with pytest.raises(DataError, match="frame 5"): with_support(t, S)


def test_dicom_is_known_by_its_content_too(tmp_path):
    pytest.importorskip("pydicom")
    from timet_nb.data.dicom import echo_path
    (tmp_path / "IM_0001").write_bytes(echo_path().read_bytes())
    target, = open_videos(tmp_path / "IM_0001")
    assert target.name == "IM_0001" and next(iter(target.frames())).shape[0] == 3 and not target.masks


def test_image_sets(tmp_path, world):
    organs, = ([s.group for s in image_sets("ultrasound", 64, 3)],)
    assert organs == ["breast", "thyroid", "ovary"] and isinstance(image_sets("endoscopy", 64, 3)[0], EndoscopyImages)
    assert set(GENERATED) == {"ultrasound", "endoscopy"}
    for organ in ("breast", "ovary"): write_ultrasound(tmp_path / "all" / organ, UltrasoundWorld(organ, 64), 3)
    sets = image_sets(tmp_path / "all", 32)
    assert [len(s) for s in sets] == [3, 3] and sets[0][0][0].shape == (3, 32, 32)
    with pytest.raises(DataError): image_sets(tmp_path / "none", 32)
    assert [len(s) for s in image_sets(world / "videos", 32)] == [8]         # two films of four annotated frames


def test_an_image_model_is_trained_when_there_is_none(tmp_path):
    net = open_images("ultrasound", budget="smoke", out=tmp_path)
    back = open_images(None, tmp_path / "image-model.safetensors")
    assert same(state_of(net), state_of(back)) and set(BUDGETS) == {"smoke", "cpu", "gpu"}
    with pytest.raises(ConfigError, match="budget"): open_images("ultrasound", budget="big")


def test_folders_of_changing_size_and_stills_are_refused_by_name(world, tmp_path):
    frames, _ = film(4, size=64)
    for k in range(4): write_image(tmp_path / "turned" / f"{k}.png", frames[k][:, :64 - 8 * (k // 2)])
    shown = [(world / "frame.png", world / "mask.png")]
    with pytest.raises(DataError, match="2.png: got 56 x 64"):
        run(None, tmp_path / "turned", shown, tmp_path / "a", world / "model.safetensors")
    with pytest.raises(DataError, match="two or more: neighbours"):
        run(None, world / "frame.png", shown, tmp_path / "b", world / "model.safetensors")


def test_a_film_may_begin_without_the_object(tmp_path):
    "The support is the first frame that shows something; only it is left out of the score, and a film that never shows anything is named."
    frames, masks = film(6)
    masks[0] = 0
    polyp = Target("late", lambda: iter(frames), {i: (lambda i=i: masks[i]) for i in range(6)})
    assert first_shown(polyp) == 1 and torch.equal(with_support(polyp, S).images[0], frames[1])
    nothing = Target("never", lambda: iter(frames), {0: lambda: masks[0]})
    with pytest.raises(DataError, match="(?s)never.*no object in any of 1 mask\\n.*--support"): with_support(nothing, S)
    for i, (x, m) in enumerate(zip(frames, masks)):
        write_image(tmp_path / "film" / "JPEGImages" / "480p" / "late" / f"{i:05d}.jpg", x)
        write_mask(tmp_path / "film" / "Annotations" / "480p" / "late" / f"{i:05d}.png", m)
    images = write_ultrasound(tmp_path / "images", UltrasoundWorld("breast", S, seed=1), 4)
    row, = run(images, tmp_path / "film", out=tmp_path / "out", budget="smoke", steps=1)
    assert row.frames == 6 and row.dice_before is not None


def test_films_are_checked_before_anything_is_trained():
    frames, masks = film(3)
    def of(masks, n=3, name="f"): return Target(name, lambda: iter(frames[:n]), masks)
    own = {1: lambda: masks[1]}
    check_films([of(own), of(own, name="g")]); check_films([of({})], ([frames[0]], [masks[0]]))
    for bad, words in ((of({}), "--support"), (of(own, 1), "frame 1, which is not there"), (of({0: lambda: masks[0][1:]}), "support mask of f"),
                       (of({0: lambda: masks[0]}, 1), "two or more")):
        with pytest.raises(DataError, match=words): check_films([bad])
    with pytest.raises(DataError, match="several are called 'f'"): check_films([of(own), of(own)])


def test_two_films_of_one_name_are_refused(monkeypatch, tmp_path):
    frames, masks = film(3)
    twin = Target("a", lambda: iter(frames), {0: lambda: masks[0]})
    monkeypatch.setattr("timet_nb.relearn.apply.open_videos", lambda source, notes: [twin, twin])
    with pytest.raises(DataError, match="several are called 'a'"): run("ultrasound", tmp_path, out=tmp_path.parent / "new", budget="smoke")


# --- what fails early leaves nothing behind

def refused(tmp_path, match, error, images, video, support=None, **options):
    "A run that is refused; its output folder is not there afterwards."
    out = tmp_path / "new" / "folder"
    with pytest.raises(error, match=match): run(images, video, support, out, **{"budget": "smoke", "steps": 1, **options})
    assert not out.exists() and not out.parent.exists()


@pytest.fixture
def no_training(monkeypatch):
    "A fault that is found early is found before any training."
    def never(*_, **__): raise AssertionError("training began")
    for name in ("train_images", "relearn"): monkeypatch.setattr(f"timet_nb.relearn.apply.{name}", never)


def test_a_bad_model_leaves_no_folder_behind(world, tmp_path, no_training):
    (tmp_path / "text.safetensors").write_text("no weights")
    net = create_fewshot(FewShotConfig.test())
    save_state(tmp_path / "other.safetensors", net.state_dict(), dict(kind="another"))
    for name, match in (("none.safetensors", "no such file"), ("text.safetensors", "text.safetensors"), ("other.safetensors", "FewShotNet.save"), (".", "no such file")):
        refused(tmp_path, match, CheckpointError, None, world / "videos", model=tmp_path / name)


def test_bad_images_leave_no_folder_behind(world, tmp_path, no_training):
    videos = world / "videos"
    refused(tmp_path, "none: got no such folder", DataError, tmp_path / "none", videos)
    refused(tmp_path, "films to be segmented", DataError, videos, videos)
    refused(tmp_path, "annotated images, or a model", ConfigError, None, videos)
    images = write_ultrasound(tmp_path / "images", UltrasoundWorld("breast", S, seed=1), 3)
    first = sorted(p for p in images.rglob("*.png") if "mask" not in p.name)[0]
    first.write_text("version https://git-lfs.github.com/spec/v1")          # a pointer, as git without LFS leaves it
    refused(tmp_path, "breast.*git-lfs", DataError, images, videos)


def test_one_picture_is_no_set(world, tmp_path):
    refused(tmp_path, "sets of 2 pictures or more", DataError, write_ultrasound(tmp_path / "images", UltrasoundWorld("breast", S, seed=1), 1), world / "videos")


def test_bad_videos_leave_no_folder_behind(world, tmp_path, no_training):
    model, shown = world / "model.safetensors", [(world / "frame.png", world / "mask.png")]
    for name in ("text.mp4", "fake.dcm"): (tmp_path / name).write_text("nothing to be seen" * 20)
    (tmp_path / "frames").mkdir()
    for k in range(3): write_image(tmp_path / "frames" / f"{k}.png", torch.rand(3, S, S))
    (tmp_path / "frames" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    for name, match in (("gone.mp4", "gone.mp4"), ("text.mp4", "text.mp4"), ("gone.dcm", "gone.dcm|pip install"), ("fake.dcm", "fake.dcm|pip install"), ("frames", "1.png")):
        refused(tmp_path, match, (DataError, ConfigError), None, tmp_path / name, shown, model=model)
    refused(tmp_path, "frame: got 1 frame\n.*two or more: neighbours", DataError, None, world / "frame.png", shown, model=model)
    refused(tmp_path, "name of a video", DataError, None, None, shown, model=model)


def test_bad_supports_leave_no_folder_behind(world, tmp_path, no_training):
    model, videos = world / "model.safetensors", world / "videos"
    write_mask(tmp_path / "small.png", torch.ones(32, 32).long())
    (tmp_path / "text.png").write_text("no mask")
    for mask, match in (("gone.png", "gone.png"), ("small.png", "(?s)small.png: got 32 x 32.*64 x 64.*frame.png"), ("text.png", "text.png")):
        refused(tmp_path, match, DataError, None, videos, [(world / "frame.png", tmp_path / mask)], model=model)
    refused(tmp_path, "gone.png", DataError, None, videos, [(tmp_path / "gone.png", world / "mask.png")], model=model)


def test_own_support_of_another_size_is_refused_first(world, tmp_path, no_training):
    frames, masks = film(3, size=64)
    for i, (x, m) in enumerate(zip(frames, masks)):
        write_image(tmp_path / "film" / "JPEGImages" / "480p" / "thin" / f"{i:05d}.jpg", x)
        write_mask(tmp_path / "film" / "Annotations" / "480p" / "thin" / f"{i:05d}.png", m[:, :40])
    refused(tmp_path, "thin", DataError, None, tmp_path / "film", model=world / "model.safetensors")


def test_bad_output_folders_and_devices(world, tmp_path, no_training):
    model, videos = world / "model.safetensors", world / "videos"
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="file"): run(None, videos, out=out, model=model, budget="smoke")
    assert (tmp_path / "file").read_text() == "x"
    with pytest.raises(DataError, match="name of a new folder"): run(None, videos, out=None, model=model, budget="smoke")
    refused(tmp_path, "device 'cudo'", ConfigError, None, videos, model=model, device="cudo")


def test_images_beside_a_model_are_not_used_and_it_says_so(world, tmp_path, capsys):
    run("ultrasound", world / "videos", out=tmp_path / "a", model=world / "model.safetensors", budget="smoke", steps=1)
    said = capsys.readouterr().out
    assert f"image model: {world / 'model.safetensors'}; ultrasound: not used" in said and not (tmp_path / "a" / "images").exists()
    run(None, world / "videos", out=tmp_path / "b", model=world / "model.safetensors", budget="smoke", steps=1)
    assert "not used" not in capsys.readouterr().out


def test_a_folder_of_sets_with_a_fault_names_the_fault(tmp_path):
    "The fault of the folder itself, where nothing below is a set; else that of the one below; hidden folders are no sets."
    write_ultrasound(tmp_path / "all" / "breast", UltrasoundWorld("breast", S), 2)
    write_ultrasound(tmp_path / "all" / "ovary", UltrasoundWorld("ovary", S), 2)
    (tmp_path / "all" / ".cache").mkdir()
    assert len(image_sets(tmp_path / "all", S)) == 2
    (tmp_path / "all" / "zebra").mkdir()
    with pytest.raises(DataError, match="zebra"): image_sets(tmp_path / "all", S)
    for half in ("trainval", "test"):
        write_image(tmp_path / "tn3k" / f"{half}-image" / "0000.png", torch.rand(3, S, S))
        write_mask(tmp_path / "tn3k" / f"{half}-mask" / "0000.png", torch.ones(S, S).long())
    (tmp_path / "tn3k" / "tn3k-trainval-fold0.json").write_text("[")
    with pytest.raises(DataError, match="fold0.json"): image_sets(tmp_path / "tn3k", S)


def test_a_fault_inside_a_set_of_videos_is_not_taken_for_no_masks(tmp_path):
    "HMC-QU with a broken table: the table is named, rather than a film 'without masks'."
    from timet_nb.data.decode_video import write_video
    write_video(tmp_path / "HMC-QU" / "A4C" / "a.avi", torch.zeros(3, 3, S, S), 25)
    (tmp_path / "LV Ground-truth Segmentation Masks").mkdir()
    (tmp_path / "A4C.xlsx").write_bytes(b"no zip")
    with pytest.raises(DataError, match="A4C.xlsx"): open_videos(tmp_path)


# --- stopped and gone on

ASK = dict(budget="smoke", steps=3)


def stop_in(monkeypatch, name, step, calls=1):
    "Ctrl-C within a step of `train_images` or `relearn`, in its n-th call from now."
    import timet_nb.relearn.apply as A
    real, seen = getattr(A, name), []
    def press(model, at):
        if at == step and len(seen) == calls: os.kill(os.getpid(), signal.SIGINT)
    def wrapped(*given, **options): seen.append(1); return real(*given, after_step=press, **options)
    monkeypatch.setattr(A, name, wrapped)


def masks_of(out): return {p.relative_to(out).as_posix(): p.read_bytes() for k in ("before", "masks", "tinted") for p in sorted((out / k).rglob("*.*"))}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    "A run with an image training that nobody stopped, and its images."
    root = tmp_path_factory.mktemp("whole")
    images = write_ultrasound(root / "images", UltrasoundWorld("breast", S, seed=1), 4)
    return images, run(images, world / "videos", out=root / "out", **ASK), root / "out"


@pytest.mark.parametrize("name, step, calls", [("train_images", 1, 1), ("relearn", 0, 1), ("relearn", 1, 2)])
def test_a_run_that_was_stopped_ends_with_the_same_bits(world, whole, tmp_path, monkeypatch, capsys, name, step, calls):
    images, rows, out = whole
    call = dict(images=images, video=world / "videos", out=tmp_path / "cut", **ASK)
    with monkeypatch.context() as m:
        stop_in(m, name, step, calls)
        with pytest.raises(KeyboardInterrupt): run(**call)
    said = capsys.readouterr().err
    assert said.count("the same call with --resume goes on") == 1 and "stopped at step" in said
    with pytest.raises(DataError, match="(?s)was stopped.*--resume"): run(**call)
    assert run(**call, resume=True) == rows and masks_of(tmp_path / "cut") == masks_of(out)
    a, b = (load_state(d / "image-model.safetensors") for d in (out, tmp_path / "cut"))
    assert same(a, b)
    for r in rows: assert same(*(load_state(d / "relearn" / r.video / "student.safetensors") for d in (out, tmp_path / "cut")))
    assert [json.loads((d / "answers.json").read_text())["videos"] for d in (out, tmp_path / "cut")] == 2 * [json.loads((out / "answers.json").read_text())["videos"]]


def test_finished_videos_are_not_relearned_again(world, whole, tmp_path, monkeypatch):
    images, rows, _ = whole
    call = dict(images=None, video=world / "videos", out=tmp_path / "cut", model=world / "model.safetensors", **ASK)
    with monkeypatch.context() as m:
        stop_in(m, "relearn", 1, 2)
        with pytest.raises(KeyboardInterrupt): run(**call)
    first = sorted((tmp_path / "cut" / "masks").rglob("*.png"))
    times, asked = {p: p.stat().st_mtime_ns for p in first}, []
    assert len(times) == 4                                     # the first film only
    import timet_nb.relearn.apply as A
    real = A.relearn
    monkeypatch.setattr(A, "relearn", lambda net, videos, *a, **k: asked.append([v.frames.name for v in videos]) or real(net, videos, *a, **k))
    rows = run(**call, resume=True)
    assert asked == [[rows[1].video]] and times == {p: p.stat().st_mtime_ns for p in first}
    assert run(**call, resume=True) == rows and len(asked) == 1       # and all of it again: nothing is left to do


def test_other_arguments_and_other_folders_are_not_resumed(world, tmp_path, monkeypatch):
    call = dict(images=None, video=world / "videos", out=tmp_path / "cut", model=world / "model.safetensors", **ASK)
    with monkeypatch.context() as m:
        stop_in(m, "relearn", 1)
        with pytest.raises(KeyboardInterrupt): run(**call)
    for other, words in ((dict(seed=1), "seed: 0 then, 1 now"), (dict(steps=4), "steps: 3 then, 4 now"), (dict(per="set"), "per: 'video' then, 'set' now"),
                         (dict(support=[(world / "frame.png", world / "mask.png")]), "support: .*frame.png"), (dict(model=world / "other.safetensors"), "model: .*other.safetensors")):
        with pytest.raises(ConfigError, match=words): run(**{**call, **other}, resume=True)
    with pytest.raises(ConfigError, match="(?s)where no run was stopped.*leave --resume out"): run(**{**call, "out": tmp_path / "new"}, resume=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir(); (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(ConfigError, match="no run was stopped"): run(**{**call, "out": tmp_path / "full"}, resume=True)


def test_ctrl_c_in_a_shell_is_130_and_one_line(world, tmp_path, monkeypatch, capsys):
    from timet_nb.cli import main
    words = ["relearn", "none", str(world / "videos"), "--model", str(world / "model.safetensors"), "--out", str(tmp_path / "cut"),
             "--budget", "smoke", "--steps", "3", "--device", "cpu"]
    with monkeypatch.context() as m:
        stop_in(m, "relearn", 1)
        with pytest.raises(SystemExit) as e: main(words)
    said = capsys.readouterr()
    assert e.value.code == 130 and "Traceback" not in said.err
    assert [x for x in said.err.splitlines() if "stopped" in x] == ["stopped at step 2 of 3 and saved: the same call with --resume goes on from there"]
    with monkeypatch.context() as m:                           # not in training: while masks are written
        def press(*_, **__): raise KeyboardInterrupt
        m.setattr("timet_nb.relearn.apply.write_masks", press)
        with pytest.raises(SystemExit) as e: main([*words, "--resume"])
    assert e.value.code == 130 and capsys.readouterr().err.strip().splitlines()[-1] == "stopped: the same call with --resume goes on"
    main([*words, "--resume"])
    assert "marked in" in capsys.readouterr().out


# --- what is said and kept

def test_nothing_found_is_said(world, tmp_path, capsys, monkeypatch):
    for k, f in enumerate(film(4, size=64)[0]): write_image(tmp_path / "film" / f"{k}.png", f)
    net = create_fewshot(FewShotConfig.test())
    with torch.no_grad(): net.head[-1].weight.zero_(); net.head[-1].bias.copy_(torch.tensor([9., -9.]))
    net.save(tmp_path / "blind.safetensors")
    from timet_nb.cli import main
    main(["relearn", "none", str(tmp_path / "film"), "--support", str(world / "frame.png"), str(world / "mask.png"), "--model", str(tmp_path / "blind.safetensors"),
          "--out", str(tmp_path / "out"), "--budget", "smoke", "--steps", "1", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "after: marked in 0 of 4 frames, 0.0% of the picture" in said and "warning: nothing is marked" in said and "1.000" not in said
    kept = json.loads((tmp_path / "out" / "answers.json").read_text())
    row = kept["videos"][0]
    assert (row["marked_before"], row["marked_after"], row["share_after"]) == (0, 0, 0)
    assert len(list((tmp_path / "out" / "tinted" / "film").glob("*.jpg"))) == 4


def test_shares_and_warnings():
    a, shares = torch.tensor([[1, 1, 0, 255]]), []
    assert len(list(counted([a, 0 * a], shares))) == 2 and shares == [.5, 0]
    row = Row("x", 2, .5, .5, 2, 1, .5, .25, .1, .2)
    assert told(row)[0] == "x: 2 frames, steadiness 0.500 -> 0.500, Dice 0.100 -> 0.200" and len(told(row)) == 3
    assert "1 of 1 frame," in told(Row("x", 1, 1, 1, 1, 1, .2, .2))[2]
    assert "nearly all" in told(Row("x", 2, 1, 1, 2, 2, .2, .99))[3]


def test_tinted_pictures_show_frame_and_mask(tmp_path):
    from timet_nb.data.decode import read_image
    frames, masks = film(2)
    assert write_tinted(iter(frames), iter(masks), tmp_path / "t") == 2
    away = (read_image(tmp_path / "t" / "00001.jpg") - frames[1]).abs().mean(0)
    assert away[masks[1] == 1].mean() > 2 * away[masks[1] == 0].mean()


def test_answers_say_what_was_done(world, whole, tmp_path):
    from timet_nb import __version__
    images, rows, out = whole
    kept = json.loads((out / "answers.json").read_text())
    c = kept["config"]
    assert c["images"] == str(images) and c["training"] == dict(steps=BUDGETS["smoke"][1], pictures={"pairs": 4}) and c["model"] is None
    assert (c["budget"], c["seed"], c["size"], c["steps"], c["per"]) == ("smoke", 0, 64, 3, "video")
    assert c["support"] == {r.video: "its frame 0" for r in rows} and c["relearn"]["T"] == 5
    assert kept["version"] == __version__ and kept["notes"] == ["breast: it lies one folder down, in 'breast'"]
    run(None, world / "videos", [(world / "frame.png", world / "mask.png")], tmp_path / "o", world / "model.safetensors", budget="smoke", steps=1)
    c = json.loads((tmp_path / "o" / "answers.json").read_text())["config"]
    assert c["support"] == [[str(world / "frame.png"), str(world / "mask.png")]] and c["model"] == str(world / "model.safetensors") and c["training"] is None


def numbered(root, masks=(0, 1, 2, 3)):
    "A folder of images/ and masks/ with numbers for names."
    frames, ids = film(4, size=64)
    for k in range(4): write_image(root / "images" / f"{k}.png", frames[k])
    for k in masks: write_mask(root / "masks" / f"{k}.png", ids[k % 4])
    return root


def test_numbered_pictures_are_pictures_and_notes_are_printed_and_kept(world, tmp_path, capsys):
    images = numbered(tmp_path / "mine", (0, 1, 2, 7))
    run(images, world / "videos", out=tmp_path / "o", budget="smoke", steps=1)
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "o" / "answers.json").read_text())["notes"]
    assert any("the 3 frames with a mask are used as pictures" in n for n in kept) and any("7" in n and "mask" in n for n in kept)
    for n in kept: assert said.count(f"note: {n}") == 1
    for organ in ("breast",): write_ultrasound(tmp_path / "pairs", UltrasoundWorld(organ, S), 3)
    next(p for p in sorted((tmp_path / "pairs").rglob("*_mask.png"))).unlink()
    run(tmp_path / "pairs", world / "videos", out=tmp_path / "p", budget="smoke", steps=1)
    assert "images without a mask, left out: 1 (breast (1).png)" in capsys.readouterr().out


def test_a_set_without_any_mask_that_is_a_picture_is_refused(tmp_path):
    from timet_nb.data.decode_video import write_video
    write_video(tmp_path / "hmc" / "HMC-QU" / "A4C" / "a.avi", torch.zeros(3, 3, S, S), 25)
    (tmp_path / "hmc" / "LV Ground-truth Segmentation Masks").mkdir()
    with pytest.raises(DataError, match="(?s)a set of 1 video .*timet frames") as e: image_sets(tmp_path / "hmc", S)
    assert ".videos" not in str(e.value)


# --- masks from files

def test_a_photograph_is_no_mask(tmp_path):
    from PIL import Image
    frames, masks = film(1, size=64)
    noisy = (.2 + .6 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)))
    grey = noisy[:1].expand(3, -1, -1)
    for name, x in (("colour.png", noisy), ("grey.png", grey), ("frame.png", frames[0]), ("grey.jpg", grey)): write_image(tmp_path / name, x)
    Image.fromarray((noisy.movedim(0, -1) * 255).byte().numpy()).quantize(200).save(tmp_path / "palette.png")
    dark = torch.where(masks[0][None] > 0, noisy, 0.)          # most of it is black: an ultrasound sector
    write_image(tmp_path / "sector.png", dark[:1].expand(3, -1, -1))
    for name in ("colour.png", "grey.png", "frame.png", "grey.jpg", "palette.png", "sector.png"):
        with pytest.raises(DataError, match=f"(?s){name}.*is it a photograph") as e: read_support([(tmp_path / "frame.png", tmp_path / name)])
        assert "kind=" not in str(e.value), name


def test_masks_with_soft_edges_are_cut_at_half(tmp_path):
    _, masks = film(1, size=64)
    soft = nn.functional.interpolate(masks[:1, None].float(), (100, 100), mode="bicubic", antialias=True)[0].clamp(0, 1)
    write_image(tmp_path / "frame.png", torch.rand(3, 100, 100))
    for name in ("soft.png", "soft.jpg"):
        notes = []
        write_image(tmp_path / name, soft.expand(3, -1, -1))
        _, (m,) = read_support([(tmp_path / "frame.png", tmp_path / name)], notes)
        assert set(m.unique().tolist()) == {0, 1} and float((m != (soft[0] > .5)).float().mean()) < .01
        assert name in notes[0] and "cut at half" in notes[0]
    from PIL import Image
    Image.fromarray((soft[0] * 65535).numpy().astype("uint16")).save(tmp_path / "deep.png")
    assert float((read_annotation(tmp_path / "deep.png") != (soft[0] > .5)).float().mean()) < .01
    for k, ids in enumerate(([0, 1], [0, 1, 2, 255], [0, 7])):                 # numbers stay numbers
        x = torch.tensor(ids).repeat(40, 1).T.contiguous()
        write_mask(tmp_path / f"{k}.png", x)
        assert torch.equal(read_annotation(tmp_path / f"{k}.png"), torch.where(x == 255, 255, (x > 0).long()))


def test_no_mask_is_written_about_without_its_name(world, tmp_path, no_training):
    "Soft support masks of a run are told as a note; sizes are told with both files."
    frames, masks = film(3, size=64)
    for i, (x, m) in enumerate(zip(frames, masks)):
        write_image(tmp_path / "film" / "JPEGImages" / "480p" / "three" / f"{i:05d}.jpg", x)
        write_mask(tmp_path / "film" / "Annotations" / "480p" / "three" / f"{i:05d}.png", m if i else m[:, :40])
    refused(tmp_path, "(?s)00000.png: got 64 x 40.*64 x 64.*three, frame 0", DataError, None, tmp_path / "film", model=world / "model.safetensors")


def test_frames_of_two_sizes_are_refused_by_file_and_without_python(world, tmp_path):
    frames, _ = film(3, size=64)
    for k in range(3): write_image(tmp_path / "mixed" / f"{k}.png", frames[k][:, :64 - 8 * (k == 1)])
    with pytest.raises(DataError, match="(?s)1.png: got 56 x 64.*64 x 64.*bring all its frames to one size") as e:
        run(None, tmp_path / "mixed", [(world / "frame.png", world / "mask.png")], tmp_path / "o", world / "model.safetensors")
    assert "size=" not in str(e.value)


# --- models, films, settings

def test_a_student_given_for_an_image_model_is_told(net, video, tmp_path, world):
    r = relearn(net, video, RelearnConfig(**SMALL))
    path = r.save(tmp_path / "out" / "relearn" / "film" / "student.safetensors")
    with pytest.raises(CheckpointError, match="(?s)a relearned student.*image-model.safetensors"): load_images(path)
    good = net.save(tmp_path / "out" / "image-model.safetensors")
    with pytest.raises(CheckpointError) as e: run(None, world / "videos", out=tmp_path / "o", model=path, budget="smoke")
    assert str(good) in str(e.value) and not (tmp_path / "o").exists()
    from timet_nb.cli import main
    with pytest.raises(SystemExit) as e:
        main(["segment", "--ref", str(world / "frame.png"), str(world / "mask.png"), "--target", str(world / "frame.png"), "--method", "stcr", "--weights", str(path), "--out", str(tmp_path / "s")])
    assert str(good) in str(e.value.code)
    with pytest.raises(CheckpointError, match="no such file"): load_images(tmp_path / "none.safetensors")


def test_a_film_of_12_bits_in_16_is_told(world, tmp_path, capsys):
    from PIL import Image
    frames, _ = film(3, size=64)
    for name, top in (("dim", 4095), ("fine", 65535)):
        (tmp_path / name).mkdir()
        for k in range(3): Image.fromarray((frames[k, 0] * top).numpy().astype("uint16")).save(tmp_path / name / f"{k}.png")
        run(None, tmp_path / name, [(world / "frame.png", world / "mask.png")], tmp_path / f"o-{name}", world / "model.safetensors", budget="smoke", steps=1)
        notes = json.loads((tmp_path / f"o-{name}" / "answers.json").read_text())["notes"]
        said = capsys.readouterr().out
        assert (["note: dim: nearly black" in said, len(notes)] == [True, 1]) if name == "dim" else ("black" not in said and notes == [])


def test_settings_and_names_that_mean_nothing(tmp_path, world):
    for bad in (dict(mlp_ratio=0.), dict(mlp_ratio=-1.), dict(scale=-1.)):
        with pytest.raises(ConfigError, match="scale|mlp_ratio"): RelearnConfig(**bad)
    RelearnConfig(scale=0.)
    for blank in ("", "  "):
        with pytest.raises(DataError, match="a video: got an empty name"): open_videos(blank)
        with pytest.raises(DataError, match="got an empty name"): image_sets(blank, S)
    frames, masks = film(3)
    with pytest.raises(DataError, match="empty name"): as_video("", frames[0], masks[0], S)
    with pytest.raises(DataError, match="(?s)names of files.*read_support"): as_video(frames, "frame.png", "mask.png", S)
    with pytest.raises(DataError, match="film.mp4"): as_video(str(tmp_path / "film.mp4"), frames[0], masks[0], S)
    for k in range(3): write_image(tmp_path / "film" / f"{k}.png", frames[k])
    v = as_video(str(tmp_path / "film"), frames[0], masks[0], S)
    assert (len(v.frames), v.frames.name) == (3, "film") and float((v.frames[[2]] - frames[2]).abs().max()) < .01
    with pytest.raises(DataError, match="2 clips"): as_video(world / "videos", frames[0], masks[0], S)
    still = Student(create_fewshot(FewShotConfig.test(size=S, width=4, layers=2)), RelearnConfig(T=3))
    with pytest.raises(DataError, match="got 1 frame\n"): still.mix(torch.rand(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="1 frame, T=0"): windows(1, 0)


@pytest.mark.parametrize("bad", [dict(T=2.5), dict(T=1), dict(steps=1.5), dict(steps=True), dict(gap=0), dict(clips=1.5), dict(lr=-1e-3),
    dict(lr=float("nan")), dict(lr=float("inf")), dict(tau_lr=float("nan")), dict(weight_decay=-1), dict(clip=float("nan")), dict(clip=-1),
    dict(clip=0), dict(scale=float("nan")), dict(mlp_ratio=float("nan"))])
def test_relearn_settings_without_a_meaning_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=[*bad][0]): RelearnConfig(**bad)


@pytest.mark.parametrize("bad", [dict(threshold=float("nan")), dict(threshold=2), dict(threshold=-.1), dict(batch=0), dict(batch=-1), dict(batch=1.5)])
def test_thresholds_and_batches_without_a_meaning_are_refused(net, video, bad):
    with pytest.raises(ConfigError, match=[*bad][0]): list(segment_images(net, video, **bad))
    if "threshold" in bad:
        r = relearn(net, video, RelearnConfig(**dict(SMALL, steps=1)))
        with pytest.raises(ConfigError, match="threshold"): list(r.segment(video, **bad))


# --- masks that are not what they seem

def grey_file(path, levels): return write_image(path, (levels / 255.).expand(3, -1, -1))


def test_white_beside_grey_is_the_object_and_255_beside_numbers_is_unknown(tmp_path):
    v = torch.zeros(64, 64); v[10:50, 10:50] = 128; v[16:44, 16:44] = 255     # white: 784 pixels, grey: 816 - some
    v[10:50, 10:13] = v[10:50, 47:50] = 0
    notes = []
    m = read_annotation(grey_file(tmp_path / "band.png", v), notes=notes)
    assert set(m.unique().tolist()) == {0, 1} and (m[v == 255] == 1).all() and (m[v == 0] == 0).all()
    assert len(notes) == 1 and "cut at half" in notes[0]
    ids, notes = torch.zeros(64, 64).long(), []
    ids[20:30, 20:30] = 7; ids[:10] = 255
    for path in (grey_file(tmp_path / "grey.png", ids), write_mask(tmp_path / "ids.png", ids)):
        m, notes = read_annotation(path, notes=(notes := [])), notes
        assert (m[ids == 7] == 1).all() and (m[ids == 255] == 255).all() and "255 = unknown, in 640 pixels" in notes[0]
    few = ids.clone(); few[few == 7] = 128; few[:10] = 0; few[0, :9] = 255      # little white beside much grey: an id
    m = read_annotation(grey_file(tmp_path / "few.png", few), notes=(notes := []))
    assert int((m == 255).sum()) == 9 and "255 = unknown, in 9 pixels" in notes[0]


def test_a_support_needs_a_background(tmp_path):
    x, m = film(1)
    picture = write_image(tmp_path / "x.png", x[0])
    for k, ids in enumerate((0 * m[0] + 1, torch.where(m[0] == 1, 1, 255))):
        with pytest.raises(DataError, match=f"(?s)m{k}.png.*no pixel is background"): read_support([(picture, write_mask(tmp_path / f"m{k}.png", ids))])


def image_set(root, masks, frames=None):
    for k, m in enumerate(masks):
        write_image(root / "images" / f"p{k}x.png", torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(k)))
        write_image(root / "masks" / f"p{k}x.png", m.float().expand(3, -1, -1))
    return root


def test_sets_of_empty_full_and_photographed_masks_are_told_or_refused(tmp_path):
    _, m = film(3)
    photo = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(9 + k)) for k in range(3)]
    mixed = image_sets(image_set(tmp_path / "mixed", [*m, 0 * m[0], 0 * m[0] + 1, photo[0][:1]]), S, notes=(notes := []))
    assert len(mixed[0]) == 6
    for words in ("1 of 6 masks show no object", "1 of 6 masks mark every pixel", "1 of 6 masks look like photographs"):
        assert any(words in n for n in notes), words
    fine = image_sets(image_set(tmp_path / "fine", m), S, notes=(notes := []))
    assert len(fine[0]) == 3 and not any("masks show" in n or "mark every" in n or "photographs" in n for n in notes)
    for name, masks, words in (("none", 0 * m, "show no object"), ("all", 0 * m + 1, "every pixel"), ("grey", [p[:1] for p in photo], "photographs"),
                               ("colour", photo, "photographs")):
        with pytest.raises(DataError, match=f"(?s){name}.*{words}"): image_sets(image_set(tmp_path / name, masks), S)


def test_a_file_for_a_folder_of_images_is_told(tmp_path):
    x = write_image(tmp_path / "sup.png", torch.rand(3, 8, 8))
    with pytest.raises(DataError, match="(?s)sup.png: got a file.*--support"): image_sets(x, S)
    assert [len(s) for s in image_sets(__import__("pathlib").Path("ultrasound"), S, 4)] == [4, 4, 4]


# --- films and folders

def test_films_without_a_mask_are_left_out_and_named(tmp_path, world, capsys):
    frames, masks = film(4, size=64)
    for name in ("a", "b", "c"):
        for k in range(4):
            write_image(tmp_path / "films" / "JPEGImages" / name / f"{k:05d}.jpg", frames[k])
            if name != "b": write_mask(tmp_path / "films" / "Annotations" / name / f"{k:05d}.png", masks[k] * (name != "c"))
    model = world / "model.safetensors"
    rows = run(None, tmp_path / "films", out=tmp_path / "o", model=model, budget="smoke", steps=1)
    assert [r.video for r in rows] == ["a"]
    notes = json.loads((tmp_path / "o" / "answers.json").read_text())["notes"]
    assert any("left out: b, c (2 of 3 videos)" in n for n in notes) and "left out: b, c" in capsys.readouterr().out
    given = run(None, tmp_path / "films", [(world / "frame.png", world / "mask.png")], tmp_path / "g", model, budget="smoke", steps=1)
    assert [r.video for r in given] == ["a", "b", "c"]
    bare = [Target(n, lambda: iter(frames)) for n in "xy"]
    with pytest.raises(DataError, match="(?s)x.*no object in any of 0 masks.*--support"): with_masks(bare)
    broken = Target("z", lambda: iter(frames), {0: lambda: (_ for _ in ()).throw(DataError("z.png: broken"))})
    with pytest.raises(DataError, match="z.png: broken"): with_masks([*bare, broken])


def test_stills_that_were_meant_as_a_film_are_told_why(tmp_path):
    frames, masks = film(5)
    for k, n in enumerate((1, 2, 10, 11, 30)): write_image(tmp_path / "holes" / f"{n}.png", frames[k])
    with pytest.raises(DataError, match="(?s)holes was read as 5 single pictures.*00000.png"): check_films(open_videos(tmp_path / "holes"), ([frames[0]], [masks[0]]))


def test_images_that_are_the_films_by_another_name_are_refused(tmp_path, world):
    films = world / "videos"
    (tmp_path / "link").symlink_to(films)
    inside = next(p for p in films.iterdir() if p.is_dir())
    for same in (films, tmp_path / "link", inside, films.parent, f"{films}/../videos"):
        with pytest.raises(DataError, match="images of others"): run(same, films, out=tmp_path / "o", budget="smoke")
    with pytest.raises(DataError, match="images of others"): run(films, tmp_path / "link", out=tmp_path / "o", budget="smoke")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("bad", [dict(steps=1.5), dict(steps=-1), dict(seed="a"), dict(seed=10 ** 20), dict(seed=.5), dict(support=("frame.png", "mask.png")),
    dict(support=[("frame.png",)]), dict(support="ab"), dict(support=[(1, 2)]), dict(video=["film"]), dict(model=["m"]), dict(images=3)])
def test_words_of_a_wrong_kind_are_refused_before_anything_is_written(bad, tmp_path, world):
    call = dict(images=None, video=world / "videos", model=world / "model.safetensors", out=tmp_path / "o", budget="smoke") | bad
    with pytest.raises((ConfigError, DataError), match=[*bad][0] if "video" not in bad else "the name of a video"): run(**call)
    assert not (tmp_path / "o").exists()


def test_a_row_is_told_where_only_one_side_has_a_dice():
    row = Row("x", 3, .5, .5, 2, 0, .5, 0., 0., None, 0., None, 2, 0)
    assert told(row)[0].endswith("Dice 0.000 -> - (means of 2 and 0 frames)")
    row = Row("x", 3, .5, .5, 0, 2, 0., .5, None, .25, None, .2, 0, 2)
    assert told(row)[0].endswith("Dice - -> 0.250 (means of 0 and 2 frames)")
    assert "Dice" not in told(Row("x", 3, .5, .5, 1, 1, .5, .5))[0]
    assert told(Row("x", 3, .5, .5, 1, 1, .5, .5, .1, .2, .1, .2, 3, 3))[0].endswith("Dice 0.100 -> 0.200")


def test_rows_say_over_how_many_frames_their_means_are(tmp_path, world):
    rows = run(None, world / "videos", out=tmp_path / "o", model=world / "model.safetensors", budget="smoke", steps=1)
    for r in rows: assert isinstance(r.counted_before, int) and 0 <= r.counted_after <= r.frames
    assert "counted_before" in json.loads((tmp_path / "o" / "answers.json").read_text())["videos"][0]


def test_a_run_saves_on_its_way(tmp_path, world, monkeypatch):
    import timet_nb.relearn.apply as apply
    seen = {}
    for name in ("relearn", "train_images"):
        def _spy(*a, _f=getattr(apply, name), _n=name, **k):
            seen[_n] = k["save_every"]
            return _f(*a, **k)
        monkeypatch.setattr(apply, name, _spy)
    images = write_ultrasound(tmp_path / "images", UltrasoundWorld("breast", S, seed=1), 4)
    run(images, world / "videos", out=tmp_path / "o", budget="smoke", steps=41)
    assert seen == dict(relearn=2, train_images=1)


def test_arrays_are_a_video_as_tensors_are():
    frames, masks = film(3)
    a, b = as_video(frames, frames[0], masks[0], S, "t"), as_video(frames.numpy(), frames[0].numpy(), masks[0].numpy(), S, "a")
    assert torch.equal(a.frames[[0, 1, 2]], b.frames[[0, 1, 2]]) and torch.equal(a.images[0], b.images[0]) and torch.equal(a.masks[0], b.masks[0])


def test_look_knows_medical_sets(tmp_path, capsys):
    from timet_nb.cli import main
    frames, masks = film(2)
    for kind in ("benign", "malignant"):
        for k in range(2):
            write_image(tmp_path / "Dataset_BUSI_with_GT" / kind / f"{kind} ({k + 1}).png", frames[k])
            write_image(tmp_path / "Dataset_BUSI_with_GT" / kind / f"{kind} ({k + 1})_mask.png", masks[k].float().expand(3, -1, -1))
    main(["look", str(tmp_path / "Dataset_BUSI_with_GT")])
    assert "[busi]: 4 pairs" in capsys.readouterr().out
    for k in range(2):
        write_image(tmp_path / "davis" / "JPEGImages" / "480p" / "x" / f"{k:05d}.jpg", frames[k])
        write_mask(tmp_path / "davis" / "Annotations" / "480p" / "x" / f"{k:05d}.png", masks[k])
    main(["look", str(tmp_path / "davis")])
    assert "1 clip, 2 frames, a mask for every frame" in capsys.readouterr().out


def test_help_of_relearn(capsys):
    from timet_nb.cli import main
    with pytest.raises(SystemExit): main(["relearn", "--help"])
    said = capsys.readouterr().out
    assert "--support FRAME MASK" in said and "(list)" not in said and "--resume" in said
    assert "smoke: seconds; cpu: 2 min" in said.replace("\n", " ").replace("  ", " ")
