"""Parity checks against golden/stcr: pseudo mask, losses with gradients, Dice and IoU, TAU on stacked frames, GiraffeDet's graph and neck.

STCR was published without code: the files named *_derived were computed from the printed equations, and their lines say so.
The graph and the neck are GiraffeDet's, the TAU block is OpenSTL's: authors' code, compared as everywhere."""
import numpy as np
import torch

from tests.parity import Measured, covers
from tests.parity_tau import close, filled, tensor
from timet_nb.evaluate.overlap import contingency, dice, region_j
from timet_nb.relearn.giraffe import GiraffeNeck, giraffe_graph
from timet_nb.relearn.losses import ConsistencyConfig, consistency, feature_loss, prediction_loss, temporal_loss
from timet_nb.relearn.prior import cosine_maps, enlarge, min_max
from timet_nb.relearn.tau import TauBlock

READINGS = dict(same_location="same", max_over_support="max", mean_over_support="mean", gap_prototype="prototype")
TIGHT = 1e-9      # relative; both sides compute in float64


def derived(golden, ours):
    "The error against an array computed from a printed equation, and a tolerance that fits its size."
    golden, ours = np.asarray(golden, np.float64), np.asarray(ours, np.float64)
    if golden.shape != ours.shape: raise ValueError(f"shape {ours.shape}, golden {golden.shape}")
    return Measured(float(np.abs(golden - ours).max()), "derived, not the authors' code"), close(golden, TIGHT)


@covers("stcr/pseudo_mask_derived")
def pseudo(z):
    "Four readings of one equation: cosines, each map stretched, the mean of shots stretched, and enlarged."
    q, s = tensor(z["in/query_feat"]).double(), tensor(z["in/support_feat"]).double()
    eps, clamp = z.scalar("cfg/minmax_eps"), z.scalar("cfg/norm_clamp")
    raw = {n: cosine_maps(q, s, how, clamp) for n, how in READINGS.items()}
    mm = {n: min_max(x, eps) for n, x in raw.items()}
    for n in READINGS:
        yield f"raw/{n}", *derived(z[f"raw/{n}"], raw[n])
        yield f"mm/{n}", *derived(z[f"mm/{n}"], mm[n])
    for n in z.like("shotmean_then_mm/*"):
        yield n, *derived(z[n], min_max(raw[n.split("/")[1]].mean(1), eps))
    for n in z.like("up2/*"):
        name = n.split("/")[1].removesuffix("_bilinear_ac_false")
        yield n, *derived(z[n], enlarge(mm[name], tuple(2 * v for v in mm[name].shape[-2:])))


@covers("stcr/losses_derived")
def losses(z):
    "The three losses with all their divisors, the gradient of the first, and a weighted sum."
    f, zz, zh, y, yh = (tensor(z[f"in/{n}"]).double() for n in ("f", "z", "z_hat", "y", "y_hat"))
    for divisor, name in (("paper", "printed"), ("pairs", "pairs")):
        for axis in ("pixel", "whole"):
            x = f.clone().requires_grad_()
            value = temporal_loss(x, axis, divisor)
            yield f"out/Lt_{name}_{axis}", *derived(z[f"out/Lt_{name}_{axis}"], value.detach())
            grad = torch.autograd.grad(value, x)[0]
            yield f"grad/Lt_{name}_{axis}", *derived(z[f"grad/Lt_{name}_{axis}"], grad)
    yield "out/Lt_printed_identical_frames", *derived(z["out/Lt_printed_identical_frames"], temporal_loss(f[:1].expand_as(f)))
    for name, divisor in (("Lf_D_is_numel", "elements"), ("Lf_D_is_channels", "channels"), ("Lf_sum", "sum")):
        yield f"out/{name}", *derived(z[f"out/{name}"], feature_loss(zh, zz, divisor))
    for name, divisor in (("Lp_printed_sum_per_frame", "frames"), ("Lp_mean", "elements")):
        yield f"out/{name}", *derived(z[f"out/{name}"], prediction_loss(yh, y, divisor))
    total = consistency(ConsistencyConfig(*z["cfg/lambda"].tolist()), f, zh, zz, yh, y)["loss"]
    yield "out/total_printed_pixel_meanF_meanP", *derived(z["out/total_printed_pixel_meanF_meanP"], total)


@covers("stcr/dice_iou_derived")
def scores(z):
    "Dice and IoU a frame and over all pixels; two empty masks are left undefined by the file (ours: 1)."
    pred, true = tensor(z["in/pred"]).bool(), tensor(z["in/true"]).bool()
    pair = [contingency(t.long(), p.long(), 2, 2) for t, p in zip(true, pred)]
    table = torch.stack(pair)                                              # (frames, truth, answer)
    inter, both = table[:, 1, 1], table[:, 1].sum(1) + table[:, :, 1].sum(1)
    for n, ours in (("inter", inter), ("union", both - inter), ("sum", both)):
        yield f"out/{n}", derived(z[f"out/{n}"], ours)[0], 0.
    yield "out/dice_first3", *derived(z["out/dice_first3"], dice(true, pred)[:3])
    yield "out/iou_first3", *derived(z["out/iou_first3"], region_j(true, pred)[:3])
    flat = [x.reshape(1, -1, x.shape[-1]) for x in (true, pred)]           # one tall picture
    yield "out/dice_pooled", *derived(z["out/dice_pooled"], dice(*flat)[0])
    yield "out/iou_pooled", *derived(z["out/iou_pooled"], region_j(*flat)[0])


@covers("stcr/tau_on_frames")
@torch.no_grad()
def stacked(z):
    "Frames stacked into channels, one official TAU block, and unstacked."
    f = tensor(z["in/f"])
    block = filled(TauBlock(f.shape[0] * f.shape[1], z.scalar("cfg/kernel_size"), z.scalar("cfg/mlp_ratio"), frames=len(f)), z)
    yield "out/f", block(f.flatten(0, 1)[None])[0].view_as(f), close(z["out/f"])


def table_of(nodes, low, width):
    "Nodes as rows: id, stride, is output, inputs, -1."
    rows = [[n.id, 2 ** low * n.stride, int(n.output), *n.inputs] for n in nodes]
    return np.array([r + [-1] * (width - len(r)) for r in rows])


@covers("stcr/giraffe_graph")
def graph(z):
    "Every node table of the file; levels and layers stand in the name."
    for n in z.like("nodes/*"):
        low, high, layers = (int(p.lstrip("mindepthax")) for p in n.split("/")[1].split("_"))
        yield n, table_of(giraffe_graph(high - low + 1, layers), low, z[n].shape[1])


@covers("stcr/giraffe_neck")
@torch.no_grad()
def neck(z):
    "The neck, loaded by the official names."
    made = GiraffeNeck(tuple(z["cfg/channels"].tolist()), tuple(z["cfg/out_channels"].tolist()), z.scalar("cfg/neck_depth"), eps=z.scalar("cfg/bn_eps")).eval()
    made.load({n.removeprefix("sd/"): tensor(z[n]) for n in z.like("sd/*")})
    for n, y in zip(z.like("out/*"), made([tensor(z[n]) for n in z.like("in/*")]), strict=True): yield n, y, close(z[n])
