"""Tensor files that notice every change: a hash over all their bytes, in which it stands itself as zeros."""

import json
import re
from collections.abc import Mapping
from hashlib import sha256

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

ZEROS = b"0" * 64
SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')


def seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of a ``.safetensors`` file with its own SHA-256 in the metadata."""
    content = save(dict(tensors), {**metadata, "sha256": ZEROS.decode()})
    start = SEAL.search(content).start(1)
    return content[:start] + sha256(content).hexdigest().encode() + content[start + 64 :]


def unseal(content: bytes, trusted: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, in memory of their own, and metadata of what ``seal`` made. Raises ValueError for any other content.

    ``trusted``: the seal was checked before, and is not once more.
    """
    found = SEAL.search(content[: 8 + int.from_bytes(content[:8], "little")])
    if found is None:
        raise ValueError("it has no seal")
    if not trusted:
        digest = sha256(content[: found.start(1)] + ZEROS)
        digest.update(memoryview(content)[found.end(1) :])
        if digest.hexdigest().encode() != found.group(1):
            raise ValueError("its content is not what was written")
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return load(content), header["__metadata__"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from error
