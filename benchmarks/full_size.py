"""What the benchmarks at full size share: profile spgdd-7b with random weights, made on the device, and its options."""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spgdd.imagebind import HUGE, MINI, ImageBind, TextTokenizer
from spgdd.language import LlamaTokenizer, Vicuna
from spgdd.model import SPGDD
from spgdd.profiles import get_profile, weights_folder

CONTEXT = 1.0  # GB of a GPU that CUDA itself takes, at most
TOY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


def build(options, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16, tokenizer: Path | None = None,
          prepare: Callable | None = None) -> SPGDD:  # fmt: skip
    """The model on ``options.device``, or a toy. ``tokenizer``: a file, by default mini's, of 2,000 pieces.

    ``prepare`` is called with LLaMA and ImageBind before LoRA is added.
    """
    profile, sizes, mini = get_profile("spgdd-7b"), {}, weights_folder().absolute() / "mini"
    if options.toy:  # else LlamaConfig's own sizes, LLaMA-7B's
        dtype, sizes, profile = torch.float32, TOY, replace(profile, text_tokenizer=str(mini / "text_tokenizer"))
    config = LlamaConfig(vocab_size=32001, max_position_embeddings=2048, attn_implementation=attention, **sizes)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(options.device):
        llama = LlamaForCausalLM(config).requires_grad_(False)
        imagebind = ImageBind(MINI if options.toy else HUGE).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    if prepare:
        prepare(llama, imagebind)
    words = TextTokenizer.load(profile.text_tokenizer) if options.toy else TextTokenizer()
    with torch.device(options.device):
        language = Vicuna(llama, LlamaTokenizer(tokenizer or mini / "language/tokenizer.model"), imagebind.config.joint)
        return SPGDD(profile, imagebind, language, words).eval()


def limit_gpu(gb: float) -> None:
    """Let this process have as much as a GPU of so many GB leaves it; 0: all of this GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((gb - CONTEXT) * 1e9 / whole if gb else 1.0)


def parser(about: str) -> argparse.ArgumentParser:
    """For benchmarks of training."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--toy", action="store_true", help="toy size, on the CPU too")
    made.add_argument("--length", type=int, default=200, help="tokens of text of the longest conversation")
    return made


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def run_in_folder(main: Callable, parser: argparse.ArgumentParser) -> None:
    """Call main with the options and a ``folder`` that is gone afterwards."""
    options = parse(parser)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        main(options)
