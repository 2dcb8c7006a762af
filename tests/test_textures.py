"Texture worlds: patterns, scenes in two views, files, episodes, leaks, faults."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data import casting as C
from timet_nb.data import patterns as P
from timet_nb.data import textures as X
from timet_nb.data.draws import all_episodes, sample_episodes, wrong
from timet_nb.data.layers import render
from timet_nb.data.layout import find_layout


def has_skimage():
    try: import skimage  # noqa: F401
    except ImportError: return False
    return True


photos = pytest.mark.skipif(not has_skimage(), reason="scikit-image, whose photos the world uses, is not installed")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A folder of 4 training and 14 novel scenes, without photos."
    out = tmp_path_factory.mktemp("textures") / "world"
    return X.write_textures(out, 4, 3, X.texture_world(photos=False), n_novel=14)


@pytest.mark.parametrize("name", P.PATTERNS)
def test_pattern_is_a_function_of_the_plane(name):
    x, y = np.meshgrid(np.arange(50.), np.arange(40.))
    whole = P.texture(name, x, y, 5)
    assert whole.dtype == np.float32 and 0 <= whole.min() and whole.max() <= 1
    assert np.array_equal(whole[10:, 7:], P.texture(name, x[10:, 7:], y[10:, 7:], 5))
    assert name == "plain" or np.abs(whole - P.texture(name, x, y, 6)).max() > .1, "the seed does nothing"


def test_patterns_differ_from_each_other():
    "No two classes are the same picture: blurred mean, spread and edge density tell most of them apart."
    x, y = np.meshgrid(np.arange(120.), np.arange(90.))
    seen = {n: np.array([P.texture(n, x, y, 1).mean(), P.texture(n, x, y, 1).std(),
                         np.abs(np.diff(P.texture(n, x, y, 1), axis=1)).mean(),
                         np.abs(np.diff(P.texture(n, x, y, 1), axis=0)).mean()]) for n in P.PATTERNS}
    names = list(seen)
    same = [(a, b) for i, a in enumerate(names) for b in names[:i] if np.abs(seen[a] - seen[b]).max() < 1e-3]
    assert not same


@pytest.mark.parametrize("shape", P.SHAPES)
def test_area_of_shapes_is_what_was_asked(shape):
    from timet_nb.data.photos import rasterize
    cells = rasterize(P.shape_outline(shape, 2500, 17), (-80, -80), (160, 160))
    assert abs(cells.sum() - 2500) < 6


def test_unknown_names():
    with pytest.raises(ConfigError, match="texture"): P.texture("velvet", np.zeros(1), np.zeros(1))
    with pytest.raises(ConfigError, match="shape"): P.shape_outline("moon")


@pytest.mark.parametrize("kind", X.KINDS)
@pytest.mark.parametrize("part", X.PARTS)
def test_every_scene_holds_two_classes(kind, part):
    world = X.texture_world(kind, photos=False).only(part)
    for n in range(60):
        names = X.compose(world, n).names
        assert 2 <= len(names) <= 3 and len(set(names)) >= 2
        if part == "train": assert not set(names) & set(world.novel), "a novel class leaks into training"
        if part == "novel": assert set(names) & set(world.novel)
        if part == "novel" and kind == "textures": assert set(names) <= set(world.novel)


def test_scene_is_exact_and_repeatable():
    world = X.texture_world(photos=False)
    a, b = X.texture_scene(world, 11), X.texture_scene(world, 11)
    for k in ("image", "ids", "image2", "ids2"): assert torch.equal(getattr(a, k), getattr(b, k))
    clip = render(X.layers_of(a.recipe))
    assert torch.equal(clip.masks, torch.stack([a.ids, a.ids2]))
    assert (clip.frames[0] - a.image).abs().max() < 2.6 / 255
    assert set(a.ids.unique().tolist()) == {0, *a.classes} == set(a.ids2.unique().tolist())
    assert X.texture_scene(world, 12).name != a.name


def test_order_of_rendering_does_not_matter():
    world = X.texture_world(photos=False)
    one = list(X.render_textures(world, 4, 2))[3]
    assert torch.equal(one.image2, X.texture_scene(world, 2 * X.MOST + 3).image2)


def test_second_view_moves_turns_and_changes_light():
    world = X.texture_world(photos=False)
    recipes = [X.compose(world, n) for n in range(40)]
    things = [t for r in recipes for t in r.things]
    assert all(t.at[0] != t.at[1] for t in things) and len({round(t.turned) for t in things}) > 20
    assert min(t.grown for t in things) < .9 and max(t.grown for t in things) > 1.1
    assert min(r.gain for r in recipes) < .9 and max(r.gain for r in recipes) > 1.1
    assert all(r.ground.crops[0] != r.ground.crops[1] for r in recipes)


def test_objects_keep_their_size_and_place():
    world = X.texture_world(photos=False)
    for n in range(12):
        s = X.texture_scene(world, n)
        for i, t in zip(s.classes, s.recipe.things):
            y, x = (s.ids == i).nonzero().float().mean(0).tolist()
            share = float((s.ids == i).float().mean())
            assert share > .6 * t.area, "most of it is hidden"
            if share > .95 * t.area: assert abs(x - t.at[0][0]) < 4 and abs(y - t.at[0][1]) < 4


@pytest.mark.parametrize("twins", X.TWINS)
def test_look_alikes(twins):
    world = X.texture_world(photos=False, twins=twins)
    pairs = [r for r in (X.compose(world, n) for n in range(60)) if len(set(r.names)) < len(r.names)]
    assert len(pairs) > 15
    for r in pairs:
        name = next(n for n in r.names if r.names.count(n) > 1)
        a, b = (t for t, n in zip(r.things, r.names) if n == name)
        assert a.at != b.at
        assert (a.colours == b.colours) == (twins != "class")
        if twins == "all": assert (a.shape, a.dice, a.lay, a.area) == (b.shape, b.dice, b.lay, b.area)


def test_combinations_are_split_evenly():
    every, held = C.combo_classes()
    assert len(every) == 72 and len(held) == 18 and set(held) < set(every)
    train = set(every) - set(held)
    for k in (0, 1): assert {c.split(" ")[k] for c in train} == {c.split(" ")[k] for c in every}


def test_world_without_photos_says_so():
    world = X.texture_world(photos=False)
    assert "painted backgrounds" in world.notes[0] and not set(world.classes) & set(P.SURFACES)
    assert all(X.compose(world, n).ground.photo is None for n in range(20))


@photos
def test_world_with_photos():
    world = X.texture_world()
    assert set(P.SURFACES) < set(world.classes) and not world.notes
    s = X.texture_scene(world, 0)
    assert s.recipe.ground.photo in X.GROUNDS and s.image.std() > .05


def test_folder_is_an_ordinary_data_set(small):
    layout = find_layout(small)
    assert len(layout) == 18
    world = X.read_world(small, "novel")
    assert world.part == "novel" and world == X.texture_world(photos=False).only("novel")
    about = json.loads((small / "clips.json").read_text())
    assert {c["split"] for c in about.values()} == {"train", "novel"}
    s = X.texture_scene(world, 3 * X.MOST)
    src = X.texture_source(small, "novel")
    p = next(p for p in src.pictures if p.group == s.name)
    assert set(p.classes) == set(s.labels[0].unique().tolist()) - {0}
    assert torch.equal(p.mask(p.classes[0]) == 1, s.labels[0] == p.classes[0])


def test_episodes_and_controls(small):
    src = X.texture_source(small, "novel")
    world = X.read_world(small)
    n_present = 0
    for e in sample_episodes(src, 30, seed=1):
        assert e.class_name in world.novel and e.support[0].group != e.query.group and len(e.query.classes) >= 2
        present, absent = wrong(e, "present"), wrong(e, "absent")
        if present: n_present += 1; assert present.wrong_id in e.query.classes and present.wrong_id != e.class_id
        if absent: assert absent.wrong_id not in e.query.classes
    assert n_present > 15
    assert all(e.support[0].group == e.query.group for e in all_episodes(X.texture_source(small, "novel", "within")))


def test_training_source_never_asks_for_novel_classes(small):
    src = X.texture_source(small, "train")
    assert not {src.names[c] for c in src.classes} & set(X.NOVEL)
    assert not {src.names[c] for p in src.pictures for c in p.classes} & set(X.NOVEL)


@pytest.mark.parametrize("bad, word", [
    (dict(kind="moons"), "kind"), (dict(part="test"), "part"), (dict(twins="never"), "twins"),
    (dict(area=(.2, .3)), "area"), (dict(area=(.08, .05)), "area"), (dict(size=(40, 60)), "size"), (dict(size=(300, 300)), "size")])
def test_worlds_that_cannot_be(bad, word):
    with pytest.raises(ConfigError, match=word): X.texture_world(photos=False, **bad)


def test_class_lists_that_cannot_be():
    world = X.texture_world(photos=False)
    with pytest.raises(ConfigError, match="rise"): replace(world, classes=world.classes[::-1])
    with pytest.raises(ConfigError, match="twice"): replace(world, classes=(world.classes[0], *world.classes))
    with pytest.raises(ConfigError, match="novel"): replace(world, novel=("velvet",))
    with pytest.raises(ConfigError, match="three or more"): replace(world, novel=world.classes[:2], part="novel")
    with pytest.raises(ConfigError, match="photos"): replace(world, classes=tuple(sorted((*world.classes, "brick"))))


def test_faults_of_files(tmp_path, small):
    with pytest.raises(DataError, match="new or an empty"): X.write_textures(small)
    with pytest.raises(DataError, match="world.json"): X.texture_source(tmp_path)
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(DataError, match="no JSON"): X.read_world(tmp_path)
    (tmp_path / "world.json").write_text('{"moon": 1}')
    with pytest.raises(DataError, match="describes no world"): X.read_world(tmp_path)
    with pytest.raises(ConfigError, match="n"): X.render_textures(X.texture_world(photos=False), 0)
    with pytest.raises(ConfigError, match="seed"): X.compose(X.texture_world(photos=False), -1)


@pytest.fixture(scope="module")
def shown():
    "Objects of the shipped clips."
    from timet_nb.data.classes import class_set
    from timet_nb.data.worlds import shipped_clips
    return class_set(shipped_clips(), "objects", step=12)


def test_cutouts_hold_two_classes_and_exact_areas(shown):
    from timet_nb.data.cutouts import cut_pieces, cutout_scene
    pieces = cut_pieces(shown)
    for n in range(25):
        s = cutout_scene(pieces, n, photos=False)
        assert len(set(s.labels)) >= 2 and s.ids.unique().tolist() == list(range(len(s.labels) + 1))
        assert s.ids2.unique().tolist() == s.ids.unique().tolist()
    a, b = (cutout_scene(pieces, 3, photos=False) for _ in range(2))
    assert torch.equal(a.image, b.image) and torch.equal(a.ids2, b.ids2)


def test_cutout_folder_keeps_novel_classes_out_of_training(shown, tmp_path):
    from timet_nb.data.cutouts import cutout_source, write_cutouts
    novel = shown.names[1:3]
    out = write_cutouts(tmp_path / "c", shown, novel, n=5, n_novel=8, photos=False)
    train, test = cutout_source(out, "train"), cutout_source(out, "novel")
    assert not {train.names[c] for p in train.pictures for c in p.classes} & set(novel)
    assert {test.names[c] for p in test.pictures for c in p.classes} <= set(novel)
    with pytest.raises(DataError, match="new or an empty"): write_cutouts(out, shown, novel, n=1)


def test_cutout_faults(shown, tmp_path):
    from timet_nb.data.cutouts import cut_pieces, cutout_scene, cutout_source
    with pytest.raises(ConfigError, match="unicorn"): cut_pieces(shown, ["unicorn"])
    with pytest.raises(DataError, match="pieces"): cut_pieces(shown, min_share=.99)
    with pytest.raises(DataError, match="two classes"): cutout_scene(cut_pieces(shown, [shown.names[1]]), 0)
    with pytest.raises(ConfigError, match="seed"): cutout_scene(cut_pieces(shown), -1)
    with pytest.raises(DataError, match="fit"): cutout_scene(cut_pieces(shown), 0, area=(.6, .9), photos=False)
    with pytest.raises(DataError, match="world.json"): cutout_source(tmp_path)
