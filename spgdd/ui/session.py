"""One person's conversation about parts: what the notebook's panel and the web demo share. It knows no widgets.

Long work is a generator of sentences that say how far it is.
"""

import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from html import escape
from pathlib import Path

from PIL import Image

from spgdd.calibration import Calibration
from spgdd.data.words import default_question
from spgdd.diagnosis import Diagnoser, Diagnosis
from spgdd.errors import ImageError, SpgddError
from spgdd.files import whole_file, write_text
from spgdd.reference import Normals, Reference, build_reference, read_normals
from spgdd.report import number, overlay, places

RATES = 0.01, 0.4  # of false alarms, that a slider offers


class Session:
    """Good pictures, pictures in doubt, and the talk about the one that is shown."""

    def __init__(self, diagnoser: Diagnoser, false_alarm_rate: float = 0.05):
        self.diagnoser, self.rate = diagnoser, false_alarm_rate
        self.folder = tempfile.TemporaryDirectory(prefix="spgdd-")  # of its files, which go when it goes
        self.reference: Reference | None = None
        self.product, self.known = "object", ""  # known: what is known of good pictures, in words
        self.source = None  # what the good pictures were made of, for who asks whether that has changed
        self.scores: dict[str, float | str] = {}  # of each picture in doubt; "" before, words where there is none
        self._talk: list[Diagnosis] = []  # about the picture shown: as found, then after each answer
        self._work = None

    @property
    def shown(self) -> Diagnosis | None:
        """The diagnosis of the picture shown with all answers, at the false-alarm rate of now."""
        return self._talk[-1].at(self.rate) if self._talk else None

    def run(self, steps: Iterable) -> Iterator:
        """Long work, which ends where it stands when newer work begins or ``stop`` is called."""
        self._work = mine = object()
        for step in steps:
            yield step
            if self._work is not mine:
                return

    def stop(self) -> None:
        self._work = None

    # Pictures

    def remember(self, good: Sequence[str | Path], product: str) -> Iterator[str]:
        """Encode good pictures, or take them from a memory file, which knows its product, or go on without any.

        A picture that cannot be read is left out and named in ``known``; raises ImageError if none is left.
        """
        if len(good) == 1 and Path(good[0]).suffix == ".safetensors":
            self._take(self.diagnoser.load_reference(good[0]))
            return
        model, seen, unreadable = self.diagnoser.model, {}, []
        profile = model.profile
        read = read_normals(list(map(str, good)), profile, profile.tiles, unreadable) if good else Normals({}, None)
        faults = [f"Left out: {explain(error)}" for error in unreadable]
        if faults and not read.pictures:
            raise ImageError(" ".join(["No good picture can be used.", *faults]))
        for count, (digest, (_, _, pixels)) in enumerate(read.pictures.items(), start=1):
            yield f"Good picture {count} of {len(read.pictures)} ..."
            (seen[digest],) = model.look([pixels], profile.rotate)
        self.product = product.strip() or "object"
        reference = build_reference(model, read, self.product, known=seen) if read.pictures else None
        self._take(reference and replace(reference, normals=tuple(Path(name).name for name in reference.normals)))
        self.known = " ".join([self.known, *faults])

    def _take(self, reference: Reference | None) -> None:
        self.reference, self.scores, self._talk = reference, dict.fromkeys(self.scores, ""), []
        self.known = "No good picture is known: the product's name alone says what is normal."
        if reference:
            self.product, count = reference.product, reference.bank.normals
            self.known = f"{count} good picture{'s' * (count > 1)} of {self.product} remembered."

    def open(self, pictures: Sequence[str | Path]) -> None:
        """Pictures in doubt in place of those before."""
        self.scores, self._talk = dict.fromkeys(map(str, pictures), ""), []

    def show(self, picture: str) -> None:
        """Diagnose a picture in doubt by its map; a new talk begins."""
        self._talk = []
        self._talk = [self._diagnose(picture)]

    def survey(self) -> Iterator[str]:
        """Score the pictures in doubt that have no score yet."""
        for count, picture in enumerate(self.scores, start=1):
            if self.scores[picture] == "":
                yield f"Picture {count} of {len(self.scores)} ..."
                with suppress(ImageError):  # said in its line of ``verdicts``
                    self._diagnose(picture)
        yield ""

    def _diagnose(self, picture: str) -> Diagnosis:
        self.scores[picture] = "not readable"
        found = self.diagnoser.diagnose(picture, self.reference, self.product, answer=False)
        self.scores[picture] = found.score if found.comparable else "unsure, unlike the good pictures as a whole"
        return replace(found, image=Path(picture).name)

    def verdicts(self) -> list[str]:
        """A line for each picture in doubt: its name and, once it has a score, its verdict at the rate of now."""
        calibration = self.reference.calibration if self.reference else Calibration("none")
        limits, lines = calibration.limits(self.rate), []
        for picture, score in self.scores.items():
            found = f"{limits.verdict(score)}, {number(score)}" if isinstance(score, float) else score
            lines.append(f"{Path(picture).name}: {found}" if found else Path(picture).name)
        return lines

    # Talk

    def ask(self, question: str = "", box: Sequence[int] | None = None, seconds: float = 60,
            **options) -> Iterator[str]:  # fmt: skip
        """Ask about the picture shown, or about a rectangle of it; ``options`` are those of ``Diagnosis.stream``.

        The answer so far is in ``shown``; after so many seconds it is cut off. No question: whether there is an
        anomaly, unless the model does not speak.
        """
        if not self._talk:
            raise SpgddError("No picture is shown yet: choose one and diagnose it first.")
        if not question.strip() and self.diagnoser.model.language is None:
            return
        talk, place, end = self._talk, len(self._talk), time.monotonic() + seconds
        for answered in talk[-1].stream(question.strip() or default_question(self.product), box=box, **options):
            talk[place:] = [answered]
            if time.monotonic() > end:
                yield f"The answer was cut off after {seconds:g} seconds."
                return
            yield "Answering ..."
        yield ""

    def undo(self) -> None:
        """Forget the last question and its answer."""
        self.stop()
        self._talk = self._talk[: max(1, len(self._talk) - 1)]  # a new list: who still answers writes to the old one

    def clear(self) -> None:
        """Forget all questions about the picture shown."""
        self.stop()
        self._talk = self._talk[:1]

    # What is seen and kept

    def picture(self, opacity: float = 0.6, box: Sequence[int] | None = None) -> Image.Image:
        """The picture shown under its map, with a rectangle (x0, y0, x1, y1) in pixels of the picture."""
        return overlay(self.shown, opacity, box)

    def caption(self) -> str:
        """What ``picture`` shows, for whoever cannot see it."""
        d = self.shown
        return f"{d.image} with its heat map: {d.verdict}, score {number(d.score)}, places: {places(d)}"

    def save(self, folder: str | Path, opacity: float = 0.6) -> list[Path]:
        """Write report, JSON, overlay and, where there are good pictures, their memory."""
        if not self._talk:
            raise SpgddError("Nothing to save yet: diagnose a picture first.")
        d, plain = self.shown, lambda text: re.sub(r"[^\w-]+", "_", text)[:80]  # what any file system takes
        name = Path(folder) / plain(Path(d.image).stem)
        files = [d.save_report(f"{name}.html"), write_text(f"{name}.json", d.to_json() + "\n"), Path(f"{name}.png")]
        with whole_file(files[-1]) as file:
            self.picture(opacity).save(file, "PNG")
        memory = Path(folder) / f"{plain(self.product)}.safetensors"
        return [*files, self.reference.save(memory)] if self.reference else files


def saying(sentence: str, role: str = "status") -> str:
    """HTML of a sentence; one of work that goes on, such as "Picture 3 of 8 ...", has a bar behind it."""
    bar = ""
    if sentence.endswith(" ..."):
        far = re.search(r"(\d+) of (\d+) \.\.\.$", sentence)
        filled = f' value="{far[1]}" max="{far[2]}"' if far else ""
        bar = f' <progress aria-label="How far it is"{filled}></progress>'
    return f'<div role="{role}">{escape(sentence)}{bar}</div>'


def explain(error: Exception) -> str:
    """What went wrong and what mends it, in plain words; files are named without their folders."""
    if isinstance(error, SpgddError):
        return re.sub(r"(?<!\S)/(?:[^/\s]+/)+", "", str(error))
    return (f"Something failed that should not ({type(error).__name__}). The whole error is in the log: please report "
            "it. Another picture may work.")  # fmt: skip
