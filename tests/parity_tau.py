"Parity checks against golden/tau: gating unit, attention, block, predictor, roll-out, six training steps, regulariser, metrics."
import copy

import numpy as np
import torch

from tests.parity import Arrays, Measured, covers
from timet_nb.relearn.divergence import diff_divergence, prediction_loss
from timet_nb.relearn.metrics import openstl_metrics, ssim
from timet_nb.relearn.release import load_simvp
from timet_nb.relearn.simvp import roll_out
from timet_nb.relearn.tau import GatingUnit, TauBlock, TemporalAttention

TOL, GRAD = 1e-5, 1e-3


def tensor(x): return torch.from_numpy(np.array(x))


def state_of(z): return {n.removeprefix("sd/"): tensor(z[n]) for n in z if n.startswith("sd/")}


def close(golden, tol=TOL):
    "An absolute tolerance that fits values of this size."
    return tol * (1 + float(np.abs(golden).max()))


def derived(golden, ours):
    "The error against an array that was computed from a formula or by another library."
    return Measured(float(np.abs(np.asarray(golden, np.float64) - np.asarray(ours, np.float64)).max()), "derived, not the authors' code")


def filled(model, z):
    model.load_state_dict(state_of(z))
    return model.eval()


@covers("tau/temporal_attention_module_*")
def unit(z):
    "The gating unit: its three convolutions, its squeeze (the shipped width), its product and gradient."
    u = filled(GatingUnit(z.scalar("cfg/dim"), z.scalar("cfg/kernel_size"), z.scalar("cfg/dilation")), z)
    assert u.fc[0].out_features == z.scalar("cfg/se_hidden")
    x = tensor(z["in/x"]).requires_grad_()
    mid = u.conv0(x)
    yield "mid/conv0", mid, close(z["mid/conv0"])
    yield "mid/conv_spatial", u.conv_spatial(mid), close(z["mid/conv_spatial"])
    yield "mid/statical", u.statical(x), close(z["mid/statical"])
    yield "mid/dynamical", u.dynamical(x), close(z["mid/dynamical"])
    y = u(x)
    yield "out/y", y, close(z["out/y"])
    yield "grad/x", torch.autograd.grad(y.square().sum(), x)[0], close(z["grad/x"], GRAD / 10)


@covers("tau/temporal_attention")
def attention(z):
    "The attention, with and without its own shortcut."
    for name, shortcut in (("out/y", True), ("out/y_no_shortcut", False)):
        a = filled(TemporalAttention(z.scalar("cfg/dim"), z.scalar("cfg/kernel_size"), shortcut=shortcut), z)
        yield name, lambda a=a: quiet(a, z["in/x"]), close(z[name])


@torch.no_grad()
def quiet(f, x): return f(tensor(x))


@covers("tau/tau_subblock", inputs="in/*")
def block(z):
    "The block: running statistics, batch statistics, what the norms note down, and all gradients."
    b = filled(TauBlock(z.scalar("cfg/dim"), z.scalar("cfg/kernel_size"), z.scalar("cfg/mlp_ratio")), z)
    yield "out/eval", quiet(b, z["in/x"]), close(z["out/eval"])
    x = tensor(z["in/x"]).requires_grad_()
    y = b.train()(x)
    yield "out/train", y, close(z["out/train"])
    (y * tensor(z["in/w"])).sum().backward()
    yield "grad_in/x", x.grad, close(z["grad_in/x"], GRAD / 10)
    grads, buffers = dict(b.named_parameters()), dict(b.named_buffers())
    for n in z.like("grad/*"): yield n, grads[n.removeprefix("grad/")].grad, close(z[n], GRAD / 10)
    for n in z.like("after/*"): yield n, buffers[n.removeprefix("after/")], close(z[n])


def predictor(z):
    "A predictor of the file's sizes; every size is read off the weights, and must agree with the settings."
    model = load_simvp(state_of(z))
    c = model.config
    told = (c.frames, c.channels, c.hid_s, c.hid_t, c.n_s, c.n_t, c.mlp_ratio, c.unit)
    T, C = z["cfg/in_shape"].tolist()[:2]
    want = (T, C, *(z.scalar(f"cfg/{n}") for n in ("hid_S", "hid_T", "N_S", "N_T", "mlp_ratio")), "tau")
    assert told == want, f"read off the weights: {told}, settings: {want}"
    return model


@covers("tau/simvp_tau_*")
@torch.no_grad()
def whole(z):
    "Encoder, translator and decoder, loaded by the published names."
    model, x = predictor(z), tensor(z["in/x"])
    cells, skip = model.enc(x.flatten(0, 1))
    yield "mid/embed", cells, close(z["mid/embed"])
    yield "mid/skip", skip, close(z["mid/skip"])
    yield "mid/hid", model.hid(cells.unflatten(0, x.shape[:2])), close(z["mid/hid"])
    yield "out/y", model(x), close(z["out/y"])


def weights_of(z, name="simvp_tau_ns2"):
    "The file of the same folder that holds the weights."
    return Arrays(z.path.with_name(f"{name}.npz"))


@covers("tau/rollout_*")
@torch.no_grad()
def rolled(z):
    "Shorter: cut. Longer: fed back, and the last piece cut."
    model = predictor(weights_of(z))
    for n in z.like("out/aft_*"):
        yield n, roll_out(model, tensor(z["in/x"]), int(n.split("_")[-1])), close(z[n])


@covers("tau/train_steps_*")
def training(z):
    "Six steps of Adam on one batch, with the shipped regulariser (mean, eps) and no stochastic depth."
    model = predictor(weights_of(z)).train()
    adam, losses, first, after = torch.optim.Adam(model.parameters(), z.scalar("cfg/lr")), [], {}, {}
    for step in range(len(z["out/loss_per_step"])):
        adam.zero_grad()
        loss = prediction_loss(model(tensor(z["in/x"])), tensor(z["in/y"]), z.scalar("cfg/alpha"),
                               z.scalar("cfg/tau"), "mean", "eps")["loss"]
        loss.backward()
        if step == 0: first = {n: p.grad.norm() for n, p in model.named_parameters()}
        adam.step(); losses.append(float(loss.detach()))
        if step == 0: after = copy.deepcopy(model.state_dict())
    yield "out/loss_per_step", np.array(losses), close(z["out/loss_per_step"])
    for n in z.like("grad0_norm/*"): yield n, first[n.removeprefix("grad0_norm/")], close(z[n], GRAD / 10)
    for n in z.like("sd_after1/*"): yield n, after[n.removeprefix("sd_after1/")], close(z[n])


@covers("tau/diff_div_reg")
def regulariser(z):
    "As shipped: mean of all elements, eps in the logarithm. The printed sum is derived, not the authors' code."
    shipped = lambda a, b, tau: diff_divergence(a, b, tau, "mean", "eps", z.scalar("cfg/eps"))
    get = lambda n: tensor(z[f"in/{n}"])
    for n in z.like("out/tau_*"):
        tau = float(n.split("_")[-1])
        p = get("pred").requires_grad_()
        value = shipped(p, get("true"), tau)
        yield n, value, close(z[n])
        yield f"grad/tau_{tau}", torch.autograd.grad(value, p)[0], close(z[f"grad/tau_{tau}"], 1e-6)
    yield "out/T2", shipped(get("pred")[:, :2], get("true")[:, :2], .1), 0.
    yield "out/sharp_tau_0.1", shipped(get("pred_sharp"), get("true_sharp"), .1), close(z["out/sharp_tau_0.1"])
    yield "out/self_tau_0.1", shipped(get("true"), get("true"), .1), 1e-8
    printed = diff_divergence(get("pred").double(), get("true").double(), .1, "none")
    name = "derived/paper_sum_per_sample_tau_0.1"
    if name in z: yield name, derived(z[name], printed), 1e-6


@covers("tau/metrics")
def metrics(z):
    "OpenSTL's numbers; SSIM is derived, with both data ranges."
    a, b = tensor(z["in/pred"]), tensor(z["in/true"])
    for prefix, spatial in (("out", False), ("out_spatial_norm", True)):
        ours = openstl_metrics(a, b, spatial)
        for n in z.like(f"{prefix}/*"): yield n, ours[n.split("/")[1]], close(z[n])
    for n in z.like("derived/ssim_data_range_*"): yield n, derived(z[n], ssim(a, b, float(n.split("_")[-1]))), 1e-6
