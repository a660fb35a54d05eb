"""Normal pictures of one product, encoded once: how they look, and which scores a normal picture gets."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from spgdd.calibration import AREA, Calibration, altered_copies
from spgdd.errors import ImageError, SpgddError, WeightsError
from spgdd.images import image_name, list_images, read_image
from spgdd.model import SPGDD, Seen
from spgdd.ranges import check_ranges
from spgdd.selfprompt import MemoryBank
from spgdd.tensors import read_sealed, write_tensors
from spgdd.views import Views
from spgdd.whole import Whole

FORMAT = "spgdd-memory-4"
HELD_OUT = 64  # at most so many normal pictures are scored against the others
AGAIN = "Make it again from the normal pictures: `spgdd memory build`."


@dataclass(frozen=True, eq=False)
class Reference:
    """Normal pictures of one product, for any number of diagnoses."""

    product: str
    normals: tuple[str, ...]  # names
    bank: MemoryBank = field(repr=False)
    calibration: Calibration = field(repr=False)
    whole: Whole = field(repr=False)  # what they look like as whole pictures
    digests: frozenset[str] = field(repr=False)  # of the pixels: a query can be one of the normals
    levels: tuple[float, float] | None  # of deep grey, see ``read_image``; None: the normal pictures are no such ones
    tiles: int  # a picture is seen whole and in tiles x tiles parts; 1: only whole
    profile: str  # of the model that made it
    vision: str = field(repr=False)  # fingerprint of the vision tower that made the entries
    trained: str = field(repr=False)  # fingerprint of the trained weights that the scores depend on

    @cached_property
    def groups(self) -> int:
        """Into how many groups the normal pictures fall that look unlike each other."""
        return self.whole.groups()

    def save(self, path: str | Path) -> Path:
        """Write everything to one ``.safetensors`` file, whole or not at all; ``load_reference`` reads it."""
        bank = self.bank
        about = {"product": self.product, "normals": self.normals, "digests": sorted(self.digests), "tiles": self.tiles,
                 "levels": self.levels,
                 "profile": self.profile, "vision": self.vision, "trained": self.trained, "rotate": bank.rotate,
                 "scales": bank.scales, "pictures": bank.normals, "calibration": asdict(self.calibration)}  # fmt: skip
        tensors = {"tokens": bank.tokens, "origin": bank.origin, "light": self.whole.light, "look": self.whole.look}
        write_tensors(path, tensors, {"format": FORMAT, "about": json.dumps(about)})
        return Path(path)


def read_reference(path: str | Path) -> Reference:
    """What ``Reference.save`` wrote, for whatever model. Raises WeightsError for any other file."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no memory file {path}. `spgdd memory build` makes one from normal pictures.")
    try:
        tensors, metadata = read_sealed(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged, of an earlier version, or no memory file ({error}). {AGAIN}") from error
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r}. {AGAIN}")
    try:
        about = json.loads(metadata["about"])
        bank = _checked_bank(tensors["tokens"], tensors["origin"], about)
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in about.pop("calibration").items()}
        names, digests = about.pop("normals"), about.pop("digests")
        texts = [*names, *digests, *(about[name] for name in ("product", "profile", "vision", "trained"))]
        if not all(isinstance(text, str) for text in texts) or len(names) != bank.normals:
            raise ValueError(f"{len(names)} names of {bank.normals} pictures")
        check_ranges(tiles=about["tiles"] or 0)
        levels = about.pop("levels")
        if levels is not None and not (len(levels) == 2 and -1e38 < levels[0] <= levels[1] < 1e38):
            raise ValueError(f"levels {levels!r}")
        whole = Whole(tensors["light"], tensors["look"])
        if whole.light.shape != (len(names), 4) or whole.look.shape != (len(names), bank.tokens.shape[3]):
            raise ValueError(f"{tuple(whole.light.shape)} and {tuple(whole.look.shape)} measures of whole pictures")
        if not all(part.dtype == torch.float32 and part.isfinite().all() for part in whole):
            raise ValueError("measures of whole pictures that are not finite")
        return Reference(levels=levels and tuple(levels), normals=tuple(names), digests=frozenset(digests), bank=bank,
                         whole=whole, calibration=Calibration(**values), **about)  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError, SpgddError) as error:
        raise WeightsError(f"{path} does not hold what a memory file holds ({error}). {AGAIN}") from error


def _checked_bank(tokens: Tensor, origin: Tensor, about: dict) -> MemoryBank:
    """The bank of a file. Raises ValueError for tensors and numbers that no bank has."""
    scales, pictures, rotate = tuple(about.pop("scales")), about.pop("pictures"), about.pop("rotate")
    if type(pictures) is not int or type(rotate) is not bool or not all(type(scale) is int for scale in scales):
        raise ValueError(f"pictures {pictures!r}, scales {scales!r}, rotate {rotate!r}")
    if tokens.dim() != 4 or origin.shape != tokens.shape[:3] or tokens.shape[1] != len(scales) or not origin.numel():
        raise ValueError(f"entries {tuple(tokens.shape)} of {tuple(origin.shape)} at {len(scales)} scales")
    if not tokens.is_floating_point() or not tokens.isfinite().all():
        raise ValueError("entries that are not finite")
    if origin.dtype != torch.int32 or not 0 <= int(origin.min()) <= int(origin.max()) < pictures:
        raise ValueError(f"entries of other than {pictures} pictures")
    return MemoryBank(tokens, origin, scales, pictures, rotate)


def load_reference(model: SPGDD, path: str | Path) -> Reference:
    """See ``spgdd.diagnosis.Diagnoser.load_reference``."""
    reference = read_reference(path)
    made = {"profile": reference.profile, "vision tower": reference.vision, "training": reference.trained}
    here = {"profile": model.profile.name, "vision tower": model.fingerprint, "training": fingerprint(model)}
    for name, value in made.items():
        if value != here[name]:
            raise WeightsError(f"{path} was made with another {name} ({value}, loaded {here[name]}). {AGAIN}")
    model.memory.require_fit(reference.bank)
    return reference


def build_reference(
    model: SPGDD, normals, product: str, budget: int | None = None, rotate: bool | None = None,
    tiles: int | None = None, known: dict[str, Seen] | None = None,
) -> Reference:  # fmt: skip
    """See ``spgdd.diagnosis.Diagnoser.reference``; ``normals`` may also be read already.

    ``known``: what the same call with other pictures has seen.
    """
    known, profile = {} if known is None else known, model.profile
    budget, rotate, tiles = (
        getattr(profile, name) if value is None else value
        for name, value in (("budget", budget), ("rotate", rotate), ("tiles", tiles))
    )
    pictures, levels = normals if isinstance(normals, Normals) else read_normals(normals, profile, tiles)
    if new := [digest for digest in pictures if digest not in known]:
        known |= zip(new, model.look([pictures[digest][2] for digest in new], rotate), strict=True)
    names, views, pixels = zip(*pictures.values(), strict=True)
    wholes = [Whole.of(pixels[i][0], known[digest]) for i, digest in enumerate(pictures)]
    whole = Whole(*map(torch.cat, zip(*wholes, strict=True)))
    patches = torch.stack([known[digest].patches for digest in pictures])  # (K, R, V, L, N, D)
    origin = torch.arange(len(names)).repeat_interleave(patches.shape[1] * patches.shape[2])
    bank = model.memory.build(patches.flatten(0, 2), rotate, budget, origin)

    if len(names) > 1:  # each against the others, not turned
        scored = torch.linspace(0, len(names) - 1, min(len(names), HELD_OUT)).round().long()
        views, patches, without = [views[i] for i in scored], patches[scored, 0], scored
    else:  # altered copies of the only one
        copies = model.look(list(zip(*map(altered_copies, pixels[0]), strict=True)))
        views, patches, without = views * len(copies), torch.stack([one.patches[0] for one in copies]), None
    count = patches.shape[1]  # V; of P pictures patches (P, V, L, N, D)
    without = None if without is None else without.repeat_interleave(count)
    evidence = model.evidence(patches.flatten(0, 1), product, bank, without)
    joined = [
        one.join(evidence[i * count : (i + 1) * count], profile.score_share) for i, one in enumerate(views)
    ]
    calibration = Calibration(
        method="leave-one-out" if len(names) > 1 else "augmentations",
        pictures=min(len(names), HELD_OUT),
        scores=tuple(one.score for one in joined),
        outlines=tuple(float(np.quantile(one.square_map.cpu().numpy(), 1 - AREA)) for one in joined),
        largest=2.0 if model.comparison is None else 1.0,
        measured=profile.measured,
    )
    made_by = profile.name, model.fingerprint, fingerprint(model)
    return Reference(product, names, bank, calibration, whole, frozenset(pictures), levels, tiles, *made_by)


class Normals(NamedTuple):
    """Normal pictures as they were read."""

    pictures: dict[str, tuple[str, Views, list[Tensor]]]  # name, views and their pixels, by the first pixels' digest
    levels: tuple[float, float] | None  # of deep grey, one range for all


def read_normals(normals, profile, tiles: int, unreadable: list[ImageError] | None = None) -> Normals:
    """Each different picture once. Raises ImageError where there is none, and for one that cannot be read.

    With a list of the ``unreadable`` ones, which takes their errors, ``normals`` are files and pictures, no folders.
    """
    sources, found, pictures, levels = [], [], {}, None

    def read(source, levels=None) -> tuple:
        picture = read_image(source, levels)
        views = Views.of(picture, profile, tiles)
        return image_name(source), views, views.pixels(picture), picture.info["levels"]

    for item in normals if isinstance(normals, (list, tuple)) else [normals]:
        sources += list_images(item) if isinstance(item, (str, Path)) and unreadable is None else [item]
    if not sources:
        raise ImageError("normals is empty: give a normal picture, or None to diagnose without any.")
    for source in sources:
        try:
            found.append((source, *read(source)))
        except ImageError as error:
            if unreadable is None:
                raise
            unreadable.append(error)
    if own := [one[-1] for one in found if one[-1]]:  # one range for all of them, and for what is compared with them
        levels = min(low for low, _ in own), max(high for _, high in own)
        found = [one if one[-1] in (None, levels) else (one[0], *read(one[0], levels)) for one in found]
    for _, name, views, pixels, _ in found:
        pictures.setdefault(pixel_digest(pixels[0]), (name, views, pixels))
    return Normals(pictures, levels)


def pixel_digest(pixels: Tensor) -> str:
    """SHA-256 of a picture's pixels."""
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def fingerprint(model: SPGDD) -> str:
    """16 hex digits of the trained weights that maps are made with, the frozen vision tower's apart.

    It takes as long as a diagnosis of several pictures, so it is kept until one of the weights is written to.
    """
    parts = (model.memory, model.comparison, model.image_decoder, model.abnormal_prompts)
    weights = [weights for part in parts if part is not None for weights in part.parameters()]
    state = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in weights]
    if _fingerprints.get(model, ([], None))[1] != state:
        total = hashlib.sha256(f"{model.profile.score_share} {model.profile.joint}".encode())
        for tensor in weights:
            total.update(tensor.detach().float().cpu().numpy().tobytes())
        _fingerprints[model] = weights, state, total.hexdigest()[:16]  # kept, lest others get their ids
    return _fingerprints[model][2]


_fingerprints: WeakKeyDictionary[SPGDD, tuple[list, list, str]] = WeakKeyDictionary()
