"""The main job: a picture, a few normal ones and a question in; map, score, verdict, regions and text out."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from spgdd.calibration import AREA, Calibration, Limits, altered_copies
from spgdd.errors import ImageError, SpgddError
from spgdd.geometry import Placement, Region, align, find_regions
from spgdd.imagebind.preprocess import normalise, to_pixels
from spgdd.images import image_name, list_images, read_image
from spgdd.report import card, preview, save_report
from spgdd.selfprompt.memory import MemoryBank
from spgdd.tadd.words import default_question

WHETHER = re.compile(r"\b(is|are) there\b.*\b(anomal|defect|damage|flaw|fault)", re.IGNORECASE | re.DOTALL)
BATCH = 8  # pictures that the vision tower takes at once
HELD_OUT = 64  # at most so many normal pictures are scored against the others


@dataclass(frozen=True, eq=False)
class Reference:
    """Normal pictures of one product, encoded once and reused for any number of diagnoses."""

    product: str
    normals: tuple[str, ...]  # names
    bank: MemoryBank = field(repr=False)
    calibration: Calibration = field(repr=False)
    digests: frozenset[str] = field(repr=False)  # of the pixels: a query can be one of the normals


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What was found in one picture. In a notebook it shows itself."""

    image: str  # its path as given, or "image"
    product: str
    profile: str
    normals: tuple[str, ...]
    question: str
    text: str
    history: tuple[tuple[str, str], ...]  # earlier (question, answer) pairs of this conversation
    score: float  # largest value of the model's map: with normals 0..2, 0 is just like them; without, 0..1
    verdict: str  # "normal", "defective" or "unsure"
    limits: Limits
    calibration: Calibration
    false_alarm_rate: float
    regions: tuple[Region, ...]  # strongest first; none where the verdict is normal
    notes: tuple[str, ...]  # what whoever acts on the verdict must know about the picture
    timings: dict[str, float]  # seconds per stage
    placement: Placement
    square_map: np.ndarray  # float32 (224, 224): the map in the square that the model saw
    preview: bytes  # JPEG
    _reply: Callable[[str, Sequence[tuple[str, str]], int], str]

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
        text = self._reply(question, history, max_new_tokens)
        return replace(self, question=question, text=text, history=history)

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

    def reference(self, normals, product: str = "object") -> Reference:
        """Encode normal pictures and calibrate on them; the result goes to ``diagnose`` as ``normals``.

        ``normals`` is a folder, a path, a picture, or a list of these; identical pictures count once. Raises
        ImageError for one that cannot be read and where there is none.
        """
        pictures = {}  # digest: (name, uint8 pixels)
        items = normals if isinstance(normals, (list, tuple)) else [normals]
        for item in items:
            for source in list_images(item) if isinstance(item, (str, Path)) else [item]:
                pixels = to_pixels(read_image(source), self.model.profile.fit)
                pictures.setdefault(_digest(pixels), (image_name(source), pixels))
        if not pictures:
            raise ImageError("normals is empty: give a normal picture, or None to diagnose without any.")
        names, pixels = zip(*pictures.values(), strict=True)
        features = self._encode(pixels)
        calibration = self._calibrate(pixels, features, product)
        bank = self.model.memory.build(features.patches)
        return Reference(product, names, bank, calibration, frozenset(pictures))

    @torch.no_grad()
    def diagnose(self, image, normals=None, product: str | None = None, question: str | None = None,
                 history: Sequence[tuple[str, str]] = (), max_new_tokens: int = 128,
                 false_alarm_rate: float = 0.05) -> Diagnosis:  # fmt: skip
        """Diagnose one picture.

        image: what ``spgdd.images.read_image`` takes.
        normals: a ``Reference``, or what ``reference`` takes, which is then encoded for this call alone; None
        compares with words instead (zero-shot, not calibrated).
        product: its name; by default the reference's, or "object".
        question: by default whether there is an anomaly. history: earlier (question, answer) pairs.
        false_alarm_rate: share of normal pictures that may exceed the threshold, between 0 and 0.5.
        Raises ImageError for a picture that cannot be read.
        """
        watch = _Stopwatch()
        picture = read_image(image)
        pixels = to_pixels(picture, self.model.profile.fit)
        placement = Placement(*picture.size, self.model.profile.fit)
        watch.lap("read")
        if normals is not None and not isinstance(normals, Reference):
            normals = self.reference(normals, product or "object")
            watch.lap("reference")
        product = product or (normals.product if normals else "object")
        calibration = normals.calibration if normals else Calibration("none")
        limits = calibration.limits(false_alarm_rate)

        features = self._encode([pixels])
        embedding = features.embedding
        watch.lap("encode")
        anomaly_map = self.model.anomaly_map(features, product, normals.bank if normals else None)
        score, verdict, regions, square_map = judge(_numpy(anomaly_map), limits, placement, image_name(image))
        watch.lap("map")

        prompt_tokens = self.model.prompt_tokens(anomaly_map, features)  # (1, P, H)

        def reply(question: str, history: Sequence[tuple[str, str]], max_new_tokens: int) -> str:
            generate = self.model.language.generate
            return generate(embedding, question, history, prompt_tokens, max_new_tokens).text.strip()

        question = default_question(product) if question is None else question
        text = reply(question, history, max_new_tokens)
        watch.lap("text")

        notes = list(picture.info["notes"])
        if self.model.standins:
            files = ", ".join(self.model.standins)
            notes.insert(0, f"made with stand-in weights (random values: {files}): says nothing about the part")
        if placement.seen_share < 1:
            notes.append(f"{1 - placement.seen_share:.0%} of it is outside the centre crop and was not seen")
        if normals and _digest(pixels) in normals.digests:
            notes.append("it is one of the normal pictures itself, so a low score says nothing")
        return Diagnosis(
            image=image_name(image), product=product, profile=self.model.profile.name,
            normals=normals.normals if normals else (), question=question, text=text,
            history=tuple(tuple(turn) for turn in history), score=score, verdict=verdict, limits=limits,
            calibration=calibration, false_alarm_rate=false_alarm_rate, regions=regions, notes=tuple(notes),
            timings=watch.laps, placement=placement, square_map=square_map, preview=preview(picture),
            _reply=reply,
        )  # fmt: skip

    def _encode(self, pixels: Sequence[torch.Tensor]):
        """ImageFeatures of uint8 pictures (3, 224, 224), in batches."""
        starts = range(0, len(pixels), BATCH)
        batches = [self.model.encode(normalise(torch.stack(pixels[i : i + BATCH]))) for i in starts]
        return type(batches[0])(*(torch.cat(parts) for parts in zip(*batches, strict=True)))

    def _calibrate(self, pixels: Sequence[torch.Tensor], features, product: str) -> Calibration:
        """Scores of each normal picture against a memory of the others, or of copies of the only one."""
        count, patches = len(pixels), features.patches  # (K, L, N, D)
        if count > 1:
            held_out = np.linspace(0, count - 1, min(count, HELD_OUT)).round().astype(int).tolist()
            trials = ((features, i, torch.cat([patches[:i], patches[i + 1 :]])) for i in held_out)
        else:
            held_out, copies = [0], self._encode(altered_copies(pixels[0]))
            trials = ((copies, i, patches) for i in range(len(copies.patches)))
        maps = []
        for batch, i, memory in trials:
            one = type(batch)(*(part[i : i + 1] for part in batch))
            maps.append(_numpy(self.model.anomaly_map(one, product, self.model.memory.build(memory))))
        return Calibration(
            method="leave-one-out" if count > 1 else "augmentations",
            pictures=len(held_out),
            scores=tuple(float(one.max()) for one in maps),
            outlines=tuple(float(np.quantile(align(one), 1 - AREA)) for one in maps),
        )


def load(profile: str = "mini", **options) -> Diagnoser:
    """A ready Diagnoser; ``options`` are those of ``spgdd.load_model``: root, device, dtype, quantize."""
    from spgdd.model import load_model

    return Diagnoser(load_model(profile, **options))


def judge(
    corner_map: np.ndarray, limits: Limits, placement: Placement, name: str
) -> tuple[float, str, tuple[Region, ...], np.ndarray]:
    """Score, verdict, regions and aligned map (224, 224) of the model's map of one picture.

    Raises SpgddError for a map that is not finite.
    """
    if not np.isfinite(corner_map).all():
        raise SpgddError(f"{name}: the map is not finite; load with dtype=torch.float32.")
    score, square_map = float(corner_map.max()), align(corner_map)
    verdict = "normal" if score < limits.low else "defective" if score > limits.high else "unsure"
    regions = ()
    if verdict != "normal":
        regions = find_regions(square_map, limits.outline, limits.low, placement)
    return score, verdict, regions, square_map


def says_defective(text: str) -> bool | None:
    """True for an answer that begins with Yes, False for No; None for others and for one that says both."""
    words = re.findall(r"[a-z']+", re.split(r"[.!?\n]", text.strip().lower(), maxsplit=1)[0])
    if not words or words[0] not in ("yes", "no") or {"yes", "no"} <= set(words):
        return None
    return words[0] == "yes"


def _digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def _numpy(anomaly_map: torch.Tensor) -> np.ndarray:
    """(1, 1, 224, 224) on any device -> float32 (224, 224)."""
    return anomaly_map[0, 0].detach().float().cpu().numpy()


def _rounded(value: float) -> float:
    """Six digits, and no negative zero."""
    return float(f"{value:.6g}") + 0.0


class _Stopwatch:
    def __init__(self):
        self.laps, self._last = {}, time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage], self._last = now - self._last, now
