"""Reading instruction data: TADD_text.json and PandaGPT's pandagpt4_visual_instruction_data.json alike.

A file is a list of {"image_name": path below the image folder, "conversation": [{"from", "value"}, ...]}.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath

from spgdd.errors import DataError


@dataclass(frozen=True)
class Record:
    image: Path
    conversation: list[dict]


def read_records(path: str | Path, images: str | Path, max_turns: int | None = None) -> list[Record]:
    """The records of a text file, in UTF-8, 16 or 32, with the paths of their images below ``images``.

    ``max_turns`` cuts conversations to that many questions and answers (AnomalyGPT trains with 1). A name
    without its image is tried with ".jpg" appended, as PandaGPT's and AnomalyGPT's readers do. Raises
    DataError if the file is not of this format, or if images are missing or outside of ``images``.
    """
    path, images = Path(path), Path(images)
    try:
        entries = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing. `spgdd tadd describe` writes one, "
            "`spgdd tadd download pandagpt` fetches PandaGPT's."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise DataError(f"{path} is no Unicode text ({where}). Save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}. If it was downloaded, fetch it again.") from None
    if not isinstance(entries, list):
        raise DataError(f"{path} holds a {type(entries).__name__}, expected a list of records.")
    records, missing = [], []
    for number, entry in enumerate(entries):
        name, talk = _checked(entry, f"{path}, record {number}")
        image = images / name
        if not os.path.isfile(image):  # also False of names that no system takes
            image = image.with_name(image.name + ".jpg")
        if not os.path.isfile(image):
            missing.append(name)
        records.append(Record(image, talk[: 2 * max_turns] if max_turns else talk))
    if missing:
        count = f"{len(missing)} of {len(entries)} images"
        raise DataError(f"{count} of {path} are not below {images}, for example {missing[0][:80]!r}.")
    return records


def _checked(entry, where: str) -> tuple[str, list[dict]]:
    """The image's name and the conversation of a record: human and gpt in turns, with text."""
    if not isinstance(entry, dict) or not {"image_name", "conversation"} <= entry.keys():
        raise DataError(f"{where} needs image_name and conversation, received {str(entry)[:80]}.")
    name, talk = entry["image_name"], entry["conversation"]
    if not isinstance(name, str) or not PurePath(name).name or "\0" in name:
        raise DataError(f"{where}: image_name must be a path, received {str(name)[:80]!r}.")
    if PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:  # of every system
        raise DataError(f"{where}: image_name {name[:80]!r} leads out of the folder of images.")
    turns = talk if isinstance(talk, list) and all(isinstance(turn, dict) for turn in talk) else []
    speakers, texts = ([turn.get(key) for turn in turns] for key in ("from", "value"))
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2) or not all(isinstance(t, str) for t in texts):
        raise DataError(f"{where}: a conversation is human, gpt, human, ..., not {str(talk)[:80]}.")
    return name, talk


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; a key that occurs twice would hide a value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key occurs twice in {str(pairs)[:80]}")
    return found
