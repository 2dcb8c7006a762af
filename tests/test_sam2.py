"SAM 2's parts: neck, memory attention, memory encoder, the model, and the loading of official checkpoints."
import copy
import math
from dataclasses import replace

import pytest
import torch

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.features.positions import sine_positions
from timet_nb.sam.memory_attention import MemoryAttention, RotaryAttention, axial_angles, turn
from timet_nb.sam.memory_encoder import MaskDownsampler, MemoryEncoder
from timet_nb.sam.neck import (
    FpnNeck, create_image_encoder, create_trunk, trunk_to_official, trunk_to_timm)
from timet_nb.sam.release import fill_sam2, load_sam2, official_state, sam2_state, save_sam2, tell_release
from timet_nb.sam.sam2 import Ask, Chosen, Sam2, Sam2Config, create_sam2, take
from timet_nb.sam.segment import SamConfig, create_sam, load_sam

SIZES = ("tiny", "small", "base_plus", "large")


@pytest.fixture(scope="module")
def model():
    return create_sam2("test").requires_grad_(False)


# ---- neck

def test_positions_are_one_turn_at_the_end_and_tell_cells_apart():
    p = sine_positions(32, (5, 7))
    assert p.shape == (32, 5, 7)
    assert torch.allclose(p[0, -1], torch.tensor(math.sin(2 * math.pi)), atol=1e-5) and p[1, -1, 0] > .999
    flat = p.flatten(1).T
    assert (torch.cdist(flat, flat) + torch.eye(35)).min() > .1
    with pytest.raises(ConfigError, match="multiple of 4"): sine_positions(30, (4, 4))


def test_coarse_maps_flow_down_to_level_two_only():
    neck = FpnNeck((4, 8, 16, 32), 12).eval()
    maps = [torch.randn(1, c, s, s) for c, s in zip((4, 8, 16, 32), (16, 8, 4, 2))]
    a = neck(maps)
    b = neck(maps[:3] + [maps[3] + 1])
    assert [torch.equal(x, y) for x, y in zip(a, b)] == [True, True, False, False]
    shift = (b[3] - a[3])
    up = torch.nn.functional.interpolate(shift, scale_factor=2, mode="nearest")
    assert torch.allclose(b[2] - a[2], up, atol=1e-5)


def test_encoder_gives_three_strides_and_refuses_cut_cells():
    encoder = create_image_encoder("test", 16).eval()
    top, (fine, middle) = encoder(torch.rand(2, 3, 64, 64))
    assert [tuple(m.shape) for m in (fine, middle, top)] == [(2, 16, 16, 16), (2, 16, 8, 8), (2, 16, 4, 4)]
    with pytest.raises(DataError, match="multiples of 32"): encoder(torch.rand(1, 3, 48, 64))
    with pytest.raises(ConfigError, match="tiny, small"): create_image_encoder("huge")


def test_names_of_the_trunk_go_there_and_back():
    state = create_trunk("test").state_dict()
    state = {f"image_encoder.trunk.{k}": v for k, v in state.items()} | {"other.mlp.fc1.weight": torch.zeros(1)}
    official = trunk_to_official(state)
    assert any("mlp.layers.0" in k for k in official) and not any("trunk" in k and "fc1" in k for k in official)
    assert "other.mlp.fc1.weight" in official and list(trunk_to_timm(official)) == list(state)


# ---- memory attention

def test_turned_products_depend_on_the_distance_only():
    angles, d = axial_angles(6, 5, 16), 16
    q, k = torch.randn(d), torch.randn(d)
    at = lambda v, y, x: turn(v[None], angles[y * 5 + x][None])[0]
    same = [float(at(q, y, x) @ at(k, y + 2, x + 1)) for y in range(4) for x in range(4)]
    assert max(same) - min(same) < 1e-4
    assert abs(float(at(q, 0, 0) @ at(k, 0, 3)) - same[0]) > 1e-3
    assert torch.allclose(at(q, 3, 2).norm(), q.norm(), atol=1e-5)


def naive(attention, q, k, v, grid, placeless):
    "Loops over heads and pairs; pairs of numbers as complex ones."
    q, k, v = attention.q_proj(q)[0], attention.k_proj(k)[0], attention.v_proj(v)[0]
    h, w = grid
    d = q.shape[1] // attention.heads
    freq = 1e4 ** (-torch.arange(0, d, 4).float() / d)
    where = [torch.cat([(n % w) * freq, (n // w) * freq]) for n in range(h * w)]
    spin = lambda x, n: torch.view_as_real(torch.view_as_complex(x.reshape(-1, 2).contiguous())
                                           * torch.polar(torch.ones(d // 2), where[n])).flatten()
    out = torch.zeros(len(q), q.shape[1])
    for a in range(attention.heads):
        s = slice(a * d, (a + 1) * d)
        keys = [spin(x[s], j % (h * w)) if j < len(k) - placeless else x[s] for j, x in enumerate(k)]
        for i, x in enumerate(q):
            weight = torch.stack([spin(x[s], i) @ y / math.sqrt(d) for y in keys]).softmax(0)
            out[i, s] = weight @ v[:, s]
    return attention.out_proj(out)


@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_rotary_attention_equals_loops(heads):
    torch.manual_seed(0)
    a = RotaryAttention(16, heads, memory_dim=8)
    q, k, v = torch.randn(1, 6, 16), torch.randn(1, 15, 8), torch.randn(1, 15, 8)
    assert torch.allclose(a(q, k, v, (2, 3), 3)[0], naive(a, q, k, v, (2, 3), 3), atol=1e-5)
    weights = a.weights(q, k, (2, 3), 3)
    assert weights.shape == (1, heads, 6, 15) and torch.allclose(weights.sum(-1), torch.ones(1, heads, 6), atol=1e-5)


@torch.no_grad()
def test_order_of_memories_does_not_matter_and_watch_shows_what_is_read():
    torch.manual_seed(1)
    m = MemoryAttention(16, 8, 2, 32).eval()
    x, pos = torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    memory, places = torch.randn(1, 16, 8), torch.randn(1, 16, 8)
    swap = torch.cat([torch.arange(6, 12), torch.arange(6), torch.tensor([13, 12, 15, 14])])
    a, b = m(x, pos, memory, places, (2, 3), 4), m(x, pos, memory[:, swap], places[:, swap], (2, 3), 4)
    assert torch.allclose(a, b, atol=1e-5)
    w = m.watch(x, pos, memory, places, (2, 3), 4)
    assert w.shape == (2, 1, 1, 6, 16) and torch.allclose(w.sum(-1), torch.ones(2, 1, 1, 6), atol=1e-5)
    one = m(x, pos, memory, places, (2, 3), 4, scale=torch.ones(16))
    assert torch.equal(a, one)
    assert not torch.allclose(a, m(x, pos, memory, places, (2, 3), 4, scale=torch.linspace(.5, 1.5, 16)), atol=1e-4)


def test_half_a_frame_in_the_memory_is_refused():
    m = MemoryAttention(16, 8, 1, 32)
    with pytest.raises(DataError, match="whole frames"):
        m(torch.randn(1, 6, 16), torch.zeros(1, 6, 16), torch.randn(1, 9, 8), torch.zeros(1, 9, 8), (2, 3))


# ---- memory encoder

def test_memory_encoder_wants_masks_of_its_stride():
    e = MemoryEncoder(16, 8, stride=8).eval()
    out, places = e(torch.randn(2, 16, 3, 5), torch.rand(2, 1, 24, 40))
    assert out.shape == (2, 8, 3, 5) and places.shape == (1, 8, 3, 5)
    assert torch.equal(e(torch.ones(1, 16, 3, 5), torch.zeros(1, 1, 24, 40), logits=True)[0],
                       e(torch.ones(1, 16, 3, 5), torch.full((1, 1, 24, 40), .5))[0])
    with pytest.raises(DataError, match="24, 40"): e(torch.randn(1, 16, 3, 5), torch.rand(1, 1, 48, 80))
    with pytest.raises(ConfigError, match="2, 4, 8"): MaskDownsampler(8, 12)


# ---- the model

def test_a_frame_without_a_past_gets_one_vector_everywhere(model):
    seen = model.look(torch.rand(3, 40, 60))
    gap = model.read(seen, {}, None) - seen.embedding
    assert torch.allclose(gap, model.no_mem_embed.reshape(1, -1, 1, 1).expand_as(gap), atol=1e-6)
    assert torch.equal(model.read(seen, {}, Chosen()), model.read(seen, {}, None))


def test_three_masks_for_one_point_or_none_and_one_otherwise(model):
    seen = model.look(torch.rand(3, 64, 64))
    image = model.read(seen, {}, None)
    points = lambda n: Ask((torch.rand(1, n, 2) * 64, torch.ones(1, n)))
    count = lambda ask, m=model: m.decode(image, seen, ask).low.shape[1]
    assert [count(None), count(points(1)), count(points(2)), count(points(5))] == [3, 3, 1, 1]
    assert count(Ask(tokens=(torch.zeros(1, 2, 32), None))) == 1
    fork = Sam2(model.sam, model.config.as_fork()).eval()
    assert [count(a, fork) for a in (None, points(1))] == [1, 1]


def test_absent_objects_leave_an_empty_mask_one_pointer_and_marked_cells(model):
    m = copy.deepcopy(model)
    head = m.sam_mask_decoder.pred_obj_score_head.layers[-1]
    seen = m.look(torch.rand(3, 64, 64))
    head.weight.zero_(); head.bias.fill_(-3.)
    out = m.decode(m.read(seen, {}, None), seen)
    assert (out.low == -1024).all() and torch.allclose(out.pointer[0], m.no_obj_ptr.expand(3, -1)) and out.score == -3
    absent = m.store(seen, take(out, 0)).cells
    present = m.store(seen, replace(take(out, 0), score=torch.ones(1, 1))).cells
    assert torch.allclose(absent - present, m.no_obj_embed_spatial[..., None, None].expand_as(absent), atol=1e-4)


def test_masks_that_are_given_are_the_answer(model):
    seen = model.look(torch.rand(3, 64, 64))
    mask = torch.zeros(1, 1, 64, 64); mask[..., 10:40, 20:50] = 1
    found = model.given(seen, mask)
    assert torch.equal(found.full, mask * 20 - 10) and found.score == 10 and found.iou == 1
    none = model.given(seen, torch.zeros_like(mask))
    assert none.score == -10 and torch.equal(none.pointer, model.no_obj_ptr) and (none.low < 0).all()


def test_binarised_prompts_differ_from_soft_ones(model):
    seen = model.look(torch.rand(3, 64, 64))
    found = take(model.decode(model.read(seen, {}, None), seen))
    soft, hard = model.store(seen, found).cells, model.store(seen, found, prompted=True).cells
    assert not torch.allclose(soft, hard)
    trained = Sam2(model.sam, model.config.as_trained())
    trained.load_state_dict(model.state_dict())
    assert torch.equal(trained.store(seen, found, prompted=True).cells, soft)


def test_batched_objects_answer_like_single_ones(model):
    frames = torch.rand(2, 3, 64, 64)
    seen = model.look(frames)
    masks = torch.zeros(2, 1, 64, 64); masks[0, :, 5:20] = 1; masks[1, :, :, 30:50] = 1
    chosen = Chosen(((0, 6),), ((0, 1.),), 3)
    both = model.decode(model.read(seen, {0: model.store(seen, model.given(seen, masks))}, chosen), seen)
    for i in range(2):
        bank = {0: model.store(seen[i], model.given(seen[i], masks[i:i + 1]))}
        one = model.decode(model.read(seen[i], bank, chosen), seen[i])
        assert torch.allclose(one.low, both.low[i:i + 1], atol=1e-4) and torch.allclose(one.pointer, both.pointer[i:i + 1], atol=1e-4)


def test_a_tracker_on_the_first_sam():
    sam = create_sam(SamConfig.tiny())
    m = Sam2(sam, Sam2Config(memory_dim=16, layers=1, hidden=32)).eval()
    seen = m.look(torch.rand(3, 50, 90))
    out = m.decode(m.read(seen, {}, None), seen)
    assert (out.score == 10).all() and out.pointer.shape == (1, 3, 32)
    with pytest.raises(ConfigError, match="divisor of 32"): Sam2(sam, Sam2Config(memory_dim=12))


def test_copies_and_moves_take_the_whole_model_along(model):
    twin = copy.deepcopy(model).double()
    assert twin.sam.prompt_encoder is twin.sam_prompt_encoder and twin.sam is not model.sam
    assert twin.sam.fill.dtype == torch.float64 and twin.sam.no_mem_embed is twin.no_mem_embed


# ---- official checkpoints

def official_shapes(size, version):
    "Names and shapes of the released files, written down from the architecture."
    dim, stages, table, window = {"tiny": (96, (1, 2, 7, 2), 7, 8), "small": (96, (1, 2, 11, 2), 7, 8),
                                  "base_plus": (112, (2, 3, 16, 3), 14, 8), "large": (144, (2, 6, 36, 4), 7, 8)}[size]
    out = {}
    def both(name, *shape): out[name + ".weight"], out[name + ".bias"] = shape, shape[:1]
    def norm(name, n): both(name, n)
    t, D, M = "image_encoder.trunk.", 256, 64
    out[t + "pos_embed"], out[t + "pos_embed_window"] = (1, dim, table, table), (1, dim, window, window)
    both(t + "patch_embed.proj", dim, 3, 7, 7)
    widths = [dim * 2 ** s for s, n in enumerate(stages) for _ in range(n)]
    for i, w in enumerate(widths):
        before, b = widths[i - 1] if i else dim, f"{t}blocks.{i}."
        norm(b + "norm1", before); norm(b + "norm2", w)
        both(b + "attn.qkv", 3 * w, before); both(b + "attn.proj", w, w)
        both(b + "mlp.layers.0", 4 * w, w); both(b + "mlp.layers.1", w, 4 * w)
        if before != w: both(b + "proj", w, before)
    for i in range(4): both(f"image_encoder.neck.convs.{i}.conv", D, dim * 2 ** (3 - i), 1, 1)
    for i in range(4):
        b = f"memory_attention.layers.{i}."
        for part, width in (("self_attn", D), ("cross_attn_image", M)):
            for p, n in (("q", D), ("k", width), ("v", width), ("out", D)): both(f"{b}{part}.{p}_proj", D, n)
        both(b + "linear1", 2048, D); both(b + "linear2", D, 2048)
        for j in (1, 2, 3): norm(f"{b}norm{j}", D)
    norm("memory_attention.norm", D)
    e = "memory_encoder."
    for i in range(4):
        both(f"{e}mask_downsampler.encoder.{3 * i}", 4 ** (i + 1), 4 ** i, 3, 3); norm(f"{e}mask_downsampler.encoder.{3 * i + 1}", 4 ** (i + 1))
    both(e + "mask_downsampler.encoder.12", D, 256, 1, 1); both(e + "pix_feat_proj", D, D, 1, 1); both(e + "out_proj", M, D, 1, 1)
    for i in range(2):
        b = f"{e}fuser.layers.{i}."
        out[b + "gamma"] = (D,); both(b + "dwconv", D, 1, 7, 7); norm(b + "norm", D)
        both(b + "pwconv1", 4 * D, D); both(b + "pwconv2", D, 4 * D)
    p = "sam_prompt_encoder."
    out[p + "pe_layer.positional_encoding_gaussian_matrix"] = (2, 128)
    for n in [f"point_embeddings.{i}" for i in range(4)] + ["not_a_point_embed", "no_mask_embed"]: out[f"{p}{n}.weight"] = (1, D)
    both(p + "mask_downscaling.0", 4, 1, 2, 2); norm(p + "mask_downscaling.1", 4); both(p + "mask_downscaling.3", 16, 4, 2, 2)
    norm(p + "mask_downscaling.4", 16); both(p + "mask_downscaling.6", D, 16, 1, 1)
    d = "sam_mask_decoder."
    def narrow(name, inner):
        for q in ("q", "k", "v"): both(f"{name}.{q}_proj", inner, D)
        both(f"{name}.out_proj", D, inner)
    for i in range(2):
        b = f"{d}transformer.layers.{i}."
        narrow(b + "self_attn", D); narrow(b + "cross_attn_token_to_image", 128); narrow(b + "cross_attn_image_to_token", 128)
        for j in (1, 2, 3, 4): norm(f"{b}norm{j}", D)
        both(b + "mlp.layers.0", 2048, D); both(b + "mlp.layers.1", D, 2048)
    narrow(d + "transformer.final_attn_token_to_image", 128); norm(d + "transformer.norm_final_attn", D)
    out |= {d + "iou_token.weight": (1, D), d + "mask_tokens.weight": (4, D), d + "obj_score_token.weight": (1, D),
            d + "output_upscaling.0.weight": (D, 64, 2, 2), d + "output_upscaling.0.bias": (64,),
            d + "output_upscaling.3.weight": (64, 32, 2, 2), d + "output_upscaling.3.bias": (32,)}
    norm(d + "output_upscaling.1", 64); both(d + "conv_s0", 32, D, 1, 1); both(d + "conv_s1", 64, D, 1, 1)
    for i in range(4):
        for j, n in enumerate((D, D, 32)): both(f"{d}output_hypernetworks_mlps.{i}.layers.{j}", n, D)
    for j, (n, head) in enumerate(zip((256, 256, 4), (D, D, 1))):
        both(f"{d}iou_prediction_head.layers.{j}", n, 256); both(f"{d}pred_obj_score_head.layers.{j}", head, D)
        both(f"obj_ptr_proj.layers.{j}", D, D)
    out |= {"maskmem_tpos_enc": (7, 1, 1, M), "no_mem_embed": (1, 1, D), "no_mem_pos_enc": (1, 1, D), "no_obj_ptr": (1, D)}
    both("mask_downsample", 1, 1, 4, 4)
    if version == "2.1": out["no_obj_embed_spatial"] = (1, M); both("obj_ptr_tpos_proj", M, D)
    return out


def on_meta(size, version): return {k: torch.empty(s, device="meta") for k, s in official_shapes(size, version).items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_official_names_and_sizes_fit(size, version):
    model = create_sam2(f"{size}-{version}", device="meta")
    assert {k: tuple(v.shape) for k, v in official_state(model).items()} == official_shapes(size, version)
    state = sam2_state({"model": on_meta(size, version)})
    assert tell_release(state) == (size, version)
    assert len(fill_sam2(model, state).matched) == len(state)
    known = dict(tiny=38.9, small=46., base_plus=80.8, large=224.4)[size]
    assert abs(sum(math.prod(s) for s in official_shapes(size, version).values()) / 1e6 - known) < .1


def test_another_size_or_version_is_named():
    with pytest.raises(CheckpointError, match=r"SAM 2.1 small(?s:.*)SAM 2.1 tiny"):
        fill_sam2(create_sam2("tiny", device="meta"), on_meta("small", "2.1"))
    with pytest.raises(CheckpointError, match=r"SAM 2.0 tiny(?s:.*)SAM 2.1 tiny"):
        fill_sam2(create_sam2("tiny", device="meta"), on_meta("tiny", "2.0"))


def test_sam_where_sam2_was_asked(tmp_path):
    path = tmp_path / "sam_vit_b.pth"
    torch.save({f"{k}": v for k, v in create_sam(SamConfig.tiny()).state_dict().items()}, path)
    with pytest.raises(CheckpointError, match="(?s)weights of SAM: one picture.*load_sam"): load_sam2(path)
    with pytest.raises(CheckpointError): load_sam2(tmp_path / "none.pt")


def test_a_file_goes_out_and_comes_back(tmp_path, model):
    torch.save({"model": official_state(model)}, tmp_path / "official.pt")
    save_sam2(model, tmp_path / "own.safetensors")
    frame = torch.rand(3, 64, 64)
    want = model.look(frame).embedding
    for m in (load_sam2(tmp_path / "official.pt", Sam2Config.test()), load_sam2(tmp_path / "own.safetensors")):
        assert torch.equal(m.look(frame).embedding, want) and m.config == model.config
        assert not any(p.requires_grad for p in m.parameters()) and not m.training
    with pytest.raises(CheckpointError, match="no released size"): load_sam2(tmp_path / "official.pt")


@pytest.mark.parametrize("spoil, words", [
    (lambda s: s.pop("no_obj_ptr"), "no_obj_ptr"), (lambda s: s.pop("maskmem_tpos_enc"), "without its memory"),
    (lambda s: s.update(extra=torch.zeros(1)), "extra"), (lambda s: s["no_obj_ptr"].fill_(float("nan")), "NaN"),
    (lambda s: s.update(no_obj_ptr=torch.zeros(1, 5)), "no_obj_ptr")])
def test_files_that_do_not_fit_change_nothing(model, spoil, words):
    m, state = create_sam2("test", seed=3), {k: v.clone() for k, v in official_state(model).items()}
    before = {k: v.clone() for k, v in m.state_dict().items()}
    spoil(state)
    with pytest.raises(CheckpointError, match=words): fill_sam2(m, sam2_state(state))
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_the_picture_part_loads_as_a_plain_sam(model):
    "A's loader takes encoder, prompt encoder and decoder out of the same file."
    sam = load_sam(official_state(model), model.config.sam, create_image_encoder("test", 32), rename=trunk_to_timm)
    frame = torch.rand(3, 64, 64)
    assert torch.equal(sam.look(frame).embedding, model.look(frame).embedding)
    assert torch.equal(sam.still(sam.look(frame)), model.read(model.look(frame), {}, None))


def test_cells_of_any_stride():
    "A ViT with patches of 14 pixels: masks are stored at the nearest power of two."
    eyes = torch.nn.Conv2d(3, 32, 14, 14)
    sam = create_sam(SamConfig("", 2, 112, 14, 32, "squash", 8, 2, 4, 64, high_res=False), eyes)
    m = Sam2(sam, Sam2Config(memory_dim=16, layers=1, hidden=32)).eval()
    assert (m.config.fold, m.config.mask_size, create_sam2("test").config.mask_size) == (16, (128, 128), (64, 64))
    mask = torch.zeros(1, 1, 112, 112); mask[..., 14:56, 28:84] = 1
    found = m.given(m.look(torch.rand(3, 60, 90)), mask)
    assert abs(float((found.full > 0).float().mean() - mask.mean())) < .01
    assert m.store(m.look(torch.rand(3, 60, 90)), found).cells.shape == (1, 16, 8, 8)
