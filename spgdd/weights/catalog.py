"""The catalogue: which files a profile needs, where they are published, how to verify each (catalog.json)."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from spgdd.errors import WeightsError


@dataclass(frozen=True)
class File:
    path: str  # where it belongs, relative to the weights folder, with "/"
    sources: tuple[str, ...]  # links, or hf:OWNER/REPO@REVISION/PATH; tried in this order
    bytes: int | None = None  # exact size, where published
    about_bytes: int | None = None  # rounded size, where only that is published
    sha256: str | None = None
    md5: str | None = None
    origin: str = "published"  # who states the hash

    @property
    def size(self) -> int:
        """Bytes to plan with: exact, rounded or 0 when nothing is published."""
        return self.bytes or self.about_bytes or 0


@dataclass(frozen=True)
class Bundle:
    """Files that are published together, under one licence."""

    name: str
    title: str
    folder: str  # relative to the weights folder
    licence: str
    notebooks: tuple[str, ...]  # numbers of the notebooks that use it
    contents: dict  # "kind": shipped, imagebind, llama, llama-delta, pandagpt or anomalygpt; and its sizes
    files: tuple[File, ...]
    recipe: tuple[str, ...] = ()  # bundles that it can be merged from

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@cache
def _data() -> dict:
    return json.loads(resources.files("spgdd.weights").joinpath("catalog.json").read_text(encoding="utf-8"))


def names() -> tuple[list[str], list[str]]:
    """Names of the profiles, names of the bundles."""
    return list(_data()["profiles"]), list(_data()["bundles"])


def get_bundle(name: str) -> Bundle:
    """One bundle by name. Raises WeightsError that lists the known names."""
    data = _data()["bundles"].get(name)
    if data is None:
        profiles, bundles = names()
        raise WeightsError(f"There are no weights called {name!r}. Profiles: {', '.join(profiles)}. "
                           f"Parts: {', '.join(bundles)}.")
    files = tuple(File(path=f"{data['folder']}/{file['name']}",
                       sources=tuple(source.replace("{name}", file["name"]) for source in data["sources"]),
                       **{key: value for key, value in file.items() if key != "name"})
                  for file in data["files"])
    return Bundle(name, data["title"], data["folder"], data["licence"], tuple(data["notebooks"]),
                  data["contents"], files, tuple(data.get("recipe", ())))


def get_bundles(wanted: str | Iterable[str]) -> list[Bundle]:
    """Bundles of profiles and bundle names, each once. Raises WeightsError for an unknown name."""
    wanted = [wanted] if isinstance(wanted, str) else wanted
    expanded = [bundle for name in wanted for bundle in _data()["profiles"].get(name, [name])]
    return [get_bundle(name) for name in dict.fromkeys(expanded)]


def known_wrong(sha256: str) -> str | None:
    """What a file with this hash is, where it is a wrong one that people often take for Vicuna v0."""
    return _data()["known_wrong"].get(sha256)


def readable(size: float) -> str:
    """Bytes as people read them, in powers of 1000 as on download pages."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
