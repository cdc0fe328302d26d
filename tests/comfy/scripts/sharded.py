"""Every native video family under plans on 2 CPU ranks, one of each kind on 3 and under all that may differ (with
EVDIT_ALL_RANKS all of them), a few on 4, against one process. Prints JSON.

Names of cases in $EVDIT_CASES, with commas between, run only these.
"""

import json
import os
import sys
import traceback

from own_ranks import on_ranks

from host import call, load_pack, torch  # isort: skip
import comfy.model_management as mm  # isort: skip
from comfy.patcher_extension import WrappersMP  # isort: skip
from tiny_models import CASES, Case, build, missing, run  # isort: skip

from family_names import ONE_OF_EACH  # isort: skip

pack = load_pack()


def module(ending: str):
    (found,) = (m for name, m in sys.modules.items() if name.endswith(ending))
    return found


plans, packing = module("efficient_vdit_core.plan"), module("comfy_bridge.parallel.packing")
sharding, tiles = module("comfy_bridge.parallel.sharding"), module("efficient_vdit_core.tiles")
head_patterns, division = module("efficient_vdit_core.plan.head_patterns"), module("sharding.division")
branches, hooks = module("comfy_bridge.parallel.branches"), module("comfy_bridge.hook")
reports, reasons = module("attention.report.report"), module("attention.report.reason_names")
choices, trials = module("attention.hook.backend_choices"), module("efficient_vdit_core.attention.autotune.trial")
UNLIKE = (16, 7, 11)
THOROUGH = CASES if os.environ.get("EVDIT_ALL_RANKS") else ONE_OF_EACH
IN_GROUPS = ("wan", "wan i2v", "ltx", "hunyuan", "h3 with guidance")  # on four ranks
counts, divided = sharding.Counter(), []
counted = reports.AttentionReport()  # the same for attention calls
comm = None  # over the ranks that work together
module("sharding.blocks").Counter = lambda: counts  # of all forwards of a run


def sparse(model, plan, **more):
    settings = {"start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, **more}
    return call(pack["EVDiTSparseAttention"], model=model, plan=plan, **settings)[0]


def through_the_workers(executor, x, t, c_concat=None, c_crossattn=None, control=None, options=None, **conds):
    """A forward whose inputs went to a worker and arrived there."""
    tensors = {}
    given = {"x": x, "t": t, "c_concat": c_concat, "c_crossattn": c_crossattn, **conds}
    told = packing.unpack(json.loads(json.dumps(packing.pack(given, tensors))), tensors, x.device)
    names = ("x", "t", "c_concat", "c_crossattn")
    return executor(*(told.pop(name) for name in names), control, options, **told)


def by_branch(executor, x, t, c_concat=None, c_crossattn=None, control=None, options=None, **conds):
    """A forward whose guidance branches go to groups of ranks, where they come in one batch."""
    count = len(options["cond_or_uncond"])
    inputs = {"x": x, "t": t, "c_concat": c_concat, "c_crossattn": c_crossattn, **conds}
    chosen = division.choose_division("branches", (1.0,) * comm.size, count, lambda b, ranks: b / len(ranks))
    if chosen.by_branches:
        assert not branches.why_whole(inputs, count), branches.why_whole(inputs, count)
        options = {**options, branches.DIVISION_KEY: chosen}
        divided.append(chosen.text())
    return executor(x, t, c_concat, c_crossattn, control, options, **conds)


def shared(source, case: Case, weights: tuple[int, ...] = (), hold: str = "whole", divide: bool = False):
    """What the ranks find together; ``counts`` says how many layers took which scheme, ``counted`` which calls were sparse,
    ``divided`` which groups of ranks had branches of their own.

    Two ranks choose the scheme themselves, three take that of the references wherever it can be. ``weights``: of
    unlike ranks. ``hold``: how the ranks hold the model. ``divide``: by branch.
    """
    counts.clear()
    counted.reset()
    divided.clear()
    return run(share(source, weights, hold, divide), case)


def share(source, weights: tuple[int, ...] = (), hold: str = "whole", divide: bool = False):
    source = source.clone()
    if divide:
        source.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "by branch", by_branch)
    model = sharding.shard_model(source, comm, weights=hold)
    options = model.model_options["transformer_options"]
    options[sharding.SCHEME_KEY] = "auto" if comm.size == 2 else "rb"
    options[branches.WEIGHTS_KEY], options[sharding.REPORT_KEY] = weights, counted
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "through the workers", through_the_workers)
    return model


def after_one_rank_alone_has_unloaded(source, case: Case):
    """Its GPU may hold more than the others': it loads its part again, and must gather what they do."""
    model = share(source, hold="sharded")
    run(model, case)
    if comm.rank == 0:
        mm.unload_all_models()
    return run(model, case)


def over_the_video(report) -> dict:
    """What a report tells of self-attention over the video: the ranks count no other calls."""
    dense = {reason: count for reason, count in report.dense.items() if reason not in reasons.NOT_OVER_THE_VIDEO}
    return {"sparse": report.sparse, "density": round(report.density_sum, 9), "dense": dense}


def by_one_process(model, case: Case, **more):
    """What one process finds: rank 0, which tells. The others go on to the next run and wait there."""
    return run(model, case, **more) if comm.rank == 0 else None


def distance(a, b) -> float:
    """Between what ranks and one process find, or two runs of one process."""
    return float((a - b).abs().max() / b.abs().max()) if comm.rank == 0 else 0.0


def facts(name: str, case: Case) -> dict:
    model = build(case)
    try:
        family, _ = sharding.find_shardable(model)
    except ValueError as error:
        return {"refused": str(error)}
    weights = {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}
    pattern = tiles.TilePattern
    depth, heads = (count(model.model.diffusion_model) for count in (family.depth, family.head_count))
    several = head_patterns.by_head([pattern(1, means=1), *[pattern(None)] * (heads - 1)])
    found, dense, made = {}, by_one_process(model, case), {}
    thorough = name in THOROUGH
    for words, plan in (
        ("one reference", plans.TilePlan.uniform(1)),
        ("a window", plans.TilePlan(uniform_pattern=pattern(0, window=1))),
        ("heads", plans.TilePlan(patterns=(several,) * depth, heads=heads)),
    )[: None if thorough else 1]:
        source = sparse(model, plan)
        want = by_one_process(source, case)
        calls = over_the_video(hooks.report_of(source))
        got = shared(source, case)
        found[words] = {"error": distance(got, want), "effect": distance(want, dense), "schemes": dict(counts)}
        found[words] |= {"calls of one process": calls, "calls of ranks": over_the_video(counted)}
        made[words] = source, want, got
    source, alone, whole = made["one reference"]
    before = comm.sent["gather of weights"]
    found["sharded weights are the same"] = torch.equal(shared(source, case, hold="sharded"), whole)
    found["bytes of weights"] = comm.sent["gather of weights"] - before
    if comm.size == 2 and thorough:  # a third rank would add its time and nothing else
        found["also after one rank has unloaded"] = torch.equal(after_one_rank_alone_has_unloaded(source, case), whole)
        found["and whole ones after them"] = torch.equal(shared(source, case), whole)
    if thorough:
        found["unlike ranks"] = {"error": distance(shared(source, case, UNLIKE[: comm.size]), alone)}
    if not case.single:
        found |= divisions(source, case, alone, thorough)
    if name == "wan":
        found["a slow layer"] = with_a_slow_layer(model, case)
    found["no plan"] = {"error": distance(shared(model, case), dense)}
    found["after it"] = distance(by_one_process(model, case), dense)
    found["weights same"] = all(torch.equal(v, weights[k]) for k, v in model.model.diffusion_model.state_dict().items())
    return found


def with_a_slow_layer(model, case: Case) -> dict:
    """Dense attention is measured faster than the second layer's pattern, by the one rank that measures, as by one process."""
    plan = plans.TilePlan.from_text("0:1 1:2 2:1")
    source, measured = sparse(model, plan, decline_slow=True), []

    def trial(shape, layout, pattern, **_):
        measured.append((shape.batch, layout.tokens, pattern.k))
        times = {"dense": 2.0, "frames": 1.0 if pattern.k == 1 else 3.0}
        return trials.Choice(min(times, key=times.__getitem__), times)

    plain, choices.measured_choice = choices.measured_choice, trial
    try:
        want, alone = by_one_process(source, case), measured.copy()
        calls = over_the_video(hooks.report_of(source))
        measured.clear()
        got, told, same = shared(source, case), over_the_video(counted), measured == alone or comm.rank > 0
        ranks = comm.gather("test", [torch.tensor([len(measured)])], [[((1,), torch.int64)]] * comm.size)
        by_branches = distance(shared(source, case, divide=True), want)
    finally:
        choices.measured_choice = plain
    every = by_one_process(sparse(model, plan), case)
    effect = distance(every, want)
    return {
        "error": distance(got, want), "by branch": by_branches, "effect": effect, "as one process": same,
        "measured by": [int(found[0]) for found in ranks],
        "calls of one process": calls, "calls of ranks": told,
    }  # fmt: skip


def divisions(source, case: Case, alone, thorough: bool = True) -> dict:
    """Both branches of a guidance to groups of ranks, which are unlike where there are three: whole weights, and where it is
    ``thorough`` sharded ones."""
    unlike = UNLIKE[: comm.size] if comm.size == 3 else ()
    got = shared(source, case, unlike, divide=True)
    calls, computed = over_the_video(counted), sorted(counted.computed)
    found: dict = {
        "by branch": {
            "error": distance(got, alone),
            "groups": divided.copy(),
            "calls of ranks": calls,
            "computed": computed,
        }
    }
    if not thorough:
        return found
    held = shared(source, case, unlike, hold="sharded", divide=True)
    return {**found, "by branch with sharded weights": torch.equal(held, got)}


def in_groups_of_several(name: str, case: Case) -> dict:
    """On four ranks: groups that share out a sequence among themselves, and a prompt of two parts."""
    source = sparse(build(case), plans.TilePlan.uniform(1))
    found = divisions(source, case, by_one_process(source, case))
    if name == "wan":
        got = run(share(source, divide=True), case, prompts=2)
        found["three branches"] = {
            "error": distance(got, by_one_process(source, case, prompts=2)),
            "groups": divided[-1:],
        }
    return found


def all_cases(ranks: int) -> dict:
    global comm
    comm = module("sharding.communicator").Communicator()
    chosen = os.environ.get("EVDIT_CASES")
    what, names = {2: (facts, CASES), 3: (facts, THOROUGH), 4: (in_groups_of_several, IN_GROUPS)}[ranks]
    results = {}
    for name in chosen.split(",") if chosen else names:
        if missing(CASES[name]):
            results[name] = {"skipped": f"this ComfyUI has no {missing(CASES[name])}"}
            continue
        try:
            results[name] = what(name, CASES[name])
        except Exception:  # every rank meets it, or the others would wait
            results[name] = {"failed": traceback.format_exc()[-1500:]}
            print(results[name]["failed"], file=sys.stderr)
    return results


print(json.dumps({str(ranks): on_ranks(all_cases, ranks) for ranks in (2, 3, 4)}))
