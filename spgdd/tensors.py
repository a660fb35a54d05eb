"""Checkpoint files: the one place that opens them and that writes them."""

import hashlib
import json
import math
import pickle
import traceback
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from spgdd.errors import WeightsError
from spgdd.files import whole_file

STANDIN = "SPGDD-GPT STAND-IN: random values, not a trained model"
AGAIN = "Fetch it with `spgdd weights download PROFILE`, or as notebook 01 shows."

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip

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


def read_tensors(path: str | Path, intact: bool = False, mend: str = AGAIN) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .pt, .pth or .bin file, mapped into memory and read when they are used.

    All but .safetensors are pickles, which could run a program on loading: only tensors are accepted. Replace
    a mapped file as a whole, never write into it. `intact`: the file is read at once, too, and compared with
    the checksum that `write_tensors` or torch put into it. Raises WeightsError, with `mend` at its end, for a
    file that is missing, damaged, a web page, or holds more than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"There is no weight file {path}. {mend}")
    try:
        if is_web_page(path):
            raise ValueError("it is a web page, an error or a login")
        if path.suffix == ".safetensors":
            if intact:
                _unseal(memoryview(np.memmap(path, mode="r")), required=False)
            return load_file(path)
        archive = zipfile.is_zipfile(path)  # since 2020; torch cannot map the pickles from before
        if archive and intact and not is_standin(path) and (name := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"the checksum of {name} is another")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive and not intact)
    except pickle.UnpicklingError:  # torch's own message advises to switch the protection off
        raise WeightsError(f"{path} was not opened: it holds objects that could run code, or is no "
                           f"checkpoint. {mend}") from None
    except Exception as error:  # what a damaged pickle raises, nobody knows
        traceback.clear_frames(error.__traceback__)  # Windows replaces no file that they have mapped
        reason = (str(error) or type(error).__name__).partition("\n")[0]  # torch's go on with a stack of C++
        raise WeightsError(f"{path} ({path.stat().st_size:,} bytes) is cut short, damaged or no checkpoint: "
                           f"{reason}. {mend}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds a {type(state).__name__} that is no table of tensors. {mend}")
    return {name: value.detach() for name, value in state.items()}


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors to a .safetensors file, whole or not at all, and return its SHA-256.

    Equal tensors and metadata give equal files; a checksum of both is the last of the metadata. Raises SpgddError
    where the file cannot be written.
    """
    data = memoryview(save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))
    start, header = _header(data)
    # safetensors writes metadata in a random order, and with it another file each time: ours are put in here.
    header, numbers = {"__metadata__": dict(metadata or {})} | header, data[start:]
    header["__metadata__"]["checksum"] = _checksum(header, numbers)
    digest = hashlib.sha256()
    with whole_file(path) as file:
        for block in (_as_bytes(header), numbers):
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def read_sealed(path: str | Path, trusted: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, parts of one memory that is theirs, and metadata of what `write_tensors` wrote.

    `trusted`: the checksum was compared before, and is not once more. Raises OSError where the file cannot be read and
    ValueError for any other content.
    """
    data = np.fromfile(path, np.uint8)  # unlike safetensors' own `load`, it lets other threads run meanwhile
    try:
        start, header = _unseal(memoryview(data), trusted)
        metadata, numbers = header.pop("__metadata__"), torch.from_numpy(data)[start:]
        places = {name: (slice(*at["data_offsets"]), DTYPES[at["dtype"]], at["shape"]) for name, at in header.items()}
        return {name: numbers[at].view(dtype).view(shape) for name, (at, dtype, shape) in places.items()}, metadata
    except (AttributeError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _unseal(data: memoryview, trusted: bool = False, required: bool = True) -> tuple[int, dict]:
    """The `_header` of what `read_sealed` takes, without the checksum.

    Without `required` a file that has no checksum passes, as others publish them.
    """
    start, header = _header(data)
    written = data[:start] == _as_bytes(header)
    last, checksum = (header.get("__metadata__") or {"": ""}).popitem()
    if required or last == "checksum" or len(checksum) == 71:
        right = trusted or (last, checksum) == ("checksum", _checksum(header, data[start:]))
        if not (written and right):
            raise ValueError("it is not as it was written: its checksum is another")
    return start, header


def _header(data: memoryview) -> tuple[int, dict]:
    """Where the numbers of a .safetensors file begin, and what stands before them."""
    start = 8 + int.from_bytes(data[:8], "little")
    return start, json.loads(bytes(data[8:start]))


def _as_bytes(header: dict) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checksum(header: dict, numbers: memoryview) -> str:
    digest = hashlib.sha256(json.dumps(header).encode())
    digest.update(numbers)
    return f"sha256:{digest.hexdigest()}"


class TensorFile:
    """One checkpoint file, tensor by tensor: `specs` by name, and `read`; memory does not grow with the file.

    Errors are those of `read_tensors`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.specs = {name: (value.dtype, tuple(value.shape)) for name, value in read_tensors(path).items()}

    def read(self, name: str) -> Tensor:
        """A copy of one tensor in its own memory. The file is mapped anew: an old map keeps all that was read."""
        return read_tensors(self.path)[name].clone(memory_format=torch.contiguous_format)


def spec_bytes(spec: Spec) -> int:
    return spec[0].itemsize * math.prod(spec[1])


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


def digest_of(path: Path, algorithm="sha256") -> str:
    """Hash of a file in hexadecimal; `algorithm` as in `hashlib.file_digest`."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the CPU to a device; a GPU is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
