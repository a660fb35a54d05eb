"""SPGDD-GPT: find, show and explain product defects with a few normal images.

>>> import spgdd
>>> diagnoser = spgdd.load("mini")
>>> diagnoser.diagnose("part.png", normals=["good.png"], product="metal nut")

Nothing heavy is imported until it is used.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "load": "diagnosis", "Diagnoser": "diagnosis", "Diagnosis": "diagnosis",
    "load_model": "loading", "read_image": "images",
    "PROFILES": "profiles", "get_profile": "profiles",
    "SpgddError": "errors", "ImageError": "errors", "WeightsError": "errors", "DataError": "errors",
}  # fmt: skip
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'spgdd' has no attribute {name!r}")
    return getattr(import_module(f"spgdd.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
