"""A tiny random Wan of ComfyUI's own class: sparse through the node against a masked-oracle run. Prints JSON."""

import json

from host import call, load_pack, torch  # isort: skip
import comfy.model_management as mm  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.supported_models  # isort: skip
import comfy.sd  # isort: skip

pack = load_pack()
settings = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "num_heads": 2, "num_layers": 3, "ffn_dim": 96, "patch_size": (1, 2, 2),
    "freq_dim": 32, "in_dim": 16, "out_dim": 16, "text_dim": 32, "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True,
    "eps": 1e-6,
}  # fmt: skip
config = comfy.supported_models.WAN21_T2V(settings)
config.set_inference_dtype(torch.float32, None)
base = config.get_model({}, "", device="cpu")
for parameter in base.diffusion_model.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
model = comfy.model_patcher.ModelPatcher(base, load_device=mm.get_torch_device(), offload_device=torch.device("cpu"))


def forward(patcher, x, text):
    """One evaluation as the sampler does it, hooks and all."""
    import comfy.patcher_extension

    options = comfy.model_patcher.create_model_options_clone(patcher.model_options)["transformer_options"]
    options = {**options, "wrappers": {}, "callbacks": {}}
    for kind, by_key in patcher.wrappers.items():
        options["wrappers"][kind] = {key: list(found) for key, found in by_key.items()}
    options["sigmas"] = torch.tensor([0.7])
    with torch.no_grad():
        return base.apply_model(x, torch.tensor([0.7]), c_crossattn=text, transformer_options=options)


def masked(frames, size, references):
    """An override that builds the N x N mask and takes a float64 softmax."""
    frame = torch.arange(frames * size) // size
    refers = torch.isin(frame, torch.tensor(references))
    live = (frame[:, None] == frame) | refers[:, None] | refers

    def override(func, q, k, v, heads, *args, **kwargs):
        if q.shape != k.shape:
            return func(q, k, v, heads, *args, **kwargs)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2).double() for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return (scores.masked_fill(~live, float("-inf")).softmax(-1) @ v).float().transpose(1, 2).flatten(-2)

    return override


facts = {}
for name, (t, h, w), k, references in (("even", (6, 8, 8), 2, [0, 3]), ("odd", (5, 7, 9), 1, [0])):
    x, text = torch.randn(2, 16, t, h, w), torch.randn(2, 7, 32)
    (plan,) = call(pack["EVDiTTilePlan"], reference_frames=k)
    choices = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0}
    (sparse,) = call(pack["EVDiTSparseAttention"], model=model, plan=plan, **choices)
    judge = model.clone()
    size = -(-h // 2) * -(-w // 2)
    judge.model_options["transformer_options"]["optimized_attention_override"] = masked(t, size, references)
    got, want, dense = forward(sparse, x, text), forward(judge, x, text), forward(model, x, text)
    facts[name] = {
        "error": float((got - want).abs().max() / want.abs().max()),
        "sparsity_effect": float((want - dense).abs().max() / want.abs().max()),
    }
print(json.dumps(facts))
