"""The website and the slides build, and every link in them leads somewhere. Skipped without the extra `site`."""

import subprocess
import sys

import pytest

import check_links
import make_slides
from conftest import ROOT


def faults(folder):
    return list(check_links.faults({path: check_links.Page(path) for path in folder.rglob("*.html")}))


def need(*modules):
    for module in modules:
        pytest.importorskip(module, reason='the site is not built here: pip install -e ".[site]"')


def test_site_builds_without_a_warning_and_its_links_hold(tmp_path):
    need("sphinx", "myst_nb", "furo", "sphinx-mathjax-offline")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs/site", "-d", tmp_path / "trees"]
    result = subprocess.run([*command, ".", tmp_path / "site"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "site" / "notebooks" / "00_start_here.html").is_file()
    assert faults(tmp_path / "site") == []


def test_slides_show_figures_and_fetch_nothing(tmp_path, monkeypatch, capsys):
    need("sphinx_revealjs")
    monkeypatch.setattr(make_slides, "FOLDER", tmp_path / "slides")
    monkeypatch.setattr(make_slides, "ROOT", tmp_path)
    make_slides.main()
    page = (tmp_path / "slides" / "index.html").read_text()
    assert page.count("<img") + page.count("<svg") >= int(capsys.readouterr().out.split()[0]) > 20
    assert (tmp_path / "slides" / "reveal" / "dist" / "reveal.js").is_file()
    assert faults(tmp_path / "slides") == []


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        ('<a href="gone.html">', "gone.html leads to no file"),
        ('<a href="other.html#gone">', "other.html#gone leads to no place"),
        ('<a href="#gone">', "#gone leads to no place"),
        ('<img src="gone.png">', "gone.png leads to no file"),
        ('<script src="https://example.org/a.js">', "<script> is fetched from https://example.org/a.js"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "<link> is fetched from"),
        ('<a href="other.html?q=1#here"><a href="https://example.org"><img src="data:image/png;base64,">', ""),
    ],
)
def test_link_check_sees(tmp_path, element, expected):
    (tmp_path / "index.html").write_text(f"<html><body>{element}")
    (tmp_path / "other.html").write_text('<h1 id="here">')
    assert expected in "".join(faults(tmp_path)) and bool(expected) == bool(faults(tmp_path))
