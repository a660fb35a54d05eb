"""Training data: TADD's text, self-supervised anomalies and PandaGPT's instructions, as batches of features.

    data = TrainingData(model, "data/TADD/TADD_text.json", "data/TADD", cache="runs/features")
    data.fill()
    for batch in data.batches(data.order(epoch=0, seed=0, batch=16), epoch=0):
        ...

All that is random about an example (which of its conversations, which anomaly, which and how many normal pictures)
follows from (seed, epoch, index), and the order of an epoch from (seed, epoch, batch): nothing is to be remembered, and
every rank finds the same.
"""

import hashlib
import itertools
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spgdd.data.grammar import spoken_name
from spgdd.data.index import Row, index_folder
from spgdd.data.records import read_records
from spgdd.data.synthesis import DEFAULT, PRODUCT_SETTINGS
from spgdd.data.words import conversation
from spgdd.errors import DataError
from spgdd.imagebind import ImageFeatures
from spgdd.model import SPGDD
from spgdd.prefetch import prefetched, results
from spgdd.training.cache import Contents, FeatureCache, PictureFile, decode, encode
from spgdd.views import SIZE

WINDOW = 64  # batches among which examples of like length are put together
READERS = 2  # threads
MARKERS = 5  # tokens of the format around a question or an answer, roughly
ORDINARY = {"type": "anomaly", "place": "center", "box": (90, 90, 134, 134), "area": 0.04, "contrast": 0.2}


@dataclass(frozen=True, eq=False)
class Item:
    """What examples are drawn from."""

    pictures: list[PictureFile]  # one, or several anomalies of which each epoch sees one
    talks: list[list[dict]]  # conversations, of which each epoch sees one; none: made up about the anomaly
    product: str = "object"
    normals: tuple[PictureFile, ...] = ()  # good pictures of the same product, this one may be among them
    masked: bool = False  # whether it is known which pixels are defective


@dataclass(frozen=True, eq=False)
class Example:
    key: str  # for messages
    product: str
    conversation: list[dict]  # [{"from": "human" | "gpt", "value": text}, ...]
    seen: Contents
    normals: list[Contents]
    masked: bool


@dataclass(frozen=True, eq=False)
class Batch:
    keys: list[str]
    features: ImageFeatures  # embedding (B, J) float32, patches (B, L, N, D) float16
    products: list[str]
    conversations: list[list[dict]]
    masks: Tensor | None  # (B, 224, 224) float32, 0 to 1; None: not known
    normals: list[Tensor | None] | None  # (K, L, N, D) float16 of each example, None without any; None: none has any

    def to(self, device: torch.device | str) -> "Batch":
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        features, normals = ImageFeatures(*map(move, self.features)), self.normals and [*map(move, self.normals)]
        return Batch(self.keys, features, self.products, self.conversations, move(self.masks), normals)


class TrainingData:
    """Examples from a text file about TADD's images, and from a chat file such as PandaGPT's; one may be missing.

    text, images: the text file, and the folder of its images, in layouts that ``spgdd.data.index`` knows. An image
    outside of them is taken for an "object" without mask and normal pictures.
    chat, chat_images: the same, without masks and products.
    cache: folder of the feature cache; None encodes on the fly, again in each epoch.
    variants: anomalies made of each good image that the text file names; an epoch sees one of them.
    shots: an example gets one of these numbers of normal pictures, or as many as there are.
    turns, chat_turns: conversations are cut to so many questions.
    Raises DataError that names the file and what mends it.
    """

    def __init__(
        self, model: SPGDD, text: str | Path | None = None, images: str | Path | None = None, *,
        chat: str | Path | None = None, chat_images: str | Path | None = None, cache: str | Path | None = None,
        variants: int = 1, shots: Sequence[int] = (0, 1, 2, 4), turns: int | None = None, chat_turns: int | None = 2,
        seed: int = 0,
    ):  # fmt: skip
        for file, folder in ((text, images), (chat, chat_images)):
            if file and not folder:
                raise DataError(f"In which folder are the images of {file}? Give --image_root_path or --chat_images.")
        self.model, self.shots, self.turns, self.seed = model, tuple(shots), turns, seed
        self.cache = FeatureCache(cache, model) if cache else None
        rows = index_folder(images, check=False).rows if text else []
        self.items = _tadd_items(rows, Path(text), Path(images), turns, variants) if text else []
        if chat:
            records = read_records(chat, chat_images, chat_turns)
            self.items += [Item([PictureFile(record.image)], [record.conversation]) for record in records]
        if not self.items:
            raise DataError("There is nothing to train on: give a text file with records, or a chat file.")
        # Of all that examples follow from, but for the pictures' bytes and for where their folder lies.
        known = [(row.image, row.mask, row.product, row.split, row.defect_type) for row in rows]
        digest = hashlib.sha256(repr((known, turns, chat_turns, variants, self.shots, seed)).encode())
        for file in filter(None, (text, chat)):
            digest.update(Path(file).read_bytes())
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def fill(self, rank: int = 0, ranks: int = 1) -> None:
        """Encode into the cache what is not in it; see ``FeatureCache.fill``. Without a cache, do nothing."""
        if self.cache:
            normals = {id(item.normals): item.normals for item in self.items}.values()  # a product's items share them
            lists = [*(item.pictures for item in self.items), *(normals if any(self.shots) else ())]
            self.cache.fill(itertools.chain.from_iterable(lists), rank, ranks)

    def order(self, epoch: int, seed: int, batch: int) -> list[list[int]]:
        """The epoch's batches of ``batch`` examples over all ranks: examples of like length, in random order.

        A batch has masks in it or none. After each one with masks comes one without, as AnomalyGPT alternates its own
        with PandaGPT's data: where there are more of these, every epoch draws other ones. What does not make a full
        batch is left to other epochs, unless it is all there is.
        """
        rng, streams = random.Random(f"order {seed} {epoch}"), []
        for masked in (True, False):
            rows = [index for index, item in enumerate(self.items) if item.masked is masked]
            rng.shuffle(rows)
            rows = rows[: len(rows) // batch * batch or len(rows)]
            if streams and streams[0]:
                rows = rows[: len(streams[0]) * batch]
            windows = [rows[i : i + WINDOW * batch] for i in range(0, len(rows), WINDOW * batch)]
            rows = [index for window in windows for index in sorted(window, key=lambda i: self._length(i, epoch))]
            batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            rng.shuffle(batches)
            streams.append(batches)
        places = [((i + 0.5) / len(stream), stream[i]) for stream in streams for i in range(len(stream))]
        return [rows for _, rows in sorted(places, key=lambda place: place[0])]

    def longest(self, count: int) -> list[list[int]]:
        """A batch of the longest examples with masks, and one of those without: nothing takes more memory."""
        kinds = [[index for index, item in enumerate(self.items) if item.masked is kind] for kind in (True, False)]
        return [sorted(rows, key=lambda index: self._length(index, 0))[-count:] for rows in kinds if rows]

    def batches(self, plan: Iterable[Sequence[int]], epoch: int) -> Iterator[Batch]:
        """The batches of a plan, such as ``order`` or what a rank takes of it; one is made ahead in other threads."""
        # Two are enough for files of the cache; more of them hold up Python in the thread that trains.
        with ThreadPoolExecutor(READERS if self.cache else None) as readers, ThreadPoolExecutor(1) as joiner:

            def begin(rows: Sequence[int]) -> Future:
                examples = [readers.submit(self.example, index, epoch) for index in rows]
                return joiner.submit(lambda: self.collate(results(examples)))

            for batch in prefetched(begin(rows) for rows in plan):
                yield batch.result()

    def example(self, index: int, epoch: int) -> Example:
        item, rng = self.items[index], random.Random(f"{self.seed} {epoch} {index}")
        picture, count = rng.choice(item.pictures), rng.choice(self.shots)
        drawn = rng.sample(item.normals, min(count + 1, len(item.normals)))  # one more, should it be the picture itself
        chosen = [normal for normal in drawn if normal.image != picture.image][:count]
        seen = self._read(picture)
        key = f"{picture.image}, anomaly {picture.number}" if picture.source else str(picture.image)
        talk = self._talk(index, epoch, seen.defects)
        return Example(key, item.product, talk, seen, [self._read(normal) for normal in chosen], item.masked)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The examples as a batch: on the CPU with a cache, else encoded here and on the model's device."""
        every = [one for example in examples for one in (example.seen, *example.normals)]
        if self.cache:
            rows, stack = iter([(one.embedding, one.patches) for one in every]), stack_pinned
        else:
            rows, stack = iter(encode(self.model, every)), torch.stack
        own, normals = [], []
        for example in examples:
            own.append(next(rows))
            patches = [next(rows)[1] for _ in example.normals]
            normals.append(stack(patches) if patches else None)  # (K, L, N, D)
        masked = all(example.masked for example in examples)
        return Batch(
            keys=[example.key for example in examples],
            features=ImageFeatures(*map(stack, zip(*own, strict=True))),
            products=[example.product for example in examples],
            conversations=[example.conversation for example in examples],
            masks=stack_pinned([example.seen.mask / 255 for example in examples]) if masked else None,
            normals=None if all(one is None for one in normals) else normals,
        )

    def _read(self, picture: PictureFile) -> Contents:
        return self.cache.read(picture) if self.cache else decode(picture, self.model.profile.fit)

    def _talk(self, index: int, epoch: int, defects: list[dict]) -> list[dict]:
        """One of the conversations about a picture, or a new one about an anomaly's defects."""
        item, rng = self.items[index], random.Random(f"talk {self.seed} {epoch} {index}")
        if item.talks:
            return rng.choice(item.talks)
        sample = {"product": item.product, "family": "", "size": (SIZE, SIZE), "defects": defects}
        return conversation(sample, rng, rng.randint(1, self.turns or 4), kinds=())

    def _length(self, index: int, epoch: int) -> int:
        """About how many tokens an example's conversation has; of an anomaly, were it an ordinary one."""
        return sum(MARKERS + len(turn["value"].split()) for turn in self._talk(index, epoch, [ORDINARY]))


def stack_pinned(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, where there is a GPU in memory that it copies from while it computes."""
    shape = len(tensors), *tensors[0].shape
    return torch.stack(tensors, out=torch.empty(shape, dtype=tensors[0].dtype, pin_memory=torch.cuda.is_available()))


def _tadd_items(rows: Sequence[Row], text: Path, images: Path, turns: int | None, variants: int) -> list[Item]:
    """One item an image that the text file names, and of a good one another with its anomalies."""
    talks, good, items = defaultdict(list), defaultdict(list), []
    for record in read_records(text, images, turns):
        talks[record.image].append(record.conversation)
    for row in rows:
        if row.defect_type == "good":
            good[row.subset, row.product].append(row)
    normals = defaultdict(tuple)
    for product, those in good.items():
        those = [row for row in those if row.split == "train"] or those
        normals[product] = tuple(PictureFile(images / row.image) for row in those)
    places = {images / row.image: row for row in rows}
    for image, said in talks.items():
        row = places.get(image)
        if row is None:
            items.append(Item([PictureFile(image)], said))
            continue
        name, known, is_good = spoken_name(row.product), normals[row.subset, row.product], row.defect_type == "good"
        picture = PictureFile(image, images / row.mask if row.mask else None)
        items.append(Item([picture], said, name, known, is_good or bool(row.mask)))
        if is_good and variants:
            items.append(Item(_anomalies(image, row, known, variants), [], name, known, True))
    return items


def _anomalies(image: Path, row: Row, normals: Sequence[PictureFile], count: int) -> list[PictureFile]:
    """Anomalies on a good image, with patches of other normal images of the product where there are any."""
    rng = random.Random(row.image.encode("utf-8", "surrogateescape"))
    sources = [normal.image for normal in normals if normal.image != image] or [image]
    settings = PRODUCT_SETTINGS.get(row.product) or PRODUCT_SETTINGS.get(row.subset, DEFAULT)
    return [PictureFile(image, None, rng.choice(sources), settings, rng.randrange(2**32)) for _ in range(count)]
