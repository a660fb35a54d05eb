"""LLaMA's tokenizer, read from `tokenizer.model` with sentencepiece itself."""

import re
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from spgdd.errors import WeightsError


class LlamaTokenizer:
    """Text to LLaMA token ids and back, with the ids that PandaGPT was trained on.

    PandaGPT's tokenizer handed the text to the sentencepiece model. The class of this name in transformers is
    now a conversion that drops the dummy space before a text that starts with a space or follows a special
    token, so this one asks sentencepiece again and needs no file but `tokenizer.model`. Vicuna v0's
    additional id, 32000 for padding, is never produced by `encode` and skipped by `decode`.

    Attributes `bos` and `eos` are the ids of `<s>` and `</s>`, from the vocabulary: `config.json` of old
    LLaMA conversions has them wrong.
    """

    def __init__(self, file: str | Path):
        try:
            self._model = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise WeightsError(f"{file} is not a readable sentencepiece model ({error}). Get it again with "
                               "`spgdd weights download PROFILE` or notebook 01.") from error
        self.bos, self.eos = self._model.bos_id(), self._model.eos_id()
        self._special = {self._model.id_to_piece(i): i for i in (self.bos, self.eos, self._model.unk_id())}
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    def __len__(self) -> int:
        return self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids without BOS. `<s>`, `</s>` and `<unk>` in the text become their ids, and each stretch between
        them is encoded on its own."""
        ids = []
        for part in self._split.split(text):
            ids += [self._special[part]] if part in self._special else self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without special tokens."""
        return self._model.decode([i for i in ids if i < len(self) and i not in self._special.values()])

    def piece_id(self, piece: str) -> int:
        """Id of one piece. Raises WeightsError where the vocabulary does not hold it."""
        index = self._model.piece_to_id(piece)
        if index == self._model.unk_id():
            raise WeightsError(f"The tokenizer ({len(self)} pieces) is not LLaMA's: it lacks {piece!r}. "
                               "Take tokenizer.model from the folder of the base model (notebook 01).")
        return index
