"""The cells that every notebook begins with, and the pictures that notebooks share."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from spgdd.errors import WeightsError
from spgdd.tensors import STANDIN
from spgdd.ui import notebook, plots
from spgdd.ui.notebook import check, environment, equal
from spgdd.ui.plots import as_map, as_rgb, chart, compact, image_grid, mark_patches, overlay


def test_checks_say_what_holds_and_by_how_much(capsys):
    check(1 < 2, "one is less than two")
    equal(torch.ones(2), torch.tensor([1, 1 + 3e-5]), "both are ones", tolerance=1e-4)
    assert capsys.readouterr().out == (
        "✓ one is less than two\n✓ both are ones (largest difference below 1e-04)\n"
    )
    with pytest.raises(AssertionError, match="does not hold: one is more"):
        check(1 > 2, "one is more than two")
    for theirs in (torch.tensor([1.0, 1.1]), torch.tensor([1.0, torch.nan]), torch.ones(1, 2)):
        with pytest.raises(AssertionError, match="both are ones"):
            equal(torch.ones(2), theirs, "both are ones")


def test_environment_says_device_precision_and_weights(capsys):
    environment("mini")
    said = capsys.readouterr().out
    assert "precision  float32" in said and "device " in said and "pretrained_ckpt" in said


def test_what_stand_ins_say_is_not_judged(tmp_path, monkeypatch, capsys):
    (tmp_path / "dinov2_ckpt/small").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / "dinov2_ckpt/small" / name).write_text(STANDIN)
    monkeypatch.setenv("SPGDD_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(notebook, "_standins", False)
    environment("dinov2-small")
    check(False, "it sees the hole")
    assert capsys.readouterr().out.endswith(
        ": stand-ins, random values, whose maps and words mean nothing\n"
        "- not judged, the weights are stand-ins: it sees the hole\n"
    )
    with pytest.raises(AssertionError, match="both are ones"):  # which does not depend on weights
        equal(torch.ones(2), torch.zeros(2), "both are ones")


def test_environment_names_what_is_missing_and_where_it_comes_from(tmp_path, monkeypatch):
    with pytest.raises(WeightsError, match=r"features\.bin \(from notebook 05\)"):
        environment("mini", needs={tmp_path / "features.bin": "notebook 05"})
    monkeypatch.setenv("SPGDD_WEIGHTS", str(tmp_path))
    with pytest.raises(WeightsError, match=r"imagebind\.safetensors"):
        environment("mini")


def test_pictures_of_every_kind_become_the_same_array():
    tensor = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    array = tensor.permute(1, 2, 0).numpy()
    for picture in (tensor, array, Image.fromarray(array)):
        assert np.array_equal(as_rgb(picture), array)
    assert as_map(torch.arange(9.0)).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_overlay_colours_the_strong_part_and_outlines_the_mask_from_outside():
    picture = np.full((40, 60, 3), 90, np.uint8)
    heat, mask = np.zeros((40, 60)), np.zeros((40, 60), bool)
    heat[:, :10], mask[20:30, 30:50] = 2, True
    before = picture.copy()
    result = overlay(picture, heat, limit=1.0, mask=mask)
    assert np.array_equal(picture, before), "the caller's picture was drawn into"
    assert (result[:, :10] != 90).any(-1).all() and (result[0, 10:] == 90).all()
    assert (result[19, 30:50] == 255).all() and (result[mask] == 90).all()
    assert (result[17, 30:50] == 0).all(), "a dark casing, so that the outline shows on bright pictures too"


def test_marks_frame_the_patches_row_by_row():
    black = np.zeros((64, 64, 3), np.uint8)
    coloured = mark_patches(black, [None, 6], grid=4).any(-1)
    assert not mark_patches(black, [None], grid=4).any()
    rows, columns = np.nonzero(coloured)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (14, 33, 30, 49)  # row 1, column 2


def test_grid_is_a_small_jpeg_of_all_cells():
    picture, values = np.zeros((20, 20, 3), np.uint8), np.eye(16)
    rows = [[picture, values, None], [values]]
    image = image_grid(rows, titles=["a", "b", "c"], names=["one", "two"], limits=(0, 1), side=1)
    jpeg = Image.open(BytesIO(image.data))
    assert jpeg.format == "JPEG" and len(image.data) < 20_000
    assert 250 < jpeg.width < 400 and 180 < jpeg.height < 300
    assert image._repr_jpeg_()[1]["alt"] == "Pictures: one; two; a; b; c."


def test_grid_of_maps_says_what_its_colours_mean(monkeypatch):
    figures_made = []
    monkeypatch.setattr(plots, "compact", lambda figure, alt: figures_made.append(figure))
    maps, mask = [np.eye(4), np.ones((4, 4))], np.eye(4, dtype=bool)
    image_grid(maps, limits=(0, 2), scale="distance")
    image_grid(maps)
    image_grid([mask])
    shared, own, none = figures_made
    assert [axis.get_ylabel() for axis in shared.axes] == ["", "", "distance"]
    assert "each map from its lowest value" in own.get_supxlabel() and len(own.axes) == 2
    assert none.get_supxlabel() == "" and len(none.axes) == 1, "a mask is black and white"


def test_chart_tells_lines_apart_without_colours():
    figure, (left, _) = chart(columns=2)
    lines = [left.plot([0, 1], [0, number])[0] for number in range(3)]
    left.set(xlabel="shots", ylabel="AUROC (%)")
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 3
    assert "AUROC (%) over shots" in compact(figure)._repr_jpeg_()[1]["alt"]
