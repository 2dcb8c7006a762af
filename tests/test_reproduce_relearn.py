"The page of TAU's and STCR's printed figures, given made files in OpenSTL's folders: what is run, what is left out, what is said."
import numpy as np
import pytest
import torch

from timet_nb.base.record import read_json
from timet_nb.cli import run_notebook
from timet_nb.data.digits import DigitWorld, MovingDigits
from timet_nb.relearn.layouts import moving_mnist
from timet_nb.relearn.metrics import openstl_metrics
from timet_nb.relearn.predict import copy_last, predict
from timet_nb.relearn.release import create_simvp, load_simvp
from timet_nb.relearn.simvp import SimvpConfig
from tests.site import NBS

PAGE = NBS / "bench" / "reproduce_relearn.ipynb"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A test file of five clips, three checkpoints, and the page run on three of the clips."
    home = tmp_path_factory.mktemp("openstl")
    clips = MovingDigits(DigitWorld(), 5)
    (home / "moving_mnist").mkdir()
    np.save(home / "moving_mnist" / "mnist_test_seq.npy", np.stack([(255 * clips[n]).byte().numpy()[:, 0] for n in range(5)], 1))
    model = create_simvp(SimvpConfig(10, 1, (64, 64), 2, 8, 2, 2, mlp_ratio=1))
    (home / "weights").mkdir()
    lightning = {f"model.{k}": v for k, v in model.state_dict().items()}
    torch.save(dict(state_dict=lightning, epoch=1999), home / "weights" / "mmnist_tau_one_ep2000.ckpt")
    torch.save(model.state_dict(), home / "weights" / "taxibj_tau_cos_ep50.pth")       # its data is not there
    torch.save(model.state_dict(), home / "weights" / "latest.pth")                    # says nothing
    given = dict(budget="smoke", device="cpu", data=str(home), weights=str(home / "weights"), most=3, batch=2, out=str(home / "out"))
    run_notebook(str(PAGE), given, out=home / "run", timeout=300)
    return home, read_json(home / "out" / "reproduce_relearn.json")


def test_what_is_there_is_run(made):
    home, got = made
    rows = {r["metric"]: r for r in got["rows"] if (r["data"], r["epochs"]) == ("moving-mnist", 2000)}
    clips, model = moving_mnist(home), load_simvp(home / "weights" / "mmnist_tau_one_ep2000.ckpt")
    x = torch.stack([clips[i] for i in range(3)])
    ours = openstl_metrics(predict(model, x[:, :10], 10, clip=False), x[:, 10:])
    copied = openstl_metrics(copy_last(x[:, :10], 10), x[:, 10:])
    for m in ("mse", "mae", "ssim", "psnr"):
        assert rows[m]["ours"] == pytest.approx(ours[m], rel=1e-4)
        assert rows[m]["copy"] == pytest.approx(copied[m], rel=1e-4)
        assert rows[m]["clips"] == 3 and rows[m]["verdict"] == "other sizes, part of the clips"


def test_epochs_are_kept_apart(made):
    "A file of 2000 epochs is not set beside the figures of 200."
    others = [r for r in made[1]["rows"] if (r["data"], r["epochs"]) != ("moving-mnist", 2000)]
    assert {r["verdict"] for r in others} == {"not run"} and all(r["ours"] is None for r in others)
    assert all(isinstance(r["epochs"], int) for r in made[1]["rows"])


def test_what_is_left_out_is_named(made):
    home, got = made
    names = {n.split(":")[0] for n in got["notes"]}
    assert names == {"latest.pth", "taxibj_tau_cos_ep50.pth"}
    assert not any(str(home) in n for n in got["notes"])
