"""The main job: boxes where the defect is, a threshold that keeps its promise, results that repeat."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import check
from fake_model import FakeModel
from spgdd.calibration import Calibration, Limits, altered_copies, upper_bound
from spgdd.diagnosis import HELD_OUT, Diagnoser, says_defective
from spgdd.errors import ImageError, SpgddError
from spgdd.geometry import Placement, align, find_regions, place_of
from spgdd.imagebind.preprocess import to_pixels
from spgdd.model import load_model
from spgdd.report import save_report, write_text
from spgdd.selfprompt.focuser import enlarge
from test_model import IMAGES, MAP_ATOL, RUNS, TINY_PROFILE, reduced_tokenizer, weights  # noqa: F401 (a fixture)

GREY = (100, 110, 120)


def part(size=(300, 300), marks=(), seed=0):
    """A grey part with grain; ``marks`` are (x, y, half width, half height) in pixels, in red."""
    grain = np.random.default_rng(seed).normal(0, 6, (size[1], size[0], 3))
    picture = np.clip(np.array(GREY) + grain, 0, 255).astype(np.uint8)
    for x, y, dx, dy in marks:
        picture[int(y - dy) : int(y + dy), int(x - dx) : int(x + dx)] = (190, 60, 60)
    return Image.fromarray(picture)


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


# Where things are


@pytest.mark.parametrize("size", [(300, 600), (900, 400), (224, 224), (61, 50), (1000, 999)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_positions_agree_with_the_preprocessing(size, fit):
    """A picture that holds its own coordinates as colours gets them back through the model's square."""
    columns, rows = (np.arange(side) + 0.5 for side in size)
    colours = np.zeros((size[1], size[0], 3))
    colours[..., 0], colours[..., 1] = columns / size[0] * 255, rows[:, None] / size[1] * 255
    square = to_pixels(Image.fromarray(np.rint(colours).astype(np.uint8)), fit).numpy().astype(np.float32)
    placement = Placement(*size, fit)
    for axis in (0, 1):
        returned = placement.to_picture(square[axis])
        assert returned.shape == (size[1], size[0]) and returned.dtype == np.float32
        seen = np.isfinite(returned)
        assert seen.mean() == pytest.approx(placement.seen_share, abs=0.02)
        assert (fit == "squash") <= seen.all()
        inner = seen & (np.minimum(columns, size[0] - columns) > 0.02 * size[0])
        inner &= (np.minimum(rows, size[1] - rows) > 0.02 * size[1])[:, None]
        # 255 colours over the picture; half a pixel of the square is the least that a shifted map is off
        assert np.abs(returned - colours[..., axis])[inner].mean() < 0.35


def marker_error(found, x, y, patch):
    """Distance of the map's half-height centroid from a place, in patches, x and y."""
    heat = np.nan_to_num(found.anomaly_map)
    rows, columns = np.nonzero(heat > heat.max() / 2)
    return np.abs([(columns.mean() + 0.5 - x) / patch[0], (rows.mean() + 0.5 - y) / patch[1]])


@pytest.mark.parametrize("size", [(300, 600), (900, 400), (224, 224)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)])
def test_marker_is_found_where_it_is(size, fit, corner):
    diagnoser = Diagnoser(FakeModel(fit))
    patch = [side / 16 for side in size] if fit == "squash" else [min(size) / 16] * 2
    span = size if fit == "squash" else [min(size)] * 2  # a centre crop: the corners of what is seen
    x, y = (
        (whole - seen) / 2 + p / 2 + c * (seen - p)
        for whole, seen, p, c in zip(size, span, patch, corner, strict=True)
    )
    found = diagnoser.diagnose(
        part(size, [(x, y, patch[0] / 2, patch[1] / 2)]), [part(size, seed=s) for s in (1, 2, 3)]
    )
    assert found.anomaly_map.shape == (size[1], size[0])
    assert marker_error(found, x, y, patch).max() < 0.15
    x0, y0, x1, y1 = found.regions[0].box
    assert x0 <= x <= x1 and y0 <= y <= y1
    assert max((x1 - x0) / patch[0], (y1 - y0) / patch[1]) <= 4
    if fit == "crop" and size[0] != size[1]:
        assert np.isnan(found.anomaly_map).any() and any("not seen" in note for note in found.notes)
    else:
        assert np.isfinite(found.anomaly_map).all() and not found.notes


def test_exif_rotated_picture_is_diagnosed_as_it_is_shown(tmp_path, diagnoser, reference):
    upright = part((300, 600), [(60, 500, 12, 24)])
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    turned, straight = (diagnoser.diagnose(image, reference) for image in (tmp_path / "phone.png", upright))
    np.testing.assert_array_equal(turned.anomaly_map, straight.anomaly_map)
    assert turned.regions == straight.regions and turned.regions[0].place == "bottom left"


def test_align_puts_every_patch_value_on_its_patch():
    values = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    aligned = align(enlarge(values)[0, 0].numpy())
    centres = slice(7, 224, 14)  # the patch's centre lies between pixels 6 and 7
    expected = values[0, 0].numpy()
    middle = (aligned[6:223:14, 6:223:14] + aligned[centres, centres]) / 2
    assert np.abs(middle - expected).max() < 0.12  # bilinear kinks lie between pixels
    np.testing.assert_allclose(aligned[0, 0], expected[0, 0], atol=1e-6)
    np.testing.assert_allclose(aligned[-1, -1], expected[-1, -1], atol=1e-6)


def test_regions_are_separate_sorted_and_free_of_specks():
    square = np.zeros((224, 224), np.float32)
    square[10:40, 20:60] = 0.6
    square[150:224, 200:224] = 0.9
    square[100:103, 100:103] = 0.95  # a speck
    square[60:90, 150:180] = 0.3  # above the outline, but never reaches the verdict's limit
    regions = find_regions(square, 0.2, 0.5, Placement(448, 224, "squash"))
    assert [region.box for region in regions] == [(400, 150, 448, 224), (40, 10, 120, 40)]
    assert [region.place for region in regions] == ["bottom right", "top left"]
    assert regions[1].area_share == pytest.approx(30 * 40 / 224**2)
    assert regions[0].peak == pytest.approx(0.9)
    square[:] = 0
    square[100:103, 100:103] = 0.95
    assert len(find_regions(square, 0.2, 0.5, Placement(224, 224, "squash"))) == 1  # nothing else is there
    assert find_regions(square, 0.99, 0.99, Placement(224, 224, "squash")) == ()


@pytest.mark.parametrize(
    ("box", "place"),
    [((0, 0, 200, 200), "top left"), ((100, 0, 300, 10), "top"), ((99, 149, 101, 151), "left"),
     ((200, 0, 201, 10), "top right"), ((199, 290, 201, 300), "bottom"), ((0, 99, 1, 102), "left"),
     ((149, 149, 151, 151), "center"), ((0, 99, 0, 101), "top left"), ((201, 201, 300, 300), "bottom right")],
)  # fmt: skip
def test_places_are_cut_at_thirds_and_the_cut_belongs_to_the_lower_cell(box, place):
    assert place_of(box, Placement(300, 300, "squash")) == place


# Threshold and verdict


@pytest.mark.parametrize("pictures", [2, 4, 10, 30])
@pytest.mark.parametrize("spread", [0.15, 0.3, 0.6])
def test_threshold_keeps_the_false_alarm_rate(pictures, spread):
    """New normal pictures exceed it about as often as asked for, on average over many calibrations."""
    rng = np.random.default_rng(pictures)
    alarms = [
        rng.lognormal(-1, spread, 20)
        > upper_bound(tuple(rng.lognormal(-1, spread, pictures)), pictures, 0.05)[0]
        for _ in range(1500)
    ]
    assert np.mean(alarms) < (0.06 if spread <= 0.3 else 0.11)  # 0.6: twice what the prior expects
    assert np.mean(alarms) > (0.01 if spread >= 0.3 else 0.0)


def test_order_statistic_takes_over_with_enough_pictures():
    scores = tuple(np.random.default_rng(0).exponential(size=59))
    assert upper_bound(scores, 59, 0.05)[0] == sorted(scores)[56]  # ceil(60 * 0.95) = 57th
    assert upper_bound(scores[:18], 18, 0.05)[0] not in scores  # 19 is the least for 5 %
    assert upper_bound(scores[:19], 19, 0.05)[0] == max(scores[:19])


def test_lower_rate_means_higher_threshold_and_evidence_narrows_the_unsure_band():
    scores = (0.2, 0.22, 0.19, 0.21)
    few, many = (Calibration("leave-one-out", len(s), s, s) for s in (scores, scores * 4))
    thresholds = [few.limits(rate).threshold for rate in (0.2, 0.05, 0.01)]
    assert thresholds == sorted(thresholds)
    few, many = few.limits(0.05), many.limits(0.05)
    assert few.low < few.threshold < few.high
    assert many.high - many.low < 0.7 * (few.high - few.low)
    for rate in (0, 0.5, -1, 1):
        with pytest.raises(SpgddError, match="false_alarm_rate"):
            Calibration("none").limits(rate)


def test_each_normal_is_scored_without_itself(diagnoser):
    normals = [part(seed=1), part(seed=2), part(seed=3, marks=[(80, 80, 20, 20)])]
    scores = diagnoser.reference(normals).calibration.scores
    assert len(scores) == 3 and scores[2] > 20 * max(
        scores[:2]
    )  # the odd one is not in the memory that scores it
    bank = diagnoser.reference(normals).bank
    assert bank.tokens.shape[2] == 3 * 256


def test_single_normal_is_calibrated_on_altered_copies(diagnoser):
    reference = diagnoser.reference(part(seed=1))
    calibration = reference.calibration
    assert (calibration.method, calibration.pictures, len(calibration.scores)) == ("augmentations", 1, 8)
    assert diagnoser.diagnose(part(seed=2), reference).verdict == "normal"
    assert diagnoser.diagnose(part(seed=2, marks=[(90, 90, 20, 20)]), reference).verdict == "defective"


def test_altered_copies():
    pixels = to_pixels(part(seed=1, marks=[(30, 30, 20, 20)]))
    copies = altered_copies(pixels)
    assert len({copy.numpy().tobytes() for copy in [*copies, pixels]}) == 9
    assert all(copy.shape == pixels.shape and copy.dtype == torch.uint8 for copy in copies)
    quarters = [copy[0].float().unflatten(1, (2, 112)).unflatten(0, (2, 112)).mean((1, 3)) for copy in copies]
    assert [int(quarter.argmax()) for quarter in quarters] == [0, 0, 2, 2, 1, 1, 3, 3]  # where the mark is


def test_at_most_so_many_normals_are_held_out():
    model = FakeModel()
    normals = [part((16, 16), seed=seed) for seed in range(HELD_OUT + 6)]
    reference = Diagnoser(model).reference(normals)
    assert len(reference.calibration.scores) == reference.calibration.pictures == HELD_OUT
    assert model.encoded == len(normals)


def test_identical_normals_count_once(diagnoser):
    same = part(seed=1)
    assert diagnoser.reference([same, same.copy()]).calibration.method == "augmentations"
    assert diagnoser.reference([same, same, part(seed=2)]).calibration.pictures == 2


@pytest.mark.parametrize(
    ("score", "verdict"), [(0.1, "normal"), (0.24, "unsure"), (0.26, "unsure"), (0.5, "defective")]
)
def test_verdict_and_regions_belong_together(monkeypatch, diagnoser, reference, score, verdict):
    monkeypatch.setattr(Calibration, "limits", lambda self, rate: Limits(0.25, 0.2, 0.3, 0.05))
    heat = torch.zeros(1, 1, 224, 224)
    heat[..., 40:60, 100:120] = score
    monkeypatch.setattr(diagnoser.model, "anomaly_map", lambda *_: heat, raising=False)
    found = diagnoser.diagnose(part(), reference)
    assert found.verdict == verdict and found.score == pytest.approx(score)
    assert len(found.regions) == (verdict != "normal")


def test_without_normals_the_verdict_is_marked_as_not_calibrated(diagnoser):
    found = diagnoser.diagnose(part(marks=[(80, 80, 20, 20)]), product="plate")
    assert found.threshold == 0.5 and found.verdict == "defective"
    assert found.to_dict()["calibration"] == "none" and found.normals == ()
    assert "not calibrated" in found._repr_html_()


# Words


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes, there is an anomaly.", True), ("No, there is no anomaly in the image.", False), ("yes", True),
     ("  No.\nYes, it is fine.", False), ("The part is fine.", None), ("Yes and no.", None), ("", None),
     ("Note the scratch", None), ("Nothing", None), ('"Yes", it is', True), ("It is not normal. Yes.", None)],
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
    for question, asked in [
        ("Are there any\ndefects?", True),
        ("Where is the defect?", False),
        ("Is it red?", False),
    ]:
        assert (dataclasses.replace(found, question=question).agreement != "not asked") == asked


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


# Results


@pytest.mark.parametrize("run", [run for run in RUNS if not run["web_demo"]], ids=lambda run: run["name"])
def test_diagnosis_equals_the_published_one(tiny, monkeypatch, run):
    """From the pictures to the score and the answer, as AnomalyGPT's own code has it."""
    generate, answers = tiny.language.generate, []
    monkeypatch.setattr(
        tiny.language, "generate", lambda *arguments: answers.append(generate(*arguments)) or answers[-1]
    )
    image, *normals = (
        np.asarray(Image.open(IMAGES / name).convert("RGB"))  # as published: EXIF is not looked at
        for name in (run["image"], *run["normal_images"])
    )
    found = Diagnoser(tiny).diagnose(
        image, normals or None, run["class_used"], run["prompt"], max_new_tokens=run["max_new_tokens"]
    )
    check(f"{run['name']}.score", found.score, run["map_max"], atol=MAP_ATOL)
    assert answers[0].ids == run["new_tokens"] and found.text == answers[0].text.strip()
    assert len(found.calibration.scores) == {0: 0, 1: 8, 2: 2}[len(normals)]


def test_two_runs_give_the_same_json(tmp_path):
    for seed in range(3):
        part(seed=seed, marks=[(250, 150, 15, 15)] * (seed == 0)).save(tmp_path / f"{seed}.png")
    runs = [
        Diagnoser(FakeModel())
        .diagnose(tmp_path / "0.png", [tmp_path / "1.png", tmp_path / "2.png"])
        .to_json()
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
    monkeypatch.setattr(diagnoser.model, "anomaly_map", lambda *_: torch.full((1, 1, 224, 224), torch.nan))
    with pytest.raises(SpgddError, match="not finite"):
        diagnoser.diagnose(part(), reference)


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (2000, 40)])
def test_odd_sizes_work(diagnoser, reference, size):
    found = diagnoser.diagnose(part(size), reference)
    assert found.anomaly_map.shape == (size[1], size[0])
    assert all(
        0 <= r.box[0] < r.box[2] <= size[0] and 0 <= r.box[1] < r.box[3] <= size[1] for r in found.regions
    )
    assert len(found._repr_html_()) < 200_000


# Report


def test_card_is_small_escaped_and_complete(tmp_path, diagnoser):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    noise.save(tmp_path / "<b>&.png")
    found = diagnoser.diagnose(tmp_path / "<b>&.png", [part(seed=1), part(seed=2)], product="<i>nut</i>")
    html = dataclasses.replace(found, text="<script>1</script>")._repr_html_()
    assert len(html) < 200_000
    assert "<script" not in html and "<i>nut" not in html and "&lt;b&gt;&amp;.png" in html
    assert (
        found.verdict in html and f"{found.score:.3f}" in html and html.count("data:image/jpeg;base64,") == 2
    )
    assert not re.search(r"https?://|src=\"(?!data:)", html)


def test_report_page(tmp_path, diagnoser, reference):
    found = [diagnoser.diagnose(part(seed=seed), reference) for seed in (7, 8)]
    path = save_report(tmp_path / "new" / "page.html", found, ["bad.png: <damaged>"])
    page = path.read_text()
    assert page.count('<article id="d') == 2 and page.count("<style>") == 2 and 'href="#d1"' in page
    assert "bad.png: &lt;damaged&gt;" in page and "normal" in page
    assert found[0].save_report(tmp_path / "one.html").read_text().count("<article") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "one.html"]


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(
        "os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(SpgddError, match=r"a\.json: cannot be written .No space"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
