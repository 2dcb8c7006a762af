"Dense CNNs: their sizes, the names of the files that fill them, the last layer on masked features, files that do not fit."
import pytest
import torch

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.features.checkpoints import save_state
from timet_nb.features.cnn_dense import DENSE_CNNS, create_dense_cnn, dense_cnn_state

STEM = dict(zip("013467", ("conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1")))
PSP = dict(zip(("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"), STEM.values()))
CUTS = (0, 7, 14, 24, 34)


def swap(name, table):
    for theirs, ours in table.items():
        if name.startswith(ours + "."): return theirs + name[len(ours):]
    return name


def in_dcsam(name, kind):
    if kind != "vgg16_bn": return swap(name, {f"layer0.{k}": v for k, v in STEM.items()})
    index, rest = name.split(".", 1)
    layer = max(i for i, cut in enumerate(CUTS) if cut <= int(index))
    return f"layer{layer}.{int(index) - CUTS[layer]}.{rest}"


@pytest.fixture(scope="module")
def nets(): return {n: create_dense_cnn(n, seed=1) for n in DENSE_CNNS}


@pytest.mark.parametrize("kind, weights", [("resnet50", 23_631_808), ("resnet101", 42_623_936), ("vgg16_bn", 14_723_136)])
def test_sizes(nets, kind, weights):
    net, (channels, top, stride) = nets[kind], DENSE_CNNS[kind]
    assert sum(p.numel() for p in net.parameters()) == weights
    with torch.no_grad(): seen = net.look(torch.rand(2, 3, 64, 96))
    grid = (64 // stride, 96 // stride)
    assert seen.fused.shape == (2, channels, *grid) and seen.top.shape == (2, top, *grid)
    assert (net.dim, net.top_dim, net.patch) == (channels, top, stride)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("kind", ["resnet50", "vgg16_bn"])
@pytest.mark.parametrize("layout", ["dcsam", "segmentation", "timm"])
def test_every_known_layout_fills_every_tensor(nets, kind, layout):
    state = {n: torch.randn(x.shape) if x.is_floating_point() else x + 3 for n, x in nets[kind].cnn.state_dict().items()}
    theirs = {"dcsam": lambda n: "module." + in_dcsam(n, kind), "timm": lambda n: n,
              "segmentation": lambda n: f"features.{n}" if kind == "vgg16_bn" else swap(n, PSP)}[layout]
    other = create_dense_cnn(kind, {theirs(n): x for n, x in state.items()})
    for n, x in other.cnn.state_dict().items(): assert torch.equal(x, state[n]), n


def test_a_file_fills_it_too(nets, tmp_path):
    state = nets["vgg16_bn"].cnn.state_dict()
    path = save_state(tmp_path / "vgg.safetensors", {in_dcsam(n, "vgg16_bn"): x for n, x in state.items()})
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad(): a, b = (m.look(image).top for m in (nets["vgg16_bn"], create_dense_cnn("vgg16_bn", path, seed=2)))
    assert torch.equal(a, b)


def test_the_classifier_is_left_out():
    one = torch.zeros(1)
    assert dense_cnn_state({"fc.weight": one, "layer1.0.conv1.weight": one}, "resnet50").keys() == {"layer1.0.conv1.weight"}
    assert dense_cnn_state({"classifier.0.weight": one, "features.0.weight": one}, "vgg16_bn").keys() == {"0.weight"}


@pytest.mark.parametrize("kind", ["resnet50", "vgg16_bn"])
def test_the_last_layer_again(nets, kind):
    net = nets[kind]
    with torch.no_grad():
        seen = net.look(torch.rand(1, 3, 96, 96))
        ones = torch.ones_like(seen.middle[:, :1])
        assert torch.allclose(net.masked_top(seen.middle, ones), seen.top, atol=1e-5)
        half = ones.clone(); half[..., : ones.shape[3] // 2] = 0
        assert not torch.allclose(net.masked_top(seen.middle, half), seen.top, atol=1e-3)


def test_faults(nets):
    net = nets["resnet50"]
    with pytest.raises(CheckpointError, match="deep stem"): net.load({"conv1.weight": torch.zeros(64, 3, 7, 7)})
    before = net.cnn.state_dict()["bn1.weight"].clone()
    with pytest.raises(CheckpointError, match="Nothing was loaded"): net.load({"layer0.7.weight": before + 1})
    assert torch.equal(net.cnn.state_dict()["bn1.weight"], before)
    with pytest.raises(CheckpointError): net.load({"layer0.7.weight": torch.zeros(5)})
    with pytest.raises(ConfigError, match="resnet18"): create_dense_cnn("resnet18")
    with pytest.raises(DataError, match="61"): net.look(torch.rand(1, 3, 61, 64))
    with pytest.raises(DataError, match="255"): net.look(torch.rand(1, 3, 64, 64) * 255)
    with pytest.raises(CheckpointError, match="no such file"): create_dense_cnn("resnet50", "nowhere.pth")
