"50_prompts and 50_interact: pooling, tokens, banks, interaction, positions; their properties and their faults."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.sine.interact import (
    Attend, ChannelNorm, Interaction, gaussian_window, make_mask_features, make_neck, match_positions, sine_positions)
from timet_nb.sine.prompts import (
    Marks, Prompt, batch_prompts, cell_weights, join_prompts, load_prompt, make_prompt, mask_cells, mask_pool, read_marks)


def gen(seed=0): return torch.Generator().manual_seed(seed)


def boxes(n, H, W, seed=0, g=None):
    "n masks with a rectangle each."
    g = g or gen(seed)
    masks = torch.zeros(n, H, W, dtype=torch.bool)
    for m in masks:
        y, x = int(torch.randint(H // 2, (1,), generator=g)), int(torch.randint(W // 2, (1,), generator=g))
        m[y:y + H // 3, x:x + W // 3] = True
    return masks


def pool_slow(features, masks, official=True):
    "The authors' form: enlarge the features, cut them out, average."
    big = F.interpolate(features[None], scale_factor=4, mode="bilinear")[0]
    cells = F.interpolate(masks[None].float(), big.shape[1:], mode="bilinear")[0] > 0
    return torch.stack([(big * c).sum((1, 2)) / (c.sum() + 1e-8) for c in cells])


def close(a, b, eps=1e-5): assert a.shape == b.shape and (a - b).abs().max() < eps, (a - b).abs().max()


def same_prompt(a, b, eps=1e-5):
    for n in ("ids", "id_labels", "sem_labels"): assert torch.equal(getattr(a, n), getattr(b, n)), n
    for n in ("id_tokens", "sem_tokens"): close(getattr(a, n), getattr(b, n), eps)
    for n in ("id_areas", "sem_areas"): assert torch.equal(getattr(a, n), getattr(b, n)), n


# ---- pooling

@given(st.integers(1, 9), st.integers(1, 9), st.integers(8, 90), st.integers(8, 90), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pooling_equals_the_slow_form_on_any_grid(h, w, H, W, seed):
    features = torch.randn(5, h, w, generator=gen(seed))
    masks = boxes(3, H, W, seed)
    sums, areas = mask_pool(features, mask_cells(masks, (h, w), official=True))
    close(sums / (areas[:, None] + 1e-8), pool_slow(features, masks), 1e-4)
    assert torch.equal(cell_weights(mask_cells(masks, (h, w), official=True)).sum((1, 2)).round().long(), areas)


def test_threshold_after_the_resize_dilates():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool); mask[0, 4:8, 4:8] = True
    assert mask_cells(mask, (2, 2))[0].sum() == 4 and mask_cells(mask, (4, 4))[0].sum() == 16
    bigger = mask_cells(mask, (8, 8))[0]                    # 32 x 32 cells: exactly the object plus what bilinear touches
    assert bigger.sum() > 64 and bigger[8:16, 8:16].all()


def test_a_thin_object_is_not_lost():
    thin = torch.zeros(1, 224, 224, dtype=torch.bool); thin[0, 100:101, 60:160] = True
    assert not mask_cells(thin, (8, 8), official=True).any() or mask_cells(thin, (8, 8)).any()
    lost = [y for y in range(40) if not mask_cells(_row(y), (4, 4), official=True).any()]
    assert lost, "the authors' resize skips rows: 224 pixels to 16 cells"
    for y in lost: assert mask_cells(_row(y), (4, 4)).sum() in (16, 32)


def _row(y):
    m = torch.zeros(1, 224, 224, dtype=torch.bool); m[0, y] = True
    return m


def test_gradients_reach_the_features():
    f = torch.randn(1, 6, 5, 7, requires_grad=True)
    make_prompt(f, Marks(boxes(2, 40, 56), [1, 1])).sem_tokens.sum().backward()
    assert f.grad.abs().sum() > 0


# ---- tokens

def test_order_of_marks_does_not_matter():
    f, masks, labels, ids = torch.randn(1, 8, 6, 9), boxes(4, 48, 72), [3, 1, 3, 2], [7, 4, 9, 1]
    order = torch.tensor([2, 0, 3, 1])
    a = make_prompt(f, Marks(masks, labels, ids))
    b = make_prompt(f, Marks(masks[order], torch.tensor(labels)[order], torch.tensor(ids)[order]))
    same_prompt(a, b)
    assert a.ids.tolist() == [1, 4, 7, 9] and a.sem_labels.tolist() == [1, 2, 3]
    assert a.id_labels.tolist() == [2, 1, 3, 3]


def test_order_of_shots_does_not_matter():
    f, masks = torch.randn(3, 8, 6, 6), boxes(3, 48, 48)
    a = make_prompt(f, Marks(masks, [5, 5, 2], ids=[1, 2, 3], shots=[0, 1, 2]))
    b = make_prompt(f.flip(0), Marks(masks, [5, 5, 2], ids=[1, 2, 3], shots=[2, 1, 0]))
    same_prompt(a, b)


def test_masks_of_a_class_are_united_not_added():
    f, box = torch.randn(1, 4, 6, 6), boxes(1, 48, 48)
    one, twice = make_prompt(f, Marks(box, [3])), make_prompt(f, Marks(torch.cat([box, box]), [3, 3]))
    close(one.sem_tokens, twice.sem_tokens)
    assert torch.equal(one.sem_areas, twice.sem_areas) and len(twice.ids) == 2


def test_shots_joined_equal_shots_together():
    f, masks, labels = torch.randn(4, 8, 6, 9), boxes(4, 48, 72), [5, 5, 2, 5]
    whole = make_prompt(f, Marks(masks, labels, shots=range(4)))
    parts = [make_prompt(f[i:i + 1], Marks(masks[i:i + 1], labels[i:i + 1])) for i in range(4)]
    same_prompt(whole, join_prompts(parts))
    same_prompt(join_prompts([join_prompts(parts[:2]), join_prompts(parts[2:])]), whole)


def test_memory_frames_one_object_many_masks():
    f, masks, ids = torch.randn(5, 8, 6, 6), boxes(5, 48, 48), [1, 2, 1, 1, 2]
    whole = make_prompt(f, Marks(masks, ids, ids, shots=range(5)))
    one_by_one = join_prompts([make_prompt(f[i:i + 1], Marks(masks[i:i + 1], ids[i:i + 1], ids[i:i + 1])) for i in range(5)], same=True)
    same_prompt(whole, one_by_one)
    assert whole.ids.tolist() == [1, 2]
    close(whole.id_tokens, whole.sem_tokens)                # every object is a class of its own


def test_grids_and_image_sizes_may_differ_between_shots():
    f = [torch.randn(8, 6, 9), torch.randn(8, 3, 4)]
    p = make_prompt(f, Marks([boxes(1, 48, 72)[0], boxes(1, 30, 40)[0]], [1, 2], shots=[0, 1]))
    assert p.id_tokens.shape == (2, 8) and p.id_tokens.isfinite().all()


def test_batch_of_prompts_is_padded_and_one_prompt_serves_all():
    f = torch.randn(1, 8, 6, 6)
    a, b = make_prompt(f, Marks(boxes(3, 48, 48), [1, 2, 2])), make_prompt(f, Marks(boxes(1, 48, 48), [4]))
    two = batch_prompts([a, b], 2)
    assert two.id_valid.tolist() == [[True] * 3, [True, False, False]] and two.sem_valid.tolist() == [[True] * 2, [True, False]]
    assert two.id_tokens[1, 1:].abs().sum() == 0
    assert torch.equal(batch_prompts(a, 5).id_tokens[3], a.id_tokens)
    assert batch_prompts(b.without_ids(), 2).id_tokens.shape == (2, 0, 8)
    with pytest.raises(DataError, match="one for all, or one a target"): batch_prompts([a, b], 3)


# ---- banks

def test_bank_comes_back_and_knows_its_backbone(tmp_path):
    p = make_prompt(torch.randn(1, 8, 6, 6), Marks(boxes(3, 48, 48), [1, 2, 2]), source="neck-1")
    path = p.save(tmp_path / "bank.safetensors")
    q = load_prompt(path, "neck-1")
    same_prompt(p, q, 1e-9); assert q.source == "neck-1"
    with pytest.raises(CheckpointError, match="neck-1"): load_prompt(path, "neck-2")
    other = make_prompt(torch.randn(1, 8, 6, 6), Marks(boxes(1, 48, 48), [1]), source="neck-2")
    with pytest.raises(DataError, match="one backbone and neck"): join_prompts([p, other])
    with pytest.raises(DataError, match="one backbone and neck"): batch_prompts([p, other], 2)


def test_another_file_is_no_bank(tmp_path):
    from timet_nb.features.checkpoints import save_state
    path = save_state(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="no prompt"): load_prompt(path)


# ---- reading masks

def test_255_belongs_to_nobody():
    ids = torch.zeros(20, 30, dtype=torch.long); ids[2:8, 2:8] = 3; ids[10:15, 10:20] = 1; ids[8:10] = 255
    marks = read_marks(ids)
    assert marks.labels.tolist() == [1, 3] and sum(int(m.sum()) for m in marks.masks) == 36 + 50
    clean = ids.clone(); clean[ids == 255] = 0
    f = torch.randn(1, 8, 5, 7)
    same_prompt(make_prompt(f, marks), make_prompt(f, read_marks(clean)))
    with pytest.raises(DataError, match="255 means ignore"): read_marks(torch.where(ids > 0, 255, 0))


def test_ids_of_two_pictures_are_other_objects_unless_told():
    ids = torch.zeros(2, 20, 20, dtype=torch.long); ids[:, 3:9, 3:9] = 1
    assert read_marks(ids, labels=7).ids.tolist() == [0, 1] and read_marks(ids, labels=7, same=True).ids.tolist() == [1, 1]
    assert read_marks(ids, {1: 4}).labels.tolist() == [4, 4]
    with pytest.raises(DataError, match="no class for id 1"): read_marks(ids, {2: 4})


def test_uint8_and_bool_maps_and_lists():
    m = torch.zeros(12, 12); m[2:6, 2:6] = 1
    for x in (m.bool(), m.to(torch.uint8), [m.long(), m.long()]): assert read_marks(x).labels[0] == 1
    with pytest.raises(DataError, match="dtype float32"): read_marks(m)


# ---- faults

def test_no_reference_is_refused():
    with pytest.raises(DataError, match="no mask"): Marks([], [])
    with pytest.raises(DataError, match="no mask"): read_marks([])
    with pytest.raises(DataError, match="only the values"): read_marks(torch.zeros(1, 8, 8, dtype=torch.long))
    with pytest.raises(DataError, match="prompts: got none"): join_prompts([])


def test_empty_mask_error_skip_zero():
    f, masks = torch.randn(1, 8, 6, 6), boxes(3, 48, 48); masks[1] = False
    marks = Marks(masks, [1, 2, 3], ids=[10, 20, 30])
    with pytest.raises(DataError, match=r"mask 1: got no pixel \(object 20\)"): make_prompt(f, marks)
    assert make_prompt(f, marks, empty="skip").ids.tolist() == [10, 30]
    zero = make_prompt(f, marks, empty="zero")
    assert zero.id_tokens[1].abs().sum() == 0 and zero.id_areas.tolist()[1] == 0
    with pytest.raises(ConfigError, match="error, skip or zero"): make_prompt(f, marks, empty="drop")
    with pytest.raises(DataError, match="no mask"): make_prompt(f, Marks(masks[1:2], [1]), empty="skip")


def test_mask_of_another_image():
    f = torch.randn(1, 8, 6, 12)
    with pytest.raises(DataError, match="mask 0: got 96 x 48 pixels"): make_prompt(f, Marks(boxes(1, 96, 48), [1]))
    make_prompt(f, Marks(boxes(1, 100, 190), [1]))           # another resolution is fine
    with pytest.raises(DataError, match="the size of its image"): read_marks(boxes(1, 20, 30)[0].long(), sizes=[(20, 31)])


def test_clashing_labels():
    with pytest.raises(DataError, match=r"object 4: got classes \[1, 2\]"): Marks(boxes(2, 20, 20), [1, 2], ids=[4, 4])
    f = torch.randn(1, 8, 6, 6)
    a, b = (make_prompt(f, Marks(boxes(1, 48, 48), [c], ids=[4])) for c in (1, 2))
    with pytest.raises(DataError, match="object 4"): join_prompts([a, b], same=True)
    assert join_prompts([a, b]).id_labels.tolist() == [1, 2]  # different objects by default


@pytest.mark.parametrize("wrong, word", [
    (dict(labels=[1]), "labels"), (dict(labels=[1., 2.]), "labels"), (dict(labels=[1, 2], ids=[1]), "ids"),
    (dict(labels=[1, 2], shots=[0, 0, 0]), "shots")])
def test_wrong_lists(wrong, word):
    with pytest.raises(DataError, match=word): Marks(boxes(2, 20, 20), **wrong)


def test_wrong_tensors():
    with pytest.raises(DataError, match="read_marks splits"): Marks(torch.zeros(1, 8, 8), [1])
    with pytest.raises(DataError, match="pictures"): make_prompt(torch.randn(1, 8, 6, 6), Marks(boxes(1, 48, 48), [1], shots=[2]))
    with pytest.raises(DataError, match="features of shot 0"): make_prompt(torch.randn(1, 1, 8, 6, 6), Marks(boxes(1, 48, 48), [1]))
    bad = torch.randn(1, 8, 6, 6); bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="nan at index"): make_prompt(bad, Marks(boxes(1, 48, 48), [1]))


# ---- interaction

def torch_attention(a):
    "torch's own module with the weights of ours."
    m = nn.MultiheadAttention(a.out_proj.in_features, a.heads, batch_first=True)
    m.load_state_dict({k: v for k, v in a.state_dict().items() if not k.startswith("norm")})
    return m


@pytest.mark.parametrize("pre", [False, True])
def test_attention_equals_torch(pre):
    torch.manual_seed(0)
    a, x, y, p, q = Attend(16, 4, pre), torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    allow = torch.rand(2, 1, 5, 7) > .3; allow[..., 0] = True
    z = a.norm(x) if pre else x
    want = x + torch_attention(a)(z + p, y + q, y, attn_mask=~allow.expand(2, 4, 5, 7).flatten(0, 1), need_weights=False)[0]
    close(a(x, y, p, q, allow), want if pre else a.norm(want))


def test_channel_norm_is_layer_norm_over_channels():
    n, x = ChannelNorm(6), torch.randn(2, 6, 3, 4)
    close(n(x), F.layer_norm(x.permute(0, 2, 3, 1), (6,), eps=1e-6).permute(0, 3, 1, 2))


def test_shapes_of_neck_and_mask_features():
    x = torch.randn(2, 12, 5, 7)
    y = make_neck(12, 8)(x)
    assert y.shape == (2, 8, 5, 7) and make_neck(12, 8, plain=True)(x).shape == y.shape
    assert make_mask_features(8)(y).shape == (2, 8, 20, 28)
    assert list(make_neck(12, 8).state_dict()) == ["0.weight", "1.weight", "1.bias", "2.weight", "3.weight", "3.bias"]


def test_interaction_padding_permutation_and_symmetry():
    torch.manual_seed(0)
    net, t, im = Interaction(16, 4, 32, depth=2).eval(), torch.randn(1, 3, 16), torch.randn(1, 20, 16)
    with torch.no_grad():
        a, b = net(t, im)
        padded = torch.cat([t, torch.randn(1, 4, 16)], 1); valid = torch.arange(7)[None] < 3
        c, d = net(padded, im, valid)
        close(a, c[:, :3]); close(b, d)
        order = torch.tensor([2, 0, 1])
        e, f = net(t[:, order], im); close(e, a[:, order]); close(f, b)
        g, h = net(im, t); close(g, b); close(h, a)          # one set of weights for both directions
        pixels = torch.arange(26)[None] < 20
        i, j = net(t, torch.cat([im, torch.randn(1, 6, 16)], 1), None, pixels); close(i, a); close(j[:, :20], b)
    assert Interaction(16, 4, 32, depth=0)(t, im) == (t, im)


# ---- positions

def test_position_map_height_and_width_apart():
    p = sine_positions(16, (5, 9))
    assert p.shape == (16, 5, 9)
    assert (p[:8] - p[:8, :, :1]).abs().max() == 0 and (p[8:] - p[8:, :1]).abs().max() == 0
    close(sine_positions(16, (9, 5))[:8, :, 0], p[8:, 0])    # rows there are columns here
    with pytest.raises(ConfigError, match="multiple of 4"): sine_positions(10, (3, 3))


@given(st.integers(1, 9), st.integers(1, 9), st.floats(.5, 20))
@settings(max_examples=30, deadline=None)
def test_gaussian_window(h, w, sigma):
    k = torch.arange(h * w)
    g = gaussian_window(k, (h, w), sigma)
    assert g.shape == (h * w, h * w) and torch.equal(g.argmax(1), k) and (g.diagonal() == 1).all()
    close(g, g.T, 1e-6)
    y, x = k // w, k % w
    far = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    close(g, torch.exp(-far / (2 * sigma ** 2)), 1e-6)


def test_matching_finds_the_cell_on_a_non_square_grid():
    torch.manual_seed(0)
    image, pe = torch.randn(1, 6 * 11, 32), sine_positions(16, (6, 11))
    got = match_positions(image[:, [37]], image, pe, 200.)
    close(got[0, 0], pe[:, 37 // 11, 37 % 11], 1e-3)
    flat = match_positions(image[:, [37]], image, pe, 0.)
    close(flat[0, 0], pe.flatten(1).mean(1), 1e-5)           # no temperature: the mean of all places


def test_matching_leaves_padding_out():
    torch.manual_seed(0)
    image, pe, q = torch.randn(1, 24, 16), sine_positions(16, (4, 6)), torch.randn(1, 2, 16)
    pixels = torch.ones(1, 4, 6, dtype=torch.bool); pixels[..., 4:] = False; pixels = pixels.flatten(1)
    t, other = {}, image.clone(); other[~pixels] = q[0, 0] * 3   # tempting padding
    a, b = match_positions(q, image, pe, 30., pixels=pixels, trace=t), match_positions(q, other, pe, 30., pixels=pixels)
    close(a, b); assert t["where"][0][:, ~pixels[0]].sum() == 0


def test_everything_is_repeatable_in_double():
    f = torch.randn(1, 8, 6, 6).double()
    p = make_prompt(f, Marks(boxes(2, 48, 48), [1, 2]))
    assert isinstance(p, Prompt) and p.id_tokens.dtype == torch.float64
