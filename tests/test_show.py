"0_base/00_palette, 03_plot and 03_show: colours that differ for every eye, pictures that show the data, clips within a size."
import io, itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tests.test_record import run_book
from timet_nb.base import show
from timet_nb.base.palette import EYES, IGNORE_COLOUR, LINES, PALETTE, colour_table, contrast, figure, lab, look, palette_distance, seen_by
from timet_nb.base.runtime import DataError
from timet_nb.base.show import (as_ids, as_image, bars, colour_ids, curves, dots, edges, gif_bytes, overlay, pca_rgb, show_clip,
                                show_images, show_masks, show_rows)


@pytest.fixture(scope="module")
def scene():
    g = torch.Generator().manual_seed(0); ramp = torch.linspace(0, 1, 48)
    ground = torch.stack([ramp.expand(32, 48), ramp[:32, None].expand(32, 48), torch.full((32, 48), .4)])
    masks = torch.zeros(6, 32, 48, dtype=torch.long)
    for t in range(6): masks[t, 8:20, 4 + 5 * t:16 + 5 * t] = 1; masks[t, 22:30, 30:40] = 2
    frames = torch.where(masks[:, None] == 1, torch.rand(3, 1, 1, generator=g), ground)
    return frames, masks


def pixels(fig):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(fig); canvas.draw(); return np.asarray(canvas.buffer_rgba())


# ---- palette ---------------------------------------------------------------------------------------------------------

def test_palette_differs_for_every_eye():
    assert PALETTE.shape == (15, 3) and (PALETTE >= 0).all() and (PALETTE <= 1).all() and len(EYES) == 3
    assert palette_distance(PALETTE).min() > 18 and palette_distance(PALETTE[:1 + LINES]).min() > 20
    assert palette_distance(np.concatenate([PALETTE, np.ones((1, 3))]))[-1].min() > 18       # and from white
    assert contrast(PALETTE[1:1 + LINES]).min() > 3 and contrast(PALETTE[0]) > 7


def test_palette_distance_is_symmetric_and_the_least_over_eyes():
    rgb = np.random.default_rng(0).random((8, 3)); d = palette_distance(rgb)
    assert np.allclose(d, d.T) and np.isinf(np.diag(d)).all()
    usual = np.linalg.norm(lab(seen_by(rgb, "usual"))[:, None] - lab(seen_by(rgb, "usual")), axis=-1)
    off = ~np.eye(8, dtype=bool)
    assert (d[off] <= usual[off] + 1e-9).all() and not np.allclose(d[off], usual[off])


def test_lab_and_contrast_agree_with_scikit_image():
    color = pytest.importorskip("skimage.color"); rgb = np.random.default_rng(0).random((50, 3))
    assert np.abs(lab(seen_by(rgb, "usual")) - color.rgb2lab(rgb)).max() < .02
    assert abs(contrast(np.zeros(3)) - 21) < 1e-3 and contrast([1, 1, 1]) == 1
    assert contrast(PALETTE[1], (0, 0, 0)) == pytest.approx(21 / contrast(PALETTE[1]), rel=1e-3)


def test_colour_table():
    assert (colour_table(15) == PALETTE).all() and len(np.unique(colour_table(43), axis=0)) == 43
    big = colour_table(300); assert big.shape == (300, 3) and big.min() >= 0 and big.max() <= 1 and (big[43] == PALETTE[1]).all()


# ---- images and ids --------------------------------------------------------------------------------------------------

def test_as_image_takes_every_usual_form(scene):
    x = scene[0][0]; expected = x.permute(1, 2, 0).numpy()
    pil = Image.fromarray((expected * 255).round().astype(np.uint8))
    for form in (x, x.numpy(), expected, x.half(), x.bfloat16(), x.double(), x.requires_grad_(), (x * 255).byte(), pil):
        y = as_image(form); assert y.shape == (32, 48, 3) and y.dtype == np.float32 and np.abs(y - expected).max() < .005
    grey = x[0].detach()
    for form in (grey, grey[None], grey[..., None], grey.numpy()): assert (as_image(form) == grey.numpy()[..., None]).all()
    assert as_image(x.detach() * 1.04 - .02).max() <= 1 and as_image(grey > .5).max() == 1
    assert as_image(expected[:1]).shape == (1, 48, 3) and as_image(expected[:, :1]).shape == (32, 1, 3)      # one row, one column
    assert as_image(np.asfortranarray(expected)[::-1]).shape == (32, 48, 3)


@pytest.mark.parametrize("bad, hint", [
    (torch.zeros(2, 3, 8, 8), "one image at a time"), (torch.zeros(4, 8, 8), "without alpha"), (torch.zeros(3), "shape"), (torch.zeros(3, 0, 8), "shape"),
    (torch.zeros(3, 8, 8) - 2, "undo the normalisation"), (torch.full((3, 8, 8), 255.), "0..255: divide by 255"), (torch.zeros(3, 8, 8).long(), "dtype int64"),
    (torch.full((3, 8, 8), float("nan")), "nan at index"), ("dog.jpg", "got str"), (None, "got NoneType"), ([[1]], "got list")])
def test_as_image_refuses_the_rest(bad, hint):
    with pytest.raises(DataError, match=hint): as_image(bad)


@pytest.mark.parametrize("bad", [torch.zeros(8, 8), torch.zeros(1, 8, 8).long(), torch.full((8, 8), -1), [[1]], np.zeros((8, 8, 3), int)])
def test_as_ids_refuses_what_is_no_mask(bad):
    with pytest.raises(DataError, match="mask"): as_ids(bad, "mask")


def edges_slow(ids):
    H, W = ids.shape; out = np.zeros((H, W), bool)
    for i, j in itertools.product(range(H), range(W)):
        for u, v in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if 0 <= u < H and 0 <= v < W: out[i, j] |= ids[u, v] != ids[i, j]
    return out


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.sampled_from([0, 1, 2, 255])))
def test_edges_and_overlay_properties(ids):
    assert (edges(ids) == edges_slow(ids)).all()
    assert (edges(ids, 2) >= edges(ids)).all() and (edges(ids[:, ::-1])[:, ::-1] == edges(ids)).all()
    image = np.random.default_rng(0).random((*ids.shape, 3)).astype(np.float32); colour_first = image.transpose(2, 0, 1)
    y = overlay(colour_first, ids, .5, contour=1)
    assert (y[ids == 0] == image[ids == 0]).all() and y.min() >= 0 and y.max() <= 1
    assert np.allclose(y[edges(ids) & (ids == 1)], PALETTE[1]) and np.allclose(overlay(colour_first, ids, alpha=0), image)
    inner = (ids == 2) & ~edges(ids); assert np.allclose(y[inner], (image[inner] + PALETTE[2]) / 2, atol=1e-6)


def test_colour_ids_and_coarse_maps():
    ids = torch.tensor([[0, 1], [255, 40]]); colours = colour_ids(ids)
    assert (colours[0] == PALETTE[:2]).all() and (colours[1, 0] == IGNORE_COLOUR).all() and (colours[1, 1] == colour_table(41)[40]).all()
    assert (colour_ids(ids > 0)[0, 1] == PALETTE[1]).all() and colour_ids(np.full((2, 2), 300)).shape == (2, 2, 3)
    big = overlay(np.zeros((4, 6, 3), np.float32), np.array([[1, 2]]), alpha=1)
    assert np.allclose(big[:, :3], PALETTE[1]) and np.allclose(big[:, 3:], PALETTE[2])
    for shape in ((3, 6), (8, 6), (4, 4)):
        with pytest.raises(DataError, match="divides it"): overlay(np.zeros((4, 6, 3), np.float32), np.ones(shape, int))


# ---- figures ---------------------------------------------------------------------------------------------------------

def test_figures_belong_to_nobody_and_leave_the_style_alone():
    import matplotlib, matplotlib.pyplot as plt
    before = dict(matplotlib.rcParams)
    figs = [figure(2, 1), show_images(torch.rand(2, 3, 8, 8)), curves({"a": [1, 2]}), bars({"a": 1}), dots({"a": [1, 2]})]
    assert plt.get_fignums() == [] and dict(matplotlib.rcParams) == before
    for fig in figs: assert fig._repr_png_()[:4] == b"\x89PNG" and fig.dpi == 80 and fig._repr_png_() == fig._repr_png_()
    assert Image.open(io.BytesIO(figs[0]._repr_png_())).size == (160, 80)
    with pytest.raises(ZeroDivisionError), look(): 1 / 0
    assert dict(matplotlib.rcParams) == before


def test_images_are_shown_as_given(scene):
    frames, masks = scene
    fig = show_images(frames, ["t"] * 6, ncols=4, suptitle="Six")
    assert len([ax for ax in fig.axes if ax.images]) == 6 and fig._suptitle.get_text() == "Six"
    for ax, x in zip(fig.axes, frames): assert np.allclose(ax.images[0].get_array(), x.permute(1, 2, 0))
    assert show_images(frames[0]).axes[0].images and len(show_images([frames[0], frames[0][:, :9]]).axes) == 2
    for args in (([],), (frames, ["a"])):
        with pytest.raises(DataError): show_images(*args)
    with pytest.raises(DataError, match=r"images\[1\]"): show_images([frames[0], frames[0] * 9])
    rows = show_rows({"a": frames[:3], "b": list(masks[:3].bool().float())}, "xyz")
    assert [ax.get_title() for ax in rows.axes] == ["x", "y", "z", "", "", ""] and rows.axes[3].texts[0].get_text() == "b"
    for bad in ({"a": frames[:1], "b": frames[:2]}, {}):
        with pytest.raises(DataError): show_rows(bad)


def test_legend_names_what_is_present(scene):
    frames, masks = scene
    def legend(classes, m=masks[:2]): return [t.get_text() for t in show_masks(frames[:2], m, classes=classes).legends[0].get_texts()]
    assert legend({1: "dog", 2: "swan", 3: "absent"}) == ["dog", "swan"] and legend(["ground", "dog"]) == ["ground", "dog", "id 2"]
    ignored = masks[:2].clone(); ignored[:, 0] = 255; assert legend({1: "dog"}, ignored) == ["dog", "id 2", "ignore"]
    assert show_masks(frames[:2], masks[:2]).legends == [] and show_masks(frames[0], masks[0]).axes
    assert show_masks(frames[:1], masks[:1] * 0, classes={1: "dog"}).legends == []
    with pytest.raises(DataError, match="3 masks"): show_masks(frames[:2], masks[:3])


def test_a_cell_shows_a_figure_once_and_a_clip_with_its_text(tmp_path):
    "In a kernel, with pyplot's inline backend on and off: one PNG a cell; a clip brings HTML with the GIF and a still."
    make = "from timet_nb.base.show import *; import torch; x = torch.rand(2, 3, 16, 16)"
    out, error = run_book(tmp_path, make, "show_images(x)", "curves({'a': [1, 2]})", "show_clip(x, alt='two frames of noise')",
                          "import matplotlib.pyplot as plt; plt.plot([1]); plt.close()", "show_images(x)", "bars({'a': 1}); dots({'a': [1]})")
    assert error is None
    import nbformat
    found = [[o["data"] for o in c.outputs if "data" in o and "image/png" in o["data"]] for c in nbformat.read(out, 4).cells]
    assert [len(f) for f in found] == [0, 1, 1, 1, 0, 1, 1]
    assert "data:image/gif;base64," in found[3][0]["text/html"] and 'alt="two frames of noise"' in found[3][0]["text/html"]


def test_plots_draw_the_data():
    rng = np.random.default_rng(0); y = rng.random((3, 5)); x = [1, 2, 4, 8, 16]
    ax = curves({"a": (x, torch.tensor(y)), "b": list(y[0])}, "x", "y", "t", reference=("floor", .1), log=True).axes[0]
    assert np.allclose(ax.lines[0].get_ydata(), y.mean(0)) and list(ax.lines[0].get_xdata()) == x and ax.get_yscale() == "log"
    band = ax.collections[0].get_paths()[0].vertices; assert band[:, 1].min() == y.min() and band[:, 1].max() == y.max()
    assert {"a", "b"} == {t.get_text() for t in ax.get_legend().get_texts()} and "floor" in {t.get_text() for t in ax.texts}
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle() and ax.get_title(loc="left") == "t"
    ax = bars({"up": [1, 2], "down": -.5}, reference=1).axes[0]
    assert [p.get_width() for p in ax.patches] == [1.5, -.5] and {"mean 1.50", "-0.500"} <= {t.get_text() for t in ax.texts}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["up", "down"]


def test_dots_join_the_same_clip():
    a, b = np.array([.1, .5, .9]), np.array([.3, .4, .9])
    ax = dots({"before": a, "after": np.stack([b - .01, b + .01])}, names=["x", "y", "z"], fmt=".2f").axes[0]
    joins = ax.lines[:3]
    assert [tuple(np.round(l.get_ydata(), 9)) for l in joins] == [(.1, .3), (.5, .4), (.9, .9)]
    assert [l.get_linestyle() for l in joins] == ["-", "--", "-"]
    assert {"x", "y", "z", "0.50", "0.53"} <= {t.get_text() for t in ax.texts}
    free = dots({"a": a, "b": b}, paired=False).axes[0]; assert len(free.lines) == 4         # dots and means, no joins
    spots = {(round(x, 6), y) for x, y in zip(*dots({"a": [.5] * 5}).axes[0].lines[0].get_data())}
    assert len(spots) == 5                                                                    # equal values stay visible
    with pytest.raises(DataError, match="the same clips"): dots({"a": a, "b": b[:2]}, paired=True)
    with pytest.raises(DataError, match="2 names"): dots({"a": a}, names=["x", "y"])
    assert len(dots({"a": a, "b": b[:2]}).axes[0].lines) == 4
    assert dots({"a": [.5] * 30, "b": [.5] * 30}, names=range(30))._repr_png_()


@pytest.mark.parametrize("plot", [curves, bars, dots])
@pytest.mark.parametrize("bad, hint", [([1., float("nan")], r"nan at index \(1,\)"), ([], "no value"), (["a"], "numbers"), ([[1, 2], [3]], "equal length"),
                                       (torch.tensor([float("inf")]), "inf at index")])
def test_plots_refuse_what_is_no_number(plot, bad, hint):
    with pytest.raises(DataError, match=f"(?s)mIoU.*{hint}"): plot({"mIoU": bad})


def test_curves_refuse_lengths_that_differ():
    with pytest.raises(DataError, match="got shape"): curves({"a": ([1, 2], [1, 2, 3])})


def test_pictures_do_not_change_between_runs(scene):
    a, b = (pixels(show_masks(*scene, classes={1: "dog"})) for _ in "ab"); assert (a == b).all()


# ---- features --------------------------------------------------------------------------------------------------------

def test_pca_rgb_shapes_and_range():
    x = torch.randn(2, 3, 10, 4, 5, generator=torch.Generator().manual_seed(0))
    y = pca_rgb(x); assert y.shape == (2, 3, 3, 4, 5) and y.min() >= 0 and y.max() <= 1
    assert pca_rgb(x[0, 0]).shape == (3, 4, 5) and pca_rgb(x.numpy(), 12).shape == (2, 3, 3, 12, 12) and pca_rgb(x, (8, 10)).shape[-2:] == (8, 10)
    assert torch.equal(pca_rgb(x), y) and pca_rgb(x.half()).dtype == torch.float32 and pca_rgb(x.requires_grad_()).grad_fn is None
    assert pca_rgb(x[:, :, :2].detach())[:, :, 2].unique().tolist() == [.5]               # two channels: blue stays grey
    assert (pca_rgb(torch.ones(2, 5, 3, 4)) == .5).all() and pca_rgb(torch.rand(1, 7, 1, 1)).shape == (1, 3, 1, 1)
    for bad in (torch.zeros(3, 4), torch.full((4, 3, 3), float("nan")), torch.zeros(4, 3, 3).long()):
        with pytest.raises(DataError, match="features"): pca_rgb(bad)


def test_pca_rgb_is_one_basis_and_follows_variance():
    g = torch.Generator().manual_seed(1); x = torch.randn(3, 16, 6, 6, generator=g) * torch.tensor([9., 5., 3.] + [.1] * 13)[:, None, None]
    y = pca_rgb(x, clip=0)
    for c in range(3):                                     # the strongest channels, in their order and with their sign
        r = np.corrcoef(y[:, c].ravel(), x[:, c].ravel())[0, 1]; assert r > .85
    twice = pca_rgb(torch.cat([x, x])); assert torch.allclose(twice[:3], twice[3:]) and torch.allclose(pca_rgb(x * 5 - 2), pca_rgb(x), atol=1e-3)
    assert torch.allclose(pca_rgb(x.flip(-1)), pca_rgb(x).flip(-1), atol=1e-4)


# ---- clips -----------------------------------------------------------------------------------------------------------

def test_gif_is_deterministic_and_loops(scene):
    frames, _ = scene; data = gif_bytes(frames, fps=10, width=96); gif = Image.open(io.BytesIO(data))
    assert gif_bytes(frames, fps=10, width=96) == data == gif_bytes(frames.permute(0, 2, 3, 1).numpy(), fps=10, width=96) == gif_bytes(list(frames), 10, 96)
    assert (gif.n_frames, gif.size, gif.info["loop"], gif.info["duration"]) == (6, (96, 64), 0, 100)
    first = np.asarray(gif.convert("RGB")) / 255; wanted = torch.nn.functional.interpolate(frames[:1], (64, 96), mode="bilinear")[0].permute(1, 2, 0).numpy()
    assert np.abs(first - wanted).mean() < .05


@pytest.mark.parametrize("max_kb", [200, 60, 20, 8, 3])
def test_gif_keeps_its_bound_and_its_speed(max_kb):
    noise = torch.rand(24, 3, 60, 90, generator=torch.Generator().manual_seed(0))           # the worst case: pure noise
    data = gif_bytes(noise, fps=8, width=180, max_kb=max_kb); gif = Image.open(io.BytesIO(data))
    assert len(data) <= max_kb * 1000
    total = 0
    for i in range(getattr(gif, "n_frames", 1)): gif.seek(i); total += gif.info.get("duration", 0)
    assert gif.n_frames == 1 or abs(total - 3000) < 400        # 24 frames at 8 a second last three seconds, whatever was dropped


def test_gif_refuses_what_cannot_be(scene):
    with pytest.raises(DataError, match="fewer frames"): gif_bytes(scene[0], max_kb=.05)
    with pytest.raises(DataError, match="sizes"): gif_bytes([scene[0][0], scene[0][1][:, :20]])
    with pytest.raises(DataError, match="at least one frame"): gif_bytes([])
    with pytest.raises(DataError, match=r"frames\[1\]"): gif_bytes([scene[0][0], scene[0][1] * 300])


def test_show_clip(scene, tmp_path):
    frames, masks = scene; clip = show_clip(frames, masks, path=tmp_path / "new" / "a.gif", width=96, alt='<a "dog">')
    from IPython.display import Image as Shown
    assert isinstance(clip, Shown) and (tmp_path / "new" / "a.gif").read_bytes() == clip.data[:] and clip.data[:4] == b"GIF8"
    bundle = clip._repr_mimebundle_(); assert 'alt="&lt;a &quot;dog&quot;&gt;"' in bundle["text/html"] and bundle["image/png"]
    tinted = np.asarray(Image.open(io.BytesIO(clip.data)).convert("RGB")) / 255          # the outline of object 2 in its colour
    line = np.abs(tinted - PALETTE[2]).sum(-1).min(); assert line < .1
    assert show_clip(frames, masks[:, ::8, ::8], width=48).data and show_clip(frames[:1]).data and show_clip((frames * 255).byte()).data
    for bad in (masks[:2], masks.float(), masks[:, :30]):
        with pytest.raises(DataError): show_clip(frames, bad)


def test_everything_that_others_import_is_there():
    for name in ("PALETTE LINES IGNORE_COLOUR colour_ids colour_table show_images overlay show_masks show_rows pca_rgb show_clip curves bars dots look figure").split():
        assert hasattr(show, name) and name in show.__all__
