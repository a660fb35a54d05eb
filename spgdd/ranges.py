"""What numbers and names may be; asked before any work by the command line and by the functions that take them."""

import re
from numbers import Integral

from spgdd.errors import SpgddError

RANGES = {  # whole numbers from ... to
    "tiles": (1, 16), "budget": (1, 10**7), "max_new_tokens": (1, 2048), "shots": (0, 1000), "limit": (1, 10**6),
    "draws": (1, 1000), "variants": (0, 1000), "turns": (1, 1000), "products": (1, 10**5), "seed": (0, 2**32 - 1),
    "seeds": (0, 2**32 - 1), "port": (0, 65535),
    "false_alarm_rate": (0.0, 0.5), "seconds": (0.0, 86400.0),  # fractions: between, the ends excluded
}  # fmt: skip
NAMES = {
    "product": (r".*\S.*", "a name"), "question": (r".*\S.*", "a question"), "output": (".+", "a file name"),
    "device": (r"cpu|mps|cuda(:\d+)?", "cpu, mps, cuda or cuda:1"),
}  # fmt: skip


def check_ranges(**values) -> None:
    """Raises SpgddError for the first value, or value of a list, that is out of its range; None passes."""
    for name, given in values.items():
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if name in RANGES and value is not None:
                low, high = RANGES[name]
                if isinstance(high, float) and not low < value < high:
                    raise SpgddError(f"{name} must lie between {low:g} and {high:g}, received {value}.")
                if isinstance(high, int) and not (isinstance(value, Integral) and low <= value <= high):
                    raise SpgddError(f"{name} must be a whole number from {low} to {high}, received {value!r}.")
            elif name in NAMES and isinstance(value, str):
                pattern, kind = NAMES[name]
                if not re.fullmatch(pattern, value, re.DOTALL):
                    raise SpgddError(f"{name} must be {kind}, received {value!r}.")
