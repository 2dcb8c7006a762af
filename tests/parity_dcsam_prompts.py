"Parity checks against golden/dcsam: cyclic attention, one branch, the whole prompt generator around a small SAM."
import json

import numpy as np
import torch
from torch import nn

from tests.parity import Measured, compare, covers
from timet_nb.dcsam.cyclic import CyclicAttention
from timet_nb.dcsam.fusion import DCSAMConfig
from timet_nb.dcsam.prior import Seen
from timet_nb.dcsam.prompts import Branch, PromptGenerator, label_vectors, mask_loss
from timet_nb.features.positions import sine_positions

TOL = 1e-5


def tensor(x): return torch.from_numpy(np.array(x))


def settings(z): return json.loads(str(z["config_json"]))


def weights(z, prefix="sd/"): return {n.removeprefix(prefix): tensor(z[n]) for n in z.like(prefix + "*")}


def quirk(z, name, ours, why, tol=TOL):
    "A comparison whose line names the authors' quirk that was switched on."
    if not why: return name, ours, tol
    line = compare(name, z[name], ours, tol)
    return name, Measured(line.error if line.error is not None else np.inf, f"{why}{'; ' + line.why if line.why else ''}"), tol


@covers("dcsam/cyc_attention_bs*", inputs="query key value mask")
def attention(z):
    "The attention alone, sequence first. Quirk: official_batch_order."
    c = settings(z)
    layer = CyclicAttention(c["hidden_dim"], c["num_heads"], official_batch_order=c["batch"] > 1)
    layer.load_state_dict(weights(z))
    query, key, value = (tensor(z[n]).transpose(0, 1) for n in ("query", "key", "value"))
    with torch.no_grad(): out, heads = layer(query, value, tensor(z["mask"]), pos=key - value, weights=True)
    why = "official_batch_order" if c["batch"] > 1 else ""
    yield quirk(z, "out", out.transpose(0, 1), why)
    yield quirk(z, "attn_heads", heads, why)
    yield quirk(z, "attn_avg", heads.mean(1), why)


def config_of(z, **changes):
    "Their sizes; quirks are switched on only where a batch or several shots let them show."
    c = settings(z)
    on = dict(official_batch_order=c["batch"] > 1, shots="last" if c["nshot"] > 1 else "joint")
    return DCSAMConfig(dim=c["hidden_dim"], heads=c["num_heads"], queries=c["num_queries"], **on, **changes)


def quirks_of(z, *more):
    "The switches of `config_of` in words, and others."
    c = settings(z)
    return ", ".join([*["official_batch_order"] * (c["batch"] > 1), *["shots='last'"] * (c["nshot"] > 1), *more])


@covers("dcsam/transformer_decoder_nshot*", inputs="x x_s support_mask query_mask")
def branch(z):
    "Both stages of one branch. Quirks: official_batch_order, shots='last'."
    net = Branch(config_of(z)).eval()
    net.load_state_dict(weights(z))
    x, n = tensor(z["x"]), settings(z)["nshot"]
    shots = tensor(z["x_s"]).unflatten(0, (-1, n))
    masks = tensor(z["support_mask"])[:, 0].unflatten(0, (-1, n))
    yield "pos", sine_positions(x.shape[1], tuple(x.shape[2:])).expand_as(x), TOL
    with torch.no_grad():
        yield quirk(z, "stage1", net.first(shots, masks), quirks_of(z))
        yield quirk(z, "stage2", net.second(tensor(z["stage1"]), x, tensor(z["query_mask"])[:, 0]), quirks_of(z))


class Toy(nn.Module):
    "The recorded stand-in for the frozen CNN; its pictures are already normalised."
    def __init__(self, state):
        super().__init__()
        def conv(name, **how):
            w = state[f"{name}.weight"]
            return nn.Conv2d(w.shape[1], w.shape[0], 3, bias=f"{name}.bias" in state, **how)
        bn = nn.BatchNorm2d(len(state["layer0.1.weight"]))
        self.layer0 = nn.Sequential(conv("layer0.0", stride=2, padding=1), bn, nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        hows = (dict(padding=1), dict(stride=2, padding=1), dict(padding=2, dilation=2), dict(padding=4, dilation=4))
        for i, how in enumerate(hows, 1): setattr(self, f"layer{i}", nn.Sequential(conv(f"layer{i}.0", **how), nn.ReLU()))
        self.load_state_dict({k: v for k, v in state.items() if k.startswith("layer")})
        self.eval()

    def look(self, x):
        second = self.layer2(self.layer1(self.layer0(x)))
        third = self.layer3(second)
        return Seen(torch.cat([second, third], 1), third, self.layer4(third))

    def masked_top(self, middle, mask): return self.layer4(middle * mask)


def generator(z):
    "Frozen eyes, our generator with the recorded weights, and the fused scene."
    state, c = weights(z, "sd/dcsam."), settings(z)
    eyes = Toy(state)
    channels = sum(c["backbone_channels"][2:4])
    net = PromptGenerator(config_of(z, channels=channels, sam_version=c["sam_version"])).eval()
    net.load_state_dict({k: v for k, v in state.items() if not k.startswith("layer")})
    def sam(who):
        if c["sam_version"] == 1: return tensor(z[f"{who}_sam"])
        return tuple(tensor(z[f"{who}_{n}"]) for n in ("image_embed", "hr0", "hr1"))
    masks = tensor(z["support_mask"]).unflatten(0, (-1, c["nshot"]))
    look = lambda who: eyes.look(tensor(z[f"{who}_img"]))
    return net, net.read(eyes, look("query"), look("support"), masks, sam("query"), sam("support"))


def first_stage(z, net, scene):
    yield "prior_pos", scene.prior, TOL
    yield "prior_neg", scene.neg_prior, TOL
    yield "prototype", scene.prototype[..., None, None], TOL
    yield "query_feat_1", scene.query, TOL
    yield "supp_feat_1", scene.support.flatten(0, 1), TOL
    prompts = net.first(scene)
    yield quirk(z, "stage1_pos", prompts.positive, quirks_of(z))
    yield quirk(z, "stage1_neg", prompts.negative, quirks_of(z))


@covers("dcsam/dcsam_full_v2", inputs="*_img support_mask *_image_embed *_hr0 *_hr1 pre_mask")
def full_v2(z):
    "With SAM 2's features. Quirks: official_batch_order, neg_memory='support'."
    with torch.no_grad():
        net, scene = generator(z)
        yield from first_stage(z, net, scene)
        second = net.second(net.first(scene), scene, tensor(z["pre_mask"]))
        yield quirk(z, "stage2_pos", second.positive, quirks_of(z))
        yield quirk(z, "stage2_neg", second.negative, quirks_of(z, "neg_memory='support'"))


def small_sam(z):
    "Prompt encoder and mask decoder of SAM 1 with the recorded weights; sizes are read off them."
    from timet_nb.sam.prompt_decoder import MaskDecoder
    from timet_nb.sam.prompt_encoder import PromptEncoder
    c, state = settings(z), weights(z, "sd/sam.")
    part = lambda p: {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)}
    enc, dec = part("prompt_encoder."), part("mask_decoder.")
    dim, feat = c["hidden_dim"], c["feat"]
    blocks = {k.split(".")[2] for k in dec if k.startswith("transformer.layers.")}
    narrow = dec["transformer.layers.0.mlp.lin1.weight"].shape[0]
    heads = [k for k in dec if k.startswith("iou_prediction_head.") and k.endswith("weight")]
    encoder = PromptEncoder(dim, (feat, feat), (16 * feat, 16 * feat), enc["mask_downscaling.3.weight"].shape[0])
    decoder = MaskDecoder(dim, len(blocks), c["num_heads"], narrow, len(dec["mask_tokens.weight"]) - 1, len(heads), dec[heads[0]].shape[0])
    for module, tensors in ((encoder, enc), (decoder, dec)): module.load_state_dict(tensors)
    return encoder.eval(), decoder.eval()


@covers("dcsam/dcsam_full_v1", inputs="*_img support_mask *_sam gt")
def full_v1(z):
    "Two stages around SAM 1. Quirks: official_batch_order, neg_memory='support', labelled_stage2 (the default with SAM 1)."
    with torch.no_grad():
        net, scene = generator(z)
        yield from first_stage(z, net, scene)
        encoder, decoder = small_sam(z)
        seen, image = [], tensor(z["query_sam"])
        def decode(prompts):
            sparse, dense = encoder(tokens=prompts.tokens)
            if len(dense) != len(sparse): dense = dense.expand(len(sparse), -1, -1, -1)
            out = decoder(image, encoder.dense_pe(), sparse, dense)
            seen.append((sparse, out))
            return out.masks
        asked = net(scene, decode, label_vectors(encoder), size=z["query_img"].shape[2:])
    marked = asked.first.labelled(label_vectors(encoder))
    yield "protos_after_sam_pos", marked.positive, TOL
    yield "protos_after_sam_neg", marked.negative, TOL
    for i, logits in enumerate((asked.coarse, asked.logits), 1):
        sparse, out = seen[i - 1]
        why = quirks_of(z, *["labelled_stage2", "neg_memory='support'"][:2 * i - 2])
        for name, ours in (("sparse", sparse), ("low_res", out.masks), ("iou", out.iou), ("logits", logits)):
            yield quirk(z, f"{name}_{i}", ours, why)
    yield "pre_mask", (asked.coarse > 0)[:, 0].long(), 0
    yield quirk(z, "stage2_pos", asked.second.positive, quirks_of(z, "labelled_stage2"))
    yield quirk(z, "stage2_neg", asked.second.negative, quirks_of(z, "labelled_stage2", "neg_memory='support'"))
    loss = mask_loss(asked.logits[:, 0], tensor(z["gt"]))
    yield "loss", loss.total, TOL
    yield "loss_bce", loss.bce, TOL
    yield "loss_dice", loss.dice, TOL
