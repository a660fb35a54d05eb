"""The language branch: conversation format, tokenizer, and Vicuna with LoRA that reads one image vector.

Vicuna brings peft and LLaMA, seconds to import: it comes when it is asked for.
"""

from importlib import import_module

from spgdd.language.conversation import Answer, encode_turns, fold_history
from spgdd.language.tokenizer import LlamaTokenizer

_OF_VICUNA = ("LanguageOutput", "LoraSettings", "Vicuna")
__all__ = ["Answer", "LlamaTokenizer", "encode_turns", "fold_history", *_OF_VICUNA]


def __getattr__(name: str):
    if name not in _OF_VICUNA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("spgdd.language.vicuna"), name)
