"""What stages 3 and 4 share: the model as far as it is trained, and a mini world to talk about."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from pool import TRAIN_FAMILIES, TRAIN_TYPES
from torch import Tensor
from tqdm import tqdm

from spgdd.imagebind import ImageFeatures
from spgdd.imagebind.preprocess import normalise
from spgdd.loading import load_model
from spgdd.model import SPGDD
from spgdd.profiles import SPGDD_PARTS, Delta, get_profile
from spgdd.tadd import words
from spgdd.tadd.miniworld import TYPES, describe, photograph, possible_types
from spgdd.training.data import Batch
from spgdd.weights.checkpoint import read_tensors
from spgdd.weights.delta import apply_delta

PICTURES, GOOD = 8, 4  # of a product; the good ones come first
AT_ONCE = 32  # products drawn and encoded together


def bare_model(folder: Path, deltas: tuple[Delta, ...] = ()) -> SPGDD:
    """The mini model of a run folder: ImageBind and maps of stage 1, language model of stage 2, given deltas."""
    mini = get_profile("mini")
    files = {
        name: getattr(mini, name).removeprefix("mini/") for name in ("imagebind_file", "text_tokenizer", "language")
    }
    model = load_model(dataclasses.replace(mini, **files, deltas=deltas), folder)
    maps = read_tensors(folder / "maps.safetensors")
    apply_delta(model, {name: value for name, value in maps.items() if name.startswith(SPGDD_PARTS)},
                ("image_decoder.", "memory.", "comparison."))  # fmt: skip
    return model


class World:
    """Products drawn and encoded on the model's device, 0.6 MB a picture; stands in for ``TrainingData``.

    What is said about a picture is made up anew in every epoch by ``talk``. An example gets one of the numbers
    ``shots`` of good pictures, and with the chance ``stray`` the image vector of another one: then maps and tokens are
    all that the answer can rest on.
    """

    cache = None  # there are no files

    def __init__(
        self, model: SPGDD, products: int, seed: int, talk: Callable[[dict, random.Random], list[dict]],
        shots: Sequence[int] = (0,), stray: float = 0.0, families: Sequence[str] = TRAIN_FAMILIES,
    ):  # fmt: skip
        self.talk, self.shots, self.stray, self.seed, self.known = talk, shots, stray, seed, []
        rng, parts = random.Random(f"world {seed}"), []
        turns = [families[number % len(families)] for number in range(products)]
        with tqdm(total=products * PICTURES, desc="world", unit="picture") as bar:
            for family in families:
                kinds = [i for i in possible_types(family) if TYPES[i] in TRAIN_TYPES]
                for left in range(turns.count(family), 0, -AT_ONCE):
                    parts.append(self._draw(model, family, min(left, AT_ONCE), kinds, rng))
                    bar.update(PICTURES * min(left, AT_ONCE))
        self.embedding, self.patches, self.masks = map(torch.cat, zip(*parts, strict=True))

    @torch.no_grad()
    def _draw(self, model: SPGDD, family: str, count: int, kinds: list[int], rng: random.Random) -> list[Tensor]:
        """Embeddings, patches (B, L, N, D) float16 and masks (B, 224, 224) of ``count`` products."""
        wanted = [kind for _ in range(count) for kind in (*[-1] * GOOD, *rng.choices(kinds, k=PICTURES - GOOD))]
        products, photos = ([rng.randrange(2**31) for _ in range(n)] for n in (count, count * PICTURES))
        products, photos, wanted = (torch.tensor(values, device=model.device) for values in (products, photos, wanted))
        shots = photograph(family, products.repeat_interleave(PICTURES), photos, wanted)
        means = shots.images.float().mean((2, 3)).tolist()  # red, green and blue, 0 to 255
        for number, (found, colours) in enumerate(zip(describe(family, "", shots), means, strict=True)):
            if number % PICTURES == 0:
                name = rng.choice(words.names_of({"product": family.replace("_", " "), "family": family}))
            self.known.append(found | {"product": name, "colours": colours})
        features = [model.encode(normalise(part)) for part in shots.images.split(64)]
        embedding, patches = map(torch.cat, zip(*features, strict=True))
        return [embedding.float(), patches.half(), shots.masks.any(1)]

    def features(self, rows: Sequence[int]) -> ImageFeatures:
        return ImageFeatures(self.embedding[rows], self.patches[rows].float())

    def __len__(self) -> int:
        return len(self.known)

    def order(self, epoch: int, seed: int, batch: int) -> list[list[int]]:
        rows = random.Random(f"order {seed} {epoch}").sample(range(len(self)), len(self))
        return [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]

    def batches(self, plan: Iterable[Sequence[int]], epoch: int) -> Iterator[Batch]:
        for rows in plan:
            talks, normals, seen = [], [], []
            for row in rows:
                rng = random.Random(f"{self.seed} {epoch} {row}")
                talks.append(self.talk(self.known[row], rng))
                first = row - row % PICTURES
                others = [other for other in range(first, first + GOOD) if other != row]
                chosen = rng.sample(others, min(rng.choice(self.shots), len(others)))
                normals.append(self.patches[chosen] if chosen else None)
                seen.append(rng.randrange(len(self)) if rng.random() < self.stray else row)
            products = [self.known[row]["product"] for row in rows]
            features = ImageFeatures(self.embedding[seen], self.patches[rows])
            keys, normals = [f"picture {row}" for row in rows], normals if any(self.shots) else None
            yield Batch(keys, features, products, talks, self.masks[rows].float(), normals)
