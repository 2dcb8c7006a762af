"53: views and answers, the prior map, the model, released weights, the memory of a video, the segmenter and its evaluations."
import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.data.classes import ClassSet, Item
from timet_nb.data.episodes import all_episodes, class_pairs
from timet_nb.data.frames import write_image, write_mask
from timet_nb.data.layout import find_layout
from timet_nb.evaluate.incontext import evaluate_incontext, load_prompt
from timet_nb.features.backbone import create_backbone
from timet_nb.features.checkpoints import load_state, save_state
from timet_nb.features.keys import compare
from timet_nb.sine.answers import (
    Found, View, bring_back, cells_in_view, find_identities, find_instances, join_found, lay_masks, lay_picture,
    mask_boxes, mask_quality, on_canvas, semantic_back, semantic_map, view_of)
from timet_nb.sine.memory import DECAYS, FrameMemory, VideoTracker, decay, resolve
from timet_nb.sine.mformer import MFormerConfig
from timet_nb.sine.model import Sine, SineConfig, create_sine
from timet_nb.sine.prior import join_keyed, join_maps, match_keys, only_class, prior_map
from timet_nb.sine.prompts import Marks, Prompt, join_prompts, read_marks
from timet_nb.sine.release import load_release, load_sine, split_release, trained_state
from timet_nb.sine.segment import SineSegmenter, evaluate_instances, evaluate_video, read_pictures

TINY = MFormerConfig(dim=32, heads=4, mlp=48, depth=2, queries=6, mask_padding=True)
FIELDS = ("id_logits", "id_masks", "ins_logits", "ins_masks")
_EYES = {}


def eyes(kind="test-vit"):
    "Backbones are frozen: one of each is enough."
    if kind not in _EYES:
        more = dict(strides=(8, 16, 32), pretrained=False) if kind.startswith("eff") else {}
        _EYES[kind] = create_backbone(kind, **more)
    return _EYES[kind]


def model(kind="test-vit", seed=0, decoder=TINY, **changes):
    "A small model whose random masks have an inside and an outside."
    m = create_sine(SineConfig(**{**dict(decoder=decoder, size=None, pad=None, norm=True, threshold=.5), **changes}), eyes(kind), seed)
    torch.manual_seed(seed)
    for n, p in m.decoder.named_parameters():
        if p.dim() == 1: torch.nn.init.normal_(p, std=.2)
    m.decoder.mask_embed.layers[-1].weight.data.mul_(8)
    return m


def cnn(**changes): return model("efficientnet-lite0-imagenet", **{**dict(grid=16, match=(16, 32)), **changes})


def scene(seed=0, size=(64, 96), ids=(1, 2)):
    "A noisy picture with one coloured square for each id."
    g = torch.Generator().manual_seed(seed)
    x, m = .3 * torch.rand(3, *size, generator=g), torch.zeros(size, dtype=torch.long)
    for n, k in enumerate(ids):
        y, left = 8 + 4 * n, 8 + 40 * n
        m[y:y + 24, left:left + 24] = k
        x[k % 3][m == k] += .7
    return x.clamp(0, 1), m


def close(a, b, eps=2e-5):
    assert a.shape == b.shape
    assert ((a == b) | ((a - b).abs() < eps)).all(), (a - b).abs().max()


def alike(a, b, eps=2e-5):
    for n in FIELDS: close(getattr(a, n), getattr(b, n), eps)


# ---- views

def test_view_lays_whole_patches_and_pads():
    assert view_of((100, 200), 14) == View((100, 200), (98, 196), (98, 196))
    assert view_of((100, 200), 14, 518, 1036, 1036) == View((100, 200), (518, 1036), (1036, 1036))
    assert view_of((480, 854), 14, 518, 1036, 1036).seen == (518, 922)
    assert view_of((300, 500), 14, (518, 518), pad=896) == View((300, 500), (518, 518), (896, 896))
    assert view_of((200, 1000), 14, 518, 1036, 1036).seen == (207, 1036)           # the long side limits


def test_view_refuses():
    with pytest.raises(DataError, match="at least a patch of 14"): view_of((9, 200), 14)
    with pytest.raises(ConfigError, match="multiples of 14"): view_of((100, 200), 14, pad=900)
    with pytest.raises(ConfigError, match="518"): view_of((100, 200), 14, (518, 518), pad=504)


def test_picture_and_masks_lie_at_the_top_left():
    view = view_of((40, 60), 8, (32, 48), pad=64)
    x = lay_picture(torch.rand(3, 40, 60), view, torch.full((3, 1, 1), .25))
    assert x.shape == (3, 64, 64) and (x[:, 32:] == .25).all() and (x[:, :, 48:] == .25).all()
    m = lay_masks(torch.ones(1, 40, 60, dtype=torch.bool), view)
    assert m[0, :32, :48].all() and m.sum() == 32 * 48
    assert cells_in_view(view, 8).sum() == 4 * 6
    assert torch.equal(cells_in_view(view, 8), m[0, ::8, ::8])


def test_a_speck_survives_the_resize_of_its_mask():
    m = torch.zeros(2, 64, 64, dtype=torch.bool); m[0, 1, 1] = True
    view = view_of((64, 64), 8, (16, 16))
    assert F.interpolate(m[None].float(), (16, 16)).sum() == 0                         # nearest pixels miss it
    assert lay_masks(m, view)[0].sum() == 1 and not lay_masks(m, view)[1].any()


def test_bring_back_undoes_the_view():
    view = view_of((40, 60), 8, (32, 48), pad=64)
    ramp = torch.arange(64.).expand(1, 64, 64)
    back = bring_back(ramp, view)
    assert back.shape == (1, 40, 60)
    close(back[0, 0, 1:-1], ((torch.arange(60.) + .5) * 48 / 60 - .5)[1:-1], 1e-4)
    assert on_canvas(torch.rand(2, 16, 16), view).shape == (2, 32, 48)


# ---- the three answers

def test_semantic_map_is_a_vote():
    logits = torch.tensor([[0., 0., -50.], [50., 0., 0.]]); masks = torch.zeros(2, 2, 2); masks[0, 0, 0] = masks[1] = 1
    s = semantic_map(logits, masks)
    assert s[:, 0, 0].tolist() == pytest.approx([1.5, .5]) and s[:, 1, 1].tolist() == pytest.approx([1, 0])
    view = View((20, 24), (16, 24), (24, 24))
    m = torch.randn(7, 6, 6); c = torch.randn(7, 3)
    whole = F.interpolate(semantic_map(c, F.interpolate(m[None], (24, 24), mode="bilinear")[0, :, :16].sigmoid())[None], (20, 24), mode="bilinear")[0]
    close(semantic_back(c, m, view, chunk=3), whole, 1e-5)


def test_quality_and_lists_by_a_loop():
    torch.manual_seed(0)
    masks, logits = torch.randn(5, 6, 7), torch.randn(5, 4)
    for q, m in zip(mask_quality(masks), masks): assert float(q) == pytest.approx(float(m.sigmoid()[m > 0].mean()), abs=1e-5)
    assert mask_quality(-torch.ones(1, 3, 3)).item() == 0
    found = find_instances(logits, masks, torch.tensor([4, 8, 9]), threshold=.1)
    p = logits.softmax(1)
    want = sorted(((float(p[q, c] * mask_quality(masks)[q]), q, [4, 8, 9][c]) for q in range(5) for c in range(3)), reverse=True)
    want = [w for w in want if w[0] > .1]
    assert [(round(s, 5), q, c) for s, q, c in zip(found.scores.tolist(), found.queries.tolist(), found.labels.tolist())] == [(round(s, 5), q, c) for s, q, c in want]
    assert torch.equal(found.masks, masks[found.queries] > 0)


def test_identities_and_joined_lists():
    masks = torch.randn(3, 4, 4)
    logits = torch.tensor([[3., 0.], [-3., 0.], [1., 0.]])
    found = find_identities(logits, masks, torch.tensor([10, 11, 12]), threshold=.3)
    assert found.labels.tolist() == [10, 12]
    both = join_found([found, found], top=3)
    assert len(both) == 3 and both.scores.diff().max() <= 0
    empty = find_identities(logits[:0], masks[:0], torch.zeros(0).long())
    assert len(empty) == 0 and len(join_found([empty])) == 0


def test_boxes():
    m = torch.zeros(2, 6, 8, dtype=torch.bool); m[0, 1:4, 2:7] = True
    assert mask_boxes(m).tolist() == [[2, 1, 7, 4], [0, 0, 0, 0]]
    assert mask_boxes(m, official=True).tolist()[0] == [2, 1, 6, 3]


# ---- the prior map

def test_prior_map_by_loops():
    g = torch.Generator().manual_seed(0)
    t, k = F.normalize(torch.randn(5, 3, 4, generator=g), dim=0), F.normalize(torch.randn(9, 5, generator=g), dim=1)
    cover = torch.tensor([1., .6, .5, .3, .05, .04, 0., 0., 1.])
    got = prior_map(t, k, cover)
    p, q = torch.zeros(3, 4), torch.zeros(3, 4)
    for y in range(3):
        for x in range(4):
            p[y, x] = max(float(k[i] @ t[:, y, x]) for i in (0, 1, 8))
            q[y, x] = max(float(k[i] @ t[:, y, x]) for i in (5, 6, 7))
    close(got[0], 2 * (p - q), 1e-5); close(got[1], p - p.mean(), 1e-5)


def test_prior_of_a_speck_and_of_a_full_picture():
    t, k = torch.rand(4, 2, 2), torch.rand(3, 4)
    speck = prior_map(t, k, torch.tensor([.2, .1, 0.]))
    close(speck, prior_map(t, k, torch.tensor([1., .1, 0.])))
    full = prior_map(t, k, torch.ones(3))
    assert torch.isfinite(full).all() and full[0].mean().abs() < 1e-5


def test_prior_finds_the_object_in_its_own_picture():
    m = cnn(prior=True)
    x, ids = scene(size=(128, 192), ids=(1,))
    with torch.no_grad():
        s = m.see(x)
        maps = m.priors(m.mark([s], read_marks(ids)), [s])[0]
    inside = F.adaptive_avg_pool2d((ids > 0).float()[None], s.features.shape[1:])[0]
    assert maps[0][inside > .9].min() > maps[0][inside == 0].max()


def test_maps_of_strides_join():
    fine, mid, coarse = torch.rand(1, 2, 8, 8), torch.rand(1, 3, 4, 4), torch.rand(1, 4, 2, 2)
    j = join_maps([fine, mid, coarse], (4, 4))
    assert j.shape == (1, 9, 4, 4) and torch.equal(j[:, 2:5], mid)
    close(j[0, 0, 0, 0], fine[0, 0, :2, :2].mean())
    keys = match_keys([mid, coarse], (4, 4))
    close(keys.norm(dim=1), torch.ones(1, 4, 4))
    both = sum(F.cosine_similarity(m[0, :, 1, 1], m[0, :, 2, 0], dim=0) for m in (mid, F.interpolate(coarse, (4, 4), mode="bilinear"))) / 2
    close((keys[0, :, 1, 1] * keys[0, :, 2, 0]).sum(), both)


def test_keyed_prompts_join_and_part():
    m = cnn(prior=True)
    (x, a), (y, b) = scene(0, (128, 128)), scene(1, (128, 128), ids=(2, 3))
    with torch.no_grad(): s, t = m.see(x), m.see(y)
    p, q = m.mark([s], read_marks(a)), m.mark([t], read_marks(b))
    both, once = join_keyed([p, q]), m.mark([s, t], read_marks([a, b]))
    assert both.sem_labels.tolist() == [1, 2, 3]
    close(both.keys, once.keys); close(both.cover, once.cover); close(both.sem_tokens, once.sem_tokens, 1e-4)
    two = only_class(both, 2)
    assert two.sem_labels.tolist() == [2] and set(two.id_labels.tolist()) == {2} and two.cover.shape[1] == 1
    assert torch.equal(two.to("cpu").keys, both.keys)
    with pytest.raises(DataError, match="one of"): only_class(both, 9)
    with pytest.raises(DataError, match="some with cells"): join_keyed([p, replace(model().mark([model().see(x)], read_marks(a)), source=p.source)])
    with pytest.raises(DataError, match="prior=True"): m(Prompt(**Prompt.tensors(p)), s)


def test_unknown_pixels_are_no_background_of_the_prior():
    m = cnn(prior=True)
    x, ids = scene(size=(128, 128), ids=(1,))
    with torch.no_grad(): s = m.see(x)
    lost = torch.zeros_like(ids, dtype=torch.bool); lost[64:] = True
    p, q = m.mark([s], read_marks(ids)), m.mark([s], read_marks(ids), unknown=[lost])
    assert len(p.keys) == 64 and len(q.keys) == 32


# ---- the model

def test_counts_of_the_paper():
    with torch.device("meta"): m = create_sine(SineConfig.paper(), device="meta", pretrained=False)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(m.neck) == 852_992 and count(m.decoder) == 17_924_228
    assert count(m.neck) + count(m.decoder) == 18_777_220 == sum(p.numel() for p in m.parameters() if p.requires_grad)
    assert count(m.backbone) == 304_368_640 - 1024                                 # theirs counts an unused mask token
    assert count(m) == 323_145_860 - 1024
    assert count(m.decoder.interaction) == 1_578_752 and count(m.decoder.layers) == 15_780_864


def test_mini_has_a_million_weights():
    m = create_sine(SineConfig.mini(), eyes("efficientnet-lite0-imagenet"))
    n = sum(p.numel() for p in m.parameters() if p.requires_grad)
    assert 1.0e6 < n < 1.1e6 and not hasattr(m, "prior_net")
    with torch.no_grad(): s = m.see(torch.rand(3, 252, 448))
    assert s.features.shape == (128, 18, 32) and s.fine.shape == (40, 36, 64) and s.keys is None


def test_only_the_trained_part_trains():
    m = cnn(prior=True, lateral=True, standard=True)
    m.train()
    assert not m.backbone.training and m.decoder.training
    x, ids = scene(size=(64, 64))
    raws = m.look([x, x.flip(2)])
    assert not any(t.requires_grad for r in raws for t in r.maps)
    ref, tar = m.seen(raws)
    out = m(m.mark([ref], read_marks(ids)), tar, deep=True)
    sum(getattr(out, n)[torch.isfinite(getattr(out, n))].square().mean() for n in FIELDS).backward()
    lost = [n for n, p in m.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [n for n in lost if not n.endswith(("bias", "in_proj_bias"))], lost
    assert all(p.grad is None for p in m.backbone.parameters())


def test_features_before_the_last_norm():
    b = eyes()
    x = torch.rand(1, 3, 64, 96)
    for norm in (True, False):
        m = model(norm=norm)
        with torch.no_grad(): close(m.encode(x), m.neck(b.tokens(x, norm=norm)))
    assert SineConfig.paper().norm is False and SineConfig.mini().norm is True


def test_look_and_seen_are_see():
    m = cnn(lateral=True, prior=True)
    a, b = torch.rand(3, 64, 96), torch.rand(3, 64, 96)
    with torch.no_grad():
        both, alone = m.seen(m.look([a, b])), [m.see(a), m.see(b)]
    for s, t in zip(both, alone):
        for n in ("features", "fine", "keys"): close(getattr(s, n), getattr(t, n), 1e-4)
    with torch.no_grad(): small = m.look([a, torch.rand(3, 96, 96)], "target")        # two sizes: one after the other
    assert small[1].view.padded == (96, 96)
    half = [replace(r, maps=tuple(t.half() for t in r.maps)) for r in m.look([a])]
    with torch.no_grad(): close(m.seen(half)[0].features, alone[0].features, 2e-2)


def test_passes_are_counted():
    m = model()
    m.look(torch.rand(3, 3, 64, 64)); m.see(torch.rand(3, 64, 64))
    assert m.passes == 4


def test_a_batch_is_the_single_ones():
    m = cnn(lateral=True, prior=True)
    x, ids = scene(size=(64, 96)); y = scene(3, (64, 96))[0]
    with torch.no_grad():
        s = m.seen(m.look([x, y]))
        p = m.mark([s[0]], read_marks(ids)); q = only_class(p, 2)
        out = m([p, q], [s[1], s[0]])
        one, two = m(p, s[1]), m(q, s[0])
    close(out.ins_masks[:1], one.ins_masks, 1e-4); close(out.ins_masks[1:], two.ins_masks, 1e-4)
    close(out.ins_logits[:1], one.ins_logits, 1e-4); close(out.id_masks[1:, :1], two.id_masks, 1e-4)


def test_without_options_it_is_the_plain_decoder():
    m = model()
    x, ids = scene()
    with torch.no_grad():
        s = m.see(x); p = m.mark([s], read_marks(ids))
        alike(m(p, s), m.decoder(p, s.features[None], s.pixels[None]))
        assert m._plus(p, [s]) is None
        two = m.ask(p, s, apart=True)
    assert len(two) == 2 and len(m.ask(p, s)) == 1
    alike(two[1][1], m(only_class(p, 2), s))


@pytest.mark.parametrize("which", ["prior", "lateral"])
def test_options_change_masks(which):
    m = cnn(**{which: True})
    x, ids = scene(size=(64, 96))
    with torch.no_grad():
        s = m.see(x); p = m.mark([s], read_marks(ids))
        a, b = m(p, s), m.decoder(p, s.features[None], s.pixels[None])
    assert (a.ins_masks - b.ins_masks).abs().max() > 1e-3


def test_measure_standardises():
    m = cnn(standard=True)
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = m.source()
    raws = m.look(x)
    m.measure(raws)
    z = torch.cat([join_maps([t[None] for t in r.maps], (4, 4)) for r in raws])
    z = (z - m.shift[:, None, None]) / m.spread[:, None, None]
    alive = m.spread > 1e-5
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3), correction=0)[alive] - 1).abs().max() < 1e-2
    assert m.source() != before                                                      # other tokens, other name
    with pytest.raises(ConfigError, match="standard=True"): cnn().measure(raws)
    with pytest.raises(DataError, match="some training pictures"): m.measure([])


def test_settings_that_a_backbone_cannot_follow():
    with pytest.raises(ConfigError, match="a CNN with several strides"): model(lateral=True)
    with pytest.raises(ConfigError, match="match"): cnn(match=(4,))
    with pytest.raises(ConfigError, match="grid"): cnn(grid=4)


def test_source_tells_weights_and_settings():
    a = model()
    assert a.source() == model().source() == a.source()
    assert a.source() != model(seed=1).source() and a.source() != model(norm=False).source()
    with torch.no_grad(): a.neck[0].weight.mul_(2)
    assert a.source() != model().source()


def test_masks_must_have_the_size_of_their_picture():
    m = model()
    x, ids = scene()
    with pytest.raises(DataError, match="mask of reference 0"): m.mark([m.see(x)], Marks([ids[:32] > 0], [1]))
    with pytest.raises(DataError, match="no pixel"): m.mark([m.see(x)], Marks([ids > 9], [1]))
    with pytest.raises(DataError, match="(?s)photo: .*at least a patch"): m.see(torch.rand(3, 5, 64), "photo")
    with pytest.raises(DataError, match="photo"): m.see(torch.rand(5, 64, 64), "photo")


# ---- released weights

def official_names(depth=24, layers=6, D=1024, d=256, mlp=2048):
    "Names and sizes of the released model, as the notes on it list them."
    enc = {"cls_token": (1, 1, D), "pos_embed": (1, 1370, D), "mask_token": (1, D), "patch_embed.proj.weight": (D, 3, 14, 14),
           "patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,)}
    for n in range(depth):
        enc |= {f"blocks.{n}.{k}": s for k, s in {
            "norm1.weight": (D,), "norm1.bias": (D,), "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,), "attn.proj.weight": (D, D),
            "attn.proj.bias": (D,), "ls1.gamma": (D,), "norm2.weight": (D,), "norm2.bias": (D,), "mlp.fc1.weight": (4 * D, D),
            "mlp.fc1.bias": (4 * D,), "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,), "ls2.gamma": (D,)}.items()}
    neck = {"0.weight": (d, D, 1, 1), "1.weight": (d,), "1.bias": (d,), "2.weight": (d, d, 3, 3), "3.weight": (d,), "3.bias": (d,)}
    attn = lambda name, inner: {f"{name}.{inner}.{k}": s for k, s in {"in_proj_weight": (3 * d, d), "in_proj_bias": (3 * d,),
                                "out_proj.weight": (d, d), "out_proj.bias": (d,)}.items()} | norm(name)
    norm = lambda name: {f"{name}.norm.{k}": (d,) for k in ("weight", "bias")}
    ffn = lambda name: {f"{name}.linear1.weight": (mlp, d), f"{name}.linear1.bias": (mlp,), f"{name}.linear2.weight": (d, mlp), f"{name}.linear2.bias": (d,)} | norm(name)
    dec = {"temp": (), "logit_scale": (), "decoder_norm.weight": (d,), "decoder_norm.bias": (d,), "query_feat.weight": (200, d), "query_embed.weight": (200, d),
           "query_grained_embed.weight": (3, d), "id_class_embed.weight": (2, d), "id_class_embed.bias": (2,), "neg_class_embed.weight": (1, d),
           "mask_feat_layer.0.weight": (d, d // 2, 2, 2), "mask_feat_layer.0.bias": (d // 2,), "mask_feat_layer.1.weight": (d // 2,), "mask_feat_layer.1.bias": (d // 2,),
           "mask_feat_layer.3.weight": (d // 2, d, 2, 2), "mask_feat_layer.3.bias": (d,)}
    for n in range(3): dec |= {f"mask_embed.layers.{n}.weight": (d, d), f"mask_embed.layers.{n}.bias": (d,)}
    own, cross = ("transformer_self_attention_layer", "self_attn"), ("transformer_cross_attention_layer", "multihead_attn")
    for n in range(layers):
        at = f"transformer_layers.{n}."
        dec |= attn(at + own[0], own[1]) | attn(at + cross[0], cross[1]) | ffn(at + "transformer_ffn_layer1") | ffn(at + "transformer_ffn_layer2")
    at = "fusion_layers.0."
    dec |= attn(at + own[0], own[1]) | attn(at + cross[0], cross[1]) | ffn(at + "transformer_ffn_layer")
    out = {}
    for p, part in (("image_encoder.encoder.", enc), ("image_encoder.neck.", neck), ("transformer_decoder.", dec)): out |= {p + k: s for k, s in part.items()}
    return out


def made(sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k: .05 * torch.randn(s, generator=g) + (1. if "norm" in k and k.endswith("weight") else 0) for k, s in sizes.items()}


def small_release(**more):
    "A whole checkpoint of the released shape, tiny. Width 384 has 6 heads: a ViT-S with 2 blocks and a 37 x 37 table."
    return made(official_names(2, 2, 384, 32, 48)) | more


def test_every_released_name_finds_its_place_at_full_size():
    sizes = official_names()
    assert len(sizes) == 533
    assert sum(math.prod(s) for s in sizes.values()) == 323_145_860
    empty = {k: torch.zeros(1).expand(s) if s else torch.zeros(()) for k, s in sizes.items()}
    parts = split_release(empty)
    with torch.device("meta"): m = create_sine(SineConfig.paper(), device="meta", pretrained=False)
    from timet_nb.features.keys import remap
    for part, state in ((m.neck, parts["neck"]), (m.decoder, parts["decoder"]), (m.backbone.vit, remap(parts["encoder"], "dinov2")[0])):
        r = compare(part, state)
        assert not (r.missing or r.unexpected or r.mismatched), r.show()
    assert not parts["left"] and not parts["bank"]


def test_release_loads_with_a_full_report():
    state = small_release(**{"criterion.empty_weight": torch.ones(2), "odd.thing": torch.ones(1)})
    m, report = load_release(state, heads=4)
    assert [len(r.matched) for r in (report.encoder, report.neck, report.decoder)] == [34, 6, len(parts_of(state, "transformer_decoder."))]
    text = report.show()
    assert "criterion.empty_weight" in text and "odd.thing" in text and "image_encoder.encoder.mask_token" in report.left
    assert m.config.decoder.depth == 2 and m.config.decoder.dim == 32 and m.config.official and m.backbone.dim == 384
    close(m.neck[0].weight, state["image_encoder.neck.0.weight"]); close(m.decoder.temp, state["transformer_decoder.temp"])
    close(m.backbone.vit.blocks[1].attn.qkv.weight, state["image_encoder.encoder.blocks.1.attn.qkv.weight"])


def parts_of(state, prefix): return [k for k in state if k.startswith(prefix)]


def test_wrappers_order_and_a_file(tmp_path):
    state = small_release()
    a = load_release(state, heads=4)[0]
    turned = {f"module.{k}": state[k] for k in reversed(list(state))}
    path = tmp_path / "pytorch_model.bin"; torch.save({"module": turned, "global_steps": 3}, path)
    b = load_release(path, heads=4)[0]
    for (n, x), y in zip(a.state_dict().items(), b.state_dict().values()): assert torch.equal(x, y), n


def test_file_without_encoder_goes_over_the_backbone_given():
    state = {k: v for k, v in small_release().items() if "encoder.encoder" not in k}
    with pytest.raises(CheckpointError, match="no encoder in it"): load_release(state, heads=4)
    own = {k: v for k, v in made(official_names(2, 2, eyes().dim, 32, 48)).items() if "encoder.encoder" not in k}
    m, report = load_release(own, eyes(), heads=4)
    assert report.encoder is None and "not in the file" in report.show() and m.backbone is eyes()


def test_broken_files_are_named():
    state = small_release()
    with pytest.raises(CheckpointError, match="image_encoder.encoder"): load_release({"a.weight": torch.ones(1)})
    lost = {k: v for k, v in state.items() if k != "image_encoder.neck.2.weight"}
    with pytest.raises(CheckpointError, match="neck of SINE"): load_release(lost, heads=4)
    assert load_release(lost, heads=4, min_fraction=.5)[1].neck.missing == ["2.weight"]
    bad = state | {"transformer_decoder.temp": torch.tensor(math.nan)}
    with pytest.raises(CheckpointError, match="(?s)decoder of SINE.*NaN"): load_release(bad, heads=4)
    wide = state | {"transformer_decoder.mask_embed.layers.0.bias": torch.ones(33)}
    with pytest.raises(CheckpointError, match="decoder of SINE"): load_release(wide, heads=4)


def test_bank_in_a_file():
    bank = dict(id_labels=torch.tensor([[1, 2]]), id_queries=torch.rand(1, 2, 32), seg_labels=torch.tensor([[7, 3]]), seg_queries=torch.rand(1, 2, 32))
    _, report = load_release(small_release(**bank), heads=4)
    assert report.bank.sem_labels.tolist() == [3, 7] and torch.equal(report.bank.sem_tokens[0], bank["seg_queries"][0, 1])
    assert "bank" in report.show()
    with pytest.raises(CheckpointError, match="no seg_queries"): load_release(small_release(**{k: v for k, v in bank.items() if k != "seg_queries"}), heads=4)


@pytest.mark.parametrize("half", [False, True])
def test_saved_and_loaded_is_the_same(tmp_path, half):
    m = cnn(lateral=True, prior=True, standard=True)
    x, ids = scene(size=(64, 96))
    m.measure(m.look([x]))
    path = m.save(tmp_path / "m.safetensors", half, dict(seed=4))
    n = load_sine(path, eyes("efficientnet-lite0-imagenet"))
    assert n.config == m.config
    with torch.no_grad():
        s, t = m.see(x), n.see(x)
        a, b = m(m.mark([s], read_marks(ids)), s), n(n.mark([t], read_marks(ids)), t)
    if half: assert (a.ins_masks - b.ins_masks).abs().mean() < .05 * a.ins_masks.abs().mean()
    else: alike(a, b, 1e-7)
    assert not any(k.startswith("backbone") for k in load_state(path)) and set(trained_state(m)) == set(load_state(path))


def test_mini_fits_in_six_megabytes(tmp_path):
    m = create_sine(SineConfig.mini(prior=True), eyes("efficientnet-lite0-imagenet"))
    assert m.save(tmp_path / "mini.safetensors", half=True).stat().st_size < 6e6


def test_loading_refuses_other_eyes_and_other_files(tmp_path):
    path = model().save(tmp_path / "m.safetensors")
    other = eyes().random_like(5)
    with pytest.raises(CheckpointError, match="other features"): load_sine(path, other)
    assert isinstance(load_sine(path, other, strict=False), Sine)
    save_state(tmp_path / "x.safetensors", dict(a=torch.ones(1)), dict(kind="other"))
    with pytest.raises(CheckpointError, match="no model of ours"): load_sine(tmp_path / "x.safetensors")


# ---- the memory

def test_decay_by_hand():
    assert decay("linear", 5) == .75 and decay("linear", 20) == 0 == decay("linear", 30)
    assert decay("ellipse", 12) == pytest.approx(.8) and decay("constant", 14) == 1 and decay("constant", 15) == 0
    assert all(decay(k, 0) == 1 for k in DECAYS) and decay("exp", 100, 0) == 1
    with pytest.raises(ConfigError, match="linear, ellipse"): decay("fast", 1)


def test_memory_keeps_the_first_and_the_best():
    m = FrameMemory(3)
    assert m.add(0, .1) == [] and m.add(1, .5) == [] and m.add(2, .9) == []
    assert m.add(3, .2) == [3] and m.frames == [0, 1, 2]                  # the newcomer itself
    assert m.add(4, .8) == [1] and m.frames == [0, 2, 4]
    assert m.add(30, .01, "x") == [4] and m.frames == [0, 2, 30] and m.items == [None, None, "x"]
    with pytest.raises(DataError, match="above 30"): m.add(30, .5)
    with pytest.raises(ConfigError, match="size"): FrameMemory(1, keep_last=True)


def test_overlaps():
    logits = torch.tensor([[[3., 3., -1.]], [[1., -1., -2.]]])
    assert resolve(logits, [4, 9]).tolist() == [[4, 4, 0]]
    assert resolve(logits, [4, 9], "highest").tolist() == [[9, 4, 0]]
    assert resolve(torch.zeros(0, 2, 2), []).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ConfigError, match="best or highest"): resolve(logits, [1, 2], "first")


# ---- a video

def film(T=9, size=(64, 96), seed=0):
    "Two squares that move a little from frame to frame."
    g = torch.Generator().manual_seed(seed)
    frames, ids = .2 * torch.rand(T, 3, *size, generator=g), torch.zeros(T, *size, dtype=torch.long)
    for t in range(T):
        ids[t, 8:32, 4 + 3 * t:28 + 3 * t] = 1
        ids[t, 36:60, 60 - 2 * t:80 - 2 * t] = 2
        for k in (1, 2): frames[t, k][ids[t] == k] += .7
    return frames.clamp(0, 1), ids


def the_authors_way(m, frames, first, overlap):
    "Pictures and masks are remembered; every one is encoded again for every object at every step."
    c, held, out = m.config, {}, []
    for t, frame in enumerate(frames):
        if t == 0:
            ids, sure = first, {k: 1. for k in first.unique().tolist() if k}
        else:
            prompts = []
            for k in sorted(held):
                again = [m.see(x) for x, _ in held[k].items]
                masks = [mask for _, mask in held[k].items]
                prompts.append(m.mark(again, Marks(masks, [k] * len(masks), [k] * len(masks), list(range(len(masks))))))
            seen = m.see(frame)
            asked = prompts if c.prior else [join_prompts(prompts, same=True)]
            outs = [m(p, seen) for p in asked]
            logits = bring_back(torch.cat([o.id_masks[0] for o in outs]), seen.view)
            here = torch.cat([o.id_logits[0] for o in outs]).softmax(-1)[:, 0] * mask_quality(logits)
            ids, sure = resolve(logits, sorted(held), overlap), dict(zip(sorted(held), here.tolist()))
        for k in sure:
            if (ids == k).any(): held.setdefault(k, FrameMemory(c.memory, c.decay, c.reach)).add(t, sure[k], (frame, ids == k))
        out.append(ids)
    return torch.stack(out), {k: v.frames for k, v in held.items()}


@pytest.mark.parametrize("which,overlap", [("vit", "best"), ("vit", "highest"), ("prior", "best")])
@torch.no_grad()
def test_tracking_is_what_encoding_everything_again_gives(which, overlap):
    m = cnn(prior=True, memory=3, seed=6) if which == "prior" else model(memory=3, seed=8)   # seeds that hold both objects
    frames, ids = film(7)
    m.passes = 0
    tracker = VideoTracker(m, overlap)
    got = torch.stack([tracker.step(f, ids[0] if t == 0 else None) for t, f in enumerate(frames)])
    assert m.passes == len(frames)                                                   # one look a frame
    m.passes = 0
    want, held = the_authors_way(m, frames, ids[0], overlap)
    assert m.passes > 2 * len(frames)
    assert {k: v.frames for k, v in tracker.memories.items()} == held
    assert (got != want).float().mean() < 1e-3                                       # a pixel at logit 0 may fall either way
    assert want[1:].unique().numel() == 3 and (want[1:] > 0).float().mean() < .9     # the masks mean something


def test_track_of_a_segmenter():
    s = SineSegmenter(model())
    frames, ids = film(4)
    out = list(s.track(frames, masks=ids[0]))
    assert len(out) == 4 and torch.equal(out[0], ids[0]) and out[1].shape == (64, 96)
    assert torch.equal(torch.stack(out), torch.stack(list(s.track(iter(frames), masks={0: ids[0]}))))
    p = s.prompt(frames[0], ids[0])
    each = list(s.track(frames, p))
    assert torch.equal(each[2], s.segment(frames[2], p).ids)
    assert list(s.track(frames[:1], p, answers=True))[0].names == ("1", "2")
    with pytest.raises(DataError, match="both prompt and masks"): s.track(frames, p, masks=ids[0])
    with pytest.raises(DataError, match="neither"): s.track(frames)


def test_video_of_one_frame_and_none():
    s = SineSegmenter(model())
    frames, ids = film(1)
    assert [x.tolist() for x in s.track(frames, masks=ids[0])] == [ids[0].tolist()]
    with pytest.raises(DataError, match="no frame"): list(s.track(frames[:0], masks=ids[0]))


def test_frames_of_changing_size():
    s = SineSegmenter(model())
    frames, ids = film(2)
    with pytest.raises(DataError, match=r"frame 1: got \(32, 48\)"): list(s.track([frames[0], frames[1, :, :32, :48]], masks=ids[0]))


def test_objects_that_appear_late():
    s = SineSegmenter(model())
    frames, ids = film(5)
    one = torch.where(ids[0] == 1, 1, 0)
    out = list(s.track(frames, masks={1: one, 3: ids[3]}))
    assert not out[0].any()                                                          # nobody is known yet
    assert set(out[1].unique().tolist()) == {0, 1} and 2 not in out[2] and (out[3] == 2).equal(ids[3] == 2)
    void = ids[3].clone(); void[:4] = 255
    assert 255 not in list(s.track(frames, masks={1: one, 3: void}))[3]
    with pytest.raises(DataError, match="the video has no other"): list(s.track(frames, masks={0: one, 7: one}))
    with pytest.raises(DataError, match="no object"): list(s.track(frames, masks=torch.zeros_like(one)))
    with pytest.raises(DataError, match="mask of frame 0"): list(s.track(frames, masks=one[:32]))
    with pytest.raises(DataError, match="one frame's ids"): list(s.track(frames, masks={}))
    with pytest.raises(ConfigError, match="best or highest"): list(s.track(frames, masks=one, overlap="first"))


def test_an_object_out_of_sight_stores_nothing():
    m = model()
    frames, ids = film(3)
    tracker = VideoTracker(m)
    tracker.step(frames[0], ids[0])
    tracker.scores = {1: .5, 2: .5}
    tracker.time += 1
    tracker._remember(m.see(frames[1]), torch.where(ids[1] == 1, 1, 0))
    assert tracker.memories[1].frames == [0, 1] and tracker.memories[2].frames == [0]


# ---- the segmenter

def test_three_answers_have_the_size_of_the_picture():
    s = SineSegmenter(model(), sure=.01)
    x, ids = scene()
    p = s.prompt(x, ids, {1: "pear", 2: "fig"})
    assert p.names == ("fig", "pear") and p.shots == (1, 1)
    a = s.segment(torch.rand(3, 40, 72), p)
    assert a.scores.shape == a.identity.shape == a.soft.shape == (2, 40, 72) and a.ids.shape == (40, 72)
    assert a.scores.max() <= 1 and set(a.ids.unique().tolist()) <= {0, 1, 2}
    assert len(a.found) and a.found.masks.shape[1:] == (40, 72) and set(a.found.labels.tolist()) <= {1, 2}
    assert len(a.instances) == len(a.found) and len(a.objects) <= 2


def test_threshold_and_sureness():
    x, ids = scene()
    m = model()
    low, high = SineSegmenter(m, threshold=0., sure=0.), SineSegmenter(m, threshold=9., sure=1.)
    p = low.prompt(x, ids)
    a, b = low.segment(x, p), high.segment(x, p)
    assert a.ids.all() and not b.ids.any() and len(a.found) > len(b.found) == 0 == len(b.objects)
    close(a.soft, b.soft)
    mid = SineSegmenter(m, sure=float(a.found.scores.median())).segment(x, p)            # likely queries first: the same list
    assert torch.equal(mid.found.scores, a.found.scores[a.found.scores > a.found.scores.median()])
    assert torch.equal(mid.found.queries, a.found.queries[:len(mid.found)]) and torch.equal(mid.found.masks, a.found.masks[:len(mid.found)])


def test_a_prompt_is_made_once(tmp_path):
    m = model()
    s = SineSegmenter(m)
    x, ids = scene()
    p = s.prompt(x, ids); m.passes = 0
    answers = [s.segment(scene(n)[0], p) for n in range(1, 6)]
    assert m.passes == 5
    again = s.segment(scene(1)[0], load_prompt(p.save(tmp_path / "p.safetensors")))
    close(again.soft, answers[0].soft)
    s.segment(x, p); s.segment(x, p); assert m.passes == 5                               # a picture seen last is not encoded again


def test_saved_prior_prompt(tmp_path):
    s = SineSegmenter(cnn(prior=True))
    x, ids = scene(size=(64, 96)); p = s.prompt(x, ids)
    q = load_prompt(p.save(tmp_path / "p.safetensors"))
    close(s.segment(x, p).soft, s.segment(x, q).soft)


def test_shots_of_one_class_and_same_objects():
    s = SineSegmenter(model())
    (x, a), (y, b) = scene(0, ids=(1,)), scene(1, size=(48, 80), ids=(1,))
    p = s.prompt([x, y], [a, b], ["pear", "pear"])
    assert p.names == ("pear",) and p.shots == (2,) and len(p.tensors["ids"]) == 2
    q = s.prompt([x, y], [a, b], ["pear", "pear"], same=True)
    assert q.tensors["ids"].tolist() == [1] and q.tensors["id_areas"].item() == p.tensors["id_areas"].sum().item()
    close(q.tensors["sem_tokens"], p.tensors["sem_tokens"])


def test_unknown_pixels_of_a_reference_belong_to_nobody():
    s = SineSegmenter(model())
    x, ids = scene()
    void = torch.where(ids == 2, 255, ids)
    assert s.prompt(x, void).names == ("object",)
    close(s.prompt(x, void).tensors["id_tokens"], s.prompt(x, torch.where(ids == 2, 0, ids)).tensors["id_tokens"])


FAULTS = [
    ("empty mask", lambda s, x, m: s.prompt(x, torch.zeros_like(m)), "no object: every pixel is 0 or 255"),
    ("only unknown", lambda s, x, m: s.prompt(x, torch.full_like(m, 255)), "no object"),
    ("mask of another size", lambda s, x, m: s.prompt(x, m[:32]), "as its picture"),
    ("no reference", lambda s, x, m: s.prompt([], []), "references"),
    ("one mask too few", lambda s, x, m: s.prompt([x, x], [m]), "as many of both"),
    ("clashing labels", lambda s, x, m: s.prompt([x, x], [m, m], ["cat", "dog"]), "one name a pixel"),
    ("one object, two classes", lambda s, x, m: s.prompt([x, scene(1)[0]], [m, m], ["cat", "dog"], same=True), "one class an object"),
    ("label of nobody", lambda s, x, m: s.prompt(x, m, {1: "cat", 2: "dog", 3: "hen"}), "hen"),
    ("target below a patch", lambda s, x, m: s.segment(torch.rand(3, 64, 6), s.prompt(x, m)), "target: .*at least a patch of 8"),
    ("target of bytes above 1", lambda s, x, m: s.segment(255 * x, s.prompt(x, m)), "target"),
    ("no prompt", lambda s, x, m: s.segment(x, None), "a Prompt"),
    ("reference below a patch", lambda s, x, m: s.prompt(x[:, :5], m[:5].clamp(min=1)), "reference 0: .*at least a patch"),
]


@pytest.mark.parametrize("what,do,says", FAULTS, ids=[f[0] for f in FAULTS])
def test_faults_are_named(what, do, says):
    with pytest.raises(DataError, match=f"(?s){says}"): do(SineSegmenter(model()), *scene())


def test_prompt_of_another_model_is_refused():
    x, ids = scene()
    p = SineSegmenter(model()).prompt(x, ids)
    for other in (model(seed=1), model(norm=False), cnn()):
        with pytest.raises(DataError, match="another backbone or other settings"): SineSegmenter(other).segment(x, p)
        with pytest.raises(DataError, match="another backbone or other settings"): list(SineSegmenter(other).track(x[None], p))
    with pytest.raises(ConfigError, match="create_sine"): SineSegmenter(eyes())


@pytest.mark.parametrize("size", [(64, 64), (40, 200), (200, 40), (8, 8)])
def test_pictures_of_any_proportions(size):
    s = SineSegmenter(model())
    x, ids = scene()
    a = s.segment(torch.rand(3, *size), s.prompt(x, ids))
    assert a.soft.shape[1:] == size and torch.isfinite(a.soft).all()


def test_padding_changes_nothing_that_is_seen_when_it_is_masked():
    "With mask_padding a larger canvas moves answers little; a target in the corner keeps its place."
    x, ids = scene(size=(64, 64))
    m = model(size=(64, 64), pad=96)
    with torch.no_grad(): s = m.see(x)
    assert s.pixels.sum() == 64 and s.pixels.shape == (12, 12)
    a = SineSegmenter(m); out = a.segment(x, a.prompt(x, ids))
    assert out.ids.shape == (64, 64)


def test_classes_apart_with_a_prior():
    x, ids = scene(size=(64, 96))
    m = cnn(prior=True)
    both, alone = SineSegmenter(m), SineSegmenter(m)
    p, q = both.prompt(x, ids), alone.prompt(x, torch.where(ids == 2, 2, 0))
    close(both.segment(x, p).soft[1], alone.segment(x, q).soft[0], 1e-4)                 # the other class does not disturb
    joint = SineSegmenter(m, apart=False).segment(x, p)
    assert joint.soft.shape == (2, 64, 96)


# ---- evaluations

def test_few_shot_evaluation_takes_the_segmenter(tmp_path):
    names, items = ("background", "x", "y"), []
    for n, c in enumerate((1, 1, 2, 2)):
        x, ids = scene(n, ids=(c,))
        a, b = tmp_path / f"{n}.png", tmp_path / f"m{n}.png"
        write_image(a, x); write_mask(b, ids)
        items.append(Item(f"p{n}", a, b, f"g{n}", "ids"))
    source = class_pairs(ClassSet(names, tuple(items)))
    r = evaluate_incontext(SineSegmenter(model()), all_episodes(source))
    assert len(r.rows) == 4 and 0 <= r.miou <= 1 and 0 <= r.wrong_absent <= 1


def toy_coco(root, n=3):
    "Pictures with a square of class 5 (a polygon) and one of class 9, and a crowd in the first."
    images, notes = [], []
    for i in range(n):
        x, ids = scene(i)
        write_image(root / f"{i}.png", x); images.append(dict(id=i, file_name=f"{i}.png", height=64, width=96))
        for k, c in ((1, 5), (2, 9)):
            ys, xs = (ids == k).nonzero().T
            y0, y1, x0, x1 = ys.min().item(), ys.max().item() + 1, xs.min().item(), xs.max().item() + 1
            notes.append(dict(id=len(notes), image_id=i, category_id=c, iscrowd=0, area=(y1 - y0) * (x1 - x0), segmentation=[[x0, y0, x1, y0, x1, y1, x0, y1]]))
    notes.append(dict(id=99, image_id=0, category_id=5, iscrowd=1, area=96, segmentation=dict(size=[64, 96], counts=[0, 1] + [64 * 96 - 1])))
    (root / "instances.json").write_text(json.dumps(dict(images=images, annotations=notes, categories=[dict(id=9, name="b"), dict(id=5, name="a")])))
    return root / "instances.json"


def test_annotated_pictures(tmp_path):
    rows = list(read_pictures(toy_coco(tmp_path)))
    x, o = rows[0]
    assert x.shape == (3, 64, 96) and o.labels.tolist() == [1, 2, 1] and o.crowd.tolist() == [False, False, True]
    true = scene(0)[1] == 1                                                          # a polygon's border may be a pixel more
    assert (o.masks[0] & true).sum() / (o.masks[0] | true).sum() > .9 and o.areas.tolist() == [576, 576, 96]


def test_few_shot_instances(tmp_path):
    pictures = list(read_pictures(toy_coco(tmp_path)))
    s = SineSegmenter(model())
    bank = s.bank(pictures[:2], ("a", "b"))
    assert bank.shots == (2, 2) and bank.tensors["sem_areas"].shape == (2,) and len(bank.tensors["ids"]) == 0
    got = evaluate_instances(s, bank, pictures)
    assert set(got) == {"mask", "box"} and got["mask"].pictures == 3 and 0 <= got["mask"].ap <= 1
    with pytest.raises(DataError, match="no shot of 'c'"): s.bank(pictures, ("a", "b", "c"))
    one = s.model.mark([s.model.see(pictures[0][0])], Marks(list(pictures[0][1].masks[:2]), [1, 2]))
    two = s.model.mark([s.model.see(pictures[1][0])], Marks(list(pictures[1][1].masks), pictures[1][1].labels))
    close(bank.tensors["sem_tokens"], join_prompts([one, two]).sem_tokens)


def test_instances_that_equal_the_truth_score_one(tmp_path, monkeypatch):
    "A model that answers with the truth: the whole path from answers to AP."
    pictures = list(read_pictures(toy_coco(tmp_path)))
    s = SineSegmenter(model()); bank = s.bank(pictures, ("a", "b"))
    table = {x.numpy().tobytes(): o for x, o in pictures}
    class Right:
        def __init__(self, o): self.found = Found(torch.linspace(.9, .5, 2), o.labels[:2], o.masks[:2], torch.arange(2))
    asked = []
    monkeypatch.setattr(SineSegmenter, "segment", lambda self, x, p: asked.append(self.sure) or Right(table[x.numpy().tobytes()]))
    got = evaluate_instances(s, bank, pictures)
    assert got["mask"].ap == pytest.approx(1) and got["box"].ap == pytest.approx(1)
    assert asked == [0.] * 3                                                         # everything found is scored


def toy_clips(root):
    frames, ids = film(5)
    for name, mask in (("early", ids), ("late", torch.where((ids == 2) & (torch.arange(5) < 2)[:, None, None], 0, ids))):
        for t in range(5):
            for part, ext in (("JPEGImages/480p", "jpg"), ("Annotations/480p", "png")):
                (root / part / name).mkdir(parents=True, exist_ok=True)
            write_image(root / "JPEGImages/480p" / name / f"{t:05d}.jpg", frames[t]); write_mask(root / "Annotations/480p" / name / f"{t:05d}.png", mask[t])
    return find_layout(root)


def test_video_evaluation(tmp_path):
    layout = toy_clips(tmp_path / "davis")
    rows = evaluate_video(SineSegmenter(model()), layout, out=tmp_path / "out")
    assert len(rows) == 4 and {r["clip"] for r in rows} == {"early", "late"} and 0 <= rows.mean["JF"] <= 1
    assert any("late" in n and "1 objects join" in n for n in rows.notes)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 10
    from timet_nb.evaluate.track import evaluate_folder
    again = evaluate_folder(tmp_path / "out", tmp_path / "davis")
    assert again.mean["JF"] == pytest.approx(rows.mean["JF"], abs=1e-6)
    few = evaluate_video(SineSegmenter(model()), layout, frames=3)
    assert len(few) == 4
    with pytest.raises(DataError, match="none with masks"): evaluate_video(SineSegmenter(model()), [])


# ---- what mutants taught

def test_several_classes_count_as_one_for_the_map():
    m = cnn(prior=True)
    x, ids = scene(size=(64, 96)); y = scene(5, (64, 96))[0]
    with torch.no_grad(): s, t = m.see(x), m.see(y)
    two, one = m.mark([s], read_marks(ids)), m.mark([s], Marks([ids > 0], [1]))
    close(two.marked, one.marked); close(m.priors(two, [t]), m.priors(one, [t]))
    assert (m.priors(only_class(two, 2), [t]) - m.priors(two, [t])).abs().max() > 1e-3


def test_far_finer_maps_are_averaged():
    fine = torch.rand(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    close(join_maps([fine], (4, 4))[0, :, 1, 2], fine[0, :, 4:8, 8:12].mean((1, 2)))


def test_z_scores_are_cut_at_six():
    m = cnn(standard=True)
    with torch.no_grad():
        raws = m.look([torch.rand(3, 64, 64)])
        m.measure(raws)
        wild = replace(raws[0], maps=tuple(100 * t + 50 for t in raws[0].maps))
        wilder = replace(raws[0], maps=tuple(1000 * t + 500 for t in raws[0].maps))
        assert m.shift.abs().max() < 50
        close(m.seen([wild])[0].features, m.seen([wilder])[0].features, 1e-4)           # both lie beyond six everywhere


def test_prior_and_lateral_add_up():
    m = cnn(prior=True, lateral=True)
    x, ids = scene(size=(64, 96))
    with torch.no_grad():
        s = m.see(x); p = m.mark([s], read_marks(ids))
        image, masks = m._plus(p, [s])
        net = m.prior_net(m.priors(p, [s]))
        grow = lambda t: F.interpolate(t, [4 * n for n in s.features.shape[1:]], mode="bilinear")
        close(image, net); close(masks, grow(net) + grow(m.lateral(s.fine[None])))


@torch.no_grad()
def test_a_second_drawing_of_a_known_object_is_not_used():
    m = model(memory=3, seed=8)
    frames, ids = film(3)
    a, b = VideoTracker(m), VideoTracker(m)
    for t in range(3): x, y = a.step(frames[t], ids[0] if t == 0 else None), b.step(frames[t], ids[0] if t == 0 else ids[t].flip(1))
    assert torch.equal(x, y) and not torch.equal(x, ids[2].flip(1))


@torch.no_grad()
def test_a_found_object_is_remembered_with_presence_times_quality():
    m = model(memory=3, seed=8)
    frames, ids = film(2)
    tracker = VideoTracker(m)
    tracker.step(frames[0], ids[0]); prompt = join_prompts(tracker.prompts(), same=True)
    tracker.step(frames[1])
    s = m.see(frames[1]); out = m(prompt, s)
    want = out.id_logits[0].softmax(-1)[:, 0] * mask_quality(bring_back(out.id_masks[0], s.view))
    assert [tracker.scores[k] for k in (1, 2)] == pytest.approx(want.tolist(), abs=1e-5) and max(want.tolist()) < 1
    for k in (1, 2):
        if 1 in tracker.memories[k].frames: assert tracker.memories[k].held[1][0] == tracker.scores[k]


def test_unknown_pixels_leave_the_cells_of_a_prompt():
    s = SineSegmenter(cnn(prior=True))
    x, ids = scene(size=(64, 96), ids=(1,))
    void = ids.clone(); void[48:] = 255
    assert len(s.prompt(x, ids).tensors["keys"]) == 24 and len(s.prompt(x, void).tensors["keys"]) == 18


def test_only_the_pictures_seen_last_are_kept():
    s = SineSegmenter(model(), keep=2)
    for n in range(4): s.see(scene(n)[0])
    s.model.passes = 0
    s.see(scene(3)[0]); s.see(scene(2)[0]); s.see(scene(1)[0])
    assert len(s._seen) == 2 and s.model.passes == 1
