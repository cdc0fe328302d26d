"""Kandinsky 6 as single files of ComfyUI's sources have it, for versions that do not ship it: two streams, of video and of
sound, from Kandinsky 5's blocks. What it shares with the real one are the order of its attention calls, what each goes over,
and the names of modules, arguments and hooks; its modulation is simpler.
"""

from host import torch  # isort: skip
import comfy.conds  # isort: skip
import comfy.model_base  # isort: skip
import comfy.supported_models  # isort: skip
from comfy.ldm.common_dit import pad_to_patch_size  # isort: skip
from comfy.ldm.flux.layers import EmbedND  # isort: skip
from comfy.ldm.kandinsky5 import model as kandinsky5  # isort: skip
from torch import nn


class Across(kandinsky5.CrossAttention):
    """From one stream to the other, of another width."""

    def __init__(self, width: int, head_dim: int, keys: int, operation_settings: dict):
        super().__init__(width, head_dim, operation_settings=operation_settings)
        where = {name: operation_settings[name] for name in ("device", "dtype")}
        self.to_key, self.to_value = (operation_settings["operations"].Linear(keys, width, **where) for _ in range(2))


class FusedBlock(nn.Module):
    def __init__(self, video: tuple, audio: tuple, operation_settings: dict):
        super().__init__()
        self.videoT, self.audioT = (
            kandinsky5.TransformerDecoderBlock(*sizes, operation_settings=operation_settings)
            for sizes in (video, audio)
        )
        self.va_cross_attention = Across(video[0], video[3], audio[0], operation_settings)
        self.av_cross_attention = Across(audio[0], audio[3], video[0], operation_settings)

    def forward(self, visual_embed, audio_embed, video_text_embed, audio_text_embed, video_time_embed, audio_time_embed,
                visual_rope, audio_rope, transformer_options={}):  # noqa: B006 - as the class has it  # fmt: skip
        options = {"transformer_options": transformer_options}
        seen = self.videoT(visual_embed, video_text_embed, video_time_embed, visual_rope, **options)
        heard = self.audioT(audio_embed, audio_text_embed, audio_time_embed, audio_rope, **options)
        return seen + self.va_cross_attention(seen, heard, **options), heard + self.av_cross_attention(
            heard, seen, **options
        )


class Kandinsky6NativeAVDiT(nn.Module):
    def __init__(self, model_dim, time_dim, ff_dim, model_dim_a, time_dim_a, ff_dim_a, head_dim_a, axes_dims, patch_size,
                 in_text_dim, in_text_dim2, visual_embed_dim, num_text_blocks, num_visual_blocks, in_audio_dim, device=None,
                 dtype=None, operations=None, **_):  # fmt: skip
        super().__init__()
        settings = {"operations": operations, "device": device, "dtype": dtype}
        own = {"operation_settings": settings}
        self.patch_size, self.dtype = patch_size, dtype
        video, audio = (model_dim, time_dim, ff_dim, sum(axes_dims)), (model_dim_a, time_dim_a, ff_dim_a, head_dim_a)
        self.visual_embeddings = kandinsky5.VisualEmbeddings(visual_embed_dim, model_dim, patch_size, **own)
        self.audio_embeddings = kandinsky5.TextEmbeddings(in_audio_dim, model_dim_a, **own)
        for name, (width, time, ff, head) in (("video", video), ("audio", audio)):
            blocks = [kandinsky5.TransformerEncoderBlock(width, time, ff, head, **own) for _ in range(num_text_blocks)]
            setattr(self, f"{name}_time_embeddings", kandinsky5.TimeEmbeddings(width, time, **own))
            setattr(self, f"{name}_text_embeddings", kandinsky5.TextEmbeddings(in_text_dim, width, **own))
            setattr(self, f"{name}_pooled_text_embeddings", kandinsky5.TextEmbeddings(in_text_dim2, time, **own))
            setattr(self, f"{name}_text_transformer_blocks", nn.ModuleList(blocks))
        self.visual_blocks = nn.ModuleList([FusedBlock(video, audio, settings) for _ in range(num_visual_blocks)])
        self.out_layer = kandinsky5.OutLayer(model_dim, time_dim, 16, patch_size, **own)
        self.audio_outLayer = operations.Linear(model_dim_a, in_audio_dim, device=device, dtype=dtype)
        self.places = EmbedND(sum(axes_dims), 10000.0, list(axes_dims))
        self.line, self.line_a = (EmbedND(head, 10000.0, [head]) for head in (video[3], head_dim_a))

    def _text(self, name: str, text, time, line, options):
        words = getattr(self, f"{name}_text_embeddings")(text)
        rope = line(torch.arange(text.shape[1], dtype=torch.float32)[None, :, None]).movedim(1, 2)
        for block in getattr(self, f"{name}_text_transformer_blocks"):
            words = block(words, time, rope, transformer_options=options)
        return words

    def forward(self, x, timestep, context, y, transformer_options={}, k6_reference=None, k6_reference_tail=False, **_):  # noqa: B006
        (video, audio), options = x, transformer_options
        frames, (height, width) = video.shape[2], video.shape[-2:]
        if k6_reference is not None:
            video = torch.cat((video, k6_reference.expand(len(video), -1, -1, -1, -1)), 2)
        mask = torch.zeros_like(video[:, :1])
        mask[:, :, frames - k6_reference_tail :] = 1
        seen = pad_to_patch_size(torch.cat((video, torch.zeros_like(video), mask), 1), self.patch_size)
        seen, heard = self.visual_embeddings(seen), self.audio_embeddings(audio)
        grid = seen.shape[:-1]
        places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid[1:]))[None]
        rope_v = self.places(places).movedim(1, 2)
        rope_a = self.line_a(torch.arange(audio.shape[1], dtype=torch.float32)[None, :, None]).movedim(1, 2)
        tev = self.video_time_embeddings(timestep, video.dtype) + self.video_pooled_text_embeddings(y)
        tea = self.audio_time_embeddings(timestep, video.dtype) + self.audio_pooled_text_embeddings(y)
        given = {
            "ctx_v": self._text("video", context, tev, self.line, options),
            "ctx_a": self._text("audio", context, tea, self.line_a, options),
            "tev": tev, "tea": tea, "rope_v": rope_v, "rope_a": rope_a,
        }  # fmt: skip
        seen, hooks = seen.flatten(1, -2), options.get("patches_replace", {}).get("dit", {})
        options["total_blocks"] = len(self.visual_blocks)
        for index, block in enumerate(self.visual_blocks):
            options["block_index"] = index

            def original(args, block=block):
                names = ("visual", "audio", *given)
                visual, sound = block(*(args[n] for n in names), transformer_options=args["transformer_options"])
                return {"visual": visual, "audio": sound}

            hook = hooks.get(("double_block", index), lambda args, extra: extra["original_block"](args))
            args = {"visual": seen, "audio": heard, **given, "transformer_options": options}
            out = hook(args, {"original_block": original})
            seen, heard = out["visual"], out["audio"]
        out = self.out_layer(seen.unflatten(1, grid[1:]), tev)
        return out[:, :, :frames, :height, :width], self.audio_outLayer(heard)


class _BaseModel(comfy.model_base.Kandinsky5):
    def __init__(self, model_config, model_type=comfy.model_base.ModelType.FLOW, device=None):
        comfy.model_base.BaseModel.__init__(
            self, model_config, model_type, device=device, unet_model=Kandinsky6NativeAVDiT
        )

    def concat_cond(self, **_):
        return None

    def extra_conds(self, **kwargs):
        out = super().extra_conds(**kwargs)
        out["latent_shapes"] = comfy.conds.CONDConstant(kwargs["latent_shapes"])
        if kwargs.get("k6_reference") is not None:
            out["k6_reference"] = comfy.conds.CONDRegular(kwargs["k6_reference"])
        if kwargs.get("k6_reference_tail"):
            out["k6_reference_tail"] = comfy.conds.CONDConstant(True)
        return out


class Kandinsky6(comfy.supported_models.Kandinsky5):
    def get_model(self, state_dict, prefix="", device=None):
        return _BaseModel(self, device=device)
