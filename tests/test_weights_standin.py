"""Stand-ins have exactly the names, shapes, dtypes and shards of the published files."""

import json
import zipfile
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save

import write_standins
from conftest import FIXTURES
from spgdd.errors import WeightsError
from spgdd.imagebind import HUGE, ImageBind, TextTokenizer
from spgdd.model import SPGDD
from spgdd.profiles import get_profile
from spgdd.tensors import STANDIN, TensorFile, is_standin, read_tensors, spec_bytes
from spgdd.weights.catalog import get_bundle
from spgdd.weights.delta import apply_delta
from spgdd.weights.download import download
from spgdd.weights.verify import status
from write_standins import _tokenizer, bundle_specs, standin, write_pickle


@pytest.mark.parametrize(
    "name, keys",
    [
        ("imagebind-huge", "imagebind_huge"),
        ("pandagpt-7b", "pandagpt_7b_delta"),
        ("anomalygpt-visa", "anomalygpt_7b_delta"),
    ],
)
def test_names_order_and_shapes_are_the_published_ones(name, keys):
    published = json.loads((FIXTURES / f"{keys}_keys.json").read_text())["keys"]
    specs = bundle_specs(get_bundle(name))
    assert list(specs) == list(published)
    assert all(shape == tuple(published[key]["shape"]) for key, (_, shape) in specs.items())


def test_a_dinov2_file_of_these_names_and_shapes_is_as_long_as_the_published_one():
    bundle = get_bundle("dinov2-small")
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in bundle_specs(bundle).items()}
    assert len(tensors) == 223 and len(save(tensors, {"format": "pt"})) == bundle.files[1].bytes


def test_pandagpt_13b_has_the_published_size():
    specs = bundle_specs(get_bundle("pandagpt-13b"))
    assert len(specs) == 322
    assert sum(torch.Size(shape).numel() for _, shape in specs.values()) == 57_676_800


@pytest.mark.parametrize(
    "name, bytes, shards",
    [("vicuna-7b-delta-v0", 26788, 2), ("llama-7b", 26788, 2), ("vicuna-13b-delta-v0", 33444, 3)],
)
def test_llama_index_has_the_published_length(name, bytes, shards):
    """The index as transformers writes it has as many bytes as the published one: same names, same shards."""
    specs = bundle_specs(get_bundle(name))
    split = split_state_dict_into_shards_factory(
        specs, get_storage_size=spec_bytes, max_shard_size=10**10, filename_pattern="pytorch_model{suffix}.bin"
    )
    assert len(split.filename_to_tensors) == shards
    total = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
    assert len(json.dumps(index, indent=2, sort_keys=True)) + 1 == bytes


def test_pickles_are_as_torch_writes_them(tmp_path):
    specs = {
        "a.norm.weight": (torch.float16, (40, 30)),
        "b.mask": (torch.float32, (5, 5)),
        "c": (torch.float32, ()),
        "d": (torch.float16, (1500, 1000)),
    }
    write_pickle(tmp_path / "x.pt", specs, parameters=True)
    for options in ({"mmap": True}, {}):
        state = torch.load(tmp_path / "x.pt", weights_only=True, **options)
        assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == specs
        assert all(isinstance(value, torch.nn.Parameter) for value in state.values())
        assert abs(state["a.norm.weight"].mean().item() - 1) < 0.01
        assert torch.equal(state["b.mask"], torch.full((5, 5), -torch.inf).triu(1))
        assert 0.018 < state["d"].float().std().item() < 0.022
    assert TensorFile(tmp_path / "x.pt").specs == specs
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.comment.decode() == STANDIN and is_standin(tmp_path / "x.pt")
    (tmp_path / "copied.pt").write_bytes((tmp_path / "x.pt").read_bytes())
    assert is_standin(tmp_path / "copied.pt")  # the mark travels with the file


def test_published_deltas_load_strictly_into_the_real_size_model(tmp_path):
    """On the meta device: names and shapes of every tensor at 7B size, without its memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from spgdd.language import LlamaTokenizer, Vicuna

    (tmp_path / "tokenizer.model").write_bytes(_tokenizer())
    tokenizer = LlamaTokenizer(tmp_path / "tokenizer.model")
    assert len(tokenizer) == 32000 and tokenizer.piece_id("##") == 2277
    assert tokenizer.decode(tokenizer.encode("Is it damaged?")) == "Is it damaged?"
    said = tokenizer.decode(list(range(300, 29_000, 350)))
    assert len(tokenizer.encode(said)) <= len(range(300, 29_000, 350)) + 1  # words do not fill a conversation
    profile = get_profile("anomalygpt-7b")
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(vocab_size=32001)
        )  # transformers' defaults are those of LLaMA-7B
        model = SPGDD(profile, ImageBind(HUGE), Vicuna(llama, tokenizer, HUGE.joint), TextTokenizer())
    standin(["pandagpt-7b", "anomalygpt-mvtec"], tmp_path, progress=False)
    for delta in profile.deltas:
        state = read_tensors(tmp_path / delta.file)
        state = {f"language.{k}" if k.startswith("llama_") else k: value for k, value in state.items()}
        apply_delta(model, state, delta.parts)
        name, _ = state.popitem()
        with pytest.raises(WeightsError, match="1 missing in the delta"):
            apply_delta(model, state, delta.parts)
    assert {row.state for row in status(["pandagpt-7b", "anomalygpt-mvtec"], tmp_path)} == {"stand-in"}


def test_with_a_profile_comes_what_its_reader_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(write_standins, "get_bundles", lambda names: [])  # not the 19 GB
    profile = get_profile("spgdd-7b")
    (written,) = standin("spgdd-7b", tmp_path, progress=False)
    assert written == tmp_path / profile.deltas[-1].file and is_standin(written)
    with torch.device("meta"):
        model = SPGDD(profile, ImageBind(HUGE), SimpleNamespace(hidden=4096), None)
    apply_delta(model, read_tensors(written), profile.deltas[-1].parts)
    assert standin("spgdd-7b", tmp_path, progress=False) == []


def test_stand_ins_never_replace_other_files(tmp_path):
    real = tmp_path / "pandagpt_ckpt" / "7b" / "pytorch_model.pt"
    real.parent.mkdir(parents=True)
    torch.save({"x": torch.zeros(1)}, real)
    with pytest.raises(WeightsError, match="never replace"):
        standin("pandagpt-7b", tmp_path, progress=False)
    with pytest.raises(WeightsError, match="never replace"):
        standin("mini", tmp_path, progress=False)
    assert torch.load(real)["x"].item() == 0
    merged = tmp_path / "vicuna_ckpt" / "7b_v0" / "model-00001-of-00014.safetensors"
    merged.parent.mkdir(parents=True)
    merged.touch()  # a merged Vicuna: a loader would mix the two up
    for write in (standin, download):
        with pytest.raises(WeightsError, match="holds other weights"):
            write("vicuna-7b-v0", tmp_path, progress=False)
