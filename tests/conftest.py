"""Shared by all tests: the reference tensors, a table of how far each one was missed, a browser."""

import inspect
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
REAL_DATA = Path(os.environ.get("SPGDD_REAL_DATA", ROOT.parent / "shared" / "tadd_real" / "dev"))

_deviations: dict[str, tuple[float, float]] = {}


def check(name: str, actual, expected, atol: float = 0.0, rtol: float = 1e-5) -> None:
    """Assert that ``actual`` equals the reference within tolerance; the run ends with a table of all deviations.

    The allowed deviation is ``atol + rtol * max|expected|``, so ``rtol`` is relative to the tensor and not to
    single elements near zero.
    """
    actual, expected = torch.as_tensor(actual).float(), torch.as_tensor(expected).float()
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, reference {tuple(expected.shape)}"
    )
    deviation = (actual - expected).abs().max().item()
    allowed = atol + rtol * expected.abs().max().item()
    _deviations[name] = (deviation, allowed)
    assert deviation <= allowed, f"{name}: deviates by {deviation:.3g}, allowed {allowed:.3g}"


# What Windows lacks, or allows administrators alone: tests that use it are skipped there.
POSIX = re.compile(r"mkfifo|symlink_to|signal\.SIG|os\.fork|getrusage|/dev/|\.chmod\(|\[\"make\"\]")


def pytest_runtest_setup(item):
    if os.name == "nt":
        if POSIX.search(inspect.getsource(item.function)) or "os.fork" in inspect.getsource(item.module):
            pytest.skip("needs what Windows lacks")


def pytest_terminal_summary(terminalreporter):
    if _deviations:
        terminalreporter.section("reference tensors: largest deviation (allowed)")
        for name, (deviation, allowed) in sorted(_deviations.items()):
            terminalreporter.write_line(f"{name:<60} {deviation:.2e} ({allowed:.1e})")


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(
            f"no real photographs at {REAL_DATA.name} (set SPGDD_REAL_DATA to an MVTec-layout folder)"
        )
    return REAL_DATA


@pytest.fixture(scope="module")
def browser():
    """Debian's or Ubuntu's Chromium, without a network: no name but 127.0.0.1 resolves."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no Chromium: scripts/install_chromium.sh")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        alone = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", alone])
        yield browser
        browser.close()
