"""Folders of LLaMA-shaped weights: their tensors, and telling LLaMA's many relatives apart."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spgdd.errors import WeightsError
from spgdd.files import read_json
from spgdd.tensors import AGAIN, Spec, TensorFile

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
EMBEDDING = "model.embed_tokens.weight"
SIZES = {4096: "7b", 5120: "13b"}  # by hidden size
V0_ROWS = 32001  # vocabulary of Vicuna v0: LLaMA's 32000 and a padding token; v1.1 went back to 32000
DELTA_NORM = 0.1  # the last norm's weights are above 1 in LLaMA and Vicuna, and near 0 in their difference
NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings",
           "rms_norm_eps", "rope_theta")  # of a config


def llama_specs(hidden: int, intermediate: int, layers: int, vocabulary: int) -> dict[str, Spec]:
    """Names, float16 and shapes of a LLaMA-1 model, in the order in which it was published."""
    shapes = {EMBEDDING: (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{at}mlp.gate_proj.weight": (intermediate, hidden),
                   f"{at}mlp.down_proj.weight": (hidden, intermediate),
                   f"{at}mlp.up_proj.weight": (intermediate, hidden),
                   f"{at}input_layernorm.weight": (hidden,),
                   f"{at}post_attention_layernorm.weight": (hidden,)}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    return {name: (torch.float16, shape) for name, shape in shapes.items()}


def read_config(folder: Path) -> dict:
    """config.json of a LLaMA-shaped model; WeightsError where it is damaged."""
    config = read_json(folder / "config.json", AGAIN, WeightsError)
    for key in NUMBERS:
        value = _rope(config).get(key, 0)
        if not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise WeightsError(f"{folder / 'config.json'} is damaged ({key} is {value!r}). {AGAIN}")
    return config


def _rope(config: dict) -> dict:
    """A config with its rotary base where it used to be."""
    rope = config.get("rope_parameters")
    return config | rope if isinstance(rope, dict) else config


class Shards:
    """A folder of LLaMA weights in .safetensors or .bin shards: its config, all specs, single tensors."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        index = next((name for name in INDEXES if (self.folder / name).is_file()), None)
        if index:
            shards = read_json(self.folder / index, AGAIN, WeightsError).get("weight_map")
            self.files = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
        else:
            self.files = [name for name in SINGLE if (self.folder / name).is_file()][:1]
        if not self.files:
            hint = " (consolidated.*.pth is Meta's own layout: take the converted llama-7b of the catalogue)"
            raise WeightsError(f"{folder} holds no weights: none of {', '.join(INDEXES + SINGLE)} is there"
                               + (hint if list(self.folder.glob("consolidated*.pth")) else "") + ".")
        opened = [TensorFile(self.folder / name) for name in self.files]
        # Old conversions also store the rotary frequencies, which are computed and not learned.
        self._home = {name: file for file in opened for name in file.specs if not name.endswith("inv_freq")}
        self.specs = {name: file.specs[name] for name, file in self._home.items()}
        # Rows of the vocabulary, counted in the tensor itself: configs are often wrong about it.
        self.rows = self.specs[EMBEDDING][1][0] if EMBEDDING in self.specs else 0

    def read(self, name: str) -> Tensor:
        return self._home[name].read(name)

    def require(self, rows: int, *dtypes: torch.dtype) -> dict[str, Spec]:
        """What a model of this config with a vocabulary of `rows` holds; WeightsError unless it is here.

        Names and shapes are compared, and dtypes where they are given.
        """
        hidden, intermediate, layers = (int(self.config.get(key, 0)) for key in NUMBERS[:3])
        expected = llama_specs(hidden, intermediate, min(layers, len(self.specs)), rows)
        problems = [f"{name} is missing" for name in expected if name not in self.specs]
        problems += [f"{name} is unexpected" for name in self.specs if name not in expected]
        for name in expected.keys() & self.specs.keys():
            dtype, shape = self.specs[name]
            if shape != expected[name][1]:
                problems.append(f"{name} is {shape} instead of {expected[name][1]}")
            if dtypes and dtype not in dtypes:
                problems.append(f"{name} is {str(dtype).removeprefix('torch.')}, which is not what was published")
        if problems:
            raise WeightsError(f"{self.folder} does not hold the model that its config describes: "
                               f"{'; '.join(sorted(problems)[:5])} ({len(problems)} problems).")
        return expected


class Recognised(NamedTuple):
    """What a folder with a LLaMA-shaped model holds."""

    kind: str  # "llama", "vicuna-v0", "delta-v0" or "other"
    size: str  # "7b", "13b" or "custom"
    text: str  # one sentence for people


def recognise(folder: str | Path) -> Recognised:
    """Tell LLaMA, Vicuna v0, its delta and their relatives apart, by config, shapes and one small tensor.

    Raises WeightsError for an unreadable folder and for one whose tensors are not those of its config.
    """
    shards = Shards(folder)
    rows, size = shards.rows, SIZES.get(shards.config.get("hidden_size"), "custom")
    if other := wrong_base(shards.config, rows):
        return Recognised("other", size, f"{folder} holds {other}. Only LLaMA (1, of February 2023), the v0 "
                          "delta and Vicuna v0 fit: on any other base the published deltas answer nonsense.")
    shards.require(rows)
    if shards.read("model.norm.weight").float().abs().mean().item() < DELTA_NORM:
        if size != "custom" and rows != V0_ROWS:
            return Recognised("other", size, f"{folder} holds the delta of Vicuna v1.1 ({rows} rows; v0 has "
                              f"{V0_ROWS}). Get vicuna-{size}-delta-v0.")
        return Recognised("delta-v0", size, f"{folder} holds a Vicuna v0 delta ({rows} rows).")
    if rows == V0_ROWS:
        return Recognised("vicuna-v0", size, f"{folder} holds a merged Vicuna v0 ({rows} rows).")
    return Recognised("llama", size, f"{folder} has the shapes of LLaMA ({rows} rows). Vicuna v1.1 and v1.3 "
                      "have them too: only the hashes (`spgdd weights verify`) tell these apart.")


def require_v0(folder: Path) -> None:
    """Refuse a 7B or 13B base other than Vicuna v0 by its config alone, before its weights are read."""
    config = read_config(folder)
    rows = config.get("vocab_size")
    other = wrong_base(config, rows)
    if not other and config.get("hidden_size") in SIZES and rows != V0_ROWS:
        other = "the original LLaMA, or Vicuna v1.1 or v1.3"
    if other:
        raise WeightsError(f"{folder} holds {other} (vocabulary {rows}). The deltas need Vicuna v0 with "
                           f"vocabulary {V0_ROWS}; other bases answer nonsense. Notebook 01 makes it.")


def wrong_base(config: dict, rows: int) -> str | None:
    """What a model is, by its config and vocabulary rows, where it cannot be LLaMA 1 or Vicuna v0; else None."""
    if config.get("model_type") != "llama":
        return f"a {config.get('model_type')!r} model"
    name = str(config.get("_name_or_path", "")).lower()
    for version in ("v1.1", "v1.3", "v1.5"):
        if "vicuna" in name and version.removeprefix("v") in name:
            return f"Vicuna {version} (by the name in its config)"
    if _rope(config).get("rope_theta", 10000) > 10000 or rows == 32016:
        return "CodeLlama or Llama-3 (by its rotary base or vocabulary)"
    if config.get("max_position_embeddings", 2048) > 2048 or config.get("rms_norm_eps") == 1e-5:
        return "Llama-2 or Vicuna v1.5, which is made from it (by context length or norm epsilon)"
    if config.get("hidden_size") in SIZES and rows not in (32000, V0_ROWS):
        return f"a LLaMA relative with {rows} vocabulary rows"
    return None
