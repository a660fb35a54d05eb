"""The main job: a picture, a few normal ones and a question in; map, score, verdict, regions and text out."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from spgdd import agreement
from spgdd.calibration import Calibration, Limits
from spgdd.data.words import default_question
from spgdd.errors import SpgddError
from spgdd.images import image_name, read_image
from spgdd.model import SPGDD
from spgdd.profiles import PROFILES
from spgdd.ranges import check_ranges
from spgdd.reference import Reference, build_reference, load_reference, pixel_digest
from spgdd.report import Report, card, preview, sentence
from spgdd.views import Region, Views
from spgdd.whole import Whole

if TYPE_CHECKING:
    from spgdd.language import Answer


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What was found in one picture. In a notebook it shows itself."""

    image: str  # its path as given, or "image"
    product: str
    profile: str
    normals: tuple[str, ...]
    question: str  # "" where none was asked yet
    text: str
    yes: float | None  # how likely the text was to begin with Yes and not with No: its own doubt; None: no text model
    history: tuple[tuple[str, str], ...]  # earlier (question, answer) pairs of this conversation
    score: float  # mean of the highest values of the map: a probability, or of the memory alone a distance, 0..2
    verdict: str  # "normal", "defective" or "unsure"
    limits: Limits
    calibration: Calibration
    false_alarm_rate: float
    regions: tuple[Region, ...]  # strongest first; none where the verdict is normal
    comparable: bool  # whether the picture as a whole is like the normal ones; one that is not gets no verdict
    notes: tuple[str, ...]  # what whoever acts on the verdict must know about the picture
    timings: dict[str, float]  # seconds per stage
    views: Views
    square_map: np.ndarray  # float32 (M, M): the map in the square that the model saw, M = 224 without tiles
    preview: bytes  # JPEG
    _speak: Callable[..., Iterator["Answer"]] | None  # of question, history, length, box and options of generation

    @cached_property
    def anomaly_map(self) -> np.ndarray:
        """float32 (H, W) in the frame of the picture, EXIF applied; NaN where the model saw nothing."""
        return self.views.to_picture(self.square_map)

    @property
    def threshold(self) -> float:
        return self.limits.threshold

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """All (question, answer) pairs of this conversation."""
        return (*self.history, (self.question, self.text)) if self.text else self.history

    @property
    def agreement(self) -> str:
        """Whether text and map say the same: see ``spgdd.agreement``."""
        return agreement.agreement(self.question, self.text, self.verdict)

    def ask(self, question: str, max_new_tokens: int = 128, box: tuple[int, int, int, int] | None = None,
            **options) -> "Diagnosis":  # fmt: skip
        """The same diagnosis with the answer to a further question; the picture is not encoded again.

        ``box`` (x0, y0, x1, y1) in pixels of the picture: asked of this rectangle alone, so that the model is told of
        the map in it and of no earlier answer.
        ``options`` are those of ``Vicuna.generate``. Raises SpgddError for a model that does not speak.
        """
        *_, answered = self.stream(question, max_new_tokens, box, **options)
        return answered

    def stream(self, question: str, max_new_tokens: int = 128, box: tuple[int, int, int, int] | None = None,
               **options) -> Iterator["Diagnosis"]:  # fmt: skip
        """``ask`` as it speaks: the diagnosis with the answer so far, again and again. Who stops listening stops it."""
        if self._speak is None:
            speaking = ", ".join(name for name, profile in PROFILES.items() if profile.language)
            raise SpgddError(f"The model ({self.profile}) was loaded without a language part, so it cannot be asked. "
                             f"Load one that speaks: {speaking}.")  # fmt: skip
        asked = question if box is None else f"{question}\n\nIn the rectangle {', '.join(map(str, box))} alone."
        for answer in self._speak(question, self.turns if box is None else (), max_new_tokens, box, **options):
            yield replace(self, question=asked, text=answer.text.strip(), yes=answer.yes, history=self.turns)

    def at(self, false_alarm_rate: float) -> "Diagnosis":
        """The same map judged at another false-alarm rate; nothing is encoded again."""
        limits = self.calibration.limits(false_alarm_rate)
        judged = judge(self.score, self.square_map, limits, self.views, self.comparable)
        moved = replace(self, false_alarm_rate=false_alarm_rate, **judged)
        return moved if self._speak else replace(moved, text=sentence(moved))

    def to_dict(self, timings: bool = False) -> dict:
        """JSON values, the same on every run; ``timings`` adds the seconds per stage, which are not."""
        square_map = self.square_map
        statistics = {"min": square_map.min(), "max": square_map.max(), "mean": square_map.mean()}
        for percent in (50, 95, 99):
            statistics[f"p{percent}"] = np.percentile(square_map, percent)
        result = {
            "image": self.image,
            "size": [self.views.width, self.views.height],
            "product": self.product,
            "verdict": self.verdict,
            "comparable": self.comparable,
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
            "seen_share": _rounded(self.views.seen_share),
            "question": self.question,
            "text": self.text,
            "text_yes": None if self.yes is None or self.agreement == "not asked" else _rounded(self.yes),
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
        return Report([self]).save(path)

    def _repr_html_(self) -> str:
        return card(self)

    def __repr__(self) -> str:
        found = f"score={self.score:.4g}, threshold={self.threshold:.4g}, regions={len(self.regions)}"
        return f"Diagnosis({self.image!r}, {self.verdict}, {found}, text={self.text!r})"


class Diagnoser:
    """Diagnoses pictures with a model."""

    def __init__(self, model: SPGDD):
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
        check_ranges(tiles=tiles, budget=budget, product=product)
        return build_reference(self.model, normals, product, budget, rotate, tiles)

    def load_reference(self, path: str | Path) -> Reference:
        """What ``Reference.save`` wrote; WeightsError where it is damaged or was made with other weights."""
        return load_reference(self.model, path)

    @torch.no_grad()
    def diagnose(self, image, normals=None, product: str | None = None, question: str | None = None,
                 history: Sequence[tuple[str, str]] = (), max_new_tokens: int = 128, false_alarm_rate: float = 0.05,
                 tiles: int | None = None, answer: bool = True) -> Diagnosis:  # fmt: skip
        """Diagnose one picture.

        image: what ``spgdd.images.read_image`` takes.
        normals: a ``Reference``, or what ``reference`` takes, which is then encoded for this call alone; None
        compares with words instead (zero-shot, not calibrated).
        product: its name; by default the reference's, or "object".
        question: by default whether there is an anomaly. history: earlier (question, answer) pairs.
        false_alarm_rate: share of normal pictures that may exceed the threshold, between 0 and 0.5.
        tiles: see ``reference``, whose number is kept where ``normals`` is one.
        answer: False leaves the text to a later ``Diagnosis.ask``, which takes most of the time.
        Raises ImageError for a picture that cannot be read; SpgddError where neither normals nor words are there.
        """
        check_ranges(tiles=tiles, max_new_tokens=max_new_tokens, product=product, question=question)
        model, watch = self.model, _Stopwatch()
        if normals is None:
            model.require_words()
        picture = read_image(image)
        watch.lap("read")
        if normals is not None and not isinstance(normals, Reference):
            normals = self.reference(normals, product or "object", tiles=tiles)
            watch.lap("reference")
        if normals and normals.levels and picture.info["levels"]:
            picture = read_image(image, normals.levels)  # deep grey in the range of the normal pictures
        product = product or (normals.product if normals else "object")
        calibration = normals.calibration if normals else Calibration("none")
        limits = calibration.limits(false_alarm_rate)
        views = Views.of(picture, model.profile, normals.tiles if normals else tiles)

        pixels = views.pixels(picture)
        (seen,) = model.look([pixels])
        watch.lap("encode")
        bank = normals.bank if normals else None
        evidence = model.evidence(seen.patches[0], product, bank)
        score, square_map, prompt_map = views.join(evidence, model.profile.score_share)
        square_map = square_map.cpu().numpy()
        if not np.isfinite(square_map).all():
            raise SpgddError(f"{image_name(image)}: the map is not finite; load with dtype=torch.float32.")
        unlike = Whole.of(pixels[0], seen).unlike(normals.whole) if normals else []
        judged = judge(score, square_map, limits, views, not unlike)
        watch.lap("map")

        speak = None
        if model.language is not None:

            @torch.no_grad()
            def speak(question: str, history: Sequence[tuple[str, str]], max_new_tokens: int, box=None, **options):
                inside = 1 if box is None else views.inside(box, prompt_map.shape[-1]).to(prompt_map)
                prompts = model.prompt_tokens(prompt_map * inside, seen.told[None], bank and bank.entries)  # (1, P, H)
                yield from model.language.stream(
                    seen.embedding[None], question, history, prompts, max_new_tokens, **options
                )

        notes = list(picture.info["notes"])
        if unlike:
            notes.insert(0, f"as a whole it is unlike the normal pictures ({', '.join(unlike)}), so it was not judged: "
                            "is it the same product, before the same camera, in the same light?")  # fmt: skip
        if normals and normals.groups > 1:
            notes.append(f"the normal pictures fall into {normals.groups} groups that look unlike each other: give "
                         "four or more of each, or a memory for each")  # fmt: skip
        if model.standins:
            files = ", ".join(model.standins)
            notes.insert(0, f"made with stand-in weights (random values: {files}): says nothing about the part")
        if views.seen_share < 1:
            notes.append(f"{1 - views.seen_share:.0%} of it is outside the centre crop and was not seen")
        if calibration.guess:
            notes.append(f"its threshold is a guess, from {calibration.pictures} normal picture(s): give four or more")
        if normals and pixel_digest(pixels[0]) in normals.digests:
            notes.append("it is one of the normal pictures itself, so a low score says nothing")
        found = Diagnosis(
            image=image_name(image), product=product, profile=model.profile.name,
            normals=normals.normals if normals else (), question="", text="", yes=None,
            history=tuple(tuple(turn) for turn in history), score=score, calibration=calibration,
            false_alarm_rate=false_alarm_rate, comparable=not unlike, notes=tuple(notes), timings=watch.laps,
            views=views, square_map=square_map, preview=preview(picture), _speak=speak, **judged,
        )  # fmt: skip
        if speak is None:
            return replace(found, text=sentence(found))
        if answer:
            found = found.ask(default_question(product) if question is None else question, max_new_tokens)
            watch.lap("text")
        return found


def load(profile: str = "mini", **options) -> Diagnoser:
    """A ready Diagnoser; ``options`` are those of ``spgdd.load_model``: root, device, dtype, quantize, language."""
    from spgdd.loading import load_model

    return Diagnoser(load_model(profile, **options))


def judge(score: float, square_map: np.ndarray, limits: Limits, views: Views, comparable: bool = True) -> dict:
    """Verdict and regions within limits, as fields of ``Diagnosis``."""
    verdict = limits.verdict(score) if comparable else "unsure"
    regions = () if verdict == "normal" else views.regions(square_map, limits.outline, limits.low)
    return {"limits": limits, "verdict": verdict, "regions": regions}


def _rounded(value: float) -> float:
    """Six digits, and no negative zero."""
    return float(f"{value:.6g}") + 0.0


class _Stopwatch:
    def __init__(self):
        self.laps, self._last = {}, time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage], self._last = now - self._last, now
