"""Write stand-ins: files with the names, keys, shapes, dtypes and shards of the published ones, and random values.

    python scripts/write_standins.py anomalygpt-7b --root FOLDER    # 19 GB, some minutes

With spgdd-7b comes what a reader trains in notebook 05, too. A class can rehearse every step with them, and tests can
measure at full size, without licence and download.
"""

import argparse
import math
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import nn
from torch.serialization import skip_data
from tqdm.auto import tqdm

from imagebind_senses import WHOLE, AllSenses
from spgdd.errors import WeightsError
from spgdd.files import whole_file, write_json
from spgdd.imagebind import HUGE, MODALITIES, ImageBind
from spgdd.model import SPGDD
from spgdd.profiles import PROFILES, Profile, weights_folder
from spgdd.selfprompt import PatchDecoder, PromptLearner
from spgdd.tensors import STANDIN, Spec, is_standin, spec_bytes
from spgdd.weights.catalog import Bundle, get_bundle, get_bundles, readable
from spgdd.weights.llama import llama_specs
from spgdd.weights.plan import refuse_other_weights

LLAMA = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40)}  # width, width between, layers; heads of width 128
DINOV2 = {"small": (384, 6), "base": (768, 12)}  # width, heads
PUBLISHED = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
             "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}
SHARD_BYTES = 10**10  # a shard of the published files ends before the tensor that would exceed this
WORDS = "Human Assistant Is there any anomaly in the image This is a photo of for detection Yes No What kind defect"
POOL = 2**20 + 7  # random values that are repeated, from another start in each tensor


def standin(names: str | Iterable[str], root: str | Path | None = None, progress: bool = True) -> list[Path]:
    """Write stand-ins for the profiles or bundles named; returns the files written.

    Existing stand-ins are kept; files that are none are never replaced. Raises WeightsError there, and when
    the disk is too small.
    """
    root, written = weights_folder(root), []
    bundles = [get_bundle(name) for bundle in get_bundles(names)
               for name in ([bundle.name] if bundle.files else bundle.recipe)]
    todo = [bundle for bundle in bundles if not all((root / file.path).exists() for file in bundle.files)]
    refuse_other_weights(bundles, root)
    for bundle in bundles:
        there = [file.path for file in bundle.files if (root / file.path).exists()]
        real = [path for path in there if not is_standin(root / path)]
        if bundle.contents["kind"] == "shipped" or real:
            raise WeightsError(f"{bundle.name} is there ({', '.join(real) or 'part of this repository'}); "
                               "stand-ins never replace other files. Give another root.")
    root.mkdir(parents=True, exist_ok=True)
    need = sum(spec_bytes(spec) for bundle in todo for spec in bundle_specs(bundle).values())
    free = shutil.disk_usage(root).free
    if need + 10**8 > free:
        raise WeightsError(f"The stand-ins need {readable(need)}; {readable(free)} are free in {root}.")
    with tqdm(total=need, unit="B", unit_scale=True, desc="stand-ins", disable=not progress) as bar:
        for bundle in todo:
            for path in _write_bundle(bundle, root / bundle.folder):
                written.append(path)
                bar.update(path.stat().st_size)
    chosen = [PROFILES[name] for name in ([names] if isinstance(names, str) else names) if name in PROFILES]
    return written + [path for profile in chosen for path in write_trained(profile, root)]


def write_trained(profile: Profile, root: Path) -> list[Path]:
    """What a reader trains, as it is before training; returns the file written, none where it is there."""
    delta = profile.deltas[-1] if profile.deltas else None
    if not delta or delta.notebook != "notebook 05" or (path := root / delta.file).exists():
        return []
    with torch.device("meta"):
        imagebind = ImageBind(HUGE)
    model = SPGDD(profile, imagebind, SimpleNamespace(hidden=LLAMA[profile.name.rpartition("-")[2]][0]), None)
    values = {name: value for name, value in model.state_dict().items() if name.startswith(delta.parts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(values, path, {"standin": STANDIN})
    return [path]


def bundle_specs(bundle: Bundle) -> dict[str, Spec]:
    """Names, dtypes and shapes of all tensors of a bundle, in the published order."""
    kind, half = bundle.contents["kind"], torch.float16
    if kind == "dinov2":
        from transformers import Dinov2Config, Dinov2Model

        with torch.device("meta"):
            specs = _specs_of(Dinov2Model(Dinov2Config(**_dinov2(bundle.contents))), torch.float32)
        for ours, published in PUBLISHED.items():
            specs = {name.replace(ours, published): spec for name, spec in specs.items()}
        return specs
    hidden, intermediate, layers = LLAMA[bundle.contents.get("size", "7b")]
    if kind == "imagebind":
        with torch.device("meta"):
            return _specs_of(AllSenses(WHOLE, MODALITIES), torch.float32)
    if kind == "pandagpt":
        specs = {f"llama_model.base_model.model.model.layers.{layer}.self_attn.{x}_proj.lora_{ab}.default.weight":
                 (half, (32, hidden) if ab == "A" else (hidden, 32))
                 for layer in range(layers) for x in "qkvo" for ab in "AB"}
        return specs | {"llama_proj.weight": (half, (hidden, HUGE.joint)), "llama_proj.bias": (half, (hidden,))}
    if kind == "anomalygpt":
        with torch.device("meta"):
            parts = nn.ModuleDict({"image_decoder": PatchDecoder(HUGE.vision.width, HUGE.joint, len(HUGE.taps)),
                                   "prompt_learner": PromptLearner(hidden, (4, 16, 64, 256, 1024))})
        return _specs_of(parts, half)
    published = {}
    for name, spec in llama_specs(hidden, intermediate, layers, bundle.contents["vocabulary"]).items():
        published[name] = spec
        if name.endswith("o_proj.weight"):  # old transformers stored these computed values here, in float32
            published[name.replace("o_proj.weight", "rotary_emb.inv_freq")] = (torch.float32, (64,))
    return published


def _specs_of(module: nn.Module, dtype: torch.dtype) -> dict[str, Spec]:
    return {name: (dtype, tuple(value.shape)) for name, value in module.state_dict().items()}


def _write_bundle(bundle: Bundle, folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    specs, names = bundle_specs(bundle), [file.path.rpartition("/")[2] for file in bundle.files]
    shards = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".safetensors"))]
    delta = bundle.contents["kind"] == "llama-delta"
    split = split_state_dict_into_shards_factory(  # as transformers did for the published files
        specs, get_storage_size=spec_bytes, max_shard_size=SHARD_BYTES, filename_pattern="pytorch_model{suffix}.bin")
    groups = list(split.filename_to_tensors.values()) if len(shards) > 1 else [list(specs)]
    for name, group in zip(shards, groups, strict=True):
        if name.endswith(".safetensors"):
            pool = _pool(folder / name)
            values = {key: torch.cat(list(_values(key, shape, pool))).view(shape) for key, (_, shape) in specs.items()}
            save_file(values, folder / name, {"format": "pt", "standin": STANDIN})
        else:
            write_pickle(folder / name, {key: specs[key] for key in group}, name.endswith(".pt"), delta)
        yield folder / name
    for name in names:
        if name == "pytorch_model.bin.index.json":
            weight_map = {key: shard for shard, group in zip(shards, groups, strict=True) for key in group}
            total = {"total_size": sum(map(spec_bytes, specs.values()))}
            write_json(folder / name, {"standin": STANDIN, "metadata": total, "weight_map": weight_map})
        elif name == "tokenizer.model":
            (folder / name).write_bytes(_tokenizer())
        elif name.endswith(".json"):
            write_json(folder / name, {"standin": STANDIN} | _small_file(name, bundle.contents))
        if name not in shards:
            yield folder / name


def write_pickle(path: Path, specs: dict[str, Spec], parameters: bool, delta: bool = False) -> None:
    """A file as `torch.save` writes it, filled piece by piece; it appears under its name only when complete.

    `parameters`: values are nn.Parameter, as in the published deltas. `delta`: norms near 0 instead of 1.
    """
    make = torch.nn.Parameter if parameters else (lambda value: value)
    pool = _pool(path)
    pools = {dtype: pool.to(dtype) for dtype, _ in specs.values()}
    with whole_file(path) as whole:
        with skip_data():  # writes the archive with room for the values; torch.empty touches no memory
            empty = ((name, torch.empty(shape, dtype=dtype)) for name, (dtype, shape) in specs.items())
            torch.save(OrderedDict((name, make(value)) for name, value in empty), whole.name)
        with zipfile.ZipFile(whole.name, "a") as archive:
            archive.comment = STANDIN.encode()
            entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        with open(whole.name, "r+b") as file:
            for index, (name, (dtype, shape)) in enumerate(specs.items()):
                file.seek(entries[f"data/{index}"].header_offset + 26)
                file.seek(sum(struct.unpack("<HH", file.read(4))), 1)  # past the name and the padding
                for block in _values(name, shape, pools[dtype], delta):
                    file.write(block.numpy().tobytes())


def _pool(path: Path) -> torch.Tensor:
    seed = zlib.crc32(path.parent.name.encode())
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(POOL, dtype=np.float32) * 0.02)


def _values(name: str, shape: tuple[int, ...], pool: torch.Tensor, delta: bool = False) -> Iterator[torch.Tensor]:
    """Small random values; norms near one, masks and scales as published: a forward pass stays finite."""
    size = math.prod(shape)
    if name.endswith(".mask"):
        yield torch.full(shape, -math.inf).triu(1)
    elif name.endswith("log_logit_scale"):
        yield torch.full(shape, math.log(10.0))
    else:
        offset = 1.0 if "norm" in name and name.endswith("weight") and not delta else 0.0
        start = zlib.crc32(name.encode()) % len(pool)
        while size > 0:
            block = pool[start:start + size]
            yield block + offset if offset else block
            size, start = size - len(block), 0


def _dinov2(contents: dict) -> dict:
    width, heads = DINOV2[contents["size"]]
    return {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 12, "image_size": 518,
            "patch_size": 14, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "layerscale_value": 1.0, "qkv_bias": True,
            "hidden_act": "gelu", "use_swiglu_ffn": False}


def _small_file(name: str, contents: dict) -> dict:
    if contents["kind"] == "dinov2":
        if name == "config.json":
            return {"architectures": ["Dinov2Model"], "model_type": "dinov2"} | _dinov2(contents)
        return {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_resize": True,
                "size": {"shortest_edge": 256}, "image_processor_type": "BitImageProcessor"}
    if name != "config.json":
        return {"bos_token_id": 1, "eos_token_id": 2} if name == "generation_config.json" else {}
    hidden, intermediate, layers = LLAMA[contents["size"]]
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": hidden // 128, "vocab_size": contents["vocabulary"], "hidden_act": "silu",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16"}


def _tokenizer() -> bytes:
    """A sentencepiece model of 32000 pieces: LLaMA's bytes, its ## in its place, letters, a few words, fillers.

    The likeliest pieces of a text are taken (unigram): what was said takes as many tokens when it is read again.
    """
    normal, unknown, control, byte = 1, 2, 3, 6
    pieces = {0: ("<unk>", unknown), 1: ("<s>", control), 2: ("</s>", control)}
    pieces |= {3 + code: (f"<0x{code:02X}>", byte) for code in range(256)}
    pieces |= {2277: ("##", normal), 29871: ("\u2581", normal), 29937: ("#", normal)}
    letters = (chr(code) for code in range(33, 127) if chr(code) != "#")
    pieces |= {29872 + i + (i >= 65): (letter, normal) for i, letter in enumerate(letters)}
    pieces |= {300 + i: (f"\u2581{word}", normal) for i, word in enumerate(WORDS.split())}
    model = b""
    for index in range(32000):
        text, kind = pieces.get(index, (f"\u2581standin{index}", normal))
        model += _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", -index) + _field(3, kind))
    unigram, byte_fallback = _field(3, 1), _field(35, 1)
    model += _field(2, _field(2, STANDIN.encode()) + unigram + _field(4, 32000) + byte_fallback)
    return model + _field(3, _field(3, 1) + _field(4, 0))  # dummy space in front, spaces kept


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer, the format of sentencepiece models."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="profiles or parts, see `spgdd weights list`")
    parser.add_argument("--root", type=Path, help="weights folder (default: $SPGDD_WEIGHTS or pretrained_ckpt)")
    arguments = parser.parse_args()
    try:
        written = standin(arguments.names, arguments.root)
    except WeightsError as error:
        parser.exit(1, f"{error}\n")
    print(f"{len(written)} stand-in files written: random values, and marked as such.")


if __name__ == "__main__":
    main()
