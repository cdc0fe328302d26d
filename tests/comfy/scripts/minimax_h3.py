"""A tiny MiniMax-H3 under the hooks of today's ComfyUI and of its neighbours: exact results and exact counts. Prints
JSON."""

import json
import sys
import types

from host import call, load_pack, log_lines, refusal, torch  # isort: skip
import comfy.samplers  # isort: skip
import comfy.sd  # isort: skip
import comfy.ldm.modules.attention as attention  # isort: skip
from comfy.patcher_extension import WrappersMP  # isort: skip
from comfy_extras.nodes_easycache import EasyCacheNode  # isort: skip
from comfy_extras.nodes_minimax_h3 import MiniMaxH3SigmaShift  # isort: skip
from allocations import AllocationRecorder  # isort: skip
from tiny_models import CASES, Case, build, inputs, noise  # isort: skip

OVERRIDE = "optimized_attention_override"
pack = load_pack()


def module(ending: str):
    (found,) = (m for name, m in sys.modules.items() if name.endswith(ending))
    return found


plans, layouts, hooks = module("efficient_vdit_core.plan"), module("comfy_bridge.layouts"), module("comfy_bridge.hook")
tiles, selection = module("efficient_vdit_core.tiles"), module("attention.selection")
sharding = module("comfy_bridge.parallel.sharding")
frames_file, prepare_file = module("attention.backends.frames"), module("attention.hook.prepare")
lines = log_lines()
case = CASES["h3 with guidance"]
model = build(case)
network = model.model.diffusion_model
prefix, frames, size, _ = case.layout
LAYERED = plans.TilePlan(patterns=tuple(tiles.TilePattern(k) for k in (1, 2, None)))


def sparse(source, plan=None, **changes):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **changes}
    return call(pack["EVDiTSparseAttention"], model=source, plan=plan or plans.TilePlan.uniform(1), **settings)[0]


def run(chosen, levels=None, cfg=1.0, start=None):
    """Through ComfyUI's guider, flat; ``levels`` are noise levels, default two simple steps."""
    x, cond, _ = inputs(case)
    guider = comfy.samplers.CFGGuider(chosen)
    guider.set_conds(cond, [[cond[0][0] * 0.5, cond[0][1]]])
    guider.set_cfg(cfg)
    sampling = chosen.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 2) if levels is None else torch.tensor(levels)
    lines.clear()
    with torch.inference_mode():
        begin = (x, x - x) if start is None else (x - x, start)
        return guider.sample(*begin, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)


def flat(nested):
    return torch.cat([part.flatten() for part in nested.unbind()])


def distance(a, b):
    a, b = flat(a), flat(b)
    return float((a - b).abs().max() / b.abs().max())


def masked_oracle(plan, steps=None):
    """An override with each layer's whole mask in float64; ``steps`` limits it to these of the schedule."""
    owner = torch.tensor([-1] * prefix + [f for f in range(frames) for _ in range(size)])
    calls = {"layer": 0}

    def override(func, q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        if q.shape[2] != len(owner):
            return func(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **kwargs)
        layer, options = calls["layer"] % 3, kwargs["transformer_options"]
        calls["layer"] += 1
        schedule = options["sample_sigmas"]
        step = int((schedule * 1.0001 >= options["sigmas"][0]).sum()) - 1
        pattern = plan.pattern(layer, 3)
        if pattern.is_full(frames) or (steps is not None and step not in steps):
            return func(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, **kwargs)
        shared = (owner < 0) | torch.isin(owner, torch.tensor(pattern.reference_frames(frames)))
        live = (owner[:, None] == owner) | shared[:, None] | shared
        q, k, v = (t.double() for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return (scores.masked_fill(~live, float("-inf")).softmax(-1) @ v).float().transpose(1, 2).flatten(-2)

    return override


def judged(source, plan=None, steps=None):
    judge = source.clone()
    judge.model_options["transformer_options"][OVERRIDE] = masked_oracle(plan or plans.TilePlan.uniform(1), steps)
    return judge


facts = {}
dense, alone = run(model), run(sparse(model))
facts["effect"] = distance(alone, dense)
facts["alone"] = distance(alone, run(judged(model)))
heads = plans.TilePlan(patterns=(tiles.TilePattern(2, placement="chunk heads"),) * 3)
facts["chunk heads"] = distance(
    run(sparse(model, plans.TilePlan.uniform(2), placement="chunk heads")), run(judged(model, heads))
)
facts["strided instead"] = distance(run(sparse(model, plans.TilePlan.uniform(2))), run(judged(model, heads)))
facts["alone lines"] = list(run(sparse(model)) and lines)
facts["layered"] = distance(run(sparse(model, LAYERED)), run(judged(model, LAYERED)))


# Attention in groups of heads, as low-memory nodes do it, where no block_index says which layer calls.
def in_groups(self, x, rope_freqs=None, transformer_options={}):  # noqa: B006 - as the class has it
    asked, together = attention.optimized_attention, []

    def grouped(q, k, v, heads, **options):
        q, k, v = (t.take() for t in (q, k, v))
        for head in range(heads):
            together.append(asked(*(t[:, head : head + 1] for t in (q, k, v)), 1, **options))
        return torch.cat(together, -1)

    minimax = sys.modules["comfy.ldm.minimax.model"]
    minimax.optimized_attention = grouped
    try:
        return type(self).forward(self, x, rope_freqs, transformer_options)
    finally:
        minimax.optimized_attention = asked


grouped = model.clone()
for i, block in enumerate(network.blocks):
    grouped.add_object_patch(f"diffusion_model.blocks.{i}.attn.forward", types.MethodType(in_groups, block.attn))
facts["in groups"] = distance(run(sparse(grouped, LAYERED)), run(judged(model, LAYERED)))
facts["in groups lines"] = list(run(sparse(grouped, LAYERED)) and lines)


# ComfyUI's Model Attention Backend on either side; a function that takes containers, as the INT8 ones do.
def backend(taken):
    @attention.wrap_attn
    def counted_attention(q, k, v, heads, **kwargs):
        taken.append("tensors")
        return attention.attention_basic(q, k, v, heads, **kwargs)

    def container_function(q, k, v, heads, **kwargs):
        taken.append("containers")
        return attention.attention_basic(q.take(), k.take(), v.take(), heads, **kwargs)

    counted_attention.container_function = container_function
    return counted_attention


for place in ("before", "behind"):
    taken: list[str] = []
    source = model.clone()
    if place == "before":
        source.set_model_optimized_attention(backend(taken))
        chosen = sparse(source, LAYERED)
    else:
        chosen = sparse(source, LAYERED)
        chosen.set_model_optimized_attention(backend(taken))
    again = sparse(chosen, LAYERED)  # idempotent: one plan decides
    facts[f"backend {place}"] = {"same": distance(run(chosen), run(judged(model, LAYERED))), "lines": list(lines)}
    taken.clear()
    run(chosen)
    facts[f"backend {place}"]["containers"] = taken.count("containers")  # the dense layer of two steps
    facts[f"backend {place}"]["pieces"] = taken.count("tensors")
    facts[f"backend {place}"]["computed"] = dict(hooks.hook_of(chosen).report.computed)
    facts[f"backend {place}"]["again"] = distance(run(again), run(judged(model, LAYERED)))


# A file that asks for its own attention in two layers, in a ComfyUI that says which block calls and drops the wish.
asked: list[tuple[int, ...]] = []


@attention.wrap_attn
def of_the_file(q, k, v, heads, **kwargs):
    asked.append(tuple(q.shape))
    return attention.attention_basic(q, k, v, heads, **kwargs)


def named(layer):
    def block(args, extra):
        args["transformer_options"] = {**args["transformer_options"], "block_index": layer}
        return extra["original_block"](args)

    return block


wishing = model.clone()
for i in range(3):
    wishing.set_model_patch_replace(named(i), "dit", "double_block", i)
for i in (1, 2):
    network.blocks[i].attn.comfy_attention = torch.nn.Module()
    network.blocks[i].attn.comfy_attention.function = of_the_file
facts["own attention"] = distance(run(sparse(wishing, LAYERED)), run(judged(model, LAYERED)))
asked.clear()
own = sparse(wishing, LAYERED)
run(own, [1.0, 0.5])
shared = prefix + 2 * size
# Layer 1: the shared rows, and all other frames in one piece; layer 2 is dense.
facts["own attention asked"] = [shape[2] for shape in asked] == [shared, size, prefix + frames * size]
facts["own attention computed"] = dict(hooks.hook_of(own).report.computed)
asked.clear()
run(sparse(wishing, LAYERED, start_percent=0.999, end_percent=1.0), [1.0, 0.5])
facts["own attention outside the window"] = len(asked)
for i in (1, 2):
    del network.blocks[i].attn.comfy_attention


replacing = model.clone()
replacing.set_model_patch_replace(named(0), "dit", "double_block", 0)
facts["sharding"] = {
    "alone": refusal(lambda: sharding.find_shardable(model)),
    "replaced blocks": refusal(lambda: sharding.find_shardable(replacing)),
}


# Wrappers around and below ours, with arguments that do not exist yet.
def around(executor, *args, **kwargs):
    return executor(*args, "a newer argument", newer="a keyword", **kwargs)


def below(executor, x, t, c_concat, c_crossattn, control, options, *more, **kwargs):
    handed.append((more, kwargs.pop("newer", None), options.get("sample_sigmas")))
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


handed: list = []
wrapped = model.clone()
wrapped.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "around", around)
wrapped = sparse(wrapped)
wrapped.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "below", below)
levels = [1.0, 0.7, 0.3, 0.0]
run(wrapped, levels)
facts["handed on"] = all(more == ("a newer argument",) and keyword == "a keyword" for more, keyword, _ in handed)
facts["schedule untouched"] = len(handed) == 3 and all(torch.equal(s, torch.tensor(levels)) for *_, s in handed)


# The steps that are sparse, by number and by percent, under every shift and for levels given by hand.
def sparse_steps(chosen, levels):
    """Which steps of a run are sparse."""
    report, found = hooks.hook_of(chosen).report, []

    def count(executor, *args, **kwargs):
        before = report.sparse
        out = executor(*args, **kwargs)
        found.append(report.sparse > before)
        return out

    watched = chosen.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)
    run(watched, levels)
    return [i for i, is_sparse in enumerate(found) if is_sparse]


facts["steps"] = {}
for shift in (3.0, 6.0, 12.0):
    (source,) = MiniMaxH3SigmaShift.execute(model, shift, 3.0).args
    simple = comfy.samplers.calculate_sigmas(source.get_model_object("model_sampling"), "simple", 4).tolist()
    facts["steps"][f"shift {shift}"] = {
        "first": sparse_steps(sparse(source, dense_first_steps=1), simple),
        "last": sparse_steps(sparse(source, dense_last_steps=1), simple),
        "both": sparse_steps(sparse(source, dense_first_steps=1, dense_last_steps=2), simple),
        "percent": sparse_steps(sparse(source, start_percent=0.2), simple),
        "full noise": sparse_steps(sparse(source, start_percent=0.01), simple),
        "none": sparse_steps(sparse(source, dense_first_steps=3, dense_last_steps=1), simple),
    }
by_hand = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]
second = [0.909375, 0.725, 0.421875, 0.0]
facts["steps"]["by hand"] = sparse_steps(sparse(model, dense_first_steps=2, dense_last_steps=1), by_hand)
facts["steps"]["second stage"] = sparse_steps(sparse(model, dense_first_steps=1), second)
facts["dense again"] = list(lines)
facts["steps"]["second stage, of full noise"] = sparse_steps(sparse(model, start_percent=0.01), second)
facts["steps by hand"] = distance(
    run(sparse(model, dense_first_steps=2, dense_last_steps=1), by_hand), run(judged(model, steps=range(2, 7)), by_hand)
)


# Two stages, 8 and 3 levels, the second goes on from the first.
def two_stages(chosen):
    return run(chosen, second, start=run(chosen, by_hand))


facts["two stages"] = distance(two_stages(sparse(model)), two_stages(judged(model)))

# A step cache, and LoRA merged and bypassed.
cache = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
for place in ("before", "behind"):
    cached = sparse(EasyCacheNode.execute(model, **cache).args[0]) if place == "before" else None
    cached = cached or EasyCacheNode.execute(sparse(model), **cache).args[0]
    run(cached, by_hand)
    facts[f"EasyCache {place}"] = list(lines)
rows, columns = network.blocks[0].attn.qkv_proj.weight.shape
key = "diffusion_model.blocks.0.attn.qkv_proj"
lora = {f"{key}.lora_A.weight": noise(2, columns), f"{key}.lora_B.weight": noise(rows, 2)}
for way, load in (("merged", comfy.sd.load_lora_for_models), ("bypassed", comfy.sd.load_bypass_lora_for_models)):
    with_lora = load(model, None, dict(lora), 0.5, 0.0)[0]
    want = run(judged(with_lora))
    behind = load(sparse(model), None, dict(lora), 0.5, 0.0)[0]
    facts[f"lora {way}"] = {"before": distance(run(sparse(with_lora)), want), "behind": distance(run(behind), want),
                            "acts": distance(want, alone)}  # fmt: skip

# Sequences that are not as they should be, each with its reason.
video = ("video", frames * size)


def table(*parts):
    at, segments = 0, []
    for kind, count in parts:
        segments.append((at, at + count, kind))
        at += count
    return types.SimpleNamespace(segments=segments)


facts["unknown"] = {}
for name, packed in {
    "no table": None,
    "not last": table(("text", 7), video, ("audio", 18)),
    "another kind": table(("text", 7), ("depth", 5), ("audio", 18), video),
    "another grid": table(("text", 7), ("audio", 18), ("video", frames * size - 1)),
}.items():
    try:
        layouts.minimax_h3((1, *case.latent), network, None, {"minimax_payload": {"layout": packed}})
    except layouts.UnknownLayout as error:
        facts["unknown"][name] = str(error)


def without_table(executor, *args, minimax_payload, **kwargs):
    rest = {name: value for name, value in minimax_payload.items() if name != "layout"}
    return executor(*args, minimax_payload=rest, **kwargs)  # the model makes one itself


tableless = model.clone()
tableless.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "without table", without_table)
facts["unknown"]["run"] = distance(run(sparse(tableless)), dense)
facts["unknown lines"] = list(lines)

# A checkpoint that was trained for another sparse attention.
network.blocks[0].attn.to_gate_compress = torch.nn.Linear(2, 2)
run(sparse(model))
facts["trained otherwise"] = list(lines)
del network.blocks[0].attn.to_gate_compress

# What the blocks allocate. Measured by trials as on a GPU, and bounded as there.
selection.FEWEST_MEASURED_TOKENS = 0
for backend_file in (frames_file, module("attention.backends.parts")):
    backend_file.default_extra_bytes = lambda q, frame_bytes, gradients=False: q.numel() * q.element_size()
wide = Case("MiniMaxH3", {**case.settings, "attention_head_dim": 32, "ffn_hidden_size": 128}, (24, 12, 8, 8), (25, 12, 16, 0),
            audio=(32, 2, 9), batch=1)  # fmt: skip
case = wide
recorded = build(wide)


def record(chosen):
    recorder = AllocationRecorder()
    watched = chosen.clone()

    def block(args, extra):
        with recorder.block(args["img"], args["t_emb"], args["rope_freqs"]) as results:
            out = extra["original_block"](args)
            results.append(out["img"])
        return out

    for i in range(3):
        watched.set_model_patch_replace(block, "dit", "double_block", i)
    with recorder:
        run(watched, [0.9, 0.8, 0.6, 0.3, 0.0])
    steps = [recorder.sequences[i : i + 3] for i in range(0, len(recorder.sequences), 3)]
    return {
        "rogues": recorder.rogues,
        "same": [step == steps[0] for step in steps],
        "peak": recorder.peak,
        "steps": len(steps),
    }


recorded.set_model_optimized_attention(attention.attention_pytorch)
few = plans.TilePlan.uniform(3)
arrow = sparse(recorded, few, decline_slow=False)
facts["allocations"] = {"dense": record(recorded), "sparse": record(arrow)}
facts["allocations"]["sparse"]["lines"] = list(lines)
# As it would be if nobody prepared the forward: the trial of backends would fall into the first block.
selection.default_book().choices.clear()
prepare_file.Preparation.before_forward = lambda _, state, *__: state
facts["allocations"]["unprepared"] = record(sparse(recorded, few, decline_slow=False))
left, recorder = [], AllocationRecorder()
with recorder, recorder.block() as results:
    left.append(torch.zeros(5) + 1)
    results.append(torch.zeros(7) + 1)
facts["allocations"]["left behind"] = recorder.rogues
print(json.dumps(facts))
