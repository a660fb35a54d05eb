"""A tool in a notebook: diagnose pictures, move the threshold, talk about what is seen, keep the result.

    from spgdd.ui.diagnosis_panel import diagnosis_panel
    diagnosis_panel(spgdd.load("mini"), normals="good/", pictures="doubt/", product="gear")

Made of ipywidgets alone, 7.7 or later, so that it works wherever these do. Long work runs in a thread, which keeps the
kernel free for sliders and buttons.
"""

import tempfile
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from html import escape
from io import BytesIO
from pathlib import Path
from threading import Thread

from spgdd.diagnosis import Diagnoser
from spgdd.images import list_images
from spgdd.report import summary
from spgdd.ui.session import RATES, Session, explain, saying

FIT, WIDE = {"width": "auto"}, {"width": "auto", "flex": "1 1 200px"}  # alone, and beside others in a row
HALF = {"flex": "1 1 380px", "min_width": "280px"}
WRAP = {"flex_flow": "row wrap", "align_items": "flex-start"}


def diagnosis_panel(diagnoser: Diagnoser, normals=None, pictures=None, product: str = "object",
                    false_alarm_rate: float = 0.05, folder: str | Path = "../runs/panel") -> "Panel":  # fmt: skip
    """The tool, for the end of a cell.

    normals, pictures: good pictures (files, folders or patterns, or one memory file) and pictures in doubt to begin
    with; others can be chosen in the tool. folder: takes what is saved.
    """
    panel = Panel(Session(diagnoser, false_alarm_rate), product, folder)
    panel.work(lambda: panel.remember(normals), lambda: panel.open(pictures))
    return panel


class Panel:
    """The tool's widgets; what they show is in ``session``."""

    def __init__(self, session: Session, product: str, folder: str | Path):
        import ipywidgets as w

        self.session, self.thread = session, None
        self.good, self.doubt = (
            w.FileUpload(accept="image/*", multiple=True, description=name, layout=FIT)
            for name in ("Good pictures", "Pictures in doubt")
        )
        self.good_path = w.Text(placeholder="or their folder, or a memory such as nut.safetensors", layout=WIDE)
        self.doubt_path = w.Text(placeholder="or a file or a folder", layout=WIDE)
        self.product = w.Text(value=product, description="Product")
        self.names = w.Select(description="Pictures", rows=6, layout=FIT)
        self.question = w.Text(placeholder="Is there any anomaly in the image?", layout=WIDE)
        self.known, self.status, self.image, self.facts, self.chat, self.log = (w.HTML() for _ in range(6))
        self.verdicts, self.folder = w.HTML(layout=WIDE), w.Text(value=str(folder), description="Folder", layout=WIDE)
        self.opacity = slider(w.FloatSlider, "Map opacity", 0.6, 0, 1, step=0.05)
        self.across, self.down = (slider(w.IntRangeSlider, f"Frame {to}", (0, 1), 0, 1) for to in ("across", "down"))
        self.rate = slider(w.FloatSlider, "False alarms", session.rate, *RATES, step=0.01, readout_format=".0%")

        def button(name: str, *steps: Callable) -> w.Button:
            made = w.Button(description=name, layout=FIT)
            made.on_click(lambda _: self.work(*steps))
            return made

        remember = button("Remember", lambda: self.remember(self.good_path.value.strip()), self.look)
        diagnose = button("Diagnose", lambda: self.open(self.doubt_path.value.strip()))
        stop = button("Stop", lambda: ["Stopped."])
        browse = [button("Previous", lambda: self.step(-1)), button("Next", lambda: self.step(1))]
        talk = [self.question, button("Ask", self.ask), button("Undo", session.undo), button("Clear", session.clear)]
        self.question.on_msg(lambda _, content, __: content.get("event") == "submit" and self.work(self.ask))
        self.good.observe(lambda new: self.work(lambda: self.remember(self.keep(new.new)), self.look), "value")
        self.doubt.observe(lambda new: self.work(lambda: self.open(self.keep(new.new))), "value")
        self.names.observe(self.picked, "value")
        self.rate.observe(self.draw, "value")
        for control in (self.opacity, self.across, self.down):
            control.observe(self.draw_picture, "value")
        self.browser = w.HBox([w.VBox([self.names, w.HBox(browse)], layout=HALF), self.verdicts], layout=WRAP)
        seen = [self.image, self.opacity, self.across, self.down]
        said = [self.rate, self.facts, self.chat, w.HBox(talk, layout=WRAP)]
        log = w.Accordion([self.log], selected_index=None)
        log.set_title(0, "Log")
        self.all = w.VBox([
            w.HBox([self.good, self.good_path, self.product, remember], layout=WRAP),
            w.HBox([self.doubt, self.doubt_path, diagnose, stop], layout=WRAP),
            self.known, self.status, self.browser,
            w.HBox([w.VBox(seen, layout=HALF), w.VBox(said, layout=HALF)], layout=WRAP),
            w.HBox([self.folder, button("Save", self.save)], layout=WRAP), log,
        ])  # fmt: skip
        self.draw()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.all)

    # Work: functions that may return a generator of sentences that say how far it is

    def work(self, *steps: Callable[[], Iterator[str] | None]) -> None:
        """Do these steps in the background, one after the other; what is still at work stops first."""
        self.session.stop()
        self.thread = Thread(target=self._run, args=(steps, self.thread), daemon=True)
        self.thread.start()

    def _run(self, steps, before: Thread | None) -> None:
        if before:
            before.join()
        try:
            for said in self.session.run(said for step in steps for said in step() or ()):
                self.status.value = saying(said)
        except Exception as error:
            self.status.value = saying(explain(error), "alert")
            self.log.value = f"<pre>{escape(''.join(traceback.format_exception(error)))}</pre>"
        self.draw()

    def remember(self, normals) -> Iterator[str]:
        yield from self.session.remember(list_images(normals or []), self.product.value)
        self.product.value = self.session.product

    def open(self, pictures) -> Iterator[str]:
        if not pictures:
            return
        self.session.open(list_images(pictures))
        self.names.unobserve(self.picked, "value")
        self.names.options = [(Path(name).name, name) for name in self.session.scores]
        self.names.index = 0
        self.names.observe(self.picked, "value")
        yield from self.look()

    def look(self) -> Iterator[str]:
        """Diagnose the picture that is picked, ask the first question, then score the pictures without a score."""
        if not self.names.value:
            return
        yield "Looking ..."
        self.session.show(self.names.value)
        views = self.session.shown.views
        for edges, length in ((self.across, views.width), (self.down, views.height)):
            edges.max, edges.value = length, (0, length)
        self.draw()
        yield from self.ask()
        for said in self.session.survey():
            self.draw_words()
            yield said

    def ask(self) -> Iterator[str]:
        asked, self.question.value = self.question.value, ""
        for said in self.session.ask(asked, self.box):
            self.draw_words()
            yield said

    def save(self) -> Iterator[str]:
        files = self.session.save(self.folder.value, self.opacity.value)
        yield "Saved: " + ", ".join(file.as_posix() for file in files)

    def step(self, by: int) -> None:
        if self.names.options:
            self.names.index = min(max(self.names.index + by, 0), len(self.names.options) - 1)

    # What the widgets hold and show

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """The rectangle, x0, y0, x1, y1 in pixels of the picture; None where it is the whole picture."""
        (left, right), (top, bottom) = self.across.value, self.down.value
        whole = (left, top, right, bottom) == (0, 0, self.across.max, self.down.max)
        return None if whole else (left, top, right, bottom)

    def keep(self, value) -> list[Path]:
        """The files of a FileUpload, written to disk: of ipywidgets 7 a dict by name, of 8 a tuple."""
        files = value.items() if isinstance(value, dict) else [(file["name"], file) for file in value]
        folder = Path(tempfile.mkdtemp(dir=self.session.folder.name))
        for name, file in files:
            (folder / Path(name).name).write_bytes(file["content"])
        return sorted(folder.iterdir())

    def picked(self, _) -> None:
        self.work(self.look)

    def draw(self, _=None) -> None:
        self.session.rate = self.rate.value
        shown = self.session.shown
        self.facts.value = summary(shown) if shown else ""
        self.known.value = escape(self.session.known)
        self.draw_picture()
        self.draw_words()

    def draw_picture(self, _=None) -> None:
        if not self.session.shown:
            self.image.value = ""
            return
        buffer = BytesIO()
        self.session.picture(self.opacity.value, self.box).save(buffer, "JPEG", quality=90)
        data, caption = b64encode(buffer.getvalue()).decode(), escape(self.session.caption())
        self.image.value = f'<img alt="{caption}" style="width:100%" src="data:image/jpeg;base64,{data}">'

    def draw_words(self) -> None:
        self.browser.layout.display = None if len(self.session.scores) > 1 else "none"
        lines = "".join(f"<li>{escape(line)}</li>" for line in self.session.verdicts())
        self.verdicts.value = f'<ol aria-label="Verdicts" style="line-height:1.5">{lines}</ol>'
        turns = self.session.shown.turns if self.session.shown else ()
        says = "".join(f"<p><b>{escape(asked)}</b><br>{escape(answer)}</p>" for asked, answer in turns)
        self.chat.value = f'<div role="log" aria-label="Conversation" style="line-height:1.5">{says}</div>'


def slider(kind, description: str, value, low, high, **options):
    style = {"description_width": "110px"}
    return kind(value=value, min=low, max=high, description=description, layout=FIT, style=style, **options)
