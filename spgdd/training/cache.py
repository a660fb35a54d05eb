"""What the frozen vision tower makes of pictures, on disk: each picture goes through it once.

    cache = FeatureCache("runs/features", model)
    cache.fill(pictures)
    contents = cache.read(pictures[0])

There is one safetensors file a picture, with a checksum and read whole. Its name is a hash of all that its content
depends on, and the folder's of the tower and of how pictures become square. A file gets its name when it is complete:
a run that is killed leaves all that it has finished, and any number of runs and ranks may fill and read one folder.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from spgdd.data.masks import mask_files, read_mask
from spgdd.data.synthesis import DEFAULT, SynthesisSettings, synthesise
from spgdd.errors import DataError
from spgdd.files import require_room
from spgdd.imagebind.preprocess import to_pixels
from spgdd.images import read_image
from spgdd.model import SPGDD
from spgdd.prefetch import prefetched, results
from spgdd.tensors import read_sealed, write_tensors
from spgdd.views import SIZE, Views

BATCH = 32  # pictures that the vision tower takes at once
RECIPE = 3  # number of how pictures become content; another one makes every file anew
MASK_SHARE = 0.1  # a pixel of the square is defective if this share of it is (AnomalyGPT)


@dataclass(frozen=True)
class PictureFile:
    """An image file, or an anomaly made of a normal one."""

    image: Path
    mask: Path | None = None  # None: nothing is marked in it
    source: Path | None = None  # the image that an anomaly's patches are cut from; None: the image is as it is
    settings: SynthesisSettings = DEFAULT  # of the anomaly
    number: int = 0  # of the anomaly: others of the same image and source have other numbers


@dataclass(frozen=True, eq=False)
class Contents:
    """What training takes from a picture file: with features, or with pixels that are still to be encoded."""

    mask: Tensor  # (224, 224) uint8, 0 to 255: how surely a pixel is defective
    defects: list[dict]  # of an anomaly, for spgdd.data.words
    pixels: Tensor | None = None  # (3, 224, 224) uint8
    embedding: Tensor | None = None  # (J,) float32
    patches: Tensor | None = None  # (L, N, D) float16


def decode(picture: PictureFile, fit: str) -> Contents:
    """Pixels with the defects that are marked or made in them. Raises ImageError and DataError that name the file."""
    image = read_image(picture.image)
    pixels, mask, defects = to_pixels(image, fit), np.zeros((SIZE, SIZE), np.uint8), []
    if picture.source:
        there, source = (p.permute(1, 2, 0).numpy() for p in (pixels, to_pixels(read_image(picture.source), fit)))
        made = synthesise(there, source, picture.settings, np.random.default_rng(picture.number))
        pixels, defects = torch.from_numpy(np.ascontiguousarray(made.image)).permute(2, 0, 1), made.defects
        mask = np.rint(255 * made.label).astype(np.uint8)
    elif picture.mask:
        try:
            marks = read_mask(picture.mask, picture.image)
        except DataError as error:
            raise DataError(f"mask {error} Replace it, or take {picture.image} out of the text file.") from error
        mask = np.uint8(255) * (Views(*image.size, fit).to_map(marks) > MASK_SHARE)
    return Contents(torch.from_numpy(mask), defects, pixels)


def encode(model: SPGDD, decoded: Sequence[Contents]) -> list[tuple[Tensor, Tensor]]:
    """Embedding (J,) float32 and patches (L, N, D) float16 of each picture's pixels, on the model's device."""
    seen = model.look([[one.pixels] for one in decoded])
    return [(each.embedding.float(), each.patches[0, 0].half()) for each in seen]


class FeatureCache:
    """Files of ``Contents`` below ``folder``, as this model sees pictures."""

    def __init__(self, folder: str | Path, model: SPGDD):
        self.model, self.fit = model, model.profile.fit
        self.folder = Path(folder) / f"{model.fingerprint}-{self.fit}"
        self._digests: dict[Path, bytes] = {}
        self._read: set[tuple[Path, int, int]] = set()  # files, with size and time, whose checksum was compared

    def path(self, picture: PictureFile) -> Path:
        """The file of a picture, there or not; reads the files that it depends on, once each."""
        masks = mask_files(picture.mask) if picture.mask else [None]
        files = [self._digest(path) if path else b"" for path in (picture.image, *masks, picture.source)]
        how = f"{RECIPE} {picture.settings} {picture.number}" if picture.source else f"{RECIPE}"
        return self.folder / f"{hashlib.sha256(b'|'.join([*files, how.encode()])).hexdigest()}.safetensors"

    def _digest(self, path: Path) -> bytes:
        if path not in self._digests:
            try:
                self._digests[path] = hashlib.sha256(path.read_bytes()).digest()
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror}). Was it moved since the start?") from error
        return self._digests[path]

    def fill(self, pictures: Iterable[PictureFile], rank: int = 0, ranks: int = 1) -> None:
        """Encode what is not there yet.

        Every rank may call it, on one host or many: each begins at its share, goes on with whatever is missing then,
        and returns when all is there. Raises SpgddError where the disk has no room.
        """
        pictures = list(dict.fromkeys(pictures))
        with ThreadPoolExecutor() as pool:
            of = dict(zip(pool.map(self.path, pictures), pictures, strict=True))
            there = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
            missing = [path for path in of if path.name not in there]
            mend = "Choose another folder or fewer variants, or train without a cache."
            config = self.model.imagebind.config
            patches = len(config.taps) * (config.image_size // config.patch) ** 2 * config.vision.width
            require_room(self.folder, len(missing) * (2 * patches + 4 * config.joint + SIZE**2), mend)
            start = len(missing) * rank // ranks
            missing = missing[start:] + missing[:start]
            parts = [missing[first : first + BATCH] for first in range(0, len(missing), BATCH)]
            decoding = ([(path, pool.submit(decode, of[path], self.fit)) for path in part if not path.exists()]
                        for part in parts)  # fmt: skip
            writing = []
            with tqdm(total=len(missing), desc="features", unit="picture", disable=rank > 0 or not missing) as bar:
                for part, decoded in zip(parts, prefetched(decoding), strict=True):
                    if decoded:
                        contents = results(future for _, future in decoded)
                        features = encode(self.model, contents)
                        results(writing)
                        rows = zip(decoded, contents, features, strict=True)
                        writing = [pool.submit(self._write, path, of[path], *row) for (path, _), *row in rows]
                    bar.update(len(part))
            results(writing)

    def _write(self, path: Path, picture: PictureFile, contents: Contents, features: tuple[Tensor, Tensor]) -> None:
        embedding, patches = (tensor.cpu() for tensor in features)
        if not (embedding.isfinite().all() and patches.isfinite().all()):
            raise DataError(f"What the vision tower makes of {picture.image} is not finite. Is the tower damaged?")
        tensors = {"mask": contents.mask, "embedding": embedding, "patches": patches}
        write_tensors(path, tensors, {"defects": json.dumps(contents.defects)})

    def read(self, picture: PictureFile) -> Contents:
        """What ``fill`` has written of the picture. Raises DataError for a file that is not there or damaged."""
        path = self.path(picture)
        try:
            # Not through a memory map, whose pages would be fetched one by one in the one thread that makes batches.
            state = path.stat()
            version = path, state.st_size, state.st_mtime_ns
            tensors, metadata = read_sealed(path, trusted=version in self._read)
            self._read.add(version)
        except FileNotFoundError:
            raise DataError(f"{picture.image} is not in the feature cache {self.folder}: fill it first.") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}). Delete it and start again: it is made anew.") from error
        return Contents(defects=json.loads(metadata["defects"]), **tensors)
