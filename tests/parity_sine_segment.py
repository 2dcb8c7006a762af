"Parity checks against golden/sine: the three answers of the heads, the whole model end to end, the memory of frames."
import numpy as np
import torch

from tests.parity import covers
from timet_nb.sine.answers import find_identities, find_instances, semantic_map
from timet_nb.sine.memory import FrameMemory

TOL = 1e-4


def tensor(x): return torch.from_numpy(np.array(x))


@covers("sine/inference_heads")
def heads(z):
    "Scores above a threshold, sorted, with the size of their masks; and the soft semantic map."
    get = {n: tensor(z["in/" + n]) for n in ("ins_masks", "ins_logits", "sem_labels", "id_masks", "id_logits", "id_labels")}
    for name in z.like("out/th*/*"):
        _, setting, last = name.split("/")
        threshold, top = setting.removeprefix("th").split("_top")
        yield name, lambda last=last, how=(int(top), float(threshold)): answer(get, last, how), TOL
    yield "out/semantic", semantic_map(get["ins_logits"], get["ins_masks"].sigmoid()), TOL


def answer(get, last, how):
    kind, what = last.split("_", 1)
    f = find_instances if kind == "ins" else find_identities
    found = f(get[f"{kind}_logits"], get[f"{kind}_masks"], get["sem_labels" if kind == "ins" else "id_labels"], *how)
    return {"scores": found.scores, "classes": found.labels, "mask_area": found.masks.flatten(1).sum(1)}[what]


@covers("sine/vos_memory")
def memory(z):
    "Which frames are kept after each insertion; the decay's reach is that of the authors' script."
    scores = z["in/scores"].tolist()
    for name in z.like("out/*"):
        kind, size, first, last = name.removeprefix("out/").split("_")
        mem = FrameMemory(int(size[3:]), kind, 20., bool(int(first[5:])), bool(int(last[4:])))
        kept = []
        for frame, score in enumerate(scores):
            mem.add(frame, score)
            kept.append(mem.frames + [-1] * (z[name].shape[1] - len(mem.frames)))
        yield name, np.array(kept), 0


def tiny_vit(z, state):
    "An empty DINOv2 of the file's size. Its colours turn the recorded, already normalised pictures into RGB and back."
    from timet_nb.base.runtime import import_timm
    from timet_nb.features.backbone import Backbone
    dim, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    vit = import_timm().create_model(
        "vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True, embed_dim=dim, patch_size=patch,
        depth=z.scalar("cfg/edepth"), num_heads=z.scalar("cfg/eheads"), img_size=patch * z.scalar("cfg/train_grid"))
    both = np.concatenate([z["in/ref_image"].ravel(), z["in/tar_image"].ravel()])
    low, span = float(both.min()), float(both.max() - both.min())
    colours = ((-low / span,) * 3, (1 / span,) * 3)
    rgb = lambda n: (tensor(z[n]) - low) / span
    return Backbone(vit.eval(), "recorded", resize="dino", normalise=colours), rgb


@covers("sine/sine_e2e")
def whole(z):
    "Encoder, neck, decoder and answers of the whole model, loaded by its official names."
    from timet_nb.sine.release import load_release
    from timet_nb.sine.answers import View, bring_back, semantic_back
    from timet_nb.sine.prompts import Marks, make_prompt
    state = {n.removeprefix("sd/"): tensor(z[n]) for n in z if n.startswith("sd/")}
    encoder = {k.removeprefix("image_encoder.encoder."): v for k, v in state.items()}
    backbone, rgb = tiny_vit(z, encoder)
    model, report = load_release(state, backbone, z.scalar("cfg/heads"))
    assert not (report.encoder.missing or report.neck.missing or report.decoder.missing)
    grid = (z.scalar("cfg/grid"),) * 2
    with torch.no_grad():
        yield "mid/pos_embed_interp", backbone.positions(*grid), TOL
        tokens = backbone.run(backbone.embed(rgb("in/tar_image")[None]))
        yield "mid/tar_prenorm_tokens", tokens, TOL
        yield "mid/tar_norm_patchtokens", backbone.final_norm(tokens)[:, 1:], TOL
        maps = [model.encode(rgb(f"in/{n}_image")[None]) for n in ("ref", "tar")]
        for n, m in zip(("ref", "tar"), maps): yield f"mid/{n}_neck", m, TOL
        marks = Marks(list(tensor(z["in/ref_mask"])), tensor(z["in/ref_label"]))
        prompt = make_prompt(maps[0], marks, empty="zero", official=True)
        out = model.decoder(prompt, maps[1])
    for n in ("id_logits", "ins_logits", "id_masks", "ins_masks"): yield f"out/raw/pred_{n}", getattr(out, n), TOL
    canvas, size = tuple(z["in/tar_image"].shape[1:]), tuple(z["cfg/out_hw"].tolist())
    view = View(size, tuple(z["cfg/valid_hw"].tolist()), canvas)
    yield "out/sem_seg", semantic_back(out.ins_logits[0], out.ins_masks[0], view), TOL
    ins = find_instances(out.ins_logits[0], bring_back(out.ins_masks[0], view), prompt.sem_labels)
    ids = find_identities(out.id_logits[0], bring_back(out.id_masks[0], view), prompt.id_labels)
    for name, found in (("ins", ins), ("id", ids)): yield from listed(z, f"out/{name}/", found)


def listed(z, at, found):
    "Lists of objects, both sorted by score: the authors' order is that of an unsorted top-k."
    order = np.argsort(-z[at + "scores"], kind="stable")
    back = np.argsort(order)
    yield at + "scores", found.scores.numpy()[back], TOL
    yield at + "classes", found.labels.numpy()[back], 0
    yield at + "masks_shape", np.array(found.masks.shape), 0
    yield at + "pred_masks_packed", np.packbits(found.masks.flatten(1).numpy()[back], axis=1), 0
