"""Where a run stands, on disk: trained weights, AdamW's moments, position. Whole or not there at all.

    checkpoints/step-00000200/delta.safetensors    the weights; spgdd.load takes it as it is
                              exp_avg.safetensors, exp_avg_sq.safetensors
                              position.json

Nothing in it depends on how many processes there were, or on DeepSpeed. Randomness has no state: it follows from seed
and step.
"""

import shutil
from pathlib import Path

from spgdd.files import read_json, write_json
from spgdd.tensors import read_tensors, write_tensors
from spgdd.training.worker import MOMENTS, State

FILES = {"value": "delta.safetensors"} | {kind: f"{kind}.safetensors" for kind in MOMENTS}


def save(folder: Path, state: State, position: dict, metadata: dict[str, str], keep: int) -> Path:
    """Write checkpoint number ``position["step"]`` and remove all but the last ``keep``."""
    for unfinished in folder.glob("*.part"):  # of a run that was killed
        shutil.rmtree(unfinished)
    final = folder / f"step-{position['step']:08}"
    if not final.exists():
        partial = final.with_suffix(".part")
        for kind, name in FILES.items():
            write_tensors(partial / name, state[kind], metadata)
        write_json(partial / "position.json", position)
        partial.rename(final)
    for old in every(folder)[:-keep]:
        shutil.rmtree(old.rename(old.with_suffix(".part")))  # half removed it would look like one
    return final


def every(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".part")


def load(path: Path) -> tuple[State, dict]:
    """State and position. Raises SpgddError for a damaged file."""
    mend = f"Delete {path}: the run goes on from the one before."
    position = read_json(path / "position.json", mend)
    return {kind: read_tensors(path / file, intact=True, mend=mend) for kind, file in FILES.items()}, position
