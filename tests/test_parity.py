"The parity ledger: it agrees on the golden arrays, sees a changed one, survives damage, and fits folders of other sizes."
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import parity
from tests.parity import GOLDEN, Line, Measured, NotCovered, compare, compare_ids, main

ROOT = Path(__file__).resolve().parent.parent
TIMET = sorted(p.stem for p in (GOLDEN / "timet").glob("*.npz"))


def lines(capsys, *argv):
    code = main([str(a) for a in argv])
    out = capsys.readouterr().out.splitlines()
    return code, out[:-1], out[-1]


@pytest.fixture
def copy(tmp_path):
    "A folder with two small files that can be spoilt."
    (tmp_path / "timet").mkdir()
    for n in ("davis_jf", "schedules"): shutil.copy(GOLDEN / "timet" / f"{n}.npz", tmp_path / "timet")
    return tmp_path


def rewrite(path, **changes):
    z = dict(np.load(path)) if path.exists() else {}
    z |= changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{k: v for k, v in z.items() if v is not None})


# ---- the golden arrays ----

def test_the_whole_ledger_as_a_command():
    run = subprocess.run([sys.executable, "-m", "tests.parity"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    last = run.stdout.splitlines()[-1]
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    agree, differ, open_ = map(int, re.fullmatch(r"parity: (\d+) agree, (\d+) differ, (\d+) not covered", last).groups())
    assert differ == 0 and agree >= 159
    body = run.stdout.splitlines()[:-1]
    assert sum("not covered" in l for l in body) == open_ and sum(bool(re.search(r"  ok( \(|$)", l)) for l in body) == agree
    for stem in TIMET:
        mine = [l for l in body if l.startswith(f"timet/{stem}:")]
        assert mine and all("  ok" in l for l in mine), stem
    assert len(TIMET) == 19 and sum(l.startswith("dcsam/metrics_jf:") for l in body) == 2


def test_inputs_are_not_counted_as_outputs(capsys):
    _, body, _ = lines(capsys, GOLDEN, "--only", "timet/davis_jf")
    assert {l.split()[0].split(":")[1] for l in body} == {"J", "F", "J_stats_mean_recall_decay", "F_stats_mean_recall_decay"}
    _, more, _ = lines(capsys, GOLDEN, "--only", "timet/davis_jf", "--inputs")
    assert sum("input" in l for l in more) == 3


@pytest.mark.parametrize("stem", TIMET)
def test_every_output_array_is_watched(stem, tmp_path, capsys):
    "Change each output array in turn: exactly that line must fail."
    source = GOLDEN / "timet" / f"{stem}.npz"
    z = dict(np.load(source))
    _, body, _ = lines(capsys, GOLDEN, "--only", f"timet/{stem}")
    names = [l.split()[0].split(":")[1] for l in body if "  ok" in l]
    spoilt = dict(z)
    for n in names:
        a = z[n].astype(np.float64) if z[n].dtype.kind == "f" else z[n].copy()
        if n.startswith("map_"): a = np.random.default_rng(0).permutation(a.ravel()).reshape(a.shape)
        elif stem == "schedules": a[len(a) // 2] += .01
        elif a.ndim: a.flat[0] = a.flat[0] + 1 if a.dtype.kind == "f" else (a.flat[0] + 1) % (a.max() + 1)
        else: a = a + 1
        spoilt[n] = a
    (tmp_path / "timet").mkdir()
    np.savez(tmp_path / "timet" / f"{stem}.npz", **spoilt)
    code, body, last = lines(capsys, tmp_path, "--only", f"timet/{stem}")
    assert code == 1 and names and all("FAIL" in l for l in body), [l for l in body if "FAIL" not in l]


# ---- damage ----

def test_damaged_files_are_named_and_the_rest_goes_on(copy, capsys):
    path = copy / "timet" / "schedules.npz"
    data = path.read_bytes()
    for junk in (b"", b"<html>no</html>", data[: len(data) // 2]):
        path.write_bytes(junk)
        code, body, last = lines(capsys, copy, "--only", "timet/*")
        assert code == 1 and any("schedules:*" in l and "FAIL" in l and "schedules.npz" in l for l in body)
        assert sum("davis_jf" in l and "  ok" in l for l in body) == 4


def test_a_flipped_byte_in_one_array(copy, capsys):
    path = copy / "timet" / "davis_jf.npz"
    with zipfile.ZipFile(path) as z: info = z.getinfo("J.npy")
    data = bytearray(path.read_bytes()); data[info.header_offset + 60] ^= 255; path.write_bytes(bytes(data))
    code, body, _ = lines(capsys, copy, "--only", "timet/davis_jf")
    assert code == 1 and any("davis_jf:J " in l and "FAIL" in l for l in body)
    assert any("davis_jf:F " in l and "ok" in l for l in body)


def test_fuzzed_files_never_crash(copy, capsys):
    path = copy / "timet" / "davis_jf.npz"
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        bad = bytearray(data)
        for _ in range(rng.randint(1, 4)): bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(bad))
        assert main([str(copy), "--only", "timet/davis_jf"]) in (0, 1, 2)
    capsys.readouterr()


def test_missing_and_odd_arrays(copy, capsys):
    path = copy / "timet" / "davis_jf.npz"
    rewrite(path, gt=None)
    code, body, _ = lines(capsys, copy, "--only", "timet/davis_jf")
    assert code == 1 and len(body) == 4 and all("FAIL" in l and "input array 'gt' is missing" in l for l in body)
    shutil.copy(GOLDEN / "timet" / "davis_jf.npz", path)
    rewrite(path, J=np.zeros((2, 5)), novelty=np.zeros(3))
    _, body, _ = lines(capsys, copy, "--only", "timet/davis_jf")
    assert any("davis_jf:J " in l and "FAIL (shape" in l for l in body)
    assert any("novelty" in l and "not covered (no check for this array)" in l for l in body)
    np.savez(path, J=np.array([{}], dtype=object))
    assert any("FAIL" in l for l in lines(capsys, copy, "--only", "timet/davis_jf")[1])


def test_missing_files_are_listed(copy, capsys):
    code, body, last = lines(capsys, copy)
    assert code == 0 and any(l.startswith("timet/sinkhorn:*") and "no file" in l for l in body)
    assert sum("no file" in l for l in body) == sum(c.run is not None for c in parity.REGISTRY) - 2


def test_no_folder_and_empty_folder(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2 and "no such folder" in capsys.readouterr().out
    assert main([str(tmp_path), "--only", "x/*"]) == 2


def test_systems_to_come_are_not_covered(capsys):
    code, body, last = lines(capsys, GOLDEN, "--only", "tps/tps_iteration_flip1")
    assert code == 0 and last.startswith("parity: 0 agree, 0 differ, ") and len(body) > 1 and all("system not built yet" in l for l in body)


# ---- the runner ----

def test_compare_by_hand():
    g = np.array([1., 2.])
    assert compare("x", g, g + 5e-6, None).verdict == "ok" and compare("x", g, g + 1e-3, None).verdict == "FAIL"
    assert compare("x", g, torch.tensor([1., 2.]), 0).error == 0
    assert compare("x", g, lambda: 1 / 0, None).why.startswith("ZeroDivisionError")
    assert compare("x", g, NotCovered("why"), None).verdict == "not covered"
    assert compare("x", g, Measured(.5), .1).verdict == "FAIL" and compare("x", g, Measured(.05, "n"), .1).why == "n"
    nan = np.array([np.nan, 2.])
    assert compare("x", nan, nan, None).verdict == "ok" and compare("x", g, nan, None).verdict == "FAIL"
    assert compare("x", g, ["a", "b"], None).verdict == "FAIL" and compare("x", g, np.zeros(3), None).verdict == "FAIL"
    ids = np.array([1, 2], dtype=np.int16)
    assert compare("x", ids, np.array([1, 2]), None).verdict == "ok" and compare("x", ids, np.array([1, 3]), None).verdict == "FAIL"
    inf = np.array([np.inf, 1.]); assert compare("x", inf, inf, None).verdict == "ok"


def test_ids_may_differ_at_ties_only():
    scores = np.array([[.5, .5, 0.], [.9, .1, 0.]])
    assert compare_ids(np.array([0, 0]), np.array([1, 0]), scores).error == 0
    assert "1 ties" in compare_ids(np.array([0, 0]), np.array([1, 0]), scores).note
    assert compare_ids(np.array([0, 1]), np.array([0, 0]), scores).error == .5


def test_a_check_that_raises_or_repeats(monkeypatch, copy, capsys):
    def raises(z): yield "J", z["J"]; raise ValueError("told so\nat length")
    def repeats(z): yield "J", z["J"]; yield "J", z["J"]
    parity.load_checks()
    for run, words in ((raises, "ValueError: told so"), (repeats, "twice")):
        monkeypatch.setattr(parity, "REGISTRY", [parity.Check("timet/davis_jf", ("gt", "pred", "bound_th"), run)])
        code, body, _ = lines(capsys, copy, "--only", "timet/davis_jf")
        assert code == 1 and sum("  ok" in l for l in body) == 1
        assert sum("FAIL" in l and words in l for l in body) == 3


def test_a_module_of_checks_that_cannot_be_imported(monkeypatch, copy, capsys):
    monkeypatch.setattr(parity, "CHECKS", ("tests.no_such_module", "tests.parity_broken"))
    monkeypatch.setitem(sys.modules, "tests.parity_broken", None)
    code, body, _ = lines(capsys, copy, "--only", "timet/davis_jf")
    assert all(any(m in l and "FAIL (cannot be imported" in l for l in body) for m in parity.CHECKS) and code == 1


def test_line_layout():
    text = str(Line("timet/x:y", "ok", 1e-7, 1e-5))
    assert re.fullmatch(r"timet/x:y\s+1\.0e-07\s+1e-05  ok", text)
    assert str(Line("timet/x:y", "not covered", why="k-means")).endswith("not covered (k-means)")


# ---- other sizes and names, made by loops ----

def test_a_folder_of_other_sizes(tmp_path, capsys):
    "Arrays made here by the definitions, under names with other numbers."
    out, rng = tmp_path / "timet", np.random.default_rng(0)
    out.mkdir()
    def near(h, w, r): return np.array([[max(abs(i - k), abs(j - l)) <= r for k in range(h) for l in range(w)]
                                        for i in range(h) for j in range(w)], np.uint8)
    np.savez(out / "neighbourhood.npz", mask_h3_w8_r1=near(3, 8, 1), mask_h9_w2_r3=near(9, 2, 3))
    e, i = 5, 11
    wave = lambda a, b: np.array([b + .5 * (a - b) * (1 + np.cos(np.pi * s / (e * i))) for s in range(e * i)])
    np.savez(out / "schedules.npz", weight_decay=wave(.1, .9), momentum=wave(.99, 1.), epochs=np.int64(e), iters_per_epoch=np.int64(i))
    random.seed(5); uniform = [sorted(random.sample(range(17), 6)) for _ in range(3)]
    random.seed(5); dense = [list(range(s, s + 6)) for s in (random.randint(0, 17 - 6) for _ in range(3))]
    np.savez(out / "sampling.npz", python_random_seed=np.int64(5), num_clips=np.int64(3), uniform_size17_n6_step4=np.array(uniform),
             dense_size17_n6_step4=np.array(dense), full_size7_n6_step2=np.tile(np.arange(7), (3, 1)))
    gt, pred = rng.integers(0, 2, (3, 9, 20, 33)).astype(np.uint8), rng.integers(0, 2, (3, 9, 20, 33)).astype(np.uint8)
    J = (gt & pred).sum((2, 3)) / (gt | pred).sum((2, 3))
    np.savez(out / "davis_jf.npz", gt=gt, pred=pred, bound_th=np.float64(.02), J=J)
    f, p = rng.normal(size=(3, 25, 8)).astype(np.float32), rng.normal(size=(6, 8)).astype(np.float32)
    f, p = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (f, p))
    s = f @ p.T
    M = np.exp(s.reshape(-1, 6).astype(np.float64) / .2)
    for _ in range(7): M /= M.sum(0) * 6; M /= M.sum(1, keepdims=True) * len(M)
    np.savez(out / "sinkhorn.npz", features=f, prototypes=p, scores=s, q=(M / M.sum(1, keepdims=True)).reshape(3, 25, 6).astype(np.float32),
             epsilon=np.float64(.2), iters=np.int64(7))
    code, body, last = lines(capsys, tmp_path, "--only", "timet/*")
    assert code == 0 and last == "parity: 10 agree, 0 differ, 0 not covered", "\n".join(body)
