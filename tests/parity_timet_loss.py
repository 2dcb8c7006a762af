"Parity checks against golden/timet: neighbourhood, propagation, Sinkhorn, the temporal loss, the attention mask, the teacher."
import re

import numpy as np
import torch

from tests.parity import compare_ids, covers
from timet_nb.features.propagate import neighbourhood, propagate
from timet_nb.timet.assign import Prototypes, Queue, sinkhorn
from timet_nb.timet.loss import attention_mask, time_loss


def tensor(x): return torch.from_numpy(np.ascontiguousarray(x))


@covers("timet/neighbourhood")
def neighbourhood_(z):
    for name in z.like("mask_*"):
        h, w, r = map(int, re.findall(r"\d+", name))
        yield name, neighbourhood(h, w, r).to(torch.uint8), 0


@covers("timet/feature_forwarder_*", inputs="features first_seg n_last_frames radius topk spatial_resolution temperature")
def feature_forwarder(z):
    S = z.scalar("spatial_resolution")
    maps = tensor(z["features"]).transpose(1, 2).unflatten(2, (S, S))
    out = propagate(maps, tensor(z["first_seg"])[0], z.scalar("n_last_frames"), z.scalar("topk"), z.scalar("radius"),
                    z.scalar("temperature"), official=True)
    yield "out", out, 1e-6
    yield "argmax", lambda: compare_ids(z["argmax"], out.argmax(1), out, eps=1e-6, axis=1), 0


@covers("timet/sinkhorn", inputs="features prototypes epsilon iters")
def sinkhorn_(z):
    K, D = z["prototypes"].shape
    p = Prototypes(K, D)
    p.weight.data.copy_(tensor(z["prototypes"]))
    scores = p.scores(tensor(z["features"])).detach()
    yield "scores", scores, 1e-5
    yield "q", lambda: sinkhorn(scores, z.scalar("epsilon"), z.scalar("iters")), 1e-5
    for name in z.like("q_iters*"):
        yield name, lambda n=name: sinkhorn(scores.flatten(0, 1), z.scalar("epsilon"), int(n.removeprefix("q_iters"))), 1e-5


LOSS_INPUTS = ("head_features backbone_features prototypes n_last_frames radius topk epsilon sinkhorn_iters ce_temperature "
               "teacher_features teacher_prototypes queue_before torch_seed_for_queue")


@covers("timet/loss_*", inputs=LOSS_INPUTS)
def loss_(z):
    head = tensor(z["head_features"]).requires_grad_()
    prototypes = tensor(z["prototypes"]).requires_grad_()
    S = int(round(head.shape[2] ** .5))
    more = {}
    if "teacher_features" in z:
        more = dict(teacher_features=tensor(z["teacher_features"]), teacher_prototypes=tensor(z["teacher_prototypes"]))
    if "queue_before" in z:
        more["queue"] = Queue(*z["queue_before"].shape)
        more["queue"].rows.copy_(tensor(z["queue_before"]))
        torch.manual_seed(z.scalar("torch_seed_for_queue"))
    loss, aux = time_loss(head, tensor(z["backbone_features"]), prototypes, (S, S), official=True,
                          n_last=z.scalar("n_last_frames"), radius=z.scalar("radius"), topk=z.scalar("topk"),
                          epsilon=z.scalar("epsilon"), iterations=z.scalar("sinkhorn_iters"),
                          temperature=z.scalar("ce_temperature"), **more)
    loss.backward()
    yield "loss", loss, 1e-5
    yield "grad_head_features", head.grad, 1e-6
    yield "grad_prototypes", prototypes.grad, 1e-6
    yield "q_first", aux["q_first"], 1e-5
    yield "targets", lambda: compare_ids(z["targets"], aux["targets"], aux["propagated"][:, -1], eps=1e-6, axis=1), 0
    if "queue_before" in z: yield "queue_after", more["queue"].rows, 1e-5


@covers("timet/attention_mask", inputs="cls_attention spatial_resolution blur_kernel blur_sigma shipped_code_raises_index_error")
def attention_mask_(z):
    S = z.scalar("spatial_resolution")
    attention = tensor(z["cls_attention"]).unflatten(2, (S, S))
    for name in z.like("mask_*"):
        keep = int(name.removeprefix("mask_")) / 100
        yield name, lambda k=keep: attention_mask(attention, k, z.scalar("blur_kernel"), z.scalar("blur_sigma"))[:, None], 0
