"41_loss: the authors' numbers and gradients, where the gradient goes, the controls, the mask, the faults."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.features.propagate import propagate
from timet_nb.timet.assign import Prototypes, Queue, sinkhorn
from timet_nb.timet.loss import KINDS, assign, attention_mask, temporal_target, time_loss


def case(B=2, T=4, h=4, w=5, D=8, Db=10, K=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    head = torch.randn(B, T, h * w, D, generator=g).requires_grad_()
    prototypes = F.normalize(torch.randn(K, D, generator=g), dim=-1).requires_grad_()
    return head, torch.randn(B, T, h * w, Db, generator=g), prototypes, (h, w)


def golden_case(golden, name):
    z = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in np.load(golden / "timet" / f"{name}.npz").items()}
    more = {}
    if "teacher_features" in z: more = dict(teacher_features=z["teacher_features"], teacher_prototypes=z["teacher_prototypes"])
    if "queue_before" in z:
        more["queue"] = Queue(*z["queue_before"].shape); more["queue"].rows.copy_(z["queue_before"])
        torch.manual_seed(int(z["torch_seed_for_queue"]))
    return z, more


@pytest.mark.parametrize("name", ["loss_plain", "loss_teacher", "loss_queue"])
@pytest.mark.parametrize("official", [False, True])
def test_the_authors_numbers(golden, name, official):
    z, more = golden_case(golden, name)
    head, w = z["head_features"].requires_grad_(), z["prototypes"].requires_grad_()
    loss, aux = time_loss(head, z["backbone_features"], w, tuple(z["targets"].shape[1:]), official=official, **more)
    loss.backward()
    assert abs(loss - z["loss"]) < 1e-6
    assert (head.grad - z["grad_head_features"]).abs().max() < 1e-6
    assert (w.grad - z["grad_prototypes"]).abs().max() < 1e-6
    assert (aux["q_first"] - z["q_first"]).abs().max() < 2e-6
    assert torch.equal(aux["targets"], z["targets"].long())


@given(st.sampled_from(KINDS), st.booleans(), st.booleans(), st.booleans(), st.integers(2, 5), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_the_gradient_reaches_the_last_frame_only(kind, soft, teacher, masked, T, seed):
    head, features, w, grid = case(T=T, seed=seed)
    more = {}
    if teacher: more = dict(teacher_features=head.detach() + .1, teacher_prototypes=w.detach().flip(0))
    if masked: more["mask"] = torch.rand(*head.shape[:3], generator=torch.Generator().manual_seed(seed)) < .7
    features.requires_grad_()
    loss, aux = time_loss(head, features, w, grid, target=kind, soft=soft, **more)
    loss.backward()
    assert loss.isfinite() and features.grad is None
    assert (head.grad[:, :-1] == 0).all() and (head.grad[:, -1] != 0).any() and (w.grad != 0).any()
    for name in ("q_first", "targets", "propagated"): assert not aux[name].requires_grad


def test_targets_are_what_they_say():
    head, features, w, grid = case()
    q0, q3 = (assign(head[:, t].detach(), w.detach()) for t in (0, 3))
    _, a = time_loss(head, features, w, grid)
    maps = features.transpose(2, 3).unflatten(3, grid)
    assert torch.equal(a["q_first"], q0)
    assert torch.equal(a["propagated"], propagate(maps, q0.transpose(1, 2).unflatten(2, grid)))
    assert torch.equal(a["targets"], a["propagated"][:, -1].argmax(1))
    _, b = time_loss(head, None, w, grid, target="same-position")
    assert torch.equal(b["targets"].flatten(1), q0.argmax(-1))
    _, c = time_loss(head, None, w, grid, target="same-frame")
    assert torch.equal(c["targets"].flatten(1), q3.argmax(-1)) and torch.equal(c["q_first"], q3)
    assert (a["targets"] != b["targets"]).float().mean() > .2 and (b["targets"] != c["targets"]).float().mean() > .2


def test_hard_and_soft_by_hand():
    head, features, w, grid = case()
    logits = F.normalize(head[:, -1], dim=-1) @ w.T / .1
    hard, a = time_loss(head, features, w, grid)
    soft, b = time_loss(head, features, w, grid, soft=True)
    target = b["propagated"][:, -1].flatten(2).transpose(1, 2)
    assert abs(hard - F.cross_entropy(logits.flatten(0, 1), a["targets"].flatten())) < 1e-6
    assert abs(soft + (target * logits.log_softmax(-1)).sum(-1).mean()) < 1e-6
    half, _ = time_loss(head, features, w, grid, temperature=.2)
    assert abs(half - F.cross_entropy(logits.flatten(0, 1) / 2, a["targets"].flatten())) < 1e-6


def test_prototypes_as_module_parameter_or_tensor():
    head, features, w, grid = case()
    module = Prototypes(*w.shape); module.weight.data.copy_(w)
    a, b = time_loss(head, features, w, grid)[0], time_loss(head, features, module, grid)[0]
    assert a == b
    b.backward(); assert (module.weight.grad != 0).any()


def test_joint_and_per_frame():
    head, features, w, grid = case()
    q = assign(head[:, 0].detach(), w.detach(), joint=False)
    scores = F.normalize(head[:, 0].detach(), dim=-1) @ w.detach().T
    assert (q - torch.stack([sinkhorn(s) for s in scores])).abs().max() < 1e-6
    a, b = (time_loss(head, features, w, grid, joint=j)[0] for j in (True, False))
    assert a != b


def test_queue_seed_and_effect():
    head, features, w, grid = case()
    def run(seed):
        q = Queue(20, 8); q.rows.normal_(generator=torch.Generator().manual_seed(1))
        return time_loss(head, features, w, grid, queue=q, generator=torch.Generator().manual_seed(seed))[1]["q_first"]
    plain = time_loss(head, features, w, grid)[1]["q_first"]
    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4)) and (run(3) - plain).abs().max() > 1e-3
    young = Queue(1000, 8)
    assert torch.equal(time_loss(head, features, w, grid, queue=young)[1]["q_first"], plain)   # not full: not used
    assert (young.rows[:20] != 0).any()                                                        # but filled


def test_mask_leaves_patches_out():
    head, features, w, grid = case()
    keep = torch.ones(2, 4, 20, dtype=torch.bool); keep[:, :, ::3] = False
    loss, aux = time_loss(head, features, w, grid, mask=keep)
    q = aux["q_first"]
    assert (q[~keep[:, 0]] == 0).all() and (q[keep[:, 0]].sum(-1) - 1).abs().max() < 1e-5
    scores = (F.normalize(head[:, 0].detach(), dim=-1) @ w.detach().T)[keep[:, 0]]
    assert (q[keep[:, 0]] - sinkhorn(scores)).abs().max() < 1e-6                # balanced without the background
    loss.backward()
    assert (head.grad[:, -1][~keep[:, -1]] == 0).all() and (head.grad[:, -1][keep[:, -1]] != 0).any()
    full = torch.ones_like(keep)
    assert abs(time_loss(head, features, w, grid, mask=full)[0] - time_loss(head, features, w, grid)[0]) < 1e-6
    shipped = time_loss(head, features, w, grid, mask=keep, official=True)[1]["q_first"]
    assert (shipped.sum(-1) - 1).abs().max() < 1e-5                             # as shipped, the background takes part
    with pytest.raises(DataError, match="no foreground patch"): time_loss(head, features, w, grid, mask=torch.zeros_like(keep))


def test_attention_mask(golden):
    z = np.load(golden / "timet" / "attention_mask.npz")
    S = int(z["spatial_resolution"])
    a = torch.from_numpy(z["cls_attention"]).unflatten(2, (S, S))
    for name, keep in (("mask_065", .65), ("mask_050", .5)):
        assert (attention_mask(a, keep).numpy() == z[name][:, 0]).all()
    flat = torch.full((1, 2, 6, 9), .01); flat[..., 1:4, 2:5] = 1
    on = attention_mask(flat, .7)[0]
    assert on[1:4, 2:5].all() and on.sum() == 9
    lone = flat.clone(); lone[..., 5, 8] = 5                                     # one cell is an island, not an object
    assert not attention_mask(lone, .7)[0, 5, 8]
    assert attention_mask(flat.transpose(2, 3), .7)[0].equal(on.T)
    with pytest.raises(ConfigError, match="keep"): attention_mask(flat, 1.5)


def test_faults():
    head, features, w, grid = case()
    with pytest.raises(ConfigError, match="same-position"): time_loss(head, features, w, grid, target="forward")
    with pytest.raises(ConfigError, match="same-position"): temporal_target(torch.zeros(1, 20, 3), None, grid, "nothing")
    with pytest.raises(DataError, match="backbone_features"): time_loss(head, None, w, grid)
    with pytest.raises(ConfigError, match="did you mean 'temperature'"): time_loss(head, features, w, grid, temprature=1)
    with pytest.raises(DataError, match="backbone_features"): time_loss(head, features[:1], w, grid)
    with pytest.raises(DataError, match="T >= 2"): time_loss(head, features[:, :1], w, grid)
    with pytest.raises(DataError, match="head_features"): time_loss(head, features, w, (4, 4))
    with pytest.raises(DataError, match="head_features"): time_loss(head[0], features, w, grid)
    with pytest.raises(ConfigError, match="teacher_prototypes"): time_loss(head, features, w, grid, teacher_features=head)
    with pytest.raises(ConfigError, match="joint"): time_loss(head, features, w, grid, joint=False, queue=_full(Queue(9, 8)))
    broken = features.clone(); broken[1, 2, 3] = float("nan")
    with pytest.raises(DataError, match="frame 2(.|\n)*patch 3 of clip 1"): time_loss(head, broken, w, grid)
    sick = head.detach().clone(); sick[0, 0, 5] = float("nan")
    with pytest.raises(DataError, match="row 5"): time_loss(sick, features, w, grid)


def _full(queue):
    queue.rows.fill_(1.); return queue


def test_half_precision_features_are_computed_in_single():
    head, features, w, grid = case()
    exact = time_loss(head, features, w, grid)[0]
    half = time_loss(head.half(), features.half(), w, grid)[0]
    assert half.dtype == torch.float32 and abs(exact - half) < .05
    with torch.autocast("cpu", torch.bfloat16): inside = time_loss(head, features, w, grid)[0]
    assert abs(exact - inside) < 1e-6
