"""ImageBind from a checkpoint file, reading no more than the towers asked for."""

from pathlib import Path

import torch

from spgdd.errors import WeightsError
from spgdd.imagebind.config import MODALITIES, ImageBindConfig
from spgdd.imagebind.towers import PARTS, ImageBind
from spgdd.tensors import read_tensors


def load_imagebind(
    path: str | Path,
    config: ImageBindConfig,
    modalities=("vision", "text"),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    kind: type[ImageBind] = ImageBind,
) -> ImageBind:
    """The towers asked for, frozen and in eval mode, from a .pth or .safetensors file; others stay on disk.

    Tensors that need no conversion stay mapped to the file: replace it as a whole, never write into it.
    Raises WeightsError when the file cannot be read or its tensors do not fit ``config``.
    """
    with torch.device("meta"):
        model = kind(config, modalities)
    wanted, state = model.state_dict(), read_tensors(path)
    left_out = tuple(f"{part}.{m}." for part in PARTS for m in MODALITIES if m not in model.modalities)
    problems = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted and not key.startswith(left_out)],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    found = [f"{len(keys)} {what}, such as {', '.join(keys[:3])}" for what, keys in problems.items() if keys]
    if found:
        raise WeightsError(
            f"{path} does not fit the towers {', '.join(model.modalities)}. Tensors: {'; '.join(found)}. "
            "Choose the profile that the file was made for, or fetch it again with `spgdd weights`."
        )
    model.load_state_dict({key: state[key].to(device, dtype) for key in wanted}, assign=True)
    return model.eval().requires_grad_(False)
