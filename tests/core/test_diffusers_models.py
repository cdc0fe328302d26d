"""Tile plans in diffusers' own transformers, each built tiny with random weights, against an explicit mask."""

import copy
import gc
import inspect
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from efficient_vdit_core.assets import preset_path
from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.hook.prepare import Preparation
from efficient_vdit_core.attention.hook.state import ForwardState
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.diffusers_models import apply_to_diffusers, remove_from_diffusers
from efficient_vdit_core.diffusers_models.families import FAMILIES, SequenceLayout
from efficient_vdit_core.diffusers_models.processor import tiled
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.tiles import TilePattern, TokenGrid

diffusers = pytest.importorskip("diffusers")

TEXT = 7
FRAMES, HEIGHT, WIDTH = 5, 3, 2  # of the token grid, none of them alike
TOKENS = FRAMES * HEIGHT * WIDTH
HEADS = 2


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cogvideox(batch, **config):
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=3,
        sample_width=WIDTH * 2,
        sample_height=HEIGHT * 2,
        sample_frames=FRAMES * 4 - 3,
        patch_size=2,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
        **config,
    )
    frames = FRAMES * (config.get("patch_size_t") or 1)
    angles = rand(TOKENS, 16, seed=5)
    return model, {
        "hidden_states": rand(batch, frames, 4, HEIGHT * 2, WIDTH * 2, seed=1),
        "encoder_hidden_states": rand(batch, TEXT, 12, seed=2),
        "timestep": torch.full((batch,), 500),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def wan(batch):
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
    )
    return model, {
        "hidden_states": rand(batch, 4, FRAMES, HEIGHT * 2, WIDTH * 2, seed=1),
        "encoder_hidden_states": rand(batch, TEXT, 8, seed=2),
        "timestep": torch.full((batch,), 500),
    }


def hunyuan_video(batch, lengths=(4, 6)):
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 6),
        guidance_embeds=False,
    )
    return model, {
        "hidden_states": rand(batch, 4, FRAMES, HEIGHT * 2, WIDTH * 2, seed=1),
        "encoder_hidden_states": rand(batch, TEXT, 8, seed=2),
        "encoder_attention_mask": torch.tensor([[i < n for i in range(TEXT)] for n in lengths[:batch]]).long(),
        "pooled_projections": rand(batch, 8, seed=3),
        "timestep": torch.full((batch,), 500),
    }


def ltx(batch):
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=3,
        caption_channels=8,
    )
    return model, {
        "hidden_states": rand(batch, TOKENS, 4, seed=1),
        "encoder_hidden_states": rand(batch, TEXT, 8, seed=2),
        "encoder_attention_mask": torch.ones(batch, TEXT),
        "timestep": torch.full((batch,), 500),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
    }


def ltx_conditions(batch):
    """As LTXConditionPipeline has it: conditioning frames before the video, and coordinates alone."""
    model, inputs = ltx(batch)
    pipeline = diffusers.LTXConditionPipeline

    def ids(frames, first):
        found = pipeline._prepare_video_ids(batch, frames, HEIGHT, WIDTH)
        return pipeline._scale_video_ids(found, scale_factor=32, scale_factor_t=8, frame_index=first).float()

    coordinates = torch.cat([ids(2, 8), ids(1, 24), ids(FRAMES, 0)], dim=2)
    coordinates[:, 0] /= 25
    for name in ("num_frames", "height", "width"):
        del inputs[name]
    return model, inputs | {
        "hidden_states": rand(batch, coordinates.shape[2], 4, seed=1),
        "timestep": torch.full((batch, coordinates.shape[2]), 500),
        "video_coords": coordinates,
    }


def allegro(batch):
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=24,
        sample_height=HEIGHT * 2,
        sample_width=WIDTH * 2,
        sample_frames=FRAMES,
        caption_channels=8,
    )
    sizes = (FRAMES, HEIGHT, WIDTH)
    grid = torch.cartesian_prod(*map(torch.arange, sizes)).T[:, None]
    angles = [rand(size, 4, seed=5) for size in sizes]
    rope = [(angle.cos(), angle.sin()) for angle in angles]
    return model, {
        "hidden_states": rand(batch, 4, FRAMES, HEIGHT * 2, WIDTH * 2, seed=1),
        "encoder_hidden_states": rand(batch, TEXT, 8, seed=2),
        "timestep": torch.full((batch,), 500),
        "image_rotary_emb": (rope, grid),
    }


WAN = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
}


def wan_inputs(batch):
    return wan(batch)[1]


def skyreels_v2(batch):
    return diffusers.SkyReelsV2Transformer3DModel(**WAN), wan_inputs(batch)


def chronoedit(batch):
    return diffusers.ChronoEditTransformer3DModel(**WAN), wan_inputs(batch)


def wan_vace(batch):
    """Two of three layers have a second stream."""
    model = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0, 2], vace_in_channels=6)
    control = rand(batch, 6, FRAMES, HEIGHT * 2, WIDTH * 2, seed=4)
    return model, wan_inputs(batch) | {"control_hidden_states": control}


def wan_animate(batch):
    model = diffusers.WanAnimateTransformer3DModel(
        **{**WAN, "in_channels": 12},
        latent_channels=4,
        image_dim=8,
        motion_encoder_channel_sizes={str(size): 4 for size in (4, 8, 16)},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=3,
    )
    return model, {
        "hidden_states": rand(batch, 12, FRAMES, HEIGHT * 2, WIDTH * 2, seed=1),
        "encoder_hidden_states": rand(batch, TEXT, 8, seed=2),
        "encoder_hidden_states_image": rand(batch, 3, 8, seed=3),
        "timestep": torch.full((batch,), 500),
        "pose_hidden_states": rand(batch, 4, FRAMES - 1, HEIGHT * 2, WIDTH * 2, seed=4),
        "face_pixel_values": rand(batch, 3, (FRAMES - 1) * 4, 16, 16, seed=5),
    }


def ltx2(batch):
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=3,
        caption_channels=8,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
    )
    return model, {
        "hidden_states": rand(batch, TOKENS, 4, seed=1),
        "audio_hidden_states": rand(batch, 11, 4, seed=4),
        "encoder_hidden_states": rand(batch, TEXT, 8, seed=2),
        "audio_encoder_hidden_states": rand(batch, TEXT, 8, seed=3),
        "timestep": torch.full((batch, TOKENS), 500),
        "audio_timestep": torch.full((batch, 11), 500),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "audio_num_frames": 11,
    }


def ltx2_keyframes(batch):
    """As LTX-2's conditioning pipeline has it: a keyframe behind the video, later than its last latent frame begins."""
    model, inputs = ltx2(batch)
    coordinates = model.rope.prepare_video_coords(batch, FRAMES, HEIGHT, WIDTH, torch.device("cpu"), fps=24.0)
    keyframe = coordinates[:, :, -HEIGHT * WIDTH :].clone()
    keyframe[:, 0] += 7 / 24
    tokens = TOKENS + HEIGHT * WIDTH
    return model, inputs | {
        "hidden_states": rand(batch, tokens, 4, seed=1),
        "timestep": torch.full((batch, tokens), 500),
        "video_coords": torch.cat([coordinates, keyframe], dim=2),
    }


# Text, a keyframe and sound before the video.
H3_BEFORE = [(TEXT, 1), (HEIGHT * WIDTH, 0), (8, 2)]


def minimax_h3(batch):
    model = diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=1,
        ffn_dim=32,
        in_channels=4,
        audio_in_channels=4,
        text_dim=8,
        freq_dim=16,
        time_embed_hidden_dim=24,
        time_embed_dim=12,
        rope_freq_dim=2,
    )
    tags = torch.tensor([tag for count, tag in [*H3_BEFORE, (TOKENS, 0)] for _ in range(count)])
    positions = torch.zeros(len(tags), 3)
    positions[-TOKENS:] = torch.cartesian_prod(*map(torch.arange, (FRAMES, HEIGHT, WIDTH))) * torch.tensor([1.7, 1, 1])
    rows = {kind: (tags == tag).nonzero()[:, 0] for tag, kind in enumerate(("video", "text", "audio"))}
    return model, {
        "hidden_states": rand(batch, len(rows["video"]), 16, seed=1),
        "audio_hidden_states": rand(batch, len(rows["audio"]), 4, seed=4),
        "encoder_hidden_states": rand(batch, TEXT, 8, seed=2),
        "timestep": torch.tensor([0.5, 1.0]),
        "timestep_indices": (torch.arange(len(tags)) < len(tags) - TOKENS).long(),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": rows["video"],
        "audio_indices": rows["audio"],
        "text_indices": rows["text"],
    }


def kandinsky5(batch):
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=8,
        in_text_dim2=6,
        time_dim=16,
        out_visual_dim=4,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 4, 4),
    )
    for parameter in model.parameters():  # its modulation is made of zeros
        torch.nn.init.normal_(parameter, std=0.3)
    return model, {
        "hidden_states": rand(batch, FRAMES, HEIGHT * 2, WIDTH * 2, 4, seed=1),
        "encoder_hidden_states": rand(batch, TEXT, 8, seed=2),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": rand(batch, 6, seed=3),
        "visual_rope_pos": [torch.arange(size) for size in (FRAMES, HEIGHT, WIDTH)],
        "text_rope_pos": torch.arange(TEXT),
    }


def cosmos(batch):
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=12,
        num_layers=3,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(8, 16, 16),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    return model, {
        "hidden_states": rand(batch, 4, FRAMES, HEIGHT * 2, WIDTH * 2, seed=1),
        "encoder_hidden_states": rand(batch, TEXT, 8, seed=2),
        "timestep": torch.full((batch,), 0.5),
    }


BUILD = {
    "cogvideox": cogvideox,
    "wan": wan,
    "wan_vace": wan_vace,
    "wan_animate": wan_animate,
    "skyreels_v2": skyreels_v2,
    "chronoedit": chronoedit,
    "hunyuan_video": hunyuan_video,
    "ltx": ltx,
    "ltx_conditions": ltx_conditions,
    "ltx2": ltx2,
    "ltx2_keyframes": ltx2_keyframes,
    "minimax_h3": minimax_h3,
    "kandinsky5": kandinsky5,
    "cosmos": cosmos,
    "allegro": allegro,
}
PREFIX = {
    "cogvideox": TEXT,
    "ltx_conditions": 3 * HEIGHT * WIDTH,
    "minimax_h3": sum(count for count, _ in H3_BEFORE),
}
SUFFIX = {"hunyuan_video": TEXT, "ltx2_keyframes": HEIGHT * WIDTH}
CALLS = {"wan_vace": 5}  # three layers, two of them with a second stream


def calls_of(family):
    return CALLS.get(family, 3)


def build(family, batch=2, **config):
    torch.manual_seed(0)
    model, inputs = BUILD[family](batch, **config)
    return model.eval(), inputs


def run(model, inputs):
    return model(**inputs, return_dict=False)[0]


@pytest.fixture
def masked(monkeypatch):
    """masked(family, model, inputs, references): the same model with an N x N mask on the scores of its video
    attention, in float64."""

    def masked_run(family, model, inputs, references):
        owner = (
            [-1] * PREFIX.get(family, 0)
            + [f for f in range(FRAMES) for _ in range(HEIGHT * WIDTH)]
            + [-1] * SUFFIX.get(family, 0)
        )
        frame, sees_all = torch.tensor(owner), torch.tensor([o in (-1, *references) for o in owner])
        live = (frame[:, None] == frame) | sees_all[:, None] | sees_all
        plain, seen = F.scaled_dot_product_attention, []

        def attention(query, key, value, attn_mask=None, **options):
            if not query.shape[2] == key.shape[2] == len(owner):
                return plain(query, key, value, attn_mask=attn_mask, **options)
            seen.append(query.shape)
            scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
            scores = scores.masked_fill(~(live & attn_mask if attn_mask is not None else live), float("-inf"))
            return (scores.softmax(-1) @ value.double()).to(query.dtype)

        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", attention)
            out = run(model, inputs)
        assert len(seen) == calls_of(family)
        return out

    return masked_run


@pytest.mark.parametrize("k, references, batch", [(1, [0], 2), (2, [0, 3], 1), (0, [], 2)])
@pytest.mark.parametrize("family", BUILD)
def test_the_plan_is_the_explicit_mask(family, k, references, batch, masked):
    model, inputs = build(family, batch)
    with torch.no_grad():
        want = masked(family, model, inputs, references)
        with apply_to_diffusers(model, TilePlan.uniform(k)) as handle:
            torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=2e-5)
        assert handle.report.sparse == calls_of(family) and not handle.report.dense
        assert (
            run(model, inputs) - want
        ).abs().max() > 1e-4  # the plan makes a difference that the comparison would see


@pytest.mark.parametrize("family", BUILD)
def test_all_frames_as_reference_frames_is_dense(family):
    model, inputs = build(family)
    with torch.no_grad():
        want = run(model, inputs)
        with apply_to_diffusers(model, f"all:{FRAMES}") as handle:
            torch.testing.assert_close(run(model, inputs), want, atol=1e-5, rtol=1e-5)
    assert dict(handle.report.dense) == {"full in the plan": calls_of(family)}


@pytest.mark.parametrize("family", BUILD)
def test_what_is_removed_leaves_no_trace(family):
    model, inputs = build(family)
    modules = [module for _, module in FAMILIES[type(model).__name__].modules(model)]
    weights, before = (
        copy.deepcopy(model.state_dict()),
        [m.get_processor() for m in model.modules() if hasattr(m, "get_processor")],
    )
    with torch.no_grad():
        want = run(model, inputs)
        handle = apply_to_diffusers(model, TilePlan.uniform(1))
        assert all(a is not b for a, b in zip(before, [m.get_processor() for m in modules], strict=False))
        assert not torch.equal(run(model, inputs), want)
        handle.remove()
        handle.remove()
        assert torch.equal(run(model, inputs), want)
    after = [m.get_processor() for m in model.modules() if hasattr(m, "get_processor")]
    assert all(a is b for a, b in zip(before, after, strict=True)) and not model._forward_pre_hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    gone = weakref.ref(handle)
    del handle
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("family", BUILD)
def test_each_layer_follows_its_own_pattern(family, monkeypatch):
    model, inputs = build(family)
    plan = TilePlan(patterns=(TilePattern(None), TilePattern(1), TilePattern(2)))
    order = []
    with torch.no_grad(), apply_to_diffusers(model, plan) as handle:
        for _, module in FAMILIES[type(model).__name__].modules(model):
            processor = module.get_processor()
            monkeypatch.setattr(processor, "_sparse", lambda *a, s=processor._sparse: (order.append(a[4].k), s(*a))[1])
        run(model, inputs)
    twice = family == "wan_vace"  # the first and the last layer
    assert (handle.report.sparse, dict(handle.report.dense)) == (2 + twice, {"full in the plan": 1 + twice})
    assert sorted(set(order)) == [1, 2] and (twice or order == sorted(order)) and order.count(2) > twice


@pytest.mark.parametrize("family", BUILD)
def test_gradients_are_those_of_the_mask_with_and_without_checkpointing(family, masked):
    model, inputs = build(family)

    def gradient(out):
        model.zero_grad()
        out.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    want = gradient(masked(family, model, inputs, [0]))
    assert want.abs().max() > 0
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        with apply_to_diffusers(model, TilePlan.uniform(1)) as handle:
            torch.testing.assert_close(gradient(run(model, inputs)), want, atol=1e-4, rtol=1e-3)
        assert handle.report.sparse == calls_of(family) * (
            2 if checkpointing else 1
        )  # checkpointing computes each layer again


def test_padding_of_the_text_is_never_attended_to():
    model, inputs = build("hunyuan_video")
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][0, 4:] = 50.0
    with torch.no_grad(), apply_to_diffusers(model, TilePlan.uniform(1)):
        torch.testing.assert_close(run(model, inputs), run(model, other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("live", "text"), [(301, 310), (303, 303)])
@torch.no_grad()
def test_a_mask_in_bf16_counts_long_texts_exactly(live, text):
    """Image-to-video pipelines give the mask in the transformer's dtype; bf16 knows only even numbers above 256."""
    model, inputs = build("hunyuan_video", 1)
    inputs["encoder_hidden_states"] = rand(1, text, 8, seed=2)
    out = []
    for dtype in (torch.int64, torch.bfloat16):
        mask = (torch.arange(text) < live)[None].to(dtype)
        with apply_to_diffusers(model, TilePlan.uniform(1)) as handle:
            out.append(run(model, {**inputs, "encoder_attention_mask": mask}))
        assert handle.report.sparse == 3
    assert torch.equal(*out)


@torch.no_grad()
def test_processors_that_were_replaced_later_are_told_and_counted(caplog):
    model, inputs = build("cogvideox", 1)
    dense = run(model, inputs)
    handle = apply_to_diffusers(model, TilePlan.uniform(1))
    sparse = run(model, inputs)
    model.fuse_qkv_projections()
    for _ in range(2):
        torch.testing.assert_close(run(model, inputs), dense, atol=1e-5, rtol=1e-5)
    assert (handle.report.sparse, dict(handle.report.dense)) == (3, {"another attention processor": 6})
    (record,) = caplog.records
    assert "3 of 3 attention processors" in record.getMessage() and "apply it again" in record.getMessage()
    handle.remove()
    with apply_to_diffusers(model, TilePlan.uniform(1)):
        torch.testing.assert_close(run(model, inputs), sparse, atol=1e-5, rtol=1e-5)
    model.unfuse_qkv_projections()  # which has kept the processors of the removed plan
    torch.testing.assert_close(run(model, inputs), dense, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_plan_of_which_some_processors_were_replaced_goes_on_again_after_remove():
    model, inputs = build("wan", 1)
    before = model.blocks[0].attn1.get_processor()
    handle = apply_to_diffusers(model, TilePlan.uniform(1))
    sparse = run(model, inputs)
    model.blocks[0].attn1.set_processor(before)
    run(model, inputs)
    assert (handle.report.sparse, dict(handle.report.dense)) == (5, {"another attention processor": 1})
    with pytest.raises(ValueError, match=r"has a tile plan already; call remove\(\)"):
        apply_to_diffusers(model, TilePlan.uniform(1))
    handle.remove()
    with apply_to_diffusers(model, TilePlan.uniform(1)) as handle:
        assert torch.equal(run(model, inputs), sparse) and not handle.report.dense


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("ltx", {"num_frames": None, "video_coords": rand(1, 3, TOKENS, seed=1).expand(2, 3, TOKENS)}, "no token grid"),
        ("wan", {"hidden_states": rand(2, 4, 1, 6, 4, seed=1)}, "a single frame"),
        ("allegro", {"attention_mask": torch.ones(2, FRAMES, HEIGHT * 2, WIDTH * 2)}, "masked"),
        (
            "minimax_h3",
            # As many rows at each time as a frame has, and these not one after another.
            {"position_ids": torch.cat([torch.zeros(21, 3), torch.arange(TOKENS)[:, None].expand(-1, 3) % FRAMES])},
            "no token grid",
        ),
        (
            "minimax_h3",
            {"position_ids": torch.cat([torch.zeros(22, 3), torch.arange(1, TOKENS)[:, None].expand(-1, 3) // 8])},
            "no token grid",
        ),
        (
            "ltx",
            {"num_frames": FRAMES - 1, "video_coords": rand(1, 3, TOKENS, seed=1).expand(2, 3, TOKENS)},
            "no token grid",
        ),
        ("ltx", {"num_frames": FRAMES + 1, "video_coords": rand(2, 3, TOKENS, seed=1)}, "another sequence length"),
    ],
)
def test_what_is_not_understood_stays_dense_is_counted_and_said_once(family, change, reason, caplog):
    model, inputs = build(family)
    inputs |= change
    with torch.no_grad():
        want = run(model, inputs)
        with apply_to_diffusers(model, TilePlan.uniform(1)) as handle:
            assert torch.equal(run(model, inputs), want)
    assert dict(handle.report.dense) == {reason: 3} and not handle.report.sparse
    said = [record.getMessage() for record in caplog.records if "is not known" in record.getMessage()]
    assert len(said) == (reason == "no token grid")


@pytest.mark.parametrize(
    ("frames", "overlap", "guides", "earlier", "expected"),
    [
        (7, 0, 0, 0, TokenLayout(TokenGrid(7, 1, 6))),
        (7, 2, 0, 0, TokenLayout(TokenGrid(5, 1, 6), suffix=12)),
        (7, 1, 1, 1, TokenLayout(TokenGrid(4, 1, 6), suffix=18)),
        (6, 3, 0, 0, None),
    ],
)
def test_the_window_of_a_long_clip_begins_with_the_video(frames, overlap, guides, earlier, expected):
    """LTX-Video's pipeline for long clips repeats times at a window's end, and says a size of 1, 1, 1."""
    from diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt import build_video_coords_for_window

    latents = torch.zeros(2, 4, frames, HEIGHT, WIDTH)
    coordinates = build_video_coords_for_window(latents, overlap, guides, earlier, (8, 32, 32), 25)
    given = {"num_frames": 1, "height": 1, "width": 1, "video_coords": coordinates}
    found = FAMILIES["LTXVideoTransformer3DModel"].layout(given, None)
    assert found == (expected and SequenceLayout(frames * HEIGHT * WIDTH, (expected,)))


def test_coordinates_that_differ_within_a_batch_tell_no_layout():
    _, inputs = build("ltx_conditions")
    inputs["video_coords"][1, 0] += 1
    assert FAMILIES["LTXVideoTransformer3DModel"].layout(inputs, None) is None


@pytest.mark.parametrize(
    ("window", "timestep", "sparse"),
    [
        ((0.0, 1.0), 1000, 3),
        ((0.0, 1.0), 0, 3),
        ((0.0, 0.5), 1000, 3),
        ((0.0, 0.5), 501, 3),
        ((0.0, 0.5), 499, 0),
        ((0.5, 1.0), 500, 3),
        ((0.5, 1.0), 501, 0),
        ((0.5, 1.0), 0, 3),
        ((0.2, 0.4), 700, 3),
        ((0.2, 0.4), 900, 0),
        ((0.2, 0.4), 300, 0),
    ],
)
def test_only_steps_in_the_window_are_sparse(window, timestep, sparse):
    model, inputs = build("wan")
    inputs["timestep"] = torch.full((2,), timestep)
    with torch.no_grad(), apply_to_diffusers(model, TilePlan.uniform(1), start=window[0], end=window[1]) as handle:
        run(model, inputs)
    assert handle.report.sparse == sparse
    assert sparse or dict(handle.report.dense) == {"outside the step window": 3}


@torch.no_grad()
def test_a_plan_for_a_longer_clip_keeps_its_stride_and_says_so_once(masked, caplog):
    model, inputs = build("wan")
    want = masked("wan", model, inputs, [0])
    with (
        caplog.at_level("INFO"),
        apply_to_diffusers(model, TilePlan.uniform(9, frames=45)) as handle,
    ):  # every fifth frame
        for _ in range(2):
            torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=2e-5)
    assert handle.report.sparse == 6
    (record,) = [r for r in caplog.records if "the plan" in r.getMessage()]
    assert (
        "made for 45 latent frames and the run has 5" in record.getMessage() and "1 instead of 9" in record.getMessage()
    )


class _NormsAsOnCuda(TorchFunctionMode):
    """There autocast has norms in float32; on a CPU it leaves them alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.float() if func in (F.rms_norm, F.layer_norm) else out


@pytest.mark.parametrize("family", BUILD)
def test_the_autocast_of_a_gpu(family):
    """As a training in bf16 has it: a model's q and k are float32, its v is not."""
    model, inputs = build(family)
    with torch.autocast("cpu", torch.bfloat16), _NormsAsOnCuda():
        dense = run(model, inputs)
        with apply_to_diffusers(model, TilePlan.uniform(2)) as patch:
            sparse = run(model, inputs)
    assert sparse.dtype == dense.dtype and patch.report.sparse == calls_of(family)
    assert torch.isfinite(sparse).all() and not torch.equal(sparse, dense)


@pytest.mark.parametrize("family", ["wan", "wan_vace", "hunyuan_video", "ltx", "ltx2", "minimax_h3", "kandinsky5"])
def test_a_plan_of_the_same_model_in_comfyui_fits(family):
    model, _ = build(family, 1)
    preset = {"ltx": "ltx_video", "ltx2": "ltx_av", "wan_vace": "wan"}.get(family, family)
    apply_to_diffusers(model, TilePlan.load(preset_path(preset))).remove()


@pytest.mark.parametrize(("start", "end", "sparse"), [(0.0, 0.4, 0), (0.0, 0.6, 3), (0.6, 1.0, 0), (0.4, 1.0, 3)])
@pytest.mark.parametrize("family", ["minimax_h3", "cosmos", "ltx2"])
def test_the_window_knows_each_family_s_way_to_say_the_noise_level(family, start, end, sparse):
    """All of them half noise: MiniMax-H3's time runs from 0 (noise) to 1, Cosmos' the other way, LTX-2's to 1000."""
    model, inputs = build(family, 1)
    with torch.no_grad(), apply_to_diffusers(model, TilePlan.uniform(1), start=start, end=end) as handle:
        run(model, inputs)
    assert handle.report.sparse == sparse


def test_a_time_that_does_not_tell_the_noise_level_is_refused():
    """Cosmos 1.0's scheduler gives a quarter of the logarithm: 1.096 for a sigma of 80."""
    model, inputs = build("cosmos", 1)
    early = {**inputs, "timestep": torch.full_like(inputs["timestep"], 1.096)}
    late = {**inputs, "timestep": torch.full_like(inputs["timestep"], -0.33)}
    for given in (early, late):
        with torch.no_grad(), apply_to_diffusers(model, TilePlan.uniform(1), start=0.2):
            with pytest.raises(ValueError, match="Apply the plan with start 0 and end 1"):
                run(model, given)
        with torch.no_grad(), apply_to_diffusers(model, TilePlan.uniform(1)) as handle:
            run(model, given)
        assert handle.report.sparse == 3


def test_a_class_that_is_left_dense_is_refused_with_its_reason():
    mochi = diffusers.MochiTransformer3DModel(num_attention_heads=2, attention_head_dim=16, num_layers=1)
    with pytest.raises(ValueError, match="MochiTransformer3DModel, which stays dense: it attends for each batch entry"):
        apply_to_diffusers(mochi, TilePlan.uniform(1))


def test_short_sequences_stay_dense_on_request():
    for least, sparse in ((TOKENS, 3), (TOKENS + 1, 0)):
        model, inputs = build("wan", 1)
        with torch.no_grad(), apply_to_diffusers(model, TilePlan.uniform(1), min_tokens=least) as handle:
            run(model, inputs)
        assert handle.report.sparse == sparse


@torch.no_grad()
def test_the_patch_in_time_of_cogvideox_1_5_counts(masked):
    model, inputs = build("cogvideox", patch_size_t=2, patch_bias=False)
    want = masked("cogvideox", model, inputs, [0])
    with apply_to_diffusers(model, TilePlan.uniform(1)):
        torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_fused_projections_stay_fused(family, masked):
    model, inputs = build(family)
    model.fuse_qkv_projections()
    want = masked(family, model, inputs, [0])
    with apply_to_diffusers(model, TilePlan.uniform(1)) as handle:
        torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=2e-5)
    assert handle.report.sparse == 3


def test_the_backend_chosen_in_diffusers_computes_the_dense_pieces(monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    registry = dispatch._AttentionBackendRegistry
    usual, active, shapes = registry._backends[dispatch.AttentionBackendName._NATIVE_MATH], registry._active_backend, []

    def spy(query, key, value, **options):
        shapes.append((query.shape[1], key.shape[1]))
        return usual(query, key, value, **options)

    monkeypatch.setitem(registry._backends, dispatch.AttentionBackendName._NATIVE_MATH, spy)
    model, inputs = build("wan", 1)
    with torch.no_grad():
        try:
            with apply_to_diffusers(model, TilePlan.uniform(1)):
                model.set_attention_backend("_native_math")
                run(model, inputs)
        finally:
            registry.set_active_backend(active)
    size = HEIGHT * WIDTH
    assert shapes.count((size, TOKENS)) == 3 and shapes.count((size, 2 * size)) == 3
    assert all(
        m.get_processor()._attention_backend == "_native_math" for _, m in FAMILIES[type(model).__name__].modules(model)
    )


def test_parts_computes_a_plan_where_diffusers_attends_by_pytorch(masked, caplog):
    """And frames where it does not, which is said, as in ComfyUI."""
    from diffusers.models import attention_dispatch as dispatch

    registry = dispatch._AttentionBackendRegistry
    active, (model, inputs) = registry._active_backend, build("wan", 2)
    with torch.no_grad():
        want = masked("wan", model, inputs, [0])
        with apply_to_diffusers(model, TilePlan.uniform(1), backend="parts") as handle:
            torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=2e-5)
            assert set(handle.report.computed) == {"sdpa in parts"} and not handle.report.warned
            try:
                model.set_attention_backend("_native_math")
                torch.testing.assert_close(run(model, inputs), want, atol=2e-5, rtol=2e-5)
            finally:
                registry.set_active_backend(active)  # it is set for all models
    assert set(handle.report.computed) == {"sdpa in parts", "diffusers _native_math"}
    assert "diffusers _native_math does not tell its log-sum-exp" in caplog.text


@pytest.mark.parametrize(
    ("options", "dense"), [({}, 0), ({"scale": 6**-0.5}, 0), ({"scale": 0.1}, 1), ({"dropout_p": 0.5}, 1)]
)
def test_attention_that_is_scaled_or_dropped_otherwise_stays_dense(options, dense):
    """The tile backends know neither."""
    q, k, v = rand(3, 1, 2, 12, 6, seed=3)
    report, layout = AttentionReport(), TokenLayout(TokenGrid(3, 2, 2))
    patch = SimpleNamespace(
        preparation=Preparation(TilePlan.uniform(1), report, backend="frames"), min_tokens=0,
        sequence=SequenceLayout(12, (layout,)), entries=(ForwardState(layout),),
    )  # fmt: skip

    class Original:
        def __call__(self):
            return F.scaled_dot_product_attention(q, k, v, **options)

    original = Original()
    torch.manual_seed(0)
    out = tiled(original, patch, 0)()
    torch.manual_seed(0)
    assert torch.equal(out, original()) == bool(dense)
    assert sum(report.dense.values()) == dense and report.sparse == 1 - dense


@pytest.mark.parametrize(
    ("family", "backend", "computed"), [("cogvideox", "auto", "sdpa"), ("wan", "parts", "sdpa in parts")]
)
def test_the_report_counts_the_work_and_names_what_computed_it(family, backend, computed):
    """The work with the text beside the video, and never "auto"."""
    model, inputs = build(family)
    layout = TokenLayout(TokenGrid(FRAMES, HEIGHT, WIDTH), prefix=PREFIX.get(family, 0))
    with torch.no_grad(), apply_to_diffusers(model, TilePlan.uniform(1), backend=backend) as handle:
        run(model, inputs)
    assert handle.report.density_sum == pytest.approx(3 * TilePattern(1).flop_density(layout.grid, layout.prefix))
    assert dict(handle.report.computed) == {computed: 3}


def test_mean_frames_are_refused_with_a_backend_that_computes_none():
    model, _ = build("wan", 1)
    with pytest.raises(ValueError, match="backend is 'frames', which computes no mean frames"):
        apply_to_diffusers(model, TilePlan(patterns=(TilePattern(1, means=1),) * 3), backend="frames")
    apply_to_diffusers(model, TilePlan.uniform(1)).remove()


def test_a_processor_says_what_arguments_it_takes():
    model, _ = build("cogvideox", 1)
    module = model.transformer_blocks[0].attn1
    before = list(inspect.signature(module.processor.__call__).parameters)
    with apply_to_diffusers(model, TilePlan.uniform(1)):
        assert list(inspect.signature(module.processor.__call__).parameters) == before


def test_compiled_models_see_the_plan_and_the_window():
    model, inputs = build("cogvideox", 1)
    model.transformer_blocks = model.transformer_blocks[:1]
    early, late = ({**inputs, "timestep": torch.full((1,), t)} for t in (900, 100))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = run(model, late)
        with apply_to_diffusers(compiled, TilePlan.uniform(1), end=0.5) as handle:
            want = run(model, early)
            assert handle.report.sparse == 1
            for _ in range(2):
                torch.testing.assert_close(run(compiled, early), want, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(run(compiled, late), dense, atol=1e-5, rtol=1e-5)
    assert handle.report.sparse == 3 and handle.report.dense["outside the step window"] == 2
    torch._dynamo.reset()


@pytest.mark.skipif("reason" not in inspect.signature(torch.compiler.disable).parameters, reason="an older PyTorch")
@torch.no_grad()
def test_a_whole_graph_is_refused_with_what_to_do():
    torch._dynamo.reset()
    model, inputs = build("wan", 1)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager", fullgraph=True)
    with apply_to_diffusers(model, TilePlan.uniform(1)), pytest.raises(Exception, match="compile without fullgraph"):
        run(model, inputs)
    torch._dynamo.reset()


def test_mistakes_are_refused_with_what_to_do():
    model, _ = build("wan", 1)
    with pytest.raises(ValueError, match="Linear.*not known.*CogVideoXTransformer3DModel.*pass pipe.transformer"):
        apply_to_diffusers(torch.nn.Linear(1, 1), TilePlan.uniform(1))
    with pytest.raises(ValueError, match="not known"):
        apply_to_diffusers(SimpleNamespace(), TilePlan.uniform(1))
    with pytest.raises(ValueError, match="32 layers, but the model has 3"):
        apply_to_diffusers(model, TilePlan.uniform(1, layers=32))
    with pytest.raises(ValueError, match="'opensora_plan', but the model is 'wan'"):
        apply_to_diffusers(model, TilePlan.uniform(1, family="opensora_plan"))
    with pytest.raises(ValueError, match="made for 5 attention heads, but the model has 2"):
        apply_to_diffusers(model, TilePlan.uniform(1, heads=5))
    for start, end in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ValueError, match="expected 0 <= start < end <= 1"):
            apply_to_diffusers(model, TilePlan.uniform(1), start=start, end=end)
    with apply_to_diffusers(model, TilePlan.uniform(1)):
        with pytest.raises(ValueError, match="has a tile plan already"):
            apply_to_diffusers(model, TilePlan.uniform(2))
    apply_to_diffusers(model, TilePlan.uniform(2)).remove()


@torch.no_grad()
def test_a_plan_whose_handle_was_dropped_is_removed_by_the_transformer():
    model, inputs = build("wan", 1)
    dense = run(model, inputs)
    apply_to_diffusers(model, TilePlan.uniform(1))
    assert not torch.equal(run(model, inputs), dense)
    remove_from_diffusers(model)
    assert torch.equal(run(model, inputs), dense)
    remove_from_diffusers(model)  # there is none
    with apply_to_diffusers(model, TilePlan.uniform(1)) as handle:
        run(model, inputs)
    assert handle.report.sparse == 3


def test_a_copy_under_a_plan_is_refused_with_what_to_do():
    model, _ = build("wan", 1)
    with apply_to_diffusers(model, TilePlan.uniform(1)), pytest.raises(TypeError, match=r"Call remove\(\).*, copy the"):
        copy.deepcopy(model)
    copy.deepcopy(model)
