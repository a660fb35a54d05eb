"""PandaGPT's conversation format: the text around image, question and answer, and which of it is learned.

    <s> ### Human: <Img> [image] </Img> question\\n### Assistant: answer\\n### Human: question ...

Each piece is tokenised on its own. Only the answers and the `\\n###` that closes each of them are targets.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from spgdd.errors import DataError, SpgddError
from spgdd.language.tokenizer import LlamaTokenizer

PROMPT_START = "### Human: <Img>"
IMAGE_END = "</Img> "
ASSISTANT = "\n### Assistant:"
STOP = "\n###"
IGNORE = -100  # target of positions that are not learned


class Answer(NamedTuple):
    text: str
    ids: list[int]  # as generated, with the stop marker or EOS
    stopped: Literal["marker", "eos", "length"]
    yes: float  # how likely it was to begin with Yes and not with No, 0 to 1


def encode_turns(tokenizer: LlamaTokenizer, turns: Sequence[dict], max_length: int,
                 opening: str = IMAGE_END) -> tuple[list[int], list[int]]:
    """Token ids and targets of one conversation, without the prefix up to the image.

    `turns` is a list of `{"from": "human" | "gpt", "value": str}`, human first, then alternating. `opening`
    stands before the first question: `</Img> ` in PandaGPT's layout, nothing where the caller has placed it.
    Both lists have the same length, at most `max_length`; targets are -100 outside the answers. Raises
    DataError for other roles or another order.
    """
    ids, targets = [], []
    for number, turn in enumerate(turns):
        speaker = ("human", "gpt")[number % 2]
        if turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise DataError(f'Turn {number} of a conversation must be {{"from": "{speaker}", "value": text}} '
                            f"(turns alternate, the first is human); received {turn!r}.")
        if speaker == "human":
            pieces = tokenizer.encode((opening if number == 0 else "Human: ") + turn["value"] + ASSISTANT)
            targets += [IGNORE] * len(pieces)
        else:
            pieces = tokenizer.encode(turn["value"] + STOP)
            targets += pieces
        ids += pieces
    return ids[:max_length], targets[:max_length]


def fold_history(history: Sequence[tuple[str, str]], question: str) -> str:
    """The question preceded by earlier (question, answer) pairs, as one text (PandaGPT's multi-turn prompt).

    Raises SpgddError for a question without text.
    """
    if not question.strip():
        raise SpgddError("The question is empty. Ask for example 'Is there any anomaly in the image?'")
    return "".join(f"{asked}{ASSISTANT} {answer}{STOP} Human: " for asked, answer in history) + question
