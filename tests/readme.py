"""Write README.md from nbs/index.ipynb: `python -m tests.readme`.

Markdown cells as they are (links to notebooks made relative to the top), code cells and outputs left out unless the
cell is Markdown text. Needs neither Quarto nor a kernel."""
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def readme():
    "The text of README.md."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    cells = [c.source for c in nb.cells if c.cell_type == "markdown"]
    text = "\n\n".join(cells).strip() + "\n"
    return re.sub(r"\]\((?![a-z]+:|#)(?:\./)?([^)]+)\)", lambda m: f"](nbs/{m[1]})" if not m[1].startswith("../") else f"]({m[1][3:]})", text)


def main():
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
    print("written: README.md")


if __name__ == "__main__": main()
