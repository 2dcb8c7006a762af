"Parity checks of SAM 2 against golden/dcsam: encoder, memory attention, memory encoder, tracking, and the fork of DC-SAM."
import json

import numpy as np
import torch

from tests.parity import covers
from timet_nb.features.positions import sine_positions
from timet_nb.sam.memory import Session
from timet_nb.sam.memory_attention import MemoryAttention
from timet_nb.sam.memory_encoder import MemoryEncoder
from timet_nb.sam.neck import FpnNeck, Sam2ImageEncoder, TrunkConfig, create_trunk, trunk_to_timm
from timet_nb.sam.release import fill_sam2
from timet_nb.sam.sam2 import Sam2, Sam2Config
from timet_nb.sam.segment import SamConfig, SamView, create_sam

TOL = 2e-5


def tensor(x): return torch.from_numpy(np.array(x))


def weights(z, prefix=""):
    return {n.removeprefix("sd/" + prefix): tensor(z[n]) for n in z if n.startswith("sd/" + prefix)}


def sizes(z): return json.loads(str(z["config_json"]))


def encoder(c):
    "The recorded trunk and neck, empty."
    t = TrunkConfig(c["hiera_embed_dim"], c["hiera_heads"], tuple(c["hiera_stages"]), tuple(c["global_att_blocks"]),
                    tuple(c["window_pos_embed_bkg"]), tuple(c["window_spec"]))
    return Sam2ImageEncoder(create_trunk(t), FpnNeck(t.widths, c["d_model"]))


@covers("dcsam/sam2_image_encoder", inputs="x")
@torch.no_grad()
def image_encoder(z):
    "timm's trunk under the renamed official weights, our neck, and the positions."
    model = encoder(sizes(z)).eval()
    model.load_state_dict(trunk_to_timm(weights(z, "image_encoder.")))
    x = tensor(z["x"])
    trunk = model.trunk.forward_intermediates(x, intermediates_only=True)
    for i in range(len(z.like("trunk*"))): yield f"trunk{i}", trunk[i], TOL
    for i, m in enumerate(model.maps(x)):
        yield f"fpn{i}", m, TOL
        yield f"pos{i}", sine_positions(m.shape[1], tuple(m.shape[-2:]))[None].expand(len(x), -1, -1, -1), TOL


@covers("dcsam/sam2_memory_attention", inputs="curr curr_pos memory memory_pos")
@torch.no_grad()
def memory_attention(z):
    "Keys are whole frames of the queries' grid and then pointers, which are not turned."
    c, state = sizes(z), weights(z, "memory_attention.")
    model = MemoryAttention(c["d_model"], c["mem_dim"], c["mem_attn_layers"], c["mem_attn_ffn"]).eval()
    model.load_state_dict(state)
    get = lambda n: tensor(z[n]).transpose(0, 1)
    side = int(z["curr"].shape[0] ** .5)
    out = model(get("curr"), get("curr_pos"), get("memory"), get("memory_pos"), (side, side), c["num_obj_ptr_tokens"])
    yield "out", out.transpose(0, 1), TOL


@covers("dcsam/sam2_memory_encoder", inputs="pix_feat mask_logits")
@torch.no_grad()
def memory_encoder(z):
    "With and without the sigmoid inside."
    c = sizes(z)
    model = MemoryEncoder(c["d_model"], c["mem_dim"], c["image_size"] // z["pix_feat"].shape[-1]).eval()
    model.load_state_dict(weights(z, "memory_encoder."))
    out, places = model(tensor(z["pix_feat"]), tensor(z["mask_logits"]), logits=True)
    yield "vision_features", out, TOL
    yield "vision_features_skip_sigmoid", model(tensor(z["pix_feat"]), tensor(z["mask_logits"]))[0], TOL
    yield "vision_pos_enc", places.expand(len(out), -1, -1, -1), TOL


def recorded(z, state, rules):
    "The recorded SAM 2, filled under its official names; `rules` turns a Sam2Config into that of the run."
    c = sizes(z)
    hidden = state["sam_mask_decoder.iou_prediction_head.layers.0.weight"].shape[0]
    side = c["image_size"] // 16
    sam = SamConfig("sam2_hiera_recorded", 2, c["image_size"], c["image_size"] // side, c["d_model"], "squash",
                    state["sam_prompt_encoder.mask_downscaling.3.weight"].shape[0], iou_hidden=hidden,
                    mlp_dim=state["sam_mask_decoder.transformer.layers.0.mlp.layers.0.weight"].shape[0])
    config = Sam2Config(sam, c["mem_dim"], c["mem_attn_layers"], c["mem_attn_ffn"], memories=c["num_maskmem"],
                        age_pointers="obj_ptr_tpos_proj.weight" in state, absent_cells="no_obj_embed_spatial" in state)
    config = rules(config)
    model = Sam2(create_sam(config.sam, encoder(c)), config).eval()
    fill_sam2(model, state)
    return model


def walk(z, model, name, **prompt):
    "One run: a prompt on frame 0, then every frame in turn."
    frames = tensor(z["frames"])
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.image_encoder.mean, model.image_encoder.std))
    size = tuple(frames.shape[2:])
    seen = model.sam._seen(model.image_encoder(frames * std + mean), (SamView(size, size, size, "squash"),) * len(frames))
    session = Session(model, n_frames=len(frames))
    session.add(0, **prompt)
    for t in range(len(frames)):
        found = session.step(seen[t]).found[1]
        yield f"{name}_pred_masks_{t}", found.low, TOL
        yield f"{name}_obj_ptr_{t}", found.pointer, TOL
        yield f"{name}_obj_score_{t}", found.score, TOL
        if t == 0:
            yield f"{name}_maskmem_0", session.paths[1][0].prompted[0].cells, TOL
            cells = model.memory_places.transpose(1, 2).unflatten(2, model.config.grid)
            yield f"{name}_maskmem_pos_0", cells, TOL


@covers("dcsam/sam2_track", inputs="frames point_coords point_labels mask_input")
@torch.no_grad()
def tracking(z):
    "SAM 2.1 with the flags of its yaml files: no 0/1 masks for prompted frames, no dynamic multimask."
    model = recorded(z, weights(z), Sam2Config.as_trained)
    yield from walk(z, model, "points", points=z["point_coords"][0], labels=z["point_labels"][0])
    yield from walk(z, model, "mask", mask=z["mask_input"][0, 0])


@covers("dcsam/dcsam2_fork_track", inputs="frames proto_pos proto_neg")
@torch.no_grad()
def fork(z):
    "DC-SAM's fork: single=True (one mask always), pad_empty=False (no tokens where nothing is said)."
    model = recorded(z, weights(z), Sam2Config.as_fork)
    yield from walk(z, model, "proto", tokens=(tensor(z["proto_pos"]), tensor(z["proto_neg"])))
