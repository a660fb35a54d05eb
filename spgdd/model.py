"""The network: ImageBind sees, the self-prompting part compares, the language model speaks."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spgdd.imagebind import ImageBind, ImageFeatures, TextTokenizer
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
from spgdd.selfprompt.comparison import probability, word_evidence
from spgdd.selfprompt.focuser import enlarge, text_vectors, zero_shot_map
from spgdd.selfprompt.memory import closest, on_grid
from spgdd.tensors import to_device

if TYPE_CHECKING:
    from spgdd.language import Vicuna


class SPGDD(nn.Module):
    """Image features -> anomaly map -> prompt tokens -> text.

    Without a language model (None) there are maps and no text, and none of the parts that make prompt tokens for it.
    Shapes: B images, L taps, N patches, D vision width, J joint width, H language width, P prompt tokens.
    """

    def __init__(self, profile: Profile, imagebind: ImageBind, language: "Vicuna | None", tokenizer: TextTokenizer):
        super().__init__()
        config = imagebind.config
        taps, width = len(config.taps), config.vision.width
        self.profile = profile
        self.standins: tuple[str, ...] = ()  # files of random values (`spgdd weights standin`) among its weights
        self.imagebind = imagebind
        self.language = language
        self.text_tokenizer = tokenizer
        self.image_decoder = PatchDecoder(width, config.joint, taps)
        speaks = language is not None
        self.prompt_learner = PromptLearner(language.hidden, profile.prompt_channels) if speaks else None
        self.memory = Memory(taps, width, profile.scales)
        self.comparison = Comparison(taps) if profile.comparison else None
        self.focus = Focus(width, language.hidden, taps) if speaks and profile.focus else None
        self.memory_tokens = MemoryTokens(width, language.hidden) if speaks and profile.memory_tokens else None
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

    def learned_anchors(self, products: Sequence[str]) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """``anchors`` (n, 2, J) with the gradient of the learned prompts.

        And, where the profile has such prompts, unit vectors of the hand-written abnormal sentences (n, 10, J) and of
        the learned ones (n, 10, J), which are to stay near them.
        """
        names = sorted(set(products))
        rows = to_device(torch.tensor([names.index(product) for product in products]), self.device)
        normal, abnormal = (torch.stack(side)[rows] for side in zip(*map(self.sentences, names), strict=True))
        prompts = None
        if self.abnormal_prompts is not None:
            tower = self.imagebind.modality_preprocessors["text"], self.imagebind.encode_text
            learned = self.abnormal_prompts(*tower, self.text_tokenizer, names)[rows]  # (n, P, J)
            prompts, abnormal = (abnormal, learned), torch.cat([abnormal, learned], dim=1)
        return F.normalize(torch.stack([normal.mean(1), abnormal.mean(1)], dim=1), dim=-1), prompts

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

    def prompt_tokens(self, anomaly_map: Tensor, patches: Tensor, entries: Tensor | None = None) -> Tensor:
        """Tokens (B, P, H) that tell the language model about a map (B, 1, 224, 224) and what it points at.

        18 map tokens, then, where the profile has them, one focus token per tap and the memory tokens. ``patches``
        (B, L, N, D). ``entries`` (G, M, D) are the ``MemoryBank.entries`` of G banks, B / G images in a row for each;
        None: no normal images.
        """
        prompts = [self.prompt_learner(anomaly_map)]
        if self.focus is not None:
            prompts.append(self.focus(patches, anomaly_map))
        if self.memory_tokens is not None:
            nearest = None
            if entries is not None:
                entries, gate = entries.to(patches.device), self.memory.gates[-1, 0]  # (G, M, D), (D,)
                query = patches[:, -1].unflatten(0, (len(entries), -1))  # (G, B/G, N, D)
                nearest = closest(query, entries, gate.expand(len(entries), -1))[1].flatten(0, 1)  # (B, N)
            prompts.append(self.memory_tokens(patches, anomaly_map, entries, nearest))
        return torch.cat(prompts, dim=1)

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
