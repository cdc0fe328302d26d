"""How near two clips of the same seed are to each other: numbers for each frame and for the clip, and a picture."""

from .metrics import ClipComparison, compare_clips
from .picture import MAX_FRAMES, comparison_picture
from .table import metrics_table

__all__ = ["MAX_FRAMES", "ClipComparison", "compare_clips", "comparison_picture", "metrics_table"]
