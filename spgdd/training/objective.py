"""What is minimised: the answers' cross-entropy, and what the anomaly maps must show. The network does not know it."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from spgdd.model import SPGDD
from spgdd.selfprompt.abnormal_prompts import MATCHING, matching_loss, triplet_loss
from spgdd.selfprompt.comparison import word_evidence
from spgdd.selfprompt.focuser import dice_loss, focal_loss, over_taps, zero_shot_probabilities
from spgdd.tensors import to_device
from spgdd.training.data import Batch

MASK_THRESHOLD = 0.3  # a mask pixel above it is defective (AnomalyGPT)


class TrainingLoss(NamedTuple):
    total: Tensor  # scalar, what is minimised: the language loss and all parts
    language: Tensor  # scalar, nats per answer token
    parts: dict[str, Tensor]  # scalars, weighted as in the total, each a mean over images
    token_accuracy: Tensor  # scalar, share of answer tokens predicted right


def spgdd_loss(model: SPGDD, batch: Batch, max_length: int = 1024) -> TrainingLoss:
    """The loss of a batch on the model's device: language, and where there are masks, what the maps must show.

    Images are compared with their own ``normals``, those without any with the product's name alone. Parts, all
    unweighted unless said: focal and dice of every tap's zero-shot map (AnomalyGPT); the same of the few-shot maps
    where they are probabilities; the triplet loss and ``MATCHING`` times the matching loss where there are learned
    abnormal prompts.
    """
    # Images with equally many normal ones come together, zero-shot ones first: all losses are means.
    counts = [0 if given is None else len(given) for given in batch.normals or [None] * len(batch.products)]
    order = sorted(range(len(counts)), key=counts.__getitem__)
    index = to_device(torch.tensor(order), model.device)
    embedding, patches = (part.index_select(0, index) for part in batch.features)
    products, conversations = ([values[row] for row in order] for values in (batch.products, batch.conversations))

    anchors, abnormal = model.learned_anchors(products)  # (B, 2, J)
    decoded = model.image_decoder(patches)
    probabilities = zero_shot_probabilities(decoded, anchors)  # (B, L, 2, 224, 224)
    words, zero_shot = word_evidence(decoded, anchors), over_taps(probabilities, model.tap_weights)
    maps, compared, start = [], [], 0
    for count, group in itertools.groupby(order, key=counts.__getitem__):
        group = list(group)
        rows, entries = slice(start, start := start + len(group)), None
        found = zero_shot[rows]
        if count:
            tokens = model.memory.tokens(torch.stack([batch.normals[row] for row in group]))  # of (G, K, L, N, D)
            found = model.few_shot(patches[rows], words[rows], tokens, count).map()
            entries = tokens[:, -1, 0]
        maps.append(found)
        compared.append(model.bank_tokens(found, patches[rows], entries))
    maps = torch.cat(maps)
    # The prompt learner is run once: its last layer is as large as a small network, and so is each of its gradients.
    prompts = torch.cat([model.map_tokens(maps, patches), torch.cat(compared)], dim=1)
    said = model.language.forward_loss(embedding, conversations, prompts, max_length)

    parts, few = {}, sum(map(bool, counts))
    if batch.masks is not None:
        truth = (batch.masks.index_select(0, index) > MASK_THRESHOLD).float()
        taps, every = probabilities.shape[1], truth[:, None]  # their sum over taps is the mean times the number
        parts = {
            "focal": taps * focal_loss(probabilities, every),
            "dice": taps * dice_loss(probabilities[:, :, 1], every),
        }
        if model.comparison is not None and few:
            found, share = maps[-few:], few / len(counts)
            parts["focal few"] = share * focal_loss(torch.cat([1 - found, found], dim=1), truth[-few:])
            parts["dice few"] = share * dice_loss(found[:, 0], truth[-few:])
        if abnormal is not None:
            parts["triplet"] = triplet_loss(decoded, anchors, truth)
            parts["matching"] = MATCHING * matching_loss(*abnormal)
    return TrainingLoss(said.loss + sum(parts.values()), said.loss, parts, said.token_accuracy)
