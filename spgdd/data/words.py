"""One set of phrasings for conversations about all that is known of a picture.

The mini world, synthetic anomalies and ``spgdd tadd describe`` all speak through this module; the sentences
themselves are data, in ``vocabulary.json``. A sample is a dict: ``product``, optional ``family``, and
``defects``, each with ``type``, ``place``, ``box`` (x0, y0, x1, y1 in pixels) and ``area`` (share of the
image), and optional ``contrast`` (0..1), ``severity`` and ``shape``. Optional ``size`` (width, height; 224 x
224) is the frame of the boxes, ``middle`` the place of all defects together.

Every question is asked about good and about defective pictures, and no answer follows from the question
alone. Answers never name a product that the human has not named. A yes/no question is answered with "Yes," or
"No," first.
"""

import random

from spgdd.data import grammar
from spgdd.data.grammar import TYPES, VOCABULARY, a, finding, kind_of, places_of, the
from spgdd.places import PLACES, place_of

TOPICS = VOCABULARY["topics"]
OFTEN = ("where", "kind", "describe")  # topics with a double chance
LOOKALIKES = [set(group) for group in VOCABULARY["lookalikes"]]  # beside one, the absence of another is not claimed


def default_question(product: str) -> str:
    """AnomalyGPT's question about a product, with the right article."""
    return f"This is a photo of {a(product)}. Is there any anomaly in the image?"


def names_of(sample: dict) -> list[str]:
    """What a person may call the product: its own name, and the other names of its family."""
    key = sample.get("family", sample["product"])
    others = (names for family, names in VOCABULARY["product_names"].items() if family in key)
    return [sample["product"]] * 2 + [name for names in others for name in names]


def conversation(sample: dict, rng: random.Random, turns=None, kinds=TYPES, first=()) -> list[dict]:
    """``turns`` questions with answers (1 to 4 if None) as [{"from": "human" | "gpt", "value": text}, ...].

    The first questions are about the topics ``first``, else mostly whether there is an anomaly. ``kinds`` are
    the defect types that may be asked about: those that occur in the data, so that being asked about says
    nothing.
    """
    turns = turns or rng.choice((1, 2, 3, 4))
    name = rng.choice(VOCABULARY["plain_names"] if rng.random() < 0.2 else names_of(sample))
    named = rng.random() < 0.85
    known = facts(sample["defects"], sample.get("middle"))
    known["noun"] = name if named else "part"
    known["none"] = rng.choice(VOCABULARY["no_defect"])
    topics = rng.sample([*TOPICS, *OFTEN], len(TOPICS) + len(OFTEN))
    if not first and rng.random() < 0.7:
        first = ("verdict",)
    talk = []
    for topic in dict.fromkeys([*first, *topics]):
        known["it"] = rng.choice(("the defect", "the anomaly", "it")[: 3 if talk else 2])
        case = ("good", "one", "several")[min(len(sample["defects"]), 2)]
        if topic in ("has_kind", "where_kind", "at_place"):
            asked = ask_place(sample, rng) if topic == "at_place" else ask_kind(sample["defects"], rng, kinds)
            if asked is None:
                continue
            known |= asked
            case = asked["case"] if sample["defects"] else "good"
        question = choose(TOPICS[topic]["ask"], rng).format_map(known)
        try:
            answer = choose(TOPICS[topic][case], rng).format_map(known)
        except KeyError:  # not known of this picture
            answer = choose(TOPICS[topic]["unknown"], rng).format_map(known)
        if named and not talk:
            usual, long = VOCABULARY["introductions"]
            question = f"{(long if rng.random() < 0.05 else usual).format(a(name))} {question}"
        talk += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        if len(talk) == 2 * turns:
            break
    return talk


def choose(phrases: list[str], rng: random.Random) -> str:
    """The first phrase half of the time: a common form that greedy decoding settles on, and variety."""
    return phrases[0] if rng.random() < 0.5 else rng.choice(phrases)


def facts(defects: list[dict], middle: str | None = None) -> dict:
    """The values of the templates' fields, as far as they are known."""
    if not defects:
        return {}
    worst, biggest = grammar.worst(defects), max(defects, key=lambda d: d["area"])
    kind = kind_of(worst["type"])
    known = {
        "anomalygpt": grammar.anomalygpt_answer(defects),
        "n": grammar.spell(len(defects)), "places": places_of(defects), "middle": "", "grade": "",
        "kind": kind["one"], "noun_phrase": grammar.noun_phrase(worst),
        "finding": finding(defects), "detail": finding(defects, True), "there_is": grammar.there_is(defects),
        "the_worst": the([worst]), "the_defects": the(defects), "biggest": the([biggest]),
        "size": grammar.size_word(biggest["area"]), "share": grammar.share_words(biggest["area"]),
        "total": grammar.share_words(sum(d["area"] for d in defects)), "shape": grammar.shape_words(worst),
        "next": kind.get("next", "Set the part aside and let a person look at it."),
    }  # fmt: skip
    if middle and middle not in [d["place"] for d in defects]:
        known["middle"] = f" Their common middle is at the {middle}."
    if all(grammar.is_specific(d["type"]) for d in defects):
        known["a_kind"] = a(kind["one"])
    if "contrast" in worst:
        faint, strong = worst["contrast"] < grammar.FAINT, worst["contrast"] > grammar.STRONG
        known["contrast"] = "faint" if faint else "easy to see" if strong else "visible"
    if "severity" in worst:
        known["severity"] = worst["severity"]
        known["grade"] = f" It is {a(worst['severity'])} defect."
    if "causes" in kind and known.get("contrast") != "faint":
        known["causes"] = " or ".join(kind["causes"][:2])
    known["advice"] = VOCABULARY["advice"].get(worst.get("severity"), "{next}").format_map(known)
    for field in ("there_is", "the_worst"):
        known[field.capitalize()] = known[field][0].upper() + known[field][1:]
    return known


def ask_kind(defects: list[dict], rng: random.Random, kinds) -> dict | None:
    """A defect type to ask about, there or not, with the fields about it; None where one could only guess."""
    if not all(grammar.is_specific(d["type"]) for d in defects):
        return None
    here = {grammar.base(d["type"]) for d in defects}
    here = here.union(*(group for group in LOOKALIKES if group & here))
    others = [kind for kind in kinds if grammar.is_specific(kind) and grammar.base(kind) not in here]
    if not defects and not others:
        return None
    present = defects and (not others or rng.random() < 0.6)
    asked = rng.choice(defects)["type"] if present else rng.choice(others)
    noun = kind_of(asked)["one"]
    return {"asked": noun, "a_asked": a(noun)} | hit_facts([d for d in defects if grammar.one(d) == noun])


def ask_place(sample: dict, rng: random.Random) -> dict:
    """A place to ask about, with a defect or without a pixel of one."""
    width, height = sample.get("size", (224, 224))
    free = set(PLACES) - {d["place"] for d in sample["defects"]}
    for x0, y0, x1, y1 in (d["box"] for d in sample["defects"]):
        for x in (x0, (x0 + x1) / 2, x1):
            free -= {place_of(x / width, y / height) for y in (y0, (y0 + y1) / 2, y1)}
    if sample["defects"] and (not free or rng.random() < 0.55):
        place = rng.choice(sample["defects"])["place"]
    else:
        place = rng.choice(sorted(free))
    return {"place": place} | hit_facts([d for d in sample["defects"] if d["place"] == place])


def hit_facts(hits: list[dict]) -> dict:
    if not hits:
        return {"case": "miss"}
    return {
        "case": "hit" if len(hits) == 1 else "hits", "hit_n": grammar.spell(len(hits)),
        "hit_there_is": grammar.there_is(hits), "hit_places": places_of(hits),
    }  # fmt: skip
