"Parity check against golden/dcsam: the mask tube's rotation, mirror images and blur."
import numpy as np
import torch

from tests.parity import covers
from timet_nb.dcsam.tube import KINDS, turned

LEVEL = 1.     # OpenCV keeps 5 bits of a position and rounds its sums: a grey level is allowed
NAMES = dict(rotate="rotation", hflip="left-right", vflip="up-down", blur="blur")


def made(kind, image, mask, degrees, border):
    "One frame in grey levels, by the same functions that `tube_frame` calls."
    from timet_nb.dcsam.tube import tube_frame
    if kind == "rotation":
        ids = tube_frame(image / 255, mask, kind, degrees)[1]
        return turned(image, degrees, border).round(), ids
    out, ids = tube_frame(image / 255, mask, kind)
    return (out * 255).round(), ids


@covers("dcsam/mask_tube", inputs="image mask config_json")
def mask_tube(z):
    "Every kind of pseudo frame; which kinds there are is read from the file."
    config = z.config if hasattr(z, "config") else None
    if config is None:
        import json
        config = json.loads(str(np.array(z["config_json"])))
    image = torch.from_numpy(np.array(z["image"])).permute(2, 0, 1).double()
    mask = torch.from_numpy(np.array(z["mask"])).long()
    for name in sorted(n.removesuffix("_img") for n in z.like("*_img")):
        assert NAMES[name] in KINDS
        frame, ids = made(NAMES[name], image, mask, config["angle_deg"], config["pad"])
        yield f"{name}_img", frame.permute(1, 2, 0).numpy(), LEVEL
        yield f"{name}_mask", ids.numpy(), 0.
