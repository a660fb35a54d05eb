"""The mini world: generated photographs of products, good or damaged, with everything known about them."""

from spgdd.tadd.miniworld.defects import SLOTS, TYPES
from spgdd.tadd.miniworld.samples import Sample, draw_product, record, write_folder, write_world
from spgdd.tadd.miniworld.world import (
    FAMILIES,
    HELD_OUT_FAMILIES,
    HELD_OUT_TYPES,
    Photographs,
    describe,
    photograph,
    possible_types,
)

__all__ = [
    "FAMILIES", "HELD_OUT_FAMILIES", "HELD_OUT_TYPES", "SLOTS", "TYPES", "Photographs", "Sample", "describe",
    "draw_product", "photograph", "possible_types", "record", "write_folder", "write_world",
]  # fmt: skip
