"""Shows where a model's attention goes."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..efficient_vdit_core.plan import TilePlan
from ..efficient_vdit_core.search.tile_map import check_panels, tile_map
from ..efficient_vdit_core.search.tile_mass import choose_layers
from .checked import checked
from .comfy_bridge.probe import measure_tiles, model_depth
from .inputs import CATEGORY, SEED_STAYS, Plan, advanced_inputs, search_words

MAX_MAPS = 12  # layers


class EVDiTAttentionTileMap(io.ComfyNode):
    """The paper's Figure 1 on the user's own model."""

    @classmethod
    @advanced_inputs("rows")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTAttentionTileMap",
            display_name="Attention Tile Map",
            category=CATEGORY,
            **search_words("attention map", "heat map", "visualize attention", "sparse"),
            description=(
                "Measures which share of its attention each latent frame gives to each other one, in chosen layers of the dense "
                "model, and draws it: a strong diagonal means that frames attend mostly to themselves. With a plan, the tiles it "
                "leaves out are hatched, and the share of those it keeps is given."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The video model to look at. It is not changed; sparse attention on it is ignored."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip=(
                        "The prompt under which the model runs, without guidance. Of several, joined with Conditioning (Combine), the "
                        "map is the mean."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "Gives the size: width, height and frames. Its content is used only where it carries a noise mask (LTX image to "
                        "video)."
                    ),
                ),
                io.String.Input(
                    "layers",
                    default="0,-1",
                    tooltip=f'Layers to draw, counted from 0, negative from the end: "0-2,-1". At most {MAX_MAPS}, a panel each.',
                ),
                io.Float.Input(
                    "percent",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=(
                        "Where in the denoising to look, as a fraction 0 to 1 of the noise schedule: 0 = pure noise, where it is "
                        "fastest; 1 = the last step. The model walks there in up to 10 dense steps."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=SEED_STAYS,
                    tooltip="Seed of the starting noise, 0 to 2^64 - 1. The same seed gives the same map.",
                ),
                io.Int.Input(
                    "rows",
                    default=64,
                    min=1,
                    max=4096,
                    tooltip=(
                        "Query tokens measured in each latent frame, 1 to 4096, evenly spread over it and at most all. More is more "
                        "exact and slower."
                    ),
                ),
                Plan.Input(
                    "plan",
                    optional=True,
                    tooltip=(
                        "Hatches the tiles that the plan leaves out; gives the share of those it keeps. Where heads of a layer "
                        "differ, each group of them has a panel of its own."
                    ),
                ),
                io.Conditioning.Input(
                    "second_prompt",
                    optional=True,
                    tooltip=(
                        "Measured as well, at twice the time: how far the two prompts' most important positions, those that hold 90, "
                        "95 and 99 % of the attention, overlap (0 to 100 %)."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    "map",
                    display_name="map",
                    tooltip=(
                        "A heat map for each layer and group of heads: a row is a query frame, a column a key frame, colour the share "
                        "in percent."
                    ),
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The numbers as text: shares of the own and of other frames, of text, of the plan's tiles, and overlaps.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, model: Any, positive: Any, latent: dict[str, Any], layers: str, percent: float, seed: int, rows: int,
        plan: TilePlan | None = None, second_prompt: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        depth = model_depth(model, plan)  # what cannot be drawn is refused before the model runs
        chosen = choose_layers(layers, depth, MAX_MAPS)
        check_panels(chosen, depth, plan)
        choices = {"layers": chosen, "percent": percent, "seed": seed, "rows": rows}
        measured = measure_tiles(model, positive, latent, **choices)
        other = measure_tiles(model, second_prompt, latent, **choices) if second_prompt is not None else None
        picture, report = tile_map(measured, depth, plan, other)
        return io.NodeOutput(torch.from_numpy(picture)[None], report)
