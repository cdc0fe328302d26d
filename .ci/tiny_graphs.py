"""The templates of the tiny built-in model, as nodes and links: they run anywhere, with no download."""

from __future__ import annotations

from collections.abc import Iterator

from graph import Graph, Node, prompts, share, video

from efficient_vdit_core import assets
from efficient_vdit_core.models.distilled import read_metadata

TINY, FEW_STEPS, FEW_STEPS_SPARSE, *_ = (f"{name.replace('-', ' ')} (built in)" for name in assets.TINY_MODELS)

# What none of the templates may leave open, since all of them compare.
TOO_SMALL = """**This model is too small to get faster**: attention is hardly a part of its step. It shows what changes in the \
picture, not the speed; for that take the templates from 07 on."""

TINY_NOTE = f"""## Tiny text to video

Makes 29 frames of 64x64 coloured shapes from a sentence, with sparse attention, on a CPU. All weights ship with the pack; nothing is \
downloaded. Needs ComfyUI 0.3.60 or newer.

{TOO_SMALL}

**Prompt**: a shape (circle, square, triangle ...), a colour, a direction, a speed and a background, such as
*a red circle moving right fast on a white background*.

**Tile Plan**: `reference_frames` k. Each of the 8 latent frames attends to itself and to k reference frames. The chart shows which share \
each layer computes: click a layer to change it. Bypass *Sparse Attention* (Ctrl+B) to compare with full attention. After the run the \
chart and the log tell how many attention calls became sparse.

**Consistency Sigmas**: the tiny model is not distilled, so `segments` equals `steps`. A model distilled for 4 segments takes 4 and 4, \
and cfg 1."""


COMPARE_NOTE = f"""## Dense beside sparse, on the tiny model

Samples the same prompt and noise twice, with full attention and with the plan, and compares the two videos frame by frame. All weights \
ship with the pack; about a minute on a CPU. Needs ComfyUI 0.3.60 or newer.

{TOO_SMALL}

**Read the picture**: both videos, their difference (brightened), PSNR over time. *What became sparse* tells how many calls followed the \
plan and why others did not.

**Try**: fewer reference frames in *Tile Plan*, or layers 0 and -1 kept full with the line `all:1 0:full -1:full`."""

SEARCH_NOTE = f"""## Search a plan and keep it

On the tiny model: it runs with full attention at three noise levels, tries few or many reference frames, with and without neighbours \
(`1~1`: up to 1 frame away) and the mean of the frames left out (`1+1`), on every head of every layer, and takes the cheapest patterns \
whose error stays under the threshold. With `head_groups` 1 and `candidates` 1,2,4 it is the layer-wise search of the paper. All weights \
ship with the pack; under a minute on a CPU. Needs ComfyUI 0.3.60 or newer.

{TOO_SMALL}

**The plan** is drawn in the node after the run and saved in `models/evdit_plans`. Search once, then put *Load Tile Plan* in the search's \
place: every change of the prompt, a LoRA or the size searches again, and gives another plan. *Errors of each layer* is the table \
behind the choice; set the threshold between the layers that are to stay full and the others, or give a target speed-up.

**With your own model**: replace the three loaders, and set the size of the latent to what you will sample."""

MAP_NOTE = """## Where the attention goes

The paper's Figure 1, on the tiny model: for each layer the share of its attention that a latent frame gives to each other one. A strong \
diagonal means that frames attend mostly to themselves, and then few reference frames are enough. Tiles that the plan leaves out are \
hatched. The second prompt shows how much of the pattern is the model's own. All weights ship with the pack; seconds on a CPU. Needs \
ComfyUI 0.3.60 or newer.

**With your own model**: replace the two loaders, set the latent's size, and name the layers, such as `0,10,20,-1`."""

TOUR_NOTE = """## The three stages, side by side

What Efficient-vDiT does to a model, on the tiny one: the same prompt and noise three times, in one video. All weights ship with the pack; \
about half a minute on a CPU. Needs ComfyUI 0.3.60 or newer.

1. **Left: the base**, full attention, 50 steps with guidance: 100 evaluations.
2. **Middle: few steps** (stage 1, consistency distillation): {steps} steps without guidance, {steps} evaluations. *Consistency Sigmas* \
reads the number from the file.
3. **Right: few steps and few tiles**: the plan that the search by head found on the middle model (stage 2), with neighbours and mean \
frames, and weights restored under it (stage 3, knowledge distillation): {steps} evaluations with {share}.

**Expect** the same scene three times, of much the same quality; sizes and paths may differ a little. README has the table over many \
clips. At this size attention is a small part of a step, so the fewer steps show in the time and the plan hardly does: on a video of \
720p it does.

**Try**: bypass *Sparse Attention* (Ctrl+B), or click a layer in *Tile Plan*: weights that were distilled for one plan lose under another. \
The recipe is `evdit recipe three-stage`."""


COMPARE_COLUMNS = ("1 Model", "2 Sparse attention and prompt", "3 Steps and noise", "4 Sampling", "5 Result")
SEARCH_COLUMNS = ("1 Model and prompt", "2 Search", "3 Sampling and map", "4 Video", "5 What was found")
MAP_COLUMNS = ("1 Model", "2 Plan and prompts", "3 Measure", "4 Result")

# model, size, gain
APP_NOTE = f"""## Before and after, as an app

Opens in App Mode: type a prompt, choose how many reference frames stay (fewer is faster and changes more) and how long the clip is, and \
run. The same noise gives the video twice, side by side: full attention left, sparse attention right. All weights ship with the pack; \
seconds on a CPU. Needs ComfyUI 0.25.0 or newer.

{TOO_SMALL}

**A slider** stands at the end, in Nodes 2.0 (the classic canvas has none): leave App Mode and move the mouse over *Dense | sparse*. Full \
attention is left of the line, sparse right; the arrows choose the frame of each.

**With your own model**: leave App Mode, replace the loaders, and set the size of the latent."""

TINY_CAPTION = ("Tiny text to video", "29 frames, 64x64, no download", "53% of the attention, on a CPU")
COMPARE_CAPTION = ("Dense beside sparse", "29 frames, 64x64, no download", "the same noise twice, compared")
TOUR_CAPTION = ("Three stages", "29 frames, 64x64, no download", "100 evaluations, then 8 and 8")
SEARCH_CAPTION = ("Search a plan", "for your model, head by head", "the sparsest below an error")
APP_CAPTION = ("Before and after", "an app: prompt, strength, length", "dense left, sparse right")
MAP_CAPTION = ("Where attention goes", "frame by frame, in each layer", "what a plan keeps of it")

TINY_SENTENCE, SEED = "a blue square moving down slowly on a black background", 2  # clean in every template


def tiny_parts(plan: dict[str, Node]) -> dict[str, Node]:
    """Loaders, plan, prompt and size of the built-in model."""
    return {
        "model": Node("EVDiTModelLoader", 0, {"model_name": TINY}),
        "clip": Node("EVDiTTextEncoderLoader", 0, {"text_encoder_name": TINY}),
        "vae": Node("EVDiTVAELoader", 3, {"vae_name": TINY}),
        **plan,
        **prompts("clip", TINY_SENTENCE, ""),
        "latent": Node("EmptyHunyuanLatentVideo", 2, {"width": 64, "height": 64, "length": 29}),
    }


def tiny_sampling(source: str, suffix: str = "", title: str = "", column: int = 2) -> dict[str, Node]:
    """50 steps with guidance; ``suffix`` tells two of them apart, noise, levels and sampler are shared."""
    shared = {
        "noise": Node("RandomNoise", 2, {"noise_seed": SEED}),
        "sigmas": Node("EVDiTConsistencySigmas", 2, {"segments": 50, "steps": 50}, {"model": (source, 0)}),
        "consistency": Node("EVDiTConsistencySampler", 2),
    }
    links = {"model": (source, 0), "positive": ("positive", 0), "negative": ("negative", 0)}
    return ({} if suffix else shared) | {
        f"guider{suffix}": Node("CFGGuider", 2, {"cfg": 3.0}, links, f"CFGGuider, {title}" if title else ""),
        f"sampler{suffix}": Node(
            "SamplerCustomAdvanced", column, {},
            {
                "noise": ("noise", 0), "guider": (f"guider{suffix}", 0), "sampler": ("consistency", 0), "sigmas": ("sigmas", 0),
                "latent_image": ("latent", 0),
            },
            f"Sampler, {title}" if title else "",
        ),
    }  # fmt: skip


TINY_PLAN = {
    "plan": Node("EVDiTTilePlan", 1, {"reference_frames": 2}, preview=(8, 6)),
    "sparse": Node("EVDiTSparseAttention", 1, {}, {"model": ("model", 0), "plan": ("plan", 0)}),
}


def tiny() -> Graph:
    nodes = tiny_parts(TINY_PLAN) | tiny_sampling("sparse") | video(("sampler", 0), ("vae", 0), 12)
    return Graph("tiny_text_to_video", "Tiny text to video, no download", TINY_CAPTION, TINY_NOTE, nodes)


def tiny_compare() -> Graph:
    nodes = tiny_parts(TINY_PLAN) | tiny_sampling("sparse", title="sparse", column=3)
    nodes |= tiny_sampling("model", "_dense", "dense", column=3)
    nodes |= {
        "decode": Node("VAEDecode", 3, {}, {"samples": ("sampler", 0), "vae": ("vae", 0)}, "Decode, sparse"),
        "decode_dense": Node("VAEDecode", 3, {}, {"samples": ("sampler_dense", 0), "vae": ("vae", 0)}, "Decode, dense"),
        "compare": Node("EVDiTCompareVideos", 3, {}, {"video_a": ("decode_dense", 0), "video_b": ("decode", 0)}),
        "picture": Node("PreviewImage", 4, {}, {"images": ("compare", 0)}),
        "table": Node("PreviewAny", 4, {}, {"source": ("compare", 1)}, "Numbers"),
        "report": Node("EVDiTReport", 3, {}, {"model": ("sparse", 0), "after": ("sampler", 0)}),
        "calls": Node("PreviewAny", 4, {}, {"source": ("report", 0)}, "What became sparse"),
    }
    return Graph(
        "tiny_dense_beside_sparse", "Tiny, dense beside sparse", COMPARE_CAPTION, COMPARE_NOTE, nodes, COMPARE_COLUMNS
    )


def tiny_search() -> Graph:
    measured = {"model": ("model", 0), "positive": ("positive", 0), "latent": ("latent", 0)}
    plan = {
        "search": Node(
            "EVDiTSearchTilePlan",
            1,
            {"threshold": 0.1, "seed": 0, "candidates": "0,1,2,0~1,1~1,0+1,1+1,0~1+1,1~1+1", "head_groups": 3},
            measured,
        ),
        "sparse": Node("EVDiTSparseAttention", 1, {}, {"model": ("model", 0), "plan": ("search", 0)}),
    }
    nodes = tiny_parts(plan) | tiny_sampling("sparse") | video(("sampler", 0), ("vae", 0), 12)
    for name in ("positive", "negative", "latent"):
        nodes[name].column = 0
    nodes |= {
        "keep": Node("EVDiTSaveTilePlan", 4, {"filename_prefix": "tiny"}, {"plan": ("search", 0)}),
        "errors": Node("PreviewAny", 4, {}, {"source": ("search", 1)}, "Errors of each layer"),
        "map": Node("EVDiTAttentionTileMap", 2, {"layers": "0,2,5", "seed": 0}, {**measured, "plan": ("search", 0)}),
        "picture": Node("PreviewImage", 4, {}, {"images": ("map", 0)}, "What the plan keeps"),
    }
    return Graph("tiny_search_a_plan", "Tiny, search a plan", SEARCH_CAPTION, SEARCH_NOTE, nodes, SEARCH_COLUMNS)


def tiny_tour() -> Graph:
    """Base, few steps, few steps under the searched plan: one noise, one video."""
    about = read_metadata(assets.tiny_path("transformer", "tiny-8-steps-sparse"))
    assert about is not None and about.tile_plan is not None
    plan = about.tile_plan.to_text()
    nodes = tiny_parts({
        "few": Node("EVDiTModelLoader", 0, {"model_name": FEW_STEPS}, title="Few steps"),
        "tuned": Node("EVDiTModelLoader", 0, {"model_name": FEW_STEPS_SPARSE}, title="Few steps, for the plan"),
        "plan": Node("EVDiTTilePlan", 1, {"text": plan}, preview=(8, 6), extra=68),
        "sparse": Node("EVDiTSparseAttention", 1, {}, {"model": ("tuned", 0), "plan": ("plan", 0)}),
    })  # fmt: skip
    nodes |= tiny_sampling("model", title="base", column=3)
    nodes["sigmas"].column = 1
    for name in ("positive", "negative"):
        nodes[name].column = 0
    nodes["levels"] = Node(
        "EVDiTConsistencySigmas", 2, {"preset": "from checkpoint"}, {"model": ("few", 0)}, "Sigmas, few steps"
    )
    for suffix, source, title in (("_few", "few", "few steps"), ("_sparse", "sparse", "few steps, sparse")):
        nodes |= tiny_sampling(source, suffix, title, column=3)
        nodes[f"guider{suffix}"].values["cfg"] = 1.0
        nodes[f"sampler{suffix}"].links["sigmas"] = ("levels", 0)
    for suffix in ("", "_few", "_sparse"):
        nodes[f"decode{suffix}"] = Node("VAEDecode", 3, {}, {"samples": (f"sampler{suffix}", 0), "vae": ("vae", 0)})
    gap = {"direction": "right", "match_image_size": True, "spacing_width": 4, "spacing_color": "white"}
    nodes |= {
        "two": Node("ImageStitch", 4, gap, {"image1": ("decode", 0), "image2": ("decode_few", 0)}),
        "three": Node("ImageStitch", 4, gap, {"image1": ("two", 0), "image2": ("decode_sparse", 0)}),
        "create": Node("CreateVideo", 4, {"fps": 12}, {"images": ("three", 0)}),
        "save": Node(
            "SaveVideo", 4, {"filename_prefix": "video/EfficientvDiT", "format": "mp4"}, {"video": ("create", 0)}
        ),
        "report": Node("EVDiTReport", 3, {}, {"model": ("sparse", 0), "after": ("sampler_sparse", 0)}),
        "calls": Node("PreviewAny", 4, {}, {"source": ("report", 0)}, "What became sparse"),
    }
    note = TOUR_NOTE.format(steps=about.steps, share=share(plan, 8, 6))
    return Graph("tiny_three_stages", "Tiny, distilled in three stages", TOUR_CAPTION, note, nodes, COMPARE_COLUMNS)


def tiny_app() -> Graph:
    """The few-step model with and without the plan, side by side."""
    nodes = tiny_parts({
        "plan": Node("EVDiTTilePlan", 1, {"reference_frames": 2}, preview=(8, 6)),
        "sparse": Node("EVDiTSparseAttention", 1, {}, {"model": ("model", 0), "plan": ("plan", 0)}),
    })  # fmt: skip
    nodes["model"].values["model_name"] = FEW_STEPS
    nodes |= tiny_sampling("sparse", title="sparse", column=3) | tiny_sampling("model", "_dense", "dense", column=3)
    nodes["sigmas"].values = {"preset": "from checkpoint"}
    nodes["sigmas"].links = {"model": ("model", 0)}
    for suffix in ("", "_dense"):
        nodes[f"guider{suffix}"].values["cfg"] = 1.0
        nodes[f"decode{suffix}"] = Node("VAEDecode", 3, {}, {"samples": (f"sampler{suffix}", 0), "vae": ("vae", 0)})
    gap = {"direction": "right", "match_image_size": True, "spacing_width": 4, "spacing_color": "white"}
    nodes |= {
        "both": Node("ImageStitch", 4, gap, {"image1": ("decode_dense", 0), "image2": ("decode", 0)}),
        "create": Node("CreateVideo", 4, {"fps": 12}, {"images": ("both", 0)}),
        "save": Node(
            "SaveVideo", 4, {"filename_prefix": "video/EfficientvDiT", "format": "mp4"}, {"video": ("create", 0)}
        ),
        "slider": Node("ImageCompare", 4, {}, {"image_a": ("decode_dense", 0), "image_b": ("decode", 0)}, "Dense | sparse"),
    }  # fmt: skip
    inputs = (
        ("positive", "text", "prompt"),
        ("plan", "reference_frames", "reference frames (fewer = faster, changes more)"),
        ("latent", "length", "frames"),
    )
    return Graph("tiny_app", "Tiny, before and after", APP_CAPTION, APP_NOTE, nodes, COMPARE_COLUMNS, inputs)


def tiny_map() -> Graph:
    measured = {"model": ("model", 0), "positive": ("positive", 0), "latent": ("latent", 0)}
    nodes = tiny_parts({"plan": TINY_PLAN["plan"]})
    del nodes["vae"], nodes["negative"]
    nodes |= {
        "second": Node("CLIPTextEncode", 1, {"text": "a red circle moving right fast on a white background"}, {"clip": ("clip", 0)},
                       "Second prompt"),
        "map": Node("EVDiTAttentionTileMap", 2, {"layers": "0-5", "seed": 0},
                    {**measured, "plan": ("plan", 0), "second_prompt": ("second", 0)}),
        "picture": Node("PreviewImage", 3, {}, {"images": ("map", 0)}),
        "numbers": Node("PreviewAny", 3, {}, {"source": ("map", 1)}, "Shares and overlaps"),
    }  # fmt: skip
    return Graph("tiny_attention_tile_map", "Tiny, where attention goes", MAP_CAPTION, MAP_NOTE, nodes, MAP_COLUMNS)


def tiny_graphs() -> Iterator[Graph]:
    yield from (tiny(), tiny_app(), tiny_compare(), tiny_tour(), tiny_search(), tiny_map())
