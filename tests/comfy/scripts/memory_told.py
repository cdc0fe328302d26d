"""What ComfyUI is told that Open-Sora-Plan's parts need, beside what a counter finds them to hold. Prints JSON."""

import json
from dataclasses import replace

from host import call, load_pack, of_pack, torch  # isort: skip

import comfy.model_management as mm  # isort: skip

pack = load_pack()
mm.xformers_enabled = lambda: True  # attention is one kernel, as on a GPU
LiveBytes = of_pack("training.live_bytes").LiveBytes
config = of_pack("models.opensora_plan.config")
transformer = of_pack("models.opensora_plan.transformer").OpenSoraT2V
causal_vae = of_pack("models.opensora_plan.vae").CausalVAE
meta = {"device": "meta", "dtype": torch.bfloat16}


def fused(q, k, v, heads, mask=None, **_):
    return torch.empty_like(q)  # a kernel holds its result alone


def counted(run, *shapes):
    with torch.inference_mode(), LiveBytes() as held:
        run(*(torch.empty(shape, **meta) for shape in shapes))
    return held.peak


facts = {}
(model,) = call(pack["EVDiTModelLoader"], model_name="tiny (built in)", weight_dtype="default")
network = transformer(replace(config.OSP_29X720P, num_layers=2), attention=fused, **meta).eval()
for shape in ((1, 4, 8, 90, 160), (2, 4, 8, 90, 160), (1, 4, 24, 90, 160)):
    held = counted(network, shape, shape[:1], (shape[0], 64, network.config.caption_channels))
    told = model.model.memory_required(shape) * torch.bfloat16.itemsize / model.model.get_dtype().itemsize
    facts[f"transformer {shape}"] = held, told
(vae,) = call(pack["EVDiTVAELoader"], vae_name="tiny (built in)")
vae._describe(config.VAEConfig())
real = causal_vae(config.VAEConfig(), **meta).eval()
for shape in ((1, 4, 8, 32, 32), (1, 4, 3, 64, 48)):
    pixels = (1, 3, 4 * shape[2] - 3, 8 * shape[3], 8 * shape[4])
    facts[f"decode {shape}"] = counted(real.decode, shape), vae.memory_used_decode(shape, torch.bfloat16)
    facts[f"encode {shape}"] = counted(real.encode, pixels), vae.memory_used_encode(pixels, torch.bfloat16)
print(json.dumps(facts))
