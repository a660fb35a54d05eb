"""Write the repository's address into the README and the notebooks; a moment.

    python scripts/set_repository.py https://github.com/OWNER/NAME

Sets what `git clone` takes in the README and in the notebooks' first cells, and where the README's Colab badges lead.
May be run again, also with another address. "" takes the address out; the badges then lead to docs/install.md.
"""

import re
import sys
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parent.parent
NO_COLAB = "docs/install.md#colab"  # where a badge leads without an address that Colab can open
CLONE = re.compile(r"(?<=git clone --depth 1 )\S+(?= SPGDD-GPT)")
CELL = re.compile(r'(?<=\bREPOSITORY = \\")[^"\\]*(?=\\")')  # in a notebook's JSON
BADGE = re.compile(r"(?P<row>\]\((?P<notebook>notebooks/[^)]+\.ipynb)\).*\[!\[Open in Colab\]\([^)]+\)\]\()[^)]+(?=\))")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("notebooks/**/*.ipynb"))]


def with_address(text: str, address: str) -> str:
    """A page's text with another address of the repository in it; "" stands for none."""
    text = CLONE.sub(address or "ADDRESS", text)
    text = CELL.sub(address, text)
    return BADGE.sub(lambda match: match["row"] + on_colab(match["notebook"], address), text)


def on_colab(notebook: str, address: str) -> str:
    repository = re.fullmatch(r"https://github\.com/(.+)", address)
    if not repository:
        return NO_COLAB
    return f"https://colab.research.google.com/github/{repository[1]}/blob/main/{quote(notebook)}"


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    address = sys.argv[1].removesuffix("/").removesuffix(".git")
    if address and not re.fullmatch(r"https://[\w.-]+(/[\w.~-]+){2,}", address):
        sys.exit(f"{sys.argv[1]} is not an address such as https://github.com/OWNER/NAME")
    changed = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = with_address(text, address)
        if new != text:
            page.write_text(new, encoding="utf-8", newline="\n")
            changed += 1
    print(f"{changed} files changed; the address is {address or 'not set'}")
    if NO_COLAB in on_colab("", address):
        print("Colab opens repositories on github.com alone: the badges lead to docs/install.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
