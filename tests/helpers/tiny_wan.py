"""A small Wan 2.1 as a file that ComfyUI loads."""

import torch


def tiny_wan(width=256, layers=2):
    """The weights of a random Wan 2.1 in the names that ComfyUI's loader recognises it by."""
    shapes = {
        "patch_embedding": (width, 16, 1, 2, 2),
        "text_embedding.0": (width, 4096),
        "text_embedding.2": (width, width),
    }
    shapes |= {
        "time_embedding.0": (width, 256),
        "time_embedding.2": (width, width),
        "time_projection.1": (6 * width, width),
    }
    shapes |= {"head.head": (64, width)}
    norms = {}
    for layer in range(layers):
        for part in ("self_attn", "cross_attn"):
            shapes |= {f"blocks.{layer}.{part}.{name}": (width, width) for name in "qkvo"}
            norms |= {f"blocks.{layer}.{part}.norm_{name}": width for name in "qk"}
        shapes |= {f"blocks.{layer}.ffn.{i}": (width, width) for i in (0, 2)}
        norms |= {f"blocks.{layer}.norm3": width}
    random = torch.Generator().manual_seed(0)
    found = {"head.modulation": torch.randn(1, 2, width, generator=random)}
    found |= {f"blocks.{i}.modulation": torch.randn(1, 6, width, generator=random) / 4 for i in range(layers)}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = torch.randn(shape, generator=random) * 0.05
        found[f"{name}.bias"] = torch.randn(shape[0], generator=random) * 0.05
    for name, size in norms.items():
        found[f"{name}.weight"] = torch.ones(size)
        found |= {f"{name}.bias": torch.zeros(size)} if name.endswith("norm3") else {}
    return found
