"""Pixels, bit for bit, as the published torchvision pipelines give them."""

import hashlib
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import FIXTURES, check
from spgdd.imagebind import normalise, preprocess, to_pixels

FOLDER = FIXTURES / "preprocess"
INFO = json.loads((FOLDER / "info.json").read_text())["images"]


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "outputs.safetensors") | load_file(FOLDER / "outputs_webdemo.safetensors")


def picture(name):
    return Image.open(FOLDER / "images" / INFO[name]["file"])


@pytest.mark.parametrize("name", INFO)
def test_crop_matches_imagebind(name, expected):
    pixels = to_pixels(picture(name))
    assert pixels.dtype == torch.uint8
    check(f"preprocess/{name}", pixels, expected[name], rtol=0)
    batch = preprocess([picture(name), picture("06_rgb_tiny_20x30")])
    assert batch.shape == (2, 3, 224, 224) and batch.dtype == torch.float32
    assert hashlib.sha256(batch[0].numpy().tobytes()).hexdigest() == INFO[name]["vision_sha256"]


@pytest.mark.parametrize("name", INFO)
def test_thermal_matches_pandagpt(name, expected):
    pixels = to_pixels(picture(name).convert("L"))[:1]
    assert pixels.dtype == torch.uint8
    check(f"preprocess/thermal.{name}", pixels, expected[f"thermal.{name}"], rtol=0)


@pytest.mark.parametrize("name", ["01_rgb_301x203", "07_exif6_200x120"])
def test_squash_matches_anomalygpt_web_demo(name, expected):
    check(f"preprocess/web.{name}", to_pixels(picture(name), fit="squash"), expected[f"web.{name}"], rtol=0)


def test_normalise_matches_bit_for_bit(expected):
    name = "01_rgb_301x203"
    check(f"preprocess/normalized.{name}", normalise(expected[name]), expected[f"normalized.{name}"], rtol=0)
    before = expected[name].clone()
    assert torch.equal(normalise(expected[name][None])[0], expected[f"normalized.{name}"])
    assert torch.equal(expected[name], before), "normalise changed its input"


def test_other_sizes_and_unknown_fit():
    image = Image.new("RGB", (300, 200))
    assert preprocess([image], size=140).shape == (1, 3, 140, 140)
    assert preprocess([image], "squash", 112).shape == (1, 3, 112, 112)
    with pytest.raises(ValueError, match='fit \'pad\' is unknown; choose "crop" or "squash"'):
        to_pixels(image, fit="pad")
