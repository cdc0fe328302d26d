"""A trained VAE that is given more latent channels and more layers. It encodes and decodes as it did until it is trained further:
the decoder does not listen to the further channels yet, and the further blocks add nothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ...models.opensora_plan.vae import CausalVAE, ResnetBlock

# Of the variance of the further channels: far below that of any latent.
_LOG_VARIANCE = -12.0


@torch.no_grad()
def grown(vae: CausalVAE, channels: int | None = None, res_blocks: int | None = None) -> CausalVAE:
    """``vae`` with so many latent channels, its own coming first, and so many residual blocks in each stage of the encoder,
    one more in the decoder's; without a number as many as it has. Raises ValueError where it has more."""
    had, has = vae.config.embed_dim, vae.config.num_res_blocks
    channels, res_blocks = channels or had, res_blocks or has
    if channels < had or res_blocks < has:
        raise ValueError(
            f"The VAE to go on from has {had} latent channels and {has} residual blocks a stage, and {channels} and {res_blocks} "
            "are asked for. Ask for as many or more: what is trained cannot be left out."
        )
    new = CausalVAE(replace(vae.config, z_channels=channels, embed_dim=channels, num_res_blocks=res_blocks))
    weights = vae.state_dict()
    for name, module in new.named_modules():
        if isinstance(module, ResnetBlock) and f"{name}.norm1.weight" not in weights:
            for last in module.conv2.parameters():
                last.zero_()
    if channels == had:
        new.load_state_dict({**new.state_dict(), **weights})
        return new

    both = [*range(had), *range(channels, channels + had)]  # means, then logarithms of variances
    encoder_out, decoder_in = new.encoder.conv_out.conv, new.decoder.conv_in.conv
    of_encoder, of_decoder = vae.encoder.conv_out.conv, vae.decoder.conv_in.conv
    means = encoder_out.weight[:channels]
    means *= of_encoder.weight[:had].square().mean().sqrt() / means.square().mean().sqrt()
    encoder_out.weight[channels:] = 0
    encoder_out.bias[:channels], encoder_out.bias[channels:] = 0, _LOG_VARIANCE
    encoder_out.weight[both], encoder_out.bias[both] = of_encoder.weight, of_encoder.bias
    decoder_in.weight.zero_()
    decoder_in.weight[:, :had], decoder_in.bias[:] = of_decoder.weight, of_decoder.bias
    _put_into_identity(new.quant_conv.conv, vae.quant_conv.conv, both)
    _put_into_identity(new.post_quant_conv.conv, vae.post_quant_conv.conv, both[:had])
    resized = ("encoder.conv_out.", "decoder.conv_in.", "quant_conv.", "post_quant_conv.")
    new.load_state_dict({**new.state_dict(), **{k: v for k, v in weights.items() if not k.startswith(resized)}})
    return new


def _put_into_identity(conv: nn.Conv3d, old: nn.Conv3d, place: list[int]) -> None:
    """Let a 1x1x1 convolution mix the channels at ``place`` as ``old`` does and leave the others as they are."""
    bias: Tensor | None = conv.bias
    assert bias is not None and old.bias is not None
    conv.weight.zero_()
    conv.weight.view(conv.weight.shape[:2]).fill_diagonal_(1)
    index = torch.tensor(place)
    conv.weight[index[:, None], index] = old.weight
    bias.zero_()
    bias[index] = old.bias
