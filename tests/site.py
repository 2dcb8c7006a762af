"""Build the site and refuse a broken one.

`python -m tests.site` (what `make docs` runs): with Quarto on PATH the real site in _docs/, its warnings read and
judged; without it a preview by smalldocs, labelled as such. Both run the same checks of the sources first.
`tests/test_site.py` runs the checks and the preview."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
QUARTO_PROBLEMS = ("Unable to resolve crossref", "Unable to resolve link target", "unclosed")
ALLOWED = {  # what _quarto.yml may hold at each level; a typo in a key is ignored silently by Quarto
    "": {"project", "format", "website", "metadata-files"},
    "project": {"type"},
    "format": {"html", "commonmark"},
    "format.html": {"theme", "css", "toc", "toc-depth", "html-math-method", "code-overflow", "keep-md"},
    "website": {"page-navigation", "back-to-top-navigation", "repo-actions", "search", "navbar", "sidebar"},
    "website.navbar": {"background", "search", "left"},
    "website.sidebar": {"style", "collapse-level"},
}


def notebooks():
    "Every page of the site, in reading order."
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(NBS).parts))


def check_config(cfg, where=""):
    "Problems of the parsed _quarto.yml, each as one line."
    out = []
    for key, allowed in ALLOWED.items():
        node = cfg
        for part in filter(None, key.split(".")): node = node.get(part, {})
        out += [f"_quarto.yml: unknown key {key + '.' if key else ''}{k}" for k in set(node) - allowed]
    html = cfg["format"]["html"]
    if "commonmark" in cfg["format"] and html.get("keep-md") is not True:
        out.append("_quarto.yml: commonmark needs keep-md: true, or Quarto < 1.10 dies")
    if html.get("html-math-method") != "mathml": out.append("_quarto.yml: html-math-method must be mathml (formulas offline)")
    if not (NBS / html["css"]).exists(): out.append(f"_quarto.yml: nbs/{html['css']} is missing")
    if cfg.get("metadata-files") != ["nbdev.yml", "sidebar.yml"]: out.append("_quarto.yml: metadata-files must be nbdev.yml, sidebar.yml")
    return out


def sidebar_pages(node):
    "The page paths of a sidebar, depth first."
    for item in node:
        if isinstance(item, str): yield item
        else: yield from sidebar_pages(item.get("contents", []))


def check_sidebar():
    "The sidebar lists every notebook once and nothing else."
    listed = list(sidebar_pages(yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]))
    there = {p.relative_to(NBS).as_posix() for p in notebooks()}
    return ([f"sidebar.yml: {p} does not exist" for p in listed if p not in there]
            + [f"sidebar.yml: {p} is not listed" for p in sorted(there - set(listed))]
            + [f"sidebar.yml: {p} is listed twice" for p in {p for p in listed if listed.count(p) > 1}])


def prose(cell):
    "Markdown without its code blocks and code spans, where links and fences do not count."
    text = re.sub(r"^```.*?^```", "", cell.source, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


def check_notebook(path):
    "Problems that Quarto would swallow or only warn of."
    nb, name = nbformat.read(path, 4), path.relative_to(ROOT).as_posix()
    nbformat.validate(nb)
    text = [prose(c) for c in nb.cells if c.cell_type == "markdown"]
    first = next(c for c in nb.cells if c.cell_type == "markdown")
    out = [] if re.match(r"# \S", first.source) else [f"{name}: the first markdown cell has no H1"]
    everything = "\n".join(text)
    labels = set(re.findall(r"^#\|\s*label:\s*(\S+)", "\n".join(c.source for c in nb.cells if c.cell_type == "code"), re.M))
    labels |= set(re.findall(r"\{#((?:fig|tbl|eq|sec)-[\w-]+)", everything))
    out += [f"{name}: @{ref} has no label" for ref in re.findall(r"(?<![\w/])@((?:fig|tbl|eq|sec)-[\w-]+)", everything) if ref not in labels]
    for cell in text:
        fences = re.findall(r"^:{3,}.*$", cell, re.M)
        opened = sum(bool(f.strip(": ")) for f in fences)
        if 2 * opened != len(fences): out.append(f"{name}: unclosed ::: in a cell that begins '{cell[:40]}'")
    for c in nb.cells:
        if c.cell_type == "markdown" and re.search(r"^```\{?(mermaid|dot)", c.source, re.M): out.append(f"{name}: mermaid or dot block")
    for target in re.findall(r"\]\(([^)\s]+)\)", everything):
        if re.match(r"[a-z]+:|#", target): continue
        there = (path.parent / target.split("#")[0]).resolve()
        if not there.exists(): out.append(f"{name}: link to {target}, which does not exist")
        elif not there.is_relative_to(NBS.resolve()): out.append(f"{name}: link to {target}, which is no page of the site")
    for c in nb.cells:
        kinds = {k for o in c.get("outputs", []) for k in o.get("data", {})}
        if "application/vnd.jupyter.widget-view+json" in kinds and "image/png" not in {
                k for d in nb.cells for o in d.get("outputs", []) for k in o.get("data", {})}:
            out.append(f"{name}: a widget without a static picture beside it")
        if c.cell_type == "code" and any(k.startswith("image/") for k in kinds) and "fig-alt" not in c.source and "alt=" not in c.source:
            out.append(f"{name}: a figure without alt text, cell begins '{c.source[:40]}'")
    return out


def check_sources():
    "All problems of the configuration and the notebooks."
    out = check_config(yaml.safe_load((ROOT / "_quarto.yml").read_text())) + check_sidebar()
    for p in notebooks(): out += check_notebook(p)
    return out


def prepare():
    "Let nbdev process the notebooks into _proc: API blocks, titles, directives. Needs no Quarto."
    import os

    import nbdev.doclinks
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    os.chdir(ROOT)
    shutil.copy2(ROOT / "_quarto.yml", NBS / "_quarto.yml")
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    proc_nbs(NBS, n_workers=0)
    return ROOT / "_proc"


def with_quarto():
    "The real site. nbdev hides Quarto's warnings, so Quarto runs once more with its stderr read."
    shutil.copy2(ROOT / "_quarto.yml", NBS / "_quarto.yml")
    subprocess.run([str(Path(sys.executable).parent / "nbdev-docs"), "--n-workers", "1"], cwd=ROOT, check=True)
    log = subprocess.run(["quarto", "render", "--no-cache"], cwd=ROOT / "_proc", capture_output=True, text=True)
    found = [line for line in (log.stdout + log.stderr).splitlines() if any(p in line for p in QUARTO_PROBLEMS)]
    if log.returncode or found: sys.exit("the site is broken:\n" + "\n".join(found or [log.stderr[-3000:]]))
    print("site: _docs/index.html (Quarto)")


def preview(out=None):
    "A preview by smalldocs, labelled as one: its folder, and the links that smalldocs calls broken."
    proc, out = prepare(), Path(out or ROOT / "_docs")
    nbdev_yml = proc / "nbdev.yml"
    settings = yaml.safe_load((NBS / "nbdev.yml").read_text())
    settings["website"]["title"] += " (preview, not the Quarto build)"
    nbdev_yml.write_text(yaml.safe_dump(settings))
    exe = str(Path(sys.executable).parent / "smalldocs")
    shutil.rmtree(proc / "_docs", ignore_errors=True)
    done = subprocess.run([exe, "render", "--quiet", str(proc)], capture_output=True, text=True)
    if done.returncode: sys.exit("the preview failed:\n" + done.stdout[-2000:] + done.stderr[-2000:])
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(str(proc / "_docs"), str(out))
    return out, [line for line in (done.stdout + done.stderr).splitlines() if "broken link" in line]


def main():
    problems = check_sources()
    if problems: sys.exit("the sources of the site are broken:\n" + "\n".join(problems))
    if shutil.which("quarto"): return with_quarto()
    out, _ = preview()
    print(f"Quarto is not on PATH: this is a PREVIEW by smalldocs, not the Quarto build. For the real site install Quarto >= 1.10.\npreview: {out}/index.html")


if __name__ == "__main__": main()
