"""How long a visitor of the web demo waits, and what eight programs with 200 requests do to it.

    python benchmarks/interactive.py            # in Chromium: map and first words, a minute on two CPU cores
    python benchmarks/interactive.py load       # 8 programs x 25 requests, own products: up to ten minutes
    python benchmarks/interactive.py picture    # makes assets/demo.jpg: the page with a generated part

The demo runs in a process of its own, as `spgdd demo` starts it; Chromium shares the cores with it. Warm: the good
pictures are remembered, and the picture is another than before.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import httpx
import psutil
import torch
from PIL import Image

import spgdd
from miniworld import TYPES, photograph

PORT, PROGRAMS, REQUESTS, EARLY = 7960, 8, 25, 20
PRODUCTS = ("gear", "leather", "tile", "cable", "nut", "screw", "wood", "mesh")
WATCH = """async (name) => {  // milliseconds from the click on a picture's name to its map, and to the first words
  const until = async (found) => { while (!found()) await new Promise(requestAnimationFrame); return performance.now() }
  const words = () => [...document.querySelectorAll("[data-testid=bot]")].some((said) => said.innerText.trim())
  const start = performance.now()
  ;[...document.querySelectorAll("label")].find((label) => label.innerText.trim().startsWith(name)).click()
  const map = await until(() => document.querySelector(`img[alt^="${name} with its heat map"]`))
  const first = await until(words)
  return [map - start, first - start]
}"""


@contextmanager
def visitor(address: str, height: int = 768):
    """A page of Chromium that shows the demo."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1366, "height": height})
        page.goto(address)
        page.get_by_role("button", name="Diagnose", exact=True).wait_for()
        yield page
        browser.close()


@contextmanager
def demo(profile: str):
    """Address and process of a demo that serves."""
    command = [sys.executable, "-m", "spgdd", "demo", "--port", str(PORT), "--profile", profile]
    process, address = subprocess.Popen(command, stdout=subprocess.DEVNULL), f"http://127.0.0.1:{PORT}/"
    try:
        while True:
            try:
                httpx.get(address).raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None:
                    raise SystemExit("the demo did not start; its words are above") from None
                time.sleep(0.3)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def draw(folder: Path, product: str, in_doubt: int) -> tuple[list[Path], list[Path]]:
    """Files of four good parts and of some in doubt, every other one burnt."""
    kinds = torch.tensor([-1] * 4 + [(-1, TYPES.index("burn"))[i % 2] for i in range(in_doubt)])
    shots = photograph(product, torch.ones_like(kinds), torch.arange(len(kinds)), kinds)
    files = [folder / f"{product}_{number}.png" for number in range(len(kinds))]
    for file, image in zip(files, shots.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    return files[:4], files[4:]


def wait_of_a_visitor(profile: str, folder: Path, repeats: int) -> None:
    from playwright.sync_api import expect

    good, doubt = draw(folder, "gear", 4)
    with demo(profile) as (address, _), visitor(address) as page:
        for place, files in ((1, good), (0, doubt)):
            listed = page.get_by_role("link", name="KB")
            before = listed.count()
            page.locator("input[type=file]").nth(place).set_input_files(files)
            expect(listed).to_have_count(before + len(files))
        page.get_by_label("Product").fill("gear")
        page.get_by_role("button", name="Diagnose", exact=True).click()
        done = page.get_by_text("4 good pictures of gear remembered.")
        done.wait_for(timeout=120_000)
        waits = []
        for turn in range(repeats + 2):
            page.get_by_role("button", name="Clear", exact=True).filter(has_text="Clear").click()
            expect(page.get_by_test_id("bot")).to_have_count(0)
            waits.append(page.evaluate(WATCH, doubt[(turn + 1) % len(doubt)].name))
            done.wait_for()
    for name, laps in zip(("map", "first words"), zip(*waits[2:], strict=True), strict=True):
        median, slowest = statistics.median(laps) / 1000, max(laps) / 1000
        print(f"{name:12} median {median:.2f} s, slowest {slowest:.2f} s, of {len(laps)} pictures")


def picture_of_the_page(profile: str) -> None:
    with demo(profile) as (address, _), visitor(address, 1010) as page:
        page.get_by_role("button", name="gear").or_(page.get_by_alt_text("gear")).first.click()
        page.get_by_alt_text("with its heat map").wait_for()
        page.get_by_text("4 good pictures of gear remembered.").wait_for()
        page.mouse.move(0, 0)
        page.screenshot(path="assets/demo.jpg", quality=85, full_page=True)


def load(profile: str, folder: Path) -> None:
    from gradio_client import Client, handle_file

    diagnoser, lock, resident = spgdd.load(profile), Lock(), {}
    parts = {product: draw(folder, product, REQUESTS) for product in PRODUCTS}

    def program(product: str, address: str, process: psutil.Process) -> None:
        good, doubt = parts[product]
        client = Client(address, verbose=False)
        memory = client.predict([handle_file(file) for file in good], product, api_name="/remember")
        for picture in doubt:
            (result,), _ = client.predict([handle_file(picture)], [], handle_file(memory), product, "", 0.05, 32, 0, 1,
                                          api_name="/diagnose")  # fmt: skip
            with lock:
                answers[picture] = result
                if len(answers) in (EARLY, PROGRAMS * REQUESTS):
                    resident[len(answers)] = process.memory_info().rss

    answers, started = {}, time.perf_counter()
    with demo(profile) as (address, process), ThreadPoolExecutor(PROGRAMS) as pool:
        list(pool.map(lambda product: program(product, address, process), PRODUCTS))
    seconds, wrong = time.perf_counter() - started, 0
    early, late = (resident[count] / 1e6 for count in (EARLY, PROGRAMS * REQUESTS))
    print(f"{PROGRAMS} programs, {len(answers)} answers in {seconds:.0f} s, no error")
    print(f"resident memory: {early:.0f} MB after {EARLY} requests, {late:.0f} MB at the end: {late / early - 1:+.1%}",
          flush=True)  # fmt: skip
    for product, (good, doubt) in parts.items():
        reference = diagnoser.reference(good, product)
        for picture in doubt:
            own, found = diagnoser.diagnose(picture, reference, max_new_tokens=32), answers[picture]
            same = abs(own.score - found["score"]) < 1e-3 and own.text == found["text"]
            wrong += not same or (found["image"], found["product"]) != (picture.name, product)
    print(f"{wrong} of them differ from the library's answer to the same picture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("wait", "load", "picture"), default="wait")
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "picture":
            picture_of_the_page(args.profile)
        elif args.what == "load":
            load(args.profile, Path(folder))
        else:
            wait_of_a_visitor(args.profile, Path(folder), args.repeats)


if __name__ == "__main__":
    main()
