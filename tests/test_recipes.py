"""What the recipes of the mini weights tell the text tower and the language model."""

import json
import random
from pathlib import Path

import pytest
import torch

from conftest import FIXTURES
from miniworld import TYPES, ground_truth, photograph, possible_types
from spgdd.data.grammar import KINDS, a, kind_of
from spgdd.imagebind import ImageFeatures

MINI = Path(__file__).parents[1] / "recipes" / "mini"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(MINI)


def sample_of(kind: str | None, product: str = "zeppelin") -> dict:
    defect = {"type": kind, "place": "top left", "area": 0.01, "contrast": 0.3, "severity": "minor"}
    return {"product": product, "family": "", "defects": [defect] * bool(kind)}


@pytest.mark.parametrize("product", ["capsule", "metal_nut"])
def test_first_caption_is_of_the_published_state_ensemble(product, recipe):
    from texts import captions

    published = json.loads((FIXTURES / "anomalygpt" / "ensemble_text.json").read_text())[product]
    rng = random.Random(0)
    for kind, state in ((None, "normal"), ("dent", "abnormal")):
        sample = sample_of(kind, product.replace("_", " "))
        seen = {captions(sample, rng)[0] for _ in range(2000)}
        assert {entry["text"] for entry in published[state]} <= seen


def test_captions_and_patch_phrases_name_kind_and_place(recipe):
    from texts import GOOD_PHRASES, captions, patch_phrases

    for kind in TYPES:
        caption = captions(sample_of(kind), random.Random(0))[1]
        assert kind_of(kind)["one"] in caption and "top left" in caption
        assert a(kind_of(kind)["one"]) == patch_phrases(kind)[0] and len(set(patch_phrases(kind))) == 4
    assert not set(GOOD_PHRASES) & {phrase for kind in TYPES for phrase in patch_phrases(kind)}


@pytest.mark.parametrize("axes", [(), (-1,), (-2,), (-1, -2)])
def test_mirrored_knowledge_is_that_of_the_mirrored_picture(axes, recipe):
    from worlds import mirrored

    numbers = torch.arange(24)
    kinds = torch.tensor(possible_types("wood"))
    shots = photograph("wood", numbers, numbers + 7, kinds[numbers % len(kinds)])
    flipped = shots._replace(images=shots.images.flip(axes), masks=shots.masks.flip(axes))
    expected = ground_truth("wood", "", flipped)
    assert sum(len(sample["defects"]) for sample in expected) > 20
    for sample, theirs in zip(ground_truth("wood", "", shots), expected, strict=True):
        ours = mirrored(sample, *axes)
        assert ours.get("middle") == theirs.get("middle")
        for one, other in zip(ours["defects"], theirs["defects"], strict=True):
            assert one["place"] == other["place"]
            assert tuple(one["box"]) == tuple(other["box"])


def test_where_patches_tell_of_another_picture_no_answer_names_a_kind_and_else_no_verdict_is_learned(recipe):
    from stage4_spgdd import conversation_about

    numbers = torch.arange(24)
    kinds = torch.tensor([-1, *possible_types("wood")])
    shots = photograph("wood", numbers, numbers + 7, kinds[numbers % len(kinds)])
    names = {KINDS[kind][number] for kind in TYPES for number in ("one", "many")}
    rng, named, known = random.Random(3), 0, 0
    for sample in ground_truth("wood", "", shots) * 10:
        sample |= {"product": "wood"}
        answers = [turn["value"] for turn in conversation_about(sample, rng, True, 5)[1::2]]
        assert not any(name in answer for answer in answers for name in names), answers
        turns = [turn["value"] for turn in conversation_about(sample, rng, False, 5)]
        assert len(turns) == 10
        named += bool(sample["defects"]) and any(name in answer for answer in turns[1::2] for name in names)
        if "### Assistant:" in turns[0]:
            known += 1
            answered = turns[0].split("### Assistant: ")[1].split("\n###")[0]
            assert answered.startswith("Yes" if sample["defects"] else "No")
            assert not any(name in answered for name in names)
    assert named > 150 and 150 < known < 230


def test_a_conversation_is_told_where_patches_and_memory_are_of_another_picture(recipe):
    from worlds import Diagnosed

    count, said = 40, []
    world = object.__new__(Diagnosed)  # as if drawn: a picture's number is the value of all its tokens
    world.conversation = lambda sample, rng, foreign: said.append((sample["number"], foreign)) or []
    world.foreign_vector, world.foreign_patches, world.chosen = 0.0, 0.5, [[row] for row in range(count)]
    world.known = [{"product": "wood", "defects": [], "number": row} for row in range(count)]
    world.features = [ImageFeatures(torch.full((3,), row), torch.full((4, 4, 2), row)) for row in range(count)]
    world.entries = [torch.full((4, 2), row) for row in range(count)]
    world.maps = torch.zeros(count, 224, 224)
    batch = world._batch(range(count), [random.Random(row) for row in range(count)])
    assert batch.features.embedding[:, 0].tolist() == list(range(count))
    patches_of = batch.features.patches[:, 0, 0, 0].tolist()
    assert patches_of == [int(entries[0, 0]) for entries in batch.normals]
    assert said == [(row, row != other) for row, other in enumerate(patches_of)]
    assert 10 < sum(foreign for _, foreign in said) < 30


def test_every_epoch_of_a_diagnosed_world_has_as_many_batches_and_as_many_good_as_defective_pictures(recipe):
    from worlds import Diagnosed

    rng, count = random.Random(2), 400
    world = object.__new__(Diagnosed)
    world.known = [{"defects": [0] * (row % 9 > 4)} for row in range(count)]
    world.chosen = [[0] * rng.choice((0, 1, 2, 4)) for _ in range(count)]
    world.features = [ImageFeatures(torch.zeros(3), torch.zeros(4, rng.choice((4, 16)), 2)) for _ in range(count)]
    plans = [world.order(epoch, 0, 8) for epoch in range(20)]
    assert {len(plan) for plan in plans} == {len(plans[0])}
    assert plans[0] == world.order(0, 0, 8) != plans[1]
    bad = [bool(world.known[row]["defects"]) for plan in plans for rows in plan for row in rows]
    assert abs(sum(bad) / len(bad) - 0.5) < 0.02
    for rows in plans[0]:
        assert len({(len(world.chosen[row]), world.features[row].patches.shape) for row in rows}) == 1
        assert len(set(rows)) == 8
