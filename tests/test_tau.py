"TAU: the gating unit, the block, the predictor, its checkpoints and its metrics, with every fault that users of the published code meet."
import zipfile
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.relearn.divergence import diff_divergence, prediction_loss
from timet_nb.relearn.metrics import frame_metrics, mse, openstl_metrics, psnr, ssim
from timet_nb.relearn.release import PRESETS, bare_state, count_weights, create_simvp, load_simvp, save_simvp, tell_config
from timet_nb.relearn.simvp import Simvp, SimvpConfig, chunks, roll_out
from timet_nb.relearn.tau import DropPath, GatingUnit, GstaUnit, TauBlock, TemporalAttention, drop_rates, kernel_sizes, squeeze_width

TINY = SimvpConfig(4, 1, (16, 16), 4, 16, 2, 2, mlp_ratio=2)


def plain_block(b, x):
    "The block as it is published: separate passes, usual layout, a pooling layer."
    def unit(g, u):
        gate = g.fc(F.adaptive_avg_pool2d(u, 1).view(u.shape[:2]))[..., None, None]
        return gate * g.conv1(g.conv_spatial(g.conv0(u))) * u.clone()

    def attend(a, x): return a.proj_2(unit(a.spatial_gating_unit, F.gelu(a.proj_1(x)))) + x.clone()
    s1, s2 = (s[:, None, None] for s in (b.layer_scale_1, b.layer_scale_2))
    x = x + s1 * attend(b.attn, b.norm1(x))
    return x + s2 * b.mlp(b.norm2(x))


@pytest.mark.parametrize("kernel, dilation, sides", [(21, 3, (5, 7)), (9, 3, (5, 3)), (31, 3, (5, 9)), (15, 2, (3, 7)), (5, 1, (1, 5)), (3, 3, (5, 1))])
def test_kernel_sides(kernel, dilation, sides):
    assert kernel_sizes(kernel, dilation) == sides
    assert GatingUnit(8, kernel, dilation)(torch.rand(1, 8, 6, 7)).shape == (1, 8, 6, 7)


@pytest.mark.parametrize("kernel, dilation", [(2, 3), (0, 1), (21, 0)])
def test_impossible_kernels(kernel, dilation):
    with pytest.raises(ConfigError, match="at least as large"): kernel_sizes(kernel, dilation)


def test_squeeze_width():
    assert [squeeze_width(d) for d in (4, 7, 24, 63, 64, 80, 2048)] == [1, 1, 6, 15, 16, 16, 16]
    assert squeeze_width(640, 16) == 40
    for d in (1, 2, 3):
        with pytest.raises(ConfigError, match="0 hidden units"): GatingUnit(d)


def test_halves():
    u = torch.rand(2, 8, 9, 7)
    both = GatingUnit(8)
    one, other = GatingUnit(8, halves="statical"), GatingUnit(8, halves="dynamical")
    for g in (one, other): g.load_state_dict({k: v for k, v in both.state_dict().items() if k in g.state_dict()})
    assert torch.allclose(both(u), one(u) * other(u) / u, atol=1e-6)
    with pytest.raises(ConfigError, match="statical"): GatingUnit(8, halves="none")


def test_the_statical_half_sees_23_pixels_and_gsta_no_more():
    torch.manual_seed(0)        # the squeeze has few units behind a ReLU: with other weights all may be silent
    for unit, columns in ((GatingUnit(8, halves="statical"), 23), (GstaUnit(8), 23), (GatingUnit(8), 41)):
        u = torch.rand(1, 8, 41, 41, requires_grad=True)
        unit(u)[..., 20, 20].sum().backward()
        assert int((u.grad.abs().sum((0, 1, 2)) > 0).sum()) == columns


@pytest.mark.parametrize("size", [(5, 7), (12, 12), (16, 24)])       # below and above the change of layout
@pytest.mark.parametrize("train", [False, True])
def test_block_equals_the_published_form(size, train):
    torch.manual_seed(0)
    b = TauBlock(16, mlp_ratio=3, scale=.7).train(train)
    x = torch.randn(3, 16, *size)
    for y in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        with torch.no_grad(): assert torch.allclose(b(y), plain_block(b, x), atol=2e-5)


def test_gradients_equal_the_published_form():
    torch.manual_seed(0)
    b, w = TauBlock(16, mlp_ratio=2, scale=.5), torch.randn(2, 16, 14, 13)
    x, grads = torch.randn(2, 16, 14, 13), []
    for f in (b, lambda x: plain_block(b, x)):
        b.zero_grad(); (f(x) * w).sum().backward()
        grads.append([p.grad.clone() for p in b.parameters()])
    for g, h in zip(*grads): assert torch.allclose(g, h, atol=1e-3 * (1 + float(h.abs().max())))


def test_scale_zero_is_the_identity_and_wakes_up():
    b, x = TauBlock(8, scale=0, mlp_ratio=2), torch.randn(2, 8, 6, 6)
    assert torch.equal(b(x), x)
    (b(x) * torch.randn_like(x)).sum().backward()
    assert b.layer_scale_1.grad.abs().sum() > 0 and b.attn.proj_2.weight.grad.abs().sum() == 0


def test_block_names_the_clip_length():
    b = TauBlock(40, frames=10, mlp_ratio=1)
    with pytest.raises(DataError, match="24 = 6 frames x 4"): b(torch.rand(1, 24, 8, 8))
    with pytest.raises(DataError, match="flatten"): b(torch.rand(1, 10, 4, 8, 8))


def test_drop_path():
    for p in (-.1, 1., 2):
        with pytest.raises(ConfigError): DropPath(p)
    torch.manual_seed(0)
    y = DropPath(.5).train()(torch.ones(1000, 2, 3))
    assert set(y.unique().tolist()) == {0., 2.} and abs(float(y.mean()) - 1) < .1
    assert (y.flatten(1).std(1) == 0).all()                        # whole samples
    assert drop_rates(1, .3) == [.3] and drop_rates(3, .1) == pytest.approx([.01, .055, .1])
    assert drop_rates(4, 0.) == [0] * 4 and drop_rates(2, 0., True) == [.01, 0]


def test_stochastic_depth_in_the_block_keeps_untouched_samples():
    torch.manual_seed(0)
    b, x = TauBlock(8, drop_path=.9, mlp_ratio=2, scale=1.).train(), torch.randn(64, 8, 5, 5)
    same = (b(x) == x).flatten(1).all(1)
    assert 30 < int(same.sum()) < 64
    assert not torch.equal(b.eval()(x), x)


@pytest.mark.parametrize("wrong, words", [
    (dict(n_s=3), "even"), (dict(n_s=0), "even"), (dict(n_s=1), "even"), (dict(hid_s=5), "2 groups"), (dict(n_t=1), "2 or more"), (dict(frames=0), "1 or more"),
    (dict(mlp_ratio=.5), "1 or more"), (dict(unit="gsta", halves="dynamical"), "both")])
def test_sizes_that_cannot_work(wrong, words):
    with pytest.raises(ConfigError, match=words): replace(TINY, **wrong)
    with pytest.raises(ConfigError, match=words): SimvpConfig(**wrong)


def test_unknown_unit():
    with pytest.raises(ConfigError, match="tau, gsta"): TemporalAttention(8, unit="incep")
    with pytest.raises(ConfigError, match="moving-mnist"): create_simvp("movingmnist")


@pytest.mark.parametrize("shape, words", [((2, 3, 1, 16, 16), "3 frames"), ((2, 5, 1, 16, 16), "last ones"), ((2, 4, 3, 16, 16), "3 channels"),
                                          ((2, 4, 1, 15, 16), "sides that 2"), ((4, 1, 16, 16), "B, T, C")])
def test_clips_that_do_not_fit(shape, words):
    with pytest.raises(DataError, match=words): Simvp(TINY)(torch.rand(shape))


@pytest.mark.parametrize("n_s", [2, 4])
@pytest.mark.parametrize("size", [(18, 18), (17, 21), (16, 24)])
def test_padding_gives_a_defined_answer(n_s, size):
    config = replace(TINY, n_s=n_s, pad=True)
    model, x = create_simvp(config).eval(), torch.rand(2, 4, 1, *size)
    s = config.stride
    with torch.no_grad():
        y = model(x)
        assert y.shape == x.shape
        edge = F.pad(x.flatten(0, 1), (0, -size[1] % s, 0, -size[0] % s), mode="replicate").unflatten(0, (2, 4))
        assert torch.allclose(y, model(edge)[..., :size[0], :size[1]], atol=1e-5)


def test_forward_leaves_its_input_alone():
    model, x = create_simvp(TINY).eval(), torch.rand(2, 4, 1, 16, 16)
    before = x.clone()
    with torch.no_grad(): a, b = model(x), model(x.transpose(3, 4).contiguous().transpose(3, 4))
    assert torch.equal(x, before) and torch.allclose(a, b, atol=1e-5)


def test_roll_out():
    model, x = create_simvp(TINY).eval(), torch.rand(2, 4, 1, 16, 16)
    with torch.no_grad():
        first = model(x)
        assert torch.equal(roll_out(model, x, 2), first[:, :2])
        ten = roll_out(model, x, 10)
        assert torch.allclose(ten, torch.cat([first, model(first), model(model(first))], 1)[:, :10])
        assert [c.shape[1] for c in chunks(model, x, 9)] == [4, 4, 1] and not list(chunks(model, x, 0))
    with pytest.raises(ConfigError): roll_out(model, x, 0)


def test_presets_have_the_published_number_of_weights():
    published = {"moving-mnist": 44_656_001, "taxibj": 9.545e6, "kth": 14.955e6, "caltech": 14.956e6, "human": 37.65e6, "weather": 12.22e6}
    assert len(PRESETS) == 8
    for name, p in PRESETS.items():
        assert count_weights(p.config) == p.params
        assert abs(p.params - published.get(name, p.params)) < 5001
    assert count_weights(PRESETS["moving-mnist"].config) == 44_656_001


@pytest.mark.parametrize("changes", [{}, dict(unit="gsta"), dict(kernel=9), dict(n_s=4, n_t=3), dict(hid_t=24), dict(halves="statical"), dict(channels=3, frames=7)])
def test_sizes_are_read_off_the_weights(changes):
    config = replace(TINY, **changes)
    told = tell_config(create_simvp(config).state_dict())
    assert replace(told, size=config.size) == config


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 1, "optimizer": {}, "state_dict": s}, lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
                                  lambda s: {f"module.{k}": v for k, v in s.items()}, lambda s: {"state_dict": {f"method.model.{k}": v for k, v in s.items()}}])
def test_every_wrapping_loads(tmp_path, wrap):
    model = create_simvp(TINY, 3).eval()
    torch.save(wrap(model.state_dict()), tmp_path / "x.pth")
    x = torch.rand(1, 4, 1, 16, 16)
    with torch.no_grad(): assert torch.equal(load_simvp(tmp_path / "x.pth")(x), model(x))


def test_checkpoints_that_are_refused(tmp_path):
    state = create_simvp(TINY).state_dict()
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="T is baked"): load_simvp(tmp_path / "x.pth", frames=10)
    assert load_simvp(tmp_path / "x.pth", frames=4).config.frames == 4
    with pytest.raises(CheckpointError, match="fc2.bias"): load_simvp({k: v for k, v in state.items() if "enc.1.block.mlp.fc2.bias" not in k})
    with pytest.raises(CheckpointError, match="no such file"): load_simvp(tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="head.w"): bare_state({"state_dict": {"head.w": torch.ones(2)}})
    with pytest.raises(CheckpointError, match="spatial_gating_unit"): tell_config({k: v for k, v in state.items() if "conv_spatial" not in k})
    bad = {**state, "dec.readout.bias": torch.full((1,), float("nan"))}
    with pytest.raises(CheckpointError): load_simvp(bad)
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as z: z.writestr("a", "b")
    with pytest.raises(CheckpointError): load_simvp(tmp_path / "z.pth")


def test_own_files_keep_everything(tmp_path):
    config = replace(TINY, halves="dynamical", drop_path=.2, pad=True, size=(24, 32))
    model = create_simvp(config, 1)
    save_simvp(model, tmp_path / "m.safetensors", epochs=2)
    back = load_simvp(tmp_path / "m.safetensors")
    assert back.config == config and not back.training
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_seed_gives_the_same_weights_and_leaves_the_generator_alone():
    torch.manual_seed(5); a = torch.rand(3)
    torch.manual_seed(5); one, two, b = create_simvp(TINY, 1), create_simvp(TINY, 1), torch.rand(3)
    assert torch.equal(a, b) and all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.enc.enc[0].conv.conv.weight, create_simvp(TINY, 2).enc.enc[0].conv.conv.weight)


def test_divergence_properties():
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 5, 2, 6, 6)
    each = diff_divergence(a, b, reduction="none")
    assert (each > 0).all() and torch.allclose(diff_divergence(a, b), each.mean())
    assert torch.allclose(diff_divergence(a, b, reduction="mean") * 4 * 72, each.mean(), rtol=1e-4)
    assert abs(float(diff_divergence(a, a))) < 1e-5
    assert torch.allclose(diff_divergence(a, b), diff_divergence(a + torch.rand(3, 1, 2, 6, 6), b), rtol=1e-3)
    assert torch.allclose(diff_divergence(a, b, .5, form="eps"), diff_divergence(a, b, .5), rtol=1e-4)
    assert diff_divergence(a[:, :2], b[:, :2]) == 0 and diff_divergence(a[:, :2], b[:, :2], reduction="none").shape == (3,)


def test_divergence_survives_sharp_differences():
    torch.manual_seed(0)
    a, b = torch.rand(2, 1, 4, 1, 8, 8)
    pull = {}
    for scale in (10, 1000):
        for form in ("log_softmax", "eps"):
            x = (scale * a).requires_grad_()
            loss = diff_divergence(x, scale * b, form=form)
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
            pull[scale, form] = float(x.grad.norm())
    assert pull[10, "log_softmax"] > pull[10, "eps"]


@pytest.mark.parametrize("k, words", [(dict(tau=0), "above 0"), (dict(reduction="avg"), "sum, mean"), (dict(form="exact"), "log_softmax")])
def test_divergence_faults(k, words):
    x = torch.rand(1, 4, 1, 4, 4)
    with pytest.raises(ConfigError, match=words): diff_divergence(x, x, **k)
    with pytest.raises(DataError, match="one shape"): diff_divergence(x, x[:, :3])


def test_loss_without_regulariser():
    x, y = torch.rand(2, 1, 4, 1, 4, 4)
    assert set(prediction_loss(x, y, 0)) == {"loss", "mse"}
    parts = prediction_loss(x, y, .3)
    assert torch.allclose(parts["loss"], parts["mse"] + .3 * parts["reg"])


def test_metrics():
    x, y = torch.rand(2, 2, 3, 2, 10, 9)
    assert mse(x, y, "frame") == pytest.approx(mse(x, y) * 180)
    assert openstl_metrics(x, y, True)["mse"] == pytest.approx(frame_metrics(x, y)["mse"])
    assert psnr(x, x) == float("inf") and ssim(x, x) == pytest.approx(1)
    assert psnr(x, y) >= psnr(x, y, per="all") and ssim(x, y, 2.) > ssim(x, y, 1.)
    assert psnr(x * 255, y * 255, peak=255.) == pytest.approx(psnr(x, y), abs=1e-4)
    skimage = pytest.importorskip("skimage.metrics")
    want = [skimage.structural_similarity(a.double().numpy(), b.double().numpy(), channel_axis=0, data_range=1., win_size=7) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1))]
    assert ssim(x, y) == pytest.approx(sum(want) / len(want), abs=1e-7)
    for f in (mse, psnr, ssim):
        with pytest.raises(DataError, match="one shape"): f(x, y[:1])
    with pytest.raises(DataError, match="sides of 7"): ssim(x[..., :6], y[..., :6])


def test_a_model_can_be_trained_with_frozen_parts():
    model = create_simvp(TINY)
    for p in model.enc.parameters(): p.requires_grad_(False)
    loss = prediction_loss(model(torch.rand(2, 4, 1, 16, 16)), torch.rand(2, 4, 1, 16, 16))["loss"]
    loss.backward()
    assert model.enc.enc[0].conv.conv.weight.grad is None and model.dec.readout.weight.grad is not None
    assert isinstance(model.hid.enc[0].block.norm1, nn.BatchNorm2d)
