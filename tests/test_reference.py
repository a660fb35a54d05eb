"""Normal pictures, encoded once: a threshold that keeps its promise, and a file that holds all of it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fake_model import FakeModel, part
from spgdd import cli
from spgdd import reference as reference_module
from spgdd.calibration import PRIORS, Calibration, altered_copies, upper_bound
from spgdd.diagnosis import Diagnoser
from spgdd.errors import SpgddError, WeightsError
from spgdd.imagebind.preprocess import to_pixels
from spgdd.images import read_image
from spgdd.loading import load_model
from spgdd.reference import FORMAT, HELD_OUT, fingerprint, read_reference
from spgdd.tensors import read_sealed, write_tensors


@pytest.fixture(scope="module")
def diagnoser():
    return Diagnoser(FakeModel())


# Threshold


def draws(rng, size, spread, largest, middle=-1.5):
    """Scores whose log-odds are normally distributed."""
    return largest / (1 + np.exp(-(middle + spread * rng.normal(size=size))))


@pytest.mark.parametrize("pictures", [2, 4, 8, 18])
@pytest.mark.parametrize("largest", [1.0, 2.0])
@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_threshold_keeps_the_false_alarm_rate_where_products_are_as_the_prior_says(pictures, largest, rate):
    rng, prior = np.random.default_rng(pictures), PRIORS[largest]
    alarms = []
    for _ in range(2000):
        spread = prior.spread * np.sqrt(prior.weight / rng.chisquare(prior.weight))
        odds = rng.normal(size=pictures + 20) * min(spread, 1.5) - 1.5
        scores = largest / (1 + np.exp(-odds))
        alarms.append(scores[pictures:] > upper_bound(tuple(scores[:pictures]), pictures, rate, largest)[0])
    assert np.mean(alarms) == pytest.approx(rate, rel=0.3)


@pytest.mark.parametrize("spread", [0.1, 0.4])
def test_from_enough_pictures_on_the_rate_is_kept_whatever_the_distribution(spread):
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(1500):
        scores = 0.2 + spread * rng.exponential(size=80)
        alarms.append(scores[60:] > upper_bound(tuple(scores[:60]), 60, 0.05, 2.0)[0])
    assert 0.03 < np.mean(alarms) <= 0.055


@pytest.mark.parametrize("largest", [1.0, 2.0])
def test_threshold_of_a_single_picture_allows_for_what_copies_do_not_show(largest):
    rng, prior = np.random.default_rng(0), PRIORS[largest]
    alarms = []
    for _ in range(1500):
        middle = prior.shift + prior.error * rng.normal() - 1.5
        copies = draws(rng, 4, 0.05, largest)
        threshold = upper_bound(tuple(copies), 1, 0.05, largest)[0]
        alarms.append(draws(rng, 20, prior.spread, largest, middle) > threshold)
    assert 0.04 < np.mean(alarms) < 0.06


@pytest.mark.parametrize("pictures", [2, 4, 8])
def test_of_eyes_that_nothing_was_measured_with_the_normal_pictures_decide(pictures):
    """Products that vary three times as much as the prior says: with its weight the rate would be exceeded."""
    rng, alarms = np.random.default_rng(pictures), {True: [], False: []}
    for _ in range(2000):
        scores = draws(rng, pictures + 20, 3 * PRIORS[2.0].spread, 2.0)
        for measured, found in alarms.items():
            found.append(scores[pictures:] > upper_bound(tuple(scores[:pictures]), pictures, 0.05, 2.0, measured)[0])
    assert 0.04 < np.mean(alarms[False]) < 0.068 < np.mean(alarms[True])


def test_order_statistic_takes_over_with_enough_pictures():
    scores = tuple(np.random.default_rng(0).uniform(0.1, 0.5, size=59))
    assert upper_bound(scores, 59, 0.05, 2.0)[0] == pytest.approx(sorted(scores)[56])  # ceil(60 * 0.95) = 57th
    assert min(abs(np.array(scores) - upper_bound(scores[:39], 39, 0.05, 2.0)[0])) > 1e-6  # 40 is the least for 5 %
    assert upper_bound(scores[:40], 40, 0.05, 2.0)[0] == pytest.approx(sorted(scores[:40])[38])


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


def test_a_threshold_is_a_guess_with_fewer_than_four_normals_with_any_eyes():
    model, normals = FakeModel(measured=False), [part(seed=seed) for seed in range(4)]
    for count in (1, 3, 4):
        notes = Diagnoser(model).diagnose(part(seed=9), normals[:count], answer=False).notes
        assert any("its threshold is a guess" in note for note in notes) == (count < 4)


def test_limits_stay_possible_scores():
    for largest in (1.0, 2.0):
        for value in (0.0, 1e-7, 0.999999 * largest, largest):
            limits = Calibration("leave-one-out", 3, (value,) * 3, (value,) * 3, largest).limits(0.05)
            assert 0 < limits.low < limits.threshold < limits.high < largest


# Reference


@pytest.mark.parametrize(
    ("options", "joint"),
    [({}, 1), ({"tiles": 2}, 1), ({"rotate": True}, 1), ({"budget": 300}, 1), ({"tiles": 2, "rotate": True}, 2)],
)
def test_each_normal_is_scored_without_itself(options, joint):
    """The scores of one pass equal those of memories built again without each picture."""
    normals = [part(seed=1), part(seed=2), part(seed=3, marks=[(80, 80, 20, 20)])]
    model = FakeModel(joint=joint)
    diagnoser = Diagnoser(model)
    scores = diagnoser.reference(normals, **options).calibration.scores
    tiles = options.get("tiles", 1)
    runs = 1 if tiles == 1 else 2 if tiles <= joint else 1 + tiles**2  # of the tower, for one picture
    views = runs * (4 if options.get("rotate") else 1)
    assert model.encoded == 3 * views
    assert len(scores) == 3 and scores[2] > 20 * max(scores[:2])  # the odd one is not in the memory that scores it
    if "budget" not in options:  # the few entries of a budget are chosen once
        for left_out in range(3):
            others = diagnoser.reference(normals[:left_out] + normals[left_out + 1 :], **options)
            alone = diagnoser.diagnose(normals[left_out], others)
            assert alone.score == pytest.approx(scores[left_out], abs=1e-6)


def test_single_normal_is_calibrated_on_altered_copies(diagnoser):
    reference = diagnoser.reference(part(seed=1))
    calibration = reference.calibration
    assert (calibration.method, calibration.pictures, len(calibration.scores)) == ("augmentations", 1, 4)
    assert diagnoser.diagnose(part(seed=1, marks=[(90, 90, 20, 20)]), reference).verdict == "defective"


def test_altered_copies():
    columns = torch.arange(224).expand(224, 224)
    pixels = torch.stack([columns, columns.T, torch.full((224, 224), 100)]).byte()
    copies = altered_copies(pixels)
    assert len({copy.numpy().tobytes() for copy in [*copies, pixels]}) == 5
    assert all(copy.shape == pixels.shape and copy.dtype == torch.uint8 for copy in copies)
    assert [copy[2].float().mean().sub(100).sign() for copy in copies] == [-1, 1, -1, 1]  # brightness
    picture = to_pixels(part(seed=1, marks=[(30, 30, 20, 20)]))
    for copy in altered_copies(picture):
        quarters = copy[0].float().unflatten(1, (2, 112)).unflatten(0, (2, 112)).mean((1, 3))
        assert quarters.argmax() == 0  # the mark stays where it was
    border = max(float(copy[0].float().diff(dim=1).abs().max()) for copy in copies)
    assert border < 3  # 1 per pixel in the picture: no jump where a border would be made up


def test_at_most_so_many_normals_are_held_out():
    model = FakeModel()
    normals = [part((16, 16), seed=seed) for seed in range(HELD_OUT + 6)]
    reference = Diagnoser(model).reference(normals, budget=256)
    assert len(reference.calibration.scores) == reference.calibration.pictures == HELD_OUT
    assert model.encoded == len(normals) and reference.bank.tokens.shape[2] == 256


def test_identical_normals_count_once(diagnoser):
    same = part(seed=1)
    assert diagnoser.reference([same, same.copy()]).calibration.method == "augmentations"
    assert diagnoser.reference([same, same, part(seed=2)]).calibration.pictures == 2


def test_rotated_normals_know_a_turned_part():
    marked = part(seed=1, marks=[(60, 60, 30, 30)])
    plain, rotated = (Diagnoser(FakeModel(rotate=rotate)).reference(marked) for rotate in (False, True))
    assert rotated.bank.rotate and rotated.bank.tokens.shape[2] == 4 * plain.bank.tokens.shape[2]
    (seen,) = FakeModel().look([[to_pixels(marked.transpose(Image.Transpose.ROTATE_90), "squash")]])
    turned = seen.patches[0, 0, 0]
    assert torch.allclose(rotated.bank.tokens[0, 0, 256:512], turned, atol=2e-3)  # a grey value is 4e-3
    assert not torch.allclose(plain.bank.tokens[0, 0], turned, atol=2e-3)


# File


@pytest.mark.parametrize("options", [{}, {"tiles": 2, "budget": 400, "rotate": True}])
def test_a_saved_reference_diagnoses_as_before(tmp_path, diagnoser, options):
    normals = [part(seed=seed) for seed in range(1, 4)]
    reference = diagnoser.reference(normals, "metal nut", **options)
    loaded = diagnoser.load_reference(reference.save(tmp_path / "new" / "nut.safetensors"))
    assert (loaded.calibration, loaded.normals, loaded.digests, loaded.tiles, loaded.product) == (
        reference.calibration, reference.normals, reference.digests, reference.tiles, "metal nut",
    )  # fmt: skip
    picture = part(seed=9, marks=[(250, 100, 20, 20)])
    first, second = (diagnoser.diagnose(picture, known) for known in (reference, loaded))
    assert first.to_json() == second.to_json() and first.verdict == "defective"


def test_a_calibration_of_other_trained_weights_is_refused(tmp_path):
    model = FakeModel()
    path = Diagnoser(model).reference(part(seed=1)).save(tmp_path / "nut.safetensors")
    with torch.no_grad():
        model.memory.gates[0, 0, 0] = 1.5
    with pytest.raises(WeightsError, match="made with another training"):
        Diagnoser(model).load_reference(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, diagnoser):
    reference = diagnoser.reference([part(seed=seed) for seed in (1, 2)], "nut", budget=20)
    return reference.save(tmp_path_factory.mktemp("memory") / "nut.safetensors").read_bytes()


def test_no_change_of_a_memory_file_passes(tmp_path, diagnoser, saved):
    """Bits, bytes, cuts and additions anywhere in the file: each is refused in one line that says what to do."""
    rng, path = np.random.default_rng(0), tmp_path / "nut.safetensors"
    for number in range(200):
        changed, place = bytearray(saved), int(rng.integers(len(saved)))
        if number % 4 == 0:
            changed[place] ^= 1 << int(rng.integers(8))
        elif number % 4 == 1:
            changed[place : place + 8] = rng.bytes(8)
        elif number % 4 == 2:
            del changed[place:]
        else:
            changed[place:place] = rng.bytes(int(rng.integers(1, 9)))
        if bytes(changed) == saved:
            continue
        path.write_bytes(changed)
        with pytest.raises(WeightsError, match="Make it again from the normal pictures: `spgdd memory build`"):
            diagnoser.load_reference(path)


def opened(folder, saved):
    """Tensors and metadata of a memory file."""
    (folder / "saved.safetensors").write_bytes(saved)
    return read_sealed(folder / "saved.safetensors")


@pytest.mark.parametrize("change", [
    {"pictures": 10**20}, {"pictures": 0}, {"pictures": True}, {"scales": [1, 3]}, {"scales": []}, {"rotate": 3},
    {"product": 7}, {"tiles": 0}, {"tiles": 10**6}, {"normals": "nut"}, {"digests": [1]}, {"calibration": None},
    {"calibration": {"method": "<script>"}}, {"calibration": {"scores": [float("inf")]}},
    {"calibration": {"scores": []}}, {"calibration": {"scores": [float("nan"), 0.1]}},
    {"calibration": {"pictures": -1}}, {"calibration": {"largest": 3}},
    {"calibration": {"colour": 1}}, {"calibration": {"outlines": [0.1]}}, {"calibration": {"scores": [3.0, 0.1]}},
    {"levels": [1]}, {"levels": [5, float("nan")]}, {"levels": "ab"},
], ids=str)  # fmt: skip
def test_a_sealed_file_of_impossible_values_is_refused(tmp_path, diagnoser, saved, change):
    tensors, metadata = opened(tmp_path, saved)
    about = json.loads(metadata["about"])
    if isinstance(change.get("calibration"), dict):
        change = {"calibration": about["calibration"] | change["calibration"]}
    path = tmp_path / "nut.safetensors"
    write_tensors(path, tensors, {"format": FORMAT, "about": json.dumps(about | change)})
    with pytest.raises(WeightsError, match="spgdd memory build"):
        diagnoser.load_reference(path)


@pytest.mark.parametrize("change", [
    lambda t: {"tokens": t["tokens"]}, lambda t: t | {"tokens": t["tokens"][:, :, :0]},
    lambda t: t | {"tokens": t["tokens"][..., :3]}, lambda t: t | {"origin": t["origin"] + 5},
    lambda t: t | {"tokens": t["tokens"] * float("nan")}, lambda t: t | {"origin": t["origin"].float()},
    lambda t: t | {"tokens": torch.stack([t["tokens"]] * 2)}, lambda t: t | {"origin": t["origin"][..., 1:]},
])  # fmt: skip
def test_a_sealed_file_of_impossible_tensors_is_refused(tmp_path, diagnoser, saved, change):
    tensors, metadata = opened(tmp_path, saved)
    path = tmp_path / "nut.safetensors"
    write_tensors(path, change(tensors), {"format": FORMAT, "about": metadata["about"]})
    with pytest.raises(WeightsError, match="spgdd memory build"):
        diagnoser.load_reference(path)


def test_only_deep_grey_of_another_range_is_read_twice(diagnoser, monkeypatch):
    opened, ramp = [], np.linspace(1000, 3000, 300 * 300).reshape(300, 300).astype(np.uint16)
    monkeypatch.setattr(reference_module, "read_image", lambda *source: opened.append(source) or read_image(*source))
    alone = diagnoser.reference(ramp, "plate")
    assert len(opened) == 1
    both = diagnoser.reference([ramp, part(seed=1), ramp // 2], "plate")
    assert len(opened) == 1 + 3 + 2 and both.levels[1] == alone.levels[1] and both.levels[0] < alone.levels[0]
    assert not alone.digests & both.digests  # in the range of both it is another picture


def test_deep_grey_is_compared_in_the_range_of_the_normals(tmp_path, diagnoser):
    """One hot pixel hides no defect: normals and query are read from one range, which the file keeps."""
    rng, normals = np.random.default_rng(0), []
    for _ in range(4):
        normals.append((1000 + 20 * rng.normal(size=(300, 300))).clip(900, 1100).astype(np.uint16))
    reference = diagnoser.reference(normals, "plate")
    assert reference.levels == pytest.approx((940, 1060), abs=15)
    bad = normals[0].copy()
    bad[100:140, 100:140], bad[5, 5] = 1400, 65535
    known = diagnoser.load_reference(reference.save(tmp_path / "plate.safetensors"))
    assert known.levels == reference.levels
    for each in (reference, known):
        assert diagnoser.diagnose(bad, each).score > 3 * max(reference.calibration.scores)
    assert diagnoser.reference(part(seed=1)).levels is None


def test_a_memory_file_may_be_cut_or_replaced_while_it_is_in_use(tmp_path, diagnoser, saved):
    path = tmp_path / "nut.safetensors"
    path.write_bytes(saved)
    reference, picture = diagnoser.load_reference(path), part(seed=9, marks=[(80, 80, 20, 20)])
    before = diagnoser.diagnose(picture, reference).to_json()
    with path.open("r+b") as file:
        file.truncate(100)
    assert diagnoser.diagnose(picture, reference).to_json() == before


def test_other_files_are_told_apart(tmp_path, diagnoser):
    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(2)}, {"format": "something else"})
    (tmp_path / "folder.safetensors").mkdir()
    for name, words in [("absent", "there is no memory file"), ("other", "format 'something else'"), ("folder", "no")]:
        with pytest.raises(WeightsError, match=words):
            read_reference(tmp_path / f"{name}.safetensors")


@pytest.fixture(scope="module")
def mini():
    return Diagnoser(load_model("mini", device="cpu"))


def test_commands_build_inspect_and_use_a_memory(tmp_path, monkeypatch, capsys, mini):
    monkeypatch.setattr("spgdd.diagnosis.load", lambda **options: mini)
    for seed in range(4):
        path = tmp_path / ("parts" if seed == 3 else "good") / f"{seed}.png"
        path.parent.mkdir(exist_ok=True)
        part(seed=seed, marks=[(200, 90, 25, 25)] if seed == 3 else []).save(path)
    file = str(tmp_path / "nut.safetensors")
    line = ["memory", "build", "metal nut", "--normal", str(tmp_path / "good"), "-o", file, "--budget", "200"]
    assert cli.main(line) == 0
    assert "3 normal picture(s), 200 entries" in capsys.readouterr().out
    assert cli.main(["memory", "inspect", file]) == 0
    shown = capsys.readouterr().out
    for words in ("metal nut", "mini", mini.model.fingerprint, "2.png", "200", "leave-one-out", "whole", "MB"):
        assert words in shown
    line = ["diagnose", str(tmp_path / "parts"), "--memory", file]
    assert cli.main([*line, "--json", "-", "--max-new-tokens", "2"]) == 0
    with_memory = json.loads(capsys.readouterr().out)
    (result,) = with_memory["results"]
    assert with_memory["memory"] == file and result["product"] == "metal nut" and result["verdict"] == "defective"
    assert cli.main([*line, "--normal", str(tmp_path / "good")]) == 1
    assert "leave --normal" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mark", "value", "words"),
    [("profile", "spgdd-7b", "made with another profile (spgdd-7b, loaded mini)"),
     ("vision", "0123456789abcdef", "made with another vision tower")],
)  # fmt: skip
def test_a_memory_of_another_model_is_refused_by_the_command(tmp_path, monkeypatch, capsys, mini, mark, value, words):
    from dataclasses import replace

    monkeypatch.setattr("spgdd.diagnosis.load", lambda **options: mini)
    reference = mini.reference([part(seed=1)], "nut")
    path = replace(reference, **{mark: value}).save(tmp_path / "other.safetensors")
    part(seed=2).save(tmp_path / "part.png")
    assert cli.main(["diagnose", str(tmp_path / "part.png"), "--memory", str(path)]) == 1
    error = capsys.readouterr().err
    assert words in error and "Make it again" in error
    assert cli.main(["memory", "inspect", str(path)]) == 0 and value in capsys.readouterr().out


def test_a_diagnosis_and_three_chat_turns_run_the_vision_tower_once_per_picture(tmp_path, mini, monkeypatch):
    """With memory (from a file), focuser and language model; counted where the tower begins."""
    seen = []
    trunk = mini.model.imagebind.modality_trunks["vision"]
    monkeypatch.setattr(trunk, "forward", lambda *given, _run=trunk.forward: seen.append(len(given[0])) or _run(*given))
    normals = [part(seed=seed) for seed in (1, 2, 3)]
    reference = mini.reference(normals, "plate")
    assert sum(seen) == 3
    known = mini.load_reference(reference.save(tmp_path / "plate.safetensors"))
    assert mini.model.focus is not None and sum(seen) == 3
    talk = mini.diagnose(part(seed=4, marks=[(80, 80, 20, 20)]), known, max_new_tokens=4)
    for question in ("Where is it?", "What is it?", "How large is it?"):
        talk = talk.ask(question, max_new_tokens=4)
    assert len(talk.history) == 3 and talk.anomaly_map.max() > 0 and talk._repr_html_()
    assert sum(seen) == 4


def test_fingerprint_follows_every_change_of_the_weights_and_is_else_computed_once(monkeypatch):
    model = load_model("mini", language=False)
    first, gates = fingerprint(model), next(model.memory.parameters())
    monkeypatch.setattr("hashlib.sha256", lambda *_: pytest.fail("hashed again"))
    assert fingerprint(model) == first
    monkeypatch.undo()
    with torch.no_grad():
        before = gates.clone()
        gates.add_(1.0)
        assert fingerprint(model) != first
        gates.copy_(before)
        assert fingerprint(model) == first
    gates.data = before + 1
    assert fingerprint(model) != first
