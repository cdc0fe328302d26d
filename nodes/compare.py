"""How near two videos of the same seed are to each other: sparse against dense, or any one change."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..efficient_vdit_core.quality import MAX_FRAMES, compare_clips, comparison_picture, metrics_table
from .checked import checked
from .comfy_bridge.progress import cancellable_progress
from .inputs import CATEGORY, advanced_inputs, search_words


class EVDiTCompareVideos(io.ComfyNode):
    """Paired metrics of two videos as a table, and a picture of frames, their difference and PSNR over time."""

    @classmethod
    @advanced_inputs("frames_shown", "amplify")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTCompareVideos",
            display_name="Compare Videos",
            category=CATEGORY,
            **search_words("psnr", "ssim", "lpips", "before and after", "quality", "difference", "视频对比"),
            description=(
                "Measures how near two videos of the same seed and size are: PSNR, SSIM, PSNR of the changes from frame to "
                "frame, amount of motion, and LPIPS where its package is installed. Gives a picture and a table."
            ),
            inputs=[
                io.Image.Input(
                    "video_a",
                    tooltip="Frames to compare with, usually of dense attention. At least 11 pixels on each side.",
                ),
                io.Image.Input(
                    "video_b",
                    tooltip="Frames that are judged, usually of sparse attention: same number, size, prompt and seed as video_a.",
                ),
                io.String.Input(
                    "name_a",
                    default="dense",
                    tooltip="What video_a is called in the picture and the table. A short name in Latin letters; no effect on the numbers.",
                ),
                io.String.Input(
                    "name_b",
                    default="sparse",
                    tooltip="What video_b is called in the picture and the table. A short name in Latin letters; no effect on the numbers.",
                ),
                io.Int.Input(
                    "frames_shown",
                    default=6,
                    min=1,
                    max=MAX_FRAMES,
                    step=1,
                    tooltip="Frames in the picture, 1 to 12, spread evenly over the video. The numbers are always of all frames.",
                ),
                io.Float.Input(
                    "amplify",
                    default=4.0,
                    min=1.0,
                    max=64.0,
                    step=0.5,
                    tooltip=(
                        "How many times the difference is brightened in the picture, 1 to 64. At 4, a difference of a quarter "
                        "of full range is white. Does not change the numbers."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    "picture",
                    display_name="picture",
                    tooltip="One image: frames of both videos, their difference, the numbers, and PSNR over time. For Preview Image.",
                ),
                io.String.Output(
                    "table",
                    display_name="table",
                    tooltip="The numbers as text, one metric a line, with how to read it. For a text preview.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, video_a: Any, video_b: Any, name_a: str, name_b: str, frames_shown: int, amplify: float
    ) -> io.NodeOutput:
        comparison = compare_clips(video_a, video_b, progress=cancellable_progress(len(video_a)))
        names = name_a.strip() or "a", name_b.strip() or "b"
        picture = comparison_picture(video_a, video_b, comparison, names=names, frames=frames_shown, amplify=amplify)
        return io.NodeOutput(picture[None], metrics_table(comparison, *names))
