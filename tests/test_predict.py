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
from timet_nb.relearn.divergence import diff_divergence, prediction_loss
from timet_nb.relearn.forecast import OneCycle, PredictTrainConfig, copy_last, evaluate_predictor, predict, train_predictor
from timet_nb.relearn.predict import read_frames, run, windows
from timet_nb.relearn.release import PRESETS, count_weights, create_simvp, load_simvp, save_simvp
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
    with pytest.raises(ConfigError, match="one-cycle, cosine"): PredictTrainConfig(schedule="linear")


def test_predict_shapes_and_faults():
    model, x = create_simvp(TINY), torch.rand(3, 9, 1, 16, 16)
    assert predict(model, x).shape == (3, 4, 1, 16, 16) and predict(model, x[0], 7).shape == (7, 1, 16, 16)
    assert predict(model, 9 * x, clip=False).min() < 0 <= predict(model, x).min()
    assert torch.equal(copy_last(x, 2)[:, 1], x[:, -1])
    with pytest.raises(DataError, match="4 or more"): predict(model, x[:, :3])
    with pytest.raises(DataError, match="T, C, H, W"): predict(model, x[0, 0])
    with pytest.raises(DataError, match="more than T=4"): evaluate_predictor(model, list(x[:, :4]))


def test_evaluation_does_not_depend_on_the_batch():
    model, clips = create_simvp(TINY), MovingDigits(WORLD, 7)
    a, b = (evaluate_predictor(model, clips, n) for n in (3, 7))
    assert a["model"]["mse"] == pytest.approx(b["model"]["mse"], abs=1e-6) and a["copy"] == pytest.approx(b["copy"])
    assert a["n"] == 7 and len(windows(torch.rand(10, 1, 4, 4), 4, 3)) == 3


def test_what_81_forecast_makes_is_to_be_had_from_predict_too():
    from timet_nb.relearn import forecast
    from timet_nb.relearn import predict as room
    for name in ("OneCycle", "PredictTrainConfig", "copy_last", "evaluate_predictor", "predict", "train_predictor"):
        assert getattr(room, name) is getattr(forecast, name) and name in room.__all__
    assert {"grey", "read_frames", "run", "windows"} <= set(room.__all__)


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
    call = lambda o, **k: run(str(tmp_path / "c.npy"), str(tmp_path / "m.safetensors"), str(tmp_path / o), device="cpu", **k)
    assert call("o", frames=9, ahead=True) == {"c": {}} and len(list((tmp_path / "o" / "c").glob("*.png"))) == 9
    assert set(call("p", frames=2)["c"]) == {"model", "copy"}
    with pytest.raises(DataError, match="8 or more"): call("q")
    with pytest.raises(CheckpointError): run(str(tmp_path / "c.npy"), str(tmp_path / "c.npy"), str(tmp_path / "q"))


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


def test_a_folder_with_answers_is_not_written_again(tmp_path):
    run("digits", out=str(tmp_path / "o"), frames=3, steps=1, device="cpu")
    for call in (dict(frames=2), dict(weights=str(tmp_path / "o" / "model.safetensors"))):
        with pytest.raises(DataError, match="not empty"): run("digits", out=str(tmp_path / "o"), steps=1, device="cpu", **call)
    assert len(list((tmp_path / "o" / "digits-0").glob("*.png"))) == 3
    clip_folder(tmp_path / "in")
    with pytest.raises(DataError, match="inside the data"): run(str(tmp_path / "in"), out=str(tmp_path / "in" / "o"), device="cpu")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="a file"): run("digits", out=str(tmp_path / "file"), device="cpu")
    (tmp_path / "empty").mkdir(); run("digits", out=str(tmp_path / "empty"), steps=1, device="cpu")


@pytest.mark.parametrize("source", ["digits", "clips"])
def test_the_trained_model_is_kept_and_answers_alike(tmp_path, capsys, source):
    clip_folder(tmp_path / "clips", "a", 14, 48); clip_folder(tmp_path / "clips", "b", 12, 48)
    source, size = (source, "") if source == "digits" else (str(tmp_path / "clips"), "32")
    rows = run(source, out=str(tmp_path / "o"), size=size, steps=3, device="cpu")
    said = capsys.readouterr().out
    for word in ("mse", "mae", "psnr", "ssim", "copy of the last frame", "mean", *rows): assert word in said, word
    kept = json.loads((tmp_path / "o" / "answers.json").read_text())
    assert set(kept["mean"]) == {"model", "copy"} and {"mse", "mae", "psnr", "ssim"} <= set(kept["mean"]["model"])
    assert kept["mean"]["model"]["mse"] == pytest.approx(np.mean([r["model"]["mse"] for r in rows.values()]))
    assert f"{kept['mean']['copy']['ssim']:.4f}" in said
    again = run(source, str(tmp_path / "o" / "model.safetensors"), str(tmp_path / "p"), device="cpu")
    for c in rows: assert again[c] == {w: pytest.approx(m, abs=1e-6) for w, m in rows[c].items()}
    from timet_nb.features.checkpoints import load_header
    header = load_header(tmp_path / "o" / "model.safetensors")
    assert header["steps"] == 3 and header["config"]["size"] == [32, 32]


@pytest.mark.parametrize("wrong, words", [
    (dict(size="foo"), ("--size", "64x96")), (dict(size="0"), ("--size",)), (dict(size="32x"), ("--size",)), (dict(size="-8"), ("--size",)), (dict(size="4"), ("8 or more",)),
    (dict(frames=-1), ("--frames", "-1")), (dict(steps=0), ("--steps", "--weights")), (dict(steps=-5), ("--steps",))])
def test_numbers_that_cannot_be_are_told_before_training(tmp_path, wrong, words):
    with pytest.raises(ConfigError) as e: run("digits", out=str(tmp_path / "o"), device="cpu", **wrong)
    for w in words: assert w in str(e.value)
    assert not (tmp_path / "o").exists()


def test_arrays_with_values_that_no_frame_has(tmp_path):
    good = np.random.default_rng(0).random((16, 16, 16))
    for name, x, word in (("nan", np.where(good > .9, np.nan, good), "finite"), ("loud", 255 * good, "divide by 255"), ("ints", (255 * good).astype(np.int64), "divide by 255"),
                          ("minus", 2 * good - 1, r"\[0, 1\]"), ("shorts", (60000 * good).astype(np.uint16), r"\[0, 1\]"), ("complex", good + 0j, "dtype")):
        np.save(tmp_path / f"{name}.npy", x)
        with pytest.raises(DataError, match=word) as e: run(str(tmp_path / f"{name}.npy"), out=str(tmp_path / "o"), device="cpu")
        assert f"{name}.npy" in str(e.value) and not (tmp_path / "o").exists()
    for x in ((255 * good).astype(np.uint8), good > .5, good.astype(">f4"), good.astype(np.float16)):
        np.save(tmp_path / "ok.npy", x)
        assert read_frames(tmp_path / "ok.npy", TINY, (16, 16))[0]["ok"].shape == (16, 1, 16, 16)


def test_frames_of_several_sizes(tmp_path):
    clip_folder(tmp_path / "in", "a", 12)
    write_image(tmp_path / "in" / "a" / "00007.png", torch.rand(3, 30, 20))
    with pytest.raises(DataError) as e: run(str(tmp_path / "in"), out=str(tmp_path / "o"), steps=1, device="cpu")
    for word in ("00007.png", "30 x 20", "24 x 24", "--size HxW"): assert word in str(e.value)
    rows = run(str(tmp_path / "in"), out=str(tmp_path / "o"), size="16", steps=1, device="cpu")
    assert set(rows["a"]) == {"model", "copy"}


def test_a_size_of_ones_own_reads_the_same_frames(tmp_path):
    clip_folder(tmp_path / "in", "a", 3)
    rgb = SimvpConfig(4, 3, (16, 16), 4, 16, 2, 2)
    a, b = (read_frames(tmp_path / "in", rgb, (16, 16), mixed=m)[0]["a"] for m in (False, True))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["film.dcm", "film"])
def test_dicom_films(tmp_path, name):
    pytest.importorskip("pydicom")
    import shutil
    from timet_nb.data.dicom import echo_path, read_dicom
    shutil.copy(echo_path(), tmp_path / name)
    rgb = SimvpConfig(4, 3, (16, 24), 4, 16, 2, 2)
    film = read_frames(tmp_path / name, rgb, (16, 24))[0]["film"]
    assert film.shape == (30, 3, 16, 24) and torch.allclose(film, read_dicom(tmp_path / name, (16, 24)).frames, atol=1e-6)
    rows = run(str(tmp_path / name), out=str(tmp_path / "o"), size="16x24", steps=1, device="cpu")
    assert set(rows["film"]) == {"model", "copy"}


# predictors' files
def test_tensors_beyond_the_network_are_refused_by_name(tmp_path):
    state = create_simvp(TINY).state_dict()
    for name in ("extra.thing", "hid.enc.0.reduction2.weight", "dec.dec.9.conv.weight"):
        for held in ({**state, name: torch.ones(1)}, {"state_dict": {f"model.{k}": v for k, v in {**state, name: torch.ones(1)}.items()}}):
            with pytest.raises(CheckpointError, match=name): load_simvp(held)
    flat = create_simvp(SimvpConfig(4, 1, (16, 16), 4, 16, 2, 2, mlp_ratio=2)).state_dict()      # the stack is as wide as the inside: no reduction
    flat |= {"hid.enc.0.reduction.weight": torch.zeros(16, 16, 1, 1), "hid.enc.0.reduction.bias": torch.zeros(16)}
    with pytest.raises(CheckpointError, match="reduction"): load_simvp(flat)
    save_simvp(create_simvp(TINY), tmp_path / "m.safetensors")
    harmless = {**state, "enc.enc.0.norm.num_batches_tracked": torch.tensor(3), "total_ops": torch.zeros(1), "hid.total_params": torch.zeros(1)}
    assert len(load_simvp(harmless).report.unexpected) == 3


def test_a_lightning_file_as_openstl_writes_it(tmp_path):
    from pathlib import Path
    model = create_simvp(TINY)
    held = dict(state_dict={f"model.{k}": v for k, v in model.state_dict().items()}, hparams_name="kwargs", epoch=3,
                hyper_parameters=dict(test_mean=np.zeros((1, 1, 1), np.float32), test_std=np.float64(1.), save_dir=Path("work_dirs/x")),
                lr_schedulers=[dict(anneal_func=torch.optim.lr_scheduler.OneCycleLR._annealing_cos)])
    torch.save(held, tmp_path / "best.ckpt")
    x = torch.rand(1, 4, 1, 16, 16)
    with torch.no_grad(): assert torch.equal(load_simvp(tmp_path / "best.ckpt")(x), model.eval()(x))


def test_names_of_presets_and_of_sizes():
    with pytest.raises(ConfigError, match="foo"): create_simvp("moving-mnist", foo=3)
    with pytest.raises(ConfigError, match="did you mean 'frames'"): create_simvp(TINY, frame=3)
    assert count_weights("taxibj") == count_weights(PRESETS["taxibj"].config) == PRESETS["taxibj"].params
    for name in ("mnist", None, 3, ["kth"]):
        for f in (count_weights, create_simvp):
            with pytest.raises(ConfigError, match="moving-mnist"): f(name)


def test_nan_in_a_divergence_is_refused_and_left_to_the_loop_in_training():
    x, y = torch.rand(2, 1, 4, 1, 5, 5)
    y[0, 2] = float("nan")
    with pytest.raises(DataError, match="true: got nan"): diff_divergence(x, y)
    with pytest.raises(DataError, match="pred: got nan"): diff_divergence(y, x)
    assert prediction_loss(y, x)["loss"].isnan()                     # `fit` says at which step


# what a second reader found
def test_a_prediction_leaves_every_part_in_its_mode():
    model, x = create_simvp(TINY), torch.rand(4, 1, 16, 16)
    assert model.training
    model.hid.enc[0].block.norm1.eval()                              # a frozen norm stays frozen
    modes = [m.training for m in model.modules()]
    predict(model, x); evaluate_predictor(model, [torch.rand(6, 1, 16, 16)])
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(DataError): predict(model, torch.rand(4, 3, 16, 16))
    assert [m.training for m in model.modules()] == modes            # after an error, too


def test_looking_at_a_prediction_does_not_change_the_training():
    ends = []
    for look in (False, True):
        model, clips = create_simvp(TINY, 1), MovingDigits(WORLD, 20)
        train_predictor(model, clips, PredictTrainConfig(4, 4, 1e-2), after_step=lambda m, i: evaluate_predictor(m, [clips[0]]) and None if look else None)
        assert int(model.state_dict()["hid.enc.0.block.norm1.num_batches_tracked"]) == 4
        ends.append(model.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(*(e.values() for e in ends)))


def test_what_a_prediction_is_given_is_looked_at():
    model, x = create_simvp(TINY), torch.rand(4, 1, 16, 16)
    y = predict(model, x)
    assert torch.equal(predict(model, x.numpy()), y) and torch.equal(predict(model, x.double()), y)
    bytes_ = (255 * x).round().byte()
    assert torch.equal(predict(model, bytes_), predict(model, bytes_.float() / 255))
    assert torch.allclose(predict(model, x.clamp(.1, .9) * 0 - 1e-6), predict(model, x * 0))       # rounding
    for wrong, words in ((255 * x, "divide by 255"), (x * np.nan, "finite"), (x - 2, r"\[0, 1\]"), ([1, 2], "dtype"), ("x", "tensor"), (x.long(), "dtype")):
        with pytest.raises(DataError, match=words): predict(model, wrong)
    with pytest.raises(DataError, match="finite"): predict(model, x * np.nan, clip=False)
    for n in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match="1 or more"): predict(model, x, n)


@pytest.mark.parametrize("wrong", [dict(lr=-1.), dict(lr=0), dict(lr=float("nan")), dict(lr=float("inf")), dict(lr="a"), dict(alpha=-5), dict(alpha=float("nan")), dict(tau=0), dict(tau=float("nan")),
                                   dict(steps=0), dict(steps=2.5), dict(steps=True), dict(batch=-1), dict(schedule="step"), dict(reduction="none"), dict(form="x"), dict(squared="none"),
                                   dict(warmup=.1), dict(schedule="cosine", warmup=1.), dict(schedule="cosine", warmup=float("nan"))])
def test_trainings_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=list(wrong)[-1]): PredictTrainConfig(**wrong)


def windows_of(given, frames, n=3, **told):
    read = lambda k, first, m: torch.rand(frames, 1, 16, 16, generator=torch.Generator().manual_seed(k))[:m]
    return layouts.Windows("mine", tuple((k, 0) for k in range(n)), read, frames, given, **told)


def test_what_a_data_set_gives_is_what_is_looked_at():
    model, clips = create_simvp(TINY), windows_of(10, 15)
    got = evaluate_predictor(model, clips)
    want = evaluate_predictor(model, [c[6:] for c in (clips[0], clips[1], clips[2])])
    assert got == want and len(got["steps"]["model"]) == 5
    own = create_simvp(TINY, 1); train_predictor(own, clips, PredictTrainConfig(2, 2))
    twin = create_simvp(TINY, 1); train_predictor(twin, [clips[k][6:] for k in range(3)], PredictTrainConfig(2, 2))
    assert all(torch.equal(p, q) for p, q in zip(own.parameters(), twin.parameters()))
    for call in (evaluate_predictor, lambda m, c: train_predictor(m, c, PredictTrainConfig(2, 2))):
        with pytest.raises(DataError, match="mine: given"): call(model, windows_of(3, 15))


def test_standardised_clips_are_not_cut():
    model, clips = create_simvp(TINY), windows_of(4, 8, mean=280., std=10.)
    wide = replace(clips, read=lambda *a: 6 * clips.read(*a) - 3)
    got, x = evaluate_predictor(model, wide), torch.stack([wide[k] for k in range(3)])
    assert got["model"]["mse"] == pytest.approx(float((predict(model, x[:, :4], clip=False) - x[:, 4:]).square().mean()))
    with pytest.raises(DataError, match="clip=False"): evaluate_predictor(model, list(x))
    assert evaluate_predictor(model, list(x), clip=False)["model"] == got["model"]


def test_evaluation_is_that_of_all_clips_at_once():
    from timet_nb.relearn.metrics import frame_metrics
    model, x = create_simvp(TINY), torch.rand(7, 10, 1, 16, 16)
    at_once = frame_metrics(predict(model, x[:, :4], 6), x[:, 4:])
    for batch in (1, 3, 16):
        got = evaluate_predictor(model, list(x), batch)
        for k in at_once: assert got["model"][k] == pytest.approx(at_once[k], abs=1e-6)
        assert np.mean(got["steps"]["model"]) == pytest.approx(at_once["mse"], abs=1e-6)


def test_evaluation_keeps_one_batch_in_memory(monkeypatch):
    from timet_nb.relearn import forecast
    most, real = [0], forecast.frame_metrics
    monkeypatch.setattr(forecast, "frame_metrics", lambda a, b, net=None: most.append(len(a)) or real(a, b, net))
    evaluate_predictor(create_simvp(TINY), windows_of(4, 6, 21), batch=4)
    assert max(most) == 4


def test_clips_that_cannot_be_learned_or_judged():
    model, how, ok = create_simvp(TINY), PredictTrainConfig(2, 2), torch.rand(4, 8, 1, 16, 16)
    for clips in (ok.double(), (255 * ok).byte(), ok, list(ok.numpy())): train_predictor(create_simvp(TINY), clips, how)
    a, b = create_simvp(TINY, 1), create_simvp(TINY, 1)
    train_predictor(a, (255 * ok).byte(), how); train_predictor(b, (255 * ok).byte().float() / 255, how)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    mixed = [torch.rand(8 + k % 2, 1, 16, 16) for k in range(4)]
    for call in (lambda c: train_predictor(model, c, how), lambda c: evaluate_predictor(model, c), lambda c: evaluate_predictor(model, c, 1)):
        with pytest.raises(DataError, match="one shape"): call(mixed)
        with pytest.raises(DataError, match="torch tensor"): call([(ok[0], ok[1])] * 4)
    with pytest.raises(DataError, match="no clip"): evaluate_predictor(model, [])


def test_cosine_with_a_rise_is_timms():
    from timet_nb.base.runtime import import_timm
    from timet_nb.relearn.forecast import _rate
    import_timm()
    from timm.scheduler import CosineLRScheduler
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], 5e-4)
    theirs = CosineLRScheduler(adam, t_initial=50, lr_min=1e-6, warmup_lr_init=1e-5, warmup_t=5)
    rate = _rate(PredictTrainConfig(50, lr=5e-4, schedule="cosine", warmup=PRESETS["taxibj"].warmup / PRESETS["taxibj"].epochs))
    for k in range(50):
        theirs.step(k)
        assert rate(k) == pytest.approx(adam.param_groups[0]["lr"], rel=1e-9)


def test_the_loss_as_printed():
    x, y = torch.rand(2, 3, 5, 1, 6, 6)
    got = prediction_loss(x, y, .3, reduction="sum", squared="sum")
    assert torch.allclose(got["loss"], (x - y).square().flatten(1).sum(1).mean() + .3 * diff_divergence(x, y))
    assert got["mse"] == prediction_loss(x, y)["mse"] and prediction_loss(x, y, 0, squared="sum")["loss"] == (x - y).square().sum() / 3
    with pytest.raises(ConfigError, match="squared"): prediction_loss(x, y, squared="none")
    assert torch.equal(prediction_loss(x, y)["loss"], torch.nn.functional.mse_loss(x, y) + .1 * diff_divergence(x, y, reduction="mean"))


@pytest.mark.parametrize("wrong", [dict(channels=0), dict(channels=1.5), dict(hid_t=0), dict(mlp_ratio=float("nan")), dict(mlp_ratio="x"), dict(size=(16,)), dict(size="16"), dict(size=(0, 16)), dict(frames=2.5), dict(drop_path=1.), dict(drop=-.1), dict(scale=float("nan")), dict(kernel=0)])
def test_more_sizes_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match=list(wrong)[0]): create_simvp(replace(TINY, **wrong))


def test_a_side_is_a_square(): assert replace(TINY, size=16).size == (16, 16) == replace(TINY, size=[16, 16]).size


# predictors' files, again
def test_the_size_of_frames_is_that_of_the_preset():
    from timet_nb.relearn.release import tell_config
    from timet_nb.relearn.simvp import Simvp
    for p in PRESETS.values():
        with torch.device("meta"): state = Simvp(p.config).state_dict()
        assert tell_config(state).size == p.config.size
    other = load_simvp(create_simvp(TINY).state_dict())
    assert other.config.size == (64, 64) and "64x64 assumed, give --size" in other.notes[0]
    bj = load_simvp(create_simvp("taxibj").state_dict())
    assert bj.config.size == (32, 32) and bj.notes == ()


def test_tensors_beside_the_predictor_are_left_out_by_name():
    state = create_simvp(TINY).state_dict()
    for wrap in ("model.", "_forward_module.model.", "module.", ""):
        held = {f"{wrap}{k}": v for k, v in state.items()} | ({"criterion.w": torch.ones(3)} if wrap else {})
        model = load_simvp({"state_dict": held})
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
        assert ("criterion.w" in str(model.notes)) == bool(wrap)
    with pytest.raises(CheckpointError, match="2 predictors"): load_simvp({f"{w}.{k}": v for k, v in state.items() for w in ("model", "ema")})


def test_counters_may_be_absent_and_other_holes_are_told_once(capsys):
    state = create_simvp(TINY).state_dict()
    less = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert set(load_simvp(less).report.missing) == set() and len(less) < len(state)
    with pytest.raises(CheckpointError, match="readout.bias") as e: load_simvp({k: v for k, v in state.items() if k != "dec.readout.bias"})
    assert str(e.value).count("missing: ") == 1 and capsys.readouterr().out == ""


# run, again
def saved(tmp_path, **changes): return str(save_simvp(create_simvp(replace(TINY, **changes)), tmp_path / "m.safetensors"))


def test_two_channels(tmp_path):
    m = saved(tmp_path, channels=2)
    np.save(tmp_path / "flow.npy", np.random.default_rng(0).random((8, 2, 16, 16)))
    rows = run(str(tmp_path / "flow.npy"), m, str(tmp_path / "o"), device="cpu")
    assert set(rows) == {"flow"} and len(list((tmp_path / "o" / "flow").glob("*.png"))) == 4
    clip_folder(tmp_path / "in")
    with pytest.raises(DataError, match="sees 2 channels"): run(str(tmp_path / "in"), m, str(tmp_path / "p"), device="cpu")
    assert not (tmp_path / "p").exists()


def test_a_gif_that_cannot_be_written_is_told_in_words(tmp_path):
    from timet_nb.relearn.predict import _write
    (tmp_path / "clip.gif").mkdir()
    with pytest.raises(DataError, match="cannot write"): _write(tmp_path, torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16), None)


def test_one_run_a_folder(tmp_path):
    from timet_nb.base.store import folder_lock
    (tmp_path / "o").mkdir()

    def late(text):                                        # a second call that began while the folder was empty
        if not text.startswith("trained"): return
        late.done = True
        with pytest.raises(ConfigError, match="in use"):
            with folder_lock(tmp_path / "o"): pass
        for resume, words in ((False, "not empty"), (True, "in use")):
            with pytest.raises((DataError, ConfigError), match=words): run("digits", out=str(tmp_path / "o"), steps=1, device="cpu", resume=resume)
    run("digits", out=str(tmp_path / "o"), steps=1, device="cpu", say=late)
    assert late.done


@pytest.mark.parametrize("where", ["step 3", "trained"])
def test_a_stopped_run_goes_on(tmp_path, capsys, where):
    call = lambda o, **k: run("digits", out=str(tmp_path / o), device="cpu", **{"steps": 5, **k})

    def stop(text):
        if text.startswith(where): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match="--resume goes on"): call("a", say=stop)
    assert capsys.readouterr().err == "stopped: the same call with --resume goes on\n"
    with pytest.raises(DataError, match="--resume goes on there"): call("a")
    with pytest.raises(ConfigError, match="steps: 5 then, 6 now"): call("a", resume=True, steps=6)
    said = []
    whole, rest = call("b"), call("a", resume=True, say=said.append)
    assert whole == rest and len(said) == (3 if where == "step 3" else 1) and "trained for 5 steps" in said[-1]
    a, b = (load_simvp(tmp_path / o / "model.safetensors").state_dict() for o in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ConfigError, match="no run was stopped"): call("none", resume=True)


def test_a_run_is_not_resumed_with_other_clips_or_another_model(tmp_path):
    m, clip = saved(tmp_path), tmp_path / "c.npy"
    call = lambda **k: run(str(clip), m, str(tmp_path / "o"), device="cpu", **k)
    np.save(clip, np.zeros((9, 16, 16))); call()
    call(resume=True)
    np.save(clip, np.ones((9, 16, 16)))
    with pytest.raises(ConfigError, match="first_clip"): call(resume=True)
    np.save(clip, np.zeros((9, 3, 16, 16))); call(resume=True)               # grey: the same clip
    np.save(clip, np.zeros((8, 16, 16)))
    with pytest.raises(ConfigError, match="clips: "): call(resume=True)
    save_simvp(create_simvp(TINY, 5), m)
    with pytest.raises(ConfigError, match="model: "): call(resume=True)


def test_many_clips_share_the_memory(tmp_path):
    for k in range(3): clip_folder(tmp_path / "in", f"c{k}", 9)
    grey_frame = 4 * 16 * 16
    got, notes = read_frames(tmp_path / "in", TINY, (16, 16), room=3 * 5 * grey_frame)
    assert {len(v) for v in got.values()} == {5} and len(notes) == 3
    assert {len(v) for v in read_frames(tmp_path / "in", TINY, (16, 16), room=0, least=7)[0].values()} == {7}


def test_notes_are_told(tmp_path, capsys):
    from timet_nb.systems import predict as verb
    torch.save(create_simvp(TINY).state_dict(), tmp_path / "m.pth")
    clip_folder(tmp_path / "in", "a", 9); clip_folder(tmp_path / "in", "b", 3)
    verb(str(tmp_path / "in"), str(tmp_path / "m.pth"), str(tmp_path / "o"), device="cpu")
    err = capsys.readouterr().err
    assert "note: b: left out, 3 frames of 8" in err and "64x64 assumed, give --size" in err
    kept = json.loads((tmp_path / "o" / "answers.json").read_text())["notes"]
    assert all(f"note: {x}" in err for x in kept) and len(kept) == len(err.splitlines())
    verb(str(tmp_path / "in"), str(tmp_path / "m.pth"), str(tmp_path / "p"), size="16", device="cpu")
    assert "assumed" not in capsys.readouterr().err
    verb("digits", out=str(tmp_path / "q"), steps=20, device="cpu")
    assert sum(line.startswith("step ") and "loss" in line for line in capsys.readouterr().err.splitlines()) == 9


def test_the_gif_of_an_answer_and_capitals_are_read(tmp_path):
    m = saved(tmp_path)
    np.save(tmp_path / "c.npy", np.random.default_rng(0).random((8, 16, 16)))
    (tmp_path / "c.npy").rename(tmp_path / "C.NPY")
    run(str(tmp_path / "C.NPY"), m, str(tmp_path / "o"), device="cpu")
    film = read_frames(tmp_path / "o" / "C" / "clip.gif", TINY, (16, 32))[0]["clip"]
    assert film.shape == (8, 1, 16, 32)
    (tmp_path / "x.gif").write_bytes(b"GIF89a nothing")
    with pytest.raises(DataError, match="x.gif"): read_frames(tmp_path / "x.gif", TINY, (16, 16))


def test_messages_fit(tmp_path):
    m = saved(tmp_path)
    np.save(tmp_path / "c.npy", np.zeros((3, 16, 16)))
    with pytest.raises(DataError) as e: run(str(tmp_path / "c.npy"), m, str(tmp_path / "o"), ahead=True, device="cpu")
    assert "4 or more: the model looks at 4" in str(e.value) and "held back" not in str(e.value) and "[" not in str(e.value)
    np.save(tmp_path / "last.npy", np.zeros((9, 16, 16, 3)))
    with pytest.raises(DataError, match="moveaxis"): read_frames(tmp_path / "last.npy", TINY, (16, 16))
    red = np.zeros((9, 3, 16, 16)); red[:, 0] = 1
    np.save(tmp_path / "red.npy", red)
    assert torch.allclose(read_frames(tmp_path / "red.npy", TINY, (16, 16))[0]["red"], torch.tensor(.299))
    with pytest.raises(ConfigError, match="square"): run("digits", out=str(tmp_path / "o"), size="32x64", device="cpu")
    for seed in (-1, 2 ** 40):
        with pytest.raises(ConfigError, match="--seed"): run("digits", out=str(tmp_path / "o"), seed=seed, device="cpu")
    assert not (tmp_path / "o").exists()
