"""Vicuna v0 from LLaMA and its delta, tensor by tensor."""

from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from tqdm.auto import tqdm

from spgdd.errors import SpgddError, WeightsError
from spgdd.files import claimed, read_json, require_room, whole_file, write_json
from spgdd.tensors import STANDIN, Spec, digest_of, is_standin, spec_bytes, write_tensors
from spgdd.weights.llama import INDEXES, Shards, recognise

TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
MERGE_REPORT = "merge_report.json"  # in the merged folder: SHA-256 of each of its files


def merge_vicuna(base: str | Path, delta: str | Path, out: str | Path, shard_bytes: int = 5 * 10**8,
                 progress: bool = True) -> dict:
    """Add the v0 delta to LLaMA, both as .bin or .safetensors, and write Vicuna v0 as sharded .safetensors.

    As FastChat 0.1 did it: LLaMA's vocabulary gets one row of zeros, then both are added in float16. One shard is
    in memory at a time. A call that was killed continues with the shard it had begun. Kind, vocabulary, names,
    shapes, dtypes and disk are checked before the first byte is written, and everything is read back at the end.
    Returns the report that is also left in `out`. Raises WeightsError.
    """
    base, delta, out = Shards(base), Shards(delta), Path(out)
    specs = _check_pair(base, delta)
    tokenizer = {name: folder / name for name in TOKENIZER for folder in (base.folder, delta.folder)
                 if (folder / name).is_file()}  # the delta's where both have it
    if "tokenizer.model" not in tokenizer:
        raise WeightsError(f"tokenizer.model is neither in {base.folder} nor in {delta.folder}. "
                           "Complete either folder with `spgdd weights download`.")
    with claimed(out):
        return _merge(base, delta, out, specs, tokenizer, shard_bytes, progress)


def _merge(base: Shards, delta: Shards, out: Path, specs: dict[str, Spec], tokenizer: dict[str, Path],
           shard_bytes: int, progress: bool) -> dict:
    split = split_state_dict_into_shards_factory(specs, get_storage_size=spec_bytes, max_shard_size=shard_bytes,
                                                 filename_pattern="model{suffix}.safetensors")
    inputs = {"base": _identity(base), "delta": _identity(delta), "shard_bytes": shard_bytes}
    report = {"complete": False, "inputs": inputs, "files": _done(out, inputs, split.filename_to_tensors)}
    for unfinished in out.glob(".*.part"):  # of a merge that was killed
        unfinished.unlink()
    todo = {file: names for file, names in split.filename_to_tensors.items() if file not in report["files"]}
    need = sum(spec_bytes(specs[name]) for names in todo.values() for name in names)
    require_room(out, need + 10**8)
    mark = {"standin": STANDIN} if is_standin(base.folder) or is_standin(delta.folder) else {}
    with tqdm(total=need, unit="B", unit_scale=True, desc="merging", disable=not progress) as bar:
        for file, names in todo.items():
            digest = write_tensors(out / file, {name: _sum(base, delta, name, bar) for name in names},
                                   {"format": "pt"} | mark)
            report["files"][file] = {"bytes": (out / file).stat().st_size, "sha256": digest}
            write_json(out / MERGE_REPORT, report)
    for file in split.filename_to_tensors:
        if digest_of(out / file) != report["files"][file]["sha256"]:
            (out / file).unlink()
            raise WeightsError(f"{out / file} does not read back as written: disk or memory is faulty. "
                               "Run the merge again; it redoes this file.")
    for name, source in tokenizer.items():
        with whole_file(out / name) as file:
            file.write(source.read_bytes())
    config = {key: value for key, value in (base.config | delta.config).items() if not key.startswith("_")}
    config.pop("torch_dtype", None)
    write_json(out / "config.json", mark | config | {  # token ids: old conversions hold wrong ones
        "architectures": ["LlamaForCausalLM"], "vocab_size": delta.rows, "dtype": "float16",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    write_json(out / INDEXES[0], mark | {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    for name in (*tokenizer, "config.json", INDEXES[0]):
        report["files"][name] = {"bytes": (out / name).stat().st_size, "sha256": digest_of(out / name)}
    write_json(out / MERGE_REPORT, report | {"complete": True})
    return report | {"complete": True}


def _check_pair(base: Shards, delta: Shards) -> dict[str, Spec]:
    """Refuse a pair that cannot give Vicuna v0; returns the specs of the result."""
    for role, shards, kind in (("LLaMA", base, "llama"), ("delta", delta, "delta-v0")):
        found = recognise(shards.folder)
        if found.kind != kind:
            raise WeightsError(f"As {role}, a folder was given that does not fit. {found.text}")
    if delta.rows != base.rows + 1:
        raise WeightsError(f"LLaMA has {base.rows} vocabulary rows and the delta {delta.rows}; the v0 delta has one "
                           "more than its base. Both must be of the same size (7B with 7B).")
    base.require(base.rows, torch.float16, torch.float32)
    return delta.require(delta.rows, torch.float16)


def _identity(shards: Shards) -> list:
    """Changes when a shard is replaced."""
    stats = [(name, (shards.folder / name).stat()) for name in shards.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _sum(base: Shards, delta: Shards, name: str, bar: tqdm) -> Tensor:
    merged = delta.read(name)
    original = base.read(name).half()
    merged[:len(original)] += original  # the delta's one more vocabulary row stays as it is
    bar.update(merged.nbytes)
    return merged


def read_report(folder: Path) -> dict | None:
    """The report of a merge into a folder, or None; of a damaged one nothing is believed."""
    if not (folder / MERGE_REPORT).is_file():
        return None
    try:
        report = read_json(folder / MERGE_REPORT)
        files = {str(name): {"bytes": int(item["bytes"]), "sha256": str(item["sha256"])}
                 for name, item in report["files"].items()}
        return {"complete": report["complete"] is True, "inputs": report["inputs"], "files": files}
    except (SpgddError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return {"complete": False, "inputs": None, "files": {}}


def _done(out: Path, inputs: dict, shards: Iterable[str]) -> dict[str, dict]:
    """The shards that are there and come from an earlier merge of the same inputs, as its report describes them."""
    report = read_report(out)
    if report is None and (any(out.glob("*.safetensors")) or any(out.glob("*.bin"))):
        raise WeightsError(f"{out} already holds weights that were not merged here. Choose another folder.")
    files = report["files"] if report and report["inputs"] == inputs else {}
    return {name: files[name] for name in shards
            if name in files and (out / name).is_file() and (out / name).stat().st_size == files[name]["bytes"]}
