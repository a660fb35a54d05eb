"""Loading a model: which precision, which files, and what is said when one is missing."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import spgdd.imagebind
from spgdd.backbones import load_backbone
from spgdd.errors import SpgddError, WeightsError
from spgdd.imagebind import TextTokenizer, load_imagebind
from spgdd.model import SPGDD
from spgdd.profiles import PROFILES, SPEAKING, Delta, Profile, get_profile, weights_folder
from spgdd.ranges import check_ranges
from spgdd.tensors import is_standin, read_tensors
from spgdd.weights.delta import apply_delta

RENAMED = {"comparison.doubling": "comparison.per_doubling"}  # as the shipped delta names it


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """A device by name; by default a GPU where there is one. Raises SpgddError for one that this machine lacks."""
    check_ranges(device=device)
    device, count = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise SpgddError(f"there is no {device} here: torch {torch.__version__} sees {count} GPU(s).")
    return device


def choose_dtype(device: str | torch.device) -> tuple[torch.dtype, str]:
    """Precision of the large frozen models on a device, and the reason in words."""
    device = torch.device(device)
    if device.type != "cuda":
        return torch.float32, f"float32 on {device.type}: half precision is slow or incomplete there"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return torch.bfloat16, f"bfloat16: {name} computes in it, and it has the range of float32"
    version = ".".join(map(str, capability))
    return torch.float16, f"float16: {name} (compute capability {version}) has no bfloat16"


def load_model(
    profile: str | Profile = "mini",
    root: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantize: Literal["8bit", "4bit"] | None = None,
    device_map: str | dict | None = None,
    language: bool = True,
) -> SPGDD:
    """Read a profile's weights from ``root`` (see ``weights_folder``), in evaluation mode.

    ``device``: by default a GPU where there is one. ``dtype`` of the vision tower and the language model: by default
    ``choose_dtype``; what can be trained is always float32. ``quantize`` shrinks the language model,
    ``device_map`` spreads it over several GPUs ("auto", or as in transformers). Without ``language``
    none of the language model's files is needed or read: there are maps and verdicts, no words. Raises WeightsError
    that lists every missing file, or names one that is damaged or belongs to another model.
    """
    profile, device = get_profile(profile) if isinstance(profile, str) else profile, choose_device(device)
    if not language:
        profile = profile.without_language()
    root = weights_folder(root)
    _require_files(profile, root)
    if dtype is None:
        dtype = torch.float32 if profile.precision == "float32" else choose_dtype(device)[0]
    beside = ThreadPoolExecutor(1)  # checksums of deltas take a second at 7B: compared while the rest is read
    states = beside.map(partial(read_delta, root=root), profile.deltas)
    beside.shutdown(wait=False)

    if profile.imagebind:
        config = getattr(spgdd.imagebind, profile.imagebind)
        towers = ("vision", "text") if profile.words else ("vision",)
        vision = load_imagebind(root / profile.imagebind_file, config, towers, dtype, device)
    else:
        vision = load_backbone(root / profile.backbone, profile.layers, dtype, device)
        if (vision.patch, profile.size % vision.patch) != (profile.patch, 0):
            raise WeightsError(f"{profile.backbone} has patches of {vision.patch} pixels, profile {profile.name} "
                               f"cuts pictures of {profile.size} into patches of {profile.patch}.")  # fmt: skip
    tokenizer, folder = None, profile.text_tokenizer
    if profile.words:
        tokenizer = TextTokenizer.load(root / folder) if folder else TextTokenizer()
    vicuna, read = None, [profile.imagebind_file or profile.backbone]
    if profile.language:
        from spgdd.language import LoraSettings, Vicuna  # seconds to import

        lora = LoraSettings(r=profile.lora_rank, alpha=profile.lora_rank)
        vicuna = Vicuna.load(root / profile.language, vision.joint, dtype, device, device_map, quantize, lora)
        read.append(profile.language)
    with device:
        model = SPGDD(profile, vision, vicuna, tokenizer)
    model.standins = tuple(file for file in read if is_standin(root / file))
    load_deltas(model, profile.deltas, root, states)
    return model.eval()


def read_delta(delta: Delta, root: Path) -> dict[str, Tensor]:
    """Trained parameters by their names in a model. Raises WeightsError for a damaged file."""
    state = read_tensors(root / delta.file, intact=True, mend=f"Fetch or train it again ({delta.notebook}).")
    # The published files name the language model's parameters without saying whose they are.
    return {f"language.{k}" if k.startswith("llama_") else RENAMED.get(k, k): v for k, v in state.items()}


def load_deltas(
    model: SPGDD, deltas: Sequence[Delta], root: Path, states: Iterable[dict[str, Tensor]] | None = None
) -> None:
    """Put trained parameters into a model, a later file over an earlier. Raises WeightsError naming the file.

    ``states``: what ``read_delta`` makes of each, if that was done before.
    """
    if states is None:
        _require_files(replace(model.profile, deltas=tuple(deltas)), root)
        states = (read_delta(delta, root) for delta in deltas)
    for delta, state in zip(deltas, states, strict=True):
        if model.language is None:
            state = {k: value for k, value in state.items() if not k.startswith(SPEAKING)}
        try:
            apply_delta(model, state, delta.parts)
        except WeightsError as error:
            raise WeightsError(f"{root / delta.file}: {error}") from error
        if is_standin(root / delta.file):
            model.standins += (delta.file,)


def _require_files(profile: Profile, root: Path) -> None:
    missing = {file: source for file, source in profile.files().items() if not (root / file).is_file()}
    if missing:
        spoken = profile.language or not getattr(PROFILES.get(profile.name), "language", None)
        command = f"spgdd weights download {profile.name}{'' if spoken else ' --no-language'}"
        raise WeightsError(
            f"profile {profile.name} lacks {len(missing)} file(s) in {root.resolve()}:",
            *(f"  {file} ({source})" for file, source in missing.items()),
            f"`{command}` fetches what is published; notebooks make the rest. "
            "If the files are elsewhere, set SPGDD_WEIGHTS to that folder."
        )
