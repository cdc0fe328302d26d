"""A tiny Wan that ComfyUI's InfiniteTalk node lets speak, sparse on either side of that node. Prints JSON."""

import importlib.util
import json
import sys
from dataclasses import replace

from host import call, load_pack, log_lines, refusal, torch  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.ops  # isort: skip
import comfy.samplers  # isort: skip
from tiny_models import CASES, WAN, build, noise, vision  # isort: skip

if importlib.util.find_spec("comfy.ldm.wan.model_multitalk") is None:
    print(json.dumps({"skipped": "this ComfyUI has no InfiniteTalk"}))
    sys.exit()

from comfy_extras.nodes_model_patch import MultiTalkModelPatch  # isort: skip
from comfy_extras.nodes_wan import WanInfiniteTalkToVideo  # isort: skip

OVERRIDE = "optimized_attention_override"
FRAMES, SIZE, DIM = 5, 6, 80  # the audio's attention has 40 heads
pack = load_pack()
(plans,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
(sharding,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.parallel.sharding"))
lines = log_lines()


class Encoder:
    """Stands in for the VAE: noise of the size that it would give."""

    def encode(self, images):
        return noise(1, 16, (images.shape[0] - 1) // 4 + 1, images.shape[1] // 8, images.shape[2] // 8)


def audio_patch():
    module = MultiTalkModelPatch(
        intermediate_dim=16,
        in_dim=DIM,
        context_tokens=4,
        num_layers=3,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=max(parameter[0].numel(), 1) ** -0.5)
    return comfy.model_patcher.ModelPatcher(module, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


model, patch = (
    build(replace(CASES["wan i2v"], settings={**WAN, "model_type": "i2v", "in_dim": 36, "dim": DIM})),
    audio_patch(),
)
text = [[noise(1, 7, 32), {}]]


def speech(seed):
    return {"encoded_audio_all_layers": [noise(1, 40, 768) * 0.1 * seed for _ in range(13)]}


def speaking(source, speakers):
    """The MODEL and the conditioning that ComfyUI's node gives."""
    mode, left = {"mode": "single_speaker"}, torch.zeros(1, 32, 48)
    if speakers == 2:
        left[..., :24] = 1.0
        mode = {"mode": "two_speakers", "audio_encoder_output_2": speech(2), "mask_1": left, "mask_2": 1.0 - left}
    return WanInfiniteTalkToVideo.execute(
        mode, source, patch, text, text, Encoder(), 48, 32, 17, speech(1), 9, start_image=noise(1, 32, 48, 3).abs(), audio_scale=1.0,
        clip_vision_output=vision(9, 1280),
    ).args[:2]  # fmt: skip


def run(chosen, cond):
    lines.clear()
    guider = comfy.samplers.CFGGuider(chosen)
    guider.set_conds(cond, cond)
    guider.set_cfg(1.0)
    sigmas = comfy.samplers.calculate_sigmas(chosen.get_model_object("model_sampling"), "simple", 2)
    x = noise(1, 16, FRAMES, 4, 6)
    with torch.inference_mode():
        return guider.sample(
            x, torch.zeros_like(x), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
        )


def sparse(source):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0}
    return call(pack["EVDiTSparseAttention"], model=source, plan=plans.TilePlan.uniform(1), **settings)[0]


def oracle(func, q, k, v, heads, *args, **kwargs):
    """The whole mask with frame 0 as the reference frame, in float64."""
    if q.shape != k.shape:
        return func(q, k, v, heads, *args, **kwargs)
    frame = torch.arange(FRAMES).repeat_interleave(SIZE)
    live = (frame[:, None] == frame) | (frame[:, None] == 0) | (frame == 0)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2).double() for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~live, float("-inf")).softmax(-1) @ v).float().transpose(1, 2).flatten(-2)


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


patched = model.clone()
patched.set_model_patch(lambda args: args, "double_block")
facts = {
    "sharding": [
        refusal(lambda chosen=chosen: sharding.find_shardable(chosen))
        for chosen in (model, speaking(model, 1)[0], speaking(model, 2)[0], patched)
    ]
}
for speakers in (1, 2):
    source, cond = speaking(model, speakers)
    judge = source.clone()
    judge.model_options["transformer_options"][OVERRIDE] = oracle
    want, dense = run(judge, cond), run(source, cond)
    silent = run(model, cond)
    behind = run(sparse(source), cond)
    said = list(lines)
    before = run(speaking(sparse(model), speakers)[0], cond)
    facts[str(speakers)] = {"behind": distance(behind, want), "before": distance(before, want), "dense": distance(dense, want),
                            "speech": distance(dense, silent), "lines": said + lines}  # fmt: skip
print(json.dumps(facts))
