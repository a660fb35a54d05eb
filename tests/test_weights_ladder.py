"""The three checks and the commands, on the tiny reference weights."""

import json
import shutil

import pytest
import torch
from PIL import Image

from conftest import ROOT
from spgdd import cli
from spgdd.cli.checks import run_checks
from spgdd.diagnosis import Diagnoser
from spgdd.loading import load_model
from spgdd.tensors import STANDIN
from spgdd.ui.weights_panel import status_panel, status_table
from spgdd.weights.verify import FileStatus
from test_model import TINY_PROFILE, weights  # noqa: F401 (a fixture)
from write_standins import standin


def test_the_check_that_fails_names_its_files(weights):  # noqa: F811
    """Random weights: no answer names Paris, while the map does find a hole in a plate."""
    checks = list(run_checks(TINY_PROFILE, weights, device="cpu"))
    assert [check.title for check in checks] == [
        "Vicuna talks", "PandaGPT talks about an image", "The diagnosis model answers"]  # fmt: skip
    assert checks[0].passed is False and "vicuna_ckpt/7b_v0 is not Vicuna v0" in str(checks[0])
    assert checks[1].passed is False and "does not belong to this base" in checks[1].verdict
    assert "The plate with a hole scores" in checks[2].verdict and checks[2].answer


def test_checks_say_what_is_missing_and_what_is_a_stand_in(weights, tmp_path):  # noqa: F811
    shutil.copytree(weights, tmp_path / "w")
    config = tmp_path / "w/vicuna_ckpt/7b_v0/config.json"
    config.write_text(json.dumps({"standin": STANDIN} | json.loads(config.read_text())))
    for check in run_checks(TINY_PROFILE, tmp_path / "w", device="cpu"):
        assert check.passed is None and "STAND-IN weights (vicuna_ckpt/7b_v0)" in str(check)
    diagnoser = Diagnoser(load_model(TINY_PROFILE, tmp_path / "w", device="cpu"))
    found = diagnoser.diagnose(Image.new("RGB", (9, 9)), normals=Image.new("RGB", (9, 9), "red"))
    assert found.notes[0].startswith("made with stand-in weights (random values: vicuna_ckpt/7b_v0)")
    assert "says nothing about the part" in found._repr_html_() and "stand-in" in found.to_json()
    delta = "anomalygpt_ckpt/train_mvtec/pytorch_model.pt"
    (tmp_path / "w" / delta).unlink()  # the checks before stand without it
    *before, last = run_checks(TINY_PROFILE, tmp_path / "w", device="cpu")
    assert len(before) == 2 and last.passed is False and f"{delta} (notebook 01)" in last.verdict
    config.unlink()
    (check,) = run_checks(TINY_PROFILE, tmp_path / "w")
    assert check.passed is False and "config.json" in check.verdict


@pytest.mark.skipif(not (ROOT / "pretrained_ckpt/mini").is_dir(), reason="no mini weights in this checkout")
def test_the_checks_on_the_shipped_weights(capsys):
    assert run("check", "mini", "--device", "cpu", "--root", ROOT / "pretrained_ckpt") == 0
    out = capsys.readouterr().out
    for name in ("mini/language", "mini/pandagpt_delta.safetensors", "mini/delta.safetensors"):
        assert f"{name}): passed" in out


def run(*arguments) -> int:
    return cli.main(["weights", *map(str, arguments)])


def test_commands(tmp_path, capsys, monkeypatch):
    assert run("list", "--root", tmp_path) == 0
    assert "anomalygpt-7b" in capsys.readouterr().out
    assert run("show", "vicuna-7b-v0", "spgdd-13b") == 0
    shown = capsys.readouterr().out
    assert "ef1b2c502e2eab32176400bd8af8636163619fb04e65c0c0fdea58f1cbe21807" in shown and "licence" in shown
    standin("pandagpt-7b", tmp_path)
    assert run("verify", "pandagpt-7b", "--root", tmp_path) == 0
    assert "stand-in" in capsys.readouterr().out
    assert run("verify", "anomalygpt-mvtec", "--root", tmp_path) == 1
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert run("download", "anomalygpt-mvtec", "--root", tmp_path) == 1
    out = capsys.readouterr().out
    assert "CC BY-NC-SA 4.0" in out and "1 file(s), 225 MB to fetch" in out


def test_table_and_panel(tmp_path):
    html = status_table([FileStatus("a/<b>.bin", "wrong", 12, "two < three")])
    assert "a/&lt;b&gt;.bin" in html and "two &lt; three" in html
    panel = status_panel("anomalygpt-mvtec", tmp_path)
    table, buttons, _ = panel.children
    assert "missing" in table.value and buttons.children[2].disabled
    path = tmp_path / "anomalygpt_ckpt" / "train_mvtec" / "pytorch_model.pt"
    path.parent.mkdir(parents=True)
    torch.save({}, path)
    buttons.children[0].click()
    assert "wrong" in table.value
    buttons.children[1].click()
    assert not buttons.children[2].disabled


@pytest.mark.parametrize("action", ["list", "show", "download", "verify", "merge-vicuna", "check"])
def test_every_action_has_help(action, capsys):
    assert run(action, "--help") == 0 and "Usage" in capsys.readouterr().out
