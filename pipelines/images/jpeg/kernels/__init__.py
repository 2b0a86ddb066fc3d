"""Compiled loops over the bits of a JPEG. They check every read and write, because input may be malicious."""

from pipelines.images.jpeg.kernels.blocks import rewrite, walk
from pipelines.images.jpeg.kernels.codes import DAMAGED, NUM_TABLES, PADDING_BYTES, SPARE_BYTES, TABLE_ROW, fill_tables
from pipelines.images.jpeg.kernels.head import HEIGHT, INDEX_HEAD, LEFT, NUM_FACTS
from pipelines.images.jpeg.kernels.tiles import MAX_DC, MAX_QUOTIENT, OUTSIDE, cut

__all__ = [
    "DAMAGED",
    "HEIGHT",
    "INDEX_HEAD",
    "LEFT",
    "MAX_DC",
    "MAX_QUOTIENT",
    "NUM_FACTS",
    "NUM_TABLES",
    "OUTSIDE",
    "PADDING_BYTES",
    "SPARE_BYTES",
    "TABLE_ROW",
    "cut",
    "fill_tables",
    "rewrite",
    "walk",
]
