"Faults and properties of the picture, mask, video and clip readers."
import random
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from timet_nb.base.runtime import DataError
from timet_nb.data import decode
from timet_nb.data import frames as room
from timet_nb.data.decode import ball_scene
from timet_nb.data.frames import (ClipReader, VideoReader, clip_colours, count_frames, extract_frames, image_size, orient, read_clip,
                                  read_image, read_mask, resize, resize_mask, target_size, voc_palette, write_image, write_mask,
                                  write_video)
from timet_nb.data.layout import Clip, find_layout


def photo(h=90, w=130, seed=0):
    "A textured picture (h, w, 3) uint8."
    noise = np.random.default_rng(seed).integers(0, 255, (h // 6 + 1, w // 6 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((w, h), Image.BICUBIC))


def save(path, a, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path, **options)
    return path


def pil(path, size=None, filter=Image.BILINEAR):
    with Image.open(path) as im: im = ImageOps.exif_transpose(im).convert("RGB")
    if size is not None: im = im.resize((im.width * size // min(im.size), im.height * size // min(im.size)), filter)
    return torch.from_numpy(np.array(im)).permute(2, 0, 1)


def raises(path, *words):
    "An error that names the file and says these words."
    class Check:
        def __enter__(self): return self
        def __exit__(self, kind, e, tb):
            assert kind is not None and issubclass(kind, DataError), f"expected DataError, got {kind}: {e}"
            for w in (str(path), *words): assert w in str(e), f"{w!r} is not in: {e}"
            return True
    return Check()


# ---- pictures -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow_to_the_bit(tmp_path, subsampling, progressive):
    for k, (h, w) in enumerate(((90, 130), (1, 40), (40, 1), (17, 33))):
        p = save(tmp_path / f"{k}.jpg", photo(h, w), quality=90, subsampling=subsampling, progressive=progressive)
        assert torch.equal(read_image(p, dtype=torch.uint8), pil(p)) and image_size(p) == (h, w)


@pytest.mark.parametrize("mode,filter,levels", [("bilinear", Image.BILINEAR, 1), ("bicubic", Image.BICUBIC, 2)])
def test_resize_is_within_a_level_of_pillow(tmp_path, mode, filter, levels):
    p = save(tmp_path / "a.jpg", photo(480, 854), quality=92)
    for size in (224, 300, 448):
        got = read_image(p, size, dtype=torch.uint8, mode=mode)
        assert got.shape == pil(p, size).shape and (got.int() - pil(p, size, filter).int()).abs().max() <= levels


def test_reduced_decode_is_close_and_can_be_switched_off(tmp_path):
    p = write_image(tmp_path / "a.jpg", ball_scene(.3, 480, 854)[0])
    for size in (112, 60, (50, 100)):
        quick, exact = read_image(p, size), read_image(p, size, exact=True)
        assert quick.shape == exact.shape and not torch.equal(quick, exact)
        assert (quick - exact).abs().mean() * 255 < 2          # 0.5 to 1.5 on the DAVIS clips
    want = pil(p, 112).float() / 255
    assert (read_image(p, 112, exact=True) - want).abs().max() * 255 <= 1.01


def test_without_simplejpeg_pillow_reads(tmp_path, monkeypatch):
    p = save(tmp_path / "a.jpg", photo(), quality=90)
    want = read_image(p, 40)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert torch.equal(read_image(p, 40), want)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_orientation_is_applied_once(tmp_path, turn, kind):
    exif = Image.Exif(); exif[0x0112] = turn
    p = save(tmp_path / f"a.{kind}", photo(480, 640), exif=exif)
    assert torch.equal(read_image(p, dtype=torch.uint8), pil(p))
    assert torch.equal(read_image(p, exif=False, dtype=torch.uint8), torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1))
    assert image_size(p) == tuple(read_image(p).shape[1:])
    for size in (100, (60, 110)): assert read_image(p, size).shape == read_image(p, size, exact=True).shape
    assert (read_image(p, 100) - read_image(p, 100, exact=True)).abs().mean() * 255 < 3


def test_threads_do_not_share_scratch_memory(tmp_path):
    paths = [save(tmp_path / f"{k}.jpg", photo(200, 300, k), quality=90) for k in range(4)]
    want = [read_image(p, 100, exact=True) for p in paths]
    wrong = []
    def work():
        for _ in range(20):
            k = random.randrange(4)
            if not torch.equal(read_image(paths[k], 100, exact=True), want[k]): wrong.append(k)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong
    first = read_image(paths[0], 100, exact=True, dtype=torch.uint8); keep = first.clone()
    read_image(paths[1], 100, exact=True)
    assert torch.equal(first, keep), "a result must not lie in the scratch memory"


def test_unusual_pictures_are_read(tmp_path):
    a, im = photo(), Image.fromarray(photo())
    im.save(tmp_path / "png.jpg", format="PNG"); im.save(tmp_path / "bmp.jpg", format="BMP"); im.save(tmp_path / "webp.png", format="WEBP", lossless=True)
    for n in ("png.jpg", "bmp.jpg", "webp.png"): assert torch.equal(read_image(tmp_path / n, dtype=torch.uint8), torch.from_numpy(a.copy()).permute(2, 0, 1))
    for mode, n in (("L", "l.png"), ("LA", "la.png"), ("RGBA", "rgba.png"), ("P", "p.png"), ("1", "1.png"), ("CMYK", "cmyk.jpg"), ("L", "l.jpg")):
        im.convert(mode).save(tmp_path / n)
        assert torch.equal(read_image(tmp_path / n, dtype=torch.uint8), pil(tmp_path / n)), n
    deep = (a[..., 0].astype(np.uint16) * 257)
    Image.fromarray(deep).save(tmp_path / "16.png")
    assert torch.equal(read_image(tmp_path / "16.png", dtype=torch.uint8)[1], torch.from_numpy(a[..., 0].copy()))
    Image.fromarray(a[..., 0].astype(np.float32) / 255).save(tmp_path / "f.tif")
    assert (read_image(tmp_path / "f.tif")[0] - torch.from_numpy(a[..., 0].copy()) / 255).abs().max() < 1e-6
    for h, w in ((1, 1), (1, 50), (50, 1)): assert read_image(save(tmp_path / "thin.png", photo(h, w)), dtype=torch.uint8).shape == (3, h, w)


def test_names_of_any_kind(tmp_path):
    p = save(tmp_path / "mit Leerzeichen" / "Übung 日本 #1%.jpg", photo())
    assert read_image(str(p)).shape == (3, 90, 130)
    write_mask(p.parent / "ü ñ.png", torch.zeros(3, 4).long()); assert read_mask(p.parent / "ü ñ.png").shape == (3, 4)


@pytest.mark.parametrize("keep", [0, 1, 2, 10, 100, .3, .6, .9])
def test_cut_jpeg_is_named(tmp_path, keep):
    data = save(tmp_path / "a.jpg", photo(300, 400), quality=92).read_bytes()
    bad = tmp_path / "bad.jpg"; bad.write_bytes(data[:int(keep if keep >= 1 or keep == 0 else keep * len(data))])
    with raises(bad): read_image(bad)
    with raises(bad): read_image(bad, 60)


@pytest.mark.parametrize("content,word", [(b"", "0 bytes"), (b"<html><body>404", "text"), (b"\n <!DOCTYPE html>", "text"), (b'{"error": 404}', "text"),
                                          (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "text"), (b"hello", "begin with"),
                                          (b"\xff\xd8\xff\xe0 nothing behind", "begin with"), (b"\x89PNG\r\n\x1a\n", "begin with")])
def test_what_is_no_picture_is_named(tmp_path, content, word):
    for f in (read_image, read_mask):
        p = tmp_path / "a.jpg"; p.write_bytes(content)
        with raises(p, word, "expected"): f(p)


def test_missing_folder_animation_and_bomb(tmp_path, monkeypatch):
    for f in (read_image, read_mask):
        with raises(tmp_path / "no.jpg", "No such file"): f(tmp_path / "no.jpg")
        with raises(tmp_path): f(tmp_path)
    im = Image.fromarray(photo())
    for name in ("a.gif", "a.webp", "a.tif"):
        im.save(tmp_path / name, save_all=True, append_images=[im.rotate(90)])
        with raises(tmp_path / name, "2 pictures"): read_image(tmp_path / name)
    p = save(tmp_path / "big.png", np.zeros((100, 100), np.uint8)); q = save(tmp_path / "big.jpg", photo(100, 100))
    monkeypatch.setattr(decode, "MAX_PIXELS", 9_999)
    for path in (p, q):
        with raises(path, "100 x 100", "MAX_PIXELS"): read_image(path)
    with raises("size", "short side"): resize(torch.zeros(3, 10, 1000), 20)


def test_a_real_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    import struct, zlib
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10_000)) + chunk(b"IEND", b""))
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self))
    with raises(tmp_path / "bomb.png"): read_image(tmp_path / "bomb.png")
    assert not decoded                                   # its header was enough


def test_values_out_of_range_are_named(tmp_path):
    for name, a in (("neg.tif", np.full((4, 4), -1., np.float32)), ("nan.tif", np.full((4, 4), np.nan, np.float32)), ("high.tif", np.full((4, 4), 300., np.float32)),
                    ("int.tif", np.full((4, 4), 70_000, np.int32))):
        with raises(save(tmp_path / name, a)): read_image(tmp_path / name)


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), oh=st.integers(1, 50), ow=st.integers(1, 50))
def test_mask_resize_gives_source_values_and_torchs_nearest(h, w, oh, ow):
    ids = torch.randint(0, 300, (h, w))
    got = resize_mask(ids, (oh, ow))
    want = torch.nn.functional.interpolate(ids[None, None].double(), (oh, ow), mode="nearest-exact")[0, 0].long()
    assert got.shape == (oh, ow) and set(got.unique().tolist()) <= set(ids.unique().tolist())
    assert (got != want).float().mean() < .2          # theirs rounds in floating point: half-way cases may differ
    if oh == h and ow == w: assert torch.equal(got, ids)


@settings(max_examples=40, deadline=None)
@given(turn=st.integers(1, 8), h=st.integers(1, 9), w=st.integers(1, 9))
def test_orientations_permute_pixels(turn, h, w):
    x = torch.arange(h * w).reshape(h, w)
    y = orient(x, turn)
    assert y.shape == ((w, h) if turn >= 5 else (h, w)) and torch.equal(y.flatten().sort().values, x.flatten())
    assert torch.equal(orient(y, {6: 8, 8: 6}.get(turn, turn)), x)


def test_resize_shapes_and_types():
    x = torch.rand(2, 3, 40, 60)
    assert resize(x, None) is x and resize(x, (40, 60)) is x
    assert resize(x[0], 20).shape == (3, 20, 30) and resize(x[None], (10, 12)).shape == (1, 2, 3, 10, 12)
    assert torch.allclose(resize(x, 20)[1], resize(x[1], 20)), "a batch is resized as its frames"
    assert resize((x * 255).byte(), 20).dtype == torch.uint8
    assert 0 <= resize((x > .5).float(), 77, "bicubic").min() and resize((x > .5).float(), 77, "bicubic").max() <= 1
    assert target_size(480, 854, 224) == (224, 398) and target_size(854, 480, 224) == (398, 224)


# ---- masks ----------------------------------------------------------------------------------------------------------

IDS = ball_scene(.4)[1]
RAW = IDS.numpy().astype(np.uint8)


def palette(a=RAW):
    im = Image.fromarray(a); im.putpalette(voc_palette().tobytes()); return im


def test_each_store_gives_the_ids(tmp_path):
    palette().save(tmp_path / "p.png"); palette().convert("RGB").save(tmp_path / "rgb.png"); palette().convert("RGBA").save(tmp_path / "rgba.png")
    Image.fromarray(RAW).save(tmp_path / "l.png"); Image.fromarray(RAW).convert("LA").save(tmp_path / "la.png")
    Image.fromarray(RAW.astype(np.uint16)).save(tmp_path / "16.png"); Image.fromarray(RAW[..., None].repeat(3, 2)).save(tmp_path / "grey_rgb.png")
    palette().save(tmp_path / "a.gif"); palette().save(tmp_path / "a.bmp")
    for n in ("p.png", "rgb.png", "rgba.png", "l.png", "la.png", "16.png", "grey_rgb.png", "a.gif", "a.bmp"):
        assert torch.equal(read_mask(tmp_path / n), IDS), n
        assert torch.equal(read_mask(tmp_path / n, kind="binary"), (IDS > 0).long()), n


def test_binary_stores(tmp_path):
    one = (RAW > 0)
    for n, a in (("01.png", one.astype(np.uint8)), ("0255.png", one.astype(np.uint8) * 255), ("bit.png", one), ("065535.png", one.astype(np.uint16) * 65535),
                 ("rgb.png", (one.astype(np.uint8) * 255)[..., None].repeat(3, 2))):
        Image.fromarray(a).save(tmp_path / n)
        for kind in ("auto", "binary"): assert torch.equal(read_mask(tmp_path / n, kind=kind), (IDS > 0).long()), (n, kind)
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(tmp_path / "full.png"); assert (read_mask(tmp_path / "full.png") == 1).all()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "none.png"); assert (read_mask(tmp_path / "none.png") == 0).all()


def test_ignore_holes_and_many_objects(tmp_path):
    a = RAW.copy(); a[:4] = 255; palette(a).save(tmp_path / "voc.png")
    assert (read_mask(tmp_path / "voc.png")[:4] == 255).all() and (read_mask(tmp_path / "voc.png", kind="binary")[:4] == 255).all()
    only = np.zeros((9, 9), np.uint8); only[:4] = 255; palette(only).save(tmp_path / "rim.png")
    assert read_mask(tmp_path / "rim.png").unique().tolist() == [0, 255], "255 in a palette stays ignore"
    holes = np.array([0, 3, 250, 9], np.uint8)[np.arange(4).repeat(16).reshape(8, 8)]; Image.fromarray(holes).save(tmp_path / "holes.png")
    assert read_mask(tmp_path / "holes.png").unique().tolist() == [0, 3, 9, 250]
    many = torch.arange(30 * 40).reshape(30, 40); assert torch.equal(read_mask(write_mask(tmp_path / "many.png", many)), many)


def test_soft_and_lossy_masks_are_refused_or_counted(tmp_path):
    hard = Image.fromarray((RAW > 0).astype(np.uint8) * 255)
    hard.resize((90, 60), Image.BILINEAR).save(tmp_path / "soft.png"); hard.save(tmp_path / "lossy.jpg", quality=75)
    for n in ("soft.png", "lossy.jpg"):
        with raises(tmp_path / n, "grey levels", "kind='binary'"): read_mask(tmp_path / n)
        m = read_mask(tmp_path / n, kind="binary", notes=(notes := []))
        assert m.unique().tolist() == [0, 1] and len(notes) == 1 and str(tmp_path / n) in notes[0] and "cut at 128" in notes[0]
        assert len(read_mask(tmp_path / n, kind="ids").unique()) > 10
    colour = palette().convert("RGB").resize((88, 60), Image.BICUBIC); colour.save(tmp_path / "colour.png")
    read_mask(tmp_path / "colour.png", notes=(notes := [])); assert "numbered" in notes[0]
    save(tmp_path / "photo.png", photo()); Image.fromarray(photo()).convert("CMYK").save(tmp_path / "cmyk.jpg")
    with raises(tmp_path / "photo.png", "colours"): read_mask(tmp_path / "photo.png")
    with raises(tmp_path / "cmyk.jpg", "CMYK"): read_mask(tmp_path / "cmyk.jpg")
    with pytest.raises(DataError, match="kind='grey'"): read_mask(tmp_path / "soft.png", kind="grey")


def test_colours_keep_their_ids_in_a_clip(tmp_path):
    colours = np.array([[0, 0, 0], [10, 200, 30], [200, 10, 99]], np.uint8)
    frames, masks = [], []
    for k in range(4):
        ids = np.roll(RAW, 7 * k, 1).copy()
        if k == 0: ids[ids == 1] = 0                   # the first object is absent in the first frame
        frames.append(save(tmp_path / f"f/{k}.png", photo(*RAW.shape))); masks.append(save(tmp_path / f"m/{k}.png", colours[ids]))
    clip = Clip("c", tuple(frames), tuple(masks))
    table = clip_colours(clip)
    assert sorted(table.values()) == [0, 1, 2]
    _, together = read_clip(clip); _, apart = read_clip(clip, [0, 2])
    assert torch.equal(together[[0, 2]], apart), "ids do not depend on which frames are read"
    moon = table[int(colours[2] @ np.array([1, 256, 65536]))]
    assert all((together[k] == moon).sum() == (IDS == 2).sum() for k in range(4))
    assert clip_colours(Clip("n", tuple(frames))) is None


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_mask_is_turned_as_its_frame(tmp_path, turn):
    exif = Image.Exif(); exif[0x0112] = turn
    frame = save(tmp_path / "f.jpg", photo(120, 176), exif=exif, quality=95)
    palette().save(tmp_path / "m.png"); upright = orient(IDS, turn)
    assert torch.equal(read_mask(tmp_path / "m.png", exif_from=frame), upright)
    palette().save(tmp_path / "own.png", exif=exif); assert torch.equal(read_mask(tmp_path / "own.png", exif_from=frame), upright)
    if turn >= 5:
        palette(upright.numpy().astype(np.uint8)).save(tmp_path / "up.png")
        assert torch.equal(read_mask(tmp_path / "up.png", exif_from=frame), upright), "upright already"
    x, y = read_clip(Clip("c", (frame,), (tmp_path / "m.png",)))
    assert x.shape[2:] == y.shape[1:] and torch.equal(y[0], upright)


@pytest.mark.parametrize("bad", [torch.zeros(3, 4, 5), torch.full((3, 3), .5), torch.full((3, 3), -1), torch.full((3, 3), 70_000), torch.full((3, 3), float("nan")),
                                 torch.zeros(0, 3)])
def test_write_mask_refuses(tmp_path, bad):
    with raises(tmp_path / "a.png"): write_mask(tmp_path / "a.png", bad)
    assert not list(tmp_path.iterdir())


@settings(max_examples=25, deadline=None)
@given(top=st.sampled_from([1, 2, 254, 255, 256, 3000, 65534]), h=st.integers(1, 12), w=st.integers(1, 12), seed=st.integers(0, 9))
def test_written_masks_come_back(tmp_path_factory, top, h, w, seed):
    ids = torch.randint(0, top + 1, (h, w), generator=torch.Generator().manual_seed(seed))
    p = tmp_path_factory.mktemp("m") / "a.png"
    assert torch.equal(read_mask(write_mask(p, ids), kind="ids"), ids)
    if top <= 255: assert torch.equal(read_mask(p), ids)


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    p = write_image(tmp_path / "a.png", torch.zeros(3, 5, 6)); before = p.read_bytes()
    def broken(self, *a, **k): raise OSError("disk full")
    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError): write_image(p, torch.ones(3, 5, 6))
    assert p.read_bytes() == before and [q.name for q in tmp_path.iterdir()] == ["a.png"]


# ---- video ----------------------------------------------------------------------------------------------------------

T = 20


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Frames (20, 3, 48, 64), and a folder with them as ball.mp4, ball.avi, ball.mov."
    frames = torch.stack([ball_scene(k / 25, 48, 64)[0] for k in range(T)])
    folder = tmp_path_factory.mktemp("films")
    for n in ("ball.mp4", "ball.avi", "ball.mov"): write_video(folder / n, frames, fps=10)
    return frames, folder


@pytest.mark.parametrize("name", ["ball.mp4", "ball.avi", "ball.mov"])
def test_video_gives_every_frame_once_in_order(films, name):
    frames, folder = films
    v = VideoReader(folder / name)
    x = torch.stack(list(v))
    assert (v.announced, v.decoded, len(v), v.fps, v.notes) == (T, T, T, 10., []) and x.shape == frames.shape
    nearest = ((x[:, None] - frames[None]) ** 2).flatten(2).sum(-1).argmin(1)
    assert nearest.tolist() == list(range(T))
    assert torch.equal(torch.stack(list(v)), x), "a second walk is the same"
    assert next(iter(VideoReader(folder / name, dtype=torch.uint8))).dtype == torch.uint8


def test_video_steps_equal_slices(films):
    x = torch.stack(list(VideoReader(films[1] / "ball.avi")))
    for start, stop, step in ((0, None, 3), (5, 11, 1), (5, 12, 4), (19, None, 7), (0, 1, 1), (3, 999, 2)):
        v = VideoReader(films[1] / "ball.avi", start=start, stop=stop, step=step)
        assert torch.equal(torch.stack(list(v)), x[start:stop:step]) and len(v) == len(x[start:stop:step])
    for bad in (dict(start=-1), dict(step=0), dict(start=4, stop=4), dict(on_count="ignore")):
        with raises(films[1] / "ball.avi"): VideoReader(films[1] / "ball.avi", **bad)
    with raises(films[1] / "ball.avi", "20 frames"): list(VideoReader(films[1] / "ball.avi", start=50))


def test_cut_videos(films, tmp_path, capfd):
    avi, mp4 = ((films[1] / n).read_bytes() for n in ("ball.avi", "ball.mp4"))
    p = tmp_path / "cut.mp4"; p.write_bytes(mp4[:len(mp4) * 2 // 3])
    with raises(p, "index"): VideoReader(p)
    p = tmp_path / "cut.avi"; p.write_bytes(avi[:len(avi) * 2 // 3])
    with raises(p, "20, as the file announces", "on_count='note'"): list(VideoReader(p))
    with raises(p): count_frames(p)
    v = VideoReader(p, on_count="note"); n = len(list(v))
    assert 5 < n < T and v.decoded == n and f"{n} frames came out, 20 announced" in v.notes[0] and count_frames(p, "note") == n
    assert capfd.readouterr().err == "", "the decoder's own messages are held back"


def test_an_mp4_with_its_index_first_that_was_cut(films, tmp_path):
    data = (films[1] / "ball.mp4").read_bytes()
    at = data.find(b"moov") - 4
    head, moov = data[:at], bytearray(data[at:])
    where = moov.find(b"stco") + 4; n = int.from_bytes(moov[where + 4:where + 8], "big")
    for k in range(n):
        a = where + 8 + 4 * k; moov[a:a + 4] = (int.from_bytes(moov[a:a + 4], "big") + len(moov)).to_bytes(4, "big")
    ftyp = head[:int.from_bytes(head[:4], "big")]
    whole = ftyp + bytes(moov) + head[len(ftyp):]
    p = tmp_path / "fast.mp4"; p.write_bytes(whole)
    assert len(list(VideoReader(p))) == T
    p.write_bytes(whole[:len(ftyp) + len(moov) + (len(whole) - len(ftyp) - len(moov)) // 2])
    with raises(p, "20, as the file announces"): list(VideoReader(p))


def header(avi, frames=None, rate=None):
    "An AVI with another number of frames or rate in its headers."
    b = bytearray(avi); at = b.find(b"avih") + 8
    s = b.find(b"strh") + 8
    if frames is not None: b[at + 16:at + 20] = frames.to_bytes(4, "little"); b[s + 32:s + 36] = frames.to_bytes(4, "little")
    if rate is not None: b[at:at + 4] = (0).to_bytes(4, "little"); b[s + 20:s + 28] = rate[0].to_bytes(4, "little") + rate[1].to_bytes(4, "little")
    return bytes(b)


@pytest.mark.parametrize("announced", [0, 1, 10, 21, 22, 23, 1000, 2**31 - 1])
def test_wrong_numbers_in_the_header(films, tmp_path, announced):
    p = tmp_path / "a.avi"; p.write_bytes(header((films[1] / "ball.avi").read_bytes(), announced))
    v = VideoReader(p)
    if v.announced == T: assert len(list(v)) == T; return            # the decoder counted for itself
    if v.announced > T + 2:
        with raises(p, f"{v.announced}, as the file announces"): list(v)
    else: assert len(list(v)) == T and len(v.notes) == 1 and str(p) in v.notes[0]


def test_no_frame_rate(films, tmp_path):
    p = tmp_path / "a.avi"; p.write_bytes(header((films[1] / "ball.avi").read_bytes(), rate=(1, 0)))
    v = VideoReader(p)
    assert len(list(v)) == T and (v.fps == 0 and "frame rate" in v.notes[0] or 0 < v.fps <= 1000)


def test_one_frame_empty_and_no_pictures(films, tmp_path):
    import struct, wave
    one = write_video(tmp_path / "one.mp4", films[0][:1]); v = VideoReader(one)
    assert len(list(v)) == 1 and v.announced == 1 and count_frames(one) == 1
    x, _ = read_clip(Clip("one", video=one)); assert x.shape == (1, 3, 48, 64)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as w: w.setparams((1, 2, 8000, 0, "NONE", "")); w.writeframes(struct.pack("<800h", *range(800)))
    for name, data in (("sound.avi", (tmp_path / "sound.wav").read_bytes()), ("empty.mp4", b""), ("page.mp4", b"<html>"), ("text.avi", b"hello world")):
        p = tmp_path / name; p.write_bytes(data)
        with raises(p): list(VideoReader(p))
        with raises(p): read_clip(Clip("c", video=p))
    with raises(tmp_path / "no.mp4", "no such file"): VideoReader(tmp_path / "no.mp4")
    with raises("clip x", "frames or a video"): __import__("timet_nb.data.clips").data.clips.clip_length(Clip("x"))


def test_rotation_is_applied(films, tmp_path):
    data = bytearray((films[1] / "ball.mp4").read_bytes()); at = data.find(b"tkhd") + 44
    for degrees, m, turn in ((90, (0, 1, -1, 0), 6), (180, (-1, 0, 0, -1), 3), (270, (0, -1, 1, 0), 8)):
        a, b, c, d = (v * 65536 for v in m)
        data[at:at + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
        p = tmp_path / f"{degrees}.mp4"; p.write_bytes(data)
        v, plain = VideoReader(p), VideoReader(films[1] / "ball.mp4")
        assert (v.rotation, v.height, v.width) == (degrees, *((64, 48) if turn >= 5 else (48, 64)))
        for x, y in zip(v, plain): assert torch.equal(x, orient(y, turn))


def test_video_memory_is_bounded(tmp_path):
    import resource
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    frame = resize(ball_scene(.3)[0], (480, 854))
    def run(n):
        p = write_video(tmp_path / f"{n}.avi", (frame for _ in range(n)))
        return sum(1 for _ in ClipReader(Clip("c", video=p), size=224))
    run(20); before = peak(); assert run(200) == 200
    assert peak() - before < 60, "200 frames would be 246 MB as bytes, 984 MB as floats"


def test_write_video_is_whole_or_nothing(films, tmp_path):
    p = write_video(tmp_path / "a.avi", films[0]); before = p.read_bytes()
    def breaks():
        yield films[0][0]; raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_video(p, breaks())
    with raises(p): write_video(p, [films[0][0], films[0][0][:, :20]])
    with raises(p): write_video(p, [])
    assert p.read_bytes() == before and [q.name for q in tmp_path.iterdir()] == ["a.avi"]


# ---- clips ----------------------------------------------------------------------------------------------------------

def clip_of(folder, n=12, name="c", skip=()):
    for k in range(n):
        x, y = ball_scene(k / n, 60, 88)
        write_image(folder / f"{name}/{k}.jpg", x)
        if k not in skip: write_mask(folder / f"{name}_ids/{k}.png", y)
    return Clip(name, tuple(folder / f"{name}/{k}.jpg" for k in range(n)),
                tuple(None if k in skip else folder / f"{name}_ids/{k}.png" for k in range(n)))


def test_reader_and_read_clip_agree(tmp_path, films):
    clip = clip_of(tmp_path, skip=(3,))
    for c in (clip, Clip("v", video=films[1] / "ball.avi")):
        walked = list(ClipReader(c, masks=True)); x, y = read_clip(c)
        assert torch.equal(torch.stack([f for f, _ in walked]), x)
        some = [9, 2, 2, 3]
        xs, ys = read_clip(c, some); assert torch.equal(xs, x[some]) and (ys is None or torch.equal(ys, y[some]))
        assert len(ClipReader(c, step=5)) == len(list(ClipReader(c, step=5))) == len(x[::5])
        assert read_clip(c, [1], size=30)[0].shape[2] == 30
    assert (read_clip(clip)[1][3] == 255).all() and walked[0][1] is None
    for bad in ([12], [-1], []):
        with raises("clip c", "0 to 11"): read_clip(clip, bad)
    with raises(films[1] / "ball.avi", "20 frames"): read_clip(Clip("v", video=films[1] / "ball.avi"), [3, 25])


def test_bad_files_stop_or_are_counted(tmp_path):
    clip = clip_of(tmp_path)
    clip.frames[2].write_bytes(b""); clip.frames[5].unlink(); write_image(clip.frames[6], torch.zeros(3, 20, 30)); clip.masks[8].write_bytes(b"<html>")
    write_mask(clip.masks[9], torch.zeros(10, 10).long())
    with raises(clip.frames[2]): list(ClipReader(clip))
    with raises(clip.frames[5]): read_clip(clip, [4, 5])
    r = ClipReader(clip, masks=True, on_error="skip"); n = len(list(r))
    assert n == 7 and r.indices == [0, 1, 3, 4, 7, 10, 11] and [i for i, *_ in r.skipped] == [2, 5, 6, 8, 9]
    for (i, path, error), file in zip(r.skipped, (clip.frames[2], clip.frames[5], clip.frames[6], clip.masks[8], clip.masks[9])): assert str(file) in error
    with raises(clip.masks[9], str(clip.frames[9]), "10 x 10", "60 x 88"): read_clip(clip, [9])
    r = ClipReader(clip, on_error="skip"); assert len(list(r)) == 9 and len(r.skipped) == 3, "without masks their faults do not matter"
    hopeless = Clip("h", clip.frames[2:3])
    with raises("clip h", "all of them bad"): list(ClipReader(hopeless, on_error="skip"))
    with pytest.raises(DataError): ClipReader(clip, on_error="ignore")


def test_mixed_sizes(tmp_path):
    clip = clip_of(tmp_path, 3); write_image(clip.frames[1], torch.zeros(3, 88, 60))
    with raises(clip.frames[1], "size=(H, W)"): read_clip(clip, masks=False)
    with raises(clip.frames[1]): read_clip(clip, size=30, masks=False)
    assert read_clip(clip, size=(30, 40), masks=False)[0].shape == (3, 3, 30, 40)


def test_a_frame_that_vanishes_during_the_walk(tmp_path):
    clip = clip_of(tmp_path, 4); walk = iter(ClipReader(clip)); next(walk); clip.frames[1].unlink()
    with raises(clip.frames[1], "No such file"): next(walk)


def test_extract_frames(tmp_path, films):
    src, out = tmp_path / "src", tmp_path / "out"
    write_video(src / "b.avi", films[0][:8]); write_video(src / "a.mp4", films[0][:5]); write_video(src / "b.mp4", films[0][:3]); (src / "notes.txt").write_text("x")
    stat = {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in src.iterdir()}
    extract_frames(src, out, size=24, notes=(notes := []))
    layout = find_layout(out)
    assert {c.name: len(c) for c in layout} == {"a": 5, "b_avi": 8, "b_mp4": 3} and notes == []
    assert read_clip(layout["a"])[0].shape == (5, 3, 24, 32) and layout.resolution == "024p"
    first = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    extract_frames(src, out, size=24); assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == first
    assert {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in src.iterdir()} == stat
    x = read_clip(layout["b_avi"])[0]; y = torch.stack(list(VideoReader(src / "b.avi", 24)))
    assert (x - y).abs().mean() * 255 < 2
    extract_frames(src / "b.avi", tmp_path / "one", step=3); assert [len(c) for c in find_layout(tmp_path / "one")] == [3]
    write_video(src / "a.mp4", films[0][:6])                          # the source changed
    with raises(out, "another source"): extract_frames(src, out, size=24)


def test_extract_refuses_and_resumes(tmp_path, films, monkeypatch):
    src = tmp_path / "src"; write_video(src / "a.avi", films[0]); (tmp_path / "images").mkdir()
    for bad in (src, src / "x", src / "x" / "y", src / ".." / "src"):
        with raises("out=", "only read"): extract_frames(src, bad)
    with raises("out=", "only read"): extract_frames(src / "a.avi", src)
    (src / "link").symlink_to(tmp_path / "src")
    with raises("out=", "only read"): extract_frames(src, src / "link" / "z")
    inside = tmp_path / "data" / "JPEGImages" / "480p"; write_video(inside / "v.avi", films[0][:3])
    with raises("out=", "only read"): extract_frames(inside, tmp_path / "data")
    with raises(tmp_path / "images", "0 files"): extract_frames(tmp_path / "images", tmp_path / "o")
    with raises(tmp_path / "no"): extract_frames(tmp_path / "no", tmp_path / "o")
    real, count = room.write_image, 0
    def dies(*a, **k):
        nonlocal count; count += 1
        if count == 8: raise KeyboardInterrupt
        return real(*a, **k)
    monkeypatch.setattr(room, "write_image", dies)
    with pytest.raises(KeyboardInterrupt): extract_frames(src / "a.avi", tmp_path / "o")
    assert [p.name for p in (tmp_path / "o").iterdir()] == [".timet_frames"], "nothing under its name before it is complete"
    extract_frames(src / "a.avi", tmp_path / "o")
    assert count == 8 + T - 7 and len(find_layout(tmp_path / "o")["a"]) == T
    (src / "cut.avi").write_bytes((src / "a.avi").read_bytes()[:9000]); extract_frames(src, tmp_path / "p", on_error="skip", notes=(notes := []))
    assert [c.name for c in find_layout(tmp_path / "p")] == ["a"] and len(notes) == 1 and "cut.avi" in notes[0]
    with raises(src / "cut.avi"): extract_frames(src, tmp_path / "q")


def test_folder_of_images_becomes_a_clip(tmp_path):
    clip = clip_of(tmp_path, 12)
    extract_frames(tmp_path / "c", tmp_path / "out", size=(30, 44))
    (made,) = find_layout(tmp_path / "out")
    assert made.name == "c" and len(made) == 12
    want = read_clip(clip, size=(30, 44), masks=False, exact=True)[0]
    assert (read_clip(made)[0] - want).abs().mean() * 255 < 3, "natural order is kept"


# ---- real data ------------------------------------------------------------------------------------------------------

@pytest.mark.data
def test_every_davis_frame_equals_pillow(real_data):
    layout = find_layout(real_data / "davis2016")
    assert len(layout) == 10
    for clip in layout:
        n = 0
        for (frame, mask), path in zip(ClipReader(clip, masks=True, dtype=torch.uint8), clip.frames):
            with Image.open(path) as im: want = np.array(im.convert("RGB"))
            assert np.array_equal(frame.permute(1, 2, 0).numpy(), want), path
            assert mask.shape == frame.shape[1:] and set(mask.unique().tolist()) <= {0, 1}
            n += 1
        assert n == len(clip.frames)
