"COCO's score of found objects: hand cases, policies, faults, and pycocotools as an oracle."
import math

import numpy as np
import pytest
import torch

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.evaluate.average_precision import (
    AveragePrecision, Objects, box_ious, mask_boxes, mask_ious, match_objects, object_boxes, precision_curve)
from timet_nb.evaluate.boundary import mask_iou


def box_mask(x0, y0, x1, y1, size=(40, 60)):
    m = torch.zeros(size, dtype=torch.bool); m[y0:y1, x0:x1] = True
    return m


def objects(boxes, labels, size=(40, 60), **more):
    masks = torch.stack([box_mask(*b, size) for b in boxes]) if boxes else torch.zeros(0, *size, dtype=torch.bool)
    return Objects(masks, torch.tensor(labels, dtype=torch.long), **more)


def score(pairs, **options):
    ap = AveragePrecision(**options)
    for t, f in pairs: ap.add(t, f)
    return ap.result()


def test_perfect_and_nothing():
    t = objects([(0, 0, 10, 10), (20, 5, 50, 30)], [1, 1])
    assert score([(t, objects([(0, 0, 10, 10), (20, 5, 50, 30)], [1, 1], scores=torch.tensor([.2, .9])))]).ap == pytest.approx(1)
    assert score([(t, objects([], [], scores=torch.zeros(0)))]).ap == 0


def test_one_of_two_found_first():
    "Recall .5 with precision 1, nothing beyond: 51 of 101 places."
    t = objects([(0, 0, 10, 10), (20, 5, 50, 30)], [1, 1])
    f = objects([(0, 0, 10, 10), (50, 30, 60, 40)], [1, 1], scores=torch.tensor([.9, .8]))
    assert score([(t, f)]).ap == pytest.approx(51 / 101)
    f = objects([(0, 0, 10, 10), (50, 30, 60, 40)], [1, 1], scores=torch.tensor([.8, .9]))    # the wrong one is surer
    assert score([(t, f)]).ap == pytest.approx(.5 * 51 / 101)


def test_overlap_thresholds():
    "IoU .8: seven of ten thresholds (.5 to .8)."
    t, f = objects([(0, 0, 10, 10)], [3]), objects([(0, 0, 8, 10)], [3], scores=torch.ones(1))
    r = score([(t, f)])
    assert r.ap == pytest.approx(.7) and r.ap50 == r.ap75 == pytest.approx(1)


def test_double_hit_is_a_false_alarm_but_not_on_a_crowd():
    found = objects([(0, 0, 10, 10)] * 2 + [(20, 5, 50, 30)], [1] * 3, scores=torch.tensor([.9, .8, .7]))
    t = objects([(0, 0, 10, 10), (20, 5, 50, 30)], [1, 1])
    assert score([(t, found)]).ap < 1
    crowd = objects([(0, 0, 10, 10), (20, 5, 50, 30)], [1, 1], crowd=torch.tensor([True, False]))
    assert score([(crowd, found)]).ap == pytest.approx(1)


def test_class_without_truth_is_named_and_in_no_mean():
    t = objects([(0, 0, 10, 10)], [1])
    f = objects([(0, 0, 10, 10), (20, 20, 30, 30)], [1, 7], scores=torch.ones(2))
    r = score([(t, f)])
    assert r.ap == pytest.approx(1) and r.absent == (7,) and set(r.per_class) == {1} and "[7]" in repr(r)
    assert math.isnan(score([(objects([], []), f)]).ap)


def test_match_prefers_counted_ones():
    ious = np.array([[.6, .9]])
    assert match_objects(ious, np.array([False, True]), np.array([False, False]), .5).tolist() == [0]
    assert match_objects(ious, np.array([True, False]), np.array([False, False]), .95).tolist() == [-1]


def test_boxes_and_masks_agree_on_boxes():
    g = torch.Generator().manual_seed(0)
    b = [(int(x), int(y), int(x) + 5, int(y) + 9) for x, y in torch.randint(0, 30, (6, 2), generator=g)]
    o = objects(b, [1] * 6)
    assert object_boxes(o).tolist() == [list(map(float, x)) for x in b]
    none = torch.zeros(6, dtype=torch.bool)
    assert torch.allclose(mask_ious(o.masks, o.masks, none), box_ious(object_boxes(o), object_boxes(o), none))
    assert mask_ious(o.masks, o.masks).equal(mask_ious(o.masks, o.masks, none))        # no crowd: nobody is one
    assert box_ious(object_boxes(o), object_boxes(o)).equal(box_ious(object_boxes(o), object_boxes(o), none))
    assert not mask_ious(o.masks, o.masks).equal(mask_ious(o.masks, o.masks, ~none))
    assert object_boxes(Objects(torch.zeros(1, 4, 4, dtype=torch.bool), torch.ones(1))).tolist() == [[0.] * 4]


def test_overlaps_by_matrix_product_equal_the_count_pair_by_pair():
    g = torch.Generator().manual_seed(3)
    for n, m in ((5, 3), (1, 4), (0, 2), (3, 0)):
        a, b = (torch.rand(k, 17, 23, generator=g) < torch.rand(k, 1, 1, generator=g) for k in (n, m))
        a[:1] = b[:1] = False
        assert mask_ious(a, b).equal(mask_iou(a[:, None], b, empty=0.))


def test_one_box_for_all_rooms():
    from timet_nb.sam import automatic
    from timet_nb.sine import answers
    g = torch.Generator().manual_seed(4)
    masks = torch.rand(40, 9, 12, generator=g) < torch.rand(40, 1, 1, generator=g) ** 4; masks[0] = False
    boxes, last = mask_boxes(masks), mask_boxes(masks, official=True)
    some = masks.flatten(1).any(1)
    assert boxes.dtype == torch.int64 and (boxes[~some] == 0).all() and (last[~some] == 0).all()
    for m, (x0, y0, x1, y1), on in zip(masks, boxes.tolist(), some):
        tight = torch.zeros_like(m); tight[y0:y1, x0:x1] = True
        assert (m <= tight).all()
        if on: assert m[y0].any() and m[y1 - 1].any() and m[:, x0].any() and m[:, x1 - 1].any()
    assert (boxes - last)[some].tolist() == [[0, 0, 1, 1]] * int(some.sum())
    assert answers.mask_boxes is mask_boxes and automatic.mask_boxes(masks).equal(last)    # SAM's end on the last pixel
    assert automatic.box_iou is box_ious and mask_boxes(masks[:0]).shape == (0, 4)


def test_precision_curve_by_hand():
    c = precision_curve(np.array([True, False, True]), 2)
    assert c[:51].tolist() == pytest.approx([1.] * 51) and c[51:].tolist() == pytest.approx([2 / 3] * 50)


def test_faults():
    t = objects([(0, 0, 10, 10)], [1])
    with pytest.raises(DataError, match="no scores"): AveragePrecision().add(t, t)
    with pytest.raises(DataError, match="size of the picture"):
        AveragePrecision().add(t, objects([(0, 0, 5, 5)], [1], (20, 20), scores=torch.ones(1)))
    with pytest.raises(DataError, match="NaN"): AveragePrecision().add(t, objects([(0, 0, 5, 5)], [1], scores=torch.tensor([math.nan])))
    with pytest.raises(DataError, match="none"): AveragePrecision().result()
    with pytest.raises(ConfigError, match="mask or box"): AveragePrecision("points")
    with pytest.raises(DataError, match="masks of found"):
        AveragePrecision().add(t, Objects(torch.zeros(2, 40, 60, dtype=torch.bool), torch.ones(1), torch.ones(1)))


# ---- the oracle

def random_world(seed, pictures=12, classes=3, size=(160, 220)):
    "Pictures with true objects, crowds among them, and what a bad detector finds: shifted, doubled, missed, invented."
    rng = np.random.default_rng(seed)
    worlds = []
    for _ in range(pictures):
        def blob():
            h, w = (int(v) for v in np.exp(rng.uniform(1.5, 4.8, 2)))
            y, x = int(rng.integers(0, size[0] - 4)), int(rng.integers(0, size[1] - 4))
            yy, xx = np.mgrid[:size[0], :size[1]]
            return (((yy - y) / max(h, 3)) ** 2 + ((xx - x) / max(w, 3)) ** 2) < 1
        n = int(rng.integers(0, 6))
        true = [blob() for _ in range(n)]
        labels, crowd = rng.integers(1, classes + 1, n), rng.random(n) < .2
        found, names = [], []
        for m, c in zip(true, labels):
            for _ in range(int(rng.integers(0, 3))):
                found.append(np.roll(m, tuple(rng.integers(-4, 5, 2)), (0, 1))); names.append(c if rng.random() < .9 else rng.integers(1, classes + 1))
        for _ in range(int(rng.integers(0, 3))): found.append(blob()); names.append(rng.integers(1, classes + 1))
        pack = lambda ms: torch.from_numpy(np.stack(ms)) if ms else torch.zeros(0, *size, dtype=torch.bool)
        scores = torch.from_numpy(rng.choice(np.linspace(.05, 1, 12), len(found)))             # ties happen
        worlds.append((Objects(pack(true), torch.from_numpy(labels).long(), crowd=torch.from_numpy(crowd)),
                       Objects(pack(found), torch.tensor(np.array(names, dtype=np.int64)), scores)))
    return worlds


def official(worlds, kind, limits=(1, 10, 100)):
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools, the oracle, is not installed (pip install pycocotools)")
    from pycocotools import mask as rle
    from pycocotools.cocoeval import COCOeval
    def code(m):
        r = rle.encode(np.asfortranarray(m.numpy().astype(np.uint8)))
        return r
    def xywh(m):
        x0, y0, x1, y1 = object_boxes(Objects(m[None], torch.ones(1)))[0].tolist()
        return [x0, y0, x1 - x0, y1 - y0]
    images, truths, found, n = [], [], [], 1
    for i, (t, f) in enumerate(worlds, 1):
        H, W = t.masks.shape[1:]
        images.append(dict(id=i, height=H, width=W))
        for m, c, crowd in zip(t.masks, t.labels.tolist(), t.crowd.tolist()):
            truths.append(dict(id=n, image_id=i, category_id=c, iscrowd=int(crowd), area=float(m.sum()), bbox=xywh(m), segmentation=code(m))); n += 1
        for m, c, s in zip(f.masks, f.labels.tolist(), f.scores.tolist()):
            one = dict(image_id=i, category_id=c, score=s)
            found.append(one | (dict(segmentation=code(m)) if kind == "mask" else dict(bbox=xywh(m))))
    gt = coco.COCO(); gt.dataset = dict(images=images, annotations=truths, categories=[dict(id=c, name=str(c)) for c in (1, 2, 3)]); gt.createIndex()
    ev = COCOeval(gt, gt.loadRes(found), "segm" if kind == "mask" else "bbox")
    ev.params.maxDets = list(limits)
    ev.evaluate(); ev.accumulate()
    return ev


@pytest.mark.parametrize("kind", ["mask", "box"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools(kind, seed, capsys):
    worlds = random_world(seed)
    ev = official(worlds, kind); ev.summarize()
    ours = score(worlds, kind=kind)
    told = [ours.ap, ours.ap50, ours.ap75, ours.ap_small, ours.ap_medium, ours.ap_large,
            *(ours.recall[k] for k in ("1", "10", "100", "small", "medium", "large"))]
    told = [-1 if math.isnan(x) else x for x in told]
    assert told == pytest.approx(ev.stats.tolist(), abs=1e-9)
    p = ev.eval["precision"][:, :, :, 0, 2]
    for k, c in enumerate((1, 2, 3)):
        want = p[:, :, k]
        if want.max() >= 0: assert ours.per_class[c] == pytest.approx(want.mean(), abs=1e-9)
        else: assert c not in ours.per_class


def test_limit_of_found_objects_equals_pycocotools(capsys):
    worlds = random_world(9, pictures=6)
    ev = official(worlds, "mask", (1, 2, 3)); ours = score(worlds, limits=(1, 2, 3))
    p = ev.eval["precision"][:, :, :, 0, 2]
    assert ours.ap == pytest.approx(p[p > -1].mean(), abs=1e-9)
    assert ours.ap != pytest.approx(score(worlds).ap, abs=1e-6)          # the limit bites here
