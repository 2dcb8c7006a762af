"LPIPS: the package's own numbers from a named file, OpenSTL's loop over frames, and what is said when something is missing."
import sys
import warnings
from urllib.error import URLError

import pytest
import torch

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError, repair_torchvision
from timet_nb.features.checkpoints import save_state
from timet_nb.relearn import metrics
from timet_nb.relearn.forecast import copy_last, evaluate_predictor
from timet_nb.relearn.metrics import frame_metrics, load_lpips, lpips, openstl_metrics
from timet_nb.relearn.release import create_simvp
from timet_nb.relearn.simvp import SimvpConfig


@pytest.fixture(scope="module")
def package():
    repair_torchvision()
    return pytest.importorskip("lpips", reason='the package is not here: pip install "timet_nb[lpips]"')


def alexnet_state(seed=0):
    "The shapes of torchvision's alexnet, without most of its classifier; random."
    draw, widths = torch.Generator().manual_seed(seed), (3, 64, 192, 384, 256, 256)
    state = {"classifier.6.bias": torch.zeros(1000)}
    for k, i, o, s in zip((0, 3, 6, 8, 10), widths, widths[1:], (11, 5, 3, 3, 3)):
        state[f"features.{k}.weight"] = torch.randn(o, i, s, s, generator=draw) * (2 / (i * s * s)) ** .5
        state[f"features.{k}.bias"] = .1 * torch.randn(o, generator=draw)
    return state


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(alexnet_state(), path)
    return path


@pytest.fixture(scope="module")
def net(package, file): return load_lpips(file)


def clips(channels=3, shape=(2, 3), size=(40, 56), seed=0):
    return torch.rand(2, *shape, channels, *size, generator=torch.Generator().manual_seed(seed))


def test_the_network_is_the_packages(package, net):
    "Built the package's way (its heads, its trunk on random weights) and filled with the same trunk."
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore"); theirs = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    assert {k for k in theirs.state_dict()} == {k for k in net.state_dict()}
    trunk = {k: v for k, v in net.state_dict().items() if k.startswith("net.")}
    theirs.load_state_dict(trunk, strict=False)
    for k, v in theirs.state_dict().items(): assert torch.equal(v, net.state_dict()[k]), k
    a, b = (2 * x.flatten(0, 1) - 1 for x in clips())
    with torch.no_grad(): assert torch.equal(theirs(a, b), net(a, b))
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_as_openstl_counts_it(package, net, channels):
    "One frame after the other through the package's own way from a picture to a tensor; then the mean of the frames."
    a, b = clips(channels); a = 1.2 * a - .1                                  # predictions overshoot
    total = 0.
    for x, y in zip(a.clamp(0, 1).flatten(0, 1), b.flatten(0, 1)):
        x, y = (package.im2tensor(255 * z.permute(1, 2, 0).numpy()) for z in (x, y))
        with torch.no_grad(): total += net(x, y).squeeze().item()
    assert lpips(a, b, net) == pytest.approx(total / 6, rel=1e-5)
    assert lpips(a, b, net, batch=4) == pytest.approx(total / 6, rel=1e-5)
    assert lpips(b, b, net) == 0 and lpips(a, b, net) == pytest.approx(lpips(b, a.clamp(0, 1), net), rel=1e-6)


def test_with_the_other_metrics(net):
    a, b = clips()
    for f in (openstl_metrics, frame_metrics):
        plain, more = f(a, b), f(a, b, net=net)
        assert more.pop("lpips") == pytest.approx(lpips(a, b, net)) and more == plain and "lpips" not in plain


def test_in_the_evaluation_of_a_predictor(net):
    "Beside the other measures, for the model and for the copy; without a network nothing changes."
    model = create_simvp(SimvpConfig(2, 3, (32, 32), 2, 8, 2, 2, mlp_ratio=1))
    x = clips(3, shape=(3, 4), size=(32, 32))[0]
    plain, more = evaluate_predictor(model, list(x)), evaluate_predictor(model, list(x), batch=2, net=net)
    assert more["copy"].pop("lpips") == pytest.approx(lpips(copy_last(x[:, :2], 2), x[:, 2:], net), rel=1e-6) and more["model"].pop("lpips") > 0
    assert plain["copy"] == pytest.approx(more["copy"], rel=1e-9) and set(plain["model"]) == set(more["model"])


def test_what_it_refuses(net):
    for channels, size in ((2, (40, 40)), (4, (40, 40)), (3, (30, 90)), (1, (90, 30))):
        a, b = clips(channels, size=size)
        with pytest.raises(DataError, match="1 or 3 channels, sides of 31"): lpips(a, b, net)
    a, b = clips(3, size=(31, 31)); assert lpips(a, b, net) > 0
    with pytest.raises(DataError, match="one shape"): lpips(a, b[:, :2], net)


@pytest.mark.parametrize("kind", ["safetensors", "half", "bin"])
def test_other_containers(package, net, tmp_path, kind):
    state = alexnet_state()
    if kind == "safetensors": path = save_state(tmp_path / "a.safetensors", state)
    else: torch.save({k: v.half() if kind == "half" else v for k, v in state.items()}, path := tmp_path / f"a.{kind}")
    a, b = clips()
    assert lpips(a, b, load_lpips(path)) == pytest.approx(lpips(a, b, net), rel=2e-2 if kind == "half" else 1e-6)


def test_nothing_is_drawn_at_random(package, file):
    before = torch.random.get_rng_state(); load_lpips(file)
    assert torch.equal(before, torch.random.get_rng_state())


class Rude:
    def __reduce__(self): return (exec, ("import sys; sys.rude_ran = True",))


@pytest.mark.parametrize("change, word", [
    (lambda s: s.pop("features.8.weight"), "features.8.weight"),
    (lambda s: s.update({"features.0.weight": torch.zeros(64, 3, 3, 3)}), r"\(64, 3, 11, 11\)"),
    (lambda s: s["features.3.bias"].fill_(float("nan")), "NaN"),
    (lambda s: s.update({"features.6.bias": "text"}), "features.6.bias"),
    (lambda s: s.update(more=Rude()), "nothing was run")])
def test_files_that_are_no_alexnet(package, tmp_path, change, word):
    state = alexnet_state(); change(state)
    path = tmp_path / "odd.pth"; torch.save(state, path)
    with pytest.raises(CheckpointError, match=word): load_lpips(path)
    assert not hasattr(sys, "rude_ran")


def test_no_such_file(package, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"): load_lpips(tmp_path / "none.pth")


def test_without_the_package(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ConfigError, match=r'pip install "timet_nb\[lpips\]"'): load_lpips(file)


def test_fetching(monkeypatch, tmp_path, package):
    "By default the file of torchvision is fetched once, with the hash in its name; without a network the error says what to do."
    monkeypatch.setenv("TIMET_CACHE", str(tmp_path)); asked = []
    def broken(url, to, **options): raise URLError("no route")
    monkeypatch.setattr("torch.hub.download_url_to_file", broken)
    with pytest.raises(CheckpointError, match="alexnet-owt-7be5be79.pth.*\n?.*weights="): load_lpips()

    def fetched(url, to, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix)); torch.save(alexnet_state(), to)
    monkeypatch.setattr("torch.hub.download_url_to_file", fetched)
    load_lpips(); load_lpips()
    assert asked == [(metrics.ALEXNET, "7be5be79")]


def test_the_address_is_torchvisions(package):
    import torchvision
    assert torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url == metrics.ALEXNET
