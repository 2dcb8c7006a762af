"Mask tubes, IC-VOS, and DC-SAM on SAM 2: properties and faults."
import random
from dataclasses import replace

import pytest
import torch

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.draws import sample_episodes
from timet_nb.data.frames import write_image, write_mask
from timet_nb.data.textures import texture_source, write_textures
from timet_nb.dcsam.evaluate import (as_run, draw_support, evaluate_icvos, open_source, read_icvos, score_video)
from timet_nb.dcsam.phases import DCSAMTrainConfig
from timet_nb.dcsam.segment import create_dcsam
from timet_nb.dcsam.tube import KINDS, blurred, mask_tube, tube_frame, turned
from timet_nb.dcsam.video import VideoSegmenter, check_pair, follow, open_segmenter, train_video, tube_loss, video_groups
from timet_nb.evaluate.references import Answer, InContextSegmenter, decide
from timet_nb.features.backbone import create_backbone
from timet_nb.sam.sam2 import Sam2Config, create_sam2


def picture(seed=0, size=(40, 60)):
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(size, dtype=torch.long); ids[8:25, 10:40] = 2
    return torch.rand(3, *size, generator=g), ids


# ---- tubes

@pytest.mark.parametrize("degrees", [-10., 0., 3.7, 90.])
def test_turning_back_and_forth_keeps_the_middle(degrees):
    x = torch.rand(3, 5, 5).repeat_interleave(12, 1).repeat_interleave(12, 2)
    back = turned(turned(x, degrees), -degrees)
    mid = slice(25, 35)
    assert (back - x)[:, mid, mid].abs().mean() < .06


def test_a_turn_brings_the_border_colour_in():
    out = turned(torch.zeros(3, 50, 50), 10., (.1, .2, .3))
    assert torch.allclose(out[:, 0, 0], torch.tensor([.1, .2, .3]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_get_no_new_id_and_keep_their_type(kind):
    image, ids = picture()
    x, y = tube_frame(image, ids, kind, 9.)
    assert set(y.unique().tolist()) <= {0, 2} and y.dtype == torch.int64
    assert x.shape == image.shape and bool((x >= -1e-5).all() and (x <= 1 + 1e-5).all())


def test_every_mirror_moves_the_mask_with_the_picture():
    image, ids = picture()
    image = image * .2 + .8 * (ids > 0)
    for frame, mask in zip(*(lambda t: (t.frames, t.masks))(mask_tube(image, ids, random.Random(1), None))):
        assert frame[:, mask > 0].mean() > frame[:, mask == 0].mean() + .5


def test_tubes_depend_on_the_generator_alone_and_orders_differ():
    image, ids = picture()
    a, b = (mask_tube(image, ids, random.Random(3), (32, 32)) for _ in range(2))
    assert torch.equal(a.frames, b.frames) and a.kinds == b.kinds
    firsts = {mask_tube(image, ids, random.Random(n), (8, 8)).kinds[0] for n in range(60)}
    assert firsts == set(KINDS)


def test_ignored_pixels_survive_a_tube():
    image, ids = picture(); ids[0, :] = 255
    tube = mask_tube(image, ids, random.Random(0), None, shuffle=False)
    assert set(tube.masks.unique().tolist()) == {0, 2, 255}


def test_faults_of_tubes():
    image, ids = picture()
    with pytest.raises(DataError, match="as its picture"): mask_tube(image, ids[1:], random.Random(0))
    with pytest.raises(ConfigError, match="degrees"): mask_tube(image, ids, random.Random(0), degrees=400)
    with pytest.raises(ConfigError, match="identity"): tube_frame(image, ids, "zoom")
    with pytest.raises(DataError, match="3 x 3"): blurred(torch.rand(3, 2, 9))


def test_blur_equals_opencv():
    cv2 = pytest.importorskip("cv2")
    x = torch.rand(3, 20, 30)
    theirs = cv2.GaussianBlur(x.permute(1, 2, 0).numpy(), (5, 5), 0)
    assert torch.allclose(blurred(x), torch.from_numpy(theirs).permute(2, 0, 1), atol=.01)


# ---- IC-VOS

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    home = tmp_path_factory.mktemp("icvos")
    write_textures(home / "world", n=4, n_novel=26, seed=0)
    source = texture_source(home / "world")
    c = source.classes[0]
    for v in ("b", "a"):
        for t in (0, 2, 10):
            x, ids = picture(t)
            write_image(home / "videos" / v / "JPEGImages" / f"{t}.jpg", x)
            write_mask(home / "videos" / v / "Annotations" / str(c) / f"{t}.png", (ids > 0).long())
    return home, source


class Constant(InContextSegmenter):
    "Marks everything, or nothing."
    method = "constant"
    def __init__(self, value): self.value = value
    def encode(self, shots, n_classes): return {"x": torch.zeros(1)}
    def answer(self, image, prompt):
        scores = torch.full((len(prompt.names), *image.shape[1:]), self.value)
        return Answer(prompt.names, scores, decide(scores))


def test_frames_are_in_order_of_their_numbers(world):
    questions = read_icvos(world[0] / "videos")
    assert [q.video for q in questions] == ["a", "b"]
    assert [f.stem for f in questions[0].frames] == ["0", "2", "10"]
    assert [m.stem for m in questions[0].masks] == ["0", "2", "10"]
    assert len(read_icvos(world[0] / "videos", most=2)[0]) == 2


def test_references_do_not_depend_on_any_order(world):
    home, source = world
    questions = read_icvos(home / "videos")
    names = [draw_support(source, q, 5).name for q in questions]
    backwards = replace(source, pictures=source.pictures[::-1])
    assert [draw_support(backwards, q, 5).name for q in reversed(questions)] == names[::-1]
    assert len({draw_support(source, questions[0], s).name for s in range(12)}) > 1


def test_marking_everything_scores_the_share_of_the_object(world):
    home, source = world
    questions = read_icvos(home / "videos")
    found = evaluate_icvos(Constant(.9), questions, source, size=None)
    assert found.j == pytest.approx(17 * 30 / (40 * 60), abs=1e-6)
    assert evaluate_icvos(Constant(.1), questions, source, size=None).j == 0
    assert found.jf == pytest.approx((found.j + found.f) / 2)


def test_empty_truth_and_empty_answer_count_one(world, tmp_path):
    x, ids = picture()
    write_image(tmp_path / "v" / "JPEGImages" / "0.jpg", x)
    write_mask(tmp_path / "v" / "Annotations" / "3" / "0.png", torch.zeros_like(ids))
    q = read_icvos(tmp_path)[0]
    assert score_video([torch.zeros_like(ids)], q, None) == (1., 1.)
    assert score_video([torch.ones_like(ids)], q, None)[0] == 0
    with pytest.raises(ValueError): score_video([], q, None)          # an answer too few


def test_unknown_pixels_do_not_count(tmp_path):
    x, ids = picture()
    write_image(tmp_path / "v" / "JPEGImages" / "0.jpg", x)
    truth = (ids > 0).long(); truth[:8] = 255
    write_mask(tmp_path / "v" / "Annotations" / "3" / "0.png", truth)
    answer = (ids > 0).long(); answer[:8] = 1
    assert score_video([answer], read_icvos(tmp_path)[0], None)[0] == 1.


def test_faults_of_icvos(world, tmp_path):
    with pytest.raises(DataError, match="IC-VOS"): read_icvos(world[0] / "world")
    with pytest.raises(DataError, match="missing"): read_icvos(tmp_path / "nowhere")
    x, ids = picture()
    write_image(tmp_path / "v" / "JPEGImages" / "0.jpg", x)
    (tmp_path / "v" / "Annotations" / "dog").mkdir(parents=True)
    with pytest.raises(DataError, match="1 to 80"): read_icvos(tmp_path)
    question = replace(read_icvos(world[0] / "videos")[0], class_id=79)
    with pytest.raises(DataError, match="no picture of class 79"): draw_support(world[1], question)
    with pytest.raises(ConfigError, match="weights"): open_segmenter(sam="sam.pth")


def test_training_mode_is_put_back():
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(.5)).eval()
    before = net[0].running_mean.clone()
    with as_run(net, "authors"):
        assert net[1].training
        net(torch.randn(9, 3) + 4)
        assert not torch.equal(net[0].running_mean, before)
    assert torch.equal(net[0].running_mean, before) and not net[0].training
    with pytest.raises(ConfigError, match="authors"):
        with as_run(net, "train"): pass


def test_unknown_benchmark_is_named(tmp_path):
    with pytest.raises(ConfigError, match="pascal5i"): open_source(tmp_path, "voc")


# ---- video

@pytest.fixture(scope="module")
def pair():
    tracker = create_sam2(Sam2Config.test().as_fork(), 0)
    return create_dcsam(tracker.sam, create_backbone("test-vit"), side=64, seed=0), tracker


def test_gradients_reach_the_prompts_through_the_memory(pair, world):
    model, tracker = pair
    image, ids = picture()
    film = torch.rand(3, 3, 40, 60)
    last = list(follow(model.train(), tracker, film, model.look([image]), [ids > 0], grad=True))[-1]
    last.square().mean().backward()
    assert all(p.grad is not None for p in model.generator.transformer_decoder.parameters())
    model.zero_grad(set_to_none=True); tracker.zero_grad(set_to_none=True); model.eval()


def test_prompts_are_heard_on_frame_zero_only(pair):
    model, tracker = pair
    image, ids = picture()
    film = torch.rand(3, 3, 40, 60)
    calls = []
    hook = model.generator.register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad(): out = list(follow(model, tracker, film, model.look([image]), [ids > 0]))
    hook.remove()
    assert len(calls) == 1 and len(out) == 3 and out[0].shape == (40, 60)


def test_only_generator_and_decoder_learn(pair, world):
    tracker = create_sam2(Sam2Config.test().as_fork(), 0)
    model = create_dcsam(tracker.sam, create_backbone("test-vit"), side=64, seed=0)
    before = {k: v.clone() for k, v in tracker.state_dict().items()}
    train = texture_source(world[0] / "world", "train")
    config = DCSAMTrainConfig.video(2, epochs=1, per_epoch=1, batch=1, lr=1e-3)
    done = train_video(model, tracker, train, config)
    moved = {k for k, v in tracker.state_dict().items() if not torch.equal(v, before[k])}
    assert done.step == 1 and moved and all(k.startswith("sam_mask_decoder.") for k in moved)
    assert not any("iou_prediction_head" in k or "pred_obj_score_head" in k for k in moved)
    names = {g["name"] for g in video_groups(model, config, 1, decoder=False)}
    assert names == {"generator"}


def test_the_loss_of_a_tube_is_repeatable(pair, world):
    model, tracker = pair
    batch = list(sample_episodes(texture_source(world[0] / "world", "train"), 1, seed=2))
    with torch.no_grad(): a, b, c = (float(tube_loss(model, tracker, batch, s)["loss"]) for s in (1, 1, 2))
    assert a == b != c


def test_a_tracker_of_another_sam_is_refused(pair):
    model, _ = pair
    other = create_sam2(Sam2Config.test().as_fork(), 5)
    with pytest.raises(ConfigError, match="another SAM"): check_pair(model, other)
    with pytest.raises(ConfigError, match="another SAM"): VideoSegmenter(model, other, tokens=True)
    assert not VideoSegmenter(model, other).tokens


def test_videos_of_one_frame_and_of_nothing(pair):
    model, tracker = pair
    image, ids = picture()
    s = VideoSegmenter(model, tracker)
    told = s.prompt(image, ids, ["it"])
    assert len(list(s.track(image[None], told))) == 1
    with pytest.raises(DataError, match="no frame"): list(s.track(iter(()), told))
    by_mask = VideoSegmenter(model, tracker, tokens=False, threshold=1.)
    assert int(torch.stack(list(by_mask.track(torch.rand(2, 3, 40, 60), told))).sum()) == 0


# ---- video files

def test_video_files_of_the_authors_bring_their_own_sam2(tmp_path):
    from tests.test_dcsam_prompts import published
    from timet_nb.dcsam.prompts import DCSAMConfig
    from timet_nb.sam.release import official_state, save_sam2
    theirs, other = (create_sam2(Sam2Config.test(), seed) for seed in (1, 2))
    torch.manual_seed(0)
    g, _, state = published(DCSAMConfig.paper("resnet50", sam_version=2, dim=theirs.config.sam.dim, queries=3), "resnet50", True)
    state = {k: v for k, v in state.items() if ".sam2." not in k}
    state |= {f"module.sam2.{k}": v for k, v in official_state(theirs).items()}
    torch.save(state, tmp_path / "video.pt"); save_sam2(other, tmp_path / "sam2.safetensors")
    s = open_segmenter(tmp_path / "video.pt", tmp_path / "sam2.safetensors", None)
    assert isinstance(s, VideoSegmenter) and s.tokens and s.tracker.config.single and not s.tracker.config.pad_empty
    assert s.model.sam.config.fit == "corners"
    for k, v in official_state(theirs).items(): assert torch.equal(official_state(s.tracker)[k], v), k
    for k, v in g.state_dict().items(): assert torch.equal(s.model.generator.state_dict()[k], v), k
    image, ids = picture()
    film = list(s.track(torch.rand(2, 3, 40, 60), s.prompt(image, (ids > 0).long(), ["it"])))
    assert len(film) == 2 and film[0].shape == (40, 60)
