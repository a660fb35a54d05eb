"""The course as a website: `make site`. Notebooks are shown as they were committed, not run again.

Works from a folder, without a server and without a network: nothing is fetched from elsewhere.
"""

import base64
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path

from pygments.lexers import get_lexer_by_name

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

project, author, copyright = "SPGDD-GPT, hands-on", "the authors", "the authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
root_doc = "README"
include_patterns = [
    "README.md", "docs/*.md", "docs/answers/*.md", "docs/site/api.md", "notebooks/**.ipynb",
    "pretrained_ckpt/README.md", "pretrained_ckpt/mini/README.md", "data/README.md", "recipes/mini/*.md",
]  # fmt: skip
exclude_patterns = ["**/.ipynb_checkpoints"]

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # a page may begin its headings where it likes
autodoc_mock_imports = ["deepspeed", "bitsandbytes"]
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = project
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
mathjax = importlib.util.find_spec("sphinx-mathjax-offline").origin  # only its file with everything in it
html_static_path = ["site.css", str(Path(mathjax).parent / "static/mathjax/tex-svg.js")]
html_css_files = ["site.css"]
mathjax_path = "tex-svg.js"

CONTENTS = {
    "Notebooks": ["notebooks/[0-9]*", "notebooks/appendix/*"],
    "Pages": ["docs/*", "pretrained_ckpt/README", "data/README", "docs/site/api"],
    "Answers and solutions": ["docs/answers/*", "notebooks/solutions/*"],
    "How mini was made": ["pretrained_ckpt/mini/README", "recipes/mini/*"],
}


def add_contents(app, name, source):
    """The README is the first page, and the site's contents hang under it."""
    if name == root_doc:
        for caption, pages in CONTENTS.items():
            pages = [page for page in pages if any(ROOT.glob(f"{page}.*"))]
            source[0] += "\n```{toctree}\n:hidden:\n:glob:\n:caption: " + "\n".join([caption, "", *pages]) + "\n```\n"


def add_alternative_texts(app, document):
    """Pictures say what the notebook's outputs say of them; a picture's file is named by the hash of its bytes."""
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix != ".ipynb":
        return
    texts = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            for mime, content in output.get("data", {}).items():
                content = "".join(content)
                if mime == "image/svg+xml":
                    label = re.search(r'aria-label="([^"]+)"', content)
                    texts[hashlib.sha256("\n".join(content.splitlines()).encode()).hexdigest()] = label and label[1]
                elif mime.startswith("image/"):
                    name = hashlib.sha256(base64.b64decode(content)).hexdigest()
                    texts[name] = output["metadata"].get(mime, {}).get("alt")
    for image in document.findall(lambda node: node.tagname == "image"):
        if text := texts.get(Path(image["uri"]).stem):
            image["alt"] = text


def setup(app):
    app.add_lexer("python", type(get_lexer_by_name("ipython3")))  # knows %pip and !git
    app.connect("source-read", add_contents)
    app.connect("doctree-read", add_alternative_texts)
