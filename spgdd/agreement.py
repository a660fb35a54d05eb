"""Whether an answer in words and the map say the same."""

import re

from spgdd.data.grammar import KINDS, TYPES, base, is_specific


def any_word(*patterns: str) -> re.Pattern:
    """Finds whole words, the longest pattern first: "top left" before "top"."""
    return re.compile(rf"\b(?:{'|'.join(sorted(patterns, key=len, reverse=True))})\b", re.IGNORECASE)


# Every way to name a kind of defect: the type that it belongs to. Of two types with one name the first counts.
FORMS = {KINDS[name][form]: base(name) for name in reversed((*TYPES, *KINDS)) if is_specific(name)
         for form in ("one", "many")}  # fmt: skip
FAULT = r"(?:anomal|defect|damage|flaw|fault|problem)\w*"
ASKS = any_word("is", "are", "was", "were", "does", "do", "did", "has", "have", "can", "could", "any")
DEFECT = any_word(FAULT, "wrong", "broken", "bad", "abnormal", r"reject\w*")
GOOD = any_word("good", "ok", "okay", "normal", "intact", "fine", "flawless", "perfect", "acceptable", "undamaged",
                f"(?:without|free of) (?:an? |any )?{FAULT}")  # fmt: skip
KIND = any_word(*map(re.escape, FORMS))
NOTHING = any_word("no", "nothing", "without", "free of", "not (?:defective|damaged|broken|faulty)")


def says_defective(text: str) -> bool | None:
    """True for an answer that begins with Yes, False for No; None for others and for one that says both."""
    words = re.findall(r"[a-z']+", re.split(r"[.!?\n]", text.strip().lower(), maxsplit=1)[0])
    if not words or words[0] not in ("yes", "no") or {"yes", "no"} <= set(words):
        return None
    if words[0] == "yes" and NOTHING.search(" ".join(words[1:])):  # "Yes, nothing is wrong."
        return None
    return words[0] == "yes"


def asks_for(question: str) -> str | None:
    """What a yes-or-no question is about: "defect", "good" (Yes: no defect), "kind" (of defect), or None."""
    sentence = re.split(r"(?<=[.!\n])\s+", question.strip())[-1].rstrip("?. ")
    if not ASKS.match(sentence):
        return None
    if GOOD.search(sentence):
        return "good"
    if DEFECT.search(sentence):
        return "defect"
    return "kind" if KIND.search(sentence) else None


def agreement(question: str, text: str, verdict: str) -> str:
    """"agree" or "disagree" of text and verdict.

    Or "not asked" (the question was not whether there is a defect, or only of one kind, of which the map knows
    nothing), "unparsed" (the text says neither Yes nor No, or both), "undecided" (the verdict is unsure).
    """
    about, said = asks_for(question), says_defective(text)
    if about is None:
        return "not asked"
    if said is None:
        return "unparsed"
    if about == "kind" and not said:
        return "not asked"
    if verdict == "unsure":
        return "undecided"
    return "agree" if (said != (about == "good")) == (verdict == "defective") else "disagree"
