"The page of 55_widget in a real JupyterLab and a real browser: paint, ask, move the threshold."
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from tests.conftest import ROOT

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
CELL = """
import json
from pathlib import Path
import torch
from timet_nb.data.frames import read_clip
from timet_nb.data.layout import find_layout
from timet_nb.data.worlds import shipped_clips
from timet_nb.evaluate.incontext import Answer, InContextSegmenter, decide
from timet_nb.sine.widget import ask_widget

torch.set_num_threads(1)
cups, ids = read_clip(find_layout(shipped_clips())["cup-wall"])
mixed, _ = read_clip(find_layout(shipped_clips())["helmet-path"])

class Known(InContextSegmenter):
    "Knows the truth of the cups; the first one is surer than the second. Not to be trusted elsewhere."
    method, runs = "known", 0
    def encode(self, shots, n_classes): return dict(n=torch.ones(1))
    def answer(self, image, prompt):
        Known.runs += 1
        t = [k for k in range(len(cups)) if torch.equal(cups[k], image)]
        m = ids[t[0]] if t else torch.zeros(image.shape[1:], dtype=torch.long)
        first, second = (m == 1).float(), (m == 2).float()
        scores = (.9 * first + .6 * second)[None]
        both = ((first, 1, .9), (second, 1, .6))
        return Answer(prompt.names, scores, decide(scores), .8 * first[None], both)

panel = ask_widget(Known(), {"cups, frame 0": cups[0], "cups, frame 8": cups[8], "helmet": mixed[0]}, SKETCH)

def tell(change=None):
    a, cup = panel.asker, ids[0] == 1
    Path("state.json").write_text(json.dumps(dict(
        marked=int(a.mask.sum()), iou=float((a.mask & cup).sum() / (a.mask | cup).sum()), runs=Known.runs,
        threshold=a.threshold, answered=a.answered, strokes=[s.kind for s in a.strokes],
        box=[list(p) for s in a.strokes if s.kind == "box" for p in s.xy], target=a.target, sheet=type(panel.sketch).__name__)))
for part, what in ((panel.sketch, "stroke"), (panel.status, "value"), (panel.level, "value")): part.observe(tell, what)
panel
"""


def missing():
    "Why there is no browser test here; None: there is one."
    if not chromium(): return "chromium is not installed (Debian: apt-get install chromium)"
    for name in ("playwright", "jupyterlab", "anywidget", "ipywidgets"):
        if importlib.util.find_spec(name) is None: return f"{name} is not installed"


def chromium(): return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing() or ""), pytest.mark.timeout(240)]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(ready, seconds, what):
    "Wait for something, and say what did not come."
    end = time.time() + seconds
    while time.time() < end:
        if found := ready(): return found
        time.sleep(.1)
    raise AssertionError(f"{what} did not come in {seconds} s")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab of its own, without the settings of whoever runs the test."
    home = tmp_path_factory.mktemp("lab")
    for sketch in ("canvas", "sliders"):
        cell = nbformat.v4.new_code_cell(CELL.replace("SKETCH", repr(sketch)), metadata=dict(jupyter=dict(source_hidden=True)))
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=dict(
            kernelspec=dict(name="python3", display_name="python3", language="python"))), home / f"{sketch}.ipynb")
    port, log = free_port(), open(home / "lab.log", "w")
    keep = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "CI", "PYTEST_CURRENT_TEST") and not k.startswith("JPY_")}
    env = dict(keep, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TIMET_QUIET="0", HOME=str(home), TIMET_CACHE=str(home / "cache"),
               **{f"JUPYTER_{k}_DIR": str(home / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")})
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
                               "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={home}",
                               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
                              cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"

    def up():
        assert server.poll() is None, (home / "lab.log").read_text()[-1500:]
        try: return urllib.request.urlopen(f"{url}/api/status", timeout=2).status == 200
        except OSError: return False
    try:
        until(up, 60, "JupyterLab")
        yield url, home
    finally:
        server.terminate()
        try: server.wait(15)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


@pytest.fixture(scope="module")
def browser(lab):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        made = p.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield made
        made.close()


class Page:
    "The notebook in the browser, and what its kernel wrote down."

    def __init__(self, browser, lab, name):
        self.url, self.home = lab
        (self.home / "state.json").unlink(missing_ok=True)
        from playwright.sync_api import TimeoutError
        self.asked = []
        self.page = browser.new_page(viewport=dict(width=1360, height=1000))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(f"{self.url}/lab/tree/{name}.ipynb?reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        self.page.wait_for_selector("text=/Python 3.* Idle/", timeout=60_000)
        with contextlib.suppress(TimeoutError): self.page.click(".jp-toast-button:has-text('No')", timeout=3_000)    # no news, thank you
        self.page.click(".lm-MenuBar-itemLabel:has-text('Run')")
        self.page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
        try: self.page.wait_for_selector(".tnb-page", timeout=60_000)
        except Exception as e: raise AssertionError(f"no page came: {self.page.inner_text('.jp-Notebook')[-1500:]}") from e

    def state(self, **wanted):
        "What Python knows, as soon as it is what is wanted."
        seen = {}

        def look():
            try: seen.update(json.loads((self.home / "state.json").read_text()))
            except (OSError, ValueError): return None
            return seen if all(f(seen[k]) if callable(f) else seen[k] == f for k, f in wanted.items()) else None
        try: return until(look, 20, f"state {list(wanted)}")
        except AssertionError as e: raise AssertionError(f"{e}; state: {seen}; page: {self.page.inner_text('.tnb-page')}") from None

    def said(self, text): self.page.wait_for_selector(f".tnb-page >> text={text}", timeout=20_000)

    def outputs(self):
        "Bytes of the three answers as the browser shows them."
        return self.page.evaluate("""async () => Promise.all([...document.querySelectorAll('.tnb-page img.widget-image')].slice(-3)
            .map(async i => { await i.decode().catch(() => 0); const c = document.createElement('canvas');
                c.width = i.naturalWidth; c.height = i.naturalHeight; c.getContext('2d').drawImage(i, 0, 0); return c.toDataURL(); }))""")

    def sheet(self):
        "Place of the canvas on the screen."
        board = self.page.locator(".tnb-board")
        board.scroll_into_view_if_needed()
        return board.bounding_box()

    def drag(self, *path, size=(320, 192)):
        "Move the mouse along pixels of the picture with the button down."
        b = self.sheet()
        at = [(b["x"] + x / size[0] * b["width"], b["y"] + y / size[1] * b["height"]) for x, y in path]
        self.page.mouse.move(*at[0]); self.page.mouse.down()
        for p in at[1:]: self.page.mouse.move(*p, steps=4)
        self.page.mouse.up()

    def slide(self, key, times):
        handle = self.page.locator(".tnb-page .widget-hslider:has-text('threshold') .noUi-handle")
        handle.focus()
        for _ in range(times): self.page.keyboard.press(key)


@pytest.fixture(scope="module")
def cup_box():
    from timet_nb.data.frames import read_mask
    from timet_nb.data.layout import find_layout
    from timet_nb.data.worlds import shipped_clips
    y, x = read_mask(find_layout(shipped_clips())["cup-wall"].masks[0]).eq(1).nonzero(as_tuple=True)
    return int(x.min()) - 3, int(y.min()) - 3, int(x.max()) + 4, int(y.max()) + 4


def test_paint_ask_and_move_the_threshold(lab, browser, cup_box):
    p = Page(browser, lab, "canvas")
    p.said("nothing is marked yet")
    x0, y0, x1, y1 = cup_box
    p.drag((x0, y0), (x1, y1))
    state = p.state(strokes=["box"])
    assert state["sheet"] == "SketchCanvas" and state["iou"] > .8 and state["runs"] == 0
    for got, want in zip(sum(state["box"], []), cup_box): assert abs(got - want) < 1.5, (state["box"], cup_box)
    p.said("of the picture is marked")

    blank = p.outputs()
    p.page.click(".tnb-page button:has-text('Ask')")
    state = p.state(answered=True, runs=1)
    p.said("score 0.80"); p.said("score 0.90, 0.60")
    shown = p.outputs()
    assert all(a != b for a, b in zip(blank, shown)), "an output did not change"
    assert len(set(shown)) == 3, "three answers, three pictures"
    if out := os.environ.get("TIMET_SCREENSHOT"):
        p.page.wait_for_timeout(300)
        p.page.locator(".tnb-page").screenshot(path=out)

    p.slide("PageUp", 2)                                     # one or more tenths
    state = p.state(threshold=lambda t: t > .5, runs=1)
    moved = state["threshold"]
    while moved <= .62:                                     # until the second cup is gone
        p.slide("ArrowRight", 3)
        moved = p.state(threshold=lambda t: t > moved)["threshold"]
    assert .62 < moved < .8, "too far: identity would be gone as well"
    until(lambda: p.outputs()[1] != shown[1], 10, "a changed picture of instances")
    after = p.outputs()
    assert after[2] != shown[2] and after[0] == shown[0], "identity scores .8 and must stay"
    assert p.state(threshold=moved)["runs"] == 1, "the slider asked the model again"
    assert not [u for u in p.asked if not u.startswith((p.url, p.url.replace("http", "ws"), "data:", "blob:"))], p.asked
    p.page.close()


def test_points_brush_eraser_undo_and_targets(lab, browser, cup_box):
    p = Page(browser, lab, "canvas")
    x0, y0, x1, y1 = cup_box
    middle = (x0 + x1) / 2, (y0 + y1) / 2
    p.page.click("[data-tool=here]"); p.drag(middle)
    state = p.state(strokes=["point"], marked=lambda n: n > 50)
    p.page.click("[data-tool=brush]"); p.drag((20, 20), (60, 20))
    more = p.state(strokes=["point", "brush"])
    assert 400 < more["marked"] - state["marked"] < 1200     # 40 x 16 and two half discs
    p.page.click("[data-tool=erase]"); p.drag((10, 20), (70, 20))
    p.state(strokes=["point", "brush", "brush"], marked=state["marked"])
    p.page.click("[data-tool=not]"); p.drag((300, 180))
    p.state(strokes=["point", "brush", "brush", "point"])
    p.page.click("button:has-text('Undo')"); p.state(strokes=["point", "brush", "brush"])
    p.page.click(".tnb-page button:has-text('Ask')"); p.state(answered=True, runs=1)
    p.page.locator(".tnb-page select").nth(1).select_option("helmet")
    p.state(target="helmet", answered=False)
    p.page.click(".tnb-page button:has-text('Ask')"); p.state(answered=True, runs=2)
    p.said("nothing (best 0.00)")
    p.page.click("button:has-text('Clear')"); p.state(strokes=[], marked=0)
    p.page.click(".tnb-page button:has-text('Ask')")
    p.said("nothing is marked")
    p.page.close()


def test_sliders_where_there_is_no_canvas(lab, browser):
    p = Page(browser, lab, "sliders")
    p.page.click("button:has-text('Add box')")
    assert p.state(strokes=["box"])["sheet"] == "SketchSliders"
    line = p.page.locator(".tnb-page input[placeholder^=points]")
    line.fill("160,90; not 10,10"); line.press("Tab")
    p.page.click("button:has-text('Add points')")
    p.state(strokes=["box", "point", "point"])
    p.page.click("button:has-text('Clear')"); p.state(strokes=[])
    line.fill("999,90"); line.press("Tab")
    p.page.click("button:has-text('Add points')")
    p.said("x in 0..319")
    p.page.close()
