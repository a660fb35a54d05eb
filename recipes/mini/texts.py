"""Every sentence that the mini text tower learns from, tokenised once and looked up by family, defect and place."""

import random
from pathlib import Path

import torch
from torch import Tensor

from miniworld import FAMILIES
from miniworld.world import TYPES
from spgdd.data import words
from spgdd.imagebind.text_tokenizer import TextTokenizer, train_text_tokenizer
from spgdd.places import PLACES
from spgdd.selfprompt.focuser import text_prompts

LENGTH = 32  # tokens; all sentences are shorter
NAMES, OTHERS, CAPTIONS, PHRASES = (
    4,
    4,
    3,
    3,
)  # product names a family, captions of one finding, phrases of one defect type


def product_names(family: str) -> list[str]:
    """The first names of a family, then general ones, ``NAMES`` in all."""
    return (words.names_of({"product": family.replace("_", " "), "family": family}) * NAMES)[: NAMES - 1] + ["object"]


def samples(family: str, name: str):
    """One sample dict for good, then one for each defect type at each place and at none."""
    yield {"product": name, "family": family, "defects": []}
    for kind in TYPES:
        for place in PLACES:
            defect = {"type": kind, "place": place, "area": 0.01, "contrast": 0.3, "severity": "moderate"}
            yield {"product": name, "family": family, "defects": [defect]}


def captions(sample: dict, rng: random.Random) -> list[str]:
    """State, finding and surface; the caption that speaks of size is left out, as the table knows none."""
    state, finding, _, surface = words.captions(sample, rng)
    return [state, finding, surface]


def corpus() -> list[str]:
    rng = random.Random(0)
    texts = []
    for family in FAMILIES:
        for name in product_names(family):
            texts += [text for sample in samples(family, name) for text in captions(sample, rng)]
            texts += [text for side in text_prompts(name).values() for text in side]
    for given in words.grammar.VOCABULARY["product_names"].values():
        texts += [text for name in given for side in text_prompts(name).values() for text in side]
    return texts + [phrase for kind in TYPES for phrase in words.patch_phrases(kind)]


class TextBank:
    """Token ids by meaning, for F families: captions (F, NAMES, 1 + 18 * 9, CAPTIONS, LENGTH), anchors
    (F, NAMES + OTHERS, 24, LENGTH), phrases (1 + 18, PHRASES, LENGTH), row 0 being the good surface.

    The anchors know each family by foreign names too: whether a part is damaged must not hang on what it is called.
    """

    def __init__(self, tokenizer: TextTokenizer, device):
        rng = random.Random(1)
        names = {family: product_names(family) for family in FAMILIES}

        def ids(texts: list[str], *shape: int) -> Tensor:
            return tokenizer(texts)[:, :LENGTH].view(*shape, LENGTH).to(device)

        self.captions = ids(
            [
                text
                for family, given in names.items()
                for name in given
                for sample in samples(family, name)
                for text in captions(sample, rng)
            ],
            len(FAMILIES),
            NAMES,
            1 + len(TYPES) * len(PLACES),
            CAPTIONS,
        )
        known = sorted({name for given in words.grammar.VOCABULARY["product_names"].values() for name in given})
        self.anchors = ids(
            [
                text
                for given in names.values()
                for name in given + rng.sample(known, OTHERS)
                for side in text_prompts(name).values()
                for text in side
            ],
            len(FAMILIES),
            NAMES + OTHERS,
            24,
        )
        good = ["a good surface", "a flawless surface", "an even surface"]
        self.phrases = ids(
            [text for phrases in (good, *map(words.patch_phrases, TYPES)) for text in (phrases * PHRASES)[:PHRASES]],
            1 + len(TYPES),
            PHRASES,
        )

    def caption_rows(self, types: Tensor, cells: Tensor) -> Tensor:
        """Row of the caption table for pictures with these types and places; an unknown place gets any place's row."""
        return torch.where(types < 0, 0, 1 + types.clamp(min=0) * len(PLACES) + cells.clamp(min=0))


def build_tokenizer(folder: Path, vocab_size: int) -> TextTokenizer:
    return train_text_tokenizer(corpus(), vocab_size, folder)
