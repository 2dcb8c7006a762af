"51_mformer: the block mask, the two paths, masked attention, batching and padding, other grids, names of published weights."
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.sine.mformer import (
    Answers, DualPathLayer, MFormer, MFormerConfig, block_mask, config_of, from_official)
from timet_nb.sine.prompts import Marks, Prompt, make_prompt

SMALL = dict(dim=32, heads=4, mlp=48, depth=3, queries=6)
FIELDS = ("id_logits", "id_masks", "ins_logits", "ins_masks", "id_embed", "ins_embed")


def close(a, b, eps=2e-5):
    assert a.shape == b.shape
    both = (a == b) | ((a - b).abs() < eps)
    assert both.all(), (a - b).abs().max()


def same(a, b, names=FIELDS, eps=2e-5):
    for n in names: close(getattr(a, n), getattr(b, n), eps)


def net(seed=0, **changes):
    torch.manual_seed(seed)
    m = MFormer(MFormerConfig(**{**SMALL, **changes})).eval()
    for p in m.parameters():
        if p.dim() == 1: nn.init.normal_(p, std=.2)          # biases and norms that do something
    m.mask_embed.layers[-1].weight.data.mul_(8)              # masks that have an inside and an outside
    return m


def prompt(I=3, C=2, D=32, seed=1):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g)
    labels = torch.arange(I) % C if C else torch.zeros(I).long()
    return Prompt(draw(I, D), torch.ones(I).long(), torch.arange(I), labels, draw(C, D), torch.ones(C).long(), torch.arange(C))


def target(*grid, B=1, seed=2): return torch.randn(B, 32, *grid, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_gradient(request):
    if "grad" in request.node.name: yield
    else:
        with torch.no_grad(): yield


# ---- the block mask

def test_truth_table():
    m = block_mask(2, 3, 2)
    kind = "iinnnss"
    for a in range(7):
        for b in range(7):
            assert bool(m[a, b]) == ((kind[a] == "i") == (kind[b] == "i")), (a, b)
    assert block_mask(0, 3, 2).all() and block_mask(4, 0, 0).all()


def test_identities_know_nothing_of_instances_and_classes():
    m, t, p = net(), target(8, 8), prompt()
    a = m(p, t)
    other = net()
    for e in (other.query_feat, other.query_embed, other.negative): e.weight.data = torch.randn_like(e.weight)
    b = other(p, t)
    close(a.id_masks, b.id_masks); close(a.id_logits, b.id_logits)
    assert (a.ins_masks - b.ins_masks).abs().max() > .01


def test_instances_know_nothing_of_identities_after_the_interaction():
    m, t, p = net(fusion=0), target(8, 8), prompt()
    a, b = m(p, t), m(p.without_ids(), t)
    same(a, b, ("ins_logits", "ins_masks", "ins_embed"))
    assert b.id_masks.shape == (1, 0, 32, 32)


def test_one_path_has_no_blocks():
    m, t, p = net(paths=1, fusion=0), target(8, 8), prompt()
    assert not hasattr(m.layers[0], "feed_sem")
    assert (m(p, t).ins_masks - m(p.without_ids(), t).ins_masks).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="1 or 2"): net(paths=3)


# ---- who may look where

def test_stage_zero_regions_of_instances_do_not_depend_on_the_prompt():
    m, t, one, two = net(), target(8, 8), {}, {}
    m(prompt(seed=1), t, trace=one); m(prompt(seed=9), t, trace=two)
    assert torch.equal(one["regions0"][:, 3:], two["regions0"][:, 3:])


def test_regions_are_the_masks_resized_and_thresholded():
    m, t, trace = net(), target(6, 9), {}
    a = m(prompt(), t, deep=True, trace=trace)
    masks = torch.cat([a.aux[0].id_masks, a.aux[0].ins_masks], 1)
    want = F.interpolate(masks, (6, 9), mode="bilinear").flatten(2)
    sure = want.abs() > 1e-4
    assert torch.equal(trace["regions0"][sure], (want >= 0)[sure])


def test_the_authors_keep_the_first_regions_and_refresh_makes_new_ones():
    for refresh in (False, True):
        trace = {}
        net(refresh_attn_mask=refresh)(prompt(), target(8, 8), trace=trace)
        changed = any(not torch.equal(trace["regions0"], trace[f"regions{k}"]) for k in (1, 2))
        assert changed == refresh


def test_refresh_changes_nothing_before_the_second_layer():
    a, b = (net(refresh_attn_mask=r)(prompt(), target(8, 8), deep=True) for r in (False, True))
    for k in (0, 1): same(a.aux[k], b.aux[k])
    assert (a.ins_masks - b.ins_masks).abs().max() > 1e-3


def test_query_without_region_may_look_everywhere():
    m, trace = net(), {}
    m.mask_embed.layers[-1].weight.data.zero_(); m.mask_embed.layers[-1].bias.data.zero_()
    m.mask_features[3].bias.data.zero_(); m.mask_embed.layers[-1].bias.data[0] = 1
    m.mask_features[3].bias.data[0] = -100.
    a = m(prompt(), target(8, 8), trace=trace)
    assert not trace["regions0"].any() and a.ins_masks.isfinite().all()
    allow = m._may_look(trace["regions0"], trace["scene"])
    assert allow.all()


# ---- permutations and batches

def test_order_of_objects_and_classes():
    m, t, p = net(), target(8, 8), prompt(4, 3)
    i, c = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    q = Prompt(p.id_tokens[i], p.id_areas, p.ids[i], p.id_labels[i], p.sem_tokens[c], p.sem_areas, p.sem_labels[c])
    a, b = m(p, t), m(q, t)
    close(a.id_masks[:, i], b.id_masks); close(a.id_logits[:, i], b.id_logits)
    close(a.ins_masks, b.ins_masks); close(a.ins_logits[..., torch.cat([c, torch.tensor([3])])], b.ins_logits)


def test_order_of_learned_queries():
    m, t, p, order = net(), target(8, 8), prompt(), torch.tensor([3, 1, 5, 0, 2, 4])
    a = m(p, t)
    for e in (m.query_feat, m.query_embed): e.weight.data = e.weight.data[order]
    b = m(p, t)
    close(a.ins_masks[:, order], b.ins_masks); close(a.id_masks, b.id_masks)


@pytest.mark.parametrize("refresh", [False, True])
def test_a_batch_is_its_targets_one_by_one(refresh):
    m, t = net(refresh_attn_mask=refresh), target(6, 9, B=3)
    prompts = [prompt(3, 2, seed=1), prompt(1, 1, seed=5), prompt(2, 3, seed=6)]
    many = m(prompts, t)
    for b, p in enumerate(prompts):
        one, I, C = m(p, t[b:b + 1]), len(p.ids), len(p.sem_labels)
        close(many.id_masks[b, :I], one.id_masks[0]); close(many.id_logits[b, :I], one.id_logits[0])
        close(many.ins_masks[b], one.ins_masks[0])
        close(many.ins_logits[b][:, :C], one.ins_logits[0][:, :C])
        close(many.ins_logits[b][:, -1], one.ins_logits[0][:, -1])
        assert (many.ins_logits[b][:, C:-1] == -torch.inf).all()
        assert many.ins_logits[b].softmax(-1).isfinite().all()
        assert many.id_valid[b].sum() == I and many.sem_valid[b].sum() == C


def test_one_prompt_many_targets():
    m, t, p = net(), target(8, 8, B=4), prompt()
    many = m(p, t)
    for b in range(4): close(many.id_masks[b], m(p, t[b:b + 1]).id_masks[0])


def test_padding_of_the_image():
    "With mask_padding the padded cells cannot reach the answers; without it they do."
    wide = target(8, 12); narrow = wide.clone(); narrow[..., 8:] = 7 * torch.randn(1, 32, 8, 4)
    pixels = torch.ones(1, 8, 12, dtype=torch.bool); pixels[..., 8:] = False
    for mask, moved in ((True, False), (False, True)):
        m = net(mask_padding=mask, refresh_attn_mask=True)
        a, b = m(prompt(), wide, pixels), m(prompt(), narrow, pixels)
        gap = (a.id_masks[..., :32] - b.id_masks[..., :32]).abs().max()
        assert (gap > 1e-3) == moved
        if mask: close(a.ins_logits, b.ins_logits)


@pytest.mark.parametrize("grid", [(1, 1), (3, 8), (9, 4), (13, 13)])
def test_any_grid(grid):
    a = net()(prompt(), target(*grid), deep=True)
    assert a.ins_masks.shape == (1, 6, 4 * grid[0], 4 * grid[1]) and len(a.aux) == 3
    for s in (a, *a.aux):
        for n in FIELDS: assert getattr(s, n).isfinite().all()


def test_reference_and_target_grids_may_differ():
    f, mask = torch.randn(1, 32, 5, 7), torch.zeros(1, 50, 70, dtype=torch.bool); mask[:, 10:30, 10:40] = True
    p = make_prompt(f, Marks(mask, [3]))
    assert net()(p, target(9, 4)).id_masks.shape == (1, 1, 36, 16)


# ---- against torch, gradients, options

def test_layer_equals_torch_modules():
    torch.manual_seed(0)
    layer = DualPathLayer(16, 4, 24).eval()
    x, pos, im, ip = (torch.randn(1, n, 16) for n in (7, 7, 10, 10))
    allow = block_mask(2, 3, 2)[None, None]; look = torch.rand(1, 1, 5, 10) > .4; look[..., 0] = True

    def attend(a, q, k, v, blocked):
        m = nn.MultiheadAttention(16, 4, batch_first=True)
        m.load_state_dict({k: v for k, v in a.state_dict().items() if not k.startswith("norm")})
        return m(q, k, v, attn_mask=blocked)[0]
    y = layer.own.norm(x); z = x + attend(layer.own, y + pos, y + pos, y, ~allow[0, 0])
    q = z[:, :5]; y = layer.cross.norm(q)
    q = q + attend(layer.cross, y + pos[:, :5], im + ip, im, ~look[0, 0])
    want = torch.cat([layer.feed(q), layer.feed_sem(z[:, 5:])], 1)
    close(layer(x, pos, im, ip[0], 5, allow, look), want)


def test_every_weight_gets_a_grad():
    m = MFormer(MFormerConfig(**SMALL))
    a = m(prompt(), target(8, 8), deep=True)
    total = sum(s.id_logits.logsumexp(-1).sum() + s.ins_logits.logsumexp(-1).sum() + s.id_masks.square().mean()
                + s.ins_masks.square().mean() for s in (a, *a.aux))
    total.backward()
    without = [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without, without


def test_extra_maps_are_added():
    m, t, p = net(), target(8, 8), prompt()
    zero = (torch.zeros(1, 32, 8, 8), torch.zeros(1, 32, 32, 32))
    same(m(p, t), m(p, t, plus=zero))
    assert (m(p, t).id_masks - m(p, t, plus=(zero[0], zero[1] + .5)).id_masks).abs().max() > 1e-3


def test_deep_changes_only_what_is_returned():
    m, t, p = net(), target(8, 8), prompt()
    same(m(p, t), m(p, t, deep=True)); assert m(p, t).aux == ()


def test_scale_is_bounded():
    m = net(); m.logit_scale.data.fill_(50.)
    assert m(prompt(), target(8, 8)).ins_logits.abs().max() <= 100.01


# ---- published weights

def test_parameter_count_of_the_paper():
    m = MFormer(MFormerConfig.paper())
    count = lambda x: sum(p.numel() for p in x.parameters())
    assert count(m) == 17_924_228 and count(m.interaction) == 1_578_752
    assert count(m.layers) == 15_780_864 and count(m.mask_features) == 262_784 and count(m.mask_embed) == 197_376


def test_official_names_fit_one_to_one(golden):
    from tests.parity import Arrays
    state = {n[3:]: torch.from_numpy(x) for n, x in Arrays(golden / "sine" / "mformer_train.npz").items() if n.startswith("sd/")}
    ours = from_official(state)
    m = MFormer(config_of(ours, heads=4))
    assert set(ours) == set(m.state_dict()) and len(ours) == len(state)
    m.load_state_dict(ours)
    assert from_official(ours).keys() == ours.keys()          # our own names stay


# ---- faults

@pytest.mark.parametrize("x, word", [
    (torch.randn(32, 8, 8), "the B axis is missing"), (torch.randn(1, 16, 8, 8), "target features: got shape"),
    (torch.zeros(1, 32, 8, 8, dtype=torch.long), "dtype")])
def test_wrong_target(x, word):
    with pytest.raises(DataError, match=word): net()(prompt(), x)


def test_prompt_of_another_width_or_number():
    with pytest.raises(DataError, match="width"): net()(prompt(D=16), target(8, 8))
    with pytest.raises(DataError, match="one for all, or one a target"): net()([prompt()] * 2, target(8, 8, B=3))
    with pytest.raises(DataError, match="pixels"): net(mask_padding=True)(prompt(), target(8, 8), torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(DataError, match="no cell"): net(mask_padding=True)(prompt(), target(8, 8), torch.zeros(1, 8, 8, dtype=torch.bool))
    with pytest.raises(DataError, match="nan at index"):
        bad = target(8, 8); bad[0, 0, 0, 0] = torch.nan; net()(prompt(), bad)
    with pytest.raises(ConfigError, match="divisor"): net(heads=5)


def test_answers_are_plain():
    a = net()(prompt(), target(8, 8))
    assert isinstance(a, Answers) and a.id_logits.shape == (1, 3, 2) and a.ins_logits.shape == (1, 6, 3)
