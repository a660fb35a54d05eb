"""The whole network in half precision against float32, stage by stage: with mini's weights, and with stand-ins."""

import pytest
import torch

from miniworld.world import TYPES, photograph
from spgdd.data.words import default_question
from spgdd.loading import load_model
from spgdd.model import SPGDD

# Largest relative difference (of norms) in bfloat16, with all that went before it in bfloat16 too. float16 has three
# bits more: a sixth of it.
TOLERANCES = {
    "patch tokens": 0.015,
    "embedding": 0.012,
    "sentences": 0.008,
    "distances": 0.012,
    "zero-shot map": 0.008,
    "evidence": 0.006,
    "few-shot map": 0.015,
    "map tokens": 0.015,
    "logits": 0.015,
}


@pytest.fixture(scope="module")
def pictures():
    """Two good gears, one with a hole and one burnt."""
    kinds = torch.tensor([-1, -1, TYPES.index("hole"), TYPES.index("burn")])
    return photograph("gear", torch.full((4,), 11), torch.arange(4), kinds).images


def network(dtype: torch.dtype, standin: bool) -> SPGDD:
    """mini in this precision; its matrices and vectors as a stand-in's, small and random, if that is asked for."""
    model, random = load_model("mini", device="cpu", dtype=dtype), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if standin and parameter.dim() > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) * 0.02)
    return model


@torch.no_grad()
def stages(model: SPGDD, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """What comes out of every stage of a diagnosis of the last two pictures, with the first two as the normal ones."""
    seen = model.look([[picture] for picture in pictures])
    patches, embedding = torch.stack([one.patches[0, 0] for one in seen]), torch.stack([one.embedding for one in seen])
    bank, query = model.memory.build(patches[:2]), patches[2:]
    few_shot = model.evidence(query, "gear", bank)
    tokens, language = model.prompt_tokens(few_shot.map(), query, bank.entries), model.language
    vectors = language._project(embedding[2:]).split(1)
    question = default_question("gear")
    prompts = [language._prompt(*each) for each in zip(vectors, [question] * 2, tokens.split(1), strict=True)]
    return {
        "patch tokens": patches,
        "embedding": embedding,
        "sentences": torch.cat(model.sentences("gear")),
        "distances": model.memory.compare(query, bank.tokens[None])[0],
        "zero-shot map": model.evidence(query, "gear").map(),
        "evidence": few_shot.values,
        "few-shot map": few_shot.map(),
        "map tokens": model.map_tokens(few_shot.map(), query),
        "logits": language.llama_model(inputs_embeds=torch.cat(prompts), logits_to_keep=1).logits,
    }


@pytest.mark.parametrize("standin", [False, True], ids=["trained", "stand-ins"])
def test_each_stage_in_half_precision_is_near_float32(pictures, standin):
    exact = stages(network(torch.float32, standin), pictures)
    for dtype, share in ((torch.bfloat16, 1), (torch.float16, 1 / 6)):
        half = stages(network(dtype, standin), pictures)
        for name, allowed in TOLERANCES.items():
            assert half[name].isfinite().all()
            off = ((half[name].float() - exact[name]).norm() / exact[name].norm()).item()
            assert off < allowed * share, f"{name} in {dtype}: off by {off:.2g}, allowed {allowed * share:.2g}"


def test_averaged_tokens_are_not_rounded(pictures):
    model = network(torch.bfloat16, standin=False)
    (seen,) = model.look([[pictures[0]]])
    patches = seen.patches[0, :1]  # (1, L, N, D)
    bank = model.memory.build(patches)
    assert patches.dtype == torch.bfloat16 and bank.tokens.dtype == torch.float32
    distances, index = model.memory.compare(patches, bank.tokens[None])
    assert distances.abs().max() < 1e-6 and index.eq(torch.arange(patches.shape[2])).all()  # to itself
    model.memory.scales = (1,)  # nothing is averaged: in the precision of the tower, in half the room
    assert model.memory.tokens(patches).dtype == torch.bfloat16
