"""CLIP's text tokenizer (Radford et al. 2021): cleaned, lower-cased, byte-level BPE with an end-of-word mark.

The list of merges defines the vocabulary: 256 bytes, the same 256 at the end of a word, one entry per merge,
start of text, end of text.
"""

import gzip
import html
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import ftfy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from spgdd.errors import WeightsError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
CONTEXT = 77  # ids of a text
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

    def __init__(self, merges: Sequence[str] | None = None):
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
        self.vocab_size = len(vocab) + 2
        self._bpe = byte_pair_tokenizer(models.BPE(vocab, pairs, end_of_word_suffix=WORD_END))
        self._bpe.add_special_tokens([AddedToken(name, normalized=False) for name in (START, END)])

    @classmethod
    def load(cls, folder: str | Path) -> "TextTokenizer":
        """The tokenizer of a folder with ``merges.txt``; raises WeightsError where there is none."""
        path = Path(folder) / "merges.txt"
        if not path.is_file():
            raise WeightsError(f"There is no text tokenizer {path}. `spgdd weights` restores it.")
        return cls(path.read_text(encoding="utf-8").splitlines())

    def __call__(self, texts: Sequence[str], legacy: bool = False) -> torch.Tensor:
        """int64 ids (B, 77), padded with 0. A text too long is cut, keeping its end-of-text id.

        ``legacy=True`` cuts that off too, as PandaGPT and AnomalyGPT did; such a text is read at its start.
        """
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
        room = CONTEXT - (1 if legacy else 2)
        for row, encoding in zip(ids, self._bpe.encode_batch([clean(text) for text in texts]), strict=True):
            kept = [self.start, *encoding.ids[:room], self.end][:CONTEXT]
            row[: len(kept)] = torch.tensor(kept)
        return ids
