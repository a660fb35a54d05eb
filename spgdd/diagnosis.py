"""The main job: a picture, a few normal ones and a question in; map, score, verdict, regions and text out."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from spgdd.calibration import Calibration, Limits
from spgdd.data.words import default_question
from spgdd.errors import SpgddError
from spgdd.images import image_name, read_image
from spgdd.language import Answer
from spgdd.reference import Reference, as_told, build_reference, digest, encode, load_reference, view_maps
from spgdd.report import card, preview, save_report
from spgdd.views import Placement, Region, assemble, find_regions

WHETHER = re.compile(r"\b(is|are) there\b.*\b(anomal|defect|damage|flaw|fault)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What was found in one picture. In a notebook it shows itself."""

    image: str  # its path as given, or "image"
    product: str
    profile: str
    normals: tuple[str, ...]
    question: str
    text: str
    yes: float  # how likely the text was to begin with Yes and not with No: the text's own doubt
    history: tuple[tuple[str, str], ...]  # earlier (question, answer) pairs of this conversation
    score: float  # mean of the highest values of the map: a probability, or in AnomalyGPT's mode a distance, 0..2
    verdict: str  # "normal", "defective" or "unsure"
    limits: Limits
    calibration: Calibration
    false_alarm_rate: float
    regions: tuple[Region, ...]  # strongest first; none where the verdict is normal
    notes: tuple[str, ...]  # what whoever acts on the verdict must know about the picture
    timings: dict[str, float]  # seconds per stage
    placement: Placement
    square_map: np.ndarray  # float32 (M, M): the map in the square that the model saw, M = 224 without tiles
    preview: bytes  # JPEG
    _reply: Callable[[str, Sequence[tuple[str, str]], int], Answer]

    @cached_property
    def anomaly_map(self) -> np.ndarray:
        """float32 (H, W) in the frame of the picture, EXIF applied; NaN where the model saw nothing."""
        return self.placement.to_picture(self.square_map)

    @property
    def threshold(self) -> float:
        return self.limits.threshold

    @property
    def agreement(self) -> str:
        """Whether text and map say the same: "agree" or "disagree".

        Or "unparsed" (the text says neither Yes nor No, or both), "undecided" (the verdict is unsure), "not
        asked" (the question was not whether there is a defect).
        """
        if not WHETHER.search(self.question):
            return "not asked"
        said = says_defective(self.text)
        if said is None:
            return "unparsed"
        if self.verdict == "unsure":
            return "undecided"
        return "agree" if said == (self.verdict == "defective") else "disagree"

    def ask(self, question: str, max_new_tokens: int = 128) -> "Diagnosis":
        """The same diagnosis with the answer to a further question; the picture is not encoded again."""
        history = (*self.history, (self.question, self.text))
        answer = self._reply(question, history, max_new_tokens)
        return replace(self, question=question, text=answer.text.strip(), yes=answer.yes, history=history)

    def to_dict(self, timings: bool = False) -> dict:
        """JSON values, the same on every run; ``timings`` adds the seconds per stage, which are not."""
        square_map = self.square_map
        statistics = {"min": square_map.min(), "max": square_map.max(), "mean": square_map.mean()}
        for percent in (50, 95, 99):
            statistics[f"p{percent}"] = np.percentile(square_map, percent)
        result = {
            "image": self.image,
            "size": [self.placement.width, self.placement.height],
            "product": self.product,
            "verdict": self.verdict,
            "score": _rounded(self.score),
            "threshold": _rounded(self.limits.threshold),
            "unsure_between": [_rounded(self.limits.low), _rounded(self.limits.high)],
            "calibration": self.calibration.method,
            "false_alarm_rate": self.false_alarm_rate,
            "regions": [
                {"box": list(region.box), "area_share": _rounded(region.area_share), "place": region.place,
                 "peak": _rounded(region.peak)}
                for region in self.regions
            ],
            "map": {name: _rounded(value) for name, value in statistics.items()},
            "seen_share": _rounded(self.placement.seen_share),
            "question": self.question,
            "text": self.text,
            "text_yes": None if self.agreement == "not asked" else _rounded(self.yes),
            "agreement": self.agreement,
            "history": [list(turn) for turn in self.history],
            "notes": list(self.notes),
        }  # fmt: skip
        if timings:
            result["timings"] = {stage: _rounded(seconds) for stage, seconds in self.timings.items()}
        return result

    def to_json(self, timings: bool = False) -> str:
        """``to_dict`` with the profile and the names of the normal pictures, as text."""
        table = {"profile": self.profile, "normals": self.normals, **self.to_dict(timings)}
        return json.dumps(table, indent=2, ensure_ascii=False)

    def save_report(self, path: str | Path) -> Path:
        """Write a self-contained HTML page."""
        return save_report(path, [self])

    def _repr_html_(self) -> str:
        return card(self)

    def __repr__(self) -> str:
        found = f"score={self.score:.4g}, threshold={self.threshold:.4g}, regions={len(self.regions)}"
        return f"Diagnosis({self.image!r}, {self.verdict}, {found}, text={self.text!r})"


class Diagnoser:
    """Diagnoses pictures with a model (``spgdd.model.SPGDD``)."""

    def __init__(self, model):
        self.model = model

    def reference(self, normals, product: str = "object", budget: int | None = None, rotate: bool | None = None,
                  tiles: int | None = None) -> Reference:  # fmt: skip
        """Encode normal pictures and calibrate on them; the result goes to ``diagnose`` as ``normals``.

        normals: a folder, a path, a picture, or a list of these; identical pictures count once.
        budget: at most so many entries of the memory per tap and scale. rotate: remember each picture in four
        orientations. tiles: see each picture also in tiles x tiles parts, for small defects in large pictures.
        None: as the profile has it.
        Raises ImageError for one that cannot be read and where there is none.
        """
        return build_reference(self.model, normals, product, budget, rotate, tiles)

    def load_reference(self, path: str | Path) -> Reference:
        """What ``Reference.save`` wrote; WeightsError where it is damaged or was made with other weights."""
        return load_reference(self.model, path)

    @torch.no_grad()
    def diagnose(self, image, normals=None, product: str | None = None, question: str | None = None,
                 history: Sequence[tuple[str, str]] = (), max_new_tokens: int = 128,
                 false_alarm_rate: float = 0.05, tiles: int | None = None) -> Diagnosis:  # fmt: skip
        """Diagnose one picture.

        image: what ``spgdd.images.read_image`` takes.
        normals: a ``Reference``, or what ``reference`` takes, which is then encoded for this call alone; None
        compares with words instead (zero-shot, not calibrated).
        product: its name; by default the reference's, or "object".
        question: by default whether there is an anomaly. history: earlier (question, answer) pairs.
        false_alarm_rate: share of normal pictures that may exceed the threshold, between 0 and 0.5.
        tiles: see ``reference``, whose number is kept where ``normals`` is one.
        Raises ImageError for a picture that cannot be read.
        """
        watch = _Stopwatch()
        picture = read_image(image)
        watch.lap("read")
        if normals is not None and not isinstance(normals, Reference):
            normals = self.reference(normals, product or "object", tiles=tiles)
            watch.lap("reference")
        product = product or (normals.product if normals else "object")
        calibration = normals.calibration if normals else Calibration("none")
        limits = calibration.limits(false_alarm_rate)
        tiles = normals.tiles if normals else self.model.profile.tiles if tiles is None else tiles
        placement = Placement.of(picture, self.model.profile, tiles)

        pixels = placement.views(picture)
        features = encode(self.model, [pixels])
        told = as_told(features, len(features.patches), placement.joint)
        watch.lap("encode")
        bank = normals.bank if normals else None
        maps = view_maps(self.model, features, product, bank)
        score, verdict, regions, square_map = judge(
            maps, limits, placement, image_name(image), self.model.profile.score_share
        )
        watch.lap("map")

        shown = prompt_map(maps, square_map).to(told.embedding.device)
        prompt_tokens = self.model.prompt_tokens(shown, told.patches, bank.entries if bank else None)  # (1, P, H)

        def reply(question: str, history: Sequence[tuple[str, str]], max_new_tokens: int) -> Answer:
            return self.model.language.generate(told.embedding, question, history, prompt_tokens, max_new_tokens)

        question = default_question(product) if question is None else question
        answer = reply(question, history, max_new_tokens)
        watch.lap("text")

        notes = list(picture.info["notes"])
        if self.model.standins:
            files = ", ".join(self.model.standins)
            notes.insert(0, f"made with stand-in weights (random values: {files}): says nothing about the part")
        if placement.seen_share < 1:
            notes.append(f"{1 - placement.seen_share:.0%} of it is outside the centre crop and was not seen")
        if normals and digest(pixels[0]) in normals.digests:
            notes.append("it is one of the normal pictures itself, so a low score says nothing")
        return Diagnosis(
            image=image_name(image), product=product, profile=self.model.profile.name,
            normals=normals.normals if normals else (), question=question, text=answer.text.strip(),
            yes=answer.yes, history=tuple(tuple(turn) for turn in history), score=score, verdict=verdict, limits=limits,
            calibration=calibration, false_alarm_rate=false_alarm_rate, regions=regions, notes=tuple(notes),
            timings=watch.laps, placement=placement, square_map=square_map, preview=preview(picture),
            _reply=reply,
        )  # fmt: skip


def load(profile: str = "mini", **options) -> Diagnoser:
    """A ready Diagnoser; ``options`` are those of ``spgdd.load_model``: root, device, dtype, quantize."""
    from spgdd.loading import load_model

    return Diagnoser(load_model(profile, **options))


def judge(
    corner_maps: np.ndarray, limits: Limits, placement: Placement, name: str, share: float = 0.0
) -> tuple[float, str, tuple[Region, ...], np.ndarray]:
    """Score, verdict, regions and map (M, M) from the model's maps (V, 224, 224) of one picture's views.

    Raises SpgddError for a map that is not finite.
    """
    if not np.isfinite(corner_maps).all():
        raise SpgddError(f"{name}: the map is not finite; load with dtype=torch.float32.")
    score, square_map = assemble(corner_maps, share, placement.joint)
    verdict = "normal" if score < limits.low else "defective" if score > limits.high else "unsure"
    regions = ()
    if verdict != "normal":
        regions = find_regions(square_map, limits.outline, limits.low, placement)
    return score, verdict, regions, square_map


def prompt_map(corner_maps: np.ndarray, square_map: np.ndarray) -> torch.Tensor:
    """What the language model is told, float32 (1, 1, 224, 224): with tiles, the largest values of the whole map."""
    if len(corner_maps) == 1:
        return torch.from_numpy(corner_maps)[None]
    return F.adaptive_max_pool2d(torch.from_numpy(square_map)[None, None], corner_maps.shape[-2:])


def says_defective(text: str) -> bool | None:
    """True for an answer that begins with Yes, False for No; None for others and for one that says both."""
    words = re.findall(r"[a-z']+", re.split(r"[.!?\n]", text.strip().lower(), maxsplit=1)[0])
    if not words or words[0] not in ("yes", "no") or {"yes", "no"} <= set(words):
        return None
    return words[0] == "yes"


def _rounded(value: float) -> float:
    """Six digits, and no negative zero."""
    return float(f"{value:.6g}") + 0.0


class _Stopwatch:
    def __init__(self):
        self.laps, self._last = {}, time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage], self._last = now - self._last, now
