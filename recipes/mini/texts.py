"""Every sentence that the mini text tower learns from, tokenised once and looked up by family, defect and place."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import models, trainers
from torch import Tensor

from miniworld import FAMILIES
from miniworld.world import TYPES
from spgdd.data import grammar, words
from spgdd.data.grammar import VOCABULARY, a, finding, kind_of
from spgdd.imagebind.text_tokenizer import WORD_END, TextTokenizer, byte_pair_tokenizer, byte_symbols, clean
from spgdd.places import PLACES
from spgdd.selfprompt.focuser import STATES, text_prompts

LENGTH = 32  # tokens; all sentences are shorter
NAMES, OTHERS = 4, 4  # own and foreign product names of a family
CAPTIONS, PHRASES = 3, 3  # of one finding, of one defect type
GOOD_PHRASES = ["a good surface", "a flawless surface", "an even surface"]


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
    """Three captions of a picture: its state as in the state ensemble, what is found on it, its surface."""
    name = rng.choice([*words.names_of(sample), rng.choice(VOCABULARY["plain_names"])])
    defects = sample["defects"]
    state = rng.choice(STATES["abnormal" if defects else "normal"]).format(name)
    first = f"a photo of {rng.choice(('a', 'the'))} {state}."
    if not defects:
        others = kind_of(rng.choice(TYPES))["many"]
        return [first, f"a photo of {a(name)} without {others}.", a(f"good {name}.")]
    surface = kind_of(grammar.worst(defects)["type"])["surface"]
    return [first, f"a photo of {a(name)} with {finding(defects)}.", a(f"{surface} {name}.")]


def patch_phrases(defect_type: str) -> list[str]:
    """What a patch with a defect of this type shows."""
    noun, surface = a(kind_of(defect_type)["one"]), kind_of(defect_type)["surface"]
    return [noun, f"a photo of {noun}", f"{surface} surface", a(f"{surface} part")]


def corpus() -> list[str]:
    rng = random.Random(0)
    texts = []
    for family in FAMILIES:
        for name in product_names(family):
            texts += [text for sample in samples(family, name) for text in captions(sample, rng)]
            texts += [text for side in text_prompts(name).values() for text in side]
    for given in VOCABULARY["product_names"].values():
        texts += [text for name in given for side in text_prompts(name).values() for text in side]
    return texts + [phrase for kind in TYPES for phrase in patch_phrases(kind)]


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

        texts = [
            text
            for family, given in names.items()
            for name in given
            for sample in samples(family, name)
            for text in captions(sample, rng)
        ]
        self.captions = ids(texts, len(FAMILIES), NAMES, 1 + len(TYPES) * len(PLACES), CAPTIONS)
        known = sorted({name for given in VOCABULARY["product_names"].values() for name in given})
        texts = [
            text
            for given in names.values()
            for name in given + rng.sample(known, OTHERS)
            for side in text_prompts(name).values()
            for text in side
        ]
        self.anchors = ids(texts, len(FAMILIES), NAMES + OTHERS, 24)
        phrases = [GOOD_PHRASES, *(patch_phrases(kind)[:PHRASES] for kind in TYPES)]
        self.phrases = ids([text for those in phrases for text in those], 1 + len(TYPES), PHRASES)

    def caption_rows(self, types: Tensor, cells: Tensor) -> Tensor:
        """Row of the caption table for pictures with these types and places; an unknown place gets any place's row."""
        return torch.where(types < 0, 0, 1 + types.clamp(min=0) * len(PLACES) + cells.clamp(min=0))


def build_tokenizer(folder: Path, vocab_size: int) -> TextTokenizer:
    return train_text_tokenizer(corpus(), vocab_size, folder)


def train_text_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> TextTokenizer:
    """Learn merges from ``texts``, write them to ``folder/merges.txt`` and return their tokenizer.

    It has ``vocab_size`` entries, or fewer once no pair is left to merge. Equal texts give equal files.
    """
    learner = byte_pair_tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,  # without start and end of text
        special_tokens=byte_symbols(),  # fixes their ids, and so the order in which equal counts are merged
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator((clean(text) for text in texts), trainer)
    merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    path = Path(folder) / "merges.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(merges) + "\n", encoding="utf-8")
    return TextTokenizer(merges)
