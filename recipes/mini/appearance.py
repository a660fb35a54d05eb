"""What PandaGPT's instruction data teach, at mini's size: what a picture shows, and not a word on defects."""

import colorsys
import random
from collections.abc import Sequence

from spgdd.data.grammar import a

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # by hue, 60 degrees each
TONES = ("dark", "neither dark nor bright", "bright")
TOPICS = {
    "name": (("What is in the image?", "What does the picture show?", "What do you see?"),
             ("The picture shows {it}.", "I see {it}.", "This is {it}.")),
    "tone": (("Is the picture dark or bright?", "How bright is the image?"), ("It is {tone}.",)),
    "colour": (("What colour is it?", "Which colour do you see most?"), ("It is mostly {colour}.",)),
    "all": (("Describe the image.", "Tell me about the picture."),
            ("The picture shows {it}. It is mostly {colour} and {tone}.",)),
}  # fmt: skip


def facts(product: str, colours: Sequence[float]) -> dict:
    """What can be said of a picture with these mean values of red, green and blue, 0 to 255."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(colour / 255 for colour in colours))
    tone = TONES[(value > 0.3) + (value > 0.6)]
    return {"it": a(product), "tone": tone, "colour": COLOURS[round(6 * hue) % 6] if saturation > 0.15 else "grey"}


def conversation(sample: dict, rng: random.Random) -> list[dict]:
    """One to three questions about a picture; ``sample`` has product and colours."""
    known, talk = facts(sample["product"], sample["colours"]), []
    for topic in rng.sample(list(TOPICS), rng.choice((1, 2, 3))):
        ask, answer = (rng.choice(phrases).format_map(known) for phrases in TOPICS[topic])
        talk += [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
    return talk
