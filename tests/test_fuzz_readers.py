"""Byte-flip fuzz over the readers of pictures, masks, videos and JSON: our own error, or a valid result; no hang, no crash.

Each reader is walked over many spoiled files in one child process with a memory and a time limit, so that a crash or a hang
of a decoder fails the test instead of the test run. What spoils a file is drawn by hypothesis in the parent."""
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
    kind, suffix, folder, damages = sys.argv[1], sys.argv[2], Path(sys.argv[3]), pickle.load(sys.stdin.buffer)
    data, path = (folder / "source").read_bytes(), folder / ("spoiled" + suffix)

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

    read = dict(image=image, mask=mask, video=video, json=text)[kind]
    good = bad = 0
    for damage in damages:
        b = bytearray(data)
        for what, a, v in damage:
            at = a % max(len(b), 1)
            if what == "flip" and b: b[at] ^= 1 << v % 8
            if what == "set" and b: b[at] = v % 256
            if what == "big" and b: b[at:at + 4] = b"\\xff\\xff\\xff\\x7f"
            if what == "cut": b = b[:at]
            if what == "drop": del b[at:at + 1 + v % 50]
            if what == "twice": b[at:at] = b[at:at + 1 + v % 50]
        path.write_bytes(b)
        (folder / "last").write_bytes(pickle.dumps(damage))
        start = time.time()
        try: read(); good += 1
        except DataError as e:
            bad += 1
            assert str(path) in str(e), f"the error does not name the file: {e}"
        took = time.time() - start
        assert took < 15, f"took {took:.0f} s"
    print(f"{good} {bad}")
''')

DAMAGE = st.lists(st.tuples(st.sampled_from(["flip", "flip", "flip", "set", "big", "cut", "drop", "twice"]), st.integers(0, 1 << 20) | st.integers(0, 400),
                            st.integers(0, 255)), min_size=1, max_size=4)


def survive(folder, kind, suffix, damages):
    "Read all spoiled files in a child; (valid results, own errors)."
    env = dict(os.environ, OPENCV_FFMPEG_LOGLEVEL="-8", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", CHILD, kind, suffix, str(folder)], input=pickle.dumps(damages), capture_output=True, timeout=120, env=env,
                          cwd=Path(__file__).resolve().parent.parent)
    last = (folder / "last").read_bytes() if (folder / "last").exists() else b""
    assert done.returncode == 0, (f"exit {done.returncode} (negative: killed by a signal); damage {pickle.loads(last) if last else None}\n"
                                  f"{done.stderr.decode(errors='replace')[-1500:]}")
    good, bad = map(int, done.stdout.split())
    assert good + bad == len(damages)
    return good, bad


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


@pytest.mark.parametrize("name", SOURCES)
def test_spoiled_file(name, tmp_path):
    kind, suffix, data = SOURCES[name]
    (tmp_path / "source").write_bytes(data)
    assert survive(tmp_path, kind, suffix, [[("drop", len(data) - 1, 0), ("cut", 0, 0)], [("flip", 0, 0), ("flip", 0, 0)]]) == (1, 1), "an empty and the whole file"
    total = [0, 0]

    @seed(1)
    @settings(max_examples=2, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
    @given(damages=st.lists(DAMAGE, min_size=60, max_size=90))
    def run(damages):
        good, bad = survive(tmp_path, kind, suffix, damages)
        total[0] += good; total[1] += bad
    run()
    assert total[1] > 0, "some damage must be noticed"


@pytest.mark.parametrize("name", ["a.avi", "a.mp4"])
def test_spoiled_video(name, tmp_path):
    frames = torch.stack([ball_scene(k / 12, 48, 64)[0] for k in range(10)])
    (tmp_path / "source").write_bytes(write_video(tmp_path / name, frames, fps=10).read_bytes())
    total = [0, 0]

    @seed(2)
    @settings(max_examples=2, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
    @given(damages=st.lists(DAMAGE, min_size=60, max_size=90))
    def run(damages):
        good, bad = survive(tmp_path, "video", Path(name).suffix, damages)
        total[0] += good; total[1] += bad
    run()
    assert total[0] > 0 and total[1] > 0, total
