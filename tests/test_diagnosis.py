"""The main job: boxes where the defect is, a threshold that keeps its promise, results that repeat."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import check
from fake_model import FakeModel, part
from spgdd.agreement import asks_for, says_defective
from spgdd.calibration import ZERO_SHOT, Calibration, Limits
from spgdd.diagnosis import Diagnoser
from spgdd.errors import ImageError, SpgddError
from spgdd.files import write_text
from spgdd.loading import load_model
from spgdd.report import Report, summary
from spgdd.selfprompt import Evidence
from test_model import IMAGES, MAP_ATOL, RUNS, TINY_PROFILE, reduced_tokenizer, weights  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def diagnoser():
    return Diagnoser(FakeModel())


@pytest.fixture(scope="module")
def reference(diagnoser):
    return diagnoser.reference([part(seed=seed) for seed in range(1, 6)], "metal nut")


@pytest.fixture(scope="module")
def tiny(weights):  # noqa: F811
    """The real network with the reference's tiny weights."""
    model = load_model(dataclasses.replace(TINY_PROFILE, fit="crop"), weights, device="cpu")
    model.text_tokenizer = reduced_tokenizer
    return model


def test_exif_rotated_picture_is_diagnosed_as_it_is_shown(tmp_path, diagnoser, reference):
    upright = part((300, 600), [(60, 500, 12, 24)])
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    turned, straight = (diagnoser.diagnose(image, reference) for image in (tmp_path / "phone.png", upright))
    np.testing.assert_array_equal(turned.anomaly_map, straight.anomaly_map)
    assert turned.regions == straight.regions and turned.regions[0].place == "bottom left"


# Verdict


@pytest.mark.parametrize(
    ("score", "verdict"), [(0.1, "normal"), (0.24, "unsure"), (0.26, "unsure"), (0.5, "defective")]
)
def test_verdict_and_regions_belong_together(monkeypatch, diagnoser, reference, score, verdict):
    monkeypatch.setattr(Calibration, "limits", lambda self, rate: Limits(0.25, 0.2, 0.3, 0.05))
    values = torch.zeros(1, 1, 16, 16)
    values[..., 0, 15] = score  # in the corner, where enlarging keeps the highest value
    monkeypatch.setattr(diagnoser.model, "evidence", lambda *_: Evidence(values, "distance"))
    found = diagnoser.diagnose(part(), reference)
    assert found.verdict == verdict and found.score == pytest.approx(score)
    assert len(found.regions) == (verdict != "normal")


def test_without_normals_the_verdict_is_marked_as_not_calibrated(diagnoser):
    found = diagnoser.diagnose(part(marks=[(80, 80, 20, 20)]), product="plate")
    assert found.limits == ZERO_SHOT and found.verdict == "unsure"  # redness 190 / 255 is between 0.6 and 0.8
    assert diagnoser.diagnose(part(), product="plate").verdict == "normal"
    assert found.to_dict()["calibration"] == "none" and found.normals == ()
    assert "not calibrated" in found._repr_html_()


# Words


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes, there is an anomaly.", True), ("No, there is no anomaly in the image.", False), ("yes", True),
     ("  No.\nYes, it is fine.", False), ("The part is fine.", None), ("Yes and no.", None), ("", None),
     ("Note the scratch", None), ("Nothing", None), ("Yes, I see no defect.", None), ("Yes, it is not damaged", None),
     ('"Yes", it is', True), ("It is not normal. Yes.", None)],
)  # fmt: skip
def test_yes_and_no_are_parsed_and_never_guessed(text, said):
    assert says_defective(text) is said


def test_agreement(diagnoser, reference):
    found = diagnoser.diagnose(part(marks=[(80, 80, 20, 20)]), reference)
    assert found.verdict == "defective"
    for text, agreement in [("Yes.", "agree"), ("No.", "disagree"), ("Perhaps.", "unparsed")]:
        assert dataclasses.replace(found, text=text).agreement == agreement
    assert dataclasses.replace(found, verdict="normal", text="No.").agreement == "agree"
    assert dataclasses.replace(found, verdict="unsure", text="No.").agreement == "undecided"
    for question, text, said in [
        ("Is it all right, without damage?", "Yes.", "disagree"), ("Is the part OK?", "No.", "agree"),
        ("Does it have a scratch?", "Yes.", "agree"), ("Does it have a scratch?", "No.", "not asked"),
        ("Is it red?", "No.", "not asked"),
    ]:  # fmt: skip
        assert dataclasses.replace(found, question=question, text=text).agreement == said, question


@pytest.mark.parametrize(
    ("question", "about"),
    [("This is a photo of a nut. Is there any anomaly in the image?", "defect"), ("Is this part defective?", "defect"),
     ("Is anything wrong?", "defect"), ("Are there any\ndefects?", "defect"), ("Can you see a crack?", "kind"),
     ("Does it have a scratch?", "kind"), ("Is this part OK?", "good"), ("Is it free of any damage?", "good"),
     ("Where is the defect?", None), ("What kind of defect is it?", None), ("How large is the scratch?", None),
     ("Is it red?", None), ("", None)],
)  # fmt: skip
def test_what_a_question_asks_for(question, about):
    assert asks_for(question) == about


def test_question_history_and_follow_up_do_not_encode_again():
    model = FakeModel()
    diagnoser = Diagnoser(model)
    reference = diagnoser.reference([part(seed=1), part(seed=2)], product="metal nut")
    assert model.encoded == 2
    first = diagnoser.diagnose(part(), reference)
    assert model.encoded == 3
    assert first.question == "This is a photo of a metal nut. Is there any anomaly in the image?"
    second = first.ask("Where is it?")
    third = second.ask("How large?")
    assert model.encoded == 3
    assert second.history == ((first.question, first.text),) and first.history == ()
    assert model.asked[-1] == ("How large?", (*second.history, ("Where is it?", second.text)))
    assert third.score == first.score and third.regions is first.regions
    other = diagnoser.diagnose(part(), reference, question="Is it round?", history=[("Hello", "Hi")])
    assert model.asked[-1] == ("Is it round?", (("Hello", "Hi"),)) and other.product == "metal nut"


def test_an_answer_comes_word_by_word_and_stops_when_nobody_listens():
    diagnoser = Diagnoser(FakeModel())
    found = diagnoser.diagnose(part(), [part(seed=1)], answer=False)
    assert found.text == "" and found.turns == ()
    *parts, whole = found.stream("Is it good?")
    assert len(parts) == 1 and whole.text.startswith(parts[0].text) and whole.text != parts[0].text
    assert whole.turns == found.ask("Is it good?").turns and whole.square_map is found.square_map
    assert next(whole.stream("And now?")).history == whole.turns


def test_a_rectangle_is_asked_about_alone():
    diagnoser = Diagnoser(FakeModel())
    found = diagnoser.diagnose(part(marks=[(240, 60, 20, 20)]), [part(seed=1)])
    assert found.verdict == "defective" and found.text.startswith("Yes")
    without, within = (found.ask("Is anything wrong?", box=box) for box in ((0, 150, 120, 300), (200, 20, 290, 100)))
    assert without.text.startswith("No") and within.text.startswith("Yes")
    assert diagnoser.model.asked[-1] == ("Is anything wrong?", ()), "an earlier answer speaks of the whole picture"
    assert within.turns[-1][0].endswith("In the rectangle 200, 20, 290, 100 alone.")
    assert without.agreement == "not asked", "an answer about a part is not compared with the verdict on the whole"
    with pytest.raises(SpgddError, match="300 x 300"):
        found.ask("Is anything wrong?", box=(300, 0, 310, 9))


# Results


@pytest.mark.parametrize("run", [run for run in RUNS if not run["web_demo"]], ids=lambda run: run["name"])
def test_diagnosis_equals_the_published_one(tiny, monkeypatch, run):
    """From the pictures to the score and the answer, as AnomalyGPT's own code has it."""
    stream, answers = tiny.language.stream, []
    monkeypatch.setattr(
        tiny.language, "stream", lambda *given: (answers.append(answer) or answer for answer in stream(*given))
    )
    image, *normals = (
        np.asarray(Image.open(IMAGES / name).convert("RGB"))  # as published: EXIF is not looked at
        for name in (run["image"], *run["normal_images"])
    )
    found = Diagnoser(tiny).diagnose(
        image, normals or None, run["class_used"], run["prompt"], max_new_tokens=run["max_new_tokens"]
    )
    check(f"{run['name']}.score", found.score, run["map_max"], atol=MAP_ATOL)
    assert answers[-1].ids == run["new_tokens"] and found.text == answers[-1].text.strip()
    assert len(found.calibration.scores) == {0: 0, 1: 4, 2: 2}[len(normals)]


def test_two_runs_give_the_same_json(tmp_path):
    for seed in range(3):
        part(seed=seed, marks=[(250, 150, 15, 15)] * (seed == 0)).save(tmp_path / f"{seed}.png")
    runs = [
        Diagnoser(FakeModel()).diagnose(tmp_path / "0.png", [tmp_path / "1.png", tmp_path / "2.png"]).to_json()
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    result = json.loads(runs[0])
    assert result["image"] == str(tmp_path / "0.png") and result["size"] == [300, 300]
    assert result["verdict"] == "defective" and result["score"] > result["unsure_between"][1]
    assert result["map"]["min"] <= result["map"]["p50"] <= result["map"]["p99"] <= result["map"]["max"]
    assert result["regions"][0]["place"] == "right" and "timings" not in result


def test_timings_are_given_when_asked_for(diagnoser):
    found = diagnoser.diagnose(part(), [part(seed=1)])
    assert list(found.to_dict(timings=True)["timings"]) == ["read", "reference", "encode", "map", "text"]


def test_folder_of_normals_and_reference_give_the_same(tmp_path, diagnoser):
    for seed in range(3):
        part(seed=seed).save(tmp_path / f"{seed}.png")
    by_folder = diagnoser.diagnose(part(seed=9), tmp_path)
    by_reference = diagnoser.diagnose(part(seed=9), diagnoser.reference(sorted(tmp_path.iterdir())))
    assert by_folder.to_json() == by_reference.to_json()
    assert by_folder.normals == tuple(str(tmp_path / f"{seed}.png") for seed in range(3))


def test_a_query_that_is_a_normal_is_noted(diagnoser, reference):
    assert any("one of the normal" in note for note in diagnoser.diagnose(part(seed=1), reference).notes)
    assert not diagnoser.diagnose(part(seed=9), reference).notes


def test_errors(tmp_path, monkeypatch, diagnoser, reference):
    with pytest.raises(ImageError, match="normals is empty"):
        diagnoser.diagnose(part(), [])
    with pytest.raises(ImageError, match="no picture"):
        diagnoser.reference(tmp_path)
    with pytest.raises(ImageError, match=r"lost\.png"):
        diagnoser.diagnose(part(), ["lost.png"])
    values = torch.full((1, 1, 16, 16), torch.nan)
    monkeypatch.setattr(diagnoser.model, "evidence", lambda *_: Evidence(values, "distance"))
    with pytest.raises(SpgddError, match="not finite"):
        diagnoser.diagnose(part(), reference)


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (2000, 40)])
def test_odd_sizes_work(diagnoser, reference, size):
    found = diagnoser.diagnose(part(size), reference)
    assert found.anomaly_map.shape == (size[1], size[0])
    assert all(0 <= r.box[0] < r.box[2] <= size[0] and 0 <= r.box[1] < r.box[3] <= size[1] for r in found.regions)
    assert len(found._repr_html_()) < 200_000


# Report


def test_card_is_small_escaped_and_complete(tmp_path, diagnoser):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    noise.save(tmp_path / "<b>&.png")
    found = diagnoser.diagnose(tmp_path / "<b>&.png", [part(seed=1), part(seed=2)], product="<i>nut</i>")
    html = dataclasses.replace(found, text="<script>1</script>")._repr_html_()
    assert len(html) < 200_000
    assert "<script" not in html and "<i>nut" not in html and "&lt;b&gt;&amp;.png" in html
    assert found.verdict in html and f"{found.score:.3f}" in html and html.count("data:image/jpeg;base64,") == 2
    assert not re.search(r"https?://|src=\"(?!data:)", html)


def test_summary_has_a_column_for_each_score_of_a_normal_picture(diagnoser, reference):
    found = diagnoser.diagnose(part(), reference)
    html = summary(found)
    heights = [float(height) for height in re.findall(r'<i style="height:([\d.]+)%"', html)]
    assert len(heights) == 40 and 1 <= sum(height > 0 for height in heights) <= len(reference.calibration.scores)
    assert max(heights) == 100 and found.verdict in html and "data:image" not in html


def test_report_page(tmp_path, diagnoser, reference):
    found = [diagnoser.diagnose(part(seed=seed), reference) for seed in (7, 8)]
    path = Report(found, ["bad.png: <damaged>"]).save(tmp_path / "new" / "page.html")
    page = path.read_text()
    assert page.count('<article id="d') == 2 and page.count("<style>") == 2 and 'href="#d1"' in page
    assert "bad.png: &lt;damaged&gt;" in page and "normal" in page
    assert found[0].save_report(tmp_path / "one.html").read_text().count("<article") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "one.html"]


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SpgddError, match=r"a\.json: cannot be written .No space"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
