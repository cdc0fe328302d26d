"""Sparse Attention beside nodes that take attention, blocks or the network's class into their own hands, on tiny models:
small stand-ins of the ways of KJNodes, WaveSpeed and RES4LYF. Prints JSON."""

import json
import sys
import types
from unittest import mock

from host import call, load_pack, log_lines, refusal, torch  # isort: skip
import comfy.samplers  # isort: skip
from tiny_models import CASES, build, inputs, missing  # isort: skip

OVERRIDE = "optimized_attention_override"
pack = load_pack()
(plans,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
lines = log_lines()


def sparse(source, **changes):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, "decline_slow": False}
    return call(pack["EVDiTSparseAttention"], model=source, plan=plans.TilePlan.uniform(1), **{**settings, **changes})[
        0
    ]


def run(chosen, case, steps=2):
    lines.clear()
    start, prompt, mask = inputs(case)
    guider = comfy.samplers.CFGGuider(chosen)
    guider.set_conds(prompt, prompt)
    guider.set_cfg(1.0)
    sigmas = comfy.samplers.calculate_sigmas(chosen.get_model_object("model_sampling"), "simple", steps)
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        empty = start - start if start.is_nested else torch.zeros_like(start)
        out = guider.sample(start, empty, sampler, sigmas, mask, disable_pbar=True, seed=0)
    return torch.cat([part.flatten() for part in out.unbind()]) if out.is_nested else out


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def tile_map(source, case, layers="0"):
    about = {"positive": inputs(case)[1], "latent": {"samples": inputs(case)[0]}, "percent": 0.3, "seed": 0, "rows": 4}
    return refusal(lambda: call(pack["EVDiTAttentionTileMap"], model=source, layers=layers, **about))


def search(source, case, error):
    about = {"positive": inputs(case)[1], "latent": {"samples": inputs(case)[0]}, "seed": 0, "candidates": "1,2"}
    about |= {"probes": 1, "threshold": 0.05, "target_speedup": 0.0, "error": error}
    return refusal(lambda: call(pack["EVDiTSearchTilePlan"], model=source, **about))


def own_kernel(self, *args, **kwargs):
    """An attention's forward that asks no override, as one that calls its kernel itself."""
    options = {key: value for key, value in kwargs.pop("transformer_options", {}).items() if key != OVERRIDE}
    return type(self).forward(self, *args, transformer_options=options, **kwargs)


def with_own_kernel(source, path, numbers=(0, 1, 2)):
    blocks, _, attention = path.partition(".")
    patched = source.clone()
    for number in numbers:
        key = f"diffusion_model.{blocks}.{number}.{attention}"
        bound = types.MethodType(own_kernel, source.get_model_object(key))
        patched.add_object_patch(f"{key}.forward", bound)
    return patched


facts: dict = {"own kernel": {}, "replaced blocks": {}}
PATHS = {"wan": "blocks.self_attn", "ltx audio": "transformer_blocks.attn1", "h3": "blocks.attn"}
for name, path in PATHS.items():
    case = CASES[name]
    if missing(case):
        continue
    model = build(case)
    alone, found = run(with_own_kernel(model, path), case), {}
    for order, chosen in (
        ("before", sparse(with_own_kernel(model, path))),
        ("behind", with_own_kernel(sparse(model), path)),
    ):
        found[order] = {"same": distance(run(chosen, case), alone), "lines": list(lines)}
        found[order]["report"] = call(pack["EVDiTReport"], model=chosen)[0]
    found["tile map"] = tile_map(with_own_kernel(model, path), case)
    found["search"] = [search(with_own_kernel(model, path), case, error) for error in ("attention", "output")]
    facts["own kernel"][name] = found

case, model = CASES["wan"], build(CASES["wan"])
facts["one layer"] = [tile_map(with_own_kernel(model, PATHS["wan"], [1]), case, layers) for layers in ("0", "0,1")]
names: list[bool] = []
watch = model.model.diffusion_model.blocks[1].self_attn.register_forward_pre_hook(
    lambda _, __, given: names.append("block_index" in given.get("transformer_options", {})), with_kwargs=True
)
run(model, case)
watch.remove()
facts["layers are named"] = all(names)  # else calls are counted, and one that nobody asks for is missed
# One put into the network by hand, without a patch of the MODEL.
by_hand = build(case)
for block in by_hand.model.diffusion_model.blocks:
    block.self_attn.forward = types.MethodType(own_kernel, block.self_attn)
run(sparse(by_hand), case)
facts["by hand"] = list(lines)
# Cross-attention alone, as guidance by attention has it, stands in nobody's way.
run(sparse(with_own_kernel(model, "blocks.cross_attn")), case)
facts["cross-attention"] = list(lines)


# Another class for it, as RES4LYF's patchers have.
class OwnAttention(type(model.model.diffusion_model.blocks[0].self_attn)):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **{**kwargs, "transformer_options": {}})


other_class = sparse(build(case)).clone()
for number in range(3):
    other_class.add_object_patch(f"diffusion_model.blocks.{number}.self_attn.__class__", OwnAttention)
run(other_class, case)
facts["attention of another class"] = list(lines)


# A whole block, of which nothing says who computes the attention: ComfyUI has put the attention's own forward on the modules
# where it took the patches above off.
def own_block(self, x, *args, transformer_options, **kwargs):
    options = {key: value for key, value in transformer_options.items() if key != OVERRIDE}
    return type(self).forward(self, x, *args, transformer_options=options, **kwargs)


whole_blocks = sparse(model).clone()
for number, block in enumerate(model.model.diffusion_model.blocks):
    whole_blocks.add_object_patch(f"diffusion_model.blocks.{number}.forward", types.MethodType(own_block, block))
run(whole_blocks, case)
facts["whole blocks"] = list(lines)


class AllInOne(torch.nn.Module):
    """A list's blocks as one, which stands in the list's place during a forward."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, *args, **kwargs):
        for block in self.blocks:
            out = block(*args, **kwargs)
            if isinstance(out, tuple):
                kwargs["img"], kwargs["txt"] = out
            elif args:
                args = (out, *args[1:])
            else:
                kwargs["x"] = out
        return out


def cached(source, name):
    network = source.get_model_object("diffusion_model")
    one = torch.nn.ModuleList([AllInOne(getattr(network, name))])

    def around(apply_model, about):
        with mock.patch.object(network, name, one):
            return apply_model(about["input"], about["timestep"], **about["c"])

    patched = source.clone()
    patched.set_model_unet_function_wrapper(around)
    return patched


for name, blocks in (("ltx", "transformer_blocks"), ("hunyuan", "double_blocks")):
    case = CASES[name]
    if missing(case):
        continue
    model = build(case)
    alone, plain, found = run(cached(model, blocks), case), run(sparse(model, dense_blocks="0"), case), {}
    for order, make in (
        ("before", lambda model=model, blocks=blocks: sparse(cached(model, blocks), dense_blocks="0")),
        ("behind", lambda model=model, blocks=blocks: cached(sparse(model, dense_blocks="0"), blocks)),
    ):
        found[order] = {"same": distance(run(make(), case), alone), "lines": list(lines)}
    found["tile map"] = tile_map(cached(model, blocks), case)
    found["search"] = [search(cached(model, blocks), case, "attention")]
    found["plain again"] = distance(run(sparse(model, dense_blocks="0"), case), plain)
    facts["replaced blocks"][name] = found

# A network of another class, which the loaded model keeps when the next graph has no such node.
case, model = CASES["wan"], build(CASES["wan"])
WanModel = type(model.model.diffusion_model)


class OtherWanModel(WanModel):
    pass


def of_another_class(source):
    patched = source.clone()
    patched.add_object_patch("diffusion_model.__class__", OtherWanModel)
    return patched


before = run(sparse(model), case)
lines.clear()
sparse(of_another_class(model))
facts["another class"] = {"node": list(lines)}
# As ComfyUI does from the second prompt on: it keeps the node's MODEL, and samples it again.
left, told, kept = of_another_class(model), [], []
(patch,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.patch"))
(hooks,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.hook"))
for _ in range(2):  # a second node takes the place of the first
    left = patch.patch_attention(left, plans.TilePlan.uniform(1), after_run=lambda r, n: told.append([r.unasked, n]))
for _ in range(2):
    run(left, case)
    kept.append(list(lines))
same = distance(run(left, case), run(of_another_class(model), case))
facts["left dense"] = {"lines": kept, "told": told, "report": hooks.report_of(left) is None, "same": same}
run(of_another_class(model), case)
facts["another class"]["left behind"] = type(model.model.diffusion_model).__name__
facts["another class"]["tile map"] = tile_map(model, case)
run(of_another_class(model), case)
lines.clear()
later = sparse(model)
facts["another class"]["later node"] = list(lines)
facts["another class"]["same"] = distance(run(later, case), before)
facts["another class"]["lines"] = list(lines)
print(json.dumps(facts))
