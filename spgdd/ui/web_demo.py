"""The page of the web demo, and the same for programs; `spgdd demo` serves it (spgdd/cli/demo.py).

Bounded are uploads, pictures, the queue and answers; each visitor has a session, and nothing comes from elsewhere.
"""

import logging
import re
import tempfile
from contextlib import suppress
from functools import partial, wraps
from html import escape
from pathlib import Path

from spgdd.diagnosis import Diagnoser
from spgdd.errors import ImageError, SpgddError
from spgdd.images import list_images, read_header
from spgdd.report import summary
from spgdd.ui.session import RATES, Session, explain, saying

log = logging.getLogger(__name__)
PIXELS, PICTURES, WAITING = 50_000_000, 64, 16  # at most: of a picture, pictures at once, requests that wait
# Two requests at a time: while a long answer is given to one visitor, the picture of another is looked at.
WORK = {"concurrency_id": "model", "concurrency_limit": 2, "trigger_mode": "multiple"}
PAGE = {"api_visibility": "private", "show_progress": "hidden"}  # of what only the page itself calls
QUICK = {"queue": False, "trigger_mode": "always_last", **PAGE}
SEVERAL = {"file_count": "multiple", "file_types": ["image"], "height": 160}


def build(diagnoser: Diagnoser, examples: str | Path | None = None, seconds: float = 60):
    """The page. ``examples``: a folder of folders named as their product: pictures in doubt, and a folder ``good``.

    An answer is cut off after so many seconds.
    """
    import gradio as gr

    folders = sorted(Path(examples).iterdir()) if examples else []
    samples = [(str(picture), folder) for folder in folders for picture in list_images(folder)]
    with gr.Blocks(title="Diagnose a part", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        state, data = gr.State(None, time_to_live=3600), gr.JSON(visible=False)
        gr.Markdown(f"# Diagnose a part\nModel: {diagnoser.model.profile.name}. Its verdict is advice.")
        with gr.Row():
            with gr.Column(min_width=300):
                doubt = gr.File(label="Pictures in doubt", **SEVERAL)
                good = gr.File(label="Good parts, four or more", **SEVERAL)
                with gr.Accordion("Or a saved memory of good parts", open=False):
                    memory = gr.File(label="Memory", file_types=[".safetensors"])
                product = gr.Textbox("object", label="Product", max_length=100)
                with gr.Row():
                    start, stop = gr.Button("Diagnose", variant="primary"), gr.Button("Stop", min_width=90)
                status = gr.HTML()
                offered = gr.Gallery([(picture, folder.name) for picture, folder in samples], label="Examples",
                                     columns=2, height="auto", allow_preview=False, interactive=False, buttons=[],
                                     visible=bool(samples))  # fmt: skip
            with gr.Column(scale=2, min_width=300):
                names = gr.Radio([], label="Pictures: step with the arrow keys", visible=False)
                image = gr.Image(label="Picture and map", interactive=False, format="jpeg", visible=False,
                                 buttons=["fullscreen", "download"])  # fmt: skip
                opacity = gr.Slider(0, 1, 0.6, label="Map opacity")
                box = gr.Textbox(label="Ask about a rectangle only: click two corners in the picture, or type them",
                                 placeholder="left, top, right, bottom in pixels", max_length=50)  # fmt: skip
                rate = gr.Slider(*RATES, 0.05, step=0.01, label="False alarms: good parts above the threshold")
                facts = gr.HTML()
            with gr.Column(min_width=300):
                chat = gr.Chatbot(label="Conversation", render_markdown=False, feedback_options=None, buttons=[])
                question = gr.Textbox(label="Question", placeholder="Is there any anomaly?", max_length=1000)
                with gr.Row():
                    ask, undo, clear = (gr.Button(name, min_width=60) for name in ("Ask", "Undo", "Clear"))
                with gr.Accordion("How it answers", open=False):
                    length = gr.Slider(8, 512, 128, step=1, label="Longest answer, in tokens")
                    temperature = gr.Slider(0, 1.5, 0, label="Temperature (0 takes the likeliest word)")
                    top_p = gr.Slider(0.1, 1, 1, label="Top-p")
                save = gr.Button("Save")
                files = gr.File(label="Saved", file_count="multiple", interactive=False, visible=False)

        # What the page calls. A visitor has no session, None, until there is work.

        def listing(session, **chosen):
            rows = [(line, row) for row, line in enumerate(session.verdicts() if session else ())]
            return {names: gr.Radio(rows, visible=len(rows) > 1, **chosen)}

        def view(session, opacity, box="", **chosen):
            seen = {image: gr.Image(visible=False), facts: "", **listing(session, **chosen)}
            if session and session.shown:
                drawn = gr.Image(session.picture(opacity, rectangle(box)), alt_text=session.caption(), visible=True)
                seen |= {image: drawn, facts: summary(session.shown)}
            return seen

        def talk(session, asked=""):
            turns = session.shown.turns if session and session.shown else ()
            said = [each for turn in turns for each in zip(("user", "assistant"), turn, strict=True)]
            return {chat: [{"role": role, "content": text} for role, text in [*said, ("user", asked)] if text]}

        def look(session, row, doubt, good, memory, product, rate, opacity, *how):
            """Remember and open what is new, show a picture, ask the first question, score the pictures without one."""
            doubt, good = checked(doubt), checked(good) or [memory] * bool(memory)
            if not doubt:
                raise SpgddError("There is no picture in doubt yet: choose one, or click an example.")
            if session.source != (good, product):
                for said in session.remember(good, product):
                    yield {status: saying(said)}
                session.source = good, product
            if doubt != list(session.scores):
                session.open(doubt)
                row = 0
            session.rate = rate
            try:
                session.show(doubt[row or 0])
            finally:  # nothing is shown of a picture that cannot be read
                seen = view(session, opacity, value=row or 0)
                yield {state: session, box: "", **talk(session), **seen}
            yield from answer(session, "", *how)
            for said in session.survey():
                yield {status: saying(said or session.known), **listing(session)}

        def answer(session, asked, length, temperature, top_p, box=""):
            yield {question: "", **talk(session, asked)}
            options = {"max_new_tokens": length, "temperature": temperature, "top_p": top_p}
            for said in session.ask(asked, rectangle(box), seconds, **options):
                yield {status: saying(said or session.known), **talk(session)}
            yield {facts: summary(session.shown)}

        def keep(session, opacity):
            saved = session.save(tempfile.mkdtemp(dir=session.folder.name), opacity)
            yield {files: gr.File(list(map(str, saved)), visible=True)}

        def work(steps):
            """A handler of long work, which ends when newer work of the same visitor begins.

            Its errors reach the visitor in plain words, and the log in full.
            """

            @wraps(steps)
            def begun(session, *inputs):
                session = session or Session(diagnoser)
                try:
                    yield from session.run(steps(session, *inputs))
                except Exception as error:
                    log.warning("a visitor was told of an error", exc_info=error)
                    raise gr.Error(escape(explain(error)), print_exception=False) from None

            return begun

        def move(session, rate, opacity, box):
            if session:
                session.rate = rate
            return view(session, opacity, box)

        def corner(event: gr.SelectData, session, box):
            """A click in the picture: the first corner of a rectangle, or the one across."""
            scale, first = session.shown.views.width / session.picture().width, f"{box}, " * (box.count(",") == 1)
            return first + ", ".join(str(int(place * scale)) for place in event.index)

        def choose(event: gr.SelectData):
            picture, folder = samples[event.index]
            return [picture], list(map(str, list_images(folder / "good"))), None, folder.name

        def forget(change, session):
            return (change(session) or talk(session)) if session else {chat: []}

        how, found = [length, temperature, top_p], [state, status, question, chat, names, image, facts, box]
        given, talked = [state, names, doubt, good, memory, product, rate, opacity, *how], [state, question, *how, box]
        chosen = offered.select(choose, None, [doubt, good, memory, product], **QUICK)
        works = [gr.on([start.click, names.input], work(look), given, found, **WORK, **PAGE),
                 chosen.then(work(look), given, found, **WORK, **PAGE),
                 gr.on([ask.click, question.submit], work(answer), talked, found, **WORK, **PAGE),
                 save.click(work(keep), [state, opacity], files, **WORK, **PAGE)]  # fmt: skip
        gr.on([each.change for each in (rate, opacity, box)], move, [state, rate, opacity, box], found, **QUICK)
        image.select(corner, [state, box], box, **QUICK)
        stop.click(partial(forget, Session.stop), state, chat, cancels=works, **QUICK)
        undo.click(partial(forget, Session.undo), state, chat, **QUICK)
        gr.on([clear.click, chat.clear], partial(forget, Session.clear), state, chat, **QUICK)

        # What programs call; each call stands for itself.

        def remember(session, good, product):
            """Encode pictures of good parts once: a memory file, which `/diagnose` takes."""
            if not checked(good):
                raise SpgddError("There is no good picture to remember: give at least one, better four.")
            list(session.remember(good, product))
            yield str(session.reference.save(f"{session.folder.name}/memory.safetensors"))

        def diagnose(session, pictures, good, memory, product, question, false_alarm_rate, max_new_tokens, temperature,
                     top_p):  # fmt: skip
            """Diagnose pictures by good ones or a memory, and ask each line of the question about each of them.

            JSON of each picture, and each picture with its map.
            """
            session.rate, results, drawn = false_alarm_rate, [], []
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
            list(session.remember(checked(good) or [memory] * bool(memory), product))
            for picture in checked(pictures):
                session.show(picture)
                for line in question.splitlines() or [""]:
                    list(session.ask(line, None, seconds, **options))
                results.append(session.shown.to_dict())
                drawn.append(f"{session.folder.name}/{len(drawn)}.png")
                session.picture().save(drawn[-1])
            yield results, drawn

        asked = [state, doubt, good, memory, product, question, rate, *how]
        gr.Button(visible=False).click(work(remember), [state, good, product], files, **WORK)
        gr.Button(visible=False).click(work(diagnose), asked, [data, files], **WORK)
    return page.queue(max_size=WAITING)


def checked(pictures: list[str] | None) -> list[str]:
    """Uploaded pictures. ImageError for too many, or one of too many pixels, which is seen without decoding it."""
    pictures = [str(picture) for picture in pictures or []]
    if len(pictures) > PICTURES:
        raise ImageError(f"{len(pictures)} pictures at once, more than the {PICTURES} that are taken here.")
    for picture in pictures:
        width = height = 0
        with suppress(ImageError):  # said when it is read
            width, height, _ = read_header(picture)
        if width * height > PIXELS:
            raise ImageError(f"{Path(picture).name}: {width} x {height} are {width * height / 1e6:.0f} million pixels, "
                             f"more than the {PIXELS / 1e6:.0f} that are taken here. Shrink it.")  # fmt: skip
    return pictures


def rectangle(text: str) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of a rectangle of which two corners are given; None where they enclose nothing."""
    edges = [int(number) for number in re.findall(r"\d+", text)]
    (left, right), (top, bottom) = (sorted(edges[i::2]) if len(edges) == 4 else (0, 0) for i in (0, 1))
    return (left, top, right, bottom) if left < right and top < bottom else None
