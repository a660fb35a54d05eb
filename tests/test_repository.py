"""A fresh clone is complete, small and says the same thing everywhere."""

import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement

import check_colab
import set_repository
from check_notebooks import MACHINE_PATH
from conftest import ROOT
from run_course import course

REQUIRED = """
    README.md LICENSE Makefile pyproject.toml environment.yml .gitattributes .gitignore .ci/run
    .github/ISSUE_TEMPLATE/bug.yml .github/workflows/tests.yml .github/workflows/site.yml
    data/README.md pretrained_ckpt/README.md scripts/run_course.py
    spgdd/__init__.py spgdd/imagebind/clip_merges.txt.gz
""".split()

MAX_BYTES = 1_000_000
LARGE = {  # files above it, by the beginning of their path, and why they are worth it
    "pretrained_ckpt/mini/": "the mini weights: the course runs without a download",
    "tests/fixtures/": "reference tensors of the published systems, up to 2.5 MB a file",
}

OPTIONAL = (
    "gradio",
    "deepspeed",
    "bitsandbytes",
    "matplotlib",
    "ipywidgets",
    "IPython",
    "jupyterlab",
    "nbformat",
)


@pytest.fixture(scope="module")
def files():
    """Every file that a clone would have: tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"not a git clone: {listing.stderr.strip()}")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", REQUIRED)
def test_required_file_is_there(name, files):
    assert ROOT / name in files


def test_no_large_files(files):
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in files}
    large = {name: size for name, size in sizes.items() if size > MAX_BYTES}
    assert not [name for name in large if not name.startswith(tuple(LARGE))], large


def test_no_folders_of_one_machine_in_text_files(files):
    found = []
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not name.startswith("tests/"):
            found += [f"{name}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert not found


def test_text_files_end_lines_the_unix_way(files):
    names = [path for path in files if path.suffix in {".py", ".md", ".sh", ".toml", ".yml", ".ipynb"}]
    assert not [path for path in names if b"\r\n" in path.read_bytes()]


def test_readme_table_lists_the_notebooks_that_exist():
    readme = (ROOT / "README.md").read_text()
    listed = re.findall(r"^\| \[[^]]+\]\((notebooks/[^)]+\.ipynb)\).*\[!\[Open in Colab\]", readme, flags=re.MULTILINE)
    assert listed == [path.relative_to(ROOT).as_posix() for path in course()]


def test_links_between_files_lead_somewhere(files):
    dead = []
    for page in (path for path in files if path.suffix == ".md"):
        for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)[^)]*\)", page.read_text()):
            there = page.parent / target if target else page
            if not re.match(r"[a-z]+:", target) and not (there.exists() and (not heading or heading in anchors(there))):
                dead.append(f"{page.relative_to(ROOT)}: {target}#{heading}")
    assert not dead


def anchors(page):
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_conda_and_pip_install_the_same(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(item for item in environment if isinstance(item, str) and item.startswith("python="))
    from_pip = next(item["pip"] for item in environment if isinstance(item, dict))
    assert project["requires-python"] == ">=3.11,<3.14"
    assert python.removeprefix("python=") in {"3.11", "3.12", "3.13"}
    assert len(from_pip) == 1, "versions belong in pyproject.toml"
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", from_pip[0]).group(1).split(",")
    assert set(extras) <= set(project["optional-dependencies"])


def test_versions_are_stated_in_one_place(files):
    elsewhere = {"setup.py", "setup.cfg", "requirements.txt", "Pipfile", "tox.ini"}
    assert not [path for path in files if path.name in elsewhere]
    pinned = re.compile(r"\b(torch|transformers|peft)\s*[=><~]=")
    others = [path for path in files if path.suffix in {".sh", ".yml", ".md", ".ipynb", ""}]
    assert not [path for path in others if pinned.search(path.read_text())]


def test_package_imports_fast_and_without_optional_libraries():
    """Every module imports without the optional libraries; the package alone within half a second."""
    code = f"""
import importlib, pkgutil, sys, time
sys.modules.update(dict.fromkeys({OPTIONAL}))
begin = time.perf_counter()
import spgdd
seconds = time.perf_counter() - begin
assert "torch" not in sys.modules, "import spgdd imports torch"
assert seconds < 0.5, f"import spgdd took {{seconds:.2f}} s"
for module in pkgutil.walk_packages(spgdd.__path__, "spgdd."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_make_alone_lists_every_target():
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("run", "test", "lab", "preflight", "site", "slides", "setup-git", "clean", "help"):
        assert re.search(rf"^make {target} +\S", shown, flags=re.MULTILINE), f"{target} missing in\n{shown}"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 1", "spgdd needs Python 3.11, 3.12 or 3.13, and none was found on PATH"),
        ('case "$2" in *venv*) exit 1 ;; esac', "python3 has no venv module"),
        (
            'case "$2" in venv) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;; pip) exit 1 ;; esac',
            "The installation stopped; pip's own words are above",
        ),
    ],
    ids=["no python", "no venv", "pip fails"],
)
def test_setup_says_what_is_missing(tmp_path, script, expected):
    """The set-up script meets a Python that lacks something: one plain sentence, and exit status 1."""
    checkout = tmp_path / "a folder with spaces"
    (checkout / "scripts").mkdir(parents=True)
    for name in ("scripts/setup.sh", "pyproject.toml"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    command = ["sh", str(checkout / "scripts" / "setup.sh"), "notebooks"]
    path = f"{programs}:/usr/bin:/bin"
    result = subprocess.run(command, env={"PATH": path}, capture_output=True, text=True)
    assert result.returncode == 1
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        ({"chromium": "exit 0"}, ""),
        (
            {"id": "echo 0", "apt-get": 'echo "apt-get $*"'},
            "apt-get install -q -y --no-install-recommends chromium",
        ),
        ({"id": "echo 0", "apt-get": "exit 1"}, "browser tests are skipped"),
        ({"id": "echo 1000", "apt-get": "exit 0"}, "browser tests are skipped"),
        ({"id": "echo 0"}, "browser tests are skipped"),
    ],
    ids=["present", "root on Debian", "apt fails", "no rights", "no apt"],
)
def test_chromium_is_installed_or_its_absence_said(tmp_path, programs, expected):
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    command = ["/bin/sh", str(ROOT / "scripts" / "install_chromium.sh")]
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    said = result.stdout + result.stderr
    assert result.returncode == 0
    assert expected in said and bool(expected) == bool(said)


# the repository's address, which scripts/set_repository.py writes

CELL = """import sys

REPOSITORY = ""  # the address of this course; `python scripts/set_repository.py URL` writes it here
if "google.colab" in sys.modules:
    assert REPOSITORY, "Set REPOSITORY to the address of the repository that this notebook is from."
    !git clone -q --depth 1 {REPOSITORY} SPGDD-GPT
    %cd -q SPGDD-GPT/notebooks
    %pip install -q -e "..[colab]"
    sys.path[:0] = ["..", "."]"""


@pytest.fixture()
def clone(tmp_path, monkeypatch):
    """A folder with a README and a notebook such as ours, without an address."""
    notebook = new_notebook(cells=[new_code_cell(CELL)])
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks/00_start_here.ipynb")
    badge = "[![Open in Colab](assets/colab.svg)](docs/install.md#colab)"
    row = f"| [00](notebooks/00_start_here.ipynb) | a [link](docs/x.md) | {badge} |"
    text = f"git clone --depth 1 ADDRESS SPGDD-GPT && cd SPGDD-GPT\n\n{row}\n"
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(set_repository, "ROOT", tmp_path)
    return tmp_path


def set_address(monkeypatch, address):
    monkeypatch.setattr("sys.argv", ["set_repository.py", address])
    return set_repository.main()


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_address_is_written_into_badges_and_cells(clone, monkeypatch):
    before = contents(clone)
    set_address(monkeypatch, "https://github.com/ann/other.name")
    set_address(monkeypatch, "https://github.com/bob/course.git")
    once = contents(clone)
    readme = (clone / "README.md").read_text()
    assert "git clone --depth 1 https://github.com/bob/course SPGDD-GPT && cd" in readme
    assert "(https://colab.research.google.com/github/bob/course/blob/main/notebooks/00_start_here.ipynb) |" in readme
    assert "[link](docs/x.md)" in readme
    source = nbformat.read(clone / "notebooks/00_start_here.ipynb", as_version=4).cells[0].source
    assert source == CELL.replace('REPOSITORY = ""', 'REPOSITORY = "https://github.com/bob/course"')
    set_address(monkeypatch, "https://github.com/bob/course/")
    assert contents(clone) == once, "written twice, it is not the same"
    set_address(monkeypatch, "")
    assert contents(clone) == before


NO_ADDRESSES = ("bob/course", "https://github.com/bob", 'https://github.com/bob/a"b', "git@github.com:bob/course")


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_what_is_no_address_is_refused(clone, monkeypatch, address):
    before = contents(clone)
    with pytest.raises(SystemExit, match="is not an address"):
        set_address(monkeypatch, address)
    assert contents(clone) == before


def test_address_is_the_same_everywhere():
    """In all badges, first cells and clone commands."""
    first = (ROOT / "notebooks/00_start_here.ipynb").read_text()
    address = set_repository.CELL.search(first).group()
    for page in set_repository.pages():
        text = page.read_text()
        assert set_repository.with_address(text, address) == text, page.name


@pytest.mark.parametrize("path", course(), ids=lambda path: path.stem)
def test_first_cell_is_the_same_everywhere(path):
    first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert re.sub(r'REPOSITORY = "[^"]*"', 'REPOSITORY = ""', first.source) == CELL


@pytest.mark.parametrize("path", course(), ids=lambda path: path.stem)
def test_every_question_has_its_answer(path):
    asked = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.source.startswith("## Questions")]
    answers = (ROOT / "docs/answers" / f"{path.name.split('_')[0]}.md").read_text()
    count = [len(re.findall(r"^\d+\. ", text, flags=re.MULTILINE)) for text in ("".join(asked), answers)]
    assert count[0] == count[1] > 0


def test_colab_brings_what_the_notebooks_need():
    """Only what Colab lacks may be missing; scripts/check_colab.py lets pip resolve it."""
    brings, lacking = check_colab.runtime(), set()
    for requirement in map(Requirement, check_colab.requirements()):
        version = brings.get(check_colab.canonical(requirement.name))
        if version is None:
            lacking.add(requirement.name)
        else:
            assert requirement.specifier.contains(version), f"{requirement}: Colab has {version}"
    assert lacking == check_colab.LACKING


def preflight(*options):
    command = [sys.executable, *options, ROOT / "scripts" / "preflight.py"]
    return subprocess.run(command, capture_output=True, text=True)


def test_preflight_names_what_is_missing_and_its_mend():
    """Python without its packages: no traceback, but what to install."""
    result = preflight("-I", "-S")
    assert result.returncode == 1 and not result.stderr
    assert re.search(r"NO +packages: no torch, .*\n +mend: .* -m pip install -e", result.stdout)
    assert "Not ready" in result.stdout


def test_preflight_diagnoses_a_part():
    said = preflight().stdout
    assert re.search(r"ok +packages: all \d+ are there", said), said
    assert re.search(r"ok +diagnosis: a chipped ring is defective\. Yes", said), said
