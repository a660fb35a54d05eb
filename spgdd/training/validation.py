"""How a model under training does on held-out samples: the loss, and answers to read."""

import random
from collections.abc import Callable

import torch

from spgdd.language import Answer
from spgdd.model import SPGDD
from spgdd.training.prepare import casting_inputs
from spgdd.training.settings import TrainingSettings

LONGEST = 96  # tokens of an answer
AT_ONCE = 16  # samples


@torch.no_grad()
def validate(model: SPGDD, data, settings: TrainingSettings, objective: Callable) -> dict:
    """Means over ``settings.evaluate_on`` samples drawn from ``data`` ("held_out"), and some questions and "answers".

    "verdicts" is the share of answers that begin with the right one of Yes and No, where the expected answer does.
    """
    count = min(len(data), settings.evaluate_on)
    rows = sorted(random.Random(0).sample(range(len(data)), count))  # every eighth could be the first of each product
    plan = [rows[i : i + AT_ONCE] for i in range(0, count, AT_ONCE)]
    sums, told, right, training = {"loss": 0.0, "token_accuracy": 0.0}, [], [], model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # answers grow token by token: each would be compiled anew
        for batch in data.batches(plan, epoch=0):
            batch = batch.to(model.device)
            loss = objective(model, batch, settings.max_tgt_len)
            for name, value in zip(sums, (loss.total, loss.token_accuracy), strict=True):
                sums[name] += float(value) * len(batch.keys) / count
            questions, expected = ([talk[i]["value"] for talk in batch.conversations] for i in (0, 1))
            with casting_inputs(model.language, True):
                said = answers(model, batch, questions)
            for question, wanted, answer in zip(questions, expected, said, strict=True):
                told.append({"question": question, "expected": wanted, "answered": answer.text})
                if (verdict := wanted[:3].strip(" ,.")) in ("Yes", "No"):
                    right.append(answer.text.startswith(verdict))
    model.train(training)
    model.imagebind.eval()
    verdicts = {"verdicts": sum(right) / len(right)} if right else {}
    shown = told[:: max(1, count // settings.answers)][: settings.answers] if settings.answers else []
    return {"held_out": {name: round(value, 6) for name, value in (sums | verdicts).items()}, "answers": shown}


@torch.no_grad()
def answers(model: SPGDD, batch, questions: list[str]) -> list[Answer]:
    """What the model says to each picture of a batch, with the batch's normal pictures for comparison."""
    prompts = []
    for row, product in enumerate(batch.products):
        patches = batch.features.patches[row : row + 1]
        normals = batch.normals[row] if batch.normals else None
        bank = None if normals is None else model.memory.build(normals)
        anomaly_map = model.evidence(patches, product, bank).map()
        prompts.append(model.prompt_tokens(anomaly_map, patches, bank and bank.entries))
    return model.language.generate_batch(batch.features.embedding, questions, torch.cat(prompts), LONGEST)
