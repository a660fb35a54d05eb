"""The cells that every notebook begins with, and the pictures that notebooks share."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from spgdd.errors import WeightsError
from spgdd.ui.notebook import PIPELINE, environment, pipeline
from spgdd.ui.plots import as_map, as_rgb, image_grid, mark_patches, overlay


def test_pipeline_marks_the_steps_named_and_no_others():
    svg = pipeline(("features", "map")).data
    assert svg.count("you are here") == 2 and svg.count('fill="#c8253c"/>') == 2
    assert all(name in svg for name, _ in PIPELINE.values())
    with pytest.raises(ValueError, match="no step training"):
        pipeline("training")


def test_environment_says_device_precision_and_weights(capsys):
    environment("mini")
    said = capsys.readouterr().out
    assert "precision  float32" in said and "device " in said and "pretrained_ckpt" in said


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
