"""ImageBind against the published implementation: its outputs at small sizes, its key list at full size."""

import json
import os

import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from conftest import FIXTURES, check
from imagebind_senses import WHOLE, AllSenses, SensesConfig
from spgdd.errors import WeightsError
from spgdd.imagebind import MINI, MODALITIES, ImageBind, TowerConfig, load_imagebind, towers

TINY = FIXTURES / "tiny_imagebind"
WEIGHTS = TINY / "state_dict.safetensors"
ATOL = 1e-4  # stated by the fixture
INPUTS = ("vision", "vision_interp", "text", "audio", "depth", "thermal", "imu", "vision_video")
BIG = TowerConfig(512, 4, 8)  # 50 MB


@pytest.fixture(scope="module")
def facts():
    return json.loads((TINY / "config.json").read_text())


@pytest.fixture(scope="module")
def config(facts):
    names = ("embed_dim", "num_blocks", "num_heads")
    sizes = {m: TowerConfig(*(facts[m][name] for name in names)) for m in MODALITIES}
    return SensesConfig(
        vision=sizes.pop("vision"),
        text=sizes.pop("text"),
        joint=facts["out_embed_dim"],
        image_size=facts["image_size"],
        patch=facts["patch"][1],
        vocab_size=facts["text"]["vocab_size"],
        context=facts["text"]["context_length"],
        taps=tuple(facts["anomalygpt_layers"]),
        others=sizes,
    )


@pytest.fixture(scope="module")
def tiny(config):
    return load_imagebind(WEIGHTS, config, MODALITIES, kind=AllSenses)


@pytest.fixture(scope="module")
def inputs():
    tensors = {}
    for name in ("inputs", "inputs_other", "inputs_video"):
        tensors |= load_file(TINY / f"{name}.safetensors")
    return {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}


@pytest.fixture(scope="module")
def expected():
    return load_file(TINY / "outputs.safetensors")


@pytest.mark.parametrize("name", INPUTS)
def test_tower_matches_published_at_every_stage(name, tiny, inputs, expected):
    modality = name.split("_")[0]
    seen = {}

    def see_trunk(_, args, out):
        seen.update(trunk_input_tokens=args[0], trunk_output=out[0])

    def see_head(_, args, out):
        seen.update(head_prenorm=out)

    hooks = [
        tiny.modality_trunks[modality].register_forward_hook(see_trunk),
        tiny.modality_heads[modality].register_forward_hook(see_head),
    ]
    seen["final"] = tiny.encode(modality, inputs[name])
    for hook in hooks:
        hook.remove()

    stages = [key for key in expected if key.startswith(f"{name}.") and not key.endswith("_pandagpt")]
    assert len(stages) == 4
    for key in stages:
        stage = key.removeprefix(f"{name}.")
        actual = seen[stage.removesuffix("_first8")]
        if stage.startswith("trunk"):  # the reference keeps one row of the batch, at times its first 8 tokens
            actual = actual[:1, :8] if stage.endswith("_first8") else actual[:1]
        check(f"tiny_imagebind/{key}", actual, expected[key], atol=ATOL, rtol=0)


def test_audio_scale_is_applied_by_anomalygpt_and_left_out_by_pandagpt(tiny, inputs, expected, facts):
    audio = tiny.encode("audio", inputs["audio"])
    scaled = load_file(TINY / "anomalygpt_patch_tokens.safetensors")["audio.final_anomalygpt"]
    check("tiny_imagebind/audio.final_anomalygpt", audio, scaled, atol=ATOL, rtol=0)
    unit = audio / facts["logit_scale_effective"]["audio"]
    check("tiny_imagebind/audio.final_pandagpt", unit, expected["audio.final_pandagpt"], atol=ATOL, rtol=0)


def test_patch_tokens_match_anomalygpt(tiny, inputs, expected):
    reference = load_file(TINY / "anomalygpt_patch_tokens.safetensors")
    embedding, patches = tiny.encode_image(inputs["vision"])
    check("tiny_imagebind/encode_image", embedding, expected["vision.final"], atol=ATOL, rtol=0)
    assert patches.shape == (2, 4, 256, 64)
    for tap in range(4):
        published = reference[f"layer{tap}.raw_LBD"][1:].transpose(0, 1)  # (N, B, D) without CLS -> (B, N, D)
        check(f"tiny_imagebind/layer{tap}.raw_LBD", patches[:, tap], published, atol=ATOL, rtol=0)

    tokens = tiny.modality_preprocessors["text"](inputs["text"])
    _, tapped = tiny.modality_trunks["text"](tokens, None, tiny.config.taps)
    check("tiny_imagebind/text.num_extra_lists", len(tapped), reference["text.num_extra_lists"])


def test_encode_image_reads_the_configured_taps(config, tiny, inputs):
    every = tiny.encode_image(inputs["vision"]).patches
    two = load_imagebind(WEIGHTS, SensesConfig(**(vars(config) | {"taps": (1, 3)})))
    assert torch.equal(two.encode_image(inputs["vision"]).patches, every[:, [1, 3]])


def test_an_image_is_a_clip_of_two_equal_frames(tiny, inputs):
    image = inputs["vision"]
    clip = image[:, None, :, None].expand(-1, 1, -1, 2, -1, -1)  # (B, 1 clip, 3, 2 frames, H, W)
    torch.testing.assert_close(tiny.encode("vision", clip), tiny.encode("vision", image), atol=1e-6, rtol=0)


def test_lengths_of_embeddings(tiny, inputs, facts):
    for modality in ("vision", "text", "depth", "thermal", "imu"):
        length = facts["logit_scale_effective"].get(modality, 1.0)
        lengths = tiny.encode(modality, inputs[modality]).norm(dim=-1)
        torch.testing.assert_close(lengths, torch.full_like(lengths, length), atol=0, rtol=1e-5)


def test_learned_scale_is_capped_at_100(config, inputs):
    model = load_imagebind(WEIGHTS, config)
    model.modality_postprocessors["text"][1].log_logit_scale.fill_(6.0)  # exp(6) = 403
    assert model.encode_text(inputs["text"]).norm(dim=-1).tolist() == pytest.approx([100.0] * 5)


def test_gelu_within_the_product_differs_by_rounding(tiny, inputs, expected, monkeypatch):
    layer, tokens = tiny.modality_trunks["vision"].blocks[0].mlp.fc1, 3 * torch.randn(2, 50, 64)
    exact = F.gelu(layer(tokens))
    torch.testing.assert_close(towers.fused_gelu(tokens, layer), exact, atol=1e-3, rtol=0)
    torch.testing.assert_close(F.gelu(layer(tokens), approximate="tanh"), exact, atol=1e-3, rtol=0)  # a GPU's
    monkeypatch.setattr(towers, "fuses_gelu", lambda x, layer: True)
    embedding = tiny.encode_image(inputs["vision"]).embedding
    torch.testing.assert_close(embedding, expected["vision.final"], atol=1e-3, rtol=0)


def test_text_shorter_than_the_context(tiny, inputs):
    texts = inputs["text"][:1]
    end = texts.argmax(-1).item() + 1  # what follows the end of text is never attended to
    torch.testing.assert_close(tiny.encode_text(texts[:, :end]), tiny.encode_text(texts), atol=1e-5, rtol=0)


def test_huge_state_dict_is_the_published_one():
    reference = json.loads((FIXTURES / "imagebind_huge_keys.json").read_text())
    with torch.device("meta"):
        model = AllSenses(WHOLE, MODALITIES)
    state = model.state_dict()
    assert list(state) == list(reference["keys"])
    for key, value in state.items():
        assert list(value.shape) == reference["keys"][key]["shape"], key
        assert str(value.dtype) == f"torch.{reference['keys'][key]['dtype']}", key
    assert {name for name, _ in model.named_buffers()} == set(reference["buffers"])
    assert sum(p.numel() for p in model.parameters()) == reference["num_params"]
    assert sum(b.numel() for b in model.buffers()) == reference["num_buffer_elems"]
    for tower, numbers in reference["params_per_tower"].items():
        with torch.device("meta"):
            alone = AllSenses(WHOLE, [tower])
        assert sum(p.numel() for p in alone.parameters()) == numbers["total_params"]
        assert all(f".{tower}." in key for key in alone.state_dict())


def test_mini_is_small():
    with torch.device("meta"):
        model = ImageBind(MINI)
    assert sum(p.numel() for p in model.modality_trunks["vision"].parameters()) < 7e6
    assert sum(p.numel() for p in model.parameters()) < 10e6


def test_new_weights_are_finite_and_tell_images_apart():
    torch.manual_seed(0)
    model = ImageBind(MINI)
    features = model.encode_image(torch.randn(2, 3, 224, 224))
    assert features.embedding.shape == (2, 256) and features.patches.shape == (2, 4, 256, 256)
    assert features.patches.isfinite().all() and (features.embedding[0] - features.embedding[1]).norm() > 0.01
    text = model.encode_text(torch.randint(2048, (3, 77)))
    assert text.norm(dim=-1).tolist() == pytest.approx([1 / 0.07] * 3)


def test_towers_train_under_autocast_and_compile_to_one_graph(config):
    model = ImageBind(config)
    pixels, ids = torch.randn(2, 3, 224, 224), torch.randint(1, 256, (2, 77))
    compiled = torch.compile(model.encode_image, fullgraph=True, backend="eager")
    torch.compile(model.encode_text, fullgraph=True, backend="eager")(ids)
    with torch.autocast("cpu", torch.bfloat16):
        features, text = compiled(pixels), model.encode_text(ids)
    ((features.embedding @ text.T).sum() + features.patches.float().square().mean()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_unknown_or_unbuilt_towers_are_refused(config, inputs):
    with pytest.raises(ValueError, match="no 'smell' tower"):
        ImageBind(config, ["vision", "smell"])
    with pytest.raises(ValueError, match="ask for 'audio' in `modalities`"):
        AllSenses(config).encode("audio", inputs["audio"])


# Files


def pth_copy(folder):
    torch.save(load_file(WEIGHTS), folder / "imagebind.pth")
    return folder / "imagebind.pth"


def test_pth_and_safetensors_give_the_same_frozen_model(config, tiny, tmp_path):
    model = load_imagebind(str(pth_copy(tmp_path)), config, MODALITIES, kind=AllSenses)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, tiny.state_dict()[key]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, config, tiny, inputs):
    model = load_imagebind(WEIGHTS, config, MODALITIES, dtype=dtype, kind=AllSenses)
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    for name in INPUTS:  # float32 inputs are converted
        modality = name.split("_")[0]
        half, full = model.encode(modality, inputs[name]), tiny.encode(modality, inputs[name])
        assert half.dtype == dtype
        least = 0.9999 if dtype == torch.float16 else 0.998
        assert torch.cosine_similarity(half.float(), full).min() > least


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_towers_not_asked_for_are_never_read(suffix, config, tmp_path):
    config = SensesConfig(**(vars(config) | {"others": {"audio": BIG, "thermal": BIG}}))
    path = tmp_path / f"full{suffix}"
    state = AllSenses(config, ("vision", "text", "audio", "thermal")).state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    del state
    assert path.stat().st_size > 100e6
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    model = load_imagebind(path, config)
    assert set(model.modality_trunks) == {"vision", "text"}
    model.encode_image(torch.zeros(1, 3, 224, 224))
    assert process.memory_info().rss - before < 40e6


def test_changing_a_loaded_model_leaves_its_file_alone(config, tmp_path):
    path = pth_copy(tmp_path)
    before = path.read_bytes()
    model = load_imagebind(path, config)
    for parameter in model.parameters():
        parameter.add_(1)
    assert path.read_bytes() == before


def test_tensors_that_do_not_fit_are_named(config, tmp_path):
    state = load_file(WEIGHTS)
    del state["modality_heads.vision.2.weight"], state["modality_heads.audio.2.weight"]
    state["modality_trunks.text.blocks.7.norm_1.bias"] = torch.zeros(48)
    state["modality_preprocessors.vision.cls_token"] = torch.zeros(1, 1, 3)
    path = tmp_path / "other.safetensors"
    save_file(state, path)
    with pytest.raises(WeightsError) as error:
        load_imagebind(path, config)
    for part in (
        str(path),
        "1 missing, such as modality_heads.vision.2.weight;",
        "1 unexpected, such as modality_trunks.text.blocks.7.norm_1.bias;",
        "1 of another shape, such as modality_preprocessors.vision.cls_token (1, 1, 3) instead of (1, 1, 64)",
        "spgdd weights",
    ):
        assert part in str(error.value)
    with pytest.raises(WeightsError, match="1 missing, such as modality_heads.audio.2.weight"):
        load_imagebind(path, config, ["audio"], kind=AllSenses)
    with pytest.raises(WeightsError, match=r"\d\d missing.*of another shape"):
        load_imagebind(WEIGHTS, MINI)


class Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["HARM"],)


def test_files_that_are_no_checkpoint_are_refused_in_one_sentence(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    whole = {".pth": pth_copy(tmp_path).read_bytes(), ".safetensors": WEIGHTS.read_bytes()}
    for suffix, content in whole.items():
        damaged = {"half": content[: len(content) // 2], "last_byte": content[:-1], "start": content[:100]}
        for name, data in (damaged | {"page": b"<html>404 not found</html>", "empty": b""}).items():
            path = tmp_path / f"{name}{suffix}"
            path.write_bytes(data)
            with pytest.raises(WeightsError, match=rf"{name}{suffix} \({len(data):,} bytes\) is cut short"):
                load_imagebind(path, config)
    for name, content, message in (
        ("code", {"weight": Harmful()}, "could run code"),
        ("nested", {"model": load_file(WEIGHTS)}, "dict that is no table of tensors"),
        ("list", [torch.zeros(1)], "list that is no table of tensors"),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(WeightsError, match=message):
            load_imagebind(tmp_path / f"{name}.pth", config)
    assert not (tmp_path / "harm").exists()
    with pytest.raises(WeightsError, match="There is no weight file .*missing.pth.*spgdd weights"):
        load_imagebind(tmp_path / "missing.pth", config)
