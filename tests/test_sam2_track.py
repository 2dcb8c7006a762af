"SAM 2's tracker: which frames are remembered, prompts on any frame, both directions, bounded memory, and faults."
import copy
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from timet_nb.base.runtime import DataError
from timet_nb.data.frames import ClipReader
from timet_nb.data.layout import find_layout
from timet_nb.data.worlds import shipped_clips
from timet_nb.sam.bank import best_candidates, frames_to_keep, nearest_prompted, recent_frames
from timet_nb.sam.memory import Session, Shelf, say, to_ids, track
from timet_nb.sam.sam2 import Sam2, Sam2Config, create_sam2
from timet_nb.sam.segment import SamConfig, create_sam


@pytest.fixture(scope="module")
def model():
    m = create_sam2("test", seed=1).requires_grad_(False)
    m.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(1.)     # visible, unless a test says otherwise
    return m


@pytest.fixture
def frames():
    return torch.rand(6, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def box_mask(size=(40, 56), top=8, left=10, side=16):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:top + side, left:left + side] = True
    return mask


def masks_of(steps, o=1): return torch.stack([s.masks[o] for s in steps])


# ---- which frames are read

def walk(now, prompted, tracked, memories, pointers, reverse, n, stride):
    "The rule by loops over ages, frame by frame."
    sign = -1 if reverse else 1
    cells, ages = [(f, memories - 1) for f in sorted(prompted)], []
    for age in range(memories - 1, 0, -1):
        if age == 1: f = now - sign
        elif reverse: f = -(-(now + 2) // stride) * stride + (age - 2) * stride
        else: f = (now - 2) // stride * stride - (age - 2) * stride
        if f in tracked: cells.append((f, age - 1))
    most = min(pointers, n or pointers)
    for f in sorted(prompted):
        if (f >= now if reverse else f <= now): ages.append((f, (now - f) * sign))
    for d in range(1, most):
        if now - sign * d in tracked: ages.append((now - sign * d, d))
    return tuple(cells), tuple(ages), max(most - 1, 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_equals_loops(seed):
    rng = random.Random(seed)
    for _ in range(200):
        n = rng.choice([None, 4, 30])
        frames = rng.sample(range(30), 20)
        prompted, tracked = set(frames[:rng.randint(1, 3)]), set(frames[3:])
        args = rng.choice([7, 3, 2]), rng.choice([16, 4]), rng.random() < .5, n, rng.choice([1, 2, 5])
        now = rng.randrange(30)
        tracked.discard(now)
        got = recent_frames(now, prompted, tracked, args[0], args[1], args[2], args[3], args[4])
        assert (got.cells, got.pointers, got.span) == walk(now, prompted, tracked, *args)


def test_nearest_prompted_frames():
    assert nearest_prompted(10, [30, 2, 8, 12, 11]) == [2, 8, 11, 12, 30]
    assert nearest_prompted(10, [30, 2, 8, 12, 11], 2) == [8, 11]
    assert nearest_prompted(10, [30, 2, 8, 12, 11], 4) == [2, 8, 11, 12]
    read = recent_frames(10, [2, 8, 30], {9}, nearest=1)
    assert read.cells == ((8, 6), (9, 0))
    assert [f for f, _ in read.pointers] == [8, 9, 2]         # pointers of the others are read by age


@pytest.mark.parametrize("reverse", [False, True])
def test_what_is_dropped_would_never_be_read(reverse):
    order = range(60, -1, -1) if reverse else range(61)
    prompted, kept, every = {30}, set(), set()
    for now in order:
        if now in prompted: continue
        a, b = (recent_frames(now, prompted, s, reverse=reverse) for s in (kept, every))
        assert a == b
        every.add(now)
        kept = frames_to_keep(now, prompted, kept | {now}, 16)
        assert len(kept) <= 3 * 16 + 1


def test_every_path_takes_its_best_mask():
    iou = torch.tensor([[.1, .9, .3], [.5, .2, .5]])
    (a, b) = best_candidates(iou, torch.zeros(2), [0., -1.])
    assert a[:2] == (0, 1) and b[:2] == (1, 0) and abs(b[2] + 1 - torch.tensor(.50001).log()) < 1e-4


# ---- the tracker

def test_list_generator_and_clip_are_one(model, frames):
    prompt = [dict(frame=0, mask=box_mask())]
    a = masks_of(track(model, frames, prompt))
    b = masks_of(track(model, (f for f in frames), prompt, n_frames=6))
    c = masks_of(track(model, list(frames), prompt))
    assert a.shape == (6, 40, 56) and torch.equal(a, b) and torch.equal(a, c)
    clip = find_layout(shipped_clips())["cup-wall"]
    steps = list(track(model, ClipReader(clip, step=5), [dict(frame=0, points=[(60, 60)])]))
    assert [s.index for s in steps] == [0, 1, 2, 3]


def test_several_objects_are_independent_and_share_one_look(model, frames):
    ids = torch.zeros(40, 56, dtype=torch.long); ids[5:15, 5:20] = 3; ids[20:35, 30:50] = 7; ids[0] = 255
    session = Session(model, frames)
    for k in (3, 7): session.note(0, k, mask=ids == k)
    both = list(session.propagate())
    assert session.looks == 6 and list(both[-1].masks) == [3, 7]
    for k in (3, 7):
        alone = masks_of(track(model, frames, [dict(frame=0, object=k, mask=ids == k)]), k)
        assert torch.equal(masks_of(both, k), alone)
    assert torch.equal(masks_of(track(model, frames, ids), 3), masks_of(both, 3))
    named = to_ids(both[-1].masks, (40, 56))
    assert set(named.unique().tolist()) <= {0, 3, 7} and not to_ids({}, (4, 5)).any()


def test_backward_is_forward_on_the_turned_video(model, frames):
    there = masks_of(track(model, frames, [dict(frame=0, mask=box_mask())]))
    back = list(track(model, frames.flip(0), [dict(frame=5, mask=box_mask())], reverse=True))
    assert [s.index for s in back] == [5, 4, 3, 2, 1, 0]
    assert torch.allclose(there, masks_of(back), atol=1e-5)
    with pytest.raises(DataError, match="by number"):
        list(track(model, (f for f in frames), [dict(frame=5, mask=box_mask())], reverse=True))


def test_both_directions_from_the_middle(model, frames):
    session = Session(model, frames)
    first = session.add(3, mask=box_mask())
    assert abs(int((first > 0).sum()) - 256) < 60
    after, before = list(session.propagate()), list(session.propagate(reverse=True))
    assert [s.index for s in after] == [3, 4, 5] and [s.index for s in before] == [3, 2, 1, 0]
    assert after[0].read[1] is None and 4 in dict(before[1].read[1].cells)      # what was seen later is read too
    assert torch.equal(after[0].masks[1], first)


def test_objects_begin_with_their_first_prompt(model, frames):
    steps = list(track(model, frames, [dict(frame=0, mask=box_mask()), dict(frame=2, object="late", box=[5, 5, 20, 30])]))
    assert [list(s.masks) for s in steps] == [[1], [1], [1, "late"], [1, "late"], [1, "late"], [1, "late"]]
    early = Session(model, frames)                       # with numbered frames a later prompt helps earlier frames
    early.add(4, mask=box_mask())
    assert 1 in early.step(index=2).masks


def test_free_tokens_and_gradients(model, frames):
    tokens = torch.randn(4, 32, requires_grad=True)
    fork = Sam2(model.sam, Sam2Config.test().as_fork()).eval()
    with torch.no_grad(): assert not next(track(fork, frames, [dict(frame=0, tokens=(tokens, None))])).masks[1].requires_grad
    last = list(track(fork, frames[:3], [dict(frame=0, tokens=(tokens, -tokens))], grad=True))[-1]
    assert last.found[1].low.shape[1] == 1
    last.masks[1].sum().backward()
    assert tokens.grad.abs().sum() > 0
    plain = list(track(fork, frames[:2], [dict(frame=0, tokens=(tokens, None))]))[-1]
    assert not plain.masks[1].requires_grad


def test_more_clicks_use_the_last_answer_and_fresh_ones_do_not(model, frames):
    once = Session(model, frames).add(0, points=[(20, 20), (5, 5)], labels=[1, 0])
    session = Session(model, frames)
    session.add(0, points=[(20, 20)])
    again = session.add(0, points=[(5, 5)], labels=[0])
    assert session.said[1, 0].points.shape == (2, 2) and not torch.allclose(once, again)
    assert torch.equal(session.add(0, points=[(20, 20), (5, 5)], labels=[1, 0], fresh=True), once)
    boxed = session.add(0, box=[5, 5, 30, 30])
    assert session.said[1, 0].points is None and boxed.shape == (40, 56)


def test_a_click_on_the_frame_in_view_corrects_it(model, frames):
    session = Session(model)
    assert session.step(frames[0]).masks == {}
    session.add(0, points=[(20, 20)])                    # the frame is still in view
    session.step(frames[1])
    before = session.step(frames[2])
    after = session.add(2, points=[(30, 30)], labels=[0])
    assert not torch.equal(before.masks[1], after)
    path = session.paths[1][0]
    assert list(path.prompted) == [0] and path.tracked[2].prompted       # as the authors: it ages like the others
    keep = Session(model, corrections=True); keep.note(0, points=[(20, 20)])
    for f in frames[:3]: keep.step(f)
    keep.add(2, points=[(30, 30)], labels=[0])
    assert list(keep.paths[1][0].prompted) == [0, 2]
    with pytest.raises(DataError, match="still to come"): keep.add(1, points=[(3, 3)])


def test_equal_paths_tell_the_story_of_one(model, frames):
    "Where the tree of SAM2Long will plug in: three paths that never part are one tracker."
    def thrice(iou, score, total, depth):
        (p, m, t), *_ = best_candidates(iou, score, total, depth)
        return [(p, m, t)] * 3
    one = list(track(model, frames, [dict(frame=0, mask=box_mask())]))
    session = Session(model, frames, pick=thrice)
    session.note(0, mask=box_mask())
    three = list(session.propagate())
    assert torch.equal(masks_of(one), masks_of(three)) and len(session.paths[1]) == 3
    assert session.paths[1][0].tracked is not session.paths[1][1].tracked
    worst = Session(model, frames, pick=lambda iou, *a: [(0, int(iou[0].argmin()), 0.)])
    worst.note(0, mask=box_mask())
    assert not torch.equal(masks_of(worst.propagate())[1], masks_of(one)[1])


def test_a_rule_may_look_at_scores_and_scale_keys(model, frames):
    def sure(now, prompted, tracked, *rest):
        good = {f: e for f, e in tracked.items() if e.found.iou > 0 and e.found.score > 0}
        chosen = recent_frames(now, prompted, good, *rest)
        from dataclasses import replace
        return replace(chosen, cell_scales=tuple(1 + .05 * i for i in range(len(chosen.cells))))
    a = masks_of(track(model, frames, [dict(frame=0, mask=box_mask())]))
    b = masks_of(track(model, frames, [dict(frame=0, mask=box_mask())], rule=sure))
    assert torch.equal(a[:2], b[:2]) and not torch.equal(a[3:], b[3:])


# ---- memory stays bounded

def test_bank_is_bounded_and_forgetting_changes_nothing(model):
    frames = torch.rand(45, 3, 32, 32)
    sizes, a = [], []
    session = Session(model, n_frames=None); session.note(2, mask=torch.ones(32, 32).bool())
    for f in frames:
        a.append(session.step(f))
        sizes.append(len(session.paths[1][0].bank) if 1 in session.paths else 0)
    assert max(sizes) == sizes[-1] == 1 + 16 + 1 + 16 and session.looks == 43
    b = list(track(model, iter(frames), [dict(frame=2, mask=torch.ones(32, 32).bool())], reach=float("inf")))
    assert torch.equal(masks_of(a[2:]), masks_of(b[2:])) and not a[0].masks
    assert session.paths[1][0].bank[2].found.full is None


# ---- objects leave, videos are short, prompts are wrong

class Blinker(nn.Module):
    "An object score that follows a list, one entry a call."
    def __init__(self, scores): super().__init__(); self.scores = list(scores)
    def forward(self, x): return x.new_full((len(x), 1), self.scores.pop(0))


def test_objects_leave_and_return(model, frames):
    m = copy.deepcopy(model)
    m.sam_mask_decoder.pred_obj_score_head = Blinker([5., 5., -5., -5., 5., 5.])
    steps = list(track(m, frames, [dict(frame=0, points=[(20, 20)])]))
    assert [bool((s.masks[1] < -1023).all()) for s in steps] == [False, False, True, True, False, False]
    assert torch.equal(steps[2].found[1].pointer, m.no_obj_ptr) and torch.isfinite(masks_of(steps)).all()
    assert 2 in dict(steps[4].read[1].cells) and 0 in dict(steps[4].read[1].cells)


def test_a_video_of_one_frame(model, frames):
    for source in (frames[:1], iter(frames[:1])):
        steps = list(track(model, source, [dict(frame=0, mask=box_mask())]))
        assert len(steps) == 1 and steps[0].masks[1].shape == (40, 56)
    with pytest.raises(DataError, match="no frame"): list(track(model, frames[:0], [dict(frame=0, mask=box_mask())], n_frames=1))
    with pytest.raises(DataError, match="no frame"): Shelf([])


def test_frames_that_are_not_there(model, frames):
    with pytest.raises(DataError, match="frame 9(?s:.*)0 to 5"): list(track(model, frames, [dict(frame=9, mask=box_mask())]))
    with pytest.raises(DataError, match="(?s)on frame 9.*video of 6 frames"):
        list(track(model, iter(frames), [dict(frame=9, mask=box_mask()), dict(frame=0, object=2, mask=box_mask())]))
    with pytest.raises(DataError, match="-1"): Session(model).add(-1, mask=box_mask())
    with pytest.raises(DataError, match="0 to 5"): Session(model, frames).step(index=6)


def test_no_prompt_at_all(model, frames):
    with pytest.raises(DataError, match="prompts"): list(track(model, frames, []))
    with pytest.raises(DataError, match="prompts"): list(track(model, frames, torch.zeros(40, 56, dtype=torch.long)))
    with pytest.raises(DataError, match="no prompt"): list(Session(model, frames).propagate())
    with pytest.raises(DataError, match="without a source"): list(Session(model).propagate())


@pytest.mark.parametrize("what, words", [
    (dict(mask=torch.ones(20, 20).bool()), r"(?s)mask of prompt.*\(20, 20\).*\(40, 56\)"),
    (dict(mask=torch.zeros(40, 56).bool()), "(?s)no pixel.*known object is absent"),
    (dict(mask=torch.full((40, 56), 3)), "ids == k"), (dict(mask=torch.ones(2, 40, 56).bool()), "0 and 1"),
    (dict(points=[(70, 10)]), "object 1 on frame 0(?s:.*)inside 56 x 40"), (dict(box=[10, 10, 10, 30]), "left < right"),
    (dict(points=[(5, 5), (5, 5)], labels=[1, 0]), "both 1 and 0"), (dict(points=[(5, 5)], labels=[1, 1]), "one a point"),
    (dict(), "nothing"), (dict(mask=box_mask(), points=[(3, 3)]), "points and mask|mask; or points"),
    (dict(points=[(float("nan"), 3)]), "points")])
def test_prompts_that_cannot_be_meant(model, frames, what, words):
    with pytest.raises(DataError, match=words): list(track(model, frames, [dict(frame=0, **what)]))
    session = Session(model, frames)
    with pytest.raises(DataError, match=words): session.add(0, **what)
    assert not session.paths and not session.said


def test_an_empty_mask_says_that_a_known_object_is_absent(model, frames):
    session = Session(model, frames)
    session.add(0, mask=box_mask())
    empty = session.add(3, mask=torch.zeros(40, 56).bool())
    assert (empty < 0).all() and session.paths[1][0].prompted[3].found.score == -10


def test_frames_of_changing_size(model, frames):
    session = Session(model); session.note(0, mask=box_mask())
    session.step(frames[0])
    with pytest.raises(DataError, match=r"(?s)frame 1.*\(40, 20\).*\(40, 56\)"): session.step(frames[1, :, :, :20])
    assert session.now == 0 and session.step(frames[1]).index == 1      # the bad frame is as if it had never come


def test_forgetting_an_object(model, frames):
    session = Session(model, frames)
    session.add(0, "a", mask=box_mask()); session.add(0, "b", points=[(9, 9)])
    session.forget("a")
    assert session.objects == ["b"] and list(session.step(index=1).masks) == ["b"]


def test_padded_views_and_the_first_sam(frames):
    m = Sam2(create_sam(SamConfig.tiny(), seed=2), Sam2Config(memory_dim=16, layers=1, hidden=32)).eval()
    steps = list(track(m, frames[:3], [dict(frame=0, mask=box_mask())]))
    assert (steps[0].masks[1] > 0)[12:20, 14:22].all() and not (steps[0].masks[1] > 0)[30:].any()
    assert masks_of(steps).shape == (3, 40, 56)


def test_prompts_are_taken_down_as_they_were_meant():
    said = say(points=(3, 4))
    assert said.points.shape == (1, 2) and said.labels.tolist() == [1]
    assert say(mask=torch.eye(3)).mask.dtype == torch.bool
    clip = SimpleNamespace(frames=(), masks=None, video=None)
    with pytest.raises(DataError): Shelf(clip)
