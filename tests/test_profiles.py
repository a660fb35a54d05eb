"""Profiles, the weights folder, and a package that imports nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import spgdd
from spgdd import PROFILES, SpgddError, WeightsError, get_profile
from spgdd.profiles import weights_folder

HEAVY = ("torch", "transformers", "peft", "numpy", "gradio", "deepspeed", "matplotlib", "IPython", "jupyter")


def run(code: str) -> str:
    root = Path(spgdd.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_and_its_profiles_imports_nothing_heavy():
    code = "import sys, spgdd; spgdd.PROFILES, spgdd.get_profile, spgdd.WeightsError; print(*sys.modules)"
    assert not set(HEAVY) & {name.split(".")[0] for name in run(code).split()}


def test_without_a_language_part_neither_its_files_nor_its_libraries_are_touched(tmp_path):
    (tmp_path / "mini").mkdir()
    for name in ("imagebind.safetensors", "text_tokenizer", "delta.safetensors"):
        (tmp_path / "mini" / name).symlink_to(weights_folder() / "mini" / name)
    picture = Path(spgdd.__file__).parents[1] / "data/mini/gear/test/stain/000.jpg"
    said = run(
        "import sys, spgdd\n"
        f"diagnoser = spgdd.load('mini', root={str(tmp_path)!r}, language=False)\n"
        "assert diagnoser.model.profile.language is diagnoser.model.language is None\n"
        f"print(diagnoser.diagnose({str(picture)!r}, product='gear').text)\n"
        "assert not {'peft', 'accelerate', 'transformers.models.llama.modeling_llama'} & set(sys.modules)"
    )
    assert said.startswith("By the map alone")


def test_every_public_name_resolves():
    for name in set(spgdd.__all__) - {"PROFILES"}:
        assert getattr(spgdd, name).__name__ == name
    assert set(spgdd.__all__) <= set(dir(spgdd)) and spgdd.__version__
    assert issubclass(WeightsError, SpgddError)
    with pytest.raises(AttributeError, match="no attribute 'diagnoser'"):
        _ = spgdd.diagnoser


def test_there_are_seven_profiles_and_a_wrong_name_is_answered_with_them():
    assert list(PROFILES) == [
        "mini", "dinov2-small", "dinov2-base", "imagebind", "anomalygpt-7b", "spgdd-7b", "spgdd-13b",
    ]  # fmt: skip
    assert all(get_profile(name).name == name for name in PROFILES)
    with pytest.raises(SpgddError, match="'7b'; choose one of mini, dinov2-small, .*, spgdd-13b"):
        get_profile("7b")


def test_profiles_state_all_that_is_needed():
    for profile in PROFILES.values():
        assert all(not Path(file).is_absolute() for file in profile.files())
        assert profile.fit in ("crop", "squash") and profile.size % profile.patch == 0
        assert bool(profile.language) == profile.words == bool(profile.deltas)
        assert bool(profile.imagebind) == bool(profile.imagebind_file) != bool(profile.backbone)
        if profile.language:
            assert profile.deltas[-1].file in profile.files()
            assert ("memory" in profile.deltas[-1].parts) == (profile.scales != (1,))
            assert ("focus" in profile.deltas[-1].parts) == profile.focus
    assert list(PROFILES["imagebind"].files()) == ["imagebind_ckpt/imagebind_huge.pth"]
    assert list(PROFILES["dinov2-base"].files()) == [
        "dinov2_ckpt/base/config.json", "dinov2_ckpt/base/model.safetensors",
        "dinov2_ckpt/base/preprocessor_config.json",
    ]  # fmt: skip
    assert PROFILES["mini"].files().keys() == {
        "mini/imagebind.safetensors", "mini/language/config.json", "mini/language/tokenizer.model",
        "mini/text_tokenizer/merges.txt", "mini/pandagpt_delta.safetensors", "mini/delta.safetensors",
    }  # fmt: skip
    assert list(PROFILES["spgdd-13b"].files()) == [
        "imagebind_ckpt/imagebind_huge.pth",
        "vicuna_ckpt/13b_v0/config.json", "vicuna_ckpt/13b_v0/tokenizer.model",
        "pandagpt_ckpt/13b/pytorch_model.pt", "spgdd_ckpt/13b/delta.safetensors",
    ]  # fmt: skip


def test_where_the_weights_folder_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SPGDD_WEIGHTS", str(tmp_path / "elsewhere"))
    assert weights_folder(tmp_path) == tmp_path
    assert weights_folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("SPGDD_WEIGHTS")
    monkeypatch.setattr("spgdd.profiles.__file__", str(tmp_path / "spgdd" / "profiles.py"))
    assert weights_folder() == Path("pretrained_ckpt")
    os.mkdir(tmp_path / "pretrained_ckpt")
    assert weights_folder() == tmp_path / "pretrained_ckpt"
