"""Self-prompting: maps and prompt tokens made from a product's own normal images and from its name."""

from spgdd.selfprompt.abnormal_prompts import AbnormalPrompts
from spgdd.selfprompt.comparison import Comparison, Evidence
from spgdd.selfprompt.focuser import Focus, PatchDecoder
from spgdd.selfprompt.memory import Memory, MemoryBank, rotations, subsample
from spgdd.selfprompt.tokens import MemoryTokens, PromptLearner

__all__ = [
    "AbnormalPrompts", "Comparison", "Evidence", "Focus", "Memory", "MemoryBank", "MemoryTokens", "PatchDecoder",
    "PromptLearner", "rotations", "subsample",
]  # fmt: skip
