"""Normal pictures of one product, encoded once: how they look, and which scores a normal picture gets."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isqrt
from pathlib import Path

import numpy as np
import torch

from spgdd.calibration import AREA, Calibration, altered_copies
from spgdd.errors import ImageError, WeightsError
from spgdd.imagebind import ImageFeatures
from spgdd.imagebind.preprocess import normalise
from spgdd.images import image_name, list_images, read_image
from spgdd.selfprompt.memory import MemoryBank, rotations
from spgdd.views import SIZE, Placement, assemble

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
    pictures = read_normals(normals, model.profile, tiles)
    names, views = zip(*pictures.values(), strict=True)
    if new := [one for one in pictures if one not in known]:
        found = encode(model, [pictures[one][1] for one in new], rotate)  # of K*R*V rows, picture by picture
        known |= zip(new, map(ImageFeatures, *(part.chunk(len(new)) for part in found)), strict=True)
    features = ImageFeatures(*map(torch.cat, zip(*map(known.get, pictures), strict=True)))
    origin = torch.arange(len(names)).repeat_interleave(len(features.patches) // len(names))
    bank = model.build_bank(features.patches, product, rotate=rotate, budget=budget, origin=origin)
    count = len(origin) // len(names) // (4 if rotate else 1)  # V

    if len(names) > 1:  # each against the others
        held_out = torch.linspace(0, len(names) - 1, min(len(names), HELD_OUT)).round().long()
        rows = torch.arange(len(origin)).view(len(names), -1)[held_out, :count].flatten()  # P*V, not turned
        maps = view_maps(model, ImageFeatures(*(part[rows] for part in features)), product, bank, origin[rows])
    else:  # altered copies of the only one
        copies = zip(*(altered_copies(view) for view in views[0]), strict=True)
        maps = view_maps(model, encode(model, list(copies)), product, bank)
    maps = maps.reshape(-1, count, *maps.shape[1:])  # (P, V, 224, 224)
    joint = len(views[0]) < count
    scores, square_maps = zip(*(assemble(one, model.profile.score_share, joint) for one in maps), strict=True)
    calibration = Calibration(
        method="leave-one-out" if len(names) > 1 else "augmentations",
        pictures=min(len(names), HELD_OUT),
        scores=scores,
        outlines=tuple(float(np.quantile(square_map, 1 - AREA)) for square_map in square_maps),
        largest=2.0 if model.comparison is None else 1.0,
    )
    return Reference(product, names, bank, calibration, frozenset(pictures), tiles, fingerprint(model))


def read_normals(normals, profile, tiles: int) -> dict[str, tuple[str, list[torch.Tensor]]]:
    """Name and views of each different picture, by the digest of its pixels; ImageError where there is none."""
    pictures = {}
    for item in normals if isinstance(normals, (list, tuple)) else [normals]:
        for source in list_images(item) if isinstance(item, (str, Path)) else [item]:
            picture = read_image(source)
            views = Placement.of(picture, profile, tiles).views(picture)
            pictures.setdefault(digest(views[0]), (image_name(source), views))
    if not pictures:
        raise ImageError("normals is empty: give a normal picture, or None to diagnose without any.")
    return pictures


def encode(model, pictures: Sequence[Sequence[torch.Tensor]], rotate: bool = False) -> ImageFeatures:
    """Features of B pictures' ``Placement.views``, V squares and tiles of each: B*V rows, picture by picture.

    With ``rotate`` B*4*V rows: of a picture, then of the picture turned. Joint tiles are encoded as the large square
    that they are parts of, and each gets the patches of its part.
    """
    embeddings, patches = [], []
    for size in dict.fromkeys(view.shape[-1] for view in pictures[0]):
        images = torch.stack([view for picture in pictures for view in picture if view.shape[-1] == size])
        images, turns = (rotations(images), 4) if rotate else (images, 1)
        batches = [model.encode(normalise(some)) for some in images.split(max(1, BATCH * SIZE**2 // size**2))]
        embedding, tokens = map(torch.cat, zip(*batches, strict=True))
        tiles = (size // SIZE) ** 2
        tokens = in_tiles(tokens, size // SIZE)  # (B*v*R, tiles, L, N, D)
        rows = len(pictures), -1, turns  # B, v, R
        patches.append(tokens.unflatten(0, rows).transpose(1, 2).flatten(2, 3).flatten(0, 1))  # (B*R, v*tiles, L, N, D)
        embedding = embedding[:, None].expand(-1, tiles, -1)
        embeddings.append(embedding.unflatten(0, rows).transpose(1, 2).flatten(2, 3).flatten(0, 1))
    return ImageFeatures(torch.cat(embeddings, 1).flatten(0, 1), torch.cat(patches, 1).flatten(0, 1))


def in_tiles(patches: torch.Tensor, side: int) -> torch.Tensor:
    """Patch tokens of large squares (B, L, N, D), row by row -> of the side x side tiles, (B, side**2, L, n, D)."""
    grid = isqrt(patches.shape[2]) // side
    tiles = patches.unflatten(2, (side, grid, side, grid))  # (B, L, side, G, side, G, D)
    return tiles.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)


def as_told(features: ImageFeatures, views: int, joint: bool) -> ImageFeatures:
    """What the language model is told about, of the B*V rows that ``encode`` makes of B pictures.

    The embedding of the whole picture (B, J), and its patches (B, L, N, D): with joint tiles those of the large square,
    which show better what kind of defect it is.
    """
    embedding, patches = (part.unflatten(0, (-1, views)) for part in features)
    if not joint:
        return ImageFeatures(embedding[:, 0], patches[:, 0])
    side, grid = isqrt(views - 1), isqrt(patches.shape[3])
    tiles = patches[:, 1:].unflatten(3, (grid, grid)).unflatten(1, (side, side))  # (B, side, side, L, G, G, D)
    return ImageFeatures(embedding[:, 0], tiles.permute(0, 3, 1, 4, 2, 5, 6).flatten(2, 5))


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
    total = hashlib.sha256(f"{model.profile.score_share} {model.profile.joint}".encode())
    for part in (model.memory, model.comparison, model.image_decoder, model.abnormal_prompts):
        for weights in part.parameters() if part is not None else ():
            total.update(weights.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]
