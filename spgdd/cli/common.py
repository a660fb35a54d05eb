"""What several commands share."""

import argparse
import sys
from pathlib import Path


def complain(message) -> None:
    print(f"spgdd: {message}", file=sys.stderr)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, from where, on what."""
    add = parser.add_argument
    add("--profile", default="mini", help="mini (default), anomalygpt-7b, spgdd-7b or spgdd-13b")
    add("--root", type=Path, metavar="DIR", help="folder of the weights (default: pretrained_ckpt)")
    add("--device", help="cpu, cuda or cuda:1 (default: a GPU where there is one)")
    add("--quantize", choices=("8bit", "4bit"), help="shrink the language model on a GPU (needs bitsandbytes)")


def model_options(options: argparse.Namespace) -> dict:
    """What ``add_model_options`` read, as ``spgdd.load`` takes it."""
    return {name: getattr(options, name) for name in ("profile", "root", "device", "quantize")}
