"""The network: ImageBind sees, the self-prompting part compares, the language model speaks."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import spgdd.imagebind
from spgdd.errors import WeightsError
from spgdd.imagebind import ImageBind, ImageFeatures, TextTokenizer, load_imagebind
from spgdd.language import LoraSettings, Vicuna
from spgdd.profiles import Delta, Profile, get_profile, weights_folder
from spgdd.selfprompt import (
    Focus,
    Memory,
    MemoryBank,
    PatchDecoder,
    PromptLearner,
    dice_loss,
    focal_loss,
    text_anchors,
    zero_shot_map,
    zero_shot_probabilities,
)
from spgdd.weights.checkpoint import is_standin
from spgdd.weights.delta import apply_delta, load_delta

MASK_THRESHOLD = 0.3  # a mask pixel above it is defective (AnomalyGPT)


class TrainingLoss(NamedTuple):
    total: Tensor  # scalar, language + focal + dice: what is minimised
    language: Tensor  # scalar, nats per answer token
    focal: Tensor  # (L,), one per tap; zeros without masks
    dice: Tensor  # (L,)
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
        self.focus = Focus(width, language.hidden, taps) if profile.focus else None
        self.memory = Memory(taps, width, profile.scales)
        self._anchors: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.memory.gates.device

    @torch.no_grad()
    def encode(self, images: Tensor) -> ImageFeatures:
        """Normalised images (B, 3, 224, 224) -> features, in one run of the vision tower for all uses."""
        return self.imagebind.encode_image(images.to(self.device))

    def anchors(self, product: str) -> Tensor:
        """Unit vectors (2, J) float32 of a normal and an abnormal ``product``, computed once per name."""
        if product not in self._anchors:
            # The cache outlives a caller's inference mode, whose tensors could not be trained with.
            with torch.inference_mode(False), torch.no_grad():
                self._anchors[product] = text_anchors(
                    self.imagebind.encode_text,
                    lambda texts: self.text_tokenizer(texts).to(self.device),
                    product,
                )
        return self._anchors[product].to(self.device)

    @torch.no_grad()
    def anomaly_map(
        self, features: ImageFeatures, product: str = "object", bank: MemoryBank | None = None
    ) -> Tensor:
        """Anomaly map (B, 1, 224, 224) float32, higher where stranger.

        With a bank it comes from the normal images (0 to 2), else from the product's name (0 to 1).
        """
        if bank is not None:
            return self.memory.anomaly_map(features.patches, bank)
        return zero_shot_map(self.image_decoder(features.patches), self.anchors(product))

    def prompt_tokens(self, anomaly_map: Tensor, features: ImageFeatures) -> Tensor:
        """Tokens (B, P, H) that tell the language model about a map (B, 1, 224, 224) and what it points at.

        18 map tokens, then one focus token per tap where the profile has them.
        """
        tokens = self.prompt_learner(anomaly_map)
        if self.focus is None:
            return tokens
        return torch.cat([tokens, self.focus(features.patches, anomaly_map)], dim=1)

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

    def build_bank(
        self, patches: Tensor, product: str, rotate: bool = False, budget: int | None = None
    ) -> MemoryBank:
        """``Memory.build`` of normal images' patch tokens (K, L, N, D), with the marks that saving needs."""
        bank = self.memory.build(patches, rotate, budget)
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
        banks: Sequence[MemoryBank] | None = None,
        max_length: int = 1024,
    ) -> TrainingLoss:
        """AnomalyGPT's loss: language + focal and dice of every tap's zero-shot map, unweighted.

        There is one product name, conversation (see ``Vicuna.forward_loss``) and memory bank per image. Banks
        change the map that the prompts are made of and leave the pixel losses alone; None: the zero-shot map.
        ``masks`` (B, 224, 224) are 0 to 1, defective above 0.3; None: no pixel losses (chat data, product
        "object").
        """
        anchors = torch.stack([self.anchors(product) for product in products])  # (B, 2, J)
        probabilities = zero_shot_probabilities(self.image_decoder(features.patches), anchors)
        if banks is None:
            anomaly_map = probabilities[:, :, 1].mean(1, keepdim=True)
        else:
            rows = zip(features.patches.split(1), banks, strict=True)
            anomaly_map = torch.cat([self.memory.anomaly_map(patches, bank) for patches, bank in rows])
        said = self.language.forward_loss(
            features.embedding, conversations, self.prompt_tokens(anomaly_map, features), max_length
        )
        taps = probabilities.unbind(1)
        if masks is None:
            focal = dice = torch.zeros(len(taps), device=self.device)
        else:
            truth = (masks.to(self.device) > MASK_THRESHOLD).float()
            focal = torch.stack([focal_loss(tap, truth) for tap in taps])
            dice = torch.stack([dice_loss(tap[:, 1], truth) for tap in taps])
        return TrainingLoss(said.loss + focal.sum() + dice.sum(), said.loss, focal, dice, said.token_accuracy)


def choose_dtype(device: str | torch.device) -> tuple[torch.dtype, str]:
    """Precision of the large frozen models on a device, and the reason in words."""
    device = torch.device(device)
    if device.type != "cuda":
        return torch.float32, f"float32 on {device.type}: half precision is slow or incomplete there"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return torch.bfloat16, f"bfloat16: {name} computes in it, and it has the range of float32"
    version = ".".join(map(str, capability))
    return torch.float16, f"float16: {name} (compute capability {version}) has no bfloat16"


def load_model(
    profile: str | Profile = "mini",
    root: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantize: Literal["8bit", "4bit"] | None = None,
    device_map: str | dict | None = None,
) -> SPGDD:
    """Read a profile's weights from ``root`` (see ``weights_folder``), in evaluation mode.

    ``device``: by default a GPU where there is one. ``dtype`` of ImageBind and the language model: by default
    ``choose_dtype``; what can be trained is always float32. ``quantize`` shrinks the language model,
    ``device_map`` spreads it over several GPUs ("auto", or as in transformers). Raises WeightsError that lists
    every missing file, or names one that is damaged or belongs to another model.
    """
    profile = get_profile(profile) if isinstance(profile, str) else profile
    root = weights_folder(root)
    _require_files(profile, root)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float32 if profile.precision == "float32" else choose_dtype(device)[0]

    config = getattr(spgdd.imagebind, profile.imagebind)
    imagebind = load_imagebind(root / profile.imagebind_file, config, dtype=dtype, device=device)
    folder = profile.text_tokenizer
    tokenizer = TextTokenizer.load(root / folder) if folder else TextTokenizer()
    lora = LoraSettings(r=profile.lora_rank, alpha=profile.lora_rank)
    language = Vicuna.load(root / profile.language, config.joint, dtype, device_map or {"": device}, quantize, lora)
    with device:
        model = SPGDD(profile, imagebind, language, tokenizer)
    model.standins = tuple(
        file for file in (profile.imagebind_file, profile.language) if is_standin(root / file)
    )
    load_deltas(model, profile.deltas, root)
    return model.eval()


def load_deltas(model: SPGDD, deltas: Sequence[Delta], root: Path) -> None:
    """Put trained parameters into a model, a later file over an earlier. Raises WeightsError naming the file."""
    _require_files(replace(model.profile, deltas=tuple(deltas)), root)
    for delta in deltas:
        # The published files name the language model's parameters without saying whose they are.
        state = load_delta(root / delta.file)
        state = {f"language.{k}" if k.startswith("llama_") else k: value for k, value in state.items()}
        try:
            apply_delta(model, state, delta.parts)
        except WeightsError as error:
            raise WeightsError(f"{root / delta.file}: {error}") from error
        if is_standin(root / delta.file):
            model.standins += (delta.file,)


def _require_files(profile: Profile, root: Path) -> None:
    missing = {file: source for file, source in profile.files().items() if not (root / file).is_file()}
    if missing:
        listing = "\n".join(f"  {file} ({source})" for file, source in missing.items())
        raise WeightsError(
            f"profile {profile.name} lacks {len(missing)} file(s) in {root.resolve()}:\n{listing}\n"
            f"`spgdd weights download {profile.name}` fetches what is published; notebooks make the rest. "
            "If the files are elsewhere, set SPGDD_WEIGHTS to that folder."
        )
