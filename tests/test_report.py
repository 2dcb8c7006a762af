"One command, one table: resumable parts, own errors as rows, published figures with reasons, several backbones side by side."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.layout import find_layout
from timet_nb.evaluate import report as R
from timet_nb.evaluate.protocols import PROTOCOLS, NotDefined, Outcome, Protocol, Remember, eval_data
from timet_nb.evaluate.published import PUBLISHED, beside, differences
from timet_nb.features.backbone import create_backbone

CLIPS = ROOT / "data" / "clips"
TIMET = str(Path(sys.executable).parent / "timet")


@pytest.fixture(scope="module")
def data(): return eval_data(CLIPS)


@pytest.fixture(scope="module")
def net(): return create_backbone("test-vit").eval()


@pytest.fixture
def seeds_protocol(monkeypatch):
    "A protocol whose number is its seed."
    p = Protocol("seeds", "?", lambda b, d, s, seed: Outcome({"seed": float(seed)}), dict(mini={}, paper={}))
    monkeypatch.setitem(PROTOCOLS, "seeds", p)
    return p


def test_seven_protocols_and_their_presets_are_plain_json():
    assert set(PROTOCOLS) >= {"cluster", "overcluster", "linear", "retrieve", "foreground", "track", "incontext"}
    for p in PROTOCOLS.values():
        for preset in ("mini", "paper"): assert json.loads(json.dumps(p.settings(preset))) is not None, p.name


def test_paper_presets_hold_the_papers_numbers():
    linear, track = PROTOCOLS["linear"].settings("paper"), PROTOCOLS["track"].settings("paper")
    assert (linear["size"], linear["epochs"], linear["lr"], linear["weight_decay"]) == (448, 50, .01, 1e-4)
    assert (track["size"], track["step"], track["frames"]) == (480, 1, None)
    assert PROTOCOLS["overcluster"].settings("paper")["k_dataset"] == 200


def test_no_clip_is_on_both_sides_for_any_seed(data):
    for seed in range(5):
        d = data.redivided(seed)
        assert not {i.group for i in d.train} & {i.group for i in d.val}


def test_published_splits_are_used_and_never_divided_anew(tmp_path):
    root = _voc(tmp_path)
    d = eval_data(root)
    assert d.division == "as published: train, val" and d.name == "Pascal VOC 2012 val" and not d.moving
    assert [i.name for i in d.redivided(3).val] == [i.name for i in d.val] == ["b"]


def _voc(root):
    "A tree of Pascal VOC with two photographs."
    import numpy as np
    from PIL import Image
    for sub in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"): (root / "VOC2012" / sub).mkdir(parents=True)
    for n, split in (("a", "train"), ("b", "val")):
        Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(root / "VOC2012" / "JPEGImages" / f"{n}.jpg")
        ids = np.zeros((48, 64), np.uint8); ids[8:24, 8:40] = 3; ids[:2] = 255
        m = Image.fromarray(ids, "P"); m.putpalette([i for v in range(256) for i in (v, v // 2, 255 - v)])
        m.save(root / "VOC2012" / "SegmentationClass" / f"{n}.png")
        (root / "VOC2012" / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{n}\n")
    return root


def test_stills_get_the_voc_rows_and_tracking_is_not_defined(tmp_path, net):
    d = eval_data(_voc(tmp_path))
    with pytest.raises(NotDefined, match="single pictures"): PROTOCOLS["track"].run(net, d, PROTOCOLS["track"].settings("mini"), 0)
    r = R.evaluate(net, d, "track,incontext", seeds=2)
    assert [row["status"][:11] for row in r.rows] == ["not defined"] * 2 and not r.failed
    found = PROTOCOLS["cluster"].run(net, d, dict(size=64, frames=1), 0).values
    assert set(found) == {"VOC-21"} and 0 <= found["VOC-21"] <= 1


def test_data_without_masks_is_refused_by_name(tmp_path):
    clip = tmp_path / "only" / "frames"; clip.mkdir(parents=True)
    from PIL import Image
    for t in range(2): Image.new("RGB", (32, 24)).save(clip / f"{t:05d}.jpg")
    with pytest.raises(DataError, match="only.*no masks"): eval_data(tmp_path / "only")


def test_a_second_call_computes_nothing_and_a_change_recomputes(tmp_path, net, data, seeds_protocol):
    first = R.evaluate(net, data, "seeds", seeds=3, out=tmp_path)
    second = R.evaluate(net, data, "seeds", seeds=3, out=tmp_path)
    assert (first.computed, second.computed, second.reused) == (3, 0, 3)
    assert first.rows[0]["values"] == second.rows[0]["values"] == [0., 1., 2.]
    assert R.evaluate(net, data, "seeds", seeds=4, out=tmp_path).computed == 1
    assert R.evaluate(create_backbone("test-vit", seed=5), data, "seeds", seeds=3, out=tmp_path).computed == 3


def test_changed_files_are_another_question(tmp_path, net, seeds_protocol):
    import shutil
    src = tmp_path / "src"; shutil.copytree(CLIPS, src)
    R.evaluate(net, src, "seeds", seeds=1, out=tmp_path / "o")
    mask = next((src / "Annotations").rglob("*.png")); os.utime(mask, (1, 1))
    assert R.evaluate(net, src, "seeds", seeds=1, out=tmp_path / "o").computed == 1


def test_a_killed_run_loses_one_part(tmp_path):
    "kill -9 in the middle of a real run; the next call goes on."
    out = tmp_path / "o"
    argv = [TIMET, "eval", "test-vit", CLIPS, "--protocol", "cluster,track", "--seeds", "2", "--out", out]
    run = subprocess.Popen(list(map(str, argv)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = out / "parts"
    for _ in range(600):
        if parts.exists() and len(list(parts.glob("cluster*.json"))) >= 1: break
        time.sleep(.1)
    run.send_signal(signal.SIGKILL); run.wait()
    kept = len(list(parts.glob("cluster*.json")))
    assert 1 <= kept <= 2
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{kept} parts were there, {3 - kept} computed" in done.stdout
    assert json.loads((out / "report.json").read_text())["rows"][0]["n"] == 2
    assert (out / "report.png").stat().st_size > 3000 and "| cluster | F |" in (out / "report.md").read_text()


def test_own_errors_are_rows_bugs_stop(net, data, monkeypatch):
    def broken(b, d, s, seed): raise DataError("mask 7: no")
    def bug(b, d, s, seed): raise ZeroDivisionError
    monkeypatch.setitem(PROTOCOLS, "broken", Protocol("broken", "?", broken, dict(mini={}, paper={})))
    monkeypatch.setitem(PROTOCOLS, "bug", Protocol("bug", "?", bug, dict(mini={}, paper={})))
    r = R.evaluate(net, data, "broken", seeds=3)
    assert [f["status"] for f in r.failed] == ["failed: mask 7: no"]
    with pytest.raises(ZeroDivisionError): R.evaluate(net, data, "bug", seeds=1)


def test_a_value_that_is_no_number_is_counted_out(net, data, monkeypatch, tmp_path):
    run = lambda b, d, s, seed: Outcome({"x": float("nan") if seed else .5})
    monkeypatch.setitem(PROTOCOLS, "half", Protocol("half", "?", run, dict(mini={}, paper={})))
    row, = R.evaluate(net, data, "half", seeds=3, out=tmp_path).rows
    assert (row["value"], row["n"], row["sd"]) == (.5, 1, None)


def test_bad_words_are_named(net, data):
    for kw, word in ((dict(protocols="clutser"), "clutser"), (dict(preset="big"), "big"), (dict(seeds=0), "seeds")):
        with pytest.raises(ConfigError, match=word): R.evaluate(net, data, **{"protocols": "track"} | kw)


def test_remember_equals_the_backbone_and_stays_below_its_limit(net):
    x = torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        truth = net.tokens(x); one = truth[0].nbytes
        seen = Remember(net, limit=2 * one)
        for order in ([0, 1, 2], [2, 1], [4, 4, 0], [3]):
            torch.testing.assert_close(seen.tokens(x[order]), truth[order], atol=1e-5, rtol=0)
            assert seen.held == sum(f.nbytes for f in seen.kept.values()) <= 2 * one
        assert not torch.equal(seen.tokens(x[:1], norm=False), truth[:1])      # other options are another question


def test_published_figures_have_sources_and_only_the_papers_setting_compares():
    for p in PUBLISHED: assert p.source and p.trust and 0 < p.value < 1
    mine = dict(protocol="retrieve", metric="mIoU", data="Pascal VOC 2012 val", preset="paper", setting={"fraction": "1/8"})
    match = [f for f, why in beside(mine, limit=20) if not why]
    assert {f.value for f in match} == {v / 100 for v in (41.3, 43.2, 53.8, 55.2, 58.4, 66.9)}
    assert differences(dict(mine, preset="mini"), match[0]) and differences(dict(mine, data="mine"), match[0])


def test_compare_from_the_shell_reads_reports_and_backbones(tmp_path):
    run = lambda *argv: subprocess.run([TIMET, *map(str, argv)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    quick = ("--protocol", "linear", "--seeds", "1")
    one = run("eval", "test-vit", CLIPS, *quick, "--out", tmp_path / "a")
    assert one.returncode == 0, one.stderr
    other = create_backbone("test-vit", seed=3); other.save_timm(tmp_path / "other.safetensors")
    both = run("compare", tmp_path / "a", tmp_path / "other.safetensors", "--data", CLIPS, *quick, "--out", tmp_path / "c")
    assert both.returncode == 0, both.stderr
    assert "| linear | mIoU |" in (tmp_path / "c" / "compare.md").read_text() and (tmp_path / "c" / "compare.png").exists()
    lone = run("compare", "test-vit")
    assert lone.returncode == 1 and "--data" in lone.stderr


def test_layout_of_clips_is_what_find_layout_gives(data):
    assert data.layout.names() == find_layout(CLIPS).names() and data.moving
