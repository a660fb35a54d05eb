"""What each part of the method brings: switch it off in a loaded model and evaluate again.

A variant is a dict of switches, from `spgdd evaluate --set gates=false` or a JSON file of several (`--ablate`):

    {"full": {}, "memory alone": {"comparison": false}, "one scale": {"scales": [1]}, "small": {"budget": 256}}
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from spgdd.errors import DataError, SpgddError
from spgdd.files import read_json
from spgdd.profiles import get_profile
from spgdd.selfprompt import Memory

PARTS = ("comparison", "focus", "memory_tokens", "abnormal_prompts")  # modules that a model can do without
NUMBERS = ("gates", "fusion")  # learned numbers of the memory that can be set back
OPTIONS = ("rotate", "budget", "tiles", "joint", "score_share")  # fields of the profile
SWITCHES = (*PARTS, *NUMBERS, *OPTIONS, "scales", "delta")


def read_variants(path: Path) -> dict[str, dict]:
    """Variants by name. Raises DataError where the file holds something else."""
    mend = 'Give names with their switches, such as {"full": {}, "no gates": {"gates": false}}.'
    variants = read_json(path, mend, DataError)
    if not all(isinstance(value, dict) for value in variants.values()):
        raise DataError(f"{path}: not all that it holds are switches. {mend}")
    return variants


def load_variant(switches: dict, profile: str, **options):
    """A Diagnoser with a changed model; "delta" is another file of trained parameters in place of the profile's last.

    ``options`` are those of ``spgdd.load``.
    """
    from spgdd import diagnosis

    profile, switches = get_profile(profile), dict(switches)
    if delta := switches.pop("delta", None):
        *deltas, last = profile.deltas
        profile = replace(profile, deltas=(*deltas, replace(last, file=str(Path(delta).resolve()))))
    diagnoser = diagnosis.load(profile=profile, **options)
    if switches:
        ablate(diagnoser.model, **switches)
    return diagnoser


@torch.no_grad()
def ablate(model, scales: Sequence[int] | None = None, **switches):
    """Change a loaded ``SPGDD`` in place and return it.

    scales: keep only these. A name of PARTS: False takes the module out. gates=False: ones; fusion=False: equal
    weights. OPTIONS: see ``spgdd.profiles.Profile``. Raises SpgddError for a switch or a scale that is not there.
    """
    if unknown := set(switches) - {*PARTS, *NUMBERS, *OPTIONS}:
        raise SpgddError(f"no switch {', '.join(sorted(unknown))}; there are {', '.join(SWITCHES)}.")
    if scales is not None:
        memory = model.memory
        if not scales or set(scales) - set(memory.scales):
            raise SpgddError(f"scales {list(scales)} are not among the model's, {list(memory.scales)}.")
        kept = [memory.scales.index(scale) for scale in scales]
        model.memory = Memory(*memory.gates.shape[::2], tuple(scales)).to(memory.gates.device)
        model.memory.gates.copy_(memory.gates[:, kept])
        model.memory.fusion.copy_(memory.fusion[:, kept])
    for name in PARTS:
        if not switches.get(name, True):
            setattr(model, name, None)
    if not switches.get("gates", True):
        model.memory.gates.fill_(1)
    if not switches.get("fusion", True):
        model.memory.fusion.zero_()
    model.profile = replace(model.profile, **{name: switches[name] for name in OPTIONS if name in switches})
    return model
