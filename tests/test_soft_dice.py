"""Soft Dice: the formula written out, to the bit, in its own room and in every loss that calls it."""
import pytest
import torch
from torch.nn import functional as F

from timet_nb.base.runtime import DataError
from timet_nb.dcsam.prompts import mask_loss
from timet_nb.evaluate.boundary import dice, soft_dice
from timet_nb.sam.discs import track_loss
from timet_nb.sam.mini_asks import MiniTrainConfig
from timet_nb.sam.mini_rounds import mask_costs
from timet_nb.sam.sam2 import Found
from timet_nb.sam.segment import prompt_loss
from timet_nb.sine.matching import dice_loss
from timet_nb.sine.pairing import dice_loss as first_home

SHAPES = [(7,), (1, 1), (5, 2304), (3, 12544), (2, 4, 4095), (2, 3, 2, 100)]


def draw(*shape, seed=0):
    "Logits and a 0/1 target of one shape; the first mask is empty."
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(shape, generator=g) < .3).float()
    if len(shape) > 1: y[0] = 0
    return 4 * torch.randn(shape, generator=g) - 1, y


def written_out(p, y): return 1 - (2 * (p * y).sum(-1) + 1) / (p.sum(-1) + y.sum(-1) + 1)


def with_slope(f, x):
    "The value of f at x, and the slope of its sum."
    x = x.clone().requires_grad_()
    value = f(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def same(f, g, x):
    "Both values and both slopes are equal bit by bit."
    for a, b in zip(with_slope(f, x), with_slope(g, x)):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula_to_the_bit(shape):
    x, y = draw(*shape)
    same(lambda x: 1 - soft_dice(x.sigmoid(), y), lambda x: written_out(x.sigmoid(), y), x)
    assert soft_dice(x.sigmoid(), y).shape == shape[:-1]
    assert torch.equal(soft_dice(x.sigmoid(), y > 0), soft_dice(x.sigmoid(), y))    # a bool target


@pytest.mark.parametrize("P", (9, 33, 1000))
def test_soft_targets_too(P):
    x, y = draw(300, P)[0], draw(300, P, seed=5)[0].sigmoid()
    same(lambda x: 1 - soft_dice(x.sigmoid(), y), lambda x: written_out(x.sigmoid(), y), x)
    same(lambda x: dice_loss(x, y), lambda x: written_out(x.sigmoid(), y), x)


def test_the_losses_that_call_it_keep_their_bits():
    assert dice_loss is first_home
    x, y = draw(6, 12544)
    same(lambda x: dice_loss(x, y), lambda x: written_out(x.sigmoid(), y), x)
    x, y = draw(3, 1, 47, 60)
    def before(x):
        x, t = x.flatten(1), y.flatten(1)
        d = written_out(x.sigmoid(), t)
        return F.binary_cross_entropy_with_logits(x, t) + d.mean()
    same(lambda x: mask_loss(x, y).total, before, x)
    same(lambda x: mask_loss(x, y).dice, lambda x: written_out(x.flatten(1).sigmoid(), y.flatten(1)).mean(), x)


@pytest.mark.parametrize("strided", [False, True])
def test_mask_costs_of_the_small_sam(strided):
    x, _ = draw(3, 4, 48, 47)
    if strided: x = draw(3, 5, 48, 47)[0][:, 1:]      # the last four of five answers
    truth = draw(3, 48, 47, seed=1)[1] > 0
    y, only = truth[:, None].expand_as(x), MiniTrainConfig(focal=0.)
    def before(x):
        p = x.sigmoid()
        both, sizes = (p * y).sum((2, 3)), p.sum((2, 3)) + y.sum((2, 3))
        return 1 - (2 * both + 1) / (sizes + 1)
    value, slope = with_slope(lambda x: mask_costs(x, truth, only)[0], x)
    want, down = with_slope(before, x)
    assert torch.equal(value, want) and torch.equal(slope, down)


def test_track_loss_of_the_discs():
    seen = draw(4, 3, 64, 64)[1] > 0
    x, (score, _) = draw(4, 1, 32, 32)[0], draw(4, 1, seed=2)
    def before(x):
        y = F.interpolate(seen[:, 1, None].float(), (32, 32), mode="area").flatten(1)
        there = (seen[:, 1].flatten(1).sum(1) > 15).float()
        z = x.clamp(-20, 20).flatten(1)
        cross = F.binary_cross_entropy_with_logits(z, y, reduction="none", pos_weight=z.new_tensor(8.))
        total = 0. + ((2 * cross.mean(1) + written_out(z.sigmoid(), y)) * there).mean()
        return total + F.binary_cross_entropy_with_logits(score[:, 0], there)
    same(lambda x: track_loss([Found(x, None, None, score)], seen[:, :2]), before, x)


def test_prompt_loss_of_the_toy_sam():
    x, truth = draw(3, 3, 48, 48)[0], draw(3, 48, 48, seed=1)[1] > 0
    guess, y = torch.rand(3, 3, generator=torch.Generator().manual_seed(2)), truth[:, None].float().expand_as(x)
    def before(x):
        cross = F.binary_cross_entropy_with_logits(x, y, reduction="none").mean((2, 3))
        each = 3 * cross + written_out(x.sigmoid().flatten(2), y.flatten(2))
        on = x.detach() > 0
        iou = (on & (y > 0)).sum((2, 3)) / (on | (y > 0)).sum((2, 3)).clamp(min=1)
        return each.min(1).values.mean() + .1 * each.mean() + F.mse_loss(guess, iou)
    same(lambda x: prompt_loss(x, guess, truth), before, x)


def test_hard_masks_are_dice_but_for_the_one():
    g = torch.Generator().manual_seed(3)
    for share in (0., .01, .5, 1.):
        a, b = (torch.rand(20, 9, 9, generator=g) < share for _ in range(2))
        D, n = dice(a, b), a.sum((1, 2)) + b.sum((1, 2))
        soft = soft_dice(a.flatten(1).double(), b.flatten(1).double())
        assert torch.allclose(soft, D + (1 - D) / (n + 1), atol=1e-12)
        assert (soft >= D).all() and (soft <= 1).all()
        assert torch.allclose(soft_dice(a.flatten(1), b.flatten(1)).double(), soft)     # bool with bool


def test_empty_masks_cost_nothing_and_have_a_slope():
    none = torch.zeros(2, 50)
    assert torch.equal(soft_dice(none, none), torch.ones(2))
    _, slope = with_slope(lambda p: soft_dice(p, none), torch.full((2, 50), .1))
    assert torch.allclose(slope, torch.full((2, 50), -1 / 36))        # sum of p is 5
    _, slope = with_slope(lambda p: soft_dice(p, none), none)
    assert torch.equal(slope, torch.full((2, 50), -1.))
    _, slope = with_slope(lambda x: soft_dice(x.sigmoid(), none), torch.full((2, 50), -100.))
    assert slope.isfinite().all()


def test_the_slope_is_that_of_a_fraction():
    x, y = draw(3, 40)
    p = x.sigmoid().double()
    _, slope = with_slope(lambda p: soft_dice(p, y.double()), p)
    below = p.sum(-1, keepdim=True) + y.sum(-1, keepdim=True) + 1
    want = (2 * y - soft_dice(p, y.double())[:, None]) / below
    assert torch.allclose(slope, want) and (slope[y > 0] > 0).all() and (slope[y == 0] < 0).all()


@pytest.mark.parametrize("p, y", [((2, 5), (5,)), ((2, 5), (1, 5)), ((2, 1, 5), (2, 5)), ((2, 5), (2, 4))])
def test_unequal_shapes_are_refused_not_broadcast(p, y):
    with pytest.raises(DataError, match="must be equal") as e: soft_dice(torch.rand(p), torch.rand(y))
    assert str(p) in str(e.value) and str(y) in str(e.value)
