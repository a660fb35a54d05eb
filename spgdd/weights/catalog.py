"""The catalogue: which files a profile needs, where they are published, how to verify each (catalog.json)."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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

    @property
    def most(self) -> float:
        """The most bytes that it can have: a rounded size is 2 % off, a small text differs from mirror to mirror."""
        if self.bytes is None:
            return self.size + max(0.02 * self.size, 100_000) if self.size else 10**9
        return self.bytes

    def wrong_size(self, size: int) -> str:
        """What is published instead of `size` bytes; nothing if they fit."""
        if 2 * self.size - self.most <= size <= self.most:
            return ""
        about = "" if self.bytes is not None else "about "
        return f"published are {about}{self.size:,}" if self.size else f"at most {self.most:,} are taken"

    def partial(self, root: Path) -> Path:
        """Where a download of it grows until it is verified."""
        return root / f"{self.path}.part"


@dataclass(frozen=True)
class Bundle:
    """Files that are published together, under one licence."""

    name: str
    title: str
    folder: str  # relative to the weights folder
    licence: str
    notebooks: Sequence[str]  # numbers of the notebooks that use it
    contents: dict  # "kind": shipped, imagebind, llama, llama-delta, pandagpt or anomalygpt; and its sizes
    files: tuple[File, ...]
    recipe: Sequence[str] = ()  # bundles that it can be merged from

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


_data = cache(lambda: json.loads(Path(__file__).with_name("catalog.json").read_text(encoding="utf-8")))


def names() -> tuple[list[str], list[str]]:
    """Names of the profiles, names of the bundles."""
    return list(_data()["profiles"]), list(_data()["bundles"])


def get_bundle(name: str) -> Bundle:
    """One bundle by name. Raises WeightsError that lists the known names."""
    profiles, bundles = names()
    if name not in bundles:
        raise WeightsError(f"There are no weights called {name!r}. Profiles: {', '.join(profiles)}. "
                           f"Parts: {', '.join(bundles)}.")
    data = dict(_data()["bundles"][name])
    links, files = data.pop("sources"), []
    for entry in data.pop("files"):
        path = entry["name"]
        known = {key: value for key, value in entry.items() if key != "name"}
        files.append(File(f"{data['folder']}/{path}", tuple(link.replace("{name}", path) for link in links), **known))
    return Bundle(name, files=tuple(files), **data)


def get_bundles(wanted: str | Iterable[str]) -> list[Bundle]:
    """Bundles of profiles and bundle names, each once. Raises WeightsError for an unknown name."""
    wanted = [wanted] if isinstance(wanted, str) else wanted
    expanded = [bundle for name in wanted for bundle in _data()["profiles"].get(name, [name])]
    return [get_bundle(name) for name in dict.fromkeys(expanded)]


def without_language(wanted: str | Iterable[str]) -> list[str]:
    """Names of the bundles of profiles and bundle names, but for those of a language model."""
    bundles = get_bundles(wanted)
    return [bundle.name for bundle in bundles if bundle.contents["kind"] not in ("llama", "llama-delta", "pandagpt")]


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
