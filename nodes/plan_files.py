"""Plans as files in models/evdit_plans, and as a line of text."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..efficient_vdit_core.limits.quote import quoted
from ..efficient_vdit_core.plan import TilePlan
from ..efficient_vdit_core.plan.text import MAX_LAYERS
from .checked import checked
from .comfy_bridge.distilled import LOADED_MODEL, carried_plan
from .comfy_bridge.paths import checkpoint_files, load_plan, plan_changed, plan_names, plan_paths, save_plan
from .inputs import CATEGORY, SPEED_WORDS, Plan, for_page, plan_is_told_again, plan_ui, search_words

MOST_DRAWN = 2**17  # bytes of a file; a plan of 64 layers in ten groups of heads each has half of it
PATIENCE = 0.5  # seconds for files that are new, in which the server answers nobody


@lru_cache(maxsize=1024)
def text_form(path: Path, _changed: float) -> str | None:
    """The plan of a file as text, read anew once the file has changed; None where the page could not read it."""
    text = TilePlan.load(path).to_text()
    return text if len(text.split()) <= MAX_LAYERS else None


def text_forms() -> dict[str, str | None]:
    """The plans of the list by name, which the page's chart draws without a run. A file without a plan is left to its run, and
    None stands for what would take long to tell: a large file, and what is left when the time is up, until the page asks anew.
    """
    found: dict[str, str | None] = {}
    end = time.monotonic() + PATIENCE
    for name, path in plan_paths().items():
        try:
            about = path.stat()
            told = about.st_size <= MOST_DRAWN and time.monotonic() < end
            found[name] = text_form(path, about.st_mtime) if told else None
        except (OSError, ValueError):
            continue
    return found


def plan_choices() -> list[str]:
    return [*plan_names(), *checkpoint_files(), LOADED_MODEL]


class EVDiTSaveTilePlan(io.ComfyNode):
    """Writes a plan as JSON."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTSaveTilePlan",
            display_name="Save Tile Plan",
            category=CATEGORY,
            **search_words("sparse", "export plan"),
            description="Saves a plan in models/evdit_plans, with where it came from. Never overwrites: names are numbered.",
            inputs=[
                Plan.Input("plan", tooltip="The plan to save, most useful from Search Tile Plan."),
                io.String.Input(
                    "filename_prefix",
                    default="plan",
                    tooltip=(
                        "Beginning of the file's name, up to 100 letters, digits, spaces, dots, dashes and underscores; no folders. "
                        '"wan_480p" becomes wan_480p_00001.json, then wan_480p_00002.json.'
                    ),
                ),
            ],
            outputs=[
                io.String.Output(
                    "filename",
                    display_name="filename",
                    tooltip="The name of the saved file in models/evdit_plans, as Load Tile Plan lists it.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, plan: TilePlan, filename_prefix: str) -> io.NodeOutput:
        name = save_plan(plan, filename_prefix)
        return io.NodeOutput(name, ui=ui.PreviewText(f"{name}\n{plan.to_text()}"))


class EVDiTLoadTilePlan(io.ComfyNode):
    """Reads a saved plan, a preset, or a line of text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTLoadTilePlan",
            display_name="Load Tile Plan",
            category=CATEGORY,
            **search_words(*SPEED_WORDS, "preset", "wan faster"),
            **plan_is_told_again(),
            description=(
                "Loads a plan from models/evdit_plans, a preset for a model family (careful values chosen by hand, not "
                "searched), the plan that a distilled model or LoRA carries, or a line of text. Sparse Attention checks that "
                "it fits the model."
            ),
            inputs=[
                for_page(
                    io.Combo.Input(
                        "plan_name",
                        options=plan_choices(),
                        tooltip=(
                            'A file of models/evdit_plans, or a "(preset)": a few reference frames in all layers but the first two '
                            "and the last, about half of the attention (MiniMax-H3's and those with _means "
                            "less). minimax_h3 is the mild one for turbo LoRAs, minimax_h3_strong is for weights distilled under it. One "
                            "with _means sees means over time of what it leaves out. Models and LoRAs that were distilled "
                            "under a plan carry it: choose the file that you load, or 'the loaded model' with the model connected. "
                            "Press R to see new files."
                        ),
                    ),
                    evdit_plans=text_forms(),
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip=(
                        'A plan as text, used in place of the file: "0:full 1-4:2:6 5-31:1:7" gives layer 0 full attention, layers 1 '
                        'to 4 two reference frames of 8; "all:2 -1:full" fits any depth. Empty = the file.'
                    ),
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip=(
                        "For 'the loaded model': its plan is taken from the file that it was loaded from. Unused otherwise. A LoRA's "
                        "plan is in the LoRA's file: choose that."
                    ),
                ),
            ],
            outputs=[
                Plan.Output(
                    "plan",
                    display_name="plan",
                    tooltip=(
                        "The plan, a pattern k:T-k~w+m (in latent frames) for each layer or each group of its heads. Connect it to Sparse "
                        "Attention."
                    ),
                ),
                io.String.Output(
                    "text_form",
                    display_name="text",
                    tooltip="The plan as one line to share. It holds the patterns, not the model family.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, plan_name: str | None = None, text: str | None = "") -> bool | str:
        """In place of ComfyUI's own check of the list: with a text the file is not read. What a link gives is None here."""
        if plan_name is None or text is None or text.strip() or plan_name in plan_choices():
            return True
        return f"{quoted(plan_name)} is not in the list. Choose another, press R where it is new, or give its plan as text."

    @classmethod
    def fingerprint_inputs(
        cls, plan_name: str | None = None, text: str | None = "", model: Any = None
    ) -> tuple[str | None, float]:
        """Runs again after the file has changed. What a link gives is None here, and ComfyUI compares it by itself."""
        if plan_name in (None, LOADED_MODEL) or (text or "").strip():
            return text, 0.0
        try:
            return text, plan_changed(plan_name)
        except (OSError, ValueError):
            # Gone, which a linked text allows; an error here would have ComfyUI sample anew in each run.
            return text, 0.0

    @classmethod
    @checked
    def execute(cls, plan_name: str, text: str = "", model: Any = None) -> io.NodeOutput:
        if text.strip():
            plan = TilePlan.from_text(text)
        else:
            plan = carried_plan(model) if plan_name == LOADED_MODEL else load_plan(plan_name)
        return io.NodeOutput(plan, plan.to_text(), ui=plan_ui(plan))
