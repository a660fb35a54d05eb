"""Checkpoint files: the one place that opens them, and writes them whole or not at all."""

import hashlib
import json
import math
import os
import pickle
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spgdd.errors import WeightsError

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
         torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
         torch.bool: "BOOL"}  # safetensors' names
STANDIN = "SPGDD-GPT STAND-IN: random values, not a trained model"
MAPPED_LIMIT = 128 * 2**20  # bytes read through one memory map before it is renewed
AGAIN = "Fetch it again with `spgdd weights download PROFILE`, or as notebook 01 shows."

Spec = tuple[torch.dtype, tuple[int, ...]]


@contextmanager
def late_progress():
    """Within it, transformers shows the progress of loading only where that takes more than three seconds."""
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda bar, given, options: bar(*given, **options | {"delay": 3}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .pt, .pth or .bin file, mapped into memory and read when they are used.

    All but .safetensors are pickles, which could run a program on loading: only tensors are accepted. Replace
    a mapped file as a whole, never write into it. Raises WeightsError for a file that is missing, damaged, a
    web page, or holds more than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"There is no weight file {path}. Get it with `spgdd weights download PROFILE` or "
                           "notebook 01.")
    try:
        if is_web_page(path):
            raise OSError("it is a web page, an error or a login")
        if path.suffix == ".safetensors":
            return load_file(path)
        with open(path, "rb") as file:
            archive = file.read(2) == b"PK"  # since 2020; torch cannot map the pickles from before
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError:  # torch's own message advises to switch the protection off
        raise WeightsError(f"{path} was not opened: it holds objects that could run code, or is no "
                           f"checkpoint. {AGAIN}") from None
    except (SafetensorError, RuntimeError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0]  # torch's go on with a stack of C++
        raise WeightsError(f"{path} ({path.stat().st_size:,} bytes) is cut short, damaged or no checkpoint: "
                           f"{reason}. {AGAIN}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds a {type(state).__name__} that is no table of tensors. {AGAIN}")
    return {name: value.detach() for name, value in state.items()}


def is_web_page(path: Path) -> bool:
    """Whether a server sent a page of HTML, an error or a login, in place of the file."""
    with open(path, "rb") as file:
        return file.read(64).lstrip().lower().startswith((b"<!doctype", b"<html"))


def is_standin(path: str | Path) -> bool:
    """Whether a file, or any file below a folder, comes from scripts/write_standins.py, directly or by a merge.

    The mark stands inside each file: in the header of .safetensors, in the zip comment of .pt, .pth and .bin,
    as a key of .json. It travels with the file and needs no file beside it.
    """
    path = Path(path)
    if path.is_dir():
        return any(is_standin(file) for file in sorted(path.rglob("*")) if file.is_file())
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(4096)
        file.seek(max(path.stat().st_size - 4096, 0))
        return STANDIN.encode() in start + file.read()


def spec_bytes(spec: Spec) -> int:
    return spec[0].itemsize * math.prod(spec[1])


def split(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    """Names by shard: a new one begins with the tensor that would exceed `limit` bytes."""
    groups, size = [[]], 0
    for name, spec in specs.items():
        if groups[-1] and size + spec_bytes(spec) > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec_bytes(spec)
    return groups


class TensorFile:
    """One checkpoint file, tensor by tensor: `specs` by name, and `read`; memory does not grow with the file.

    The map of the file is renewed after every 128 MB, so that its pages do not pile up in memory. Errors are
    those of `read_tensors`.
    """

    def __init__(self, path: str | Path):
        self.path, self._mapped = Path(path), 0
        self._map = read_tensors(self.path)
        self.specs = {name: (value.dtype, tuple(value.shape)) for name, value in self._map.items()}

    def read(self, name: str) -> Tensor:
        """A copy of one tensor in its own memory."""
        size = spec_bytes(self.specs[name])
        if self._mapped + size > MAPPED_LIMIT:
            del self._map  # unmapping returns its pages
            self._map, self._mapped = read_tensors(self.path), 0
        self._mapped += size
        return self._map[name].clone(memory_format=torch.contiguous_format)


def write_safetensors(path: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]],
                      metadata: Mapping[str, str]) -> str:
    """Write tensors one at a time and return the file's SHA-256.

    `tensors` yields (name, tensor) in the order of `specs`. The file appears under `path` only when complete.
    """
    header, offset = {"__metadata__": dict(metadata)}, 0
    for name, spec in specs.items():
        end = offset + spec_bytes(spec)
        header[name] = {"dtype": CODES[spec[0]], "shape": list(spec[1]), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with whole(path) as file:
        for block in _blocks(text, specs, tensors):
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: dict) -> None:
    """JSON that appears under its name only when complete."""
    with whole(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


@contextmanager
def whole(path: Path):
    """A file to write bytes to that appears under its name only when complete and on the disk."""
    partial = part_path(path)
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def part_path(path: Path) -> Path:
    """Where a file grows until it is complete."""
    return path.with_name(path.name + ".part")


def _blocks(header: bytes, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, Tensor]]):
    yield len(header).to_bytes(8, "little") + header
    for expected, (name, tensor) in zip(specs, tensors, strict=True):
        if name != expected or (tensor.dtype, tuple(tensor.shape)) != specs[name]:
            raise ValueError(f"{name} {tensor.dtype} {tensor.shape} is not {expected} {specs[expected]}")
        yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def sha256_of(path: Path, *others: str) -> tuple[str, ...]:
    """SHA-256 in hexadecimal, then the other hashlib algorithms named, in one pass over the file."""
    digests = [hashlib.new(name) for name in ("sha256", *others)]
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            for digest in digests:
                digest.update(block)
    return tuple(digest.hexdigest() for digest in digests)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the CPU to a device; a GPU is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
