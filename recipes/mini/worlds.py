"""What stages 3 and 4 share: the model as far as it is trained, and a mini world to talk about."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from miniworld import TYPES, ground_truth, photograph, possible_types
from miniworld.world import Photographs
from pool import TRAIN_FAMILIES, TRAIN_TYPES
from spgdd.data import words
from spgdd.imagebind import ImageFeatures
from spgdd.imagebind.preprocess import normalise
from spgdd.loading import load_model
from spgdd.model import SPGDD, Seen
from spgdd.places import PLACES
from spgdd.profiles import SPGDD_PARTS, Delta, get_profile
from spgdd.tensors import read_tensors
from spgdd.training.data import Batch
from spgdd.views import SIZE, Views
from spgdd.weights.delta import apply_delta

PICTURES, GOOD = 9, 5  # of a product; the good ones come first
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
    """Products drawn and encoded on the model's device, 0.5 MB a picture; stands in for ``TrainingData``.

    What is said about a picture is made up anew in every epoch by ``conversation``.
    """

    cache = None  # there are no files

    def __init__(
        self, model: SPGDD, products: int, seed: int, conversation: Callable[[dict, random.Random], list[dict]]
    ):
        self.conversation, self.seed, self.known, self.features = conversation, seed, [], []
        rng = random.Random(f"world {seed}")
        turns = [TRAIN_FAMILIES[number % len(TRAIN_FAMILIES)] for number in range(products)]
        with tqdm(total=products * PICTURES, desc="world", unit="picture") as bar:
            for family in TRAIN_FAMILIES:
                kinds = [i for i in possible_types(family) if TYPES[i] in TRAIN_TYPES]
                for left in range(turns.count(family), 0, -AT_ONCE):
                    shots = self._draw(model, family, min(left, AT_ONCE), kinds, rng)
                    self.features += self._look(model, shots, rng)
                    bar.update(PICTURES * min(left, AT_ONCE))

    @torch.no_grad()
    def _draw(self, model: SPGDD, family: str, count: int, kinds: list[int], rng: random.Random) -> Photographs:
        wanted = [kind for _ in range(count) for kind in (*[-1] * GOOD, *rng.choices(kinds, k=PICTURES - GOOD))]
        products, photos = ([rng.randrange(2**31) for _ in range(n)] for n in (count, count * PICTURES))
        products, photos, wanted = (torch.tensor(values, device=model.device) for values in (products, photos, wanted))
        shots = photograph(family, products.repeat_interleave(PICTURES), photos, wanted)
        means = shots.images.float().mean((2, 3)).tolist()  # red, green and blue, 0 to 255
        for number, (found, colours) in enumerate(zip(ground_truth(family, "", shots), means, strict=True)):
            if number % PICTURES == 0:
                name = rng.choice(words.names_of({"product": family.replace("_", " "), "family": family}))
            self.known.append(found | {"product": name, "colours": colours})
        return shots

    @torch.no_grad()
    def _look(self, model: SPGDD, shots: Photographs, rng: random.Random) -> list[ImageFeatures]:
        """What is kept of each of the last pictures: its embedding (J,) and patches (L, N, D) float16."""
        seen = []
        for part in shots.images.split(64):
            embedding, patches = model.imagebind.encode_image(normalise(part))
            seen += map(ImageFeatures, embedding.float(), patches.half())
        return seen

    def __len__(self) -> int:
        return len(self.known)

    def order(self, epoch: int, seed: int, batch: int) -> list[list[int]]:
        rows = random.Random(f"order {seed} {epoch}").sample(range(len(self)), len(self))
        return [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]

    def batches(self, plan: Iterable[Sequence[int]], epoch: int) -> Iterator[Batch]:
        for rows in plan:
            yield self._batch(rows, [random.Random(f"{self.seed} {epoch} {row}") for row in rows])

    def _batch(self, rows: Sequence[int], rngs: Sequence[random.Random]) -> Batch:
        conversations = [self.conversation(self.known[row], rng) for row, rng in zip(rows, rngs, strict=True)]
        return self._joined(rows, conversations)

    def _joined(self, rows: Sequence[int], conversations: list[list[dict]]) -> Batch:
        products = [self.known[row]["product"] for row in rows]
        features = ImageFeatures(*map(torch.stack, zip(*(self.features[row] for row in rows), strict=True)))
        return Batch([f"picture {row}" for row in rows], features, products, conversations, None, None)


class Diagnosed(World):
    """A world whose pictures have been diagnosed: with their scores, and in place of masks the maps that are shown.

    With the chance ``tiled`` a product is seen in joint tiles too. Each picture is compared once and for all with one
    of the numbers ``shots`` of good pictures. A batch has pictures of one such number that were seen alike, and of
    their good pictures what the memory tokens are made of: the last tap's entries (M, D). Good and defective pictures
    come equally often, and mirrored at random.

    With the chance ``foreign_vector`` an example gets the image vector of another one. With the chance
    ``foreign_patches`` its focus and memory tokens are made of another one's of the batch, at the places that its own
    map points at; ``conversation``, which then says what the map alone decides, is told so.
    """

    def __init__(
        self, *args, shots: Sequence[int], tiled: float = 1.0, foreign_vector: float = 0.0,
        foreign_patches: float = 0.0,
    ):  # fmt: skip
        self.shots, self.tiled = shots, tiled
        self.foreign_vector, self.foreign_patches = foreign_vector, foreign_patches
        self.chosen, self.entries, self.scores, self.maps = [], [], [], []
        super().__init__(*args)

    @torch.no_grad()
    def _look(self, model: SPGDD, shots: Photographs, rng: random.Random) -> list[ImageFeatures]:
        """As of any world; the maps (224, 224) and entries (M, D) are float16 too."""
        first = len(self.known) - len(shots.images)
        size = model.profile.joint * shots.images.shape[-1]
        large = F.interpolate(shots.images.float(), size=(size, size), mode="bicubic", align_corners=False)
        large = large.round_().clamp_(0, 255).byte()
        seen = model.look(list(zip(shots.images, large, strict=True)))
        tiled = [rng.random() < self.tiled for _ in range(len(large) // PICTURES)]
        kept = []
        for row, (embedding, patches, _) in enumerate(seen):
            side = model.profile.joint if tiled[row // PICTURES] else 1
            views = Views(SIZE, SIZE, "squash", side, side > 1)
            others = [r for r in range(row - row % PICTURES, row - row % PICTURES + GOOD) if r != row]
            chosen = rng.sample(others, rng.choice(self.shots))
            self.chosen.append([first + other for other in chosen])
            bank = None
            if chosen:
                origin = torch.arange(len(chosen)).repeat_interleave(views.count)
                good = torch.cat([seen[other].patches[0, : views.count] for other in chosen])
                bank = model.memory.build(good, origin=origin)
            own = Seen(embedding, patches[:, : views.count], views.joint)
            evidence = model.evidence(own.patches[0], self.known[first + row]["product"], bank)
            score, _, prompt_map = views.join(evidence, model.profile.score_share)
            self.scores.append(score)
            self.maps.append(prompt_map[0, 0].half())
            kept.append(ImageFeatures(embedding.float(), own.told.half()))
            self.entries.append(own.patches[0, :, -1].flatten(0, 1).half())  # (V*N, D)
        return kept

    def order(self, epoch: int, seed: int, batch: int) -> list[list[int]]:
        rng, plan, alike = random.Random(f"order {seed} {epoch}"), [], {}
        for row, known in enumerate(self.known):
            key = len(self.chosen[row]), self.features[row].patches.shape
            alike.setdefault(key, ([], []))[bool(known["defects"])].append(row)
        for good, bad in alike.values():  # as many of both: every epoch has the same number of batches
            few = min(len(good), len(bad))
            rows = rng.sample(good, few) + rng.sample(bad, few)
            rng.shuffle(rows)
            plan += [rows[i : i + batch] for i in range(0, len(rows) - batch + 1, batch)]
        rng.shuffle(plan)
        return plan

    def _batch(self, rows: Sequence[int], rngs: Sequence[random.Random]) -> Batch:
        axes = [[axis for axis in (-1, -2) if rng.random() < 0.5] for rng in rngs]
        vectors_of = [rng.randrange(len(self)) if rng.random() < self.foreign_vector else row
                      for row, rng in zip(rows, rngs, strict=True)]  # fmt: skip
        patches_of = [rng.choice(rows) if rng.random() < self.foreign_patches else row
                      for row, rng in zip(rows, rngs, strict=True)]  # fmt: skip
        conversations = [self.conversation(mirrored(self.known[row], *a), rng, row != other)
                         for row, other, a, rng in zip(rows, patches_of, axes, rngs, strict=True)]  # fmt: skip
        batch = self._joined(rows, conversations)
        patches = torch.stack([self.features[row].patches for row in patches_of]).mT  # (B, L, D, N)
        patches = patches.unflatten(-1, (isqrt(patches.shape[-1]), -1))
        patches = torch.stack([one.flip(a) for one, a in zip(patches, axes, strict=True)]).flatten(-2).mT
        features = ImageFeatures(torch.stack([self.features[row].embedding for row in vectors_of]), patches)
        normals = [torch.cat([self.entries[other] for other in self.chosen[row]]) if self.chosen[row] else None
                   for row in patches_of]  # fmt: skip
        maps = torch.stack([self.maps[row].flip(a) for row, a in zip(rows, axes, strict=True)]).float()
        return dataclasses.replace(batch, features=features, masks=maps, normals=normals)


def mirrored(sample: dict, *axes: int) -> dict:
    """What is known of a picture (224 x 224), flipped along the axes: -1 left to right, -2 upside down."""
    cells = np.flip(np.arange(len(PLACES)).reshape(3, 3), axes).flatten()
    place = {old: PLACES[cell] for old, cell in zip(PLACES, cells, strict=True)}
    defects = []
    for defect in sample["defects"]:
        corners = np.reshape(defect["box"], (2, 2))  # x, y
        for axis in axes:
            corners[:, ~axis] = SIZE - corners[::-1, ~axis]
        defects.append(defect | {"place": place[defect["place"]], "box": tuple(corners.flatten().tolist())})
    return sample | {"defects": defects}
