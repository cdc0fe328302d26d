"""What the nodes say to input that cannot work, and whether the model ran before they said it. Prints JSON."""

import json

from host import PACK, call, load_pack, log_lines, sample, torch  # isort: skip
import os  # isort: skip
import resource  # isort: skip
import signal  # isort: skip
import sys  # isort: skip
import tempfile  # isort: skip

import comfy.samplers  # isort: skip
import folder_paths  # isort: skip
import numpy  # isort: skip

pack = load_pack()
(TilePlan,) = (m.TilePlan for name, m in sys.modules.items() if name.endswith("efficient_vdit_core.plan"))
(model,) = call(pack["EVDiTModelLoader"], model_name="tiny (built in)", weight_dtype="default")
(sigmas,) = call(pack["EVDiTConsistencySigmas"], model=model, segments=2, steps=2)
noise, text = torch.randn(1, 4, 8, 8, 8), torch.randn(1, 9, 64)
evaluations = []
model.model.diffusion_model.register_forward_pre_hook(lambda *_: evaluations.append(1))


def refusal(act) -> dict:
    """The message of the ValueError that ``act`` raises, and how often the model had run by then."""
    evaluations.clear()
    try:
        act()
    except ValueError as error:
        return {"message": str(error), "evaluations": len(evaluations)}
    return {"message": "", "evaluations": len(evaluations)}


def patch(plan, **changes):
    choices = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **changes}
    return call(pack["EVDiTSparseAttention"], model=model, plan=plan, **choices)


def run(x, context):
    return sample(model, comfy.samplers.sampler_object("euler"), sigmas, x, context)


def levels(**changes):
    return call(pack["EVDiTConsistencySigmas"], **{"model": model, "segments": 2, "steps": 4, **changes})[0].tolist()


fits = TilePlan.uniform(1)
facts = {
    "plan of another family": refusal(lambda: patch(TilePlan.uniform(1, family="wan"))),
    "plan of another depth": refusal(lambda: patch(TilePlan.uniform(1, layers=30))),
    "plan of other heads": refusal(lambda: patch(TilePlan.uniform(1, heads=24))),
    "plan by head of more heads": refusal(lambda: patch(TilePlan.from_text("0-5:[0-15]1:7~1[16-23]0:8+1"))),
    "window that is empty": refusal(lambda: patch(fits, start_percent=0.6, end_percent=0.4)),
    "backend that cannot run": refusal(lambda: patch(fits, backend="triton")),
    "backend that is none": refusal(lambda: patch(fits, backend="cuda")),
    "chunk heads of a model that has none": refusal(lambda: patch(fits, placement="chunk heads")),
    "layer beyond the last": refusal(lambda: patch(fits, dense_blocks="0-6")),
    "latent of 16 channels": refusal(lambda: run(torch.randn(1, 16, 8, 8, 8), text)),
    "text of another encoder": refusal(lambda: run(noise, torch.randn(1, 9, 4096))),
    "a fraction of a step": refusal(lambda: levels(steps=3.5)),
    "a fraction where a part starts": refusal(lambda: levels(start_step=1.5)),
    "a fraction of a residual's steps": refusal(lambda: patch(fits, residual_every=2.5)),
    "a residual renewed at each step": refusal(lambda: patch(fits, residual_every=1)),
    "a list of numbers": refusal(lambda: levels(steps=torch.ones(2))),
    "more segments than steps": refusal(lambda: call(pack["EVDiTConsistencySigmas"], model=model, segments=9, steps=3)),
}

# Numbers as links from sockets of any kind bring them, which ComfyUI does not convert.
facts["whole numbers"] = {
    "expected": levels(steps=4),
    "found": [levels(steps=four) for four in (4.0, numpy.int64(4), numpy.float32(4), torch.tensor(4))],
    "plan": call(pack["EVDiTTilePlan"], reference_frames=2.0)[0].to_text(),
}

# A model whose token layout is not known: one line in the log, and no hook.
unknown, lines = model.clone(), log_lines()
unknown.add_object_patch("diffusion_model", torch.nn.Linear(1, 1))
settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0}
(left,) = call(pack["EVDiTSparseAttention"], model=unknown, plan=fits, **settings)
facts["unknown model"] = {
    "lines": lines,
    "hooked": "optimized_attention_override" in left.model_options["transformer_options"],
}
# A disk that is full: the plan's name is free again.
with tempfile.TemporaryDirectory() as models, tempfile.TemporaryDirectory() as shared:
    folder_paths.models_dir, folder = models, os.path.join(models, "evdit_plans")
    folder_paths.folder_names_and_paths["evdit_plans"] = ([folder], {".json"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        call(pack["EVDiTSaveTilePlan"], plan=fits, filename_prefix="plan")
        facts["full disk"] = {"error": "", "left": os.listdir(folder)}
    except ValueError as error:
        facts["full disk"] = {"error": type(error).__name__, "left": os.listdir(folder)}
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    call(pack["EVDiTSaveTilePlan"], plan=fits, filename_prefix="plan")
    facts["saved"] = os.listdir(folder)
    # A folder of extra_model_paths.yaml, which comes first in ComfyUI's list.
    folder_paths.folder_names_and_paths["evdit_plans"] = ([shared, folder], {".json"})
    fits.save(os.path.join(shared, "plan_00002.json"))
    (name,) = call(pack["EVDiTSaveTilePlan"], plan=fits, filename_prefix="plan")
    # The page's texts of all plans, which ComfyUI asks for several times a prompt.
    (files,) = (m for name, m in sys.modules.items() if name.endswith("nodes.plan_files"))
    listed, original = [], folder_paths.get_filename_list
    folder_paths.get_filename_list = lambda folder: listed.append(folder) or original(folder)
    facts["texts"] = {name: text for name, text in files.text_forms().items() if "(preset)" not in name}
    facts["lists made for them"], folder_paths.get_filename_list = len(listed), original
    facts["beside another folder"] = {"name": name, "there": os.listdir(shared), "here": sorted(os.listdir(folder))}
    # Files that would keep the server from answering: they are left to a run, and the rest is told in time.
    with open(os.path.join(folder, "large.json"), "w") as large:
        large.write(fits.to_json() + " " * files.MOST_DRAWN)
    folder_paths.filename_list_cache.clear()
    files.PATIENCE = 60.0
    told = files.text_forms()
    files.text_form.cache_clear()
    files.PATIENCE = 0.0
    facts["large"] = {"text": told["large.json"], "others": {*told.values()} > {None, "all:1"}}
    facts["large"] |= {"loaded": call(pack["EVDiTLoadTilePlan"], plan_name="large.json")[1]}
    facts["large"] |= {"after the time": list({*files.text_forms().values()})}
control = refusal(lambda: run(noise, text))
assert control == {"message": "", "evaluations": 2}, (control, PACK)
print(json.dumps(facts))
