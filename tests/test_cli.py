"The `timet` command as a user meets it: a process, its words, its exit code, what it leaves behind."
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from tests.conftest import ROOT
from timet_nb.cli import main

TIMET = str(Path(sys.executable).parent / "timet")


def timet(*argv, env=None, cwd=ROOT):
    return subprocess.run([TIMET, *map(str, argv)], capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}, timeout=300)


@pytest.fixture
def toy(tmp_path):
    "A folder with a small parameterised notebook."
    def make(*sources, tag=True):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
        if tag: nb.cells[0].metadata["tags"] = ["parameters"]
        nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
        nbformat.write(nb, tmp_path / "toy.ipynb")
        return tmp_path / "toy.ipynb"
    return make


def test_help_lists_every_verb_with_a_sentence():
    done = timet("--help")
    assert done.returncode == 0
    for verb in ("doctor", "frames", "tune", "predict", "relearn", "dcsam train", "eval", "measure", "compare", "propagate", "run", "clips", "visor", "look"):
        assert f"\n  {verb} " in done.stdout, verb
    assert "source" in timet("tune", "--help").stdout and "never changed" in timet("frames", "--help").stdout


def test_slips_get_one_line_and_a_suggestion():
    done = timet("propogate")
    assert done.returncode == 1 and "did you mean propagate" in done.stderr and "Traceback" not in done.stderr
    done = timet("look", "/nowhere/at/all")
    assert done.returncode == 1 and "/nowhere/at/all" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["tune", "--help"], ["run", "quickstart", "--help"], ["--version"]], ids=" ".join)
def test_help_does_not_wait_for_torch(words):
    code = f"import sys\nfrom timet_nb.cli import main\ntry: main({words})\nexcept SystemExit: pass\nprint('loaded', 'torch' in sys.modules, 'papermill' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "loaded False False"


def test_one_command_of_four_pages():
    "The runner and the verbs live in rooms of their own, and are found in timet_nb.cli as ever."
    from timet_nb import cli, run, systems, verbs
    for room, names in ((run, "NotebookFailed check_parameters find_notebook notebook_parameters run_notebook suite_dir"),
                        (systems, "METHODS dcsam__eval dcsam__segment dcsam__train predict relearn segment"),
                        (verbs, "clips compare doctor eval_ frames look measure propagate tune visor with_settings")):
        for name in names.split():
            assert getattr(cli, name) is getattr(room, name) and name in cli.__all__, name
    assert {"COMMANDS", "PAIRS", "command", "call", "run", "main"} <= set(cli.__all__)
    assert cli.METHODS is systems.METHODS and len(cli.COMMANDS) == 16


def test_module_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "timet_nb.cli", "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == timet("--help").stdout and "propagate" in done.stdout


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("TIMET_DEBUG", "1")
    with pytest.raises(ValueError, match="nowhere"): main(["look", "/nowhere/at/all"])


def test_doctor_tells_what_is_there():
    out = timet("doctor").stdout
    for word in ("python", "torchvision", "GFLOP/s", "weights"): assert word in out


def test_look_and_frames_leave_the_source_alone(tmp_path):
    import cv2
    import numpy as np
    video = tmp_path / "src" / "ball.avi"; video.parent.mkdir()
    sink = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for t in range(7): sink.write(cv2.circle(np.full((48, 64, 3), 90, np.uint8), (8 + 6 * t, 24), 6, (20, 200, 240), -1))
    sink.release()
    before = video.read_bytes()
    assert "1 clip" in timet("look", video.parent).stdout
    done = timet("frames", video, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 7
    assert video.read_bytes() == before and [p.name for p in video.parent.iterdir()] == ["ball.avi"]
    inside = timet("frames", video.parent, video.parent / "frames")          # a folder is never written into
    assert inside.returncode == 1 and [p.name for p in video.parent.iterdir()] == ["ball.avi"]


def test_propagate_writes_one_mask_a_frame(tmp_path):
    clips = ROOT / "data" / "clips"
    masks = sorted((clips / "Annotations" / "480p" / "cat-wall").glob("*.png"))
    done = timet("propagate", clips / "JPEGImages" / "480p" / "cat-wall", masks[0], tmp_path / "m", "--backbone", "test-vit", "--size", "96")
    assert done.returncode == 0, done.stderr
    written = sorted((tmp_path / "m").rglob("*.png"))
    assert len(written) == len(masks)
    from timet_nb.data.frames import read_mask
    assert torch.equal(read_mask(written[0]) > 0, read_mask(masks[0]) > 0)
    again = timet("propagate", clips / "JPEGImages" / "480p" / "cat-wall", masks[0], tmp_path / "m", "--backbone", "test-vit")
    assert again.returncode == 1 and "not empty" in again.stderr


def test_segment_writes_masks_by_example_and_refuses_half_a_reference(tmp_path):
    clips = ROOT / "data" / "clips"
    frames, masks = ((clips / d / "480p" / "cat-wall") for d in ("JPEGImages", "Annotations"))
    ref = ["--ref", frames / "00000.jpg", masks / "00000.png", "--ref", frames / "00010.jpg", masks / "00010.png"]
    common = ["--backbone", "test-vit", "--size", "96"]
    done = timet("segment", *ref, "--target", frames, "--out", tmp_path / "out", "--label", "cat", "cat", *common, "--step", "5")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert told["classes"] == ["cat"] and told["references"] == [2] and len(told["targets"]) == 4
    from timet_nb.data.frames import read_mask
    first = read_mask(tmp_path / "out" / told["targets"][0]["files"]["masks"])
    truth = read_mask(masks / "00000.png")
    assert first.shape == truth.shape
    assert ((first > 0) & (truth > 0)).sum() > .5 * ((first > 0) | (truth > 0)).sum()      # it was shown this very frame
    with pytest.raises(SystemExit, match="name a --target"): main([str(w) for w in ("segment", *ref)])
    for words, said in [(["--ref", frames / "00000.jpg"], "takes a picture and its mask"), ([], "takes a picture and its mask"),
                        ([*ref, "--method", "magic"], "magic"), ([*ref, "--weights", "w.pth"], "no weights")]:
        with pytest.raises(SystemExit, match=said): main([str(w) for w in ("segment", "--target", frames, "--out", tmp_path / "no", *words, *common)])
        assert not (tmp_path / "no").exists()


def small_cnn():
    from timet_nb.base.runtime import CheckpointError
    from timet_nb.features.backbone import create_backbone
    try: create_backbone("efficientnet-lite0-imagenet")
    except CheckpointError as e: pytest.skip(f"the pip-shipped CNN cannot be had: {str(e).splitlines()[0]}")


def cat():
    clips = ROOT / "data" / "clips"
    return ((clips / d / "480p" / "cat-wall") for d in ("JPEGImages", "Annotations"))


@pytest.mark.weights
def test_segment_by_the_shipped_sine(tmp_path):
    small_cnn(); frames, masks = cat()
    ref = ["--ref", frames / "00000.jpg", masks / "00000.png"]
    done = timet("segment", *ref, "--target", frames, "--out", tmp_path / "out", "--method", "sine", "--step", "19", "--label", "cat")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert told["method"] == "sine" and told["classes"] == ["cat"] and len(told["targets"]) == 2
    assert {"masks", "identity", "instances"} <= set(told["targets"][0]["files"])
    for words, said in [(["--size", "96"], "leave --size out"), (["--backbone", "test-vit"], "leave --backbone out")]:
        with pytest.raises(SystemExit, match=said): main([str(w) for w in ("segment", "--target", frames, "--out", tmp_path / "no", *ref, "--method", "sine", *words)])


@pytest.mark.weights
def test_dcsam_has_verbs_of_two_words(tmp_path):
    small_cnn(); frames, masks = cat()
    ref = ["--ref", frames / "00000.jpg", masks / "00000.png", "--label", "cat", "--target", frames, "--step", "19"]
    for out, words in (("one", ("dcsam", "segment")), ("two", ("segment", "--method", "dcsam"))):
        main([str(w) for w in (*words, *ref, "--out", tmp_path / out)])
    one, two = (json.loads((tmp_path / n / "answers.json").read_text()) for n in ("one", "two"))
    assert one["method"] == two["method"] == "dcsam" and one["classes"] == ["cat"] and len(one["targets"]) == 2
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.png"))
    assert names and all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    assert timet("dcsam").stderr.startswith("timet: no verb 'dcsam'; did you mean dcsam train or")
    assert "J&F on IC-VOS" in timet("dcsam", "eval", "--help").stdout
    with pytest.raises(SystemExit, match="leave --size out"): main([str(w) for w in ("segment", "--method", "dcsam", "--size", "9", *ref, "--out", tmp_path / "no")])
    with pytest.raises(SystemExit, match="weights are needed too"): main([str(w) for w in ("dcsam", "segment", *ref, "--sam", "vit_b.pth", "--out", tmp_path / "no")])


def test_measure_prints_a_row_a_clip_and_records_it(tmp_path):
    done = timet("measure", "test-vit", ROOT / "data" / "clips", "--protocol", "track", "--frames", "3", "--size", "64", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| mean |" in done.stdout and "cat-wall" in done.stdout
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["name"] == "J" and 0 <= row["value"] <= 1 and row["clips"] == 12
    for verb in ("measure", "eval"):
        wrong = timet(verb, "test-vit", ROOT / "data" / "clips", "--protocol", "clutser")
        assert wrong.returncode == 1 and "clutser" in wrong.stderr


def test_tune_leaves_a_vit_that_plain_timm_loads(tmp_path):
    short = "views=1,max_frames=4,batch=2,prototypes=8,size=64,frames=2,depth=4"
    done = timet("tune", ROOT / "data" / "clips", tmp_path / "t", "--backbone", "test-vit", "--steps", "2", "--settings", short)
    assert done.returncode == 0, done.stderr
    from timet_nb.features.backbone import create_backbone
    assert create_backbone(tmp_path / "t" / "backbone.safetensors").depth == 4
    wrong = timet("tune", ROOT / "data" / "clips", tmp_path / "u", "--settings", "protoypes=8")
    assert wrong.returncode == 1 and "prototypes" in wrong.stderr


def test_run_takes_parameters_and_leaves_everything(toy, tmp_path):
    path = toy("n = 2\nname = ''\nout = ''", "print(n * 2, name)")
    done = timet("run", path, "--n", "21", "-p", "name=x", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert "42 x" in (tmp_path / "r" / "toy.ipynb").read_text() and (tmp_path / "r" / "toy.html").stat().st_size > 1000
    assert json.loads((tmp_path / "r" / "run.json").read_text())["failed"] is None


def test_run_refuses_what_it_does_not_know(toy):
    path = toy("n = 2")
    done = timet("run", path, "--m", "1")
    assert done.returncode == 1 and "no parameter 'm'" in done.stderr
    assert "takes int" in timet("run", path, "--n", "many").stderr
    for words in (["run", path, "--help"], ["run", "--help"]):
        done = timet(*words)                                        # help is no mistake
        assert done.returncode == 0 and done.stdout.startswith("usage: ") and not done.stderr
    assert "n            2" in timet("run", path, "--help").stdout
    choosy = toy('budget = "smoke"   # smoke | cpu: minutes | gpu')
    assert "budget is smoke, cpu, gpu, got 'huge'" in timet("run", choosy, "--budget", "huge").stderr


def test_failed_run_keeps_the_executed_notebook(toy, tmp_path):
    path = toy("n = 2", "print('reached')", "1 / 0", "print('never')")
    done = timet("run", path, "--out", tmp_path / "r")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "toy.ipynb" in done.stderr
    text = (tmp_path / "r" / "toy.ipynb").read_text()
    assert "reached" in text and json.loads((tmp_path / "r" / "run.json").read_text())["failed"].startswith("cell 3: ZeroDivisionError")


def test_kernel_that_is_killed_leaves_the_partial_notebook(toy, tmp_path):
    "What running out of memory looks like: the kernel dies at once."
    path = toy("n = 2", "print('reached')", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = timet("run", path, "--out", tmp_path / "r")
    assert done.returncode != 0
    assert (tmp_path / "r" / "toy.ipynb").exists() and "DeadKernelError" in done.stderr and "Traceback" not in done.stderr


def test_cell_timeout_is_told(toy, tmp_path):
    path = toy("n = 2", "import time; time.sleep(60)")
    done = timet("run", path, "--timeout", "3", "--out", tmp_path / "r")
    assert done.returncode == 1 and "CellTimeoutError" in done.stderr and (tmp_path / "r" / "toy.ipynb").exists()


def test_relearn_from_folders_to_masks(tmp_path):
    "Annotated images, a video, one annotated frame: masks before and after, a model that can be used again, and nothing among the data."
    from timet_nb.data.ultrasound import UltrasoundWorld, write_ultrasound
    images = write_ultrasound(tmp_path / "images", UltrasoundWorld("breast", 64, seed=1), 5)
    films = write_ultrasound(tmp_path / "films", UltrasoundWorld("heart", 64, frames=6, seed=2), 1)
    folder = next((films / "JPEGImages").rglob("*.jpg")).parent
    frame, mask = sorted(folder.glob("*.jpg"))[0], sorted((films / "Annotations").rglob("*.png"))[0]
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    said = timet("relearn", images, folder, "--support", frame, mask, "--out", tmp_path / "one", "--budget", "smoke", "--steps", "2", "--device", "cpu").stdout
    assert "6 frames, steadiness" in said and "Dice" not in said          # a folder of frames has no truth
    model = tmp_path / "one" / "image-model.safetensors"
    said = timet("relearn", images, films, "--model", model, "--out", tmp_path / "two", "--budget", "smoke", "--steps", "2", "--device", "cpu").stdout
    assert "Dice" in said and len(list((tmp_path / "two" / "masks").rglob("*.png"))) == 6
    assert [p for p in before if not p.exists()] == [] and not list(films.rglob("*.safetensors"))
    assert "--support takes a picture and its mask" in timet("relearn", images, folder, "--support", frame, "--out", tmp_path / "three").stderr
    assert "inside the data" in timet("relearn", images, films, "--out", films / "four").stderr
