"""Pictures that cannot be judged, by a dead lamp, a lens cap or of another product, get no verdict and are told why."""

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fake_model import FakeModel, part
from miniworld import draw_product
from spgdd.diagnosis import Diagnoser, load

GOOD = 4


@pytest.fixture(scope="module")
def mini():
    return load("mini", device="cpu", language=False)


@pytest.fixture(scope="module")
def products():
    families = ("gear", "weave", "circuit_board", "wood")
    return {name: [Image.fromarray(s.image) for s in draw_product(name, 3, ["good"] * 8)] for name in families}


@pytest.fixture(scope="module")
def references(mini, products):
    return {name: mini.reference(pictures[:GOOD], name) for name, pictures in products.items()}


def flat(level):
    return lambda picture: Image.new("RGB", picture.size, (level,) * 3)


def light(factor):
    return lambda picture: Image.fromarray((np.asarray(picture) * float(factor)).clip(0, 255).astype(np.uint8))


CHANGES = {
    "black": (flat(0), "darker"), "white": (flat(255), "weaker in contrast"), "grey": (flat(128), "less sharp"),
    "an eighth of the light": (light(1 / 8), "darker"), "four times the light": (light(4), ""),
    "blurred": (lambda picture: picture.filter(ImageFilter.GaussianBlur(picture.width / 40)), "less sharp"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["gear", "weave", "circuit_board", "wood"])
@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_what_shows_no_part_in_its_light_is_unsure_and_says_why(mini, products, references, name, change, words):
    for picture in products[name][GOOD:6]:
        found = mini.diagnose(change(picture), references[name])
        assert found.verdict == "unsure" and not found.comparable
        assert found.notes[0].startswith("as a whole it is unlike the normal pictures (") and words in found.notes[0]
        assert json.loads(found.to_json())["comparable"] is False and "unlike the normal" in found._repr_html_()
        assert "As a whole the picture is unlike" in found.text
        assert found.at(0.4).verdict == "unsure", "whatever the rate"


def test_another_product_is_not_judged_and_the_same_one_is(mini, products, references):
    for name, reference in references.items():
        for other, pictures in products.items():
            for picture in pictures[GOOD:]:
                assert mini.diagnose(picture, reference).comparable == (name == other), (name, other)


def test_a_defect_is_no_other_product(mini):
    """What is wrong with a part may change its light and look; it is judged all the same."""
    for name, kind in (("gear", "stain"), ("weave", "hole"), ("nut", "contamination"), ("ring", "blowhole")):
        *good, bad = (Image.fromarray(s.image) for s in draw_product(name, 5, ["good"] * GOOD + [kind]))
        assert mini.diagnose(bad, mini.reference(good, name)).comparable, name
    plain = Diagnoser(FakeModel())
    reference = plain.reference([part(seed=seed) for seed in range(GOOD)])
    assert plain.diagnose(part(seed=9, marks=[(150, 150, 30, 30)]), reference).verdict == "defective"


def test_it_is_kept_in_the_memory_file(mini, products, references, tmp_path):
    known = mini.load_reference(references["gear"].save(tmp_path / "gear.safetensors"))
    black = flat(0)(products["gear"][0])
    assert mini.diagnose(black, known).to_json() == mini.diagnose(black, references["gear"]).to_json()


def test_normal_pictures_of_several_surfaces_are_noticed(mini, products):
    mixed = mini.reference([*products["gear"][:2], *products["weave"][:2]], "part")
    assert mixed.groups == 2
    notes = mini.diagnose(products["gear"][5], mixed).notes
    assert any("fall into 2 groups" in note for note in notes)
    assert mini.reference(products["gear"][:GOOD]).groups == 1


@pytest.mark.parametrize(("count", "guess"), [(1, True), (3, True), (4, False)])
def test_a_threshold_of_fewer_than_four_is_called_a_guess(mini, products, count, guess):
    notes = mini.diagnose(products["gear"][7], mini.reference(products["gear"][:count])).notes
    assert any("threshold is a guess" in note for note in notes) == guess
