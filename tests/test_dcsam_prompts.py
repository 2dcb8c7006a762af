"DC-SAM's prior, fusion, prompt generator and published files: against loops, in any order of shots, right sizes, clear faults."
from dataclasses import replace

import pytest
import torch
from torch import nn

from timet_nb.base.runtime import CheckpointError, ConfigError, DataError
from timet_nb.dcsam.fusion import prototype
from timet_nb.dcsam.prior import Seen, make_eyes, masked_prior, on_grid, two_priors
from timet_nb.dcsam.prompts import DCSAMConfig, PromptGenerator, Prompts, label_vectors, mask_loss
from timet_nb.dcsam.release import config_of, eyes_of, load_release, split_release
from timet_nb.features.backbone import create_backbone
from timet_nb.features.checkpoints import save_state
from timet_nb.features.cnn_dense import create_dense_cnn
from timet_nb.sam.prompt_encoder import PromptEncoder

SMALL = dict(channels=20, dim=16, heads=2, queries=3)


class TinyEyes(nn.Module):
    "Two convolutions: the second one is the part that can be run again."
    dim, top_dim = 20, 12

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 20, 4, 4), nn.Conv2d(20, 12, 3, padding=1)

    def look(self, x):
        y = self.low(x).relu()
        return Seen(y, y, self.high(y))

    def masked_top(self, middle, mask): return self.high(middle * mask)


def at(seen, index): return Seen(seen.fused[index], seen.middle[index], seen.top[index])


@pytest.fixture
def case():
    "Eyes, two queries with three shots each, masks, SAM's features."
    torch.manual_seed(0)
    eyes = TinyEyes().eval().requires_grad_(False)
    query, support = eyes.look(torch.rand(2, 3, 32, 24)), eyes.look(torch.rand(6, 3, 32, 24))
    masks = torch.rand(2, 3, 32, 24) < .5
    return eyes, query, support, masks, torch.randn(2, 16, 8, 6), torch.randn(6, 16, 8, 6)


def generator(seed=1, **changes):
    torch.manual_seed(seed)
    return PromptGenerator(DCSAMConfig(**{**SMALL, **changes})).eval()


LABELS = torch.ones(16), -torch.ones(16)


# -- the prior

def prior_slow(support, masks, query):
    out = torch.zeros(len(query), 1, *query.shape[2:])
    for b in range(len(query)):
        for i in range(query.shape[2]):
            for j in range(query.shape[3]):
                g, shots = query[b, :, i, j], []
                for f, m in zip(support[b], masks[b]):
                    cells = (f * m).flatten(1).T
                    shots.append(max((c @ g / (c.norm() * g.norm() + 1e-7)).item() for c in cells))
                out[b, 0, i, j] = sum(shots) / len(shots)
    return out


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_prior_equals_loops(rows):
    torch.manual_seed(1)
    s, m, q = torch.randn(2, 2, 6, 4, 3), (torch.rand(2, 2, 4, 3) < .5).float(), torch.randn(2, 6, 4, 3)
    assert torch.allclose(masked_prior(s, m, q, rows), prior_slow(s, m, q), atol=1e-5)
    assert masked_prior(s.requires_grad_(), m, q).grad_fn is None


def test_prior_of_nothing_and_of_everything(case):
    eyes, query, support, _, _, _ = case
    for m in (torch.zeros(2, 3, 8, 6), torch.ones(2, 3, 8, 6)):
        a, b = two_priors(eyes, support, m, query)
        empty = a if not m.any() else b
        assert (empty == 0).all() and torch.isfinite(a).all() and torch.isfinite(b).all()


def test_eyes_of_every_kind():
    vit = make_eyes(create_backbone("test-vit").eval())
    with torch.no_grad():
        seen = vit.look(torch.rand(2, 3, 32, 48))
        ones = torch.ones(2, 1, *seen.top.shape[2:])
        assert torch.allclose(vit.masked_top(seen.middle, ones), seen.top, atol=1e-5)
        cells = vit.masked_top(seen.middle, ones * 0).flatten(2)
        assert torch.allclose(cells, vit.backbone.final_norm(torch.zeros(vit.dim))[:, None].expand_as(cells[0]), atol=1e-5)
    assert make_eyes(vit) is vit
    plain = nn.Conv2d(3, 4, 8, 8); plain.dim = 4
    assert make_eyes(plain).look(torch.rand(1, 3, 16, 16)).top.shape == (1, 4, 2, 2)
    with pytest.raises(ConfigError, match="backbone"): make_eyes(nn.ReLU())


def test_the_vit_can_be_all_the_eyes(case):
    "Fused features of a ViT, and the prior-only variant that drops them."
    vit = make_eyes(create_backbone("test-vit").eval())
    with torch.no_grad(): q, s = vit.look(torch.rand(1, 3, 32, 32)), vit.look(torch.rand(1, 3, 32, 32))
    for only in (False, True):
        g = generator(channels=vit.dim, prior_only=only)
        scene = g.read(vit, q, s, torch.ones(1, 32, 32), torch.randn(1, 16, 9, 9), torch.randn(1, 16, 9, 9))
        assert scene.query.shape == (1, 16, *q.top.shape[2:]) and g.first(scene).positive.shape == (1, 3, 16)


# -- the fusion

def test_prototype():
    x, m = torch.randn(4, 3, 5, 6), (torch.rand(4, 5, 6) < .5).float()
    for b in range(4):
        total = sum((x[b, :, i, j] * m[b, i, j] for i in range(5) for j in range(6)), torch.zeros(3))
        assert torch.allclose(prototype(x[b], m[b]), total / (m[b].sum() + .0005), atol=1e-5)
    assert torch.equal(prototype(x, m), torch.stack([prototype(*p) for p in zip(x, m)]))


def test_scene_is_the_sum_of_its_parts(case):
    eyes, query, support, masks, qs, ss = case
    g = generator()
    with torch.no_grad(): scene = g.read(eyes, query, support, masks, qs, ss)
    m = on_grid(masks, (8, 6))
    pos, neg = two_priors(eyes, support, m, query)
    with torch.no_grad():
        d = g.downsample_query(support.fused).unflatten(0, (2, 3))
        p = prototype(d, 1 - m)
        tile = lambda v: v[..., None, None].expand(-1, -1, 8, 6)
        S = g.merge_2(torch.cat([d[1, 2][None], tile(p[1, 2][None]), ss[5:6], 10 * (1 - m[1, 2])[None, None]], 1))
        Q = g.merge_2(torch.cat([g.downsample_query(query.fused), tile(p.mean(1)), qs, 10 * neg], 1))
    assert torch.allclose(scene.neg_support[1, 2], S[0], atol=1e-5) and torch.allclose(scene.neg_query, Q, atol=1e-5)
    assert torch.equal(scene.prior, pos)


def test_a_sample_does_not_depend_on_its_company(case):
    eyes, query, support, masks, qs, ss = case
    g = generator()
    with torch.no_grad():
        both = g.read(eyes, query, support, masks, qs, ss)
        for b in range(2):
            rows = slice(3 * b, 3 * b + 3)
            one = g.read(eyes, at(query, slice(b, b + 1)), at(support, rows), masks[b:b + 1], qs[b:b + 1], ss[rows])
            for n in ("support", "neg_query", "prior", "prototype"):
                assert torch.allclose(getattr(both, n)[b], getattr(one, n)[0], atol=1e-5), n
            coarse = (torch.rand(2, 32, 24) < .5)
            p, q = g.first(both), g.first(one)
            assert torch.allclose(p.negative[b], q.negative[0], atol=1e-5)
            p2, q2 = g.second(p, both, coarse, LABELS), g.second(q, one, coarse[b:b + 1], LABELS)
            assert torch.allclose(p2.positive[b], q2.positive[0], atol=1e-5)
            assert torch.allclose(p2.negative[b], q2.negative[0], atol=1e-5)


def test_sam2_maps_are_joined(case):
    eyes, query, support, masks, _, _ = case
    g = generator(sam_version=2)
    maps = lambda n: (torch.randn(n, 16, 8, 6), torch.randn(n, 2, 32, 24), torch.randn(n, 4, 16, 12))
    scene = g.read(eyes, query, support, masks, maps(2), maps(6))
    assert scene.query.shape == (2, 16, 8, 6)
    with pytest.raises(DataError, match="two finer maps"): g.read(eyes, query, support, masks, maps(2)[0], maps(6))


def test_faults_of_the_fusion(case):
    eyes, query, support, masks, qs, ss = case
    g = generator()
    bad = masks.long(); bad[0, 0, 0, 0] = 255
    with pytest.raises(DataError, match="leave 255 out"): g.read(eyes, query, support, bad, qs, ss)
    with pytest.raises(DataError, match="one for each support image"): g.read(eyes, query, support, masks[:, :2], qs, ss)
    with pytest.raises(DataError, match="one for each support image"): g.read(eyes, query, support, masks[0], qs, ss)
    for wrong in (dict(shots="first"), dict(stages=3), dict(neg_memory="both"), dict(sam_version=3)):
        with pytest.raises(ConfigError, match=next(iter(wrong))): DCSAMConfig(**wrong)
    with pytest.raises(ConfigError, match="heads"): PromptGenerator(DCSAMConfig(**{**SMALL, "heads": 3}))
    with pytest.raises(ConfigError, match="channels="): DCSAMConfig.paper("vit")


# -- the prompts

@pytest.mark.parametrize("settings, weights", [
    (dict(), 2_394_624), (dict(queries=50), 2_420_224), (dict(sam_version=2), 2_468_800), (dict(sam_version=2, queries=50), 2_494_400),
    (dict(backbone="vgg16_bn"), 2_198_016), (dict(prior_only=True), 1_870_336), (dict(prior_only=True, sam_version=2), 1_944_512),
    (dict(prior_only=True, queries=50), 1_895_936), (dict(prior_only=True, sam_version=2, queries=50), 1_970_112)])
def test_published_numbers_of_weights(settings, weights):
    with torch.device("meta"): net = PromptGenerator(DCSAMConfig.paper(**settings))
    assert sum(p.numel() for p in net.parameters()) == weights


def prompts_of(g, case, order=(0, 1, 2), coarse=None):
    eyes, query, support, masks, qs, ss = case
    order = list(order)
    rows = [3 * b + s for b in range(2) for s in order]
    with torch.no_grad():
        scene = g.read(eyes, query, at(support, rows), masks[:, order], qs, ss[rows])
        first = g.first(scene)
        coarse = torch.ones(2, 32, 24).tril() if coarse is None else coarse
        return first, g.second(first, scene, coarse, LABELS) if g.config.stages == 2 else None


def same(a, b): return torch.allclose(a.positive, b.positive, atol=1e-5) and torch.allclose(a.negative, b.negative, atol=1e-5)


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2), (2, 1, 0)])
def test_the_order_of_shots_does_not_matter(case, order):
    g = generator()
    for a, b in zip(prompts_of(g, case), prompts_of(g, case, order)): assert same(a, b)


def test_shots_given_twice_count_once(case):
    g = generator()
    for a, b in zip(prompts_of(g, case), prompts_of(g, case, (0, 1, 2, 0, 1, 2))): assert same(a, b)


def test_the_last_shot_wins_where_asked(case):
    g = generator(shots="last")
    branch = g.transformer_decoder
    S, M = torch.randn(2, 3, 16, 8, 6), (torch.rand(2, 3, 8, 6) < .5).float()
    with torch.no_grad():
        assert torch.equal(branch.first(S, M), branch.first(S[:, 2:], M[:, 2:]))
        assert not torch.allclose(branch.first(S, M), branch.first(S.flip(1), M.flip(1)), atol=1e-3)
    assert same(prompts_of(g, case)[1], prompts_of(g, case)[1])              # and it runs with several shots


def test_switches_change_what_they_say(case):
    base = prompts_of(generator(), case)
    assert prompts_of(generator(negative=False), case)[1].negative.shape == (2, 0, 16)
    assert prompts_of(generator(stages=1), case)[1] is None
    plain = prompts_of(generator(cycle=False), case)
    assert not same(plain[0], base[0])
    other = prompts_of(generator(neg_memory="query"), case)
    assert same(other[0], base[0]) and torch.equal(other[1].positive, base[1].positive)
    assert not torch.allclose(other[1].negative, base[1].negative, atol=1e-3)
    unlabelled = prompts_of(generator(labelled_stage2=False), case)
    assert same(unlabelled[0], base[0]) and not torch.allclose(unlabelled[1].positive, base[1].positive, atol=1e-3)


@pytest.mark.parametrize("memory", ["support", "query"])
def test_what_the_second_stage_hears(case, memory):
    "For: Q+ and the first answer. Against: S+ laid over three times, or Q-, and the opposite of the answer."
    eyes, query, support, masks, qs, ss = case
    g, coarse = generator(neg_memory=memory), torch.ones(2, 32, 24).tril(-3)
    with torch.no_grad():
        scene = g.read(eyes, query, support, masks, qs, ss)
        first = g.first(scene); got = g.second(first, scene, coarse, LABELS)
        inside, marked = on_grid(coarse, (8, 6)), first.labelled(LABELS)
        heard = scene.support if memory == "support" else scene.neg_query
        assert torch.equal(got.positive, g.transformer_decoder.second(marked.positive, scene.query, inside))
        assert torch.equal(got.negative, g.neg_transformer_decoder.second(marked.negative, heard, 1 - inside))
        assert torch.equal(got.negative, g.neg_transformer_decoder.second(marked.negative, heard, inside))     # the walk knows no sign


def test_labels_follow_the_version_of_sam():
    assert [generator(sam_version=v).labelled_stage2 for v in (1, 2)] == [True, False]
    assert [generator(sam_version=v, labelled_stage2=s).labelled_stage2 for v, s in ((1, False), (2, True))] == [False, True]


def test_prompts_are_what_the_encoder_makes_of_them():
    encoder = PromptEncoder(16, (8, 6), (128, 96))
    p = Prompts(torch.randn(2, 3, 16), torch.randn(2, 4, 16))
    before = p.positive.clone()
    sparse, _ = encoder(tokens=p.tokens)
    assert torch.allclose(sparse, torch.cat(p.labelled(label_vectors(encoder)).tokens, 1), atol=1e-6)
    assert torch.equal(p.positive, before)                                    # never in place


def test_the_first_answer_has_no_gradient(case):
    eyes, query, support, masks, qs, ss = case
    g, seen = generator(), []
    scene = g.read(eyes, query, support, masks, qs, ss)
    def decode(p):
        seen.append(p)
        return p.positive.mean((1, 2)).view(-1, 1, 1, 1) + p.negative.mean((1, 2)).view(-1, 1, 1, 1) + torch.linspace(-1, 1, 48).view(1, 1, 8, 6)
    asked = g(scene, decode, LABELS, (32, 24))
    assert asked.logits.shape == asked.coarse.shape == (2, 1, 32, 24) and len(seen) == 2
    grad, = torch.autograd.grad(asked.logits.sum(), asked.coarse, allow_unused=True)
    assert grad is None


@pytest.mark.parametrize("fill", [0., 1.])
def test_an_empty_or_full_first_answer_is_fine(case, fill):
    _, second = prompts_of(generator(), case, coarse=torch.full((2, 32, 24), fill))
    assert torch.isfinite(second.positive).all() and torch.isfinite(second.negative).all()


def test_faults_of_the_generator(case):
    eyes, query, support, masks, qs, ss = case
    g = generator()
    scene = g.read(eyes, query, support, masks, qs, ss)
    with pytest.raises(DataError, match="label_vectors"): g.second(g.first(scene), scene, torch.zeros(2, 8, 6))
    single = generator(stages=1)
    with pytest.raises(ConfigError, match="stages"): single.second(single.first(scene), scene, torch.zeros(2, 8, 6), LABELS)


# -- the loss

def test_loss_against_loops():
    torch.manual_seed(2)
    x, y = torch.randn(3, 5, 4, 6), (torch.rand(3, 5, 4, 6) < .3)
    bce, dice = [], []
    for logits, target in zip(x, y):
        p, t = torch.sigmoid(logits).flatten(), target.float().flatten()
        bce.append(-(t * p.log() + (1 - t) * (1 - p).log()).mean())
        dice.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    got = mask_loss(x, y)
    assert torch.allclose(got.bce, torch.stack(bce).mean(), atol=1e-5) and torch.allclose(got.dice, torch.stack(dice).mean(), atol=1e-5)
    assert torch.allclose(got.total, got.bce + got.dice)
    assert mask_loss(torch.full((1, 9), -50.), torch.zeros(1, 9)).total < 1e-6
    with pytest.raises(DataError, match="target"): mask_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))


# -- published files

STEM = dict(zip("013467", ("conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1")))


def published(config, backbone, video=False):
    "A state dict with the official names and sizes."
    g, eyes = PromptGenerator(config), create_dense_cnn(backbone)
    def name(k):
        if backbone == "vgg16_bn":
            i, rest = k.split(".", 1); cuts = (0, 7, 14, 24, 34)
            layer = max(n for n, c in enumerate(cuts) if c <= int(i))
            return f"layer{layer}.{int(i) - cuts[layer]}.{rest}"
        return next((f"layer0.{i}{k[len(o):]}" for i, o in STEM.items() if k.startswith(o + ".")), k)
    state = {**{name(k): v for k, v in eyes.cnn.state_dict().items()}, **g.state_dict()}
    pre = "module.prompt_encoder." if video else "module."
    out = {pre + k: v for k, v in state.items()}
    if video: out |= {"module.sam2.no_mem_embed": torch.randn(1, 1, 256), "module.sam2.image_encoder.neck.convs.0.conv.bias": torch.randn(256)}
    return g, eyes, out


@pytest.mark.parametrize("backbone, version, video", [("resnet50", 1, False), ("resnet50", 2, True), ("vgg16_bn", 1, False), ("resnet101", 2, False)])
def test_published_layouts(backbone, version, video):
    config = DCSAMConfig.paper(backbone, sam_version=version)
    torch.manual_seed(3)
    g, eyes, state = published(config, backbone, video)
    got, seen, release, report = load_release(state)
    assert got.config == config and release.kind == ("video" if video else "image") and not release.left
    for k, v in g.state_dict().items(): assert torch.equal(got.state_dict()[k], v), k
    for k, v in eyes.cnn.state_dict().items(): assert torch.equal(seen.cnn.state_dict()[k], v), k
    assert set(release.sam) == ({"no_mem_embed", "image_encoder.neck.convs.0.conv.bias"} if video else set())
    assert "0 missing" in report.show() and not got.training
    if video: assert "SAM 2: 2 tensors" in report.show()


def test_a_file_on_the_disk_wrapped_and_with_strangers(tmp_path):
    g = PromptGenerator(DCSAMConfig(**SMALL))
    state = {f"module.{k}": v for k, v in g.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "best_model.pt")
    got, eyes, release, report = load_release(tmp_path / "best_model.pt", replace(g.config))
    assert eyes is None and "not in the file" in report.show() and release.kind == "image"
    path = save_state(tmp_path / "strange.safetensors", {**state, "module.swin.norm": torch.zeros(2)})
    assert load_release(path, g.config)[3].left == ("swin.norm",)


@pytest.mark.parametrize("settings", [dict(negative=False), dict(stages=1), dict(prior_only=True), dict(sam_version=2), dict(queries=7)])
def test_sizes_are_read_off_the_weights(settings):
    config = DCSAMConfig(**{**SMALL, **settings})
    got = config_of(split_release(PromptGenerator(config).state_dict()), heads=2)
    wanted = replace(config, backbone="vit", channels=got.channels if config.prior_only else config.channels)
    assert got == wanted


def test_faults_of_files():
    g = PromptGenerator(DCSAMConfig(**SMALL)); state = g.state_dict()
    with pytest.raises(CheckpointError, match="DC-SAM's"): load_release({"image_encoder.pos_embed": torch.zeros(1), "mask_decoder.iou_token.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="none"): load_release({})
    short = {k: v for k, v in state.items() if "q_embed" not in k}
    with pytest.raises(CheckpointError, match="prompt generator of DC-SAM"): load_release(short, g.config)
    with pytest.raises(CheckpointError, match="prompt generator of DC-SAM"): load_release(state, DCSAMConfig(**{**SMALL, "queries": 9}))
    with pytest.raises(CheckpointError, match="supp_q_feat"): load_release({"merge_1.0.weight": torch.zeros(2, 2, 1, 1)})
    broken = {**state, "merge_1.0.weight": state["merge_1.0.weight"] * float("nan")}
    with pytest.raises(CheckpointError, match="NaN"): load_release(broken, g.config)
    assert eyes_of({}) == ""
