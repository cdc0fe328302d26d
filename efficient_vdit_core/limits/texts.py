"""Prompts as they reach the text encoder: well-formed, and no longer than a model can read."""

from __future__ import annotations

import logging

log = logging.getLogger("efficient_vdit")

# The encoder reads 512 tokens, and a token has at most 16 characters.
MAX_PROMPT = 512 * 16


def checked_prompt(text: str) -> str:
    """``text``, cut at ``MAX_PROMPT`` characters with a warning, since no model reads beyond.

    Raises ValueError where it holds half a surrogate pair, which stands for no character.
    """
    if len(text) > MAX_PROMPT:
        log.warning("The prompt has %d characters; all after the first %d are cut off.", len(text), MAX_PROMPT)
        text = text[:MAX_PROMPT]
    half = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if half is not None:
        raise ValueError(
            f"The prompt holds half a surrogate pair (U+{ord(text[half]):X}) at character {half + 1}, which stands for no "
            "character. Delete it, or type the text again."
        )
    return text
