"""The Open-Sora-Plan v1.2 transformer (OpenSoraT2V, ROPE-L/122): full 3D attention over all video tokens.

Shapes: latents (B, C, T, H, W); tokens (B, N, D) with N = T * H/2 * W/2, frame by frame, row by row; text (B, L,
C_text). Parameter names are those of the reference checkpoint (687 tensors at full size). The same module runs inside
ComfyUI: ``operations`` supplies its weight-casting layers and ``attention`` its chosen backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...attention.sdpa import CROSS_KEY, sdpa_attention
from .config import DiTConfig
from .rope import apply_rope, rope_table

Attention = Callable[..., Tensor]
Table = tuple[Tensor, Tensor]

FIRST_FRAME = "evdit_first_frame"  # in transformer_options: the number in its clip of the first latent frame given


class TimestepEmbedding(nn.Module):
    """Sinusoid of 256 channels (cosines first), then Linear, SiLU, Linear."""

    def __init__(self, dim: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(256, dim, **factory)
        self.linear_2 = ops.Linear(dim, dim, **factory)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        frequencies = torch.exp(
            -math.log(10000.0) * torch.arange(128, device=timestep.device, dtype=torch.float32) / 128
        )
        angles = timestep.float()[:, None] * frequencies
        wave = torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(wave)))


class AdaLayerNormSingle(nn.Module):
    """One modulation for all blocks (PixArt-alpha): returns the six vectors' source (B, 6 D) and the embedding."""

    def __init__(self, dim: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.emb = nn.Module()
        self.emb.timestep_embedder = TimestepEmbedding(dim, ops=ops, **factory)
        self.linear = ops.Linear(dim, 6 * dim, **factory)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        embedding = self.emb.timestep_embedder(timestep, dtype)  # pyright: ignore[reportCallIssue]
        return self.linear(F.silu(embedding)), embedding


class TextProjection(nn.Module):
    """Linear, GELU (tanh), Linear: text states (B, L, C_text) to (B, L, D)."""

    def __init__(self, caption_channels: int, dim: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.linear_1 = ops.Linear(caption_channels, dim, **factory)
        self.linear_2 = ops.Linear(dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class AttentionLayer(nn.Module):
    """Multi-head attention; self-attention when ``context`` is None (then with RoPE)."""

    def __init__(self, config: DiTConfig, attention: Attention, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        dim = config.hidden_size
        self.heads = config.num_attention_heads
        self.attention = attention
        self.to_q, self.to_k, self.to_v = (ops.Linear(dim, dim, **factory) for _ in range(3))
        self.to_out = nn.ModuleList([ops.Linear(dim, dim, **factory)])

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        rope: Table | None = None,
        mask: Tensor | None = None,
        transformer_options: dict[str, Any],
    ) -> Tensor:
        source = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        if rope is not None:
            q, k = (apply_rope(t.unflatten(-1, (self.heads, -1)), rope).flatten(-2) for t in (q, k))
        options = transformer_options if context is None else {**transformer_options, CROSS_KEY: True}
        out = self.attention(q, k, v, self.heads, mask=mask, transformer_options=options)
        return self.to_out[0](out)


class FeedForward(nn.Module):
    """Linear to 4 D, GELU (tanh), Linear back. The names net.0.proj and net.2 are the checkpoint's."""

    def __init__(self, dim: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        first = nn.Module()
        first.proj = ops.Linear(dim, 4 * dim, **factory)
        self.net = nn.ModuleList([first, nn.Identity(), ops.Linear(4 * dim, dim, **factory)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))  # pyright: ignore[reportCallIssue]


class Block(nn.Module):
    """Self-attention, cross-attention (neither normed nor gated before it, as in PixArt), feed-forward."""

    def __init__(self, config: DiTConfig, attention: Attention, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        dim = config.hidden_size
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim, **factory) / dim**0.5)
        self.attn1 = AttentionLayer(config, attention, ops=ops, **factory)
        self.attn2 = AttentionLayer(config, attention, ops=ops, **factory)
        self.ff = FeedForward(dim, ops=ops, **factory)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        modulation: Tensor,
        rope: Table,
        mask: Tensor | None,
        transformer_options: dict[str, Any],
    ) -> Tensor:
        table = self.scale_shift_table.to(x)[None] + modulation.unflatten(-1, (6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unsqueeze(2).unbind(1)
        x = x + gate1 * self.attn1(
            _modulated(x, shift1, scale1, self.eps), rope=rope, transformer_options=transformer_options
        )
        x = x + self.attn2(x, context, mask=mask, transformer_options=transformer_options)
        return x + gate2 * self.ff(_modulated(x, shift2, scale2, self.eps))


class PatchEmbed(nn.Module):
    """2 x 2 patches of every latent frame, no absolute position."""

    def __init__(self, config: DiTConfig, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = ops.Conv2d(config.in_channels, config.hidden_size, p, stride=p, **factory)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        return rearrange(self.proj(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) d h w -> b (t h w) d", b=b)


class OpenSoraT2V(nn.Module):
    """The whole transformer. ``forward`` returns the raw prediction (epsilon, or v where the config says so)."""

    _no_split_modules = ("Block",)  # Hugging Face's name for what is sharded as one

    def __init__(
        self,
        config: DiTConfig,
        *,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = nn,
        attention: Attention = sdpa_attention,
    ) -> None:
        super().__init__()
        build = {"ops": operations, "dtype": dtype, "device": device}
        dim = config.hidden_size
        self.config = config
        self.dtype = dtype or torch.get_default_dtype()
        self.patch_size = (1, config.patch_size, config.patch_size)
        self.gradient_checkpointing = False
        self.pos_embed = PatchEmbed(config, **build)
        self.adaln_single = AdaLayerNormSingle(dim, **build)
        self.caption_projection = TextProjection(config.caption_channels, dim, **build)
        self.transformer_blocks = nn.ModuleList(Block(config, attention, **build) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim, dtype=dtype, device=device) / dim**0.5)
        self.proj_out = operations.Linear(dim, config.patch_size**2 * config.out_channels, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        """Predict for latents x (B, C, T, H, W) at ``timestep`` (B,) in 0..999, fractions allowed.

        ``context`` (B, L, C_text) with ``attention_mask`` (B, L), 1 = word, 0 = padding. H and W may be odd: they
        are padded to the patch size and the result is cropped.
        """
        height, width = x.shape[-2:]
        p = self.config.patch_size
        # Only "constant" padding takes a 5D tensor with pads on two axes; the pixels are cropped away again.
        x = F.pad(x, (0, -width % p, 0, -height % p))
        grid = (x.shape[2], x.shape[3] // p, x.shape[4] // p)
        tokens = self.pos_embed(x)
        modulation, embedding = self.adaln_single(timestep, tokens.dtype)
        context, mask = _drop_padding(context.to(tokens.dtype), attention_mask)
        context = self.caption_projection(context)
        options = dict(transformer_options or {})
        rope = self._rope(grid, tokens, options.get(FIRST_FRAME, 0))
        options.update(block_type="double", total_blocks=len(self.transformer_blocks), grid_sizes=grid)
        hooks = options.get("patches_replace", {}).get("dit", {})
        for index, block in enumerate(self.transformer_blocks):
            options["block_index"] = index
            args = {
                "img": tokens,
                "txt": context,
                "vec": modulation,
                "pe": rope,
                "attention_mask": mask,
                "transformer_options": options,
            }
            hook = hooks.get(("double_block", index))
            if hook is not None:
                tokens = hook(args, {"original_block": partial(_run_block, block)})["img"]
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                # Its own copy of the options: the block runs again in the backward pass, when the index has moved on.
                tokens = checkpoint(block, tokens, context, modulation, rope, mask, dict(options), use_reentrant=False)
            else:
                tokens = block(tokens, context, modulation, rope, mask, options)
        shift, scale = (self.scale_shift_table.to(tokens)[None] + embedding[:, None]).unsqueeze(2).unbind(1)
        out = self.proj_out(_modulated(tokens, shift, scale, self.config.norm_eps))
        t, h, w = grid
        out = rearrange(out, "b (t h w) (p q c) -> b c t (h p) (w q)", t=t, h=h, w=w, p=p, q=p)
        return out[..., :height, :width]

    def _rope(self, grid: tuple[int, int, int], tokens: Tensor, first: int) -> Table:
        c = self.config
        scales = (c.interpolation_scale_t, c.interpolation_scale_h, c.interpolation_scale_w)
        # The reference rounds angles to the run's dtype; bf16 checkpoints were trained with that.
        angles = torch.bfloat16 if tokens.dtype == torch.bfloat16 else torch.float32
        return rope_table(grid, scales, c.attention_head_dim, device=tokens.device, angle_dtype=angles, first=first)


def _run_block(block: nn.Module, args: dict[str, Any]) -> dict[str, Tensor]:
    """One block in the form in which ComfyUI's ``patches_replace["dit"]`` hooks call it."""
    img = block(args["img"], args["txt"], args["vec"], args["pe"], args["attention_mask"], args["transformer_options"])
    return {"img": img}


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _drop_padding(context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cut padding that all rows share; what is left unequal becomes an additive mask (B, 1, 1, L)."""
    if mask is None:
        return context, None
    if mask.shape[1] != context.shape[1]:
        raise ValueError(
            f"The text mask covers {mask.shape[1]} tokens, expected {context.shape[1]} as the text has. "
            "Text and mask must come from the same encoding."
        )
    used = mask.bool()
    longest = int(used.any(0).nonzero().max()) + 1 if used.any() else 1
    context, used = context[:, :longest], used[:, :longest]
    if used.all():
        return context, None
    bias = torch.zeros(used.shape, dtype=context.dtype, device=context.device).masked_fill(~used, -10000.0)
    return context, bias[:, None, None]
