"""Check a folder of pages: links and pictures lead somewhere, and nothing is fetched from elsewhere; a few seconds.

    python scripts/check_links.py build/site

Links to other sites are counted and not followed. Exit status 1 with one line for each fault.
"""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHES = {"img", "script", "iframe", "source", "video", "audio", "embed", "object"}  # and some kinds of <link>


class Page(HTMLParser):
    """The names that can be linked to in a page, and where it leads: (tag, address, fetched while it is shown)."""

    def __init__(self, path: Path):
        super().__init__()
        self.names: set[str] = set()
        self.targets: list[tuple[str, str, bool]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names.update(given[key] for key in ("id", "name") if given.get(key))
        fetched = tag in FETCHES or tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload")
        self.targets += [(tag, given[key], fetched) for key in ("href", "src", "data") if given.get(key)]


def faults(pages: dict[Path, Page]) -> Iterator[str]:
    for path, page in pages.items():
        for tag, address, fetched in page.targets:
            link = urlsplit(address)
            if link.scheme in ("http", "https") or link.netloc:
                if fetched:
                    yield f"{path}: <{tag}> is fetched from {address}"
            elif not link.scheme:
                there = (path.parent / unquote(link.path)).resolve() if link.path else path
                if not there.is_file():
                    yield f"{path}: {address} leads to no file"
                elif link.fragment and there in pages and unquote(link.fragment) not in pages[there].names:
                    yield f"{path}: {address} leads to no place in that page"


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    pages = {path.resolve(): Page(path) for path in sorted(Path(sys.argv[1]).rglob("*.html"))}
    found = list(faults(pages))
    targets = [address for page in pages.values() for _, address, _ in page.targets]
    outside = sum(address.startswith(("http:", "https:")) for address in targets)
    print(*found, f"{len(pages)} pages, {len(targets)} links, {outside} of them to other sites (not followed), "
          f"{len(found)} faults", sep="\n")  # fmt: skip
    return 1 if found or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
