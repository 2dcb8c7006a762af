"Can the features choose: layers, controls, look-alikes."
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from timet_nb.base.runtime import DataError
from timet_nb.data.draws import sample_episodes
from timet_nb.data.textures import render_textures, texture_source, texture_world, write_textures
from timet_nb.evaluate import pick as K
from timet_nb.evaluate.incontext import Answer, InContextSegmenter, decide
from timet_nb.features.backbone import create_backbone


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A folder of a few scenes, and its episodes."
    out = write_textures(tmp_path_factory.mktemp("pick") / "w", 1, 3, texture_world(photos=False), n_novel=14)
    return out, sample_episodes(texture_source(out, "novel"), 8, seed=2)


class Told(InContextSegmenter):
    "Knows the truth of every target, and obeys the reference as told."
    method = "told"

    def __init__(self, episodes, obey): self.obey, self.table = obey, {float(e.read().query.sum()): e for e in episodes}
    def encode(self, shots, n_classes): return dict(none=torch.zeros(1))

    def answer(self, image, prompt):
        e = self.table[float(image.sum())]
        c = int(prompt.names[0])
        every = torch.stack([e.query.mask(k) for k in e.query.classes]).sum(0).clamp(max=1)
        ids = every if not self.obey else e.query.mask(c) if c in e.query.classes else torch.zeros_like(every)
        return Answer(prompt.names, ids.float()[None], decide(ids.float()[None]))


def test_obedience_and_saliency(world):
    _, episodes = world
    rows = K.selective({"obeys": Told(episodes, True), "salient": Told(episodes, False)}, list(episodes))
    good, blind = rows
    assert good["right"] == 1 and good["wrong, present"] == 0 and good["gap"] == 1 and good["refused"] == 1
    assert good["other"] == 0 and good["choice"] == 1 > good["chance"]
    assert blind["gap"] == 0 and blind["other"] == 1 and blind["refused"] == 0 and blind["right"] < 1


def test_refused_is_nan_without_absent_classes(world):
    _, episodes = world
    e = [x for x in episodes][:1]
    assert 0 <= K.refused(Told(e, False), e) <= 1
    assert math.isnan(K.refused(Told(e, True), []))


def test_perfect_features_choose_and_noise_does_not():
    g = torch.Generator().manual_seed(0)
    masks = torch.zeros(60, 8, 12, dtype=torch.long)
    for m in masks:
        for k, c in enumerate((torch.randperm(6, generator=g)[:3] + 1).tolist()): m[1:7, 4 * k:4 * k + 3] = c
    perfect = F.one_hot(masks, 7).movedim(-1, 1).float()
    noise = torch.rand(60, 7, 8, 12, generator=g)
    good, bad = K.pick_layers(dict(perfect=perfect, noise=noise), masks)
    assert good["raw"] == good["z-scored"] == 1 and abs(good["chance"] - 1 / 3) < 1e-6
    assert abs(bad["z-scored"] - 1 / 3) < .1


def test_layers_by_name():
    vit = create_backbone("test-vit")
    names = K.layer_names(vit, 2)
    assert list(names)[-1] == "final" and len(names) == 2
    x = torch.rand(3, 3, 32, 48)
    maps = K.layer_maps(vit, x, layers=names, batch=2)
    assert torch.allclose(maps["final"], vit.tokens(x).detach(), atol=1e-5)
    one = K.layer_maps(vit, x, (64, 64), layers=names)
    assert one["final"].shape[2:] == (8, 8)


def test_joined_layers_have_equal_say():
    a, b = torch.rand(2, 5, 6, 8), 1000 * torch.rand(2, 9, 6, 8)
    both = K.joined([a, b])
    assert torch.allclose(both[:, :5].norm(dim=1), torch.ones(2, 6, 8), atol=1e-5)
    assert torch.allclose(both, K.joined([a, b / 1000]), atol=1e-5)


class Finder(InContextSegmenter):
    "Who: the object of the marked colour; what: all objects."
    method = "finder"

    def __init__(self, scenes): self.scenes = scenes
    def encode(self, shots, n_classes): return dict(mask=(shots[0].ids == 1))

    def answer(self, image, prompt):
        s = next(s for s in self.scenes if torch.equal(s.image2, image))
        i = int(s.ids[prompt.tensors["mask"]][0])
        kin = {i, *(j for t in s.twins if i in t for j in t)}
        what = torch.isin(s.ids2, torch.tensor(sorted(kin)))
        return Answer(prompt.names, what.float()[None], what.long(), identity=(s.ids2 == i).float()[None])


def test_twins_of_a_perfect_method():
    scenes = [s for s in render_textures(texture_world(photos=False), 20, 4) if s.twins][:4]
    r = K.evaluate_twins(Finder(scenes), scenes)
    assert (r.choice, r.iou, r.iou_twin, r.recall, r.recall_twin, r.other) == (1, 1, 0, 1, 1, 0) and r.cases == 8


def test_a_twin_out_of_view_is_no_case():
    "Nobody can be mistaken for one who is not there: such a pair changes no mean, and is counted."
    scenes = [s for s in render_textures(texture_world(photos=False), 20, 4) if len(s.twins) == 1][:3]
    finder = Finder(scenes)
    alone, (i, j) = K.evaluate_twins(finder, scenes[1:]), scenes[0].twins[0]
    for view, k in (("ids2", j), ("ids2", i), ("ids", j)):
        ids = getattr(scenes[0], view)
        gone = replace(scenes[0], **{view: torch.where(ids == k, 0, ids)})
        r = K.evaluate_twins(finder, [gone, *scenes[1:]])
        assert r == replace(alone, unseen=1) and r.cases == 4, (view, k)
        with pytest.raises(DataError, match="1 out of view"): K.evaluate_twins(finder, [gone])


def test_marking_nothing_has_an_overlap_of_zero():
    "Both are in view, so an empty answer is 0 of the marked one, and 0 of the twin; never 0 / 0."
    class Silent(Finder):
        def answer(self, image, prompt):
            none = torch.zeros(1, *image.shape[1:])
            return Answer(prompt.names, none, decide(none), identity=none)
    scenes = [s for s in render_textures(texture_world(photos=False), 20, 4) if s.twins][:2]
    r = K.evaluate_twins(Silent(scenes), scenes)
    assert (r.choice, r.iou, r.iou_twin, r.recall, r.recall_twin, r.unseen) == (0, 0, 0, 0, 0, 0)


def test_no_twins():
    with pytest.raises(DataError, match="look-alikes"): K.evaluate_twins(Finder([]), [])
    with pytest.raises(DataError, match="look-alikes"): K.evaluate_twins(Finder([]), [SimpleNamespace(twins=())])
