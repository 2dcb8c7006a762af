"Dense features: streaming equals the naive way, the cache is never stale, kills and rivals are survived; exact PCA."
import json
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import GOLDEN, ROOT
from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.frames import write_image, write_video
from timet_nb.data.layout import Clip, find_layout
from timet_nb.features import dense
from timet_nb.features.backbone import create_backbone
from timet_nb.features.dense import CacheEntry, Moments, batches, cache_key, extract, forward_batch, pca_fit


@pytest.fixture(scope="module")
def net(): return create_backbone("test-vit")


@pytest.fixture
def folder(tmp_path):
    "Two clips of images, 5 and 3 frames of 40 x 72 pixels."
    torch.manual_seed(0)
    for name, n in (("a", 5), ("b", 3)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(n): write_image(tmp_path / "data" / name / f"{i:05}.png", torch.rand(3, 40, 72))
    return tmp_path


def clips(folder): return [Clip(n, tuple(sorted((folder / "data" / n).iterdir()))) for n in ("a", "b")]


def naive(net, clip, size, **k):
    from timet_nb.data.frames import read_clip
    with torch.no_grad(): return net.tokens(read_clip(clip, size=size, masks=False)[0], **k)


# ---------------------------------------------------------------- values

def test_equals_the_naive_way(net, folder):
    got = extract(net, clips(folder), size=(40, 72), cache=folder / "c", fp16=False, batch=2)
    assert got.names == ["a", "b"] and got.computed == 8 and got.grid == (5, 9) and got.dim == 48 and got.frames == {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2]}
    for c in clips(folder): assert torch.allclose(got.maps(c.name), naive(net, c, (40, 72)), atol=1e-5)
    half = extract(net, clips(folder), size=(40, 72), cache=False)
    assert half.arrays["a"].dtype == np.float16 and torch.allclose(half.maps("a"), got.maps("a"), atol=5e-3)
    mid = extract(net, clips(folder)[0], size=(40, 72), cache=folder / "c", fp16=False, block=1, norm=False)
    assert torch.allclose(mid.maps(), naive(net, clips(folder)[0], (40, 72), block=1, norm=False), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_batch_size_does_not_matter(net, folder, batch):
    one = extract(net, clips(folder), size=32, cache=False, fp16=False, batch=2)
    two = extract(net, clips(folder), size=32, cache=False, fp16=False, batch=batch)
    assert all(torch.allclose(one.maps(n), two.maps(n), atol=1e-5) for n in one.names)


def test_sizes_and_steps(net, folder):
    a = clips(folder)[0]
    assert extract(net, a, size=None, cache=False).sizes == {"a": (40, 72)}
    assert extract(net, a, size=20, cache=False).sizes == {"a": (24, 40)}             # 20 x 36 to whole patches
    some = extract(net, a, size=32, step=2, cache=False)
    assert some.frames["a"] == [0, 2, 4] and torch.equal(some.maps(), extract(net, a, size=32, cache=False).maps(indices=[0, 2, 4]))
    with pytest.raises(DataError, match=r"\(40, 72\)"): extract(net, a, size=(41, 72), cache=False)
    with pytest.raises(ConfigError, match="step"): extract(net, a, step=0, cache=False)
    with pytest.raises(ConfigError, match="batch"): extract(net, a, batch=0, cache=False)


def test_tensors_and_dicts(net):
    x, y = torch.rand(3, 3, 32, 48), torch.rand(2, 3, 32, 32)
    with torch.no_grad(): assert torch.allclose(extract(net, x, cache=False, fp16=False).maps(), net(x), atol=1e-5)
    both = extract(net, {"x": x, "y": y}, cache=False)
    assert both.grids == {"x": (4, 6), "y": (4, 4)} and len(both) == 2
    with pytest.raises(DataError, match="2 grids"): both.grid
    with pytest.raises(DataError, match="x, y"): both.maps("z")
    assert sum(len(c) for c in both.chunks(20)) == 3 * 24 + 2 * 16 and max(len(c) for c in both.chunks(24)) == 24
    assert torch.equal(torch.cat(list(both.chunks())), torch.cat([both.maps(n).flatten(2).mT.flatten(0, 1) for n in ("x", "y")]))
    with pytest.raises(DataError, match=r"\(T, 3, H, W\)"): extract(net, x[0], cache=False)
    with pytest.raises(DataError, match="divide by 255"): extract(net, x * 255, cache=False)


def test_videos_stream(net, folder):
    frames = torch.rand(6, 3, 48, 64)
    write_video(folder / "v.avi", frames, 8)
    got = extract(net, find_layout(folder / "v.avi"), size=(48, 64), cache=folder / "c")
    assert list(got.arrays.values())[0].shape == (6, 48, 6, 8) and got.computed == 6
    assert extract(net, find_layout(folder / "v.avi"), size=(48, 64), cache=folder / "c").computed == 0


def test_still_images_are_clips_of_one_frame(net, folder):
    images = [Clip(p.stem, (p,)) for p in clips(folder)[1].frames]
    assert [len(a) for a in extract(net, images, size=32, cache=False).arrays.values()] == [1, 1, 1]


# ---------------------------------------------------------------- faults

def test_nan_features_stop_with_the_images_name(net, folder):
    class Ill:
        def __getattr__(self, n): return getattr(net, n)
        calls = 0
        def tokens(self, x, **k):
            y = net.tokens(x, **k).clone(); Ill.calls += len(x)
            if Ill.calls == 4: y[-1, 0] = float("nan")
            return y
    with pytest.raises(DataError, match=r"00003\.png.*clip a, frame 3"): extract(Ill(), clips(folder), size=32, cache=folder / "c", batch=2)


def test_half_precision_overflow_is_told(net, folder):
    class Loud:
        def __getattr__(self, n): return getattr(net, n)
        def tokens(self, x, **k): return net.tokens(x, **k) * 1e6
    with pytest.raises(DataError, match="fp16=False"): extract(Loud(), clips(folder)[0], size=32, cache=False)
    assert torch.isfinite(extract(Loud(), clips(folder)[0], size=32, cache=False, fp16=False).maps()).all()


def test_bad_frames_are_named_or_counted(net, folder, capsys):
    bad = folder / "data" / "a" / "00002.png"; bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(DataError, match="00002.png"): extract(net, clips(folder), size=(32, 56), cache=folder / "c")
    got = extract(net, clips(folder), size=(32, 56), cache=folder / "c", on_error="skip", batch=2)
    assert got.frames["a"] == [0, 1, 3, 4] and len(got.maps("a")) == 4 and "1 bad frames" in capsys.readouterr().out
    again = extract(net, clips(folder), size=(32, 56), cache=folder / "c", on_error="skip")
    assert again.computed == 0 and again.frames == got.frames


def test_mixed_sizes_within_a_clip(net, folder):
    write_image(folder / "data" / "a" / "00003.png", torch.rand(3, 48, 48))
    with pytest.raises(DataError, match=r"48 x 48 \(00003.png\)"): extract(net, clips(folder), size=32, cache=False)
    assert extract(net, clips(folder), size=(32, 56), cache=False).grid == (4, 7)


def test_names_and_options(net, folder):
    a = clips(folder)[0]
    with pytest.raises(DataError, match="a twice"): extract(net, [a, a], cache=False)
    with pytest.raises(DataError, match="no clips"): extract(net, [], cache=False)
    with pytest.raises(ConfigError, match="bytes, stat"): extract(net, a, key_on="name", cache=False)
    (folder / "file").write_text("")
    with pytest.raises(DataError, match="cache"): extract(net, a, size=32, cache=folder / "file" / "x")


def test_a_full_gpu_gets_halves():
    class Cramped:
        device, seen = torch.device("cpu"), []
        def tokens(self, x, block, norm):
            self.seen.append(len(x))
            if len(x) > 2: raise torch.OutOfMemoryError("CUDA out of memory")
            return x.mean(1, keepdim=True)
    x = torch.rand(7, 3, 4, 4)
    assert torch.equal(forward_batch(Cramped(), x), x.mean(1, keepdim=True)) and Cramped.seen == [7, 4, 2, 2, 3, 2, 1]
    class Hopeless(Cramped):
        def tokens(self, x, block, norm): raise torch.OutOfMemoryError("no")
    with pytest.raises(torch.OutOfMemoryError): forward_batch(Hopeless(), x)


# ---------------------------------------------------------------- cache

def test_cache_gives_back_exactly_and_computes_nothing(net, folder):
    first, second = (extract(net, clips(folder), size=32, cache=folder / "c") for _ in range(2))
    assert (first.computed, second.computed) == (8, 0) and all(torch.equal(first.maps(n), second.maps(n)) for n in "ab")
    assert isinstance(second.arrays["a"], np.memmap) and not second.arrays["a"].flags.writeable
    assert not list((folder / "c").glob("*.part")) and first.frames == second.frames


def test_default_cache_is_outside_the_repository(net, folder, monkeypatch):
    monkeypatch.setenv("TIMET_CACHE", str(folder / "home"))
    extract(net, clips(folder)[1], size=32)
    assert len(list((folder / "home" / "features").glob("*.bin"))) == 1


@pytest.mark.parametrize("key_on", ["bytes", "stat"])
def test_a_changed_frame_is_seen(net, folder, key_on):
    def run(): return extract(net, clips(folder), size=32, cache=folder / "c", key_on=key_on).computed
    assert (run(), run()) == (8, 0)
    target = folder / "data" / "b" / "00001.png"
    write_image(target, torch.rand(3, 40, 72)); os.utime(target, (1, 2))
    assert (run(), run()) == (3, 0)                                                # only clip b


def test_bytes_key_survives_a_move_and_a_touch(net, folder):
    extract(net, clips(folder), size=32, cache=folder / "c")
    shutil.move(folder / "data", folder / "moved"); shutil.copytree(folder / "moved", folder / "data")
    os.utime(folder / "data" / "a" / "00000.png", (1, 1))
    assert extract(net, clips(folder), size=32, cache=folder / "c").computed == 0


def test_every_setting_is_another_entry(net, folder, monkeypatch):
    a, cache = clips(folder)[0], folder / "c"
    def new(b=net, **k): return extract(b, a, **{"size": 32, "cache": cache, **k}).computed
    assert new() == 5 and new() == 0 and new(batch=1, desc="x") == 0
    for k in (dict(size=40), dict(fp16=False), dict(step=2), dict(block=1), dict(norm=False), dict(on_error="skip")): assert new(**k) > 0 and new(**k) == 0, k
    for b in (create_backbone("test-vit", seed=1), create_backbone("test-vit", resize="dino"), create_backbone("test-vit", normalise="timet")): assert new(b) == 5
    tuned = create_backbone("test-vit")
    assert new(tuned) == 0
    with torch.no_grad(): tuned.vit.norm.bias.data.add_(.1)
    assert new(tuned) == 5
    monkeypatch.setattr(dense, "__version__", "99")
    assert new() == 5


def test_damaged_entries_are_not_used(net, folder):
    a, cache = clips(folder)[0], folder / "c"
    good = extract(net, a, size=32, cache=cache).maps()
    entry = CacheEntry(cache, next(cache.glob("*.bin")).stem)
    assert entry.sound()
    def damage_half(): entry.bin.write_bytes(entry.bin.read_bytes()[:-2])
    def no_bin(): entry.bin.unlink()
    def half_note(): entry.json.write_text(entry.json.read_text()[:20])
    def wrong_note(): entry.json.write_text("[1]")
    def other_note(): entry.json.write_text(json.dumps(dict(shape=[5, 48, 4, 700], dtype="float16", frames=[0])))
    def odd_type(): entry.json.write_text(json.dumps(dict(shape=[1], dtype="nonsense", frames=[0])))
    for damage in (damage_half, no_bin, half_note, wrong_note, other_note, odd_type):
        damage()
        got = extract(net, a, size=32, cache=cache)
        assert got.computed == 5 and torch.equal(got.maps(), good), damage.__name__
    raw = bytearray(entry.bin.read_bytes()); raw[99] ^= 4; entry.bin.write_bytes(raw)
    assert not entry.sound()


class Mortal:
    "A backbone that dies after so many images."
    def __init__(self, net, life): self.net, self.life = net, life
    def __getattr__(self, n): return getattr(self.net, n)
    def tokens(self, x, **k):
        self.life -= len(x)
        if self.life < 0: raise KeyboardInterrupt
        return self.net.tokens(x, **k)


@pytest.mark.parametrize("life", range(0, 8))
@pytest.mark.parametrize("torn", [0, 7])
def test_killed_runs_go_on_where_they_stopped(net, folder, life, torn):
    whole = extract(net, clips(folder), size=32, cache=folder / "whole", batch=2)
    with pytest.raises(KeyboardInterrupt): extract(Mortal(net, life), clips(folder), size=32, cache=folder / "c", batch=2)
    for part in (folder / "c").glob("*.part"):
        with open(part, "ab") as f: f.write(b"x" * torn)
    rest = extract(net, clips(folder), size=32, cache=folder / "c", batch=2)
    done = {0: 0, 1: 0, 2: 2, 3: 2, 4: 4, 5: 5, 6: 5, 7: 7}[life]
    assert rest.computed == 8 - done and rest.frames == whole.frames
    assert all(torch.equal(rest.maps(n), whole.maps(n)) for n in "ab")


def test_kill_minus_nine(folder):
    "A real process, a real kill: the entry is absent or whole, never half."
    code = f"""
import torch, time
from tests.test_dense import clips
from timet_nb.features.backbone import create_backbone
from timet_nb.features.dense import extract
from pathlib import Path
net = create_backbone("test-vit"); slow = net.tokens
net.tokens = lambda x, **k: (time.sleep(.15), print("batch", flush=True), slow(x, **k))[2]
extract(net, clips(Path({str(folder)!r})), size=32, cache={str(folder / "c")!r}, batch=1)
"""
    p = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for _ in range(3): p.stdout.readline()
    p.kill(); p.wait()
    assert not list((folder / "c").glob("*.json"))
    net = create_backbone("test-vit")
    rest = extract(net, clips(folder), size=32, cache=folder / "c", batch=1)
    assert rest.computed < 8 and torch.equal(rest.maps("a"), extract(net, clips(folder), size=32, cache=folder / "w", batch=1).maps("a"))


def _work(args):
    folder, = args
    net = create_backbone("test-vit")
    got = extract(net, clips(Path(folder)), size=32, cache=Path(folder) / "c", batch=1)
    return got.computed, float(sum(got.maps(n).sum() for n in "ab"))


def test_two_processes_share_the_work(folder):
    with mp.get_context("spawn").Pool(2) as pool: (n1, s1), (n2, s2) = pool.map(_work, [(str(folder),)] * 2, chunksize=1)
    assert n1 + n2 == 8 and s1 == s2, "each frame is computed once, and both see the same numbers"


def test_source_data_is_never_written(net, folder):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (folder / "data").rglob("*") if p.is_file()}
    extract(net, clips(folder), size=32, cache=folder / "c")
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (folder / "data").rglob("*") if p.is_file()}


def test_memory_does_not_grow_with_the_clip(net, folder):
    import tracemalloc
    def peak(n):
        item = dense.sources(torch.rand(1, 3, 64, 64).expand(n, -1, -1, -1), net, None)[0]
        tracemalloc.start(); dense._cached(item, (net, 4, False, -1, True), folder, f"k{n}")
        top = tracemalloc.get_traced_memory()[1]; tracemalloc.stop(); return top
    peak(8)
    assert peak(160) < 1.3 * peak(40)


def test_batches_take_only_what_they_give():
    taken = []
    stream = batches((taken.append(i) or i for i in range(100)), 3)
    assert next(stream) == [0, 1, 2] and len(taken) == 3
    assert [len(b) for b in batches(range(7), 3)] == [3, 3, 1] and list(batches([], 2)) == []


def test_key_is_stable_text():
    k = cache_key(b"x", weights="w", size=(1, 2), step=1)
    assert k == cache_key(b"x", step=1, size=(1, 2), weights="w") and len(k) == 32 and k != cache_key(b"x", weights="w", size=(2, 1), step=1)


def test_cnn_features_go_the_same_road(folder):
    cnn = create_backbone("efficientnet-lite0-imagenet", pretrained=False, strides=(8, 16))
    got = extract(cnn, clips(folder), size=32, cache=folder / "c", block=None)
    assert got.grids["a"] == (4, 8) and got.dim == 152 and extract(cnn, clips(folder), size=32, cache=folder / "c", block=None).computed == 0


# ---------------------------------------------------------------- PCA

def features(M=300, D=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(M, D, generator=g) * torch.linspace(3, .1, D)) @ torch.randn(D, D, generator=g) + torch.randn(D, generator=g) * 5


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("standardise", [False, True])
def test_pca_equals_scikit_learn_up_to_sign(whiten, standardise):
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = features()
    y = x.double().numpy()
    if standardise: y = (y - y.mean(0)) / y.std(0)
    theirs = decomposition.PCA(5, whiten=whiten, svd_solver="full").fit(y)
    ours = pca_fit(x, 5, whiten=whiten, standardise=standardise)
    want, got = theirs.transform(y), ours.transform(x.double()).numpy()
    assert np.allclose(np.abs(got), np.abs(want), atol=1e-7) and np.allclose(ours.variance, theirs.explained_variance_, atol=1e-8)
    assert np.allclose(ours.share, theirs.explained_variance_ratio_, atol=1e-9)
    big = ours.components.gather(0, ours.components.abs().argmax(0, keepdim=True))
    assert (big > 0).all(), "signs: the largest entry of each component is positive"


def test_golden_pca_of_the_authors_code():
    z = np.load(GOLDEN / "timet" / "clustering.npz")
    rows = torch.from_numpy(z["features"]).flatten(0, 2)
    p = pca_fit(rows, int(z["pca_dim"])); y = p.transform(rows.double())
    gram = z["pca_gram"]; n = len(gram)
    scale = np.abs(gram).max()
    assert np.abs((y[:n] @ y[:n].T).numpy() - gram).max() < 1e-5 * max(scale, 1)
    assert np.allclose((y ** 2).sum(0), z["pca_column_sq_norms"], rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), seed=st.integers(0, 5))
def test_chunks_do_not_matter(cuts, seed):
    x = features(200, 6, seed)
    pieces = torch.tensor_split(x, sorted(cuts))
    a, b = pca_fit(pieces, 4), pca_fit(x, 4)
    assert torch.allclose(a.components, b.components, atol=1e-7) and torch.allclose(a.variance, b.variance, atol=1e-8)
    m = Moments()
    for p in pieces: m.update(p)
    assert m.n == 200 and torch.allclose(m.scatter / 199, torch.cov(x.double().T), atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(-1e6, 1e6), seed=st.integers(0, 3))
def test_a_constant_added_changes_the_mean_alone(shift, seed):
    x = features(100, 5, seed).double()
    a, b = pca_fit(x, 3), pca_fit(x + shift, 3)
    assert torch.allclose(a.variance, b.variance, atol=1e-6) and torch.allclose(a.transform(x), b.transform(x + shift), atol=1e-5)


def test_pca_shapes_and_round_trip():
    x = torch.randn(2, 3, 7, 4, 5)                                        # (..., D, h, w)
    p = pca_fit(x.movedim(2, -1).reshape(-1, 7), 7)
    y = p.maps(x)
    assert y.shape == (2, 3, 7, 4, 5) and y.dtype == x.dtype
    assert torch.allclose(p.inverse(y.movedim(2, -1)).movedim(-1, 2), x, atol=1e-5)
    w = pca_fit(x.movedim(2, -1).reshape(-1, 7), 4, whiten=True)
    rows = x.movedim(2, -1).reshape(-1, 7).double()
    assert torch.allclose(torch.cov(w.transform(rows).T), torch.eye(4).double(), atol=1e-8)
    full = pca_fit(rows, 7, whiten=True)
    assert torch.allclose(full.inverse(full.transform(rows)), rows, atol=1e-9)


def test_pca_faults():
    x = features(20, 4)
    with pytest.raises(DataError, match="row 7"): pca_fit(torch.where(torch.arange(20)[:, None] == 7, float("nan"), x), 2)
    with pytest.raises(DataError, match="row 13"): pca_fit([x[:10], torch.where(torch.arange(10)[:, None] == 3, float("inf"), x[10:])], 2)
    for dim in (0, 5, -1):
        with pytest.raises(DataError, match=f"{dim} for 20 rows of 4"): pca_fit(x, dim)
    for bad in (x[:1], x[:0], []):
        with pytest.raises(DataError, match="two rows"): pca_fit(bad, 1)
    with pytest.raises(DataError, match=r"\(M, D\)"): pca_fit(torch.randn(2, 3, 4), 1)
    with pytest.raises(DataError, match="5 features"): pca_fit([x, torch.randn(3, 5)], 2)


def test_pca_of_degenerate_rows():
    constant = features(50, 4); constant[:, 2] = 7
    p = pca_fit(constant, 4)
    assert torch.isfinite(p.components).all() and torch.isfinite(p.transform(constant)).all() and float(p.variance[-1]) < 1e-12
    same = pca_fit(torch.ones(9, 3), 2)
    assert same.variance.tolist() == [0, 0] and torch.equal(same.transform(torch.ones(9, 3)), torch.zeros(9, 2))
    assert torch.isfinite(pca_fit(torch.ones(9, 3), 2, whiten=True).transform(torch.ones(9, 3))).all()
    few = pca_fit(torch.randn(3, 10), 3)
    assert torch.isfinite(few.components).all()
    assert pca_fit(features(50, 4).half(), 2).mean.dtype == torch.float64


def test_pca_from_extracted_features(net):
    got = extract(net, {"x": torch.rand(3, 3, 32, 48), "y": torch.rand(2, 3, 32, 32)}, cache=False, fp16=False)
    rows = torch.cat([got.maps(n).flatten(2).mT.flatten(0, 1) for n in got.names])
    assert torch.allclose(pca_fit(got, 5).components, pca_fit(rows, 5).components, atol=1e-6)
    assert torch.allclose(pca_fit(got.chunks(17), 5).variance, pca_fit(rows, 5).variance, atol=1e-8)


# ---------------------------------------------------------------- real data

@pytest.mark.data
@pytest.mark.weights
def test_real_clip(real_data, vit, tmp_path):
    layout = find_layout(real_data / "davis2016")
    clip = layout["dog"]
    got = extract(vit, Clip("dog", clip.frames[:4]), size=154, cache=tmp_path, batch=2)
    assert got.computed == 4 and got.grid[0] == 11 and torch.isfinite(got.maps()).all()
    near = torch.nn.functional.cosine_similarity(got.maps()[0], got.maps()[1], dim=0).mean()
    assert near > .6, "two frames in a row resemble each other patch by patch"
