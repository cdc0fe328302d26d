"""What a shared run refuses, and when its node runs again; this process stands for the workers. Prints JSON."""

import copy
import gc
import json
import weakref

from host import call, load_pack, log_lines, refusal, sample, torch  # isort: skip
import sys  # isort: skip

import comfy.model_management as mm  # isort: skip
import comfy.model_patcher  # isort: skip
import comfy.samplers  # isort: skip
from comfy.patcher_extension import PatcherInjection  # isort: skip
from comfy_api.torch_helpers import set_torch_compile_wrapper  # isort: skip
from comfy_extras.nodes_easycache import EasyCacheNode  # isort: skip
from comfy_extras import nodes_custom_sampler  # isort: skip
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT  # isort: skip

Guider_DualModel = getattr(nodes_custom_sampler, "Guider_DualModel", None)

pack = load_pack()
(bridge,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.parallel.model"))
(branches,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.parallel.branches"))
(unpack,) = (m.unpack for name, m in sys.modules.items() if name.endswith("comfy_bridge.parallel.packing"))
(memory,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.parallel.memory"))
(refusals,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.parallel.refusals"))
(sharding,) = (m for name, m in sys.modules.items() if name.endswith("comfy_bridge.parallel.sharding"))
(forecast,) = (
    m.WeightForecast for name, m in sys.modules.items() if name.endswith("comfy_bridge.parallel.sharded_weights")
)
(TilePlan,) = (m.TilePlan for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
(model,) = call(pack["EVDiTModelLoader"], model_name="tiny (built in)", weight_dtype="default")
(sigmas,) = call(pack["EVDiTConsistencySigmas"], model=model, segments=2, steps=2)
noise, text = torch.randn(1, 4, 8, 8, 8), torch.randn(1, 9, 64)
bridge.recipe = lambda *_: ("key", {})  # there is no prompt here
node = pack["EVDiTSequenceParallel"]


class HereInstead:
    """A session whose workers are ``source`` itself, computed in this process."""

    def __init__(self, source, fault=None):
        self.source, self.fault, self.failures = source, fault, 0
        test = {
            "flops_per_second": 1e12,
            "gigabytes_per_second": 1.0,
            "free_mib": None,
            "peer_access": None,
            "device": "cpu",
        }
        self.tests, self.divisions, self.runs, self.pool = [test, test], [], [], object()

    def forget_if_gone(self):
        pass

    def ready(self, launch, poll):
        if self.fault:
            raise self.fault

    def step(self, launch, message, tensors, poll):
        self.divisions.append(message["division"]["groups"])
        self.runs.append(message.get("run"))
        given = unpack(message["inputs"], tensors, torch.device("cpu"))
        options = comfy.model_patcher.create_model_options_clone(self.source.model_options)["transformer_options"]
        options.update(given.pop("options"))
        out = self.source.model.apply_model(given.pop("x"), given.pop("t"), transformer_options=options, **given)
        attention = {
            "sparse": 5,
            "density_sum": 2.0,
            "dense": {"full in the plan": 1},
            "computed": {"rb on all ranks": 6},
        }
        return [{"bytes": 0, "schemes": {}, "attention": attention}] * 2, {"out": out}

    def offload(self):
        return True


def shared(source, **choices):
    session = bridge.SESSION = choices.pop("session", None) or HereInstead(source)
    more = {
        "scheme": "auto",
        "start_timeout": 1,
        "step_timeout": 1,
        "after_run": "keep",
        "weights": "whole",
        "division": "auto",
        "prompt": None,
        "node_id": None,
    }
    global report
    made, report = bridge.parallelize(source, **{"devices": "cpu,cpu", "strict": True, **more, **choices})
    assert bridge.SESSION is session
    return made


def skipping(source):
    return call(
        SkipLayerGuidanceDiT,
        model=source,
        scale=3.0,
        start_percent=0.0,
        end_percent=1.0,
        double_layers="1",
        single_layers="",
    )[0]


def with_lora(source):
    patched = source.clone()
    patched.add_patches(
        {"diffusion_model.transformer_blocks.0.attn1.to_q.weight": ("diff", (torch.randn(144, 144) * 0.3,))}, 1.0
    )
    return patched


def with_text_lora(source, strength=1.0):
    """For a module outside the blocks, which ComfyUI may run before the steps, in its own process."""
    patched = source.clone()
    patched.add_patches(
        {"diffusion_model.caption_projection.linear_1.weight": ("diff", (torch.randn(144, 64),))}, strength
    )
    return with_lora(patched)


def rescheduled(source):
    """Another noise schedule, as ModelSamplingSD3 and its like set one."""
    patched = source.clone()
    patched.add_object_patch("model_sampling", copy.deepcopy(source.get_model_object("model_sampling")))
    return patched


def marking(source):
    """A guidance that tells its evaluations apart by an option of the forward alone, as LTX-2's does."""
    patched = source.clone()

    def again(args):
        options = {
            **args["model_options"],
            "transformer_options": {**args["model_options"]["transformer_options"], "stg_blocks": [1]},
        }
        comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"]

    patched.set_model_sampler_post_cfg_function(again)
    return patched


def telling(source):
    """An option of every forward, before our node: the workers have it too."""
    patched = source.clone()
    patched.model_options["transformer_options"]["rope_options"] = {"scale_t": 1.5}
    return patched


def attending(source):
    """Another node's attention."""
    patched = source.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: func(
        *args, **kwargs
    )
    return patched


def scaling(source, scale=1.0):
    """Attention by a node that is set to ``scale``: its function has the same name at each setting."""
    patched = source.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: (
        func(*args, **kwargs) * scale
    )
    return patched


def replacing(source, scale=1.0):
    """An object patch of a block's part, in the same way."""
    patched, part = source.clone(), source.model.diffusion_model.transformer_blocks[0].ff
    forward = type(part).forward
    patched.add_object_patch(
        "diffusion_model.transformer_blocks.0.ff.forward",
        lambda *args, **kwargs: forward(part, *args, **kwargs) * scale,
    )
    return patched


def wishing(source):
    """The attention that a file asks for, as ComfyUI's LoRA loaders set it from 0.34 on."""
    patched, asked = source.clone(), torch.nn.Identity()
    asked.function = None  # such as a precision alone
    source.model.diffusion_model.transformer_blocks[0].attn1.comfy_attention = asked
    patched.add_object_patch("diffusion_model.transformer_blocks.0.attn1.comfy_attention", asked)
    return patched


def bypassing(source, scale=1.0):
    """A LoRA beside the weights, as ComfyUI's bypass loaders inject it."""
    patched, part = source.clone(), source.model.diffusion_model.transformer_blocks[0].ff
    forward = part.forward

    def inject(_):
        part.forward = lambda *args, **kwargs: forward(*args, **kwargs) * scale

    def eject(_):
        part.forward = forward

    patched.set_injections("bypass_lora", [PatcherInjection(inject=inject, eject=eject)])
    return patched


def weighing(source, scale=1.0):
    """A function over a weight."""
    patched = source.clone()
    patched.add_weight_wrapper(
        "diffusion_model.transformer_blocks.0.attn1.to_q.weight", lambda weight, **_: weight * scale
    )
    return patched


def computing(source, scale=1.0):
    """Another precision, as Model Compute Dtype sets it."""
    patched = source.clone()
    patched.set_model_compute_dtype(torch.float32 if scale == 1.0 else torch.bfloat16)
    return patched


def streaming(source):
    """A MODEL whose weights ComfyUI streams, which it does on NVIDIA."""
    patched = source.clone()
    patched.clone = lambda: streaming(source)
    patched.is_dynamic, patched.load_device = lambda: True, "the GPU"
    return patched


def sparse(source):
    choices = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0}
    return call(pack["EVDiTSparseAttention"], model=source, plan=TilePlan.uniform(8, frames=48), **choices)[0]


def hooked(source):
    """Another node's hooks before ours: the workers have them too."""
    patched = source.clone()
    patched.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, v))
    patched.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 2)
    return patched


def run(chosen, cfg=1.0):
    return sample(chosen, comfy.samplers.sampler_object("euler"), sigmas, noise, text, cfg=cfg)


def cached(source):
    return call(EasyCacheNode, model=source, reuse_threshold=0.2, start_percent=0.0, end_percent=1.0, verbose=False)[0]


facts = {
    "hooks before it": float((run(shared(hooked(model))) - run(model)).abs().max()),
    "an option before it": refusal(lambda: run(shared(telling(model)))),
    "an option of some evaluations": refusal(lambda: run(shared(marking(model)))),
    "attention behind": refusal(lambda: run(attending(shared(model)))),
    "attention before it": refusal(lambda: run(shared(attending(model)))),
    "where weights are streamed": [str(shared(chosen).load_device) for chosen in (model, streaming(model))],
    "LoRAs here": sorted(shared(with_text_lora(model)).patches),
    "runs with them": refusal(lambda: run(shared(with_text_lora(model)))),
    "a second text LoRA behind": refusal(lambda: run(with_text_lora(shared(with_text_lora(model))))),
    "skipped layers, before": refusal(lambda: run(shared(skipping(model)))),
    "skipped layers, behind": refusal(lambda: run(skipping(shared(model)))),
    "a schedule, before": refusal(lambda: run(shared(rescheduled(model)))),
    "a schedule behind": refusal(lambda: run(rescheduled(shared(model)))),
    "a LoRA behind": refusal(lambda: run(with_lora(shared(model)))),
    "sparse attention behind": refusal(lambda: run(sparse(shared(model)))),
    "EasyCache, before": refusal(lambda: shared(cached(model))),
    "EasyCache, behind": refusal(lambda: run(cached(shared(model)))),
}
facts["by every way"] = {
    act.__name__: {
        "behind": refusal(lambda act=act: run(act(shared(model), 0.5))),
        "behind another setting": refusal(lambda act=act: run(act(shared(act(model)), 0.5))),
        "before": refusal(lambda act=act: run(shared(act(model)))),
        "before, copied behind": refusal(lambda act=act: run(shared(act(model)).clone())),
    }
    for act in (scaling, replacing, bypassing, weighing, computing)
}


def of_two_models(first, second):
    guider = Guider_DualModel(first, second)
    guider.set_conds([[text, {}]], [[text, {}]])
    guider.set_cfg(4.0)
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True)


if Guider_DualModel:  # not in older versions
    (another,) = call(pack["EVDiTModelLoader"], model_name="tiny (built in)", weight_dtype="default")
    facts["two models"] = {
        "both shared": refusal(lambda: of_two_models(shared(model), shared(another))),
        "the first shared": refusal(lambda: of_two_models(shared(model), another)),
        "the second shared": refusal(lambda: of_two_models(model, shared(with_lora(another)))),
    }
    one = shared(model)
    facts["one model as two"] = float((of_two_models(one, one) - of_two_models(model, model)).abs().max())
    facts["after a refusal"] = float((run(one) - run(model)).abs().max())


def kept_by_nothing(act):
    """How many of what ``act`` makes, and lets go of, Python's count of references frees without its search for cycles."""
    gc.collect()
    gc.disable()
    try:
        made = act()
        refs = [weakref.ref(each) for each in made]
        del made
        return [each() is None for each in refs]
    finally:
        gc.enable()


def a_run_and_its_models():
    source = model.clone()
    made = shared(source, session=HereInstead(model))
    run(made)
    (watch,) = made.get_nested_additional_models()
    mm.current_loaded_models.clear()
    return source, made, watch.model


facts["freed with the last reference"] = kept_by_nothing(a_run_and_its_models)


def refused_a_second_time():
    """The MODEL of a node that is not strict stays that of the node before."""
    first = shared(model)
    return shared(first, strict=False) is first and report


facts["a second time"] = refusal(lambda: shared(shared(model)))
facts["a second time, not strict"] = refused_a_second_time()
clip = {"positive": [[text, {}]], "latent": {"samples": noise}, "seed": 0}
search = {"probes": 1, "threshold": 0.2, "target_speedup": 0.0, "candidates": "1", "error": "output"}
facts["measured behind it"] = [
    refusal(lambda: call(pack["EVDiTSearchTilePlan"], model=shared(model), **clip, **search)),
    refusal(lambda: call(pack["EVDiTAttentionTileMap"], model=shared(model), **clip, layers="0", percent=0.0, rows=4)),
]
source = sparse(model)
made, lines = shared(source, session=HereInstead(model)), log_lines()
run(made)
run(made)
facts["reports"] = [call(pack["EVDiTReport"], model=chosen, after=noise)[0] for chosen in (source, made)]
facts["log of a run"] = list(lines)
lines = log_lines()
shared(sparse(model))
facts["log of a forecast"] = list(lines)


def wrapped(source):
    """A node's wrapper around the diffusion model, which may leave its blocks out for one branch alone."""
    patched = source.clone()
    patched.add_wrapper_with_key(
        "diffusion_model", "another", lambda executor, *args, **kwargs: executor(*args, **kwargs)
    )
    return patched


def wrapped_outside(source):
    """A node's wrapper around what surrounds the network, which is given a forward's options too."""
    patched = source.clone()
    patched.add_wrapper_with_key("apply_model", "another", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    return patched


def compiled(source):
    patched = source.clone()
    set_torch_compile_wrapper(patched, backend="eager")
    return patched


def passing_values(source, **more):
    """What is said of a sampler that passes values for network classes of its own pack, as RES4LYF's do."""

    def act(model, x, levels, extra_args, **_):
        extra_args["model_options"]["transformer_options"] |= {"ExtraOptions": object(), "x_init": x, "row": 1, **more}
        return model(x, levels[0] * x.new_ones(len(x)), **extra_args)

    made = shared(source)
    return refusal(lambda: sample(made, comfy.samplers.KSAMPLER(act), sigmas, noise, text))


facts["values of a sampler"] = {
    "nobody else inside": passing_values(model),
    "a guidance too": passing_values(model, stg_blocks=[1]),
    "sparse attention": passing_values(sparse(model)),
    "a LoRA": passing_values(with_lora(model)),
    "compiled": passing_values(compiled(model)),
    "attention": passing_values(sparse(attending(model))),
    "a replaced part": passing_values(replacing(model)),
    "hooks": passing_values(hooked(model)),
    "wrapped": passing_values(wrapped(model)),
    "wrapped outside": passing_values(wrapped_outside(model)),
}
facts["values of RES4LYF"] = sorted(refusals.OF_RES4LYF)


def setting_off(source):
    """A hook that sets a prompt's branch off against the other, as NAG does, and acts where both are in the batch."""
    patched = source.clone()

    def hook(args, extra):
        out, branches = extra["original_block"](args), args["transformer_options"]["cond_or_uncond"]
        if sorted(branches) != [0, 1]:
            return out
        parts = dict(zip(branches, out["img"].chunk(2), strict=True))
        parts[0] = 2.0 * parts[0] - parts[1]
        return {**out, "img": torch.cat([parts[branch] for branch in branches])}

    patched.set_model_patch_replace(hook, "dit", "double_block", 1)
    return patched


def divided(source, **choices):
    """The groups of a run with guidance, the line of the report that foretells them, and the log's last."""
    session = HereInstead(source)
    run(shared(source, session=session, **choices), cfg=2.0)
    line = next(line for line in report.splitlines() if line.startswith("CFG above 1"))
    return {"groups": sorted({str(groups) for groups in session.divisions}), "report": line, "log": lines[-1]}


facts["divisions"] = {
    "auto": divided(model),
    "sequence": divided(model, division="sequence"),
    "sharded weights": divided(model, weights="sharded"),
    "sharded weights, wrapped": divided(wrapped(model), weights="sharded"),
    "whole weights, wrapped": divided(wrapped(model), division="branches"),
    "whole weights, wrapped, auto": divided(wrapped(model)),
    "sparse": divided(sparse(model)),
    "a LoRA": divided(with_lora(model)),
    "a file's own attention": divided(wishing(model)),
    "branches, one set off against the other": divided(setting_off(model), division="branches"),
    "one set off against the other": divided(setting_off(model)),
    "attention": divided(attending(model)),
    "attention under sparse": divided(sparse(attending(model))),
    "a replaced part": divided(replacing(model)),
    "a patch": divided(hooked(model)),
}


class Asked(Exception):
    """What ComfyUI wants to be free on its GPU; the run ends there."""


def ask(size, *_, **__):
    raise Asked(size)


def wanted(made):
    """The bytes that ComfyUI frees on its GPU before a run of a shared out MODEL."""
    (watch,) = made.get_nested_additional_models()
    here, free = watch.load_device, mm.free_memory
    watch.load_device, mm.free_memory = torch.device("cuda:0"), ask
    watch.model.device = watch.load_device  # as behind the first loading
    mm.current_loaded_models.clear()  # which keep their devices
    try:
        run(made)
    except Asked as asked:
        return float(asked.args[0])
    finally:
        watch.load_device, mm.free_memory, watch.model.device = here, free, here


made = shared(model)
run(made)
first = set(bridge.SESSION.runs)
run(made)
every = set(bridge.SESSION.runs)
facts["names of two runs"] = [len(first), len(every - first), len(every)]
facts["room on ComfyUI's GPU"] = {}
for held in ("whole", "sharded"):
    made = shared(model, weights=held)
    seen = {"before the first run": wanted(made)}
    run(made)
    seen["behind it"] = wanted(made)
    seen["by the node with another choice"] = wanted(
        shared(model, weights=held, scheme="ulysses", session=bridge.SESSION)
    )
    memory.offload(bridge.SESSION)
    seen["offloaded"] = wanted(made)
    run(made)
    bridge.SESSION.pool = object()
    seen["other workers"] = wanted(made)
    facts["room on ComfyUI's GPU"][held] = seen
about = forecast.where_possible(model, sharding.find_shardable(model)[1], 2)
facts["forecast"] = {"whole": about.whole, "sharded": about.sharded}
mm.get_torch_device, there = lambda: torch.device("cuda:7"), mm.get_torch_device
facts["room where no worker is"] = shared(model).get_nested_additional_models()[0].model_size()
mm.get_torch_device = there
x = torch.zeros(4, 16, 2, 4, 4)
facts["why whole"] = {
    words: branches.why_whole({"x": x, "c_crossattn": None, **inputs}, count)
    for words, count, inputs in (
        ("nothing", 2, {"t": x[:, 0, 0, 0, 0], "ref_latents": [x], "number": 3, "record": {"latent": x[:1]}}),
        ("a table", 2, {"t": torch.zeros(()), "table": torch.zeros(7, 2)}),
        ("a list of another length", 4, {"ref_latents": [x, x[:1]]}),
        ("unlike branches", 3, {}),
    )
}


class Foreign(torch.Tensor):
    """As GGUF's loader has them: a class that nothing takes apart."""


session, marks = HereInstead(model), []
queries = model.model.diffusion_model.transformer_blocks[0].attn1.to_q
plain, queries.weight = (
    queries.weight,
    torch.nn.Parameter(queries.weight.data.as_subclass(Foreign), requires_grad=False),
)
facts["foreign tensors"] = {
    held: refusal(lambda held=held: shared(model, weights=held)) for held in ("whole", "sharded")
}
queries.weight = plain
for fault, source in (
    (RuntimeError("rank 1 ended while it started"), model),
    (None, model),
    (ValueError("no pool of workers is running"), model),  # which the user mends outside of the prompt
    (None, cached(model)),  # and this within it
):
    session.fault = fault
    made = shared(source, session=session, strict=False)
    assert (made is source) == (fault is not None or source is not model)
    marks.append(node.fingerprint_inputs(devices="cpu,cpu", scheme="auto"))
facts["marks"] = marks
facts["mark of one device"] = node.fingerprint_inputs(devices="cpu")
facts["marks of links"] = [
    node.fingerprint_inputs(devices=None, scheme="auto"),
    pack["EVDiTLoadTilePlan"].fingerprint_inputs(plan_name="the loaded model", text=None),
    pack["EVDiTLoadTilePlan"].fingerprint_inputs(plan_name=None, text="all:1"),
]
facts["mark of a wrong text"] = node.fingerprint_inputs(devices="?")
print(json.dumps(facts))
