"""The network: ImageBind sees, the self-prompting part compares, the language model speaks."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spgdd.imagebind import ImageBind, ImageFeatures, TextTokenizer
from spgdd.language import Vicuna
from spgdd.language.vicuna import to_device
from spgdd.profiles import Profile
from spgdd.selfprompt import (
    AbnormalPrompts,
    Comparison,
    Focus,
    Memory,
    MemoryBank,
    MemoryTokens,
    PatchDecoder,
    PromptLearner,
)
from spgdd.selfprompt.abnormal_prompts import MATCHING, matching_loss, triplet_loss
from spgdd.selfprompt.comparison import probability, word_evidence
from spgdd.selfprompt.focuser import (
    dice_loss,
    enlarge,
    focal_loss,
    over_taps,
    text_vectors,
    zero_shot_map,
    zero_shot_probabilities,
)
from spgdd.selfprompt.memory import closest, on_grid

MASK_THRESHOLD = 0.3  # a mask pixel above it is defective (AnomalyGPT)


class TrainingLoss(NamedTuple):
    total: Tensor  # scalar, what is minimised: the language loss and all parts
    language: Tensor  # scalar, nats per answer token
    parts: dict[str, Tensor]  # scalars, weighted as in the total, each a mean over images
    token_accuracy: Tensor  # scalar, share of answer tokens predicted right


class SPGDD(nn.Module):
    """Image features -> anomaly map -> prompt tokens -> text.

    Shapes: B images, L taps, N patches, D vision width, J joint width, H language width, P prompt tokens.
    """

    def __init__(self, profile: Profile, imagebind: ImageBind, language: Vicuna, tokenizer: TextTokenizer):
        super().__init__()
        config = imagebind.config
        taps, width = len(config.taps), config.vision.width
        self.profile = profile
        self.standins: tuple[str, ...] = ()  # files of random values (`spgdd weights standin`) among its weights
        self.imagebind = imagebind
        self.language = language
        self.text_tokenizer = tokenizer
        self.image_decoder = PatchDecoder(width, config.joint, taps)
        self.prompt_learner = PromptLearner(language.hidden, profile.prompt_channels)
        self.memory = Memory(taps, width, profile.scales)
        self.comparison = Comparison(taps) if profile.comparison else None
        self.focus = Focus(width, language.hidden, taps) if profile.focus else None
        self.memory_tokens = MemoryTokens(width, language.hidden) if profile.memory_tokens else None
        self.abnormal_prompts = AbnormalPrompts(config.text.width) if profile.learned_prompts else None
        self._sentences: dict[str, tuple[Tensor, Tensor]] = {}
        self._anchors: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.memory.gates.device

    @property
    def shares(self) -> Tensor | None:
        """Of each tap in the zero-shot map, see ``Comparison``; None: all alike."""
        return None if self.comparison is None else self.comparison.shares()

    @torch.no_grad()
    def encode(self, images: Tensor) -> ImageFeatures:
        """Normalised images (B, 3, 224, 224) -> features, in one run of the vision tower for all uses."""
        return self.imagebind.encode_image(images.to(self.device))

    def sentences(self, product: str) -> tuple[Tensor, Tensor]:
        """Unit vectors of the hand-written sentences on a product: normal (14, J), abnormal (10, J); computed once."""
        if product not in self._sentences:
            # The cache outlives a caller's inference mode, whose tensors could not be trained with.
            with torch.inference_mode(False), torch.no_grad():
                tokenise = lambda texts: self.text_tokenizer(texts).to(self.device)  # noqa: E731
                self._sentences[product] = text_vectors(self.imagebind.encode_text, tokenise, product)
        return self._sentences[product]

    def anchors(self, product: str) -> Tensor:
        """Unit vectors (2, J) float32 of a normal and an abnormal ``product``, computed once per name."""
        if self.training or product not in self._anchors:
            with torch.inference_mode(False), torch.no_grad():
                self._anchors[product] = self.learned_anchors([product])[0][0]
        return self._anchors[product].to(self.device)

    def train(self, mode: bool = True) -> "SPGDD":
        """As of any module; the anchors, made of prompts that learn, are forgotten."""
        self._anchors.clear()
        return super().train(mode)

    def learned_anchors(self, products: Sequence[str]) -> tuple[Tensor, Tensor]:
        """``anchors`` (n, 2, J) with the gradient of the learned prompts, and their matching loss."""
        names = sorted(set(products))
        rows = to_device(torch.tensor([names.index(product) for product in products]), self.device)
        normal, abnormal = (torch.stack(side)[rows] for side in zip(*map(self.sentences, names), strict=True))
        loss = torch.zeros((), device=self.device)
        if self.abnormal_prompts is not None:
            tower = self.imagebind.modality_preprocessors["text"], self.imagebind.encode_text
            learned = self.abnormal_prompts(*tower, self.text_tokenizer, names)[rows]  # (n, P, J)
            loss, abnormal = matching_loss(abnormal, learned), torch.cat([abnormal, learned], dim=1)
        return F.normalize(torch.stack([normal.mean(1), abnormal.mean(1)], dim=1), dim=-1), loss

    @torch.no_grad()
    def anomaly_map(
        self,
        features: ImageFeatures,
        product: str = "object",
        bank: MemoryBank | None = None,
        without: Tensor | None = None,
    ) -> Tensor:
        """Anomaly map (B, 1, 224, 224) float32, higher where stranger.

        Without a bank it comes from the product's name, 0 to 1; with one from the normal images too: 0 to 1 where the
        profile joins both, else AnomalyGPT's distance, 0 to 2. ``without`` (B,): the normal image, by its
        number in the bank, that each image is not compared with.
        """
        if bank is None:
            return zero_shot_map(self.image_decoder(features.patches), self.anchors(product), self.shares)
        self.memory.require_scales(bank)
        barred, normals = None, bank.normals
        if without is not None:
            barred = bank.origin.to(self.device) == without.to(self.device)[:, None, None, None]  # (B, L, S, M)
            normals -= 1
        words = None
        if self.comparison is not None:
            words = word_evidence(self.image_decoder(features.patches), self.anchors(product))
        return self.few_shot_map(features.patches, words, bank.tokens[None], normals, barred)

    def few_shot_map(
        self, patches: Tensor, words: Tensor | None, tokens: Tensor, normals: int, barred: Tensor | None = None
    ) -> Tensor:
        """Map (B, 1, 224, 224) of patches (B, L, N, D) against G banks of ``normals`` images; see ``Memory.compare``.

        ``words`` (B, L, N) is ``word_evidence``, for the joined map alone.
        """
        fused = self.memory.fuse(self.memory.compare(patches, tokens, barred)[0])  # (B, N)
        if self.comparison is None:
            return enlarge(on_grid(fused)[:, None])
        return probability(enlarge(on_grid(self.comparison(fused, words, normals))[:, None]))

    def prompt_tokens(
        self, anomaly_map: Tensor, features: ImageFeatures, bank: MemoryBank | None = None
    ) -> Tensor:
        """Tokens (B, P, H) that tell the language model about a map (B, 1, 224, 224) and what it points at.

        18 map tokens, then, where the profile has them, one focus token per tap and the memory tokens.
        """
        entries = None if bank is None else bank.tokens[None, -1, 0]
        return self.prompts_from(anomaly_map, features.patches, [(slice(None), entries)])

    def prompts_from(
        self, anomaly_map: Tensor, patches: Tensor, groups: Sequence[tuple[slice, Tensor | None]]
    ) -> Tensor:
        """``prompt_tokens`` of patches (B, L, N, D), of groups of images in a row that know equally many normal ones.

        A group is its rows and the entries (G, M, D) of G banks: patch tokens of the last tap, at the first scale, for
        as many images each. None: no normal images.
        """
        prompts = self._map_tokens(anomaly_map, patches)
        if self.memory_tokens is not None:
            told = [self._memory_tokens(anomaly_map[rows], patches[rows], entries) for rows, entries in groups]
            prompts = torch.cat([prompts, torch.cat(told)], dim=1)
        return prompts

    def _map_tokens(self, anomaly_map: Tensor, patches: Tensor) -> Tensor:
        prompts = self.prompt_learner(anomaly_map)
        return prompts if self.focus is None else torch.cat([prompts, self.focus(patches, anomaly_map)], dim=1)

    def _memory_tokens(self, anomaly_map: Tensor, patches: Tensor, entries: Tensor | None) -> Tensor:
        if entries is None:
            return self.memory_tokens(patches, anomaly_map)
        entries, gate = entries.to(patches.device), self.memory.gates[-1, 0]  # (G, M, D), (D,)
        query = patches[:, -1].unflatten(0, (len(entries), -1))  # (G, B/G, N, D)
        nearest = closest(query, entries, gate.expand(len(entries), -1))[1].flatten(0, 1)  # (B, N)
        return self.memory_tokens(patches, anomaly_map, entries, nearest)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell vision towers apart.

        SHA-256 of the signs of the query-key-value weights of the first and last block. Signs survive every
        change of precision and device, so a bank made on a GPU in bfloat16 is recognised on a CPU.
        """
        blocks = self.imagebind.modality_trunks["vision"].blocks
        digest = hashlib.sha256()
        for block in (blocks[0], blocks[-1]):
            digest.update(block.attn.in_proj_weight.detach().signbit().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def build_bank(self, patches: Tensor, product: str, **options) -> MemoryBank:
        """``Memory.build`` of normal images' patch tokens (K, L, N, D), with the marks that saving needs."""
        bank = self.memory.build(patches, **options)
        return replace(bank, product=product, profile=self.profile.name, imagebind=self.fingerprint)

    def load_bank(self, path: str | Path) -> MemoryBank:
        """A bank saved by ``MemoryBank.save``; WeightsError if another model made it."""
        return MemoryBank.load(path, self.profile.name, self.fingerprint, self.device)

    def training_loss(
        self,
        features: ImageFeatures,
        products: Sequence[str],
        conversations: Sequence[Sequence[dict]],
        masks: Tensor | None = None,
        normals: Sequence[Tensor | None] | None = None,
        max_length: int = 1024,
    ) -> TrainingLoss:
        """The loss of a batch: language, and where there are masks, what the maps must show.

        There is one product name, conversation (see ``Vicuna.forward_loss``) and entry of ``normals`` per image: patch
        tokens (K, L, N, D) of normal images of the same product, or None for a map from the name alone. ``masks``
        (B, 224, 224) are 0 to 1, defective above 0.3; None: chat data, product "object".

        Parts, all unweighted unless said: focal and dice of every tap's zero-shot map (AnomalyGPT); the same of the
        few-shot maps where they are probabilities; the triplet loss and ``MATCHING`` times the matching loss where
        the abnormal prompts are.
        """
        # Images with equally many normal ones come together, zero-shot ones first: all losses are means.
        counts = [0 if given is None else len(given) for given in normals or [None] * len(products)]
        order = sorted(range(len(products)), key=counts.__getitem__)
        index = to_device(torch.tensor(order), self.device)
        embedding, patches = (part.index_select(0, index) for part in features)
        products, conversations = ([values[row] for row in order] for values in (products, conversations))

        anchors, matching = self.learned_anchors(products)  # (B, 2, J)
        decoded = self.image_decoder(patches)
        probabilities = zero_shot_probabilities(decoded, anchors)  # (B, L, 2, 224, 224)
        words = word_evidence(decoded, anchors)  # (B, L, N)
        zero_shot, maps, banks = over_taps(probabilities, self.shares), [], []
        for count, group in itertools.groupby(order, key=counts.__getitem__):
            group = list(group)
            start = sum(map(len, maps))
            part = slice(start, start + len(group))
            tokens = None
            if count:
                given = torch.stack([normals[row] for row in group]).to(self.device)  # (g, K, L, N, D)
                tokens = self.memory.tokens(given)
            found = zero_shot[part] if tokens is None else self.few_shot_map(patches[part], words[part], tokens, count)
            maps.append(found)
            banks.append((part, None if tokens is None else tokens[:, -1, 0]))
        maps = torch.cat(maps)
        prompts = self.prompts_from(maps, patches, banks)
        said = self.language.forward_loss(embedding, conversations, prompts, max_length)
        parts, first = {}, counts.count(0)
        if masks is not None:
            truth = (masks.to(self.device).index_select(0, index) > MASK_THRESHOLD).float()
            taps = probabilities.unbind(1)
            parts = {
                "focal": sum(focal_loss(tap, truth) for tap in taps),
                "dice": sum(dice_loss(tap[:, 1], truth) for tap in taps),
            }
            if self.comparison is not None and first < len(order):
                found, share = maps[first:], 1 - first / len(order)
                parts["focal few"] = share * focal_loss(torch.cat([1 - found, found], dim=1), truth[first:])
                parts["dice few"] = share * dice_loss(found[:, 0], truth[first:])
            if self.abnormal_prompts is not None:
                parts["triplet"] = triplet_loss(decoded, anchors, truth)
                parts["matching"] = MATCHING * matching
        return TrainingLoss(said.loss + sum(parts.values()), said.loss, parts, said.token_accuracy)
