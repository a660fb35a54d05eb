"""A slide deck of the course's figures, in build/slides; a few seconds, needs the extra `site`.

    python scripts/make_slides.py      # or: make slides

Down goes through a notebook's figures, right to the next notebook; S opens the speaker's notes, which are the words
that surround the figure in the notebook. Works from a folder, without a server and without a network.
"""

import importlib.util
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from run_course import ROOT, course

FOLDER = ROOT / "build" / "slides"
LINK = r"\[([^\]]+)\]\((?!https?:)[^)]*\)"  # to another file of the repository
# nbconvert's page without what it would fetch from elsewhere: reveal.js lies beside it.
PAGE = """{%- extends 'index.html.j2' -%}
{% block html_head_js %}<script src="reveal/dist/reveal.js"></script>{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_css %}<style>
.reveal .slides { text-align: left } .reveal h1 { font-size: 1.5em } .reveal h2 { font-size: 1.2em }
.reveal h1, .reveal h2 { text-transform: none !important }
.reveal img, .reveal .jp-RenderedSVG svg { width: 100% !important; height: auto; max-width: 100% !important }
.reveal img, .reveal .jp-RenderedSVG svg { max-height: 560px !important; object-fit: contain; object-position: left }
.jp-InputPrompt, .jp-OutputPrompt { display: none }
</style>{% endblock %}
{% block footer_js %}<script src="reveal/plugin/notes/notes.js"></script>
<script>Reveal.initialize({ hash: true, slideNumber: true, plugins: [RevealNotes], width: 1100, height: 700 });</script>
{% endblock %}"""


def slides_of(path: Path) -> list:
    """A title with what the reader will be able to do, then one slide for each code cell that shows a picture."""
    cells = nbformat.read(path, as_version=4).cells
    title = re.match(r"# .+", cells[0].source)[0]
    able = re.search(r"You will be able to\n+((?:- .+\n?(?:  .+\n?)*)+)", cells[0].source)
    slides = [new_markdown_cell(f"{title}\n\n{able[1] if able else ''}", metadata=kind("slide"))]
    heading = title
    for i, cell in enumerate(cells[1:], start=1):
        if found := re.match(r"##+ .+", cell.source) if cell.cell_type == "markdown" else None:
            heading = found[0]
        pictures = [output for output in cell.get("outputs", []) if "image/" in " ".join(output.get("data", {}))]
        if pictures:
            words = "\n\n".join(near.source for near in cells[i - 1 : i + 2] if near.cell_type == "markdown")
            slides += [
                new_markdown_cell("## " + heading.lstrip("# "), metadata=kind("subslide")),
                new_code_cell(outputs=pictures, metadata=kind("-")),
                new_markdown_cell(re.sub(LINK, r"\1", words), metadata=kind("notes")),
            ]
    return slides


def kind(name: str) -> dict:
    return {"slideshow": {"slide_type": name}}


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    reveal = Path(importlib.util.find_spec("sphinx_revealjs").origin).parent / "_static/revealjs"
    shutil.copytree(reveal, FOLDER / "reveal", ignore=shutil.ignore_patterns("*.map", "*.scss"))
    without = {"exclude_input": True, "exclude_anchor_links": True}
    exporter = SlidesExporter(raw_template=PAGE, reveal_url_prefix="reveal", reveal_theme="white", **without)
    deck = new_notebook(cells=[slide for path in course() for slide in slides_of(path)])
    page, _ = exporter.from_notebook_node(deck, resources={"metadata": {"name": "SPGDD-GPT, hands-on"}})
    (FOLDER / "index.html").write_text(page, encoding="utf-8")
    figures = sum(cell.cell_type == "code" for cell in deck.cells)
    print(f"{figures} figures of {len(course())} notebooks: {(FOLDER / 'index.html').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
