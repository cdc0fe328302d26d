"""An empty latent of another family's node, which ComfyUI's samplers take to the model's own size. Prints JSON."""

import json

from host import call, load_pack, nodes, skip, torch  # isort: skip
from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo  # isort: skip
from tiny_models import CASES, build, noise  # isort: skip

if not hasattr(EmptyHunyuanLatentVideo, "execute"):
    skip("this ComfyUI takes no latent to another model's size")
pack, model, sizes = load_pack(), build(CASES["ltx"]), []
model.model.diffusion_model.register_forward_pre_hook(lambda _, given: sizes.append(list(given[0].shape)))
text = noise(1, *CASES["ltx"].text)
cond = [[text, {"frame_rate": 25, "attention_mask": torch.ones(1, text.shape[1])}]]
given = {
    "model": model,
    "positive": cond,
    "latent": EmptyHunyuanLatentVideo.execute(256, 128, 33, 1).args[0],
    "seed": 0,
}
made = {
    "sampled": lambda: nodes.KSampler().sample(model, 0, 1, 1.0, "euler", "simple", cond, cond, given["latent"]),
    "searched": lambda: call(
        pack["EVDiTSearchTilePlan"], **given, probes=1, threshold=0.2, target_speedup=0.0, candidates="1"
    ),
    "mapped": lambda: call(pack["EVDiTAttentionTileMap"], **given, layers="0", percent=0.0, rows=8),
}
found = {}
with torch.inference_mode():
    for name, make in made.items():
        sizes.clear()
        make()
        found[name] = sizes[-1]
print(json.dumps(found))
