"""CLIP's text tokenizer (Radford et al. 2021): cleaned, lower-cased, byte-level BPE with an end-of-word mark.

The list of merges defines the vocabulary: 256 bytes, the same 256 at the end of a word, one entry per merge,
start of text, end of text.
"""

import gzip
import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

import ftfy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

from spgdd.errors import WeightsError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clean(text: str) -> str:
    """Mended Unicode, HTML entities resolved twice (as CLIP does), single spaces, lower case."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip().lower()


def byte_symbols() -> list[str]:
    """The 512 base symbols in CLIP's order: printable bytes, other bytes, then both at the end of a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return letters + [letter + WORD_END for letter in letters]


def byte_pair_tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return tokenizer


class TextTokenizer:
    """``tokenizer(texts)`` gives the ids that ``ImageBind.encode_text`` reads.

    ``merges``: lines of two symbols each. Without them it is CLIP's tokenizer of 49,408 entries.
    """

    def __init__(self, merges: Sequence[str] | None = None, context: int = 77):
        if merges is None:
            packed = files("spgdd.imagebind").joinpath("clip_merges.txt.gz").read_bytes()
            merges = gzip.decompress(packed).decode().splitlines()
        vocab = {symbol: index for index, symbol in enumerate(byte_symbols())}
        pairs = [tuple(line.split(" ")) for line in merges]
        for pair in pairs:
            if len(pair) != 2 or not vocab.keys() >= set(pair):
                line = " ".join(pair)[:60]
                raise WeightsError(f"{line!r} is not a BPE merge. `spgdd weights` restores the file.")
            vocab["".join(pair)] = len(vocab)
        self.start, self.end = len(vocab), len(vocab) + 1
        self.vocab_size, self.context = len(vocab) + 2, context
        self._bpe = byte_pair_tokenizer(models.BPE(vocab, pairs, end_of_word_suffix=WORD_END))
        self._bpe.add_special_tokens([AddedToken(name, normalized=False) for name in (START, END)])

    @classmethod
    def load(cls, folder: str | Path, context: int = 77) -> "TextTokenizer":
        """The tokenizer that ``train_text_tokenizer`` wrote; raises WeightsError where there is none."""
        path = Path(folder) / "merges.txt"
        if not path.is_file():
            raise WeightsError(f"There is no text tokenizer {path}. `spgdd weights` restores it.")
        return cls(path.read_text(encoding="utf-8").splitlines(), context)

    def __call__(self, texts: Sequence[str], legacy: bool = False) -> torch.Tensor:
        """int64 ids (B, context), padded with 0. A text too long is cut, keeping its end-of-text id.

        ``legacy=True`` cuts that off too, as PandaGPT and AnomalyGPT did; such a text is read at its start.
        """
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.zeros(len(texts), self.context, dtype=torch.int64)
        room = self.context - (1 if legacy else 2)
        for row, encoding in zip(ids, self._bpe.encode_batch([clean(text) for text in texts]), strict=True):
            kept = [self.start, *encoding.ids[:room], self.end][: self.context]
            row[: len(kept)] = torch.tensor(kept)
        return ids


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
