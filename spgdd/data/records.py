"""Reading instruction data: TADD_text.json and PandaGPT's pandagpt4_visual_instruction_data.json alike.

A file is a list of {"image_name": path below the image folder, "conversation": [{"from", "value"}, ...]}.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from spgdd.errors import DataError


@dataclass(frozen=True)
class Record:
    image: Path
    conversation: list[dict]


def read_records(path: str | Path, images: str | Path, max_turns: int | None = None) -> list[Record]:
    """The records of a text file with the paths of their images below ``images``.

    ``max_turns`` cuts conversations to that many questions and answers (AnomalyGPT trains with 1). A name
    without its image is tried with ".jpg" appended, as PandaGPT's and AnomalyGPT's readers do. Raises
    DataError if the file is not of this format, or if images are missing.
    """
    path, images = Path(path), Path(images)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing. `spgdd tadd describe` writes one, "
            "`spgdd tadd download pandagpt` fetches PandaGPT's."
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}. If it was downloaded, fetch it again.") from None
    if not isinstance(entries, list):
        raise DataError(f"{path} holds a {type(entries).__name__}, expected a list of records.")
    records, missing = [], []
    for number, entry in enumerate(entries):
        talk = _checked(entry, f"{path}, record {number}")
        image = images / entry["image_name"]
        if not image.is_file():
            image = image.with_name(image.name + ".jpg")
        if not image.is_file():
            missing.append(entry["image_name"])
        records.append(Record(image, talk[: 2 * max_turns] if max_turns else talk))
    if missing:
        count = f"{len(missing)} of {len(entries)} images"
        raise DataError(f"{count} of {path} are not below {images}, for example {missing[0]}.")
    return records


def _checked(entry, where: str) -> list[dict]:
    """The conversation of a record: human and gpt in turns, with text."""
    if not isinstance(entry, dict) or not {"image_name", "conversation"} <= entry.keys():
        raise DataError(f"{where} needs image_name and conversation, received {str(entry)[:80]}.")
    talk = entry["conversation"]
    good = [isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in talk]
    if not talk or not all(good) or [turn["from"] for turn in talk] != ["human", "gpt"] * (len(talk) // 2):
        raise DataError(f"{where}: a conversation is human, gpt, human, ..., not {str(talk)[:80]}.")
    return talk
