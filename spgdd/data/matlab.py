"""Numbers out of MATLAB 5 files, as CrackForest's masks are: scipy's reader ends the process on some damaged ones.

The format: MathWorks, "MAT-File Format", level 5. A header of 128 bytes, then elements of a type, a size and content.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np

COMPRESSED, MATRIX = 15, 14  # types of elements
NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
STRUCT = 2  # class of a matrix
MOST = 1 << 28  # bytes that a compressed element may hold


def read_field(data: bytes, variable: str, field: str) -> np.ndarray:
    """The numbers of a field of a 1 x 1 struct. Raises ValueError where the file is another or damaged."""
    if len(data) < 128 or data[126:128] != b"IM":
        raise ValueError("not a MATLAB 5 file")
    try:
        found = dict(_matrix(content) for kind, content in _elements(data[128:]) if kind == MATRIX)
        numbers = found[variable][field]
    except (struct.error, zlib.error, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"no {variable}.{field} in it, or damaged: {error!r}") from error
    return numbers


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from("<II", data, at)
        at += 8
        if kind >> 16:  # up to 4 bytes stand within the tag
            yield kind & 0xFFFF, data[at - 4 : at - 4 + min(kind >> 16, 4)]
            continue
        if at + size > len(data):
            raise ValueError("cut off")
        content = data[at : at + size]
        at += size + (0 if kind == COMPRESSED else -size % 8)
        if kind == COMPRESSED:
            whole = zlib.decompressobj()
            yield from _elements(whole.decompress(content, MOST))
            if not whole.eof:
                raise ValueError("cut off, or too large")
        else:
            yield kind, content


def _matrix(content: bytes) -> tuple[str, np.ndarray | dict]:
    """The name and the numbers of a matrix, or its fields if it is a struct."""
    (_, flags), (_, shape), (_, name), *parts = _elements(content)
    if flags[0] == STRUCT:
        length, names = int.from_bytes(parts[0][1], "little"), parts[1][1]
        fields = [names[i : i + length].split(b"\0")[0].decode("ascii") for i in range(0, len(names), max(1, length))]
        return name.decode("ascii"), {
            field: _matrix(body)[1] for field, (kind, body) in zip(fields, parts[2:], strict=True) if kind == MATRIX
        }
    numbers = np.frombuffer(parts[0][1], NUMBERS[parts[0][0]])
    return name.decode("ascii"), numbers.reshape(np.frombuffer(shape, "<i4"), order="F")
