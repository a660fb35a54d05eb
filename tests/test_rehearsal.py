"""The rehearsal of the large profiles, at toy size: steps of their own, limits, and a table that tells the truth."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil

from conftest import ROOT

SCRIPT = ROOT / "scripts/gpu_rehearsal.py"


def rehearse(folder, *options) -> tuple[int, dict[str, list[str]]]:
    command, env = [sys.executable, SCRIPT, "--size", "toy", *options], os.environ | {"REHEARSAL_FOLDER": str(folder)}
    status = subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode
    lines = (folder / "table.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return status, {name: values for name, *values in rows[1:]}


def test_a_step_that_fails_stops_no_other(tmp_path):
    status, rows = rehearse(tmp_path, "--steps", "stand-ins", "merge", "index", "load spgdd", "ladder spgdd", "chat")
    assert list(rows) == ["stand-ins", "merge", "load spgdd-7b", "ladder spgdd-7b", "index", "chat"]
    assert status == 1 and rows.pop("index")[-1] == "no: 1, see index.log"  # of pictures that no step has drawn
    assert all(passed == "yes" and float(memory) > 0.1 for _, _, memory, passed in rows.values())
    assert "STAND-IN weights" in (tmp_path / "ladder_spgdd-7b.log").read_text()
    assert len(rehearse(tmp_path, "--steps", "world")[1]) == 7  # a later run adds to the table


def test_a_spent_budget_starts_nothing(tmp_path):
    status, rows = rehearse(tmp_path, "--steps", "world", "index", "--budget", "0")
    assert status == 0 and [values[-1] for values in rows.values()] == ["not run: time is up"] * 2
    assert not list(tmp_path.glob("*.log"))


def test_ctrl_c_ends_the_steps_too(tmp_path):
    env = os.environ | {"REHEARSAL_FOLDER": str(tmp_path)}
    command = [sys.executable, SCRIPT, "--size", "toy", "--steps", "stand-ins", "world"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # ignored where tests run behind "&"
    with subprocess.Popen(command, env=env, **pipes) as process:
        while not (steps := psutil.Process(process.pid).children()):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=30)[1].decode()
    assert not psutil.wait_procs(steps, timeout=5)[1] and not (tmp_path / "world.log").exists()
