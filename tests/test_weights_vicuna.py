"""Merging Vicuna from LLaMA and its delta, and telling LLaMA relatives apart, on small models."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import FIXTURES
from spgdd.errors import WeightsError
from spgdd.tensors import STANDIN, TensorFile, is_standin, write_tensors
from spgdd.weights.llama import llama_specs, recognise
from spgdd.weights.merge import merge_vicuna
from spgdd.weights.verify import status, verify

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


def llama(folder, rows, kind="bin", delta=False, dtype=torch.float16, shards=2, change=None, **config):
    """A random LLaMA-shaped checkpoint as published: shards, index, the rotary buffers of old conversions."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(rows + delta)
    tensors = {
        name: torch.randn(shape, generator=generator).mul(0.01 if delta else 0.3).to(dtype)
        for name, (_, shape) in llama_specs(64, 96, 3, rows).items()
    }
    for name in tensors:
        if "norm" in name and not delta:
            tensors[name] += 1
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    (change or (lambda tensors: None))(tensors)
    names, weight_map = list(tensors), {}
    stem = "pytorch_model" if kind == "bin" else "model"
    for i in range(shards):
        group = {name: tensors[name] for name in names[i::shards]}
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{kind}"
        torch.save(group, folder / file) if kind == "bin" else save_file(group, folder / file)
        weight_map |= dict.fromkeys(group, file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(
        json.dumps(
            SIZES | {"model_type": "llama", "vocab_size": rows, "bos_token_id": 0, "eos_token_id": 1} | config
        )
    )
    shutil.copy(FIXTURES / "pandagpt" / "llama" / "tokenizer.model", folder)
    return tensors


def merged_tensors(folder):
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_merge_equals_fastchat(tmp_path, kind, dtype):
    """FastChat 0.1: LLaMA in float16 gets a vocabulary row of zeros, then every tensor is added."""
    base = llama(tmp_path / "base", 50, kind, dtype=dtype)
    delta = llama(tmp_path / "delta", 51, "bin", delta=True)
    report = merge_vicuna(tmp_path / "base", tmp_path / "delta", tmp_path / "out", 30_000, progress=False)
    merged = merged_tensors(tmp_path / "out")
    assert set(merged) == set(llama_specs(64, 96, 3, 51))
    for name, value in merged.items():
        expected = base[name].half()
        if len(expected) == 50:
            expected = torch.cat([expected, torch.zeros(1, 64).half()])
        assert torch.equal(value, expected + delta[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (51, 1, 2)
    shards = [name for name in report["files"] if name.startswith("model-")]
    assert len(shards) > 3 and report["complete"]


def test_transformers_loads_the_merge(tmp_path):
    from transformers import LlamaForCausalLM

    llama(tmp_path / "base", 50, num_attention_heads=4, rms_norm_eps=1e-6)
    llama(tmp_path / "delta", 51, delta=True)
    merge_vicuna(tmp_path / "base", tmp_path / "delta", tmp_path / "out", 30_000, progress=False)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.vocab_size == 51


MERGE = (
    "import sys; from spgdd.weights.merge import merge_vicuna; "
    "merge_vicuna(*sys.argv[1:4], shard_bytes=9000, progress=False)"
)


def test_killed_merge_continues_to_the_same_hashes(tmp_path):
    llama(tmp_path / "base", 50)
    llama(tmp_path / "delta", 51, delta=True)
    expected = merge_vicuna(tmp_path / "base", tmp_path / "delta", tmp_path / "whole", 9000, progress=False)
    command = [sys.executable, "-c", MERGE, *(str(tmp_path / name) for name in ("base", "delta", "out"))]
    for shards in (2, 9, 16):  # killed in the middle of the shard after so many
        process = subprocess.Popen(command)
        while len(list((tmp_path / "out").glob("model-*.safetensors"))) < shards:
            assert process.poll() is None
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it had not finished by itself
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    done = set(json.loads((tmp_path / "out" / "merge_report.json").read_text())["files"])
    report = merge_vicuna(tmp_path / "base", tmp_path / "delta", tmp_path / "out", 9000, progress=False)
    assert report["files"] == expected["files"]
    assert len(done) >= 15
    for name in done:  # recorded shards are not written again
        assert (tmp_path / "out" / name).stat().st_mtime_ns == before[name]
    assert not list((tmp_path / "out").glob("*.part"))


def test_other_inputs_and_damage_start_anew(tmp_path):
    llama(tmp_path / "base", 50)
    llama(tmp_path / "delta", 51, delta=True)
    folders = tmp_path / "base", tmp_path / "delta", tmp_path / "out"
    first = merge_vicuna(*folders, 30_000, progress=False)
    shard = next(iter(first["files"]))
    (tmp_path / "out" / shard).write_bytes(b"x" * first["files"][shard]["bytes"])
    with pytest.raises(WeightsError, match="does not read back"):
        merge_vicuna(*folders, 30_000, progress=False)
    assert merge_vicuna(*folders, 30_000, progress=False)["files"] == first["files"]
    index = json.loads((tmp_path / "base" / "pytorch_model.bin.index.json").read_text())
    file = tmp_path / "base" / index["weight_map"]["model.norm.weight"]
    tensors = torch.load(file)
    torch.save(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, file)
    again = merge_vicuna(*folders, 30_000, progress=False)
    assert again["files"] != first["files"] and again["complete"]


def refused(tmp_path, base=None, delta=None):
    base, delta = base or {"rows": 50}, delta or {"rows": 51, "delta": True}
    llama(tmp_path / "base", **base)
    llama(tmp_path / "delta", **delta)
    with pytest.raises(WeightsError) as error:
        merge_vicuna(tmp_path / "base", tmp_path / "delta", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()  # nothing is begun
    return str(error.value)


def test_wrong_pairs_are_refused_before_anything_is_written(tmp_path):
    def without(name):
        return lambda tensors: tensors.pop(name)

    def another_shape(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64).half()

    for index, (words, arguments) in enumerate(
        [
            ("LLaMA has 50 vocabulary rows and the delta 50", {"delta": {"rows": 50, "delta": True}}),
            ("lm_head.weight is missing", {"base": {"rows": 50, "change": without("lm_head.weight")}}),
            (
                "is (95, 64) instead of (96, 64)",
                {"delta": {"rows": 51, "delta": True, "change": another_shape}},
            ),
            ("is bfloat16, which is not what was published", {"base": {"rows": 50, "dtype": torch.bfloat16}}),
            (
                "is float32, which is not what was published",
                {"delta": {"rows": 51, "delta": True, "dtype": torch.float32}},
            ),
            ("As delta, a folder was given that does not fit", {"delta": {"rows": 51}}),
            ("As LLaMA, a folder was given that does not fit", {"base": {"rows": 50, "delta": True}}),
            ("Llama-2 or Vicuna v1.5", {"base": {"rows": 50, "max_position_embeddings": 4096}}),
            ("Llama-2 or Vicuna v1.5", {"base": {"rows": 50, "rms_norm_eps": 1e-5}}),
            ("CodeLlama", {"base": {"rows": 50, "rope_theta": 1000000}}),
            ("Vicuna v1.3", {"base": {"rows": 50, "_name_or_path": "lmsys/vicuna-7b-v1.3"}}),
            ("a 'mistral' model", {"base": {"rows": 50, "model_type": "mistral"}}),
        ]
    ):
        assert words in refused(tmp_path / str(index), **arguments)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch was_executed",)


def test_a_pickle_with_code_is_refused_in_plain_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(3), "bomb": Bomb()}, tmp_path / "evil.bin")
    with pytest.raises(WeightsError, match="could run code"):
        TensorFile(tmp_path / "evil.bin")
    assert not (tmp_path / "was_executed").exists()


def test_cut_files_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3000)}, tmp_path / "a.bin")
    save_file({"weight": torch.zeros(3000)}, tmp_path / "a.safetensors")
    for name in ("a.bin", "a.safetensors"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(WeightsError, match="cut short|incomplete"):
            TensorFile(path)
    with pytest.raises(WeightsError, match="Meta's own layout"):
        (tmp_path / "consolidated.00.pth").touch()
        (tmp_path / "config.json").write_text("{}")
        recognise(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(WeightsError, match="config.json is damaged"):
        recognise(tmp_path)


def test_writer_and_reader_agree_with_safetensors(tmp_path):
    tensors = {
        "a": torch.randn(5, 7),
        "b": torch.randn(3).bfloat16(),
        "c": torch.tensor(2.0),
        "d": torch.zeros(0, 4),
    }
    metadata = {"k": "v", "another": "one", "format": "pt"}
    digest = write_tensors(tmp_path / "x.safetensors", tensors, metadata)
    assert digest == write_tensors(tmp_path / "again.safetensors", tensors, metadata)  # safetensors shuffles metadata
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert metadata.items() < file.metadata().items()
    specs = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    loaded, file = load_file(tmp_path / "x.safetensors"), TensorFile(tmp_path / "x.safetensors")
    for name, value in tensors.items():
        assert torch.equal(loaded[name], value) and torch.equal(file.read(name), value)
    assert file.specs == specs


def test_a_copy_in_other_shards_is_judged_by_its_tensors(tmp_path, monkeypatch):
    """A copy stands where the catalogue expects other files: judged by its names and shapes."""
    monkeypatch.setattr("spgdd.weights.llama.SIZES", {64: "7b"})
    folder = tmp_path / "vicuna_ckpt" / "7b_v0"
    llama(folder, 32001, "safetensors", shards=3)
    (row,) = status("vicuna-7b-v0", tmp_path)
    assert row.state == "accepted" and "no published hashes" in row.detail
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").write_text("{}")  # as after an interrupted download
    assert {row.state for row in status("vicuna-7b-v0", tmp_path)} == {"missing", "unchecked"}
    shutil.rmtree(folder)
    llama(folder, 32000)  # LLaMA, or Vicuna v1.1, in the place of v0
    (folder / "pytorch_model-00001-of-00002.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model-00002-of-00002.bin").rename(folder / "other.bin")
    index = (folder / "pytorch_model.bin.index.json").read_text()
    index = index.replace("pytorch_model-00001-of-00002.bin", "pytorch_model-00001-of-00001.bin")
    index = index.replace("pytorch_model-00002-of-00002.bin", "other.bin")
    (folder / "pytorch_model.bin.index.json").write_text(index)
    (row,) = status("vicuna-7b-v0", tmp_path)
    assert row.state == "wrong" and "shapes of LLaMA (32000 rows)" in row.detail


def test_merge_report_is_what_verify_compares_with(tmp_path):
    llama(tmp_path / "base", 50, shards=1)
    llama(tmp_path / "delta", 51, delta=True)
    out = tmp_path / "root" / "vicuna_ckpt" / "13b_v0"
    merge_vicuna(tmp_path / "base", tmp_path / "delta", out, 30_000, progress=False)
    assert {row.state for row in status("vicuna-13b-v0", tmp_path / "root")} == {"unchecked"}
    rows = verify("vicuna-13b-v0", tmp_path / "root")
    assert any(row.detail == "SHA-256 as recorded by the merge" for row in rows)
    shard = sorted(out.glob("model-*.safetensors"))[0]
    shard.write_bytes(bytes(shard.stat().st_size))
    assert [row.path for row in verify("vicuna-13b-v0", tmp_path / "root") if row.state == "wrong"] == [
        f"vicuna_ckpt/13b_v0/{shard.name}"
    ]


def test_standin_mark_survives_the_merge(tmp_path):
    llama(tmp_path / "base", 50)
    llama(tmp_path / "delta", 51, delta=True)
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({"standin": STANDIN} | json.loads((tmp_path / "base" / "config.json").read_text()))
    )
    merge_vicuna(tmp_path / "base", tmp_path / "delta", tmp_path / "out", 30_000, progress=False)
    assert all(is_standin(path) for path in (tmp_path / "out").glob("*.safetensors"))
    assert is_standin(tmp_path / "out" / "config.json")
