#!/usr/bin/env python3
"""Makes web/dense_beside_sparse.webp, README's animation: the tiny model before and after the three stages, from the
same noise.

Usage: python .ci/animation.py; minutes on a CPU.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from efficient_vdit_core.pipeline import Pipeline  # noqa: E402

TARGET = ROOT / "web" / "dense_beside_sparse.webp"
PROMPTS = {  # with noise under which both clips are clean
    "a yellow triangle moving right slowly on a navy background": 0,
    "a blue square moving down slowly on a black background": 2,
    "a purple circle moving up slowly on a navy background": 2,
}
STEPS = 50
SCALE, GAP, HEAD, SIDE, FOOT = 3, 6, 6, 38, 40  # px, but for SCALE
PAUSE, MILLISECONDS = 700, 83  # of the last frame, of each frame
PAPER, INK, PALE = (16, 20, 31), (244, 247, 255), (169, 182, 211)


def sample() -> dict[str, list[np.ndarray]]:
    """Clips uint8 (F, H, W, 3) of the prompts, by what the row is called."""
    base, tuned = Pipeline.from_model("tiny", device="cpu"), Pipeline.from_model("tiny-8-steps-sparse", device="cpu")
    plan, request = tuned.tuned_plan, tuned.request(next(iter(PROMPTS)))
    assert plan is not None
    share = plan.density(request.latent_size[0], tuned.transformer.config.num_layers)
    return {
        f"{2 * STEPS} evaluations, all tiles": [
            base.generate(text, steps=STEPS, seed=seed).frames for text, seed in PROMPTS.items()
        ],
        f"{request.steps} evaluations, {share:.0%} of tiles": [
            tuned.generate(text, plan=plan, seed=seed).frames for text, seed in PROMPTS.items()
        ],
    }


def row_label(text: str, length: int) -> Image.Image:
    """Text that reads upwards, for the left edge."""
    label = Image.new("RGB", (length, SIDE), PAPER)
    ImageDraw.Draw(label).text((length / 2, SIDE / 2), text, font=ImageFont.load_default(14), fill=INK, anchor="mm")
    return label.rotate(90, expand=True)


def frame(clips: dict[str, list[np.ndarray]], number: int) -> Image.Image:
    """One picture of all clips, with what they are called and what was asked for."""
    cell = next(iter(clips.values()))[0].shape[1] * SCALE
    width, height = SIDE + len(PROMPTS) * (cell + GAP), HEAD + len(clips) * (cell + GAP) + FOOT
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for y, (label, row) in enumerate(clips.items()):
        top = HEAD + y * (cell + GAP)
        page.paste(row_label(label, cell), (0, top))
        for x, clip in enumerate(row):
            picture = Image.fromarray(clip[number]).resize((cell, cell), Image.Resampling.NEAREST)
            page.paste(picture, (SIDE + x * (cell + GAP), top))
    for x, text in enumerate(PROMPTS):
        middle = SIDE + x * (cell + GAP) + cell / 2, height - FOOT / 2 - GAP / 2
        draw.text(
            middle, textwrap.fill(text, 30), font=ImageFont.load_default(13), fill=PALE, anchor="mm", align="center"
        )
    return page


def main() -> None:
    clips = sample()
    pages = [frame(clips, i) for i in range(len(next(iter(clips.values()))[0]))]
    times = [MILLISECONDS] * (len(pages) - 1) + [PAUSE]
    pages[0].save(TARGET, save_all=True, append_images=pages[1:], duration=times, loop=0, quality=80, method=6)
    print(f"{TARGET.relative_to(ROOT)}: {pages[0].size}, {TARGET.stat().st_size} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
