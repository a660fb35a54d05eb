"""The whole network against AnomalyGPT's published code, on tiny weights, and the loading of a profile."""

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import spgdd.imagebind
from conftest import FIXTURES, check
from spgdd.diagnosis import Diagnoser
from spgdd.errors import WeightsError
from spgdd.imagebind import HUGE, ImageBind, TextTokenizer, preprocess
from spgdd.language import Answer, LlamaTokenizer, LoraSettings, Vicuna
from spgdd.loading import choose_dtype, load_model
from spgdd.model import SPGDD
from spgdd.profiles import get_profile
from spgdd.selfprompt import rotations
from spgdd.selfprompt.focuser import zero_shot_logits
from spgdd.tensors import read_tensors
from spgdd.training.data import Batch
from spgdd.training.objective import spgdd_loss
from spgdd.weights.delta import save_delta
from test_selfprompt import CONFIG, OUTPUTS, TINY, TINY_IMAGEBIND, TRAIN, prompt_learner_weights

TINY_PROFILE = dataclasses.replace(get_profile("anomalygpt-7b"), name="tiny", imagebind="TINY", lora_rank=4)
RUNS = json.loads((FIXTURES / "anomalygpt/generation.json").read_text())
IMAGES = FIXTURES / "preprocess/images"
MAP_ATOL, LOSS_ATOL = 2e-4, 1e-4  # a tenth of what the reference suggests


def reduced_tokenizer(texts):
    """CLIP ids folded into the tiny text tower's 256, as the reference did."""
    ids = TextTokenizer()(texts)
    folded = 1 + (ids * 7919) % 253
    for special, reduced in ((0, 0), (49406, 254), (49407, 255)):
        folded[ids == special] = reduced
    return folded


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The fixtures laid out as the published files are."""
    root = tmp_path_factory.mktemp("weights")
    for folder in ("imagebind_ckpt", "vicuna_ckpt", "pandagpt_ckpt/7b", "anomalygpt_ckpt/train_mvtec"):
        (root / folder).mkdir(parents=True)
    state = load_file(TINY_IMAGEBIND)
    torch.save(state, root / "imagebind_ckpt/imagebind_huge.pth")
    shutil.copytree(FIXTURES / "pandagpt/llama", root / "vicuna_ckpt/7b_v0")
    shutil.copy(FIXTURES / "pandagpt/delta/pytorch_model.pt", root / "pandagpt_ckpt/7b")
    delta = load_file(FIXTURES / "anomalygpt/image_decoder.safetensors")
    delta |= {f"prompt_learner.{name}": value for name, value in prompt_learner_weights("prompt_learner").items()}
    torch.save(
        {name: torch.nn.Parameter(value) for name, value in delta.items()},
        root / "anomalygpt_ckpt/train_mvtec/pytorch_model.pt",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spgdd.imagebind, "TINY", TINY, raising=False)
        yield root


@pytest.fixture(scope="module")
def model(weights):
    model = load_model(TINY_PROFILE, weights, device="cpu")
    model.text_tokenizer = reduced_tokenizer
    return model


def encode(model, names, fit="crop", rotate=False):
    images = preprocess([Image.open(IMAGES / name) for name in names], fit)
    with torch.no_grad():
        return model.imagebind.encode_image(rotations(images) if rotate else images)


@pytest.mark.parametrize("run", RUNS, ids=[run["name"] for run in RUNS])
def test_a_complete_diagnosis_equals_the_published_one(model, run):
    name = run["name"]
    features = encode(model, [run["image"]], "squash" if run["web_demo"] else "crop")
    logits = zero_shot_logits(model.image_decoder(features.patches), model.anchors(run["class_used"]))
    check(f"{name}.logits", logits[0], OUTPUTS[f"{name}.logits_16x16"], atol=1e-3)
    if run["normal_images"]:  # the published few-shot map crops query and normals even where the chat squashes
        bank = model.memory.build(encode(model, run["normal_images"]).patches)
        anomaly_map = model.anomaly_map(encode(model, [run["image"]]), run["class_used"], bank)
    else:
        anomaly_map = model.anomaly_map(features, run["class_used"])
    if f"{name}.map" in OUTPUTS:
        check(f"{name}.map", anomaly_map, OUTPUTS[f"{name}.map"], atol=MAP_ATOL)
    else:
        check(f"{name}.map", anomaly_map[..., ::7, ::7], OUTPUTS[f"{name}.map_stride7"], atol=MAP_ATOL)
    check(f"{name}.map max", anomaly_map.max(), run["map_max"], atol=MAP_ATOL)
    check(f"{name}.map mean", anomaly_map.mean(), run["map_mean"], atol=MAP_ATOL)
    prompts = model.prompt_tokens(anomaly_map, features.patches)
    check(f"{name}.prompts", prompts, OUTPUTS[f"{name}.prompts"], atol=1e-4)
    answer = model.language.generate(
        features.embedding, run["prompt"], prompt_tokens=prompts, max_new_tokens=run["max_new_tokens"]
    )
    assert answer.ids == run["new_tokens"]


@pytest.mark.parametrize("run", [run for run in RUNS if run["normal_images"]], ids=lambda run: run["name"])
def test_imagebind_alone_makes_the_published_few_shot_map(weights, run):
    """Of profile imagebind at AnomalyGPT's scale; it reads neither the text tower nor any other file."""
    profile = dataclasses.replace(get_profile("imagebind"), imagebind="TINY", scales=(1,))
    model = load_model(profile, weights, device="cpu")
    assert model.vision.modalities == ("vision",) and model.language is model.image_decoder is None
    bank = model.memory.build(encode(model, run["normal_images"]).patches)
    anomaly_map = model.anomaly_map(encode(model, [run["image"]]), bank=bank)
    check(f"{run['name']}.map alone", anomaly_map.mean(), run["map_mean"], atol=MAP_ATOL)
    if f"{run['name']}.map" in OUTPUTS:
        check(f"{run['name']}.map alone", anomaly_map, OUTPUTS[f"{run['name']}.map"], atol=MAP_ATOL)
    else:
        expected = OUTPUTS[f"{run['name']}.map_stride7"]
        check(f"{run['name']}.map alone", anomaly_map[..., ::7, ::7], expected, atol=MAP_ATOL)


def training_inputs(model):
    train = CONFIG["train"]
    masks = torch.cat([torch.zeros(1, 224, 224), TRAIN["C.mask"].float()])
    return encode(model, train["images_from"]), train["class_names"], train["conversations"], masks


@pytest.mark.parametrize("branch", ["train_zero", "train_few"])
def test_training_loss_and_gradients_equal_the_published_ones(model, branch):
    features, products, conversations, masks = training_inputs(model)
    normals = None
    if branch == "train_few":
        normals = [encode(model, [CONFIG["train"]["normal_reference_image"]], rotate=True).patches] * 2
    model.zero_grad()
    batch = Batch([], features, products, conversations, masks, normals)
    loss = spgdd_loss(model, batch, CONFIG["train"]["max_tgt_len"])
    loss.total.backward()
    expected = CONFIG["train"]["results"][branch]
    check(f"{branch}.total", loss.total, expected["total"], atol=LOSS_ATOL)
    check(f"{branch}.language", loss.language, expected["lm"], atol=LOSS_ATOL)
    for part in ("focal", "dice"):
        check(f"{branch}.{part}", loss.parts[part], sum(expected[part]), atol=LOSS_ATOL)
    # A rounding of 1e-7 in the zero-shot map moves a maximum of the max-pooling: 2e-3 in gradients.
    atol = 2e-3 if branch == "train_zero" else 1e-4
    parameters = dict(model.named_parameters())
    for name, norm in expected["grad_norm"].items():
        gradient = parameters[name].grad
        check(f"{branch}.norm {name}", gradient.norm(), norm, atol=atol, rtol=1e-4)
        if f"{branch}.grad.{name}" in TRAIN:
            check(f"{branch}.grad {name}", gradient, TRAIN[f"{branch}.grad.{name}"], atol=atol, rtol=1e-4)


def test_a_chat_batch_has_the_language_loss_alone(model):
    features, _, conversations, _ = training_inputs(model)
    loss = spgdd_loss(model, Batch([], features, ["object"] * 2, conversations, None, None), max_length=160)
    check("sft_no_mask.total", loss.total, CONFIG["train"]["results"]["sft_no_mask"]["total"], atol=LOSS_ATOL)
    assert loss.total == loss.language


# The model's own behaviour


def test_anchors_are_computed_once_and_can_be_trained_with(model, monkeypatch):
    with torch.inference_mode():
        first = model.anchors("screw")
    calls = []
    monkeypatch.setattr(model.imagebind, "encode_text", calls.append)
    assert model.anchors("screw") is first and not calls
    assert first.dtype == torch.float32 and not first.is_inference() and not first.requires_grad
    assert not torch.allclose(first[0], first[1], atol=1e-3)


def test_maps_and_tokens_need_no_second_pass_through_the_tower(model, monkeypatch):
    features = encode(model, ["01_rgb_301x203.png"])
    bank = model.memory.build(features.patches)
    monkeypatch.setattr(model.imagebind, "encode_image", None)
    for anomaly_map in (model.anomaly_map(features, "nut"), model.anomaly_map(features, bank=bank)):
        tokens = model.prompt_tokens(anomaly_map, features.patches)
        assert anomaly_map.shape == (1, 1, 224, 224) and tokens.shape == (1, 18, 64)
        assert not anomaly_map.requires_grad and tokens.requires_grad, "training reaches the prompt learner"


def test_a_device_map_reaches_the_language_model_alone(weights, monkeypatch):
    maps, load = [], Vicuna.load
    monkeypatch.setattr(Vicuna, "load", lambda *options: maps.append(options[3:5]) or load(*options))
    for device_map in (None, "auto"):
        assert load_model(TINY_PROFILE, weights, device="cpu", device_map=device_map).device == torch.device("cpu")
    assert maps == [(torch.device("cpu"), None), (torch.device("cpu"), "auto")]


def test_a_diagnosis_keeps_no_gradients(model, monkeypatch):
    seen = []
    answer = Answer("No.", [], "eos", yes=0.25)
    monkeypatch.setattr(model.language, "stream", lambda *inputs: seen.append(inputs) or iter([answer]))
    Diagnoser(model).diagnose(FIXTURES / "preprocess/images/01_rgb_301x203.png", product="nut")
    embedding, _, _, tokens, _ = seen[0]
    assert tokens.shape == (1, 18, 64) and not tokens.requires_grad and not embedding.requires_grad


def test_a_bank_goes_from_one_model_to_its_like_in_any_precision(model, weights, tmp_path):
    reference = Diagnoser(model).reference(IMAGES / "07_exif6_200x120.jpg", "screw", budget=100)
    path = reference.save(tmp_path / "screw.safetensors")
    half = load_model(TINY_PROFILE, weights, device="cpu", dtype=torch.bfloat16)
    half.text_tokenizer = reduced_tokenizer
    again = Diagnoser(half).load_reference(path)
    assert (again.product, again.profile, again.bank.normals) == ("screw", "tiny", 1)
    features = encode(half, ["01_rgb_301x203.png"])
    assert features.patches.dtype == torch.bfloat16 and half.image_decoder.fc[0].weight.dtype == torch.float32
    exact = model.anomaly_map(encode(model, ["01_rgb_301x203.png"]), bank=reference.bank)
    check("map in bfloat16", half.anomaly_map(features, bank=again.bank), exact, atol=0.02)
    half.imagebind.modality_trunks["vision"].blocks[0].attn.in_proj_weight[0, 0].mul_(-1)
    del half.fingerprint
    with pytest.raises(WeightsError, match="made with another vision tower"):
        Diagnoser(half).load_reference(path)


def test_the_gpu_decides_the_precision(monkeypatch):
    assert choose_dtype("cpu")[0] == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_dtype("cuda") == (
        torch.float16,
        "float16: Tesla T4 (compute capability 7.5) has no bfloat16",
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_dtype("cuda:0")[0] == torch.bfloat16


# Loading


def test_missing_files_are_listed_all_at_once(tmp_path):
    (tmp_path / "imagebind_ckpt").mkdir()
    (tmp_path / "imagebind_ckpt/imagebind_huge.pth").touch()
    with pytest.raises(WeightsError) as error:
        load_model("spgdd-7b", tmp_path)
    message = str(error.value)
    for part in (
        "lacks 4 file(s)",
        "vicuna_ckpt/7b_v0/config.json (notebook 01)",
        "vicuna_ckpt/7b_v0/tokenizer.model (notebook 01)",
        "pandagpt_ckpt/7b/pytorch_model.pt (notebook 01)",
        "spgdd_ckpt/7b/delta.safetensors (notebook 05)",
        "spgdd weights download spgdd-7b",
        "SPGDD_WEIGHTS",
    ):
        assert part in message
    assert "imagebind_huge" not in message


def test_without_a_language_part_no_file_of_it_is_needed_and_the_map_is_the_same(model, weights, tmp_path):
    for folder in ("imagebind_ckpt", "anomalygpt_ckpt"):
        (tmp_path / folder).symlink_to(weights / folder)
    silent = load_model(TINY_PROFILE, tmp_path, device="cpu", language=False)
    silent.text_tokenizer = reduced_tokenizer
    assert silent.language is silent.prompt_learner is silent.focus is silent.memory_tokens is None
    features = encode(model, ["01_rgb_301x203.png"])
    for bank in (None, model.memory.build(encode(model, ["07_exif6_200x120.jpg"]).patches)):
        assert torch.equal(silent.anomaly_map(features, "screw", bank), model.anomaly_map(features, "screw", bank))
    with pytest.raises(WeightsError, match=r"lacks 3 file\(s\)"):
        load_model(TINY_PROFILE, tmp_path, device="cpu")


def test_the_weights_folder_may_come_from_the_environment(weights, monkeypatch):
    monkeypatch.setenv("SPGDD_WEIGHTS", str(weights))
    assert load_model(TINY_PROFILE, device="cpu").profile is TINY_PROFILE


def test_a_loaded_model_is_in_evaluation_mode_and_only_small_parts_can_be_trained(model):
    assert not any(module.training for module in model.modules())
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    parts = {name.split(".")[0] for name in trainable}
    assert parts == {"language", "image_decoder", "prompt_learner", "memory"}
    assert all("lora_" in name or "llama_proj" in name for name in trainable if name.startswith("language"))


def delta_without(weights, prefix):
    state = read_tensors(weights / "anomalygpt_ckpt/train_mvtec/pytorch_model.pt")
    return {name: value for name, value in state.items() if not name.startswith(prefix)}


@pytest.mark.parametrize("prefix", ["prompt_learner.meta_net.6.bias", "image_decoder"])
def test_a_delta_that_lacks_a_part_is_refused(weights, tmp_path, prefix):
    torch.save(delta_without(weights, prefix), tmp_path / "delta.pt")
    delta = dataclasses.replace(TINY_PROFILE.deltas[1], file=str(tmp_path / "delta.pt"))
    profile = dataclasses.replace(TINY_PROFILE, deltas=(TINY_PROFILE.deltas[0], delta))
    with pytest.raises(WeightsError, match=rf"delta\.pt: .*{prefix}"):
        load_model(profile, weights, device="cpu")


def test_deltas_load_in_order_and_a_trained_one_brings_its_memory(model, weights, tmp_path):
    parts = get_profile("mini").deltas[-1].parts
    delta = dataclasses.replace(TINY_PROFILE.deltas[1], file=str(tmp_path / "delta.safetensors"), parts=parts)
    deltas = (TINY_PROFILE.deltas[0], delta)
    profile = dataclasses.replace(TINY_PROFILE, scales=(1, 3, 5), focus=True, deltas=deltas)
    trained = load_model(dataclasses.replace(profile, deltas=deltas[:1]), weights, device="cpu")
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    save_delta(trained, tmp_path / "delta.safetensors", {"profile": "tiny"})
    loaded = load_model(profile, weights, device="cpu")
    assert loaded.memory.gates.shape == (4, 3, 64) and (loaded.memory.gates == 2).all()
    assert (loaded.memory.fusion == 1).all()
    assert torch.equal(loaded.language.llama_proj.bias, model.language.llama_proj.bias + 1)
    for (name, own), other in zip(loaded.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(own, other), name
    state = read_tensors(tmp_path / "delta.safetensors")
    del state["memory.gates"]
    save_file(state, tmp_path / "delta.safetensors")
    with pytest.raises(WeightsError, match="memory.gates"):
        load_model(profile, weights, device="cpu")


def published(file):
    keys = json.loads((FIXTURES / file).read_text())["keys"]
    return {name: tuple(entry["shape"]) for name, entry in keys.items()}


def test_the_7b_profile_has_the_names_and_shapes_of_the_published_files():
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    profile = get_profile("anomalygpt-7b")
    tokenizer = LlamaTokenizer(FIXTURES / "pandagpt/llama/tokenizer.model")
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=32001, **sizes))
        lora = LoraSettings(r=profile.lora_rank, alpha=profile.lora_rank)
        model = SPGDD(profile, ImageBind(HUGE), Vicuna(llama, tokenizer, HUGE.joint, lora), TextTokenizer())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    imagebind = {
        f"vision.{name}": shape
        for name, shape in published("imagebind_huge_keys.json").items()
        if name.split(".")[1] in ("vision", "text")
    }
    assert {name: shape for name, shape in shapes.items() if name.startswith("vision.")} == imagebind
    panda = {f"language.{name}": shape for name, shape in published("pandagpt_7b_delta_keys.json").items()}
    assert {k: v for k, v in shapes.items() if "lora_" in k or k.startswith("language.llama_proj")} == panda
    own = {k: v for k, v in shapes.items() if k.split(".")[0] in ("image_decoder", "prompt_learner")}
    assert own == published("anomalygpt_7b_delta_keys.json")
    assert shapes["memory.gates"] == (4, 1, 1280) and shapes["memory.fusion"] == (4, 1)
