"""The language branch: conversation format, tokenizer, and Vicuna with LoRA that reads one image vector."""

from spgdd.language.conversation import encode_turns, fold_history
from spgdd.language.tokenizer import LlamaTokenizer
from spgdd.language.vicuna import Answer, LanguageOutput, LoraSettings, Vicuna

__all__ = [
    "Answer", "LanguageOutput", "LlamaTokenizer", "LoraSettings", "Vicuna", "encode_turns", "fold_history",
]
