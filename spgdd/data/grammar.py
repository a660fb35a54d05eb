"""Small grammar for talking about defects: articles, places, sizes, noun phrases."""

import json
import math
from collections import Counter
from pathlib import Path

VOCABULARY = json.loads(Path(__file__).with_name("vocabulary.json").read_text(encoding="utf-8"))
KINDS = VOCABULARY["kinds"]
TYPES = tuple(name for name, kind in KINDS.items() if "surface" in kind)
SEVERITIES = ("minor", "moderate", "severe")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FAINT, STRONG = 0.06, 0.2  # contrast (of 0..1) up to which a defect is faint, from which on it is easy to see


def a(name: str) -> str:
    """The name with its indefinite article: "an anomaly", "a PCB", "sheets", "leather"."""
    first, last = name.split()[0], name.split(" of ")[0].split()[-1].rstrip(".").lower()
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if plural and last not in VOCABULARY["singular_in_s"] or last in VOCABULARY["mass_nouns"]:
        return name
    if first.isupper() and len(first) < 6:  # an abbreviation is spelled out: a PCB, an LED
        return f"{'an' if first[0] in 'AEFHILMNORSX' else 'a'} {name}"
    vowel = first[0].lower() in "aeiou" and not first.lower().startswith(("uni", "use", "one", "eu"))
    return f"{'an' if vowel or first.lower() in ('hour', 'honest') else 'a'} {name}"


def spoken_name(product: str) -> str:
    """What a person calls a product or data set: "metal nut" for "metal_nut"."""
    return VOCABULARY["spoken_names"].get(product, product.replace("_", " "))


def kind_of(name: str) -> dict:
    """Words for a defect type or folder: ``one``, ``many``; if known ``causes``, ``next``, ``surface``."""
    plain = name.replace("_", " ")
    kind = KINDS.get(name) or KINDS.get(plain)
    if kind is None and " " in plain:
        kind = {"one": f"defect of the type {plain}", "many": f"defects of the type {plain}"}
    elif kind is None:
        kind = {"one": f"{plain} defect", "many": f"{plain} defects"}
    return {**KINDS[kind["like"]], "one": kind["one"], "many": kind["many"]} if "like" in kind else kind


def one(defect: dict) -> str:
    return kind_of(defect["type"])["one"]


def base(kind: str) -> str:
    """The type that a folder name stands for: "scratch" for "scratch_head"."""
    return KINDS.get(kind, {}).get("like", kind)


def is_specific(kind: str) -> bool:
    """False for folders such as "combined" or "bad", which say that there is a defect but not which."""
    return kind_of(kind)["one"] != "defect"


def worst(defects: list[dict]) -> dict:
    """The most severe defect; the largest of these."""
    return max(defects, key=lambda d: (SEVERITIES.index(d.get("severity", "minor")), d["area"]))


def join(items: list[str]) -> str:
    """"a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def places_of(defects: list[dict]) -> str:
    """The distinct places of the defects in their order: "top left and center"."""
    return join(list(dict.fromkeys(defect["place"] for defect in defects)))


def size_word(area: float) -> str:
    return "tiny" if area < 0.002 else "small" if area < 0.01 else "medium-sized" if area < 0.05 else "large"


def share_words(area: float) -> str:
    """The share of the image to the nearest round number: "about 2 percent"."""
    if area < 0.007:
        return "less than 1 percent"
    percent = min((1, 2, 3, 5, 10, 20, 30, 50, 70, 90), key=lambda p: abs(math.log(p / area / 100)))
    return f"about {percent} percent"


def shape_words(defect: dict) -> str:
    """The shape if it is given, else what the box tells."""
    if "shape" in defect:
        return defect["shape"]
    x0, y0, x1, y1 = defect["box"]
    ratio = (x1 - x0) / (y1 - y0)
    return "wider than high" if ratio > 1.7 else "higher than wide" if ratio < 0.6 else "as wide as high"


def spell(n: int) -> str:
    return NUMBERS[n] if n < len(NUMBERS) else str(n)


def counted(kind: str, n: int) -> str:
    """"a dent", "two dents"."""
    words = kind_of(kind)
    return a(words["one"]) if n == 1 else f"{spell(n)} {words['many']}"


def noun_phrase(defect: dict, detail: bool = True) -> str:
    """"a small, faint scratch": the kind, with what is known of it."""
    words = [size_word(defect["area"])] if detail else []
    if detail and defect.get("contrast", STRONG) < FAINT:
        words.append("faint")
    return a(f"{', '.join(words)} {one(defect)}".strip())


def finding(defects: list[dict], detail: bool = False) -> str:
    """The defects with their places: "a scratch at the top", "two dents and a hole, at the top and left"."""
    counts = Counter(defect["type"] for defect in defects)
    if len(defects) == len(counts) < 4:
        return join([f"{noun_phrase(d, detail and len(defects) == 1)} at the {d['place']}" for d in defects])
    return f"{join([counted(kind, n) for kind, n in counts.items()])}, at the {places_of(defects)}"


def there_is(defects: list[dict]) -> str:
    """"there is a scratch at the top left", "there are two dents, at the top and left"."""
    several = sum(defect["type"] == defects[0]["type"] for defect in defects) > 1
    return f"there {'are' if several else 'is'} {finding(defects)}"


def the(defects: list[dict]) -> str:
    """"the scratch at the top left", "the two defects at the top and left"."""
    noun = one(defects[0]) if len(defects) == 1 else counted("defect", len(defects))
    return f"the {noun} at the {places_of(defects)}"


def anomalygpt_answer(defects: list[dict]) -> str:
    """The sentence form that AnomalyGPT is trained on."""
    if not defects:
        return "No, there is no anomaly in the image."
    if len(defects) == 1:
        return f"Yes, there is an anomaly in the image, at the {defects[0]['place']} of the image."
    places = places_of(defects)
    return f"Yes, there are {len(defects)} anomalies in the image, they are at the {places} of the image."
