"""Why an attention call stays dense, by name. Reports count by these texts, and users read them as they are."""

from __future__ import annotations

NO_GRID = "no token grid"
CROSS_ATTENTION = "cross-attention"
ALONE = "text or audio alone"
ANOTHER_LENGTH = "another sequence length"
# Not self-attention over the video, so no plan could make it sparse.
NOT_OVER_THE_VIDEO = (CROSS_ATTENTION, ANOTHER_LENGTH, NO_GRID, ALONE)

AS_LONG_AS_THE_VIDEO = "text or audio as long as the video"
OUTSIDE_THE_WINDOW = "outside the step window"
NO_STEP_NUMBERS = "steps are not numbered"
MASKED = "masked"
SINGLE_FRAME = "a single frame"
BEYOND_THE_LAYERS = "more calls than layers"
BELOW_MIN_TOKENS = "below min_tokens"
FULL = "full in the plan"
TOO_FEW_FRAMES = "too few frames to pay"
TOO_DENSE = "too dense to pay"
RENEWED_TOO_OFTEN = "too dense to pay with a residual"
MEASURED_FASTER = "measured faster"
OWN_SCALE = "a scale of its own"

# What a user can do about a reason, where its name does not tell.
ADVICE = {
    MASKED: "a mask lies over the attention. An LTX guide of another strength than 1 makes one: set its strength to 1, or "
    "place the picture in the latents with LTXVImgToVideoInplace",
}

# Of diffusers' transformers alone.
DROPOUT_OR_OWN_SCALE = "dropout or a scale of its own"
SHARDED_BY_DIFFUSERS = "sharded by diffusers"
NO_SDPA = "no call of scaled_dot_product_attention"
REPLACED = "another attention processor"
