"""The weights of a random MiniMax-H3 of 2 layers, in the names that ComfyUI's loader recognises it by."""

import torch

WIDTH, HEADS, HEAD_DIM, FFN, TIME, TEXT, FREQUENCIES = 48, 2, 32, 96, 24, 32, 4


def tiny_h3(layers: int = 2) -> dict[str, torch.Tensor]:
    random, found = torch.Generator().manual_seed(0), {}

    def linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> None:
        found[f"{name}.weight"] = torch.randn(outputs, inputs, generator=random) * inputs**-0.5
        if bias:
            found[f"{name}.bias"] = torch.randn(outputs, generator=random) * 0.05

    def block(name: str) -> None:
        linear(f"{name}.attn.qkv_proj", 3 * HEADS * HEAD_DIM, WIDTH, bias=False)
        linear(f"{name}.attn.out_proj", WIDTH, HEADS * HEAD_DIM, bias=False)
        linear(f"{name}.mlp.fc1", 2 * FFN, WIDTH, bias=False)
        linear(f"{name}.mlp.fc2", WIDTH, FFN, bias=False)
        for norm, size in (("norm1", WIDTH), ("norm2", WIDTH), ("attn.q_norm", HEAD_DIM), ("attn.k_norm", HEAD_DIM)):
            found[f"{name}.{norm}.weight"] = torch.ones(size)

    linear("video_patch_proj", WIDTH, 24 * 4)
    linear("audio_patch_proj", WIDTH, 32)
    linear("condition_proj", WIDTH, TEXT)
    linear("time_embedder.proj_in", WIDTH, 32)
    linear("time_embedder.proj_out", TIME, WIDTH)
    found["rope.inv_freq"] = 10000.0 ** -(torch.arange(FREQUENCIES) / FREQUENCIES)
    block("token_refiner.blocks.0")
    found["token_refiner.final_norm.weight"] = torch.ones(WIDTH)
    for layer in range(layers):
        block(f"blocks.{layer}")
        linear(f"blocks.{layer}.adaln_proj.linear", 6 * WIDTH * 3, TIME)
    found["final_layer.norm.weight"] = torch.ones(WIDTH)
    linear("final_layer.adaln_proj.linear", 2 * WIDTH, TIME)
    linear("final_layer.video_out", 24 * 4, WIDTH)
    linear("final_layer.audio_out", 32, WIDTH)
    return found


def tiny_h3_lora(rank: int = 2) -> dict[str, torch.Tensor]:
    """For the projection of the text, which ComfyUI applies before the steps, and for the first layer."""
    random, found = torch.Generator().manual_seed(5), {}
    sizes = {"condition_proj": (WIDTH, TEXT), "blocks.0.attn.qkv_proj": (3 * HEADS * HEAD_DIM, WIDTH)}
    for name, (outputs, inputs) in sizes.items():
        found[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=random) * 0.3
        found[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=random) * 0.3
    return found
