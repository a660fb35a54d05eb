"""What the cells of the course share: whether this machine is ready, and checks that say what they found."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch

_standins = False  # whether the notebook's profile has weights of random values: what they say cannot be judged


def check(fact, sentence: str) -> None:
    """Print a sentence with a tick where it holds. Raises AssertionError with it where it does not.

    With stand-in weights (``environment`` finds out) it is not judged, and a line says so.
    """
    if not fact and not _standins:
        raise AssertionError(f"does not hold: {sentence}")
    print(f"✓ {sentence}" if fact else f"- not judged, the weights are stand-ins: {sentence}")


def equal(ours, theirs, sentence: str, tolerance: float = 1e-3) -> None:
    """``check`` that two tensors, or what becomes one, are equal; says by how much they differ, in powers of ten."""
    ours, theirs = (torch.as_tensor(values).detach().float().cpu() for values in (ours, theirs))
    if ours.shape != theirs.shape:
        raise AssertionError(f"does not hold: {sentence}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
    difference = (ours - theirs).abs().max().item()
    below = next((10.0**power for power in range(-7, 4) if difference < 10.0**power), difference)
    sentence = f"{sentence} (largest difference below {below:.0e})"
    if not difference <= tolerance:  # two ways of computing agree whatever the weights are
        raise AssertionError(f"does not hold: {sentence}")
    check(True, sentence)


def environment(profile, needs: Mapping[str | PathLike, str] | None = None) -> None:
    """Print versions, device, precision with its reason, and the weights of a profile, given by name or as ``Profile``.

    Raises WeightsError where the profile's weights, or files of ``needs``, are missing; ``needs`` names for
    each file what makes it: ``{"../runs/features.safetensors": "notebook 05"}``.
    """
    global _standins
    import platform

    import transformers

    from spgdd import __version__
    from spgdd.errors import WeightsError
    from spgdd.loading import choose_dtype
    from spgdd.profiles import get_profile, weights_folder
    from spgdd.tensors import is_standin

    chosen, root = get_profile(profile) if isinstance(profile, str) else profile, weights_folder()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = f"cuda, {torch.cuda.get_device_name()}" if device == "cuda" else "cpu"
    reason = choose_dtype(device)[1]
    if chosen.precision == "float32":
        reason = f"float32: {chosen.name} is small enough to be exact everywhere"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"versions   spgdd {__version__}, {versions}, transformers {transformers.__version__}")
    print(f"profile    {chosen.name}: {chosen.purpose}")
    print(f"device     {hardware}")
    print(f"precision  {reason}")

    files = {root / file: source for file, source in chosen.files().items()}
    wanted = files | {Path(file): source for file, source in (needs or {}).items()}
    missing = [f"  {file} (from {source})" for file, source in wanted.items() if not file.is_file()]
    if missing:
        how = f"Run the notebook named; `spgdd weights download {chosen.name}` fetches what is published."
        raise WeightsError(f"{len(missing)} file(s) are missing:", *missing, how)
    there = [file for folder in {file.parent for file in files} for file in folder.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in there)
    _standins = any(map(is_standin, files))
    about = ": stand-ins, random values, whose maps and words mean nothing" if _standins else ""
    print(f"weights    {size / 1e6:,.0f} MB in {root}{about}")
