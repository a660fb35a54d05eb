"""What panel and web demo share: one person's pictures and talk. And the panel without a browser."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fake_model import FakeModel, part
from spgdd import reference
from spgdd.diagnosis import Diagnoser
from spgdd.errors import ImageError, SpgddError
from spgdd.images import read_image
from spgdd.ui.diagnosis_panel import diagnosis_panel
from spgdd.ui.session import Session, explain

MARK = (240, 60, 20, 20)


@pytest.fixture
def folder(tmp_path):
    """Five good pictures, a good and a defective one in doubt, and a text that calls itself a picture."""
    for name, marks, seed in (("doubt/1", [], 8), ("doubt/10", [MARK], 9), *((f"good/{n}", [], n) for n in range(5))):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        part(marks=marks, seed=seed).save(path)
    (tmp_path / "doubt" / "2.png").write_text("no picture")
    return tmp_path


@pytest.fixture
def session(folder):
    session = Session(Diagnoser(FakeModel()))
    list(session.remember(sorted((folder / "good").iterdir()), " nut "))
    session.open(sorted((folder / "doubt").iterdir()))
    return session


def test_good_pictures_are_encoded_once_each_with_progress(session, folder):
    again = Session(Diagnoser(FakeModel()))
    said = list(again.remember(sorted((folder / "good").iterdir()), ""))
    assert said == [f"Good picture {number} of 5 ..." for number in range(1, 6)]
    assert again.diagnoser.model.encoded == 5 and again.product == "object" and session.product == "nut"
    direct = again.diagnoser.reference(folder / "good")
    assert again.reference.calibration == direct.calibration
    assert again.reference.bank.tokens.equal(direct.bank.tokens)
    assert again.reference.normals == tuple(f"{number}.png" for number in range(5)), "folders are not told"
    assert again.known == "5 good pictures of object remembered."


def test_a_good_picture_that_cannot_be_read_is_left_out_and_named(session, folder, monkeypatch):
    opened = []
    monkeypatch.setattr(reference, "read_image", lambda *source: opened.append(source) or read_image(*source))
    list(session.remember([folder / "good" / "1.png", folder / "doubt" / "2.png"], "nut"))
    assert len(opened) == 2, "each is decoded once"
    assert session.known.startswith("1 good picture of nut remembered. Left out: 2.png: ")
    assert str(folder) not in session.known
    with pytest.raises(ImageError, match="No good picture can be used.*2.png"):
        list(session.remember([folder / "doubt" / "2.png"], "nut"))


def test_pictures_are_shown_and_scored(session, folder):
    good, broken, bad = (str(folder / "doubt" / name) for name in ("1.png", "2.png", "10.png"))
    assert session.shown is None and session.verdicts() == ["1.png", "10.png", "2.png"]
    session.show(good)
    assert session.shown.verdict == "normal" and session.shown.image == "1.png" and session.shown.turns == ()
    assert list(session.survey())[:-1] == ["Picture 2 of 3 ...", "Picture 3 of 3 ..."]
    assert session.shown.image == "1.png", "scoring the others does not show them"
    lines = session.verdicts()
    assert lines[0].startswith("1.png: normal, ") and lines[1].startswith("10.png: defective, ")
    assert lines[2] == "2.png: not readable"
    with pytest.raises(ImageError, match="2.png"):
        session.show(broken)
    assert session.shown is None, "the picture before is not shown as if it were this one"
    session.show(bad)
    assert "10.png with its heat map: defective, score" in session.caption()


def test_the_rate_moves_all_verdicts_at_once_and_encodes_nothing(session):
    session.show(next(iter(session.scores)))
    list(session.survey())
    encoded, threshold = session.diagnoser.model.encoded, session.shown.threshold
    session.rate = 0.4
    assert session.shown.threshold < threshold and session.shown.false_alarm_rate == 0.4
    limits = session.shown.limits
    assert session.verdicts()[0].startswith(f"1.png: {limits.verdict(session.shown.score)}")
    assert session.diagnoser.model.encoded == encoded


def test_talk_is_asked_undone_and_cleared(session):
    with pytest.raises(SpgddError, match="No picture is shown yet"):
        list(session.ask("Is it good?"))
    session.show(next(iter(session.scores)))
    assert list(session.ask()) == ["Answering ...", "Answering ...", ""]
    list(session.ask("Where?"))
    asked = [question for question, _ in session.shown.turns]
    assert asked == ["This is a photo of a nut. Is there any anomaly in the image?", "Where?"]
    session.undo()
    assert [question for question, _ in session.shown.turns] == asked[:1]
    list(session.ask("Again?", (0, 0, 100, 100)))
    assert session.shown.turns[-1][0].startswith("Again?") and "0, 0, 100, 100" in session.shown.turns[-1][0]
    session.clear()
    session.undo()
    assert session.shown.turns == () and session.shown.image == "1.png"


def test_an_answer_ends_where_it_is_stopped_undone_or_too_late(session):
    session.show(next(iter(session.scores)))
    work = session.run(session.ask("Is it good?"))
    next(work)
    session.stop()
    assert list(work) == [] and session.shown.text == "No,", "what was said remains"
    work = session.run(session.ask("And now?"))
    next(work)
    session.undo()
    assert list(work) == [] and len(session.shown.turns) == 1, "what was undone does not come back"
    work, newer = session.run(session.ask("One?")), session.run(session.ask("Two?"))
    next(work), next(newer)
    assert list(work) == [] and list(newer) != [], "newer work ends the older"
    session.clear()
    assert list(session.ask("Slow?", seconds=0)) == ["The answer was cut off after 0 seconds."]
    assert session.shown.text == "No,"


def test_without_a_language_part_the_map_speaks_and_a_question_is_refused(folder):
    model = FakeModel()
    model.language = None
    session = Session(Diagnoser(model))
    session.open([folder / "doubt" / "10.png"])
    session.show(*session.scores)
    assert list(session.ask()) == [] and session.shown.turns[0][1].startswith("By the map alone")
    with pytest.raises(SpgddError, match="without a language part"):
        list(session.ask("Where?"))


def test_everything_is_saved_and_a_memory_is_taken_again(session, folder, tmp_path):
    with pytest.raises(SpgddError, match="Nothing to save yet"):
        session.save(tmp_path)
    session.product = "../nut & bolt"
    session.show(str(folder / "doubt" / "10.png"))
    report, data, overlay, memory = session.save(tmp_path / "saved")
    assert sorted((tmp_path / "saved").iterdir()) == sorted([report, data, overlay, memory])
    assert memory.name == "_nut_bolt.safetensors" and json.loads(data.read_text())["verdict"] == "defective"
    assert "defective" in report.read_text() and str(folder) not in report.read_text() + data.read_text()
    assert Image.open(overlay).size == (480, 480)
    other = Session(session.diagnoser)
    list(other.remember([memory], "ignored"))
    assert other.product == "nut" and other.known == "5 good pictures of nut remembered."
    list(other.remember([], "bolt"))
    assert other.reference is None and other.known.startswith("No good picture is known")


def test_the_picture_shows_map_and_rectangle(session, folder):
    session.show(str(folder / "doubt" / "10.png"))
    box = 30, 150, 90, 240
    plain, mapped, framed = (np.asarray(session.picture(*given), int) for given in ((0,), (1,), (1, box)))
    mark = np.s_[64:128, 352:416]  # of the 300 pixels at 480
    assert np.abs(mapped - plain)[mark].mean() > 15 and np.abs(mapped - plain)[300:, :300].mean() < 3
    rows, columns = np.nonzero(np.abs(framed - mapped).sum(-1))
    edges = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
    assert np.abs(edges - np.array(box) * 1.6).max() < 4


def test_errors_are_explained_in_words_without_folders():
    assert explain(SpgddError("/tmp/gradio/12ab/my part.png: damaged.")) == "my part.png: damaged."
    assert "ZeroDivisionError" in explain(ZeroDivisionError()) and "log" in explain(ZeroDivisionError())


# The panel


def finish(panel):
    while panel.thread.is_alive():
        panel.thread.join()


def test_panel_begins_steps_asks_and_saves(folder):
    panel = diagnosis_panel(Diagnoser(FakeModel()), folder / "good", folder / "doubt", "nut", folder=folder / "kept")
    finish(panel)
    assert panel.names.value.endswith("1.png") and "normal" in panel.facts.value
    assert panel.known.value == "5 good pictures of nut remembered."
    assert "2.png: not readable" in panel.verdicts.value and "10.png: defective" in panel.verdicts.value
    assert "No, there is no anomaly." in panel.chat.value and 'alt="1.png with its heat map' in panel.image.value
    panel.step(1)
    finish(panel)
    assert 'role="alert">2.png: ' in panel.status.value and "ImageError" in panel.log.value and not panel.image.value
    panel.step(1)
    finish(panel)
    assert "10.png" in panel.facts.value and "defective" in panel.facts.value
    before = panel.image.value
    panel.opacity.value = 0.1
    assert panel.image.value != before
    panel.rate.value = 0.4
    assert "40% false alarms" in panel.facts.value
    panel.across.value, panel.down.value = (0, 100), (150, 300)
    panel.question.value = "Anything?"
    panel.work(panel.ask)
    finish(panel)
    assert "In the rectangle 0, 150, 100, 300 alone." in panel.chat.value
    panel.work(panel.save)
    finish(panel)
    assert {path.name for path in (folder / "kept").iterdir()} == {"10.html", "10.json", "10.png", "nut.safetensors"}
    panel.work(lambda: panel.open(folder / "doubt" / "1.png"), lambda: panel.remember([]))
    finish(panel)
    assert "No good picture is known" in panel.known.value and panel.browser.layout.display == "none"


def test_panel_stops_what_is_at_work(folder):
    panel = diagnosis_panel(Diagnoser(FakeModel()), pictures=folder / "doubt" / "1.png")
    finish(panel)

    def endless(*_, **__):
        while True:
            time.sleep(0.01)
            yield SimpleNamespace(text="well", yes=0.5)

    panel.session.diagnoser.model.language.stream = endless
    panel.work(panel.ask)
    time.sleep(0.1)
    assert panel.thread.is_alive()
    panel.work(lambda: ["Stopped."])
    finish(panel)
    assert "Stopped." in panel.status.value and "well" in panel.chat.value


@pytest.mark.parametrize("version", [7, 8])
def test_panel_takes_uploads_of_both_versions_of_ipywidgets(folder, version):
    panel = diagnosis_panel(Diagnoser(FakeModel()))
    content = memoryview((folder / "good" / "1.png").read_bytes())
    name = "../../part.png"
    value = {name: {"content": content}} if version == 7 else ({"name": name, "content": content},)
    (path,) = panel.keep(value)
    assert path.name == "part.png" and path.parent.parent == type(path)(panel.session.folder.name)
    assert Image.open(path).size == (300, 300)
