"""Everything that the course does with the large profiles, on this machine, with stand-ins of full size.

    python scripts/gpu_rehearsal.py                     # `make gpu-rehearsal`: one GPU of 24 GB, 50 GB of disk
    python scripts/gpu_rehearsal.py --steps ladder "notebook 0[0-4]"
    python scripts/gpu_rehearsal.py --size toy          # every step with tiny networks, on a CPU too

Each step is a process of its own and none stops the rest. Notebooks run with the GPU limited to the memory that the
README promises, those of `imagebind` as on a T4: float16, 15 GB, and 12 GB of the machine's memory. Logs, weights and
table.md stay in runs/rehearsal, or in $REHEARSAL_FOLDER; a later run uses the weights again and adds to the table.
With --jobs 4, say, four steps run at once, on as many GPUs as there are: sooner done, each a little slower.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import date
from operator import attrgetter
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("REHEARSAL_FOLDER", ROOT / "runs/rehearsal")).absolute()
WEIGHTS, DATA = FOLDER / "weights", ROOT / "data/mini"
TADD = FOLDER / "TADD", FOLDER / "TADD_held_out"
LINE = "| {step} | {seconds:.0f} | {gpu:.1f} | {host:.1f} | {passed} |"
DOUBT, GOOD = "nut/test/chipped_edge/000.jpg", "nut/train/good/000.jpg"
TITLE = """# Time and memory of every step

Written by `make gpu-rehearsal`, with stand-in weights. GPU memory is the peak of the card's, with what CUDA itself
takes; memory is the peak of the step's processes, mapped files apart.

"""
CONTEXT = 1.0  # GB that CUDA itself takes in a process, at most
PATIENCE = 900  # seconds for a step


@dataclass
class Step:
    """A command, and what it may use."""

    name: str
    command: list
    needs: str = ""  # a package that not every machine has
    gpu_gb: float = 0  # the GPU is limited to so much; 0: not at all
    host_gb: float = 0  # more of the machine's memory is a failure
    env: dict = field(default_factory=dict)
    wave: int = 1  # those of one wave may run at the same time (--jobs), when all of the waves before have ended


def plan() -> list[Step]:
    spgdd, job = [sys.executable, "-m", "spgdd"], [sys.executable, __file__, "--do"]
    whole, large = "spgdd-7b", ("spgdd-7b", "anomalygpt-7b")
    parts = ["llama-7b", "vicuna-7b-delta-v0", "imagebind-huge", "pandagpt-7b", "anomalygpt-mvtec"]
    steps = [
        Step("stand-ins", [*job, "standins", *parts], wave=0),
        Step("merge", [*spgdd, "weights", "merge-vicuna", "7b"], wave=0),
        *(Step(f"load {name}", [*job, "load", name]) for name in large),
        *(Step(f"ladder {name}", [*spgdd, "weights", "check", name]) for name in large),
        Step("world", [*job, "world"], wave=0),
        Step("index", [*spgdd, "tadd", "index", TADD[0]]),
        Step("describe", [*spgdd, "tadd", "describe", DATA, "-o", FOLDER / "TADD_text.json"]),
        Step("train, stop, resume", [*job, "train", "torch"]),
        Step("train under DeepSpeed, stop, resume", [*job, "train", "deepspeed"], "deepspeed"),
        Step("evaluate", [*spgdd, "evaluate", "--data", DATA, "--profile", whole, "--shots", "1", "2", "--seeds", "0",
                          "--limit", "4", "--json", FOLDER / "evaluation.json"]),
        Step("diagnose", [*spgdd, "diagnose", DATA / "nut/test/*/*", "--normal", DATA / "nut/train/good", "--profile",
                          whole, "--report", FOLDER / "report.html"]),
        Step("chat", [*job, "chat", whole]),
        Step("demo", [*job, "demo", whole], "gradio"),
    ]  # fmt: skip
    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    tight = {"gpu_gb": 15, "host_gb": 12, "env": {"REHEARSAL_T4": "1"}}
    for profile, left_out, limits in (
        ("spgdd-7b", (), {"gpu_gb": 19}),
        ("anomalygpt-7b", ("05",), {"gpu_gb": 19}),  # its delta is published, not trained
        ("imagebind", ("01", "02", "05", "07", "08"), tight),  # without a language model
    ):
        for path in notebooks:
            command = [sys.executable, ROOT / "scripts/run_course.py", path, "--profile", profile]
            number, own = path.name[:2], limits
            if number != "02":  # whose FOLDER is one of data
                command += ["--set", f'FOLDER="{FOLDER / profile / path.stem}"']
            if number == "05":  # it replaces weights that the others read
                command, own = [*command, f"TADD={tuple(map(str, TADD))}"], {"gpu_gb": 24, "wave": 2}
            if number not in left_out:
                steps.append(Step(f"notebook {number}, {profile}", command, "nbclient", **own))
    return steps


def untried(step: Step, reason: str) -> dict:
    return {"step": step.name, "seconds": 0.0, "gpu": 0.0, "host": 0.0, "passed": f"not run: {reason}"}


def run(step: Step, patience: float, toy: bool, gpu: str) -> dict:
    """Run a step on a GPU and watch its memory; returns its row of the table."""
    row = untried(step, f"needs {step.needs}")
    if step.needs and importlib.util.find_spec(step.needs) is None:
        return row
    paths = map(str, (ROOT / "scripts/rehearsal", ROOT, ROOT / "scripts", os.environ.get("PYTHONPATH", "")))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "SPGDD_WEIGHTS": str(WEIGHTS)}
    env |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": gpu} | step.env
    env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's
    if step.gpu_gb:
        env["REHEARSAL_GPU_GB"] = str(step.gpu_gb - CONTEXT)
    if toy:
        env["REHEARSAL_TOY"] = "1"
    log, start = FOLDER / f"{step.name.replace(',', '').replace(' ', '_')}.log", time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, step.command)), cwd=ROOT / "notebooks", env=env, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        ended = threading.Event()
        watch = threading.Thread(target=watch_memory, args=(process.pid, gpu, row, ended))
        watch.start()
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            status = f"stopped after {patience:.0f} s"
        finally:
            ended.set()
            watch.join()
            end(process.pid)  # what it started and left behind, too
    row["seconds"] = time.monotonic() - start
    if status == 0 and step.host_gb and row["host"] > step.host_gb:
        status = f"more than {step.host_gb} GB of memory"
    row["passed"] = "yes" if status == 0 else f"no: {status}, see {log.name}"
    if status != 0:
        print(*log.read_text(errors="replace").splitlines()[-25:], sep="\n    ", flush=True)
    return row


def end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def watch_memory(pid: int, gpu: str, row: dict, ended: threading.Event) -> None:
    """Note the peaks of memory of a process and of what it started: the GPU's, and that which is no mapped file."""
    while not ended.wait(0.2):
        with contextlib.suppress(psutil.Error, OSError, ValueError):  # a GPU may not tell
            parent, used = psutil.Process(pid), 0
            family = [parent, *parent.children(recursive=True)]
            for process in family:
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_info()
                    used += memory.rss - getattr(memory, "shared", 0)
            row["host"] = max(row["host"], used / 1e9)
            row["gpu"] = max(row["gpu"], used_gpu({process.pid for process in family}, gpu))


def used_gpu(pids: set[int], gpu: str) -> float:
    """GB of the GPU that processes hold; of all that is used, where the driver does not tell whose it is."""
    if not gpu:
        return 0.0
    ask = ["nvidia-smi", "--format=csv,noheader,nounits", "-i", gpu]
    tell = lambda what: subprocess.run([*ask, what], stdout=subprocess.PIPE, text=True).stdout  # noqa: E731
    lines = tell("--query-compute-apps=pid,used_memory").splitlines()
    held = [line.split(",") for line in lines if line.replace(",", "").replace(" ", "").isdigit()]
    if not held:
        return int(tell("--query-gpu=memory.used")) * 2**20 / 1e9
    return sum(int(used) for pid, used in held if int(pid) in pids) * 2**20 / 1e9


def save(rows: list[dict], toy: bool) -> str:
    """Write table.md of these rows and of earlier ones on the same machine; returns its text."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    head = f"{card}, {os.cpu_count()} cores, {versions}, {'toy' if toy else 'full'} size, {date.today()}"
    file = FOLDER / "rows.json"
    known = json.loads(file.read_text()).get(head, {}) if file.is_file() else {}
    known |= {row["step"]: row for row in rows}
    file.write_text(json.dumps({head: known}))
    lines = [TITLE + head, "", "| step | seconds | GPU memory, GB | memory, GB | passed |", "|---|---:|---:|---:|---|"]
    lines += [LINE.format(**known[step.name]) for step in plan() if step.name in known]
    (FOLDER / "table.md").write_text("\n".join([*lines, ""]))
    return "\n".join(lines)


def standins(*names: str) -> None:
    """Stand-ins of the parts named, what spgdd-7b's reader trains, and mini's own weights beside them."""
    from spgdd.profiles import get_profile
    from write_standins import standin, write_trained

    standin(names, progress=False)
    write_trained(get_profile("spgdd-7b"), WEIGHTS)
    if not (WEIGHTS / "mini").exists():
        (WEIGHTS / "mini").symlink_to(ROOT / "pretrained_ckpt/mini")


def load(profile: str) -> None:
    import spgdd

    print("stand-ins:", *spgdd.load_model(profile).standins)


def world() -> None:
    """Pictures with text, to train on and to judge by."""
    from miniworld import write_world

    for folder, held_out in zip(TADD, (False, True), strict=True):
        shutil.rmtree(folder, ignore_errors=True)
        write_world(folder, 6, seed=int(held_out), held_out=held_out)


def train(engine: str) -> None:
    """Train some steps, stop as a scheduler of jobs does, and go on."""
    folder, text = FOLDER / "train" / engine, TADD[0] / "TADD_text.json"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "spgdd", "train", "--profile", "spgdd-7b", "--data_path", text, "--save_path",
               folder, "--cache", FOLDER / "features", "--engine", engine, "--steps", "12", "--batch", "8",
               "--log_every", "1", "--evaluate_every", "0", "--no-compile"]  # fmt: skip
    first = subprocess.Popen(list(map(str, command)))
    while first.poll() is None and steps_of(folder) < 3:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    stopped = first.wait()
    before = steps_of(folder)
    print(f"stopped with status {stopped} after step {before}", flush=True)
    subprocess.run([*map(str, command), "--resume"], check=True)
    if not (stopped == 128 + signal.SIGTERM and 3 <= before < 12 == steps_of(folder)):
        sys.exit("it did not go on where it was stopped")


def steps_of(folder: Path) -> int:
    """Steps that the log tells of."""
    log = folder / "train.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def chat(profile: str) -> None:
    import spgdd

    found = spgdd.load(profile).diagnose(DATA / DOUBT, DATA / GOOD, product="nut")
    print(found.text, found.timings, found.ask("Where is it?").text, sep="\n")


def demo(profile: str) -> None:
    """The page as a program uses it: one request."""
    from gradio_client import Client, handle_file

    command = [sys.executable, "-m", "spgdd", "demo", "--profile", profile, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
        try:
            url = re.search(r"http://\S+?/", page.stdout.readline())[0]
            files = [[handle_file(DATA / path)] for path in (DOUBT, GOOD)]
            said = Client(url, verbose=False).predict(*files, None, "nut", "", 0.05, 32, 0, 1, api_name="/diagnose")
            print(said[0][0]["verdict"], said[0][0]["text"])
        finally:
            page.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=[""], metavar="PATTERN", help="regular expressions of names")
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--skip-notebooks", action="store_true")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="for all; then it ends")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many steps at once, each with its GB")
    parser.add_argument("--list", action="store_true", help="name the steps, and do nothing")
    parser.add_argument("--do", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        name, *arguments = options.do
        globals()[name](*arguments)
        return 0
    toy, rows, lock, deadline = options.size == "toy", [], threading.Lock(), time.monotonic() + options.budget
    steps = [step for step in plan() if any(re.match(pattern, step.name) for pattern in options.steps)
             and not (options.skip_notebooks and step.name.startswith("notebook"))]  # fmt: skip
    if options.list:
        print(*(step.name for step in steps), sep="\n")
        return 0
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    count, gpus = torch.cuda.device_count(), queue.SimpleQueue()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]
    for gpu in itertools.islice(itertools.cycle(names or [""]), options.jobs):
        gpus.put(gpu.strip())

    def perform(step: Step) -> None:
        left, gpu = deadline - time.monotonic(), gpus.get()
        try:
            row = run(step, min(left, PATIENCE), toy, gpu) if left > 5 else untried(step, "time is up")
        finally:
            gpus.put(gpu)
        with lock:
            rows.append(row)
            print(LINE.format(**row), flush=True)
            save(rows, toy)

    for wave, group in itertools.groupby(sorted(steps, key=attrgetter("wave")), attrgetter("wave")):
        with ThreadPoolExecutor(options.jobs if wave else 1) as pool:
            try:
                waiting = {pool.submit(perform, step) for step in group}
                while waiting:  # a wait without end may miss a Ctrl-C that comes as it begins
                    done, waiting = wait(waiting, timeout=0.5)
                    for each in done:
                        each.result()
            except BaseException:  # Ctrl-C, say
                pool.shutdown(wait=False, cancel_futures=True)
                for step in psutil.Process().children():
                    end(step.pid)
                raise
    print(save(rows, toy))
    return int(any(row["passed"].startswith("no:") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
