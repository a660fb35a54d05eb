"""Where a run stands, on disk: trained weights, AdamW's moments, position. Whole or not there at all.

    checkpoints/step-00000200/delta.safetensors    the weights; spgdd.load takes it as it is
                              exp_avg.safetensors, exp_avg_sq.safetensors
                              position.json

Each with a checksum. Nothing in them depends on how many processes there were, or on DeepSpeed. Randomness has no
state: it follows from seed and step.
"""

import json
import shutil
from hashlib import sha256
from pathlib import Path

from spgdd.errors import SpgddError
from spgdd.files import read_json, write_json
from spgdd.tensors import read_tensors, write_tensors
from spgdd.training.worker import MOMENTS, State

FILES = {"value": "delta.safetensors"} | {kind: f"{kind}.safetensors" for kind in MOMENTS}


def save(folder: Path, state: State, position: dict, metadata: dict[str, str], keep: int) -> Path:
    """Write checkpoint number ``position["step"]`` and remove all but the last ``keep``."""
    remove_unfinished(folder)
    final = folder / f"step-{position['step']:08}"
    if not final.exists():
        partial = final.with_suffix(".part")
        try:
            for kind, name in FILES.items():
                write_tensors(partial / name, state[kind], metadata)
            write_json(partial / "position.json", position | {"checksum": checksum(position)})
        except SpgddError as error:
            remove_unfinished(folder)
            kept = [path.name for path in every(folder)]
            raise SpgddError(f"{error} Kept in {folder}: {', '.join(kept) or 'nothing'}.") from error
        partial.rename(final)
    for old in every(folder)[:-keep]:
        shutil.rmtree(old.rename(old.with_suffix(".part")))  # half removed it would look like one
    return final


def remove_unfinished(folder: Path) -> None:
    """What is left of a run that was killed, or that found no room."""
    for unfinished in folder.glob("*.part"):
        shutil.rmtree(unfinished)


def every(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".part")


def load(path: Path) -> tuple[State, dict]:
    """State and position. Raises SpgddError for a damaged file."""
    mend = f"Delete {path}: --resume (resume=True) goes on from the checkpoint before."
    position = read_json(path / "position.json", mend)
    if position.pop("checksum", None) != checksum(position):
        raise SpgddError(f"{path / 'position.json'} is damaged (its checksum is another). {mend}")
    return {kind: read_tensors(path / name, intact=True, mend=mend) for kind, name in FILES.items()}, position


def checksum(position: dict) -> str:
    return sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()
