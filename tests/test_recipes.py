"""What the recipes of the mini weights tell the language model about mirrored pictures."""

from pathlib import Path

import pytest
import torch

from spgdd.tadd.miniworld import describe, photograph, possible_types

MINI = Path(__file__).parents[1] / "recipes" / "mini"


@pytest.mark.parametrize("axes", [(), (-1,), (-2,), (-1, -2)])
def test_mirrored_knowledge_is_that_of_the_mirrored_picture(axes, monkeypatch):
    monkeypatch.syspath_prepend(MINI)
    from talk import mirrored

    numbers = torch.arange(24)
    kinds = torch.tensor(possible_types("wood"))
    shots = photograph("wood", numbers, numbers + 7, kinds[numbers % len(kinds)])
    flipped = shots._replace(images=shots.images.flip(axes), masks=shots.masks.flip(axes))
    expected = describe("wood", "", flipped)
    assert sum(len(sample["defects"]) for sample in expected) > 20
    for sample, theirs in zip(describe("wood", "", shots), expected, strict=True):
        ours = mirrored(sample, *axes)
        assert ours.get("middle") == theirs.get("middle")
        for one, other in zip(ours["defects"], theirs["defects"], strict=True):
            assert one["place"] == other["place"]
            assert tuple(one["box"]) == tuple(other["box"])
