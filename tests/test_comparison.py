"""The learned comparison, and the loss of all of SPGDD's parts together, on tiny weights."""

import dataclasses

import pytest
import torch

from conftest import check
from spgdd.imagebind import ImageFeatures
from spgdd.loading import load_model
from spgdd.selfprompt import Comparison
from spgdd.selfprompt.comparison import EPSILON, probability, word_evidence
from spgdd.selfprompt.focuser import enlarge, zero_shot_logits
from spgdd.training.data import Batch
from spgdd.training.objective import spgdd_loss
from test_model import IMAGES, TINY_PROFILE, encode, reduced_tokenizer, training_inputs, weights  # noqa: F401

FULL = dataclasses.replace(
    TINY_PROFILE, scales=(1, 3), comparison=True, focus=True, memory_tokens=True, learned_prompts=True
)


@pytest.fixture(scope="module")
def model(weights):  # noqa: F811
    torch.manual_seed(0)
    model = load_model(FULL, weights, device="cpu")
    model.text_tokenizer = reduced_tokenizer
    for part in (model.comparison, model.memory, model.abnormal_prompts):  # as if trained
        for parameter in part.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def test_word_evidence_is_the_difference_of_the_zero_shot_logits():
    torch.manual_seed(0)
    decoded, anchors = torch.randn(3, 4, 64, 16), torch.nn.functional.normalize(torch.randn(3, 2, 16), dim=-1)
    logits = zero_shot_logits(decoded, anchors)  # (B, L, 2, G, G)
    check("word evidence", word_evidence(decoded, anchors), (logits[:, :, 1] - logits[:, :, 0]).flatten(2), atol=1e-4)
    same = anchors[:1].expand(3, -1, -1)
    check("one pair of anchors", word_evidence(decoded, anchors[0]), word_evidence(decoded, same), atol=1e-5)


def test_the_witnesses_log_odds_add_up():
    comparison, words = Comparison(2), torch.tensor([[[1.0, -50.0], [3.0, -10.0]]])  # (1, 2 taps, 2 patches)
    bias, fused = comparison.bias.item(), torch.tensor([[0.5, 0.25]])
    check("untrained", comparison(fused, words), torch.tensor([[6 * 0.5 + bias, 6 * 0.25 + bias]]), atol=1e-6)
    check("shares, untrained", comparison.tap_weights(), torch.tensor([0.5, 0.5]), atol=1e-6)
    comparison.trust.data = torch.tensor([0.25, 0.75])
    check("log-odds", comparison(fused, words), torch.tensor([[3 + 2.5 + bias, 1.5 - 12.5 + bias]]), atol=1e-6)
    comparison.per_doubling.data = torch.tensor([0.5])
    check("eight normal images", comparison(fused, words, 8) - comparison(fused, words), torch.full((1, 2), 1.5))
    comparison.trust.data = torch.tensor([0.5, -0.1])  # a tap that is distrusted does not count backwards
    check("shares", comparison.tap_weights(), torch.tensor([1.0, 0.0]), atol=1e-5)


def test_probabilities_keep_away_from_both_ends():
    found = probability(torch.tensor([-100.0, -1.0, 0.0, 3.0, 100.0]))
    check("probability", found, torch.tensor([EPSILON, 0.2689414, 0.5, 0.9525741, 1 - EPSILON]), atol=1e-6)


def test_the_map_follows_its_definition_step_by_step(model):
    features = encode(model, sorted(path.name for path in IMAGES.iterdir())[:6], fit="squash")
    query, normals = features.patches[:2], features.patches[2:]  # four normal images
    bank = model.memory.build(normals)
    fused = model.memory.fuse(model.memory.compare(query, bank.tokens[None])[0])
    trust = model.comparison.trust[:, None]  # (L, 1)
    words = (trust * word_evidence(model.image_decoder(query), model.anchors("bottle")).clamp(-20, 20)).sum(1)
    logits = model.comparison.steepness * fused + words + model.comparison.bias
    by_hand = probability(enlarge((logits + 2 * model.comparison.per_doubling).view(2, 1, 16, 16)))
    pair = type(features)(*(part[:2] for part in features))
    check("few-shot map", model.anomaly_map(pair, "bottle", bank), by_hand, atol=1e-5)
    three = model.memory.build(normals[1:])
    first = type(features)(*(part[2:3] for part in features))
    left_out = model.anomaly_map(first, "bottle", bank, without=torch.tensor([0]))
    check("one left out", left_out, model.anomaly_map(first, "bottle", three), atol=1e-5)


def test_anchors_of_before_training_are_not_used_after_it(model):
    """A fused optimiser changes parameters without telling anyone."""
    offsets, before = model.abnormal_prompts.offsets, model.anchors("bottle")
    kept = offsets.detach().clone()
    optimiser = torch.optim.AdamW([offsets], lr=1.0, fused=True)
    model.train()
    model.anchors("bottle")
    offsets.grad = torch.randn(offsets.shape, generator=torch.Generator().manual_seed(0))
    optimiser.step()
    model.eval()
    now = model.anchors("bottle")
    check("anchors", now, model.learned_anchors(["bottle"])[0][0], atol=1e-6)
    offsets.data.copy_(kept)
    model.eval()
    assert not torch.allclose(now, before, atol=1e-3)
    check("anchors, set back", model.anchors("bottle"), before, atol=1e-6)


def test_the_loss_has_all_parts_and_reaches_every_parameter(model):
    features, products, conversations, masks = training_inputs(model)
    model.zero_grad()
    loss = spgdd_loss(model, Batch([], features, products, conversations, masks, [features.patches.flip(1), None]))
    assert set(loss.parts) == {"focal", "dice", "focal few", "dice few", "triplet", "matching"}
    check("total", loss.total, loss.language + sum(loss.parts.values()), atol=1e-5)
    loss.total.backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if name.split(".")[0] not in ("vision", "language") and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not silent


def test_a_batch_of_mixed_shots_is_the_mean_of_its_images(model):
    features, products, conversations, masks = training_inputs(model)
    normals = [features.patches[1:], torch.cat([features.patches, features.patches.flip(2)])]
    columns = (*features, products, conversations, masks, normals)

    def loss(rows: slice):
        embedding, patches, *rest = (column[rows] for column in columns)
        return spgdd_loss(model, Batch([], ImageFeatures(embedding, patches), *rest))

    whole, *singles = (loss(slice(*rows)) for rows in ((0, 2), (0, 1), (1, 2)))
    for name, value in whole.parts.items():
        check(f"mean of {name}", value, sum(single.parts[name] for single in singles) / 2, atol=1e-5)


def test_pictures_with_a_bank_each_are_told_of_as_one_by_one(model):
    features = encode(model, sorted(path.name for path in IMAGES.iterdir())[:6], fit="squash")
    banks = [model.memory.build(features.patches[first : first + 2]) for first in (2, 4)]
    maps = torch.rand(2, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    entries = torch.stack([bank.tokens[-1, 0] for bank in banks])
    together, swapped = (model.prompt_tokens(maps, features.patches[:2], told) for told in (entries, entries.flip(0)))
    for row, bank in enumerate(banks):
        one = ImageFeatures(*(part[row : row + 1] for part in features))
        alone = model.prompt_tokens(maps[row : row + 1], one.patches, bank.entries)[0]
        check(f"picture {row}", together[row], alone, atol=1e-5)
    assert not torch.allclose(swapped, together, atol=1e-3)
