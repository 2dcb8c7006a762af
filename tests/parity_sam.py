"Parity checks against golden/dcsam: SAM's prompt encoder, mask decoder and image encoder."
import json

import numpy as np
import torch

from tests.parity import covers
from timet_nb.sam.prompt_decoder import MaskDecoder
from timet_nb.sam.prompt_encoder import PromptEncoder

TOL = 1e-5


def tensor(x): return torch.from_numpy(np.array(x))


def settings(z): return json.loads(str(z["config_json"]))


def weights(z, prefix):
    "Official names below `prefix`."
    return {n.removeprefix("sd/" + prefix): tensor(z[n]) for n in z if n.startswith("sd/" + prefix)}


@covers("dcsam/sam1_prompt_mask_decoder", inputs="image_embedding point_coords point_labels box mask_input")
def prompts(z):
    "Prompts of each kind and all at once; one mask and several."
    c = settings(z)
    encoder = PromptEncoder(c["embed_dim"], (c["image_embedding_size"],) * 2, (c["input_image_size"],) * 2, c["mask_in_chans"])
    decoder = MaskDecoder(c["embed_dim"], c["depth"], c["heads"], c["mlp_dim"], c["num_multimask_outputs"],
                          c["iou_head_depth"], c["iou_head_hidden_dim"]).eval()
    encoder.load_state_dict(weights(z, "prompt_encoder."))
    decoder.load_state_dict(weights(z, "mask_decoder."))
    points, box, mask = (tensor(z["point_coords"]), tensor(z["point_labels"])), tensor(z["box"]), tensor(z["mask_input"])
    kinds = {"points": dict(points=points), "box": dict(boxes=box), "mask": dict(masks=mask),
             "all": dict(points=points, boxes=box, masks=mask)}
    with torch.no_grad():
        yield "dense_pe", encoder.dense_pe(), TOL
        for kind, given in kinds.items():
            sparse, dense = encoder(**given)
            yield f"{kind}_sparse", sparse, TOL
            yield f"{kind}_dense", dense, TOL
            for several in (0, 1):
                out = decoder(tensor(z["image_embedding"]), encoder.dense_pe(), sparse, dense, bool(several))
                yield f"{kind}_masks_multi{several}", out.masks, TOL
                yield f"{kind}_iou_multi{several}", out.iou, TOL


@covers("dcsam/sam1_image_encoder", inputs="x")
def image(z):
    "timm's encoder, filled under the official names by the map that `load_sam` uses."
    from timet_nb.sam.segment import SamVit, rename_vit
    c = settings(z)
    encoder = SamVit("samvit_base_patch16", c["img"], patch_size=c["patch"], embed_dim=c["embed_dim"], depth=c["depth"],
                     num_heads=c["heads"], mlp_ratio=c["mlp_ratio"], neck_chans=c["out_chans"],
                     window_size=c["window_size"], global_attn_indexes=tuple(c["global_attn_indexes"])).eval()
    encoder.load_state_dict(rename_vit(weights(z, "image_encoder.")))
    with torch.no_grad(): yield "y", encoder.vit.forward_features(tensor(z["x"])), TOL
