"""Vicuna v0 from LLaMA and its delta, tensor by tensor."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spgdd.errors import WeightsError
from spgdd.tensors import (
    STANDIN,
    Spec,
    is_standin,
    sha256_of,
    spec_bytes,
    split,
    write_json,
    write_safetensors,
)
from spgdd.weights.catalog import readable
from spgdd.weights.llama import INDEXES, Shards, recognise

TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
MERGE_REPORT = "merge_report.json"  # in the merged folder: SHA-256 of each of its files


def merge_vicuna(base: str | Path, delta: str | Path, out: str | Path, shard_bytes: int = 10**9,
                 progress: bool = True) -> dict:
    """Add the v0 delta to LLaMA, both as .bin or .safetensors, and write Vicuna v0 as sharded .safetensors.

    As FastChat 0.1 did it: LLaMA's vocabulary gets one row of zeros, then both are added in float16. One
    tensor of each is in memory at a time. A call that was killed continues with the shard it had begun. Kind,
    vocabulary, names, shapes, dtypes and disk are checked before the first byte is written, and everything is
    read back at the end. Returns the report that is also left in `out`. Raises WeightsError.
    """
    base, delta, out = Shards(base), Shards(delta), Path(out)
    specs = _check_pair(base, delta)
    tokenizer = {name: folder / name for name in TOKENIZER for folder in (base.folder, delta.folder)
                 if (folder / name).is_file()}  # the delta's where both have it
    if "tokenizer.model" not in tokenizer:
        raise WeightsError(f"tokenizer.model is neither in {base.folder} nor in {delta.folder}. "
                           "Complete either folder with `spgdd weights download`.")
    inputs = {"base": _identity(base), "delta": _identity(delta), "shard_bytes": shard_bytes}
    out.mkdir(parents=True, exist_ok=True)
    report = _continued(out, inputs)
    groups = split(specs, shard_bytes)
    shards = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": {name: specs[name] for name in group}
              for i, group in enumerate(groups, 1)}
    todo = {name: group for name, group in shards.items() if name not in report["files"]}
    need = sum(spec_bytes(spec) for group in todo.values() for spec in group.values())
    if need + 10**8 > shutil.disk_usage(out).free:
        free = readable(shutil.disk_usage(out).free)
        raise WeightsError(f"Merging needs {readable(need)} in {out}; {free} are free.")
    mark = {"standin": STANDIN} if is_standin(base.folder) or is_standin(delta.folder) else {}
    with tqdm(total=need, unit="B", unit_scale=True, desc="merging", disable=not progress) as bar:
        for name, group in todo.items():
            sums = _sums(base, delta, group, bar)
            digest = write_safetensors(out / name, group, sums, {"format": "pt"} | mark)
            report["files"][name] = {"bytes": (out / name).stat().st_size, "sha256": digest}
            write_json(out / MERGE_REPORT, report)
    for name, source in tokenizer.items():
        shutil.copyfile(source, out / name)
    config = {key: value for key, value in (base.config | delta.config).items() if not key.startswith("_")}
    config.pop("torch_dtype", None)
    write_json(out / "config.json", mark | config | {  # token ids: old conversions hold wrong ones
        "architectures": ["LlamaForCausalLM"], "vocab_size": delta.rows, "dtype": "float16",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    write_json(out / INDEXES[0], mark | {"metadata": {"total_size": sum(map(spec_bytes, specs.values()))},
               "weight_map": {name: file for file, group in shards.items() for name in group}})
    return _finished(out, report, tokenizer)


def _check_pair(base: Shards, delta: Shards) -> dict[str, Spec]:
    """Refuse a pair that cannot give Vicuna v0; returns the specs of the result."""
    kinds = {"LLaMA": (recognise(base.folder), "llama"), "delta": (recognise(delta.folder), "delta-v0")}
    for role, (found, kind) in kinds.items():
        if found.kind != kind:
            raise WeightsError(f"As {role}, a folder was given that does not fit. {found.text}")
    rows, wanted = base.rows, delta.rows
    if wanted != rows + 1:
        raise WeightsError(f"LLaMA has {rows} vocabulary rows and the delta {wanted}; the v0 delta has one "
                           "more than its base. Both must be of the same size (7B with 7B).")
    base.require(base.expected(rows), {torch.float16, torch.float32})
    specs = base.expected(wanted)
    delta.require(specs, {torch.float16})
    return specs


def _identity(shards: Shards) -> list:
    """Changes when a shard is replaced."""
    stats = [(name, (shards.folder / name).stat()) for name in shards.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _sums(base: Shards, delta: Shards, group: dict[str, Spec], bar: tqdm) -> Iterator[tuple[str, Tensor]]:
    for name in group:
        merged = delta.read(name)
        original = base.read(name).half()
        merged[:len(original)] += original  # the delta's one more vocabulary row stays as it is
        yield name, merged
        bar.update(spec_bytes(group[name]))


def _continued(out: Path, inputs: dict) -> dict:
    """The report of an earlier merge of the same inputs, reduced to shards that are there; or a new one."""
    path = out / MERGE_REPORT
    if path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["inputs"] == inputs:
            report["files"] = {name: item for name, item in report["files"].items()
                               if (out / name).is_file() and (out / name).stat().st_size == item["bytes"]}
            return report | {"complete": False}
    elif any(out.glob("*.safetensors")) or any(out.glob("*.bin")):
        raise WeightsError(f"{out} already holds weights that were not merged here. Choose another folder.")
    return {"complete": False, "inputs": inputs, "files": {}}


def _finished(out: Path, report: dict, tokenizer: dict) -> dict:
    """Read everything back, and mark the report complete. Damaged shards are removed, to be merged again."""
    for name, item in list(report["files"].items()):
        if sha256_of(out / name)[0] != item["sha256"]:
            (out / name).unlink()
            raise WeightsError(f"{out / name} does not read back as written: disk or memory is faulty. "
                               "Run the merge again; it redoes this file.")
    for name in (*tokenizer, "config.json", INDEXES[0]):
        report["files"][name] = {"bytes": (out / name).stat().st_size, "sha256": sha256_of(out / name)[0]}
    write_json(out / MERGE_REPORT, report | {"complete": True})
    return report | {"complete": True}
