"""What stages 3 and 4 share: the model as far as it is trained, and a mini world to talk about."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from pool import TRAIN_FAMILIES, TRAIN_TYPES
from torch import Tensor
from tqdm import tqdm

from spgdd.diagnosis import prompt_map
from spgdd.geometry import assemble
from spgdd.imagebind import ImageFeatures
from spgdd.imagebind.preprocess import normalise
from spgdd.loading import load_model
from spgdd.model import SPGDD
from spgdd.profiles import SPGDD_PARTS, Delta, get_profile
from spgdd.reference import encode, view_maps
from spgdd.tadd import words
from spgdd.tadd.miniworld import TYPES, describe, photograph, possible_types
from spgdd.tadd.miniworld.world import Photographs
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

    What is said about a picture is made up anew in every epoch by ``talk``.
    """

    cache = None  # there are no files

    def __init__(self, model: SPGDD, products: int, seed: int, talk: Callable[[dict, random.Random], list[dict]]):
        self.talk, self.seed, self.known = talk, seed, []
        rng, parts = random.Random(f"world {seed}"), []
        turns = [TRAIN_FAMILIES[number % len(TRAIN_FAMILIES)] for number in range(products)]
        with tqdm(total=products * PICTURES, desc="world", unit="picture") as bar:
            for family in TRAIN_FAMILIES:
                kinds = [i for i in possible_types(family) if TYPES[i] in TRAIN_TYPES]
                for left in range(turns.count(family), 0, -AT_ONCE):
                    shots = self._draw(model, family, min(left, AT_ONCE), kinds, rng)
                    parts.append(self._look(model, shots, rng))
                    bar.update(PICTURES * min(left, AT_ONCE))
        self.embedding, self.patches, *self.more = map(torch.cat, zip(*parts, strict=True))

    @torch.no_grad()
    def _draw(self, model: SPGDD, family: str, count: int, kinds: list[int], rng: random.Random) -> Photographs:
        wanted = [kind for _ in range(count) for kind in (*[-1] * GOOD, *rng.choices(kinds, k=PICTURES - GOOD))]
        products, photos = ([rng.randrange(2**31) for _ in range(n)] for n in (count, count * PICTURES))
        products, photos, wanted = (torch.tensor(values, device=model.device) for values in (products, photos, wanted))
        shots = photograph(family, products.repeat_interleave(PICTURES), photos, wanted)
        means = shots.images.float().mean((2, 3)).tolist()  # red, green and blue, 0 to 255
        for number, (found, colours) in enumerate(zip(describe(family, "", shots), means, strict=True)):
            if number % PICTURES == 0:
                name = rng.choice(words.names_of({"product": family.replace("_", " "), "family": family}))
            self.known.append(found | {"product": name, "colours": colours})
        return shots

    @torch.no_grad()
    def _look(self, model: SPGDD, shots: Photographs, rng: random.Random) -> list[Tensor]:
        """What is kept of the last pictures: embeddings (B, J) and patches (B, L, N, D) float16."""
        features = [model.encode(normalise(part)) for part in shots.images.split(64)]
        embedding, patches = map(torch.cat, zip(*features, strict=True))
        return [embedding.float(), patches.half()]

    def __len__(self) -> int:
        return len(self.known)

    def order(self, epoch: int, seed: int, batch: int) -> list[list[int]]:
        rows = random.Random(f"order {seed} {epoch}").sample(range(len(self)), len(self))
        return [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]

    def batches(self, plan: Iterable[Sequence[int]], epoch: int) -> Iterator[Batch]:
        for rows in plan:
            yield self._batch(rows, [random.Random(f"{self.seed} {epoch} {row}") for row in rows])

    def _batch(self, rows: Sequence[int], rngs: Sequence[random.Random]) -> Batch:
        talks = [self.talk(self.known[row], rng) for row, rng in zip(rows, rngs, strict=True)]
        products = [self.known[row]["product"] for row in rows]
        features = ImageFeatures(self.embedding[rows], self.patches[rows])
        return Batch([f"picture {row}" for row in rows], features, products, talks, None, None)


class Diagnosed(World):
    """A world whose pictures have been diagnosed: with their scores, and in place of masks the maps that are shown.

    Each picture is compared once and for all with one of the numbers ``shots`` of good pictures. A batch has pictures
    of one such number, and of their good pictures what the memory tokens are made of: the last tap's entries (M, D).
    With the chance ``stray`` an example gets the image vector of another one: then maps and tokens are all that the
    answer can rest on.
    """

    def __init__(self, *args, shots: Sequence[int], stray: float = 0.0):
        self.shots, self.stray = shots, stray
        self.chosen, self.entries, self.scores = [], [], []
        super().__init__(*args)
        self.entries = torch.cat(self.entries)

    @torch.no_grad()
    def _look(self, model: SPGDD, shots: Photographs, rng: random.Random) -> list[Tensor]:
        """As of any world, and the maps (B, 224, 224) float16."""
        first = len(self.known) - len(shots.images)
        size = model.profile.joint * shots.images.shape[-1]
        large = F.interpolate(shots.images.float(), size=(size, size), mode="bicubic", align_corners=False)
        large = large.round_().clamp_(0, 255).byte()
        embedding, patches = encode(model, list(zip(shots.images, large, strict=True)))
        views = len(patches) // len(large)
        embedding, patches = (part.unflatten(0, (-1, views)) for part in (embedding, patches))  # (B, V, ...)
        corner_maps = []
        for row, own in enumerate(zip(embedding, patches, strict=True)):
            others = [r for r in range(row - row % PICTURES, row - row % PICTURES + GOOD) if r != row]
            chosen = rng.sample(others, rng.choice(self.shots))
            self.chosen.append([first + other for other in chosen])
            name, bank = self.known[first + row]["product"], None
            if chosen:
                origin = torch.arange(len(chosen)).repeat_interleave(views)
                bank = model.build_bank(patches[chosen].flatten(0, 1), name, origin=origin)
            corner_maps.append(view_maps(model, ImageFeatures(*own), name, bank))  # (V, 224, 224)
        with ThreadPoolExecutor() as pool:
            found = [*pool.map(partial(assemble, share=model.profile.score_share, joint=True), corner_maps)]
        scores, square_maps = zip(*found, strict=True)
        self.scores += scores
        self.entries.append(patches[:, :, -1].flatten(1, 2).half())  # (B, V*N, D)
        shown = torch.cat([*map(prompt_map, corner_maps, square_maps)])[:, 0]
        return [embedding[:, 0].float(), patches[:, 0].half(), shown.to(embedding.device).half()]

    def order(self, epoch: int, seed: int, batch: int) -> list[list[int]]:
        rng, plan = random.Random(f"order {seed} {epoch}"), []
        for count in sorted(set(self.shots)):
            rows = [row for row in range(len(self)) if len(self.chosen[row]) == count]
            rng.shuffle(rows)
            plan += [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]
        rng.shuffle(plan)
        return plan

    def _batch(self, rows: Sequence[int], rngs: Sequence[random.Random]) -> Batch:
        batch, maps = super()._batch(rows, rngs), self.more[0]
        seen = [rng.randrange(len(self)) if rng.random() < self.stray else row
                for row, rng in zip(rows, rngs, strict=True)]  # fmt: skip
        features = batch.features._replace(embedding=self.embedding[seen])
        normals = [self.entries[self.chosen[row]].flatten(0, 1) if self.chosen[row] else None for row in rows]
        return dataclasses.replace(batch, features=features, masks=maps[rows].float(), normals=normals)
