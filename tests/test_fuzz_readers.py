"""Byte-flip fuzz over the readers of pictures, masks, videos and JSON: our own error, or a valid result; no hang, no crash.

The readers are walked over many spoiled files in one child process with a memory and a time limit, so that a crash or a hang
of a decoder fails one test instead of the test run; after a crash a new child goes on with the next source. What spoils a
file is drawn by hypothesis in the parent."""
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from timet_nb.data.decode import ball_scene
from timet_nb.data.frames import voc_palette, write_video

CHILD = textwrap.dedent('''
    import os, pickle, resource, sys, time
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    import torch
    torch.set_num_threads(1)
    from pathlib import Path
    from timet_nb.base.runtime import DataError
    from timet_nb.base.record import read_json
    from timet_nb.data.frames import VideoReader, count_frames, image_size, read_image, read_mask
    folder, jobs = Path(sys.argv[1]), pickle.load(sys.stdin.buffer)

    def image():
        for size in (None, 20):
            x = read_image(path, size)
            assert x.ndim == 3 and x.shape[0] == 3 and x.numel() and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
        image_size(path)

    def mask():
        for k in ("auto", "binary", "ids"):
            m = read_mask(path, kind=k)
            assert m.ndim == 2 and m.dtype == torch.int64 and m.numel() and 0 <= m.min() and m.max() <= 65535

    def video():
        v = VideoReader(path, on_count="note")
        for n, x in enumerate(v):
            assert x.ndim == 3 and x.shape[0] == 3 and 0 <= x.min() and x.max() <= 1
            assert n < 10_000, "more frames than the file has bytes for"
        assert v.decoded == n + 1

    def text():
        import math
        def walk(x):
            assert x is None or isinstance(x, (bool, int, float, str, list, dict))
            for y in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()): walk(y)
        walk(read_json(path))

    def spoil(data, damage):
        b = bytearray(data)
        for what, a, v in damage:
            at = a % max(len(b), 1)
            if what == "flip" and b: b[at] ^= 1 << v % 8
            if what == "set" and b: b[at] = v % 256
            if what == "big" and b: b[at:at + 4] = b"\\xff\\xff\\xff\\x7f"
            if what == "cut": b = b[:at]
            if what == "drop": del b[at:at + 1 + v % 50]
            if what == "twice": b[at:at] = b[at:at + 1 + v % 50]
        return b

    for name, kind, suffix, data, damages in jobs:
        read, good, bad, path = dict(image=image, mask=mask, video=video, json=text)[kind], 0, 0, folder / ("spoiled" + suffix)
        for damage in damages:
            path.write_bytes(spoil(data, damage))
            (folder / "last").write_bytes(pickle.dumps((name, damage)))
            start = time.time()
            try: read(); good += 1
            except DataError as e:
                bad += 1
                assert str(path) in str(e), f"the error does not name the file: {e}"
            assert time.time() - start < 60, "hangs"
        print(name, good, bad, flush=True)
''')

DAMAGE = st.lists(st.tuples(st.sampled_from(["flip", "flip", "flip", "set", "big", "cut", "drop", "twice"]), st.integers(0, 1 << 20) | st.integers(0, 400),
                            st.integers(0, 255)), min_size=1, max_size=4)


def run_child(folder, jobs):
    "({name: (valid results, own errors)}, what went wrong or None)."
    env = dict(os.environ, OPENCV_FFMPEG_LOGLEVEL="-8", OMP_NUM_THREADS="1")
    try:
        done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], input=pickle.dumps(jobs), capture_output=True, timeout=240, env=env,
                              cwd=Path(__file__).resolve().parent.parent)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as e: code, out, err = "hang", e.stdout or b"", e.stderr or b""
    counts = {line.split()[0]: tuple(map(int, line.split()[1:])) for line in out.decode().splitlines()}
    if code == 0: return counts, None
    last = pickle.loads((folder / "last").read_bytes()) if (folder / "last").exists() else None
    return counts, f"exit {code} (negative: killed by a signal) at {last}\n{err.decode(errors='replace')[-1500:]}"


def draw(n):
    "Lists of damages, the same every time."
    drawn = []

    @seed(1)
    @settings(max_examples=n, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
    @given(damage=DAMAGE)
    def collect(damage): drawn.append(damage)
    collect()
    return drawn


def sources():
    "name -> (kind, suffix, bytes)"
    import io
    x, ids = ball_scene(.3, 48, 64)
    photo = Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy())
    raw = ids.numpy().astype(np.uint8)
    pal = Image.fromarray(raw); pal.putpalette(voc_palette().tobytes())
    exif = Image.Exif(); exif[0x0112] = 6; exif[0x010F] = "maker"
    out = {}
    def add(name, kind, im, format, **k):
        f = io.BytesIO(); im.save(f, format=format, **k); out[name] = kind, f".{name.split('.')[-1]}", f.getvalue()
    add("exif.jpg", "image", photo, "JPEG", exif=exif, quality=90); add("progressive.jpg", "image", photo, "JPEG", progressive=True)
    add("print.jpg", "image", photo.convert("CMYK"), "JPEG"); add("rgb.png", "image", photo, "PNG", exif=exif)
    add("deep.png", "image", Image.fromarray(raw.astype(np.uint16) * 9000), "PNG")
    for f, name in (("WEBP", "a.webp"), ("BMP", "a.bmp"), ("GIF", "a.gif"), ("TIFF", "a.tif"), ("PPM", "a.ppm"), ("JPEG2000", "a.jp2")): add(name, "image", photo, f)
    add("palette_mask.png", "mask", pal, "PNG"); add("grey_mask.png", "mask", Image.fromarray((raw > 0).astype(np.uint8) * 255), "PNG")
    add("colour_mask.png", "mask", pal.convert("RGB"), "PNG"); add("deep_mask.png", "mask", Image.fromarray(raw.astype(np.uint16)), "PNG")
    out["a.json"] = "json", ".json", json.dumps({"videos": {"a": {"objects": {"1": {"category": "äpfel", "frames": ["00000", "00005"]}}}}, "n": [1, 2.5, None, True]}).encode()
    return out


SOURCES = sources()


EMPTY, WHOLE = [("cut", 0, 0)], [("flip", 0, 0), ("flip", 0, 0)]


def films(folder):
    frames = torch.stack([ball_scene(k / 12, 48, 64)[0] for k in range(10)])
    return {n: ("video", Path(n).suffix, write_video(folder / n, frames, fps=10).read_bytes()) for n in FILMS}


FILMS = ("film.avi", "film.mp4")


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    "name -> (valid results, own errors), or the story of a crash."
    folder = tmp_path_factory.mktemp("fuzz")
    damages = [EMPTY, WHOLE, *draw(int(os.environ.get("FUZZ", 120)))]
    jobs = [(n, *job, damages) for n, job in {**SOURCES, **films(folder)}.items()]
    result = {}
    while jobs:
        counts, trouble = run_child(folder, jobs)
        result |= counts
        jobs = [j for j in jobs if j[0] not in counts]
        if trouble and jobs: result[jobs.pop(0)[0]] = trouble
        elif trouble: raise AssertionError(trouble)
    return result


@pytest.mark.parametrize("name", [*SOURCES, *FILMS])
def test_spoiled_file(survived, name):
    got = survived[name]
    assert isinstance(got, tuple), got
    good, bad = got
    assert good >= 1, "the whole file is read"
    assert bad >= 1, "the empty one is an error"
    assert good + bad >= 100


def test_the_harness_notices_a_crash(tmp_path):
    "A reader that dies, or raises something else, is not taken for a success."
    counts, trouble = run_child(tmp_path, [("ok.json", "json", ".json", b"1", [WHOLE]), ("x", "no such reader", ".x", b"1", [WHOLE])])
    assert counts == {"ok.json": (1, 0)} and "exit 1" in trouble
