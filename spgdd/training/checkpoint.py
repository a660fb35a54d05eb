"""Where a run stands, on disk: trained weights, AdamW's moments, position. Whole or not there at all.

    checkpoints/step-00000200/delta.safetensors    the weights; spgdd.load takes it as it is
                              exp_avg.safetensors, exp_avg_sq.safetensors

Each has a checksum, and the position among its metadata. Nothing in them depends on how many processes there were, or
on DeepSpeed. Randomness has no state: it follows from seed and step.
"""

import json
import shutil
from pathlib import Path

from spgdd.errors import SpgddError
from spgdd.tensors import read_sealed, write_tensors
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
                write_tensors(partial / name, state[kind], metadata | {"position": json.dumps(position)})
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
    try:
        files = {kind: read_sealed(path / name) for kind, name in FILES.items()}
        position = json.loads(files["value"][1]["position"])
    except (OSError, KeyError, ValueError) as error:
        raise SpgddError(f"{path} is damaged ({error}). Delete it: --resume (resume=True) goes on from the checkpoint "
                         "before.") from error  # fmt: skip
    return {kind: tensors for kind, (tensors, _) in files.items()}, position
