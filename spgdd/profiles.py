"""The profiles: one word chooses the networks, their files and what the machine must have."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from spgdd.errors import SpgddError


@dataclass(frozen=True)
class Delta:
    """A file of trained parameters."""

    file: str  # relative to the weights folder
    parts: tuple[str, ...]  # what it must supply in full, by the names of SPGDD's parameters
    notebook: str  # where the file comes from


@dataclass(frozen=True)
class Profile:
    """Everything that differs between two sizes of the system. Paths are relative to the weights folder."""

    name: str
    purpose: str  # one line for tables and error messages
    imagebind: str | None  # name of the ImageBindConfig constant in spgdd.imagebind; None: ``backbone`` sees
    imagebind_file: str | None  # .pth or .safetensors
    text_tokenizer: str | None  # folder of ImageBind's text tokenizer; None: CLIP's, in the package
    language: str | None  # folder of the LLaMA-shaped model: config.json, weights, tokenizer.model; None: no text
    deltas: tuple[Delta, ...]  # in load order: a later file wins
    lora_rank: int  # rank of the LoRA matrices on q, k, v, o, and their alpha
    scales: tuple[int, ...]  # sides of the memory's neighbourhoods, in patches; (1,): AnomalyGPT's
    comparison: bool  # few-shot maps join the memory's and the words' evidence; else AnomalyGPT's, the memory's alone
    focus: bool  # focus tokens (TDDF) after the map tokens; without them and the next the layout is AnomalyGPT's
    memory_tokens: bool  # memory tokens (MSSPMM) after those
    learned_prompts: bool  # learned abnormal prompts (TDDF) beside the hand-written ones
    prompt_channels: tuple[int, ...]  # of the prompt learner's convolutions
    fit: str  # an image becomes square by "crop" (centre) or "squash" (all of it, out of proportion)
    precision: str  # "auto": half precision on a GPU (spgdd.loading.choose_dtype); "float32": always
    disk_gb: float  # size of the files
    gpu_gb: float  # GPU memory to diagnose one image, estimated from the parameter counts
    licence: str  # of the weights, one line
    notebook: str  # where the files come from, the deltas' apart
    rotate: bool = False  # normal pictures are remembered in four orientations
    budget: int | None = None  # entries of a memory per tap and scale; None: all
    score_share: float = 0.0  # an image's score is the mean of the highest share of its map; 0: the highest value
    tiles: int = 1  # pictures are seen whole and in tiles x tiles parts; 1: only whole
    joint: int = 1  # up to so many tiles a side are encoded together, as one large picture; more: each for itself
    words: bool = True  # it can compare with sentences (zero-shot); else with normal pictures alone
    backbone: str | None = None  # folder of what sees in place of ImageBind, a model of the hub (spgdd.backbones)
    layers: tuple[int, ...] = (-1,)  # of the backbone, whose patch tokens are compared
    size: int = 224  # pixels of a side of what it sees at once
    patch: int = 14  # pixels of a side of a patch
    measured: bool = False  # the calibration's prior was measured with these eyes (benchmarks/calibration.py)

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
RESEARCH = (
    "non-commercial research only: ImageBind, PandaGPT, AnomalyGPT under CC BY-NC-SA 4.0; "
    "Vicuna v0 under LLaMA's licence"
)

FULL = {  # all parts of SPGDD-GPT
    "scales": (1, 3, 5),
    "comparison": True,
    "focus": True,
    "memory_tokens": True,
    "learned_prompts": True,
    "score_share": 0.004,
}
PLAIN = {"comparison": False, "focus": False, "memory_tokens": False, "learned_prompts": False}  # as AnomalyGPT


def _large(name: str, size: str, delta: Delta, **fields) -> Profile:
    """A profile on ImageBind-Huge and Vicuna v0, with PandaGPT's delta under its own."""
    pandagpt = Delta(f"pandagpt_ckpt/{size}/pytorch_model.pt", LANGUAGE_PARTS, "notebook 01")
    return Profile(
        name=name,
        imagebind="HUGE",
        imagebind_file="imagebind_ckpt/imagebind_huge.pth",
        text_tokenizer=None,
        language=f"vicuna_ckpt/{size}_v0",
        deltas=(pandagpt, delta),
        lora_rank=32,
        prompt_channels=(4, 16, 64, 256, 1024),
        fit="squash",  # as AnomalyGPT was trained, and no part of the image is lost
        precision="auto",
        licence=RESEARCH,
        notebook="notebook 01",
        **fields,
    )


def _eyes(name: str, **fields) -> Profile:
    """A profile that sees and does not speak: few-shot maps of the memory alone, without any training."""
    silent = {"language": None, "text_tokenizer": None, "words": False, "lora_rank": 0, "prompt_channels": ()}
    fields = {"imagebind": None, "imagebind_file": None, "deltas": (), "fit": "squash", "precision": "auto"} | fields
    return Profile(name=name, notebook="notebook 01", **PLAIN, **silent, **fields)


def _dinov2(size: str, **fields) -> Profile:
    """DINOv2, as AnomalyDINO (Damm et al., WACV 2025) uses it with one to a few normal pictures.

    Tokens of the last layer at 448 pixels, cosine distance to the nearest one, and the mean of the highest hundredth
    of the map as the score: with its smallest network as good as any on MVTec AD. SubspaceAD and VisionAD join layers
    of the second half, which pays with the large networks. AnomalyDINO also masks the background, which is not done
    here, and turns the normal pictures: ``rotate`` does that for parts that may lie in any orientation.
    """
    common = {"scales": (1,), "score_share": 0.01, "size": 448, "licence": "Apache-2.0"}
    return _eyes(f"dinov2-{size}", backbone=f"dinov2_ckpt/{size}", **common, **fields)


_ALL = (
    Profile(
        name="mini",
        purpose="every mechanism at small size, on any laptop",
        imagebind="MINI",
        imagebind_file="mini/imagebind.safetensors",
        text_tokenizer="mini/text_tokenizer",
        language="mini/language",
        deltas=(
            Delta("mini/pandagpt_delta.safetensors", LANGUAGE_PARTS, "notebook 00"),
            Delta("mini/delta.safetensors", (*LANGUAGE_PARTS, *SPGDD_PARTS), "notebook 00"),
        ),
        lora_rank=32,
        **FULL | {"scales": (1, 3)},  # the third one brought nothing there
        joint=2,
        measured=True,
        prompt_channels=(4, 16, 32, 64, 128),
        fit="squash",
        precision="float32",
        disk_gb=0.1,
        gpu_gb=0.5,
        licence="that of this repository",
        notebook="notebook 00",
    ),
    _dinov2("small", purpose="real photographs on a laptop", disk_gb=0.09, gpu_gb=0.5),
    _dinov2("base", purpose="real photographs, several objects in a picture", disk_gb=0.35, gpu_gb=1),
    _eyes(
        "imagebind",
        purpose="the paper's eyes without the language model",
        imagebind="HUGE",
        imagebind_file="imagebind_ckpt/imagebind_huge.pth",
        scales=(1, 3, 5),
        score_share=0.004,
        disk_gb=4.8,
        gpu_gb=3.5,
        licence="non-commercial: CC BY-NC-SA 4.0",
    ),
    _large(
        "anomalygpt-7b",
        "7b",
        Delta("anomalygpt_ckpt/train_mvtec/pytorch_model.pt", MAP_PARTS, "notebook 01"),
        purpose="AnomalyGPT's published weights: a working 7B diagnosis",
        scales=(1,),
        **PLAIN,
        disk_gb=18.6,
        gpu_gb=17,
    ),
    _large(
        "spgdd-7b",
        "7b",
        Delta("spgdd_ckpt/7b/delta.safetensors", SPGDD_PARTS, "notebook 05"),
        purpose="the paper's system, trained by you",
        **FULL,
        disk_gb=18.9,
        gpu_gb=17,
    ),
    _large(
        "spgdd-13b",
        "13b",
        Delta("spgdd_ckpt/13b/delta.safetensors", SPGDD_PARTS, "notebook 05"),
        purpose="the paper's system with the larger language model, trained by you",
        **FULL,
        disk_gb=31.6,
        gpu_gb=30,
    ),
)
PROFILES = {profile.name: profile for profile in _ALL}


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
