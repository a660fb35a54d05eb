"""Metrics against closed forms and brute force; the protocol diagnoses as the Diagnoser does, and encodes once."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from conftest import check
from fake_model import FakeModel, part
from miniworld.tasks import miniworld_tasks
from spgdd import cli, diagnosis
from spgdd.diagnosis import Diagnoser
from spgdd.errors import DataError, SpgddError
from spgdd.evaluation.ablation import ablate
from spgdd.evaluation.metrics import PixelCounts, image_metrics, named_kind, named_places, summarise, verdict_metrics
from spgdd.evaluation.protocol import Picture, evaluate, folder_tasks, load_picture
from spgdd.evaluation.tables import fewer_masks
from spgdd.imagebind import ImageFeatures
from spgdd.imagebind.preprocess import normalise, to_pixels
from spgdd.loading import load_model
from spgdd.selfprompt.focuser import enlarge
from spgdd.ui.plots import plot_shots
from spgdd.views import Views

# Metrics


def test_image_metrics_have_their_closed_forms():
    truth = [False] * 4 + [True] * 4
    perfect = image_metrics(truth, [0, 1, 2, 3, 4, 5, 6, 7])
    assert perfect == {"image_auroc": 100, "image_ap": 100, "image_f1_max": 100}
    constant = image_metrics(truth, [1] * 8)  # all called defective: precision 1/2, recall 1
    assert constant == pytest.approx({"image_auroc": 50, "image_ap": 50, "image_f1_max": 200 / 3})
    one_wrong = image_metrics(truth, [0, 1, 2, 7.5, 4, 5, 6, 7])  # of 16 pairs, 4 are in the wrong order
    ap = 100 * (1 / 2 + 2 / 3 + 3 / 4 + 4 / 5) / 4  # precision at each of the four recalls
    assert one_wrong == pytest.approx({"image_auroc": 75, "image_ap": ap, "image_f1_max": 800 / 9})
    assert set(image_metrics([True, True], [1, 2]).values()) == {None}


def examples(count=6, size=224, seed=0):
    """Maps of few different values, exact in float16, and binary masks of blobs; the first is good."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        mask = ndimage.gaussian_filter(rng.normal(size=(size, size)), size / 25)
        mask = mask > 1.6 * mask.std() if number else np.zeros((size, size), bool)
        noise = ndimage.zoom(rng.normal(size=(28, 28)), 8, order=0)
        blurred = ndimage.zoom(ndimage.zoom(mask.astype(float), 56 / size, order=1), 4, order=0)
        yield np.round((noise + blurred).clip(0, 2) * 32) / 32, mask


def brute_force_pro(pairs, limit=0.3):
    """The definition: for each threshold the mean share found of each region, over the false-positive rate."""
    regions, points = [], [(0.0, 0.0)]
    for number, (_, mask) in enumerate(pairs):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [(number, labels == label) for label in range(1, count + 1)]
    for threshold in sorted({v for values, _ in pairs for v in np.unique(values)}, reverse=True):
        found = [values >= threshold for values, _ in pairs]
        false = sum((hit & ~mask).sum() for hit, (_, mask) in zip(found, pairs, strict=True))
        rate = false / sum((~mask).sum() for _, mask in pairs)
        points.append((rate, np.mean([found[number][region].mean() for number, region in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x1 > limit and x0 < limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2 if x1 <= limit else 0
    return 100 * area / limit


def test_pixel_metrics_equal_brute_force():
    pairs, counts = list(examples()), PixelCounts()
    for values, mask in pairs:
        counts.add(values, mask.astype(np.float32) if mask.any() else None)
    found = counts.metrics()
    values, truth = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    check("evaluation/pixel_auroc", found["pixel_auroc"], 100 * roc_auc_score(truth, values), atol=1e-6)
    check("evaluation/pixel_ap", found["pixel_ap"], 100 * average_precision_score(truth, values), atol=1e-6)
    check("evaluation/pro", found["pro"], brute_force_pro(pairs), atol=1e-6)


def test_pixels_covered_in_part_count_as_the_pictures_own_pixels():
    """A mask of 448 pixels shrunk to 224: as comparing the mask with the map, each pixel shown as 2 x 2."""
    counts, values, truths = PixelCounts(), [], []
    for (square_map, _), (_, mask) in zip(examples(4), examples(4, 448, 1), strict=True):
        counts.add(square_map, mask.reshape(224, 2, 224, 2).mean((1, 3)))
        values.append(square_map.repeat(2, 0).repeat(2, 1).ravel())
        truths.append(mask.ravel())
    expected = 100 * roc_auc_score(np.concatenate(truths), np.concatenate(values))
    check("evaluation/pixel_auroc of a large mask", counts.metrics()["pixel_auroc"], expected, atol=1e-6)


def test_pixel_metrics_without_a_defect_are_undefined():
    counts = PixelCounts()
    counts.add(np.zeros((224, 224)), None)
    assert counts.metrics() == {"pixel_auroc": None, "pixel_ap": None, "pro": None}


@pytest.mark.parametrize("text, places, kind", [
    ("Yes, there is an anomaly in the image, at the bottom left of the image.", {"bottom left"}, None),
    ("Yes, there are two blowholes, at the top left, top and Right.", {"top left", "top", "right"}, "blowhole"),
    ("It is a hole.", set(), "hole"),
    ("There is a small, faint chipped edge at the center.", {"center"}, "chipped edge"),
    ("It is a scratch on the head.", set(), "scratch"),
    ("I see an area of pitting.", set(), "pitting"),
    ("I can tell that there is a defect, but not its kind.", set(), None),
])  # fmt: skip
def test_words_are_read_out_of_answers(text, places, kind):
    assert named_places(text) == places and named_kind(text) == kind


def test_verdicts_are_counted_and_never_guessed():
    def picture(kind, verdict, answer, places=(), place=None, **more):
        regions = [{"place": place}] if place else []
        score = {"normal": 1, "unsure": 2.5, "defective": 3}[verdict]
        return {"kind": kind, "verdict": verdict, "answer": answer, "places": places, "regions": regions,
                "score": score, "threshold": 2, "cut": False, "unlike": False, **more}  # fmt: skip

    found = verdict_metrics([
        picture("good", "normal", "No, there is no anomaly."),
        picture("good", "defective", "Yes, at the top.", place="top"),
        picture("good", "unsure", "Perhaps."),
        picture("good", "normal", "No and yes."),
        picture("scratch", "defective", "Yes, at the top.", ("top", "left"), "left", kind_answer="It is a scratch."),
        picture("hole", "defective", "Yes, at the top and left.", ("top",), "left", kind_answer="It is a blowhole."),
        picture("hole", "normal", "No, I see no defect.", ("top",)),
        picture("hole", "unsure", "Yes.", ("top",), "top", kind_answer="A hole."),
        picture("combined", "unsure", "", ("top",), "bottom"),
    ])  # fmt: skip
    assert found == pytest.approx({
        "map_overkill": 25, "map_miss": 20, "map_unsure": 300 / 9, "map_unlike": 0, "map_above_threshold": 50,
        "map_place": 50,
        "text_accuracy": 400 / 9, "text_balanced": (25 + 60) / 2, "text_overkill": 25, "text_miss": 20,
        "text_unparsed": 300 / 9, "text_cut": 0, "text_place": 100 / 3, "text_kind": 200 / 3,
    })  # fmt: skip


def test_summary_is_the_mean_over_products_then_subsets_then_shot_sets():
    figures = {("A", "a", 0): 10, ("A", "b", 0): 20, ("A", "a", 1): 30, ("A", "b", 1): None, ("B", "c", 0): 45,
               ("B", "c", 1): 50}  # fmt: skip
    runs = [{"subset": s, "product": p, "shots": 1, "seed": n, "metrics": {"x": v}} for (s, p, n), v in figures.items()]
    rows = {row["subset"]: row["metrics"]["x"] for row in summarise(runs)}
    assert rows["A"] == pytest.approx({"mean": 22.5, "std": np.std([15, 30], ddof=1)})
    assert rows["mean"] == pytest.approx({"mean": 35, "std": np.std([30, 40], ddof=1)})


# Protocol


class Speaker(FakeModel):
    """Answers in batches, with the places of its choice."""

    def __init__(self):
        super().__init__()
        self.language.generate_batch = self.generate_batch

    def generate_batch(self, embedding, questions, prompt_tokens, max_new_tokens):
        answers = [[*self.stream(None, q, (), tokens)][-1] for q, tokens in zip(questions, prompt_tokens, strict=True)]
        return [SimpleNamespace(text=answer.text, stopped="marker") for answer in answers]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """MVTec's layout: 6 normal pictures, 5 good and 4 defective ones, 300 x 150 pixels."""
    root = tmp_path_factory.mktemp("data")
    for number in range(15):
        bad = number > 10
        kind = ("train/good" if number < 6 else "test/good") if not bad else "test/scratch"
        path = root / "set" / "bolt" / kind / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        part((300, 150), [(250, 100, 20, 10)] if bad else [], seed=number).save(path)
        if bad:
            mask = np.zeros((150, 300), np.uint8)
            mask[90:110, 230:270] = 255
            path = root / "set" / "bolt" / "ground_truth" / "scratch" / f"{number:03}_mask.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return root


def test_folder_tasks(folder, tmp_path):
    (task,) = folder_tasks(folder, names={"bolt": "hex bolt"})
    assert (task.subset, task.product, task.name) == ("set", "bolt", "hex bolt")
    assert (len(task.normals), len(task.queries)) == (6, 9)
    (few,) = folder_tasks(folder, ["set"], limit=3)
    assert [p.kind for p in few.queries] == ["good"] * 3 + ["scratch"] * 3
    assert [p.name for p in few.queries] == [p.name for p in folder_tasks(folder, limit=3)[0].queries]
    with pytest.raises(DataError, match="has no subset sat; it has set"):
        folder_tasks(folder, ["sat"])
    for number in range(6):  # a data set without a split
        path = tmp_path / f"MT_{'Free' if number < 4 else 'Crack'}" / "Imgs" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part(seed=number).save(path)
    (task,) = folder_tasks(tmp_path)
    assert (len(task.normals), len(task.queries)) == (2, 4) and not {*task.normals} & {*task.queries}


def test_what_is_damaged_missing_or_double_is_told_before_it_is_evaluated(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    bolt = tmp_path / "set" / "bolt"
    (bolt / "train" / "good" / "000.png").write_bytes(b"no picture")
    whole = (bolt / "test" / "good" / "006.png").read_bytes()
    (bolt / "test" / "good" / "006.png").write_bytes(whole[: len(whole) // 2])
    shutil.copy(bolt / "train" / "good" / "001.png", bolt / "test" / "good" / "007.png")
    (bolt / "ground_truth" / "scratch" / "011_mask.png").unlink()
    Image.new("L", (20, 10)).save(bolt / "ground_truth" / "scratch" / "012_mask.png")
    (bolt / "test" / "good" / ".hidden.png").write_bytes(b"no picture")
    lines = []
    (task,) = folder_tasks(tmp_path, report=lines.append)
    assert (len(task.normals), len(task.queries)) == (5, 8)
    assert [p.mask is not None for p in task.queries if p.kind == "scratch"] == [False, False, True, True]
    assert "13 pictures of 1 products, 4 of them defective; 2 masks, 2 defective pictures without one" in lines[0]
    assert {tuple(line.split()[:2]) for line in lines[1:]} == {
        ("broken:", "set/bolt/train/good/000.png"), ("broken:", "set/bolt/test/good/006.png"),
        ("broken:", "set/bolt/ground_truth/scratch/012_mask.png"),
        ("missing:", "set/bolt/test/scratch/011.png"), ("duplicate:", "set/bolt/test/good/007.png"),
    }  # fmt: skip
    assert any("same bytes as set/bolt/train/good/001.png, a training picture" in line for line in lines)
    runs = evaluate(Diagnoser(Speaker()), [task], (0, 1), (0,), text=False, progress=False)
    assert fewer_masks(runs) == [
        "set/bolt: pixels and places of 2 of 4 defective pictures; the others have no mask"
    ]  # fmt: skip
    assert all(run["metrics"]["pixel_auroc"] is not None for run in runs)


def test_masks_lie_where_the_model_sees_the_defect(folder):
    (task,) = folder_tasks(folder)
    loaded = load_picture(task.queries[-1], FakeModel("squash").profile)
    rows, columns = np.nonzero(loaded.coverage > 0.5)
    box = Views(300, 150, "squash").box_to_picture(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.array(box) - (230, 90, 270, 110)).max() <= 1
    assert loaded.coverage.mean() == pytest.approx(40 * 20 / (300 * 150), rel=0.01)
    assert loaded.places == ["right"] and Views(300, 150, "squash").place_of(box) == "right"
    seen = load_picture(task.queries[-1], FakeModel("crop").profile).coverage  # the defect is outside of the centre
    assert seen.shape == (224, 224) and not seen.any()


def test_evaluation_diagnoses_as_the_diagnoser_does_and_encodes_once(folder):
    (task,) = folder_tasks(folder, names={"bolt": "hex bolt"})
    model = Speaker()
    runs = evaluate(Diagnoser(model), [task], (0, 1, 4), (0, 1), progress=False)
    remembered = {name for run in runs for name in run["normals"]}
    assert model.encoded == 9 + len(remembered) + 2 * 4  # and four altered copies of each one that is alone
    assert [(run["shots"], run["seed"]) for run in runs] == [(0, None), (1, 0), (4, 0), (1, 1), (4, 1)]
    assert set(runs[1]["normals"]) < set(runs[2]["normals"])
    for run in runs:
        diagnoser = Diagnoser(Speaker())
        reference = diagnoser.reference(list(run["normals"]), "hex bolt") if run["shots"] else None
        for picture in run["pictures"]:
            alone = diagnoser.diagnose(folder / picture["picture"], reference, "hex bolt")
            assert picture["score"] == pytest.approx(alone.score, abs=1e-5)
            assert (picture["verdict"], picture["answer"]) == (alone.verdict, alone.text)
            assert [r["box"] for r in picture["regions"]] == [r.box for r in alone.regions[:3]]
            history = diagnoser.model.asked[-1]
            assert history == ("This is a photo of a hex bolt. Is there any anomaly in the image?", ())
    found = runs[2]["metrics"]
    assert found["image_auroc"] == found["text_balanced"] == found["map_place"] == 100 and found["pixel_auroc"] > 99
    assert found["text_kind"] == 0 and model.asked[-1][0].endswith("Human: What kind of defect is it?")
    with pytest.raises(DataError, match="has 6 normal pictures to draw 7 shots"):
        evaluate(Diagnoser(model), [task], (7,), progress=False)


def test_mini_world_is_the_same_on_every_call():
    first, again = (miniworld_tasks(["gear"], products=2, limit=3, normals=2) for _ in range(2))
    assert [task.product for task in first] == ["gear 0", "gear 1"] and first[0].name == "gear"
    assert (len(first[0].normals), len(first[0].queries)) == (2, 6)
    for one, same in zip(first[0].queries, again[0].queries, strict=True):
        assert one.name == same.name and np.array_equal(one.source, same.source)
    assert not np.array_equal(first[0].queries[0].source, first[1].queries[0].source)
    bad = [p for task in first for p in task.queries if p.kind != "good"]
    assert bad and all(p.mask.any() and p.places for p in bad) and "burn" not in first[0].types
    with pytest.raises(DataError, match="no family car"):
        miniworld_tasks(["car"])


def test_pictures_without_a_mask_have_no_place():
    loaded = load_picture(Picture("x", part(), "scratch"), FakeModel("squash").profile)
    assert loaded.coverage is None and loaded.places == []


# Ablation


def plain_distance(model, query, normals):
    """AnomalyGPT's few-shot map from tokens (L, N, D) and (K, L, N, D)."""
    taps = [1 - (F.normalize(q, dim=-1) @ F.normalize(n, dim=-1).T).amax(1)
            for q, n in zip(query, normals.transpose(0, 1).flatten(1, 2), strict=True)]  # fmt: skip
    return enlarge(torch.stack(taps).mean(0).view(1, 1, 16, 16))


def test_a_model_without_its_parts_is_anomalygpt():
    model = load_model("mini", device="cpu")
    ablate(model, scales=[1], gates=False, fusion=False, comparison=False, focus=False)
    assert model.comparison is None and model.focus is None and model.memory.scales == (1,)
    pictures = torch.stack([to_pixels(part(seed=seed, marks=[(80, 80, 20, 20)] * (seed == 0))) for seed in range(3)])
    features = model.imagebind.encode_image(normalise(pictures))
    bank = model.memory.build(features.patches[1:])
    query = ImageFeatures(*(values[:1] for values in features))
    expected = plain_distance(model, features.patches[0], features.patches[1:])
    check("ablation/plain map", model.anomaly_map(query, "plate", bank), expected, atol=1e-5)


def test_scales_keep_their_gates_and_options_go_to_the_profile():
    whole, model = (load_model("mini", device="cpu") for _ in range(2))
    ablate(model, scales=[3, 1], budget=100, rotate=True, tiles=2)
    assert torch.equal(model.memory.gates[:, 0], whole.memory.gates[:, 1]) and model.memory.gates.shape[1] == 2
    assert (model.profile.budget, model.profile.rotate, model.profile.tiles) == (100, True, 2)
    for switches, words in [({"colour": 1}, "no switch colour"), ({"scales": [7]}, "scales .7. are not among")]:
        with pytest.raises(SpgddError, match=words):
            ablate(model, **switches)


def test_variants_are_evaluated_side_by_side(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diagnosis, "load", lambda profile, **options: Diagnoser(Speaker()))
    (tmp_path / "variants.json").write_text('{"full": {}, "small": {"budget": 9, "tiles": 1}}')
    line = f"evaluate --data {folder} --shots 2 --seeds 0 --no-text --set tiles=2 --ablate {tmp_path}/variants.json"
    arguments = [*line.split(), "--json", f"{tmp_path}/a.json", "--csv", f"{tmp_path}/a.csv"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in shown if row.startswith("2 ")] == ["full", "small"]
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["settings"]["set"] == {"tiles": 2} and [r["variant"] for r in written["runs"]] == ["full", "small"]
    assert written["runs"][0]["pictures"][0]["score"] != written["runs"][1]["pictures"][0]["score"]
    assert (tmp_path / "a.csv").read_text().startswith("variant,subset,")
    (tmp_path / "variants.json").write_text("[]")
    assert cli.main(arguments) == 1 and "Give names with their switches" in capsys.readouterr().err


# Command


def test_command_writes_table_json_csv_and_plot(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(diagnosis, "load", lambda profile, **options: Diagnoser(Speaker()))
    out = tmp_path / "out"
    line = f"evaluate --data {folder} --shots 0 1 --seeds 0 1 --json {out}/e.json --csv {out}/e.csv --plot {out}/e.png"
    assert cli.main([*line.split(), "--product", "bolt=hex bolt"]) == 0
    shown = capsys.readouterr().out
    assert "image AUROC" in shown and "balanced" in shown and " ± " in shown
    written = json.loads((out / "e.json").read_text())
    assert {run["name"] for run in written["runs"]} == {"hex bolt"} and len(written["summary"]) == 4
    lines = (out / "e.csv").read_text().splitlines()
    assert lines[0].startswith("subset,product,shots,seed,image_auroc") and len(lines) == 1 + 3
    with Image.open(out / "e.png") as picture:
        assert picture.width > 500
    lines = [line.get_label() for line in plot_shots(written["summary"]).axes[0].get_lines()]
    assert "WinCLIP+, published, MVTec-AD" in lines and not any("VisA" in label for label in lines)
    assert cli.main(["evaluate", "--data", str(folder), "--product", "bolt"]) == 1
    assert "takes KEY=VALUE" in capsys.readouterr().err


def test_counting_takes_the_rounding_errors_of_maps():
    counts = PixelCounts()
    counts.add(np.full((224, 224), -1e-7), np.ones((224, 224), np.float32))
    counts.add(torch.zeros(224, 224).numpy() - 0.0, None)
    assert counts.metrics()["pixel_auroc"] == 50
