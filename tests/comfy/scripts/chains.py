"""The sparse node in the company of ComfyUI's other ways to change a MODEL or a run, on a tiny Wan. Prints JSON."""

import functools
import gc
import inspect
import json
import sys
import threading
import weakref
from dataclasses import dataclass

from host import call, load_pack, log_lines, torch  # isort: skip
import comfy.ldm.modules.attention as attention  # isort: skip
import comfy.model_management as mm  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.model_sampling  # isort: skip
import comfy.samplers  # isort: skip
import comfy.sd  # isort: skip
import comfy_extras.nodes_custom_sampler as custom_sampler  # isort: skip
from comfy_extras.nodes_context_windows import ContextWindowsManualNode  # isort: skip
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode  # isort: skip
from comfy.patcher_extension import WrappersMP  # isort: skip
from tiny_models import CASES, build, missing, noise  # isort: skip

OVERRIDE = "optimized_attention_override"
pack = load_pack()
(plans,) = (m for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
(patching,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.patch"))
(hooks,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.hook"))
(windows_of_steps,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.window"))
lines = log_lines()

model = build(CASES["wan"])
base = model.model
forwards: list[tuple] = []
base.diffusion_model.register_forward_pre_hook(lambda _, inputs: forwards.append(tuple(inputs[0].shape)))
x, text = noise(1, 16, 9, 4, 6), noise(1, 7, 32)
SIZE = 6


def sparse(source, k=1, **changes):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **changes}
    return call(pack["EVDiTSparseAttention"], model=source, plan=plans.TilePlan.uniform(k), **settings)[0]


def run(chosen, steps=2, negative=text * 0.5, cfg=2.0, part=slice(None), latent=None, start=None, prompt=None):
    """``part`` of the noise levels, on ``latent`` as another sampler left it."""
    forwards.clear()
    lines.clear()
    guider = comfy.samplers.CFGGuider(chosen)
    guider.set_conds(prompt or [[text, {}]], prompt or [[negative, {}]])
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(chosen.get_model_object("model_sampling"), "simple", steps)[part]
    start = x if start is None else start
    given = (start, torch.zeros_like(start)) if latent is None else (torch.zeros_like(start), latent)
    with torch.inference_mode():
        return guider.sample(*given, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def oracle(references):
    """An override with the whole N x N mask; ``references`` gives the reference frames from the noise level."""

    def override(func, q, k, v, heads, *args, **kwargs):
        if q.shape != k.shape:
            return func(q, k, v, heads, *args, **kwargs)
        frame = torch.arange(q.shape[1]) // SIZE
        refers = torch.isin(frame, torch.tensor(references(frame[-1].item() + 1, kwargs["transformer_options"])))
        live = (frame[:, None] == frame) | refers[:, None] | refers
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2).double() for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return (scores.masked_fill(~live, float("-inf")).softmax(-1) @ v).float().transpose(1, 2).flatten(-2)

    return override


def judged(source, references):
    judge = source.clone()
    judge.model_options["transformer_options"][OVERRIDE] = oracle(references)
    return judge


def first_frame(frames, options):
    return [0]


def moving(frames, options):
    schedule = options["sample_sigmas"]
    return [int((schedule >= options["sigmas"][0] * 0.999).sum()) - 1]


dense, alone, facts = run(model), run(sparse(model)), {}
facts["effect"] = distance(alone, dense)
facts["alone"] = distance(alone, run(judged(model, first_frame)))
for place, frames in (("first", [0, 1]), ("last", [7, 8]), ("strided", [0, 5])):
    facts[f"placement {place}"] = distance(
        run(sparse(model, 2, placement=place)), run(judged(model, lambda *_, frames=frames: frames))
    )
rotating = run(sparse(model, placement="rotating"), steps=3)
facts["placement rotating"] = distance(rotating, run(judged(model, moving), steps=3))
facts["rotating differs"] = distance(rotating, run(sparse(model), steps=3))

# Noise levels that rise, as FlipSigmas gives them to turn a clip into noise: three steps.
facts["rising"] = []
for choice in ({"dense_first_steps": 1}, {"dense_last_steps": 1}):
    run(sparse(model, **choice), steps=4, cfg=1.0, part=[3, 2, 1, 0])
    facts["rising"] += lines

# Steps that lie closer together than a window's edge is rounded to.
sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
sampling.set_parameters(shift=12.0, multiplier=1000)
schedule = comfy.samplers.calculate_sigmas(sampling, "beta", 100)
facts["steps"] = [windows_of_steps.step_of({"sample_sigmas": schedule}, level[None]) for level in schedule[:-1]]

# Guidance in two forwards a step, as texts of different lengths need it.
longer = noise(1, 11, 32)
split = run(sparse(model), negative=longer)
facts["split forwards"] = len(forwards)
facts["split lines"] = list(lines)
facts["split"] = distance(split, run(judged(model, first_frame), negative=longer))

# Context windows: 5 of the 9 frames at a time.
settings = {"context_length": 5, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
            "closed_loop": False, "fuse_method": "pyramid", "dim": 2}  # fmt: skip
known = inspect.signature(ContextWindowsManualNode.execute).parameters
settings.update({name: False for name in ("freenoise", "causal_window_fix") if name in known})
windows = ContextWindowsManualNode.execute(model, **settings).args[0]
got = run(sparse(windows))
facts["window frames"] = sorted({shape[2] for shape in forwards})
facts["window lines"] = list(lines)
facts["windows"] = distance(got, run(judged(windows, first_frame)))
if "causal_window_fix" in known:  # puts the clip's first frame before the later windows
    anchored = ContextWindowsManualNode.execute(model, **{**settings, "causal_window_fix": True}).args[0]
    got_anchored = run(sparse(anchored))
    facts["anchored frames"] = sorted({shape[2] for shape in forwards})
    facts["windows anchored"] = distance(got_anchored, run(judged(anchored, first_frame)))
# LTX-2 without sound: what its conditioning says of the latents' shapes is of the whole clip.
silent = CASES["ltx audio"]
if not missing(silent):
    clip, words = noise(1, 128, 9, 3, 5), noise(1, *silent.text)
    in_windows = ContextWindowsManualNode.execute(build(silent), **settings).args[0]
    run(sparse(in_windows), steps=1, cfg=1.0, start=clip, prompt=[[words, silent.conds]])
    facts["windows without sound"] = list(lines)
facts["windows behind"] = distance(run(ContextWindowsManualNode.execute(sparse(model), **settings).args[0]), got)

# EasyCache and LazyCache skip whole evaluations; those that remain are sparse. A huge threshold skips all that may be.
for name, node in (("EasyCache", EasyCacheNode), ("LazyCache", LazyCacheNode)):
    for order in ("before", "behind"):
        choices = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
        chained = (
            sparse(node.execute(model, **choices).args[0])
            if order == "before"
            else node.execute(sparse(model), **choices).args[0]
        )
        run(chained, steps=8, cfg=1.0)
        facts[f"{name} {order}"] = list(lines)

# LoRA on either side.
rows, columns = base.diffusion_model.blocks[0].self_attn.q.weight.shape
key = "diffusion_model.blocks.0.self_attn.q"
lora = {f"{key}.lora_A.weight": noise(2, columns), f"{key}.lora_B.weight": noise(rows, 2)}


def with_lora(source):
    return comfy.sd.load_lora_for_models(source, None, lora, 1.0, 0.0)[0]


one = run(sparse(with_lora(model)))
facts["lora"] = {"either side": distance(run(with_lora(sparse(model))), one), "acts": distance(one, alone)}


# Another node's attention override, as SageAttention nodes install theirs: before ours or behind it, it computes the
# dense pieces.
def other(func, q, k, v, heads, *args, **kwargs):
    seen.append(q.shape)
    return func(q, k, v, heads, *args, **kwargs)


seen: list = []
under = model.clone()
under.model_options["transformer_options"][OVERRIDE] = other
facts["override under"] = {"same": distance(run(sparse(under)), alone), "calls": len(seen)}
over = sparse(model)
over.model_options["transformer_options"][OVERRIDE] = other
seen.clear()
facts["override over"] = {"same": distance(run(over), alone), "calls": len(seen), "lines": list(lines)}
# One that asks the override it found, as careful nodes do, has ours below it and above it.
chained = sparse(model)
below = chained.model_options["transformer_options"][OVERRIDE]
chained.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: below(func, *args, **kwargs)
facts["override around"] = {"same": distance(run(chained), alone), "lines": list(lines)}


# A new one for each forward, which nothing of ours may keep once the run is over.
def anew(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
    of_step = functools.partial(other)
    made_in_the_run.append(weakref.ref(of_step))
    options = {**transformer_options, OVERRIDE: of_step}
    return executor(x, t, c_concat, c_crossattn, control, options, **conds)


made_in_the_run: list = []
renewing = model.clone()
renewing.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "anew", anew)
hooked = sparse(renewing)
run(hooked)
gc.collect()
facts["overrides of a run"] = {
    "made": len(made_in_the_run), "left": sum(made() is not None for made in made_in_the_run), "same": distance(run(hooked), alone),
}  # fmt: skip


# One that carries our marks, as functools.wraps copies them, is another node's still: the next plan keeps it in the chain.
marked = sparse(model)
under_it = marked.model_options["transformer_options"][OVERRIDE]


@functools.wraps(under_it)
def wrapping(func, *args, **kwargs):
    seen.append(1)
    return under_it(func, *args, **kwargs)


marked.model_options["transformer_options"][OVERRIDE] = wrapping
once, seen[:] = run(marked), []
facts["override with our marks"] = {"same": distance(once, alone)}
facts["override with our marks"]["next plan"] = distance(run(sparse(marked, 9)), dense)
facts["override with our marks"]["calls"] = len(seen)
facts["the second node counts"] = distance(run(sparse(sparse(model, 3))), alone)
between = sparse(model)
first = between.model_options["transformer_options"][OVERRIDE]
between.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: first(func, *args, **kwargs)
facts["the second node counts behind another"] = distance(
    run(sparse(between, 9)), dense
)  # 9 of 9 frames: full attention


@dataclass
class Odd:
    """An override that has an equality of its own, and no hash."""

    calls: int = 0

    def __call__(self, func, *args, **kwargs):
        return func(*args, **kwargs)


odd = model.clone()
odd.model_options["transformer_options"][OVERRIDE] = Odd()
facts["odd override"] = distance(run(sparse(odd)), alone)

# Careful nodes once more, over so many tokens that backends are tried: what a trial calls is no call of the model.
large = noise(1, 16, 9, 32, 32)
run(chained, steps=1, cfg=1.0, start=large)
facts["a trial's calls"] = list(lines)

# Two experts share a run, as in Wan 2.2 14B: the second goes on where the first stopped.
low = build(CASES["wan"])
with torch.no_grad():
    for parameter in low.model.diffusion_model.parameters():
        parameter.mul_(0.9)


def experts(first, second):
    said = []
    latent = run(first, 4, part=slice(3))
    said += lines
    out = run(second, 4, part=slice(2, None), latent=latent)
    return out, said + lines


two, said = experts(sparse(model, 1), sparse(low, 3))
want, _ = experts(judged(model, first_frame), judged(low, lambda *_: [0, 3, 6]))
swapped, _ = experts(sparse(model, 3), sparse(low, 1))
facts["experts"] = {"same": distance(two, want), "swapped": distance(swapped, want), "lines": said}

# One model for the prompt and another for the negative one, in one run. A single step is linear in what the two predict.
DualModel = getattr(custom_sampler, "Guider_DualModel", None)


def one_step(guider, *conds):
    lines.clear()
    guider.set_conds(*([[cond, {}]] for cond in conds))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 1)
    with torch.inference_mode():
        return guider.sample(
            x, torch.zeros_like(x), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
        )


def by_one(patcher, cond):
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_cfg(1.0)
    return one_step(guider, cond, cond)


def by_two(first, second):
    guider = DualModel(first, second)
    guider.set_cfg(3.0)
    return one_step(guider, text, text * 0.5)


def expected(first, second):
    return 3.0 * by_one(first, text) - 2.0 * by_one(second, text * 0.5)


if DualModel:
    facts["two models"] = {}
    told: list[str] = []

    def telling(source, name, **settings):
        return patching.patch_attention(
            source, plans.TilePlan.uniform(1), after_run=lambda found, _: told.append((name, found.sparse)), **settings
        )

    for name, (first, second) in {
        "first": (sparse(model), low), "second": (model, sparse(low, 3)), "both": (sparse(model), sparse(low, 3)),
        "one": (sparse(model), sparse(model)),
    }.items():  # fmt: skip
        got, said = by_two(first, second), list(lines)
        acting = low if name == "second" else second
        facts["two models"][name] = {"same": distance(got, expected(first, acting)), "lines": said}
    first, second = telling(model, "first"), telling(low, "second", measure=True)
    by_two(EasyCacheNode.execute(first, **choices).args[0], second)
    reports = [hooks.report_of(patcher) for patcher in (first, second)]
    facts["both told"] = {
        "told": told, "computed": [list(report.computed) for report in reports], "measure": reports[1].measure.refused,
    }  # fmt: skip
    stop = base.diffusion_model.register_forward_pre_hook(lambda *_: mm.throw_exception_if_processing_interrupted())
    mm.interrupt_current_processing()
    try:
        by_two(first, second)
    except mm.InterruptProcessingException:
        facts["both stopped"] = {"lines": list(lines), "sparse": reports[1].sparse}
    stop.remove()

# What follows a run fails: its memory is let go of all the same.
broken = patching.patch_attention(model, plans.TilePlan.uniform(1), after_run=lambda *_: 1 / 0)
try:
    run(broken)
except ZeroDivisionError:
    hook = hooks.hook_of(broken)
    facts["broken announcement"] = {"running": hook.run.running, "kept": len(hook.preparation.work)}

# Another node's wrapper that samples with the same MODEL first: the run that it belongs to goes on as it was.
outer, within = sparse(model), []


def sample_first(executor, *args, **kwargs):
    if not within:
        within.append(hooks.hook_of(outer).run)
        run(outer, steps=1)
        within.append(hooks.hook_of(outer).run)
    return executor(*args, **kwargs)


outer.add_wrapper(WrappersMP.OUTER_SAMPLE, sample_first)
same = distance(run(outer), run(sparse(model)))
facts["a run within a run"] = {
    "the same": within[0] is within[1], "running": within[1].running, "clips": within[1].clips, "asked": within[1].asked,
    "after it": hooks.hook_of(outer).run.running, "clip": same,
}  # fmt: skip

run(sparse(model), part=slice(0, 1))
facts["no steps"] = list(lines)

# A run that is stopped before its first attention, and one whose plan is scaled and then kept from acting.
stop = base.diffusion_model.register_forward_pre_hook(lambda *_: mm.throw_exception_if_processing_interrupted())
mm.interrupt_current_processing()
try:
    run(sparse(model))
except mm.InterruptProcessingException:
    facts["stopped"] = list(lines)
stop.remove()
run(call(pack["EVDiTSparseAttention"], model=model, plan=plans.TilePlan.uniform(4, frames=36), start_percent=0.0, end_percent=1.0,
         dense_blocks="", min_tokens=10_000)[0])  # fmt: skip
facts["scaled but short"] = list(lines)

# Clones in threads of one model: each forward keeps its state to itself.
clones = [sparse(model, k) for k in (1, 3)] * 2


def evaluate(patcher):
    options = comfy.model_patcher.create_model_options_clone(patcher.model_options)["transformer_options"]
    options = {
        **options,
        "wrappers": {kind: {key: list(f) for key, f in keyed.items()} for kind, keyed in patcher.wrappers.items()},
    }
    options.update(callbacks={}, sigmas=torch.tensor([0.7]))
    with torch.inference_mode():
        return base.apply_model(x, torch.tensor([0.7]), c_crossattn=text, transformer_options=options)


serial, parallel = [evaluate(clone) for clone in clones], [None] * len(clones)
barrier = threading.Barrier(len(clones))


def work(i):
    barrier.wait()
    parallel[i] = evaluate(clones[i])


threads = [threading.Thread(target=work, args=(i,)) for i in range(len(clones))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
facts["threads"] = max(distance(a, b) for a, b in zip(parallel, serial, strict=True))
facts["threads differ"] = distance(serial[0], serial[1])

# A plan for a longer clip.
long = plans.TilePlan.uniform(4, frames=36)  # every ninth frame
(scaled,) = call(
    pack["EVDiTSparseAttention"],
    model=model,
    plan=long,
    start_percent=0.0,
    end_percent=1.0,
    dense_blocks="",
    min_tokens=0,
)
facts["scaled"] = {"same": distance(run(scaled), alone), "lines": list(lines)}
facts["bypassed"] = distance(run(model), dense)
for frames in (8, 3):  # of a run of 9
    run(call(pack["EVDiTSparseAttention"], model=model, plan=plans.TilePlan.uniform(1, frames=frames), start_percent=0.0,
             end_percent=1.0, dense_blocks="", min_tokens=0)[0])  # fmt: skip
    facts[f"made for {frames}"] = list(lines)

# Long enough to be measured: whichever backend is chosen, dense or the arrow mask comes out.
x, SIZE = noise(1, 16, 9, 32, 32), 256
dense, want = run(model, cfg=1.0), run(judged(model, first_frame), cfg=1.0)
backends = {name: {"backend": name} for name in ("frames", "parts")}
for name, changes in {"measured": {}, "never declined": {"decline_slow": False}, **backends}.items():
    got = run(sparse(model, **changes), cfg=1.0)
    facts[name] = {"sparse": distance(got, want), "dense": distance(got, dense), "lines": list(lines)}
# On a CPU ComfyUI runs with an attention that does not tell its log-sum-exp; PyTorch's, chosen for the model, does.
if hasattr(model, "set_model_optimized_attention"):
    chosen = model.clone()
    chosen.set_model_optimized_attention(attention.attention_pytorch)
    got = run(sparse(chosen, backend="parts"), cfg=1.0)
    facts["parts of pytorch"] = {"sparse": distance(got, want), "dense": distance(got, dense), "lines": list(lines)}
print(json.dumps(facts))
