"""The network: a vision tower sees, the self-prompting part compares, the language model speaks."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spgdd.backbones import Backbone
from spgdd.errors import SpgddError
from spgdd.imagebind import ImageBind, ImageFeatures, TextTokenizer, normalise
from spgdd.profiles import PROFILES, Profile
from spgdd.selfprompt.abnormal_prompts import AbnormalPrompts
from spgdd.selfprompt.comparison import Comparison, Evidence, word_evidence
from spgdd.selfprompt.focuser import Focus, PatchDecoder, text_vectors, zero_shot_logits
from spgdd.selfprompt.memory import Memory, MemoryBank, closest, on_grid, rotations
from spgdd.selfprompt.tokens import MemoryTokens, PromptLearner
from spgdd.tensors import to_device

if TYPE_CHECKING:
    from spgdd.language import Vicuna

LOOKED = 32 * 224**2  # pixels that the vision tower takes at once
COMPARED = 8  # views that the memory takes at once: what it makes of more leaves a processor's cache


class Seen(NamedTuple):
    """What the vision tower makes of one picture. Everything else is computed from it, any number of times."""

    embedding: Tensor  # (J,) of the whole picture, unit length
    patches: Tensor  # (R, V, L, N, D): patch tokens of its V views, in R orientations
    joint: bool  # whether the tiles among the views are parts of one large square

    @property
    def told(self) -> Tensor:
        """Patch tokens (L, N', D) that the language model is told of: of the whole view.

        With joint tiles of the large square, which shows better what kind of defect it is.
        """
        if not self.joint:
            return self.patches[0, 0]
        tiles = self.patches[0, 1:]  # (T, L, N, D)
        side, grid = isqrt(len(tiles)), isqrt(tiles.shape[2])
        tiles = tiles.unflatten(2, (grid, grid)).unflatten(0, (side, side))  # (side, side, L, G, G, D)
        return tiles.permute(2, 0, 3, 1, 4, 5).flatten(1, 4)


class SPGDD(nn.Module):
    """Image features -> anomaly map -> prompt tokens -> text.

    Without a language model (None) there are maps and no text, and none of the parts that make prompt tokens for it.
    Where the profile has no words there is no tokenizer (None) either, and ``vision`` is compared with a memory alone.
    Shapes: B images, L taps, N patches, D vision width, J joint width, H language width, P prompt tokens.
    """

    def __init__(
        self, profile: Profile, vision: ImageBind | Backbone, language: "Vicuna | None", tokenizer: TextTokenizer | None
    ):
        super().__init__()
        taps, width = vision.taps, vision.width
        self.profile = profile
        self.standins: tuple[str, ...] = ()  # files of random values (scripts/write_standins.py) among its weights
        self.vision = vision
        self.language = language
        self.text_tokenizer = tokenizer
        self.image_decoder = PatchDecoder(width, vision.joint, taps) if profile.words else None
        speaks = language is not None
        self.prompt_learner = PromptLearner(language.hidden, profile.prompt_channels) if speaks else None
        self.memory = Memory(taps, width, profile.scales)
        self.comparison = Comparison(taps) if profile.comparison else None
        self.focus = Focus(width, language.hidden, taps) if speaks and profile.focus else None
        self.memory_tokens = MemoryTokens(width, language.hidden) if speaks and profile.memory_tokens else None
        self.abnormal_prompts = AbnormalPrompts(vision.config.text.width) if profile.learned_prompts else None
        self._sentences: dict[str, tuple[Tensor, Tensor]] = {}
        self._anchors: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.memory.gates.device

    @property
    def imagebind(self) -> ImageBind:
        """The vision tower under its own name, where the profile has words: it reads them too."""
        return self.vision

    @property
    def tap_weights(self) -> Tensor | None:
        """Of the taps (L,) in the zero-shot map, see ``Comparison``; None: equal weights."""
        return None if self.comparison is None else self.comparison.tap_weights()

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell vision towers apart.

        SHA-256 of the signs of its ``signature``. Signs survive every change of precision and device, so a memory made
        on a GPU in bfloat16 is recognised on a CPU.
        """
        digest = hashlib.sha256()
        for weights in self.vision.signature:
            digest.update(weights.detach().signbit().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    # Pictures in

    @torch.no_grad()
    def look(self, pictures: Sequence[Sequence[Tensor]], rotate: bool = False) -> list[Seen]:
        """What the tower makes of B pictures, each given as ``Views.pixels``, in as few runs as memory allows.

        With ``rotate`` each is also seen turned by 90, 180 and 270 degrees. Joint tiles are seen as the large square
        that they are parts of, and each gets the patches of its part.
        """
        size, patches = pictures[0][0].shape[-1], []
        for side in dict.fromkeys(view.shape[-1] for view in pictures[0]):
            images = torch.stack([view for picture in pictures for view in picture if view.shape[-1] == side])
            images, turns = (rotations(images), 4) if rotate else (images, 1)
            runs = [self.vision.encode_image(normalise(some.to(self.device), self.vision.mean, self.vision.std))
                    for some in images.split(max(1, LOOKED // side**2))]  # fmt: skip
            embedding, tokens = map(torch.cat, zip(*runs, strict=True))
            rows = len(pictures), -1, turns  # B, v views of this side, R
            tokens = _split_square(tokens, side // size).unflatten(0, rows)  # (B, v, R, T, L, N, D)
            patches.append(tokens.transpose(1, 2).flatten(2, 3))  # (B, R, v * T, L, N, D)
            if side == size:
                whole = embedding.unflatten(0, rows)[:, 0, 0]  # (B, J)
        joint = pictures[0][-1].shape[-1] > size
        return [Seen(*one, joint) for one in zip(whole, torch.cat(patches, 2), strict=True)]

    # Words

    def require_words(self) -> None:
        """Raises SpgddError where pictures cannot be compared with sentences."""
        if not self.profile.words:
            able = ", ".join(name for name, profile in PROFILES.items() if profile.words)
            raise SpgddError(f"profile {self.profile.name} has no words to compare a picture with: give at least one "
                             f"normal picture, or load one that has: {able}.")  # fmt: skip

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

    # Maps

    @torch.no_grad()
    def evidence(
        self, patches: Tensor, product: str = "object", bank: MemoryBank | None = None, without: Tensor | None = None
    ) -> Evidence:
        """What speaks for a defect at each of the patches (B, L, N, D).

        Without a bank it comes from the product's name; with one from the normal pictures too. ``without`` (B,): the
        normal picture, by its number in the bank, that each image is not compared with. Raises SpgddError without a
        bank and words.
        """
        if bank is None:
            self.require_words()
            logits = zero_shot_logits(self.image_decoder(patches), self.anchors(product))  # (B, L, 2, G, G)
            return Evidence(logits.flatten(1, 2), "words", self.tap_weights)
        self.memory.require_fit(bank)
        anchors = None if self.comparison is None else self.anchors(product)
        normals, found = bank.normals - (without is not None), []
        for rows in torch.arange(len(patches)).split(COMPARED):
            some, barred = patches[rows], None
            if without is not None:
                left_out = without[rows].to(self.device)[:, None, None, None]
                barred = bank.origin.to(self.device) == left_out  # (B, L, S, M)
            words = None if anchors is None else word_evidence(self.image_decoder(some), anchors)
            found.append(self.few_shot(some, words, bank.tokens[None], normals, barred))
        return found[0]._replace(values=torch.cat([one.values for one in found]))

    def few_shot(
        self, patches: Tensor, words: Tensor | None, tokens: Tensor, normals: int, barred: Tensor | None = None
    ) -> Evidence:
        """Evidence of patches (B, L, N, D) against G banks of ``normals`` pictures; see ``Memory.compare``.

        ``words`` (B, L, N) is ``word_evidence``, needed where the profile joins both.
        """
        fused = self.memory.fuse(self.memory.compare(patches, tokens, barred)[0])  # (B, N)
        if self.comparison is None:
            return Evidence(on_grid(fused)[:, None], "distance")
        return Evidence(on_grid(self.comparison(fused, words, normals))[:, None], "log-odds")

    def anomaly_map(
        self, features: ImageFeatures, product: str = "object", bank: MemoryBank | None = None,
        without: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The map (B, 1, H, W) float32 of ``evidence``, higher where stranger."""
        return self.evidence(features.patches, product, bank, without).map(self.profile.patch)

    # Prompt tokens

    def prompt_tokens(self, anomaly_map: Tensor, patches: Tensor, entries: Tensor | None = None) -> Tensor:
        """Tokens (B, P, H) that tell the language model about a map (B, 1, 224, 224) and what it points at.

        18 map tokens, then, where the profile has them, one focus token per tap and the memory tokens of patches
        (B, L, N, D). ``entries`` (G, M, D) are what G banks hold of the last tap at the first scale, B / G images in a
        row for each; None: no normal pictures.
        """
        parts = self.map_tokens(anomaly_map, patches), self.bank_tokens(anomaly_map, patches, entries)
        return torch.cat(parts, dim=1)

    def map_tokens(self, anomaly_map: Tensor, patches: Tensor) -> Tensor:
        """Those of ``prompt_tokens`` that no bank is needed for: of the map, and of what it points at."""
        prompts = self.prompt_learner(anomaly_map)
        return prompts if self.focus is None else torch.cat([prompts, self.focus(patches, anomaly_map)], dim=1)

    def bank_tokens(self, anomaly_map: Tensor, patches: Tensor, entries: Tensor | None = None) -> Tensor:
        """Those of ``prompt_tokens`` that tell of the comparison with a bank, (B, 0, H) where the profile has none."""
        if self.memory_tokens is None:
            return anomaly_map.new_empty(len(anomaly_map), 0, self.language.hidden)
        if entries is None:
            return self.memory_tokens(patches, anomaly_map)
        entries, gate = entries.to(patches.device), self.memory.gates[-1, 0]  # (G, M, D), (D,)
        query = patches[:, -1].unflatten(0, (len(entries), -1))  # (G, B/G, N, D)
        with torch.no_grad():
            nearest = closest(query, entries, gate.expand(len(entries), -1))[1].flatten(0, 1)  # (B, N)
        return self.memory_tokens(patches, anomaly_map, entries, nearest)


def _split_square(tokens: Tensor, side: int) -> Tensor:
    """Patch tokens (B, L, N, D) of large squares -> of their side x side tiles, row by row: (B, side**2, L, n, D)."""
    grid = isqrt(tokens.shape[2]) // side
    tiles = tokens.unflatten(2, (side, grid, side, grid))  # (B, L, side, G, side, G, D)
    return tiles.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)
