"Weather, people and digits over photographs: the published forms made small, files that are damaged or would run code, and every preset by name."
import gzip
import os
import pickle
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.decode import read_image, write_image
from timet_nb.data.digits import DigitWorld, digit_images, render_digits
from timet_nb.relearn import datasets, layouts
from timet_nb.relearn.datasets import ALL_DATASETS, DigitsOnPictures, cifar_batch, human, mnist_cifar, open_dataset, pictures
from timet_nb.relearn.metrics import openstl_metrics
from timet_nb.relearn.release import PRESETS
from timet_nb.relearn.weather import _field, _whole, hours_of, merge_stats, read_netcdf, weather


def noise(*shape, seed=0): return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# pickles
def python2_batch(images):
    "The bytes of a batch as Python 2 and an old NumPy wrote CIFAR-10: protocol 2, byte strings."
    text = lambda s: b"U" + bytes([len(s)]) + s
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    kind = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    rows = b"M" + len(flat).to_bytes(2, "little") + b"M" + flat.shape[1].to_bytes(2, "little") + b"\x86"
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R(K\x01" + rows + kind
             + b"\x89T" + flat.size.to_bytes(4, "little") + flat.tobytes() + b"tb")
    return b"\x80\x02}(" + text(b"batch_label") + text(b"training batch 1 of 5") + text(b"data") + array + text(b"labels") + b"](K\x03eu."


def batch_bytes(images, protocol=2, key=b"data"):
    return pickle.dumps({key: images.transpose(0, 3, 1, 2).reshape(len(images), -1), b"labels": [1] * len(images)}, protocol)


@pytest.mark.parametrize("write", [python2_batch, batch_bytes, lambda x: batch_bytes(x, 3), lambda x: batch_bytes(x, 4, "data")],
                         ids=["python 2", "2", "3", "4"])
def test_batches_of_every_age(tmp_path, write):
    images = noise(5, 32, 32, 3)
    path = tmp_path / "data_batch_1"; path.write_bytes(write(images))
    assert (cifar_batch(path) == images).all()


def test_the_python_2_form_is_what_pickle_itself_reads():
    images = noise(3, 32, 32, 3)
    held = pickle.loads(python2_batch(images), encoding="bytes")
    assert (held[b"data"].reshape(3, 3, 32, 32).transpose(0, 2, 3, 1) == images).all() and held[b"labels"] == [3]


@dataclass
class Call:
    what: object
    args: tuple
    def __reduce__(self): return (self.what, self.args)


MARK = "import sys; sys.rude_pickle = True"


@pytest.mark.parametrize("rude", [
    Call(exec, (MARK,)), Call(eval, ("__import__('sys').__setattr__('rude_pickle', 1)",)), Call(os.system, ("true",)),
    Call(getattr, ("a", "upper")), Call(__import__, ("sys",)), Call(np.load, ("x",)), Call(np.frombuffer, (b"ab", "u1")),
    Call(type, ("X", (), {})), Call(bytes, (9,))], ids=lambda c: c.what.__name__)
def test_nothing_in_a_pickle_is_run(tmp_path, rude):
    path = tmp_path / "data_batch_1"
    for held in (rude, {b"data": rude}, {b"labels": [rude], b"data": np.zeros((1, 3072), np.uint8)}):
        path.write_bytes(pickle.dumps(held, 2))
        with pytest.raises(DataError, match="data_batch_1.*asks for .*nothing was run"): cifar_batch(path)
    assert not hasattr(sys, "rude_pickle")


@pytest.mark.parametrize("held", [
    {b"data": np.zeros((2, 3072))}, {b"data": np.array([{}], object)}, {b"data": np.zeros((2, 100), np.uint8)}, {b"data": [1, 2]},
    {b"rows": np.zeros((2, 3072), np.uint8)}, [1], 7, None], ids=repr)
def test_pickles_of_something_else(tmp_path, held):
    path = tmp_path / "test_batch"; path.write_bytes(pickle.dumps(held, 2))
    with pytest.raises(DataError, match="test_batch.*\n.*CIFAR-10"): cifar_batch(path)


def test_damaged_batches_are_refused_or_harmless(tmp_path):
    whole, path = python2_batch(noise(2, 32, 32, 3)), tmp_path / "data_batch_1"
    head, rng = 260, np.random.default_rng(0)
    for trial in range(300):
        raw = bytearray(whole)
        raw[int(rng.integers(head))] = int(rng.integers(256))
        if trial % 3 == 0: raw = raw[:int(rng.integers(len(raw)))]
        path.write_bytes(raw)
        try: assert cifar_batch(path).dtype == np.uint8
        except DataError: pass
    for raw in (b"", b"\x80", b"text", b"(" * 5000):
        path.write_bytes(raw)
        with pytest.raises(DataError): cifar_batch(path)


# digits over pictures
@pytest.fixture
def cifar(tmp_path):
    at = tmp_path / "cifar10" / "cifar-10-batches-py"; at.mkdir(parents=True)
    for k, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_10", "test_batch"]):
        (at / name).write_bytes(python2_batch(noise(4, 32, 32, 3, seed=k)))
    (at / "batches.meta").write_bytes(b"not read"); (at / "readme.html").write_text("not read")
    return tmp_path


def test_pictures(cifar):
    for split, seeds in (("all", (0, 1, 2, 3)), ("train", (0, 1, 2)), ("test", (3,))):
        got = pictures(cifar, split)
        assert (np.stack([got[i] for i in range(len(got))]) == np.concatenate([noise(4, 32, 32, 3, seed=k) for k in seeds])).all()
    mine = cifar / "mine" / "deeper"; mine.mkdir(parents=True); write_image(mine / "b.png", torch.rand(3, 20, 30))
    assert pictures(cifar / "mine")[0].shape == (20, 30, 3) and "mine: 1" in repr(pictures(cifar / "mine"))
    (mine / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="a.jpg"): pictures(cifar / "mine")[0]
    with pytest.raises(DataError, match="no pictures"): pictures(cifar / "none")


def test_drawn_clips(cifar):
    "The ways of clip i of the digits, full ink over one picture; workers draw the same; other digits and pictures may be used."
    world, backs = DigitWorld(48, 20, 2, 6, seed=3), pictures(cifar).items // 2        # nothing is white but digits
    drawn = DigitsOnPictures(backs, world=world, n=4)
    alone = render_digits(world, 2)
    cols, left = torch.arange(48), alone.places[:, :, 0, None]                           # left is (K, T, 1)
    sure = ((left <= cols) & (cols < left + 20)).any(0)                                  # (T, W): columns that a digit may reach
    clip = drawn[2]; white = (clip == 1).all(1).any(1)
    assert clip.shape == (6, 3, 48, 48) and white.any() and not (white & ~sure).any()
    assert torch.equal(torch.stack([drawn[i] for i in range(4)]), torch.cat(list(DataLoader(drawn, 2, num_workers=2))))
    assert torch.equal(DigitsOnPictures(backs, world=world, n=2, start=2)[0], clip)
    assert DigitsOnPictures(pictures(cifar), world=world)[0].shape == clip.shape
    bars = np.full((5, 20, 20), 2, np.uint8)                                             # all ink, though hardly visible
    own = DigitsOnPictures(np.zeros((1, 9, 9, 3), np.uint8), bars, world)[0]
    x, y = render_digits(world, 0).places[0, 0].tolist()
    assert (own[0, :, y:y + 20, x:x + 20] == 1).all() and set(own.unique().tolist()) == {0., 1.}
    with pytest.raises(IndexError): drawn[4]
    with pytest.raises(DataError, match="20 x 20"): DigitsOnPictures(backs, digit_images(28)[0], world)


def test_mnist_cifar(cifar):
    with pytest.raises(DataError, match="mnist_cifar_test_seq.npy"): mnist_cifar(cifar)
    train = mnist_cifar(cifar, "train", seed=5)
    assert len(train) == 10_000 and train[9].shape == (20, 3, 64, 64) and "scikit-learn" in train.notes[0]
    assert not torch.equal(train[9], mnist_cifar(cifar, "train")[9]) and torch.equal(train[9], mnist_cifar(cifar, "train", seed=5)[9])
    (cifar / "moving_mnist").mkdir()
    digits = np.zeros((3, 28, 28), np.uint8); digits[:, 10:18, 10:18] = 200
    idx = np.array([2051, 3, 28, 28], ">i4").tobytes() + digits.tobytes()
    (cifar / "moving_mnist" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx))
    own = mnist_cifar(cifar, "train", given=4, frames=12, backs=cifar)
    assert own.notes == () and own[0].shape[0] == 12 and 64 <= (own[0][0] == 1).all(0).sum() <= 128 + 40
    clips = noise(20, 2, 64, 64, 3); np.save(cifar / "moving_mnist" / "mnist_cifar_test_seq.npy", clips)
    test = mnist_cifar(cifar, frames=15)
    assert len(test) == 2 and torch.equal(test[1], torch.from_numpy(clips[:15, 1].transpose(0, 3, 1, 2).copy()) / 255)
    for wrong in (clips[..., 0], clips.astype(np.float32), clips[:5]):
        np.save(cifar / "odd.npy", wrong)
        with pytest.raises(DataError, match="odd.npy"): mnist_cifar(cifar / "odd.npy")
    with pytest.raises(ConfigError): mnist_cifar(cifar, "val")


# people
@pytest.fixture
def people(tmp_path):
    at = tmp_path / "human" / "images"; at.mkdir(parents=True)
    for k in range(1, 72, 5): write_image(at / f"S9_Eating 1.54138969_{k:06d}.jpg", torch.full((3, 16, 16), k / 100) * torch.tensor([1., .5, .1]).view(3, 1, 1))
    (tmp_path / "human" / "test.txt").write_bytes(b"images/S9_Eating 1.54138969_,1,71\r\n\r\n images/S9_Eating 1.54138969_, 16 \n")
    return tmp_path


def test_human(people):
    got = human(people, size=16)
    assert [f for _, f in got.starts] == [1, 16] and repr(got) == "human test: 2 clips, 4 + 4 frames"
    expected = torch.stack([read_image(people / "human" / "images" / f"S9_Eating 1.54138969_{k:06d}.jpg") for k in range(16, 56, 5)])
    assert torch.equal(got[1], expected) and torch.equal(human(people, size=16, colours="bgr")[1], expected.flip(1))
    assert human(people, size=24)[0].shape == (8, 3, 24, 24) and human(people / "human", size=16, given=2, frames=5, step=10)[0].shape[0] == 5
    assert human(people, frames=15)[0].shape[0] == 15
    with pytest.raises(DataError, match="train.txt"): human(people, "train")
    with pytest.raises(DataError, match="line 1.*75 frames|line 1"): human(people, frames=16)
    with pytest.raises(ConfigError): human(people, colours="grey")


@pytest.mark.parametrize("text, word", [
    (b"images/a_,1,71\nimages/a_\n", "line 2"), (b"images/a_,x,71\n", "line 1"), (b"images/a_,1,2,3,4\n", "line 1"), (b"", "no clips"),
    (b" \n\n", "no clips"), (b"\xff\xfe\x00", "test.txt"), (b"images/a_,9,5\n", "line 1"), (b"images/a_,-5,71\n", "line 1")])
def test_lists_that_do_not_fit(tmp_path, text, word):
    (tmp_path / "test.txt").write_bytes(text)
    with pytest.raises(DataError, match=word): human(tmp_path)


def test_frames_that_are_missing_or_damaged(people):
    frame = people / "human" / "images" / "S9_Eating 1.54138969_000021.jpg"
    frame.write_bytes(b"no picture")
    with pytest.raises(DataError, match="000021.jpg"): human(people)[1]
    frame.unlink()
    with pytest.raises(DataError, match="000021.jpg"): human(people)[1]


# weather
def hours(start, n): return np.arange(n) + np.datetime64(start, "h")


def values(n, seed=0, size=(8, 16)): return (280 + 15 * np.random.default_rng(seed).standard_normal((n, *size))).astype(np.float32)


def write_classic(path, times, x, unit="hours", since="1900-01-01 00:00:00.0", name="t2m", kind="f4", calendar=None, **notes):
    from scipy.io import netcdf_file
    path.parent.mkdir(parents=True, exist_ok=True)
    with netcdf_file(path, "w") as f:
        for n, k in zip(("time", "lat", "lon"), x.shape): f.createDimension(n, k)
        t = f.createVariable("time", "f8" if unit == "days" else "i4", ("time",)); t.units = f"{unit} since {since}"
        if calendar: t.calendar = calendar
        t[:] = (times - np.datetime64(since[:10], "h")).astype(int) / (24 if unit == "days" else 1)
        v = f.createVariable(name, kind, ("time", "lat", "lon")); v[:] = x
        for k, note in notes.items(): setattr(v, k, note)
    return path


def write_hdf5(path, times, x, unit="hours", since="1900-01-01 00:00:00.0", name="t2m", as_bytes=False, **notes):
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        text = f"{unit} since {since}"
        f["time"] = (times - np.datetime64(since[:10], "h")).astype(np.int64)
        f["time"].attrs["units"] = np.bytes_(text) if as_bytes else text
        f["time"].attrs["calendar"] = "proleptic_gregorian"
        f.create_dataset(name, data=x, compression="gzip", chunks=(1, *x.shape[1:]))
        f[name].attrs["_FillValue"] = np.array([np.nan], np.float32)
        for k, note in notes.items(): f[name].attrs[k] = note
        f["time"].make_scale("time"); f[name].dims[0].attach_scale(f["time"])
    return path


@pytest.fixture(params=["classic", "hdf5"])
def sky(request, tmp_path):
    "Two training files that meet at New Year, one with a hole of three hours, and a test file; (folder, {name: (hours, values)})."
    write = write_classic if request.param == "classic" else write_hdf5
    made = {2010: (hours("2010-12-31T04", 20), values(20, 1)), 2011: (hours("2011-01-01", 30), values(30, 2)), 2017: (hours("2017-03-01", 40), values(40, 3))}
    keep = np.r_[0:12, 15:30]; made[2011] = tuple(x[keep] for x in made[2011])
    for year, (t, x) in made.items(): write(tmp_path / "weather" / "2m_temperature" / f"2m_temperature_{year}_5.625deg.nc", t, x)
    return tmp_path, made


def test_weather_is_standardised_by_the_training_years(sky):
    root, made = sky
    train = np.concatenate([made[2010][1], made[2011][1]]).astype(np.float64)
    test = weather(root)
    assert (test.mean, test.std) == (pytest.approx(train.mean(), rel=1e-9), pytest.approx(train.std(), rel=1e-9))
    x = made[2017][1]
    assert len(test) == 40 - 23 and test.given == 12 and test[0].dtype == torch.float32
    np.testing.assert_allclose(test[5][:, 0].numpy(), (x[5:29] - train.mean()) / train.std(), atol=1e-5)
    np.testing.assert_allclose(test.units(test[16])[:, 0].numpy(), x[16:40], atol=1e-3)
    assert test.notes[0].startswith("standardised by mean") and test.notes[1] == "no hour of 2018"
    given = weather(root, stats=(1., 2.)); assert (given.mean, given.std) == (1., 2.)
    np.testing.assert_allclose(given[0][:, 0].numpy(), (x[:24] - 1) / 2, rtol=1e-6)


@pytest.mark.parametrize("keep", [1, 8])
def test_clips_cross_new_year_and_no_gap(sky, keep):
    root, made = sky
    t, x = (np.concatenate([made[y][k] for y in (2010, 2011)]) for k in (0, 1))
    train = weather(root, "train", given=5, frames=10, keep=keep)
    first = [s for _, s in train.starts]
    assert first == [k for k in range(len(t) - 9) if t[k + 9] - t[k] == np.timedelta64(9, "h")] and 15 in first and 30 not in first
    for i, s in enumerate(first): np.testing.assert_allclose(train.units(train[i])[:, 0].numpy(), x[s:s + 10], atol=1e-3)
    assert any("2012, 2013, 2014, 2015" in n for n in train.notes)
    only = weather(root, "train", frames=10, years=(2011, 2011), keep=keep)
    assert [s for _, s in only.starts] == [0, 1, 2, *range(12, 18)]


def test_weather_errors_are_in_kelvin(sky):
    root, made = sky
    test = weather(root); clip = test[3][None]
    copy, truth = clip[:, 11:12].expand(-1, 12, -1, -1, -1), clip[:, 12:]
    got, x = openstl_metrics(test.units(copy), test.units(truth), spatial_norm=True), made[2017][1].astype(np.float64)
    error = x[14] - x[15:27]
    assert got["mse"] == pytest.approx((error ** 2).mean(), rel=1e-5) and got["mae"] == pytest.approx(abs(error).mean(), rel=1e-5)
    assert got["rmse"] == pytest.approx((error ** 2).mean() ** .5, rel=1e-5)


def test_statistics_merge():
    x = np.random.default_rng(0).normal(280, 20, 1000)
    for cuts in ([], [1], [10, 500], [1, 2, 3, 999]):
        parts = [(p.size, p.mean(), p.var()) for p in np.split(x, cuts)]
        assert merge_stats(parts) == (pytest.approx(x.mean(), rel=1e-12), pytest.approx(x.std(), rel=1e-12))


@pytest.mark.parametrize("write, notes", [(write_classic, {}), (write_classic, dict(unit="days")), (write_classic, dict(since="2010-01-01 00:00:00")),
                                          (write_classic, dict(calendar="gregorian")), (write_hdf5, {}), (write_hdf5, dict(as_bytes=True))])
def test_times(tmp_path, write, notes):
    t = hours("2016-02-28T20", 30)
    path = write(tmp_path / "a.nc", t, values(30), **notes)
    assert (hours_of(*read_netcdf(path, "time")["time"]) == t.astype(int)).all()


@pytest.mark.parametrize("notes", [{}, dict(units="hours"), dict(units="fortnights since 1900-01-01"), dict(units="hours since 1900-01-01", calendar="noleap"),
                                   dict(units=3.)])
def test_times_that_are_not_told(notes):
    with pytest.raises(DataError, match="a.nc"): hours_of(np.arange(3), notes, "a.nc")


@pytest.mark.parametrize("write", [write_classic, write_hdf5])
def test_packed_values_and_holes(tmp_path, write):
    t, x = hours("2017-01-01", 6), values(6)
    raw = np.round((x - 280) / .01).astype(np.int16)
    notes = dict(scale_factor=.01, add_offset=280., missing_value=np.int16(-32768)) | (dict(kind="i2") if write is write_classic else {})
    np.testing.assert_allclose(_field(write(tmp_path / "a.nc", t, raw, **notes), "t2m"), x, atol=.0051)
    raw[4, 1, 1] = -32768
    with pytest.raises(DataError, match="a.nc: t2m.*1 holes, the first at time 4"): _field(write(tmp_path / "a.nc", t, raw, **notes), "t2m")
    x[2, 0, 0] = np.nan
    with pytest.raises(DataError, match="first at time 2"): _field(write(tmp_path / "b.nc", t, x), "t2m")
    with pytest.raises(DataError, match="b.nc.*u10"): read_netcdf(tmp_path / "b.nc", "u10")


def test_a_damaged_netcdf_is_named(tmp_path):
    "Bytes changed or cut away: an error of ours with the file's name, or numbers; never another error."
    rng = np.random.default_rng(0)
    for write in (write_classic, write_hdf5):
        whole = write(tmp_path / "sound.nc", hours("2017-01-01", 6), values(6)).read_bytes()
        path = tmp_path / "hurt.nc"
        for trial in range(150):
            raw = bytearray(whole)
            if trial % 3 == 0: raw = raw[:int(rng.integers(len(raw)))]
            else:
                for k in rng.integers(4, min(len(raw), 900), 3): raw[k] = int(rng.integers(256))
            path.write_bytes(raw)
            try: _field(path, "t2m"); hours_of(*read_netcdf(path, "time")["time"], str(path))
            except DataError as e: assert "hurt.nc" in str(e)
    for raw in (b"", b"<html>", b"CDF", b"CDF\x05" + bytes(40), b"\x89HDF\r\n\x1a\n"):
        path.write_bytes(raw)
        with pytest.raises(DataError, match="hurt.nc"): read_netcdf(path, "t2m")


def test_what_weather_refuses(sky, tmp_path_factory):
    root, made = sky
    at = root / "weather" / "2m_temperature"
    with pytest.raises(ConfigError, match="train, val, test"): weather(root, "all")
    with pytest.raises(ConfigError, match="t2m"): weather(root, variable="geopotential")
    with pytest.raises(DataError, match="10m_u_component"): weather(root, variable="u10")
    with pytest.raises(DataError, match="0 hours of 2016-2016"): weather(root, "val")
    with pytest.raises(DataError, match="40 hours.*\n.*41 on end"): weather(root, frames=41)
    write_classic(at / "again.nc", made[2017][0][:2], made[2017][1][:2])
    with pytest.raises(DataError, match="2017-03-01T00 in 2m_temperature_2017_5.625deg.nc and again.nc"): weather(root)
    (at / "again.nc").unlink()
    for year in (2010, 2011): (at / f"2m_temperature_{year}_5.625deg.nc").unlink()
    with pytest.raises(DataError, match="no hour of 2010-2015.*\n.*\n.*stats="): weather(root)
    assert len(weather(root, stats=(280., 20.))) == 17
    (empty := tmp_path_factory.mktemp("empty") / "2m_temperature").mkdir()
    with pytest.raises(DataError, match="no .nc files"): weather(empty.parent)


def test_without_h5py(tmp_path, monkeypatch):
    path = write_hdf5(tmp_path / "a.nc", hours("2017-01-01", 3), values(3))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"timet_nb\[weather\]"): read_netcdf(path, "t2m")


def test_whole_stretches():
    rng = np.random.default_rng(1)
    for _ in range(200):
        t, n = np.sort(rng.choice(60, int(rng.integers(1, 50)), replace=False)), int(rng.integers(1, 8))
        assert _whole(t, n).tolist() == layouts.cut_windows(t.tolist(), n, 1)


# by name
def test_every_preset_has_data():
    assert set(PRESETS) <= set(ALL_DATASETS) and set(layouts.DATASETS) <= set(ALL_DATASETS)
    assert ALL_DATASETS["kth"] is layouts.kth


@pytest.mark.parametrize("name", sorted(ALL_DATASETS))
def test_a_folder_that_holds_nothing_is_named(tmp_path, name):
    with pytest.raises(DataError): open_dataset(name, tmp_path / "nothing")


def test_opening_by_name(people):
    assert torch.equal(open_dataset("human", people, size=16)[1], human(people, size=16)[1])
    (people / "moving_fmnist").mkdir(); clips = noise(20, 3, 64, 64); np.save(people / "moving_fmnist" / "fmnist_test_seq.npy", clips)
    assert torch.equal(open_dataset("moving-fashion", people)[2][:, 0], torch.from_numpy(clips[:, 2]) / 255)
    for name, split, options in (("cifar", "test", {}), ("caltech", "train", {}), ("moving-mnist", "train", {}), ("human", "test", dict(sise=1))):
        with pytest.raises(ConfigError): open_dataset(name, people, split, **options)


def test_plain_data_sets_have_no_units(people):
    got = human(people, size=16)
    assert torch.equal(got.units(got[0]), got[0]) and datasets.DATASETS is layouts.DATASETS
