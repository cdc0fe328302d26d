import pytest
import torch
import torch.nn.functional as F

from efficient_vdit_core.models.opensora_plan import vae_tiling
from efficient_vdit_core.models.opensora_plan.config import OSP_VAE, VAEConfig
from efficient_vdit_core.models.opensora_plan.vae import (
    CausalConv3d,
    CausalVAE,
    ResnetBlock,
    SpaceTimeUpsample,
    SpatialAttention,
)

SMALL = VAEConfig(hidden_size=4, hidden_size_mult=(1, 1, 2, 2), num_res_blocks=1, norm_num_groups=2)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return CausalVAE(SMALL).eval().requires_grad_(False)


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (5, 2), (29, 8), (93, 24)])
def test_lengths(vae, frames, latent):
    z = vae.encode(torch.randn(1, 3, frames, 16, 24))
    assert z.shape == (1, 4, latent, 2, 3)
    assert vae.decode(z).shape == (1, 3, frames, 16, 24)


def test_causal_convolution_repeats_the_first_frame():
    conv = CausalConv3d(2, 3, 3, ops=torch.nn)
    x = torch.randn(1, 2, 4, 5, 5)
    padded = F.pad(x, (1, 1, 1, 1))
    want = [
        sum(F.conv2d(padded[:, :, max(0, t - 2 + i)], conv.conv.weight[:, :, i]) for i in range(3)) for t in range(4)
    ]
    torch.testing.assert_close(
        conv(x), torch.stack(want, dim=2) + conv.conv.bias.view(1, -1, 1, 1, 1), atol=1e-5, rtol=1e-5
    )


def test_2d_blocks_see_each_frame_alone_and_3d_blocks_do_not():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 6, 6)
    changed = x.clone()
    changed[:, :, 2] *= 3
    flat, joint = (ResnetBlock(4, 4, dims, SMALL, ops=torch.nn) for dims in (2, 3))
    torch.testing.assert_close(flat(changed)[:, :, :2], flat(x)[:, :, :2])
    assert (joint(changed)[:, :, 0] - joint(x)[:, :, 0]).abs().max() > 1e-3  # GroupNorm averages over time


def test_attention_is_within_a_frame():
    torch.manual_seed(0)
    block = SpatialAttention(4, SMALL, ops=torch.nn)
    x = torch.randn(2, 4, 3, 2, 5)
    n = block.norm(x)
    want = x.clone()
    for b in range(2):
        for t in range(3):
            q, k, v = (f(n)[b, :, t].flatten(1).T for f in (block.q, block.k, block.v))
            rows = (q @ k.T / 4**0.5).softmax(-1) @ v
            want[b, :, t] += (
                block.proj_out.conv.weight[:, :, 0, 0, 0] @ rows.T + block.proj_out.conv.bias[:, None]
            ).view(4, 2, 5)
    torch.testing.assert_close(block(x), want, atol=1e-5, rtol=1e-5)


def test_upsampling_keeps_the_first_frame_to_itself():
    block = SpaceTimeUpsample(2, ops=torch.nn)
    block.conv = torch.nn.Identity()
    x = torch.randn(1, 2, 3, 2, 2)
    out = block(x)
    assert out.shape == (1, 2, 5, 4, 4)
    changed = x.clone()
    changed[:, :, 1:] += 1
    assert torch.equal(block(changed)[:, :, 0], out[:, :, 0])


@pytest.mark.parametrize(
    ("frames", "chunks"),
    [
        (1, [(0, 1)]),
        (8, [(0, 8)]),
        (15, [(0, 8), (7, 15)]),
        (16, [(0, 8), (7, 15), (14, 16)]),
        (22, [(0, 8), (7, 15), (14, 22)]),
        (24, [(0, 8), (7, 15), (14, 22), (21, 24)]),
    ],
)
def test_latent_chunks(frames, chunks):
    assert vae_tiling.latent_chunks(frames) == chunks
    lengths = [4 * (b - a - 1) + 1 for a, b in chunks]
    assert sum(lengths) - (len(chunks) - 1) == 4 * (frames - 1) + 1


def test_pixel_chunks():
    assert vae_tiling.pixel_chunks(93) == [(0, 29), (28, 57), (56, 85), (84, 93)]
    assert vae_tiling.pixel_chunks(29) == [(0, 29)]
    assert vae_tiling.pixel_chunks(9, 1) == [(0, 5), (4, 9)], "no chunk has less than two latents"


def test_latent_chunks_of_any_size():
    for size in (1, 2, 8):
        assert vae_tiling.latent_chunks(1, size) == [(0, 1)]
    assert vae_tiling.latent_chunks(3, 1) == [(0, 2), (1, 3)]


def test_one_tile_equals_no_tiling(vae):
    z = torch.randn(1, 4, 3, 4, 4)
    assert torch.equal(vae_tiling.tiled_decode(vae, z), vae.decode(z))
    x = torch.randn(1, 3, 9, 32, 32)
    assert torch.equal(vae_tiling.tiled_encode(vae, x), vae.encode(x))


@pytest.mark.parametrize(("t", "h", "w"), [(5, 11, 9), (9, 8, 20), (4, 16, 3)])
def test_tiles_give_the_whole_size(vae, t, h, w):
    z = torch.randn(1, 4, t, h, w)
    out = vae_tiling.tiled_decode(vae, z, latent_size=8, latent_frames=4)
    assert out.shape == (1, 3, 4 * (t - 1) + 1, 8 * h, 8 * w)
    assert vae_tiling.tiled_encode(vae, out, latent_size=8, latent_frames=4).shape == z.shape


class Upscaler:
    """Stands for a decoder without edge effects, so that tiling must leave no trace."""

    def decode(self, z):
        return (
            F.interpolate(z.mean(1, keepdim=True)[:, :, 0], scale_factor=8, mode="nearest")[:, :, None]
            .expand(-1, 3, -1, -1, -1)
            .clone()
        )


@pytest.mark.parametrize("size", [8, 12, 20, 28, 64])  # ComfyUI's node offers every 32 pixels
def test_blending_is_continuous(size):
    z = torch.linspace(0, 1, 200).view(1, 1, 1, 1, 200).expand(1, 4, 1, 90, 200)
    want = Upscaler().decode(z)
    torch.testing.assert_close(vae_tiling.tiled_decode(Upscaler(), z, latent_size=size), want)


@pytest.mark.parametrize("size", [8, 12, 20])
def test_encoded_tiles_meet(size):
    class Shrinker:
        def encode(self, x):
            return F.avg_pool3d(x, (1, 8, 8))

    x = torch.linspace(0, 1, 320).view(1, 1, 1, 1, 320).expand(1, 3, 1, 120, 320)
    torch.testing.assert_close(vae_tiling.tiled_encode(Shrinker(), x, latent_size=size), Shrinker().encode(x))


def test_a_step_between_tiles_is_cross_faded():
    class Constant:
        calls = 0

        def decode(self, z):
            Constant.calls += 1
            return torch.full((1, 3, 1, 8 * z.shape[-2], 8 * z.shape[-1]), float(Constant.calls))

    line = vae_tiling.tiled_decode(Constant(), torch.zeros(1, 4, 1, 64, 100))[0, 0, 0, 0]
    assert line[:448].eq(1).all() and line[512:].eq(2).all()
    torch.testing.assert_close(line[448:512], 1 + torch.arange(64) / 64)


def test_config():
    assert VAEConfig.from_dict(OSP_VAE.to_dict()) == OSP_VAE
    assert VAEConfig.from_dict({**OSP_VAE.to_dict(), "lossconfig": {}, "lr": 1e-5}) == OSP_VAE
    assert VAEConfig.from_dict({"encoder_mid_resnet": "ResnetBlock3D_GC"}) == OSP_VAE
    with pytest.raises(ValueError, match="decoder_temporal_upsample"):
        VAEConfig.from_dict({"decoder_temporal_upsample": ["", "", "TimeUpsampleRes2x", "TimeUpsampleRes2x"]})
    with pytest.raises(ValueError, match="norm_num_groups"):
        VAEConfig(hidden_size=40)
