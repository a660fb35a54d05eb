"""Which files of a folder are pictures of a known layout, and where their masks are; see ``layouts.yaml``."""

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from spgdd.images import SUFFIXES

KNOWN = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SPLITS = KNOWN["splits"]
GOOD = "|".join(KNOWN["good"]).replace(" ", "[-_ ]?") + f"|(?:{'|'.join(KNOWN['good_first'])})[-_ ][^/]+"
MASKS, PICTURES = "|".join(KNOWN["masks"]), "|".join(KNOWN["pictures"])
RESERVED = "|".join((MASKS, PICTURES, *SPLITS))
NAMES = {  # what a placeholder fits, where a pattern does not say
    "split": f"(?P<split>{'|'.join(SPLITS)})",
    "good": f"(?P<type>{GOOD})",
    "bad": f"(?P<type>(?!(?:{GOOD}|{RESERVED})/)[^/]+)",
    "type": f"(?P<type>(?!(?:{RESERVED})/)[^/]+)",
    "masks": f"(?:{MASKS})",
    "pictures": f"(?:{PICTURES})",
}
ENDING = f"(?:{'|'.join(map(re.escape, SUFFIXES))})"


@dataclass(frozen=True)
class Layout:
    """An entry of ``layouts.yaml``, where its fields are explained."""

    image: str
    masks: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    subset: str = ""
    product: str = ""
    kind: str = ""
    unmarked: str = ""
    codes: dict[str, str] = field(default_factory=dict)  # defect types by what stands in the path


LAYOUTS = [Layout(**entry) for entry in KNOWN["layouts"]]


@dataclass(frozen=True)
class Found:
    """A picture, its mask or "", and what its path says."""

    layout: Layout
    root: str  # the product's folder with a slash at the end, or ""
    image: str
    mask: str
    groups: dict[str, str]

    @property
    def kind(self) -> str:
        """The defect type, "good", or "" where only the mask can tell."""
        kind = self.groups.get("type", "").lower()
        return "good" if re.fullmatch(GOOD, kind) else self.layout.codes.get(kind, kind)


@functools.cache
def compiled(pattern: str) -> re.Pattern:
    """The regular expression of a pattern; ``root`` is the product's folder."""

    def group(match: re.Match) -> str:
        name, regex = match.groups()
        return f"(?P<{name}>{regex or '[^/]+'})" if regex or name not in NAMES else NAMES[name]

    ending = "" if re.search(r"\.\w+$", pattern) else ENDING
    regex = re.sub(r"\{(\w+)(?::([^}]*))?\}", group, pattern)
    return re.compile(f"(?P<root>(?:.*?/)??){regex}{ending}", re.I | re.S)


def recognise(files: Iterable[str]) -> list[Found]:
    """The pictures among the paths (with slashes) of a folder's files, each with its mask."""
    files = sorted(files)
    places = defaultdict(list)  # where a mask may be: files by their path without case and ending, and by their folder
    for name in filter(is_mask, files):
        path = name.lower()
        for key in (path, path.rpartition(".")[0], path.rpartition("/")[0] + "/"):
            places[key].append(name)
    folders = {part for name in places for part in name.split("/")[:-1]}
    found, masks = [], set()
    left = [name for name in files if is_picture(name)]
    for layout in LAYOUTS:
        claimed = [match for name in left if (match := compiled(layout.image).fullmatch(name))]
        roots = {match["root"].lower() for match in claimed}
        for mark in layout.marks:
            marked = (compiled(mark).fullmatch(name) for name in files) if roots else ()
            roots &= {match["root"].lower() for match in marked if match}
        claimed = [match for match in claimed if match["root"].lower() in roots]
        for match in claimed:
            groups = {key: value or "" for key, value in match.groupdict().items()}
            mask = _mask(layout, match.string, groups, places, folders)
            found.append(Found(layout, groups.pop("root"), match.string, mask, groups))
            masks.add(mask)
        taken = {match.string for match in claimed}
        left = [name for name in left if name not in taken]
    return sorted((one for one in found if one.image not in masks), key=lambda one: one.image)


def is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def is_mask(name: str) -> bool:
    return is_picture(name) or name.lower().endswith(".mat")


def _mask(layout: Layout, image: str, groups: dict[str, str], places: dict[str, list[str]], folders: set[str]) -> str:
    """The file or folder of masks of a picture, "" if there is none."""
    for template in layout.masks:
        apart = "{masks}" in template  # else beside the picture, where its own name is no mask's
        names = [name for name in KNOWN["masks"] if name in folders] if apart else [""]
        tails = KNOWN["tails"][not apart :] if "{tail}" in template else [""]
        for masks, tail in itertools.product(names, tails):
            path = groups["root"] + template.format(**groups, masks=masks, tail=tail)
            others = [name for name in places.get(path.lower(), ()) if name != image]
            if others and path.endswith("/"):
                return others[0].rpartition("/")[0]
            if others:
                return min(others, key=lambda name: (name.lower().endswith((".jpg", ".jpeg")), name))
    return ""
