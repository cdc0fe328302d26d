"""One tiny random-weight model for each native video family, built from ComfyUI's own classes, and what its layers
attend over.

The numbers of tokens are written down here by hand, apart from the pack's own rules.
"""

import importlib.util
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from host import torch  # isort: skip
import comfy.model_management as mm  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.samplers  # isort: skip
import comfy.supported_models  # isort: skip

WIDTH, HEADS, TEXT = 48, 2, 32
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": WIDTH, "num_heads": HEADS, "num_layers": 3, "ffn_dim": 96,
    "patch_size": (1, 2, 2), "freq_dim": 32, "in_dim": 16, "out_dim": 16, "text_dim": TEXT, "window_size": (-1, -1),
    "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
DANCER = {**WAN, "model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0, 2]}
SCAIL = {**WAN, "model_type": "scail", "in_dim": 20}
HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 24,
    "axes_dim": [8, 8, 8], "context_in_dim": TEXT, "hidden_size": WIDTH, "mlp_ratio": 2.0, "num_heads": HEADS, "depth": 2,
    "depth_single_blocks": 3, "theta": 256, "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False,
}  # fmt: skip
NEWER_HUNYUAN = {"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False}
HUNYUAN_15 = {
    **HUNYUAN, **NEWER_HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None, "byt5": True,
    "guidance_embed": False, "use_cond_type_embedding": True, "vision_in_dim": 1152, "meanflow_sum": True,
}  # fmt: skip
LTX = {
    "image_model": "ltxv", "num_layers": 3, "num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS,
    "cross_attention_dim": WIDTH, "caption_channels": TEXT, "in_channels": 128,
}  # fmt: skip
LTX_AUDIO = {
    **LTX,
    "image_model": "ltxav",
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 12,
    "audio_cross_attention_dim": 24,
    # What prepares the texts would have 709 million weights.
    "connector_attention_head_dim": 12,
    "connector_num_attention_heads": 2,
    "connector_num_layers": 1,
}
LTX_25 = {
    **LTX_AUDIO, "ff_bias": False, "audio_ff_bias": False, "apply_gated_attention": True, "cross_attention_adaln": True,
    "use_keyframes_abs_pos_embedding": True,
}  # fmt: skip
COGVIDEOX = {
    "image_model": "cogvideox", "num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 3, "text_embed_dim": TEXT,
    "time_embed_dim": 24, "in_channels": 16, "out_channels": 16,
}  # fmt: skip
COGVIDEOX_15 = {
    **COGVIDEOX,
    "in_channels": 32,
    "patch_size_t": 2,
    "ofs_embed_dim": 24,
    "use_rotary_positional_embeddings": True,
}
MOCHI = {
    "image_model": "mochi_preview", "depth": 3, "patch_size": 2, "num_heads": HEADS, "hidden_size_x": WIDTH, "hidden_size_y": 24,
    "mlp_ratio_x": 256, "mlp_ratio_y": 256, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
    "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True,
    "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": TEXT, "t5_token_length": 256,
    "rope_theta": 10000.0,
}  # fmt: skip
COSMOS = {
    "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
    "model_channels": WIDTH, "concat_padding_mask": True, "crossattn_emb_channels": TEXT, "pos_emb_cls": "rope3d",
    "pos_emb_interpolation": "crop", "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 3, "num_heads": HEADS, "mlp_ratio": 2.0,
}  # fmt: skip
COSMOS_1 = {**COSMOS, "image_model": "cosmos", "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True,
            "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable"}  # fmt: skip
KANDINSKY = {
    "image_model": "kandinsky5", "model_dim": WIDTH, "ff_dim": 96, "time_dim": 32, "in_text_dim": TEXT, "in_text_dim2": 24,
    "visual_embed_dim": 132, "num_text_blocks": 2, "num_visual_blocks": 3, "axes_dims": (8, 8, 8), "patch_size": (1, 2, 2),
}  # fmt: skip
KANDINSKY_6 = {
    **KANDINSKY, "image_model": "kandinsky6", "model_dim_a": 24, "ff_dim_a": 48, "time_dim_a": 32, "head_dim_a": 12, "in_audio_dim": 40,
    "visual_token_type_num_embeddings": 2, "rope_scale_factor": (1.0, 1.0, 1.0),
}  # fmt: skip
# inner 64 is wider than hidden, as in the real model; its rotary turns 24 of 32 channels.
MINIMAX_H3 = {
    "image_model": "minimax_h3", "hidden_size": WIDTH, "num_layers": 3, "token_refiner_num_layers": 2, "num_attention_heads": HEADS,
    "attention_head_dim": 32, "ffn_hidden_size": 96, "latents_dim": 24, "audio_latents_dim": 32, "text_dim": TEXT,
    "timestep_input_dim": 32, "time_embed_hidden_size": WIDTH, "time_embed_dim": 24, "rope_inv_freq_len": 4,
}  # fmt: skip


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def vision(tokens: int, width: int) -> SimpleNamespace:
    """What a CLIP vision encoder gives."""
    return SimpleNamespace(penultimate_hidden_states=noise(1, tokens, width), last_hidden_state=noise(1, tokens, width))


@dataclass(frozen=True)
class Case:
    """A model and a run of it.

    Attributes:
        config: class of comfy.supported_models; a version that has not got it skips the case.
        latent: (C, T, H, W); ``audio`` is the (C, L, F) that is packed with it.
        text: (tokens, width) of the prompt's encoding.
        layout: tokens before the video, frames, tokens of a frame, tokens behind the video.
        layers: the layer of each self-attention over the video, in the order of the calls.
        conds: entries of the conditioning.
        padding: where masked text stands in the sequence.
        patch_t: latent frames in a token.
        before: latent frames that stand before the video and are none of it.
        requires: a module of ComfyUI, or a name in one; a version that has not got it skips the case.
        left_dense: nothing of it can become sparse.
        single: one video and no guidance, where ComfyUI itself takes no more.
        newer: settings that only versions from 0.8 on know.
        kept: whether a noise mask keeps a part of one frame and of the sound, as for inpainting.
    """

    config: str
    settings: dict[str, Any]
    latent: tuple[int, ...]
    layout: tuple[int, int, int, int]
    layers: tuple[int, ...] = (0, 1, 2)
    text: tuple[int, int] = (7, TEXT)
    conds: dict[str, Any] = field(default_factory=dict)
    audio: tuple[int, ...] = ()
    padding: range = range(0)
    patch_t: int = 1
    before: int = 0
    requires: str = ""
    left_dense: bool = False
    batch: int = 2
    single: bool = False
    newer: dict[str, Any] = field(default_factory=dict)
    kept: bool = False


def missing(case: Case) -> str:
    """What this ComfyUI has not got of a case, "" where it has everything."""
    module, _, name = case.requires.partition(":")
    if module and not (
        importlib.util.find_spec(module) and (not name or hasattr(importlib.import_module(module), name))
    ):
        return case.requires
    return "" if config_class(case) else case.config


def config_class(case: Case) -> type | None:
    """ComfyUI's class, or the rebuilt one of a model that it does not ship yet."""
    own = getattr(comfy.supported_models, case.config, None)
    if own is None and case.config == "Kandinsky6":
        from tiny_kandinsky6 import Kandinsky6

        return Kandinsky6
    return own


def comfyui_version() -> tuple[int, int]:
    from comfyui_version import __version__

    major, minor = __version__.split(".")[:2]
    return int(major), int(minor)


def mask(real: int, padded: int = 0) -> torch.Tensor:
    return torch.tensor([[1] * real + [0] * padded])


def guides(frames: int, h: int, w: int, dropped: int = 0):
    """LTX guide frames as its nodes give them: their coordinates, and the mask in which negative tokens are left
    out."""
    from comfy.ldm.lightricks.model import latent_to_pixel_coords
    from comfy_extras.nodes_lt import LTXVAddGuide

    patchifier = getattr(LTXVAddGuide, "PATCHIFIER", None) or LTXVAddGuide()._patchifier
    _, coords = patchifier.patchify(noise(1, 128, frames, h, w))
    values = torch.ones(1, 1, 5 + frames, h, w)
    values[:, :, 5:] = 0.0
    values[:, :, 5:].view(-1)[:dropped] = -1.0
    return latent_to_pixel_coords(coords, (8, 32, 32), causal_fix=True), values


def weights(*strengths: float, tokens: int = 12) -> list[dict]:
    """What LTXVAddGuide notes of each guide of one frame of ``tokens``."""
    return [
        {"pre_filter_count": tokens, "strength": s, "pixel_mask": None, "latent_shape": [1, 3, 4]} for s in strengths
    ]


def _cases() -> dict[str, Case]:
    pooled = {"pooled_output": noise(1, 24)}
    masked = {"attention_mask": mask(7)}
    odd, even = (16, 5, 5, 7), (16, 5, 4, 6)  # 3 x 4 and 2 x 3 tokens a frame
    wan = {
        "wan": Case("WAN21_T2V", WAN, odd, (0, 5, 12, 0)),
        "wan with a text as long as a frame": Case("WAN21_T2V", WAN, even, (0, 5, 6, 0), text=(6, TEXT)),
        "wan i2v": Case("WAN21_I2V", {**WAN, "model_type": "i2v", "in_dim": 36}, odd, (0, 5, 12, 0),
                        conds={"clip_vision_output": vision(9, 1280)}),
        "wan fun with a reference": Case("WAN21_FunControl2V", {**WAN, "model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16}, even,
                                         (6, 5, 6, 0), conds={"reference_latents": [noise(1, 16, 1, 4, 6)]}),
        "wan with a reference it ignores": Case("WAN21_T2V", WAN, even, (0, 5, 6, 0),
                                                conds={"reference_latents": [noise(1, 16, 1, 4, 6)]}),
        "wan phantom": Case("WAN21_T2V", WAN, odd, (0, 5, 12, 24), conds={"time_dim_concat": noise(1, 16, 2, 5, 7)}),
        "wan with references in context": Case("WAN21_T2V", WAN, odd, (0, 5, 12, 5 * 12 + 6), requires="comfy_extras.nodes_bernini",
                                               conds={"context_latents": [noise(1, 16, 5, 5, 7), noise(1, 16, 1, 4, 6)]}),
        "wan phantom with a reference in context": Case("WAN21_T2V", WAN, even, (0, 5, 6, 12 + 4), requires="comfy_extras.nodes_bernini",
                                                        conds={"time_dim_concat": noise(1, 16, 2, 4, 6),
                                                               "context_latents": [noise(1, 16, 1, 3, 4)]}),
        "wan flow rvs": Case("WAN21_FlowRVS", {**WAN, "model_type": "flow_rvs"}, even, (0, 5, 6, 0)),
        "wan 2.2 5B": Case("WAN22_T2V", {**WAN, "in_dim": 48, "out_dim": 48}, (48, 5, 5, 7), (0, 5, 12, 0)),
        "wan vace": Case("WAN21_Vace", {**WAN, "model_type": "vace", "num_layers": 4, "vace_layers": 2, "vace_in_dim": 96}, even,
                         (0, 5, 6, 0), (0, 0, 1, 2, 2, 3)),
        "wan vace twice": Case("WAN21_Vace", {**WAN, "model_type": "vace", "num_layers": 4, "vace_layers": 2, "vace_in_dim": 96}, even,
                               (0, 5, 6, 0), (0, 0, 0, 1, 2, 2, 2, 3), batch=1,
                               conds={"vace_frames": [noise(1, 32, 5, 4, 6)] * 2, "vace_mask": [noise(1, 64, 5, 4, 6)] * 2,
                                      "vace_strength": [1.0, 0.5]}),
        "wan camera": Case("WAN21_Camera", {**WAN, "model_type": "camera", "in_dim": 32}, even, (0, 5, 6, 0),
                           conds={"clip_vision_output": vision(9, 1280)}),
        "wan humo": Case("WAN21_HuMo", {**WAN, "model_type": "humo"}, odd, (0, 5, 12, 24), conds={
            "reference_latents": [noise(1, 16, 2, 6, 8)], "audio_embed": noise(1, 5, 8, 5, 1280)}),
        "wan s2v": Case("WAN22_S2V", {**WAN, "model_type": "s2v", "audio_inject_layers": [0, 2], "audio_dim": 16, "num_audio_token": 4},
                        (16, 5, 8, 8), (0, 5, 16, 16 + 16 + 4 + 4), conds={
            "reference_latents": [noise(1, 16, 1, 8, 8)], "reference_motion": noise(1, 16, 19, 8, 8)}),
        "wan dancer": Case("WAN22_WanDancer", DANCER, (16, 5, 4, 8), (0, 5, 8, 0), conds={
            "audio_embed": noise(1, 20, 35), "clip_vision_output": vision(9, 1280), "clip_vision_output_ref": vision(9, 1280)}),
        "wan dancer over the whole music": Case("WAN22_WanDancer", DANCER, (16, 5, 4, 8), (0, 5, 8, 0), single=True, conds={
            "audio_embed": noise(1, 20, 35), "fps": 7.5, "clip_vision_output": vision(4, 1280), "clip_vision_output_ref": vision(3, 1280)}),
        "wan dancer with images as long as the video": Case("WAN22_WanDancer", DANCER, (16, 5, 4, 8), (0, 5, 8, 0), left_dense=True, conds={
            "audio_embed": noise(1, 20, 35), "clip_vision_output": vision(21, 1280), "clip_vision_output_ref": vision(19, 1280)}),
        "wan scail": Case("WAN21_SCAIL", SCAIL, odd, (12, 5, 12, 5 * 4), conds={
            "reference_latents": [noise(1, 16, 1, 5, 7)], "pose_video_latent": noise(1, 16, 5, 3, 4),
            "clip_vision_output": vision(9, 1280)}),
        "wan scail without a pose": Case("WAN21_SCAIL", SCAIL, even, (0, 5, 6, 0)),
        "wan scail 2": Case("WAN21_SCAIL2", {**SCAIL, "model_type": "scail2"}, (16, 5, 4, 8), (3 * 8, 5, 8, 5 * 2), batch=1, conds={
            "reference_latents": [noise(1, 16, 1, 4, 8)] * 3, "pose_video_latent": noise(1, 16, 5, 2, 4), "ref_mask_flag": False,
            "driving_mask_28ch": noise(1, 5, 28, 2, 4), "ref_mask_28ch": noise(1, 8, 28, 4, 8)}),
        "wan causal": Case("WAN21_CausalAR_T2V", WAN, even, (0, 5, 6, 0), left_dense=True),
        "wan animate": Case("WAN22_Animate", {**WAN, "model_type": "animate", "in_dim": 36, "num_layers": 5}, even, (6, 4, 6, 0),
                            tuple(range(5)), conds={"pose_video_latent": noise(1, 16, 4, 4, 6)}, batch=1, before=1),
    }  # fmt: skip
    text_first = comfyui_version() >= (0, 14)

    def around(text: int, reference: int, frames: int, size: int) -> tuple[int, int, int, int]:
        """HunyuanVideo's layout: ComfyUI 0.14 moved the text before the video."""
        return (text + reference, frames, size, 0) if text_first else (reference, frames, size, text)

    hunyuan = {
        "hunyuan": Case("HunyuanVideo", HUNYUAN, even, around(7, 0, 5, 6), tuple(range(5)), conds=pooled, newer=NEWER_HUNYUAN),
        "hunyuan with a reference": Case("HunyuanVideo", HUNYUAN, even, around(7, 6, 5, 6), tuple(range(5)), newer=NEWER_HUNYUAN,
                                         single=True, conds={**pooled, "ref_latent": noise(1, 16, 1, 4, 6), "guiding_frame_index": 0}),
        "hunyuan with padded text": Case("HunyuanVideo", HUNYUAN, even, around(7, 0, 5, 6), tuple(range(5)), single=True,
                                         padding=range(4, 7) if text_first else range(34, 37), newer=NEWER_HUNYUAN,
                                         conds={**pooled, "attention_mask": mask(4, 3)}),
        "hunyuan 1.5": Case("HunyuanVideo15", HUNYUAN_15, (32, 5, 3, 5), around(9 + 4 + 7, 0, 5, 15), tuple(range(5)), conds={
            **pooled, "clip_vision_output": vision(9, 1152), "conditioning_byt5small": noise(1, 4, 1472)}),
    }  # fmt: skip
    dropped = 5 if comfyui_version() >= (0, 8) else 0  # earlier versions keep all guide tokens
    with_sound: dict[str, Any] = {"text": (7, 2 * TEXT), "audio": (8, 11, 16), "batch": 1}
    ltx = {
        "ltx": Case("LTXV", LTX, (128, 5, 3, 5), (0, 5, 15, 0), conds=masked),
        "ltx with guides": Case("LTXV", LTX, (128, 7, 3, 4), (0, 5, 12, 24), conds={**masked, "guides": (2, 0)}),
        "ltx with dropped guides": Case(
            "LTXV", LTX, (128, 7, 3, 4), (0, 5, 12, 24 - dropped), conds={**masked, "guides": (2, 5)}
        ),
        "ltx with guides of full strength": Case(
            "LTXV",
            LTX,
            (128, 7, 3, 4),
            (0, 5, 12, 24 - dropped),
            conds={**masked, "guides": (2, 5), "guide_attention_entries": weights(1.0, 1.0)},
        ),
        "ltx with weaker guides": Case(
            "LTXV",
            LTX,
            (128, 7, 3, 4),
            (0, 5, 12, 24),
            requires="comfy.ldm.lightricks.model:GuideAttentionMask",
            left_dense=True,
            conds={**masked, "guides": (2, 0), "guide_attention_entries": weights(1.0, 0.5)},
        ),
        "ltx audio": Case(
            "LTXAV",
            LTX_AUDIO,
            (128, 5, 3, 5),
            (0, 5, 15, 0),
            conds=masked,
            **with_sound,
        ),
        "ltx 2.5": Case(
            "LTXAV",
            LTX_25,
            (128, 5, 3, 5),
            (0, 5, 15, 0),
            conds=masked,
            **with_sound,
            requires="comfy.ldm.lightricks.duration_head",
        ),
        "ltx audio with guides": Case(
            "LTXAV",
            LTX_AUDIO,
            (128, 7, 3, 4),
            (0, 5, 12, 24 - dropped),
            **with_sound,
            conds={**masked, "guides": (2, 5)},
        ),
        "ltx audio with a voice": Case(
            "LTXAV",
            LTX_AUDIO,
            (128, 5, 3, 5),
            (0, 5, 15, 0),
            **with_sound,
            conds={**masked, "ref_audio": {"tokens": noise(1, 4, 128)}},
        ),
    }
    odd, even = (24, 7, 5, 7), (24, 7, 4, 6)  # 3 x 4 and 2 x 3 tokens a frame
    sound = (32, 2, 9)  # 18 tokens

    def h3(latent: tuple[int, ...], before: int, **more: Any) -> Case:
        """MiniMax-H3 with ``before`` tokens beside text and target sound in front of the video."""
        text = more.setdefault("text", (7, TEXT))[0]
        size = -(-latent[2] // 2) * -(-latent[3] // 2)
        settings = {"audio": sound, "batch": 1, **more}
        return Case("MiniMaxH3", MINIMAX_H3, latent, (text + before + 18, latent[1], size, 0), **settings)

    first_and_last = [{"resolved_frame_index": at, "latent": noise(1, 24, 1, 6, 8)} for at in (0, 20)]
    guide = [{"resolved_frame_index": 5, "latent": noise(1, 24, 2, 6, 8), "audio_latent": noise(1, 32, 2, 4)}]
    references = [
        {"kind": "image", "latent_h": 4, "latent_w": 6, "latent": noise(1, 24, 1, 4, 6)},
        {"kind": "audio", "ref_audio_t": 3, "audio_latent": noise(1, 32, 2, 3)},
        {"kind": "video_audio", "latent_t": 2, "latent_h": 4, "latent_w": 4, "ref_audio_t": 2, "latent": noise(1, 24, 2, 4, 4),
         "audio_latent": noise(1, 32, 2, 2)},
    ]  # fmt: skip
    vision_tags = torch.tensor([1, 1, 0, 0, 0, 1, 1])
    minimax = {
        "h3": h3(odd, 0, single=True),
        "h3 of even size": h3(even, 0, single=True),
        "h3 with a text as long as a frame": h3(odd, 0, single=True, text=(12, TEXT)),
        "h3 with guidance": h3(odd, 0),
        "h3 with first and last frame": h3(odd, 24, single=True, conds={"minimax_keyframes": first_and_last}),
        "h3 with a guide and its sound": h3(odd, 24 + 8, single=True, conds={"minimax_keyframes": guide}),
        "h3 with references": h3(even, 6 + 6 + 4 + 8, single=True, conds={"minimax_refs": references}),
        "h3 with vision tokens": h3(even, 0, single=True, conds={"minimax_token_tags": vision_tags}),
        "h3 with a kept part": h3(even, 0, single=True, kept=True),
    }
    odd, even = (16, 5, 5, 7), (16, 5, 4, 6)

    def kandinsky_6(latent: tuple[int, ...], layout: tuple[int, ...], **more: Any) -> Case:
        settings = {"conds": pooled, "audio": (9, 40), **more}
        return Case("Kandinsky6", KANDINSKY_6, latent, layout, requires="comfy.ldm.kandinsky5", **settings)

    others = {
        "cogvideox": Case("CogVideoX_T2V", COGVIDEOX, odd, (7, 5, 12, 0)),
        "cogvideox i2v": Case(
            "CogVideoX_I2V",
            {
                **COGVIDEOX,
                "in_channels": 32,
                "use_rotary_positional_embeddings": True,
                "use_learned_positional_embeddings": True,
            },
            even,
            (6, 5, 6, 0),
            text=(6, TEXT),
            conds={"concat_latent_image": noise(1, 16, 1, 4, 6)},
        ),
        "cogvideox 1.5": Case("CogVideoX_I2V", COGVIDEOX_15, (16, 9, 4, 6), (7, 5, 6, 0), patch_t=2),
        "mochi": Case(
            "GenmoMochi", MOCHI, (12, 5, 4, 6), (0, 5, 6, 5), text=(9, TEXT), conds={"attention_mask": mask(5, 4)}
        ),
        "cosmos": Case("CosmosT2V", COSMOS_1, even, (0, 5, 6, 0), conds=masked),
        "cosmos predict2": Case(
            "CosmosI2VPredict2", {**COSMOS, "image_model": "cosmos_predict2", "in_channels": 17}, even, (0, 5, 6, 0)
        ),
        "kandinsky 5": Case("Kandinsky5", KANDINSKY, even, (0, 5, 6, 0), conds=pooled),
        "kandinsky 6": kandinsky_6(odd, (0, 5, 12, 0)),
        "kandinsky 6 with a reference": kandinsky_6(
            even, (0, 5, 6, 6), conds={**pooled, "k6_reference": noise(1, 16, 1, 4, 6)}
        ),
        "kandinsky 6 with its last frame a reference": kandinsky_6(
            (16, 6, 4, 6), (0, 5, 6, 6), conds={**pooled, "k6_reference_tail": True}
        ),
    }
    return {**wan, **hunyuan, **ltx, **minimax, **others}


CASES = _cases()


def build(case: Case) -> comfy.model_patcher.ModelPatcher:
    """The case's MODEL: random weights that let attention matter, on the CPU in float32."""
    settings = dict(case.settings)
    if case.newer and comfyui_version() >= (0, 8):
        settings.update(case.newer)
    config = config_class(case)(settings)
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    base = config.get_model({}, "", device="cpu")
    for name, parameter in base.diffusion_model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=max(parameter[0].numel(), 1) ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=float(name.endswith(("weight", "scale"))), std=0.1)
    for name, buffer in base.diffusion_model.named_buffers():
        if name.endswith("inv_freq"):  # comes with a checkpoint
            buffer.copy_(10000.0 ** -(torch.arange(len(buffer)) / len(buffer)))
    return comfy.model_patcher.ModelPatcher(base, load_device=mm.get_torch_device(), offload_device=torch.device("cpu"))


def inputs(case: Case) -> tuple[Any, list, Any]:
    """Noise (nested where audio goes with it), the conditioning and the noise mask."""
    x, extra, noise_mask = noise(1 if case.single else case.batch, *case.latent), dict(case.conds), None
    if "guides" in extra:
        frames, dropped = extra.pop("guides")
        extra["keyframe_idxs"], noise_mask = guides(frames, *case.latent[-2:], dropped)
    if case.audio:
        from comfy.nested_tensor import NestedTensor  # only in versions with such a model

        sound = noise(case.batch, *case.audio)
        heard = torch.ones_like(sound)
        if case.kept:
            noise_mask = torch.ones_like(x[:, :1])
            noise_mask[:, :, 2, :, :3], heard[..., :2] = 0.25, 0.5
        x, noise_mask = (
            NestedTensor([x, sound]),
            None if noise_mask is None else NestedTensor([noise_mask, heard]),
        )
    return x, [[noise(1, *case.text), extra]], noise_mask


def run(model, case: Case, changed: int | None = None, prompts: int = 1):
    """Two steps with guidance through ComfyUI's own guider, flat; ``changed`` is a latent frame that gets other
    noise, ``prompts`` how many make the picture together."""
    x, cond, noise_mask = inputs(case)
    if changed is not None:
        (x.unbind()[0] if x.is_nested else x)[:, :, changed] += 1.0
    negative = [[cond[0][0] * 0.5, cond[0][1]]]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([*cond, *([cond[0][0] * 0.25 * i, cond[0][1]] for i in range(1, prompts))], negative)
    guider.set_cfg(1.0 if case.single else 2.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    start = x - x if x.is_nested else torch.zeros_like(x)
    if case.config == "WAN21_FlowRVS":  # starts from a video in place of noise
        start = x
    with torch.inference_mode():
        out = guider.sample(x, start, sampler(case), sigmas, noise_mask, disable_pbar=True, seed=0)
    return torch.cat([part.flatten() for part in out.unbind()]) if out.is_nested else out.flatten()


def sampler(case: Case):
    """Euler; CogVideoX has one of its own, for its latents are scaled nowhere else."""
    if not case.config.startswith("CogVideoX"):
        return comfy.samplers.sampler_object("euler")
    from comfy_extras.nodes_void import VOID_DDIM  # only in versions with such a model

    return VOID_DDIM()
