"""The conversations are true to the sample, say nothing that the question gives away, and stay small."""

import random
import re
from collections import Counter, defaultdict

import pytest

from spgdd.data.grammar import a, kind_of, share_words
from spgdd.data.words import (
    LOOKALIKES,
    PLACES,
    TYPES,
    conversation,
    default_question,
    names_of,
)
from spgdd.places import place_of

GRID = [(column, row) for row in range(3) for column in range(3)]
YES_NO = re.compile(r"(?:^|\. )(?:Is|Are|Does|Can) [^.]*\?$")


def make_sample(rng: random.Random, count: int) -> dict:
    defects = []
    for kind in rng.choices(TYPES, k=count):
        column, row = rng.choice(GRID)
        x, y = 75 * column + rng.randint(8, 30), 75 * row + rng.randint(8, 30)
        width, height = rng.randint(3, 30), rng.randint(3, 30)
        defects.append(
            {
                "type": kind,
                "box": (x, y, x + width, y + height),
                "place": PLACES[3 * row + column],
                "area": width * height / 224**2,
                "contrast": rng.random() / 2,
                "severity": rng.choice(("minor", "moderate", "severe")),
            }
        )
    return {"product": "zeppelin", "family": "", "defects": defects}


@pytest.fixture(scope="module")
def talks():
    rng = random.Random(7)
    samples = [make_sample(rng, rng.choice((0, 0, 0, 1, 1, 2, 3))) for _ in range(12000)]
    return [(sample, conversation(sample, rng)) for sample in samples]


def turns(talk):
    return [(talk[i]["value"], talk[i + 1]["value"]) for i in range(0, len(talk), 2)]


def bare(question: str) -> str:
    """The question without the introduction and the product's name."""
    question = re.sub(r"^This is a photo of .*?\. (?=[A-Z])", "", question)
    named = r"(on|with|would a good|Describe) (the |)(?!image|defect|anomaly|picture|it)[a-z]+(?=[ .?]|$)"
    return re.sub(named, r"\1 X", question)


def test_form(talks):
    for _, talk in talks:
        assert [turn["from"] for turn in talk] == ["human", "gpt"] * (len(talk) // 2)
        for question, answer in turns(talk):
            assert "{" not in question + answer and "  " not in question + answer
            assert question[-1] in "?." and answer[-1] == "." and answer[0].isupper()
            assert bool(YES_NO.search(question)) == answer.startswith(("Yes, ", "No, ")), (question, answer)
            assert len(re.findall(r"\w+|[^\w\s]", answer)) <= 60, answer
    assert {len(talk) // 2 for _, talk in talks} == {1, 2, 3, 4}


def test_no_answer_follows_from_the_question(talks):
    """Each question is asked of good and of defective pictures, and no answer fits both."""
    answers = defaultdict(lambda: (Counter(), Counter()))
    for sample, talk in talks:
        for question, answer in turns(talk):
            answers[bare(question)][bool(sample["defects"])][answer] += 1
    common = {q: kinds for q, kinds in answers.items() if sum(map(Counter.total, kinds)) >= 60}
    assert len(common) > 60
    for question, (good, bad) in common.items():
        share = bad.total() / (good.total() + bad.total())
        assert 0.25 < share < 0.85, (question, share)
        assert not good.keys() & bad.keys(), (question, good.keys() & bad.keys())


def test_presuppositions_are_false_as_often_as_true(talks):
    true = Counter()
    for sample, talk in talks:
        for question, _ in turns(talk):
            for kind in TYPES:
                if bare(question) == f"Where is the {kind_of(kind)['one']}?":
                    true[any(defect["type"] == kind for defect in sample["defects"])] += 1
    assert 0.2 < true[True] / true.total() < 0.5


def test_places_and_kinds_are_true(talks):
    longest = "|".join(sorted(PLACES, key=len, reverse=True))
    for sample, talk in talks:
        places = {defect["place"] for defect in sample["defects"]}
        kinds = {kind_of(defect["type"])["one"] for defect in sample["defects"]}
        for _, answer in turns(talk):
            said = answer.split("I see no ")[0] if "and no other" in answer or ", but" in answer else answer
            for found in re.finditer(rf"at the ((?:(?:{longest})(?:, | and )?)+)", said):
                assert set(re.findall(longest, found[1])) <= places, (answer, places)
            for kind in TYPES:
                noun = kind_of(kind)["one"]
                if any(f"{start} is {a(noun)}" in answer for start in ("There", "It", "Yes, there")):
                    assert noun in kinds, (answer, kinds)
            if not sample["defects"]:
                assert not re.search(longest.join(("at the (?:", ")")), answer), answer


def test_a_product_is_named_by_the_human_first(talks):
    named = 0
    for _, talk in talks:
        heard = ""
        for turn in talk:
            if turn["from"] == "human":
                heard += turn["value"]
            elif "zeppelin" in turn["value"]:
                named += 1
                assert "zeppelin" in heard
    assert named > 100


def test_default_question_is_frequent_and_answered_as_anomalygpt_does(talks):
    default = default_question("zeppelin")
    asked = [(sample, turns(talk)[0]) for sample, talk in talks if talk[0]["value"] == default]
    assert len(asked) > 0.2 * len(talks)
    replies = Counter(answer for sample, (_, answer) in asked if not sample["defects"])
    assert replies.most_common(1)[0][0] == "No, there is no anomaly in the image."
    single = [
        (sample["defects"][0]["place"], turn[1]) for sample, turn in asked if len(sample["defects"]) == 1
    ]
    form = "Yes, there is an anomaly in the image, at the {} of the image."
    assert sum(answer == form.format(place) for place, answer in single) > 0.5 * len(single)


def test_vocabulary_is_small(talks):
    text = " ".join(turn["value"] for _, talk in talks for turn in talk)
    assert len(set(re.findall(r"[a-z]+", text.lower()))) < 450


def test_held_out_kinds_are_never_asked_about():
    rng, kinds = random.Random(3), ("crack", "dent")
    talks = [conversation(make_sample(rng, 0), rng, kinds=kinds) for _ in range(500)]
    text = " ".join(turn["value"] for talk in talks for turn in talk)
    assert "Is there a crack" in text and "dent" in text
    assert not any(kind_of(kind)["one"] in text for kind in set(TYPES) - set(kinds) - {"hole", "scratch"})


def test_lookalikes_are_not_denied():
    rng = random.Random(5)
    sample = make_sample(rng, 1)
    sample["defects"][0]["type"] = "blowhole"
    talks = [conversation(sample, rng) for _ in range(4000)]
    asked = " ".join(turn["value"] for talk in talks for turn in talk if turn["from"] == "human")
    assert "the crack" in asked and "the hole?" not in asked
    assert all(kind in TYPES for group in LOOKALIKES for kind in group)


def test_first_topics_and_the_common_middle():
    rng = random.Random(0)
    sample = make_sample(rng, 2) | {"middle": "center"}
    sample["defects"][0]["place"], sample["defects"][1]["place"] = "left", "right"
    talk = conversation(sample, rng, 2, first=("verdict", "where"))
    assert talk[3]["value"].endswith("left and right of the image. Their common middle is at the center.")


def test_same_seed_same_words():
    sample = make_sample(random.Random(1), 2)
    assert conversation(sample, random.Random(9)) == conversation(sample, random.Random(9))


@pytest.mark.parametrize(
    "name, phrase",
    [
        ("object", "an object"),
        ("anomaly", "an anomaly"),
        ("metal nut", "a metal nut"),
        ("leather", "leather"),
        ("woven fabric", "woven fabric"),
        ("capsules", "capsules"),
        ("glass lens", "a glass lens"),
        ("PCB", "a PCB"),
        ("LED lamp", "an LED lamp"),
        ("canvas", "a canvas"),
        ("uniform tile", "a uniform tile"),
        ("macaroni", "macaroni"),
        ("sheet of paper", "a sheet of paper"),
        ("area of pitting", "an area of pitting"),
        ("brass", "a brass"),
    ],
)
def test_articles(name, phrase):
    assert a(name) == phrase


def test_places_and_shares():
    assert [place_of((c + 0.5) / 3, (r + 0.5) / 3) for c, r in GRID] == list(PLACES)
    assert place_of(1 / 3, 2 / 3) == "left"  # cuts belong to the cell before
    assert share_words(0.001) == "less than 1 percent" and share_words(0.019) == "about 2 percent"
    assert share_words(0.95) == "about 90 percent"


def test_names_of_a_family():
    assert "bolt" in names_of({"product": "wood screw", "family": "screw"})
    assert set(names_of({"product": "magnetic tile", "family": ""})) == {"magnetic tile"}
