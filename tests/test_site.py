"The sources of the site, and a preview of it, without Quarto."
import re
from pathlib import Path

import pytest
import yaml

from tests import site


def test_sources_are_sound():
    assert site.check_sources() == []


@pytest.mark.parametrize("text, problem", [
    ("see @fig-none", "@fig-none has no label"), ("see [it](nowhere.ipynb)", "does not exist"),
    ("::: {.callout-note}\nhello", "unclosed :::"), ("```{mermaid}\na-->b\n```", "mermaid"),
])
def test_checks_catch_what_quarto_swallows(text, problem, tmp_path, monkeypatch):
    import nbformat
    monkeypatch.setattr(site, "ROOT", tmp_path)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_markdown_cell(text)])
    nbformat.write(nb, tmp_path / "a.ipynb")
    assert any(problem in p for p in site.check_notebook(tmp_path / "a.ipynb")), site.check_notebook(tmp_path / "a.ipynb")


def test_config_checks_catch_a_typo():
    cfg = yaml.safe_load((site.ROOT / "_quarto.yml").read_text())
    cfg["website2"] = 1; cfg["format"]["html"]["theeme"] = "x"; cfg["format"]["html"]["html-math-method"] = "mathjax"
    assert len(site.check_config(cfg)) == 3


def test_preview_has_every_page_its_api_blocks_and_no_broken_link(tmp_path):
    "One test, so that parallel workers never build in the same folder."
    out, broken = site.preview(tmp_path / "out")
    pages = {p.relative_to(out).as_posix(): p.read_text() for p in Path(out).rglob("*.html")}
    assert len(pages) >= len(site.notebooks()), f"{len(pages)} pages for {len(site.notebooks())} notebooks"
    assert "preview, not the Quarto build" in pages["index.html"], "the preview does not say that it is one"
    text = "".join(pages.values())
    assert len(re.findall(r"data:image/png|<img ", text)) > 20
    assert "sinkhorn" in text and "Type" in text
    assert broken == [], "\n".join(broken)
