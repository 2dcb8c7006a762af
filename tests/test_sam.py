"SAM: prompts, decoder, pictures of any shape, published weights, automatic masks."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.sam.automatic import AutoConfig, box_iou, clean_mask, crop_boxes, mask_boxes, near_cut, nms, point_grid, records, segment_all
from timet_nb.sam.prompt_decoder import MaskDecoder, stability
from timet_nb.sam.prompt_encoder import PromptEncoder
from timet_nb.sam.segment import (SamConfig, SamFeatures, check_boxes, check_points, create_sam, from_canvas, lay, load_sam,
                                  mask_on_canvas, sam_state, to_canvas, view_on)
from timet_nb.sam.two_way import TwoWayTransformer

GOLDEN = Path(__file__).parent / "golden" / "dcsam"


@pytest.fixture(scope="module")
def sam(): return create_sam(SamConfig.tiny())


@pytest.fixture(scope="module")
def features(sam): return sam.look(torch.rand(3, 60, 90, generator=torch.Generator().manual_seed(0)))


def official(state):
    "A state dict of ours under the official names."
    swap = lambda k: k.replace("image_encoder.vit.", "image_encoder.").replace("mlp.fc1", "mlp.lin1").replace("mlp.fc2", "mlp.lin2")
    return {swap(k) if k.startswith("image_encoder.") else k: v for k, v in state.items()}


# ---- prompts and decoder

def test_golden_prompts_through_the_public_modules():
    z = np.load(GOLDEN / "sam1_prompt_mask_decoder.npz")
    c, t = json.loads(str(z["config_json"])), lambda n: torch.from_numpy(np.array(z[n]))
    s, side = c["image_embedding_size"], c["input_image_size"]
    config = SamConfig(encoder="", size=side, stride=side // s, dim=c["embed_dim"], mask_channels=c["mask_in_chans"], depth=c["depth"],
                       heads=c["heads"], mlp_dim=c["mlp_dim"], masks=c["num_multimask_outputs"], iou_depth=c["iou_head_depth"],
                       iou_hidden=c["iou_head_hidden_dim"])
    state = {n.removeprefix("sd/"): t(n) for n in z.files if n.startswith("sd/")}
    model = load_sam(state, config, encoder=nn.Identity())
    seen = SamFeatures(t("image_embedding"), None, (view_on((side, side), side),))
    with torch.no_grad():
        out = model.decode(seen, (t("point_coords"), t("point_labels")), t("box"), t("mask_input"), multimask=True)
    assert (out.masks - t("all_masks_multi1")).abs().max() < 1e-5
    assert (out.iou - t("all_iou_multi1")).abs().max() < 1e-5


def test_free_tokens_as_recorded_and_never_in_place():
    z = np.load(GOLDEN / "dcsam_full_v1.npz")
    t = lambda n: torch.from_numpy(np.array(z[n]))
    sub = lambda p: {n.removeprefix("sd/" + p): t(n) for n in z.files if n.startswith("sd/" + p)}
    c = json.loads(str(z["config_json"]))
    C, n = c["hidden_dim"], c["feat"]
    encoder, decoder = PromptEncoder(C, (n, n), (16 * n,) * 2, 8), MaskDecoder(C, 2, c["num_heads"], 2 * C, iou_hidden=C).eval()
    encoder.load_state_dict(sub("sam.prompt_encoder.")), decoder.load_state_dict(sub("sam.mask_decoder."))
    pos, neg = t("stage1_pos"), t("stage1_neg")
    with torch.no_grad():
        sparse, dense = encoder(tokens=(pos, neg))
        out = decoder(t("query_sam"), encoder.dense_pe(), sparse, dense)
    assert torch.equal(sparse, t("sparse_1"))
    assert (out.masks - t("low_res_1")).abs().max() < 1e-5
    assert torch.equal(pos, t("stage1_pos")) and torch.equal(neg, t("stage1_neg"))


def test_v2_decoder_has_the_official_names():
    z = np.load(GOLDEN / "sam2_track.npz")
    sub = lambda p: {n.removeprefix("sd/" + p): torch.from_numpy(np.array(z[n])) for n in z.files if n.startswith("sd/" + p)}
    MaskDecoder(32, 2, 8, 2048, version=2).load_state_dict(sub("sam_mask_decoder."))
    PromptEncoder(32, (4, 4), (64, 64)).load_state_dict(sub("sam_prompt_encoder."))


@pytest.mark.parametrize("version", [1, 2])
def test_prompts_in_a_batch_answer_as_alone(version):
    torch.manual_seed(0)
    decoder = MaskDecoder(32, 2, 4, 64, iou_hidden=16, version=version).eval()
    image, pe, sparse, dense = torch.randn(1, 32, 6, 6), torch.randn(1, 32, 6, 6), torch.randn(5, 3, 32), torch.randn(1, 32, 6, 6)
    fine = decoder.thin(torch.randn(1, 32, 24, 24), torch.randn(1, 32, 12, 12)) if version == 2 else None
    with torch.no_grad():
        batch = decoder(image, pe, sparse, dense, True, fine)
        alone = [decoder(image, pe, s[None], dense, True, fine) for s in sparse]
    assert (batch.masks - torch.cat([a.masks for a in alone])).abs().max() < 1e-5
    assert (batch.iou - torch.cat([a.iou for a in alone])).abs().max() < 1e-5


def test_dynamic_multimask_swaps_shaky_masks_only_in_eval():
    from timet_nb.sam.prompt_decoder import Decoded
    soft, hard = torch.linspace(-.06, .06, 64).view(8, 8), torch.linspace(-9, 9, 64).view(8, 8)
    out = Decoded(torch.stack([torch.stack([m, hard + 1, hard + 2, hard + 3]) for m in (soft, hard)]),
                  torch.tensor([[.9, .1, .7, .3]] * 2), torch.arange(2 * 4 * 3.).view(2, 4, 3))
    decoder = MaskDecoder(32, heads=4, mlp_dim=64, dynamic=True).eval()
    got = decoder.choose(out)
    assert torch.equal(got.masks[0, 0], hard + 2) and torch.equal(got.masks[1, 0], hard)
    assert torch.equal(got.tokens, out.tokens[:, :1])            # the token stays that of the single mask
    assert torch.equal(decoder.train().choose(out).masks, out.masks[:, :1])


def test_two_way_is_blind_to_the_order_of_prompts():
    torch.manual_seed(0)
    net = TwoWayTransformer(32, 2, 4, 64).eval()
    image, pe, t = torch.randn(1, 32, 4, 4), torch.randn(1, 32, 4, 4), torch.randn(1, 5, 32)
    with torch.no_grad(): (a, p), (b, q) = net(image, pe, t), net(image, pe, t.flip(1))
    assert (a.flip(1) - b).abs().max() < 1e-5 and (p - q).abs().max() < 1e-5


def test_padding_points_carry_no_place():
    encoder = PromptEncoder(32, (4, 4), (64, 64))
    a, b = (encoder(points=(torch.tensor([[[5., 5], p]]), torch.tensor([[1, -1]])))[0] for p in ([0., 0], [60., 9]))
    assert torch.equal(a, b)


# ---- pictures of any shape

@pytest.mark.parametrize("size", [(60, 90), (300, 40), (1, 500), (500, 1), (112, 112), (7, 3), (3000, 2)])
@pytest.mark.parametrize("fit", ["pad", "squash", "corners"])
def test_any_aspect_ratio(size, fit):
    sam = create_sam(SamConfig.tiny(fit=fit))
    answer = sam.segment(torch.rand(3, *size), points=[(size[1] / 2, size[0] / 2)])
    assert answer.masks.shape == (3, *size) and answer.mask.shape == size and torch.isfinite(answer.masks).all()


def test_points_and_maps_meet_on_the_canvas():
    "A bright spot in the picture is where the moved point says, and comes back to the same place."
    for fit in ("pad", "squash"):
        image = torch.zeros(3, 60, 100); image[:, 40:44, 70:74] = 1
        view = view_on((60, 100), 200, fit)
        laid = lay(image, view, .0)
        x, y = to_canvas(torch.tensor([72., 42]), view).long().tolist()
        assert laid[0, y, x] > .9
        back = from_canvas(laid[None, :1], view)[0, 0]
        assert back.shape == (60, 100) and back[42, 72] > .9 and back[5, 5] < .1


def test_squash_with_aligned_corners_is_torch_interpolate():
    x = torch.rand(3, 20, 31)
    want = nn.functional.interpolate(x[None], (64, 64), mode="bilinear", align_corners=True)[0]
    assert torch.equal(lay(x, view_on((20, 31), 64, "corners")), want)


def test_padding_has_the_mean_colour(sam):
    seen = []
    hook = sam.image_encoder.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    sam.look(torch.rand(3, 20, 60)); hook.remove()
    pad = seen[0][0, :, -1, -1]
    assert torch.allclose(pad, torch.tensor([.485, .456, .406]), atol=1e-6)   # 0 after the encoder's normalisation


def test_pictures_of_several_sizes_are_encoded_as_alone(sam):
    xs = [torch.rand(3, 60, 90), torch.rand(3, 30, 20)]
    both = sam.look(xs)
    for i, x in enumerate(xs): assert (both[i].embedding - sam.look(x).embedding).abs().max() < 1e-5
    with pytest.raises(IndexError): both[2]
    with pytest.raises(DataError, match="2 pictures"): sam.ask(both, points=[(1, 1)])


# ---- questions

def test_features_are_encoded_once(sam):
    calls = []
    hook = sam.image_encoder.register_forward_pre_hook(lambda m, x: calls.append(len(x[0])))
    f = sam.look(torch.rand(3, 40, 40))
    for p in ([1, 1], [9, 30]): sam.ask(f, points=[p])
    sam.ask(f, points=torch.rand(6, 2, 2) * 40); hook.remove()
    assert calls == [1]


def test_many_prompts_answer_as_alone(sam, features):
    points = torch.rand(4, 2, 2) * torch.tensor([90, 60])
    labels = torch.tensor([[1, 0]] * 4)
    many = sam.ask(features, points=points, labels=labels)
    alone = [sam.ask(features, points=p, labels=l) for p, l in zip(points, labels)]
    assert many.masks.shape == (4, 1, 60, 90) and alone[0].masks.shape == (1, 60, 90)
    assert (many.masks - torch.stack([a.masks for a in alone])).abs().max() < 1e-4
    boxes = torch.tensor([[1., 1, 20, 20], [30, 3, 80, 50]])
    assert sam.ask(features, box=boxes).masks.shape == (2, 1, 60, 90)


def test_number_of_masks(sam, features):
    ask = lambda **k: sam.ask(features, **k).masks.shape[0]
    assert [ask(points=[(5, 5)]), ask(points=[(5, 5), (9, 9)]), ask(box=(1, 1, 9, 9)), ask(points=[(5, 5)], multimask=False)] == [3, 1, 1, 1]


@pytest.mark.parametrize("prompt,words", [
    ({}, "no point, box, mask or token"), (dict(points=torch.zeros(0, 2)), "no point"), (dict(points=[(91, 5)]), "inside 90 x 60"),
    (dict(points=[(5, -1)]), "inside 90 x 60"), (dict(points=[(float("nan"), 5)]), "inside 90 x 60"),
    (dict(points=[(5, 5), (5.3, 5.6)], labels=[1, 0]), "both 1 and 0"), (dict(points=[(5, 5)], labels=[2]), "1 .here. or 0"),
    (dict(points=[(5, 5)], labels=[1, 1]), "one a point"), (dict(points=[5, 5]), "x, y in pixels"),
    (dict(box=(5, 5, 5, 20)), "left < right"), (dict(box=(9, 9, 3, 20)), "left < right"), (dict(box=(95, 5, 120, 20)), "left < right"),
    (dict(box=(1, 2, float("inf"), 9)), "finite"), (dict(box=(1, 2, 3)), "4"), (dict(mask=torch.zeros(60, 90, dtype=torch.bool)), "empty mask"),
    (dict(mask=torch.ones(61, 90, dtype=torch.bool)), "picture's size"), (dict(mask=torch.ones(60, 90)), "earlier answer"),
    (dict(tokens=(None, None)), "at least one side"), (dict(labels=[1], box=(1, 1, 9, 9)), "labels without points"),
    (dict(tokens=(torch.full((2, 32), float("nan")), None)), "NaN"), (dict(mask=torch.full((28, 28), float("nan"))), "NaN"),
    (dict(points=torch.rand(3, 1, 2), box=torch.tensor([[1, 1, 9, 9.]] * 2)), "different kinds"), (dict(tokens=(torch.zeros(2, 16), None)), "32")])
def test_faulty_prompts_are_named(sam, features, prompt, words):
    with pytest.raises(DataError, match=words): sam.ask(features, **prompt)


def test_defined_results(sam, features):
    "A full mask, a box over the border and the same label twice at one pixel are fine."
    full = sam.ask(features, mask=torch.ones(60, 90, dtype=torch.bool))
    assert torch.isfinite(full.masks).all()
    over = sam.ask(features, box=(-50, -3, 40, 30))
    assert torch.equal(over.masks, sam.ask(features, box=(0, 0, 40, 30)).masks)
    assert torch.isfinite(sam.ask(features, points=[(5, 5), (5, 5)], labels=[1, 1]).masks).all()
    assert torch.isfinite(sam.ask(features, points=[(90, 60), (0, 0)]).masks).all()      # the very border
    again = sam.ask(features, points=[(5, 5)], mask=full.low)
    assert again.masks.shape == (1, 60, 90)


def test_mask_prompts_leave_the_padding_unmarked():
    view = view_on((20, 80), 64)
    low = mask_on_canvas(torch.ones(1, 20, 80, dtype=torch.bool), view, (16, 16))[0, 0]
    assert (low[:4] == 10).all() and (low[4:] == -10).all()


def test_checks_keep_what_is_right():
    p, l = check_points(torch.tensor([[[1., 2]]]), None, (5, 5))
    assert l.tolist() == [[1]] and l.dtype == torch.int64
    assert check_boxes(torch.tensor([[-1., 0, 9, 9]]), (5, 6)).tolist() == [[0, 0, 6, 5]]


def test_wrong_pictures_and_encoders():
    sam = create_sam(SamConfig.tiny())
    with pytest.raises(DataError): sam.look(torch.rand(60, 90, 3))
    with pytest.raises(DataError): sam.look((torch.rand(3, 60, 90) * 255))
    with pytest.raises(DataError): sam.look([])
    wrong = create_sam(SamConfig.tiny(encoder=""), encoder=nn.AvgPool2d(16))
    with pytest.raises(ConfigError, match="features"): wrong.look(torch.rand(3, 60, 90))
    with pytest.raises(ConfigError, match="an encoder"): create_sam(SamConfig.sam2())


def test_sam2_shapes_with_an_encoder_of_ones_own():
    class Eyes(nn.Module):
        def forward(self, x): return x.new_ones(len(x), 32, 4, 4), (x.new_ones(len(x), 32, 16, 16), x.new_ones(len(x), 32, 8, 8))
    config = SamConfig.sam2("tiny", encoder="", size=64, dim=32, heads=4, mlp_dim=64)
    sam = create_sam(config, Eyes())
    f = sam.look(torch.rand(3, 33, 70))
    assert [tuple(x.shape) for x in f.high_res] == [(1, 4, 16, 16), (1, 8, 8, 8)]
    a = sam.ask(f, points=[(5, 5)], box=(1, 1, 30, 20))
    assert a.masks.shape == (1, 33, 70) and a.object_score.shape == ()
    with torch.no_grad(): sam.no_mem_embed.fill_(2.)
    assert torch.equal(sam.still(f), f.embedding + 2)


# ---- published weights

@pytest.mark.parametrize("name,weights,tensors", [("vit_b", 93_735_472, 314), ("vit_l", 312_342_832, 482), ("vit_h", 641_090_608, 594)])
def test_official_names_and_sizes(name, weights, tensors):
    "On the meta device: shapes of the published checkpoints, no memory."
    config = getattr(SamConfig, name)()
    state = official(create_sam(config, device="meta").state_dict())
    assert len(state) == tensors
    width = {"vit_b": 768, "vit_l": 1024, "vit_h": 1280}[name]
    assert state["image_encoder.blocks.0.mlp.lin1.weight"].shape == (4 * width, width)
    assert state["image_encoder.pos_embed"].shape == (1, 64, 64, width) and state["image_encoder.neck.2.weight"].shape == (256, 256, 3, 3)
    assert state["mask_decoder.transformer.layers.1.mlp.lin1.weight"].shape == (2048, 256)
    model = load_sam(state)
    assert model.config == config and sum(p.numel() for p in model.parameters()) == weights and not model.training


def test_round_trip_through_the_official_layout(tmp_path, sam, features):
    torch.save(official(sam.state_dict()), tmp_path / "sam.pth")
    again = load_sam(tmp_path / "sam.pth", SamConfig.tiny())
    f = again.look(torch.rand(3, 60, 90, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(f.embedding, features.embedding)
    assert torch.equal(again.ask(f, points=[(9, 9)]).masks, sam.ask(features, points=[(9, 9)]).masks)
    assert not any(p.requires_grad for p in again.parameters())
    nested = {"model": {f"module.{k}": v for k, v in official(sam.state_dict()).items()}}
    assert load_sam(nested, SamConfig.tiny()).config == SamConfig.tiny()


def test_loading_copies_a_state_dict():
    state = official(create_sam(SamConfig.tiny()).state_dict())
    kept = state["mask_decoder.iou_token.weight"].clone()
    model = load_sam(state, SamConfig.tiny())
    with torch.no_grad(): model.mask_decoder.iou_token.weight.add_(1)
    assert torch.equal(state["mask_decoder.iou_token.weight"], kept)


def test_save_and_load(tmp_path, sam):
    path = sam.save(tmp_path / "a.safetensors", half=True)
    again = load_sam(path)
    assert again.config == sam.config and again.mask_decoder.iou_token.weight.dtype == torch.float32
    a, b = sam.state_dict(), again.state_dict()
    assert all((a[k] - b[k]).abs().max() <= 1e-3 * a[k].abs().max() + 1e-6 for k in a)
    with pytest.raises(CheckpointError, match="dim=64"): load_sam(path, SamConfig.tiny(dim=64))


def test_frozen_parts_may_be_left_out(tmp_path, sam):
    path = sam.save(tmp_path / "b.safetensors", leave=("image_encoder.",))
    small = create_sam(SamConfig.tiny(), seed=5)
    again = load_sam(path, encoder=small.image_encoder)
    assert torch.equal(again.mask_decoder.iou_token.weight, sam.mask_decoder.iou_token.weight)
    assert torch.equal(again.image_encoder.vit.pos_embed, small.image_encoder.vit.pos_embed)


def test_wrong_checkpoints_say_so(sam):
    meta = lambda c: official(create_sam(c, device="meta").state_dict())
    with pytest.raises(CheckpointError, match="vit_l"): load_sam(meta(SamConfig.vit_l()), SamConfig.vit_b())
    state = official(sam.state_dict())
    with pytest.raises(CheckpointError, match="48 wide"): load_sam(state)
    with pytest.raises(CheckpointError, match="missing"): load_sam({k: v for k, v in state.items() if "iou_token" not in k}, SamConfig.tiny())
    bad = {**state, "mask_decoder.iou_token.weight": torch.full((1, 32), float("nan"))}
    with pytest.raises(CheckpointError, match="NaN"): load_sam(bad, SamConfig.tiny())
    with pytest.raises(CheckpointError, match="SAM or SAM 2"): load_sam({"fc.weight": torch.zeros(2, 2)})


def test_sam2_instead_of_sam_and_the_other_way_round():
    sam2 = {"model": {"sam_prompt_encoder.no_mask_embed.weight": torch.zeros(1, 256), "sam_mask_decoder.iou_token.weight": torch.zeros(1, 256)}}
    with pytest.raises(CheckpointError, match="SAM 2"): load_sam(sam2)
    with pytest.raises(CheckpointError, match="version 2"): load_sam(sam2, SamConfig.vit_b())
    one = {"prompt_encoder.no_mask_embed.weight": torch.zeros(1, 256), "mask_decoder.iou_token.weight": torch.zeros(1, 256)}
    with pytest.raises(CheckpointError, match="version 1"): load_sam(one, SamConfig.sam2(), encoder=nn.Identity())
    assert sam_state(sam2)[1] == "sam2" and sam_state(one)[1] == "sam"


# ---- automatic masks

def test_nms_keeps_the_best_and_equals_a_loop():
    g = torch.Generator().manual_seed(1)
    corner = torch.rand(60, 2, generator=g) * 50
    boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(60, 2, generator=g)], 1)
    scores, left, want = torch.rand(60, generator=g), list(range(60)), []
    while left:
        best = max(left, key=lambda i: scores[i]); want.append(best)
        left = [i for i in left if i != best and box_iou(boxes[[best]], boxes[[i]]).item() <= .4]
    assert nms(boxes, scores, .4).tolist() == want
    assert nms(boxes[:0], scores[:0], .4).tolist() == []


def test_mask_boxes_and_box_iou():
    m = torch.zeros(2, 8, 9, dtype=torch.bool); m[0, 2:5, 3:7] = True
    assert mask_boxes(m).tolist() == [[3, 2, 6, 4], [0, 0, 0, 0]]
    a = torch.tensor([[0., 0, 4, 4], [1, 1, 1, 1]])
    assert box_iou(a, torch.tensor([[2., 2, 6, 6]])).flatten().tolist() == pytest.approx([4 / 28, 0])


def test_point_grid_and_crops_as_published():
    assert point_grid(2).tolist() == [[.25, .25], [.75, .25], [.25, .75], [.75, .75]]
    boxes = crop_boxes((1000, 1500), 2)
    assert len(boxes) == 1 + 4 + 16 and boxes[0] == ((0, 0, 1500, 1000), 0)
    assert boxes[1][0] == (0, 0, 921, 671)                       # overlap int(512 / 1500 * 1000) = 341
    for layer in (1, 2):                                         # every pixel is in some crop
        hit = torch.zeros(1000, 1500)
        for (x, y, r, b), l in boxes: hit[y:b, x:r] += l == layer
        assert hit.min() >= 1
    near = near_cut(torch.tensor([[100, 100, 915, 300], [0, 0, 300, 300]]), boxes[1][0], (1000, 1500))
    assert near.tolist() == [True, False]


def test_small_holes_and_islands():
    m = torch.zeros(30, 30, dtype=torch.bool); m[5:20, 5:20] = True; m[10, 10] = False; m[27, 27] = True
    clean, changed = clean_mask(m, 9)
    assert changed and clean[10, 10] and not clean[27, 27] and clean.sum() == 225
    assert not clean_mask(clean, 9)[1]
    lone = torch.zeros(9, 9, dtype=torch.bool); lone[4, 4:6] = True
    assert clean_mask(lone, 50)[0].sum() == 2                    # the largest island stays


class Blocks(nn.Module):
    "A decoder that sees: the mask of a click is the flat region it falls into."
    has_score = high_res = False
    def forward(self, image, pe, sparse, dense, multimask=False, high_res=None):
        from timet_nb.sam.prompt_decoder import Decoded
        at = (sparse[:, 0] @ pe[0].flatten(1)).argmax(1)
        value = image[0, 0].flatten()
        mask = torch.where((value[None] - value[at][:, None]).abs() < .05, 8., -8.).view(len(at), 1, *image.shape[2:])
        mask = nn.functional.interpolate(mask, scale_factor=4.).expand(-1, 3, -1, -1)
        return Decoded(mask, torch.tensor([.95, .5, .9]).expand(len(at), 3), sparse[:, :1].expand(-1, 3, -1))


def blocks():
    class Grey(nn.Module):
        def forward(self, x): return nn.functional.avg_pool2d(x[:, :1], 4).expand(-1, 64, -1, -1)
    sam = create_sam(SamConfig.tiny(encoder="", size=128, stride=4, dim=64), Grey())
    for e in sam.prompt_encoder.point_embeddings: nn.init.zeros_(e.weight)
    sam.mask_decoder = Blocks()
    return sam


def test_automatic_masks_find_each_block_once():
    image = torch.full((3, 64, 128), .1)
    image[:, 8:28, 8:40], image[:, 36:60, 60:100] = .5, .9
    found = segment_all(blocks(), image, AutoConfig(side=10))
    assert len(found) == 3 and (found.iou > .88).all() and (found.stability >= .95).all()
    sizes = sorted(int(m.sum()) for m in found.masks)
    assert abs(sizes[0] - 20 * 32) < 120 and abs(sizes[1] - 24 * 40) < 150
    rows = records(found)
    assert set(rows[0]) == {"segmentation", "area", "bbox", "predicted_iou", "stability_score", "point_coords", "crop_box"}
    for r in rows:
        x, y = (int(v) for v in r["point_coords"][0])
        assert r["segmentation"][y, x] and r["area"] == r["segmentation"].sum()


def test_crops_and_strict_thresholds():
    image = torch.full((3, 64, 128), .1); image[:, 20:30, 20:34] = .8
    sam = blocks()
    assert len(segment_all(sam, image, AutoConfig(side=4, min_iou=.97))) == 0
    small = segment_all(sam, image, AutoConfig(side=8, crop_layers=1, min_area=20))
    assert len(small) and (small.crops[:, 2] <= 128).all()
    assert any(80 < int(m.sum()) < 180 for m in small.masks)        # 10 x 14 pixels, in cells of 4


def test_stability_of_empty_masks_is_one_and_they_are_dropped():
    assert stability(torch.full((2, 4, 4), -9.), 1.).tolist() == [1, 1]
    sam = create_sam(SamConfig.tiny())
    found = segment_all(sam, torch.rand(3, 30, 40), AutoConfig(side=3, min_iou=-99, min_stability=0))
    assert found.masks.flatten(1).any(1).all()
