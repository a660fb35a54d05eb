"""The k-shot protocol: a few normal pictures of a product are drawn, its test pictures are diagnosed.

Each picture, whether to diagnose or to remember, is encoded once for all shot sets.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from spgdd.agreement import says_defective
from spgdd.calibration import Calibration
from spgdd.data.describe import measure
from spgdd.data.grammar import TYPES, VOCABULARY, base
from spgdd.data.index import Row, index_folder
from spgdd.data.masks import read_mask
from spgdd.data.words import default_question
from spgdd.diagnosis import Diagnoser, judge
from spgdd.errors import DataError, printable
from spgdd.evaluation.metrics import PixelCounts, image_metrics, verdict_metrics
from spgdd.images import read_image
from spgdd.language.conversation import fold_history
from spgdd.prefetch import prefetched, results
from spgdd.profiles import Profile
from spgdd.ranges import check_ranges
from spgdd.reference import build_reference
from spgdd.views import Views
from spgdd.whole import Whole

BATCH = 32  # pictures decoded and seen together
TOKENS = 64  # longest answer
KIND_QUESTION = "What kind of defect is it?"


@dataclass(frozen=True, eq=False)
class Picture:
    name: str
    source: Path | np.ndarray  # what read_image takes
    kind: str = "good"  # or the defect type
    mask: Path | np.ndarray | None = None  # bool (H, W), or the file of one
    places: tuple[str, ...] = ()  # cells of the 3x3 grid with a defect; none: found in the mask


@dataclass(frozen=True, eq=False)
class Task:
    """One product: pictures to draw shots from, and pictures to diagnose."""

    subset: str
    product: str
    name: str  # what the model is told that it sees
    normals: list[Picture]
    queries: list[Picture]
    types: frozenset[str] = frozenset(TYPES)  # defect types that the text is expected to name


def folder_tasks(
    folder: str | Path, subsets: Sequence[str] = (), names: dict[str, str] | None = None, limit: int | None = None,
    report: Callable[[str], None] = print,
) -> list[Task]:  # fmt: skip
    """The products in a folder of data sets (see ``spgdd.data.index``).

    Shots come from the good pictures of "train" and all of "test" is diagnosed; where a data set has no such
    split, every second good picture is kept for shots. ``names``: subset or product to the name to use.
    ``limit``: at most so many good and so many defective pictures of a product are diagnosed.
    ``report`` is told how many pictures and masks there are and what is wrong with others; damaged ones are left out.
    Raises DataError for an unknown subset.
    """
    index = index_folder(folder, check=False)
    known = {row.subset for row in index.rows}
    if unknown := set(subsets) - known:
        raise DataError(f"{folder} has no subset {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}.")
    found, parts = defaultdict(list), {}
    for row in index.rows:
        if not subsets or row.subset in subsets:
            found[row.subset, row.product].append(row)
    for product, rows in found.items():
        good = [row for row in rows if row.defect_type == "good"]
        test = [row for row in rows if row.split == "test"]
        normals = [row for row in good if row.split == "train"] if test else good[::2]
        queries = test or sorted(set(rows) - set(normals), key=lambda row: row.image)
        parts[product] = normals, _limited(queries, limit)
    index = index.checked(row for part in parts.values() for rows in part for row in rows)
    for line in index.summary():
        report(line)
    place = lambda file: index.folder / file if file else None  # noqa: E731
    pictures = {r.image: Picture(r.image, place(r.image), r.defect_type, place(r.mask)) for r in index.rows}
    names, tasks = VOCABULARY["spoken_names"] | (names or {}), []
    for (subset, product), part in parts.items():
        normals, queries = ([pictures[row.image] for row in rows if row.image in pictures] for rows in part)
        name = names.get(product) or names.get(subset) or product.replace("_", " ")
        tasks.append(Task(subset, product, name, normals, queries))
    return tasks


def _limited(rows: list[Row], limit: int | None) -> list[Row]:
    rng, kept = random.Random(0), set()
    for good in (True, False):
        group = [row for row in rows if (row.defect_type == "good") == good]
        kept.update(group if limit is None else rng.sample(group, min(limit, len(group))))
    return [row for row in rows if row in kept]


def evaluate(*arguments, **options) -> list[dict]:
    """The runs of ``evaluate_each``."""
    return list(evaluate_each(*arguments, **options))


def evaluate_each(
    diagnoser: Diagnoser, tasks: Sequence[Task], shots: Sequence[int] = (1,), seeds: Sequence[int] = (0, 1, 2),
    text: bool = True, false_alarm_rate: float = 0.05, progress: bool = True,
) -> Iterator[dict]:  # fmt: skip
    """A run per product, number of shots and seed: subset, product, shots, seed, metrics, pictures.

    A seed shuffles the normal pictures, and k shots are the first k of them. Without shots there is one run,
    of seed None. Pictures are dicts of everything that the metrics are made of. Raises DataError for a product with
    fewer normal pictures than shots, or without pictures to diagnose; SpgddError where no shots are asked of a model
    without words. Without a language part there is no text.
    """
    check_ranges(shots=shots, seeds=seeds, false_alarm_rate=false_alarm_rate)
    for task in tasks:
        if len(task.normals) < max(shots) or not task.queries:
            raise DataError(
                f"{task.subset}/{task.product} has {len(task.normals)} normal pictures to draw {max(shots)} shots "
                f"from and {len(task.queries)} to diagnose. Choose other --subsets or fewer --shots."
            )
    if 0 in shots:
        diagnoser.model.require_words()
    text = text and diagnoser.model.language is not None
    with tqdm(total=sum(len(task.queries) for task in tasks), unit="picture", disable=not progress) as bar:
        for task in tasks:
            bar.set_description(printable(task.product))
            yield from _evaluate_task(diagnoser, task, shots, seeds, text, false_alarm_rate, bar)


@torch.inference_mode()
def _evaluate_task(diagnoser: Diagnoser, task: Task, shots, seeds, text: bool, rate: float, bar: tqdm) -> list[dict]:
    model, known, sets = diagnoser.model, {}, {}
    for seed in seeds:
        order = random.Random(seed).sample(task.normals, len(task.normals))
        for k in shots:
            sources = [picture.source for picture in order[:k]]
            sets[k, seed if k else None] = build_reference(model, sources, task.name, known=known) if k else None
    calibrations = {key: reference.calibration if reference else Calibration("none") for key, reference in sets.items()}
    limits = {key: calibration.limits(rate) for key, calibration in calibrations.items()}
    counts, pictures, asked = ({key: kind() for key in sets} for kind in (PixelCounts, list, list))
    levels = next((reference.levels for reference in sets.values() if reference and reference.levels), None)
    for batch in load_batches(task.queries, model.profile, levels):
        seen, count = model.look([loaded.pixels for loaded in batch]), batch[0].views.count
        patches = torch.cat([one.patches[0] for one in seen])  # (B*V, L, N, D)
        wholes = [Whole.of(loaded.pixels[0], one) for loaded, one in zip(batch, seen, strict=True)]
        embedding, told = (torch.stack([getattr(one, name) for one in seen]) for name in ("embedding", "told"))
        for key, reference in sets.items():
            bank = reference.bank if reference else None
            evidence = model.evidence(patches, task.name, bank)
            records, prompt_maps = [], []
            for number, loaded in enumerate(batch):
                picture, views = loaded.picture, loaded.views
                own = evidence[number * count : (number + 1) * count]
                score, square_map, prompt_map = views.join(own, model.profile.score_share)
                square_map = square_map.cpu().numpy()
                unlike = bool(reference and wholes[number].unlike(reference.whole))
                judged = judge(score, square_map, limits[key], views, not unlike)
                prompt_maps.append(prompt_map)
                records.append({
                    "picture": picture.name, "kind": picture.kind, "places": loaded.places, "score": score,
                    "threshold": limits[key].threshold, "verdict": judged["verdict"], "unlike": unlike,
                    "regions": [asdict(region) for region in judged["regions"][:3]],
                })  # fmt: skip
                if picture.kind == "good" or loaded.coverage is not None:
                    counts[key].add(square_map, loaded.coverage)
            if text:
                prompts = model.prompt_tokens(torch.cat(prompt_maps), told, bank and bank.entries)
                asked[key].append((embedding, prompts))
            pictures[key] += records
        bar.update(len(batch))
    for key, parts in asked.items():
        if parts:  # all at once: no batch waits for its longest answer
            _ask(model, *map(torch.cat, zip(*parts, strict=True)), task, pictures[key])
    return [
        {
            "subset": task.subset, "product": task.product, "name": task.name, "shots": key[0], "seed": key[1],
            "normals": sets[key].normals if sets[key] else (), "calibration": asdict(calibrations[key]),
            "metrics": image_metrics([p["kind"] != "good" for p in rows], [p["score"] for p in rows])
            | counts[key].metrics() | verdict_metrics(rows),
            "pictures": rows,
        }
        for key, rows in pictures.items()
    ]  # fmt: skip


def _ask(model, embedding: torch.Tensor, prompts: torch.Tensor, task: Task, records: list[dict]) -> None:
    """Add the answers: whether there is a defect; and of true positives, as the next question, its kind."""
    question = default_question(task.name)
    answers = model.language.generate_batch(embedding, [question] * len(records), prompts, TOKENS)
    rows = []
    for number, (record, answer) in enumerate(zip(records, answers, strict=True)):
        record |= {"answer": answer.text.strip(), "cut": answer.stopped == "length"}
        if base(record["kind"]) in task.types and says_defective(answer.text):
            rows.append(number)
    if rows:
        talks = [fold_history(((question, records[row]["answer"]),), KIND_QUESTION) for row in rows]
        answers = model.language.generate_batch(embedding[rows], talks, prompts[rows], TOKENS)
        for row, answer in zip(rows, answers, strict=True):
            records[row]["kind_answer"] = answer.text.strip()


@dataclass(frozen=True, eq=False)
class Loaded:
    picture: Picture
    views: Views
    pixels: list[torch.Tensor]  # see Views.pixels
    coverage: np.ndarray | None  # float32 (M, M), share of each pixel of the map that is defective
    places: list[str]


def load_batches(pictures: Sequence[Picture], profile: Profile, levels=None) -> Iterator[list[Loaded]]:
    """Decoded pictures in batches, deep grey from ``levels``; while the caller works on one, the next is decoded."""
    with ThreadPoolExecutor() as pool:
        batches = (pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH))
        decoding = ([pool.submit(load_picture, one, profile, levels) for one in batch] for batch in batches)
        yield from map(results, prefetched(decoding))


def load_picture(picture: Picture, profile: Profile, levels=None) -> Loaded:
    """Decode a picture and its mask, and shrink the mask area by area to the frame of the map."""
    image = read_image(picture.source, levels)
    views = Views.of(image, profile)
    coverage, places = None, list(picture.places)
    if picture.mask is not None:
        mask = read_mask(picture.mask, picture.source) if isinstance(picture.mask, Path) else picture.mask  # (H, W)
        if mask.shape != (image.height, image.width):
            raise DataError(f"{picture.mask}: {mask.shape[1]} x {mask.shape[0]} pixels, its picture {image.width} x "
                            f"{image.height}.")  # fmt: skip
        if not places:
            places = list(dict.fromkeys(d["place"] for d in measure(mask, np.asarray(image), picture.kind)))
        coverage = views.to_map(mask)
    return Loaded(picture, views, views.pixels(image), coverage, places)
