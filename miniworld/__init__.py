"""The mini world: generated photographs of products, good or damaged, with everything known about them."""

from miniworld.defects import SLOTS, TYPES
from miniworld.samples import Sample, draw_product, record, write_folder, write_world
from miniworld.world import (
    FAMILIES,
    HELD_OUT_FAMILIES,
    HELD_OUT_TYPES,
    Photographs,
    ground_truth,
    photograph,
    possible_types,
)

__all__ = [
    "FAMILIES", "HELD_OUT_FAMILIES", "HELD_OUT_TYPES", "SLOTS", "TYPES", "Photographs", "Sample", "ground_truth",
    "draw_product", "photograph", "possible_types", "record", "write_folder", "write_world",
]  # fmt: skip
