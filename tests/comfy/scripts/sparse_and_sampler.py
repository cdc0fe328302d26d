"""Facts about the built-in model in ComfyUI: plans, hooks, the untouched source model, samplers. Prints JSON."""

import copy
import json
import sys

from host import call, load_pack, sample, torch  # isort: skip
import comfy.k_diffusion.sampling as k_diffusion  # isort: skip
import comfy.samplers  # isort: skip

pack = load_pack()
(model,) = call(pack["EVDiTModelLoader"], model_name="tiny (built in)", weight_dtype="default")
noise = torch.randn(1, 4, 8, 8, 8)
text, mask = torch.randn(1, 9, 64), torch.ones(1, 9, dtype=torch.long)
no_words = torch.zeros_like(mask)
(sigmas,) = call(pack["EVDiTConsistencySigmas"], model=model, segments=4, steps=4)
euler = comfy.samplers.sampler_object("euler")


def patched(k, source=model, **changes):
    (plan,) = call(pack["EVDiTTilePlan"], reference_frames=k)
    choices = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **changes}
    return call(pack["EVDiTSparseAttention"], model=source, plan=plan, **choices)[0]


def run(chosen, sampler=euler, mask=mask):
    return sample(chosen, sampler, sigmas, noise, text, mask)


def difference(a, b):
    return float((a - b).abs().max())


weights_before = {k: v.clone() for k, v in model.model.state_dict().items()}
options_before = copy.deepcopy(model.model_options)
dense = run(model)
sparse = run(patched(1))
facts = {
    "all frames equal dense": difference(run(patched(8)), dense),
    "one frame differs": difference(sparse, dense),
    "all layers dense equal dense": difference(run(patched(1, dense_blocks="0-5")), dense),
    "min_tokens keeps dense": difference(run(patched(1, min_tokens=129)), dense),
    "some layers dense differ": min(difference(run(patched(1, dense_blocks="0-2,-1")), x) for x in (dense, sparse)),
    "half the steps differ": min(difference(run(patched(1, end_percent=0.5)), x) for x in (dense, sparse)),
    "source after all": difference(run(model), dense),
    "source weights same": all(torch.equal(v, weights_before[k]) for k, v in model.model.state_dict().items()),
    "source options same": repr(model.model_options) == repr(options_before),
    "no words, all frames equal dense": difference(run(patched(8), mask=no_words), run(model, mask=no_words)),
    "shifts across 4 steps": float((dense - noise).abs().max()),
}

calls = []


def other(func, q, k, v, *args, **kwargs):
    calls.append(q.shape)
    return func(q, k, v, *args, **kwargs)


chained = model.clone()
chained.model_options["transformer_options"]["optimized_attention_override"] = other
facts["chained equals alone"] = difference(run(patched(1, chained)), sparse)
facts["chained calls"] = len(calls)


# The stock sampler is handed the very noise that ours draws.
(fresh_noise,) = (
    m.fresh_noise for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.sampling.consistency")
)


def lcm(chosen, x, levels, extra_args=None, callback=None, disable=None, **_):
    def noise(sigma, sigma_next):
        return fresh_noise(x, 0, float(sigma_next))

    return k_diffusion.sample_lcm(chosen, x, levels, extra_args, callback, disable, noise_sampler=noise)


def ours(gamma):
    (sampler,) = call(pack["EVDiTConsistencySampler"], gamma=gamma, noise_seed=0)
    return sampler


facts["gamma 0 against euler"] = difference(run(model, ours(0.0)), dense)
facts["gamma 1 against lcm"] = difference(run(model, ours(1.0)), run(model, comfy.samplers.KSAMPLER(lcm)))
facts["gamma 0.5 differs"] = min(difference(run(model, ours(0.5)), run(model, ours(g))) for g in (0.0, 1.0))
print(json.dumps(facts))
