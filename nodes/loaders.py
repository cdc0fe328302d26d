"""Loaders of the three parts of Open-Sora-Plan v1.2; each gives an ordinary MODEL, CLIP or VAE."""

from __future__ import annotations

from comfy_api.latest import io

from .checked import checked
from .comfy_bridge.opensora_plan.model import WEIGHT_DTYPES, load_model
from .comfy_bridge.opensora_plan.text_encoder import TEMPLATE_NAMES, load_text_encoder
from .comfy_bridge.opensora_plan.vae import load_vae
from .comfy_bridge.paths import BUILT_IN, file_names
from .inputs import CATEGORY, advanced_inputs, search_words


class EVDiTModelLoader(io.ComfyNode):
    """The diffusion transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTModelLoader",
            display_name="Load Open-Sora-Plan Model",
            category=CATEGORY,
            **search_words("open sora plan", "checkpoint", "tiny model"),
            description="Loads an Open-Sora-Plan v1.2 transformer, or the tiny model that ships with this pack.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=file_names("diffusion_models"),
                    tooltip=(
                        "A transformer of Open-Sora-Plan v1.2 in models/diffusion_models, with its config.json beside it, or "
                        f'"{BUILT_IN}": 29 frames of 64x64 coloured shapes, seconds per video on a CPU, no download. Its forms of '
                        "4 and 8 steps are distilled: as many steps at cfg 1; the sparse one for the plan of its template."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=WEIGHT_DTYPES,
                    default="default",
                    tooltip=(
                        "How the weights are stored. default = as ComfyUI decides for this device; bf16 and fp16 take 2 bytes a "
                        "weight (5.5 GB for the full model), fp32 4 bytes, fp8_e4m3fn 1 byte at some loss of quality."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="An ordinary MODEL; latents are 4x in time and 8x in space. For Sparse Attention and every sampler.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(load_model(model_name, weight_dtype))


class EVDiTTextEncoderLoader(io.ComfyNode):
    """The mT5 encoder."""

    @classmethod
    @advanced_inputs("clean_caption")
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTTextEncoderLoader",
            display_name="Load Open-Sora-Plan Text Encoder",
            category=CATEGORY,
            **search_words("open sora plan", "mt5", "clip loader"),
            description=(
                "Loads the mT5 encoder of Open-Sora-Plan v1.2, or the tiny one. Text is cut at 512 tokens; "
                "brackets are plain text, not prompt weights."
            ),
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=file_names("text_encoders"),
                    tooltip=(
                        "An mT5-xxl encoder in models/text_encoders (safetensors, with spiece.model inside or beside it; 11 GB "
                        f'in bf16), or "{BUILT_IN}" for the tiny model. Must be the encoder the transformer was trained with.'
                    ),
                ),
                io.Combo.Input(
                    "template",
                    options=TEMPLATE_NAMES,
                    default="none",
                    optional=True,
                    tooltip=(
                        "Words that Open-Sora-Plan adds around each text: none; a = three quality words; b = four and a long style "
                        "list; c = the four. Empty text stays empty. Encode the negative prompt with none. "
                        "No effect on speed; leave none for the tiny model."
                    ),
                ),
                io.Boolean.Input(
                    "clean_caption",
                    default=True,
                    optional=True,
                    tooltip=(
                        "On: lower case, links, brackets and stray symbols removed, as the model's captions were; keeps "
                        "Chinese. Off: the text as typed. Open-Sora-Plan expects on. No effect on speed."
                    ),
                ),
            ],
            outputs=[
                io.Clip.Output(
                    "clip",
                    display_name="clip",
                    tooltip="An ordinary CLIP for CLIPTextEncode. Its conditioning fits the transformer it was trained with.",
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, text_encoder_name: str, template: str = "none", clean_caption: bool = True) -> io.NodeOutput:
        return io.NodeOutput(load_text_encoder(text_encoder_name, template=template, clean=clean_caption))


class EVDiTVAELoader(io.ComfyNode):
    """The causal video VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EVDiTVAELoader",
            display_name="Load Open-Sora-Plan VAE",
            category=CATEGORY,
            **search_words("open sora plan", "vae loader"),
            description=(
                "Loads the causal video VAE of Open-Sora-Plan v1.2, or the tiny one. VAEDecodeTiled tiles as "
                "Open-Sora-Plan does: time chunks that overlap by one latent frame, and cross-fades in space."
            ),
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=file_names("vae"),
                    tooltip=(
                        "A CausalVAEModel_D4_4x8x8 in models/vae: safetensors, or Open-Sora-Plan's checkpoint.ckpt "
                        f'(read without running code in it), or "{BUILT_IN}". Must match the transformer\'s latents.'
                    ),
                ),
            ],
            outputs=[
                io.Vae.Output(
                    "vae",
                    display_name="vae",
                    tooltip=(
                        "An ordinary VAE for VAEDecode, VAEDecodeTiled and VAEEncode: 4k + 1 video frames to k + 1 latent "
                        "frames, 8x in height and width."
                    ),
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_vae(vae_name))
