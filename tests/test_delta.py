"""Delta checkpoints: complete and strict loading, refusal of bad files, atomic saving."""

import errno
import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import FIXTURES
from spgdd.errors import SpgddError, WeightsError
from spgdd.language import LlamaTokenizer, LoraSettings, Vicuna
from spgdd.tensors import read_tensors
from spgdd.weights.delta import apply_delta, save_delta

PANDA = FIXTURES / "pandagpt"
JOINT = 32


def tiny(r: int = 4, joint: int = JOINT) -> Vicuna:
    return Vicuna.load(PANDA / "llama", joint=joint, lora=LoraSettings(r=r, alpha=r))


@pytest.fixture(scope="module")
def vicuna():
    return tiny()


@pytest.fixture(scope="module")
def published():
    return read_tensors(PANDA / "delta" / "delta.safetensors")


def trainable(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_same(first: dict, second: dict):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("file", ["delta.safetensors", "pytorch_model.pt"])
def test_published_delta(vicuna, file):
    nn.init.normal_(vicuna.llama_proj.weight)
    state = read_tensors(PANDA / "delta" / file)
    base = vicuna.llama_model.get_input_embeddings().weight.clone()
    apply_delta(vicuna, state, expect={"llama_model.", "llama_proj."})
    assert_same(trainable(vicuna), state)
    assert torch.equal(base, vicuna.llama_model.get_input_embeddings().weight)


def test_half_precision_delta_is_kept_in_float32(vicuna, published):
    apply_delta(vicuna, {name: value.half() for name, value in published.items()})
    assert_same(trainable(vicuna), {name: value.half().float() for name, value in published.items()})


def renamed(state):
    state["llama_projection.weight"] = state.pop("llama_proj.weight")
    return "1 unknown here: llama_projection.weight.", "1 missing in the delta: llama_proj.weight."


def missing(state):
    name = [name for name in state if name.endswith("o_proj.lora_B.default.weight")][-1]
    del state[name]
    return (f"1 missing in the delta: {name}.",)


def reshaped(state):
    state["llama_proj.bias"] = torch.zeros(65)
    return ("1 of another shape: llama_proj.bias [65], here [64].",)


def not_finite(state):
    state["llama_proj.bias"] = torch.full((64,), torch.nan)
    return ("1 not finite: llama_proj.bias.",)


@pytest.mark.parametrize("damage", [renamed, missing, reshaped, not_finite])
def test_a_delta_that_does_not_fit_is_refused_whole(vicuna, published, damage):
    before, state = trainable(vicuna), {name: value + 1 for name, value in published.items()}
    messages = damage(state)
    with pytest.raises(WeightsError) as raised:
        apply_delta(vicuna, state)
    assert all(message in str(raised.value) for message in messages)
    assert_same(trainable(vicuna), before)


def test_another_lora_rank_is_named(published):
    with pytest.raises(WeightsError, match=r"16 of another shape: .*\[4, 64\], here \[8, 64\]") as raised:
        apply_delta(tiny(r=8), published)
    assert "LoRA rank" in str(raised.value)


def test_expected_prefixes_must_be_there(vicuna, published):
    projection = {name: value for name, value in published.items() if name.startswith("llama_proj.")}
    apply_delta(vicuna, projection)
    with pytest.raises(WeightsError, match="16 missing in the delta"):
        apply_delta(vicuna, projection, expect={"llama_model.", "llama_proj."})


def anomalygpt_modules() -> nn.Module:
    """Modules with the names and shapes of AnomalyGPT's checkpoint, beside others that it does not hold."""
    module = nn.Module()
    module.image_decoder = nn.Module()
    module.image_decoder.fc = nn.ModuleList(nn.Linear(1280, 1024) for _ in range(4))
    module.prompt_learner = nn.Module()
    module.prompt_learner.base_prompts = nn.Parameter(torch.empty(9, 4096))
    layers, channels = [], [1, 4, 16, 64, 256, 1024]
    for width, following in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(width, following, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    module.prompt_learner.meta_net = nn.Sequential(*layers, nn.Conv2d(1024, 4096, 5))
    module.language = nn.Linear(3, 3)
    return module


@pytest.mark.parametrize("checkpoint", ["pandagpt", "anomalygpt"])
def test_published_7b_names_and_shapes_fit(checkpoint):
    keys = json.loads((FIXTURES / f"{checkpoint}_7b_delta_keys.json").read_text())["keys"]
    state = {name: torch.zeros(1).expand(entry["shape"]) for name, entry in keys.items()}
    with torch.device("meta"):
        if checkpoint == "pandagpt":
            base = LlamaForCausalLM(LlamaConfig(vocab_size=32001))  # the other defaults are LLaMA-7B's
            module = Vicuna(base, LlamaTokenizer(PANDA / "llama" / "tokenizer.model"), joint=1024)
        else:
            module = anomalygpt_modules()
    apply_delta(module, state)
    state.pop(next(iter(state)))
    with pytest.raises(WeightsError, match="1 missing"):
        apply_delta(module, state)


# Files


class Code:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"llama_proj.bias": torch.zeros(64), "more": Code()}, tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    for name in ("evil.pt", "old.pt"):
        with pytest.raises(WeightsError, match="could run code, or is no checkpoint"):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["page.pt", "page.safetensors"])
def test_a_web_page_is_named(tmp_path, name):
    (tmp_path / name).write_text("\n<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(WeightsError, match="it is a web page"):
        read_tensors(tmp_path / name)


def test_a_checkpoint_from_before_2020_loads(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensors(tmp_path / "old.pt")["x"], torch.ones(2))


@pytest.mark.parametrize("file", ["delta.safetensors", "pytorch_model.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, file, share):
    content = (PANDA / "delta" / file).read_bytes()
    (tmp_path / file).write_bytes(content[:int(share * len(content))])
    with pytest.raises(WeightsError, match="is cut short, damaged or no checkpoint"):
        read_tensors(tmp_path / file)


def test_other_contents_are_refused(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "number.pt")
    for name in ("list.pt", "number.pt"):
        with pytest.raises(WeightsError, match="that is no table of tensors"):
            read_tensors(tmp_path / name)
    with pytest.raises(WeightsError, match=r"no weight file .*absent\.pt.*weights download"):
        read_tensors(tmp_path / "absent.pt")


def test_saved_delta_comes_back(tmp_path, vicuna, published):
    apply_delta(vicuna, published)
    path = tmp_path / "runs" / "delta.safetensors"
    save_delta(vicuna, path, {"profile": "mini"})
    assert [file.name for file in path.parent.iterdir()] == ["delta.safetensors"]
    assert_same(load_file(path), published)  # LoRA and projection, nothing frozen
    with safe_open(path, "pt") as file:
        assert file.metadata()["profile"] == "mini"
    fresh = tiny()
    apply_delta(fresh, read_tensors(path))
    assert_same(trainable(fresh), published)


def test_a_stopped_save_leaves_the_previous_delta(tmp_path, vicuna, monkeypatch):
    path = tmp_path / "delta.safetensors"
    save_file({"kept": torch.ones(2)}, path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SpgddError, match="cannot be written .No space"):
        save_delta(vicuna, path, {})
    assert load_file(path).keys() == {"kept"} and len(list(tmp_path.iterdir())) == 1
