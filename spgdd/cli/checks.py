"""Three checks, from the ground up: Vicuna talks, PandaGPT talks about an image, the diagnosis model answers.

When an answer is nonsense, the first rung that fails names the file to look at.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from miniworld import draw_product
from spgdd.data.words import default_question
from spgdd.diagnosis import Diagnoser, says_defective
from spgdd.errors import WeightsError
from spgdd.imagebind import preprocess
from spgdd.language.conversation import ASSISTANT
from spgdd.loading import load_deltas, load_model
from spgdd.model import SPGDD
from spgdd.profiles import Profile, get_profile, weights_folder

CAPITAL, COLOUR = "What is the capital of France?", "What colour is the shape in the image?"
THING = "What is in the image?"
PLATE = "metal plate"


@dataclass(frozen=True)
class Rung:
    """One check: what was asked and answered, and whether that is as it should be."""

    title: str
    passed: bool | None  # None: nothing to judge, the weights are stand-ins
    verdict: str  # one plain sentence
    question: str = ""
    answer: str = ""
    files: tuple[str, ...] = ()  # what this rung added to the one before

    def __str__(self) -> str:
        mark = {True: "passed", False: "FAILED", None: "not judged"}[self.passed]
        said = f"\n    {self.question}\n    -> {self.answer!r}" if self.question else ""
        return f"{self.title} ({', '.join(self.files)}): {mark}. {self.verdict}{said}"


def climb(profile: str | Profile, root: str | Path | None = None, **options) -> Iterator[Rung]:
    """Load a profile file by file and yield rung by rung; `options` go to `load_model`.

    A rung sees only the files that it is about: the base alone, then PandaGPT's delta, then the others. One
    that cannot be loaded fails, and ends the climb.
    """
    root = weights_folder(root)
    profile = get_profile(profile) if isinstance(profile, str) else profile
    deltas = [delta.file for delta in profile.deltas]
    rungs = (
        ("Vicuna talks", vicuna_talks, profile.deltas[:0], (profile.imagebind_file, profile.language)),
        ("PandaGPT talks about an image", pandagpt_talks, profile.deltas[:1], tuple(deltas[:1])),
        ("The diagnosis model answers", diagnosis_answers, profile.deltas[1:], tuple(deltas[1:])),
    )
    model = None
    for title, check, needed, files in rungs:
        try:
            if model is None:
                model = load_model(replace(profile, deltas=()), root, **options)
                model.profile = profile
            load_deltas(model, needed, root)
        except WeightsError as error:
            yield Rung(title, False, str(error), files=files)
            return
        passed, verdict, question, answer = check(model)
        if model.standins:
            passed, verdict = None, (f"STAND-IN weights ({', '.join(model.standins)}): names and shapes fit and "
                                     "the network runs; its words mean nothing.")
        yield Rung(title, passed, verdict, question, answer, files)


Outcome = tuple[bool, str, str, str]  # passed, verdict, question, answer


@torch.no_grad()
def vicuna_talks(model: SPGDD) -> Outcome:
    """The language model alone, LoRA switched off, on a question of general knowledge."""
    language, tokenizer = model.language, model.language.tokenizer
    question = default_question(PLATE) if model.profile.name == "mini" else CAPITAL
    ids = [tokenizer.bos, *tokenizer.encode(f"### Human: {question}{ASSISTANT}")]
    with language.llama_model.disable_adapter():
        row = language.llama_model.generate(
            input_ids=torch.tensor([ids], device=model.device), max_new_tokens=24, do_sample=False,
            attention_mask=torch.ones(1, len(ids), device=model.device),
            pad_token_id=tokenizer.eos, eos_token_id=[tokenizer.eos, language.stop_id])
    answer = tokenizer.decode(row[0, len(ids):].tolist()).removesuffix("##").strip()
    if model.profile.name == "mini":  # it knows inspection and nothing else, so the form is what can be judged
        passed = says_defective(answer) is not None
        return passed, f"The answer {'is' if passed else 'should be'} a plain yes or no.", question, answer
    cure = f"{model.profile.language} is not Vicuna v0 or is damaged: run `spgdd weights verify`."
    return _names("Paris", question, answer, cure)


def pandagpt_talks(model: SPGDD) -> Outcome:
    """ImageBind, projection and LoRA in PandaGPT's layout, about a drawn red disc; mini: a nut of the mini world."""
    picture, question, word = Image.new("RGB", (224, 224), "white"), COLOUR, "red"
    ImageDraw.Draw(picture).ellipse((42, 42, 182, 182), fill="red")
    if model.profile.name == "mini":
        picture, question, word = Image.fromarray(draw_product("nut", 0, ["good"])[0].image), THING, "nut"
    embedding = model.encode(preprocess([picture])).embedding
    answer = model.language.generate(embedding, question, max_new_tokens=24).text.strip()
    files = f"{model.profile.imagebind_file}, {model.profile.deltas[0].file}"
    return _names(word, question, answer, f"ImageBind or the PandaGPT delta ({files}) does not belong to this base.")


def diagnosis_answers(model: SPGDD) -> Outcome:
    """The whole system, on a drawn plate with a hole and two plates without."""
    diagnoser = Diagnoser(model)
    reference = diagnoser.reference([draw_plate(level, hole=False) for level in (178, 184)], PLATE)
    bad = diagnoser.diagnose(draw_plate(180, hole=True), reference, max_new_tokens=40)
    good = diagnoser.diagnose(draw_plate(181, hole=False), reference, max_new_tokens=1)
    passed = bad.score > good.score and bool(bad.text)
    verdict = f"The plate with a hole scores {bad.score:.3f}, the one without {good.score:.3f}."
    if not passed:
        verdict += f" The map or the answer is of no use: run `spgdd weights verify {model.profile.name}`."
    return passed, verdict, bad.question, bad.text


def _names(word: str, question: str, answer: str, cure: str) -> Outcome:
    passed = word.lower() in answer.lower()
    verdict = f"The answer names {word}." if passed else f"The answer should name {word}. {cure}"
    return passed, verdict, question, answer


def draw_plate(level: int, hole: bool) -> Image.Image:
    """A grey metal plate (224, 224) with grain, the same for the same level of grey; with or without a hole."""
    grain = np.random.default_rng(level).normal(level, 12, (224, 224)).clip(0, 255)
    picture = Image.fromarray(grain.astype(np.uint8)).convert("RGB")
    if hole:
        ImageDraw.Draw(picture).ellipse((130, 60, 160, 90), fill=(20, 20, 20))
    return picture
