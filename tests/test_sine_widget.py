"55: strokes become masks, an Asker asks once, the threshold reads, the page passes on; no browser."
import builtins

import numpy as np
import pytest
import torch

from timet_nb.base.runtime import ConfigError, DataError
from timet_nb.data.frames import read_image, read_mask, write_image
from timet_nb.data.layout import find_layout
from timet_nb.data.worlds import shipped_clips
from timet_nb.evaluate.incontext import Answer, InContextSegmenter, PatchSegmenter, decide
from timet_nb.features.backbone import create_backbone
from timet_nb.sine import widget
from timet_nb.sine.ask import OUTPUTS, Asker, album, ask, read_answer, shipped_pictures, tint, words
from timet_nb.sine.mformer import MFormerConfig
from timet_nb.sine.model import SineConfig, create_sine
from timet_nb.sine.segment import SineSegmenter
from timet_nb.sine.sketch import (
    BACK, MAYBE_OBJECT, OBJECT, Stroke, box_region, brush_region, discs, grow, point_region, read_stroke, sketch_mask, typed_strokes)
from timet_nb.sine.widget import AskPanel, ask_widget, sliders_class, veil


def toy(second=False):
    "A red square of 400 pixels on green; perhaps a second one of 160."
    x = torch.zeros(3, 40, 60); x[1] = .6
    red = torch.tensor([.8, .1, .1])[:, None, None]
    x[:, 10:30, 20:40] = red
    if second: x[:, 10:30, 48:56] = red
    return x


BOX = ((16., 6.), (44., 34.))


class Red(InContextSegmenter):
    "Red pixels, with scores by their shade; counts what it is asked."
    method = "red"

    def __init__(self): self.prompts = self.asked = 0

    def encode(self, shots, n_classes):
        self.prompts += 1
        return dict(area=torch.tensor([float((shots[0].ids == 1).sum())]))

    def answer(self, image, prompt):
        self.asked += 1
        soft = image[:1].clone()
        left = soft[0] * (torch.arange(soft.shape[-1]) < 44)
        return Answer(prompt.names, soft, decide(soft), soft * .9, ((left > .5, 1, .8), ((soft[0] - left) > .5, 1, .3)))


class Plain(Red):
    "Tells a semantic map only."
    def answer(self, image, prompt):
        a = super().answer(image, prompt)
        return Answer(a.names, a.scores, a.ids)


class Counted(Red):
    "One segmenter for all copies."
    log = []
    def answer(self, image, prompt): self.log.append("target"); return super().answer(image, prompt)
    def encode(self, shots, n_classes): self.log.append("reference"); return super().encode(shots, n_classes)


@pytest.fixture
def asker():
    Counted.log = []
    return Asker(Counted(), {"a": toy(), "b": toy(True), "c": torch.zeros(3, 32, 50)})


# ---- strokes

def test_strokes_are_put_in_order_and_cut():
    s = read_stroke(dict(kind="box", xy=[[50, 35], [-4, 5]]), (40, 48))
    assert s.xy == ((0, 5), (48, 35)) and s.add
    assert read_stroke(dict(kind="brush", xy=[[-5, 3], [70, 3]], add=False, radius=2), (40, 48)).add is False
    assert read_stroke(dict(kind="point", xy=[["3", "4"]]), (40, 48)).xy == ((3., 4.),)


@pytest.mark.parametrize("told", [
    dict(kind="star", xy=[[1, 1]]), dict(kind="point", xy=[]), dict(kind="point"), dict(xy=[[1, 1]]), dict(kind="box", xy=[[1, 1]]),
    dict(kind="box", xy=[[1, 1], [2, 30]]), dict(kind="box", xy=[[60, 60], [90, 90]]), dict(kind="box", xy=[[1, 1], [9, 9]], add=False),
    dict(kind="point", xy=[[48, 3]]), dict(kind="point", xy=[[3, -1]]), dict(kind="point", xy=[[float("nan"), 3]]),
    dict(kind="point", xy=[[1, 2, 3]]), dict(kind="point", xy=[["x", "y"]]), dict(kind="brush", xy=[[1, 1]], radius=0),
    dict(kind="brush", xy=[[1, 1]], radius=float("nan"))])
def test_what_is_no_stroke_is_refused(told):
    with pytest.raises(DataError): read_stroke(told, (40, 48))


def test_discs_and_brush_by_hand():
    assert discs((9, 9), [(4, 4)], 1).sum() == 5
    m = brush_region((21, 41), Stroke("brush", ((10, 10), (30, 10)), radius=3))
    assert m[10].sum() == 27 and m[:, 20].sum() == 7
    assert brush_region((21, 41), Stroke("brush", ((-3, -3),), radius=1)).sum() == 0       # beside the picture


def test_grow_without_an_example_gives_the_seeds():
    assert grow(toy(), np.full((40, 60), MAYBE_OBJECT, np.uint8)).all() and not grow(toy(), np.full((40, 60), BACK, np.uint8)).any()
    seeds = np.full((40, 60), BACK, np.uint8); seeds[5:9, 5:9] = OBJECT
    assert grow(toy(), seeds).sum() == 16


def test_box_points_and_all_together():
    square = torch.zeros(40, 60, dtype=torch.bool); square[10:30, 20:40] = True
    assert torch.equal(torch.from_numpy(box_region(toy(), BOX)), square)
    near = Stroke("point", ((30, 20),))
    assert torch.equal(torch.from_numpy(point_region(toy(True), [near], .3)), square)      # the other red thing is not joined
    box, other = Stroke("box", BOX), Stroke("box", ((45, 6), (59, 34)))
    assert sketch_mask(toy(True), [box, other]).sum() == 560
    off = Stroke("brush", ((30, 20),), False, 4)
    assert sketch_mask(toy(), [box, off]).sum() == 400 - 49
    assert sketch_mask(toy(), [off, box]).sum() == 400 - 49                                # the brush has the last word
    assert torch.equal(sketch_mask(toy(), [], square), square)
    assert not sketch_mask(toy(), [Stroke("point", ((3, 3),), False)]).any()
    with pytest.raises(DataError): point_region(toy(), [Stroke("point", ((3, 3),), False)])


def test_a_point_says_not_here():
    x = toy(); x[:, 10:30, 20:25] = torch.tensor([.1, .1, .9])[:, None, None]             # a blue part
    box = Stroke("box", BOX)
    whole, less = sketch_mask(x, [box]), sketch_mask(x, [box, Stroke("point", ((22, 15), (22, 25)), False)])
    assert whole[15, 22] and not less[15, 22] and less[15, 35]


def test_masks_are_the_same_every_time_and_stay_in_their_box():
    clip = find_layout(shipped_clips())["horse-lawn"]
    x, m = read_image(clip.frames[0]), read_mask(clip.masks[0]) == 1
    y, c = m.nonzero(as_tuple=True)
    box = Stroke("box", ((float(c.min()), float(y.min())), (float(c.max() + 1), float(y.max() + 1))))
    a, b = sketch_mask(x, [box]), sketch_mask(x, [box])
    assert torch.equal(a, b) and a.any()
    inside = torch.zeros_like(a); inside[y.min():y.max() + 1, c.min():c.max() + 1] = True
    assert not (a & ~inside).any()


@pytest.mark.parametrize("kind,least", [("box", .8), ("points", .75)])
def test_shipped_objects_are_found(kind, least):
    got = []
    for name in ("cat-lawn", "cup-wall", "shuttle-clouds", "helmet-path"):
        clip = find_layout(shipped_clips())[name]
        x, m = read_image(clip.frames[0]), read_mask(clip.masks[0]) == 1
        y, c = (v.double() for v in m.nonzero(as_tuple=True))
        if kind == "box": told = typed_strokes(box=(c.min() - 3, y.min() - 3, c.max() + 3, y.max() + 3))
        else: told = typed_strokes(points=[[c.median(), y.median()], [c.quantile(.3), y.median()]])
        found = sketch_mask(x, [read_stroke(t, tuple(m.shape)) for t in told])
        got.append(float((found & m).sum() / (found | m).sum()))
    assert np.mean(got) > least, got


def test_typed_strokes():
    told = typed_strokes([[4, 5, 1], [6, 7, 0]], (1, 2, 30, 40), [[3, 3], [5, 5]], 2.)
    assert [t["kind"] for t in told] == ["box", "point", "point", "brush"] and [t.get("add", True) for t in told] == [True, True, False, True]
    assert typed_strokes() == [] and len(typed_strokes([4, 5])) == 1
    with pytest.raises(DataError, match="4 numbers"): typed_strokes([[1, 2, 3, 4]])


# ---- reading

def test_reading_by_hand():
    on = lambda *k: torch.tensor([[float(n in k) for n in range(4)]])
    a = Answer(("cup",), on(0, 1)[None] * .6, on(0, 1).long(), None, ((on(0, 1), 1, .4), (on(1, 2), 1, .9)))
    r = read_answer(a, .3)
    assert list(r) == list(OUTPUTS) and r["identity"].ids is None
    assert r["instances"].ids.tolist() == [[2, 1, 1, 0]] and r["instances"].found[0] == ("cup 1", .9, .5)
    assert read_answer(a, .9)["instances"].found == () and read_answer(a, .9)["instances"].best == .9      # above, not at
    assert words(r["identity"]) == "this method does not tell" and "0.60" in words(read_answer(a, .7)["semantic"])


def test_threshold_equals_the_segmenter_and_never_shows_more():
    a = PatchSegmenter(create_backbone("test-vit"), size=(64, 96))
    p = a.prompt(toy(), (toy()[0] > .5).long())
    told = a.segment(toy(True), p)
    shown = None
    for t in (.1, .35, .6, .9):
        a.threshold = t
        ids = read_answer(told, t)["semantic"].ids
        assert torch.equal(ids, a.segment(toy(True), p).ids)
        assert shown is None or not ((ids > 0) & ~shown).any()
        shown = ids > 0


def small_sine(**changes):
    torch.manual_seed(0)
    config = SineConfig(decoder=MFormerConfig(dim=32, heads=4, mlp=48, depth=2, queries=6, mask_padding=True), size=None, pad=None, norm=True,
                        threshold=.5, **changes)
    return SineSegmenter(create_sine(config, create_backbone("test-vit"), 0))


def test_sine_gives_three_outputs_and_its_own_list_is_left_alone():
    s = small_sine()
    a = Asker(s, [toy(), toy(True)], .5)
    a.draw(Stroke("box", BOX)); a.run()
    assert all(r.ids is not None and tuple(r.ids.shape) == (40, 60) for r in a.read(.1).values())
    assert s.sure == .5 and a.segmenter.sure == .1
    direct = s.segment(toy(True), s.prompt(toy(), a.mask.long()))
    got = a.read(.5)
    assert torch.equal(got["semantic"].ids, direct.ids) and len(got["instances"].found) == len(direct.found)


# ---- the Asker

def test_the_same_question_is_asked_once(asker):
    asker.draw(dict(kind="box", xy=BOX))
    for t in (.2, .5, .8): asker.run(); asker.read(t)
    assert Counted.log == ["reference", "target"] and asker.threshold == .8 and asker.passes == 1
    asker.choose(target="c").run()
    assert Counted.log == ["reference", "target", "target"]
    asker.choose(target="b"); assert asker.answered
    asker.draw(dict(kind="brush", xy=[[3, 3]])); assert not asker.answered
    with pytest.raises(DataError, match="none to this question"): asker.read()
    asker.undo(); assert asker.answered and len(Counted.log) == 3


def test_strokes_belong_to_their_picture(asker):
    asker.draw(dict(kind="box", xy=BOX)); one = asker.mask
    asker.choose(reference="b"); assert asker.strokes == [] and not asker.mask.any()
    asker.draw(dict(kind="brush", xy=[[5, 5]])); asker.choose(reference="a")
    assert torch.equal(asker.mask, one) and not asker.clear().any()
    assert asker.choose(reference="b").mask.any()


def test_what_cannot_be_done_leaves_no_trace(asker):
    for told in (dict(kind="point", xy=[[99, 9]]), dict(kind="box", xy=[[1, 1]])):
        with pytest.raises(DataError): asker.draw(told)
    assert asker.strokes == [] and asker.undo().sum() == 0
    with pytest.raises(DataError, match="nothing is marked"): asker.run()
    with pytest.raises(DataError, match="one of"): asker.choose(target="nowhere")
    assert asker.target == "b"
    asker.draw(dict(kind="box", xy=BOX)); asker.run()
    for t in (.05, 1.1, float("nan")):
        with pytest.raises(DataError, match="threshold"): asker.read(t)
    for bad in (dict(floor=-.1), dict(floor=1.), dict(threshold=.05)):
        with pytest.raises(ConfigError): Asker(Red(), [toy()], **bad)


def test_pictures_from_files_folders_and_lists(tmp_path):
    for n in (1, 2): write_image(tmp_path / f"view{n}.png", toy(n == 2))
    for source in (tmp_path, {"one": tmp_path / "view1.png", "two": toy()}, [str(tmp_path / "view1.png"), toy()]):
        a = Asker(Red(), source)
        assert len(a.pictures) == 2 and a.picture(a.reference).shape == (3, 40, 60) and a.picture(a.target).shape == (3, 40, 60)
    name = a.add_file(f" {tmp_path / 'view2.png'} ")
    assert name == "view2.png" and a.choose(target=name).picture(name).shape == (3, 40, 60) and a.choose(reference=name).strokes == []
    with pytest.raises((DataError, OSError)): a.add_file(tmp_path / "none.png")
    with pytest.raises(DataError, match="none"): album([])
    with pytest.raises(DataError): album([torch.zeros(2, 2)])
    assert len(shipped_pictures()) == 24


def test_ask_draws_and_refuses(tmp_path):
    write_image(tmp_path / "target.png", toy(True))
    answer, figure = ask(toy(), box=(16, 6, 44, 34), target=tmp_path / "target.png", segmenter=Red())
    assert answer.ids.sum() == 560 and figure._repr_png_()[:4] == b"\x89PNG"
    mask = torch.zeros(40, 60, dtype=torch.bool); mask[12:20, 22:30] = True
    for how in (dict(brush=mask), dict(brush=[[25, 15], [30, 15]], radius=3), dict(points=[[30, 20], [2, 2, ]]), dict(points=[[30, 20, 1], [2, 2, 0]])):
        assert ask(toy(), segmenter=Plain(), **how)[0].ids.sum() == 400                    # no target: the picture itself
    with pytest.raises(DataError, match="nothing is marked"): ask(toy(), segmenter=Red())
    with pytest.raises(DataError): ask(toy(), points=[[70, 20]], segmenter=Red())


def test_tint_and_veil():
    r = read_answer(Answer(("x",), torch.zeros(1, 40, 60), torch.zeros(40, 60, dtype=torch.long)), .5)
    assert tint(toy(), r["identity"]).min() > .7                                           # faded
    assert np.allclose(tint(toy(), r["semantic"]), toy().permute(1, 2, 0).numpy())         # nothing shown: the picture
    m = torch.zeros(9, 9, dtype=torch.bool); m[2:7, 2:7] = True
    layer = veil(m)[..., 3]
    assert layer[0, 0] == 0 and layer[2, 2] == 1 and .4 < layer[4, 4] < .5


# ---- the page

def page(kind=Counted, sketch="sliders", **more):
    pytest.importorskip("ipywidgets")
    kind.log = []
    return ask_widget(kind(), {"a": toy(), "b": toy(True)}, sketch, **more)


def test_page_by_its_parts(tmp_path):
    p = page()
    assert "draw a box" in p.status.value and p.sketch.x.max == 60 and p.sketch.y.max == 40
    p.sketch.x.value, p.sketch.y.value = (16, 44), (6, 34)
    p.sketch.buttons["box"].click()
    assert p.asker.mask.sum() == 400 and "16.7% of the picture" in p.sketch.text.value and Counted.log == []
    p.button.click()
    assert Counted.log == ["reference", "target"] and "answered in" in p.status.value and "score 0.80" in p.outs["instances"][2].value
    before = {k: v[1].value for k, v in p.outs.items()}
    p.level.value = .85
    assert p.outs["semantic"][1].value != before["semantic"] and "nothing (best 0.80)" in p.outs["instances"][2].value
    assert len(Counted.log) == 2
    write_image(tmp_path / "more.png", toy())
    p.path.value = str(tmp_path / "more.png")
    assert p.target.value == "more.png" and "more.png" in p.reference.options and p.path.value == "" and not p.asker.answered
    p.target.value = "b"
    assert "known already" in p.status.value and "nothing (best 0.80)" in p.outs["instances"][2].value


def test_page_says_what_is_wrong_and_goes_on():
    p = page()
    p.button.click(); assert "tnb-error" in p.status.value and "nothing is marked" in p.status.value
    p.path.value = "/no/such/<b>picture.png"; assert "tnb-error" in p.status.value and "<b>picture" not in p.status.value
    p.sketch.line.value = "30,20; not 3,3; x"; p.sketch.buttons["point"].click()
    assert "finite pairs" in p.status.value and [s.add for s in p.asker.strokes] == [True, False]
    p.sketch.buttons["undo"].click(); assert len(p.asker.strokes) == 1
    p.sketch.buttons["clear"].click(); assert not p.asker.mask.any()


def test_page_on_a_canvas():
    pytest.importorskip("anywidget")
    p = page(sketch="canvas")
    p.sketch.stroke = dict(kind="box", xy=[[16, 6], [44, 34]], n=1)
    assert p.asker.mask.sum() == 400 and p.sketch.note == "16.7% of the picture is marked" and len(p.sketch.strokes) == 1
    assert p.sketch.picture.startswith("data:image/png") and p.sketch.overlay != p.sketch.picture and (p.sketch.width, p.sketch.height) == (60, 40)
    p.sketch.stroke = dict(kind="undo", n=2); assert p.sketch.strokes == [] and p.sketch.note == "nothing is marked yet"
    assert "http" not in p.sketch._esm, "the script must not fetch anything"


def test_page_is_a_figure_where_nobody_can_touch_it(monkeypatch):
    p = page(Plain)
    monkeypatch.setenv("TIMET_QUIET", "1")
    assert set(p._repr_mimebundle_()) == {"text/plain"}
    p.asker.draw(dict(kind="box", xy=BOX)); p.button.click()
    assert "image/png" in p._repr_mimebundle_() and "does not tell" in p.outs["identity"][2].value
    monkeypatch.setenv("TIMET_QUIET", "0")
    assert "application/vnd.jupyter.widget-view+json" in p._repr_mimebundle_()


@pytest.mark.parametrize("absent,left", [((), "canvas"), (("anywidget",), "sliders"), (("anywidget", "ipywidgets"), "none")])
def test_without_packages_there_is_less_page(monkeypatch, absent, left):
    pytest.importorskip("anywidget")
    widget.canvas_class.cache_clear(); widget.sliders_class.cache_clear()
    real = widget.need

    def need(module, extra=None):
        if module in absent: raise ConfigError(f"package {module}")
        return real(module, extra)
    monkeypatch.setattr(widget, "need", need)
    got = ask_widget(Red(), [toy(), toy(True)])
    assert widget.best_sketch() == left
    if left == "none": assert isinstance(got, Asker) and "ask(image, box=" in repr(got)
    else: assert isinstance(got, AskPanel) and type(got.sketch).__name__ == f"Sketch{left.capitalize()}"
    widget.canvas_class.cache_clear(); widget.sliders_class.cache_clear()
    with pytest.raises(ConfigError, match="sketch"): ask_widget(Red(), [toy()], "paper")


def test_mini_looks_once_at_a_further_target():
    "What was seen of the example is kept: a further target costs one pass of the backbone over one picture."
    from timet_nb.features.weights import is_cached
    eyes = create_backbone("efficientnet-lite0-imagenet", strides=(8, 16, 32), pretrained=is_cached("efficientnet-lite0-imagenet"))
    pictures = {k: read_image(v) for k, v in list(shipped_pictures().items())[:3]}
    a = Asker(SineSegmenter.mini(backbone=eyes), pictures)
    a.draw(dict(kind="brush", xy=[[160, 90]], radius=20)); a.run()
    seen = []
    eyes.cnn.register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    a.choose(target=list(pictures)[2]).run()
    assert seen == [1]


def test_sliders_need_no_canvas(monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda n, *a, **k: (_ for _ in ()).throw(ImportError(n)) if n == "anywidget" else real(n, *a, **k))
    sliders_class.cache_clear()
    assert sliders_class().__name__ == "SketchSliders"


def test_who_is_asked_when_nobody_is_named(monkeypatch):
    from timet_nb.sine import ask as room

    def absent(module, extra=None): raise ConfigError(f"package {module}")
    monkeypatch.setattr(room, "need", absent)
    monkeypatch.setattr(room, "create_backbone", lambda name: create_backbone("test-vit"))
    assert isinstance(room.usual_segmenter(), PatchSegmenter)
    monkeypatch.setattr(room, "need", lambda m: type("train", (), dict(load_mini=staticmethod(lambda: small_sine().model))))
    assert isinstance(room.usual_segmenter(), SineSegmenter)
