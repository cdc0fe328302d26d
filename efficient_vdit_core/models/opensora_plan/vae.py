"""The causal video VAE of Open-Sora-Plan v1.2 (CausalVAEModel_D4_4x8x8).

Shapes: pixels (B, 3, F, H, W) in [-1, 1]; latents (B, z, t, h, w) with t = (F - 1) / 4 + 1, h = H / 8, w = W / 8.
The convolutions never look ahead in time, but GroupNorm in the 3D blocks averages over time, so the network as a
whole is not strictly causal, and a clip coded in tiles differs slightly from one coded whole (see vae_tiling.py).
Parameter names follow the reference checkpoint: 248 tensors at full size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import VAEConfig


class CausalConv3d(nn.Module):
    """Conv3d that sees the present and the past only: the first frame is repeated kt - 1 times in front."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int | tuple[int, int, int],
        *,
        stride: int = 1,
        pad_space: bool = True,
        ops: Any,
        **factory: Any,
    ) -> None:
        super().__init__()
        kt, kh, kw = (kernel,) * 3 if isinstance(kernel, int) else kernel
        self.time_pad = kt - 1
        space = (kh // 2, kw // 2) if pad_space else (0, 0)
        self.conv = ops.Conv3d(c_in, c_out, (kt, kh, kw), stride=stride, padding=(0, *space), **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.time_pad:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.time_pad, -1, -1), x], dim=2)
        return self.conv(x)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, plus the (projected) input. ``dims`` = 2: each frame alone; 3: frames jointly."""

    def __init__(self, c_in: int, c_out: int, dims: int, config: VAEConfig, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        conv = _conv2d if dims == 2 else CausalConv3d
        self.dims = dims
        self.norm1 = _group_norm(c_in, config, ops, factory)
        self.conv1 = conv(c_in, c_out, 3, ops=ops, **factory)
        self.norm2 = _group_norm(c_out, config, ops, factory)
        self.conv2 = conv(c_out, c_out, 3, ops=ops, **factory)
        self.nin_shortcut = conv(c_in, c_out, 1, ops=ops, **factory) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.dims == 2 and x.ndim == 5:
            return _per_frame(self, x)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head attention over the pixels of each frame (AttnBlock3DFix)."""

    def __init__(self, channels: int, config: VAEConfig, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.norm = _group_norm(channels, config, ops, factory)
        self.q, self.k, self.v, self.proj_out = (
            CausalConv3d(channels, channels, 1, ops=ops, **factory) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (rearrange(f(n), "b c t h w -> (b t) 1 (h w) c") for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        b, _, _, h, w = x.shape
        return x + self.proj_out(rearrange(out, "(b t) 1 (h w) c -> b c t h w", b=b, h=h, w=w))


class Downsample(nn.Module):
    """Half the height and width, each frame alone."""

    def __init__(self, channels: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, stride=2, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 5:
            return _per_frame(self, x)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class SpaceTimeDownsample(nn.Module):
    """Half the height, width and frame count (Spatial2xTime2x3DDownsample); an odd count 2n + 1 becomes n + 1."""

    def __init__(self, channels: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2, pad_space=False, ops=ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1, 0, 0)))


class SpaceUpsample(nn.Module):
    """Double the height and width (SpatialUpsample2x)."""

    def __init__(self, channels: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, (1, 3, 3), ops=ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))


class SpaceTimeUpsample(nn.Module):
    """Double height and width, and turn n + 1 frames into 2n + 1 (Spatial2xTime2x3DUpsample)."""

    def __init__(self, channels: int, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, ops=ops, **factory)

    def forward(self, x: Tensor) -> Tensor:
        # The first frame stands for itself alone; only the others are doubled in time.
        first, rest = x[:, :, :1], x[:, :, 1:]
        up = F.interpolate(first, scale_factor=(1, 2, 2), mode="trilinear")
        if rest.shape[2]:
            up = torch.cat([up, F.interpolate(rest, scale_factor=(2, 2, 2), mode="trilinear")], dim=2)
        return self.conv(up)


class Middle(nn.Module):
    """Two residual blocks around one attention block, at the lowest resolution."""

    def __init__(self, channels: int, config: VAEConfig, **build: Any) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, 3, config, **build)
        self.attn_1 = SpatialAttention(channels, config, **build)
        self.block_2 = ResnetBlock(channels, channels, 3, config, **build)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels to 2 z channels. The two upper levels are 2D, the two lower ones 3D."""

    def __init__(self, config: VAEConfig, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        build = {"ops": ops, **factory}
        channels = config.channels
        self.conv_in = _conv2d(3, channels[0], 3, **build)
        self.down = nn.ModuleList()
        c_in = channels[0]
        for level, c_out in enumerate(channels):
            dims = 2 if level < 2 else 3
            stage = nn.Module()
            stage.block = nn.ModuleList(
                ResnetBlock(c_in if i == 0 else c_out, c_out, dims, config, **build)
                for i in range(config.num_res_blocks)
            )
            if level < 3:
                stage.downsample = (Downsample if level == 0 else SpaceTimeDownsample)(c_out, **build)
            self.down.append(stage)
            c_in = c_out
        self.mid = Middle(c_in, config, **build)
        self.norm_out = _group_norm(c_in, config, ops, factory)
        self.conv_out = CausalConv3d(c_in, 2 * config.z_channels, 3, **build)

    def forward(self, x: Tensor) -> Tensor:
        h = _per_frame(self.conv_in, x)
        for stage in self.down:
            for block in stage.block:  # pyright: ignore[reportGeneralTypeIssues]
                h = block(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)  # pyright: ignore[reportCallIssue]
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to pixels. ``up`` is indexed by level as in the checkpoint, and runs from level 3 to level 0."""

    def __init__(self, config: VAEConfig, *, ops: Any, **factory: Any) -> None:
        super().__init__()
        build = {"ops": ops, **factory}
        channels = config.channels
        self.conv_in = CausalConv3d(config.z_channels, channels[-1], 3, **build)
        self.mid = Middle(channels[-1], config, **build)
        stages = []
        c_in = channels[-1]
        for level in (3, 2, 1, 0):
            c_out = channels[level]
            stage = nn.Module()
            stage.block = nn.ModuleList(
                ResnetBlock(c_in if i == 0 else c_out, c_out, 3, config, **build)
                for i in range(config.num_res_blocks + 1)
            )
            if level > 0:
                stage.upsample = (SpaceUpsample if level == 1 else SpaceTimeUpsample)(c_out, **build)
            stages.insert(0, stage)
            c_in = c_out
        self.up = nn.ModuleList(stages)
        self.norm_out = _group_norm(c_in, config, ops, factory)
        self.conv_out = CausalConv3d(c_in, 3, 3, **build)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            for block in stage.block:  # pyright: ignore[reportGeneralTypeIssues]
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)  # pyright: ignore[reportCallIssue]
        return self.conv_out(F.silu(self.norm_out(h)))


class CausalVAE(nn.Module):
    """Encoder, decoder and the two 1x1x1 convolutions around the latent. `config.LATENT_SCALE` is the caller's."""

    def __init__(
        self, config: VAEConfig, *, dtype: torch.dtype | None = None, device: Any = None, operations: Any = nn
    ) -> None:
        super().__init__()
        build = {"ops": operations, "dtype": dtype, "device": device}
        self.config = config
        self.encoder = Encoder(config, **build)
        self.decoder = Decoder(config, **build)
        self.quant_conv = CausalConv3d(2 * config.z_channels, 2 * config.embed_dim, 1, **build)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.z_channels, 1, **build)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clamped to -30..20) of the latent of pixels ``x``, each (B, z, t, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] to the mean latent (B, z, t, h, w), unscaled."""
        return self.moments(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, z, t, h, w) to pixels (B, 3, 4 (t - 1) + 1, 8 h, 8 w), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


def _conv2d(c_in: int, c_out: int, kernel: int, *, ops: Any, **factory: Any) -> nn.Module:
    return ops.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **factory)


def _group_norm(channels: int, config: VAEConfig, ops: Any, factory: dict[str, Any]) -> nn.Module:
    return ops.GroupNorm(config.norm_num_groups, channels, eps=1e-6, **factory)


def _per_frame(module: nn.Module, x: Tensor) -> Tensor:
    frames = x.shape[2]
    return rearrange(module(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=frames)
