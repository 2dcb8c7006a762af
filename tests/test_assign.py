"40_assign: against the in-place and the log-domain forms, its invariances, its faults, two processes, its speed."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.timet.assign import Prototypes, Queue, sinkhorn


def in_place(scores, eps=.05, iterations=10):
    "The form of SwAV's and DINO's code: the matrix itself is rewritten."
    Q = (scores / eps).exp().T
    K, B = Q.shape
    Q /= Q.sum()
    for _ in range(iterations):
        Q /= Q.sum(1, keepdim=True); Q /= K
        Q /= Q.sum(0, keepdim=True); Q /= B
    return (Q / Q.sum(0, keepdim=True)).T


def log_domain(scores, eps=.05, iterations=10):
    "Never leaves the logarithm, in float64: the judge."
    M = scores.double() / eps
    f = g = torch.zeros(1, 1, dtype=torch.float64)
    for i in range(iterations):
        if i: f = -(M + g).logsumexp(1, keepdim=True)
        g = -(M + f).logsumexp(0, keepdim=True)
    return (M + g).softmax(1)


def cosines(R, K, D=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(R, D, generator=g), dim=-1) @ F.normalize(torch.randn(K, D, generator=g), dim=-1).T


@pytest.mark.parametrize("R,K", [(98, 20), (7, 30), (1, 4), (500, 3), (6272, 200)])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_equals_both_other_forms(R, K, iterations):
    x = cosines(R, K)
    q = sinkhorn(x, iterations=iterations)
    assert (q - in_place(x.clone(), iterations=iterations)).abs().max() < 2e-6
    assert (q - log_domain(x, iterations=iterations)).abs().max() < 2e-6


@given(st.integers(1, 40), st.integers(1, 30), st.floats(.02, 1.), st.integers(0, 12), st.integers(0, 10 ** 6))
@settings(max_examples=60, deadline=None)
def test_properties(R, K, eps, iterations, seed):
    x = cosines(R, K, 4, seed)
    q = sinkhorn(x, eps, iterations)
    assert q.isfinite().all() and (q >= 0).all() and (q.sum(1) - 1).abs().max() < 1e-5
    order = torch.randperm(R, generator=torch.Generator().manual_seed(seed))
    assert (sinkhorn(x[order], eps, iterations) - q[order]).abs().max() < 1e-4              # rows have no order
    assert (sinkhorn(x + 5, eps, iterations) - q).abs().max() < 2e-3                        # only differences count
    assert (sinkhorn(x.double(), eps, iterations) - q).abs().max() < 1e-4


def test_marginals_converge():
    x = cosines(300, 12)
    gap = [(sinkhorn(x, iterations=i).sum(0) - 300 / 12).abs().max().item() for i in (1, 3, 10, 100)]
    assert gap == sorted(gap, reverse=True) and gap[-1] < .01 and gap[0] > 1
    assert torch.allclose(sinkhorn(x, iterations=0), (x / .05).softmax(1), atol=1e-6)


@pytest.mark.parametrize("eps", [.05, .01, .002])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_overflow(eps, dtype):
    x = torch.cat([cosines(200, 10), torch.ones(1, 10), -torch.ones(1, 10), torch.eye(10)]).to(dtype)
    if dtype == torch.float32 and eps < .012: assert not (x / eps).exp().isfinite().all()     # the plain form has lost already
    q = sinkhorn(x, eps)
    assert q.dtype == torch.float32 and q.isfinite().all() and (q.sum(1) - 1).abs().max() < 1e-5
    assert (q - log_domain(x, eps)).abs().max() < 1e-4


def test_corner_cases():
    assert torch.allclose(sinkhorn(torch.zeros(6, 3)), torch.full((6, 3), 1 / 3))           # all equal
    assert torch.allclose(sinkhorn(torch.randn(1, 5)), torch.full((1, 5), .2), atol=1e-6)   # one sample must serve all
    x = cosines(50, 8); x[7] = 0                                                             # a zero row
    assert sinkhorn(x).isfinite().all()
    x[7] = -1e4                                                                              # a row far below the others
    assert sinkhorn(x).isfinite().all() and (sinkhorn(x).sum(1) - 1).abs().max() < 1e-5
    assert sinkhorn(cosines(3, 40)).isfinite().all()                                         # K > B
    assert sinkhorn(torch.zeros(0, 4)).shape == (0, 4)
    dead = cosines(50, 8); dead[:, 2] = -50                                                  # nobody wants prototype 2
    assert sinkhorn(dead).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_scores_name_the_row(bad):
    x = cosines(20, 6).reshape(2, 10, 6).clone()
    x[1, 3, 2] = bad
    with pytest.raises(DataError, match="row 13"): sinkhorn(x)


def test_bad_arguments():
    with pytest.raises(ConfigError, match="epsilon"): sinkhorn(cosines(4, 3), epsilon=0)
    with pytest.raises(ConfigError, match="iterations"): sinkhorn(cosines(4, 3), iterations=-1)
    with pytest.raises(DataError, match="shape"): sinkhorn(torch.zeros(4))
    with pytest.raises(ConfigError, match="k >= 1|K >= 1|k=0"): Prototypes(0, 4)
    with pytest.raises(ConfigError, match="size"): Queue(0, 4)
    with pytest.raises(DataError, match="at least 5"): Prototypes(5, 4).start_from_(torch.randn(3, 4))
    with pytest.raises(ConfigError, match="kmeans"): Prototypes(2, 4).start_from_(torch.randn(3, 4), "means")


def test_joint_and_per_frame():
    x = torch.stack([cosines(30, 6, seed=s) + torch.eye(6)[s] for s in range(4)]).reshape(2, 2, 30, 6)
    apart = torch.stack([sinkhorn(f) for f in x.flatten(0, 1)]).reshape(x.shape)
    assert (sinkhorn(x, joint=False) - apart).abs().max() < 1e-6
    assert (sinkhorn(x) - sinkhorn(x.flatten(0, 2)).reshape(x.shape)).abs().max() == 0
    assert (sinkhorn(x) - apart).abs().max() > .1                                            # they are two different rules


def test_prototypes():
    p, twin, other = Prototypes(30, 8, seed=1), Prototypes(30, 8, seed=1), Prototypes(30, 8, seed=2)
    unit = lambda m: (m.weight.norm(dim=1) - 1).abs().max() < 1e-6
    assert unit(p) and torch.equal(p.weight, twin.weight) and not torch.equal(p.weight, other.weight)
    opt = torch.optim.AdamW(p.parameters(), lr=.1)
    for _ in range(5):
        opt.zero_grad(); p(torch.randn(64, 8)).square().sum().backward(); opt.step()
        assert not unit(p)
        assert unit(p.normalise_())
    x = torch.randn(5, 8)
    assert torch.allclose(p(x * 3), p(x), atol=1e-6) and p(x).abs().max() <= 1 + 1e-6
    rows = torch.randn(2, 40, 8)
    p.start_from_(rows, seed=3)
    near = F.normalize(rows.flatten(0, 1), dim=-1) @ p.weight.detach().T
    assert unit(p) and torch.allclose(near.amax(0), torch.ones(30), atol=1e-5)                # each is a real patch


def test_prototypes_from_kmeans_find_the_groups():
    centres = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    rows = (centres[:, None] + .05 * torch.randn(4, 50, 16)).flatten(0, 1)
    p = Prototypes(4, 16).start_from_(rows, "kmeans")
    assert ((p.weight @ centres.T).amax(1) > .98).all() and (p.weight @ centres.T).argmax(1).unique().numel() == 4


def test_queue():
    q = Queue(25, 4, per_clip=10)
    batch = lambda i: torch.full((1, 30, 4), float(i))
    assert not q.full
    for i in (1, 2): q.push(batch(i))
    assert not q.full and (q.rows[:10] == 2).all() and (q.rows[10:20] == 1).all() and (q.rows[20:] == 0).all()
    q.push(batch(3))
    assert q.full and (q.rows[:10] == 3).all() and (q.rows[20:] == 1).all()
    g = lambda: torch.Generator().manual_seed(5)
    x = torch.randn(2, 9, 4, requires_grad=True)
    a, b = Queue(25, 4).push(x, g()).rows, Queue(25, 4).push(x, g()).rows
    assert torch.equal(a, b) and not a.requires_grad and (a[:18].abs().sum(1) > 0).all()      # all there are, no more
    torch.manual_seed(7); pick = torch.randperm(18)[:4]
    torch.manual_seed(7); small = Queue(4, 4, 2).push(x).rows
    assert torch.equal(small, x.detach().flatten(0, 1)[pick])                                  # the official draw
    assert set(Queue(3, 4).state_dict()) == {"rows"}                                           # it belongs to a checkpoint


def _two(rank, folder):
    "One of two processes: its half of the batch."
    import torch.distributed as dist
    from timet_nb.base.train import all_sum
    from timet_nb.timet.loss import time_loss
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    z = torch.load(f"{folder}/in.pt")
    mine = slice(0, 2) if rank == 0 else slice(2, 4)
    head, w = z["head"][mine].requires_grad_(), z["prototypes"].requires_grad_()
    loss, aux = time_loss(head, z["features"][mine], w, (5, 6), reduce=all_sum)
    loss.backward()
    uneven = sinkhorn(z["scores"][:30] if rank == 0 else z["scores"][30:], reduce=all_sum)     # 30 rows and 70 rows
    wide = sinkhorn(z["wide"][:50] if rank == 0 else z["wide"][50:], .01, reduce=all_sum)      # float64 on one side only
    torch.save(dict(loss=loss.detach(), q=aux["q_first"], grad=w.grad, uneven=uneven, wide=wide), f"{folder}/out{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_loss_of_one(tmp_path):
    from timet_nb.timet.loss import time_loss
    g = torch.Generator().manual_seed(0)
    wide = torch.cat([cosines(50, 8) * .1, cosines(50, 8, seed=1)])
    z = dict(head=torch.randn(4, 3, 30, 16, generator=g), features=torch.randn(4, 3, 30, 12, generator=g),
             prototypes=F.normalize(torch.randn(9, 16, generator=g), dim=-1), scores=cosines(100, 8), wide=wide)
    torch.save(z, tmp_path / "in.pt")
    torch.multiprocessing.spawn(_two, (str(tmp_path),), nprocs=2)
    out = [torch.load(tmp_path / f"out{r}.pt") for r in (0, 1)]
    w = z["prototypes"].clone().requires_grad_()
    loss, aux = time_loss(z["head"], z["features"], w, (5, 6))
    loss.backward()
    join = lambda k: torch.cat([o[k] for o in out])
    assert abs(loss - (out[0]["loss"] + out[1]["loss"]) / 2) < 1e-6
    assert (aux["q_first"] - join("q")).abs().max() < 2e-6
    assert (w.grad - (out[0]["grad"] + out[1]["grad"]) / 2).abs().max() < 1e-6
    assert (sinkhorn(z["scores"]) - join("uneven")).abs().max() < 2e-6
    assert (sinkhorn(wide, .01) - join("wide")).abs().max() < 1e-5
    apart = torch.cat([sinkhorn(z["scores"][:30]), sinkhorn(z["scores"][30:])])
    assert (sinkhorn(z["scores"]) - apart).abs().max() > 1e-3                                  # without the sums it differs
