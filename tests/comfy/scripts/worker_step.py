"""Steps of one worker that stands alone: what it asks of its device, when runs begin and end for other nodes, and what travels
to it. Prints JSON."""

import json
from collections import Counter
from types import SimpleNamespace

from host import call, load_pack, torch  # isort: skip
import sys  # isort: skip

import comfy.model_management as mm  # isort: skip
from comfy.patcher_extension import CallbacksMP  # isort: skip

pack = load_pack()


def module(ending):
    (found,) = (found for name, found in sys.modules.items() if name.endswith(ending))
    return found


__import__(module("comfy_bridge.parallel.model").__package__ + ".host")
host, packing, sharding = (module(f"comfy_bridge.parallel.{name}") for name in ("host", "packing", "sharding"))
(model,) = call(pack["EVDiTModelLoader"], model_name="tiny (built in)", weight_dtype="default")


class Alone:
    """The comm of one rank; of more than one it computes nothing."""

    through_host = True

    def __init__(self, rank=0, size=1):
        self.rank, self.size, self.sent = rank, size, Counter()

    def gather(self, name, tensors, forms):
        return [list(tensors)]


def worker(*models, **about):
    comm = Alone(**about)
    found = host.ComfyHost(SimpleNamespace(device="cpu"), comm)
    found.models = {f"model {number}": sharding.shard_model(chosen, comm) for number, chosen in enumerate(models)}
    return found


def step(of, size, key="model 0", **about):
    x = torch.zeros(size)
    text = torch.zeros(size[0], 64, 64), torch.ones(size[0], 64, dtype=torch.long)
    inputs = {"x": x, "t": torch.full(size[:1], 10.0), "c_crossattn": text[0], "attention_mask": text[1]}
    tensors = {}
    given = packing.pack({**inputs, "options": {"cond_or_uncond": [0, 1][: size[0]]}}, tensors)
    with torch.inference_mode():
        of.step({"key": key, "inputs": given, "scheme": "auto", **about}, tensors)


class Asked(Exception):
    """What a step asks of the device; it ends there."""


def ask(_, memory_required):
    raise Asked(memory_required)


def asked(rank=0, size=1, **about):
    load, mm.load_models_gpu = mm.load_models_gpu, ask
    try:
        step(worker(model, rank=rank, size=size), (2, 4, 24, 90, 160), **about)
    except Asked as found:
        return float(found.args[0])
    finally:
        mm.load_models_gpu = load


def parted(groups):
    return {"division": {"groups": groups, "parts": [[0, 1], [1, 2]]}}


facts = {
    "asked": {
        "whole": float(model.model.memory_required([2, 4, 24, 90, 160])),
        "by ranks": {size: asked(size=size) for size in (1, 2, 4, 8)},
        "by weights": [asked(rank, 2, weights=[3, 1]) for rank in (0, 1)],
        "by branch, two ranks": asked(size=2, **parted([[0], [1]])),
        "by branch, four unlike ranks": [
            asked(rank, 4, weights=[3, 3, 1, 1], **parted([[0, 2], [1, 3]])) for rank in range(4)
        ],
    }
}
# Each token of the text of 64, in the place of a model whose estimate counts it.
model.model.memory_usage_factor_conds = ("c_crossattn", "not given")
with_text = float(model.model.memory_required([2, 4, 24, 90, 160], cond_shapes={"c_crossattn": [[2, 64, 64]]}))
facts["asked"]["whole with text"], facts["asked"]["with text"] = with_text, asked()
model.model.memory_usage_factor_conds = ()

calls = {name: Counter() for name in ("model 0", "model 1")}


def counting(name):
    patched = model.clone()
    for kind in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP):
        patched.add_callback_with_key(kind, "other", lambda *_, kind=kind: calls[name].update([kind]))
    return patched


def counted():
    return {name: dict(found) for name, found in calls.items()}


two = worker(counting("model 0"), counting("model 1"))
small, facts["runs"] = (1, 4, 2, 8, 8), {}
for run in ("first", "second"):
    for _ in range(2):
        step(two, small, run=run)
facts["runs"]["two of two steps"] = counted()
step(two, small, key="model 1", run="third")
facts["runs"]["another model's"] = counted()
two.offload()
two.offload()
facts["runs"]["offloaded"] = counted()

inputs = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), "list": [(torch.full((1,), 2.0), 3)]}
tensors = {}
sent = json.loads(json.dumps(packing.pack(inputs, tensors)))
found = packing.unpack(sent, tensors, torch.device("cpu"))
facts["packed"] = [float(found["a"]["b"]), float(found["a.b"]), float(found["list"][0][0]), found["list"][0][1]]
facts["keys"] = {}
for key in (0, "_tensor"):
    try:
        packing.pack({"options": {"blocks": {key: 1}}}, {})
    except ValueError as error:
        facts["keys"][str(key)] = str(error)
print(json.dumps(facts))
