"""MODELs whose weights are shared out over 2 and 3 CPU ranks, in the real ComfyUI, against the same ranks with whole ones.

Prints JSON.
"""

import gc
import importlib
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path

from own_ranks import on_ranks

from host import load_pack, sample, torch  # isort: skip
import comfy.model_management as mm  # isort: skip
import comfy.samplers  # isort: skip
import comfy.lora  # isort: skip
import comfy.sd  # isort: skip
from comfy.model_base import BaseModel  # isort: skip
from comfy.ldm.wan.model import WanModel  # isort: skip
from comfy.model_patcher import ModelPatcher  # isort: skip
from comfy.ops import disable_weight_init  # isort: skip
from safetensors.torch import save_file  # isort: skip

load_pack()


def module(ending: str):
    (found,) = (m for name, m in sys.modules.items() if name.endswith(ending))
    return found


importlib.import_module(module("comfy_bridge.parallel.sharding").__name__.replace("sharding", "mapped_files"))
sharding, weights = module("comfy_bridge.parallel.sharding"), module("comfy_bridge.parallel.sharded_weights")
mapped_files, weight_bytes = module("comfy_bridge.parallel.mapped_files"), module("sharding.weight_bytes")
comm = None  # over the ranks that work together
# Weights of one block and of two.
LAYERS = ("diffusion_model.blocks.1.self_attn.q.weight", "diffusion_model.blocks.0.ffn.0.weight")


def state_dict(seed: int, layers: int = 6) -> dict[str, torch.Tensor]:
    """A random Wan in the names that ComfyUI's loader recognises it by."""
    torch.manual_seed(seed)
    settings = {"dim": 256, "num_heads": 2, "num_layers": layers, "ffn_dim": 512, "freq_dim": 256, "in_dim": 16}
    made = WanModel(**settings, out_dim=16, text_dim=4096, cross_attn_norm=True, model_type="t2v",
                    operations=disable_weight_init, dtype=torch.float32)  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return {name: x.detach().clone() for name, x in made.state_dict().items()}


def quantised(found: dict[str, torch.Tensor], form: str = "float8_e4m3fn") -> dict[str, torch.Tensor]:
    """The matrices of the blocks in ComfyUI's own form of 8 bits."""
    made = {}
    for name, x in found.items():
        made[name] = x
        if name.startswith("blocks.") and name.endswith(".weight") and x.ndim == 2:
            scale = x.abs().max() / 448
            made[name] = (x / scale).to(torch.float8_e4m3fn)
            made[name.replace(".weight", ".weight_scale")] = scale
            about = json.dumps({"format": form}).encode()
            made[name.replace(".weight", ".comfy_quant")] = torch.frombuffer(bytearray(about), dtype=torch.uint8)
    return made


def loaded(found: dict[str, torch.Tensor]) -> ModelPatcher:
    return comfy.sd.load_diffusion_model_state_dict(dict(found))


def with_lora(model: ModelPatcher, strength: float) -> ModelPatcher:
    made, random = model.clone(), torch.Generator().manual_seed(7)
    for name in LAYERS:
        rows, columns = model.model.state_dict()[name].shape
        lora = [torch.randn(rows, 4, generator=random) * 0.3, torch.randn(4, columns, generator=random) * 0.3]
        key = name.removesuffix(".weight")
        patch = comfy.lora.load_lora(
            {f"{key}.lora_up.weight": lora[0], f"{key}.lora_down.weight": lora[1]}, {key: name}
        )
        assert made.add_patches(patch, strength)
    return made


def video(model) -> torch.Tensor:
    noise = torch.randn(1, 16, 5, 6, 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(2))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
    return sample(model, comfy.samplers.sampler_object("euler"), sigmas, noise, text)


def both(model) -> tuple[torch.Tensor, torch.Tensor]:
    """What the ranks make with whole and with shared out weights."""
    return tuple(video(sharding.shard_model(model, comm, weights=held)) for held in weights.WEIGHTS)


def memory() -> dict:
    """ComfyUI's own count, and the tensors that lie on the device; on this CPU the blocks' own copy is the host's."""
    model = loaded(state_dict(0))
    shared = sharding.shard_model(model, comm, weights="sharded")
    video(shared)
    blocks = [mm.module_size(block) for block in model.model.diffusion_model.blocks]
    whole = mm.module_size(model.model)
    found = {
        "blocks": blocks,
        "outside": whole - sum(blocks),
        "counted": shared.loaded_size(),
        "size": shared.model_size(),
        "shared": shared.shared.nbytes,
        "most whole": shared.shared.most_whole,
    }
    mm.unload_all_models()
    return {**found, "unloaded": [is_held(model), shared.loaded_size()]}


def is_held(model) -> bool:
    return getattr(model.model, weights.HELD, None) is not None


def loads() -> dict:
    """When parts are loaded: once for many steps of a model, and anew where another clone has come between."""
    count, load = [], weights.ShardedWeightsPatcher.load
    weights.ShardedWeightsPatcher.load = lambda self, *args, **kwargs: count.append(1) or load(self, *args, **kwargs)
    model, found = loaded(state_dict(0)), {}
    shared, other = (sharding.shard_model(source, comm, weights="sharded") for source in (model, with_lora(model, 1.0)))
    whole = sharding.shard_model(model, comm)
    try:
        for words, patcher in (("first", shared), ("whole", whole), ("again", shared), ("other", other)):
            for _ in range(3):
                mm.load_models_gpu([patcher])
            if words == "whole":
                video(whole)
            found[words] = [len(count), is_held(model)]
        del other
        gc.collect()
        found["the other is gone"] = [len(count), is_held(model)]
        del patcher
        gc.collect()
        found["and nobody has it"] = [len(count), is_held(model)]
    finally:
        weights.ShardedWeightsPatcher.load = load
    return found


def loras() -> dict:
    """A strength changed between runs; the last run is that of the first once more."""
    model, found, before = loaded(state_dict(0)), {}, None
    for words, strength in (("1.0", 1.0), ("0.5", 0.5), ("again 1.0", 1.0)):
        whole, shared = both(with_lora(model, strength))
        found[words] = torch.equal(whole, shared) and (before is None or not torch.equal(before, shared))
        before = shared
    whole, shared = both(model)
    found["none"] = torch.equal(whole, shared) and not torch.equal(before, shared)
    return found


def bypassed() -> bool:
    """A LoRA beside the weights, which ComfyUI leaves as they are."""
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        return True
    model, random = loaded(state_dict(0)), torch.Generator().manual_seed(3)
    name = "diffusion_model.blocks.0.self_attn.q"
    lora = {f"{name}.lora_A.weight": torch.randn(4, 256, generator=random),
            f"{name}.lora_B.weight": torch.randn(256, 4, generator=random)}  # fmt: skip
    changed, _ = comfy.sd.load_bypass_lora_for_models(model, None, lora, 1.0, 0.0)
    plain = video(sharding.shard_model(model, comm))
    whole, shared = both(changed)
    return torch.equal(whole, shared) and not torch.equal(plain, shared)


def experts() -> dict:
    """Two models of one run in turn, both in memory; each keeps its own parts."""
    models = [loaded(state_dict(seed)) for seed in (0, 1)]
    whole = [video(sharding.shard_model(model, comm)) for model in models]
    shared = [sharding.shard_model(model, comm, weights="sharded") for model in models]
    order = [0, 1, 0, 1]
    same = [torch.equal(video(shared[number]), whole[number]) for number in order]
    return {"same": same, "differ": not torch.equal(*whole), "both held": all(is_held(model) for model in models)}


def broken_off() -> dict:
    """A run that ends within a block, then another model, then the first one again."""
    model, other = loaded(state_dict(0)), loaded(state_dict(1))
    whole = [video(sharding.shard_model(m, comm)) for m in (model, other)]
    shared = [sharding.shard_model(m, comm, weights="sharded") for m in (model, other)]

    def stop(*_):
        raise mm.InterruptProcessingException

    handle, stopped = model.model.diffusion_model.blocks[2].ffn.register_forward_pre_hook(stop), False
    try:
        video(shared[0])
    except mm.InterruptProcessingException:
        stopped = True
    handle.remove()
    return {
        "stopped": stopped,
        "another": torch.equal(video(shared[1]), whole[1]),
        "again": torch.equal(video(shared[0]), whole[0]),
    }


def eight_bits() -> dict:
    """ComfyUI's quantised tensors, plain and with a LoRA that is merged and rounded again."""
    model = loaded(quantised(state_dict(0)))
    kind = type(model.model.diffusion_model.blocks[0].self_attn.q.weight).__name__
    whole, shared = both(model)
    merged = both(with_lora(model, 1.0))
    return {
        "class": kind,
        "same": torch.equal(whole, shared),
        "merged": torch.equal(*merged) and not torch.equal(whole, merged[0]),
    }


def another_precision() -> bool:
    """Weights that are cast in every forward, as ComfyUI does on request."""
    made = loaded({name: x.bfloat16() for name, x in state_dict(0).items()})
    made.set_model_compute_dtype(torch.float32)
    whole, shared = both(made)
    return torch.equal(whole, shared)


def mapped() -> dict:
    """Which share of the blocks' bytes lies in pages of the file, with and without our asking, for three files.

    Videos are compared with those of weights that lie in no file: a CPU's kernels round by the address of a weight.
    """
    if "assign" not in inspect.signature(BaseModel.load_model_weights).parameters:
        return {"skipped": "this ComfyUI copies every weight out of its file"}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        float32 = state_dict(0)
        half = {name: x.half() for name, x in float32.items()}
        for words, weights_of_file in (("float32", float32), ("converted", half), ("8 bits", quantised(float32))):
            path = os.path.join(folder, f"{words}.safetensors")
            save_file(weights_of_file, path)
            copied = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32})
            apart = comfy.sd.load_diffusion_model_state_dict(dict(weights_of_file), {"dtype": torch.float32})
            with mapped_files.files_stay_mapped():
                kept = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float32})
            dtypes = [{n: x.dtype for n, x in m.model.diffusion_model.named_parameters()} for m in (copied, kept)]
            shared = video(sharding.shard_model(kept, comm, weights="sharded"))
            found[words] = {
                "copied": share_in_file(copied, path),
                "kept": share_in_file(kept, path),
                "same": torch.equal(shared, video(sharding.shard_model(apart, comm))),
                "dtypes": dtypes[0] == dtypes[1],
            }
    return found


def share_in_file(model: ModelPatcher, path: str) -> float:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    inside = total = 0
    for block in model.model.diffusion_model.blocks:
        for _, x in weight_bytes.weights_of(block):
            for part in weight_bytes.take_apart(x)[0]:
                total += part.nbytes
                inside += part.nbytes * any(start <= part.data_ptr() < stop for start, stop in spans)
    return inside / total


def refusals() -> dict:
    class Strange(ModelPatcher):
        pass

    model, found = loaded(state_dict(0)), {}
    strange, compiled, wrapped, high = (model.clone() for _ in range(4))
    strange.__class__ = Strange
    compiled.add_wrapper_with_key("apply_model", "torch.compile", lambda executor, *a, **k: executor(*a, **k))
    wrapped.add_weight_wrapper(LAYERS[0], lambda weight: weight)
    high.offload_device = torch.device("cuda", 0)  # as --highvram sets it
    for words, source in (("strange", strange), ("compiled", compiled), ("wrapped", wrapped), ("high", high)):
        try:
            sharding.shard_model(source, comm, weights="sharded")
        except ValueError as error:
            found[words] = str(error)
    return found


CASES = (memory, loads, loras, bypassed, experts, broken_off, eight_bits, another_precision, mapped, refusals)


def all_cases(ranks: int) -> dict:
    global comm
    comm = module("sharding.communicator").Communicator()
    with torch.inference_mode():  # as ComfyUI runs its nodes
        return {case.__name__: case() for case in CASES}


print(json.dumps({str(ranks): on_ranks(all_cases, ranks) for ranks in (2, 3)}))
