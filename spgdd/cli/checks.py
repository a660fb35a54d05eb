"""Three checks, from the ground up: Vicuna talks, PandaGPT talks about an image, the diagnosis model answers.

When an answer is nonsense, the first check that fails names the file to look at.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from spgdd.agreement import says_defective
from spgdd.data.words import default_question
from spgdd.diagnosis import Diagnoser
from spgdd.errors import WeightsError
from spgdd.language.conversation import ASSISTANT
from spgdd.loading import load_deltas, load_model
from spgdd.model import SPGDD
from spgdd.profiles import Profile, get_profile, weights_folder
from spgdd.report import number
from spgdd.views import Views

PLATE = "metal plate"


@dataclass(frozen=True)
class Check:
    """What was asked and answered, and whether that is as it should be."""

    title: str
    files: tuple[str, ...]  # what this check adds to those before
    passed: bool | None  # None: nothing to judge, the weights are stand-ins
    verdict: str  # one plain sentence
    question: str = ""
    answer: str = ""

    def __str__(self) -> str:
        mark = {True: "passed", False: "FAILED", None: "not judged"}[self.passed]
        said = f"\n    {self.question}\n    -> {self.answer!r}" if self.question else ""
        return f"{self.title} ({', '.join(self.files)}): {mark}. {self.verdict}{said}"


def run_checks(profile: str | Profile, root: str | Path | None = None, **options) -> Iterator[Check]:
    """Load a profile file by file and yield a check after each step; ``options`` go to ``load_model``.

    A check sees only the files that it is about: the base alone, then PandaGPT's delta, then the others. One
    whose files cannot be loaded fails and is the last.
    """
    root, profile, model = weights_folder(root), get_profile(profile) if isinstance(profile, str) else profile, None
    steps = (("The map shows a hole", diagnosis_answers, profile.deltas, "the map is of no use"),)
    if profile.language:
        steps = (
            ("Vicuna talks", vicuna_talks, (), f"{profile.language} is not Vicuna v0 or is damaged"),
            ("PandaGPT talks about an image", pandagpt_talks, profile.deltas[:1],
             f"{profile.imagebind_file} or {profile.deltas[0].file} does not belong to this base"),
            ("The diagnosis model answers", diagnosis_answers, profile.deltas[1:],
             "the map or the answer is of no use"),
        )  # fmt: skip
    for title, check, deltas, blame in steps:
        base = profile.imagebind_file or profile.backbone, profile.language
        files = tuple(delta.file for delta in deltas) or tuple(filter(None, base))
        try:
            if model is None:
                model = load_model(replace(profile, deltas=()), root, **options)
                model.profile = profile
            load_deltas(model, deltas, root)
        except WeightsError as error:
            yield Check(title, files, False, str(error))
            return
        passed, verdict, question, answer = check(model)
        if model.standins:
            passed, verdict = None, (f"STAND-IN weights ({', '.join(model.standins)}): names and shapes fit and "
                                     "the network runs; its words mean nothing.")
        elif not passed:
            verdict += f" So {blame}: run `spgdd weights verify {profile.name}`."
        yield Check(title, files, passed, verdict, question, answer)


@torch.no_grad()
def vicuna_talks(model: SPGDD) -> tuple[bool, str, str, str]:
    """The language model alone, LoRA switched off, on a question of general knowledge."""
    language, tokenizer, mini = model.language, model.language.tokenizer, model.profile.name == "mini"
    question = default_question(PLATE) if mini else "What is the capital of France?"
    ids = [tokenizer.bos, *tokenizer.encode(f"### Human: {question}{ASSISTANT}")]
    with language.llama_model.disable_adapter():
        row = language.llama_model.generate(
            input_ids=torch.tensor([ids], device=model.device), max_new_tokens=24, do_sample=False,
            attention_mask=torch.ones(1, len(ids), device=model.device),
            pad_token_id=tokenizer.eos, eos_token_id=[tokenizer.eos, language.stop_id])
    answer = tokenizer.decode(row[0, len(ids):].tolist()).removesuffix("##").strip()
    if mini:  # it knows inspection and nothing else, so the form is what can be judged
        return says_defective(answer) is not None, "Expected: a plain yes or no.", question, answer
    return "paris" in answer.lower(), "Expected: Paris.", question, answer


def pandagpt_talks(model: SPGDD) -> tuple[bool, str, str, str]:
    """ImageBind, projection and LoRA in PandaGPT's layout, about a drawn red disc; mini: a nut of the mini world."""
    if model.profile.name == "mini":
        from miniworld import draw_product

        picture = Image.fromarray(draw_product("nut", 0, ["good"])[0].image)
        question, word = "What is in the image?", "nut"
    else:
        picture = Image.new("RGB", (224, 224), "white")
        ImageDraw.Draw(picture).ellipse((42, 42, 182, 182), fill="red")
        question, word = "What colour is the shape in the image?", "red"
    (seen,) = model.look([Views.of(picture, model.profile, tiles=1).pixels(picture)])
    answer = model.language.generate(seen.embedding, question, max_new_tokens=24).text.strip()
    return word in answer.lower(), f"Expected: {word}.", question, answer


def diagnosis_answers(model: SPGDD) -> tuple[bool, str, str, str]:
    """The whole system, on a drawn plate with a hole and two plates without."""
    diagnoser = Diagnoser(model)
    reference = diagnoser.reference([draw_plate(level, hole=False) for level in (178, 184)], PLATE)
    bad = diagnoser.diagnose(draw_plate(180, hole=True), reference, max_new_tokens=40)
    good = diagnoser.diagnose(draw_plate(181, hole=False), reference, max_new_tokens=1)
    verdict = f"The plate with a hole scores {number(bad.score)}, the one without {number(good.score)}."
    return bad.score > good.score and bool(bad.text), verdict, bad.question, bad.text


def draw_plate(level: int, hole: bool) -> Image.Image:
    """A grey metal plate (224, 224) with grain, the same for the same level of grey; with or without a hole."""
    grain = np.random.default_rng(level).normal(level, 12, (224, 224)).clip(0, 255)
    picture = Image.fromarray(grain.astype(np.uint8)).convert("RGB")
    if hole:
        ImageDraw.Draw(picture).ellipse((130, 60, 160, 90), fill=(20, 20, 20))
    return picture
