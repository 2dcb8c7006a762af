"Moving digits, loaders of public layouts, training and asking a predictor, and `run`, with what may be wrong with a source."
import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.data.decode import write_image
from timet_nb.data.digits import DigitWorld, MovingDigits, digit_images, path, render_digits, stream_digits
from timet_nb.relearn import layouts
from timet_nb.relearn.predict import (OneCycle, PredictTrainConfig, copy_last, evaluate_predictor, predict, read_frames, run, train_predictor,
                                      windows)
from timet_nb.relearn.release import create_simvp, save_simvp
from timet_nb.relearn.simvp import SimvpConfig

pytest.importorskip("sklearn")
TINY = SimvpConfig(4, 1, (16, 16), 4, 16, 2, 2, mlp_ratio=2)
WORLD = DigitWorld(16, 8, 1, 8)


# digits
def test_digits_are_the_same_bytes_everywhere():
    import hashlib
    clips = torch.stack([render_digits(DigitWorld(seed=s), i).frames for s in (0, 1) for i in (0, 5)])
    assert hashlib.sha256(clips.numpy().tobytes()).hexdigest()[:16] == "b0421728ca2265ca"


@pytest.mark.parametrize("world", [DigitWorld(), DigitWorld(32, 14, 3, 7, .3, "mirror", "test", 4), DigitWorld(20, 20, 1, 5), DigitWorld(40, 3, 5, 2, step=0)])
def test_masks_places_and_frames_agree(world):
    for i in range(5):
        c = render_digits(world, i)
        alone = torch.stack([c.alone(k) for k in range(world.digits)])
        assert torch.equal(alone.amax(0), c.frames)
        ids = c.masks(100)
        assert torch.equal(ids > 0, c.frames[:, 0] >= 100)
        for k in range(world.digits): assert (alone[k][:, 0][ids == k + 1] == c.frames[:, 0][ids == k + 1]).all()
        assert 0 <= c.places.min() and c.places.max() <= world.size - world.side


@pytest.mark.parametrize("bounce", ["clamp", "mirror"])
@pytest.mark.parametrize("start, speed", [(0., -.3), (1., .3), (.5, 1.), (.2, 0.), (0., 0.), (.999, .5)])
def test_paths_stay_between_the_walls(bounce, start, speed):
    p = path(start, speed, 100, bounce)
    assert p.min() >= 0 and p.max() <= 1 and np.abs(np.diff(p)).max() <= abs(speed) + 1e-9


def test_digits_do_not_touch_the_global_generator_and_workers_agree():
    np.random.seed(0); torch.manual_seed(0); a = np.random.rand(), torch.rand(1)
    np.random.seed(0); torch.manual_seed(0); clips = [render_digits(WORLD, i).frames for i in range(6)]
    assert a == (np.random.rand(), torch.rand(1))
    assert torch.equal(torch.stack(clips) / 255, torch.cat(list(DataLoader(MovingDigits(WORLD, 6), 2, num_workers=2))))
    assert torch.equal(next(islice(stream_digits(WORLD, 2), 2, 3))[1], clips[5] / 255)


def test_train_and_test_digits_differ():
    train, test = (digit_images(28, s)[0] for s in ("train", "test"))
    assert len(train) + len(test) == 1797 and not {x.tobytes() for x in train} & {x.tobytes() for x in test}


@pytest.mark.parametrize("wrong", [dict(side=65), dict(digits=0), dict(frames=0), dict(step=2.), dict(bounce="wrap")])
def test_worlds_that_cannot_be(wrong):
    with pytest.raises(ConfigError): DigitWorld(**wrong)


def test_unknown_split_of_digits():
    with pytest.raises(ConfigError, match="train, test, all"): render_digits(DigitWorld(split="val"))
    with pytest.raises(IndexError): MovingDigits(WORLD, 3)[3]


# layouts
def frames(n, size=20): return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def kth_folder(root, person=20, action="boxing", numbers=range(1, 41)):
    at = root / "kth" / action / f"person{person:02d}_{action}_d1_uncomp"
    at.mkdir(parents=True)
    for k, f in zip(numbers, frames(len(numbers))): write_image(at / f"image_{k:04d}.png", f)
    return at


def test_kth_splits_gaps_and_missing_actions(tmp_path):
    kth_folder(tmp_path, 20, numbers=[*range(1, 13), *range(20, 33)])
    kth_folder(tmp_path, 3)
    kth_folder(tmp_path, 21, "running")
    test = layouts.kth(tmp_path, frames=12, given=4, size=16)
    assert [len(test), len(layouts.kth(tmp_path, "train", frames=12))] == [2 + 10, 3]
    assert test[0].shape == (12, 1, 16, 16) and len(test.notes) == 4
    assert all(p.name.startswith(("person20", "person21")) for p, _ in test.starts)
    with pytest.raises(ConfigError): layouts.kth(tmp_path, "val")
    with pytest.raises(DataError, match="no clip of 90"): layouts.kth(tmp_path, frames=90)
    with pytest.raises(DataError, match="no folder boxing"): layouts.kth(tmp_path / "none")


def test_a_damaged_frame_is_named(tmp_path):
    at = kth_folder(tmp_path)
    (at / "image_0035.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="image_0035"): layouts.kth(tmp_path, frames=10)[3]


def test_array_layouts(tmp_path):
    (tmp_path / "moving_mnist").mkdir(); (tmp_path / "taxibj").mkdir()
    clips = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "moving_mnist" / "mnist_test_seq.npy", clips)
    mm = layouts.moving_mnist(tmp_path)
    assert len(mm) == 3 and torch.equal(mm[1][:, 0], torch.from_numpy(clips[:, 1]) / 255)
    np.savez(tmp_path / "taxibj" / "dataset.npz", X_test=np.full((2, 4, 2, 8, 8), -1.), Y_test=np.ones((2, 4, 2, 8, 8)))
    taxi = layouts.taxibj(tmp_path)
    assert taxi[0][:4].max() == 0 and taxi[0][4:].min() == 1
    with pytest.raises(DataError, match="X_train"): layouts.taxibj(tmp_path, "train")
    for call in (layouts.moving_mnist, layouts.taxibj, layouts.kth, layouts.caltech, layouts.kitti):
        with pytest.raises(DataError): call(tmp_path / "nothing")


def test_objects_in_arrays_are_not_run(tmp_path):
    (tmp_path / "mnist_test_seq.npy").parent.mkdir(exist_ok=True)
    np.save(tmp_path / "mnist_test_seq.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError): layouts.moving_mnist(tmp_path)


# training and asking
@pytest.mark.parametrize("n", [4, 10, 33, 100])
def test_one_cycle_is_that_of_torch(n):
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-2, n, final_div_factor=1e4)
    for i in range(n):
        assert OneCycle(1e-2, n)(i) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-6)
        adam.step()
        if i < n - 1: cycle.step()


def test_one_cycle_of_few_steps_is_finite():
    for n in (1, 2, 3): assert all(0 < OneCycle(1., n)(i) <= 1 for i in range(n))


def test_training_lowers_the_loss_and_resumes(tmp_path):
    how, clips = PredictTrainConfig(12, 4, 1e-2), MovingDigits(WORLD, 100)
    whole = create_simvp(TINY, 1)
    history = train_predictor(whole, clips, how, tmp_path / "a", seed=2).history
    assert history[-1]["loss"] < history[0]["loss"] and {"mse", "reg"} <= set(history[0])
    part = create_simvp(TINY, 1)

    def stop(model, step):
        if step == 4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_predictor(part, clips, how, tmp_path / "b", seed=2, save_every=1, after_step=stop)
    train_predictor(part, clips, how, tmp_path / "b", seed=2, save_every=1)
    assert all(torch.equal(p, q) for p, q in zip(whole.state_dict().values(), part.state_dict().values()))


def test_training_through_the_roll_out_and_to_shorter_outputs():
    for n in (2, 4, 6):
        clips = MovingDigits(replace(WORLD, frames=4 + n), 20)
        model = create_simvp(TINY, 0)
        history = train_predictor(model, clips, PredictTrainConfig(2, 2, alpha=.1)).history
        assert all(np.isfinite(h["loss"]) for h in history)


def test_unknown_schedule():
    with pytest.raises(ConfigError, match="one-cycle or cosine"): train_predictor(create_simvp(TINY), MovingDigits(WORLD, 8), PredictTrainConfig(schedule="linear"))


def test_predict_shapes_and_faults():
    model, x = create_simvp(TINY), torch.rand(3, 9, 1, 16, 16)
    assert predict(model, x).shape == (3, 4, 1, 16, 16) and predict(model, x[0], 7).shape == (7, 1, 16, 16)
    assert predict(model, 9 * x).max() <= 1 and not model.training
    assert torch.equal(copy_last(x, 2)[:, 1], x[:, -1])
    with pytest.raises(DataError, match="4 or more"): predict(model, x[:, :3])
    with pytest.raises(DataError, match="T, C, H, W"): predict(model, x[0, 0])
    with pytest.raises(DataError, match="more than T=4"): evaluate_predictor(model, list(x[:, :4]))


def test_evaluation_does_not_depend_on_the_batch():
    model, clips = create_simvp(TINY), MovingDigits(WORLD, 7)
    a, b = (evaluate_predictor(model, clips, n) for n in (3, 7))
    assert a["model"]["mse"] == pytest.approx(b["model"]["mse"], abs=1e-6) and a["copy"] == pytest.approx(b["copy"])
    assert a["n"] == 7 and len(windows(torch.rand(10, 1, 4, 4), 4, 3)) == 3


# run
def clip_folder(root, name="clip", n=12, size=24):
    (root / name).mkdir(parents=True)
    for k, f in enumerate(frames(n, size)): write_image(root / name / f"{k:05d}.png", f)
    return root


def test_run_trains_scores_and_writes(tmp_path):
    clip_folder(tmp_path / "in", "a", 16); clip_folder(tmp_path / "in", "b", 5)
    rows = run(str(tmp_path / "in"), out=str(tmp_path / "out"), size="16", steps=2, device="cpu")
    assert list(rows) == ["a"] and set(rows["a"]) == {"model", "copy"}
    assert sorted(p.name for p in (tmp_path / "out" / "a").iterdir()) == [*(f"{k:05d}.png" for k in range(4)), "clip.gif"]
    kept = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert "b: left out, 5 frames of 8" in kept["notes"] and kept["config"]["frames"] == 4


def test_run_with_weights_and_beyond_the_end(tmp_path):
    save_simvp(create_simvp(TINY), tmp_path / "m.safetensors")
    np.save(tmp_path / "c.npy", np.random.default_rng(0).random((6, 16, 16)).astype(np.float32))
    call = lambda **k: run(str(tmp_path / "c.npy"), str(tmp_path / "m.safetensors"), str(tmp_path / "o"), device="cpu", **k)
    assert call(frames=9, ahead=True) == {"c": {}} and len(list((tmp_path / "o" / "c").glob("*.png"))) == 9
    assert set(call(frames=2)["c"]) == {"model", "copy"}
    with pytest.raises(DataError, match="8 or more"): call()
    with pytest.raises(CheckpointError): run(str(tmp_path / "c.npy"), str(tmp_path / "c.npy"))


def test_a_one_frame_video_and_a_still_clip(tmp_path):
    clip_folder(tmp_path / "one", "x", 1)
    with pytest.raises(DataError, match="8 or more"): run(str(tmp_path / "one"), out=str(tmp_path / "o"), device="cpu")
    np.save(tmp_path / "still.npy", np.full((16, 16, 16, 3), 99, np.uint8).transpose(0, 3, 1, 2))
    rows = run(str(tmp_path / "still.npy"), out=str(tmp_path / "o"), size="16", steps=1, device="cpu")
    assert rows["still"]["copy"]["psnr"] == float("inf")             # nothing moves: the copy is perfect
    assert json.loads((tmp_path / "o" / "answers.json").read_text())["clips"]["still"]["copy"]["psnr"] is None


def test_too_short_to_learn_from(tmp_path):
    np.save(tmp_path / "c.npy", np.zeros((9, 3, 16, 16), np.uint8))
    with pytest.raises(DataError, match="to learn from"): run(str(tmp_path / "c.npy"), out=str(tmp_path / "o"), size="16", device="cpu")


def test_arrays_that_do_not_fit(tmp_path):
    for name, x in (("flat", np.zeros(4)), ("two", np.zeros((9, 2, 8, 8)))):
        np.save(tmp_path / f"{name}.npy", x)
        with pytest.raises(DataError, match="T, H, W"): read_frames(tmp_path / f"{name}.npy", TINY, (16, 16))
    (tmp_path / "x.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match="x.npy"): read_frames(tmp_path / "x.npy", TINY, (16, 16))


def test_a_long_clip_is_read_from_its_end_and_the_rest_is_noted(tmp_path):
    clip_folder(tmp_path / "in", "a", 9)
    rgb = SimvpConfig(4, 3, (16, 16), 4, 16, 2, 2)
    whole, none = read_frames(tmp_path / "in", rgb, (16, 16))
    last, notes = read_frames(tmp_path / "in", rgb, (16, 16), most=4)
    assert torch.equal(last["a"], whole["a"][-4:]) and notes == ["a: the last 4 of 9 frames were used"] and none == []
