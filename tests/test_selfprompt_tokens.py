"""Memory tokens and learned abnormal prompts against closed forms, torch's own modules and the real text tower."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import check
from spgdd.imagebind import load_imagebind
from spgdd.selfprompt.abnormal_prompts import AbnormalPrompts, matching_loss, triplet_loss
from spgdd.selfprompt.focuser import text_prompts, text_vectors
from spgdd.selfprompt.tokens import SPREAD, MemoryTokens, standardise
from test_model import reduced_tokenizer
from test_selfprompt import TINY, TINY_IMAGEBIND

B, L, G, D, H, M, T, C = 4, 3, 8, 16, 24, 50, 3, 2
N = G * G


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return MemoryTokens(D, H, worst=T, context=C, heads=4)


@pytest.fixture
def scene():
    """Patches, a map whose three worst patches are known, two banks for two images each, nearest entries."""
    patches, maps = random(B, L, N, D), torch.zeros(B, 1, G, G)
    worst = torch.tensor([[0, 63, 30], [7, 8, 9], [56, 1, 2], [40, 50, 60]])
    maps.flatten(1).scatter_(1, worst, torch.tensor([[0.9, 0.8, 0.7]]).expand(B, -1))
    maps = maps.repeat_interleave(224 // G, 2).repeat_interleave(224 // G, 3)
    nearest = torch.randint(M, (B, N), generator=torch.Generator().manual_seed(2))
    return patches, maps, random(2, M, D, seed=1), nearest, worst


def test_the_worst_patches_report_how_they_differ_and_where_they_are(tokens, scene):
    patches, maps, entries, nearest, worst = scene
    told, untold = tokens(patches, maps, entries, nearest), tokens(patches, maps)
    assert told.shape == untold.shape == (B, T + C, H)
    for image in range(B):
        for rank in range(T):
            at = worst[image, rank]
            pair = patches[image, -1, at], entries[image // 2, nearest[image, at]]
            difference = [(v - v.mean()) / v.std(correction=0) for v in pair]
            expected = tokens.difference.weight @ (difference[0] - difference[1])
            torch.testing.assert_close(told[image, rank] - untold[image, rank], expected, atol=1e-5, rtol=1e-3)
    place = untold - tokens.base
    assert place[:, T:].abs().max() == 0
    corners = place[[0, 0, 1, 2], [0, 1, 0, 0]]  # top left, bottom right, top right, bottom left
    torch.testing.assert_close(corners, tokens.places[:, [0, 2, 0, 2], [0, 2, 2, 0]].T, atol=1e-6, rtol=0)
    # Patch 30, in row 3 and column 6 of 8, lies between the centres of four cells.
    left, right = tokens.places[:, :, 1], tokens.places[:, :, 2]
    row, column = (3.5 * 3 / 8 - 0.5, 6.5 * 3 / 8 - 0.5)  # in cells, from the centre of the first
    at_row = [(1 - row) * cells[:, 0] + row * cells[:, 1] for cells in (left, right)]
    expected = (2 - column) * at_row[0] + (column - 1) * at_row[1]
    torch.testing.assert_close(place[0, 2], expected, atol=1e-6, rtol=0)


def test_a_patch_as_in_the_bank_reports_nothing(tokens, scene):
    patches, maps, _, _, _ = scene
    same = torch.arange(N).expand(B, -1)
    told, untold = tokens(patches, maps, 2 * patches[:, -1] + 1, same), tokens(patches, maps)
    check("memory tokens of known patches", told[:, :T], untold[:, :T], atol=1e-5)
    assert (told[:, T:] - untold[:, T:]).abs().max() > 1e-3


def test_context_tokens_are_multi_head_attention(tokens, scene):
    entries = scene[2]
    reference = nn.MultiheadAttention(D, 4, bias=False, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([torch.eye(D), tokens.key_value.weight]))
        reference.out_proj.weight.copy_(torch.eye(D))
    known = standardise(entries)
    expected = reference(tokens.queries.expand(2, -1, -1), known, known, need_weights=False)[0]
    check("context tokens", tokens.attend(entries), expected, atol=1e-6)


def test_order_of_entries_and_company_in_the_batch_do_not_matter(tokens, scene):
    patches, maps, entries, nearest, _ = scene
    told = tokens(patches, maps, entries, nearest)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(3))
    shuffled = tokens(patches, maps, entries[:, order], order.argsort()[nearest])
    check("memory tokens, entries shuffled", shuffled, told, atol=1e-6)
    alone = torch.cat(
        [tokens(patches[i, None], maps[i, None], entries[None, i // 2], nearest[None, i]) for i in range(B)]
    )
    check("memory tokens, one by one", alone, told, atol=1e-6)


def test_memory_tokens_begin_small_and_all_parameters_learn(tokens, scene):
    patches, maps, entries, nearest, _ = scene
    big = MemoryTokens(256, 512)
    told = big(random(2, 4, 256, 256), maps[:2], random(2, 99, 256, seed=1), nearest[:2].repeat(1, 4))
    assert 0.5 * SPREAD < told.std() < 3 * SPREAD  # not zero: LLaMA's first normalisation would blow its gradient up
    weight = random(B, T + C, H)
    (tokens(patches, maps, entries, nearest) * weight).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in tokens.parameters())
    tokens.zero_grad()
    (tokens(patches, maps) * weight).sum().backward()  # without a bank the base and the places learn
    assert {n for n, p in tokens.named_parameters() if p.grad is not None} == {"base", "places"}


@pytest.fixture(scope="module")
def tower():
    return load_imagebind(TINY_IMAGEBIND, TINY, ("text",))


def learned(tower, prompts, products):
    return prompts(tower.modality_preprocessors["text"], tower.encode_text, reduced_tokenizer, products)


def hand_written(tower, product):
    return text_vectors(tower.encode_text, reduced_tokenizer, product)[1]


def test_learned_prompts_begin_as_the_hand_written_ones(tower):
    products = ["screw", "printed circuit board"]  # of different lengths
    ours = learned(tower, AbnormalPrompts(TINY.text.width), products)
    theirs = torch.stack([hand_written(tower, product) for product in products])
    check("learned prompts at the start", ours, theirs, atol=1e-5)
    assert matching_loss(theirs, ours) < 1e-9


def test_offsets_take_the_place_of_words(tower):
    """An offset that turns the embedding of one word into that of another gives the other sentence."""
    prompts, embedding = AbnormalPrompts(TINY.text.width), tower.modality_preprocessors["text"].token_embedding
    ids = reduced_tokenizer(text_prompts("screw")["abnormal"])
    other = ids.clone()
    other[0, 1:5] = torch.tensor([11, 12, 13, 14])
    with torch.no_grad():
        prompts.offsets[0] = embedding(other[0, 1:5]) - embedding(ids[0, 1:5])
    expected = F.normalize(tower.encode_text(other), dim=-1)
    assert (expected[0] - hand_written(tower, "screw")[0]).abs().max() > 1e-2
    check("offset prompts", learned(tower, prompts, ["screw"])[0], expected, atol=1e-5)


def test_training_the_prompts_lowers_the_triplet_loss(tower):
    prompts = AbnormalPrompts(TINY.text.width)
    normal, abnormal = text_vectors(tower.encode_text, reduced_tokenizer, "screw")
    decoded, mask = random(2, 1, N, TINY.joint), torch.zeros(2, G, G)
    mask[:, :2, :2] = 1
    optimiser, losses = torch.optim.Adam(prompts.parameters(), lr=1e-2), []
    for _ in range(10):
        sides = normal, torch.cat([abnormal, learned(tower, prompts, ["screw"])[0]])
        anchors = F.normalize(torch.stack([side.mean(0) for side in sides]), dim=-1)
        losses.append(triplet_loss(decoded, anchors, mask))
        optimiser.zero_grad()
        losses[-1].backward()
        assert (prompts.offsets.grad.abs().amax(-1) > 0).all()  # each vector of each prompt
        optimiser.step()
    assert losses[-1] < losses[0] - 1e-3
    assert not any(p.grad is not None for p in tower.parameters())


def test_matching_loss_by_hand():
    hand = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    ours = torch.tensor([[0, 0, 1.0]])
    check("matching loss", matching_loss(hand, ours), 0.25 + 0.25 + 1)
    check(
        "matching loss of two", matching_loss(torch.stack([hand] * 2), torch.stack([ours, hand[:1]])), (1.5 + 0.5) / 2
    )
    assert matching_loss(hand, hand.flip(0)) == 0


def test_triplet_loss_equals_torchs():
    decoded, anchors, mask = random(2, L, N, D), unit(2, 2, D, seed=1), torch.zeros(2, G, G)
    mask[1, 2:4, 5] = 1  # the first image is good
    units, margin = F.normalize(decoded, dim=-1), 0.3
    reference = nn.TripletMarginLoss(margin=margin)
    bad, (good_0, good_1) = mask[1].flatten().bool(), anchors

    def torchs(patches, own, other):
        return reference(patches.flatten(0, 1), own[None], other[None])

    first = torchs(units[0], *good_0)
    second = (torchs(units[1][:, ~bad], *good_1) + torchs(units[1][:, bad], *good_1.flip(0))) / 2
    check("triplet loss", triplet_loss(decoded, anchors, mask, margin), (first + second) / 2, rtol=1e-5)
    # As pixels, and for one product: the same
    pixels = mask.repeat_interleave(28, 1).repeat_interleave(28, 2)
    check("triplet loss, pixels", triplet_loss(decoded, anchors, pixels, margin), (first + second) / 2, rtol=1e-5)
    shared = triplet_loss(decoded, anchors[1], mask, margin)
    check("triplet loss, one product", shared, triplet_loss(decoded, anchors[[1, 1]], mask, margin), rtol=1e-6)
    # A patch that is a quarter defective counts a quarter there and three quarters here
    quarter = torch.zeros(1, 2 * G, 2 * G)
    quarter[0, 4, 10] = quarter[0, 12:14, 2:4] = 1  # a pixel of patch (2, 5), all four of patch (6, 1)
    distance = torch.cdist(units[1], good_1.expand(L, -1, -1))  # (L, N, 2)
    hinge = F.relu(distance - distance.flip(-1) + margin).mean(0)
    share = F.avg_pool2d(quarter, 2).flatten()
    expected = sum((w * h).sum() / w.sum() for w, h in ((1 - share, hinge[:, 0]), (share, hinge[:, 1]))) / 2
    check("triplet loss, shares", triplet_loss(decoded[1:], good_1, quarter, margin), expected, rtol=1e-5)


def test_triplet_loss_vanishes_at_the_anchors_and_pulls_there():
    anchors, mask = unit(2, D), torch.zeros(1, G, G)
    mask[0, 3, 3] = 1
    right = anchors[mask.flatten().long()][None, None]  # (1, 1, N, D)
    assert triplet_loss(right, anchors, mask, margin=0.5) == 0
    gap = torch.dist(*anchors)
    check("triplet loss, all wrong", triplet_loss(right, anchors.flip(0), mask, 0.5), gap + 0.5, atol=1e-3)
    decoded = random(1, L, N, D).requires_grad_()
    triplet_loss(decoded, anchors, mask, margin=3.0).backward()
    toward = decoded - 0.1 * decoded.grad / decoded.grad.norm()
    assert triplet_loss(toward, anchors, mask, 3.0) < triplet_loss(decoded, anchors, mask, 3.0)
    assert decoded.grad.isfinite().all() and (decoded.grad.abs().amax(-1) > 0).all()
    assert triplet_loss(decoded, anchors, torch.ones(1, G, G), 0.1).isfinite()  # a picture that is all defect
