"The training loop: schedules, groups, sampler, accumulation, log, checkpoints, errors, several processes."
import csv
import math
import os
import resource
import signal
import socket
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.train_toys import Counter, Net, Noisy, ended, forked, loss_fn, plans, run, same
from timet_nb.base import store as S
from timet_nb.base import train as T
from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.base.step import NonFiniteLoss, Stepper, _to, all_gather_rows, all_sum
from timet_nb.base.train import (CheckpointStore, ResumableSampler, Schedule, constant, cosine, count_parameters, decay_split,
                                 ema_update, feed, fit, folder_lock, item_seed, load_history, make_loader, param_groups, stepwise)


# ---- schedules -------------------------------------------------------------------------------------------------
def test_schedules_match_the_authors(golden):
    d = np.load(golden / "timet" / "schedules.npz")
    n = int(d["epochs"]) * int(d["iters_per_epoch"])
    for name, start, end in (("weight_decay", .04, .4), ("momentum", .995, 1.)):
        plan = cosine(start, end, n)
        np.testing.assert_allclose([plan(i) for i in range(n)], d[name], atol=1e-12, rtol=0)


def test_schedules_do_not_end_in_an_error():
    plan = cosine(1., .25, 10)
    assert plan(9) > plan(10) == plan(11) == plan(10**9) == .25
    assert constant(3)(10**9) == 3
    drops = stepwise(1., .1, 5)
    assert [drops(i) for i in (0, 4, 5, 9, 10)] == pytest.approx([1, 1, .1, .1, .01])


def test_warm_up_rises_in_a_line_and_meets_the_rest():
    plan = cosine(1., 0., 10, warmup=4, warmup_start=.2)
    assert [plan(i) for i in range(5)] == pytest.approx([.2, .4, .6, .8, 1.])
    assert plan(7) == pytest.approx(.5) and plan(10) == 0
    assert constant(2., warmup=2)(1) == 1. and stepwise(1., .5, 3, warmup=2)(5) == .5


@pytest.mark.parametrize("bad", [dict(steps=0), dict(steps=5, warmup=5), dict(steps=5, warmup=-1)])
def test_schedules_refuse_lengths_without_meaning(bad):
    with pytest.raises(ConfigError, match="schedule"): cosine(1., 0., **bad)
    with pytest.raises(ConfigError, match="schedule"): stepwise(1., .5, 0)


# ---- groups ----------------------------------------------------------------------------------------------------
def test_groups_say_what_is_wrong():
    net = Net()
    ok = param_groups(plans(net))
    assert [g["name"] for g in ok] == ["head", "body"] and isinstance(ok[1]["weight_decay"], Schedule)
    for groups, word in [([dict(params=net.head, lr=1, decay=2)], "decay"), ([dict(params=[], lr=1)], "no parameters"),
                         ([dict(params=net.teacher, lr=1)], "no parameters"), ([dict(params=[net.teacher.weight], lr=1)], "frozen"),
                         ([dict(params=["head"], lr=1)], "str"), ([dict(params=net.head)], "lr"),
                         ([dict(name="a", params=net.head, lr=1), dict(name="b", params=net.head, lr=1)], "'a'"),
                         ([dict(name="a", params=net.head, lr=1), dict(name="a", params=net.body, lr=1)], "another group")]:
        with pytest.raises(ConfigError, match=word): param_groups(groups)


def test_decay_split_spares_biases_norms_and_frozen():
    net = Net(); net.body[0].weight.requires_grad_(False)
    decayed, plain = decay_split(net, 1e-3, cosine(.04, .4, 10), "net")
    assert [id(p) for p in decayed["params"]] == [id(net.head.weight)] and plain["weight_decay"] == 0.
    assert {id(p) for p in plain["params"]} == {id(p) for p in (net.body[0].bias, *net.body[1].parameters(), net.head.bias)}
    assert [g["name"] for g in decay_split(nn.LayerNorm(3), 1., .1, "n")] == ["n/no-decay"]


def test_a_parameter_that_nobody_trains_is_named():
    with pytest.raises(ConfigError, match=r"body.0.weight.*\(4 in all\)"):
        run(None, 2, groups=lambda net: plans(net)[:1], save_every=0)


def test_rates_reach_the_optimiser_and_the_log():
    net, _, r = run(None, 6, log_every=1, save_every=0)
    plan = plans(net)
    for i, row in enumerate(r.history):
        assert row["lr/head"] == plan[0]["lr"](i) and row["wd/head"] == plan[0]["weight_decay"](i) and row["lr/body"] == 1e-2


def test_counting():
    net = Net()
    assert count_parameters(net) == dict(trainable=40 + 16 + 9, frozen=9, total=74)
    net.again = net.head
    assert count_parameters(net)["total"] == 74


# ---- the order of the data -------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 9), world=st.integers(1, 3), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_ranks_share_an_epoch_without_overlap(n, batch, world, seed, epoch):
    if n < batch * world:
        with pytest.raises(ConfigError, match="whole batch"): ResumableSampler(n, batch, seed, rank=0, world=world)
        return
    samplers = [ResumableSampler(n, batch, seed, rank=r, world=world) for r in range(world)]
    each = len(samplers[0])
    drawn = [int(i) for s in samplers for k in range(each) for i in s.batch_at(epoch * each + k)]
    assert len(drawn) == len(set(drawn)) == each * batch * world and set(drawn) <= set(range(n))


def test_two_processes_see_the_batches_of_one():
    one = ResumableSampler(24, 8, seed=4)
    two = [ResumableSampler(24, 4, seed=4, rank=r, world=2) for r in (0, 1)]
    for k in range(7): assert one.batch_at(k) == two[0].batch_at(k) + two[1].batch_at(k)


def test_any_batch_without_those_before():
    s = ResumableSampler(10, 3, seed=1)
    walked = [b for _ in range(4) for b in s]                 # a plain loop moves on to the next epoch by itself
    assert walked == [s.batch_at(k) for k in range(12)] and walked[:3] != walked[3:6]
    fresh = ResumableSampler(10, 3, seed=1)
    assert [fresh.batch_at(k) for k in (11, 0, 5)] == [walked[k] for k in (11, 0, 5)]
    fresh.seek(4, stop=8)
    assert list(fresh) == walked[4:8] and fresh.state_dict()["epoch"] == 2 and fresh.state_dict()["position"] == 2
    other = ResumableSampler(10, 3, seed=1); other.load_state_dict(fresh.state_dict())
    assert list(other) == walked[8:9]
    with pytest.raises(CheckpointError, match="'seed': 1"): ResumableSampler(10, 3, seed=2).load_state_dict(fresh.state_dict())
    assert ResumableSampler(10, 3, seed=2).batch_at(0) != walked[0]


def test_in_order_and_incomplete_batches():
    s = ResumableSampler(5, 2, shuffle=False, drop_last=False)
    assert [list(map(int, b)) for b in s] == [[0, 1], [2, 3], [4]] and len(s) == 3
    with pytest.raises(ConfigError, match="drop_last"): ResumableSampler(9, 2, drop_last=False, world=2)
    with pytest.raises(ConfigError, match="rank"): ResumableSampler(9, 2, rank=2, world=2)


def test_items_are_ints_with_a_seed():
    import pickle
    a = ResumableSampler(9, 3, seed=7).batch_at(4)[0]
    b = pickle.loads(pickle.dumps(a))
    assert torch.arange(9)[a] == int(a) and (b, b.epoch, b.seed) == (a, 1, item_seed(7, 1, int(a)))
    assert a.rng().random() == b.rng().random() and torch.equal(torch.rand(3, generator=a.generator()), torch.rand(3, generator=b.generator()))
    assert len({item_seed(s, e, i) for s in range(5) for e in range(5) for i in range(5)}) == 125


def test_workers_do_not_matter_and_the_loop_keeps_its_own_randomness():
    def three(workers):
        loader = make_loader(Noisy(), 4, workers=workers, seed=2)
        torch.manual_seed(0)
        return list(feed(loader, 5, 9)), torch.rand(2)
    (a, ra), (b, rb) = three(0), three(2)
    np.random.seed(0); pairs = [np.random.randn() for _ in range(3)]        # numpy keeps the second of a pair for later
    np.random.seed(0); mixed = []
    for _ in range(3): mixed.append(np.random.randn()); next(iter(feed(make_loader(Noisy(), 4), 0, 1)))
    assert mixed == pairs
    assert same(a, b) and torch.equal(ra, rb)
    first, second = (next(iter(feed(make_loader(Noisy(), 24, seed=2), k, k + 1))) for k in (0, 1))
    assert not torch.equal(first["x"][first["index"].argsort()], second["x"][second["index"].argsort()])   # epochs differ


# ---- resume ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The run that nobody stopped."
    out = tmp_path_factory.mktemp("whole")
    before = torch.get_num_threads(); torch.set_num_threads(1)
    net, counter, result = run(out, 20)
    torch.set_num_threads(before)
    return out, net.state_dict(), counter.state_dict(), result.history


def check_same(whole, out, net=None, counter=None, result=None):
    ref, tensors, count, history = whole
    a, b = (CheckpointStore(p / "checkpoints").load() for p in (ref, out))
    assert a.step == b.step == 20 and same(a.tensors, b.tensors) and same(a.state, b.state)
    assert (ref / "log.csv").read_bytes() == (out / "log.csv").read_bytes() and load_history(out) == history
    name = "checkpoints/step-00000020/model.safetensors"
    assert (ref / name).read_bytes() == (out / name).read_bytes()
    if net is not None: assert same(net.state_dict(), tensors) and same(counter.state_dict(), count) and same(result.history, history)


@pytest.mark.parametrize("stops, workers", [([1], 0), ([7, 8, 13], 0), ([4, 12], 2)])
def test_stopped_and_resumed_is_the_same_to_the_bit(whole, tmp_path, stops, workers):
    for s in stops:
        *_, r = run(tmp_path, s, workers=workers); assert r.step == s
        torch.rand(7), np.random.rand(3)               # what happens between two calls must not matter
    net, counter, result = run(tmp_path, 20, workers=workers)
    assert result.resumed == stops[-1]
    check_same(whole, tmp_path, net, counter, result)


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    run(tmp_path, 20)
    net, counter, result = run(tmp_path, 20)
    assert result.resumed == 20
    check_same(whole, tmp_path, net, counter, result)
    with pytest.raises(ConfigError, match="at least the 20"): run(tmp_path, 10)


def test_resume_can_be_refused_or_demanded(whole, tmp_path):
    with pytest.raises(CheckpointError, match="none"): run(tmp_path, 20, resume=True)
    run(tmp_path, 5, seed=6)
    net, counter, result = run(tmp_path, 20, resume=False)
    assert result.resumed == 0
    check_same(whole, tmp_path, net, counter, result)


def test_the_seed_decides_and_the_caller_keeps_its_own():
    torch.manual_seed(11); expected = torch.rand(1); torch.manual_seed(11)
    (a, *_), (b, *_), (c, *_) = (run(None, 4, save_every=0, seed=s) for s in (5, 5, 6))
    assert same(a.state_dict(), b.state_dict()) and not same(a.state_dict(), c.state_dict())
    assert torch.equal(torch.rand(1), expected)


def test_saving_more_often_changes_nothing(whole, tmp_path):
    net, counter, result = run(tmp_path, 20, save_every=1)
    check_same(whole, tmp_path, net, counter, result)


def test_log_is_cut_back_to_the_checkpoint(whole, tmp_path):
    run(tmp_path, 7)
    with open(tmp_path / "log.csv", "a") as f: f.write("8,0.1,0.2,0.3\n9,junk")      # rows after the checkpoint, one of them half
    net, counter, result = run(tmp_path, 20)
    check_same(whole, tmp_path, net, counter, result)


@pytest.mark.parametrize("change, word", [
    (dict(accumulate=1), "accumulate: 2 then, 1 now"), (dict(clip=2.), "clip: 1.0 then, 2.0 now"), (dict(seed=6), "seed: 5 then, 6 now"),
    (dict(groups=lambda n: plans(n, 30)), "group head.lr.*steps=20.* then.*steps=30"), (dict(state=[]), "state: "),
    (dict(loader=make_loader(Noisy(), 6, seed=9)), "loader.batch: 4 then, 6 now"), (dict(optimizer=torch.optim.SGD), "AdamW.*SGD"),
    (dict(config={"a": {"b": 2}}), "config.a.b: 1 then, 2 now")])
def test_other_settings_are_refused_by_name(tmp_path, change, word):
    run(tmp_path, 4, config={"a": {"b": 1}})
    with pytest.raises(ConfigError, match=word): run(tmp_path, 20, **({"config": {"a": {"b": 1}}} | change))


def test_an_other_model_is_refused_by_name(tmp_path):
    run(tmp_path, 4)
    wide = Net(); wide.register_buffer("queue", torch.zeros(9, 1))
    with pytest.raises(ConfigError, match=r"model.queue: \[6, 1\] then, \[9, 1\] now"):
        fit(wide, loss_fn, make_loader(Noisy(), 4, seed=9), plans(wide), 9, out=tmp_path, accumulate=2, clip=1., seed=5, device="cpu", state=[Counter()])


# ---- damaged checkpoints ---------------------------------------------------------------------------------------
def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut": data = data[: len(data) // 2]
    elif how == "empty": data = b""
    else: data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "flip", "empty"])
@pytest.mark.parametrize("name", ["model.safetensors", "state-0.pt", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_passed_over(whole, tmp_path, name, how):
    run(tmp_path, 12)
    damage(tmp_path / "checkpoints" / "step-00000012" / name, how)
    with pytest.warns(UserWarning, match="1 damaged checkpoint.*step-00000012"): net, counter, result = run(tmp_path, 20)
    assert result.resumed == 9 and "1 damaged" in result.notes[0]
    check_same(whole, tmp_path, net, counter, result)


def test_a_missing_file_and_only_damage(tmp_path):
    run(tmp_path, 4)
    (tmp_path / "checkpoints" / "step-00000004" / "state-0.pt").unlink()
    with pytest.warns(UserWarning, match="1 damaged"): assert run(tmp_path, 4)[2].resumed == 3
    for path in (tmp_path / "checkpoints").glob("step-*"): damage(path / "model.safetensors", "flip")
    with pytest.raises(CheckpointError, match="resume=False"): run(tmp_path, 9)
    assert run(tmp_path, 4, resume=False)[2].resumed == 0


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    store = CheckpointStore(tmp_path_factory.mktemp("sealed"))
    store.save(1, {"a": torch.arange(5.)}, {"x": [1, torch.ones(2)]}, {"settings": {}})
    return store, {p: p.read_bytes() for p in store.path(1).iterdir()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_byte_is_noticed(sealed, data):
    store, files = sealed
    path = data.draw(st.sampled_from(sorted(files)))
    at, bit = data.draw(st.integers(0, len(files[path]) - 1)), data.draw(st.integers(0, 7))
    broken = bytearray(files[path]); broken[at] ^= 1 << bit
    path.write_bytes(broken)
    try:
        with pytest.raises(CheckpointError, match="step-00000001"): store.read(1)
    finally: path.write_bytes(files[path])
    assert store.read(1).state["x"][0] == 1


def test_store_keeps_two_and_cleans_up(tmp_path):
    store = CheckpointStore(tmp_path)
    for s in (1, 2, 3): store.save(s, {"a": torch.full((2,), float(s))}, {})
    assert store.steps() == [2, 3] and store.load().tensors["a"].tolist() == [3, 3]
    (tmp_path / ".writing-00000009").mkdir(); (tmp_path / ".old-00000001").mkdir()
    store.save(3, {"a": torch.zeros(2)}, {})                     # the same step again replaces
    assert store.load().tensors["a"].tolist() == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert CheckpointStore(tmp_path / "none").load() is None


def test_shared_and_odd_tensors_survive(tmp_path):
    w = torch.randn(3, 4)
    tensors = {"a": w, "tied": w, "view": w[:, 1], "scalar": torch.tensor(2), "empty": torch.zeros(0, 3), "half": w.bfloat16(), "yes": w > 0}
    CheckpointStore(tmp_path).save(1, tensors, {"tuple": (1, (2., None)), "bytes": b"x"})
    saved = CheckpointStore(tmp_path).load()
    assert same(saved.tensors, {k: v.contiguous() for k, v in tensors.items()}) and saved.state == {"tuple": (1, (2., None)), "bytes": b"x"}


def test_state_that_could_not_be_read_back_is_refused(tmp_path):
    class Bad(Counter):
        def state_dict(self): return {"deep": [np.float64(1.)]}
    with pytest.raises(ConfigError, match=r"states'\]\['0 Bad'\]\['deep'\]\[0\].*numpy"): run(tmp_path, 3, state=[Bad()])


def test_no_pickled_code_is_run(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"touch {tmp_path}/owned",)
    store = CheckpointStore(tmp_path); store.save(1, {"a": torch.ones(1)}, {})
    import io
    buffer = io.BytesIO(); torch.save({"x": Evil()}, buffer)
    (store.path(1) / "state-0.pt").write_bytes(buffer.getvalue())
    files = {p.name: S._sha256(p.read_bytes()) for p in store.path(1).iterdir() if p.name != "manifest.json"}
    import json
    body = json.dumps(dict(format=1, step=1, files=files, about={}))
    (store.path(1) / "manifest.json").write_text(json.dumps(dict(sha256=S._sha256(body.encode()), body=body)))
    with pytest.raises(CheckpointError, match="state-0.pt|step-00000001"): store.load()
    assert not (tmp_path / "owned").exists()


# ---- the step --------------------------------------------------------------------------------------------------
def linear_run(batch, accumulate, **options):
    "Four features, no randomness but the order."
    g = torch.Generator().manual_seed(0); x = torch.randn(32, 4, generator=g); data = TensorDataset(x, x.sum(1, keepdim=True))
    net = nn.Linear(4, 1); nn.init.constant_(net.weight, .1); nn.init.zeros_(net.bias)
    r = fit(net, lambda m, b: F.mse_loss(m(b[0]), b[1]), make_loader(data, batch, seed=1), [dict(name="all", params=net, lr=.05)], 12,
            accumulate=accumulate, device="cpu", **options)
    return net, r


def test_accumulation_equals_the_big_batch():
    (a, ra), (b, rb) = linear_run(8, 1), linear_run(2, 4)
    torch.testing.assert_close(a.weight, b.weight, atol=1e-6, rtol=0)
    np.testing.assert_allclose(ra.column(), rb.column(), atol=1e-6)
    assert (linear_run(2, 1)[0].weight - a.weight).abs().max() > 1e-3      # and is not the small one


def test_what_belongs_to_the_loop_is_there():
    "The names of the pages before can be had from the page of the loop, as objects and not as copies."
    from timet_nb.base import order, rates, resume, step
    assert T.all_sum is step.all_sum and T.all_gather_rows is step.all_gather_rows and T.NonFiniteLoss is step.NonFiniteLoss
    assert {"fit", "FitResult", "NonFiniteLoss", "all_sum", "all_gather_rows"} <= set(T.__all__)
    for name in ("Item", "ResumableSampler", "Seeded", "feed", "in_group", "item_seed", "loader_settings", "make_loader", "ranks"):
        assert getattr(T, name) is getattr(order, name)
    for name in ("Schedule", "constant", "cosine", "count_parameters", "decay_split", "ema_update", "param_groups", "stepwise"):
        assert getattr(T, name) is getattr(rates, name)
    for name in ("CheckpointStore", "RunLog", "Saved", "folder_lock", "load_history"): assert getattr(T, name) is getattr(S, name)
    assert issubclass(T._Run, resume.Resumable) and issubclass(resume.Resumable, Stepper)


def test_a_step_alone_equals_the_same_step_in_a_run():
    "Without log, folder and signals: what the page of one step calls."
    torch.manual_seed(0); data = [(torch.randn(3, 4), torch.randn(3, 1)) for _ in range(8)]
    def net():
        m = nn.Linear(4, 1); nn.init.constant_(m.weight, .1); nn.init.zeros_(m.bias); return m
    a, b = net(), net()
    def loss(m, batch): return F.mse_loss(m(batch[0]), batch[1])
    plan = lambda m: [dict(name="all", params=m, lr=cosine(.1, 0, 4), weight_decay=.01)]
    r = fit(a, loss, data, plan(a), 4, accumulate=2, clip=.5, device="cpu", after_step=lambda m, i: {"two": 2 * i})
    s, batches = Stepper(b, loss, plan(b), accumulate=2, clip=.5, device="cpu", after_step=lambda m, i: {"two": 2 * i}).prepare(), iter(data)
    for i in range(4):
        row, told = s.step(i, batches)
        assert {**row, **told, **s.rates()} == r.history[i]
    assert same(a.state_dict(), b.state_dict())
    with pytest.raises(ConfigError, match="accumulate"): Stepper(a, loss, plan(a), accumulate=0)


def test_equal_to_a_loop_written_by_hand():
    net, r = linear_run(8, 1, clip=.5, optimizer=torch.optim.SGD)
    g = torch.Generator().manual_seed(0); x = torch.randn(32, 4, generator=g); y = x.sum(1, keepdim=True)
    hand = nn.Linear(4, 1); nn.init.constant_(hand.weight, .1); nn.init.zeros_(hand.bias)
    opt, s = torch.optim.SGD(hand.parameters(), lr=.05), ResumableSampler(32, 8, seed=1)
    for k in range(12):
        i = torch.tensor([int(j) for j in s.batch_at(k)])
        loss = F.mse_loss(hand(x[i]), y[i]); opt.zero_grad(); loss.backward()
        norm = nn.utils.clip_grad_norm_(hand.parameters(), .5); opt.step()
        assert r.history[k]["loss"] == loss.item() and r.history[k]["grad_norm"] == norm.item()
    assert torch.equal(net.weight, hand.weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, value):
    def bad(model, batch):
        bad.calls += 1
        return loss_fn(model, batch)["loss"] * (value if bad.calls == 11 else 1.)
    bad.calls = 0
    net = Net()
    with pytest.raises(NonFiniteLoss, match=r"loss at step 11: got (nan|inf)[\s\S]*checkpoint of step 9 is whole[\s\S]*clip"):
        fit(net, bad, make_loader(Noisy(), 4), plans(net), 20, out=tmp_path, save_every=3, device="cpu")
    assert all(p.isfinite().all() for p in net.parameters()) and CheckpointStore(tmp_path / "checkpoints").steps() == [6, 9]
    assert isinstance(NonFiniteLoss("x"), DataError)


def test_broken_weights_are_not_saved(tmp_path):
    def spoil(model, i):
        if i == 4: model.head.bias.data.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="parameter of group 'head' at step 5"): run(tmp_path, 20, save_every=5, after_step=spoil)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == []


def test_broken_gradients_are_noticed_when_clipping():
    net = nn.Linear(2, 1)
    def root(m, b): return (m(b) * 0).abs().sqrt().sum()          # finite loss, gradient 0 / 0
    with pytest.raises(NonFiniteLoss, match="gradient norm at step 1"):
        fit(net, root, [torch.ones(1, 2)], [dict(params=net, lr=.1)], 3, clip=1., device="cpu")


@pytest.mark.parametrize("loss, word", [(lambda m, b: 3., "float|3.0"), (lambda m, b: {"los": m(b)}, "loss_fn"), (lambda m, b: m(b), "shape"),
                                        (lambda m, b: m(b).sum().detach(), "requires_grad=False")])
def test_a_loss_of_the_wrong_kind(loss, word):
    net = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match=word): fit(net, loss, [torch.ones(2, 2)], [dict(params=net, lr=.1)], 2, device="cpu")


@pytest.mark.parametrize("bad, word", [(dict(steps=0), "steps=0"), (dict(precision="bf16"), "CPU"), (dict(precision="half"), "'half'"),
    (dict(resume="yes"), "resume"), (dict(save_every=2), "out"), (dict(resume=True), "out"), (dict(device="cuda:7"), "cuda:7"), (dict(accumulate=0), "accumulate=0")])
def test_arguments_that_cannot_work(bad, word):
    net = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match=word):
        fit(net, lambda m, b: m(b).sum(), [torch.ones(2, 2)], [dict(params=net, lr=.1)], **({"steps": 2, "device": "cpu"} | bad))


def test_batches_may_be_nested_lists_and_functions():
    from collections import namedtuple
    Pair = namedtuple("Pair", "x y")
    nested = {"a": [torch.ones(2), (torch.zeros(1), "text")], "b": Pair(torch.ones(1), 3)}
    moved = _to(nested, torch.device("cpu"))
    assert same(moved["a"], nested["a"]) and type(moved["b"]) is Pair and moved["b"].y == 3
    net = nn.Linear(2, 1)
    for loader in ([torch.ones(3, 2)], lambda k: torch.full((1, 2), float(k)), DataLoader(torch.ones(6, 2), 2)):
        r = fit(net, lambda m, b: m(b).square().mean(), loader, [dict(params=net, lr=.1)], 5, device="cpu")
        assert r.step == 5 and len(r.history) == 5


def test_loaders_that_cannot_be_resumed_or_are_empty(tmp_path):
    net = nn.Linear(2, 1)
    def go(loader, **o): return fit(net, lambda m, b: m(b).sum(), loader, [dict(params=net, lr=.1)], 5, device="cpu", **o)
    with pytest.raises(ConfigError, match="make_loader"): go(DataLoader(torch.ones(6, 2), 2, shuffle=True), out=tmp_path)
    with pytest.raises(DataError, match="empty list"): go([])
    with pytest.raises(DataError, match="no batch"): go(iter([torch.ones(1, 2)]))
    with pytest.raises(ConfigError, match="made for 2"): go(DataLoader(torch.ones(8, 2), batch_sampler=ResumableSampler(8, 2, world=2)))


def test_an_error_in_the_data_frees_the_folder(tmp_path):
    class Broken(Noisy):
        def __getitem__(self, i):
            if i == 3: raise DataError("frame 3 of clip dog cannot be read")
            return super().__getitem__(i)
    with pytest.raises(DataError, match="clip dog"): run(tmp_path, 20, loader=make_loader(Broken(), 4, workers=1))
    assert run(tmp_path, 2, resume=False)[2].step == 2


# ---- log -------------------------------------------------------------------------------------------------------
def test_log_has_a_header_and_takes_new_columns(whole):
    out, *_, history = whole
    with open(out / "log.csv", newline="") as f: rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["step", "loss", "size", "grad_norm", "lr/head", "wd/head", "lr/body", "wd/body", "probe"]
    assert [r["step"] for r in history] == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]      # every second, and where there is a probe
    assert [r["step"] for r in history if "probe" in r] == [5, 10, 15, 20]
    assert load_history(out / "log.csv") == history == load_history(out)


def test_log_that_is_missing_or_broken(tmp_path):
    with pytest.raises(DataError, match="log.csv"): load_history(tmp_path)
    (tmp_path / "log.csv").write_text("step,loss\n1,apple\n")
    with pytest.raises(DataError, match="apple"): load_history(tmp_path)


def test_result_reads_well(whole):
    r = T.FitResult(whole[3], 20, resumed=7, notes=["x"])
    text = r._repr_markdown_()
    assert "| steps | 20 |" in text and "| resumed at | 7 |" in text and "| note | x |" in text and len(r.column("probe")) == 4


def test_tensorboard_is_written_when_asked(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, 4, tensorboard=True); run(tmp_path, 6, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "tensorboard")); events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [2, 4, 5, 6]


# ---- teacher ---------------------------------------------------------------------------------------------------
def test_teacher_rules_match_the_authors(golden):
    d = {k: torch.from_numpy(v) for k, v in np.load(golden / "timet" / "ema.npz").items()}
    m = float(d["momentum"])
    def holder(w, p):
        net = nn.Module(); net.weight, net.prototypes = nn.Parameter(w.clone()), nn.Parameter(p.clone()); return net
    student = holder(d["student_weight"], d["student_prototypes"])
    for inverted, name in ((True, "teacher_weight_after_training_script"), (False, "teacher_weight_after_eval_script_rule")):
        teacher = holder(d["teacher_weight_before"], d["teacher_prototypes_before"])
        ema_update(teacher, student, m, inverted=inverted)
        torch.testing.assert_close(teacher.weight.data, d[name], atol=1e-6, rtol=0)
        if inverted:
            torch.testing.assert_close(F.normalize(teacher.prototypes.data, dim=1), d["teacher_prototypes_after_training_script"], atol=1e-6, rtol=0)


def test_teacher_copies_counters_and_refuses_strangers():
    a, b = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    b.num_batches_tracked.fill_(7); b.running_mean.fill_(1.)
    ema_update(a, b, .75)
    assert a.num_batches_tracked == 7 and a.running_mean.tolist() == [.25, .25]
    with pytest.raises(ConfigError, match="bias"): ema_update(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), .5)


# ---- the folder ------------------------------------------------------------------------------------------------
def test_two_runs_cannot_share_a_folder(tmp_path):
    with folder_lock(tmp_path):
        with pytest.raises(ConfigError, match="this very process"): run(tmp_path, 2)
        def other():
            S._HELD.clear()
            with pytest.raises(ConfigError, match=f"process {os.getppid()}"): run(tmp_path, 2)
        assert ended(forked(other)) == 0
    assert run(tmp_path, 2)[2].notes == []


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    def die():
        with folder_lock(tmp_path): os.kill(os.getpid(), signal.SIGKILL)
    pid = forked(die)
    assert ended(pid) == -signal.SIGKILL and str(pid) in (tmp_path / ".lock").read_text()
    assert f"process {pid}" in run(tmp_path, 2)[2].notes[0]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/file/run"): run(tmp_path / "file" / "run", 2)
    if os.path.isdir("/proc/self"):
        with pytest.raises(CheckpointError, match="/proc/timet_run"): run("/proc/timet_run", 2)


def test_a_full_disk_is_named_and_the_last_checkpoint_lives(whole, tmp_path):
    run(tmp_path, 6)
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))       # nothing longer than this can be written
        with pytest.raises(CheckpointError, match="(?s)cannot write to .*checkpoints.*too large"): run(tmp_path, 12)
    assert ended(forked(full)) == 0
    net, counter, result = run(tmp_path, 20)
    assert result.resumed == 6
    check_same(whole, tmp_path, net, counter, result)


# ---- several processes -----------------------------------------------------------------------------------------
def _free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


def _sums(m, b):
    "A loss that needs sums over all processes: squared distance to the mean output of the whole batch."
    out = m.calibrate(b[0])                                    # a method, not forward: the plain model is what loss_fn sees
    mean = all_sum(out.detach().sum()) / all_sum(torch.tensor(float(len(out))))
    m.memory.copy_(out.detach()[:2, 0])
    return {"loss": F.mse_loss(out, b[1]) + .1 * (out - mean).square().mean(), "mean": mean}


class Shared(nn.Linear):
    def __init__(self):
        super().__init__(4, 1); nn.init.constant_(self.weight, .1); nn.init.zeros_(self.bias)
        self.register_buffer("memory", torch.zeros(2))
    def calibrate(self, x): return F.linear(x, self.weight, self.bias)


def _plain(m, b): return F.mse_loss(m.calibrate(b[0]), b[1])


def _shared_run(out, steps, batch, accumulate=1, loss=_sums):
    g = torch.Generator().manual_seed(0); x = torch.randn(32, 4, generator=g); data = TensorDataset(x, x.sum(1, keepdim=True))
    net = Shared()
    r = fit(net, loss, make_loader(data, batch, seed=1), [dict(name="all", params=net, lr=.05)], steps, out=out, device="cpu",
            accumulate=accumulate, save_every=4, clip=5.)
    return net, r


def _process(rank, port, out):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    net, r = _shared_run(f"{out}/two", 10, 4)
    rows = all_gather_rows(torch.full((rank + 1, 2), float(rank)))
    _shared_run(f"{out}/stopped", 4, 4)
    again, r2 = _shared_run(f"{out}/stopped", 10, 4)
    quarter, _ = _shared_run(f"{out}/quarter", 10, 2, accumulate=2, loss=_plain)
    torch.save(dict(net=net.state_dict(), again=again.state_dict(), quarter=quarter.state_dict(), rows=rows, history=r.history, again_history=r2.history,
                    resumed=r2.resumed), f"{out}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_like_one(tmp_path, capfd):
    torch.multiprocessing.spawn(_process, (_free_port(), str(tmp_path)), nprocs=2)
    assert "Warning" not in capfd.readouterr().err
    a, b = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    one, r = _shared_run(tmp_path / "one", 10, 8)
    plain, _ = _shared_run(tmp_path / "plain", 10, 8, loss=_plain)
    torch.testing.assert_close(a["net"]["weight"], one.weight.data, atol=1e-6, rtol=0)
    torch.testing.assert_close(a["quarter"]["weight"], plain.weight.data, atol=1e-6, rtol=0)
    assert torch.equal(a["net"]["weight"], b["net"]["weight"])
    for k in ("loss", "mean"): np.testing.assert_allclose([h[k] for h in a["history"]], [h[k] for h in r.history], atol=1e-6)
    assert a["rows"].tolist() == [[0, 0], [1, 1], [1, 1]] == b["rows"].tolist()
    for x in (a, b): assert same(x["net"], x["again"]) and same(x["history"], x["again_history"]) and x["resumed"] == 4
    assert not torch.equal(a["net"]["memory"], b["net"]["memory"])            # each process keeps its own buffers
    assert sorted(p.name for p in (tmp_path / "two/checkpoints/step-00000010").iterdir()) == \
        ["manifest.json", "model.safetensors", "state-0.pt", "state-1.pt"]


def test_one_process_needs_no_group():
    t = torch.ones(3)
    assert all_sum(t) is t and all_gather_rows(t) is t


def test_nothing_is_printed_in_tests(capfd):
    run(None, 3, save_every=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error"); run(None, 3, save_every=0)
    assert capfd.readouterr() == ("", "")
