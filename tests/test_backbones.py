"""Eyes other than ImageBind, and eyes without words: DINOv2 and its like as the hub publishes them, on tiny weights."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

import spgdd
import spgdd.imagebind
from conftest import ROOT, check
from spgdd.cli import main
from spgdd.diagnosis import Diagnoser
from spgdd.errors import SpgddError, WeightsError
from spgdd.imagebind import ImageBind, ImageBindConfig, TowerConfig, normalise, to_pixels
from spgdd.loading import load_model
from spgdd.model import SPGDD
from spgdd.profiles import get_profile
from spgdd.selfprompt.focuser import enlarge
from spgdd.views import align

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 70, "patch_size": 14,
         "initializer_range": 0.2}  # fmt: skip


def publish(network, folder):
    """Files as the hub has them, of random weights whose patches tell little of the others."""
    for name, weights in network.named_parameters():
        if "o_proj" in name or "attention.output.dense" in name:
            weights.data.mul_(0.02)
    network.save_pretrained(folder)
    about = {"image_mean": MEAN, "image_std": STD, "image_processor_type": "BitImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("weights")
    for size in ("small", "base"):
        publish(Dinov2Model(Dinov2Config(**SMALL)), root / "dinov2_ckpt" / size)
    return root


@pytest.fixture(scope="module")
def diagnoser(root):
    return spgdd.load("dinov2-small", root=root, device="cpu")


@pytest.mark.parametrize("profile", ["dinov2-small", "mini"])
def test_loading_in_a_moment_shows_no_bar(root, profile, capfd):
    spgdd.load(profile, root=root if profile != "mini" else None, device="cpu")
    assert capfd.readouterr().err == ""


def photograph(size=(300, 200), seed=0, marker=None, side=28):
    """A grey part with grain; the marker is a dark square around (x, y)."""
    grain = np.random.default_rng(seed).normal(130, 5, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(grain)
    if marker:
        x, y = marker
        half = side / 2
        ImageDraw.Draw(picture).rectangle((x - half, y - half, x + half, y + half), fill=(20, 10, 60))
    return picture


def map_by_hand(network, normals, query, patch=14):
    """Of normalised pixels (K, 3, H, W) and (1, 3, H, W): the published few-shot map (H, W), corners aligned."""
    with torch.no_grad():
        bank, tokens = (network(pixels).last_hidden_state[:, 1:].flatten(0, 1) for pixels in (normals, query))
    distance = 1 - (F.normalize(tokens, dim=-1) @ F.normalize(bank, dim=-1).T).max(1).values
    rows, columns = (side // patch for side in query.shape[2:])
    return F.interpolate(distance.view(1, 1, rows, columns), query.shape[2:], mode="bilinear", align_corners=True)[0, 0]


@pytest.mark.parametrize("size", [224, 448])
def test_a_diagnosis_equals_the_closed_form(root, size):
    profile = dataclasses.replace(get_profile("dinov2-small"), size=size)
    found = spgdd.load(profile, root=root, device="cpu").diagnose(
        photograph(marker=(80, 60)), [photograph(seed=1), photograph(seed=2)]
    )
    network = Dinov2Model.from_pretrained(root / "dinov2_ckpt/small").eval()
    pixels = [to_pixels(picture, "squash", size) for picture in
              (photograph(seed=1), photograph(seed=2), photograph(marker=(80, 60)))]  # fmt: skip
    pixels = normalise(torch.stack(pixels), MEAN, STD)
    expected = map_by_hand(network, pixels[:2], pixels[2:])
    check(f"dinov2 {size}.map", found.square_map, align(expected), atol=1e-5, rtol=0)
    highest = expected.flatten().sort().values[-round(0.01 * size**2) :].mean()
    check(f"dinov2 {size}.score", found.score, highest, atol=1e-5, rtol=0)
    assert found.views.size == size and found.anomaly_map.shape == (200, 300)


def test_a_map_of_another_shape_than_a_square_equals_the_closed_form(root, diagnoser):
    torch.manual_seed(1)
    normals, query, model = torch.randn(2, 3, 140, 350), torch.randn(1, 3, 140, 350), diagnoser.model
    bank = model.memory.build(model.vision.encode_image(normals).patches)
    distances, _ = model.memory.compare(model.vision.encode_image(query).patches, bank.tokens[None])
    found = enlarge(model.memory.fuse(distances).view(1, 1, 10, 25))
    network = Dinov2Model.from_pretrained(root / "dinov2_ckpt/small").eval()
    check("dinov2 140 x 350.map", found[0, 0], map_by_hand(network, normals, query), atol=1e-5, rtol=0)


def test_layers_are_normalised_hidden_states_and_the_embedding_is_the_cls_token(root):
    profile = dataclasses.replace(get_profile("dinov2-base"), layers=(2, -1))
    model = load_model(profile, root, device="cpu")
    pixels = torch.randn(2, 3, 56, 84)
    embedding, patches = model.vision.encode_image(pixels)
    network = Dinov2Model.from_pretrained(root / "dinov2_ckpt/base").eval()
    with torch.no_grad():
        states = network(pixels, output_hidden_states=True)
        expected = torch.stack([network.layernorm(states.hidden_states[i])[:, 1:] for i in (2, 3)], 1)
    assert torch.allclose(patches, expected, atol=1e-6) and patches.shape == (2, 2, 24, 48)
    assert torch.allclose(embedding, F.normalize(states.pooler_output, dim=-1), atol=1e-6)
    assert not any(parameter.requires_grad for parameter in model.vision.parameters())


def test_another_backbone_is_one_entry(tmp_path):
    """The example of the README: DINOv2 with registers, which are no patches."""
    torch.manual_seed(0)
    network = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)).eval()
    publish(network, tmp_path / "registers")
    profile = dataclasses.replace(get_profile("dinov2-small"), name="registers", backbone="registers", size=224)
    diagnoser = spgdd.load(profile, root=tmp_path, device="cpu")
    pixels = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        expected = network(pixels).last_hidden_state[:, 5:]
    assert torch.allclose(diagnoser.model.vision.encode_image(pixels).patches[:, 0], expected, atol=1e-6)
    assert diagnoser.diagnose(photograph(), [photograph(seed=1)]).profile == "registers"


def without(folder, name):
    state = load_file(folder / "model.safetensors")
    del state[next(key for key in state if name in key)]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


SPOILS = {
    "a tensor is missing": (lambda folder: without(folder, "norm2.weight"), "lacks 1 tensors.*norm2"),
    "cut": (lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:9000]), "holds no backbone"),
    "another network": (lambda folder: Dinov2Config(**SMALL | {"hidden_size": 64}).save_pretrained(folder),
                        "holds no backbone"),
    "no vision": (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "holds no backbone"),
    "a web page": (lambda folder: (folder / "preprocessor_config.json").write_text("<html>"), "holds no backbone"),
    "missing": (lambda folder: (folder / "config.json").unlink(), r"lacks 1 file.*dinov2_ckpt/small/config.json"),
    "larger patches": (lambda folder: publish(Dinov2Model(Dinov2Config(**SMALL | {"patch_size": 16})), folder),
                       "patches of 16 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILS)
def test_files_that_do_not_fit_are_refused(root, tmp_path, spoil):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    act, message = SPOILS[spoil]
    act(tmp_path / "dinov2_ckpt/small")
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        load_model("dinov2-small", tmp_path, device="cpu")


# What they cannot do is said before any work


def test_without_normal_pictures_it_is_refused_with_the_profiles_that_can(diagnoser, capsys, root):
    with pytest.raises(SpgddError, match="dinov2-small has no words .* give at least one normal picture.* mini"):
        diagnoser.diagnose("no such picture.jpg")
    with pytest.raises(SpgddError, match="without a language part.* mini"):
        diagnoser.diagnose(photograph(), [photograph(seed=1)]).ask("What is it?")
    picture = str(ROOT / "data/mini/gear/test/good/000.jpg")
    assert main(["diagnose", picture, "--profile", "dinov2-small", "--root", str(root)]) == 1
    assert "has no words" in capsys.readouterr().err
    assert main(["train", "--profile", "dinov2-small", "--data_path", "x.json", "--root", str(root)]) == 1
    assert "nothing to train" in capsys.readouterr().err


def test_the_text_is_made_from_the_map_and_says_so(diagnoser):
    normals = [photograph(seed=seed) for seed in range(1, 6)]
    bad = diagnoser.diagnose(photograph(marker=(60, 40)), normals, product="plate")
    assert bad.verdict == "defective" and bad.yes is None and bad.agreement == "not asked"
    assert bad.text.startswith("By the map alone: ") and "plate" in bad.text and "top left" in bad.text
    good = diagnoser.diagnose(normals[0], normals[1:])
    assert good.verdict != "defective" and good.text.startswith("By the map alone: ")
    assert not [note for note in bad.notes if "guess" in note]
    assert [note for note in diagnoser.diagnose(normals[0], normals[1:3]).notes if "guess" in note]


# Memory files, tiles, budget, evaluation


@pytest.mark.parametrize("options", [{}, {"tiles": 2}, {"budget": 200}, {"rotate": True}])
def test_a_memory_file_gives_the_same_diagnosis_and_belongs_to_its_eyes(diagnoser, root, tmp_path, options):
    reference = diagnoser.reference([photograph(seed=1), photograph(seed=2)], "plate", **options)
    path = reference.save(tmp_path / "plate.safetensors")
    query = photograph(marker=(200, 150))
    first = diagnoser.diagnose(query, reference)
    assert first.to_dict() == diagnoser.diagnose(query, diagnoser.load_reference(path)).to_dict()
    other = Diagnoser(load_model(dataclasses.replace(get_profile("dinov2-base"), name="dinov2-small"), root, "cpu"))
    with pytest.raises(WeightsError, match="another vision tower"):
        other.load_reference(path)


def test_the_whole_protocol_runs_without_words_and_text(root, tmp_path, capsys):
    table = tmp_path / "figures.json"
    data = ["evaluate", "--data", str(ROOT / "data/mini"), "--subsets", "gear"]
    data += ["--profile", "dinov2-small", "--root", str(root)]
    assert main([*data, "--shots", "0", "1"]) == 1
    assert "has no words" in capsys.readouterr().err
    assert main([*data, "--shots", "1", "2", "--seeds", "0", "--json", str(table)]) == 0
    assert "text, in percent" not in capsys.readouterr().out
    runs = json.loads(table.read_text())["runs"]
    assert [run["shots"] for run in runs] == [1, 2] and all(0 <= run["metrics"]["image_auroc"] <= 100 for run in runs)
    assert not any("answer" in picture for run in runs for picture in run["pictures"])


def test_weights_are_planned_without_the_language_model(tmp_path, capsys):
    assert main(["weights", "show", "anomalygpt-7b", "--no-language"]) == 0
    shown = capsys.readouterr().out
    assert "imagebind_huge.pth" in shown and "train_mvtec" in shown
    assert "vicuna" not in shown and "pandagpt" not in shown
    assert main(["weights", "verify", "anomalygpt-7b", "--no-language", "--root", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("missing") == 2
    with pytest.raises(WeightsError, match="(?s)lacks 2 file.*download anomalygpt-7b --no-language"):
        load_model("anomalygpt-7b", tmp_path, language=False)


# Places


def tiny_imagebind():
    torch.manual_seed(0)
    config = ImageBindConfig(TowerConfig(64, 4, 4), TowerConfig(32, 1, 4), joint=32, taps=(1, 3))
    model = ImageBind(config, ("vision",)).eval().requires_grad_(False)
    for block in model.modality_trunks["vision"].blocks:
        block.attn.out_proj.weight.mul_(0.02)  # as in ``publish``
    return model


@pytest.fixture(scope="module")
def eyes(diagnoser):
    imagebind = SPGDD(get_profile("imagebind"), tiny_imagebind(), None, None).eval()
    return {"dinov2": diagnoser, "imagebind": Diagnoser(imagebind), "mini": spgdd.load("mini", language=False)}


@pytest.mark.parametrize("kind", ["dinov2", "imagebind", "mini"])
@pytest.mark.parametrize("size", [(200, 1000), (1000, 200), (400, 400)])
def test_a_marker_is_found_within_a_patch_wherever_it_is(eyes, kind, size):
    diagnoser = eyes[kind]
    profile, side = diagnoser.model.profile, 40
    reference = diagnoser.reference([photograph(size, seed=seed) for seed in (1, 2)])
    step = np.array(size) / (profile.size // profile.patch)  # of a patch, in pixels of the picture
    reach = np.tile(step, 2) * (1.5 + max(profile.scales) // 2)  # the marker cuts patches, and is averaged with others
    for x in (side // 2, size[0] - side // 2):
        for y in (side // 2, size[1] - side // 2):
            found = diagnoser.diagnose(photograph(size, marker=(x, y), side=side), reference)
            rows, columns = np.unravel_index(np.nanargmax(found.anomaly_map), found.anomaly_map.shape)
            assert (abs(np.array([columns, rows]) + 0.5 - [x, y]) <= side / 2 + step).all()  # a patch from the marker
            box, drawn = np.array(found.regions[0].box), np.array([x, y, x, y]) + np.array([-1, -1, 1, 1]) * side / 2
            assert (box[:2] <= drawn[:2]).all() and (box[2:] >= drawn[2:]).all() and (abs(box - drawn) <= reach).all()
