"""The profiles: one word chooses the networks, their files and what the machine must have."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from spgdd.errors import SpgddError


@dataclass(frozen=True)
class Delta:
    """A file of trained parameters."""

    file: str  # relative to the weights folder
    parts: tuple[str, ...]  # what it must supply in full, by the names of SPGDD's parameters
    notebook: str  # where the file comes from


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Everything that differs between two sizes of the system. Paths are relative to the weights folder."""

    name: str
    purpose: str  # one line for tables and error messages
    licence: str  # of the weights, one line
    notebook: str  # where the files come from, the deltas' apart
    disk_gb: float  # size of the files
    gpu_gb: float  # GPU memory to diagnose one image; of 13B estimated from the parameter counts
    precision: str = "auto"  # half precision on a GPU (spgdd.loading.choose_dtype); "float32": always
    # What sees: ImageBind, or a model of the hub
    imagebind: str | None = None  # name of the ImageBindConfig constant in spgdd.imagebind; None: ``backbone`` sees
    imagebind_file: str | None = None  # .pth or .safetensors
    text_tokenizer: str | None = None  # folder of ImageBind's text tokenizer; None: CLIP's, in the package
    words: bool = True  # it can compare with sentences (zero-shot); else with normal pictures alone
    backbone: str | None = None  # folder of what sees in place of ImageBind, a model of the hub (spgdd.backbones)
    layers: tuple[int, ...] = (-1,)  # of the backbone, whose patch tokens are compared
    size: int = 224  # pixels of a side of what it sees at once
    patch: int = 14  # pixels of a side of a patch
    fit: str  # an image becomes square by "crop" (centre) or "squash" (all of it, out of proportion)
    tiles: int = 1  # pictures are seen whole and in tiles x tiles parts; 1: only whole
    joint: int = 1  # up to so many tiles a side are encoded together, as one large picture; more: each for itself
    # What compares
    scales: tuple[int, ...] = (1,)  # sides of the memory's neighbourhoods, in patches; (1,): AnomalyGPT's
    rotate: bool = False  # normal pictures are remembered in four orientations
    budget: int | None = None  # entries of a memory per tap and scale; None: all
    comparison: bool = False  # few-shot maps join the memory's and the words' evidence; else the memory's alone
    learned_prompts: bool = False  # learned abnormal prompts (TDDF) beside the hand-written ones
    score_share: float = 0.0  # an image's score is the mean of the highest share of its map; 0: the highest value
    measured: bool = False  # the calibration's prior was measured with these eyes (benchmarks/calibration.py)
    # What speaks
    language: str | None = None  # folder of the LLaMA-shaped model, with its tokenizer.model; None: no text
    deltas: tuple[Delta, ...] = ()  # in load order: a later file wins
    lora_rank: int = 0  # rank of the LoRA matrices on q, k, v, o, and their alpha
    prompt_channels: tuple[int, ...] = ()  # of the prompt learner's convolutions
    focus: bool = False  # focus tokens (TDDF) after the map tokens; without them and the next: AnomalyGPT's layout
    memory_tokens: bool = False  # memory tokens (MSSPMM) after those

    def files(self) -> dict[str, str]:
        """The files that must be there before loading can start, each with the notebook that provides it."""
        base = [self.imagebind_file] if self.imagebind else [f"{self.backbone}/{file}" for file in BACKBONE]
        if self.language:
            base += [f"{self.language}/config.json", f"{self.language}/tokenizer.model"]
        if self.text_tokenizer:
            base.append(f"{self.text_tokenizer}/merges.txt")
        return {file: self.notebook for file in base} | {delta.file: delta.notebook for delta in self.deltas}

    def without_language(self) -> "Profile":
        """The same eyes, memory and words without what speaks: its files, and the parts that make prompts for it."""
        parts = [tuple(part for part in delta.parts if not part.startswith(SPEAKING)) for delta in self.deltas]
        deltas = tuple(replace(delta, parts=kept) for delta, kept in zip(self.deltas, parts, strict=True) if kept)
        return replace(self, language=None, deltas=deltas, focus=False, memory_tokens=False)


BACKBONE = ("config.json", "model.safetensors", "preprocessor_config.json")  # as the hub publishes it
SPEAKING = ("language", "prompt_learner", "focus", "memory_tokens")  # parts of SPGDD that only text needs
MAP_PARTS = ("image_decoder", "prompt_learner")
SPGDD_PARTS = (*MAP_PARTS, "memory", "comparison", "focus", "memory_tokens", "abnormal_prompts")
LANGUAGE_PARTS = ("language.llama_model", "language.llama_proj")  # of the language model, LoRA alone
PARTS = {"language": LANGUAGE_PARTS, "map": MAP_PARTS, "spgdd": SPGDD_PARTS}


def _read(name: str, entry: dict) -> Profile:
    """A profile from its entry in profiles.yaml."""
    deltas = [Delta(delta["file"], sum((PARTS[part] for part in delta["parts"]), ()), delta["notebook"])
              for delta in entry.get("deltas", ())]  # fmt: skip
    lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
    return Profile(**entry | lists | {"name": name, "deltas": tuple(deltas)})


_TABLE = yaml.safe_load(Path(__file__).with_name("profiles.yaml").read_text(encoding="utf-8"))["profiles"]
PROFILES = {name: _read(name, entry) for name, entry in _TABLE.items()}


def get_profile(name: str) -> Profile:
    """The profile called ``name``. Raises SpgddError with the known names."""
    if name not in PROFILES:
        raise SpgddError(f"there is no profile {name!r}; choose one of {', '.join(PROFILES)}.")
    return PROFILES[name]


def weights_folder(root: str | os.PathLike | None = None) -> Path:
    """``root``, else $SPGDD_WEIGHTS, else ``pretrained_ckpt`` of the checkout, else of the working folder."""
    if root or (root := os.environ.get("SPGDD_WEIGHTS")):
        return Path(root).expanduser()
    checkout = Path(__file__).resolve().parent.parent / "pretrained_ckpt"
    return checkout if checkout.is_dir() else Path("pretrained_ckpt")
