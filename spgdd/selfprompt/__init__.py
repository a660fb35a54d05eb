"""Self-prompting: maps and prompt tokens made from a product's own normal images and from its name."""

from spgdd.selfprompt.focuser import (
    Focus,
    PatchDecoder,
    dice_loss,
    focal_loss,
    text_anchors,
    zero_shot_map,
    zero_shot_probabilities,
)
from spgdd.selfprompt.memory import Memory, MemoryBank, rotations, subsample
from spgdd.selfprompt.prompt_learner import PromptLearner

__all__ = [
    "Focus", "Memory", "MemoryBank", "PatchDecoder", "PromptLearner", "dice_loss", "focal_loss", "rotations",
    "subsample", "text_anchors", "zero_shot_map", "zero_shot_probabilities",
]  # fmt: skip
