"""Notebooks with another profile than mini: what it cannot run is skipped, what it shows may differ.

After ``use(PROFILE)`` a cell may begin with the line ``%%needs words``. Where the profile lacks that part, the cell
prints one line that says why in place of what it would do.
"""

from IPython import get_ipython

from spgdd.profiles import Profile, get_profile
from spgdd.ui.notebook import check

PARTS = {
    "words": "compares with no sentences",
    "comparison": "does not join memory and words",
    "focus": "makes no focus and memory tokens",
    "language": "has no language model",
}
profile: Profile


def use(name: str) -> None:
    """Take the profile called ``name`` for the cells that follow."""
    global profile
    profile = get_profile(name)
    if skip not in get_ipython().input_transformers_cleanup:
        get_ipython().input_transformers_cleanup.append(skip)


def skip(lines: list[str]) -> list[str]:
    """The lines of a cell; of one that needs a part that the profile lacks a line that says so."""
    if not lines or not lines[0].startswith("%%needs "):
        return lines
    lacking = [reason for part, reason in PARTS.items() if part in lines[0].split() and not getattr(profile, part)]
    return [f"print('skipped: {profile.name} {' and '.join(lacking)}')\n"] if lacking else ["\n", *lines[1:]]


def notice(fact, sentence: str) -> None:
    """``check`` of what shows with mini. The weights of another profile may show otherwise; then it says so."""
    if fact or profile.name == "mini":
        check(fact, sentence)
    else:
        print(f"✗ not with {profile.name}: {sentence}")
