"""Normal pictures of one product, encoded once: how they look, and which scores a normal picture gets."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from spgdd.calibration import AREA, Calibration, altered_copies
from spgdd.errors import ImageError, WeightsError
from spgdd.geometry import Placement, assemble
from spgdd.imagebind import ImageFeatures
from spgdd.imagebind.preprocess import normalise
from spgdd.images import image_name, list_images, read_image
from spgdd.selfprompt.memory import MemoryBank, rotations

BATCH = 32  # views that the vision tower takes at once
COMPARED = 8  # views that the memory takes at once: what it makes of more leaves a processor's cache
HELD_OUT = 64  # at most so many normal pictures are scored against the others


@dataclass(frozen=True, eq=False)
class Reference:
    """Normal pictures of one product, for any number of diagnoses."""

    product: str
    normals: tuple[str, ...]  # names
    bank: MemoryBank = field(repr=False)
    calibration: Calibration = field(repr=False)
    digests: frozenset[str] = field(repr=False)  # of the pixels: a query can be one of the normals
    tiles: int  # a picture is seen whole and in tiles x tiles parts; 1: only whole
    parts: str = field(repr=False)  # fingerprint of the trained weights that the scores depend on

    def save(self, path: str | Path) -> Path:
        """Write everything to one ``.safetensors`` file, whole or not at all; ``load_reference`` reads it."""
        about = {"names": self.normals, "digests": sorted(self.digests), "tiles": self.tiles, "parts": self.parts}
        return replace(self.bank, calibration=about | asdict(self.calibration)).save(path)

    @classmethod
    def of(cls, bank: MemoryBank) -> "Reference":
        """From a loaded bank; WeightsError where it was not saved as a reference."""
        about = {name: tuple(v) if isinstance(v, list) else v for name, v in (bank.calibration or {}).items()}
        try:
            names, digests, tiles, parts = (about.pop(name) for name in ("names", "digests", "tiles", "parts"))
            return cls(bank.product, names, bank, Calibration(**about), frozenset(digests), tiles, parts)
        except (KeyError, TypeError) as error:
            raise WeightsError("the memory bank has no calibration: make it with `spgdd memory build`.") from error


def load_reference(model, path: str | Path) -> Reference:
    """See ``spgdd.diagnosis.Diagnoser.load_reference``."""
    reference = Reference.of(model.load_bank(path))
    if reference.parts != (now := fingerprint(model)):
        raise WeightsError(
            f"{path} was calibrated with other trained weights (fingerprint {reference.parts}, loaded {now}): its "
            "threshold does not hold. Make it again with `spgdd memory build`."
        )
    return reference


def build_reference(model, normals, product: str, budget: int | None = None, rotate: bool | None = None,
                    tiles: int | None = None, known: dict[str, ImageFeatures] | None = None) -> Reference:  # fmt: skip
    """See ``spgdd.diagnosis.Diagnoser.reference``. ``known``: features that the same call with other pictures found."""
    known = {} if known is None else known
    budget, rotate, tiles = (
        getattr(model.profile, name) if value is None else value
        for name, value in (("budget", budget), ("rotate", rotate), ("tiles", tiles))
    )
    pictures = read_normals(normals, model.profile.fit, tiles)
    names, views = zip(*pictures.values(), strict=True)
    if new := [one for one in pictures if one not in known]:
        pixels = torch.stack([view for one in new for view in pictures[one][1]])  # (K*V, 3, 224, 224)
        found = encode(model, rotations(pixels) if rotate else pixels)  # of K*V*R rows, picture by picture
        known |= zip(new, map(ImageFeatures, *(part.chunk(len(new)) for part in found)), strict=True)
    features = ImageFeatures(*map(torch.cat, zip(*map(known.get, pictures), strict=True)))
    origin = torch.arange(len(names)).repeat_interleave(len(features.patches) // len(names))
    bank = model.build_bank(features.patches, product, rotate=rotate, budget=budget, origin=origin)

    if len(names) > 1:  # each against the others
        held_out = torch.linspace(0, len(names) - 1, min(len(names), HELD_OUT)).round().long()
        rows = torch.arange(len(origin))[:: 4 if rotate else 1].view(len(names), -1)[held_out].flatten()  # P*V
        maps = view_maps(model, ImageFeatures(*(part[rows] for part in features)), product, bank, origin[rows])
    else:  # altered copies of the only one
        copies = zip(*(altered_copies(view) for view in views[0]), strict=True)
        maps = view_maps(model, encode(model, [view for copy in copies for view in copy]), product, bank)
    maps = maps.reshape(-1, len(views[0]), *maps.shape[1:])  # (P, V, 224, 224)
    scores, square_maps = zip(*(assemble(one, model.profile.score_share) for one in maps), strict=True)
    calibration = Calibration(
        method="leave-one-out" if len(names) > 1 else "augmentations",
        pictures=min(len(names), HELD_OUT),
        scores=scores,
        outlines=tuple(float(np.quantile(square_map, 1 - AREA)) for square_map in square_maps),
        largest=2.0 if model.comparison is None else 1.0,
    )
    return Reference(product, names, bank, calibration, frozenset(pictures), tiles, fingerprint(model))


def read_normals(normals, fit: str, tiles: int) -> dict[str, tuple[str, list[torch.Tensor]]]:
    """Name and views of each different picture, by the digest of its pixels; ImageError where there is none."""
    pictures = {}
    for item in normals if isinstance(normals, (list, tuple)) else [normals]:
        for source in list_images(item) if isinstance(item, (str, Path)) else [item]:
            picture = read_image(source)
            views = Placement(*picture.size, fit, tiles).views(picture)
            pictures.setdefault(digest(views[0]), (image_name(source), views))
    if not pictures:
        raise ImageError("normals is empty: give a normal picture, or None to diagnose without any.")
    return pictures


def encode(model, pixels: Sequence[torch.Tensor]) -> ImageFeatures:
    """Features of uint8 pictures (3, 224, 224), in batches."""
    starts = range(0, len(pixels), BATCH)
    batches = [model.encode(normalise(torch.stack(list(pixels[i : i + BATCH])))) for i in starts]
    return ImageFeatures(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


@torch.no_grad()
def view_maps(model, features: ImageFeatures, product: str, bank: MemoryBank | None, without=None) -> np.ndarray:
    """The model's maps of B views, float32 (B, 224, 224), in batches.

    ``without`` (B,): the number of the normal picture that each view is not compared with.
    """
    maps = []
    for part in torch.arange(len(features.patches)).split(COMPARED):
        some = ImageFeatures(*(values[part] for values in features))
        left_out = None if without is None else without[part]
        maps.append(model.anomaly_map(some, product, bank, left_out)[:, 0].float().cpu())
    return torch.cat(maps).numpy()


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def fingerprint(model) -> str:
    """16 hex digits of the trained weights that maps are made with, the frozen vision tower's apart."""
    total = hashlib.sha256(str(model.profile.score_share).encode())
    for part in (model.memory, model.comparison, model.image_decoder, model.abnormal_prompts):
        for weights in part.parameters() if part is not None else ():
            total.update(weights.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]
